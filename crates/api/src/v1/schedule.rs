//! Schedules on the wire.

use godwit_model::{Name, Refusal, ScheduleId, ScheduleSpec, TaskId, UnixMillis};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// When snapshots of which VMs are taken by themselves, and which of them are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Schedule {
    /// Identity. Another schedule of the same name has another, and nothing to do with the snapshots of this one.
    pub id: ScheduleId,
    /// Name, unique in its team.
    pub name: Name,
    /// Owner.
    pub team: Name,
    /// Grows with every change and every run; pass as `If-Match` to refuse on what changed meanwhile.
    pub revision: u64,
    /// When it was created.
    pub created: UnixMillis,
    /// What it says.
    pub spec: ScheduleSpec,
    /// When it runs next; none while it is not enabled.
    pub next: Option<UnixMillis>,
    /// Its last run.
    pub last: Option<ScheduledRun>,
    /// The newest instant that passed without a run, since the controller was away for longer than may be made up.
    pub missed: Option<UnixMillis>,
}

/// A run of a schedule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ScheduledRun {
    /// When it was due.
    pub due: UnixMillis,
    /// When it began.
    pub began: UnixMillis,
    /// Who asked for it, if it did not run by itself.
    pub principal: Option<String>,
}

/// Asks for a new schedule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ScheduleCreate {
    /// Its name.
    pub name: Name,
    /// What it says.
    pub spec: ScheduleSpec,
}

/// Asks for a change of a schedule. Instants that have passed by then are not made up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ScheduleSet {
    /// What it is to say, all of it.
    pub spec: ScheduleSpec,
}

/// Asks a schedule to run now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ScheduleRun {
    /// Why; recorded with the snapshots.
    #[serde(default)]
    pub reason: Option<String>,
}

/// How a schedule stands with each of its VMs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ScheduleStatus {
    /// The VMs, in the order of their names.
    pub vms: Vec<ScheduledVm>,
}

/// How a schedule stands with a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ScheduledVm {
    /// The VM.
    pub vm: Name,
    /// Whether the schedule is still for it.
    pub chosen: bool,
    /// The instant whose snapshot is still to come, or is being taken.
    pub due: Option<UnixMillis>,
    /// What that waits for.
    pub waits_for: Option<String>,
    /// The task that takes it.
    pub task: Option<TaskId>,
    /// What became of the last one.
    pub last: Option<ScheduledOutcome>,
    /// Snapshots of it that the schedule has taken, the newest first.
    pub snapshots: Vec<Name>,
    /// Those of them that the schedule would delete once it has taken the next.
    pub expiring: Vec<Name>,
}

/// What became of a VM's part in a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ScheduledOutcome {
    /// When it was due.
    pub due: UnixMillis,
    /// When it was over.
    pub ended: UnixMillis,
    /// What it came to.
    pub result: ScheduledResult,
    /// The snapshot, if there is one.
    pub snapshot: Option<Name>,
    /// Why there is none.
    pub error: Option<Refusal>,
}

/// What a VM's part in a run came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScheduledResult {
    /// A snapshot.
    Taken,
    /// None was begun.
    Skipped,
    /// One was begun and did not come to be.
    Failed,
}
