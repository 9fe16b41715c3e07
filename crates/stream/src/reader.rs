//! From bytes to elements.
//!
//! ```text
//! Header ─▶ Configuration ─▶ Setup ── START ram ──▶ Copy ── END ──▶ End ── EOS ──▶ Ended ── FULL, EOF ──▶ Tail
//!                              │                    │  ▲                                                    ▲
//!                              │                PART ▼  │ EOS                                               │
//!                              │                    Part                                                    │
//!                              ├── a section that is not known, before any page ────────────────────────────┤
//!                              └── of a snapshot, whose RAM has no end: FULL ───────────────────────────────┘
//! ```

use bytes::{Buf, Bytes, BytesMut};

use crate::cursor::{Cursor, Stop};
use crate::element::{BlockIndex, Element, PageContent};
use crate::error::StreamError;
use crate::ram::{self, Blocks, RamStart};
use crate::wire::{MAGIC, VERSION, check_command, flag, harmless, kind, read_footer};
use crate::{Configuration, PAGE_SIZE, early};

/// Where in the stream one is; the writer goes the same way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Phase {
    #[default]
    Header,
    Configuration,
    /// Before RAM's start.
    Setup,
    /// After RAM's start, between its sections.
    Copy,
    /// In a PART of RAM.
    Part,
    /// In the END of RAM.
    End,
    /// After RAM's end.
    Ended,
    /// All is opaque.
    Tail,
}

/// Cuts what a source QEMU writes into elements.
///
/// Holds at most one element that is not yet whole beyond what it was fed; the largest is a list of blocks or an early section, about a MiB.
/// Every length is checked before its bytes are waited for. No input can make it panic.
#[derive(Debug, Default)]
pub struct Reader {
    buffer: BytesMut,
    phase: Phase,
    /// Number of the RAM section.
    section: u32,
    blocks: Blocks,
    /// Block of the last record.
    last: Option<BlockIndex>,
    pages_seen: bool,
    /// RAM has no end: what is not RAM is the tail.
    endless: bool,
    tunnelled: Option<String>,
    broken: Option<StreamError>,
}

impl Reader {
    /// At the stream's first byte.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// At the first byte of what QEMU writes with the capability `background-snapshot`: each page once, and no end of RAM; the tail follows its last part.
    #[must_use]
    pub fn of_snapshot() -> Self {
        Self { endless: true, ..Self::default() }
    }

    /// The buffer to read the socket into. Pages are views of it: give it room for many at once (256 KiB to 1 MiB) before each read.
    pub fn buffer_mut(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// The next element, or `None` until more bytes are there. Opaque bytes come as they are, without waiting.
    ///
    /// # Errors
    /// [`StreamError`], and the same again on every later call.
    pub fn next_element(&mut self) -> Result<Option<Element>, StreamError> {
        if let Some(broken) = &self.broken {
            return Err(broken.clone());
        }
        match self.element() {
            Ok(element) => Ok(Some(element)),
            Err(Stop::More) => Ok(None),
            Err(Stop::Refused(error)) => {
                self.broken = Some(error.clone());
                Err(error)
            }
        }
    }

    /// Why the whole stream is passed on unread: the name of the section that is not known, printable and at most 64 characters.
    #[must_use]
    pub fn tunnelled(&self) -> Option<&str> {
        self.tunnelled.as_deref()
    }

    fn element(&mut self) -> Result<Element, Stop> {
        match self.phase {
            Phase::Part | Phase::End => self.record(),
            Phase::Setup | Phase::Copy | Phase::Ended => self.between(),
            Phase::Tail if self.buffer.is_empty() => Err(Stop::More),
            Phase::Tail => Ok(Element::Opaque(self.buffer.split().freeze())),
            Phase::Header => self.header(),
            Phase::Configuration => self.configuration(),
        }
    }

    fn header(&mut self) -> Result<Element, Stop> {
        let mut cursor = Cursor::new(&self.buffer);
        let magic = cursor.u32()?;
        if magic != MAGIC {
            return Err(StreamError::Magic(magic).into());
        }
        let version = cursor.u32()?;
        if version != VERSION {
            return Err(StreamError::Version(version).into());
        }
        let length = cursor.position();
        Ok(self.took(length, Phase::Configuration, Element::Header))
    }

    fn configuration(&mut self) -> Result<Element, Stop> {
        let mut cursor = Cursor::new(&self.buffer);
        let kind = cursor.u8()?;
        if kind != kind::CONFIGURATION {
            return Err(StreamError::NoConfiguration(kind).into());
        }
        let read = Configuration::read(&mut cursor)?;
        let length = cursor.position();
        Ok(self.took(length, Phase::Setup, Element::Configuration(read)))
    }

    /// What stands between the parts of RAM.
    fn between(&mut self) -> Result<Element, Stop> {
        let mut cursor = Cursor::new(&self.buffer);
        let kind = cursor.u8()?;
        match kind {
            kind::COMMAND => self.command(),
            kind::FULL | kind::EOF if self.phase == Phase::Ended => Ok(self.tail()),
            kind::START | kind::FULL => self.named(),
            kind::PART | kind::END => {
                let found = cursor.u32()?;
                if self.phase != Phase::Copy {
                    return Err(StreamError::NotOpen(found).into());
                }
                if found != self.section {
                    return Err(StreamError::SectionNumber { expected: self.section, found }.into());
                }
                let length = cursor.position();
                Ok(match kind {
                    kind::PART => self.took(length, Phase::Part, Element::PartBegin),
                    _ => self.took(length, Phase::End, Element::EndBegin),
                })
            }
            kind::EOF => Err(StreamError::EarlyEnd.into()),
            kind => Err(StreamError::Kind(kind).into()),
        }
    }

    fn command(&mut self) -> Result<Element, Stop> {
        let mut cursor = Cursor::new(&self.buffer);
        let _kind = cursor.u8()?;
        let number = cursor.u16()?;
        let length = usize::from(cursor.u16()?);
        check_command(number, length)?;
        let payload = Bytes::copy_from_slice(cursor.take(length)?);
        let length = cursor.position();
        Ok(self.took(length, self.phase, Element::Command { number, payload }))
    }

    /// A section that brings its name: RAM's start, one that may come early, or one that is not known.
    fn named(&mut self) -> Result<Element, Stop> {
        let mut cursor = Cursor::new(&self.buffer);
        let kind = cursor.u8()?;
        let section = cursor.u32()?;
        let name = cursor.name()?;
        if kind == kind::START && name == ram::NAME {
            if self.phase != Phase::Setup {
                return Err(StreamError::SecondStart.into());
            }
            let start = RamStart::read(&mut cursor, section)?;
            let length = cursor.position();
            self.blocks = Blocks::new(&start.blocks).map_err(StreamError::from)?;
            self.section = section;
            return Ok(self.took(length, Phase::Copy, Element::RamStart(start)));
        }
        if kind == kind::FULL && early::is_early(name) {
            let mut cursor = Cursor::new(&self.buffer);
            early::read(&mut cursor)?;
            let length = cursor.position();
            return Ok(Element::Early(self.buffer.split_to(length).freeze()));
        }
        if self.pages_seen && self.endless {
            return Ok(self.tail());
        }
        if self.pages_seen {
            return Err(StreamError::UnknownSection(harmless(name)).into());
        }
        self.tunnelled = Some(harmless(name));
        Ok(self.tail())
    }

    /// A record within RAM: a page, or the section's end.
    fn record(&mut self) -> Result<Element, Stop> {
        let mut cursor = Cursor::new(&self.buffer);
        let word = cursor.u64()?;
        if word == flag::EOS {
            read_footer(&mut cursor, self.section)?;
            let length = cursor.position();
            return Ok(match self.phase {
                Phase::Part => self.took(length, Phase::Copy, Element::PartEnd),
                _ => self.took(length, Phase::Ended, Element::EndEnd),
            });
        }
        let flags = word & flag::ALL;
        let what = flags & !flag::CONTINUE;
        if what != flag::PAGE && what != flag::ZERO {
            return Err(StreamError::RecordFlags(flags).into());
        }
        let block = if flags & flag::CONTINUE != 0 {
            self.last.ok_or(StreamError::NoBlock)?
        } else {
            let name = cursor.name()?;
            self.blocks.find(name).ok_or_else(|| StreamError::UnknownBlock(harmless(name)))?
        };
        let page = (word & !flag::ALL) / ram::PAGE;
        if page >= self.blocks.pages(block) {
            return Err(StreamError::OutsideBlock { block: block.0, page }.into());
        }
        let content = if what == flag::ZERO {
            let fill = cursor.u8()?;
            if fill != 0 {
                return Err(StreamError::Fill(fill).into());
            }
            let length = cursor.position();
            self.buffer.advance(length);
            PageContent::Zero
        } else {
            let length = cursor.position();
            cursor.take(PAGE_SIZE)?;
            self.buffer.advance(length);
            PageContent::Data(self.buffer.split_to(PAGE_SIZE).freeze())
        };
        self.last = Some(block);
        self.pages_seen = true;
        Ok(Element::Page { block, page, content })
    }

    /// From here to the end all is opaque; there is at least one byte.
    fn tail(&mut self) -> Element {
        self.phase = Phase::Tail;
        Element::Opaque(self.buffer.split().freeze())
    }

    fn took(&mut self, length: usize, next: Phase, element: Element) -> Element {
        self.buffer.advance(length);
        self.phase = next;
        element
    }
}
