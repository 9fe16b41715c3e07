//! Stays are kept, replaced, evicted and removed; failing and crashing at each step leaves whole stays and nothing else.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::time::{Duration, SystemTime};

use godwit_model::Generation;
use uuid::Uuid;

use super::*;
use crate::{Block, StayReader};

/// Lets the steps of a shelf fail: all from a given one on, as in a crash, or that one only.
#[derive(Debug, Default)]
pub(super) struct Faults(Mutex<Plan>);

#[derive(Debug, Default)]
struct Plan {
    met: Vec<Step>,
    fail_at: Option<usize>,
    crash: bool,
}

impl Faults {
    pub(super) fn meet(&self, step: Step) -> io::Result<()> {
        let mut plan = self.0.lock().expect("not poisoned");
        let at = plan.met.len();
        plan.met.push(step);
        match plan.fail_at {
            Some(fail) if at == fail || plan.crash && at > fail => Err(io::Error::other(format!("told to fail at {step:?}"))),
            _ => Ok(()),
        }
    }

    fn plan(&self, fail_at: Option<usize>, crash: bool) {
        *self.0.lock().expect("not poisoned") = Plan { met: Vec::new(), fail_at, crash };
    }

    fn met(&self) -> Vec<Step> {
        self.0.lock().expect("not poisoned").met.clone()
    }
}

fn key() -> StayKey {
    StayKey::new([7; 32])
}

fn vm(number: u128) -> VmId {
    VmId::new(Uuid::from_u128(number))
}

const LIMITS: Limits = Limits { stays: Bytes::mib(1), reserve: Bytes(0) };

fn identity(vm: VmId, generation: u64) -> Identity {
    Identity { vm, generation: Generation(generation), blocks: vec![Block { id: "pc.ram".into(), pages: 1000 }] }
}

/// Writes a stay with so many pages that do not compress.
fn write(draft: &Draft, generation: u64, pages: u32) -> io::Result<()> {
    let mut writer = draft.writer(&key(), &identity(draft.vm, generation))?;
    let mut noise = blake3::Hasher::new().update(&generation.to_be_bytes()).finalize_xof();
    for page in 0..pages {
        let mut content = [0; 4096];
        noise.fill(&mut content);
        writer.page(0, page, &content)?;
    }
    writer.finish().map(drop)
}

fn put(shelf: &Shelf, vm: VmId, generation: u64, pages: u32) -> Result<(), ShelfError> {
    let draft = shelf.begin(vm)?;
    write(&draft, generation, pages).map_err(failed("written"))?;
    draft.commit()
}

/// The generation of the VM's stay, all of which is read.
fn generation(shelf: &Shelf, vm: VmId) -> Option<u64> {
    let file = shelf.find(vm).expect("searched")?;
    let mut reader = StayReader::open(file, &key()).expect("what is found is whole");
    assert_eq!(reader.identity().vm, vm);
    while reader.next_chunk().expect("what is found is whole").is_some() {}
    Some(reader.identity().generation.0)
}

fn names(dir: &Path) -> BTreeSet<String> {
    fs::read_dir(dir).expect("read").map(|entry| entry.expect("read").file_name().into_string().expect("text")).collect()
}

/// Makes a stay older than all.
fn age(dir: &Path, vm: VmId, seconds: u64) {
    let file = File::options().write(true).open(dir.join(stay_name(vm))).expect("opened");
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).expect("set");
}

#[test]
fn a_stay_is_kept_replaced_and_removed() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("stays");
    let shelf = Shelf::open(&path, LIMITS).expect("opened");
    assert_eq!(generation(&shelf, vm(1)), None);
    put(&shelf, vm(1), 1, 3).expect("kept");
    put(&shelf, vm(2), 1, 3).expect("kept");
    put(&shelf, vm(1), 2, 5).expect("replaced");
    assert_eq!((generation(&shelf, vm(1)), generation(&shelf, vm(2))), (Some(2), Some(1)));
    let usage = shelf.usage().expect("known");
    assert!(usage.stays == 2 && usage.bytes.0 > 8 * 4096 && usage.bytes.0 < 9 * 4096, "{usage:?}");
    drop(shelf);
    let shelf = Shelf::open(&path, LIMITS).expect("opened");
    assert_eq!(shelf.usage().expect("known"), usage);
    shelf.remove(vm(1)).expect("removed");
    shelf.remove(vm(1)).expect("removing again is no error");
    assert_eq!((generation(&shelf, vm(1)), generation(&shelf, vm(2))), (None, Some(1)));
}

#[test]
fn nobody_else_can_read_it() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("stays");
    fs::create_dir(&path).expect("made");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("set");
    let shelf = Shelf::open(&path, LIMITS).expect("opened");
    put(&shelf, vm(1), 1, 1).expect("kept");
    let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o7777;
    assert_eq!((mode(&path), mode(&path.join(stay_name(vm(1))))), (0o700, 0o600));
}

#[test]
fn a_draft_that_is_dropped_or_left_by_a_crash_is_gone() {
    let dir = tempfile::tempdir().expect("dir");
    let shelf = Shelf::open(dir.path(), LIMITS).expect("opened");
    put(&shelf, vm(1), 1, 3).expect("kept");
    let draft = shelf.begin(vm(1)).expect("begun");
    assert_eq!(names(dir.path()).len(), 2);
    drop(draft);
    assert_eq!(names(dir.path()).len(), 1);
    fs::write(dir.path().join(draft_name(vm(1), 77)), b"half").expect("left over");
    drop(shelf);
    let shelf = Shelf::open(dir.path(), LIMITS).expect("opened");
    assert_eq!(names(dir.path()), [stay_name(vm(1))].into());
    assert_eq!(generation(&shelf, vm(1)), Some(1));
}

#[test]
fn what_others_put_there_is_left_alone() {
    let dir = tempfile::tempdir().expect("dir");
    let foreign = ["lost+found", "x.stay", "x.1.draft", "README", "11111111111111111111111111111111.stay"];
    for name in foreign {
        fs::write(dir.path().join(name), vec![0; 3 << 20]).expect("written");
    }
    fs::write(dir.path().join("secret"), b"secret").expect("written");
    symlink(dir.path().join("secret"), dir.path().join(stay_name(vm(3)))).expect("linked");
    fs::create_dir(dir.path().join(stay_name(vm(4)))).expect("made");
    let shelf = Shelf::open(dir.path(), LIMITS).expect("opened");
    put(&shelf, vm(1), 1, 3).expect("kept");
    assert_eq!(shelf.usage().expect("known").stays, 1);
    assert!(shelf.find(vm(3)).is_err(), "a link is not followed");
    assert!(shelf.find(vm(4)).expect("searched").is_none());
    assert!(foreign.iter().all(|name| names(dir.path()).contains(*name)));
}

#[test]
fn the_oldest_go_beyond_the_limit() {
    let dir = tempfile::tempdir().expect("dir");
    let shelf = Shelf::open(dir.path(), LIMITS).expect("opened");
    // About 401 KiB each: two fit.
    for (number, seconds) in [(1, 2000), (2, 1000)] {
        put(&shelf, vm(number), 1, 100).expect("kept");
        age(dir.path(), vm(number), seconds);
    }
    put(&shelf, vm(3), 1, 100).expect("kept");
    assert_eq!([1, 2, 3].map(|number| generation(&shelf, vm(number))), [Some(1), None, Some(1)]);
    put(&shelf, vm(1), 2, 255).expect("kept");
    assert_eq!([1, 2, 3].map(|number| generation(&shelf, vm(number))), [Some(2), None, None], "the newest is spared");
    drop(shelf);
    let shelf = Shelf::open(dir.path(), Limits { stays: Bytes(0), ..LIMITS }).expect("opened");
    assert_eq!(shelf.usage().expect("known"), Usage::default(), "a limit that fell is kept at once");
}

#[test]
fn a_stay_longer_than_the_limit_is_not_kept() {
    let dir = tempfile::tempdir().expect("dir");
    let shelf = Shelf::open(dir.path(), LIMITS).expect("opened");
    put(&shelf, vm(1), 1, 3).expect("kept");
    let draft = shelf.begin(vm(1)).expect("begun");
    assert_eq!(write(&draft, 2, 256).expect_err("too long").kind(), io::ErrorKind::FileTooLarge);
    assert!(draft.file().metadata().expect("there").len() <= LIMITS.stays.0);
    // A process that was given the file need not have kept the limit.
    draft.file().set_len(LIMITS.stays.0 + 1).expect("grown");
    let refused = draft.commit();
    assert!(matches!(refused, Err(ShelfError::TooLong { limit, .. }) if limit == LIMITS.stays), "{refused:?}");
    assert_eq!((generation(&shelf, vm(1)), names(dir.path()).len()), (Some(1), 1));
}

#[test]
fn what_must_stay_free_is_not_used() {
    let dir = tempfile::tempdir().expect("dir");
    let free = Shelf::open(dir.path(), LIMITS).expect("opened").begin(vm(1)).map(|draft| draft.limit());
    assert_eq!(free.expect("begun"), LIMITS.stays);
    let shelf = Shelf::open(dir.path(), Limits { reserve: Bytes(u64::MAX), ..LIMITS }).expect("opened");
    assert!(matches!(shelf.begin(vm(1)), Err(ShelfError::NoRoom { .. })));
    assert!(names(dir.path()).is_empty());
    drop(shelf);
    let shelf = Shelf::open(dir.path(), Limits { stays: Bytes(u64::MAX), reserve: Bytes::GIB }).expect("opened");
    assert!(shelf.begin(vm(1)).expect("begun").limit().0 < u64::MAX / 2, "the disk is the limit");
}

#[test]
fn a_shelf_has_one_process() {
    let dir = tempfile::tempdir().expect("dir");
    let shelf = Shelf::open(dir.path(), LIMITS).expect("opened");
    assert!(matches!(Shelf::open(dir.path(), LIMITS), Err(ShelfError::Busy)));
    let draft = shelf.begin(vm(1)).expect("begun");
    drop(shelf);
    assert!(matches!(Shelf::open(dir.path(), LIMITS), Err(ShelfError::Busy)), "a draft holds it, too");
    drop(draft);
    Shelf::open(dir.path(), LIMITS).expect("opened");
}

#[test]
fn of_two_drafts_of_one_vm_the_later_is_kept() {
    let dir = tempfile::tempdir().expect("dir");
    let shelf = Shelf::open(dir.path(), LIMITS).expect("opened");
    for earlier_first in [true, false] {
        let (earlier, later) = (shelf.begin(vm(1)).expect("begun"), shelf.begin(vm(1)).expect("begun"));
        write(&earlier, 1, 3).expect("written");
        write(&later, 2, 3).expect("written");
        let (refused, kept) = if earlier_first {
            (earlier.commit(), later.commit())
        } else {
            let kept = later.commit();
            (earlier.commit(), kept)
        };
        assert!(matches!(refused, Err(ShelfError::Superseded)), "{refused:?}");
        kept.expect("kept");
        assert_eq!((generation(&shelf, vm(1)), names(dir.path()).len()), (Some(2), 1));
        shelf.remove(vm(1)).expect("removed");
    }
}

#[test]
fn a_draft_of_a_removed_vm_is_not_kept() {
    let dir = tempfile::tempdir().expect("dir");
    let shelf = Shelf::open(dir.path(), LIMITS).expect("opened");
    let draft = shelf.begin(vm(1)).expect("begun");
    write(&draft, 1, 3).expect("written");
    shelf.remove(vm(1)).expect("removed");
    assert!(matches!(draft.commit(), Err(ShelfError::Superseded)));
    assert!(names(dir.path()).is_empty());
}

#[test]
fn writers_at_the_same_time_leave_one_whole_stay_of_each_vm() {
    let dir = tempfile::tempdir().expect("dir");
    let shelf = Shelf::open(dir.path(), LIMITS).expect("opened");
    std::thread::scope(|scope| {
        for writer in 0..8_u64 {
            let shelf = &shelf;
            scope.spawn(move || {
                for turn in 0..10 {
                    match put(shelf, vm(u128::from(writer % 3)), writer * 100 + turn, 3) {
                        Ok(()) | Err(ShelfError::Superseded) => {}
                        Err(error) => panic!("{error:?}"),
                    }
                }
            });
        }
    });
    assert_eq!(names(dir.path()).len(), 3);
    assert!((0..3).all(|number| generation(&shelf, vm(number)).is_some()));
}

#[test]
fn what_is_renamed_is_synced_before_and_the_name_after() {
    let dir = tempfile::tempdir().expect("dir");
    let shelf = Shelf::open(dir.path(), LIMITS).expect("opened");
    put(&shelf, vm(1), 1, 200).expect("kept");
    shelf.shared.faults.plan(None, false);
    put(&shelf, vm(2), 1, 200).expect("kept");
    let steps = [Step::Create, Step::SyncFile, Step::Rename, Step::SyncDirectory, Step::Remove, Step::SyncDirectory];
    assert_eq!(shelf.shared.faults.met(), steps);
}

#[test]
fn failing_or_crashing_at_any_step_leaves_whole_stays_and_nothing_else() {
    for crash in [false, true] {
        for at in 0.. {
            let dir = tempfile::tempdir().expect("dir");
            let mut shelf = Shelf::open(dir.path(), LIMITS).expect("opened");
            for number in [1, 2, 3] {
                put(&shelf, vm(number), 1, 80).expect("kept");
                age(dir.path(), vm(number), number as u64);
            }
            let before = shelf.begin(vm(1)).expect("begun");
            shelf.shared.faults.plan(Some(at), crash);
            let outcome = put(&shelf, vm(1), 2, 150);
            drop(before);
            let steps = shelf.shared.faults.met();
            shelf.shared.faults.plan(None, false);
            if outcome.is_ok() {
                assert_eq!((at, steps.len()), (7, 7), "each of {steps:?} was tried");
                break;
            }
            if crash {
                drop(shelf);
                shelf = Shelf::open(dir.path(), LIMITS).expect("opened");
                let kept = shelf.usage().expect("known");
                assert!(kept.bytes <= LIMITS.stays, "{kept:?}");
            }
            let renamed = steps.iter().take(at).any(|step| *step == Step::Rename);
            assert_eq!(generation(&shelf, vm(1)), Some(if renamed { 2 } else { 1 }), "step {at}");
            assert!(generation(&shelf, vm(3)).is_some(), "step {at}");
            assert!(names(dir.path()).iter().all(|name| name.ends_with(".stay")), "step {at}: {:?}", names(dir.path()));
            put(&shelf, vm(1), 3, 150).expect("kept");
            assert_eq!(generation(&shelf, vm(1)), Some(3), "step {at}");
            assert!(shelf.usage().expect("known").bytes <= LIMITS.stays);
        }
    }
}
