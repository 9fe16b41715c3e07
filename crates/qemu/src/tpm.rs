//! A VM's TPM: one swtpm beside its QEMU, in a cage of its own, with one file and one socket.
//!
//! ```text
//!  agent ── start ──▶ swtpm ◀── control: a pair of sockets ── QEMU ◀── tpm-crb ── guest
//!                       ▲  └───── commands: a pair that QEMU makes ─────┘
//!                       └ state: one open file
//! ```
//! It is tied to QEMU, not to the agent: it ends when QEMU's end of the commands closes. Before QEMU has come that far, who started it must end it.
//! What is permanent of a TPM is in the file whenever a command has been answered; all of it travels in QEMU's migration stream.

use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_model::Bytes;
use serde::Deserialize;

use crate::cage::tool::{self, Tool, ToolError};
use crate::cage::{CagePlan, Launcher, Limit, LimitedResource, Network, Output, PassedFds, Profile, SpawnError, spawn};
use crate::process::QemuProcess;

/// What swtpm must be able to do, in its own words: TPM 2.0, state in one file, and a filter of system calls of its own.
const NEEDED: [&str; 3] = ["tpm-2.0", "nvram-backend-file", "cmdarg-seccomp"];
/// What came (in 0.8) together with locks of its own on its file, which the locks on the description that it is given would keep out.
const LOCKS: &str = "cmdarg-migration";
/// What it may use: it is one thread of some MiB, and its state has some KiB.
const LIMITS: [Limit; 6] = [
    Limit { resource: LimitedResource::Core, value: 0 },
    Limit { resource: LimitedResource::OpenFiles, value: 64 },
    Limit { resource: LimitedResource::LockedMemory, value: 0 },
    // Counted together with QEMU's threads, which come later.
    Limit { resource: LimitedResource::Processes, value: 64 },
    Limit { resource: LimitedResource::AddressSpace, value: 256 << 20 },
    Limit { resource: LimitedResource::FileSize, value: 4 << 20 },
];

/// Why this host can give VMs no TPM.
#[derive(Debug, thiserror::Error)]
pub enum NoTpm {
    /// There is no swtpm.
    #[error("swtpm is not in PATH")]
    Missing,
    /// It does not say what it can do.
    #[error("swtpm cannot be asked what it can do")]
    Asked(#[source] ToolError),
    /// What it says is not understood.
    #[error("swtpm says what it can do in an unknown way")]
    Answer(#[source] serde_json::Error),
    /// It lacks something.
    #[error("swtpm {version} lacks {feature}")]
    Lacks {
        /// Its version.
        version: String,
        /// What.
        feature: &'static str,
    },
    /// It is of a later kind.
    #[error("swtpm {version} takes locks of its own, which is not provided for")]
    Locks {
        /// Its version.
        version: String,
    },
}

/// What swtpm says of itself.
#[derive(Debug, Deserialize)]
struct Capabilities {
    #[serde(default)]
    version: String,
    features: Vec<String>,
}

/// Finds this host's swtpm and asks it, as the user `uid`, whether it can do what a VM needs.
///
/// # Errors
/// See [`NoTpm`].
pub async fn find(launcher: &Launcher, uid: u32) -> Result<PathBuf, NoTpm> {
    let program = tool::find("swtpm").ok_or(NoTpm::Missing)?;
    let question = Tool {
        program: program.clone(),
        arguments: ["socket", "--tpm2", "--print-capabilities"].map(str::to_owned).to_vec(),
        uid,
        gid: uid,
        memory: Bytes::mib(256),
        time: Duration::from_secs(30),
    };
    let said = tool::ask(launcher, &question, PassedFds::new()).await.map_err(NoTpm::Asked)?;
    check(&said)?;
    Ok(program)
}

fn check(said: &str) -> Result<(), NoTpm> {
    let Capabilities { version, features } = serde_json::from_str(said).map_err(NoTpm::Answer)?;
    let version = version.chars().filter(char::is_ascii_graphic).take(20).collect();
    let has = |wanted: &str| features.iter().any(|feature| feature == wanted);
    match NEEDED.into_iter().find(|needed| !has(needed)) {
        Some(feature) => Err(NoTpm::Lacks { version, feature }),
        None if has(LOCKS) => Err(NoTpm::Locks { version }),
        None => Ok(()),
    }
}

/// A TPM that is to be started.
#[derive(Debug)]
pub struct TpmStart<'a> {
    /// See [`find`].
    pub program: &'a Path,
    /// The VM's own uid, also its gid.
    pub uid: u32,
    /// Directory of the VM's cgroup.
    pub cgroup: Option<PathBuf>,
    /// Its state: a file that `uid` may open for reading and writing; an empty one is made a new TPM's. swtpm keeps this very description open
    /// as long as it lives, and with it the locks on it: it takes none itself.
    pub state: OwnedFd,
    /// Where it complains.
    pub log: Output,
}

/// Starts it. Answers the process, and the end of its control socket that is QEMU's.
///
/// The caller must await [`QemuProcess::exited`] some time, or a zombie stays.
///
/// # Errors
/// See [`SpawnError`].
pub async fn start(launcher: &Launcher, start: TpmStart<'_>) -> Result<(QemuProcess, OwnedFd), SpawnError> {
    let TpmStart { program, uid, cgroup, state, log } = start;
    let (own, qemus) = UnixStream::pair().map_err(SpawnError::Start)?;
    let mut fds = PassedFds::new();
    let (control, state) = (fds.pass(own), fds.pass(state));
    let plan = CagePlan {
        uid,
        gid: uid,
        binary: program.to_owned(),
        arguments: arguments(control, state),
        working_dir: "/".into(),
        read_only: vec![],
        writable: vec![],
        network: Network::Empty,
        nodes: vec![],
        cgroup,
        limits: LIMITS.to_vec(),
        cpus: vec![],
        keep: vec![],
        profile: Profile::Tpm,
        profile_name: None,
        log: None,
    };
    Ok((spawn(launcher, plan, fds, log).await?, qemus.into()))
}

fn arguments(control: RawFd, state: RawFd) -> Vec<String> {
    let control = format!("type=unixio,clientfd={control}");
    let state = format!("backend-uri=file:///proc/self/fd/{state}");
    ["socket", "--tpm2", "--ctrl", &control, "--tpmstate", &state, "--terminate", "--seccomp", "action=kill"]
        .map(str::to_owned)
        .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_swtpm_of_another_kind_is_none() {
        let said = |features: &str| format!(r#"{{ "type": "swtpm", "features": [ {features} ], "version": "0.7.1" }}"#);
        assert!(check(&said(r#""tpm-1.2", "tpm-2.0", "cmdarg-seccomp", "nvram-backend-dir", "nvram-backend-file""#)).is_ok());
        for (features, missing) in [
            (r#""tpm-1.2", "cmdarg-seccomp", "nvram-backend-file""#, "tpm-2.0"),
            (r#""tpm-2.0", "cmdarg-seccomp", "nvram-backend-dir""#, "nvram-backend-file"),
            (r#""tpm-2.0", "nvram-backend-file""#, "cmdarg-seccomp"),
        ] {
            let refused = check(&said(features)).expect_err(missing).to_string();
            assert_eq!(refused, format!("swtpm 0.7.1 lacks {missing}"));
        }
        let later = check(&said(r#""tpm-2.0", "nvram-backend-file", "cmdarg-seccomp", "cmdarg-migration""#));
        assert!(matches!(later, Err(NoTpm::Locks { .. })), "{later:?}");
        for garbage in ["", "{}", "[]", "swtpm: unknown option"] {
            assert!(matches!(check(garbage), Err(NoTpm::Answer(_))), "{garbage}");
        }
    }
}
