//! Snapshots of VMs that run, and VMs out of them; and what may go wrong with either.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use godwit_api::v1::{
    ScheduleCreate, ScheduleRun, ScheduledResult, SnapshotClone, SnapshotCreate, SnapshotExportRequest, TaskState, VaultPrune,
    VmDelete,
};
use godwit_e2e::{Action, Cluster, ClusterSpec, GuestSpec, Party, other_qemu};
use godwit_lab::Signal;
use godwit_model::{Bytes, DiskFormat, DiskSpec, ErrorCode, MigrationPolicy, Name, Retention, RunState, ScheduleSpec, TaskId};
use rustix::process::{Pid, kill_process};

const PATIENCE: Duration = Duration::from_secs(120);

/// A guest that writes to its memory and its disks, and knows what is in them.
fn busy(name: &str) -> Result<GuestSpec> {
    let disk = |volume: &str, format| -> Result<DiskSpec> {
        Ok(DiskSpec { size: Some(Bytes::mib(64)), ..DiskSpec::new(volume.parse()?, format) })
    };
    let guest = GuestSpec::small(name).knob("disk=24M").knob("disk_dirty=1M");
    Ok(guest
        .disk(disk(&format!("shared/{name}-root"), DiskFormat::Qcow2)?)
        .disk(disk(&format!("shared/{name}-data"), DiskFormat::Raw)?))
}

/// Hosts on which QEMU may watch what a guest writes, with the other QEMU on those that are named.
fn cluster(hosts: u16, other: Option<(&Path, &[&str])>) -> Result<Cluster> {
    let mut spec = ClusterSpec::new(hosts)?;
    for host in (1..=hosts).map(|number| format!("h{number}")) {
        spec = spec.agent(&host, &["--unprivileged-userfaultfd"]);
        if let Some((qemu, _)) = other.filter(|(_, named)| named.contains(&host.as_str())) {
            spec = spec.qemu(&host, qemu);
        }
    }
    spec.up()
}

/// The vault of the lab's only team.
fn vault(cluster: &Cluster) -> Result<PathBuf> {
    Ok(cluster.lab().shared_pool()?.join("vaults/default"))
}

fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

/// The vault workers that the agent of this host has started.
fn workers(cluster: &Cluster, host: &str) -> Result<Vec<i32>> {
    let status = cluster.lab_status()?;
    let agent = status.hosts.iter().find(|known| known.name == host).and_then(|host| host.agent.pid).context("no agent")?;
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let parent = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let parent = parent.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse::<u32>().ok());
        let is_worker = command.split(|byte| *byte == 0).nth(1) == Some(b"vault-worker");
        if let (true, Some(parent)) = (is_worker, parent)
            && parent == agent
        {
            found.extend(entry.file_name().to_str().and_then(|pid| pid.parse::<i32>().ok()));
        }
    }
    Ok(found)
}

/// Waits until the snapshot that is being taken has come to this step.
fn wait_for_worker(cluster: &Cluster, host: &str) -> Result<i32> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        if let Some(pid) = workers(cluster, host)?.first() {
            return Ok(*pid);
        }
        thread::sleep(Duration::from_millis(2));
    }
    bail!("no vault worker is started on {host}")
}

/// The guest goes on: it writes and checks more than it had.
fn goes_on(cluster: &Cluster, vm: &str) -> Result<()> {
    let before = cluster.status(vm)?;
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let now = cluster.status(vm)?;
        if now.pages_written > before.pages_written
            && now.disk_written > before.disk_written
            && now.pages_checked > before.pages_checked
        {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{vm} stands still: {before:?}, {now:?}");
        thread::sleep(Duration::from_millis(100));
    }
}

fn refused(cluster: &Cluster, task: TaskId) -> Result<ErrorCode> {
    let ended = cluster.ended(task, PATIENCE)?;
    ensure!(ended.state == TaskState::Failed, "it ended {:?}: {:?}", ended.state, ended.trail);
    let error = ended.error.context("it says not why")?;
    eprintln!("{}: {} ({:?})", error.code, error.message, error.hint);
    Ok(error.code)
}

/// There and back on hosts of which the named ones have the other QEMU.
fn there_and_back(other: Option<(&Path, &[&str])>) -> Result<()> {
    let mut cluster = cluster(2, other)?;
    // It writes to few places, so that it shows what is looked at.
    cluster.boot(&busy("web")?.knob("disk_dirty=64K"), "h1")?;
    goes_on(&cluster, "web")?;
    let first = cluster.take("web", "first")?.figures.context("figures")?;
    ensure!(first.memory && first.pause_us.is_some(), "{first:?}");
    let is_part = |read: Bytes| read > Bytes(0) && read.get() * 2 < first.disks_read.get();
    goes_on(&cluster, "web")?;
    // What has not changed is kept once, and not read again.
    let second = cluster.take("web", "second")?.figures.context("figures")?;
    ensure!(second.written.get() * 2 < first.written.get(), "{} after {}", second.written, first.written);
    ensure!(is_part(second.disks_read), "{second:?} after {first:?}");
    let written = cluster.status("web")?.disk_written;
    // Of what has changed since, and then of what has since it was what it was.
    for _ in 0..2 {
        let figures = cluster.roll_back("web", "first", None)?;
        ensure!(is_part(figures.disks_written) && figures.filled == Bytes(0), "{figures:?} after {first:?}");
        ensure!(cluster.status("web")?.disk_written < written, "it is not what it was");
        goes_on(&cluster, "web")?;
        cluster.check()?;
    }
    // On the other host, which knows nothing; and from there it is a VM as any other: it moves, and is kept once more.
    let elsewhere = cluster.roll_back("web", "second", Some("h2"))?;
    ensure!(cluster.host_of("web")? == "h2");
    ensure!(elsewhere.disks_written == Bytes(0) && elsewhere.filled == Bytes::mib(128), "its disks follow: {elsewhere:?}");
    goes_on(&cluster, "web")?;
    cluster.check()?;
    cluster.migrate("web", "h1")?;
    cluster.check()?;
    let third = cluster.take("web", "third")?.figures.context("figures")?;
    ensure!(!is_part(third.disks_read), "what was known stayed where it was: {third:?}");
    goes_on(&cluster, "web")?;
    cluster.roll_back("web", "third", None)?;
    goes_on(&cluster, "web")?;
    cluster.check()?;
    // They go in any order, and what nobody needs goes with them.
    cluster.ask(cluster.client().delete_snapshot(&name("first")))?;
    cluster.roll_back("web", "second", None)?;
    for snapshot in ["third", "second"] {
        cluster.ask(cluster.client().delete_snapshot(&name(snapshot)))?;
    }
    cluster.take("web", "last")?;
    let verify = cluster.ask(cluster.client().verify_vault(&name("shared"), None))?.id;
    cluster.done(verify, PATIENCE)?;
    let plan = cluster.ask(cluster.client().prune_vault(&name("shared"), None, &VaultPrune::default()))?;
    ensure!(!plan.files.is_empty(), "three snapshots are gone");
    let apply = VaultPrune { apply: true, plan: Some(plan) };
    cluster.ask(cluster.client().prune_vault(&name("shared"), None, &apply))?;
    let left = fs::read_dir(vault(&cluster)?)?.flatten().count();
    ensure!(left == 3, "one snapshot, its pack, and the lock, not {left} files");
    cluster.roll_back("web", "last", None)?;
    goes_on(&cluster, "web")?;
    // What is taken over needs the snapshot it comes from no more; and where QEMU is dead, nothing is known.
    let after = cluster.take("web", "after")?.figures.context("figures")?;
    ensure!(is_part(after.disks_read), "{after:?}");
    cluster.ask(cluster.client().delete_snapshot(&name("last")))?;
    let plan = cluster.ask(cluster.client().prune_vault(&name("shared"), None, &VaultPrune::default()))?;
    let apply = VaultPrune { apply: true, plan: Some(plan) };
    cluster.ask(cluster.client().prune_vault(&name("shared"), None, &apply))?;
    let kill = cluster.ask(cluster.client().kill_vm(&name("web")))?.id;
    cluster.done(kill, PATIENCE)?;
    let whole = cluster.roll_back("web", "after", None)?;
    ensure!(whole.filled == Bytes::mib(128), "{whole:?}");
    goes_on(&cluster, "web")?;
    cluster.finish()
}

#[test]
fn a_vm_goes_back_to_what_it_was_on_any_host_and_any_version_of_qemu() -> Result<()> {
    let other = other_qemu();
    there_and_back(other.as_deref().map(|other| (other, &["h2"][..])))
}

/// Waits until a VM runs on a host.
fn runs_on(cluster: &Cluster, vm: &str, host: &str) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = cluster.ask(cluster.client().vm(&name(vm)))?.status;
        if status.state == RunState::Running && status.host == Some(name(host)) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{vm} does not run on {host}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Cancels a rollback whose disks do not come, since the vault says nothing.
fn cancelled_while_nothing_comes(cluster: &Cluster, vm: &str, snapshot: &str, host: &str) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let task = cluster.begin_rollback(snapshot, Some(host))?;
    runs_on(cluster, vm, host)?;
    let silent = workers(cluster, host)?;
    let send = |signal| silent.iter().filter_map(|pid| Pid::from_raw(*pid)).all(|pid| kill_process(pid, signal).is_ok());
    ensure!(!silent.is_empty() && send(Signal::STOP), "its disks have come: {silent:?}");
    let cancelled = cluster.ask(cluster.client().cancel_task(task)).map(|_| cluster.ended(task, PATIENCE));
    send(Signal::CONT);
    let ended = cancelled??;
    ensure!(ended.state == TaskState::Cancelled, "{ended:?}");
    let state = cluster.ask(cluster.client().vm(&name(vm)))?.status.state;
    ensure!(state == RunState::Stopped, "{state:?}");
    while !workers(cluster, host)?.is_empty() {
        ensure!(Instant::now() < deadline, "a worker is left");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn snapshots_and_moves_of_a_vm_take_turns_and_a_clone_is_a_vm_of_its_own() -> Result<()> {
    let mut cluster = cluster(2, None)?;
    cluster.boot(&busy("web")?, "h1")?;
    goes_on(&cluster, "web")?;
    let first = cluster.begin_snapshot("web", "first")?;
    let second = cluster.begin_snapshot("web", "second")?;
    let moves = cluster.begin_move("web", "h2", MigrationPolicy::default())?;
    let third = cluster.begin_snapshot("web", "third")?;
    for task in [first, second, moves, third] {
        cluster.done(task, PATIENCE)?;
    }
    ensure!(cluster.host_of("web")? == "h2");
    ensure!(cluster.ask(cluster.client().snapshot(&name("third")))?.host == name("h2"), "it was asked for after the move");
    goes_on(&cluster, "web")?;
    let clone = SnapshotClone { name: name("copy"), host: Some(name("h1")), start: true, memory: false, reason: None };
    let task = cluster.ask(cluster.client().clone_snapshot(&name("third"), &clone))?.id;
    cluster.done(task, PATIENCE)?;
    let [one, other] = ["web", "copy"].map(|vm| cluster.ask(cluster.client().vm(&name(vm))));
    let (one, other) = (one?, other?);
    ensure!(one.id != other.id && one.status.macs != other.status.macs, "{other:?}");
    ensure!(one.spec.disks.iter().zip(&other.spec.disks).all(|(one, other)| one.volume != other.volume), "{other:?}");
    // It says what the other says, with the other's address: it goes before both are asked.
    let kill = cluster.ask(cluster.client().kill_vm(&name("copy")))?.id;
    cluster.done(kill, PATIENCE)?;
    goes_on(&cluster, "web")?;
    let delete = cluster.ask(cluster.client().delete_vm(&name("copy"), &VmDelete { volumes: true }))?.id;
    cluster.done(delete, PATIENCE)?;
    // Of two that said they were web, one was a clone.
    cluster.turned_back("web")?;
    cluster.finish()
}

#[test]
fn whoever_dies_while_a_snapshot_is_taken_the_vm_runs_on() -> Result<()> {
    let mut cluster = cluster(2, None)?;
    cluster.boot(&busy("web")?.memory(Bytes::mib(512)).knob("touch_total=300M"), "h1")?;
    goes_on(&cluster, "web")?;
    // The worker, early and late.
    for (number, wait) in [0, 300].into_iter().enumerate() {
        let task = cluster.begin_snapshot("web", &format!("w{number}"))?;
        let pid = wait_for_worker(&cluster, "h1")?;
        thread::sleep(Duration::from_millis(wait));
        let killed = Pid::from_raw(pid).is_some_and(|pid| kill_process(pid, Signal::KILL).is_ok());
        let ended = cluster.ended(task, PATIENCE)?;
        eprintln!("after {wait} ms, killed {killed}: {:?} {:?}", ended.state, ended.error);
        ensure!(ended.state == TaskState::Failed || !killed || wait > 0, "{:?}", ended.trail);
        goes_on(&cluster, "web")?;
        cluster.check()?;
    }
    // The agent: its next life takes it anew. And the agent with its worker.
    for (number, (wait, both)) in [(200, false), (200, true)].into_iter().enumerate() {
        let task = cluster.begin_snapshot("web", &format!("a{number}"))?;
        let pid = wait_for_worker(&cluster, "h1")?;
        thread::sleep(Duration::from_millis(wait));
        if both {
            let _ = Pid::from_raw(pid).map(|pid| kill_process(pid, Signal::KILL));
        }
        cluster.kill(Party::Agent("h1"))?;
        thread::sleep(Duration::from_millis(500));
        cluster.run(&[Action::Restart(Party::Agent("h1"))])?;
        cluster.done(task, PATIENCE)?;
        goes_on(&cluster, "web")?;
        cluster.check()?;
    }
    // What came of it is whole. An agent that dies between the end and the beginning has forgotten what had changed.
    let qemu = cluster.qemu("web", "h1")?;
    let task = cluster.begin_rollback("a1", None)?;
    let deadline = Instant::now() + PATIENCE;
    while fs::read_link(format!("/proc/{qemu}/exe")).is_ok() {
        ensure!(Instant::now() < deadline, "QEMU does not end");
        thread::sleep(Duration::from_millis(1));
    }
    cluster.kill(Party::Agent("h1"))?;
    cluster.run(&[Action::Restart(Party::Agent("h1"))])?;
    cluster.done(task, PATIENCE)?;
    cluster.turned_back("web")?;
    goes_on(&cluster, "web")?;
    cluster.check()?;
    // Whoever brings its memory and its disks, and then the agent: others go on, and the guest notices nothing.
    cluster.expect_log("another worker plays on");
    cluster.expect_log("another worker serves the disk");
    let task = cluster.begin_rollback("a1", Some("h2"))?;
    let deadline = Instant::now() + PATIENCE;
    runs_on(&cluster, "web", "h2")?;
    let qemu = cluster.qemu("web", "h2")?;
    let all_send = |pids: &[i32], signal| {
        for pid in pids.iter().filter_map(|pid| Pid::from_raw(*pid)) {
            let _ = kill_process(pid, signal);
        }
    };
    let wait_for = |number: usize, but: &[i32]| -> Result<Vec<i32>> {
        loop {
            let found = workers(&cluster, "h2")?;
            if found.len() == number && !found.iter().any(|pid| but.contains(pid)) {
                return Ok(found);
            }
            ensure!(Instant::now() < deadline, "there are not {number} workers, but {found:?}");
            thread::sleep(Duration::from_millis(5));
        }
    };
    // Once: an old QEMU whose player is lost again before it goes on ends.
    let first = wait_for(3, &[])?;
    all_send(&first, Signal::KILL);
    wait_for(3, &first)?;
    // When memory has come, those are left that serve disks: they go with the agent.
    let servers = wait_for(2, &first)?;
    cluster.kill(Party::Agent("h2"))?;
    all_send(&servers, Signal::KILL);
    cluster.turned_back("web")?;
    cluster.run(&[Action::Restart(Party::Agent("h2"))])?;
    cluster.done(task, PATIENCE)?;
    goes_on(&cluster, "web")?;
    cluster.check()?;
    ensure!(cluster.qemu("web", "h2")? == qemu, "it was ended");
    // Nobody dies, but nothing comes either: whoever asked for it can end it, and it begins again.
    cancelled_while_nothing_comes(&cluster, "web", "a1", "h1")?;
    cluster.roll_back("web", "a1", Some("h2"))?;
    goes_on(&cluster, "web")?;
    // QEMU itself: the VM is lost, the snapshot with it, and an earlier one brings it back.
    let task = cluster.begin_snapshot("web", "q")?;
    wait_for_worker(&cluster, "h2")?;
    thread::sleep(Duration::from_millis(200));
    cluster.kill(Party::Qemu("web", "h2"))?;
    ensure!(matches!(refused(&cluster, task)?, ErrorCode::SnapshotFailed | ErrorCode::QemuFailed));
    let deadline = Instant::now() + Duration::from_secs(20);
    // Its host says so by itself.
    while cluster.ask(cluster.client().vm(&name("web")))?.status.state != RunState::Crashed {
        ensure!(Instant::now() < deadline, "it is not taken for crashed");
        thread::sleep(Duration::from_millis(50));
    }
    cluster.roll_back("web", "a0", None)?;
    goes_on(&cluster, "web")?;
    cluster.finish()
}

#[test]
fn damage_is_found_and_named_and_nothing_of_it_is_served() -> Result<()> {
    let mut cluster = cluster(1, None)?;
    cluster.boot(&busy("web")?, "h1")?;
    goes_on(&cluster, "web")?;
    let taken = cluster.take("web", "first")?;
    cluster.expect_log("memory cannot come out of the snapshot");
    for kind in ["snapshot", "pack"] {
        let path = vault(&cluster)?.join(format!("{}.{kind}", taken.id));
        let file = fs::File::options().read(true).write(true).open(&path)?;
        let (mut byte, place) = ([0], file.metadata()?.len() / 2);
        file.read_exact_at(&mut byte, place)?;
        file.write_all_at(&[byte[0] ^ 1], place)?;
        let verify = cluster.ask(cluster.client().verify_vault(&name("shared"), None))?.id;
        let ended = cluster.ended(verify, PATIENCE)?.error.context("it is not found")?;
        ensure!(ended.code == ErrorCode::SnapshotDamaged && ended.message.contains(&format!("{}.{kind}", taken.id)), "{ended:?}");
        let task = cluster.begin_rollback("first", None)?;
        let ended = cluster.ended(task, PATIENCE)?;
        // Damaged memory may be met when the VM runs already: it is ended, and its host says why.
        let deadline = Instant::now() + Duration::from_secs(30);
        let status = loop {
            let status = cluster.ask(cluster.client().vm(&name("web")))?.status;
            if status.state != RunState::Running {
                break status;
            }
            ensure!(Instant::now() < deadline, "it runs on: {:?}", ended.trail);
            thread::sleep(Duration::from_millis(50));
        };
        let said = ended.error.map_or_else(|| format!("{status:?}"), |error| error.message);
        eprintln!("{kind}: {said}");
        ensure!(said.contains(&taken.id.to_string()), "{said}");
        file.write_all_at(&byte, place)?;
        cluster.roll_back("web", "first", None)?;
        goes_on(&cluster, "web")?;
    }
    cluster.finish()
}

#[test]
fn a_vault_without_room_costs_a_snapshot_and_nothing_else() -> Result<()> {
    let mut cluster = cluster(1, None)?;
    cluster.boot(&busy("web")?, "h1")?;
    goes_on(&cluster, "web")?;
    let place = vault(&cluster)?;
    fs::create_dir_all(&place)?;
    let small = Mounted::tmpfs(&place, "size=8m")?;
    let task = cluster.begin_snapshot("web", "first")?;
    ensure!(refused(&cluster, task)? == ErrorCode::NotEnoughSpace);
    goes_on(&cluster, "web")?;
    cluster.check()?;
    let left: Vec<_> = fs::read_dir(&place)?.flatten().map(|entry| entry.file_name()).filter(|name| name != "lock").collect();
    ensure!(left.is_empty(), "{left:?} is left");
    drop(small);
    cluster.take("web", "first")?;
    // Nor is there room for its files.
    let place = cluster.lab().shared_pool()?.join("exports/default");
    fs::create_dir_all(&place)?;
    let small = Mounted::tmpfs(&place, "size=8m")?;
    let task = cluster.ask(cluster.client().export_snapshot(&name("first"), &SnapshotExportRequest::default()))?.id;
    ensure!(refused(&cluster, task)? == ErrorCode::NotEnoughSpace);
    let left: Vec<_> = fs::read_dir(&place)?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(left.is_empty(), "{left:?} is left");
    drop(small);
    goes_on(&cluster, "web")?;
    cluster.finish()
}

/// A file system that is there for a test.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(place: &Path, options: &str) -> Result<Self> {
        let options = std::ffi::CString::new(options)?;
        rustix::mount::mount("tmpfs", place, "tmpfs", rustix::mount::MountFlags::empty(), Some(options.as_c_str()))?;
        Ok(Self(place.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn disks_alone_are_kept_and_a_vm_boots_from_them() -> Result<()> {
    let mut cluster = cluster(1, None)?;
    cluster.boot(&busy("web")?, "h1")?;
    goes_on(&cluster, "web")?;
    let wanted = SnapshotCreate {
        vm: name("web"),
        name: Some(name("disks")),
        memory: false,
        quiesce: None,
        pool: None,
        golden: false,
        reason: None,
    };
    let task = cluster.ask(cluster.client().create_snapshot(&wanted))?.id;
    cluster.done(task, PATIENCE)?;
    let taken = cluster.ask(cluster.client().snapshot(&name("disks")))?;
    ensure!(taken.memory.is_none(), "{taken:?}");
    let figures = cluster.roll_back("web", "disks", None)?;
    ensure!(figures.memory_ms == 0, "{figures:?}");
    goes_on(&cluster, "web")?;
    cluster.finish()
}

#[test]
fn a_schedule_takes_snapshots_and_what_it_does_not_keep_goes() -> Result<()> {
    let mut cluster = ClusterSpec::new(1)?.up()?;
    cluster.boot(&busy("web")?, "h1")?;
    goes_on(&cluster, "web")?;
    let nightly = name("nightly");
    let keep = Retention { last: Some(1), ..Retention::default() };
    let spec = ScheduleSpec { vms: [name("web")].into(), memory: false, keep, enabled: false, ..ScheduleSpec::new("@daily") };
    cluster.ask(cluster.client().create_schedule(&ScheduleCreate { name: nightly.clone(), spec }))?;
    let taken = || -> Result<Name> {
        cluster.ask(cluster.client().run_schedule(&nightly, &ScheduleRun::default()))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = cluster.ask(cluster.client().schedule_status(&nightly))?;
            let [vm] = status.vms.as_slice() else { bail!("{status:?}") };
            if let (None, Some(last)) = (vm.due, &vm.last) {
                ensure!(last.result == ScheduledResult::Taken, "{last:?}");
                return last.snapshot.clone().context("no snapshot");
            }
            ensure!(Instant::now() < deadline, "{vm:?}");
            thread::sleep(Duration::from_millis(50));
        }
    };
    let (first, second) = (taken()?, taken()?);
    ensure!(first != second, "{first} twice");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = cluster.ask(cluster.client().snapshots(Some(&name("web"))))?;
        if let [left] = left.as_slice() {
            ensure!(left.name == second && left.memory.is_none(), "{left:?}");
            break;
        }
        ensure!(left.len() == 2 && Instant::now() < deadline, "{left:?}");
        thread::sleep(Duration::from_millis(50));
    }
    goes_on(&cluster, "web")?;
    cluster.finish()
}
