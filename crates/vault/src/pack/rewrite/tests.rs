//! What is kept is read as it was; what is not is refused; what says otherwise than it has is no pack.

use std::collections::BTreeSet;

use godwit_stream::PAGE_SIZE;
use proptest::prelude::*;
use uuid::Uuid;

use super::super::{FORM, PackId, Page, PageDigest, Record};
use super::*;
use crate::TeamKey;
use crate::records::RecordWriter;
use crate::sealed::{HEAD, Head, OVERHEAD};
use crate::stored::Malformed;

const PAGES: u32 = 100;

fn key() -> PackKey {
    PackKey::new([5; 32])
}

fn writer(salt: u8) -> PackWriter<Vec<u8>> {
    PackWriter::begin_with(Vec::new(), &key(), Bytes(u64::MAX), Head::new(&FORM, [salt; 32])).expect("begun")
}

fn base(page: u32) -> Page {
    let mut content = [0; PAGE_SIZE];
    blake3::Hasher::new().update(&page.to_be_bytes()).finalize_xof().fill(&mut content[..512]);
    content
}

fn content(page: u32) -> Page {
    let mut content = base(page);
    content[..4].copy_from_slice(&page.to_be_bytes());
    content
}

/// Every third page, and one long run, is a difference: to a page of one of two packs.
fn base_of(page: u32) -> Option<(PackId, u32)> {
    let pack = PackId::new(Uuid::from_bytes([if page < 50 { 1 } else { 2 }; 16]));
    (page.is_multiple_of(3) || (60..90).contains(&page)).then_some((pack, page + 7))
}

fn digest(page: u32) -> PageDigest {
    PageDigest::of(&TeamKey::new([8; 32]), &content(page))
}

fn written() -> Vec<u8> {
    let mut writer = writer(1);
    for page in 0..PAGES {
        let put = match base_of(page) {
            Some(at) => writer.put_difference(&content(page), &digest(page), &base(page), at).expect("written"),
            None => Some(writer.put(&content(page), &digest(page)).expect("written")),
        };
        assert_eq!(put, Some(page));
    }
    writer.finish().expect("finished").0
}

fn open(bytes: &[u8]) -> Result<PackReader<&[u8]>, FileError> {
    PackReader::open(bytes, &key())
}

fn anew(from: &[u8], keep: &BTreeSet<u32>, salt: u8) -> Vec<u8> {
    let from = open(from).expect("open");
    let keep = from.kept().only(|page| keep.contains(&page));
    from.rewrite_into(writer(salt), &keep).expect("written")
}

/// All that a pack has, joined with what the bases are.
fn read(bytes: &[u8]) -> Result<Vec<(u32, Page)>, FileError> {
    let (pack, mut room) = (open(bytes)?, Unsealed::new()?);
    let mut out = vec![];
    for (page, known) in pack.digests()? {
        assert_eq!(known, digest(page));
        let (chunk, within) = pack.place_of(page).expect("it is kept");
        let packed = pack.chunk(chunk, &mut room)?;
        let kept = packed.pages[within];
        let joined = match pack.base_of(page) {
            Some(at) => {
                assert_eq!(Some((pack.bases()[usize::from(at.pack)], at.page)), base_of(page));
                let before = pack.differences_before(chunk, within);
                pack.join(page, &kept, &packed.checks[before], &base(page))?
            }
            None => kept,
        };
        out.push((page, joined));
    }
    Ok(out)
}

fn check(keep: &BTreeSet<u32>) {
    let bytes = anew(&written(), keep, 2);
    let wanted: Vec<_> = keep.iter().map(|page| (*page, content(*page))).collect();
    assert_eq!(read(&bytes).expect("read"), wanted);
    let pack = open(&bytes).expect("open");
    assert_eq!(pack.pages(), PAGES);
    assert!((0..PAGES + 20).all(|page| pack.place_of(page).is_some() == keep.contains(&page)));
    let bases: BTreeSet<_> = keep.iter().filter_map(|page| base_of(*page)).map(|(pack, _)| pack).collect();
    assert_eq!(pack.bases().iter().copied().collect::<BTreeSet<_>>(), bases, "those that are needed, and no other");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn prop_what_is_kept_is_read_as_it_was_and_written_twice_is_as_written_once(
        first in prop::collection::btree_set(0..PAGES, 1..100),
        drop in prop::collection::btree_set(0..PAGES, 0..60),
    ) {
        check(&first);
        let second: BTreeSet<u32> = first.difference(&drop).copied().collect();
        prop_assume!(!second.is_empty());
        let twice = anew(&anew(&written(), &first, 2), &second, 3);
        prop_assert!(twice == anew(&written(), &second, 3));
    }
}

#[test]
fn pages_at_the_borders_of_chunks_and_of_the_pack_are_kept() {
    let sets: [&[u32]; 8] = [&[0], &[99], &[15, 16], &[14, 15], &[16, 17], &[0, 31, 32, 95, 96, 99], &[60], &[89, 90]];
    for keep in sets {
        check(&keep.iter().copied().collect());
    }
    for range in [0..16, 16..32, 1..17, 0..15, 84..100, 0..99, 1..100] {
        check(&range.collect());
    }
    // With all of them it is as it was but for its salt.
    check(&(0..PAGES).collect());
    assert!(anew(&written(), &(0..PAGES).collect(), 1) == written());
}

#[test]
fn nothing_is_sealed_twice_with_one_nonce() {
    let bytes = written();
    let from = open(&bytes).expect("open");
    let files = [(); 2].map(|()| from.rewrite(&from.kept().only(|page| page < 40), &key(), Vec::new()).expect("written"));
    let [one, other] = &files;
    assert_ne!(one[..HEAD], other[..HEAD], "each has a salt of its own");
    assert_ne!(one[HEAD..HEAD + 40], other[HEAD..HEAD + 40], "and so a key");
    assert_ne!(one[HEAD..HEAD + 40], bytes[HEAD..HEAD + 40]);
}

#[test]
fn no_bit_can_change_unseen_and_no_end_be_missing() {
    let keep = [3, 15, 16, 17, 50, 60, 61, 99].into_iter().collect();
    let mut bytes = anew(&written(), &keep, 2);
    for place in 0..bytes.len() {
        bytes[place] ^= 0x10;
        assert!(read(&bytes).is_err(), "byte {place}");
        bytes[place] ^= 0x10;
        assert!(matches!(open(&bytes[..place]).map(drop), Err(FileError::Torn)), "{place}");
    }
}

/// A pack of once forty pages that has three, in one chunk; its list, and what its end says of that, are anything.
fn forged(runs: &[(u32, u32)], (said, kept): (u32, u32)) -> Vec<u8> {
    let mut records =
        RecordWriter::begin(Vec::new(), &FORM, key().expose(), Head::new(&FORM, [9; 32]), Bytes(u64::MAX)).expect("begun");
    let chunk = [&[0][..], &[7; 3 * PAGE_SIZE]].concat();
    let list: Vec<u8> = runs.iter().flat_map(|(first, pages)| [first.to_be_bytes(), pages.to_be_bytes()].concat()).collect();
    records.record(Record::Chunk, 0, &chunk).expect("written");
    let before = records.written();
    records.record(Record::Lengths, 0, &((chunk.len() + OVERHEAD) as u32).to_be_bytes()).expect("written");
    records.record(Record::Digests, 0, &vec![0; kept.min(20) as usize * 16]).expect("written");
    if !list.is_empty() {
        records.record(Record::Kept, 0, &list).expect("written");
    }
    let [chunks, pages, none] = [1, 40, 0_u32].map(u32::to_be_bytes);
    let before = before.to_be_bytes();
    let end = [&chunks[..], &pages, &before, &none, &none, &said.to_be_bytes(), &kept.to_be_bytes()].concat();
    records.record(Record::End, 0, &end).expect("written");
    records.finish().expect("written")
}

#[test]
fn a_pack_that_says_otherwise_than_it_has_is_refused() {
    let outcome = |runs: &[(u32, u32)], said| {
        let bytes = forged(runs, said);
        let (pack, mut room) = (open(&bytes)?, Unsealed::new()?);
        let pages = pack.chunk(0, &mut room)?.pages.len();
        Ok::<_, FileError>((pages, pack.place_of(39)))
    };
    assert_eq!(outcome(&[(4, 1), (38, 2)], (2, 3)).expect("three pages"), (3, Some((0, 2))));
    let list: [(&[(u32, u32)], u32); 9] = [
        (&[(38, 2), (4, 1)], 3),
        (&[(4, 1), (5, 2)], 3),
        (&[(4, 2), (5, 1)], 3),
        (&[(38, 3)], 3),
        (&[(u32::MAX, 3)], 3),
        (&[(4, 0), (6, 3)], 3),
        // Fewer and more than the end says.
        (&[(4, 2)], 3),
        (&[(4, 4)], 3),
        (&[], 3),
    ];
    for (runs, kept) in list {
        let refused = outcome(runs, (runs.len() as u32, kept));
        assert!(matches!(refused, Err(FileError::Malformed(Malformed::Kept))), "{runs:?}: {refused:?}");
    }
    // Fewer and more than the chunk holds.
    for kept in [2, 4] {
        let refused = outcome(&[(4, kept)], (1, kept));
        assert!(matches!(refused, Err(FileError::Malformed(Malformed::Chunk))), "{kept}: {refused:?}");
    }
    // More than the file can hold: nothing is allocated for them.
    for said in [(1, 3), (3, 3), (u32::MAX, 3), (1 << 20, 3), (2, 17), (2, u32::MAX), (2, 0)] {
        let refused = outcome(&[(4, 1), (38, 2)], said);
        assert!(matches!(refused, Err(FileError::Malformed(Malformed::Count))), "{said:?}: {refused:?}");
    }
}
