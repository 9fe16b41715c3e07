//! Writes a pack, page by page.

use std::io;

use bytes::BufMut;
use godwit_model::Bytes;
use godwit_stream::PAGE_SIZE;
use zstd::bulk::Compressor;

use super::{
    BASE, BASES_PIECE, CHECK, CHUNK_PAGES, Checker, DIGESTS_PIECE, Differences, END, FORM, KEPT, KEPT_PIECE, KeptPages,
    LENGTHS_PIECE, MAX_BODY, NONE, PackId, Page, PageDigest, RUN, RUNS_PIECE, Record, ZSTD, difference,
};
use crate::records::RecordWriter;
use crate::sealed::{Head, RECORD_HEAD, TAG};
use crate::{PackKey, Sink};

/// Of zstd: what a guest writes while its snapshot is taken waits for this.
const LEVEL: i32 = 1;
/// Bytes of a difference that is small without a trial.
const FEW: usize = PAGE_SIZE / 16;
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
    /// Of the differences that are gathered.
    checks: Vec<u8>,
    checker: Checker,
    differences: Differences,
    lengths: Vec<u8>,
    digests: Vec<u8>,
    chunks: u32,
    /// The number of the next page.
    pages: u32,
    kept: KeptPages,
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
            checks: vec![],
            checker: Checker::new(key),
            differences: Differences::default(),
            lengths: vec![],
            digests: vec![],
            chunks: 0,
            pages: 0,
            kept: KeptPages::default(),
        })
    }

    /// Takes a page, whose digest is `digest`; its number.
    ///
    /// # Errors
    /// The file's, or [`io::ErrorKind::FileTooLarge`]: the pack cannot be finished.
    pub fn put(&mut self, content: &Page, digest: &PageDigest) -> io::Result<u32> {
        let number = self.pages;
        self.pages = number.checked_add(1).ok_or(io::ErrorKind::FileTooLarge)?;
        self.kept.push(number);
        let at = BODY + self.gathered * PAGE_SIZE;
        self.record[at..at + PAGE_SIZE].copy_from_slice(content);
        self.digests.extend_from_slice(&digest.0);
        self.gathered += 1;
        if self.gathered == CHUNK_PAGES {
            self.chunk()?;
        }
        Ok(number)
    }

    /// Takes a page as its difference to a base, which is page `at.1` of the pack `at.0` and no difference itself, if that makes it smaller; its number then.
    ///
    /// # Errors
    /// As of [`Self::put`].
    pub(crate) fn put_difference(
        &mut self,
        content: &Page,
        digest: &PageDigest,
        base: &Page,
        at: (PackId, u32),
    ) -> io::Result<Option<u32>> {
        let differs = difference(content, base);
        if !self.is_smaller(&differs, content) || !self.differences.push(self.pages, at.0, at.1) {
            return Ok(None);
        }
        // Before the page is put: that may write the chunk.
        self.checks.extend_from_slice(&self.checker.of(content));
        self.put(&differs, digest).map(Some)
    }

    /// The next page is the one of this number: those before it that were not taken are not kept.
    pub(super) fn skip_to(&mut self, page: u32) {
        debug_assert!(page >= self.pages, "pages ascend");
        self.pages = page;
    }

    /// What is known of differences before their pages come, which are then put as they are kept.
    pub(super) fn set_differences(&mut self, differences: Differences) {
        self.differences = differences;
    }

    /// Takes the next page as another file of this pack has it; one that is a difference with its check.
    ///
    /// # Errors
    /// As of [`Self::put`].
    pub(super) fn put_as_kept(&mut self, content: &Page, digest: &PageDigest, check: Option<&[u8; CHECK]>) -> io::Result<()> {
        self.checks.extend(check.into_iter().flatten());
        self.put(content, digest).map(drop)
    }

    /// Whether a difference takes so much less than the whole page that the second read is worth it.
    fn is_smaller(&mut self, differs: &Page, content: &Page) -> bool {
        let count = |page: &Page| page.iter().filter(|byte| **byte != 0).count();
        let (changed, whole) = (count(differs), count(content));
        if changed <= FEW && changed * 8 <= whole {
            return true;
        }
        if changed > PAGE_SIZE / 8 * 7 {
            return false;
        }
        let room = &mut self.packed[..PAGE_SIZE];
        // What does not compress takes a page.
        let mut length = |page: &Page| self.compressor.compress_to_buffer(page, room).unwrap_or(PAGE_SIZE);
        length(differs) * 4 <= length(content) * 3
    }

    /// How many pages it has, those that are not kept among them.
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
        let (bases, runs) = self.differences.encode();
        self.records.list(Record::Bases, &bases, BASES_PIECE)?;
        self.records.list(Record::Differences, &runs, RUNS_PIECE)?;
        let kept = self.kept.encode(self.pages);
        self.records.list(Record::Kept, &kept, KEPT_PIECE)?;
        let count = |bytes: &[u8], each: usize| u32::try_from(bytes.len() / each).expect("there are few");
        let mut end = Vec::with_capacity(END);
        end.put_u32(self.chunks);
        end.put_u32(self.pages);
        end.put_u64(before);
        end.put_u32(count(&bases, BASE));
        end.put_u32(count(&runs, RUN));
        end.put_u32(count(&kept, KEPT));
        end.put_u32(self.kept.count());
        self.records.record(Record::End, 0, &end)?;
        let length = Bytes(self.records.written());
        Ok((self.records.finish()?, length))
    }

    /// Writes the chunk that was gathered, if there is one.
    fn chunk(&mut self) -> io::Result<()> {
        if self.gathered == 0 {
            return Ok(());
        }
        let pages = BODY + std::mem::take(&mut self.gathered) * PAGE_SIZE;
        let end = pages + self.checks.len();
        self.record[pages..end].copy_from_slice(&self.checks);
        self.checks.clear();
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
