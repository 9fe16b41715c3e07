//! Becomes `qemu-img convert`, with two open files and nothing else: no other file system rights than a stranger's, no network, bounded time,
//! memory and size. What it reads was made by somebody who may want to own its reader.

use std::io;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Resource, Rlimit};
use rustix::thread::{Gid, Uid};

/// The kernel's user for those who are nobody.
const NOBODY: u32 = 65_534;
/// Processor time of one conversion, in seconds.
const CPU_SECONDS: u64 = 6 * 3_600;
/// Address space: the caches of both formats, threads and buffers need far less.
const ADDRESS_SPACE: u64 = 8 << 30;

/// A disk format that is read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConvertFormat {
    /// Plain bytes.
    Raw,
    /// QEMU's qcow2.
    Qcow2,
    /// VMware's VMDK; written stream-optimised.
    Vmdk,
    /// Hyper-V's VHDX; only read.
    Vhdx,
}

impl ConvertFormat {
    /// The format that `qemu-img` calls so.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "raw" => Self::Raw,
            "qcow2" => Self::Qcow2,
            "vmdk" => Self::Vmdk,
            "vhdx" => Self::Vhdx,
            _ => return None,
        })
    }

    const fn driver(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhdx => "vhdx",
        }
    }
}

/// What to convert.
#[derive(Clone, Copy, Debug)]
pub struct Conversion {
    /// Format of the input.
    pub from: ConvertFormat,
    /// Format of the output.
    pub to: ConvertFormat,
    /// Descriptor of the input, a file.
    pub input: RawFd,
    /// Descriptor of the output, an empty file.
    pub output: RawFd,
    /// Largest output in bytes.
    pub limit: u64,
}

/// Why it did not become `qemu-img`.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The operating system refused a step.
    #[error("cannot {step}: {source}")]
    Step {
        /// Which.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// `qemu-img` could not be executed.
    #[error("cannot execute qemu-img: {0}")]
    Exec(#[source] io::Error),
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> ConvertError {
    move |error| ConvertError::Step { step, source: error.into() }
}

/// Confines this process and executes `qemu-img`; returns only if that failed. Must be called before any thread or runtime is started.
#[must_use]
pub fn become_converter(conversion: Conversion) -> ConvertError {
    match attempt(conversion) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn attempt(conversion: Conversion) -> Result<std::convert::Infallible, ConvertError> {
    let place = |fd: RawFd| format!("/proc/self/fd/{fd}");
    let limits = [
        (Resource::Core, 0),
        (Resource::Nofile, 64),
        (Resource::Cpu, CPU_SECONDS),
        (Resource::As, ADDRESS_SPACE),
        (Resource::Fsize, conversion.limit),
    ];
    for (resource, value) in limits {
        let limit = Rlimit { current: Some(value), maximum: Some(value) };
        rustix::process::setrlimit(resource, limit).map_err(step("set a limit"))?;
    }
    if rustix::process::geteuid().is_root() {
        // The files are opened anew by their descriptors' names, with the rights that their owner has then.
        for fd in [conversion.input, conversion.output] {
            std::os::unix::fs::chown(place(fd), Some(NOBODY), Some(NOBODY)).map_err(step("give the files away"))?;
        }
        leave_network()?;
        let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
        rustix::thread::set_thread_groups(&[]).map_err(step("drop the groups"))?;
        rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(step("become nobody"))?;
        rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(step("become nobody"))?;
    }
    rustix::thread::set_no_new_privs(true).map_err(step("renounce new privileges"))?;
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-p", "-f", conversion.from.driver(), "-O", conversion.to.driver()]);
    if conversion.to == ConvertFormat::Vmdk {
        command.args(["-o", "subformat=streamOptimized"]);
    }
    command.args([place(conversion.input), place(conversion.output)]);
    command.current_dir("/").env_clear().env("LC_ALL", "C").env("PATH", "/usr/local/bin:/usr/bin:/bin");
    Err(ConvertError::Exec(command.exec()))
}

#[expect(
    unsafe_code,
    reason = "leaving namespaces is unsafe where threads share descriptors; there is one thread, and it shares none"
)]
fn leave_network() -> Result<(), ConvertError> {
    use rustix::thread::UnshareFlags;
    let flags = UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: these namespaces are of the calling thread, the only one of this process; its descriptors stay as they are.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(step("leave the host's network"))
}
