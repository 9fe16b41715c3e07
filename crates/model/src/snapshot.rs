//! Snapshots: what is asked for, and what it came to.

use serde::{Deserialize, Serialize};

use crate::{Bytes, Millis, Name, UnixMillis, VolumeRef};

/// How long a guest may take to bring its file systems to rest, if nothing else was said.
pub const QUIESCE: Millis = Millis(10_000);
/// How long it may take at most: it stands still for writers meanwhile.
pub const LONGEST_QUIESCE: Millis = Millis(60_000);

/// What a snapshot is to have, and how it is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRequest {
    /// Memory and devices, too: the VM goes on from it where it was. Without, it boots from its disks.
    pub memory: bool,
    /// The guest's file systems are brought to rest first, which may take this long.
    #[serde(default)]
    pub quiesce: Option<Millis>,
}

/// What a snapshot came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default)]
pub struct SnapshotFigures {
    /// Whether it has memory and devices.
    pub memory: bool,
    /// How long the guest stood still, in microseconds; none if its vCPUs did not run.
    pub pause_us: Option<u64>,
    /// From the request until it was durable, in milliseconds.
    pub took_ms: u64,
    /// Pages of 4 KiB that the vault had. What holds zeros is no page.
    pub pages_known: u64,
    /// Pages that are new.
    pub pages_new: u64,
    /// Bytes that were written for it.
    pub written: Bytes,
    /// Bytes of its disks that were read for it: all that are not zeros, or what has changed since an earlier one.
    pub disks_read: Bytes,
    /// How large its disks were.
    pub sizes: Vec<SnapshotSize>,
    /// What it could not do as asked, in sentences.
    pub warnings: Vec<String>,
}

/// How large a disk was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SnapshotSize {
    /// Its volume.
    pub volume: VolumeRef,
    /// Bytes.
    pub size: Bytes,
}

/// Where a snapshot was exported to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SnapshotExport {
    /// The host that wrote it.
    pub host: Name,
    /// The directory there.
    pub path: String,
    /// Bytes of its files.
    pub bytes: Bytes,
}

/// How a VM came out of a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default)]
pub struct RestoreFigures {
    /// QEMU's own start, in milliseconds.
    pub qemu_ms: u64,
    /// Its disks became what they were, in milliseconds.
    pub disks_ms: u64,
    /// Bytes of its disks that were read for that.
    pub disks_read: Bytes,
    /// Bytes of its disks that were written for that.
    pub disks_written: Bytes,
    /// From the first byte of its devices until its vCPUs ran, in milliseconds; 0 if it booted.
    pub memory_ms: u64,
    /// When its vCPUs ran, by its host's clock; 0 if nobody looked.
    pub ran_at: UnixMillis,
    /// From then on until all of its disks that came while it ran had come, in milliseconds; 0 if none did.
    pub filled_ms: u64,
    /// Bytes of these disks, zeros among them.
    pub filled: Bytes,
}

/// What a vault takes of its pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default)]
pub struct VaultUsage {
    /// Snapshots in it.
    pub snapshots: u64,
    /// Files with their pages.
    pub packs: u64,
    /// Bytes of all.
    pub bytes: Bytes,
}

/// What is wrong in a vault.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default)]
pub struct VaultFindings {
    /// Each a sentence that names the file.
    pub damage: Vec<String>,
}

/// What in a vault no snapshot needs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default)]
pub struct VaultPlan {
    /// Files that would go, with their length.
    pub files: Vec<VaultFile>,
    /// Packs that would be written anew, with those of their pages that are needed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rewrites: Vec<VaultRewrite>,
}

/// A file of a vault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VaultFile {
    /// Its name.
    pub name: String,
    /// Its length.
    pub bytes: Bytes,
}

/// A file of a vault that would be written anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VaultRewrite {
    /// Its name.
    pub name: String,
    /// Its length now.
    pub bytes: Bytes,
    /// What of that becomes free: an estimate, the share of the pages that go.
    pub freed: Bytes,
}

impl VaultPlan {
    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.files.is_empty() && self.rewrites.is_empty()
    }

    /// What is free afterwards that is not now. Of files that are written anew it is an estimate.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        let freed = self.files.iter().map(|file| file.bytes).chain(self.rewrites.iter().map(|rewrite| rewrite.freed));
        Bytes(freed.fold(0, |sum, bytes| sum.saturating_add(bytes.get())))
    }
}
