//! The shelf: a directory with at most one stay for each VM, and a limit of bytes for all of them.
//!
//! ```text
//! begin ──▶ ID.N.draft ──written, synced──▶ commit: renamed to ID.stay, directory synced ──▶ the oldest others go, beyond the limit
//! ```
//! After a crash at any step there is the old stay of a VM, the new one, or none, and each is whole: drafts are thrown away by the next
//! [`Shelf::open`]. Stays can be dispensed with: whatever is in the way of keeping one is an error for the log, and nothing waits for it.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use godwit_model::{Bytes, VmId};
use rustix::fs::{AtFlags, Dir, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::{Identity, StayKey, StayWriter};

/// How much disk a shelf may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// All stays together. While a draft is written it comes on top.
    pub stays: Bytes,
    /// What must stay free on the file system.
    pub reserve: Bytes,
}

/// What a shelf holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// How many stays.
    pub stays: usize,
    /// Their bytes.
    pub bytes: Bytes,
}

/// Why a stay is not kept, or not found.
#[derive(Debug, thiserror::Error)]
pub enum ShelfError {
    /// The file system refused.
    #[error("the shelf of stays cannot be {action}")]
    Io {
        /// What was done.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another process has it.
    #[error("the shelf of stays is in use")]
    Busy,
    /// The disk is too full to begin.
    #[error("there are {free} free where the stays are, and {reserve} must stay free")]
    NoRoom {
        /// What is free.
        free: Bytes,
        /// What must stay free.
        reserve: Bytes,
    },
    /// The draft is longer than it may be.
    #[error("the stay has {bytes}, and may have {limit}")]
    TooLong {
        /// How long it is.
        bytes: Bytes,
        /// How long it may be.
        limit: Bytes,
    },
    /// A newer draft of the same VM was begun, or the VM's stay was removed.
    #[error("the draft of a stay was superseded")]
    Superseded,
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> ShelfError {
    move |source| ShelfError::Io { action, source }
}

/// A directory of stays. One process has it at a time; clones are the same shelf.
#[derive(Clone, Debug)]
pub struct Shelf {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    dir: File,
    limits: Limits,
    drafts: Mutex<Drafts>,
    #[cfg(test)]
    faults: tests::Faults,
}

/// The newest draft of each VM.
#[derive(Debug, Default)]
struct Drafts {
    of: BTreeMap<VmId, u64>,
    last: u64,
}

/// What changes the directory, or makes a change last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Create,
    SyncFile,
    Rename,
    Remove,
    SyncDirectory,
}

struct Kept {
    vm: VmId,
    bytes: u64,
    written: (i64, u64),
}

enum Name {
    Stay(VmId),
    Draft,
}

fn stay_name(vm: VmId) -> String {
    format!("{vm}.stay")
}

fn draft_name(vm: VmId, number: u64) -> String {
    format!("{vm}.{number}.draft")
}

/// What a name of ours says. Whatever else is in the directory is left alone.
fn parse_name(name: &str) -> Option<Name> {
    let vm = |text: &str| text.parse::<VmId>().ok().filter(|vm| vm.to_string() == text);
    if let Some(text) = name.strip_suffix(".stay") {
        return vm(text).map(Name::Stay);
    }
    let (text, number) = name.strip_suffix(".draft")?.split_once('.')?;
    number.parse::<u64>().ok()?;
    vm(text).map(|_| Name::Draft)
}

impl Shelf {
    /// Opens, or begins, the shelf in `dir`; what a crash left half-written goes, and what is beyond the limit.
    ///
    /// # Errors
    /// [`ShelfError::Busy`], [`ShelfError::Io`]
    pub fn open(dir: &Path, limits: Limits) -> Result<Self, ShelfError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(failed("made"))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::open(dir, flags, Mode::empty()).map_err(io::Error::from);
        let dir = File::from(opened.map_err(failed("opened"))?);
        match rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(ShelfError::Busy),
            Err(error) => return Err(failed("locked")(error.into())),
        }
        rustix::fs::fchmod(&dir, Mode::RWXU).map_err(io::Error::from).map_err(failed("made private"))?;
        let shared = Shared {
            dir,
            limits,
            drafts: Mutex::default(),
            #[cfg(test)]
            faults: tests::Faults::default(),
        };
        shared.clear().and_then(|()| shared.evict(None)).map_err(failed("cleared"))?;
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Begins a stay of a VM. An earlier draft of the same VM is superseded; the VM's stay remains until this one is committed.
    ///
    /// # Errors
    /// [`ShelfError::NoRoom`], [`ShelfError::Io`]
    pub fn begin(&self, vm: VmId) -> Result<Draft, ShelfError> {
        let Limits { stays, reserve } = self.shared.limits;
        let facts = rustix::fs::fstatvfs(&self.shared.dir).map_err(io::Error::from).map_err(failed("measured"))?;
        let free = Bytes(facts.f_bavail.saturating_mul(facts.f_frsize));
        let room = free.0.checked_sub(reserve.0).filter(|room| *room > 0).ok_or(ShelfError::NoRoom { free, reserve })?;
        let mut drafts = self.shared.drafts();
        self.shared.supersede(&mut drafts, vm).map_err(failed("cleared"))?;
        drafts.last += 1;
        let number = drafts.last;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let created = self.shared.act(Step::Create, || {
            Ok(rustix::fs::openat(&self.shared.dir, draft_name(vm, number), flags, Mode::RUSR | Mode::WUSR)?)
        });
        let file = File::from(created.map_err(failed("written"))?);
        drafts.of.insert(vm, number);
        Ok(Draft { shared: Arc::clone(&self.shared), vm, number, file, limit: Bytes(room.min(stays.0)), kept: false })
    }

    /// The stay of a VM, for reading, if there is one. It stays where it is, and readable even if it is replaced or evicted meanwhile.
    ///
    /// # Errors
    /// [`ShelfError::Io`]
    pub fn find(&self, vm: VmId) -> Result<Option<File>, ShelfError> {
        // Not blocking: what is under the name may be a pipe.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.shared.dir, stay_name(vm), flags, Mode::empty()) {
            Ok(file) => {
                let file = File::from(file);
                let regular = file.metadata().map_err(failed("read"))?.is_file();
                Ok(regular.then_some(file))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(failed("read")(error.into())),
        }
    }

    /// Removes the stay of a VM, and supersedes a draft of it, so that nothing of the VM is kept until somebody begins anew.
    ///
    /// # Errors
    /// [`ShelfError::Io`]
    pub fn remove(&self, vm: VmId) -> Result<(), ShelfError> {
        let mut drafts = self.shared.drafts();
        let removed = self.shared.supersede(&mut drafts, vm).and_then(|()| self.shared.remove(&stay_name(vm)));
        removed.and_then(|()| self.shared.sync()).map_err(failed("cleared"))
    }

    /// How much the stays take; drafts are not counted.
    ///
    /// # Errors
    /// [`ShelfError::Io`]
    pub fn usage(&self) -> Result<Usage, ShelfError> {
        let kept = self.shared.kept().map_err(failed("read"))?;
        Ok(Usage { stays: kept.len(), bytes: Bytes(kept.iter().map(|kept| kept.bytes).sum()) })
    }
}

impl Shared {
    fn drafts(&self) -> MutexGuard<'_, Drafts> {
        // Nothing is left half-changed: each change is one insertion or removal.
        self.drafts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything that changes the directory goes through here, so that tests can fail and crash at each.
    #[cfg_attr(not(test), expect(unused_variables, reason = "for tests"))]
    fn act<T>(&self, step: Step, action: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        #[cfg(test)]
        self.faults.meet(step)?;
        action()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.act(Step::Remove, || match rustix::fs::unlinkat(&self.dir, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.act(Step::SyncDirectory, || Ok(rustix::fs::fsync(&self.dir)?))
    }

    /// Removes the draft of a VM. Its owner finds out when it commits.
    fn supersede(&self, drafts: &mut Drafts, vm: VmId) -> io::Result<()> {
        if let Some(number) = drafts.of.get(&vm) {
            self.remove(&draft_name(vm, *number))?;
            drafts.of.remove(&vm);
        }
        Ok(())
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.dir)? {
            names.extend(entry?.file_name().to_str().ok().map(str::to_owned));
        }
        Ok(names)
    }

    /// Removes all drafts.
    fn clear(&self) -> io::Result<()> {
        self.names()?.iter().filter(|name| matches!(parse_name(name), Some(Name::Draft))).try_for_each(|name| self.remove(name))
    }

    fn kept(&self) -> io::Result<Vec<Kept>> {
        let mut kept = Vec::new();
        for name in self.names()? {
            let Some(Name::Stay(vm)) = parse_name(&name) else { continue };
            match rustix::fs::statat(&self.dir, &*name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(facts) if FileType::from_raw_mode(facts.st_mode) == FileType::RegularFile => {
                    let bytes = u64::try_from(facts.st_size).unwrap_or(0);
                    kept.push(Kept { vm, bytes, written: (facts.st_mtime, facts.st_mtime_nsec) });
                }
                Ok(_) | Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(kept)
    }

    /// Removes the oldest stays but that of `spared`, until the others fit.
    fn evict(&self, spared: Option<VmId>) -> io::Result<()> {
        let mut kept = self.kept()?;
        kept.sort_by_key(|kept| (kept.written, kept.vm));
        let mut bytes: u64 = kept.iter().map(|kept| kept.bytes).sum();
        for old in kept.iter().filter(|kept| Some(kept.vm) != spared) {
            if bytes <= self.limits.stays.0 {
                break;
            }
            self.remove(&stay_name(old.vm))?;
            bytes -= old.bytes;
        }
        self.sync()
    }
}

/// A stay that is being written. Dropped without a commit, it is gone.
#[derive(Debug)]
pub struct Draft {
    shared: Arc<Shared>,
    vm: VmId,
    number: u64,
    file: File,
    limit: Bytes,
    kept: bool,
}

impl Draft {
    /// A writer into this draft, which stops at the limit. There is to be one.
    ///
    /// # Errors
    /// Those of [`StayWriter::begin`].
    pub fn writer(&self, key: &StayKey, identity: &Identity) -> io::Result<StayWriter<File>> {
        Ok(StayWriter::begin(self.file.try_clone()?, key, identity)?.limited(self.limit))
    }

    /// The file, empty and open for writing, for a process that writes the stay instead.
    #[must_use]
    pub const fn file(&self) -> &File {
        &self.file
    }

    /// How long it may become: the shelf's limit, or less if that would use up the reserve.
    #[must_use]
    pub const fn limit(&self) -> Bytes {
        self.limit
    }

    /// Makes a finished stay that of its VM, durable when this returns, and evicts the oldest others beyond the limit.
    ///
    /// # Errors
    /// [`ShelfError`]; the VM has its old stay then, the new one, or none.
    pub fn commit(mut self) -> Result<(), ShelfError> {
        let shared = Arc::clone(&self.shared);
        let bytes = Bytes(self.file.metadata().map_err(failed("read"))?.len());
        if bytes > self.limit {
            return Err(ShelfError::TooLong { bytes, limit: self.limit });
        }
        shared.act(Step::SyncFile, || self.file.sync_all()).map_err(failed("written"))?;
        let mut drafts = shared.drafts();
        if drafts.of.get(&self.vm) != Some(&self.number) {
            drop(drafts);
            return Err(ShelfError::Superseded);
        }
        let (from, to) = (draft_name(self.vm, self.number), stay_name(self.vm));
        let renamed = shared.act(Step::Rename, || Ok(rustix::fs::renameat(&shared.dir, from, &shared.dir, to)?));
        if renamed.is_ok() {
            self.kept = true;
            drafts.of.remove(&self.vm);
        }
        let done = renamed.and_then(|()| shared.sync()).and_then(|()| shared.evict(Some(self.vm)));
        // Before this draft is dropped, which locks again.
        drop(drafts);
        done.map_err(failed("written"))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let mut drafts = self.shared.drafts();
        if drafts.of.get(&self.vm) == Some(&self.number) {
            // What cannot be removed now is removed when the shelf is opened.
            let _ = self.shared.supersede(&mut drafts, self.vm);
        }
    }
}

#[cfg(test)]
mod tests;
