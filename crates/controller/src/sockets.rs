//! Listeners: bound here, or handed over by whoever started us (LISTEN_FDS, LISTEN_FDNAMES, LISTEN_PID as systemd has them).

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// The first descriptor that is handed over.
const FIRST: RawFd = 3;
/// More than this many nobody hands over.
const MOST: RawFd = 16;

/// Sockets that were handed over, by name.
#[derive(Debug, Default)]
pub(crate) struct HandedOver(Vec<(String, TcpListener)>);

/// What the environment says about sockets, with the descriptors they have.
fn named(get: impl Fn(&str) -> Option<String>, pid: u32) -> Vec<(String, RawFd)> {
    // Absent: whoever started us meant us. Another's: it was inherited by mistake.
    if get("LISTEN_PID").is_some_and(|text| text.parse() != Ok(pid)) {
        return Vec::new();
    }
    let count: RawFd = get("LISTEN_FDS").and_then(|text| text.parse().ok()).unwrap_or(0);
    let names = get("LISTEN_FDNAMES").unwrap_or_default();
    names.split(':').zip(FIRST..FIRST + count.clamp(0, MOST)).map(|(name, fd)| (name.to_owned(), fd)).collect()
}

impl HandedOver {
    /// Takes what was handed over to this process. Once: a second call would own the same descriptors again.
    pub(crate) fn take() -> Self {
        let named = named(|name| std::env::var(name).ok(), std::process::id());
        Self(named.into_iter().map(|(name, fd)| (name, own(fd))).collect())
    }

    /// The socket called `name`, or a new one at `address`.
    pub(crate) fn listener(&mut self, name: &str, address: SocketAddr) -> io::Result<TcpListener> {
        let found = self.0.iter().position(|(candidate, _)| candidate == name);
        let listener = match found {
            Some(position) => self.0.swap_remove(position).1,
            None => TcpListener::bind(address)?,
        };
        listener.set_nonblocking(true)?;
        rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::CLOEXEC)?;
        Ok(listener)
    }
}

#[expect(unsafe_code, reason = "a descriptor that is handed over is only a number; there is no safe way to own it")]
fn own(fd: RawFd) -> TcpListener {
    // SAFETY: LISTEN_FDS says that this descriptor is ours, nothing else in this process has been given it, and `take` runs once. If it
    // says so wrongly, every use of the socket fails with EBADF or ENOTSOCK.
    unsafe { OwnedFd::from_raw_fd(fd) }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sockets_meant_for_this_process_are_taken() {
        let env = |pairs: &'static [(&str, &str)]| {
            move |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        };
        let both = named(env(&[("LISTEN_FDS", "2"), ("LISTEN_FDNAMES", "api:link"), ("LISTEN_PID", "7")]), 7);
        assert_eq!(both, [("api".to_owned(), 3), ("link".to_owned(), 4)]);
        assert_eq!(named(env(&[("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", "api")]), 7).len(), 1);
        assert_eq!(named(env(&[("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", "api"), ("LISTEN_PID", "8")]), 7), []);
        assert_eq!(named(env(&[("LISTEN_FDS", "-1"), ("LISTEN_FDNAMES", "api")]), 7), []);
        assert_eq!(named(env(&[]), 7), []);
    }
}
