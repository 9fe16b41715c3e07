//! Locks on files, between this process, QEMU and other hosts: those of open file descriptions, as QEMU's.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::driver::Hold;

/// QEMU locks single bytes for what it does to a disk (from 100 on) and for what it does not let others do (from 200 on): reading, writing,
/// writing what is there already, and resizing (`block/file-posix.c`).
const QEMU: (i64, i64) = (100, 200);
const DOES: i64 = 100;
const FORBIDS: i64 = 200;
const KINDS: i64 = 4;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;
/// The byte that the maker of a partial file locks.
const MAKER: (i64, i64) = (0, 1);

/// Whether a QEMU holds this file: a running VM, or a tool that is at work on it.
pub(super) fn held_by_qemu(file: impl AsFd) -> io::Result<bool> {
    is_locked(file, QEMU)
}

/// Forbids QEMUs, as QEMU does, to write or to do anything at all, until `file` is closed. `false`: one does so already.
pub(super) fn hold(file: impl AsFd, hold: Hold) -> io::Result<bool> {
    let (forbidden, done): (_, &[(i64, i64)]) = match hold {
        Hold::Still => ((FORBIDS + WRITE, KINDS - WRITE), &[(DOES + WRITE, 1), (DOES + RESIZE, 1)]),
        Hold::Alone => ((FORBIDS, KINDS), &[(DOES, KINDS), (FORBIDS, KINDS)]),
        Hold::Taken => return try_lock(file, (MAKER.0, QEMU.0 + QEMU.1)),
    };
    // First forbidden, then looked at, as QEMU does it the other way round: of two, at least one sees the other.
    match fcntl(&file, libc::F_OFD_SETLK, &mut region(libc::F_RDLCK, forbidden)) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
        other => other?,
    }
    for bytes in done {
        if is_locked(&file, *bytes)? {
            return Ok(false);
        }
    }
    Ok(true)
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

/// Whether a lock in `dir` keeps another one of the same host out, as QEMU's must. Nothing is left behind.
pub(crate) fn locks_hold(dir: &std::path::Path) -> io::Result<bool> {
    let file = tempfile::NamedTempFile::new_in(dir)?;
    let second = file.reopen()?;
    Ok(try_make(&file)? && !try_make(&second)?)
}

/// Whether another description has a lock of any kind in this region.
fn is_locked(file: impl AsFd, bytes: (i64, i64)) -> io::Result<bool> {
    let mut lock = region(libc::F_WRLCK, bytes);
    fcntl(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
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
