//! Moves of the same guests over the same links, by Godwit and by QEMU itself, one after the other.
//!
//! It must never give one of them what the other does not get: the machine, its QEMU, the guest's work, the link, what is counted and by whom are
//! the same for all.
//!
//! Start at [`Series`], then [`Scenario`] for what is moved and [`System`] for by whom.

mod scenario;
mod system;

mod godwit;
mod ground;
mod peer;
mod qmp;
mod tls;

mod cpu;
mod journey;
mod wire;

pub mod disks;
mod plot;
mod rows;
mod series;
pub mod snapshot;
mod table;

pub use rows::{Bench, BenchFile, Row};
pub use scenario::{Link, Scenario};
pub use series::Series;
pub use system::System;
