//! Programs in guests, and what guests say of themselves.

use futures::StreamExt;
use godwit_api::client::{Client, ClientError};
use godwit_api::v1::{self as api, Role, TaskState};
use godwit_link::v1::{self, agent_message::Body, command::Action};
use godwit_link::{decode, encode};
use godwit_model::guest::GuestInterface;
use godwit_model::{
    Bytes, CloudInit, ErrorCode, ExecOutcome, ExecRequest, GuestFacts, Millis, Octets, ResolvedSpec, Retry, UnixMillis,
};

use super::support::*;

fn program(args: &[&str], timeout: u64) -> api::VmExec {
    let args = args.iter().map(ToString::to_string).collect();
    api::VmExec { program: "/bin/login".into(), args, stdin: Some(Octets(b"hunter2".to_vec())), timeout: Some(Millis(timeout)) }
}

fn outcome(code: i32) -> ExecOutcome {
    let (stdout, stderr) = (Octets(b"out".to_vec()), Octets(b"err".to_vec()));
    ExecOutcome { exit_code: Some(code), signal: None, stdout, stderr, stdout_truncated: true, stderr_truncated: false }
}

fn begin(client: Client, request: api::VmExec) -> tokio::task::JoinHandle<Result<ExecOutcome, ClientError>> {
    tokio::spawn(async move { client.exec_vm(&name("web1"), &request).await })
}

async fn record(cluster: &Cluster) -> api::Task {
    let tasks = cluster.admin().tasks().await.expect("tasks");
    tasks.into_iter().find(|task| task.kind == "vm.exec").expect("a record")
}

#[tokio::test]
async fn a_program_is_recorded_begun_once_and_followed_to_its_end() {
    let cluster = Cluster::new().await;
    let (host, mut agent) = cluster.agent("h1").await;
    cluster.running_vm("web1", &mut agent).await;
    let asked = begin(cluster.admin(), program(&["s3cret"], 60_000));
    let command = agent.command().await;
    let Some(Action::Exec(exec)) = &command.action else { panic!("{command:?}") };
    let request: ExecRequest = decode("request", &exec.request).expect("a request");
    assert_eq!((request.program.as_str(), request.args.as_slice(), exec.generation), ("/bin/login", &["s3cret".to_owned()][..], 1));
    assert_eq!(request.stdin, Some(Octets(b"hunter2".to_vec())));
    let begun = record(&cluster).await;
    assert_eq!((begun.state, begun.subject.as_str(), begun.cancellable), (TaskState::Running, "web1", false));
    agent.tell(&command, &77_i64).await;

    let status = agent.command().await;
    assert!(matches!(&status.action, Some(Action::ExecStatus(status)) if status.pid == 77), "{status:?}");
    agent.tell(&status, &None::<ExecOutcome>).await;
    // Refusals that pass are asked again: the VM may be on its way to another host.
    for code in [ErrorCode::VmBusy, ErrorCode::VmNotRunning, ErrorCode::GuestSilent, ErrorCode::NotFound] {
        let status = agent.command().await;
        agent.refuse(&status, code).await;
    }
    // So is a host that was away.
    let status = agent.command().await;
    assert!(matches!(status.action, Some(Action::ExecStatus(_))), "{status:?}");
    let vm = cluster.vm("web1").await;
    drop(agent);
    let mut agent = cluster.connect(&host, vec![report(&vm, 1, godwit_model::RunState::Running, v1::Holding::Owner)]).await;
    let status = agent.command().await;
    agent.tell(&status, &Some(outcome(3))).await;
    assert_eq!(soon(asked).await.expect("no panic").expect("an outcome"), outcome(3));

    let ended = record(&cluster).await;
    assert_eq!((ended.state, ended.id), (TaskState::Done, begun.id));
    let text = serde_json::to_string(&ended).expect("JSON");
    assert!(text.contains("/bin/login") && text.contains("exit code 3") && ended.principal.starts_with("token "), "{text}");
    let store =
        ["store.db", "store.db-wal"].map(|file| std::fs::read(cluster.options.data_dir.join(file)).unwrap_or_default()).concat();
    let store = String::from_utf8_lossy(&store);
    assert!(store.contains("/bin/login"), "the record is not where it is looked for");
    for secret in ["s3cret", "hunter2", "aHVudGVyMg", "b3V0", "ZXJy"] {
        assert!(!text.contains(secret) && !store.contains(secret), "{secret} is on record: {text}");
    }
}

#[tokio::test]
async fn a_program_that_is_not_seen_to_end_is_said_to_go_on() {
    let cluster = Cluster::new().await;
    let (_, mut agent) = cluster.agent("h1").await;
    cluster.running_vm("web1", &mut agent).await;
    let asked = begin(cluster.admin(), program(&[], 300));
    let command = agent.command().await;
    agent.tell(&command, &5_i64).await;
    let answering = async {
        loop {
            let status = agent.command().await;
            agent.tell(&status, &None::<ExecOutcome>).await;
        }
    };
    let refusal = tokio::select! {
        asked = soon(asked) => asked.expect("no panic").expect_err("it did not end").refusal(),
        () = answering => unreachable!("it answers for ever"),
    };
    assert_eq!((refusal.code, refusal.retry), (ErrorCode::ExecUnfinished, Retry::Unknown));
    assert_eq!(record(&cluster).await.error.expect("why").code, ErrorCode::ExecUnfinished);
}

#[tokio::test]
async fn a_program_is_not_begun_where_it_may_not_be_and_a_guests_refusal_is_the_answer() {
    let cluster = Cluster::new().await;
    let (_, mut agent) = cluster.agent("h1").await;
    cluster.create_vm("web1", Bytes::mib(512)).await;
    let admin = cluster.admin();
    assert_eq!(code(admin.exec_vm(&name("web1"), &program(&[], 1_000)).await), ErrorCode::VmNotRunning);
    cluster.start_vm("web1", &mut agent).await;
    let viewer = cluster.member("default", Role::Viewer).await;
    assert_eq!(code(viewer.exec_vm(&name("web1"), &program(&[], 1_000)).await), ErrorCode::NotPermitted);
    for bad in [api::VmExec { program: String::new(), ..program(&[], 1_000) }, program(&["\0"], 1_000), program(&[], u64::MAX)] {
        assert_eq!(code(admin.exec_vm(&name("web1"), &bad).await), ErrorCode::BadRequest);
    }
    assert!(!admin.tasks().await.expect("tasks").iter().any(|task| task.kind == "vm.exec"), "something was begun");

    let asked = begin(cluster.admin(), program(&[], 10_000));
    let command = agent.command().await;
    agent.refuse(&command, ErrorCode::GuestRefused).await;
    assert_eq!(code(soon(asked).await.expect("no panic")), ErrorCode::GuestRefused);
    // The guest's agent does not know the program any more: its end is lost, and that is said.
    let asked = begin(cluster.admin(), program(&[], 10_000));
    let command = agent.command().await;
    agent.tell(&command, &5_i64).await;
    let status = agent.command().await;
    agent.refuse(&status, ErrorCode::GuestRefused).await;
    let refusal = soon(asked).await.expect("no panic").expect_err("lost").refusal();
    assert_eq!((refusal.code, refusal.retry), (ErrorCode::GuestRefused, Retry::Unknown));

    // While a task works on the VM nothing is begun.
    admin.pause_vm(&name("web1")).await.expect("accepted");
    assert_eq!(code(admin.exec_vm(&name("web1"), &program(&[], 1_000)).await), ErrorCode::VmBusy);
}

#[tokio::test]
async fn too_many_programs_at_once_are_refused() {
    let cluster = Cluster::new().await;
    let (_, mut agent) = cluster.agent("h1").await;
    cluster.running_vm("web1", &mut agent).await;
    let mut asked = Vec::new();
    for _ in 0..8 {
        asked.push(begin(cluster.admin(), program(&[], 60_000)));
    }
    let mut commands = Vec::new();
    for _ in 0..8 {
        commands.push(agent.command().await);
    }
    assert_eq!(code(cluster.admin().exec_vm(&name("web1"), &program(&[], 1_000)).await), ErrorCode::VmBusy);
    for command in &commands {
        agent.refuse(command, ErrorCode::GuestRefused).await;
    }
    for asked in asked {
        assert_eq!(code(soon(asked).await.expect("no panic")), ErrorCode::GuestRefused);
    }
    let again = begin(cluster.admin(), program(&[], 60_000));
    let command = agent.command().await;
    agent.refuse(&command, ErrorCode::GuestRefused).await;
    assert_eq!(code(soon(again).await.expect("no panic")), ErrorCode::GuestRefused);
}

#[tokio::test]
async fn a_program_that_an_earlier_controller_waited_for_is_ended_on_record() {
    let mut cluster = Cluster::new().await;
    let (_, mut agent) = cluster.agent("h1").await;
    cluster.running_vm("web1", &mut agent).await;
    let asked = begin(cluster.admin(), program(&[], 60_000));
    let command = agent.command().await;
    agent.tell(&command, &5_i64).await;
    agent.command().await;
    cluster.stop().await;
    assert!(soon(asked).await.expect("no panic").is_err());
    cluster.start().await;
    let id = record(&cluster).await.id;
    let ended = cluster.ended(id).await;
    assert_eq!((ended.state, ended.error.expect("why").code), (TaskState::Failed, ErrorCode::ExecUnfinished));
}

#[tokio::test]
async fn what_a_guest_says_is_shown_bounded_and_only_through_a_host_that_has_it() {
    let cluster = Cluster::new().await;
    let (host, mut agent) = cluster.agent("h1").await;
    let (_, other) = cluster.agent("h2").await;
    cluster.running_vm("web1", &mut agent).await;
    let vm = cluster.vm("web1").await;
    assert_eq!(vm.status.guest, None);
    let facts = |host_name: &str| {
        let interface =
            GuestInterface { name: "eth0\u{1b}".into(), mac: None, addresses: vec!["10.0.0.5/24".parse().expect("one")] };
        let interfaces = vec![interface; 100];
        GuestFacts { agent: "10".into(), host_name: Some(host_name.into()), os: None, interfaces, clock: None, seen: UnixMillis(7) }
    };
    let say = |facts: Option<&GuestFacts>| {
        Body::Guest(v1::GuestReport { vm: vm.id.to_string(), facts: facts.map(encode).unwrap_or_default() })
    };
    other.send(say(Some(&facts("liar")))).await;
    other.send(Body::Guest(v1::GuestReport { vm: vm.id.to_string(), facts: b"{\"agent\": 7}".to_vec() })).await;
    agent.send(say(Some(&facts(&"n".repeat(5_000))))).await;
    let shown = cluster.vm_when("web1", |vm| vm.status.guest.is_some()).await.status.guest.expect("facts");
    assert_eq!((shown.host_name.as_deref().map(str::len), shown.interfaces.len()), (Some(120), 32));
    assert_eq!(shown.interfaces[0].name, "eth0");
    agent.send(say(None)).await;
    cluster.vm_when("web1", |vm| vm.status.guest.is_none()).await;
    // What was said before a new session counts no more: the host says it anew.
    agent.send(say(Some(&facts("web1")))).await;
    cluster.vm_when("web1", |vm| vm.status.guest.is_some()).await;
    let again = cluster.connect(&host, vec![report(&vm, 1, godwit_model::RunState::Running, v1::Holding::Owner)]).await;
    cluster.vm_when("web1", |vm| vm.status.guest.is_none()).await;
    drop((agent, again, other));
}

#[tokio::test]
async fn what_cloud_init_tells_a_guest_is_told_to_its_host_and_shown_to_nobody() {
    let cluster = Cluster::new().await;
    let (_, mut agent) = cluster.agent("h1").await;
    cluster.create_vm("web0", Bytes::mib(64)).await;
    let admin = cluster.admin();
    let mut events = Box::pin(admin.events(Some(0)).await.expect("events"));
    let secret = "#cloud-config\npassword: hunter2\n";
    let mut spec = spec(Bytes::mib(64));
    let user_data = Some(secret.to_owned());
    let seed = CloudInit {
        user_data,
        vendor_data: Some(secret.into()),
        network_config: Some(secret.into()),
        host_name: Some(name("inside")),
    };
    spec.cloud_init = Some(seed.clone());
    let created = admin.create_vm(&api::VmCreate { name: name("web1"), spec, golden: None }).await.expect("created");
    let shown = created.status.cloud_init.clone().expect("it has a seed");
    assert_eq!(shown.user_data, Some(Bytes(secret.len() as u64)));
    assert_eq!(created.spec.cloud_init.as_ref().and_then(|seed| seed.host_name.clone()), Some(name("inside")));
    admin.start_vm(&name("web1"), &api::VmStart { host: Some(agent.host.clone()) }).await.expect("accepted");
    let command = agent.command().await;
    let Some(Action::Start(start)) = &command.action else { panic!("{command:?}") };
    let resolved: ResolvedSpec = decode("spec", &start.spec).expect("a spec");
    assert_eq!(resolved.cloud_init, Some(seed));
    agent.done(&command, 0).await;
    let running = cluster.vm_when("web1", |vm| vm.status.state == godwit_model::RunState::Running).await;

    let mut told = format!("{created:?} {running:?}");
    told += &serde_json::to_string(&(&created, &running, admin.vms().await.expect("vms"), admin.tasks().await.expect("tasks")))
        .expect("JSON");
    let mut seen = 0;
    while seen < 3 {
        let event = soon(events.next()).await.expect("more").expect("an event");
        seen += usize::from(event.name == "web1");
        told += &serde_json::to_string(&event).expect("JSON");
    }
    assert!(told.contains("inside") && !told.contains("hunter2"), "{told}");
}
