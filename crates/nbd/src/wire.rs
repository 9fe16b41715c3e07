//! Numbers of the protocol, and what both sides write.

use bytes::{BufMut, BytesMut};

pub(crate) const MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
pub(crate) const OPTION: u64 = u64::from_be_bytes(*b"IHAVEOPT");
pub(crate) const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
pub(crate) const REQUEST: u32 = 0x2560_9513;
pub(crate) const SIMPLE_REPLY: u32 = 0x6744_6698;
pub(crate) const STRUCTURED_REPLY: u32 = 0x668e_33ef;

/// Of both sides: the newstyle handshake with options that can be refused; and no padding.
pub(crate) const FIXED_NEWSTYLE: u16 = 1;
pub(crate) const NO_ZEROES: u16 = 2;

/// Longest option, or answer to one: a name has at most 4,096 bytes.
pub(crate) const MAX_OPTION: u32 = 16 << 10;

pub(crate) mod option {
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
}

pub(crate) mod answer {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    pub(crate) const ERROR: u32 = 1 << 31;
    pub(crate) const UNSUPPORTED: u32 = ERROR + 1;
    pub(crate) const INVALID: u32 = ERROR + 3;
    pub(crate) const UNKNOWN: u32 = ERROR + 6;
}

pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

pub(crate) mod flag {
    pub(crate) const HAS_FLAGS: u16 = 1;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const FLUSH: u16 = 1 << 2;
    pub(crate) const TRIM: u16 = 1 << 5;
    pub(crate) const WRITE_ZEROES: u16 = 1 << 6;
}

pub(crate) mod command {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISCONNECT: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const WRITE_ZEROES: u16 = 6;
    pub(crate) const BLOCK_STATUS: u16 = 7;
}

pub(crate) mod chunk {
    pub(crate) const DONE: u16 = 1;
    pub(crate) const NONE: u16 = 0;
    pub(crate) const DATA: u16 = 1;
    pub(crate) const HOLE: u16 = 2;
    pub(crate) const STATUS: u16 = 5;
    pub(crate) const ERROR: u16 = 1 << 15;
    pub(crate) const FAILED: u16 = ERROR + 1;
}

/// "Input/output error" and "invalid argument", as the protocol numbers them.
pub(crate) const EIO: u32 = 5;
pub(crate) const EINVAL: u32 = 22;

/// Bytes that are not the protocol, or not the part of it that is spoken here. There is no way on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// No NBD, or one of the old handshake.
    #[error("the other side does not speak NBD with the fixed newstyle handshake")]
    Greeting,
    /// Something that should begin with a known number does not.
    #[error("an NBD message begins with {0:#x}")]
    Magic(u64),
    /// More than anything may have.
    #[error("an NBD message of {0} bytes")]
    Length(u32),
    /// An answer to what was not asked, or in another form.
    #[error("an NBD answer that does not belong there")]
    Answer,
    /// The server does not do what is needed.
    #[error("the NBD server refused option {option} ({code:#x})")]
    Refused {
        /// The option.
        option: u32,
        /// Its code.
        code: u32,
    },
    /// There is no such export.
    #[error("the NBD client asked for another export")]
    Export,
    /// The export lacks something.
    #[error("the NBD export cannot {0}")]
    Cannot(&'static str),
    /// The client has gone before it was through with the handshake.
    #[error("the NBD client gave up")]
    Aborted,
}

fn put_request(out: &mut BytesMut, command: u16, cookie: u64, offset: u64, length: u32) {
    out.put_u32(REQUEST);
    out.put_u16(0);
    out.put_u16(command);
    out.put_u64(cookie);
    out.put_u64(offset);
    out.put_u32(length);
}

/// Asks for bytes, at most [`crate::MAX_DATA`].
pub fn put_read(out: &mut BytesMut, cookie: u64, offset: u64, length: u32) {
    put_request(out, command::READ, cookie, offset, length);
}

/// Writes bytes, at most [`crate::MAX_DATA`].
pub fn put_write(out: &mut BytesMut, cookie: u64, offset: u64, data: &[u8]) {
    let length = u32::try_from(data.len()).expect("at most MAX_DATA");
    put_request(out, command::WRITE, cookie, offset, length);
    out.put_slice(data);
}

/// Writes zeros, which may become a hole.
pub fn put_write_zeroes(out: &mut BytesMut, cookie: u64, offset: u64, length: u32) {
    put_request(out, command::WRITE_ZEROES, cookie, offset, length);
}

/// Asks which extents a range consists of; the answer may be about less of it.
pub fn put_status(out: &mut BytesMut, cookie: u64, offset: u64, length: u32) {
    put_request(out, command::BLOCK_STATUS, cookie, offset, length);
}

/// Asks for everything written to be durable.
pub fn put_flush(out: &mut BytesMut, cookie: u64) {
    put_request(out, command::FLUSH, cookie, 0, 0);
}

/// Ends the connection; there is no answer.
pub fn put_disconnect(out: &mut BytesMut) {
    put_request(out, command::DISCONNECT, 0, 0, 0);
}
