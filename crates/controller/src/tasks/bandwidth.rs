//! What a migration may take of the wire, changed while it runs: recorded, and told to its source by the executor, now or when that is back.

use godwit_link::v1::{self, command::Action};
use godwit_model::{BytesPerSec, ErrorCode, Refusal, TaskId};

use super::{Tasks, note};
use crate::checks::enough_bandwidth;
use crate::clock;
use crate::db::{Batch, Fault, Stored, retry};
use crate::rows::{MigrateWork, Stage, TaskRow, VmRow, Work};

impl Tasks {
    /// Changes it; answers the task as it is then.
    pub(crate) async fn set_bandwidth(
        &self,
        id: TaskId,
        bandwidth: Option<BytesPerSec>,
        principal: &str,
    ) -> Result<Stored<TaskRow>, Fault> {
        enough_bandwidth(bandwidth)?;
        retry!({
            let mut task = self.task(id).await?;
            let ended = task.row.state.ended();
            let Work::Migrate(work) = &mut task.row.work else {
                return Err(Refusal::new(ErrorCode::BadRequest, "the task is no migration")
                    .hint("`godwit task list --running` shows what runs")
                    .into());
            };
            let through = work.source_ended.as_ref().is_some_and(|ended| ended.moved) || work.stage == Stage::Settle;
            if ended || through {
                return Err(Refusal::new(ErrorCode::TooLate, "the migration has sent what it had to send, or is given up")
                    .hint(format!("`godwit task show {id}` says how it stands"))
                    .into());
            }
            work.policy.bandwidth = bandwidth;
            work.changes += 1;
            let allowed = bandwidth.map_or_else(|| "any bandwidth".to_owned(), |bandwidth| bandwidth.to_string());
            note(&mut task.row, format!("{principal} allows {allowed}"));
            self.db.commit(Batch::default().update(&task)).await
        })?;
        self.wake(id);
        self.task(id).await
    }

    /// Tells the source what was changed last. Given up when it goes away, whether it has heard it or not: it is told again when it is back.
    pub(super) async fn tell_bandwidth(&self, id: TaskId, vm: &VmRow, work: &MigrateWork) -> Result<(), Fault> {
        let bandwidth = work.policy.bandwidth.map_or(0, BytesPerSec::get);
        let message = v1::SetBandwidth { vm: vm.id.to_string(), bandwidth };
        let tag = format!("bandwidth {} at {}", work.attempt, clock::now().0);
        let mut connections = self.hub.watch();
        let away = async {
            while self.hub.presence(&work.source).is_some() && connections.changed().await.is_ok() {}
            Ok(())
        };
        let Some(answer) = self.command_until(id, &work.source, &tag, Action::Bandwidth(message), away).await? else {
            return Ok(());
        };
        let told = work.changes;
        self.edit(id, |task, _| {
            if let Err(refusal) = &answer {
                note(task, format!("not changed: {refusal}"));
            }
            if let Work::Migrate(work) = &mut task.work {
                work.changes_told = told;
            }
        })
        .await
        .map(|_| ())
    }
}
