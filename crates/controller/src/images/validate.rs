//! Whether content is of the kind that it was said to be. Pure: the first bytes and the size in, yes or why not out.

use godwit_model::ImageKind;

/// Why content is not of its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum InvalidImage {
    /// Nothing at all.
    #[error("the image is empty")]
    Empty,
    /// No bzImage.
    #[error("the image is not a bzImage kernel: the magic HdrS is missing at 0x202")]
    Kernel,
    /// No known archive.
    #[error("the image is not an initial ramdisk: neither gzip, zstd, xz nor cpio")]
    Initrd,
    /// No CD-ROM.
    #[error("the image is not the content of a CD-ROM: neither ISO 9660 nor UDF")]
    Iso,
    /// A disk or CD-ROM of half a sector.
    #[error("a disk is a multiple of 512 bytes, this has {size}")]
    Sectors {
        /// Its size.
        size: u64,
    },
    /// A raw disk that is a qcow2.
    #[error("the image was said to be raw but is a qcow2")]
    RawIsQcow2,
    /// No qcow2.
    #[error("the image is not a qcow2: its magic is missing")]
    Magic,
    /// A version that is not known.
    #[error("the qcow2 has version {0}, known are 2 and 3")]
    Version(u32),
    /// Refers to another file.
    #[error("the qcow2 refers to a backing file")]
    BackingFile,
    /// Refers to another file.
    #[error("the qcow2 keeps its data in another file")]
    DataFile,
    /// Encrypted by QEMU.
    #[error("the qcow2 is encrypted")]
    Encrypted,
    /// A header that contradicts itself.
    #[error("the header of the qcow2 contradicts itself: {0}")]
    Header(&'static str),
    /// Shorter than its own tables.
    #[error("the qcow2 is truncated: its tables end at {needed}, the file at {size}")]
    Truncated {
        /// Where they end.
        needed: u64,
        /// Where the file ends.
        size: u64,
    },
}

impl InvalidImage {
    /// What to do.
    pub(super) fn fix(self) -> &'static str {
        match self {
            Self::BackingFile | Self::DataFile => "make it whole first: `qemu-img convert -O qcow2 IN OUT`",
            Self::Truncated { .. } | Self::Empty => "copy the file again and check it (`qemu-img check`), then import that",
            Self::RawIsQcow2 => "import it with kind qcow2",
            _ => "check the file and the kind: kernel (bzImage), initrd, raw, qcow2 or iso",
        }
    }
}

/// Checks the first bytes and the size of content.
pub(super) fn validate(kind: ImageKind, head: &[u8], size: u64) -> Result<(), InvalidImage> {
    if size == 0 {
        return Err(InvalidImage::Empty);
    }
    match kind {
        ImageKind::Kernel if head.get(0x202..0x206) == Some(b"HdrS") => Ok(()),
        ImageKind::Kernel => Err(InvalidImage::Kernel),
        ImageKind::Initrd => {
            let magics: [&[u8]; 5] = [b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0", b"070701", b"070702"];
            if magics.iter().any(|magic| head.starts_with(magic)) { Ok(()) } else { Err(InvalidImage::Initrd) }
        }
        ImageKind::Raw if head.starts_with(b"QFI\xfb") => Err(InvalidImage::RawIsQcow2),
        ImageKind::Raw if !size.is_multiple_of(512) => Err(InvalidImage::Sectors { size }),
        ImageKind::Raw => Ok(()),
        ImageKind::Qcow2 => qcow2(head, size),
        ImageKind::Iso if !size.is_multiple_of(512) => Err(InvalidImage::Sectors { size }),
        ImageKind::Iso => iso(head),
    }
}

/// The volume descriptors of ISO 9660 (ECMA-119) and UDF (ECMA-167) begin after 16 blocks.
fn iso(head: &[u8]) -> Result<(), InvalidImage> {
    const DESCRIPTOR: usize = 16 * 2_048 + 1;
    match head.get(DESCRIPTOR..DESCRIPTOR + 5) {
        Some(b"CD001" | b"BEA01") => Ok(()),
        _ => Err(InvalidImage::Iso),
    }
}

fn number<const N: usize>(head: &[u8], offset: usize) -> Result<[u8; N], InvalidImage> {
    let bytes = head.get(offset..offset.saturating_add(N)).and_then(|bytes| bytes.try_into().ok());
    bytes.ok_or(InvalidImage::Header("it is cut off"))
}

fn word(head: &[u8], offset: usize) -> Result<u32, InvalidImage> {
    number(head, offset).map(u32::from_be_bytes)
}

fn long(head: &[u8], offset: usize) -> Result<u64, InvalidImage> {
    number(head, offset).map(u64::from_be_bytes)
}

/// The header as QEMU specifies it in its "Qcow2 Image File Format".
fn qcow2(head: &[u8], size: u64) -> Result<(), InvalidImage> {
    if !head.starts_with(b"QFI\xfb") {
        return Err(InvalidImage::Magic);
    }
    let version = word(head, 4)?;
    if !matches!(version, 2 | 3) {
        return Err(InvalidImage::Version(version));
    }
    if long(head, 8)? != 0 {
        return Err(InvalidImage::BackingFile);
    }
    if !(9..=21).contains(&word(head, 20)?) {
        return Err(InvalidImage::Header("cluster size"));
    }
    if word(head, 32)? != 0 {
        return Err(InvalidImage::Encrypted);
    }
    if version == 3 {
        let incompatible = long(head, 72)?;
        if incompatible & 0b100 != 0 {
            return Err(InvalidImage::DataFile);
        }
        if incompatible & 0b10 != 0 {
            return Err(InvalidImage::Header("it is marked as corrupt"));
        }
        extensions(head)?;
    }
    let cluster = 1_u64 << word(head, 20)?;
    let table = |offset: u64, entries: u64| {
        if offset == 0 || !offset.is_multiple_of(cluster) {
            return Err(InvalidImage::Header("a table is not at a cluster"));
        }
        entries.checked_mul(8).and_then(|bytes| offset.checked_add(bytes)).ok_or(InvalidImage::Header("a table is too large"))
    };
    let first_level = table(long(head, 40)?, word(head, 36)?.into())?;
    let refcounts = table(long(head, 48)?, u64::from(word(head, 56)?).saturating_mul(cluster / 8))?;
    let needed = first_level.max(refcounts);
    if size < needed {
        return Err(InvalidImage::Truncated { needed, size });
    }
    Ok(())
}

/// Header extensions of version 3: one of them names another file.
fn extensions(head: &[u8]) -> Result<(), InvalidImage> {
    const END: u32 = 0;
    const DATA_FILE: u32 = 0x4441_5441;
    let mut offset = word(head, 100)? as usize;
    if offset < 104 {
        return Err(InvalidImage::Header("header length"));
    }
    loop {
        // A file may end with its header when it has no extensions.
        let Ok(kind) = word(head, offset) else { return Ok(()) };
        match kind {
            END => return Ok(()),
            DATA_FILE => return Err(InvalidImage::DataFile),
            _ => {
                let length = (word(head, offset + 4)? as usize).next_multiple_of(8);
                offset = offset.saturating_add(8).saturating_add(length);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn image(version: u32) -> Vec<u8> {
        let mut head = vec![0_u8; 512];
        let mut put = |offset: usize, bytes: &[u8]| head[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, b"QFI\xfb");
        put(4, &version.to_be_bytes());
        put(20, &16_u32.to_be_bytes());
        put(24, &(1_u64 << 30).to_be_bytes());
        put(36, &2_u32.to_be_bytes());
        put(40, &(3_u64 << 16).to_be_bytes());
        put(48, &(1_u64 << 16).to_be_bytes());
        put(56, &1_u32.to_be_bytes());
        put(100, &104_u32.to_be_bytes());
        head
    }

    const WHOLE: u64 = 4 << 16;

    #[test]
    fn a_qcow2_that_is_not_whole_in_itself_is_refused() {
        for version in [2, 3] {
            assert_eq!(validate(ImageKind::Qcow2, &image(version), WHOLE), Ok(()));
        }
        let broken = |offset: usize, bytes: &[u8]| {
            let mut head = image(3);
            head[offset..offset + bytes.len()].copy_from_slice(bytes);
            validate(ImageKind::Qcow2, &head, WHOLE).expect_err("accepted")
        };
        assert_eq!(broken(8, &512_u64.to_be_bytes()), InvalidImage::BackingFile);
        assert_eq!(broken(79, &[4]), InvalidImage::DataFile);
        assert_eq!(broken(104, b"DATA\0\0\0\x08"), InvalidImage::DataFile);
        assert_eq!(broken(4, &9_u32.to_be_bytes()), InvalidImage::Version(9));
        assert_eq!(broken(32, &1_u32.to_be_bytes()), InvalidImage::Encrypted);
        assert_eq!(broken(0, b"NOPE"), InvalidImage::Magic);
        assert!(matches!(broken(20, &60_u32.to_be_bytes()), InvalidImage::Header(_)));
        assert!(matches!(broken(40, &u64::MAX.to_be_bytes()), InvalidImage::Header(_)));
        let truncated = validate(ImageKind::Qcow2, &image(3), 3 << 16);
        assert!(matches!(truncated, Err(InvalidImage::Truncated { .. })), "{truncated:?}");
    }

    #[test]
    fn other_kinds_are_told_by_their_magic_or_size() {
        let mut kernel = vec![0_u8; 0x300];
        kernel[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(validate(ImageKind::Kernel, &kernel, 0x300), Ok(()));
        assert_eq!(validate(ImageKind::Kernel, b"\x7fELF", 4), Err(InvalidImage::Kernel));
        assert_eq!(validate(ImageKind::Initrd, b"\x1f\x8b\x08", 3), Ok(()));
        assert_eq!(validate(ImageKind::Initrd, b"070701", 6), Ok(()));
        assert_eq!(validate(ImageKind::Initrd, b"text", 4), Err(InvalidImage::Initrd));
        assert_eq!(validate(ImageKind::Raw, &[0; 512], 1_024), Ok(()));
        assert_eq!(validate(ImageKind::Raw, &[0; 512], 1_000), Err(InvalidImage::Sectors { size: 1_000 }));
        let mut disc = vec![0; 34_816];
        assert_eq!(validate(ImageKind::Iso, &disc, 34_816), Err(InvalidImage::Iso));
        disc[32_769..32_774].copy_from_slice(b"CD001");
        assert_eq!(validate(ImageKind::Iso, &disc, 34_816), Ok(()));
        assert_eq!(validate(ImageKind::Iso, &disc, 34_817), Err(InvalidImage::Sectors { size: 34_817 }));
        assert_eq!(validate(ImageKind::Iso, &disc[..32_770], 34_816), Err(InvalidImage::Iso));
        assert_eq!(validate(ImageKind::Raw, &image(3), WHOLE), Err(InvalidImage::RawIsQcow2));
        for kind in [ImageKind::Kernel, ImageKind::Initrd, ImageKind::Raw, ImageKind::Qcow2, ImageKind::Iso] {
            assert_eq!(validate(kind, &[], 0), Err(InvalidImage::Empty));
        }
    }

    proptest! {
        #[test]
        fn prop_no_header_panics(mut head in prop::collection::vec(any::<u8>(), 0..256), size in any::<u64>(), real in any::<bool>()) {
            if real && head.len() > 8 {
                head[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
            }
            for kind in [ImageKind::Kernel, ImageKind::Initrd, ImageKind::Raw, ImageKind::Qcow2, ImageKind::Iso] {
                let _ = validate(kind, &head, size);
            }
        }
    }
}
