//! Disks that leave with their VM.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use godwit_migration::DisksView;
use godwit_model::{
    Bytes, BytesPerSec, ErrorCode, Generation, Grant, MigrationPolicy, Millis, Refusal, ResolvedSpec, Retry, TravellingDisk,
    VolumeRef,
};
use godwit_qemu::PassedFds;
use godwit_qemu::disks::Mirror;
use godwit_qemu::qmp::{Qmp, QmpError};
use tokio::sync::mpsc;

use super::super::actor::{Actor, qemu_failed};
use super::super::start_carry::LaneStart;
use super::into::disk_of;
use super::{Lane, generation_of, lane_of, node_of};
use crate::carry::{CarryClient, CarryNotice, OwnDiskFacts, Role};
use crate::host::{SharedHost, host_failed};
use crate::journal::{Holding, OutgoingDisk};

/// How long until a mirror that was told to end is looked at again.
pub(in crate::vm) const ENDING: Duration = Duration::from_millis(5);

/// What the end of a mirror takes when nothing waits for it, in milliseconds.
const ENDS: u64 = 10;

/// Disks on their way, as the source holds them.
#[derive(Default)]
pub(in crate::vm) struct DisksOut {
    pub(in crate::vm) lanes: Vec<Lane>,
    /// QEMU has stopped serving them: all that was on them was read.
    unserved: bool,
    /// One of them is gone.
    failed: Option<Refusal>,
}

impl DisksOut {
    pub(in crate::vm) fn new(lanes: Vec<Lane>) -> Self {
        Self { lanes, ..Self::default() }
    }

    /// Finds them again after a restart of the agent.
    pub(in crate::vm) fn adopt(
        host: &SharedHost,
        spec: &ResolvedSpec,
        disks: &[OutgoingDisk],
        notices: &mpsc::Sender<CarryNotice>,
    ) -> Self {
        let mut found = Self::default();
        let with_nodes = disks.iter().filter_map(|disk| Some((disk, node_of(spec, &disk.volume)?)));
        for (place, (OutgoingDisk { volume, size, carry }, node)) in with_nodes.enumerate() {
            let socket = host.carry_socket(spec.vm, lane_of(place));
            match carry.as_ref().and_then(|carry| CarryClient::adopt(carry, &socket, notices.clone()).ok()) {
                Some(carry) => {
                    // The one before may not have come to it.
                    carry.begin();
                    found.lanes.push(Lane::new(volume, node, *size, carry));
                }
                None => found.failed = Some(failed(volume, "the carry process ended")),
            }
        }
        found
    }

    /// Whether all that was on them was sent.
    pub(in crate::vm) fn are_copied(&self) -> bool {
        self.lanes.iter().all(|lane| lane.carry.status().disk.copied)
    }

    /// Bytes on the wire of all of them.
    pub(in crate::vm) fn wire_bytes(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.carry.status().wire_bytes).sum()
    }

    /// What there was at the beginning, and what of it was looked at.
    pub(in crate::vm) fn copied(&self) -> (u64, u64) {
        let disks = self.lanes.iter().map(|lane| (lane.size.get(), lane.carry.status().disk.looked_at));
        disks.fold((0, 0), |(size, looked_at), disk| (size + disk.0, looked_at + disk.1))
    }

    pub(in crate::vm) fn hurry(&self) {
        self.lanes.iter().for_each(|lane| lane.carry.hurry());
    }

    /// How they are. QEMU is asked for its mirrors if it is to be asked; `runs` is whether the VM does.
    pub(in crate::vm) async fn look(&self, qmp: Option<&Qmp>, runs: bool) -> Result<DisksView, QmpError> {
        if let Some(failed) = &self.failed {
            return Ok(DisksView { failed: Some(failed.clone()), copied: false, whole: false, ..DisksView::NONE });
        }
        let mut view = DisksView::NONE;
        for lane in &self.lanes {
            let status = lane.carry.status();
            view.whole &= status.disk.whole;
            if status.disk.whole {
                continue;
            }
            let mirror = match qmp {
                Some(qmp) => qmp.mirror(&lane.node).await?,
                None => None,
            };
            view.copied &= status.disk.copied && (qmp.is_none() || mirror.is_some());
            view.stalled = view.stalled.max(Millis(status.stalled_ms));
            let waiting = mirror.as_ref().map_or(0, |mirror| mirror.remaining.get()).saturating_add(status.in_flight);
            let queued = waiting.saturating_mul(1_000).checked_div(status.link_rate).unwrap_or(0);
            // The link is one for all, and each disk is written for itself.
            let queued = queued.saturating_add(view.queued.get()).max(status.disk.waiting_ms).saturating_add(ENDS);
            view.queued = Millis(queued);
            let broken = status.broken.clone().or_else(|| (!lane.carry.is_alive()).then(|| "the carry process ended".into()));
            let broken = broken.or_else(|| match mirror {
                Some(Mirror { ended: Some(Some(error)), .. }) => Some(format!("QEMU's mirror failed: {error}")),
                Some(Mirror { ended: Some(None), .. }) if runs => Some("QEMU's mirror has ended".into()),
                _ => None,
            });
            view.failed = view.failed.or_else(|| broken.map(|broken| failed(&lane.volume, &broken)));
        }
        Ok(view)
    }

    /// All that was on the disks was read: QEMU gives them up again.
    pub(in crate::vm) async fn unserve(&mut self, qmp: &Qmp) {
        if self.lanes.is_empty() || self.unserved {
            return;
        }
        match qmp.stop_serving_disks().await {
            Ok(()) => self.unserved = true,
            Err(error) => tracing::warn!(%error, "QEMU still serves the disks"),
        }
    }

    /// One step towards the end of all mirrors.
    pub(in crate::vm) async fn finish(&self, qmp: &Qmp) -> Result<(), QmpError> {
        for lane in &self.lanes {
            match qmp.mirror(&lane.node).await? {
                Some(Mirror { ended: Some(None), .. }) => qmp.drop_mirror(&lane.node).await?,
                Some(Mirror { ended: None, .. }) => qmp.finish_mirror(&lane.node).await?,
                _ => {}
            }
        }
        Ok(())
    }

    pub(in crate::vm) async fn end(self) {
        for lane in self.lanes {
            lane.carry.end().await;
        }
    }
}

fn failed(volume: &VolumeRef, why: &str) -> Refusal {
    Refusal::new(ErrorCode::MigrationFailed, format!("disk {volume} cannot travel any more: {why}"))
        .hint("the VM runs on its old host; look at both hosts' logs and try again: what has arrived of the disk is kept there")
        .retry(Retry::Safe)
}

/// What a lane may take of what its move may, while disks are copied and afterwards: memory needs hardly anything before, and most of it then.
pub(in crate::vm) fn share(own: Option<BytesPerSec>, lanes: usize, lane: u16, copied: bool) -> Option<BytesPerSec> {
    let own = own?.get();
    let disks = match (lanes as u64, copied) {
        (0, _) => return Some(BytesPerSec(own)),
        (_, true) => own / 4,
        (_, false) => own - own / 16,
    };
    Some(BytesPerSec(if lane == 0 { own - disks } else { disks / lanes as u64 }.max(1)))
}

impl Actor {
    /// Begins with the disks that the destination does not see.
    pub(in crate::vm) async fn begin_disks(
        &mut self,
        qmp: &Qmp,
        grant: &Grant,
        address: IpAddr,
        policy: MigrationPolicy,
        disks: &[TravellingDisk],
    ) -> Result<Vec<Lane>, Refusal> {
        let spec = self.record.as_ref().map(|record| record.spec.clone());
        let Some(spec) = spec.filter(|_| !disks.is_empty()) else { return Ok(vec![]) };
        let with_nodes: Vec<_> = disks.iter().filter_map(|disk| Some((disk, node_of(&spec, &disk.volume)?))).collect();
        // What an agent before this one has left.
        qmp.stop_serving_disks().await.map_err(qemu_failed)?;
        for (_, node) in &with_nodes {
            qmp.drop_mirror(node).await.map_err(qemu_failed)?;
        }
        self.serve_disks(qmp).await?;
        let mut lanes = Vec::new();
        let count = with_nodes.len();
        for (place, (disk, node)) in with_nodes.into_iter().enumerate() {
            match self.begin_disk(qmp, grant, SocketAddr::new(address, disk.port), policy, (place, count), (disk, &node)).await {
                Ok(carry) => lanes.push(Lane::new(&disk.volume, node, disk.size, carry)),
                Err(refusal) => {
                    DisksOut::new(lanes).end().await;
                    self.undo_disks().await;
                    return Err(refusal);
                }
            }
        }
        Ok(lanes)
    }

    async fn begin_disk(
        &mut self,
        qmp: &Qmp,
        grant: &Grant,
        address: SocketAddr,
        policy: MigrationPolicy,
        (place, count): (usize, usize),
        (disk, node): (&TravellingDisk, &str),
    ) -> Result<CarryClient, Refusal> {
        let (ours, qemus) = UnixStream::pair().map_err(|error| host_failed("no socket pair", &error))?;
        let mut fds = PassedFds::new();
        let disk_fd = fds.pass(self.connect_to_disks()?);
        let images = self.lend_indexed_images(&mut fds).await;
        let mut since = None;
        for bitmap in qmp.bitmaps(node).await.map_err(qemu_failed)? {
            match generation_of(&bitmap.name) {
                Some(generation) if bitmap.records => since = Some((bitmap.name, generation)),
                // A move before this one has stopped it: what was written since is not in it.
                Some(_) => qmp.remove_bitmap(node, &bitmap.name).await.map_err(qemu_failed)?,
                None => {}
            }
        }
        let facts = OwnDiskFacts { export: node.to_owned(), size: disk.size.get(), since: since.clone() };
        let lane = lane_of(place);
        let bandwidth = share(policy.bandwidth, count, lane, false);
        let role = Role::DiskSource { address, bandwidth, disk_fd, disk: facts, images };
        let start = LaneStart { lane, peer: &grant.destination, stall: policy.stall };
        let carry = self.start_carry(role, grant, start, ours.into(), fds).await?;
        let begun = async {
            qmp.begin_mirror(node, qemus.into()).await?;
            // What is written from here on is mirrored: what was written until now is to be read.
            if let Some((bitmap, _)) = &since {
                qmp.stop_bitmap(node, bitmap).await?;
            }
            qmp.export_disk(node, false, since.as_ref().map(|(bitmap, _)| bitmap.as_str())).await
        };
        if let Err(error) = begun.await {
            carry.end().await;
            return Err(qemu_failed(error));
        }
        carry.begin();
        if let Some(Holding::Source(outgoing)) = self.record.as_mut().map(|record| &mut record.holding)
            && let Some(kept) = outgoing.disks.iter_mut().find(|kept| kept.volume == disk.volume)
        {
            kept.carry = Some(carry.identity().clone());
        }
        Ok(carry)
    }

    /// The disks stay: QEMU lets go of all that it began for their way. A bitmap that was stopped says nothing any more.
    pub(in crate::vm) async fn undo_disks(&self) {
        let (Ok(qmp), Some(record)) = (self.monitor(), &self.record) else { return };
        let Holding::Source(outgoing) = &record.holding else { return };
        if outgoing.disks.is_empty() {
            return;
        }
        let undone = async {
            for node in outgoing.disks.iter().filter_map(|disk| node_of(&record.spec, &disk.volume)) {
                qmp.drop_mirror(&node).await?;
            }
            qmp.stop_serving_disks().await?;
            for node in outgoing.disks.iter().filter_map(|disk| node_of(&record.spec, &disk.volume)) {
                for bitmap in
                    qmp.bitmaps(&node).await?.iter().filter(|bitmap| !bitmap.records && generation_of(&bitmap.name).is_some())
                {
                    qmp.remove_bitmap(&node, &bitmap.name).await?;
                }
            }
            Ok::<_, QmpError>(())
        };
        if let Err(error) = undone.await {
            tracing::warn!(%error, "QEMU still has something of the disks' way; it goes with the next move");
        }
    }

    /// The VM runs elsewhere: what is here of its disks is kept for its way back. Whether that is so.
    pub(in crate::vm) async fn leave_disks(&self, generation: Generation) -> bool {
        let Some(record) = &self.record else { return true };
        let Holding::Source(outgoing) = &record.holding else { return true };
        let mut all = true;
        for OutgoingDisk { volume, .. } in &outgoing.disks {
            let left = match node_of(&record.spec, volume) {
                Some(_) => self.host.pools.leave(&disk_of(&record.spec, volume), self.vm, generation).await,
                None => self.host.pools.drop_volume(volume).await,
            };
            if let Err(refusal) = left {
                tracing::warn!(%volume, message = refusal.message, "what is left of the volume is still where it was");
                all = false;
            }
        }
        all
    }
}

/// The sum of what all lanes have looked at, in thousandths of their disks.
pub(in crate::vm) fn permille((size, looked_at): (u64, u64)) -> u16 {
    let permille = u128::from(looked_at) * 1_000 / u128::from(size.max(1));
    u16::try_from(permille.min(1_000)).unwrap_or(1_000)
}

/// Left to look at.
pub(in crate::vm) fn remaining((size, looked_at): (u64, u64)) -> Bytes {
    Bytes(size.saturating_sub(looked_at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_share_what_their_move_may_take() {
        let of = |lanes, lane, copied| share(Some(BytesPerSec(1_600)), lanes, lane, copied).map(BytesPerSec::get);
        assert_eq!(share(None, 3, 1, true), None);
        assert_eq!(of(0, 0, true), Some(1_600));
        assert_eq!((of(1, 0, false), of(1, 1, false)), (Some(100), Some(1_500)));
        assert_eq!((of(3, 0, true), of(3, 2, true)), (Some(1_200), Some(133)));
        assert_eq!(share(Some(BytesPerSec(1)), 8, 8, true), Some(BytesPerSec(1)), "nobody is cut off");
    }

    #[test]
    fn progress_is_what_was_looked_at() {
        assert_eq!((permille((0, 0)), permille((200, 50)), permille((1, 9))), (0, 250, 1_000));
        assert_eq!(remaining((200, 50)), Bytes(150));
    }
}
