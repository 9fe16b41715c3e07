//! What guests may send, and who may send VXLAN, as texts for `nft`. Pure: values in, text out; [`super::nft`] applies it.
//!
//! ```text
//!  table bridge godwit                                   table inet godwit
//!    prerouting, input: iif vmap @taps                     input: UDP 4789 only from @members
//!       ├─ tap known    ─▶ its chain: what is not the interface's is counted and dropped
//!       └─ tap unknown  ─▶ counted and dropped
//! ```
//! `input` is there for frames to addresses that a bridge keeps for itself: they pass no other hook, but the bridge learns from them (LLDP
//! passes none at all: our own bridges do not learn from it). Chains go by the tap's index, which is not given to another interface, and not by its name.
//! Every text can be applied again; each is one transaction. Nothing outside these two tables is named.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::{IpAddr, Ipv6Addr};

use godwit_model::{DroppedFrames, MacAddress, VmId};

use super::tap;

/// The counter of frames from taps of which nothing is known.
pub(super) const UNKNOWN: &str = "unknown";
/// The counter of VXLAN packets from strangers.
pub(super) const STRANGERS: &str = "strangers";

/// One tap and what may come out of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TapRules {
    pub(super) tap: String,
    pub(super) index: u32,
    pub(super) vm: VmId,
    pub(super) slot: usize,
    pub(super) mac: MacAddress,
    /// None means any.
    pub(super) addresses: Vec<IpAddr>,
}

impl TapRules {
    /// The name of its chain, and what its counters begin with.
    pub(super) fn chain(&self) -> String {
        chain(&self.tap, self.index)
    }
}

/// The chain of a tap.
fn chain(tap: &str, index: u32) -> String {
    format!("{tap}.{index}")
}

/// The counter of a chain for frames that were dropped for `reason`.
fn counter(chain: &str, reason: &str) -> String {
    format!("{chain}-{reason}")
}

/// The chain, the tap's index and the reason that a counter is for; nothing if it is no tap's.
pub(super) fn read_counter(name: &str) -> Option<(&str, u32, &str)> {
    let (chain, reason) = name.split_once('-')?;
    let (tap, index) = chain.split_once('.')?;
    let known = tap.starts_with(tap::PREFIX) && DroppedFrames::REASONS.contains(&reason);
    known.then_some(())?;
    Some((chain, index.parse().ok()?, reason))
}

/// The table of the taps, without any.
pub(super) fn base() -> String {
    let mut text = String::from("add table bridge godwit\n");
    text.push_str("add map bridge godwit taps { type iface_index : verdict ; }\n");
    line(&mut text, format_args!("add counter bridge godwit {UNKNOWN}"));
    for hook in ["prerouting", "input"] {
        line(
            &mut text,
            format_args!("add chain bridge godwit {hook} {{ type filter hook {hook} priority -250 ; policy accept ; }}"),
        );
        line(&mut text, format_args!("flush chain bridge godwit {hook}"));
        line(&mut text, format_args!("add rule bridge godwit {hook} iif vmap @taps"));
        // A tap whose rules are gone sends nothing, rather than anything.
        line(&mut text, format_args!("add rule bridge godwit {hook} iifname \"{}*\" counter name \"{UNKNOWN}\" drop", tap::PREFIX));
    }
    text
}

/// Adds a tap; one that is there gets these rules, and keeps its counts.
pub(super) fn add(tap: &TapRules) -> String {
    let chain = tap.chain();
    let mut text = String::new();
    for reason in DroppedFrames::REASONS.iter().filter(|reason| **reason != UNKNOWN) {
        line(&mut text, format_args!("add counter bridge godwit {}", counter(&chain, reason)));
    }
    line(&mut text, format_args!("add chain bridge godwit {chain}"));
    line(&mut text, format_args!("flush chain bridge godwit {chain}"));
    for rule in rules(tap) {
        let rule = match rule {
            Rule::Drop(reason, matches) => format!("{matches} counter name \"{}\" drop", counter(&chain, reason)),
            Rule::Accept(matches) => format!("{matches} accept"),
        };
        line(&mut text, format_args!("add rule bridge godwit {chain} {}", rule.trim_start()));
    }
    line(&mut text, format_args!("add element bridge godwit taps {{ {} : jump {chain} }}", tap.index));
    text
}

/// Removes the chain of a tap that is gone, whatever is left of it.
pub(super) fn remove(chain: &str, index: u32) -> String {
    let mut text = String::new();
    // What is added first can be removed in any case: one part that is missing must not keep the others.
    line(&mut text, format_args!("add chain bridge godwit {chain}"));
    line(&mut text, format_args!("add element bridge godwit taps {{ {index} : jump {chain} }}"));
    line(&mut text, format_args!("delete element bridge godwit taps {{ {index} }}"));
    line(&mut text, format_args!("flush chain bridge godwit {chain}"));
    line(&mut text, format_args!("delete chain bridge godwit {chain}"));
    for reason in DroppedFrames::REASONS.iter().filter(|reason| **reason != UNKNOWN) {
        let counter = counter(chain, reason);
        line(&mut text, format_args!("add counter bridge godwit {counter}"));
        line(&mut text, format_args!("delete counter bridge godwit {counter}"));
    }
    text
}

/// Lets `members` alone send VXLAN.
pub(super) fn members(members: &BTreeSet<IpAddr>, port: u16) -> String {
    let mut text = String::from("add table inet godwit\n");
    line(&mut text, format_args!("add counter inet godwit {STRANGERS}"));
    for (set, kind) in [("members4", "ipv4_addr"), ("members6", "ipv6_addr")] {
        line(&mut text, format_args!("add set inet godwit {set} {{ type {kind} ; }}"));
        line(&mut text, format_args!("flush set inet godwit {set}"));
        let addresses: Vec<String> =
            members.iter().filter(|address| address.is_ipv4() == (set == "members4")).map(ToString::to_string).collect();
        if !addresses.is_empty() {
            line(&mut text, format_args!("add element inet godwit {set} {{ {} }}", addresses.join(", ")));
        }
    }
    text.push_str("add chain inet godwit input { type filter hook input priority -300 ; policy accept ; }\n");
    text.push_str("flush chain inet godwit input\n");
    line(&mut text, format_args!("add rule inet godwit input udp dport {port} ip saddr @members4 accept"));
    line(&mut text, format_args!("add rule inet godwit input udp dport {port} ip6 saddr @members6 accept"));
    line(&mut text, format_args!("add rule inet godwit input udp dport {port} counter name \"{STRANGERS}\" drop"));
    text
}

fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{line}");
}

enum Rule {
    /// Drops what matches, counted under a reason.
    Drop(&'static str, String),
    /// What matches is right.
    Accept(String),
}

/// What is held against each frame of a tap, in this order, to a verdict: whoever came back from here would be taken for unknown.
fn rules(tap: &TapRules) -> Vec<Rule> {
    let mac = tap.mac;
    let text = str::to_owned;
    let mut rules = vec![
        Rule::Drop("mac", format!("ether saddr != {mac}")),
        Rule::Drop("vlan", text("ether type { 0x8100, 0x88a8, 0x9100 }")),
        // What switches say to each other: spanning tree, link aggregation, LLDP.
        Rule::Drop("protocol", text("ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00")),
    ];
    let arp = format!("arp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp saddr ether {mac}");
    let (mut four, mut six) = (Vec::new(), BTreeSet::from([link_local(mac)]));
    for address in &tap.addresses {
        match address {
            IpAddr::V4(address) => four.push(address.to_string()),
            IpAddr::V6(address) => drop(six.insert(*address)),
        }
    }
    let four = format!("{{ {} }}", four.join(", "));
    let none = tap.addresses.iter().all(IpAddr::is_ipv6);
    if tap.addresses.is_empty() {
        rules.push(Rule::Accept(arp));
    } else if !none {
        rules.push(Rule::Accept(format!("{arp} arp saddr ip {four}")));
        // A probe whether an address is free: for its own ones only, else it could keep others from theirs.
        rules.push(Rule::Accept(format!("{arp} arp saddr ip 0.0.0.0 arp daddr ip {four}")));
    }
    rules.extend([
        Rule::Drop("arp", text("ether type arp")),
        Rule::Drop("router", text("icmpv6 type { 134, 137 }")),
        // Clients listen there, whatever port a server may send from.
        Rule::Drop("dhcp", text("udp dport { 68, 546 }")),
    ]);
    if tap.addresses.is_empty() {
        rules.push(Rule::Accept(String::new()));
        return rules;
    }
    if !none {
        rules.push(Rule::Accept(text("ip saddr 0.0.0.0 udp sport 68 udp dport 67")));
        rules.push(Rule::Accept(format!("ip saddr {four}")));
    }
    // The target of a solicitation or advertisement is 8 bytes behind the beginning of ICMPv6.
    let raw: Vec<String> = six.iter().map(|address| format!("{:#034x}", u128::from(*address))).collect();
    let raw = raw.join(", ");
    let six: Vec<String> = six.iter().map(ToString::to_string).collect();
    let six = six.join(", ");
    rules.extend([
        Rule::Drop("source", text("ether type ip")),
        Rule::Drop("neighbour", format!("icmpv6 type 136 @th,64,128 != {{ {raw} }}")),
        Rule::Drop("neighbour", format!("icmpv6 type 135 ip6 saddr :: @th,64,128 != {{ {raw} }}")),
        // Before it has an address a guest probes for it, asks for routers and joins groups.
        Rule::Accept(text("ip6 saddr :: icmpv6 type { 131, 132, 133, 135, 143 }")),
        Rule::Accept(format!("ip6 saddr {{ {six} }}")),
        Rule::Drop("source", text("ether type ip6")),
        // RARP, with which QEMU announces a VM that has moved.
        Rule::Accept(text("ether type 0x8035")),
        Rule::Drop("protocol", String::new()),
    ]);
    rules
}

/// The link-local address that follows from a MAC address: what neighbour discovery of an interface speaks from unless it is told otherwise.
fn link_local(mac: MacAddress) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0;
    let [high, low] = [u16::from_be_bytes([a ^ 2, b]), u16::from_be_bytes([e, f])];
    Ipv6Addr::new(0xfe80, 0, 0, 0, high, u16::from_be_bytes([c, 0xff]), u16::from_be_bytes([0xfe, d]), low)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tap(addresses: &[&str]) -> TapRules {
        TapRules {
            tap: "gwt123456780".into(),
            index: 17,
            vm: VmId::new(uuid::Uuid::from_u128(1)),
            slot: 0,
            mac: MacAddress([0x52, 0x54, 0, 1, 2, 3]),
            addresses: addresses.iter().map(|address| address.parse().expect("address")).collect(),
        }
    }

    #[test]
    fn a_link_local_address_follows_from_the_mac() {
        assert_eq!(link_local(MacAddress([0x52, 0x54, 0, 1, 2, 3])).to_string(), "fe80::5054:ff:fe01:203");
    }

    #[test]
    fn counters_say_which_tap_and_why() {
        let chain = tap(&[]).chain();
        assert_eq!(read_counter(&counter(&chain, "mac")), Some(("gwt123456780.17", 17, "mac")));
        for other in ["unknown", "gwt1-mac", "gwt1.x-mac", "eth0.1-mac", "gwt1.1-colour"] {
            assert_eq!(read_counter(other), None, "{other}");
        }
    }

    #[test]
    fn a_tap_with_addresses_may_say_only_what_is_its_own() {
        let text = add(&tap(&["10.0.0.5", "2001:db8::5"]));
        for expected in [
            "gwt123456780.17 ether saddr != 52:54:00:01:02:03 counter name \"gwt123456780.17-mac\" drop",
            "arp saddr ether 52:54:00:01:02:03 arp saddr ip { 10.0.0.5 } accept",
            "ip saddr { 10.0.0.5 } accept",
            "ip6 saddr { 2001:db8::5, fe80::5054:ff:fe01:203 } accept",
            "icmpv6 type 136 @th,64,128 != { 0x20010db8000000000000000000000005, 0xfe80000000000000505400fffe010203 } counter",
            "gwt123456780.17 counter name \"gwt123456780.17-protocol\" drop",
            "add element bridge godwit taps { 17 : jump gwt123456780.17 }",
        ] {
            assert!(text.contains(expected), "no {expected:?} in\n{text}");
        }
        let only6 = add(&tap(&["2001:db8::5"]));
        assert!(!only6.contains("arp saddr") && !only6.contains("ip saddr {"), "nothing of IPv4 is its own:\n{only6}");
        let any = add(&tap(&[]));
        assert!(!any.contains("source\" drop") && any.contains("134, 137") && any.contains("68, 546"), "{any}");
    }

    #[test]
    fn members_of_both_families_are_listed_apart() {
        let text = members(&["10.0.0.1", "fd00::1"].map(|address| address.parse().expect("address")).into(), 4_789);
        assert!(text.contains("members4 { 10.0.0.1 }") && text.contains("members6 { fd00::1 }"), "{text}");
        assert!(!members(&BTreeSet::new(), 4_789).contains("add element"));
    }
}
