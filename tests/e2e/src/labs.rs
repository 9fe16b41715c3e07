//! The labs of this process: how they are called, and that they go with it.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use godwit_lab::{Lab, LabSpec};
use tokio::runtime::Runtime;

/// A name that shows whose lab it is.
pub(crate) fn free_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("e{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Namespaces and links without daemons; whatever runs in them goes with them.
pub(crate) struct OwnedNetwork {
    lab: Lab,
    /// Hears the signals.
    _runtime: Runtime,
    removed: bool,
}

impl OwnedNetwork {
    /// Builds them.
    pub(crate) fn up(spec: LabSpec) -> Result<Self> {
        remove_abandoned();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        runtime.spawn(clean_up_when_told_to_end(spec.name.clone()));
        Ok(Self { lab: Lab::up_network(spec)?, _runtime: runtime, removed: false })
    }

    pub(crate) fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Takes everything down.
    pub(crate) fn down(mut self) -> Result<()> {
        self.removed = true;
        Lab::remove(self.lab.name())?;
        Ok(())
    }
}

impl Drop for OwnedNetwork {
    fn drop(&mut self) {
        if !self.removed
            && let Err(error) = Lab::remove(self.lab.name())
        {
            eprintln!("lab {} is not gone: {error}", self.lab.name());
        }
    }
}

/// Labs of test processes that are gone: killed before they could clean up.
pub(crate) fn remove_abandoned() {
    for lab in Lab::list() {
        let pid = lab.strip_prefix('e').and_then(|rest| rest.split_once('-')).and_then(|(pid, _)| pid.parse::<u32>().ok());
        if pid.is_some_and(|pid| !PathBuf::from(format!("/proc/{pid}")).exists()) {
            // Another test may be removing it right now.
            let _ = Lab::remove(&lab);
        }
    }
}

/// On Ctrl-C, or when the runner of tests ends a test that hangs, the lab goes first.
pub(crate) async fn clean_up_when_told_to_end(lab: String) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) else { return };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    eprintln!("told to end: removes lab {lab}");
    let removed = tokio::task::spawn_blocking(move || {
        // Whoever builds it at this moment holds its lock, for up to a minute.
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            match Lab::remove(&lab) {
                Err(_) if Instant::now() < deadline => {}
                other => return other.map_err(|error| eprintln!("lab {lab} is not gone: {error}")),
            }
        }
    });
    let _ = removed.await;
    std::process::exit(130);
}
