//! Changes to a VM that runs: each is carried out by QEMU first and journalled then. Said again after a crash in between, it does what is
//! left of it: a medium, a limit, a cable or a size is set anew, an interface that is there or gone already is left alone, as is memory.

use std::os::fd::OwnedFd;
use std::path::Path;

use godwit_model::{
    Bytes, Dimm, ErrorCode, Firmware, Generation, IoLimits, LiveChange, Refusal, ResolvedDisk, ResolvedSpec, Retry, live_changes,
};
use godwit_qemu::change::UnplugError;
use godwit_qemu::command::{DiskFds, FlashFds};
use godwit_qemu::disks::disk_node;
use godwit_qemu::{PassedFds, Start};

use super::actor::{Actor, qemu_failed};
use super::disks::into::open_arriving;
use super::start::fetch_image;
use crate::firmware::{Flash, VARIABLES};
use crate::host::{SharedHost, host_failed};
use crate::journal::IncomingDisk;
use crate::nodes::{self, NODES};

impl Actor {
    /// Makes the running VM what `wanted` says.
    pub(super) async fn change(&mut self, generation: Generation, wanted: ResolvedSpec) -> Result<(), Refusal> {
        self.owned(generation)?;
        self.undisturbed()?;
        self.monitor()?;
        let Some(record) = &self.record else { return Ok(()) };
        let changes = live_changes(&record.spec, &wanted);
        let mut after = record.spec.clone();
        changes.iter().for_each(|change| change.apply(&mut after));
        if after != wanted {
            return Err(Refusal::new(ErrorCode::VmRunning, "not all of the change can be made while the VM runs")
                .hint("stop the VM and start it again: it starts as its spec wants it"));
        }
        for change in changes {
            tracing::info!(change = change.describe(), "changes the running VM");
            self.carry_out(&change).await?;
            if let Some(record) = &mut self.record {
                change.apply(&mut record.spec);
            }
            self.save()?;
        }
        Ok(())
    }

    async fn carry_out(&self, change: &LiveChange) -> Result<(), Refusal> {
        let qmp = self.monitor()?;
        match change {
            LiveChange::Medium { drive, medium } => {
                let file = match medium {
                    Some(image) => Some(fetch_image(&self.host, image).await?.file),
                    None => None,
                };
                qmp.change_medium(*drive, file).await.map_err(qemu_failed)
            }
            LiveChange::Limits { slot, limits } => qmp.set_io_limits(*slot, *limits).await.map_err(qemu_failed),
            LiveChange::Grow { slot, size } => match qmp.disk_size(*slot).await.map_err(qemu_failed)? {
                Some(now) if now >= *size => Ok(()),
                _ => {
                    // What is new of it was not written, and is in no bitmap.
                    qmp.forget_since(&disk_node(*slot), None).await.map_err(qemu_failed)?;
                    qmp.resize_disk(*slot, *size).await.map_err(qemu_failed)
                }
            },
            LiveChange::PlugDisk { disk, slot } => {
                if qmp.has_disk(*slot).await.map_err(qemu_failed)? {
                    return Ok(());
                }
                let (read_only, read_write) = open_disk(&self.host, disk, Start::Fresh).await?;
                let vcpus = self.record.as_ref().map_or(1, |record| record.spec.vcpus);
                qmp.plug_disk(*slot, disk, vcpus, [read_only, read_write]).await.map_err(qemu_failed)?;
                if disk.io_limits == IoLimits::default() {
                    return Ok(());
                }
                qmp.set_io_limits(*slot, disk.io_limits).await.map_err(qemu_failed)
            }
            LiveChange::UnplugDisk { slot } => qmp.unplug_disk(*slot).await.map_err(|error| not_unplugged("disk", *slot, error)),
            LiveChange::Nic { nic, slot } => {
                self.host.network.limit(nic, self.vm, *slot).await.map_err(Refusal::from)?;
                qmp.set_link(*slot, nic.link_up).await.map_err(qemu_failed)
            }
            LiveChange::Plug { nic, slot } => {
                if qmp.has_nic(*slot).await.map_err(qemu_failed)? {
                    return Ok(());
                }
                let tap = self.host.network.create_tap(nic, self.vm, *slot).await;
                let tap = tap.map_err(Refusal::from)?;
                let machine = self.record.as_ref().map(|record| record.spec.machine.clone()).unwrap_or_default();
                qmp.plug_nic(*slot, nic, &machine, tap).await.map_err(qemu_failed)?;
                if nic.link_up { Ok(()) } else { qmp.set_link(*slot, false).await.map_err(qemu_failed) }
            }
            LiveChange::Unplug { slot } => {
                if !qmp.has_nic(*slot).await.map_err(qemu_failed)? {
                    return Ok(());
                }
                qmp.unplug_nic(*slot).await.map_err(|error| not_unplugged("interface", *slot, error))
            }
            LiveChange::Memory { dimm } => self.grow(*dimm).await,
        }
    }

    /// The host's promise first, then the limit of the VM's processes, then the memory: nothing is used that was not promised. If QEMU has not
    /// taken it, limit and promise are what they were.
    async fn grow(&self, dimm: Dimm) -> Result<(), Refusal> {
        let (qmp, Some(record)) = (self.monitor()?, &self.record) else { return Ok(()) };
        let before = record.spec.memory_with_dimms();
        let after = Bytes(before.get().saturating_add(dimm.size.get()));
        self.host.memory.reserve(self.vm, after).map_err(|refusal| {
            refusal.hint(
                "stop or move another VM away from this host, or move this one to a host with more memory free; then set it again",
            )
        })?;
        let grown = async {
            self.host.limit_memory(self.vm, after)?;
            if qmp.has_dimm(&dimm).await.map_err(qemu_failed)? {
                return Ok(());
            }
            if let Some(node) = record.node {
                let nodes = nodes::read(Path::new(NODES));
                self.host.memory.check_node(node, dimm.size, record.spec.platform.hugepages, &nodes)?;
            }
            qmp.plug_dimm(&dimm, &record.spec.platform, record.node).await.map_err(qemu_failed)
        };
        let grown = grown.await;
        // Where it is not known, the guest may have it.
        if grown.is_err() && qmp.has_dimm(&dimm).await.is_ok_and(|there| !there) {
            let back = self.host.memory.reserve(self.vm, before).and_then(|()| self.host.limit_memory(self.vm, before));
            if let Err(refusal) = back {
                tracing::warn!(message = refusal.message, "the VM's limit of memory stays higher than the VM needs");
            }
        }
        grown
    }

    /// What the guest does not see is not in QEMU's arguments: limits and cables. No vCPU has run yet.
    pub(super) async fn set_up(&self, start: Start) -> Result<(), Refusal> {
        let (qmp, Some(record)) = (self.monitor()?, &self.record) else { return Ok(()) };
        for (slot, disk) in record.spec.disk_slots() {
            if disk.io_limits != IoLimits::default() {
                qmp.set_io_limits(slot, disk.io_limits).await.map_err(qemu_failed)?;
            }
            // Its owner wants it larger than it was made. A destination finds it as the source left it.
            if let (Start::Fresh, Some(size)) = (start, disk.create)
                && qmp.disk_size(slot).await.map_err(qemu_failed)?.is_some_and(|now| now < size)
            {
                qmp.resize_disk(slot, size).await.map_err(qemu_failed)?;
            }
        }
        self.plug_out().await
    }

    /// Plugs out the cables that are not to be in.
    pub(super) async fn plug_out(&self) -> Result<(), Refusal> {
        let (qmp, Some(record)) = (self.monitor()?, &self.record) else { return Ok(()) };
        for (slot, nic) in record.spec.nic_slots() {
            if !nic.link_up {
                qmp.set_link(slot, false).await.map_err(qemu_failed)?;
            }
        }
        Ok(())
    }
}

fn not_unplugged(what: &str, slot: usize, error: UnplugError) -> Refusal {
    match error {
        UnplugError::Qmp(error) => qemu_failed(error),
        UnplugError::Kept => Refusal::new(ErrorCode::QemuFailed, format!("the {what} in slot {slot} stays: {error}"))
            .hint("the guest must run and know PCI hot-plug; try again, or stop the VM and start it again")
            .retry(Retry::Safe),
    }
}

/// Checks a disk's volume, makes it where that is wanted, and opens it both ways.
pub(super) async fn open_disk(host: &SharedHost, disk: &ResolvedDisk, start: Start) -> Result<(OwnedFd, OwnedFd), Refusal> {
    let mut checked = host.pools.check(disk).await;
    let missing = checked.as_ref().is_err_and(|refusal| refusal.code == ErrorCode::VolumeMissing);
    if start == Start::Fresh && missing && (disk.create.is_some() || disk.image.is_some()) {
        let image = match &disk.image {
            Some((image, _)) => {
                let path = fetch_image(host, image).await?.path;
                // For when the VM leaves.
                host.images.index_later(image).await;
                Some(path)
            }
            None => None,
        };
        host.pools.prepare(disk, image.as_deref()).await?;
        checked = host.pools.check(disk).await;
    }
    checked?;
    host.pools.open_disk(disk)
}

/// Opens firmware and the volume of its variables, which a VM that starts afresh gets from this host's template.
pub(super) async fn open_flash(
    host: &SharedHost,
    spec: &ResolvedSpec,
    start: Start,
    arriving: &[IncomingDisk],
    fds: &mut PassedFds,
) -> Result<Option<FlashFds>, Refusal> {
    let Firmware::Uefi { variables, secure_boot } = &spec.platform.firmware else { return Ok(None) };
    let flash = Flash::require(*secure_boot)?;
    if start == Start::Fresh {
        host.pools.prepare_copy(variables, &flash.template).await?;
    }
    let (read_only, read_write) = match open_arriving(host, spec, arriving, variables).await? {
        Some(opened) => opened,
        None => host.pools.open_exact(variables, VARIABLES).await?,
    };
    let code = std::fs::File::open(&flash.code).map_err(|error| host_failed("the UEFI firmware cannot be read", &error))?;
    let variables = DiskFds { read_only: fds.pass(read_only), read_write: fds.pass(read_write) };
    Ok(Some(FlashFds { code: fds.pass(code), variables }))
}
