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
    /// Say what no snapshot needs any more, and free what it takes if asked to
    #[command(
        after_help = "Without --apply nothing is changed. With it, what the plan names is removed, or written anew without what is not needed of it,
if the plan is still the same then. How much writing anew frees is an estimate. No snapshot can be taken meanwhile.

Examples:
  godwit vault prune shared
  godwit vault prune shared --apply"
    )]
    Prune {
        #[command(flatten)]
        vault: VaultArgs,
        /// Do what the plan says
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
    if !apply || plan.is_empty() {
        return print_data(session.format, &plan, || told(&plan));
    }
    if session.format == Format::Table {
        print(&files(&plan))?;
    }
    let request = VaultPrune { apply: true, plan: Some(plan) };
    let done = session.client.prune_vault(pool, host.as_ref(), &request).await?;
    print_data(session.format, &done, || sum(&done, ["removed", "written anew"]))
}

/// What goes, and what is written anew.
fn files(plan: &VaultPlan) -> String {
    let mut out = String::new();
    if !plan.files.is_empty() {
        let mut table = Table::new(&["FILE", "SIZE"]);
        for file in &plan.files {
            table.row([file.name.clone(), file.bytes.to_string()]);
        }
        out += &table.render();
    }
    if !plan.rewrites.is_empty() {
        let mut table = Table::new(&["WRITTEN ANEW", "SIZE", "FREES ABOUT"]);
        for rewrite in &plan.rewrites {
            table.row([rewrite.name.clone(), rewrite.bytes.to_string(), rewrite.freed.to_string()]);
        }
        out += &table.render();
    }
    out
}

fn sum(plan: &VaultPlan, [removed, rewritten]: [&str; 2]) -> String {
    let count = |files: usize| format!("{files} {}", if files == 1 { "file" } else { "files" });
    let parts = [(plan.files.len(), removed), (plan.rewrites.len(), rewritten)];
    let parts: Vec<_> =
        parts.iter().filter(|(files, _)| *files > 0).map(|(files, what)| format!("{} {what}", count(*files))).collect();
    let about = if plan.rewrites.is_empty() { "" } else { "about " };
    format!("{}, {about}{}", parts.join(", "), plan.bytes())
}

fn told(plan: &VaultPlan) -> String {
    if plan.is_empty() {
        return "every file is needed".to_owned();
    }
    format!("{}{}", files(plan), sum(plan, ["would be removed", "would be written anew"]))
}
