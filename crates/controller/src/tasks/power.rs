//! Start, stop, kill, pause, unpause, delete.

use godwit_link::v1::{self, command::Action};
use godwit_link::{decode, encode};
use godwit_model::{ErrorCode, Generation, Grant, Millis, Name, Refusal, RestoreFigures, RunState, TaskId, UnixMillis};
use tokio::time::{Duration, Instant};

use super::{Outcome, Tasks, note, patiently};
use crate::clock;
use crate::db::{Batch, Fault};
use crate::rows::{HabitsRow, HistoryRow, HostRow, Origin, OriginKind, TaskRow, VmRow, Work};

/// How long an unconditional grant can wait for its host.
pub(super) const START_LIFETIME: u64 = 24 * 3_600_000;
/// How often a kill looks whether the move that it cuts short has ended.
const LOOK: Duration = Duration::from_secs(1);

fn no_host(vm: &VmRow) -> Refusal {
    Refusal::new(ErrorCode::Internal, format!("VM {} runs but has no host", vm.name))
}

/// Whether the answer means that what was asked for is so.
pub(super) fn already(refusal: &Refusal) -> bool {
    refusal.code == ErrorCode::VmNotRunning
}

impl Tasks {
    pub(super) async fn run_start(&self, id: TaskId) -> Result<(), Fault> {
        let (task, vm) = self.both(id).await?;
        let Work::Start { host, generation, from } = &task.row.work else { return Ok(()) };
        let Some(spec) = &vm.row.resolved else {
            let refusal = Refusal::new(ErrorCode::Internal, "the VM has no resolved spec");
            return self.finish(id, Outcome::Failed(refusal), |_, _| {}).await;
        };
        let step = match from {
            Some(from) => format!("begins from {} on {host}", from.snapshot),
            None => format!("starts QEMU on {host}"),
        };
        self.set_step(id, &step).await?;
        let grant = Grant {
            vm: vm.row.id,
            generation: *generation,
            source: None,
            destination: host.clone(),
            task: id,
            expires: UnixMillis(task.row.created.0 + START_LIFETIME),
        };
        let grant = match self.authority.grant(&grant) {
            Ok(grant) => Some(grant),
            Err(refusal) => return self.finish(id, Outcome::Failed(refusal), |_, _| {}).await,
        };
        let suspended = from.clone().filter(|origin| origin.kind == OriginKind::Suspended);
        let from = match from {
            Some(origin) => match self.told_of(&vm.row, origin, host).await {
                Err(Fault::Refused(refusal)) => return self.finish(id, Outcome::Failed(refusal), |_, _| {}).await,
                told => Some(told?),
            },
            None => None,
        };
        let began = from.is_some();
        let start = v1::StartVm { grant, spec: encode(spec), from };
        let answer = if began {
            let Some(answer) = self.begin_from(id, host, start, (vm.row.id, *generation)).await? else {
                let said = "cancelled by request; the VM is stopped, and begins from the snapshot with its next start";
                return self.finish_cancelled(id, *generation, said).await;
            };
            answer
        } else {
            self.command(id, host, "start", Action::Start(start)).await?
        };
        match answer {
            Ok(answer) => {
                if let Some(origin) = suspended {
                    self.forget_suspended(id, generation, &origin).await?;
                }
                let figures = if began { decode::<RestoreFigures>("figures", &answer.result).ok() } else { None };
                let now = clock::now();
                self.finish(id, Outcome::Done, |task, vm| {
                    task.restore = figures;
                    vm.origin = None;
                    // Where it was seen running, its host has said by now whether it still is.
                    if vm.generation == *generation && vm.reported < *generation {
                        vm.set_state(RunState::Running, now);
                    }
                })
                .await
            }
            Err(refusal) => self.finish(id, Outcome::Failed(refusal), |_, _| {}).await,
        }
    }

    /// It goes on: what it was suspended in is not needed any more.
    async fn forget_suspended(&self, id: TaskId, generation: &Generation, origin: &Origin) -> Result<(), Fault> {
        let now = clock::now();
        let (task, vm) = self.both(id).await?;
        self.edit(id, |task, vm| {
            if vm.generation == *generation && vm.reported < *generation {
                vm.set_state(RunState::Running, now);
            }
            vm.origin = None;
            task.step = format!("runs; deletes {}", origin.snapshot);
        })
        .await?;
        match self.delete_snapshot(&vm.row.team, &origin.snapshot, Some(task.row.id)).await {
            Err(Fault::Refused(refusal)) if refusal.code != ErrorCode::NotFound => {
                let said = format!("snapshot {} stays: {refusal}", origin.snapshot);
                self.edit(id, |task, _| note(task, said.clone())).await.map(|_| ())
            }
            Err(Fault::Refused(_)) => Ok(()),
            deleted => deleted,
        }
    }

    pub(super) async fn run_stop(&self, id: TaskId, timeout: Millis) -> Result<(), Fault> {
        let (task, vm) = self.both(id).await?;
        let Some(host) = vm.row.host.clone() else {
            return self.finish(id, Outcome::Failed(no_host(&vm.row)), |_, _| {}).await;
        };
        let waker = self.waker(id);
        self.set_step(id, "asks the guest to power off").await?;
        let action = Action::Stop(v1::StopVm { vm: vm.row.id.to_string(), generation: vm.row.generation.0 });
        let given_up = self.stop_given_up(id);
        match self.command_until(id, &host, "stop", action, given_up).await? {
            Some(Err(refusal)) if !already(&refusal) => return self.finish(id, Outcome::Failed(refusal), |_, _| {}).await,
            _ => {}
        }
        self.set_step(id, "waits for the guest to power off").await?;
        let spent = clock::now().0.saturating_sub(task.row.created.0);
        let deadline = Instant::now() + Duration::from_millis(timeout.0.saturating_sub(spent));
        loop {
            let (task, vm) = self.both(id).await?;
            if vm.row.activity.is_none_or(|activity| activity.task != id) {
                let cut = Refusal::new(ErrorCode::Cancelled, "cut short: the VM was killed");
                return self.finish(id, Outcome::Cancelled(cut), |_, _| {}).await;
            }
            if !vm.row.has_process() {
                return self.finish(id, Outcome::Done, |_, _| {}).await;
            }
            if task.row.cancel {
                let cancelled = Refusal::new(ErrorCode::Cancelled, "no longer waits; the guest was asked and may still power off");
                return self.finish(id, Outcome::Cancelled(cancelled), |_, _| {}).await;
            }
            tokio::select! {
                () = waker.notified() => {}
                () = tokio::time::sleep_until(deadline) => {
                    let refusal = Refusal::new(ErrorCode::VmRunning, format!("the guest did not power off within {timeout}"))
                        .hint("look at its console, or end it without asking: `godwit vm kill`");
                    return self.finish(id, Outcome::Failed(refusal), |_, _| {}).await;
                }
            }
        }
    }

    /// Returns when a stop shall no longer wait for its host.
    async fn stop_given_up(&self, id: TaskId) -> Result<(), Fault> {
        let waker = self.waker(id);
        loop {
            let (task, vm) = self.both(id).await?;
            if task.row.cancel || vm.row.activity.is_none_or(|activity| activity.task != id) {
                // Whoever waits next shall see it as well.
                waker.notify_one();
                return Ok(());
            }
            waker.notified().await;
        }
    }

    pub(super) async fn run_kill(&self, id: TaskId) -> Result<(), Fault> {
        self.cut_moves_short(id).await?;
        let (_, vm) = self.both(id).await?;
        let Some(host) = vm.row.host.clone() else {
            return self.finish(id, Outcome::Failed(no_host(&vm.row)), |_, _| {}).await;
        };
        self.set_step(id, &format!("ends QEMU on {host}")).await?;
        let generation = vm.row.generation;
        let action = Action::Kill(v1::KillVm { vm: vm.row.id.to_string(), generation: generation.0, ..Default::default() });
        match self.command(id, &host, "kill", action).await? {
            Err(refusal) if !already(&refusal) => self.finish(id, Outcome::Failed(refusal), |_, _| {}).await,
            _ => self.finish_in(id, generation, RunState::Stopped).await,
        }
    }

    /// Cancels the VM's moves, and waits until one host has the VM: in between nobody could be told to end it.
    async fn cut_moves_short(&self, id: TaskId) -> Result<(), Fault> {
        let (task, vm) = self.both(id).await?;
        let of_vm = |task: &TaskRow| task.vm == Some(vm.row.id) && task.open_move().is_some();
        let moves = self.db.all::<TaskRow>().await?.into_iter().filter(|task| of_vm(&task.row)).map(|task| task.row.id);
        for moving in moves {
            self.set_step(id, &format!("waits until one host has the VM: task {moving}")).await?;
            let waker = self.waker(id);
            loop {
                let (now, vm) = (self.task(moving).await?.row, self.both(id).await?.1.row);
                if now.open_move().is_none_or(|work| work.has_arrived(&vm)) {
                    break;
                }
                // Again if it was too late for one attempt of the move, and another has begun.
                if !now.cancel
                    && let Err(fault) = self.cancel(moving, &task.row.principal).await
                {
                    tracing::debug!(task = %id, %moving, refusal = %fault.refusal(), "the move is not cancelled");
                }
                tokio::select! {
                    () = waker.notified() => {}
                    () = tokio::time::sleep(LOOK) => {}
                }
            }
        }
        Ok(())
    }

    pub(super) async fn run_pause(&self, id: TaskId) -> Result<(), Fault> {
        let (task, vm) = self.both(id).await?;
        let Some(host) = vm.row.host.clone() else {
            return self.finish(id, Outcome::Failed(no_host(&vm.row)), |_, _| {}).await;
        };
        let (name, generation) = (vm.row.id.to_string(), vm.row.generation);
        let (tag, action, state) = if task.row.work == Work::Pause {
            ("pause", Action::Pause(v1::PauseVm { vm: name, generation: generation.0 }), RunState::Paused)
        } else {
            ("unpause", Action::Unpause(v1::UnpauseVm { vm: name, generation: generation.0 }), RunState::Running)
        };
        match self.command(id, &host, tag, action).await? {
            Err(refusal) => self.finish(id, Outcome::Failed(refusal), |_, _| {}).await,
            Ok(_) => self.finish_in(id, generation, state).await,
        }
    }

    /// Ends well, with the VM in `state`; one that ended meanwhile stays ended.
    async fn finish_in(&self, id: TaskId, generation: Generation, state: RunState) -> Result<(), Fault> {
        let now = clock::now();
        self.finish(id, Outcome::Done, |_, vm| {
            if vm.generation == generation && vm.has_process() {
                vm.set_state(state, now);
            }
        })
        .await
    }

    /// Ends as cancelled, with a VM that does not run.
    pub(super) async fn finish_cancelled(&self, id: TaskId, generation: Generation, said: impl Into<String>) -> Result<(), Fault> {
        let (now, cancelled) = (clock::now(), Refusal::new(ErrorCode::Cancelled, said));
        self.finish(id, Outcome::Cancelled(cancelled), |_, vm| {
            if vm.generation == generation && vm.has_process() {
                vm.set_state(RunState::Stopped, now);
            }
        })
        .await
    }

    pub(super) async fn run_delete(&self, id: TaskId, volumes: bool) -> Result<(), Fault> {
        let (_, vm) = self.both(id).await?;
        let mut vm = vm.row;
        // A host that was removed is not waited for.
        let mut removed = Vec::new();
        for host in vm.granted.keys() {
            if self.db.find::<HostRow>(host.as_str()).await?.is_none() {
                removed.push(host.clone());
            }
        }
        vm.granted.retain(|host, _| !removed.contains(host));
        vm.host.take_if(|host| removed.contains(host));
        self.set_step(id, "lets the hosts forget it").await?;
        for host in vm.granted.keys().filter(|host| vm.host.as_ref() != Some(*host)) {
            // Of earlier hosts at most a record of a stopped VM is left; it is not worth waiting for them.
            if self.hub.presence(host).is_none() {
                continue;
            }
            if let Err(refusal) = self.forget(id, &vm, host).await?
                && refusal.code == ErrorCode::VmRunning
            {
                return self.finish(id, Outcome::Failed(refusal), |_, _| {}).await;
            }
        }
        // What it has not made of a snapshot may be somebody else's: then that is why it has not begun.
        let unmade = vm.origin.as_ref().is_some_and(|origin| origin.kind == OriginKind::Clone);
        if volumes && unmade {
            self.edit(id, |task, _| note(task, "its volumes are not deleted: it has not begun, so it has made none")).await?;
        }
        if volumes && !unmade {
            for volume in vm.spec.volumes() {
                let has_pool = |host: &Name| {
                    let present = self.hub.presence(host);
                    present.is_some_and(|present| present.facts.pools.iter().any(|pool| pool.name == volume.pool))
                };
                let any = || self.hub.present().into_iter().map(|(host, _)| host).find(has_pool);
                let Some(host) = vm.host.clone().or_else(any) else {
                    self.edit(id, |task, _| note(task, format!("volume {volume} stays: no connected host has its pool"))).await?;
                    continue;
                };
                self.set_step(id, &format!("deletes volume {volume}")).await?;
                let delete = v1::DeleteVolume { pool: volume.pool.to_string(), volume: volume.volume.to_string() };
                let action = Action::DeleteVolume(delete);
                match self.command(id, &host, &format!("volume {volume}"), action).await? {
                    Err(refusal) if refusal.code != ErrorCode::VolumeMissing => {
                        return self.finish(id, Outcome::Failed(refusal), |_, _| {}).await;
                    }
                    _ => {}
                }
            }
        }
        if let Some(host) = vm.host.as_ref().filter(|host| vm.granted.contains_key(*host))
            && let Err(refusal) = self.forget(id, &vm, host).await?
            && refusal.code != ErrorCode::NotFound
        {
            return self.finish(id, Outcome::Failed(refusal), |_, _| {}).await;
        }
        self.remove(id).await
    }

    async fn forget(&self, id: TaskId, vm: &VmRow, host: &Name) -> Result<Result<(), Refusal>, Fault> {
        let action = Action::Forget(v1::ForgetVm { vm: vm.id.to_string() });
        Ok(self.command(id, host, &format!("forget {host}"), action).await?.map(drop))
    }

    /// Ends the task and removes the VM and its claims, in one transaction.
    async fn remove(&self, id: TaskId) -> Result<(), Fault> {
        patiently!(id, {
            let (mut task, vm) = self.both(id).await?;
            super::conclude(&mut task.row, &Outcome::Done);
            let mut batch = Batch::default().update(&task).delete(&vm).free(format!("vmname/{}/{}", vm.row.team, vm.row.name));
            if let Some(history) = self.db.find::<HistoryRow>(&vm.row.id.to_string()).await? {
                batch = batch.delete(&history);
            }
            if let Some(habits) = self.db.find::<HabitsRow>(&vm.row.id.to_string()).await? {
                batch = batch.delete(&habits);
            }
            for key in vm.row.claims() {
                batch = batch.free(key);
            }
            self.db.commit(batch).await?;
            self.hub.habits.forget(vm.row.id);
            self.metrics.on_deleted(&vm.row.team, &vm.row.name);
            Ok(())
        })
    }
}
