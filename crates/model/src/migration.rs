//! What is asked of a migration, what it tells while it runs, and what it cost.

use serde::{Deserialize, Serialize};

use crate::{Bytes, BytesPerSec, Ladder, Millis, Rung, VolumeRef};

/// Limits that a migration keeps; none of them is ever raised by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default)]
pub struct MigrationPolicy {
    /// Longest predicted blackout at which the VM is stopped.
    pub max_blackout: Millis,
    /// Upper limit of the wire rate; none by default.
    pub bandwidth: Option<BytesPerSec>,
    /// Longest warm-up. After it the migration is given up and the VM just keeps running.
    pub timeout: Millis,
    /// Longest time without any byte acknowledged during warm-up.
    pub stall: Millis,
    /// Longest time between our stop and QEMU's `completed`. After it the source is continued.
    pub stop_limit: Millis,
    /// What is done when passes over memory do not bring the blackout any nearer to `max_blackout`.
    #[schema(value_type = Vec<Rung>)]
    pub on_miss: Ladder,
    /// How long waiting for quiet, or throttling, is given before the next rung of `on_miss`.
    pub patience: Millis,
    /// Post-copy beside what `on_miss` says.
    pub postcopy: PostCopy,
}

impl MigrationPolicy {
    /// Whether the destination is to be made ready for post-copy: that has to be known before memory begins to move.
    #[must_use]
    pub fn prepares_postcopy(&self) -> bool {
        match self.postcopy {
            PostCopy::Never => false,
            PostCopy::ByLadder => self.on_miss.has(Rung::Postcopy) || self.on_miss.has(Rung::Ask),
            PostCopy::Ready | PostCopy::Now => true,
        }
    }

    /// Whether the VM's QEMU is to be made ready for slowing it down: that has to be known before the migration begins.
    #[must_use]
    pub fn prepares_throttle(&self) -> bool {
        self.on_miss.has(Rung::Throttle) || self.on_miss.has(Rung::Ask)
    }
}

/// Whether a VM may go on at the destination before all of its memory is there. From then on it needs both hosts until all has come: if one of them,
/// or its QEMU there, dies meanwhile, the VM is lost as in a crash.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PostCopy {
    /// Only if the ladder comes to it.
    #[default]
    ByLadder,
    /// And when it is asked for while the migration runs.
    Ready,
    /// As soon as every page was looked at once.
    Now,
    /// Not at all, whatever else is said.
    Never,
}

impl Default for MigrationPolicy {
    fn default() -> Self {
        Self {
            max_blackout: Millis(300),
            bandwidth: None,
            timeout: Millis(30 * 60_000),
            stall: Millis(120_000),
            stop_limit: Millis(10_000),
            on_miss: Ladder::default(),
            patience: Millis(60_000),
            postcopy: PostCopy::default(),
        }
    }
}

/// A volume of a VM that moves to a host which does not see it: a disk, variables of its firmware, or the state of its TPM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TravellingDisk {
    /// The volume; it has the same name at both hosts.
    pub volume: VolumeRef,
    /// Its size as the guest sees it; 0 for what QEMU's own stream takes along.
    #[serde(default)]
    pub size: Bytes,
    /// What of it is not empty, about.
    #[serde(default)]
    pub allocated: Bytes,
    /// Where the destination's carry listens for it.
    #[serde(default)]
    pub port: u16,
}

impl TravellingDisk {
    /// One of which nothing else is known yet.
    #[must_use]
    pub const fn new(volume: VolumeRef) -> Self {
        Self { volume, size: Bytes(0), allocated: Bytes(0), port: 0 }
    }
}

/// Where a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MigrationPhase {
    /// Checks, and QEMU is started on the destination.
    Prepare,
    /// Disks that the destination does not see are copied while the VM runs.
    Disks,
    /// Memory is copied while the VM runs.
    WarmUp,
    /// The VM stands still: the rest of memory and the device state are copied.
    StopAndCopy,
    /// The source has released the VM; the destination takes over.
    HandOver,
    /// The VM runs at the destination, and memory that was left follows.
    PostCopy,
    /// The destination runs; the source is cleared.
    CleanUp,
}

impl MigrationPhase {
    /// The word shown to people.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Disks => "disks",
            Self::WarmUp => "warm-up",
            Self::StopAndCopy => "stop-and-copy",
            Self::HandOver => "hand-over",
            Self::PostCopy => "post-copy",
            Self::CleanUp => "clean-up",
        }
    }
}

/// A migration under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MigrationProgress {
    /// Where it is.
    pub phase: MigrationPhase,
    /// Work believed done, in thousandths; never goes back.
    pub permille: u16,
    /// Bytes on the wire so far, TLS included.
    pub wire_bytes: Bytes,
    /// Bytes that QEMU has written so far.
    pub ram_bytes: Bytes,
    /// RAM still to send in this pass.
    pub remaining: Bytes,
    /// Bytes per second that the destination acknowledges.
    pub rate: BytesPerSec,
    /// Bytes per second that the VM dirties, once known.
    pub dirty_rate: Option<BytesPerSec>,
    /// Passes over memory begun.
    pub rounds: u32,
    /// Blackout if the VM were stopped now, once it can be predicted.
    pub predicted_blackout: Option<Millis>,
    /// Time left, if it ends at present rates at all.
    pub time_left: Option<Millis>,
    /// What is being done about a blackout that cannot be kept within its budget.
    #[serde(default)]
    pub rung: Option<Rung>,
}

/// What a migration cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MigrationFigures {
    /// From the request's acceptance by the source to the VM proven on the destination.
    pub total: Millis,
    /// No vCPU ran anywhere: from the stop on the source to the resume on the destination. Measured on the source's clock; half a round trip is
    /// its error.
    pub blackout: Millis,
    /// The blackout that was predicted at the moment of the stop; none if an agent was restarted in the middle.
    #[serde(default)]
    pub predicted_blackout: Option<Millis>,
    /// Bytes on the wire, both directions, TLS included.
    pub wire_bytes: Bytes,
    /// Bytes that QEMU wrote.
    pub ram_bytes: Bytes,
    /// Passes over memory.
    pub rounds: u32,
    /// Memory that followed after the switch, in post-copy.
    #[serde(default)]
    pub left: Bytes,
    /// Of `wire_bytes`, those of disks that the destination does not see.
    #[serde(default)]
    pub disk_bytes: Bytes,
    /// Of `total`, until what was on them was copied; memory begins then.
    #[serde(default)]
    pub disk_time: Millis,
    /// What it was expected to cost, once the source had measured how much the VM writes; none if it had left before.
    #[serde(default)]
    pub forecast: Option<MigrationForecast>,
}

/// What is believed of a number that is not known yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Estimate<T> {
    /// Hardly less.
    pub least: T,
    /// Most likely.
    pub expected: T,
    /// Hardly more.
    pub most: T,
}

/// What a migration is expected to cost, before it begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MigrationForecast {
    /// Memory that the guest has ever touched: so much has to be looked at.
    pub memory: Bytes,
    /// What is not empty of the disks that travel with it.
    #[serde(default)]
    pub disks: Bytes,
    /// What it writes to per second, as measured over one.
    pub dirty_rate: BytesPerSec,
    /// Guest memory that is believed to be moved per second.
    pub rate: BytesPerSec,
    /// From the request's acceptance by the source to the VM proven on the destination.
    pub total: Estimate<Millis>,
    /// No vCPU runs anywhere.
    pub blackout: Estimate<Millis>,
    /// Bytes on the wire.
    pub wire_bytes: Estimate<Bytes>,
    /// What must be allowed so that the VM can be stopped within its budget; none if it can. The estimates are then as if `max_blackout` were.
    pub needs: Option<MigrationNeeds>,
    /// How many earlier moves of this VM the estimates come from; with 0 a link of 1 Gbit/s and ordinary content are assumed.
    pub learned_from: u32,
}

/// Either would make a migration possible that is not possible within its limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MigrationNeeds {
    /// A blackout budget that the VM could keep as it writes now.
    pub max_blackout: Millis,
    /// A rate on the wire at which it could keep the budget that it has; none if that budget is less than what every switch takes.
    pub bandwidth: Option<BytesPerSec>,
}

/// Earlier moves of a VM, to learn from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PastMoves {
    /// The one in question goes to a host that has had the VM before, and may have kept its memory.
    pub returns: bool,
    /// The latest first.
    pub moves: Vec<PastMove>,
}

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PastMove {
    /// From and to the same hosts as the one in question.
    pub same_way: bool,
    /// It went to a host that had had the VM before.
    pub returned: bool,
    /// What it cost.
    pub figures: MigrationFigures,
}

/// What a source is asked for a forecast with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForecastRequest {
    /// Limits of the move.
    pub policy: MigrationPolicy,
    /// Earlier moves.
    pub past: PastMoves,
    /// Volumes that the destination does not see.
    #[serde(default)]
    pub disks: Vec<VolumeRef>,
}
