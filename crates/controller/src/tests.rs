//! The controller over its real listeners, with scripted agents: no QEMU, no network but loopback.

mod changes;
mod clones;
mod contract;
mod events;
mod guest;
mod hosts;
mod imports;
mod joining;
mod migrations;
mod networks;
mod power;
mod restart;
mod schedules;
mod snapshots;
mod space;
pub(crate) mod support;
mod walk;
