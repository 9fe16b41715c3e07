//! Golden bytes from the specification, truncation at every length, round trips, hostile bytes.

use proptest::prelude::*;

use super::*;

fn encoded(frame: &Frame) -> Vec<u8> {
    let mut out = BytesMut::new();
    frame.encode(&mut out);
    out.to_vec()
}

fn decoder(bytes: &[u8]) -> Decoder {
    Decoder { buffer: BytesMut::from(bytes), broken: None }
}

const GREETING: Greeting =
    Greeting { identity: Identity { vm: [0x11; 16], task: [0x22; 16], generation: 3, lane: 1 }, key: [0x33; 32], taken: 5 };

/// One of each kind; the names are those of the specification.
fn examples() -> Vec<(&'static str, Frame)> {
    vec![
        ("hello", Frame::Hello(GREETING)),
        ("welcome", Frame::Welcome(GREETING)),
        ("forward", Frame::Forward(Bytes::from_static(b"QEVM"))),
        ("forward_end", Frame::ForwardEnd),
        ("return", Frame::Return(Bytes::from_static(&[0, 2, 0, 4, 0, 0, 0, 1]))),
        ("return_end", Frame::ReturnEnd),
        ("control", Frame::Control(Bytes::from_static(b"{}"))),
        ("ack", Frame::Ack(1_048_576)),
        ("ping", Frame::Ping(7)),
        ("pong", Frame::Pong(7)),
        ("pages", Frame::Pages(Bytes::from_static(&[0, 0, 0, 0, 9, 0, 0, 0, 5, 0, 0, 0, 0x81, 7]))),
        ("memory", Frame::Memory(vec![Block { id: Bytes::from_static(b"pc.ram"), pages: 65_536 }])),
        ("held", Frame::Held { block: 0, first: 7, digests: vec![[0x44; 16], [0x55; 16]] }),
        ("held_end", Frame::HeldEnd),
        ("images", Frame::Images(vec![Image { digest: [0x66; 32], pages: 524_288 }])),
        ("common", Frame::Common(vec![[0x77; 16], [0x88; 16]])),
        ("wanted", Frame::Wanted { block: 0, pages: vec![7, 300] }),
        ("advise", Frame::Advise),
        ("left", Frame::Left { block: 0, runs: vec![(7, 1), (300, 2)] }),
        ("switch", Frame::Switch { section: 2 }),
        ("absent", Frame::Absent { block: 0, runs: vec![(7, 1)] }),
        ("missed", Frame::Missed { block: 0, pages: vec![7] }),
        ("zeros", Frame::Zeros { block: 0, runs: vec![(7, 1), (300, 2)] }),
        ("base", Frame::Base(3)),
        ("compare", Frame::Compare(16)),
        ("pieces", Frame::Pieces { block: 0, pages: vec![(7, std::array::from_fn(|index| index as u32))] }),
    ]
}

#[test]
fn the_specification_shows_the_bytes_that_are_sent() {
    let page = include_str!("../../../../docs/spec/carrier.md");
    for (name, frame) in examples() {
        let line = page
            .lines()
            .find_map(|line| line.strip_prefix(&format!("{name}:")))
            .unwrap_or_else(|| panic!("docs/spec/carrier.md has no example of {name}"));
        let bytes: Vec<u8> = line.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).expect("hexadecimal")).collect();
        assert_eq!(encoded(&frame), bytes, "{name}");
        assert_eq!(decoder(&bytes).next_frame(), Ok(Some(frame)), "{name}");
    }
}

#[test]
fn who_sends_which_sequenced_frame_is_as_specified() {
    let page = include_str!("../../../../docs/spec/carrier.md");
    for (name, frame) in examples() {
        let row = page.lines().map(|line| line.split('|').map(str::trim).collect::<Vec<_>>());
        let row = row.into_iter().find(|row| row.get(2) == Some(&&*name.replace('_', " "))).expect(name);
        let [.., direction, sequenced, _] = row[..] else { panic!("{row:?}") };
        let side = if direction.starts_with("source") { Side::Source } else { Side::Destination };
        assert_eq!(frame.sequenced_by(), (sequenced == "yes").then_some(side), "{name}");
    }
}

#[test]
fn a_frame_cut_at_any_length_waits_and_then_decodes() {
    for (name, frame) in examples() {
        let bytes = encoded(&frame);
        for cut in 0..bytes.len() {
            let mut decoder = decoder(&bytes[..cut]);
            assert_eq!(decoder.next_frame(), Ok(None), "{name} cut at {cut}");
            decoder.buffer_mut().extend_from_slice(&bytes[cut..]);
            assert_eq!(decoder.next_frame(), Ok(Some(frame.clone())), "{name} cut at {cut}");
        }
    }
}

#[test]
fn a_hostile_length_is_refused_before_anything_is_allocated() {
    for kind in 0..=255_u8 {
        let mut decoder = decoder(&[kind, 0xff, 0xff, 0xff, 0xff]);
        assert!(decoder.next_frame().is_err(), "kind {kind}");
        assert!(decoder.buffer_mut().capacity() < 4096);
        assert!(decoder.next_frame().is_err(), "a broken connection stays broken");
    }
}

#[test]
fn another_version_is_named() {
    let mut bytes = encoded(&Frame::Hello(GREETING));
    bytes[HEADER + 1] = 9;
    assert_eq!(decoder(&bytes).next_frame(), Err(MalformedFrame::Version(9)));
}

fn any_frame() -> impl Strategy<Value = Frame> {
    let data = prop::collection::vec(any::<u8>(), 1..300).prop_map(Bytes::from);
    let identity = (any::<[u8; 16]>(), any::<[u8; 16]>(), any::<u64>(), any::<u16>())
        .prop_map(|(vm, task, generation, lane)| Identity { vm, task, generation, lane });
    let greeting = (identity, any::<[u8; 32]>(), any::<u64>()).prop_map(|(identity, key, taken)| Greeting { identity, key, taken });
    let block =
        (prop::collection::vec(any::<u8>(), 1..=255), any::<u32>()).prop_map(|(id, pages)| Block { id: Bytes::from(id), pages });
    let held = (any::<u16>(), any::<u32>(), prop::collection::vec(any::<[u8; 16]>(), 1..20));
    prop_oneof![
        greeting.clone().prop_map(Frame::Hello),
        greeting.prop_map(Frame::Welcome),
        prop::collection::vec(block, 0..5).prop_map(Frame::Memory),
        held.prop_map(|(block, first, digests)| Frame::Held { block, first, digests }),
        data.clone().prop_map(Frame::Pages),
        prop::collection::vec(any::<[u8; 16]>(), 1..20).prop_map(Frame::Common),
        Just(Frame::HeldEnd),
        Just(Frame::Advise),
        any::<u64>().prop_map(Frame::Base),
        any::<u32>().prop_map(Frame::Compare),
        any::<u32>().prop_map(|section| Frame::Switch { section }),
        (any::<u16>(), prop::collection::vec(any::<(u32, u32)>(), 1..20)).prop_map(|(block, runs)| Frame::Left { block, runs }),
        (any::<u16>(), prop::collection::vec(any::<(u32, u32)>(), 1..20)).prop_map(|(block, runs)| Frame::Zeros { block, runs }),
        (any::<u16>(), prop::collection::vec(any::<u32>(), 1..=MAX_MISSED))
            .prop_map(|(block, pages)| Frame::Missed { block, pages }),
        prop::collection::vec((any::<[u8; 32]>(), any::<u32>()), 1..=MAX_IMAGES)
            .prop_map(|images| Frame::Images(images.into_iter().map(|(digest, pages)| Image { digest, pages }).collect())),
        data.clone().prop_map(Frame::Forward),
        data.clone().prop_map(Frame::Return),
        data.prop_map(Frame::Control),
        Just(Frame::ForwardEnd),
        Just(Frame::ReturnEnd),
        any::<u64>().prop_map(Frame::Ack),
        any::<u64>().prop_map(Frame::Ping),
        any::<u64>().prop_map(Frame::Pong),
    ]
}

proptest! {
    #[test]
    fn prop_frames_survive_any_cutting_of_the_stream(frames in prop::collection::vec(any_frame(), 0..12), cut in 1..64_usize) {
        let mut bytes = BytesMut::new();
        frames.iter().for_each(|frame| frame.encode(&mut bytes));
        let mut decoder = Decoder::default();
        let mut seen = Vec::new();
        for part in bytes.chunks(cut) {
            decoder.buffer_mut().extend_from_slice(part);
            while let Some(frame) = decoder.next_frame().expect("well formed") {
                seen.push(frame);
            }
        }
        prop_assert_eq!(seen, frames);
    }

    #[test]
    fn prop_no_bytes_can_panic_the_decoder(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut decoder = decoder(&bytes);
        while let Ok(Some(_)) = decoder.next_frame() {}
    }
}
