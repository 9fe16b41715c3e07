//! What the test guest and those who watch it agree on: its knobs, its memory pages, the records it sends, the lines it prints.
//!
//! The binary `godwit-guest` is `/init` of a small initramfs made by `scripts/guest-image`. A migration is right when nothing
//! here notices it: pages stay as written, clocks do not jump, streams go on, and the witness sees one runner.
//!
//! Never: a panic on what comes from the network, the command line or the serial line. Nothing here needs to run as init:
//! the tests of this crate run on any machine. Start at [`Knobs`] for what can be asked of a guest, at [`PagePool`] for
//! the memory, at [`WitnessLog`] for the proof that no two runners exist.

mod knobs;
mod noise;

mod disk;
mod load;
mod pages;

mod clock;
mod pace;
mod spoof;
mod stream;
mod witness;

mod agent;
mod report;
mod seed;

pub use agent::{AgentAnswer, answer_agent};
pub use clock::{ClockReading, ClockReport, ClockWatch};
pub use disk::{DiskError, DiskPool};
pub use knobs::{KnobError, Knobs, Mix};
pub use load::{Load, Rewrite};
pub use noise::Noise;
pub use pace::Pace;
pub use pages::{PAGE_SIZE, PageError, PageFault, PageKind, PagePool};
pub use report::{ConsoleLine, Status, console_line};
pub use seed::host_name_of;
pub use spoof::{MOST_SPOOFS, SPOOF_MARK, Spoof, SpoofRequest};
pub use stream::{StreamMismatch, StreamVerifier, fill_stream};
pub use witness::{RecordError, VmWitness, WitnessLog, WitnessRecord, host_generation};

/// UDP: sends every datagram back to its sender.
pub const ECHO_PORT: u16 = 7;
/// UDP: answers any datagram with [`Status`] as JSON; [`VERIFY`] also has the memory of a [`Load`] verified, which counts as a sweep.
pub const STATUS_PORT: u16 = 5;
/// A datagram to [`STATUS_PORT`].
pub const VERIFY: &[u8] = b"verify";
/// A datagram to [`STATUS_PORT`]: the guest's kernel panics, and stands still for ever.
pub const PANIC: &[u8] = b"panic";
/// UDP: carries out a [`SpoofRequest`] and sends it back when the frames are on their way.
pub const SPOOF_PORT: u16 = 13;
/// TCP: sends the endless stream that [`StreamVerifier`] checks.
pub const STREAM_PORT: u16 = 9;
