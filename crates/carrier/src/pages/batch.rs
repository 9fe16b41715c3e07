//! The bytes of a batch of pages, specified in `docs/spec/carrier.md`.
//!
//! ```text
//! payload  = u8 compression (0 none, 1 zstd)  u32 length  body, perhaps compressed; `length` bytes without compression
//! body     = u32 length of the entries  entries  contents of the data entries, 4096 bytes each
//! entry    = u8 kind, bit 7 set if a position follows  [varint page]  what the kind has
//! kinds    = 0 block: u16 number    1 zero    2 copy: u16 block, varint page, check
//!            3 patch: u64 mask of pieces (bit 0 is the first), the pieces, check    4 data
//! check    = the first 8 bytes of the digest of what the page holds then
//! ```
//! A position that is not given is the page after that of the entry before; behind a block one is given.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::digest::CHECK;
use super::{PAGE_SIZE, PIECE, Page};

/// Largest body, without compression.
pub const MAX_BODY: usize = MAX_ENTRIES_BYTES + MAX_DATA * PAGE_SIZE + 4;
/// Largest payload.
pub const MAX_PAYLOAD: usize = MAX_BODY + 5;
/// Most entries: what one batch may write is bounded, whatever its size on the wire.
pub const MAX_ENTRIES: usize = 1024;
/// Most data entries.
pub const MAX_DATA: usize = 64;
/// Most bytes of entries: a batch is closed before.
const MAX_ENTRIES_BYTES: usize = 64 << 10;
/// The longest entry: a patch of every piece at a given position.
const LONGEST_ENTRY: usize = 1 + 10 + 8 + PAGE_SIZE + CHECK;

const NONE: u8 = 0;
const ZSTD: u8 = 1;
const AT: u8 = 0x80;

mod kind {
    pub(super) const BLOCK: u8 = 0;
    pub(super) const ZERO: u8 = 1;
    pub(super) const COPY: u8 = 2;
    pub(super) const PATCH: u8 = 3;
    pub(super) const DATA: u8 = 4;
}

/// One entry of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry<'a> {
    /// Zeros.
    Zero,
    /// What another page holds.
    Copy {
        /// Its block.
        block: u16,
        /// Its page.
        page: u32,
        /// Of the content.
        check: [u8; CHECK],
    },
    /// What the page holds, with some pieces replaced.
    Patch {
        /// Which; bit 0 is the first.
        mask: u64,
        /// As many pieces as the mask has bits.
        pieces: &'a [u8],
        /// Of the result.
        check: [u8; CHECK],
    },
    /// All of it.
    Data(&'a Page),
}

/// Bytes that are not a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MalformedBatch {
    /// It ends in the middle, or has something left over.
    #[error("a batch of pages has a wrong length")]
    Length,
    /// It does not decompress to the length it claims.
    #[error("a batch of pages does not decompress")]
    Compression,
    /// An entry of a kind that this version does not know.
    #[error("a batch of pages has an entry of unknown kind {0}")]
    Kind(u8),
    /// More entries than a batch may have.
    #[error("a batch of pages has too many entries")]
    Entries,
    /// A page without a block or a position.
    #[error("a batch of pages has an entry without a place")]
    Place,
}

/// Writes a batch.
#[derive(Default)]
pub(super) struct Writer {
    entries: BytesMut,
    data: BytesMut,
    count: usize,
    /// Where an entry without a position would go.
    next: Option<(u16, u32)>,
    block: Option<u16>,
}

impl Writer {
    /// Whether one more entry of any kind fits.
    pub(super) fn has_room(&self) -> bool {
        // A block and the entry itself.
        self.count + 2 <= MAX_ENTRIES
            && self.entries.len() + LONGEST_ENTRY + 3 <= MAX_ENTRIES_BYTES
            && self.data.len() < MAX_DATA * PAGE_SIZE
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Adds an entry, and answers how many bytes it takes without compression. There must be room.
    pub(super) fn put(&mut self, block: u16, page: u32, entry: &Entry<'_>) -> usize {
        let before = self.entries.len() + self.data.len();
        if self.block != Some(block) {
            self.entries.put_u8(kind::BLOCK);
            self.entries.put_u16(block);
            self.block = Some(block);
            self.count += 1;
        }
        let kind = match entry {
            Entry::Zero => kind::ZERO,
            Entry::Copy { .. } => kind::COPY,
            Entry::Patch { .. } => kind::PATCH,
            Entry::Data(_) => kind::DATA,
        };
        if self.next == Some((block, page)) {
            self.entries.put_u8(kind);
        } else {
            self.entries.put_u8(kind | AT);
            put_varint(&mut self.entries, page);
        }
        match entry {
            Entry::Zero => {}
            Entry::Copy { block, page, check } => {
                self.entries.put_u16(*block);
                put_varint(&mut self.entries, *page);
                self.entries.put_slice(check);
            }
            Entry::Patch { mask, pieces, check } => {
                self.entries.put_u64(*mask);
                self.entries.put_slice(pieces);
                self.entries.put_slice(check);
            }
            Entry::Data(page) => self.data.put_slice(&page[..]),
        }
        self.count += 1;
        self.next = page.checked_add(1).map(|next| (block, next));
        self.entries.len() + self.data.len() - before
    }

    /// The body of all entries since the last call.
    pub(super) fn finish(&mut self) -> Bytes {
        let mut body = BytesMut::with_capacity(4 + self.entries.len() + self.data.len());
        body.put_u32(u32::try_from(self.entries.len()).expect("a batch is far below 4 GiB"));
        body.put_slice(&self.entries);
        body.put_slice(&self.data);
        self.entries.clear();
        self.data.clear();
        (self.count, self.next, self.block) = (0, None, None);
        body.freeze()
    }
}

/// The payload of a body, compressed if that makes it smaller.
pub(super) fn payload(body: &[u8], compressed: Option<&[u8]>) -> Bytes {
    let compressed = compressed.filter(|compressed| compressed.len() < body.len());
    let (how, bytes) = compressed.map_or((NONE, body), |compressed| (ZSTD, compressed));
    let mut payload = BytesMut::with_capacity(5 + bytes.len());
    payload.put_u8(how);
    payload.put_u32(u32::try_from(body.len()).expect("a batch is far below 4 GiB"));
    payload.put_slice(bytes);
    payload.freeze()
}

fn put_varint(out: &mut BytesMut, mut value: u32) {
    while value >= 0x80 {
        out.put_u8((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

fn varint(bytes: &mut &[u8]) -> Option<u32> {
    let mut value = 0_u32;
    for shift in [0, 7, 14, 21, 28] {
        let byte = bytes.try_get_u8().ok()?;
        let bits = u32::from(byte & 0x7f);
        if shift == 28 && bits > 0xf {
            return None;
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// Takes the compression off a payload; `scratch` is where that goes.
pub(super) fn body<'a>(
    payload: &'a [u8],
    scratch: &'a mut Vec<u8>,
    decompress: impl FnOnce(&[u8], &mut Vec<u8>) -> Option<usize>,
) -> Result<&'a [u8], MalformedBatch> {
    let mut rest = payload;
    let how = rest.try_get_u8().map_err(|_| MalformedBatch::Length)?;
    let length = rest.try_get_u32().map_err(|_| MalformedBatch::Length)? as usize;
    if length > MAX_BODY {
        return Err(MalformedBatch::Length);
    }
    match how {
        NONE if rest.len() == length => Ok(rest),
        NONE => Err(MalformedBatch::Length),
        ZSTD => {
            scratch.clear();
            scratch.reserve(length);
            let written = decompress(rest, scratch).ok_or(MalformedBatch::Compression)?;
            if written == length && scratch.len() == length { Ok(scratch) } else { Err(MalformedBatch::Compression) }
        }
        other => Err(MalformedBatch::Kind(other)),
    }
}

/// Reads the entries of a body, one after the other.
pub(super) struct Reader<'a> {
    entries: &'a [u8],
    data: &'a [u8],
    block: Option<u16>,
    next: Option<u32>,
    count: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(mut body: &'a [u8]) -> Result<Self, MalformedBatch> {
        let length = body.try_get_u32().map_err(|_| MalformedBatch::Length)? as usize;
        let (entries, data) = body.split_at_checked(length).ok_or(MalformedBatch::Length)?;
        Ok(Self { entries, data, block: None, next: None, count: 0 })
    }

    /// The next entry with its block and page, or `None` at the end.
    pub(super) fn entry(&mut self) -> Result<Option<(u16, u32, Entry<'a>)>, MalformedBatch> {
        loop {
            let Ok(tag) = self.entries.try_get_u8() else {
                return if self.data.is_empty() { Ok(None) } else { Err(MalformedBatch::Length) };
            };
            self.count += 1;
            if self.count > MAX_ENTRIES {
                return Err(MalformedBatch::Entries);
            }
            if tag == kind::BLOCK {
                self.block = Some(self.entries.try_get_u16().map_err(|_| MalformedBatch::Length)?);
                self.next = None;
                continue;
            }
            let page = if tag & AT == 0 {
                self.next.ok_or(MalformedBatch::Place)?
            } else {
                varint(&mut self.entries).ok_or(MalformedBatch::Place)?
            };
            let block = self.block.ok_or(MalformedBatch::Place)?;
            self.next = page.checked_add(1);
            return Ok(Some((block, page, self.content(tag & !AT)?)));
        }
    }

    fn content(&mut self, kind: u8) -> Result<Entry<'a>, MalformedBatch> {
        Ok(match kind {
            kind::ZERO => Entry::Zero,
            kind::COPY => {
                let block = self.entries.try_get_u16().map_err(|_| MalformedBatch::Length)?;
                let page = varint(&mut self.entries).ok_or(MalformedBatch::Place)?;
                Entry::Copy { block, page, check: self.check()? }
            }
            kind::PATCH => {
                let mask = self.entries.try_get_u64().map_err(|_| MalformedBatch::Length)?;
                let length = mask.count_ones() as usize * PIECE;
                let (pieces, rest) = self.entries.split_at_checked(length).ok_or(MalformedBatch::Length)?;
                self.entries = rest;
                Entry::Patch { mask, pieces, check: self.check()? }
            }
            kind::DATA => {
                let (page, rest) = self.data.split_first_chunk().ok_or(MalformedBatch::Length)?;
                self.data = rest;
                Entry::Data(page)
            }
            other => return Err(MalformedBatch::Kind(other)),
        })
    }

    fn check(&mut self) -> Result<[u8; CHECK], MalformedBatch> {
        let (check, rest) = self.entries.split_first_chunk().ok_or(MalformedBatch::Length)?;
        self.entries = rest;
        Ok(*check)
    }
}
