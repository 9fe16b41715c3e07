//! A pack: pages as they came, sixteen to a chunk that is compressed and sealed, each to be found by its number.
//!
//! ```text
//! file        = head  chunks, numbered from 0  lengths  digests  bases  differences  kept  end
//! chunk       = u8 compression (0 none, 1 zstd)  perhaps compressed: up to 16 pages, then 8 bytes of check for each of them that is a difference
//! lengths     = u32 for each chunk: bytes of its record
//! digests     = 16 bytes for each page
//! bases       = 16 bytes id of each pack that has bases
//! differences = runs: { u32 page  u16 pages  u16 base's pack, place in bases  u32 base, a page of that pack, of which the next are the next }
//! kept        = runs: { u32 page  u32 pages }, of a pack that was written anew without the others
//! end         = u32 chunks  u32 pages  u64 bytes before the lengths  u32 bases  u32 runs of differences  u32 runs that are kept  u32 pages that are kept
//! ```
//! So a page is found by one look at the lengths, which are read once, and one read; one that is a difference by two. All chunks but the last have 16 pages. Pages keep
//! their numbers when the pack is written anew; what is dense is their *position* among those that are kept.

mod differences;
mod kept;
mod reader;
mod rewrite;
mod writer;

pub(crate) use differences::{Base, Differences};
pub(crate) use kept::KeptPages;
pub use reader::{PackReader, Packed, Unsealed};
pub(crate) use rewrite::RewriteError;
pub use writer::PackWriter;

use std::fmt;

use godwit_stream::PAGE_SIZE;
use uuid::Uuid;

use crate::sealed::{Form, Kind};
use crate::{PackKey, TeamKey};

/// Pages of a chunk: what is read for one page, and what compresses together.
const CHUNK_PAGES: usize = 16;
const MAX_BODY: usize = CHUNK_PAGES * (PAGE_SIZE + CHECK);
const MAX_CONTENT: usize = 1 + MAX_BODY;
const LENGTH: usize = 4;
const DIGEST: usize = 16;
const CHECK: usize = 8;
const BASE: usize = 16;
const RUN: usize = 4 + 2 + 2 + 4;
/// A run of pages that are kept.
const KEPT: usize = 4 + 4;
/// Most runs of differences, and of pages that are kept, which are in memory as long as a pack is open: 12 MiB each.
const MAX_RUNS: usize = 1 << 20;
/// Bytes of a piece of the lengths, and of the digests.
const LENGTHS_PIECE: usize = 256 << 10;
const DIGESTS_PIECE: usize = 512 << 10;
const BASES_PIECE: usize = 64 << 10;
const RUNS_PIECE: usize = 16_384 * RUN;
const KEPT_PIECE: usize = 16_384 * KEPT;
const END: usize = 4 + 4 + 8 + 4 + 4 + 4 + 4;

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
    Bases = 5,
    Differences = 6,
    Kept = 7,
}

impl Kind for Record {
    fn number(self) -> u8 {
        self as u8
    }
}

/// Which pack.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackId(Uuid);

impl PackId {
    /// The id that is `id`.
    #[must_use]
    pub const fn new(id: Uuid) -> Self {
        Self(id)
    }

    /// The id.
    #[must_use]
    pub const fn uuid(self) -> Uuid {
        self.0
    }
}

impl fmt::Display for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackId({})", self.0)
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
    /// The digest of a content: the first half of BLAKE3, which is enough, since nobody without the key can look for two contents that have the same.
    #[must_use]
    pub fn of(key: &TeamKey, content: &Page) -> Self {
        let hash = blake3::keyed_hash(key.expose(), content);
        Self(*hash.as_bytes().first_chunk().expect("a hash has 32 bytes"))
    }

    pub(crate) const fn number(&self) -> u128 {
        u128::from_be_bytes(self.0)
    }
}

impl fmt::Debug for PageDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageDigest({:032x}…)", self.number())
    }
}

/// Makes the checks of a pack's differences: what joins a difference with another base than its own finds out, whatever the base's file says.
pub(crate) struct Checker(zeroize::Zeroizing<[u8; 32]>);

impl Checker {
    fn new(key: &PackKey) -> Self {
        Self(zeroize::Zeroizing::new(blake3::derive_key("godwit vault 2026-11-28 checks of a pack", key.expose())))
    }

    /// The check of a content.
    fn of(&self, content: &Page) -> [u8; CHECK] {
        *blake3::keyed_hash(&self.0, content).as_bytes().first_chunk().expect("a hash has 32 bytes")
    }
}

/// What differs between two contents; and of that and one of the two, the other.
pub(crate) fn difference(one: &Page, other: &Page) -> Page {
    let mut out = *one;
    out.iter_mut().zip(other).for_each(|(one, other)| *one ^= other);
    out
}
