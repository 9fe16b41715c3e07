//! Golden bytes from the specification, truncation at every length, round trips, hostile bytes.

use proptest::prelude::*;

use super::*;
use crate::tests::{example, id};

fn examples() -> Vec<(&'static str, ReturnMessage)> {
    vec![
        ("pong", ReturnMessage::Pong(1)),
        ("req_pages_id", ReturnMessage::ReqPagesId { start: 0x1000, length: 0x1000, block: id("pc.ram") }),
        ("req_pages", ReturnMessage::ReqPages { start: 0x2000, length: 0x1000 }),
        ("recv_bitmap", ReturnMessage::RecvBitmap { block: id("pc.ram"), size: 8 }),
        ("bitmap", ReturnMessage::Bitmap(Bytes::from_static(&[0xff; 8]))),
        ("resume_ack", ReturnMessage::ResumeAck(1)),
        ("switchover_ack", ReturnMessage::SwitchoverAck),
        ("shut", ReturnMessage::Shut(0)),
    ]
}

/// Reads bytes that come in pieces of `cut`; neighbouring pieces of a bitmap are joined.
fn read(bytes: &[u8], cut: usize) -> Result<Vec<ReturnMessage>, ReturnError> {
    let mut reader = ReturnReader::new();
    let mut messages: Vec<ReturnMessage> = Vec::new();
    for piece in bytes.chunks(cut) {
        reader.buffer_mut().extend_from_slice(piece);
        while let Some(message) = reader.next_message()? {
            match (messages.last_mut(), message) {
                (Some(ReturnMessage::Bitmap(before)), ReturnMessage::Bitmap(more)) => {
                    *before = [before.as_ref(), &more].concat().into();
                }
                (_, message) => messages.push(message),
            }
        }
    }
    Ok(messages)
}

fn write(messages: &[ReturnMessage]) -> Vec<u8> {
    let (mut writer, mut out) = (ReturnWriter::new(), BytesMut::new());
    for message in messages {
        writer.write(message, &mut out).expect("in order");
    }
    out.to_vec()
}

#[test]
fn the_specification_shows_the_bytes_that_are_read_and_written() {
    let mut writer = ReturnWriter::new();
    let mut bytes = Vec::new();
    for (name, message) in examples() {
        let mut out = BytesMut::new();
        writer.write(&message, &mut out).expect("in order");
        assert_eq!(out.to_vec(), example(name), "{name}");
        bytes.extend_from_slice(&out);
    }
    let messages: Vec<ReturnMessage> = examples().into_iter().map(|(_, message)| message).collect();
    assert_eq!(read(&bytes, bytes.len()), Ok(messages));
}

#[test]
fn a_message_cut_at_any_length_waits_and_then_is_read() {
    let messages: Vec<ReturnMessage> = examples().into_iter().map(|(_, message)| message).collect();
    let bytes = write(&messages);
    for cut in 1..=bytes.len() {
        assert_eq!(read(&bytes, cut).as_ref(), Ok(&messages), "in pieces of {cut}");
        let (head, rest) = bytes.split_at(cut);
        let mut reader = ReturnReader::new();
        reader.buffer_mut().extend_from_slice(head);
        let mut seen = Vec::new();
        for more in [rest, &[]] {
            while let Some(message) = reader.next_message().expect("well formed") {
                seen.push(message);
            }
            reader.buffer_mut().extend_from_slice(more);
        }
        assert_eq!(write(&seen), bytes, "cut at {cut}");
    }
}

#[test]
fn a_hostile_message_is_refused_before_anything_is_allocated() {
    for kind in 0..=u16::from(u8::MAX) {
        let mut reader = ReturnReader::new();
        let length = u16::MAX;
        reader.buffer_mut().extend_from_slice(&[kind.to_be_bytes(), length.to_be_bytes()].concat());
        let refused = if (1..=7).contains(&kind) { ReturnError::Length { kind, length } } else { ReturnError::Kind(kind) };
        assert_eq!(reader.next_message(), Err(refused));
        assert_eq!(reader.next_message(), Err(refused), "a broken path stays broken");
        assert!(reader.buffer_mut().capacity() < 4096);
    }
    let named = [b"\0\x03\0\x0e".as_slice(), &[0; 12], b"\x02a"].concat();
    assert_eq!(read(&named, 64), Err(ReturnError::Length { kind: 3, length: 14 }));
    for size in [0, 7, MAX_BITMAP + 8, u64::MAX] {
        let bytes = [b"\0\x05\0\x02\x01a".as_slice(), &size.to_be_bytes()].concat();
        assert_eq!(read(&bytes, 64), Err(ReturnError::BitmapSize(size)));
        let message = ReturnMessage::RecvBitmap { block: id("a"), size };
        let mut out = BytesMut::new();
        let refused = ReturnWriteError::Refused(ReturnError::BitmapSize(size));
        assert_eq!(ReturnWriter::new().write(&message, &mut out), Err(refused));
        assert!(out.is_empty());
    }
    let mark = [b"\0\x05\0\x02\x01a".as_slice(), &8_u64.to_be_bytes(), &[0; 16]].concat();
    assert_eq!(read(&mark, 64), Err(ReturnError::BitmapMark(0)));
}

#[test]
fn a_bitmap_is_written_where_it_is_due_and_nowhere_else() {
    let (mut writer, mut out) = (ReturnWriter::new(), BytesMut::new());
    let piece = |length| ReturnMessage::Bitmap(vec![1; length].into());
    assert_eq!(writer.write(&piece(8), &mut out), Err(ReturnWriteError::Order));
    writer.write(&ReturnMessage::RecvBitmap { block: id("a"), size: 16 }, &mut out).expect("in order");
    assert_eq!(writer.write(&ReturnMessage::Shut(0), &mut out), Err(ReturnWriteError::Order));
    writer.write(&piece(9), &mut out).expect("in order");
    assert_eq!(writer.write(&piece(8), &mut out), Err(ReturnWriteError::BitmapTooLong { piece: 8, left: 7 }));
    writer.write(&piece(7), &mut out).expect("in order");
    writer.write(&ReturnMessage::Shut(0), &mut out).expect("in order");
}

fn any_messages() -> impl Strategy<Value = Vec<ReturnMessage>> {
    let block = || prop::collection::vec(any::<u8>(), 1..=255).prop_map(|name| BlockId::new(&name).expect("short"));
    let one = prop_oneof![
        any::<u32>().prop_map(|value| vec![ReturnMessage::Shut(value)]),
        any::<u32>().prop_map(|value| vec![ReturnMessage::Pong(value)]),
        any::<u32>().prop_map(|value| vec![ReturnMessage::ResumeAck(value)]),
        Just(vec![ReturnMessage::SwitchoverAck]),
        any::<(u64, u32)>().prop_map(|(start, length)| vec![ReturnMessage::ReqPages { start, length }]),
        (any::<(u64, u32)>(), block()).prop_map(|((start, length), block)| vec![ReturnMessage::ReqPagesId {
            start,
            length,
            block
        }]),
        (block(), 1..9_usize).prop_map(|(block, words)| {
            let bitmap = Bytes::from(vec![0x5a; words * 8]);
            vec![ReturnMessage::RecvBitmap { block, size: bitmap.len() as u64 }, ReturnMessage::Bitmap(bitmap)]
        }),
    ];
    prop::collection::vec(one, 0..10).prop_map(|messages| messages.concat())
}

proptest! {
    #[test]
    fn prop_a_return_path_survives_any_cutting(messages in any_messages(), cut in 1..64_usize) {
        prop_assert_eq!(read(&write(&messages), cut), Ok(messages));
    }

    #[test]
    fn prop_no_bytes_can_panic_the_reader(bytes in prop::collection::vec(any::<u8>(), 0..400), kind in 0..9_u8, cut in 1..64_usize) {
        let _ = read(&[vec![0, kind, 0], bytes].concat(), cut);
    }
}

#[test]
#[expect(clippy::disallowed_methods, reason = "the corpus is files; the reader under test sees bytes")]
fn corpus_every_stored_return_path_is_taken_without_panic() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/return_path");
    let mut inputs = 0;
    for entry in std::fs::read_dir(folder).expect("the corpus is checked in") {
        let path = entry.expect("readable").path();
        let bytes = std::fs::read(&path).expect("readable");
        let whole = read(&bytes, bytes.len().max(1));
        assert_eq!(whole, read(&bytes, 3), "{}", path.display());
        if let Ok(messages) = whole {
            // The mark behind a bitmap is written with the bitmap's last byte, before it was read.
            let bitmap = messages.iter().any(|message| matches!(message, ReturnMessage::RecvBitmap { .. }));
            assert!(bitmap || bytes.starts_with(&write(&messages)), "{}", path.display());
        }
        inputs += 1;
    }
    assert!(inputs >= 5, "the corpus has only {inputs} inputs");
}
