//! The NBD protocol, both sides of it: bytes in, bytes out. Pure.
//!
//! QEMU speaks NBD where its disks are read or written from outside. We read a disk as its [`Client`], write one as its client, and as its [`Server`] take what a
//! mirror writes, or give it a disk to read. What is spoken is the fixed newstyle handshake with `GO`; of the transmission what QEMU and we need: a client
//! insists on structured replies, without which a disk's holes cannot be asked for; a server of writes answers with simple ones.
//! TLS is not: the sockets are pairs between processes of one host.
//!
//! The protocol is described by its authors, in the file `doc/proto.md` of the NBD project. Sizes are checked before anything is kept for them, and no input
//! can panic.

mod client;
mod server;
mod wire;

pub use client::{Client, Event, Extent};
pub use server::{Request, Server};
pub use wire::{Malformed, put_disconnect, put_flush, put_read, put_status, put_write, put_write_zeroes};

/// Most bytes that are read or written by one request.
pub const MAX_DATA: u32 = 2 << 20;

/// The kind of extents that says which parts of a disk are holes, or zeros.
pub const ALLOCATION: &str = "base:allocation";

/// The kind of extents that says which parts of a disk a dirty bitmap of QEMU names.
#[must_use]
pub fn dirty_bitmap(name: &str) -> String {
    format!("qemu:dirty-bitmap:{name}")
}

#[cfg(test)]
mod tests;
