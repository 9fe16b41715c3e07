//! Changing what a VM is made of: at once, or at its next start, or not at all.

use godwit_api::v1::{self as api, TaskState};
use godwit_link::decode;
use godwit_link::v1::{self, agent_message::Body, command::Action};
use godwit_model::{Bytes, ErrorCode, Growth, NicSpec, ResolvedSpec, RunState, Seconds, VmSpec};

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
async fn memory_grows_while_the_vm_runs_and_is_one_again_at_its_next_start() {
    let cluster = Cluster::new().await;
    let (_, mut agent) = cluster.agent("h1").await;
    cluster.create_vm("web1", Bytes::mib(512)).await;
    set(&cluster, |spec| spec.memory_max = Some(Bytes::GIB)).await;
    let start = |agent: godwit_link::v1::Command| -> ResolvedSpec {
        let Some(Action::Start(body)) = agent.action else { panic!("{agent:?}") };
        decode("spec", &body.spec).expect("spec")
    };
    let admin = cluster.admin();
    let task = admin.start_vm(&name("web1"), &api::VmStart::default()).await.expect("accepted");
    let command = agent.command().await;
    assert_eq!(start(command.clone()).growth, Some(Growth::to(Bytes::GIB)));
    agent.done(&command, 0).await;
    cluster.ended(task.id).await;

    // The host has too little: the spec stays as it was asked for, and waits.
    let task = set(&cluster, |spec| spec.memory = Bytes::mib(768)).await;
    let command = agent.command().await;
    let grown = wanted(&command);
    assert_eq!((grown.memory, grown.memory_with_dimms()), (Bytes::mib(512), Bytes::mib(768)));
    agent.refuse(&command, ErrorCode::NotEnoughMemory).await;
    assert_eq!(cluster.ended(task.id).await.error.expect("why").code, ErrorCode::NotEnoughMemory);
    let fields = |vm: &api::Vm| vm.status.waiting.iter().map(|waiting| waiting.field.clone()).collect::<Vec<_>>();
    assert_eq!(fields(&cluster.vm("web1").await), ["memory"]);
    // Asked again it comes; more than there is room for does not, and says so.
    let task = set(&cluster, |_| {}).await;
    let command = agent.command().await;
    assert_eq!(wanted(&command), grown);
    agent.done(&command, 0).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
    assert!(cluster.vm("web1").await.status.waiting.is_empty());
    let task = set(&cluster, |spec| (spec.memory, spec.memory_max) = (Bytes::mib(2_048), Some(Bytes::mib(2_048)))).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
    let vm = cluster.vm("web1").await;
    assert_eq!(fields(&vm), ["memory", "memory_max"]);
    assert!(vm.status.waiting[0].reason.as_ref().is_some_and(|reason| reason.contains("1 GiB")), "{:?}", vm.status.waiting);
    let less = VmSpec { memory_max: Some(Bytes::GIB), ..vm.spec };
    assert_eq!(code(admin.set_vm(&name("web1"), &less, None).await), ErrorCode::SpecInvalid);

    let task = set(&cluster, |spec| spec.memory = Bytes::mib(1_024)).await;
    let command = agent.command().await;
    assert_eq!(wanted(&command).dimms().len(), 2);
    agent.done(&command, 0).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
    let vm = cluster.vm("web1").await;
    assert_eq!(fields(&vm), ["memory_max"]);
    agent.send(Body::Vm(report(&vm, vm.status.generation.0, RunState::Stopped, v1::Holding::Owner))).await;
    cluster.vm_when("web1", |vm| vm.status.state == RunState::Stopped).await;
    admin.start_vm(&name("web1"), &api::VmStart::default()).await.expect("accepted");
    let spec = start(agent.command().await);
    assert_eq!((spec.memory, spec.dimms().len()), (Bytes::mib(1_024), 0));
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
