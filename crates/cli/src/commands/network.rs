//! `godwit network`: layer-2 networks of VMs across hosts.

use clap::{Args, Subcommand};
use godwit_api::v1::{Network, NetworkCreate, NetworkSet, Vm};
use godwit_model::{BridgeName, Name, NetworkKind, VlanId};

use crate::commands::pool::conditions;
use crate::confirm::{ConfirmArgs, each};
use crate::error::Failure;
use crate::output::{Facts, Table, or_nothing, print, print_data};
use crate::session::Session;
use crate::text::{moment, visible};
use crate::watch::watch;

/// What can be done with networks.
#[derive(Subcommand)]
pub(crate) enum Verb {
    /// List networks
    List {
        /// Go on with every change, as JSON lines
        #[arg(long)]
        watch: bool,
    },
    /// Show a network, and hosts that cannot take part in it
    Show {
        /// Its name
        name: Name,
    },
    /// Create a network: an overlay between all hosts, or one on a bridge that they have
    #[command(
        after_help = "A bridge is used as it is, and stays as it is when the network is deleted. It must be there under the same name on
every host that shall run VMs of the network. With --vlan the VLAN is taken off the bridge's uplink, its one port that is no VM's.

Examples:
  godwit network create lan
  godwit network create office --bridge br0
  godwit network create voice --bridge br0 --vlan 20 --mtu 1500"
    )]
    Create(CreateArgs),
    /// Change a network
    Set {
        /// Its name
        name: Name,
        /// Largest packet in bytes, 1280 to 9216; VMs are told at their next start
        #[arg(long, value_name = "BYTES")]
        mtu: u32,
    },
    /// Delete networks on which no VM has an interface
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
    /// Name of the network
    name: Name,
    /// A bridge that the hosts have, instead of an overlay; takes an administrator
    #[arg(long, value_name = "BRIDGE")]
    bridge: Option<BridgeName>,
    /// A VLAN of the bridge's uplink, 1 to 4094, instead of the bridge's own frames
    #[arg(long, value_name = "NUMBER", requires = "bridge")]
    vlan: Option<VlanId>,
    /// Largest packet in bytes, 1280 to 9216 [default: what the connected hosts carry, at most 1500]
    #[arg(long, value_name = "BYTES")]
    mtu: Option<u32>,
}

pub(crate) async fn run(session: Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List { watch: true } => watch::<Network>(&session.client).await,
        Verb::List { watch: false } => {
            let networks = session.client.networks().await?;
            print_data(session.format, &networks, || {
                let mut table = Table::new(&["NAME", "KIND", "VNI", "MTU", "TEAM", "CONDITIONS"]);
                for network in &networks {
                    table.row([
                        network.name.to_string(),
                        kind(&network.kind),
                        or_nothing(network.vni),
                        network.mtu.to_string(),
                        network.team.to_string(),
                        or_nothing(Some(network.conditions.len()).filter(|&count| count > 0)),
                    ]);
                }
                table.render()
            })
        }
        Verb::Show { name } => {
            let network = session.client.network(&name).await?;
            print_data(session.format, &network, || show(&network))
        }
        Verb::Create(CreateArgs { name, bridge, vlan, mtu }) => {
            let kind = bridge.map_or_else(NetworkKind::default, |bridge| NetworkKind::Bridge { bridge, vlan });
            let network = session.client.create_network(&NetworkCreate { name, kind, mtu }).await?;
            print_data(session.format, &network, || format!("network {} created, MTU {}", network.name, network.mtu))
        }
        Verb::Set { name, mtu } => {
            let network = session.client.set_network(&name, &NetworkSet { mtu }).await?;
            print_data(session.format, &network, || format!("network {name} has MTU {}", network.mtu))
        }
        Verb::Delete { names, confirm } => delete(&session, &names, &confirm).await,
    }
}

fn kind(kind: &NetworkKind) -> String {
    match kind {
        NetworkKind::Overlay {} => "overlay".to_owned(),
        NetworkKind::Bridge { bridge, vlan: None } => format!("bridge {bridge}"),
        NetworkKind::Bridge { bridge, vlan: Some(vlan) } => format!("bridge {bridge}, VLAN {vlan}"),
    }
}

fn show(network: &Network) -> String {
    let mut facts = Facts::default();
    facts.fact("Name", &network.name).fact("Id", network.id).fact("Team", &network.team);
    facts.fact("Kind", kind(&network.kind)).fact("VNI", or_nothing(network.vni)).fact("MTU", network.mtu);
    facts.fact("Created", moment(network.created));
    conditions(&mut facts, &network.conditions);
    facts.render()
}

async fn delete(session: &Session, names: &[Name], confirm: &ConfirmArgs) -> Result<(), Failure> {
    if confirm.dry_run {
        let vms = session.client.vms().await?;
        return each(names, async |name| {
            let network = session.client.network(name).await?;
            let users: Vec<&str> = vms.iter().filter(|vm| uses(vm, name)).map(|vm| vm.name.as_str()).collect();
            let users = if users.is_empty() { String::new() } else { format!("; VMs are on it: {}", users.join(", ")) };
            print(&visible(&format!("network {name} ({}) would be deleted{users}", kind(&network.kind))))
        })
        .await;
    }
    let list: Vec<&str> = names.iter().map(Name::as_str).collect();
    confirm.confirm(&format!("Delete network {}", list.join(", ")))?;
    each(names, async |name| {
        session.client.delete_network(name).await?;
        print(&format!("network {name} deleted"))
    })
    .await
}

fn uses(vm: &Vm, network: &Name) -> bool {
    vm.spec.nics.iter().any(|nic| nic.network == *network)
}
