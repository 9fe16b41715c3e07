//! `godwit vm migrate`.

use clap::Args;
use godwit_api::v1::{Task, VmMigrate};
use godwit_model::{MigrationForecast, Name, PostCopy};

use crate::error::Failure;
use crate::limits::LimitArgs;
use crate::output::print_data;
use crate::progress::summary;
use crate::session::{Session, WaitArgs, judge};
use crate::text::visible;

/// Which VM, where to, and within which limits.
#[derive(Args)]
#[command(after_help = "The VM runs all the time but for its blackout. Limits are never raised: a VM that writes too much for \
its blackout budget stays where it is, and the error says so. What no flag says, the VM or a policy may say (`godwit policy`). Ctrl-C stops watching, not the migration.

Examples:
  godwit vm migrate web1 --to h2 --dry-run
  godwit vm migrate web1 --to h2 --max-blackout 100ms --reason 'h1 gets new memory'
  godwit vm migrate db1 --to h2 --on-miss wait-for-quiet,postcopy --patience 5m
  godwit task wait $(godwit vm migrate web1 --to h2 --detach)")]
pub(crate) struct MigrateArgs {
    /// Its name
    name: Name,
    /// The host to move to
    #[arg(long, value_name = "HOST")]
    to: Name,
    #[command(flatten)]
    limits: LimitArgs,
    /// Make ready for `godwit task postcopy`
    #[arg(long)]
    allow_postcopy: bool,
    /// Go on at the destination as soon as every page was looked at once; the memory that is left follows. Until it has come the VM needs both hosts
    #[arg(long)]
    postcopy_now: bool,
    /// Why; recorded with the task
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// Only check, and say what was found and what it would cost
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    wait: WaitArgs,
}

pub(super) async fn run(session: &Session, args: MigrateArgs) -> Result<(), Failure> {
    let postcopy = match (args.postcopy_now, args.allow_postcopy) {
        (true, _) => Some(PostCopy::Now),
        (false, true) => Some(PostCopy::Ready),
        (false, false) => None,
    };
    let policy = args.limits.settings(postcopy);
    let request = VmMigrate { host: args.to, policy, dry_run: args.dry_run, reason: args.reason };
    if request.dry_run {
        let task = session.client.migrate_vm(&args.name, &request).await?;
        judge(&task)?;
        return print_data(session.format, &task, || plan(&task, &request.host));
    }
    // Where it comes from is known only before it goes.
    let before = session.client.vm(&args.name).await?;
    let task = session.client.migrate_vm(&args.name, &request).await?;
    session
        .conclude(task, &args.wait, Some(&request.host), async |task| {
            let journey = before.status.host.as_ref().map(|from| (from, &request.host));
            summary(task, journey, Some(before.spec.memory))
        })
        .await
}

/// What the checks found.
fn plan(task: &Task, to: &Name) -> String {
    let lines = task.trail.iter().map(|line| line.text.as_str()).chain([task.step.as_str()]);
    // That the asking itself is done is no finding.
    let findings = lines.filter(|line| !line.is_empty() && *line != "done").map(|line| format!("  {}\n", visible(line)));
    let costs = task.forecast.iter().map(costs);
    format!("{} could move to {to}\n{}", task.subject, findings.chain(costs).collect::<String>())
}

/// What it would cost.
fn costs(forecast: &MigrationForecast) -> String {
    let MigrationForecast { memory, disks, dirty_rate, total, blackout, wire_bytes, needs, learned_from, .. } = forecast;
    let learned = match learned_from {
        0 => "nothing is known of earlier moves: a link of 1 Gbit/s is assumed".to_owned(),
        1 => "learned from an earlier move".to_owned(),
        more => format!("learned from {more} earlier moves like it"),
    };
    let mut lines = vec![
        format!("time      {} ({} to {})", total.expected, total.least, total.most),
        format!("blackout  {} ({} to {})", blackout.expected, blackout.least, blackout.most),
        format!("wire      {} ({} to {})", wire_bytes.expected, wire_bytes.least, wire_bytes.most),
        format!("from      {memory} that the guest has touched, {dirty_rate} written to; {learned}"),
    ];
    if disks.get() > 0 {
        lines.push(format!("disks     {disks} on disks that travel with it"));
    }
    if let Some(needs) = needs {
        let faster = needs.bandwidth.map(|rate| format!(", or {rate} on the wire")).unwrap_or_default();
        lines.push(format!(
            "As it writes now the VM cannot be stopped within its budget. It could be with --max-blackout {}ms{faster}.",
            needs.max_blackout.get()
        ));
    }
    lines.iter().map(|line| format!("  {line}\n")).collect()
}
