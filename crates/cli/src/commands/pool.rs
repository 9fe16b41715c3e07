//! `godwit pool`: where volumes are kept.

use clap::Subcommand;
use godwit_api::v1::{Condition, Pool};
use godwit_model::Name;

use crate::error::Failure;
use crate::output::{Facts, Table, print_data};
use crate::session::Session;

/// What can be done with pools.
#[derive(Subcommand)]
pub(crate) enum Verb {
    /// List pools
    List,
    /// Show a pool
    Show {
        /// Its name
        name: Name,
    },
}

pub(crate) async fn run(session: Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List => {
            let pools = session.client.pools().await?;
            print_data(session.format, &pools, || {
                let mut table = Table::new(&["NAME", "SHARED", "FREE", "CAPACITY", "HOSTS", "CONDITIONS"]);
                for pool in &pools {
                    let conditions: Vec<&str> = pool.conditions.iter().map(|condition| condition.name.as_str()).collect();
                    table.row([
                        pool.name.to_string(),
                        shared(pool).to_owned(),
                        pool.free.to_string(),
                        pool.capacity.to_string(),
                        hosts(pool),
                        conditions.join(", "),
                    ]);
                }
                table.render()
            })
        }
        Verb::Show { name } => {
            let pool = session.client.pool(&name).await?;
            print_data(session.format, &pool, || {
                let mut facts = Facts::default();
                facts
                    .fact("Name", &pool.name)
                    .fact("Shared", shared(&pool))
                    .fact("Free", pool.free)
                    .fact("Capacity", pool.capacity);
                facts.fact("Hosts", hosts(&pool));
                conditions(&mut facts, &pool.conditions);
                facts.render()
            })
        }
    }
}

fn shared(pool: &Pool) -> &'static str {
    if pool.shared { "yes" } else { "no" }
}

fn hosts(pool: &Pool) -> String {
    pool.hosts.iter().map(Name::as_str).collect::<Vec<_>>().join(", ")
}

/// Adds what is not as it should be, each with its fix.
pub(crate) fn conditions(facts: &mut Facts, conditions: &[Condition]) {
    for condition in conditions {
        facts.fact("Condition", format!("{}: {}", condition.name, condition.message)).fact("  fix", &condition.fix);
    }
}
