//! Reads pages of a pack, in any order.

use std::io;

use bytes::Buf;
use zstd::bulk::Decompressor;

use super::{
    CHUNK_PAGES, DIGEST, DIGESTS_PIECE, END, FORM, LENGTH, LENGTHS_PIECE, MAX_BODY, MAX_CONTENT, NONE, Page, PageDigest, Record,
    ZSTD,
};
use crate::sealed::{HEAD, OVERHEAD};
use crate::stored::{FileError, Malformed, Records, Stored, list_length};
use crate::{PackKey, TeamKey};

/// Shortest record of a chunk.
const MIN_CHUNK: u64 = (OVERHEAD + 2) as u64;

/// Reads a pack. In memory are eight bytes for each chunk, of which the file has at least 23.
pub struct PackReader<S> {
    records: Records<S>,
    /// Where each chunk begins, and where the last ends.
    offsets: Vec<u64>,
    pages: u32,
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

    /// The pages of the content of a chunk's record, when it has been opened; `whole` is how many there are to be.
    ///
    /// # Errors
    /// [`Malformed::Chunk`]
    pub fn unpack<'a>(&'a mut self, content: &'a [u8], whole: usize) -> Result<&'a [Page], Malformed> {
        unpack(content, whole, &mut self.decompressor, &mut self.body)
    }
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
        let lengths = u64::from(chunks) * LENGTH as u64;
        let lists = list_length(lengths, LENGTHS_PIECE) + list_length(u64::from(pages) * DIGEST as u64, DIGESTS_PIECE);
        let length = before.saturating_add(lists).saturating_add((END + OVERHEAD) as u64);
        let least = HEAD as u64 + u64::from(chunks) * MIN_CHUNK;
        if chunks != chunks_of(pages) || before < least || length != records.length() {
            return Err(Malformed::Count.into());
        }
        let (lengths, _) = records.list(Record::Lengths, before, lengths, LENGTHS_PIECE)?;
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
        Ok(Self { records, offsets, pages })
    }

    /// How many pages it has.
    #[must_use]
    pub const fn pages(&self) -> u32 {
        self.pages
    }

    /// In which chunk a page is, and where there.
    #[must_use]
    pub const fn chunk_of(page: u32) -> (u32, usize) {
        (page / CHUNK_PAGES as u32, page as usize % CHUNK_PAGES)
    }

    /// The pages of a chunk.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn chunk<'a>(&self, chunk: u32, room: &'a mut Unsealed) -> Result<&'a [Page], FileError> {
        let place = |at: u32| self.offsets.get(at as usize).copied();
        let (Some(from), Some(to)) = (place(chunk), chunk.checked_add(1).and_then(place)) else {
            return Err(Malformed::Place.into());
        };
        let length = usize::try_from(to - from).map_err(|_| Malformed::Chunk)?;
        let content = self.records.known(Record::Chunk, u64::from(chunk), (from, length), &mut room.record)?;
        let whole = (self.pages as usize - chunk as usize * CHUNK_PAGES).min(CHUNK_PAGES);
        Ok(unpack(content, whole, &mut room.decompressor, &mut room.body)?)
    }

    /// The digests of all pages, in order.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn digests(&self) -> Result<impl Iterator<Item = PageDigest>, FileError> {
        let before = self.offsets.last().copied().unwrap_or(HEAD as u64);
        let at = before + list_length(u64::from(chunks_of(self.pages)) * LENGTH as u64, LENGTHS_PIECE);
        let (digests, _) = self.records.list(Record::Digests, at, u64::from(self.pages) * DIGEST as u64, DIGESTS_PIECE)?;
        Ok((0..self.pages as usize).map(move |page| {
            let (digests, _) = digests.as_chunks::<DIGEST>();
            PageDigest(digests[page])
        }))
    }

    /// Reads everything, and compares each page with its digest.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn verify(&self, key: &TeamKey) -> Result<(), FileError> {
        let mut digests = self.digests()?;
        let mut room = Unsealed::new()?;
        let mut number = 0;
        for chunk in 0..chunks_of(self.pages) {
            for page in self.chunk(chunk, &mut room)? {
                if digests.next() != Some(PageDigest::of(key, page)) {
                    return Err(FileError::Digest(number));
                }
                number += 1;
            }
        }
        Ok(())
    }
}

fn unpack<'a>(
    content: &'a [u8],
    whole: usize,
    decompressor: &mut Decompressor<'_>,
    room: &'a mut [u8],
) -> Result<&'a [Page], Malformed> {
    let body = match content.split_first() {
        Some((&NONE, body)) => body,
        Some((&ZSTD, compressed)) => {
            let length = decompressor.decompress_to_buffer(compressed, room).map_err(|_| Malformed::Chunk)?;
            room.get(..length).ok_or(Malformed::Chunk)?
        }
        _ => return Err(Malformed::Chunk),
    };
    let (pages, odd) = body.as_chunks();
    if odd.is_empty() && pages.len() == whole { Ok(pages) } else { Err(Malformed::Chunk) }
}
