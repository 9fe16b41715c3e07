//! Frames that a well-behaved guest never sends: each claims to be somebody or something that it is not.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// What every such frame carries, followed by its kind and a line end: a listener knows it wherever it comes from.
pub const SPOOF_MARK: &str = "godwit-spoof ";

/// Most frames that one request may ask for.
pub const MOST_SPOOFS: u16 = 1_000;

/// What a frame claims.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spoof {
    /// Another source MAC address.
    Mac,
    /// Another sender address in an ARP answer.
    Arp,
    /// Another IPv4 source address.
    Source,
    /// Another IPv6 address in a neighbour advertisement.
    Neighbour,
    /// That this guest is a router.
    Router,
    /// That this guest is a DHCP server.
    Dhcp,
    /// A VLAN.
    Vlan,
    /// Nothing wrong: the control.
    Honest,
}

impl Spoof {
    /// All of them, the honest one last.
    pub const ALL: [Self; 8] =
        [Self::Mac, Self::Arp, Self::Source, Self::Neighbour, Self::Router, Self::Dhcp, Self::Vlan, Self::Honest];

    /// Its word.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Mac => "mac",
            Self::Arp => "arp",
            Self::Source => "source",
            Self::Neighbour => "neighbour",
            Self::Router => "router",
            Self::Dhcp => "dhcp",
            Self::Vlan => "vlan",
            Self::Honest => "honest",
        }
    }

    /// The frame, from an interface with these addresses, to everybody.
    #[must_use]
    pub fn frame(self, mac: [u8; 6], ip: Ipv4Addr) -> Vec<u8> {
        const ALL_HOSTS: [u8; 6] = [0xff; 6];
        let mark = format!("{SPOOF_MARK}{}\n", self.word()).into_bytes();
        let [a, b, c, d] = ip.octets();
        let other = Ipv4Addr::new(a, b, c, d ^ 0x40);
        let plain = |from, source, ports| ethernet(ALL_HOSTS, from, &[0x08, 0x00], &ipv4(source, ports, &mark));
        match self {
            Self::Mac => plain([mac[0], mac[1], mac[2], mac[3], mac[4], mac[5] ^ 0x40], ip, (9_998, 9_998)),
            Self::Source => plain(mac, other, (9_998, 9_998)),
            Self::Dhcp => plain(mac, ip, (67, 68)),
            Self::Honest => plain(mac, ip, (9_998, 9_998)),
            Self::Vlan => {
                let inner = [&[0x00, 20, 0x08, 0x00], ipv4(ip, (9_998, 9_998), &mark).as_slice()].concat();
                ethernet(ALL_HOSTS, mac, &[0x81, 0x00], &inner)
            }
            Self::Arp => {
                // Ethernet and IPv4 with their lengths, an answer; sender; target.
                let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 2];
                arp.extend(mac);
                arp.extend(other.octets());
                arp.extend(ALL_HOSTS);
                arp.extend(ip.octets());
                arp.extend(mark);
                ethernet(ALL_HOSTS, mac, &[0x08, 0x06], &arp)
            }
            Self::Neighbour => {
                // Advertisement, override; the target is somebody else.
                let mut message = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
                message.extend([0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x66]);
                message.extend(mark);
                icmpv6(mac, message)
            }
            Self::Router => {
                // Advertisement: hop limit 64, lifetime half an hour.
                let mut message = vec![134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
                message.extend(mark);
                icmpv6(mac, message)
            }
        }
    }
}

impl fmt::Display for Spoof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A request: `KIND COUNT NUMBER`. One that comes again with its number is answered and not carried out again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpoofRequest {
    /// Which frames.
    pub spoof: Spoof,
    /// How many.
    pub count: u16,
    /// Tells it from others.
    pub number: u64,
}

impl FromStr for SpoofRequest {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut words = text.split_whitespace();
        let (Some(kind), Some(count), Some(number), None) = (words.next(), words.next(), words.next(), words.next()) else {
            return Err(());
        };
        let spoof = Spoof::ALL.into_iter().find(|spoof| spoof.word() == kind).ok_or(())?;
        let count = count.parse().ok().filter(|count| *count <= MOST_SPOOFS).ok_or(())?;
        Ok(Self { spoof, count, number: number.parse().map_err(drop)? })
    }
}

impl fmt::Display for SpoofRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.spoof, self.count, self.number)
    }
}

fn ethernet(to: [u8; 6], from: [u8; 6], kind: &[u8; 2], content: &[u8]) -> Vec<u8> {
    let mut frame = [to.as_slice(), &from, kind, content].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

fn bytes_of(length: usize) -> [u8; 2] {
    u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes()
}

/// UDP without a checksum, to everybody.
fn ipv4(source: Ipv4Addr, (from, to): (u16, u16), content: &[u8]) -> Vec<u8> {
    let udp = [&from.to_be_bytes(), &to.to_be_bytes(), &bytes_of(8 + content.len()), [0; 2].as_slice(), content].concat();
    let mut packet = vec![0x45, 0];
    packet.extend(bytes_of(20 + udp.len()));
    packet.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    packet.extend(source.octets());
    packet.extend([0xff; 4]);
    let sum = checksum(&packet);
    packet.splice(10..12, sum);
    packet.extend(udp);
    packet
}

/// A message from the interface's own link-local address to all nodes.
fn icmpv6(mac: [u8; 6], mut message: Vec<u8>) -> Vec<u8> {
    let [a, b, c, d, e, f] = mac;
    let addresses: [[u8; 16]; 2] =
        [[0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f], [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]];
    let length = bytes_of(message.len());
    let sum = checksum(&[addresses.concat().as_slice(), &[0, 0], &length, &[0, 0, 0, 58], &message].concat());
    message.splice(2..4, sum);
    let packet = [&[0x60, 0, 0, 0], length.as_slice(), &[58, 255], addresses.concat().as_slice(), &message].concat();
    ethernet([0x33, 0x33, 0, 0, 0, 1], mac, &[0x86, 0xdd], &packet)
}

/// The ones' complement sum of the Internet protocols.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.chunks(2).map(|pair| match pair {
        [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
        [high] => u32::from(*high) << 8,
        _ => 0,
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).unwrap_or(0)).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
    const IP: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 10);

    #[test]
    fn each_frame_carries_its_mark_and_only_one_lies_about_its_source() {
        for spoof in Spoof::ALL {
            let frame = spoof.frame(MAC, IP);
            let mark = format!("{SPOOF_MARK}{spoof}\n");
            assert!(frame.windows(mark.len()).any(|window| window == mark.as_bytes()), "{spoof}");
            assert_eq!(frame[6..12] != MAC, spoof == Spoof::Mac, "{spoof}");
            assert!((60..1_500).contains(&frame.len()), "{spoof}");
        }
        assert_eq!(Spoof::Source.frame(MAC, IP)[26..30], [10, 99, 0, 74]);
        assert_eq!(Spoof::Vlan.frame(MAC, IP)[12..16], [0x81, 0, 0, 20]);
        assert_eq!(Spoof::Arp.frame(MAC, IP)[28..32], [10, 99, 0, 74]);
    }

    #[test]
    fn checksums_add_up() {
        let frame = Spoof::Honest.frame(MAC, IP);
        assert_eq!(checksum(&frame[14..34]), [0, 0]);
        assert_eq!(checksum(&[1]), [0xfe, 0xff]);
    }

    #[test]
    fn requests_are_read_as_written_and_bounded() {
        let request = SpoofRequest { spoof: Spoof::Router, count: 5, number: 77 };
        assert_eq!(request.to_string().parse(), Ok(request));
        for bad in ["", "router", "router 5", "router 5 x", "colour 5 1", "router 1001 1", "router 5 1 1", "router -1 1"] {
            assert_eq!(bad.parse::<SpoofRequest>(), Err(()), "{bad}");
        }
    }
}
