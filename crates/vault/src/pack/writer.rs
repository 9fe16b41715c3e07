//! Writes a pack, page by page.

use std::io;

use bytes::BufMut;
use godwit_model::Bytes;
use godwit_stream::PAGE_SIZE;
use zstd::bulk::Compressor;

use super::{CHUNK_PAGES, DIGESTS_PIECE, END, FORM, LENGTHS_PIECE, MAX_BODY, NONE, Page, PageDigest, Record, ZSTD};
use crate::records::RecordWriter;
use crate::sealed::{Head, RECORD_HEAD, TAG};
use crate::{PackKey, Sink};

/// Of zstd: what a guest writes while its snapshot is taken waits for this.
const LEVEL: i32 = 1;
/// Where the body begins in a record.
const BODY: usize = RECORD_HEAD + 1;

/// Writes a pack. What was not finished is torn, and never taken for whole.
pub struct PackWriter<W: Sink> {
    records: RecordWriter<W>,
    compressor: Compressor<'static>,
    /// The chunk that is gathered, and room for it compressed.
    record: Vec<u8>,
    packed: Vec<u8>,
    gathered: usize,
    lengths: Vec<u8>,
    digests: Vec<u8>,
    chunks: u32,
    pages: u32,
}

impl<W: Sink> std::fmt::Debug for PackWriter<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PackWriter").field("pages", &self.pages).finish_non_exhaustive()
    }
}

impl<W: Sink> PackWriter<W> {
    /// Begins a pack in an empty file, which may not become longer than `limit`.
    ///
    /// # Errors
    /// The file's, or that there are no random bytes.
    pub fn begin(file: W, key: &PackKey, limit: Bytes) -> io::Result<Self> {
        Self::begin_with(file, key, limit, Head::draw(&FORM)?)
    }

    /// The caller answers for the salt in `head` being fresh.
    pub(crate) fn begin_with(file: W, key: &PackKey, limit: Bytes, head: Head) -> io::Result<Self> {
        Ok(Self {
            records: RecordWriter::begin(file, &FORM, key.expose(), head, limit)?,
            compressor: Compressor::new(LEVEL)?,
            record: vec![0; BODY + MAX_BODY + TAG],
            packed: vec![0; BODY + MAX_BODY + TAG],
            gathered: 0,
            lengths: vec![],
            digests: vec![],
            chunks: 0,
            pages: 0,
        })
    }

    /// Takes a page, whose digest is `digest`; its number.
    ///
    /// # Errors
    /// The file's, or [`io::ErrorKind::FileTooLarge`]: the pack cannot be finished.
    pub fn put(&mut self, content: &Page, digest: &PageDigest) -> io::Result<u32> {
        let number = self.pages;
        self.pages = number.checked_add(1).ok_or(io::ErrorKind::FileTooLarge)?;
        let at = BODY + self.gathered * PAGE_SIZE;
        self.record[at..at + PAGE_SIZE].copy_from_slice(content);
        self.digests.extend_from_slice(&digest.0);
        self.gathered += 1;
        if self.gathered == CHUNK_PAGES {
            self.chunk()?;
        }
        Ok(number)
    }

    /// How many pages it has.
    #[must_use]
    pub const fn pages(&self) -> u32 {
        self.pages
    }

    /// Writes lists and end, and returns when all is on stable storage: the file, and how long it is.
    ///
    /// # Errors
    /// The file's, or that of an earlier page: the pack is torn.
    pub fn finish(mut self) -> io::Result<(W, Bytes)> {
        self.chunk()?;
        let before = self.records.written();
        self.records.list(Record::Lengths, &self.lengths, LENGTHS_PIECE)?;
        self.records.list(Record::Digests, &self.digests, DIGESTS_PIECE)?;
        let mut end = Vec::with_capacity(END);
        end.put_u32(self.chunks);
        end.put_u32(self.pages);
        end.put_u64(before);
        self.records.record(Record::End, 0, &end)?;
        let length = Bytes(self.records.written());
        Ok((self.records.finish()?, length))
    }

    /// Writes the chunk that was gathered, if there is one.
    fn chunk(&mut self) -> io::Result<()> {
        if self.gathered == 0 {
            return Ok(());
        }
        let end = BODY + std::mem::take(&mut self.gathered) * PAGE_SIZE;
        // With less room than the body takes, compressing fails if it does not make it smaller.
        let compressed = self.compressor.compress_to_buffer(&self.record[BODY..end], &mut self.packed[BODY..end - 1]);
        let (how, end, record) = match compressed {
            Ok(length) => (ZSTD, BODY + length, &mut self.packed),
            Err(_) => (NONE, end, &mut self.record),
        };
        record[RECORD_HEAD] = how;
        let record = &mut record[..end + TAG];
        self.lengths.put_u32(u32::try_from(record.len()).expect("a chunk is short"));
        self.records.sealed(Record::Chunk, u64::from(self.chunks), record)?;
        self.chunks += 1;
        Ok(())
    }
}
