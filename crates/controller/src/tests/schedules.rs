//! Schedules with scripted agents and a clock of their own: what is taken when, what is made up, what goes, and what never does.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use godwit_api::v1::{self as api, Role, ScheduledResult, SnapshotState, TaskState};
use godwit_link::decode;
use godwit_link::v1::{self, command::Action};
use godwit_model::{
    Bytes, ErrorCode, Millis, Retention, RunState, ScheduleSpec, SnapshotFigures, SnapshotRequest, SnapshotSize, UnixMillis,
};

use super::snapshots::{figures, take, with_a_disk};
use super::support::*;
use crate::clock::WallClock;

const MINUTE: u64 = 60_000;
const HOUR: u64 = 60 * MINUTE;

/// A clock that a test sets.
#[derive(Clone)]
struct Hand(Arc<AtomicU64>);

impl Hand {
    fn at(text: &str) -> Self {
        Self(Arc::new(AtomicU64::new(millis(text))))
    }

    fn clock(&self) -> WallClock {
        let hand = self.0.clone();
        WallClock::new(move || UnixMillis(hand.load(Ordering::SeqCst)))
    }

    fn set(&self, cluster: &Cluster, text: &str) {
        self.0.store(millis(text), Ordering::SeqCst);
        cluster.look_at_schedules();
    }

    fn pass(&self, cluster: &Cluster, time: u64) {
        self.0.fetch_add(time, Ordering::SeqCst);
        cluster.look_at_schedules();
    }
}

fn millis(text: &str) -> u64 {
    let at: jiff::Timestamp = text.parse().expect("a moment");
    u64::try_from(at.as_millisecond()).expect("after 1970")
}

/// Shortly before three in the morning; a host, and web1 that runs on it.
async fn night() -> (Hand, Cluster, Host, Agent) {
    let hand = Hand::at("2027-01-10T02:50:00Z");
    let clock = hand.clock();
    let cluster = Cluster::with(|options| options.clock = clock).await;
    let (host, mut agent) = cluster.agent("h1").await;
    cluster.create_vm("web0", Bytes::mib(64)).await;
    another(&cluster, &mut agent, "web1").await;
    (hand, cluster, host, agent)
}

async fn another(cluster: &Cluster, agent: &mut Agent, vm: &str) {
    let mut spec = with_a_disk();
    spec.disks[0].volume = format!("shared/{vm}").parse().expect("volume");
    cluster.admin().create_vm(&api::VmCreate { name: name(vm), spec, golden: None }).await.expect("created");
    cluster.start_vm(vm, agent).await;
}

/// Each night at three, of these VMs.
fn nightly(vms: &[&str], keep: Retention) -> ScheduleSpec {
    let vms = vms.iter().map(|vm| name(vm)).collect();
    ScheduleSpec { vms, keep, memory: false, ..ScheduleSpec::new("0 3 * * *") }
}

fn last(count: u32) -> Retention {
    Retention { last: Some(count), ..Retention::default() }
}

async fn schedule(cluster: &Cluster, text: &str, spec: ScheduleSpec) -> api::Schedule {
    cluster.admin().create_schedule(&api::ScheduleCreate { name: name(text), spec }).await.expect("created")
}

/// How a schedule stands with a VM, once `until` holds.
async fn standing(cluster: &Cluster, text: &str, vm: &str, until: impl Fn(&api::ScheduledVm) -> bool) -> api::ScheduledVm {
    let (admin, wanted) = (cluster.admin(), name(vm));
    soon(async {
        loop {
            let status = admin.schedule_status(&name(text)).await.expect("status");
            if let Some(found) = status.vms.into_iter().find(|found| found.vm == wanted && until(found)) {
                return found;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await
}

fn over(vm: &api::ScheduledVm) -> bool {
    vm.due.is_none() && vm.last.is_some()
}

/// Takes the snapshot that is due to its good end; its name.
async fn taken(cluster: &Cluster, agent: &mut Agent, text: &str) -> godwit_model::Name {
    let command = agent.command().await;
    take(&command);
    let task = cluster.admin().task(command.task.parse().expect("task")).await.expect("task");
    let volume = format!("shared/{}", task.subject).parse().expect("volume");
    let sizes = vec![SnapshotSize { volume, size: Bytes::mib(1) }];
    agent.tell(&command, &SnapshotFigures { sizes, ..figures() }).await;
    let task = cluster.ended(command.task.parse().expect("task")).await;
    assert_eq!(task.state, TaskState::Done, "{task:?}");
    let snapshot = task.snapshot.expect("a name");
    let vm = task.subject.to_string();
    standing(cluster, text, &vm, |vm| over(vm) && vm.last.as_ref().is_some_and(|last| last.snapshot.as_ref() == Some(&snapshot)))
        .await;
    snapshot
}

/// Deletes what is to go; its id.
async fn deletes(agent: &mut Agent) -> String {
    let command = agent.command().await;
    let Some(Action::DeleteSnapshot(delete)) = &command.action else { panic!("{command:?}") };
    let id = delete.snapshot.clone();
    agent.done(&command, 0).await;
    id
}

async fn names(cluster: &Cluster) -> BTreeSet<String> {
    cluster.admin().snapshots(None).await.expect("list").into_iter().map(|snapshot| snapshot.name.to_string()).collect()
}

async fn gone(cluster: &Cluster, snapshot: &godwit_model::Name) {
    let admin = cluster.admin();
    soon(async {
        while admin.snapshot(snapshot).await.is_ok() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// Tasks of a kind, the newest first.
async fn tasks(cluster: &Cluster, kind: &str) -> Vec<api::Task> {
    cluster.admin().tasks().await.expect("tasks").into_iter().filter(|task| task.kind == kind).collect()
}

#[tokio::test]
async fn at_its_times_snapshots_are_taken_and_what_is_not_kept_goes_but_never_what_is_golden_or_of_others() {
    let (hand, cluster, _, mut agent) = night().await;
    let admin = cluster.admin();
    // Somebody's own, and one of another schedule, of the same VM.
    let own = api::SnapshotCreate { name: Some(name("own")), ..super::snapshots::of_web1(None) };
    let task = admin.create_snapshot(&own).await.expect("accepted").id;
    let command = agent.command().await;
    agent.tell(&command, &figures()).await;
    cluster.ended(task).await;
    schedule(&cluster, "other", ScheduleSpec { enabled: false, ..nightly(&["web1"], Retention::default()) }).await;
    admin.run_schedule(&name("other"), &api::ScheduleRun { reason: Some("by hand".into()) }).await.expect("accepted");
    let others = taken(&cluster, &mut agent, "other").await;
    let by_hand = admin.snapshot(&others).await.expect("there");
    assert_eq!((by_hand.principal.as_str(), by_hand.reason.as_deref()), ("schedule other", Some("by hand")));

    let made = schedule(&cluster, "nightly", nightly(&["web1"], last(1))).await;
    assert_eq!((made.next.map(|next| next.0), made.last), (Some(millis("2027-01-10T03:00:00Z")), None));
    hand.set(&cluster, "2027-01-10T03:00:00Z");
    let command = agent.command().await;
    let asked = take(&command).clone();
    let request: SnapshotRequest = decode("request", &asked.request).expect("a request");
    assert_eq!(request, SnapshotRequest { memory: false, quiesce: None });
    let now = standing(&cluster, "nightly", "web1", |vm| vm.task.is_some()).await;
    assert_eq!((now.due, now.last), (Some(UnixMillis(millis("2027-01-10T03:00:00Z"))), None));
    agent.tell(&command, &figures()).await;
    let now = standing(&cluster, "nightly", "web1", over).await;
    let first = now.last.expect("an end").snapshot.expect("taken");
    assert_eq!((first.as_str(), now.expiring.as_slice()), ("web1-20270110-030000", std::slice::from_ref(&first)));
    let snapshot = admin.snapshot(&first).await.expect("there");
    assert_eq!(
        (snapshot.principal.as_str(), snapshot.reason.as_deref()),
        ("schedule nightly", Some("due at 2027-01-10T03:00:00Z"))
    );

    // The next night the first one goes, on the record.
    hand.set(&cluster, "2027-01-11T03:00:01Z");
    let second = taken(&cluster, &mut agent, "nightly").await;
    assert_eq!(deletes(&mut agent).await, asked.snapshot.expect("a key").snapshot);
    gone(&cluster, &first).await;
    let deleted = tasks(&cluster, "snapshot.delete").await;
    assert_eq!(deleted.len(), 1);
    assert_eq!((deleted[0].principal.as_str(), deleted[0].subject.clone()), ("schedule nightly", first));
    assert!(deleted[0].trail[0].text.contains("kept are: last 1"), "{:?}", deleted[0].trail);
    assert_eq!(names(&cluster).await, [others.as_str(), "own", second.as_str()].map(str::to_owned).into());

    // What was made golden is nobody's to delete, and does not count.
    admin.set_snapshot(&second, &api::SnapshotSet { golden: Some(true) }).await.expect("changed");
    hand.set(&cluster, "2027-01-12T03:00:00Z");
    let third = taken(&cluster, &mut agent, "nightly").await;
    hand.set(&cluster, "2027-01-13T03:00:00Z");
    let fourth = taken(&cluster, &mut agent, "nightly").await;
    deletes(&mut agent).await;
    gone(&cluster, &third).await;
    assert_eq!(names(&cluster).await, [others.as_str(), "own", second.as_str(), fourth.as_str()].map(str::to_owned).into());

    // One of the same name is another schedule.
    admin.delete_schedule(&name("nightly")).await.expect("deleted");
    schedule(&cluster, "nightly", nightly(&["web1"], last(1))).await;
    hand.set(&cluster, "2027-01-14T03:00:00Z");
    taken(&cluster, &mut agent, "nightly").await;
    assert!(names(&cluster).await.contains(fourth.as_str()) && tasks(&cluster, "snapshot.delete").await.len() == 2);
}

#[tokio::test]
async fn whenever_the_controller_ends_no_instant_is_done_twice_and_the_newest_that_was_missed_is_made_up_once() {
    let (hand, mut cluster, host, mut agent) = night().await;
    schedule(&cluster, "nightly", nightly(&["web1"], Retention::default())).await;
    let vm = cluster.vm("web1").await;
    let back = || vec![report(&vm, 1, RunState::Running, v1::Holding::Owner)];

    // Three nights without a controller.
    cluster.stop().await;
    drop(agent);
    hand.0.store(millis("2027-01-13T09:00:00Z"), Ordering::SeqCst);
    cluster.start().await;
    agent = cluster.connect(&host, back()).await;
    cluster.look_at_schedules();
    let command = agent.command().await;
    take(&command);
    let made_up = cluster.admin().schedule(&name("nightly")).await.expect("there").last.expect("a run");
    assert_eq!((made_up.due.0, made_up.began.0), (millis("2027-01-13T03:00:00Z"), millis("2027-01-13T09:00:00Z")));

    // It ends while the snapshot is taken: the same command comes again.
    cluster.stop().await;
    drop(agent);
    cluster.start().await;
    agent = cluster.connect(&host, back()).await;
    let again = agent.command().await;
    assert_eq!((again.id, take(&again)), (command.id, take(&command)));
    agent.tell(&again, &figures()).await;
    let now = standing(&cluster, "nightly", "web1", over).await;
    assert_eq!((now.snapshots.len(), now.last.map(|last| last.result)), (1, Some(ScheduledResult::Taken)));
    // And once more, when it is over.
    cluster.stop().await;
    drop(agent);
    cluster.start().await;
    let _agent = cluster.connect(&host, back()).await;
    hand.pass(&cluster, HOUR);
    let now = standing(&cluster, "nightly", "web1", over).await;
    assert_eq!((now.snapshots.len(), tasks(&cluster, "vm.snapshot").await.len()), (1, 1));
}

#[tokio::test]
async fn what_is_later_than_it_may_be_is_not_made_up_and_the_schedule_says_so() {
    let (hand, mut cluster, host, agent) = night().await;
    schedule(&cluster, "nightly", ScheduleSpec { catch_up: Millis(HOUR), ..nightly(&["web1"], Retention::default()) }).await;
    let vm = cluster.vm("web1").await;
    cluster.stop().await;
    drop(agent);
    hand.0.store(millis("2027-01-12T04:00:01Z"), Ordering::SeqCst);
    cluster.start().await;
    let mut agent = cluster.connect(&host, vec![report(&vm, 1, RunState::Running, v1::Holding::Owner)]).await;
    let admin = cluster.admin();
    soon(async {
        while admin.schedule(&name("nightly")).await.expect("there").missed.is_none() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    let missed = admin.schedule(&name("nightly")).await.expect("there");
    assert_eq!((missed.missed.map(|at| at.0), missed.last), (Some(millis("2027-01-12T03:00:00Z")), None));
    assert_eq!(missed.next.map(|at| at.0), Some(millis("2027-01-13T03:00:00Z")));

    // A host that is away is waited for, as long.
    drop(agent);
    cluster.connected("h1", false).await;
    hand.set(&cluster, "2027-01-13T03:00:00Z");
    let waits = standing(&cluster, "nightly", "web1", |vm| vm.waits_for.as_ref().is_some_and(|why| why.contains("h1"))).await;
    assert_eq!(waits.due.map(|at| at.0), Some(millis("2027-01-13T03:00:00Z")));
    // Also by the next controller.
    cluster.stop().await;
    cluster.start().await;
    let waits = standing(&cluster, "nightly", "web1", |vm| vm.waits_for.is_some()).await;
    assert_eq!(waits.due.map(|at| at.0), Some(millis("2027-01-13T03:00:00Z")));
    hand.set(&cluster, "2027-01-13T03:59:00Z");
    agent = cluster.connect(&host, vec![report(&vm, 1, RunState::Running, v1::Holding::Owner)]).await;
    cluster.look_at_schedules();
    taken(&cluster, &mut agent, "nightly").await;
    drop(agent);
    cluster.connected("h1", false).await;
    hand.set(&cluster, "2027-01-14T03:00:00Z");
    standing(&cluster, "nightly", "web1", |vm| vm.waits_for.is_some()).await;
    hand.set(&cluster, "2027-01-14T04:00:01Z");
    let skipped =
        standing(&cluster, "nightly", "web1", |vm| over(vm) && vm.last.as_ref().is_some_and(|last| last.error.is_some())).await;
    let end = skipped.last.expect("an end");
    assert_eq!((end.result, end.error.expect("why").code), (ScheduledResult::Skipped, ErrorCode::HostDown));
    assert_eq!(skipped.snapshots.len(), 1);

    // Too late while the controller is away.
    hand.set(&cluster, "2027-01-15T03:00:00Z");
    standing(&cluster, "nightly", "web1", |vm| vm.waits_for.is_some()).await;
    cluster.stop().await;
    hand.0.store(millis("2027-01-15T04:00:01Z"), Ordering::SeqCst);
    cluster.start().await;
    let due = UnixMillis(millis("2027-01-15T03:00:00Z"));
    let skipped = standing(&cluster, "nightly", "web1", |vm| vm.last.as_ref().is_some_and(|last| last.due == due)).await;
    assert_eq!(skipped.last.map(|last| last.result), Some(ScheduledResult::Skipped));
    assert_eq!(tasks(&cluster, "vm.snapshot").await.len(), 1);
}

#[tokio::test]
async fn a_vm_whose_last_run_is_under_way_or_that_does_not_run_is_skipped_and_the_reason_told() {
    let (hand, cluster, _, mut agent) = night().await;
    let spec = ScheduleSpec { vms: BTreeSet::new(), ..nightly(&[], Retention::default()) };
    schedule(&cluster, "all", ScheduleSpec { when: "*/5 * * * *".into(), ..spec }).await;
    hand.set(&cluster, "2027-01-10T02:55:00Z");
    let command = agent.command().await;
    let stopped = standing(&cluster, "all", "web0", over).await.last.expect("an end");
    assert_eq!((stopped.result, stopped.error.expect("why").code), (ScheduledResult::Skipped, ErrorCode::VmNotRunning));
    // The next ones come while it is still at it: they do not pile up.
    for minute in ["03:00", "03:05"] {
        hand.set(&cluster, &format!("2027-01-10T{minute}:00Z"));
        let due = UnixMillis(millis(&format!("2027-01-10T{minute}:00Z")));
        let now = standing(&cluster, "all", "web1", |vm| vm.last.as_ref().is_some_and(|last| last.due == due)).await;
        let end = now.last.expect("an end");
        assert_eq!((end.result, end.error.expect("why").code), (ScheduledResult::Skipped, ErrorCode::VmBusy));
        assert_eq!(now.task.map(|task| task.to_string()), Some(command.task.clone()), "still the first");
    }
    agent.tell(&command, &figures()).await;
    let now = standing(&cluster, "all", "web1", |vm| vm.due.is_none() && vm.snapshots.len() == 1).await;
    assert_eq!(now.last.map(|last| last.result), Some(ScheduledResult::Taken));
    assert_eq!(tasks(&cluster, "vm.snapshot").await.len(), 1);
}

#[tokio::test]
async fn vms_of_a_host_take_turns_and_a_move_is_waited_for() {
    let (hand, cluster, _, mut agent) = night().await;
    let (_, mut other) = cluster.agent("h2").await;
    for vm in ["web2", "web3", "web4"] {
        another(&cluster, &mut agent, vm).await;
    }
    another(&cluster, &mut other, "far").await;
    let vms = ["web1", "web2", "web3", "web4", "far"];
    schedule(&cluster, "nightly", nightly(&vms, Retention::default())).await;
    hand.set(&cluster, "2027-01-10T03:00:00Z");
    let mut under_way = vec![agent.command().await, agent.command().await];
    take(&other.command().await);
    for vm in ["web3", "web4"] {
        let waits = standing(&cluster, "nightly", vm, |vm| vm.waits_for.is_some()).await;
        assert_eq!(waits.waits_for.as_deref(), Some("its turn"));
    }
    assert_eq!(tasks(&cluster, "vm.snapshot").await.len(), 3);
    for left in (0..2).rev() {
        let first = under_way.remove(0);
        agent.tell(&first, &figures()).await;
        under_way.push(agent.command().await);
        assert_eq!(tasks(&cluster, "vm.snapshot").await.len(), 5 - left);
    }
    for command in &under_way {
        take(command);
        agent.tell(command, &figures()).await;
    }
    for vm in &vms[..4] {
        standing(&cluster, "nightly", vm, |vm| vm.snapshots.len() == 1 && over(vm)).await;
    }

    // A VM that moves is kept when it has arrived.
    let moving = cluster.migrate("web1", "h2").await.expect("accepted");
    let prepare = other.command().await;
    hand.set(&cluster, "2027-01-11T03:00:00Z");
    let now = standing(&cluster, "nightly", "web1", |vm| vm.task.is_some()).await;
    let waits = cluster.task_when(now.task.expect("a task"), |task| task.step.contains(&moving.id.to_string())).await;
    assert_eq!((waits.kind.as_str(), waits.principal.as_str()), ("vm.snapshot", "schedule nightly"));
    other.refuse(&prepare, ErrorCode::NotEnoughSpace).await;
    let settle = other.command().await;
    other.done(&settle, 0).await;
    cluster.ended(moving.id).await;
    let mut commands = vec![agent.command().await];
    commands.push(agent.command().await);
    let web1 = cluster.vm("web1").await.id.to_string();
    assert!(commands.iter().any(|command| take(command).vm == web1), "{commands:?}");
}

#[tokio::test]
async fn failures_delete_nothing_and_what_is_in_use_goes_later() {
    let (hand, cluster, _, mut agent) = night().await;
    let admin = cluster.admin();
    schedule(&cluster, "nightly", nightly(&["web1"], last(1))).await;
    hand.set(&cluster, "2027-01-10T03:00:00Z");
    let good = taken(&cluster, &mut agent, "nightly").await;
    for day in ["11", "12"] {
        hand.set(&cluster, &format!("2027-01-{day}T03:00:00Z"));
        let command = agent.command().await;
        agent.refuse(&command, ErrorCode::NotEnoughSpace).await;
        let failed =
            standing(&cluster, "nightly", "web1", |vm| over(vm) && vm.last.as_ref().is_some_and(|last| last.error.is_some())).await;
        let end = failed.last.expect("an end");
        assert_eq!((end.result, end.error.expect("why").code), (ScheduledResult::Failed, ErrorCode::NotEnoughSpace));
        assert_eq!(failed.snapshots, std::slice::from_ref(&good));
    }
    assert!(tasks(&cluster, "snapshot.delete").await.is_empty());

    // A VM that is still to begin from it needs it.
    let clone = api::SnapshotClone { name: name("web7"), host: None, start: false, memory: false, reason: None };
    let task = admin.clone_snapshot(&good, &clone).await.expect("accepted");
    cluster.ended(task.id).await;
    hand.set(&cluster, "2027-01-13T03:00:00Z");
    let newer = taken(&cluster, &mut agent, "nightly").await;
    hand.pass(&cluster, MINUTE);
    assert_eq!(names(&cluster).await.len(), 2);
    let task = admin.delete_vm(&name("web7"), &api::VmDelete { volumes: false }).await.expect("accepted");
    cluster.ended(task.id).await;
    hand.pass(&cluster, 10 * MINUTE);
    // Its host cannot, this time.
    let command = agent.command().await;
    assert!(matches!(command.action, Some(Action::DeleteSnapshot(_))), "{command:?}");
    agent.refuse(&command, ErrorCode::HostFailed).await;
    cluster.ended(tasks(&cluster, "snapshot.delete").await[0].id).await;
    assert_eq!(admin.snapshot(&good).await.expect("there").state, SnapshotState::Deleting);
    soon(async {
        while tasks(&cluster, "snapshot.delete").await.len() < 2 {
            hand.pass(&cluster, 10 * MINUTE);
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    deletes(&mut agent).await;
    gone(&cluster, &good).await;
    assert_eq!(names(&cluster).await, [newer.to_string()].into());
}

#[tokio::test]
async fn clocks_that_go_forward_and_back_are_those_of_its_zone() {
    let (hand, cluster, _, mut agent) = night().await;
    let admin = cluster.admin();
    hand.set(&cluster, "2027-03-27T12:00:00Z");
    let spec = ScheduleSpec { when: "30 2 * * *".into(), zone: "Europe/Berlin".into(), ..nightly(&["web1"], Retention::default()) };
    let made = schedule(&cluster, "nightly", spec).await;
    // Half past two does not exist that night; it is three by then.
    assert_eq!(made.next.map(|at| at.0), Some(millis("2027-03-28T01:00:00Z")));
    hand.set(&cluster, "2027-03-28T01:00:00Z");
    taken(&cluster, &mut agent, "nightly").await;
    hand.set(&cluster, "2027-03-28T01:30:00Z");
    let next = admin.schedule(&name("nightly")).await.expect("there").next;
    assert_eq!(next.map(|at| at.0), Some(millis("2027-03-29T00:30:00Z")));
    // It exists twice in this one.
    hand.set(&cluster, "2027-10-30T23:00:00Z");
    taken(&cluster, &mut agent, "nightly").await;
    hand.set(&cluster, "2027-10-31T00:30:00Z");
    taken(&cluster, &mut agent, "nightly").await;
    hand.set(&cluster, "2027-10-31T01:30:00Z");
    let now = admin.schedule(&name("nightly")).await.expect("there");
    assert_eq!(now.next.map(|at| at.0), Some(millis("2027-11-01T01:30:00Z")));
    assert_eq!(standing(&cluster, "nightly", "web1", over).await.snapshots.len(), 3);
}

#[tokio::test]
async fn what_a_schedule_cannot_say_is_refused_with_the_fix_and_a_change_makes_nothing_up() {
    let (hand, cluster, _, _agent) = night().await;
    let admin = cluster.admin();
    let base = nightly(&["web1"], last(1));
    let refused = async |spec: ScheduleSpec| {
        let refusal = admin.create_schedule(&api::ScheduleCreate { name: name("odd"), spec }).await.expect_err("refused").refusal();
        assert!(refusal.hint.is_some(), "{refusal}");
        (refusal.code, refusal.message)
    };
    let table = [
        (ScheduleSpec { zone: "Mars/Olympus".into(), ..base.clone() }, "there is no time zone Mars/Olympus"),
        (ScheduleSpec { when: "0 0 30 2 *".into(), ..base.clone() }, "never comes to pass"),
        (ScheduleSpec { when: "soon".into(), ..base.clone() }, "5 fields"),
        (ScheduleSpec { when: "61 * * * *".into(), ..base.clone() }, "not understood"),
        (ScheduleSpec { keep: last(0), ..base.clone() }, "keeps nothing"),
        (ScheduleSpec { catch_up: Millis(0), ..base.clone() }, "late"),
        (ScheduleSpec { quiesce: Some(Millis(0)), ..base.clone() }, "brought to rest"),
    ];
    for (spec, text) in table {
        let (code, message) = refused(spec).await;
        assert!(code == ErrorCode::BadRequest && message.contains(text), "{message}");
    }
    assert_eq!(refused(nightly(&["gone"], last(1))).await.0, ErrorCode::NotFound);

    let made = schedule(&cluster, "nightly", base.clone()).await;
    assert_eq!(
        code(admin.create_schedule(&api::ScheduleCreate { name: name("nightly"), spec: base.clone() }).await),
        ErrorCode::NameTaken
    );
    let set = |change: fn(&mut ScheduleSpec)| {
        let mut spec = base.clone();
        change(&mut spec);
        api::ScheduleSet { spec }
    };
    let off = admin.set_schedule(&name("nightly"), &set(|spec| spec.enabled = false), made.revision).await.expect("changed");
    assert_eq!(off.next, None);
    assert_eq!(code(admin.set_schedule(&name("nightly"), &set(|_| {}), made.revision).await), ErrorCode::RevisionConflict);
    hand.set(&cluster, "2027-01-10T03:30:00Z");
    let on = admin.set_schedule(&name("nightly"), &set(|_| {}), off.revision).await.expect("changed");
    assert_eq!((on.next.map(|at| at.0), on.missed), (Some(millis("2027-01-11T03:00:00Z")), None));
    let same = admin.set_schedule(&name("nightly"), &set(|_| {}), on.revision).await.expect("nothing to do");
    assert_eq!(same.revision, on.revision);
    assert!(tasks(&cluster, "vm.snapshot").await.is_empty());

    let viewer = cluster.member("default", Role::Viewer).await;
    assert_eq!(code(viewer.run_schedule(&name("nightly"), &api::ScheduleRun::default()).await), ErrorCode::NotPermitted);
    for number in 1..crate::schedules::MOST {
        schedule(&cluster, &format!("s{number}"), ScheduleSpec { enabled: false, ..base.clone() }).await;
    }
    let (code, message) = refused(base).await;
    assert!(code == ErrorCode::BadRequest && message.contains("at most 100 schedules"), "{message}");
}

#[tokio::test]
async fn a_clock_that_was_ahead_neither_silences_a_schedule_nor_has_it_delete_what_is_new() {
    let (hand, cluster, _, mut agent) = night().await;
    let admin = cluster.admin();
    schedule(&cluster, "nightly", nightly(&["web1"], last(1))).await;
    hand.set(&cluster, "2028-01-10T03:00:00Z");
    let ahead = taken(&cluster, &mut agent, "nightly").await;
    hand.set(&cluster, "2027-01-11T02:00:00Z");
    let next = UnixMillis(millis("2027-01-11T03:00:00Z"));
    soon(async {
        while admin.schedule(&name("nightly")).await.expect("there").next != Some(next) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    hand.set(&cluster, "2027-01-11T03:00:00Z");
    let first = taken(&cluster, &mut agent, "nightly").await;
    hand.set(&cluster, "2027-01-12T03:00:00Z");
    let second = taken(&cluster, &mut agent, "nightly").await;
    deletes(&mut agent).await;
    gone(&cluster, &first).await;
    assert_eq!(names(&cluster).await, [ahead.to_string(), second.to_string()].into());
}

#[tokio::test]
async fn other_rules_delete_nothing_before_the_next_good_snapshot() {
    let (hand, cluster, _, mut agent) = night().await;
    let admin = cluster.admin();
    let made = schedule(&cluster, "nightly", nightly(&["web1"], last(2))).await;
    hand.set(&cluster, "2027-01-10T03:00:00Z");
    let needed = taken(&cluster, &mut agent, "nightly").await;
    let clone = api::SnapshotClone { name: name("web7"), host: None, start: false, memory: false, reason: None };
    cluster.ended(admin.clone_snapshot(&needed, &clone).await.expect("accepted").id).await;
    for day in ["11", "12"] {
        hand.set(&cluster, &format!("2027-01-{day}T03:00:00Z"));
        taken(&cluster, &mut agent, "nightly").await;
    }
    // One is to go, and cannot: it is tried again every ten minutes.
    let revision = admin.schedule(&name("nightly")).await.expect("there").revision;
    assert!(revision > made.revision);
    let fewer = api::ScheduleSet { spec: nightly(&["web1"], last(1)) };
    admin.set_schedule(&name("nightly"), &fewer, revision).await.expect("changed");
    for _ in 0..5 {
        hand.pass(&cluster, 10 * MINUTE);
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!((names(&cluster).await.len(), tasks(&cluster, "snapshot.delete").await.len()), (3, 0));
    hand.set(&cluster, "2027-01-13T03:00:00Z");
    let newest = taken(&cluster, &mut agent, "nightly").await;
    deletes(&mut agent).await;
    deletes(&mut agent).await;
    soon(async {
        while names(&cluster).await.len() > 2 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(names(&cluster).await, [needed.to_string(), newest.to_string()].into());
}
