//! What guests say on their consoles, heard all the time: a kernel that panics says why once, and is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use godwit_lab::layout::RUN_ROOT;
use godwit_model::VmId;

/// So much of what a guest said last is kept.
const KEPT: usize = 256 << 10;
/// So many digits of a VM's id name its directory on a host.
const DIRECTORY: usize = 12;
/// Between two looks for new consoles. What is said before anybody listens is lost.
const LOOK: Duration = Duration::from_millis(10);
/// What a guest says once a second is told of no more often than this.
const STATUS: &str = "\"event\":\"status\"";
const STATUSES: usize = 3;

/// Listens to the consoles of VMs of a lab until it is dropped. A console has one listener: whoever follows a VM takes it from everybody else.
pub(crate) struct Consoles {
    shared: Arc<Shared>,
    listener: Option<JoinHandle<()>>,
}

struct Shared {
    root: PathBuf,
    stop: AtomicBool,
    /// Directories of the VMs that are followed.
    followed: Mutex<BTreeSet<String>>,
    /// By the directory of the VM, which is named alike on every host.
    said: Mutex<BTreeMap<String, Vec<u8>>>,
}

impl Consoles {
    pub(crate) fn of(lab: &str) -> Self {
        let root = Path::new(RUN_ROOT).join(lab);
        let shared = Arc::new(Shared { root, stop: AtomicBool::new(false), followed: Mutex::default(), said: Mutex::default() });
        let listening = Arc::clone(&shared);
        Self { shared, listener: Some(thread::spawn(move || listening.listen())) }
    }

    /// From here on what this VM says is heard, on whichever host.
    pub(crate) fn follow(&self, vm: VmId) {
        let dir: String = vm.uuid().simple().to_string().chars().take(DIRECTORY).collect();
        self.shared.followed.lock().unwrap_or_else(PoisonError::into_inner).insert(dir);
    }

    /// Everything that is kept, by VM.
    pub(crate) fn said(&self) -> BTreeMap<String, String> {
        let said = self.shared.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.iter().map(|(vm, said)| (vm.clone(), String::from_utf8_lossy(said).into_owned())).collect()
    }

    /// As [`Self::said`], without most of what guests say all the time.
    pub(crate) fn in_short(&self) -> BTreeMap<String, String> {
        self.said().into_iter().map(|(vm, said)| (vm, in_short(&said))).collect()
    }
}

impl Drop for Consoles {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(listener) = self.listener.take() {
            let _ = listener.join();
        }
    }
}

impl Shared {
    fn listen(&self) {
        let mut open: BTreeMap<PathBuf, UnixStream> = BTreeMap::new();
        while !self.stop.load(Ordering::Relaxed) {
            for console in self.consoles() {
                if !open.contains_key(&console)
                    && let Ok(stream) = UnixStream::connect(&console)
                    && stream.set_nonblocking(true).is_ok()
                {
                    open.insert(console, stream);
                }
            }
            open.retain(|console, stream| self.hear(console, stream));
            thread::sleep(LOOK);
        }
    }

    fn consoles(&self) -> impl Iterator<Item = PathBuf> {
        let followed = self.followed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let dirs = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect::<Vec<_>>();
        dirs(&self.root)
            .into_iter()
            .flat_map(move |host| dirs(&host))
            .filter(move |vm| {
                let name = vm.file_name().unwrap_or_default();
                followed.contains(&*name.to_string_lossy())
            })
            .map(|vm| vm.join("console"))
            .filter(|socket| socket.exists())
    }

    /// Takes what there is; whether there may be more later.
    fn hear(&self, console: &Path, mut stream: &UnixStream) -> bool {
        let vm = console.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
        let mut piece = [0; 4096];
        loop {
            match stream.read(&mut piece) {
                Ok(0) => return false,
                Ok(length) => {
                    let mut all = self.said.lock().unwrap_or_else(PoisonError::into_inner);
                    let said = all.entry(vm.clone()).or_default();
                    said.extend_from_slice(&piece[..length]);
                    let beyond = said.len().saturating_sub(KEPT);
                    said.drain(..beyond);
                }
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            }
        }
    }
}

fn in_short(said: &str) -> String {
    let lines: Vec<&str> = said.lines().collect();
    let statuses = lines.iter().filter(|line| line.contains(STATUS)).count();
    let mut seen = 0;
    let told = lines.into_iter().filter(|line| {
        let is_status = line.contains(STATUS);
        seen += usize::from(is_status);
        !is_status || seen + STATUSES > statuses
    });
    told.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_what_is_said_all_the_time_the_last_is_told() {
        let said: String = (0..9).map(|number| format!("{{{STATUS},{number}}}\n")).collect();
        let said = format!("ready\n{said}Kernel panic\n");
        let told = in_short(&said);
        assert_eq!(told.lines().count(), 2 + STATUSES);
        assert!(told.starts_with("ready\n") && told.ends_with(",8}\nKernel panic"), "{told}");
    }
}
