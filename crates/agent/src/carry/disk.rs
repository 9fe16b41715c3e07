//! A disk that travels: a lane of its own, with a process of its own on either side.
//!
//! ```text
//!             reads what is there ┌───────┐                 ┌───────┐
//!   source's QEMU ◀───── NBD ─────│ carry │═════ frames ═══▶│ carry │───── NBD ────▶ destination's QEMU
//!           └── mirror: NBD ─────▶└───────┘                 └───────┘  writes
//! ```
//! What is on the disk when the move begins carry reads itself ([`out`]); what the guest writes meanwhile QEMU's mirror brings to it. At the destination
//! ([`into`]) both are written in the order in which they were sent. A write of the mirror is done, for the source's QEMU, when it waits here: it is
//! proven to have arrived only by the acknowledgement of the end, and before that the destination has no disk to run on.

pub(super) mod into;
pub(super) mod out;

use std::io;

use bytes::BytesMut;
use godwit_carrier::pages::PAGE_SIZE;
use godwit_nbd::{Extent, Malformed};
use rustix::io::Errno;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

/// The block that a disk's pages are of.
pub(super) const BLOCK: u16 = 0;
/// What QEMU is asked to copy and to compare at least.
pub(super) const GRANULE: u32 = 64 << 10;
/// Pages of that.
pub(super) const GRANULE_PAGES: u32 = GRANULE / PAGE_SIZE as u32;
/// Most pages that are compared at once: what one NBD request reads.
pub(super) const MOST_CHUNK_PAGES: u32 = godwit_nbd::MAX_DATA / PAGE_SIZE as u32;
/// About so many chunks a disk is compared in: a digest is kept for each.
const CHUNKS: u32 = 1 << 20;
/// Extents are asked for so many bytes at once.
pub(super) const WINDOW: u64 = 256 << 20;

/// Why the disk cannot travel.
#[derive(Debug, thiserror::Error)]
pub(super) enum DiskError {
    #[error("QEMU's NBD is not understood: {0}")]
    Nbd(#[from] Malformed),
    #[error("the connection to QEMU's disk failed: {0}")]
    Socket(#[from] io::Error),
    #[error("QEMU closed the connection to its disk")]
    Closed,
    #[error("the disk cannot be {what}: {}", io::Error::from(Errno::from_raw_os_error(i32::try_from(*.error).unwrap_or(5))))]
    Disk { what: &'static str, error: u32 },
    #[error("the disk has {here} pages here and {there} at the other host")]
    Size { here: u32, there: u32 },
    #[error("QEMU's mirror writes {length} bytes at {offset}, which is no page of the disk")]
    Unaligned { offset: u64, length: u64 },
    #[error("QEMU's mirror ended before the disk was there")]
    TooSoon,
    #[error("the disk is too large to travel")]
    TooLarge,
    #[error("the peer's pages cannot be applied: {0}")]
    Apply(String),
    #[error("an image is another here than at the source: one of the disks is damaged. This host forgets its copy: try again")]
    Image([u8; 32]),
    #[error("the peer sent {0}, which is not its part")]
    Unexpected(&'static str),
}

/// Pages of a disk of `size` bytes, the last of which may be a part of one.
pub(super) fn pages_of(size: u64) -> Result<u32, DiskError> {
    u32::try_from(size.div_ceil(PAGE_SIZE as u64)).map_err(|_| DiskError::TooLarge)
}

/// In chunks of how many pages a disk is compared.
pub(super) fn chunk_pages(pages: u32) -> u32 {
    pages.div_ceil(CHUNKS).next_power_of_two().clamp(GRANULE_PAGES, MOST_CHUNK_PAGES)
}

/// Whether a peer may ask for chunks of so many pages.
pub(super) fn is_chunk(pages: u32) -> bool {
    pages.is_power_of_two() && (GRANULE_PAGES..=MOST_CHUNK_PAGES).contains(&pages)
}

/// Ranges of a disk, from the first byte to before the last, in their order.
#[derive(Debug, Default)]
struct Ranges(Vec<(u64, u64)>);

impl Ranges {
    /// Extents of which something is true.
    fn of(mut at: u64, extents: &[Extent], is: fn(Extent) -> bool) -> Self {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for extent in extents {
            let end = at + u64::from(extent.length);
            match ranges.last_mut() {
                _ if !is(*extent) => {}
                Some((_, last)) if *last == at => *last = end,
                _ => ranges.push((at, end)),
            }
            at = end;
        }
        Self(ranges)
    }

    /// The first range that ends behind `at`.
    fn from(&self, at: u64) -> Option<(u64, u64)> {
        self.0.get(self.0.partition_point(|(_, end)| *end <= at)).copied()
    }

    fn are_all(&self, at: u64, length: u64) -> bool {
        self.from(at).is_some_and(|(first, end)| first <= at && at + length <= end)
    }

    fn is_any(&self, at: u64, length: u64) -> bool {
        self.from(at).is_some_and(|(first, _)| first < at + length)
    }

    /// One range more, wherever it is.
    fn add(&mut self, mut first: u64, mut end: u64) {
        let from = self.0.partition_point(|(_, other)| *other < first);
        let to = self.0.partition_point(|(other, _)| *other <= end);
        for (other, other_end) in self.0.drain(from..to.max(from)) {
            (first, end) = (first.min(other), end.max(other_end));
        }
        self.0.insert(from, (first, end));
    }
}

/// Reads what there is; `false` at the end.
fn try_read(socket: &UnixStream, into: &mut BytesMut, most: usize) -> io::Result<Option<bool>> {
    into.reserve(most);
    match socket.try_read_buf(into) {
        Ok(0) => Ok(Some(false)),
        Ok(_) => Ok(Some(true)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe) => Ok(Some(false)),
        Err(error) => Err(error),
    }
}

/// Writes all that is due.
async fn write_due(socket: &mut UnixStream, due: &mut BytesMut) -> io::Result<()> {
    if !due.is_empty() {
        socket.write_all(due).await?;
        due.clear();
    }
    Ok(())
}

#[cfg(test)]
mod tests;
