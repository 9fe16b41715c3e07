//! Version 1 on the wire. Times are milliseconds since 1970 UTC, sizes bytes, rates bytes per second.

use std::collections::BTreeMap;

use godwit_model::guest::EXEC_TIMEOUT;
use godwit_model::{
    Accelerator, Activity, Bytes, BytesPerSec, ExecRequest, Generation, GuestFacts, HostFacts, HostLoad, ImageId, ImageKind,
    ImportFormat, InterfaceDrops, MigrationFigures, MigrationForecast, MigrationProgress, MigrationSettings, Millis, Name,
    NetworkId, NetworkKind, Octets, QuietTime, Refusal, RestoreFigures, RunState, SnapshotExport, SnapshotFigures, SnapshotId,
    TaskId, TokenId, UnixMillis, VaultPlan, VaultUsage, VmId, VmSpec, VolumeRef,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

mod schedule;

pub use schedule::{
    Schedule, ScheduleCreate, ScheduleRun, ScheduleSet, ScheduleStatus, ScheduledOutcome, ScheduledResult, ScheduledRun,
    ScheduledVm,
};

/// Largest JSON body, in bytes.
pub const MAX_BODY: usize = 1 << 20;

/// The error body of every operation.
pub type Error = Refusal;

/// One page of a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Page<T> {
    /// The objects, ordered by name (tasks and tokens: newest first).
    pub items: Vec<T>,
    /// Pass as `after` to get the next page; absent on the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// Whether the controller serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// Version of the controller.
    pub version: String,
    /// Its epoch.
    pub epoch: u64,
}

/// A virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// Identity for life.
    pub id: VmId,
    /// Name, unique in its team.
    pub name: Name,
    /// Owner.
    pub team: Name,
    /// Grows with every change; pass as `If-Match` to refuse on what changed meanwhile.
    pub revision: u64,
    /// When it was created.
    pub created: UnixMillis,
    /// What was asked for.
    pub spec: VmSpec,
    /// What is.
    pub status: VmStatus,
}

/// What is observed of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmStatus {
    /// Last known state.
    pub state: RunState,
    /// Where it runs, or ran last.
    pub host: Option<Name>,
    /// Newest generation that was granted and not declined.
    pub generation: Generation,
    /// The task that holds it.
    pub activity: Option<Activity>,
    /// What it was started with; kept until it is next started from stopped.
    pub started: Option<Started>,
    /// What of its spec takes effect at its next start; empty while it does not run.
    #[serde(default)]
    pub waiting: Vec<Waiting>,
    /// Addresses of its interfaces, in the order of the spec.
    pub macs: Vec<String>,
    /// What was dropped of what its interfaces sent, since it came to its host; interfaces of which nothing was dropped are left out.
    #[serde(default)]
    pub dropped: Vec<InterfaceDrops>,
    /// What is not as it should be.
    pub conditions: Vec<Condition>,
    /// Whether it could move to any other host; looked at again whenever something changes. None while it does not run.
    #[serde(default)]
    pub migratable: Option<Migratable>,
    /// What it wrote to its memory when that was measured last, in bytes per second; none while it does not run.
    #[serde(default)]
    pub dirty_rate: Option<BytesPerSec>,
    /// The time of day at which it writes least to its memory, if it is known and there is one: the best for a move.
    #[serde(default)]
    pub quiet: Option<QuietTime>,
    /// What its seed holds; the texts themselves are never shown, and `spec` leaves them out.
    #[serde(default)]
    pub cloud_init: Option<SeedFacts>,
    /// What the guest says of itself through its agent, if it has one; asked about once a minute. Hostile text.
    #[serde(default)]
    pub guest: Option<GuestFacts>,
    /// When `state` last changed.
    pub since: UnixMillis,
}

/// Whether a running VM could move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Migratable {
    /// To at least one other host.
    pub possible: bool,
    /// Why not, if not: what is in the way at the host that comes nearest, as it was when this was last so.
    pub reason: Option<Refusal>,
    /// Since when.
    pub since: UnixMillis,
}

/// One generation of a VM: a right to run it, and what became of that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reign {
    /// Its number.
    pub generation: Generation,
    /// The host that it was granted to.
    pub host: Name,
    /// When.
    pub granted: UnixMillis,
    /// When the VM began to run there, as far as the controller has heard; none if it never did.
    pub began: Option<UnixMillis>,
    /// When that ended.
    pub ended: Option<UnixMillis>,
    /// How it ended; none if it has not.
    pub end: Option<ReignEnd>,
    /// The task that it was granted for.
    pub task: Option<TaskId>,
    /// What kind of task that was, such as `vm.migrate`.
    pub kind: String,
    /// Who asked for that.
    pub principal: String,
    /// Why, in their words.
    pub reason: Option<String>,
    /// What the migration that brought the VM there cost, and which blackout was predicted for it.
    #[serde(default)]
    pub figures: Option<MigrationFigures>,
}

/// How a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReignEnd {
    /// The VM went on elsewhere, on a newer one.
    Moved,
    /// The VM was stopped, or its guest powered off.
    Stopped,
    /// QEMU ended without being asked to.
    Crashed,
    /// The VM never ran on it: the move was given up.
    NotUsed,
}

/// The generations of a VM, the newest last; of very many the newest 200.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmHistory {
    /// Each of them.
    pub generations: Vec<Reign>,
}

/// Whether a running VM could move to each of some hosts now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmCheck {
    /// Where it runs.
    pub source: Name,
    /// The hosts that were looked at, in the order of their names.
    pub hosts: Vec<HostCheck>,
}

/// Whether a running VM could move to a host now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostCheck {
    /// The host.
    pub host: Name,
    /// Everything that is in the way, each with what to do; empty if it could move.
    pub obstacles: Vec<Refusal>,
}

/// Sizes of what cloud-init tells a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SeedFacts {
    /// Of `user-data`.
    pub user_data: Option<Bytes>,
    /// Of `network-config`.
    pub network_config: Option<Bytes>,
    /// Of `vendor-data`.
    pub vendor_data: Option<Bytes>,
}

/// What a VM was started with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Started {
    /// Versioned machine type.
    pub machine: String,
    /// CPU model.
    pub cpu: String,
    /// Accelerator.
    pub accelerator: Accelerator,
}

/// A part of a VM's spec that takes effect at its next start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Waiting {
    /// Which part, such as `memory` or `disk in slot 1`.
    pub field: String,
    /// What the VM runs with; null where it has no such part.
    pub running: serde_json::Value,
    /// What it is to be; null where it will have no such part.
    pub wanted: serde_json::Value,
    /// Why it waits, where such a part can change while the VM runs.
    #[serde(default)]
    pub reason: Option<String>,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Condition {
    /// Stable name, such as `host_unreachable`.
    pub name: String,
    /// The facts.
    pub message: String,
    /// What to do.
    pub fix: String,
}

/// Asks for a new VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmCreate {
    /// Its name.
    pub name: Name,
    /// What it is made of.
    pub spec: VmSpec,
    /// A golden snapshot `NAME-golden` is taken of it, once, when it has first been started.
    #[serde(default)]
    pub golden: Option<GoldenCreate>,
}

/// When a golden snapshot is taken of a new VM: as soon as its guest's agent answers, or after a while.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GoldenCreate {
    /// How long the VM has to have run if no agent answers; a minute by default.
    #[serde(default)]
    pub after: Option<Millis>,
}

/// Asks for a start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmStart {
    /// The host; by default the one with most free memory among those that can run it.
    #[serde(default)]
    pub host: Option<Name>,
}

/// Asks for a stop.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmStop {
    /// How long to wait for the guest; 5 minutes by default. The VM is never killed by it.
    #[serde(default)]
    pub timeout: Option<Millis>,
}

/// Asks for a deletion.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmDelete {
    /// Also delete its volumes.
    #[serde(default)]
    pub volumes: bool,
}

/// Asks for a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmMigrate {
    /// Where to.
    pub host: Name,
    /// Its limits; what is not said comes from the VM and from policies.
    #[serde(default)]
    pub policy: MigrationSettings,
    /// Only check and tell.
    #[serde(default)]
    pub dry_run: bool,
    /// Why; recorded with the task.
    #[serde(default)]
    pub reason: Option<String>,
}

/// Asks for a program to be run in the guest.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmExec {
    /// The program: a path in the guest, or a name that its agent looks up.
    pub program: String,
    /// Its arguments, at most 256 and 64 KiB. They are not recorded.
    #[serde(default)]
    pub args: Vec<String>,
    /// What it reads, base64; at most 512 KiB.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub stdin: Option<Octets>,
    /// How long to wait for its end; a minute by default, at most 15. It is never ended by this.
    #[serde(default)]
    pub timeout: Option<Millis>,
}

impl std::fmt::Debug for VmExec {
    /// Not its arguments: they may hold secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmExec").field("program", &self.program).finish_non_exhaustive()
    }
}

impl From<VmExec> for ExecRequest {
    fn from(request: VmExec) -> Self {
        let VmExec { program, args, stdin, timeout } = request;
        Self { program, args, stdin, timeout: timeout.unwrap_or(EXEC_TIMEOUT) }
    }
}

/// A host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    /// Its name.
    pub name: Name,
    /// Grows with every change.
    pub revision: u64,
    /// The address at which its peers reach it.
    pub address: String,
    /// The address at which moves reach it, if it is another.
    pub migration_address: Option<String>,
    /// What all migrations that leave it may take of the wire together; none is no limit.
    #[serde(default)]
    pub migration_bandwidth: Option<BytesPerSec>,
    /// Whether its agent is connected.
    pub connected: bool,
    /// When `connected` last changed.
    pub since: UnixMillis,
    /// What it said of itself when it last connected.
    pub facts: Option<HostFacts>,
    /// Its last heartbeat.
    pub load: Option<HostLoad>,
}

/// What the CPUs of hosts have in common, for one accelerator: what a VM may use that can move to any of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CpuBaseline {
    /// What executes VMs there.
    pub accelerator: Accelerator,
    /// The x86-64 level that all of them reach, 1 to 4, as the psABI defines it; 0 if not even the first.
    pub level: u8,
    /// The CPU model that VMs get by default; empty if it does not run on all of them.
    pub default_model: String,
    /// Named CPU models that run on all of them.
    pub models: Vec<String>,
    /// Features that all of them have.
    pub features: Vec<String>,
    /// The hosts, and what each has beyond that.
    pub hosts: Vec<CpuOfHost>,
}

/// What the CPU of one host has beyond the baseline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CpuOfHost {
    /// Its name.
    pub host: Name,
    /// The level that it reaches.
    pub level: u8,
    /// Features that not all others have.
    pub features: Vec<String>,
    /// Models that do not run on all others.
    pub models: Vec<String>,
}

/// A pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pool {
    /// Its name.
    pub name: Name,
    /// Whether all its hosts see the same storage.
    pub shared: bool,
    /// Hosts that have it.
    pub hosts: Vec<Name>,
    /// Size; the smallest seen.
    pub capacity: Bytes,
    /// Free space; the smallest seen.
    pub free: Bytes,
    /// Findings, such as hosts that declared it shared but see different storage.
    pub conditions: Vec<Condition>,
}

/// An imported image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// Identity.
    pub id: ImageId,
    /// Name, unique in its team.
    pub name: Name,
    /// Owner.
    pub team: Name,
    /// Grows with every change.
    pub revision: u64,
    /// What it is for.
    pub kind: ImageKind,
    /// Size in bytes.
    pub size: Bytes,
    /// BLAKE3 of the content, hexadecimal.
    pub digest: String,
    /// When it was imported.
    pub created: UnixMillis,
}

/// A network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Network {
    /// Identity.
    pub id: NetworkId,
    /// Name, unique in its team.
    pub name: Name,
    /// Owner.
    pub team: Name,
    /// Grows with every change; pass as `If-Match` to refuse on what changed meanwhile.
    pub revision: u64,
    /// How its hosts are joined.
    pub kind: NetworkKind,
    /// VXLAN network identifier of an overlay.
    pub vni: Option<u32>,
    /// Largest packet that VMs may send on it, in bytes. Guests with virtio are told.
    pub mtu: u32,
    /// Connected hosts that cannot take part in it, and why.
    pub conditions: Vec<Condition>,
    /// When it was created.
    pub created: UnixMillis,
}

/// Asks for a new network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkCreate {
    /// Its name.
    pub name: Name,
    /// How its hosts are joined; an overlay by default.
    #[serde(default)]
    pub kind: NetworkKind,
    /// Its MTU, 1280 to 9216; by default what the connected hosts carry, at most 1500.
    #[serde(default)]
    pub mtu: Option<u32>,
}

/// Limits of the migrations of VMs that have certain labels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Policy {
    /// Name, unique in its team.
    pub name: Name,
    /// Owner.
    pub team: Name,
    /// Grows with every change; pass as `If-Match` to refuse on what changed meanwhile.
    pub revision: u64,
    /// What a VM's labels must be, at least.
    pub labels: BTreeMap<Name, String>,
    /// What it says. Of several policies the one with the most labels counts, then the first by name, each for what the ones before do not say.
    pub limits: MigrationSettings,
    /// When it was created.
    pub created: UnixMillis,
}

/// Asks for a new policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PolicyCreate {
    /// Its name.
    pub name: Name,
    /// What a VM's labels must be, at least; none are every VM of the team.
    #[serde(default)]
    pub labels: BTreeMap<Name, String>,
    /// What it says.
    pub limits: MigrationSettings,
}

/// Asks for a change of a policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PolicySet {
    /// Other labels; as they are if left out.
    #[serde(default)]
    pub labels: Option<BTreeMap<Name, String>>,
    /// Other limits, all of them; as they are if left out.
    #[serde(default)]
    pub limits: Option<MigrationSettings>,
}

/// A VM as it was at one instant. It stays when its VM is deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// Identity.
    pub id: SnapshotId,
    /// Name, unique in its team.
    pub name: Name,
    /// Owner.
    pub team: Name,
    /// Grows with every change; pass as `If-Match` to refuse on what changed meanwhile.
    pub revision: u64,
    /// What the VM was called.
    pub vm: Name,
    /// When it was asked for.
    pub created: UnixMillis,
    /// The pool that holds it.
    pub pool: Name,
    /// Where it was taken.
    pub host: Name,
    /// RAM that it has; none: its disks only, and the VM boots from them.
    pub memory: Option<Bytes>,
    /// Disks that it has.
    pub disks: Vec<SnapshotDisk>,
    /// Whether it is kept until somebody says otherwise.
    pub golden: bool,
    /// Where it stands.
    pub state: SnapshotState,
    /// What it came to, once it is ready.
    pub figures: Option<SnapshotFigures>,
    /// Who asked for it.
    pub principal: String,
    /// Why, if said.
    pub reason: Option<String>,
}

/// A disk of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotDisk {
    /// Its volume.
    pub volume: VolumeRef,
    /// The size that was asked for, if one was.
    pub size: Option<Bytes>,
}

/// Where a snapshot stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotState {
    /// It is being taken.
    Taking,
    /// It can be used.
    Ready,
    /// Whether anything was written is not known: it can only be deleted.
    Failed,
    /// It is being deleted, or that did not come to its end: it can be deleted again.
    Deleting,
}

/// Asks for a snapshot of a VM that runs or is paused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    /// Of which VM.
    pub vm: Name,
    /// Its name; by default the VM's with the moment in UTC.
    #[serde(default)]
    pub name: Option<Name>,
    /// With RAM and devices; without, the VM boots from its disks as after a power cut, unless they are brought to rest. True by default.
    #[serde(default = "with_memory")]
    pub memory: bool,
    /// The guest's file systems are brought to rest first, which may take this long, at most a minute. Takes a guest agent.
    #[serde(default)]
    pub quiesce: Option<Millis>,
    /// The pool that is to hold it; by default that of the VM's first disk, else the host's first shared one, else its first.
    #[serde(default)]
    pub pool: Option<Name>,
    /// It is kept until somebody says otherwise.
    #[serde(default)]
    pub golden: bool,
    /// Why; recorded with it.
    #[serde(default)]
    pub reason: Option<String>,
}

const fn with_memory() -> bool {
    true
}

/// Asks for a change of a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotSet {
    /// Whether it is kept until somebody says otherwise; as it is if left out.
    #[serde(default)]
    pub golden: Option<bool>,
}

/// Asks for a VM to become what it was in a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRollback {
    /// The host; by default the VM's, else the one where the snapshot was taken, else any that has its pool.
    #[serde(default)]
    pub host: Option<Name>,
    /// What the VM is now is lost. Otherwise a snapshot of it is taken first, for which it has to run.
    #[serde(default)]
    pub discard_present: bool,
    /// Why; recorded with the task.
    #[serde(default)]
    pub reason: Option<String>,
}

/// Asks for a new VM that begins from a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotClone {
    /// Its name.
    pub name: Name,
    /// The host; by default the one with most free memory among those that can run it and have the snapshot's pool.
    #[serde(default)]
    pub host: Option<Name>,
    /// Starts it, which makes its volumes. True by default; otherwise its first start does so.
    #[serde(default = "starts")]
    pub start: bool,
    /// It goes on from memory, too, with no interface plugged in: it takes itself for the VM that it was.
    #[serde(default)]
    pub memory: bool,
    /// Why; recorded with the task.
    #[serde(default)]
    pub reason: Option<String>,
}

/// Asks for a snapshot to be written as files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotExportRequest {
    /// The host that writes it; by default the one where it was taken, else any that has its pool.
    #[serde(default)]
    pub host: Option<Name>,
    /// Why; recorded with the task.
    #[serde(default)]
    pub reason: Option<String>,
}

const fn starts() -> bool {
    true
}

/// Asks for files to become a snapshot of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotImport {
    /// Of which VM. It has run, and has disks of the same sizes.
    pub vm: Name,
    /// Where the files are: `POOL/NAME` is the directory `imports/TEAM/NAME` in the pool or, if there is none, `exports/TEAM/NAME`. The pool's vault holds the snapshot.
    pub from: VolumeRef,
    /// With memory and devices, which QEMU will read: takes the role admin. False by default.
    #[serde(default)]
    pub memory: bool,
    /// The host that reads them; by default the VM's, else any that has the pool.
    #[serde(default)]
    pub host: Option<Name>,
    /// It is kept until somebody says otherwise.
    #[serde(default)]
    pub golden: bool,
    /// Why; recorded with it.
    #[serde(default)]
    pub reason: Option<String>,
}

/// A team's vault: what holds its snapshots in one pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Vault {
    /// The pool.
    pub pool: Name,
    /// Its identity: pools of one name on several hosts are the same storage if this is the same.
    pub identity: String,
    /// A connected host that has it; none if there is none.
    pub host: Option<Name>,
    /// What it takes of the pool; none if no host could say.
    pub usage: Option<VaultUsage>,
}

/// Asks for what no snapshot needs to be freed in a vault, or what that would be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VaultPrune {
    /// Do what `plan` says; otherwise nothing is changed.
    #[serde(default)]
    pub apply: bool,
    /// The plan that was answered before: it is applied if it would still be the same.
    #[serde(default)]
    pub plan: Option<VaultPlan>,
}

/// Asks for a change of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HostSet {
    /// What all migrations that leave it may take of the wire together, in bytes per second; null is no limit. It counts at once, for those that
    /// run as well. To be given, since what is left out must not lift a limit.
    #[serde(deserialize_with = "Option::deserialize")]
    #[schema(required = true)]
    pub migration_bandwidth: Option<BytesPerSec>,
}

/// Asks for another limit of a migration under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TaskBandwidth {
    /// What it may take of the wire, in bytes per second; null is no limit but the host's. To be given, since what is left out must not lift a limit.
    #[serde(deserialize_with = "Option::deserialize")]
    #[schema(required = true)]
    pub bandwidth: Option<BytesPerSec>,
}

/// Asks for a change of a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkSet {
    /// Its MTU, 1280 to 9216.
    pub mtu: u32,
}

/// A long operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Task {
    /// Identity.
    pub id: TaskId,
    /// Owner.
    pub team: Name,
    /// What it does, such as `vm.migrate`.
    pub kind: String,
    /// Name of the object it works on.
    pub subject: Name,
    /// Where it stands.
    pub state: TaskState,
    /// Grows with every change.
    pub revision: u64,
    /// When it was asked for.
    pub created: UnixMillis,
    /// When it ended.
    pub ended: Option<UnixMillis>,
    /// Who asked.
    pub principal: String,
    /// Why, if said.
    pub reason: Option<String>,
    /// What it does right now, or waits for.
    pub step: String,
    /// Whether cancelling would still have an effect.
    pub cancellable: bool,
    /// Progress of a migration.
    pub progress: Option<MigrationProgress>,
    /// How far work on content is.
    #[serde(default)]
    pub transfer: Option<Transfer>,
    /// What a migration that was only described would cost; the trail says why if that is not known.
    #[serde(default)]
    pub forecast: Option<MigrationForecast>,
    /// What a migration cost.
    pub figures: Option<MigrationFigures>,
    /// The snapshot that is taken, written or read as files, or that a VM becomes what it was in.
    #[serde(default)]
    pub snapshot: Option<Name>,
    /// The snapshot that a rollback keeps of what the VM was before.
    #[serde(default)]
    pub kept: Option<Name>,
    /// What a rollback cost.
    #[serde(default)]
    pub restore: Option<RestoreFigures>,
    /// Where a snapshot was exported to.
    #[serde(default)]
    pub export: Option<SnapshotExport>,
    /// Why it failed or was cancelled.
    pub error: Option<Refusal>,
    /// What happened, oldest first.
    pub trail: Vec<TaskNote>,
}

/// How far work on content is: fetching, converting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Transfer {
    /// Bytes that are done, where bytes are counted.
    pub done: Option<Bytes>,
    /// Bytes in all, if that is known.
    pub total: Option<Bytes>,
    /// Thousandths that are done, if that is known.
    pub permille: Option<u16>,
}

/// Asks for an image to be fetched from a URL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageFetch {
    /// An https URL without user name and password.
    pub url: String,
    /// What is there; declared, never guessed.
    pub kind: ImportFormat,
    /// SHA-256 that the file must have, 64 hexadecimal digits.
    #[serde(default)]
    pub sha256: Option<String>,
}

/// Where a task stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TaskState {
    /// Under way.
    Running,
    /// Ended well.
    Done,
    /// Ended badly; `error` says why and what is left.
    Failed,
    /// Ended by request; nothing is left.
    Cancelled,
}

impl TaskState {
    /// Whether it will not change any more.
    #[must_use]
    pub const fn ended(self) -> bool {
        !matches!(self, Self::Running)
    }
}

/// A line of a task's trail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TaskNote {
    /// When.
    pub at: UnixMillis,
    /// What.
    pub text: String,
}

/// A change of an object, as the event stream tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Pass as `after` (or `Last-Event-ID`) to continue behind this event.
    pub cursor: u64,
    /// Kind of the object: `vm`, `host`, `task`, `snapshot`, `schedule`, `image`, `network`, `policy`, `team`, `token`; or `migratable`, of a VM.
    pub kind: String,
    /// Its name (tasks: its id).
    pub name: String,
    /// Its team.
    pub team: Name,
    /// What happened to it.
    pub change: Change,
    /// The object after the change; absent when deleted.
    #[schema(value_type = Option<Object>)]
    pub object: Option<serde_json::Value>,
}

/// What happened to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// It exists, anew or changed.
    Set,
    /// It is gone.
    Deleted,
}

/// A team.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Team {
    /// Its name.
    pub name: Name,
    /// When it was created.
    pub created: UnixMillis,
    /// Whether what its VMs have in common in memory does not travel to a host on which one of them runs already.
    pub share_memory: bool,
}

/// Asks for a new team.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TeamCreate {
    /// Its name.
    pub name: Name,
    /// See [`Team::share_memory`].
    #[serde(default)]
    pub share_memory: bool,
}

/// Asks for a change of a team.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TeamSet {
    /// See [`Team::share_memory`]. Counts for migrations that begin from then on.
    pub share_memory: bool,
}

/// What a token's bearer may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Everything, in every team.
    Admin,
    /// Everything with the objects of its team.
    Operator,
    /// Look at the objects of its team.
    Viewer,
}

/// An API token, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Token {
    /// Its public half.
    pub id: TokenId,
    /// Its team.
    pub team: Name,
    /// What its bearer may do.
    pub role: Role,
    /// What it is for.
    pub description: String,
    /// When it was made.
    pub created: UnixMillis,
}

/// Asks for a new API token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenCreate {
    /// Its team.
    pub team: Name,
    /// What its bearer may do.
    pub role: Role,
    /// What it is for.
    #[serde(default)]
    pub description: String,
}

/// A new API token; its secret is never shown again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenCreated {
    /// The token.
    pub token: Token,
    /// `gwt.<id>.<secret>`.
    pub secret: String,
}

/// Asks for a join token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JoinTokenCreate {
    /// The only host that can use it.
    pub host: Name,
    /// How long it can be used; one hour by default, at most a day.
    #[serde(default)]
    pub lifetime: Option<Millis>,
    /// For a host that has joined before and lost its key, or let its certificate end: it gets a new key and keeps its VMs.
    #[serde(default)]
    pub rejoin: bool,
}

/// A new join token; it is never shown again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JoinTokenCreated {
    /// `gwj.<id>.<secret>.<authority>`.
    pub token: String,
    /// When it can no longer be used.
    pub expires: UnixMillis,
}
