//! The daemons of a lab: how they are started, and handles on them for tests that kill, stop and start them again.

use std::fs::{self, OpenOptions};
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use rustix::process::Signal;

use crate::layout::{self, CONTROLLER_ADDRESS, LINK_PORT, namespace};
use crate::network::SWITCH;
use crate::process::ProcessRef;
use crate::record::{self, CONTROLLER, Record, make_dir};
use crate::{LabError, in_namespace};

/// Seconds within which `host join` must be done.
const JOIN_SECONDS: &str = "60";

/// A handle on the controller or on the agent of one host.
#[derive(Debug, Clone)]
pub struct Daemon {
    lab: String,
    role: String,
}

impl Daemon {
    pub(crate) fn new(lab: &str, role: &str) -> Self {
        Self { lab: lab.to_owned(), role: role.to_owned() }
    }

    /// Its process, if it runs (a stopped process runs).
    ///
    /// # Errors
    /// When the lab's record cannot be read.
    pub fn pid(&self) -> Result<Option<u32>, LabError> {
        Ok(self.record()?.running(&self.role).map(|process| process.pid))
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// [`LabError::NotRunning`] when there is nothing to send it to.
    pub fn signal(&self, signal: Signal) -> Result<(), LabError> {
        if self.running()?.signal(signal)? { Ok(()) } else { Err(self.not_running()) }
    }

    /// Waits until it has ended; at once when it is not running.
    ///
    /// # Errors
    /// [`LabError::StillRunning`] after `patience`.
    pub fn wait_exit(&self, patience: Duration) -> Result<(), LabError> {
        self.record()?.running(&self.role).map_or(Ok(()), |process| process.wait_exit(patience))
    }

    /// Kills it as a crash would (SIGKILL) and waits until it is gone. What it had started keeps running.
    ///
    /// # Errors
    /// [`LabError::NotRunning`] when it is not running.
    pub fn crash(&self) -> Result<(), LabError> {
        let process = self.running()?;
        process.signal(Signal::KILL)?;
        process.wait_exit(Duration::from_secs(30))
    }

    /// Starts it again, with the same arguments as before.
    ///
    /// # Errors
    /// [`LabError::Running`] when it still runs.
    pub fn spawn(&self) -> Result<u32, LabError> {
        let _lock = record::lock(&self.lab)?;
        let mut record = self.record()?;
        if let Some(process) = record.running(&self.role) {
            return Err(LabError::Running { daemon: self.title(), pid: process.pid });
        }
        if self.role == CONTROLLER { start_controller(&mut record) } else { start_agent(&mut record, &self.role) }
    }

    /// Its log.
    ///
    /// # Errors
    /// When the lab's record cannot be read.
    pub fn log(&self) -> Result<PathBuf, LabError> {
        Ok(log_of(&self.record()?, &self.role))
    }

    fn record(&self) -> Result<Record, LabError> {
        Record::load(&self.lab)?.ok_or_else(|| LabError::Unknown { name: self.lab.clone() })
    }

    fn running(&self) -> Result<ProcessRef, LabError> {
        self.record()?.running(&self.role).ok_or_else(|| self.not_running())
    }

    fn not_running(&self) -> LabError {
        LabError::NotRunning { daemon: self.title() }
    }

    fn title(&self) -> String {
        title(&self.lab, &self.role)
    }
}

/// What messages call a daemon.
pub(crate) fn title(lab: &str, role: &str) -> String {
    if role == CONTROLLER { format!("the controller of lab {lab}") } else { format!("the agent of {role} in lab {lab}") }
}

pub(crate) fn log_of(record: &Record, role: &str) -> PathBuf {
    let paths = record.paths();
    if role == CONTROLLER { paths.controller_log() } else { paths.agent_log(role) }
}

/// The error of a daemon that ended by itself.
pub(crate) fn failed(record: &Record, role: &str) -> LabError {
    let log = log_of(record, role);
    LabError::DaemonFailed { daemon: title(&record.spec.name, role), tail: tail(&log), log }
}

/// The last lines of a log.
pub(crate) fn tail(log: &Path) -> String {
    let text = fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines.get(lines.len().saturating_sub(20)..).unwrap_or_default().join("\n")
}

/// Binds the API's socket in the root namespace and starts the controller in the switch's with it.
pub(crate) fn start_controller(record: &mut Record) -> Result<u32, LabError> {
    let paths = record.paths();
    let port = record.api_port.or(record.spec.api_port).unwrap_or(0);
    let refused = |source| LabError::Listen { port, source };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(refused)?;
    record.api_port = Some(listener.local_addr().map_err(refused)?.port());
    make_dir(&paths.controller_data(), 0o700)?;
    let mut command = detached(&record.spec.godwit, &paths.controller_log())?;
    command
        .arg("serve")
        .arg("--data-dir")
        .arg(paths.controller_data())
        .arg("--link-listen")
        .arg(format!("{CONTROLLER_ADDRESS}:{LINK_PORT}"))
        .args(["--advertise", &CONTROLLER_ADDRESS.to_string(), "--advertise", "127.0.0.1"])
        .args(&record.spec.serve_args)
        .env("LISTEN_FDS", "1")
        .env("LISTEN_FDNAMES", "api");
    let socket = FdMapping { parent_fd: listener.into(), child_fd: 3 };
    let spawn_failed = |lab: &str, source| LabError::Spawn { daemon: title(lab, CONTROLLER), source };
    command.fd_mappings(vec![socket]).map_err(|error| spawn_failed(&record.spec.name, io::Error::other(error)))?;
    start(record, CONTROLLER, SWITCH, command)
}

/// Lets a host join the cluster.
pub(crate) fn join(record: &Record, host: &str, token: &Path) -> Result<(), LabError> {
    let paths = record.paths();
    make_dir(&paths.host_state(host), 0o711)?;
    let log = paths.agent_log(host);
    let mut command = Command::new("timeout");
    command
        .args(["-k", "1", JOIN_SECONDS])
        .arg(&record.spec.godwit)
        .args(["host", "join", "--controller"])
        .arg(format!("{CONTROLLER_ADDRESS}:{LINK_PORT}"))
        .args(["--name", host, "--address", &address(host).to_string(), "--token-file"])
        .arg(token)
        .arg("--state-dir")
        .arg(paths.host_state(host));
    with_log(&mut command, &log)?;
    let daemon = || format!("`godwit host join` of {host}");
    let spawn_failed = |source| LabError::Spawn { daemon: daemon(), source };
    let status = in_namespace(&namespace(&record.spec.name, host), || command.status())?.map_err(spawn_failed)?;
    if status.success() {
        return Ok(());
    }
    Err(LabError::DaemonFailed { daemon: daemon(), tail: tail(&log), log })
}

/// Starts the agent of a host that has joined.
pub(crate) fn start_agent(record: &mut Record, host: &str) -> Result<u32, LabError> {
    let paths = record.paths();
    let number = layout::host_number(host).unwrap_or_default();
    let uid_base = layout::host_uid_base(record.uid_slot, number);
    let overrides = record.spec.overrides.get(host).cloned().unwrap_or_default();
    // Every VM has a uid of its own, which must be able to pass through to what is its own below.
    make_dir(&paths.host_run(host), 0o711)?;
    let mut shared = std::ffi::OsString::from("shared=");
    shared.push(pool(record));
    let mut own = std::ffi::OsString::from("local=");
    own.push(paths.host_pool(host));
    let mut command = detached(&record.spec.godwit, &paths.agent_log(host))?;
    command
        .args(["agent", "--state-dir"])
        .arg(paths.host_state(host))
        .arg("--run-dir")
        .arg(paths.host_run(host))
        .arg("--pool")
        .arg(shared)
        .args(["--shared-pool", "shared", "--pool"])
        .arg(own)
        .arg("--cgroup")
        .arg(format!("{}/{host}", layout::cgroup(&record.spec.name)))
        .args(["--uid-base", &uid_base.to_string()])
        // The outside client is no host, but must hear where a VM is announced.
        .args(["--vtep", &layout::OUTSIDE_ADDRESS.to_string()]);
    if let Some(qemu) = &overrides.qemu {
        command.arg("--qemu").arg(qemu);
    }
    command.args(&record.spec.agent_args).args(&overrides.agent_args);
    start(record, host, host, command)
}

/// The directory of the pool that all hosts share.
pub(crate) fn pool(record: &Record) -> PathBuf {
    record.spec.shared_pool.clone().unwrap_or_else(|| record.paths().pool())
}

fn address(host: &str) -> Ipv4Addr {
    layout::host_address(layout::host_number(host).unwrap_or_default())
}

/// A command in a session of its own, so that it outlives this process and its terminal. The pid stays the same through
/// `setsid`, the shell and `godwit`; LISTEN_PID must name it, which only a step inside the new process can do.
fn detached(godwit: &Path, log: &Path) -> Result<Command, LabError> {
    let mut command = Command::new("setsid");
    command.args(["/bin/sh", "-c", "LISTEN_PID=$$ exec \"$@\"", "sh"]).arg(godwit).current_dir("/");
    with_log(&mut command, log)?;
    Ok(command)
}

fn with_log(command: &mut Command, log: &Path) -> Result<(), LabError> {
    let failed = || LabError::file("open", log);
    let file = OpenOptions::new().create(true).append(true).open(log).map_err(failed())?;
    let errors = file.try_clone().map_err(failed())?;
    for inherited in ["LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET"] {
        command.env_remove(inherited);
    }
    command.stdin(Stdio::null()).stdout(file).stderr(errors);
    Ok(())
}

/// Starts a prepared daemon in the namespace of `place` and records it.
fn start(record: &mut Record, role: &str, place: &str, mut command: Command) -> Result<u32, LabError> {
    let spawn_failed = |source| LabError::Spawn { daemon: title(&record.spec.name, role), source };
    let child: Child = in_namespace(&namespace(&record.spec.name, place), || command.spawn())?.map_err(spawn_failed)?;
    let pid = child.id();
    let process = ProcessRef::current(pid).ok_or_else(|| failed(record, role))?;
    record.processes.insert(role.to_owned(), process);
    record.save()?;
    Ok(pid)
}
