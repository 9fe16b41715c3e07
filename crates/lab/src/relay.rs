//! The relay that adds delay and loss to the frames that leave a host: a process of its own, for there is no netem here.
//!
//! A filter redirects frames that leave `eth0` into a tap. The relay reads them there, holds each for the delay, drops
//! some, and sends the rest through a packet socket on `eth0`, marked so that the filter lets them pass into the qdisc:
//! the link's rate still holds. Frames carry a virtio header both ways, so that a bulk sender's segments of up to 64 KiB
//! stay whole and the relay keeps up with a gigabit. With loss there is no segmentation offload: frames get lost one by one.

mod device;
mod queue;

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use self::device::{FRAME_MAX, open_sender, open_tap};
use self::queue::DelayQueue;
use crate::process::ProcessRef;
use crate::{LabError, Loss, in_namespace};

/// The mark on frames that the relay has sent.
pub(crate) const MARK: u32 = 0x6777;
/// What the relay says once the tap is there.
const READY: &str = "ready";
/// How many frames are read before due ones are sent.
const READ_BURST: usize = 64;

/// What one relay shall do; its only argument, as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayPlan {
    /// Name of the tap to make.
    pub tap: String,
    /// Name of the interface to send on.
    pub out: String,
    /// How long each frame is held, in microseconds.
    pub delay_us: u64,
    /// How many frames are dropped.
    pub loss: Loss,
    /// Start of the sequence of random numbers: the same frames are dropped each time.
    pub seed: u64,
}

/// Why a relay ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RelayError {
    /// Not exactly one argument.
    #[error("lab-relay takes one argument, its plan as JSON")]
    Arguments,
    /// The plan cannot be read or written.
    #[error("the plan of the relay is not as it should be")]
    Plan(#[source] serde_json::Error),
    /// The name cannot be that of an interface.
    #[error("{name:?} cannot be the name of an interface")]
    InterfaceName {
        /// The name.
        name: String,
    },
    /// The tap could not be made.
    #[error("cannot make the tap {name}")]
    Tap {
        /// Its name.
        name: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The sending socket could not be made.
    #[error("cannot send on {name}")]
    Sender {
        /// The interface.
        name: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Reading, waiting or reporting failed.
    #[error("the relay cannot go on")]
    Io(#[source] io::Error),
}

/// Runs a relay in the present network namespace until it is killed. `arguments` are those behind the subcommand's name.
///
/// # Errors
/// Returns only with an error.
pub fn run_relay(arguments: impl IntoIterator<Item = OsString>) -> Result<std::convert::Infallible, RelayError> {
    let mut arguments = arguments.into_iter();
    let (Some(plan), None) = (arguments.next(), arguments.next()) else { return Err(RelayError::Arguments) };
    let plan: RelayPlan = serde_json::from_str(&plan.to_string_lossy()).map_err(RelayError::Plan)?;
    let tap = open_tap(&plan.tap, plan.loss == Loss::NONE)?;
    let sender = open_sender(&plan.out)?;
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{READY}").and_then(|()| stdout.flush()).map_err(RelayError::Io)?;
    drop(stdout);

    let wait_failed = |error: Errno| RelayError::Io(error.into());
    let origin = Instant::now();
    let now = || u64::try_from(origin.elapsed().as_micros()).unwrap_or(u64::MAX);
    let mut queue = DelayQueue::new(plan.delay_us, plan.loss, plan.seed);
    let mut buffer = vec![0; FRAME_MAX];
    loop {
        for _ in 0..READ_BURST {
            match rustix::io::read(&tap, buffer.as_mut_slice()) {
                Ok(length) => queue.push(now(), buffer.get(..length).unwrap_or_default()),
                // The interface is still down (EIO) or nothing is there: poll tells when to look again.
                Err(Errno::AGAIN | Errno::IO | Errno::INTR) => break,
                Err(error) => return Err(wait_failed(error)),
            }
        }
        while let Some(frame) = queue.pop(now()) {
            // A frame that the interface does not take is lost, as on any link that is full.
            let _ = rustix::net::send(&sender, &frame, rustix::net::SendFlags::DONTWAIT);
        }
        let timeout = queue.next_due().map(|due| {
            let left = due.saturating_sub(now());
            Timespec { tv_sec: (left / 1_000_000) as i64, tv_nsec: (left % 1_000_000 * 1000) as i64 }
        });
        match poll(&mut [PollFd::from_borrowed_fd(tap.as_fd(), PollFlags::IN)], timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(wait_failed(error)),
        }
    }
}

/// Starts `godwit lab-relay` in a namespace and returns when its tap is there.
pub(crate) fn start(godwit: &Path, namespace: &str, plan: &RelayPlan, log: &Path) -> Result<ProcessRef, LabError> {
    let daemon = || format!("the relay in {namespace}");
    let failed = |source| LabError::Spawn { daemon: daemon(), source };
    let argument = serde_json::to_string(plan).map_err(RelayError::Plan)?;
    let errors = OpenOptions::new().create(true).append(true).open(log).map_err(LabError::file("open", log))?;
    // Its own session: it outlives this process and its terminal.
    let spawn = || {
        Command::new("setsid")
            .arg(godwit)
            .arg("lab-relay")
            .arg(argument)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
    };
    let mut child = in_namespace(namespace, spawn)?.map_err(failed)?;
    let process = ProcessRef::current(child.id());
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        // Ends with the line, or with the relay.
        BufReader::new(stdout).read_line(&mut line).map_err(failed)?;
    }
    match process {
        Some(process) if line.trim() == READY => Ok(process),
        _ => {
            let _ = child.wait();
            Err(LabError::DaemonFailed { daemon: daemon(), log: log.to_owned(), tail: crate::daemon::tail(log) })
        }
    }
}
