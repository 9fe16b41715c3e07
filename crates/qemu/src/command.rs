//! The command line: a pure function of what a VM is ([`ResolvedSpec`]) and what it is given on this host ([`Resources`]).
//!
//! What the guest can see (machine, CPU, devices and their PCI addresses, queue numbers, ROM sizes) depends on the spec alone, so that the
//! same spec makes the same machine on every host and with every QEMU: it is the ABI that a VM keeps for life. Where everything is, is in
//! [`devices`]. What is not visible to the guest (I/O limits, the state of a cable) is set over the monitor once QEMU answers, see
//! [`crate::change`].

pub(crate) mod devices;
pub(crate) mod memory;
mod options;
mod plain;
mod platform;
mod seed;
mod tpm;

use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::{fmt, io};

use godwit_model::{Accelerator, CacheMode, ResolvedSpec, SPEC_SCHEMA};
use rustix::fs::{Mode, OFlags};

use crate::cage::PassedFds;
use options::{Object, Pairs};
pub use plain::{PlainFiles, plain_arguments};

/// What a VM is given on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resources {
    /// The VM's own directory; QEMU itself makes only its VNC socket there. Short, see [`Sockets::MAX_PATH`].
    pub runtime_dir: PathBuf,
    /// Listening sockets, see [`Sockets::listen`].
    pub channels: ChannelFds,
    /// Descriptor of the kernel, world-readable file: QEMU opens it anew through `/proc/self/fd`.
    pub kernel: Option<RawFd>,
    /// Descriptor of the initrd, likewise.
    pub initrd: Option<RawFd>,
    /// UEFI firmware, if the spec has it.
    pub flash: Option<FlashFds>,
    /// Descriptors of the disks, in the order of the spec.
    pub disks: Vec<DiskFds>,
    /// Descriptors of the media in the CD-ROM drives, in the order of the spec; opened read-only.
    pub media: Vec<Option<RawFd>>,
    /// Tap descriptors with `IFF_VNET_HDR`, in the order of the spec.
    pub taps: Vec<RawFd>,
    /// Descriptor of the seed, if the spec has cloud-init; opened read-only.
    pub seed: Option<RawFd>,
    /// QEMU's end of its TPM's control socket, if the spec has a TPM; see [`crate::tpm::start`].
    pub tpm: Option<RawFd>,
    /// The memory node of this host that the VM's memory is bound to. The guest does not see it.
    pub node: Option<u32>,
    /// Fresh, or waiting for a migration.
    pub start: Start,
}

/// One volume, opened twice: QEMU reopens a disk read-only or read-write as it gives it up or takes it over, and finds in the set the
/// descriptor with the access that it needs. Each is an open file description of its own and of this QEMU alone, for the locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskFds {
    /// Opened read-only.
    pub read_only: RawFd,
    /// Opened read-write.
    pub read_write: RawFd,
}

impl DiskFds {
    /// Opens the volume at `path` both ways and passes the descriptors. Symbolic links are not followed. The flags must be exactly those
    /// that QEMU will look for, `O_DIRECT` included (from 9.1 on it compares that too).
    ///
    /// # Errors
    /// The operating system's reason; a file system without direct I/O says `EINVAL`.
    pub fn open(path: &Path, cache: CacheMode, fds: &mut PassedFds) -> io::Result<Self> {
        let direct = if cache == CacheMode::Direct { OFlags::DIRECT } else { OFlags::empty() };
        let open = |access| rustix::fs::open(path, access | direct | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
        let (read_only, read_write) = (open(OFlags::RDONLY)?, open(OFlags::RDWR)?);
        Ok(Self { read_only: fds.pass(read_only), read_write: fds.pass(read_write) })
    }
}

/// Flash of a VM with UEFI firmware.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlashFds {
    /// Code, opened read-only.
    pub code: RawFd,
    /// The volume of its variables, opened as a disk with cache mode `direct`.
    pub variables: DiskFds,
}

/// Listening sockets that QEMU accepts on. They are made by the agent, so that there is something to connect to before QEMU has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChannelFds {
    /// Monitor.
    pub qmp: RawFd,
    /// Serial console.
    pub console: RawFd,
    /// Guest agent.
    pub guest_agent: RawFd,
}

/// How QEMU begins. In both cases no vCPU runs until `cont`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// A machine that was just switched on.
    Fresh,
    /// Waits for `migrate-incoming`.
    Incoming,
}

/// The sockets of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sockets {
    /// Monitor. QEMU serves one client at a time.
    pub qmp: PathBuf,
    /// Serial console. What the guest writes while nobody is connected is lost; while a client is connected but does not read, the
    /// guest's console waits once about 200 KiB are under way.
    pub console: PathBuf,
    /// VNC, without authentication: the directory is closed to others.
    pub vnc: PathBuf,
    /// The guest agent's channel.
    pub guest_agent: PathBuf,
}

impl Sockets {
    /// Longest path of a unix socket, without its terminating zero.
    pub const MAX_PATH: usize = 107;

    /// The one directory in `runtime_dir` that must belong to the VM's user: QEMU makes its VNC socket there.
    #[must_use]
    pub fn own_dir(runtime_dir: &Path) -> PathBuf {
        runtime_dir.join("own")
    }

    /// The sockets in `runtime_dir`.
    #[must_use]
    pub fn in_dir(runtime_dir: &Path) -> Self {
        Self {
            qmp: runtime_dir.join("qmp"),
            console: runtime_dir.join("console"),
            vnc: Self::own_dir(runtime_dir).join("vnc"),
            guest_agent: runtime_dir.join("agent"),
        }
    }

    /// Makes the sockets that QEMU is given, anew if they are left from an earlier QEMU, and passes them. Connecting works from now on;
    /// the answer comes when QEMU is there.
    ///
    /// # Errors
    /// The operating system's reason.
    pub fn listen(&self, fds: &mut PassedFds) -> io::Result<ChannelFds> {
        let mut listen = |path: &Path| {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(path)?;
            // Two of QEMU's threads may take the first connection at the same time while it hands its monitor over: the one that comes too late is not to wait
            // for another, and with it all of QEMU.
            listener.set_nonblocking(true)?;
            Ok(fds.pass(listener))
        };
        Ok(ChannelFds { qmp: listen(&self.qmp)?, console: listen(&self.console)?, guest_agent: listen(&self.guest_agent)? })
    }
}

/// Why a spec and its resources make no command line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// More or fewer descriptors than the spec has parts.
    #[error("the spec has {wanted} {what}, but {given} were opened")]
    Count {
        /// Of what.
        what: &'static str,
        /// In the spec.
        wanted: usize,
        /// In the resources.
        given: usize,
    },
    /// A machine type or CPU model that QEMU would read as further options.
    #[error("{text:?} is no {what}")]
    Identifier {
        /// What it should be.
        what: &'static str,
        /// What it is.
        text: String,
    },
    /// A kernel command line with control characters.
    #[error("the kernel command line contains control characters")]
    Cmdline,
    /// An initrd without a kernel.
    #[error("an initrd needs a kernel")]
    InitrdAlone,
    /// The runtime directory is not usable for sockets.
    #[error("{0:?} is relative, too long for unix sockets, or not plain text")]
    RuntimeDir(PathBuf),
    /// Memory that is not whole pages as QEMU rounds them.
    #[error("memory is not a multiple of 8 KiB")]
    Memory,
    /// Huge pages that do not make up the memory.
    #[error("memory is not a multiple of its huge pages")]
    HugePages,
    /// DIMMs that are not in the room for them.
    #[error("the VM's DIMMs do not fit its slots, or its room for memory")]
    Dimms,
    /// A spec of a later version: what it means is not known here.
    #[error("the spec has schema {0}, known are those up to {SPEC_SCHEMA}")]
    Schema(u32),
    /// A text that the guest would see with control characters, or cut.
    #[error("{0} is not printable ASCII, or too long")]
    Text(&'static str),
    /// A place that does not exist, or that two devices have.
    #[error("slot {0} does not exist, is not for this device, or is taken")]
    Slot(usize),
    /// Something that QEMU cannot do, or not in a VM that moves.
    #[error("{0} is not supported")]
    Unsupported(&'static str),
}

/// The CPU model for VMs that name none: runs on every host with this accelerator, Intel and AMD alike, and is accepted with `enforce` by
/// QEMU 7.2 and 10.0. Under TCG an AMD model spares the guest the page-table isolation that an emulated Intel CPU would make it do.
#[must_use]
pub const fn default_cpu(accelerator: Accelerator) -> &'static str {
    match accelerator {
        Accelerator::Kvm => "Westmere-v1",
        Accelerator::Tcg => "qemu64-v1",
    }
}

const MAX_DEVICES: usize = 8;

/// Arguments for QEMU, without the program's name.
///
/// # Errors
/// See [`CommandError`]; a spec that was validated and its matching resources make none.
pub fn qemu_arguments(spec: &ResolvedSpec, resources: &Resources) -> Result<Vec<String>, CommandError> {
    check(spec, resources)?;
    let mut line = Line::default();
    line.flag("-nodefaults").flag("-no-user-config").flag("-S");
    line.pairs("-msg", Pairs::new().with("timestamp", "on"));
    line.pairs("-name", Pairs::new().with("guest", &spec.name).with("debug-threads", "on"));
    line.option("-uuid", spec.vm);
    add_sandbox(&mut line);
    platform::add(&mut line, spec, resources.node);
    add_boot(&mut line, spec, resources);
    add_channels(&mut line, resources);
    devices::add_all(&mut line, spec, resources);
    if let Some(fd) = resources.seed {
        seed::add(&mut line, fd);
    }
    if let Some(control) = resources.tpm {
        tpm::add(&mut line, control);
    }
    if resources.start == Start::Incoming {
        line.option("-incoming", "defer");
    }
    Ok(line.0)
}

/// Arguments for a QEMU without a machine that is only asked what it can do, on a connected monitor `qmp`.
pub(crate) fn interview_arguments(accelerator: Accelerator, qmp: RawFd) -> Vec<String> {
    let mut line = Line::default();
    line.flag("-nodefaults").flag("-no-user-config").flag("-S");
    add_sandbox(&mut line);
    line.pairs("-machine", Pairs::new().first("none"));
    platform::add_accelerator(&mut line, accelerator, 1);
    line.option("-display", "none");
    line.pairs("-chardev", Pairs::new().first("socket").with("id", "qmp").with("fd", qmp));
    line.pairs("-mon", Pairs::new().with("chardev", "qmp").with("mode", "control"));
    // Whether post-copy can be received is checked by a QEMU that waits for a migration only.
    line.option("-incoming", "defer");
    line.0
}

/// Arguments under construction.
#[derive(Default)]
struct Line(Vec<String>);

impl Line {
    fn flag(&mut self, name: &str) -> &mut Self {
        self.0.push(name.to_owned());
        self
    }

    fn option(&mut self, name: &str, value: impl fmt::Display) {
        self.flag(name).0.push(value.to_string());
    }

    fn pairs(&mut self, name: &str, value: Pairs) {
        self.option(name, value);
    }

    /// Options in JSON need no escaping of commas.
    fn json(&mut self, name: &str, value: Object) {
        self.option(name, value);
    }
}

fn check(spec: &ResolvedSpec, resources: &Resources) -> Result<(), CommandError> {
    let counts = [
        ("kernels", usize::from(spec.kernel.is_some()), usize::from(resources.kernel.is_some())),
        ("initrds", usize::from(spec.initrd.is_some()), usize::from(resources.initrd.is_some())),
        ("seeds", usize::from(spec.cloud_init.is_some()), usize::from(resources.seed.is_some())),
        ("TPMs", usize::from(spec.platform.tpm.is_some()), usize::from(resources.tpm.is_some())),
        ("disks", spec.disks.len(), resources.disks.len()),
        ("interfaces", spec.nics.len(), resources.taps.len()),
        ("CD-ROM drives", spec.cdroms.len(), resources.media.len()),
        ("flashes", usize::from(spec.platform.firmware.is_uefi()), usize::from(resources.flash.is_some())),
    ];
    for (what, wanted, given) in counts {
        if wanted != given || wanted > MAX_DEVICES {
            return Err(CommandError::Count { what, wanted, given });
        }
    }
    for (drive, fd) in spec.cdroms.iter().zip(&resources.media) {
        let (wanted, given) = (usize::from(drive.medium.is_some()), usize::from(fd.is_some()));
        if wanted != given {
            return Err(CommandError::Count { what: "media", wanted, given });
        }
    }
    // A spec may have crossed the network since it was validated.
    if spec.schema > SPEC_SCHEMA {
        return Err(CommandError::Schema(spec.schema));
    }
    for (what, text) in [("machine type", &spec.machine), ("CPU model", &spec.cpu)] {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if text.is_empty() || text.len() > 64 || !text.bytes().all(plain) {
            return Err(CommandError::Identifier { what, text: text.clone() });
        }
    }
    if spec.cmdline.chars().any(char::is_control) {
        return Err(CommandError::Cmdline);
    }
    if spec.initrd.is_some() && spec.kernel.is_none() {
        return Err(CommandError::InitrdAlone);
    }
    if !spec.memory.get().is_multiple_of(8 << 10) {
        return Err(CommandError::Memory);
    }
    platform::check(spec)?;
    memory::check(spec)?;
    devices::check(spec)?;
    let usable = |path: &Path| {
        path.to_str()
            .is_some_and(|text| text.starts_with('/') && text.len() <= Sockets::MAX_PATH && !text.chars().any(char::is_control))
    };
    if usable(&Sockets::in_dir(&resources.runtime_dir).console) {
        Ok(())
    } else {
        Err(CommandError::RuntimeDir(resources.runtime_dir.clone()))
    }
}

fn add_sandbox(line: &mut Line) {
    let mut sandbox = Pairs::new().first("on");
    for class in ["obsolete", "elevateprivileges", "spawn", "resourcecontrol"] {
        sandbox = sandbox.with(class, "deny");
    }
    line.pairs("-sandbox", sandbox);
}

fn add_boot(line: &mut Line, spec: &ResolvedSpec, resources: &Resources) {
    let file = |fd: RawFd| format!("/proc/self/fd/{fd}");
    if let Some(fd) = resources.kernel {
        line.option("-kernel", file(fd));
        line.option("-append", &spec.cmdline);
    }
    if let Some(fd) = resources.initrd {
        line.option("-initrd", file(fd));
    }
}

fn add_channels(line: &mut Line, resources: &Resources) {
    let ChannelFds { qmp, console, guest_agent } = resources.channels;
    let listen =
        |id: &str, fd: RawFd| Pairs::new().first("socket").with("id", id).with("fd", fd).with("server", "on").with("wait", "off");
    line.pairs("-chardev", listen("qmp", qmp));
    line.pairs("-mon", Pairs::new().with("chardev", "qmp").with("mode", "control"));
    line.pairs("-chardev", listen("console", console));
    line.json("-device", Object::device("isa-serial", "serial0").with("chardev", "console").with("index", 0));
    line.pairs("-chardev", listen("guest-agent", guest_agent));
    let vnc = Sockets::in_dir(&resources.runtime_dir).vnc;
    line.pairs("-vnc", Pairs::new().first(format!("unix:{}", vnc.display())));
}

#[cfg(test)]
mod tests;
