//! The driver: starts QEMU, talks to it, and knows what it can do. The only crate that knows QEMU's names and syntax.
//!
//! It must never decide who may run a VM, never continue a VM by itself, and never take anything that QEMU says as trusted: every size is
//! bounded, unknown events, fields and values end nothing.
//!
//! Start with [`command`] (what a [`godwit_model::ResolvedSpec`] becomes), then [`cage`] (how that is run: own uid, namespaces, root,
//! limits), [`process`] (watching and adopting it), [`qmp`] (talking to it) and [`qga`] (talking to the guest in it); [`change`] is what can be
//! done to a VM while it runs. [`capabilities`] and [`accel`] say what a host offers, [`cgroup`] holds a VM's limits, [`convert`] makes one
//! disk format of another, [`disks`] lets disks travel, [`since`] knows what was written to them since a snapshot, [`tpm`] is a VM's TPM, a process of its own.

pub mod accel;
pub mod cage;
pub mod capabilities;
pub mod cgroup;
pub mod change;
pub mod command;
pub mod convert;
pub mod disks;
pub mod fill;
pub mod fleece;
pub mod process;
pub mod qga;
pub mod qmp;
pub mod since;
pub mod snapshot;
pub mod tpm;

pub use accel::AccelReport;
pub use cage::{CagePlan, Launcher, PassedFds};
pub use capabilities::HostCapabilities;
pub use command::{Resources, Sockets, Start};
pub use process::{ProcessIdentity, QemuProcess};
pub use qga::{GuestAgent, QgaError};
pub use qmp::{Notice, Notices, Qmp, QmpError};
