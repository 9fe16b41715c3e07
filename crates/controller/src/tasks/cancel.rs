//! Cancelling: until its point of no return a task can be ended by request; behind it the request is refused, and says so.

use std::time::Duration;

use godwit_api::v1::TaskState;
use godwit_link::v1::{self, command::Action};
use godwit_model::{ErrorCode, Generation, Name, Refusal, Retry, TaskId, VmId};

use super::power::already;
use super::{Tasks, note};
use crate::clock;
use crate::db::{Batch, Fault, Stored, retry};
use crate::hub::Answer;
use crate::rows::{MigrateWork, RollbackStage, SnapshotRow, Stage, SuspendStage, TaskRow, Work};

/// How long the user waits for the source's answer to a cancel.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long after it was asked a host is asked again to end what begins.
const AGAIN: Duration = Duration::from_secs(1);

/// Whether cancelling would still have an effect, as far as it is known here.
pub(crate) fn cancellable(task: &TaskRow) -> bool {
    let possible = match &task.work {
        Work::Wait { .. } | Work::Stop { .. } | Work::Import { .. } | Work::Snapshot { .. } | Work::Verify { .. } => true,
        Work::SnapshotExport { .. } | Work::SnapshotImport { .. } => true,
        Work::Rollback(work) => work.stage != RollbackStage::End,
        Work::Start { from, .. } => from.is_some(),
        Work::Suspend(work) => matches!(work.stage, SuspendStage::Pause | SuspendStage::Keep),
        Work::Migrate(work) => work.source_ended.is_none() && work.stage != Stage::Settle,
        _ => false,
    };
    possible && !task.state.ended()
}

impl Tasks {
    /// Asks a task to end; answers it as it is then.
    pub(crate) async fn cancel(&self, id: TaskId, principal: &str) -> Result<Stored<TaskRow>, Fault> {
        let flagged = retry!({
            let mut task = self.task(id).await?;
            if task.row.state == TaskState::Cancelled || (task.row.cancel && !task.row.state.ended()) {
                return Ok(task.row);
            }
            if !cancellable(&task.row) {
                let what = if task.row.state.ended() { "has ended" } else { "is past the point where it can be cancelled" };
                return Err(Refusal::new(ErrorCode::TooLate, format!("the task {what}"))
                    .hint(format!("`godwit task show {id}` says how it stands"))
                    .into());
            }
            task.row.cancel = true;
            note(&mut task.row, format!("{principal} asks to cancel"));
            self.db.commit(Batch::default().update(&task)).await?;
            Ok(task.row)
        })?;
        self.wake(id);
        let taken = match &flagged.work {
            Work::Snapshot { name, .. } => Some(name),
            Work::Rollback(work) if work.stage == RollbackStage::KeepPresent => work.present.as_ref(),
            Work::Suspend(work) if work.stage == SuspendStage::Keep => Some(&work.name),
            _ => None,
        };
        if let Some(snapshot) = taken.filter(|_| !flagged.state.ended()) {
            self.cancel_snapshot(&flagged, snapshot).await?;
        }
        if let Work::Migrate(work) = &flagged.work
            && work.stage == Stage::Moving
            && !flagged.state.ended()
        {
            self.cancel_at_source(&flagged, work).await?;
        }
        self.task(id).await
    }

    /// Asks the host that takes a snapshot, and passes its refusal on: then it is too late, and the task goes on.
    async fn cancel_snapshot(&self, task: &TaskRow, name: &Name) -> Result<(), Fault> {
        let Some(snapshot) = self.db.find::<SnapshotRow>(&format!("{}/{name}", task.team)).await? else { return Ok(()) };
        match self.ask_to_cancel(task, "snapshot", &snapshot.row.host).await {
            Some(Err(refusal)) if refusal.code != ErrorCode::NotFound && !self.task(task.id).await?.row.state.ended() => {
                retry!({
                    let mut task = self.task(task.id).await?;
                    task.row.cancel = false;
                    note(&mut task.row, format!("not cancelled: {refusal}"));
                    self.db.commit(Batch::default().update(&task)).await
                })?;
                Err(refusal.retry(Retry::Never).into())
            }
            _ => Ok(()),
        }
    }

    /// Lets a VM begin from a snapshot, and ends it if that is cancelled before its disks have come. The host is waited for either way: only it knows whether there is a QEMU.
    /// None: it was cancelled, and there is none.
    pub(super) async fn begin_from(
        &self,
        id: TaskId,
        host: &Name,
        start: v1::StartVm,
        (vm, generation): (VmId, Generation),
    ) -> Result<Option<Result<Answer, Refusal>>, Fault> {
        let kill = v1::KillVm { vm: vm.to_string(), generation: generation.0, ..Default::default() };
        let answer = tokio::select! {
            answer = self.command(id, host, "begin", Action::Start(start)) => answer?,
            fault = self.end_once_cancelled(id, host, &kill) => return Err(fault),
        };
        if !self.task(id).await?.row.cancel {
            return Ok(Some(answer));
        }
        // It may have begun wholly in the same moment. Where it cannot be ended, what the host has said of it holds.
        match self.command(id, host, "end what has begun", Action::Kill(kill)).await? {
            Err(refusal) if !already(&refusal) => Ok(Some(answer)),
            _ => Ok(None),
        }
    }

    /// Once the task is cancelled, ends what has begun as often as it takes: the host may not have come to begin it yet.
    async fn end_once_cancelled(&self, id: TaskId, host: &Name, kill: &v1::KillVm) -> Fault {
        let waker = self.waker(id);
        loop {
            match self.task(id).await {
                Err(fault) => return fault,
                Ok(task) if !task.row.cancel => waker.notified().await,
                Ok(_) => {
                    let tag = format!("end what begins, asked at {}", clock::now().0);
                    self.one_command(id, host, &tag, Action::Kill(kill.clone()), PATIENCE).await;
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
    }

    /// An answer, if one comes while somebody waits for it.
    async fn ask_to_cancel(&self, task: &TaskRow, what: &str, host: &Name) -> Option<Result<Answer, Refusal>> {
        // An id of its own for each request: a refusal of before is not the answer of now.
        let tag = format!("cancel {what} asked at {}", clock::now().0);
        let action = Action::Cancel(v1::CancelMigration { vm: task.vm.map(|vm| vm.to_string()).unwrap_or_default() });
        self.one_command(task.id, host, &tag, action, PATIENCE).await
    }

    /// Asks the source and passes its refusal on. Without an answer the executor goes on asking.
    async fn cancel_at_source(&self, task: &TaskRow, work: &MigrateWork) -> Result<(), Fault> {
        let id = task.id;
        match self.ask_to_cancel(task, &work.attempt.to_string(), &work.source).await {
            Some(Err(refusal)) => {
                // Ended meanwhile, perhaps by the executor, which asks as well: then its end is the answer.
                if refusal.code == ErrorCode::NotFound || self.task(id).await?.row.state == TaskState::Cancelled {
                    return Ok(());
                }
                Err(refusal.retry(Retry::Never).into())
            }
            _ => Ok(()),
        }
    }
}
