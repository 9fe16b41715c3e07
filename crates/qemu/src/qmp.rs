//! A QMP session: commands with time limits, events for everyone who listens, descriptors to QEMU, and no surprise that ends it.
//!
//! ```text
//!  execute ──▶ channel ──▶ writer task ──▶ socket ──▶ QEMU
//!     ▲                                                │
//!     └── oneshot by id ◀── reader task ◀── codec ◀────┘
//!                              └──▶ broadcast: events, then the end
//! ```
//! QEMU reads its monitor in a thread of its own, and carries most commands out in its main loop, one after the other. The few that are allowed
//! *out of band* it carries out as they are read, also while the main loop stands still; of the others it then reads a handful and no more.
//!
//! The reader never waits for a consumer: who is slow is told how many events were missed. A command whose caller goes away or loses
//! patience still runs in QEMU; its answer is dropped.

pub mod codec;
pub mod commands;
mod transport;
pub mod views;

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Map, Value, json};
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot};

pub use codec::{DecodeError, Event, Failure, Greeting, LineDecoder, Message};

/// How long a command may take unless its caller says otherwise.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(10);

/// Events that a slow listener may be behind before it misses some.
const EVENT_BACKLOG: usize = 1_024;

/// Commands that wait for the writer.
const COMMAND_BACKLOG: usize = 64;

/// QEMU's name for what it may be asked beside its main loop.
const OUT_OF_BAND: &str = "oob";

/// Where QEMU carries a command out.
#[derive(Clone, Copy, Debug)]
enum Band {
    /// In its main loop, after all before it.
    In,
    /// At once.
    Out,
}

/// Why a command has no result.
#[derive(Clone, Debug, thiserror::Error)]
pub enum QmpError {
    /// QEMU refused.
    #[error("QEMU refused {command}: {} ({})", failure.description, failure.class)]
    Refused {
        /// The command.
        command: String,
        /// What QEMU said.
        failure: Failure,
    },
    /// QEMU does not answer. Whether the command took effect is unknown.
    #[error("QEMU did not answer {command} within {limit:?}")]
    TimedOut {
        /// The command.
        command: String,
        /// The time it had.
        limit: Duration,
    },
    /// The session is over. If the command was on its way, it is unknown whether it took effect.
    #[error("the session with QEMU ended: {reason}")]
    Ended {
        /// Why.
        reason: Arc<Ending>,
    },
    /// The command is larger than we send.
    #[error("{command} is {size} bytes long, the limit is {}", codec::MAX_COMMAND)]
    TooLong {
        /// The command.
        command: String,
        /// Its size.
        size: usize,
    },
    /// `cont` for a QEMU that still waits for its migration: it would start by itself once loaded.
    #[error("QEMU is not loaded yet and must not be told to continue")]
    NotLoaded,
    /// QEMU's answer lacks what it must have.
    #[error("QEMU's answer to {command} is not what it should be")]
    Answer {
        /// The command.
        command: String,
        /// What is missing.
        #[source]
        source: Arc<serde_json::Error>,
    },
}

impl QmpError {
    /// Whether QEMU itself said no: it is alive and the command had no effect.
    #[must_use]
    pub const fn refused(&self) -> Option<&Failure> {
        match self {
            Self::Refused { failure, .. } => Some(failure),
            _ => None,
        }
    }

    /// Whether QEMU does not have this command.
    #[must_use]
    pub fn is_unknown_command(&self) -> bool {
        self.refused().is_some_and(|failure| failure.class == "CommandNotFound")
    }
}

/// Why a session is over.
#[derive(Debug, thiserror::Error)]
pub enum Ending {
    /// QEMU closed it, or is gone.
    #[error("QEMU closed the connection")]
    Closed,
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Socket(io::Error),
    /// What QEMU sent cannot be understood.
    #[error("{0}")]
    Protocol(DecodeError),
    /// Our side dropped it.
    #[error("it was dropped")]
    Dropped,
}

/// Why a session did not begin.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No connection.
    #[error("cannot connect to QEMU's monitor")]
    Connect(#[source] io::Error),
    /// The socket cannot be used with this runtime.
    #[error("cannot use the monitor's socket")]
    Socket(#[source] io::Error),
    /// No greeting, or not in time: another client may hold the monitor, or QEMU stands still.
    #[error("QEMU did not greet within {0:?}: another client may hold the monitor, or QEMU hangs")]
    NoGreeting(Duration),
    /// It ended before it began.
    #[error("the session ended before it began: {0}")]
    Ended(Arc<Ending>),
    /// QEMU refused to negotiate.
    #[error("QEMU refused to begin the session")]
    Negotiate(#[source] QmpError),
}

/// What a listener hears.
#[derive(Clone, Debug)]
pub enum Notice {
    /// QEMU says that something happened.
    Event(Event),
    /// This listener was too slow and missed this many: look at the state instead.
    Missed(u64),
    /// The session is over; nothing follows.
    Ended(Arc<Ending>),
}

/// Hears everything from the moment it was made.
#[derive(Debug)]
pub struct Notices {
    receiver: broadcast::Receiver<Event>,
    shared: Arc<Shared>,
}

impl Notices {
    /// The next one. After [`Notice::Ended`] it is that again.
    pub async fn next(&mut self) -> Notice {
        match self.receiver.recv().await {
            Ok(event) => Notice::Event(event),
            Err(broadcast::error::RecvError::Lagged(missed)) => Notice::Missed(missed),
            Err(broadcast::error::RecvError::Closed) => Notice::Ended(self.shared.ending()),
        }
    }
}

/// A session with one QEMU. Clones share it; it ends when the last clone is dropped or QEMU ends.
#[derive(Clone, Debug)]
pub struct Qmp {
    commands: mpsc::Sender<transport::Outgoing>,
    shared: Arc<Shared>,
    greeting: Arc<Greeting>,
    tasks: Arc<AbortOnDrop>,
    /// Held while a descriptor is on its way: QEMU keeps only those that came last until their command is carried out.
    passes: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Debug)]
struct AbortOnDrop([tokio::task::AbortHandle; 2]);

impl AbortOnDrop {
    fn abort(&self) {
        self.0.iter().for_each(tokio::task::AbortHandle::abort);
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.abort();
    }
}

type Answer = Result<Value, Failure>;

/// What the two tasks and the callers share. No lock is held across an await.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    next_id: u64,
    waiting: HashMap<u64, oneshot::Sender<Answer>>,
    events: Option<broadcast::Sender<Event>>,
    ending: Option<Arc<Ending>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ending(&self) -> Arc<Ending> {
        self.lock().ending.clone().unwrap_or_else(|| Arc::new(Ending::Dropped))
    }

    /// Ends the session once: who waits is told, listeners hear the end. The first reason stands.
    fn end(&self, reason: Ending) {
        let mut state = self.lock();
        state.ending.get_or_insert_with(|| Arc::new(reason));
        state.waiting.clear();
        state.events = None;
    }

    fn receive(&self, message: Message) {
        let mut state = self.lock();
        match message {
            Message::Return { id, value } => drop(state.waiting.remove(&id).map(|waiting| waiting.send(Ok(value)))),
            Message::Failure { id: Some(id), failure } => {
                drop(state.waiting.remove(&id).map(|waiting| waiting.send(Err(failure))));
            }
            Message::Event(event) => {
                tracing::debug!(event = event.name, data = %event.data, "QEMU event");
                // No listener is no error.
                let _ = state.events.as_ref().map(|events| events.send(event));
            }
            Message::Failure { id: None, failure } => tracing::warn!(?failure, "QEMU complains about no command in particular"),
            Message::Greeting(_) => tracing::debug!("QEMU greeted again"),
            Message::Other(object) => tracing::debug!(?object, "QEMU said something unknown"),
        }
    }
}

/// Removes a waiting command whose caller went away, so that an unanswering QEMU cannot make the table grow.
struct Forget<'a>(&'a Shared, u64);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.0.lock().waiting.remove(&self.1);
    }
}

impl Qmp {
    /// Connects to the monitor at `path` and negotiates, all within `limit`.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn connect(path: &Path, limit: Duration) -> Result<Self, ConnectError> {
        let stream = UnixStream::connect(path).await.map_err(ConnectError::Connect)?;
        Self::begin(stream, limit).await
    }

    /// Begins a session on a connected socket, within `limit`.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn begin(stream: UnixStream, limit: Duration) -> Result<Self, ConnectError> {
        tokio::time::timeout(limit, Self::negotiate(stream, limit)).await.unwrap_or(Err(ConnectError::NoGreeting(limit)))
    }

    async fn negotiate(stream: UnixStream, limit: Duration) -> Result<Self, ConnectError> {
        let (events, _) = broadcast::channel(EVENT_BACKLOG);
        let state = State { next_id: 1, waiting: HashMap::new(), events: Some(events), ending: None };
        let shared = Arc::new(Shared { state: Mutex::new(state) });
        let stream = Arc::new(stream);
        let mut reader = transport::Reader::new(Arc::clone(&stream));
        let greeting = loop {
            match reader.next().await {
                Ok(Message::Greeting(greeting)) => break greeting,
                Ok(other) => shared.receive(other),
                Err(reason) => return Err(ConnectError::Ended(Arc::new(reason))),
            }
        };
        let (commands, outgoing) = mpsc::channel(COMMAND_BACKLOG);
        let reading = tokio::spawn(run_reader(reader, Arc::clone(&shared)));
        let writing = tokio::spawn(run_writer(stream, outgoing, Arc::clone(&shared)));
        let tasks = Arc::new(AbortOnDrop([reading.abort_handle(), writing.abort_handle()]));
        let session = Self { commands, shared, greeting: Arc::new(greeting), tasks, passes: Arc::default() };
        let wanted = if session.is_heard_out_of_band() { json!({ "enable": [OUT_OF_BAND] }) } else { Value::Null };
        match session.execute_within("qmp_capabilities", wanted, limit).await {
            Ok(_) => Ok(session),
            Err(QmpError::Ended { reason }) => Err(ConnectError::Ended(reason)),
            Err(error) => Err(ConnectError::Negotiate(error)),
        }
    }

    /// How QEMU greeted.
    #[must_use]
    pub fn greeting(&self) -> &Greeting {
        &self.greeting
    }

    /// Whether this QEMU carries commands out while its main loop stands still.
    #[must_use]
    pub fn is_heard_out_of_band(&self) -> bool {
        self.greeting.capabilities.iter().any(|capability| capability == OUT_OF_BAND)
    }

    /// Listens from now on. On a session that is over the first notice is its end.
    #[must_use]
    pub fn listen(&self) -> Notices {
        let receiver = match &self.shared.lock().events {
            Some(events) => events.subscribe(),
            None => broadcast::channel(1).1,
        };
        Notices { receiver, shared: Arc::clone(&self.shared) }
    }

    /// Why the session is over, if it is.
    #[must_use]
    pub fn ended(&self) -> Option<Arc<Ending>> {
        self.shared.lock().ending.clone()
    }

    /// Ends the session for all clones; QEMU then greets the next client.
    pub fn close(&self) {
        self.tasks.abort();
    }

    /// Runs a command within [`COMMAND_LIMIT`]. `arguments` is an object, or null for none.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.run(Band::In, command, arguments, None, COMMAND_LIMIT).await
    }

    /// Runs one of the commands that QEMU carries out also while its main loop stands still; in the main loop, if QEMU cannot do that.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn execute_out_of_band(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let band = if self.is_heard_out_of_band() { Band::Out } else { Band::In };
        self.run(band, command, arguments, None, COMMAND_LIMIT).await
    }

    /// Runs a command within `limit`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn execute_within(&self, command: &str, arguments: Value, limit: Duration) -> Result<Value, QmpError> {
        self.run(Band::In, command, arguments, None, limit).await
    }

    /// Runs a command that takes a descriptor with it (`getfd`, `add-fd`); ours is closed once sent.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn execute_with_fd(&self, command: &str, arguments: Value, fd: OwnedFd) -> Result<Value, QmpError> {
        let _passes = self.passes.lock().await;
        self.run(Band::In, command, arguments, Some(fd), COMMAND_LIMIT).await
    }

    async fn run(
        &self,
        band: Band,
        command: &str,
        arguments: Value,
        fd: Option<OwnedFd>,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        let (sender, receiver) = oneshot::channel();
        let id = {
            let mut state = self.shared.lock();
            if let Some(reason) = &state.ending {
                return Err(QmpError::Ended { reason: Arc::clone(reason) });
            }
            let id = state.next_id;
            state.next_id += 1;
            state.waiting.insert(id, sender);
            id
        };
        let _forget = Forget(&self.shared, id);
        let line = line_of(band, command, arguments, id);
        if line.len() > codec::MAX_COMMAND {
            return Err(QmpError::TooLong { command: command.to_owned(), size: line.len() });
        }
        let ended = || QmpError::Ended { reason: self.shared.ending() };
        let answered = tokio::time::timeout(limit, async {
            self.commands.send(transport::Outgoing { line, fd }).await.map_err(|_| ended())?;
            receiver.await.map_err(|_| ended())
        });
        match answered.await {
            Err(_) => Err(QmpError::TimedOut { command: command.to_owned(), limit }),
            Ok(Err(error)) => Err(error),
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(failure))) => Err(QmpError::Refused { command: command.to_owned(), failure }),
        }
    }
}

fn line_of(band: Band, command: &str, arguments: Value, id: u64) -> Vec<u8> {
    let mut object = Map::new();
    let key = match band {
        Band::In => "execute",
        Band::Out => "exec-oob",
    };
    object.insert(key.to_owned(), json!(command));
    if !arguments.is_null() {
        object.insert("arguments".to_owned(), arguments);
    }
    object.insert("id".to_owned(), json!(id));
    let mut line = Value::Object(object).to_string().into_bytes();
    line.push(b'\n');
    line
}

async fn run_reader(mut reader: transport::Reader, shared: Arc<Shared>) {
    let _end = EndOnDrop(Arc::clone(&shared));
    loop {
        match reader.next().await {
            Ok(message) => shared.receive(message),
            Err(reason) => return shared.end(reason),
        }
    }
}

/// The session's end must be heard also when the reader is aborted.
struct EndOnDrop(Arc<Shared>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.end(Ending::Dropped);
    }
}

async fn run_writer(stream: Arc<UnixStream>, mut outgoing: mpsc::Receiver<transport::Outgoing>, shared: Arc<Shared>) {
    while let Some(command) = outgoing.recv().await {
        if let Err(error) = transport::write(&stream, command).await {
            return shared.end(Ending::Socket(error));
        }
    }
}

#[cfg(test)]
mod tests;
