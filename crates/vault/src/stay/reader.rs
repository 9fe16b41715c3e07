//! Reads a stay, chunk by chunk.

use std::io::{self, BufReader, Read, Seek, SeekFrom};

use bytes::Buf;

use super::chunk::{Chunk, MAX_CONTENT, Unpacker};
use super::identity::MAX_IDENTITY;
use super::writer::END;
use super::{FORM, Identity, MalformedStay, Record, StayError};
use crate::key::StayKey;
use crate::sealed::{HEAD, Head, OVERHEAD, RECORD_HEAD, Sealer, TAG, read_record_head};

/// Bytes that are read at once.
const BUFFER: usize = 256 << 10;

/// Reads a stay. Memory is bounded whatever the file says: about three chunks.
pub struct StayReader<R> {
    file: BufReader<R>,
    sealer: Sealer,
    identity: Identity,
    unpacker: Unpacker,
    sealed: Vec<u8>,
    end: End,
    /// How far it was read.
    at: End,
    last: Option<(u16, u32)>,
    broken: bool,
}

/// What an end says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct End {
    chunks: u64,
    pages: u64,
    bytes: u64,
}

impl<R> std::fmt::Debug for StayReader<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StayReader").field("identity", &self.identity).field("end", &self.end).finish_non_exhaustive()
    }
}

impl<R: Read + Seek> StayReader<R> {
    /// Opens a stay: head, identity and end are right, and the file is as long as its end says. The file's own position is moved.
    ///
    /// # Errors
    /// [`StayError`]
    pub fn open(file: R, key: &StayKey) -> Result<Self, StayError> {
        let mut file = BufReader::with_capacity(BUFFER, file);
        let length = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(0))?;
        let mut head = [0; HEAD];
        let found = fill(&mut file, &mut head)?;
        let sealer = Sealer::new(&FORM, key.expose(), Head::read(&FORM, head.get(..found).unwrap_or_default())?);
        let mut sealed = vec![0; MAX_CONTENT.max(MAX_IDENTITY) + TAG];
        let (kind, content) = next_record(&mut file, &mut sealed, MAX_IDENTITY)?.ok_or(StayError::Torn)?;
        let bytes = (HEAD + RECORD_HEAD + content.len()) as u64;
        let content = sealer.open(Record::Identity, 0, content).filter(|_| kind == Record::Identity as u8).ok_or(StayError::Key)?;
        let identity = Identity::decode(content).map_err(MalformedStay::Identity)?;
        let end = read_end(&mut file, &sealer, length)?;
        file.seek(SeekFrom::Start(bytes))?;
        let at = End { bytes, ..End::default() };
        Ok(Self { file, sealer, identity, unpacker: Unpacker::new()?, sealed, end, at, last: None, broken: false })
    }

    /// Whose memory it is.
    #[must_use]
    pub const fn identity(&self) -> &Identity {
        &self.identity
    }

    /// How many pages the stay has in all.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.end.pages
    }

    /// The next chunk, in ascending order of blocks and pages; `None` when all were read and nothing is missing.
    ///
    /// # Errors
    /// [`StayError`]; what came before is right. After an error there is nothing but errors.
    pub fn next_chunk(&mut self) -> Result<Option<Chunk<'_>>, StayError> {
        if std::mem::replace(&mut self.broken, true) {
            return Err(StayError::Changed(self.at.chunks));
        }
        if self.at.chunks == self.end.chunks {
            if self.at != self.end {
                return Err(MalformedStay::Count.into());
            }
            self.broken = false;
            return Ok(None);
        }
        let changed = StayError::Changed(self.at.chunks);
        let content = match next_record(&mut self.file, &mut self.sealed, MAX_CONTENT)? {
            Some((kind, content)) if kind == Record::Chunk as u8 => content,
            _ => return Err(changed),
        };
        self.at.bytes += (RECORD_HEAD + content.len()) as u64;
        let content = self.sealer.open(Record::Chunk, self.at.chunks, content).ok_or(changed)?;
        let chunk = self.unpacker.unpack(content)?;
        let block = self.identity.blocks.get(usize::from(chunk.block()));
        if self.last >= Some(chunk.place()) || !block.is_some_and(|block| chunk.fits(block.pages)) {
            return Err(MalformedStay::Place.into());
        }
        self.last = Some(chunk.place());
        self.at.chunks += 1;
        self.at.pages += chunk.len() as u64;
        self.broken = false;
        Ok(Some(chunk))
    }
}

fn read_end<R: Read + Seek>(file: &mut BufReader<R>, sealer: &Sealer, length: u64) -> Result<End, StayError> {
    let mut record = [0; END + OVERHEAD];
    let bytes = length.checked_sub(record.len() as u64).ok_or(StayError::Torn)?;
    file.seek(SeekFrom::Start(bytes))?;
    if fill(file, &mut record)? != record.len() {
        return Err(StayError::Torn);
    }
    let (head, sealed) = record.split_at_mut(RECORD_HEAD);
    if read_record_head(head) != Some((Record::End as u8, END + TAG)) {
        return Err(StayError::Torn);
    }
    let mut content = sealer.open(Record::End, 0, sealed).ok_or(StayError::Torn)?;
    let end = End { chunks: content.get_u64(), pages: content.get_u64(), bytes: content.get_u64() };
    if end.bytes == bytes { Ok(end) } else { Err(MalformedStay::Count.into()) }
}

/// Kind and sealed bytes of the record at which the file stands; `None` if the file ends before, or its content would be longer than `most`.
fn next_record<'a>(file: &mut impl Read, room: &'a mut [u8], most: usize) -> io::Result<Option<(u8, &'a mut [u8])>> {
    let mut head = [0; RECORD_HEAD];
    if fill(file, &mut head)? != RECORD_HEAD {
        return Ok(None);
    }
    let Some((kind, length)) = read_record_head(&head) else { return Ok(None) };
    let Some(sealed) = room.get_mut(..length).filter(|sealed| sealed.len() <= most + TAG) else { return Ok(None) };
    Ok(if fill(file, sealed)? == length { Some((kind, sealed)) } else { None })
}

/// Reads until `bytes` is full or the file ends; how much there was.
fn fill(file: &mut impl Read, bytes: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read(rest) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
