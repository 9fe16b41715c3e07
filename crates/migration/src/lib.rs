//! Who may run a VM while it moves, decided by pure functions over what is seen.
//!
//! Each side has a durable [`source::SourceRecord`] or [`destination::DestinationRecord`] and looks at the world again and again; `decide`
//! answers with the one next action. Nothing is remembered that cannot be read again from the journal, from QEMU or from the peer, so a side that
//! crashed or was frozen at any line goes on by looking. Agents run these functions; the tests run them against a model of two QEMUs
//! with crashes, cut links and freezes, and `crates/sim` tries every order of them.
//!
//! The protocol is in `docs/spec/handover.md`: parties, sequence, records, messages, and what each party does after whose death.
//!
//! Invariants kept here, each with a test named after it: one runner; our stop, our start; nothing is destroyed before the other side is proven.
//!
//! This crate must never touch a clock, a socket, a file or a process. Start with [`source`].

pub mod convergence;
pub mod destination;
pub mod forecast;
pub mod message;
pub mod source;
pub mod view;

pub use convergence::{WarmUp, predict_blackout};
pub use destination::{ArrivingCarry, Destination, DestinationAction, DestinationRecord, DestinationView};
pub use forecast::{Outlook, forecast};
pub use message::{Peer, PeerMessage};
pub use source::{Source, SourceAction, SourceRecord, SourceView, warm_up_of};
pub use view::{CarryView, DisksView, Outcome, QemuMigration, QemuView, Vcpus};
