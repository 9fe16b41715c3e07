//! `godwit vm`: virtual machines.

mod check;
mod console;
mod create;
mod delete;
mod exec;
mod history;
mod migrate;
mod power;
mod set;

pub(crate) use set::{change_labels, parse_label, shown_labels};

use clap::Subcommand;
use godwit_api::v1::Vm;
use godwit_model::{Boot, Firmware, GuestFacts, Name};

use crate::commands::host::dropped;
use crate::commands::pool::conditions;
use crate::error::Failure;
use crate::limits::shown;
use crate::output::{Facts, Table, or_nothing, print_data, word};
use crate::session::Session;
use crate::text::{moment, visible};
use crate::watch::watch;

/// What can be done with VMs.
#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Create a VM, and start it if asked to
    Create(Box<create::CreateArgs>),
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
    /// Change what a VM is made of
    Set(Box<set::SetArgs>),
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
    /// Keep VMs with their memory, and end QEMU
    #[command(
        after_help = "A VM stands still while it is kept, in a snapshot NAME-suspended, and is stopped then. `godwit vm unsuspend` lets it go on where it was, and so does `godwit
vm start`. It takes QEMU 9.0 or newer; where a VM cannot be suspended it runs on.

Example:\n  godwit vm suspend web1 && godwit vm unsuspend web1 --host h2"
    )]
    Suspend(power::PowerArgs),
    /// Let suspended VMs go on; so does `start`
    Unsuspend(power::StartArgs),
    /// Delete VMs
    Delete(delete::DeleteArgs),
    /// Say whether a running VM could move, and what is in the way
    Check(check::CheckArgs),
    /// Show every generation of a VM: where it ran, from when to when, and why
    History {
        /// Its name
        name: Name,
    },
    /// Move a running VM to another host
    Migrate(migrate::MigrateArgs),
    /// Open the serial console; Ctrl-] leaves it
    Console(console::ConsoleArgs),
    /// Run a program in the guest, and end as it ends
    Exec(exec::ExecArgs),
}

pub(crate) async fn run(session: Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::Create(args) => create::run(&session, *args).await,
        Verb::List { watch: true } => watch::<Vm>(&session.client).await,
        Verb::List { watch: false } => list(&session).await,
        Verb::Show { name } => {
            let vm = session.client.vm(&name).await?;
            print_data(session.format, &vm, || show(&vm))
        }
        Verb::Set(args) => set::run(&session, *args).await,
        Verb::Start(args) => power::start(&session, args).await,
        Verb::Stop(args) => power::stop(&session, args).await,
        Verb::Kill(args) => power::kill(&session, args).await,
        Verb::Pause(args) => power::pause(&session, args).await,
        Verb::Unpause(args) => power::unpause(&session, args).await,
        Verb::Suspend(args) => power::suspend(&session, args).await,
        Verb::Unsuspend(args) => power::unsuspend(&session, args).await,
        Verb::Delete(args) => delete::run(&session, args).await,
        Verb::Check(args) => check::run(&session, args).await,
        Verb::History { name } => history::run(&session, &name).await,
        Verb::Migrate(args) => migrate::run(&session, args).await,
        Verb::Console(args) => console::run(&session, args).await,
        Verb::Exec(args) => exec::run(&session, args).await,
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

/// What the guest says of itself. Its addresses first: they are what is looked for.
fn show_guest(facts: &mut Facts, guest: &GuestFacts) {
    for interface in &guest.interfaces {
        let addresses: Vec<String> =
            interface.addresses.iter().filter(|address| address.is_reachable()).map(ToString::to_string).collect();
        if !addresses.is_empty() {
            facts.fact("Address", format!("{} on {}", addresses.join(", "), interface.name));
        }
    }
    facts.fact("Host name", or_nothing(guest.host_name.as_ref())).fact("System", or_nothing(guest.os.as_ref()));
    facts.fact("Guest agent", format!("{}, seen {}", guest.agent, moment(guest.seen)));
    if let Some(clock) = &guest.clock {
        let forward = clock.put_forward_ms.map(|by| format!(", after it was put forward by {by} ms")).unwrap_or_default();
        let offset = clock.offset_ms;
        facts.fact("Guest clock", format!("{offset:+} ms beside its host's, give or take {} ms{forward}", clock.within_ms));
    }
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
    if let Some(migratable) = &status.migratable {
        let since = moment(migratable.since);
        let reason = migratable.reason.as_ref().map(|reason| format!(": {}", visible(&reason.message))).unwrap_or_default();
        facts.fact("Migratable", format!("{} since {since}{reason}", if migratable.possible { "yes" } else { "no" }));
    }
    let grows = vm.spec.memory_max.map(|max| format!(", grows to {max}")).unwrap_or_default();
    facts.fact("vCPUs", vm.spec.vcpus).fact("Memory", format!("{}{grows}", vm.spec.memory));
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
    for (drive, cdrom) in vm.spec.cdroms.iter().enumerate() {
        facts.fact("CD-ROM", format!("drive {drive}: {}", cdrom.image.as_ref().map_or("empty", Name::as_str)));
    }
    if let Firmware::Uefi { variables, secure_boot } = &vm.spec.firmware {
        let with = if *secure_boot { ", Secure Boot" } else { "" };
        facts.fact("Firmware", format!("UEFI{with}, variables in {variables}"));
    }
    if let Some(tpm) = &vm.spec.tpm {
        facts.fact("TPM", format!("{}, state in {}", word(&tpm.version), tpm.state));
    }
    if let Some(labels) = shown_labels(&vm.spec.labels) {
        facts.fact("Labels", labels);
    }
    if let Some(limits) = shown(&vm.spec.migration) {
        facts.fact("Migrations", limits);
    }
    if let Some(rate) = status.dirty_rate {
        facts.fact("Writes", rate);
    }
    if let Some(quiet) = &status.quiet {
        facts.fact("Writes least", quiet);
    }
    for interface in &status.dropped {
        facts.fact("Dropped", format!("interface {}, {}", interface.slot, dropped(&interface.dropped)));
    }
    match &status.started {
        Some(started) => facts.fact("Started as", format!("{}, {}, {}", started.machine, started.cpu, word(&started.accelerator))),
        None => facts.fact("Machine", or_nothing(vm.spec.machine.as_ref())).fact("CPU model", or_nothing(vm.spec.cpu.as_ref())),
    };
    for waiting in &status.waiting {
        let shown = |value: &serde_json::Value| if value.is_null() { "nothing".to_owned() } else { value.to_string() };
        let reason = waiting.reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default();
        let change = format!("{}: {} -> {}{reason}", waiting.field, shown(&waiting.running), shown(&waiting.wanted));
        facts.fact("Waits for next start", visible(&change));
    }
    if let Some(guest) = &status.guest {
        show_guest(&mut facts, guest);
    }
    conditions(&mut facts, &status.conditions);
    facts.render()
}
