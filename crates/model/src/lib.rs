//! The nouns of Godwit: identities, units, what a VM is made of, and which requests its state admits.
//!
//! Pure: no clock, file, socket, thread or random source; ids and times are arguments. Start with [`spec::VmSpec`],
//! then [`ownership`] (generations and grants: the one-runner rule) and [`lifecycle`] (what may be asked when).

pub mod error;
pub mod guest;
pub mod habits;
pub mod host;
pub mod hostile;
pub mod ids;
pub mod import;
pub mod ladder;
pub mod lifecycle;
pub mod migration;
pub mod name;
pub mod network;
pub mod ownership;
pub mod policy;
pub mod schedule;
pub mod snapshot;
pub mod spec;
pub mod units;

pub use error::{ErrorCode, Refusal, Retry};
pub use guest::{ExecOutcome, ExecRequest, GuestClock, GuestFacts, Octets};
pub use habits::{Habits, QuietTime};
pub use host::{HostCondition, HostFacts, HostLoad, PoolFacts};
pub use ids::{ImageId, NetworkId, ScheduleId, SnapshotId, TaskId, TeamId, TokenId, VmId, Vmgenid};
pub use import::ImportFormat;
pub use ladder::{Ladder, MalformedLadder, Rung};
pub use lifecycle::{Activity, Admission, RunState, VmRequest};
pub use migration::{
    Estimate, ForecastRequest, MigrationFigures, MigrationForecast, MigrationNeeds, MigrationPhase, MigrationPolicy,
    MigrationProgress, PastMove, PastMoves, PostCopy, TravellingDisk,
};
pub use name::{InvalidName, Name};
pub use network::{
    BridgeName, DroppedFrames, HostBridge, HostNetworks, InterfaceDrops, InvalidBridgeName, InvalidVlan, NetworkKind, VlanId,
};
pub use ownership::{Epoch, Generation, Grant};
pub use policy::MigrationSettings;
pub use schedule::{Retention, ScheduleSpec};
pub use snapshot::{
    RestoreFigures, SnapshotExport, SnapshotFigures, SnapshotRequest, SnapshotSize, VaultFile, VaultFindings, VaultPlan,
    VaultRewrite, VaultUsage,
};
pub use spec::{
    Accelerator, Autostart, Boot, CacheMode, CdromSpec, CloudInit, Dimm, DimmAddress, Discard, DiskBus, DiskFormat, DiskSpec,
    FIXED_SLOTS, Firmware, Growth, HugePages, Hyperv, ImageKind, ImageRef, InvalidSpec, IoLimits, LiveChange, MacAddress, NicModel,
    NicSpec, NoGrowth, Numa, Platform, PowerOff, ResolvedCdrom, ResolvedDisk, ResolvedNic, ResolvedSpec, Rtc, RtcBase, RtcDrift,
    SPEC_SCHEMA, Smbios, Tpm, TpmVersion, Video, VmSpec, VolumeRef, Watchdog, WatchdogAction, live_changes,
};
pub use units::{Bytes, BytesPerSec, Millis, Seconds, UnixMillis};
