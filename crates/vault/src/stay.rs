//! A stay: the pages of a VM's RAM in one file, in chunks that are compressed and sealed one by one.
//!
//! ```text
//! file     = head  record of the identity  records of chunks  record of the end
//! head     = "GDWTSTAY"  u16 version  32 bytes salt
//! record   = u8 kind  u32 length  `length` bytes sealed: content, encrypted, and a tag of 16 bytes
//! ```
//! All numbers are big-endian. The end says how much came before it; without it a file is torn, and is not read at all.

mod chunk;
mod identity;
mod reader;
mod writer;

use std::io;

pub use chunk::{Chunk, Unpacker};
pub use identity::{Block, Identity, InvalidIdentity};
pub use reader::StayReader;
pub use writer::{Sink, StayWriter};

use crate::sealed::{Form, HeadError, Kind};

/// The version that is written and read.
pub const VERSION: u16 = 1;

const FORM: Form = Form { magic: *b"GDWTSTAY", version: VERSION, context: "godwit vault 2026-11-26 key of a file" };

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Record {
    Identity = 1,
    Chunk = 2,
    End = 3,
}

impl Kind for Record {
    fn number(self) -> u8 {
        self as u8
    }
}

/// The content of a page.
type Page = [u8; godwit_stream::PAGE_SIZE];

/// Why a stay cannot be used. None of it is worth more than a log line: the move goes on without.
#[derive(Debug, thiserror::Error)]
pub enum StayError {
    /// The file cannot be read.
    #[error("a stay cannot be read")]
    Io(#[from] io::Error),
    /// Something else is in the file.
    #[error("the file is no stay")]
    NotAStay,
    /// Of another version.
    #[error("a stay has version {0}, and this version reads {VERSION}")]
    Version(u16),
    /// Sealed with another key, or its beginning was changed.
    #[error("a stay does not open with this key")]
    Key,
    /// It has no end, because its writer did not come that far, it was cut, or the end was changed.
    #[error("a stay has no end")]
    Torn,
    /// A chunk is not what was written at this place.
    #[error("chunk {0} of a stay was changed")]
    Changed(u64),
    /// Sealed with the right key, and yet against the rules.
    #[error("a stay is malformed")]
    Malformed(#[from] MalformedStay),
}

impl From<HeadError> for StayError {
    fn from(error: HeadError) -> Self {
        match error {
            HeadError::Foreign => Self::NotAStay,
            HeadError::Short => Self::Torn,
            HeadError::Version(version) => Self::Version(version),
        }
    }
}

/// What a writer that keeps the rules does not write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MalformedStay {
    /// Not an identity.
    #[error("the identity is malformed")]
    Identity(#[source] InvalidIdentity),
    /// A chunk of a wrong length, or without a page.
    #[error("a chunk is malformed")]
    Chunk,
    /// A chunk that does not decompress.
    #[error("a chunk does not decompress")]
    Compression,
    /// A chunk beyond its block, or not behind the one before.
    #[error("a chunk is out of place")]
    Place,
    /// The end counts otherwise.
    #[error("the end does not fit what came before")]
    Count,
}

#[cfg(test)]
mod tests;
