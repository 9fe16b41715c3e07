//! What passes a host's interface, without what its guests send and receive.

use anyhow::{Context, Result};
use godwit_lab::in_namespace;

/// The interface at the lab's link.
const LINK: &str = "eth0";
/// The interface of the guests' network.
pub(super) const OVERLAY: &str = "gwvx1";
/// Ethernet, IPv4, UDP and VXLAN around each frame of a guest.
const AROUND: u64 = 14 + 20 + 8 + 8;

/// Bytes that have passed the link of the host in this namespace, both ways, without guests' frames.
pub(super) fn passed(namespace: &str) -> Result<u64> {
    let read = || std::fs::read_to_string("/proc/thread-self/net/dev");
    let text = in_namespace(namespace, read)?.context("read the interfaces")?;
    let link = counters(&text, LINK).with_context(|| format!("no {LINK} in {namespace}"))?;
    let guests = counters(&text, OVERLAY).map_or(0, |counters| counters.bytes + AROUND * counters.frames);
    Ok(link.bytes.saturating_sub(guests))
}

#[derive(Debug, PartialEq, Eq)]
struct Counters {
    bytes: u64,
    frames: u64,
}

/// Received and sent, of an interface in the text of `/proc/net/dev`.
fn counters(text: &str, interface: &str) -> Option<Counters> {
    let of_interface = |line: &str| line.split_once(':').is_some_and(|(name, _)| name.trim() == interface);
    let (_, fields) = text.lines().find(|line| of_interface(line))?.split_once(':')?;
    let fields: Vec<u64> = fields.split_whitespace().map_while(|field| field.parse().ok()).collect();
    Some(Counters { bytes: fields.first()? + fields.get(8)?, frames: fields.get(1)? + fields.get(9)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directions_are_counted() {
        let text = "Inter-|   Receive |  Transmit\n face |bytes packets errs\n    lo: 1 2 0 0 0 0 0 0 3 4 0 0 0 0 0 0\n\
                    eth0:  100 3 0 0 0 0 0 0 2000 40 0 0 0 0 0 0\n";
        assert_eq!(counters(text, "eth0"), Some(Counters { bytes: 2100, frames: 43 }));
        assert_eq!(counters(text, "eth1"), None);
    }
}
