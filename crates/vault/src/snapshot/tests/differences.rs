//! Pages that are differences: smaller, one base deep, found again, deleted in any order, and never joined with another base than their own.

use super::*;

/// Writes a snapshot whose pages may be differences to what `before` has, which is the last of `packs`, all of which are known.
pub(super) fn write_since(id: u8, pages: &[(u16, u32, Page)], known: &[&Written], before: &Written) -> Written {
    let (keys, own) = (keys(id), PackId::new(Uuid::from_bytes([id; 16])));
    let mut all = Known::new(100_000);
    for (at, one) in (1..).zip(known) {
        all.add(&opened(&one.snapshot, &known[..at]).expect("whole"));
    }
    let mut earlier = all.earlier(opened(&before.snapshot, known).expect("whole")).expect("few packs");
    let mut writer = SnapshotWriter::begin((Vec::new(), Vec::new()), own, &keys, spaces(), all, NO_LIMIT).expect("begun");
    for (space, page, content) in pages {
        let since = (&mut earlier, *space);
        writer.page_since(*space, *page, content, since).expect("taken");
    }
    let (snapshot, file, totals) = writer.finish(&parts()).expect("finished");
    Written { id: own, key: keys.pack, snapshot, pack: file.unwrap_or_default(), totals }
}

/// Noise of which eight bytes were written `times` times.
fn worn(page: u32, times: u64) -> Page {
    let mut content = noise(u64::from(page));
    for time in 0..times {
        let drawn = blake3::hash(&[u64::from(page), time].map(u64::to_be_bytes).concat());
        let (at, written) = (u16::from_be_bytes([drawn.as_bytes()[0], drawn.as_bytes()[1]]), &drawn.as_bytes()[8..16]);
        let at = usize::from(at) % (PAGE_SIZE / 8) * 8;
        content[at..at + 8].copy_from_slice(written);
    }
    content
}

pub(super) fn working_set(pages: u32, times: u64) -> Vec<(u16, u32, Page)> {
    (0..pages).map(|page| (0, page, worn(page, times))).collect()
}

fn listed(written: &Written) -> Vec<PackId> {
    let reader = SnapshotReader::open(&written.snapshot[..], &keys(0).snapshot).expect("open");
    reader.packs().iter().map(|(id, ..)| *id).collect()
}

#[test]
fn ten_snapshots_of_a_guest_that_writes_a_little_in_each_page_are_little_more_than_the_first() {
    let mut all = vec![write(1, &working_set(400, 0), Known::new(100_000))];
    for time in 1..10 {
        let known: Vec<&Written> = all.iter().collect();
        all.push(write_since(1 + time, &working_set(400, time.into()), &known, &all[all.len() - 1]));
    }
    let bytes = |written: &Written| written.snapshot.len() as u64 + written.totals.pack.0 - parts().devices.len() as u64;
    let (sum, first) = (all.iter().map(bytes).sum::<u64>(), bytes(&all[0]));
    assert!(sum * 100 < first * 125, "{sum} bytes, {first} of the first: {:?}", all.iter().map(bytes).collect::<Vec<_>>());
    // Each needs its own pack and that of the first, whatever came between; and nothing else, so that the others can go.
    for (time, written) in (0..).zip(&all).skip(1) {
        assert_eq!((written.totals.new, written.totals.differences), (400, 400));
        assert_eq!(listed(written), [written.id, all[0].id]);
        let alone = read(&written.snapshot, &[&all[0], written]).expect("read");
        assert_eq!(alone, working_set(400, time));
        verify(&written.snapshot, &[&all[0], written], &keys(0).team).expect("as it was written");
    }
}

#[test]
fn a_base_that_is_missing_is_said_of_its_pack_and_the_rest_is_verified() {
    let first = write(1, &working_set(40, 0), Known::new(100_000));
    let mut second = write_since(2, &working_set(40, 1), &[&first], &first);
    let without_base = |second: &Written| {
        let snapshot = SnapshotReader::open(&second.snapshot[..], &keys(0).snapshot).expect("open");
        let own = snapshot.packs().iter().map(|(id, key, _)| (*id == second.id).then(|| PackReader::open(&second.pack[..], key)));
        let packs = own.map(Option::transpose).collect::<Result<Vec<_>, _>>().expect("its own opens");
        let place = packs.iter().position(Option::is_some).expect("its own") as u16;
        let mut contents = Contents::new(snapshot, packs).expect("opened");
        let error = contents.page(0, 3).expect_err("its base is missing");
        assert!(matches!(error, ContentsError::Pack { pack, .. } if pack == first.id), "{error:?}");
        contents.verify_pack(place, &keys(0).team)
    };
    without_base(&second).expect("nothing is wrong with what is there");
    second.pack[200] ^= 1;
    without_base(&second).expect_err("it is read all the same");
}

#[test]
fn a_content_that_is_a_difference_is_found_and_not_written_again() {
    let first = write(1, &working_set(40, 0), Known::new(100_000));
    let second = write_since(2, &working_set(40, 1), &[&first], &first);
    // At another place, and in a snapshot that has nothing else of the first.
    let moved: Vec<_> = working_set(40, 1).into_iter().map(|(_, page, content)| (2, page + 7, content)).collect();
    let third = write_since(3, &moved, &[&first, &second], &second);
    assert_eq!((third.totals.new, third.totals.known, third.pack.len()), (0, 40, 0));
    assert_eq!(listed(&third), [second.id, first.id]);
    assert_eq!(read(&third.snapshot, &[&first, &second]).expect("read"), moved);
    // Taken over as it is, too.
    let mut known = Known::new(0);
    let earlier = known.earlier(opened(&third.snapshot, &[&first, &second]).expect("whole")).expect("few packs");
    let (keys, own) = (keys(4), PackId::new(Uuid::from_bytes([4; 16])));
    let mut writer = SnapshotWriter::begin((Vec::new(), Vec::new()), own, &keys, spaces(), known, NO_LIMIT).expect("begun");
    for (page, at) in earlier.leaf(2, 0).expect("a leaf").located() {
        writer.take_over(2, page, &earlier, at).expect("taken over");
    }
    let (fourth, _, _) = writer.finish(&parts()).expect("finished");
    assert_eq!(read(&fourth, &[&first, &second]).expect("read"), moved);
}

#[test]
fn what_differs_too_much_is_whole_and_is_the_next_base() {
    let first = write(1, &working_set(40, 0), Known::new(100_000));
    let others: Vec<_> = (0..40).map(|page| (0, page, worn(page + 1_000, 0))).collect();
    let second = write_since(2, &others, &[&first], &first);
    assert_eq!((second.totals.new, second.totals.differences), (40, 0));
    assert_eq!(listed(&second), [second.id]);
    let worn: Vec<_> = (0..40).map(|page| (0, page, worn(page + 1_000, 1))).collect();
    let third = write_since(3, &worn, &[&first, &second], &second);
    assert_eq!((third.totals.differences, listed(&third)), (40, vec![third.id, second.id]));
    assert_eq!(read(&third.snapshot, &[&second, &third]).expect("read"), worn);
}

#[test]
fn a_difference_whose_base_its_reader_does_not_know_is_not_referred_to() {
    let first = write(1, &working_set(40, 0), Known::new(100_000));
    let mut pages = working_set(20, 1);
    pages.extend((0..20).map(|page| (0, page + 100, noise(u64::from(page) + 5_000))));
    let second = write_since(2, &pages, &[&first], &first);
    assert_eq!((second.totals.new, second.totals.differences), (40, 20));
    // It needs of the second only what is whole there.
    let third = write_since(3, &pages[20..], &[&first, &second], &second);
    assert_eq!((third.totals.known, listed(&third)), (20, vec![second.id]));
    verify(&third.snapshot, &[&second], &keys(0).team).expect("as far as it can be read");
    let mut known = Known::new(100_000);
    known.add(&opened(&third.snapshot, &[&second]).expect("whole"));
    let fourth = write(4, &pages, known);
    assert_eq!((fourth.totals.known, fourth.totals.new), (20, 20));
    assert_eq!(read(&fourth.snapshot, &[&second, &fourth]).expect("read"), sorted(pages));
}

#[test]
fn a_difference_whose_base_has_no_number_is_not_known() {
    let first = write(1, &working_set(40, 0), Known::new(100_000));
    let mut pages = working_set(40, 1);
    pages.push((0, 100, noise(5_000)));
    let second = write_since(2, &pages, &[&first], &first);
    // By the id of the first another pack is known already.
    let (keys, id) = (keys(9), first.id);
    let mut writer = SnapshotWriter::begin((Vec::new(), Vec::new()), id, &keys, spaces(), Known::new(0), NO_LIMIT).expect("begun");
    writer.page(0, 0, &noise(6_000)).expect("taken");
    let (snapshot, pack, totals) = writer.finish(&parts()).expect("finished");
    let other = Written { id, key: keys.pack, snapshot, pack: pack.expect("a page"), totals };
    let mut known = known_of(&other);
    known.add(&opened(&second.snapshot, &[&first, &second]).expect("whole"));
    let third = write(3, &pages, known);
    assert_eq!((third.totals.known, third.totals.new), (1, 40));
    assert_eq!(listed(&third), [third.id, second.id]);
    assert_eq!(read(&third.snapshot, &[&second, &third]).expect("read"), pages);
}

#[test]
fn a_base_that_is_another_or_damaged_gives_no_bytes() {
    let first = write(1, &working_set(40, 0), Known::new(100_000));
    let second = write_since(2, &working_set(40, 1), &[&first], &first);
    // A pack of the same name and key, whole, with other contents: nothing but the checks can tell.
    let mut forged = write(1, &working_set(40, 3), Known::new(100_000));
    let error = read(&second.snapshot, &[&forged, &second]).expect_err("not what was stored");
    assert!(matches!(error, FileError::Digest(0)), "{error:?}");
    assert!(verify(&second.snapshot, &[&forged, &second], &keys(0).team).is_err());
    // One whose pages are differences themselves.
    forged = Written { pack: write_since(1, &working_set(40, 4), &[&first], &first).pack, ..forged };
    assert!(matches!(read(&second.snapshot, &[&forged, &second]), Err(FileError::Malformed(_))));
    for place in [60, first.pack.len() / 3] {
        let mut damaged = Written { pack: first.pack.clone(), snapshot: vec![], ..forged };
        damaged.pack[place] ^= 1;
        assert!(matches!(read(&second.snapshot, &[&damaged, &second]), Err(FileError::Changed(_))), "byte {place}");
        assert!(matches!(verify(&second.snapshot, &[&damaged, &second], &keys(0).team), Err(FileError::Changed(_))));
        forged = damaged;
    }
}

#[test]
fn no_bit_of_a_pack_with_differences_can_change_unseen() {
    let first = write(1, &working_set(33, 0), Known::new(100_000));
    let mut second = write_since(2, &working_set(33, 1), &[&first], &first);
    for place in 0..second.pack.len() {
        second.pack[place] ^= 0x10;
        assert!(verify(&second.snapshot, &[&first, &second], &keys(0).team).is_err(), "byte {place}");
        second.pack[place] ^= 0x10;
    }
    for length in 0..second.pack.len() {
        let error = PackReader::open(&second.pack[..length], &second.key).map(|_| ()).expect_err("torn");
        assert!(matches!(error, FileError::Torn), "{length}: {error:?}");
    }
}

#[test]
fn looking_for_bases_reads_no_more_than_taking_may_wait_for() {
    // Each page that is looked for is in another chunk, and there are more chunks than are kept.
    let wide = |pages| vec![Space { pages, ..spaces()[0].clone() }];
    let (keys, own) = (keys(1), PackId::new(Uuid::from_bytes([1; 16])));
    let (chunks, pages) = (1_300, 1_300 * 16);
    let mut writer =
        SnapshotWriter::begin((Vec::new(), Vec::new()), own, &keys, wide(pages), Known::new(0), NO_LIMIT).expect("begun");
    let content = |page: u32| std::array::from_fn(|at| if at < 4 { page.to_be_bytes()[at] } else { 7 });
    for page in 0..pages {
        writer.page(0, page, &content(page)).expect("taken");
    }
    let (snapshot, pack, totals) = writer.finish(&parts()).expect("finished");
    let written = Written { id: own, key: keys.pack, snapshot, pack: pack.expect("pages"), totals };
    let mut known = Known::new(0);
    let mut earlier = known.earlier(opened(&written.snapshot, &[&written]).expect("whole")).expect("few packs");
    let mut found = |chunk: u32| {
        earlier.came();
        earlier.base(0, chunk * 16).map(|(at, base)| assert_eq!((at.page, *base), (chunk * 16, content(chunk * 16)))).is_some()
    };
    let first: Vec<u32> = (0..chunks).filter(|chunk| found(*chunk)).collect();
    assert!(
        (1_050..1_085).contains(&first.len()),
        "so many at once, leaves among them, and one for each sixteen pages: {}",
        first.len()
    );
    // What is at hand is read from memory.
    assert!((0..10).all(|_| found(first[first.len() - 1])));
}

#[test]
fn a_slow_vault_is_not_looked_into_for_long() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    let wide = |pages| vec![Space { pages, ..spaces()[0].clone() }];
    let (keys, own) = (keys(1), PackId::new(Uuid::from_bytes([1; 16])));
    let pages = 512 * 16;
    let mut writer =
        SnapshotWriter::begin((Vec::new(), Vec::new()), own, &keys, wide(pages), Known::new(0), NO_LIMIT).expect("begun");
    for page in 0..pages {
        writer.page(0, page, &std::array::from_fn(|at| (page + 1).to_be_bytes()[at % 4])).expect("taken");
    }
    let (snapshot, pack, totals) = writer.finish(&parts()).expect("finished");
    let written = Written { id: own, key: keys.pack, snapshot, pack: pack.expect("pages"), totals };
    // By a clock that goes on by so many milliseconds with each look at it: a reading takes one step.
    for (step, wanted) in [(0, 512..513), (20, 90..101), (60, 1..2)] {
        let mut earlier = Known::new(0).earlier(opened(&written.snapshot, &[&written]).expect("whole")).expect("few packs");
        let time = Arc::new(AtomicU64::new(0));
        earlier.hurry(move || Duration::from_millis(time.fetch_add(step, Ordering::Relaxed)));
        let found = (0..512).filter(|chunk| earlier.base(0, chunk * 16).is_some()).count();
        assert!(wanted.contains(&found), "{found} with {step} ms");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Snapshots one after the other, each of pages that changed much, little, or became what they or others were, read as they were, with packs of others gone.
    #[test]
    fn whatever_changes_is_read_as_it_was(steps in prop::collection::vec(prop::collection::btree_map(0..60_u32, (0..4_u64, 0..3_u32), 1..60), 2..6)) {
        let content = |page: u32, (times, other): (u64, u32)| worn(page % 7 + other * 1_000, times);
        let mut all: Vec<Written> = vec![];
        let mut states: Vec<Vec<(u16, u32, Page)>> = vec![];
        for (id, step) in (1..).zip(&steps) {
            let mut state: std::collections::BTreeMap<u32, Page> =
                states.last().into_iter().flatten().map(|(_, page, content)| (*page, *content)).collect();
            state.extend(step.iter().map(|(page, how)| (*page, content(*page, *how))));
            let state: Vec<_> = state.into_iter().map(|(page, content)| (0, page, content)).collect();
            let known: Vec<&Written> = all.iter().collect();
            let written = match known.last() {
                Some(last) => write_since(id, &state, &known, last),
                None => write(id, &state, Known::new(1_000)),
            };
            all.push(written);
            states.push(state);
        }
        for (written, state) in all.iter().zip(&states) {
            let needed: Vec<&Written> = all.iter().filter(|pack| listed(written).contains(&pack.id)).collect();
            prop_assert_eq!(&read(&written.snapshot, &needed).expect("read"), state);
            prop_assert!(verify(&written.snapshot, &needed, &keys(0).team).is_ok());
        }
    }
}
