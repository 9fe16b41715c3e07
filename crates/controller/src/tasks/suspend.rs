//! A VM is suspended: kept with its memory while it stands still, and ended. Its next start goes on from there.
//!
//! ```text
//!   Pause ──stands still──▶ Keep ──taken──▶ End ──QEMU is gone──▶ done: stopped, its origin is the snapshot
//!     │refused                │refused,        │refused
//!     │                       │cancelled       │
//!     └───────────────────────┴──▶ Undo ◀──────┘ ──runs on, if it ran──▶ failed, cancelled
//! ```
//! Between the instant that is kept and its end no vCPU runs: nothing that the VM did is lost.

use godwit_link::v1::{self, command::Action};
use godwit_model::name::MAX_NAME;
use godwit_model::{ErrorCode, Name, Refusal, RunState, SnapshotRequest, TaskId, UnixMillis};

use super::power::already;
use super::snapshot::{NewSnapshot, Taken};
use super::{Ask, Outcome, Tasks, note};
use crate::clock;
use crate::db::{Batch, Fault};
use crate::rows::{Origin, OriginKind, SuspendStage, SuspendWork, TaskRow, VmRow, Work};

/// What the name of a suspended VM's snapshot ends with.
const ENDING: &str = "-suspended";

fn work_of(task: &mut TaskRow) -> Option<&mut SuspendWork> {
    match &mut task.work {
        Work::Suspend(work) => Some(work),
        _ => None,
    }
}

fn to(task: &mut TaskRow, stage: SuspendStage) {
    work_of(task).into_iter().for_each(|work| work.stage = stage.clone());
}

impl Tasks {
    pub(super) async fn admit_suspend(&self, vm: &VmRow, ask: &Ask, now: UnixMillis) -> Result<(Work, Batch), Fault> {
        if let Some(presence) = vm.host.as_ref().and_then(|host| self.hub.presence(host))
            && !presence.facts.keeps_memory_of_paused()
        {
            let message = format!("QEMU {} does not keep the memory of a VM that stands still", presence.facts.qemu);
            return Err(Refusal::new(ErrorCode::Unsupported, message)
                .hint("move it to a host with QEMU 9.0 or newer first, or take a snapshot while it runs and stop it")
                .into());
        }
        let stem: String = vm.name.as_str().chars().take(MAX_NAME - ENDING.len()).collect();
        let plain = Name::new(format!("{stem}{ENDING}")).ok();
        let taken = match &plain {
            Some(name) => self.snapshots_of(&vm.team).await?.iter().any(|other| other.name == *name),
            None => true,
        };
        let new = NewSnapshot {
            name: plain.as_ref().filter(|_| !taken),
            what: ENDING,
            pool: None,
            request: SnapshotRequest { memory: true, quiesce: None },
            golden: false,
            reason: Some(format!("VM {} is suspended", vm.name)),
        };
        let (snapshot, batch) = self.new_snapshot(vm, ask, new, now).await?;
        let ran = vm.state == RunState::Running;
        let stage = if ran { SuspendStage::Pause } else { SuspendStage::Keep };
        Ok((Work::Suspend(Box::new(SuspendWork { snapshot: snapshot.id, name: snapshot.name, ran, stage })), batch))
    }

    pub(super) async fn run_suspend(&self, id: TaskId) -> Result<(), Fault> {
        loop {
            let (task, vm) = self.both(id).await?;
            let Work::Suspend(work) = &task.row.work else { return Ok(()) };
            if task.row.state.ended() {
                return Ok(());
            }
            match &work.stage {
                SuspendStage::Pause => self.stand_still(id, &vm.row, work).await?,
                SuspendStage::Keep => self.keep_suspended(id, &work.name).await?,
                SuspendStage::End => self.end_suspended(id, &vm.row, work).await?,
                SuspendStage::Undo { reason } => self.undo_suspend(id, &vm.row, work, reason).await?,
            }
        }
    }

    fn host_of(vm: &VmRow) -> Result<Name, Refusal> {
        vm.host.clone().ok_or_else(|| Refusal::new(ErrorCode::Internal, format!("VM {} runs but has no host", vm.name)))
    }

    /// Has the VM's host do something to it, as one step of the task.
    async fn tell(&self, id: TaskId, vm: &VmRow, tag: &str, action: Action) -> Result<Result<(), Refusal>, Fault> {
        match Self::host_of(vm) {
            Ok(host) => Ok(self.command(id, &host, tag, action).await?.map(drop)),
            Err(refusal) => Ok(Err(refusal)),
        }
    }

    async fn stand_still(&self, id: TaskId, vm: &VmRow, work: &SuspendWork) -> Result<(), Fault> {
        self.set_step(id, "stands still").await?;
        let generation = vm.generation;
        let action = Action::Pause(v1::PauseVm { vm: vm.id.to_string(), generation: generation.0 });
        match self.tell(id, vm, "pause", action).await? {
            Ok(()) => {
                let now = clock::now();
                let paused = |task: &mut TaskRow, vm: &mut VmRow| {
                    if vm.generation == generation && vm.has_process() {
                        vm.set_state(RunState::Paused, now);
                    }
                    to(task, SuspendStage::Keep);
                };
                self.edit(id, paused).await.map(|_| ())
            }
            Err(refusal) => self.note_kept(id, &work.name, Taken::Refused(refusal)).await,
        }
    }

    async fn keep_suspended(&self, id: TaskId, name: &Name) -> Result<(), Fault> {
        if self.task(id).await?.row.cancel {
            let refusal = Refusal::new(ErrorCode::Cancelled, "cancelled by request");
            return self.note_kept(id, name, Taken::Refused(refusal)).await;
        }
        let taken = self.take(id, name, "suspend").await?;
        self.note_kept(id, name, taken).await
    }

    /// Writes down what came of the snapshot, and with it what is next.
    async fn note_kept(&self, id: TaskId, name: &Name, taken: Taken) -> Result<(), Fault> {
        let without = || {
            let message = format!("QEMU did not let its memory be kept: {name} has the disks alone, and the VM goes on");
            Refusal::new(ErrorCode::Unsupported, message).hint(format!("`godwit snapshot show {name}` says why"))
        };
        let reason = match &taken {
            Taken::Ready(figures) if figures.memory => None,
            Taken::Ready(_) => Some(without()),
            Taken::Refused(refusal) | Taken::Unknown(refusal) => Some(refusal.clone()),
        };
        let next = |task: &mut TaskRow, _: &mut VmRow| {
            if task.state.ended() {
                return;
            }
            let late = Refusal::new(ErrorCode::Cancelled, format!("cancelled by request; what the VM was is kept as {name}"));
            match reason.clone().or_else(|| task.cancel.then_some(late)) {
                None => to(task, SuspendStage::End),
                Some(reason) => to(task, SuspendStage::Undo { reason }),
            }
        };
        self.note_taken(id, name, &taken, next).await.map(|_| ())
    }

    async fn end_suspended(&self, id: TaskId, vm: &VmRow, work: &SuspendWork) -> Result<(), Fault> {
        self.set_step(id, "ends QEMU").await?;
        let generation = vm.generation;
        let action = Action::Kill(v1::KillVm { vm: vm.id.to_string(), generation: generation.0, ..Default::default() });
        match self.tell(id, vm, "kill", action).await? {
            Err(refusal) if !already(&refusal) => {
                self.edit(id, |task, _| to(task, SuspendStage::Undo { reason: refusal.clone() })).await.map(|_| ())
            }
            _ => {
                let now = clock::now();
                self.finish(id, Outcome::Done, |_, vm| {
                    if vm.generation == generation && vm.has_process() {
                        vm.set_state(RunState::Stopped, now);
                    }
                    vm.start_wanted = false;
                    vm.origin = Some(Origin { snapshot: work.name.clone(), memory: true, kind: OriginKind::Suspended });
                })
                .await
            }
        }
    }

    /// It runs on as before, if it ran; what was kept of it by then stays.
    async fn undo_suspend(&self, id: TaskId, vm: &VmRow, work: &SuspendWork, reason: &Refusal) -> Result<(), Fault> {
        let outcome = match reason.code {
            ErrorCode::Cancelled => Outcome::Cancelled(reason.clone()),
            _ => Outcome::Failed(reason.clone()),
        };
        if !work.ran || !vm.has_process() {
            return self.finish(id, outcome, |_, _| {}).await;
        }
        self.set_step(id, "runs on").await?;
        let generation = vm.generation;
        let action = Action::Unpause(v1::UnpauseVm { vm: vm.id.to_string(), generation: generation.0 });
        let told = self.tell(id, vm, "unpause", action).await?;
        let now = clock::now();
        self.finish(id, outcome, |task, vm| match &told {
            Ok(()) if vm.generation == generation && vm.has_process() => vm.set_state(RunState::Running, now),
            Ok(()) => {}
            Err(refusal) => note(task, format!("it does not run on: {refusal}")),
        })
        .await
    }
}
