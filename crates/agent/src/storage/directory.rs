//! Pools that are directories, of the host alone or of a file server.
//!
//! ```text
//!  POOL/.godwit-pool          identity of the storage, the same on every host that sees it
//!  POOL/volumes/NAME          a volume; its format is declared in the VM's spec and never probed
//!  POOL/snapshots/NAME@SNAP   a snapshot of it: a file of its own, which shares its blocks where the file system can
//!  POOL/arriving/NAME~arriving   a volume that is on its way here
//!  POOL/spares/NAME~spare     what is left of one that another host has now
//!  POOL/vaults/TEAM/          a team's vault
//!  POOL/exports/TEAM/NAME/    a snapshot as files, see [`exports`]
//!  POOL/imports/TEAM/NAME/    what people have brought: made by them, read here
//!  POOL/records/…             what each was made as; advisory, bound to the file by its inode
//!  POOL/partial/UUID          something that is being made, locked by its maker; or a successor, see [`successor`]
//! ```
//! Its identity is checked whenever it is opened, and nothing below is reached through a link.

mod exports;
mod successor;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use godwit_model::{Bytes, DiskFormat, ErrorCode, Name, Refusal, Retry};
use rustix::fs::{AtFlags, CWD, Dir, Gid, Mode, OFlags, RenameFlags, ResolveFlags, SeekFrom, Uid};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::driver::{Access, Driver, ExportRoom, Hold, Item, Left, OpenError, Record, Room, Space, Storage, Successor};
use super::{PoolConfig, locks};

const IDENTITY: &str = ".godwit-pool";
const VOLUMES: &str = "volumes";
const SNAPSHOTS: &str = "snapshots";
const RECORDS: &str = "records";
const VAULTS: &str = "vaults";
const PARTIAL: &str = "partial";
/// Directories of what is no volume any more or not yet, how names in them end, and what they are.
const LEFT: [(&str, &str, AsItem); 2] = [("spares", "~spare", Item::spare), ("arriving", "~arriving", Item::arriving)];
type AsItem = fn(&Name) -> Item;
/// Limit of the small files that this module reads.
const SMALL: u64 = 4_096;
/// A partial file is abandoned if nobody holds it and it is older than this: between making and locking it passes a moment.
const ABANDONED: Duration = Duration::from_secs(3_600);

/// A pool in a directory.
pub(super) struct Directory {
    config: PoolConfig,
    /// Known from the first time that the storage was there: another one in its place is not this pool.
    identity: OnceLock<String>,
}

/// The directory, opened.
struct Place {
    root: OwnedFd,
    /// Where the pool was declared to be.
    path: PathBuf,
    identity: String,
}

/// A record as it is written down.
#[derive(Serialize, Deserialize)]
struct RecordFile {
    format: DiskFormat,
    size: Bytes,
    /// The file that this is about: another one under the same name has no record.
    inode: u64,
    /// Of a spare.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    left: Option<Left>,
}

#[derive(Serialize, Deserialize)]
struct IdentityFile {
    identity: Uuid,
}

/// A file without a name of its own yet: removed when dropped.
struct Partial {
    place: Place,
    name: String,
    file: File,
    kept: bool,
}

impl Directory {
    /// The pool that `config` declares.
    pub(super) fn new(config: PoolConfig) -> Self {
        Self { config, identity: OnceLock::new() }
    }

    fn unavailable(&self, why: &str) -> Refusal {
        let PoolConfig { name, path, shared } = &self.config;
        Refusal::new(ErrorCode::PoolUnavailable, format!("pool {name} at {} {why}", path.display()))
            .hint(if *shared { "mount the pool's storage on this host" } else { "make the directory usable for the agent" })
            .retry(Retry::Safe)
    }
}

impl Driver for Directory {
    fn open(&self) -> Result<Box<dyn Storage>, Refusal> {
        let cannot = |error: &io::Error| self.unavailable(&format!("cannot be used: {error}"));
        let (config, known) = (&self.config, &self.identity);
        if !config.shared && known.get().is_none() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&config.path).map_err(|error| cannot(&error))?;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, &config.path, flags, Mode::empty()).map_err(|error| cannot(&error.into()))?;
        let mut place = Place { root, path: config.path.clone(), identity: String::new() };
        let found = match place.read_identity() {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound && known.get().is_none() => {
                place.found().map_err(|error| cannot(&error))?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(self.unavailable(&format!("is empty: {IDENTITY} was there before")));
            }
            Err(error) => return Err(cannot(&error)),
        };
        let expected = known.get_or_init(|| found.clone());
        if *expected != found {
            return Err(self.unavailable(&format!("is other storage than before: {found}, not {expected}")));
        }
        place.identity = found;
        Ok(Box::new(place))
    }
}

impl Place {
    fn again(&self) -> io::Result<Self> {
        Ok(Self { root: self.root.try_clone()?, path: self.path.clone(), identity: self.identity.clone() })
    }

    fn read_identity(&self) -> io::Result<String> {
        let text = self.read_small(IDENTITY)?;
        Ok(serde_json::from_slice::<IdentityFile>(&text)?.identity.to_string())
    }

    /// Makes it a pool. Two hosts may do so at once; one identity stays.
    fn found(&self) -> io::Result<String> {
        for directory in [VOLUMES, RECORDS, PARTIAL] {
            self.make(directory)?;
        }
        let identity = IdentityFile { identity: Uuid::new_v4() };
        let partial = self.write_partial(&serde_json::to_vec(&identity)?)?;
        let _won = publish(&self.root, &partial.path(), IDENTITY)?;
        rustix::fs::fsync(&self.root)?;
        self.read_identity()
    }

    fn make(&self, directory: &str) -> io::Result<()> {
        match rustix::fs::mkdirat(&self.root, directory, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// A new file to make something in.
    fn partial(&self) -> io::Result<Partial> {
        let name = Uuid::new_v4().to_string();
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let path = format!("{PARTIAL}/{name}");
        let file = File::from(rustix::fs::openat(&self.root, path, flags, Mode::RUSR | Mode::WUSR)?);
        let partial = Partial { place: self.again()?, name, file, kept: false };
        locks::try_make(&partial.file)?;
        Ok(partial)
    }

    fn copy_as(&self, from: &File, item: &Item, record: Record) -> io::Result<bool> {
        let partial = self.partial()?;
        copy(from, &partial.file)?;
        Box::new(partial).publish(item, record)
    }

    fn open_beneath(&self, path: &str, flags: OFlags) -> Result<File, Errno> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        loop {
            match rustix::fs::openat2(&self.root, path, flags, Mode::empty(), resolve) {
                // Something was renamed meanwhile.
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return other.map(File::from),
            }
        }
    }

    fn open_file(&self, path: &str, how: OFlags) -> Result<File, OpenError> {
        // Not blocking: what is under the name may be a pipe. For a file it changes nothing, and it is taken off again.
        let file = self.open_beneath(path, how | OFlags::NONBLOCK).map_err(|error| match error {
            Errno::NOENT => OpenError::Missing,
            Errno::LOOP | Errno::XDEV => OpenError::Link,
            Errno::NXIO | Errno::ISDIR => OpenError::NotAVolume,
            Errno::INVAL if how.contains(OFlags::DIRECT) => OpenError::NoDirect,
            error => OpenError::System(error.into()),
        })?;
        let flags = rustix::fs::fcntl_getfl(&file).map_err(io::Error::from)?;
        rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK).map_err(io::Error::from)?;
        if file.metadata()?.is_file() { Ok(file) } else { Err(OpenError::NotAVolume) }
    }

    fn read_small(&self, path: &str) -> io::Result<Vec<u8>> {
        let mut text = Vec::new();
        self.open_beneath(path, OFlags::RDONLY)?.take(SMALL).read_to_end(&mut text)?;
        Ok(text)
    }

    fn write_partial(&self, content: &[u8]) -> io::Result<Partial> {
        let mut partial = self.partial()?;
        partial.file.write_all(content)?;
        partial.file.sync_all()?;
        Ok(partial)
    }

    fn sync(&self, directory: &str) -> io::Result<()> {
        self.open_beneath(directory, OFlags::RDONLY | OFlags::DIRECTORY)?.sync_all()
    }

    fn read_record(&self, item: &Item, file: &File) -> io::Result<Option<RecordFile>> {
        let text = match self.read_small(&record_path(item)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text?,
        };
        let inode = file.metadata()?.ino();
        // One of another version, or damaged, is none: it is advisory.
        Ok(serde_json::from_slice::<RecordFile>(&text).ok().filter(|record| record.inode == inode))
    }

    fn write_record(&self, item: &Item, record: Record, file: &File, left: Option<Left>) -> io::Result<()> {
        let record = RecordFile { format: record.format, size: record.size, inode: file.metadata()?.ino(), left };
        let text = self.write_partial(&serde_json::to_vec(&record)?)?;
        rustix::fs::renameat(&self.root, text.path(), &self.root, record_path(item))?;
        self.sync(RECORDS)
    }
}

impl Storage for Place {
    fn identity(&self) -> &str {
        &self.identity
    }

    fn space(&self) -> io::Result<Space> {
        let facts = rustix::fs::fstatvfs(&self.root)?;
        let bytes = |blocks: u64| Bytes(blocks.saturating_mul(facts.f_frsize));
        Ok(Space { capacity: bytes(facts.f_blocks), free: bytes(facts.f_bavail) })
    }

    fn exists(&self, item: &Item) -> io::Result<bool> {
        match rustix::fs::statat(&self.root, path_of(item), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn begin(&self) -> io::Result<Box<dyn Room>> {
        Ok(Box::new(self.partial()?))
    }

    fn open(&self, item: &Item, access: Access) -> Result<File, OpenError> {
        let how = if access.write { OFlags::RDWR } else { OFlags::RDONLY };
        let direct = if access.direct { OFlags::DIRECT } else { OFlags::empty() };
        self.open_file(&path_of(item), how | direct)
    }

    fn record(&self, item: &Item, file: &File) -> io::Result<Option<Record>> {
        Ok(self.read_record(item, file)?.map(|RecordFile { format, size, .. }| Record { format, size }))
    }

    fn in_use(&self, file: &File) -> io::Result<bool> {
        locks::held_by_qemu(file)
    }

    fn hold(&self, file: &File, hold: Hold) -> io::Result<bool> {
        locks::hold(file, hold)
    }

    fn grow(&self, item: &Item, file: &File, record: Record) -> io::Result<()> {
        if file.metadata()?.len() < record.size.get() {
            file.set_len(record.size.get())?;
            file.sync_all()?;
        }
        self.write_record(item, record, file, None)
    }

    fn vault(&self, team: &Name, uid: u32) -> io::Result<File> {
        let path = format!("{VAULTS}/{team}");
        self.make(VAULTS)?;
        self.make(&path)?;
        let directory = self.open_beneath(&path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        match rustix::fs::fchown(&directory, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid))) {
            // A file server that takes root for nobody refuses, and has made it nobody's already.
            Err(Errno::PERM) if directory.metadata()?.uid() == uid => Ok(directory),
            result => result.map(|()| directory).map_err(io::Error::from),
        }
    }

    fn begin_export(&self, team: &Name, name: &Name) -> io::Result<Box<dyn ExportRoom>> {
        Self::begin_export(self, team, name)
    }

    fn open_brought(&self, team: &Name, name: &Name, file: &str) -> Result<File, OpenError> {
        Self::open_brought(self, team, name, file)
    }

    fn snapshot(&self, volume: &File, as_item: &Item, record: Record) -> io::Result<bool> {
        self.make(SNAPSHOTS)?;
        self.copy_as(volume, as_item, record)
    }

    fn clone_item(&self, from: &File, as_item: &Item, record: Record) -> io::Result<bool> {
        self.copy_as(from, as_item, record)
    }

    fn snapshots(&self, volume: &Name) -> io::Result<Vec<Name>> {
        let directory = match self.open_beneath(SNAPSHOTS, OFlags::RDONLY | OFlags::DIRECTORY) {
            Err(Errno::NOENT) => return Ok(vec![]),
            directory => directory?,
        };
        let of_volume = format!("{volume}@");
        let mut names = Vec::new();
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let name = entry.file_name().to_str().ok().and_then(|file| file.strip_prefix(&of_volume));
            names.extend(name.and_then(|name| Name::new(name).ok()));
        }
        names.sort();
        Ok(names)
    }

    fn begin_successor(&self) -> io::Result<(Successor, File)> {
        Self::begin_successor(self)
    }

    fn succeed(&self, item: &Item, successor: &Successor) -> io::Result<()> {
        Self::succeed(self, item, successor)
    }

    fn withdraw(&self, item: &Item, successor: &Successor) -> io::Result<()> {
        Self::withdraw(self, item, successor)
    }

    fn settle(&self, item: &Item, successor: &Successor) -> io::Result<()> {
        Self::settle(self, item, successor)
    }

    fn rename(&self, from: &Item, to: &Item, left: Option<Left>, format: DiskFormat) -> io::Result<bool> {
        self.make(to.directory())?;
        let file = match self.open_beneath(&path_of(from), OFlags::RDONLY | OFlags::NONBLOCK) {
            Err(Errno::NOENT) if self.exists(to)? => {
                // It may have ended before its record was written.
                let file = self.open_beneath(&path_of(to), OFlags::RDONLY | OFlags::NONBLOCK)?;
                if self.read_record(to, &file)?.is_none() {
                    self.write_record(to, Record { format, size: Bytes(file.metadata()?.len()) }, &file, left)?;
                }
                return Ok(true);
            }
            file => file?,
        };
        let record = self.record(from, &file)?;
        match rustix::fs::renameat_with(&self.root, path_of(from), &self.root, path_of(to), RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => return Ok(false),
            // A file server that cannot do that at once.
            Err(Errno::INVAL | Errno::NOSYS) => {
                if self.exists(to)? {
                    return Ok(false);
                }
                rustix::fs::renameat(&self.root, path_of(from), &self.root, path_of(to))?;
            }
            renamed => renamed?,
        }
        self.sync(to.directory())?;
        self.sync(from.directory())?;
        let record = record.unwrap_or(Record { format, size: Bytes(file.metadata()?.len()) });
        self.write_record(to, record, &file, left)?;
        match rustix::fs::unlinkat(&self.root, record_path(from), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    fn left(&self, item: &Item, file: &File) -> io::Result<Option<Left>> {
        Ok(self.read_record(item, file)?.and_then(|record| record.left))
    }

    fn leftovers(&self) -> io::Result<Vec<Item>> {
        let mut found = Vec::new();
        for (kind, (name, mark, item)) in (0..).zip(LEFT) {
            let directory = match self.open_beneath(name, OFlags::RDONLY | OFlags::DIRECTORY) {
                Err(Errno::NOENT) => continue,
                directory => directory?,
            };
            for entry in Dir::read_from(&directory)? {
                let entry = entry?;
                let volume = entry.file_name().to_str().ok().and_then(|file| file.strip_suffix(mark));
                let Some(volume) = volume.and_then(|volume| Name::new(volume).ok()) else { continue };
                let facts = rustix::fs::statat(&directory, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)?;
                found.push((kind, facts.st_ctime, volume, item));
            }
        }
        found.sort_by_key(|(kind, changed, ..)| (*kind, *changed));
        Ok(found.into_iter().map(|(_, _, volume, item)| item(&volume)).collect())
    }

    fn remove(&self, item: &Item) -> io::Result<()> {
        for path in [record_path(item), path_of(item)] {
            match rustix::fs::unlinkat(&self.root, path, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        match self.sync(item.directory()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn remove_abandoned(&self) {
        self.remove_abandoned_exports();
        let Ok(directory) = self.open_beneath(PARTIAL, OFlags::RDONLY | OFlags::DIRECTORY) else { return };
        let Ok(entries) = Dir::read_from(&directory) else { return };
        for entry in entries.filter_map(Result::ok) {
            let Ok(file) =
                rustix::fs::openat(&directory, entry.file_name(), OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
            else {
                continue;
            };
            let file = File::from(file);
            let old =
                file.metadata().and_then(|facts| facts.modified()).is_ok_and(|at| at.elapsed().is_ok_and(|age| age > ABANDONED));
            if old && locks::try_make(&file).unwrap_or(false) {
                let _ = rustix::fs::unlinkat(&directory, entry.file_name(), AtFlags::empty());
            }
        }
    }
}

impl Partial {
    fn path(&self) -> String {
        format!("{PARTIAL}/{}", self.name)
    }

    /// Leaves it where it is, for a later life of this process to find by its name: abandoned once nobody holds its lock any more.
    fn keep(mut self) -> io::Result<(String, File)> {
        let file = self.file.try_clone()?;
        self.kept = true;
        Ok((self.name.clone(), file))
    }
}

impl Room for Partial {
    fn file(&self) -> &File {
        &self.file
    }

    fn publish(self: Box<Self>, item: &Item, record: Record) -> io::Result<bool> {
        self.file.sync_all()?;
        self.place.make(item.directory())?;
        if !publish(&self.place.root, &self.path(), &path_of(item))? {
            return Ok(false);
        }
        self.place.sync(item.directory())?;
        self.place.write_record(item, record, &self.file, None)?;
        Ok(true)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        // Gone already if it was renamed.
        let _ = rustix::fs::unlinkat(&self.place.root, self.path(), AtFlags::empty());
    }
}

/// Gives a finished file its name, unless that is taken; `false` if it is.
fn publish(root: impl AsFd, from: &str, to: &str) -> io::Result<bool> {
    match rustix::fs::linkat(&root, from, &root, to, AtFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) => {
            // A server that answers a repeated request: the first one was ours.
            let inode = |path| rustix::fs::statat(&root, path, AtFlags::SYMLINK_NOFOLLOW).map(|facts| facts.st_ino);
            Ok(inode(from)? == inode(to)?)
        }
        // A file system without hard links.
        Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS) => {
            match rustix::fs::renameat_with(&root, from, &root, to, RenameFlags::NOREPLACE) {
                Err(Errno::EXIST) => Ok(false),
                other => Ok(other.map(|()| true)?),
            }
        }
        Err(error) => Err(error.into()),
    }
}

/// Copies all of a file into an empty one: by sharing its blocks where the file system can, or else what is data in it, within the kernel.
fn copy(from: &File, to: &File) -> io::Result<()> {
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut at = 0;
    while at < length {
        let (data, hole) = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => break,
            // A file system that does not know holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => (at, length),
            data => {
                let data = data?;
                (data, rustix::fs::seek(from, SeekFrom::Hole(data))?)
            }
        };
        copy_range(from, to, data, hole.min(length))?;
        at = hole;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, at: u64, end: u64) -> io::Result<()> {
    let (mut read, mut written) = (at, at);
    while read < end {
        let piece = usize::try_from(end - read).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(from, Some(&mut read), to, Some(&mut written), piece) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(Errno::INTR) => {}
            // Two file systems, or one that cannot.
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => return copy_through_memory(from, to, read, end),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_through_memory(from: &File, to: &File, mut at: u64, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    while at < end {
        let most = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
        let piece = buffer.get_mut(..most).unwrap_or_default();
        from.read_exact_at(piece, at)?;
        to.write_all_at(piece, at)?;
        at += most as u64;
    }
    Ok(())
}

fn path_of(item: &Item) -> String {
    format!("{}/{item}", item.directory())
}

fn record_path(item: &Item) -> String {
    format!("{RECORDS}/{item}")
}
