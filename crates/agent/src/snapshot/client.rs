//! The agent's hold on a vault worker.

use std::io::{self, IoSlice, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;

use futures::StreamExt;
use godwit_model::{Bytes, ErrorCode, Refusal, Retry};
use godwit_qemu::cage::{self, CagePlan, Limit, LimitedResource, Network, PassedFds, Profile};
use godwit_qemu::process::KillOnDrop;
use rustix::fs::MemfdFlags;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::net::UnixStream;
use tokio_util::codec::{FramedRead, LinesCodec};

use super::control::{Job, MAX_LINE, Said, WorkerConfig};
use crate::host::{Host, host_failed};

/// What a worker may map: what it knows of earlier snapshots takes most.
const SPACE: Bytes = Bytes(8 << 30);

/// A worker. It ends with this, unless it outlives it.
pub(crate) struct Worker {
    /// None if it outlives this.
    process: Option<KillOnDrop>,
    lines: Lines,
    disks: StdUnixStream,
}

impl Worker {
    /// Starts one on a vault's directory, if it needs one. `fds` already holds what `job` refers to by number.
    pub(crate) async fn start(
        host: &Host,
        vault: impl Into<Option<OwnedFd>>,
        job: Job,
        mut fds: PassedFds,
    ) -> Result<Self, Refusal> {
        let failed = |error: io::Error| host_failed("the vault worker could not be started", &error);
        let (control, theirs) = StdUnixStream::pair().map_err(failed)?;
        let (disks, their_disks) = StdUnixStream::pair().map_err(failed)?;
        let vault_fd = vault.into().map(|vault| fds.pass(vault));
        let config = WorkerConfig { control_fd: fds.pass(theirs), disks_fd: fds.pass(their_disks), vault_fd, job };
        let config_fd = fds.pass(memory_file(&config).map_err(failed)?);
        let limit = |resource, value| Limit { resource, value };
        let uid = host.vault_uid();
        let plan = CagePlan {
            uid,
            gid: uid,
            binary: "/proc/self/exe".into(),
            arguments: vec!["vault-worker".into(), "--config-fd".into(), config_fd.to_string()],
            working_dir: "/".into(),
            read_only: vec![],
            writable: vec![],
            network: Network::Empty,
            nodes: vec![],
            cgroup: None,
            limits: vec![
                limit(LimitedResource::Core, 0),
                limit(LimitedResource::LockedMemory, 0),
                limit(LimitedResource::AddressSpace, SPACE.get()),
            ],
            cpus: vec![],
            keep: vec![],
            profile: Profile::Vault,
            profile_name: None,
            log: None,
        };
        let log = host.log("vault").map_err(failed)?;
        let process = cage::spawn(&host.launcher, plan, fds, log).await;
        let process = process.map_err(|error| host_failed("the vault worker could not be started", &error))?;
        control.set_nonblocking(true).map_err(failed)?;
        let control = UnixStream::from_std(control).map_err(failed)?;
        let lines = Lines(FramedRead::new(control, LinesCodec::new_with_max_length(MAX_LINE)));
        Ok(Self { process: Some(KillOnDrop::new(process)), lines, disks })
    }

    /// What it says next.
    pub(crate) async fn hear(&mut self) -> Result<Said, Refusal> {
        self.lines.hear().await
    }

    /// Hears until it is done; what it tells then.
    pub(crate) async fn done(&mut self) -> Result<serde_json::Value, Refusal> {
        self.lines.done().await
    }

    /// Gives it the connection to its next disk.
    pub(crate) fn pass_disk(&self, socket: &StdUnixStream) -> Result<(), Refusal> {
        let fds = [socket.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let sent = rustix::net::sendmsg(&self.disks, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL);
        sent.map(drop).map_err(|error| host_failed("the vault worker does not take a disk", &io::Error::from(error)))
    }

    /// It ends by itself when it is done, whatever becomes of this and of the agent.
    pub(crate) fn outlive(&mut self) {
        self.process.take().map(KillOnDrop::keep);
    }

    /// The same; what it says.
    pub(crate) fn let_go(mut self) -> Lines {
        self.outlive();
        self.lines
    }
}

/// What a worker says.
pub(crate) struct Lines(FramedRead<UnixStream, LinesCodec>);

impl Lines {
    async fn hear(&mut self) -> Result<Said, Refusal> {
        let said = self.0.next().await.and_then(Result::ok).and_then(|line| serde_json::from_str(&line).ok());
        match said {
            Some(Said::Failed { code, message }) => Err(refused(code, message)),
            Some(said) => Ok(said),
            None => Err(Refusal::new(ErrorCode::HostFailed, "the vault worker ended before it was done")
                .hint("look at the host's vault log")
                .retry(Retry::Safe)),
        }
    }

    /// Hears until the worker is done; what it tells then.
    pub(crate) async fn done(&mut self) -> Result<serde_json::Value, Refusal> {
        loop {
            if let Said::Done(told) = self.hear().await? {
                return Ok(told);
            }
        }
    }
}

/// What a worker could not do.
fn refused(code: ErrorCode, message: String) -> Refusal {
    let refusal = Refusal::new(code, message);
    match code {
        ErrorCode::NotEnoughSpace => {
            refusal.hint("free space in the pool: `godwit vault prune` shows what nobody refers to").retry(Retry::Safe)
        }
        ErrorCode::SnapshotDamaged => refusal.hint("`godwit vault verify` says what else is damaged; use another snapshot"),
        ErrorCode::SnapshotInvalid => {
            refusal.hint("bring the files of an export as they were written; docs/spec/export.md says what each must be")
        }
        ErrorCode::RevisionConflict => refusal.hint("look at the plan as it is now"),
        ErrorCode::VmBusy => refusal.hint("try again in a moment").retry(Retry::Safe),
        _ => refusal,
    }
}

fn memory_file(config: &WorkerConfig) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create("godwit-vault-worker", MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(fd);
    file.write_all(&serde_json::to_vec(config)?)?;
    file.rewind()?;
    Ok(file.into())
}
