//! The vault: a directory with the snapshots of one team, and the packs with their pages.
//!
//! ```text
//! begin ──▶ ID.snapshot.W.draft, ID.pack.W.draft ──written, synced──▶ commit: the pack gets its name, directory synced,
//!                                                                         then the snapshot, directory synced
//! ```
//! After a crash at any step a snapshot is there whole or not at all, and of a pack that nobody refers to only its room is lost: [`Vault::plan_prune`]
//! finds it. Snapshots go in any order; a pack goes when the last that refers to it is gone, and is written anew when much of it is not needed any more. Whoever writes holds the
//! vault's lock with others; pruning holds it alone, so that it takes nothing from under a snapshot that is being written.

mod first;
mod prune;

pub use prune::{PrunePlan, Rewrite};

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

use godwit_model::{Bytes, SnapshotId};
use rustix::fs::{AtFlags, Dir, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use uuid::Uuid;

use crate::contents::Contents;
use crate::key::fill;
use crate::pack::{PackId, PackReader};
use crate::snapshot::{Earlier, Keys, Known, SnapshotReader, SnapshotWriter, Space, Totals};
use crate::stored::FileError;
use crate::{PackKey, SnapshotKey, TeamKey};

/// The file whose lock is the vault's.
const LOCK: &str = "lock";

/// Why the vault does not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    /// The file system refused.
    #[error("the vault cannot be {action}")]
    Io {
        /// What was done.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Somebody writes or prunes, and this cannot be done beside it.
    #[error("the vault is in use")]
    Busy,
    /// There is no such snapshot.
    #[error("the vault has no snapshot {0}")]
    NotFound(SnapshotId),
    /// There is a snapshot of this id.
    #[error("the vault has a snapshot {0} already")]
    Exists(SnapshotId),
    /// A file is not what was written.
    #[error("{name} in the vault cannot be used")]
    File {
        /// The file's name.
        name: String,
        /// What is wrong with it.
        #[source]
        source: FileError,
    },
    /// A snapshot refers to a pack that is not there, or not with as many pages.
    #[error("snapshot {snapshot} needs a pack that is missing: {pack}")]
    Missing {
        /// Whose pack.
        snapshot: SnapshotId,
        /// Which pack.
        pack: PackId,
    },
    /// The vault is not as it was when the plan was made.
    #[error("the vault has changed since the plan was made")]
    Changed,
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> VaultError {
    move |source| VaultError::Io { action, source }
}

fn damaged(name: String) -> impl FnOnce(FileError) -> VaultError {
    move |source| VaultError::File { name, source }
}

/// A directory of snapshots. Clones are the same vault.
#[derive(Clone, Debug)]
pub struct Vault {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    dir: File,
    #[cfg(test)]
    faults: tests::Faults,
}

/// What changes the directory, or makes a change last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Create,
    Write,
    Rename,
    Remove,
    SyncDirectory,
}

/// What a name of ours says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Name {
    Snapshot(SnapshotId),
    First(SnapshotId),
    Pack(PackId),
    Draft,
}

fn snapshot_name(id: SnapshotId) -> String {
    format!("{id}.snapshot")
}

fn first_name(id: SnapshotId) -> String {
    format!("{id}.first")
}

fn pack_name(id: PackId) -> String {
    format!("{id}.pack")
}

/// Each writer's drafts have names of their own: one that was given up may still be at it.
fn draft_name(name: &str, writer: u32) -> String {
    format!("{name}.{writer:08x}.draft")
}

fn draw_writer() -> io::Result<u32> {
    let mut writer = [0; 4];
    fill(&mut writer)?;
    Ok(u32::from_be_bytes(writer))
}

/// Whatever else is in the directory is left alone.
fn parse_name(name: &str) -> Option<Name> {
    let id = |text: &str| Uuid::parse_str(text).ok().filter(|id| id.hyphenated().to_string() == text);
    if let Some(whole) = name.strip_suffix(".draft") {
        let (whole, writer) = whole.rsplit_once('.')?;
        let is_one = writer.len() == 8 && u32::from_str_radix(writer, 16).is_ok();
        return parse_name(whole).filter(|name| is_one && *name != Name::Draft).map(|_| Name::Draft);
    }
    if let Some(text) = name.strip_suffix(".snapshot") {
        return id(text).map(|id| Name::Snapshot(SnapshotId::new(id)));
    }
    if let Some(text) = name.strip_suffix(".first") {
        return id(text).map(|id| Name::First(SnapshotId::new(id)));
    }
    id(name.strip_suffix(".pack")?).map(|id| Name::Pack(PackId::new(id)))
}

/// How much a vault takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VaultUsage {
    /// How many snapshots.
    pub snapshots: u64,
    /// How many packs.
    pub packs: u64,
    /// Bytes of both.
    pub bytes: Bytes,
}

/// What was verified.
#[derive(Default)]
struct Verified {
    wrong: Vec<VaultError>,
    /// Packs, with how many of their bases were missing when they were read.
    packs: BTreeMap<PackId, usize>,
}

impl Vault {
    /// Opens, or begins, the vault in `dir`.
    ///
    /// # Errors
    /// [`VaultError::Io`]
    pub fn open(dir: &Path) -> Result<Self, VaultError> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed("made"))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::open(dir, flags, Mode::empty()).map_err(io::Error::from);
        Self::at(File::from(opened.map_err(failed("opened"))?))
    }

    /// Opens, or begins, the vault in a directory that is open.
    ///
    /// # Errors
    /// [`VaultError::Io`]
    pub fn at(dir: File) -> Result<Self, VaultError> {
        rustix::fs::fchmod(&dir, Mode::RWXU).map_err(io::Error::from).map_err(failed("made private"))?;
        let shared = Shared {
            dir,
            #[cfg(test)]
            faults: tests::Faults::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The snapshots that are whole.
    ///
    /// # Errors
    /// [`VaultError::Io`]
    pub fn snapshots(&self) -> Result<BTreeSet<SnapshotId>, VaultError> {
        let names = self.shared.names().map_err(failed("read"))?;
        Ok(names.into_values().filter_map(|name| if let Name::Snapshot(id) = name { Some(id) } else { None }).collect())
    }

    /// How much it takes.
    ///
    /// # Errors
    /// [`VaultError::Io`]
    pub fn usage(&self) -> Result<VaultUsage, VaultError> {
        let mut usage = VaultUsage::default();
        for (text, name) in self.shared.names().map_err(failed("read"))? {
            match name {
                Name::Snapshot(_) => usage.snapshots += 1,
                Name::Pack(_) => usage.packs += 1,
                Name::First(_) | Name::Draft => {}
            }
            usage.bytes.0 += self.shared.length(&text).map_err(failed("read"))?.0;
        }
        Ok(usage)
    }

    /// Begins a snapshot. It is nothing until it is committed.
    ///
    /// # Errors
    /// [`VaultError::Exists`], [`VaultError::Busy`] while somebody prunes, [`VaultError::Io`]
    pub fn begin(&self, id: SnapshotId) -> Result<Draft, VaultError> {
        let lock = self.shared.lock(FlockOperation::NonBlockingLockShared)?;
        if self.shared.length(&snapshot_name(id)).is_ok() {
            return Err(VaultError::Exists(id));
        }
        // Ids are drawn: a pack that has the id of its snapshot is as unique.
        let pack = PackId::new(id.uuid());
        let writer = draw_writer().map_err(failed("written"))?;
        let create = |name: &str| self.shared.create(&draft_name(name, writer)).map_err(failed("written"));
        let (snapshot_file, pack_file) = (create(&snapshot_name(id))?, create(&pack_name(pack))?);
        let shared = Arc::clone(&self.shared);
        Ok(Draft { shared, id, pack, writer, snapshot_file, pack_file, _lock: lock, kept: false })
    }

    /// Opens a snapshot and all packs that it refers to. They stay readable even if they are deleted meanwhile.
    ///
    /// # Errors
    /// [`VaultError`]
    pub fn snapshot(&self, id: SnapshotId, key: &SnapshotKey) -> Result<Contents, VaultError> {
        let name = snapshot_name(id);
        let file = self.shared.find(&name).map_err(failed("read"))?.ok_or(VaultError::NotFound(id))?;
        let snapshot = SnapshotReader::open(file, key).map_err(damaged(name))?;
        let packs = snapshot.packs().iter().map(|(pack, key, pages)| {
            let missing = VaultError::Missing { snapshot: id, pack: *pack };
            self.pack(*pack, key)?.filter(|pack| pack.pages() == *pages).map(Some).ok_or(missing)
        });
        let packs = packs.collect::<Result<_, _>>()?;
        Contents::new(snapshot, packs).map_err(failed("read"))
    }

    /// What the packs of these snapshots have, the first snapshots first, at most `most` pages. What cannot be read is left out: a snapshot that is
    /// written now does not refer to it, and so does not share its damage.
    ///
    /// # Errors
    /// [`VaultError::Io`]
    pub fn known(&self, snapshots: &[(SnapshotId, SnapshotKey)], most: usize) -> Result<Known, VaultError> {
        let mut known = Known::new(most);
        for (id, key) in snapshots {
            match self.snapshot(*id, key) {
                Ok(contents) => known.add(&contents),
                Err(error @ VaultError::Io { .. }) => return Err(error),
                Err(_) => {}
            }
        }
        Ok(known)
    }

    /// Opens a snapshot from which a new one, whose writer knows `known`, takes pages over, or to which it keeps differences. None if it has packs that it cannot be known by. The new one's draft is
    /// begun before: nothing that either refers to is pruned then.
    ///
    /// # Errors
    /// [`VaultError`]: as of [`Self::snapshot`].
    pub fn earlier(&self, id: SnapshotId, key: &SnapshotKey, known: &mut Known) -> Result<Option<Earlier<File>>, VaultError> {
        Ok(known.earlier(self.snapshot(id, key)?))
    }

    /// Forsakes a snapshot that somebody else may still be writing, and removes it if it is there: whoever writes it does not come to a commit any more.
    ///
    /// # Errors
    /// [`VaultError::Io`]
    pub fn forsake(&self, id: SnapshotId) -> Result<(), VaultError> {
        // The drafts first: what they do not become afterwards is what is looked for.
        let (snapshot, pack) = (snapshot_name(id), pack_name(PackId::new(id.uuid())));
        for (text, name) in self.shared.names().map_err(failed("read"))? {
            let of = text.strip_suffix(".draft").and_then(|text| text.rsplit_once('.'));
            if name == Name::Draft && of.is_some_and(|(of, _)| of == snapshot || of == pack) {
                self.shared.remove(&text).map_err(failed("changed"))?;
            }
        }
        if self.shared.length(&snapshot).is_ok() {
            self.delete(id)?;
        }
        Ok(())
    }

    /// Removes a snapshot. Its pages go with [`Self::prune`], those of which no other snapshot has the pack.
    ///
    /// # Errors
    /// [`VaultError::Io`]; it is gone then, or there as before.
    pub fn delete(&self, id: SnapshotId) -> Result<(), VaultError> {
        let removed = self.shared.remove(&snapshot_name(id)).and_then(|()| self.shared.remove(&first_name(id)));
        removed.and_then(|()| self.shared.sync()).map_err(failed("changed"))
    }

    /// Reads everything that these snapshots refer to, and says what is wrong, each file once.
    ///
    /// # Errors
    /// [`VaultError::Io`] if the directory cannot be read.
    pub fn verify(&self, snapshots: &[(SnapshotId, SnapshotKey)], team: &TeamKey) -> Result<Vec<VaultError>, VaultError> {
        let mut verified = Verified::default();
        for (id, key) in snapshots {
            self.verify_one(*id, key, team, &mut verified)?;
        }
        Ok(verified.wrong)
    }

    fn verify_one(&self, id: SnapshotId, key: &SnapshotKey, team: &TeamKey, so_far: &mut Verified) -> Result<(), VaultError> {
        let name = snapshot_name(id);
        let Some(file) = self.shared.find(&name).map_err(failed("read"))? else {
            so_far.wrong.push(VaultError::NotFound(id));
            return Ok(());
        };
        let snapshot = match SnapshotReader::open(file, key) {
            Ok(snapshot) => snapshot,
            Err(source) => {
                so_far.wrong.push(VaultError::File { name, source });
                return Ok(());
            }
        };
        let mut packs = vec![];
        for (pack, key, pages) in snapshot.packs() {
            let error = match self.pack(*pack, key) {
                Ok(Some(reader)) if reader.pages() == *pages => {
                    packs.push(Some(reader));
                    continue;
                }
                Ok(_) => VaultError::Missing { snapshot: id, pack: *pack },
                Err(error) => error,
            };
            packs.push(None);
            if so_far.packs.insert(*pack, 0).is_none() {
                so_far.wrong.push(error);
            }
        }
        let mut contents = Contents::new(snapshot, packs).map_err(failed("read"))?;
        so_far.wrong.extend(contents.verify_places().err().map(|source| VaultError::File { name, source }));
        let listed: Vec<PackId> = contents.snapshot().packs().iter().map(|(pack, ..)| *pack).collect();
        for (at, pack) in (0..).zip(listed) {
            // One that was read with fewer of its bases is read again.
            let unread = contents.unlisted(at);
            if contents.pack(at).is_none() || so_far.packs.get(&pack).is_some_and(|before| *before <= unread) {
                continue;
            }
            so_far.packs.insert(pack, unread);
            let verified = contents.verify_pack(at, team);
            so_far.wrong.extend(verified.err().map(|source| VaultError::File { name: pack_name(pack), source }));
        }
        Ok(())
    }

    fn pack(&self, id: PackId, key: &PackKey) -> Result<Option<PackReader<File>>, VaultError> {
        let name = pack_name(id);
        let Some(file) = self.shared.find(&name).map_err(failed("read"))? else { return Ok(None) };
        PackReader::open(file, key).map(Some).map_err(damaged(name))
    }
}

impl Shared {
    /// Everything that changes the directory goes through here, so that tests can fail and crash at each.
    #[cfg_attr(not(test), expect(unused_variables, reason = "for tests"))]
    fn act<T>(&self, step: Step, action: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        #[cfg(test)]
        self.faults.meet(step)?;
        action()
    }

    fn lock(&self, how: FlockOperation) -> Result<File, VaultError> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(&self.dir, LOCK, flags, Mode::RUSR | Mode::WUSR).map_err(io::Error::from);
        let file = File::from(opened.map_err(failed("locked"))?);
        match rustix::fs::flock(&file, how) {
            Ok(()) => Ok(file),
            Err(Errno::WOULDBLOCK) => Err(VaultError::Busy),
            Err(error) => Err(failed("locked")(error.into())),
        }
    }

    fn create(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        self.act(Step::Create, || Ok(rustix::fs::openat(&self.dir, name, flags, Mode::RUSR | Mode::WUSR)?.into()))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.act(Step::Rename, || Ok(rustix::fs::renameat(&self.dir, from, &self.dir, to)?))
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

    /// The file of a name, for reading, if there is one and it is a file.
    fn find(&self, name: &str) -> io::Result<Option<File>> {
        // Not blocking: what is under the name may be a pipe.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.dir, name, flags, Mode::empty()) {
            Ok(file) => {
                let file = File::from(file);
                Ok(file.metadata()?.is_file().then_some(file))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn length(&self, name: &str) -> io::Result<Bytes> {
        let facts = rustix::fs::statat(&self.dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(Bytes(u64::try_from(facts.st_size).unwrap_or(0)))
    }

    /// Our names in the directory, in order.
    fn names(&self) -> io::Result<BTreeMap<String, Name>> {
        let mut names = BTreeMap::new();
        for entry in Dir::read_from(&self.dir)? {
            let entry = entry?;
            let Ok(text) = entry.file_name().to_str() else { continue };
            names.extend(parse_name(text).map(|name| (text.to_owned(), name)));
        }
        Ok(names)
    }
}

/// A snapshot that is being written. Dropped without a commit, it is gone.
#[derive(Debug)]
pub struct Draft {
    shared: Arc<Shared>,
    id: SnapshotId,
    pack: PackId,
    writer: u32,
    snapshot_file: File,
    pack_file: File,
    /// Held as long as this is.
    _lock: File,
    kept: bool,
}

impl Draft {
    /// A writer into this draft. There is to be one.
    ///
    /// # Errors
    /// Those of [`SnapshotWriter::begin`].
    pub fn writer(&self, keys: &Keys, spaces: Vec<Space>, known: Known, limit: Bytes) -> io::Result<SnapshotWriter<File, File>> {
        let files = (self.snapshot_file.try_clone()?, self.pack_file.try_clone()?);
        SnapshotWriter::begin(files, self.pack, keys, spaces, known, limit)
    }

    /// Makes what was written a snapshot, durable when this returns. `totals` are those of its writer, which has finished.
    ///
    /// # Errors
    /// [`VaultError::Io`]; the snapshot is whole then, or there is none.
    pub fn commit(mut self, totals: &Totals) -> Result<(), VaultError> {
        let shared = Arc::clone(&self.shared);
        let (snapshot, pack) = (snapshot_name(self.id), pack_name(self.pack));
        let done = (|| {
            if totals.pack == Bytes(0) {
                shared.remove(&draft_name(&pack, self.writer))?;
            } else {
                shared.rename(&draft_name(&pack, self.writer), &pack)?;
            }
            shared.sync()?;
            shared.rename(&draft_name(&snapshot, self.writer), &snapshot)?;
            self.kept = true;
            shared.sync()
        })();
        done.map_err(failed("written"))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        // What cannot be removed now is removed by pruning.
        for name in [snapshot_name(self.id), pack_name(self.pack)] {
            let _ = self.shared.remove(&draft_name(&name, self.writer));
        }
    }
}

#[cfg(test)]
mod tests;
