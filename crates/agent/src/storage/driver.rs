//! The interface of pool drivers: what a kind of storage must do to hold volumes. A directory does it ([`super::directory`]); what every kind
//! must keep to, whatever it is made of, is written down as checks that run on real storage ([`super::suite`]).
//!
//! A driver knows nothing of what is in a volume. Formats, images and sizes that a spec wants are [`super::volume`]'s.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use godwit_model::{Bytes, DiskFormat, Generation, Name, Refusal, VmId};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// One pool as one host reaches it. Cheap to keep, whether the storage is there or not.
pub(super) trait Driver: Send + Sync {
    /// Looks at the storage anew: it is there, and it is the one that was there before. It is made a pool when it is seen for the first time.
    ///
    /// # Errors
    /// `pool_unavailable`. Storage that was there and is not, or is another one, is never taken for the pool.
    fn open(&self) -> Result<Box<dyn Storage>, Refusal>;
}

/// Storage that is there. Everything blocks, is whole or not done at all, and may be done by several hosts at once.
pub(super) trait Storage: Send + Sync {
    /// The same on every host that sees this storage, and on no other storage.
    fn identity(&self) -> &str;

    /// Size and what is free.
    fn space(&self) -> io::Result<Space>;

    /// Whether anything has this name, fit or unfit.
    fn exists(&self, item: &Item) -> io::Result<bool>;

    /// Room for a new volume, which nobody sees until it is published.
    fn begin(&self) -> io::Result<Box<dyn Room>>;

    /// Opens a volume or a snapshot. Locks that QEMU takes on the file are seen by every host.
    fn open(&self, item: &Item, access: Access) -> Result<File, OpenError>;

    /// What the opened item was made as, where that is known.
    fn record(&self, item: &Item, file: &File) -> io::Result<Option<Record>>;

    /// Whether a QEMU of any host has this open.
    fn in_use(&self, file: &File) -> io::Result<bool>;

    /// Keeps QEMUs of all hosts out until `file` is closed; `false` if one is in already that may not be.
    fn hold(&self, file: &File, hold: Hold) -> io::Result<bool>;

    /// Makes an opened raw volume larger. What was in it stays; what is new reads as zeros.
    fn grow(&self, item: &Item, file: &File, record: Record) -> io::Result<()>;

    /// Keeps the content of an opened volume under a name of its own. `false`: there is such a snapshot, which stays.
    fn snapshot(&self, volume: &File, as_item: &Item, record: Record) -> io::Result<bool>;

    /// Makes a volume with the content of an opened volume or snapshot, independent of it from then on. `false`: there is such a volume, which
    /// stays.
    fn clone_item(&self, from: &File, as_item: &Item, record: Record) -> io::Result<bool>;

    /// The snapshots of a volume, sorted by name.
    fn snapshots(&self, volume: &Name) -> io::Result<Vec<Name>>;

    /// Room that stays when this process ends, taken as by [`Hold::Taken`]: a successor, which can take a volume's name from what has it.
    fn begin_successor(&self) -> io::Result<(Successor, File)>;

    /// Gives the successor the volume's name, and keeps what had it. Again: nothing happens.
    fn succeed(&self, item: &Item, successor: &Successor) -> io::Result<()>;

    /// Gives the name back to what had it, if the successor has it, and removes the successor. Again: nothing happens.
    fn withdraw(&self, item: &Item, successor: &Successor) -> io::Result<()>;

    /// As [`Storage::succeed`]; and removes what had the name. Again: nothing happens.
    fn settle(&self, item: &Item, successor: &Successor) -> io::Result<()>;

    /// Gives what has one name another one, durably, with what is to be known of it as a spare; of a file without a record nothing is known but its
    /// format. `false`: something has that name, and both stay. What does not exist is an error, unless something has the other name: then it was done before.
    fn rename(&self, from: &Item, to: &Item, left: Option<Left>, format: DiskFormat) -> io::Result<bool>;

    /// What is known of an opened spare.
    fn left(&self, item: &Item, file: &File) -> io::Result<Option<Left>>;

    /// All spares, and then what is on its way here or was left on it; the oldest of each first.
    fn leftovers(&self) -> io::Result<Vec<Item>>;

    /// Removes something with a name; what is not there is removed already.
    fn remove(&self, item: &Item) -> io::Result<()>;

    /// The directory of a team's vault, made if it is missing. It belongs to `uid`, and nobody else gets in.
    fn vault(&self, team: &Name, uid: u32) -> io::Result<File>;

    /// Room for a directory of files that people take away, which nobody sees until it is published as an export of the team, under this name.
    fn begin_export(&self, team: &Name, name: &Name) -> io::Result<Box<dyn ExportRoom>>;

    /// Opens a file of a directory that people brought for the team, or else of an export of the team.
    fn open_brought(&self, team: &Name, name: &Name, file: &str) -> Result<File, OpenError>;

    /// Removes what makers that died have left.
    fn remove_abandoned(&self);
}

/// Room for a volume to be. Given back when it is dropped.
pub(super) trait Room: Send + Sync {
    /// Where its content goes; open for reading and writing.
    fn file(&self) -> &File;

    /// Gives it a name, durably. `false`: something has that name, and stays.
    fn publish(self: Box<Self>, item: &Item, record: Record) -> io::Result<bool>;
}

/// Room for an export to be. Given back, with all that is in it, when it is dropped. Nobody but root gets in.
pub(super) trait ExportRoom: Send + Sync {
    /// A new file in it, open for reading and writing.
    fn create(&self, name: &str) -> io::Result<File>;

    /// Gives it its name, durably, in the place of whatever export had it; where it is then.
    fn publish(self: Box<Self>) -> io::Result<PathBuf>;
}

/// What is to take a volume's name from what has it, as a journal keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Successor {
    /// Its own name in the pool.
    pub(super) id: Uuid,
    /// What tells it from whatever else may have a name.
    pub(super) mark: u64,
}

/// Something with a name in a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Item {
    volume: Name,
    kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Volume,
    Snapshot(Name),
    Arriving,
    Spare,
}

impl Item {
    /// A volume.
    pub(super) fn volume(name: &Name) -> Self {
        Self { volume: name.clone(), kind: Kind::Volume }
    }

    /// A snapshot of a volume.
    pub(super) fn snapshot(volume: &Name, name: &Name) -> Self {
        Self { volume: volume.clone(), kind: Kind::Snapshot(name.clone()) }
    }

    /// A volume that is on its way here.
    pub(super) fn arriving(name: &Name) -> Self {
        Self { volume: name.clone(), kind: Kind::Arriving }
    }

    /// What is left of a volume that another host has now, or that did not arrive.
    pub(super) fn spare(name: &Name) -> Self {
        Self { volume: name.clone(), kind: Kind::Spare }
    }

    /// Whether it is a spare.
    pub(super) const fn is_spare(&self) -> bool {
        matches!(self.kind, Kind::Spare)
    }

    /// In the directory of its kind.
    pub(super) const fn directory(&self) -> &'static str {
        match self.kind {
            Kind::Volume => "volumes",
            Kind::Snapshot(_) => "snapshots",
            Kind::Arriving => "arriving",
            Kind::Spare => "spares",
        }
    }
}

impl std::fmt::Display for Item {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let volume = &self.volume;
        // No name has these signs in it.
        match &self.kind {
            Kind::Volume => write!(f, "{volume}"),
            Kind::Snapshot(snapshot) => write!(f, "{volume}@{snapshot}"),
            Kind::Arriving => write!(f, "{volume}~arriving"),
            Kind::Spare => write!(f, "{volume}~spare"),
        }
    }
}

/// Whose a spare is, and which of its states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Left {
    /// The VM.
    pub(super) vm: VmId,
    /// It left on this generation; none if this is no state that it ever had.
    pub(super) generation: Option<Generation>,
}

/// What an item was made as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// Declared format.
    pub(super) format: DiskFormat,
    /// Size that the guest was promised.
    pub(super) size: Bytes,
}

/// Size of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Space {
    /// All of it.
    pub(super) capacity: Bytes,
    /// What is free.
    pub(super) free: Bytes,
}

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Access {
    /// Writing, too.
    pub(super) write: bool,
    /// Past the kernel's cache, as QEMU with cache mode `direct`.
    pub(super) direct: bool,
}

impl Access {
    /// Reading alone.
    pub(super) const READ: Self = Self { write: false, direct: false };
    /// Reading and writing.
    pub(super) const WRITE: Self = Self { write: true, direct: false };
}

/// Whom a hold keeps out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    /// Writers: what is read stays as it is.
    Still,
    /// Everybody.
    Alone,
    /// Everybody, for as long as any copy of the file is open, as a user itself: for programs that take no locks.
    Taken,
}

/// Why an item was not opened.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    /// Nothing has the name.
    #[error("it does not exist")]
    Missing,
    /// What has the name leads elsewhere.
    #[error("it is a link")]
    Link,
    /// What has the name is nothing that can be a disk.
    #[error("it is no file")]
    NotAVolume,
    /// The storage cannot be used past the kernel's cache.
    #[error("there is no direct I/O")]
    NoDirect,
    /// Another reason.
    #[error(transparent)]
    System(#[from] io::Error),
}
