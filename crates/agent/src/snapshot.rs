//! Snapshots: what QEMU writes of the memory of a VM that runs on, into the vault ([`take`]), its disks as they were at that instant ([`disk`]), its disks made what
//! they were ([`restore`]) or read from there ([`serve`]), and a VM that runs at once out of it ([`play`]); and both as
//! files, out of the vault ([`unload`]) and into it ([`load`]).
//!
//! ```text
//! take      QEMU (background-snapshot) ──stream──▶ pages, device state ──▶ vault
//!           QEMU (export of a disk, whose old content it saves from being written over) ──NBD──▶ pages ──▶ vault
//!           QEMU (export of such a disk with its bitmap) ──NBD──▶ pages that have changed since an earlier snapshot; where all others are the vault knows
//! changed   QEMU (export of a disk with its bitmap) ──NBD──▶ what has changed on a disk since a snapshot: that a rollback looks at it alone
//! restore   vault ──what differs──NBD──▶ QEMU (a disk, before its VM runs)
//! serve     vault ──NBD──▶ QEMU (what a disk was, read while its volume is filled and the VM runs)
//! play      vault ──stream of post-copy: device state first, pages as they are missed, the rest in order──▶ QEMU (incoming)
//!           and again, to one that has lost whoever played: what it says that it does not have
//! lend      vault ──pages of memory──▶ carry (of a move to here), which the other host need not send
//! unload    vault ──▶ file (the stream of a migration), file (raw)
//! load      file (such a stream), file (raw) ──▶ vault
//! ```
//! All of it is done by a process of its own, the *vault worker* ([`worker`]): it reads what QEMU and the vault say in a cage, and sees of the host the vault's directory alone.
//! The agent starts it and hears how it goes ([`client`]), in the words of [`control`].

mod changed;
mod client;
mod control;
mod disk;
mod export;
mod lend;
mod load;
mod play;
mod request;
mod restore;
mod serve;
mod take;
mod unload;
mod worker;

pub(crate) use changed::Changed;
pub(crate) use client::Worker;
pub(crate) use control::{BitmapOf, DiskFile, DiskOf, DiskTo, Job, Kept, Keyed, MemoryFile, Restored, Said};
#[cfg(test)]
pub(crate) use lend::lend;
pub(crate) use lend::{END, MOST_BLOCKS, MOST_PAGES};
pub(crate) use request::{FromSnapshot, MemoryInVault, SnapshotJob, VaultAt, id_of, key_of};
pub use worker::{WorkerError, run};

#[cfg(test)]
pub(crate) mod tests;
