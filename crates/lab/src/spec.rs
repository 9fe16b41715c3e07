//! What a lab shall be.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::LinkRate;
use crate::layout::{self, MAX_HOSTS};

/// The description of a lab. Only `name` and `godwit` must be thought about; see [`LabSpec::new`] for the rest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LabSpec {
    /// Up to 20 of `a`-`z`, `0`-`9`, `-`, beginning with a letter; part of the name of everything the lab makes.
    pub name: String,
    /// How many hosts, named `h1`, `h2`, and so on.
    pub hosts: u16,
    /// The rate of every host's link, each way; the outside client's link is not limited.
    pub link_rate: LinkRate,
    /// The `godwit` binary to run.
    pub godwit: PathBuf,
    /// Where state, logs and disks go; `/var/lib/godwit-lab/NAME` when absent. Must not be a small tmpfs.
    pub dir: Option<PathBuf>,
    /// The directory of the pool `shared`, seen by all hosts beside the pool `local` that each has for itself; `pool` beside the state when absent. Kept by `down` if given.
    pub shared_pool: Option<PathBuf>,
    /// The API's port on 127.0.0.1; any free one when absent.
    pub api_port: Option<u16>,
    /// More arguments for `godwit serve`.
    pub serve_args: Vec<String>,
    /// More arguments for every `godwit agent`.
    pub agent_args: Vec<String>,
    /// What is different on some hosts, by the host's name.
    pub overrides: BTreeMap<String, HostOverride>,
}

/// What is different on one host.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct HostOverride {
    /// The QEMU binary of this host.
    pub qemu: Option<PathBuf>,
    /// More arguments for this host's `godwit agent`, such as the memory it offers.
    pub agent_args: Vec<String>,
}

/// Why a lab cannot be built as described.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    /// The name could not be part of the name of a namespace.
    #[error("a lab's name is up to 20 of a-z, 0-9 and -, beginning with a letter, not {name:?}")]
    Name {
        /// The name.
        name: String,
    },
    /// Too few or too many hosts.
    #[error("a lab has 1 to {MAX_HOSTS} hosts, not {hosts}")]
    Hosts {
        /// The number asked for.
        hosts: u16,
    },
    /// An override names no host of the lab.
    #[error("there are overrides for {host}, but the lab has no such host")]
    Override {
        /// The name.
        host: String,
    },
    /// The binary is not there.
    #[error("there is no program {path}")]
    Program {
        /// The path given.
        path: PathBuf,
    },
    /// A path is not absolute, but daemons run elsewhere.
    #[error("{path} must be an absolute path")]
    Relative {
        /// The path given.
        path: PathBuf,
    },
}

impl LabSpec {
    /// A lab of three hosts with links of 1 Gbit/s.
    #[must_use]
    pub fn new(name: impl Into<String>, godwit: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            hosts: 3,
            link_rate: LinkRate::from_bits_per_second(1_000_000_000),
            godwit: godwit.into(),
            dir: None,
            shared_pool: None,
            api_port: None,
            serve_args: Vec::new(),
            agent_args: Vec::new(),
            overrides: BTreeMap::new(),
        }
    }

    /// The names of the hosts, in order.
    pub fn host_names(&self) -> impl Iterator<Item = String> + use<> {
        (1..=self.hosts).map(layout::host_name)
    }

    /// Whether `name` is a host of this lab.
    #[must_use]
    pub fn has_host(&self, name: &str) -> bool {
        layout::host_number(name).is_some_and(|number| number <= self.hosts)
    }

    /// Checks everything that can be known before anything is made.
    pub(crate) fn check(&self) -> Result<(), SpecError> {
        check_name(&self.name)?;
        if !(1..=MAX_HOSTS).contains(&self.hosts) {
            return Err(SpecError::Hosts { hosts: self.hosts });
        }
        if let Some(host) = self.overrides.keys().find(|host| !self.has_host(host)) {
            return Err(SpecError::Override { host: host.clone() });
        }
        let programs = std::iter::once(&self.godwit).chain(self.overrides.values().filter_map(|o| o.qemu.as_ref()));
        for path in programs.clone().chain(&self.dir).chain(&self.shared_pool) {
            if !path.is_absolute() {
                return Err(SpecError::Relative { path: path.clone() });
            }
        }
        for path in programs {
            if !path.is_file() {
                return Err(SpecError::Program { path: path.clone() });
            }
        }
        Ok(())
    }
}

/// Refuses names that cannot be part of names of namespaces, files and control groups.
pub(crate) fn check_name(name: &str) -> Result<(), SpecError> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let good = name.starts_with(|c: char| c.is_ascii_lowercase()) && name.len() <= 20 && name.chars().all(allowed);
    if good { Ok(()) } else { Err(SpecError::Name { name: name.to_owned() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_leave_their_directory_are_refused() {
        for bad in ["", "..", "a/b", "A", "1a", "-a", "a\n", "a b", "abcdefghijklmnopqrstu"] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "demo-2", "abcdefghijklmnopqrst"] {
            assert!(check_name(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn a_description_is_checked_before_anything_is_made() {
        let good = LabSpec::new("t", "/bin/sh");
        assert!(good.check().is_ok());
        assert!(matches!(LabSpec { hosts: 0, ..good.clone() }.check(), Err(SpecError::Hosts { .. })));
        assert!(matches!(LabSpec { godwit: "sh".into(), ..good.clone() }.check(), Err(SpecError::Relative { .. })));
        assert!(matches!(LabSpec { godwit: "/no".into(), ..good.clone() }.check(), Err(SpecError::Program { .. })));
        let overrides = BTreeMap::from([("h4".to_owned(), HostOverride::default())]);
        assert!(matches!(LabSpec { overrides, ..good }.check(), Err(SpecError::Override { .. })));
    }
}
