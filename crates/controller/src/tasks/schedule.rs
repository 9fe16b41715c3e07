//! Snapshots that are taken by themselves. An instant is handled in the transaction in which its errands come to be due, and an errand sets out in the one
//! in which its task does: whenever the controller ends, nothing is done twice, and nothing is forgotten.
//!
//! ```text
//!   instant ──▶ one errand for each VM: due ──its turn, nothing in the way──▶ taking ──its task has ended──▶ idle, and what is not kept goes
//!                                        │does not run, or too late
//!                                        └──────────▶ idle, with the reason
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use godwit_api::v1::{ScheduledResult, SnapshotCreate, TaskState};
use godwit_model::schedule::{AT_ONCE, Due};
use godwit_model::{ErrorCode, Name, Refusal, Retry, ScheduleId, TaskId, UnixMillis};

use super::{Ask, Asked, Tasks, host_down};
use crate::clock;
use crate::db::{Batch, Fault, Stored, retry};
use crate::rows::{Errand, ErrandEnd, ErrandRow, RunRow, ScheduleRow, TaskRow, VmRow, Work};
use crate::schedules::{principal, timetable};
use crate::store::StoreError;

/// How often it is looked, at least: clocks are put right, and computers sleep.
const LOOK: u64 = 30_000;
/// Further ahead than clocks are set back for good reasons.
const AHEAD: u64 = 60 * 60_000;
/// How often it is looked whether what is in the way of an errand still is.
const AGAIN: u64 = 5_000;

/// What opens a run.
pub(crate) struct Opening {
    pub(crate) due: UnixMillis,
    /// Who asked for it, and why; it runs by itself otherwise.
    pub(crate) by: Option<(String, Option<String>)>,
}

impl ErrandRow {
    fn end(&mut self, result: ScheduledResult, due: UnixMillis, now: UnixMillis, snapshot: Option<Name>, error: Option<Refusal>) {
        self.last = Some(ErrandEnd { due, ended: now, result, snapshot, error });
    }
}

impl Tasks {
    /// Runs schedules from now on.
    pub(super) fn begin_schedules(self: &Arc<Self>) {
        let tasks = self.clone();
        self.tracker.spawn(async move {
            let stop = tasks.stop.clone();
            tokio::select! {
                () = stop.cancelled() => {}
                () = tasks.follow_schedules() => {}
            }
        });
    }

    /// What schedules take the time for.
    pub(crate) fn now(&self) -> UnixMillis {
        self.clock.now()
    }

    /// Something has changed that schedules may have waited for.
    pub(crate) fn look_at_schedules(&self) {
        self.scheduled.notify_one();
    }

    async fn follow_schedules(self: &Arc<Self>) {
        let mut first = true;
        loop {
            let now = self.clock.now();
            let next = match self.run_schedules(now, first).await {
                Ok(next) => {
                    first = false;
                    next.0.saturating_sub(now.0).clamp(1, LOOK)
                }
                Err(Fault::Deposed | Fault::Store(StoreError::Closed)) => return,
                Err(fault) => {
                    tracing::warn!(error = &fault as &dyn std::error::Error, "schedules are looked at again in a moment");
                    AGAIN
                }
            };
            tokio::select! {
                () = self.scheduled.notified() => {}
                () = tokio::time::sleep(Duration::from_millis(next)) => {}
            }
        }
    }

    /// Does what there is to do now; when there may be more. At the `first` look of a controller, errands of before may be too late.
    async fn run_schedules(self: &Arc<Self>, now: UnixMillis, first: bool) -> Result<UnixMillis, Fault> {
        let mut next = UnixMillis(now.0.saturating_add(LOOK));
        let mut known = BTreeMap::new();
        for schedule in self.db.all::<ScheduleRow>().await? {
            match self.run_if_due(&schedule.row, now).await {
                Ok(later) => next = next.min(later.unwrap_or(next)),
                Err(Fault::Refused(refusal)) if first => {
                    tracing::warn!(schedule = %schedule.row.name, %refusal, "a schedule does not run");
                }
                Err(Fault::Refused(_)) => {}
                Err(fault) => return Err(fault),
            }
            known.insert(schedule.row.id, schedule.row);
        }
        let busy = self.close_errands(now).await?;
        if self.send_errands(&known, now, first, busy).await? {
            next = next.min(UnixMillis(now.0.saturating_add(AGAIN)));
        }
        Ok(self.sweep_all(&known, now).await?.map_or(next, |sweep| next.min(sweep)))
    }

    /// Opens the run of an instant that has come; the next instant.
    async fn run_if_due(&self, schedule: &ScheduleRow, now: UnixMillis) -> Result<Option<UnixMillis>, Fault> {
        if !schedule.spec.enabled {
            return Ok(None);
        }
        if schedule.handled.0 > now.0.saturating_add(AHEAD) {
            self.put_back(schedule, now).await?;
            self.look_at_schedules();
            return Ok(None);
        }
        let table = timetable(&schedule.spec)?;
        let handled = match table.decide_due(schedule.handled, now, schedule.spec.catch_up) {
            Due::Later(next) => return Ok(next),
            Due::Run(due) => {
                if !self.open_run(schedule, Opening { due, by: None }).await? {
                    self.look_at_schedules();
                }
                due
            }
            Due::Missed(due) => {
                self.note_missed(schedule, due).await?;
                due
            }
        };
        Ok(table.next(handled))
    }

    /// What a clock that was ahead has written is not what it waits for.
    async fn put_back(&self, schedule: &ScheduleRow, now: UnixMillis) -> Result<(), Fault> {
        retry!({
            let key = format!("{}/{}", schedule.team, schedule.name);
            let Some(mut found) = self.db.find::<ScheduleRow>(&key).await?.filter(|found| found.row == *schedule) else {
                return Ok(());
            };
            found.row.handled = now;
            self.db.commit(Batch::default().update(&found)).await
        })?;
        let (name, handled) = (&schedule.name, clock::readable(schedule.handled));
        tracing::warn!(schedule = %name, team = %schedule.team, handled, "a clock was ahead: the schedule goes on from now");
        Ok(())
    }

    async fn note_missed(&self, schedule: &ScheduleRow, due: UnixMillis) -> Result<(), Fault> {
        retry!({
            let key = format!("{}/{}", schedule.team, schedule.name);
            let Some(mut found) = self.db.find::<ScheduleRow>(&key).await?.filter(|found| found.row == *schedule) else {
                return Ok(());
            };
            (found.row.handled, found.row.missed) = (due, Some(due));
            self.db.commit(Batch::default().update(&found)).await
        })?;
        let (name, due) = (&schedule.name, clock::readable(due));
        tracing::warn!(schedule = %name, team = %schedule.team, due, "a run was missed, and it is too late to make it up");
        Ok(())
    }

    /// VMs that a schedule is for.
    pub(crate) async fn chosen_by(&self, schedule: &ScheduleRow) -> Result<Vec<VmRow>, Fault> {
        let chosen = |vm: &VmRow| vm.team == schedule.team && schedule.spec.is_of(&vm.name, &vm.spec.labels);
        Ok(self.db.all::<VmRow>().await?.into_iter().map(|vm| vm.row).filter(chosen).collect())
    }

    /// What a schedule has to do.
    pub(crate) async fn errands_of(&self, schedule: ScheduleId) -> Result<Vec<Stored<ErrandRow>>, Fault> {
        self.db.page::<ErrandRow>(&format!("{schedule}/"), None, usize::MAX).await
    }

    /// Makes an errand due for each VM of the schedule, unless somebody has changed it meanwhile; whether it did.
    pub(crate) async fn open_run(&self, schedule: &ScheduleRow, opening: Opening) -> Result<bool, Fault> {
        let now = self.clock.now();
        let from = if opening.by.is_some() { now } else { opening.due };
        let until = UnixMillis(from.0.saturating_add(schedule.spec.catch_up.0));
        let reason = match &opening.by {
            None => format!("due at {}", clock::readable(opening.due)),
            Some((_, Some(reason))) => reason.clone(),
            Some((principal, None)) => format!("{principal} had the schedule run"),
        };
        let count = retry!({
            let key = format!("{}/{}", schedule.team, schedule.name);
            let Some(mut found) = self.db.find::<ScheduleRow>(&key).await?.filter(|found| found.row.id == schedule.id) else {
                return Ok(None);
            };
            if opening.by.is_none() {
                if found.row != *schedule {
                    return Ok(None);
                }
                found.row.handled = opening.due;
            }
            let by = opening.by.as_ref().map(|(principal, _)| principal.clone());
            found.row.last = Some(RunRow { due: opening.due, began: now, principal: by });
            let mut errands: BTreeMap<_, _> =
                self.errands_of(schedule.id).await?.into_iter().map(|errand| (errand.row.vm, errand)).collect();
            let vms = self.chosen_by(&found.row).await?;
            let mut batch = Batch::default().update(&found);
            for vm in &vms {
                let due_since = |since| Errand::Due { due: opening.due, since, until, reason: reason.clone(), obstacle: None };
                let state = due_since(None);
                let Some(mut errand) = errands.remove(&vm.id) else {
                    let (vm_name, schedule) = (vm.name.clone(), schedule.id);
                    let new =
                        ErrandRow { schedule, vm: vm.id, vm_name, state, last: None, sweep: None, deleting: None, stuck: None };
                    batch = batch.create(&new);
                    continue;
                };
                match errand.row.state.clone() {
                    Errand::Taking { due, task, .. } => {
                        let message =
                            format!("task {task} still takes its snapshot of the run that was due at {}", clock::readable(due));
                        let hint = format!("let the schedule run less often, or see what it waits for: `godwit task show {task}`");
                        let refusal = Refusal::new(ErrorCode::VmBusy, message).hint(hint).retry(Retry::Safe);
                        errand.row.end(ScheduledResult::Skipped, opening.due, now, None, Some(refusal));
                    }
                    Errand::Due { due, since, obstacle, .. } => {
                        errand.row.end(ScheduledResult::Skipped, due, now, None, Some(obstacle.unwrap_or_else(overtaken)));
                        errand.row.state = due_since(since.or(Some(due)));
                    }
                    Errand::Idle => errand.row.state = state,
                }
                batch = batch.update(&errand);
            }
            // What is left is of VMs that it is not for any more.
            for errand in errands.values().filter(|errand| errand.row.state == Errand::Idle && errand.row.deleting.is_none()) {
                batch = batch.delete(errand);
            }
            self.db.commit(batch).await?;
            Ok(Some(vms.len()))
        })?;
        if let Some(vms) = count {
            tracing::info!(schedule = %schedule.name, team = %schedule.team, due = clock::readable(opening.due), vms, "a schedule runs");
        }
        Ok(count.is_some())
    }

    /// The errand that a snapshot is asked for on sets out with its task.
    pub(super) async fn set_out(&self, batch: Batch, ask: &Ask, vm: &VmRow, task: TaskId) -> Result<Batch, Fault> {
        let Some(schedule) = ask.schedule else { return Ok(batch) };
        let errand = self.db.find::<ErrandRow>(&format!("{schedule}/{}", vm.id)).await?;
        if let Some(mut errand) = errand
            && let Errand::Due { due, .. } = errand.row.state
        {
            errand.row.state = Errand::Taking { due, task, host: vm.host.clone() };
            return Ok(batch.update(&errand));
        }
        Err(Refusal::new(ErrorCode::Cancelled, "its schedule does not want it any more").into())
    }

    /// Writes down what tasks have come to; how many are at it on each host.
    async fn close_errands(&self, now: UnixMillis) -> Result<BTreeMap<Name, usize>, Fault> {
        let mut busy = BTreeMap::new();
        for mut errand in self.db.all::<ErrandRow>().await? {
            let Errand::Taking { due, task, host } = errand.row.state.clone() else { continue };
            let task = self.db.find::<TaskRow>(&task.to_string()).await?.map(|task| task.row);
            let (result, snapshot, error) = match task {
                Some(task) if !task.state.ended() => {
                    // What waits for a move may do so for long, and does not keep the others.
                    if let Some(host) = host.filter(|_| !matches!(task.work, Work::Wait { .. })) {
                        *busy.entry(host).or_insert(0) += 1;
                    }
                    continue;
                }
                Some(TaskRow { state: TaskState::Done, work: Work::Snapshot { name, .. }, .. }) => {
                    errand.row.sweep = Some(now);
                    (ScheduledResult::Taken, Some(name), None)
                }
                Some(task) => (ScheduledResult::Failed, None, task.error),
                None => {
                    let lost = Refusal::new(ErrorCode::Internal, "what became of its task is not known any more");
                    (ScheduledResult::Failed, None, Some(lost.hint("`godwit snapshot list` shows what there is")))
                }
            };
            if let Some(refusal) = &error {
                tracing::warn!(vm = %errand.row.vm_name, %refusal, "a scheduled snapshot was not taken");
            }
            errand.row.end(result, due, now, snapshot, error);
            errand.row.state = Errand::Idle;
            self.put(&errand).await?;
        }
        Ok(busy)
    }

    /// Writes an errand, unless it has changed meanwhile: then it is looked at again.
    pub(super) async fn put(&self, errand: &Stored<ErrandRow>) -> Result<(), Fault> {
        self.commit_or_look(Batch::default().update(errand)).await
    }

    pub(super) async fn commit_or_look(&self, batch: Batch) -> Result<(), Fault> {
        match self.db.commit(batch).await {
            Err(fault) if fault.is_conflict() => {
                self.look_at_schedules();
                Ok(())
            }
            result => result,
        }
    }

    /// Begins errands whose turn it is; whether some are left.
    async fn send_errands(
        self: &Arc<Self>,
        known: &BTreeMap<ScheduleId, ScheduleRow>,
        now: UnixMillis,
        first: bool,
        mut busy: BTreeMap<Name, usize>,
    ) -> Result<bool, Fault> {
        let due = |errand: &ErrandRow| if let Errand::Due { due, since, .. } = errand.state { since.or(Some(due)) } else { None };
        let mut errands: Vec<_> =
            self.db.all::<ErrandRow>().await?.into_iter().filter(|errand| due(&errand.row).is_some()).collect();
        errands.sort_by(|a, b| (due(&a.row), &a.row.vm_name, a.row.schedule).cmp(&(due(&b.row), &b.row.vm_name, b.row.schedule)));
        let mut left = false;
        for errand in errands {
            match known.get(&errand.row.schedule) {
                Some(schedule) => left |= self.send(schedule, errand, now, first, &mut busy).await?,
                // Of a schedule that was made a moment ago.
                None => left = true,
            }
        }
        Ok(left)
    }

    /// Begins one if it can be; whether it is still due.
    async fn send(
        self: &Arc<Self>,
        schedule: &ScheduleRow,
        mut errand: Stored<ErrandRow>,
        now: UnixMillis,
        first: bool,
        busy: &mut BTreeMap<Name, usize>,
    ) -> Result<bool, Fault> {
        let Errand::Due { due, since, until, reason, obstacle } = errand.row.state.clone() else { return Ok(false) };
        let Some(vm) = self.db.find::<VmRow>(&errand.row.vm.to_string()).await?.map(|vm| vm.row) else {
            self.commit_or_look(Batch::default().delete(&errand)).await?;
            return Ok(false);
        };
        if !schedule.spec.is_of(&vm.name, &vm.spec.labels) {
            errand.row.state = Errand::Idle;
            self.put(&errand).await?;
            return Ok(false);
        }
        let host = vm.host.clone().filter(|_| vm.has_process());
        let away = host.as_ref().filter(|host| self.hub.presence(host).is_none()).map(host_down);
        let too_late = (first && now > until).then(|| {
            Refusal::new(ErrorCode::HostDown, "it was too late when the controller was back")
                .hint("give the schedule a longer catch_up")
        });
        let refused = match (too_late, away) {
            (Some(refusal), _) | (None, Some(refusal)) => refusal,
            (None, None) => {
                let turn = host.as_ref().map(|host| busy.entry(host.clone()).or_insert(0));
                if turn.as_ref().is_some_and(|turn| **turn >= AT_ONCE) {
                    return Ok(true);
                }
                match self.ask_for(schedule, &vm, reason.clone()).await {
                    Ok(()) => {
                        if let Some(turn) = turn {
                            *turn += 1;
                        }
                        return Ok(false);
                    }
                    Err(Fault::Refused(refusal)) => refusal,
                    Err(fault) => return Err(fault),
                }
            }
        };
        let waits = matches!(refused.code, ErrorCode::HostDown | ErrorCode::VmBusy) || refused.retry == Retry::Safe;
        if waits && now <= until {
            if obstacle.as_ref() != Some(&refused) {
                errand.row.state = Errand::Due { due, since, until, reason, obstacle: Some(refused) };
                self.put(&errand).await?;
            }
            return Ok(true);
        }
        let skipped = waits || refused.code == ErrorCode::VmNotRunning;
        let result = if skipped { ScheduledResult::Skipped } else { ScheduledResult::Failed };
        let (name, vm) = (&schedule.name, &vm.name);
        if skipped {
            tracing::info!(schedule = %name, %vm, refusal = %refused, "a VM is skipped by a schedule");
        } else {
            tracing::warn!(schedule = %name, %vm, refusal = %refused, "a scheduled snapshot is not taken");
        }
        errand.row.end(result, due, now, None, Some(refused));
        errand.row.state = Errand::Idle;
        self.put(&errand).await?;
        Ok(false)
    }

    async fn ask_for(self: &Arc<Self>, schedule: &ScheduleRow, vm: &VmRow, reason: String) -> Result<(), Fault> {
        let spec = &schedule.spec;
        let ask = Ask {
            team: vm.team.clone(),
            vm: vm.name.clone(),
            principal: principal(&schedule.name),
            reason: Some(reason),
            revision: None,
            schedule: Some(schedule.id),
        };
        let request = SnapshotCreate {
            vm: vm.name.clone(),
            name: None,
            memory: spec.memory,
            quiesce: spec.quiesce,
            pool: spec.pool.clone(),
            golden: false,
            reason: ask.reason.clone(),
        };
        self.ask(&ask, &Asked::Snapshot(request)).await.map(|_| ())
    }
}

/// Why what was due was not even begun when the next was.
fn overtaken() -> Refusal {
    Refusal::new(ErrorCode::VmBusy, "the next run was due before its turn had come")
        .hint(format!("of each host {AT_ONCE} scheduled snapshots are taken at a time: let the schedule run less often"))
}
