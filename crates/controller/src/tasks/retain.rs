//! What a schedule does not keep goes: after each good snapshot of a VM, one at a time, each by a task of its own. What is in use, or out of reach, is tried
//! again later.

use std::collections::BTreeMap;
use std::sync::Arc;

use godwit_api::v1::TaskState;
use godwit_model::{Name, ScheduleId, SnapshotId, TaskId, UnixMillis};

use super::{Outcome, Tasks, conclude, note};
use crate::clock;
use crate::db::{Batch, Fault, Stored};
use crate::restore;
use crate::rows::{ErrandRow, ScheduleRow, SnapshotRow, TaskRow, VmRow, Work};
use crate::schedules::{expired, principal, taken_by};

/// Deletions that are under way at a time.
const AT_ONCE: usize = 2;
/// After how long what could not be deleted is tried again.
const AGAIN: u64 = 10 * 60_000;

impl Tasks {
    /// Begins deletions that are due; when there may be more.
    pub(super) async fn sweep_all(
        self: &Arc<Self>,
        known: &BTreeMap<ScheduleId, ScheduleRow>,
        now: UnixMillis,
    ) -> Result<Option<UnixMillis>, Fault> {
        let mut under_way = 0;
        let mut swept = Vec::new();
        for mut errand in self.db.all::<ErrandRow>().await? {
            if let Some(task) = errand.row.deleting {
                let Some(ended) = self.deleted(task).await? else {
                    under_way += 1;
                    continue;
                };
                errand.row.deleting = None;
                (errand.row.stuck, errand.row.sweep) = match ended {
                    Ok(()) => (None, Some(now)),
                    Err(snapshot) => (snapshot, Some(later(now))),
                };
                self.put(&errand).await?;
                // It is read again, with its new revision.
                self.look_at_schedules();
                continue;
            }
            swept.push(errand);
        }
        // Who has waited longest comes first: one pool that is out of reach does not keep the others.
        swept.sort_by_key(|errand| errand.row.sweep);
        let mut next: Option<UnixMillis> = None;
        for errand in swept {
            let Some(sweep) = errand.row.sweep else { continue };
            let Some(schedule) = known.get(&errand.row.schedule) else { continue };
            // What is further ahead was written by a clock that was wrong.
            if sweep > now && sweep <= later(now) {
                next = Some(next.map_or(sweep, |next| next.min(sweep)));
            } else if under_way < AT_ONCE && self.sweep(schedule, errand, now).await? {
                under_way += 1;
            }
        }
        Ok(next)
    }

    /// How a deletion ended, if it has: what could not be deleted.
    async fn deleted(&self, task: TaskId) -> Result<Option<Result<(), Option<SnapshotId>>>, Fault> {
        let task = self.db.find::<TaskRow>(&task.to_string()).await?.map(|task| task.row);
        Ok(match task {
            None => Some(Ok(())),
            Some(task) if !task.state.ended() => None,
            Some(task) if task.state == TaskState::Done => Some(Ok(())),
            Some(TaskRow { work: Work::SnapshotDelete { snapshot, .. }, .. }) => Some(Err(Some(snapshot))),
            Some(_) => Some(Err(None)),
        })
    }

    /// Begins to delete the oldest snapshot that goes; whether there was one.
    async fn sweep(
        self: &Arc<Self>,
        schedule: &ScheduleRow,
        mut errand: Stored<ErrandRow>,
        now: UnixMillis,
    ) -> Result<bool, Fault> {
        if self.db.find::<VmRow>(&errand.row.vm.to_string()).await?.is_none() {
            // What is left of a VM that was deleted is not the schedule's to delete.
            self.commit_or_look(Batch::default().delete(&errand)).await?;
            return Ok(false);
        }
        let all = self.snapshots_of(&schedule.team).await?;
        let mut own = taken_by(schedule.id, errand.row.vm, &all);
        // What was taken by a clock that was ahead neither goes, nor makes others go.
        own.retain(|row| row.created <= now);
        let mut goes = match expired(&schedule.spec, &own, None) {
            Ok(goes) => goes,
            Err(refusal) => {
                tracing::warn!(schedule = %schedule.name, %refusal, "what it keeps is not known: nothing is deleted");
                Vec::new()
            }
        };
        // What was in the way last time does not keep the others.
        goes.sort_by_key(|row| (errand.row.stuck == Some(row.id), row.created));
        if goes.is_empty() {
            (errand.row.sweep, errand.row.stuck) = (None, None);
            self.put(&errand).await?;
            return Ok(false);
        }
        for row in goes {
            match self.can_go(row).await {
                Ok(()) => return self.begin_delete(schedule, errand, row, now).await,
                Err(Fault::Refused(refusal)) => {
                    tracing::info!(schedule = %schedule.name, snapshot = %row.name, %refusal, "it is not kept, and goes later");
                }
                Err(fault) => return Err(fault),
            }
        }
        errand.row.sweep = Some(later(now));
        self.put(&errand).await?;
        Ok(false)
    }

    async fn can_go(&self, row: &SnapshotRow) -> Result<(), Fault> {
        restore::all_heard(&self.db).await?;
        self.may_go(row, None).await?;
        Ok(self.reach(&row.identity, &row.pool, Some(&row.host)).map(|_| ())?)
    }

    async fn begin_delete(
        self: &Arc<Self>,
        schedule: &ScheduleRow,
        mut errand: Stored<ErrandRow>,
        row: &SnapshotRow,
        now: UnixMillis,
    ) -> Result<bool, Fault> {
        let id = TaskId::new(clock::fresh());
        let work = Work::SnapshotDelete { snapshot: row.id, name: row.name.clone() };
        let mut task = TaskRow {
            schedule: Some(schedule.id),
            reason: Some("its schedule does not keep it".to_owned()),
            ..TaskRow::new(id, row.team.clone(), row.name.clone(), principal(&schedule.name), work, now)
        };
        let rules: Vec<String> = schedule.spec.keep.said().map(|(rule, count)| format!("{rule} {count}")).collect();
        note(&mut task, format!("of {}, taken at {}; kept are: {}", row.vm_name, clock::readable(row.created), rules.join(", ")));
        errand.row.deleting = Some(id);
        // With the schedule as it is: nothing goes by rules that were changed meanwhile.
        let key = format!("{}/{}", schedule.team, schedule.name);
        let Some(unchanged) = self.db.find::<ScheduleRow>(&key).await?.filter(|found| found.row.spec == schedule.spec) else {
            self.look_at_schedules();
            return Ok(false);
        };
        match self.db.commit(Batch::default().unchanged(&unchanged).create(&task).update(&errand)).await {
            Err(fault) if fault.is_conflict() => {
                self.look_at_schedules();
                return Ok(false);
            }
            result => result?,
        }
        tracing::info!(task = %id, kind = task.work.kind(), subject = %task.subject, principal = task.principal, "accepted");
        self.spawn(id);
        Ok(true)
    }

    pub(super) async fn run_snapshot_delete(&self, id: TaskId, name: &Name) -> Result<(), Fault> {
        let task = self.task(id).await?.row;
        let Work::SnapshotDelete { snapshot, .. } = task.work else { return Ok(()) };
        let there = match self.snapshot(&task.team, name).await {
            Ok(found) => found.row.id == snapshot,
            Err(Fault::Refused(_)) => false,
            Err(fault) => return Err(fault),
        };
        let outcome = if there {
            match self.delete_snapshot(&task.team, name, Some(id)).await {
                Ok(()) => Outcome::Done,
                Err(Fault::Refused(refusal)) => Outcome::Failed(refusal),
                Err(fault) => return Err(fault),
            }
        } else {
            // Somebody else was first, or this controller before it was restarted.
            Outcome::Done
        };
        let task = self
            .edit_alone(id, |task| {
                if !task.state.ended() {
                    conclude(task, &outcome);
                }
            })
            .await?;
        Self::tell_end(&task);
        Ok(())
    }
}

const fn later(now: UnixMillis) -> UnixMillis {
    UnixMillis(now.0.saturating_add(AGAIN))
}
