//! Tests with real QEMUs: the one on PATH and, where this system offers it, another major version. They need root and /dev/net/tun.

mod cage;
mod devices;
mod guest;
mod memory;
mod migrate;
mod place;
mod postcopy;
mod start;
mod switchover;
mod tpm;
mod wire;
