//! What a side can see of its own QEMU and of the wire.

use godwit_model::{Bytes, BytesPerSec, Millis, Refusal};

/// Whether a QEMU's vCPUs run, as `query-status` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vcpus {
    /// `running`.
    Running,
    /// `paused` (and `prelaunch`): stopped by us.
    Paused,
    /// `finish-migrate`: stopped by QEMU for its switch-over; `cont` is refused.
    FinishMigrate,
    /// `postmigrate`: stopped after a completed or late-failed migration; only `cont` runs it again.
    PostMigrate,
    /// `inmigrate`: a destination that is still loading.
    InMigrate,
    /// Anything else: the guest ended or failed by itself.
    Other,
}

/// `query-migrate`'s status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QemuMigration {
    /// No migration was asked for.
    None,
    /// `setup` or `active`.
    Active,
    /// `pre-switchover`: waits for `migrate-continue`.
    PreSwitchover,
    /// `device`: the device state is under way.
    Device,
    /// A destination that has the devices' state, and memory that is still to come.
    PostCopy,
    /// The same, without a connection that it could come over.
    PostCopyPaused,
    /// `completed`.
    Completed,
    /// `failed` or `failing`.
    Failed,
    /// `cancelling`.
    Cancelling,
    /// `cancelled`.
    Cancelled,
    /// A status that this version does not know: treated as under way.
    Unknown,
}

impl QemuMigration {
    /// Whether memory is still to come to a destination that has the devices' state.
    #[must_use]
    pub const fn needs_pages(self) -> bool {
        matches!(self, Self::PostCopy | Self::PostCopyPaused)
    }

    /// Whether QEMU has stopped moving bytes for good.
    #[must_use]
    pub const fn is_over(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

/// A living QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuView {
    /// Its vCPUs.
    pub vcpus: Vcpus,
    /// Its migration.
    pub migration: QemuMigration,
    /// RAM still to send in this pass.
    pub remaining: Bytes,
    /// What the guest dirties per second, once measured.
    pub dirty_rate: Option<BytesPerSec>,
    /// Time since QEMU last collected dirty pages.
    pub since_sync: Millis,
    /// How often it has done that: passes over memory.
    pub rounds: u32,
}

/// The carry process of a side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CarryView {
    /// The process lives and its connection has not broken.
    pub usable: bool,
    /// The peer's carry has said welcome.
    pub connected: bool,
    /// Bytes of memory per second that would reach the destination if memory were sent again as it was lately.
    pub rate: BytesPerSec,
    /// How long what is under way takes to arrive.
    pub queued: Millis,
    /// Round trip.
    pub round_trip: Millis,
    /// How long something has been in flight without anything being applied.
    pub stalled: Millis,
    /// How long the destination's QEMU has not answered the last question; 0 if it has.
    pub unanswered: Millis,
    /// Post-copy is possible.
    pub can_leave: bool,
    /// Pages are left for after the switch: `rate` is that of noting them.
    pub leaving: bool,
}

/// The disks of a source that travel, all of them together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DisksView {
    /// What was on them was sent: from here on only what the guest writes follows.
    pub copied: bool,
    /// How long that takes to arrive.
    pub queued: Millis,
    /// The destination has everything, durably. Only after the stop.
    pub whole: bool,
    /// How long something has been in flight without anything being written at the destination.
    pub stalled: Millis,
    /// One cannot travel any more.
    pub failed: Option<Refusal>,
}

impl DisksView {
    /// Of a VM whose disks both hosts see.
    pub const NONE: Self = Self { copied: true, queued: Millis(0), whole: true, stalled: Millis(0), failed: None };
}

/// How a move ended for a side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The VM belongs to the destination.
    Moved,
    /// The VM belongs to the source.
    Stayed(Refusal),
}
