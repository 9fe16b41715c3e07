//! Chunks: up to 64 pages of one block, compressed as one.
//!
//! ```text
//! content  = u8 compression (0 none, 1 zstd)  body, perhaps compressed
//! body     = u16 block  u32 window  u64 mask  contents of the pages whose bits are set (bit 0 is the first), 4096 bytes each
//! ```
//! A window is 64 pages that begin at a multiple of 64. So a chunk's place says where to look for a page, and no list can be malformed.

use std::io;

use bytes::{Buf, BufMut};
use godwit_stream::PAGE_SIZE;
use zstd::bulk::{Compressor, Decompressor};

use super::{MalformedStay, Page};
use crate::sealed::{RECORD_HEAD, TAG};

/// Pages of a window.
const WINDOW: u32 = u64::BITS;
/// Bytes of a body before the pages.
const BODY_HEAD: usize = 2 + 4 + 8;
const MAX_BODY: usize = BODY_HEAD + WINDOW as usize * PAGE_SIZE;
/// Longest content of a chunk's record.
pub(super) const MAX_CONTENT: usize = 1 + MAX_BODY;
/// Where the body begins in a record.
const BODY: usize = RECORD_HEAD + 1;
const MAX_RECORD: usize = RECORD_HEAD + MAX_CONTENT + TAG;

const NONE: u8 = 0;
const ZSTD: u8 = 1;
/// Of zstd: the quickest of its ordinary ones. Disks and moves are quicker than the next.
const LEVEL: i32 = 1;

/// Pages of one block, as they were stored together.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Chunk<'a> {
    block: u16,
    window: u32,
    mask: u64,
    contents: &'a [Page],
}

impl<'a> Chunk<'a> {
    fn decode(body: &'a [u8]) -> Result<Self, MalformedStay> {
        let (mut head, rest) = body.split_at_checked(BODY_HEAD).ok_or(MalformedStay::Chunk)?;
        let (block, window, mask) = (head.get_u16(), head.get_u32(), head.get_u64());
        let (contents, odd) = rest.as_chunks();
        if mask == 0 || !odd.is_empty() || contents.len() != mask.count_ones() as usize {
            return Err(MalformedStay::Chunk);
        }
        // Its last page has a number, too.
        if window > u32::MAX / WINDOW {
            return Err(MalformedStay::Place);
        }
        Ok(Self { block, window, mask, contents })
    }

    /// The block.
    #[must_use]
    pub const fn block(&self) -> u16 {
        self.block
    }

    /// Runs of consecutive pages, ascending: the first page and the contents.
    pub fn runs(&self) -> impl Iterator<Item = (u32, &'a [Page])> + use<'a> {
        let (first, mut mask, mut contents) = (self.window * WINDOW, self.mask, self.contents);
        let mut at = 0;
        std::iter::from_fn(move || {
            let skip = mask.trailing_zeros();
            mask = mask.checked_shr(skip)?;
            let length = mask.trailing_ones();
            mask = mask.checked_shr(length).unwrap_or(0);
            let (run, rest) = contents.split_at_checked(length as usize)?;
            contents = rest;
            let page = first + at + skip;
            at += skip + length;
            Some((page, run))
        })
    }

    /// The pages, ascending: number and content.
    pub fn pages(&self) -> impl Iterator<Item = (u32, &'a Page)> + use<'a> {
        self.runs().flat_map(|(first, run)| run.iter().enumerate().map(move |(at, page)| (first + at as u32, page)))
    }

    /// How many pages it has.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.contents.len()
    }

    /// Never: a chunk has a page.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.contents.is_empty()
    }

    /// What tells its place in the order of all chunks.
    pub(super) const fn place(&self) -> (u16, u32) {
        (self.block, self.window)
    }

    /// Whether all its pages are within a block of so many.
    pub(super) fn fits(&self, pages: u32) -> bool {
        let last = self.window * WINDOW + self.mask.ilog2();
        last < pages
    }
}

impl std::fmt::Debug for Chunk<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Chunk({}, {}, {:#x})", self.block, self.window, self.mask)
    }
}

/// Gathers the pages of a chunk, and makes a record of them.
pub(super) struct Packer {
    record: Vec<u8>,
    packed: Vec<u8>,
    place: (u16, u32),
    mask: u64,
    compressor: Compressor<'static>,
}

impl Packer {
    pub(super) fn new() -> io::Result<Self> {
        let (record, packed) = (vec![0; MAX_RECORD], vec![0; MAX_RECORD]);
        Ok(Self { record, packed, place: (0, 0), mask: 0, compressor: Compressor::new(LEVEL)? })
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.mask == 0
    }

    /// Whether a page belongs to the chunk that is gathered.
    pub(super) fn takes(&self, block: u16, page: u32) -> bool {
        self.is_empty() || self.place == (block, page / WINDOW)
    }

    /// Takes a page in, behind the others.
    pub(super) fn put(&mut self, block: u16, page: u32, content: &Page) {
        let at = BODY + BODY_HEAD + self.len() * PAGE_SIZE;
        self.record[at..at + PAGE_SIZE].copy_from_slice(content);
        self.place = (block, page / WINDOW);
        self.mask |= 1 << (page % WINDOW);
    }

    pub(super) const fn len(&self) -> usize {
        self.mask.count_ones() as usize
    }

    /// The record of the chunk, not sealed yet, with room for head and tag; the next chunk begins.
    pub(super) fn take(&mut self) -> &mut [u8] {
        let end = BODY + BODY_HEAD + self.len() * PAGE_SIZE;
        let mut head = &mut self.record[BODY..];
        head.put_u16(self.place.0);
        head.put_u32(self.place.1);
        head.put_u64(self.mask);
        self.mask = 0;
        let body = &self.record[BODY..end];
        // With less room than the body takes, compressing fails if it does not make it smaller.
        let compressed = self.compressor.compress_to_buffer(body, &mut self.packed[BODY..end - 1]);
        let (how, end, record) = match compressed {
            Ok(length) => (ZSTD, BODY + length, &mut self.packed),
            Err(_) => (NONE, end, &mut self.record),
        };
        record[RECORD_HEAD] = how;
        &mut record[..end + TAG]
    }
}

/// Makes pages of the content of a chunk's record.
pub struct Unpacker {
    body: Vec<u8>,
    decompressor: Decompressor<'static>,
}

impl Unpacker {
    /// # Errors
    /// No memory for it.
    pub fn new() -> io::Result<Self> {
        Ok(Self { body: vec![0; MAX_BODY], decompressor: Decompressor::new()? })
    }

    /// The chunk of these bytes, which are those of a record when it has been opened.
    ///
    /// # Errors
    /// [`MalformedStay`]
    pub fn unpack<'a>(&'a mut self, content: &'a [u8]) -> Result<Chunk<'a>, MalformedStay> {
        match content.split_first() {
            Some((&NONE, body)) => Chunk::decode(body),
            Some((&ZSTD, compressed)) => {
                let room = &mut self.body[..];
                let length = self.decompressor.decompress_to_buffer(compressed, room).map_err(|_| MalformedStay::Compression)?;
                Chunk::decode(self.body.get(..length).ok_or(MalformedStay::Compression)?)
            }
            _ => Err(MalformedStay::Compression),
        }
    }
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Unpacker")
    }
}
