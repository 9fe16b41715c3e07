//! When a fault begins: at a time after the request, or close behind a mark that both sides of the move leave in their journals and logs.
//!
//! Marks are read from the files of the lab hosts and not asked for: nothing has to answer for them, and reading takes microseconds. They
//! say when to strike and judge nothing.

use std::fmt;
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use godwit_model::VmId;
use serde_json::Value;

/// How long a mark is waited for, where the move does not end before.
const PATIENCE: Duration = Duration::from_secs(60);
/// A source that holds no move for this long has given it up; before, it may try again.
const AGAIN: Duration = Duration::from_secs(4);
/// How often the files are looked at.
const LOOK: Duration = Duration::from_millis(1);

/// When a fault begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// Behind what.
    pub mark: Mark,
    /// By how much.
    pub after: Duration,
}

/// A step of a move, in the order in which they come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mark {
    /// The request was accepted.
    Begin,
    /// The destination's journal knows of the move: its QEMU is being started.
    Prepared,
    /// The source's journal knows its carry: memory goes over from here on.
    WarmUp,
    /// The source is about to stop the VM: the blackout begins.
    Stop,
    /// The source has journalled its release.
    Released,
    /// The destination has journalled that the VM is its own.
    Activated,
    /// The VM runs on the destination, and memory that was left follows.
    Follows,
    /// The source has journalled that the destination runs the VM.
    Confirmed,
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Begin => "begin",
            Self::Prepared => "prepare",
            Self::WarmUp => "warm-up",
            Self::Stop => "stop-and-copy",
            Self::Released => "release",
            Self::Activated => "activation",
            Self::Follows => "post-copy",
            Self::Confirmed => "clean-up",
        })
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} +{} ms", self.mark, self.after.as_millis())
    }
}

/// The files in which a move leaves its marks.
#[derive(Debug, Clone)]
pub struct Tracks {
    source_journal: PathBuf,
    destination_journal: PathBuf,
    source_log: PathBuf,
    /// Where in the log the move begins.
    log_from: u64,
    began: Instant,
}

impl Tracks {
    /// Those of a VM between two hosts whose state is in these directories.
    #[must_use]
    pub fn new(vm: VmId, source_state: &Path, destination_state: &Path, source_log: PathBuf) -> Self {
        let journal = |state: &Path| state.join("journal/vms").join(format!("{vm}.json"));
        let log_from = fs::metadata(&source_log).map_or(0, |metadata| metadata.len());
        Self {
            source_journal: journal(source_state),
            destination_journal: journal(destination_state),
            source_log,
            log_from,
            began: Instant::now(),
        }
    }

    /// Waits until `moment`; how long after the request that was, or nothing if the move ended before.
    #[must_use]
    pub fn wait(&self, moment: Moment) -> Option<Duration> {
        let mut under_way: Option<Instant> = None;
        while !self.has(moment.mark) {
            if matches!(Holding::read(&self.source_journal), Holding::Source { .. }) {
                under_way = Some(Instant::now());
            }
            let over = under_way.is_some_and(|last| last.elapsed() > AGAIN);
            if over || self.began.elapsed() > PATIENCE {
                return None;
            }
            thread::sleep(LOOK);
        }
        let reached = if moment.mark == Mark::Begin { Duration::ZERO } else { self.began.elapsed() };
        thread::sleep((reached + moment.after).saturating_sub(self.began.elapsed()));
        Some(self.began.elapsed())
    }

    /// Whether the move has come so far.
    #[must_use]
    pub fn has(&self, mark: Mark) -> bool {
        match mark {
            Mark::Begin => true,
            Mark::Prepared => matches!(Holding::read(&self.destination_journal), Holding::Destination { .. }),
            Mark::WarmUp => matches!(Holding::read(&self.source_journal), Holding::Source { carry: true, .. }),
            Mark::Stop => self.log_says("action=Stop"),
            Mark::Released => self.source_released(),
            Mark::Activated => self.destination_activated(),
            Mark::Follows => self.keeps_memory() && self.destination_activated(),
            Mark::Confirmed => match Holding::read(&self.source_journal) {
                Holding::Source { record, .. } => record == "confirmed",
                other => other == Holding::Nothing,
            },
        }
    }

    /// Whether the source has given the VM away.
    pub(crate) fn source_released(&self) -> bool {
        match Holding::read(&self.source_journal) {
            Holding::Source { record, .. } => record == "released" || record == "confirmed",
            // Cleared, because the destination runs it.
            Holding::Nothing => true,
            Holding::Owner | Holding::Destination { .. } => false,
        }
    }

    /// Whether the source has given the VM away, and keeps memory of it that was left: that is lost with its QEMU.
    pub(crate) fn keeps_memory(&self) -> bool {
        matches!(Holding::read(&self.source_journal), Holding::Source { record, leaving: true, .. } if record == "released")
    }

    /// Whether the destination has taken the VM.
    #[must_use]
    pub fn destination_activated(&self) -> bool {
        match Holding::read(&self.destination_journal) {
            Holding::Destination { record } => record == "activated" || record == "running",
            Holding::Owner => true,
            Holding::Nothing | Holding::Source { .. } => false,
        }
    }

    fn log_says(&self, words: &str) -> bool {
        let read = || {
            let mut file = fs::File::open(&self.source_log).ok()?;
            file.seek(SeekFrom::Start(self.log_from)).ok()?;
            let mut text = Vec::new();
            file.read_to_end(&mut text).ok()?;
            Some(String::from_utf8_lossy(&text).contains(words))
        };
        read().unwrap_or(false)
    }
}

/// How a host holds the VM, as its journal says.
#[derive(Debug, PartialEq, Eq)]
enum Holding {
    Nothing,
    Owner,
    Source { record: String, carry: bool, leaving: bool },
    Destination { record: String },
}

impl Holding {
    /// A record is replaced as a whole, so what is read is always one.
    fn read(journal: &Path) -> Self {
        fs::read(journal).map_or(Self::Nothing, |bytes| Self::parse(&bytes))
    }

    fn parse(bytes: &[u8]) -> Self {
        let record: Value = serde_json::from_slice(bytes).unwrap_or_default();
        let holding = &record["holding"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        match holding["as"].as_str() {
            Some("owner") => Self::Owner,
            Some("source") => Self::Source {
                record: text(&holding["record"]),
                carry: !holding["carry"].is_null(),
                leaving: holding["leaving"].as_bool().unwrap_or_default(),
            },
            Some("destination") => Self::Destination { record: text(&holding["record"]["record"]) },
            _ => Self::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn journals_tell_how_far_a_move_is() {
        let source = |record: &str, carry: bool| Holding::Source { record: record.into(), carry, leaving: false };
        for (text, holding) in [
            (r#"{"holding":{"as":"owner"}}"#, Holding::Owner),
            (r#"{"holding":{"as":"source","record":"offered","carry":null}}"#, source("offered", false)),
            (r#"{"holding":{"as":"source","record":"released","carry":{"pid":1}}}"#, source("released", true)),
            (
                r#"{"holding":{"as":"destination","record":{"record":"activated"}}}"#,
                Holding::Destination { record: "activated".into() },
            ),
            ("", Holding::Nothing),
        ] {
            assert_eq!(Holding::parse(text.as_bytes()), holding, "{text}");
        }
    }

    #[test]
    fn a_moment_says_what_it_follows() {
        assert_eq!(Moment { mark: Mark::Stop, after: Duration::from_millis(12) }.to_string(), "stop-and-copy +12 ms");
    }
}
