//! The one place that maps what went wrong to an exit code, a code and a hint, and shows it. The codes: `docs/errors.md`.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use godwit_agent::AgentError;
use godwit_api::client::ClientError;
use godwit_lab::{BootstrapError, LabError};
use godwit_model::{ErrorCode, Refusal, TaskId};

use crate::context::ContextError;
use crate::output::note;
use crate::text::{visible, visible_lines};

/// How the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// Everything asked for is done.
    Done = 0,
    /// It failed.
    Failed = 1,
    /// It was asked for in a way that makes no sense.
    Usage = 2,
    /// Something named does not exist.
    NotFound = 3,
    /// It was refused, and nothing changed.
    Refused = 4,
    /// Some of it is done.
    PartlyDone = 5,
    /// It goes on after this process.
    StillRunning = 6,
    /// It was cancelled.
    Cancelled = 7,
    /// Something else got in between.
    Conflict = 8,
    /// This principal may not do it.
    NotPermitted = 9,
}

impl Exit {
    /// How the process ends after a refusal or failure with this code.
    pub(crate) const fn of(code: ErrorCode) -> Self {
        use ErrorCode as E;
        match code {
            E::BadRequest | E::BodyTooLarge | E::NameInvalid | E::SpecInvalid => Self::Usage,
            E::Unauthenticated | E::NotPermitted => Self::NotPermitted,
            E::NotFound => Self::NotFound,
            E::NameTaken | E::RevisionConflict | E::VmBusy => Self::Conflict,
            E::VmRunning
            | E::VmNotRunning
            | E::AlreadyOnHost
            | E::InUse
            | E::NoHost
            | E::HostIncompatible
            | E::ClockSkew
            | E::MigrationBlocked
            | E::NotEnoughMemory
            | E::NotEnoughSpace
            | E::PoolUnavailable
            | E::VolumeMissing
            | E::VolumeTruncated
            | E::VolumeFormat
            | E::ImageInvalid
            | E::AddressForbidden
            | E::TokenInvalid
            | E::TokenUsed
            | E::TokenExpired
            | E::CertificateRefused
            | E::CertificateExpired
            | E::NotGranted
            | E::GenerationStale
            | E::TooLate
            | E::DisksUnfinished
            | E::UserfaultUnavailable
            | E::Unsupported
            | E::GuestRefused => Self::Refused,
            E::ExecUnfinished => Self::StillRunning,
            E::Cancelled => Self::Cancelled,
            E::HostDown
            | E::GrantExpired
            | E::MigrationFailed
            | E::MigrationStalled
            | E::NotConverging
            | E::QemuFirst
            | E::QemuFailed
            | E::GuestSilent
            | E::SnapshotDamaged
            | E::SnapshotFailed
            | E::SnapshotInvalid
            | E::StoreFull
            | E::FetchFailed
            | E::HostFailed
            | E::Internal => Self::Failed,
        }
    }
}

/// Why a command did not do all that it was asked for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// A call of the API failed.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Refused before or by the controller.
    #[error("{0}")]
    Refused(Refusal),
    /// A task ended otherwise than well.
    #[error("{kind} of {subject}: {refusal}")]
    Task {
        /// What it did.
        kind: String,
        /// To what.
        subject: String,
        /// Why it ended.
        refusal: Refusal,
    },
    /// The task goes on, this process does not wait any longer.
    #[error("task {task} goes on")]
    StillRunning {
        /// The task.
        task: TaskId,
    },
    /// Some of several objects.
    #[error("{failed} of {all} failed")]
    PartlyDone {
        /// How many failed.
        failed: usize,
        /// Of how many.
        all: usize,
    },
    /// The first step is done, the second failed, as was said.
    #[error("{done}")]
    Halfway {
        /// What is and what is not.
        done: String,
        /// How to do the rest.
        hint: String,
    },
    /// This machine cannot be a host, as was said.
    #[error("{failed} of the findings keep this machine from being a host")]
    Unfit {
        /// How many.
        failed: usize,
    },
    /// A daemon could not begin, or ended by itself.
    #[error(transparent)]
    Daemon(Box<dyn Error + Send + Sync>),
    /// Arguments that contradict each other or make no sense.
    #[error("{what}")]
    Usage {
        /// What is wrong.
        what: String,
        /// What to do.
        hint: &'static str,
    },
    /// A program in a guest ended otherwise than well, and has said why itself.
    #[error("the program ended with exit code {code}")]
    Guest {
        /// Its exit code, or what stands for its signal.
        code: u8,
    },
    /// Nobody could be asked, and `--yes` was not given.
    #[error("{what}: nobody can be asked, because standard input is not a terminal")]
    Unconfirmed {
        /// What would be done.
        what: String,
    },
    /// The user said no.
    #[error("nothing was changed")]
    Declined,
    /// There is no usable context.
    #[error(transparent)]
    Context(#[from] ContextError),
    /// A lab could not be worked on.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// A file that was named cannot be used.
    #[error("cannot {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Standard output cannot be written to.
    #[error("cannot write to standard output")]
    Output(#[source] io::Error),
    /// The terminal refused.
    #[error("the terminal cannot be used")]
    Terminal(#[source] io::Error),
    /// The process could not begin.
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
}

impl Failure {
    /// A refusal decided here.
    pub(crate) fn usage(what: impl Into<String>, hint: &'static str) -> Self {
        Self::Usage { what: what.into(), hint }
    }

    /// Why a daemon ended.
    pub(crate) fn daemon(error: impl Error + Send + Sync + 'static) -> Self {
        Self::Daemon(Box::new(error))
    }

    /// How the process ends.
    pub(crate) fn exit(&self) -> Exit {
        match self {
            // Whether it took effect is not known; a host's being down is another matter.
            Self::Client(ClientError::Unreachable { .. } | ClientError::Foreign { .. }) => Exit::Failed,
            Self::Client(error) => Exit::of(error.refusal().code),
            Self::Refused(refusal) | Self::Task { refusal, .. } => Exit::of(refusal.code),
            Self::StillRunning { .. } => Exit::StillRunning,
            Self::PartlyDone { failed, all } if failed == all => Exit::Failed,
            Self::PartlyDone { .. } | Self::Halfway { .. } => Exit::PartlyDone,
            Self::Usage { .. } | Self::File { .. } => Exit::Usage,
            Self::Unconfirmed { .. } => Exit::Refused,
            Self::Declined => Exit::Cancelled,
            Self::Context(error) => match error {
                ContextError::Unknown { .. } => Exit::NotFound,
                ContextError::Exists { .. } => Exit::Conflict,
                _ => Exit::Usage,
            },
            Self::Lab(error) => match error {
                LabError::NotRoot => Exit::NotPermitted,
                LabError::Spec(_) => Exit::Usage,
                LabError::Exists { .. } | LabError::Busy { .. } | LabError::Running { .. } => Exit::Conflict,
                LabError::DirectoryUsed { .. } => Exit::Refused,
                LabError::Unknown { .. } | LabError::UnknownHost { .. } => Exit::NotFound,
                _ => Exit::Failed,
            },
            // Whoever read has had enough, as `head` does.
            Self::Output(source) if source.kind() == io::ErrorKind::BrokenPipe => Exit::Done,
            Self::Guest { .. } | Self::Unfit { .. } | Self::Daemon(_) | Self::Output(_) | Self::Terminal(_) | Self::Runtime(_) => {
                Exit::Failed
            }
        }
    }

    /// The message with its causes, and the code if there is one.
    fn message(&self) -> String {
        let (message, code) = match self {
            Self::Client(error) => {
                let refusal = error.refusal();
                (refusal.message, matches!(error, ClientError::Refused(_)).then_some(refusal.code))
            }
            Self::Refused(refusal) => (refusal.message.clone(), Some(refusal.code)),
            Self::Task { refusal, .. } => (self.to_string(), Some(refusal.code)),
            other => (with_causes(other), None),
        };
        code.map_or(message.clone(), |code| format!("{message} [{code}]"))
    }

    /// What to do about it.
    fn hint(&self) -> Option<String> {
        match self {
            Self::Client(ClientError::Refused(Refusal { code: ErrorCode::Unauthenticated, .. })) => {
                Some("the token comes from the context's token_file, from --token-file or from GODWIT_TOKEN_FILE".to_owned())
            }
            Self::Client(error) => error.refusal().hint,
            Self::Refused(refusal) | Self::Task { refusal, .. } => refusal.hint.clone(),
            Self::StillRunning { task } => {
                Some(format!("follow it: `godwit task watch {task}`; cancel it: `godwit task cancel {task}`"))
            }
            Self::Usage { hint, .. } => Some((*hint).to_owned()),
            Self::Daemon(error) => match error.downcast_ref::<AgentError>() {
                Some(AgentError::Identity(_)) => Some("make it a host of the cluster first: `godwit host join --help`".to_owned()),
                _ => None,
            },
            Self::Halfway { hint, .. } => Some(hint.clone()),
            Self::Unconfirmed { .. } => Some("say `--yes` if this is what you want, or look first with `--dry-run`".to_owned()),
            Self::Context(error) => error.hint(),
            Self::Lab(error) => match error {
                LabError::Unknown { .. } => Some("`godwit lab list` shows them, `godwit lab up` makes one".to_owned()),
                LabError::UnknownHost { .. } => Some("`godwit lab status` shows its hosts; `out` is the outside client".to_owned()),
                LabError::Bootstrap { source: BootstrapError::Client(_), .. } => Some("the log says more".to_owned()),
                _ => None,
            },
            _ => None,
        }
    }

    /// Says it on standard error and gives the exit code.
    pub(crate) fn report(&self) -> ExitCode {
        if let Self::Guest { code } = self {
            return ExitCode::from(*code);
        }
        let exit = self.exit();
        if exit != Exit::Done {
            self.show();
        }
        ExitCode::from(exit as u8)
    }

    /// Says it on standard error.
    pub(crate) fn show(&self) {
        let word = match self {
            Self::StillRunning { .. } => "note",
            _ => "error",
        };
        note(&format!("{word}: {}", visible_lines(&self.message())));
        if let Some(hint) = self.hint() {
            note(&format!("hint: {}", visible(&hint)));
        }
    }
}

/// An error and its causes on one line; a cause that its error repeats already is left out.
pub(crate) fn with_causes(error: &dyn Error) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !message.contains(&text) {
            message.push_str(": ");
            message.push_str(&text);
        }
        cause = error.source();
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_as_documented() {
        let page = include_str!("../../../docs/errors.md");
        for code in ErrorCode::ALL {
            let row = page.lines().find(|line| line.starts_with(&format!("| `{code}` |"))).expect("every code is documented");
            let documented: u8 =
                row.trim_end_matches('|').rsplit('|').next().and_then(|cell| cell.trim().parse().ok()).expect("a number");
            assert_eq!(Exit::of(*code) as u8, documented, "{code}");
        }
    }

    #[test]
    fn a_reader_that_left_is_no_failure() {
        let gone = Failure::Output(io::ErrorKind::BrokenPipe.into());
        assert_eq!(gone.exit(), Exit::Done);
        assert_eq!(Failure::Output(io::ErrorKind::StorageFull.into()).exit(), Exit::Failed);
    }

    #[test]
    fn all_of_several_is_not_part_of_them() {
        assert_eq!(Failure::PartlyDone { failed: 1, all: 2 }.exit(), Exit::PartlyDone);
        assert_eq!(Failure::PartlyDone { failed: 2, all: 2 }.exit(), Exit::Failed);
    }

    #[test]
    fn causes_are_told_once() {
        let inner = io::Error::other("no such device");
        let failure = Failure::File { action: "read", path: "/dev/x".into(), source: inner };
        assert_eq!(failure.message(), "cannot read /dev/x: no such device");
    }
}
