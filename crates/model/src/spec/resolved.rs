//! What a VM was started with: its ABI for life. Nothing in it is a default, an alias or a name that could come to mean something else.
//!
//! Fields that came after schema 1 read as what every VM had before them.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::nic::plugged;
use crate::{
    Accelerator, Bytes, CacheMode, CloudInit, Discard, DiskBus, DiskFormat, Growth, ImageKind, ImageRef, IoLimits, MacAddress,
    Name, NetworkId, NicModel, Platform, Seconds, VmId, VolumeRef,
};

/// What a VM was started with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedSpec {
    /// [`crate::SPEC_SCHEMA`] of the writer.
    pub schema: u32,
    /// The VM.
    pub vm: VmId,
    /// Its name when it was started (process title, guest-visible name).
    pub name: Name,
    /// The accelerator of its first host.
    pub accelerator: Accelerator,
    /// Versioned machine type.
    pub machine: String,
    /// Named CPU model.
    pub cpu: String,
    /// vCPUs.
    pub vcpus: u16,
    /// RAM that it was started with.
    pub memory: Bytes,
    /// How memory can become larger while it runs; `None`: it cannot.
    #[serde(default)]
    pub growth: Option<Growth>,
    /// Kernel, for direct boot.
    pub kernel: Option<ImageRef>,
    /// Initial ramdisk, for direct boot.
    pub initrd: Option<ImageRef>,
    /// Kernel command line, for direct boot.
    pub cmdline: String,
    /// Disks.
    pub disks: Vec<ResolvedDisk>,
    /// Interfaces.
    pub nics: Vec<ResolvedNic>,
    /// CD-ROM drives, in the order of their ports.
    #[serde(default)]
    pub cdroms: Vec<ResolvedCdrom>,
    /// Everything else that the guest sees.
    #[serde(default)]
    pub platform: Platform,
    /// What the guest is told at its first boot.
    #[serde(default)]
    pub cloud_init: Option<CloudInit>,
    /// How its guest is powered off when its host goes down.
    #[serde(default)]
    pub power_off: PowerOff,
}

/// How a guest is powered off when its host goes down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PowerOff {
    /// Higher ones first: the reverse of the order in which VMs start by themselves. Those that do not start by themselves are first of all.
    pub order: Option<u16>,
    /// Time for the guest.
    pub deadline: Option<Seconds>,
}

/// A disk of a [`ResolvedSpec`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedDisk {
    /// Where it lives.
    pub volume: VolumeRef,
    /// Declared format.
    pub format: DiskFormat,
    /// Cache mode.
    pub cache: CacheMode,
    /// Size to create it with if it is missing.
    pub create: Option<Bytes>,
    /// Image to copy it from when it is created, with its kind.
    pub image: Option<(ImageRef, ImageKind)>,
    /// What the guest sees it on.
    #[serde(default)]
    pub bus: DiskBus,
    /// What becomes of space that the guest gives back.
    #[serde(default)]
    pub discard: Discard,
    /// Serial number; `None` in specs of schema 1: `disk` and its slot.
    #[serde(default)]
    pub serial: Option<String>,
    /// What it may do in a second.
    #[serde(default)]
    pub io_limits: IoLimits,
    /// Its place; `None` in specs of schema 1: its index.
    #[serde(default)]
    pub slot: Option<u8>,
}

/// An interface of a [`ResolvedSpec`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedNic {
    /// The network it is on.
    pub network: Name,
    /// Its address.
    pub mac: MacAddress,
    /// What the guest sees.
    #[serde(default)]
    pub model: NicModel,
    /// IP addresses that the guest may use; none means any.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// Whether its cable is plugged in.
    #[serde(default = "plugged")]
    pub link_up: bool,
    /// Its place; `None` in specs of schema 1: its index.
    #[serde(default)]
    pub slot: Option<u8>,
    /// The identity of its network, whose name another team may use too; `None` in specs from before networks had one.
    #[serde(default)]
    pub network_id: Option<NetworkId>,
    /// MTU that the guest is told, if its model can tell; it sees it, so it stays. `None` in specs from before: nothing is told.
    #[serde(default)]
    pub mtu: Option<u32>,
}

/// A CD-ROM drive of a [`ResolvedSpec`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedCdrom {
    /// What is in it now.
    pub medium: Option<ImageRef>,
}

impl ResolvedDisk {
    /// A disk that must exist, as those of schema 1.
    #[must_use]
    pub fn new(volume: VolumeRef, format: DiskFormat) -> Self {
        Self {
            volume,
            format,
            cache: CacheMode::default(),
            create: None,
            image: None,
            bus: DiskBus::default(),
            discard: Discard::default(),
            serial: None,
            io_limits: IoLimits::default(),
            slot: None,
        }
    }
}

impl ResolvedNic {
    /// An interface as those of schema 1.
    #[must_use]
    pub const fn new(network: Name, mac: MacAddress) -> Self {
        Self {
            network,
            mac,
            model: NicModel::Virtio,
            addresses: Vec::new(),
            link_up: true,
            slot: None,
            network_id: None,
            mtu: None,
        }
    }
}

impl ResolvedSpec {
    /// Images that a host needs before it can start the VM.
    pub fn images(&self) -> impl Iterator<Item = &ImageRef> {
        let disks = self.disks.iter().filter_map(|disk| disk.image.as_ref().map(|(image, _)| image));
        let media = self.cdroms.iter().filter_map(|cdrom| cdrom.medium.as_ref());
        self.kernel.iter().chain(&self.initrd).chain(disks).chain(media)
    }

    /// Disks with their places.
    pub fn disk_slots(&self) -> impl Iterator<Item = (usize, &ResolvedDisk)> {
        self.disks.iter().enumerate().map(|(index, disk)| (disk.slot.map_or(index, usize::from), disk))
    }

    /// Interfaces with their places.
    pub fn nic_slots(&self) -> impl Iterator<Item = (usize, &ResolvedNic)> {
        self.nics.iter().enumerate().map(|(index, nic)| (nic.slot.map_or(index, usize::from), nic))
    }

    /// Volumes that this VM alone may use: disks, firmware variables, TPM state.
    pub fn volumes(&self) -> impl Iterator<Item = &VolumeRef> {
        let variables = match &self.platform.firmware {
            crate::Firmware::Uefi { variables, .. } => Some(variables),
            crate::Firmware::Bios => None,
        };
        let state = self.platform.tpm.as_ref().map(|tpm| &tpm.state);
        self.disks.iter().map(|disk| &disk.volume).chain(variables).chain(state)
    }
}
