//! What can go wrong with a lab.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::{BootstrapError, RelayError, SpecError};

/// Why an operation on a lab failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// Namespaces and links need root.
    #[error("a lab needs root: run it with sudo")]
    NotRoot,
    /// The description of the lab cannot be built.
    #[error("the lab cannot be built as described")]
    Spec(#[from] SpecError),
    /// There is such a lab already.
    #[error("lab {name} exists already: take it down first with `godwit lab down {name}`")]
    Exists {
        /// The lab.
        name: String,
    },
    /// The directory for the lab's state has other things in it.
    #[error("{path} is not empty: give the lab a directory of its own")]
    DirectoryUsed {
        /// The directory.
        path: PathBuf,
    },
    /// There is no such lab.
    #[error("there is no lab {name}")]
    Unknown {
        /// The lab.
        name: String,
    },
    /// The lab has no such host.
    #[error("lab {lab} has no host {host}")]
    UnknownHost {
        /// The lab.
        lab: String,
        /// The host asked for.
        host: String,
    },
    /// Another process works on the lab.
    #[error("another process works on lab {name}; try again when it is done")]
    Busy {
        /// The lab.
        name: String,
    },
    /// A tool could not be started.
    #[error("cannot run {command} (Debian package iproute2, util-linux)")]
    CommandStart {
        /// The whole command.
        command: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A tool reported a failure.
    #[error("`{command}` failed: {stderr}")]
    Command {
        /// The whole command.
        command: String,
        /// What it wrote to its standard error.
        stderr: String,
    },
    /// A file or directory could not be used.
    #[error("cannot {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The record of the lab is damaged.
    #[error("the record {path} is damaged; `godwit lab down` removes what it can find")]
    Record {
        /// The record.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// A namespace could not be entered.
    #[error("cannot enter the network namespace {name}")]
    Namespace {
        /// The namespace.
        name: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The address of the API could not be bound.
    #[error("cannot listen on 127.0.0.1:{port} for the API")]
    Listen {
        /// The port; 0 means any.
        port: u16,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A daemon could not be started.
    #[error("cannot start {daemon}")]
    Spawn {
        /// Which one.
        daemon: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A daemon is running already.
    #[error("{daemon} is running already, as process {pid}")]
    Running {
        /// Which one.
        daemon: String,
        /// Its process.
        pid: u32,
    },
    /// A daemon is not running.
    #[error("{daemon} is not running")]
    NotRunning {
        /// Which one.
        daemon: String,
    },
    /// A process could not be signalled or waited for.
    #[error("cannot signal or wait for process {pid}")]
    Process {
        /// The process.
        pid: u32,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A process did not end in time.
    #[error("process {pid} did not end within {} ms", waited.as_millis())]
    StillRunning {
        /// The process.
        pid: u32,
        /// How long it was waited for.
        waited: Duration,
    },
    /// A daemon ended before it was ready.
    #[error("{daemon} failed; the end of its log {log}:\n{tail}")]
    DaemonFailed {
        /// Which one.
        daemon: String,
        /// Its log.
        log: PathBuf,
        /// The last lines of the log.
        tail: String,
    },
    /// The controller could not be asked.
    #[error("the controller of the lab cannot be used; the end of its log:\n{tail}")]
    Bootstrap {
        /// The last lines of the controller's log.
        tail: String,
        /// The cause.
        #[source]
        source: BootstrapError,
    },
    /// The relay's plan could not be written.
    #[error("the relay of a link failed")]
    Relay(#[from] RelayError),
    /// Something of the lab is still there after everything was tried.
    #[error("lab {name} is not gone: left are {left}")]
    Leftovers {
        /// The lab.
        name: String,
        /// What is left.
        left: String,
    },
}

impl LabError {
    /// Wraps the failure of a file operation.
    pub(crate) fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }
}
