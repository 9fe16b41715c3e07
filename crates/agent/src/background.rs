//! Work that may wait: on a thread of its own, of the lowest priority, so that VMs and moves come first.

use std::io;

const LEAST_PRIORITY: i32 = 19;

/// Starts a thread of this name.
pub(crate) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let body = move || {
        // Of this thread alone, as Linux has it. If that cannot be, the work is done all the same.
        let _ = rustix::process::setpriority_process(None, LEAST_PRIORITY);
        work();
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(body).map(drop)
}
