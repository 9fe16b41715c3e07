//! Reads a disk of a snapshot, which QEMU exports as it was at one instant while the guest writes on, and has its pages written.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::net::UnixStream;

use godwit_nbd::{ALLOCATION, dirty_bitmap};
use godwit_qemu::since::CHANGED;
use godwit_stream::PAGE_SIZE;
use godwit_vault::{Earlier, Leaf, Sink, SnapshotWriter};

use super::changed::Changed;
use super::export::{Disk, DiskError};

/// Bytes whose extents are asked for at once, and that are read at once.
const ASKED: u64 = 256 << 20;
const READ: u64 = 1 << 20;
const PAGE: u64 = PAGE_SIZE as u64;
/// Bytes of a leaf.
const PART: u64 = Leaf::PAGES as u64 * PAGE;

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
    let (mut disk, size) = Disk::open(socket, export, ALLOCATION, false)?;
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

/// Reads of an export what has changed since a snapshot in which the disk is the space `of`, and takes all else over from there; as [`take_disk`].
///
/// A page that has not changed is in the earlier snapshot what it is now: its bitmap began in the instant of that one, has every write since, and stands still since the instant of this one. What
/// cannot be read of the earlier snapshot is read from the disk.
///
/// # Errors
/// [`TakeDiskError`]
pub(super) fn take_changes<S: Sink, P: Sink>(
    socket: UnixStream,
    export: &str,
    space: u16,
    writer: &mut SnapshotWriter<S, P>,
    (earlier, of): (&mut Earlier<File>, u16),
) -> Result<u64, TakeDiskError> {
    let (mut disk, size) = Disk::open(socket, export, &dirty_bitmap(CHANGED), false)?;
    let changed = Changed::read_from(&mut disk, size)?;
    let (mut at, mut read, mut buffer) = (0, 0, vec![0; READ as usize]);
    while at < size {
        let part = at..(at + PART).min(size);
        let first = u32::try_from(at / PAGE).map_err(|_| TakeDiskError::Write(io::ErrorKind::FileTooLarge.into()))?;
        let mut looked_at = changed.within(&part, PAGE);
        match earlier.leaf(of, first) {
            Ok(leaf) => {
                let is_changed = |page: u32| {
                    let at = at + u64::from(page) * PAGE;
                    looked_at.iter().any(|part: &Range<u64>| part.contains(&at))
                };
                for (page, located) in leaf.located().filter(|(page, _)| !is_changed(*page)) {
                    writer.take_over(space, first + page, earlier, located).map_err(TakeDiskError::Write)?;
                }
            }
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "a part of an earlier snapshot cannot be read: the disk is"
                );
                looked_at = vec![part.clone()];
            }
        }
        for piece in looked_at {
            let mut from = piece.start;
            while from < piece.end {
                let length = (piece.end - from).min(READ);
                let content = buffer.get_mut(..length as usize).unwrap_or_default();
                disk.read(from, content)?;
                read += length;
                put_since(writer, space, from / PAGE, content, (&mut *earlier, of)).map_err(TakeDiskError::Write)?;
                from += length;
            }
        }
        at = part.end;
    }
    disk.close()?;
    Ok(read)
}

/// Writes consecutive pages; the last may be cut.
fn put<S: Sink, P: Sink>(writer: &mut SnapshotWriter<S, P>, space: u16, first: u64, content: &[u8]) -> io::Result<()> {
    whole_pages(first, content, |page, content| writer.page(space, page, content).map(drop))
}

/// The same of pages that may be differences to what the space `of` of an earlier snapshot has.
fn put_since<S: Sink, P: Sink>(
    writer: &mut SnapshotWriter<S, P>,
    space: u16,
    first: u64,
    content: &[u8],
    (earlier, of): (&mut Earlier<File>, u16),
) -> io::Result<()> {
    whole_pages(first, content, |page, content| writer.page_since(space, page, content, (&mut *earlier, of)).map(drop))
}

fn whole_pages(first: u64, content: &[u8], mut each: impl FnMut(u32, &[u8; PAGE_SIZE]) -> io::Result<()>) -> io::Result<()> {
    for (page, content) in (first..).zip(content.chunks(PAGE_SIZE)) {
        let mut whole = [0; PAGE_SIZE];
        whole[..content.len()].copy_from_slice(content);
        each(u32::try_from(page).map_err(|_| io::ErrorKind::FileTooLarge)?, &whole)?;
    }
    Ok(())
}
