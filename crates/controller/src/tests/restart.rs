//! The controller ends in the middle, and goes on where it was; hosts go away, and their tasks wait.

use godwit_api::v1::{self as api, TaskState};
use godwit_link::status::refusal_of;
use godwit_link::v1::{self, command::Action};
use godwit_model::{Bytes, ErrorCode, Generation, RunState};

use super::support::*;

/// What a command wants: the next controller signs the same grant with its own certificate.
pub(super) fn wanted(command: &v1::Command) -> Option<Action> {
    let mut action = command.action.clone();
    let grant = match &mut action {
        Some(Action::Start(start)) => &mut start.grant,
        Some(Action::Prepare(prepare)) => &mut prepare.grant,
        Some(Action::Migrate(migrate)) => &mut migrate.grant,
        _ => &mut None,
    };
    if let Some(grant) = grant {
        (grant.signature, grant.chain) = (vec![], vec![]);
    }
    action
}

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
    assert_eq!((first.id, wanted(&first), &first.task), (again.id, wanted(&again), &again.task));
    assert!(again.epoch > first.epoch);
    a2.done(&again, 99).await;

    // The same with the source.
    let first = a1.command().await;
    (cluster, a1, a2) = reborn(cluster, a1, a2, (&h1, source.clone()), (&h2, incoming.clone())).await;
    let again = a1.command().await;
    assert_eq!((first.id, wanted(&first)), (again.id, wanted(&again)));
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
    assert_eq!((first.id, wanted(&first)), (again.id, wanted(&again)));
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

/// Copies the controller's data as a backup would, while it does not run.
fn copy(from: &std::path::Path, to: &std::path::Path) {
    let _ = std::fs::remove_dir_all(to);
    std::fs::create_dir_all(to).expect("directory");
    for entry in std::fs::read_dir(from).expect("directory") {
        let entry = entry.expect("entry");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("type").is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("copied");
        }
    }
}

#[tokio::test]
async fn a_store_that_is_an_old_copy_grants_nothing_before_every_host_has_said_what_it_runs() {
    let mut cluster = Cluster::new().await;
    let (h1, mut a1) = cluster.agent("h1").await;
    let (h2, a2) = cluster.agent("h2").await;
    cluster.running_vm("web1", &mut a1).await;
    let vm = cluster.vm("web1").await;
    cluster.stop().await;
    drop((a1, a2));
    let (data, backup) = (cluster.options.data_dir.clone(), cluster.dir.path().join("backup"));
    copy(&data, &backup);

    // The VM moves on after the copy was made.
    cluster.start().await;
    let mut a1 = cluster.connect(&h1, vec![report(&vm, 1, RunState::Running, v1::Holding::Owner)]).await;
    let mut a2 = cluster.connect(&h2, vec![]).await;
    a1.fleet_when(|_| true).await;
    let before = a1.fleet.as_ref().map_or(0, |fleet| fleet.mark);
    let task = cluster.migrate("web1", "h2").await.expect("accepted");
    let told = a1.told(before).await;
    let prepare = a2.command().await;
    a2.done(&prepare, 99).await;
    let begin = a1.command().await;
    a1.done(&begin, 0).await;
    a1.ended(ended(&task, &vm, 2, true, None)).await;
    a2.ended(ended(&task, &vm, 2, false, None)).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
    cluster.stop().await;
    drop((a1, a2));

    // The old copy, started as if nothing were: whoever was told more refuses to be its host.
    copy(&backup, &data);
    cluster.start().await;
    let (h1, h2) = (Host { told: told.clone(), ..h1 }, Host { told, ..h2 });
    let refused = cluster.try_connect(&h1, vec![]).await.err().expect("a host that was told more");
    assert_eq!(refusal_of(&refused).code, ErrorCode::GenerationStale);
    cluster.stop().await;

    // Started as what it is: h2 is waited for, and h9, which only h1 knows of.
    cluster.options.restored = true;
    cluster.start().await;
    let mut h1 = Host { members: vec!["h1".into(), "h9".into(), "../x".into()], ..h1 };
    let mut a1 = cluster.connect(&h1, vec![]).await;
    soon(async {
        while !cluster.migrate("web1", "h2").await.expect_err("too early").to_string().contains("known yet: h2, h9") {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(code(cluster.migrate("web1", "h2").await), ErrorCode::HostDown);
    // It has to be heard whoever starts the controller again, and how.
    h1.told = a1.told(0).await;
    cluster.stop().await;
    drop(a1);
    cluster.options.restored = false;
    cluster.start().await;
    a1 = cluster.connect(&h1, vec![]).await;
    let a2 = cluster.connect(&h2, vec![report(&vm, 2, RunState::Running, v1::Holding::Owner)]).await;
    cluster.vm_when("web1", |vm| vm.status.host == Some(name("h2"))).await;
    assert_eq!(cluster.vm("web1").await.status.generation, Generation(2));
    assert_eq!(code(cluster.migrate("web1", "h1").await), ErrorCode::HostDown, "h9 may run it");
    assert_eq!(code(cluster.admin().delete_host(&name("h9"), false).await), ErrorCode::NotFound);
    cluster.admin().delete_host(&name("h9"), true).await.expect("somebody's word");
    assert_eq!(code(cluster.admin().delete_host(&name("h9"), true).await), ErrorCode::NotFound);

    // From there on as ever, with numbers that nobody can have seen.
    cluster.migrate("web1", "h1").await.expect("accepted");
    let Some(Action::Prepare(body)) = a1.command().await.action else { panic!("no prepare") };
    let grant: godwit_model::Grant = serde_json::from_slice(&body.grant.expect("a grant").statement).expect("a grant");
    assert!(grant.generation > Generation(1 << 32) && grant.source == Some(name("h2")), "{grant:?}");
    drop(a2);
}
