//! Both halves between two QEMUs without a machine, whose disks are read, mirrored and written as those of a VM are.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use godwit_carrier::pages::Digester;
use godwit_carrier::{Identity, Side};
use godwit_nbd::Extent;
use godwit_qemu::Qmp;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, LocalSet};

use super::Ranges;
use super::into::{DiskInto, WaitingDisk};
use super::out::{DiskOut, OwnDisk};
use crate::carry::connect::{Acceptor, Dialler};
use crate::carry::connections;
use crate::carry::control::DiskStatus;
use crate::carry::pump::{KeepAlive, Pump};
use crate::carry::seal::Sealers;
use crate::carry::tests::{acceptor, listener};
use crate::tls::tests::cluster;

const DISK: &str = "disk0";
const SIZE: u64 = 64 << 20;
const KEY: [u8; 32] = [4; 32];
const IDENTITY: Identity = Identity { vm: [1; 16], task: [2; 16], generation: 3, lane: 1 };
const KEEP_ALIVE: KeepAlive = KeepAlive { every: Duration::from_secs(1), silence: Duration::from_secs(60) };
const PATIENCE: Duration = Duration::from_secs(60);
/// More than any of this takes.
const LIMIT: Duration = Duration::from_secs(60);

/// A QEMU with one disk.
struct Qemu {
    process: Child,
    qmp: Qmp,
    served: PathBuf,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Qemu {
    async fn start(dir: &Path, name: &str, file: &Path, format: &str) -> Self {
        let monitor = dir.join(format!("{name}.qmp"));
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-machine", "none", "-nodefaults", "-display", "none", "-S"]);
        command.args(["-blockdev", &format!("driver=file,node-name=file,filename={},discard=unmap", file.display())]);
        command.args(["-blockdev", &format!("driver={format},node-name={DISK},file=file,discard=unmap")]);
        let (listener, arguments) = crate::snapshot::tests::monitor(&monitor);
        let process = command.args(arguments).spawn().expect("QEMU is installed");
        drop(listener);
        let qmp = Qmp::connect(&monitor, LIMIT).await.expect("QEMU answers");
        std::fs::remove_file(&monitor).expect("a socket");
        Self { process, qmp, served: dir.join(format!("{name}.nbd")) }
    }

    /// Serves its disk, and is connected to.
    async fn serve(&self) -> UnixStream {
        let listener = StdListener::bind(&self.served).expect("a socket");
        self.qmp.serve_disks(listener.into()).await.expect("served");
        self.connect()
    }

    fn connect(&self) -> UnixStream {
        let stream = StdStream::connect(&self.served).expect("a connection");
        stream.set_nonblocking(true).expect("a socket");
        UnixStream::from_std(stream).expect("a socket")
    }
}

/// One half of a lane.
struct Half {
    status: watch::Receiver<DiskStatus>,
    pump: Rc<Pump>,
    ended: JoinHandle<String>,
    wire: Arc<AtomicU64>,
}

impl Drop for Half {
    fn drop(&mut self) {
        self.ended.abort();
    }
}

impl Half {
    async fn wait(&mut self, is: impl FnMut(&DiskStatus) -> bool) {
        let reached = tokio::time::timeout(LIMIT, self.status.wait_for(is)).await;
        let status = reached.map(|reached| reached.map(|status| *status));
        match status {
            Ok(Ok(_)) => {}
            other => panic!("{other:?}, ended: {}", self.ended.is_finished()),
        }
    }
}

fn source(dialler: Dialler, wire: Arc<AtomicU64>, disk: UnixStream, mirror: UnixStream, since: Option<(String, u64)>) -> Half {
    let (tell, status) = watch::channel(DiskStatus::default());
    let (to_agent, _) = mpsc::channel(8);
    let (pump, frames) = Pump::new(Side::Source, IDENTITY, KEEP_ALIVE, None, to_agent);
    let pump = Rc::new(pump);
    let own = Rc::clone(&pump);
    let ended = tokio::task::spawn_local(async move {
        let sealers = Sealers::new(crate::carry::tests::threads());
        let described = OwnDisk { export: DISK.into(), size: SIZE, since };
        let out = DiskOut::new(&own, sealers, Digester::new(&KEY), Vec::new(), described).expect("a disk");
        let (_keep, mut from_agent) = mpsc::channel(1);
        tokio::select! {
            error = connections::of_source(&own, &dialler, KEY, PATIENCE, &mut from_agent, |_| ()) => error.to_string(),
            Err(error) = out.run(disk, mirror, frames, |status| {
                let _ = tell.send(status);
            }) => {
                eprintln!("source: {error}");
                error.to_string()
            }
        }
    });
    Half { status, pump, ended, wire }
}

fn destination(mut acceptor: Acceptor, disk: UnixStream, base: Option<u64>) -> Half {
    let (tell, status) = watch::channel(DiskStatus::default());
    let (to_agent, _) = mpsc::channel(8);
    let (pump, frames) = Pump::new(Side::Destination, IDENTITY, KEEP_ALIVE, None, to_agent);
    let pump = Rc::new(pump);
    let own = Rc::clone(&pump);
    let ended = tokio::task::spawn_local(async move {
        let (told, key) = oneshot::channel();
        let (_keep, mut from_agent) = mpsc::channel(1);
        let arriving = async {
            let waiting = WaitingDisk { size: SIZE, base };
            let mut into = DiskInto::new(&own, disk, DISK, Vec::new(), waiting)?;
            into.meet().await?;
            let digester = Digester::new(&key.await.expect("a session"));
            into.run(digester, frames, |status| {
                let _ = tell.send(status);
            })
            .await
        };
        tokio::select! {
            error = connections::of_destination(&own, &mut acceptor, told, PATIENCE, &mut from_agent, |_| ()) => error.to_string(),
            Err(error) = arriving => {
                eprintln!("destination: {error}");
                error.to_string()
            }
        }
    });
    Half { status, pump, ended, wire: Arc::default() }
}

fn write(file: &File, at: u64, seed: u64, length: usize) {
    let mut content = vec![0; length];
    blake3::Hasher::new().update(&seed.to_be_bytes()).finalize_xof().fill(&mut content);
    file.write_all_at(&content, at).expect("written");
}

/// A disk with some noise, some text, and much that was never written.
fn filled(path: &Path) {
    let file = File::create(path).expect("a file");
    file.set_len(SIZE).expect("a size");
    write(&file, 0, 1, 3 << 20);
    write(&file, (20 << 20) + 4096, 2, 1 << 20);
    file.write_all_at(&b"text ".repeat(100_000), 40 << 20).expect("written");
    write(&file, SIZE - 4096, 3, 4096);
}

fn qemu_img(arguments: &[&str]) -> bool {
    Command::new("qemu-img").args(arguments).status().expect("qemu-utils is installed").success()
}

/// Writes as a guest does, while the disk travels: through another export of the source's.
async fn guest_writes(source: &Qemu, at: u64, seed: u64, length: usize) {
    let mut content = vec![0; length];
    blake3::Hasher::new().update(&seed.to_be_bytes()).finalize_xof().fill(&mut content);
    let (mut client, mut out) = (godwit_nbd::Client::new("guest", vec![], true), bytes::BytesMut::new());
    let mut socket = source.connect();
    let mut event = async |client: &mut godwit_nbd::Client, out: &mut bytes::BytesMut| loop {
        if let Some(event) = client.next_event(out).expect("NBD") {
            return event;
        }
        super::write_due(&mut socket, out).await.expect("written");
        socket.readable().await.expect("a socket");
        super::try_read(&socket, client.buffer_mut(), 4096).expect("read");
    };
    event(&mut client, &mut out).await;
    for (piece, data) in (0..).zip(content.chunks(256 << 10)) {
        godwit_nbd::put_write(&mut out, piece, at + piece * (256 << 10), data);
        assert_eq!(event(&mut client, &mut out).await, godwit_nbd::Event::Done { cookie: piece });
    }
}

/// A lane between the disks of two daemons, with a mirror that runs.
struct Lane {
    source: Qemu,
    destination: Qemu,
    out: Half,
    into: Half,
}

impl Lane {
    async fn begin(source: Qemu, destination: Qemu, base: Option<u64>, since: Option<(&str, u64)>) -> Self {
        let materials = cluster(&["h1", "h2"]);
        let (listener, address) = listener().await;
        let acceptor = acceptor(listener, "h1", &materials[0], &materials[1]);
        let there = destination.serve().await;
        destination.qmp.export_disk(DISK, true, None).await.expect("exported");
        let into = self::destination(acceptor, there, base);
        let here = source.serve().await;
        let (ours, qemus) = StdStream::pair().expect("pair");
        ours.set_nonblocking(true).expect("a socket");
        let mirror = UnixStream::from_std(ours).expect("a socket");
        let wire = Arc::new(AtomicU64::new(0));
        let dialler = dialler_of(address, &materials, &wire);
        let out = self::source(dialler, wire, here, mirror, since.map(|(name, generation)| (name.to_owned(), generation)));
        source.qmp.begin_mirror(DISK, qemus.into()).await.expect("mirrored");
        if let Some((bitmap, _)) = since {
            source.qmp.stop_bitmap(DISK, bitmap).await.expect("stopped");
        }
        source.qmp.export_disk(DISK, false, since.map(|(bitmap, _)| bitmap)).await.expect("exported");
        let guest = serde_json::json!({"type": "nbd", "id": "guest", "node-name": DISK, "name": "guest", "writable": true});
        source.qmp.execute("block-export-add", guest).await.expect("a guest's");
        Self { source, destination, out, into }
    }

    fn copy(&self) {
        self.out.pump.begin_copying();
    }

    /// The end: the mirror is finished, and the destination has everything.
    async fn finish(mut self) -> (Qemu, Qemu, u64) {
        self.out.wait(|status| status.copied).await;
        self.source.qmp.stop_serving_disks().await.expect("stopped");
        self.out.pump.hurry();
        self.source.qmp.finish_mirror(DISK).await.expect("finished");
        let began = Instant::now();
        while self.source.qmp.mirror(DISK).await.expect("asked").is_some_and(|mirror| mirror.ended.is_none()) {
            assert!(began.elapsed() < LIMIT, "the mirror does not end");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let ended = self.source.qmp.mirror(DISK).await.expect("asked").and_then(|mirror| mirror.ended);
        assert_eq!(ended, Some(None), "the mirror failed");
        self.source.qmp.drop_mirror(DISK).await.expect("dropped");
        self.out.wait(|status| status.whole).await;
        assert!(self.into.status.borrow().whole, "what is acknowledged is there");
        self.destination.qmp.stop_serving_disks().await.expect("stopped");
        let wire = self.out.wire.load(Ordering::Relaxed);
        // QEMU has removed the sockets.
        (self.source, self.destination, wire)
    }
}

fn dialler_of(address: std::net::SocketAddr, materials: &[crate::tls::Material], wire: &Arc<AtomicU64>) -> Dialler {
    Dialler::new(address, crate::carry::tests::expected("h2", &materials[1]), &materials[0], Arc::clone(wire)).expect("a dialler")
}

fn new_disk(path: &Path, format: &str) {
    assert!(qemu_img(&["create", "-q", "-f", format, &path.display().to_string(), &SIZE.to_string()]));
}

fn are_equal(one: (&Path, &str), other: (&Path, &str)) -> bool {
    qemu_img(&["compare", "-q", "-f", one.1, "-F", other.1, &one.0.display().to_string(), &other.0.display().to_string()])
}

fn allocated(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&path.metadata().expect("a file")) * 512
}

#[test]
fn ranges_are_what_extents_say_and_what_is_added() {
    let extent = |length, flags| Extent { length, flags };
    let mut ranges = Ranges::of(100, &[extent(10, 2), extent(10, 2), extent(10, 0), extent(10, 3)], Extent::is_zero);
    assert_eq!(ranges.0, [(100, 120), (130, 140)]);
    assert!(ranges.are_all(100, 20) && ranges.are_all(130, 10));
    assert!(!ranges.are_all(110, 20) && !ranges.are_all(120, 5) && !ranges.are_all(139, 2) && !ranges.are_all(90, 20));
    assert!(ranges.is_any(90, 11) && ranges.is_any(119, 1) && ranges.is_any(120, 11));
    assert!(!ranges.is_any(90, 10) && !ranges.is_any(120, 10) && !ranges.is_any(140, 100));
    for (first, end, expected) in [
        (150, 160, vec![(100, 120), (130, 140), (150, 160)]),
        (10, 20, vec![(10, 20), (100, 120), (130, 140), (150, 160)]),
        (120, 130, vec![(10, 20), (100, 140), (150, 160)]),
        (5, 155, vec![(5, 160)]),
        (7, 8, vec![(5, 160)]),
    ] {
        ranges.add(first, end);
        assert_eq!(ranges.0, expected);
    }
}

#[tokio::test]
async fn a_disk_arrives_as_it_is_when_its_mirror_ends() {
    let dir = tempfile::tempdir().expect("a directory");
    for format in ["raw", "qcow2"] {
        let (here, there) = (dir.path().join(format!("here.{format}")), dir.path().join(format!("there.{format}")));
        filled(&dir.path().join("filled"));
        let from = dir.path().join("filled").display().to_string();
        assert!(qemu_img(&["convert", "-q", "-f", "raw", "-O", format, &from, &here.display().to_string()]));
        new_disk(&there, format);
        LocalSet::new()
            .run_until(async {
                let source = Qemu::start(dir.path(), "source", &here, format).await;
                let destination = Qemu::start(dir.path(), "destination", &there, format).await;
                let lane = Lane::begin(source, destination, None, None).await;
                // Before anything is copied, while it is, and after that; over what was there, and beside it.
                guest_writes(&lane.source, 1 << 20, 10, 1 << 20).await;
                lane.copy();
                guest_writes(&lane.source, 30 << 20, 11, 3 << 20).await;
                guest_writes(&lane.source, 0, 12, 128 << 10).await;
                let (source, destination, wire) = lane.finish().await;
                drop((source, destination));
                // 9 MiB of noise at most, and half a MiB of text.
                assert!((8 << 20..10 << 20).contains(&wire), "{wire} bytes on the wire");
            })
            .await;
        assert!(are_equal((&here, format), (&there, format)), "{format}");
        assert!(allocated(&there) < 12 << 20, "{format}: thin is thin: {}", allocated(&there));
    }
}

#[tokio::test]
async fn of_a_disk_that_is_there_in_an_older_state_only_the_difference_travels() {
    let dir = tempfile::tempdir().expect("a directory");
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    filled(&here);
    // Known by the bitmap; unknown, and compared; and another generation's than the bitmap's.
    for (base, with_bitmap) in [(Some(7), true), (Some(0), false), (Some(6), true)] {
        std::fs::copy(&here, &there).expect("a copy");
        LocalSet::new()
            .run_until(async {
                let source = Qemu::start(dir.path(), "source", &here, "raw").await;
                let destination = Qemu::start(dir.path(), "destination", &there, "raw").await;
                source.qmp.begin_bitmap(DISK, "g7").await.expect("a bitmap");
                let guest = serde_json::json!({"type": "nbd", "id": "early", "node-name": DISK, "name": "guest", "writable": true});
                drop(source.serve().await);
                source.qmp.execute("block-export-add", guest).await.expect("a guest's");
                guest_writes(&source, 2 << 20, u64::from(with_bitmap) + 20, 128 << 10).await;
                // What was there becomes zero.
                let file = File::options().write(true).open(&here).expect("a file");
                if !with_bitmap {
                    file.write_all_at(&[0; 64 << 10], 20 << 20).expect("written");
                }
                source.qmp.stop_serving_disks().await.expect("stopped");
                let lane = Lane::begin(source, destination, base, with_bitmap.then_some(("g7", 7))).await;
                lane.copy();
                let (_source, _destination, wire) = lane.finish().await;
                assert!((64 << 10..256 << 10).contains(&wire), "{base:?}: {wire} bytes on the wire");
            })
            .await;
        assert!(are_equal((&here, "raw"), (&there, "raw")), "{base:?}");
    }
}

#[tokio::test]
async fn a_disk_of_another_size_is_refused_and_nothing_is_written() {
    let dir = tempfile::tempdir().expect("a directory");
    let there = dir.path().join("there");
    File::create(&there).and_then(|file| file.set_len(SIZE * 2)).expect("a file");
    LocalSet::new()
        .run_until(async {
            let qemu = Qemu::start(dir.path(), "destination", &there, "raw").await;
            let disk = qemu.serve().await;
            qemu.qmp.export_disk(DISK, true, None).await.expect("exported");
            let materials = cluster(&["h1", "h2"]);
            let acceptor = acceptor(listener().await.0, "h1", &materials[0], &materials[1]);
            let mut into = destination(acceptor, disk, None);
            let ended = tokio::time::timeout(LIMIT, &mut into.ended).await.expect("it ends").expect("no panic");
            assert!(ended.contains("pages here"), "{ended}");
        })
        .await;
    assert_eq!(allocated(&there), 0);
}

#[tokio::test]
async fn what_the_guest_writes_while_zeros_are_on_their_way_is_there() {
    let dir = tempfile::tempdir().expect("a directory");
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    // What is full there has become empty here, and is written to while that is told.
    for path in [&here, &there] {
        let file = File::create(path).expect("a file");
        file.set_len(SIZE).expect("a size");
        write(&file, 0, 1, 48 << 20);
    }
    File::options().write(true).open(&here).and_then(|file| file.set_len(0).and_then(|()| file.set_len(SIZE))).expect("emptied");
    LocalSet::new()
        .run_until(async {
            let source = Qemu::start(dir.path(), "source", &here, "raw").await;
            let destination = Qemu::start(dir.path(), "destination", &there, "raw").await;
            let lane = Lane::begin(source, destination, Some(0), None).await;
            lane.copy();
            for number in 0..40 {
                guest_writes(&lane.source, number << 20, number, 64 << 10).await;
            }
            lane.finish().await;
        })
        .await;
    assert!(are_equal((&here, "raw"), (&there, "raw")));
}
