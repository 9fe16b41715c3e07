//! The numbers of the format, and the small pieces that several records share.

use bytes::{BufMut, BytesMut};

use crate::cursor::{Cursor, Stop};
use crate::error::StreamError;

/// `QEVM`.
pub(crate) const MAGIC: u32 = 0x5145_564d;
pub(crate) const VERSION: u32 = 3;

/// First byte of whatever stands between two payloads.
pub(crate) mod kind {
    pub(crate) const EOF: u8 = 0x00;
    pub(crate) const START: u8 = 0x01;
    pub(crate) const PART: u8 = 0x02;
    pub(crate) const END: u8 = 0x03;
    pub(crate) const FULL: u8 = 0x04;
    pub(crate) const SUBSECTION: u8 = 0x05;
    pub(crate) const DESCRIPTION: u8 = 0x06;
    pub(crate) const CONFIGURATION: u8 = 0x07;
    pub(crate) const COMMAND: u8 = 0x08;
    pub(crate) const FOOTER: u8 = 0x7e;
}

/// Low bits of a record's word in the RAM section; the rest is an offset.
pub(crate) mod flag {
    pub(crate) const ALL: u64 = 0xfff;
    pub(crate) const ZERO: u64 = 0x002;
    pub(crate) const MEM_SIZE: u64 = 0x004;
    pub(crate) const PAGE: u64 = 0x008;
    pub(crate) const EOS: u64 = 0x010;
    pub(crate) const CONTINUE: u64 = 0x020;
    pub(crate) const MULTIFD_FLUSH: u64 = 0x200;
}

/// Commands that change what follows them, and one that does not.
pub(crate) mod command {
    pub(crate) const PING: u16 = 2;
    pub(crate) const POSTCOPY_ADVISE: u16 = 3;
    pub(crate) const POSTCOPY_LISTEN: u16 = 4;
    pub(crate) const POSTCOPY_RUN: u16 = 5;
    pub(crate) const POSTCOPY_DISCARD: u16 = 6;
    pub(crate) const PACKAGED: u16 = 7;
    pub(crate) const ENABLE_COLO: u16 = 8;
    pub(crate) const POSTCOPY_RESUME: u16 = 9;
    pub(crate) const RECV_BITMAP: u16 = 10;
}

/// Refuses commands after which the stream is no longer what this crate reads.
///
/// An empty POSTCOPY_ADVISE says only that dirty bitmaps may come; pages do not.
pub(crate) fn check_command(number: u16, length: usize) -> Result<(), StreamError> {
    match number {
        command::POSTCOPY_ADVISE if length == 0 => Ok(()),
        command::POSTCOPY_ADVISE..=command::PACKAGED | command::POSTCOPY_RESUME | command::RECV_BITMAP => {
            Err(StreamError::PostCopy { command: number })
        }
        command::ENABLE_COLO => Err(StreamError::Colo),
        _ => Ok(()),
    }
}

/// Reads a section's footer, which repeats the section's number.
pub(crate) fn read_footer(cursor: &mut Cursor<'_>, section: u32) -> Result<(), Stop> {
    let kind = cursor.u8()?;
    if kind != kind::FOOTER {
        return Err(StreamError::NoFooter(kind).into());
    }
    let found = cursor.u32()?;
    if found != section {
        return Err(StreamError::SectionNumber { expected: section, found }.into());
    }
    Ok(())
}

pub(crate) fn put_footer(out: &mut BytesMut, section: u32) {
    out.put_u8(kind::FOOTER);
    out.put_u32(section);
}

/// A name with its length before it; `name` has at most 255 bytes.
pub(crate) fn put_name(out: &mut BytesMut, name: &[u8]) {
    out.put_u8(u8::try_from(name.len()).expect("names were checked to have at most 255 bytes"));
    out.put_slice(name);
}

/// Bytes of a stranger as text for a log: printable ASCII, at most 64 characters.
pub(crate) fn harmless(bytes: &[u8]) -> String {
    const LONGEST: usize = 64;
    bytes.iter().take(LONGEST).map(|&byte| if byte == b' ' || byte.is_ascii_graphic() { char::from(byte) } else { '?' }).collect()
}
