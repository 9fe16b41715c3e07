//! Snapshots, rollbacks and vaults with scripted agents: what is asked of hosts, what is written down, and what is refused.

use godwit_api::v1::{self as api, Role, SnapshotState, TaskState};
use godwit_link::decode;
use godwit_link::status::refusal_of;
use godwit_link::v1::{self, command::Action, look_at_vault::What};
use godwit_model::{
    Bytes, DiskFormat, DiskSpec, ErrorCode, Generation, Grant, Millis, NicSpec, PoolFacts, ResolvedSpec, RestoreFigures, RunState,
    SnapshotExport, SnapshotFigures, SnapshotRequest, TaskId, VaultFile, VaultFindings, VaultPlan, VaultRewrite, VaultUsage,
    VmSpec,
};
use serde_json::Value;

use super::restart::wanted;
use super::support::*;

pub(super) fn figures() -> SnapshotFigures {
    SnapshotFigures { memory: true, pause_us: Some(8_200), took_ms: 2_100, pages_new: 36_608, ..SnapshotFigures::default() }
}

pub(super) const RESTORE: RestoreFigures = RestoreFigures {
    qemu_ms: 180,
    disks_ms: 3,
    disks_read: Bytes(65_536),
    disks_written: Bytes(4_096),
    memory_ms: 9,
    ran_at: godwit_model::UnixMillis(1),
    filled_ms: 0,
    filled: Bytes(0),
};

pub(super) fn of_web1(text: Option<&str>) -> api::SnapshotCreate {
    api::SnapshotCreate {
        vm: name("web1"),
        name: text.map(name),
        memory: true,
        quiesce: None,
        pool: None,
        golden: false,
        reason: Some("before the upgrade".into()),
    }
}

pub(super) fn with_a_disk() -> VmSpec {
    let disk = DiskSpec::new("shared/root".parse().expect("volume"), DiskFormat::Raw);
    VmSpec { disks: vec![disk], ..spec(Bytes::mib(512)) }
}

/// A host, and a VM with a disk that runs on it.
pub(super) async fn running() -> (Cluster, Host, Agent) {
    let cluster = Cluster::new().await;
    let (host, mut agent) = cluster.agent("h1").await;
    // The first brings the kernel along.
    cluster.create_vm("web0", Bytes::mib(64)).await;
    cluster.admin().create_vm(&api::VmCreate { name: name("web1"), spec: with_a_disk(), golden: None }).await.expect("created");
    cluster.start_vm("web1", &mut agent).await;
    (cluster, host, agent)
}

pub(super) fn take(command: &v1::Command) -> &v1::TakeSnapshot {
    match &command.action {
        Some(Action::TakeSnapshot(take)) => take,
        other => panic!("no snapshot is to be taken: {other:?}"),
    }
}

pub(super) fn start(command: &v1::Command) -> &v1::StartVm {
    match &command.action {
        Some(Action::Start(start)) => start,
        other => panic!("no start: {other:?}"),
    }
}

pub(super) fn grant(start: &v1::StartVm) -> Grant {
    serde_json::from_slice(&start.grant.as_ref().expect("a grant").statement).expect("well formed")
}

/// Takes a snapshot of web1 to its good end.
async fn taken(cluster: &Cluster, agent: &mut Agent, text: &str) -> v1::TakeSnapshot {
    let task = cluster.admin().create_snapshot(&of_web1(Some(text))).await.expect("accepted");
    let command = agent.command().await;
    let take = take(&command).clone();
    agent.tell(&command, &figures()).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
    take
}

fn rollback(discard: bool) -> api::SnapshotRollback {
    api::SnapshotRollback { host: None, discard_present: discard, reason: None }
}

pub(super) async fn failed(cluster: &Cluster, task: TaskId) -> ErrorCode {
    let task = cluster.ended(task).await;
    assert_eq!(task.state, TaskState::Failed, "{task:?}");
    task.error.expect("why").code
}

#[tokio::test]
async fn a_snapshot_is_there_from_the_request_on_and_ready_when_its_task_is_done() {
    let (cluster, _, mut agent) = running().await;
    let (_, _other) = cluster.agent("h2").await;
    let admin = cluster.admin();
    let task = admin.create_snapshot(&of_web1(None)).await.expect("accepted");
    assert_eq!((task.kind.as_str(), task.subject.as_str(), task.cancellable), ("vm.snapshot", "web1", true));
    let first = task.snapshot.expect("it has a name by now");
    assert!(first.as_str().starts_with("web1-2") && first.as_str().len() == "web1-20261127-183000".len(), "{first}");
    let command = agent.command().await;
    let asked = take(&command).clone();
    let vm = cluster.vm("web1").await;
    assert_eq!((asked.vm.as_str(), asked.generation, command.task.as_str()), (&*vm.id.to_string(), 1, &*task.id.to_string()));
    let vault = asked.vault.clone().expect("a vault");
    assert_eq!((vault.pool.as_str(), vault.team.as_str(), vault.key.len()), ("shared", "default", 32));
    assert!(asked.snapshot.as_ref().expect("a key").key.len() == 32 && asked.known.is_empty());
    let request: SnapshotRequest = decode("request", &asked.request).expect("a request");
    assert_eq!(request, SnapshotRequest { memory: true, quiesce: None });
    let about: Value = serde_json::from_slice(&asked.about).expect("JSON");
    assert_eq!((&about["schema"], &about["name"], &about["vm_name"]), (&1.into(), &first.as_str().into(), &"web1".into()));
    assert!(about["resolved"]["machine"].is_string() && about["spec"]["vcpus"].is_number(), "{about}");

    // Meanwhile nothing else happens to the VM, nor to the snapshot.
    let snapshot = admin.snapshot(&first).await.expect("it is there");
    assert_eq!((snapshot.state, snapshot.memory, snapshot.figures), (SnapshotState::Taking, Some(Bytes::mib(512)), None));
    assert_eq!(code(admin.pause_vm(&name("web1")).await), ErrorCode::VmBusy);
    assert_eq!(code(admin.kill_vm(&name("web1")).await), ErrorCode::VmBusy);
    assert_eq!(code(admin.delete_snapshot(&first).await), ErrorCode::InUse);
    agent.tell(&command, &SnapshotFigures { warnings: vec!["a word".into()], ..figures() }).await;
    let ended = cluster.ended(task.id).await;
    assert!(ended.state == TaskState::Done && ended.trail.iter().any(|line| line.text == "a word"), "{ended:?}");
    let snapshot = admin.snapshot(&first).await.expect("it is there");
    assert_eq!((snapshot.state, snapshot.figures.expect("figures").pause_us), (SnapshotState::Ready, Some(8_200)));
    assert_eq!((snapshot.vm, snapshot.host, snapshot.reason.as_deref()), (name("web1"), name("h1"), Some("before the upgrade")));
    assert_eq!(snapshot.disks[0].volume.to_string(), "shared/root");

    // The next one need not keep again what the first has.
    let second = taken(&cluster, &mut agent, "second").await;
    assert_eq!(second.vault.expect("a vault"), vault, "a team's vault has one key");
    assert_eq!(second.known, vec![asked.snapshot.expect("a key")]);
    assert_ne!(second.snapshot.expect("a key").key, second.known[0].key);
    assert_eq!(code(admin.create_snapshot(&of_web1(Some("second"))).await), ErrorCode::NameTaken);
    let names: Vec<_> = admin.snapshots(None).await.expect("list").into_iter().map(|snapshot| snapshot.name).collect();
    assert_eq!(names, [name("second"), first]);
    assert_eq!(admin.snapshots(Some(&name("web0"))).await.expect("list"), []);
}

#[tokio::test]
async fn of_a_snapshot_that_is_refused_nothing_is_left_and_none_is_begun_of_a_vm_that_does_not_run() {
    let (cluster, _, mut agent) = running().await;
    let admin = cluster.admin();
    let task = admin.create_snapshot(&of_web1(Some("one"))).await.expect("accepted");
    let command = agent.command().await;
    agent.refuse(&command, ErrorCode::NotEnoughSpace).await;
    assert_eq!(failed(&cluster, task.id).await, ErrorCode::NotEnoughSpace);
    assert_eq!(code(admin.snapshot(&name("one")).await), ErrorCode::NotFound);
    let vm = cluster.vm("web1").await;
    assert_eq!((vm.status.activity, vm.status.state), (None, RunState::Running));

    let bad = |change: fn(&mut api::SnapshotCreate)| {
        let mut request = of_web1(None);
        change(&mut request);
        let admin = &admin;
        async move { code(admin.create_snapshot(&request).await) }
    };
    assert_eq!(bad(|request| request.vm = name("web0")).await, ErrorCode::VmNotRunning);
    assert_eq!(bad(|request| request.vm = name("gone")).await, ErrorCode::NotFound);
    assert_eq!(bad(|request| request.pool = Some(name("gone"))).await, ErrorCode::PoolUnavailable);
    assert_eq!(bad(|request| request.quiesce = Some(Millis(0))).await, ErrorCode::BadRequest);
    assert_eq!(bad(|request| request.quiesce = Some(Millis(60_001))).await, ErrorCode::BadRequest);
    assert_eq!(admin.snapshots(None).await.expect("list"), []);
}

#[tokio::test]
async fn a_snapshot_is_deleted_in_its_vault_first_and_not_while_it_is_golden() {
    let (cluster, host, mut agent) = running().await;
    let admin = cluster.admin();
    let asked = taken(&cluster, &mut agent, "one").await;
    let one = name("one");
    let golden = |golden| api::SnapshotSet { golden: Some(golden) };
    assert!(admin.set_snapshot(&one, &golden(true)).await.expect("changed").golden);
    assert_eq!(code(admin.delete_snapshot(&one).await), ErrorCode::InUse);
    assert!(!admin.set_snapshot(&one, &golden(false)).await.expect("changed").golden);

    let (refused, ()) = tokio::join!(admin.delete_snapshot(&one), async {
        let command = agent.command().await;
        agent.refuse(&command, ErrorCode::HostFailed).await;
    });
    assert_eq!(code(refused), ErrorCode::HostFailed);
    assert_eq!(admin.snapshot(&one).await.expect("there").state, SnapshotState::Deleting);
    assert_eq!(code(admin.rollback_snapshot(&one, &rollback(true)).await), ErrorCode::InUse);
    let vm = cluster.vm("web1").await;
    drop(agent);
    cluster.connected("h1", false).await;
    assert_eq!(code(admin.delete_snapshot(&one).await), ErrorCode::HostDown, "nobody sees its pool");

    let mut agent = cluster.connect(&host, vec![report(&vm, 1, RunState::Running, v1::Holding::Owner)]).await;
    let (deleted, ()) = tokio::join!(admin.delete_snapshot(&one), async {
        let command = agent.command().await;
        let Some(Action::DeleteSnapshot(delete)) = &command.action else { panic!("{command:?}") };
        assert_eq!(delete.vault, asked.vault);
        assert_eq!(delete.snapshot, asked.snapshot.as_ref().expect("a key").snapshot);
        agent.done(&command, 0).await;
    });
    deleted.expect("deleted");
    assert_eq!(code(admin.snapshot(&one).await), ErrorCode::NotFound);
    // One of the same name has another key.
    let again = taken(&cluster, &mut agent, "one").await;
    assert!(again.known.is_empty() && again.snapshot != asked.snapshot);
}

#[tokio::test]
async fn a_rollback_keeps_what_is_ends_it_and_begins_as_it_was() {
    let (cluster, _, mut agent) = running().await;
    let admin = cluster.admin();
    let asked = taken(&cluster, &mut agent, "one").await;
    let before: ResolvedSpec = {
        let about: Value = serde_json::from_slice(&asked.about).expect("JSON");
        serde_json::from_value(about["resolved"].clone()).expect("a spec")
    };
    // The VM becomes another one meanwhile.
    let mut other = cluster.vm("web1").await.spec;
    other.labels.insert(name("tier"), "db".into());
    let set = admin.set_vm(&name("web1"), &other, None).await.expect("accepted");
    cluster.ended(set.id).await;

    let task = admin.rollback_snapshot(&name("one"), &rollback(false)).await.expect("accepted");
    assert_eq!((task.kind.as_str(), task.subject.as_str(), task.snapshot), ("vm.rollback", "web1", Some(name("one"))));
    let kept = task.kept.expect("what it is now");
    assert!(kept.as_str().starts_with("web1-before-rollback-2"), "{kept}");
    let present = agent.command().await;
    assert_eq!(take(&present).known, vec![asked.snapshot.clone().expect("a key")]);
    for used in [&name("one"), &kept] {
        assert_eq!(code(admin.delete_snapshot(used).await), ErrorCode::InUse);
    }
    assert_eq!(code(admin.rollback_snapshot(&name("one"), &rollback(true)).await), ErrorCode::VmBusy);
    assert_eq!(code(admin.kill_vm(&name("web1")).await), ErrorCode::VmBusy, "a kill does not cut a rollback short");
    agent.tell(&present, &figures()).await;
    let kill = agent.command().await;
    let one = &asked.snapshot.as_ref().expect("a key").snapshot;
    assert!(matches!(&kill.action, Some(Action::Kill(kill)) if kill.generation == 1 && kill.back_to == *one), "{kill:?}");
    assert!(!cluster.admin().task(task.id).await.expect("task").cancellable);
    assert_eq!(code(admin.cancel_task(task.id).await), ErrorCode::TooLate);
    agent.done(&kill, 0).await;
    let begin = agent.command().await;
    let body = start(&begin);
    assert_eq!((grant(body).generation, grant(body).destination, grant(body).source), (Generation(2), name("h1"), None));
    let from = body.from.clone().expect("from a snapshot");
    assert_eq!((&from.vault, &from.snapshot, from.memory), (&asked.vault, &asked.snapshot, true));
    let mut now: ResolvedSpec = decode("spec", &body.spec).expect("a spec");
    let fresh = now.platform.vmgenid.take().expect("the guest can tell");
    assert_ne!(Some(fresh), before.platform.vmgenid);
    assert_eq!(now, ResolvedSpec { platform: godwit_model::Platform { vmgenid: None, ..before.platform.clone() }, ..before });
    assert_eq!(cluster.vm("web1").await.status.state, RunState::Stopped);
    agent.tell(&begin, &RESTORE).await;
    let ended = cluster.ended(task.id).await;
    assert_eq!((ended.state, ended.restore, ended.kept), (TaskState::Done, Some(RESTORE), Some(kept.clone())));
    let vm = cluster.vm("web1").await;
    assert_eq!((vm.status.state, vm.status.generation, vm.status.activity), (RunState::Running, Generation(2), None));
    assert_eq!((vm.spec.labels.len(), vm.spec.vmgenid, vm.status.conditions.len()), (0, Some(fresh), 0));
    assert_eq!(admin.snapshot(&kept).await.expect("kept").state, SnapshotState::Ready);
    let history = admin.vm_history(&name("web1")).await.expect("history").generations;
    let told: Vec<_> = history.iter().map(|reign| (reign.generation.0, reign.kind.as_str(), reign.end)).collect();
    assert_eq!(told, [(1, "vm.start", Some(api::ReignEnd::Stopped)), (2, "vm.rollback", None)]);

    // It can go back to what it was before that, too.
    let task = admin.rollback_snapshot(&kept, &rollback(true)).await.expect("accepted");
    let kill = agent.command().await;
    agent.done(&kill, 0).await;
    let begin = agent.command().await;
    assert_eq!(grant(start(&begin)).generation, Generation(3));
    agent.tell(&begin, &RESTORE).await;
    assert_eq!(cluster.ended(task.id).await.kept, None);
    assert_eq!(cluster.vm("web1").await.spec.labels.len(), 1);
}

#[tokio::test]
async fn a_rollback_and_a_snapshot_survive_a_restart_of_the_controller_at_every_step() {
    let (mut cluster, host, mut agent) = running().await;
    let vm = cluster.vm("web1").await;
    let runs = || vec![report(&vm, 1, RunState::Running, v1::Holding::Owner)];
    let again = async |mut cluster: Cluster, agent: Agent, vms: Vec<v1::VmReport>| {
        cluster.stop().await;
        drop(agent);
        cluster.start().await;
        let mut agent = cluster.connect(&host, vms).await;
        let command = agent.command().await;
        (cluster, agent, command)
    };
    let task = cluster.admin().create_snapshot(&of_web1(Some("one"))).await.expect("accepted");
    let first = agent.command().await;
    let command;
    (cluster, agent, command) = again(cluster, agent, runs()).await;
    assert_eq!((first.id, wanted(&first)), (command.id, wanted(&command)));
    agent.tell(&command, &figures()).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);

    let task = cluster.admin().rollback_snapshot(&name("one"), &rollback(false)).await.expect("accepted");
    let first = agent.command().await;
    let present;
    (cluster, agent, present) = again(cluster, agent, runs()).await;
    assert_eq!((first.id, wanted(&first)), (present.id, wanted(&present)));
    agent.tell(&present, &figures()).await;
    let first = agent.command().await;
    let kill;
    (cluster, agent, kill) = again(cluster, agent, runs()).await;
    assert!(matches!(kill.action, Some(Action::Kill(_))), "{kill:?}");
    assert_eq!((first.id, wanted(&first)), (kill.id, wanted(&kill)));
    agent.done(&kill, 0).await;
    let first = agent.command().await;
    let begin;
    (cluster, agent, begin) = again(cluster, agent, vec![report(&vm, 1, RunState::Stopped, v1::Holding::Owner)]).await;
    assert_eq!((first.id, wanted(&first)), (begin.id, wanted(&begin)), "the same generation, the same generation id");
    assert_eq!(grant(start(&begin)).expires, grant(start(&first)).expires);
    agent.tell(&begin, &RESTORE).await;
    let ended = cluster.ended(task.id).await;
    assert_eq!((ended.state, ended.restore), (TaskState::Done, Some(RESTORE)));
    let vm = cluster.vm("web1").await;
    assert_eq!((vm.status.state, vm.status.generation), (RunState::Running, Generation(2)));
    assert_eq!(cluster.admin().snapshots(None).await.expect("list").len(), 2);
}

#[tokio::test]
async fn a_vm_goes_back_on_another_host_that_sees_the_pool_when_its_own_has_ended_it() {
    let (cluster, host, mut a1) = running().await;
    let (_, mut a2) = cluster.agent("h2").await;
    let admin = cluster.admin();
    let asked = taken(&cluster, &mut a1, "one").await;
    let vm = cluster.vm("web1").await;
    let request = api::SnapshotRollback { host: Some(name("h2")), ..rollback(true) };
    let task = admin.rollback_snapshot(&name("one"), &request).await.expect("accepted");
    a1.command().await;
    // While its host is away nobody knows that it has ended: nothing begins elsewhere.
    drop(a1);
    cluster.task_when(task.id, |task| task.step.contains("waits for host h1")).await;
    assert_eq!(cluster.vm("web1").await.status.generation, Generation(1));
    let mut a1 = cluster.connect(&host, vec![report(&vm, 1, RunState::Running, v1::Holding::Owner)]).await;
    let kill = a1.command().await;
    assert!(matches!(kill.action, Some(Action::Kill(_))), "{kill:?}");
    a1.done(&kill, 0).await;
    let begin = a2.command().await;
    assert_eq!((grant(start(&begin)).destination, grant(start(&begin)).generation), (name("h2"), Generation(2)));
    assert_eq!(start(&begin).from.as_ref().expect("from a snapshot").snapshot, asked.snapshot);
    a2.fleet_when(|fleet| fleet.locations.iter().any(|location| location.address == "10.0.0.2" && location.generation == 2)).await;
    a2.tell(&begin, &RESTORE).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
    let vm = cluster.vm("web1").await;
    assert_eq!((vm.status.host, vm.status.state), (Some(name("h2")), RunState::Running));
}

#[tokio::test]
async fn a_vm_whose_rollback_broke_off_begins_only_with_another() {
    let (cluster, _, mut agent) = running().await;
    let admin = cluster.admin();
    taken(&cluster, &mut agent, "one").await;
    // What is refused before anything was touched leaves the VM as it is.
    let task = admin.rollback_snapshot(&name("one"), &rollback(false)).await.expect("accepted");
    let present = agent.command().await;
    agent.refuse(&present, ErrorCode::SnapshotFailed).await;
    assert_eq!(failed(&cluster, task.id).await, ErrorCode::SnapshotFailed);
    let vm = cluster.vm("web1").await;
    assert_eq!((vm.status.state, vm.status.generation, vm.status.activity), (RunState::Running, Generation(1), None));
    assert_eq!(admin.snapshots(None).await.expect("list").len(), 1, "of the present nothing was kept");

    let task = admin.rollback_snapshot(&name("one"), &rollback(true)).await.expect("accepted");
    let kill = agent.command().await;
    agent.refuse(&kill, ErrorCode::VmNotRunning).await;
    let begin = agent.command().await;
    agent.refuse(&begin, ErrorCode::SnapshotDamaged).await;
    assert_eq!(failed(&cluster, task.id).await, ErrorCode::SnapshotDamaged);
    let vm = cluster.vm("web1").await;
    assert_eq!((vm.status.state, vm.status.activity), (RunState::Stopped, None));
    assert!(vm.status.conditions.iter().any(|condition| condition.name == "disks_unfinished"), "{:?}", vm.status.conditions);
    assert_eq!(code(admin.start_vm(&name("web1"), &api::VmStart::default()).await), ErrorCode::DisksUnfinished);

    // Of such disks there is nothing to keep.
    let task = admin.rollback_snapshot(&name("one"), &rollback(false)).await.expect("accepted");
    let begin = agent.command().await;
    assert_eq!(grant(start(&begin)).generation, Generation(3), "a number is used once");
    agent.tell(&begin, &RESTORE).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
    let vm = cluster.vm("web1").await;
    assert_eq!((vm.status.state, vm.status.conditions.len()), (RunState::Running, 0));
    let task = admin.kill_vm(&name("web1")).await.expect("accepted");
    let kill = agent.command().await;
    agent.done(&kill, 0).await;
    cluster.ended(task.id).await;
    cluster.start_vm("web1", &mut agent).await;
}

#[tokio::test]
async fn what_stands_in_the_way_of_a_rollback_is_said_before_anything_is_done() {
    let (cluster, _, mut agent) = running().await;
    let admin = cluster.admin();
    taken(&cluster, &mut agent, "one").await;
    let one = name("one");
    let on = |host: &str| api::SnapshotRollback { host: Some(name(host)), ..rollback(true) };
    assert_eq!(code(admin.rollback_snapshot(&name("gone"), &rollback(true)).await), ErrorCode::NotFound);
    assert_eq!(code(admin.rollback_snapshot(&one, &on("h9")).await), ErrorCode::NotFound);
    // A pool of the same name that is other storage, and a host that cannot run the VM.
    let mut h2 = cluster.host("h2").await;
    let PoolFacts { name: pool, capacity, .. } = h2.facts.pools[0].clone();
    h2.facts.pools = vec![PoolFacts { name: pool, identity: "another".into(), shared: true, capacity }];
    let mut h3 = cluster.host("h3").await;
    h3.facts.cpu_models.clear();
    assert_eq!(code(admin.rollback_snapshot(&one, &on("h2")).await), ErrorCode::HostDown);
    let (_a2, _a3) = (cluster.connect(&h2, vec![]).await, cluster.connect(&h3, vec![]).await);
    let refusal = admin.rollback_snapshot(&one, &on("h2")).await.expect_err("other storage").refusal();
    assert_eq!(refusal.code, ErrorCode::PoolUnavailable);
    assert!(refusal.hint.as_deref().is_some_and(|hint| hint.contains("h1, h3")), "{refusal:?}");
    assert_eq!(code(admin.rollback_snapshot(&one, &on("h3")).await), ErrorCode::HostIncompatible);

    // Its address and its disk went to another VM meanwhile.
    let mac = cluster.vm("web1").await.spec.nics[0].mac;
    let task = admin.kill_vm(&name("web1")).await.expect("accepted");
    let kill = agent.command().await;
    agent.done(&kill, 0).await;
    cluster.ended(task.id).await;
    let refusal = admin.rollback_snapshot(&one, &rollback(false)).await.expect_err("it does not run").refusal();
    assert_eq!(refusal.code, ErrorCode::VmNotRunning);
    assert!(refusal.hint.is_some_and(|hint| hint.contains("--discard-present")));
    let set = admin.set_vm(&name("web1"), &spec(Bytes::mib(512)), None).await.expect("accepted");
    cluster.ended(set.id).await;
    let mut thief = with_a_disk();
    let taker = VmSpec { nics: vec![NicSpec { mac, ..NicSpec::new(name("default")) }], disks: vec![], ..thief.clone() };
    thief.nics.clear();
    // Web1 keeps its address, so that only the disk is free.
    assert_eq!(code(admin.create_vm(&api::VmCreate { name: name("web3"), spec: taker, golden: None }).await), ErrorCode::InUse);
    admin.create_vm(&api::VmCreate { name: name("web2"), spec: thief, golden: None }).await.expect("created");
    let refusal = admin.rollback_snapshot(&one, &rollback(true)).await.expect_err("the disk is web2's").refusal();
    assert!(refusal.code == ErrorCode::InUse && refusal.message.contains("shared/root"), "{refusal:?}");
    assert_eq!(cluster.vm("web1").await.status.generation, Generation(1));
    let task = admin.delete_vm(&name("web2"), &api::VmDelete { volumes: false }).await.expect("accepted");
    cluster.ended(task.id).await;

    // What the rollback needs is the VM's from the request on.
    let task = admin.rollback_snapshot(&one, &rollback(true)).await.expect("accepted");
    assert_eq!(
        code(
            admin
                .create_vm(&api::VmCreate { name: name("web2"), spec: VmSpec { nics: vec![], ..with_a_disk() }, golden: None })
                .await
        ),
        ErrorCode::InUse
    );
    let begin = agent.command().await;
    agent.tell(&begin, &RESTORE).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
    assert_eq!(cluster.vm("web1").await.spec.disks.len(), 1);

    // A deleted VM's snapshots stay; they make no new VM.
    let task = admin.kill_vm(&name("web1")).await.expect("accepted");
    let kill = agent.command().await;
    agent.done(&kill, 0).await;
    cluster.ended(task.id).await;
    let task = admin.delete_vm(&name("web1"), &api::VmDelete { volumes: false }).await.expect("accepted");
    let forget = agent.command().await;
    agent.done(&forget, 0).await;
    cluster.ended(task.id).await;
    assert_eq!(admin.snapshot(&one).await.expect("it stays").vm, name("web1"));
    assert_eq!(code(admin.rollback_snapshot(&one, &rollback(true)).await), ErrorCode::NotFound);
    let task = admin.delete_vm(&name("web0"), &api::VmDelete { volumes: false }).await.expect("accepted");
    cluster.ended(task.id).await;
    let refusal = admin.delete_image(&name("linux")).await.expect_err("the snapshot needs it").refusal();
    assert!(refusal.code == ErrorCode::InUse && refusal.message.contains("snapshot one"), "{refusal:?}");
}

/// A rollback of web1 to `one` whose QEMU begins, and what its host is told.
async fn beginning(cluster: &Cluster, agent: &mut Agent) -> (api::Task, v1::Command) {
    let task = cluster.admin().rollback_snapshot(&name("one"), &rollback(true)).await.expect("accepted");
    let kill = agent.command().await;
    agent.done(&kill, 0).await;
    (task, agent.command().await)
}

#[tokio::test]
async fn a_rollback_whose_disks_are_still_coming_can_be_cancelled_and_begins_anew_with_the_next() {
    let (mut cluster, host, mut agent) = running().await;
    taken(&cluster, &mut agent, "one").await;
    let vm = cluster.vm("web1").await;
    let (task, begin) = beginning(&cluster, &mut agent).await;
    assert_eq!(grant(start(&begin)).generation, Generation(2));
    assert!(cluster.admin().task(task.id).await.expect("task").cancellable);
    cluster.admin().cancel_task(task.id).await.expect("cancelled");
    let ends = |command: &v1::Command| match &command.action {
        Some(Action::Kill(kill)) => assert_eq!((kill.vm.as_str(), kill.generation), (vm.id.to_string().as_str(), 2)),
        _ => panic!("{command:?}"),
    };
    // The host has not come to begin it yet: it is asked again.
    let early = agent.command().await;
    ends(&early);
    agent.done(&early, 0).await;
    // A controller that begins anew goes on with both.
    cluster.stop().await;
    drop(agent);
    cluster.start().await;
    let mut agent = cluster.connect(&host, vec![report(&vm, 1, RunState::Stopped, v1::Holding::Owner)]).await;
    let (again, kill) = {
        let (one, other) = (agent.command().await, agent.command().await);
        if matches!(one.action, Some(Action::Kill(_))) { (other, one) } else { (one, other) }
    };
    assert_eq!(again.id, begin.id);
    ends(&kill);
    agent.done(&kill, 0).await;
    agent.refuse(&again, ErrorCode::QemuFailed).await;
    // Whatever the host did last, there is no QEMU when the task ends.
    let mut asked = 0;
    let ended = loop {
        tokio::select! {
            ended = cluster.ended(task.id) => break ended,
            command = agent.command() => {
                ends(&command);
                asked += 1;
                agent.done(&command, 0).await;
            }
        }
    };
    assert_eq!((ended.state, asked > 0), (TaskState::Cancelled, true));
    let vm = cluster.vm("web1").await;
    assert_eq!((vm.status.state, vm.status.generation, vm.status.activity), (RunState::Stopped, Generation(2), None));
    assert_eq!(vm.status.conditions.iter().map(|condition| condition.name.as_str()).collect::<Vec<_>>(), ["disks_unfinished"]);
    assert_eq!(code(cluster.admin().start_vm(&name("web1"), &api::VmStart::default()).await), ErrorCode::DisksUnfinished);
    let task = cluster.admin().rollback_snapshot(&name("one"), &rollback(true)).await.expect("accepted");
    let begin = agent.command().await;
    assert_eq!(grant(start(&begin)).generation, Generation(3));
    agent.tell(&begin, &RESTORE).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
    assert_eq!(cluster.vm("web1").await.status.conditions.len(), 0);
}

#[tokio::test]
async fn one_that_has_come_in_the_moment_in_which_it_is_cancelled_is_ended_too() {
    let (cluster, _, mut agent) = running().await;
    taken(&cluster, &mut agent, "one").await;
    let (task, begin) = beginning(&cluster, &mut agent).await;
    cluster.admin().cancel_task(task.id).await.expect("cancelled");
    let kill = agent.command().await;
    assert!(matches!(kill.action, Some(Action::Kill(_))), "{kill:?}");
    agent.tell(&begin, &RESTORE).await;
    let kill = agent.command().await;
    assert!(matches!(&kill.action, Some(Action::Kill(kill)) if kill.generation == 2), "{kill:?}");
    assert!(!cluster.admin().task(task.id).await.expect("task").state.ended(), "not before its QEMU has");
    agent.done(&kill, 0).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Cancelled);
    assert_eq!(cluster.vm("web1").await.status.state, RunState::Stopped);
}

#[tokio::test]
async fn a_snapshot_under_way_can_be_cancelled_and_a_rollback_until_it_ends_qemu() {
    let (mut cluster, host, mut agent) = running().await;
    let admin = cluster.admin();
    let task = admin.create_snapshot(&of_web1(Some("one"))).await.expect("accepted");
    let take = agent.command().await;
    // Too late, as the host says: it goes on.
    let (late, ()) = tokio::join!(admin.cancel_task(task.id), async {
        let cancel = agent.command().await;
        assert!(matches!(cancel.action, Some(Action::Cancel(_))) && cancel.task == task.id.to_string(), "{cancel:?}");
        agent.refuse(&cancel, ErrorCode::TooLate).await;
    });
    assert_eq!(code(late), ErrorCode::TooLate);
    let (cancelled, ()) = tokio::join!(admin.cancel_task(task.id), async {
        let cancel = agent.command().await;
        agent.done(&cancel, 0).await;
        agent.refuse(&take, ErrorCode::Cancelled).await;
    });
    cancelled.expect("cancelled");
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Cancelled);
    assert_eq!(code(admin.snapshot(&name("one")).await), ErrorCode::NotFound);

    taken(&cluster, &mut agent, "one").await;
    let task = admin.rollback_snapshot(&name("one"), &rollback(false)).await.expect("accepted");
    let present = agent.command().await;
    let (cancelled, ()) = tokio::join!(admin.cancel_task(task.id), async {
        let cancel = agent.command().await;
        // It was ready in the same moment.
        agent.tell(&present, &figures()).await;
        agent.done(&cancel, 0).await;
    });
    cancelled.expect("cancelled");
    let ended = cluster.ended(task.id).await;
    assert_eq!(ended.state, TaskState::Cancelled);
    assert_eq!(admin.snapshot(&ended.kept.expect("kept")).await.expect("it stays").state, SnapshotState::Ready);
    let vm = cluster.vm("web1").await;
    assert_eq!((vm.status.state, vm.status.generation, vm.status.activity), (RunState::Running, Generation(1), None));

    // While its host is away nobody knows what it has written.
    let task = admin.create_snapshot(&of_web1(Some("two"))).await.expect("accepted");
    agent.command().await;
    drop(agent);
    cluster.task_when(task.id, |task| task.step.contains("waits for host h1")).await;
    admin.cancel_task(task.id).await.expect("cancelled");
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Cancelled);
    assert_eq!(admin.snapshot(&name("two")).await.expect("it stays").state, SnapshotState::Failed);
    let mut agent = cluster.connect(&host, vec![report(&vm, 1, RunState::Running, v1::Holding::Owner)]).await;
    assert_eq!(code(admin.rollback_snapshot(&name("two"), &rollback(true)).await), ErrorCode::SnapshotFailed);
    let two = name("two");
    let (deleted, ()) = tokio::join!(admin.delete_snapshot(&two), async {
        let command = agent.command().await;
        assert!(matches!(command.action, Some(Action::DeleteSnapshot(_))), "{command:?}");
        agent.done(&command, 0).await;
    });
    deleted.expect("deleted");

    // Nor does a store that was restored from a copy.
    admin.create_snapshot(&of_web1(Some("two"))).await.expect("accepted");
    agent.command().await;
    cluster.stop().await;
    drop(agent);
    cluster.options.restored = true;
    cluster.start().await;
    assert_eq!(cluster.admin().snapshot(&name("two")).await.expect("it stays").state, SnapshotState::Failed);
}

#[tokio::test]
async fn of_the_vms_of_a_host_two_snapshots_are_taken_at_a_time() {
    let (mut cluster, host, mut agent) = running().await;
    for vm in ["web2", "web3"] {
        cluster.create_vm(vm, Bytes::mib(64)).await;
    }
    for vm in ["web0", "web2", "web3"] {
        cluster.start_vm(vm, &mut agent).await;
    }
    let of = |vm: &str| api::SnapshotCreate { vm: name(vm), pool: Some(name("shared")), ..of_web1(Some(vm)) };
    let mut tasks = vec![];
    let mut commands = vec![];
    for vm in ["web0", "web1"] {
        tasks.push(cluster.admin().create_snapshot(&of(vm)).await.expect("accepted").id);
        commands.push(agent.command().await);
    }
    for vm in ["web2", "web3"] {
        let task = cluster.admin().create_snapshot(&of(vm)).await.expect("accepted").id;
        let waits = cluster.task_when(task, |task| task.step.contains("waits for its turn")).await;
        assert!(waits.step.contains("of the VMs of h1, 2 snapshots") && waits.cancellable, "{waits:?}");
        tasks.push(task);
    }
    // One that waits has done nothing: nothing of it is left.
    let admin = cluster.admin();
    let (cancelled, ()) = tokio::join!(admin.cancel_task(tasks[2]), async {
        let cancel = agent.command().await;
        assert!(matches!(cancel.action, Some(Action::Cancel(_))), "{cancel:?}");
        agent.refuse(&cancel, ErrorCode::NotFound).await;
    });
    cancelled.expect("cancelled");
    assert_eq!(cluster.ended(tasks[2]).await.state, TaskState::Cancelled);
    assert_eq!(code(cluster.admin().snapshot(&name("web2")).await), ErrorCode::NotFound);

    agent.tell(&commands[0], &figures()).await;
    assert_eq!(cluster.ended(tasks[0]).await.state, TaskState::Done);
    let next = agent.command().await;
    assert_eq!(take(&next).vm, cluster.vm("web3").await.id.to_string());

    // A controller that begins anew goes on with what was begun.
    let mut reports = vec![];
    for vm in ["web0", "web1", "web2", "web3"] {
        reports.push(report(&cluster.vm(vm).await, 1, RunState::Running, v1::Holding::Owner));
    }
    cluster.stop().await;
    drop(agent);
    cluster.start().await;
    let mut agent = cluster.connect(&host, reports).await;
    let again = [agent.command().await, agent.command().await];
    assert!([&commands[1], &next].iter().all(|before| again.iter().any(|now| now.id == before.id)), "{again:?}");
    for command in &again {
        agent.tell(command, &figures()).await;
    }
    for task in [tasks[1], tasks[3]] {
        assert_eq!(cluster.ended(task).await.state, TaskState::Done);
    }
}

#[tokio::test]
async fn a_move_waits_for_a_snapshot_and_a_snapshot_for_a_move_or_another_snapshot() {
    let (mut cluster, host, mut a1) = running().await;
    let (h2, mut a2) = cluster.agent("h2").await;
    let one = cluster.admin().create_snapshot(&of_web1(Some("one"))).await.expect("accepted");
    let take_one = a1.command().await;
    // They are tasks from the request on, in the order of the requests.
    let moves = cluster.migrate("web1", "h2").await.expect("it waits");
    let two = cluster.admin().create_snapshot(&of_web1(Some("two"))).await.expect("it waits");
    let never = cluster.admin().create_snapshot(&of_web1(Some("never"))).await.expect("it waits");
    let behind = format!("waits for task {} (Snapshot) to end", one.id);
    for (task, kind) in [(&moves, "vm.migrate"), (&two, "vm.snapshot"), (&never, "vm.snapshot")] {
        assert_eq!((task.kind.as_str(), task.step.as_str(), task.cancellable), (kind, behind.as_str(), true));
    }
    assert_eq!(two.snapshot, Some(name("two")));
    assert_eq!(code(cluster.admin().snapshot(&name("two")).await), ErrorCode::NotFound, "nothing of it is there yet");
    let foresee =
        api::VmMigrate { host: name("h2"), policy: godwit_model::MigrationSettings::default(), dry_run: true, reason: None };
    assert_eq!(code(cluster.admin().migrate_vm(&name("web1"), &foresee).await), ErrorCode::VmBusy, "it could not begin now");
    cluster.admin().cancel_task(never.id).await.expect("cancelled");
    assert_eq!(cluster.ended(never.id).await.state, TaskState::Cancelled);
    assert_eq!(cluster.vm("web1").await.status.activity.map(|activity| activity.task), Some(one.id));

    // A controller that starts again knows who waits, and for whom.
    let vm = cluster.vm("web1").await;
    cluster.stop().await;
    drop((a1, a2));
    cluster.start().await;
    a1 = cluster.connect(&host, vec![report(&vm, 1, RunState::Running, v1::Holding::Owner)]).await;
    a2 = cluster.connect(&h2, vec![]).await;
    let again = a1.command().await;
    assert_eq!((take_one.id, wanted(&take_one)), (again.id, wanted(&again)));
    assert_eq!(cluster.admin().task(moves.id).await.expect("it waits").step, behind);
    a1.tell(&again, &figures()).await;
    assert_eq!(cluster.ended(one.id).await.state, TaskState::Done);

    // The move was first; what is in the snapshot need not travel, since the host sees it.
    let prepare = a2.command().await;
    let Some(Action::Prepare(asked)) = &prepare.action else { panic!("{prepare:?}") };
    assert_eq!(prepare.task, moves.id.to_string());
    let (seen, vault) = (asked.snapshot.clone().expect("a snapshot"), take(&take_one).vault.clone().expect("a vault"));
    assert_eq!((&seen.pool, &seen.team, seen.generation), (&vault.pool, &vault.team, 1));
    assert!(seen.snapshot == take(&take_one).snapshot, "with the key that it was taken with");
    cluster.task_when(two.id, |task| task.step == format!("waits for task {} (Migrate) to end", moves.id)).await;
    assert_eq!(code(cluster.migrate("web1", "h2").await), ErrorCode::VmBusy, "a move does not wait for a move");
    a2.done(&prepare, 7).await;
    let out = a1.command().await;
    a1.done(&out, 0).await;
    a1.ended(ended(&moves, &vm, 2, true, None)).await;
    a2.ended(ended(&moves, &vm, 2, false, None)).await;
    let moved = cluster.ended(moves.id).await;
    let said = moved.trail.iter().filter(|note| note.text.contains("in snapshot one need not travel")).count();
    assert!(moved.state == TaskState::Done && said == 1, "{moved:?}");
    let command = a2.command().await;
    let asked = take(&command);
    assert_eq!((asked.generation, command.task.as_str()), (2, &*two.id.to_string()), "where the VM is now");
    a2.tell(&command, &figures()).await;
    assert_eq!(cluster.ended(two.id).await.state, TaskState::Done);
    assert_eq!(cluster.admin().snapshot(&name("two")).await.expect("taken").host, name("h2"));
    assert_eq!(cluster.vm("web1").await.status.activity, None);
}

#[tokio::test]
async fn what_has_waited_is_checked_when_its_turn_comes() {
    let (cluster, _, mut agent) = running().await;
    let admin = cluster.admin();
    let one = admin.create_snapshot(&of_web1(Some("one"))).await.expect("accepted");
    let command = agent.command().await;
    let same = admin.create_snapshot(&of_web1(Some("one"))).await.expect("it waits");
    let nowhere = cluster.migrate("web1", "h9").await.expect("it waits");
    let two = admin.create_snapshot(&of_web1(Some("two"))).await.expect("it waits");
    let mut line = vec![];
    for _ in 3..16 {
        line.push(admin.create_snapshot(&of_web1(None)).await.expect("it waits").id);
    }
    let refusal = admin.create_snapshot(&of_web1(None)).await.expect_err("one too many").refusal();
    assert!(refusal.code == ErrorCode::VmBusy && refusal.message.contains("16 tasks wait"), "{refusal:?}");
    for id in line {
        admin.cancel_task(id).await.expect("cancelled");
        assert_eq!(cluster.ended(id).await.state, TaskState::Cancelled);
    }
    agent.tell(&command, &figures()).await;
    assert_eq!(cluster.ended(one.id).await.state, TaskState::Done);
    assert_eq!(failed(&cluster, same.id).await, ErrorCode::NameTaken);
    assert_eq!(failed(&cluster, nowhere.id).await, ErrorCode::NotFound);
    let command = agent.command().await;
    assert_eq!(command.task, two.id.to_string());
    let three = admin.create_snapshot(&of_web1(Some("three"))).await.expect("it waits");
    agent.refuse(&command, ErrorCode::NotEnoughSpace).await;
    assert_eq!(failed(&cluster, two.id).await, ErrorCode::NotEnoughSpace);
    let command = agent.command().await;
    assert_eq!(command.task, three.id.to_string(), "whichever way the other ended");
    let four = admin.create_snapshot(&of_web1(Some("four"))).await.expect("it waits");
    // The guest powers itself off meanwhile.
    let vm = cluster.vm("web1").await;
    agent.send(v1::agent_message::Body::Vm(report(&vm, 1, RunState::Stopped, v1::Holding::Owner))).await;
    cluster.vm_when("web1", |vm| vm.status.state == RunState::Stopped).await;
    agent.refuse(&command, ErrorCode::SnapshotFailed).await;
    assert_eq!(failed(&cluster, four.id).await, ErrorCode::VmNotRunning);
}

#[tokio::test]
async fn vaults_are_looked_at_read_and_pruned_by_a_plan_that_still_holds() {
    let (cluster, host, mut agent) = running().await;
    let admin = cluster.admin();
    let shared = name("shared");
    assert_eq!(admin.vaults().await.expect("list"), []);
    assert_eq!(code(admin.verify_vault(&shared, None).await), ErrorCode::NotFound);
    let one = taken(&cluster, &mut agent, "one").await;
    let two = taken(&cluster, &mut agent, "two").await;
    let look = |command: &v1::Command| match &command.action {
        Some(Action::LookAtVault(look)) => {
            assert_eq!(look.vault, one.vault);
            let keys = [&one, &two].map(|take| take.snapshot.clone().expect("a key"));
            assert_eq!(look.snapshots, keys, "all that is known there");
            look.what.clone().expect("a question")
        }
        other => panic!("{other:?}"),
    };
    let usage = VaultUsage { snapshots: 2, packs: 3, bytes: Bytes::mib(143) };
    let (vaults, ()) = tokio::join!(admin.vaults(), async {
        let command = agent.command().await;
        assert_eq!(look(&command), What::Usage(true));
        agent.tell(&command, &usage).await;
    });
    let vaults = vaults.expect("list");
    assert_eq!((&vaults[0].pool, vaults[0].identity.as_str(), vaults[0].usage), (&shared, "one", Some(usage)));
    assert_eq!(vaults[0].host, Some(name("h1")));

    let whole = admin.verify_vault(&shared, Some(&name("h1"))).await.expect("accepted");
    assert_eq!((whole.kind.as_str(), whole.subject.as_str()), ("vault.verify", "shared"));
    let command = agent.command().await;
    assert_eq!(look(&command), What::Verify(true));
    agent.tell(&command, &VaultFindings::default()).await;
    assert_eq!(cluster.ended(whole.id).await.state, TaskState::Done);
    let damaged = admin.verify_vault(&shared, None).await.expect("accepted");
    let command = agent.command().await;
    let damage = (0..30).map(|number| format!("{number}.pack is torn")).collect();
    agent.tell(&command, &VaultFindings { damage }).await;
    let error = cluster.ended(damaged.id).await.error.expect("why");
    assert_eq!(error.code, ErrorCode::SnapshotDamaged);
    assert!(error.message.contains("19.pack is torn; and 10 more"), "{error}");
    let endless = admin.verify_vault(&shared, None).await.expect("accepted");
    agent.command().await;
    admin.cancel_task(endless.id).await.expect("cancelled");
    assert_eq!(cluster.ended(endless.id).await.state, TaskState::Cancelled);

    let rewrite = VaultRewrite { name: "b.pack".into(), bytes: Bytes::mib(3), freed: Bytes::mib(2) };
    let plan = VaultPlan { files: vec![VaultFile { name: "a.pack".into(), bytes: Bytes::mib(1) }], rewrites: vec![rewrite] };
    let prune = |apply, plan: Option<&VaultPlan>| {
        let request = api::VaultPrune { apply, plan: plan.cloned() };
        let (admin, shared) = (&admin, &shared);
        async move { admin.prune_vault(shared, None, &request).await }
    };
    assert_eq!(code(prune(true, None).await), ErrorCode::BadRequest);
    let (planned, ()) = tokio::join!(prune(false, None), async {
        let command = agent.command().await;
        assert_eq!(look(&command), What::PlanPrune(true));
        agent.tell(&command, &plan).await;
    });
    assert_eq!(planned.expect("a plan"), plan);
    let (changed, ()) = tokio::join!(prune(true, Some(&plan)), async {
        let command = agent.command().await;
        assert_eq!(look(&command), What::Prune(godwit_link::encode(&plan)));
        agent.refuse(&command, ErrorCode::RevisionConflict).await;
    });
    assert_eq!(code(changed), ErrorCode::RevisionConflict);
    let (applied, ()) = tokio::join!(prune(true, Some(&plan)), async {
        let command = agent.command().await;
        agent.tell(&command, &plan).await;
    });
    assert_eq!(applied.expect("applied"), plan);

    // A pool of that name that is other storage holds a vault of its own.
    let mut h2 = cluster.host("h2").await;
    h2.facts.pools[0].identity = "another".into();
    let mut other = cluster.connect(&h2, vec![]).await;
    cluster.create_vm("web2", Bytes::mib(64)).await;
    cluster.start_vm("web2", &mut other).await;
    let request = api::SnapshotCreate { vm: name("web2"), ..of_web1(Some("three")) };
    let task = admin.create_snapshot(&request).await.expect("accepted");
    let command = other.command().await;
    assert!(take(&command).known.is_empty(), "snapshots of another vault are of no use");
    other.tell(&command, &figures()).await;
    cluster.ended(task.id).await;
    assert_eq!(code(prune(false, None).await), ErrorCode::BadRequest, "which of the two?");
    let task = admin.verify_vault(&shared, Some(&name("h2"))).await.expect("accepted");
    let command = other.command().await;
    other.tell(&command, &VaultFindings::default()).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
    let three = name("three");
    let (deleted, ()) = tokio::join!(admin.delete_snapshot(&three), async {
        let command = other.command().await;
        other.done(&command, 0).await;
    });
    deleted.expect("deleted");

    // Without a host that sees the pool nothing is known of it, and nothing can be done.
    drop(agent);
    cluster.connected("h1", false).await;
    let vaults = admin.vaults().await.expect("list");
    assert_eq!((vaults[0].host.clone(), vaults[0].usage), (None, None));
    assert_eq!(code(prune(false, None).await), ErrorCode::HostDown);
    drop(host);
}

#[tokio::test]
async fn a_snapshot_is_written_as_files_by_a_host_that_sees_it_and_stays_meanwhile() {
    let (cluster, host, mut agent) = running().await;
    let admin = cluster.admin();
    let one = name("one");
    let asked = taken(&cluster, &mut agent, "one").await;
    let export = |host: Option<&str>| api::SnapshotExportRequest { host: host.map(name), reason: Some("to take away".into()) };
    assert_eq!(code(admin.export_snapshot(&name("none"), &export(None)).await), ErrorCode::NotFound);
    assert_eq!(code(admin.export_snapshot(&one, &export(Some("h9"))).await), ErrorCode::NotFound);
    let mut h2 = cluster.host("h2").await;
    h2.facts.pools[0].identity = "another".into();
    let other = cluster.connect(&h2, vec![]).await;
    assert_eq!(code(admin.export_snapshot(&one, &export(Some("h2"))).await), ErrorCode::PoolUnavailable);
    drop(other);

    let task = admin.export_snapshot(&one, &export(None)).await.expect("accepted");
    assert_eq!((task.kind.as_str(), task.subject.as_str(), task.cancellable), ("snapshot.export", "one", true));
    assert_eq!((&task.snapshot, &task.export, task.reason.as_deref()), (&Some(one.clone()), &None, Some("to take away")));
    let command = agent.command().await;
    let Some(Action::ExportSnapshot(write)) = &command.action else { panic!("{command:?}") };
    assert_eq!((&write.vault, &write.snapshot), (&asked.vault, &asked.snapshot));
    assert_eq!((write.name.as_str(), write.memory), ("one", true));
    let spec: ResolvedSpec = decode("spec", &write.spec).expect("a spec");
    assert_eq!(spec.disks[0].volume.to_string(), "shared/root");
    let about: Value = serde_json::from_slice(&write.about).expect("JSON");
    assert_eq!(about["name"], "one");
    // The VM is free, the snapshot is not.
    assert_eq!(cluster.vm("web1").await.status.activity, None);
    assert_eq!(code(admin.delete_snapshot(&one).await), ErrorCode::InUse);
    let written = SnapshotExport { host: name("h1"), path: "/pool/exports/default/one".into(), bytes: Bytes::mib(600) };
    agent.tell(&command, &written).await;
    let ended = cluster.ended(task.id).await;
    assert_eq!((ended.state, ended.export), (TaskState::Done, Some(written)));

    let task = admin.export_snapshot(&one, &export(Some("h1"))).await.expect("accepted");
    let command = agent.command().await;
    agent.refuse(&command, ErrorCode::NotEnoughSpace).await;
    assert_eq!(failed(&cluster, task.id).await, ErrorCode::NotEnoughSpace);
    // It waits for its host, and can be given up.
    let task = admin.export_snapshot(&one, &export(None)).await.expect("accepted");
    agent.command().await;
    admin.cancel_task(task.id).await.expect("cancelled");
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Cancelled);
    assert_eq!(admin.snapshot(&one).await.expect("there").state, SnapshotState::Ready);
    drop(agent);
    cluster.connected("h1", false).await;
    assert_eq!(code(admin.export_snapshot(&one, &export(None)).await), ErrorCode::HostDown);
    drop(host);
}

#[tokio::test]
async fn a_host_that_writes_an_export_gets_what_the_vm_boots_from_as_long_as_it_does() {
    let (cluster, _, mut agent) = running().await;
    let (_, mut other) = cluster.agent("h2").await;
    let admin = cluster.admin();
    taken(&cluster, &mut agent, "one").await;
    let request = api::SnapshotExportRequest { host: Some(name("h2")), reason: None };
    let task = admin.export_snapshot(&name("one"), &request).await.expect("accepted");
    let command = other.command().await;
    let Some(Action::ExportSnapshot(write)) = &command.action else { panic!("{command:?}") };
    let spec: ResolvedSpec = decode("spec", &write.spec).expect("a spec");
    let image = spec.kernel.expect("a kernel").id.to_string();
    other.client.fetch_image(v1::FetchImageRequest { image: image.clone() }).await.expect("while it writes");
    other.refuse(&command, ErrorCode::NotEnoughSpace).await;
    assert_eq!(failed(&cluster, task.id).await, ErrorCode::NotEnoughSpace);
    let refused = other.client.fetch_image(v1::FetchImageRequest { image }).await.expect_err("not any more");
    assert_eq!(refusal_of(&refused).code, ErrorCode::NotGranted);
}

#[tokio::test]
async fn files_become_a_snapshot_of_the_vm_as_it_is_and_with_memory_by_an_administrator_only() {
    let (cluster, _, mut agent) = running().await;
    let admin = cluster.admin();
    let known = taken(&cluster, &mut agent, "one").await;
    let import = |memory| api::SnapshotImport {
        vm: name("web1"),
        from: "shared/brought".parse().expect("a place"),
        memory,
        host: None,
        golden: true,
        reason: None,
    };
    let (back, operator) = (name("back"), cluster.member("default", Role::Operator).await);
    assert_eq!(code(operator.import_snapshot(&back, &import(true)).await), ErrorCode::NotPermitted);
    assert_eq!(code(admin.import_snapshot(&name("one"), &import(false)).await), ErrorCode::NameTaken);
    let elsewhere = api::SnapshotImport { from: "gone/brought".parse().expect("a place"), ..import(false) };
    assert_eq!(code(admin.import_snapshot(&back, &elsewhere).await), ErrorCode::PoolUnavailable);
    assert_eq!(
        code(admin.import_snapshot(&back, &api::SnapshotImport { vm: name("gone"), ..import(false) }).await),
        ErrorCode::NotFound
    );
    let never = api::SnapshotImport { vm: name("web0"), ..import(false) };
    assert_eq!(code(admin.import_snapshot(&back, &never).await), ErrorCode::BadRequest, "it never ran");

    let task = operator.import_snapshot(&back, &import(false)).await.expect("accepted");
    assert_eq!((task.kind.as_str(), task.subject.as_str(), &task.snapshot), ("snapshot.import", "back", &Some(back.clone())));
    let command = agent.command().await;
    let Some(Action::ImportSnapshot(read)) = &command.action else { panic!("{command:?}") };
    assert_eq!((read.from.as_str(), read.memory, &read.vault), ("brought", false, &known.vault));
    assert_eq!(read.known, vec![known.snapshot.clone().expect("a key")]);
    assert_ne!(read.snapshot, known.snapshot);
    assert_eq!(admin.snapshot(&back).await.expect("there").state, SnapshotState::Taking);
    assert_eq!(code(admin.delete_snapshot(&back).await), ErrorCode::InUse, "it is golden, and its task goes on");
    agent.refuse(&command, ErrorCode::SnapshotInvalid).await;
    assert_eq!(failed(&cluster, task.id).await, ErrorCode::SnapshotInvalid);
    assert_eq!(code(admin.snapshot(&back).await), ErrorCode::NotFound, "nothing of it is left");

    let task = admin.import_snapshot(&back, &import(true)).await.expect("accepted");
    let command = agent.command().await;
    assert!(matches!(&command.action, Some(Action::ImportSnapshot(read)) if read.memory));
    agent.tell(&command, &figures()).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
    let snapshot = admin.snapshot(&back).await.expect("there");
    assert_eq!((snapshot.state, snapshot.vm.as_str(), snapshot.golden), (SnapshotState::Ready, "web1", true));
    assert_eq!((snapshot.memory, snapshot.disks.len()), (Some(Bytes::mib(512)), 1));
    // It is one like any other.
    let task = admin.rollback_snapshot(&back, &rollback(true)).await.expect("accepted");
    let kill = agent.command().await;
    agent.done(&kill, 0).await;
    let begin = agent.command().await;
    assert!(start(&begin).from.as_ref().is_some_and(|from| from.memory));
    agent.tell(&begin, &RESTORE).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
}
