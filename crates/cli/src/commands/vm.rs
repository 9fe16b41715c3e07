//! `godwit vm`: virtual machines.

mod console;
mod create;
mod delete;
mod migrate;
mod power;

use clap::Subcommand;
use godwit_api::v1::Vm;
use godwit_model::{Boot, Name};

use crate::commands::host::dropped;
use crate::commands::pool::conditions;
use crate::error::Failure;
use crate::output::{Facts, Table, or_nothing, print_data, word};
use crate::session::Session;
use crate::text::moment;
use crate::watch::watch;

/// What can be done with VMs.
#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Create a VM, and start it if asked to
    Create(create::CreateArgs),
    /// List VMs
    List {
        /// Go on with every change, as JSON lines
        #[arg(long)]
        watch: bool,
    },
    /// Show a VM
    Show {
        /// Its name
        name: Name,
    },
    /// Start VMs
    Start(power::StartArgs),
    /// Ask the guests to power off, and wait until they have
    Stop(power::StopArgs),
    /// End VMs without asking their guests
    Kill(power::PowerArgs),
    /// Let VMs stand still
    Pause(power::PowerArgs),
    /// Let paused VMs run on
    Unpause(power::PowerArgs),
    /// Delete VMs
    Delete(delete::DeleteArgs),
    /// Move a running VM to another host
    Migrate(migrate::MigrateArgs),
    /// Open the serial console; Ctrl-] leaves it
    Console(console::ConsoleArgs),
}

pub(crate) async fn run(session: Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::Create(args) => create::run(&session, args).await,
        Verb::List { watch: true } => watch::<Vm>(&session.client).await,
        Verb::List { watch: false } => list(&session).await,
        Verb::Show { name } => {
            let vm = session.client.vm(&name).await?;
            print_data(session.format, &vm, || show(&vm))
        }
        Verb::Start(args) => power::start(&session, args).await,
        Verb::Stop(args) => power::stop(&session, args).await,
        Verb::Kill(args) => power::kill(&session, args).await,
        Verb::Pause(args) => power::pause(&session, args).await,
        Verb::Unpause(args) => power::unpause(&session, args).await,
        Verb::Delete(args) => delete::run(&session, args).await,
        Verb::Migrate(args) => migrate::run(&session, args).await,
        Verb::Console(args) => console::run(&session, args).await,
    }
}

async fn list(session: &Session) -> Result<(), Failure> {
    let vms = session.client.vms().await?;
    print_data(session.format, &vms, || {
        let mut table = Table::new(&["NAME", "STATE", "HOST", "VCPUS", "MEMORY", "ACTIVITY", "TEAM", "CONDITIONS"]);
        for vm in &vms {
            let names: Vec<&str> = vm.status.conditions.iter().map(|condition| condition.name.as_str()).collect();
            table.row([
                vm.name.to_string(),
                word(&vm.status.state),
                or_nothing(vm.status.host.as_ref()),
                vm.spec.vcpus.to_string(),
                vm.spec.memory.to_string(),
                or_nothing(vm.status.activity.map(|activity| word(&activity.request))),
                vm.team.to_string(),
                names.join(", "),
            ]);
        }
        table.render()
    })
}

fn show(vm: &Vm) -> String {
    let mut facts = Facts::default();
    let status = &vm.status;
    facts.fact("Name", &vm.name).fact("Id", vm.id).fact("Team", &vm.team).fact("Created", moment(vm.created));
    facts.fact("State", format!("{} since {}", word(&status.state), moment(status.since)));
    facts.fact("Host", or_nothing(status.host.as_ref())).fact("Generation", status.generation);
    if let Some(activity) = status.activity {
        facts.fact("Activity", format!("{}, task {}", word(&activity.request), activity.task));
    }
    facts.fact("vCPUs", vm.spec.vcpus).fact("Memory", vm.spec.memory);
    match &vm.spec.boot {
        Boot::Kernel { kernel, initrd, cmdline } => {
            facts.fact("Kernel", kernel).fact("Initrd", or_nothing(initrd.as_ref())).fact("Command line", cmdline);
        }
        Boot::Disk => {
            facts.fact("Boots", "the first disk");
        }
    }
    for disk in &vm.spec.disks {
        let (size, image) = (disk.size.map(|size| format!(", {size}")), disk.image.as_ref().map(|image| format!(", from {image}")));
        let (format, cache) = (word(&disk.format), word(&disk.cache));
        facts.fact("Disk", format!("{}: {format}, {cache}{}{}", disk.volume, size.unwrap_or_default(), image.unwrap_or_default()));
    }
    for (index, nic) in vm.spec.nics.iter().enumerate() {
        let mac = status.macs.get(index).cloned().or_else(|| nic.mac.map(|mac| mac.to_string()));
        facts.fact("Interface", format!("{} {}", nic.network, mac.unwrap_or_default()));
    }
    for interface in &status.dropped {
        facts.fact("Dropped", format!("interface {}, {}", interface.slot, dropped(&interface.dropped)));
    }
    match &status.started {
        Some(started) => facts.fact("Started as", format!("{}, {}, {}", started.machine, started.cpu, word(&started.accelerator))),
        None => facts.fact("Machine", or_nothing(vm.spec.machine.as_ref())).fact("CPU model", or_nothing(vm.spec.cpu.as_ref())),
    };
    conditions(&mut facts, &status.conditions);
    facts.render()
}
