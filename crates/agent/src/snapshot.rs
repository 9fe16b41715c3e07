//! Snapshots with RAM: what QEMU writes of a VM that runs on, into the vault ([`take`]), and a VM that runs at once out of it ([`play`]).
//!
//! ```text
//! take   QEMU (background-snapshot) ──stream──▶ pages, device state ──▶ vault
//! play   vault ──stream of post-copy: device state first, pages as they are missed, the rest in order──▶ QEMU (incoming)
//! ```

mod play;
mod take;

pub use play::{PlayError, Played, play};
pub use take::{TakeError, Taken, take};

#[cfg(test)]
mod tests;
