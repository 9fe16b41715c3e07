//! Post-copy as a source says it to a destination QEMU: what it must have heard before memory, the switch, and pages after it.
//!
//! ```text
//! before RAM's start  advise
//! the switch          discard …  package { listen, device state, ping, run }
//! after it            part { page … } …  end
//! after a cut         [ received? … ]  resume  part { page … } …  end
//! ```
//! The source QEMU of such a stream knows nothing of it: it ends as any other does, and [`DeviceState`] takes the end apart. After the switch no page
//! may be sent twice, nor one that was not discarded: QEMU gives up over it. Who does not know what has arrived asks for it before it resumes ([`Received`]).

mod received;

use bytes::{BufMut, Bytes, BytesMut};

pub use received::{Received, ReceivedError};

use crate::PAGE_SIZE;
use crate::element::BlockId;
use crate::ram::PAGE;
use crate::wire::{command, flag, kind, put_footer, put_name};

/// Largest device state, with its description, that is waited for.
pub const MAX_DEVICE_STATE: usize = 64 << 20;

/// Ranges in one command: as many as QEMU itself puts there.
const RANGES: usize = 12;

/// Has the destination prepare for post-copy, and forget whatever it has in its memory. Stands before RAM's start.
pub fn put_advise(out: &mut BytesMut) {
    let mut payload = BytesMut::with_capacity(16);
    // Of the pages of all blocks, and of the machine.
    payload.put_u64(PAGE);
    payload.put_u64(PAGE);
    put_command(out, command::POSTCOPY_ADVISE, &payload);
}

/// Has the destination forget runs of pages (the first, and how many) of a block: they come after the switch. At least one page must be.
pub fn put_discards(out: &mut BytesMut, block: &BlockId, runs: &[(u32, u32)]) {
    for runs in runs.chunks(RANGES) {
        let mut payload = BytesMut::new();
        payload.put_u8(0);
        put_name(&mut payload, block.as_bytes());
        payload.put_u8(0);
        for (first, pages) in runs {
            payload.put_u64(u64::from(*first) * PAGE);
            payload.put_u64(u64::from(*pages) * PAGE);
        }
        put_command(out, command::POSTCOPY_DISCARD, &payload);
    }
}

/// The switch: from here on what is missing is waited for. `loaded` is the number that the destination answers over the return path when it has
/// taken the device state.
pub fn put_package(out: &mut BytesMut, device_state: &[u8], loaded: u32) {
    let mut package = BytesMut::with_capacity(device_state.len() + 32);
    put_command(&mut package, command::POSTCOPY_LISTEN, &[]);
    package.put_slice(device_state);
    put_command(&mut package, command::PING, &loaded.to_be_bytes());
    put_command(&mut package, command::POSTCOPY_RUN, &[]);
    let length = u32::try_from(package.len()).expect("device state is below MAX_DEVICE_STATE");
    put_command(out, command::PACKAGED, &length.to_be_bytes());
    out.put_slice(&package);
}

/// Pages after the switch: one section with all that follow each other.
#[derive(Debug)]
pub struct PagesAfter<'a> {
    out: &'a mut BytesMut,
    section: u32,
    block: Option<u16>,
}

impl<'a> PagesAfter<'a> {
    /// Begins a part of the RAM section of this number.
    pub fn begin(out: &'a mut BytesMut, section: u32) -> Self {
        out.put_u8(kind::PART);
        out.put_u32(section);
        Self { out, section, block: None }
    }

    /// A page of a block, which is named and numbered; zeros are found out.
    pub fn put(&mut self, (number, block): (u16, &BlockId), page: u32, content: &[u8; PAGE_SIZE]) {
        let is_zero = content.iter().all(|byte| *byte == 0);
        let what = if is_zero { flag::ZERO } else { flag::PAGE };
        let word = (u64::from(page) * PAGE) | what;
        if self.block == Some(number) {
            self.out.put_u64(word | flag::CONTINUE);
        } else {
            self.out.put_u64(word);
            put_name(self.out, block.as_bytes());
            self.block = Some(number);
        }
        if is_zero {
            self.out.put_u8(0);
        } else {
            self.out.put_slice(content);
        }
    }

    /// No more pages for now.
    pub fn end(self) {
        self.out.put_u64(flag::EOS);
        put_footer(self.out, self.section);
    }
}

/// On a new connection, before [`put_resume`]: asks which pages of a block have arrived. The answer is
/// [`ReturnMessage::RecvBitmap`](crate::ReturnMessage::RecvBitmap) with what follows it, for [`Received`].
pub fn put_ask_received(out: &mut BytesMut, block: &BlockId) {
    let mut payload = BytesMut::new();
    put_name(&mut payload, block.as_bytes());
    put_command(out, command::RECV_BITMAP, &payload);
}

/// On a new connection, to a destination that has lost the one before: it goes on, and asks once more for what it waits for.
pub fn put_resume(out: &mut BytesMut) {
    put_command(out, command::POSTCOPY_RESUME, &[]);
}

/// All pages have been sent.
pub fn put_end(out: &mut BytesMut, section: u32) {
    out.put_u8(kind::END);
    out.put_u32(section);
    out.put_u64(flag::EOS);
    put_footer(out, section);
    out.put_u8(kind::EOF);
}

fn put_command(out: &mut BytesMut, number: u16, payload: &[u8]) {
    out.put_u8(kind::COMMAND);
    out.put_u16(number);
    out.put_u16(u16::try_from(payload.len()).expect("the commands here are short"));
    out.put_slice(payload);
}

/// What a source QEMU writes behind its memory, until it is whole. It has no length: it ends with an end mark and a description in JSON, and
/// nothing follows until the destination has answered.
#[derive(Debug, Default)]
pub struct DeviceState {
    bytes: BytesMut,
}

/// It is longer than [`MAX_DEVICE_STATE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the device state is longer than {MAX_DEVICE_STATE} bytes")]
pub struct DeviceStateTooLong;

impl DeviceState {
    /// Adds the next bytes.
    ///
    /// # Errors
    /// [`DeviceStateTooLong`]
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), DeviceStateTooLong> {
        if self.bytes.len() + bytes.len() > MAX_DEVICE_STATE {
            return Err(DeviceStateTooLong);
        }
        self.bytes.put_slice(bytes);
        Ok(())
    }

    /// The devices' state without end mark and description, once these are there.
    pub fn take(&mut self) -> Option<Bytes> {
        let length = self.state_length()?;
        let state = self.bytes.split_to(length).freeze();
        self.bytes.clear();
        Some(state)
    }

    /// Text has no byte like the description's mark; its length, which stands between them, may.
    fn state_length(&self) -> Option<usize> {
        if self.bytes.last() != Some(&b'}') {
            return None;
        }
        let marks = self.bytes.iter().enumerate().rev().filter(|(_, byte)| **byte == kind::DESCRIPTION);
        marks.take(1 + size_of::<u32>()).find_map(|(mark, _)| {
            let end = mark.checked_sub(1).filter(|end| self.bytes.get(*end) == Some(&kind::EOF))?;
            let (length, text) = self.bytes.get(mark + 1..)?.split_first_chunk::<4>()?;
            (u32::from_be_bytes(*length) as usize == text.len() && text.first() == Some(&b'{')).then_some(end)
        })
    }
}

#[cfg(test)]
mod tests;
