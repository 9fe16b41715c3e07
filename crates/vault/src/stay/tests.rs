//! What was written is read; what is torn, changed, foreign or out of place is refused, whatever it is.

use std::io::{Cursor, ErrorKind};

use godwit_model::{Bytes, Generation, VmId};
use godwit_stream::PAGE_SIZE;
use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::StayKey;
use crate::sealed::{HEAD, Head, RECORD_HEAD, Sealer, TAG, read_record_head};

fn key() -> StayKey {
    StayKey::new([7; 32])
}

const SALT: [u8; 32] = [9; 32];

type Pages = Vec<(u16, u32, Page)>;

fn identity(blocks: &[u32]) -> Identity {
    let blocks = blocks.iter().enumerate().map(|(at, pages)| Block { id: format!("block{at}"), pages: *pages }).collect();
    Identity { vm: VmId::new(Uuid::from_u128(5)), generation: Generation(3), blocks }
}

fn noise(seed: u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    blake3::Hasher::new().update(&seed.to_be_bytes()).finalize_xof().fill(&mut page);
    page
}

fn written(blocks: &[u32], salt: [u8; 32], pages: &Pages) -> Vec<u8> {
    let mut writer = StayWriter::begin_with(Vec::new(), &key(), &identity(blocks), Head::new(&FORM, salt)).expect("begun");
    for (block, page, content) in pages {
        writer.page(*block, *page, content).expect("taken");
    }
    writer.finish().expect("finished")
}

fn read(bytes: &[u8], key: &StayKey) -> Result<(Identity, Pages), StayError> {
    let mut reader = StayReader::open(Cursor::new(bytes), key)?;
    let mut pages = Pages::new();
    while let Some(chunk) = reader.next_chunk()? {
        pages.extend(chunk.pages().map(|(page, content)| (chunk.block(), page, *content)));
    }
    assert_eq!(pages.len() as u64, reader.pages());
    Ok((reader.identity().clone(), pages))
}

/// A stay of three chunks, two of them alike in length.
fn small() -> (Vec<u8>, Pages) {
    let pages = vec![(0, 67, [b'a'; PAGE_SIZE]), (0, 131, [b'b'; PAGE_SIZE]), (1, 0, noise(1))];
    (written(&[200, 2], SALT, &pages), pages)
}

/// Where each record begins, and where the file ends.
fn borders(bytes: &[u8]) -> Vec<usize> {
    let mut borders = vec![HEAD];
    while let Some((_, length)) = bytes.get(*borders.last().expect("one")..).and_then(read_record_head) {
        borders.push(borders.last().expect("one") + RECORD_HEAD + length);
    }
    borders
}

#[test]
fn what_was_written_is_read() {
    let (bytes, pages) = small();
    assert_eq!(read(&bytes, &key()).expect("read"), (identity(&[200, 2]), pages));
    let nothing = written(&[], SALT, &vec![]);
    assert_eq!(read(&nothing, &key()).expect("read"), (identity(&[]), vec![]));
}

/// The stay of the specification: one block of 65,536 pages, of which one holds something.
fn example() -> (StayKey, Identity, Pages) {
    let blocks = vec![Block { id: "pc.ram".into(), pages: 65_536 }];
    let identity = Identity { vm: VmId::new(Uuid::from_bytes([0x11; 16])), generation: Generation(3), blocks };
    (StayKey::new([0x22; 32]), identity, vec![(0, 67, [b'G'; PAGE_SIZE])])
}

#[test]
fn the_specification_shows_the_bytes_that_are_written() {
    let (key, identity, pages) = example();
    let mut writer = StayWriter::begin_with(Vec::new(), &key, &identity, Head::new(&FORM, [0x33; 32])).expect("begun");
    for (block, page, content) in &pages {
        writer.page(*block, *page, content).expect("taken");
    }
    let bytes = writer.finish().expect("finished");
    let page = include_str!("../../../../docs/spec/stay.md");
    let mut borders = borders(&bytes);
    borders.insert(0, 0);
    for (name, pair) in ["head", "identity", "chunk", "end"].iter().zip(borders.windows(2)) {
        let line = page.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
        let line = line.unwrap_or_else(|| panic!("docs/spec/stay.md has no example of {name}"));
        let shown: Vec<u8> = line.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).expect("hexadecimal")).collect();
        let written = &bytes[pair[0]..pair[1]];
        let hexadecimal: Vec<_> = written.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(written, shown, "{name}: {}", hexadecimal.join(" "));
    }
    assert_eq!(read(&bytes, &key).expect("read"), (identity, pages));
}

/// What the file of version 1 holds, which is never written again.
fn golden() -> (Identity, Pages) {
    let blocks = vec![Block { id: "pc.ram".into(), pages: 5_000 }, Block { id: "dimm0".into(), pages: 64 }];
    let identity = Identity { vm: VmId::new(Uuid::from_u128(0x600d)), generation: Generation(41), blocks };
    let letters = (100..200).map(|page| (0, page, [page as u8; PAGE_SIZE]));
    let pages = letters.chain([(0, 4_999, noise(1)), (1, 0, noise(2)), (1, 63, [1; PAGE_SIZE])]).collect();
    (identity, pages)
}

#[test]
fn a_stay_of_version_1_is_read_for_ever() {
    let bytes = include_bytes!("../../tests/stays/version-1.stay");
    assert_eq!(read(bytes, &StayKey::new([0x22; 32])).expect("read"), golden());
}

/// The fuzzer starts from the same files; the key is that of the specification's example.
#[test]
fn corpus_every_stored_stay_is_taken_without_panic() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/stay");
    let (mut inputs, mut stays, mut chunks, mut identities) = (0, 0, 0, 0);
    let mut unpacker = Unpacker::new().expect("made");
    for entry in std::fs::read_dir(folder).expect("the corpus is checked in") {
        let bytes = std::fs::read(entry.expect("an entry").path()).expect("readable");
        inputs += 1;
        stays += usize::from(read(&bytes, &StayKey::new([0x22; 32])).is_ok());
        if let Ok(chunk) = unpacker.unpack(&bytes) {
            assert_eq!(chunk.pages().count(), chunk.len());
            chunks += 1;
        }
        if let Ok(identity) = Identity::decode(&bytes) {
            assert_eq!(identity.encode().as_deref(), Ok(&bytes[..]));
            identities += 1;
        }
    }
    assert!(inputs >= 12 && stays >= 2 && chunks >= 3 && identities >= 2, "{inputs} inputs: {stays}, {chunks}, {identities}");
}

#[test]
fn pages_of_zeros_are_left_out() {
    let pages = vec![(0, 0, [0; PAGE_SIZE]), (0, 1, noise(1)), (0, 2, [0; PAGE_SIZE]), (1, 0, [0; PAGE_SIZE])];
    let (_, found) = read(&written(&[3, 1], SALT, &pages), &key()).expect("read");
    assert_eq!(found, [(0, 1, noise(1))]);
}

#[test]
fn runs_are_what_lies_together() {
    let numbers = [0, 1, 2, 40, 63, 64, 65, 127, 191];
    let pages = numbers.map(|page| (0, page, noise(u64::from(page)))).to_vec();
    let bytes = written(&[192], SALT, &pages);
    let mut reader = StayReader::open(Cursor::new(&bytes), &key()).expect("opened");
    let mut runs = Vec::new();
    while let Some(chunk) = reader.next_chunk().expect("read") {
        runs.push(chunk.runs().map(|(first, run)| (first, run.len())).collect::<Vec<_>>());
    }
    assert_eq!(runs, [vec![(0, 3), (40, 1), (63, 1)], vec![(64, 2), (127, 1)], vec![(191, 1)]]);
}

#[test]
fn a_full_window_is_one_run() {
    let pages: Pages = (0..128).map(|page| (0, page, [b'x'; PAGE_SIZE])).collect();
    let bytes = written(&[128], SALT, &pages);
    assert!(bytes.len() < 400, "{} bytes for 128 pages of one letter", bytes.len());
    let mut reader = StayReader::open(Cursor::new(&bytes), &key()).expect("opened");
    let chunk = reader.next_chunk().expect("read").expect("a chunk");
    assert_eq!(chunk.runs().map(|(first, run)| (first, run.len())).collect::<Vec<_>>(), [(0, 64)]);
}

#[test]
fn a_page_out_of_order_or_out_of_place_is_not_taken() {
    let mut writer = StayWriter::begin(Vec::new(), &key(), &identity(&[3, 3])).expect("begun");
    writer.page(0, 1, &noise(1)).expect("taken");
    writer.page(1, 0, &noise(2)).expect("taken");
    for (block, page) in [(1, 0), (0, 2), (1, 3), (2, 0), (u16::MAX, u32::MAX)] {
        let refused = writer.page(block, page, &noise(3)).expect_err("refused");
        assert_eq!(refused.kind(), ErrorKind::InvalidInput, "{block} {page}");
    }
    writer.page(1, 2, &noise(4)).expect("taken");
    let bytes = writer.finish().expect("finished");
    let (_, found) = read(&bytes, &key()).expect("read");
    assert_eq!(found, [(0, 1, noise(1)), (1, 0, noise(2)), (1, 2, noise(4))]);
}

#[test]
fn an_identity_that_is_none_is_not_written() {
    let block = |id: &str| Block { id: id.into(), pages: 1 };
    let many = (0..=godwit_stream::MAX_BLOCKS).map(|at| block(&at.to_string())).collect();
    for blocks in [vec![block("")], vec![block(&"x".repeat(256))], vec![block("a"), block("a")], many] {
        let identity = Identity { blocks, ..identity(&[]) };
        let refused = StayWriter::begin(Vec::new(), &key(), &identity).expect_err("refused");
        assert_eq!(refused.kind(), ErrorKind::InvalidInput);
    }
    let longest = (0..godwit_stream::MAX_BLOCKS).map(|at| block(&format!("{at:0255}"))).collect();
    let longest = Identity { blocks: longest, ..identity(&[]) };
    let bytes = StayWriter::begin(Vec::new(), &key(), &longest).expect("begun").finish().expect("finished");
    assert_eq!(read(&bytes, &key()).expect("read").0, longest);
}

#[test]
fn a_stay_cut_at_any_length_or_longer_is_not_opened() {
    let (bytes, _) = small();
    for cut in 0..bytes.len() {
        let refused = StayReader::open(Cursor::new(&bytes[..cut]), &key());
        assert!(matches!(refused, Err(StayError::Torn)), "cut at {cut}: {refused:?}");
    }
    for more in [&[0][..], &bytes] {
        let longer = [&bytes[..], more].concat();
        let refused = read(&longer, &key());
        assert!(matches!(refused, Err(StayError::Torn | StayError::Malformed(MalformedStay::Count))), "{refused:?}");
    }
}

#[test]
fn a_stay_with_any_byte_changed_gives_an_error_and_nothing_wrong_before_it() {
    let (bytes, pages) = small();
    let borders = borders(&bytes);
    for at in 0..bytes.len() {
        for flip in [1, 0x80] {
            let mut changed = bytes.clone();
            changed[at] ^= flip;
            let error = read(&changed, &key()).expect_err("changed");
            let right = match error {
                StayError::NotAStay => at < 8,
                StayError::Version(_) => (8..10).contains(&at),
                StayError::Key | StayError::Torn if at < borders[1] => at >= 10,
                StayError::Torn => at >= borders[borders.len() - 2],
                StayError::Changed(chunk) => (borders[1 + chunk as usize]..borders[2 + chunk as usize]).contains(&at),
                _ => false,
            };
            assert!(right, "byte {at} of {borders:?}: {error:?}");
            if let Ok(mut reader) = StayReader::open(Cursor::new(&changed), &key()) {
                let mut expected = pages.iter();
                while let Ok(chunk) = reader.next_chunk() {
                    let chunk = chunk.expect("an error comes before the end");
                    for (page, content) in chunk.pages() {
                        assert!(expected.next() == Some(&(chunk.block(), page, *content)));
                    }
                }
                assert!(reader.next_chunk().is_err(), "errors go on");
            }
        }
    }
}

#[test]
fn another_key_and_another_salt_open_nothing() {
    let (mut bytes, _) = small();
    assert!(matches!(read(&bytes, &StayKey::new([8; 32])), Err(StayError::Key)));
    bytes[HEAD - 1] ^= 1;
    assert!(matches!(read(&bytes, &key()), Err(StayError::Key)));
}

#[test]
fn two_stays_of_one_key_and_content_have_nothing_in_common() {
    let write = || {
        let mut writer = StayWriter::begin(Vec::new(), &key(), &identity(&[1])).expect("begun");
        writer.page(0, 0, &noise(1)).expect("taken");
        writer.finish().expect("finished")
    };
    let (one, other) = (write(), write());
    assert_eq!(one.len(), other.len());
    let alike = one.iter().zip(&other).skip(10).filter(|(one, other)| one == other).count();
    assert!(alike < one.len() / 50, "{alike} of {} bytes are alike", one.len());
}

#[test]
fn chunks_that_are_swapped_repeated_left_out_or_of_another_file_are_found() {
    let (bytes, pages) = small();
    let borders = borders(&bytes);
    let other = written(&[200, 2], [10; 32], &pages);
    assert_eq!(borders, self::borders(&other), "both files are cut alike");
    let parts = |of: &[u8]| borders.windows(2).map(|pair| of[pair[0]..pair[1]].to_vec()).collect::<Vec<_>>();
    let (own, foreign) = (parts(&bytes), parts(&other));
    let with = |records: &[&Vec<u8>]| {
        records.iter().fold(bytes[..HEAD].to_vec(), |mut file, record| {
            file.extend_from_slice(record);
            file
        })
    };
    let [identity, first, second, third, end] = &own[..] else { panic!("five records") };
    assert!(read(&with(&[identity, first, second, third, end]), &key()).is_ok());
    let swapped = read(&with(&[identity, second, first, third, end]), &key());
    assert!(matches!(swapped, Err(StayError::Changed(0))), "{swapped:?}");
    let repeated = read(&with(&[identity, first, first, third, end]), &key());
    assert!(matches!(repeated, Err(StayError::Changed(1))), "{repeated:?}");
    let foreign_chunk = read(&with(&[identity, first, &foreign[2], third, end]), &key());
    assert!(matches!(foreign_chunk, Err(StayError::Changed(1))), "{foreign_chunk:?}");
    let foreign_identity = read(&with(&[&foreign[0], first, second, third, end]), &key());
    assert!(matches!(foreign_identity, Err(StayError::Key)), "{foreign_identity:?}");
    let foreign_end = read(&with(&[identity, first, second, third, &foreign[4]]), &key());
    assert!(matches!(foreign_end, Err(StayError::Torn)), "{foreign_end:?}");
    for left_out in
        [with(&[identity, first, second, end]), with(&[identity, end]), with(&[identity, identity, first, second, third, end])]
    {
        let refused = read(&left_out, &key());
        assert!(matches!(refused, Err(StayError::Malformed(MalformedStay::Count))), "{refused:?}");
    }
}

/// A file of these records, sealed with the right key whatever they say.
fn forged(records: &[(Record, u64, Vec<u8>)]) -> Vec<u8> {
    let head = Head::new(&FORM, SALT);
    let sealer = Sealer::new(&FORM, key().expose(), head);
    let mut file = head.bytes().to_vec();
    for (kind, number, content) in records {
        let mut record = [&[0; RECORD_HEAD][..], content, &[0; TAG]].concat();
        sealer.seal(*kind, *number, &mut record);
        file.extend_from_slice(&record);
    }
    file
}

fn chunk(block: u16, window: u32, mask: u64, contents: usize) -> Vec<u8> {
    [&[0][..], &block.to_be_bytes(), &window.to_be_bytes(), &mask.to_be_bytes(), &vec![1; contents]].concat()
}

/// A file of one block of 100 pages and these chunks, with the end that fits them.
fn forged_chunks(chunks: &[Vec<u8>], pages: u64) -> Vec<u8> {
    let mut records = vec![(Record::Identity, 0, identity(&[100]).encode().expect("an identity"))];
    records.extend(chunks.iter().enumerate().map(|(at, chunk)| (Record::Chunk, at as u64, chunk.clone())));
    let bytes = forged(&records).len() as u64;
    let end = [(chunks.len() as u64).to_be_bytes(), pages.to_be_bytes(), bytes.to_be_bytes()].concat();
    records.push((Record::End, 0, end));
    forged(&records)
}

#[test]
fn what_the_right_key_seals_against_the_rules_is_refused() {
    assert_eq!(read(&forged_chunks(&[chunk(0, 0, 3, 8192)], 2), &key()).expect("read").1.len(), 2);
    assert_eq!(read(&forged_chunks(&[chunk(0, 1, 1 << 35, 4096)], 1), &key()).expect("read").1[0].1, 99);
    let zstd = |plain: &[u8]| [&[1][..], &zstd::bulk::compress(plain, 1).expect("compressed")].concat();
    let bomb = zstd(&vec![0; 64 << 20]);
    assert!(bomb.len() < 8 << 10);
    let cases = [
        (vec![chunk(0, 0, 0, 0)], 0, MalformedStay::Chunk),
        (vec![chunk(0, 0, 3, 4096)], 2, MalformedStay::Chunk),
        (vec![chunk(0, 0, 1, 4097)], 1, MalformedStay::Chunk),
        (vec![vec![0; 14]], 1, MalformedStay::Chunk),
        (vec![zstd(b"short")], 1, MalformedStay::Chunk),
        (vec![vec![]], 1, MalformedStay::Compression),
        (vec![vec![2; 5000]], 1, MalformedStay::Compression),
        (vec![vec![1; 5000]], 1, MalformedStay::Compression),
        (vec![bomb], 1, MalformedStay::Compression),
        (vec![chunk(0, 1, 1 << 36, 4096)], 1, MalformedStay::Place),
        (vec![chunk(1, 0, 1, 4096)], 1, MalformedStay::Place),
        (vec![chunk(0, u32::MAX, 1, 4096)], 1, MalformedStay::Place),
        (vec![chunk(0, 1, 1, 4096), chunk(0, 0, 1, 4096)], 2, MalformedStay::Place),
        (vec![chunk(0, 0, 1, 4096), chunk(0, 0, 2, 4096)], 2, MalformedStay::Place),
        (vec![chunk(0, 0, 1, 4096)], 2, MalformedStay::Count),
    ];
    for (at, (chunks, pages, expected)) in cases.into_iter().enumerate() {
        let refused = read(&forged_chunks(&chunks, pages), &key());
        assert!(matches!(refused, Err(StayError::Malformed(found)) if found == expected), "case {at}: {refused:?}");
    }
    let longer = read(&forged_chunks(&[vec![0; chunk::MAX_CONTENT + 1]], 64), &key());
    assert!(matches!(longer, Err(StayError::Changed(0))), "{longer:?}");
}

#[test]
fn an_identity_that_is_none_is_not_read() {
    let good = identity(&[3, 4]).encode().expect("an identity");
    assert_eq!(Identity::decode(&good), Ok(identity(&[3, 4])));
    for cut in 0..good.len() {
        assert!(Identity::decode(&good[..cut]).is_err(), "cut at {cut}");
    }
    assert_eq!(Identity::decode(&[&good[..], &[0]].concat()), Err(InvalidIdentity::Length));
    let with = |count: u16, blocks: &[u8]| [&good[..24], &count.to_be_bytes(), blocks].concat();
    assert_eq!(Identity::decode(&with(1025, &[])), Err(InvalidIdentity::Blocks));
    assert_eq!(Identity::decode(&with(1, &[0, 0, 0, 0, 1])), Err(InvalidIdentity::Name));
    assert_eq!(Identity::decode(&with(1, &[1, 0xff, 0, 0, 0, 1])), Err(InvalidIdentity::Name));
    assert_eq!(Identity::decode(&with(2, b"\x01a\0\0\0\x01\x01a\0\0\0\x01")), Err(InvalidIdentity::Twice));
    let refused = read(&forged(&[(Record::Identity, 0, with(1025, &[])), (Record::End, 0, vec![0; 24])]), &key());
    assert!(matches!(refused, Err(StayError::Malformed(MalformedStay::Identity(InvalidIdentity::Blocks)))), "{refused:?}");
}

#[test]
fn a_length_that_is_claimed_is_not_allocated() {
    let (bytes, _) = small();
    for border in borders(&bytes) {
        for length in [0, 1, u32::MAX, 1 << 31, 300_000] {
            let mut changed = bytes.clone();
            let Some(field) = changed.get_mut(border + 1..border + RECORD_HEAD) else { continue };
            field.copy_from_slice(&length.to_be_bytes());
            assert!(read(&changed, &key()).is_err());
        }
    }
}

/// Takes so many bytes, then nothing.
struct Full {
    bytes: Vec<u8>,
    room: usize,
    synced: bool,
}

impl std::io::Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(self.room - self.bytes.len());
        if taken == 0 && !bytes.is_empty() {
            return Err(ErrorKind::StorageFull.into());
        }
        self.bytes.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink for &mut Full {
    fn sync(&mut self) -> io::Result<()> {
        self.synced = true;
        Ok(())
    }
}

#[test]
fn a_disk_that_is_full_leaves_a_torn_stay_and_an_error() {
    let pages: Pages = (0..300).map(|page| (0, page, noise(u64::from(page)))).collect();
    let whole = written(&[300], SALT, &pages).len();
    for room in [0, 41, 42, 100, 300_000, 600_000, whole - 1, whole] {
        let mut disk = Full { bytes: Vec::new(), room, synced: false };
        let write = |disk| {
            let mut writer = StayWriter::begin(disk, &key(), &identity(&[300]))?;
            let failed = pages.iter().find_map(|(block, page, content)| writer.page(*block, *page, content).err());
            let finished = writer.finish().map(|_| ());
            assert!(failed.is_none() || finished.is_err(), "what lost a page is not finished");
            finished
        };
        assert_eq!(write(&mut disk).is_ok(), room == whole, "room for {room}");
        assert_eq!(disk.synced, room == whole);
        assert_eq!(read(&disk.bytes, &key()).is_ok(), room == whole);
    }
}

#[test]
fn a_stay_that_becomes_too_long_is_not_finished() {
    let pages: Pages = (0..300).map(|page| (0, page, noise(u64::from(page)))).collect();
    let whole = written(&[300], SALT, &pages).len() as u64;
    for (limit, fits) in [(whole, true), (whole - 1, false), (600_000, false), (0, false)] {
        let mut writer = StayWriter::begin(Vec::new(), &key(), &identity(&[300])).expect("begun").limited(Bytes(limit));
        let failed = pages.iter().find_map(|(block, page, content)| writer.page(*block, *page, content).err());
        assert!(failed.is_none_or(|error| error.kind() == ErrorKind::FileTooLarge));
        assert_eq!(writer.finish().is_ok(), fits, "limit {limit}");
    }
}

#[test]
fn a_key_is_not_shown() {
    assert_eq!(format!("{:?}", key()), "StayKey(withheld)");
    assert_ne!(StayKey::draw().expect("drawn").expose(), StayKey::draw().expect("drawn").expose());
}

fn any_page() -> impl Strategy<Value = Page> {
    prop_oneof![
        Just([0; PAGE_SIZE]),
        any::<u8>().prop_map(|byte| [byte; PAGE_SIZE]),
        any::<u64>().prop_map(noise),
        (0..PAGE_SIZE, any::<u8>()).prop_map(|(at, byte)| {
            let mut page = [0; PAGE_SIZE];
            page[at] = byte;
            page
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn prop_a_stay_gives_back_what_it_was_given(
        pages in prop::collection::btree_map((0..3_u16, 0..300_u32), any_page(), 0..120),
    ) {
        let given: Pages = pages.into_iter().map(|((block, page), content)| (block, page, content)).collect();
        let kept: Pages = given.iter().filter(|(_, _, content)| content != &[0; PAGE_SIZE]).copied().collect();
        let mut writer = StayWriter::begin(Vec::new(), &key(), &identity(&[300; 3])).expect("begun");
        for (block, page, content) in &given {
            writer.page(*block, *page, content).expect("taken");
        }
        let bytes = writer.finish().expect("finished");
        let (found, pages) = read(&bytes, &key()).expect("read");
        prop_assert_eq!(found, identity(&[300; 3]));
        prop_assert!(pages == kept);
    }

    #[test]
    fn prop_no_bytes_make_the_reader_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        contents in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..4),
    ) {
        let _ = read(&bytes, &key());
        let _ = read(&[&Head::new(&FORM, SALT).bytes()[..], &bytes].concat(), &key());
        let _ = read(&forged_chunks(&contents, 1), &key());
        let _ = Identity::decode(&bytes);
    }
}
