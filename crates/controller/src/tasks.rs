//! Long work: recorded before it starts, resumed after a restart at the step that was recorded, held by the VM in the same transaction.
//!
//! ```text
//!   request ─▶ admit: one transaction writes task, activity and grant ─▶ executor
//!                                                                          │ each step: write the stage, then command an agent
//!   restart ─▶ every running task ─────────────────────────────────────────┘ (same command id again: the agent answers from its journal)
//! ```
//! Nothing of an executor lives in memory only, so it may be dropped at any line.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use godwit_api::v1::{TaskNote, TaskState};
use godwit_link::v1::{self, command::Action};
use godwit_model::{ErrorCode, MigrationProgress, Name, Refusal, TaskId, VmId};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::authority::Authority;
use crate::clock::{self, WallClock};
use crate::db::{Batch, Db, Fault, Stored, retry};
use crate::history;
use crate::hub::{Answer, Hub};
use crate::images::Images;
use crate::metrics::Metrics;
use crate::principals::not_found;
use crate::rows::{TaskRow, VmRow, Work};

mod admit;
mod autostart;
mod cancel;
mod change;
mod clone;
mod exec;
mod files;
mod forecast;
mod golden;
mod import;
mod migrate;
mod policy;
mod power;
mod retain;
mod rollback;
mod schedule;
mod snapshot;
mod suspend;
mod turns;
mod vault;
mod wait;

pub(crate) use admit::{Ask, Asked, host_down};
pub(crate) use cancel::cancellable;
pub(crate) use files::Asker;
pub(crate) use import::NewImport;
pub(crate) use schedule::Opening;

/// Lines of a trail that are kept.
const TRAIL: usize = 200;
/// Progress of one task is written at most this often.
const PROGRESS_PERIOD: Duration = Duration::from_millis(500);
/// How long to wait before a store without space is tried again.
const FULL_PERIOD: Duration = Duration::from_secs(1);
/// Ended tasks that are kept.
const ENDED_KEPT: usize = 2_000;

/// As `retry`, for a task that cannot go on before it is written: again also while the store has no space.
macro_rules! patiently {
    ($id:ident, $attempt:block) => {{
        let mut told = false;
        loop {
            match $crate::db::retry!($attempt) {
                Err(fault) if fault.is_full() => {
                    if !std::mem::replace(&mut told, true) {
                        tracing::warn!(task = %$id, "the store has no space left: the task waits");
                    }
                    tokio::time::sleep($crate::tasks::FULL_PERIOD).await;
                }
                result => break result,
            }
        }
    }};
}
use patiently;

/// The executor of tasks.
pub(crate) struct Tasks {
    db: Db,
    hub: Arc<Hub>,
    images: Arc<Images>,
    authority: Arc<Authority>,
    metrics: Metrics,
    wakers: Mutex<HashMap<TaskId, Arc<Notify>>>,
    written: Mutex<HashMap<TaskId, Instant>>,
    execs: Mutex<HashMap<VmId, usize>>,
    lines: wait::Lines,
    snapshot_turns: snapshot::Turns,
    turns: turns::Turns,
    /// VMs that are looked after until a golden snapshot is taken.
    watched: Mutex<HashSet<VmId>>,
    /// Schedules are to be looked at again.
    scheduled: Notify,
    clock: WallClock,
    heartbeat: Duration,
    tracker: TaskTracker,
    stop: CancellationToken,
}

/// How a task ends.
#[derive(Clone, Debug)]
pub(crate) enum Outcome {
    /// Well.
    Done,
    /// Badly.
    Failed(Refusal),
    /// By request.
    Cancelled(Refusal),
}

impl Tasks {
    /// An executor; nothing runs yet.
    pub(crate) fn new(
        db: Db,
        hub: Arc<Hub>,
        images: Arc<Images>,
        authority: Arc<Authority>,
        (clock, heartbeat): (WallClock, Duration),
        tracker: TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        Self {
            db,
            hub,
            images,
            authority,
            metrics: Metrics::new(),
            wakers: Mutex::default(),
            written: Mutex::default(),
            execs: Mutex::default(),
            lines: wait::Lines::default(),
            snapshot_turns: snapshot::Turns::default(),
            turns: turns::Turns::default(),
            watched: Mutex::default(),
            scheduled: Notify::new(),
            clock,
            heartbeat,
            tracker,
            stop,
        }
    }

    /// What Prometheus is told.
    pub(crate) const fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Goes on with every task that had not ended.
    pub(crate) async fn resume(self: &Arc<Self>) -> Result<(), Fault> {
        let all = self.db.all::<TaskRow>().await?;
        for task in all.iter().filter(|task| !task.row.state.ended()) {
            self.lines.join(&task.row);
            if let Work::Migrate(work) = &task.row.work {
                self.turns.resume(task.row.id, work);
            }
        }
        for task in all {
            if !task.row.state.ended() {
                tracing::info!(task = %task.row.id, kind = task.row.work.kind(), "resumed");
                self.spawn(task.row.id);
            }
        }
        self.watch_hosts();
        self.watch_golden().await?;
        self.begin_schedules();
        Ok(())
    }

    /// A host that goes away or comes back may be a turn for moves that wait.
    fn watch_hosts(self: &Arc<Self>) {
        let (tasks, mut hosts) = (self.clone(), self.hub.watch());
        self.tracker.spawn(async move {
            let stop = tasks.stop.clone();
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    changed = hosts.changed() => match changed {
                        Ok(()) => tasks.wake_next(),
                        Err(_) => return,
                    }
                }
            }
        });
    }

    /// Drops the oldest ended tasks beyond a number.
    pub(crate) async fn prune(&self) -> Result<(), Fault> {
        // A source that was not waited for finds the other host by the task.
        let unheard = |task: &TaskRow| {
            task.state == TaskState::Done && matches!(&task.work, Work::Migrate(work) if work.source_ended.is_none())
        };
        let over = |task: &TaskRow| task.state.ended() && !unheard(task);
        let mut ended: Vec<_> = self.db.all::<TaskRow>().await?.into_iter().filter(|task| over(&task.row)).collect();
        ended.sort_by_key(|task| task.row.created);
        let surplus = ended.len().saturating_sub(ENDED_KEPT);
        for task in ended.iter().take(surplus) {
            self.db.commit(Batch::default().delete(task)).await?;
        }
        Ok(())
    }

    fn spawn(self: &Arc<Self>, id: TaskId) -> JoinHandle<()> {
        let tasks = self.clone();
        self.tracker.spawn(async move {
            let stop = tasks.stop.clone();
            tokio::select! {
                () = stop.cancelled() => {}
                result = tasks.run(id) => if let Err(fault) = result {
                    tracing::error!(task = %id, error = &fault as &dyn std::error::Error, "the task rests until the next start of the controller");
                }
            }
            tasks.give_turn_back(id);
            if let Some(vm) = tasks.lines.forget_task(id) {
                tasks.wake_line(vm);
            }
            if let Err(fault) = tasks.go_on_after(id).await {
                tracing::warn!(task = %id, error = &fault as &dyn std::error::Error, "a VM waits to be started until its host connects again");
            }
            tasks.wakers.lock().expect("no holder panics").remove(&id);
            tasks.written.lock().expect("no holder panics").remove(&id);
        })
    }

    /// A task has ended: what has waited for its VM goes on.
    async fn go_on_after(self: &Arc<Self>, id: TaskId) -> Result<(), Fault> {
        let task = self.task(id).await?.row;
        if task.schedule.is_some() {
            self.look_at_schedules();
        }
        let Some(vm) = task.vm else { return Ok(()) };
        self.wake_line(vm);
        if let Some(waiting) = self.lines.waiting_move(vm) {
            self.wake(waiting);
        }
        if self.db.find::<VmRow>(&vm.to_string()).await?.is_some_and(|vm| vm.row.golden_after.is_some() && vm.row.has_process()) {
            self.watch_one(vm);
        }
        self.start_what_waited(vm).await
    }

    async fn run(&self, id: TaskId) -> Result<(), Fault> {
        if matches!(self.task(id).await?.row.work, Work::Wait { .. }) {
            self.run_wait(id).await?;
        }
        let task = self.task(id).await?.row;
        match task.work {
            // Done as soon as it is recorded.
            Work::Wait { .. } | Work::Clone { .. } => Ok(()),
            Work::Start { .. } => self.run_start(id).await,
            Work::Stop { timeout } => self.run_stop(id, timeout).await,
            Work::Kill => self.run_kill(id).await,
            Work::Pause | Work::Unpause => self.run_pause(id).await,
            Work::Delete { volumes } => self.run_delete(id, volumes).await,
            Work::Migrate(_) => self.run_migrate(id).await,
            Work::Change => self.run_change(id).await,
            Work::Import { .. } => self.run_import(id).await,
            Work::Exec { .. } => self.lose_exec(id).await,
            Work::Snapshot { name, .. } => self.run_snapshot(id, &name).await,
            Work::Rollback(_) => self.run_rollback(id).await,
            Work::Suspend(_) => self.run_suspend(id).await,
            Work::Verify { .. } => self.run_verify(id).await,
            Work::SnapshotExport { .. } => self.run_snapshot_export(id).await,
            Work::SnapshotImport { .. } => self.run_snapshot_import(id).await,
            Work::SnapshotDelete { name, .. } => self.run_snapshot_delete(id, &name).await,
        }
    }

    fn waker(&self, id: TaskId) -> Arc<Notify> {
        self.wakers.lock().expect("no holder panics").entry(id).or_default().clone()
    }

    /// Tells a task's executor to look again.
    pub(crate) fn wake(&self, id: TaskId) {
        let waker = self.wakers.lock().expect("no holder panics").get(&id).cloned();
        if let Some(waker) = waker {
            waker.notify_one();
        }
    }

    /// A task as stored.
    pub(crate) async fn task(&self, id: TaskId) -> Result<Stored<TaskRow>, Fault> {
        self.db.find(&id.to_string()).await?.ok_or_else(|| not_found("task", id).into())
    }

    async fn both(&self, id: TaskId) -> Result<(Stored<TaskRow>, Stored<VmRow>), Fault> {
        let task = self.task(id).await?;
        let vm = match task.row.vm {
            Some(vm) => self.db.find::<VmRow>(&vm.to_string()).await?,
            None => None,
        };
        Ok((task, vm.ok_or_else(|| Fault::Refused(Refusal::new(ErrorCode::Internal, "the VM of a running task is gone")))?))
    }

    /// Changes a task and its VM together. While the store has no space, it waits for some.
    async fn edit(&self, id: TaskId, mut change: impl FnMut(&mut TaskRow, &mut VmRow)) -> Result<TaskRow, Fault> {
        patiently!(id, {
            let (mut task, mut vm) = self.both(id).await?;
            let before = (task.row.clone(), vm.row.clone());
            change(&mut task.row, &mut vm.row);
            let (task_changed, vm_changed) = (task.row != before.0, vm.row != before.1);
            if task_changed || vm_changed {
                let batch = if task_changed { Batch::default().update(&task) } else { Batch::default().unchanged(&task) };
                let batch = change::reclaim(batch, &before.1.claims(), &vm.row);
                let batch = history::note(&self.db, batch, &before.1, &vm.row, Some(&task.row)).await?;
                self.db.commit(if vm_changed { batch.update(&vm) } else { batch.unchanged(&vm) }).await?;
            }
            Ok(task.row)
        })
    }

    /// Says what a task does right now.
    async fn set_step(&self, id: TaskId, step: &str) -> Result<(), Fault> {
        if self.task(id).await?.row.vm.is_none() {
            return self.edit_alone(id, |task| step.clone_into(&mut task.step)).await.map(|_| ());
        }
        self.edit(id, |task, _| step.clone_into(&mut task.step)).await.map(|_| ())
    }

    /// Ends a task and lets go of its VM.
    async fn finish(&self, id: TaskId, outcome: Outcome, mut change: impl FnMut(&mut TaskRow, &mut VmRow)) -> Result<(), Fault> {
        let mut ends = false;
        let task = self
            .edit(id, |task, vm| {
                ends = !task.state.ended();
                if ends {
                    change(task, vm);
                    vm.release(id);
                    conclude(task, &outcome);
                }
            })
            .await?;
        if ends {
            self.metrics.on_ended(&task);
        }
        Self::tell_end(&task);
        Ok(())
    }

    fn tell_end(task: &TaskRow) {
        tracing::info!(task = %task.id, kind = task.work.kind(), subject = %task.subject, state = ?task.state,
            error = task.error.as_ref().map(tracing::field::display), "ended");
    }

    /// Notes progress, at most twice a second, never backwards.
    pub(crate) async fn progress(&self, id: TaskId, progress: MigrationProgress) -> Result<(), Fault> {
        {
            let mut written = self.written.lock().expect("no holder panics");
            let now = Instant::now();
            if written.get(&id).is_some_and(|last| now.duration_since(*last) < PROGRESS_PERIOD) {
                return Ok(());
            }
            written.insert(id, now);
        }
        retry!({
            let mut task = self.task(id).await?;
            if task.row.state.ended() {
                return Ok(());
            }
            let mut progress = progress.clone();
            if let Some(before) = &task.row.progress {
                // A second attempt begins anew on the wire; what people see does not.
                progress.permille = progress.permille.max(before.permille);
            }
            task.row.progress = Some(progress);
            self.db.commit(Batch::default().update(&task)).await
        })
    }

    /// Commands a host and waits for its answer through every disconnect. The id is made of the task and the step, so that the agent
    /// recognises the command when this controller, or a later one, sends it again.
    async fn command(&self, id: TaskId, host: &Name, tag: &str, action: Action) -> Result<Result<Answer, Refusal>, Fault> {
        match self.command_until(id, host, tag, action, std::future::pending()).await? {
            Some(answer) => Ok(answer),
            None => Err(Fault::Refused(Refusal::new(ErrorCode::Internal, "a command was given up that cannot be"))),
        }
    }

    /// As `command`, but gives up while the host is away if `given_up` says so.
    async fn command_until(
        &self,
        id: TaskId,
        host: &Name,
        tag: &str,
        action: Action,
        given_up: impl Future<Output = Result<(), Fault>> + Send,
    ) -> Result<Option<Result<Answer, Refusal>>, Fault> {
        let mut given_up = std::pin::pin!(given_up);
        let step = self.task(id).await?.row.step;
        let command = v1::Command { id: command_id(id, tag), epoch: self.db.epoch().0, task: id.to_string(), action: Some(action) };
        loop {
            if let Some(answer) = self.hub.command(host, command.clone())
                && let Ok(answer) = answer.await
            {
                return Ok(Some(answer));
            }
            // A session that just ended may still be in the hub for a moment; the next turn sees that.
            tokio::task::yield_now().await;
            if self.hub.presence(host).is_none() {
                self.set_step(id, &self.waiting_for(host)).await?;
                tokio::select! {
                    () = self.hub.connected(host) => {}
                    result = &mut given_up => return result.map(|()| None),
                }
                self.set_step(id, &step).await?;
            }
        }
    }

    fn waiting_for(&self, host: &Name) -> String {
        match self.hub.since(host) {
            Some(since) => format!("waits for host {host}, not connected since {}", clock::readable(since)),
            None => format!("waits for host {host}, not connected since the controller started"),
        }
    }
}

/// Writes the end into a task.
pub(crate) fn conclude(task: &mut TaskRow, outcome: &Outcome) {
    let (state, error, text) = match outcome {
        Outcome::Done => (TaskState::Done, None, "done".to_owned()),
        Outcome::Failed(refusal) => (TaskState::Failed, Some(refusal.clone()), format!("failed: {refusal}")),
        Outcome::Cancelled(refusal) => (TaskState::Cancelled, Some(refusal.clone()), format!("cancelled: {refusal}")),
    };
    note(task, text.clone());
    task.state = state;
    task.error = error;
    task.ended = Some(clock::now());
    task.step = match state {
        TaskState::Done => "done".into(),
        TaskState::Cancelled => "cancelled".into(),
        _ => "failed".into(),
    };
}

/// Adds a line to a task's trail.
pub(crate) fn note(task: &mut TaskRow, text: impl Into<String>) {
    task.trail.push(TaskNote { at: clock::now(), text: text.into() });
    if task.trail.len() > TRAIL {
        // The beginning and the end say most.
        task.trail.remove(TRAIL / 2);
    }
}

/// The id of a command: the same for the same step of the same task, whoever asks and however often.
fn command_id(task: TaskId, tag: &str) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(task.uuid().as_bytes()).update(tag.as_bytes());
    let mut first = [0_u8; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

impl Tasks {
    /// A host came back with a VM prepared for a migration that will never reach it: it declines.
    pub(crate) fn decline_leftover(&self, host: &Name, vm: godwit_model::VmId, task: TaskId, generation: godwit_model::Generation) {
        let id = command_id(task, &format!("leftover {}", clock::now().0));
        let action = Some(Action::Settle(v1::SettleMigration { vm: vm.to_string(), generation: generation.0 }));
        tracing::info!(%host, %vm, %task, "a prepared migration that has ended is declined");
        // Its answer changes nothing here: it is asked again whenever the host comes back with it.
        let _ = self.hub.command(host, v1::Command { id, epoch: self.db.epoch().0, task: task.to_string(), action });
    }
}
