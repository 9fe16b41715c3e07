//! What is stored, by key. Rows are never sent: `views` makes the wire's types of them.
//!
//! | key | row | beside it |
//! |---|---|---|
//! | `epoch` | the controller's reign | |
//! | `team/<team>`, `token/<id>`, `join/<id>`, `host/<host>` | as named | |
//! | `network/<team>/<network>` | a network | `vni`: the last number given to an overlay |
//! | `policy/<team>/<policy>` | what is said of migrations of VMs with certain labels | |
//! | `schedule/<team>/<schedule>` | a schedule of snapshots, and up to which instant it has run | |
//! | `errand/<schedule id>/<vm id>` | what a schedule has to do with a VM | |
//! | `image/<team>/<image>` | an image; its content is the file `images/<id>` | |
//! | `snapshot/<team>/<snapshot>` | a snapshot; its content is in a vault, under a key that goes with the row | `vault/<team>`: what the key of the team's vaults is derived with |
//! | `vm/<id>` | a VM | `vmname/<team>/<vm>`, `mac/<mac>`, `volume/<pool>/<volume>`: which VM has it |
//! | `history/<id>` | what became of each generation of a VM | |
//! | `habits/<id>` | how much a VM writes, by time of day | |
//! | `migratable/<id>` | whether a running VM could move | |
//! | `task/<id>` | a task | |

use std::collections::{BTreeMap, BTreeSet};

use godwit_api::v1::{ReignEnd, Role, ScheduledResult, SnapshotCreate, SnapshotState, TaskNote, TaskState, Transfer, VmMigrate};
use godwit_model::{
    Activity, Bytes, BytesPerSec, Epoch, Generation, Habits, HostFacts, ImageId, ImageKind, ImportFormat, MigrationFigures,
    MigrationForecast, MigrationPolicy, MigrationProgress, MigrationSettings, Millis, Name, NetworkId, NetworkKind, Refusal,
    ResolvedSpec, RestoreFigures, RunState, ScheduleId, ScheduleSpec, SnapshotExport, SnapshotFigures, SnapshotId, SnapshotRequest,
    TaskId, TokenId, TravellingDisk, UnixMillis, VmId, VmSpec,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::specs::{Waiting, claims};

/// A stored value of one kind.
pub(crate) trait Row: Serialize + DeserializeOwned + Clone + Send {
    /// Version of its shape. A row of another version is not read.
    const SCHEMA: u32 = 1;
    /// What its keys begin with.
    const PREFIX: &'static str;
    /// Its key.
    fn key(&self) -> String;
}

macro_rules! rows {
    ($($row:ident: $prefix:literal => |$it:ident| $rest:expr;)*) => {$(
        impl Row for $row {
            const PREFIX: &'static str = $prefix;
            fn key(&self) -> String {
                let $it = self;
                format!(concat!($prefix, "{}"), $rest)
            }
        }
    )*};
}

rows! {
    EpochRow: "epoch" => |_row| "";
    RestoreRow: "restore" => |_row| "";
    TeamRow: "team/" => |row| row.name;
    TokenRow: "token/" => |row| row.id;
    JoinRow: "join/" => |row| row.id;
    HostRow: "host/" => |row| row.name;
    NetworkRow: "network/" => |row| format!("{}/{}", row.team, row.name);
    PolicyRow: "policy/" => |row| format!("{}/{}", row.team, row.name);
    ScheduleRow: "schedule/" => |row| format!("{}/{}", row.team, row.name);
    ErrandRow: "errand/" => |row| format!("{}/{}", row.schedule, row.vm);
    VniRow: "vni" => |_row| "";
    SnapshotRow: "snapshot/" => |row| format!("{}/{}", row.team, row.name);
    VaultRow: "vault/" => |row| row.team;
    ImageRow: "image/" => |row| format!("{}/{}", row.team, row.name);
    VmRow: "vm/" => |row| row.id;
    HistoryRow: "history/" => |row| row.vm;
    HabitsRow: "habits/" => |row| row.vm;
    MigratableRow: "migratable/" => |row| row.vm;
    TaskRow: "task/" => |row| row.id;
}

/// The reign of this controller; every write insists on it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct EpochRow {
    pub(crate) epoch: Epoch,
    /// What is added to the store's revision for the mark that agents are told: it grows when the store is restored from a copy.
    #[serde(default)]
    pub(crate) past: u64,
    /// The last epochs, this one at the end.
    #[serde(default)]
    pub(crate) lately: Vec<EpochMark>,
}

/// What is known of an epoch.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct EpochMark {
    pub(crate) epoch: Epoch,
    /// Unique to it: a copy of the store that is started again counts to the same number.
    pub(crate) id: String,
    /// The mark that it came to, once it has ended.
    pub(crate) ended: Option<u64>,
}

/// The store was restored from a copy, and not all hosts have said since then what they run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RestoreRow {
    pub(crate) unheard: BTreeSet<Name>,
    /// What the copy had under way is done away with.
    pub(crate) swept: bool,
}

/// A team.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct TeamRow {
    pub(crate) name: Name,
    pub(crate) created: UnixMillis,
    /// Whether its VMs share memory where they move.
    #[serde(default)]
    pub(crate) share_memory: bool,
}

/// An API token; of its secret only the hash.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct TokenRow {
    pub(crate) id: TokenId,
    pub(crate) team: Name,
    pub(crate) role: Role,
    pub(crate) description: String,
    pub(crate) created: UnixMillis,
    pub(crate) hash: String,
}

/// A join token; of its secret only the hash.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct JoinRow {
    pub(crate) id: TokenId,
    pub(crate) host: Name,
    pub(crate) expires: UnixMillis,
    pub(crate) hash: String,
    /// The public key (its hash) that it was used for.
    pub(crate) used: Option<String>,
    /// Whether it is for a host that has joined before and gets a new key: what it holds stays.
    #[serde(default)]
    pub(crate) rejoin: bool,
}

/// A host that joined. Whether it is connected is in memory; `connected` and `since` are here so that watchers are told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct HostRow {
    pub(crate) name: Name,
    pub(crate) address: String,
    /// Where its carry listens, if elsewhere.
    #[serde(default)]
    pub(crate) migration_address: Option<String>,
    /// What migrations that leave it may take of the wire together.
    #[serde(default)]
    pub(crate) migration_bandwidth: Option<BytesPerSec>,
    pub(crate) joined: UnixMillis,
    /// Public keys (their hashes) that may speak for the host: the newest last, the one before it until the newest is used.
    pub(crate) keys: Vec<String>,
    pub(crate) connected: bool,
    pub(crate) since: UnixMillis,
    pub(crate) facts: Option<HostFacts>,
}

/// A network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NetworkRow {
    pub(crate) id: NetworkId,
    pub(crate) name: Name,
    pub(crate) team: Name,
    pub(crate) kind: NetworkKind,
    /// Of an overlay.
    pub(crate) vni: Option<u32>,
    pub(crate) mtu: u32,
    pub(crate) created: UnixMillis,
}

/// What is said of the migrations of VMs with certain labels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PolicyRow {
    pub(crate) name: Name,
    pub(crate) team: Name,
    pub(crate) labels: BTreeMap<Name, String>,
    pub(crate) limits: MigrationSettings,
    pub(crate) created: UnixMillis,
}

/// A schedule of snapshots. `handled` grows in the transaction in which the errands of an instant come to be due: no instant is done twice, none is forgotten.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ScheduleRow {
    pub(crate) id: ScheduleId,
    pub(crate) name: Name,
    pub(crate) team: Name,
    pub(crate) created: UnixMillis,
    pub(crate) spec: ScheduleSpec,
    /// Instants up to this one are done with.
    pub(crate) handled: UnixMillis,
    pub(crate) last: Option<RunRow>,
    /// The newest instant that was missed for good.
    pub(crate) missed: Option<UnixMillis>,
}

/// A run of a schedule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RunRow {
    pub(crate) due: UnixMillis,
    pub(crate) began: UnixMillis,
    /// Who asked for it, if somebody did.
    pub(crate) principal: Option<String>,
}

/// What a schedule has to do with a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ErrandRow {
    pub(crate) schedule: ScheduleId,
    pub(crate) vm: VmId,
    pub(crate) vm_name: Name,
    pub(crate) state: Errand,
    /// What became of the last one.
    pub(crate) last: Option<ErrandEnd>,
    /// When it is to be looked which snapshots are not kept any more.
    pub(crate) sweep: Option<UnixMillis>,
    /// The task that deletes one of them.
    pub(crate) deleting: Option<TaskId>,
    /// The one that could not be deleted.
    pub(crate) stuck: Option<SnapshotId>,
}

/// Where an errand stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "at", rename_all = "snake_case")]
pub(crate) enum Errand {
    /// There is nothing to do.
    Idle,
    /// A snapshot is to be taken.
    Due {
        due: UnixMillis,
        /// When it came to be due, if that was for an earlier run whose turn it did not come to: it keeps its place.
        #[serde(default)]
        since: Option<UnixMillis>,
        /// It is not begun later, should anything but its turn be in the way.
        until: UnixMillis,
        reason: String,
        /// What was in the way when it was last tried.
        obstacle: Option<Refusal>,
    },
    /// A task takes it, of a VM of this host.
    Taking { due: UnixMillis, task: TaskId, host: Option<Name> },
}

/// What became of an errand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ErrandEnd {
    pub(crate) due: UnixMillis,
    pub(crate) ended: UnixMillis,
    pub(crate) result: ScheduledResult,
    pub(crate) snapshot: Option<Name>,
    pub(crate) error: Option<Refusal>,
}

/// A snapshot. Deleting the row destroys the key of what is in the vault.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SnapshotRow {
    pub(crate) id: SnapshotId,
    pub(crate) name: Name,
    pub(crate) team: Name,
    pub(crate) vm: VmId,
    /// What the VM was called; it may be gone.
    pub(crate) vm_name: Name,
    pub(crate) created: UnixMillis,
    /// The pool with its vault, as the host called it.
    pub(crate) pool: Name,
    /// The pool's identity: what tells the same storage from another of the same name.
    pub(crate) identity: String,
    /// Where it was taken.
    pub(crate) host: Name,
    /// On which generation the VM ran; 0: not known.
    #[serde(default)]
    pub(crate) generation: Generation,
    pub(crate) state: SnapshotState,
    /// What its key is derived with.
    pub(crate) salt: String,
    pub(crate) request: SnapshotRequest,
    /// What was asked of the VM then.
    pub(crate) spec: VmSpec,
    /// What the VM was then.
    pub(crate) resolved: ResolvedSpec,
    /// What of `spec` it was not yet.
    #[serde(default)]
    pub(crate) waiting: Vec<Waiting>,
    pub(crate) figures: Option<SnapshotFigures>,
    /// Kept until somebody says otherwise.
    pub(crate) golden: bool,
    pub(crate) principal: String,
    pub(crate) reason: Option<String>,
    /// The schedule that has taken it.
    #[serde(default)]
    pub(crate) schedule: Option<ScheduleId>,
}

impl SnapshotRow {
    /// Whether it has memory. Until it is there: whether it is to have it, which QEMU may not let it.
    pub(crate) fn has_memory(&self) -> bool {
        self.figures.as_ref().map_or(self.request.memory, |figures| figures.memory)
    }
}

/// A team's vaults, in whichever pools.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VaultRow {
    pub(crate) team: Name,
    /// What the key of their digests is derived with; drawn at the team's first snapshot.
    pub(crate) salt: String,
}

/// The last number given to an overlay; it goes on behind it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct VniRow {
    pub(crate) last: u32,
}

/// An image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ImageRow {
    pub(crate) id: ImageId,
    pub(crate) name: Name,
    pub(crate) team: Name,
    pub(crate) kind: ImageKind,
    pub(crate) size: Bytes,
    pub(crate) digest: String,
    pub(crate) created: UnixMillis,
}

/// A VM. Generations are issued here, and only here: `issued` grows in the transaction that records the grant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct VmRow {
    pub(crate) id: VmId,
    pub(crate) name: Name,
    pub(crate) team: Name,
    pub(crate) created: UnixMillis,
    /// With every MAC address filled in.
    pub(crate) spec: VmSpec,
    pub(crate) state: RunState,
    pub(crate) since: UnixMillis,
    /// What the host said of a crash.
    pub(crate) detail: String,
    /// The host that owns `generation`.
    pub(crate) host: Option<Name>,
    /// The newest generation that a host owned: started, or taken over by a move.
    pub(crate) generation: Generation,
    /// The newest generation that its host has reported as running, or as crashed.
    pub(crate) reported: Generation,
    /// The highest generation ever granted.
    pub(crate) issued: Generation,
    /// A move under way: the grant that is not yet activated.
    pub(crate) pending: Option<PendingGrant>,
    /// Every host that ever got a grant, with its newest: it may speak about the VM.
    pub(crate) granted: BTreeMap<Name, GrantedTo>,
    pub(crate) activity: Option<Activity>,
    /// What it was started with, and changed to since.
    pub(crate) resolved: Option<ResolvedSpec>,
    /// What of `spec` takes effect at the next start.
    #[serde(default)]
    pub(crate) waiting: Vec<Waiting>,
    /// Whether the owner of `generation` said that it has released the VM.
    #[serde(default)]
    pub(crate) released: bool,
    /// It ended because its host went down, and is to start again when the host is back.
    #[serde(default)]
    pub(crate) start_wanted: bool,
    /// Why it was not started again when its host came back.
    #[serde(default)]
    pub(crate) not_started: Option<Refusal>,
    /// Keys of disks that are being taken out of it while it runs: they stay its own until they are out.
    #[serde(default)]
    pub(crate) leaving: BTreeSet<String>,
    /// Why its QEMU would not let it move, in QEMU's words.
    #[serde(default)]
    pub(crate) blocked: Vec<String>,
    /// What the key of its memory that hosts keep is derived with; drawn at its first move, and gone with the VM. Empty: not drawn yet.
    #[serde(default)]
    pub(crate) memory_salt: String,
    /// The snapshot that its disks are half of: a rollback has not ended well.
    #[serde(default)]
    pub(crate) unfinished: Option<Name>,
    /// Keys that a rollback under way will need.
    #[serde(default)]
    pub(crate) held: BTreeSet<String>,
    /// What it begins from at its next start; nothing: it boots from its disks as they are.
    #[serde(default)]
    pub(crate) origin: Option<Origin>,
    /// The VM whose memory it went on with: it takes itself for that one.
    #[serde(default)]
    pub(crate) copied: Option<Name>,
    /// A golden snapshot is still to be taken of it: when it has run for so long, or its guest's agent answers.
    #[serde(default)]
    pub(crate) golden_after: Option<Millis>,
}

/// The snapshot that a VM begins from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Origin {
    pub(crate) snapshot: Name,
    /// With its memory, too. Then `resolved` is the machine that the memory knows.
    pub(crate) memory: bool,
    pub(crate) kind: OriginKind,
}

/// Why a VM begins from a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum OriginKind {
    /// It is another VM than that of the snapshot, and its volumes are made.
    Clone,
    /// It is suspended: it goes on from there, and the snapshot goes then.
    Suspended,
}

/// What became of each generation of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HistoryRow {
    pub(crate) vm: VmId,
    pub(crate) reigns: Vec<Reign>,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reign {
    pub(crate) generation: Generation,
    pub(crate) host: Name,
    pub(crate) granted: UnixMillis,
    pub(crate) began: Option<UnixMillis>,
    pub(crate) ended: Option<UnixMillis>,
    pub(crate) end: Option<ReignEnd>,
    pub(crate) task: Option<TaskId>,
    pub(crate) kind: String,
    pub(crate) principal: String,
    pub(crate) reason: Option<String>,
    #[serde(default)]
    pub(crate) figures: Option<MigrationFigures>,
}

/// How much a VM writes, by time of day.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HabitsRow {
    pub(crate) vm: VmId,
    pub(crate) habits: Habits,
}

/// Whether a running VM could move. Beside the VM and not in it: it changes without anybody changing the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MigratableRow {
    pub(crate) vm: VmId,
    pub(crate) name: Name,
    pub(crate) team: Name,
    pub(crate) possible: bool,
    pub(crate) reason: Option<Refusal>,
    pub(crate) since: UnixMillis,
}

/// A conditional grant that was not yet activated or declined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PendingGrant {
    pub(crate) destination: Name,
    pub(crate) generation: Generation,
    pub(crate) task: TaskId,
}

/// The newest grant that a host got for a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GrantedTo {
    pub(crate) generation: Generation,
    pub(crate) task: TaskId,
}

impl VmRow {
    /// A VM that was just created.
    pub(crate) fn new(id: VmId, name: Name, team: Name, spec: VmSpec, now: UnixMillis) -> Self {
        Self {
            id,
            name,
            team,
            created: now,
            spec,
            state: RunState::Stopped,
            since: now,
            detail: String::new(),
            host: None,
            generation: Generation(0),
            reported: Generation(0),
            issued: Generation(0),
            pending: None,
            granted: BTreeMap::new(),
            activity: None,
            resolved: None,
            waiting: vec![],
            released: false,
            start_wanted: false,
            not_started: None,
            leaving: BTreeSet::new(),
            blocked: Vec::new(),
            memory_salt: String::new(),
            unfinished: None,
            held: BTreeSet::new(),
            origin: None,
            copied: None,
            golden_after: None,
        }
    }

    /// Issues the next generation to `host`.
    pub(crate) fn issue(&mut self, host: &Name, task: TaskId) -> Generation {
        self.issued = self.issued.next();
        self.granted.insert(host.clone(), GrantedTo { generation: self.issued, task });
        self.issued
    }

    /// Notes an observed state.
    pub(crate) fn set_state(&mut self, state: RunState, now: UnixMillis) {
        if self.state != state {
            self.state = state;
            self.since = now;
        }
        if state != RunState::Crashed {
            self.detail.clear();
        }
    }

    /// Lets go of the VM if it is `task` that holds it.
    pub(crate) fn release(&mut self, task: TaskId) {
        if self.activity.take_if(|activity| activity.task == task).is_some() {
            self.held.clear();
        }
        self.pending.take_if(|pending| pending.task == task);
    }

    /// The keys that belong to it.
    pub(crate) fn claims(&self) -> BTreeSet<String> {
        let mut claims = claims(&self.spec);
        claims.extend(self.leaving.iter().chain(&self.held).cloned());
        claims
    }

    /// Whether its host has seen it run, so that its disks are made.
    pub(crate) const fn has_run(&self) -> bool {
        self.reported.0 != 0
    }

    /// Whether QEMU is there.
    pub(crate) fn has_process(&self) -> bool {
        matches!(self.state, RunState::Running | RunState::Paused)
    }
}

/// A task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct TaskRow {
    pub(crate) id: TaskId,
    pub(crate) team: Name,
    pub(crate) subject: Name,
    /// The VM that it holds; none where it works on something else.
    pub(crate) vm: Option<VmId>,
    pub(crate) work: Work,
    pub(crate) state: TaskState,
    pub(crate) created: UnixMillis,
    pub(crate) ended: Option<UnixMillis>,
    pub(crate) principal: String,
    pub(crate) reason: Option<String>,
    pub(crate) step: String,
    pub(crate) cancel: bool,
    pub(crate) progress: Option<MigrationProgress>,
    #[serde(default)]
    pub(crate) transfer: Option<Transfer>,
    #[serde(default)]
    pub(crate) forecast: Option<MigrationForecast>,
    pub(crate) figures: Option<MigrationFigures>,
    #[serde(default)]
    pub(crate) restore: Option<RestoreFigures>,
    pub(crate) error: Option<Refusal>,
    pub(crate) trail: Vec<TaskNote>,
    /// The schedule that it is done for.
    #[serde(default)]
    pub(crate) schedule: Option<ScheduleId>,
}

/// What a task does, with all that it needs to go on after a restart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Work {
    /// Waits for another task of its VM, and then becomes what was asked for.
    Wait { asked: Later },
    /// Starts the VM on `host`.
    Start {
        host: Name,
        generation: Generation,
        /// From a snapshot.
        #[serde(default)]
        from: Option<Origin>,
    },
    /// Makes the VM, which begins from a snapshot when it is started.
    Clone { snapshot: Name },
    /// Asks the guest to power off.
    Stop { timeout: Millis },
    /// Ends QEMU.
    Kill,
    /// Lets vCPUs stand still.
    Pause,
    /// Lets vCPUs run on.
    Unpause,
    /// Removes the VM.
    Delete { volumes: bool },
    /// Moves the VM.
    Migrate(Box<MigrateWork>),
    /// Brings a running VM nearer to its spec.
    Change,
    /// Runs a program in the guest. Only its name: arguments may hold secrets.
    Exec { program: String },
    /// Brings an image in.
    Import { image: ImageId, format: ImportFormat, source: ImportSource },
    /// Keeps the VM as it is.
    Snapshot { snapshot: SnapshotId, name: Name },
    /// Makes the VM what it was in a snapshot.
    Rollback(Box<RollbackWork>),
    /// Keeps the VM with its memory, and ends QEMU.
    Suspend(Box<SuspendWork>),
    /// Reads all of a vault, in the pool with this identity.
    Verify { identity: String, host: Name },
    /// Writes a snapshot as files on `host`.
    SnapshotExport { snapshot: SnapshotId, name: Name, host: Name, written: Option<SnapshotExport> },
    /// Deletes a snapshot that its schedule does not keep.
    SnapshotDelete { snapshot: SnapshotId, name: Name },
    /// Makes the files in a directory of the pool of `host` a snapshot.
    SnapshotImport { snapshot: SnapshotId, name: Name, from: Name, host: Name },
}

/// A request that waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Later {
    /// For a move.
    Migrate(Box<VmMigrate>),
    /// For a snapshot.
    Snapshot(Box<SnapshotCreate>),
}

/// Where an image comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "snake_case")]
pub(crate) enum ImportSource {
    /// It was uploaded, and lies with the images.
    Upload,
    /// It is fetched.
    Url { url: String, sha256: Option<String> },
}

impl TaskRow {
    /// A task that was just asked for. Of a VM, and for a reason, if it is told so.
    pub(crate) fn new(id: TaskId, team: Name, subject: Name, principal: String, work: Work, now: UnixMillis) -> Self {
        Self {
            id,
            team,
            subject,
            vm: None,
            work,
            state: TaskState::Running,
            created: now,
            ended: None,
            principal,
            reason: None,
            step: "accepted".into(),
            cancel: false,
            progress: None,
            transfer: None,
            forecast: None,
            figures: None,
            restore: None,
            error: None,
            trail: vec![],
            schedule: None,
        }
    }

    /// The migration that it is, if that has not ended.
    pub(crate) fn open_move(&self) -> Option<&MigrateWork> {
        match &self.work {
            Work::Migrate(work) if !self.state.ended() => Some(work),
            _ => None,
        }
    }
}

impl MigrateWork {
    /// Whether the VM has come to the destination for good: its host has said so, and no older generation counts any more.
    pub(crate) fn has_arrived(&self, vm: &VmRow) -> bool {
        vm.generation >= self.generation
    }
}

impl Work {
    /// The kind shown to people.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Wait { asked: Later::Migrate(_) } => "vm.migrate",
            Self::Wait { asked: Later::Snapshot(_) } => "vm.snapshot",
            Self::Clone { .. } => "vm.clone",
            Self::Start { from: Some(Origin { kind: OriginKind::Clone, .. }), .. } => "vm.clone",
            Self::Start { from: Some(Origin { kind: OriginKind::Suspended, .. }), .. } => "vm.unsuspend",
            Self::Start { .. } => "vm.start",
            Self::Stop { .. } => "vm.stop",
            Self::Kill => "vm.kill",
            Self::Pause => "vm.pause",
            Self::Unpause => "vm.unpause",
            Self::Delete { .. } => "vm.delete",
            Self::Migrate(_) => "vm.migrate",
            Self::Change => "vm.set",
            Self::Import { .. } => "image.import",
            Self::Exec { .. } => "vm.exec",
            Self::Snapshot { .. } => "vm.snapshot",
            Self::Rollback(_) => "vm.rollback",
            Self::Suspend(_) => "vm.suspend",
            Self::Verify { .. } => "vault.verify",
            Self::SnapshotExport { .. } => "snapshot.export",
            Self::SnapshotDelete { .. } => "snapshot.delete",
            Self::SnapshotImport { .. } => "snapshot.import",
        }
    }
}

/// A suspension and where it stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SuspendWork {
    pub(crate) snapshot: SnapshotId,
    pub(crate) name: Name,
    /// Whether its vCPUs ran: then they do again if it comes to nothing.
    pub(crate) ran: bool,
    pub(crate) stage: SuspendStage,
}

/// The step a suspension does next, or is in. Written before the step is begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "at", rename_all = "snake_case")]
pub(crate) enum SuspendStage {
    /// The VM is to stand still.
    Pause,
    /// It is kept.
    Keep,
    /// QEMU is ended.
    End,
    /// It comes to nothing, for this reason: the VM is what it was.
    Undo { reason: Refusal },
}

/// A rollback and where it stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RollbackWork {
    pub(crate) snapshot: SnapshotId,
    pub(crate) name: Name,
    /// Where the VM will run.
    pub(crate) host: Name,
    /// On which generation, once that is issued.
    pub(crate) generation: Generation,
    /// The snapshot of what it was before.
    pub(crate) present: Option<Name>,
    pub(crate) stage: RollbackStage,
}

/// The step a rollback does next, or is in. Written before the step is begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "at", rename_all = "snake_case")]
pub(crate) enum RollbackStage {
    /// What the VM is now is kept.
    KeepPresent,
    /// QEMU is ended, if it runs.
    End,
    /// The host is told to begin.
    Begin { granted: UnixMillis },
}

/// A migration and where it stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MigrateWork {
    pub(crate) source: Name,
    pub(crate) destination: Name,
    pub(crate) policy: MigrationPolicy,
    /// Where its limits come from, as far as the request did not name them.
    #[serde(default)]
    pub(crate) told: Vec<String>,
    /// Volumes that the destination does not see; with their ports once it has prepared for them.
    #[serde(default)]
    pub(crate) disks: Vec<TravellingDisk>,
    /// The attempt for which they were measured: what both agents are granted depends on it, so it is done once.
    #[serde(default)]
    pub(crate) measured: u32,
    /// How often its policy was changed since it was asked for, and how many of these changes this attempt's source has answered.
    #[serde(default)]
    pub(crate) changes: u64,
    #[serde(default)]
    pub(crate) changes_told: u64,
    /// From 1.
    pub(crate) attempt: u32,
    pub(crate) generation: Generation,
    pub(crate) expires: UnixMillis,
    pub(crate) stage: Stage,
    pub(crate) source_ended: Option<Ended>,
    pub(crate) destination_ended: Option<Ended>,
}

/// The step a migration does next, or is in. Written before the step is begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "at", rename_all = "snake_case")]
pub(crate) enum Stage {
    /// The destination is told to prepare.
    Prepare,
    /// The source is told to move; the destination's carry listens on `port`.
    MoveOut { port: u16 },
    /// The agents are at it.
    Moving,
    /// It never began: the destination is told to decline.
    Settle,
}

/// What one side said at the end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ended {
    pub(crate) generation: Generation,
    pub(crate) moved: bool,
    pub(crate) reason: Option<Refusal>,
    pub(crate) figures: Option<MigrationFigures>,
}
