//! Networks: whose they are, what agents and VMs are told of them, and what is refused.

use godwit_api::v1::{self as api, Role};
use godwit_link::decode;
use godwit_link::v1::command::Action;
use godwit_model::{Bytes, ErrorCode, HostBridge, HostLoad, NetworkKind, NicSpec, ResolvedSpec};

use super::support::*;

fn bridge(vlan: &str) -> NetworkKind {
    serde_json::from_str(&format!(r#"{{"type":"bridge","bridge":"br0"{vlan}}}"#)).expect("kind")
}

async fn create_on(cluster: &Cluster, vm: &str, network: &str) {
    cluster.create_vm("before", Bytes::mib(64)).await;
    let mut spec = spec(Bytes::mib(64));
    spec.nics = vec![NicSpec::new(name(network))];
    cluster.admin().create_vm(&api::VmCreate { name: name(vm), spec, golden: None }).await.expect("created");
}

#[tokio::test]
async fn a_network_is_its_teams_and_its_number_is_not_given_again_at_once() {
    let cluster = Cluster::new().await;
    let (admin, red) = (cluster.admin(), cluster.member("red", Role::Operator).await);
    let first = admin.network(&name("default")).await.expect("it is there from the beginning");
    assert_eq!((first.vni, first.mtu, first.kind.clone()), (Some(1), 1_450, NetworkKind::default()));
    let (ours, theirs) = (admin.create_network(&network("lan")).await, red.create_network(&network("lan")).await);
    let (ours, theirs) = (ours.expect("ours"), theirs.expect("the same name in another team"));
    assert_eq!((ours.vni, theirs.vni, theirs.team.as_str()), (Some(2), Some(3), "red"));
    assert_eq!(code(admin.create_network(&network("lan")).await), ErrorCode::NameTaken);
    red.delete_network(&name("lan")).await.expect("deleted");
    assert_eq!(code(red.network(&name("lan")).await), ErrorCode::NotFound);
    assert_eq!(red.create_network(&network("lan")).await.expect("anew").vni, Some(4));
    assert!(red.networks().await.expect("list").iter().all(|network| network.team.as_str() == "red"));
    let on_bridge = |client: godwit_api::client::Client| async move {
        client.create_network(&api::NetworkCreate { kind: bridge(""), ..network("wire") }).await
    };
    assert_eq!(code(on_bridge(red).await), ErrorCode::NotPermitted, "the hosts' own wires are the administrator's");
    assert_eq!(on_bridge(admin).await.expect("an administrator may").vni, None);
}

#[tokio::test]
async fn a_network_that_a_vm_uses_cannot_go_nor_shrink_while_it_runs() {
    let cluster = Cluster::new().await;
    let (_host, mut agent) = cluster.agent("h1").await;
    let admin = cluster.admin();
    let lan = name("default");
    cluster.running_vm("web1", &mut agent).await;
    assert_eq!(code(admin.set_network(&lan, &api::NetworkSet { mtu: 1_400 }).await), ErrorCode::InUse);
    let grown = admin.set_network(&lan, &api::NetworkSet { mtu: 1_460 }).await.expect("grows");
    assert_eq!(grown.mtu, 1_460);
    let lacking = grown.conditions.iter().map(|condition| condition.name.as_str()).collect::<Vec<_>>();
    assert_eq!(lacking, ["not_on_host"], "h1 carries 1450 only");
    agent.fleet_when(|fleet| fleet.networks.iter().any(|network| network.name == "default" && network.mtu == 1_460)).await;
    assert_eq!(code(admin.delete_network(&lan).await), ErrorCode::InUse);
}

#[tokio::test]
async fn a_vm_is_told_the_mtu_of_its_network_and_needs_hosts_that_have_it() {
    let cluster = Cluster::new().await;
    let mut host = cluster.host("h1").await;
    let offers = |bridges: Vec<HostBridge>, filters| HostLoad {
        networks: godwit_model::HostNetworks { bridges, filters, ..host.load.networks.clone() },
        ..host.load.clone()
    };
    let br0 = HostBridge { name: "br0".into(), mtu: 1_500, uplink: Some("eth0".into()) };
    let (without, with) = (offers(vec![], true), offers(vec![br0], false));
    let create = api::NetworkCreate { kind: bridge(r#","vlan":20"#), ..network("wire") };
    let wire = cluster.admin().create_network(&create).await.expect("network");
    create_on(&cluster, "web1", "wire").await;

    host.load = without;
    let agent = cluster.connect(&host, vec![]).await;
    let start = api::VmStart { host: None };
    assert_eq!(code(cluster.admin().start_vm(&name("web1"), &start).await), ErrorCode::HostIncompatible, "no br0");
    drop(agent);
    host.load = with;
    let mut agent = cluster.connect(&host, vec![]).await;
    agent
        .fleet_when(|fleet| {
            let wire = fleet.networks.iter().find(|network| network.name == "wire");
            wire.is_some_and(|wire| (wire.bridge.as_str(), wire.vlan, wire.vni) == ("br0", 20, 0))
        })
        .await;
    let task = cluster.admin().start_vm(&name("web1"), &start).await.expect("it has no addresses to be held against");
    let command = agent.command().await;
    let Some(Action::Start(body)) = &command.action else { panic!("{command:?}") };
    let spec: ResolvedSpec = decode("spec", &body.spec).expect("spec");
    assert_eq!((spec.nics[0].network_id, spec.nics[0].mtu), (Some(wire.id), Some(1_500)));
    agent.done(&command, 0).await;
    cluster.ended(task.id).await;

    let mut addressed = super::support::spec(Bytes::mib(64));
    addressed.nics[0].addresses = vec!["10.99.0.7".parse().expect("address")];
    cluster.admin().create_vm(&api::VmCreate { name: name("web2"), spec: addressed, golden: None }).await.expect("created");
    let refused = cluster.admin().start_vm(&name("web2"), &start).await.expect_err("it cannot be protected").refusal();
    assert_eq!(refused.code, ErrorCode::HostIncompatible);
    assert!(refused.hint.is_some_and(|hint| hint.contains("guest_filter")), "{}", refused.message);
}
