//! QEMU's migration stream as records, and records as the stream. Pure: bytes in, records out, and back; no socket, no clock.
//!
//! [`Reader`] and [`Writer`] are the way from source to destination, [`ReturnReader`] and [`ReturnWriter`] the way back. What is read
//! and written again is the same, byte for byte, so that a process between two QEMUs can take the RAM pages out and leave all else as it is.
//! Whatever is not understood is passed on untouched or refused, never guessed. The grammar is in `docs/spec/qemu-stream.md`, whose
//! examples the tests read. Start with [`Element`]; [`postcopy`] is what a process says that plays a source itself.

mod configuration;
mod cursor;
mod early;
mod element;
mod error;
pub mod postcopy;
mod ram;
mod reader;
mod return_path;
mod wire;
mod writer;

pub use configuration::{Configuration, Subsection};
pub use element::{BlockId, BlockIndex, Element, MalformedBlockId, PageContent};
pub use error::{BlocksError, StreamError, WriteError};
pub use ram::{MAX_BLOCKS, RamBlock, RamStart};
pub use reader::Reader;
pub use return_path::{MAX_BITMAP, MAX_RETURN_PAYLOAD, ReturnError, ReturnMessage, ReturnReader, ReturnWriteError, ReturnWriter};
pub use writer::Writer;

/// Size of a page in the stream. QEMU calls it the target's page size; that of x86 is the only one taken.
pub const PAGE_SIZE: usize = 4096;

#[cfg(test)]
mod tests;
