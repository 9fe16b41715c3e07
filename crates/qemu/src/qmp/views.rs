//! Typed views of QEMU's answers and events. Every enumeration has an `Unknown` arm, every field that a version may lack is optional, and
//! fields that we do not use are not looked at: a newer QEMU never makes an answer unreadable.

use godwit_model::hostile;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::codec::Event;

/// An enumeration of QEMU with room for what later versions add.
macro_rules! open_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(from = "String", into = "String")]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
            /// A value that this version does not know, as QEMU wrote it, made harmless and short.
            Unknown(String),
        }

        impl $name {
            /// QEMU's name of it.
            #[must_use]
            pub fn as_str(&self) -> &str {
                match self { $(Self::$variant => $text,)* Self::Unknown(text) => text }
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                match text.as_str() { $($text => Self::$variant,)* _ => Self::Unknown(hostile::bounded(&text, hostile::WORD)) }
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.as_str().to_owned()
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }
    };
}

open_enum! {
    /// QEMU's run state.
    RunStatus {
        /// vCPUs run.
        Running = "running",
        /// Stopped by `stop`, or a destination that is loaded and waits.
        Paused = "paused",
        /// Started with `-S` and never continued.
        Prelaunch = "prelaunch",
        /// Waits for, or loads, an incoming migration.
        InMigrate = "inmigrate",
        /// vCPUs stopped by the migration itself: QEMU was first.
        FinishMigrate = "finish-migrate",
        /// The migration is complete; stopped for good.
        PostMigrate = "postmigrate",
        /// The guest powered off and QEMU stayed.
        Shutdown = "shutdown",
        /// An I/O error stopped it.
        IoError = "io-error",
        /// QEMU could not go on.
        InternalError = "internal-error",
        /// The guest panicked.
        GuestPanicked = "guest-panicked",
        /// The guest suspended itself.
        Suspended = "suspended",
        /// A watchdog fired.
        Watchdog = "watchdog",
    }
}

open_enum! {
    /// Where a migration is. `None` is [`MigrationStatus::Idle`].
    MigrationStatus {
        /// None was started.
        Idle = "none",
        /// Connecting.
        Setup = "setup",
        /// Warm-up.
        Active = "active",
        /// vCPUs stopped, disks still ours, waits for `migrate-continue`.
        PreSwitchover = "pre-switchover",
        /// Device state is on its way.
        Device = "device",
        /// Device state of a post-copy is on its way (10.2 and later).
        PostcopyDevice = "postcopy-device",
        /// Pages are fetched on demand.
        PostcopyActive = "postcopy-active",
        /// A post-copy lost its connection.
        PostcopyPaused = "postcopy-paused",
        /// It has got another connection (9.1 and later).
        PostcopyRecoverSetup = "postcopy-recover-setup",
        /// It says over the other connection what it has.
        PostcopyRecover = "postcopy-recover",
        /// Done.
        Completed = "completed",
        /// On its way to `failed` (11.0 and later).
        Failing = "failing",
        /// Failed.
        Failed = "failed",
        /// On its way to `cancelled`.
        Cancelling = "cancelling",
        /// Cancelled.
        Cancelled = "cancelled",
    }
}

impl MigrationStatus {
    /// Whether nothing more will happen.
    #[must_use]
    pub const fn is_final(&self) -> bool {
        matches!(self, Self::Idle | Self::Completed | Self::Failed | Self::Cancelled)
    }

    /// Whether a destination runs, or could, with memory that is still to come.
    #[must_use]
    pub const fn needs_pages(&self) -> bool {
        matches!(self, Self::PostcopyActive | Self::PostcopyPaused | Self::PostcopyRecoverSetup | Self::PostcopyRecover)
    }
}

/// Answer of `query-status`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// Run state.
    pub status: RunStatus,
    /// Whether vCPUs run.
    #[serde(default)]
    pub running: bool,
}

/// Answer of `query-migrate`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Migration {
    /// Where it is; absent before any migration.
    pub status: Option<MigrationStatus>,
    /// RAM.
    pub ram: Option<MigrationRam>,
    /// Milliseconds since it began.
    pub total_time: Option<u64>,
    /// Milliseconds that the vCPUs stood still, once it is complete.
    pub downtime: Option<u64>,
    /// Milliseconds that QEMU would expect them to stand still.
    pub expected_downtime: Option<u64>,
    /// Milliseconds of set-up.
    pub setup_time: Option<u64>,
    /// Why it failed.
    #[serde(default, deserialize_with = "sentence")]
    pub error_desc: Option<String>,
    /// Why this VM cannot be migrated at all.
    #[serde(default, deserialize_with = "sentences")]
    pub blocked_reasons: Vec<String>,
}

/// A text of QEMU's, made harmless and short.
fn sentence<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.map(|text| hostile::bounded(&text, hostile::SENTENCE)))
}

fn sentences<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    const MOST: usize = 32;
    let texts = Vec::<String>::deserialize(deserializer)?;
    Ok(texts.iter().take(MOST).map(|text| hostile::bounded(text, hostile::SENTENCE)).collect())
}

impl Migration {
    /// Where it is.
    #[must_use]
    pub fn status(&self) -> MigrationStatus {
        self.status.clone().unwrap_or(MigrationStatus::Idle)
    }
}

/// RAM in [`Migration`]. Amounts in bytes unless said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigrationRam {
    /// RAM of the VM.
    pub total: u64,
    /// Still to be sent.
    pub remaining: u64,
    /// Sent.
    pub transferred: u64,
    /// Rate at which pages were dirtied at the last sync, pages per second.
    pub dirty_pages_rate: u64,
    /// Syncs of the dirty bitmap: passes begun.
    pub dirty_sync_count: u64,
    /// Page size.
    pub page_size: u64,
    /// Pages sent in full.
    pub normal: u64,
    /// Pages sent as zero pages.
    pub duplicate: u64,
    /// Sent while the VM ran.
    pub precopy_bytes: u64,
    /// Sent while it stood still.
    pub downtime_bytes: u64,
    /// Sent after the switch.
    pub postcopy_bytes: u64,
    /// Throughput, megabit per second, whole.
    #[serde(deserialize_with = "whole")]
    pub mbps: u64,
}

/// QEMU writes some numbers as fractions; we need them whole.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates, which is what is wanted")]
fn whole<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    Ok(f64::deserialize(deserializer)?.max(0.0) as u64)
}

/// Answer of `query-dirty-rate`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DirtyRate {
    /// `unstarted`, `measuring`, `measured`.
    pub status: String,
    /// MiB per second, once measured.
    #[serde(default, rename = "dirty-rate")]
    pub mib_per_sec: Option<i64>,
}

/// One of `query-machines`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Machine {
    /// Versioned name, such as `pc-q35-7.2`.
    pub name: String,
    /// Alias that stands for it on this QEMU, such as `q35`.
    #[serde(default)]
    pub alias: Option<String>,
    /// Most vCPUs.
    #[serde(default)]
    pub cpu_max: u64,
    /// Whether QEMU will drop it.
    #[serde(default)]
    pub deprecated: bool,
}

/// One of `query-cpu-definitions`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuDefinition {
    /// Name, such as `Westmere-v1`.
    pub name: String,
    /// Whether a VM with it may move between hosts.
    #[serde(default)]
    pub migration_safe: Option<bool>,
    /// What keeps it from being started here. Absent when QEMU cannot say.
    #[serde(default)]
    pub unavailable_features: Option<Vec<String>>,
    /// Whether QEMU will drop it.
    #[serde(default)]
    pub deprecated: bool,
}

/// One of `query-migrate-capabilities`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct MigrationCapability {
    /// Its name.
    pub capability: String,
    /// Whether it is on.
    #[serde(default)]
    pub state: bool,
}

/// One of `query-block`, as far as we look.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockDevice {
    /// Path of the device in QEMU's tree.
    #[serde(default)]
    pub qdev: Option<String>,
    /// `ok`, `failed`, `nospace`.
    #[serde(default)]
    pub io_status: Option<String>,
    /// What is inserted.
    #[serde(default)]
    pub inserted: Option<InsertedMedium>,
}

/// The medium of a [`BlockDevice`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct InsertedMedium {
    /// Node name.
    #[serde(default)]
    pub node_name: Option<String>,
    /// Whether QEMU holds it active (10.0 and later).
    #[serde(default)]
    pub active: Option<bool>,
    /// Whether it cannot be written.
    #[serde(default)]
    pub ro: bool,
}

/// Events that we act on.
#[derive(Clone, Debug, PartialEq)]
pub enum Known {
    /// vCPUs stopped.
    Stop,
    /// vCPUs run again.
    Resume,
    /// The VM is ending; `guest` if the guest asked for it.
    Shutdown {
        /// Whether the guest asked for it.
        guest: bool,
    },
    /// The guest was reset.
    Reset,
    /// The migration changed its status.
    Migration(MigrationStatus),
    /// A pass of the warm-up began, counted from 1.
    MigrationPass(u64),
    /// A disk could not be read or written.
    BlockIoError(Value),
    /// The guest panicked.
    GuestPanicked,
    /// Anything else: look at the event itself.
    Other,
}

impl Event {
    /// What it means to us.
    #[must_use]
    pub fn known(&self) -> Known {
        match self.name.as_str() {
            "STOP" => Known::Stop,
            "RESUME" => Known::Resume,
            "RESET" => Known::Reset,
            "GUEST_PANICKED" => Known::GuestPanicked,
            "SHUTDOWN" => Known::Shutdown { guest: self.data.get("guest").and_then(Value::as_bool).unwrap_or(false) },
            "MIGRATION" => match self.data.get("status").and_then(Value::as_str) {
                Some(status) => Known::Migration(status.to_owned().into()),
                None => Known::Other,
            },
            "MIGRATION_PASS" => self.data.get("pass").and_then(Value::as_u64).map_or(Known::Other, Known::MigrationPass),
            "BLOCK_IO_ERROR" => Known::BlockIoError(self.data.clone()),
            _ => Known::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_later_versions_add_is_no_error() {
        let migration: Migration = serde_json::from_value(json!({
            "status": "warp", "ram": {"total": 1, "mbps": 12.7, "dirty-pages-rate": 9, "page-size": 4096, "shiny": {}}, "x": 1,
        }))
        .expect("readable");
        assert_eq!(migration.status(), MigrationStatus::Unknown("warp".into()));
        assert!(!migration.status().is_final());
        let ram = migration.ram.expect("ram");
        assert_eq!((ram.mbps, ram.dirty_pages_rate, ram.remaining), (12, 9, 0));
        let status: Status = serde_json::from_value(json!({"status": "dreaming", "running": false})).expect("readable");
        assert_eq!(status.status, RunStatus::Unknown("dreaming".into()));
    }

    #[test]
    fn events_are_read_and_odd_ones_are_other() {
        let event = |name: &str, data| Event { name: name.into(), data, micros: None };
        assert_eq!(
            event("MIGRATION", json!({"status": "pre-switchover"})).known(),
            Known::Migration(MigrationStatus::PreSwitchover)
        );
        assert_eq!(event("MIGRATION_PASS", json!({"pass": 3})).known(), Known::MigrationPass(3));
        assert_eq!(event("SHUTDOWN", json!({"guest": true, "reason": "guest-shutdown"})).known(), Known::Shutdown { guest: true });
        for odd in [event("MIGRATION", json!({"status": 5})), event("MIGRATION_PASS", Value::Null), event("NEW", json!([]))] {
            assert_eq!(odd.known(), Known::Other);
        }
    }
}
