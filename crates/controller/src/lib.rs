//! The controller: API, store, tasks, grants, the cluster's authority, and who may do what.
//!
//! It must never touch a host, guess who owns a VM, hand out a generation twice, or answer a request without a principal. One runner: the
//! newest grant of a VM is written to the store before anybody hears of it. Start with [`options::ServeOptions`] and [`serve`]; then
//! `tasks` (what long work does, resumable at every step), `hub` and `link` (the agents), `http` (the users), `store` (what is durable).

pub mod options;

mod authority;
mod ca;
mod checks;
mod clock;
mod clones;
mod cpu;
mod db;
mod fleet;
mod habits;
mod history;
mod http;
mod hub;
mod images;
mod link;
mod metrics;
mod migratable;
mod networks;
mod principals;
mod reports;
mod resolve;
mod restore;
mod rows;
mod schedules;
mod server;
mod snapshots;
mod sockets;
mod specs;
mod store;
mod tasks;
mod views;

#[cfg(test)]
mod tests;

pub use authority::{AuthorityError, AuthorityView, SealError};
pub use ca::AuthorityPlace;
pub use clock::WallClock;
pub use images::{Converter, FetchRules};
pub use options::{LogFormat, ServeOptions};
pub use server::{Controller, ServeError, serve};
