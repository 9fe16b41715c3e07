//! `godwit policy`: what is said of the migrations of VMs with certain labels.

use std::collections::BTreeMap;

use clap::{Args, Subcommand};
use godwit_api::v1::{Policy, PolicyCreate, PolicySet};
use godwit_model::policy::Labelled;
use godwit_model::{MigrationSettings, Name};

use crate::commands::vm::{change_labels, parse_label, shown_labels};
use crate::confirm::{ConfirmArgs, each};
use crate::error::Failure;
use crate::limits::{KeptLimitArgs, LimitName, shown};
use crate::output::{Facts, Table, or_nothing, print, print_data};
use crate::session::Session;
use crate::text::moment;
use crate::watch::watch;

/// What can be done with policies.
#[derive(Subcommand)]
pub(crate) enum Verb {
    /// List policies
    List {
        /// Go on with every change, as JSON lines
        #[arg(long)]
        watch: bool,
    },
    /// Show a policy, and the VMs that it is said of
    Show {
        /// Its name
        name: Name,
    },
    /// Create a policy for VMs that have certain labels
    #[command(
        after_help = "What a request says goes before what the VM says (`godwit vm set`), and that before policies. Of several policies the one \
with the most labels counts, then the first by name, each for what those before it do not say. The one exception is `--postcopy never`, which \
counts wherever it is said. Migrations that run keep their limits.

Examples:
  godwit policy create everything --bandwidth 2gbit
  godwit policy create databases --label tier=db --max-blackout 100ms --on-miss wait-for-quiet,throttle --postcopy never
  godwit vm set db1 --label tier=db && godwit vm migrate db1 --to h2 --dry-run"
    )]
    Create(CreateArgs),
    /// Change a policy
    Set(SetArgs),
    /// Delete policies
    Delete {
        /// Their names
        #[arg(required = true, value_name = "NAME")]
        names: Vec<Name>,
        #[command(flatten)]
        confirm: ConfirmArgs,
    },
}

/// What to create.
#[derive(Args)]
pub(crate) struct CreateArgs {
    /// Name of the policy
    name: Name,
    /// A label that a VM must have: KEY=TEXT; can be repeated. Without any it is said of every VM of the team
    #[arg(long = "label", value_name = "KEY=TEXT", value_parser = parse_label)]
    labels: Vec<(Name, String)>,
    #[command(flatten)]
    limits: KeptLimitArgs,
}

/// What to change.
#[derive(Args)]
pub(crate) struct SetArgs {
    /// Name of the policy
    name: Name,
    /// A label that a VM must have, or need not have any more: KEY=TEXT or KEY=; can be repeated
    #[arg(long = "label", value_name = "KEY=TEXT", value_parser = parse_label)]
    labels: Vec<(Name, String)>,
    #[command(flatten)]
    limits: KeptLimitArgs,
    /// Say nothing of this any more; can be repeated
    #[arg(long, value_name = "LIMIT")]
    unset: Vec<LimitName>,
}

pub(crate) async fn run(session: Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List { watch: true } => watch::<Policy>(&session.client).await,
        Verb::List { watch: false } => {
            let policies = session.client.policies().await?;
            print_data(session.format, &policies, || {
                let mut table = Table::new(&["NAME", "LABELS", "SAYS", "TEAM"]);
                for policy in &policies {
                    table.row([
                        policy.name.to_string(),
                        labels(&policy.labels),
                        or_nothing(shown(&policy.limits)),
                        policy.team.to_string(),
                    ]);
                }
                table.render()
            })
        }
        Verb::Show { name } => {
            let policy = session.client.policy(&name).await?;
            let vms = session.client.vms().await?;
            let said = Labelled { name: &policy.name, labels: &policy.labels, limits: policy.limits };
            let of: Vec<&str> = vms.iter().filter(|vm| said.is_of(&vm.spec.labels)).map(|vm| vm.name.as_str()).collect();
            print_data(session.format, &policy, || show(&policy, &of))
        }
        Verb::Create(CreateArgs { name, labels, limits }) => {
            let request = PolicyCreate { name, labels: labels.into_iter().collect(), limits: limits.settings() };
            if request.limits == MigrationSettings::default() {
                return Err(Failure::usage("a policy says something", "`godwit policy create --help` lists the limits"));
            }
            let policy = session.client.create_policy(&request).await?;
            print_data(session.format, &policy, || format!("policy {} created", policy.name))
        }
        Verb::Set(args) => {
            let policy = session.client.policy(&args.name).await?;
            let (mut labels, mut limits) = (policy.labels.clone(), policy.limits);
            change_labels(&mut labels, &args.labels);
            args.limits.change(&mut limits, &args.unset);
            let request = PolicySet { labels: Some(labels), limits: Some(limits) };
            let policy = session.client.set_policy(&args.name, &request, policy.revision).await?;
            print_data(session.format, &policy, || format!("policy {} changed", policy.name))
        }
        Verb::Delete { names, confirm } => delete(&session, &names, &confirm).await,
    }
}

fn labels(labels: &BTreeMap<Name, String>) -> String {
    shown_labels(labels).unwrap_or_else(|| "every VM".to_owned())
}

fn show(policy: &Policy, vms: &[&str]) -> String {
    let mut facts = Facts::default();
    facts.fact("Name", &policy.name).fact("Team", &policy.team).fact("Labels", labels(&policy.labels));
    facts.fact("Says", or_nothing(shown(&policy.limits)));
    facts.fact("VMs", or_nothing((!vms.is_empty()).then(|| vms.join(", "))));
    facts.fact("Created", moment(policy.created));
    facts.render()
}

async fn delete(session: &Session, names: &[Name], confirm: &ConfirmArgs) -> Result<(), Failure> {
    if confirm.dry_run {
        return each(names, async |name| {
            let policy = session.client.policy(name).await?;
            print(&format!("policy {name} ({}) would be deleted", labels(&policy.labels)))
        })
        .await;
    }
    let list: Vec<&str> = names.iter().map(Name::as_str).collect();
    confirm.confirm(&format!("Delete policy {}", list.join(", ")))?;
    each(names, async |name| {
        session.client.delete_policy(name).await?;
        print(&format!("policy {name} deleted"))
    })
    .await
}
