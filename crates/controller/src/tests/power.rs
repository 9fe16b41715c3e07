//! Start, stop, kill, pause, unpause, delete, and what a VM is started with.

use godwit_api::client::Imported;
use godwit_api::v1::{self as api, TaskState};
use godwit_link::decode;
use godwit_link::v1::{self, agent_message::Body, command::Action};
use godwit_model::{Bytes, ErrorCode, ImportFormat, Millis, ResolvedSpec, RunState};

use super::support::*;

#[tokio::test]
async fn a_vm_starts_stands_still_runs_on_and_ends() {
    let cluster = Cluster::new().await;
    let (_, mut agent) = cluster.agent("h1").await;
    cluster.create_vm("web1", Bytes::mib(512)).await;
    let task = cluster.admin().start_vm(&name("web1"), &api::VmStart::default()).await.expect("accepted");
    let start = agent.command().await;
    let Some(Action::Start(body)) = &start.action else { panic!("{start:?}") };
    let spec: ResolvedSpec = decode("spec", &body.spec).expect("spec");
    assert_eq!((spec.machine.as_str(), spec.cpu.as_str()), ("pc-q35-10.0", "qemu64-v1"));
    assert_eq!(spec.kernel.as_ref().expect("kernel").digest, blake3::hash(&kernel()).to_hex().to_string());
    agent.done(&start, 0).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
    agent.fleet_when(|fleet| fleet.locations.iter().any(|location| location.mac == spec.nics[0].mac.to_string())).await;
    assert_eq!(cluster.vm("web1").await.status.started.expect("started").machine, "pc-q35-10.0");

    let again = cluster.admin().start_vm(&name("web1"), &api::VmStart::default()).await.expect("it runs already");
    assert_eq!(again.state, TaskState::Done);
    for (verb, state) in [("pause", RunState::Paused), ("unpause", RunState::Running)] {
        let admin = cluster.admin();
        let vm = name("web1");
        let task = if verb == "pause" { admin.pause_vm(&vm).await } else { admin.unpause_vm(&vm).await }.expect("accepted");
        let command = agent.command().await;
        agent.done(&command, 0).await;
        assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
        assert_eq!(cluster.vm("web1").await.status.state, state);
    }
    let delete = api::VmDelete { volumes: false };
    assert_eq!(code(cluster.admin().delete_vm(&name("web1"), &delete).await), ErrorCode::VmRunning);

    let task = cluster.admin().stop_vm(&name("web1"), &api::VmStop { timeout: None }).await.expect("accepted");
    let stop = agent.command().await;
    agent.done(&stop, 0).await;
    let vm = cluster.vm("web1").await;
    agent.send(Body::Vm(report(&vm, 1, RunState::Stopped, v1::Holding::Owner))).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);

    let task = cluster.admin().delete_vm(&name("web1"), &delete).await.expect("accepted");
    let forget = agent.command().await;
    assert!(matches!(forget.action, Some(Action::Forget(_))), "{forget:?}");
    agent.done(&forget, 0).await;
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
    assert_eq!(code(cluster.admin().vm(&name("web1")).await), ErrorCode::NotFound);
    cluster.create_vm("web1", Bytes::mib(512)).await;
}

#[tokio::test]
async fn a_guest_that_does_not_listen_is_killed_only_by_request() {
    let cluster = Cluster::new().await;
    let (_, mut agent) = cluster.agent("h1").await;
    cluster.running_vm("web1", &mut agent).await;
    let admin = cluster.admin();
    let task = admin.stop_vm(&name("web1"), &api::VmStop { timeout: Some(Millis(1)) }).await.expect("accepted");
    let stop = agent.command().await;
    agent.done(&stop, 0).await;
    let ended = cluster.ended(task.id).await;
    assert_eq!((ended.state, ended.error.expect("why").code), (TaskState::Failed, ErrorCode::VmRunning));
    assert_eq!(cluster.vm("web1").await.status.state, RunState::Running);
    // A kill cuts a stop short.
    let stopping = admin.stop_vm(&name("web1"), &api::VmStop { timeout: None }).await.expect("accepted");
    let stop = agent.command().await;
    agent.done(&stop, 0).await;
    let killing = admin.kill_vm(&name("web1")).await.expect("accepted");
    let kill = agent.command().await;
    assert!(matches!(kill.action, Some(Action::Kill(_))), "{kill:?}");
    agent.done(&kill, 0).await;
    assert_eq!(cluster.ended(killing.id).await.state, TaskState::Done);
    assert_eq!(cluster.ended(stopping.id).await.state, TaskState::Cancelled);
    assert_eq!(cluster.vm("web1").await.status.state, RunState::Stopped);
}

#[tokio::test]
async fn a_start_that_fails_says_why_and_can_be_repeated() {
    let cluster = Cluster::new().await;
    cluster.create_vm("web1", Bytes::mib(512)).await;
    let start = api::VmStart::default();
    assert_eq!(code(cluster.admin().start_vm(&name("web1"), &start).await), ErrorCode::NoHost);
    let (_, mut agent) = cluster.agent("h1").await;
    let task = cluster.admin().start_vm(&name("web1"), &start).await.expect("accepted");
    let command = agent.command().await;
    agent.refuse(&command, ErrorCode::VolumeTruncated).await;
    let task = cluster.ended(task.id).await;
    assert_eq!((task.state, task.error.expect("why").code), (TaskState::Failed, ErrorCode::VolumeTruncated));
    cluster.running_again("web1", &mut agent).await;
    let vm = cluster.vm("web1").await;
    assert_eq!(vm.status.generation.0, 2, "a number was used twice");
    let crash = v1::VmReport { detail: "signal 9\u{1b}[2J".into(), ..report(&vm, 2, RunState::Crashed, v1::Holding::Owner) };
    agent.send(Body::Vm(crash)).await;
    let vm = cluster.vm_when("web1", |vm| vm.status.state == RunState::Crashed).await;
    assert!(vm.status.conditions.iter().any(|condition| condition.message.contains("signal 9[2J")), "{:?}", vm.status.conditions);
}

impl Cluster {
    async fn running_again(&self, vm: &str, agent: &mut Agent) {
        let task = self.admin().start_vm(&name(vm), &api::VmStart::default()).await.expect("accepted");
        let command = agent.command().await;
        agent.done(&command, 0).await;
        assert_eq!(self.ended(task.id).await.state, TaskState::Done);
    }
}

#[tokio::test]
async fn what_changed_meanwhile_is_not_changed_blindly() {
    let cluster = Cluster::new().await;
    let (_, mut agent) = cluster.agent("h1").await;
    cluster.create_vm("web1", Bytes::mib(512)).await;
    let revision = cluster.vm("web1").await.revision;
    cluster.running_again("web1", &mut agent).await;
    let pause =
        |revision: String| cluster.admin().request(reqwest::Method::POST, "/vms/web1/pause").header("if-match", revision).send();
    let stale = pause(revision.to_string()).await.expect("answer");
    assert_eq!(stale.status(), 409);
    assert_eq!(pause("x".into()).await.expect("answer").status(), 400);
    let now = cluster.vm("web1").await.revision;
    assert_eq!(pause(format!("\"{now}\"")).await.expect("answer").status(), 202);
}

#[tokio::test]
async fn an_image_is_taken_whole_and_valid_or_not_at_all() {
    let cluster = Cluster::with(|options| options.image_limit = Bytes(8_192)).await;
    let admin = cluster.admin();
    let import = async |image: &str, kind, content: Vec<u8>| {
        admin.import_image(&name(image), kind, futures::stream::iter([Ok(content.into())])).await
    };
    let stored = || std::fs::read_dir(cluster.options.data_dir.join("images")).expect("dir").count();
    assert_eq!(code(import("bad", ImportFormat::Kernel, b"text".to_vec()).await), ErrorCode::ImageInvalid);
    assert_eq!(code(import("bad", ImportFormat::Qcow2, vec![0; 512]).await), ErrorCode::ImageInvalid);
    assert_eq!(code(import("big", ImportFormat::Raw, vec![0; 9_216]).await), ErrorCode::BodyTooLarge);
    assert_eq!(stored(), 0, "something was left behind");
    let imported = import("linux", ImportFormat::Kernel, kernel()).await.expect("imported");
    let Imported::Image(image) = imported else { panic!("{imported:?}") };
    assert_eq!(image.digest, blake3::hash(&kernel()).to_hex().to_string());
    assert_eq!(code(import("linux", ImportFormat::Kernel, kernel()).await), ErrorCode::NameTaken);
    cluster.create_vm("web1", Bytes::mib(64)).await;
    assert_eq!(code(admin.delete_image(&name("linux")).await), ErrorCode::InUse);
    let task = admin.delete_vm(&name("web1"), &api::VmDelete { volumes: false }).await.expect("accepted");
    assert_eq!(cluster.ended(task.id).await.state, TaskState::Done);
    admin.delete_image(&name("linux")).await.expect("deleted");
    assert_eq!(stored(), 0);
    assert_eq!(code(admin.image(&name("linux")).await), ErrorCode::NotFound);
}

#[tokio::test]
async fn a_console_has_one_user_at_a_time() {
    let cluster = Cluster::new().await;
    let (_, mut agent) = cluster.agent("h1").await;
    cluster.running_vm("web1", &mut agent).await;
    let (admin, second) = (cluster.admin(), cluster.admin());
    let opening = tokio::spawn(async move { admin.console(&name("web1")).await });
    let command = agent.command().await;
    let Some(Action::Console(open)) = &command.action else { panic!("{command:?}") };
    let (to_user, typed) = tokio::sync::mpsc::channel(8);
    let first = v1::ConsoleChunk { session: open.session.clone(), data: b"login: ".to_vec() };
    to_user.send(first).await.expect("queue");
    let mut from_user =
        agent.client.console(tokio_stream::wrappers::ReceiverStream::new(typed)).await.expect("stream").into_inner();
    agent.done(&command, 0).await;
    let mut console = opening.await.expect("task").map_err(|error| error.refusal()).expect("open");
    assert_eq!(soon(console.receive()).await.as_deref(), Some(b"login: ".as_slice()));
    assert!(console.send(b"root\n".to_vec().into()).await);
    assert_eq!(soon(from_user.message()).await.expect("stream").expect("chunk").data, b"root\n");
    let refused = second.console(&name("web1")).await.map(|_| ()).map_err(|error| error.refusal().code);
    assert_eq!(refused, Err(ErrorCode::InUse));
    drop(to_user);
    assert_eq!(soon(console.receive()).await, None);
}
