//! Which addresses an image may be fetched from. Pure.
//!
//! A user names a URL and the controller goes there: without a rule that is a way into the controller's own network. So only addresses of
//! the public internet are gone to, and those that the administrator allows by name.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Whether the controller may go to `address`.
pub(super) fn may_fetch_from(address: IpAddr, allowed: &[IpNet]) -> bool {
    let address = address.to_canonical();
    if allowed.iter().any(|net| net.contains(&address)) {
        return true;
    }
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let special = address.is_unspecified()
        || address.is_loopback()
        || address.is_private()
        || address.is_link_local()
        || address.is_multicast()
        || address.is_broadcast()
        || address.is_documentation()
        || a == 0
        // Shared by a provider's customers; protocol assignments; benchmarks; reserved.
        || (a == 100 && (64..128).contains(&b))
        || (a == 192 && b == 0 && c == 0)
        || (a == 198 && (18..20).contains(&b))
        || a >= 240;
    !special
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let segments = address.segments();
    let [first, second, ..] = segments;
    let tail = |from: usize| {
        let [a, b] = [segments.get(from).copied().unwrap_or_default(), segments.get(from + 1).copied().unwrap_or_default()];
        Ipv4Addr::from((u32::from(a) << 16) | u32::from(b))
    };
    // Only global unicast; of that, what leads to an IPv4 address is as good as the address that it leads to.
    match first {
        0x64 if second == 0xff9b => is_public_v4(tail(6)),
        0x2002 => is_public_v4(tail(1)),
        0x2001 if second < 0x200 || second == 0xdb8 => false,
        _ => first & 0xe000 == 0x2000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_address_of_the_inside_is_gone_to_however_it_is_written() {
        let may = |text: &str, allowed: &[IpNet]| may_fetch_from(text.parse().expect(text), allowed);
        for inside in [
            "0.0.0.0",
            "0.1.2.3",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.1",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.168.1.1",
            "198.18.0.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::127.0.0.1",
            "fe80::1",
            "fc00::1",
            "fd12::1",
            "ff02::1",
            "fec0::1",
            "64:ff9b::a00:1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "2002:c0a8:101::1",
            "2001::1",
            "2001:db8::1",
        ] {
            assert!(!may(inside, &[]), "{inside}");
        }
        for public in ["1.1.1.1", "151.101.0.1", "172.32.0.1", "2606:4700::1111", "64:ff9b::101:101", "2002:101:101::1"] {
            assert!(may(public, &[]), "{public}");
        }
        let allowed = ["10.9.0.0/16".parse().expect("net"), "fd12::/64".parse().expect("net")];
        assert!(may("10.9.1.1", &allowed) && may("::ffff:10.9.1.1", &allowed) && may("fd12::5", &allowed));
        assert!(!may("10.8.1.1", &allowed) && !may("127.0.0.1", &allowed));
    }
}
