//! Working inside a network namespace, on a thread of its own.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::LabError;

/// Where `ip netns` keeps the names.
pub(crate) const NAMES: &str = "/run/netns";

/// The file that stands for a namespace.
pub(crate) fn path(name: &str) -> PathBuf {
    Path::new(NAMES).join(name)
}

/// Runs `work` on a fresh thread inside the network namespace `name`.
///
/// Sockets made there stay in that namespace and may be returned; a process started there lives in it. The caller's
/// own threads are not moved. Unlike `ip netns exec`, mounts stay as they are.
///
/// # Errors
/// [`LabError::Namespace`] when there is no such namespace or it may not be entered.
///
/// # Panics
/// Passes on a panic of `work`.
pub fn in_namespace<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> Result<T, LabError> {
    let failed = |source: io::Error| LabError::Namespace { name: name.to_owned(), source };
    let file = File::open(path(name)).map_err(failed)?;
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok::<T, io::Error>(work())
        });
        match worker.join() {
            Ok(result) => result.map_err(failed),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
