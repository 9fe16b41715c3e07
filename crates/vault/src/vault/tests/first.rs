//! First pages: kept once, gone with their snapshot, and never in the way of it.

use super::*;

const PAGES: [(u16, u32); 2] = [(0, 7), (0, 3)];
const OTHERS: [(u16, u32); 1] = [(0, 9)];

fn first(vault: &Vault) -> Vec<(u16, u32)> {
    vault.first_pages(id(1), &key(1))
}

#[test]
fn they_are_kept_once_and_go_with_their_snapshot() {
    let (dir, vault) = vault();
    take(&vault, 1, &[1, 2, 3], &[]).expect("taken");
    assert_eq!(first(&vault), []);
    vault.keep_first_pages(id(1), &key(1), &[]).expect("nothing to keep");
    vault.keep_first_pages(id(1), &key(1), &PAGES).expect("kept");
    vault.keep_first_pages(id(1), &key(1), &OTHERS).expect("they are known");
    assert_eq!(first(&vault), PAGES);
    assert_eq!(vault.first_pages(id(1), &key(2)), [], "not with another key");
    assert_eq!(vault.plan_prune(&keys(&[1])).expect("read"), PrunePlan::default());
    let file = dir.path().join("vault").join(first_name(id(1)));
    let length = fs::metadata(&file).expect("it is there").len();
    assert_eq!(vault.usage().expect("read").snapshots, 1);
    // What is damaged is as if it were not there.
    fs::write(&file, b"something else").expect("written");
    assert_eq!(first(&vault), []);
    vault.keep_first_pages(id(1), &key(1), &OTHERS).expect("kept");
    assert_eq!(first(&vault), OTHERS);
    assert!(fs::metadata(&file).expect("it is there").len() < length);
    assert_eq!(seeds(&vault, 1).expect("read"), [1, 2, 3]);
    vault.delete(id(1)).expect("deleted");
    assert!(!file.exists());
    vault.keep_first_pages(id(1), &key(1), &PAGES).expect("nothing to keep them for");
    assert!(!file.exists());
}

#[test]
fn what_a_crash_leaves_of_them_is_pruned() {
    let steps = {
        let (_dir, vault) = vault();
        take(&vault, 1, &[1], &[]).expect("taken");
        vault.shared.faults.arm(usize::MAX, false);
        vault.keep_first_pages(id(1), &key(1), &PAGES).expect("kept");
        vault.shared.faults.disarm()
    };
    assert_eq!(steps, 2, "a draft, and its name");
    for step in 0..steps {
        let (dir, vault) = vault();
        take(&vault, 1, &[1], &[]).expect("taken");
        vault.shared.faults.arm(step, true);
        assert!(matches!(vault.keep_first_pages(id(1), &key(1), &PAGES), Err(VaultError::Io { .. })));
        vault.shared.faults.disarm();
        assert_eq!((first(&vault), seeds(&vault, 1).expect("read")), (vec![], vec![1]));
        let plan = vault.plan_prune(&keys(&[1])).expect("read");
        assert_eq!(plan.drafts.len(), step, "a draft, once there was one");
        vault.prune(&plan, &keys(&[1])).expect("pruned");
        assert_eq!(fs::read_dir(dir.path().join("vault")).expect("read").count(), 3, "snapshot, pack and lock");
    }
    // And when the snapshot goes, but they do not.
    let (dir, vault) = vault();
    take(&vault, 1, &[1], &[]).expect("taken");
    vault.keep_first_pages(id(1), &key(1), &PAGES).expect("kept");
    vault.shared.faults.arm(1, true);
    assert!(vault.delete(id(1)).is_err());
    vault.shared.faults.disarm();
    assert!(dir.path().join("vault").join(first_name(id(1))).exists());
    let plan = vault.plan_prune(&keys(&[])).expect("read");
    assert_eq!(plan.drafts.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), [first_name(id(1))]);
    vault.prune(&plan, &keys(&[])).expect("pruned");
    assert!(!dir.path().join("vault").join(first_name(id(1))).exists());
}

#[test]
fn while_somebody_prunes_they_are_not_kept() {
    let (_dir, vault) = vault();
    take(&vault, 1, &[1], &[]).expect("taken");
    let lock = vault.shared.lock(FlockOperation::NonBlockingLockExclusive).expect("locked");
    assert!(matches!(vault.keep_first_pages(id(1), &key(1), &PAGES), Err(VaultError::Busy)));
    drop(lock);
    assert_eq!(first(&vault), []);
}
