//! What a host says of itself.

use serde::{Deserialize, Serialize};

use crate::{Accelerator, Bytes, HostNetworks, HugePages, Name};

/// What does not change while an agent runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct HostFacts {
    /// Version of the agent.
    pub agent: String,
    /// Version of QEMU, for people; decisions are made from the lists below.
    pub qemu: String,
    /// What executes VMs here.
    pub accelerator: Accelerator,
    /// Why it is that accelerator, as the probe found.
    pub accelerator_reason: String,
    /// Logical processors.
    pub cpus: u32,
    /// Memory that VMs may use in total.
    pub memory: Bytes,
    /// Versioned machine types, such as `pc-q35-7.2`.
    pub machines: Vec<String>,
    /// Named CPU models that run here with every feature they name.
    pub cpu_models: Vec<String>,
    /// CPU features that VMs can have here, in QEMU's spelling with dashes; none where the agent did not say.
    #[serde(default)]
    pub cpu_features: Vec<String>,
    /// Version of the carrier that its agent speaks; 0 where it did not say.
    #[serde(default)]
    pub carrier: u16,
    /// Migration capabilities that QEMU accepts as a VM's own user.
    pub migration_capabilities: Vec<String>,
    /// Storage.
    pub pools: Vec<PoolFacts>,
    /// Whether UEFI firmware is installed.
    #[serde(default)]
    pub uefi: bool,
    /// Whether UEFI firmware that enforces Secure Boot is installed.
    #[serde(default)]
    pub secure_boot: bool,
    /// Whether VMs can have a TPM here.
    #[serde(default)]
    pub tpm: bool,
    /// Sizes of huge pages that it has set aside.
    #[serde(default)]
    pub hugepages: Vec<HugePages>,
    /// Memory nodes; 0 where the agent did not say.
    #[serde(default)]
    pub numa_nodes: u32,
    /// Memory of each node that VMs can be bound to; empty where the agent cannot bind them.
    #[serde(default)]
    pub node_memory: Vec<Bytes>,
    /// Findings that limit what this host can do, each with its fix.
    pub conditions: Vec<HostCondition>,
}

/// RAM that old QEMUs under TCG collect dirty pages of correctly is no multiple of this; see [`HostFacts::loses_writes_to`].
const COLLECTED_IN_WORDS: u64 = 256 << 10;

impl HostFacts {
    /// The condition of this name, if it is one.
    #[must_use]
    pub fn condition(&self, name: &str) -> Option<&HostCondition> {
        self.conditions.iter().find(|condition| condition.name == name)
    }

    /// Whether a VM that stands still goes on to stand still while its memory is kept: QEMU before 9.0 lets it run. Told by the machine that came with 9.0.
    #[must_use]
    pub fn keeps_memory_of_paused(&self) -> bool {
        self.machines.iter().any(|machine| machine == "pc-q35-9.0")
    }

    /// What a VM gets more than asked for where it might run on a QEMU that loses writes to RAM of round sizes.
    pub const UNEVEN: Bytes = Bytes(8 << 10);

    /// Whether VMs are emulated by a QEMU older than 9.0. Told by `mapped-ram`, which came with the version that mended it.
    #[must_use]
    pub fn is_old_emulator(&self) -> bool {
        self.accelerator == Accelerator::Tcg && !self.migration_capabilities.iter().any(|capability| capability == "mapped-ram")
    }

    /// Whether a warm-up on this host can lose what vCPUs write: QEMU before 9.0 collects dirty pages of a RAM block whose size is a multiple
    /// of 64 pages without telling TCG's translation buffers. KVM is not concerned.
    #[must_use]
    pub fn loses_writes_to(&self, memory: Bytes) -> bool {
        self.is_old_emulator() && memory.get().is_multiple_of(COLLECTED_IN_WORDS)
    }
}

/// A pool as one host sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PoolFacts {
    /// Its name.
    pub name: Name,
    /// Identity of the directory, written into it when first used: two hosts with the same identity see the same storage.
    pub identity: String,
    /// Whether the administrator declared it shared between hosts.
    pub shared: bool,
    /// Size of the file system.
    pub capacity: Bytes,
}

/// A finding about a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct HostCondition {
    /// Stable name, such as `userfaultfd` or `cgroup_limits`.
    pub name: String,
    /// What was found.
    pub message: String,
    /// What to do about it.
    pub fix: String,
}

impl HostCondition {
    /// Name of what keeps VMs from going on here before their memory is there.
    pub const NO_POSTCOPY: &str = "userfaultfd_postcopy";
    /// Name of what keeps memory of running VMs from being kept here.
    pub const NO_MEMORY_SNAPSHOT: &str = "userfaultfd_snapshot";
}

/// What changes: sent with every heartbeat.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct HostLoad {
    /// Memory that further VMs may use: what VMs may use in total, less what VMs here and expected here hold.
    pub memory_free: Bytes,
    /// VMs with a QEMU process here.
    pub vms: u32,
    /// Free space by pool.
    pub pools_free: Vec<(Name, Bytes)>,
    /// What it offers to networks, and what it dropped on them.
    #[serde(default)]
    pub networks: HostNetworks,
}
