//! Imports that take their time: an image exists from the transaction in which its task is done, and not before.

use std::sync::Arc;

use godwit_model::{ErrorCode, ImageId, ImportFormat, Name, Refusal, TaskId};
use tokio::sync::watch;
use tokio::time::{Duration, Instant, sleep_until};

use super::{Outcome, Tasks, conclude, note, patiently};
use crate::clock;
use crate::db::{Batch, Fault, Stored};
use crate::images::{ImportStep, Received};
use crate::rows::{ImageRow, ImportSource, TaskRow, Work};

/// Progress is written at most this often.
const PERIOD: Duration = Duration::from_millis(500);

/// An import to be.
pub(crate) struct NewImport {
    pub(crate) team: Name,
    pub(crate) name: Name,
    pub(crate) image: ImageId,
    pub(crate) format: ImportFormat,
    pub(crate) source: ImportSource,
    pub(crate) principal: String,
    /// The first line of its trail.
    pub(crate) about: String,
}

impl Tasks {
    /// Whether an image of this name is on its way.
    pub(crate) async fn imports(&self, team: &Name, name: &Name) -> Result<bool, Fault> {
        let on_its_way = |task: &TaskRow| {
            matches!(task.work, Work::Import { .. }) && !task.state.ended() && task.team == *team && task.subject == *name
        };
        Ok(self.db.all::<TaskRow>().await?.iter().any(|task| on_its_way(&task.row)))
    }

    /// Records an import and starts it.
    pub(crate) async fn begin_import(self: &Arc<Self>, new: NewImport) -> Result<Stored<TaskRow>, Fault> {
        let NewImport { team, name, image, format, source, principal, about } = new;
        let id = TaskId::new(clock::fresh());
        let mut task = TaskRow::new(id, team, name, principal, Work::Import { image, format, source }, clock::now());
        note(&mut task, about);
        self.db.commit(Batch::default().create(&task)).await?;
        tracing::info!(task = %id, kind = task.work.kind(), subject = %task.subject, principal = task.principal, "accepted");
        self.spawn(id);
        self.task(id).await
    }

    pub(super) async fn run_import(&self, id: TaskId) -> Result<(), Fault> {
        let Work::Import { image, format, source } = self.task(id).await?.row.work else { return Ok(()) };
        let waker = self.waker(id);
        let (said, mut heard) = watch::channel(ImportStep::default());
        let outcome = {
            let mut work = std::pin::pin!(self.images.import(image, format, &source, &said));
            let mut next = Instant::now();
            loop {
                tokio::select! {
                    result = &mut work => break result,
                    () = waker.notified() => if self.task(id).await?.row.cancel {
                        break Err(Refusal::new(ErrorCode::Cancelled, "cancelled by request; nothing of the image is left"));
                    },
                    () = sleep_until(next), if heard.has_changed().unwrap_or(false) => {
                        let now = heard.borrow_and_update().clone();
                        self.edit_alone(id, |task| {
                            now.step.clone_into(&mut task.step);
                            task.transfer = now.transfer;
                        }).await?;
                        next = Instant::now() + PERIOD;
                    }
                    changed = heard.changed() => if changed.is_ok() { heard.mark_changed() },
                }
            }
        };
        let outcome = match outcome {
            Ok(received) => self.exist(id, received).await?,
            Err(refusal) if refusal.code == ErrorCode::Cancelled => Outcome::Cancelled(refusal),
            Err(refusal) => Outcome::Failed(refusal),
        };
        if !matches!(outcome, Outcome::Done) {
            self.images.remove(image).await;
        }
        let task = self
            .edit_alone(id, |task| {
                if !task.state.ended() {
                    conclude(task, &outcome)
                }
            })
            .await?;
        self.images.remove_source(image).await;
        tracing::info!(task = %id, kind = task.work.kind(), subject = %task.subject, state = ?task.state,
            error = task.error.as_ref().map(tracing::field::display), "ended");
        Ok(())
    }

    /// Writes the image and the end of its task in one transaction.
    async fn exist(&self, id: TaskId, received: Received) -> Result<Outcome, Fault> {
        patiently!(id, {
            let mut task = self.task(id).await?;
            let Work::Import { image, format, .. } = &task.row.work else { return Ok(Outcome::Done) };
            let row = ImageRow {
                id: *image,
                name: task.row.subject.clone(),
                team: task.row.team.clone(),
                kind: format.becomes(),
                size: received.size,
                digest: received.digest.clone(),
                created: clock::now(),
            };
            if self.db.find::<ImageRow>(&format!("{}/{}", row.team, row.name)).await?.is_some() {
                let refusal = Refusal::new(ErrorCode::NameTaken, format!("there is an image {} by now", row.name));
                return Ok(Outcome::Failed(refusal.hint("import it again under another name")));
            }
            conclude(&mut task.row, &Outcome::Done);
            self.db.commit(Batch::default().create(&row).update(&task)).await?;
            Ok(Outcome::Done)
        })
    }

    /// Changes a task that holds no VM.
    pub(super) async fn edit_alone(&self, id: TaskId, mut change: impl FnMut(&mut TaskRow)) -> Result<TaskRow, Fault> {
        patiently!(id, {
            let mut task = self.task(id).await?;
            let before = task.row.clone();
            change(&mut task.row);
            if task.row != before {
                self.db.commit(Batch::default().update(&task)).await?;
            }
            Ok(task.row)
        })
    }
}
