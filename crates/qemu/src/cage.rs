//! The cage: a program runs under a uid of its own, in namespaces of its own, in a root of its own that holds little more than the program's
//! libraries, cannot gain privileges, and holds only the descriptors that it was given.
//!
//! ```text
//!  agent ── spawn ──▶ `godwit cage --plan-fd N` (single-threaded, root)
//!    ▲                   │ clone: mount, pid, ipc, uts, network namespaces; a sibling, so that the agent is the parent
//!    │                   ├──────▶ root, session, cgroup, limits, uid, profile, no_new_privs, refused calls ── exec ──▶ QEMU (same pid)
//!    │ status pipe: the pid; then a reason, or closed by the exec       │ pipe that never waits
//!    └───────────────────┘ stays as the keeper of the log ◀─────────────┘
//! ```
//! Neither process is tied to the agent: no death signal, no descriptor of it; nor is the program tied to the keeper. Start with [`CagePlan`];
//! [`tool`] is the same for programs that run for a moment, [`relay`] and [`worker`] what programs of ours renounce beyond it.

pub mod apparmor;
mod calls;
mod enter;
mod keeper;
mod launch;
pub mod relay;
mod root;
pub mod tool;
pub mod worker;

use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;

use godwit_model::Bytes;
use serde::{Deserialize, Serialize};

pub use apparmor::Profile;
pub use enter::{CageError, run, run_as_we_are, run_to_end};
pub use launch::{Launcher, Output, SpawnError, spawn};

/// What the hidden subcommand does, as JSON in the descriptor it is given. Everything in it comes from the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CagePlan {
    /// The VM's own uid; not 0.
    pub uid: u32,
    /// The VM's own gid; not 0.
    pub gid: u32,
    /// What to run.
    pub binary: PathBuf,
    /// Its arguments, without its name.
    pub arguments: Vec<String>,
    /// Where it starts; an empty directory if nothing is shown there.
    pub working_dir: PathBuf,
    /// Files and directories of the host that it sees at their places, read-only, besides the system's libraries and its own binary.
    #[serde(default)]
    pub read_only: Vec<PathBuf>,
    /// Directories of the host that it sees at their places and may write to, as far as their owners let it.
    #[serde(default)]
    pub writable: Vec<PathBuf>,
    /// Which network it sees.
    #[serde(default)]
    pub network: Network,
    /// Devices that the VM's uid gets as nodes of its own.
    #[serde(default)]
    pub nodes: Vec<DeviceNode>,
    /// Directory of the cgroup to join.
    #[serde(default)]
    pub cgroup: Option<PathBuf>,
    /// Limits to set.
    #[serde(default)]
    pub limits: Vec<Limit>,
    /// Whose AppArmor profile it has, where the agent has loaded them.
    pub profile: Profile,
    /// The kernel's name of that profile. Filled in by [`spawn`].
    #[serde(default)]
    pub profile_name: Option<String>,
    /// Processors of the host that it runs on; any if none is named.
    #[serde(default)]
    pub cpus: Vec<u32>,
    /// Descriptors that stay open besides the standard ones; all others are closed. Filled in by [`spawn`].
    #[serde(default)]
    pub keep: Vec<RawFd>,
    /// Where a keeper writes what it says. Filled in by [`spawn`].
    #[serde(default)]
    pub log: Option<LogPlan>,
}

/// Which network a program sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// None: taps and sockets are passed.
    #[default]
    Empty,
    /// The host's, for who dials.
    Host,
}

/// Descriptors and bound of a log that is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogPlan {
    current: RawFd,
    older: RawFd,
    limit: Bytes,
}

/// A log of two files, so that no program can fill the host's disk by what it says: when the first has grown to the limit, its content moves to
/// the second. Both are opened for reading and appending; several programs may share them.
#[derive(Debug)]
pub struct KeptLog {
    /// Where new lines go.
    pub current: OwnedFd,
    /// What was there before.
    pub older: OwnedFd,
    /// Most bytes of each.
    pub limit: Bytes,
}

/// A device that the VM's uid may open: the same device as at `path`, as a node that belongs to the VM, seen only by it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceNode {
    /// Where it is on the host and in the cage.
    pub path: PathBuf,
    /// Whether the start fails without it. If not, the reason goes to the log.
    pub required: bool,
}

impl DeviceNode {
    /// `/dev/kvm`: without it a VM that needs it cannot run.
    #[must_use]
    pub fn kvm() -> Self {
        Self { path: "/dev/kvm".into(), required: true }
    }

    /// `/dev/userfaultfd`: without it post-copy and RAM snapshots are refused, all else works.
    #[must_use]
    pub fn userfaultfd() -> Self {
        Self { path: "/dev/userfaultfd".into(), required: false }
    }
}

/// A limit of the process, soft and hard alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// Of what.
    pub resource: LimitedResource,
    /// How much.
    pub value: u64,
}

/// What a [`Limit`] limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LimitedResource {
    /// Size of a core dump in bytes: 0, since a core of QEMU is the guest's RAM.
    Core,
    /// Open descriptors.
    OpenFiles,
    /// Locked memory in bytes.
    LockedMemory,
    /// Processes and threads of this uid.
    Processes,
    /// Memory that is mapped, in bytes.
    AddressSpace,
    /// Size of a file that it writes, in bytes. Not for who writes to disks.
    FileSize,
    /// Time on a processor, in seconds.
    ProcessorTime,
}

impl Limit {
    /// What every QEMU gets.
    pub const DEFAULT: &'static [Self] = &[
        Self { resource: LimitedResource::Core, value: 0 },
        Self { resource: LimitedResource::OpenFiles, value: 4_096 },
        Self { resource: LimitedResource::Processes, value: 1_024 },
    ];
}

/// Descriptors for a QEMU to be, with the numbers that they will have there.
#[derive(Debug, Default)]
pub struct PassedFds {
    fds: Vec<(RawFd, OwnedFd)>,
}

impl PassedFds {
    /// Numbers under this are left to the standard streams and to the cage.
    const FIRST: RawFd = 10;

    /// None yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { fds: Vec::new() }
    }

    /// Passes `fd` and says which number it will have. Ours is closed by [`spawn`]: a copy that we kept would hold the locks of a disk
    /// beyond QEMU's life.
    pub fn pass(&mut self, fd: impl Into<OwnedFd>) -> RawFd {
        let number = Self::FIRST + RawFd::try_from(self.fds.len()).expect("far fewer descriptors than 2^31");
        self.fds.push((number, fd.into()));
        number
    }

    /// Those that are passed.
    #[cfg(test)]
    pub(crate) fn all(&self) -> impl Iterator<Item = &OwnedFd> {
        self.fds.iter().map(|(_, fd)| fd)
    }
}
