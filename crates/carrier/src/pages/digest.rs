//! What tells contents of pages apart: keyed hashes, so that no guest can make two pages that are taken for one.

use std::hash::Hasher;

use siphasher::sip::SipHasher13;

use super::{PIECE, PIECES, Page, Pieces};

/// The first 16 bytes of a page's BLAKE3 under the session's key; [`ZERO`] stands for a page of zeros.
pub type Digest = [u8; 16];

/// A page of zeros.
pub const ZERO: Digest = [0; 16];

/// Bytes of a digest that travel as a check.
pub const CHECK: usize = 8;

/// Hashes pages and pieces under the key of one session.
#[derive(Clone)]
pub struct Digester {
    page: [u8; 32],
    piece: SipHasher13,
}

impl std::fmt::Debug for Digester {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Digester")
    }
}

impl Digester {
    /// Of the session with this key.
    #[must_use]
    pub fn new(key: &[u8; 32]) -> Self {
        let piece_key = blake3::derive_key("godwit carrier 2026-11-26 pieces of pages", key);
        let (first, _) = piece_key.split_first_chunk::<16>().expect("a key has 32 bytes");
        Self { page: *key, piece: SipHasher13::new_with_key(first) }
    }

    /// The digest of a page.
    #[must_use]
    pub fn page(&self, page: &Page) -> Digest {
        self.pages(page)
    }

    /// The digest of consecutive pages: of all of them together.
    #[must_use]
    pub fn pages(&self, pages: &[u8]) -> Digest {
        if is_zero(pages) {
            return ZERO;
        }
        let hash = blake3::keyed_hash(&self.page, pages);
        let (first, _) = hash.as_bytes().split_first_chunk::<16>().expect("a hash has 32 bytes");
        // One in 2^128, which must not pass for zeros.
        if *first == ZERO { [0xff; 16] } else { *first }
    }

    /// What only who knows the page can say of it, also after its digest was told: the next eight bytes of the same hash.
    #[must_use]
    pub fn proof(&self, page: &Page) -> [u8; CHECK] {
        let hash = blake3::keyed_hash(&self.page, page);
        let (_, rest) = hash.as_bytes().split_first_chunk::<16>().expect("a hash has 32 bytes");
        *rest.first_chunk().expect("a hash has 32 bytes")
    }

    /// The hash of each piece of a page, cut to what a [`crate::Frame::Pieces`] tells of it.
    #[must_use]
    pub fn told_pieces(&self, page: &Page) -> Pieces {
        self.pieces(page).map(|hash| hash as u32)
    }

    /// The hash of each piece of a page.
    #[must_use]
    pub(super) fn pieces(&self, page: &Page) -> [u64; PIECES] {
        let (pieces, _) = page.as_chunks::<PIECE>();
        let mut hashes = [0; PIECES];
        for (hash, piece) in hashes.iter_mut().zip(pieces) {
            let mut hasher = self.piece;
            hasher.write(piece);
            *hash = hasher.finish();
        }
        hashes
    }
}

/// Whether pages hold nothing but zeros.
#[must_use]
pub fn is_zero(pages: &[u8]) -> bool {
    let (words, rest) = pages.as_chunks::<64>();
    words.iter().all(|word| word == &[0; 64]) && rest.iter().all(|byte| *byte == 0)
}
