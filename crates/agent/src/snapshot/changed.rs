//! What has changed on a disk, as QEMU's dirty bitmaps say. It may say more than that, never less.

use std::ops::Range;
use std::os::unix::net::UnixStream;

use godwit_model::Bytes;
use godwit_nbd::dirty_bitmap;
use serde::{Deserialize, Serialize};

use super::export::{Disk, DiskError};

/// Bytes that are asked for at once.
const ASKED: u64 = 1 << 30;
/// Parts that are kept, of all disks of a VM; in a message each takes some forty bytes.
const MOST: usize = 64 << 10;

/// Parts of a disk of this size.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Changed {
    pub(crate) size: Bytes,
    /// Ascending, none touches the next.
    parts: Vec<Range<u64>>,
}

impl Changed {
    /// Reads what the bitmap of an exported disk says.
    ///
    /// # Errors
    /// [`DiskError`]
    pub(super) fn read(socket: UnixStream, export: &str, bitmap: &str) -> Result<Self, DiskError> {
        let (mut disk, size) = Disk::open(socket, export, &dirty_bitmap(bitmap), false)?;
        let changed = Self::read_from(&mut disk, size)?;
        // What was written, and has not changed, is on the disk also if QEMU is ended now.
        disk.flush()?;
        disk.close()?;
        Ok(changed)
    }

    /// The same of a disk that was opened with its bitmap.
    pub(super) fn read_from(disk: &mut Disk, size: u64) -> Result<Self, DiskError> {
        let (mut parts, mut at) = (Vec::<Range<u64>>::new(), 0);
        while at < size {
            for extent in disk.extents(at, (size - at).min(ASKED))? {
                let end = (at + u64::from(extent.length)).min(size);
                match parts.last_mut() {
                    _ if !extent.is_dirty() => {}
                    Some(last) if last.end == at => last.end = end,
                    _ => parts.push(at..end),
                }
                at = end;
            }
        }
        Ok(Self { size: Bytes(size), parts })
    }

    /// With so many parts at most, of `disks` disks together: those that are near to each other become one.
    pub(super) fn few(mut self, disks: usize) -> Self {
        let (most, mut gap) = ((MOST / disks.max(1)).max(1), 64 << 10);
        while self.parts.len() > most {
            self.parts = self.parts.into_iter().fold(Vec::new(), |mut parts: Vec<Range<u64>>, part| {
                match parts.last_mut() {
                    Some(last) if part.start - last.end <= gap => last.end = part.end,
                    _ => parts.push(part),
                }
                parts
            });
            gap = gap.saturating_mul(2);
        }
        self
    }

    /// Bytes of it.
    pub(crate) fn bytes(&self) -> Bytes {
        let lengths = self.parts.iter().map(|part| part.end.saturating_sub(part.start));
        Bytes(lengths.fold(0, u64::saturating_add))
    }

    /// What of it is in a part of the disk; its borders are made multiples of `unit`.
    pub(super) fn within(&self, part: &Range<u64>, unit: u64) -> Vec<Range<u64>> {
        let first = self.parts.partition_point(|known| known.end.next_multiple_of(unit) <= part.start);
        let mut found = Vec::<Range<u64>>::new();
        for known in self.parts.iter().skip(first).take_while(|known| known.start < part.end) {
            let start = (known.start / unit * unit).max(part.start);
            let end = known.end.next_multiple_of(unit).min(part.end);
            match found.last_mut() {
                Some(last) if last.end >= start => last.end = end,
                _ => found.push(start..end),
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(parts: &[(u64, u64)]) -> Vec<Range<u64>> {
        parts.iter().map(|(start, end)| *start..*end).collect()
    }

    fn of(parts: &[(u64, u64)]) -> Changed {
        Changed { size: Bytes(1 << 30), parts: ranges(parts) }
    }

    #[test]
    fn parts_are_cut_at_borders_and_never_too_small() {
        let changed = of(&[(0, 10), (90, 110), (195, 196), (299, 301)]);
        for (part, wanted) in [
            (0..100, ranges(&[(0, 10), (90, 100)])),
            (100..200, ranges(&[(100, 110), (190, 200)])),
            (200..300, ranges(&[(290, 300)])),
            (300..400, ranges(&[(300, 310)])),
            (400..500, vec![]),
        ] {
            assert_eq!(changed.within(&part, 10), wanted, "{part:?}");
        }
        // Those that touch once they are rounded are one, and an end that is rounded reaches into the next part.
        assert_eq!(of(&[(1, 2), (5, 6), (18, 19)]).within(&(0..100), 10), ranges(&[(0, 20)]));
        assert_eq!(of(&[(95, 99)]).within(&(100..200), 10), vec![]);
    }

    #[test]
    fn fewer_parts_have_all_that_more_had() {
        let many: Vec<_> = (0..3 * MOST as u64).map(|part| (part << 20, (part << 20) + (64 << 10))).collect();
        let few = of(&many).few(2);
        assert!(few.parts.len() <= MOST / 2 && few.bytes().get() < 4 * MOST as u64 * (1 << 20));
        assert!(few.parts.windows(2).all(|pair| pair[0].end < pair[1].start));
        for (start, end) in &many {
            let at = few.parts.partition_point(|known| known.end < *end);
            assert!(few.parts[at].start <= *start, "{start}");
        }
        assert_eq!(of(&many[..9]).few(1).parts, ranges(&many[..9]));
    }
}
