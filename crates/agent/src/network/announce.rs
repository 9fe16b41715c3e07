//! Announcements: frames that say "this address is here now", from which bridges, switches and VXLANs of other hosts learn.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use godwit_model::MacAddress;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// Pauses before the repetitions: the first may be lost, and what learned from it may still hear a late frame from the old place.
pub(super) const PAUSES: [Duration; 6] = [
    Duration::ZERO,
    Duration::from_millis(50),
    Duration::from_millis(150),
    Duration::from_millis(300),
    Duration::from_millis(600),
    Duration::from_millis(1_000),
];

/// RARP, "who am I", as QEMU's own announcement: understood by every bridge, answered by nobody.
pub(super) fn frame(mac: MacAddress) -> [u8; 60] {
    let mut frame = [0; 60];
    let mut at = 0;
    let mut put = |bytes: &[u8]| {
        for (to, from) in frame.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
        at += bytes.len();
    };
    put(&[0xff; 6]);
    put(&mac.0);
    // RARP; Ethernet and IPv4 with their lengths; request reverse.
    put(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    put(&mac.0);
    put(&[0; 4]);
    put(&mac.0);
    frame
}

/// A socket that sends whole frames on one interface and receives nothing.
pub(super) fn open_sender(interface: u32) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    bind(&socket, interface)?;
    Ok(socket)
}

#[expect(unsafe_code, reason = "rustix has no addresses of packet sockets")]
fn bind(socket: &OwnedFd, interface: u32) -> io::Result<()> {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        // No protocol: nothing is received.
        sll_protocol: 0,
        sll_ifindex: interface.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the descriptor is open, and the pointer is to a live value of the length given beside it.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_is_a_broadcast_from_the_address_itself() {
        let frame = frame(MacAddress([0x52, 0x54, 0, 1, 2, 3]));
        assert_eq!(frame[..14], [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0, 1, 2, 3, 0x80, 0x35]);
        assert_eq!(frame[14..42].iter().filter(|byte| **byte == 0x54).count(), 2, "sender and target are the address");
        assert_eq!(frame[42..], [0; 18]);
    }
}
