//! The harness of the end-to-end tests and the demo: a lab with a real controller, real agents, real QEMU and a real kernel; an outside
//! client that watches the guests; faults; and a check after every action.
//!
//! It must never touch a process, namespace or directory that is not its own lab's, and never trust the system under test about itself:
//! what a guest suffered is measured from outside, and what is left behind is looked for in `/proc` and in the namespaces.
//!
//! Start at [`Cluster`], then [`Action`] for what a test is made of, [`faults`] for runs that are drawn from seeds, and [`mod@bench`] for
//! comparisons.

mod artefacts;
mod cluster;
mod consoles;
mod guest;

mod action;
mod checks;
mod labs;
mod logs;
mod processes;

mod outside;
mod report;
/// What a guest's TPM is asked.
pub mod tpm;

pub mod bench;
pub mod command;
pub mod faults;

pub use action::{Action, Ending, Party};
pub use artefacts::{
    CloudImage, GuestImages, cloud_image, godwit_binary, guest_agent_layer, guest_images, other_qemu, schemathesis,
};
pub use cluster::{Cluster, ClusterSpec};
pub use guest::{Guest, GuestSpec};
pub use outside::{Echo, Outside, StreamClient, StreamReport, Witness};
pub use processes::{HostProcess, ProcessRole};
pub use report::{GuestReport, MigrationReport, Report, RollbackReport, SelftestReport, TcpReport, WayHomeReport, WitnessReport};
