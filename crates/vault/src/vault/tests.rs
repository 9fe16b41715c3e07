//! The directory: whole or not there, whatever fails and wherever it crashes; deletes in any order; damage is named.

use std::cell::Cell;
use std::fs;
use std::sync::Mutex;

use super::*;
use crate::pack::Page;
use crate::snapshot::{Located, Parts, SpaceKind};

mod first;
mod prune;

/// Fails the n-th step from now; a crash fails all that come after, too.
#[derive(Debug, Default)]
pub(super) struct Faults {
    armed: Mutex<Option<(usize, bool)>>,
    met: Mutex<Vec<Step>>,
}

impl Faults {
    pub(super) fn meet(&self, step: Step) -> io::Result<()> {
        self.met.lock().expect("not poisoned").push(step);
        let mut armed = self.armed.lock().expect("not poisoned");
        match *armed {
            None => return Ok(()),
            Some((0, true)) => {}
            Some((0, false)) => *armed = None,
            Some((left, crash)) => {
                *armed = Some((left - 1, crash));
                return Ok(());
            }
        }
        Err(io::ErrorKind::StorageFull.into())
    }

    fn arm(&self, step: usize, crash: bool) {
        *self.armed.lock().expect("not poisoned") = Some((step, crash));
        self.met.lock().expect("not poisoned").clear();
    }

    fn disarm(&self) -> usize {
        *self.armed.lock().expect("not poisoned") = None;
        self.met.lock().expect("not poisoned").len()
    }
}

const NO_LIMIT: Bytes = Bytes(u64::MAX);

fn id(number: u8) -> SnapshotId {
    SnapshotId::new(Uuid::from_bytes([number; 16]))
}

fn key(number: u8) -> SnapshotKey {
    SnapshotKey::new([number; 32])
}

fn team() -> TeamKey {
    TeamKey::new([0xee; 32])
}

fn keys(numbers: &[u8]) -> BTreeMap<SnapshotId, SnapshotKey> {
    numbers.iter().map(|number| (id(*number), key(*number))).collect()
}

fn listed(numbers: &[u8]) -> Vec<(SnapshotId, SnapshotKey)> {
    keys(numbers).into_iter().collect()
}

fn content(seed: u8) -> Page {
    let mut page = [0; godwit_stream::PAGE_SIZE];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut page);
    page
}

/// Takes a snapshot whose pages are those of `seeds`, with what the snapshots `before` have.
fn take(vault: &Vault, number: u8, seeds: &[u8], before: &[u8]) -> Result<Totals, VaultError> {
    let draft = vault.begin(id(number))?;
    let known = vault.known(&listed(before), 1000)?;
    let keys = Keys { snapshot: key(number), team: team(), pack: PackKey::new([number; 32]) };
    let spaces = vec![Space { kind: SpaceKind::Ram, name: "pc.ram".into(), pages: 256 }];
    let mut writer = draft.writer(&keys, spaces, known, NO_LIMIT).expect("begun");
    for (page, seed) in (0..).zip(seeds) {
        writer.page(0, page, &content(*seed)).expect("taken");
    }
    let (_, _, totals) = writer.finish(&Parts::default()).expect("finished");
    draft.commit(&totals)?;
    Ok(totals)
}

fn seeds(vault: &Vault, number: u8) -> Result<Vec<u8>, VaultError> {
    let mut contents = vault.snapshot(id(number), &key(number))?;
    let pages = (0..256).filter_map(|page| contents.page(0, page).expect("a page").copied());
    let pages: Vec<Page> = pages.collect();
    Ok(pages.iter().map(|page| (0..=u8::MAX).find(|seed| content(*seed) == *page).expect("one of ours")).collect())
}

fn vault() -> (tempfile::TempDir, Vault) {
    let dir = tempfile::tempdir().expect("a directory");
    let vault = Vault::open(&dir.path().join("vault")).expect("a vault");
    (dir, vault)
}

#[test]
fn snapshots_share_what_they_have_alike_and_go_in_any_order() {
    let (_dir, vault) = vault();
    take(&vault, 1, &[1, 2, 3], &[]).expect("taken");
    assert_eq!(take(&vault, 2, &[1, 9, 3], &[1]).expect("taken").new, 1);
    assert_eq!(take(&vault, 3, &[9, 3, 10], &[1, 2]).expect("taken").new, 1);
    assert_eq!(vault.verify(&listed(&[1, 2, 3]), &team()).expect("read").len(), 0);
    assert!(matches!(take(&vault, 3, &[1], &[]), Err(VaultError::Exists(_))));
    // The first goes: its pack stays, since the others refer to it.
    vault.delete(id(1)).expect("deleted");
    assert_eq!(vault.plan_prune(&keys(&[2, 3])).expect("a plan"), PrunePlan::default());
    assert_eq!(seeds(&vault, 2).expect("read"), [1, 9, 3]);
    assert_eq!(seeds(&vault, 3).expect("read"), [9, 3, 10]);
    vault.delete(id(3)).expect("deleted");
    let plan = vault.plan_prune(&keys(&[2])).expect("a plan");
    assert_eq!(plan.packs.iter().map(|(pack, _)| pack.uuid()).collect::<Vec<_>>(), [id(3).uuid()]);
    let before = vault.usage().expect("usage");
    vault.prune(&plan, &keys(&[2])).expect("pruned");
    let after = vault.usage().expect("usage");
    assert_eq!((before.bytes.0 - after.bytes.0, before.packs - after.packs), (plan.bytes().0, 1));
    assert_eq!(seeds(&vault, 2).expect("read"), [1, 9, 3]);
    assert!(matches!(seeds(&vault, 3), Err(VaultError::NotFound(_))));
}

#[test]
fn nothing_is_pruned_on_a_guess() {
    let (_dir, vault) = vault();
    take(&vault, 1, &[1], &[]).expect("taken");
    take(&vault, 2, &[2], &[]).expect("taken");
    take(&vault, 6, &[1, 2, 6], &[1, 2]).expect("taken");
    // One whose key is gone is nothing, and goes with what it alone had.
    let plan = vault.plan_prune(&keys(&[1, 2])).expect("a plan");
    assert_eq!((plan.snapshots.len(), plan.snapshots[0].0, plan.packs.len()), (1, id(6), 1));
    vault.prune(&plan, &keys(&[1, 2])).expect("pruned");
    assert_eq!((seeds(&vault, 1).expect("read"), seeds(&vault, 2).expect("read")), (vec![1], vec![2]));
    vault.delete(id(1)).expect("deleted");
    let plan = vault.plan_prune(&keys(&[2])).expect("a plan");
    // Somebody writes.
    let draft = vault.begin(id(3)).expect("begun");
    assert!(matches!(vault.prune(&plan, &keys(&[2])), Err(VaultError::Busy)));
    drop(draft);
    take(&vault, 4, &[1], &[2]).expect("taken");
    vault.delete(id(4)).expect("deleted");
    assert!(matches!(vault.prune(&plan, &keys(&[2])), Err(VaultError::Changed)));
    // Nobody begins while somebody prunes.
    let _lock = vault.shared.lock(FlockOperation::NonBlockingLockExclusive).expect("locked");
    assert!(matches!(vault.begin(id(5)), Err(VaultError::Busy)));
}

#[test]
fn a_snapshot_is_whole_or_not_there_whatever_fails_and_wherever_it_crashes() {
    let steps = Cell::new(usize::MAX);
    for crash in [false, true] {
        for step in 0.. {
            let (dir, vault) = vault();
            take(&vault, 1, &[1, 2], &[]).expect("taken");
            vault.shared.faults.arm(step, crash);
            let taken = take(&vault, 2, &[2, 3], &[1]);
            let met = vault.shared.faults.disarm();
            steps.set(met);
            // As after a crash: nothing of the process is left but its files.
            drop(vault);
            let vault = Vault::open(&dir.path().join("vault")).expect("a vault");
            assert_eq!(seeds(&vault, 1).expect("the other one is as it was"), [1, 2]);
            let there = vault.snapshots().expect("read").contains(&id(2));
            assert!(there || taken.is_err(), "step {step}");
            let whole: &[u8] = if there { &[1, 2] } else { &[1] };
            if there {
                assert_eq!(seeds(&vault, 2).expect("whole"), [2, 3], "step {step}");
            }
            let plan = vault.plan_prune(&keys(whole)).expect("a plan");
            vault.prune(&plan, &keys(whole)).expect("pruned");
            assert_eq!(vault.verify(&listed(whole), &team()).expect("read").len(), 0, "step {step}");
            // Lock, snapshots, packs, and nothing else.
            let left = fs::read_dir(dir.path().join("vault")).expect("read").count();
            assert_eq!(left, 1 + 2 * whole.len(), "step {step}");
            if !there {
                take(&vault, 2, &[2, 3], &[1]).expect("taken at the second try");
            }
            if step >= met {
                break;
            }
        }
        assert!(steps.get() >= 6, "too few steps were met");
    }
}

#[test]
fn damage_is_found_and_named() {
    let (dir, vault) = vault();
    take(&vault, 1, &[1, 2, 3], &[]).expect("taken");
    take(&vault, 2, &[4], &[]).expect("taken");
    let file = |name: String| dir.path().join("vault").join(name);
    let pack = file(pack_name(PackId::new(id(1).uuid())));
    let mut bytes = fs::read(&pack).expect("read");
    bytes[60] ^= 1;
    fs::write(&pack, &bytes).expect("written");
    let wrong = vault.verify(&listed(&[1, 2]), &team()).expect("read");
    let names: Vec<_> = wrong.iter().map(|error| error.to_string()).collect();
    assert_eq!(names, [format!("{} in the vault cannot be used", pack_name(PackId::new(id(1).uuid())))]);
    fs::remove_file(&pack).expect("removed");
    assert!(matches!(vault.snapshot(id(1), &key(1)), Err(VaultError::Missing { .. })));
    let wrong = vault.verify(&listed(&[1, 2]), &team()).expect("read");
    assert!(matches!(wrong[..], [VaultError::Missing { snapshot, .. }] if snapshot == id(1)), "{wrong:?}");
    // What is missing is not referred to again.
    assert_eq!(take(&vault, 3, &[1, 4], &[1, 2]).expect("taken").new, 1);
    assert_eq!(seeds(&vault, 3).expect("read"), [1, 4]);
}

#[test]
fn a_snapshot_whose_list_counts_a_pack_otherwise_is_not_opened() {
    let ((from, other), (dir, vault)) = (vault(), vault());
    take(&other, 1, &[1, 2, 3], &[]).expect("taken");
    take(&vault, 1, &[1, 2], &[]).expect("taken");
    let pack = pack_name(PackId::new(id(1).uuid()));
    fs::copy(from.path().join("vault").join(&pack), dir.path().join("vault").join(&pack)).expect("copied");
    assert!(matches!(vault.snapshot(id(1), &key(1)), Err(VaultError::Missing { .. })));
    let wrong = vault.verify(&listed(&[1]), &team()).expect("read");
    assert!(matches!(wrong[..], [VaultError::Missing { snapshot, .. }] if snapshot == id(1)), "{wrong:?}");
    assert_eq!(take(&vault, 2, &[1, 2], &[1]).expect("taken").new, 2);
    assert_eq!(seeds(&vault, 2).expect("read"), [1, 2]);
}

#[test]
fn what_is_not_ours_is_left_alone() {
    let (dir, vault) = vault();
    let place = dir.path().join("vault");
    for name in [
        "notes",
        "x.pack",
        "x.draft",
        "11111111-1111-1111-1111-111111111111.pack.draft",
        "11111111-1111-1111-1111-111111111111.pack.00000001.draft.draft",
    ] {
        fs::write(place.join(name), "mine").expect("written");
    }
    assert_eq!(vault.plan_prune(&keys(&[])).expect("a plan"), PrunePlan::default());
    std::os::unix::fs::symlink("/etc/passwd", place.join(snapshot_name(id(1)))).expect("a link");
    assert!(vault.snapshot(id(1), &key(1)).is_err(), "a link is not followed");
}

/// Takes a snapshot of a disk whose pages are those of `seeds`: only the pages of `changed` are looked at, all else is taken over from `earlier`.
fn take_changes(
    vault: &Vault,
    number: u8,
    seeds: &[u8],
    earlier: u8,
    changed: &[u32],
    before: &[u8],
) -> Result<Totals, VaultError> {
    let draft = vault.begin(id(number))?;
    let mut known = vault.known(&listed(before), 1000)?;
    let earlier = vault.earlier(id(earlier), &key(earlier), &mut known)?.expect("few packs");
    let space = earlier.disk("disk0", PAGES).expect("the disk");
    assert_eq!((earlier.disk("disk0", PAGES + 1), earlier.disk("disk1", PAGES)), (None, None));
    let keys = Keys { snapshot: key(number), team: team(), pack: PackKey::new([number; 32]) };
    let mut writer = draft.writer(&keys, disk(), known, NO_LIMIT).expect("begun");
    let leaf = earlier.leaf(space, 0).map_err(damaged("a leaf".into()))?;
    for (page, at) in leaf.located().filter(|(page, _)| !changed.contains(page)) {
        writer.take_over(0, page, &earlier, at).expect("taken over");
    }
    for page in changed {
        writer.page(0, *page, &content(seeds[*page as usize])).expect("taken");
    }
    let nowhere = Located { pack: 99, page: 0 };
    assert!(writer.take_over(0, 7, &earlier, nowhere).is_err());
    let (_, _, totals) = writer.finish(&Parts::default()).expect("finished");
    draft.commit(&totals)?;
    Ok(totals)
}

const PAGES: u32 = 256;

fn disk() -> Vec<Space> {
    vec![Space { kind: SpaceKind::Disk, name: "disk0".into(), pages: PAGES }]
}

fn take_disk(vault: &Vault, number: u8, seeds: &[u8]) {
    let draft = vault.begin(id(number)).expect("begun");
    let keys = Keys { snapshot: key(number), team: team(), pack: PackKey::new([number; 32]) };
    let mut writer = draft.writer(&keys, disk(), Known::new(1000), NO_LIMIT).expect("begun");
    for (page, seed) in (0..).zip(seeds) {
        writer.page(0, page, &content(*seed)).expect("taken");
    }
    let (_, _, totals) = writer.finish(&Parts::default()).expect("finished");
    draft.commit(&totals).expect("committed");
}

#[test]
fn what_is_taken_over_needs_the_snapshot_it_comes_from_no_more() {
    let (_dir, vault) = vault();
    take_disk(&vault, 1, &[1, 2, 3]);
    assert_eq!(take_changes(&vault, 2, &[1, 9, 3], 1, &[1], &[1]).expect("taken").new, 1);
    // Its packs are known also where their pages are not; what was zero, and what becomes so.
    let third = take_changes(&vault, 3, &[1, 9, 4, 5], 2, &[2, 3], &[]).expect("taken");
    assert_eq!((third.new, third.known), (2, 2));
    let reads = |number, wanted: &[u8]| {
        assert_eq!(seeds(&vault, number).expect("read"), wanted);
    };
    reads(3, &[1, 9, 4, 5]);
    // A full one of the same has the same pages.
    take_disk(&vault, 4, &[1, 9, 4, 5]);
    let [mut full, mut taken_over] = [4, 3].map(|number| vault.snapshot(id(number), &key(number)).expect("opened"));
    for page in 0..PAGES {
        assert_eq!(full.page(0, page).expect("read").copied(), taken_over.page(0, page).expect("read").copied());
    }
    for gone in [1, 2, 4] {
        vault.delete(id(gone)).expect("deleted");
    }
    let plan = vault.plan_prune(&keys(&[3])).expect("a plan");
    assert_eq!(plan.packs.iter().map(|(pack, _)| pack.uuid()).collect::<Vec<_>>(), [id(4).uuid()]);
    vault.prune(&plan, &keys(&[3])).expect("pruned");
    reads(3, &[1, 9, 4, 5]);
    assert_eq!(vault.verify(&listed(&[3]), &team()).expect("read").len(), 0);
}

#[test]
fn nothing_is_taken_over_from_what_is_damaged_or_gone() {
    let (dir, vault) = vault();
    take_disk(&vault, 1, &[1, 2, 3]);
    let file = dir.path().join("vault").join(snapshot_name(id(1)));
    let whole = fs::read(&file).expect("read");
    for place in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[place] ^= 1;
        fs::write(&file, &bytes).expect("written");
        assert!(matches!(take_changes(&vault, 2, &[1], 1, &[0], &[]), Err(VaultError::File { .. })), "byte {place}");
    }
    fs::write(&file, &whole).expect("written");
    fs::remove_file(dir.path().join("vault").join(pack_name(PackId::new(id(1).uuid())))).expect("removed");
    assert!(matches!(take_changes(&vault, 2, &[1], 1, &[0], &[]), Err(VaultError::Missing { .. })));
    vault.delete(id(1)).expect("deleted");
    assert!(matches!(take_changes(&vault, 2, &[1], 1, &[0], &[]), Err(VaultError::NotFound(_))));
    assert_eq!(vault.snapshots().expect("read").len(), 0);
    // A pack of the same name that is another: one of a snapshot that was taken anew.
    take_disk(&vault, 1, &[1, 2, 3]);
    let mut known = vault.known(&listed(&[1]), 1000).expect("known");
    let before = vault.snapshot(id(1), &key(1)).expect("opened");
    known.earlier(before).expect("the same");
    vault.delete(id(1)).expect("deleted");
    let draft = vault.begin(id(1)).expect("begun");
    let keys = Keys { snapshot: key(1), team: team(), pack: PackKey::new([77; 32]) };
    let mut writer = draft.writer(&keys, disk(), Known::new(9), NO_LIMIT).expect("begun");
    writer.page(0, 0, &content(8)).expect("taken");
    let (_, _, totals) = writer.finish(&Parts::default()).expect("finished");
    draft.commit(&totals).expect("committed");
    assert!(vault.earlier(id(1), &key(1), &mut known).expect("opened").is_none());
}

#[test]
fn who_writes_a_forsaken_snapshot_does_not_commit_it() {
    let (_dir, vault) = vault();
    take_disk(&vault, 1, &[1]);
    let begun = || {
        let draft = vault.begin(id(2)).expect("begun");
        let keys = Keys { snapshot: key(2), team: team(), pack: PackKey::new([2; 32]) };
        let mut writer = draft.writer(&keys, disk(), Known::new(9), NO_LIMIT).expect("begun");
        writer.page(0, 0, &content(2)).expect("taken");
        (draft, writer.finish(&Parts::default()).expect("finished").2)
    };
    let (early, totals) = begun();
    vault.forsake(id(2)).expect("forsaken");
    assert!(early.commit(&totals).is_err());
    let (late, totals) = begun();
    late.commit(&totals).expect("committed");
    vault.forsake(id(2)).expect("forsaken");
    assert!(vault.snapshots().expect("read").into_iter().eq([id(1)]), "only the other is left");
    assert_eq!(vault.usage().expect("usage").snapshots, 1);
    assert_eq!(seeds(&vault, 1).expect("read"), [1]);
}
