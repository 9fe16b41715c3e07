//! Makes a disk what it was in a snapshot: what differs is written, before a VM runs on it.

use std::os::unix::net::UnixStream;

use godwit_stream::PAGE_SIZE;
use godwit_vault::{Contents, ContentsError, Leaf, SpaceKind};

use super::export::{Disk, DiskError};

const PAGE: u64 = PAGE_SIZE as u64;
/// Bytes that are looked at together: those of a leaf.
const PART: u64 = Leaf::PAGES as u64 * PAGE;

/// Why a disk is not what it was.
#[derive(Debug, thiserror::Error)]
pub(super) enum RestoreError {
    /// The snapshot cannot be read.
    #[error(transparent)]
    Contents(#[from] ContentsError),
    /// The disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The snapshot has no such disk.
    #[error("the snapshot has no disk {0}")]
    NoDisk(String),
    /// The disk is too small.
    #[error("the disk has {has} bytes, and had {had} in the snapshot")]
    TooSmall {
        /// Now.
        has: u64,
        /// In the snapshot.
        had: u64,
    },
}

/// Makes the disk that is exported on `socket` what the disk of this name was; how many bytes were written. What it has more than then is zeros.
///
/// # Errors
/// [`RestoreError`]; it may be half of each then.
pub(super) fn restore(socket: UnixStream, export: &str, contents: &mut Contents, name: &str) -> Result<u64, RestoreError> {
    let is_it = |space: &godwit_vault::Space| space.kind == SpaceKind::Disk && space.name == name;
    let space = contents.spaces().iter().position(is_it).ok_or_else(|| RestoreError::NoDisk(name.to_owned()))?;
    let pages = contents.spaces().get(space).map_or(0, |space| space.pages);
    let space = u16::try_from(space).unwrap_or(u16::MAX);
    let (mut disk, size) = Disk::open(socket, export, true)?;
    let had = u64::from(pages) * PAGE;
    // The last page may be beyond the end of a disk that is no multiple of it.
    if had > size.next_multiple_of(PAGE) {
        return Err(RestoreError::TooSmall { has: size, had });
    }
    let (mut written, mut zeros) = (0, Zeros::default());
    let (mut before, mut after) = (vec![0; PART as usize], vec![0; PART as usize]);
    let mut at = 0;
    while at < size {
        let length = (size - at).min(PART);
        let (before, after) = (&mut before[..length as usize], &mut after[..length as usize]);
        let is_zero_after = fill(contents, space, at, after)?;
        let is_zero_before = zeros.hold(&mut disk, at, length, size)?;
        if is_zero_before {
            before.fill(0);
        } else if is_zero_after {
            disk.write_zeroes(at, u32::try_from(length).unwrap_or(u32::MAX))?;
            at += length;
            continue;
        } else {
            disk.read(at, before)?;
        }
        written += write_difference(&mut disk, at, before, after)?;
        at += length;
    }
    disk.flush()?;
    disk.close()?;
    Ok(written)
}

/// What a part was; whether that is zeros.
fn fill(contents: &mut Contents, space: u16, at: u64, part: &mut [u8]) -> Result<bool, ContentsError> {
    part.fill(0);
    let first = u32::try_from(at / PAGE).unwrap_or(u32::MAX);
    let located: Vec<u32> = contents.located(space, first)?.collect();
    for page in &located {
        let from = (page - first) as usize * PAGE_SIZE;
        if let (Some(content), Some(room)) = (contents.page(space, *page)?, part.get_mut(from..)) {
            let length = room.len().min(PAGE_SIZE);
            room[..length].copy_from_slice(&content[..length]);
        }
    }
    Ok(located.is_empty())
}

fn write_difference(disk: &mut Disk, at: u64, before: &[u8], after: &[u8]) -> Result<u64, DiskError> {
    let pages = || before.chunks(PAGE_SIZE).zip(after.chunks(PAGE_SIZE)).map(|(before, after)| before != after);
    let (mut written, mut run) = (0, None);
    for (page, differs) in (0..).zip(pages().chain([false])) {
        match (differs, run) {
            (true, None) => run = Some(page),
            (false, Some(first)) => {
                let (from, to) = (first * PAGE_SIZE, (page * PAGE_SIZE).min(after.len()));
                disk.write(at + from as u64, &after[from..to])?;
                written += (to - from) as u64;
                run = None;
            }
            _ => {}
        }
    }
    Ok(written)
}

/// What QEMU says of which parts of a disk are zeros, asked for piece by piece.
#[derive(Default)]
struct Zeros {
    /// Up to where it is known, and where the last part that is not zeros ends, and the next begins.
    known: u64,
    data: Vec<(u64, u64)>,
}

impl Zeros {
    /// Bytes that are asked for at once.
    const ASKED: u64 = 256 << 20;

    /// Whether a part is zeros, as far as QEMU knows. Parts are asked for in order.
    fn hold(&mut self, disk: &mut Disk, at: u64, length: u64, size: u64) -> Result<bool, DiskError> {
        while self.known < at + length {
            let from = self.known;
            for extent in disk.extents(from, (size - from).min(Self::ASKED))? {
                let end = self.known + u64::from(extent.length);
                if !extent.is_zero() {
                    self.data.push((self.known, end));
                }
                self.known = end;
            }
            if self.known == from {
                return Err(DiskError::Unasked);
            }
        }
        self.data.retain(|(_, end)| *end > at);
        Ok(self.data.iter().all(|(begin, _)| *begin >= at + length))
    }
}
