//! What can change while a VM runs, and what waits for its next start.
//!
//! A running VM is its [`ResolvedSpec`]. Each [`LiveChange`] makes another one of it; whoever carried one out writes the new spec down, so
//! that the destination of a later migration starts as the same machine.

use crate::{Bytes, Dimm, DiskBus, FIXED_SLOTS, ImageRef, IoLimits, ResolvedDisk, ResolvedNic, ResolvedSpec};

/// One change to a running VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LiveChange {
    /// What is in a CD-ROM drive.
    Medium {
        /// The drive.
        drive: usize,
        /// What is in it afterwards.
        medium: Option<ImageRef>,
    },
    /// What a disk may do in a second.
    Limits {
        /// The disk's place.
        slot: usize,
        /// Afterwards.
        limits: IoLimits,
    },
    /// A disk becomes larger.
    Grow {
        /// The disk's place.
        slot: usize,
        /// Afterwards.
        size: Bytes,
    },
    /// A disk is taken out of its root port; its volume stays.
    UnplugDisk {
        /// Its place.
        slot: usize,
    },
    /// A disk is put into a root port.
    PlugDisk {
        /// The disk.
        disk: Box<ResolvedDisk>,
        /// Its place.
        slot: usize,
    },
    /// An interface's cable, and the addresses that the guest may use on it.
    Nic {
        /// The interface afterwards.
        nic: ResolvedNic,
        /// Its place.
        slot: usize,
    },
    /// An interface is taken out of its root port.
    Unplug {
        /// Its place.
        slot: usize,
    },
    /// An interface is put into a root port.
    Plug {
        /// The interface.
        nic: ResolvedNic,
        /// Its place.
        slot: usize,
    },
    /// Memory becomes larger.
    Memory {
        /// What comes.
        dimm: Dimm,
    },
}

impl LiveChange {
    /// What the VM is afterwards.
    pub fn apply(&self, spec: &mut ResolvedSpec) {
        let disk_index = |spec: &ResolvedSpec, wanted: usize| spec.disk_slots().position(|(slot, _)| slot == wanted);
        let disk = |spec: &mut ResolvedSpec, wanted: usize, change: &dyn Fn(&mut ResolvedDisk)| {
            let index = disk_index(spec, wanted);
            if let Some(disk) = index.and_then(|index| spec.disks.get_mut(index)) {
                change(disk);
            }
        };
        let nic_index = |spec: &ResolvedSpec, wanted: usize| spec.nic_slots().position(|(slot, _)| slot == wanted);
        match self {
            Self::Medium { drive, medium } => {
                if let Some(cdrom) = spec.cdroms.get_mut(*drive) {
                    cdrom.medium.clone_from(medium);
                }
            }
            Self::Limits { slot, limits } => disk(spec, *slot, &|disk| disk.io_limits = *limits),
            Self::Grow { slot, size } => disk(spec, *slot, &|disk| disk.create = Some(*size)),
            Self::UnplugDisk { slot } => {
                if let Some(index) = disk_index(spec, *slot) {
                    settle(spec.disks.iter_mut().map(|disk| &mut disk.slot));
                    spec.disks.remove(index);
                }
            }
            Self::PlugDisk { disk, .. } => {
                settle(spec.disks.iter_mut().map(|disk| &mut disk.slot));
                spec.disks.push((**disk).clone());
            }
            Self::Nic { nic, slot } => {
                if let Some(place) = nic_index(spec, *slot).and_then(|index| spec.nics.get_mut(index)) {
                    place.clone_from(nic);
                }
            }
            Self::Unplug { slot } => {
                if let Some(index) = nic_index(spec, *slot) {
                    // Those behind it keep their places, also where these were their positions.
                    settle(spec.nics.iter_mut().map(|nic| &mut nic.slot));
                    spec.nics.remove(index);
                }
            }
            Self::Plug { nic, .. } => {
                settle(spec.nics.iter_mut().map(|nic| &mut nic.slot));
                spec.nics.push(nic.clone());
            }
            Self::Memory { dimm } => {
                if let Some(growth) = &mut spec.growth {
                    growth.dimms.push(*dimm);
                }
            }
        }
    }

    /// For people.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Medium { drive, medium: Some(_) } => format!("changes the medium of CD-ROM drive {drive}"),
            Self::Medium { drive, medium: None } => format!("empties CD-ROM drive {drive}"),
            Self::Limits { slot, .. } => format!("sets the I/O limits of the disk in slot {slot}"),
            Self::Grow { slot, size } => format!("makes the disk in slot {slot} {size} large"),
            Self::UnplugDisk { slot } => format!("takes the disk out of slot {slot}"),
            Self::PlugDisk { slot, .. } => format!("puts a disk into slot {slot}"),
            Self::Nic { slot, .. } => format!("changes the interface in slot {slot}"),
            Self::Unplug { slot } => format!("takes the interface out of slot {slot}"),
            Self::Plug { slot, .. } => format!("puts an interface into slot {slot}"),
            Self::Memory { dimm } => format!("puts {} of memory into slot {}", dimm.size, dimm.slot),
        }
    }
}

/// Positions of before become places.
fn settle<'a>(slots: impl Iterator<Item = &'a mut Option<u8>>) {
    for (index, slot) in slots.enumerate() {
        *slot = slot.or(u8::try_from(index).ok());
    }
}

/// The changes that bring a running VM nearest to `wanted`. What they do not change waits for the next start.
#[must_use]
pub fn live_changes(running: &ResolvedSpec, wanted: &ResolvedSpec) -> Vec<LiveChange> {
    let mut changes = Vec::new();
    if running.cdroms.len() == wanted.cdroms.len() {
        for (drive, (now, then)) in running.cdroms.iter().zip(&wanted.cdroms).enumerate() {
            if now.medium != then.medium {
                changes.push(LiveChange::Medium { drive, medium: then.medium.clone() });
            }
        }
    }
    let in_port =
        |slot: usize| slot >= usize::from(FIXED_SLOTS) && slot < usize::from(FIXED_SLOTS + running.platform.hotplug_ports);
    let disk_in_port = |slot: usize, disk: &ResolvedDisk| in_port(slot) && disk.bus == DiskBus::Virtio;
    for (slot, now) in running.disk_slots() {
        let Some((_, then)) = wanted.disk_slots().find(|(other, disk)| *other == slot && disk.volume == now.volume) else {
            if disk_in_port(slot, now) {
                changes.push(LiveChange::UnplugDisk { slot });
            }
            continue;
        };
        if now.io_limits != then.io_limits {
            changes.push(LiveChange::Limits { slot, limits: then.io_limits });
        }
        match (now.create, then.create) {
            (Some(before), Some(size)) if size > before => changes.push(LiveChange::Grow { slot, size }),
            _ => {}
        }
    }
    // Out before in: a place may pass from one to the other.
    for (slot, now) in running.nic_slots() {
        // One of another kind or network is another one.
        let same = |nic: &ResolvedNic| nic.mac == now.mac && nic.model == now.model && nic.network == now.network;
        if let Some((_, then)) = wanted.nic_slots().find(|(other, nic)| *other == slot && same(nic)) {
            if (then.link_up, &then.addresses) != (now.link_up, &now.addresses) {
                let nic = ResolvedNic { slot: now.slot, ..then.clone() };
                changes.push(LiveChange::Nic { nic, slot });
            }
        } else if in_port(slot) {
            changes.push(LiveChange::Unplug { slot });
        }
    }
    for (slot, then) in wanted.nic_slots().filter(|(slot, _)| in_port(*slot)) {
        let now = running.nic_slots().find(|(other, _)| *other == slot);
        let stays = now.is_some_and(|(_, now)| (now.mac, now.model, &now.network) == (then.mac, then.model, &then.network));
        let of_disk = wanted.disk_slots().any(|(other, _)| other == slot);
        if !stays && !of_disk {
            changes.push(LiveChange::Plug { nic: then.clone(), slot });
        }
    }
    for (slot, then) in wanted.disk_slots().filter(|(slot, disk)| disk_in_port(*slot, disk)) {
        let stays = running.disk_slots().any(|(other, now)| other == slot && now.volume == then.volume);
        let of_nic = wanted.nic_slots().any(|(other, _)| other == slot);
        if !stays && !of_nic {
            changes.push(LiveChange::PlugDisk { disk: Box::new(then.clone()), slot });
        }
    }
    if let Ok(Some(dimm)) = running.growth_to(wanted) {
        changes.push(LiveChange::Memory { dimm });
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::tests::resolved;
    use crate::{BytesPerSec, ImageId, Name, ResolvedCdrom, ResolvedDisk};

    fn nic(slot: u8) -> ResolvedNic {
        let mac = format!("52:54:00:00:00:{slot:02x}").parse().expect("mac");
        ResolvedNic { slot: Some(slot), ..ResolvedNic::new(Name::new("default").expect("name"), mac) }
    }

    fn running() -> ResolvedSpec {
        let mut spec = resolved();
        let disk = ResolvedDisk::new("a/b".parse().expect("volume"), crate::DiskFormat::Raw);
        spec.disks = vec![ResolvedDisk { create: Some(Bytes::GIB), ..disk }];
        spec.nics = vec![nic(0), nic(9)];
        spec.cdroms = vec![ResolvedCdrom::default()];
        spec.platform.hotplug_ports = 4;
        spec
    }

    #[test]
    fn what_can_change_does_and_the_rest_waits() {
        let mut wanted = running();
        wanted.memory = Bytes::GIB;
        wanted.platform.tablet = true;
        wanted.disks[0].create = Some(Bytes(2 << 30));
        wanted.disks[0].io_limits.rate = Some(BytesPerSec(1 << 20));
        wanted.nics[0].link_up = false;
        wanted.nics[1] = nic(8);
        let medium = ImageRef { id: ImageId::new(uuid::Uuid::nil()), digest: "aa".into(), size: Bytes::MIB };
        wanted.cdroms[0].medium = Some(medium);
        let changes = live_changes(&running(), &wanted);
        assert_eq!(changes.len(), 6, "{changes:?}");
        let mut after = running();
        changes.iter().for_each(|change| change.apply(&mut after));
        assert!(live_changes(&after, &wanted).is_empty(), "nothing is done twice");
        assert_eq!((after.memory, after.platform.tablet), (running().memory, false));
        assert_eq!((&after.disks, &after.nics, &after.cdroms), (&wanted.disks, &wanted.nics, &wanted.cdroms));
    }

    #[test]
    fn what_is_on_the_root_bus_and_what_would_lose_data_stays() {
        for change in [
            (|s: &mut ResolvedSpec| {
                s.nics.remove(0);
            }) as fn(&mut ResolvedSpec),
            |s| s.nics.push(nic(1)),
            |s| s.nics.push(nic(12)),
            |s| s.nics[0].model = crate::NicModel::E1000e,
            |s| s.disks[0].create = Some(Bytes::MIB),
            |s| s.disks.clear(),
            |s| s.disks.push(s.disks[0].clone()),
            |s| s.cdroms.clear(),
        ] {
            let mut wanted = running();
            change(&mut wanted);
            assert_eq!(live_changes(&running(), &wanted), []);
        }
    }

    #[test]
    fn disks_come_and_go_in_root_ports_and_take_over_places() {
        let disk = |volume: &str, slot| {
            let disk = ResolvedDisk::new(format!("a/{volume}").parse().expect("volume"), crate::DiskFormat::Raw);
            ResolvedDisk { slot: Some(slot), ..disk }
        };
        let mut with_two = running();
        with_two.disks.extend([disk("c", 8), disk("d", 10)]);
        let mut wanted = running();
        // One stays, one goes, its place goes to an interface, and the interface's to a disk.
        wanted.disks.extend([disk("d", 10), disk("e", 9)]);
        wanted.nics[1] = nic(8);
        let changes = live_changes(&with_two, &wanted);
        assert!(
            matches!(
                &changes[..],
                [
                    LiveChange::UnplugDisk { slot: 8 },
                    LiveChange::Unplug { slot: 9 },
                    LiveChange::Plug { slot: 8, .. },
                    LiveChange::PlugDisk { slot: 9, .. },
                ]
            ),
            "{changes:?}"
        );
        let mut after = with_two;
        changes.iter().for_each(|change| change.apply(&mut after));
        assert!(live_changes(&after, &wanted).is_empty(), "nothing is done twice");
        assert_eq!(after.disks[0].slot, Some(0), "what had a position has a place");
        assert_eq!((&after.disks[1..], &after.nics[1]), (&wanted.disks[1..], &wanted.nics[1]));
    }

    #[test]
    fn an_interface_of_another_network_takes_the_place_of_the_old_one() {
        let mut wanted = running();
        wanted.nics[1].network = Name::new("dmz").expect("name");
        let changes = live_changes(&running(), &wanted);
        assert!(matches!(&changes[..], [LiveChange::Unplug { slot: 9 }, LiveChange::Plug { slot: 9, .. }]), "{changes:?}");
        let mut after = running();
        changes.iter().for_each(|change| change.apply(&mut after));
        assert_eq!(after.nics, wanted.nics);
    }
}
