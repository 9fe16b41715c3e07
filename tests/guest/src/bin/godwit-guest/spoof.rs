//! Sends frames that it should not, on request: through a packet socket, past everything that the guest's kernel would put right.

use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};

use godwit_guest::{SPOOF_PORT, SpoofRequest};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::{network, thread};

/// Starts the service for an interface with this address.
pub(crate) fn start(interface: &str, ip: Ipv4Addr) -> io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, SPOOF_PORT))?;
    let mac = network::mac_of(interface)?;
    let sender = open_sender(network::index_of(interface).map_err(io::Error::other)?)?;
    thread("spoof", move || {
        let mut last = None;
        loop {
            let mut datagram = [0; 64];
            let Ok((length, from)) = socket.recv_from(&mut datagram) else { continue };
            let text = String::from_utf8_lossy(datagram.get(..length).unwrap_or_default()).into_owned();
            let answer = match text.parse::<SpoofRequest>() {
                Ok(request) if last == Some(request.number) => text,
                Ok(request) => {
                    let frame = request.spoof.frame(mac, ip);
                    let sent = (0..request.count).all(|_| rustix::io::write(&sender, &frame).is_ok_and(|sent| sent == frame.len()));
                    last = Some(request.number);
                    if sent { text } else { "failed".to_owned() }
                }
                Err(()) => "?".to_owned(),
            };
            // Whoever asked asks again if this is lost.
            let _ = socket.send_to(answer.as_bytes(), from);
        }
    })
}

/// A socket that sends whole frames on one interface and receives nothing.
fn open_sender(interface: u32) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
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
