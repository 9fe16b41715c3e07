//! What a host keeps on disk for moves. *Stays*, encrypted from the first byte: the RAM of a VM that left, kept so that a VM
//! which comes home finds its pages here. And indexes of images, which are on the host in the clear: [`ImageIndex`]. No runtime, no network; files are the caller's or the [`Shelf`]'s.
//!
//! A stay is a hint: whoever uses one compares what it holds with what the VM has now. It can be old, torn or gone, and costs bytes then, never
//! correctness. The format is specified in `docs/spec/stay.md`, whose example the tests read. Start with [`StayWriter`] and [`StayReader`].

mod image_index;
mod shelf;
mod stay;

pub use image_index::{ImageIndex, ImageIndexError};
pub use shelf::{Draft, Limits, Shelf, ShelfError, Usage};
pub use stay::{
    Block, Chunk, Identity, InvalidIdentity, MalformedStay, Sink, StayError, StayKey, StayReader, StayWriter, Unpacker, VERSION,
};
