//! Disks and CD-ROMs as they are asked for.

use serde::{Deserialize, Serialize};

use crate::{Bytes, BytesPerSec, Name, VolumeRef};

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// Where it lives.
    pub volume: VolumeRef,
    /// Its format: declared, never probed.
    pub format: DiskFormat,
    /// How the host caches it.
    #[serde(default)]
    pub cache: CacheMode,
    /// Size to create it with, if the volume does not exist yet; without it the volume must exist.
    #[serde(default)]
    pub size: Option<Bytes>,
    /// Disk image to copy it from when it is created.
    #[serde(default)]
    pub image: Option<Name>,
    /// What the guest sees it on.
    #[serde(default)]
    pub bus: DiskBus,
    /// What becomes of space that the guest gives back.
    #[serde(default)]
    pub discard: Discard,
    /// Serial number that the guest sees, 1 to 20 of `A-Za-z0-9._-`. Default: `disk` and its slot.
    #[serde(default)]
    pub serial: Option<String>,
    /// What it may do in a second; nothing said: what the host can.
    #[serde(default)]
    pub io_limits: IoLimits,
    /// Its place, see [`crate::spec::FIXED_SLOTS`]. Chosen when the disk is added, and kept.
    #[serde(default)]
    pub slot: Option<u8>,
}

impl DiskSpec {
    /// A disk that must exist, with everything else by default.
    #[must_use]
    pub fn new(volume: VolumeRef, format: DiskFormat) -> Self {
        Self {
            volume,
            format,
            cache: CacheMode::default(),
            size: None,
            image: None,
            bus: DiskBus::default(),
            discard: Discard::default(),
            serial: None,
            io_limits: IoLimits::default(),
            slot: None,
        }
    }
}

/// Format of a volume or disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// Plain bytes.
    Raw,
    /// QEMU's qcow2.
    Qcow2,
}

impl DiskFormat {
    /// QEMU's name of the block driver.
    #[must_use]
    pub const fn driver(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// How the host caches a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CacheMode {
    /// No host page cache (`cache.direct=on`): required for volumes that move on shared storage.
    #[default]
    Direct,
    /// Host page cache, guest flushes honoured. Refused by the migration precheck on shared pools.
    Writeback,
}

/// What the guest sees a disk on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskBus {
    /// A virtio block device of its own.
    #[default]
    Virtio,
    /// A target of the VM's virtio SCSI controller.
    Scsi,
    /// A port of an AHCI controller, for guests without virtio drivers. In the first six slots only.
    Sata,
    /// Refused: QEMU cannot migrate an NVMe controller.
    Nvme,
}

/// What becomes of space that the guest gives back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Discard {
    /// The volume gives it back to its pool.
    #[default]
    Unmap,
    /// The volume keeps it.
    Ignore,
}

/// What a disk may do in a second. A total excludes the separate limits of the same kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct IoLimits {
    /// Requests, reads and writes together.
    pub iops: Option<u64>,
    /// Reads.
    pub read_iops: Option<u64>,
    /// Writes.
    pub write_iops: Option<u64>,
    /// Bytes per second, read and written together.
    pub rate: Option<BytesPerSec>,
    /// Bytes read per second.
    pub read_rate: Option<BytesPerSec>,
    /// Bytes written per second.
    pub write_rate: Option<BytesPerSec>,
}

/// A CD-ROM drive, on the chipset's own AHCI controller. Its medium is changed while the VM runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CdromSpec {
    /// Name of an imported image of kind `iso`; without it the drive is empty.
    pub image: Option<Name>,
}
