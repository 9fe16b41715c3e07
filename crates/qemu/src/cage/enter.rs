//! The inside of the hidden subcommand: from root to the VM's own uid, one step after the other, then QEMU.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::Mode;
use rustix::io::FdFlags;
use rustix::process::{Resource, Rlimit};
use rustix::thread::{Gid, Uid};

use super::{CagePlan, LimitedResource, nodes};

/// Larger plans are refused: a command line has some kilobytes.
const MAX_PLAN: u64 = 1 << 20;

/// Why QEMU was not started.
#[derive(Debug, thiserror::Error)]
pub enum CageError {
    /// The plan cannot be read.
    #[error("cannot read the plan from descriptor {fd}: {source}")]
    ReadPlan {
        /// The descriptor.
        fd: RawFd,
        /// Why.
        source: io::Error,
    },
    /// The plan is not one.
    #[error("the plan is not understood: {0}")]
    Plan(#[source] serde_json::Error),
    /// A plan to run QEMU as root.
    #[error("the plan would run QEMU as root")]
    Root,
    /// More than one thread: the steps would hold for one of them only.
    #[error("the cage needs a single-threaded process, this one has {0} threads")]
    Threads(usize),
    /// The operating system refused a step.
    #[error("cannot {step}: {source}")]
    Step {
        /// Which.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A device node could not be made.
    #[error("cannot make the VM's device nodes: {0}")]
    Nodes(String),
    /// QEMU could not be executed.
    #[error("cannot execute {}: {source}", binary.display())]
    Exec {
        /// The program.
        binary: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> CageError {
    move |error| CageError::Step { step, source: error.into() }
}

/// Executes the plan in descriptor `plan_fd`; returns only if that failed. The reason is also written to `status_fd`, a pipe that the
/// execution closes. Must be called before any thread or runtime is started.
#[must_use]
pub fn run(plan_fd: RawFd, status_fd: Option<RawFd>) -> CageError {
    // Opened while we may: later the VM's uid could not. Like all others the copy is closed by the exec, which is the sign of success.
    let status = status_fd.and_then(|fd| fs::File::options().write(true).open(format!("/proc/self/fd/{fd}")).ok());
    let error = match attempt(plan_fd) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    if let Some(mut pipe) = status {
        // Nobody is left to tell if this fails; the caller prints the error as well.
        let _ = write!(pipe, "{error}");
    }
    error
}

fn attempt(plan_fd: RawFd) -> Result<std::convert::Infallible, CageError> {
    let plan = read_plan(plan_fd)?;
    if plan.uid == 0 || plan.gid == 0 {
        return Err(CageError::Root);
    }
    let threads = fs::read_dir("/proc/self/task").map_err(step("count the threads"))?.count();
    if threads != 1 {
        return Err(CageError::Threads(threads));
    }
    close_others_on_exec(&plan.keep)?;
    rustix::process::setsid().map_err(step("begin a session of its own"))?;
    if let Some(cgroup) = &plan.cgroup {
        join(cgroup)?;
    }
    nodes::leave_host_mounts().map_err(|error| CageError::Nodes(error.to_string()))?;
    if !plan.nodes.is_empty() {
        nodes::make(&plan).map_err(|error| CageError::Nodes(error.to_string()))?;
    }
    rustix::process::chdir(&plan.working_dir).map_err(step("enter the working directory"))?;
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    for limit in &plan.limits {
        let value = Rlimit { current: Some(limit.value), maximum: Some(limit.value) };
        rustix::process::setrlimit(resource(limit.resource), value).map_err(step("set a limit"))?;
    }
    become_vm(plan.uid, plan.gid)?;
    rustix::thread::set_no_new_privs(true).map_err(step("renounce new privileges"))?;
    let mut command = Command::new(&plan.binary);
    command.args(&plan.arguments).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let source = command.exec();
    Err(CageError::Exec { binary: plan.binary, source })
}

fn read_plan(fd: RawFd) -> Result<CagePlan, CageError> {
    let mut text = Vec::new();
    // Opened anew, so that reading starts at its beginning and the number itself is left alone.
    fs::File::open(format!("/proc/self/fd/{fd}"))
        .and_then(|file| file.take(MAX_PLAN).read_to_end(&mut text))
        .map_err(|source| CageError::ReadPlan { fd, source })?;
    serde_json::from_slice(&text).map_err(CageError::Plan)
}

fn join(cgroup: &Path) -> Result<(), CageError> {
    fs::write(cgroup.join("cgroup.procs"), "0").map_err(step("join the VM's cgroup"))
}

fn become_vm(uid: u32, gid: u32) -> Result<(), CageError> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::thread::set_thread_groups(&[]).map_err(step("drop the groups"))?;
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(step("take the VM's gid"))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(step("take the VM's uid"))
}

const fn resource(limited: LimitedResource) -> Resource {
    match limited {
        LimitedResource::Core => Resource::Core,
        LimitedResource::OpenFiles => Resource::Nofile,
        LimitedResource::LockedMemory => Resource::Memlock,
        LimitedResource::Processes => Resource::Nproc,
    }
}

/// Marks every descriptor that is not to be kept, so that the exec closes it.
fn close_others_on_exec(keep: &[RawFd]) -> Result<(), CageError> {
    let mut open = Vec::new();
    for entry in fs::read_dir("/proc/self/fd").map_err(step("list the descriptors"))? {
        let name = entry.map_err(step("list the descriptors"))?.file_name();
        open.extend(name.to_str().and_then(|name| name.parse::<RawFd>().ok()));
    }
    for fd in open.into_iter().filter(|fd| *fd > 2) {
        let flags = if keep.contains(&fd) { FdFlags::empty() } else { FdFlags::CLOEXEC };
        match set_flags(fd, flags) {
            // The one that listed the directory is gone by now.
            Err(rustix::io::Errno::BADF) if !keep.contains(&fd) => {}
            other => other.map_err(step("mark a descriptor"))?,
        }
    }
    Ok(())
}

#[expect(unsafe_code, reason = "descriptors inherited by number have no owner in this process")]
fn set_flags(fd: RawFd, flags: FdFlags) -> rustix::io::Result<()> {
    // SAFETY: the descriptor is used for this one call, in a single-threaded process, and a closed one gives EBADF.
    rustix::io::fcntl_setfd(unsafe { BorrowedFd::borrow_raw(fd) }, flags)
}
