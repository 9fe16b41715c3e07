//! The contract between agent and controller: generated messages, their conversion to the model, whose certificate is whose, and statements that
//! are signed.
//!
//! Nothing here opens a socket. Start with `proto/link.proto`; [`convert`] is the only place where wire text becomes model values.

pub mod certificate;
pub mod convert;
pub mod statement;
pub mod status;
pub mod token;

#[expect(missing_docs, clippy::all, reason = "generated from proto/link.proto, which documents it")]
pub mod v1 {
    tonic::include_proto!("godwit.link.v1");
}

pub use convert::{Malformed, decode, encode};
pub use token::{InvalidJoinToken, JoinToken};

/// Version of the protocol that both sides must share.
pub const PROTOCOL: u32 = 2;

/// Largest message on the Attend stream.
pub const MAX_MESSAGE: usize = 4 << 20;

/// Largest chunk of an image or console.
pub const MAX_CHUNK: usize = 256 << 10;
