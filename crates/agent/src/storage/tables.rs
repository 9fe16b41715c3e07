//! Whether a qcow2 file is long enough for what its own tables say is in it. The bytes are hostile; nothing is trusted but the file's length.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::qcow2::Header;

/// Tables of the second level that are read: enough for 512 GiB of disk with the usual clusters. Those furthest back in the file come
/// first, as they are the youngest and point furthest.
const BUDGET: u64 = 64 << 20;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// What tables are read from.
pub(super) trait Source {
    /// Length now.
    fn length(&self) -> io::Result<u64>;
    /// Fills `buffer` from `at`.
    fn read(&self, at: u64, buffer: &mut [u8]) -> io::Result<()>;
}

impl Source for File {
    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buffer, at)
    }
}

/// Why the tables do not fit the file.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unsound {
    /// Something is behind the end.
    #[error("its {what} needs {needed} bytes, the file has {length}")]
    Truncated {
        /// What.
        what: &'static str,
        /// Length that it needs at least.
        needed: u64,
        /// Length that there is.
        length: u64,
    },
    /// An entry that cannot be.
    #[error("its {0} points to where nothing can be")]
    Damaged(&'static str),
    /// The file cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Looks at all tables of the first level and as many of the second as the budget allows.
pub(super) fn check(file: &impl Source, header: &Header) -> Result<(), Unsound> {
    let length = file.length()?;
    let cluster = header.cluster();
    let fits = |what, needed: u64| if needed <= length { Ok(()) } else { Err(Unsound::Truncated { what, needed, length }) };
    fits("refcount table", header.refcount_offset.saturating_add(header.refcount_length))?;
    fits("snapshot table", header.snapshots_offset.map_or(0, |at| at.saturating_add(1)))?;
    let l1 = u64::from(header.l1_entries) * 8;
    fits("L1 table", header.l1_offset.saturating_add(l1))?;

    read_entries(file, header.refcount_offset, header.refcount_length, |block| {
        let at = block & OFFSET;
        if at.is_multiple_of(cluster) {
            fits("refcount block", if at == 0 { 0 } else { at + cluster })
        } else {
            Err(Unsound::Damaged("refcount table"))
        }
    })?;
    // Many entries may point to one table: each is read once, so that the work is bounded by the file.
    let mut tables = BTreeSet::new();
    read_entries(file, header.l1_offset, l1, |entry| {
        let at = entry & OFFSET;
        if !at.is_multiple_of(cluster) {
            return Err(Unsound::Damaged("L1 table"));
        }
        if at != 0 {
            fits("L2 table", at + cluster)?;
            tables.insert(at);
        }
        Ok(())
    })?;

    let compressed_bits = 62 - (header.cluster_bits - 8);
    let in_budget = usize::try_from(BUDGET / cluster).unwrap_or(usize::MAX);
    for table in tables.into_iter().rev().take(in_budget) {
        let mut entry = None;
        read_entries(file, table, cluster, |word| {
            // An extended entry is two words; the second says which parts are there.
            let (word, there) = match (header.extended, entry.take()) {
                (true, None) => {
                    entry = Some(word);
                    return Ok(());
                }
                (true, Some(first)) => (first, word & 0xffff_ffff != 0),
                (false, _) => (word, word & ZERO == 0),
            };
            let at = match word & COMPRESSED {
                0 if there => word & OFFSET,
                0 => 0,
                _ => word & ((1 << compressed_bits) - 1),
            };
            // The last cluster of a file need not be whole.
            fits("data", if at == 0 { 0 } else { at + 1 })
        })?;
    }
    Ok(())
}

/// Hands out the big-endian words of a table.
fn read_entries(
    file: &impl Source,
    at: u64,
    length: u64,
    mut entry: impl FnMut(u64) -> Result<(), Unsound>,
) -> Result<(), Unsound> {
    let mut buffer = vec![0; 64 << 10];
    let mut done = 0;
    while done < length {
        let part = usize::try_from(length - done).unwrap_or(usize::MAX).min(buffer.len());
        let part = buffer.get_mut(..part).unwrap_or_default();
        file.read(at + done, part)?;
        for word in part.chunks_exact(8) {
            entry(u64::from_be_bytes(word.try_into().unwrap_or_default()))?;
        }
        done += part.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    impl Source for Vec<u8> {
        fn length(&self) -> io::Result<u64> {
            Ok(self.len() as u64)
        }

        fn read(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
            let at = usize::try_from(at).map_err(io::Error::other)?;
            let from = self.get(at..).and_then(|rest| rest.get(..buffer.len())).ok_or(io::ErrorKind::UnexpectedEof)?;
            buffer.copy_from_slice(from);
            Ok(())
        }
    }

    fn check_bytes(bytes: Vec<u8>) -> Option<Result<(), Unsound>> {
        Header::parse(&bytes).ok().map(|header| check(&bytes, &header))
    }

    /// Clusters of 512 bytes: header, refcount table, refcount block, L1, L2, data.
    fn sample() -> Vec<u8> {
        let mut bytes = vec![0; 6 * 512];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, b"QFI\xfb\0\0\0\x02");
        put(20, &9_u32.to_be_bytes());
        put(24, &0x8000_u64.to_be_bytes());
        put(36, &1_u32.to_be_bytes());
        put(40, &(3 * 512_u64).to_be_bytes());
        put(48, &512_u64.to_be_bytes());
        put(56, &1_u32.to_be_bytes());
        put(512, &(2 * 512_u64).to_be_bytes());
        put(3 * 512, &((4 * 512_u64) | (1 << 63)).to_be_bytes());
        put(4 * 512, &((5 * 512_u64) | (1 << 63)).to_be_bytes());
        bytes
    }

    #[test]
    fn a_file_cut_anywhere_is_found_truncated() {
        assert!(matches!(check_bytes(sample()), Some(Ok(()))));
        for length in (512..=5 * 512).step_by(512) {
            let bytes = sample()[..length].to_vec();
            assert!(matches!(check_bytes(bytes), Some(Err(Unsound::Truncated { .. }))), "{length} bytes");
        }
    }

    proptest! {
        #[test]
        fn prop_no_bytes_make_it_panic(changes in prop::collection::vec((0_usize..6 * 512, any::<u8>()), 0..40), cut in 0_usize..=6 * 512) {
            let mut bytes = sample();
            for (at, value) in changes {
                bytes[at] = value;
            }
            bytes.truncate(cut);
            let _ = check_bytes(bytes);
        }

        #[test]
        fn prop_no_noise_makes_it_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..2_048)) {
            let _ = check_bytes(bytes.clone());
            let magic = b"QFI\xfb\0\0\0\x03";
            for (to, from) in bytes.iter_mut().zip(magic) {
                *to = *from;
            }
            let _ = check_bytes(bytes);
        }
    }
}
