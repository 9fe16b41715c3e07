//! What an agent and its carry say to each other: a configuration once, then JSON lines. Both ends are of one version: carry is started from
//! the agent's own binary, and a newer agent only adds fields.

use std::net::SocketAddr;
use std::os::fd::RawFd;

use godwit_model::{BytesPerSec, Generation, Millis, Name, TaskId, VmId};
use serde::{Deserialize, Serialize};

/// Longest line.
pub(super) const MAX_LINE: usize = 128 << 10;

/// How a carry begins: JSON in the descriptor named by `--config-fd`.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct CarryConfig {
    pub(crate) role: Role,
    pub(crate) vm: VmId,
    pub(crate) task: TaskId,
    pub(crate) generation: Generation,
    /// 0 for memory and devices, from 1 on for a disk.
    pub(crate) lane: u16,
    /// The host at the other end: its certificate must say so.
    pub(crate) peer: Name,
    /// BLAKE3 of the public keys that may speak for it: its certificate must be of one of them.
    pub(crate) peer_keys: Vec<String>,
    /// Memory that the VM has at most, in pages of 4 KiB.
    pub(crate) pages: u64,
    /// Our end of the socket whose other end QEMU holds: of its migration; of a disk, to its mirror at the source and to its disk at the destination.
    pub(crate) qemu_fd: RawFd,
    /// Listening unix socket for the agent.
    pub(crate) control_fd: RawFd,
    /// Time without a connection after which the session is given up.
    pub(crate) patience: Millis,
    /// PEM: this host's certificate, its key, the cluster's authority. Passed by memory only.
    pub(crate) certificate: String,
    pub(crate) key: String,
    pub(crate) authority: String,
}

/// Which side, with what only that side needs.
#[derive(Clone, Serialize, Deserialize)]
#[serde(tag = "role", rename_all = "snake_case")]
pub(crate) enum Role {
    /// Dials.
    ///
    /// With `again` it sends what the destination does not have, of a VM that has left; QEMU's socket is then of no use.
    /// `own` is where the guest's memory is, and `emulated` that QEMU emulates its vCPUs and may miss a write.
    /// `held` says that QEMU cannot switch over by itself; one that can must not be through before the agent has looked.
    Source {
        address: SocketAddr,
        bandwidth: Option<BytesPerSec>,
        own: Option<Placement>,
        emulated: bool,
        held: bool,
        images: Vec<IndexedImageFds>,
        again: bool,
    },
    /// Accepts connections on this listening descriptor. `neighbours` are other VMs, which run, and whose memory is read. `advises` says that its QEMU
    /// is set up for post-copy. `again` is the number of the RAM section, of a QEMU that runs and waits for pages.
    Destination {
        listen_fd: RawFd,
        placement: Option<Placement>,
        advises: bool,
        kept: Option<KeptMemory>,
        lent: Option<LentMemory>,
        images: Vec<ImageFd>,
        neighbours: Vec<Placement>,
        again: Option<u32>,
    },
    /// Dials, for a disk. `disk_fd` is a connection to the NBD server of the QEMU that has it.
    DiskSource {
        address: SocketAddr,
        bandwidth: Option<BytesPerSec>,
        disk_fd: RawFd,
        disk: OwnDiskFacts,
        images: Vec<IndexedImageFds>,
    },
    /// Accepts connections, for a disk of `size` bytes. `base` is the generation on which the VM left what is there, 0 if that is not known.
    DiskDestination { listen_fd: RawFd, export: String, size: u64, base: Option<u64>, images: Vec<ImageFd> },
}

/// A disk that travels.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct OwnDiskFacts {
    /// Name of its exports.
    pub(crate) export: String,
    /// Bytes.
    pub(crate) size: u64,
    /// A dirty bitmap of everything that was written since the VM came, and the generation on which it did.
    pub(crate) since: Option<(String, u64)>,
}

/// An image that the VM was made from, with its index.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct IndexedImageFds {
    pub(crate) image_fd: RawFd,
    pub(crate) index_fd: RawFd,
}

/// An image that the VM was made from.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct ImageFd {
    pub(crate) fd: RawFd,
    /// BLAKE3 of all of it.
    pub(crate) digest: [u8; 32],
    /// How many whole pages of 4 KiB it has.
    pub(crate) pages: u32,
}

/// How the memory of a QEMU is reached.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Placement {
    /// `/proc/PID/mem`; for writing, too, at the destination.
    pub(crate) memory_fd: RawFd,
    /// `/proc/PID/pagemap`.
    pub(crate) map_fd: RawFd,
    /// Where what is.
    pub(crate) blocks: Vec<PlacedBlock>,
}

/// Memory of the VM that this host kept when the VM left it.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct KeptMemory {
    /// A stay, for reading.
    pub(crate) file_fd: RawFd,
    /// What it is sealed with.
    pub(crate) key: [u8; 32],
}

/// Memory of a snapshot of the VM.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct LentMemory {
    /// What a vault worker writes of it.
    pub(crate) from_fd: RawFd,
    /// On which generation the VM ran when it was taken; 0 if that is not known.
    pub(crate) generation: Generation,
    /// How long it is waited for, once there is something to put it into.
    pub(crate) within: Millis,
}

/// A block of guest memory in the address space of its QEMU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PlacedBlock {
    /// QEMU's name of it, which travels in the stream.
    pub(crate) id: String,
    pub(crate) address: u64,
    /// Its length in pages of 4 KiB.
    pub(crate) pages: u32,
}

/// What carry knows, told on every change of `connected` or `broken` and several times a second.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CarryStatus {
    /// Both sides have said who they are.
    pub(crate) connected: bool,
    /// Why nothing moves any more.
    pub(crate) broken: Option<String>,
    /// BLAKE3 of an image of this host that is not what it was.
    #[serde(default)]
    pub(crate) changed_image: Option<[u8; 32]>,
    /// Bytes on the wire, both directions, TLS included.
    pub(crate) wire_bytes: u64,
    /// Bytes of QEMU's stream taken from the source; at the destination, of stream and memory handed on.
    pub(crate) stream_bytes: u64,
    /// Bytes of guest memory per second that would be moved if memory were sent again as it was lately.
    pub(crate) rate: u64,
    /// Bytes per second that the link takes.
    pub(crate) link_rate: u64,
    /// Bytes on the wire that are under way.
    pub(crate) in_flight: u64,
    /// Milliseconds that comparing memory once more takes when the VM stands still.
    pub(crate) looking_ms: u64,
    /// Milliseconds that the destination's QEMU has not answered the last question; 0 if it has.
    pub(crate) unanswered_ms: u64,
    /// Pages that were sent, by how.
    pub(crate) pages: PageCounts,
    /// Round trip in microseconds.
    pub(crate) round_trip_us: u64,
    /// Milliseconds since something in flight was last applied; 0 while nothing is in flight.
    pub(crate) stalled_ms: u64,
    /// Of post-copy.
    #[serde(default)]
    pub(crate) postcopy: PostCopyStatus,
    /// Of a disk.
    #[serde(default)]
    pub(crate) disk: DiskStatus,
}

/// Where a disk is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct DiskStatus {
    /// Bytes of it that need nothing more: what was there at the beginning and is there, or need not be sent.
    pub(crate) looked_at: u64,
    /// All of that was sent.
    pub(crate) copied: bool,
    /// The destination has everything, and it is durable.
    pub(crate) whole: bool,
    /// Milliseconds that what is under way takes to be written at the destination, once that is known.
    pub(crate) waiting_ms: u64,
}

/// Where post-copy is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct PostCopyStatus {
    /// Both sides can do it.
    pub(crate) possible: bool,
    /// Pages are left for after the switch.
    pub(crate) leaving: bool,
    /// The destination was told to go on without them.
    pub(crate) switched: bool,
    /// At the destination: the number of the RAM section, once it has switched.
    pub(crate) section: Option<u32>,
    /// At the source, pages that were not sent; at the destination, such that have not come.
    pub(crate) left: u64,
    /// At the source that switched: how many were left then.
    pub(crate) left_at_switch: u64,
}

/// How pages were sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PageCounts {
    /// Not at all: the destination had them.
    pub(crate) same: u64,
    pub(crate) zero: u64,
    pub(crate) copy: u64,
    #[serde(default)]
    pub(crate) image: u64,
    #[serde(default)]
    pub(crate) common: u64,
    pub(crate) patch: u64,
    pub(crate) data: u64,
}

/// From carry to agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FromCarry {
    /// How it stands.
    Status(Box<CarryStatus>),
    /// A message of the other agent.
    Peer(Box<serde_json::value::RawValue>),
}

/// From agent to carry.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ToCarry {
    /// A message for the other agent.
    Peer(Box<serde_json::value::RawValue>),
    /// The VM is about to be stopped, or stands still.
    Hurry,
    /// Read nothing from QEMU for so long; 0: go on.
    Hold(Millis),
    /// What it may take of the wire from here on.
    Bandwidth(Option<BytesPerSec>),
    /// Send no page any more before the switch, if post-copy is possible.
    Leave,
    /// The mirror of the disk runs, and it can be read: copy what is on it.
    Begin,
    /// End the process.
    Quit,
}
