//! `godwit network`: layer-2 networks of VMs across hosts.

use clap::Subcommand;

use crate::error::Failure;
use crate::output::{Table, print_data};
use crate::session::Session;

/// What can be done with networks.
#[derive(Subcommand)]
pub(crate) enum Verb {
    /// List networks
    List,
}

pub(crate) async fn run(session: Session, verb: Verb) -> Result<(), Failure> {
    let Verb::List = verb;
    let networks = session.client.networks().await?;
    print_data(session.format, &networks, || {
        let mut table = Table::new(&["NAME", "VNI"]);
        for network in &networks {
            table.row([network.name.to_string(), network.vni.to_string()]);
        }
        table.render()
    })
}
