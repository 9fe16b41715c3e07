//! The RAM section: its list of blocks, and the records in it.

use std::collections::BTreeMap;

use bytes::{BufMut, BytesMut};

use crate::PAGE_SIZE;
use crate::cursor::{Cursor, Stop};
use crate::element::{BlockId, BlockIndex};
use crate::error::{BlocksError, StreamError};
use crate::wire::{flag, harmless, kind, put_footer, put_name, read_footer};

/// Most blocks in a list; QEMU has about ten, and one more for each DIMM and option ROM.
pub const MAX_BLOCKS: usize = 1024;

/// Name of the section.
pub(crate) const NAME: &[u8] = b"ram";
/// The one version of it.
const VERSION: u32 = 4;
/// [`PAGE_SIZE`] as the stream counts.
pub(crate) const PAGE: u64 = PAGE_SIZE as u64;

/// The start of the RAM section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamStart {
    /// Number that the source gave to the section.
    pub section: u32,
    /// Which of several sections of that name; 0.
    pub instance: u32,
    /// All RAM that is migrated; [`BlockIndex`] counts in this list.
    pub blocks: Vec<RamBlock>,
    /// Whether the source sent the mark of multifd. Of a source without multifd it does not.
    pub multifd_flush: bool,
}

/// A piece of RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// Its name, the same at source and destination.
    pub id: BlockId,
    /// Bytes in use, a multiple of [`PAGE_SIZE`].
    pub length: u64,
}

impl RamBlock {
    /// Number of its pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.length / PAGE
    }
}

impl RamStart {
    /// All blocks' bytes.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.blocks.iter().fold(0, |sum, block| sum.saturating_add(block.length))
    }

    /// Reads what follows the section's name, to the end of its footer.
    pub(crate) fn read(cursor: &mut Cursor<'_>, section: u32) -> Result<Self, Stop> {
        let instance = cursor.u32()?;
        let version = cursor.u32()?;
        if version != VERSION {
            return Err(StreamError::RamVersion(version).into());
        }
        let word = cursor.u64()?;
        if word & flag::ALL != flag::MEM_SIZE {
            return Err(StreamError::RecordFlags(word & flag::ALL).into());
        }
        let blocks = read_blocks(cursor, word & !flag::ALL)?;
        let mut word = cursor.u64()?;
        let multifd_flush = word == flag::MULTIFD_FLUSH;
        if multifd_flush {
            word = cursor.u64()?;
        }
        if word != flag::EOS {
            return Err(StreamError::RecordFlags(word & flag::ALL).into());
        }
        read_footer(cursor, section)?;
        Ok(Self { section, instance, blocks, multifd_flush })
    }

    /// Writes it with its kind and footer; its blocks were checked.
    pub(crate) fn put(&self, out: &mut BytesMut) {
        out.put_u8(kind::START);
        out.put_u32(self.section);
        put_name(out, NAME);
        out.put_u32(self.instance);
        out.put_u32(VERSION);
        out.put_u64(self.total() | flag::MEM_SIZE);
        for block in &self.blocks {
            put_name(out, block.id.as_bytes());
            out.put_u64(block.length);
        }
        if self.multifd_flush {
            out.put_u64(flag::MULTIFD_FLUSH);
        }
        out.put_u64(flag::EOS);
        put_footer(out, self.section);
    }
}

/// Blocks until their lengths add up to the total. Each is checked as it comes, so that a wrong list is refused before it is whole.
fn read_blocks(cursor: &mut Cursor<'_>, total: u64) -> Result<Vec<RamBlock>, Stop> {
    let refuse = |error: BlocksError| Stop::from(StreamError::from(error));
    let mut blocks = Vec::new();
    let mut left = total;
    while left > 0 {
        if blocks.len() == MAX_BLOCKS {
            return Err(refuse(BlocksError::TooMany));
        }
        let id = BlockId::new(cursor.name()?).map_err(|_| refuse(BlocksError::Nameless))?;
        let length = cursor.u64()?;
        if length == 0 || !length.is_multiple_of(PAGE) {
            return Err(refuse(BlocksError::Length(length)));
        }
        left = left.checked_sub(length).ok_or_else(|| refuse(BlocksError::Total { total }))?;
        blocks.push(RamBlock { id, length });
    }
    Ok(blocks)
}

/// A list of blocks that was checked, to find a block by name or place.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    /// Name and number of pages.
    list: Vec<(BlockId, u64)>,
    by_name: BTreeMap<BlockId, BlockIndex>,
}

impl Blocks {
    pub(crate) fn new(blocks: &[RamBlock]) -> Result<Self, BlocksError> {
        if blocks.is_empty() {
            return Err(BlocksError::Empty);
        }
        if blocks.len() > MAX_BLOCKS {
            return Err(BlocksError::TooMany);
        }
        let mut checked = Self::default();
        let mut total: u64 = 0;
        for (block, place) in blocks.iter().zip(0..) {
            if block.length == 0 || !block.length.is_multiple_of(PAGE) {
                return Err(BlocksError::Length(block.length));
            }
            total = total.checked_add(block.length).ok_or(BlocksError::Total { total: u64::MAX })?;
            if checked.by_name.insert(block.id.clone(), BlockIndex(place)).is_some() {
                return Err(BlocksError::Twice(harmless(block.id.as_bytes())));
            }
            checked.list.push((block.id.clone(), block.pages()));
        }
        Ok(checked)
    }

    pub(crate) fn find(&self, name: &[u8]) -> Option<BlockIndex> {
        self.by_name.get(name).copied()
    }

    pub(crate) fn id(&self, block: BlockIndex) -> Option<&BlockId> {
        self.list.get(usize::from(block.0)).map(|(id, _)| id)
    }

    /// Number of a block's pages; none of a block that is not there.
    pub(crate) fn pages(&self, block: BlockIndex) -> u64 {
        self.list.get(usize::from(block.0)).map_or(0, |(_, pages)| *pages)
    }
}
