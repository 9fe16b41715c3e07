//! `godwit task`: long work.

use clap::{Args, Subcommand};
use godwit_api::v1::{Task, TaskState};
use godwit_model::{ErrorCode, Millis, Refusal, TaskId};

use crate::arguments::Bandwidth;
use crate::error::Failure;
use crate::follow::{Patience, follow};
use crate::output::{Facts, Table, note, or_nothing, print_data, word};
use crate::progress::{Reporter, summary};
use crate::session::{Session, WaitArgs, judge};
use crate::text::{moment, visible};
use crate::watch::watch;

/// Fewest characters of an id that are taken for one.
const SHORTEST_PREFIX: usize = 4;

/// What can be done with tasks.
#[derive(Subcommand)]
pub(crate) enum Verb {
    /// List tasks, the newest first
    List {
        /// Only those under way
        #[arg(long)]
        running: bool,
        /// Go on with every change, as JSON lines
        #[arg(long, conflicts_with = "running")]
        watch: bool,
    },
    /// Show a task with its trail
    Show(TaskArgs),
    /// Show a task's progress and trail to its end; the exit code is the task's
    Watch(TaskArgs),
    /// Wait for a task's end without a word; the exit code is the task's
    #[command(after_help = "Example:
  task=$(godwit vm migrate web1 --to h2 --detach)
  godwit task wait $task --timeout 10m || echo \"ended with $?\"")]
    Wait {
        #[command(flatten)]
        task: TaskArgs,
        /// Wait no longer than this, such as 30s; then exit with 6
        #[arg(long, value_name = "TIME")]
        timeout: Option<Millis>,
    },
    /// Change what a migration may take of the wire, while it runs
    Bandwidth {
        #[command(flatten)]
        task: TaskArgs,
        /// Such as 500mbit or 50MiB/s; `none` is no limit but its host's
        #[arg(value_name = "RATE")]
        bandwidth: Bandwidth,
    },
    /// Have a migration's VM go on at its destination now; the memory that is left follows
    #[command(after_help = "Only of a migration that was begun with --allow-postcopy, or with postcopy or ask in --on-miss. \
Until all memory has come the VM needs both hosts: if one of them dies meanwhile, the VM crashes.")]
    Postcopy(TaskArgs),
    /// Slow a migration's VM down until it can be moved within its budget
    #[command(after_help = "Only of a migration that was begun with throttle or ask in --on-miss.")]
    Throttle(TaskArgs),
    /// Cancel a task, and wait until nothing of it is left
    Cancel {
        #[command(flatten)]
        task: TaskArgs,
        #[command(flatten)]
        wait: WaitArgs,
    },
}

/// Names a task.
#[derive(Args)]
pub(crate) struct TaskArgs {
    /// Its id, or the first characters of it
    #[arg(value_name = "TASK")]
    task: String,
}

pub(crate) async fn run(session: Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List { watch: true, .. } => watch::<Task>(&session.client).await,
        Verb::List { running, .. } => list(&session, running).await,
        Verb::Show(args) => {
            let task = session.client.task(find(&session, &args.task).await?).await?;
            print_data(session.format, &task, || show(&task))
        }
        Verb::Watch(args) => {
            let id = find(&session, &args.task).await?;
            let mut reporter = Reporter::new(None);
            let mut told = 0;
            let mut show = |task: &Task| {
                for line in task.trail.iter().skip(told) {
                    reporter.pause();
                    note(&format!("{} {}", moment(line.at), visible(&line.text)));
                }
                told = told.max(task.trail.len());
                reporter.show(task);
            };
            end(&session, follow(&session.client, id, Patience::Endless, &mut show).await?)
        }
        Verb::Wait { task, timeout } => {
            let id = find(&session, &task.task).await?;
            let patience =
                timeout.map_or(Patience::Endless, |limit| Patience::Until(std::time::Duration::from_millis(limit.get())));
            end(&session, follow(&session.client, id, patience, &mut |_| {}).await?)
        }
        Verb::Bandwidth { task, bandwidth: Bandwidth(limit) } => {
            let task = session.client.set_task_bandwidth(find(&session, &task.task).await?, limit).await?;
            print_data(session.format, &task, || {
                let limit = limit.map_or_else(|| "any bandwidth".to_owned(), |limit| limit.to_string());
                format!("{} of {} may take {limit}", visible(&task.kind), task.subject)
            })
        }
        Verb::Postcopy(args) => {
            let task = session.client.postcopy_task(find(&session, &args.task).await?).await?;
            print_data(session.format, &task, || format!("{} goes on at its destination as soon as that is possible", task.subject))
        }
        Verb::Throttle(args) => {
            let task = session.client.throttle_task(find(&session, &args.task).await?).await?;
            print_data(session.format, &task, || format!("{} is slowed down", task.subject))
        }
        Verb::Cancel { task, wait } => cancel(&session, &task, &wait).await,
    }
}

async fn cancel(session: &Session, args: &TaskArgs, wait: &WaitArgs) -> Result<(), Failure> {
    let task = session.client.cancel_task(find(session, &args.task).await?).await?;
    if wait.detach {
        return print_data(session.format, &task, || task.id.to_string());
    }
    let mut reporter = Reporter::new(None);
    let task = if task.state.ended() {
        task
    } else {
        follow(&session.client, task.id, Patience::Endless, &mut |task| reporter.show(task)).await?
    };
    if task.state == TaskState::Cancelled {
        return print_data(session.format, &task, || format!("{} of {} cancelled", visible(&task.kind), task.subject));
    }
    let message = format!("{} of {} was not cancelled: it ended first ({})", task.kind, task.subject, word(&task.state));
    Err(Failure::Refused(Refusal::new(ErrorCode::TooLate, message).hint(format!("`godwit task show {}` says how", task.id))))
}

/// Prints an ended task; the exit code is how it ended.
fn end(session: &Session, task: Task) -> Result<(), Failure> {
    print_data(session.format, &task, || match (task.state, &task.figures) {
        (TaskState::Done, Some(_)) => summary(&task, None, None),
        (state, _) => visible(&format!("{} of {}: {}", task.kind, task.subject, word(&state))).into_owned(),
    })?;
    judge(&task)
}

async fn list(session: &Session, running: bool) -> Result<(), Failure> {
    let mut tasks = session.client.tasks().await?;
    tasks.retain(|task| !running || !task.state.ended());
    print_data(session.format, &tasks, || {
        let mut table = Table::new(&["ID", "KIND", "SUBJECT", "STATE", "CREATED", "STEP"]);
        for task in &tasks {
            let step = match &task.error {
                Some(error) if task.state.ended() => error.code.to_string(),
                _ => task.step.clone(),
            };
            let (id, subject) = (task.id.to_string(), task.subject.to_string());
            table.row([id, task.kind.clone(), subject, word(&task.state), moment(task.created), step]);
        }
        table.render()
    })
}

fn show(task: &Task) -> String {
    let mut facts = Facts::default();
    facts.fact("Id", task.id).fact("Kind", &task.kind).fact("Subject", &task.subject).fact("State", word(&task.state));
    facts.fact("Team", &task.team).fact("Asked by", &task.principal).fact("Reason", or_nothing(task.reason.as_ref()));
    facts.fact("Created", moment(task.created)).fact("Ended", or_nothing(task.ended.map(moment)));
    if !task.state.ended() {
        facts.fact("Step", &task.step).fact("Cancellable", if task.cancellable { "yes" } else { "no" });
    }
    if let Some(progress) = task.progress.as_ref().filter(|_| !task.state.ended()) {
        facts.fact("Phase", progress.phase.as_str()).fact("Sent", progress.wire_bytes).fact("Rate", progress.rate);
        facts.fact("Dirty rate", or_nothing(progress.dirty_rate)).fact("Passes", progress.rounds);
        facts.fact("Predicted blackout", or_nothing(progress.predicted_blackout)).fact("Time left", or_nothing(progress.time_left));
        if let Some(rung) = progress.rung {
            facts.fact("On a miss", rung.as_str());
        }
    }
    if let Some(figures) = &task.figures {
        facts.fact("Total", figures.total).fact("Blackout", figures.blackout);
        facts.fact("Predicted blackout", or_nothing(figures.predicted_blackout)).fact("On the wire", figures.wire_bytes);
        facts.fact("Written by QEMU", figures.ram_bytes).fact("Passes", figures.rounds);
        if figures.disk_bytes.get() > 0 {
            facts.fact("Of that disks", figures.disk_bytes);
        }
        if figures.left.get() > 0 {
            facts.fact("After the switch", figures.left);
        }
    }
    facts.fact("Snapshot", or_nothing(task.snapshot.as_ref())).fact("Kept as", or_nothing(task.kept.as_ref()));
    if let Some(figures) = &task.restore {
        let disks = format!("{}, {} read, {} written", Millis(figures.disks_ms), figures.disks_read, figures.disks_written);
        facts.fact("QEMU started in", Millis(figures.qemu_ms)).fact("Disks", disks);
        facts.fact("Memory", or_nothing(Some(figures.memory_ms).filter(|&ms| ms > 0).map(Millis)));
        if figures.filled.get() > 0 {
            facts.fact("Disks followed", format!("{}, {}", Millis(figures.filled_ms), figures.filled));
        }
    }
    if let Some(error) = &task.error {
        facts.fact("Error", format!("{} [{}]", error.message, error.code)).fact("  fix", or_nothing(error.hint.as_ref()));
    }
    for line in &task.trail {
        facts.fact(&moment(line.at), &line.text);
    }
    facts.render()
}

/// The task that an id, or the beginning of one, means.
async fn find(session: &Session, text: &str) -> Result<TaskId, Failure> {
    if let Ok(id) = text.parse() {
        return Ok(id);
    }
    let hint = "`godwit task list` shows the ids";
    let digits = text.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    if !digits || text.len() < SHORTEST_PREFIX {
        return Err(Failure::usage(format!("{text} is not the id of a task, nor {SHORTEST_PREFIX} characters of one"), hint));
    }
    let prefix = text.to_ascii_lowercase();
    let tasks = session.client.tasks().await?;
    let mut found = tasks.iter().map(|task| task.id).filter(|id| id.to_string().starts_with(&prefix));
    match (found.next(), found.next()) {
        (Some(id), None) => Ok(id),
        (None, _) => {
            Err(Failure::Refused(Refusal::new(ErrorCode::NotFound, format!("no task's id begins with {text}")).hint(hint)))
        }
        (Some(_), Some(_)) => Err(Failure::usage(format!("several tasks' ids begin with {text}"), "write more of the id")),
    }
}
