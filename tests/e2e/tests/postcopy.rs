//! VMs that go on before all of their memory is there.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit_e2e::{Action, Cluster, ClusterSpec, Ending, GuestSpec, Party, other_qemu};
use godwit_model::{
    Bytes, BytesPerSec, ErrorCode, MigrationFigures, MigrationPhase, MigrationPolicy, Millis, Name, PostCopy, Rung,
};

/// A guest that writes more than the link takes: whole pages that do not compress, in no order.
fn hot(name: &str) -> GuestSpec {
    GuestSpec::small(name)
        .knob("touch_total=96M")
        .knob("working_set=48M")
        .knob("dirty=16M")
        .knob("write_size=4096")
        .knob("mix=unique:100")
        .knob("check=8M")
}

/// Into the time in which the VM runs at its destination and memory follows.
fn into_the_rest(cluster: &mut Cluster, vm: &str, to: &str) -> Result<()> {
    let task = cluster.begin_move(vm, to, now())?;
    cluster.wait_progress(task, |progress| progress.phase == MigrationPhase::PostCopy && progress.remaining > Bytes(0)).map(drop)
}

/// The rate of the wire.
const SLOW: BytesPerSec = BytesPerSec(10_000_000);

fn now() -> MigrationPolicy {
    MigrationPolicy { bandwidth: Some(SLOW), postcopy: PostCopy::Now, ..MigrationPolicy::default() }
}

fn moved(cluster: &mut Cluster, vm: &str, to: &str, policy: MigrationPolicy) -> Result<MigrationFigures> {
    let task = cluster.begin_move(vm, to, policy)?;
    let done = cluster.done(task, Duration::from_secs(180))?;
    let figures = done.figures.context("figures")?;
    ensure!(cluster.host_of(vm)? == to, "{vm} is not on {to}");
    eprintln!("to {to}: {figures:?}");
    cluster.check()?;
    Ok(figures)
}

/// From the second host to the first and back.
fn there_and_back(qemus: [Option<&Path>; 2], vcpus: u16) -> Result<()> {
    let mut spec = ClusterSpec::new(2)?;
    for (host, qemu) in ["h1", "h2"].into_iter().zip(qemus) {
        spec = qemu.into_iter().fold(spec, |spec, qemu| spec.qemu(host, qemu)).agent(host, &["--unprivileged-userfaultfd"]);
    }
    let mut cluster = spec.up()?;
    cluster.boot(&hot("web").vcpus(vcpus), "h2")?;
    for to in ["h1", "h2"] {
        let figures = moved(&mut cluster, "web", to, now())?;
        ensure!(figures.left > Bytes::mib(1), "next to nothing was left: {figures:?}");
    }
    cluster.finish()
}

#[test]
fn a_vm_goes_on_before_its_memory_is_there_and_every_page_comes() -> Result<()> {
    there_and_back([None, None], 1)
}

#[test]
fn a_vm_goes_on_before_its_memory_is_there_on_another_version_of_qemu() -> Result<()> {
    match other_qemu() {
        Some(other) => there_and_back([None, Some(&other)], 2),
        None => {
            eprintln!("GODWIT_QEMU_OTHER is not set: nothing is proven here");
            Ok(())
        }
    }
}

#[test]
fn what_was_left_follows_whoever_dies_meanwhile() -> Result<()> {
    let mut cluster = up(hot("web"))?;
    // The carry of either side, both, and the agents.
    let deaths: [&[Party<'_>]; 4] = [
        &[Party::Carry("web", "h1")],
        &[Party::Carry("web", "h1")],
        &[Party::Carry("web", "h1"), Party::Carry("web", "h2")],
        &[Party::Agent("h1"), Party::Agent("h2")],
    ];
    for (dead, to) in deaths.into_iter().zip(["h2", "h1", "h2", "h1"]) {
        into_the_rest(&mut cluster, "web", to)?;
        for party in dead {
            eprintln!("-- {party:?} dies");
            // One whose other side has just died may be about to be followed by another.
            let deadline = Instant::now() + Duration::from_secs(10);
            while let Err(error) = cluster.kill(*party) {
                ensure!(Instant::now() < deadline, "{error:#}");
                thread::sleep(Duration::from_millis(20));
            }
        }
        for party in dead.iter().filter(|party| matches!(party, Party::Agent(_))) {
            cluster.run(&[Action::Restart(*party)])?;
        }
        cluster.run(&[Action::Ends("web", Ending::Moved(to))])?;
    }
    cluster.finish()
}

#[test]
fn a_vm_whose_memory_stays_on_a_host_that_is_away_can_be_killed_and_started_again() -> Result<()> {
    let mut cluster = up(hot("web"))?;
    cluster.expect_log("no carry");
    into_the_rest(&mut cluster, "web", "h2")?;
    // The VM waits for its memory, and answers nobody.
    cluster.kill(Party::Agent("h1"))?;
    cluster.kill(Party::Carry("web", "h1"))?;
    let vm = Name::new("web")?;
    let busy = cluster.ask(cluster.client().pause_vm(&vm)).err().map(|refusal| refusal.code);
    ensure!(busy == Some(ErrorCode::VmBusy), "{busy:?}");
    let kill = cluster.ask(cluster.client().kill_vm(&vm))?.id;
    cluster.done(kill, Duration::from_secs(30))?;
    cluster.start_again("web", "h2")?;
    // What the first host holds is of no use to anybody; it learns so when it is back.
    cluster.run(&[Action::Restart(Party::Agent("h1")), Action::Ends("web", Ending::Moved("h2")), Action::Migrate("web", "h1")])?;
    cluster.finish()
}

#[test]
fn the_selftest_moves_a_vm_of_its_own_in_every_way_and_leaves_nothing() -> Result<()> {
    let cluster = up(GuestSpec::small("web"))?;
    let report = cluster.selftest(["h1", "h2"])?;
    let checks = report["checks"].as_array().context("checks")?;
    for check in checks {
        eprintln!("{check}");
        // How long a VM stands still on this machine is for benches to say.
        let is_of_time = check["check"].as_str().is_some_and(|name| name.contains("blackout"));
        ensure!(is_of_time || check["verdict"] == "passed", "{check}");
    }
    let moves: Vec<_> = checks.iter().filter_map(|check| check["figures"].as_object()).collect();
    ensure!(checks.len() == 9 && moves.len() == 4, "{report}");
    let vms = cluster.ask(cluster.client().vms())?;
    ensure!(vms.len() == 1 && cluster.ask(cluster.client().images())?.len() == 2, "of the selftest something is left: {vms:?}");
    cluster.finish()
}

/// Two hosts that can do post-copy, and a guest.
fn up(guest: GuestSpec) -> Result<Cluster> {
    let spec = ClusterSpec::new(2)?;
    let spec = ["h1", "h2"].into_iter().fold(spec, |spec, host| spec.agent(host, &["--unprivileged-userfaultfd", "--stays", "0"]));
    let mut cluster = spec.up()?;
    cluster.boot(&guest, "h1")?;
    Ok(cluster)
}

#[test]
fn a_vm_that_cannot_be_moved_within_its_budget_ends_as_its_policy_says() -> Result<()> {
    let mut cluster = up(hot("web"))?;
    let policy = |ladder: &str| -> Result<MigrationPolicy> {
        let on_miss = ladder.parse()?;
        Ok(MigrationPolicy { bandwidth: Some(SLOW), on_miss, patience: Millis(3_000), ..MigrationPolicy::default() })
    };
    cluster.begin_move("web", "h2", policy("wait-for-quiet,give-up")?)?;
    cluster.run(&[Action::Ends("web", Ending::Stayed("h1", &[ErrorCode::NotConverging]))])?;

    // It is throttled until it fits; how far does not matter here.
    let generous = MigrationPolicy { max_blackout: Millis(1_000), ..policy("throttle")? };
    let figures = moved(&mut cluster, "web", "h2", generous)?;
    ensure!(figures.left == Bytes(0), "{figures:?}");

    let task = cluster.begin_move("web", "h1", policy("ask")?)?;
    cluster.wait_progress(task, |progress| progress.rung == Some(Rung::Ask))?;
    cluster.ask(cluster.client().postcopy_task(task))?;
    let figures = cluster.done(task, Duration::from_secs(120))?.figures.context("figures")?;
    ensure!(figures.left > Bytes::mib(1), "{figures:?}");
    cluster.check()?;

    let task = cluster.begin_move("web", "h2", MigrationPolicy { bandwidth: Some(SLOW), ..MigrationPolicy::default() })?;
    let refusal =
        cluster.ask(cluster.client().postcopy_task(task)).err().context("post-copy of a migration that is not ready for it")?;
    ensure!(refusal.code == ErrorCode::BadRequest && refusal.hint.is_some(), "{refusal:?}");
    cluster.run(&[Action::Cancel("web"), Action::Ends("web", Ending::Cancelled("h1"))])?;
    cluster.finish()
}
