//! Snapshots whose packs were written anew without some of their pages.

use super::*;
use crate::snapshot::tests::differences::{working_set, write_since};

/// A pack with the pages of which `keep` is true.
fn rewritten(of: &Written, keep: impl Fn(u32) -> bool) -> Written {
    let pack = PackReader::open(&of.pack[..], &of.key).expect("open");
    let file = pack.rewrite(&pack.kept().only(keep), &of.key, Vec::new()).expect("written");
    Written { id: of.id, key: of.key.clone(), snapshot: of.snapshot.clone(), pack: file, totals: of.totals }
}

#[test]
fn a_page_that_is_not_kept_is_refused_and_no_other_is_given_out_for_it() {
    let pages: Vec<_> = (0..60).map(|page| (0, page, noise(page.into()))).collect();
    let whole = write(1, &pages, Known::new(1000));
    let less = rewritten(&whole, |page| page % 5 == 0);
    let mut contents = opened(&whole.snapshot, &[&less]).expect("it has the number of pages that the list says");
    for (_, page, content) in &pages {
        match contents.page(0, *page) {
            Ok(read) => assert!(page % 5 == 0 && read == Some(content), "page {page}"),
            Err(error) => {
                let place = matches!(error, ContentsError::Snapshot(FileError::Malformed(Malformed::Place)));
                assert!(place && page % 5 != 0, "page {page}: {error:?}");
            }
        }
    }
    let verified = verify(&whole.snapshot, &[&less], &keys(0).team);
    assert!(matches!(verified, Err(FileError::Malformed(Malformed::Place))), "{verified:?}");
    // Nor is it known, or taken over.
    let mut known = known_of(&less);
    let earlier = known.earlier(opened(&whole.snapshot, &[&less]).expect("whole")).expect("few packs");
    let later = write(2, &pages, known);
    assert_eq!((later.totals.known, later.totals.new), (12, 48));
    assert_eq!(read(&later.snapshot, &[&less, &later]).expect("read"), pages);
    verify(&later.snapshot, &[&less, &later], &keys(0).team).expect("nothing is wrong with what it needs");
    let leaf = earlier.leaf(0, 0).expect("a leaf");
    let (own, key) = (PackId::new(Uuid::from_bytes([3; 16])), super::keys(3));
    let mut writer =
        SnapshotWriter::begin((Vec::new(), Vec::new()), own, &key, spaces(), known_of(&less), NO_LIMIT).expect("begun");
    for (page, at) in leaf.located() {
        assert_eq!(writer.take_over(0, page, &earlier, at).is_ok(), page % 5 == 0, "page {page}");
    }
}

#[test]
fn a_difference_whose_base_is_not_kept_is_not_known_and_nothing_is_said_of_it() {
    let first = write(1, &working_set(40, 0), Known::new(100_000));
    let second = write_since(2, &working_set(40, 1), &[&first], &first);
    // Of the second ten are needed, but it is not written anew: of the first are their bases, and it is.
    let few = &working_set(40, 1)[..10];
    let third = write_since(3, few, &[&first, &second], &second);
    assert_eq!((third.totals.known, third.pack.len()), (10, 0));
    let bases = rewritten(&first, |page| page < 10);
    assert_eq!(read(&third.snapshot, &[&bases, &second]).expect("read"), few);
    verify(&third.snapshot, &[&bases, &second], &keys(0).team).expect("all that it needs is there");
    let mut known = Known::new(100_000);
    known.add(&opened(&third.snapshot, &[&bases, &second]).expect("whole"));
    let fourth = write(4, &working_set(40, 1), known);
    assert_eq!((fourth.totals.known, fourth.totals.new), (10, 30));
    assert_eq!(read(&fourth.snapshot, &[&bases, &second, &fourth]).expect("read"), working_set(40, 1));
    // The base of one that is needed is missed.
    let verified = verify(&third.snapshot, &[&rewritten(&first, |page| page < 9), &second], &keys(0).team);
    assert!(matches!(verified, Err(FileError::Malformed(Malformed::Place))), "{verified:?}");
    // Both written anew; differences to what is kept are made as before.
    let second = rewritten(&second, |page| page < 10);
    let fifth = write_since(5, &working_set(10, 2), &[&first, &second], &third_of(&third, &second));
    assert_eq!(fifth.totals.differences, 10);
    assert_eq!(read(&fifth.snapshot, &[&bases, &fifth]).expect("read"), working_set(10, 2));
}

/// A snapshot under the name of another's pack, for [`write_since`].
fn third_of(snapshot: &Written, pack: &Written) -> Written {
    Written {
        id: pack.id,
        key: pack.key.clone(),
        snapshot: snapshot.snapshot.clone(),
        pack: pack.pack.clone(),
        totals: pack.totals,
    }
}
