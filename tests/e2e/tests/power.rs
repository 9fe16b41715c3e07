//! A host goes down and comes back: its guests are powered off in order, and those that shall start again do.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit_api::v1::TaskState;
use godwit_e2e::{Cluster, ClusterSpec, GuestSpec, ProcessRole};
use godwit_lab::Signal;
use godwit_model::{Autostart, Name, RunState};

/// Far less than the guests may take: who is through by then was not waited for in vain, and not ended by force.
const PATIENCE: Duration = Duration::from_secs(120);

fn state(cluster: &Cluster, vm: &str) -> Result<RunState> {
    Ok(cluster.ask(cluster.client().vm(&Name::new(vm)?))?.status.state)
}

fn wait_for(cluster: &Cluster, vm: &str, wanted: RunState) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while state(cluster, vm)? != wanted {
        ensure!(Instant::now() < deadline, "{vm} does not become {wanted:?}");
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

#[test]
fn guests_are_powered_off_with_their_host_and_started_again_in_order() -> Result<()> {
    let mut cluster = ClusterSpec::new(1)?.up()?;
    let small = |name: &str| GuestSpec::idle(name).knob("touch_total=8M");
    let database = small("database").shape(|spec| spec.autostart = Some(Autostart { order: 1 }));
    let web = small("web").shape(|spec| spec.autostart = Some(Autostart { order: 2 }));
    cluster.boot_all(&[(web, "h1"), (database, "h1"), (small("job"), "h1")])?;

    let agent = cluster.lab().agent("h1")?;
    agent.signal(Signal::POWER)?;
    agent.wait_exit(PATIENCE).context("the agent ends when its guests have")?;
    let left: Vec<_> =
        cluster.processes("h1")?.into_iter().filter(|process| matches!(process.role, ProcessRole::Qemu(_))).collect();
    ensure!(left.is_empty(), "still there: {left:?}");
    cluster.wait_connected("h1", false)?;
    ensure!(state(&cluster, "web")? == RunState::Running, "nobody has told the controller, and it guesses nothing");

    agent.spawn()?;
    for guest in ["job", "database", "web"] {
        wait_for(&cluster, guest, RunState::Stopped).context("the host tells what became of its guests")?;
    }
    for guest in ["database", "web"] {
        wait_for(&cluster, guest, RunState::Running)?;
    }
    ensure!(state(&cluster, "job")? == RunState::Stopped, "what does not start by itself was started");
    for guest in ["database", "web"] {
        cluster.status(guest)?;
    }
    let tasks = cluster.ask(cluster.client().tasks())?;
    let mut starts: Vec<_> = tasks.iter().filter(|task| task.principal == "autostart").collect();
    starts.sort_by_key(|task| task.created);
    let subjects: Vec<&str> = starts.iter().map(|task| task.subject.as_str()).collect();
    ensure!(subjects == ["database", "web"], "{subjects:?}");
    ensure!(starts.iter().all(|task| task.state == TaskState::Done), "{starts:?}");
    ensure!(starts[0].ended.is_some_and(|ended| ended <= starts[1].created), "the second did not wait for the first");

    // An agent that is merely restarted starts nothing.
    agent.crash()?;
    agent.spawn()?;
    cluster.wait_connected("h1", true)?;
    ensure!(cluster.ask(cluster.client().tasks())?.len() == tasks.len(), "a task without a reason");
    cluster.take_down()
}
