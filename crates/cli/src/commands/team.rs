//! `godwit team`: owners of objects.

use clap::Subcommand;
use godwit_api::v1::TeamCreate;
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
    },
}

pub(crate) async fn run(session: Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List => {
            let teams = session.client.teams().await?;
            print_data(session.format, &teams, || {
                let mut table = Table::new(&["NAME", "CREATED"]);
                for team in &teams {
                    table.row([team.name.to_string(), moment(team.created)]);
                }
                table.render()
            })
        }
        Verb::Create { name } => {
            let team = session.client.create_team(&TeamCreate { name }).await?;
            print_data(session.format, &team, || format!("team {} created", team.name))
        }
    }
}
