//! What a migration may do, changed while it runs: recorded, and told to its source by the executor, now or when that is back.

use godwit_link::encode;
use godwit_link::v1::{self, command::Action};
use godwit_model::{BytesPerSec, ErrorCode, Ladder, MigrationPolicy, PostCopy, Refusal, Rung, TaskId};

use super::{Tasks, note};
use crate::checks::{Candidate, can_do_postcopy, enough_bandwidth};
use crate::clock;
use crate::db::{Batch, Fault, Stored, retry};
use crate::rows::{Later, MigrateWork, Stage, TaskRow, VmRow, Work};

impl Tasks {
    /// Changes what it may take of the wire; answers the task as it is then.
    pub(crate) async fn set_bandwidth(
        &self,
        id: TaskId,
        bandwidth: Option<BytesPerSec>,
        principal: &str,
    ) -> Result<Stored<TaskRow>, Fault> {
        enough_bandwidth(bandwidth)?;
        let allowed = bandwidth.map_or_else(|| "any bandwidth".to_owned(), |bandwidth| bandwidth.to_string());
        self.change_policy(id, &format!("{principal} allows {allowed}"), |policy| {
            policy.bandwidth = bandwidth;
            Ok(())
        })
        .await
    }

    /// Has the VM go on at the destination before all of its memory is there.
    pub(crate) async fn switch_to_postcopy(&self, id: TaskId, principal: &str) -> Result<Stored<TaskRow>, Fault> {
        self.postcopy_is_possible(id).await?;
        self.change_policy(id, &format!("{principal} wants post-copy"), |policy| {
            if policy.postcopy == PostCopy::Never {
                return Err(Refusal::new(ErrorCode::NotPermitted, "post-copy is ruled out for this migration")
                    .hint("`godwit task show` says by what; cancel it, throttle it, or wait"));
            }
            if !policy.prepares_postcopy() {
                return Err(Refusal::new(ErrorCode::BadRequest, "the migration was begun without post-copy")
                    .hint("cancel it, and begin it again with `--allow-postcopy`, or with postcopy or ask in `--on-miss`"));
            }
            policy.postcopy = PostCopy::Now;
            Ok(())
        })
        .await
    }

    /// That the destination can do it was not looked at where only somebody was to be asked.
    async fn postcopy_is_possible(&self, id: TaskId) -> Result<(), Fault> {
        let task = self.task(id).await?.row;
        let Work::Migrate(work) = &task.work else { return Ok(()) };
        let (_, vm) = self.both(id).await?;
        let (Some(spec), Some(presence)) = (&vm.row.resolved, self.hub.presence(&work.destination)) else { return Ok(()) };
        let wanted = MigrationPolicy { postcopy: PostCopy::Now, ..work.policy };
        Ok(can_do_postcopy(&wanted, spec, Candidate::new(&work.destination, &presence))?)
    }

    /// Has the VM slowed down until it can be moved within its budget.
    pub(crate) async fn throttle(&self, id: TaskId, principal: &str) -> Result<Stored<TaskRow>, Fault> {
        self.change_policy(id, &format!("{principal} has the VM slowed down"), |policy| {
            if !policy.prepares_throttle() {
                return Err(Refusal::new(ErrorCode::BadRequest, "the migration was begun without throttling")
                    .hint("cancel it, and begin it again with throttle or ask in `--on-miss`"));
            }
            // What it was made ready for it stays ready for.
            if policy.prepares_postcopy() && policy.postcopy == PostCopy::ByLadder {
                policy.postcopy = PostCopy::Ready;
            }
            policy.on_miss = Ladder::only(Rung::Throttle);
            Ok(())
        })
        .await
    }

    async fn change_policy(
        &self,
        id: TaskId,
        told: &str,
        change: impl Fn(&mut MigrationPolicy) -> Result<(), Refusal>,
    ) -> Result<Stored<TaskRow>, Fault> {
        retry!({
            let mut task = self.task(id).await?;
            let ended = task.row.state.ended();
            if matches!(task.row.work, Work::Wait { asked: Later::Migrate(_) }) && !ended {
                return Err(Refusal::new(
                    ErrorCode::BadRequest,
                    "the migration waits to begin: it can be cancelled, and asked for once more with other limits",
                )
                .hint(format!("`godwit task cancel {id}`"))
                .into());
            }
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
            change(&mut work.policy)?;
            work.changes += 1;
            note(&mut task.row, told.to_owned());
            self.db.commit(Batch::default().update(&task)).await
        })?;
        self.wake(id);
        self.task(id).await
    }

    /// Tells the source what was changed last. Given up when it goes away, whether it has heard it or not: it is told again when it is back.
    pub(super) async fn tell_policy(&self, id: TaskId, vm: &VmRow, work: &MigrateWork) -> Result<(), Fault> {
        let message = v1::SetPolicy { vm: vm.id.to_string(), policy: encode(&work.policy) };
        let tag = format!("policy {} at {}", work.attempt, clock::now().0);
        let mut connections = self.hub.watch();
        let away = async {
            while self.hub.presence(&work.source).is_some() && connections.changed().await.is_ok() {}
            Ok(())
        };
        let Some(answer) = self.command_until(id, &work.source, &tag, Action::Policy(message), away).await? else {
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
