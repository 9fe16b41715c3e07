//! Writes the records of one file, one behind the other.

use std::io::{self, BufWriter, Write};

use godwit_model::Bytes;

use crate::Sink;
use crate::sealed::{Form, HEAD, Head, Kind, OVERHEAD, RECORD_HEAD, Sealer};

/// Bytes that are gathered before they are written.
const BUFFER: usize = 256 << 10;

pub(crate) struct RecordWriter<W: Sink> {
    out: BufWriter<W>,
    sealer: Sealer,
    written: u64,
    limit: u64,
    /// Room that is kept for the end.
    kept: u64,
    /// A record may have been written in part.
    broken: bool,
}

impl<W: Sink> RecordWriter<W> {
    /// The caller answers for the salt in `head` being fresh.
    pub(crate) fn begin(file: W, form: &Form, key: &[u8; 32], head: Head, limit: Bytes) -> io::Result<Self> {
        let mut out = BufWriter::with_capacity(BUFFER, file);
        out.write_all(head.bytes())?;
        Ok(Self { out, sealer: Sealer::new(form, key, head), written: HEAD as u64, limit: limit.0, kept: 0, broken: false })
    }

    /// From now on the file may become no longer, and `kept` of that are for its last record.
    pub(crate) fn set_limit(&mut self, limit: Bytes, kept: usize) {
        (self.limit, self.kept) = (limit.0, kept as u64);
    }

    pub(crate) const fn written(&self) -> u64 {
        self.written
    }

    /// Writes a record that has room for head and tag.
    pub(crate) fn sealed(&mut self, kind: impl Kind, number: u64, record: &mut [u8]) -> io::Result<()> {
        if std::mem::replace(&mut self.broken, true) {
            return Err(io::Error::other("an earlier part of the file could not be written"));
        }
        if self.written.saturating_add(record.len() as u64).saturating_add(self.kept) > self.limit {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "the file is longer than it may be"));
        }
        self.sealer.seal(kind, number, record);
        self.out.write_all(record)?;
        self.written += record.len() as u64;
        self.broken = false;
        Ok(())
    }

    pub(crate) fn record(&mut self, kind: impl Kind, number: u64, content: &[u8]) -> io::Result<()> {
        let mut record = vec![0; content.len() + OVERHEAD];
        record[RECORD_HEAD..RECORD_HEAD + content.len()].copy_from_slice(content);
        self.sealed(kind, number, &mut record)
    }

    /// Writes the last record, for which room was kept.
    pub(crate) fn end(&mut self, kind: impl Kind, content: &[u8]) -> io::Result<()> {
        self.kept = 0;
        self.record(kind, 0, content)
    }

    /// Writes a list in pieces of `piece` bytes, numbered from 0.
    pub(crate) fn list(&mut self, kind: impl Kind, bytes: &[u8], piece: usize) -> io::Result<()> {
        (0..).zip(bytes.chunks(piece)).try_for_each(|(number, piece)| self.record(kind, number, piece))
    }

    /// Returns when all is on stable storage.
    pub(crate) fn finish(self) -> io::Result<W> {
        if self.broken {
            return Err(io::Error::other("an earlier part of the file could not be written"));
        }
        let mut file = self.out.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync()?;
        Ok(file)
    }
}
