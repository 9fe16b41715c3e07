//! Migrations that go well, and those that are refused before anything begins.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit_api::v1::{HostSet, TeamSet, VmMigrate};
use godwit_e2e::{Action, Cluster, ClusterSpec, Ending, GuestSpec, Party, ProcessRole, other_qemu};
use godwit_lab::LinkState;
use godwit_model::{Bytes, BytesPerSec, DiskFormat, DiskSpec, ErrorCode, MigrationForecast, MigrationPolicy, Millis, Name};

#[test]
fn a_vm_with_a_shared_disk_moves_there_and_back_and_nobody_notices() -> Result<()> {
    let mut cluster = ClusterSpec::new(2)?.up()?;
    let disk = DiskSpec { size: Some(Bytes::mib(64)), ..DiskSpec::new("shared/root".parse()?, DiskFormat::Qcow2) };
    let still = GuestSpec::small("still").knob("dirty=0").knob("check=4M");
    cluster.boot_all(&[(GuestSpec::small("web").vcpus(2).disk(disk), "h1"), (still, "h2")])?;
    let (web, still) = (cluster.guest("web")?.address, cluster.guest("still")?.address);
    let stream = cluster.outside().stream(web)?;
    let (echo, control) = (cluster.outside().echo(web)?, cluster.outside().echo(still)?);
    for to in ["h2", "h1", "h2"] {
        let began = Instant::now();
        cluster.run(&[Action::Migrate("web", to)])?;
        let ended = Instant::now();
        let (outage, beside) = (echo.longest_gap(began, ended), control.longest_gap(began, ended));
        eprintln!("to {to}: outage {outage:?}, control {beside:?}; {:?}", cluster.status("web")?);
        // How short is the demo's to judge, on a machine that does nothing else; here nobody may be left without an answer.
        ensure!(outage < Duration::from_secs(5), "an outage of {outage:?}, beside {beside:?}");
    }
    let report = stream.report();
    ensure!(report.resets == 0 && report.mismatches == 0 && report.bytes > 0, "{report:?}");
    ensure!(cluster.status("web")?.clock_jumps == 0, "its clock jumped");
    drop((stream, echo, control));
    cluster.finish()
}

#[test]
fn a_vm_that_comes_home_or_has_a_snapshot_where_it_goes_costs_a_fraction_of_the_way_out() -> Result<()> {
    // QEMU may watch what the guest writes.
    let spec = ClusterSpec::new(3)?.agent("h1", &["--unprivileged-userfaultfd"]);
    let mut cluster = spec.up()?;
    cluster.boot(&GuestSpec::small("web").knob("touch_total=64M").knob("dirty=1M").knob("check=8M"), "h1")?;
    let wire = |cluster: &mut Cluster, to: &'static str| -> Result<u64> {
        let task = cluster.migrate("web", to)?;
        Ok(task.figures.context("the migration has no figures")?.wire_bytes.get())
    };
    let (out, home) = (wire(&mut cluster, "h2")?, wire(&mut cluster, "h1")?);
    // The last host has never had it, and sees the pool of the vault.
    cluster.take("web", "one")?;
    let onward = wire(&mut cluster, "h3")?;
    eprintln!("out {out}, home {home}, onward with a snapshot {onward}");
    ensure!(out > 8 * home.max(onward), "out {out} bytes, home {home}, onward {onward}");
    cluster.check()?;
    let kept = |cluster: &Cluster| -> Result<Vec<std::path::PathBuf>> {
        let dir = cluster.lab().status()?.dir.join("h1/state/stays");
        Ok(std::fs::read_dir(&dir)
            .with_context(|| format!("read {}", dir.display()))?
            .flatten()
            .map(|entry| entry.path())
            .collect())
    };
    ensure!(!kept(&cluster)?.is_empty(), "nothing was kept");
    cluster.finish()
}

#[test]
fn a_migration_that_cannot_work_is_refused_before_anything_starts() -> Result<()> {
    let mut cluster = ClusterSpec::new(3)?.agent("h2", &["--memory", "150MiB"]).up()?;
    cluster.boot(&GuestSpec::small("web"), "h1")?;
    let refused = |cluster: &mut Cluster, proves: &str, to: &str, code: ErrorCode| -> Result<String> {
        let refusal =
            cluster.begin_move("web", to, MigrationPolicy::default()).err().with_context(|| format!("{proves}: began"))?;
        ensure!(refusal.code == code && refusal.hint.is_some(), "{proves}: {refusal:?}");
        ensure!(cluster.processes("h2")?.is_empty() && cluster.processes("h3")?.is_empty(), "{proves}: something was started");
        Ok(refusal.message)
    };
    refused(&mut cluster, "an unknown host", "h9", ErrorCode::NotFound)?;
    refused(&mut cluster, "the host where it runs", "h1", ErrorCode::AlreadyOnHost)?;
    let message = refused(&mut cluster, "too little memory", "h2", ErrorCode::NotEnoughMemory)?;
    // A guest that an old QEMU emulates has 8 KiB more.
    let missing = message.contains("44040192 bytes") || message.contains("44048384 bytes");
    ensure!(message.contains("42 MiB") && missing, "it does not say how much is missing: {message}");
    cluster.lab().agent("h3")?.crash()?;
    cluster.wait_connected("h3", false)?;
    refused(&mut cluster, "a host whose agent is down", "h3", ErrorCode::HostDown)?;
    cluster.run(&[Action::Restart(Party::Agent("h3")), Action::Migrate("web", "h3")])?;
    cluster.finish()
}

#[test]
fn a_second_migration_of_one_vm_gets_a_conflict_and_a_cancel_works_until_the_switch() -> Result<()> {
    let mut cluster = ClusterSpec::new(3)?.up()?;
    cluster.boot(&GuestSpec::small("web"), "h1")?;
    let echo = cluster.outside().echo(cluster.guest("web")?.address)?;
    cluster.run(&[Action::IntoTheMiddle("web", "h2")])?;
    let first = cluster.moves_of("web").context("it was begun")?;
    for to in ["h2", "h3"] {
        let refusal = cluster.begin_move("web", to, MigrationPolicy::default()).err().context("a second migration began")?;
        ensure!(refusal.code == ErrorCode::VmBusy && refusal.hint.is_some(), "{refusal:?}");
        ensure!(refusal.message.contains(&first.to_string()), "it does not say which task: {refusal:?}");
        ensure!(godwit_api::status::http_status(refusal.code) == 409);
    }
    let began = Instant::now();
    cluster.run(&[Action::Cancel("web"), Action::Ends("web", Ending::Cancelled("h1"))])?;
    let gap = echo.longest_gap(began, Instant::now());
    ensure!(gap < Duration::from_millis(500), "a cancel during warm-up cost an outage of {gap:?}");
    drop(echo);

    // What has ended can no longer be cancelled, and says so.
    let done = cluster.migrate("web", "h3")?;
    let late = cluster.ask(cluster.client().cancel_task(done.id)).err().context("a cancel after the switch was accepted")?;
    ensure!(late.code == ErrorCode::TooLate && late.hint.is_some(), "{late:?}");
    cluster.run(&[Action::Migrate("web", "h2")])?;
    cluster.finish()
}

#[test]
fn an_agent_killed_and_started_again_adopts_its_vm_and_the_guest_notices_nothing() -> Result<()> {
    let mut cluster = ClusterSpec::new(2)?.up()?;
    cluster.boot(&GuestSpec::small("web"), "h1")?;
    let web = cluster.guest("web")?.address;
    let (stream, echo) = (cluster.outside().stream(web)?, cluster.outside().echo(web)?);
    let qemu = |cluster: &Cluster| -> Result<u32> {
        let all = cluster.processes("h1")?;
        Ok(all.iter().find(|process| matches!(process.role, ProcessRole::Qemu(_))).context("no QEMU")?.pid)
    };
    let (pid, before, heard) = (qemu(&cluster)?, cluster.status("web")?, cluster.witness().log());
    let began = Instant::now();
    cluster.run(&[
        Action::Kill(Party::Agent("h1")),
        Action::Pass(Duration::from_secs(3)),
        Action::Restart(Party::Agent("h1")),
        Action::Pass(Duration::from_secs(1)),
    ])?;
    // How long is this machine's affair: a QEMU that had gone with its agent would never answer again.
    println!("longest gap: {:?}", echo.longest_gap(began, Instant::now()));
    let (after, hears) = (cluster.status("web")?, cluster.witness().log());
    ensure!(qemu(&cluster)? == pid, "it is another QEMU");
    ensure!(after.boot == before.boot && after.clock_jumps == before.clock_jumps, "{before:?} {after:?}");
    let missing = |log: &godwit_guest::WitnessLog| log.vm("web").map(|vm| vm.missing);
    // It may answer before its first record is heard.
    ensure!(
        missing(&hears) == Some(missing(&heard).unwrap_or_default()),
        "records are missing: {:?} {:?}",
        missing(&heard),
        missing(&hears)
    );
    ensure!(stream.report().resets == 0, "{:?}", stream.report());
    drop((stream, echo));
    // The new agent commands it as the old one did.
    cluster.run(&[Action::Migrate("web", "h2"), Action::Migrate("web", "h1")])?;
    cluster.finish()
}

#[test]
fn a_link_that_is_out_for_ten_seconds_in_the_middle_of_a_move_costs_time_and_nothing_else() -> Result<()> {
    // With its memory there, the way home would be over before its middle.
    let mut cluster = ClusterSpec::new(2)?.agent("h1", &["--stays", "0"]).up()?;
    cluster.boot(&GuestSpec::small("web"), "h1")?;
    cluster.run(&[
        Action::IntoTheMiddle("web", "h2"),
        Action::Link("h2", LinkState::Down),
        Action::Pass(Duration::from_secs(10)),
        Action::Link("h2", LinkState::Up),
        Action::Ends("web", Ending::Moved("h2")),
        // For less than it takes to notice.
        Action::IntoTheMiddle("web", "h1"),
        Action::Link("h1", LinkState::Down),
        Action::Pass(Duration::from_secs(1)),
        Action::Link("h1", LinkState::Up),
        Action::Ends("web", Ending::Moved("h1")),
    ])?;
    cluster.finish()
}

#[test]
fn what_migrations_that_leave_a_host_take_together_is_limited_and_can_be_changed_while_they_run() -> Result<()> {
    const LIMIT: u64 = 2_000_000;
    let mut cluster = ClusterSpec::new(2)?.up()?;
    let guest = |name| GuestSpec::small(name).knob("touch_total=64M").knob("dirty=100");
    cluster.boot_all(&[(guest("web"), "h1"), (guest("db"), "h1")])?;
    let limit = |cluster: &Cluster, bandwidth: Option<u64>| {
        let request = HostSet { migration_bandwidth: bandwidth.map(BytesPerSec) };
        cluster.ask(cluster.client().set_host(&"h1".parse()?, &request)).context("set the limit")
    };
    limit(&cluster, Some(LIMIT))?;
    let mut moves = vec![];
    for vm in ["web", "db"] {
        let task = cluster.begin_move(vm, "h2", MigrationPolicy::default())?;
        cluster.wait_progress(task, |progress| progress.wire_bytes.get() > 100_000)?;
        moves.push(task);
    }
    let sent = |cluster: &Cluster| -> Result<u64> {
        let tasks = moves.iter().map(|task| cluster.task(*task)).collect::<Result<Vec<_>>>()?;
        Ok(tasks.iter().filter_map(|task| task.progress.as_ref()).map(|progress| progress.wire_bytes.get()).sum())
    };
    let (before, began) = (sent(&cluster)?, Instant::now());
    thread::sleep(Duration::from_secs(4));
    let (bytes, time) = (sent(&cluster)? - before, began.elapsed());
    // What each is told of is half a second old at most.
    let most = (LIMIT as f64 * (time.as_secs_f64() + 1.0)) as u64;
    ensure!(bytes > LIMIT && bytes < most, "{bytes} bytes in {time:?} together, at most {most} are allowed");
    // One of them gets less by itself, and then any bandwidth again.
    let slow = moves[0];
    let wire = |cluster: &Cluster| Ok::<_, anyhow::Error>(cluster.task(slow)?.progress.context("progress")?.wire_bytes.get());
    cluster.ask(cluster.client().set_task_bandwidth(slow, Some(BytesPerSec(1_000_000))))?;
    limit(&cluster, None)?;
    // What it was told of before is gone by then.
    thread::sleep(Duration::from_secs(1));
    let (before, began) = (wire(&cluster)?, Instant::now());
    thread::sleep(Duration::from_secs(3));
    let (bytes, most) = (wire(&cluster)? - before, (1e6 * (began.elapsed().as_secs_f64() + 1.0)) as u64);
    ensure!(bytes > 500_000 && bytes < most, "{bytes} bytes of the one that may take 1 MB/s, at most {most} are allowed");
    cluster.ask(cluster.client().set_task_bandwidth(slow, None))?;
    for task in moves {
        let figures = cluster.done(task, Duration::from_secs(120))?.figures.context("figures")?;
        ensure!(figures.predicted_blackout.is_some(), "{figures:?}");
    }
    cluster.check()?;
    cluster.finish()
}

#[test]
fn what_a_move_will_cost_is_told_before_it_begins_and_learned_from_those_before() -> Result<()> {
    let often = ["--sample-writes", "1s"];
    let mut cluster = ClusterSpec::new(2)?.agent("h1", &often).agent("h2", &often).up()?;
    cluster.boot(&GuestSpec::small("web").knob("dirty=8M"), "h1")?;
    let forecast = |cluster: &Cluster, to: &str, policy: MigrationPolicy| -> Result<MigrationForecast> {
        let request = VmMigrate { host: to.parse()?, policy: policy.into(), dry_run: true, reason: None };
        cluster.ask(cluster.client().migrate_vm(&"web".parse()?, &request))?.forecast.context("a forecast")
    };
    let policy = MigrationPolicy::default();
    let memory = cluster.ask(cluster.client().vm(&"web".parse()?))?.spec.memory;
    // Out, home, and out to a host that has had it: of each kind nothing is known at first.
    for (to, learned) in [("h2", 0), ("h1", 1), ("h2", 1), ("h1", 1)] {
        let told = forecast(&cluster, to, policy)?;
        ensure!(told.learned_from == learned, "to {to}: {told:?}");
        // Its RAM, and what firmware and devices have for themselves.
        ensure!(told.memory > Bytes::mib(16) && told.memory.get() <= memory.get() + (32 << 20), "{told:?}");
        let task = cluster.begin_move("web", to, policy)?;
        let figures = cluster.done(task, Duration::from_secs(120))?.figures.context("figures")?;
        let expected = figures.forecast.context("a forecast beside what it cost")?;
        ensure!(expected.learned_from == learned && expected.blackout.most >= expected.blackout.expected, "{expected:?}");
    }
    // Its hosts measure what it writes, wherever it is; a guest that got no processor for a second wrote nothing in it.
    let mut measured = Vec::new();
    let plausible = |rate: &BytesPerSec| (BytesPerSec(2 << 20)..BytesPerSec(100 << 20)).contains(rate);
    while measured.len() < 30 && !measured.iter().flatten().any(plausible) {
        measured.push(cluster.ask(cluster.client().vm(&"web".parse()?))?.status.dirty_rate);
        thread::sleep(Duration::from_secs(1));
    }
    ensure!(measured.iter().flatten().any(plausible), "that is not what it writes: {measured:?}");
    ensure!(measured.iter().flatten().all(|rate| *rate < BytesPerSec(100 << 20)), "it never wrote so much: {measured:?}");
    let impossible = MigrationPolicy { max_blackout: Millis(50), ..policy };
    let needs = forecast(&cluster, "h2", impossible)?.needs.context("less than what a switch takes")?;
    ensure!(needs.max_blackout > impossible.max_blackout && needs.bandwidth.is_none(), "{needs:?}");
    let allowed = MigrationPolicy { max_blackout: needs.max_blackout, ..policy };
    ensure!(forecast(&cluster, "h2", allowed)?.needs.is_none_or(|more| more.max_blackout > needs.max_blackout));
    cluster.check()?;
    cluster.finish()
}

/// An idle guest sends everything in one pass, and QEMU is then ready to switch over whenever it likes.
fn idle_guest(qemu: Option<&Path>) -> Result<()> {
    let mut spec = ClusterSpec::new(2)?;
    for host in ["h1", "h2"] {
        spec = qemu.iter().fold(spec, |spec, qemu| spec.qemu(host, qemu));
    }
    let mut cluster = spec.up()?;
    cluster.boot(&GuestSpec::idle("idle").memory(Bytes::mib(128)).knob("touch_total=8M"), "h1")?;
    // What it did while it booted is no longer dirty.
    thread::sleep(Duration::from_secs(3));
    for to in ["h2", "h1", "h2"] {
        cluster.run(&[Action::Migrate("idle", to)])?;
    }
    cluster.finish()
}

#[test]
fn an_idle_guest_moves_although_qemu_reaches_its_switch_over_first() -> Result<()> {
    idle_guest(None)
}

#[test]
fn an_idle_guest_moves_on_the_other_qemu_too() -> Result<()> {
    match other_qemu() {
        Some(qemu) => idle_guest(Some(&qemu)),
        None => {
            eprintln!("GODWIT_QEMU_OTHER is not set: nothing is proven here");
            Ok(())
        }
    }
}

#[test]
fn a_vm_moves_between_two_versions_of_qemu_and_back() -> Result<()> {
    let Some(other) = other_qemu() else {
        eprintln!("GODWIT_QEMU_OTHER is not set: nothing is proven here");
        return Ok(());
    };
    let mut cluster = ClusterSpec::new(2)?.qemu("h2", &other).up()?;
    let versions: Vec<String> = cluster
        .ask(cluster.client().hosts())?
        .into_iter()
        .filter_map(|host| host.facts.map(|facts| facts.qemu.split('.').next().unwrap_or_default().to_owned()))
        .collect();
    ensure!(versions.len() == 2 && versions[0] != versions[1], "both hosts have QEMU {versions:?}");
    cluster.boot_all(&[(GuestSpec::small("old").vcpus(2), "h1"), (GuestSpec::small("new"), "h2")])?;
    cluster.run(&[
        Action::Migrate("old", "h2"),
        Action::Migrate("new", "h1"),
        Action::Migrate("old", "h1"),
        Action::Migrate("new", "h2"),
    ])?;
    cluster.finish()
}

#[test]
fn what_a_vm_has_in_common_with_a_neighbour_does_not_travel_where_the_team_shares_memory() -> Result<()> {
    let spec = ClusterSpec::new(2)?;
    let mut cluster = other_qemu().iter().fold(spec, |spec, qemu| spec.qemu("h2", qemu)).up()?;
    let guest = |name| GuestSpec::small(name).knob("touch_total=8M");
    cluster.boot_all(&[(guest("web"), "h1"), (guest("db"), "h1"), (guest("near"), "h2")])?;
    let mut bytes = |vm: &str, to: &str, shares: bool| -> Result<Bytes> {
        let team = Name::new("default")?;
        cluster.ask(cluster.client().set_team(&team, &TeamSet { share_memory: shares }))?;
        let task = cluster.migrate(vm, to)?;
        let named = task.trail.iter().any(|note| note.text.contains("in common with VMs of its team"));
        ensure!(named == shares, "{:?}", task.trail);
        cluster.check()?;
        Ok(task.figures.context("figures")?.wire_bytes)
    };
    let (alone, beside) = (bytes("web", "h2", false)?, bytes("db", "h2", true)?);
    eprintln!("{alone} without a neighbour, {beside} with two");
    ensure!(beside.get() * 10 < alone.get() * 7, "{beside} beside a neighbour, {alone} without");
    cluster.finish()
}
