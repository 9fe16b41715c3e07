//! Requests that wait: for another task of their VM, a move for a snapshot, a snapshot for either; and moves for their turn at their hosts. Each is a task from
//! the request on, and is admitted as if it had just been made when it need not wait any more.
//!
//! ```text
//!   Wait ──nothing that it waits for, first in line──▶ admitted: the same task becomes a move or a snapshot
//!     │cancelled            │refused
//!     ▼                     ▼
//!   cancelled             failed
//! ```

use std::collections::{BTreeSet, HashMap};
use std::sync::Mutex;

use godwit_model::lifecycle::{busy, decide_admission};
use godwit_model::{Activity, Admission, ErrorCode, Refusal, TaskId, UnixMillis, VmId};

use tokio::time::Instant;

use super::admit::{describe, new_task};
use super::change::reclaim;
use super::turns::Turn;
use super::{Ask, Asked, Outcome, Tasks, conclude, note, patiently};
use crate::clock;
use crate::db::{Batch, Fault, Stored};
use crate::history;
use crate::rows::{Later, TaskRow, VmRow, Work};

/// Heartbeats for which a host may be away until a request that waits is refused for that.
const ABSENCE: u32 = 15;
/// Tasks that can wait for one VM.
const LINE: usize = 16;

/// Who waits for which VM, in the order of the requests. Made anew from the tasks at every start.
#[derive(Default)]
pub(super) struct Lines(Mutex<HashMap<VmId, BTreeSet<(UnixMillis, TaskId)>>>);

impl Lines {
    /// Puts a task that waits in its line; others are none of its business.
    pub(super) fn join(&self, task: &TaskRow) {
        if let (Work::Wait { .. }, Some(vm)) = (&task.work, task.vm) {
            self.0.lock().expect("no holder panics").entry(vm).or_default().insert((task.created, task.id));
        }
    }

    fn leave(&self, vm: VmId, task: TaskId) {
        let mut lines = self.0.lock().expect("no holder panics");
        if let Some(line) = lines.get_mut(&vm) {
            line.retain(|(_, id)| *id != task);
            if line.is_empty() {
                lines.remove(&vm);
            }
        }
    }

    fn of(&self, vm: VmId) -> Vec<TaskId> {
        let lines = self.0.lock().expect("no holder panics");
        lines.get(&vm).map(|line| line.iter().map(|(_, id)| *id).collect()).unwrap_or_default()
    }
}

/// Where a task stands that waits.
enum Place {
    /// What works on the VM.
    After(Activity),
    /// Another one was there before.
    Behind(TaskId),
    /// Its hosts have others to move; in words.
    Full(String),
    /// It is not wanted any more.
    Cancelled,
    /// It has become what was asked for, or has ended.
    Over,
}

impl Later {
    /// What of a request is kept, if it is one that waits.
    pub(super) fn of(asked: &Asked) -> Option<Self> {
        match asked {
            Asked::Migrate(request) if !request.dry_run => Some(Self::Migrate(Box::new(request.clone()))),
            Asked::Snapshot(request) => Some(Self::Snapshot(Box::new(request.clone()))),
            _ => None,
        }
    }

    fn asked(&self) -> Asked {
        match self {
            Self::Migrate(request) => Asked::Migrate((**request).clone()),
            Self::Snapshot(request) => Asked::Snapshot((**request).clone()),
        }
    }
}

fn said_of(holder: Activity) -> String {
    format!("waits for task {} ({:?}) to end", holder.task, holder.request)
}

impl Tasks {
    /// Records a request that waits for `holder`.
    pub(super) async fn wait_for(&self, vm: &Stored<VmRow>, ask: &Ask, asked: &Asked, holder: Activity) -> Result<TaskRow, Fault> {
        if Later::of(asked).is_none() {
            return Err(busy(holder).into());
        }
        if self.lines.of(vm.row.id).len() >= LINE {
            let refusal = busy(holder);
            return Err(Refusal { message: format!("{}, and {LINE} tasks wait for it", refusal.message), ..refusal }.into());
        }
        self.record_wait(vm, ask, asked, said_of(holder)).await
    }

    /// Records a request that waits for what `step` says.
    pub(super) async fn record_wait(&self, vm: &Stored<VmRow>, ask: &Ask, asked: &Asked, step: String) -> Result<TaskRow, Fault> {
        let asked = Later::of(asked).ok_or_else(|| Refusal::new(ErrorCode::Internal, "a request that cannot wait"))?;
        let mut task = new_task(&vm.row, ask, TaskId::new(clock::fresh()), Work::Wait { asked }, clock::now());
        task.step.clone_from(&step);
        note(&mut task, step);
        let batch = Batch::default().unchanged(vm).create(&task);
        self.db.commit(self.set_out(batch, ask, &vm.row, task.id).await?).await?;
        self.lines.join(&task);
        Ok(task)
    }

    /// Lets those that wait for a VM look again.
    pub(super) fn wake_line(&self, vm: VmId) {
        self.lines.of(vm).into_iter().for_each(|id| self.wake(id));
    }

    /// Returns when the task has become what was asked for, or has ended.
    pub(super) async fn run_wait(&self, id: TaskId) -> Result<(), Fault> {
        let Some(vm) = self.task(id).await?.row.vm else { return Ok(()) };
        let over = self.wait_in_line(id, vm).await;
        self.lines.leave(vm, id);
        // The next in line is the first now.
        self.wake_line(vm);
        over
    }

    async fn wait_in_line(&self, id: TaskId, vm: VmId) -> Result<(), Fault> {
        let waker = self.waker(id);
        let mut connections = self.hub.watch();
        let mut away: Option<Instant> = None;
        loop {
            let placed = self.go_on(id, vm).await;
            let mut until = None;
            match placed {
                Ok(Place::Over) => return Ok(()),
                Ok(Place::Cancelled) => {
                    let refusal = Refusal::new(ErrorCode::Cancelled, "cancelled by request, before it had begun");
                    return self.end_waiting(id, &Outcome::Cancelled(refusal)).await;
                }
                Ok(Place::After(holder)) => self.wait_for_other(id, said_of(holder)).await?,
                Ok(Place::Behind(other)) => {
                    self.wait_for_other(id, format!("waits for task {other}, which was asked for before")).await?;
                }
                Ok(Place::Full(full)) => {
                    // Whoever wants something of the VM need not wait for that.
                    self.lines.leave(vm, id);
                    self.wake_line(vm);
                    self.say_wait(id, full).await?;
                }
                // A host that goes away for a moment, or all of them when the controller has just begun.
                Err(Fault::Refused(refusal))
                    if refusal.code == ErrorCode::HostDown
                        && Instant::now() < *away.get_or_insert_with(|| Instant::now() + self.heartbeat * ABSENCE) =>
                {
                    until = away;
                    self.wait_for_other(id, format!("waits: {}", refusal.message)).await?;
                }
                Err(Fault::Refused(refusal)) => return self.end_waiting(id, &Outcome::Failed(refusal)).await,
                Err(fault) => return Err(fault),
            }
            let Some(until) = until else {
                away = None;
                waker.notified().await;
                continue;
            };
            tokio::select! {
                () = waker.notified() => {}
                // The hub lives as long as the executor.
                _ = connections.changed() => {}
                () = tokio::time::sleep_until(until) => {}
            }
        }
    }

    /// Meanwhile no host keeps a turn for it.
    async fn wait_for_other(&self, id: TaskId, step: String) -> Result<(), Fault> {
        self.give_turn_back(id);
        self.lines.join(&self.task(id).await?.row);
        self.say_wait(id, step).await
    }

    async fn say_wait(&self, id: TaskId, step: String) -> Result<(), Fault> {
        let say = |task: &mut TaskRow| {
            if task.step != step {
                task.step.clone_from(&step);
                note(task, step.clone());
            }
        };
        self.edit_alone(id, say).await.map(|_| ())
    }

    /// It holds nothing of its VM, which may be gone.
    async fn end_waiting(&self, id: TaskId, outcome: &Outcome) -> Result<(), Fault> {
        let end = |task: &mut TaskRow| {
            if !task.state.ended() {
                conclude(task, outcome);
            }
        };
        let task = self.edit_alone(id, end).await?;
        Self::tell_end(&task);
        Ok(())
    }

    /// Admits the request if nothing is in its way any more.
    async fn go_on(&self, id: TaskId, vm: VmId) -> Result<Place, Fault> {
        let first = self.lines.of(vm).first().copied().filter(|first| *first != id);
        patiently!(id, {
            let (mut task, mut vm) = self.both(id).await?;
            let asked = match &task.row.work {
                Work::Wait { asked } if !task.row.state.ended() => asked.asked(),
                _ => return Ok(Place::Over),
            };
            if task.row.cancel {
                return Ok(Place::Cancelled);
            }
            match decide_admission(vm.row.state, vm.row.activity, asked.request()) {
                Admission::Wait(holder) => return Ok(Place::After(holder)),
                Admission::Deny(refusal) => return Err(refusal.into()),
                Admission::Accept | Admission::Ignore => {}
            }
            if let Some(first) = first {
                return Ok(Place::Behind(first));
            }
            let ask = Ask {
                team: task.row.team.clone(),
                vm: task.row.subject.clone(),
                principal: task.row.principal.clone(),
                reason: task.row.reason.clone(),
                revision: None,
                schedule: task.row.schedule,
            };
            let before = vm.row.clone();
            let (work, batch) = self.work(&mut vm.row, id, &ask, &asked, false, self.clock.now()).await?;
            let turn = match &work {
                Work::Migrate(work) => match self.take_turn_of_move((id, task.row.created), vm.row.id, work) {
                    Ok(turn) => Some(turn),
                    Err(full) => return Ok(Place::Full(full)),
                },
                _ => None,
            };
            task.row.work = work;
            task.row.step = "accepted".into();
            describe(&mut task.row);
            vm.row.activity = Some(Activity { task: id, request: asked.request() });
            let batch = reclaim(batch, &before.claims(), &vm.row);
            let batch = history::note(&self.db, batch, &before, &vm.row, Some(&task.row)).await?;
            self.db.commit(batch.update(&vm).update(&task)).await?;
            turn.into_iter().for_each(Turn::record);
            Ok(Place::Over)
        })
    }
}
