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
    /// The host at the other end: its certificate must say so.
    pub(crate) peer: Name,
    /// BLAKE3 of the public keys that may speak for it: its certificate must be of one of them.
    pub(crate) peer_keys: Vec<String>,
    /// Our end of the socket pair whose other end QEMU holds.
    pub(crate) qemu_fd: RawFd,
    /// Listening unix socket for the agent.
    pub(crate) control_fd: RawFd,
    /// Silence after which the connection is given up.
    pub(crate) silence: Millis,
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
    Source { address: SocketAddr, bandwidth: Option<BytesPerSec> },
    /// Accepts one connection on this listening descriptor.
    Destination { listen_fd: RawFd },
}

/// What carry knows, told on every change of `connected` or `broken` and several times a second.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CarryStatus {
    /// Both sides have said who they are.
    pub(crate) connected: bool,
    /// Why nothing moves any more.
    pub(crate) broken: Option<String>,
    /// Bytes on the wire, both directions, TLS included.
    pub(crate) wire_bytes: u64,
    /// Bytes of QEMU's stream taken from the source, or handed to the destination.
    pub(crate) stream_bytes: u64,
    /// Bytes per second applied at the destination.
    pub(crate) rate: u64,
    /// Round trip in microseconds.
    pub(crate) round_trip_us: u64,
    /// Milliseconds since something in flight was last applied; 0 while nothing is in flight.
    pub(crate) stalled_ms: u64,
}

/// From carry to agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FromCarry {
    /// How it stands.
    Status(CarryStatus),
    /// A message of the other agent.
    Peer(Box<serde_json::value::RawValue>),
}

/// From agent to carry.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ToCarry {
    /// A message for the other agent.
    Peer(Box<serde_json::value::RawValue>),
    /// End the process.
    Quit,
}
