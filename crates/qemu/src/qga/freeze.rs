//! Still file systems for a moment: frozen by request, thawed by us at the latest when their time is over.
//!
//! ```text
//!   freeze: take the right ─▶ watchdog begins ─▶ guest-fsfreeze-freeze ─▶ Frozen ──thaw / drop──▶ watchdog thaws
//!                                   └────────── time is over, or the answer is missing ──────────────┘
//! ```
//! The watchdog begins before the guest is asked, so that no answer has to arrive for the thaw to come: a guest that was told to freeze and never
//! said so is thawed as well. A host's agent that was restarted meanwhile thaws what it finds: [`GuestAgent::thaw_orphan`].

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{CALL_LIMIT, GuestAgent, Limits, QgaError};

/// The longest that file systems stand still, whatever the caller asks for.
pub const LONGEST: Duration = Duration::from_secs(60);

/// Between two attempts to thaw a guest that does not answer; grows from the first to the second.
const AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Time for one attempt.
const THAW_LIMIT: Duration = Duration::from_secs(10);

/// Whether the file systems stood still until they were told to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thawed {
    /// Until then.
    ByRequest,
    /// No: their time was over before. What was made of the disks meanwhile is not to be relied on.
    TimeWasOver,
}

/// File systems that stand still. Dropped, they are thawed in the background.
#[derive(Debug)]
pub struct Frozen {
    /// How many.
    pub file_systems: u64,
    request: Option<oneshot::Sender<()>>,
    done: oneshot::Receiver<Thawed>,
}

impl Frozen {
    /// Thaws; waits until the guest has, or the channel is gone.
    pub async fn thaw(mut self) -> Thawed {
        drop(self.request.take());
        // A watchdog that is gone with its runtime has said nothing: not to be relied on.
        (&mut self.done).await.unwrap_or(Thawed::TimeWasOver)
    }
}

impl GuestAgent {
    /// Whether the guest's agent holds file systems frozen.
    ///
    /// # Errors
    /// See [`QgaError`].
    pub async fn is_frozen(&self) -> Result<bool, QgaError> {
        self.facts::<String>("guest-fsfreeze-status").await.map(|status| status == "frozen")
    }

    /// Freezes the guest's file systems, which may take up to `limit`; they are thawed at the latest `hold`, and never more than
    /// [`LONGEST`], after the guest was asked, whatever becomes of the caller.
    ///
    /// # Errors
    /// See [`QgaError`]; the guest is thawed then, too.
    pub async fn freeze(&self, limit: Duration, hold: Duration) -> Result<Frozen, QgaError> {
        const COMMAND: &str = "guest-fsfreeze-freeze";
        let right = tokio::time::timeout(limit, Arc::clone(&self.shared.freezing).lock_owned()).await;
        let right = right.map_err(|_| QgaError::TimedOut { command: COMMAND, limit })?;
        let over = Instant::now() + hold.min(LONGEST);
        let (request, requested) = oneshot::channel::<()>();
        let (tell, done) = oneshot::channel();
        let agent = self.clone();
        tokio::spawn(async move {
            let thawed = tokio::select! {
                biased;
                // Sent or dropped: either way it is over.
                _ = requested => Thawed::ByRequest,
                () = tokio::time::sleep_until(over) => Thawed::TimeWasOver,
            };
            agent.thaw_at_last().await;
            drop(right);
            // Nobody may be waiting.
            let _ = tell.send(thawed);
        });
        let freeze = self.call(COMMAND, Value::Null, Limits::FACTS, limit.min(hold));
        match freeze.await {
            Ok((file_systems, _)) => Ok(Frozen { file_systems, request: Some(request), done }),
            // With the request the watchdog is told.
            Err(error) => Err(error),
        }
    }

    /// Thaws, again and again, until the guest says that it is so or its channel is gone.
    async fn thaw_at_last(&self) {
        let mut wait = AGAIN.0;
        loop {
            match self.thaw(THAW_LIMIT).await {
                Ok(()) => match self.is_frozen().await {
                    Ok(false) => return,
                    Ok(true) => tracing::warn!("the guest is still frozen although it was thawed"),
                    // It thawed: an agent that does not tell of it is believed.
                    Err(error) if error.is_refusal() => return,
                    Err(_) => {}
                },
                // The VM is gone from here, or its QEMU is.
                Err(QgaError::Connect(error)) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                    return;
                }
                // An agent that has no such command has frozen nothing.
                Err(QgaError::Refused { class, .. }) if class == "CommandNotFound" => return,
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "the guest's file systems are not thawed yet")
                }
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(AGAIN.1);
        }
    }

    async fn thaw(&self, limit: Duration) -> Result<(), QgaError> {
        self.call::<u64>("guest-fsfreeze-thaw", Value::Null, Limits::FACTS, limit).await.map(drop)
    }

    /// Thaws a guest that is frozen by nobody here: whoever froze it is gone. Says whether there was anything to thaw.
    ///
    /// # Errors
    /// See [`QgaError`].
    pub async fn thaw_orphan(&self) -> Result<bool, QgaError> {
        let Ok(_right) = self.shared.freezing.try_lock() else { return Ok(false) };
        if !self.is_frozen().await? {
            return Ok(false);
        }
        self.thaw(CALL_LIMIT).await.map(|()| true)
    }
}
