//! What agent and vault worker say to each other: a configuration in memory, and then lines of JSON; sockets of disks follow on a channel of their own.

use std::os::fd::RawFd;

use godwit_model::{Bytes, ErrorCode, SnapshotId, VaultPlan};
use godwit_vault::SnapshotKey;
use serde::{Deserialize, Serialize};

use super::changed::Changed;

/// Longest line.
pub(super) const MAX_LINE: usize = 4 << 20;

/// What a worker is started with. Keys are in it: it is in memory alone.
#[derive(Serialize, Deserialize)]
pub(crate) struct WorkerConfig {
    pub(super) control_fd: RawFd,
    /// Where sockets of disks arrive, in the order of the job's.
    pub(super) disks_fd: RawFd,
    /// The vault's directory, if it is to see one.
    pub(super) vault_fd: Option<RawFd>,
    pub(super) job: Job,
}

/// A snapshot with its key.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Keyed {
    pub(crate) id: SnapshotId,
    pub(crate) key: [u8; 32],
}

impl Keyed {
    pub(super) fn opened(&self) -> (SnapshotId, SnapshotKey) {
        (self.id, SnapshotKey::new(self.key))
    }
}

/// A disk of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskOf {
    /// Its node in QEMU, and its name in the snapshot.
    pub(crate) node: String,
    /// What QEMU exports it as.
    pub(crate) export: String,
    pub(crate) size: Bytes,
    /// The snapshot since which what has changed is exported with it.
    pub(crate) since: Option<SnapshotId>,
}

/// A disk that becomes what it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskTo {
    /// Its node in QEMU, what QEMU exports it as, and its name in the snapshot.
    pub(crate) node: String,
    /// What may differ from the snapshot, if that is known.
    pub(crate) changed: Option<Changed>,
}

/// A disk that is exported with a bitmap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BitmapOf {
    /// What QEMU exports it as.
    pub(crate) export: String,
    pub(crate) bitmap: String,
}

/// A stream that becomes a snapshot's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MemoryFile {
    pub(crate) fd: RawFd,
    /// The machine that it must be of.
    pub(crate) machine: String,
}

/// A raw image that becomes a disk of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskFile {
    pub(crate) node: String,
    pub(crate) fd: RawFd,
    pub(crate) size: Bytes,
}

/// What a worker does.
#[derive(Serialize, Deserialize)]
#[serde(tag = "job", rename_all = "snake_case")]
pub(crate) enum Job {
    /// Writes a snapshot. Without `memory_fd` it has disks alone.
    Take { snapshot: Keyed, team: [u8; 32], known: Vec<Keyed>, memory_fd: Option<RawFd>, disks: Vec<DiskOf>, about: Vec<u8> },
    /// Makes disks what they were.
    Restore { snapshot: Keyed, disks: Vec<DiskTo> },
    /// Gives a disk to be read, to one connection after the other.
    Serve { snapshot: Keyed, disk: String },
    /// Reads what has changed on disks. It sees no vault.
    Changed { disks: Vec<BitmapOf> },
    /// Writes its memory, or a disk of it, to a file.
    Unload { snapshot: Keyed, disk: Option<String>, to_fd: RawFd },
    /// Makes files a snapshot: the stream of a VM of this machine, if there is one, and raw images.
    Load { snapshot: Keyed, team: [u8; 32], known: Vec<Keyed>, memory: Option<MemoryFile>, disks: Vec<DiskFile>, about: Vec<u8> },
    /// Plays a VM to the QEMU that waits; or plays on, to one that lost whoever played before.
    Play { snapshot: Keyed, qemu_fd: RawFd, on: bool },
    /// Writes its memory to the carry that waits for the VM.
    Lend { snapshot: Keyed, to_fd: RawFd },
    /// Removes a snapshot.
    Delete { snapshot: SnapshotId },
    /// Says how much there is.
    Usage,
    /// Reads everything.
    Verify { snapshots: Vec<Keyed>, team: [u8; 32] },
    /// Says what nobody refers to.
    PlanPrune { snapshots: Vec<Keyed> },
    /// Removes that.
    Prune { snapshots: Vec<Keyed>, plan: VaultPlan },
}

/// What a worker says.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Said {
    /// It has read what it must of the vault.
    Ready,
    /// The first page has come: the guest may run.
    Began,
    /// It waits for the socket of its next disk.
    NextDisk,
    /// QEMU has the devices: the VM may run.
    Loaded,
    /// QEMU has said what it has of memory, and goes on.
    Resumed,
    /// It is done; what there is to tell depends on the job.
    Done(serde_json::Value),
    /// It is not.
    Failed { code: ErrorCode, message: String },
}

/// What a snapshot came to, as its writer knows.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Kept {
    pub(crate) known: u64,
    pub(crate) new: u64,
    pub(crate) written: Bytes,
    /// Of its disks.
    #[serde(default)]
    pub(crate) read: Bytes,
}

/// What making disks what they were came to.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Restored {
    pub(crate) read: Bytes,
    pub(crate) written: Bytes,
}
