//! A clone: what a VM is made of that begins from another one's snapshot. Pure but for what is drawn.

use std::collections::BTreeMap;

use godwit_model::{Bytes, ErrorCode, Firmware, Name, Refusal, ResolvedDisk, ResolvedSpec, VmId, VmSpec, Vmgenid, VolumeRef};

use crate::clock;
use crate::rows::SnapshotRow;
use crate::specs::{complete_clone, draw_mac};

/// What a new VM is made of that begins from a snapshot, and, if it begins with memory, what QEMU is started with: the machine that the memory knows. Volumes are
/// in the pools of those that they become like, under names of the new VM; addresses are drawn.
///
/// # Errors
/// `unsupported` for memory that the snapshot has not, or that a TPM goes with, and for disks of unknown size; `spec_invalid` for names that become too long.
pub(crate) fn plan_clone(
    snapshot: &SnapshotRow,
    vm: VmId,
    name: &Name,
    memory: bool,
) -> Result<(VmSpec, Option<ResolvedSpec>), Refusal> {
    let (mut spec, mut resolved) = (snapshot.spec.clone(), snapshot.resolved.clone());
    if memory {
        can_have_memory(snapshot)?;
    }
    let new = Volumes::named_after(name, &resolved)?;
    // What was to come at the next start is not in the snapshot.
    spec.disks.retain(|disk| new.of.contains_key(&disk.volume));
    for disk in &mut spec.disks {
        let there = resolved.disk_slots().find(|(_, there)| there.volume == disk.volume);
        let Some((slot, there)) = there else { continue };
        disk.slot = u8::try_from(slot).ok();
        disk.size = Some(size_of(snapshot, there)?).filter(|size| size.get() > 0);
        disk.volume = new.of(&disk.volume);
    }
    for disk in &mut resolved.disks {
        disk.create = Some(size_of(snapshot, disk)?).filter(|size| size.get() > 0);
        disk.volume = new.of(&disk.volume);
    }
    for firmware in [&mut spec.firmware, &mut resolved.platform.firmware] {
        if let Firmware::Uefi { variables, .. } = firmware {
            *variables = new.of(variables);
        }
    }
    for tpm in [&mut spec.tpm, &mut resolved.platform.tpm].into_iter().flatten() {
        tpm.state = new.of(&tpm.state);
    }
    let before: Vec<_> = spec.nics.iter().map(|nic| nic.mac).collect();
    for nic in &mut spec.nics {
        nic.mac = None;
        nic.link_up &= !memory;
    }
    let fresh = Vmgenid::new(clock::fresh());
    // One that never had the device does not get it.
    spec.vmgenid = spec.vmgenid.map(|_| fresh);
    resolved.platform.vmgenid = resolved.platform.vmgenid.map(|_| fresh);
    for seed in [&mut spec.cloud_init, &mut resolved.cloud_init].into_iter().flatten() {
        seed.host_name = None;
    }
    complete_clone(&mut spec)?;
    for nic in &mut resolved.nics {
        let at = before.iter().position(|mac| *mac == Some(nic.mac));
        nic.mac = at.and_then(|at| spec.nics.get(at)?.mac).unwrap_or_else(draw_mac);
        nic.link_up = false;
    }
    (resolved.vm, resolved.name) = (vm, name.clone());
    Ok((spec, memory.then_some(resolved)))
}

fn can_have_memory(snapshot: &SnapshotRow) -> Result<(), Refusal> {
    let name = &snapshot.name;
    if !snapshot.has_memory() {
        return Err(Refusal::new(ErrorCode::Unsupported, format!("snapshot {name} has no memory"))
            .hint("leave out `--memory`: the clone boots from the disks"));
    }
    if snapshot.resolved.platform.tpm.is_some() {
        return Err(Refusal::new(ErrorCode::Unsupported, "the memory knows a TPM, and what is in one is of one VM alone")
            .hint("leave out `--memory`: the clone boots from the disks, with a TPM of its own"));
    }
    Ok(())
}

/// How large a disk of the snapshot was; 0 if it is as large as the image that it is made from.
fn size_of(snapshot: &SnapshotRow, disk: &ResolvedDisk) -> Result<Bytes, Refusal> {
    let measured = snapshot.figures.iter().flat_map(|figures| &figures.sizes).find(|size| size.volume == disk.volume);
    match measured.map(|measured| measured.size).or(disk.create) {
        Some(size) => Ok(size),
        None if disk.image.is_some() => Ok(Bytes(0)),
        None => {
            let message = format!("snapshot {} does not say how large disk {} was", snapshot.name, disk.volume);
            Err(Refusal::new(ErrorCode::Unsupported, message).hint("take another one, and clone that"))
        }
    }
}

/// The volumes of a VM by those that they become like.
struct Volumes {
    of: BTreeMap<VolumeRef, VolumeRef>,
}

impl Volumes {
    fn named_after(name: &Name, resolved: &ResolvedSpec) -> Result<Self, Refusal> {
        let disks = resolved.disk_slots().map(|(slot, disk)| (&disk.volume, format!("{name}-disk{slot}")));
        let variables = match &resolved.platform.firmware {
            Firmware::Uefi { variables, .. } => Some((variables, format!("{name}-vars"))),
            Firmware::Bios => None,
        };
        let state = resolved.platform.tpm.as_ref().map(|tpm| (&tpm.state, format!("{name}-tpm")));
        let named = disks.chain(variables).chain(state).map(|(old, text)| {
            let volume = Name::new(text).map_err(|error| {
                Refusal::new(ErrorCode::SpecInvalid, format!("a volume cannot be named after VM {name}: {error}"))
                    .hint("give the clone a shorter name")
            })?;
            Ok((old.clone(), VolumeRef { pool: old.pool.clone(), volume }))
        });
        Ok(Self { of: named.collect::<Result<_, Refusal>>()? })
    }

    fn of(&self, old: &VolumeRef) -> VolumeRef {
        self.of.get(old).unwrap_or(old).clone()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use godwit_api::v1::SnapshotState;
    use godwit_model::{DiskFormat, DiskSpec, NicSpec, SnapshotFigures, SnapshotId, SnapshotRequest, SnapshotSize, UnixMillis};

    use super::*;
    use crate::checks::Candidate;
    use crate::checks::tests::{facts, load};
    use crate::resolve::decide_start;
    use crate::specs::{claims, complete_new};
    use crate::tests::support::{name, vm_row};

    fn volume(text: &str) -> VolumeRef {
        text.parse().expect("volume")
    }

    pub(crate) fn snapshot() -> SnapshotRow {
        let vm = vm_row();
        let mut spec = VmSpec::new(1, Bytes::mib(64), godwit_model::Boot::Disk);
        spec.disks = vec![
            DiskSpec { size: Some(Bytes::mib(8)), ..DiskSpec::new(volume("shared/root"), DiskFormat::Raw) },
            DiskSpec::new(volume("shared/data"), DiskFormat::Qcow2),
        ];
        spec.nics = vec![NicSpec::new(name("default"))];
        complete_new(&mut spec).expect("complete");
        let (facts, load, host) = (facts(), load(Bytes::GIB), name("h1"));
        let candidate = Candidate { name: &host, facts: &facts, load: &load, skew: None };
        let mut bare = spec.clone();
        bare.nics.clear();
        let (_, mut resolved) = decide_start((vm.id, &vm.name, &bare), None, None, &[candidate], &|_| None, &[]).expect("a host");
        let mac = spec.nics[0].mac.expect("drawn");
        resolved.nics = vec![godwit_model::ResolvedNic::new(name("default"), mac)];
        // One that comes at the next start.
        spec.disks.push(DiskSpec::new(volume("shared/later"), DiskFormat::Raw));
        SnapshotRow {
            id: SnapshotId::new(uuid::Uuid::nil()),
            name: name("one"),
            team: vm.team.clone(),
            vm: vm.id,
            vm_name: vm.name,
            created: UnixMillis(0),
            pool: name("shared"),
            identity: "one".into(),
            host: name("h1"),
            generation: godwit_model::Generation(1),
            state: SnapshotState::Ready,
            salt: String::new(),
            request: SnapshotRequest { memory: true, quiesce: None },
            spec,
            resolved,
            waiting: vec![],
            figures: Some(SnapshotFigures {
                memory: true,
                sizes: vec![SnapshotSize { volume: volume("shared/data"), size: Bytes::mib(32) }],
                ..SnapshotFigures::default()
            }),
            golden: false,
            principal: String::new(),
            reason: None,
            schedule: None,
        }
    }

    #[test]
    fn a_clone_has_volumes_and_addresses_of_its_own_and_nothing_of_the_other() {
        let (row, id) = (snapshot(), VmId::new(uuid::Uuid::from_u128(7)));
        for memory in [false, true] {
            let (spec, resolved) = plan_clone(&row, id, &name("web2"), memory).expect("planned");
            let made: Vec<_> = spec.disks.iter().map(|disk| (disk.volume.to_string(), disk.size, disk.slot)).collect();
            let wanted = [("shared/web2-disk0", 8, 0), ("shared/web2-disk1", 32, 1)];
            assert_eq!(made, wanted.map(|(volume, mib, slot)| (volume.into(), Some(Bytes::mib(mib)), Some(slot))));
            assert!(claims(&spec).is_disjoint(&claims(&row.spec)), "{spec:?}");
            assert!(spec.vmgenid.is_some() && spec.vmgenid != row.spec.vmgenid);
            assert_eq!(spec.nics[0].link_up, !memory);
            assert_eq!(resolved.is_some(), memory);
            let Some(resolved) = resolved else { continue };
            assert_eq!((resolved.vm, &resolved.name), (id, &name("web2")));
            assert!(resolved.volumes().eq(spec.volumes()), "{resolved:?}");
            assert_eq!(resolved.disks[1].create, Some(Bytes::mib(32)));
            assert_eq!((Some(resolved.nics[0].mac), resolved.nics[0].link_up), (spec.nics[0].mac, false));
            assert_eq!((&resolved.machine, &resolved.cpu), (&row.resolved.machine, &row.resolved.cpu));
        }
    }

    #[test]
    fn what_cannot_be_cloned_is_refused() {
        let code = |vm: &str, memory, change: fn(&mut SnapshotRow)| {
            let mut row = snapshot();
            change(&mut row);
            plan_clone(&row, VmId::new(uuid::Uuid::nil()), &name(vm), memory).expect_err("refused").code
        };
        assert_eq!(
            code("web2", true, |row| row.figures.iter_mut().for_each(|figures| figures.memory = false)),
            ErrorCode::Unsupported
        );
        assert_eq!(code("web2", false, |row| row.figures = None), ErrorCode::Unsupported);
        assert_eq!(code(&"x".repeat(60), false, |_| {}), ErrorCode::SpecInvalid);
    }
}
