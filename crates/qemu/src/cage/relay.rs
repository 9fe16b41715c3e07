//! What a relay of ours (`carry`) renounces beyond its cage, once it holds all that it will ever hold: the file system, all of the network but
//! the one port it dials, and every system call that moving bytes between sockets does not need.
//!
//! It runs in a cage with the host's network, since it dials. It speaks with a peer across the network and holds the host's key: whoever
//! takes it over shall find nothing to go on with. A call that it may not make ends it at once (SIGSYS). The runtime is made before.

use landlock::{
    ABI, Access, AccessFs, AccessNet, NetPort, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError,
    RulesetStatus, Scope,
};
use seccompiler::SeccompCmpOp;

use super::calls::{self, CallsError};
use super::{Limit, LimitedResource};

/// Bytes that a relay keeps of each page: what the other side holds.
const OF_A_PAGE: u64 = 32;

/// Limits of a relay for a VM of so many pages.
#[must_use]
pub fn limits(pages: u64) -> Vec<Limit> {
    vec![
        Limit { resource: LimitedResource::Core, value: 0 },
        Limit { resource: LimitedResource::OpenFiles, value: 256 },
        Limit { resource: LimitedResource::LockedMemory, value: 0 },
        Limit { resource: LimitedResource::AddressSpace, value: (3 << 29) + pages.saturating_mul(OF_A_PAGE) },
        // Sockets and pipes are no files, nor is the memory of a process.
        Limit { resource: LimitedResource::FileSize, value: 0 },
    ]
}

/// Why a relay was not confined. It must not begin then.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The kernel has landlock and refused the rules.
    #[error("the file system cannot be renounced")]
    Files(#[from] RulesetError),
    /// The system calls.
    #[error("system calls cannot be renounced")]
    Calls(#[from] CallsError),
}

/// How far the kernel could go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confined {
    /// Everything is enforced.
    Fully,
    /// The system calls and some of landlock's rules: this kernel's landlock is older.
    Partly,
    /// The system calls alone: this kernel has no landlock.
    CallsOnly,
}

/// Confines this thread, for the rest of its life; a process is confined when each of its threads is. `dials` is the port that it may connect to.
///
/// # Errors
/// See [`RelayError`].
pub fn confine(dials: Option<u16>) -> Result<Confined, RelayError> {
    let files = renounce_files(dials)?.restrict_self()?;
    calls::only(&[calls::LIVING, RELAYING].concat(), &[&calls::living_rules()?[..], &sockets()?].concat())?;
    Ok(match files.ruleset {
        RulesetStatus::FullyEnforced => Confined::Fully,
        RulesetStatus::PartiallyEnforced => Confined::Partly,
        RulesetStatus::NotEnforced => Confined::CallsOnly,
    })
}

/// No rule allows any file; connections are allowed to one port and sockets cannot be bound; nor can abstract sockets or processes outside be
/// reached.
fn renounce_files(dials: Option<u16>) -> Result<RulesetCreated, RulesetError> {
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(ABI::V5))?
        .handle_access(AccessNet::from_all(ABI::V4))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?;
    match dials {
        Some(port) => ruleset.add_rule(NetPort::new(port, AccessNet::ConnectTcp)),
        None => Ok(ruleset),
    }
}

/// What threads that compute, and tokio with one thread, timers and sockets calls. Nothing here opens a file, starts or looks at a process, or mounts.
const RELAYING: &[libc::c_long] = &[
    libc::SYS_readv,
    libc::SYS_writev,
    // The memory of the QEMU that waits, through descriptors that it was given.
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    // What the host kept of a VM's memory is read from its end, too.
    libc::SYS_lseek,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_ctl,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_getrandom,
];

/// TCP sockets of both families, and reading and setting a descriptor's flags.
fn sockets() -> Result<Vec<(libc::c_long, Vec<seccompiler::SeccompRule>)>, CallsError> {
    let with = |argument, value: libc::c_int| calls::condition(argument, SeccompCmpOp::Eq, u64::from(value.unsigned_abs()));
    let stream = || calls::condition(1, SeccompCmpOp::MaskedEq(0xf), u64::from(libc::SOCK_STREAM.unsigned_abs()));
    let socket = [libc::AF_INET, libc::AF_INET6].map(|family| calls::rule([with(0, family)?, stream()?]));
    let flags = [libc::F_GETFL, libc::F_SETFL, libc::F_GETFD, libc::F_SETFD, libc::F_DUPFD_CLOEXEC]
        .map(|what| calls::rule([with(1, what)?]));
    let non_blocking = calls::condition(1, SeccompCmpOp::Eq, libc::FIONBIO)?;
    Ok(vec![
        (libc::SYS_ioctl, vec![calls::rule([non_blocking])?]),
        (libc::SYS_socket, socket.into_iter().collect::<Result<_, _>>()?),
        (libc::SYS_fcntl, flags.into_iter().collect::<Result<_, _>>()?),
    ])
}
