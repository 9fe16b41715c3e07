//! A VM that runs while its memory still comes out of a snapshot outlives whoever plays it.
//!
//! ```text
//! a worker plays ───────────────────────────────▶ QEMU has all memory
//!    │ it is gone, or cannot                          ▲
//!    ▼                                                │ plays on
//! another opens the snapshot ─▶ QEMU gets its connection, and says what it has
//!    │ too often, or the snapshot is damaged
//!    ▼
//! the VM is ended, and can be had out of the snapshot once more
//! ```
//! QEMU's main loop may be what waits for a page, and then takes no connection: it has one beforehand, and is told to use it out of band.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use godwit_model::{ErrorCode, Refusal, Retry};
use godwit_qemu::PassedFds;
use godwit_qemu::process::QemuProcess;
use godwit_qemu::qmp::views::MigrationStatus;
use godwit_qemu::qmp::{Qmp, QmpError};

use super::actor::qemu_failed;
use crate::host::{SharedHost, host_failed};
use crate::snapshot::{FromSnapshot, Job, Said, Worker};

/// How long is waited before each try to play on.
pub(super) const PAUSES: [Duration; 5] =
    [Duration::ZERO, Duration::from_millis(250), Duration::from_secs(1), Duration::from_secs(3), Duration::from_secs(10)];
/// How long QEMU may take to notice that its connection is gone, to say where it is, and to say what it has.
const NOTICING: Duration = Duration::from_secs(5);
const ANSWERING: Duration = Duration::from_secs(1);
const RESUMING: Duration = Duration::from_secs(30);
/// How long a snapshot may take to be opened: of a large one some MB are read, from wherever its pool is.
const OPENING: Duration = Duration::from_secs(120);
/// How long a QEMU that closes its connection may take to end.
const ENDING: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(20);
/// How often is looked where a QEMU is whose worker is not heard.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// The name under which QEMU has a connection in case.
const SPARE_FD: &str = "godwit-snapshot-spare";

/// What sees to it.
pub(super) struct Playing {
    pub(super) host: SharedHost,
    pub(super) process: Arc<QemuProcess>,
    pub(super) qmp: Qmp,
    pub(super) from: FromSnapshot,
    pub(super) reason: EndReason,
    /// Our end of a connection that QEMU has in case. Nothing was written to it.
    pub(super) spare: Option<UnixStream>,
}

impl Playing {
    /// Returns when the VM has all of its memory, or has ended. The worker of an agent that is no more is not heard: then QEMU says whether it is still there.
    pub(super) async fn see_to_the_end(mut self, player: Option<Worker>) {
        let mut played = match player {
            Some(player) => self.hear_out(player).await,
            None => self.watch().await,
        };
        for pause in PAUSES {
            let failed = match &played {
                Ok(()) => break,
                Err(failed) => failed,
            };
            if self.is_over().await {
                return self.give_back().await;
            }
            if is_for_good(failed) {
                break;
            }
            tracing::warn!(failed = failed.message, "memory comes out of the snapshot no more: another worker plays on");
            tokio::time::sleep(pause).await;
            played = match self.play_on().await {
                Ok(player) => self.hear_out(player).await,
                Err(refusal) => Err(refusal),
            };
        }
        match played {
            Ok(()) => {
                tracing::info!("all memory has come out of the snapshot");
                self.give_back().await;
            }
            Err(failed) if !self.is_over().await => self.end(&failed),
            Err(_) => self.give_back().await,
        }
    }

    /// The connection in case is of no use any more.
    async fn give_back(&self) {
        if !self.process.is_alive() {
            return;
        }
        self.reason.set(String::new());
        if self.spare.is_some() {
            let _ = self.qmp.closefd(SPARE_FD).await;
        }
    }

    /// A VM whose memory cannot come any more waits for ever where it touches it.
    fn end(&self, failed: &Refusal) {
        let failed = &failed.message;
        tracing::error!(failed, "memory cannot come out of the snapshot: the VM is ended");
        self.reason.set(format!("ended since its memory cannot come out of the snapshot: {failed}"));
        self.process.kill();
    }

    /// Hears a worker until it is done. It goes on without this agent.
    async fn hear_out(&mut self, player: Worker) -> Result<(), Refusal> {
        let mut player = player.let_go();
        let provide = provide(&self.qmp, self.spare.take());
        let (spare, done) = tokio::join!(provide, player.done());
        self.spare = spare;
        done.map(drop)
    }

    /// Looks at QEMU until it has all memory.
    async fn watch(&mut self) -> Result<(), Refusal> {
        self.spare = provide(&self.qmp, self.spare.take()).await;
        loop {
            match self.qmp.migration().await {
                Ok(MigrationStatus::Completed) => return Ok(()),
                Ok(MigrationStatus::PostcopyPaused) => return Err(Refusal::new(ErrorCode::HostFailed, "the vault worker is gone")),
                // It may wait for a page that comes.
                Ok(_) | Err(QmpError::TimedOut { .. }) => tokio::time::sleep(LOOK_AGAIN).await,
                Err(error) => return Err(qemu_failed(error)),
            }
        }
    }

    /// Whether QEMU needs nothing more: it has all memory, or has ended.
    async fn is_over(&self) -> bool {
        match tokio::time::timeout(ANSWERING, self.qmp.migration()).await {
            Ok(Ok(status)) => status == MigrationStatus::Completed,
            Ok(Err(QmpError::Ended { .. })) => has_ended(&self.process).await,
            // It waits for a page.
            Ok(Err(_)) | Err(_) => !self.process.is_alive(),
        }
    }

    /// Has another worker go on where QEMU says that it is.
    async fn play_on(&mut self) -> Result<Worker, Refusal> {
        let no_pair = |error| host_failed("no socket pair", &error);
        let (ours, qemus) = match &self.spare {
            Some(spare) => (spare.try_clone().map_err(no_pair)?, None),
            None => UnixStream::pair().map(|(ours, qemus)| (ours, Some(qemus))).map_err(no_pair)?,
        };
        let mut player = player(&self.host, &self.from, ours, true).await?;
        // From here on it is written to.
        self.spare = None;
        // Not before the snapshot is open: an old QEMU that loses it again before it goes on ends.
        if let Some(qemus) = qemus {
            self.qmp.getfd(SPARE_FD, qemus.into()).await.map_err(qemu_failed)?;
        }
        // What is to be said if it ends over it.
        self.reason
            .set("QEMU ended when whoever brought its memory out of the snapshot was lost once more, before it went on".into());
        self.recover().await?;
        let late = |_| {
            let message = format!("QEMU did not say what memory it has within {RESUMING:?}");
            Err(Refusal::new(ErrorCode::QemuFailed, message))
        };
        tokio::time::timeout(RESUMING, wait_for(&mut player, &Said::Resumed)).await.unwrap_or_else(late)?;
        self.reason.set(String::new());
        tracing::info!("memory comes out of the snapshot again");
        Ok(player)
    }

    /// QEMU uses the connection that it has been given. It may not have noticed yet that the one before is gone.
    async fn recover(&self) -> Result<(), Refusal> {
        let began = Instant::now();
        loop {
            match self.qmp.migrate_recover_fd(SPARE_FD).await {
                Ok(()) => return Ok(()),
                Err(error) if error.refused().is_none() || began.elapsed() > NOTICING => return Err(qemu_failed(error)),
                Err(_) => tokio::time::sleep(LOOK).await,
            }
        }
    }
}

/// Nothing that is done once more would help.
pub(super) const fn is_for_good(failed: &Refusal) -> bool {
    matches!(failed.code, ErrorCode::SnapshotDamaged | ErrorCode::NotFound)
}

/// Gives QEMU a connection in case, unless it has one.
async fn provide(qmp: &Qmp, spare: Option<UnixStream>) -> Option<UnixStream> {
    if spare.is_some() || !qmp.is_heard_out_of_band() {
        return spare;
    }
    let (ours, qemus) = UnixStream::pair().ok()?;
    match qmp.getfd(SPARE_FD, qemus.into()).await {
        Ok(()) => Some(ours),
        Err(error) => {
            tracing::debug!(%error, "QEMU has no spare connection");
            None
        }
    }
}

/// The worker that plays memory over `socket`, when it has opened the snapshot.
pub(super) async fn player(host: &SharedHost, from: &FromSnapshot, socket: UnixStream, on: bool) -> Result<Worker, Refusal> {
    let mut fds = PassedFds::new();
    let job = Job::Play { snapshot: from.snapshot.clone(), qemu_fd: fds.pass(socket), on };
    let directory = host.pools.vault(&from.vault.pool, &from.vault.team, host.vault_uid()).await?;
    let mut player = Worker::start(host, directory, job, fds).await?;
    opened(&mut player).await?;
    Ok(player)
}

/// Waits until a worker has opened its snapshot. A vault that says nothing holds up nobody for longer.
pub(super) async fn opened(worker: &mut Worker) -> Result<(), Refusal> {
    let late = |_| {
        let message = format!("the snapshot could not be opened within {OPENING:?}");
        Err(Refusal::new(ErrorCode::HostFailed, message).hint("look whether its pool answers on this host").retry(Retry::Safe))
    };
    tokio::time::timeout(OPENING, wait_for(worker, &Said::Ready)).await.unwrap_or_else(late)
}

/// What a worker must say next.
pub(super) async fn wait_for(worker: &mut Worker, wanted: &Said) -> Result<(), Refusal> {
    let said = worker.hear().await?;
    if std::mem::discriminant(&said) == std::mem::discriminant(wanted) { Ok(()) } else { Err(unexpected()) }
}

pub(super) fn unexpected() -> Refusal {
    Refusal::new(ErrorCode::Internal, "the vault worker said what nobody expects").retry(Retry::Safe)
}

/// Whether a QEMU that has closed its connection has ended with it.
pub(super) async fn has_ended(process: &QemuProcess) -> bool {
    tokio::time::timeout(ENDING, process.exited()).await.is_ok()
}

/// Why this host has ended a VM of its own accord.
#[derive(Clone, Debug, Default)]
pub(super) struct EndReason(Arc<Mutex<String>>);

impl EndReason {
    pub(super) fn set(&self, reason: String) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    }

    /// Empty if it has not.
    pub(super) fn get(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
