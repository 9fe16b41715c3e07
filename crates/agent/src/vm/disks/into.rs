//! Disks that come with their VM.

use std::net::TcpListener;
use std::os::fd::OwnedFd;

use godwit_model::spec::ResolvedDisk;
use godwit_model::{Bytes, CacheMode, DiskFormat, ErrorCode, Generation, Grant, Millis, Name, Refusal, ResolvedSpec, Retry};
use godwit_model::{TravellingDisk, VolumeRef};
use godwit_qemu::PassedFds;
use godwit_qemu::process::ProcessIdentity;
use godwit_qemu::qmp::Qmp;

use super::super::actor::{Actor, qemu_failed};
use super::super::start_carry::LaneStart;
use super::{Lane, bitmap_of, lane_of, node_of};
use crate::carry::{CarryClient, Role};
use crate::firmware::VARIABLES;
use crate::host::{SharedHost, host_failed};
use crate::journal::{Holding, IncomingDisk};
use crate::storage::{Arrived, Begun};

/// A disk of the spec; variables of firmware are one, too.
pub(super) fn disk_of(spec: &ResolvedSpec, volume: &VolumeRef) -> ResolvedDisk {
    let disk = spec.disks.iter().find(|disk| disk.volume == *volume).cloned();
    disk.unwrap_or_else(|| ResolvedDisk {
        cache: CacheMode::Direct,
        create: Some(VARIABLES),
        ..ResolvedDisk::new(volume.clone(), DiskFormat::Raw)
    })
}

/// Opens a volume that comes with the VM, if it is one.
pub(in crate::vm) async fn open_arriving(
    host: &SharedHost,
    spec: &ResolvedSpec,
    arriving: &[IncomingDisk],
    volume: &VolumeRef,
) -> Result<Option<(OwnedFd, OwnedFd)>, Refusal> {
    if !arriving.iter().any(|disk| disk.volume == *volume) {
        return Ok(None);
    }
    host.pools.open_arriving(&disk_of(spec, volume)).await.map(Some)
}

impl Actor {
    /// Makes room for the disks that come. If one cannot, nothing is left.
    pub(in crate::vm) async fn arrive_disks(
        &self,
        spec: &ResolvedSpec,
        disks: &[TravellingDisk],
    ) -> Result<Vec<IncomingDisk>, Refusal> {
        let mut arriving: Vec<IncomingDisk> = Vec::new();
        for disk in disks.iter().filter(|disk| node_of(spec, &disk.volume).is_some()) {
            let wanted = disk_of(spec, &disk.volume);
            match self.host.pools.arrive(&wanted, disk.size, disk.allocated, self.vm).await {
                Ok(Arrived { begun, mark }) => arriving.push(IncomingDisk {
                    volume: disk.volume.clone(),
                    size: disk.size,
                    mark,
                    base: match begun {
                        Begun::Empty => None,
                        Begun::Spare(generation) => Some(generation.unwrap_or_default()),
                    },
                    port: 0,
                    carry: None,
                }),
                Err(refusal) => {
                    self.set_aside(spec, &arriving).await;
                    return Err(refusal);
                }
            }
        }
        Ok(arriving)
    }

    /// Lets the disks of a QEMU that waits be written, each by a carry of its own.
    pub(in crate::vm) async fn begin_arriving_disks(
        &mut self,
        qmp: &Qmp,
        grant: &Grant,
        source: &Name,
        stall: Millis,
    ) -> Result<Vec<Lane>, Refusal> {
        let (spec, disks) = match self.record.as_ref().map(|record| (&record.spec, &record.holding)) {
            Some((spec, Holding::Destination(incoming))) if !incoming.disks.is_empty() => (spec.clone(), incoming.disks.clone()),
            _ => return Ok(vec![]),
        };
        self.serve_disks(qmp).await?;
        let mut lanes = Vec::new();
        for (place, disk) in disks.into_iter().enumerate() {
            let Some(node) = node_of(&spec, &disk.volume) else { continue };
            match self.begin_arriving_disk(qmp, grant, LaneStart { lane: lane_of(place), peer: source, stall }, &disk, &node).await
            {
                Ok(carry) => lanes.push(Lane::new(&disk.volume, node, disk.size, carry)),
                Err(refusal) => {
                    end(lanes).await;
                    return Err(refusal);
                }
            }
        }
        Ok(lanes)
    }

    async fn begin_arriving_disk(
        &mut self,
        qmp: &Qmp,
        grant: &Grant,
        start: LaneStart<'_>,
        disk: &IncomingDisk,
        node: &str,
    ) -> Result<CarryClient, Refusal> {
        let failed = |error| host_failed("cannot listen for the source", &error);
        let listener = TcpListener::bind((self.host.migration_address(), 0)).map_err(failed)?;
        let port = listener.local_addr().map_err(failed)?.port();
        qmp.export_disk(node, true, None).await.map_err(qemu_failed)?;
        let mut fds = PassedFds::new();
        let listen_fd = fds.pass(listener);
        let images = self.lend_images(&mut fds).await;
        let base = disk.base.map(|Generation(generation)| generation);
        let role = Role::DiskDestination { listen_fd, export: node.to_owned(), size: disk.size.get(), base, images };
        let qemu = self.connect_to_disks()?;
        let carry = self.start_carry(role, grant, start, qemu.into(), fds).await?;
        if let Some(Holding::Destination(incoming)) = self.record.as_mut().map(|record| &mut record.holding)
            && let Some(kept) = incoming.disks.iter_mut().find(|kept| kept.volume == disk.volume)
        {
            (kept.carry, kept.port) = (Some(carry.identity().clone()), port);
        }
        Ok(carry)
    }

    /// The VM is about to run on its disks here: nobody else writes to them any more, what it writes from here on is remembered, and they are volumes. Again:
    /// what is left of that is done.
    pub(in crate::vm) async fn take_disks_over(&self) -> Result<(), Refusal> {
        let (qmp, Some(record)) = (self.monitor()?, &self.record) else { return Ok(()) };
        let Holding::Destination(incoming) = &record.holding else { return Ok(()) };
        if incoming.disks.is_empty() {
            return Ok(());
        }
        let mine = |refusal: Refusal| refusal.retry(Retry::Safe);
        qmp.stop_serving_disks().await.map_err(|error| mine(qemu_failed(error)))?;
        for IncomingDisk { volume, .. } in &incoming.disks {
            if let Some(node) = node_of(&record.spec, volume)
                && let Err(error) = qmp.begin_bitmap(&node, &bitmap_of(incoming.grant.generation)).await
            {
                tracing::info!(%volume, %error, "what is written to the disk is not remembered");
            }
        }
        self.name_disks().await.map_err(mine)
    }

    /// What has arrived of the disks are volumes: they are the VM's, whether it runs or not. Again: nothing happens.
    pub(in crate::vm) async fn name_disks(&self) -> Result<(), Refusal> {
        let Some(record) = &self.record else { return Ok(()) };
        let Holding::Destination(incoming) = &record.holding else { return Ok(()) };
        for IncomingDisk { volume, mark, .. } in &incoming.disks {
            self.host.pools.take_over(&disk_of(&record.spec, volume), *mark).await?;
        }
        Ok(())
    }

    /// The disks do not come: what has arrived is no volume any more. Whether that is so. Only behind a durable word that the VM never runs here.
    pub(in crate::vm) async fn decline_disks(&self) -> bool {
        let Some(record) = &self.record else { return true };
        let Holding::Destination(incoming) = &record.holding else { return true };
        self.set_aside(&record.spec, &incoming.disks).await
    }

    /// Whether none of these is a volume any more.
    pub(in crate::vm) async fn set_aside(&self, spec: &ResolvedSpec, disks: &[IncomingDisk]) -> bool {
        let mut all = true;
        for IncomingDisk { volume, mark, .. } in disks {
            if let Err(refusal) = self.host.pools.set_aside(&disk_of(spec, volume), self.vm, *mark).await {
                tracing::warn!(%volume, message = refusal.message, "what has arrived of the volume is still there");
                all = false;
            }
        }
        all
    }
}

/// Why a disk cannot arrive any more, if that is so.
pub(in crate::vm) fn broken(lanes: &[Lane]) -> Option<Refusal> {
    lanes.iter().find_map(|lane| {
        let status = lane.carry.status();
        let broken = status.broken.filter(|_| !status.disk.whole)?;
        let no_room = broken.contains("No space left");
        let (code, hint) = if no_room {
            (ErrorCode::NotEnoughSpace, "free space in the pool on the destination, or choose another host")
        } else {
            (
                ErrorCode::MigrationFailed,
                "look at the destination's log; what has arrived of the disk is kept there for the next try",
            )
        };
        Some(Refusal::new(code, format!("disk {} cannot arrive: {broken}", lane.volume)).hint(hint).retry(Retry::Safe))
    })
}

/// Finds their carries again after a restart of the agent. One that is gone is missed by the source, unless its disk is whole.
pub(in crate::vm) fn adopt(
    spec: &ResolvedSpec,
    disks: &[IncomingDisk],
    adopt: impl Fn(&ProcessIdentity, u16) -> Option<CarryClient>,
) -> Vec<Lane> {
    let found = disks.iter().enumerate().filter_map(|(place, disk)| {
        let (node, carry) = (node_of(spec, &disk.volume)?, adopt(disk.carry.as_ref()?, lane_of(place))?);
        Some(Lane::new(&disk.volume, node, disk.size, carry))
    });
    found.collect()
}

/// Ends their carries.
pub(in crate::vm) async fn end(lanes: Vec<Lane>) {
    for lane in lanes {
        lane.carry.end().await;
    }
}

/// What the controller is told: where each disk is to be sent.
pub(in crate::vm) fn told(disks: &[IncomingDisk]) -> Vec<TravellingDisk> {
    let told =
        |disk: &IncomingDisk| TravellingDisk { volume: disk.volume.clone(), size: disk.size, allocated: Bytes(0), port: disk.port };
    disks.iter().map(told).collect()
}
