//! Real QEMUs, of both versions: what one writes of a guest that goes on, another runs at once out of the vault.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use godwit_model::BytesPerSec;
use godwit_model::{Bytes, SnapshotId};
use godwit_qemu::Qmp;
use godwit_qemu::fleece::fleece_node;
use godwit_qemu::qmp::commands::MigrationParameters;
use godwit_qemu::qmp::views::{MigrationStatus, RunStatus};
use godwit_qemu::since::CHANGED;
use godwit_vault::{Contents, Keys, PackKey, Parts, SnapshotKey, Space, SpaceKind, TeamKey, Totals, Vault};
use serde_json::{Value, json};
use uuid::Uuid;

use super::changed::Changed;
use super::disk::{take_changes, take_disk};
use super::play::{PlayError, Played, play, play_on};
use super::restore::restore;
use super::take::take;

mod exported;
mod filled;
mod played;

/// Generous, since the machine may be busy; nothing waits this long when all is well.
const LIMIT: Duration = Duration::from_secs(90);

/// QEMU's binaries here: the one on PATH first.
fn qemus() -> Vec<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/local/bin:/usr/bin";
    let installed = path.split(':').map(|dir| Path::new(dir).join("qemu-system-x86_64")).find(|file| file.exists());
    let other =
        Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/qemu-other")).output().expect("scripts/qemu-other runs");
    let other = other.status.success().then(|| PathBuf::from(String::from_utf8_lossy(&other.stdout).trim()));
    std::iter::once(installed.expect("QEMU is installed: run scripts/setup")).chain(other).collect()
}

/// A file of the guest image.
fn guest_file(name: &str) -> PathBuf {
    let cache = std::env::var_os("GODWIT_CACHE").map_or_else(|| PathBuf::from("/var/cache/godwit"), PathBuf::from);
    let path = cache.join(name);
    assert!(path.exists(), "{path:?} is missing: run scripts/guest-image");
    path
}

/// A VM whose guest checks its memory; killed when dropped.
struct Vm {
    process: Child,
    qmp: Qmp,
    console: PathBuf,
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What a guest has said last.
#[derive(Clone, Copy, Debug)]
struct Said {
    checked: u64,
    written: u64,
    errors: u64,
    sweeps: u64,
    disk_written: u64,
    disk_checked: u64,
    disk_errors: u64,
}

/// A socket of a monitor, and the arguments for a QEMU that takes it over; see `godwit_qemu::Sockets::listen` for why it must not wait.
pub(crate) fn monitor(at: &Path) -> (UnixListener, [String; 4]) {
    let listener = UnixListener::bind(at).expect("a socket");
    listener.set_nonblocking(true).expect("a socket");
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).expect("a socket");
    let chardev = format!("socket,id=qmp,fd={},server=on,wait=off", listener.as_raw_fd());
    (listener, ["-chardev".into(), chardev, "-mon".into(), "chardev=qmp,mode=control".into()])
}

impl Vm {
    async fn start(dir: &Path, name: &str, binary: &Path, more: &[&str]) -> Self {
        let (console, socket) = (dir.join(format!("{name}.console")), dir.join(format!("{name}.qmp")));
        let disk = if more.contains(&"-blockdev") {
            "guest.touch_total=16M guest.check=8M guest.disk=4M guest.disk_dirty=2M"
        } else {
            "guest.touch_total=96M guest.check=max"
        };
        let words =
            format!("console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on guest.working_set=16M guest.dirty=8M {disk}");
        let (listener, monitor) = monitor(&socket);
        // It ends with the test, however that ends.
        let process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(binary)
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "256", "-cpu", "qemu64,-cx16"])
            .args(["-machine", "pc-q35-7.2,accel=tcg"])
            .arg("-kernel")
            .arg(guest_file("vmlinuz"))
            .arg("-initrd")
            .arg(guest_file("initramfs.cpio.gz"))
            .args(["-append", &words])
            .args(["-serial", &format!("file:{}", console.display())])
            .args(monitor)
            .args(more)
            .stdin(Stdio::null())
            .spawn()
            .expect("QEMU starts");
        drop(listener);
        let qmp = Qmp::connect(&socket, LIMIT).await.expect("QEMU answers");
        Self { process, qmp, console }
    }

    fn said(&self) -> Option<Said> {
        let text = fs::read_to_string(&self.console).unwrap_or_default();
        let line = text
            .lines()
            .rev()
            .find_map(|line| serde_json::from_str::<Value>(line).ok().filter(|line| line["event"] == "status"))?;
        let number = |key: &str| line[key].as_u64().unwrap_or(0);
        Some(Said {
            checked: number("pages_checked"),
            written: number("pages_written"),
            errors: number("page_errors"),
            sweeps: number("sweeps"),
            disk_written: number("disk_written"),
            disk_checked: number("disk_checked"),
            disk_errors: number("disk_errors"),
        })
    }

    /// Waits until the guest has said something that is `wanted`.
    async fn hear(&self, what: &str, wanted: impl Fn(&Said) -> bool) -> Said {
        let hearing = async {
            loop {
                match self.said() {
                    Some(said) if wanted(&said) => return said,
                    _ => tokio::time::sleep(Duration::from_millis(100)).await,
                }
            }
        };
        let text = || fs::read_to_string(&self.console).unwrap_or_default();
        tokio::time::timeout(LIMIT, hearing).await.unwrap_or_else(|_| panic!("the guest never {what}: {}", text()))
    }

    async fn capabilities(&self, wanted: &[(&str, bool)]) {
        self.qmp.set_migration_capabilities(wanted).await.expect("capabilities");
    }

    async fn status(&self) -> MigrationStatus {
        self.qmp.query_migrate().await.expect("query-migrate").status()
    }

    async fn wait_status(&self, wanted: &MigrationStatus) {
        let waiting = async {
            while self.status().await != *wanted {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LIMIT, waiting).await.unwrap_or_else(|_| panic!("never {wanted:?}"));
    }
}

fn snapshot_key(number: u8) -> SnapshotKey {
    SnapshotKey::new([number; 32])
}

fn id(number: u8) -> SnapshotId {
    SnapshotId::new(Uuid::from_bytes([number; 16]))
}

/// Takes a snapshot of a VM, with what the earlier ones have; how long the guest stood still is QEMU's affair here.
async fn snapshot(vault: &Vault, vm: &Vm, number: u8, before: &[u8]) -> Totals {
    let before: Vec<_> = before.iter().map(|number| (id(*number), snapshot_key(*number))).collect();
    let mut known = vault.known(&before, usize::MAX).expect("the vault is read");
    let draft = vault.begin(id(number)).expect("begun");
    let mut base = before.last().map(|(id, key)| vault.earlier(*id, key, &mut known).expect("opened").expect("few packs"));
    vm.capabilities(&[("postcopy-ram", false), ("return-path", false), ("background-snapshot", true)]).await;
    let fast = MigrationParameters { max_bandwidth: Some(BytesPerSec(10 << 30)), ..MigrationParameters::default() };
    vm.qmp.set_migration_parameters(fast).await.expect("parameters");
    let (ours, qemus) = UnixStream::pair().expect("sockets");
    vm.qmp.getfd("snapshot", OwnedFd::from(qemus)).await.expect("getfd");
    vm.qmp.migrate_fd("snapshot").await.expect("migrate");
    let keys = Keys { snapshot: snapshot_key(number), team: TeamKey::new([9; 32]), pack: PackKey::draw().expect("random bytes") };
    let taking = tokio::task::spawn_blocking(move || {
        let taken = take(ours, base.as_mut(), |spaces| draft.writer(&keys, spaces, known, Bytes(u64::MAX)), || ()).expect("taken");
        let (_, _, totals) = taken.writer.finish(&taken.parts).expect("finished");
        draft.commit(&totals).expect("committed");
        totals
    });
    let totals = taking.await.expect("no panic");
    vm.wait_status(&MigrationStatus::Completed).await;
    assert_eq!(vm.qmp.query_status().await.expect("status").status, RunStatus::Running, "it runs on");
    totals
}

/// A VM that runs out of a snapshot.
struct Resumed {
    vm: Vm,
    /// From the first byte until it could run.
    took: Duration,
    playing: tokio::task::JoinHandle<Result<Played, PlayError>>,
    /// Whoever plays speaks over it.
    socket: UnixStream,
}

/// The names under which QEMU has connections in case.
const SPARES: [&str; 3] = ["spare-0", "spare-1", "spare-2"];

/// Whoever plays is gone, more than once: at once, when another has just begun, and in the middle; what the last one sent.
async fn outlive(vault: &Vault, number: u8, resumed: Resumed, spares: Vec<UnixStream>) -> (Vm, Duration, Played) {
    let Resumed { vm, took, mut playing, mut socket } = resumed;
    for ((name, ours), after) in SPARES.into_iter().zip(spares).zip([0, 0, 300]) {
        tokio::time::sleep(Duration::from_millis(after)).await;
        socket.shutdown(std::net::Shutdown::Both).expect("shut");
        let cut = playing.await.expect("no panic");
        assert!(matches!(cut, Err(PlayError::Refused | PlayError::Socket(_))), "in the middle of it: {cut:?}");
        let contents = vault.snapshot(id(number), &snapshot_key(number)).expect("opened");
        let (told, heard) = tokio::sync::oneshot::channel();
        socket = ours.try_clone().expect("a socket");
        playing = tokio::task::spawn_blocking(move || play_on(ours, contents, || told.send(()).expect("heard")));
        let recovering = async {
            // It may not have noticed yet.
            while vm.qmp.migrate_recover_fd(name).await.is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            heard.await.expect("resumed");
        };
        tokio::time::timeout(LIMIT, recovering).await.expect("in time");
    }
    let played = playing.await.expect("no panic").expect("played");
    (vm, took, played)
}

/// Starts a QEMU that waits, and gives it a snapshot.
async fn resume(dir: &Path, vault: &Vault, number: u8, name: &str, binary: &Path, disk: &[String]) -> (Resumed, Vec<UnixStream>) {
    let more: Vec<_> = disk.iter().map(String::as_str).chain(["-incoming", "defer", "-S"]).collect();
    let vm = Vm::start(dir, name, binary, &more).await;
    vm.capabilities(&[("postcopy-ram", true), ("return-path", true), ("events", true)]).await;
    let (ours, qemus) = UnixStream::pair().expect("sockets");
    vm.qmp.getfd("in", OwnedFd::from(qemus)).await.expect("getfd");
    vm.qmp.migrate_incoming_fd("in").await.expect("migrate-incoming");
    let contents = vault.snapshot(id(number), &snapshot_key(number)).expect("opened");
    let (told, loaded) = tokio::sync::oneshot::channel();
    let began = Instant::now();
    let socket = ours.try_clone().expect("a socket");
    let playing = tokio::task::spawn_blocking(move || play(ours, contents, &[], || told.send(()).expect("heard"), |_| ()));
    tokio::time::timeout(LIMIT, loaded).await.expect("in time").expect("loaded");
    let took = began.elapsed();
    let mut spares = vec![];
    for name in SPARES {
        let (ours, qemus) = UnixStream::pair().expect("sockets");
        vm.qmp.getfd(name, OwnedFd::from(qemus)).await.expect("getfd");
        spares.push(ours);
    }
    vm.qmp.cont().await.expect("cont");
    (Resumed { vm, took, playing, socket }, spares)
}

#[tokio::test]
async fn a_guest_runs_on_while_it_is_taken_and_again_out_of_the_vault_on_either_version_and_outlives_who_plays_it() {
    let qemus = qemus();
    for (turn, binary) in (0_u8..).zip(&qemus) {
        let dir = tempfile::tempdir().expect("a directory");
        let vault = Vault::open(&dir.path().join("vault")).expect("a vault");
        let source = Vm::start(dir.path(), "source", binary, &[]).await;
        source.hear("checked its memory", |said| said.sweeps > 0).await;
        let first = snapshot(&vault, &source, 1, &[]).await;
        let before = source.said().expect("it was heard");
        source.hear("went on", |said| said.written > before.written && said.checked > before.checked).await;
        let second = snapshot(&vault, &source, 2, &[1]).await;
        assert_eq!(source.said().expect("it was heard").errors, 0);
        // What has not changed is kept once.
        assert!(second.new < first.new / 2, "{first:?} {second:?}");
        assert!(second.pack.0 < first.pack.0, "{first:?} {second:?}");
        drop(source);
        // The one that was taken on this version runs on the other; the older one, too, without the newer.
        let other = &qemus[(usize::from(turn) + 1) % qemus.len()];
        for (number, name, binary) in [(2, "same", binary), (1, "other", other)] {
            let (resumed, spares) = resume(dir.path(), &vault, number, name, binary, &[]).await;
            let (vm, took, played) = if number == 1 {
                outlive(&vault, number, resumed, spares).await
            } else {
                let Resumed { vm, took, playing, .. } = resumed;
                (vm, took, playing.await.expect("no panic").expect("played"))
            };
            let said = vm.hear("went on out of the vault", |said| said.written > before.written).await;
            vm.wait_status(&MigrationStatus::Completed).await;
            let later = vm.hear("checked all of its memory", |later| later.sweeps > said.sweeps + 1).await;
            assert_eq!((said.errors, later.errors), (0, 0), "{}", fs::read_to_string(&vm.console).unwrap_or_default());
            eprintln!("{}: {took:?} to cont, {played:?}", binary.display());
            // It is a VM like any other: another snapshot of it can be taken.
            if number == 2 {
                let third = snapshot(&vault, &vm, 3, &[1, 2]).await;
                assert!(third.new < first.new / 2, "{first:?} {third:?}");
            }
        }
        let keys: Vec<_> = [1, 2, 3].iter().map(|number| (id(*number), snapshot_key(*number))).collect();
        assert_eq!(vault.verify(&keys, &TeamKey::new([9; 32])).expect("read").len(), 0);
    }
}

const DISK: u32 = 32 << 20;
/// Blocks of it that the guest writes to.
const BLOCKS: u64 = 1024;

/// The arguments of a VM with this disk.
fn with_disk(path: &Path) -> Vec<String> {
    let file = json!({"driver": "file", "node-name": "disk0-file", "filename": path, "cache": {"direct": true}});
    let disk = json!({"driver": "raw", "node-name": "disk0", "file": "disk0-file"});
    let words = ["-blockdev", &file.to_string(), "-blockdev", &disk.to_string(), "-device", "virtio-blk-pci,drive=disk0"];
    words.map(str::to_owned).to_vec()
}

/// Takes memory and disk of one instant; how long the guest stood still, and what of the disk was read. With an earlier snapshot, only what has changed of the disk since is read, and that
/// gives what reading all of it gives.
async fn snapshot_with_disk(dir: &Path, vault: &Vault, vm: &Vm, number: u8, earlier: Option<u8>) -> (Duration, u64) {
    let since = vm.qmp.since("disk0").await.expect("query-named-block-nodes");
    let since = earlier.map(|earlier| since.into_iter().rfind(|since| since.snapshot == id(earlier)).expect("a bitmap"));
    let (disks, nodes) = ([("disk0".to_owned(), since)], ["disk0".to_owned()]);
    let fleece = dir.join("fleece");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&fleece)
        .arg(DISK.to_string())
        .status()
        .expect("qemu-img");
    assert!(made.success());
    let image = fs::File::options().read(true).write(true).open(&fleece).expect("the image");
    vm.qmp.add_fleece("disk0", image.into()).await.expect("blockdev-add");
    let served = dir.join("nbd");
    let _ = fs::remove_file(&served);
    vm.qmp.serve_disks(UnixListener::bind(&served).expect("a socket").into()).await.expect("nbd-server-start");
    let draft = vault.begin(id(number)).expect("begun");
    vm.capabilities(&[("background-snapshot", true)]).await;
    let (ours, qemus) = UnixStream::pair().expect("sockets");
    vm.qmp.getfd("snapshot", OwnedFd::from(qemus)).await.expect("getfd");
    let keys = |number: u8| Keys {
        snapshot: snapshot_key(number),
        team: TeamKey::new([9; 32]),
        pack: PackKey::draw().expect("random bytes"),
    };
    let of_disk = || Space { kind: SpaceKind::Disk, name: "disk0".into(), pages: DISK / 4096 };
    let mut known = godwit_vault::Known::new(usize::MAX);
    let base =
        earlier.map(|earlier| vault.earlier(id(earlier), &snapshot_key(earlier), &mut known).expect("opened").expect("few packs"));
    let (told, started) = tokio::sync::oneshot::channel();
    let stopped = Instant::now();
    vm.qmp.stop(LIMIT).await.expect("stop");
    vm.qmp.begin_fleeces(&disks, id(number)).await.expect("transaction");
    vm.qmp.migrate_fd("snapshot").await.expect("migrate");
    let taking = tokio::task::spawn_blocking(move || {
        let mut blocks = 0;
        let begin = |mut spaces: Vec<Space>| {
            blocks = spaces.len();
            spaces.push(of_disk());
            draft.writer(&keys(number), spaces, known, Bytes(u64::MAX))
        };
        let taken = take(ours, None, begin, || told.send(()).expect("heard")).expect("taken");
        (taken, draft, u16::try_from(blocks).expect("few"))
    });
    tokio::time::timeout(LIMIT, started).await.expect("in time").expect("started");
    vm.qmp.cont().await.expect("cont");
    let pause = stopped.elapsed();
    vm.qmp.export_disk(&fleece_node("disk0"), false, earlier.map(|_| CHANGED)).await.expect("block-export-add");
    let (mut taken, draft, space) = taking.await.expect("no panic");
    // What is read while the guest writes over it is what it was.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (full, vault) = (vault.begin(id(FULL)).expect("begun"), vault.clone());
    let reading = tokio::task::spawn_blocking(move || {
        let connect = || UnixStream::connect(&served).expect("connected");
        let export = fleece_node("disk0");
        let Some(mut base) = base else {
            let read = take_disk(connect(), &export, space, &mut taken.writer).expect("read");
            let (_, _, totals) = taken.writer.finish(&taken.parts).expect("finished");
            draft.commit(&totals).expect("committed");
            return read;
        };
        let of = base.disk("disk0", DISK / 4096).expect("the disk");
        let read = take_changes(connect(), &export, space, &mut taken.writer, (&mut base, of)).expect("read");
        let (_, _, totals) = taken.writer.finish(&taken.parts).expect("finished");
        draft.commit(&totals).expect("committed");
        let mut writer = full.writer(&keys(FULL), vec![of_disk()], godwit_vault::Known::new(0), Bytes(u64::MAX)).expect("begun");
        let all = take_disk(connect(), &export, 0, &mut writer).expect("read");
        assert!(read < all, "{read} of {all}");
        let (_, _, totals) = writer.finish(&Parts::default()).expect("finished");
        full.commit(&totals).expect("committed");
        let open = |number| vault.snapshot(id(number), &snapshot_key(number)).expect("opened");
        let (mut one, mut other) = (open(number), open(FULL));
        for page in 0..DISK / 4096 {
            assert!(one.page(space, page).expect("read") == other.page(0, page).expect("read"), "page {page}");
        }
        vault.delete(id(FULL)).expect("deleted");
        read
    });
    let read = reading.await.expect("no panic");
    vm.wait_status(&MigrationStatus::Completed).await;
    vm.qmp.keep_since(&nodes, id(number), &[]).await.expect("kept");
    vm.qmp.stop_serving_disks().await.expect("nbd-server-stop");
    vm.qmp.end_fleece("disk0").await.expect("ended");
    vm.qmp.end_fleece("disk0").await.expect("it has ended");
    vm.qmp.forget_taking("disk0").await.expect("removed");
    (pause, read)
}

/// The number of a snapshot whose disk was read whole.
const FULL: u8 = 200;

/// Writes a disk as it was.
fn restore_disk(contents: &mut Contents, path: &Path) {
    let file = fs::File::create(path).expect("a file");
    file.set_len(u64::from(DISK)).expect("its length");
    let space = contents.spaces().iter().position(|space| space.kind == SpaceKind::Disk).expect("a disk");
    for page in 0..DISK / 4096 {
        if let Some(content) = contents.page(space as u16, page).expect("a page") {
            file.write_all_at(content, u64::from(page) * 4096).expect("written");
        }
    }
}

/// Makes the disk of a VM that has ended what it was, where it was written to since; what of it was written.
async fn turn_back(dir: &Path, vault: &Vault, binary: &Path, disk: &Path, changed: Changed) -> u64 {
    let arguments = with_disk(disk);
    // Nobody else writes to it.
    let without_device = arguments.iter().take(4).map(String::as_str).chain(["-S"]).collect::<Vec<_>>();
    let vm = Vm::start(dir, "bare", binary, &without_device).await;
    let served = dir.join("nbd-bare");
    vm.qmp.serve_disks(UnixListener::bind(&served).expect("a socket").into()).await.expect("nbd-server-start");
    vm.qmp.export_disk("disk0", true, None).await.expect("block-export-add");
    let mut contents = vault.snapshot(id(2), &snapshot_key(2)).expect("opened");
    let restoring = tokio::task::spawn_blocking(move || {
        let socket = UnixStream::connect(&served).expect("connected");
        restore(socket, &mut contents, "disk0", Some(&changed)).expect("restored")
    });
    let restored = restoring.await.expect("no panic");
    assert_eq!(restored.read, Bytes(0), "what has changed need not be looked at");
    restored.written.get()
}

/// A snapshot that begins and is not finished: nothing of it is known afterwards.
async fn give_up_a_snapshot(dir: &Path, vm: &Vm) {
    let image = fs::File::options().read(true).write(true).open(dir.join("fleece")).expect("the image");
    vm.qmp.add_fleece("disk0", image.into()).await.expect("blockdev-add");
    let known = vm.qmp.since("disk0").await.expect("query-named-block-nodes");
    vm.qmp.begin_fleeces(&[("disk0".to_owned(), known.last().cloned())], id(77)).await.expect("transaction");
    vm.qmp.end_fleece("disk0").await.expect("ended");
    assert_eq!(vm.qmp.since("disk0").await.expect("query-named-block-nodes"), known, "it is not whole");
    vm.qmp.forget_taking("disk0").await.expect("removed");
    assert_eq!(vm.qmp.bitmaps("disk0").await.expect("query-named-block-nodes").len(), known.len());
    // Only so many are kept, the newest; one that stands still says nothing.
    for number in 100..110 {
        vm.qmp.begin_since(&["disk0".to_owned()], id(number)).await.expect("begun");
    }
    let newest = vm.qmp.since("disk0").await.expect("query-named-block-nodes");
    assert_eq!(newest.last().map(|since| since.snapshot), Some(id(109)));
    for since in newest.iter().filter(|since| !known.contains(since)) {
        vm.qmp.stop_bitmap("disk0", &since.bitmap).await.expect("stopped");
    }
    assert_eq!(vm.qmp.since("disk0").await.expect("query-named-block-nodes"), known);
    for number in 100..110 {
        vm.qmp.forget_since("disk0", Some(id(number))).await.expect("removed");
    }
}

#[tokio::test]
async fn memory_and_disk_are_of_one_instant_and_what_has_changed_since_is_all_that_is_looked_at() {
    for binary in qemus() {
        let dir = tempfile::tempdir().expect("a directory");
        let vault = Vault::open(&dir.path().join("vault")).expect("a vault");
        let (disk, restored) = (dir.path().join("disk"), dir.path().join("restored"));
        fs::File::create(&disk).and_then(|file| file.set_len(u64::from(DISK))).expect("a disk");
        // What was there before the guest, and it leaves alone.
        let old: Vec<u8> = (0..8 << 20).map(|place: u32| (place >> 12) as u8 | 1).collect();
        fs::File::options().write(true).open(&disk).and_then(|file| file.write_all_at(&old, 20 << 20)).expect("written");
        let arguments = with_disk(&disk);
        let source = Vm::start(dir.path(), "source", &binary, &arguments.iter().map(String::as_str).collect::<Vec<_>>()).await;
        // All of what it writes to was written, and again.
        source.hear("wrote to its disk", |said| said.disk_written > 2 * BLOCKS).await;
        let (pause, whole) = snapshot_with_disk(dir.path(), &vault, &source, 1, None).await;
        give_up_a_snapshot(dir.path(), &source).await;
        let before = source.said().expect("it was heard");
        source.hear("wrote on", |said| said.disk_written > before.disk_written).await;
        let (_, read) = snapshot_with_disk(dir.path(), &vault, &source, 2, Some(1)).await;
        assert!(read + old.len() as u64 <= whole, "{read} of {whole}");
        // Neither needs the other.
        vault.delete(id(1)).expect("deleted");
        let before = source.said().expect("it was heard");
        let later = source.hear("wrote on", |said| said.disk_written > before.disk_written + BLOCKS).await;
        assert_eq!((later.errors, later.disk_errors), (0, 0));
        // It stands still, and what it has written since is read.
        source.qmp.stop(LIMIT).await.expect("stop");
        let since = source.qmp.since("disk0").await.expect("query-named-block-nodes").pop().expect("a bitmap");
        assert_eq!(since.snapshot, id(2));
        source.qmp.stop_bitmap("disk0", &since.bitmap).await.expect("stopped");
        let served = dir.path().join("nbd");
        let _ = fs::remove_file(&served);
        source.qmp.serve_disks(UnixListener::bind(&served).expect("a socket").into()).await.expect("nbd-server-start");
        source.qmp.export_disk("disk0", false, Some(&since.bitmap)).await.expect("block-export-add");
        let reading = tokio::task::spawn_blocking(move || {
            Changed::read(UnixStream::connect(&served).expect("connected"), "disk0", &since.bitmap).expect("read")
        });
        let changed = reading.await.expect("no panic");
        drop(source);
        let looked_at = turn_back(dir.path(), &vault, &binary, &disk, changed.clone()).await;
        assert!(looked_at <= changed.bytes().get() && changed.bytes().get() < u64::from(DISK) / 2, "{changed:?}");
        let mut contents = vault.snapshot(id(2), &snapshot_key(2)).expect("opened");
        restore_disk(&mut contents, &restored);
        assert!(fs::read(&disk).expect("read") == fs::read(&restored).expect("read"), "it is not what it was");
        let (Resumed { vm, took, playing, .. }, _) = resume(dir.path(), &vault, 2, "restored", &binary, &with_disk(&disk)).await;
        playing.await.expect("no panic").expect("played");
        let said = vm.hear("wrote to its disk again", |said| said.disk_written > 0).await;
        let later = vm
            .hear("checked all of both", |later| {
                later.sweeps > said.sweeps + 1 && later.disk_checked > said.disk_checked + 2 * BLOCKS
            })
            .await;
        assert_eq!((later.errors, later.disk_errors), (0, 0), "{}", fs::read_to_string(&vm.console).unwrap_or_default());
        eprintln!(
            "{}: stood still for {pause:?}, ran again after {took:?}; read {whole} bytes, then {read}, and to turn back {looked_at}",
            binary.display()
        );
    }
}
