//! The controller ends in the middle, and goes on where it was; hosts go away, and their tasks wait.

use godwit_api::v1::{self as api, TaskState};
use godwit_link::v1::{self, command::Action};
use godwit_model::{Bytes, ErrorCode, Generation, RunState};

use super::support::*;

#[tokio::test]
async fn a_migration_survives_a_restart_of_the_controller_at_every_step() {
    let mut cluster = Cluster::new().await;
    let (h1, mut a1) = cluster.agent("h1").await;
    let (h2, mut a2) = cluster.agent("h2").await;
    cluster.running_vm("web1", &mut a1).await;
    let task = cluster.migrate("web1", "h2").await.expect("accepted");
    let vm = cluster.vm("web1").await;
    let source = vec![report(&vm, 1, RunState::Running, v1::Holding::Owner)];
    let incoming = vec![report(&vm, 2, RunState::Paused, v1::Holding::Incoming)];

    // Told to prepare, but the answer never arrived: the same command comes again, of a newer epoch.
    let first = a2.command().await;
    (cluster, a1, a2) = reborn(cluster, a1, a2, (&h1, source.clone()), (&h2, incoming.clone())).await;
    let again = a2.command().await;
    assert_eq!((first.id, &first.action, &first.task), (again.id, &again.action, &again.task));
    assert!(again.epoch > first.epoch);
    a2.done(&again, 99).await;

    // The same with the source.
    let first = a1.command().await;
    (cluster, a1, a2) = reborn(cluster, a1, a2, (&h1, source.clone()), (&h2, incoming.clone())).await;
    let again = a1.command().await;
    assert_eq!((first.id, &first.action), (again.id, &again.action));
    assert!(matches!(again.action, Some(Action::Migrate(_))));
    a1.done(&again, 0).await;
    cluster.task_when(task.id, |task| task.step.contains("moves from")).await;

    // Under way: nothing is sent again, and the end is heard by the next controller.
    (cluster, a1, a2) = reborn(cluster, a1, a2, (&h1, source), (&h2, incoming)).await;
    assert_eq!(cluster.admin().task(task.id).await.expect("task").state, TaskState::Running);
    assert_eq!(code(cluster.migrate("web1", "h2").await), ErrorCode::VmBusy);
    a1.ended(ended(&task, &vm, 2, true, None)).await;
    let after = cluster.vm("web1").await;
    assert_eq!((after.status.host, after.status.generation), (Some(name("h2")), Generation(2)));

    // One side's word is stored, the other's comes after the restart.
    let source = vec![report(&vm, 1, RunState::Stopped, v1::Holding::Released)];
    let owner = vec![report(&vm, 2, RunState::Running, v1::Holding::Owner)];
    (cluster, a1, a2) = reborn(cluster, a1, a2, (&h1, source), (&h2, owner)).await;
    a2.ended(ended(&task, &vm, 2, false, None)).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
    let after = cluster.vm("web1").await;
    assert_eq!((after.status.host, after.status.state, after.status.activity), (Some(name("h2")), RunState::Running, None));
    drop((a1, a2));
}

type Known<'a> = (&'a Host, Vec<v1::VmReport>);

async fn reborn(mut cluster: Cluster, a1: Agent, a2: Agent, h1: Known<'_>, h2: Known<'_>) -> (Cluster, Agent, Agent) {
    cluster.stop().await;
    drop((a1, a2));
    cluster.start().await;
    let a1 = cluster.connect(h1.0, h1.1).await;
    let a2 = cluster.connect(h2.0, h2.1).await;
    (cluster, a1, a2)
}

#[tokio::test]
async fn a_task_waits_for_a_host_that_is_away_and_says_so() {
    let cluster = Cluster::new().await;
    let (h1, mut a1) = cluster.agent("h1").await;
    let (_, mut a2) = cluster.agent("h2").await;
    cluster.running_vm("web1", &mut a1).await;
    let task = cluster.migrate("web1", "h2").await.expect("accepted");
    let prepare = a2.command().await;
    drop(a1);
    cluster.connected("h1", false).await;
    a2.done(&prepare, 7).await;
    let waiting = cluster.task_when(task.id, |task| task.step.contains("waits for host h1")).await;
    assert!(waiting.step.contains("not connected since 20"), "{}", waiting.step);
    let vm = cluster.vm("web1").await;
    assert!(vm.status.conditions.iter().any(|condition| condition.name == "host_unreachable"), "{:?}", vm.status.conditions);
    assert_eq!(vm.status.state, RunState::Running, "a silent host was taken for a dead one");
    let mut a1 = cluster.connect(&h1, vec![report(&vm, 1, RunState::Running, v1::Holding::Owner)]).await;
    let out = a1.command().await;
    assert!(matches!(out.action, Some(Action::Migrate(_))), "{out:?}");
}

#[tokio::test]
async fn journals_correct_what_is_believed_upwards_only() {
    let mut cluster = Cluster::new().await;
    let (h1, mut a1) = cluster.agent("h1").await;
    let (h2, mut a2) = cluster.agent("h2").await;
    cluster.running_vm("web1", &mut a1).await;
    let task = cluster.migrate("web1", "h2").await.expect("accepted");
    let prepare = a2.command().await;
    a2.done(&prepare, 7).await;
    let out = a1.command().await;
    a1.done(&out, 0).await;
    let vm = cluster.vm("web1").await;
    cluster.stop().await;
    drop((a1, a2));
    cluster.start().await;
    // The destination took over while no controller was there; the source comes back with what it was before.
    let a2 = cluster.connect(&h2, vec![report(&vm, 2, RunState::Running, v1::Holding::Owner)]).await;
    cluster.vm_when("web1", |vm| vm.status.host == Some(name("h2"))).await;
    let a1 = cluster.connect(&h1, vec![report(&vm, 1, RunState::Stopped, v1::Holding::Owner)]).await;
    cluster.connected("h1", true).await;
    let after = cluster.vm("web1").await;
    assert_eq!(
        (after.status.host, after.status.generation, after.status.state),
        (Some(name("h2")), Generation(2), RunState::Running)
    );
    assert_eq!(cluster.admin().task(task.id).await.expect("task").state, TaskState::Running, "the source has not said its word");
    drop((a1, a2));
}

#[tokio::test]
async fn a_leftover_of_a_migration_that_ended_is_declined_when_its_host_comes_back() {
    let cluster = Cluster::new().await;
    let (_, mut a1) = cluster.agent("h1").await;
    let (h2, mut a2) = cluster.agent("h2").await;
    cluster.running_vm("web1", &mut a1).await;
    let task = cluster.migrate("web1", "h2").await.expect("accepted");
    a2.command().await;
    let vm = cluster.vm("web1").await;
    drop(a2);
    cluster.task_when(task.id, |task| task.step.contains("waits for host h2")).await;
    cluster.admin().cancel_task(task.id).await.expect("cancelling");
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Cancelled);
    let mut a2 = cluster.connect(&h2, vec![report(&vm, 2, RunState::Paused, v1::Holding::Incoming)]).await;
    let settle = a2.command().await;
    assert!(matches!(settle.action, Some(Action::Settle(_))), "{settle:?}");
    assert_eq!(settle.task, task.id.to_string());
}

#[tokio::test]
async fn a_start_survives_a_restart_of_the_controller() {
    let mut cluster = Cluster::new().await;
    let (h1, mut agent) = cluster.agent("h1").await;
    cluster.create_vm("web1", Bytes::mib(512)).await;
    let task = cluster.admin().start_vm(&name("web1"), &api::VmStart::default()).await.expect("accepted");
    let first = agent.command().await;
    cluster.stop().await;
    drop(agent);
    cluster.start().await;
    let mut agent = cluster.connect(&h1, vec![]).await;
    let again = agent.command().await;
    assert_eq!((first.id, first.action), (again.id, again.action.clone()));
    agent.done(&again, 0).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
}

#[tokio::test]
async fn two_controllers_cannot_have_one_data_directory_and_clear_text_stays_on_loopback() {
    let cluster = Cluster::new().await;
    let second = crate::Controller::start(cluster.options.clone()).await;
    assert!(matches!(second, Err(crate::ServeError::Locked { .. })));
    let mut clear = cluster.options.clone();
    clear.data_dir = cluster.dir.path().join("other");
    clear.insecure_loopback = true;
    clear.api_listen = ([0, 0, 0, 0], 0).into();
    assert!(matches!(crate::Controller::start(clear).await, Err(crate::ServeError::ClearText { .. })));
}
