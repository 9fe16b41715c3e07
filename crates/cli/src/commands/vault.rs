//! `godwit vault`: what holds a team's snapshots in its pools.

use clap::{Args, Subcommand};
use godwit_api::v1::VaultPrune;
use godwit_model::{Name, VaultPlan};

use crate::error::Failure;
use crate::output::{Format, Table, or_nothing, print, print_data};
use crate::session::{Session, WaitArgs};

/// What can be done with vaults.
#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Show what the team's snapshots take of each pool
    Status,
    /// Read all that is in a vault, and name what is damaged
    Verify {
        #[command(flatten)]
        vault: VaultArgs,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Say what no snapshot needs any more, and remove it if asked to
    #[command(
        after_help = "Without --apply nothing is changed. With it, what the plan names is removed, if the plan is still the same then.

Examples:
  godwit vault prune shared
  godwit vault prune shared --apply"
    )]
    Prune {
        #[command(flatten)]
        vault: VaultArgs,
        /// Remove what the plan names
        #[arg(long)]
        apply: bool,
    },
}

/// Names a vault.
#[derive(Args)]
pub(crate) struct VaultArgs {
    /// The pool
    pool: Name,
    /// A host that has it, where several have a pool of this name for themselves
    #[arg(long)]
    host: Option<Name>,
}

pub(crate) async fn run(session: Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::Status => status(&session).await,
        Verb::Verify { vault: VaultArgs { pool, host }, wait } => {
            let task = session.client.verify_vault(&pool, host.as_ref()).await?;
            session.conclude(task, &wait, None, async |_| format!("the vault in {pool} is whole")).await
        }
        Verb::Prune { vault, apply } => prune(&session, &vault, apply).await,
    }
}

async fn status(session: &Session) -> Result<(), Failure> {
    let vaults = session.client.vaults().await?;
    print_data(session.format, &vaults, || {
        let mut table = Table::new(&["POOL", "SNAPSHOTS", "PACKS", "SIZE", "HOST"]);
        for vault in &vaults {
            table.row([
                vault.pool.to_string(),
                or_nothing(vault.usage.map(|usage| usage.snapshots)),
                or_nothing(vault.usage.map(|usage| usage.packs)),
                or_nothing(vault.usage.map(|usage| usage.bytes)),
                or_nothing(vault.host.as_ref()),
            ]);
        }
        table.render()
    })
}

async fn prune(session: &Session, vault: &VaultArgs, apply: bool) -> Result<(), Failure> {
    let VaultArgs { pool, host } = vault;
    let plan = session.client.prune_vault(pool, host.as_ref(), &VaultPrune::default()).await?;
    if !apply || plan.files.is_empty() {
        return print_data(session.format, &plan, || told(&plan, "would be removed"));
    }
    if session.format == Format::Table {
        print(&files(&plan))?;
    }
    let request = VaultPrune { apply: true, plan: Some(plan) };
    let done = session.client.prune_vault(pool, host.as_ref(), &request).await?;
    print_data(session.format, &done, || sum(&done, "removed"))
}

fn files(plan: &VaultPlan) -> String {
    let mut table = Table::new(&["FILE", "SIZE"]);
    for file in &plan.files {
        table.row([file.name.clone(), file.bytes.to_string()]);
    }
    table.render()
}

fn sum(plan: &VaultPlan, what: &str) -> String {
    let count = plan.files.len();
    format!("{count} {} {what}, {}", if count == 1 { "file" } else { "files" }, plan.bytes())
}

fn told(plan: &VaultPlan, what: &str) -> String {
    if plan.files.is_empty() {
        return "every file is needed".to_owned();
    }
    format!("{}{}", files(plan), sum(plan, what))
}
