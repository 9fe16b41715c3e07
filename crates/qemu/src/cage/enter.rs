//! The inside of the hidden subcommand: a process in namespaces of its own is made beside this one, which takes one step after the other from
//! root to the VM's own uid and then becomes QEMU. This one keeps its log, or ends.
//!
//! The new process is a child of the agent, as this one is (`CLONE_PARENT`): the agent hears how it ends, and nothing else is in between. In
//! its pid namespace it is the first process, so that all others that it could ever make end with it.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::Mode;
use rustix::io::FdFlags;
use rustix::process::{Pid, Resource, Rlimit, Signal, WaitOptions};
use rustix::thread::{CpuSet, Gid, Uid};

use super::keeper::{self, Keeper};
use super::{CagePlan, LimitedResource, Network, apparmor, calls, root};

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
    AsRoot,
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
    /// The program's own root could not be made.
    #[error("cannot make a root of its own: {0}")]
    Root(String),
    /// The kernel does not take the filter of system calls.
    #[error("cannot refuse dangerous calls: {0}")]
    Calls(String),
    /// The process that should have started it ended.
    #[error("the cage was given up")]
    GivenUp,
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

/// The program that this very process runs: it need not have a place that the cage could show.
const OURSELVES: &str = "/proc/self/exe";

/// Executes the plan in descriptor `plan_fd` in a process beside this one; returns only if that failed. To `status_fd`, a pipe, the new
/// process' pid is written, on a line of its own, and the reason if it fails; the execution closes it. Must be called before any thread or
/// runtime is started.
#[must_use]
pub fn run(plan_fd: RawFd, status_fd: Option<RawFd>) -> CageError {
    // Opened while we may: later the VM's uid could not. Like all others the copy is closed by the exec, which is the sign of success.
    let mut status = status_fd.and_then(|fd| fs::File::options().write(true).open(format!("/proc/self/fd/{fd}")).ok());
    let error = match attempt(plan_fd, &mut status) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    if let Some(mut pipe) = status {
        // Nobody is left to tell if this fails; the caller prints the error as well.
        let _ = write!(pipe, "{error}");
    }
    error
}

fn attempt(plan_fd: RawFd, status: &mut Option<fs::File>) -> Result<std::convert::Infallible, CageError> {
    let plan = read_plan(plan_fd)?;
    may_begin(&plan)?;
    close_others_on_exec(&plan.keep)?;
    let (log, said) = match &plan.log {
        Some(log) => {
            keeper::pipe().map(|(reader, writer)| (Some((log, reader)), Some(writer))).map_err(step("make the log's pipe"))?
        }
        None => (None, None),
    };
    let (go, ready) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(step("make a pipe"))?;
    let Some(pid) = clone_into_namespaces(plan.network, libc::CLONE_PARENT)? else {
        drop((log, ready));
        return become_program(&plan, said, go);
    };
    drop((said, go));
    // First the pid is told, then the process may go on: one that nobody knows never becomes anything.
    if let Some(pipe) = status {
        writeln!(pipe, "{pid}").map_err(step("tell the pid"))?;
    }
    rustix::io::write(&ready, b"g").map_err(step("let the process go on"))?;
    let kept = log.map(|(log, said)| {
        let [current, older] = [log.current, log.older].map(|fd| fs::File::from(take(fd)));
        Keeper { said, current, older, limit: log.limit.get() }.run()
    });
    // The process goes its own way: what becomes of its log is no reason to speak up.
    std::process::exit(i32::from(kept.is_some_and(|kept| kept.is_err())))
}

/// Takes over a descriptor that this process was started with.
#[expect(unsafe_code, reason = "a descriptor that was inherited has no owner yet")]
fn take(fd: RawFd) -> OwnedFd {
    // SAFETY: the agent passes each descriptor for this process alone, and each number is taken once.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Runs the plan's program to its end, beside this process, which waits for it and takes it along when it is killed. Answers the code with which
/// it ended, or 128 and the signal. For callers that cannot spawn into a cage themselves; without a log and without a group. Must be called
/// before any thread or runtime is started.
///
/// # Errors
/// See [`CageError`]; the program's own words are on standard error.
pub fn run_to_end(plan: &CagePlan) -> Result<u8, CageError> {
    may_begin(plan)?;
    close_others_on_exec(&plan.keep)?;
    let Some(pid) = clone_into_namespaces(plan.network, 0)? else {
        let error = match confine(plan, Tie::ToParent) {
            Ok(never) => match never {},
            Err(error) => error,
        };
        // This is the copy: it has nothing to return to.
        eprintln!("{error}");
        std::process::exit(1);
    };
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let ended = rustix::process::waitpid(pid, WaitOptions::empty()).map_err(step("wait for the program"))?;
    let code = ended.and_then(|(_, status)| status.exit_status().or_else(|| Some(128 + status.terminating_signal()?)));
    Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX))
}

/// As [`run_to_end`], for who is not root and can make no cage: limits, no new privileges and refused calls, then the program in place of this
/// process.
///
/// # Errors
/// See [`CageError`].
pub fn run_as_we_are(plan: &CagePlan) -> Result<u8, CageError> {
    close_others_on_exec(&plan.keep)?;
    set_limits(plan)?;
    match renounce_and_execute(plan, Some(&plan.binary))? {}
}

fn may_begin(plan: &CagePlan) -> Result<(), CageError> {
    if plan.uid == 0 || plan.gid == 0 {
        return Err(CageError::AsRoot);
    }
    let threads = fs::read_dir("/proc/self/task").map_err(step("count the threads"))?.count();
    if threads == 1 { Ok(()) } else { Err(CageError::Threads(threads)) }
}

/// A copy of this process in namespaces of its own; `None` in the copy.
#[expect(unsafe_code, reason = "fork cannot make a process, or a sibling, in new namespaces")]
fn clone_into_namespaces(network: Network, kinship: libc::c_int) -> Result<Option<i64>, CageError> {
    let mut flags = kinship | libc::SIGCHLD;
    flags |= libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    if network == Network::Empty {
        flags |= libc::CLONE_NEWNET;
    }
    // SAFETY: without a stack of its own and without shared memory this is a fork; the process has one thread, so that no lock is held by
    // another that the copy lacks.
    let result = unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(flags), 0, 0, 0, 0) };
    match result {
        0 => Ok(None),
        pid if pid > 0 => Ok(Some(pid)),
        _ => Err(step("make a process in namespaces of its own")(io::Error::last_os_error())),
    }
}

/// The new process: takes the steps and executes the program.
fn become_program(plan: &CagePlan, said: Option<OwnedFd>, go: OwnedFd) -> Result<std::convert::Infallible, CageError> {
    let mut letter = [0];
    if rustix::io::read(&go, &mut letter).map_err(step("wait to go on"))? == 0 {
        return Err(CageError::GivenUp);
    }
    if let Some(said) = said {
        rustix::stdio::dup2_stdout(&said).and_then(|()| rustix::stdio::dup2_stderr(&said)).map_err(step("speak to the log"))?;
    }
    confine(plan, Tie::None)
}

/// Whether a program ends with who started it.
#[derive(PartialEq, Eq)]
enum Tie {
    None,
    ToParent,
}

/// Everything that it renounces, one step after the other, then the program.
fn confine(plan: &CagePlan, tie: Tie) -> Result<std::convert::Infallible, CageError> {
    rustix::process::setsid().map_err(step("begin a session of its own"))?;
    rustix::system::sethostname(b"cage").map_err(step("take a host name of its own"))?;
    if let Some(cgroup) = &plan.cgroup {
        join(cgroup)?;
    }
    stay_on(&plan.cpus)?;
    // Links are followed now: where they lead to is not seen later.
    let file = match plan.binary.as_path() {
        path if path == Path::new(OURSELVES) => None,
        path => Some(fs::canonicalize(path).map_err(|source| CageError::Exec { binary: path.to_owned(), source })?),
    };
    // Whatever the agent's was: the uid has to pass through the directories that are made.
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    root::enter(plan, file.as_deref()).map_err(|error| CageError::Root(error.to_string()))?;
    rustix::process::chdir(&plan.working_dir).map_err(step("enter the working directory"))?;
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    set_limits(plan)?;
    become_vm(plan.uid, plan.gid)?;
    if tie == Tie::ToParent {
        // A change of user takes it away: not earlier.
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(step("end with the parent"))?;
    }
    renounce_and_execute(plan, file.as_deref())
}

fn set_limits(plan: &CagePlan) -> Result<(), CageError> {
    for limit in &plan.limits {
        let value = Rlimit { current: Some(limit.value), maximum: Some(limit.value) };
        rustix::process::setrlimit(resource(limit.resource), value).map_err(step("set a limit"))?;
    }
    Ok(())
}

/// The last steps; `file` is the program, or this very one.
fn renounce_and_execute(plan: &CagePlan, file: Option<&Path>) -> Result<std::convert::Infallible, CageError> {
    if let Some(profile) = &plan.profile_name {
        // Without new privileges only who is unconfined may still take a profile on: the agent is, and so is the cage.
        apparmor::enter(profile).map_err(step("ask for the AppArmor profile"))?;
    }
    rustix::thread::set_no_new_privs(true).map_err(step("renounce new privileges"))?;
    calls::refuse_dangerous().map_err(|error| CageError::Calls(error.to_string()))?;
    let mut command = Command::new(file.unwrap_or(Path::new(OURSELVES)));
    command.arg0(&plan.binary).args(&plan.arguments).env_clear().env("LC_ALL", "C").env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let source = command.exec();
    Err(CageError::Exec { binary: plan.binary.clone(), source })
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

/// Threads that the program makes stay there, too.
fn stay_on(cpus: &[u32]) -> Result<(), CageError> {
    if cpus.is_empty() {
        return Ok(());
    }
    let mut set = CpuSet::new();
    let cpus = cpus.iter().filter_map(|cpu| usize::try_from(*cpu).ok());
    cpus.filter(|cpu| *cpu < CpuSet::MAX_CPU).for_each(|cpu| set.set(cpu));
    rustix::thread::sched_setaffinity(None, &set).map_err(step("stay on the processors of its memory node"))
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
        LimitedResource::AddressSpace => Resource::As,
        LimitedResource::FileSize => Resource::Fsize,
        LimitedResource::ProcessorTime => Resource::Cpu,
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
