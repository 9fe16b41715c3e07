//! Records survive, a failed write leaves the old one, and what is unreadable is not guessed.

use godwit_model::{Accelerator, Bytes, Name, SPEC_SCHEMA};

use super::*;

fn record() -> VmRecord {
    let spec = ResolvedSpec {
        schema: SPEC_SCHEMA,
        vm: VmId::new(uuid::Uuid::from_u128(5)),
        name: Name::new("web1").expect("name"),
        accelerator: Accelerator::Tcg,
        machine: "pc-q35-7.2".into(),
        cpu: "qemu64-v1".into(),
        vcpus: 1,
        memory: Bytes::mib(64),
        growth: None,
        kernel: None,
        initrd: None,
        cmdline: String::new(),
        disks: vec![],
        nics: vec![],
        cdroms: vec![],
        platform: godwit_model::Platform::default(),
        cloud_init: None,
        power_off: godwit_model::PowerOff::default(),
    };
    VmRecord::new(spec, Generation(1), 100_000, Holding::Owner)
}

#[test]
fn a_record_survives_reopening_and_is_gone_when_removed() {
    let dir = tempfile::tempdir().expect("dir");
    let journal = Journal::open(dir.path().into()).expect("opened");
    journal.write(&record()).expect("written");
    let newer = VmRecord { generation: Generation(2), ..record() };
    journal.write(&newer).expect("replaced");
    let reopened = Journal::open(dir.path().into()).expect("opened");
    assert_eq!(reopened.vms().expect("read").into_values().collect::<Vec<_>>(), [newer]);
    reopened.remove(record().spec.vm).expect("removed");
    reopened.remove(record().spec.vm).expect("removing again is no error");
    assert!(reopened.vms().expect("read").is_empty());
}

#[test]
fn a_write_that_fails_leaves_the_old_record() {
    let dir = tempfile::tempdir().expect("dir");
    let journal = Journal::open(dir.path().into()).expect("opened");
    journal.write(&record()).expect("written");
    // A directory where the new file would be written: the write fails for root, too.
    fs::create_dir(journal.vm_path(record().spec.vm).with_extension("new")).expect("dir");
    assert!(journal.write(&VmRecord { generation: Generation(9), ..record() }).is_err());
    let found: VmRecord = parse(Path::new("x"), &fs::read(journal.vm_path(record().spec.vm)).expect("read")).expect("whole");
    assert_eq!(found, record());
}

#[test]
fn what_a_crash_left_half_written_is_dropped_and_what_is_unreadable_is_refused() {
    let dir = tempfile::tempdir().expect("dir");
    let journal = Journal::open(dir.path().into()).expect("opened");
    fs::write(journal.vm_path(record().spec.vm).with_extension("new"), b"{ half").expect("left over");
    assert!(journal.vms().expect("read").is_empty());
    fs::write(journal.vm_path(record().spec.vm), b"{}").expect("damaged");
    assert!(matches!(journal.vms(), Err(JournalError::Record { .. })));
}

#[test]
fn an_epoch_is_remembered_with_whose_it_is_and_how_far_that_came() {
    let dir = tempfile::tempdir().expect("dir");
    let journal = Journal::open(dir.path().into()).expect("opened");
    assert_eq!(journal.epoch().expect("read"), Epoch(0));
    journal.write_epoch(Epoch(4), "four".into()).expect("written");
    let members = || vec!["h1".to_owned()];
    journal.write_mark(70, members()).expect("written");
    journal.write_mark(60, vec![]).expect("written");
    let again = Journal::open(dir.path().into()).expect("opened");
    assert_eq!(again.host().expect("read"), HostRecord { epoch: Epoch(4), epoch_id: "four".into(), mark: 70, members: members() });
    again.write_epoch(Epoch(5), "five".into()).expect("written");
    assert_eq!(again.host().expect("read"), HostRecord { epoch: Epoch(5), epoch_id: "five".into(), mark: 0, members: members() });
}

#[test]
fn what_was_given_away_or_declined_and_what_ran_are_kept_apart_and_never_fall() {
    let dir = tempfile::tempdir().expect("dir");
    let journal = Journal::open(dir.path().into()).expect("opened");
    let vm = record().spec.vm;
    journal.write_floor(vm, Generation(7)).expect("written");
    assert_eq!((journal.floor(vm).expect("read"), journal.ran(vm).expect("read")), (Generation(7), Generation(0)));
    journal.write_ran(vm, Generation(5)).expect("written");
    journal.write_ran(vm, Generation(4)).expect("nothing to do");
    journal.write_floor(vm, Generation(6)).expect("nothing to do");
    let again = Journal::open(dir.path().into()).expect("opened");
    assert_eq!((again.floor(vm).expect("read"), again.ran(vm).expect("read")), (Generation(7), Generation(5)));
    fs::write(journal.ran_path(vm), b"{").expect("damaged");
    assert!(journal.ran(vm).is_err(), "nothing is guessed");
}
