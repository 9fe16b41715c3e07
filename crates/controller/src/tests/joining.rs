//! How hosts join, who they are afterwards, and what they may speak about.

use godwit_api::v1 as api;
use godwit_link::status::refusal_of;
use godwit_link::v1::{self, agent_message::Body, link_client::LinkClient};
use godwit_model::{ErrorCode, Millis, RunState};

use super::support::*;

async fn join(cluster: &Cluster, token: &str, host: &str, request: &str) -> Result<v1::JoinReply, ErrorCode> {
    let mut client = LinkClient::new(cluster.channel(None).await.expect("channel"));
    let join =
        v1::JoinRequest { token: token.into(), host: host.into(), address: "10.0.0.1".into(), signing_request: request.into() };
    client.join(join).await.map(tonic::Response::into_inner).map_err(|status| {
        let refusal = refusal_of(&status);
        assert!(refusal.hint.is_some() || refusal.code == ErrorCode::BadRequest, "no fix: {refusal}");
        refusal.code
    })
}

#[tokio::test]
async fn a_join_token_is_good_once_in_time_and_for_its_host() {
    let cluster = Cluster::new().await;
    let (_, request) = signing_request();
    let token = cluster.join_token("h1").await;
    assert_eq!(join(&cluster, "gwj.nonsense", "h1", &request).await, Err(ErrorCode::TokenInvalid));
    assert_eq!(join(&cluster, &token, "h2", &request).await, Err(ErrorCode::TokenInvalid));
    assert_eq!(join(&cluster, &token, "../h1", &request).await, Err(ErrorCode::NameInvalid));
    assert_eq!(join(&cluster, &token, "h1", "no request").await, Err(ErrorCode::BadRequest));
    let forged = token
        .split('.')
        .take(2)
        .chain(["ab".repeat(32).as_str(), token.rsplit('.').next().expect("authority")])
        .collect::<Vec<_>>()
        .join(".");
    assert_eq!(join(&cluster, &forged, "h1", &request).await, Err(ErrorCode::TokenInvalid));
    join(&cluster, &token, "h1", &request).await.expect("joined");
    join(&cluster, &token, "h1", &request).await.expect("the same key may ask again: the answer may have got lost");
    let (_, other) = signing_request();
    assert_eq!(join(&cluster, &token, "h1", &other).await, Err(ErrorCode::TokenUsed));
    let second = cluster.join_token("h1").await;
    assert_eq!(join(&cluster, &second, "h1", &other).await, Err(ErrorCode::NameTaken));
    let expired = cluster
        .admin()
        .create_join_token(&api::JoinTokenCreate { host: name("h3"), lifetime: Some(Millis(0)), rejoin: false })
        .await
        .expect("token");
    assert_eq!(join(&cluster, &expired.token, "h3", &request).await, Err(ErrorCode::TokenExpired));
    let forever = api::JoinTokenCreate { host: name("h3"), lifetime: Some(Millis(25 * 3_600_000)), rejoin: false };
    assert_eq!(code(cluster.admin().create_join_token(&forever).await), ErrorCode::BadRequest);
    cluster.admin().delete_host(&name("h1"), false).await.expect("removed");
    join(&cluster, &second, "h1", &other).await.expect("the name is free again");
}

#[tokio::test]
async fn a_certificate_of_another_authority_or_of_a_removed_host_is_refused() {
    let cluster = Cluster::new().await;
    let stranger = Cluster::new().await;
    let host = stranger.host("h1").await;
    let attend = async |host: &Host| {
        let channel = cluster.channel(Some((&host.certificate, &host.key))).await.map_err(|_| ErrorCode::CertificateRefused)?;
        let mut client = LinkClient::new(channel);
        client.attend(tokio_stream::iter([])).await.map(|_| ()).map_err(|status| refusal_of(&status).code)
    };
    assert!(attend(&host).await.is_err(), "a foreign authority was accepted");
    assert!(cluster.channel_by(&stranger.read("ca.pem"), None).await.is_err(), "the agent took a foreign controller for its own");
    let own = cluster.host("h1").await;
    attend(&own).await.expect("its own");
    cluster.connected("h1", false).await;
    cluster.admin().delete_host(&name("h1"), false).await.expect("removed");
    assert_eq!(attend(&own).await, Err(ErrorCode::CertificateRefused));
    let mut nobody = LinkClient::new(cluster.channel(None).await.expect("channel"));
    let refused = nobody.renew(v1::RenewRequest { signing_request: signing_request().1 }).await.expect_err("no certificate");
    assert_eq!(refusal_of(&refused).code, ErrorCode::CertificateRefused);
}

#[tokio::test]
async fn a_renewed_key_replaces_the_old_one_once_it_is_used() {
    let cluster = Cluster::new().await;
    let (old, mut agent) = cluster.agent("h1").await;
    let (key, request) = signing_request();
    let renewed = agent.client.renew(v1::RenewRequest { signing_request: request }).await.expect("renewed").into_inner();
    drop(agent);
    let again = cluster.connect(&old, vec![]).await;
    drop(again);
    let fresh = Host { key: key.serialize_pem(), certificate: renewed.certificate, ..cluster_host(&old) };
    let agent = cluster.connect(&fresh, vec![]).await;
    let channel = cluster.channel(Some((&old.certificate, &old.key))).await.expect("channel");
    let refused = LinkClient::new(channel).attend(tokio_stream::iter([])).await.expect_err("the old key");
    assert_eq!(refusal_of(&refused).code, ErrorCode::CertificateRefused);
    drop(agent);
}

fn cluster_host(host: &Host) -> Host {
    Host {
        name: host.name.clone(),
        key: host.key.clone(),
        certificate: host.certificate.clone(),
        facts: host.facts.clone(),
        load: host.load.clone(),
        migration_address: host.migration_address.clone(),
        told: (0, String::new(), 0),
        members: vec![],
    }
}

#[tokio::test]
async fn a_host_may_speak_only_about_vms_granted_to_it() {
    let cluster = Cluster::new().await;
    let (_h1, mut a1) = cluster.agent("h1").await;
    let (_h2, mut a2) = cluster.agent("h2").await;
    cluster.running_vm("web1", &mut a1).await;
    let vm = cluster.vm("web1").await;
    // About another host's VM, and about a generation that nobody was granted.
    a2.send(Body::Vm(report(&vm, 1, RunState::Crashed, v1::Holding::Owner))).await;
    a1.send(Body::Vm(report(&vm, 9, RunState::Crashed, v1::Holding::Owner))).await;
    let image = cluster.admin().image(&name("linux")).await.expect("image").id.to_string();
    let refused = a2.client.fetch_image(v1::FetchImageRequest { image: image.clone() }).await.expect_err("not granted");
    assert_eq!(refusal_of(&refused).code, ErrorCode::NotGranted);
    let mut content = a1.client.fetch_image(v1::FetchImageRequest { image }).await.expect("granted").into_inner();
    let mut bytes = Vec::new();
    while let Some(chunk) = content.message().await.expect("stream") {
        bytes.extend(chunk.data);
    }
    assert_eq!(bytes, kernel());
    // What was said before has been heard by now: the same streams carry what follows.
    a1.send(Body::Vm(report(&vm, 1, RunState::Paused, v1::Holding::Owner))).await;
    let seen = cluster.vm_when("web1", |vm| vm.status.state != RunState::Running).await;
    assert_eq!((seen.status.state, seen.status.host.clone()), (RunState::Paused, Some(name("h1"))));
    let task = cluster.admin().tasks().await.expect("tasks").first().expect("the start").id.to_string();
    a2.send(Body::Peer(v1::Peer { task: task.clone(), host: "h1".into(), message: vec![1] })).await;
    a2.ended_is_not_acknowledged(&vm, task).await;
    assert_eq!(cluster.vm("web1").await.status, seen.status);
}

impl Agent {
    /// Claims a move that never was; a fleet or nothing comes back, and the VM stays where it is.
    async fn ended_is_not_acknowledged(&mut self, vm: &api::Vm, task: String) {
        let claim = v1::MigrationEnded { task, vm: vm.id.to_string(), generation: 2, moved: true, ..Default::default() };
        self.send(Body::Ended(claim)).await;
        let quiet = tokio::time::timeout(std::time::Duration::from_millis(300), self.next()).await;
        assert!(quiet.is_err(), "{quiet:?}");
    }
}

#[tokio::test]
async fn a_second_stream_of_a_host_replaces_the_first_and_silence_disconnects() {
    let cluster = Cluster::with(|options| options.heartbeat = std::time::Duration::from_millis(1_500)).await;
    let (host, mut first) = cluster.agent("h1").await;
    let second = cluster.connect(&host, vec![]).await;
    while first.next().await.is_some() {}
    cluster.connected("h1", true).await;
    second.stop_heartbeat();
    cluster.connected("h1", false).await;
}

impl Agent {
    fn stop_heartbeat(&self) {
        self.heartbeat_task().abort();
    }
}

#[tokio::test]
async fn an_agent_that_has_served_a_newer_controller_or_speaks_otherwise_is_not_welcome() {
    let cluster = Cluster::new().await;
    let host = cluster.host("h1").await;
    let attend = async |change: fn(&mut v1::Hello)| {
        let mut hello = v1::Hello {
            protocol: godwit_link::PROTOCOL,
            address: "10.0.0.1".into(),
            facts: godwit_link::encode(&host.facts),
            load: godwit_link::encode(&host.load),
            vms: vec![],
            epoch: 1,
            migration_address: String::new(),
            epoch_id: String::new(),
            mark: 0,
            members: vec![],
        };
        change(&mut hello);
        let mut client = LinkClient::new(cluster.channel(Some((&host.certificate, &host.key))).await.expect("channel"));
        let mut inbound = client.attend(tokio_stream::iter([message(Body::Hello(hello))])).await.expect("stream").into_inner();
        soon(inbound.message()).await.map(|_| ()).map_err(|status| refusal_of(&status).code)
    };
    assert_eq!(attend(|_| {}).await, Ok(()));
    assert_eq!(attend(|hello| hello.epoch = 2).await, Err(ErrorCode::GenerationStale));
    assert_eq!(attend(|hello| hello.protocol += 1).await, Err(ErrorCode::HostIncompatible));
    assert_eq!(attend(|hello| hello.facts = b"{".to_vec()).await, Err(ErrorCode::BadRequest));
    assert_eq!(attend(|hello| hello.address = "a b".into()).await, Err(ErrorCode::BadRequest));
    assert_eq!(attend(|hello| hello.migration_address = "a b".into()).await, Err(ErrorCode::BadRequest));
}
