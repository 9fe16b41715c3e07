//! Devices and where they are. A place that was given away once stays what it is for ever: VMs that run have it. On `pcie.0`:
//!
//! ```text
//!  01 rng         04 graphics (VGA or virtio)        08-0f virtio disks, slots 0-7       18.0-18.7 root ports for hot-plug,
//!  02 balloon     05 SCSI controller: target = slot  10-17 interfaces, slots 0-7                   slots 8-15 of disks and interfaces
//!  03 serial      06 AHCI for disks: port = slot     19    watchdog                      1a-1d     free, 1e seed
//!                 07 USB, port 1: tablet             1f    chipset: its AHCI (1f.2) has CD-ROM drives 0-3 on ports 0-3
//! ```
//! Beside it, on no bus: the TPM (`super::tpm`).
//!
//! Controllers (05, 06, 07) and root ports are there only if the spec has what needs them; a VM with fewer root ports has the first ones.
//! Interfaces have no option ROM (network boot is not offered), the ROM of graphics is fixed at 64 KiB: a ROM is a RAM block, and its size
//! would otherwise differ between versions and end a migration. The serial console has no log file, since a guest could fill the host's
//! disk with it: the agent is the socket's only client and keeps a bounded log.

use std::os::fd::RawFd;

use godwit_model::spec::{FIXED_SLOTS, MAX_CDROMS, MAX_HOTPLUG_PORTS};
use godwit_model::{CacheMode, Discard, DiskBus, DiskFormat, NicModel, ResolvedDisk, ResolvedNic, ResolvedSpec, Video};

use super::options::{Object, Pairs};
use super::{CommandError, DiskFds, FlashFds, Line, Resources};

const SCSI: usize = 0x05;
const AHCI: usize = 0x06;
const USB: usize = 0x07;
const DISKS: usize = 0x08;
const INTERFACES: usize = 0x10;
const PORTS: usize = 0x18;
const WATCHDOG: usize = 0x19;
const SATA_PORTS: usize = 6;
const FIXED: usize = FIXED_SLOTS as usize;

/// Numbers of descriptor sets: disks have their slot and one more, media what QEMU gives them when they are changed.
pub(super) const CODE_SET: usize = 24;
pub(super) const VARIABLES_SET: usize = 25;
const MEDIA_SET: usize = 32;

/// A spec may have crossed the network since it was validated.
pub(super) fn check(spec: &ResolvedSpec) -> Result<(), CommandError> {
    if spec.platform.hotplug_ports > MAX_HOTPLUG_PORTS {
        return Err(CommandError::Slot(FIXED + usize::from(spec.platform.hotplug_ports)));
    }
    if spec.cdroms.len() > MAX_CDROMS {
        return Err(CommandError::Count { what: "CD-ROM drives", wanted: spec.cdroms.len(), given: MAX_CDROMS });
    }
    let end = FIXED + usize::from(spec.platform.hotplug_ports);
    let mut taken = Vec::new();
    let mut take = |kind: &'static str, slot: usize, end: usize| {
        // Root ports are one for all, the others are of their kind.
        let place = (if slot < FIXED { kind } else { "port" }, slot);
        if slot >= end || taken.contains(&place) {
            return Err(CommandError::Slot(slot));
        }
        taken.push(place);
        Ok(())
    };
    for (slot, disk) in spec.disk_slots() {
        match disk.bus {
            DiskBus::Virtio => take("disk", slot, end)?,
            DiskBus::Scsi => take("disk", slot, FIXED)?,
            DiskBus::Sata => take("disk", slot, SATA_PORTS)?,
            DiskBus::Nvme => return Err(CommandError::Unsupported("a disk on NVMe, which QEMU cannot migrate,")),
        }
        let plain = |text: &String| {
            (1..=20).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        };
        if disk.serial.as_ref().is_some_and(|serial| !plain(serial)) {
            return Err(CommandError::Text("the serial number of a disk"));
        }
    }
    spec.nic_slots().try_for_each(|(slot, _)| take("interface", slot, end))
}

/// Every device of the spec.
pub(super) fn add_all(line: &mut Line, spec: &ResolvedSpec, resources: &Resources) {
    add_standing(line, spec);
    let on = |bus: DiskBus| spec.disks.iter().any(|disk| disk.bus == bus);
    if on(DiskBus::Scsi) {
        let controller = Object::pci("virtio-scsi-pci", "scsi", SCSI).modern().with("num_queues", spec.vcpus.min(8));
        line.json("-device", controller);
    }
    if on(DiskBus::Sata) {
        line.json("-device", Object::pci("ich9-ahci", "sata", AHCI));
    }
    if spec.platform.tablet {
        line.json("-device", Object::pci("qemu-xhci", "usb", USB).with("p2", 4).with("p3", 4));
        line.json("-device", Object::device("usb-tablet", "tablet").with("bus", "usb.0").with("port", "1"));
    }
    for port in 0..usize::from(spec.platform.hotplug_ports) {
        let place = Object::device("pcie-root-port", &port_name(port)).with("bus", "pcie.0");
        let place = place.with("addr", format!("0x{PORTS:x}.0x{port:x}")).with("multifunction", true);
        line.json("-device", place.with("port", port).with("chassis", port + 1));
    }
    if let Some(watchdog) = spec.platform.watchdog {
        line.json("-device", Object::pci("i6300esb", "watchdog", WATCHDOG));
        line.pairs("-action", Pairs::new().with("watchdog", watchdog.action.as_str()));
    }
    if let Some(flash) = resources.flash {
        add_flash(line, flash);
    }
    for ((index, (slot, disk)), fds) in spec.disk_slots().enumerate().zip(&resources.disks) {
        add_fds(line, disk_set(slot), &format!("disk{slot}"), *fds);
        let [file, node] = disk_nodes(slot, disk);
        line.json("-blockdev", file);
        line.json("-blockdev", node);
        let device = disk_device(slot, disk, spec.vcpus);
        line.json("-device", if index == 0 { device.with("bootindex", 1) } else { device });
    }
    for ((slot, nic), tap) in spec.nic_slots().zip(&resources.taps) {
        line.json("-netdev", nic_backend(slot).with("fd", tap.to_string()).with("vhost", false));
        line.json("-device", nic_device(slot, nic, &spec.machine));
    }
    for (drive, medium) in resources.media.iter().enumerate() {
        add_cdrom(line, drive, *medium);
    }
}

fn add_standing(line: &mut Line, spec: &ResolvedSpec) {
    line.json("-object", Object::new().with("qom-type", "rng-builtin").with("id", "entropy"));
    line.json("-device", Object::pci("virtio-rng-pci", "rng0", 0x01).modern().with("rng", "entropy"));
    let balloon = Object::pci("virtio-balloon-pci", "balloon0", 0x02).modern().with("deflate-on-oom", true);
    // A VM of before has no such property on its command line, on any host.
    line.json("-device", if spec.platform.free_page_reporting { balloon.with("free-page-reporting", true) } else { balloon });
    line.json("-device", Object::pci("virtio-serial-pci", "channels", 0x03).modern().with("max_ports", 4));
    let port = Object::device("virtserialport", "guest-agent-port").with("bus", "channels.0").with("nr", 1);
    line.json("-device", port.with("chardev", "guest-agent").with("name", "org.qemu.guest_agent.0"));
    match spec.platform.video {
        Video::Vga => line.json("-device", Object::pci("VGA", "vga", 0x04).with("vgamem_mb", 8).with("romsize", 0x1_0000)),
        Video::Virtio => {
            // As VGA it has no choice about legacy interfaces.
            line.json("-device", Object::pci("virtio-vga", "vga", 0x04).with("max_outputs", 1).with("romsize", 0x1_0000));
        }
        Video::None => {}
    }
    if let Some(vmgenid) = spec.platform.vmgenid {
        line.json("-device", Object::device("vmgenid", "vmgenid").with("guid", vmgenid.to_string()));
    }
}

/// The descriptors of a volume, for both kinds of access.
fn add_fds(line: &mut Line, set: usize, name: &str, fds: DiskFds) {
    for (fd, access) in [(fds.read_only, "read-only"), (fds.read_write, "read-write")] {
        line.pairs("-add-fd", Pairs::new().with("fd", fd).with("set", set).with("opaque", format!("{name}-{access}")));
    }
}

fn port_name(port: usize) -> String {
    format!("port{port}")
}

/// A device at its slot: on the root bus behind `first`, or in a root port.
fn in_slot(driver: &str, id: &str, first: usize, slot: usize) -> Object {
    match slot.checked_sub(FIXED) {
        None => Object::pci(driver, id, first + slot),
        Some(port) => Object::device(driver, id).with("bus", port_name(port)).with("addr", "0x0"),
    }
}

/// A volume as QEMU's block layer sees it: its file, and the declared format in it.
pub(crate) fn disk_nodes(slot: usize, disk: &ResolvedDisk) -> [Object; 2] {
    let cache = || Object::new().with("direct", disk.cache == CacheMode::Direct).with("no-flush", false);
    let discard = match disk.discard {
        Discard::Unmap => "unmap",
        Discard::Ignore => "ignore",
    };
    let file = Object::new()
        .with("driver", "file")
        .with("node-name", format!("disk{slot}-file"))
        .with("filename", format!("/dev/fdset/{}", disk_set(slot)))
        .with("aio", "threads")
        .with("locking", "on")
        .with("auto-read-only", false)
        .with("discard", discard)
        .with("cache", cache());
    let node = Object::new()
        .with("driver", disk.format.driver())
        .with("node-name", format!("disk{slot}"))
        .with("file", format!("disk{slot}-file"))
        .with("read-only", false)
        .with("discard", discard)
        .with("cache", cache());
    // The declared format, and nothing that a header may refer to outside the volume.
    [file, if disk.format == DiskFormat::Qcow2 { node.with_null("backing") } else { node }]
}

/// Number of the descriptor set of a disk.
pub(crate) fn disk_set(slot: usize) -> usize {
    slot + 1
}

/// Id of a disk's device.
pub(crate) fn disk_name(slot: usize) -> String {
    format!("disk{slot}-device")
}

pub(crate) fn disk_device(slot: usize, disk: &ResolvedDisk, vcpus: u16) -> Object {
    let id = disk_name(slot);
    let serial = disk.serial.clone().unwrap_or_else(|| format!("disk{slot}"));
    let device = match disk.bus {
        DiskBus::Virtio | DiskBus::Nvme => in_slot("virtio-blk-pci", &id, DISKS, slot).modern(),
        DiskBus::Scsi => {
            let target = Object::device("scsi-hd", &id).with("bus", "scsi.0").with("channel", 0).with("scsi-id", slot);
            target.with("lun", 0).with("device_id", serial.clone())
        }
        DiskBus::Sata => Object::device("ide-hd", &id).with("bus", format!("sata.{slot}")),
    };
    let device = device.with("drive", format!("disk{slot}")).with("serial", serial);
    let device = if matches!(disk.bus, DiskBus::Virtio) { device.with("num-queues", vcpus.min(8)) } else { device };
    device.with("write-cache", "on").with("logical_block_size", 512).with("physical_block_size", 512)
}

pub(crate) fn nic_backend(slot: usize) -> Object {
    Object::new().with("type", "tap").with("id", format!("net{slot}-tap"))
}

pub(crate) fn nic_device(slot: usize, nic: &ResolvedNic, machine: &str) -> Object {
    let id = format!("net{slot}");
    let device = match nic.model {
        NicModel::Virtio => in_slot("virtio-net-pci", &id, INTERFACES, slot).modern(),
        NicModel::E1000e => in_slot("e1000e", &id, INTERFACES, slot),
    };
    let device = device.with("netdev", format!("net{slot}-tap")).with("mac", nic.mac).with("romfile", "");
    // The guest sees it: the same on every host of the network, for as long as the VM runs.
    let device = match nic.mtu.filter(|_| nic.model == NicModel::Virtio) {
        Some(mtu) => device.with("host_mtu", mtu),
        None => device,
    };
    match nic.model {
        NicModel::E1000e => device,
        // Offered only where the host's kernel can do it, so it would tie the VM to new kernels.
        NicModel::Virtio if has_udp_segmentation(machine) => {
            device.with("mq", false).with("host_uso", false).with("guest_uso4", false).with("guest_uso6", false)
        }
        NicModel::Virtio => device.with("mq", false),
    }
}

/// Whether a machine type is new enough (8.2) to offer UDP segmentation; every QEMU that knows such a type knows the properties.
pub(super) fn has_udp_segmentation(machine: &str) -> bool {
    let version = machine.rsplit('-').next().and_then(|version| version.split_once('.'));
    version.and_then(|(major, minor)| Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?))) >= Some((8, 2))
}

/// Code is part of the VM's memory: it moves with it, whatever firmware the other host has. Variables are a volume.
fn add_flash(line: &mut Line, flash: FlashFds) {
    line.pairs("-add-fd", Pairs::new().with("fd", flash.code).with("set", CODE_SET).with("opaque", "firmware"));
    add_fds(line, VARIABLES_SET, "variables", flash.variables);
    for (name, set, direct, read_only) in [("firmware", CODE_SET, false, true), ("variables", VARIABLES_SET, true, false)] {
        let cache = || Object::new().with("direct", direct).with("no-flush", false);
        let file = Object::new().with("driver", "file").with("node-name", format!("{name}-file"));
        let file = file.with("filename", format!("/dev/fdset/{set}")).with("aio", "threads").with("read-only", read_only);
        let file = file.with("locking", if read_only { "off" } else { "on" }).with("auto-read-only", false);
        line.json("-blockdev", file.with("cache", cache()));
        let node = Object::new().with("driver", "raw").with("node-name", name).with("file", format!("{name}-file"));
        line.json("-blockdev", node.with("read-only", read_only).with("cache", cache()));
    }
}

/// Id of a CD-ROM drive.
pub(crate) fn drive_name(drive: usize) -> String {
    format!("cdrom{drive}")
}

/// A medium: a file of the image cache, which nobody writes any more, by the number of its descriptor set.
pub(crate) fn medium_nodes(set: usize) -> [Object; 2] {
    let cache = || Object::new().with("direct", false).with("no-flush", false);
    let file = Object::new().with("driver", "file").with("node-name", format!("medium{set}-file"));
    let file = file.with("filename", format!("/dev/fdset/{set}")).with("aio", "threads").with("read-only", true);
    let file = file.with("locking", "off").with("auto-read-only", false).with("cache", cache());
    let node = Object::new().with("driver", "raw").with("node-name", medium_name(set)).with("file", format!("medium{set}-file"));
    [file, node.with("read-only", true).with("cache", cache())]
}

/// The node of the medium in descriptor set `set`.
pub(crate) fn medium_name(set: usize) -> String {
    format!("medium{set}")
}

fn add_cdrom(line: &mut Line, drive: usize, medium: Option<RawFd>) {
    let device = Object::device("ide-cd", &drive_name(drive)).with("bus", format!("ide.{drive}"));
    let device = if let Some(fd) = medium {
        let set = MEDIA_SET + drive;
        line.pairs("-add-fd", Pairs::new().with("fd", fd).with("set", set).with("opaque", format!("medium{set}")));
        let [file, node] = medium_nodes(set);
        line.json("-blockdev", file);
        line.json("-blockdev", node);
        device.with("drive", medium_name(set))
    } else {
        device
    };
    line.json("-device", device.with("bootindex", 10 + drive));
}
