//! A command's connection to the controller, and how it waits for tasks.

use clap::Args;
use godwit_api::client::Client;
use godwit_api::v1::{Task, TaskState};
use godwit_model::{ErrorCode, Name, Refusal, Retry};

use crate::arguments::OnlineArgs;
use crate::context;
use crate::error::Failure;
use crate::follow::{Patience, follow};
use crate::output::{Format, print, print_data};
use crate::progress::Reporter;

/// The controller, and how to write what it says.
pub(crate) struct Session {
    /// The controller.
    pub(crate) client: Client,
    /// How data is written.
    pub(crate) format: Format,
}

/// Waits for the task, or not.
#[derive(Args)]
pub(crate) struct WaitArgs {
    /// Do not wait: print the task and leave it to run
    #[arg(long)]
    pub(crate) detach: bool,
}

impl Session {
    /// Finds the controller that is meant; does not speak with it yet.
    pub(crate) fn open(online: &OnlineArgs) -> Result<Self, Failure> {
        let client = Client::new(context::endpoint(&online.connection)?)?;
        Ok(Self { client, format: online.output.output })
    }

    /// Waits for a task and shows its progress. Anything but a good end is an error.
    pub(crate) async fn wait(&self, task: Task, towards: Option<&Name>) -> Result<Task, Failure> {
        let task = self.see_out(task, towards).await?;
        judge(&task)?;
        Ok(task)
    }

    /// Waits for a task, unless it shall be left alone, and prints it, or `sentence` for people.
    pub(crate) async fn conclude(
        &self,
        task: Task,
        wait: &WaitArgs,
        towards: Option<&Name>,
        sentence: impl AsyncFnOnce(&Task) -> String,
    ) -> Result<(), Failure> {
        if wait.detach {
            return print_data(self.format, &task, || task.id.to_string());
        }
        let task = self.see_out(task, towards).await?;
        if self.format != Format::Table {
            print_data(self.format, &task, String::new)?;
            return judge(&task);
        }
        judge(&task)?;
        print(&sentence(&task).await)
    }

    async fn see_out(&self, task: Task, towards: Option<&Name>) -> Result<Task, Failure> {
        if task.state.ended() {
            return Ok(task);
        }
        let mut reporter = Reporter::new(towards);
        reporter.show(&task);
        follow(&self.client, task.id, Patience::Endless, &mut |task| reporter.show(task)).await
    }
}

/// A task's end as a result.
pub(crate) fn judge(task: &Task) -> Result<(), Failure> {
    let (code, message) = match task.state {
        TaskState::Done => return Ok(()),
        TaskState::Running => return Err(Failure::StillRunning { task: task.id }),
        TaskState::Cancelled => (ErrorCode::Cancelled, "cancelled"),
        TaskState::Failed => (ErrorCode::Internal, "failed without a reason"),
    };
    let mut refusal = task.error.clone().unwrap_or_else(|| Refusal::new(code, message).retry(Retry::Unknown));
    if task.state == TaskState::Cancelled {
        // Whatever else it says, this is how it ended.
        refusal.code = ErrorCode::Cancelled;
    }
    Err(Failure::Task { kind: task.kind.clone(), subject: task.subject.to_string(), refusal })
}
