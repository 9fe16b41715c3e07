//! Numbers that are not used again at once, and what a host lacks.

use godwit_model::{HostBridge, UnixMillis};

use super::*;

fn host(overlay_mtu: Option<u32>, bridges: &[(&str, u32, bool)]) -> HostNetworks {
    let bridge = |(name, mtu, uplink): &(&str, u32, bool)| HostBridge {
        name: (*name).to_owned(),
        mtu: *mtu,
        uplink: uplink.then(|| "eth0".to_owned()),
    };
    HostNetworks { overlay_mtu, bridges: bridges.iter().map(bridge).collect(), filters: true, ..HostNetworks::default() }
}

fn kind(text: &str) -> NetworkKind {
    serde_json::from_str(text).expect("kind")
}

#[test]
fn a_number_that_was_freed_comes_back_only_after_all_others() {
    assert_eq!(next_vni(0, |_| false), Some(1));
    assert_eq!(next_vni(7, |_| false), Some(8), "however many below are free");
    assert_eq!(next_vni(7, |vni| vni == 8), Some(9));
    assert_eq!(next_vni(LAST_VNI, |vni| vni == 1), Some(2));
    assert_eq!(next_vni(5, |_| true), None);
}

#[test]
fn the_default_mtu_is_what_every_connected_host_carries() {
    let (overlay, bridge) = (NetworkKind::default(), kind(r#"{"type":"bridge","bridge":"br0"}"#));
    let hosts = [host(Some(1_550), &[("br0", 9_000, true)]), host(Some(1_430), &[("br1", 1_400, true)])];
    assert_eq!(default_mtu(&overlay, [].into_iter()), 1_450);
    assert_eq!(default_mtu(&overlay, hosts.iter()), 1_430);
    assert_eq!(default_mtu(&overlay, hosts[..1].iter()), 1_500, "more must be asked for");
    assert_eq!(default_mtu(&bridge, hosts.iter()), 1_500);
    assert_eq!(default_mtu(&bridge, [host(None, &[("br0", 1_400, true)])].iter()), 1_400);
}

#[test]
fn what_a_host_lacks_is_said_with_its_fix() {
    let row = |kind| NetworkRow {
        id: NetworkId::new(uuid::Uuid::nil()),
        name: Name::new("lan").expect("name"),
        team: Name::new("red").expect("name"),
        kind,
        vni: None,
        mtu: 1_500,
        created: UnixMillis(0),
    };
    let overlay = row(NetworkKind::default());
    let bridge = row(kind(r#"{"type":"bridge","bridge":"br0"}"#));
    let vlan = row(kind(r#"{"type":"bridge","bridge":"br0","vlan":20}"#));
    let cases = [
        (&overlay, host(Some(1_500), &[]), None),
        (&overlay, host(None, &[]), None),
        (&overlay, host(Some(1_450), &[]), Some("carry 1450 bytes")),
        (&bridge, host(None, &[("br0", 1_500, false)]), None),
        (&bridge, host(None, &[("br1", 1_500, true)]), Some("no bridge br0")),
        (&bridge, host(None, &[("br0", 1_400, true)]), Some("carries 1400 bytes")),
        (&vlan, host(None, &[("br0", 1_500, true)]), None),
        (&vlan, host(None, &[("br0", 1_500, false)]), Some("VLAN 20")),
    ];
    let name = Name::new("h1").expect("name");
    for (row, host, expected) in cases {
        let lacks = lacks(row, row.mtu, (&name, &host));
        match (lacks, expected) {
            (None, None) => {}
            (Some((message, fix)), Some(words)) => assert!(message.contains(words) && !fix.is_empty(), "{message}"),
            other => panic!("{:?} on {host:?}: {other:?}", row.kind),
        }
    }
}
