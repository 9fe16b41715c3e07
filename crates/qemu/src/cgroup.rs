//! A cgroup (version 2) per VM, with the VM's limits where the host has the controllers, and a list of what could not be applied where it
//! has not: on a host with the old hierarchy that list is part of the host's status, not a reason to refuse VMs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use godwit_model::Bytes;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

/// What a VM's processes may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupLimits {
    /// Most memory, the guest's RAM and QEMU's own.
    pub memory_max: Option<Bytes>,
    /// Most processes and threads.
    pub pids_max: Option<u32>,
    /// Share of the CPUs when they are short, 1 to 10,000, usually 100.
    pub cpu_weight: Option<u32>,
}

impl CgroupLimits {
    /// For a VM with this much RAM: half a GiB and an eighth more for QEMU itself, its page tables and a migration.
    #[must_use]
    pub fn for_ram(ram: Bytes) -> Self {
        let overhead = ram.get() / 8 + (512 << 20);
        Self { memory_max: Some(Bytes(ram.get().saturating_add(overhead))), pids_max: Some(1_024), cpu_weight: Some(100) }
    }
}

/// A limit that this host cannot enforce.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unapplied {
    /// Which, as the file is called: `memory.max`.
    pub limit: String,
    /// Why.
    pub reason: String,
}

/// Why there is no cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No mount of cgroup version 2.
    #[error("this host has no cgroup version 2 mounted")]
    NoHierarchy,
    /// The operating system refused.
    #[error("cannot {step} {}", path.display())]
    Refused {
        /// What.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Processes in it did not end.
    #[error("processes in {} did not end within {limit:?}", path.display())]
    Alive {
        /// The group.
        path: PathBuf,
        /// How long was waited.
        limit: Duration,
    },
}

/// Where this host has cgroup version 2.
///
/// # Errors
/// [`CgroupError::NoHierarchy`].
pub fn hierarchy() -> Result<PathBuf, CgroupError> {
    let mounts = fs::read_to_string("/proc/self/mounts").map_err(|_| CgroupError::NoHierarchy)?;
    mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find_map(|fields| (*fields.get(2)? == "cgroup2").then(|| PathBuf::from(fields.get(1).copied().unwrap_or_default())))
        .ok_or(CgroupError::NoHierarchy)
}

/// The cgroup of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmCgroup {
    path: PathBuf,
}

impl VmCgroup {
    /// The one called `name` under `parent` (a path in the hierarchy), which may or may not exist.
    #[must_use]
    pub fn at(parent: &Path, name: &str) -> Self {
        Self { path: parent.join(name) }
    }

    /// Makes the group and its parents and applies `limits` as far as the host has the controllers.
    ///
    /// # Errors
    /// See [`CgroupError`]; a limit that cannot be applied is no error.
    pub fn create(parent: &Path, name: &str, limits: CgroupLimits) -> Result<(Self, Vec<Unapplied>), CgroupError> {
        let group = Self::at(parent, name);
        let root = hierarchy()?;
        fs::create_dir_all(&group.path).map_err(|source| CgroupError::Refused {
            step: "make",
            path: group.path.clone(),
            source,
        })?;
        let wanted = [
            ("memory", "memory.max", limits.memory_max.map(|bytes| bytes.get().to_string())),
            ("pids", "pids.max", limits.pids_max.map(|count| count.to_string())),
            ("cpu", "cpu.weight", limits.cpu_weight.map(|weight| weight.to_string())),
        ];
        let mut unapplied = Vec::new();
        for (controller, file, value) in wanted {
            let Some(value) = value else { continue };
            let applied = delegate(&root, parent, controller)
                .and_then(|()| fs::write(group.path.join(file), value).map_err(|error| error.to_string()));
            if let Err(reason) = applied {
                unapplied.push(Unapplied { limit: file.to_owned(), reason });
            }
        }
        Ok((group, unapplied))
    }

    /// Keeps its processes on these processors, and what the kernel sets aside for them on this memory node, where the host has the controller.
    ///
    /// # Errors
    /// What could not be applied.
    pub fn bind(&self, parent: &Path, cpus: &[u32], node: u32) -> Result<(), Unapplied> {
        let list: Vec<String> = cpus.iter().map(ToString::to_string).collect();
        let root = hierarchy().map_err(|error| Unapplied { limit: "cpuset.cpus".into(), reason: error.to_string() })?;
        for (file, value) in [("cpuset.cpus", list.join(",")), ("cpuset.mems", node.to_string())] {
            delegate(&root, parent, "cpuset")
                .and_then(|()| fs::write(self.path.join(file), value).map_err(|error| error.to_string()))
                .map_err(|reason| Unapplied { limit: file.into(), reason })?;
        }
        Ok(())
    }

    /// Sets how much memory it may use, where the host can say so: where it cannot, that was said when the group was made.
    ///
    /// # Errors
    /// See [`CgroupError`].
    pub fn limit_memory(&self, most: Bytes) -> Result<(), CgroupError> {
        let path = self.path.join("memory.max");
        if !path.exists() {
            return Ok(());
        }
        fs::write(&path, most.get().to_string()).map_err(|source| CgroupError::Refused { step: "write", path, source })
    }

    /// Its directory, for [`crate::cage::CagePlan::cgroup`].
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Kills what is left in it and removes it. That it is gone already is no error. Blocks up to `limit`.
    ///
    /// # Errors
    /// See [`CgroupError`].
    pub fn remove(&self, limit: Duration) -> Result<(), CgroupError> {
        let refused = |step| move |source| CgroupError::Refused { step, path: self.path.clone(), source };
        let deadline = Instant::now() + limit;
        loop {
            match fs::remove_dir(&self.path) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
                Err(error) => return Err(refused("remove")(error)),
            }
            fs::write(self.path.join("cgroup.kill"), "1").map_err(refused("kill the processes in"))?;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CgroupError::Alive { path: self.path.clone(), limit });
            }
            self.wait_for_change(left.min(Duration::from_millis(200))).map_err(refused("watch"))?;
        }
    }

    /// Waits until `cgroup.events` changes, which is how the kernel says that the group became empty.
    fn wait_for_change(&self, limit: Duration) -> io::Result<()> {
        use std::io::Read;
        let mut events = fs::File::open(self.path.join("cgroup.events"))?;
        let mut text = String::new();
        events.read_to_string(&mut text)?;
        if text.contains("populated 0") {
            return Ok(());
        }
        let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&limit)) {
            // The caller looks again anyway.
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Hands `controller` down from the root to the children of `parent`.
fn delegate(root: &Path, parent: &Path, controller: &str) -> Result<(), String> {
    let below = parent.strip_prefix(root).map_err(|_| format!("{} is not in {}", parent.display(), root.display()))?;
    let mut path = root.to_owned();
    for name in std::iter::once(None).chain(below.components().map(Some)) {
        if let Some(name) = name {
            path.push(name);
        }
        let available = fs::read_to_string(path.join("cgroup.controllers")).map_err(|error| error.to_string())?;
        if !available.split_whitespace().any(|word| word == controller) {
            return Err(format!(
                "the {controller} controller is not available in {} (another hierarchy may hold it)",
                path.display()
            ));
        }
        fs::write(path.join("cgroup.subtree_control"), format!("+{controller}"))
            .map_err(|error| format!("{} does not hand down the {controller} controller: {error}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    struct Cleanup(PathBuf, Option<Child>);

    impl Drop for Cleanup {
        fn drop(&mut self) {
            if let Some(child) = &mut self.1 {
                let _ = child.kill();
                let _ = child.wait();
            }
            let _ = fs::remove_dir(self.0.join("vm1"));
            let _ = fs::remove_dir(&self.0);
        }
    }

    #[test]
    fn memory_is_limited_where_the_group_can_and_binding_says_why_it_cannot_be() {
        let dir = tempfile::tempdir().expect("a directory");
        let group = VmCgroup::at(dir.path(), "vm1");
        group.limit_memory(Bytes::GIB).expect("a host without the limit said so before");
        fs::create_dir(group.path()).expect("a directory");
        let file = group.path().join("memory.max");
        fs::write(&file, "max").expect("written");
        group.limit_memory(Bytes::GIB).expect("limited");
        assert_eq!(fs::read_to_string(&file).expect("read"), "1073741824");
        // No part of any hierarchy.
        let unapplied = group.bind(dir.path(), &[0], 0).expect_err("bound by nothing");
        assert!(unapplied.limit == "cpuset.cpus" && !unapplied.reason.is_empty(), "{unapplied:?}");
    }

    #[test]
    fn a_group_holds_what_it_can_says_what_it_cannot_and_is_removed_with_its_processes() {
        let Ok(root) = hierarchy() else {
            eprintln!("no cgroup version 2 here");
            return;
        };
        let parent = root.join(format!("godwit-test-{}", std::process::id()));
        let mut cleanup = Cleanup(parent.clone(), None);
        let limits = CgroupLimits::for_ram(Bytes::mib(256));
        let (group, unapplied) = VmCgroup::create(&parent, "vm1", limits).expect("a group");
        for (file, value) in [("memory.max", limits.memory_max.map(Bytes::get)), ("pids.max", limits.pids_max.map(u64::from))] {
            let refused = unapplied.iter().any(|entry| entry.limit == file && !entry.reason.is_empty());
            let applied =
                fs::read_to_string(group.path().join(file)).is_ok_and(|text| text.trim() == value.expect("set").to_string());
            assert!(refused != applied, "{file}: {unapplied:?}");
        }
        let child = Command::new("sleep").arg("600").spawn().expect("sleep");
        fs::write(group.path().join("cgroup.procs"), child.id().to_string()).expect("joined");
        cleanup.1 = Some(child);
        group.remove(Duration::from_secs(20)).expect("removed");
        assert!(!group.path().exists());
        group.remove(Duration::from_secs(1)).expect("removing twice is no error");
    }
}
