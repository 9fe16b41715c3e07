//! `godwit host check`: whether this machine can be a host.

use clap::Args;
use godwit_agent::check::{Finding, Level, check};

use crate::daemon::agent::AgentArgs;
use crate::error::Failure;
use crate::output::{OutputArgs, Table, note, print_data, word};
use crate::text::visible;

/// As the agent is or will be started.
#[derive(Args)]
#[command(
    after_help = "Run it as root on the machine itself, before or after it joins, with the options that its agent gets. It touches no VM. It ends
with 0 if nothing fails; what only warns is worth reading.

Example:
  godwit host check --pool nfs=/mnt/vms --shared-pool nfs --try-pools"
)]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    agent: AgentArgs,
    /// Try each pool's storage, too: makes, copies, locks and removes small volumes, and fills storage of less than 1 GiB for a moment
    #[arg(long)]
    try_pools: bool,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: CheckArgs) -> Result<(), Failure> {
    let options = args.agent.options_for_check()?;
    let mut findings = crate::block_on(async { Ok(check(&options, args.try_pools).await) })?;
    // The worst last, where people look.
    findings.sort_by_key(|finding| finding.level);
    print_data(args.output.output, &findings, || show(&findings))?;
    for finding in &findings {
        if let (Some(fix), crate::output::Format::Table) = (&finding.fix, args.output.output) {
            note(&format!("fix {}: {}", finding.name, visible(fix)));
        }
    }
    let failed = findings.iter().filter(|finding| finding.level == Level::Fail).count();
    if failed == 0 { Ok(()) } else { Err(Failure::Unfit { failed }) }
}

fn show(findings: &[Finding]) -> String {
    let mut table = Table::new(&["FINDING", "LEVEL", "WHAT WAS FOUND"]);
    for finding in findings {
        table.row([finding.name.clone(), word(&finding.level), finding.message.clone()]);
    }
    table.render()
}
