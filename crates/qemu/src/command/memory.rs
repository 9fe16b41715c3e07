//! The guest's memory: RAM, room for DIMMs, and the DIMMs that came while the VM ran.
//!
//! Names of backends travel with every page: they are the same on every host.

use godwit_model::spec::DIMM_STEP;
use godwit_model::{Dimm, Platform, ResolvedSpec};

use super::options::{Object, Pairs};
use super::{CommandError, Line};

/// QEMU's own name for a machine's RAM, which RAM of huge pages has too.
pub(super) const RAM: &str = "pc.ram";
/// More slots than any spec has.
const MAX_SLOTS: u8 = 64;

/// A spec may have crossed the network since it was validated.
pub(super) fn check(spec: &ResolvedSpec) -> Result<(), CommandError> {
    let pages = spec.platform.hugepages.map(|pages| pages.size().get());
    let whole = |bytes: u64| pages.is_none_or(|size| bytes.is_multiple_of(size));
    if !whole(spec.memory.get()) || !spec.dimms().iter().all(|dimm| whole(dimm.size.get())) {
        return Err(CommandError::HugePages);
    }
    let Some((slots, room)) = spec.room() else {
        return if spec.dimms().is_empty() { Ok(()) } else { Err(CommandError::Dimms) };
    };
    let dimms = spec.dimms();
    let sound = dimms.iter().enumerate().all(|(index, dimm)| {
        let placed = [dimm.size.get(), dimm.address.0].iter().all(|bytes| bytes.is_multiple_of(DIMM_STEP.get()));
        let twice = dimms.iter().take(index).any(|other| other.slot == dimm.slot);
        placed && dimm.size.get() > 0 && dimm.slot < slots && !twice
    });
    let fits = spec.memory_with_dimms() <= room && room.get() < u64::MAX >> 1 && (1..=MAX_SLOTS).contains(&slots);
    if sound && fits { Ok(()) } else { Err(CommandError::Dimms) }
}

/// Whether RAM has a backend of its own.
pub(super) const fn has_backend(platform: &Platform, node: Option<u32>) -> bool {
    platform.hugepages.is_some() || node.is_some()
}

/// RAM and DIMMs.
pub(super) fn add(line: &mut Line, spec: &ResolvedSpec, node: Option<u32>) {
    if has_backend(&spec.platform, node) {
        let ram = backend(RAM.to_owned(), spec.memory.get(), &spec.platform, node);
        // RAM without a backend of its own is called so, on hosts where it is not bound: pages travel under that name.
        let plain = spec.platform.hugepages.is_none();
        line.json("-object", if plain { ram.with("x-use-canonical-path-for-ramblock-id", false) } else { ram });
    }
    let kib = |bytes: godwit_model::Bytes| format!("{}k", bytes.get() >> 10);
    let size = Pairs::new().with("size", kib(spec.memory));
    let Some((slots, room)) = spec.room() else { return line.pairs("-m", size) };
    line.pairs("-m", size.with("slots", slots).with("maxmem", kib(room)));
    for dimm in spec.dimms() {
        line.json("-object", dimm_backend(dimm, &spec.platform, node));
        line.json("-device", dimm_device(dimm));
    }
}

/// A piece of the host's memory: of what all of the VM's is made of, and where all of it is.
fn backend(id: String, size: u64, platform: &Platform, node: Option<u32>) -> Object {
    let kind = if platform.hugepages.is_some() { "memory-backend-memfd" } else { "memory-backend-ram" };
    let backend = Object::new().with("qom-type", kind).with("id", id).with("size", size);
    let backend = match node {
        Some(node) => backend.with("host-nodes", vec![node]).with("policy", "bind"),
        None => backend,
    };
    let Some(pages) = platform.hugepages else {
        return backend.with("merge", false).with("dump", false);
    };
    let backend = backend.with("hugetlb", true).with("hugetlbsize", pages.size().get()).with("prealloc", true);
    backend.with("share", true).with("merge", false).with("dump", false)
}

pub(crate) fn dimm_name(dimm: &Dimm) -> String {
    format!("dimm{}", dimm.slot)
}

pub(crate) fn dimm_backend_name(dimm: &Dimm) -> String {
    format!("dimm{}-memory", dimm.slot)
}

pub(crate) fn dimm_backend(dimm: &Dimm, platform: &Platform, node: Option<u32>) -> Object {
    backend(dimm_backend_name(dimm), dimm.size.get(), platform, node)
}

pub(crate) fn dimm_device(dimm: &Dimm) -> Object {
    let device = Object::device("pc-dimm", &dimm_name(dimm)).with("memdev", dimm_backend_name(dimm));
    device.with("slot", i32::from(dimm.slot)).with("addr", dimm.address.0)
}
