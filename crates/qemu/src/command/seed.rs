//! The seed: a read-only virtio disk with the serial number `seed`, behind all others on the root bus so that it renames none of them.
//!
//! The guest sees it as any small disk with a file system labelled `cidata`. A disk and not a CD-ROM: every guest that has its root on virtio
//! can read it, and a CD-ROM drive would be one more device whose medium can be changed.

use std::os::fd::RawFd;

use super::Line;
use super::options::{Object, Pairs};

/// PCI slot on `pcie.0`.
const SLOT: usize = 0x1e;
/// Number of its set of descriptors: none of those of disks, and none that QEMU would give to a medium.
pub(super) const SET: u16 = 200;

pub(super) fn add(line: &mut Line, fd: RawFd) {
    line.pairs("-add-fd", Pairs::new().with("fd", fd).with("set", SET).with("opaque", "seed"));
    let file = Object::new()
        .with("driver", "file")
        .with("node-name", "seed-file")
        .with("filename", format!("/dev/fdset/{SET}"))
        // It is memory of this QEMU alone, and sealed.
        .with("locking", "off")
        .with("read-only", true)
        .with("auto-read-only", false);
    line.json("-blockdev", file);
    let node = Object::new().with("driver", "raw").with("node-name", "seed").with("file", "seed-file").with("read-only", true);
    line.json("-blockdev", node);
    let device = Object::pci("virtio-blk-pci", "seed-device", SLOT)
        .modern()
        .with("drive", "seed")
        .with("serial", "seed")
        .with("num-queues", 1)
        .with("logical_block_size", 512)
        .with("physical_block_size", 512);
    line.json("-device", device);
}
