//! The binary as a process, against a controller that only pretends.

mod console;
mod conventions;
mod daemons;
mod exec;
mod fake;
mod objects;
mod snapshots;
mod tasks;
