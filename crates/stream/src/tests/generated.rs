//! Streams that are made up: whatever may be written is read again the same, in pieces of any size.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn any_command() -> impl Strategy<Value = Element> {
    let number = any::<u16>().prop_filter("post-copy and COLO are refused", |number| !(3..=10).contains(number));
    (number, prop::collection::vec(any::<u8>(), 0..20))
        .prop_map(|(number, payload)| Element::Command { number, payload: payload.into() })
}

fn early() -> Element {
    Element::Early(example("early").into())
}

fn any_blocks() -> impl Strategy<Value = Vec<RamBlock>> {
    let name = prop::collection::vec(any::<u8>(), 1..=255);
    prop::collection::btree_map(name, 1..9_u64, 1..6).prop_map(|blocks| {
        blocks.into_iter().map(|(name, pages)| RamBlock { id: BlockId::new(&name).expect("short"), length: pages * 4096 }).collect()
    })
}

fn any_page(blocks: Vec<RamBlock>) -> impl Strategy<Value = Element> {
    (any::<prop::sample::Index>(), any::<prop::sample::Index>(), prop::option::of(any::<u8>())).prop_map(
        move |(at, page_at, fill)| {
            let at = at.index(blocks.len());
            let pages = usize::try_from(blocks[at].pages()).expect("few");
            page(u16::try_from(at).expect("few"), page_at.index(pages) as u64, fill)
        },
    )
}

fn any_configuration() -> impl Strategy<Value = Element> {
    let subsections = (any::<bool>(), prop::option::of(any::<[u8; 16]>()))
        .prop_map(|(bits, uuid)| bits.then_some(Subsection::PageBits).into_iter().chain(uuid.map(Subsection::Uuid)).collect());
    ("[!-~]{1,255}", subsections).prop_map(|(machine, subsections)| Element::Configuration(Configuration { machine, subsections }))
}

/// What comes between RAM's start and its tail.
fn any_copy(blocks: Vec<RamBlock>) -> impl Strategy<Value = Vec<Element>> {
    let pages = || prop::collection::vec(any_page(blocks.clone()), 0..12);
    let part = pages().prop_map(|pages| [vec![Element::PartBegin], pages, vec![Element::PartEnd]].concat());
    let piece = prop_oneof![4 => part, 1 => any_command().prop_map(|command| vec![command]), 1 => Just(vec![early()])];
    (prop::collection::vec(piece, 0..4), pages(), prop::option::of(any_command())).prop_map(|(pieces, last, command)| {
        [pieces.concat(), vec![Element::EndBegin], last, vec![Element::EndEnd], command.into_iter().collect()].concat()
    })
}

fn any_tail() -> impl Strategy<Value = Vec<Element>> {
    let bytes = (prop::sample::select(&[0_u8, 4][..]), prop::collection::vec(any::<u8>(), 0..200));
    bytes.prop_map(|(first, rest)| vec![Element::Opaque([vec![first], rest].concat().into())])
}

fn any_stream() -> impl Strategy<Value = Vec<Element>> {
    let setup = prop::collection::vec(prop_oneof![any_command(), Just(early())], 0..4);
    (any_configuration(), setup, any_blocks(), any::<(u32, u32, bool)>()).prop_flat_map(
        |(configuration, setup, blocks, (section, instance, multifd_flush))| {
            let start = Element::RamStart(RamStart { section, instance, blocks: blocks.clone(), multifd_flush });
            let head = [vec![Element::Header, configuration], setup, vec![start]].concat();
            (any_copy(blocks), any_tail()).prop_map(move |(copy, tail)| [head.clone(), copy, tail].concat())
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn prop_a_stream_survives_any_cutting(elements in any_stream(), cut in 1..5000_usize) {
        let bytes = write(&elements);
        prop_assert_eq!(&read(&bytes, cut).expect("well formed"), &elements);
        prop_assert_eq!(&read(&bytes, 1).expect("well formed"), &elements);
    }

    #[test]
    fn prop_pages_may_be_left_out(elements in any_stream(), kept in prop::collection::vec(any::<bool>(), 60)) {
        let mut kept = kept.into_iter().chain(std::iter::repeat(true));
        let fewer: Vec<Element> = elements
            .into_iter()
            .filter(|element| !matches!(element, Element::Page { .. }) || kept.next() == Some(true))
            .collect();
        let bytes = write(&fewer);
        prop_assert_eq!(read(&bytes, bytes.len()).expect("well formed"), fewer);
    }

    #[test]
    fn prop_names_of_blocks_are_found(blocks in any_blocks()) {
        let names: BTreeSet<&[u8]> = blocks.iter().map(|block| block.id.as_bytes()).collect();
        prop_assert_eq!(names.len(), blocks.len());
        let checked = crate::ram::Blocks::new(&blocks).expect("different names");
        for (block, place) in blocks.iter().zip(0..) {
            prop_assert_eq!(checked.find(block.id.as_bytes()), Some(BlockIndex(place)));
            prop_assert_eq!(checked.pages(BlockIndex(place)), block.pages());
        }
    }
}
