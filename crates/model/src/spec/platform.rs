//! What the machine has besides vCPUs, RAM, disks and interfaces. Where nothing is said, it is as specs of schema 1 were.

use serde::{Deserialize, Serialize};

use crate::{Bytes, VolumeRef, ids::Vmgenid};

/// What runs before the operating system.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Firmware {
    /// SeaBIOS.
    #[default]
    Bios,
    /// UEFI (OVMF, 4 MiB of flash).
    Uefi {
        /// The volume of its variables, created when the VM first starts. In a shared pool it moves with the VM.
        variables: VolumeRef,
        /// Only signed code boots; Microsoft's and Debian's keys are enrolled in new variables.
        #[serde(default)]
        secure_boot: bool,
    },
}

/// The graphics adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Video {
    /// Standard VGA with 8 MiB.
    #[default]
    Vga,
    /// virtio, with VGA for firmware.
    Virtio,
    /// None.
    None,
}

/// The real-time clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Rtc {
    /// What it shows when the VM starts.
    pub base: RtcBase,
    /// What becomes of ticks that the guest missed.
    pub drift: RtcDrift,
}

/// What the real-time clock shows when the VM starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RtcBase {
    /// UTC.
    #[default]
    Utc,
    /// The host's local time, which Windows expects.
    Localtime,
}

/// What becomes of clock ticks that a guest missed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RtcDrift {
    /// They are delivered later, faster.
    #[default]
    Slew,
    /// They are lost.
    Drop,
}

/// Hyper-V enlightenments: sets with a name, so that what a VM was started with stays known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Hyperv {
    /// None.
    #[default]
    Off,
    /// What Windows from 2012 on makes use of and QEMU 7.2 can migrate. Needs KVM.
    WindowsV1,
}

/// What the guest reads about its maker in SMBIOS. Each text is printable ASCII, 1 to 64 characters (OEM strings: 255).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Smbios {
    /// System manufacturer.
    pub manufacturer: Option<String>,
    /// Product name.
    pub product: Option<String>,
    /// Product version.
    pub version: Option<String>,
    /// Serial number.
    pub serial: Option<String>,
    /// Stock keeping unit.
    pub sku: Option<String>,
    /// Product family.
    pub family: Option<String>,
    /// OEM strings, at most 16.
    pub oem_strings: Vec<String>,
}

/// A trusted platform module: a command response buffer (CRB), emulated by a process of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Tpm {
    /// Version of the specification that it follows.
    #[serde(default)]
    pub version: TpmVersion,
    /// The volume of its state, created at the first start: what the guest keeps in it, keys above all.
    pub state: VolumeRef,
}

/// Version of a TPM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub enum TpmVersion {
    /// TPM 2.0.
    #[default]
    #[serde(rename = "2.0")]
    V2,
}

/// Size of the huge pages that a VM's RAM is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub enum HugePages {
    /// 2 MiB.
    #[serde(rename = "2MiB")]
    Mib2,
    /// 1 GiB.
    #[serde(rename = "1GiB")]
    Gib1,
}

impl HugePages {
    /// One of them.
    #[must_use]
    pub const fn size(self) -> Bytes {
        match self {
            Self::Mib2 => Bytes::mib(2),
            Self::Gib1 => Bytes::GIB,
        }
    }
}

/// Where on a host with several memory nodes the VM's RAM is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Numa {
    /// Wherever the host's kernel puts it.
    #[default]
    Any,
    /// All of it, and the vCPUs, on one node.
    OneNode,
}

/// A watchdog (Intel 6300ESB): acts when the guest no longer answers it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Watchdog {
    /// What it does.
    pub action: WatchdogAction,
}

/// What a watchdog does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WatchdogAction {
    /// Resets the VM.
    #[default]
    Reset,
    /// Asks the guest to power off.
    Shutdown,
    /// Switches the VM off.
    Poweroff,
    /// Lets the VM stand still.
    Pause,
    /// Nothing; for trying out.
    None,
}

impl WatchdogAction {
    /// QEMU's word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::Shutdown => "shutdown",
            Self::Poweroff => "poweroff",
            Self::Pause => "pause",
            Self::None => "none",
        }
    }
}

/// The platform of a [`crate::ResolvedSpec`]; its default is the platform of all specs of schema 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Platform {
    /// What runs before the operating system.
    pub firmware: Firmware,
    /// The graphics adapter.
    pub video: Video,
    /// Whether there is a USB controller with a tablet.
    pub tablet: bool,
    /// The real-time clock.
    pub rtc: Rtc,
    /// Hyper-V enlightenments.
    pub hyperv: Hyperv,
    /// SMBIOS texts.
    pub smbios: Smbios,
    /// VM generation id; `None`: the machine has no such device.
    pub vmgenid: Option<Vmgenid>,
    /// A TPM.
    pub tpm: Option<Tpm>,
    /// What RAM is made of.
    pub hugepages: Option<HugePages>,
    /// Where RAM is.
    pub numa: Numa,
    /// Root ports for devices that come while the VM runs.
    pub hotplug_ports: u8,
    /// Whether the guest gives memory that it has freed back to its host.
    pub free_page_reporting: bool,
    /// A watchdog.
    pub watchdog: Option<Watchdog>,
}
