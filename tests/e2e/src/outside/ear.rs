//! An ear in a host's namespace: hears the records that guests send there before they go through the host's link.
//!
//! A runner on a host whose link is cut is not heard outside; here it is.

use std::time::Duration;

use anyhow::{Context, Result};
use godwit_lab::in_namespace;
use rustix::net::{AddressFamily, SocketFlags, SocketType, eth, socket_with};
use socket2::{SockFilter, Socket};

use super::WITNESS_PORT;

const ETHERNET: usize = 14;
const UDP: usize = 8;

/// A socket that gets every frame of the namespace that carries a record.
pub(super) fn open(namespace: &str) -> Result<Socket> {
    let open = || socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC, Some(eth::ALL));
    let socket = Socket::from(in_namespace(namespace, open)?.with_context(|| format!("listen to frames in {namespace}"))?);
    socket.attach_filter(&records_only()).context("filter frames")?;
    // What came before the filter was there, or does not pass it, ends here at the latest.
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    Ok(socket)
}

/// The datagram in a frame that passed the filter.
pub(super) fn datagram(frame: &[u8]) -> Option<&[u8]> {
    let header = 4 * usize::from(frame.get(ETHERNET)? & 0xf);
    let ip = frame.get(ETHERNET..)?;
    let udp = ip.get(header..)?;
    let length = usize::from(u16::from_be_bytes([*udp.get(4)?, *udp.get(5)?]));
    udp.get(UDP..length)
}

/// Classic BPF: IPv4, UDP, no later fragment, to the witness's port. Migrations pass here too, and must not be copied.
fn records_only() -> [SockFilter; 11] {
    const LOAD_HALF: u16 = 0x28;
    const LOAD_BYTE: u16 = 0x30;
    const LOAD_HALF_AT_X: u16 = 0x48;
    const IP_HEADER_TO_X: u16 = 0xb1;
    const IS: u16 = 0x15;
    const HAS: u16 = 0x45;
    const RETURN: u16 = 0x06;
    [
        SockFilter::new(LOAD_HALF, 0, 0, 12),
        SockFilter::new(IS, 0, 7, 0x0800),
        SockFilter::new(LOAD_BYTE, 0, 0, 23),
        SockFilter::new(IS, 0, 5, 17),
        SockFilter::new(LOAD_HALF, 0, 0, 20),
        SockFilter::new(HAS, 3, 0, 0x1fff),
        SockFilter::new(IP_HEADER_TO_X, 0, 0, 14),
        SockFilter::new(LOAD_HALF_AT_X, 0, 0, 16),
        SockFilter::new(IS, 1, 0, WITNESS_PORT as u32),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_found_in_its_frame() {
        let mut frame = vec![0; ETHERNET];
        frame.extend([0x45, 0, 0, 33]);
        frame.resize(ETHERNET + 20, 0);
        frame.extend([0, 1, 0x27, 0x0f, 0, 13, 0, 0]);
        frame.extend(b"GWIT!and padding");
        assert_eq!(datagram(&frame), Some(b"GWIT!".as_slice()));
        for length in 0..ETHERNET + 20 + UDP + 5 {
            assert_eq!(datagram(&frame[..length]), None, "{length}");
        }
        frame[ETHERNET + 20 + 5] = 3;
        assert_eq!(datagram(&frame), None, "shorter than its own header");
    }
}
