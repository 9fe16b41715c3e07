//! The header of a qcow2 file, as the chapter on qcow2 of QEMU's interoperability manual describes it. The bytes are hostile: every
//! number is checked before it is used, and whatever refers outside the file is refused.

/// How much of a file's beginning [`Header::parse`] looks at, at most: a header with its extensions fits into the first cluster.
pub(super) const MAX_HEADER: usize = 2 << 20;

const MAGIC: &[u8] = b"QFI\xfb";
const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
const DATA_FILE_EXTENSION: u32 = 0x4441_5441;
/// QEMU's limits.
const MAX_L1: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
const MAX_SNAPSHOTS: u32 = 65_536;

/// What is needed of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Logarithm of the size of a cluster: 9 to 21.
    pub(super) cluster_bits: u32,
    /// Size that the guest sees.
    pub(super) size: u64,
    /// Where the first level of the mapping is.
    pub(super) l1_offset: u64,
    /// Its entries, of 8 bytes.
    pub(super) l1_entries: u32,
    /// Where the table of reference counts is.
    pub(super) refcount_offset: u64,
    /// Its length.
    pub(super) refcount_length: u64,
    /// Where the table of snapshots is, if there are any.
    pub(super) snapshots_offset: Option<u64>,
    /// Whether entries of the second level have 16 bytes.
    pub(super) extended: bool,
}

/// Why a file is not a qcow2 file that may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unusable {
    /// Another magic.
    #[error("does not begin as a qcow2 file")]
    Magic,
    /// Ends within the header.
    #[error("ends within its qcow2 header")]
    Short,
    /// Another version.
    #[error("has qcow2 version {0}; 2 and 3 are known")]
    Version(u32),
    /// A number that cannot be.
    #[error("has a damaged qcow2 header: {0}")]
    Damaged(&'static str),
    /// A backing file.
    #[error("has a backing file")]
    Backing,
    /// An external data file.
    #[error("keeps its data in another file")]
    DataFile,
    /// Encryption.
    #[error("is encrypted")]
    Encrypted,
    /// QEMU found it damaged.
    #[error("is marked as corrupt")]
    Corrupt,
    /// An incompatible feature of the future.
    #[error("uses qcow2 features that are not known (bits {0:#x})")]
    Feature(u64),
}

impl Header {
    /// Length of a cluster.
    pub(super) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Length of an entry of the second level.
    pub(super) fn l2_entry(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Reads the beginning of a file: at least its first cluster, or all of it.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Unusable> {
        let magic = bytes.get(..4).unwrap_or(bytes);
        if magic.is_empty() || !MAGIC.starts_with(magic) {
            return Err(Unusable::Magic);
        }
        let (short, long) = (|at| be32(bytes, at).ok_or(Unusable::Short), |at| be64(bytes, at).ok_or(Unusable::Short));
        let version = short(4)?;
        if !matches!(version, 2 | 3) {
            return Err(Unusable::Version(version));
        }
        let cluster_bits = short(20)?;
        if !(9..=21).contains(&cluster_bits) {
            return Err(Unusable::Damaged("size of a cluster"));
        }
        let cluster = 1_u64 << cluster_bits;
        let aligned = |at: u64| at != 0 && at.is_multiple_of(cluster) && at < 1 << 56;
        let (incompatible, length) = if version == 3 { (long(72)?, short(100)?) } else { (0, 72) };
        Self::refuse_references(bytes, incompatible, length, cluster)?;

        let header = Self {
            cluster_bits,
            size: long(24)?,
            l1_entries: short(36)?,
            l1_offset: long(40)?,
            refcount_offset: long(48)?,
            refcount_length: u64::from(short(56)?) << cluster_bits,
            snapshots_offset: Some(long(64)?).filter(|_| short(60).is_ok_and(|count| count > 0)),
            extended: incompatible & EXTENDED_L2 != 0,
        };
        let mapped_by_l1 = u128::from(cluster) * u128::from(cluster / header.l2_entry());
        let damaged = [
            ("extended entries need clusters of 16 KiB", header.extended && cluster_bits < 14),
            ("size of the disk", header.size > 1 << 62),
            ("length of the L1 table", u64::from(header.l1_entries) * 8 > MAX_L1),
            ("L1 table shorter than the disk", u128::from(header.l1_entries) * mapped_by_l1 < u128::from(header.size)),
            ("place of the L1 table", header.l1_entries > 0 && !aligned(header.l1_offset)),
            (
                "length of the refcount table",
                header.refcount_length == 0 || header.refcount_length > MAX_REFCOUNT_TABLE.max(cluster),
            ),
            ("place of the refcount table", !aligned(header.refcount_offset)),
            ("number of snapshots", short(60)? > MAX_SNAPSHOTS),
            ("place of the snapshots", header.snapshots_offset.is_some_and(|at| !aligned(at))),
        ];
        match damaged.iter().find(|(_, is)| *is) {
            Some((what, _)) => Err(Unusable::Damaged(what)),
            None => Ok(header),
        }
    }

    /// Refuses what leads outside the file or cannot be understood.
    fn refuse_references(bytes: &[u8], incompatible: u64, length: u32, cluster: u64) -> Result<(), Unusable> {
        if be64(bytes, 8).ok_or(Unusable::Short)? != 0 {
            return Err(Unusable::Backing);
        }
        if be32(bytes, 32).ok_or(Unusable::Short)? != 0 {
            return Err(Unusable::Encrypted);
        }
        if incompatible & DATA_FILE != 0 {
            return Err(Unusable::DataFile);
        }
        if incompatible & CORRUPT != 0 {
            return Err(Unusable::Corrupt);
        }
        let unknown = incompatible & !(DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2);
        if unknown != 0 {
            return Err(Unusable::Feature(unknown));
        }
        if length < 72 || !length.is_multiple_of(8) || u64::from(length) > cluster {
            return Err(Unusable::Damaged("length of the header"));
        }
        // Each extension takes at least 8 bytes of the first cluster: the walk ends.
        let mut at = length as usize;
        loop {
            let (Some(kind), Some(size)) = (be32(bytes, at), be32(bytes, at + 4)) else { return Err(Unusable::Short) };
            match kind {
                0 => return Ok(()),
                DATA_FILE_EXTENSION => return Err(Unusable::DataFile),
                _ => at = at + 8 + (size as usize).next_multiple_of(8),
            }
            if at as u64 + 8 > cluster {
                // Extensions may fill the cluster to its end.
                return if at as u64 <= cluster { Ok(()) } else { Err(Unusable::Damaged("header extensions")) };
            }
        }
    }
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The smallest header that is accepted: version 3, clusters of 64 KiB, 1 GiB.
    fn sample() -> Vec<u8> {
        let mut bytes = vec![0; 65_536];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, MAGIC);
        put(4, &3_u32.to_be_bytes());
        put(20, &16_u32.to_be_bytes());
        put(24, &(1_u64 << 30).to_be_bytes());
        put(36, &2_u32.to_be_bytes());
        put(40, &0x3_0000_u64.to_be_bytes());
        put(48, &0x1_0000_u64.to_be_bytes());
        put(56, &1_u32.to_be_bytes());
        put(100, &112_u32.to_be_bytes());
        bytes
    }

    #[test]
    fn whatever_leads_outside_or_cannot_be_is_refused() {
        assert_eq!(Header::parse(&sample()).map(|header| header.size), Ok(1 << 30));
        let cases: [(usize, u8, Unusable); 14] = [
            (0, 0, Unusable::Magic),
            (7, 4, Unusable::Version(4)),
            (15, 1, Unusable::Backing),
            (23, 8, Unusable::Damaged("size of a cluster")),
            (23, 64, Unusable::Damaged("size of a cluster")),
            (24, 0xff, Unusable::Damaged("size of the disk")),
            (35, 2, Unusable::Encrypted),
            (39, 1, Unusable::Damaged("L1 table shorter than the disk")),
            (36, 0xff, Unusable::Damaged("length of the L1 table")),
            (47, 1, Unusable::Damaged("place of the L1 table")),
            (79, 2, Unusable::Corrupt),
            (79, 4, Unusable::DataFile),
            (79, 0x20, Unusable::Feature(0x20)),
            (103, 113, Unusable::Damaged("length of the header")),
        ];
        for (at, value, expected) in cases {
            let mut bytes = sample();
            bytes[at] = value;
            assert_eq!(Header::parse(&bytes), Err(expected), "byte {at} = {value:#x}");
        }
        let mut bytes = sample();
        bytes[112..116].copy_from_slice(&DATA_FILE_EXTENSION.to_be_bytes());
        assert_eq!(Header::parse(&bytes), Err(Unusable::DataFile), "by its extension alone");
        bytes[112..120].copy_from_slice(&[1, 2, 3, 4, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(Header::parse(&bytes), Err(Unusable::Damaged("header extensions")));
        bytes[112..120].copy_from_slice(&[1, 2, 3, 4, 0, 0, 0xff, 0x88]);
        assert_eq!(Header::parse(&bytes).map(|header| header.size), Ok(1 << 30), "extensions up to the end of the cluster");
    }

    #[test]
    fn a_header_cut_at_any_length_is_refused() {
        let bytes = sample();
        for length in 0..120 {
            assert!(Header::parse(&bytes[..length]).is_err(), "{length} bytes");
        }
        assert!(Header::parse(&bytes[..120]).is_ok());
    }
}
