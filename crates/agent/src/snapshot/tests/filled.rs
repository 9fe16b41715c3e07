//! A disk that is served out of the vault while QEMU fills the volume behind it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::BytesMut;
use godwit_model::{DiskFormat, ResolvedDisk, VolumeRef};
use godwit_nbd::{ALLOCATION, Client, Event, put_read};
use godwit_qemu::fill::Fill;
use godwit_stream::PAGE_SIZE;
use godwit_vault::Known;

use super::super::export::Disk;
use super::super::serve::{ServeError, serve};
use super::*;

const PAGES: u32 = 4096;
const SIZE: u64 = PAGES as u64 * PAGE_SIZE as u64;

/// What the disk had: noise in every third run of 40 pages, zeros elsewhere, and the last page.
fn page(number: u32) -> Option<[u8; PAGE_SIZE]> {
    let has_content = (number / 40).is_multiple_of(3) || number == PAGES - 1;
    has_content.then(|| std::array::from_fn(|at| (number.wrapping_mul(2_654_435_761) >> (at % 17)) as u8 ^ at as u8))
}

fn whole() -> Vec<u8> {
    (0..PAGES).flat_map(|number| page(number).unwrap_or([0; PAGE_SIZE])).collect()
}

/// A vault with a snapshot of it.
fn vault(dir: &Path) -> Vault {
    let vault = Vault::open(dir).expect("a vault");
    let draft = vault.begin(id(1)).expect("begun");
    let keys = Keys { snapshot: snapshot_key(1), team: TeamKey::new([9; 32]), pack: PackKey::new([1; 32]) };
    let spaces = vec![Space { kind: SpaceKind::Disk, name: "disk0".into(), pages: PAGES }];
    let mut writer = draft.writer(&keys, spaces, Known::new(100), Bytes(u64::MAX)).expect("a writer");
    for number in 0..PAGES {
        if let Some(content) = page(number) {
            writer.page(0, number, &content).expect("kept");
        }
    }
    let (_, _, totals) = writer.finish(&Parts::default()).expect("finished");
    draft.commit(&totals).expect("committed");
    vault
}

fn opened(vault: &Vault) -> Contents {
    vault.snapshot(id(1), &snapshot_key(1)).expect("opened")
}

#[test]
fn what_is_served_is_the_disk_and_its_zeros_are_told() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut contents = opened(&vault(dir.path()));
    let (ours, qemus) = UnixStream::pair().expect("sockets");
    let serving = std::thread::spawn(move || serve(ours, &mut contents, "disk0"));
    let (mut disk, size) = Disk::open(qemus, "disk0", ALLOCATION, false).expect("opened");
    assert_eq!(size, SIZE);
    let whole = whole();
    for (at, length) in [(0, 1 << 20), (512, 512), (40 * 4096 - 512, 1024), (SIZE - 512, 512), (511 * 4096 + 512, 2 * 4096)] {
        let mut content = vec![1; length];
        disk.read(at, &mut content).expect("read");
        assert!(content == whole[at as usize..][..length], "{length} bytes at {at}");
    }
    let (mut at, mut zeros, mut extents) = (0, 0, 0);
    while at < SIZE {
        for extent in disk.extents(at, SIZE - at).expect("extents") {
            let part = &whole[at as usize..][..extent.length as usize];
            assert_eq!(extent.is_zero(), part.iter().all(|byte| *byte == 0), "at {at}");
            (at, extents) = (at + u64::from(extent.length), extents + 1);
            zeros += if extent.is_zero() { u64::from(extent.length) } else { 0 };
        }
    }
    let has_none = (0..PAGES).filter(|number| page(*number).is_none()).count() as u64;
    assert_eq!((at, zeros), (SIZE, has_none * PAGE_SIZE as u64));
    assert!(extents <= PAGES / 40 + 3, "zeros that lie in several leaves are one extent: {extents}");
    disk.close().expect("closed");
    serving.join().expect("no panic").expect("served");
}

#[test]
fn what_is_damaged_or_not_there_is_not_answered() {
    let dir = tempfile::tempdir().expect("a directory");
    let vault = vault(dir.path());
    let (ours, _qemus) = UnixStream::pair().expect("sockets");
    let other = serve(ours, &mut opened(&vault), "disk1");
    assert!(matches!(other, Err(ServeError::NoDisk(_))), "{other:?}");
    let pack = dir.path().join(format!("{}.pack", id(1)));
    let mut bytes = fs::read(&pack).expect("read");
    bytes[60] ^= 1;
    fs::write(&pack, bytes).expect("written");
    let mut contents = opened(&vault);
    let (ours, mut qemus) = UnixStream::pair().expect("sockets");
    let serving = std::thread::spawn(move || serve(ours, &mut contents, "disk0"));
    let (mut client, mut out) = (Client::new("disk0", vec![ALLOCATION.into()], false), BytesMut::new());
    let mut answered = 0;
    loop {
        use std::io::{Read, Write};
        while let Some(event) = client.next_event(&mut out).expect("NBD") {
            match event {
                Event::Ready { .. } => put_read(&mut out, 1, 0, 4096),
                _ => answered += 1,
            }
        }
        qemus.write_all(&out.split()).expect("written");
        let mut piece = [0; 4096];
        match qemus.read(&mut piece).expect("read") {
            0 => break,
            length => client.buffer_mut().extend_from_slice(&piece[..length]),
        }
    }
    assert_eq!(answered, 0);
    let served = serving.join().expect("no panic");
    let Err(ServeError::Contents(error)) = served else { panic!("{served:?}") };
    assert_eq!(error.to_string(), format!("pack {} cannot be read", id(1)));
}

/// Serves whoever connects, one after the other, until it is told to end; the connection that is served can be cut.
fn served_at(socket: &Path, vault: &Vault) -> (Arc<AtomicBool>, std::sync::mpsc::Receiver<UnixStream>) {
    let (listener, mut contents) = (UnixListener::bind(socket).expect("a socket"), opened(vault));
    let (ended, (connected, connections)) = (Arc::new(AtomicBool::new(false)), std::sync::mpsc::channel());
    let ends = Arc::clone(&ended);
    std::thread::spawn(move || {
        while let Ok((socket, _)) = listener.accept() {
            if ends.load(Ordering::Acquire) {
                return;
            }
            let _ = connected.send(socket.try_clone().expect("copied"));
            let _ = serve(socket, &mut contents, "disk0");
        }
    });
    (ended, connections)
}

#[tokio::test]
async fn a_volume_becomes_what_the_disk_was_and_what_the_guest_writes_meanwhile() {
    for (number, binary) in qemus().iter().enumerate() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path("vault")).expect("a directory");
        let vault = vault(&path("vault"));
        // It held something else, also where it is to hold zeros.
        fs::write(path("volume"), vec![0xa5; SIZE as usize]).expect("written");
        let size = SIZE.to_string();
        let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(path("room")).arg(size).status();
        assert!(made.expect("qemu-img").success());
        let arguments = with_disk(&path("volume"));
        let without_device: Vec<&str> = arguments.iter().take(4).map(String::as_str).chain(["-S"]).collect();
        let vm = Vm::start(dir.path(), &format!("filled-{number}"), binary, &without_device).await;
        // Whoever is connected here is on the disk as a guest would be.
        vm.qmp.serve_disks(UnixListener::bind(path("nbd")).expect("a socket").into()).await.expect("nbd-server-start");
        vm.qmp.export_disk("disk0", true, None).await.expect("block-export-add");
        let socket = path("fill-disk0");
        let (ended, connections) = served_at(&socket, &vault);
        let open = |write| fs::File::options().read(true).write(write).open(path("room")).expect("opened").into();
        vm.qmp.insert_fill("disk0", &socket, (open(false), open(true))).await.expect("inserted");
        vm.qmp.stay_at_shutdown(true).await.expect("set-action");
        assert_eq!(vm.qmp.fill_state("disk0").await.expect("known"), Some(Fill::Inserted));
        vm.qmp.cont().await.expect("cont");

        let served = path("nbd");
        let before = connections.recv().expect("QEMU has connected");
        let mut disk = tokio::task::spawn_blocking(move || {
            let socket = UnixStream::connect(&served).expect("connected");
            let (mut disk, _) = Disk::open(socket, "disk0", ALLOCATION, true).expect("opened");
            let mut content = vec![1; 1 << 20];
            disk.read(0, &mut content).expect("read");
            assert!(content == whole()[..1 << 20], "a guest reads what was there before anything has come");
            // QEMU connects again, and the guest does not notice.
            before.shutdown(std::net::Shutdown::Both).expect("cut");
            disk.read(1 << 20, &mut content).expect("read");
            assert!(content == whole()[1 << 20..2 << 20], "also when its server has changed");
            disk.write(8192, &[0x11; 4096]).expect("written");
            disk.flush().expect("flushed");
            disk
        })
        .await
        .expect("no panic");
        let volume = ResolvedDisk::new("shared/volume".parse::<VolumeRef>().expect("a name"), DiskFormat::Raw);
        vm.qmp.begin_fill(0, &volume).await.expect("blockdev-mirror");
        let mut wanted = whole();
        wanted[8192..12288].fill(0x11);
        let writing = tokio::task::spawn_blocking(move || {
            for at in (0..SIZE).step_by(1 << 20) {
                disk.write(at + 512, &[0x22; 1024]).expect("written");
            }
            disk.flush().expect("flushed");
            disk
        });
        let mut disk = writing.await.expect("no panic");
        (0..SIZE as usize).step_by(1 << 20).for_each(|at| wanted[at + 512..at + 1536].fill(0x22));
        let followed = async {
            while !matches!(vm.qmp.fill_state("disk0").await.expect("known"), Some(Fill::Comes { follows: true, .. })) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(LIMIT, followed).await.expect("all comes");
        vm.qmp.end_fill("disk0").await.expect("ended");
        assert_eq!(vm.qmp.fill_state("disk0").await.expect("known"), None);
        vm.qmp.end_fill("disk0").await.expect("it has ended already");
        vm.qmp.stay_at_shutdown(false).await.expect("set-action");
        wanted[..4096].fill(0x33);
        let writing = tokio::task::spawn_blocking(move || {
            disk.write(0, &[0x33; 4096]).expect("written");
            disk.flush().expect("flushed");
            disk.close().expect("closed");
        });
        writing.await.expect("no panic");
        ended.store(true, Ordering::Release);
        assert!(UnixStream::connect(&socket).is_ok(), "the server hears that it may end");
        drop(vm);
        assert!(fs::read(path("volume")).expect("read") == wanted, "with {binary:?}");
    }
}
