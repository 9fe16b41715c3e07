//! What the two agents of a move tell each other, over the carrier and, for when that is gone, through the controller. Every message
//! is a standing fact: repeating, delaying or reordering it does no harm; `docs/spec/handover.md` says what each means to whom.

use godwit_model::{Generation, Millis, Refusal, VmId};
use serde::{Deserialize, Serialize};

/// A message and the move it is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// The VM.
    pub vm: VmId,
    /// The generation that the destination is to run.
    pub generation: Generation,
    /// What is so.
    pub message: PeerMessage,
}

/// A standing fact about a move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "fact", rename_all = "snake_case")]
pub enum PeerMessage {
    /// Destination: I wait for your release. Repeated while that is so: no VM is stopped for an agent that stands still.
    Prepared,
    /// Source: my QEMU has completed or is proven dead; unless you decline I shall never run it again.
    Released,
    /// Source: it is off, I keep the VM. Do not run it.
    Aborted {
        /// Why.
        reason: Refusal,
    },
    /// Destination: I run it.
    Running {
        /// How long its vCPUs had run when this was sent.
        since: Millis,
    },
    /// Destination: I run it or have run it, and need nothing more of it: all memory that was left has come, or its QEMU is dead. Said in place of `Running`
    /// after post-copy.
    Whole {
        /// As of `Running`.
        since: Millis,
    },
    /// Destination: I have never run it and never shall.
    Declined {
        /// Why.
        reason: Refusal,
    },
    /// Source: I cannot send what was left to the carry that listens on this port of yours: it, or mine, is gone.
    Cut {
        /// The port.
        port: u16,
    },
    /// Destination: to send what was left, dial this port of mine.
    GoOn {
        /// The port.
        port: u16,
    },
    /// Source: memory that was left is lost, and with it the VM if you still need it.
    Lost,
    /// Source: I know how it ended; you need not tell me again.
    Settled,
}
