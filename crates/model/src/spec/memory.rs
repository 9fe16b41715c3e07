//! Memory that comes while a VM runs: DIMMs in slots, one behind the other in a region of guest addresses of their own.

use serde::{Deserialize, Serialize};

use super::{HugePages, ResolvedSpec};
use crate::Bytes;

/// Slots for DIMMs of VMs that are started with `memory_max`. QEMU describes each to the guest's firmware, used or not.
pub const DIMM_SLOTS: u8 = 16;
/// Size and alignment of every DIMM: the smallest block of memory that Linux takes on x86.
pub const DIMM_STEP: Bytes = Bytes::mib(128);
/// Largest `memory_max`: RAM, DIMMs, their alignment and PCI's windows end below what 40 address bits reach.
pub(super) const MAX_MEMORY_MAX: Bytes = Bytes(768 << 30);

/// RAM from which on a guest that boots sees 64 GiB of addresses, where Linux takes blocks of up to [`LARGE_STEP`].
const LARGE_GUEST: Bytes = Bytes(62 << 30);
const LARGE_STEP: Bytes = Bytes(2 << 30);
/// RAM below 4 GiB on q35: this much, or [`LOW_RAM_OF_MORE`] where it does not all fit.
const LOW_RAM: u64 = 0xb000_0000;
const LOW_RAM_OF_MORE: u64 = 0x8000_0000;
const FOUR_GIB: u64 = 4 << 30;

/// Where a DIMM begins among the guest's physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DimmAddress(pub u64);

/// How a VM's memory can become larger while it runs, and what has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Growth {
    /// RAM and DIMMs together, at most; where RAM is that large, there are no slots.
    pub max: Bytes,
    /// Slots for DIMMs.
    pub slots: u8,
    /// What has come, in this order.
    #[serde(default)]
    pub dimms: Vec<Dimm>,
}

/// Memory that came while the VM ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dimm {
    /// Its slot.
    pub slot: u8,
    /// Where the guest sees it.
    pub address: DimmAddress,
    /// Its size.
    pub size: Bytes,
}

/// Why a VM's memory does not become what is wanted while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoGrowth {
    /// Guests do not give memory back.
    #[error("memory becomes smaller at the next start only")]
    Smaller,
    /// No slots.
    #[error("the VM was started without room for more memory (`memory_max`)")]
    Fixed,
    /// More than there is room for.
    #[error("the VM was started with room for {0} of memory (`memory_max`)")]
    Room(Bytes),
    /// Less than the guest could take.
    #[error("while the VM runs, its memory grows by multiples of {0}")]
    Step(Bytes),
    /// Every slot has a DIMM.
    #[error("all {0} slots for memory are taken; at the next start all of it becomes one")]
    Slots(u8),
}

impl Growth {
    /// Room for growth to `max`.
    #[must_use]
    pub const fn to(max: Bytes) -> Self {
        Self { max, slots: DIMM_SLOTS, dimms: Vec::new() }
    }
}

impl ResolvedSpec {
    /// All memory that the guest has: RAM and DIMMs.
    #[must_use]
    pub fn memory_with_dimms(&self) -> Bytes {
        let dimms = self.dimms().iter().map(|dimm| dimm.size.get());
        Bytes(dimms.fold(self.memory.get(), u64::saturating_add))
    }

    /// What has come while the VM ran.
    #[must_use]
    pub fn dimms(&self) -> &[Dimm] {
        self.growth.as_ref().map_or(&[], |growth| &growth.dimms)
    }

    /// Room for memory: slots, and the size of RAM and DIMMs together. What RAM has more than it was asked for is on top.
    #[must_use]
    pub fn room(&self) -> Option<(u8, Bytes)> {
        let growth = self.growth.as_ref().filter(|growth| growth.max > self.memory)?;
        let uneven = self.memory.get() % Bytes::MIB.get();
        Some((growth.slots, Bytes(growth.max.get().saturating_add(uneven))))
    }

    /// The DIMM that makes this running VM's memory what it is in `wanted`; none: it is that.
    ///
    /// # Errors
    /// Why there is none.
    pub fn growth_to(&self, wanted: &Self) -> Result<Option<Dimm>, NoGrowth> {
        // Some hosts give RAM a little more, which nobody asked for.
        let asked = |spec: &Self| spec.memory_with_dimms().get() / Bytes::MIB.get() * Bytes::MIB.get();
        let (now, then) = (asked(self), asked(wanted));
        if then == now {
            return Ok(None);
        }
        let more = then.checked_sub(now).ok_or(NoGrowth::Smaller)?;
        let growth = self.growth.as_ref().filter(|growth| growth.max > self.memory).ok_or(NoGrowth::Fixed)?;
        if then > growth.max.get() {
            return Err(NoGrowth::Room(growth.max));
        }
        let step = self.dimm_step();
        if !more.is_multiple_of(step.get()) {
            return Err(NoGrowth::Step(step));
        }
        let free = (0..growth.slots).find(|slot| growth.dimms.iter().all(|dimm| dimm.slot != *slot));
        let slot = free.ok_or(NoGrowth::Slots(growth.slots))?;
        let end = growth.dimms.iter().map(|dimm| dimm.address.0.saturating_add(dimm.size.get())).max();
        let address = DimmAddress(end.unwrap_or_else(|| dimm_region(self.memory)));
        Ok(Some(Dimm { slot, address, size: Bytes(more) }))
    }

    /// What DIMMs of this VM are multiples of, so that its guest and its pages can make them up.
    fn dimm_step(&self) -> Bytes {
        let blocks = if self.memory >= LARGE_GUEST { LARGE_STEP } else { DIMM_STEP };
        blocks.max(self.platform.hugepages.map(HugePages::size).unwrap_or_default())
    }
}

/// Where DIMMs begin: at the first GiB behind RAM, in `pc_get_device_memory_range` of QEMU's `hw/i386/pc.c`.
fn dimm_region(ram: Bytes) -> u64 {
    let high = if ram.get() >= LOW_RAM { ram.get() - LOW_RAM_OF_MORE } else { 0 };
    FOUR_GIB.saturating_add(high).next_multiple_of(Bytes::GIB.get())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::tests::resolved;
    use crate::{HostFacts, LiveChange, live_changes};

    fn running(max: Option<Bytes>) -> ResolvedSpec {
        ResolvedSpec { growth: max.map(Growth::to), ..resolved() }
    }

    fn wanted(memory: Bytes) -> ResolvedSpec {
        ResolvedSpec { memory, ..running(Some(memory)) }
    }

    #[test]
    fn memory_grows_dimm_by_dimm_and_what_was_done_is_not_done_again() {
        let mut vm = running(Some(Bytes::GIB));
        // RAM that is uneven for the host's sake is what was asked for.
        vm.memory = Bytes(vm.memory.get() + HostFacts::UNEVEN.get());
        for (memory, dimm) in [
            (640, Dimm { slot: 0, address: DimmAddress(4 << 30), size: Bytes::mib(128) }),
            (1_024, Dimm { slot: 1, address: DimmAddress((4 << 30) + (128 << 20)), size: Bytes::mib(384) }),
        ] {
            let wanted = wanted(Bytes::mib(memory));
            let changes = live_changes(&vm, &wanted);
            assert_eq!(changes, [LiveChange::Memory { dimm }]);
            let mut next = vm.clone();
            changes[0].apply(&mut next);
            assert_eq!(live_changes(&vm, &next), changes, "an agent finds the same DIMM in the spec that it is sent");
            vm = next;
            assert_eq!((live_changes(&vm, &wanted), vm.growth_to(&wanted)), (vec![], Ok(None)));
        }
        assert_eq!(vm.memory_with_dimms(), Bytes(Bytes::GIB.get() + HostFacts::UNEVEN.get()));
        assert_eq!(vm.room(), Some((DIMM_SLOTS, vm.memory_with_dimms())));
        let stored = serde_json::to_string(&vm).expect("JSON");
        assert_eq!(serde_json::from_str::<ResolvedSpec>(&stored).expect("its own JSON"), vm);
    }

    #[test]
    fn what_cannot_come_while_the_vm_runs_waits_with_a_reason() {
        let mut full = running(Some(Bytes(64 << 30)));
        for memory in 5..=20 {
            let dimm = full.growth_to(&wanted(Bytes::mib(memory * 128))).expect("room").expect("more");
            LiveChange::Memory { dimm }.apply(&mut full);
        }
        let huge = |pages| {
            let mut vm = running(Some(Bytes(4 << 30)));
            (vm.memory, vm.platform.hugepages) = (Bytes::GIB, Some(pages));
            vm
        };
        let mut large = running(Some(Bytes(128 << 30)));
        large.memory = LARGE_GUEST;
        let gib = |count: u64| Bytes(count << 30);
        for (vm, memory, why) in [
            (running(None), Bytes::GIB, NoGrowth::Fixed),
            (running(Some(Bytes::mib(512))), Bytes::GIB, NoGrowth::Fixed),
            (running(Some(Bytes::GIB)), Bytes::mib(256), NoGrowth::Smaller),
            (running(Some(Bytes::GIB)), Bytes::mib(1_152), NoGrowth::Room(Bytes::GIB)),
            (running(Some(Bytes::GIB)), Bytes::mib(600), NoGrowth::Step(DIMM_STEP)),
            (huge(HugePages::Gib1), Bytes::mib(1_536), NoGrowth::Step(Bytes::GIB)),
            (large.clone(), gib(63), NoGrowth::Step(LARGE_STEP)),
            (full.clone(), gib(3), NoGrowth::Slots(DIMM_SLOTS)),
        ] {
            let wanted = wanted(memory);
            assert_eq!((vm.growth_to(&wanted), live_changes(&vm, &wanted)), (Err(why), vec![]), "{memory}");
        }
        assert_eq!(running(Some(Bytes::mib(512))).room(), None, "QEMU takes no slots without room");
        assert!(huge(HugePages::Mib2).growth_to(&wanted(Bytes::mib(1_152))).is_ok_and(|dimm| dimm.is_some()));
        let dimm = large.growth_to(&wanted(gib(64))).expect("room").expect("more");
        assert_eq!((dimm.address, dimm.size), (DimmAddress(64 << 30), LARGE_STEP));
    }

    #[test]
    fn dimms_begin_where_qemu_has_them() {
        for (ram, begins) in [(512, 4_u64), (2_815, 4), (2_816, 5), (3_072, 5), (4_096, 6), (4_097, 7)] {
            assert_eq!(dimm_region(Bytes::mib(ram)), begins << 30, "{ram} MiB");
        }
    }
}
