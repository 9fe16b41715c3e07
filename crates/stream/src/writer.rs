//! From elements to bytes.

use bytes::{BufMut, BytesMut};

use crate::cursor::{Cursor, Stop};
use crate::element::{BlockIndex, Element, PageContent};
use crate::error::{StreamError, WriteError};
use crate::ram::{self, Blocks};
use crate::reader::Phase;
use crate::wire::{MAGIC, VERSION, check_command, flag, kind, put_footer, put_name};
use crate::{PAGE_SIZE, early};

/// Writes a stream for a destination QEMU.
///
/// Keeps the order of elements, so that what it wrote can be read again. Which records name their block, it decides itself: pages may be
/// left out, added and put in another order.
#[derive(Debug, Default)]
pub struct Writer {
    phase: Phase,
    /// Number of the RAM section.
    section: u32,
    blocks: Blocks,
    /// Block of the last record.
    last: Option<BlockIndex>,
}

impl Writer {
    /// At the stream's first byte.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends the element's bytes to `out`.
    ///
    /// # Errors
    /// [`WriteError`]: nothing was appended, and the writer is as it was.
    pub fn write(&mut self, element: &Element, out: &mut BytesMut) -> Result<(), WriteError> {
        let next = self.next(element)?;
        match element {
            Element::Header => {
                out.put_u32(MAGIC);
                out.put_u32(VERSION);
            }
            Element::Configuration(configuration) => {
                configuration.check().map_err(WriteError::Refused)?;
                configuration.put(out);
            }
            Element::Command { number, payload } => {
                check_command(*number, payload.len()).map_err(WriteError::Refused)?;
                let length = u16::try_from(payload.len()).map_err(|_| WriteError::TooLong { length: payload.len() })?;
                out.put_u8(kind::COMMAND);
                out.put_u16(*number);
                out.put_u16(length);
                out.put_slice(payload);
            }
            Element::Early(section) => {
                check_early(section)?;
                out.put_slice(section);
            }
            Element::RamStart(start) => {
                self.blocks = Blocks::new(&start.blocks).map_err(|error| WriteError::Refused(error.into()))?;
                self.section = start.section;
                start.put(out);
            }
            Element::PartBegin => self.put_begin(kind::PART, out),
            Element::EndBegin => self.put_begin(kind::END, out),
            Element::PartEnd | Element::EndEnd => {
                out.put_u64(flag::EOS);
                put_footer(out, self.section);
            }
            Element::Page { block, page, content } => self.page(*block, *page, content, out)?,
            Element::Opaque(bytes) => out.put_slice(bytes),
        }
        self.phase = next;
        Ok(())
    }

    /// Where the element leads, if it may come now.
    fn next(&self, element: &Element) -> Result<Phase, WriteError> {
        match (self.phase, element) {
            (Phase::Header, Element::Header) => Ok(Phase::Configuration),
            (Phase::Configuration, Element::Configuration(_)) => Ok(Phase::Setup),
            (same @ (Phase::Setup | Phase::Copy | Phase::Ended), Element::Command { .. }) => Ok(same),
            (same @ (Phase::Setup | Phase::Copy), Element::Early(_)) => Ok(same),
            (Phase::Setup, Element::RamStart(_)) | (Phase::Part, Element::PartEnd) => Ok(Phase::Copy),
            (Phase::Copy, Element::PartBegin) => Ok(Phase::Part),
            (Phase::Copy, Element::EndBegin) => Ok(Phase::End),
            (Phase::End, Element::EndEnd) => Ok(Phase::Ended),
            (same @ (Phase::Part | Phase::End), Element::Page { .. }) => Ok(same),
            (Phase::Setup | Phase::Copy | Phase::Ended | Phase::Tail, Element::Opaque(_)) => Ok(Phase::Tail),
            _ => Err(WriteError::Order { element: element.name() }),
        }
    }

    fn put_begin(&self, kind: u8, out: &mut BytesMut) {
        out.put_u8(kind);
        out.put_u32(self.section);
    }

    fn page(&mut self, block: BlockIndex, page: u64, content: &PageContent, out: &mut BytesMut) -> Result<(), WriteError> {
        let id = self.blocks.id(block).ok_or(WriteError::UnknownBlock { block: block.0 })?;
        if page >= self.blocks.pages(block) {
            return Err(WriteError::OutsideBlock { block: block.0, page });
        }
        let what = match content {
            PageContent::Zero => flag::ZERO,
            PageContent::Data(data) if data.len() == PAGE_SIZE => flag::PAGE,
            PageContent::Data(data) => return Err(WriteError::PageLength { length: data.len() }),
        };
        // No overflow: the page is within a block whose length is a number of 64 bits.
        let word = (page * ram::PAGE) | what;
        if self.last == Some(block) {
            out.put_u64(word | flag::CONTINUE);
        } else {
            out.put_u64(word);
            put_name(out, id.as_bytes());
            self.last = Some(block);
        }
        match content {
            PageContent::Zero => out.put_u8(0),
            PageContent::Data(data) => out.put_slice(data),
        }
        Ok(())
    }
}

/// Whether these bytes are exactly one early section.
fn check_early(section: &[u8]) -> Result<(), WriteError> {
    let mut cursor = Cursor::new(section);
    match early::read(&mut cursor) {
        Ok(()) if cursor.position() == section.len() => Ok(()),
        Ok(()) | Err(Stop::More) => Err(WriteError::Refused(StreamError::Early)),
        Err(Stop::Refused(error)) => Err(WriteError::Refused(error)),
    }
}
