//! The suite passes on a directory, whole and nearly full, and finds each fault of storage that has one.

use std::path::Path;
use std::sync::OnceLock;

use super::super::PoolConfig;
use super::super::directory::Directory;
use super::super::driver::{ExportRoom, Room, Space, Successor};
use super::*;

fn directory(path: &Path) -> Directory {
    Directory::new(PoolConfig { name: name(), path: path.to_owned(), shared: false })
}

fn name() -> Name {
    Name::new("p").expect("name")
}

fn beside_the_program() -> tempfile::TempDir {
    // Not in /tmp: that may be a file system without direct I/O.
    let program = std::env::current_exe().expect("path");
    tempfile::tempdir_in(program.parent().expect("directory")).expect("directory")
}

/// Nothing of the suite is left in the pool.
fn assert_clean(path: &Path) {
    for directory in ["volumes", "snapshots", "records", "partial"] {
        let left: Vec<_> = std::fs::read_dir(path.join(directory)).expect("directory").collect();
        assert!(left.is_empty(), "{directory}: {left:?}");
    }
}

#[test]
fn a_directory_passes() {
    let place = beside_the_program();
    let tried = run(&name(), &directory(place.path()), &directory(place.path()));
    assert_eq!(tried.len(), 12);
    for Tried { what, outcome } in tried {
        match what {
            // There is more space than may be filled, or there is not: both are tried below.
            "out of space" => assert!(outcome.is_ok(), "{outcome:?}"),
            _ => assert_eq!(outcome, Ok(Seen::Right), "{what}"),
        }
    }
    assert_clean(place.path());
}

#[test]
fn a_directory_that_becomes_full_passes_too() {
    let place = beside_the_program();
    let mount = Mount::tmpfs(place.path(), 96 << 20);
    let tried = run(&name(), &directory(place.path()), &directory(place.path()));
    for Tried { what, outcome } in tried {
        match what {
            // Old kernels have no direct I/O on a tmpfs.
            "direct I/O" => assert!(outcome.is_ok(), "{outcome:?}"),
            _ => assert_eq!(outcome, Ok(Seen::Right), "{what}"),
        }
    }
    assert_clean(place.path());
    drop(mount);
}

/// A small file system, until it is dropped.
struct Mount<'a>(&'a Path);

impl<'a> Mount<'a> {
    fn tmpfs(at: &'a Path, size: u64) -> Self {
        let options = std::ffi::CString::new(format!("size={size}")).expect("plain");
        rustix::mount::mount("godwit-test", at, "tmpfs", rustix::mount::MountFlags::empty(), options.as_c_str()).expect("mounted");
        Self(at)
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

/// What is wrong with a storage.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    OtherIdentity,
    ReplacesVolumes,
    ForgetsRecords,
    SharesClones,
    ForgetsToGrow,
    SharesSnapshots,
    ForgetsSnapshots,
    NeverGivesBack,
    RenamesOver,
    ForgetsWhose,
    IgnoresQemu,
    LocksNothing,
}

/// A directory with a fault.
struct Faulty {
    directory: Directory,
    path: std::path::PathBuf,
    fault: Fault,
}

struct FaultyStorage {
    inner: Box<dyn Storage>,
    path: std::path::PathBuf,
    fault: Fault,
    identity: OnceLock<String>,
}

struct FaultyRoom {
    inner: Box<dyn Room>,
    path: std::path::PathBuf,
    replaces: bool,
}

impl Driver for Faulty {
    fn open(&self) -> Result<Box<dyn Storage>, Refusal> {
        let (inner, path, fault) = (self.directory.open()?, self.path.clone(), self.fault);
        Ok(Box::new(FaultyStorage { inner, path, fault, identity: OnceLock::new() }))
    }
}

impl FaultyStorage {
    /// A second name for the same file instead of a copy.
    fn link(&self, from: &File, to: String) -> bool {
        let source = std::fs::read_link(format!("/proc/self/fd/{}", from.as_raw_fd())).expect("path");
        std::fs::hard_link(source, self.path.join(to)).is_ok()
    }
}

impl Storage for FaultyStorage {
    fn vault(&self, team: &Name, uid: u32) -> io::Result<File> {
        self.inner.vault(team, uid)
    }
    fn begin_export(&self, team: &Name, name: &Name) -> io::Result<Box<dyn ExportRoom>> {
        self.inner.begin_export(team, name)
    }
    fn open_brought(&self, team: &Name, name: &Name, file: &str) -> Result<File, OpenError> {
        self.inner.open_brought(team, name, file)
    }

    fn identity(&self) -> &str {
        match self.fault {
            Fault::OtherIdentity => self.identity.get_or_init(|| Uuid::new_v4().to_string()),
            _ => self.inner.identity(),
        }
    }
    fn space(&self) -> io::Result<Space> {
        self.inner.space()
    }
    fn exists(&self, item: &Item) -> io::Result<bool> {
        self.inner.exists(item)
    }
    fn begin(&self) -> io::Result<Box<dyn Room>> {
        let inner = self.inner.begin()?;
        Ok(Box::new(FaultyRoom { inner, path: self.path.clone(), replaces: self.fault == Fault::ReplacesVolumes }))
    }
    fn open(&self, item: &Item, access: Access) -> Result<File, OpenError> {
        self.inner.open(item, access)
    }
    fn record(&self, item: &Item, file: &File) -> io::Result<Option<Record>> {
        if self.fault == Fault::ForgetsRecords { Ok(None) } else { self.inner.record(item, file) }
    }
    fn in_use(&self, file: &File) -> io::Result<bool> {
        if self.fault == Fault::IgnoresQemu { Ok(false) } else { self.inner.in_use(file) }
    }
    fn hold(&self, file: &File, hold: Hold) -> io::Result<bool> {
        if self.fault == Fault::LocksNothing { Ok(!self.inner.in_use(file)?) } else { self.inner.hold(file, hold) }
    }
    fn grow(&self, item: &Item, file: &File, record: Record) -> io::Result<()> {
        if self.fault == Fault::ForgetsToGrow { Ok(()) } else { self.inner.grow(item, file, record) }
    }
    fn snapshot(&self, volume: &File, as_item: &Item, record: Record) -> io::Result<bool> {
        if self.fault == Fault::SharesSnapshots {
            std::fs::create_dir_all(self.path.join("snapshots"))?;
            return Ok(self.link(volume, format!("snapshots/{as_item}")));
        }
        self.inner.snapshot(volume, as_item, record)
    }
    fn clone_item(&self, from: &File, as_item: &Item, record: Record) -> io::Result<bool> {
        if self.fault == Fault::SharesClones {
            return Ok(self.link(from, format!("volumes/{as_item}")));
        }
        self.inner.clone_item(from, as_item, record)
    }
    fn snapshots(&self, volume: &Name) -> io::Result<Vec<Name>> {
        if self.fault == Fault::ForgetsSnapshots { Ok(vec![]) } else { self.inner.snapshots(volume) }
    }
    fn begin_successor(&self) -> io::Result<(Successor, File)> {
        self.inner.begin_successor()
    }
    fn succeed(&self, item: &Item, successor: &Successor) -> io::Result<()> {
        self.inner.succeed(item, successor)
    }
    fn withdraw(&self, item: &Item, successor: &Successor) -> io::Result<()> {
        if self.fault == Fault::NeverGivesBack { Ok(()) } else { self.inner.withdraw(item, successor) }
    }
    fn settle(&self, item: &Item, successor: &Successor) -> io::Result<()> {
        self.inner.settle(item, successor)
    }
    fn rename(&self, from: &Item, to: &Item, left: Option<Left>, format: DiskFormat) -> io::Result<bool> {
        if self.fault == Fault::RenamesOver {
            self.inner.remove(to)?;
        }
        self.inner.rename(from, to, left, format)
    }
    fn left(&self, item: &Item, file: &File) -> io::Result<Option<Left>> {
        if self.fault == Fault::ForgetsWhose { Ok(None) } else { self.inner.left(item, file) }
    }
    fn leftovers(&self) -> io::Result<Vec<Item>> {
        self.inner.leftovers()
    }
    fn remove(&self, item: &Item) -> io::Result<()> {
        self.inner.remove(item)
    }
    fn remove_abandoned(&self) {
        self.inner.remove_abandoned();
    }
}

impl Room for FaultyRoom {
    fn file(&self) -> &File {
        self.inner.file()
    }
    fn publish(self: Box<Self>, item: &Item, record: Record) -> io::Result<bool> {
        if self.replaces {
            match std::fs::remove_file(self.path.join(format!("volumes/{item}"))) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        self.inner.publish(item, record)
    }
}

#[test]
fn each_fault_of_storage_is_found() {
    let faults = [
        (Fault::OtherIdentity, "identity"),
        (Fault::ReplacesVolumes, "create"),
        (Fault::ForgetsRecords, "create"),
        (Fault::SharesClones, "clone"),
        (Fault::ForgetsToGrow, "grow"),
        (Fault::SharesSnapshots, "snapshot"),
        (Fault::ForgetsSnapshots, "snapshot"),
        (Fault::NeverGivesBack, "succeed"),
        (Fault::RenamesOver, "travel"),
        (Fault::ForgetsWhose, "travel"),
        (Fault::IgnoresQemu, "use by QEMU"),
        (Fault::LocksNothing, "hold against QEMU"),
    ];
    for (fault, found_by) in faults {
        let place = beside_the_program();
        let view = || Faulty { directory: directory(place.path()), path: place.path().to_owned(), fault };
        let tried = run(&name(), &view(), &view());
        let found: Vec<_> = tried.iter().filter_map(|tried| Some((tried.what, tried.outcome.clone().err()?))).collect();
        println!("{found:?}");
        assert!(found.iter().any(|(what, _)| *what == found_by), "{found_by}: {found:?}");
    }
}
