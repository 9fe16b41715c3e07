//! Reads pages of a pack, in any order.

use std::io;

use bytes::Buf;
use godwit_stream::PAGE_SIZE;
use zstd::bulk::Decompressor;

use super::{
    BASE, BASES_PIECE, Base, CHECK, CHUNK_PAGES, Checker, DIGEST, DIGESTS_PIECE, Differences, END, FORM, KEPT, KEPT_PIECE,
    KeptPages, LENGTH, LENGTHS_PIECE, MAX_BODY, MAX_CONTENT, MAX_RUNS, NONE, PackId, Page, PageDigest, RUN, RUNS_PIECE, Record,
    ZSTD, difference,
};
use crate::PackKey;
use crate::sealed::{HEAD, OVERHEAD};
use crate::stored::{FileError, Malformed, Records, Stored, list_length};

/// Shortest record of a chunk.
const MIN_CHUNK: u64 = (OVERHEAD + 2) as u64;

/// Reads a pack. In memory are eight bytes for each chunk, of which the file has at least 23, and twelve for each run of differences and of kept pages.
pub struct PackReader<S> {
    records: Records<S>,
    checker: Checker,
    differences: Differences,
    /// Where each chunk begins, and where the last ends.
    offsets: Vec<u64>,
    /// How many there were when it was first written.
    pages: u32,
    kept: KeptPages,
}

/// Room in which chunks are opened, one at a time.
pub struct Unsealed {
    record: Vec<u8>,
    body: Vec<u8>,
    decompressor: Decompressor<'static>,
}

impl Unsealed {
    /// # Errors
    /// No memory for it.
    pub fn new() -> io::Result<Self> {
        let (record, body) = (vec![0; MAX_CONTENT + OVERHEAD], vec![0; MAX_BODY]);
        Ok(Self { record, body, decompressor: Decompressor::new()? })
    }

    /// What is in the content of a chunk's record, when it has been opened; `pages` is how many there are to be, and `differences` how many of them are some.
    ///
    /// # Errors
    /// [`Malformed::Chunk`]
    pub fn unpack<'a>(&'a mut self, content: &'a [u8], pages: usize, differences: usize) -> Result<Packed<'a>, Malformed> {
        unpack(content, (pages, differences), &mut self.decompressor, &mut self.body)
    }
}

/// What is in a chunk.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a> {
    /// Its pages; those that are differences, as such.
    pub pages: &'a [Page],
    /// The checks of those that are differences, in order.
    pub checks: &'a [[u8; CHECK]],
}

impl std::fmt::Debug for Unsealed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Unsealed")
    }
}

impl<S> std::fmt::Debug for PackReader<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PackReader").field("pages", &self.pages).finish_non_exhaustive()
    }
}

/// How many chunks so many pages make.
const fn chunks_of(pages: u32) -> u32 {
    pages.div_ceil(CHUNK_PAGES as u32)
}

impl<S: Stored> PackReader<S> {
    /// Opens a pack: head and end are right, and the file is as long as its end says.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn open(file: S, key: &PackKey) -> Result<Self, FileError> {
        let records = Records::open(file, &FORM, key.expose())?;
        let end: [u8; END] = records.end(Record::End)?;
        let mut end = &end[..];
        let (chunks, pages, before) = (end.get_u32(), end.get_u32(), end.get_u64());
        let (bases, runs) = (u64::from(end.get_u32()) * BASE as u64, u64::from(end.get_u32()) * RUN as u64);
        let (kept_runs, count) = (u64::from(end.get_u32()) * KEPT as u64, end.get_u32());
        let lengths = u64::from(chunks) * LENGTH as u64;
        let digests = list_length(u64::from(count) * DIGEST as u64, DIGESTS_PIECE);
        let lists = list_length(lengths, LENGTHS_PIECE) + digests;
        let more = list_length(bases, BASES_PIECE) + list_length(runs, RUNS_PIECE) + list_length(kept_runs, KEPT_PIECE);
        let length = before.saturating_add(lists + more).saturating_add((END + OVERHEAD) as u64);
        let least = HEAD as u64 + u64::from(chunks) * MIN_CHUNK;
        let many = runs > (MAX_RUNS * RUN) as u64 || kept_runs > (MAX_RUNS * KEPT) as u64;
        let is_long = many || bases > u64::from(u16::MAX) * BASE as u64;
        if chunks != chunks_of(count) || before < least || length != records.length() || is_long {
            return Err(Malformed::Count.into());
        }
        let (lengths, at_digests) = records.list(Record::Lengths, before, lengths, LENGTHS_PIECE)?;
        let mut at = HEAD as u64;
        let mut offsets = vec![at];
        let (lengths, _) = lengths.as_chunks::<LENGTH>();
        for length in lengths {
            at += u64::from(u32::from_be_bytes(*length));
            offsets.push(at);
        }
        if at != before {
            return Err(Malformed::Count.into());
        }
        let (bases, at) = records.list(Record::Bases, at_digests + digests, bases, BASES_PIECE)?;
        let (runs, at) = records.list(Record::Differences, at, runs, RUNS_PIECE)?;
        let (kept, _) = records.list(Record::Kept, at, kept_runs, KEPT_PIECE)?;
        let kept = KeptPages::decode(&kept, pages, count)?;
        let differences = Differences::decode(&bases, &runs, pages)?;
        Ok(Self { records, checker: Checker::new(key), differences, offsets, pages, kept })
    }

    /// How many pages it had when it was first written: their numbers are below this.
    #[must_use]
    pub const fn pages(&self) -> u32 {
        self.pages
    }

    /// How many chunks it has.
    #[must_use]
    pub fn chunks(&self) -> u32 {
        chunks_of(self.kept.count())
    }

    /// The pages that it has.
    pub(crate) const fn kept(&self) -> &KeptPages {
        &self.kept
    }

    /// In which chunk a page is, and where there; none if it is not kept.
    #[must_use]
    pub fn place_of(&self, page: u32) -> Option<(u32, usize)> {
        let position = self.kept.position(page)?;
        Some((position / CHUNK_PAGES as u32, position as usize % CHUNK_PAGES))
    }

    pub(super) const fn differences(&self) -> &Differences {
        &self.differences
    }

    /// The packs with which differences of this one are joined.
    #[must_use]
    pub fn bases(&self) -> &[PackId] {
        self.differences.bases()
    }

    /// The base of a page that is kept, if it is a difference.
    pub(crate) fn base_of(&self, page: u32) -> Option<Base> {
        self.differences.of(page)
    }

    /// Joins a difference with its base; `check` is the difference's. What that makes is what was stored, or an error.
    pub(crate) fn join(&self, page: u32, differs: &Page, check: &[u8; CHECK], base: &Page) -> Result<Page, FileError> {
        let content = difference(differs, base);
        if self.checker.of(&content) == *check { Ok(content) } else { Err(FileError::Digest(page)) }
    }

    /// How many pages of a chunk are differences, of those before the one at place `within`.
    pub(crate) fn differences_before(&self, chunk: u32, within: usize) -> usize {
        let first = chunk.saturating_mul(CHUNK_PAGES as u32);
        if self.differences.bases().is_empty() {
            return 0;
        }
        let pages = (first..).take(within).map_while(|position| self.kept.page(position));
        pages.filter(|page| self.differences.of(*page).is_some()).count()
    }

    /// What is in a chunk.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn chunk<'a>(&self, chunk: u32, room: &'a mut Unsealed) -> Result<Packed<'a>, FileError> {
        let place = |at: u32| self.offsets.get(at as usize).copied();
        let (Some(from), Some(to)) = (place(chunk), chunk.checked_add(1).and_then(place)) else {
            return Err(Malformed::Place.into());
        };
        let length = usize::try_from(to - from).map_err(|_| Malformed::Chunk)?;
        let content = self.records.known(Record::Chunk, u64::from(chunk), (from, length), &mut room.record)?;
        let whole = (self.kept.count() as usize - chunk as usize * CHUNK_PAGES).min(CHUNK_PAGES);
        let differences = self.differences_before(chunk, whole);
        Ok(unpack(content, (whole, differences), &mut room.decompressor, &mut room.body)?)
    }

    /// The pages that it has, in order, with their digests.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn digests(&self) -> Result<impl Iterator<Item = (u32, PageDigest)> + use<S>, FileError> {
        let before = self.offsets.last().copied().unwrap_or(HEAD as u64);
        let at = before + list_length(u64::from(self.chunks()) * LENGTH as u64, LENGTHS_PIECE);
        let (digests, _) = self.records.list(Record::Digests, at, u64::from(self.kept.count()) * DIGEST as u64, DIGESTS_PIECE)?;
        Ok((0..).zip(self.kept.pages()).map(move |(position, page): (usize, u32)| {
            let (digests, _) = digests.as_chunks::<DIGEST>();
            (page, PageDigest(digests[position]))
        }))
    }
}

fn unpack<'a>(
    content: &'a [u8],
    (pages, differences): (usize, usize),
    decompressor: &mut Decompressor<'_>,
    room: &'a mut [u8],
) -> Result<Packed<'a>, Malformed> {
    let body = match content.split_first() {
        Some((&NONE, body)) => body,
        Some((&ZSTD, compressed)) => {
            let length = decompressor.decompress_to_buffer(compressed, room).map_err(|_| Malformed::Chunk)?;
            room.get(..length).ok_or(Malformed::Chunk)?
        }
        _ => return Err(Malformed::Chunk),
    };
    let (pages, checks) = body.split_at_checked(pages * PAGE_SIZE).ok_or(Malformed::Chunk)?;
    let ((pages, _), (checks, odd)) = (pages.as_chunks(), checks.as_chunks());
    if odd.is_empty() && checks.len() == differences { Ok(Packed { pages, checks }) } else { Err(Malformed::Chunk) }
}
