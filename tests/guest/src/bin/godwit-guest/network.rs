//! Addresses and routes, by rtnetlink messages written by hand: three kinds are all that a guest needs.

use std::io;
use std::net::Ipv4Addr;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const NLM_F_REQUEST_ACK: u16 = 1 | 4;
const NLM_F_CREATE_REPLACE: u16 = 0x400 | 0x100;
const NLMSG_ERROR: u16 = 2;
const AF_INET: u8 = 2;
const IFF_UP: u32 = 1;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_GATEWAY: u16 = 5;

/// Why the network is not up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    /// The kernel knows no such interface.
    #[error("no network interface {name}: {source}")]
    Missing { name: String, source: io::Error },
    /// The kernel refused.
    #[error("{what}: {source}")]
    Refused { what: String, source: io::Error },
}

/// Brings an interface up, with an address.
pub(crate) fn up(name: &str, address: Option<(Ipv4Addr, u8)>, mtu: Option<u32>) -> Result<(), NetworkError> {
    let index = index_of(name)?;
    let refused = |source| NetworkError::Refused { what: format!("setting up {name}"), source };
    if let Some((address, prefix)) = address {
        request(RTM_NEWADDR, &new_address(index, address, prefix)).map_err(refused)?;
    }
    request(RTM_NEWLINK, &link_up(index, mtu)).map_err(refused)
}

/// Takes all interfaces down, as far as they go.
pub(crate) fn all_down() {
    let Ok(interfaces) = std::fs::read_dir("/sys/class/net") else { return };
    for interface in interfaces.flatten() {
        let Ok(index) = index_of(&interface.file_name().to_string_lossy()) else { continue };
        // One that stays up hinders nobody who has not sent by then.
        let _ = request(RTM_NEWLINK, &link_down(index));
    }
}

/// Sends what is not for the own network to `gateway`.
pub(crate) fn default_route(gateway: Ipv4Addr) -> Result<(), NetworkError> {
    request(RTM_NEWROUTE, &new_default_route(gateway))
        .map_err(|source| NetworkError::Refused { what: format!("default route by {gateway}"), source })
}

/// The interface's own Ethernet address.
pub(crate) fn mac_of(name: &str) -> io::Result<[u8; 6]> {
    let text = std::fs::read_to_string(format!("/sys/class/net/{name}/address"))?;
    let octets = text.trim().split(':').map(|octet| u8::from_str_radix(octet, 16)).collect::<Result<Vec<u8>, _>>();
    octets.map_err(io::Error::other)?.try_into().map_err(|_| io::Error::other("no Ethernet address"))
}

pub(crate) fn index_of(name: &str) -> Result<u32, NetworkError> {
    std::fs::read_to_string(format!("/sys/class/net/{name}/ifindex"))
        .and_then(|text| text.trim().parse().map_err(io::Error::other))
        .map_err(|source| NetworkError::Missing { name: name.to_owned(), source })
}

/// `struct ifinfomsg`: family, pad, type, index, flags, change.
fn link_up(index: u32, mtu: Option<u32>) -> Vec<u8> {
    let mut body = vec![0; 4];
    body.extend([index, IFF_UP, IFF_UP].map(u32::to_ne_bytes).concat());
    if let Some(mtu) = mtu {
        attribute(&mut body, IFLA_MTU, mtu.to_ne_bytes());
    }
    body
}

fn link_down(index: u32) -> Vec<u8> {
    let mut body = vec![0; 4];
    body.extend([index, 0, IFF_UP].map(u32::to_ne_bytes).concat());
    body
}

/// `struct ifaddrmsg`: family, prefix length, flags, scope, index.
fn new_address(index: u32, address: Ipv4Addr, prefix: u8) -> Vec<u8> {
    let mut body = vec![AF_INET, prefix, 0, 0];
    body.extend(index.to_ne_bytes());
    attribute(&mut body, IFA_LOCAL, address.octets());
    attribute(&mut body, IFA_ADDRESS, address.octets());
    body
}

/// `struct rtmsg`: family, two prefix lengths, tos, table (main), protocol (boot), scope, type (unicast), flags.
fn new_default_route(gateway: Ipv4Addr) -> Vec<u8> {
    let mut body = vec![AF_INET, 0, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0];
    attribute(&mut body, RTA_GATEWAY, gateway.octets());
    body
}

fn attribute(body: &mut Vec<u8>, kind: u16, value: [u8; 4]) {
    body.extend(8_u16.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
}

/// `struct nlmsghdr` before the body: length, type, flags, sequence, port.
fn message(kind: u16, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(16 + body.len()).expect("a few dozen bytes");
    let flags = NLM_F_REQUEST_ACK | if kind == RTM_NEWLINK { 0 } else { NLM_F_CREATE_REPLACE };
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    message
}

fn request(kind: u16, body: &[u8]) -> io::Result<()> {
    // No protocol is protocol 0, NETLINK_ROUTE.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    send(&socket, &message(kind, body), SendFlags::empty())?;
    let mut answer = [0; 1024];
    let (length, _) = recv(&socket, &mut answer[..], RecvFlags::empty())?;
    match acknowledged(answer.get(..length).unwrap_or_default()) {
        Some(0) => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(-errno)),
        None => Err(io::Error::other("an answer that is no acknowledgement")),
    }
}

/// The error number in an acknowledgement, 0 for success.
fn acknowledged(answer: &[u8]) -> Option<i32> {
    let kind = u16::from_ne_bytes(*answer.get(4..)?.first_chunk()?);
    (kind == NLMSG_ERROR).then_some(())?;
    Some(i32::from_ne_bytes(*answer.get(16..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_the_lengths_that_they_say() {
        for (kind, body, length) in [
            (RTM_NEWLINK, link_up(2, None), 32),
            (RTM_NEWLINK, link_up(2, Some(1450)), 40),
            (RTM_NEWADDR, new_address(2, Ipv4Addr::new(10, 99, 0, 10), 24), 40),
            (RTM_NEWROUTE, new_default_route(Ipv4Addr::new(10, 99, 0, 1)), 36),
        ] {
            let message = message(kind, &body);
            assert_eq!(message.len(), length);
            assert_eq!(message[..4], u32::to_ne_bytes(length as u32));
        }
    }

    #[test]
    fn the_kernel_understands_them() {
        // Port 0 of netlink answers without privileges: the loopback interface may not be changed, but is known.
        let answer = request(RTM_NEWLINK, &link_up(u32::MAX >> 1, None)).unwrap_err();
        assert!(matches!(answer.raw_os_error(), Some(1 | 19)), "{answer}");
    }

    #[test]
    fn acknowledgements() {
        let mut answer = message(NLMSG_ERROR, &(-17_i32).to_ne_bytes());
        assert_eq!(acknowledged(&answer), Some(-17));
        answer.truncate(18);
        assert_eq!(acknowledged(&answer), None);
        assert_eq!(acknowledged(&message(RTM_NEWADDR, &[0; 4])), None);
    }
}
