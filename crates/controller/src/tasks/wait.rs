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
use godwit_model::{Activity, Admission, ErrorCode, Name, Refusal, TaskId, UnixMillis, VmId};

use super::admit::{describe, new_task, waits_already};
use super::change::reclaim;
use super::turns::Turn;
use super::{Ask, Asked, Outcome, Tasks, conclude, note, patiently};
use crate::clock;
use crate::db::{Batch, Fault, Stored};
use crate::history;
use crate::principals::not_found;
use crate::rows::{Later, TaskRow, VmRow, Work};

/// Tasks that can wait for one VM.
const LINE: usize = 16;

/// Who waits for which VM, in the order of the requests; and of each VM the one move that waits, for whatever that is. Made anew from the tasks at every start.
#[derive(Default)]
pub(super) struct Lines {
    lines: Mutex<HashMap<VmId, BTreeSet<(UnixMillis, TaskId)>>>,
    moves: Mutex<HashMap<VmId, TaskId>>,
}

impl Lines {
    /// Puts a task that waits in its line; others are none of its business.
    pub(super) fn join(&self, task: &TaskRow) {
        if let (Work::Wait { asked }, Some(vm)) = (&task.work, task.vm) {
            self.lines.lock().expect("no holder panics").entry(vm).or_default().insert((task.created, task.id));
            if matches!(asked, Later::Migrate(_)) {
                self.moves.lock().expect("no holder panics").insert(vm, task.id);
            }
        }
    }

    fn leave(&self, vm: VmId, task: TaskId) {
        let mut lines = self.lines.lock().expect("no holder panics");
        if let Some(line) = lines.get_mut(&vm) {
            line.retain(|(_, id)| *id != task);
            if line.is_empty() {
                lines.remove(&vm);
            }
        }
    }

    /// It does not wait any more.
    fn forget(&self, vm: VmId, task: TaskId) {
        self.leave(vm, task);
        let mut moves = self.moves.lock().expect("no holder panics");
        if moves.get(&vm) == Some(&task) {
            moves.remove(&vm);
        }
    }

    /// A task whose executor has ended waits for nothing; for which VM it did, if so.
    pub(super) fn forget_task(&self, task: TaskId) -> Option<VmId> {
        let of = |line: &BTreeSet<(UnixMillis, TaskId)>| line.iter().any(|(_, id)| *id == task);
        let in_line = self.lines.lock().expect("no holder panics").iter().find(|(_, line)| of(line)).map(|(vm, _)| *vm);
        let moves = || self.moves.lock().expect("no holder panics").iter().find(|(_, id)| **id == task).map(|(vm, _)| *vm);
        let vm = in_line.or_else(moves)?;
        self.forget(vm, task);
        Some(vm)
    }

    /// Has a task that is not recorded yet wait, or says which move of its VM waits already.
    fn reserve(&self, vm: VmId, task: &TaskRow) -> Result<(), TaskId> {
        if matches!(task.work, Work::Wait { asked: Later::Migrate(_) }) {
            let mut moves = self.moves.lock().expect("no holder panics");
            let first = *moves.entry(vm).or_insert(task.id);
            if first != task.id {
                return Err(first);
            }
        }
        self.join(task);
        Ok(())
    }

    /// The move of a VM that waits.
    pub(super) fn waiting_move(&self, vm: VmId) -> Option<TaskId> {
        self.moves.lock().expect("no holder panics").get(&vm).copied()
    }

    fn of(&self, vm: VmId) -> Vec<TaskId> {
        let lines = self.lines.lock().expect("no holder panics");
        lines.get(&vm).map(|line| line.iter().map(|(_, id)| *id).collect()).unwrap_or_default()
    }
}

/// The place of a task that is not recorded yet.
struct Reserved<'a> {
    tasks: &'a Tasks,
    vm: VmId,
    task: TaskId,
    recorded: bool,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if !self.recorded {
            self.tasks.lines.forget(self.vm, self.task);
            self.tasks.wake_line(self.vm);
        }
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
    /// A host that it needs is away: one of these.
    Away(Refusal, Vec<Name>),
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
        // A condition is not kept for later.
        if Later::of(asked).is_none() || ask.revision.is_some() {
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
        if let Work::Wait { asked: Later::Migrate(request) } = &task.work {
            let text = format!("to move to {}", request.host);
            note(&mut task, text);
        }
        task.step.clone_from(&step);
        note(&mut task, step);
        self.lines.reserve(vm.row.id, &task).map_err(|other| waits_already(&vm.row.name, other))?;
        let mut reserved = Reserved { tasks: self, vm: vm.row.id, task: task.id, recorded: false };
        let batch = Batch::default().unchanged(vm).create(&task);
        self.db.commit(self.set_out(batch, ask, &vm.row, task.id).await?).await?;
        reserved.recorded = true;
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
        self.lines.forget(vm, id);
        // The next in line is the first now.
        self.wake_line(vm);
        over
    }

    async fn wait_in_line(&self, id: TaskId, vm: VmId) -> Result<(), Fault> {
        let waker = self.waker(id);
        loop {
            let mut hosts_changed = self.hub.watch();
            // Whatever ends while it looks wakes it.
            self.lines.join(&self.task(id).await?.row);
            match self.go_on(id, vm).await {
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
                Ok(Place::Away(refusal, hosts)) => {
                    self.lines.leave(vm, id);
                    self.wake_line(vm);
                    self.say_wait(id, format!("waits: {}", refusal.message)).await?;
                    let back = async {
                        if hosts.iter().all(|host| self.hub.is_connected(host)) {
                            // It is another that is away. The hub lives as long as the executor.
                            let _ = hosts_changed.changed().await;
                        }
                        for host in &hosts {
                            self.hub.connected(host).await;
                        }
                    };
                    tokio::select! {
                        () = waker.notified() => {}
                        () = back => {}
                    }
                    continue;
                }
                Err(Fault::Refused(refusal)) => return self.end_waiting(id, &Outcome::Failed(refusal)).await,
                Err(fault) => return Err(fault),
            }
            waker.notified().await;
        }
    }

    /// Meanwhile no host keeps a turn for it.
    async fn wait_for_other(&self, id: TaskId, step: String) -> Result<(), Fault> {
        self.give_turn_back(id);
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
        patiently!(id, {
            let first = self.lines.of(vm).first().copied().filter(|first| *first != id);
            let mut task = self.task(id).await?;
            let asked = match &task.row.work {
                Work::Wait { asked } if !task.row.state.ended() => asked.asked(),
                _ => return Ok(Place::Over),
            };
            if task.row.cancel {
                return Ok(Place::Cancelled);
            }
            let vm = self.db.find::<VmRow>(&vm.to_string()).await?;
            let mut vm = vm.ok_or_else(|| not_found("vm", &task.row.subject))?;
            let (key, before) = ((id, task.row.created), vm.row.clone());
            match decide_admission(vm.row.state, vm.row.activity, asked.request()) {
                Admission::Wait(holder) => return Ok(Place::After(holder)),
                Admission::Deny(refusal) => {
                    return match vm.row.activity {
                        Some(holder) => Ok(Place::After(holder)),
                        // It may be as it must be when its turn comes.
                        None => self.why_it_waits(key, &before, &asked).map(Place::Full).ok_or_else(|| refusal.into()),
                    };
                }
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
            let (work, batch) = match self.work(&mut vm.row, id, &ask, &asked, false, self.clock.now()).await {
                // It goes away for a moment; or all hosts are, when the controller has just begun.
                Err(Fault::Refused(refusal)) if refusal.code == ErrorCode::HostDown => {
                    let mut hosts: Vec<Name> = before.host.iter().cloned().collect();
                    if let (Asked::Migrate(request), Some(source)) = (&asked, &before.host) {
                        hosts.push(request.host.clone());
                        if hosts.iter().all(|host| self.hub.is_connected(host)) {
                            // It is another that is away: nobody waits behind a move that cannot go.
                            self.give_turn_back(id);
                        } else {
                            self.keep_place(key, source, &request.host);
                        }
                    }
                    return Ok(Place::Away(refusal, hosts));
                }
                work => work?,
            };
            let turn = match &work {
                Work::Migrate(work) => match self.take_turn_of_waiting(key, work) {
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

    /// Why a move has no turn yet, if it is one.
    fn why_it_waits(&self, key: (TaskId, UnixMillis), vm: &VmRow, asked: &Asked) -> Option<String> {
        match (asked, &vm.host) {
            (Asked::Migrate(request), Some(source)) => self.why_no_turn(key, source, &request.host),
            _ => None,
        }
    }
}
