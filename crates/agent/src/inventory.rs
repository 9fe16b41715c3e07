//! What this host is: asked of QEMU as a VM's own user, and of the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use godwit_model::{Bytes, HostCondition, HostFacts, HugePages, PoolFacts, VmId};
use godwit_qemu::Launcher;
use godwit_qemu::capabilities::InterviewError;

use crate::AgentOptions;
use crate::check::{self, Finding, Level};
use crate::firmware::Flash;
use crate::journal::{Holding, VmRecord};
use crate::nodes::{self, NODES};

/// Takes the inventory.
pub(crate) async fn take(
    options: &AgentOptions,
    launcher: &Launcher,
    pools: Vec<PoolFacts>,
    mut conditions: Vec<HostCondition>,
) -> Result<HostFacts, InterviewError> {
    if options.unprivileged_userfaultfd
        && let Err(error) = std::fs::write("/proc/sys/vm/unprivileged_userfaultfd", "1")
    {
        tracing::warn!(%error, "vm.unprivileged_userfaultfd could not be set");
    }
    let (probe, qemu) = check::ask_qemu(options, launcher).await;
    conditions.extend(check::of_qemu(&probe, &qemu).into_iter().filter_map(Finding::condition));
    let tpm = check::ask_tpm(options, launcher).await;
    let has_tpm = tpm.level == Level::Ok;
    conditions.extend(tpm.condition());
    let qemu = qemu?;
    let machines = qemu.machines.iter().map(|machine| machine.name.clone()).collect();
    Ok(HostFacts {
        agent: env!("CARGO_PKG_VERSION").into(),
        qemu: qemu.version,
        accelerator: probe.accelerator,
        accelerator_reason: probe.reason,
        cpus: std::thread::available_parallelism().map_or(1, |cpus| u32::try_from(cpus.get()).unwrap_or(u32::MAX)),
        memory: options.memory.unwrap_or_else(memory_for_vms),
        machines,
        cpu_models: qemu.cpus.into_iter().collect(),
        cpu_features: qemu.cpu_features.into_iter().collect(),
        carrier: godwit_carrier::VERSION,
        migration_capabilities: qemu.migration.into_iter().collect(),
        pools,
        uefi: Flash::find(false).is_some(),
        secure_boot: Flash::find(true).is_some(),
        tpm: has_tpm,
        hugepages: hugepages(),
        numa_nodes: numa_nodes(Path::new(NODES)),
        node_memory: nodes::read(Path::new(NODES)).iter().map(|node| node.memory).collect(),
        conditions,
    })
}

/// Sizes of huge pages of which this host has set some aside.
fn hugepages() -> Vec<HugePages> {
    let has = |size: &HugePages| {
        let directory = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", size.size().get() >> 10);
        std::fs::read_to_string(directory + "/nr_hugepages")
            .is_ok_and(|text| text.trim().parse::<u64>().is_ok_and(|count| count > 0))
    };
    [HugePages::Mib2, HugePages::Gib1].into_iter().filter(has).collect()
}

/// Memory nodes of this host.
pub(crate) fn numa_nodes(nodes: &Path) -> u32 {
    let entries = std::fs::read_dir(nodes).into_iter().flatten().flatten();
    let is_node = |name: &str| name.strip_prefix("node").is_some_and(|rest| rest.parse::<u32>().is_ok());
    let nodes = entries.filter(|entry| entry.file_name().to_str().is_some_and(is_node)).count();
    u32::try_from(nodes).unwrap_or(u32::MAX).max(1)
}

/// Memory for VMs if none is set: all but 1 GiB or an eighth, whichever is more.
fn memory_for_vms() -> Bytes {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total =
        text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    let total = total.unwrap_or(0) << 10;
    Bytes(total.saturating_sub((total / 8).max(1 << 30)))
}

/// The processes that a record names.
fn processes(record: &VmRecord) -> Vec<u32> {
    let (carry, of_disks): (_, Vec<_>) = match &record.holding {
        Holding::Owner => (None, vec![]),
        Holding::Source(outgoing) => (outgoing.carry.as_ref(), outgoing.disks.iter().map(|disk| &disk.carry).collect()),
        Holding::Destination(incoming) => (incoming.carry.as_ref(), incoming.disks.iter().map(|disk| &disk.carry).collect()),
    };
    let carries = carry.into_iter().chain(of_disks.into_iter().flatten());
    record.process.iter().chain(&record.tpm.process).chain(carries).map(|process| process.pid).collect()
}

/// Ends processes under our uids that no record names: a QEMU and its TPM are journalled before it is continued, so such a one never ran a
/// vCPU, and a carry is journalled before it is used.
pub(crate) fn end_orphans(records: &BTreeMap<VmId, VmRecord>, uid_base: u32) {
    let known: BTreeSet<u32> = records.values().flat_map(processes).collect();
    let Ok(entries) = std::fs::read_dir("/proc") else { return };
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let ours = std::os::unix::fs::MetadataExt::uid;
        let uid = entry.metadata().map(|metadata| ours(&metadata)).unwrap_or(0);
        if !known.contains(&pid)
            && (uid_base..=uid_base + 1_000).contains(&uid)
            && let Ok(process) = godwit_qemu::QemuProcess::from_child(pid)
        {
            tracing::warn!(pid, uid, "ends a process that no record names");
            process.kill();
        }
    }
}
