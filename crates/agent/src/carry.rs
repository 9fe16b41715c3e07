//! `carry`: one unprivileged process per side of a migration. It holds QEMU's migration socket and the connection to the peer, moves the
//! bytes, and relays the agents' messages. It decides nothing. It outlives the agent, which speaks to it over a unix socket, and its connections
//! to the peer, which are replaced when they die.
//!
//! ```text
//!   QEMU ◀──socketpair──▶ carry ◀──TLS 1.3, frames──▶ carry ◀──socketpair──▶ QEMU
//!                           ▲                           ▲
//!                     unix socket, JSON lines     unix socket, JSON lines
//!                           ▼                           ▼
//!                         agent                       agent
//! ```

mod after;
mod arrive;
mod behind;
mod client;
mod connect;
mod connections;
mod control;
mod deal;
mod disk;
mod feed;
mod holdings;
mod home;
mod images;
mod large;
mod lent;
mod memory;
mod neighbours;
mod process;
mod pump;
mod return_path;
mod seal;
mod speed;
mod threads;

pub(crate) use client::{CarryClient, CarryNotice, CarryStart};
pub(crate) use control::{
    CarryConfig, CarryStatus, ImageFd, IndexedImageFds, KeptMemory, LentMemory, OwnDiskFacts, PlacedBlock, Placement, Role,
};
pub(crate) use memory::ProcessMemory;
pub use process::{CarryError, run};

#[cfg(test)]
mod tests;
