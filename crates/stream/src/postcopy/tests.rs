//! Golden bytes from the specification, and the end of what real QEMUs have written.

use super::*;
use crate::tests::{example, id};

fn written(write: impl FnOnce(&mut BytesMut)) -> Vec<u8> {
    let mut out = BytesMut::new();
    write(&mut out);
    out.to_vec()
}

#[test]
fn what_is_written_is_what_the_specification_says() {
    let ram = id("pc.ram");
    assert_eq!(written(put_advise), example("advise"));
    assert_eq!(written(|out| put_discards(out, &ram, &[(1, 2), (5, 1)])), example("discards"));
    assert_eq!(written(|out| put_package(out, &[4, 5], 3)), example("package"));
    assert_eq!(written(|out| put_end(out, 2)), example("end_after"));
    assert_eq!(written(put_resume), example("resume"));
    assert_eq!(written(|out| put_ask_received(out, &ram)), example("ask_received"));
    let pages = written(|out| {
        let mut pages = PagesAfter::begin(out, 2);
        pages.put((0, &ram), 1, &[0xab; PAGE_SIZE]);
        pages.put((0, &ram), 2, &[0; PAGE_SIZE]);
        pages.end();
    });
    assert_eq!(pages, example("pages_after"));
}

#[test]
fn many_runs_take_several_commands() {
    let ram = id("pc.ram");
    let runs: Vec<(u32, u32)> = (0..30).map(|run| (run * 2, 1)).collect();
    let mut both = written(|out| put_discards(out, &ram, &runs[..24]));
    both.extend(written(|out| put_discards(out, &ram, &runs[24..])));
    assert_eq!(written(|out| put_discards(out, &ram, &runs)), both);
}

#[test]
fn pages_after_the_switch_name_their_block_when_it_is_another() {
    let (ram, rom) = (id("pc.ram"), id("pc.rom"));
    let length = |numbers: &[(u16, &BlockId)]| {
        let pages = |out: &mut BytesMut| {
            let mut pages = PagesAfter::begin(out, 2);
            numbers.iter().for_each(|block| pages.put(*block, 0, &[0; PAGE_SIZE]));
            pages.end();
        };
        written(pages).len()
    };
    let (named, continued) = (8 + 7 + 1, 8 + 1);
    assert_eq!(length(&[(0, &ram), (0, &ram)]) - length(&[]), named + continued);
    assert_eq!(length(&[(0, &ram), (1, &rom), (0, &ram)]) - length(&[]), 3 * named);
}

/// The tail of what real QEMUs have written.
fn tails() -> [Vec<u8>; 2] {
    let streams: [&[u8]; 2] =
        [include_bytes!("../../tests/captures/pc-q35-7.2.stream"), include_bytes!("../../tests/captures/pc-q35-10.0.stream")];
    streams.map(|stream| {
        let mut reader = crate::Reader::new();
        reader.buffer_mut().extend_from_slice(stream);
        let mut tail = Vec::new();
        while let Some(element) = reader.next_element().expect("well formed") {
            if let crate::Element::Opaque(bytes) = element {
                tail.extend(bytes);
            }
        }
        tail
    })
}

#[test]
fn the_device_state_of_real_qemus_is_whole_at_its_last_byte_and_not_before() {
    for tail in tails() {
        let mut state = DeviceState::default();
        let (last, rest) = tail.split_last().expect("there is a tail");
        for byte in rest {
            state.push(&[*byte]).expect("short");
            assert_eq!(state.take(), None);
        }
        state.push(&[*last]).expect("short");
        let devices = state.take().expect("whole");
        let description = tail.get(devices.len()..).expect("longer");
        assert_eq!(description.get(..2), Some(&[0, 6][..]));
        assert!(description.get(6..).is_some_and(|text| text.starts_with(b"{\"")));
        assert_eq!(devices.last_chunk::<5>().map(|footer| footer[0]), Some(0x7e), "a section's footer");
    }
}

#[test]
fn a_length_that_looks_like_the_mark_is_none() {
    for length in [6_usize, 0x0606, 0x0006_0006] {
        let mut tail = vec![4, 6, 6, 0, 6];
        tail.extend(u32::try_from(length).expect("short").to_be_bytes());
        tail.push(b'{');
        tail.resize(tail.len() + length - 2, b' ');
        tail.push(b'}');
        let mut state = DeviceState::default();
        state.push(&tail).expect("short");
        assert_eq!(state.take().as_deref(), Some(&[4, 6, 6][..]), "{length}");
    }
}

#[test]
fn device_state_without_end_is_refused_in_time() {
    let mut state = DeviceState::default();
    let piece = vec![7; 1 << 20];
    for _ in 0..MAX_DEVICE_STATE / piece.len() {
        state.push(&piece).expect("up to the limit");
    }
    assert_eq!(state.push(&[7]), Err(DeviceStateTooLong));
}
