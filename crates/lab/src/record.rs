//! The record of a lab: what was asked for and what was started, written before or right after each step.
//!
//! The file is replaced as a whole, so a crash leaves the old or the new one. A process that was started but not yet
//! recorded is found by `down` in the lab's namespaces.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::layout::{Paths, RUN_ROOT, STATE_ROOT, UID_SLOTS};
use crate::link::Link;
use crate::process::ProcessRef;
use crate::{LabError, LabSpec};

/// How long an operation waits for another one on the same lab.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

/// The role of the controller in [`Record::processes`]; agents go by the name of their host.
pub(crate) const CONTROLLER: &str = "controller";

/// What is known about a lab.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    /// What was asked for.
    pub(crate) spec: LabSpec,
    /// The boot in which the processes were started: pids of another boot mean nothing.
    pub(crate) boot: String,
    /// Which range of user ids is the lab's.
    pub(crate) uid_slot: u32,
    /// The port of the API, once it is bound.
    pub(crate) api_port: Option<u16>,
    /// The link of each host and of the outside client.
    pub(crate) links: BTreeMap<String, Link>,
    /// The daemons by role.
    pub(crate) processes: BTreeMap<String, ProcessRef>,
    /// Whether `up` came to its end.
    pub(crate) complete: bool,
}

impl Record {
    pub(crate) fn paths(&self) -> Paths {
        Paths::new(&self.spec.name, self.spec.dir.as_deref())
    }

    /// Reads the record of the lab `name`; `None` when there is no such lab.
    pub(crate) fn load(name: &str) -> Result<Option<Self>, LabError> {
        let path = Paths::new(name, None).record();
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(LabError::file("read", path)(error)),
        };
        serde_json::from_slice(&text).map(Some).map_err(|source| LabError::Record { path, source })
    }

    /// Replaces the record on disk.
    pub(crate) fn save(&self) -> Result<(), LabError> {
        let path = self.paths().record();
        let new = path.with_extension("new");
        let text = serde_json::to_vec_pretty(self).map_err(|source| LabError::Record { path: path.clone(), source })?;
        let write = || {
            let mut file = File::create(&new)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        write().map_err(LabError::file("write", &path))
    }

    /// Whether the recorded processes can still be running.
    pub(crate) fn is_of_this_boot(&self) -> bool {
        self.boot == boot_id()
    }

    /// The process in a role, if it runs.
    pub(crate) fn running(&self, role: &str) -> Option<ProcessRef> {
        let process = *self.processes.get(role)?;
        (self.is_of_this_boot() && process.is_running()).then_some(process)
    }
}

/// Names this boot of the machine.
pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()).unwrap_or_default()
}

/// The names of all recorded labs.
pub(crate) fn names() -> Vec<String> {
    let Ok(entries) = fs::read_dir(STATE_ROOT) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| Paths::new(name, None).record().is_file())
        .collect();
    names.sort();
    names
}

/// Finds a range of user ids that no recorded lab has. Call with the lock of [`lock_all`] held until the record is saved.
pub(crate) fn free_uid_slot(name: &str) -> u32 {
    let taken: Vec<u32> =
        names().iter().filter(|other| *other != name).filter_map(|other| Some(Record::load(other).ok()??.uid_slot)).collect();
    // Start at a place of its own (FNV-1a), so that a lab usually has the same ids each time.
    let start = name.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let start = start % UID_SLOTS;
    (start..UID_SLOTS).chain(0..start).find(|slot| !taken.contains(slot)).unwrap_or(start)
}

/// Held while a process works on a lab. What is locked for a lab that is not, or no longer, there goes with the lock.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
    lab: Option<Paths>,
}

/// Locks one lab.
pub(crate) fn lock(name: &str) -> Result<Lock, LabError> {
    let create = |path: &Path| {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(RUN_ROOT)?;
        File::create(path)
    };
    let paths = Paths::new(name, None);
    let file = lock_path(&paths.lock(), name, create)?;
    Ok(Lock { file, lab: Some(paths) })
}

/// Locks what all labs share: the ranges of user ids, and the directories above all labs.
pub(crate) fn lock_all() -> Result<Lock, LabError> {
    let create = |path: &Path| {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(path)?;
        File::open(path)
    };
    Ok(Lock { file: lock_path(Path::new(STATE_ROOT), "(all)", create)?, lab: None })
}

fn lock_path(path: &Path, name: &str, open: impl Fn(&Path) -> io::Result<File>) -> Result<File, LabError> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        let file = match open(path) {
            Ok(file) => file,
            // The last lab to go takes the directory with it, perhaps just now.
            Err(error) if error.kind() == io::ErrorKind::NotFound && Instant::now() < deadline => continue,
            Err(error) => return Err(LabError::file("open", path)(error)),
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                // `down` removes what is locked while it holds the lock: a lock on a removed file is worth nothing.
                let held = file.metadata().map_err(LabError::file("look at", path))?;
                if fs::metadata(path).is_ok_and(|now| now.ino() == held.ino() && now.dev() == held.dev()) {
                    return Ok(file);
                }
            }
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                // flock has no deadline of its own; this is the retry interval of one.
                thread::sleep(Duration::from_millis(50));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(LabError::Busy { name: name.to_owned() }),
            Err(error) => return Err(LabError::file("lock", path)(error.into())),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Some(paths) = self.lab.as_ref().filter(|paths| !paths.record().exists()) {
            // Still locked: whoever waits for it will see that the file is gone, and make a new one.
            let _ = fs::remove_file(paths.lock());
            let _ = fs::remove_dir(RUN_ROOT);
        }
        // Closing would do, if no child had inherited the descriptor between fork and exec.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

/// Makes a directory and its parents, if they are not there.
pub(crate) fn make_dir(path: &Path, mode: u32) -> Result<(), LabError> {
    fs::DirBuilder::new().recursive(true).mode(mode).create(path).map_err(LabError::file("create", path))
}
