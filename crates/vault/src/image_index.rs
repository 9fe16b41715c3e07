//! Where in an image a content is: what a guest has read of its disk is in its memory, and in the image at whatever host has it.
//!
//! An index is a hint, rebuilt from the image when it is missing or damaged. It says where a content may be; whoever uses it compares the image itself.
//! The format is specified in `docs/spec/image-index.md`.

use std::io::{self, Read, Write};

use bytes::{Buf, BufMut};

/// Bytes of a page.
const PAGE_SIZE: usize = 4096;
const MAGIC: &[u8; 8] = b"GDWTIMGX";
const VERSION: u16 = 1;
const HEAD: usize = 8 + 2 + 32 + 4 + 4;
/// The first bytes of a content's BLAKE3, and its page.
const ENTRY: usize = 8 + 4;
const FINGERPRINT: usize = 8;
const SUM: usize = 32;
/// Most contents, of which the first of an image count: 48 MiB, for 16 GiB.
const MOST: usize = 4 << 20;
/// Read at once.
const READ: usize = 256 * PAGE_SIZE;

/// Why an index is of no use.
#[derive(Debug, thiserror::Error)]
pub enum ImageIndexError {
    /// It could not be read.
    #[error("the index of an image cannot be read")]
    Read(#[from] io::Error),
    /// It is of another version, cut short, or damaged.
    #[error("the index of an image is damaged")]
    Damaged,
}

/// The contents of an image's whole pages but zeros, each once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageIndex {
    digest: [u8; 32],
    pages: u32,
    /// One after the other, sorted.
    entries: Vec<u8>,
}

impl ImageIndex {
    /// Reads an image to its end; `digest` is the BLAKE3 of all of it, which the caller knows.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn build(mut image: impl Read, digest: [u8; 32]) -> io::Result<Self> {
        let (mut pages, mut entries) = (0_u32, Vec::new());
        let mut buffer = vec![0; READ];
        loop {
            let length = read_full(&mut image, &mut buffer)?;
            let (whole, _) = buffer.get(..length).unwrap_or_default().as_chunks::<PAGE_SIZE>();
            for content in whole {
                if entries.len() < MOST && content.iter().any(|byte| *byte != 0) {
                    entries.push(entry(content, pages));
                }
                pages = pages.checked_add(1).ok_or(io::ErrorKind::FileTooLarge)?;
            }
            if length < READ {
                break;
            }
        }
        entries.sort_unstable();
        entries.dedup_by_key(|entry| fingerprint(entry));
        Ok(Self { digest, pages, entries: entries.into_flattened() })
    }

    /// Writes all of it.
    ///
    /// # Errors
    /// The writer's.
    pub fn write(&self, mut to: impl Write) -> io::Result<()> {
        let mut head = Vec::with_capacity(HEAD);
        head.put_slice(MAGIC);
        head.put_u16(VERSION);
        head.put_slice(&self.digest);
        head.put_u32(self.pages);
        head.put_u32(u32::try_from(self.entries().len()).map_err(io::Error::other)?);
        let mut sum = blake3::Hasher::new();
        for part in [&head, &self.entries] {
            sum.update(part);
            to.write_all(part)?;
        }
        to.write_all(sum.finalize().as_bytes())?;
        to.flush()
    }

    /// Reads what [`ImageIndex::write`] has written. Takes no more memory than what there is to read, and than the largest index.
    ///
    /// # Errors
    /// See [`ImageIndexError`].
    pub fn read(mut from: impl Read) -> Result<Self, ImageIndexError> {
        let mut head = [0; HEAD];
        from.read_exact(&mut head)?;
        let mut rest = &head[..];
        let (mut magic, mut digest) = ([0; 8], [0; 32]);
        rest.copy_to_slice(&mut magic);
        let version = rest.get_u16();
        rest.copy_to_slice(&mut digest);
        let (pages, count) = (rest.get_u32(), rest.get_u32() as usize);
        if (&magic, version) != (MAGIC, VERSION) || count > MOST {
            return Err(ImageIndexError::Damaged);
        }
        let mut entries = Vec::new();
        from.by_ref().take((count * ENTRY) as u64).read_to_end(&mut entries)?;
        let (mut sum, mut beyond) = ([0; SUM], [0]);
        from.read_exact(&mut sum)?;
        let whole = from.read(&mut beyond)? == 0;
        let found = *blake3::Hasher::new().update(&head).update(&entries).finalize().as_bytes();
        let index = Self { digest, pages, entries };
        let each = index.entries();
        let in_order = each.is_sorted_by(|one, next| fingerprint(one) < fingerprint(next));
        let right = whole && found == sum && each.len() == count && in_order && each.iter().all(|entry| page(entry) < pages);
        if right { Ok(index) } else { Err(ImageIndexError::Damaged) }
    }

    fn entries(&self) -> &[[u8; ENTRY]] {
        self.entries.as_chunks().0
    }

    /// BLAKE3 of the image.
    #[must_use]
    pub const fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// How many whole pages the image has.
    #[must_use]
    pub const fn pages(&self) -> u32 {
        self.pages
    }

    /// The page of the image that may have this content; no other one has it.
    #[must_use]
    pub fn find(&self, content: &[u8; PAGE_SIZE]) -> Option<u32> {
        let wanted = fingerprint(&entry(content, 0));
        let at = self.entries().binary_search_by_key(&wanted, fingerprint).ok()?;
        self.entries().get(at).map(page)
    }
}

fn entry(content: &[u8; PAGE_SIZE], page: u32) -> [u8; ENTRY] {
    let mut entry = [0; ENTRY];
    let (first, last) = entry.split_at_mut(FINGERPRINT);
    first.iter_mut().zip(blake3::hash(content).as_bytes()).for_each(|(to, from)| *to = *from);
    last.copy_from_slice(&page.to_be_bytes());
    entry
}

fn fingerprint(entry: &[u8; ENTRY]) -> [u8; FINGERPRINT] {
    let [a, b, c, d, e, f, g, h, ..] = *entry;
    [a, b, c, d, e, f, g, h]
}

fn page(entry: &[u8; ENTRY]) -> u32 {
    let [.., a, b, c, d] = *entry;
    u32::from_be_bytes([a, b, c, d])
}

/// Reads until the buffer is full or there is no more; how much there was.
fn read_full(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while let Some(rest) = buffer.get_mut(length..).filter(|rest| !rest.is_empty()) {
        match from.read(rest) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn filled(byte: u8) -> [u8; PAGE_SIZE] {
        [byte; PAGE_SIZE]
    }

    fn image(bytes: &[u8]) -> Vec<u8> {
        bytes.iter().flat_map(|byte| filled(*byte)).collect()
    }

    fn written(index: &ImageIndex) -> Vec<u8> {
        let mut bytes = Vec::new();
        index.write(&mut bytes).expect("memory");
        bytes
    }

    #[test]
    fn the_first_of_equal_pages_is_found_and_zeros_and_a_rest_are_not() {
        let mut bytes = image(&[1, 0, 2, 1, 3]);
        bytes.extend_from_slice(&[4; 100]);
        let index = ImageIndex::build(&bytes[..], [9; 32]).expect("memory");
        let found = [0, 1, 2, 3, 4].map(|byte| index.find(&filled(byte)));
        assert_eq!(found, [None, Some(0), Some(2), Some(4), None]);
        assert_eq!((index.pages(), *index.digest()), (5, [9; 32]));
    }

    #[test]
    fn an_image_longer_than_one_read_is_indexed_whole() {
        let mut bytes = image(&[7; 600]);
        bytes[599 * PAGE_SIZE] = 8;
        let index = ImageIndex::build(&bytes[..], [0; 32]).expect("memory");
        assert_eq!((index.pages(), index.entries().len()), (600, 2));
        assert_eq!(index.find(bytes.last_chunk().expect("a page")), Some(599));
    }

    #[test]
    fn an_index_that_is_cut_longer_or_changed_anywhere_is_of_no_use() {
        let bytes = written(&ImageIndex::build(&image(&[1, 2, 3])[..], [9; 32]).expect("memory"));
        assert!(ImageIndex::read(&bytes[..]).is_ok());
        for length in 0..bytes.len() {
            assert!(ImageIndex::read(&bytes[..length]).is_err(), "cut at {length}");
            let mut changed = bytes.clone();
            changed[length] ^= 1;
            assert!(ImageIndex::read(&changed[..]).is_err(), "changed at {length}");
        }
        assert!(matches!(ImageIndex::read(&[&bytes[..], &[0]].concat()[..]), Err(ImageIndexError::Damaged)));
    }

    #[test]
    fn the_specification_shows_the_bytes_that_are_written() {
        let page = include_str!("../../../docs/spec/image-index.md");
        let lines = page.lines().skip_while(|line| *line != "```hex").skip(1).take_while(|line| *line != "```");
        let shown: Vec<u8> =
            lines.flat_map(str::split_whitespace).map(|byte| u8::from_str_radix(byte, 16).expect("hexadecimal")).collect();
        let index = ImageIndex::build(&image(&[1, 0, 2])[..], [0x66; 32]).expect("memory");
        assert_eq!(written(&index), shown, "{}", written(&index).iter().map(|byte| format!("{byte:02x} ")).collect::<String>());
        assert_eq!(ImageIndex::read(&shown[..]).expect("whole"), index);
    }

    #[test]
    fn corpus_every_stored_index_is_read_or_refused() {
        let files = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/image_index")).expect("it is checked in");
        let inputs: Vec<_> = files.map(|file| std::fs::read(file.expect("an entry").path()).expect("readable")).collect();
        let whole =
            inputs.iter().filter(|bytes| ImageIndex::read(&bytes[..]).is_ok_and(|index| written(&index) == **bytes)).count();
        assert!(inputs.len() >= 4 && whole == 1, "{} inputs, {whole} of them indexes", inputs.len());
    }

    proptest! {
        #[test]
        fn prop_no_bytes_can_panic_the_reader(bytes in prop::collection::vec(any::<u8>(), 0..400), known in any::<bool>()) {
            let head = if known { [&MAGIC[..], &VERSION.to_be_bytes()].concat() } else { Vec::new() };
            let _ = ImageIndex::read(&[head, bytes].concat()[..]);
        }
    }
}
