//! Streams that real QEMUs have written; how they were made is in `tests/captures/README.md`.

use std::collections::BTreeMap;

use super::*;

struct Expected {
    machine: &'static str,
    blocks: &'static [(&'static str, u64)],
    commands: &'static [u16],
    parts: usize,
    /// Pages that are not zero.
    data: usize,
    zero: usize,
}

const BLOCKS: &[(&str, u64)] = &[
    ("pc.ram", 2 << 20),
    ("/rom@etc/acpi/tables", 128 << 10),
    ("pc.rom", 128 << 10),
    ("pc.bios", 64 << 10),
    ("/rom@etc/table-loader", 4096),
    ("/rom@etc/acpi/rsdp", 4096),
];

fn check(bytes: &[u8], expected: &Expected) {
    let elements = read(bytes, bytes.len()).expect("QEMU writes what we read");
    assert!(write(&elements) == bytes, "what is read is written again byte for byte");
    for cut in [1, 7, 4096, 65_536] {
        assert!(read(bytes, cut).expect("well formed") == elements, "in pieces of {cut}");
    }
    let mut commands = Vec::new();
    let (mut parts, mut data, mut zero) = (0, 0, 0);
    let mut pages: BTreeMap<(u16, u64), u8> = BTreeMap::new();
    for element in &elements {
        match element {
            Element::Configuration(configuration) => assert_eq!(configuration.machine, expected.machine),
            Element::Command { number, .. } => commands.push(*number),
            Element::RamStart(start) => {
                let blocks: Vec<_> = start.blocks.iter().map(|block| (block.id.to_string(), block.length)).collect();
                let wanted: Vec<_> = expected.blocks.iter().map(|(id, length)| ((*id).to_owned(), *length)).collect();
                assert_eq!(blocks, wanted);
            }
            Element::PartBegin => parts += 1,
            Element::Page { block, page, content } => {
                let first = match content {
                    PageContent::Zero => {
                        zero += 1;
                        0
                    }
                    PageContent::Data(bytes) => {
                        data += 1;
                        bytes.first().copied().expect("a page")
                    }
                };
                pages.insert((block.0, *page), first);
            }
            _ => {}
        }
    }
    assert_eq!((&*commands, parts, data, zero), (expected.commands, expected.parts, expected.data, expected.zero));
    assert_eq!(elements.iter().filter(|element| matches!(element, Element::Opaque(_))).count(), 1);
    assert!(matches!(elements.last(), Some(Element::Opaque(tail)) if tail.first() == Some(&4) && tail.last() == Some(&b'}')));
    // Each page came at least once; of those that the loader filled, the content is known.
    let all: u64 = expected.blocks.iter().map(|(_, length)| length / 4096).sum();
    assert_eq!(pages.len() as u64, all);
    for (page, fill) in (0x20..0x24).zip(1..) {
        assert_eq!(pages.get(&(0, page)), Some(&fill));
    }
}

#[test]
fn qemu_7_2_is_read_and_written_again() {
    let expected = Expected { machine: "pc-q35-7.2", blocks: BLOCKS, commands: &[1, 2], parts: 4, data: 17, zero: 580 };
    check(include_bytes!("../../tests/captures/pc-q35-7.2.stream"), &expected);
}

#[test]
fn qemu_10_0_is_read_and_written_again() {
    let expected = Expected { machine: "pc-q35-10.0", blocks: BLOCKS, commands: &[1, 2, 11], parts: 3, data: 23, zero: 580 };
    check(include_bytes!("../../tests/captures/pc-q35-10.0.stream"), &expected);
}
