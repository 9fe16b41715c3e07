//! A pack: pages as they came, sixteen to a chunk that is compressed and sealed, each to be found by its number.
//!
//! ```text
//! file    = head  chunks, numbered from 0  lengths  digests  end
//! chunk   = u8 compression (0 none, 1 zstd)  up to 16 pages, perhaps compressed; all chunks but the last have 16
//! lengths = u32 for each chunk: bytes of its record
//! digests = 32 bytes for each page
//! end     = u32 chunks  u32 pages  u64 bytes before the lengths
//! ```
//! So a page is found by one look at the lengths, which are read once, and one read.

mod reader;
mod writer;

pub use reader::{PackReader, Unsealed};
pub use writer::PackWriter;

use std::fmt;

use godwit_stream::PAGE_SIZE;

use crate::TeamKey;
use crate::sealed::{Form, Kind};

/// Pages of a chunk: what is read for one page, and what compresses together.
const CHUNK_PAGES: usize = 16;
const MAX_BODY: usize = CHUNK_PAGES * PAGE_SIZE;
const MAX_CONTENT: usize = 1 + MAX_BODY;
const LENGTH: usize = 4;
const DIGEST: usize = 32;
/// Bytes of a piece of the lengths, and of the digests.
const LENGTHS_PIECE: usize = 256 << 10;
const DIGESTS_PIECE: usize = 512 << 10;
const END: usize = 4 + 4 + 8;

const NONE: u8 = 0;
const ZSTD: u8 = 1;

pub(crate) const FORM: Form = Form { magic: *b"GDWTPACK", version: 1, context: "godwit vault 2026-11-27 key of a pack" };

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Record {
    Chunk = 1,
    Lengths = 2,
    Digests = 3,
    End = 4,
}

impl Kind for Record {
    fn number(self) -> u8 {
        self as u8
    }
}

/// The content of a page: [`PAGE_SIZE`] bytes.
pub type Page = [u8; PAGE_SIZE];

/// Whether a page holds nothing but zeros.
pub(crate) fn is_zero(page: &Page) -> bool {
    let (words, _) = page.as_chunks::<64>();
    words.iter().all(|word| word == &[0; 64])
}

/// What a content is known by, within one team.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageDigest([u8; DIGEST]);

impl PageDigest {
    /// The digest of a content.
    #[must_use]
    pub fn of(key: &TeamKey, content: &Page) -> Self {
        Self(*blake3::keyed_hash(key.expose(), content).as_bytes())
    }

    /// Its first half: as good as all of it to tell contents apart, since nobody without the key can look for two that have the same.
    pub(crate) fn short(&self) -> u128 {
        let (first, _) = self.0.split_first_chunk().expect("a digest has 32 bytes");
        u128::from_be_bytes(*first)
    }
}

impl fmt::Debug for PageDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageDigest({:032x}…)", self.short())
    }
}
