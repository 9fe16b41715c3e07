//! The return path: what a destination QEMU says to its source. Two bytes kind, two bytes length, payload; integers are big-endian.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::element::BlockId;
use crate::wire::put_name;

/// Largest payload of a message; a source QEMU takes no more.
pub const MAX_RETURN_PAYLOAD: usize = 512;

/// Largest bitmap that may follow [`ReturnMessage::RecvBitmap`]: that of 32 TiB.
pub const MAX_BITMAP: u64 = 1 << 30;

/// What stands behind a bitmap.
const BITMAP_MARK: u64 = 0x0123_4567_89ab_cdef;

const HEADER: usize = 4;

mod kind {
    pub(super) const SHUT: u16 = 1;
    pub(super) const PONG: u16 = 2;
    pub(super) const REQ_PAGES_ID: u16 = 3;
    pub(super) const REQ_PAGES: u16 = 4;
    pub(super) const RECV_BITMAP: u16 = 5;
    pub(super) const RESUME_ACK: u16 = 6;
    pub(super) const SWITCHOVER_ACK: u16 = 7;
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReturnMessage {
    /// The last one: 0 if all was loaded.
    Shut(u32),
    /// Answer to a PING with the same number.
    Pong(u32),
    /// Wants a piece of a block (post-copy).
    ReqPagesId {
        /// First byte within the block.
        start: u64,
        /// Number of bytes.
        length: u32,
        /// The block.
        block: BlockId,
    },
    /// Wants a piece of the block that was asked for last (post-copy).
    ReqPages {
        /// First byte within the block.
        start: u64,
        /// Number of bytes.
        length: u32,
    },
    /// Which pages of a block have arrived (post-copy recovery); [`Bitmap`](Self::Bitmap) follows, `size` bytes in all.
    RecvBitmap {
        /// The block.
        block: BlockId,
        /// Bytes of the bitmap, a multiple of 8, at most [`MAX_BITMAP`].
        size: u64,
    },
    /// A piece of a bitmap as it came, not empty.
    Bitmap(Bytes),
    /// Ready to go on (post-copy recovery); 1.
    ResumeAck(u32),
    /// The devices are ready for the switch-over.
    SwitchoverAck,
}

/// Bytes that are not a message. The connection is worthless from here on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReturnError {
    /// A kind that is not known.
    #[error("unknown message of kind {0} on the return path")]
    Kind(u16),
    /// A length that the kind does not allow.
    #[error("a message of kind {kind} on the return path cannot have {length} bytes")]
    Length {
        /// The kind.
        kind: u16,
        /// The length it claims.
        length: u16,
    },
    /// A bitmap that is empty, too large or no multiple of 8 bytes.
    #[error("a bitmap of {0} bytes on the return path")]
    BitmapSize(u64),
    /// The mark behind a bitmap is another.
    #[error("a bitmap on the return path ends with {0:#018x}")]
    BitmapMark(u64),
}

/// A message that cannot be written; nothing was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReturnWriteError {
    /// A piece of a bitmap where none is due, or another message where one is.
    #[error("the message cannot be written at this place of the return path")]
    Order,
    /// A piece that is longer than the rest of its bitmap.
    #[error("a piece of {piece} bytes, but only {left} of the bitmap are left")]
    BitmapTooLong {
        /// Length of the piece.
        piece: usize,
        /// Bytes that are missing.
        left: u64,
    },
    /// What the reader on the other side would refuse.
    #[error("the return path would not be one")]
    Refused(#[source] ReturnError),
}

/// Cuts a return path into messages. Checks each length before it waits for the bytes, holds at most one message, cannot panic.
#[derive(Debug, Default)]
pub struct ReturnReader {
    buffer: BytesMut,
    /// Bytes of a bitmap that are still to come; 0 of them: its mark is.
    bitmap: Option<u64>,
    broken: Option<ReturnError>,
}

impl ReturnReader {
    /// At the return path's first byte.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The buffer to read the socket into.
    pub fn buffer_mut(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// The next message, or `None` until more bytes are there.
    ///
    /// # Errors
    /// [`ReturnError`], and the same again on every later call.
    pub fn next_message(&mut self) -> Result<Option<ReturnMessage>, ReturnError> {
        if let Some(broken) = self.broken {
            return Err(broken);
        }
        self.message().inspect_err(|error| self.broken = Some(*error))
    }

    fn message(&mut self) -> Result<Option<ReturnMessage>, ReturnError> {
        if let Some(left) = self.bitmap {
            if left > 0 {
                return Ok(self.bitmap_piece(left).map(ReturnMessage::Bitmap));
            }
            let Some(mark) = self.buffer.first_chunk::<8>() else { return Ok(None) };
            let mark = u64::from_be_bytes(*mark);
            if mark != BITMAP_MARK {
                return Err(ReturnError::BitmapMark(mark));
            }
            self.buffer.advance(8);
            self.bitmap = None;
        }
        let Some(header) = self.buffer.first_chunk::<HEADER>() else { return Ok(None) };
        let [kind @ .., high, low] = *header;
        let (kind, length) = (u16::from_be_bytes(kind), u16::from_be_bytes([high, low]));
        check_length(kind, length)?;
        // The size of a bitmap is not counted in the message's length.
        let behind = if kind == kind::RECV_BITMAP { 8 } else { 0 };
        let whole = HEADER + usize::from(length) + behind;
        if self.buffer.len() < whole {
            return Ok(None);
        }
        let mut payload = self.buffer.split_to(whole).freeze();
        payload.advance(HEADER);
        let refused = ReturnError::Length { kind, length };
        Ok(Some(match kind {
            kind::SHUT => ReturnMessage::Shut(payload.get_u32()),
            kind::PONG => ReturnMessage::Pong(payload.get_u32()),
            kind::RESUME_ACK => ReturnMessage::ResumeAck(payload.get_u32()),
            kind::REQ_PAGES => ReturnMessage::ReqPages { start: payload.get_u64(), length: payload.get_u32() },
            kind::REQ_PAGES_ID => {
                let (start, length) = (payload.get_u64(), payload.get_u32());
                ReturnMessage::ReqPagesId { start, length, block: block_id(&payload).ok_or(refused)? }
            }
            kind::RECV_BITMAP => {
                let mut size = payload.split_off(usize::from(length));
                let size = check_size(size.get_u64())?;
                let block = block_id(&payload).ok_or(refused)?;
                self.bitmap = Some(size);
                ReturnMessage::RecvBitmap { block, size }
            }
            _ => ReturnMessage::SwitchoverAck,
        }))
    }

    /// What has come of the bitmap, but nothing behind it.
    fn bitmap_piece(&mut self, left: u64) -> Option<Bytes> {
        if self.buffer.is_empty() {
            return None;
        }
        let length = self.buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.bitmap = Some(left.saturating_sub(length as u64));
        Some(self.buffer.split_to(length).freeze())
    }
}

/// Writes a return path for a source QEMU.
#[derive(Debug, Default)]
pub struct ReturnWriter {
    /// Bytes of a bitmap that are still to come.
    bitmap: u64,
}

impl ReturnWriter {
    /// At the return path's first byte.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends the message's bytes to `out`.
    ///
    /// # Errors
    /// [`ReturnWriteError`]: nothing was appended.
    pub fn write(&mut self, message: &ReturnMessage, out: &mut BytesMut) -> Result<(), ReturnWriteError> {
        if matches!(message, ReturnMessage::Bitmap(_)) != (self.bitmap > 0) {
            return Err(ReturnWriteError::Order);
        }
        match message {
            ReturnMessage::Shut(value) => put_number(out, kind::SHUT, *value),
            ReturnMessage::Pong(value) => put_number(out, kind::PONG, *value),
            ReturnMessage::ResumeAck(value) => put_number(out, kind::RESUME_ACK, *value),
            ReturnMessage::SwitchoverAck => put_header(out, kind::SWITCHOVER_ACK, 0),
            ReturnMessage::ReqPages { start, length } => {
                put_header(out, kind::REQ_PAGES, 12);
                out.put_u64(*start);
                out.put_u32(*length);
            }
            ReturnMessage::ReqPagesId { start, length, block } => {
                put_header(out, kind::REQ_PAGES_ID, 13 + block.as_bytes().len());
                out.put_u64(*start);
                out.put_u32(*length);
                put_name(out, block.as_bytes());
            }
            ReturnMessage::RecvBitmap { block, size } => {
                self.bitmap = check_size(*size).map_err(ReturnWriteError::Refused)?;
                put_header(out, kind::RECV_BITMAP, 1 + block.as_bytes().len());
                put_name(out, block.as_bytes());
                out.put_u64(*size);
            }
            ReturnMessage::Bitmap(piece) => {
                let too_long = ReturnWriteError::BitmapTooLong { piece: piece.len(), left: self.bitmap };
                self.bitmap = self.bitmap.checked_sub(piece.len() as u64).ok_or(too_long)?;
                out.put_slice(piece);
                if self.bitmap == 0 {
                    out.put_u64(BITMAP_MARK);
                }
            }
        }
        Ok(())
    }
}

fn put_header(out: &mut BytesMut, kind: u16, length: usize) {
    out.put_u16(kind);
    out.put_u16(u16::try_from(length).expect("no message is longer than a name and 13 bytes"));
}

fn put_number(out: &mut BytesMut, kind: u16, value: u32) {
    put_header(out, kind, 4);
    out.put_u32(value);
}

fn check_length(kind: u16, length: u16) -> Result<(), ReturnError> {
    let size = usize::from(length);
    let fits = match kind {
        kind::SHUT | kind::PONG | kind::RESUME_ACK => size == 4,
        kind::REQ_PAGES => size == 12,
        kind::REQ_PAGES_ID => (14..=13 + 255).contains(&size),
        kind::RECV_BITMAP => (2..=1 + 255).contains(&size),
        kind::SWITCHOVER_ACK => size == 0,
        _ => return Err(ReturnError::Kind(kind)),
    };
    if fits && size <= MAX_RETURN_PAYLOAD { Ok(()) } else { Err(ReturnError::Length { kind, length }) }
}

fn check_size(size: u64) -> Result<u64, ReturnError> {
    if size > 0 && size <= MAX_BITMAP && size.is_multiple_of(8) { Ok(size) } else { Err(ReturnError::BitmapSize(size)) }
}

/// A block's name that fills the payload.
fn block_id(payload: &[u8]) -> Option<BlockId> {
    let (length, name) = payload.split_first()?;
    if usize::from(*length) != name.len() {
        return None;
    }
    BlockId::new(name).ok()
}

#[cfg(test)]
mod tests;
