//! `godwit host`: hosts, and how they join.

mod check;

use clap::{Args, Subcommand};
use godwit_api::v1::{Host, HostSet, JoinTokenCreate};
use godwit_model::{DroppedFrames, Millis, Name};

use crate::arguments::{Bandwidth, OnlineArgs};
use crate::confirm::ConfirmArgs;
use crate::daemon::join;
use crate::error::Failure;
use crate::output::{Facts, Table, note, or_nothing, print, print_data, word};
use crate::session::Session;
use crate::text::moment;
use crate::watch::watch;

/// `godwit host`.
#[derive(Args)]
pub(crate) struct HostArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Print a token with which one host can join, once
    #[command(after_help = "Example, with the new host reachable by ssh:
  godwit host token h7 | ssh h7 godwit host join --controller gw.example.org:7444 --name h7 \\
      --address 10.0.0.7 --state-dir /var/lib/godwit/agent")]
    Token {
        /// The only host that can use it
        name: Name,
        /// For a host that has joined before and lost its key, or let its certificate end
        #[arg(long)]
        rejoin: bool,
        /// How long it can be used, such as 10m; an hour by default, at most a day
        #[arg(long, value_name = "TIME")]
        lifetime: Option<Millis>,
        #[command(flatten)]
        online: OnlineArgs,
    },
    /// Make this machine a host of the cluster
    Join(join::JoinArgs),
    /// Look whether this machine can be a host: each finding with its fix
    Check(check::CheckArgs),
    /// Remove a host: its certificate is refused at once, by the controller and by the other hosts
    #[command(
        after_help = "It is refused while VMs are there. Forced, the VMs are not taken for dead: they stay as last known, run on if they
run, and start nowhere else until the host has joined again under its name (`godwit host token NAME`, then
`godwit host join --rejoin` there)."
    )]
    Remove {
        /// Its name
        name: Name,
        /// Also with VMs there, which nothing can be told to any more
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        confirm: ConfirmArgs,
        #[command(flatten)]
        online: OnlineArgs,
    },
    /// Change what a host may do; it counts at once
    Set {
        /// Its name
        name: Name,
        /// What all migrations that leave it may take of the wire together, such as 1gbit or 50MiB/s; `none` is no limit
        #[arg(long, value_name = "RATE")]
        migration_bandwidth: Bandwidth,
        #[command(flatten)]
        online: OnlineArgs,
    },
    /// List hosts
    List {
        /// Go on with every change, as JSON lines
        #[arg(long)]
        watch: bool,
        #[command(flatten)]
        online: OnlineArgs,
    },
    /// Show a host, and what limits it
    Show {
        /// Its name
        name: Name,
        #[command(flatten)]
        online: OnlineArgs,
    },
}

pub(crate) fn run(args: HostArgs) -> Result<(), Failure> {
    match args.verb {
        Verb::Token { name, rejoin, lifetime, online } => {
            let session = Session::open(&online)?;
            let request = JoinTokenCreate { host: name, lifetime, rejoin };
            let created = crate::block_on(async { Ok(session.client.create_join_token(&request).await?) })?;
            note(&format!("lets {} join once, until {}; it is not shown again", request.host, moment(created.expires)));
            print_data(session.format, &created, || created.token.clone())
        }
        Verb::Join(args) => join::run(args),
        Verb::Check(args) => check::run(args),
        Verb::Remove { name, force, confirm, online } => {
            let session = Session::open(&online)?;
            crate::block_on(remove(&session, &name, force, &confirm))
        }
        Verb::Set { name, migration_bandwidth: Bandwidth(migration_bandwidth), online } => {
            let session = Session::open(&online)?;
            let host = crate::block_on(async { Ok(session.client.set_host(&name, &HostSet { migration_bandwidth }).await?) })?;
            print_data(session.format, &host, || format!("migrations that leave {name} may take {}", allowed(&host)))
        }
        Verb::List { watch, online } => crate::block_on(list(Session::open(&online)?, watch)),
        Verb::Show { name, online } => {
            let session = Session::open(&online)?;
            let host = crate::block_on(async { Ok(session.client.host(&name).await?) })?;
            print_data(session.format, &host, || show(&host))
        }
    }
}

/// What migrations that leave a host may take.
fn allowed(host: &Host) -> String {
    host.migration_bandwidth.map_or_else(|| "any bandwidth".to_owned(), |limit| format!("{limit} together"))
}

async fn remove(session: &Session, name: &Name, force: bool, confirm: &ConfirmArgs) -> Result<(), Failure> {
    let host = session.client.host(name).await?;
    let vms = host.load.as_ref().filter(|_| host.connected).map_or(0, |load| load.vms);
    let left = match (force, vms) {
        (true, 1..) => format!(", with {vms} VMs on it that nothing can be told to any more"),
        (true, 0) => ", also if VMs are on it".to_owned(),
        (false, _) => String::new(),
    };
    let what = format!("host {name} would be removed{left}");
    if confirm.dry_run {
        return print(&what);
    }
    confirm.confirm(&format!("remove host {name}{left}"))?;
    session.client.delete_host(name, force).await?;
    print(&format!("host {name} removed"))
}

async fn list(session: Session, watching: bool) -> Result<(), Failure> {
    if watching {
        return watch::<Host>(&session.client).await;
    }
    let hosts = session.client.hosts().await?;
    print_data(session.format, &hosts, || {
        let mut table = Table::new(&["NAME", "STATE", "ADDRESS", "VMS", "FREE", "MEMORY", "ACCELERATOR", "QEMU", "CONDITIONS"]);
        for host in &hosts {
            let (facts, load) = (host.facts.as_ref(), host.load.as_ref());
            table.row([
                host.name.to_string(),
                state(host).to_owned(),
                host.address.clone(),
                or_nothing(load.map(|load| load.vms)),
                or_nothing(load.map(|load| load.memory_free)),
                or_nothing(facts.map(|facts| facts.memory)),
                or_nothing(facts.map(|facts| word(&facts.accelerator))),
                or_nothing(facts.map(|facts| &facts.qemu)),
                or_nothing(facts.map(|facts| facts.conditions.len()).filter(|&count| count > 0)),
            ]);
        }
        table.render()
    })
}

fn show(host: &Host) -> String {
    let mut facts = Facts::default();
    facts.fact("Name", &host.name).fact("State", format!("{} since {}", state(host), moment(host.since)));
    facts.fact("Address", &host.address).fact("Moves at", or_nothing(host.migration_address.as_ref()));
    facts.fact("Migrations take", allowed(host));
    if let Some(load) = &host.load {
        facts.fact("VMs", load.vms).fact("Memory free", load.memory_free);
        let networks = &load.networks;
        facts.fact("Overlay MTU", or_nothing(networks.overlay_mtu));
        for bridge in &networks.bridges {
            let uplink = bridge.uplink.as_ref().map(|uplink| format!(", uplink {uplink}")).unwrap_or_default();
            facts.fact("Bridge", format!("{}: MTU {}{uplink}", bridge.name, bridge.mtu));
        }
        facts.fact("Dropped", dropped(&networks.dropped));
        if networks.strangers > 0 {
            facts.fact("Dropped VXLAN", format!("{} from addresses that are no hosts of the cluster", networks.strangers));
        }
    }
    if let Some(known) = &host.facts {
        facts.fact("Memory", known.memory).fact("CPUs", known.cpus);
        facts.fact("Accelerator", format!("{}: {}", word(&known.accelerator), known.accelerator_reason));
        facts.fact("QEMU", &known.qemu).fact("Agent", &known.agent);
        facts
            .fact("CPU models", known.cpu_models.join(" "))
            .fact("Machines", format!("{} (`-o yaml` lists them)", known.machines.len()));
        for pool in &known.pools {
            let shared = if pool.shared { ", shared" } else { "" };
            let free = host.load.iter().flat_map(|load| &load.pools_free).find(|(name, _)| *name == pool.name);
            let free = free.map(|(_, free)| format!(", {free} free")).unwrap_or_default();
            facts.fact("Pool", format!("{}: {}{free}{shared}", pool.name, pool.capacity));
        }
        for condition in &known.conditions {
            facts.fact("Condition", format!("{}: {}", condition.name, condition.message)).fact("  fix", &condition.fix);
        }
    }
    facts.render()
}

/// What was dropped, by reason; nothing if nothing was.
pub(crate) fn dropped(frames: &DroppedFrames) -> String {
    let reasons: Vec<String> =
        frames.each().filter(|(_, count)| *count > 0).map(|(reason, count)| format!("{count} {reason}")).collect();
    if reasons.is_empty() { String::new() } else { format!("{} frames of guests: {}", frames.total(), reasons.join(", ")) }
}

fn state(host: &Host) -> &'static str {
    if host.connected { "connected" } else { "not connected" }
}
