//! The wire between two hosts: frames, a session that outlives its connections, how much may be in flight, and what a page of guest memory
//! becomes on its way. Pure: bytes and times in, bytes and decisions out.
//!
//! The format is specified in `docs/spec/carrier.md`, whose examples the tests read. Start with [`frame::Frame`], then [`Session`]; [`pages`]
//! is what makes moves cheap; [`flow::Window`] keeps what is buffered between the two QEMUs small, since all of it is blackout when the VM stops.

pub mod flow;
pub mod frame;
pub mod level;
pub mod pages;
pub mod session;

pub use flow::Window;
pub use frame::{Block, Decoder, Frame, Greeting, Identity, Image, MalformedFrame, Side, VERSION};
pub use level::{Level, LevelChoice, Spent};
pub use session::Session;
