//! Processes by pid and start time, so that a reused pid is never taken for ours; and finding all processes of a lab.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal, waitpid};
use serde::{Deserialize, Serialize};

use crate::LabError;

/// One process of this boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct ProcessRef {
    pub(crate) pid: u32,
    /// Field 22 of /proc/PID/stat: clock ticks since boot.
    pub(crate) start: u64,
}

/// What /proc/PID/stat says.
#[derive(Debug, Clone, Copy)]
struct Stat {
    state: char,
    parent: u32,
    start: u64,
}

impl ProcessRef {
    /// The process that has this pid now.
    pub(crate) fn current(pid: u32) -> Option<Self> {
        read_stat(pid).map(|stat| Self { pid, start: stat.start })
    }

    /// Whether it still runs. A child of ours that has ended is reaped on the way.
    pub(crate) fn is_running(self) -> bool {
        self.reap();
        read_stat(self.pid).is_some_and(|stat| stat.start == self.start && !matches!(stat.state, 'Z' | 'X'))
    }

    /// Whether it cannot start others now: stopped, waiting for its own child to get going, or gone.
    pub(crate) fn is_still(self) -> bool {
        read_stat(self.pid).is_none_or(|stat| stat.start != self.start || matches!(stat.state, 'T' | 't' | 'D' | 'Z' | 'X'))
    }

    /// Sends a signal; `false` when the process is gone.
    pub(crate) fn signal(self, signal: Signal) -> Result<bool, LabError> {
        let Some(pidfd) = self.open()? else { return Ok(false) };
        match pidfd_send_signal(&pidfd, signal) {
            Ok(()) => Ok(true),
            Err(Errno::SRCH) => Ok(false),
            Err(error) => Err(self.error(error)),
        }
    }

    /// Waits until the process has ended.
    pub(crate) fn wait_exit(self, patience: Duration) -> Result<(), LabError> {
        let deadline = Instant::now() + patience;
        let Some(pidfd) = self.open()? else { return Ok(()) };
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // A duration of a caller's patience always fits; an endless one is as good as a year.
            let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 31_536_000, tv_nsec: 0 });
            match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
                Ok(0) => return Err(LabError::StillRunning { pid: self.pid, waited: patience }),
                Ok(_) => {
                    self.reap();
                    return Ok(());
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(self.error(error)),
            }
        }
    }

    /// A descriptor that stands for exactly this process, or `None` when it is gone.
    fn open(self) -> Result<Option<rustix::fd::OwnedFd>, LabError> {
        let Some(pid) = self.raw() else { return Ok(None) };
        match pidfd_open(pid, PidfdFlags::empty()) {
            // Looked at after the descriptor was opened: from here on the pid cannot be reused unnoticed.
            Ok(pidfd) => Ok(self.is_running().then_some(pidfd)),
            Err(Errno::SRCH | Errno::INVAL) => Ok(None),
            Err(error) => Err(self.error(error)),
        }
    }

    fn reap(self) {
        if let Some(pid) = self.raw() {
            // Not our child (ECHILD) is the usual case: the lab was started by another process.
            let _ = waitpid(Some(pid), WaitOptions::NOHANG);
        }
    }

    fn raw(self) -> Option<Pid> {
        Pid::from_raw(i32::try_from(self.pid).ok()?)
    }

    fn error(self, error: Errno) -> LabError {
        LabError::Process { pid: self.pid, source: io::Error::from(error) }
    }
}

fn read_stat(pid: u32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The command name may contain anything, so counting starts behind its last parenthesis.
fn parse_stat(text: &str) -> Option<Stat> {
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    let start = fields.nth(17)?.parse().ok()?;
    Some(Stat { state, parent, start })
}

/// By what the processes of a lab are known.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    /// Files that stand for the lab's network namespaces.
    pub(crate) namespaces: Vec<PathBuf>,
    /// The lab's user ids: QEMU may run in a network namespace of its own.
    pub(crate) uids: Range<u32>,
    /// Directories of the lab's control groups.
    pub(crate) cgroups: Vec<PathBuf>,
    /// Recorded daemons.
    pub(crate) recorded: Vec<ProcessRef>,
}

/// All running processes that carry a mark of the lab, and their descendants; never this process or its ancestors.
pub(crate) fn find(marks: &Marks) -> Vec<ProcessRef> {
    let inode = |path: &Path| fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let namespaces: Vec<_> = marks.namespaces.iter().filter_map(|path| inode(path)).collect();
    let in_cgroups: BTreeSet<u32> = marks.cgroups.iter().flat_map(|dir| cgroup_members(dir)).collect();
    let all = snapshot();
    let mut found: BTreeSet<u32> = BTreeSet::new();
    for (&pid, stat) in &all {
        let path = PathBuf::from(format!("/proc/{pid}"));
        let marked = in_cgroups.contains(&pid)
            || marks.recorded.contains(&ProcessRef { pid, start: stat.start })
            || inode(&path.join("ns/net")).is_some_and(|ns| namespaces.contains(&ns))
            || fs::metadata(&path).is_ok_and(|meta| marks.uids.contains(&meta.uid()))
            || real_uid(&path).is_some_and(|uid| marks.uids.contains(&uid));
        if marked {
            found.insert(pid);
        }
    }
    // Parents need not have smaller pids than their children, so go over the list until nothing is added.
    loop {
        let children: Vec<u32> =
            all.iter().filter(|(pid, stat)| !found.contains(pid) && found.contains(&stat.parent)).map(|(&pid, _)| pid).collect();
        if children.is_empty() {
            break;
        }
        found.extend(children);
    }
    let mut own = Some(std::process::id());
    while let Some(pid) = own {
        found.remove(&pid);
        own = all.get(&pid).map(|stat| stat.parent).filter(|&parent| parent != 0);
    }
    found.iter().filter_map(|pid| Some(ProcessRef { pid: *pid, start: all.get(pid)?.start })).collect()
}

/// All processes that have not ended.
fn snapshot() -> BTreeMap<u32, Stat> {
    let Ok(entries) = fs::read_dir("/proc") else { return BTreeMap::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, read_stat(pid)?)))
        .filter(|(_, stat)| !matches!(stat.state, 'Z' | 'X'))
        .collect()
}

/// The owner of /proc/PID is root for a process that may not be dumped, so ask for the real uid too.
fn real_uid(process: &Path) -> Option<u32> {
    let status = fs::read_to_string(process.join("status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().next()?.parse().ok()
}

fn cgroup_members(dir: &Path) -> Vec<u32> {
    let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_command_name_with_parentheses_and_spaces_does_not_shift_the_fields() {
        let text = "42 (a) b) (c) S 7 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 987654 1 1";
        let stat = parse_stat(text).expect("well formed");
        assert_eq!((stat.state, stat.parent, stat.start), ('S', 7, 987_654));
        for end in 0..60 {
            assert!(parse_stat(&text[..end]).is_none());
        }
    }

    #[test]
    fn a_reused_pid_is_not_ours() {
        let me = ProcessRef::current(std::process::id()).expect("this process runs");
        assert!(me.is_running());
        let other = ProcessRef { start: me.start + 1, ..me };
        assert!(!other.is_running());
        assert!(!other.signal(Signal::KILL).expect("nothing is sent"));
    }

    #[test]
    fn a_stopped_process_is_running_and_a_killed_one_is_reaped() {
        #[expect(clippy::zombie_processes, reason = "that it gets reaped is what this is about")]
        let child = Command::new("sleep").arg("1000").spawn().expect("sleep");
        let process = ProcessRef::current(child.id()).expect("it runs");
        assert!(process.signal(Signal::STOP).expect("sent"));
        assert!(process.is_running());
        assert!(matches!(process.wait_exit(Duration::ZERO), Err(LabError::StillRunning { .. })));
        assert!(process.signal(Signal::KILL).expect("sent"));
        process.wait_exit(Duration::from_secs(10)).expect("it ends");
        assert!(!process.is_running());
        assert!(read_stat(process.pid).is_none_or(|stat| stat.start != process.start));
    }

    #[test]
    fn this_process_is_never_found() {
        let me = ProcessRef::current(std::process::id()).expect("this process runs");
        let marks = Marks { recorded: vec![me], ..Marks::default() };
        assert!(!find(&marks).contains(&me));
    }
}
