//! What the QEMU of a host can do: asked of a QEMU that runs exactly as VMs will (cage, uid, sandbox), never concluded from its version.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_model::{Accelerator, hostile};
use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use crate::cage::{self, CagePlan, DeviceNode, Launcher, Limit, Network, PassedFds, Profile, SpawnError};
use crate::command::interview_arguments;
use crate::process::KillOnDrop;
use crate::qmp::{ConnectError, Qmp, QmpError};

/// What a host's QEMU can do under one accelerator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCapabilities {
    /// QEMU's version, for display only.
    pub version: String,
    /// The accelerator that the rest is true of.
    pub accelerator: Accelerator,
    /// QMP commands.
    pub commands: BTreeSet<String>,
    /// Migration capabilities that QEMU knows, whether or not the host allows them.
    pub migration: BTreeSet<String>,
    /// Versioned machine types.
    pub machines: Vec<MachineType>,
    /// CPU models that can be started here with `enforce`.
    pub cpus: BTreeSet<String>,
    /// CPU features that a VM can have here, spelled with dashes.
    pub cpu_features: BTreeSet<String>,
    /// Whether a VM can be received in post-copy.
    pub postcopy: Support,
    /// Whether a running VM's RAM can be snapshotted.
    pub background_snapshot: Support,
}

/// A machine type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineType {
    /// Versioned name.
    pub name: String,
    /// What stands for it on this QEMU.
    pub alias: Option<String>,
    /// Most vCPUs.
    pub max_vcpus: u64,
    /// Whether QEMU will drop it.
    pub deprecated: bool,
}

/// Whether something works here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "supported", rename_all = "snake_case")]
pub enum Support {
    /// It does.
    Yes,
    /// It does not.
    No {
        /// Why, in QEMU's words.
        reason: String,
        /// What the administrator can do.
        fix: String,
    },
}

impl HostCapabilities {
    /// The versioned machine type that `name`, versioned or an alias, means on this host.
    #[must_use]
    pub fn resolve_machine(&self, name: &str) -> Option<&str> {
        let found = self.machines.iter().find(|machine| machine.name == name);
        let found = found.or_else(|| self.machines.iter().find(|machine| machine.alias.as_deref() == Some(name)));
        found.map(|machine| machine.name.as_str())
    }

    /// The `pc-q35` types, newest first: the newest that all hosts of a cluster have is its default.
    #[must_use]
    pub fn q35_newest_first(&self) -> Vec<&str> {
        let version = |name: &str| {
            let (major, minor) = name.strip_prefix("pc-q35-")?.split_once('.')?;
            Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?))
        };
        let mut found: Vec<_> =
            self.machines.iter().filter_map(|machine| Some((version(&machine.name)?, machine.name.as_str()))).collect();
        found.sort_unstable_by(|a, b| b.cmp(a));
        found.into_iter().map(|(_, name)| name).collect()
    }

    /// Whether QEMU knows a migration capability.
    #[must_use]
    pub fn has_migration(&self, capability: &str) -> bool {
        self.migration.contains(capability)
    }
}

/// What to ask, and as whom.
#[derive(Clone, Debug)]
pub struct Interview {
    /// QEMU.
    pub binary: PathBuf,
    /// Under which accelerator.
    pub accelerator: Accelerator,
    /// An unprivileged uid and gid like those of VMs.
    pub uid: u32,
    /// Its gid.
    pub gid: u32,
    /// An existing directory; nothing is left in it.
    pub working_dir: PathBuf,
    /// Time for all of it.
    pub limit: Duration,
}

/// Why a QEMU could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum InterviewError {
    /// Sockets or files could not be made.
    #[error("cannot prepare to ask QEMU")]
    Prepare(#[source] io::Error),
    /// It could not be started.
    #[error("cannot start QEMU")]
    Spawn(#[source] SpawnError),
    /// It ended or did not greet; `log` is what it printed.
    #[error("QEMU cannot be asked: {log}")]
    Connect {
        /// Why.
        #[source]
        source: ConnectError,
        /// What QEMU printed.
        log: String,
    },
    /// It answered with an error.
    #[error("QEMU cannot be asked")]
    Ask(#[source] QmpError),
    /// It took too long and was killed.
    #[error("QEMU did not say what it can do within {0:?}")]
    TimedOut(Duration),
}

/// Starts a QEMU without a machine, asks it, and ends it. No process is left, however this ends.
///
/// # Errors
/// See [`InterviewError`].
pub async fn interview(launcher: &Launcher, settings: &Interview) -> Result<HostCapabilities, InterviewError> {
    let log =
        rustix::fs::memfd_create("godwit-interview-log", MemfdFlags::CLOEXEC).map_err(|e| InterviewError::Prepare(e.into()))?;
    let log = File::from(log);
    let (ours, theirs) = StdUnixStream::pair().map_err(InterviewError::Prepare)?;
    ours.set_nonblocking(true).map_err(InterviewError::Prepare)?;
    let ours = UnixStream::from_std(ours).map_err(InterviewError::Prepare)?;
    let mut fds = PassedFds::new();
    let monitor = fds.pass(theirs);
    let plan = CagePlan {
        uid: settings.uid,
        gid: settings.gid,
        binary: settings.binary.clone(),
        arguments: interview_arguments(settings.accelerator, monitor),
        working_dir: settings.working_dir.clone(),
        nodes: nodes(settings.accelerator),
        cgroup: None,
        limits: Limit::DEFAULT.to_vec(),
        cpus: vec![],
        read_only: Vec::new(),
        writable: Vec::new(),
        network: Network::Empty,
        keep: Vec::new(),
        profile: Profile::Qemu,
        profile_name: None,
        log: None,
    };
    let asking = async {
        let stderr = OwnedFd::from(log.try_clone().map_err(InterviewError::Prepare)?);
        let process = KillOnDrop::new(cage::spawn(launcher, plan, fds, stderr).await.map_err(InterviewError::Spawn)?);
        let answer = ask(ours, settings, &log).await;
        process.end().await;
        answer
    };
    tokio::time::timeout(settings.limit, asking).await.unwrap_or(Err(InterviewError::TimedOut(settings.limit)))
}

/// Device nodes that a VM needs under this accelerator.
#[must_use]
pub fn nodes(accelerator: Accelerator) -> Vec<DeviceNode> {
    match accelerator {
        Accelerator::Kvm => vec![DeviceNode::kvm(), DeviceNode::userfaultfd()],
        Accelerator::Tcg => vec![DeviceNode::userfaultfd()],
    }
}

async fn ask(stream: UnixStream, settings: &Interview, log: &File) -> Result<HostCapabilities, InterviewError> {
    let qmp = match Qmp::begin(stream, settings.limit).await {
        Ok(qmp) => qmp,
        Err(source) => return Err(InterviewError::Connect { source, log: text_of(log) }),
    };
    let ask = InterviewError::Ask;
    let machines = qmp.query_machines().await.map_err(ask)?.into_iter().filter(|machine| machine.name != "none");
    let cpus = qmp.query_cpu_definitions().await.map_err(ask)?.into_iter();
    // An absent list means that QEMU cannot say; only an empty one is a promise.
    let usable = cpus.filter(|cpu| cpu.unavailable_features.as_ref().is_some_and(Vec::is_empty)).map(|cpu| cpu.name);
    let migration = qmp.query_migrate_capabilities().await.map_err(ask)?;
    Ok(HostCapabilities {
        version: qmp.greeting().version.clone(),
        accelerator: settings.accelerator,
        commands: qmp.query_command_names().await.map_err(ask)?.into_iter().collect(),
        migration: migration.into_iter().map(|known| known.capability).collect(),
        machines: machines
            .map(|machine| MachineType {
                name: machine.name,
                alias: machine.alias,
                max_vcpus: machine.cpu_max,
                deprecated: machine.deprecated,
            })
            .collect(),
        cpus: usable.collect(),
        cpu_features: features(&qmp.query_cpu_properties(all_of(settings.accelerator)).await.map_err(ask)?),
        postcopy: try_capability(&qmp, "postcopy-ram").await?,
        background_snapshot: try_capability(&qmp, "background-snapshot").await?,
    })
}

/// The CPU model that has all that the accelerator can give.
const fn all_of(accelerator: Accelerator) -> &'static str {
    match accelerator {
        Accelerator::Kvm => "host",
        Accelerator::Tcg => "max",
    }
}

/// Properties of QEMU's CPUs that are no feature of the CPU, and second names of some that are.
const NO_FEATURES: &[&str] = &[
    "check",
    "cpuid-0xb",
    "cr8legacy",
    "enforce",
    "fill-mtrr-mask",
    "full-cpuid-auto-level",
    "host-cache-info",
    "hypervisor",
    "kvm",
    "l3-cache",
    "legacy-cache",
    "migratable",
    "pmu",
    "realized",
    "start-powered-off",
    "tcg-cpuid",
    "vmware-cpuid-freq",
    // lm, nx, sse3, pclmulqdq, fxsr-opt
    "i64",
    "xd",
    "pni",
    "pclmuldq",
    "ffxsr",
];

/// The features among the properties of a CPU.
fn features(properties: &serde_json::Map<String, serde_json::Value>) -> BTreeSet<String> {
    let on = properties.iter().filter(|(_, value)| value.as_bool() == Some(true));
    // QEMU spells some in two ways, and one with a dot.
    let names = on.map(|(name, _)| name.replace(['_', '.'], "-"));
    names.filter(|name| !name.starts_with("x-") && !name.starts_with("hv-") && !NO_FEATURES.contains(&name.as_str())).collect()
}

/// Switches a capability on and off again: QEMU checks then whether the host allows it.
async fn try_capability(qmp: &Qmp, name: &str) -> Result<Support, InterviewError> {
    match qmp.set_migration_capabilities(&[(name, true)]).await {
        Ok(()) => {
            qmp.set_migration_capabilities(&[(name, false)]).await.map_err(InterviewError::Ask)?;
            Ok(Support::Yes)
        }
        Err(error) => match error.refused() {
            Some(failure) => Ok(Support::No { reason: failure.description.clone(), fix: userfault_fix() }),
            None => Err(InterviewError::Ask(error)),
        },
    }
}

fn userfault_fix() -> String {
    if !Path::new("/dev/userfaultfd").exists() {
        return "boot a kernel with /dev/userfaultfd (6.1 or newer) and QEMU 8.0 or newer, \
                or set the sysctl vm.unprivileged_userfaultfd=1, which concerns every process of the host; then restart the agent"
            .to_owned();
    }
    "install QEMU 8.0 or newer, which uses the VM's own /dev/userfaultfd; older ones need the sysctl vm.unprivileged_userfaultfd=1, \
     which concerns every process of the host; then restart the agent"
        .to_owned()
}

fn text_of(log: &File) -> String {
    let mut text = Vec::new();
    let mut file = log;
    let read = file.rewind().and_then(|()| file.take(4_096).read_to_end(&mut text));
    if read.is_err() || text.is_empty() {
        "it printed nothing".to_owned()
    } else {
        hostile::bounded(String::from_utf8_lossy(&text).trim(), hostile::SENTENCE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_told_from_settings_and_have_one_name_each() {
        let properties = serde_json::json!({
            "sse4_1": true, "sse4.1": true, "sse4-1": true, "avx2": true, "lm": true, "i64": true, "avx512f": false, "check": true,
            "x-migrate-smi-count": true, "hv-relaxed": true, "family": 6, "vendor": "AuthenticAMD"
        });
        let found = features(properties.as_object().expect("an object"));
        assert_eq!(found.into_iter().collect::<Vec<_>>(), ["avx2", "lm", "sse4-1"]);
    }

    #[test]
    fn aliases_are_resolved_and_q35_types_sorted_by_number() {
        let machine = |name: &str, alias: Option<&str>| MachineType {
            name: name.into(),
            alias: alias.map(Into::into),
            max_vcpus: 288,
            deprecated: false,
        };
        let capabilities = HostCapabilities {
            version: "10.0.2".into(),
            accelerator: Accelerator::Tcg,
            commands: BTreeSet::new(),
            migration: BTreeSet::from(["return-path".into()]),
            machines: vec![
                machine("pc-q35-9.2", None),
                machine("pc-q35-10.0", Some("q35")),
                machine("pc-i440fx-10.0", Some("pc")),
                machine("pc-q35-7.2", None),
                machine("pc-q35-next", None),
            ],
            cpus: BTreeSet::new(),
            cpu_features: BTreeSet::new(),
            postcopy: Support::Yes,
            background_snapshot: Support::No { reason: "r".into(), fix: "f".into() },
        };
        assert_eq!(capabilities.resolve_machine("q35"), Some("pc-q35-10.0"));
        assert_eq!(capabilities.resolve_machine("pc-q35-7.2"), Some("pc-q35-7.2"));
        assert_eq!(capabilities.resolve_machine("pc-q35-6.0"), None);
        assert_eq!(capabilities.q35_newest_first(), ["pc-q35-10.0", "pc-q35-9.2", "pc-q35-7.2"]);
        let text = serde_json::to_string(&capabilities).expect("JSON");
        assert_eq!(serde_json::from_str::<HostCapabilities>(&text).expect("JSON"), capabilities);
    }
}
