//! A pool's directory, opened: its identity was checked, and nothing below is reached through a link.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::sync::OnceLock;
use std::time::Duration;

use godwit_model::{Bytes, DiskFormat, ErrorCode, Name, Refusal, Retry};
use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{PoolConfig, locks, refusal};

const IDENTITY: &str = ".godwit-pool";
pub(super) const VOLUMES: &str = "volumes";
const RECORDS: &str = "records";
pub(super) const PARTIAL: &str = "partial";
/// Limit of the small files that this module reads.
const SMALL: u64 = 4_096;
/// A partial file is abandoned if nobody holds it and it is older than this: between making and locking it passes a moment.
const ABANDONED: Duration = Duration::from_secs(3_600);

/// An opened pool.
pub(super) struct Place {
    pool: Name,
    pub(super) root: OwnedFd,
}

/// Size of the file system of a pool.
pub(super) struct Space {
    pub(super) capacity: Bytes,
    pub(super) free: Bytes,
}

/// What a volume was created as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Declared format.
    pub(super) format: DiskFormat,
    /// Size that the guest was promised.
    pub(super) size: Bytes,
    /// The file that this is about: another one under the same name has no record.
    inode: u64,
}

#[derive(Serialize, Deserialize)]
struct Identity {
    identity: Uuid,
}

/// A file that is not yet a volume: removed when dropped.
pub(super) struct Partial {
    place: Place,
    name: String,
    /// Open for reading and writing.
    pub(super) file: File,
    kept: bool,
}

impl Place {
    /// Opens the pool, and makes it one when it is seen for the first time. Storage that was there and is not any more, or is another one,
    /// is refused: an empty mount point must not be filled.
    pub(super) fn open(config: &PoolConfig, known: &OnceLock<String>) -> Result<Self, Refusal> {
        let unavailable = |why: String| {
            Refusal::new(ErrorCode::PoolUnavailable, format!("pool {} at {} {why}", config.name, config.path.display()))
                .hint(if config.shared {
                    "mount the pool's storage on this host"
                } else {
                    "make the directory usable for the agent"
                })
                .retry(Retry::Safe)
        };
        let cannot = |error: &io::Error| unavailable(format!("cannot be used: {error}"));
        if !config.shared && known.get().is_none() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&config.path).map_err(|error| cannot(&error))?;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, &config.path, flags, Mode::empty()).map_err(|error| cannot(&error.into()))?;
        let place = Self { pool: config.name.clone(), root };
        let found = match place.read_identity() {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound && known.get().is_none() => {
                place.found().map_err(|error| cannot(&error))?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(unavailable(format!("is empty: {IDENTITY} was there before")));
            }
            Err(error) => return Err(cannot(&error)),
        };
        let expected = known.get_or_init(|| found.clone());
        if *expected != found {
            return Err(unavailable(format!("is other storage than before: {found}, not {expected}")));
        }
        Ok(place)
    }

    fn read_identity(&self) -> io::Result<String> {
        let text = self.read_small(IDENTITY)?;
        Ok(serde_json::from_slice::<Identity>(&text)?.identity.to_string())
    }

    /// Makes it a pool. Two hosts may do so at once; one identity stays.
    fn found(&self) -> io::Result<String> {
        for directory in [VOLUMES, RECORDS, PARTIAL] {
            match rustix::fs::mkdirat(&self.root, directory, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let identity = Identity { identity: Uuid::new_v4() };
        let partial = self.write_partial(&serde_json::to_vec(&identity)?)?;
        let _won = publish(&self.root, &partial.path(), IDENTITY)?;
        rustix::fs::fsync(&self.root)?;
        self.read_identity()
    }

    /// Size and free space.
    pub(super) fn space(&self) -> io::Result<Space> {
        let facts = rustix::fs::fstatvfs(&self.root)?;
        let bytes = |blocks: u64| Bytes(blocks.saturating_mul(facts.f_frsize));
        Ok(Space { capacity: bytes(facts.f_blocks), free: bytes(facts.f_bavail) })
    }

    /// Whether anything has the volume's name.
    pub(super) fn exists(&self, volume: &Name) -> Result<bool, Refusal> {
        match rustix::fs::statat(&self.root, volume_path(volume), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(refusal::system(&format!("look for volume {}/{volume}", self.pool), &error.into())),
        }
    }

    /// Opens a volume. What is no file may be opened too: see its metadata.
    pub(super) fn open_volume(&self, volume: &Name, access: OFlags) -> Result<File, Errno> {
        // Not blocking: what is under the name may be a pipe. For a file it changes nothing, and it is taken off again.
        let file = self.open_beneath(&volume_path(volume), access | OFlags::NONBLOCK)?;
        rustix::fs::fcntl_setfl(&file, rustix::fs::fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
        Ok(file)
    }

    /// What the volume in `file` was created as, if that is known.
    pub(super) fn record(&self, volume: &Name, file: &File) -> io::Result<Option<Record>> {
        let text = match self.read_small(&record_path(volume)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text?,
        };
        let inode = file.metadata()?.ino();
        // One of another version, or damaged, is none: it is advisory.
        Ok(serde_json::from_slice::<Record>(&text).ok().filter(|record| record.inode == inode))
    }

    /// Removes a volume and its record.
    pub(super) fn remove(&self, volume: &Name) -> io::Result<()> {
        for path in [record_path(volume), volume_path(volume)] {
            match rustix::fs::unlinkat(&self.root, path, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.sync(VOLUMES)
    }

    /// A new file to make a volume in.
    pub(super) fn partial(&self) -> io::Result<Partial> {
        let name = Uuid::new_v4().to_string();
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let path = format!("{PARTIAL}/{name}");
        let file = File::from(rustix::fs::openat(&self.root, path, flags, Mode::RUSR | Mode::WUSR)?);
        let place = Self { pool: self.pool.clone(), root: self.root.try_clone()? };
        let partial = Partial { place, name, file, kept: false };
        locks::try_make(&partial.file)?;
        Ok(partial)
    }

    /// Removes what makers that died have left.
    pub(super) fn remove_abandoned(&self) {
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

    pub(super) fn sync(&self, directory: &str) -> io::Result<()> {
        self.open_beneath(directory, OFlags::RDONLY | OFlags::DIRECTORY)?.sync_all()
    }
}

impl Partial {
    fn path(&self) -> String {
        format!("{PARTIAL}/{}", self.name)
    }

    /// Leaves it where it is, for a later life of this process to find by its name: abandoned once nobody holds its lock any more.
    pub(super) fn keep(mut self) -> io::Result<(String, File)> {
        let file = self.file.try_clone()?;
        self.kept = true;
        Ok((self.name.clone(), file))
    }

    /// Gives the file the volume's name, and writes down what it is. `false`: there is a volume already, which stays.
    pub(super) fn publish(self, volume: &Name, format: DiskFormat, size: Bytes) -> io::Result<bool> {
        self.file.sync_all()?;
        if !publish(&self.place.root, &self.path(), &volume_path(volume))? {
            return Ok(false);
        }
        self.place.sync(VOLUMES)?;
        let record = Record { format, size, inode: self.file.metadata()?.ino() };
        let text = self.place.write_partial(&serde_json::to_vec(&record)?)?;
        rustix::fs::renameat(&self.place.root, text.path(), &self.place.root, record_path(volume))?;
        self.place.sync(RECORDS)?;
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

pub(super) fn volume_path(volume: &Name) -> String {
    format!("{VOLUMES}/{volume}")
}

fn record_path(volume: &Name) -> String {
    format!("{RECORDS}/{volume}")
}
