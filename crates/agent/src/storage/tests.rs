//! Pools and images with real files, made by the real `qemu-img`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::stream;
use godwit_model::spec::ResolvedDisk;
use godwit_model::{Bytes, CacheMode, DiskFormat, ErrorCode, Generation, ImageId, ImageKind, ImageRef, Name, Refusal, VmId};
use godwit_vault::ImageIndex;
use uuid::Uuid;

use super::{Arrived, Begun, ImageCache, PoolConfig, Pools, StorageError, locks};

mod exports;

const MIB: u64 = 1 << 20;

struct Fixture {
    directory: tempfile::TempDir,
    pools: Pools,
}

impl Fixture {
    fn new() -> Self {
        // Beside the tests' program, not in /tmp: that may be a file system without direct I/O.
        let program = std::env::current_exe().expect("path");
        let directory = tempfile::tempdir_in(program.parent().expect("directory")).expect("directory");
        let pools = Pools::open(vec![config(directory.path())]).expect("pools");
        Self { directory, pools }
    }

    fn path(&self, volume: &str) -> PathBuf {
        self.directory.path().join("p/volumes").join(volume)
    }

    async fn check(&self, disk: &ResolvedDisk) -> Result<(), ErrorCode> {
        self.pools.check(disk).await.map_err(complete)
    }

    async fn prepare(&self, disk: &ResolvedDisk, image: Option<&Path>) -> Result<(), ErrorCode> {
        self.pools.prepare(disk, image).await.map_err(complete)
    }

    /// Nothing is half made.
    fn assert_nothing_partial(&self) {
        assert_eq!(fs::read_dir(self.directory.path().join("p/partial")).expect("directory").count(), 0);
    }
}

fn config(directory: &Path) -> PoolConfig {
    PoolConfig { name: Name::new("p").expect("name"), path: directory.join("p"), shared: false }
}

/// The code of a refusal that says what is wrong and what to do.
fn complete(refusal: Refusal) -> ErrorCode {
    println!("{refusal:?}");
    assert!(!refusal.message.is_empty() && refusal.hint.as_ref().is_some_and(|hint| !hint.is_empty()), "{refusal:?}");
    refusal.code
}

fn disk(volume: &str, format: DiskFormat) -> ResolvedDisk {
    let volume = format!("p/{volume}").parse().expect("volume");
    ResolvedDisk { cache: CacheMode::Writeback, ..ResolvedDisk::new(volume, format) }
}

fn created(volume: &str, format: DiskFormat, mib: u64) -> ResolvedDisk {
    ResolvedDisk { create: Some(Bytes::mib(mib)), ..disk(volume, format) }
}

fn from_image(volume: &str, format: DiskFormat, kind: ImageKind) -> ResolvedDisk {
    let image = ImageRef { id: ImageId::new(Uuid::from_u128(1)), digest: "00".repeat(32), size: Bytes(1) };
    ResolvedDisk { image: Some((image, kind)), ..disk(volume, format) }
}

fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().expect(program);
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A qcow2 file with 8 MiB of data in it.
fn full_qcow2(path: &Path) {
    let path = path.to_str().expect("plain");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", path, "64M"]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 7 16M 8M", path]);
}

fn cut(path: &Path, length: u64) {
    OpenOptions::new().write(true).open(path).expect("open").set_len(length).expect("cut");
}

#[tokio::test]
async fn firmware_variables_are_copied_once_and_have_exactly_their_size() {
    let fixture = Fixture::new();
    let template = fixture.directory.path().join("template");
    fs::write(&template, vec![3; 8_192]).expect("template");
    let volume: godwit_model::VolumeRef = "p/efi".parse().expect("volume");
    let open = async |size| fixture.pools.open_exact(&volume, Bytes(size)).await.map(|_| ()).map_err(complete);
    assert_eq!(open(8_192).await, Err(ErrorCode::VolumeMissing));
    fixture.pools.prepare_copy(&volume, &template).await.expect("copied");
    open(8_192).await.expect("opened");
    assert_eq!(open(4_096).await, Err(ErrorCode::VolumeFormat));
    assert_eq!(open(16_384).await, Err(ErrorCode::VolumeFormat));
    // What the firmware wrote meanwhile stays.
    fs::write(fixture.path("efi"), vec![4; 8_192]).expect("written");
    fixture.pools.prepare_copy(&volume, &template).await.expect("left alone");
    assert_eq!(fs::read(fixture.path("efi")).expect("read"), vec![4; 8_192]);
    fixture.assert_nothing_partial();
}

#[tokio::test]
async fn volumes_are_created_whole_and_left_alone_afterwards() {
    let fixture = Fixture::new();
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let disk = ResolvedDisk { cache: CacheMode::Direct, ..created(format.driver(), format, 64) };
        assert_eq!(fixture.check(&disk).await, Err(ErrorCode::VolumeMissing));
        fixture.prepare(&disk, None).await.expect("created");
        fixture.check(&disk).await.expect("whole");
        let path = fixture.path(format.driver());
        let facts = fs::metadata(&path).expect("file");
        assert_eq!((facts.mode() & 0o777, facts.uid()), (0o600, 0));
        assert!(facts.blocks() * 512 < MIB, "sparse");
        let info = tool("qemu-img", &["info", "-f", format.driver(), path.to_str().expect("plain")]);
        assert!(info.contains("67108864 bytes"), "{info}");
        let inode = facts.ino();
        fixture.prepare(&ResolvedDisk { create: Some(Bytes::mib(1)), ..disk }, None).await.expect("there already");
        assert_eq!(fs::metadata(&path).expect("file").ino(), inode);
    }
    assert_eq!(fixture.prepare(&disk("other", DiskFormat::Raw), None).await, Err(ErrorCode::VolumeMissing));
    fixture.assert_nothing_partial();
}

#[tokio::test]
async fn one_of_many_creators_wins() {
    let fixture = Fixture::new();
    let other = Pools::open(vec![config(fixture.directory.path())]).expect("the same storage on another host");
    assert_eq!(other.facts(), fixture.pools.facts());
    let disks: Vec<ResolvedDisk> = (1..=8).map(|mib| created("same", DiskFormat::Qcow2, mib)).collect();
    let results = futures::future::join_all(disks.iter().enumerate().map(|(index, disk)| {
        let pools = if index % 2 == 0 { &fixture.pools } else { &other };
        pools.prepare(disk, None)
    }));
    assert!(results.await.iter().all(Result::is_ok));
    fixture.check(&disk("same", DiskFormat::Qcow2)).await.expect("the record is that of the winner");
    fixture.assert_nothing_partial();
}

#[tokio::test]
async fn a_volume_that_lost_its_end_is_refused() {
    let fixture = Fixture::new();
    let raw = created("raw", DiskFormat::Raw, 8);
    fixture.prepare(&raw, None).await.expect("created");
    cut(&fixture.path("raw"), 8 * MIB - 512);
    assert_eq!(fixture.check(&raw).await, Err(ErrorCode::VolumeTruncated));
    assert_eq!(fixture.check(&disk("raw", DiskFormat::Raw)).await, Err(ErrorCode::VolumeTruncated), "by its record alone");
    // Put there by hand: only the spec knows how long it should be.
    fs::write(fixture.path("byhand"), vec![0; 4_096]).expect("write");
    assert_eq!(fixture.check(&created("byhand", DiskFormat::Raw, 1)).await, Err(ErrorCode::VolumeTruncated));
    fixture.check(&disk("byhand", DiskFormat::Raw)).await.expect("of no particular length");
    fs::write(fixture.path("empty"), []).expect("write");
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        assert_eq!(fixture.check(&disk("empty", format)).await, Err(ErrorCode::VolumeTruncated));
    }

    let (path, qcow2) = (fixture.path("q"), disk("q", DiskFormat::Qcow2));
    full_qcow2(&path);
    fixture.check(&qcow2).await.expect("whole");
    let whole = fs::metadata(&path).expect("file").len();
    for length in [whole - 65_536, whole / 2, 327_680, 196_608, 65_536, 500, 50, 4, 1] {
        cut(&path, length);
        assert_eq!(fixture.check(&qcow2).await, Err(ErrorCode::VolumeTruncated), "{length} of {whole} bytes");
    }
}

#[tokio::test]
async fn a_volume_of_another_format_is_refused() {
    let fixture = Fixture::new();
    fs::write(fixture.path("noise"), vec![42; 65_536]).expect("write");
    assert_eq!(fixture.check(&disk("noise", DiskFormat::Qcow2)).await, Err(ErrorCode::VolumeFormat));
    full_qcow2(&fixture.path("q"));
    assert_eq!(fixture.check(&disk("q", DiskFormat::Raw)).await, Err(ErrorCode::VolumeFormat));
    let raw = created("raw", DiskFormat::Raw, 8);
    fixture.prepare(&raw, None).await.expect("created");
    assert_eq!(fixture.check(&disk("raw", DiskFormat::Qcow2)).await, Err(ErrorCode::VolumeFormat));
    // A guest that writes a qcow2 header into its own raw disk does not lock itself out.
    let header = fs::read(fixture.path("q")).expect("read");
    OpenOptions::new().write(true).open(fixture.path("raw")).expect("open").write_all_at(&header[..4_096], 0).expect("write");
    fixture.check(&raw).await.expect("it was made raw");
    // Damaged tables are not a disk either.
    OpenOptions::new().write(true).open(fixture.path("q")).expect("open").write_all_at(&[0xff; 8], 0x3_0000).expect("write");
    assert_eq!(fixture.check(&disk("q", DiskFormat::Qcow2)).await, Err(ErrorCode::VolumeFormat));
}

#[tokio::test]
async fn a_volume_that_refers_outside_itself_is_refused() {
    let fixture = Fixture::new();
    fs::write(fixture.path("base"), vec![0; 65_536]).expect("write");
    let path = |volume| fixture.path(volume).to_str().expect("plain").to_owned();
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &path("base"), "-F", "raw", &path("overlay")]);
    let data = format!("data_file={},data_file_raw=on", path("data"));
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &data, &path("split"), "8M"]);
    for volume in ["overlay", "split"] {
        assert_eq!(fixture.check(&disk(volume, DiskFormat::Qcow2)).await, Err(ErrorCode::VolumeFormat), "{volume}");
        let image = PathBuf::from(path(volume));
        let copy = from_image("copy", DiskFormat::Raw, ImageKind::Qcow2);
        assert_eq!(fixture.prepare(&copy, Some(&image)).await, Err(ErrorCode::ImageInvalid), "{volume} as an image");
    }
    fixture.assert_nothing_partial();
}

#[tokio::test]
async fn nothing_but_a_file_in_the_pool_is_a_volume() {
    let fixture = Fixture::new();
    let secret = fixture.directory.path().join("secret");
    fs::write(&secret, vec![0; 65_536]).expect("write");
    std::os::unix::fs::symlink(&secret, fixture.path("link")).expect("link");
    std::os::unix::fs::symlink("../../secret", fixture.path("relative")).expect("link");
    fs::create_dir(fixture.path("directory")).expect("directory");
    tool("mkfifo", &[fixture.path("pipe").to_str().expect("plain")]);
    for volume in ["link", "relative", "directory", "pipe"] {
        let disk = created(volume, DiskFormat::Raw, 1);
        assert_eq!(fixture.check(&disk).await, Err(ErrorCode::VolumeFormat), "{volume}");
        assert_eq!(fixture.pools.open_disk(&disk).map_err(complete).err(), Some(ErrorCode::VolumeFormat), "{volume}");
        fixture.prepare(&disk, None).await.expect("what is there is left alone");
        assert_eq!(fixture.pools.delete(&disk.volume).await.map_err(complete), Err(ErrorCode::VolumeFormat), "{volume}");
    }
    assert_eq!(fs::read(&secret).expect("still there").len(), 65_536);
    // The directory of volumes itself replaced.
    fs::rename(fixture.directory.path().join("p/volumes"), fixture.directory.path().join("elsewhere")).expect("rename");
    std::os::unix::fs::symlink("../elsewhere", fixture.directory.path().join("p/volumes")).expect("link");
    assert_eq!(fixture.check(&disk("pipe", DiskFormat::Raw)).await, Err(ErrorCode::VolumeFormat));
    let unknown = ResolvedDisk { volume: "q/x".parse().expect("volume"), ..disk("x", DiskFormat::Raw) };
    assert_eq!(fixture.check(&unknown).await, Err(ErrorCode::PoolUnavailable));
}

#[tokio::test]
async fn images_are_copied_between_formats() {
    let fixture = Fixture::new();
    let image = fixture.directory.path().join("image");
    full_qcow2(&image);
    fs::set_permissions(&image, fs::Permissions::from_mode(0o444)).expect("mode");
    let raw_image = fixture.directory.path().join("raw-image");
    fs::write(&raw_image, vec![9; 1_000_000]).expect("write");
    for (kind, image, format) in [
        (ImageKind::Qcow2, &image, DiskFormat::Raw),
        (ImageKind::Qcow2, &image, DiskFormat::Qcow2),
        (ImageKind::Raw, &raw_image, DiskFormat::Raw),
        (ImageKind::Raw, &raw_image, DiskFormat::Qcow2),
    ] {
        let name = format!("{}-{kind:?}", format.driver()).to_lowercase();
        let disk = ResolvedDisk { create: Some(Bytes::mib(100)), ..from_image(&name, format, kind) };
        fixture.prepare(&disk, Some(image)).await.expect("copied");
        fixture.check(&disk).await.expect("whole");
        let facts = fs::metadata(fixture.path(&name)).expect("file");
        assert_eq!((facts.uid(), facts.gid(), facts.mode() & 0o777), (0, 0, 0o600));
        let (pattern, size) = if kind == ImageKind::Raw { ("read -P 9 0 999424", 0) } else { ("read -P 7 16M 8M", 8 * MIB) };
        let path = fixture.path(&name);
        let seen = tool("qemu-io", &["-r", "-f", format.driver(), "-c", pattern, path.to_str().expect("plain")]);
        assert!(!seen.contains("failed"), "{name}: {seen}");
        assert!(facts.blocks() * 512 < size + 4 * MIB, "sparse");
        let info = tool("qemu-img", &["info", "-f", format.driver(), path.to_str().expect("plain")]);
        assert!(info.contains("104857600 bytes"), "{info}");
    }
    let small = ResolvedDisk { create: Some(Bytes::mib(1)), ..from_image("small", DiskFormat::Raw, ImageKind::Qcow2) };
    assert_eq!(fixture.prepare(&small, Some(&image)).await, Err(ErrorCode::SpecInvalid));
    let kernel = from_image("kernel", DiskFormat::Raw, ImageKind::Kernel);
    assert_eq!(fixture.prepare(&kernel, Some(&image)).await, Err(ErrorCode::ImageInvalid));
    let not = from_image("not", DiskFormat::Raw, ImageKind::Qcow2);
    assert_eq!(fixture.prepare(&not, Some(&raw_image)).await, Err(ErrorCode::ImageInvalid));
    cut(&image, 5 * MIB);
    assert_eq!(fixture.prepare(&not, Some(&image)).await, Err(ErrorCode::ImageInvalid), "truncated");
    assert_eq!(fixture.prepare(&not, None).await, Err(ErrorCode::Internal), "never fetched");
    fixture.assert_nothing_partial();
}

#[tokio::test]
async fn a_volume_that_a_qemu_holds_is_not_deleted() {
    let fixture = Fixture::new();
    let disk = created("held", DiskFormat::Qcow2, 8);
    fixture.prepare(&disk, None).await.expect("created");
    let path = fixture.path("held");
    // Interactive: it holds the file until its input ends.
    let mut holder = Command::new("qemu-io")
        .args(["-f", "qcow2"])
        .arg(&path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("qemu-io");
    let mut prompt = [0; 1];
    holder.stdout.as_mut().expect("piped").read_exact(&mut prompt).expect("it is ready");
    assert_eq!(fixture.pools.delete(&disk.volume).await.map_err(complete), Err(ErrorCode::InUse));
    assert!(path.exists());
    fixture.check(&disk).await.expect("and may be checked meanwhile");
    drop(holder.stdin.take());
    holder.wait().expect("ended");
    fixture.pools.delete(&disk.volume).await.expect("deleted");
    assert!(!path.exists());
    fixture.pools.delete(&disk.volume).await.expect("deleted already");
    assert_eq!(fs::read_dir(fixture.directory.path().join("p/records")).expect("directory").count(), 0);
}

#[tokio::test]
async fn a_disk_is_opened_twice_over() {
    let fixture = Fixture::new();
    let disk = created("d", DiskFormat::Raw, 1);
    assert_eq!(fixture.pools.open_disk(&disk).map_err(complete).err(), Some(ErrorCode::VolumeMissing));
    fixture.prepare(&disk, None).await.expect("created");
    let (read_only, read_write) = fixture.pools.open_disk(&disk).expect("opened");
    let access =
        |file: &OwnedFd| rustix::fs::fcntl_getfl(file).expect("flags") & rustix::fs::OFlags::from_bits_retain(0o3 | 0o4000);
    assert_eq!((access(&read_only), access(&read_write)), (rustix::fs::OFlags::RDONLY, rustix::fs::OFlags::RDWR));
    assert!(locks::try_make(&read_write).expect("lock"));
    assert!(!locks::try_make(File::options().write(true).open(fixture.path("d")).expect("open")).expect("lock"), "locks are seen");
    for file in [&read_only, &read_write] {
        assert!(rustix::io::fcntl_getfd(file.as_fd()).expect("flags").contains(rustix::io::FdFlags::CLOEXEC));
    }
}

#[test]
fn storage_that_went_away_or_was_exchanged_is_not_used() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("p");
    let shared = PoolConfig { shared: true, ..config(directory.path()) };
    let pools = Pools::open(vec![shared.clone()]).expect("pools");
    assert!(pools.facts().is_empty() && pools.free().is_empty() && !path.exists(), "a shared pool is mounted, not made");
    assert_eq!(pools.conditions().len(), 1);
    fs::create_dir(&path).expect("mounted");
    let identity = pools.facts().first().expect("there now").identity.clone();
    assert!(pools.free().first().expect("there").1 > Bytes(0) && pools.conditions().is_empty());
    assert_eq!(Pools::open(vec![shared.clone()]).expect("pools").facts()[0].identity, identity, "for ever");
    fs::rename(&path, directory.path().join("unmounted")).expect("unmount");
    fs::create_dir(&path).expect("the mount point");
    assert!(pools.conditions()[0].message.contains("empty"), "{:?}", pools.conditions());
    assert!(fs::read_dir(&path).expect("directory").next().is_none(), "and nothing was made there");
    let _other = Pools::open(vec![shared.clone()]).expect("pools");
    assert!(pools.conditions()[0].message.contains("other storage"), "{:?}", pools.conditions());

    assert!(matches!(Pools::open(vec![shared.clone(), shared.clone()]), Err(StorageError::Duplicate(_))));
    assert!(matches!(Pools::open(vec![PoolConfig { path: "p".into(), ..shared }]), Err(StorageError::Relative(_))));
}

#[test]
fn what_dead_makers_left_is_removed_and_what_is_being_made_is_not() {
    let fixture = Fixture::new();
    let partial = fixture.directory.path().join("p/partial");
    let make = |name: &str, age| {
        let file = File::create(partial.join(name)).expect("file");
        file.set_modified(std::time::SystemTime::now() - Duration::from_secs(age)).expect("time");
        file
    };
    let (_dead, _young, held) = (make("dead", 7_200), make("young", 60), make("held", 7_200));
    assert!(locks::try_make(&held).expect("lock"));
    let _again = Pools::open(vec![config(fixture.directory.path())]).expect("pools");
    let mut left: Vec<_> = fs::read_dir(&partial).expect("directory").map(|entry| entry.expect("entry").file_name()).collect();
    left.sort();
    assert_eq!(left, ["held", "young"]);
}

fn image_of(content: &[u8]) -> ImageRef {
    ImageRef {
        id: ImageId::new(Uuid::from_u128(1)),
        digest: blake3::hash(content).to_hex().to_string(),
        size: Bytes(content.len() as u64),
    }
}

#[tokio::test]
async fn an_image_is_fetched_once_and_only_as_it_should_be() {
    let directory = tempfile::tempdir().expect("directory");
    fs::write(directory.path().join("partial-of-a-crash"), "x").expect("write");
    let cache = ImageCache::open(directory.path().to_owned()).expect("cache");
    let content = b"a kernel in parts".as_slice();
    let image = image_of(content);
    let fetches = Arc::new(AtomicUsize::new(0));
    let parts = |parts: Vec<io::Result<&'static [u8]>>| {
        let fetches = Arc::clone(&fetches);
        move || {
            fetches.fetch_add(1, Ordering::SeqCst);
            stream::iter(parts)
        }
    };
    let bad: [(Vec<io::Result<&'static [u8]>>, ErrorCode); 4] = [
        (vec![Ok(b"a kernel in parta")], ErrorCode::ImageInvalid),
        (vec![Ok(b"a kernel")], ErrorCode::ImageInvalid),
        (vec![Ok(b"a kernel in parts"), Ok(b"!")], ErrorCode::ImageInvalid),
        (vec![Ok(b"a kernel"), Err(io::ErrorKind::ConnectionReset.into())], ErrorCode::HostFailed),
    ];
    for (stream, code) in bad {
        assert_eq!(cache.get(&image, parts(stream)).await.map_err(complete).err(), Some(code));
        assert_eq!(fs::read_dir(directory.path()).expect("directory").count(), 0, "nothing stays of it");
    }
    fetches.store(0, Ordering::SeqCst);
    let many = futures::future::join_all((0..8).map(|_| cache.get(&image, parts(vec![Ok(b"a kernel "), Ok(b"in parts")])))).await;
    assert_eq!(fetches.load(Ordering::SeqCst), 1);
    for cached in many {
        let cached = cached.expect("cached");
        let mut text = Vec::new();
        File::from(cached.file).read_to_end(&mut text).expect("read");
        assert_eq!(text, content);
        assert_eq!(fs::metadata(&cached.path).expect("file").mode() & 0o777, 0o444);
    }
    // A file that a disk has cut is no image: it is fetched again.
    cut(&directory.path().join(&image.digest), 3);
    cache.get(&image, parts(vec![Ok(b"a kernel in parts")])).await.expect("again");
    assert_eq!(fetches.load(Ordering::SeqCst), 2);
    let hostile = ImageRef { digest: "../../etc/passwd".to_owned(), ..image };
    assert_eq!(cache.get(&hostile, parts(vec![])).await.map_err(complete).err(), Some(ErrorCode::ImageInvalid));
}

#[tokio::test]
async fn a_cached_image_is_indexed_once_and_again_when_the_index_is_damaged() {
    async fn indexed(cache: &ImageCache, image: &ImageRef) -> Option<ImageIndex> {
        for _ in 0..500 {
            if let Some(found) = cache.find_indexed(image).await {
                return Some(ImageIndex::read(File::from(found.index)).expect("whole"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        None
    }
    let directory = tempfile::tempdir().expect("directory");
    let cache = ImageCache::open(directory.path().to_owned()).expect("cache");
    let content = [[7; 4096], [8; 4096]].concat();
    let image = image_of(&content);
    assert!(cache.find(&image).await.is_none() && cache.find_indexed(&image).await.is_none());
    cache.get(&image, || stream::iter([Ok(content.clone())])).await.expect("cached");
    let index = indexed(&cache, &image).await.expect("made when it is missed");
    assert_eq!((index.pages(), index.find(&[8; 4096]), index.find(&[9; 4096])), (2, Some(1), None));
    let path = directory.path().join(format!("index-{}", image.digest));
    cut(&path, 40);
    assert_eq!(indexed(&cache, &image).await, Some(index));
    // What has changed on this host is fetched anew, index and all.
    cache.forget(&blake3::hash(&content)).await;
    assert!(cache.find(&image).await.is_none() && cache.find_indexed(&image).await.is_none());
    let hostile = ImageRef { digest: "../../etc/passwd".to_owned(), ..image };
    assert!(cache.find(&hostile).await.is_none());
    assert_eq!(fs::read_dir(directory.path()).expect("directory").count(), 1, "nothing but the index");
}

#[tokio::test]
async fn checking_a_large_volume_takes_no_time_that_matters() {
    let fixture = Fixture::new();
    let disk = created("large", DiskFormat::Qcow2, 60 << 20);
    fixture.prepare(&disk, None).await.expect("60 TiB, on paper");
    let begun = Instant::now();
    fixture.check(&disk).await.expect("whole");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_volume_comes_leaves_and_comes_back_and_never_meets_another() {
    let fixture = Fixture::new();
    let (vm, other) = (VmId::new(Uuid::from_u128(1)), VmId::new(Uuid::from_u128(2)));
    let (size, some) = (Bytes::mib(4), Bytes::mib(1));
    let pools = &fixture.pools;
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let disk = created("web", format, 4);
        let volume = disk.volume.clone();
        let arrive = async |size, some, vm| pools.arrive(&disk, size, some, vm).await.map_err(complete);
        let begun = async |size, some, vm| arrive(size, some, vm).await.map(|arrived: Arrived| (arrived.begun, arrived.mark));
        let set_aside = async |mark| pools.set_aside(&disk, vm, mark).await.map_err(complete).expect("set aside");
        let (empty, mark) = begun(size, some, vm).await.expect("room");
        assert_eq!(empty, Begun::Empty);
        assert_eq!(fixture.check(&disk).await, Err(ErrorCode::VolumeMissing), "nothing starts from what arrives");
        assert_eq!(fixture.prepare(&disk, None).await, Err(ErrorCode::VolumeMissing), "nor is another made beside it");
        let held = pools.open_arriving(&disk).await.map_err(complete).expect("opened");
        // It is whole: again each time.
        for _ in 0..2 {
            pools.take_over(&disk, mark).await.map_err(complete).expect("taken over");
            assert_eq!(fixture.check(&disk).await, Ok(()));
        }
        drop(held);
        assert_eq!(begun(size, some, vm).await, Err(ErrorCode::NameTaken));
        for _ in 0..2 {
            pools.leave(&disk, vm, Generation(7)).await.map_err(complete).expect("left");
            assert_eq!(fixture.prepare(&disk, None).await, Err(ErrorCode::VolumeMissing), "nothing starts from a spare");
        }
        let (spare, mark) = begun(size, some, vm).await.expect("room");
        assert_eq!(spare, Begun::Spare(Some(Generation(7))));
        for taken_over in [false, true] {
            if taken_over {
                pools.take_over(&disk, mark).await.map_err(complete).expect("taken over");
            }
            set_aside(mark).await;
            set_aside(mark).await;
            assert_eq!(fixture.check(&disk).await, Err(ErrorCode::VolumeMissing));
            assert_eq!(begun(size, some, vm).await, Ok((Begun::Spare(None), mark)), "it was written to");
        }
        // Meanwhile somebody has put another there.
        fs::write(fixture.path("web"), [7; 4096]).expect("written");
        assert_eq!(pools.take_over(&disk, mark).await.map_err(complete), Err(ErrorCode::NameTaken));
        set_aside(mark).await;
        assert_eq!(fs::read(fixture.path("web")).expect("it stays"), [7; 4096]);
        fs::remove_file(fixture.path("web")).expect("removed");
        // Of no use: another's, or of another size.
        let (found, mark) = begun(size, some, other).await.expect("room");
        assert_eq!(found, Begun::Empty);
        set_aside(mark).await;
        let (found, mark) = begun(Bytes::mib(8), some, vm).await.expect("room");
        assert_eq!(found, Begun::Empty);
        set_aside(mark).await;
        let far_too_much = Bytes(u64::MAX / 2);
        for vm in [vm, other] {
            assert_eq!(begun(Bytes::mib(8), far_too_much, vm).await, Err(ErrorCode::NotEnoughSpace));
        }
        let (_, mark) = begun(size, some, vm).await.expect("room");
        set_aside(mark).await;
        pools.forget_spares(other).await.map_err(complete).expect("forgotten");
        let (found, mark) = begun(size, some, vm).await.expect("room");
        assert_eq!(found, Begun::Spare(None));
        // Arriving or a spare: it goes with its VM, and with its volume.
        pools.forget_spares(vm).await.map_err(complete).expect("forgotten");
        set_aside(mark).await;
        let (found, mark) = begun(size, some, vm).await.expect("room");
        assert_eq!(found, Begun::Empty);
        set_aside(mark).await;
        pools.delete(&volume).await.map_err(complete).expect("deleted");
        assert_eq!(fixture.prepare(&disk, None).await, Ok(()), "nothing is left of it");
        pools.delete(&volume).await.map_err(complete).expect("deleted");
        fixture.assert_nothing_partial();
    }
}
