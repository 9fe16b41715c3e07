//! What a host keeps on disk of guests' memory, encrypted from the first byte. So far *stays*: the RAM of a VM that left, kept so that a VM
//! which comes home finds its pages here. No runtime, no network; files are the caller's or the [`Shelf`]'s.
//!
//! A stay is a hint: whoever uses one compares what it holds with what the VM has now. It can be old, torn or gone, and costs bytes then, never
//! correctness. The format is specified in `docs/spec/stay.md`, whose example the tests read. Start with [`StayWriter`] and [`StayReader`].

mod shelf;
mod stay;

pub use shelf::{Draft, Limits, Shelf, ShelfError, Usage};
pub use stay::{
    Block, Chunk, Identity, InvalidIdentity, MalformedStay, Sink, StayError, StayKey, StayReader, StayWriter, Unpacker, VERSION,
};
