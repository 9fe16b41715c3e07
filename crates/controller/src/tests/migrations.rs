//! Migrations with two scripted agents: each way they can end, and what is refused before they begin.

use std::collections::BTreeMap;
use std::time::Duration;

use godwit_api::v1::{self as api, TaskState};
use godwit_link::v1::{self, agent_message::Body, command::Action, controller_message};
use godwit_link::{decode, encode};
use godwit_model::{
    Autostart, Bytes, BytesPerSec, ErrorCode, ForecastRequest, Generation, Grant, ImportFormat, Ladder, MigrationForecast,
    MigrationPhase, MigrationPolicy, MigrationProgress, MigrationSettings, Millis, Name, PastMoves, PostCopy, RunState, Rung,
    VmSpec,
};
use reqwest::Method;

use super::support::*;

struct Pair {
    cluster: Cluster,
    a1: Agent,
    a2: Agent,
}

/// Two hosts, and a VM that runs on the first.
async fn pair() -> Pair {
    let cluster = Cluster::new().await;
    let (_, mut a1) = cluster.agent("h1").await;
    let (_, a2) = cluster.agent("h2").await;
    cluster.running_vm("web1", &mut a1).await;
    Pair { cluster, a1, a2 }
}

fn grant(grant: Option<v1::Signed>) -> Grant {
    serde_json::from_slice(&grant.expect("a grant").statement).expect("well formed")
}

impl Pair {
    /// Up to the source's acceptance.
    async fn begin(&mut self, generation: u64) {
        self.begin_with(generation, MigrationPolicy::default()).await;
    }

    async fn begin_with(&mut self, generation: u64, policy: MigrationPolicy) {
        let prepare = self.a2.command().await;
        let Some(Action::Prepare(body)) = &prepare.action else { panic!("{prepare:?}") };
        let (incoming, memory_key) = (grant(body.grant.clone()), body.memory_key.clone());
        assert_eq!(memory_key.len(), 32);
        assert_eq!(
            (incoming.generation, incoming.source, incoming.destination),
            (Generation(generation), Some(name("h1")), name("h2"))
        );
        self.a2.done(&prepare, 4_711).await;
        let out = self.a1.command().await;
        let Some(Action::Migrate(body)) = &out.action else { panic!("{out:?}") };
        assert_eq!((body.address.as_str(), body.carry_port), ("10.0.0.2", 4_711));
        assert_eq!(grant(body.grant.clone()).generation, Generation(generation));
        assert!(body.memory_key == memory_key, "both hosts seal and open with the same key");
        assert_eq!(decode::<MigrationPolicy>("policy", &body.policy).expect("policy"), policy);
        self.a1.done(&out, 0).await;
    }
}

#[tokio::test]
async fn a_vm_moves_and_belongs_to_the_destination() {
    let mut pair = pair().await;
    let task = pair.cluster.migrate("web1", "h2").await.expect("accepted");
    pair.begin(2).await;
    let vm = pair.cluster.vm("web1").await;
    assert_eq!((vm.status.host.clone(), vm.status.generation), (Some(name("h1")), Generation(2)));
    assert!(vm.status.activity.is_some());
    let progress = |permille| MigrationProgress {
        phase: MigrationPhase::WarmUp,
        permille,
        wire_bytes: Bytes(1),
        ram_bytes: Bytes(2),
        remaining: Bytes(3),
        rate: godwit_model::BytesPerSec(4),
        dirty_rate: None,
        rounds: 1,
        predicted_blackout: None,
        time_left: None,
        rung: None,
    };
    pair.a1.send(Body::Progress(v1::Progress { task: task.id.to_string(), progress: encode(&progress(500)) })).await;
    pair.cluster.task_when(task.id, |task| task.progress.as_ref().is_some_and(|progress| progress.permille == 500)).await;
    // Only the two of them may speak to each other by way of the controller.
    pair.a1.send(Body::Peer(v1::Peer { task: task.id.to_string(), host: "h2".into(), message: b"word".to_vec() })).await;
    let peer = pair.a2.peer().await;
    assert_eq!((peer.host.as_str(), peer.message.as_slice()), ("h1", b"word".as_slice()));
    pair.a2.send(Body::Vm(report(&vm, 2, RunState::Running, v1::Holding::Owner))).await;
    pair.cluster.vm_when("web1", |vm| vm.status.host == Some(name("h2"))).await;
    pair.a2
        .fleet_when(|fleet| fleet.locations.iter().any(|location| location.address == "10.0.0.2" && location.generation == 2))
        .await;
    pair.a1.ended(ended(&task, &vm, 2, true, None)).await;
    pair.a2.ended(ended(&task, &vm, 2, false, None)).await;
    let task = pair.cluster.ended(task.id).await;
    assert_eq!(task.state, TaskState::Done, "{task:?}");
    assert_eq!(task.figures, Some(FIGURES));
    let vm = pair.cluster.vm("web1").await;
    assert_eq!(
        (vm.status.host.clone(), vm.status.generation, vm.status.state),
        (Some(name("h2")), Generation(2), RunState::Running)
    );
    assert_eq!(vm.status.activity, None);
    // An old word of the old host changes nothing.
    pair.a1.send(Body::Vm(report(&vm, 1, RunState::Stopped, v1::Holding::Owner))).await;
    pair.a1.ended(ended(&task, &vm, 2, true, None)).await;
    assert_eq!(pair.cluster.vm("web1").await.status, vm.status);
    // What became of both generations.
    let history = pair.cluster.admin().vm_history(&name("web1")).await.expect("history").generations;
    let told: Vec<_> =
        history.iter().map(|reign| (reign.generation.0, reign.host.as_str(), reign.kind.as_str(), reign.end)).collect();
    assert_eq!(told, [(1, "h1", "vm.start", Some(api::ReignEnd::Moved)), (2, "h2", "vm.migrate", None)]);
    assert!(history[1].began.is_some() && history[0].ended >= history[0].began && history[1].task == Some(task.id), "{history:?}");
    assert_eq!((history[0].figures, history[1].figures), (None, Some(FIGURES)));
    let metrics = pair.cluster.admin().request(Method::GET, "/metrics").send().await.expect("answer").text().await.expect("text");
    for line in [
        r#"godwit_migrations_total{outcome="done"} 1"#,
        "godwit_migration_wire_bytes_total 1048576",
        "godwit_migration_blackout_seconds_sum 0.084",
        "godwit_migration_blackout_excess_seconds_sum 0.024",
        "godwit_migration_duration_error_ratios_sum 0.5",
        r#"godwit_hosts{state="connected"} 2"#,
        r#"godwit_vms{team="default",state="running"} 1"#,
        r#"godwit_vm_last_blackout_seconds{team="default",vm="web1",kind="predicted"} 0.06"#,
        r#"godwit_vm_last_blackout_seconds{team="default",vm="web1",kind="actual"} 0.084"#,
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in\n{metrics}");
    }
}

#[tokio::test]
async fn whether_a_vm_could_move_is_known_before_anybody_asks() {
    let cluster = Cluster::new().await;
    let (_, mut a1) = cluster.agent("h1").await;
    cluster.running_vm("web1", &mut a1).await;
    let admin = cluster.admin();
    let reason = |vm: &api::Vm| vm.status.migratable.clone().and_then(|known| known.reason).map(|reason| reason.code);
    cluster.vm_when("web1", |vm| reason(vm) == Some(ErrorCode::NoHost)).await;
    assert_eq!(admin.check_vm(&name("web1"), None).await.expect("looked at").hosts, []);
    let mut small = cluster.host("h2").await;
    small.load.memory_free = Bytes::mib(500);
    let _a2 = cluster.connect(&small, vec![]).await;
    cluster.vm_when("web1", |vm| reason(vm) == Some(ErrorCode::NotEnoughMemory)).await;
    let (_, _a3) = cluster.agent("h3").await;
    let before = cluster.vm_when("web1", |vm| vm.status.migratable.as_ref().is_some_and(|known| known.possible)).await;
    let check = admin.check_vm(&name("web1"), None).await.expect("looked at");
    let found: Vec<_> = check.hosts.iter().map(|host| (host.host.as_str(), host.obstacles.len())).collect();
    assert_eq!((check.source.as_str(), found), ("h1", vec![("h2", 1), ("h3", 0)]));
    let check = admin.check_vm(&name("web1"), Some(&name("h2"))).await.expect("looked at");
    assert!(check.hosts.len() == 1 && check.hosts[0].obstacles[0].hint.is_some(), "{check:?}");
    assert_eq!(code(admin.check_vm(&name("web1"), Some(&name("h1"))).await), ErrorCode::AlreadyOnHost);
    assert_eq!(code(admin.check_vm(&name("web1"), Some(&name("h9"))).await), ErrorCode::NotFound);
    cluster.create_vm("web2", Bytes::mib(64)).await;
    assert_eq!(code(admin.check_vm(&name("web2"), None).await), ErrorCode::VmNotRunning);
    // It is no change of the VM: what was read before may still be written.
    assert_eq!(cluster.vm("web1").await.revision, before.revision);
}

#[tokio::test]
async fn a_migration_that_fails_leaves_the_vm_where_it_was_and_says_why() {
    let mut pair = pair().await;
    let task = pair.cluster.migrate("web1", "h2").await.expect("accepted");
    pair.begin(2).await;
    let vm = pair.cluster.vm("web1").await;
    pair.a2.ended(ended(&task, &vm, 2, false, Some(ErrorCode::MigrationStalled))).await;
    pair.a1.ended(ended(&task, &vm, 2, true, Some(ErrorCode::MigrationStalled))).await;
    let task = pair.cluster.ended(task.id).await;
    assert_eq!((task.state, task.error.expect("why").code), (TaskState::Failed, ErrorCode::MigrationStalled));
    let vm = pair.cluster.vm("web1").await;
    assert_eq!((vm.status.host, vm.status.generation, vm.status.state), (Some(name("h1")), Generation(1), RunState::Running));
    assert_eq!(vm.status.activity, None);
    // The number is never used again.
    pair.cluster.migrate("web1", "h2").await.expect("accepted");
    pair.begin(3).await;
}

#[tokio::test]
async fn when_qemu_is_first_it_is_tried_again_with_a_new_generation_three_times_at_most() {
    let mut pair = pair().await;
    let task = pair.cluster.migrate("web1", "h2").await.expect("accepted");
    let vm = pair.cluster.vm("web1").await;
    for generation in 2..=4 {
        pair.begin(generation).await;
        pair.a1.ended(ended(&task, &vm, generation, true, Some(ErrorCode::QemuFirst))).await;
        pair.a2.ended(ended(&task, &vm, generation, false, Some(ErrorCode::QemuFirst))).await;
    }
    let task = pair.cluster.ended(task.id).await;
    assert_eq!((task.state, task.error.expect("why").code), (TaskState::Failed, ErrorCode::QemuFirst));
    assert!(task.trail.iter().any(|note| note.text.contains("attempt 3 of 3")), "{:?}", task.trail);
}

#[tokio::test]
async fn a_second_migration_of_the_same_vm_is_refused() {
    let mut pair = pair().await;
    pair.cluster.migrate("web1", "h2").await.expect("accepted");
    assert_eq!(code(pair.cluster.migrate("web1", "h2").await), ErrorCode::VmBusy);
    let response = pair
        .cluster
        .admin()
        .request(reqwest::Method::POST, "/vms/web1/migrate")
        .json(&serde_json::json!({"host": "h2"}))
        .send()
        .await
        .expect("answer");
    assert_eq!(response.status(), 409);
    pair.begin(2).await;
}

#[tokio::test]
async fn what_cannot_work_is_refused_before_anything_starts() {
    let cluster = Cluster::new().await;
    let (_, mut a1) = cluster.agent("h1").await;
    cluster.running_vm("web1", &mut a1).await;
    let mut small = cluster.host("h2").await;
    small.load.memory_free = Bytes::mib(500);
    let a2 = cluster.connect(&small, vec![]).await;
    cluster.host("h3").await;
    let before = cluster.vm("web1").await;
    let refusal = cluster.migrate("web1", "h2").await.expect_err("too small").refusal();
    assert_eq!(refusal.code, ErrorCode::NotEnoughMemory);
    assert!(refusal.message.contains("12 MiB (12582912 bytes) are missing"), "{refusal}");
    assert_eq!(code(cluster.migrate("web1", "h1").await), ErrorCode::AlreadyOnHost);
    assert_eq!(code(cluster.migrate("web1", "h3").await), ErrorCode::HostDown);
    assert_eq!(code(cluster.migrate("web1", "h9").await), ErrorCode::NotFound);
    assert_eq!(code(cluster.migrate("nothing", "h2").await), ErrorCode::NotFound);
    cluster.create_vm("web2", Bytes::mib(64)).await;
    assert_eq!(code(cluster.migrate("web2", "h2").await), ErrorCode::VmNotRunning);
    assert_eq!(cluster.vm("web1").await, before, "a refusal changed the VM");
    drop(a1);
    cluster.connected("h1", false).await;
    let refusal = cluster.migrate("web1", "h2").await.expect_err("source down").refusal();
    assert_eq!(refusal.code, ErrorCode::HostDown);
    drop(a2);
}

#[tokio::test]
async fn a_dry_run_checks_and_changes_nothing_and_says_what_a_move_would_cost() {
    let mut pair = pair().await;
    let before = pair.cluster.vm("web1").await;
    let policy = MigrationPolicy { max_blackout: Millis(50), ..MigrationPolicy::default() };
    let request = godwit_api::v1::VmMigrate { host: name("h2"), policy: policy.into(), dry_run: true, reason: None };
    let client = pair.cluster.admin();
    let dry_run = || {
        let (client, request) = (client.clone(), request.clone());
        tokio::spawn(async move { client.migrate_vm(&name("web1"), &request).await.expect("described") })
    };
    let asked = dry_run();
    let command = pair.a1.command().await;
    let Some(Action::Forecast(question)) = &command.action else { panic!("{command:?}") };
    assert_eq!(question.generation, 1, "of the VM as it is");
    let request_said: ForecastRequest = decode("request", &question.request).expect("well formed");
    assert_eq!(request_said, ForecastRequest { policy, past: PastMoves::default(), disks: vec![] });
    let forecast = MigrationForecast { learned_from: 3, ..MigrationForecast::default() };
    pair.a1.tell(&command, &forecast).await;
    let task = asked.await.expect("asked");
    assert_eq!((task.state, task.forecast), (TaskState::Done, Some(forecast)));
    assert_eq!(code(pair.cluster.admin().task(task.id).await), ErrorCode::NotFound);

    // A host that cannot say hinders nothing.
    let asked = dry_run();
    let command = pair.a1.command().await;
    pair.a1.refuse(&command, ErrorCode::QemuFailed).await;
    let task = asked.await.expect("asked");
    assert_eq!((task.state, task.forecast), (TaskState::Done, None));
    assert!(task.trail.iter().any(|line| line.text.contains("not known")), "{:?}", task.trail);
    assert_eq!(pair.cluster.vm("web1").await, before);
}

#[tokio::test]
async fn a_destination_that_cannot_prepare_is_told_to_settle() {
    let mut pair = pair().await;
    let task = pair.cluster.migrate("web1", "h2").await.expect("accepted");
    let prepare = pair.a2.command().await;
    pair.a2.refuse(&prepare, ErrorCode::NotEnoughSpace).await;
    let settle = pair.a2.command().await;
    assert!(matches!(settle.action, Some(Action::Settle(_))), "{settle:?}");
    assert_eq!(settle.task, task.id.to_string());
    pair.a2.done(&settle, 0).await;
    let task = pair.cluster.ended(task.id).await;
    assert_eq!((task.state, task.error.expect("why").code), (TaskState::Failed, ErrorCode::NotEnoughSpace));
    assert_eq!(pair.cluster.vm("web1").await.status.activity, None);
}

#[tokio::test]
async fn a_cancel_reaches_the_source_and_its_refusal_reaches_the_user() {
    let mut pair = pair().await;
    let task = pair.cluster.migrate("web1", "h2").await.expect("accepted");
    pair.begin(2).await;
    pair.cluster.task_when(task.id, |task| task.step.contains("moves from")).await;
    let (client, id) = (pair.cluster.admin(), task.id);
    let request = tokio::spawn(async move { client.cancel_task(id).await });
    // Both the request and the executor ask: the agent answers both.
    let mut refusals = 0;
    while refusals < 2 {
        let command = pair.a1.command().await;
        assert!(matches!(command.action, Some(Action::Cancel(_))), "{command:?}");
        pair.a1.refuse(&command, ErrorCode::TooLate).await;
        refusals += 1;
    }
    assert_eq!(code(request.await.expect("request")), ErrorCode::TooLate);
    let vm = pair.cluster.vm("web1").await;
    pair.a1.ended(ended(&task, &vm, 2, true, None)).await;
    pair.a2.ended(ended(&task, &vm, 2, false, None)).await;
    assert_eq!(pair.cluster.ended(task.id).await.state, TaskState::Done);
    assert_eq!(code(pair.cluster.admin().cancel_task(task.id).await), ErrorCode::TooLate);
}

#[tokio::test]
async fn a_cancelled_migration_ends_as_cancelled() {
    let mut pair = pair().await;
    let task = pair.cluster.migrate("web1", "h2").await.expect("accepted");
    let prepare = pair.a2.command().await;
    // Before the source has heard of it no word of the source is needed.
    pair.cluster.admin().cancel_task(task.id).await.expect("cancelling");
    pair.a2.done(&prepare, 1).await;
    let settle = pair.a2.command().await;
    assert!(matches!(settle.action, Some(Action::Settle(_))), "{settle:?}");
    pair.a2.done(&settle, 0).await;
    assert_eq!(pair.cluster.ended(task.id).await.state, TaskState::Cancelled);
    let task = pair.cluster.migrate("web1", "h2").await.expect("accepted");
    pair.begin(3).await;
    let vm = pair.cluster.vm("web1").await;
    pair.a1.ended(ended(&task, &vm, 3, true, Some(ErrorCode::Cancelled))).await;
    pair.a2.ended(ended(&task, &vm, 3, false, Some(ErrorCode::Cancelled))).await;
    assert_eq!(pair.cluster.ended(task.id).await.state, TaskState::Cancelled);
}

#[tokio::test]
async fn a_move_goes_to_the_destinations_migration_address() {
    let cluster = Cluster::new().await;
    let (_, mut a1) = cluster.agent("h1").await;
    let mut h2 = cluster.host("h2").await;
    h2.migration_address = "10.1.0.2".into();
    let mut a2 = cluster.connect(&h2, vec![]).await;
    cluster.running_vm("web1", &mut a1).await;
    cluster.migrate("web1", "h2").await.expect("accepted");
    let prepare = a2.command().await;
    a2.done(&prepare, 4_711).await;
    let out = a1.command().await;
    let Some(Action::Migrate(body)) = &out.action else { panic!("{out:?}") };
    assert_eq!(body.address, "10.1.0.2");
    let shown = cluster.admin().host(&name("h2")).await.expect("host");
    assert_eq!((shown.address.as_str(), shown.migration_address.as_deref()), ("10.0.0.2", Some("10.1.0.2")));
}

#[tokio::test]
async fn a_migrations_bandwidth_changes_while_it_runs_and_a_source_whose_answer_was_lost_is_told_again() {
    let cluster = Cluster::new().await;
    let (h1, mut a1) = cluster.agent("h1").await;
    let (_, a2) = cluster.agent("h2").await;
    cluster.running_vm("web1", &mut a1).await;
    let vm = cluster.vm("web1").await;
    let (client, mut pair) = (cluster.admin(), Pair { cluster, a1, a2 });
    let task = pair.cluster.migrate("web1", "h2").await.expect("accepted");
    pair.begin(2).await;
    pair.cluster.task_when(task.id, |task| task.step.contains("moves from")).await;
    let told = |command: &v1::Command| match &command.action {
        Some(Action::Policy(set)) => {
            let policy: MigrationPolicy = serde_json::from_slice(&set.policy).expect("a policy");
            policy.bandwidth.map_or(0, BytesPerSec::get)
        }
        other => panic!("{other:?}"),
    };
    client.set_task_bandwidth(task.id, Some(BytesPerSec(5_000_000))).await.expect("recorded");
    let set = pair.a1.command().await;
    assert_eq!((told(&set), set.task.as_str()), (5_000_000, task.id.to_string().as_str()));
    pair.a1.done(&set, 0).await;
    client.set_task_bandwidth(task.id, Some(BytesPerSec(6_000_000))).await.expect("recorded");
    assert_eq!(told(&pair.a1.command().await), 6_000_000);

    // It may have heard that, and what counts afterwards is what counted before.
    drop(pair.a1);
    pair.cluster.connected("h1", false).await;
    let said = client.set_task_bandwidth(task.id, Some(BytesPerSec(5_000_000))).await.expect("recorded");
    assert!(said.trail.iter().any(|line| line.text.contains("allows")), "{:?}", said.trail);
    let mut back = pair.cluster.connect(&h1, vec![report(&vm, 1, RunState::Running, v1::Holding::Owner)]).await;
    let set = back.command().await;
    assert_eq!(told(&set), 5_000_000);
    back.refuse(&set, ErrorCode::NotFound).await;
    pair.cluster.task_when(task.id, |task| task.trail.iter().any(|line| line.text.starts_with("not changed"))).await;
    // Who asks for the same once more has it told once more.
    client.set_task_bandwidth(task.id, Some(BytesPerSec(5_000_000))).await.expect("recorded");
    assert_eq!(told(&back.command().await), 5_000_000);
}

#[tokio::test]
async fn what_is_no_migration_has_ended_or_gets_too_little_has_no_other_bandwidth() {
    let mut pair = pair().await;
    let client = pair.cluster.admin();
    let start = client.tasks().await.expect("tasks").first().expect("the start").id;
    assert_eq!(code(client.set_task_bandwidth(start, None).await), ErrorCode::BadRequest);
    let refusal = client.set_task_bandwidth(start, Some(BytesPerSec(999_999))).await.expect_err("too little").refusal();
    assert!(refusal.message.contains("hardly get on"), "{refusal}");
    let policy = MigrationPolicy { bandwidth: Some(BytesPerSec(1)), ..MigrationPolicy::default() };
    let request = api::VmMigrate { host: name("h2"), policy: policy.into(), dry_run: true, reason: None };
    assert_eq!(code(client.migrate_vm(&name("web1"), &request).await), ErrorCode::BadRequest);
    let task = pair.cluster.migrate("web1", "h2").await.expect("accepted");
    let prepare = pair.a2.command().await;
    pair.a2.refuse(&prepare, ErrorCode::NotEnoughSpace).await;
    let settle = pair.a2.command().await;
    pair.a2.done(&settle, 0).await;
    pair.cluster.ended(task.id).await;
    assert_eq!(code(client.set_task_bandwidth(task.id, None).await), ErrorCode::TooLate);
}

#[tokio::test]
async fn post_copy_and_throttling_are_told_only_where_a_migration_was_begun_for_them() {
    let mut pair = pair().await;
    let client = pair.cluster.admin();
    let begin = |policy: MigrationPolicy| api::VmMigrate { host: name("h2"), policy: policy.into(), dry_run: false, reason: None };
    let ask = MigrationPolicy { on_miss: Ladder::only(Rung::Ask), ..MigrationPolicy::default() };
    let task = client.migrate_vm(&name("web1"), &begin(ask)).await.expect("accepted");
    pair.begin_with(2, ask).await;
    pair.cluster.task_when(task.id, |task| task.step.contains("moves from")).await;
    let told = |command: &v1::Command| match &command.action {
        Some(Action::Policy(set)) => serde_json::from_slice::<MigrationPolicy>(&set.policy).expect("a policy"),
        other => panic!("{other:?}"),
    };
    client.throttle_task(task.id).await.expect("recorded");
    let set = pair.a1.command().await;
    assert_eq!(told(&set).on_miss, Ladder::only(Rung::Throttle));
    pair.a1.done(&set, 0).await;
    client.postcopy_task(task.id).await.expect("it stays ready for that");
    let set = pair.a1.command().await;
    assert_eq!((told(&set).on_miss, told(&set).postcopy), (Ladder::only(Rung::Throttle), PostCopy::Now));

    let other = self::pair().await;
    let client = other.cluster.admin();
    let task = other.cluster.migrate("web1", "h2").await.expect("accepted");
    for refused in [client.postcopy_task(task.id).await, client.throttle_task(task.id).await] {
        let refusal = refused.expect_err("not begun for it").refusal();
        assert!(refusal.code == ErrorCode::BadRequest && refusal.hint.is_some(), "{refusal}");
    }
}

#[tokio::test]
async fn a_vm_that_any_host_says_it_runs_is_not_deleted() {
    let mut pair = pair().await;
    let task = pair.cluster.migrate("web1", "h2").await.expect("accepted");
    pair.begin(2).await;
    let vm = pair.cluster.vm("web1").await;
    for (agent, source) in [(&mut pair.a1, true), (&mut pair.a2, false)] {
        agent.ended(ended(&task, &vm, 2, source, Some(ErrorCode::MigrationStalled))).await;
    }
    pair.cluster.ended(task.id).await;
    pair.a1.send(Body::Vm(report(&vm, 1, RunState::Crashed, v1::Holding::Owner))).await;
    pair.cluster.vm_when("web1", |vm| vm.status.state == RunState::Crashed).await;

    let admin = pair.cluster.admin();
    let delete = api::VmDelete { volumes: false };
    let task = admin.delete_vm(&name("web1"), &delete).await.expect("accepted");
    let forget = pair.a2.command().await;
    assert!(matches!(forget.action, Some(Action::Forget(_))), "{forget:?}");
    pair.a2.refuse(&forget, ErrorCode::VmRunning).await;
    assert_eq!(pair.cluster.ended(task.id).await.error.expect("refused").code, ErrorCode::VmRunning);

    let task = admin.delete_vm(&name("web1"), &delete).await.expect("it is still there");
    for agent in [&mut pair.a2, &mut pair.a1] {
        let forget = agent.command().await;
        agent.done(&forget, 0).await;
    }
    assert_eq!(pair.cluster.ended(task.id).await.state, TaskState::Done);
}

struct Arrived {
    cluster: Cluster,
    h2: Host,
    a2: Agent,
    task: api::Task,
    vm: api::Vm,
}

/// Two hosts of a controller that loses patience soon, and a VM that has moved from the first to the second, whose source has gone silent.
async fn arrived_without_its_source() -> Arrived {
    let cluster = Cluster::with(|options| options.heartbeat = Duration::from_millis(200)).await;
    let (_, mut a1) = cluster.agent("h1").await;
    let (h2, a2) = cluster.agent("h2").await;
    cluster.running_vm("web1", &mut a1).await;
    let spec = VmSpec { autostart: Some(Autostart::default()), ..cluster.vm("web1").await.spec };
    cluster.admin().set_vm(&name("web1"), &spec, None).await.expect("changed");
    let task = cluster.migrate("web1", "h2").await.expect("accepted");
    let mut pair = Pair { cluster, a1, a2 };
    pair.begin(2).await;
    let vm = pair.cluster.vm("web1").await;
    pair.a2.send(Body::Vm(report(&vm, 2, RunState::Running, v1::Holding::Owner))).await;
    pair.cluster.vm_when("web1", |vm| vm.status.host == Some(name("h2"))).await;
    let Pair { cluster, a1, a2 } = pair;
    drop(a1);
    cluster.connected("h1", false).await;
    Arrived { cluster, h2, a2, task, vm }
}

async fn told_to_settle(agent: &mut Agent, generation: u64) {
    let command = agent.command().await;
    let Some(Action::Settle(body)) = &command.action else { panic!("{command:?}") };
    assert_eq!(body.generation, generation);
    agent.done(&command, 0).await;
}

#[tokio::test]
async fn a_move_ends_without_a_source_that_stays_away_when_the_destination_has_the_whole_vm() {
    let Arrived { cluster, mut a2, task, vm, .. } = arrived_without_its_source().await;
    // Memory is still to come: it is told again.
    told_to_settle(&mut a2, 2).await;
    told_to_settle(&mut a2, 2).await;
    assert!(!cluster.task_when(task.id, |_| true).await.state.ended());
    a2.ended(ended(&task, &vm, 2, false, None)).await;
    let task = cluster.ended(task.id).await;
    assert_eq!((task.state, task.figures), (TaskState::Done, None), "nobody has measured it");
    assert!(task.trail.iter().any(|note| note.text.contains("h1 says nothing")), "{:?}", task.trail);
    let vm = cluster.vm("web1").await;
    assert_eq!((vm.status.host, vm.status.activity), (Some(name("h2")), None));
}

#[tokio::test]
async fn a_vm_whose_move_cannot_end_is_killed_where_it_is_and_started_again() {
    let Arrived { cluster, mut a2, task, vm, .. } = arrived_without_its_source().await;
    let kill = cluster.admin().kill_vm(&name("web1")).await.expect("accepted");
    let command = loop {
        let command = a2.command().await;
        match &command.action {
            Some(Action::Settle(_)) => a2.done(&command, 0).await,
            _ => break command,
        }
    };
    let Some(Action::Kill(body)) = &command.action else { panic!("{command:?}") };
    assert_eq!(body.generation, 2);
    a2.done(&command, 0).await;
    a2.send(Body::Vm(report(&vm, 2, RunState::Stopped, v1::Holding::Owner))).await;
    assert_eq!(cluster.ended(kill.id).await.state, TaskState::Done);
    assert_eq!(cluster.vm("web1").await.status.activity, None);
    assert!(!cluster.task_when(task.id, |_| true).await.state.ended(), "its end is another matter");
    let start = cluster.admin().start_vm(&name("web1"), &api::VmStart::default()).await.expect("accepted");
    assert!(!start.state.ended());
}

#[tokio::test]
async fn a_vm_that_shall_start_again_starts_when_its_open_move_has_ended() {
    let Arrived { cluster, h2, a2, task, vm } = arrived_without_its_source().await;
    drop(a2);
    cluster.connected("h2", false).await;
    let went_down = v1::VmReport { ended_with_host: true, ..report(&vm, 2, RunState::Stopped, v1::Holding::Owner) };
    let mut a2 = cluster.connect(&h2, vec![went_down]).await;
    let waits = |vm: &api::Vm| vm.status.conditions.iter().any(|condition| condition.name == "not_started_again");
    cluster.vm_when("web1", waits).await;
    a2.send(Body::Ended(ended(&task, &vm, 2, false, None))).await;
    let start = loop {
        match a2.next().await {
            Some(controller_message::Body::Command(command)) if matches!(command.action, Some(Action::Settle(_))) => {
                a2.done(&command, 0).await;
            }
            Some(controller_message::Body::Command(command)) => break command,
            _ => {}
        }
    };
    assert!(matches!(&start.action, Some(Action::Start(_))), "{start:?}");
    a2.done(&start, 0).await;
    let vm = cluster.vm_when("web1", |vm| vm.status.activity.is_none()).await;
    assert_eq!(vm.status.state, RunState::Running);
    assert!(!waits(&vm), "{vm:?}");
}

#[tokio::test]
async fn a_kill_cancels_a_move_and_ends_the_vm_at_its_source() {
    let mut pair = pair().await;
    let task = pair.cluster.migrate("web1", "h2").await.expect("accepted");
    pair.begin(2).await;
    let vm = pair.cluster.vm("web1").await;
    let kill = pair.cluster.admin().kill_vm(&name("web1")).await.expect("accepted");
    // By the request itself and by the move's task.
    for _ in 0..2 {
        let cancel = pair.a1.command().await;
        assert!(matches!(&cancel.action, Some(Action::Cancel(_))), "{cancel:?}");
        pair.a1.done(&cancel, 0).await;
    }
    pair.a1.ended(ended(&task, &vm, 2, true, Some(ErrorCode::Cancelled))).await;
    pair.a2.ended(ended(&task, &vm, 2, false, Some(ErrorCode::Cancelled))).await;
    let command = pair.a1.command().await;
    let Some(Action::Kill(body)) = &command.action else { panic!("{command:?}") };
    assert_eq!(body.generation, 1);
    pair.a1.done(&command, 0).await;
    assert_eq!(pair.cluster.ended(kill.id).await.state, TaskState::Done);
    assert_eq!(pair.cluster.ended(task.id).await.state, TaskState::Cancelled);
    let vm = pair.cluster.vm("web1").await;
    assert_eq!((vm.status.host, vm.status.state, vm.status.activity), (Some(name("h1")), RunState::Stopped, None));
}

#[tokio::test]
async fn limits_come_from_the_request_then_the_vm_then_policies_and_post_copy_that_is_ruled_out_is_refused() {
    let cluster = Cluster::new().await;
    let (_, mut a1) = cluster.agent("h1").await;
    let (_, mut a2) = cluster.agent("h2").await;
    cluster.running_vm("web1", &mut a1).await;
    let admin = cluster.admin();
    let blackout = |ms| MigrationSettings { max_blackout: Some(Millis(ms)), ..MigrationSettings::default() };
    let gold = BTreeMap::from([(name("tier"), "gold".to_owned())]);
    let strict = MigrationSettings { postcopy: Some(PostCopy::Never), patience: Some(Millis(5_000)), ..blackout(70) };
    let create = |policy: &str, labels: &BTreeMap<Name, String>, limits| api::PolicyCreate {
        name: name(policy),
        labels: labels.clone(),
        limits,
    };
    admin.create_policy(&create("all", &BTreeMap::new(), blackout(90))).await.expect("created");
    let made = admin.create_policy(&create("strict", &gold, strict)).await.expect("created");
    assert_eq!(code(admin.create_policy(&create("strict", &gold, strict)).await), ErrorCode::NameTaken);
    let slow = MigrationSettings { bandwidth: Some(BytesPerSec(5)), ..MigrationSettings::default() };
    assert_eq!(code(admin.create_policy(&create("slow", &gold, slow)).await), ErrorCode::BadRequest);
    let unprintable = BTreeMap::from([(name("a"), "\u{1b}[2J".to_owned())]);
    assert_eq!(code(admin.create_policy(&create("odd", &unprintable, strict)).await), ErrorCode::SpecInvalid);
    assert_eq!(admin.policies().await.expect("listed").len(), 2);
    let viewer = cluster.member("default", api::Role::Viewer).await;
    assert_eq!(viewer.policy(&name("strict")).await.expect("shown").limits, strict);
    assert_eq!(code(viewer.delete_policy(&name("strict")).await), ErrorCode::NotPermitted);

    let vm = cluster.vm("web1").await;
    let mut spec = vm.spec.clone();
    spec.labels = gold.clone();
    spec.migration.timeout = Some(Millis(60_000));
    let set = admin.set_vm(&name("web1"), &spec, Some(vm.revision)).await.expect("accepted");
    assert_eq!(cluster.ended(set.id).await.state, TaskState::Done, "it concerns the next migration, not the machine");
    let asked = |policy| api::VmMigrate { host: name("h2"), policy, dry_run: false, reason: None };
    let now = MigrationSettings { postcopy: Some(PostCopy::Now), ..MigrationSettings::default() };
    assert_eq!(code(admin.migrate_vm(&name("web1"), &asked(now)).await), ErrorCode::NotPermitted);

    let task = admin.migrate_vm(&name("web1"), &asked(MigrationSettings { patience: Some(Millis(9)), ..slow_enough() })).await;
    let task = task.expect("accepted");
    let prepare = a2.command().await;
    let Some(Action::Prepare(body)) = &prepare.action else { panic!("{prepare:?}") };
    let expected = MigrationPolicy {
        max_blackout: Millis(70),
        patience: Millis(9),
        timeout: Millis(60_000),
        bandwidth: slow_enough().bandwidth,
        postcopy: PostCopy::Never,
        ..MigrationPolicy::default()
    };
    assert_eq!(decode::<MigrationPolicy>("policy", &body.policy).expect("policy"), expected);
    let task = cluster.task_when(task.id, |task| !task.trail.is_empty()).await;
    let told: Vec<&str> = task.trail.iter().filter_map(|note| note.text.strip_prefix("limits of ")).collect();
    let told_of = ["the VM's own settings: timeout", "policy strict: max_blackout", "policy strict: post-copy never"];
    assert_eq!(told, told_of);

    assert_eq!(
        code(admin.set_policy(&name("strict"), &api::PolicySet::default(), made.revision + 1).await),
        ErrorCode::RevisionConflict
    );
    let changed = api::PolicySet { limits: Some(blackout(60)), labels: None };
    let changed = admin.set_policy(&name("strict"), &changed, made.revision).await.expect("changed");
    assert_eq!((changed.limits, changed.labels), (blackout(60), gold));
    admin.delete_policy(&name("strict")).await.expect("deleted");
    assert_eq!(code(admin.policy(&name("strict")).await), ErrorCode::NotFound);
}

fn slow_enough() -> MigrationSettings {
    MigrationSettings { bandwidth: Some(BytesPerSec(2_000_000)), ..MigrationSettings::default() }
}

/// Four moves from h1 to h2 under way, and two more VMs on h1.
async fn fill(pair: &mut Pair) -> Vec<api::Task> {
    for vm in ["web2", "web3", "web4", "web5", "web6"] {
        pair.cluster.create_vm(vm, Bytes::mib(64)).await;
        pair.cluster.start_vm(vm, &mut pair.a1).await;
    }
    let mut tasks = vec![];
    for vm in ["web1", "web2", "web3", "web4"] {
        tasks.push(pair.cluster.migrate(vm, "h2").await.expect("accepted"));
        pair.begin(2).await;
    }
    tasks
}

#[tokio::test]
async fn four_vms_leave_a_host_at_a_time_and_the_others_wait_for_their_turn() {
    let mut pair = pair().await;
    let tasks = fill(&mut pair).await;
    let mut waiting = vec![];
    for vm in ["web5", "web6"] {
        let task = pair.cluster.migrate(vm, "h2").await.expect("accepted");
        let waits = pair.cluster.task_when(task.id, |task| task.step.contains("waits for its turn")).await;
        assert!(waits.step.contains("4 VMs leave h1"), "{waits:?}");
        waiting.push(task.id);
    }
    // Who waits holds nothing of its VM, but for that nobody need ask for the same once more.
    assert_eq!(pair.cluster.vm("web5").await.status.activity, None);
    assert_eq!(code(pair.cluster.migrate("web5", "h2").await), ErrorCode::VmBusy);
    pair.cluster.admin().pause_vm(&name("web5")).await.expect("accepted");
    let pause = pair.a1.command().await;
    assert!(matches!(pause.action, Some(Action::Pause(_))), "{pause:?}");
    pair.a1.done(&pause, 0).await;
    pair.cluster.vm_when("web5", |vm| vm.status.state == RunState::Paused).await;
    pair.cluster.admin().cancel_task(waiting[0]).await.expect("accepted");
    assert_eq!(pair.cluster.ended(waiting[0]).await.state, TaskState::Cancelled);
    // One is through: its turn is the next one's, whose time begins now.
    let vm = pair.cluster.vm("web1").await;
    let before = godwit_model::UnixMillis(crate::clock::now().0 + MigrationPolicy::default().timeout.get());
    pair.a1.ended(ended(&tasks[0], &vm, 2, true, None)).await;
    pair.a2.ended(ended(&tasks[0], &vm, 2, false, None)).await;
    let prepare = pair.a2.command().await;
    let Some(Action::Prepare(body)) = &prepare.action else { panic!("{prepare:?}") };
    assert_eq!((prepare.task.clone(), grant(body.grant.clone()).expires > before), (waiting[1].to_string(), true));
}

#[tokio::test]
async fn a_move_that_waits_for_its_turn_outlasts_what_is_done_with_its_vm_meanwhile() {
    let mut pair = pair().await;
    let tasks = fill(&mut pair).await;
    let admin = pair.cluster.admin();
    let task = pair.cluster.migrate("web5", "h2").await.expect("accepted").id;
    let waits = |task: &api::Task| task.step.contains("waits for its turn");
    pair.cluster.task_when(task, waits).await;
    // A move to where there is room is another move nevertheless.
    let (_, a3) = pair.cluster.agent("h3").await;
    assert_eq!(code(pair.cluster.migrate("web5", "h3").await), ErrorCode::VmBusy);
    let paused = admin.pause_vm(&name("web5")).await.expect("accepted").id;
    let pause = pair.a1.command().await;
    pair.a1.done(&pause, 0).await;
    pair.cluster.ended(paused).await;
    // Its turn comes while it is busy, and the turn goes to nobody for that.
    let unpaused = admin.unpause_vm(&name("web5")).await.expect("accepted").id;
    let unpause = pair.a1.command().await;
    assert!(waits(&admin.task(task).await.expect("task")), "a VM that is paused may run when its turn comes");
    let vm = pair.cluster.vm("web1").await;
    pair.a1.ended(ended(&tasks[0], &vm, 2, true, None)).await;
    pair.a2.ended(ended(&tasks[0], &vm, 2, false, None)).await;
    pair.cluster.task_when(task, |task| task.step.contains("to end")).await;
    pair.a1.done(&unpause, 0).await;
    pair.cluster.ended(unpaused).await;
    let prepare = pair.a2.command().await;
    assert_eq!(prepare.task, task.to_string());
    drop(a3);
}

#[tokio::test]
async fn a_move_that_waits_for_its_turn_ends_with_its_vm() {
    let mut pair = pair().await;
    fill(&mut pair).await;
    let admin = pair.cluster.admin();
    let task = pair.cluster.migrate("web5", "h2").await.expect("accepted").id;
    pair.cluster.task_when(task, |task| task.step.contains("waits for its turn")).await;
    admin.kill_vm(&name("web5")).await.expect("accepted");
    let kill = pair.a1.command().await;
    pair.a1.done(&kill, 0).await;
    let vm = pair.cluster.vm("web5").await;
    pair.a1.send(Body::Vm(report(&vm, 1, RunState::Stopped, v1::Holding::Owner))).await;
    pair.cluster.vm_when("web5", |vm| vm.status.state == RunState::Stopped && vm.status.activity.is_none()).await;
    assert_eq!(admin.task(task).await.expect("task").state, TaskState::Running, "it may run again when its turn comes");
    let deleted = admin.delete_vm(&name("web5"), &api::VmDelete { volumes: false }).await.expect("accepted").id;
    let forget = pair.a1.command().await;
    pair.a1.done(&forget, 0).await;
    pair.cluster.ended(deleted).await;
    let failed = pair.cluster.ended(task).await;
    assert_eq!(failed.error.map(|refusal| refusal.code), Some(ErrorCode::NotFound));
}

#[tokio::test]
async fn moves_that_wait_for_a_host_which_is_away_hold_up_nobody() {
    let mut pair = pair().await;
    fill(&mut pair).await;
    let (_, mut a3) = pair.cluster.agent("h3").await;
    let task = pair.cluster.migrate("web5", "h3").await.expect("accepted");
    pair.cluster.task_when(task.id, |task| task.step.contains("waits for its turn")).await;
    drop(pair.a2);
    let prepare = a3.command().await;
    assert_eq!(prepare.task, task.id.to_string());
}

#[tokio::test]
async fn a_move_whose_destination_is_away_when_its_turn_comes_waits_for_it_and_lets_others_go_first() {
    let mut pair = pair().await;
    let tasks = fill(&mut pair).await;
    let (h3, a3) = pair.cluster.agent("h3").await;
    let first = pair.cluster.migrate("web5", "h3").await.expect("accepted").id;
    let second = pair.cluster.migrate("web6", "h2").await.expect("accepted").id;
    for task in [first, second] {
        pair.cluster.task_when(task, |task| task.step.contains("waits for its turn")).await;
    }
    drop(a3);
    pair.cluster.connected("h3", false).await;
    let vms = [pair.cluster.vm("web1").await, pair.cluster.vm("web2").await];
    pair.a1.ended(ended(&tasks[0], &vms[0], 2, true, None)).await;
    pair.a2.ended(ended(&tasks[0], &vms[0], 2, false, None)).await;
    let prepare = pair.a2.command().await;
    assert_eq!(prepare.task, second.to_string());
    assert_eq!(pair.cluster.admin().task(first).await.expect("task").state, TaskState::Running);
    pair.a1.ended(ended(&tasks[1], &vms[1], 2, true, None)).await;
    pair.a2.ended(ended(&tasks[1], &vms[1], 2, false, None)).await;
    let mut a3 = pair.cluster.connect(&h3, vec![]).await;
    let prepare = a3.command().await;
    assert_eq!(prepare.task, first.to_string());
}

#[tokio::test]
async fn moves_wait_for_their_turn_again_after_a_restart() {
    let cluster = Cluster::new().await;
    let (h1, mut a1) = cluster.agent("h1").await;
    let (h2, a2) = cluster.agent("h2").await;
    cluster.running_vm("web1", &mut a1).await;
    let mut pair = Pair { cluster, a1, a2 };
    fill(&mut pair).await;
    let Pair { mut cluster, a1, a2 } = pair;
    let task = cluster.migrate("web5", "h2").await.expect("accepted");
    cluster.task_when(task.id, |task| task.step.contains("waits for its turn")).await;
    cluster.stop().await;
    drop((a1, a2));
    cluster.start().await;
    cluster.task_when(task.id, |task| task.step.contains("is not connected")).await;
    let agents = (cluster.connect(&h1, vec![]).await, cluster.connect(&h2, vec![]).await);
    cluster.task_when(task.id, |task| task.step.contains("4 VMs leave h1")).await;
    drop(agents);
}

#[tokio::test]
async fn vms_of_the_team_at_the_destination_are_named_where_the_team_shares_memory() {
    let mut pair = pair().await;
    pair.cluster.running_vm("near", &mut pair.a2).await;
    let near = pair.cluster.vm("near").await.id.to_string();
    // Of another team, and on no host.
    let red = pair.cluster.member("red", api::Role::Operator).await;
    let image = futures::stream::iter([Ok(kernel().into())]);
    red.import_image(&name("linux"), ImportFormat::Kernel, image).await.expect("imported");
    let foreign = api::VmCreate { name: name("foreign"), spec: VmSpec { nics: vec![], ..spec(Bytes::mib(64)) }, golden: None };
    red.create_vm(&foreign).await.expect("created");
    red.start_vm(&name("foreign"), &api::VmStart { host: Some(name("h2")) }).await.expect("accepted");
    let start = pair.a2.command().await;
    pair.a2.done(&start, 0).await;
    pair.cluster.create_vm("off", Bytes::mib(64)).await;
    for (shares, named) in [(false, vec![]), (true, vec![near])] {
        let set = api::TeamSet { share_memory: shares };
        let team = pair.cluster.admin().set_team(&name("default"), &set).await.expect("set");
        assert_eq!(team.share_memory, shares);
        let task = pair.cluster.migrate("web1", "h2").await.expect("accepted");
        let prepare = pair.a2.command().await;
        let Some(Action::Prepare(body)) = &prepare.action else { panic!("{prepare:?}") };
        assert_eq!(body.neighbours, named);
        pair.a2.done(&prepare, 4_711).await;
        let out = pair.a1.command().await;
        pair.a1.refuse(&out, ErrorCode::VmBusy).await;
        let settle = pair.a2.command().await;
        pair.a2.done(&settle, 0).await;
        let trail = pair.cluster.ended(task.id).await.trail;
        assert_eq!(trail.iter().any(|entry| entry.text.contains("in common")), shares, "{trail:?}");
    }
}
