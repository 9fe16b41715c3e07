//! Pages of guest memory on the wire: each in the cheapest way that is still exact.
//!
//! The source knows by digest what every page holds at the destination, since it was the source that sent it, or the destination that told it
//! ([`crate::Frame::Held`]). A page is sent as
//!
//! - nothing, if the destination holds that very content there already;
//! - *zero*;
//! - *copy* of another page that the destination holds at that point of the sequence, or of a page of an image ([`images`]);
//! - *patch*: the pieces of 64 bytes that differ from what the destination holds there, which the source remembers, or asks for
//!   ([`crate::Frame::Wanted`]) where the destination has only told a digest;
//! - *data*: all of it, compressed together with the rest of its batch.
//!
//! Pages of a disk are sent as what they are ([`plain`]): too many to remember something of each. In post-copy pages are *left* ([`Encoder::leave`]) and sent after the switch ([`rest`]).
//!
//! What is rebuilt from content that the destination holds carries a check: the destination never trusts that it holds what the source
//! believes. [`Encoder`] is the source's half, [`Applier`] the destination's, [`batch`] the bytes between them.

pub mod apply;
pub mod batch;
pub mod digest;
pub mod encode;
pub mod images;
pub mod plain;
pub mod rest;
pub mod seal;
mod signature;
mod wanted;
mod watched;

pub use apply::{Applied, Applier, ApplyError, GuestMemory};
pub use batch::{MAX_PAYLOAD, MalformedBatch};
pub use digest::{Digest, Digester};
pub use encode::{Batch, Encoder, EncoderLimits, Encoding, Place};
pub use images::{COMMON, FIRST_IMAGE, Images};
pub use plain::PlainEncoder;
pub use rest::{PageSet, Rest};
pub use seal::Sealer;
pub use wanted::Pieces;

/// Bytes of a page.
pub const PAGE_SIZE: usize = 4096;

/// The content of a page.
pub type Page = [u8; PAGE_SIZE];

/// Bytes of the pieces that a patch consists of.
pub const PIECE: usize = 64;

/// Pieces of a page: as many as a mask has bits.
pub const PIECES: usize = PAGE_SIZE / PIECE;

#[cfg(test)]
mod tests;
