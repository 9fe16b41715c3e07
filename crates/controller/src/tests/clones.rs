//! VMs that begin from snapshots, with scripted agents: clones, suspended VMs; and golden snapshots.

use godwit_api::v1::{self as api, SnapshotState, TaskState};
use godwit_link::decode;
use godwit_link::v1::{self, command::Action};
use godwit_model::{Bytes, ErrorCode, Generation, Millis, ResolvedSpec, RunState, SnapshotFigures, VmSpec};
use serde_json::Value;

use super::restart::wanted;
use super::snapshots::{RESTORE, failed, figures, grant, of_web1, running, start, take, with_a_disk};
use super::support::*;

fn clone(vm: &str) -> api::SnapshotClone {
    api::SnapshotClone { name: name(vm), host: None, start: true, memory: false, reason: None }
}

fn sized() -> SnapshotFigures {
    let sizes = vec![godwit_model::SnapshotSize { volume: "shared/root".parse().expect("volume"), size: Bytes::mib(64) }];
    SnapshotFigures { sizes, ..figures() }
}

/// Takes a snapshot of web1 that says how large its disk is.
async fn taken_sized(cluster: &Cluster, agent: &mut Agent) -> v1::TakeSnapshot {
    let task = cluster.admin().create_snapshot(&of_web1(Some("one"))).await.expect("accepted");
    let command = agent.command().await;
    agent.tell(&command, &sized()).await;
    cluster.ended(task.id).await;
    take(&command).clone()
}

#[tokio::test]
async fn a_clone_is_another_vm_that_begins_from_the_disks_of_a_snapshot() {
    let (cluster, _, mut agent) = running().await;
    let admin = cluster.admin();
    let asked = taken_sized(&cluster, &mut agent).await;
    let web1 = cluster.vm("web1").await;
    let task = admin.clone_snapshot(&name("one"), &clone("web2")).await.expect("accepted");
    assert_eq!((task.kind.as_str(), task.subject.as_str(), task.snapshot), ("vm.clone", "web2", Some(name("one"))));
    let begin = agent.command().await;
    let web2 = cluster.vm("web2").await;
    assert!(web2.id != web1.id && web2.spec.nics[0].mac != web1.spec.nics[0].mac && web2.spec.vmgenid != web1.spec.vmgenid);
    let from = start(&begin).from.clone().expect("from a snapshot");
    assert_eq!((&from.vault, &from.snapshot, from.memory, from.fresh), (&asked.vault, &asked.snapshot, false, true));
    let spec: ResolvedSpec = decode("spec", &start(&begin).spec).expect("a spec");
    assert_eq!((spec.vm, spec.name.as_str(), spec.disks[0].create), (web2.id, "web2", Some(Bytes::mib(64))));
    assert_eq!((spec.disks[0].volume.to_string().as_str(), spec.nics[0].link_up), ("shared/web2-disk0", true));
    // Meanwhile the snapshot stays, and the names are taken.
    assert_eq!(code(admin.delete_snapshot(&name("one")).await), ErrorCode::InUse);
    assert_eq!(code(admin.clone_snapshot(&name("one"), &clone("web2")).await), ErrorCode::NameTaken);
    // Cancelled while its disks come, it is ended, and is what it was.
    admin.cancel_task(task.id).await.expect("cancelled");
    let kill = agent.command().await;
    assert!(matches!(&kill.action, Some(Action::Kill(kill)) if kill.vm == web2.id.to_string()), "{kill:?}");
    agent.refuse(&begin, ErrorCode::QemuFailed).await;
    let kill = agent.command().await;
    agent.refuse(&kill, ErrorCode::VmNotRunning).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Cancelled);
    let task = admin.start_vm(&name("web2"), &api::VmStart::default()).await.expect("accepted");
    let begin = agent.command().await;
    assert_eq!(start(&begin).from.as_ref(), Some(&from), "what it has not made it makes as before");
    agent.refuse(&begin, ErrorCode::InUse).await;
    assert_eq!(failed(&cluster, task.id).await, ErrorCode::InUse);
    let vm = cluster.vm("web2").await;
    assert!(vm.status.conditions.iter().any(|condition| condition.name == "begins_from_snapshot"), "{:?}", vm.status.conditions);
    assert_eq!(code(admin.delete_snapshot(&name("one")).await), ErrorCode::InUse, "web2 needs it for its next start");

    // Its start is tried again, and from then on it is a VM like others.
    let task = admin.start_vm(&name("web2"), &api::VmStart::default()).await.expect("accepted");
    let begin = agent.command().await;
    assert_eq!((start(&begin).from.as_ref(), grant(start(&begin)).generation), (Some(&from), Generation(3)));
    agent.tell(&begin, &RESTORE).await;
    let ended = cluster.ended(task.id).await;
    assert_eq!((ended.state, ended.kind.as_str(), ended.restore), (TaskState::Done, "vm.clone", Some(RESTORE)));
    let vm = cluster.vm("web2").await;
    assert_eq!((vm.status.state, vm.status.conditions.len()), (RunState::Running, 0));
    let kill = admin.kill_vm(&name("web2")).await.expect("accepted");
    let command = agent.command().await;
    agent.done(&command, 0).await;
    cluster.ended(kill.id).await;
    let again = admin.start_vm(&name("web2"), &api::VmStart::default()).await.expect("accepted");
    let command = agent.command().await;
    assert_eq!(start(&command).from, None);
    agent.done(&command, 0).await;
    assert_eq!(cluster.ended(again.id).await.kind, "vm.start");
    let one = name("one");
    let (deleted, ()) = tokio::join!(admin.delete_snapshot(&one), async {
        let command = agent.command().await;
        agent.done(&command, 0).await;
    });
    deleted.expect("nobody needs it any more");
}

#[tokio::test]
async fn a_clone_that_is_not_started_can_change_but_for_its_disks_and_can_be_deleted() {
    let (cluster, _, mut agent) = running().await;
    let admin = cluster.admin();
    taken_sized(&cluster, &mut agent).await;
    let one = name("one");
    let task = admin.clone_snapshot(&one, &api::SnapshotClone { start: false, ..clone("web2") }).await.expect("made");
    assert_eq!((task.state, task.kind.as_str()), (TaskState::Done, "vm.clone"));
    let mut other = cluster.vm("web2").await.spec;
    other.vcpus = 4;
    let set = admin.set_vm(&name("web2"), &other, None).await.expect("accepted");
    assert_eq!(cluster.ended(set.id).await.state, TaskState::Done);
    other.disks.clear();
    assert_eq!(code(admin.set_vm(&name("web2"), &other, None).await), ErrorCode::InUse);
    let task = admin.start_vm(&name("web2"), &api::VmStart::default()).await.expect("accepted");
    let begin = agent.command().await;
    let spec: ResolvedSpec = decode("spec", &start(&begin).spec).expect("a spec");
    assert!(start(&begin).from.is_some() && spec.vcpus == 4, "{spec:?}");
    agent.tell(&begin, &RESTORE).await;
    cluster.ended(task.id).await;

    // Twenty of them at once.
    let admin = &admin;
    let asked = (10..30).map(|number| {
        let request = api::SnapshotClone { start: false, ..clone(&format!("web{number}")) };
        async move { admin.clone_snapshot(&name("one"), &request).await.expect("made").state }
    });
    let made = futures::future::join_all(asked).await;
    assert!(made.len() == 20 && made.iter().all(|state| *state == TaskState::Done), "{made:?}");
    assert_eq!(code(admin.delete_snapshot(&one).await), ErrorCode::InUse);
    for number in 10..30 {
        let task = admin.delete_vm(&name(&format!("web{number}")), &api::VmDelete { volumes: false }).await.expect("accepted");
        assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
    }
    let (deleted, ()) = tokio::join!(admin.delete_snapshot(&one), async {
        let command = agent.command().await;
        agent.done(&command, 0).await;
    });
    deleted.expect("nobody needs it any more");
    assert_eq!(code(admin.clone_snapshot(&one, &clone("web3")).await), ErrorCode::NotFound);
}

#[tokio::test]
async fn a_clone_with_memory_is_the_same_machine_without_a_cable() {
    let (mut cluster, host, mut agent) = running().await;
    let asked = taken_sized(&cluster, &mut agent).await;
    let before: ResolvedSpec = {
        let about: Value = serde_json::from_slice(&asked.about).expect("JSON");
        serde_json::from_value(about["resolved"].clone()).expect("a spec")
    };
    let request = api::SnapshotClone { memory: true, start: false, ..clone("web2") };
    cluster.admin().clone_snapshot(&name("one"), &request).await.expect("made");
    let other = VmSpec { vcpus: 4, ..cluster.vm("web2").await.spec };
    assert_eq!(code(cluster.admin().set_vm(&name("web2"), &other, None).await), ErrorCode::InUse, "memory knows the machine");
    let task = cluster.admin().start_vm(&name("web2"), &api::VmStart::default()).await.expect("accepted");
    let first = agent.command().await;
    cluster.stop().await;
    drop(agent);
    cluster.start().await;
    let mut agent = cluster.connect(&host, vec![]).await;
    let begin = agent.command().await;
    assert_eq!((first.id, wanted(&first)), (begin.id, wanted(&begin)), "the same after a restart");
    let from = start(&begin).from.clone().expect("from a snapshot");
    assert_eq!((from.memory, from.fresh), (true, true));
    let spec: ResolvedSpec = decode("spec", &start(&begin).spec).expect("a spec");
    assert_eq!((&spec.machine, &spec.cpu, spec.memory, spec.vcpus), (&before.machine, &before.cpu, before.memory, before.vcpus));
    assert!(spec.nics.len() == 1 && !spec.nics[0].link_up && spec.nics[0].mac != before.nics[0].mac, "{:?}", spec.nics);
    agent.tell(&begin, &RESTORE).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
    let vm = cluster.vm("web2").await;
    let isolated = vm.status.conditions.iter().find(|condition| condition.name == "isolated").expect("it says so");
    assert!(isolated.message.contains("of web1") && isolated.fix.contains("--plug"), "{isolated:?}");
    assert_eq!((vm.spec.nics[0].link_up, vm.status.waiting.len()), (false, 0));
}

/// A host whose QEMU keeps memory of a VM that stands still, and a VM with a disk that runs on it.
async fn running_new() -> (Cluster, Host, Agent) {
    let cluster = Cluster::new().await;
    let mut host = cluster.host("h1").await;
    host.facts.machines.push("pc-q35-9.0".into());
    let mut agent = cluster.connect(&host, vec![]).await;
    cluster.create_vm("web0", Bytes::mib(64)).await;
    cluster.admin().create_vm(&api::VmCreate { name: name("web1"), spec: with_a_disk(), golden: None }).await.expect("created");
    cluster.start_vm("web1", &mut agent).await;
    (cluster, host, agent)
}

#[tokio::test]
async fn a_vm_is_suspended_while_it_stands_still_and_goes_on_from_there() {
    let (mut cluster, host, mut agent) = running_new().await;
    let web1 = name("web1");
    assert_eq!(code(cluster.admin().suspend_vm(&name("web0")).await), ErrorCode::VmNotRunning);
    let task = cluster.admin().suspend_vm(&web1).await.expect("accepted");
    assert_eq!((task.kind.as_str(), task.snapshot, task.cancellable), ("vm.suspend", Some(name("web1-suspended")), true));
    let pause = agent.command().await;
    assert!(matches!(&pause.action, Some(Action::Pause(pause)) if pause.generation == 1), "{pause:?}");
    assert_eq!(code(cluster.admin().create_snapshot(&of_web1(None)).await), ErrorCode::VmBusy);
    agent.done(&pause, 0).await;
    let first = agent.command().await;
    assert!(take(&first).vm == cluster.vm("web1").await.id.to_string());
    let vm = cluster.vm_when("web1", |vm| vm.status.state == RunState::Paused).await;
    cluster.stop().await;
    drop(agent);
    cluster.start().await;
    let mut agent = cluster.connect(&host, vec![report(&vm, 1, RunState::Paused, v1::Holding::Owner)]).await;
    let again = agent.command().await;
    assert_eq!((first.id, wanted(&first)), (again.id, wanted(&again)));
    agent.tell(&again, &figures()).await;
    let kill = agent.command().await;
    assert!(matches!(kill.action, Some(Action::Kill(_))), "{kill:?}");
    assert_eq!(code(cluster.admin().cancel_task(task.id).await), ErrorCode::TooLate);
    agent.done(&kill, 0).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
    let vm = cluster.vm("web1").await;
    assert_eq!((vm.status.state, vm.status.conditions[0].name.as_str()), (RunState::Stopped, "suspended"));
    let admin = cluster.admin();
    assert_eq!(code(admin.delete_snapshot(&name("web1-suspended")).await), ErrorCode::InUse);
    assert_eq!(code(admin.set_vm(&web1, &VmSpec { vcpus: 4, ..vm.spec }, None).await), ErrorCode::InUse);

    // A start is the same.
    let task = admin.start_vm(&web1, &api::VmStart::default()).await.expect("accepted");
    assert_eq!((task.kind.as_str(), task.snapshot), ("vm.unsuspend", Some(name("web1-suspended"))));
    let begin = agent.command().await;
    let from = start(&begin).from.clone().expect("from a snapshot");
    assert_eq!((&from.snapshot, from.memory, from.fresh), (&take(&first).snapshot, true, false));
    assert_eq!(grant(start(&begin)).generation, Generation(2));
    agent.tell(&begin, &RESTORE).await;
    let delete = agent.command().await;
    assert!(matches!(delete.action, Some(Action::DeleteSnapshot(_))), "{delete:?}");
    agent.done(&delete, 0).await;
    let ended = cluster.ended(task.id).await;
    assert_eq!((ended.state, ended.restore), (TaskState::Done, Some(RESTORE)));
    assert_eq!(admin.snapshots(None).await.expect("list"), []);
    let vm = cluster.vm("web1").await;
    assert_eq!((vm.status.state, vm.status.generation, vm.status.conditions.len()), (RunState::Running, Generation(2), 0));
    let kill = admin.kill_vm(&web1).await.expect("accepted");
    let command = agent.command().await;
    agent.done(&command, 0).await;
    cluster.ended(kill.id).await;
    assert_eq!(code(admin.unsuspend_vm(&web1, &api::VmStart::default()).await), ErrorCode::VmNotRunning, "it is not suspended");
}

#[tokio::test]
async fn a_vm_that_cannot_be_suspended_runs_on() {
    let (cluster, _, mut old) = running().await;
    assert_eq!(code(cluster.admin().suspend_vm(&name("web1")).await), ErrorCode::Unsupported, "of an old QEMU");
    assert_eq!(cluster.admin().snapshots(None).await.expect("list"), []);
    cluster.start_vm("web0", &mut old).await;

    let (cluster, _, mut agent) = running_new().await;
    let admin = cluster.admin();
    let task = admin.suspend_vm(&name("web1")).await.expect("accepted");
    let pause = agent.command().await;
    agent.done(&pause, 0).await;
    let take = agent.command().await;
    agent.refuse(&take, ErrorCode::NotEnoughSpace).await;
    let unpause = agent.command().await;
    assert!(matches!(unpause.action, Some(Action::Unpause(_))), "{unpause:?}");
    agent.done(&unpause, 0).await;
    assert_eq!(failed(&cluster, task.id).await, ErrorCode::NotEnoughSpace);
    let vm = cluster.vm("web1").await;
    assert_eq!((vm.status.state, vm.status.activity, vm.status.conditions.len()), (RunState::Running, None, 0));
    assert_eq!(admin.snapshots(None).await.expect("list"), []);

    // Of the disks alone it could not go on.
    let task = admin.suspend_vm(&name("web1")).await.expect("accepted");
    let pause = agent.command().await;
    agent.done(&pause, 0).await;
    let take = agent.command().await;
    agent.tell(&take, &SnapshotFigures { memory: false, ..figures() }).await;
    let unpause = agent.command().await;
    agent.done(&unpause, 0).await;
    assert_eq!(failed(&cluster, task.id).await, ErrorCode::Unsupported);

    // Its name is taken by that now; cancelled, it runs on.
    let task = admin.suspend_vm(&name("web1")).await.expect("accepted");
    assert!(task.snapshot.as_ref().is_some_and(|name| name.as_str().starts_with("web1-suspended-2")), "{task:?}");
    let pause = agent.command().await;
    agent.done(&pause, 0).await;
    let take = agent.command().await;
    let (cancelled, ()) = tokio::join!(admin.cancel_task(task.id), async {
        let cancel = agent.command().await;
        agent.done(&cancel, 0).await;
        agent.refuse(&take, ErrorCode::Cancelled).await;
        let unpause = agent.command().await;
        agent.done(&unpause, 0).await;
    });
    cancelled.expect("cancelled");
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Cancelled);
    assert_eq!(cluster.vm("web1").await.status.state, RunState::Running);
}

#[tokio::test]
async fn a_golden_snapshot_is_taken_once_when_a_new_vm_is_up() {
    let (mut cluster, host, mut agent) = running().await;
    let create = |vm: &str, after: u64| api::VmCreate {
        name: name(vm),
        spec: VmSpec { nics: vec![], ..spec(Bytes::mib(64)) },
        golden: Some(api::GoldenCreate { after: Some(Millis(after)) }),
    };
    // Without an agent in the guest it is the time that counts.
    cluster.admin().create_vm(&create("web2", 1)).await.expect("created");
    cluster.start_vm("web2", &mut agent).await;
    let command = agent.command().await;
    assert_eq!(take(&command).vm, cluster.vm("web2").await.id.to_string());
    agent.tell(&command, &figures()).await;
    let taken = async |cluster: &Cluster, snapshot: &str| {
        soon(async {
            loop {
                match cluster.admin().snapshot(&name(snapshot)).await {
                    Ok(snapshot) if snapshot.state == SnapshotState::Ready => return snapshot,
                    _ => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
                }
            }
        })
        .await
    };
    assert!(taken(&cluster, "web2-golden").await.golden);
    let kill = cluster.admin().kill_vm(&name("web2")).await.expect("accepted");
    let command = agent.command().await;
    agent.done(&command, 0).await;
    cluster.ended(kill.id).await;
    cluster.start_vm("web2", &mut agent).await;

    // With one it is its answer, also after a restart of the controller.
    cluster.admin().create_vm(&create("web3", 3_600_000)).await.expect("created");
    cluster.start_vm("web3", &mut agent).await;
    let runs = ["web1", "web2", "web3"].map(name);
    let mut reports = vec![];
    for vm in &runs {
        let vm = cluster.vm(vm.as_str()).await;
        reports.push(report(&vm, vm.status.generation.0, RunState::Running, v1::Holding::Owner));
    }
    cluster.stop().await;
    drop(agent);
    cluster.start().await;
    let mut agent = cluster.connect(&host, reports).await;
    let web3 = cluster.vm("web3").await;
    let facts = godwit_model::GuestFacts {
        agent: "7.2".into(),
        host_name: None,
        os: None,
        interfaces: vec![],
        clock: None,
        seen: godwit_model::UnixMillis(0),
    };
    let said = v1::GuestReport { vm: web3.id.to_string(), facts: godwit_link::encode(&facts) };
    agent.send(v1::agent_message::Body::Guest(said)).await;
    let command = agent.command().await;
    assert_eq!(take(&command).vm, web3.id.to_string(), "and none of web2, which has one");
    agent.tell(&command, &figures()).await;
    assert!(taken(&cluster, "web3-golden").await.golden);
}
