//! The guest agent of a VM: a program inside the guest, and therefore hostile. Every call has a time limit of ours, what is kept of an answer
//! is bounded before it is stored, and what we do not know ends nothing.
//!
//! ```text
//!   call ──▶ one at a time ──▶ session: connect, 0xFF, sync by a number drawn for it ──▶ request ──▶ one line
//!                                  ▲                                                        │
//!                                  └── dropped whenever an answer is missing or malformed ──┘
//! ```
//! The channel has no numbers for requests and outlives its clients, so an answer may be that of an earlier one: a session begins by passing over
//! everything up to the answer with its own number, and is never used again once an answer has been given up. [`freeze`] keeps the guest's
//! file systems still, for a time that ends by itself.

pub mod codec;
pub mod commands;
pub mod freeze;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::sync::Mutex;

pub use codec::{Answer, Decoder, Limits, Piece};
pub use commands::{AgentInfo, Exec};
pub use freeze::{Frozen, Thawed};

/// How long a call may take unless its caller says otherwise.
pub const CALL_LIMIT: Duration = Duration::from_secs(5);

/// Most bytes that are read for one answer. The agent of QEMU keeps 16 MiB of each of a program's two outputs, and sends them as base64.
const MAX_READ: usize = 48 << 20;
const CHUNK: usize = 16 << 10;
/// Longest text of the guest's agent that is passed on.
const MAX_TEXT: usize = 300;

/// Why a call has no result.
#[derive(Debug, thiserror::Error)]
pub enum QgaError {
    /// The channel is not there, or QEMU does not take the connection.
    #[error("the guest agent's channel cannot be opened")]
    Connect(#[source] io::Error),
    /// The channel was closed, or failed.
    #[error("the guest agent's channel was closed")]
    Closed(#[source] Option<io::Error>),
    /// No answer. Whether the command took effect is unknown.
    #[error("the guest agent did not answer {command} within {limit:?}")]
    TimedOut {
        /// The command.
        command: &'static str,
        /// The time it had.
        limit: Duration,
    },
    /// The guest's agent said no.
    #[error("the guest agent refused {command}: {description}")]
    Refused {
        /// The command.
        command: &'static str,
        /// Its class of errors.
        class: String,
        /// What it says: bounded and without control characters, and still the guest's text.
        description: String,
    },
    /// More than an answer may have.
    #[error("the guest agent answered {command} with more than an answer may have")]
    TooLong {
        /// The command.
        command: &'static str,
    },
    /// Not what an answer must be.
    #[error("the guest agent's answer to {command} is not what it should be")]
    Malformed {
        /// The command.
        command: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

impl QgaError {
    /// Whether the guest's agent itself said no: it is there, and the command had no effect.
    #[must_use]
    pub const fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// Whether the command may have taken effect although there is no answer.
    #[must_use]
    pub const fn may_have_acted(&self) -> bool {
        !matches!(self, Self::Refused { .. } | Self::Connect(_))
    }
}

/// The guest's text, made short and harmless for logs and messages.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_TEXT).collect()
}

/// The guest agent of one VM on this host. Clones share its channel, on which one call is made at a time.
#[derive(Clone, Debug)]
pub struct GuestAgent {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    session: Mutex<Option<Session>>,
    /// Held by whoever keeps the guest's file systems still.
    freezing: Arc<Mutex<()>>,
}

impl GuestAgent {
    /// The agent behind the socket at `path`; nothing is connected yet.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self { shared: Arc::new(Shared { path, session: Mutex::new(None), freezing: Arc::default() }) }
    }

    /// Closes the channel; the next call opens it anew.
    pub async fn close(&self) {
        *self.shared.session.lock().await = None;
    }

    /// Makes a call and reads its answer, of which `keep` is kept; also whether a string of it was longer. All within `limit`, waiting for
    /// calls before it included.
    async fn call<T: DeserializeOwned>(
        &self,
        command: &'static str,
        arguments: Value,
        keep: Limits,
        limit: Duration,
    ) -> Result<(T, bool), QgaError> {
        let asked = async {
            let mut slot = self.shared.session.lock().await;
            // Taken out, so that a caller who goes away in the middle leaves no session that waits for an answer.
            let mut session = match slot.take() {
                Some(session) if session.is_quiet() => session,
                _ => Session::begin(&self.shared.path).await?,
            };
            let answer = session.ask(command, arguments, keep).await;
            if answer.as_ref().is_ok_and(|_| session.is_quiet()) || matches!(&answer, Err(QgaError::Refused { .. })) {
                *slot = Some(session);
            }
            let (value, cut) = answer?;
            let value = serde_json::from_str(value.get()).map_err(|source| QgaError::Malformed { command, source })?;
            Ok((value, cut))
        };
        tokio::time::timeout(limit, asked).await.unwrap_or(Err(QgaError::TimedOut { command, limit }))
    }
}

/// A conversation that has found its beginning.
#[derive(Debug)]
struct Session {
    stream: UnixStream,
    decoder: Decoder,
    chunk: Box<[u8; CHUNK]>,
    start: usize,
    end: usize,
}

impl Session {
    async fn begin(path: &std::path::Path) -> Result<Self, QgaError> {
        let stream = UnixStream::connect(path).await.map_err(QgaError::Connect)?;
        Self::synchronise(stream).await
    }

    /// Passes over whatever earlier clients left on the channel.
    async fn synchronise(stream: UnixStream) -> Result<Self, QgaError> {
        const COMMAND: &str = "guest-sync-delimited";
        let mut session = Self { stream, decoder: Decoder::new(Limits::FACTS), chunk: Box::new([0; CHUNK]), start: 0, end: 0 };
        let number = draw_number()?;
        // The mark makes void what an earlier client left half-said in the guest.
        let mut request = vec![0xff];
        request.extend(line_of(COMMAND, json!({ "id": number })));
        session.send(&request).await?;
        let (mut budget, mut marked) = (MAX_READ, false);
        loop {
            match session.piece(COMMAND, &mut budget).await? {
                Piece::Mark => marked = true,
                // Anything else is an answer to an earlier client, or rubbish.
                Piece::Line { text, .. } if marked => {
                    if matches!(codec::read(&text), Ok(Answer::Return(value)) if value.get().trim() == number.to_string()) {
                        return Ok(session);
                    }
                    marked = false;
                }
                Piece::Line { .. } | Piece::Overlong => marked = false,
            }
        }
    }

    /// Whether nothing has been said since the last answer, and nobody hung up.
    fn is_quiet(&self) -> bool {
        let nothing = |result: io::Result<usize>| matches!(result, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        self.start == self.end && nothing(self.stream.try_read(&mut [0]))
    }

    async fn ask(&mut self, command: &'static str, arguments: Value, keep: Limits) -> Result<(Box<RawValue>, bool), QgaError> {
        self.decoder.set_limits(keep);
        self.send(&line_of(command, arguments)).await?;
        let mut budget = MAX_READ;
        loop {
            match self.piece(command, &mut budget).await? {
                Piece::Mark => {}
                Piece::Overlong => return Err(QgaError::TooLong { command }),
                Piece::Line { text, cut } => match codec::read(&text) {
                    Ok(Answer::Return(value)) => return Ok((value, cut)),
                    Ok(Answer::Error { class, description }) => {
                        return Err(QgaError::Refused { command, class: plain(&class), description: plain(&description) });
                    }
                    Ok(Answer::Other) => tracing::debug!(command, "the guest agent said something unknown"),
                    Err(source) => return Err(QgaError::Malformed { command, source }),
                },
            }
        }
    }

    async fn send(&mut self, mut rest: &[u8]) -> Result<(), QgaError> {
        let closed = |error| QgaError::Closed(Some(error));
        while !rest.is_empty() {
            self.stream.writable().await.map_err(closed)?;
            match self.stream.try_write(rest) {
                Ok(length) => rest = rest.get(length..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(closed(error)),
            }
        }
        Ok(())
    }

    /// The next piece; what is read for it comes off `budget`.
    async fn piece(&mut self, command: &'static str, budget: &mut usize) -> Result<Piece, QgaError> {
        loop {
            let mut rest = self.chunk.get(self.start..self.end).unwrap_or_default();
            let piece = self.decoder.decode(&mut rest);
            self.start = self.end - rest.len();
            if let Some(piece) = piece {
                return Ok(piece);
            }
            self.stream.readable().await.map_err(|error| QgaError::Closed(Some(error)))?;
            match self.stream.try_read(&mut self.chunk[..]) {
                Ok(0) => return Err(QgaError::Closed(None)),
                Ok(length) => {
                    *budget = budget.checked_sub(length).ok_or(QgaError::TooLong { command })?;
                    (self.start, self.end) = (0, length);
                    // A guest that never stops must not keep the host's other work waiting.
                    tokio::task::yield_now().await;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(QgaError::Closed(Some(error))),
            }
        }
    }
}

/// A number that no earlier client has used, in this life of the host's agent or another.
fn draw_number() -> Result<u64, QgaError> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).map_err(|error| QgaError::Connect(error.into()))?;
    // Positive, and exact also for a reader that makes a floating point number of it.
    Ok(u64::from_le_bytes(bytes) >> 12)
}

fn line_of(command: &str, arguments: Value) -> Vec<u8> {
    let request =
        if arguments.is_null() { json!({ "execute": command }) } else { json!({ "execute": command, "arguments": arguments }) };
    let mut line = request.to_string().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests;
