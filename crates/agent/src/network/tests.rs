//! Networks between real network namespaces, with frames through real taps.

mod bridges;
mod filters;
mod hosts;

use std::time::Duration;

use godwit_model::{ErrorCode, MacAddress, Refusal, VmId};

use super::{FleetNetworks, NetworkError};
use hosts::{Host, hosts, lan, nic, until};

const A: MacAddress = MacAddress([0x52, 0x54, 0, 0, 0, 0xa]);
const C: MacAddress = MacAddress([0x52, 0x54, 0, 0, 0, 0xc]);
const ALL: [u8; 6] = [0xff; 6];
const SOON: Duration = Duration::from_millis(100);
const NEVER: Duration = Duration::from_millis(300);

fn fleet(hosts: &[&Host], locations: &[(MacAddress, &Host)]) -> FleetNetworks {
    FleetNetworks {
        members: hosts.iter().map(|host| host.address).collect(),
        networks: vec![lan()],
        locations: locations.iter().map(|(mac, host)| (*mac, lan().id, host.address)).collect(),
    }
}

#[test]
fn applying_again_or_after_a_restart_changes_nothing() {
    let (_switch, [h1, h2, h3]) = hosts::<3>(1_600);
    let wanted = fleet(&[&h1, &h2, &h3], &[(A, &h1), (C, &h3)]);
    let links = |host: &Host| host.namespace.run("ip", &["-o", "-d", "link", "show"]);
    // What stays the same: number, name and MTU; the rest of the line has timers.
    let look = |host: &Host| {
        let links = links(host);
        let links: Vec<String> = links.lines().map(|line| line.split_whitespace().take(5).collect::<Vec<_>>().join(" ")).collect();
        let links = links.join("\n").replace(",LOWER_UP", "");
        let entries = host.namespace.run("bridge", &["fdb", "show", "dev", "gwvx7"]);
        let mut entries: Vec<&str> = entries.lines().filter(|line| line.contains(" dst ")).collect();
        entries.sort_unstable();
        (links, entries.join("\n"))
    };
    h1.apply(&wanted);
    let details = links(&h1);
    assert!(details.contains("vxlan id 7 local 10.77.0.1 ") && details.contains("dstport 4789"), "{details}");
    assert!(!details.contains("nolearning") && details.contains("forward_delay 0 "), "{details}");
    let first = look(&h1);
    let made: Vec<&str> = first.0.lines().filter(|line| line.contains(": gw")).collect();
    assert_eq!(made.len(), 2, "{made:?}");
    for line in made {
        assert!(line.ends_with("mtu 1500") && line.contains(",UP"), "{line}");
    }
    assert_eq!(first.1.lines().count(), 3, "two floods and one address:\n{}", first.1);
    assert!(!first.1.contains("10.77.0.1"), "no entry to itself:\n{}", first.1);
    assert!(h1.namespace.run("ip", &["-6", "addr", "show", "dev", "gwbr7"]).is_empty(), "the host has no address among guests");
    h1.apply(&wanted);
    assert_eq!(look(&h1), first, "second time");

    let h1 = h1.restart_agent();
    let early = h1.tap(A);
    drop(early);
    h1.apply(&wanted);
    assert_eq!(look(&h1), first, "after a restart");

    h1.apply(&fleet(&[&h1, &h2], &[]));
    assert_eq!(look(&h1).1.lines().count(), 1, "who left gets no floods, what is gone has no entry");
    // With a guest on it the network stays, however wrong the fleet may be.
    let guest = h1.tap(A);
    h1.apply(&FleetNetworks::default());
    assert!(links(&h1).contains(": gwbr7"));
    drop(guest);
    // A process that another test starts may have the tap for a moment.
    until("nothing is left", || {
        h1.apply(&FleetNetworks::default());
        !links(&h1).contains(": gw")
    });
}

#[test]
fn a_tap_belongs_to_its_vm_and_dies_with_its_descriptor() {
    let (_switch, [h1]) = hosts::<1>(1_400);
    let vm = VmId::new(uuid::Uuid::from_u128(0x1234_5678 << 96));
    let tap = |slot| h1.call(move |network| async move { network.create_tap(&nic(A, &[]), vm, slot).await });
    let refusal = Refusal::from(tap(0).expect_err("the fleet has not spoken"));
    assert_eq!(refusal.code, ErrorCode::HostFailed);
    assert!(refusal.message.contains("lan") && refusal.hint.is_some(), "{refusal:?}");
    h1.apply(&fleet(&[&h1], &[]));
    let (first, second, same) = (tap(0).expect("tap"), tap(7).expect("tap"), tap(0).expect("another of the same name"));
    let links = h1.namespace.run("ip", &["-o", "link", "show", "master", "gwbr7"]);
    for name in ["gwt123456780:", "gwt123456787:", "gwt123456780a:"] {
        let line = links.lines().find(|line| line.contains(name)).unwrap_or_else(|| panic!("no {name} in {links}"));
        assert!(line.contains("mtu 1350"), "{line}");
    }
    drop((first, second, same));
    until("the taps are gone", || !h1.namespace.run("ip", &["-o", "link", "show"]).contains("gwt"));
    let names: Vec<_> = h1.call(|network| async move { network.conditions().await }).into_iter().map(|c| c.name).collect();
    assert!(names.contains(&"underlay_mtu".to_owned()), "1350 bytes are fewer than networks have: {names:?}");
}

#[test]
fn an_address_that_the_fleet_moves_back_is_found() {
    let (_switch, [h1, h2, h3]) = hosts::<3>(1_600);
    for at in [&h2, &h1, &h2] {
        h3.apply(&fleet(&[&h1, &h2, &h3], &[(A, at)]));
        let entries = h3.namespace.run("bridge", &["fdb", "show", "dev", "gwvx7"]);
        let line = entries.lines().find(|line| line.starts_with("52:54:00:00:00:0a dst")).expect("an entry");
        assert!(line.contains(&format!("dst {} ", at.address)), "{line}");
    }
    h3.apply(&fleet(&[&h1, &h2, &h3], &[(A, &h3)]));
    assert!(!h3.namespace.run("bridge", &["fdb", "show", "dev", "gwvx7"]).contains("52:54:00:00:00:0a dst"));
}

#[test]
fn a_moved_address_is_reached_after_its_announcement_alone() {
    let (_switch, [h1, h2, h3]) = hosts::<3>(1_600);
    let before = fleet(&[&h1, &h2, &h3], &[(A, &h1), (C, &h3)]);
    for host in [&h1, &h2, &h3] {
        host.apply(&before);
    }
    let (old, new, client) = (h1.tap(A), h2.tap(A), h3.tap(C));
    // All bridges hear of A at its old place.
    until("a broadcast through the VXLAN", || {
        old.send(A, ALL, 1);
        client.hears(A, 1, SOON) && new.hears(A, 1, SOON)
    });
    until("a frame to the old place", || {
        client.send(C, A.0, 2);
        old.hears(C, 2, SOON)
    });
    assert!(!new.hears(C, 2, NEVER), "the entry keeps it from going everywhere");

    let announced = h2.call(|network| async move { network.announce(&nic(A, &[])) });
    until("a frame to the new place", || {
        client.send(C, A.0, 3);
        new.hears(C, 3, SOON)
    });
    while old.hears(C, 3, SOON) {}
    client.send(C, A.0, 4);
    assert!(new.hears(C, 4, Duration::from_secs(5)));
    assert!(!old.hears(C, 4, NEVER), "the old place gets nothing any more");
    // What the fleet said before the move does not turn it back.
    h3.apply(&before);
    client.send(C, A.0, 5);
    assert!(new.hears(C, 5, Duration::from_secs(5)));
    // And the VM answers from its new place through the old one's bridge too.
    new.send(A, C.0, 6);
    assert!(client.hears(A, 6, Duration::from_secs(5)));
    announced.abort();
    drop(old.descriptor());
}

#[test]
fn an_unknown_network_cannot_be_announced_on_or_joined() {
    let (_switch, [h1]) = hosts::<1>(1_600);
    let vm = VmId::new(uuid::Uuid::from_u128(1));
    let result = h1.call(move |network| async move { network.create_tap(&nic(A, &[]), vm, 0).await });
    assert!(matches!(result, Err(NetworkError::Unknown(_))));
}
