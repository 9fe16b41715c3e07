//! The agent's side: starts the hidden subcommand with its plan and descriptors, and hears whether QEMU was executed.

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use godwit_model::hostile;
use rustix::fs::MemfdFlags;
use rustix::pipe::PipeFlags;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};

use super::apparmor::Loaded;
use super::{CagePlan, KeptLog, LogPlan, PassedFds};
use crate::process::{AdoptError, KillOnDrop, QemuProcess};

const PLAN_FD: i32 = 3;
const STATUS_FD: i32 = 4;
const CURRENT_LOG_FD: i32 = 5;
const OLDER_LOG_FD: i32 = 6;

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
    /// The AppArmor profiles that what it starts must enter; none where the kernel enforces none.
    pub profiles: Option<Loaded>,
}

impl Launcher {
    /// `PROGRAM cage`.
    #[must_use]
    pub fn godwit(program: PathBuf) -> Self {
        Self { program, arguments: vec!["cage".into()], profiles: None }
    }

    /// The same with AppArmor profiles.
    #[must_use]
    pub fn with_profiles(self, profiles: Option<Loaded>) -> Self {
        Self { profiles, ..self }
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

/// Where a program's standard output and error go.
#[derive(Debug)]
pub enum Output {
    /// There, as it is and without a bound: for what is bounded by itself.
    Direct(OwnedFd),
    /// Through a keeper, which bounds it and makes it harmless.
    Kept(KeptLog),
}

impl From<OwnedFd> for Output {
    fn from(fd: OwnedFd) -> Self {
        Self::Direct(fd)
    }
}

impl From<KeptLog> for Output {
    fn from(log: KeptLog) -> Self {
        Self::Kept(log)
    }
}

/// Starts `plan` in a cage with `fds` and nothing else. Returns when QEMU has been executed, which says nothing about whether it likes its
/// arguments.
///
/// The caller must await [`QemuProcess::exited`] some time, or a zombie stays.
///
/// # Errors
/// See [`SpawnError`].
pub async fn spawn(
    launcher: &Launcher,
    mut plan: CagePlan,
    fds: PassedFds,
    output: impl Into<Output>,
) -> Result<QemuProcess, SpawnError> {
    plan.profile_name = launcher.profiles.as_ref().map(|profiles| profiles.name_of(plan.profile));
    plan.keep = fds.fds.iter().map(|(number, _)| *number).collect();
    let mut mappings: Vec<FdMapping> = fds.fds.into_iter().map(|(child_fd, parent_fd)| FdMapping { parent_fd, child_fd }).collect();
    let said = match output.into() {
        Output::Direct(said) => {
            plan.log = None;
            said
        }
        Output::Kept(KeptLog { current, older, limit }) => {
            plan.log = Some(LogPlan { current: CURRENT_LOG_FD, older: OLDER_LOG_FD, limit });
            mappings.push(FdMapping { parent_fd: older, child_fd: OLDER_LOG_FD });
            mappings.push(FdMapping { parent_fd: current.try_clone().map_err(SpawnError::Start)?, child_fd: CURRENT_LOG_FD });
            current
        }
    };
    let (status, status_writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|errno| SpawnError::Start(errno.into()))?;
    let plan_fd = memory_file(&plan).map_err(SpawnError::Start)?;
    mappings.push(FdMapping { parent_fd: plan_fd, child_fd: PLAN_FD });
    mappings.push(FdMapping { parent_fd: status_writer, child_fd: STATUS_FD });
    let cage = {
        let mut command = Command::new(&launcher.program);
        command.args(&launcher.arguments);
        command.args(["--plan-fd", &PLAN_FD.to_string(), "--status-fd", &STATUS_FD.to_string()]);
        command.stdin(Stdio::null()).stdout(said.try_clone().map_err(SpawnError::Start)?).stderr(said);
        command.fd_mappings(mappings).map_err(|collision| SpawnError::Start(io::Error::other(collision)))?;
        let child = command.spawn().map_err(SpawnError::Start)?;
        // The command, and with it our copies of the descriptors, ends here.
        QemuProcess::from_child(child.id()).map_err(SpawnError::Watch)?
    };
    let (cage, mut process) = (KillOnDrop::new(cage), None);
    let outcome = match tokio::time::timeout(LIMIT, follow(status, &mut process)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(SpawnError::TimedOut(LIMIT)),
    };
    match (outcome, process) {
        (Ok(()), Some(process)) => {
            // It stays as long as the log is kept, and ends by itself.
            let cage = cage.keep();
            tokio::spawn(async move { cage.exited().await });
            Ok(process.keep())
        }
        (outcome, process) => {
            if let Some(process) = process {
                process.end().await;
            }
            cage.end().await;
            Err(outcome.err().unwrap_or_else(|| SpawnError::Cage("it ended without a word".to_owned())))
        }
    }
}

/// Reads the status pipe to its end: the pid of the new process, and nothing more when the exec closed it.
async fn follow(status: OwnedFd, process: &mut Option<KillOnDrop>) -> Result<(), SpawnError> {
    let pipe = tokio::net::unix::pipe::Receiver::from_owned_fd(status).map_err(SpawnError::Start)?;
    let mut pipe = BufReader::new(pipe.take(MAX_REASON));
    let mut text = Vec::new();
    pipe.read_until(b'\n', &mut text).await.map_err(SpawnError::Start)?;
    if let Some(pid) = pid_of(&text) {
        // A child that was not waited for keeps its pid, and nobody but us waits for it.
        *process = Some(KillOnDrop::new(QemuProcess::from_child(pid).map_err(SpawnError::Watch)?));
        text.clear();
    }
    pipe.read_to_end(&mut text).await.map_err(SpawnError::Start)?;
    if text.is_empty() {
        Ok(())
    } else {
        Err(SpawnError::Cage(hostile::bounded(&String::from_utf8_lossy(&text), hostile::SENTENCE)))
    }
}

fn pid_of(line: &[u8]) -> Option<u32> {
    str::from_utf8(line).ok()?.strip_suffix('\n')?.parse().ok()
}

fn memory_file(plan: &CagePlan) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create("godwit-cage-plan", MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(fd);
    file.write_all(&serde_json::to_vec(plan)?)?;
    Ok(file.into())
}
