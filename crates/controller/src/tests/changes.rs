//! Changing what a VM is made of: at once, or at its next start, or not at all.

use godwit_api::v1::{self as api, TaskState};
use godwit_link::decode;
use godwit_link::v1::command::Action;
use godwit_model::{Bytes, ErrorCode, NicSpec, ResolvedSpec, Seconds, VmSpec};

use super::support::*;

async fn set(cluster: &Cluster, change: impl FnOnce(&mut VmSpec)) -> api::Task {
    let vm = cluster.vm("web1").await;
    let mut spec = vm.spec;
    change(&mut spec);
    cluster.admin().set_vm(&name("web1"), &spec, Some(vm.revision)).await.expect("accepted")
}

fn wanted(command: &godwit_link::v1::Command) -> ResolvedSpec {
    let Some(Action::Change(change)) = &command.action else { panic!("{command:?}") };
    decode("spec", &change.spec).expect("spec")
}

#[tokio::test]
async fn a_running_vm_changes_step_by_step_and_the_rest_waits_for_its_next_start() {
    let cluster = Cluster::new().await;
    let (_, mut agent) = cluster.agent("h1").await;
    cluster.running_vm("web1", &mut agent).await;
    let task = set(&cluster, |spec| {
        spec.nics.push(NicSpec::new(name("default")));
        spec.nics[0].link_up = false;
        spec.memory = Bytes::mib(1_024);
        spec.tablet = true;
        spec.labels.insert(name("tier"), "web".into());
    })
    .await;
    assert_eq!((task.kind.as_str(), task.state), ("vm.set", TaskState::Running));
    let first = agent.command().await;
    let now = wanted(&first);
    assert_eq!((now.nics.len(), now.nics[0].link_up, now.platform.tablet), (1, false, false));
    agent.done(&first, 0).await;
    let second = agent.command().await;
    let now = wanted(&second);
    assert_eq!((now.nics.len(), now.nics[1].slot), (2, Some(8)));
    agent.done(&second, 0).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
    let vm = cluster.vm("web1").await;
    let fields: Vec<&str> = vm.status.waiting.iter().map(|waiting| waiting.field.as_str()).collect();
    assert_eq!(fields, ["memory", "tablet"]);
    assert_eq!((vm.spec.nics[1].mac.is_some(), vm.spec.labels.len()), (true, 1));
    agent.fleet_when(|fleet| fleet.locations.len() == 2).await;

    // What is written down already is not done again.
    let task = set(&cluster, |_| {}).await;
    assert_eq!(task.state, TaskState::Done);
    assert!(task.trail.iter().any(|note| note.text.contains("memory, tablet")), "{:?}", task.trail);
}

#[tokio::test]
async fn what_the_host_refuses_is_not_taken_for_done() {
    let cluster = Cluster::new().await;
    let (_, mut agent) = cluster.agent("h1").await;
    cluster.running_vm("web1", &mut agent).await;
    let task = set(&cluster, |spec| spec.nics[0].link_up = false).await;
    let command = agent.command().await;
    agent.refuse(&command, ErrorCode::QemuFailed).await;
    let ended = cluster.ended(task.id).await;
    assert_eq!((ended.state, ended.error.expect("why").code), (TaskState::Failed, ErrorCode::QemuFailed));
    let waiting = cluster.vm("web1").await.status.waiting;
    assert_eq!(waiting.iter().map(|waiting| waiting.field.as_str()).collect::<Vec<_>>(), ["interface in slot 0"]);
    // Asked again, it is tried again.
    let task = set(&cluster, |_| {}).await;
    let command = agent.command().await;
    agent.done(&command, 0).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
    assert!(cluster.vm("web1").await.status.waiting.is_empty());
}

#[tokio::test]
async fn a_vm_that_does_not_run_is_changed_at_once_and_a_stale_or_foreign_wish_is_refused() {
    let cluster = Cluster::new().await;
    let (_, mut agent) = cluster.agent("h1").await;
    cluster.create_vm("web1", Bytes::mib(512)).await;
    cluster.create_vm("web2", Bytes::mib(512)).await;
    let before = cluster.vm("web1").await;
    let task = set(&cluster, |spec| {
        spec.shutdown_deadline = Some(Seconds(30));
        spec.memory = Bytes::mib(256);
    })
    .await;
    assert_eq!(task.state, TaskState::Done);
    let vm = cluster.vm("web1").await;
    assert_eq!((vm.spec.memory, vm.status.waiting.len(), vm.spec.vmgenid), (Bytes::mib(256), 0, before.spec.vmgenid));
    let admin = cluster.admin();
    assert_eq!(code(admin.set_vm(&name("web1"), &before.spec, Some(before.revision)).await), ErrorCode::RevisionConflict);
    let mut stolen = vm.spec.clone();
    stolen.nics[0].mac = cluster.vm("web2").await.spec.nics[0].mac;
    assert_eq!(code(admin.set_vm(&name("web1"), &stolen, None).await), ErrorCode::InUse);
    // The address of before is free for another VM.
    let mac = before.spec.nics[0].mac;
    set(&cluster, |spec| spec.nics.clear()).await;
    let mut other = cluster.vm("web2").await.spec;
    other.nics[0].mac = mac;
    assert_eq!(admin.set_vm(&name("web2"), &other, None).await.expect("accepted").state, TaskState::Done);
    // Started, it is what was asked for last.
    admin.start_vm(&name("web1"), &api::VmStart::default()).await.expect("accepted");
    let start = agent.command().await;
    let Some(Action::Start(body)) = &start.action else { panic!("{start:?}") };
    let spec: ResolvedSpec = decode("spec", &body.spec).expect("spec");
    assert_eq!((spec.memory, spec.nics.len(), spec.platform.hotplug_ports), (Bytes::mib(256), 0, 4));
    agent.done(&start, 0).await;
}
