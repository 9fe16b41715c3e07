//! What guests and strangers may not send, with real frames.

use std::net::{Ipv4Addr, UdpSocket};

use godwit_model::{DroppedFrames, ResolvedNic, VmId};

use super::hosts::{Guest, Host, Namespace, hosts, nic, until};
use super::{A, ALL, C, FleetNetworks, NEVER, SOON, fleet};

const OWN: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 5);
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 6);
/// The link-local address that follows from [`A`].
const OWN6: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0x50, 0x54, 0, 0xff, 0xfe, 0, 0, 0xa];
const OTHER6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 6];
const ALL_ROUTERS: [u8; 6] = [0x33, 0x33, 0, 0, 0, 2];

fn frame(to: [u8; 6], from: [u8; 6], kind: [u8; 2], content: &[u8]) -> Vec<u8> {
    let mut frame = [to.as_slice(), &from, &kind, content].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

fn arp(sender_mac: [u8; 6], sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let content = [&[0, 1, 8, 0, 6, 4, 0, 1], sender_mac.as_slice(), &sender.octets(), &[0; 6], &target.octets()].concat();
    frame(ALL, A.0, [8, 6], &content)
}

fn udp(source: Ipv4Addr, from: u16, to: u16) -> Vec<u8> {
    let addresses = [source.octets(), [0xff; 4]].concat();
    // A firewall of the host that sees bridged packets drops those with a wrong sum.
    let head = [0x45, 0, 0, 36, 0, 0, 0, 0, 64, 17];
    let words = [&head, addresses.as_slice()].concat();
    let sum: u32 = words.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    let udp = [from.to_be_bytes(), to.to_be_bytes(), [0, 16], [0, 0]].concat();
    frame(ALL, A.0, [8, 0], &[head.as_slice(), &sum.to_be_bytes(), &addresses, &udp, &[7; 8]].concat())
}

fn icmpv6(source: [u8; 16], kind: u8, target: [u8; 16]) -> Vec<u8> {
    let all = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
    let message = [&[kind, 0, 0, 0, 0, 0, 0, 0], target.as_slice()].concat();
    let head = [0x60, 0, 0, 0, 0, message.len() as u8, 58, 255];
    frame(ALL_ROUTERS, A.0, [0x86, 0xdd], &[head.as_slice(), &source, &all, &message].concat())
}

fn dropped(host: &Host) -> DroppedFrames {
    host.look().interfaces.first().map(|interface| interface.dropped).unwrap_or_default()
}

/// A guest with addresses on the first host, and one that hears everything on the second.
fn pair() -> (Namespace, [Host; 2], Guest, Guest, ResolvedNic, VmId) {
    let (switch, hosts) = hosts::<2>(1_600);
    let [h1, h2] = &hosts;
    let wanted = fleet(&[h1, h2], &[(A, h1), (C, h2)]);
    h1.apply(&wanted);
    h2.apply(&wanted);
    let (vm, nic) = (VmId::new(uuid::Uuid::new_v4()), nic(A, &["10.9.0.5"]));
    let (guest, listener) = (h1.join_as(vm, &nic), h2.tap(C));
    until("the network carries frames", || {
        guest.send_frame(&udp(OWN, 9, 9));
        listener.hears_frame(SOON, |frame| frame[6..12] == A.0)
    });
    (switch, hosts, guest, listener, nic, vm)
}

#[test]
fn a_guest_sends_only_what_is_its_own_and_the_rest_is_counted() {
    let (_switch, [h1, _h2], guest, listener, _, vm) = pair();
    let right = [
        udp(OWN, 9, 9),
        udp(Ipv4Addr::UNSPECIFIED, 68, 67),
        arp(A.0, OWN, OTHER),
        arp(A.0, Ipv4Addr::UNSPECIFIED, OWN),
        icmpv6(OWN6, 136, OWN6),
        icmpv6([0; 16], 135, OWN6),
        icmpv6([0; 16], 133, [0; 16]),
    ];
    for frame in &right {
        guest.send_frame(frame);
        assert!(listener.hears_frame(SOON * 10, |heard| heard == frame), "dropped: {frame:02x?}");
    }
    assert_eq!(dropped(&h1), DroppedFrames::default());

    let tagged = [&ALL, A.0.as_slice(), &[0x81, 0, 0, 20], &udp(OWN, 9, 9)[12..]].concat();
    // Bridges keep such frames to themselves, and learn from them.
    let lldp = frame([1, 0x80, 0xc2, 0, 0, 0xe], C.0, [0x88, 0xcc], &[0; 50]);
    guest.send_frame(&lldp);
    let reserved = frame([1, 0x80, 0xc2, 0, 0, 3], C.0, [0x88, 0x8e], &[0; 50]);
    let wrong: [(&str, Vec<u8>); 15] = [
        ("mac", frame(ALL, C.0, [8, 0], &udp(OWN, 9, 9)[14..])),
        ("mac", reserved),
        ("vlan", tagged),
        ("arp", arp(A.0, OTHER, OWN)),
        ("arp", arp(C.0, OWN, OTHER)),
        ("arp", arp(A.0, Ipv4Addr::UNSPECIFIED, OTHER)),
        ("arp", frame(ALL, A.0, [8, 6], &[0; 46])),
        ("source", udp(OTHER, 9, 9)),
        ("source", udp(Ipv4Addr::UNSPECIFIED, 9, 9)),
        ("source", icmpv6(OTHER6, 128, OTHER6)),
        ("neighbour", icmpv6(OWN6, 136, OTHER6)),
        ("neighbour", icmpv6([0; 16], 135, OTHER6)),
        ("router", icmpv6(OWN6, 134, [0; 16])),
        ("dhcp", udp(OWN, 67, 68)),
        ("protocol", frame(ALL, A.0, [0x88, 0xb5], &[0; 46])),
    ];
    let mut expected = DroppedFrames::default();
    for (reason, frame) in &wrong {
        guest.send_frame(frame);
        *expected.of(reason).expect("a reason") += 1;
        assert_eq!(dropped(&h1), expected, "{reason}: {frame:02x?}");
    }
    assert!(
        !listener.hears_frame(NEVER, |heard| wrong.iter().any(|(_, frame)| heard[6..] == frame[6..])),
        "something came through"
    );
    let entries = h1.namespace.run("bridge", &["fdb", "show", "br", "gwbr7"]);
    let learned = entries.lines().any(|line| line.starts_with("52:54:00:00:00:0c") && line.contains("gwt"));
    assert!(!learned, "the bridge believed a source that is not the guest's:\n{entries}");
    let offer = h1.look();
    assert_eq!((offer.interfaces.first().map(|it| (it.vm, it.slot)), offer.dropped), (Some((vm, 0)), expected));
}

#[test]
fn without_addresses_a_guest_may_use_any_but_no_mac_and_no_role_of_others() {
    let (_switch, [h1]) = hosts::<1>(1_600);
    h1.apply(&fleet(&[&h1], &[]));
    let (guest, listener) = (h1.tap(A), h1.tap(C));
    for right in [udp(OTHER, 9, 9), arp(A.0, OTHER, OWN), icmpv6(OTHER6, 136, OTHER6), frame(ALL, A.0, [0x88, 0xb5], &[1; 46])] {
        guest.send_frame(&right);
        assert!(listener.hears_frame(SOON * 10, |heard| heard == right), "dropped: {right:02x?}");
    }
    for wrong in [arp(C.0, OTHER, OWN), icmpv6(OTHER6, 134, [0; 16]), udp(OTHER, 67, 68), frame(ALL, C.0, [8, 0], &[0; 46])] {
        guest.send_frame(&wrong);
        assert!(!listener.hears_frame(SOON, |heard| heard == wrong), "came through: {wrong:02x?}");
    }
    assert_eq!(dropped(&h1), DroppedFrames { arp: 1, router: 1, dhcp: 1, mac: 1, ..DroppedFrames::default() });
}

#[test]
fn rules_outlive_the_agent_come_back_after_a_flush_and_go_with_the_tap() {
    let (_switch, [h1, _h2], guest, listener, nic, vm) = pair();
    let foreign = "table inet admin {\n\tcounter mine {\n\t\tpackets 0 bytes 0\n\t}\n}\n";
    h1.namespace.run("nft", &["add", "table", "inet", "admin"]);
    h1.namespace.run("nft", &["add", "counter", "inet", "admin", "mine"]);
    let spoof = || {
        guest.send_frame(&udp(OTHER, 9, 9));
        assert!(!listener.hears_frame(NEVER, |heard| heard == udp(OTHER, 9, 9)), "came through");
        guest.send_frame(&udp(OWN, 9, 9));
        assert!(listener.hears_frame(SOON * 10, |heard| heard == udp(OWN, 9, 9)), "what is right was dropped");
    };
    spoof();
    assert_eq!(dropped(&h1).source, 1);

    let h1 = h1.restart_agent();
    spoof();
    let known = nic.clone();
    h1.call(move |network| async move { network.adopt(|of, _| Some(known.clone()).filter(|_| of == vm)).await }).expect("adopted");
    assert_eq!(dropped(&h1).source, 2, "counts go on");
    spoof();
    assert_eq!(dropped(&h1).source, 3);

    h1.namespace.run("nft", &["delete", "table", "bridge", "godwit"]);
    h1.namespace.run("nft", &["delete", "table", "inet", "godwit"]);
    h1.look();
    spoof();
    assert_eq!(dropped(&h1).source, 4, "counts go on over a flush");
    h1.apply(&FleetNetworks { members: vec![h1.address], ..fleet(&[&h1], &[]) });

    // A tap of which nothing is known sends nothing, rather than anything.
    let h1 = h1.restart_agent();
    h1.namespace.run("nft", &["delete", "table", "bridge", "godwit"]);
    h1.call(|network| async move { network.adopt(|_, _| None).await }).expect("adopted");
    guest.send_frame(&udp(OWN, 9, 9));
    assert!(!listener.hears_frame(NEVER, |heard| heard == udp(OWN, 9, 9)));
    assert_eq!(h1.look().dropped.unknown, 1);

    drop(guest);
    until("its rules are gone", || {
        h1.look();
        !h1.namespace.run("nft", &["list", "table", "bridge", "godwit"]).contains("gwt1")
            && !h1.namespace.run("nft", &["list", "table", "bridge", "godwit"]).contains("-mac")
    });
    assert_eq!(h1.namespace.run("nft", &["list", "table", "inet", "admin"]), foreign, "nothing else was touched");
}

#[test]
fn vxlan_is_taken_from_members_only_and_strangers_are_counted() {
    let (switch, [h1, h2]) = hosts::<2>(1_600);
    switch.run("ip", &["addr", "add", "10.77.0.99/24", "dev", "br0"]);
    h1.apply(&fleet(&[&h1, &h2], &[]));
    let guest = h1.tap(A);
    // VXLAN: a valid id, 7; then the frame.
    let inner = frame(ALL, C.0, [0x88, 0xb5], &[9; 46]);
    let packet = [&[8, 0, 0, 0, 0, 0, 7, 0], inner.as_slice()].concat();
    let send = |from: &Namespace| {
        from.inside(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").expect("socket");
            socket.send_to(&packet, (h1.address, super::super::PORT)).expect("sent");
        });
    };
    until("a member's frame", || {
        send(&h2.namespace);
        guest.hears(C, 9, SOON)
    });
    while guest.hears(C, 9, SOON) {}
    assert_eq!(h1.look().strangers, 0);
    for count in 1..=3 {
        send(&switch);
        assert!(!guest.hears(C, 9, NEVER), "a stranger's frame came through");
        assert_eq!(h1.look().strangers, count);
    }
    // Who becomes a member is heard, and who is one no more is not.
    let stranger = "10.77.0.99".parse().expect("address");
    h1.apply(&FleetNetworks { members: vec![h1.address, stranger], ..fleet(&[&h1], &[]) });
    send(&switch);
    assert!(guest.hears(C, 9, SOON * 10));
    send(&h2.namespace);
    assert!(!guest.hears(C, 9, NEVER));
    assert_eq!(h1.look().strangers, 4);
}
