//! Snapshots: what QEMU writes of the memory of a VM that runs on, into the vault ([`take`]), its disks as they were at that instant ([`take_disk`]), and a VM that runs at once
//! out of it ([`play`]).
//!
//! ```text
//! take   QEMU (background-snapshot) ──stream──▶ pages, device state ──▶ vault
//!        QEMU (export of a disk, whose old content it saves from being written over) ──NBD──▶ pages ──▶ vault
//! play   vault ──stream of post-copy: device state first, pages as they are missed, the rest in order──▶ QEMU (incoming)
//! ```

mod disk;
mod play;
mod take;

pub use disk::{TakeDiskError, take_disk};
pub use play::{PlayError, Played, play};
pub use take::{TakeError, Taken, take};

#[cfg(test)]
mod tests;
