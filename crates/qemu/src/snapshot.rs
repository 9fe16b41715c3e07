//! Snapshots of memory, and VMs out of them, in QEMU's terms: a background snapshot that is written to a socket, and a post-copy that comes from one.
//!
//! **A background snapshot that has begun must come to its end.** While it lasts the guest's memory is protected from writes, and QEMU takes the protection off when it has
//! written everything. One that is cancelled, or whose socket closes, leaves memory protected (7.2 and 10.0, from its source and by trial): the guest, and then QEMU itself, stand
//! still for ever. So nobody cancels one: who wants no more of it reads the socket to the end and throws away what comes. And since whoever reads can die, QEMU is given
//! the other end, too, and holds it open; root can take it from there ([`held_socket`]).
//!
//! QEMU has one migration at a time, and what it was set up for before is still set: each of these sets up what it needs and what excludes it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use godwit_model::BytesPerSec;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::process::ProcessIdentity;
use crate::qmp::commands::MigrationParameters;
use crate::qmp::views::MigrationStatus;
use crate::qmp::{Qmp, QmpError};

/// The names under which QEMU gets the two ends of the socket.
const SOCKET: &str = "godwit-snapshot";
const HELD: &str = "godwit-snapshot-held";
/// What a move has set, here or where the VM came from, and a background snapshot does not go with (`check_caps_background_snapshot` in QEMU).
const EXCLUDING: [&str; 7] =
    ["postcopy-ram", "return-path", "late-block-activate", "pause-before-switchover", "auto-converge", "multifd", "xbzrle"];
/// No limit of QEMU's own.
const UNLIMITED: BytesPerSec = BytesPerSec(1 << 40);
/// How long a snapshot whose socket was read to the end may take to be over.
const ENDING: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(2);

impl Qmp {
    /// Sets QEMU up for a background snapshot.
    ///
    /// # Errors
    /// See [`QmpError`]; so for all of these. A host, a device or a memory backend that does not allow it is refused here.
    pub async fn prepare_memory_snapshot(&self) -> Result<(), QmpError> {
        let known = self.query_migrate_capabilities().await?;
        let excluding = known.iter().filter(|known| known.state && EXCLUDING.contains(&known.capability.as_str()));
        let off: Vec<(&str, bool)> = excluding.map(|known| (known.capability.as_str(), false)).collect();
        self.set_migration_capabilities(&off).await?;
        self.set_migration_capabilities(&[("background-snapshot", true)]).await?;
        let fast = MigrationParameters { max_bandwidth: Some(UNLIMITED), ..MigrationParameters::default() };
        self.set_migration_parameters(fast).await
    }

    /// Has QEMU hold both ends of the socket to which it will write.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn hold_snapshot_socket(&self, written: OwnedFd, read: OwnedFd) -> Result<(), QmpError> {
        self.getfd(HELD, read).await?;
        self.getfd(SOCKET, written).await
    }

    /// Begins to write memory and devices to the socket: when the first pages come, all of it is of one instant, and the guest may run.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn begin_memory_snapshot(&self) -> Result<(), QmpError> {
        self.migrate_fd(SOCKET).await
    }

    /// Undoes what QEMU was set up for. A snapshot that has begun was read to its end.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn end_memory_snapshot(&self) -> Result<(), QmpError> {
        let began = Instant::now();
        while !self.migration().await?.is_final() {
            if began.elapsed() > ENDING {
                return Err(QmpError::TimedOut { command: "migrate".into(), limit: ENDING });
            }
            tokio::time::sleep(LOOK).await;
        }
        // Those that QEMU does not have are closed already.
        for name in [SOCKET, HELD] {
            let _ = self.closefd(name).await;
        }
        self.set_migration_capabilities(&[("background-snapshot", false)]).await
    }

    /// Waits for memory and devices on a socket.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn begin_restore(&self, from: UnixStream) -> Result<(), QmpError> {
        self.set_migration_capabilities(&[("postcopy-ram", true), ("return-path", true), ("events", true)]).await?;
        self.getfd(SOCKET, from.into()).await?;
        self.migrate_incoming_fd(SOCKET).await
    }

    /// Where QEMU's migration is.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn migration(&self) -> Result<MigrationStatus, QmpError> {
        self.query_migrate().await.map(|migration| migration.status())
    }
}

/// The socket of this inode that a QEMU holds; none if it holds none.
///
/// # Errors
/// The operating system's reason; it takes root.
pub fn held_socket(qemu: &ProcessIdentity, inode: u64) -> io::Result<Option<UnixStream>> {
    let wanted = format!("socket:[{inode}]");
    let is_it = |entry: &std::fs::DirEntry| std::fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == wanted.as_str());
    let found = std::fs::read_dir(format!("/proc/{}/fd", qemu.pid))?.flatten().find(is_it);
    let Some(number) = found.and_then(|entry| entry.file_name().to_str()?.parse().ok()) else { return Ok(None) };
    let pid = i32::try_from(qemu.pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let socket = pidfd_getfd(process.as_fd(), number, PidfdGetfdFlags::empty())?;
    // The number may be another's by now.
    let is_still = rustix::fs::fstat(&socket)?.st_ino == inode;
    Ok(is_still.then(|| UnixStream::from(socket)))
}
