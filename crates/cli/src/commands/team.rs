//! `godwit team`: owners of objects.

use clap::{Subcommand, ValueEnum};
use godwit_api::v1::{TeamCreate, TeamSet};
use godwit_model::Name;

use crate::error::Failure;
use crate::output::{Table, print_data};
use crate::session::Session;
use crate::text::moment;

/// What can be done with teams.
#[derive(Subcommand)]
pub(crate) enum Verb {
    /// List teams
    List,
    /// Create a team
    Create {
        /// Its name
        name: Name,
        /// Pages that its VMs have in common do not travel to a host on which one of them runs already
        #[arg(long)]
        share_memory: bool,
    },
    /// Change a team
    Set {
        /// Its name
        name: Name,
        /// Whether pages that its VMs have in common do not travel; `docs/threat-model.md` says what they learn about each other by that
        #[arg(long, value_name = "ON|OFF")]
        share_memory: Switch,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

pub(crate) async fn run(session: Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List => {
            let teams = session.client.teams().await?;
            print_data(session.format, &teams, || {
                let mut table = Table::new(&["NAME", "SHARES MEMORY", "CREATED"]);
                for team in &teams {
                    let shares = if team.share_memory { "yes" } else { "no" };
                    table.row([team.name.to_string(), shares.to_owned(), moment(team.created)]);
                }
                table.render()
            })
        }
        Verb::Set { name, share_memory } => {
            let share_memory = share_memory == Switch::On;
            let team = session.client.set_team(&name, &TeamSet { share_memory }).await?;
            let does = if team.share_memory { "share" } else { "do not share" };
            print_data(session.format, &team, || format!("VMs of team {} {does} memory where they move", team.name))
        }
        Verb::Create { name, share_memory } => {
            let team = session.client.create_team(&TeamCreate { name, share_memory }).await?;
            print_data(session.format, &team, || format!("team {} created", team.name))
        }
    }
}
