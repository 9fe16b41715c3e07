//! What is compared: Godwit, and QEMU's own ways to migrate, each at its best setting.

use std::fmt;

use anyhow::{Context, Result};
use godwit_model::{Bytes, MigrationPolicy};
use serde_json::{Map, Value, json};

/// Enough to be no limit; zero is not taken as one by every version.
const UNLIMITED: u64 = 1 << 40;

/// A way to move a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum System {
    /// Godwit with its defaults.
    Godwit,
    /// Plain pre-copy.
    Precopy,
    /// As `Precopy`, with TLS.
    PrecopyTls,
    /// Four channels, each compressed by zstd.
    MultifdZstd,
    /// As `MultifdZstd`, with TLS.
    MultifdZstdTls,
    /// Differences to a cache of what was sent.
    Xbzrle,
    /// vCPUs are slowed down until it converges.
    AutoConverge,
    /// One pass, then the VM runs on the destination and fetches what it misses.
    Postcopy,
}

impl System {
    /// All of them, in the order in which they take turns.
    pub const ALL: [Self; 8] = [
        Self::Godwit,
        Self::Precopy,
        Self::PrecopyTls,
        Self::MultifdZstd,
        Self::MultifdZstdTls,
        Self::Xbzrle,
        Self::AutoConverge,
        Self::Postcopy,
    ];

    /// Its name in rows and arguments.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Godwit => "godwit",
            Self::Precopy => "qemu-precopy",
            Self::PrecopyTls => "qemu-precopy-tls",
            Self::MultifdZstd => "qemu-multifd-zstd",
            Self::MultifdZstdTls => "qemu-multifd-zstd-tls",
            Self::Xbzrle => "qemu-xbzrle",
            Self::AutoConverge => "qemu-auto-converge",
            Self::Postcopy => "qemu-postcopy",
        }
    }

    /// The system of that name.
    ///
    /// # Errors
    /// When there is none.
    pub fn named(name: &str) -> Result<Self> {
        let known = || format!("no system {name}: there are {}", Self::ALL.map(Self::as_str).join(", "));
        Self::ALL.into_iter().find(|system| system.as_str() == name).with_context(known)
    }

    /// Whether QEMU itself uses TLS.
    pub(super) const fn has_tls(self) -> bool {
        matches!(self, Self::PrecopyTls | Self::MultifdZstdTls)
    }

    /// Capabilities of both QEMUs.
    pub(super) fn capabilities(self) -> Vec<&'static str> {
        let own: &[&str] = match self {
            Self::Godwit | Self::Precopy | Self::PrecopyTls => &[],
            Self::MultifdZstd | Self::MultifdZstdTls => &["multifd"],
            Self::Xbzrle => &["xbzrle"],
            Self::AutoConverge => &["auto-converge"],
            Self::Postcopy => &["postcopy-ram", "postcopy-preempt"],
        };
        ["events", "return-path"].iter().chain(own).copied().collect()
    }

    /// Parameters of both QEMUs, for a guest with this working set.
    pub(super) fn parameters(self, working_set: Bytes) -> Map<String, Value> {
        let own = match self {
            Self::Godwit | Self::Precopy | Self::PrecopyTls | Self::AutoConverge => json!({}),
            Self::MultifdZstd | Self::MultifdZstdTls => {
                json!({ "multifd-channels": 4, "multifd-compression": "zstd", "multifd-zstd-level": 1 })
            }
            Self::Xbzrle => json!({ "xbzrle-cache-size": working_set.get() }),
            Self::Postcopy => json!({ "max-postcopy-bandwidth": 0 }),
        };
        let mut all = Map::new();
        all.insert("max-bandwidth".to_owned(), UNLIMITED.into());
        all.insert("downtime-limit".to_owned(), MigrationPolicy::default().max_blackout.get().into());
        all.extend(own.as_object().cloned().unwrap_or_default());
        all
    }

    /// How it is set, for people.
    pub(super) fn settings(self) -> String {
        if self == Self::Godwit {
            let blackout = MigrationPolicy::default().max_blackout.get();
            return format!(
                "with TLS; defaults: max-blackout {blackout} ms; in B512 and B4096 with --on-miss postcopy, in E by a team that shares memory"
            );
        }
        let mut parameters = self.parameters(Bytes(0));
        if self == Self::Xbzrle {
            parameters.insert("xbzrle-cache-size".to_owned(), "the working set".into());
        }
        let parameters: Vec<String> = parameters.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let tls = if self.has_tls() { "with TLS" } else { "without TLS" };
        format!("{tls}; {}; {}", self.capabilities().join(" "), parameters.join(" "))
    }
}

impl fmt::Display for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_system_is_found_by_its_name() {
        for system in System::ALL {
            assert_eq!(System::named(system.as_str()).unwrap(), system);
        }
        assert!(System::named("rsync").is_err());
    }

    #[test]
    fn all_peers_have_the_same_limits() {
        for system in System::ALL {
            let parameters = system.parameters(Bytes::mib(64));
            assert_eq!(parameters["downtime-limit"], 300);
            assert_eq!(parameters["max-bandwidth"], UNLIMITED);
        }
        assert_eq!(System::Xbzrle.parameters(Bytes::mib(64))["xbzrle-cache-size"], 64 << 20);
    }
}
