//! Hosts over time: certificates that end, hosts that join again or are removed, keys that change, clocks that are off.

use std::time::Duration;

use godwit_api::v1 as api;
use godwit_link::status::refusal_of;
use godwit_link::v1::{self, agent_message::Body, command::Action, link_client::LinkClient};
use godwit_model::{ErrorCode, Generation, RunState, UnixMillis};

use super::support::*;
use crate::authority::{Authority, AuthorityFiles};
use crate::{AuthorityPlace, clock};

const DAY: u64 = 24 * 3_600_000;

fn ago(days: u64) -> UnixMillis {
    UnixMillis(clock::now().0 - days * DAY)
}

/// Says hello and hears the answer.
async fn attend(cluster: &Cluster, certificate: &str, key: &str) -> Result<(), ErrorCode> {
    // TLS 1.3 tells a client of a refusal only when it reads.
    let Ok(channel) = cluster.channel(Some((certificate, key))).await else { return Err(ErrorCode::CertificateRefused) };
    let mut client = LinkClient::new(channel);
    client.attend(tokio_stream::iter([])).await.map(|_| ()).map_err(|status| refusal_of(&status).code)
}

#[tokio::test]
async fn a_certificate_that_ended_is_good_for_a_new_one_and_nothing_else() {
    let mut authority = None;
    let cluster = Cluster::with(|options| {
        // This cluster is old: its intermediate was there when the certificates below were made.
        std::fs::create_dir(&options.data_dir).expect("data");
        let files = AuthorityFiles::new(&options.data_dir, None).expect("files");
        authority = Some(Authority::open(&files, &[], ago(250)).expect("authority"));
    })
    .await;
    let authority = authority.expect("made");
    let (host, agent) = cluster.agent("h1").await;
    drop(agent);
    let pem = rcgen::CertificateParams::new(vec![]).expect("params");
    let key = rcgen::KeyPair::from_pem(&host.key).expect("key");
    let request = pem.serialize_request(&key).expect("request").pem().expect("pem");
    let old = |days: u64| authority.sign_host(&host.name, &request, ago(30 + days)).expect("signed").certificate;
    let renew = async |certificate: &str, key: &str| {
        let Ok(channel) = cluster.channel(Some((certificate, key))).await else { return Err(ErrorCode::CertificateRefused) };
        let (fresh, signing_request) = signing_request();
        let renewed = LinkClient::new(channel).renew(v1::RenewRequest { signing_request }).await;
        renewed.map(|reply| (fresh, reply.into_inner().certificate)).map_err(|status| refusal_of(&status).code)
    };

    let ended = old(60);
    assert_eq!(attend(&cluster, &ended, &host.key).await, Err(ErrorCode::CertificateExpired));
    let channel = cluster.channel(Some((&ended, &host.key))).await.expect("channel");
    let image = uuid::Uuid::new_v4().to_string();
    let refused = LinkClient::new(channel.clone()).fetch_image(v1::FetchImageRequest { image }).await.expect_err("an image");
    assert_eq!(refusal_of(&refused).code, ErrorCode::CertificateExpired);
    let refused = LinkClient::new(channel).console(tokio_stream::iter([])).await.expect_err("a console");
    assert_eq!(refusal_of(&refused).code, ErrorCode::CertificateExpired);
    // A key that never spoke for the host proves nothing, and neither does one that ended too long ago.
    let (stranger, theirs) = signing_request();
    let forged = authority.sign_host(&host.name, &theirs, ago(40)).expect("signed").certificate;
    assert_eq!(renew(&forged, &stranger.serialize_pem()).await.err(), Some(ErrorCode::CertificateRefused));
    assert!(renew(&old(91), &host.key).await.is_err(), "the grace has no end");

    let (fresh, certificate) = renew(&ended, &host.key).await.expect("the way back");
    attend(&cluster, &certificate, &fresh.serialize_pem()).await.expect("a host as before");
    assert_eq!(attend(&cluster, &ended, &host.key).await, Err(ErrorCode::CertificateRefused), "the old key was used up");
}

#[tokio::test]
async fn a_removed_host_is_cut_off_and_refused_at_once_and_its_vms_start_nowhere_else() {
    let cluster = Cluster::new().await;
    let (h1, mut a1) = cluster.agent("h1").await;
    let (_h2, mut a2) = cluster.agent("h2").await;
    cluster.running_vm("web1", &mut a1).await;
    a2.fleet_when(|fleet| fleet.members.iter().filter(|member| member.keys.len() == 1).count() == 2).await;
    let refusal = cluster.admin().delete_host(&name("h1"), false).await.expect_err("it has a VM").refusal();
    assert_eq!(refusal.code, ErrorCode::InUse);
    assert!(refusal.message.contains("web1") && refusal.hint.expect("a fix").contains("not a dead host"));
    cluster.connected("h1", true).await;

    cluster.admin().delete_host(&name("h1"), true).await.expect("removed");
    while a1.next().await.is_some() {}
    assert_eq!(attend(&cluster, &h1.certificate, &h1.key).await, Err(ErrorCode::CertificateRefused));
    let refused =
        a1.client.renew(v1::RenewRequest { signing_request: signing_request().1 }).await.expect_err("over the old connection");
    assert_eq!(refusal_of(&refused).code, ErrorCode::CertificateRefused);
    // The other hosts hear of it: none of its keys is named any more.
    a2.fleet_when(|fleet| fleet.members.iter().all(|member| member.host != "h1")).await;

    let vm = cluster.vm("web1").await;
    assert_eq!((vm.status.state, vm.status.host.clone()), (RunState::Running, Some(name("h1"))), "it was taken for dead");
    let admin = cluster.admin();
    let start = api::VmStart { host: Some(name("h2")) };
    let started = admin.start_vm(&name("web1"), &start).await;
    assert!(started.is_err() || started.is_ok_and(|task| task.state == api::TaskState::Done), "it was started a second time");
    let kill = admin.kill_vm(&name("web1")).await.expect_err("nothing can be told to it").refusal();
    assert_eq!(kill.code, ErrorCode::HostDown);
    assert!(kill.hint.expect("a fix").contains("--rejoin"));
    assert_eq!(code(cluster.migrate("web1", "h2").await), ErrorCode::HostDown);
    assert_eq!(cluster.vm("web1").await.status, vm.status);

    // It comes back under its name with its journal, and goes on where it was.
    let again = cluster.host("h1").await;
    let a1 = cluster.connect(&again, vec![report(&vm, 1, RunState::Paused, v1::Holding::Owner)]).await;
    let seen = cluster.vm_when("web1", |vm| vm.status.state == RunState::Paused).await;
    assert_eq!((seen.status.host, seen.status.generation), (Some(name("h1")), Generation(1)));
    drop((a1, a2));
}

#[tokio::test]
async fn a_move_to_a_host_that_is_removed_is_cancelled() {
    let cluster = Cluster::new().await;
    let (_, mut a1) = cluster.agent("h1").await;
    let (_, mut a2) = cluster.agent("h2").await;
    cluster.running_vm("web1", &mut a1).await;
    let task = cluster.migrate("web1", "h2").await.expect("accepted");
    let prepare = a2.command().await;
    a2.done(&prepare, 7).await;
    let out = a1.command().await;
    a1.done(&out, 0).await;
    cluster.task_when(task.id, |task| task.step.contains("moves from")).await;
    assert_eq!(code(cluster.admin().delete_host(&name("h2"), false).await), ErrorCode::InUse);
    let client = cluster.admin();
    let removing = tokio::spawn(async move { client.delete_host(&name("h2"), true).await });
    // Both the request and the executor ask.
    for _ in 0..2 {
        let cancel = a1.command().await;
        assert!(matches!(cancel.action, Some(Action::Cancel(_))), "{cancel:?}");
        a1.done(&cancel, 0).await;
    }
    let vm = cluster.vm("web1").await;
    soon(removing).await.expect("asked").expect("removed");
    a1.send(Body::Ended(ended(&task, &vm, 2, true, Some(ErrorCode::Cancelled)))).await;
    assert_eq!(cluster.ended(task.id).await.state, api::TaskState::Cancelled);
    let vm = cluster.vm("web1").await;
    assert_eq!((vm.status.host, vm.status.state), (Some(name("h1")), RunState::Running));
}

#[tokio::test]
async fn a_host_joins_again_with_a_new_key_and_keeps_its_vms() {
    let cluster = Cluster::new().await;
    let (h1, mut a1) = cluster.agent("h1").await;
    cluster.running_vm("web1", &mut a1).await;
    let token = async |host: &str, rejoin| {
        let request = api::JoinTokenCreate { host: name(host), lifetime: None, rejoin };
        cluster.admin().create_join_token(&request).await
    };
    assert_eq!(code(token("h9", true).await), ErrorCode::NotFound, "a host that never was");
    let join = async |token: &str, request: &str| {
        let mut client = LinkClient::new(cluster.channel(None).await.expect("channel"));
        let address = address_of("h1");
        let join = v1::JoinRequest { token: token.into(), host: "h1".into(), address, signing_request: request.into() };
        client.join(join).await.map(tonic::Response::into_inner).map_err(|status| refusal_of(&status).code)
    };
    let (key, request) = signing_request();
    let plain = token("h1", false).await.expect("token").token;
    assert_eq!(join(&plain, &request).await, Err(ErrorCode::NameTaken), "it takes a token for that");
    let again = token("h1", true).await.expect("token").token;
    let reply = join(&again, &request).await.expect("joined again");
    while a1.next().await.is_some() {}
    assert_eq!(attend(&cluster, &h1.certificate, &h1.key).await, Err(ErrorCode::CertificateRefused), "the old key");
    join(&again, &request).await.expect("the same key may ask again: the answer may have got lost");
    assert_eq!(join(&again, &signing_request().1).await, Err(ErrorCode::TokenUsed));

    let fresh = Host {
        name: h1.name,
        key: key.serialize_pem(),
        certificate: reply.certificate,
        migration_address: String::new(),
        told: (0, String::new(), 0),
        members: vec![],
        facts: h1.facts,
        load: h1.load,
    };
    let vm = cluster.vm("web1").await;
    let agent = cluster.connect(&fresh, vec![report(&vm, 1, RunState::Running, v1::Holding::Owner)]).await;
    let seen = cluster.vm("web1").await;
    assert_eq!((seen.status.state, seen.status.host, seen.status.generation), (RunState::Running, Some(name("h1")), Generation(1)));
    drop(agent);
}

#[tokio::test]
async fn a_new_intermediate_is_taken_by_hosts_of_before_and_of_after() {
    let mut cluster = Cluster::new().await;
    let before = cluster.host("h1").await;
    cluster.stop().await;
    let data_dir = cluster.options.data_dir.clone();
    let place = AuthorityPlace { data_dir: &data_dir, secret: None };
    let out = cluster.dir.path().join("root.pem");
    place.export_root(&out).expect("exported");
    let old = place.show().expect("view");
    let new = place.rotate_intermediate(Some(&out)).expect("rotated");
    assert!(old.intermediate != new.intermediate && !new.root_key_here);
    cluster.start().await;
    assert!(matches!(place.rotate_intermediate(Some(&out)), Err(crate::ServeError::Locked { .. })), "under a running controller");
    let after = cluster.host("h2").await;
    for host in [&before, &after] {
        let agent = cluster.connect(host, vec![]).await;
        drop(agent);
    }
}

#[tokio::test]
async fn a_destination_cannot_claim_a_vm_whose_move_has_ended_without_it() {
    let cluster = Cluster::new().await;
    let (_, mut a1) = cluster.agent("h1").await;
    let (_, mut a2) = cluster.agent("h2").await;
    cluster.running_vm("web1", &mut a1).await;
    let task = cluster.migrate("web1", "h2").await.expect("accepted");
    let vm = cluster.vm("web1").await;
    let prepare = a2.command().await;
    a2.done(&prepare, 7).await;
    let out = a1.command().await;
    a1.done(&out, 0).await;
    a1.ended(ended(&task, &vm, 2, true, Some(ErrorCode::MigrationStalled))).await;
    // While the task still waits for it to clear up, and after.
    let claim = || Body::Ended(ended(&task, &vm, 2, false, None));
    a2.send(claim()).await;
    a2.ended(ended(&task, &vm, 2, false, Some(ErrorCode::MigrationStalled))).await;
    cluster.ended(task.id).await;
    a2.send(claim()).await;
    a2.send(Body::Vm(report(&vm, 2, RunState::Stopped, v1::Holding::Owner))).await;
    // Heard after all of that: the same stream carries it.
    a2.ended(ended(&task, &vm, 2, false, Some(ErrorCode::MigrationStalled))).await;
    let after = cluster.vm("web1").await;
    assert_eq!(
        (after.status.host.clone(), after.status.generation, after.status.state),
        (Some(name("h1")), Generation(1), RunState::Running)
    );
    // A source that has the VM back after it had released it has it.
    a1.send(Body::Vm(report(&vm, 1, RunState::Stopped, v1::Holding::Released))).await;
    a1.send(Body::Vm(report(&vm, 1, RunState::Running, v1::Holding::Owner))).await;
    a1.ended(ended(&task, &vm, 2, true, Some(ErrorCode::MigrationStalled))).await;
    a2.send(Body::Vm(report(&vm, 2, RunState::Crashed, v1::Holding::Owner))).await;
    a2.ended(ended(&task, &vm, 2, false, Some(ErrorCode::MigrationStalled))).await;
    assert_eq!(cluster.vm("web1").await.status.host, Some(name("h1")));
    // Once the source says that it has released it, the word counts: whatever became of the task.
    a1.send(Body::Vm(report(&vm, 1, RunState::Stopped, v1::Holding::Released))).await;
    let image = cluster.admin().image(&name("linux")).await.expect("image").id.to_string();
    let _ = a1.client.fetch_image(v1::FetchImageRequest { image }).await;
    soon(async {
        loop {
            a2.send(Body::Vm(report(&vm, 2, RunState::Paused, v1::Holding::Owner))).await;
            if cluster.vm("web1").await.status.host == Some(name("h2")) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_host_gets_no_image_of_a_vm_that_only_stopped_there() {
    let cluster = Cluster::new().await;
    let (_, mut a1) = cluster.agent("h1").await;
    cluster.running_vm("web1", &mut a1).await;
    let vm = cluster.vm("web1").await;
    let image = cluster.admin().image(&name("linux")).await.expect("image").id.to_string();
    a1.client.fetch_image(v1::FetchImageRequest { image: image.clone() }).await.expect("while it runs");
    a1.send(Body::Vm(report(&vm, 1, RunState::Stopped, v1::Holding::Owner))).await;
    cluster.vm_when("web1", |vm| vm.status.state == RunState::Stopped).await;
    let refused = a1.client.fetch_image(v1::FetchImageRequest { image }).await.expect_err("not any more");
    assert_eq!(refusal_of(&refused).code, ErrorCode::NotGranted);
}

#[tokio::test]
async fn no_host_ends_anothers_session_by_talking() {
    let cluster = Cluster::new().await;
    let (_, mut a1) = cluster.agent("h1").await;
    let (_, mut a2) = cluster.agent("h2").await;
    cluster.running_vm("web1", &mut a1).await;
    let task = cluster.migrate("web1", "h2").await.expect("accepted");
    let prepare = a2.command().await;
    let peer = |message| Body::Peer(v1::Peer { task: task.id.to_string(), host: "h2".into(), message });
    a1.send(peer(vec![0; 65 << 10])).await;
    // More than its queue holds, while it does not read.
    for _ in 0..2_000 {
        a1.send(peer(vec![0; 1_024])).await;
    }
    a1.send(peer(b"last".to_vec())).await;
    cluster.connected("h2", true).await;
    a2.done(&prepare, 7).await;
    let out = a1.command().await;
    assert!(matches!(out.action, Some(Action::Migrate(_))), "{out:?}");
    assert!(a2.peer().await.message.len() < 65 << 10, "a message longer than any was passed on");
}

#[tokio::test]
async fn a_clock_that_is_off_is_a_condition_of_the_host() {
    let cluster = Cluster::new().await;
    let (host, agent) = cluster.agent("h1").await;
    let skewed = async || {
        let facts = cluster.admin().host(&name("h1")).await.expect("host").facts.expect("connected");
        facts.conditions.into_iter().find(|condition| condition.name == "clock_skew")
    };
    assert_eq!(skewed().await, None);
    agent.heartbeat_task().abort();
    let load = godwit_link::encode(&host.load);
    let beat = |unix_ms| Body::Heartbeat(v1::Heartbeat { load: load.clone(), unix_ms });
    for (off, words) in [(-60_000_i64, "60 s behind"), (60_000, "60 s ahead of")] {
        let off = clock::now().0.saturating_add_signed(off);
        agent.send(beat(off)).await;
        let condition = soon(async {
            loop {
                if let Some(condition) = skewed().await.filter(|condition| condition.message.contains(words)) {
                    return condition;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        assert!(condition.fix.contains("NTP"), "{condition:?}");
    }
    agent.send(beat(clock::now().0)).await;
    soon(async {
        while skewed().await.is_some() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let mut nobody = LinkClient::new(cluster.channel(None).await.expect("channel"));
    let told = nobody.clock(v1::ClockRequest {}).await.expect("anybody may ask").into_inner().unix_ms;
    assert!(told.abs_diff(clock::now().0) < 60_000);
}
