//! Whether a VMDK is sufficient to itself. Pure: its beginning and the descriptor in it in, yes or why not out.
//!
//! Layout as VMware's "Virtual Disk Format 5.0" specifies it. A VMDK may be a mere list of other files; such a list, a parent, and anything
//! that a reader would look for elsewhere is refused before `qemu-img` sees the file.

/// Length of a sparse extent's header.
const HEADER: usize = 512;
/// Sectors of a descriptor that is looked at: real ones have 1 to 20.
const MAX_DESCRIPTOR_SECTORS: u64 = 128;

/// Why a VMDK cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum InvalidVmdk {
    /// Not a sparse extent.
    #[error("the file is not a VMDK in one piece: it does not begin with KDMV")]
    Magic,
    /// A text that lists other files.
    #[error("the VMDK only describes other files")]
    Descriptor,
    /// A version that is not known.
    #[error("the VMDK has version {0}, known are 1 to 3")]
    Version(u32),
    /// A header that contradicts itself.
    #[error("the header of the VMDK contradicts itself: {0}")]
    Header(&'static str),
    /// A linked clone.
    #[error("the VMDK refers to a parent")]
    Parent,
    /// Several extents, or one of another kind.
    #[error("the VMDK is made of other extents than its own: {0}")]
    Extents(String),
}

impl InvalidVmdk {
    /// What to do.
    pub(super) const fn fix(&self) -> &'static str {
        match self {
            Self::Magic => "check the file and its format; a VHDX, qcow2 or raw disk is imported as that",
            _ => "make it one file that refers to nothing: `qemu-img convert -O qcow2 IN OUT` where all of its files are",
        }
    }
}

/// Where the embedded descriptor is, in bytes from the beginning, if there is one.
pub(super) fn descriptor_of(head: &[u8]) -> Result<Option<(u64, usize)>, InvalidVmdk> {
    if head.starts_with(b"# Disk DescriptorFile") {
        return Err(InvalidVmdk::Descriptor);
    }
    if !head.starts_with(b"KDMV") {
        return Err(InvalidVmdk::Magic);
    }
    if head.len() < HEADER {
        return Err(InvalidVmdk::Header("it is cut off"));
    }
    let version = u32::from_le_bytes(field(head, 4)?);
    if !(1..=3).contains(&version) {
        return Err(InvalidVmdk::Version(version));
    }
    let long = |offset| field(head, offset).map(u64::from_le_bytes);
    let (capacity, grain) = (long(12)?, long(20)?);
    // Without a capacity of its own a reader would go by the descriptor, and the extents that it names.
    if capacity == 0 {
        return Err(InvalidVmdk::Descriptor);
    }
    if grain == 0 || !grain.is_power_of_two() || grain > 2_048 {
        return Err(InvalidVmdk::Header("its grain size is no power of two up to 1 MiB"));
    }
    let (offset, sectors) = (long(28)?, long(36)?);
    if offset == 0 {
        return Ok(None);
    }
    if sectors == 0 || sectors > MAX_DESCRIPTOR_SECTORS {
        return Err(InvalidVmdk::Header("its descriptor has no size, or one out of all proportion"));
    }
    let start = offset.checked_mul(512).ok_or(InvalidVmdk::Header("its descriptor is beyond any file"))?;
    let length = usize::try_from(sectors * 512).map_err(|_| InvalidVmdk::Header("its descriptor is too long"))?;
    Ok(Some((start, length)))
}

/// Checks the descriptor that is embedded in a VMDK: no parent, and one sparse extent, which is the file itself.
pub(super) fn check_descriptor(descriptor: &[u8]) -> Result<(), InvalidVmdk> {
    let end = descriptor.iter().position(|byte| *byte == 0).unwrap_or(descriptor.len());
    let text = String::from_utf8_lossy(descriptor.get(..end).unwrap_or_default());
    let mut extents = Vec::new();
    for line in text.lines().map(str::trim) {
        let lower = line.to_ascii_lowercase();
        if let Some((key, value)) = lower.split_once('=') {
            let (key, value) = (key.trim(), value.trim().trim_matches('"'));
            let parent = (key == "parentcid" && value != "ffffffff") || (key == "parentfilenamehint");
            if parent {
                return Err(InvalidVmdk::Parent);
            }
        } else if ["rw ", "rdonly ", "noaccess "].iter().any(|access| lower.starts_with(access)) {
            extents.push(lower);
        }
    }
    let own = |extent: &String| extent.split_whitespace().nth(2) == Some("sparse");
    match extents.as_slice() {
        [one] if own(one) => Ok(()),
        [] => Ok(()),
        _ => Err(InvalidVmdk::Extents(format!("{} extents", extents.len()))),
    }
}

fn field<const N: usize>(head: &[u8], offset: usize) -> Result<[u8; N], InvalidVmdk> {
    let bytes = head.get(offset..offset + N).and_then(|bytes| bytes.try_into().ok());
    bytes.ok_or(InvalidVmdk::Header("it is cut off"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut head = vec![0; HEADER];
        head[..4].copy_from_slice(b"KDMV");
        head[4..8].copy_from_slice(&3_u32.to_le_bytes());
        head[12..20].copy_from_slice(&2_048_u64.to_le_bytes());
        head[20..28].copy_from_slice(&128_u64.to_le_bytes());
        head[28..36].copy_from_slice(&1_u64.to_le_bytes());
        head[36..44].copy_from_slice(&20_u64.to_le_bytes());
        change(&mut head);
        head
    }

    #[test]
    fn a_vmdk_in_one_piece_is_taken_and_what_refers_elsewhere_is_not() {
        assert_eq!(descriptor_of(&header(|_| {})), Ok(Some((512, 10_240))));
        let put = |at: usize, value: u64| header(move |head| head[at..at + 8].copy_from_slice(&value.to_le_bytes()));
        assert_eq!(descriptor_of(&put(28, 0)), Ok(None));
        assert_eq!(descriptor_of(b"# Disk DescriptorFile\nversion=1"), Err(InvalidVmdk::Descriptor));
        assert_eq!(descriptor_of(&put(12, 0)), Err(InvalidVmdk::Descriptor));
        assert_eq!(descriptor_of(b"QFI\xfb"), Err(InvalidVmdk::Magic));
        for (at, value) in [(20, 0), (20, 3), (36, 0), (36, 1 << 40), (28, u64::MAX)] {
            assert!(matches!(descriptor_of(&put(at, value)), Err(InvalidVmdk::Header(_))), "{at} {value}");
        }
        assert!(matches!(descriptor_of(&header(|head| head[4] = 9)), Err(InvalidVmdk::Version(9))));

        let plain =
            "# Disk DescriptorFile\nparentCID=ffffffff\ncreateType=\"streamOptimized\"\nRW 2048 SPARSE \"x.vmdk\"\n\0\0junk";
        assert_eq!(check_descriptor(plain.as_bytes()), Ok(()));
        for (bad, expected) in [
            ("parentCID=12345678\nRW 1 SPARSE \"x\"", InvalidVmdk::Parent),
            ("ParentFileNameHint=\"/etc/shadow\"", InvalidVmdk::Parent),
            ("RW 1 FLAT \"/etc/shadow\" 0", InvalidVmdk::Extents("1 extents".into())),
            ("RW 1 SPARSE \"a\"\nRDONLY 1 SPARSE \"b\"", InvalidVmdk::Extents("2 extents".into())),
        ] {
            assert_eq!(check_descriptor(bad.as_bytes()), Err(expected), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn prop_no_beginning_makes_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), sparse in any::<bool>()) {
            let mut head = bytes.clone();
            if sparse {
                head.splice(0..head.len().min(4), *b"KDMV");
            }
            let _ = descriptor_of(&head);
            let _ = check_descriptor(&bytes);
        }
    }
}
