//! Networks on bridges that the hosts have already, and on VLANs of their uplinks.

use godwit_model::ErrorCode;

use super::super::{FleetNetwork, Kind};
use super::hosts::{Host, hosts, network, on, until};
use super::{A, ALL, C, FleetNetworks, NEVER, Refusal, SOON};

/// Two hosts whose bridges `br0` are joined by a cable beside the underlay.
fn joined() -> (super::hosts::Namespace, [Host; 2]) {
    let (switch, hosts) = hosts::<2>(1_600);
    let [h1, h2] = &hosts;
    let there = h2.namespace.path();
    h1.namespace.run("ip", &["link", "add", "up0", "type", "veth", "peer", "name", "up0", "netns", &there]);
    for (host, address) in hosts.iter().zip(["52:54:00:01:00:01", "52:54:00:01:00:02"]) {
        host.namespace.run("ip", &["link", "add", "br0", "type", "bridge"]);
        // As a real port has one: a drawn one may be above that of a tap, and a bridge takes the lowest.
        host.namespace.run("ip", &["link", "set", "up0", "address", address]);
        host.namespace.run("ip", &["link", "set", "up0", "master", "br0", "up"]);
        host.namespace.run("ip", &["link", "set", "br0", "up"]);
    }
    (switch, hosts)
}

fn kind(vlan: Option<u16>) -> Kind {
    let vlan = vlan.map(|vlan| vlan.to_string().parse().expect("vlan"));
    Kind::Bridge { bridge: "br0".parse().expect("bridge"), vlan }
}

/// What must stay as it is of a bridge of the host: its address, MTU and settings.
fn look(host: &Host) -> String {
    let text = host.namespace.run("ip", &["-d", "link", "show", "br0"]);
    let words = text.split_whitespace().collect::<Vec<_>>();
    // Timers run, and what the ports offload follows from them.
    let timers = ["hello_timer", "tcn_timer", "topology_change_timer", "gc_timer", "tso_max_size", "tso_max_segs", "gso_max_size"];
    let mut kept = Vec::new();
    let mut skip = false;
    for word in words {
        if !skip && !timers.contains(&word) {
            kept.push(word);
        }
        skip = timers.contains(&word);
    }
    kept.join(" ")
}

/// Whether this kernel has VLAN interfaces at all.
fn has_vlans(host: &Host) -> bool {
    let make = ["link", "add", "try20", "link", "up0", "type", "vlan", "id", "21"];
    let made = host.namespace.inside(|| std::process::Command::new("ip").args(make).output().expect("ip").status.success());
    if made {
        host.namespace.run("ip", &["link", "del", "try20"]);
    } else {
        eprintln!("this kernel has no VLAN interfaces: nothing is proven here about VLANs");
    }
    made
}

fn ports(host: &Host) -> String {
    host.namespace.run("ip", &["-o", "link", "show"])
}

fn fleet(networks: &[&FleetNetwork]) -> FleetNetworks {
    FleetNetworks { networks: networks.iter().map(|network| (*network).clone()).collect(), ..FleetNetworks::default() }
}

#[test]
fn a_bridge_of_the_host_is_used_as_it_is_and_left_as_it_was() {
    let (_switch, [h1, h2]) = joined();
    let plain = network(1, kind(None));
    let before = look(&h1);
    for host in [&h1, &h2] {
        host.apply(&fleet(&[&plain]));
    }
    let offered = h1.look().bridges;
    assert_eq!(offered.len(), 1, "{offered:?}");
    assert_eq!((offered[0].name.as_str(), offered[0].uplink.as_deref()), ("br0", Some("up0")));
    let (here, there) = (h1.join(&on(&plain, A, &[])), h2.join(&on(&plain, C, &[])));
    assert_eq!(look(&h1), before, "a VM on it changes nothing about it");
    until("a frame over the bridge", || {
        here.send(A, ALL, 1);
        there.hears(A, 1, SOON)
    });
    // What is announced on it is heard beyond it.
    let moved = on(&plain, A, &[]);
    drop(here);
    let announced = h1.call(|network| async move { network.announce(&moved) });
    assert!(there.hears_frame(SOON * 30, |frame| frame[6..12] == A.0 && frame[12..14] == [0x80, 0x35]));
    announced.abort();
    h1.apply(&FleetNetworks::default());
    assert_eq!(look(&h1), before);
    assert!(ports(&h1).lines().any(|line| line.contains(": up0") && line.contains("master br0")), "its port stays");
}

#[test]
fn a_vlan_of_the_uplink_is_a_network_of_its_own_and_goes_without_a_trace() {
    let (_switch, [h1, h2]) = joined();
    let (plain, tagged) = (network(1, kind(None)), network(2, kind(Some(20))));
    if !has_vlans(&h1) {
        h1.apply(&fleet(&[&tagged]));
        assert!(h1.look().no_vlans, "the host says so");
        assert!(!ports(&h1).contains(": gw"), "and nothing half made is left");
        return;
    }
    let before = look(&h1);
    for host in [&h1, &h2] {
        host.apply(&fleet(&[&plain, &tagged]));
        host.apply(&fleet(&[&plain, &tagged]));
    }
    let made: Vec<String> = ports(&h1).lines().filter(|line| line.contains(": gwv")).map(str::to_owned).collect();
    assert_eq!(made.len(), 2, "a bridge and a VLAN: {made:?}");
    assert_eq!(h1.look().bridges.len(), 1, "only the host's own is offered");
    let (here, there) = (h1.join(&on(&plain, A, &[])), h2.join(&on(&plain, C, &[])));
    let (here20, there20) = (h1.join(&on(&tagged, A, &[])), h2.join(&on(&tagged, C, &[])));
    until("a frame over the VLAN", || {
        here20.send(A, ALL, 2);
        there20.hears(A, 2, SOON)
    });
    here.send(A, ALL, 3);
    here20.send(A, ALL, 4);
    assert!(!there20.hears(A, 3, NEVER) && !there.hears(A, 4, NEVER), "the two are apart");

    // With VMs on it a network stays, however wrong the fleet may be.
    h1.apply(&FleetNetworks::default());
    here20.send(A, ALL, 5);
    assert!(there20.hears(A, 5, SOON * 10));
    drop((here, here20));
    until("nothing of ours is left", || {
        h1.apply(&FleetNetworks::default());
        !ports(&h1).contains(": gw")
    });
    assert_eq!(look(&h1), before);
}

#[test]
fn a_host_without_the_bridge_or_a_clear_uplink_says_so() {
    let (_switch, [h1, _h2]) = joined();
    let (plain, tagged) = (network(1, kind(None)), network(2, kind(Some(20))));
    let wanted = fleet(&[&plain, &tagged]);
    // A second port that may lead out: which one has the VLAN cannot be told.
    h1.namespace.run("ip", &["link", "add", "extra", "type", "veth", "peer", "name", "extra1"]);
    h1.namespace.run("ip", &["link", "set", "extra", "master", "br0"]);
    h1.apply(&wanted);
    assert_eq!(h1.look().bridges[0].uplink, None);
    let join = |network: &FleetNetwork| {
        let nic = on(network, A, &[]);
        h1.call(move |network| async move { network.create_tap(&nic, godwit_model::VmId::new(uuid::Uuid::new_v4()), 0).await })
    };
    let refusal = Refusal::from(join(&tagged).expect_err("no uplink"));
    assert_eq!(refusal.code, ErrorCode::HostIncompatible);
    assert!(refusal.message.contains("VLAN 20") && refusal.hint.is_some(), "{refusal:?}");
    h1.namespace.run("ip", &["link", "del", "extra"]);
    if has_vlans(&h1) {
        // The VLAN is there already, and is somebody else's.
        h1.namespace.run("ip", &["link", "add", "up0.20", "link", "up0", "type", "vlan", "id", "20"]);
        let fleet = wanted.clone();
        let refused = h1.call(move |network| async move { network.apply(&fleet).await }).expect_err("taken");
        assert!(refused.to_string().contains("up0.20"), "{refused}");
    }
    h1.namespace.run("ip", &["link", "del", "br0"]);
    assert_eq!(Refusal::from(join(&plain).expect_err("no bridge")).code, ErrorCode::HostIncompatible);
}
