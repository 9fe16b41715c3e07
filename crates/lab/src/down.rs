//! Taking a lab down, whatever is left of it: processes, namespaces, control groups, mounts, directories, in this order.
//! The record goes last, so that a crash in between is repaired by doing it again.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;

use crate::layout::{self, Paths, STATE_ROOT};
use crate::process::{self, Marks, ProcessRef};
use crate::record::{self, Record};
use crate::{LabError, namespace, network};

/// How long a killed process may take to end; one in the kernel's hands can take a while.
const EXIT_PATIENCE: Duration = Duration::from_secs(10);
/// How often new processes of the lab are looked for: one may start another while it is being killed.
const PASSES: usize = 20;

/// What was there to remove.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Removed {
    /// Processes that were killed.
    pub processes: usize,
    /// Namespaces that were removed.
    pub namespaces: usize,
}

/// Removes the lab and waits for whoever works on it.
pub(crate) fn remove(name: &str) -> Result<Removed, LabError> {
    if !rustix::process::geteuid().is_root() {
        return Err(LabError::NotRoot);
    }
    let _lock = record::lock(name)?;
    remove_locked(name)
}

/// Removes the lab; the caller holds its lock.
pub(crate) fn remove_locked(name: &str) -> Result<Removed, LabError> {
    // A damaged record is as good as none: names, control groups and namespaces follow from the lab's name.
    let record = Record::load(name).ok().flatten();
    let paths = record.as_ref().map_or_else(|| Paths::new(name, None), Record::paths);
    let namespaces = network::existing(name);
    let cgroups = cgroup_roots(name);
    let marks = Marks {
        namespaces: namespaces.iter().map(|name| namespace::path(name)).collect(),
        uids: record.as_ref().map_or(0..0, |record| layout::lab_uids(record.uid_slot)),
        cgroups: cgroups.iter().flat_map(|root| tree(root)).collect(),
        recorded: record.as_ref().map(recorded_processes).unwrap_or_default(),
    };
    let processes = kill(name, &marks)?;
    namespaces.iter().try_for_each(|name| network::remove(name))?;
    cgroups.iter().try_for_each(|root| remove_cgroups(root))?;
    remove_directories(&paths, record.as_ref())?;
    let _all = record::lock_all()?;
    // Empty after the last lab only.
    let _ = fs::remove_dir(STATE_ROOT);
    Ok(Removed { processes, namespaces: namespaces.len() })
}

fn recorded_processes(record: &Record) -> Vec<ProcessRef> {
    if !record.is_of_this_boot() {
        return Vec::new();
    }
    let relays = record.links.values().filter_map(|link| link.relay).map(|relay| relay.process);
    record.processes.values().copied().chain(relays).collect()
}

fn kill(name: &str, marks: &Marks) -> Result<usize, LabError> {
    let mut killed = 0;
    for _ in 0..PASSES {
        let found = freeze(marks)?;
        if found.is_empty() {
            return Ok(killed);
        }
        killed += found.len();
        for process in &found {
            process.signal(Signal::KILL)?;
        }
        found.iter().try_for_each(|process| process.wait_exit(EXIT_PATIENCE))?;
    }
    let left: Vec<String> = process::find(marks).iter().map(|process| format!("process {}", process.pid)).collect();
    Err(LabError::Leftovers { name: name.to_owned(), left: left.join(", ") })
}

/// Finds all processes of the lab and stops them. Killing a parent while it starts a child could lose sight of the child, which
/// may have no mark of its own yet; a stopped parent stays its parent.
fn freeze(marks: &Marks) -> Result<BTreeSet<ProcessRef>, LabError> {
    let deadline = Instant::now() + EXIT_PATIENCE;
    let mut stopped = BTreeSet::new();
    loop {
        // Before looking: what it starts after that is seen in the next round.
        let still = stopped.iter().copied().all(ProcessRef::is_still);
        let new: Vec<ProcessRef> = process::find(marks).into_iter().filter(|process| !stopped.contains(process)).collect();
        for process in &new {
            process.signal(Signal::STOP)?;
        }
        let settled = still && new.is_empty();
        stopped.extend(new);
        // One that will not stand still in time is killed all the same.
        if settled || Instant::now() > deadline {
            return Ok(stopped);
        }
    }
}

/// The lab's directory in every mounted hierarchy of control groups that has one.
fn cgroup_roots(name: &str) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let (target, kind) = (fields.nth(1)?, fields.next()?);
            matches!(kind, "cgroup" | "cgroup2").then(|| Path::new(target).join(layout::cgroup(name)))
        })
        .filter(|root| root.is_dir())
        .collect()
}

/// A directory and all below it, children first.
fn tree(root: &Path) -> Vec<PathBuf> {
    let children = fs::read_dir(root).into_iter().flatten().filter_map(Result::ok);
    let mut all: Vec<PathBuf> =
        children.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).flat_map(|entry| tree(&entry.path())).collect();
    all.push(root.to_path_buf());
    all
}

fn remove_cgroups(root: &Path) -> Result<(), LabError> {
    let deadline = Instant::now() + EXIT_PATIENCE;
    for dir in tree(root) {
        loop {
            match fs::remove_dir(&dir) {
                Ok(()) => break,
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                // The kernel lets go of a group a moment after its last process has ended, and tells nobody.
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(20));
                }
                Err(error) => return Err(LabError::file("remove", dir)(error)),
            }
        }
    }
    Ok(())
}

fn remove_directories(paths: &Paths, record: Option<&Record>) -> Result<(), LabError> {
    unmount_below(&[&paths.run(), &paths.home(), paths.data()])?;
    remove_path(&paths.run())?;
    if let Some(record) = record.filter(|record| record.spec.dir.is_some()) {
        // A directory of the user's: only what the lab made in it.
        for host in record.spec.host_names() {
            remove_path(&paths.host(&host))?;
            remove_path(&paths.relay_log(&host))?;
        }
        for own in [paths.controller_data(), paths.controller_log(), paths.relay_log(layout::OUTSIDE), paths.pool()] {
            remove_path(&own)?;
        }
        // Whatever else is in it is not ours.
        let _ = fs::remove_dir(paths.data());
    }
    // The record goes after everything that is found by it; the rest of its directory no longer matters.
    let home = paths.home();
    for entry in fs::read_dir(&home).into_iter().flatten().filter_map(Result::ok) {
        if entry.path() != paths.record() {
            remove_path(&entry.path())?;
        }
    }
    remove_path(&home)?;
    Ok(())
}

/// Removes a file or a whole directory; a symbolic link is removed, not followed.
fn remove_path(path: &Path) -> Result<(), LabError> {
    let result = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(LabError::file("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Detaches what is mounted below `roots`, so that removing them never reaches into another file system.
fn unmount_below(roots: &[&Path]) -> Result<(), LabError> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(LabError::file("read", "/proc/self/mountinfo"))?;
    let targets = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape);
    let below: Vec<PathBuf> =
        targets.filter(|target| roots.iter().any(|root| target.starts_with(root) && target != root)).collect();
    // The last mounted is the first to go.
    for target in below.iter().rev() {
        unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
            .map_err(|error| LabError::file("unmount", target)(error.into()))?;
    }
    Ok(())
}

/// Undoes the octal escapes of /proc/self/mountinfo.
fn unescape(text: &str) -> PathBuf {
    let mut path = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        path.push_str(before);
        match after.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                path.push(char::from(byte));
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                path.push('\\');
                rest = after;
            }
        }
    }
    path.push_str(rest);
    PathBuf::from(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_of_the_mount_table_are_undone() {
        for (text, path) in [("/a", "/a"), ("/a\\040b", "/a b"), ("/a\\134\\011", "/a\\\t"), ("/a\\", "/a\\")] {
            assert_eq!(unescape(text), Path::new(path));
        }
    }
}
