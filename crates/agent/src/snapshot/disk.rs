//! Reads a disk of a snapshot, which QEMU exports as it was at one instant while the guest writes on, and has its pages written.

use std::io;
use std::os::unix::net::UnixStream;

use godwit_stream::PAGE_SIZE;
use godwit_vault::{Sink, SnapshotWriter};

use super::export::{Disk, DiskError};

/// Bytes whose extents are asked for at once, and that are read at once.
const ASKED: u64 = 256 << 20;
const READ: u64 = 1 << 20;
const PAGE: u64 = PAGE_SIZE as u64;

/// Why a snapshot's disk cannot be taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum TakeDiskError {
    /// It cannot be read.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The vault cannot be written.
    #[error("the snapshot cannot be written")]
    Write(#[source] io::Error),
}

/// Reads an export from its beginning to its end; its pages are those of `space`. How many bytes were read: what QEMU knows to be zeros is not.
///
/// # Errors
/// [`TakeDiskError`]
pub(super) fn take_disk<S: Sink, P: Sink>(
    socket: UnixStream,
    export: &str,
    space: u16,
    writer: &mut SnapshotWriter<S, P>,
) -> Result<u64, TakeDiskError> {
    let (mut disk, size) = Disk::open(socket, export, false)?;
    let (mut at, mut read, mut buffer) = (0, 0, vec![0; READ as usize]);
    // Up to where pages were written: an extent may begin within one.
    let mut next = 0;
    while at < size {
        for extent in disk.extents(at, (size - at).min(ASKED))? {
            let end = (at + u64::from(extent.length)).min(size);
            if !extent.is_zero() {
                let mut from = next.max(at / PAGE * PAGE);
                while from < end {
                    let length = (size - from).min(READ);
                    let content = buffer.get_mut(..length as usize).unwrap_or_default();
                    disk.read(from, content)?;
                    read += length;
                    put(writer, space, from / PAGE, content).map_err(TakeDiskError::Write)?;
                    from += length.next_multiple_of(PAGE);
                }
                next = from;
            }
            at = end;
        }
    }
    disk.close()?;
    Ok(read)
}

/// Writes consecutive pages; the last may be cut.
fn put<S: Sink, P: Sink>(writer: &mut SnapshotWriter<S, P>, space: u16, first: u64, content: &[u8]) -> io::Result<()> {
    for (page, content) in (first..).zip(content.chunks(PAGE_SIZE)) {
        let mut whole = [0; PAGE_SIZE];
        whole[..content.len()].copy_from_slice(content);
        writer.page(space, u32::try_from(page).map_err(|_| io::ErrorKind::FileTooLarge)?, &whole)?;
    }
    Ok(())
}
