//! Programs in guests: recorded before they start, begun once, and followed to wherever the VM moves meanwhile.
//!
//! ```text
//!   admit ─▶ record ─▶ begin on the VM's host ─▶ ask the host that has the VM now ─▶ record how it ended ─▶ answer
//!                                                   └── away, busy, moving: again ──┘
//! ```
//! What a program was given and what it wrote is not stored. It is never begun a second time: where it is unknown whether it began, that is said.

use std::sync::Arc;

use godwit_link::v1::{self, command::Action};
use godwit_link::{decode, encode};
use godwit_model::lifecycle::decide_exec;
use godwit_model::{ErrorCode, ExecOutcome, ExecRequest, Name, Refusal, Retry, TaskId, VmId};
use tokio::sync::oneshot;
use tokio::time::{Duration, Instant};

use super::admit::{describe, new_task};
use super::{Ask, Outcome, Tasks, command_id, conclude, note, patiently};
use crate::clock;
use crate::db::{Batch, Fault, retry};
use crate::hub::Answer;
use crate::rows::{TaskRow, VmRow, Work};

/// Programs of one VM that are waited for at once.
const AT_ONCE: usize = 8;
/// Characters of a program's name that are recorded.
const RECORDED: usize = 200;
/// How long a host may take to start a program: longer than it gives its guest.
const START: Duration = Duration::from_secs(20);
/// How long an agent waits for the end in one question.
const WAIT: Duration = Duration::from_secs(2);
/// How long a host may take to answer one question.
const ASK: Duration = Duration::from_secs(15);
/// Between two questions that led to nothing.
const AGAIN: Duration = Duration::from_millis(250);

/// The right to one of a VM's places; given back when dropped.
struct Place {
    tasks: Arc<Tasks>,
    vm: VmId,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut execs = self.tasks.execs.lock().expect("no holder panics");
        if let Some(count) = execs.get_mut(&self.vm) {
            *count -= 1;
            if *count == 0 {
                execs.remove(&self.vm);
            }
        }
    }
}

/// Whether a refusal may be over in a moment: the host is away, or the VM is on its way to another.
fn passes(refusal: &Refusal) -> bool {
    use ErrorCode as E;
    matches!(
        refusal.code,
        E::HostDown
            | E::VmBusy
            | E::VmNotRunning
            | E::NotFound
            | E::GenerationStale
            | E::GuestSilent
            | E::QemuFailed
            | E::HostFailed
    )
}

impl Tasks {
    /// Runs a program in the guest of a VM. It goes on, and is recorded, also when the caller goes away.
    pub(crate) async fn exec(self: &Arc<Self>, ask: &Ask, request: ExecRequest) -> Result<ExecOutcome, Fault> {
        let vm = self.vm(&ask.team, &ask.vm).await?.row.id;
        let place = self.take_place(vm)?;
        let (task, vm) = retry!({ self.admit_exec(ask, &request).await })?;
        tracing::info!(task = %task.id, vm = %task.subject, principal = task.principal, program = request.program, "runs a program");
        let (sender, receiver) = oneshot::channel();
        let tasks = Arc::clone(self);
        self.tracker.spawn(async move {
            let (id, stop) = (task.id, tasks.stop.clone());
            let result = tokio::select! {
                // What is left is ended by the next controller.
                () = stop.cancelled() => return,
                result = tasks.run_exec(id, vm, &request) => result,
            };
            drop(place);
            let outcome = match &result {
                Ok(_) => Outcome::Done,
                Err(refusal) => Outcome::Failed(refusal.clone()),
            };
            let ending = result.as_ref().ok().map(ending);
            if let Err(fault) = tasks.end_exec(id, &outcome, ending).await {
                tracing::error!(task = %id, error = &fault as &dyn std::error::Error, "how a program ended cannot be recorded");
            }
            // Whoever asked may be gone.
            let _ = sender.send(result);
        });
        let stopping = |_| {
            Refusal::new(ErrorCode::HostDown, "the controller stops; the program may run on in the guest").retry(Retry::Unknown)
        };
        Ok(receiver.await.map_err(stopping)??)
    }

    fn take_place(self: &Arc<Self>, vm: VmId) -> Result<Place, Refusal> {
        let mut execs = self.execs.lock().expect("no holder panics");
        let count = execs.entry(vm).or_default();
        if *count >= AT_ONCE {
            return Err(Refusal::new(ErrorCode::VmBusy, format!("{AT_ONCE} programs of this VM are waited for already"))
                .hint("wait until one of them has ended: `godwit task list`")
                .retry(Retry::Safe));
        }
        *count += 1;
        Ok(Place { tasks: Arc::clone(self), vm })
    }

    async fn admit_exec(&self, ask: &Ask, request: &ExecRequest) -> Result<(TaskRow, VmRow), Fault> {
        let vm = self.vm(&ask.team, &ask.vm).await?;
        decide_exec(vm.row.state, vm.row.activity)?;
        let work = Work::Exec { program: request.program.chars().take(RECORDED).collect() };
        let mut task =
            TaskRow { step: "runs in the guest".into(), ..new_task(&vm.row, ask, TaskId::new(clock::fresh()), work, clock::now()) };
        describe(&mut task);
        self.db.commit(Batch::default().unchanged(&vm).create(&task)).await?;
        Ok((task, vm.row))
    }

    async fn run_exec(&self, id: TaskId, vm: VmRow, request: &ExecRequest) -> Result<ExecOutcome, Refusal> {
        let deadline = Instant::now() + Duration::from_millis(request.timeout.0);
        let internal = |what: &str| Refusal::new(ErrorCode::Internal, what).retry(Retry::Unknown);
        let host = vm.host.clone().ok_or_else(|| internal("a running VM without a host"))?;
        let begin = v1::ExecInGuest { vm: vm.id.to_string(), generation: vm.generation.0, request: encode(request) };
        let began = self.one_command(id, &host, "exec", Action::Exec(begin), START).await.unwrap_or_else(|| {
            Err(Refusal::new(ErrorCode::HostDown, format!("host {host} did not say whether the program began"))
                .hint("look in the guest before you try again")
                .retry(Retry::Unknown))
        })?;
        let pid: i64 = decode("result", &began.result).map_err(|_| internal("the agent's answer is malformed"))?;
        let mut last = None;
        let mut number = 0_u64;
        while Instant::now() < deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            let row = self.db.find::<VmRow>(&vm.id.to_string()).await.map_err(|fault| fault.refusal())?;
            let Some(host) = row.filter(|row| row.row.has_process()).and_then(|row| row.row.host) else {
                return Err(Refusal::new(ErrorCode::VmNotRunning, "the VM ended while the program ran; how it ended is not known")
                    .hint("start the VM and look in the guest")
                    .retry(Retry::Unknown));
            };
            let wait_ms = u32::try_from(WAIT.min(left).as_millis()).unwrap_or_default();
            let question = Action::ExecStatus(v1::ExecStatus { vm: vm.id.to_string(), pid, wait_ms });
            number += 1;
            match self.one_command(id, &host, &format!("exec status {number}"), question, ASK).await {
                Some(Ok(answer)) => match decode::<Option<ExecOutcome>>("result", &answer.result) {
                    Ok(Some(outcome)) => return Ok(outcome),
                    Ok(None) => continue,
                    Err(_) => return Err(internal("the agent's answer is malformed")),
                },
                Some(Err(refusal)) if refusal.code == ErrorCode::GuestRefused => {
                    return Err(Refusal::new(
                        ErrorCode::GuestRefused,
                        format!("how the program ended is lost: {}", refusal.message),
                    )
                    .hint("the guest's agent was restarted, or its answer was lost when the VM moved: look in the guest")
                    .retry(Retry::Unknown));
                }
                Some(Err(refusal)) if !passes(&refusal) => return Err(refusal.retry(Retry::Unknown)),
                Some(Err(refusal)) => last = Some(refusal.message),
                None => last = Some(format!("host {host} does not answer")),
            }
            tokio::time::sleep(AGAIN.min(left)).await;
        }
        let because = last.map(|last| format!("; last heard: {last}")).unwrap_or_default();
        Err(Refusal::new(
            ErrorCode::ExecUnfinished,
            format!("{} was not seen to end within {}{because}", request.program, request.timeout),
        )
        .hint("it goes on in the guest; wait longer with --timeout, or start long work in the background")
        .retry(Retry::Unknown))
    }

    /// Commands a host once. Nothing: it is away, or did not answer in time.
    pub(super) async fn one_command(
        &self,
        id: TaskId,
        host: &Name,
        tag: &str,
        action: Action,
        limit: Duration,
    ) -> Option<Result<Answer, Refusal>> {
        let command = v1::Command { id: command_id(id, tag), epoch: self.db.epoch().0, task: id.to_string(), action: Some(action) };
        let answer = self.hub.command(host, command)?;
        tokio::time::timeout(limit, answer).await.ok()?.ok()
    }

    /// Ends the record. The VM is not touched: a program holds nothing of it.
    async fn end_exec(&self, id: TaskId, outcome: &Outcome, ending: Option<String>) -> Result<(), Fault> {
        patiently!(id, {
            let mut task = self.task(id).await?;
            if task.row.state.ended() {
                return Ok(());
            }
            if let Some(ending) = &ending {
                note(&mut task.row, ending.clone());
            }
            conclude(&mut task.row, outcome);
            self.db.commit(Batch::default().update(&task)).await
        })
    }

    /// A program that an earlier controller waited for.
    pub(super) async fn lose_exec(&self, id: TaskId) -> Result<(), Fault> {
        let lost =
            Refusal::new(ErrorCode::ExecUnfinished, "the controller was restarted while it waited; the program may have gone on")
                .hint("look in the guest")
                .retry(Retry::Unknown);
        self.end_exec(id, &Outcome::Failed(lost), None).await
    }
}

/// How a program ended, for the record.
fn ending(outcome: &ExecOutcome) -> String {
    match (outcome.exit_code, outcome.signal) {
        (_, Some(signal)) => format!("ended by signal {signal}"),
        (Some(code), None) => format!("ended with exit code {code}"),
        (None, None) => "ended".to_owned(),
    }
}
