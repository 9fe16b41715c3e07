//! The keeper of a log: copies what a caged program says from a pipe into two files of bounded size. It stands beside the program, outside of
//! its namespaces, with the agent dead or alive, and ends with it.
//!
//! The program never waits for the keeper and does not depend on it: its end of the pipe does not block, what finds no room is lost, and so is
//! everything once the keeper is gone.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use godwit_model::hostile;
use rustix::fs::FlockOperation;
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::calls::{self, CallsError};

/// Pause after the log was turned over: a flood costs the disk at most one limit per pause.
const PAUSE: Duration = Duration::from_secs(1);

/// What the keeper has, and all that it has.
pub(super) struct Keeper {
    /// From the program.
    pub(super) said: File,
    /// Where new lines go.
    pub(super) current: File,
    /// What was there before.
    pub(super) older: File,
    /// Most bytes of each file.
    pub(super) limit: u64,
}

impl Keeper {
    /// Keeps the log until the program has ended. All descriptors but its own are closed first.
    pub(super) fn run(mut self) -> io::Result<()> {
        let own = [&self.said, &self.current, &self.older].map(AsRawFd::as_raw_fd);
        close_all_but(&own);
        renounce().map_err(io::Error::other)?;
        let mut piece = vec![0; 16 << 10];
        loop {
            match self.said.read(&mut piece) {
                Ok(0) => return Ok(()),
                // A full disk is no reason to leave: the next line may find room, and the pipe must be emptied.
                Ok(length) => drop(self.keep(piece.get(..length).unwrap_or_default())),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn keep(&mut self, said: &[u8]) -> io::Result<()> {
        let text = harmless(said);
        if self.current.metadata()?.len().saturating_add(text.len() as u64) > self.limit {
            self.turn_over(text.len() as u64)?;
            std::thread::sleep(PAUSE);
        }
        self.current.write_all(text.as_bytes())
    }

    /// Moves the content, not the files: who follows the log, and who else writes to it, has the same file before and after.
    fn turn_over(&mut self, coming: u64) -> io::Result<()> {
        rustix::fs::flock(&self.current, FlockOperation::LockExclusive)?;
        let turned = (|| {
            if self.current.metadata()?.len().saturating_add(coming) <= self.limit {
                // Another keeper of the same log was first.
                return Ok(());
            }
            self.older.set_len(0)?;
            self.current.seek(SeekFrom::Start(0))?;
            io::copy(&mut (&self.current).take(self.limit), &mut self.older)?;
            self.current.set_len(0)
        })();
        rustix::fs::flock(&self.current, FlockOperation::Unlock)?;
        turned
    }
}

/// What a guest may have put into a log, so that it can be shown on a terminal as it is.
fn harmless(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let mut shown = String::with_capacity(text.len());
    for part in text.split_inclusive('\n') {
        let line = part.strip_suffix('\n');
        shown.push_str(&hostile::visible(line.unwrap_or(part)));
        shown.extend(line.map(|_| '\n'));
    }
    shown
}

fn close_all_but(own: &[RawFd]) {
    let open: Vec<RawFd> = match std::fs::read_dir("/proc/self/fd") {
        Ok(entries) => entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect(),
        Err(_) => (0..1_024).collect(),
    };
    open.into_iter().filter(|fd| !own.contains(fd)).for_each(close);
}

#[expect(unsafe_code, reason = "descriptors inherited by number have no owner in this process")]
fn close(fd: RawFd) {
    // SAFETY: nothing uses the descriptor any more: this process has one thread, which from here on uses the keeper's own only. One that
    // is closed already gives EBADF.
    unsafe { libc::close(fd) };
}

/// Gives up what the keeper was born with: it can then read, write and shorten what it holds, and nothing else.
fn renounce() -> Result<(), CallsError> {
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    // Without them it still cannot do anything: see the filter.
    let _ = rustix::thread::set_capabilities(None, none);
    let _ = rustix::process::setsid();
    let own = [
        libc::SYS_lseek,
        libc::SYS_ftruncate,
        libc::SYS_flock,
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
        libc::SYS_copy_file_range,
        libc::SYS_sendfile,
        libc::SYS_splice,
    ];
    calls::only(&[calls::LIVING, &own].concat(), &calls::living_rules()?)
}

/// A pipe from the program to its keeper: the program's end never waits.
pub(super) fn pipe() -> io::Result<(File, OwnedFd)> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    rustix::fs::fcntl_setfl(&writer, rustix::fs::OFlags::NONBLOCK)?;
    Ok((reader.into(), writer))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(dir: &std::path::Path, name: &str) -> File {
        File::options().create(true).read(true).append(true).open(dir.join(name)).expect("a log")
    }

    #[test]
    fn a_log_never_outgrows_its_limit_and_loses_the_oldest_first() {
        let dir = tempfile::tempdir().expect("a directory");
        let (said, _writer) = pipe().expect("a pipe");
        let mut keeper = Keeper { said, current: log(dir.path(), "current"), older: log(dir.path(), "older"), limit: 40 };
        for number in 0..3 {
            keeper.keep(format!("line {number} of a log\n").as_bytes()).expect("kept");
        }
        let text = |name| std::fs::read_to_string(dir.path().join(name)).expect("text");
        assert_eq!(text("older"), "line 0 of a log\nline 1 of a log\n");
        assert_eq!(text("current"), "line 2 of a log\n");
    }

    #[test]
    fn what_a_guest_makes_qemu_say_cannot_act_on_a_terminal() {
        assert_eq!(harmless(b"a\n\x1b]0;owned\x07\nb\xff"), "a\n\\u{1b}]0;owned\\u{7}\nb\u{fffd}");
        assert_eq!(harmless(b"\n\n"), "\n\n");
    }

    #[test]
    fn a_program_does_not_wait_for_its_keeper() {
        let (_said, writer) = pipe().expect("a pipe");
        let mut writer = File::from(writer);
        let mut taken = 0;
        let refused = loop {
            match writer.write(&[b'x'; 4_096]) {
                Ok(count) => taken += count,
                Err(error) => break error,
            }
            assert!(taken < 16 << 20);
        };
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
    }
}
