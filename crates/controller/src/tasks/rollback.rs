//! A rollback: a VM becomes what it was in a snapshot.
//!
//! ```text
//!   KeepPresent ──taken──▶ End ──QEMU is gone──▶ Begin ──vCPUs run──▶ done
//!      │refused, cancelled    │refused             │refused, cancelled
//!      └──▶ nothing changed ◀─┘                    └──▶ disks that may be half of the snapshot: only a rollback begins with them
//! ```
//! Everything that could stand in the way is looked at before it is recorded; names and addresses that it needs are claimed then.

use godwit_api::v1::{SnapshotRollback, SnapshotState};
use godwit_link::v1::{self, command::Action};
use godwit_link::{decode, encode};
use godwit_model::{
    ErrorCode, Generation, Grant, HostLoad, Name, Refusal, RestoreFigures, RunState, SnapshotRequest, TaskId, UnixMillis, Vmgenid,
};

use super::admit::candidates;
use super::change::in_use;
use super::power::{START_LIFETIME, already};
use super::snapshot::NewSnapshot;
use super::{Ask, Outcome, Tasks, command_id, conclude, host_down, note};
use crate::checks::Candidate;
use crate::clock;
use crate::db::{Batch, Fault};
use crate::rows::{HostRow, RollbackStage, RollbackWork, SnapshotRow, TaskRow, VmRow, Work};
use crate::snapshots::{Rollback, not_ready};
use crate::specs::{claims, leaving};

fn work_of(task: &mut TaskRow) -> Option<&mut RollbackWork> {
    match &mut task.work {
        Work::Rollback(work) => Some(work),
        _ => None,
    }
}

impl Tasks {
    pub(super) async fn admit_rollback(
        &self,
        vm: &mut VmRow,
        ask: &Ask,
        name: &Name,
        asked: &SnapshotRollback,
        now: UnixMillis,
    ) -> Result<(Work, Batch), Fault> {
        let stored = self.snapshot(&vm.team, name).await?;
        let snapshot = &stored.row;
        if snapshot.vm != vm.id {
            return Err(Refusal::new(ErrorCode::NotFound, format!("snapshot {name} is of another VM, which was deleted")).into());
        }
        if snapshot.state != SnapshotState::Ready {
            return Err(not_ready(snapshot).into());
        }
        let host = self.rollback_host(vm, snapshot, asked.host.as_ref()).await?;
        let mut needed = claims(&snapshot.spec);
        needed.extend(leaving(&snapshot.resolved, &snapshot.spec));
        for key in needed.difference(&vm.claims()) {
            if self.db.claimed(key).await?.is_some_and(|owner| owner != vm.id.to_string()) {
                return Err(in_use(key).hint(format!("take it out of that VM: snapshot {name} has it")).into());
            }
        }
        vm.held = needed;
        // Written as it is: it cannot be deleted in the same moment.
        let mut batch = Batch::default().update(&stored);
        let mut work = RollbackWork {
            snapshot: snapshot.id,
            name: name.clone(),
            host,
            generation: Generation(0),
            present: None,
            stage: RollbackStage::End,
        };
        // Of disks that are half of a snapshot there is nothing to keep.
        if !asked.discard_present && vm.unfinished.is_none() {
            if !vm.has_process() {
                return Err(Refusal::new(
                    ErrorCode::VmNotRunning,
                    format!("what VM {} is now can be kept only while it runs", vm.name),
                )
                .hint("start it first, or let what is on its disks now be lost: `--discard-present`")
                .into());
            }
            let new = NewSnapshot {
                name: None,
                what: "-before-rollback",
                pool: None,
                request: SnapshotRequest { memory: true, quiesce: None },
                golden: false,
                reason: Some(format!("before the rollback to {name}")),
            };
            let (present, makes_it) = self.new_snapshot(vm, ask, new, now).await?;
            batch = batch.and(makes_it);
            work.present = Some(present.name);
            work.stage = RollbackStage::KeepPresent;
        }
        Ok((Work::Rollback(Box::new(work)), batch))
    }

    pub(super) async fn rollback_host(&self, vm: &VmRow, snapshot: &SnapshotRow, wanted: Option<&Name>) -> Result<Name, Fault> {
        if let Some(host) = wanted {
            self.known(host).await?;
            self.hub.presence(host).ok_or_else(|| host_down(host))?;
        }
        let present = self.hub.present();
        let hosts = candidates(&present);
        let networks = self.networks_of(&vm.team).await?;
        let away = match hosts.iter().any(|host| *host.name == snapshot.host) {
            true => None,
            false => self.db.find::<HostRow>(snapshot.host.as_str()).await?.and_then(|host| host.row.facts),
        };
        let load = HostLoad::default();
        let known = hosts.iter().find(|host| *host.name == snapshot.host).copied();
        let origin =
            known.or_else(|| away.as_ref().map(|facts| Candidate { name: &snapshot.host, facts, load: &load, skew: None }));
        Ok(Rollback { vm, snapshot, networks: &networks, origin }.decide_host(wanted, &hosts)?)
    }

    pub(super) async fn run_rollback(&self, id: TaskId) -> Result<(), Fault> {
        loop {
            let (task, vm) = self.both(id).await?;
            let Work::Rollback(work) = task.row.work else { return Ok(()) };
            if task.row.state.ended() {
                return Ok(());
            }
            match work.stage {
                RollbackStage::KeepPresent => self.keep_present(id, &work).await?,
                RollbackStage::End => self.end_present(id, &vm.row, &work).await?,
                RollbackStage::Begin { granted } => self.begin_again(id, &vm.row, &work, granted).await?,
            }
        }
    }

    async fn keep_present(&self, id: TaskId, work: &RollbackWork) -> Result<(), Fault> {
        let Some(present) = &work.present else { return self.set_rollback_stage(id, RollbackStage::End).await };
        let taken = self.take(id, present, "present").await?;
        let outcome = match taken.outcome() {
            Outcome::Done => None,
            outcome => Some(outcome),
        };
        let task = self
            .note_taken(id, present, &taken, |task, vm| {
                if task.state.ended() {
                    return;
                }
                let late =
                    Refusal::new(ErrorCode::Cancelled, format!("cancelled by request; what the VM is was kept as {present}"));
                let ending = outcome.clone().or_else(|| task.cancel.then_some(Outcome::Cancelled(late)));
                if let Some(ending) = ending {
                    note(task, "the VM is what it was");
                    vm.release(id);
                    conclude(task, &ending);
                } else {
                    note(task, format!("what the VM was before is kept as {present}"));
                    work_of(task).into_iter().for_each(|work| work.stage = RollbackStage::End);
                }
            })
            .await?;
        if task.state.ended() {
            Self::tell_end(&task);
        }
        Ok(())
    }

    async fn set_rollback_stage(&self, id: TaskId, stage: RollbackStage) -> Result<(), Fault> {
        self.edit(id, |task, _| work_of(task).into_iter().for_each(|work| work.stage = stage)).await.map(|_| ())
    }

    /// Ends QEMU and issues the generation on which the VM begins again.
    async fn end_present(&self, id: TaskId, vm: &VmRow, work: &RollbackWork) -> Result<(), Fault> {
        if vm.has_process() {
            let Some(host) = vm.host.clone() else {
                let refusal = Refusal::new(ErrorCode::Internal, format!("VM {} runs but has no host", vm.name));
                return self.finish(id, Outcome::Failed(refusal), |_, _| {}).await;
            };
            self.set_step(id, &format!("ends QEMU on {host}")).await?;
            let generation = vm.generation;
            // A host that begins with it again need not look at all of its disks.
            let back_to = if host == work.host { work.snapshot.to_string() } else { String::new() };
            let action = Action::Kill(v1::KillVm { vm: vm.id.to_string(), generation: generation.0, back_to });
            if let Err(refusal) = self.command(id, &host, "kill", action).await?
                && !already(&refusal)
            {
                return self.finish(id, Outcome::Failed(refusal), |_, _| {}).await;
            }
            let now = clock::now();
            self.edit(id, |_, vm| {
                if vm.generation == generation && vm.has_process() {
                    vm.set_state(RunState::Stopped, now);
                }
            })
            .await?;
        }
        let Some(snapshot) = self.db.find::<SnapshotRow>(&format!("{}/{}", vm.team, work.name)).await? else {
            let refusal = Refusal::new(ErrorCode::Internal, format!("the row of snapshot {} is gone", work.name));
            return self.finish(id, Outcome::Failed(refusal), |_, _| {}).await;
        };
        let snapshot = snapshot.row;
        let (now, fresh) = (clock::now(), Vmgenid::new(clock::fresh()));
        self.edit(id, |task, vm| {
            let Some(work) = work_of(task).filter(|work| work.stage == RollbackStage::End) else { return };
            let generation = vm.issue(&work.host, id);
            work.generation = generation;
            work.stage = RollbackStage::Begin { granted: now };
            let said = format!("to begin on {}, generation {generation}", work.host);
            become_again(vm, &snapshot, fresh);
            vm.host = Some(work.host.clone());
            vm.generation = generation;
            note(task, said);
        })
        .await
        .map(|_| ())
    }

    async fn begin_again(&self, id: TaskId, vm: &VmRow, work: &RollbackWork, granted: UnixMillis) -> Result<(), Fault> {
        let RollbackWork { name, host, generation, .. } = work;
        let failed = async |refusal: Refusal| {
            self.finish(id, Outcome::Failed(refusal), |task, vm| {
                if vm.unfinished.is_some() {
                    note(task, format!("the VM's disks may be half of {name}: it starts again after a rollback that ends well"));
                }
            })
            .await
        };
        let Some(spec) = &vm.resolved else {
            return failed(Refusal::new(ErrorCode::Internal, "the VM has no resolved spec")).await;
        };
        let Some(snapshot) = self.db.find::<SnapshotRow>(&format!("{}/{name}", vm.team)).await? else {
            return failed(Refusal::new(ErrorCode::Internal, format!("the row of snapshot {name} is gone"))).await;
        };
        let snapshot = snapshot.row;
        self.set_step(id, &format!("begins as in {name} on {host}")).await?;
        let grant = Grant {
            vm: vm.id,
            generation: *generation,
            source: None,
            destination: host.clone(),
            task: id,
            expires: UnixMillis(granted.0.saturating_add(START_LIFETIME)),
        };
        let signed = async {
            let from = self.snapshot_for(&snapshot, host, snapshot.has_memory(), false).await?;
            Ok(v1::StartVm { grant: Some(self.authority.grant(&grant)?), spec: encode(spec), from: Some(from) })
        };
        let start = match signed.await {
            Err(Fault::Refused(refusal)) => return failed(refusal).await,
            start => start?,
        };
        let answer = match self.begin_from(id, host, start, (vm.id, *generation)).await? {
            Some(Ok(answer)) => answer,
            Some(Err(refusal)) => return failed(refusal).await,
            None => {
                let said = format!("cancelled by request; the VM is stopped, and begins as in {name} with another rollback");
                return self.finish_cancelled(id, *generation, said).await;
            }
        };
        let figures = decode::<RestoreFigures>("figures", &answer.result).ok();
        let now = clock::now();
        self.finish(id, Outcome::Done, |task, vm| {
            task.restore = figures;
            vm.unfinished = None;
            // Where it was seen running, its host has said by now whether it still is.
            if vm.generation == *generation && vm.reported < *generation {
                vm.set_state(RunState::Running, now);
            }
        })
        .await?;
        self.forget_elsewhere(id, vm, host);
        Ok(())
    }

    /// Hosts that had the VM before may forget it, as far as they are there: what they have of it is of no use. Their answers change nothing here.
    fn forget_elsewhere(&self, id: TaskId, vm: &VmRow, host: &Name) {
        for other in vm.granted.keys().filter(|other| *other != host) {
            let action = Some(Action::Forget(v1::ForgetVm { vm: vm.id.to_string() }));
            let command = command_id(id, &format!("forget {other}"));
            let _ = self.hub.command(other, v1::Command { id: command, epoch: self.db.epoch().0, task: id.to_string(), action });
        }
    }
}

/// Makes the row what it was in the snapshot. A guest that looks learns from `fresh` that it was turned back.
fn become_again(vm: &mut VmRow, snapshot: &SnapshotRow, fresh: Vmgenid) {
    let (mut spec, mut resolved) = (snapshot.spec.clone(), snapshot.resolved.clone());
    // One that never had the device does not get it: it would be another machine.
    spec.vmgenid = spec.vmgenid.map(|_| fresh);
    resolved.platform.vmgenid = resolved.platform.vmgenid.map(|_| fresh);
    vm.unfinished = resolved.volumes().next().map(|_| snapshot.name.clone());
    vm.leaving = leaving(&resolved, &spec);
    vm.waiting.clone_from(&snapshot.waiting);
    vm.spec = spec;
    vm.resolved = Some(resolved);
    vm.released = false;
    vm.start_wanted = false;
    vm.not_started = None;
    vm.held.clear();
    vm.origin = None;
}
