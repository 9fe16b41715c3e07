//! The command line: a pure function of what a VM is ([`ResolvedSpec`]) and what it is given on this host ([`Resources`]).
//!
//! What the guest can see (machine, CPU, devices and their PCI addresses, queue numbers, ROM sizes) depends on the spec alone, so that the
//! same spec makes the same machine on every host and with every QEMU: it is the ABI that a VM keeps for life. PCI slots on `pcie.0`:
//!
//! ```text
//!  01 rng   02 balloon   03 serial (guest agent)   04 VGA   08-0f disks 0-7   10-17 interfaces 0-7   1f chipset
//! ```
//! Interfaces have no option ROM (network boot is not offered), VGA's ROM is fixed at 64 KiB: a ROM is a RAM block, and its size would
//! otherwise differ between versions and end a migration. The serial console has no log file, since a guest could fill the host's disk
//! with it: the agent is the socket's only client and keeps a bounded log.

mod options;

use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::{fmt, io};

use godwit_model::{Accelerator, CacheMode, ResolvedSpec};
use rustix::fs::{Mode, OFlags};

use crate::cage::PassedFds;
use options::{Object, Pairs};

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
    /// Descriptors of the disks, in the order of the spec.
    pub disks: Vec<DiskFds>,
    /// Tap descriptors with `IFF_VNET_HDR`, in the order of the spec.
    pub taps: Vec<RawFd>,
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
            Ok(fds.pass(UnixListener::bind(path)?))
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

const DISK_SLOT: usize = 0x08;
const NIC_SLOT: usize = 0x10;
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
    add_platform(&mut line, spec);
    add_boot(&mut line, spec, resources);
    add_channels(&mut line, resources);
    add_fixed_devices(&mut line);
    for (index, (disk, fds)) in spec.disks.iter().zip(&resources.disks).enumerate() {
        add_disk(&mut line, index, disk, *fds, spec.vcpus);
    }
    for (index, (nic, tap)) in spec.nics.iter().zip(&resources.taps).enumerate() {
        add_nic(&mut line, index, nic, *tap, &spec.machine);
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
    add_accelerator(&mut line, accelerator);
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
        ("disks", spec.disks.len(), resources.disks.len()),
        ("interfaces", spec.nics.len(), resources.taps.len()),
    ];
    for (what, wanted, given) in counts {
        if wanted != given || wanted > MAX_DEVICES {
            return Err(CommandError::Count { what, wanted, given });
        }
    }
    // A spec may have crossed the network since it was validated.
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

fn add_platform(line: &mut Line, spec: &ResolvedSpec) {
    let machine = Pairs::new().first(&spec.machine).with("usb", "off").with("vmport", "off").with("smm", "off");
    // Merging equal pages across VMs lets one team's VM measure another's memory.
    line.pairs("-machine", machine.with("dump-guest-core", "off").with("mem-merge", "off"));
    add_accelerator(line, spec.accelerator);
    line.pairs("-cpu", Pairs::new().first(&spec.cpu).first("enforce"));
    line.pairs("-smp", Pairs::new().with("cpus", spec.vcpus).with("sockets", 1).with("cores", spec.vcpus).with("threads", 1));
    line.pairs("-m", Pairs::new().with("size", format!("{}k", spec.memory.get() >> 10)));
    line.pairs("-overcommit", Pairs::new().with("mem-lock", "off"));
    line.pairs("-rtc", Pairs::new().with("base", "utc").with("driftfix", "slew"));
    line.pairs("-boot", Pairs::new().with("menu", "off").with("strict", "on"));
    line.option("-display", "none");
}

fn add_accelerator(line: &mut Line, accelerator: Accelerator) {
    line.pairs(
        "-accel",
        match accelerator {
            Accelerator::Kvm => Pairs::new().first("kvm"),
            // The translation cache, in MiB, grows to this and is no guest RAM.
            Accelerator::Tcg => Pairs::new().first("tcg").with("thread", "multi").with("tb-size", 256),
        },
    );
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

fn add_fixed_devices(line: &mut Line) {
    line.json("-object", Object::new().with("qom-type", "rng-builtin").with("id", "entropy"));
    line.json("-device", Object::pci("virtio-rng-pci", "rng0", 0x01).modern().with("rng", "entropy"));
    line.json("-device", Object::pci("virtio-balloon-pci", "balloon0", 0x02).modern().with("deflate-on-oom", true));
    line.json("-device", Object::pci("virtio-serial-pci", "channels", 0x03).modern().with("max_ports", 4));
    let port = Object::device("virtserialport", "guest-agent-port").with("bus", "channels.0").with("nr", 1);
    line.json("-device", port.with("chardev", "guest-agent").with("name", "org.qemu.guest_agent.0"));
    line.json("-device", Object::pci("VGA", "vga", 0x04).with("vgamem_mb", 8).with("romsize", 0x1_0000));
}

fn add_disk(line: &mut Line, index: usize, disk: &godwit_model::spec::ResolvedDisk, fds: DiskFds, vcpus: u16) {
    let set = index + 1;
    for (fd, access) in [(fds.read_only, "read-only"), (fds.read_write, "read-write")] {
        line.pairs("-add-fd", Pairs::new().with("fd", fd).with("set", set).with("opaque", format!("disk{index}-{access}")));
    }
    let cache = || Object::new().with("direct", disk.cache == CacheMode::Direct).with("no-flush", false);
    let file = Object::new()
        .with("driver", "file")
        .with("node-name", format!("disk{index}-file"))
        .with("filename", format!("/dev/fdset/{set}"))
        .with("aio", "threads")
        .with("locking", "on")
        .with("auto-read-only", false)
        .with("discard", "unmap")
        .with("cache", cache());
    line.json("-blockdev", file);
    let node = Object::new()
        .with("driver", disk.format.driver())
        .with("node-name", format!("disk{index}"))
        .with("file", format!("disk{index}-file"))
        .with("read-only", false)
        .with("discard", "unmap")
        .with("cache", cache());
    // The declared format, and nothing that a header may refer to outside the volume.
    let qcow2 = disk.format == godwit_model::DiskFormat::Qcow2;
    line.json("-blockdev", if qcow2 { node.with_null("backing") } else { node });
    let device = Object::pci("virtio-blk-pci", &format!("disk{index}-device"), DISK_SLOT + index)
        .modern()
        .with("drive", format!("disk{index}"))
        .with("serial", format!("disk{index}"))
        .with("num-queues", vcpus.min(8))
        .with("write-cache", "on")
        .with("logical_block_size", 512)
        .with("physical_block_size", 512);
    line.json("-device", if index == 0 { device.with("bootindex", 1) } else { device });
}

fn add_nic(line: &mut Line, index: usize, nic: &godwit_model::spec::ResolvedNic, tap: RawFd, machine: &str) {
    let backend = Object::new().with("type", "tap").with("id", format!("net{index}-tap"));
    line.json("-netdev", backend.with("fd", tap.to_string()).with("vhost", false));
    let mut device = Object::pci("virtio-net-pci", &format!("net{index}"), NIC_SLOT + index)
        .modern()
        .with("netdev", format!("net{index}-tap"))
        .with("mac", nic.mac)
        .with("romfile", "")
        .with("mq", false);
    if let Some(mtu) = nic.mtu {
        // The guest sees it: the same on every host of the network, for as long as the VM runs.
        device = device.with("host_mtu", mtu);
    }
    if has_udp_segmentation(machine) {
        // Offered only where the host's kernel can do it, so it would tie the VM to new kernels.
        device = device.with("host_uso", false).with("guest_uso4", false).with("guest_uso6", false);
    }
    line.json("-device", device);
}

/// Whether a machine type is new enough (8.2) to offer UDP segmentation; every QEMU that knows such a type knows the properties.
fn has_udp_segmentation(machine: &str) -> bool {
    let version = machine.rsplit('-').next().and_then(|version| version.split_once('.'));
    version.and_then(|(major, minor)| Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?))) >= Some((8, 2))
}

#[cfg(test)]
mod tests;
