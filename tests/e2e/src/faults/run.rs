//! One run: a VM is booted, moved, disturbed; then all is mended, and what became of it is judged from outside.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit_api::v1::{TaskState, VmDelete};
use godwit_guest::{Status, WitnessLog};
use godwit_model::{RunState, TaskId, VmId};

use super::fault::{Planned, Side};
use super::ground::Ground;
use super::inject::{HELD, Injected, Scene};
use super::moment::Tracks;
use super::plan::{Disk, Plan};
use super::report::{DiskCompare, Outcome, Run};
use crate::checks;
use crate::cluster::name;
use crate::processes::{HostProcess, ProcessRole};

/// How long the cluster may take to settle once every fault is undone: longer than every limit of a move and of a connection together.
const SETTLING: Duration = Duration::from_secs(240);
/// How long a guest may take to answer then.
const ANSWER: Duration = Duration::from_secs(30);
/// How long a guest may take to look at all of its pages twice.
const SWEEPS: Duration = Duration::from_secs(60);
/// Asking is simpler than listening, and this is how often.
const ASK: Duration = Duration::from_millis(100);
const REMOVAL: Duration = Duration::from_secs(60);

/// A fault as it came.
struct Done {
    fault: String,
    moment: String,
    held: bool,
    /// Without its figures, if there was anything to do it to.
    counted: Option<String>,
}

/// Does and judges one run.
///
/// # Errors
/// When there is nothing to judge: the VM did not boot, or its move was refused.
pub(super) fn run(ground: &mut Ground, plan: &Plan, logs: &Path) -> Result<Run> {
    ground.served += 1;
    let vm = format!("run{}", ground.served);
    let (source, destination) = (Ground::host(plan, Side::Source), Ground::host(plan, Side::Destination));
    let qemu = format!("{} to {}", ground.version(source)?, ground.version(destination)?);
    let spec = ground.guest(plan, &vm)?;
    let guest = ground.cluster.boot(&spec, source)?;
    let before = ground.cluster.status(&vm)?;
    // What is heard outside was heard inside its host before: a witness with deaf ears would prove nothing. On a busy machine it takes a moment.
    let heard_twice = |heard: &WitnessLog| heard.vm(&vm).is_some_and(|vm| vm.duplicates > 0);
    let deadline = Instant::now() + ANSWER;
    while !heard_twice(&ground.cluster.witness().log()) {
        ensure!(Instant::now() < deadline, "the witness does not hear what is sent inside the hosts");
        thread::sleep(ASK);
    }
    let log = ground.cluster.lab().agent(source)?.log()?;
    let tracks = Tracks::new(guest.id, &ground.state(source)?, &ground.state(destination)?, log);
    let task = ground.cluster.begin_move(&vm, destination, plan.policy)?;

    let scene = Scene { ground, plan, vm: &vm, tracks: &tracks };
    let done: Vec<Done> = thread::scope(|scope| {
        let running: Vec<_> = plan.faults.iter().map(|planned| scope.spawn(move || disturb(scene, planned))).collect();
        running.into_iter().map(|fault| fault.join().expect("a fault's thread does not panic")).collect()
    });
    ground.mend()?;
    let mut broken = Vec::new();
    let settled = settle(ground, &vm, guest.id, task);
    if let Err(error) = &settled {
        broken.push(format!("does not settle: {error:#}"));
    }
    let judged = judge(ground, plan, &vm, guest.id, &before);
    let held = done.iter().any(|done| done.held);
    let heard = ground.cluster.witness().log();
    let witness = heard.vm(&vm).context("the witness never heard it")?;
    let mut run = Run {
        seed: plan.seed,
        kind: if plan.is_postcopy() { "post-copy" } else { "pre-copy" }.to_owned(),
        fault: together(done.iter().map(|done| done.fault.as_str())),
        moment: together(done.iter().map(|done| done.moment.as_str())),
        outcome: judged.outcome,
        max_runners: if witness.interleaved > 0 { 2 } else { 1 },
        page_errors: judged.page_errors,
        disk_compare: match plan.disk {
            Disk::None | Disk::Shared => DiskCompare::Shared,
            Disk::Copies if ground.copies_are_whole(plan, &vm)? => DiskCompare::Ok,
            Disk::Copies => DiskCompare::Differs,
            // What its guest knows of it, and what is on it.
            Disk::Local if judged.disk_errors == 0 => DiskCompare::Ok,
            Disk::Local => DiskCompare::Differs,
        },
        qemu,
        guest: plan.load.as_str().to_owned(),
        disk: plan.disk.as_str().to_owned(),
        ended: settled.unwrap_or_else(|error| format!("{error:#}")),
        faults: done.iter().filter_map(|done| done.counted.clone()).collect(),
        broken,
    };
    run.broken.extend(judged.broken);
    run.judge(held);
    if !run.broken.is_empty() {
        ground.keep_logs(&logs.join(plan.seed.to_string()))?;
    }
    Ok(run)
}

/// Removes the VM of the last run, and looks whether anything is left of it.
///
/// # Errors
/// What is left, or what kept it from being removed.
pub(super) fn clear(ground: &mut Ground, plan: &Plan) -> Result<()> {
    let vm = name(&format!("run{}", ground.served));
    let cluster = &ground.cluster;
    let state = cluster.ask(cluster.client().vm(&vm))?.status.state;
    if matches!(state, RunState::Running | RunState::Paused) {
        let task = cluster.ask(cluster.client().kill_vm(&vm))?;
        cluster.done(task.id, REMOVAL)?;
    }
    let task =
        cluster.ask(cluster.client().delete_vm(&vm, &VmDelete { volumes: matches!(plan.disk, Disk::Shared | Disk::Local) }))?;
    cluster.done(task.id, REMOVAL)?;
    if plan.disk == Disk::Copies {
        ground.remove_copies(plan, vm.as_str())?;
    }
    checks::nothing_is_left(&ground.cluster)
}

/// Waits for the moment, does what is planned, and undoes it when its time is over.
fn disturb(scene: Scene<'_>, planned: &Planned) -> Done {
    let Planned { fault, moment } = planned;
    let Some(reached) = scene.tracks.wait(*moment) else {
        return Done { fault: format!("{fault} (not done)"), moment: format!("{moment} (never came)"), held: false, counted: None };
    };
    let moment = format!("{moment} (at {} ms)", reached.as_millis());
    match scene.inject(&fault.kind) {
        Ok(injected) => {
            let held = matches!(injected, Injected::Killed { held: true, .. });
            // What a killed process was is gone for good: there is nothing to undo, and nothing to wait for.
            if !matches!(injected, Injected::Killed { daemon: None, .. }) {
                thread::sleep(fault.lasts);
            }
            if let Err(error) = scene.undo(injected) {
                eprintln!("   {fault}: not undone by itself: {error:#}");
            }
            let held_text = if held { HELD } else { "" };
            Done { fault: format!("{fault}{held_text}"), moment, held, counted: Some(fault.kind.summary()) }
        }
        Err(error) => {
            eprintln!("   {fault}: {error:#}");
            Done { fault: format!("{fault} (nothing there)"), moment, held: false, counted: None }
        }
    }
}

fn together<'a>(texts: impl Iterator<Item = &'a str>) -> String {
    texts.collect::<Vec<_>>().join("; ")
}

/// Waits until every host is connected, the move has ended and nothing but the VM's one QEMU is left of it; says how it ended.
fn settle(ground: &Ground, vm: &str, id: VmId, task: TaskId) -> Result<String> {
    let deadline = Instant::now() + SETTLING;
    loop {
        // A daemon that was started while its disk was full may have ended again.
        ground.start_daemons()?;
        match unsettled(ground, vm, id, task) {
            Ok(ended) => return Ok(ended),
            Err(error) => ensure!(Instant::now() < deadline, "{error:#} after {SETTLING:?}"),
        }
        thread::sleep(ASK);
    }
}

/// What is not settled, or how the move ended.
fn unsettled(ground: &Ground, vm: &str, id: VmId, task: TaskId) -> Result<String> {
    let cluster = &ground.cluster;
    let client = cluster.client();
    let hosts = cluster.ask_briefly(client.hosts()).context("the controller does not answer")?;
    for host in hosts {
        ensure!(host.connected, "{} is not connected", host.name);
    }
    let task = cluster.ask_briefly(client.task(task)).context("the controller does not answer")?;
    ensure!(task.state.ended(), "the task is at `{}`", task.step);
    let known = cluster.ask_briefly(client.vm(&name(vm))).context("the controller does not answer")?;
    ensure!(known.status.activity.is_none(), "the VM is busy");
    let mut left = Vec::new();
    for host in cluster.lab().hosts()? {
        left.extend(cluster.processes(&host)?.into_iter().map(|process| (host.clone(), process)));
    }
    let wanted = usize::from(matches!(known.status.state, RunState::Running | RunState::Paused));
    let qemus = left.iter().filter(|(_, process)| process.role == ProcessRole::Qemu(id)).count();
    ensure!(qemus == wanted && left.len() == wanted, "the VM is {:?}, and these run: {left:?}", known.status.state);
    Ok(match (task.state, task.error) {
        (TaskState::Done, _) => "done".to_owned(),
        (state, error) => format!("{state:?}: {}", error.map(|error| error.to_string()).unwrap_or_default()),
    })
}

struct Judged {
    outcome: Outcome,
    disk_errors: u64,
    page_errors: u64,
    broken: Vec<String>,
}

/// Where the VM runs, as the processes of the hosts and the guest itself tell.
fn judge(ground: &Ground, plan: &Plan, vm: &str, id: VmId, before: &Status) -> Judged {
    let cluster = &ground.cluster;
    let runs = |side| {
        let is_it = |process: &HostProcess| process.role == ProcessRole::Qemu(id);
        cluster.processes(Ground::host(plan, side)).is_ok_and(|all| all.iter().any(is_it))
    };
    let (source, destination) = (runs(Side::Source), runs(Side::Destination));
    let mut broken = Vec::new();
    if source && destination {
        broken.push("two QEMUs are left".to_owned());
    }
    let status = if source || destination { swept(ground, vm) } else { None };
    let outcome = match status {
        Some(_) if destination => Outcome::Moved,
        Some(_) => Outcome::Stayed,
        None => Outcome::Lost,
    };
    if let Some(status) = &status
        && status.boot != before.boot
    {
        broken.push("the guest was booted again".to_owned());
    }
    let (page_errors, disk_errors) = status.map_or((0, 0), |status| (status.page_errors, status.disk_errors));
    Judged { outcome, page_errors, disk_errors, broken }
}

/// What the guest says once it has looked at all of its pages again; nothing if it does not answer.
fn swept(ground: &Ground, vm: &str) -> Option<Status> {
    let address = ground.cluster.guest(vm).ok()?.address;
    let ask = || ground.cluster.outside().status(address, ANSWER).ok();
    let first = ask()?;
    let deadline = Instant::now() + SWEEPS;
    loop {
        let now = ask()?;
        // All of its disk in one run, and more.
        let disks = first.disk_checked == 0 || now.disk_checked >= first.disk_checked + 2_048;
        // The sweep under way began before.
        if (now.sweeps >= first.sweeps + 2 && disks) || now.page_errors > 0 || now.disk_errors > 0 {
            return Some(now);
        }
        if Instant::now() > deadline {
            eprintln!("   {vm} looked at its pages {} times in {SWEEPS:?}", now.sweeps - first.sweeps);
            return Some(now);
        }
        thread::sleep(ASK);
    }
}
