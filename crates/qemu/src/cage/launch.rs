//! The agent's side: starts the hidden subcommand with its plan and descriptors, and hears whether QEMU was executed.

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use rustix::fs::MemfdFlags;
use rustix::pipe::PipeFlags;
use tokio::io::AsyncReadExt;

use super::{CagePlan, PassedFds};
use crate::process::{AdoptError, QemuProcess};

const PLAN_FD: i32 = 3;
const STATUS_FD: i32 = 4;

/// Time for the cage to reach QEMU. It does nothing that waits for anybody.
const LIMIT: Duration = Duration::from_secs(30);

/// Longest reason that is read from the status pipe.
const MAX_REASON: u64 = 4_096;

/// How to run the hidden subcommand: normally our own binary with `cage`. `--plan-fd N --status-fd N` follow.
#[derive(Clone, Debug)]
pub struct Launcher {
    /// The binary.
    pub program: PathBuf,
    /// What comes before the descriptors.
    pub arguments: Vec<OsString>,
}

impl Launcher {
    /// `PROGRAM cage`.
    #[must_use]
    pub fn godwit(program: PathBuf) -> Self {
        Self { program, arguments: vec!["cage".into()] }
    }
}

/// Why a QEMU was not started. No process is left.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// Our own binary could not be started, or its pipes not made.
    #[error("cannot start the cage")]
    Start(#[source] io::Error),
    /// The cage said why it did not reach QEMU.
    #[error("the cage failed: {0}")]
    Cage(String),
    /// The process went away at once.
    #[error("cannot watch the new process")]
    Watch(#[source] AdoptError),
    /// The cage hung and was killed.
    #[error("the cage did not reach QEMU within {0:?}")]
    TimedOut(Duration),
}

/// Starts `plan` in a cage with `fds` and nothing else; standard output and error go to `log`. Returns when QEMU has been executed, which
/// says nothing about whether it likes its arguments.
///
/// The caller must await [`QemuProcess::exited`] some time, or a zombie stays.
///
/// # Errors
/// See [`SpawnError`].
pub async fn spawn(launcher: &Launcher, mut plan: CagePlan, fds: PassedFds, log: OwnedFd) -> Result<QemuProcess, SpawnError> {
    plan.keep = fds.fds.iter().map(|(number, _)| *number).collect();
    let (status, status_writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|errno| SpawnError::Start(errno.into()))?;
    let plan_fd = memory_file(&plan).map_err(SpawnError::Start)?;
    let mut mappings: Vec<FdMapping> = fds.fds.into_iter().map(|(child_fd, parent_fd)| FdMapping { parent_fd, child_fd }).collect();
    mappings.push(FdMapping { parent_fd: plan_fd, child_fd: PLAN_FD });
    mappings.push(FdMapping { parent_fd: status_writer, child_fd: STATUS_FD });
    let process = {
        let mut command = Command::new(&launcher.program);
        command.args(&launcher.arguments);
        command.args(["--plan-fd", &PLAN_FD.to_string(), "--status-fd", &STATUS_FD.to_string()]);
        command.stdin(Stdio::null()).stdout(log.try_clone().map_err(SpawnError::Start)?).stderr(log);
        command.fd_mappings(mappings).map_err(|collision| SpawnError::Start(io::Error::other(collision)))?;
        let child = command.spawn().map_err(SpawnError::Start)?;
        // The command, and with it our copies of the descriptors, ends here.
        QemuProcess::from_child(child.id()).map_err(SpawnError::Watch)?
    };
    let outcome = match tokio::time::timeout(LIMIT, reason(status)).await {
        Ok(Ok(reason)) if reason.is_empty() => return Ok(process),
        Ok(Ok(reason)) => SpawnError::Cage(reason),
        Ok(Err(error)) => SpawnError::Start(error),
        Err(_) => SpawnError::TimedOut(LIMIT),
    };
    process.kill();
    process.exited().await;
    Err(outcome)
}

/// Reads the status pipe to its end: empty when the exec closed it.
async fn reason(status: OwnedFd) -> io::Result<String> {
    let mut text = Vec::new();
    tokio::net::unix::pipe::Receiver::from_owned_fd(status)?.take(MAX_REASON).read_to_end(&mut text).await?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn memory_file(plan: &CagePlan) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create("godwit-cage-plan", MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(fd);
    file.write_all(&serde_json::to_vec(plan)?)?;
    Ok(file.into())
}
