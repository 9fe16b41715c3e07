//! Locks on files, between this process, QEMU and other hosts: those of open file descriptions, as QEMU's.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// QEMU locks single bytes here for what it does to a disk and for what it does not let others do (`block/file-posix.c`).
const QEMU: (i64, i64) = (100, 200);
/// The byte that the maker of a partial file locks.
const MAKER: (i64, i64) = (0, 1);

/// Whether a QEMU holds this file: a running VM, or a tool that is at work on it.
pub(super) fn held_by_qemu(file: impl AsFd) -> io::Result<bool> {
    let mut lock = region(libc::F_WRLCK, QEMU);
    fcntl(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

/// Marks a partial file as being made, until the descriptor is closed. `false`: somebody else makes it.
pub(super) fn try_make(file: impl AsFd) -> io::Result<bool> {
    try_lock(file, MAKER)
}

fn try_lock(file: impl AsFd, bytes: (i64, i64)) -> io::Result<bool> {
    match fcntl(file, libc::F_OFD_SETLK, &mut region(libc::F_WRLCK, bytes)) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        other => other.map(|()| true),
    }
}

/// Holds a file, as its maker does and as QEMU does, for a process that takes no locks itself: until the last copy of the descriptor is
/// closed. `false`: somebody else holds it.
pub(super) fn try_use(file: impl AsFd) -> io::Result<bool> {
    try_lock(file, (MAKER.0, QEMU.0 + QEMU.1))
}

/// Whether a lock in `dir` keeps another one of the same host out, as QEMU's must. Nothing is left behind.
pub(crate) fn locks_hold(dir: &std::path::Path) -> io::Result<bool> {
    let file = tempfile::NamedTempFile::new_in(dir)?;
    let second = file.reopen()?;
    Ok(try_make(&file)? && !try_make(&second)?)
}

fn region(kind: i32, (start, length): (i64, i64)) -> libc::flock {
    // The kinds and origins have 16 bits in this structure.
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: start, l_len: length, l_pid: 0 }
}

#[expect(unsafe_code, reason = "rustix has no locks of open file descriptions")]
fn fcntl(file: impl AsFd, command: i32, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the descriptor is open, and these commands read and write one `struct flock`, which the pointer is to.
    let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), command, std::ptr::from_mut(lock)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
