//! VMs on this host: one actor per VM owns its process, its monitor and its move; nothing else changes them.
//!
//! ```text
//!   session ──command──▶ actor ◀── QMP notices, process exit, carry, peer, time
//!                          │
//!              journal, QEMU, carry, reports
//! ```
//! An actor that begins after a restart reads the journal, adopts the process by its pidfd and the monitor by its socket, and goes on by
//! looking. The guest notices nothing.

mod actor;
mod change;
mod destination;
mod disks;
mod fill;
mod forecast;
mod images;
mod lend;
mod moving;
mod neighbours;
mod placement;
mod playing;
mod registry;
mod restore;
mod sampling;
mod snapshot;
mod source;
mod start;
mod start_carry;
pub(crate) mod stays;
mod tpm;
mod turn_back;

pub(crate) use actor::{Answer, VmCommand};
pub(crate) use registry::Registry;
pub(crate) use start::{Uids, fetch_image};
pub(crate) use turn_back::TurnBack;
