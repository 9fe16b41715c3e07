//! What was written is read; what is torn, changed, foreign or against the rules is refused, whatever it is.

use godwit_stream::PAGE_SIZE;
use proptest::prelude::*;

use super::*;
use crate::contents::{Contents, ContentsError};
use crate::pack::{PackId, PackReader, PackWriter, Page, Unsealed};
use crate::stored::{FileError, Malformed};
use crate::{PackKey, SnapshotKey, TeamKey};
use godwit_model::Bytes;
use uuid::Uuid;

mod differences;
mod rewritten;

const NO_LIMIT: Bytes = Bytes(u64::MAX);

fn keys(pack: u8) -> Keys {
    Keys { snapshot: SnapshotKey::new([7; 32]), team: TeamKey::new([8; 32]), pack: PackKey::new([pack; 32]) }
}

fn noise(seed: u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    blake3::Hasher::new().update(&seed.to_be_bytes()).finalize_xof().fill(&mut page);
    page
}

fn spaces() -> Vec<Space> {
    vec![
        Space { kind: SpaceKind::Ram, name: "pc.ram".into(), pages: 3_000 },
        Space { kind: SpaceKind::Ram, name: "pc.bios".into(), pages: 64 },
        Space { kind: SpaceKind::Disk, name: "disk0".into(), pages: 5_000 },
    ]
}

fn parts() -> Parts {
    Parts { about: b"a VM".to_vec(), preamble: vec![1; 300], devices: vec![2; PART_PIECE + 5] }
}

/// The two files of a snapshot, and what the writer counted.
struct Written {
    id: PackId,
    key: PackKey,
    snapshot: Vec<u8>,
    pack: Vec<u8>,
    totals: Totals,
}

fn write(id: u8, pages: &[(u16, u32, Page)], known: Known) -> Written {
    let (keys, pack) = (keys(id), PackId::new(Uuid::from_bytes([id; 16])));
    let mut writer = SnapshotWriter::begin((Vec::new(), Vec::new()), pack, &keys, spaces(), known, NO_LIMIT).expect("begun");
    for (space, page, content) in pages {
        writer.page(*space, *page, content).expect("taken");
    }
    let (snapshot, file, totals) = writer.finish(&parts()).expect("finished");
    Written { id: pack, key: keys.pack, snapshot, pack: file.unwrap_or_default(), totals }
}

/// A snapshot with its packs.
fn opened<'a>(snapshot: &'a [u8], packs: &[&'a Written]) -> Result<Contents<&'a [u8]>, FileError> {
    let snapshot = SnapshotReader::open(snapshot, &keys(0).snapshot)?;
    let opened = snapshot.packs().iter().map(|(id, key, pages)| {
        let pack = packs.iter().find(|pack| pack.id == *id).expect("a pack that was written");
        let reader = PackReader::open(&pack.pack[..], key)?;
        assert_eq!(reader.pages(), *pages);
        Ok(Some(reader))
    });
    let opened = opened.collect::<Result<Vec<_>, FileError>>()?;
    Ok(Contents::new(snapshot, opened)?)
}

/// All pages of a snapshot that are not zero, from the packs in which they are said to be.
fn read(snapshot: &[u8], packs: &[&Written]) -> Result<Vec<(u16, u32, Page)>, FileError> {
    let mut contents = opened(snapshot, packs)?;
    let mut out = vec![];
    for space in 0..contents.spaces().len() as u16 {
        for first in contents.snapshot().leaves(space).collect::<Vec<_>>() {
            let located: Vec<u32> = contents.located(space, first).map_err(in_file)?.collect();
            for page in located {
                out.push((space, page, *contents.page(space, page).map_err(in_file)?.expect("it is located")));
            }
        }
    }
    Ok(out)
}

fn in_file(error: ContentsError) -> FileError {
    match error {
        ContentsError::Snapshot(error) | ContentsError::Pack { source: error, .. } => error,
    }
}

fn verify(snapshot: &[u8], packs: &[&Written], team: &TeamKey) -> Result<(), FileError> {
    let mut contents = opened(snapshot, packs)?;
    contents.verify_places()?;
    (0..contents.snapshot().packs().len() as u16).try_for_each(|pack| contents.verify_pack(pack, team))
}

fn known_of(written: &Written) -> Known {
    let mut known = Known::new(usize::MAX);
    known.add(&opened(&written.snapshot, &[written]).expect("whole"));
    known
}

/// Of each kind: alone and in runs, alike and not, RAM out of order, at the borders of leaves and spaces.
fn some() -> Vec<(u16, u32, Page)> {
    let ram = [2_999, 511, 512, 513, 0, 1, 1_400];
    let ram = ram.iter().map(|page| (0, *page, noise(u64::from(*page))));
    let alike = (100..140).map(|page| (0, page, noise(99)));
    let firmware = [(1, 63, [5; PAGE_SIZE])];
    let disk = (1_000..1_040).chain([4_999]).map(|page| (2, page, noise(u64::from(page))));
    ram.chain(alike).chain(firmware).chain(disk).collect()
}

fn sorted(mut pages: Vec<(u16, u32, Page)>) -> Vec<(u16, u32, Page)> {
    pages.sort_unstable_by_key(|(space, page, _)| (*space, *page));
    pages
}

#[test]
fn what_was_written_is_read() {
    let written = write(1, &some(), Known::new(1000));
    assert_eq!(read(&written.snapshot, &[&written]).expect("read"), sorted(some()));
    let reader = SnapshotReader::open(&written.snapshot[..], &keys(0).snapshot).expect("open");
    assert_eq!((reader.parts(), reader.spaces()), (&parts(), &spaces()[..]));
    // The forty that are alike are kept once.
    assert_eq!(written.totals.new, 7 + 1 + 1 + 41);
    assert_eq!(written.totals.known, 39);
    verify(&written.snapshot, &[&written], &keys(0).team).expect("as it was written");
    assert!(matches!(verify(&written.snapshot, &[&written], &TeamKey::new([0; 32])), Err(FileError::Digest(0))));
}

#[test]
fn an_empty_snapshot_is_one() {
    let written = write(1, &[(0, 5, [0; PAGE_SIZE])], Known::new(1000));
    assert_eq!(read(&written.snapshot, &[]).expect("read"), vec![]);
    assert_eq!((written.pack.len(), written.totals.zero), (0, 1));
}

#[test]
fn what_a_pack_has_is_not_written_again() {
    let first = write(1, &some(), Known::new(1000));
    let mut pages = some();
    pages[3].2 = noise(12_345);
    let second = write(2, &pages, known_of(&first));
    assert_eq!(second.totals.new, 1);
    assert_eq!(read(&second.snapshot, &[&first, &second]).expect("read"), sorted(pages));
    // One that has nothing new has no pack, and one that uses nothing of a pack does not name it.
    let third = write(3, &some(), known_of(&first));
    assert_eq!((third.totals.new, third.pack.len()), (0, 0));
    let fourth = write(4, &[(0, 0, noise(77))], known_of(&first));
    let reader = SnapshotReader::open(&fourth.snapshot[..], &keys(0).snapshot).expect("open");
    assert_eq!(reader.packs().iter().map(|(id, ..)| *id).collect::<Vec<_>>(), [fourth.id]);
}

#[test]
fn a_list_with_too_few_pages_makes_nothing_unreadable_that_is_written_later() {
    let pages: Vec<_> = (0..40).map(|page| (0, page, noise(page.into()))).collect();
    let (whole, short) = (write(1, &pages, Known::new(1000)), write(1, &pages[..5], Known::new(1000)));
    let wrong = || {
        let snapshot = SnapshotReader::open(&short.snapshot[..], &keys(0).snapshot).expect("open");
        Contents::new(snapshot, vec![Some(PackReader::open(&whole.pack[..], &whole.key).expect("open"))]).expect("made")
    };
    let mut known = Known::new(1000);
    known.add(&wrong());
    assert!(known.earlier(wrong()).is_none());
    let later = write(2, &pages, known);
    assert_eq!(later.totals.new, 40);
    // Nor is it in the way of a list that is right.
    let mut known = Known::new(1000);
    known.add(&wrong());
    known.add(&opened(&whole.snapshot, &[&whole]).expect("whole"));
    let later = write(2, &pages, known);
    assert_eq!(later.totals.known, 40);
    assert_eq!(read(&later.snapshot, &[&whole]).expect("read"), pages);
}

#[test]
fn a_page_out_of_its_space_or_turn_is_not_taken() {
    let files = (Vec::new(), Vec::new());
    let mut writer =
        SnapshotWriter::begin(files, PackId::new(Uuid::nil()), &keys(1), spaces(), Known::new(9), NO_LIMIT).expect("begun");
    for (space, page) in [(0, 3_000), (3, 0), (1, 64)] {
        let refused = writer.page(space, page, &noise(1)).expect_err("in no space");
        assert_eq!(refused.kind(), std::io::ErrorKind::InvalidInput);
    }
    writer.page(2, 1_024, &noise(1)).expect("taken");
    assert!(writer.page(2, 1_023, &noise(1)).is_err(), "a disk ascends by leaves");
    writer.page(2, 1_025, &noise(2)).expect("taken");
    let (snapshot, _, totals) = writer.finish(&Parts::default()).expect("finished");
    assert_eq!(totals.new, 2);
    let reader = SnapshotReader::open(&snapshot[..], &keys(0).snapshot).expect("open");
    assert_eq!(reader.leaves(2).collect::<Vec<_>>(), [1_024]);
}

#[test]
fn spaces_that_are_none_are_refused() {
    let twice = vec![spaces()[0].clone(), spaces()[0].clone()];
    let nameless = vec![Space { name: String::new(), ..spaces()[0].clone() }];
    for spaces in [twice, nameless] {
        let files = (Vec::new(), Vec::new());
        let begun = SnapshotWriter::begin(files, PackId::new(Uuid::nil()), &keys(1), spaces, Known::new(9), NO_LIMIT);
        assert_eq!(begun.expect_err("refused").kind(), std::io::ErrorKind::InvalidInput);
    }
}

#[test]
fn a_file_longer_than_its_limit_is_not_finished() {
    let files = (Vec::new(), Vec::new());
    let limit = Bytes::mib(1);
    let mut writer =
        SnapshotWriter::begin(files, PackId::new(Uuid::nil()), &keys(1), spaces(), Known::new(9), limit).expect("begun");
    let failed = (0..400).find_map(|page| writer.page(0, page, &noise(page.into())).err()).expect("the limit");
    assert_eq!(failed.kind(), std::io::ErrorKind::FileTooLarge);
    assert!(writer.finish(&Parts::default()).is_err());
}

#[test]
fn a_file_cut_anywhere_is_torn() {
    let written = write(1, &some(), Known::new(1000));
    let step = if cfg!(debug_assertions) { 97 } else { 1 };
    for length in (0..written.pack.len()).step_by(step).chain([written.pack.len() - 1]) {
        let error = PackReader::open(&written.pack[..length], &written.key).map(|_| ()).expect_err("torn");
        assert!(matches!(error, FileError::Torn), "{length}: {error:?}");
    }
    let tail = written.snapshot.len() - 2_000;
    for length in (0..tail).step_by(4_096).chain(tail..written.snapshot.len()) {
        let error = SnapshotReader::open(&written.snapshot[..length], &keys(0).snapshot).map(|_| ()).expect_err("torn");
        assert!(matches!(error, FileError::Torn), "{length}: {error:?}");
    }
}

#[test]
fn another_key_opens_nothing() {
    let written = write(1, &some(), Known::new(1000));
    assert!(matches!(PackReader::open(&written.pack[..], &PackKey::new([9; 32])), Err(FileError::Torn)));
    assert!(matches!(SnapshotReader::open(&written.snapshot[..], &SnapshotKey::new([9; 32])), Err(FileError::Torn)));
    assert!(matches!(PackReader::open(&written.snapshot[..], &written.key), Err(FileError::Foreign)));
    let mut later = written.pack.clone();
    later[9] = 2;
    assert!(matches!(PackReader::open(&later[..], &written.key), Err(FileError::Version(2))));
}

/// Reads all of it, and every leaf.
fn everything(snapshot: &[u8], pack: &Written) -> Result<Vec<(u16, u32, Page)>, FileError> {
    verify(snapshot, &[pack], &keys(0).team)?;
    read(snapshot, &[pack])
}

proptest! {
    #[test]
    fn a_flipped_bit_anywhere_is_found(at in any::<prop::sample::Index>(), bit in 0..8_u8, in_pack: bool) {
        let mut written = write(1, &some(), Known::new(1000));
        let file = if in_pack { &mut written.pack } else { &mut written.snapshot };
        let at = at.index(file.len());
        file[at] ^= 1 << bit;
        let snapshot = written.snapshot.clone();
        prop_assert!(everything(&snapshot, &written).is_err(), "byte {at} of the {}", if in_pack { "pack" } else { "snapshot" });
    }

    #[test]
    fn whatever_is_written_is_read(pages in prop::collection::btree_map((0..3_u16, 0..3_000_u32), 0..40_u64, 0..200), first in 0..20_u64) {
        let content = |seed: u64| if seed == 0 { [0; PAGE_SIZE] } else { noise(seed) };
        let earlier: Vec<_> = (0..first).map(|seed| (0, seed as u32, content(seed))).collect();
        let earlier = write(1, &earlier, Known::new(1000));
        let pages: Vec<_> = pages.into_iter().filter(|((space, page), _)| *page < spaces()[usize::from(*space)].pages).collect();
        let given: Vec<_> = pages.iter().map(|((space, page), seed)| (*space, *page, content(*seed))).collect();
        let known = if earlier.pack.is_empty() { Known::new(1000) } else { known_of(&earlier) };
        let later = write(2, &given, known);
        let wanted: Vec<_> = given.into_iter().filter(|(_, _, content)| content != &[0; PAGE_SIZE]).collect();
        prop_assert_eq!(later.totals.new + later.totals.known, wanted.len() as u64);
        prop_assert_eq!(read(&later.snapshot, &[&earlier, &later]).expect("read"), wanted);
    }

    /// Beyond the seals nothing is believed either: whatever a leaf, an end or a chunk says, there is an answer or an error.
    #[test]
    fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = SnapshotReader::open(&bytes[..], &keys(0).snapshot);
        let _ = PackReader::open(&bytes[..], &keys(0).pack);
        let _ = Space::decode_all(&bytes);
    }
}

/// A file whose writer keeps no rule: sealed as it should be, with any content.
fn forged(records: &[(Record, &[u8])]) -> Vec<u8> {
    let head = crate::sealed::Head::new(&FORM, [3; 32]);
    let mut writer =
        crate::records::RecordWriter::begin(Vec::new(), &FORM, keys(0).snapshot.expose(), head, NO_LIMIT).expect("begun");
    for (kind, content) in records {
        writer.record(*kind, 0, content).expect("written");
    }
    writer.finish().expect("written")
}

#[test]
fn a_forged_leaf_is_malformed() {
    let spaces = Space::encode_all(&spaces()).expect("spaces");
    let pack = [[1; 16].as_slice(), &[2; 32], &[0, 0, 0, 9]].concat();
    let directory = |leaf: u8| [[0, 0].as_slice(), &[0, 0, 0, leaf], &[0; 4], &[0, 0, 0, 0, 0, 0, 0, 42]].concat();
    let snapshot = |leaf: &[u8], place: u8| {
        let before = (crate::sealed::HEAD + leaf.len() + crate::sealed::OVERHEAD) as u64;
        let mut end = before.to_be_bytes().to_vec();
        for length in [0, 0, 0, spaces.len() as u32, 1, 1] {
            end.extend(length.to_be_bytes());
        }
        let records: [(Record, &[u8]); 5] = [
            (Record::Leaf, leaf),
            (Record::Spaces, &spaces),
            (Record::Packs, &pack),
            (Record::Directory, &directory(place)),
            (Record::End, &end),
        ];
        forged(&records)
    };
    let outcome = |leaf: &[u8]| {
        let bytes = snapshot(leaf, 0);
        SnapshotReader::open(&bytes[..], &keys(0).snapshot)?.leaf(0, 0).map(|leaf| leaf.located().count())
    };
    let run = |pages: u16, pack: u16, first: u32| [&pages.to_be_bytes()[..], &pack.to_be_bytes(), &first.to_be_bytes()].concat();
    assert_eq!(outcome(&run(9, 0, 0)).expect("nine pages"), 9);
    assert_eq!(outcome(&[run(500, ZEROS, 0), run(2, 0, 7)].concat()).expect("two pages"), 2);
    for wrong in [run(10, 0, 0), run(1, 1, 0), run(2, 0, u32::MAX)] {
        assert!(matches!(outcome(&wrong), Err(FileError::Malformed(Malformed::Place))), "{wrong:?}");
    }
    for wrong in [run(513, ZEROS, 0), run(0, 0, 0), run(1, 0, 0)[..7].to_vec(), [run(512, ZEROS, 0), run(1, 0, 0)].concat()] {
        assert!(matches!(outcome(&wrong), Err(FileError::Malformed(Malformed::Leaf))), "{wrong:?}");
    }
    // Beyond its space.
    let beyond = snapshot(&run(9, 0, 0), 6);
    assert!(matches!(SnapshotReader::open(&beyond[..], &keys(0).snapshot), Err(FileError::Malformed(Malformed::Leaf))));
}

/// The pack and snapshot of the specification.
#[test]
fn the_specification_shows_the_bytes_that_are_written() {
    let keys = Keys { snapshot: SnapshotKey::new([0x22; 32]), team: TeamKey::new([0x44; 32]), pack: PackKey::new([0x55; 32]) };
    let id = PackId::new(Uuid::from_bytes([0x11; 16]));
    let spaces = vec![Space { kind: SpaceKind::Ram, name: "pc.ram".into(), pages: 65_536 }];
    let (head, pack) = (
        crate::sealed::Head::new(&FORM, [0x33; 32]),
        PackWriter::begin_with(Vec::new(), &keys.pack, NO_LIMIT, crate::sealed::Head::new(&crate::pack::FORM, [0x66; 32])),
    );
    let pack = pack.expect("begun");
    let mut writer =
        SnapshotWriter::begin_with((Vec::new(), head), pack, id, &keys, spaces, Known::new(9), NO_LIMIT).expect("begun");
    writer.page(0, 67, &[b'G'; PAGE_SIZE]).expect("taken");
    let parts = Parts { about: b"web1".to_vec(), ..Parts::default() };
    let (snapshot, pack, _) = writer.finish(&parts).expect("finished");
    let pack = pack.expect("a page");
    let (later, rewritten) = (later_pack(id, &keys.team), rewritten_pack(&keys.team));
    let page = include_str!("../../../../docs/spec/vault.md");
    let (head, names) = (crate::sealed::HEAD, ["leaf", "about", "spaces", "packs", "directory", "end"]);
    let mut differ = vec![];
    let mut check = |what: &str, bytes: &[u8]| {
        let hexadecimal: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let line = format!("{what}: {}", hexadecimal.join(" "));
        if !page.lines().any(|shown| shown == line) {
            differ.push(line);
        }
    };
    let in_pack = ["chunk", "lengths", "digests", "end"];
    let in_later = ["chunk", "lengths", "digests", "bases", "differences", "end"];
    let in_rewritten = ["chunk", "lengths", "digests", "kept", "end"];
    let files = [
        ("pack", &pack, &in_pack[..]),
        ("snapshot", &snapshot, &names),
        ("later pack", &later, &in_later),
        ("rewritten pack", &rewritten, &in_rewritten),
    ];
    for (file, bytes, names) in files {
        check(&format!("{file} head"), &bytes[..head]);
        let mut at = head;
        for name in names {
            let (_, length) = crate::sealed::read_record_head(&bytes[at..]).expect("a record");
            let end = at + crate::sealed::RECORD_HEAD + length;
            check(&format!("{file} {name}"), &bytes[at..end]);
            at = end;
        }
        assert_eq!(at, bytes.len());
    }
    assert!(differ.is_empty(), "docs/spec/vault.md shows something else than\n{}", differ.join("\n"));
}

/// A pack whose only page is a difference to the first of the example's.
fn later_pack(base: PackId, team: &TeamKey) -> Vec<u8> {
    let head = crate::sealed::Head::new(&crate::pack::FORM, [0x88; 32]);
    let mut writer = PackWriter::begin_with(Vec::new(), &PackKey::new([0x77; 32]), NO_LIMIT, head).expect("begun");
    let mut content = [b'G'; PAGE_SIZE];
    content[..8].copy_from_slice(b"Godwit 1");
    let digest = crate::pack::PageDigest::of(team, &content);
    let page = writer.put_difference(&content, &digest, &[b'G'; PAGE_SIZE], (base, 0)).expect("written");
    assert_eq!(page, Some(0));
    writer.finish().expect("finished").0
}

/// Of a pack of forty pages, each full of its number's next, three.
fn rewritten_pack(team: &TeamKey) -> Vec<u8> {
    let key = PackKey::new([0x99; 32]);
    let begun = |salt| {
        let head = crate::sealed::Head::new(&crate::pack::FORM, [salt; 32]);
        PackWriter::begin_with(Vec::new(), &key, NO_LIMIT, head).expect("begun")
    };
    let mut writer = begun(0x10);
    for page in 1..=40 {
        let content = [page; PAGE_SIZE];
        writer.put(&content, &crate::pack::PageDigest::of(team, &content)).expect("written");
    }
    let (whole, _) = writer.finish().expect("finished");
    let whole = PackReader::open(&whole[..], &key).expect("open");
    whole.rewrite_into(begun(0xaa), &whole.kept().only(|page| [7, 16, 17].contains(&page))).expect("written")
}

/// The fuzzer starts from the same files; the keys are those of the specification's example.
#[test]
fn corpus_every_stored_file_is_taken_without_panic() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/vault");
    let mut room = Unsealed::new().expect("made");
    let (mut packs, mut rewritten, mut snapshots, mut chunks, mut differences, mut leaves, mut lists) = (0, 0, 0, 0, 0, 0, 0);
    for entry in std::fs::read_dir(folder).expect("the corpus is checked in") {
        let bytes = std::fs::read(entry.expect("an entry").path()).expect("readable");
        packs +=
            usize::from(PackReader::open(&bytes[..], &PackKey::new([0x55; 32])).is_ok_and(|pack| pack.chunk(0, &mut room).is_ok()));
        let pack = PackReader::open(&bytes[..], &PackKey::new([0x99; 32]));
        rewritten += usize::from(pack.is_ok_and(|pack| pack.chunk(0, &mut room).is_ok() && pack.place_of(17) == Some((0, 2))));
        let snapshot = SnapshotReader::open(&bytes[..], &SnapshotKey::new([0x22; 32]));
        snapshots += usize::from(snapshot.is_ok_and(|snapshot| snapshot.leaf(0, 67).is_ok()));
        chunks += usize::from(room.unpack(&bytes, 3, 0).is_ok());
        differences += usize::from(room.unpack(&bytes, 3, 2).is_ok());
        if let Ok(leaf) = Leaf::decode(&bytes, 300, |_| 1_000) {
            assert_eq!(Leaf::decode(&leaf.encode(), 300, |_| 1_000), Ok(leaf));
            leaves += 1;
        }
        if let Ok(spaces) = Space::decode_all(&bytes) {
            assert_eq!(Space::encode_all(&spaces).as_deref(), Ok(&bytes[..]));
            lists += 1;
        }
    }
    assert!(
        [packs, rewritten, snapshots, chunks, differences, leaves, lists].iter().all(|count| *count > 0),
        "something of each kind"
    );
}
