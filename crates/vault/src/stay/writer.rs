//! Writes a stay, page by page.

use std::fs::File;
use std::io::{self, Write};

use bytes::BufMut;
use godwit_model::Bytes;

use super::chunk::Packer;
use super::{FORM, Identity, Page, Record};
use crate::key::StayKey;
use crate::pack::is_zero;
use crate::records::RecordWriter;
use crate::sealed::{Head, OVERHEAD};

/// Bytes of what an end says: chunks, pages, and bytes before the end.
pub(super) const END: usize = 3 * 8;

/// What a stay is written into.
pub trait Sink: Write {
    /// Returns when all that was written is on stable storage.
    ///
    /// # Errors
    /// It is not.
    fn sync(&mut self) -> io::Result<()>;
}

impl Sink for File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

impl Sink for Vec<u8> {
    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes a stay. What was not finished is torn, and never taken for whole.
pub struct StayWriter<W: Sink> {
    records: RecordWriter<W>,
    packer: Packer,
    /// Pages of each block.
    blocks: Vec<u32>,
    /// Behind the last page that came.
    next: (u16, u64),
    chunks: u64,
    pages: u64,
}

impl<W: Sink> std::fmt::Debug for StayWriter<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StayWriter").field("pages", &self.pages).field("written", &self.records.written()).finish_non_exhaustive()
    }
}

impl<W: Sink> StayWriter<W> {
    /// Begins a stay in an empty file.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if `identity` is none ([`super::InvalidIdentity`]); else the file's, or that there are no random bytes.
    pub fn begin(file: W, key: &StayKey, identity: &Identity) -> io::Result<Self> {
        Self::begin_with(file, key, identity, Head::draw(&FORM)?)
    }

    /// The caller answers for the salt in `head` being fresh.
    pub(super) fn begin_with(file: W, key: &StayKey, identity: &Identity, head: Head) -> io::Result<Self> {
        let encoded = identity.encode().map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let mut writer = Self {
            records: RecordWriter::begin(file, &FORM, key.expose(), head, Bytes(u64::MAX))?,
            packer: Packer::new()?,
            blocks: identity.blocks.iter().map(|block| block.pages).collect(),
            next: (0, 0),
            chunks: 0,
            pages: 0,
        };
        writer.records.record(Record::Identity, 0, &encoded)?;
        Ok(writer)
    }

    /// From now on whatever would make the file longer than `limit` is an error, [`io::ErrorKind::FileTooLarge`].
    #[must_use]
    pub fn limited(mut self, limit: Bytes) -> Self {
        // The end must fit, too.
        self.records.set_limit(limit, END + OVERHEAD);
        self
    }

    /// Takes a page. Blocks, and pages within a block, come in ascending order, each once; those that hold zeros may be left out, and are not
    /// kept: what a stay does not have is zero.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for a page that is not in the identity or out of order: it is not taken. After any other error the stay
    /// cannot be finished.
    pub fn page(&mut self, block: u16, page: u32, content: &Page) -> io::Result<()> {
        if self.blocks.get(usize::from(block)).is_none_or(|pages| page >= *pages) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a page of a stay is beyond its block"));
        }
        if (block, u64::from(page)) < self.next {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a page of a stay is out of order"));
        }
        self.next = (block, u64::from(page) + 1);
        if is_zero(content) {
            return Ok(());
        }
        if !self.packer.takes(block, page) {
            self.chunk()?;
        }
        self.packer.put(block, page, content);
        Ok(())
    }

    /// Writes the end and returns when all is on stable storage.
    ///
    /// # Errors
    /// The file's, or that of an earlier page: the stay is torn.
    pub fn finish(mut self) -> io::Result<W> {
        self.chunk()?;
        let mut end = Vec::with_capacity(END);
        end.put_u64(self.chunks);
        end.put_u64(self.pages);
        end.put_u64(self.records.written());
        self.records.end(Record::End, &end)?;
        self.records.finish()
    }

    /// Writes the chunk that was gathered, if there is one.
    fn chunk(&mut self) -> io::Result<()> {
        if self.packer.is_empty() {
            return Ok(());
        }
        let pages = self.packer.len() as u64;
        self.records.sealed(Record::Chunk, self.chunks, self.packer.take())?;
        self.chunks += 1;
        self.pages += pages;
        Ok(())
    }
}
