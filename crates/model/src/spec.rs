//! What a VM is made of. [`VmSpec`] is what was asked for; [`ResolvedSpec`] is what it was started with: its ABI for life.
//!
//! Every field is in the table of `docs/vm-spec.md`, which a test of this crate compares with the schema.

mod address;
mod change;
mod cloud_init;
mod disk;
mod memory;
mod nic;
mod platform;
mod resolved;
#[cfg(test)]
mod tests;
mod validate;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{Bytes, ImageId, MigrationSettings, Name, Seconds, ids::Vmgenid};

pub use address::{InvalidMac, InvalidVolume, MacAddress, VolumeRef};
pub use change::{LiveChange, live_changes};
pub use cloud_init::{CloudInit, MAX_NETWORK_CONFIG, MAX_USER_DATA};
pub use disk::{CacheMode, CdromSpec, Discard, DiskBus, DiskFormat, DiskSpec, IoLimits};
pub use memory::{DIMM_SLOTS, DIMM_STEP, Dimm, DimmAddress, Growth, NoGrowth};
pub use nic::{NicModel, NicSpec};
pub use platform::{
    Firmware, HugePages, Hyperv, Numa, Platform, Rtc, RtcBase, RtcDrift, Smbios, Tpm, TpmVersion, Video, Watchdog, WatchdogAction,
};
pub use resolved::{PowerOff, ResolvedCdrom, ResolvedDisk, ResolvedNic, ResolvedSpec};
pub use validate::{InvalidSpec, check_labels};

/// Schema version of [`VmSpec`] and [`ResolvedSpec`] in stores and on links. What was written as an older one is read with its meaning of
/// then; what was written as a newer one must not be started.
pub const SPEC_SCHEMA: u32 = 2;

/// Disks and interfaces have places: 0 to 7 are on the root bus (virtio disk and interface each have eight of their own there), 8 and up
/// are on the root ports for hot-plug, which disks and interfaces share.
pub const FIXED_SLOTS: u8 = 8;
/// Most root ports for hot-plug.
pub const MAX_HOTPLUG_PORTS: u8 = 8;
/// What a new VM gets if nothing else is said.
pub const DEFAULT_HOTPLUG_PORTS: u8 = 4;
/// Most CD-ROM drives.
pub const MAX_CDROMS: usize = 4;

/// What the user asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Number of vCPUs, 1 to 64.
    pub vcpus: u16,
    /// RAM in bytes, a multiple of 1 MiB.
    pub memory: Bytes,
    /// What memory can grow to while the VM runs, a multiple of 128 MiB. Default: it cannot.
    #[serde(default)]
    pub memory_max: Option<Bytes>,
    /// What it boots.
    pub boot: Boot,
    /// Disks in the order of their slots, at most 8.
    #[serde(default)]
    pub disks: Vec<DiskSpec>,
    /// Network interfaces in the order of their slots, at most 8.
    #[serde(default)]
    pub nics: Vec<NicSpec>,
    /// Machine type: `q35`, or a versioned one such as `pc-q35-7.2`. Default: the newest `pc-q35` that every host of the cluster knows.
    #[serde(default)]
    pub machine: Option<String>,
    /// Named CPU model, such as `qemu64-v1`. `host` and `max` tie the VM to equal hosts. Default: a baseline of the cluster's accelerator.
    #[serde(default)]
    pub cpu: Option<String>,
    /// CD-ROM drives, at most 4.
    #[serde(default)]
    pub cdroms: Vec<CdromSpec>,
    /// What runs before the operating system.
    #[serde(default)]
    pub firmware: Firmware,
    /// The graphics adapter.
    #[serde(default)]
    pub video: Video,
    /// A USB tablet, so that the pointer of a console is where the user's is.
    #[serde(default)]
    pub tablet: bool,
    /// The real-time clock.
    #[serde(default)]
    pub rtc: Rtc,
    /// Hyper-V enlightenments, for Windows.
    #[serde(default)]
    pub hyperv: Hyperv,
    /// What the guest reads about its maker.
    #[serde(default)]
    pub smbios: Smbios,
    /// What tells the guest that it was turned back or doubled; drawn at creation. VMs of before have no such device.
    #[serde(default)]
    pub vmgenid: Option<Vmgenid>,
    /// A trusted platform module.
    #[serde(default)]
    pub tpm: Option<Tpm>,
    /// RAM of huge pages. Refused on hosts that have none.
    #[serde(default)]
    pub hugepages: Option<HugePages>,
    /// Where on a host with several memory nodes RAM is.
    #[serde(default)]
    pub numa: Numa,
    /// Root ports for disks and interfaces that come while the VM runs, 0 to 8; 4 at creation if nothing is said.
    #[serde(default)]
    pub hotplug_ports: Option<u8>,
    /// The guest gives memory that it has freed back to its host (free page reporting), and it is not sent when the VM moves. Huge pages stay
    /// set aside. On at creation if nothing is said; VMs of before have it off.
    #[serde(default)]
    pub free_page_reporting: Option<bool>,
    /// A watchdog.
    #[serde(default)]
    pub watchdog: Option<Watchdog>,
    /// What people and programs sort VMs by: at most 64 names, each with a text of at most 63 printable ASCII characters.
    #[serde(default)]
    pub labels: BTreeMap<Name, String>,
    /// Limits of its migrations; what is not said here comes from policies.
    #[serde(default)]
    pub migration: MigrationSettings,
    /// Starts again by itself on the host where it ran, when that host comes up.
    #[serde(default)]
    pub autostart: Option<Autostart>,
    /// How long its guest may take to power off when it is asked to, 1 s to 1 hour. Default: 5 minutes.
    #[serde(default)]
    pub shutdown_deadline: Option<Seconds>,
    /// What the guest is told at its first boot.
    #[serde(default)]
    pub cloud_init: Option<CloudInit>,
}

/// What a VM boots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "from", rename_all = "snake_case")]
pub enum Boot {
    /// A kernel handed over directly.
    Kernel {
        /// Name of an imported image of kind `kernel`.
        kernel: Name,
        /// Name of an imported image of kind `initrd`.
        #[serde(default)]
        initrd: Option<Name>,
        /// Kernel command line.
        #[serde(default)]
        cmdline: String,
    },
    /// The first disk, by its firmware; if that does not boot, the CD-ROM drives in their order.
    Disk,
}

/// When a VM starts by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Autostart {
    /// Lower ones start first.
    pub order: u16,
}

impl VmSpec {
    /// A VM without devices, with everything else by default.
    #[must_use]
    pub fn new(vcpus: u16, memory: Bytes, boot: Boot) -> Self {
        Self {
            vcpus,
            memory,
            memory_max: None,
            boot,
            disks: Vec::new(),
            nics: Vec::new(),
            machine: None,
            cpu: None,
            cdroms: Vec::new(),
            firmware: Firmware::default(),
            video: Video::default(),
            tablet: false,
            rtc: Rtc::default(),
            hyperv: Hyperv::default(),
            smbios: Smbios::default(),
            vmgenid: None,
            tpm: None,
            hugepages: None,
            numa: Numa::default(),
            hotplug_ports: None,
            free_page_reporting: None,
            watchdog: None,
            labels: BTreeMap::new(),
            migration: MigrationSettings::default(),
            autostart: None,
            shutdown_deadline: None,
            cloud_init: None,
        }
    }

    /// Volumes that this VM alone may use: disks, firmware variables, TPM state.
    pub fn volumes(&self) -> impl Iterator<Item = &VolumeRef> {
        let variables = match &self.firmware {
            Firmware::Uefi { variables, .. } => Some(variables),
            Firmware::Bios => None,
        };
        let state = self.tpm.as_ref().map(|tpm| &tpm.state);
        self.disks.iter().map(|disk| &disk.volume).chain(variables).chain(state)
    }
}

/// What an image is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ImageKind {
    /// A bzImage for direct boot.
    Kernel,
    /// An initial ramdisk.
    Initrd,
    /// A raw disk.
    Raw,
    /// A qcow2 disk without backing file or external data file.
    Qcow2,
    /// A CD-ROM's content (ISO 9660 or UDF).
    Iso,
}

/// An image that a resolved spec depends on, by content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRef {
    /// Identity in the controller's store.
    pub id: ImageId,
    /// BLAKE3 of the content, hexadecimal: hosts cache by it and refuse anything else.
    pub digest: String,
    /// Size in bytes.
    pub size: Bytes,
}

/// Where a VM's instructions are executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Accelerator {
    /// Hardware virtualisation.
    Kvm,
    /// QEMU's translator.
    Tcg,
}
