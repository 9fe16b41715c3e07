//! Packs are written anew with what is needed of them: everything reads as before, whatever fails and wherever it crashes.

use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::stored::Malformed;

/// What each page holds: of which kind, and how often it was written.
type State = BTreeMap<u32, (u32, u8)>;

/// Pages of one kind are differences to each other.
fn page((kind, times): (u32, u8)) -> Page {
    let pattern = blake3::hash(&kind.to_be_bytes());
    let mut page: Page = std::array::from_fn(|at| pattern.as_bytes()[at % 32] | 1);
    page[7] = times;
    page
}

fn ram() -> Vec<Space> {
    vec![Space { kind: SpaceKind::Ram, name: "pc.ram".into(), pages: 2_000 }]
}

/// Takes a snapshot, whose pages may be differences to what the last of `before` has, or be in packs of any of them.
fn keep(vault: &Vault, number: u8, state: &State, before: &[u8]) -> Totals {
    let draft = vault.begin(id(number)).expect("begun");
    let mut known = vault.known(&listed(before), 100_000).expect("known");
    let since = before.last().map(|last| vault.earlier(id(*last), &key(*last), &mut known).expect("opened").expect("few packs"));
    let keys = Keys { snapshot: key(number), team: team(), pack: PackKey::new([number; 32]) };
    let mut writer = draft.writer(&keys, ram(), known, NO_LIMIT).expect("begun");
    let mut since = since;
    for (at, what) in state {
        match &mut since {
            Some(since) => writer.page_since(0, *at, &page(*what), (since, 0)).expect("taken"),
            None => writer.page(0, *at, &page(*what)).expect("taken"),
        };
    }
    let (_, _, totals) = writer.finish(&Parts::default()).expect("finished");
    draft.commit(&totals).expect("committed");
    totals
}

fn check_contents(contents: &mut Contents, state: &State) {
    for at in 0..2_000 {
        let wanted = state.get(&at).map(|what| page(*what));
        assert!(contents.page(0, at).expect("read") == wanted.as_ref(), "page {at}");
    }
}

/// Everything that is there reads as it was taken, and nothing is wrong with it.
fn check(vault: &Vault, states: &BTreeMap<u8, State>) {
    for (number, state) in states {
        check_contents(&mut vault.snapshot(id(*number), &key(*number)).expect("opened"), state);
    }
    let numbers: Vec<u8> = states.keys().copied().collect();
    let wrong = vault.verify(&listed(&numbers), &team()).expect("read");
    assert!(wrong.is_empty(), "{wrong:?}");
}

fn pruned(vault: &Vault, states: &BTreeMap<u8, State>) -> PrunePlan {
    let keys = keys(&states.keys().copied().collect::<Vec<_>>());
    let plan = vault.plan_prune(&keys).expect("a plan");
    vault.prune(&plan, &keys).expect("pruned");
    plan
}

fn pack(number: u8) -> PackId {
    PackId::new(id(number).uuid())
}

/// A first snapshot of 600 pages; a second that has written a little to 300 of them, has 20 as they were, and 400 of its own; and a third that has ten of the first two each. The
/// second was deleted, and the first.
fn partly_needed() -> (tempfile::TempDir, Vault, BTreeMap<u8, State>) {
    let (dir, vault) = vault();
    let first: State = (0..600).map(|at| (at, (at, 0))).collect();
    keep(&vault, 1, &first, &[]);
    let mut second: State = (0..300).map(|at| (at, (at, 1))).collect();
    second.extend((300..320).map(|at| (at, (at, 0))));
    second.extend((1_000..1_400).map(|at| (at, (at, 0))));
    let totals = keep(&vault, 2, &second, &[1]);
    assert_eq!((totals.differences, totals.known, totals.new), (300, 20, 700));
    let third: State = [10..20, 310..320, 1_100..1_110].into_iter().flatten().map(|at| (at, second[&at])).collect();
    assert_eq!(keep(&vault, 3, &third, &[1, 2]).new, 0);
    vault.delete(id(1)).expect("deleted");
    (dir, vault, [(2, second), (3, third)].into())
}

#[test]
fn a_pack_of_which_much_is_not_needed_is_written_anew_again_and_again() {
    let (_dir, vault, mut states) = partly_needed();
    let before = vault.usage().expect("usage");
    let mut reader = vault.snapshot(id(2), &key(2)).expect("opened");
    let plan = pruned(&vault, &states);
    // Bases of differences are needed, too.
    let [Rewrite { pack: which, bytes, kept, gone }] = plan.rewrites[..] else { panic!("one: {plan:?}") };
    assert_eq!((which, kept, gone), (pack(1), 320, 280));
    assert_eq!(plan.bytes(), Bytes(bytes.0 * 280 / 600));
    assert_eq!(plan, PrunePlan { rewrites: plan.rewrites.clone(), ..PrunePlan::default() });
    let after = vault.usage().expect("usage");
    assert_eq!((after.packs, after.snapshots), (before.packs, before.snapshots));
    assert!(after.bytes < before.bytes, "{before:?} {after:?}");
    check(&vault, &states);
    // Whoever has the old file open goes on with that.
    check_contents(&mut reader, &states[&2]);
    assert_eq!(pruned(&vault, &states), PrunePlan::default());
    // Now little is needed of either.
    vault.delete(id(2)).expect("deleted");
    states.remove(&2);
    let plan = pruned(&vault, &states);
    let told: Vec<_> = plan.rewrites.iter().map(|rewrite| (rewrite.pack, rewrite.kept, rewrite.gone)).collect();
    assert_eq!(told, [(pack(1), 20, 300), (pack(2), 20, 680)]);
    check(&vault, &states);
    // A new snapshot makes use of what is left, and of nothing else.
    let fourth: State = (0..400).map(|at| (at, (at, u8::from(at < 20)))).collect();
    let totals = keep(&vault, 4, &fourth, &[3]);
    assert_eq!((totals.known, totals.new), (20, 380));
    states.insert(4, fourth);
    check(&vault, &states);
    for gone in [3, 4] {
        vault.delete(id(gone)).expect("deleted");
        states.remove(&gone);
        pruned(&vault, &states);
        check(&vault, &states);
    }
    assert_eq!(vault.usage().expect("usage"), VaultUsage::default());
}

#[test]
fn a_pack_of_which_little_is_not_needed_is_left_as_it_is() {
    // Of how many pages how many go, and whether it is written anew.
    for (pages, gone, anew) in [(400, 255, false), (400, 256, true), (1_100, 274, false), (1_100, 275, true)] {
        let (_dir, vault) = vault();
        let all: State = (0..pages).map(|at| (at, (at, 0))).collect();
        keep(&vault, 1, &all, &[]);
        let states: BTreeMap<u8, State> = [(2, all.range(gone..).map(|(at, what)| (*at, *what)).collect())].into();
        keep(&vault, 2, &states[&2], &[1]);
        vault.delete(id(1)).expect("deleted");
        let told: Vec<_> = pruned(&vault, &states).rewrites.iter().map(|rewrite| (rewrite.kept, rewrite.gone)).collect();
        assert_eq!(told, if anew { vec![(pages - gone, gone)] } else { vec![] });
        check(&vault, &states);
    }
}

fn copied(from: &tempfile::TempDir) -> (tempfile::TempDir, Vault) {
    let to = tempfile::tempdir().expect("a directory");
    let place = |dir: &tempfile::TempDir| -> PathBuf { dir.path().join("vault") };
    fs::create_dir(place(&to)).expect("made");
    for entry in fs::read_dir(place(from)).expect("read") {
        let entry = entry.expect("an entry");
        fs::copy(entry.path(), place(&to).join(entry.file_name())).expect("copied");
    }
    let vault = Vault::open(&place(&to)).expect("a vault");
    (to, vault)
}

fn names(dir: &tempfile::TempDir) -> BTreeSet<String> {
    let entries = fs::read_dir(dir.path().join("vault")).expect("read");
    entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("a name")).collect()
}

#[test]
fn everything_reads_as_before_whatever_fails_and_wherever_it_crashes() {
    let (from, vault, mut states) = partly_needed();
    // Two packs are written anew, one goes.
    vault.delete(id(2)).expect("deleted");
    states.remove(&2);
    keep(&vault, 5, &(0..3).map(|at| (at, (at + 5_000, 0))).collect(), &[]);
    vault.delete(id(5)).expect("deleted");
    let keys = keys(&[3]);
    let mut steps = vec![];
    for crash in [false, true] {
        for step in 0.. {
            let (dir, vault) = copied(&from);
            let plan = vault.plan_prune(&keys).expect("a plan");
            assert_eq!((plan.rewrites.len(), plan.packs.len()), (2, 1));
            vault.shared.faults.arm(step, crash);
            let done = vault.prune(&plan, &keys);
            vault.shared.faults.disarm();
            let met = vault.shared.faults.met.lock().expect("not poisoned").clone();
            drop(vault);
            let vault = Vault::open(&dir.path().join("vault")).expect("a vault");
            check(&vault, &states);
            let drafts = names(&dir).iter().filter(|name| name.ends_with(".draft")).count();
            assert!(drafts <= usize::from(crash), "step {step}: what failed leaves none");
            if step >= met.len() {
                done.expect("nothing failed");
                steps = met;
                break;
            }
            assert!(matches!(done, Err(VaultError::Io { .. })), "step {step}: {done:?}");
            pruned(&vault, &states);
            check(&vault, &states);
            assert_eq!(vault.plan_prune(&keys).expect("a plan"), PrunePlan::default(), "step {step}");
            assert_eq!(names(&dir).len(), 1 + 1 + 2, "step {step}: lock, snapshot, two packs");
        }
    }
    use Step as S;
    let anew = [S::Create, S::Write, S::Rename, S::SyncDirectory];
    assert_eq!(steps, [&[S::Remove, S::SyncDirectory][..], &anew, &anew].concat());
}

#[test]
fn nothing_is_done_while_something_that_is_needed_cannot_be_read() {
    let (dir, vault, states) = partly_needed();
    let keys = keys(&states.keys().copied().collect::<Vec<_>>());
    let plan = vault.plan_prune(&keys).expect("a plan");
    let file = dir.path().join("vault").join(pack_name(pack(1)));
    let whole = fs::read(&file).expect("read");
    // A chunk: that is found when it is copied.
    let mut damaged = whole.clone();
    damaged[100] ^= 1;
    fs::write(&file, &damaged).expect("written");
    let before = names(&dir);
    let refused = vault.prune(&plan, &keys);
    assert!(matches!(&refused, Err(VaultError::File { name, .. }) if *name == pack_name(pack(1))), "{refused:?}");
    assert_eq!(names(&dir), before);
    assert!(fs::read(&file).expect("read") == damaged);
    // Its end, and all of it.
    fs::write(&file, &whole[..whole.len() - 1]).expect("written");
    assert!(matches!(vault.plan_prune(&keys), Err(VaultError::File { .. })));
    fs::remove_file(&file).expect("removed");
    assert!(matches!(vault.plan_prune(&keys), Err(VaultError::Missing { .. })));
    // A pack in which is not what a snapshot refers to.
    fs::write(&file, &whole).expect("written");
    let from = PackReader::open(File::open(&file).expect("opened"), &PackKey::new([1; 32])).expect("open");
    let keep = from.kept().only(|page| page < 310);
    fs::write(&file, from.rewrite(&keep, &PackKey::new([1; 32]), Vec::new()).expect("written")).expect("written");
    let refused = vault.plan_prune(&keys);
    let place = |source: &FileError| matches!(source, FileError::Malformed(Malformed::Place));
    assert!(matches!(&refused, Err(VaultError::File { source, .. }) if place(source)), "{refused:?}");
    fs::write(&file, &whole).expect("written");
    assert_eq!(vault.plan_prune(&keys).expect("a plan"), plan);
    vault.prune(&plan, &keys).expect("pruned");
    check(&vault, &states);
}

#[test]
fn a_pack_that_is_in_a_list_stays_though_no_leaf_refers_to_it() {
    let (_dir, vault) = vault();
    let first: State = (0..300).map(|at| (at, (at, 0))).collect();
    keep(&vault, 1, &first, &[]);
    let draft = vault.begin(id(2)).expect("begun");
    let keys = Keys { snapshot: key(2), team: team(), pack: PackKey::new([2; 32]) };
    let mut writer = draft.writer(&keys, ram(), vault.known(&listed(&[1]), 1000).expect("known"), NO_LIMIT).expect("begun");
    writer.page(0, 0, &page((0, 0))).expect("taken");
    // It came twice: what it held first is in the list.
    writer.page(0, 0, &page((9_999, 0))).expect("taken");
    let (_, _, totals) = writer.finish(&Parts::default()).expect("finished");
    draft.commit(&totals).expect("committed");
    vault.delete(id(1)).expect("deleted");
    let states = [(2, [(0, (9_999, 0))].into())].into();
    let told: Vec<_> = pruned(&vault, &states).rewrites.iter().map(|rewrite| (rewrite.kept, rewrite.gone)).collect();
    assert_eq!(told, [(1, 299)]);
    check(&vault, &states);
}

/// Of each pack that is there, how many pages it has, and how many of these somebody needs.
fn used(vault: &Vault, states: &BTreeMap<u8, State>) -> BTreeMap<PackId, (u32, u32)> {
    let (mut has, mut needed) = (BTreeMap::new(), BTreeSet::new());
    for number in states.keys() {
        let mut contents = vault.snapshot(id(*number), &key(*number)).expect("opened");
        let ids: Vec<PackId> = contents.snapshot().packs().iter().map(|(id, ..)| *id).collect();
        for at in 0..2_000 {
            let Some(at) = contents.located_at(0, at).expect("read") else { continue };
            needed.insert((ids[usize::from(at.pack)], at.page));
            needed.extend(contents.base_of(at).expect("kept").map(|base| (ids[usize::from(base.pack)], base.page)));
        }
        has.extend((0..).zip(&ids).map(|(at, id)| (*id, contents.pack(at).expect("there").kept().count())));
    }
    let count = |pack: PackId| needed.iter().filter(|(of, _)| *of == pack).count() as u32;
    has.into_iter().map(|(pack, pages)| (pack, (pages, count(pack)))).collect()
}

#[derive(Clone, Debug)]
enum Op {
    /// Takes a snapshot, with these pages forgotten, written a little, or written anew since the last.
    Take(Vec<(u32, u32, u8)>),
    Delete(prop::sample::Index),
    Prune,
}

fn op() -> impl Strategy<Value = Op> {
    let change = (0..1_200_u32, 50..700_u32, 0..4_u8);
    prop_oneof![
        4 => prop::collection::vec(change, 1..5).prop_map(Op::Take),
        3 => any::<prop::sample::Index>().prop_map(Op::Delete),
        2 => Just(Op::Prune),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn prop_what_is_left_reads_as_it_was_and_little_is_kept_that_nobody_needs(ops in prop::collection::vec(op(), 3..12)) {
        let (_dir, vault) = vault();
        let (mut states, mut last, mut fresh) = (BTreeMap::<u8, State>::new(), State::new(), 0);
        for (number, op) in (1..).zip(ops.into_iter().chain([Op::Prune])) {
            match op {
                Op::Take(changes) => {
                    for (first, pages, how) in changes {
                        for at in first..first + pages {
                            let now = last.remove(&at);
                            fresh += 1;
                            last.extend(match (how, now) {
                                (0, _) => None,
                                (1, Some((kind, times))) => Some((at, (kind, times.wrapping_add(1)))),
                                (2, _) => Some((at, (at / 2, 0))),
                                _ => Some((at, (10_000 + fresh, 0))),
                            });
                        }
                    }
                    keep(&vault, number, &last, &states.keys().copied().collect::<Vec<_>>());
                    states.insert(number, last.clone());
                }
                Op::Delete(which) if !states.is_empty() => {
                    let gone = *states.keys().nth(which.index(states.len())).expect("one of them");
                    vault.delete(id(gone)).expect("deleted");
                    states.remove(&gone);
                }
                Op::Delete(_) => {}
                Op::Prune => {
                    pruned(&vault, &states);
                    for (pack, (has, needed)) in used(&vault, &states) {
                        let unneeded = has - needed;
                        prop_assert!(unneeded < 256 || unneeded * 4 < has, "{pack}: {needed} of {has}");
                    }
                    check(&vault, &states);
                }
            }
        }
        prop_assert_eq!(vault.plan_prune(&keys(&states.keys().copied().collect::<Vec<_>>())).expect("a plan"), PrunePlan::default());
    }
}
