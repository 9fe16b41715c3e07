//! What is written as files a QEMU takes that knows nothing of us, and what is read from files runs as what was taken.

use std::io::{Read, Seek, SeekFrom, Write};

use super::super::load::{LoadError, load_disk, load_memory};
use super::super::unload::{unload_disk, unload_memory};
use super::*;

/// The machine of all VMs here.
const MACHINE: &str = "pc-q35-7.2";

fn opened(vault: &Vault, number: u8) -> Contents {
    vault.snapshot(id(number), &snapshot_key(number)).expect("opened")
}

/// Files of a snapshot: its memory, and its disk as qcow2 if it has one.
fn unloaded(dir: &Path, vault: &Vault, number: u8, has_disk: bool) {
    let create =
        |name: &str| fs::File::options().read(true).write(true).create(true).truncate(true).open(dir.join(name)).expect("a file");
    let memory = create("memory.qemu");
    let length = unload_memory(&mut opened(vault, number), &memory).expect("written");
    assert_eq!(memory.metadata().expect("facts").len(), length);
    if has_disk {
        let raw = create("disk0.raw");
        assert_eq!(unload_disk(&mut opened(vault, number), "disk0", &raw).expect("written"), u64::from(DISK));
        run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "disk0.raw", "disk0.qcow2"], dir);
        run("qemu-img", &["check", "-q", "disk0.qcow2"], dir);
    }
}

fn run(program: &str, arguments: &[&str], dir: &Path) {
    let status = Command::new(program).args(arguments).current_dir(dir).status().expect("it runs");
    assert!(status.success(), "{program} {arguments:?}");
}

/// A snapshot out of files.
fn loaded(dir: &Path, vault: &Vault, number: u8, has_disk: bool) -> Result<Totals, LoadError> {
    let draft = vault.begin(id(number)).expect("begun");
    let keys = Keys { snapshot: snapshot_key(number), team: TeamKey::new([9; 32]), pack: PackKey::draw().expect("random bytes") };
    let known = vault.known(&[(id(1), snapshot_key(1))], usize::MAX).expect("the vault is read");
    let mut blocks = 0;
    let memory = fs::File::open(dir.join("memory.qemu")).expect("the file");
    let (mut writer, parts) = load_memory(memory, MACHINE, |mut spaces: Vec<Space>| {
        blocks = spaces.len();
        if has_disk {
            spaces.push(Space { kind: SpaceKind::Disk, name: "disk0".into(), pages: DISK / 4096 });
        }
        draft.writer(&keys, spaces, known, Bytes(u64::MAX))
    })?;
    if has_disk {
        let raw = fs::File::open(dir.join("disk0.raw")).expect("the file");
        load_disk(&raw, u16::try_from(blocks).expect("few"), &mut writer)?;
    }
    let (_, _, totals) = writer.finish(&parts).expect("finished");
    draft.commit(&totals).expect("committed");
    Ok(totals)
}

/// Starts a QEMU as anybody would, on the files.
async fn by_hand(dir: &Path, name: &str, binary: &Path, disk: &[String]) -> Vm {
    let memory = format!("exec:cat {}", dir.join("memory.qemu").display());
    let more: Vec<&str> = disk.iter().map(String::as_str).chain(["-incoming", &memory]).collect();
    let vm = Vm::start(dir, name, binary, &more).await;
    let loading = async {
        while vm.qmp.query_status().await.expect("status").status == RunStatus::InMigrate {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LIMIT, loading).await.expect("it is loaded");
    // One that stood still when it was taken waits to be told.
    vm.qmp.cont().await.expect("cont");
    vm
}

#[tokio::test]
async fn qemu_alone_runs_what_was_exported_and_the_vault_what_was_imported() {
    let qemus = qemus();
    for (turn, binary) in qemus.iter().enumerate() {
        let dir = tempfile::tempdir().expect("a directory");
        let vault = Vault::open(&dir.path().join("vault")).expect("a vault");
        let source = Vm::start(dir.path(), "source", binary, &[]).await;
        source.hear("checked its memory", |said| said.sweeps > 0).await;
        let first = snapshot(&vault, &source, 1, &[]).await;
        let before = source.said().expect("it was heard");
        drop(source);
        unloaded(dir.path(), &vault, 1, false);
        let other = &qemus[(turn + 1) % qemus.len()];
        for (name, binary) in [("same", binary), ("other", other)] {
            let vm = by_hand(dir.path(), name, binary, &[]).await;
            let said = vm.hear("went on out of the file", |said| said.written > before.written).await;
            let later = vm.hear("checked all of its memory", |later| later.sweeps > said.sweeps + 1).await;
            assert_eq!((said.errors, later.errors), (0, 0), "{}", fs::read_to_string(&vm.console).unwrap_or_default());
        }
        // What comes back is what went out.
        let again = loaded(dir.path(), &vault, 2, false).expect("read");
        assert_eq!((again.new, again.known), (0, first.new + first.known), "{first:?} {again:?}");
        assert_eq!(opened(&vault, 1).snapshot().parts().devices, opened(&vault, 2).snapshot().parts().devices);
        let (Resumed { vm, playing, .. }, _) = resume(dir.path(), &vault, 2, "imported", binary, &[]).await;
        playing.await.expect("no panic").expect("played");
        let said = vm.hear("went on out of the vault", |said| said.written > before.written).await;
        let later = vm.hear("checked all of its memory", |later| later.sweeps > said.sweeps + 1).await;
        assert_eq!((said.errors, later.errors), (0, 0), "{}", fs::read_to_string(&vm.console).unwrap_or_default());
    }
}

#[tokio::test]
async fn memory_and_disk_are_still_of_one_instant_as_files() {
    for binary in qemus() {
        let dir = tempfile::tempdir().expect("a directory");
        let vault = Vault::open(&dir.path().join("vault")).expect("a vault");
        let disk = dir.path().join("disk");
        fs::File::create(&disk).and_then(|file| file.set_len(u64::from(DISK))).expect("a disk");
        let arguments = with_disk(&disk);
        let source = Vm::start(dir.path(), "source", &binary, &arguments.iter().map(String::as_str).collect::<Vec<_>>()).await;
        source.hear("wrote to its disk", |said| said.disk_written > 2 * BLOCKS).await;
        snapshot_with_disk(dir.path(), &vault, &source, 1, None).await;
        drop(source);
        unloaded(dir.path(), &vault, 1, true);
        loaded(dir.path(), &vault, 2, true).expect("read");
        restore_disk(&mut opened(&vault, 2), &dir.path().join("restored"));
        assert!(fs::read(dir.path().join("restored")).expect("read") == fs::read(dir.path().join("disk0.raw")).expect("read"));
        let qcow2: Vec<String> = with_disk(&dir.path().join("disk0.qcow2"))
            .into_iter()
            .map(|word| word.replace("\"driver\":\"raw\"", "\"driver\":\"qcow2\""))
            .collect();
        let vm = by_hand(dir.path(), "hand", &binary, &qcow2).await;
        let said = vm.hear("wrote to its disk again", |said| said.disk_written > 0).await;
        let later = vm
            .hear("checked all of both", |later| {
                later.sweeps > said.sweeps + 1 && later.disk_checked > said.disk_checked + 2 * BLOCKS
            })
            .await;
        assert_eq!((later.errors, later.disk_errors), (0, 0), "{}", fs::read_to_string(&vm.console).unwrap_or_default());
    }
}

#[tokio::test]
async fn a_stream_that_is_cut_or_changed_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let vault = Vault::open(&dir.path().join("vault")).expect("a vault");
    let source = Vm::start(dir.path(), "source", &qemus()[0], &[]).await;
    source.hear("checked its memory", |said| said.sweeps > 0).await;
    snapshot(&vault, &source, 1, &[]).await;
    drop(source);
    unloaded(dir.path(), &vault, 1, false);
    let path = dir.path().join("memory.qemu");
    let length = fs::metadata(&path).expect("facts").len();
    let refused = |what: &str| {
        let refused = loaded(dir.path(), &vault, 2, false);
        assert!(refused.is_err(), "{what}");
        let names = fs::read_dir(dir.path().join("vault")).expect("the vault");
        let left = names.filter_map(Result::ok).filter(|entry| entry.file_name().to_string_lossy().ends_with(".draft")).count();
        assert_eq!((left, vault.snapshots().expect("read").len()), (0, 1), "{what}");
        refused.expect_err("refused")
    };
    let file = fs::File::options().read(true).write(true).open(&path).expect("the file");
    // From the end, so that each cut leaves less.
    for cut in [1, 2, 20, 40, 5_000, length / 2, length - 300, length - 9, length - 4, length] {
        let mut end = vec![0; usize::try_from(cut).expect("short")];
        (&file).seek(SeekFrom::Start(length - cut)).expect("there");
        (&file).read_exact(&mut end).expect("read");
        file.set_len(length - cut).expect("cut");
        refused(&format!("cut by {cut}"));
        (&file).seek(SeekFrom::End(0)).expect("there");
        (&file).write_all(&end).expect("put back");
    }
    for at in [0, 3, 7, 8, 12, 14] {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("read");
        file.write_all_at(&[byte[0] ^ 0x10], at).expect("flipped");
        refused(&format!("byte {at} is another"));
        file.write_all_at(&byte, at).expect("put back");
    }
    assert!(loaded(dir.path(), &vault, 2, false).is_ok(), "it is whole again");
    (&file).seek(SeekFrom::Start(0)).expect("there");
    let another = load_memory(&file, "pc-q35-10.0", |_| -> std::io::Result<godwit_vault::SnapshotWriter<fs::File, fs::File>> {
        panic!("it is of another machine")
    });
    assert!(matches!(another.map(|_| ()), Err(LoadError::Machine { .. })));
}
