//! Files that are read at any place, and what can be wrong with them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::sealed::{Form, HEAD, Head, HeadError, Kind, OVERHEAD, RECORD_HEAD, Sealer, TAG, read_record_head};

/// A file of the vault, or the bytes of one.
pub trait Stored {
    /// Fills the front of `bytes` with what is at byte `at`; how much, which is 0 only at the end.
    ///
    /// # Errors
    /// It cannot be read.
    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<usize>;

    /// How long it is.
    ///
    /// # Errors
    /// It cannot be asked.
    fn length(&self) -> io::Result<u64>;
}

impl Stored for File {
    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<usize> {
        FileExt::read_at(self, bytes, at)
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}

impl Stored for &[u8] {
    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<usize> {
        let rest = usize::try_from(at).ok().and_then(|at| self.get(at..)).unwrap_or_default();
        let length = rest.len().min(bytes.len());
        bytes[..length].copy_from_slice(&rest[..length]);
        Ok(length)
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

/// Why a pack or a snapshot cannot be read. Nothing of it is given out then but what was read before.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file system's.
    #[error("it cannot be read")]
    Io(#[from] io::Error),
    /// Something else is in the file.
    #[error("it is something else")]
    Foreign,
    /// Of another version.
    #[error("it has version {0}, which this version does not read")]
    Version(u16),
    /// Its writer did not come to the end, it was cut, it was sealed with another key, or its beginning or end was changed.
    #[error("it has no end that opens with this key: it is torn, was changed, or belongs to another key")]
    Torn,
    /// It was changed.
    #[error("what is at byte {0} is not what was written there")]
    Changed(u64),
    /// Sealed with the right key, and yet against the rules.
    #[error("it is malformed")]
    Malformed(#[from] Malformed),
    /// A page is not the one that was stored: its digest is another.
    #[error("page {0} is not the one that was stored")]
    Digest(u32),
}

/// What a writer that keeps the rules does not write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The end counts otherwise.
    #[error("its end does not fit what comes before")]
    Count,
    /// A chunk of a wrong length, or one that does not decompress.
    #[error("a chunk is none")]
    Chunk,
    /// The list of differences, or a base that is a difference itself.
    #[error("a difference is none")]
    Differences,
    /// The list of the pages that a pack still has.
    #[error("the list of kept pages is none")]
    Kept,
    /// A page that its pack does not have, or not any more, or a base whose pack is not in the list.
    #[error("a page is in no pack")]
    Place,
    /// The list of spaces.
    #[error("its spaces are none")]
    Spaces,
    /// A leaf, or the list of them.
    #[error("a leaf is none")]
    Leaf,
}

impl From<HeadError> for FileError {
    fn from(error: HeadError) -> Self {
        match error {
            HeadError::Foreign => Self::Foreign,
            HeadError::Short => Self::Torn,
            HeadError::Version(version) => Self::Version(version),
        }
    }
}

/// Opens the records of one file.
pub(crate) struct Records<S> {
    file: S,
    sealer: Sealer,
    length: u64,
}

impl<S: Stored> Records<S> {
    pub(crate) fn open(file: S, form: &Form, key: &[u8; 32]) -> Result<Self, FileError> {
        let length = file.length()?;
        let mut head = [0; HEAD];
        let found = fill(&file, &mut head, 0)?;
        let sealer = Sealer::new(form, key, Head::read(form, head.get(..found).unwrap_or_default())?);
        Ok(Self { file, sealer, length })
    }

    pub(crate) const fn length(&self) -> u64 {
        self.length
    }

    /// The content of the last record, which has `N` bytes.
    pub(crate) fn end<const N: usize>(&self, kind: impl Kind) -> Result<[u8; N], FileError> {
        let at = self.length.checked_sub((N + OVERHEAD) as u64).ok_or(FileError::Torn)?;
        let mut room = vec![0; N + TAG];
        match self.record(kind, 0, at, N, &mut room) {
            Ok(content) => content.try_into().map_err(|_| FileError::Torn),
            Err(FileError::Changed(_)) => Err(FileError::Torn),
            Err(error) => Err(error),
        }
    }

    /// The content of the record at a place; it has at most `most` bytes, for which, and a tag, there is room.
    pub(crate) fn record<'a>(
        &self,
        kind: impl Kind,
        number: u64,
        at: u64,
        most: usize,
        room: &'a mut [u8],
    ) -> Result<&'a [u8], FileError> {
        let changed = FileError::Changed(at);
        let mut head = [0; RECORD_HEAD];
        if fill(&self.file, &mut head, at)? != RECORD_HEAD {
            return Err(changed);
        }
        let Some((found, length)) = read_record_head(&head) else { return Err(changed) };
        if found != kind.number() || length > most + TAG {
            return Err(changed);
        }
        let Some(sealed) = room.get_mut(..length) else { return Err(changed) };
        if fill(&self.file, sealed, at + RECORD_HEAD as u64)? != length {
            return Err(changed);
        }
        self.sealer.open(kind, number, sealed).ok_or(changed)
    }

    /// As [`Self::record`], of one whose length is known, with the record read at once.
    pub(crate) fn known<'a>(
        &self,
        kind: impl Kind,
        number: u64,
        (at, length): (u64, usize),
        room: &'a mut [u8],
    ) -> Result<&'a [u8], FileError> {
        let changed = FileError::Changed(at);
        let Some(record) = room.get_mut(..length) else { return Err(changed) };
        if fill(&self.file, record, at)? != length {
            return Err(changed);
        }
        let Some((head, sealed)) = record.split_at_mut_checked(RECORD_HEAD) else { return Err(changed) };
        if read_record_head(head) != Some((kind.number(), sealed.len())) {
            return Err(changed);
        }
        self.sealer.open(kind, number, sealed).ok_or(changed)
    }

    /// A list that is written in pieces of `piece` bytes, each a record, the first at `at`; and where it ends. Whoever calls has made sure that the
    /// file is long enough for it.
    pub(crate) fn list(&self, kind: impl Kind, mut at: u64, bytes: u64, piece: usize) -> Result<(Vec<u8>, u64), FileError> {
        let mut out = Vec::new();
        let mut room = vec![0; piece.min(usize::try_from(bytes).unwrap_or(piece)) + OVERHEAD];
        let (mut left, mut number) = (bytes, 0);
        while left > 0 {
            let length = usize::try_from(left).map_or(piece, |left| left.min(piece));
            out.extend_from_slice(self.known(kind, number, (at, length + OVERHEAD), &mut room)?);
            at += (length + OVERHEAD) as u64;
            left -= length as u64;
            number += 1;
        }
        Ok((out, at))
    }
}

/// How long a list of so many bytes is in the file.
pub(crate) const fn list_length(bytes: u64, piece: usize) -> u64 {
    bytes.saturating_add(bytes.div_ceil(piece as u64).saturating_mul(OVERHEAD as u64))
}

/// Reads until `bytes` is full or the file ends; how much there was.
fn fill(file: &impl Stored, bytes: &mut [u8], at: u64) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, at.saturating_add(filled as u64)) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
