//! What a rollback need not look at: between the end of a VM's QEMU and its new beginning this host remembers what was written to its disks since the snapshot.
//!
//! ```text
//! controller: end it, to go back to T        ─▶ guest stands still ─▶ bitmaps since T are read ─▶ QEMU ends ─▶ remembered
//! controller: begin it out of T, generation + 1 ─▶ only that is compared with T, and forgotten
//! ```
//! What is not looked at must be what it was in T. It is, if two things hold. *Until QEMU ended*, all writes went through it, and its bitmap had them: it was begun in the instant
//! of T or when the disk had been made what it was in T, it never stopped, and QEMU has written out what it had in its caches (else nothing is remembered). *Since then*, nobody has written:
//!
//! - A QEMU writes to a volume only on a generation that the controller granted, and the controller issues each number once. The generation that begins is the very next, so none
//!   was issued between, for any host.
//! - Both commands are of the same task. As long as it lasts the VM's volumes are claimed by this VM alone, and its spec does not change: no other VM has had them.
//! - Each volume is the same file, of the same length, last written when it was (of a block device, the same device): see [`Stamp`]. That catches what is not Godwit's.
//!
//! Nothing of this is on a disk: an agent that was restarted knows nothing, and compares everything. So does another host, and whoever finds QEMU dead. A QEMU that the guest has taken over can lie about
//! what it wrote: who wants to be sure ends the VM (`godwit vm kill`) before it is rolled back.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use godwit_model::{ErrorCode, Generation, Grant, Refusal, ResolvedSpec, SnapshotId, TaskId, VolumeRef};
use godwit_qemu::PassedFds;

use super::actor::{Actor, qemu_failed};
use super::disks::{self, nodes};
use crate::journal::Holding;
use crate::snapshot::{BitmapOf, Changed, FromSnapshot, Job, Said, Worker};
use crate::storage::Stamp;

/// How long all of it may take: a VM that is to end is not kept for it.
const READING: Duration = Duration::from_secs(10);
const STOPPING: Duration = Duration::from_secs(5);

/// A rollback that ends the VM: the task's, to this snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TurnBack {
    pub(crate) task: TaskId,
    pub(crate) snapshot: SnapshotId,
}

/// What has changed on the disks of a VM that was ended to be rolled back.
pub(super) struct Remembered {
    to: TurnBack,
    /// The generation that ended.
    ended: Generation,
    disks: Vec<RememberedDisk>,
}

struct RememberedDisk {
    node: String,
    volume: VolumeRef,
    changed: Changed,
    stamp: Stamp,
}

impl Remembered {
    /// Whether it is remembered for this beginning.
    fn is_for(&self, grant: &Grant, from: &FromSnapshot) -> bool {
        self.to == TurnBack { task: grant.task, snapshot: from.snapshot.id } && grant.generation == self.ended.next() && !from.fresh
    }
}

impl Actor {
    /// Ends QEMU, whatever becomes of what there is to remember.
    pub(super) async fn end_to_turn_back(&mut self, generation: Generation, to: TurnBack) {
        let began = Instant::now();
        let read = tokio::time::timeout(READING, self.read_what_has_changed(to.snapshot)).await;
        let read = read.unwrap_or_else(|_| Err(Refusal::new(ErrorCode::QemuFailed, format!("it was not read within {READING:?}"))));
        self.end_process().await;
        self.remembered = None;
        let changed = match read {
            Ok(changed) => changed,
            Err(refusal) => {
                return tracing::info!(
                    message = refusal.message,
                    "what has changed since the snapshot is not known: the disks are compared whole"
                );
            }
        };
        let mut disks = Vec::with_capacity(changed.len());
        for (node, volume, changed) in changed {
            match self.host.pools.stamp(&volume).await {
                Ok(stamp) => disks.push(RememberedDisk { node, volume, changed, stamp }),
                Err(refusal) => tracing::info!(%volume, message = refusal.message, "the volume cannot be looked at"),
            }
        }
        let bytes: u64 = disks.iter().map(|disk| disk.changed.bytes().get()).sum();
        tracing::info!(disks = disks.len(), bytes, took = ?began.elapsed(), "what has changed since the snapshot is known");
        self.remembered = Some(Remembered { to, ended: generation, disks });
    }

    /// Has the guest stand still, and reads of each disk what was written to it since the snapshot, if that is known.
    async fn read_what_has_changed(&self, snapshot: SnapshotId) -> Result<Vec<(String, VolumeRef, Changed)>, Refusal> {
        let (qmp, Some(record)) = (self.monitor()?, &self.record) else { return Ok(vec![]) };
        if self.snapshot.is_some() || record.snapshot.is_some() || self.moving.is_some() || record.holding != Holding::Owner {
            return Err(Refusal::new(ErrorCode::VmBusy, "something else works on the VM's disks"));
        }
        let mut known = Vec::new();
        for (node, volume) in nodes(&record.spec) {
            let since = qmp.since(&node).await.map_err(qemu_failed)?;
            known.extend(since.into_iter().rfind(|since| since.snapshot == snapshot).map(|since| (node, volume, since.bitmap)));
        }
        if known.is_empty() {
            return Err(Refusal::new(ErrorCode::NotFound, "QEMU has no bitmap since the snapshot"));
        }
        qmp.stop(STOPPING).await.map_err(qemu_failed)?;
        // One that is served read-only must stand still.
        for (node, _, bitmap) in &known {
            qmp.stop_bitmap(node, bitmap).await.map_err(qemu_failed)?;
        }
        disks::serve(&self.host, self.vm, qmp).await?;
        let bitmap = |(node, _, bitmap): &(String, VolumeRef, String)| BitmapOf { export: node.clone(), bitmap: bitmap.clone() };
        let job = Job::Changed { disks: known.iter().map(bitmap).collect() };
        let mut worker = Worker::start(&self.host, None, job, PassedFds::new()).await?;
        let unexpected = || Refusal::new(ErrorCode::Internal, "the vault worker said what nobody expects");
        let mut next = known.iter();
        let changed: Vec<Changed> = loop {
            match worker.hear().await? {
                Said::NextDisk => {
                    let Some((node, _, bitmap)) = next.next() else { return Err(unexpected()) };
                    qmp.export_disk(node, false, Some(bitmap)).await.map_err(qemu_failed)?;
                    worker.pass_disk(&disks::connect(&self.host, self.vm)?)?;
                }
                Said::Done(told) => break serde_json::from_value(told).map_err(|_| unexpected())?,
                _ => return Err(unexpected()),
            }
        };
        if changed.len() != known.len() {
            return Err(unexpected());
        }
        Ok(known.into_iter().zip(changed).map(|((node, volume, _), changed)| (node, volume, changed)).collect())
    }

    /// What of each disk may differ from the snapshot, as far as that is known; forgotten with this. Before anything opens the volumes.
    pub(super) async fn take_remembered(
        &mut self,
        grant: &Grant,
        spec: &ResolvedSpec,
        from: &FromSnapshot,
    ) -> BTreeMap<String, Changed> {
        let Some(remembered) = self.remembered.take().filter(|remembered| remembered.is_for(grant, from)) else {
            return BTreeMap::new();
        };
        let now = nodes(spec);
        let mut found = BTreeMap::new();
        for RememberedDisk { node, volume, changed, stamp } in remembered.disks {
            let is_same = now.iter().any(|known| (&known.0, &known.1) == (&node, &volume));
            if is_same && self.host.pools.stamp(&volume).await.is_ok_and(|now| now == stamp) {
                found.insert(node, changed);
            } else {
                tracing::warn!(%volume, "the volume is not as it was when its VM was ended: all of it is compared");
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use godwit_model::{Name, UnixMillis, VmId};
    use uuid::Uuid;

    use super::*;
    use crate::snapshot::{Keyed, VaultAt};

    #[test]
    fn only_the_very_beginning_that_it_was_read_for_trusts_it() {
        let task = |number| TaskId::new(Uuid::from_u128(number));
        let snapshot = |number| SnapshotId::new(Uuid::from_u128(number));
        let to = TurnBack { task: task(1), snapshot: snapshot(1) };
        let remembered = Remembered { to, ended: Generation(7), disks: vec![] };
        let is_for = |generation, of, id, fresh| {
            let grant = Grant {
                vm: VmId::new(Uuid::from_u128(9)),
                generation: Generation(generation),
                source: None,
                destination: Name::new("h1").expect("a name"),
                task: task(of),
                expires: UnixMillis(0),
            };
            let name = |text| Name::new(text).expect("a name");
            let vault = VaultAt { pool: name("shared"), team: name("default"), key: [0; 32] };
            let from = FromSnapshot { vault, snapshot: Keyed { id: snapshot(id), key: [0; 32] }, memory: true, fresh };
            remembered.is_for(&grant, &from)
        };
        assert!(is_for(8, 1, 1, false));
        for (generation, of, id, fresh) in [(7, 1, 1, false), (9, 1, 1, false), (8, 2, 1, false), (8, 1, 2, false), (8, 1, 1, true)]
        {
            assert!(!is_for(generation, of, id, fresh), "{generation} {of} {id} {fresh}");
        }
    }
}
