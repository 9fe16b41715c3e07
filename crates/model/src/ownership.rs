//! Who may run a VM: generations, grants and the controller's epoch.
//!
//! Invariant "one runner": a VM's vCPUs run only where the newest `(vm, generation)` was granted. Generations are issued, never guessed.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Name, TaskId, UnixMillis, VmId};

/// A right to run a VM: every start and every move gets the next number, and a number is never used twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl Generation {
    /// The number after this.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The controller's reign: grows with every start of a leading controller. Agents refuse commands of an older one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(transparent)]
pub struct Epoch(pub u64);

/// What the controller grants for one start or one move.
///
/// Without `source` it is unconditional: `destination` may start the VM. With `source` it is *conditional*: `destination` may run the VM on
/// `generation` only after the source has released the generation before; the source may run it until then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// The VM.
    pub vm: VmId,
    /// The generation that `destination` will run.
    pub generation: Generation,
    /// The host that runs the VM now, for a move.
    pub source: Option<Name>,
    /// The host that may run `generation`.
    pub destination: Name,
    /// The task this was issued for.
    pub task: TaskId,
    /// After this moment the source must not begin the hand-over, and a destination that was not released may decline by itself.
    pub expires: UnixMillis,
}
