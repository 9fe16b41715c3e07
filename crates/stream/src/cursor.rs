//! Reads ahead in what has arrived, without taking it. Running out of bytes is no error: the record is tried again when there are more.

use crate::error::StreamError;

/// The bytes end within a record.
#[derive(Debug)]
pub(crate) struct More;

/// Why a record could not be read.
#[derive(Debug)]
pub(crate) enum Stop {
    More,
    Refused(StreamError),
}

impl From<More> for Stop {
    fn from(More: More) -> Self {
        Self::More
    }
}

impl From<StreamError> for Stop {
    fn from(error: StreamError) -> Self {
        Self::Refused(error)
    }
}

pub(crate) struct Cursor<'a> {
    rest: &'a [u8],
    length: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes, length: bytes.len() }
    }

    /// How many bytes were read.
    pub(crate) fn position(&self) -> usize {
        self.length - self.rest.len()
    }

    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], More> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(More)?;
        self.rest = rest;
        Ok(taken)
    }

    /// The next byte, left where it is.
    pub(crate) fn peek(&self) -> Result<u8, More> {
        self.rest.first().copied().ok_or(More)
    }

    /// A name: one byte length, then the bytes.
    pub(crate) fn name(&mut self) -> Result<&'a [u8], More> {
        let length = self.u8()?;
        self.take(usize::from(length))
    }

    pub(crate) fn u8(&mut self) -> Result<u8, More> {
        self.array::<1>().map(u8::from_be_bytes)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, More> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, More> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, More> {
        self.array().map(u64::from_be_bytes)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], More> {
        let (array, rest) = self.rest.split_first_chunk::<N>().ok_or(More)?;
        self.rest = rest;
        Ok(*array)
    }
}
