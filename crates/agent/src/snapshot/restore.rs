//! Makes a disk what it was in a snapshot: what differs is written, before a VM runs on it.

use std::ops::Range;
use std::os::unix::net::UnixStream;

use godwit_nbd::ALLOCATION;
use godwit_stream::PAGE_SIZE;
use godwit_vault::{Contents, ContentsError, Leaf, Space, SpaceKind};

use super::changed::Changed;
use super::control::Restored;
use super::export::{Disk, DiskError};

const PAGE: u64 = PAGE_SIZE as u64;
/// Bytes that are looked at together: those of a leaf.
const PART: u64 = Leaf::PAGES as u64 * PAGE;
/// Bytes of which it is asked at once whether they are zeros, where all are looked at.
const ASKED: u64 = 256 << 20;

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

/// Makes the disk that is exported on `socket` what the disk of this name was; how many bytes were read and written. What it has more than then is zeros. Where `changed` is known that is written,
/// and nothing read, unless the disk has another size than that says.
///
/// # Errors
/// [`RestoreError`]; it may be half of each then.
pub(super) fn restore(
    socket: UnixStream,
    contents: &mut Contents,
    name: &str,
    changed: Option<&Changed>,
) -> Result<Restored, RestoreError> {
    let (space, pages) = disk_of(contents, name).ok_or_else(|| RestoreError::NoDisk(name.to_owned()))?;
    let (mut disk, size) = Disk::open(socket, name, ALLOCATION, true)?;
    let had = u64::from(pages) * PAGE;
    // The last page may be beyond the end of a disk that is no multiple of it.
    if had > size.next_multiple_of(PAGE) {
        return Err(RestoreError::TooSmall { has: size, had });
    }
    let changed = changed.filter(|changed| changed.size.get() == size);
    let mut zeros = Zeros::default();
    let (mut before, mut after) = (vec![0; PART as usize], vec![0; PART as usize]);
    let (mut restored, mut at) = (Restored::default(), 0);
    while at < size {
        let part = at..(at + PART).min(size);
        at = part.end;
        let pieces = changed.map_or_else(|| vec![part.clone()], |changed| changed.within(&part, PAGE));
        for Range { start, end } in pieces {
            let length = end - start;
            let (before, after) = (&mut before[..length as usize], &mut after[..length as usize]);
            let is_zero_after = fill(contents, space, start, after)?;
            if changed.is_none() && zeros.hold(&mut disk, start, length, size)? {
                before.fill(0);
            } else if is_zero_after {
                disk.write_zeroes(start, u32::try_from(length).unwrap_or(u32::MAX))?;
                continue;
            } else if changed.is_some() {
                disk.write(start, after)?;
                restored.written.0 += length;
                continue;
            } else {
                disk.read(start, before)?;
                restored.read.0 += length;
            }
            restored.written.0 += write_difference(&mut disk, start, before, after)?;
        }
    }
    disk.flush()?;
    disk.close()?;
    Ok(restored)
}

/// The number of a disk's space, and its pages.
pub(super) fn disk_of(contents: &Contents, name: &str) -> Option<(u16, u32)> {
    let mut spaces = (0..).zip(contents.spaces());
    let is_it = |(_, space): &(u16, &Space)| space.kind == SpaceKind::Disk && space.name == name;
    spaces.find(is_it).map(|(number, space)| (number, space.pages))
}

/// What a piece of a part was; whether that is zeros.
pub(super) fn fill(contents: &mut Contents, space: u16, at: u64, piece: &mut [u8]) -> Result<bool, ContentsError> {
    piece.fill(0);
    let first = u32::try_from(at / PAGE).unwrap_or(u32::MAX);
    let pages = first..first.saturating_add(u32::try_from(piece.len().div_ceil(PAGE_SIZE)).unwrap_or(u32::MAX));
    let located: Vec<u32> = contents.located(space, first)?.filter(|page| pages.contains(page)).collect();
    for page in &located {
        let from = (page - first) as usize * PAGE_SIZE;
        if let (Some(content), Some(room)) = (contents.page(space, *page)?, piece.get_mut(from..)) {
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

/// What QEMU says of which parts of a disk are zeros.
#[derive(Default)]
struct Zeros {
    /// Up to where it is known, and where the last part that is not zeros ends, and the next begins.
    known: u64,
    data: Vec<(u64, u64)>,
}

impl Zeros {
    /// Whether a part is zeros, as far as QEMU knows. Parts are asked for in order; some may not be asked for.
    fn hold(&mut self, disk: &mut Disk, at: u64, length: u64, size: u64) -> Result<bool, DiskError> {
        self.known = self.known.max(at);
        while self.known < at + length {
            let from = self.known;
            for extent in disk.extents(from, (size - from).min(ASKED))? {
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
