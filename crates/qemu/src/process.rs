//! A QEMU process: watched and killed through its pidfd, so that a recycled pid is never mistaken for it; adopted after a restart of ours
//! by pid, start time and boot.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

/// What names one process for ever: to be kept in a journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: u32,
    /// When it started, in clock ticks since the boot.
    pub start_time: u64,
    /// Which boot.
    pub boot: String,
}

impl ProcessIdentity {
    /// Whether it was started since the machine came up. Not to be told counts as yes.
    #[must_use]
    pub fn is_of_this_boot(&self) -> bool {
        boot(self.pid).map_or(true, |boot| boot == self.boot)
    }
}

/// Why a process cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// It is gone: no such process, or the pid, or the whole machine, began a new life.
    #[error("process {0} has ended")]
    Gone(u32),
    /// The operating system refused.
    #[error("cannot watch process {pid}")]
    Watch {
        /// Which.
        pid: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It was our child.
    Status(ExitStatus),
    /// It was adopted: only its end is known.
    Unknown,
}

/// A running, or ended, QEMU.
#[derive(Debug)]
pub struct QemuProcess {
    identity: ProcessIdentity,
    pidfd: Arc<OwnedFd>,
    exit: Mutex<Option<Exit>>,
}

impl QemuProcess {
    /// Watches a child of this process that was not waited for yet.
    ///
    /// # Errors
    /// See [`AdoptError`].
    pub fn from_child(pid: u32) -> Result<Self, AdoptError> {
        // A child that was not waited for keeps its pid, so this cannot be another process.
        let pidfd = Arc::new(open(pid)?);
        let identity = ProcessIdentity { pid, start_time: start_time(pid)?, boot: boot(pid)? };
        Ok(Self { identity, pidfd, exit: Mutex::new(None) })
    }

    /// Watches the process of an earlier life of ours.
    ///
    /// # Errors
    /// See [`AdoptError`]; [`AdoptError::Gone`] is certain.
    pub fn adopt(identity: &ProcessIdentity) -> Result<Self, AdoptError> {
        let pid = identity.pid;
        // First the pidfd, then the comparison: what is compared is then what is held.
        let pidfd = Arc::new(open(pid)?);
        let process = Self { identity: identity.clone(), pidfd, exit: Mutex::new(None) };
        let same = boot(pid)? == identity.boot && start_time(pid)? == identity.start_time;
        if same && process.is_alive() { Ok(process) } else { Err(AdoptError::Gone(pid)) }
    }

    /// What names it.
    #[must_use]
    pub const fn identity(&self) -> &ProcessIdentity {
        &self.identity
    }

    /// Whether it has not ended.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let mut fds = [rustix::event::PollFd::new(&*self.pidfd, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        // Only the kernel's word that it has ended counts; a call that failed says nothing.
        !matches!(rustix::event::poll(&mut fds, Some(&now)), Ok(ready) if ready > 0)
    }

    /// A descriptor of the process.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn pidfd(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }

    /// Kills it, without asking. That it has ended already is no error.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// Sends a signal, for tests and for stopping what must not go on.
    pub fn signal(&self, signal: Signal) {
        if let Err(errno) = rustix::process::pidfd_send_signal(&*self.pidfd, signal)
            && errno != rustix::io::Errno::SRCH
        {
            tracing::error!(pid = self.identity.pid, %errno, "cannot signal QEMU");
        }
    }

    /// Waits for its end and, if it is our child, takes its status so that no zombie stays. Any number of callers, any number of times.
    pub async fn exited(&self) -> Exit {
        match self.pidfd.try_clone().and_then(register) {
            Ok(pidfd) => drop(pidfd.readable().await),
            Err(error) => {
                // Out of descriptors: a thread can still wait.
                tracing::warn!(%error, "cannot watch a pidfd, waits in a thread");
                let pidfd = Arc::clone(&self.pidfd);
                let _ = tokio::task::spawn_blocking(move || wait_in_thread(&pidfd)).await;
            }
        }
        self.reap()
    }

    fn reap(&self) -> Exit {
        let mut exit = self.exit.lock().unwrap_or_else(PoisonError::into_inner);
        *exit.get_or_insert_with(|| {
            let waited = rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
            let status = waited.ok().flatten().and_then(|status| match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Some((code & 0xff) << 8),
                (None, signal) => signal,
            });
            status.map_or(Exit::Unknown, |raw| Exit::Status(ExitStatus::from_raw(raw)))
        })
    }
}

/// Kills the process when it is dropped, and reaps it.
#[derive(Debug)]
pub struct KillOnDrop(Option<QemuProcess>);

impl KillOnDrop {
    /// Kills it from now on.
    #[must_use]
    pub const fn new(process: QemuProcess) -> Self {
        Self(Some(process))
    }

    /// Lets it live.
    ///
    /// # Panics
    /// Never: it is there until this is consumed.
    pub fn keep(mut self) -> QemuProcess {
        self.0.take().expect("taken by what consumes it only")
    }

    /// Waits for its end without killing it; killed if that is given up.
    pub(crate) async fn exited(&self) -> Exit {
        match &self.0 {
            Some(process) => process.exited().await,
            None => Exit::Unknown,
        }
    }

    /// Kills it and waits for its end.
    pub(crate) async fn end(self) {
        let process = self.keep();
        process.kill();
        process.exited().await;
    }
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(process) = self.0.take() {
            process.kill();
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn(async move { process.exited().await });
            }
        }
    }
}

#[expect(unsafe_code, reason = "tokio cannot know that a descriptor stays what it is")]
fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the owned descriptor moves into the `AsyncFd`, which is only ever awaited and dropped.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

fn wait_in_thread(pidfd: &OwnedFd) {
    let mut fds = [rustix::event::PollFd::new(pidfd, rustix::event::PollFlags::IN)];
    while let Err(rustix::io::Errno::INTR) = rustix::event::poll(&mut fds, None) {}
}

fn open(pid: u32) -> Result<OwnedFd, AdoptError> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(AdoptError::Gone(pid))?;
    match rustix::process::pidfd_open(raw, PidfdFlags::empty()) {
        Ok(pidfd) => Ok(pidfd),
        Err(rustix::io::Errno::SRCH) => Err(AdoptError::Gone(pid)),
        Err(errno) => Err(AdoptError::Watch { pid, source: errno.into() }),
    }
}

/// Field 22 of `/proc/PID/stat`; the name in field 2 may contain anything, so counting begins after its last parenthesis.
fn start_time(pid: u32) -> Result<u64, AdoptError> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => AdoptError::Gone(pid),
        _ => AdoptError::Watch { pid, source },
    })?;
    let after_name = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    after_name.split_whitespace().nth(19).and_then(|field| field.parse().ok()).ok_or_else(|| AdoptError::Watch {
        pid,
        source: io::Error::new(io::ErrorKind::InvalidData, "/proc/PID/stat is not what it should be"),
    })
}

fn boot(pid: u32) -> Result<String, AdoptError> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| text.trim().to_owned())
        .map_err(|source| AdoptError::Watch { pid, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_child_is_watched_killed_and_reaped() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().expect("sleep");
        let process = QemuProcess::from_child(child.id()).expect("watched");
        let again = QemuProcess::adopt(process.identity()).expect("adopted");
        assert!(process.is_alive());
        process.kill();
        assert_eq!(process.exited().await, Exit::Status(ExitStatus::from_raw(9)));
        assert_eq!(process.exited().await, Exit::Status(ExitStatus::from_raw(9)), "the status stays known");
        assert_eq!(again.exited().await, Exit::Unknown);
        assert!(matches!(QemuProcess::adopt(process.identity()), Err(AdoptError::Gone(_))));
        process.kill();
        assert!(child.wait().is_err(), "no zombie is left");
    }

    #[tokio::test]
    async fn a_recycled_pid_is_not_adopted() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().expect("sleep");
        let process = QemuProcess::from_child(child.id()).expect("watched");
        for changed in [
            ProcessIdentity { start_time: process.identity().start_time + 1, ..process.identity().clone() },
            ProcessIdentity { boot: "another".into(), ..process.identity().clone() },
        ] {
            assert!(matches!(QemuProcess::adopt(&changed), Err(AdoptError::Gone(_))));
        }
        child.kill().expect("killed");
        child.wait().expect("waited");
    }

    #[tokio::test]
    async fn an_exit_status_is_that_of_the_program() {
        let mut child = std::process::Command::new("sh").args(["-c", "exit 7"]).spawn().expect("sh");
        let process = QemuProcess::from_child(child.id()).expect("watched");
        assert!(matches!(process.exited().await, Exit::Status(status) if status.code() == Some(7)));
        assert!(child.wait().is_err(), "no zombie is left");
    }
}
