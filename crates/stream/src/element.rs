//! What the stream consists of, as the reader gives it and the writer takes it.

use std::borrow::Borrow;
use std::fmt;

use bytes::Bytes;

use crate::configuration::Configuration;
use crate::ram::RamStart;
use crate::wire::harmless;

/// One piece of a stream.
///
/// ```text
/// Header  Configuration  { Command | Early }  RamStart
///         { Command | Early | PartBegin { Page } PartEnd }
///         EndBegin { Page } EndEnd  { Command }  Opaque …
/// ```
/// An `Opaque` may come at any place after the configuration where no section is open; nothing but `Opaque` follows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Element {
    /// The magic number and version 3.
    Header,
    /// The machine's name and what the source wants checked.
    Configuration(Configuration),
    /// A command to the destination. Numbers that are not known are passed on.
    Command {
        /// Which.
        number: u16,
        /// What it says; at most 65,535 bytes.
        payload: Bytes,
    },
    /// A whole section that comes before the pages, from its kind to its footer; so far that of `virtio-mem`.
    Early(Bytes),
    /// The RAM section opens and lists its blocks.
    RamStart(RamStart),
    /// Pages follow.
    PartBegin,
    /// No more pages for now.
    PartEnd,
    /// The last pages follow.
    EndBegin,
    /// No more pages.
    EndEnd,
    /// A page. The same page may come many times; the last counts.
    Page {
        /// Which block.
        block: BlockIndex,
        /// Which page of the block, counted from 0.
        page: u64,
        /// What is in it.
        content: PageContent,
    },
    /// Bytes that are passed on as they come, not empty: the devices' state and all that follows, or a stream that is not understood.
    Opaque(Bytes),
}

impl Element {
    /// Its name, for messages.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Header => "header",
            Self::Configuration(_) => "configuration",
            Self::Command { .. } => "command",
            Self::Early(_) => "early section",
            Self::RamStart(_) => "start of RAM",
            Self::PartBegin => "begin of a part",
            Self::PartEnd => "end of a part",
            Self::EndBegin => "begin of the last part",
            Self::EndEnd => "end of the last part",
            Self::Page { .. } => "page",
            Self::Opaque(_) => "opaque bytes",
        }
    }
}

/// Content of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PageContent {
    /// All zero.
    Zero,
    /// Exactly [`PAGE_SIZE`](crate::PAGE_SIZE) bytes. Those of a reader are a view of its buffer: whoever keeps one for long keeps all
    /// that was read together with it.
    Data(Bytes),
}

/// Place of a RAM block in the list of [`RamStart`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub u16);

/// Name of a RAM block, 1 to 255 bytes, mostly text: `pc.ram`, `/rom@etc/acpi/tables`. Printing makes it harmless.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockId(Box<[u8]>);

/// A name that is empty or longer than 255 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a RAM block's name has 1 to 255 bytes")]
pub struct MalformedBlockId;

impl BlockId {
    /// # Errors
    /// [`MalformedBlockId`]
    pub fn new(name: &[u8]) -> Result<Self, MalformedBlockId> {
        if (1..=usize::from(u8::MAX)).contains(&name.len()) { Ok(Self(name.into())) } else { Err(MalformedBlockId) }
    }

    /// The bytes, as the stream has them.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl Borrow<[u8]> for BlockId {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&harmless(&self.0))
    }
}

impl fmt::Debug for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockId({self})")
    }
}
