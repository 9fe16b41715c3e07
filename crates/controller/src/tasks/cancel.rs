//! Cancelling: until its point of no return a task can be ended by request; behind it the request is refused, and says so.

use std::time::Duration;

use godwit_api::v1::TaskState;
use godwit_link::v1::{self, command::Action};
use godwit_model::{ErrorCode, Refusal, Retry, TaskId};

use super::{Tasks, command_id, note};
use crate::clock;
use crate::db::{Batch, Fault, Stored, retry};
use crate::rows::{MigrateWork, Stage, TaskRow, Work};

/// How long the user waits for the source's answer to a cancel.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether cancelling would still have an effect, as far as it is known here.
pub(crate) fn cancellable(task: &TaskRow) -> bool {
    let possible = match &task.work {
        Work::Stop { .. } | Work::Import { .. } => true,
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
        if let Work::Migrate(work) = &flagged.work
            && work.stage == Stage::Moving
            && !flagged.state.ended()
        {
            self.cancel_at_source(&flagged, work).await?;
        }
        self.task(id).await
    }

    /// Asks the source and passes its refusal on. Without an answer the executor goes on asking.
    async fn cancel_at_source(&self, task: &TaskRow, work: &MigrateWork) -> Result<(), Fault> {
        let id = task.id;
        // An id of its own for each request: a refusal of before is not the answer of now.
        let tag = format!("cancel {} asked at {}", work.attempt, clock::now().0);
        let command = v1::Command {
            id: command_id(id, &tag),
            epoch: self.db.epoch().0,
            task: id.to_string(),
            action: Some(Action::Cancel(v1::CancelMigration { vm: task.vm.map(|vm| vm.to_string()).unwrap_or_default() })),
        };
        let Some(answer) = self.hub.command(&work.source, command) else { return Ok(()) };
        match tokio::time::timeout(PATIENCE, answer).await {
            Ok(Ok(Err(refusal))) => {
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
