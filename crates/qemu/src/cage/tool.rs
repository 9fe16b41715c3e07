//! Programs that run in a cage for a moment, such as `qemu-img`: with the descriptors that they are given, no file system but the system's
//! own, no network, and a limit on memory and time.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use godwit_model::{Bytes, hostile};
use rustix::pipe::PipeFlags;
use tokio::io::AsyncReadExt;

use super::{CagePlan, Launcher, Limit, LimitedResource, Network, PassedFds, Profile, SpawnError, spawn};
use crate::process::{Exit, KillOnDrop};

/// What is kept of what a tool says, in bytes.
const MAX_SAID: usize = 4_096;

/// A program with what it may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tool {
    /// The program's file.
    pub program: PathBuf,
    /// Its arguments; passed descriptors are `/proc/self/fd/N`.
    pub arguments: Vec<String>,
    /// As whom; not 0.
    pub uid: u32,
    /// Likewise.
    pub gid: u32,
    /// Most memory that it may map.
    pub memory: Bytes,
    /// Time after which it is killed.
    pub time: Duration,
}

/// Address space for `qemu-img`. On slow storage it has up to 64 threads, each with a stack and an arena of its own: reserved, and hardly used.
pub const QEMU_IMG_SPACE: Bytes = Bytes(8 << 30);

/// Why a tool did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It was not started.
    #[error("{} was not started", program.display())]
    Start {
        /// What.
        program: PathBuf,
        /// Why.
        #[source]
        source: SpawnError,
    },
    /// It took too long and was killed.
    #[error("{} took longer than {limit:?} and was ended", program.display())]
    TimedOut {
        /// What.
        program: PathBuf,
        /// The time it had.
        limit: Duration,
    },
    /// It ended with an error; `said` is what it wrote, made harmless.
    #[error("{} ended with {status}: {said}", program.display())]
    Failed {
        /// What.
        program: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote.
        said: String,
    },
    /// It ended, and nobody knows how.
    #[error("how {} ended is not known", program.display())]
    Unknown {
        /// What.
        program: PathBuf,
    },
}

/// Runs `tool` with `fds` to its end. Killed when this is dropped.
///
/// # Errors
/// See [`ToolError`].
pub async fn run(launcher: &Launcher, tool: &Tool, fds: PassedFds) -> Result<(), ToolError> {
    ask(launcher, tool, fds).await.map(drop)
}

/// As [`run`]; answers what it wrote, as it is, but no more than the beginning.
///
/// # Errors
/// See [`ToolError`].
pub async fn ask(launcher: &Launcher, tool: &Tool, fds: PassedFds) -> Result<String, ToolError> {
    let program = || tool.program.clone();
    let running = async {
        let (said, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|errno| SpawnError::Start(errno.into()))?;
        let process = KillOnDrop::new(spawn(launcher, plan(tool), fds, writer).await?);
        let said = read(said).await;
        Ok((process.exited().await, said))
    };
    match tokio::time::timeout(tool.time, running).await {
        Err(_) => Err(ToolError::TimedOut { program: program(), limit: tool.time }),
        Ok(Err(source)) => Err(ToolError::Start { program: program(), source }),
        Ok(Ok((Exit::Status(status), said))) if status.success() => Ok(said),
        Ok(Ok((Exit::Status(status), said))) => {
            Err(ToolError::Failed { program: program(), status, said: hostile::bounded(&said, hostile::SENTENCE) })
        }
        Ok(Ok((Exit::Unknown, _))) => Err(ToolError::Unknown { program: program() }),
    }
}

fn plan(tool: &Tool) -> CagePlan {
    let limits = [(LimitedResource::LockedMemory, 0), (LimitedResource::AddressSpace, tool.memory.get())];
    bare_plan(tool.program.clone(), tool.arguments.clone(), (tool.uid, tool.gid), &limits)
}

/// A program with nothing of the host but the system's own files, no network, no core, a few descriptors, and within `limits`.
pub(crate) fn bare_plan(
    binary: PathBuf,
    arguments: Vec<String>,
    (uid, gid): (u32, u32),
    limits: &[(LimitedResource, u64)],
) -> CagePlan {
    let standing = [(LimitedResource::Core, 0), (LimitedResource::OpenFiles, 64)];
    CagePlan {
        uid,
        gid,
        binary,
        arguments,
        working_dir: "/".into(),
        read_only: vec![],
        writable: vec![],
        network: Network::Empty,
        nodes: vec![],
        cgroup: None,
        limits: standing.iter().chain(limits).map(|(resource, value)| Limit { resource: *resource, value: *value }).collect(),
        cpus: vec![],
        keep: vec![],
        profile: Profile::Tool,
        profile_name: None,
        log: None,
    }
}

/// All that it says is taken from the pipe, so that it never waits; the beginning is kept.
async fn read(said: OwnedFd) -> String {
    let Ok(mut pipe) = tokio::net::unix::pipe::Receiver::from_owned_fd(said) else { return String::new() };
    let (mut kept, mut piece) = (Vec::new(), vec![0; MAX_SAID]);
    while let Ok(count @ 1..) = pipe.read(&mut piece).await {
        let room = MAX_SAID - kept.len();
        kept.extend_from_slice(piece.get(..count.min(room)).unwrap_or_default());
    }
    String::from_utf8_lossy(&kept).trim().to_owned()
}

/// Where `PATH` has a program.
#[must_use]
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| Path::is_file(file))
}
