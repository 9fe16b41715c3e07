//! Snapshots of memory, and VMs out of them, in QEMU's terms: a background snapshot that is written to a socket, and a post-copy that comes from one.
//!
//! QEMU has one migration at a time, and what it was set up for before is still set: each of these sets up what it needs and what excludes it.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use godwit_model::BytesPerSec;

use crate::qmp::commands::MigrationParameters;
use crate::qmp::views::MigrationStatus;
use crate::qmp::{Qmp, QmpError};

/// The name under which QEMU gets the socket.
const SOCKET: &str = "godwit-snapshot";
/// No limit of QEMU's own.
const UNLIMITED: BytesPerSec = BytesPerSec(1 << 40);
/// How long a migration that is told to end may take.
const ENDING: Duration = Duration::from_secs(10);
/// How long the first step of a snapshot may take: it touches all of the guest's memory.
const FIRST_STEP: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(2);

impl Qmp {
    /// Sets QEMU up for a background snapshot and has it do, while the guest runs, what takes it long the first time: a snapshot that is thrown away, to a socket
    /// that nobody reads.
    ///
    /// # Errors
    /// See [`QmpError`]; so for all of these. A host, a device or a memory backend that does not allow it is refused here.
    pub async fn prepare_memory_snapshot(&self, unread: UnixStream) -> Result<(), QmpError> {
        self.set_migration_capabilities(&[("postcopy-ram", false), ("return-path", false)]).await?;
        self.set_migration_capabilities(&[("background-snapshot", true)]).await?;
        let fast = MigrationParameters { max_bandwidth: Some(UNLIMITED), ..MigrationParameters::default() };
        self.set_migration_parameters(fast).await?;
        self.begin_memory_snapshot(unread).await?;
        // It has done its first step when it writes pages; what it writes before that fits the socket.
        let began = Instant::now();
        while matches!(self.migration().await?, MigrationStatus::Idle | MigrationStatus::Setup) && began.elapsed() < FIRST_STEP {
            tokio::time::sleep(LOOK).await;
        }
        self.end_migration().await
    }

    /// Begins to write memory and devices to a socket: when the first pages come, all of it is of one instant, and the guest may run.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn begin_memory_snapshot(&self, to: UnixStream) -> Result<(), QmpError> {
        self.getfd(SOCKET, to.into()).await?;
        self.migrate_fd(SOCKET).await
    }

    /// Ends a snapshot, wherever it stands, and what QEMU was set up for.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn end_memory_snapshot(&self) -> Result<(), QmpError> {
        self.end_migration().await?;
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

    async fn end_migration(&self) -> Result<(), QmpError> {
        let began = Instant::now();
        loop {
            match self.migration().await? {
                status if status.is_final() => return Ok(()),
                MigrationStatus::Cancelling => {}
                // One that has just ended by itself refuses.
                _ => drop(self.migrate_cancel().await),
            }
            if began.elapsed() > ENDING {
                return Err(QmpError::TimedOut { command: "migrate_cancel".into(), limit: ENDING });
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}
