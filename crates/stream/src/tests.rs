//! Golden bytes from the specification, truncation at every length, and what the tests share.

use bytes::{Bytes, BytesMut};

use crate::*;

mod captures;
mod corpus;
mod generated;
mod hostile;

const PAGE: &str = include_str!("../../../docs/spec/qemu-stream.md");

/// The bytes of the specification's example `name`; `ab*3` is a byte three times.
pub(crate) fn example(name: &str) -> Vec<u8> {
    let line = PAGE
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{name}:")))
        .unwrap_or_else(|| panic!("docs/spec/qemu-stream.md has no example of {name}"));
    let hex = |text: &str| u8::from_str_radix(text, 16).expect("hexadecimal");
    line.split_whitespace()
        .flat_map(|word| match word.split_once('*') {
            Some((byte, times)) => vec![hex(byte); times.parse().expect("a number")],
            None => vec![hex(word)],
        })
        .collect()
}

pub(crate) fn id(name: &str) -> BlockId {
    BlockId::new(name.as_bytes()).expect("short")
}

fn block(name: &str, pages: u64) -> RamBlock {
    RamBlock { id: id(name), length: pages * 4096 }
}

fn page(block: u16, page: u64, fill: Option<u8>) -> Element {
    let content = fill.map_or(PageContent::Zero, |fill| PageContent::Data(vec![fill; PAGE_SIZE].into()));
    Element::Page { block: BlockIndex(block), page, content }
}

fn command(number: u16, payload: &'static [u8]) -> Element {
    Element::Command { number, payload: Bytes::from_static(payload) }
}

/// Whatever is in the buffer, to the end or to an error.
fn drain(reader: &mut Reader) -> Result<Vec<Element>, StreamError> {
    let mut elements = Vec::new();
    while let Some(element) = reader.next_element()? {
        elements.push(element);
    }
    Ok(elements)
}

/// Reads bytes that come in pieces of `cut`; neighbouring opaque elements are joined, since their borders mean nothing.
fn read(bytes: &[u8], cut: usize) -> Result<Vec<Element>, StreamError> {
    let mut reader = Reader::new();
    let mut elements: Vec<Element> = Vec::new();
    for piece in bytes.chunks(cut) {
        reader.buffer_mut().extend_from_slice(piece);
        for element in drain(&mut reader)? {
            match (elements.last_mut(), element) {
                (Some(Element::Opaque(before)), Element::Opaque(more)) => *before = [before.as_ref(), &more].concat().into(),
                (_, element) => elements.push(element),
            }
        }
    }
    Ok(elements)
}

fn write(elements: &[Element]) -> Vec<u8> {
    let mut out = BytesMut::new();
    let mut writer = Writer::new();
    for element in elements {
        writer.write(element, &mut out).expect("in order");
    }
    out.to_vec()
}

/// Writes what was read, and reads it.
fn read_again(elements: &[Element]) -> Result<Vec<Element>, StreamError> {
    let mut bytes = write(elements);
    if matches!(elements.last(), Some(Element::Configuration(_))) {
        // The byte behind a configuration tells that it is whole.
        bytes.push(8);
    }
    read(&bytes, bytes.len().max(1))
}

/// A whole stream; the names are those of the specification.
fn examples() -> Vec<(&'static str, Element)> {
    let machine = "pc-q35-7.2".to_owned();
    let blocks = vec![block("pc.ram", 3), block("pc.rom", 1)];
    vec![
        ("header", Element::Header),
        ("configuration", Element::Configuration(Configuration { machine, subsections: vec![Subsection::Uuid([0x11; 16])] })),
        ("open_return_path", command(1, &[])),
        ("ping", command(2, &[0, 0, 0, 1])),
        ("ram_start", Element::RamStart(RamStart { section: 2, instance: 0, blocks, multifd_flush: false })),
        ("early", Element::Early(example("early").into())),
        ("part_begin", Element::PartBegin),
        ("page_data", page(0, 1, Some(0xab))),
        ("page_zero_continued", page(0, 2, None)),
        ("page_zero", page(1, 0, None)),
        ("part_end", Element::PartEnd),
        ("switchover_start", command(11, &[])),
        ("end_begin", Element::EndBegin),
        ("page_data_continued", page(1, 0, Some(0xcd))),
        ("end_end", Element::EndEnd),
        ("opaque", Element::Opaque(example("opaque").into())),
    ]
}

/// A stream that becomes opaque with a section that is not known.
fn tunnelled_examples() -> Vec<(&'static str, Element)> {
    let machine = "pc-q35-7.2".to_owned();
    let start = RamStart { section: 1, instance: 0, blocks: vec![block("pc.ram", 1)], multifd_flush: true };
    vec![
        ("tunnel_header", Element::Header),
        ("tunnel_configuration", Element::Configuration(Configuration { machine, subsections: Vec::new() })),
        ("tunnel_ram_start", Element::RamStart(start)),
        ("tunnel_opaque", Element::Opaque(example("tunnel_opaque").into())),
    ]
}

#[test]
fn the_specification_shows_the_bytes_that_are_read_and_written() {
    for list in [examples(), tunnelled_examples()] {
        let mut writer = Writer::new();
        let mut bytes = Vec::new();
        for (name, element) in &list {
            let mut out = BytesMut::new();
            writer.write(element, &mut out).expect("in order");
            assert_eq!(out.to_vec(), example(name), "{name}");
            bytes.extend_from_slice(&out);
        }
        let elements: Vec<Element> = list.into_iter().map(|(_, element)| element).collect();
        assert_eq!(read(&bytes, bytes.len()), Ok(elements));
    }
}

#[test]
fn a_stream_cut_anywhere_waits_and_then_goes_on() {
    for list in [examples(), tunnelled_examples()] {
        let elements: Vec<Element> = list.into_iter().map(|(_, element)| element).collect();
        let bytes = write(&elements);
        for cut in 1..bytes.len() {
            let (head, rest) = bytes.split_at(cut);
            let mut reader = Reader::new();
            reader.buffer_mut().extend_from_slice(head);
            let before = drain(&mut reader).unwrap_or_else(|error| panic!("cut at {cut}: {error}"));
            // All that came is either given out or waited with.
            assert!(elements.len() >= before.len());
            assert_eq!(write(&before).len() + reader.buffer_mut().len(), cut, "cut at {cut}");
            reader.buffer_mut().extend_from_slice(rest);
            let all = [before, drain(&mut reader).expect("well formed")].concat();
            assert_eq!(write(&all), bytes, "cut at {cut}");
        }
        assert_eq!(read(&bytes, 1).expect("well formed"), elements);
    }
}

#[test]
fn an_element_is_given_out_with_its_last_byte() {
    let mut reader = Reader::new();
    for (name, element) in examples() {
        let bytes = example(name);
        let (last, head) = bytes.split_last().expect("not empty");
        reader.buffer_mut().extend_from_slice(head);
        let early = drain(&mut reader).expect("well formed");
        reader.buffer_mut().extend_from_slice(&[*last]);
        let elements = drain(&mut reader).expect("well formed");
        match name {
            // The next byte tells that there is no further subsection.
            "configuration" => assert!(early.is_empty() && elements.is_empty()),
            "open_return_path" => assert!(early.len() == 1 && elements == [element], "the configuration comes with the first byte"),
            "opaque" => assert_eq!(early.len(), 1, "opaque bytes are not waited with"),
            _ => assert_eq!((early, elements), (Vec::new(), vec![element]), "{name}"),
        }
    }
}

#[test]
fn a_page_is_a_view_of_what_was_read() {
    let bytes = write(&examples().into_iter().map(|(_, element)| element).collect::<Vec<_>>());
    let mut reader = Reader::new();
    reader.buffer_mut().extend_from_slice(&bytes);
    let room = reader.buffer_mut().as_ptr_range();
    for element in drain(&mut reader).expect("well formed") {
        if let Element::Page { content: PageContent::Data(data), .. } = element {
            assert!(room.contains(&data.as_ptr()));
        }
    }
}

#[test]
fn the_reader_says_why_a_stream_is_passed_on_unread() {
    let mut reader = Reader::new();
    let (last, rest) = tunnelled_examples().len().checked_sub(1).map(|last| (last, tunnelled_examples())).expect("not empty");
    for (name, _) in rest.iter().take(last) {
        reader.buffer_mut().extend_from_slice(&example(name));
    }
    drain(&mut reader).expect("well formed");
    assert_eq!(reader.tunnelled(), None);
    reader.buffer_mut().extend_from_slice(&example("tunnel_opaque"));
    drain(&mut reader).expect("well formed");
    assert_eq!(reader.tunnelled(), Some("dirty-bitmap"));
}
