//! `godwit snapshot`: VMs as they were, to go back to.

use clap::{ArgAction, Args, Subcommand};
use godwit_api::v1::{
    Snapshot, SnapshotClone, SnapshotCreate, SnapshotExportRequest, SnapshotImport, SnapshotRollback, SnapshotSet, Task, TaskState,
};
use godwit_model::{Bytes, Millis, Name, SnapshotExport, SnapshotFigures, VolumeRef};

use crate::confirm::{ConfirmArgs, each};
use crate::error::Failure;
use crate::output::{Facts, Table, note, or_nothing, print, print_data, word};
use crate::session::{Session, WaitArgs};
use crate::text::{moment, visible};
use crate::watch::watch;

/// Bytes of a page, as figures count them.
const PAGE: u64 = 4_096;

/// What can be done with snapshots.
#[derive(Subcommand)]
pub(crate) enum Verb {
    /// List snapshots
    List {
        /// Only those of this VM
        #[arg(long, value_name = "VM")]
        vm: Option<Name>,
        /// Go on with every change, as JSON lines
        #[arg(long, conflicts_with = "vm")]
        watch: bool,
    },
    /// Show a snapshot
    Show {
        /// Its name
        name: Name,
    },
    /// Take a snapshot of a VM while it runs on
    #[command(
        after_help = "Its disks and, unless --disks-only is given, its memory are kept as they are at one instant. What the team's other snapshots in
the pool have is not kept once more. With --quiesce the guest's agent brings its file systems to rest first.

Examples:
  godwit snapshot create web1 --reason 'before the upgrade'
  godwit snapshot create db1 --name nightly --disks-only --quiesce=30"
    )]
    Create(CreateArgs),
    /// Change a snapshot
    Set {
        /// Its name
        name: Name,
        /// Whether it is kept until somebody says otherwise
        #[arg(long, action = ArgAction::Set, value_name = "true|false")]
        golden: bool,
    },
    /// Make a VM what it was in a snapshot
    #[command(
        after_help = "What the VM is now is kept in a snapshot first; a VM that does not run has to be started for that, or --discard-present be given.
The guest learns from its generation id that it was turned back. A rollback that fails in the middle is done once more, or to another snapshot: until
one ends well the VM does not start.

Examples:
  godwit snapshot rollback web1-20261127-183000
  godwit snapshot rollback nightly --host h2 --discard-present --yes"
    )]
    Rollback(RollbackArgs),
    /// Make a new VM that begins from a snapshot
    #[command(
        after_help = "The new VM has volumes named after it, in the pools of those that it begins from, and addresses of its own; cloud-init sees another machine. It boots
from the disks as they were. With --memory it goes on where the other was, and takes itself for that: none of its interfaces is plugged in. Give it an
identity of its own at its console (`godwit vm console`), with the interface's address that `godwit vm show` has, then `godwit vm set VM --plug MAC`.

Examples:
  godwit snapshot clone nightly web2
  godwit snapshot clone web1-golden web3 --host h2 --start=false"
    )]
    Clone(CloneArgs),
    /// Write a snapshot as files that QEMU takes by itself
    #[command(
        after_help = "A host that has the snapshot's pool writes them into the pool's directory exports, where root alone gets in: they are not encrypted. README.txt
among them says how to start the VM without Godwit.

Examples:
  godwit snapshot export web1-20261127-183000
  godwit snapshot export nightly --host h2"
    )]
    Export(ExportArgs),
    /// Make files a snapshot of a VM
    #[command(
        after_help = "POOL/NAME is the directory imports/TEAM/NAME in the pool of a host, or else exports/TEAM/NAME there. It has a file diskN.qcow2 for each disk of the VM, of
its size, and memory.qemu if --memory is given, which takes the role admin. `godwit snapshot rollback` makes the VM that.

Examples:
  godwit snapshot import from-elsewhere --vm web1 --from shared/web1
  godwit snapshot import back --vm web1 --from shared/nightly --memory --host h2"
    )]
    Import(ImportArgs),
    /// Delete snapshots
    Delete {
        /// Their names
        #[arg(required = true, value_name = "NAME")]
        names: Vec<Name>,
        #[command(flatten)]
        confirm: ConfirmArgs,
    },
}

/// Of which VM, and what of it.
#[derive(Args)]
pub(crate) struct CreateArgs {
    /// The VM
    vm: Name,
    /// Name of the snapshot [default: the VM's, with the moment in UTC]
    #[arg(long)]
    name: Option<Name>,
    /// Without memory: the VM boots from its disks
    #[arg(long)]
    disks_only: bool,
    /// Bring the guest's file systems to rest first, within so many seconds [default: 10]
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true, default_missing_value = "10",
        value_parser = clap::value_parser!(u64).range(1..=60))]
    quiesce: Option<u64>,
    /// The pool that is to hold it [default: that of the VM's first disk, else a shared one]
    #[arg(long)]
    pool: Option<Name>,
    /// Keep it until somebody says otherwise
    #[arg(long)]
    golden: bool,
    /// Why; recorded with it
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    #[command(flatten)]
    wait: WaitArgs,
}

/// To which snapshot, and where.
#[derive(Args)]
pub(crate) struct RollbackArgs {
    /// The snapshot
    name: Name,
    /// The host [default: the VM's, else the one where the snapshot was taken, else any that has its pool]
    #[arg(long)]
    host: Option<Name>,
    /// Lose what the VM is now
    #[arg(long)]
    discard_present: bool,
    /// Why; recorded with the task
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    #[command(flatten)]
    confirm: ConfirmArgs,
    #[command(flatten)]
    wait: WaitArgs,
}

/// From which snapshot, and what becomes of it.
#[derive(Args)]
pub(crate) struct CloneArgs {
    /// The snapshot
    name: Name,
    /// Name of the new VM
    #[arg(value_name = "NEWVM")]
    vm: Name,
    /// The host [default: the one with most free memory that has the snapshot's pool]
    #[arg(long)]
    host: Option<Name>,
    /// Whether it is started, which makes its volumes; otherwise its first start does so
    #[arg(long, action = ArgAction::Set, value_name = "true|false", default_value_t = true)]
    start: bool,
    /// Go on from memory, with no interface plugged in
    #[arg(long)]
    memory: bool,
    /// Why; recorded with the task
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    #[command(flatten)]
    wait: WaitArgs,
}

/// Which snapshot, and where.
#[derive(Args)]
pub(crate) struct ExportArgs {
    /// The snapshot
    name: Name,
    /// The host that writes it [default: the one where it was taken, else any that has its pool]
    #[arg(long)]
    host: Option<Name>,
    /// Why; recorded with the task
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    #[command(flatten)]
    wait: WaitArgs,
}

/// Of which VM, and from where.
#[derive(Args)]
pub(crate) struct ImportArgs {
    /// Name of the snapshot
    name: Name,
    /// The VM
    #[arg(long)]
    vm: Name,
    /// The directory of the files
    #[arg(long, value_name = "POOL/NAME")]
    from: VolumeRef,
    /// With memory, too: only from a source that is trusted
    #[arg(long)]
    memory: bool,
    /// The host that reads them [default: the VM's, else any that has the pool]
    #[arg(long)]
    host: Option<Name>,
    /// Keep it until somebody says otherwise
    #[arg(long)]
    golden: bool,
    /// Why; recorded with it
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    #[command(flatten)]
    wait: WaitArgs,
}

pub(crate) async fn run(session: Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List { watch: true, .. } => watch::<Snapshot>(&session.client).await,
        Verb::List { vm, watch: false } => list(&session, vm.as_ref()).await,
        Verb::Show { name } => {
            let snapshot = session.client.snapshot(&name).await?;
            print_data(session.format, &snapshot, || show(&snapshot))
        }
        Verb::Create(args) => create(&session, args).await,
        Verb::Set { name, golden } => {
            let snapshot = session.client.set_snapshot(&name, &SnapshotSet { golden: Some(golden) }).await?;
            let is = if snapshot.golden { "is golden" } else { "can be deleted" };
            print_data(session.format, &snapshot, || format!("snapshot {name} {is}"))
        }
        Verb::Rollback(args) => rollback(&session, args).await,
        Verb::Clone(args) => clone(&session, args).await,
        Verb::Export(args) => export(&session, args).await,
        Verb::Import(args) => import(&session, args).await,
        Verb::Delete { names, confirm } => delete(&session, &names, &confirm).await,
    }
}

async fn list(session: &Session, vm: Option<&Name>) -> Result<(), Failure> {
    let snapshots = session.client.snapshots(vm).await?;
    print_data(session.format, &snapshots, || {
        let mut table = Table::new(&["NAME", "VM", "CREATED", "STATE", "MEMORY", "NEW", "POOL", "GOLDEN", "TEAM"]);
        for snapshot in &snapshots {
            table.row([
                snapshot.name.to_string(),
                snapshot.vm.to_string(),
                moment(snapshot.created),
                word(&snapshot.state),
                or_nothing(snapshot.memory),
                or_nothing(snapshot.figures.as_ref().map(new)),
                snapshot.pool.to_string(),
                if snapshot.golden { "yes".to_owned() } else { String::new() },
                snapshot.team.to_string(),
            ]);
        }
        table.render()
    })
}

/// What it has that the vault had not.
fn new(figures: &SnapshotFigures) -> Bytes {
    Bytes(figures.pages_new.saturating_mul(PAGE))
}

fn micros(us: u64) -> String {
    format!("{}.{} ms", us / 1_000, us % 1_000 / 100)
}

fn show(snapshot: &Snapshot) -> String {
    let mut facts = Facts::default();
    facts.fact("Name", &snapshot.name).fact("Id", snapshot.id).fact("Team", &snapshot.team).fact("VM", &snapshot.vm);
    facts.fact("State", word(&snapshot.state)).fact("Created", moment(snapshot.created)).fact("Asked by", &snapshot.principal);
    facts.fact("Reason", or_nothing(snapshot.reason.as_ref()));
    facts.fact("Pool", &snapshot.pool).fact("Taken on", &snapshot.host).fact("Golden", if snapshot.golden { "yes" } else { "no" });
    facts.fact("Memory", snapshot.memory.map_or_else(|| "none: it boots".to_owned(), |memory| memory.to_string()));
    for disk in &snapshot.disks {
        let size = disk.size.map(|size| format!(", {size}")).unwrap_or_default();
        facts.fact("Disk", format!("{}{size}", disk.volume));
    }
    if let Some(figures) = &snapshot.figures {
        let pages = |count: u64| Bytes(count.saturating_mul(PAGE));
        facts.fact("Took", Millis(figures.took_ms)).fact("Pause", or_nothing(figures.pause_us.map(micros)));
        facts.fact("New", new(figures)).fact("Known before", pages(figures.pages_known));
        facts.fact("Written", figures.written).fact("Disks read", figures.disks_read);
        for warning in &figures.warnings {
            facts.fact("Warning", warning);
        }
    }
    facts.render()
}

async fn create(session: &Session, args: CreateArgs) -> Result<(), Failure> {
    let CreateArgs { vm, name, disks_only, quiesce, pool, golden, reason, wait } = args;
    let quiesce = quiesce.map(|seconds| Millis(seconds.saturating_mul(1_000)));
    let request = SnapshotCreate { vm, name, memory: !disks_only, quiesce, pool, golden, reason };
    let task = session.client.create_snapshot(&request).await?;
    session
        .conclude(task, &wait, None, async |task| {
            let taken = match &task.snapshot {
                Some(name) => session.client.snapshot(name).await.ok(),
                None => None,
            };
            taken.map_or_else(|| format!("{} is kept", task.subject), |snapshot| told(&snapshot))
        })
        .await
}

/// What a snapshot came to, in one line; what it could not do as asked goes to standard error.
fn told(snapshot: &Snapshot) -> String {
    let Snapshot { name, vm, memory, .. } = snapshot;
    let memory = memory.map_or_else(|| "disks only".to_owned(), |memory| format!("{memory} memory"));
    let Some(figures) = &snapshot.figures else { return format!("{name} of {vm}: {memory}") };
    for warning in &figures.warnings {
        note(&format!("warning: {}", visible(warning)));
    }
    let pause = figures.pause_us.map_or_else(|| "no pause".to_owned(), |us| format!("pause {}", micros(us)));
    format!("{name} of {vm}: {memory}, {pause}, {} new, {}", new(figures), Millis(figures.took_ms))
}

async fn rollback(session: &Session, args: RollbackArgs) -> Result<(), Failure> {
    let RollbackArgs { name, host, discard_present, reason, confirm, wait } = args;
    let snapshot = session.client.snapshot(&name).await?;
    let (vm, taken) = (&snapshot.vm, moment(snapshot.created));
    if confirm.dry_run {
        let now = session.client.vm(vm).await?;
        let fate = if discard_present { "lost" } else { "kept" };
        let state = word(&now.status.state);
        return print(&format!("{vm} ({state}) would become what it was in {name} at {taken}; what it is now would be {fate}"));
    }
    let fate = if discard_present { " and lose what it is now" } else { "; what it is now is kept" };
    confirm.confirm(&format!("Make {vm} what it was in {name} at {taken}{fate}"))?;
    let task = session.client.rollback_snapshot(&name, &SnapshotRollback { host, discard_present, reason }).await?;
    session
        .conclude(task, &wait, None, async |task| {
            let host = session.client.vm(&task.subject).await.ok().and_then(|vm| vm.status.host);
            restored(task, &name, host.as_ref())
        })
        .await
}

async fn clone(session: &Session, args: CloneArgs) -> Result<(), Failure> {
    let CloneArgs { name, vm, host, start, memory, reason, wait } = args;
    let request = SnapshotClone { name: vm, host, start, memory, reason };
    let task = session.client.clone_snapshot(&name, &request).await?;
    session
        .conclude(task, &wait, None, async |task| {
            if !start {
                return format!("{} begins from {name} when it is started: `godwit vm start {0}`", task.subject);
            }
            if memory && task.state == TaskState::Done {
                note(&format!(
                    "{0} takes itself for the VM that it was, so none of its interfaces is plugged in: give it an identity of its own at its console, then \
                     `godwit vm set {0} --plug MAC`",
                    task.subject
                ));
            }
            let host = session.client.vm(&task.subject).await.ok().and_then(|vm| vm.status.host);
            restored(task, &name, host.as_ref())
        })
        .await
}

async fn export(session: &Session, args: ExportArgs) -> Result<(), Failure> {
    let ExportArgs { name, host, reason, wait } = args;
    let task = session.client.export_snapshot(&name, &SnapshotExportRequest { host, reason }).await?;
    session
        .conclude(task, &wait, None, async |task| match &task.export {
            Some(SnapshotExport { host, path, bytes }) => format!("{name} is in {} on {host}, {bytes}", visible(path)),
            None => format!("{name} was exported"),
        })
        .await
}

async fn import(session: &Session, args: ImportArgs) -> Result<(), Failure> {
    let ImportArgs { name, vm, from, memory, host, golden, reason, wait } = args;
    let request = SnapshotImport { vm, from, memory, host, golden, reason };
    let task = session.client.import_snapshot(&name, &request).await?;
    let told_of = async |_: &Task| {
        let snapshot = session.client.snapshot(&name).await.ok();
        snapshot.map_or_else(|| format!("{name} is there"), |snapshot| told(&snapshot))
    };
    session.conclude(task, &wait, None, told_of).await
}

/// How a VM came out of a snapshot, in one line.
fn restored(task: &Task, name: &Name, host: Option<&Name>) -> String {
    let on = host.map(|host| format!(" on {host}")).unwrap_or_default();
    let figures = task.restore.map(|figures| {
        let memory = if figures.memory_ms == 0 { "it boots".to_owned() } else { format!("memory {}", Millis(figures.memory_ms)) };
        let disks = match figures.filled.get() {
            0 => format!("disks {}", Millis(figures.disks_ms)),
            _ => format!("{} of its disks followed in {}", figures.filled, Millis(figures.filled_ms)),
        };
        format!(": QEMU started in {}, {disks}, {memory}", Millis(figures.qemu_ms))
    });
    let kept = task.kept.as_ref().map(|kept| format!("; what it was before is {kept}")).unwrap_or_default();
    format!("{} is as in {name}{on}{}{kept}", task.subject, figures.unwrap_or_default())
}

async fn delete(session: &Session, names: &[Name], confirm: &ConfirmArgs) -> Result<(), Failure> {
    if confirm.dry_run {
        return each(names, async |name| {
            let snapshot = session.client.snapshot(name).await?;
            let golden = if snapshot.golden { "; it is golden, and would be refused" } else { "" };
            print(&format!("snapshot {name} (of {}, {}) would be deleted{golden}", snapshot.vm, moment(snapshot.created)))
        })
        .await;
    }
    let list: Vec<&str> = names.iter().map(Name::as_str).collect();
    confirm.confirm(&format!("Delete snapshot {}", list.join(", ")))?;
    each(names, async |name| {
        session.client.delete_snapshot(name).await?;
        print(&format!("snapshot {name} deleted"))
    })
    .await
}
