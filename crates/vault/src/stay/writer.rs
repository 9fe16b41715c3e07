//! Writes a stay, page by page.

use std::fs::File;
use std::io::{self, BufWriter, Write};

use bytes::BufMut;
use godwit_model::Bytes;

use super::chunk::Packer;
use super::{FORM, Identity, Page, Record};
use crate::key::StayKey;
use crate::sealed::{HEAD, Head, OVERHEAD, RECORD_HEAD, Sealer};

/// Bytes of what an end says: chunks, pages, and bytes before the end.
pub(super) const END: usize = 3 * 8;
/// Bytes that are gathered before they are written.
const BUFFER: usize = 256 << 10;

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
    out: BufWriter<W>,
    sealer: Sealer,
    packer: Packer,
    /// Pages of each block.
    blocks: Vec<u32>,
    /// Behind the last page that came.
    next: (u16, u64),
    chunks: u64,
    pages: u64,
    written: u64,
    limit: u64,
    /// A record may have been written in part.
    broken: bool,
}

impl<W: Sink> std::fmt::Debug for StayWriter<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StayWriter").field("pages", &self.pages).field("written", &self.written).finish_non_exhaustive()
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
            out: BufWriter::with_capacity(BUFFER, file),
            sealer: Sealer::new(&FORM, key.expose(), head),
            packer: Packer::new()?,
            blocks: identity.blocks.iter().map(|block| block.pages).collect(),
            next: (0, 0),
            chunks: 0,
            pages: 0,
            written: HEAD as u64,
            limit: u64::MAX,
            broken: false,
        };
        writer.out.write_all(head.bytes())?;
        writer.small(Record::Identity, &encoded)?;
        Ok(writer)
    }

    /// From now on whatever would make the file longer than `limit` is an error, [`io::ErrorKind::FileTooLarge`].
    #[must_use]
    pub const fn limited(mut self, limit: Bytes) -> Self {
        self.limit = limit.0;
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
        end.put_u64(self.written);
        self.small(Record::End, &end)?;
        let mut file = self.out.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync()?;
        Ok(file)
    }

    /// Writes the chunk that was gathered, if there is one.
    fn chunk(&mut self) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::other("an earlier part of the stay could not be written"));
        }
        if self.packer.is_empty() {
            return Ok(());
        }
        let pages = self.packer.len() as u64;
        let record = self.packer.take();
        self.broken = true;
        // The end must fit, too.
        if self.written + record.len() as u64 + (END + OVERHEAD) as u64 > self.limit {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "the stay is longer than it may be"));
        }
        self.sealer.seal(Record::Chunk, self.chunks, record);
        self.out.write_all(record)?;
        self.broken = false;
        self.written += record.len() as u64;
        self.chunks += 1;
        self.pages += pages;
        Ok(())
    }

    /// Writes a record of which there is one in the file.
    fn small(&mut self, kind: Record, content: &[u8]) -> io::Result<()> {
        let mut record = vec![0; content.len() + OVERHEAD];
        record[RECORD_HEAD..RECORD_HEAD + content.len()].copy_from_slice(content);
        self.sealer.seal(kind, 0, &mut record);
        self.out.write_all(&record)?;
        self.written += record.len() as u64;
        Ok(())
    }
}

/// Whether a page holds nothing but zeros.
fn is_zero(page: &Page) -> bool {
    let (words, _) = page.as_chunks::<64>();
    words.iter().all(|word| word == &[0; 64])
}
