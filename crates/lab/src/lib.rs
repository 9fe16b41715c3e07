//! Several hosts on one machine: network namespaces, veth, limited links, one agent per host, one controller.
//!
//! For trying out, demos and tests. A lab is what its record (`lab.json`) says; every operation reads it anew under the lab's
//! lock, so that several processes may work on one lab. Everything a lab makes carries its name.
//!
//! This crate never touches a namespace, process or directory that is not its lab's, never configures the networks of
//! virtual machines (the agent does), and knows nothing of virtual machines.
//!
//! Start at [`Lab`], then [`layout`] for the names and addresses.

mod bootstrap;
mod command;
mod daemon;
mod down;
mod error;
mod lab;
pub mod layout;
mod link;
mod namespace;
mod network;
mod process;
mod record;
mod relay;
mod spec;
mod status;
mod up;

pub use bootstrap::{ApiAccess, Bootstrap, BootstrapError};
pub use daemon::Daemon;
pub use down::Removed;
pub use error::LabError;
pub use lab::Lab;
pub use link::{LinkChange, LinkRate, LinkState, LinkStatus, Loss, ParseLinkError};
pub use namespace::in_namespace;
pub use relay::{RelayError, RelayPlan, run_relay};
pub use rustix::process::Signal;
pub use spec::{HostOverride, LabSpec, SpecError};
pub use status::{DaemonStatus, HostStatus, LabStatus};
