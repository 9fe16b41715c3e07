//! The agent's hold on a carry: starts it, speaks to it, finds it again after a restart, and ends it.

use std::io::{self, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use godwit_model::{BytesPerSec, Millis};
use godwit_qemu::cage::{self, CagePlan, KeptLog, Launcher, Network, PassedFds, Profile, SpawnError, relay};
use godwit_qemu::process::{AdoptError, Exit, ProcessIdentity, QemuProcess};
use rustix::fs::MemfdFlags;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio_util::codec::{FramedRead, LinesCodec};

use super::control::{CarryConfig, CarryStatus, FromCarry, MAX_LINE, ToCarry};

/// What a carry tells its agent.
#[derive(Debug)]
pub(crate) enum CarryNotice {
    /// The status changed; read it from the client.
    Status,
    /// The other agent says this.
    Peer(Box<serde_json::value::RawValue>),
}

/// A running carry.
#[derive(Debug)]
pub(crate) struct CarryClient {
    process: Arc<QemuProcess>,
    socket: PathBuf,
    status: watch::Receiver<CarryStatus>,
    to_carry: mpsc::Sender<ToCarry>,
}

/// Why there is no carry.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CarryStartError {
    #[error("a socket for carry cannot be made")]
    Socket(#[source] io::Error),
    #[error("carry cannot be started")]
    Spawn(#[source] SpawnError),
    #[error("carry is gone")]
    Gone(#[source] AdoptError),
}

/// What a carry is started with besides its configuration.
pub(crate) struct CarryStart<'a> {
    pub(crate) launcher: &'a Launcher,
    pub(crate) uid: u32,
    pub(crate) socket: &'a Path,
    pub(crate) log: KeptLog,
}

impl CarryClient {
    /// Starts a carry. `fds` already holds what `config` refers to by number; the control socket is added.
    pub(crate) async fn start(
        start: CarryStart<'_>,
        mut config: CarryConfig,
        mut fds: PassedFds,
        notices: mpsc::Sender<CarryNotice>,
    ) -> Result<Self, CarryStartError> {
        let _ = std::fs::remove_file(start.socket);
        config.control_fd = fds.pass(UnixListener::bind(start.socket).map_err(CarryStartError::Socket)?);
        let config_fd = fds.pass(memory_file(&config).map_err(CarryStartError::Socket)?);
        let plan = CagePlan {
            uid: start.uid,
            gid: start.uid,
            // The cage is this very binary: the file may have been replaced meanwhile, and need not be reachable for the uid.
            binary: "/proc/self/exe".into(),
            arguments: vec!["carry".into(), "--config-fd".into(), config_fd.to_string()],
            working_dir: "/".into(),
            read_only: vec![],
            writable: vec![],
            // The source dials; the rest of the network is renounced once it runs, see `relay`.
            network: Network::Host,
            nodes: vec![],
            cgroup: None,
            limits: relay::limits(config.pages),
            cpus: vec![],
            keep: vec![],
            profile: Profile::Carry,
            profile_name: None,
            log: None,
        };
        let process = cage::spawn(start.launcher, plan, fds, start.log).await.map_err(CarryStartError::Spawn)?;
        Ok(Self::attach(process, start.socket.to_owned(), notices))
    }

    /// Finds a carry again after a restart of the agent.
    pub(crate) fn adopt(
        identity: &ProcessIdentity,
        socket: &Path,
        notices: mpsc::Sender<CarryNotice>,
    ) -> Result<Self, CarryStartError> {
        let process = QemuProcess::adopt(identity).map_err(|gone| {
            let _ = std::fs::remove_file(socket);
            CarryStartError::Gone(gone)
        })?;
        Ok(Self::attach(process, socket.to_owned(), notices))
    }

    fn attach(process: QemuProcess, socket: PathBuf, notices: mpsc::Sender<CarryNotice>) -> Self {
        let process = Arc::new(process);
        let (status_sender, status) = watch::channel(CarryStatus::default());
        let (to_carry, requests) = mpsc::channel(64);
        tokio::spawn(converse(Arc::clone(&process), socket.clone(), status_sender, requests, notices));
        Self { process, socket, status, to_carry }
    }

    /// What it said last. `broken` is set once it is dead.
    pub(crate) fn status(&self) -> CarryStatus {
        self.status.borrow().clone()
    }

    /// Whether the process lives.
    pub(crate) fn is_alive(&self) -> bool {
        self.process.is_alive()
    }

    /// Whether its session is not over either.
    pub(crate) fn is_usable(&self) -> bool {
        self.is_alive() && self.status.borrow().broken.is_none()
    }

    pub(crate) fn identity(&self) -> &ProcessIdentity {
        self.process.identity()
    }

    /// Says something to the other agent, if the connection takes it: facts are repeated until answered.
    pub(crate) fn tell_peer(&self, message: Box<serde_json::value::RawValue>) {
        let _ = self.to_carry.try_send(ToCarry::Peer(message));
    }

    /// The VM is about to be stopped, or stands still.
    pub(crate) fn hurry(&self) {
        let _ = self.to_carry.try_send(ToCarry::Hurry);
    }

    /// Leaves pages for after the switch from here on.
    pub(crate) fn leave(&self) {
        let _ = self.to_carry.try_send(ToCarry::Leave);
    }

    /// Of a disk: its mirror runs, and it can be read.
    pub(crate) fn begin(&self) {
        let _ = self.to_carry.try_send(ToCarry::Begin);
    }

    /// Has it read nothing from QEMU for so long, or go on with 0; the VM's own hurry overrides it.
    pub(crate) fn holder(&self) -> impl Fn(Duration) + Send + use<> {
        let to_carry = self.to_carry.clone();
        move |time| drop(to_carry.try_send(ToCarry::Hold(Millis(time.as_millis().try_into().unwrap_or(u64::MAX)))))
    }

    /// What it may take of the wire from here on. Whether it will be told.
    pub(crate) fn set_bandwidth(&self, bandwidth: Option<BytesPerSec>) -> bool {
        self.to_carry.try_send(ToCarry::Bandwidth(bandwidth)).is_ok()
    }

    /// Ends it, kindly for a moment, then surely.
    pub(crate) async fn end(self) {
        let _ = self.to_carry.try_send(ToCarry::Quit);
        if tokio::time::timeout(Duration::from_secs(2), self.process.exited()).await.is_err() {
            self.process.kill();
            self.process.exited().await;
        }
        // Nobody listens there any more.
        let _ = std::fs::remove_file(&self.socket);
    }
}

async fn converse(
    process: Arc<QemuProcess>,
    socket: PathBuf,
    status: watch::Sender<CarryStatus>,
    mut requests: mpsc::Receiver<ToCarry>,
    notices: mpsc::Sender<CarryNotice>,
) {
    let exit = tokio::select! {
        exit = process.exited() => exit,
        exit = async {
            while let Ok(stream) = UnixStream::connect(&socket).await {
                talk(stream, &status, &mut requests, &notices).await;
                if notices.is_closed() {
                    break;
                }
            }
            process.exited().await
        } => exit,
    };
    let reason = ending(exit);
    status.send_modify(|status| {
        status.connected = false;
        status.broken.get_or_insert(reason);
    });
    let _ = notices.send(CarryNotice::Status).await;
}

/// Why it is over, if it did not say so itself.
fn ending(exit: Exit) -> String {
    let killed = match exit {
        Exit::Status(status) => std::os::unix::process::ExitStatusExt::signal(&status),
        Exit::Unknown => None,
    };
    if killed == Some(libc::SIGSYS) {
        // Ours does not: somebody may have taken it over.
        tracing::error!(
            "carry made a system call that it may not make and was ended by the kernel; the kernel's audit log has its number"
        );
        return "carry was ended for a forbidden system call".to_owned();
    }
    "the carry process ended".to_owned()
}

async fn talk(
    stream: UnixStream,
    status: &watch::Sender<CarryStatus>,
    requests: &mut mpsc::Receiver<ToCarry>,
    notices: &mpsc::Sender<CarryNotice>,
) {
    let (reader, mut writer) = stream.into_split();
    let mut lines = FramedRead::new(reader, LinesCodec::new_with_max_length(MAX_LINE));
    loop {
        tokio::select! {
            line = lines.next() => {
                let Some(Ok(line)) = line else { return };
                let notice = match serde_json::from_str(&line) {
                    Ok(FromCarry::Status(new)) => {
                        status.send_replace(*new);
                        CarryNotice::Status
                    }
                    Ok(FromCarry::Peer(message)) => CarryNotice::Peer(message),
                    Err(error) => {
                        tracing::warn!(%error, "carry said something that is not its language");
                        return;
                    }
                };
                if notices.send(notice).await.is_err() {
                    return;
                }
            }
            request = requests.recv() => {
                let Some(request) = request else { return };
                let mut text = serde_json::to_vec(&request).expect("our own types serialise");
                text.push(b'\n');
                if writer.write_all(&text).await.is_err() {
                    return;
                }
            }
        }
    }
}

fn memory_file(config: &CarryConfig) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create("godwit-carry-config", MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(fd);
    file.write_all(&serde_json::to_vec(config)?)?;
    file.rewind()?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::*;

    #[test]
    fn a_carry_that_was_ended_for_a_forbidden_call_is_told_from_others() {
        assert!(ending(Exit::Status(ExitStatus::from_raw(libc::SIGSYS))).contains("forbidden"));
        for other in [Exit::Unknown, Exit::Status(ExitStatus::from_raw(libc::SIGKILL)), Exit::Status(ExitStatus::from_raw(256))] {
            assert_eq!(ending(other), "the carry process ended");
        }
    }
}
