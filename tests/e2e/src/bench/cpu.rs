//! What a move costs in CPU time: everything that runs on the hosts of a lab, without vCPUs, whose work is the guest's.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use godwit_lab::HostStatus;

use crate::processes::UIDS;

/// A process that ends loses what it used since it was last looked at.
const LOOK: Duration = Duration::from_millis(100);
/// `USER_HZ`, the same on every machine that we run on.
const TICKS_PER_SECOND: f64 = 100.0;
/// How often a process may be found to be none of ours before that is taken for settled: users are changed soon after a start.
const DOUBTS: u8 = 10;

/// Counts from its start to its end.
pub(super) struct CpuWatch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl CpuWatch {
    /// Counts from now on.
    pub(super) fn start(hosts: &[HostStatus]) -> Result<Self> {
        let namespaces = hosts.iter().filter_map(|host| inode(&Path::new("/run/netns").join(&host.namespace))).collect();
        let uids = hosts.iter().map(|host| host.uid_base..host.uid_base + UIDS).collect();
        let mut count = Count { namespaces, uids, used: HashMap::new(), doubts: HashMap::new() };
        count.look();
        for used in count.used.values_mut() {
            used.before = used.now;
        }
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = thread::Builder::new().name("cpu".into()).spawn(move || {
            while !told.load(Ordering::Relaxed) {
                thread::sleep(LOOK);
                count.look();
            }
            count.used.values().map(|used| used.now.saturating_sub(used.before)).sum()
        })?;
        Ok(Self { stop, thread })
    }

    /// Seconds since the start.
    pub(super) fn end(self) -> Result<f64> {
        self.stop.store(true, Ordering::Relaxed);
        let ticks = self.thread.join().ok().context("the count of CPU time")?;
        Ok(ticks as f64 / TICKS_PER_SECOND)
    }
}

struct Count {
    namespaces: HashSet<u64>,
    uids: Vec<Range<u32>>,
    used: HashMap<u32, Used>,
    doubts: HashMap<u32, u8>,
}

#[derive(Default)]
struct Used {
    before: u64,
    now: u64,
}

impl Count {
    fn look(&mut self) {
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            if !self.used.contains_key(&pid) && !self.is_ours(pid, &entry.path()) {
                continue;
            }
            // A process that has ended keeps its last count.
            if let Some(ticks) = of_process(&entry.path()) {
                self.used.entry(pid).or_default().now = ticks;
            }
        }
    }

    fn is_ours(&mut self, pid: u32, process: &Path) -> bool {
        let doubts = self.doubts.entry(pid).or_default();
        if *doubts >= DOUBTS {
            return false;
        }
        *doubts += 1;
        let by_namespace = inode(&process.join("ns/net")).is_some_and(|inode| self.namespaces.contains(&inode));
        let by_user = || real_uid(process).is_some_and(|uid| self.uids.iter().any(|uids| uids.contains(&uid)));
        // The link's own delay is no part of a move.
        (by_namespace || by_user()) && !fs::read(process.join("cmdline")).is_ok_and(|line| is_relay(&line))
    }
}

fn is_relay(command: &[u8]) -> bool {
    command.split(|byte| *byte == 0).take(3).any(|word| word.ends_with(b"relay"))
}

fn inode(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|metadata| metadata.ino())
}

fn real_uid(process: &Path) -> Option<u32> {
    let status = fs::read_to_string(process.join("status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().next()?.parse().ok()
}

/// Ticks of a process, its ended threads included, without its vCPUs.
fn of_process(process: &Path) -> Option<u64> {
    let (_, all) = name_and_ticks(&fs::read_to_string(process.join("stat")).ok()?)?;
    let threads = fs::read_dir(process.join("task")).ok()?.flatten();
    let of_thread = |thread: fs::DirEntry| name_and_ticks(&fs::read_to_string(thread.path().join("stat")).ok()?);
    let vcpus: u64 = threads.filter_map(of_thread).filter(|(name, _)| is_vcpu(name)).map(|(_, ticks)| ticks).sum();
    Some(all.saturating_sub(vcpus))
}

/// QEMU calls them `CPU 0/TCG` or `CPU 0/KVM`.
fn is_vcpu(name: &str) -> bool {
    name.strip_prefix("CPU ").is_some_and(|rest| rest.starts_with(|digit: char| digit.is_ascii_digit()))
}

/// Of a line of `/proc/PID/stat`: the name in parentheses, and user and system time together.
fn name_and_ticks(stat: &str) -> Option<(String, u64)> {
    let (open, close) = (stat.find('(')?, stat.rfind(')')?);
    let name = stat.get(open + 1..close)?.to_owned();
    let mut fields = stat.get(close + 1..)?.split_whitespace();
    let user: u64 = fields.nth(11)?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some((name, user + system))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_thread_is_read() {
        let stat = "42 (CPU 0/TCG) S 7 42 42 0 -1 4194560 1 0 0 0 120 30 5 5 20 0 1 0 987654 1 1";
        assert_eq!(name_and_ticks(stat), Some(("CPU 0/TCG".to_owned(), 150)));
        assert!(is_vcpu("CPU 0/TCG") && is_vcpu("CPU 11/KVM"));
        assert!(!is_vcpu("live_migration") && !is_vcpu("CPU throttle"));
        for end in 0..=stat.find(" 30 ").unwrap() {
            assert_eq!(name_and_ticks(&stat[..end]), None, "{end}");
        }
    }

    #[test]
    fn the_relay_of_a_link_is_known() {
        assert!(is_relay(b"/x/godwit\0lab\0relay\0--delay\0"));
        assert!(!is_relay(b"/x/godwit\0agent\0"));
    }
}
