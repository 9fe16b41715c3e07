//! Proof by trying everything: the state machines that agents run, in a small world in which whatever may fail does, in every order.
//!
//! [`handover`] puts the real `Source` and `Destination` of `godwit-migration` between modelled hosts, QEMUs, wires and a controller;
//! [`mod@explore`] visits every state that can be reached. For development only: no other crate may depend on this one. Start with `handover.rs`.

pub mod explore;
pub mod handover;
pub mod plane;

pub use explore::{Explored, Model, NO_GOOD_END, Violation, explore};
pub use handover::{HandOver, Route, Wrong};
