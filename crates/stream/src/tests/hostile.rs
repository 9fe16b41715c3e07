//! What is refused, and that it is refused before anything is allocated or waited for.

use bytes::BufMut;
use proptest::prelude::*;

use super::*;

/// The stream of the specification up to and with the example `last`.
fn up_to(last: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, _) in examples() {
        bytes.extend_from_slice(&example(name));
        if name == last {
            return bytes;
        }
    }
    panic!("no example {last}")
}

/// What the reader says to `more` after the example `last`.
fn refusal(last: &str, more: &[u8]) -> StreamError {
    let mut reader = Reader::new();
    reader.buffer_mut().extend_from_slice(&up_to(last));
    reader.buffer_mut().extend_from_slice(more);
    let error = drain(&mut reader).expect_err("refused");
    assert!(reader.buffer_mut().capacity() < 64 << 10);
    assert_eq!(reader.next_element(), Err(error.clone()), "a broken stream stays broken");
    error
}

fn start(total: u64, blocks: &[(&str, u64)]) -> Vec<u8> {
    let mut bytes = b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04".to_vec();
    bytes.put_u64(total | 4);
    for (id, length) in blocks {
        bytes.put_u8(u8::try_from(id.len()).expect("short"));
        bytes.put_slice(id.as_bytes());
        bytes.put_u64(*length);
    }
    bytes
}

fn word(word: u64) -> [u8; 8] {
    word.to_be_bytes()
}

#[test]
fn a_wrong_beginning_is_refused() {
    let read = |bytes: &[u8]| read(bytes, bytes.len()).expect_err("refused");
    assert_eq!(read(b"GET / HTTP/1.1"), StreamError::Magic(0x4745_5420));
    assert_eq!(read(b"QEVM\0\0\0\x02"), StreamError::Version(2));
    assert_eq!(refusal("header", &[8]), StreamError::NoConfiguration(8));
    for length in [0, 256, u32::MAX] {
        let bytes = [&[7][..], &length.to_be_bytes()].concat();
        assert_eq!(refusal("header", &bytes), StreamError::MachineName { length });
    }
    assert_eq!(refusal("header", b"\x07\0\0\0\x02a\n"), StreamError::MachineName { length: 2 });
}

#[test]
fn what_changes_the_format_is_refused() {
    let subsection = |name: &str, version: u8, body: &[u8]| {
        let length = u8::try_from(name.len()).expect("short");
        refusal("header", &[b"\x07\0\0\0\x01m\x05", &[length][..], name.as_bytes(), &[0, 0, 0, version], body].concat())
    };
    assert_eq!(subsection("configuration/target-page-bits", 1, &[0, 0, 0, 16]), StreamError::PageBits(16));
    for name in ["x-ignore-shared", "mapped-ram"] {
        let length = u8::try_from(name.len()).expect("short");
        let body = [&[0, 0, 0, 1, length][..], name.as_bytes()].concat();
        assert_eq!(subsection("configuration/capabilities", 1, &body), StreamError::Capability(name.to_owned()));
    }
    for (name, version) in [("configuration/capabilities", 1), ("configuration/uuid", 2), ("configuration/new\u{1}", 1)] {
        let refused = StreamError::Subsection { name: name.replace('\u{1}', "?"), version: version.into() };
        assert_eq!(subsection(name, version, &[0, 0, 0, 0]), refused);
    }
    let twice = example("configuration").split_off(15);
    let refused = StreamError::Subsection { name: "configuration/uuid".to_owned(), version: 1 };
    let mut reader = Reader::new();
    reader.buffer_mut().extend_from_slice(&up_to("configuration"));
    reader.buffer_mut().extend_from_slice(&twice);
    assert_eq!(drain(&mut reader), Err(refused));
}

#[test]
fn commands_of_post_copy_are_refused_and_unknown_ones_passed_on() {
    for number in [3, 4, 5, 6, 7, 9, 10] {
        let bytes = [8, 0, number, 0, if number == 3 { 16 } else { 0 }];
        assert_eq!(refusal("ping", &bytes), StreamError::PostCopy { command: number.into() });
    }
    assert_eq!(refusal("ping", &[8, 0, 8, 0, 0]), StreamError::Colo);
    for (bytes, passed) in [(&b"\x08\xff\xfe\0\x02hi"[..], command(0xfffe, b"hi")), (b"\x08\0\x03\0\0", command(3, b""))] {
        let bytes = [&up_to("ping"), bytes].concat();
        assert_eq!(read(&bytes, bytes.len()).expect("passed on").last(), Some(&passed));
    }
}

#[test]
fn a_list_of_blocks_that_is_none_is_refused() {
    let refused = |bytes: &[u8]| match refusal("ping", bytes) {
        StreamError::Blocks(error) => error,
        other => panic!("{other}"),
    };
    assert_eq!(refused(&[start(0, &[]), word(0x10).to_vec(), b"\x7e\0\0\0\x02".to_vec()].concat()), BlocksError::Empty);
    assert_eq!(refused(&start(8192, &[("", 4096)])), BlocksError::Nameless);
    assert_eq!(refused(&start(8192, &[("a", 4097)])), BlocksError::Length(4097));
    assert_eq!(refused(&start(8192, &[("a", 0)])), BlocksError::Length(0));
    assert_eq!(refused(&start(8192, &[("a", 4096), ("b", 8192)])), BlocksError::Total { total: 8192 });
    assert_eq!(refused(&start(8192, &[("a", u64::MAX << 12)])), BlocksError::Total { total: 8192 });
    let twice = [start(8192, &[("a", 4096), ("a", 4096)]), word(0x10).to_vec(), b"\x7e\0\0\0\x02".to_vec()].concat();
    assert_eq!(refused(&twice), BlocksError::Twice("a".to_owned()));
    let names: Vec<String> = (0..=MAX_BLOCKS).map(|number| format!("b{number}")).collect();
    let many: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 4096)).collect();
    assert_eq!(refused(&start(u64::MAX << 12, &many)), BlocksError::TooMany);
}

#[test]
fn a_malformed_start_of_ram_is_refused() {
    let version = b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x03";
    assert_eq!(refusal("ping", version), StreamError::RamVersion(3));
    let no_list = [&b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04"[..], &word(0x1008)].concat();
    assert_eq!(refusal("ping", &no_list), StreamError::RecordFlags(8));
    let page = [start(4096, &[("a", 4096)]), word(0x02).to_vec()].concat();
    assert_eq!(refusal("ping", &page), StreamError::RecordFlags(2));
    let footer = [start(4096, &[("a", 4096)]), word(0x10).to_vec()].concat();
    assert_eq!(refusal("ping", &[&footer[..], b"\x02"].concat()), StreamError::NoFooter(2));
    assert_eq!(refusal("ping", &[&footer[..], b"\x7e\0\0\0\x03"].concat()), StreamError::SectionNumber { expected: 2, found: 3 });
    assert_eq!(refusal("ram_start", &start(4096, &[])), StreamError::SecondStart);
}

#[test]
fn an_impossible_early_section_is_refused() {
    let good = example("early");
    let with = |at: usize, bytes: &[u8]| {
        let mut changed = good.clone();
        changed.splice(at..at + bytes.len(), bytes.iter().copied());
        changed
    };
    let (region, block) = (45, 53);
    assert_eq!(good[region..block + 8], [&word(0x800_0000)[..], &word(0x20_0000)].concat());
    for bytes in [with(block, &[0; 8]), with(block, &word(1)), with(region, &word(u64::MAX)), with(36, &[2])] {
        assert_eq!(refusal("ping", &bytes), StreamError::Early);
    }
    assert_eq!(refusal("ping", &with(good.len() - 1, &[9])), StreamError::SectionNumber { expected: 1, found: 9 });
}

#[test]
fn records_that_are_not_supported_are_refused() {
    for flags in [0x001, 0x040, 0x080, 0x100, 0x200, 0x400, 0x800, 0x00a, 0x030, 0x000, 0x048, 0x004] {
        assert_eq!(refusal("part_begin", &word(flags | 0x1000)), StreamError::RecordFlags(flags));
    }
    assert_eq!(refusal("part_begin", &word(0x200)), StreamError::RecordFlags(0x200));
    assert_eq!(refusal("part_begin", &word(0x1010)), StreamError::RecordFlags(0x10));
    assert_eq!(refusal("part_begin", &word(0x28)), StreamError::NoBlock);
    assert_eq!(refusal("part_begin", &[&word(0x08)[..], b"\x03pc\x07"].concat()), StreamError::UnknownBlock("pc?".to_owned()));
    assert_eq!(refusal("part_begin", &[&word(0x08)[..], b"\0"].concat()), StreamError::UnknownBlock(String::new()));
    assert_eq!(refusal("page_data", &word(0x3028)), StreamError::OutsideBlock { block: 0, page: 3 });
    assert_eq!(refusal("page_data", &word(u64::MAX << 12 | 0x22)), StreamError::OutsideBlock { block: 0, page: (1 << 52) - 1 });
    assert_eq!(refusal("page_data", &[&word(0x22)[..], b"\xff"].concat()), StreamError::Fill(0xff));
}

#[test]
fn sections_out_of_place_are_refused() {
    assert_eq!(refusal("ping", b"\x02\0\0\0\x02"), StreamError::NotOpen(2));
    assert_eq!(refusal("ram_start", b"\x02\0\0\0\x03"), StreamError::SectionNumber { expected: 2, found: 3 });
    assert_eq!(refusal("end_end", b"\x03\0\0\0\x02"), StreamError::NotOpen(2));
    assert_eq!(refusal("part_end", b"\0"), StreamError::EarlyEnd);
    for kind in [5, 6, 7, 9, 0x7e, 0xff] {
        assert_eq!(refusal("part_end", &[kind]), StreamError::Kind(kind));
    }
    for kind in [1, 4] {
        let unknown = [&[kind, 0, 0, 0, 9, 5][..], b"vf\xffio"].concat();
        assert_eq!(refusal("part_end", &unknown), StreamError::UnknownSection("vf?io".to_owned()));
        let mut reader = Reader::new();
        reader.buffer_mut().extend_from_slice(&up_to("ram_start"));
        reader.buffer_mut().extend_from_slice(&unknown);
        drain(&mut reader).expect("passed on");
        assert_eq!(reader.tunnelled(), Some("vf?io"));
    }
}

#[test]
fn a_name_in_a_message_is_short_and_printable() {
    let mut unknown = vec![1, 0, 0, 0, 9, 255];
    unknown.extend_from_slice(&[0x1b; 255]);
    assert_eq!(refusal("part_end", &unknown), StreamError::UnknownSection("?".repeat(64)));
}

#[test]
fn what_cannot_be_written_is_refused_and_leaves_nothing() {
    let elements: Vec<Element> = examples().into_iter().map(|(_, element)| element).collect();
    let refusal = |after: usize, element: Element| {
        let (mut writer, mut out) = (Writer::new(), BytesMut::new());
        for before in elements.iter().take(after) {
            writer.write(before, &mut out).expect("in order");
        }
        let length = out.len();
        let error = writer.write(&element, &mut out).expect_err("refused");
        assert_eq!(out.len(), length);
        for rest in elements.iter().skip(after) {
            writer.write(rest, &mut out).expect("the writer is as it was");
        }
        assert_eq!(out.to_vec(), write(&elements));
        error
    };
    for element in &elements[1..] {
        assert_eq!(refusal(0, element.clone()), WriteError::Order { element: element.name() });
    }
    let configuration = |machine: &str, subsections: &[Subsection]| {
        Element::Configuration(Configuration { machine: machine.to_owned(), subsections: subsections.to_vec() })
    };
    let machine = |length| WriteError::Refused(StreamError::MachineName { length });
    assert_eq!(refusal(1, configuration("", &[])), machine(0));
    assert_eq!(refusal(1, configuration("a b", &[])), machine(3));
    assert_eq!(refusal(1, configuration(&"a".repeat(256), &[])), machine(256));
    let twice = StreamError::Subsection { name: "configuration/target-page-bits".to_owned(), version: 1 };
    assert_eq!(refusal(1, configuration("a", &[Subsection::PageBits; 2])), WriteError::Refused(twice));
    assert_eq!(refusal(3, command(7, &[])), WriteError::Refused(StreamError::PostCopy { command: 7 }));
    let long = Element::Command { number: 1, payload: vec![0; 65_536].into() };
    assert_eq!(refusal(3, long), WriteError::TooLong { length: 65_536 });
    let early = Element::Early(Bytes::from(example("early")).slice(1..));
    assert_eq!(refusal(5, early), WriteError::Refused(StreamError::Early));
    let list = |blocks| Element::RamStart(RamStart { section: 2, instance: 0, blocks, multifd_flush: false });
    for blocks in [vec![], vec![block("a", 1); 2], vec![block("a", 0)]] {
        assert!(matches!(refusal(4, list(blocks)), WriteError::Refused(StreamError::Blocks(_))));
    }
    assert_eq!(refusal(7, page(2, 0, None)), WriteError::UnknownBlock { block: 2 });
    assert_eq!(refusal(7, page(1, 1, None)), WriteError::OutsideBlock { block: 1, page: 1 });
    let short = Element::Page { block: BlockIndex(0), page: 0, content: PageContent::Data(Bytes::from_static(b"short")) };
    assert_eq!(refusal(7, short), WriteError::PageLength { length: 5 });
    assert_eq!(refusal(6, page(0, 0, None)), WriteError::Order { element: "page" });
}

proptest! {
    #[test]
    fn prop_no_bytes_can_panic_the_reader(bytes in prop::collection::vec(any::<u8>(), 0..400), last in 0..16_usize, cut in 1..64_usize) {
        let (name, _) = examples().swap_remove(last);
        let _ = read(&[up_to(name), bytes].concat(), cut);
    }

    #[test]
    fn prop_a_changed_byte_cannot_panic_the_reader(at in any::<prop::sample::Index>(), value in any::<u8>()) {
        let mut bytes = up_to("opaque");
        let at = at.index(bytes.len());
        bytes[at] = value;
        if let Ok(elements) = read(&bytes, bytes.len()) {
            // What is taken can be written, and reads the same.
            prop_assert_eq!(read_again(&elements), Ok(elements));
        }
    }
}
