//! What a spec may say: everything that can be checked without looking at any host. What it says ends up on QEMU's command line.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::memory::MAX_MEMORY_MAX;
use super::{
    Boot, CloudInit, DIMM_STEP, DiskBus, DiskSpec, FIXED_SLOTS, Firmware, IoLimits, MAX_CDROMS, MAX_HOTPLUG_PORTS,
    MAX_NETWORK_CONFIG, MAX_USER_DATA, NicSpec, Smbios, VmSpec, VolumeRef,
};
use crate::{Bytes, ErrorCode, Name, Refusal};

const MAX_VCPUS: u16 = 64;
const MIN_MEMORY: Bytes = Bytes::mib(32);
const MAX_MEMORY: Bytes = Bytes(1 << 40);
const MAX_DEVICES: usize = 8;
const MAX_CMDLINE: usize = 2_048;
/// The AHCI controller has six ports.
const SATA_PORTS: u8 = 6;
/// What virtio disks have room for.
const MAX_SERIAL: usize = 20;
const MAX_SMBIOS: usize = 64;
const MAX_OEM: (usize, usize) = (16, 255);
const MAX_ADDRESSES: usize = 32;
const MAX_LABELS: (usize, usize) = (64, 63);
const MAX_DEADLINE: u64 = 3_600;
/// Above it, QEMU refuses a limit.
const MAX_LIMIT: u64 = 1_000_000_000_000_000;

/// Why a [`VmSpec`] cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSpec {
    /// Number of vCPUs outside 1 to 64.
    #[error("a VM has 1 to {MAX_VCPUS} vCPUs, not {0}")]
    Vcpus(u16),
    /// RAM out of range or not a multiple of 1 MiB.
    #[error("memory is a multiple of 1 MiB from {MIN_MEMORY} to {MAX_MEMORY}, not {0} ({n} bytes)", n = .0.get())]
    Memory(Bytes),
    /// Growth to less than there is, to more than QEMU can address, or in steps that no guest takes.
    #[error("`memory_max` is a multiple of {DIMM_STEP}, at least `memory` and at most {MAX_MEMORY_MAX}, not {0} ({n} bytes)", n = .0.get())]
    MemoryMax(Bytes),
    /// RAM that is not whole huge pages.
    #[error("memory of huge pages is a multiple of {0}")]
    HugePages(Bytes),
    /// Too many disks, interfaces or drives.
    #[error("a VM has at most {MAX_DEVICES} disks, {MAX_DEVICES} interfaces and {MAX_CDROMS} CD-ROM drives")]
    Devices,
    /// Boot from disk without a disk.
    #[error("the VM boots from its first disk but has none, nor a CD-ROM drive")]
    NoBootDisk,
    /// Command line too long or with control characters.
    #[error("a kernel command line has at most {MAX_CMDLINE} printable ASCII characters")]
    Cmdline,
    /// The same volume twice.
    #[error("volume {0} is attached twice")]
    VolumeTwice(VolumeRef),
    /// A machine type or CPU model with characters that QEMU would read as further options.
    #[error("{0} may consist of letters, digits, '-', '_', '.' only")]
    Identifier(&'static str),
    /// A size that is no multiple of 512, zero, or over 64 TiB.
    #[error("the size of {0} must be a multiple of 512 bytes, at most 64 TiB")]
    DiskSize(VolumeRef),
    /// A bus that ends migration.
    #[error("volume {0} cannot be on NVMe: QEMU cannot migrate an NVMe controller")]
    Nvme(VolumeRef),
    /// A serial number that does not fit.
    #[error("the serial number of {0} may consist of 1 to {MAX_SERIAL} letters, digits, '-', '_', '.'")]
    Serial(VolumeRef),
    /// Limits that contradict each other, or that QEMU does not take.
    #[error("an I/O limit of {0} is a number from 1 to {MAX_LIMIT}, and a total excludes the separate limits of its kind")]
    Limits(VolumeRef),
    /// A place that does not exist, is not for this device, or is taken.
    #[error("{what} cannot be in slot {slot}: {why}")]
    Slot {
        /// Which device.
        what: String,
        /// The place.
        slot: u8,
        /// What is wrong with it.
        why: &'static str,
    },
    /// More root ports than there are.
    #[error("a VM has at most {MAX_HOTPLUG_PORTS} root ports for hot-plug, not {0}")]
    HotplugPorts(u8),
    /// An address that no guest can have.
    #[error("{0} is no address that a guest can have")]
    Address(IpAddr),
    /// Too many addresses, or one twice.
    #[error("an interface has at most {MAX_ADDRESSES} addresses, each once")]
    Addresses,
    /// A text with control characters, or too long.
    #[error("{what} is 1 to {longest} printable ASCII characters")]
    Text {
        /// Which text.
        what: &'static str,
        /// Its limit.
        longest: usize,
    },
    /// Too many of something.
    #[error("a VM has at most {most} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The limit.
        most: usize,
    },
    /// A deadline that is none.
    #[error("a shutdown deadline is 1 to {MAX_DEADLINE} seconds")]
    Deadline,
    /// Text for cloud-init that is too long or not text.
    #[error("{what} for cloud-init has at most {longest} bytes, and no NUL")]
    CloudInit {
        /// Which text.
        what: &'static str,
        /// Its limit.
        longest: usize,
    },
    /// A name that is none for a host.
    #[error("a host name for cloud-init consists of letters, digits, '-' and '.'")]
    HostName,
}

impl From<InvalidSpec> for Refusal {
    fn from(error: InvalidSpec) -> Self {
        let hint = match &error {
            InvalidSpec::Nvme(_) => "put it on bus virtio or scsi (both take discard and several queues), or on sata",
            _ => "correct the field and send the request again",
        };
        Self::new(ErrorCode::SpecInvalid, error.to_string()).hint(hint)
    }
}

fn is_plain(text: &str, longest: usize) -> bool {
    (1..=longest).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

fn is_printable(text: &str, longest: usize) -> bool {
    (1..=longest).contains(&text.len()) && text.bytes().all(|b| (b' '..=b'~').contains(&b))
}

/// What labels can be, of a VM or of what is said of VMs.
///
/// # Errors
/// Too many of them, or a text that is too long or not printable.
pub fn check_labels(labels: &BTreeMap<Name, String>) -> Result<(), InvalidSpec> {
    if labels.len() > MAX_LABELS.0 {
        return Err(InvalidSpec::TooMany { what: "labels", most: MAX_LABELS.0 });
    }
    if !labels.values().all(|text| text.is_empty() || is_printable(text, MAX_LABELS.1)) {
        return Err(InvalidSpec::Text { what: "a label's text", longest: MAX_LABELS.1 });
    }
    Ok(())
}

impl VmSpec {
    /// Checks what can be checked without looking at any host.
    ///
    /// # Errors
    /// The first rule that the spec breaks.
    pub fn validate(&self) -> Result<(), InvalidSpec> {
        self.validate_size()?;
        if self.disks.len() > MAX_DEVICES || self.nics.len() > MAX_DEVICES || self.cdroms.len() > MAX_CDROMS {
            return Err(InvalidSpec::Devices);
        }
        match &self.boot {
            Boot::Disk if self.disks.is_empty() && self.cdroms.is_empty() => return Err(InvalidSpec::NoBootDisk),
            Boot::Kernel { cmdline, .. } if !cmdline.is_empty() && !is_printable(cmdline, MAX_CMDLINE) => {
                return Err(InvalidSpec::Cmdline);
            }
            _ => {}
        }
        let volumes: Vec<&VolumeRef> = self.volumes().collect();
        if let Some((_, twice)) =
            volumes.iter().enumerate().find(|(index, volume)| volumes.iter().take(*index).any(|v| v == *volume))
        {
            return Err(InvalidSpec::VolumeTwice((*twice).clone()));
        }
        self.disks.iter().try_for_each(validate_disk)?;
        self.nics.iter().try_for_each(validate_nic)?;
        self.validate_slots()?;
        for (what, text) in [("a machine type", &self.machine), ("a CPU model", &self.cpu)] {
            if text.as_ref().is_some_and(|text| !is_plain(text, 64)) {
                return Err(InvalidSpec::Identifier(what));
            }
        }
        validate_smbios(&self.smbios)?;
        check_labels(&self.labels)?;
        if self.shutdown_deadline.is_some_and(|deadline| !(1..=MAX_DEADLINE).contains(&deadline.get())) {
            return Err(InvalidSpec::Deadline);
        }
        self.cloud_init.as_ref().map_or(Ok(()), validate_cloud_init)
    }

    fn validate_size(&self) -> Result<(), InvalidSpec> {
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return Err(InvalidSpec::Vcpus(self.vcpus));
        }
        if self.memory < MIN_MEMORY || self.memory > MAX_MEMORY || !self.memory.get().is_multiple_of(Bytes::MIB.get()) {
            return Err(InvalidSpec::Memory(self.memory));
        }
        let max =
            self.memory_max.filter(|max| *max < self.memory || *max > MAX_MEMORY_MAX || !max.get().is_multiple_of(DIMM_STEP.get()));
        if let Some(max) = max {
            return Err(InvalidSpec::MemoryMax(max));
        }
        let Some(size) = self.hugepages.map(super::HugePages::size) else { return Ok(()) };
        let whole = |bytes: Bytes| bytes.get().is_multiple_of(size.get());
        if whole(self.memory) && self.memory_max.is_none_or(whole) { Ok(()) } else { Err(InvalidSpec::HugePages(size)) }
    }

    /// Places: each exists, fits its device, and is taken once.
    fn validate_slots(&self) -> Result<(), InvalidSpec> {
        if self.hotplug_ports.is_some_and(|ports| ports > MAX_HOTPLUG_PORTS) {
            return Err(InvalidSpec::HotplugPorts(self.hotplug_ports.unwrap_or_default()));
        }
        let ends = FIXED_SLOTS + self.hotplug_ports.unwrap_or_default();
        let mut on_ports = Vec::new();
        let mut check = |what: String, slot: u8, fixed: &mut Vec<u8>| {
            let taken = if slot < FIXED_SLOTS { fixed } else { &mut on_ports };
            if slot >= ends {
                return Err(InvalidSpec::Slot { what, slot, why: "the VM has no root port for it" });
            }
            if taken.contains(&slot) {
                return Err(InvalidSpec::Slot { what, slot, why: "another device is there" });
            }
            taken.push(slot);
            Ok(())
        };
        // One without a place gets one when the spec is stored.
        let mut fixed = Vec::new();
        for (disk, slot) in self.disks.iter().filter_map(|disk| Some((disk, disk.slot?))) {
            let what = format!("disk {}", disk.volume);
            if disk.bus == DiskBus::Sata && slot >= SATA_PORTS {
                return Err(InvalidSpec::Slot { what, slot, why: "disks on sata have slots 0 to 5" });
            }
            if disk.bus == DiskBus::Scsi && slot >= FIXED_SLOTS {
                return Err(InvalidSpec::Slot { what, slot, why: "disks on scsi have slots 0 to 7" });
            }
            check(what, slot, &mut fixed)?;
        }
        let mut fixed = Vec::new();
        for (index, slot) in self.nics.iter().enumerate().filter_map(|(index, nic)| Some((index, nic.slot?))) {
            check(format!("interface {index}"), slot, &mut fixed)?;
        }
        Ok(())
    }
}

fn validate_disk(disk: &DiskSpec) -> Result<(), InvalidSpec> {
    if disk.size.is_some_and(|size| size.get() == 0 || size.get() > 64 << 40 || !size.get().is_multiple_of(512)) {
        return Err(InvalidSpec::DiskSize(disk.volume.clone()));
    }
    if disk.bus == DiskBus::Nvme {
        return Err(InvalidSpec::Nvme(disk.volume.clone()));
    }
    if disk.serial.as_ref().is_some_and(|serial| !is_plain(serial, MAX_SERIAL)) {
        return Err(InvalidSpec::Serial(disk.volume.clone()));
    }
    let IoLimits { iops, read_iops, write_iops, rate, read_rate, write_rate } = disk.io_limits;
    let bytes = |rate: Option<crate::BytesPerSec>| rate.map(crate::BytesPerSec::get);
    let kinds = [[iops, read_iops, write_iops], [bytes(rate), bytes(read_rate), bytes(write_rate)]];
    let sound = kinds.iter().all(|[total, read, write]| {
        [total, read, write].into_iter().flatten().all(|limit| (1..=MAX_LIMIT).contains(limit))
            && (total.is_none() || (read.is_none() && write.is_none()))
    });
    if sound { Ok(()) } else { Err(InvalidSpec::Limits(disk.volume.clone())) }
}

fn validate_nic(nic: &NicSpec) -> Result<(), InvalidSpec> {
    let twice = nic.addresses.iter().enumerate().any(|(index, address)| nic.addresses.iter().take(index).any(|a| a == address));
    if nic.addresses.len() > MAX_ADDRESSES || twice {
        return Err(InvalidSpec::Addresses);
    }
    let usable = |address: &IpAddr| {
        let broadcast = matches!(address, IpAddr::V4(address) if address.is_broadcast());
        let mapped = matches!(address, IpAddr::V6(address) if address.to_ipv4_mapped().is_some());
        !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || broadcast || mapped)
    };
    nic.addresses.iter().find(|address| !usable(address)).map_or(Ok(()), |address| Err(InvalidSpec::Address(*address)))
}

fn validate_smbios(smbios: &Smbios) -> Result<(), InvalidSpec> {
    let Smbios { manufacturer, product, version, serial, sku, family, oem_strings } = smbios;
    let texts = [manufacturer, product, version, serial, sku, family];
    if !texts.into_iter().flatten().all(|text| is_printable(text, MAX_SMBIOS)) {
        return Err(InvalidSpec::Text { what: "an SMBIOS text", longest: MAX_SMBIOS });
    }
    let (most, longest) = MAX_OEM;
    if oem_strings.len() > most {
        return Err(InvalidSpec::TooMany { what: "OEM strings", most });
    }
    if !oem_strings.iter().all(|text| is_printable(text, longest)) {
        return Err(InvalidSpec::Text { what: "an OEM string", longest });
    }
    Ok(())
}

fn validate_cloud_init(cloud_init: &CloudInit) -> Result<(), InvalidSpec> {
    let CloudInit { user_data, network_config, vendor_data, host_name } = cloud_init;
    let texts = [
        ("user data", user_data, MAX_USER_DATA),
        ("a network configuration", network_config, MAX_NETWORK_CONFIG),
        ("vendor data", vendor_data, MAX_USER_DATA),
    ];
    for (what, text, longest) in texts {
        if text.as_ref().is_some_and(|text| text.len() > longest || text.contains('\0')) {
            return Err(InvalidSpec::CloudInit { what, longest });
        }
    }
    // A name of ours may have underscores, a host's may not.
    let unfit =
        |name: &crate::Name| name.as_str().split('.').any(|part| part.is_empty() || part.contains('_') || part.ends_with('-'));
    if host_name.as_ref().is_some_and(unfit) { Err(InvalidSpec::HostName) } else { Ok(()) }
}

impl Firmware {
    /// Whether it is UEFI.
    #[must_use]
    pub const fn is_uefi(&self) -> bool {
        matches!(self, Self::Uefi { .. })
    }
}
