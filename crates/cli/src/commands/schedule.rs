//! `godwit schedule`: snapshots that are taken by themselves, and which of them are kept.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;
use std::time::Duration;

use clap::{ArgAction, Args, Subcommand};
use godwit_api::v1::{
    Schedule, ScheduleCreate, ScheduleRun, ScheduleSet, ScheduleStatus, ScheduledOutcome, ScheduledResult, ScheduledVm,
};
use godwit_model::{Millis, Name, Retention, RunState, ScheduleSpec};

use crate::commands::vm::{parse_label, shown_labels};
use crate::confirm::{ConfirmArgs, each};
use crate::error::Failure;
use crate::output::{Facts, Format, Table, note, or_nothing, print, print_data, word};
use crate::session::{Session, WaitArgs};
use crate::text::{moment, visible};
use crate::watch::watch;

/// How often it is asked how a run stands.
const LOOK: Duration = Duration::from_millis(300);

/// What can be done with schedules.
#[derive(Subcommand)]
pub(crate) enum Verb {
    /// List schedules
    List {
        /// Go on with every change, as JSON lines
        #[arg(long)]
        watch: bool,
    },
    /// Show a schedule: when it runs next, how it stands with each VM, and what it would delete next
    Show {
        /// Its name
        name: Name,
    },
    /// Create a schedule of snapshots
    #[command(
        after_help = "WHEN is minute, hour, day of the month, month, day of the week, as cron has them, or @hourly, @daily, @weekly, @monthly, @yearly; clocks are those of --zone. A
time that clocks leave out runs as soon as they have; one that they show twice runs once. A run that was missed is made up once, if it is not later than
--catch-up. A snapshot is kept if any --keep rule keeps it; without any rule all are.

Examples:
  godwit schedule create nightly --all --when '30 2 * * *' --zone Europe/Berlin --keep-daily 7 --keep-weekly 4
  godwit schedule create databases --label tier=db --when '0 */4 * * *' --disks-only --quiesce --keep-last 6 --keep-daily 14
  godwit schedule create web1-hourly --vm web1 --when @hourly --keep-hourly 24"
    )]
    Create(CreateArgs),
    /// Change a schedule
    #[command(after_help = "What is not given stays as it is. Which VMs it is for is given as a whole.

Examples:
  godwit schedule set nightly --keep-daily 14 --keep-weekly none
  godwit schedule set nightly --enabled=false")]
    Set(SetArgs),
    /// Have a schedule run now, whatever its times are
    Run(RunArgs),
    /// Delete schedules; their snapshots stay
    Delete {
        /// Their names
        #[arg(required = true, value_name = "NAME")]
        names: Vec<Name>,
        #[command(flatten)]
        confirm: ConfirmArgs,
    },
}

/// How many a rule keeps, or that there is no such rule.
#[derive(Clone, Copy)]
pub(crate) struct Kept(Option<u32>);

impl FromStr for Kept {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "none" { Ok(Self(None)) } else { text.parse().map(|count| Self(Some(count))) }
    }
}

/// Of which VMs.
#[derive(Args)]
#[group(multiple = false)]
pub(crate) struct VmArgs {
    /// A VM; can be repeated
    #[arg(long = "vm", value_name = "VM")]
    vms: Vec<Name>,
    /// A label that a VM must have: KEY=TEXT; can be repeated
    #[arg(long = "label", value_name = "KEY=TEXT", value_parser = parse_label)]
    labels: Vec<(Name, String)>,
    /// Every VM of the team
    #[arg(long)]
    all: bool,
}

impl VmArgs {
    fn chosen(&self) -> Option<(BTreeSet<Name>, BTreeMap<Name, String>)> {
        let some = self.all || !self.vms.is_empty() || !self.labels.is_empty();
        some.then(|| (self.vms.iter().cloned().collect(), self.labels.iter().cloned().collect()))
    }
}

/// What is kept.
#[derive(Args, Clone, Copy)]
#[command(next_help_heading = "What is kept")]
pub(crate) struct KeepArgs {
    /// So many of the newest
    #[arg(long, value_name = "COUNT|none")]
    keep_last: Option<Kept>,
    /// The newest of each of the last so many hours that have any
    #[arg(long, value_name = "COUNT|none")]
    keep_hourly: Option<Kept>,
    /// The newest of each of the last so many days that have any
    #[arg(long, value_name = "COUNT|none")]
    keep_daily: Option<Kept>,
    /// The newest of each of the last so many weeks that have any
    #[arg(long, value_name = "COUNT|none")]
    keep_weekly: Option<Kept>,
    /// The newest of each of the last so many months that have any
    #[arg(long, value_name = "COUNT|none")]
    keep_monthly: Option<Kept>,
    /// The newest of each of the last so many years that have any
    #[arg(long, value_name = "COUNT|none")]
    keep_yearly: Option<Kept>,
}

impl KeepArgs {
    fn change(self, keep: &mut Retention) {
        let rules = [
            (self.keep_last, &mut keep.last),
            (self.keep_hourly, &mut keep.hourly),
            (self.keep_daily, &mut keep.daily),
            (self.keep_weekly, &mut keep.weekly),
            (self.keep_monthly, &mut keep.monthly),
            (self.keep_yearly, &mut keep.yearly),
        ];
        for (said, rule) in rules {
            if let Some(Kept(count)) = said {
                *rule = count;
            }
        }
    }
}

/// What to create.
#[derive(Args)]
pub(crate) struct CreateArgs {
    /// Name of the schedule
    name: Name,
    #[command(flatten)]
    vms: VmArgs,
    /// When it runs
    #[arg(long)]
    when: String,
    /// The time zone of its times and days, by its name in the IANA database [default: UTC]
    #[arg(long)]
    zone: Option<String>,
    /// Without memory: a VM boots from its disks
    #[arg(long)]
    disks_only: bool,
    /// Bring the guests' file systems to rest first, within so many seconds [default: 10]
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true, default_missing_value = "10",
        value_parser = clap::value_parser!(u64).range(1..=60))]
    quiesce: Option<u64>,
    /// The pool that is to hold the snapshots [default: that of the VM's first disk, else a shared one]
    #[arg(long)]
    pool: Option<Name>,
    /// How late a run that was missed may begin, such as 30m or 12h [default: 24h]
    #[arg(long, value_name = "TIME")]
    catch_up: Option<Millis>,
    /// Whether it runs by itself
    #[arg(long, action = ArgAction::Set, value_name = "true|false", default_value_t = true)]
    enabled: bool,
    #[command(flatten)]
    keep: KeepArgs,
}

/// What to change.
#[derive(Args)]
pub(crate) struct SetArgs {
    /// Name of the schedule
    name: Name,
    #[command(flatten)]
    vms: VmArgs,
    /// When it runs
    #[arg(long)]
    when: Option<String>,
    /// The time zone of its times and days, by its name in the IANA database
    #[arg(long)]
    zone: Option<String>,
    /// Whether without memory
    #[arg(long, action = ArgAction::Set, value_name = "true|false")]
    disks_only: Option<bool>,
    /// Bring the guests' file systems to rest first, within so many seconds; 0 to leave that out
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=60))]
    quiesce: Option<u64>,
    /// The pool that is to hold the snapshots
    #[arg(long)]
    pool: Option<Name>,
    /// How late a run that was missed may begin, such as 30m or 12h
    #[arg(long, value_name = "TIME")]
    catch_up: Option<Millis>,
    /// Whether it runs by itself
    #[arg(long, action = ArgAction::Set, value_name = "true|false")]
    enabled: Option<bool>,
    #[command(flatten)]
    keep: KeepArgs,
}

/// Which one, and why.
#[derive(Args)]
pub(crate) struct RunArgs {
    /// Name of the schedule
    name: Name,
    /// Why; recorded with the snapshots
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// Only say of which VMs
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    wait: WaitArgs,
}

pub(crate) async fn run(session: Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List { watch: true } => watch::<Schedule>(&session.client).await,
        Verb::List { watch: false } => list(&session).await,
        Verb::Show { name } => {
            let (schedule, status) = (session.client.schedule(&name).await?, session.client.schedule_status(&name).await?);
            let whole = serde_json::json!({ "schedule": &schedule, "status": &status });
            print_data(session.format, &whole, || format!("{}\n{}", show(&schedule), standing(&status)))
        }
        Verb::Create(args) => create(&session, args).await,
        Verb::Set(args) => set(&session, args).await,
        Verb::Run(args) => run_now(&session, args).await,
        Verb::Delete { names, confirm } => delete(&session, &names, &confirm).await,
    }
}

async fn list(session: &Session) -> Result<(), Failure> {
    let schedules = session.client.schedules().await?;
    print_data(session.format, &schedules, || {
        let mut table = Table::new(&["NAME", "VMS", "WHEN", "ZONE", "NEXT", "LAST", "KEEPS", "TEAM"]);
        for schedule in &schedules {
            table.row([
                schedule.name.to_string(),
                of(&schedule.spec),
                schedule.spec.when.clone(),
                schedule.spec.zone.clone(),
                next(schedule),
                or_nothing(schedule.last.as_ref().map(|last| moment(last.began))),
                keeps(&schedule.spec.keep),
                schedule.team.to_string(),
            ]);
        }
        table.render()
    })
}

/// The VMs that it is for.
fn of(spec: &ScheduleSpec) -> String {
    if spec.vms.is_empty() {
        return shown_labels(&spec.labels).unwrap_or_else(|| "every VM".to_owned());
    }
    let names: Vec<&str> = spec.vms.iter().map(Name::as_str).collect();
    names.join(", ")
}

fn keeps(keep: &Retention) -> String {
    if keep.keeps_all() {
        return "all".to_owned();
    }
    keep.said().map(|(rule, count)| format!("{rule} {count}")).collect::<Vec<_>>().join(", ")
}

fn next(schedule: &Schedule) -> String {
    match schedule.next {
        Some(next) => moment(next),
        None if schedule.spec.enabled => "never".to_owned(),
        None => "not enabled".to_owned(),
    }
}

fn show(schedule: &Schedule) -> String {
    let (spec, mut facts) = (&schedule.spec, Facts::default());
    facts.fact("Name", &schedule.name).fact("Team", &schedule.team).fact("VMs", of(spec));
    facts.fact("When", &spec.when).fact("Zone", &spec.zone).fact("Next", next(schedule));
    facts.fact(
        "Last",
        or_nothing(schedule.last.as_ref().map(|last| {
            let by = last.principal.as_ref().map(|principal| format!(", asked for by {principal}")).unwrap_or_default();
            let late = if last.began.get() >= last.due.get().saturating_add(60_000) {
                format!(", was due at {}", moment(last.due))
            } else {
                String::new()
            };
            format!("{}{late}{by}", moment(last.began))
        })),
    );
    facts.fact("Missed", or_nothing(schedule.missed.map(moment)));
    let rest = spec.quiesce.map(|quiesce| format!(", file systems at rest within {quiesce}")).unwrap_or_default();
    facts.fact("Takes", format!("{}{rest}", if spec.memory { "memory and disks" } else { "disks only" }));
    facts.fact("Pool", or_nothing(spec.pool.as_ref())).fact("Catches up", format!("until {} late", span(spec.catch_up)));
    facts.fact("Keeps", keeps(&spec.keep)).fact("Created", moment(schedule.created));
    facts.render()
}

/// A time that is long.
fn span(time: Millis) -> String {
    match time.get() / 60_000 {
        0 => time.to_string(),
        minutes if minutes % 60 == 0 => format!("{} h", minutes / 60),
        minutes => format!("{minutes} min"),
    }
}

fn standing(status: &ScheduleStatus) -> String {
    let mut table = Table::new(&["VM", "NOW", "LAST", "OUTCOME", "KEPT", "GOES NEXT"]);
    for vm in &status.vms {
        let expiring: Vec<&str> = vm.expiring.iter().map(Name::as_str).collect();
        table.row([
            vm.vm.to_string(),
            now(vm),
            or_nothing(vm.last.as_ref().map(|last| moment(last.ended))),
            or_nothing(vm.last.as_ref().map(outcome)),
            vm.snapshots.len().to_string(),
            expiring.join(", "),
        ]);
    }
    table.render()
}

fn now(vm: &ScheduledVm) -> String {
    match (&vm.task, &vm.waits_for) {
        (Some(_), _) => "is taken".to_owned(),
        (None, Some(waits)) => format!("waits: {waits}"),
        (None, None) if !vm.chosen => "not of it any more".to_owned(),
        (None, None) => String::new(),
    }
}

fn outcome(last: &ScheduledOutcome) -> String {
    match (&last.snapshot, &last.error) {
        (Some(name), _) => name.to_string(),
        (None, Some(error)) => format!("{}: {}", word(&last.result), error.message),
        (None, None) => word(&last.result),
    }
}

async fn create(session: &Session, args: CreateArgs) -> Result<(), Failure> {
    let CreateArgs { name, vms, when, zone, disks_only, quiesce, pool, catch_up, enabled, keep } = args;
    let Some((vms, labels)) = vms.chosen() else {
        return Err(Failure::usage("a schedule is for some VMs", "say --vm, --label or --all"));
    };
    let mut spec = ScheduleSpec { vms, labels, memory: !disks_only, pool, enabled, ..ScheduleSpec::new(when) };
    spec.zone = zone.unwrap_or(spec.zone);
    spec.quiesce = quiesce.map(seconds);
    spec.catch_up = catch_up.unwrap_or(spec.catch_up);
    keep.change(&mut spec.keep);
    let schedule = session.client.create_schedule(&ScheduleCreate { name, spec }).await?;
    print_data(session.format, &schedule, || format!("schedule {} created; next run: {}", schedule.name, next(&schedule)))
}

const fn seconds(count: u64) -> Millis {
    Millis(count.saturating_mul(1_000))
}

async fn set(session: &Session, args: SetArgs) -> Result<(), Failure> {
    let schedule = session.client.schedule(&args.name).await?;
    let mut spec = schedule.spec;
    if let Some(chosen) = args.vms.chosen() {
        (spec.vms, spec.labels) = chosen;
    }
    spec.when = args.when.unwrap_or(spec.when);
    spec.zone = args.zone.unwrap_or(spec.zone);
    spec.memory = args.disks_only.map_or(spec.memory, |disks_only| !disks_only);
    spec.quiesce = args.quiesce.map_or(spec.quiesce, |count| (count > 0).then(|| seconds(count)));
    spec.pool = args.pool.or(spec.pool);
    spec.catch_up = args.catch_up.unwrap_or(spec.catch_up);
    spec.enabled = args.enabled.unwrap_or(spec.enabled);
    args.keep.change(&mut spec.keep);
    let schedule = session.client.set_schedule(&args.name, &ScheduleSet { spec }, schedule.revision).await?;
    print_data(session.format, &schedule, || format!("schedule {} changed; next run: {}", schedule.name, next(&schedule)))
}

async fn run_now(session: &Session, args: RunArgs) -> Result<(), Failure> {
    let RunArgs { name, reason, dry_run, wait } = args;
    if dry_run {
        let status = session.client.schedule_status(&name).await?;
        let vms = session.client.vms().await?;
        for of in status.vms.iter().filter(|vm| vm.chosen) {
            let runs = |state| matches!(state, RunState::Running | RunState::Paused);
            let there = vms.iter().any(|vm| vm.name == of.vm && runs(vm.status.state));
            let fate = match (there, &of.task) {
                (false, _) => "would be skipped: it does not run",
                (true, Some(_)) => "would be skipped: its last run is under way",
                (true, None) => "a snapshot would be taken",
            };
            print(&format!("{}: {fate}", of.vm))?;
        }
        return Ok(());
    }
    let mut status = session.client.run_schedule(&name, &ScheduleRun { reason }).await?;
    // Later runs are not waited for: there may always be one.
    let until = status.vms.iter().filter_map(|vm| vm.due).max();
    let under_way = |status: &ScheduleStatus| status.vms.iter().filter(|vm| vm.due.is_some() && vm.due <= until).count();
    let begun: BTreeSet<Name> = status.vms.iter().filter(|vm| vm.chosen).map(|vm| vm.vm.clone()).collect();
    if wait.detach {
        return print_data(session.format, &status, || format!("{} runs for {} VMs", name, begun.len()));
    }
    let mut told = usize::MAX;
    while under_way(&status) > 0 {
        let left = under_way(&status);
        if std::mem::replace(&mut told, left) != left {
            note(&format!("{left} of {} VMs are left", begun.len()));
        }
        tokio::time::sleep(LOOK).await;
        status = session.client.schedule_status(&name).await?;
    }
    let ended: Vec<&ScheduledVm> = status.vms.iter().filter(|vm| vm.chosen && begun.contains(&vm.vm)).collect();
    if session.format != Format::Table {
        print_data(session.format, &status, String::new)?;
    } else {
        for vm in &ended {
            let text = vm.last.as_ref().map(outcome).unwrap_or_default();
            print(&format!("{}: {}", vm.vm, visible(&text)))?;
        }
    }
    let taken = |vm: &&&ScheduledVm| vm.last.as_ref().is_some_and(|last| last.result == ScheduledResult::Taken);
    let failed = ended.len() - ended.iter().filter(taken).count();
    if failed == 0 { Ok(()) } else { Err(Failure::PartlyDone { failed, all: ended.len() }) }
}

async fn delete(session: &Session, names: &[Name], confirm: &ConfirmArgs) -> Result<(), Failure> {
    if confirm.dry_run {
        return each(names, async |name| {
            let schedule = session.client.schedule(name).await?;
            print(&format!("schedule {name} ({}) would be deleted; its snapshots would stay", of(&schedule.spec)))
        })
        .await;
    }
    let list: Vec<&str> = names.iter().map(Name::as_str).collect();
    confirm.confirm(&format!("Delete schedule {} and leave its snapshots", list.join(", ")))?;
    each(names, async |name| {
        session.client.delete_schedule(name).await?;
        print(&format!("schedule {name} deleted; its snapshots stay"))
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        keep: KeepArgs,
    }

    #[test]
    fn rules_that_are_given_change_none_ends_one_and_the_rest_stays() {
        let line: Line = clap::Parser::try_parse_from(["x", "--keep-daily", "14", "--keep-weekly", "none"])
            .unwrap_or_else(|error| panic!("{error}"));
        let mut keep = Retention { daily: Some(7), weekly: Some(4), yearly: Some(1), ..Retention::default() };
        line.keep.change(&mut keep);
        assert_eq!(keeps(&keep), "daily 14, yearly 1");
        assert_eq!(keeps(&Retention::default()), "all");
        assert!(<Line as clap::Parser>::try_parse_from(["x", "--keep-last", "few"]).is_err());
    }
}
