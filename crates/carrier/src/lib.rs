//! The wire between two hosts: frames, and how much may be in flight. Pure: bytes and times in, bytes and decisions out.
//!
//! The format is specified in `docs/spec/carrier.md`, whose examples the tests read. Start with [`frame::Frame`]; [`flow::Window`] keeps what is
//! buffered between the two QEMUs small, since everything buffered when the VM stops is blackout.

pub mod flow;
pub mod frame;

pub use flow::Window;
pub use frame::{Decoder, Frame, Identity, MalformedFrame, VERSION};
