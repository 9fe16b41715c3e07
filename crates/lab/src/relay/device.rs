//! The relay's tap and its sending socket: the few kernel calls that rustix has no safe form of.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags, open};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};

use super::{MARK, RelayError};

/// A virtio header, an Ethernet header and the largest packet.
pub(super) const FRAME_MAX: usize = 10 + 18 + 65_535;

/// Room for what waits in the qdisc of the interface: `tbf` bounds it long before.
const SEND_BUFFER: usize = 64 << 20;

/// Makes a tap that hands out frames with a virtio header; with `segments`, also ones yet to be cut into packets.
pub(super) fn open_tap(name: &str, segments: bool) -> Result<OwnedFd, RelayError> {
    let failed = |source: io::Error| RelayError::Tap { name: name.to_owned(), source };
    let request = interface_request(name)?;
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let tap = open("/dev/net/tun", flags, Mode::empty()).map_err(|error| failed(error.into()))?;
    let offload =
        if segments { libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN } else { libc::TUN_F_CSUM };
    attach_tap(&tap, &request, offload).map_err(failed)?;
    Ok(tap)
}

/// A socket that sends frames with a virtio header, and the relay's mark, on one interface; it receives nothing.
pub(super) fn open_sender(name: &str) -> Result<OwnedFd, RelayError> {
    let failed = |source: io::Error| RelayError::Sender { name: name.to_owned(), source };
    let make = || {
        let index = rustix::net::netdevice::name_to_index(
            socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?,
            name,
        )?;
        let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        sockopt::set_socket_send_buffer_size_force(&socket, SEND_BUFFER)?;
        bind_sender(&socket, index)?;
        Ok::<_, io::Error>(socket)
    };
    make().map_err(failed)
}

/// `struct ifreq` for a tap without packet information and with virtio headers.
fn interface_request(name: &str) -> Result<libc::ifreq, RelayError> {
    let good = (1..libc::IFNAMSIZ).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if !good {
        return Err(RelayError::InterfaceName { name: name.to_owned() });
    }
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    // The flags have 16 bits in this structure.
    let ifr_ifru = libc::__c_anonymous_ifr_ifru { ifru_flags: flags as i16 };
    Ok(libc::ifreq { ifr_name, ifr_ifru })
}

#[expect(unsafe_code, reason = "rustix has no ioctls of taps")]
fn attach_tap(tap: &OwnedFd, request: &libc::ifreq, offload: u32) -> io::Result<()> {
    // SAFETY: the descriptor is open; TUNSETIFF reads and writes one `struct ifreq`, of which this is a copy;
    // TUNSETOFFLOAD takes flags, not a pointer.
    unsafe {
        let mut request = *request;
        check(libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request))?;
        check(libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offload)))
    }
}

#[expect(unsafe_code, reason = "rustix has no addresses and options of packet sockets")]
fn bind_sender(socket: &OwnedFd, index: u32) -> io::Result<()> {
    let on: c_int = 1;
    let mark = MARK;
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        // No protocol: nothing is received.
        sll_protocol: 0,
        sll_ifindex: index.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let int = size_of::<c_int>() as libc::socklen_t;
    let fd = socket.as_raw_fd();
    // SAFETY: the descriptor is open, and every pointer is to a live value of the size given beside it.
    unsafe {
        check(libc::setsockopt(fd, libc::SOL_PACKET, libc::PACKET_VNET_HDR, (&raw const on).cast(), int))?;
        check(libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_MARK, (&raw const mark).cast(), int))?;
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        check(libc::bind(fd, (&raw const address).cast(), length))
    }
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
