//! The controller over its real listeners, with scripted agents: no QEMU, no network but loopback.

mod contract;
mod events;
mod joining;
mod migrations;
mod networks;
mod power;
mod restart;
mod space;
pub(crate) mod support;
mod walk;
