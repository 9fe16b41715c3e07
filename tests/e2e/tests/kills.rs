//! `kill -9` of every party in the middle of a migration: nothing is lost, nothing runs twice, nothing is left, and the next one works.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use godwit_e2e::Action::{Ends, IntoTheMiddle, Kill, Migrate, Pass, Restart};
use godwit_e2e::Party::{Agent, Carry, Controller, Qemu};
use godwit_e2e::faults::{Mark, Moment, Tracks};
use godwit_e2e::{Action, Cluster, ClusterSpec, Ending, GuestSpec};
use godwit_lab::Signal;
use godwit_model::{ErrorCode, MigrationPolicy};

/// A guest on h1 that is about to move to h2.
fn cluster(expected: &[&str]) -> Result<Cluster> {
    let mut cluster = ClusterSpec::new(2)?.up()?;
    for words in expected {
        cluster.expect_log(words);
    }
    cluster.boot(&GuestSpec::small("web"), "h1")?;
    Ok(cluster)
}

fn scenario(expected: &[&str], actions: &[Action<'_>]) -> Result<()> {
    let mut cluster = cluster(expected)?;
    let stream = cluster.outside().stream(cluster.guest("web")?.address)?;
    cluster.run(actions)?;
    let report = stream.report();
    anyhow::ensure!(report.resets == 0 && report.mismatches == 0, "its users noticed: {report:?}");
    drop(stream);
    cluster.finish()
}

const A_WHILE: Action<'_> = Pass(Duration::from_secs(3));
/// A destination that lost its QEMU, or ends it, says so.
const NO_QEMU: &[&str] = &["QEMU cannot be looked at"];
const NO_CONNECTION: &[ErrorCode] = &[ErrorCode::MigrationFailed, ErrorCode::QemuFailed];

#[test]
fn a_source_agent_killed_in_the_middle_of_a_migration_loses_nothing() -> Result<()> {
    scenario(
        &[],
        &[
            IntoTheMiddle("web", "h2"),
            Kill(Agent("h1")),
            A_WHILE,
            Restart(Agent("h1")),
            Ends("web", Ending::Moved("h2")),
            Migrate("web", "h1"),
        ],
    )
}

#[test]
fn a_destination_agent_killed_in_the_middle_of_a_migration_loses_nothing() -> Result<()> {
    scenario(
        &[],
        &[
            IntoTheMiddle("web", "h2"),
            Kill(Agent("h2")),
            A_WHILE,
            Restart(Agent("h2")),
            Ends("web", Ending::Moved("h2")),
            Migrate("web", "h1"),
        ],
    )
}

#[test]
fn a_controller_killed_in_the_middle_of_a_migration_loses_nothing() -> Result<()> {
    scenario(
        &[],
        &[
            IntoTheMiddle("web", "h2"),
            Kill(Controller),
            A_WHILE,
            Restart(Controller),
            Ends("web", Ending::Moved("h2")),
            Migrate("web", "h1"),
        ],
    )
}

#[test]
fn a_source_carry_killed_in_the_middle_of_a_migration_leaves_the_vm_where_it_was() -> Result<()> {
    scenario(
        NO_QEMU,
        &[
            IntoTheMiddle("web", "h2"),
            Kill(Carry("web", "h1")),
            Ends("web", Ending::Stayed("h1", NO_CONNECTION)),
            Migrate("web", "h2"),
        ],
    )
}

#[test]
fn a_destination_carry_killed_in_the_middle_of_a_migration_leaves_the_vm_where_it_was() -> Result<()> {
    scenario(
        NO_QEMU,
        &[
            IntoTheMiddle("web", "h2"),
            Kill(Carry("web", "h2")),
            Ends("web", Ending::Stayed("h1", NO_CONNECTION)),
            Migrate("web", "h2"),
        ],
    )
}

#[test]
fn a_destination_qemu_killed_in_the_middle_of_a_migration_leaves_the_vm_where_it_was() -> Result<()> {
    scenario(
        NO_QEMU,
        &[
            IntoTheMiddle("web", "h2"),
            Kill(Qemu("web", "h2")),
            Ends("web", Ending::Stayed("h1", NO_CONNECTION)),
            Migrate("web", "h2"),
        ],
    )
}

/// What a VM's users may notice more than without the kill.
const A_SECOND: Duration = Duration::from_secs(1);
/// The window is some milliseconds long.
const TRIES: usize = 6;

#[test]
fn a_controller_killed_between_release_and_cont_delays_nothing() -> Result<()> {
    let mut cluster = cluster(&[])?;
    let (id, address) = (cluster.guest("web")?.id, cluster.guest("web")?.address);
    let echo = cluster.outside().echo(address)?;
    let mut hosts = ["h1", "h2"];
    let mut undisturbed = Duration::ZERO;
    for attempt in 0..TRIES {
        let [from, to] = hosts;
        let state = |host: &str| anyhow::Ok(cluster.lab_status()?.dir.join(host).join("state"));
        let log = cluster.lab().agent(from)?.log()?;
        let tracks = Tracks::new(id, &state(from)?, &state(to)?, log);
        let began = Instant::now();
        let task = cluster.begin_move("web", to, MigrationPolicy::default())?;
        let mut hit = false;
        // The first shows what it would have been.
        if attempt > 0 {
            let moment = Moment { mark: Mark::Released, after: Duration::ZERO };
            ensure!(tracks.wait(moment).is_some(), "the move was not released");
            cluster.lab().controller().signal(Signal::KILL)?;
            hit = !tracks.destination_activated();
            cluster.lab().controller().wait_exit(A_SECOND * 10)?;
            // It would answer; what counts is that it is not there.
            thread::sleep(A_SECOND * 2);
            ensure!(tracks.destination_activated(), "the destination waits for the controller");
            cluster.lab().controller().spawn()?;
        }
        cluster.done(task, A_SECOND * 60)?;
        let gap = echo.longest_gap(began, Instant::now());
        println!(
            "{from} to {to}, controller killed {}: silent for {gap:?}",
            if hit { "between release and cont" } else { "later, or not" }
        );
        if attempt == 0 {
            undisturbed = gap;
        }
        ensure!(gap < undisturbed + A_SECOND, "without the kill it was silent for {undisturbed:?}");
        hosts.reverse();
        if hit {
            drop(echo);
            return cluster.finish();
        }
    }
    anyhow::bail!("in {TRIES} moves the controller was never killed between release and cont")
}

#[test]
fn a_move_ends_without_a_source_that_stays_away_and_nothing_runs_there_when_it_comes_back() -> Result<()> {
    let mut cluster = ClusterSpec::new(3)?.up()?;
    cluster.boot(&GuestSpec::small("web"), "h1")?;
    let id = cluster.guest("web")?.id;
    for _ in 0..TRIES {
        let state = |host: &str| anyhow::Ok(cluster.lab_status()?.dir.join(host).join("state"));
        let log = cluster.lab().agent("h1")?.log()?;
        let tracks = Tracks::new(id, &state("h1")?, &state("h2")?, log);
        let task = cluster.begin_move("web", "h2", MigrationPolicy::default())?;
        let moment = Moment { mark: Mark::Activated, after: Duration::ZERO };
        ensure!(tracks.wait(moment).is_some(), "the destination has not taken the VM over");
        cluster.run(&[Kill(Agent("h1"))])?;
        let unaware = !tracks.has(Mark::Confirmed);
        if !unaware {
            cluster.run(&[Restart(Agent("h1")), Ends("web", Ending::Moved("h2")), Migrate("web", "h1")])?;
            continue;
        }
        let done = cluster.done(task, A_SECOND * 60)?;
        ensure!(done.trail.iter().any(|note| note.text.contains("h1 says nothing")), "{:?}", done.trail);
        // By the time that the first host asks, the second has nothing of the VM any more.
        cluster.run(&[
            Ends("web", Ending::Moved("h2")),
            Migrate("web", "h3"),
            Restart(Agent("h1")),
            A_WHILE,
            Migrate("web", "h1"),
        ])?;
        return cluster.finish();
    }
    anyhow::bail!("in {TRIES} moves the source's agent was never killed before it knew")
}
