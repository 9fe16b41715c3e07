//! What is looked at before a VM starts or moves; every refusal names its fix. Pure: facts in, answer out.

use std::time::Duration;

use godwit_model::{
    Accelerator, Bytes, BytesPerSec, CacheMode, ErrorCode, Firmware, HostCondition, HostFacts, HostLoad, Hyperv, MigrationPolicy,
    Name, Numa, Platform, PoolFacts, PostCopy, Refusal, ResolvedSpec, Retry, Rung, VolumeRef,
};

use crate::hub::Presence;

/// A connected host as a check sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate<'a> {
    pub(crate) name: &'a Name,
    pub(crate) facts: &'a HostFacts,
    pub(crate) load: &'a HostLoad,
    /// Its clock less ours, in milliseconds, once it is known.
    pub(crate) skew: Option<i64>,
}

impl<'a> Candidate<'a> {
    /// A host as it presents itself.
    pub(crate) fn new(name: &'a Name, presence: &'a Presence) -> Self {
        Self { name, facts: &presence.facts, load: &presence.load, skew: presence.skew }
    }
}

/// Clocks that are off by more take a grant for older or younger than it is by a good part of its life.
const MAX_SKEW: Duration = Duration::from_secs(60);

/// With less a warm-up takes longer than anybody waits, and keep-alives fail.
pub(crate) const LEAST_BANDWIDTH: BytesPerSec = BytesPerSec(1_000_000);

/// Whether migrations get on with so much of the wire; none is no limit.
pub(crate) fn enough_bandwidth(bandwidth: Option<BytesPerSec>) -> Result<(), Refusal> {
    if bandwidth.is_some_and(|bandwidth| bandwidth < LEAST_BANDWIDTH) {
        let refusal = Refusal::new(ErrorCode::BadRequest, format!("migrations would hardly get on below {LEAST_BANDWIDTH}"));
        return Err(refusal.hint("give more, or say nothing of it"));
    }
    Ok(())
}

/// Whether a VM can come to `host` before all of its memory is there, if the policy says that it may. Where somebody is to be asked, that comes
/// later.
pub(crate) fn can_do_postcopy(policy: &MigrationPolicy, spec: &ResolvedSpec, host: Candidate<'_>) -> Result<(), Refusal> {
    let by_ladder = matches!(policy.postcopy, PostCopy::ByLadder | PostCopy::Never);
    if by_ladder && !policy.on_miss.has(Rung::Postcopy) {
        return Ok(());
    }
    let refusal = |message: String, hint: String| Err(Refusal::new(ErrorCode::UserfaultUnavailable, message).hint(hint));
    if spec.platform.hugepages.is_some() {
        return refusal(
            "a VM on huge pages cannot go on before all of its memory is there".into(),
            "migrate it without post-copy: leave postcopy out of `--on-miss`, and `--postcopy-now` and `--allow-postcopy`".into(),
        );
    }
    takes_memory_later(host, "migrate without post-copy")
}

/// Refuses a host on which no VM can go on before its memory is there; `instead` is what can be done there.
pub(crate) fn takes_memory_later(host: Candidate<'_>, instead: &str) -> Result<(), Refusal> {
    let Some(lacks) = host.facts.condition(HostCondition::NO_POSTCOPY) else { return Ok(()) };
    let message = format!("host {} cannot take a VM before all of its memory is there: {}", host.name, lacks.message);
    Err(Refusal::new(ErrorCode::UserfaultUnavailable, message).hint(format!("{}; or {instead}", lacks.fix)))
}

fn known_word(accelerator: Accelerator) -> &'static str {
    match accelerator {
        Accelerator::Kvm => "KVM",
        Accelerator::Tcg => "TCG (no hardware virtualisation)",
    }
}

fn incompatible(message: String, hint: String) -> Refusal {
    Refusal::new(ErrorCode::HostIncompatible, message).hint(hint)
}

/// Machine type, CPU model and accelerator.
fn look_at_platform(spec: &ResolvedSpec, host: Candidate<'_>, found: &mut Vec<Refusal>) {
    let Candidate { name, facts, .. } = host;
    if facts.accelerator != spec.accelerator {
        found.push(incompatible(
            format!("the VM runs on {}, host {name} has {}", known_word(spec.accelerator), known_word(facts.accelerator)),
            format!("choose a host with the same accelerator; {name} says: {}", facts.accelerator_reason),
        ));
    }
    if !facts.machines.contains(&spec.machine) {
        found.push(incompatible(
            format!("QEMU {} on host {name} does not know the machine type {}", facts.qemu, spec.machine),
            format!("upgrade QEMU on {name}, or start the VM with a machine type that every host knows (leave `machine` out)"),
        ));
    }
    found.extend(check_features(spec, host).err());
    // What ties a VM to equal hosts is looked at where both are known.
    let tied = matches!(spec.cpu.as_str(), "host" | "max");
    if !tied && !facts.cpu_models.contains(&spec.cpu) {
        found.push(incompatible(
            format!("host {name} cannot run the CPU model {}", spec.cpu),
            format!("choose another host, or start the VM with a CPU model that {name} has (leave `cpu` out for the baseline)"),
        ));
    }
}

/// What the spec asks of a host beyond a machine: firmware, huge pages, memory nodes, a hypervisor's enlightenments.
fn check_features(spec: &ResolvedSpec, host: Candidate<'_>) -> Result<(), Refusal> {
    let Candidate { name, facts, .. } = host;
    let Platform { firmware, hyperv, tpm, hugepages, numa, .. } = &spec.platform;
    if let Firmware::Uefi { secure_boot, .. } = firmware
        && !(if *secure_boot { facts.secure_boot } else { facts.uefi })
    {
        let with = if *secure_boot { " that enforces Secure Boot" } else { "" };
        return Err(incompatible(
            format!("host {name} has no UEFI firmware{with}"),
            format!("install the package ovmf on {name} and restart its agent, or choose another host"),
        ));
    }
    if tpm.is_some() && !facts.tpm {
        return Err(incompatible(
            format!("host {name} has no TPMs for VMs"),
            format!("install the package swtpm on {name} and restart its agent, or choose another host"),
        ));
    }
    if *hyperv != Hyperv::Off && spec.accelerator != Accelerator::Kvm {
        return Err(incompatible(
            format!("Hyper-V enlightenments need KVM; host {name} has {}", known_word(facts.accelerator)),
            format!("leave `hyperv` out, or choose a host with KVM; {name} says: {}", facts.accelerator_reason),
        ));
    }
    if let Some(pages) = hugepages {
        if !facts.hugepages.contains(pages) {
            let size = pages.size();
            return Err(incompatible(
                format!("host {name} has set no huge pages of {size} aside"),
                format!("set vm.nr_hugepages (or hugepages= for 1 GiB) on {name} and restart its agent, or leave `hugepages` out"),
            ));
        }
        if !spec.memory.get().is_multiple_of(pages.size().get()) {
            return Err(incompatible(
                format!(
                    "QEMU {} on host {name}, emulating, needs RAM of an uneven size, which huge pages cannot make up",
                    facts.qemu
                ),
                "leave `hugepages` out, or install QEMU 9.0 or newer on the hosts that emulate".into(),
            ));
        }
    }
    // On a host with one node, all of it is on one node.
    if *numa == Numa::OneNode && facts.numa_nodes != 1 {
        let needed = spec.memory_with_dimms();
        let Some(most) = facts.node_memory.iter().max() else {
            let message = format!("the agent of host {name} cannot bind VMs to one of {} memory nodes", facts.numa_nodes);
            return Err(incompatible(message, format!("upgrade the agent of {name}, leave `numa` out, or choose another host")));
        };
        if needed > *most {
            return Err(incompatible(
                format!("the VM needs {needed} on one memory node, the largest of host {name} has {most}"),
                "leave `numa` out, or choose another host".into(),
            ));
        }
    }
    Ok(())
}

fn check_memory(needed: Bytes, host: Candidate<'_>) -> Result<(), Refusal> {
    let free = host.load.memory_free;
    if free < needed {
        let missing = Bytes(needed.0 - free.0);
        let message = format!(
            "host {} has {free} of memory free for VMs, the VM needs {needed}: {missing} ({} bytes) are missing",
            host.name, missing.0
        );
        return Err(Refusal::new(ErrorCode::NotEnoughMemory, message)
            .hint(format!("free {missing} on {} by moving or stopping VMs there, or choose another host", host.name))
            .retry(Retry::Safe));
    }
    Ok(())
}

fn pool_missing(volume: &VolumeRef, host: &Name) -> Refusal {
    Refusal::new(ErrorCode::PoolUnavailable, format!("host {host} has no pool {} for volume {volume}", volume.pool))
        .hint(format!("start the agent of {host} with `--pool {}=DIRECTORY`, or choose another host", volume.pool))
}

fn first(found: Vec<Refusal>) -> Result<(), Refusal> {
    found.into_iter().next().map_or(Ok(()), Err)
}

/// Whether `host` can start the VM.
pub(crate) fn check_start(spec: &ResolvedSpec, host: Candidate<'_>) -> Result<(), Refusal> {
    let mut found = vec![];
    look_at_platform(spec, host, &mut found);
    for volume in spec.volumes() {
        if !host.facts.pools.iter().any(|pool| pool.name == volume.pool) {
            found.push(pool_missing(volume, host.name));
        }
    }
    found.extend(check_memory(spec.memory_with_dimms(), host).err());
    first(found)
}

/// Whether `host` can begin a VM as it was. `freed` is what the VM holds of the host's memory until then.
pub(crate) fn check_restore(spec: &ResolvedSpec, host: Candidate<'_>, freed: Bytes) -> Result<(), Refusal> {
    let mut found = vec![];
    look_at_platform(spec, host, &mut found);
    found.extend(spec.volumes().filter(|volume| pool_of(volume, host).is_none()).map(|volume| pool_missing(volume, host.name)));
    found.extend(check_memory(Bytes(spec.memory_with_dimms().get().saturating_sub(freed.get())), host).err());
    first(found)
}

/// What QEMU itself has against moving the VM, whereto ever.
pub(crate) fn blocked(reasons: &[String]) -> Option<Refusal> {
    let reason = reasons.first()?;
    Some(
        Refusal::new(ErrorCode::MigrationBlocked, format!("QEMU cannot move this VM: {reason}"))
            .hint("stop the VM, leave out the device that QEMU names, and start it again"),
    )
}

/// Whether the running VM can move from `source` to `destination`.
pub(crate) fn check_move(spec: &ResolvedSpec, source: Candidate<'_>, destination: Candidate<'_>) -> Result<(), Refusal> {
    first(obstacles(spec, source, destination))
}

/// The clock of a host that gives or takes a VM.
fn check_clock(host: Candidate<'_>) -> Result<(), Refusal> {
    let Some(skew) = host.skew.map(i64::unsigned_abs).map(Duration::from_millis).filter(|skew| *skew > MAX_SKEW) else {
        return Ok(());
    };
    let message = format!("the clock of host {} is {} s off the controller's", host.name, skew.as_secs());
    Err(Refusal::new(ErrorCode::ClockSkew, message)
        .hint(format!("let {} keep time by NTP (`systemctl enable --now systemd-timesyncd`, or chrony)", host.name))
        .retry(Retry::Safe))
}

/// A VM that has all features of its host's CPU moves between equal hosts only.
pub(crate) fn check_equal(spec: &ResolvedSpec, source: Candidate<'_>, destination: Candidate<'_>) -> Result<(), Refusal> {
    let (here, there) = (&source.facts.cpu_features, &destination.facts.cpu_features);
    if !matches!(spec.cpu.as_str(), "host" | "max") || here == there {
        return Ok(());
    }
    let beyond = |one: &[String], other: &[String]| {
        let more: Vec<&str> = one.iter().filter(|feature| !other.contains(feature)).map(String::as_str).collect();
        if more.is_empty() { "nothing".to_owned() } else { more.join(", ") }
    };
    Err(incompatible(
        format!(
            "the VM has the CPU of its host (`{}`), and {} has {} that {} has not, which has {} more",
            spec.cpu,
            source.name,
            beyond(here, there),
            destination.name,
            beyond(there, here)
        ),
        "choose an equal host, or start the VM with a named CPU model (leave `cpu` out for the baseline; `godwit cluster cpu-baseline` shows what \
         all hosts have)"
            .into(),
    ))
}

/// Everything that keeps the running VM from moving from `source` to `destination`, networks aside.
pub(crate) fn obstacles(spec: &ResolvedSpec, source: Candidate<'_>, destination: Candidate<'_>) -> Vec<Refusal> {
    let mut found = vec![];
    look_at_platform(spec, destination, &mut found);
    found.extend(check_equal(spec, source, destination).err());
    if source.facts.carrier != destination.facts.carrier {
        let (from, to) = (source, destination);
        let (one, other) = (from.facts.carrier, to.facts.carrier);
        found.push(incompatible(
            format!("the agents of {} and {} speak versions {one} and {other} of the carrier", from.name, to.name),
            "upgrade godwit on the host with the older one and restart its agent; its VMs run on meanwhile".into(),
        ));
    }
    found.extend([source, destination].into_iter().filter_map(|host| check_clock(host).err()));
    // A DIMM's size is always round.
    if source.facts.loses_writes_to(spec.memory) || (source.facts.is_old_emulator() && !spec.dimms().is_empty()) {
        let Candidate { name, facts, .. } = source;
        found.push(incompatible(
            format!("QEMU {} on host {name}, emulating, loses memory writes during a warm-up of RAM of this VM's size", facts.qemu),
            format!(
                "stop and start the VM (it then gets a size that moves safely), or install QEMU 9.0 or newer on {name} before that"
            ),
        ));
    }
    found.extend(spec.volumes().filter_map(|volume| check_volume(volume, source, destination).err()));
    for disk in &spec.disks {
        if disk.cache != CacheMode::Direct && !travels(&disk.volume, source, destination) {
            found.push(Refusal::new(ErrorCode::HostIncompatible, format!("volume {} is cached by the host ({:?})", disk.volume, disk.cache))
                .hint("stop the VM, set the disk's cache to `direct`, and start it again: two hosts' caches of shared storage are not coherent"));
        }
    }
    found.extend(check_memory(spec.memory_with_dimms(), destination).err());
    found
}

/// Whether both hosts have the volume's pool.
fn check_volume(volume: &VolumeRef, source: Candidate<'_>, destination: Candidate<'_>) -> Result<(), Refusal> {
    let missing = [source, destination].into_iter().find(|host| pool_of(volume, *host).is_none());
    missing.map_or(Ok(()), |host| Err(pool_missing(volume, host.name)))
}

fn pool_of<'a>(volume: &VolumeRef, host: Candidate<'a>) -> Option<&'a PoolFacts> {
    host.facts.pools.iter().find(|pool| pool.name == volume.pool)
}

/// Whether the destination does not see the volume, so that it has to be copied there.
fn travels(volume: &VolumeRef, source: Candidate<'_>, destination: Candidate<'_>) -> bool {
    let (Some(here), Some(there)) = (pool_of(volume, source), pool_of(volume, destination)) else { return false };
    !(here.shared && there.shared && here.identity == there.identity)
}

/// Volumes of the VM that the destination does not see.
pub(crate) fn travelling(spec: &ResolvedSpec, source: Candidate<'_>, destination: Candidate<'_>) -> Vec<VolumeRef> {
    spec.volumes().filter(|volume| travels(volume, source, destination)).cloned().collect()
}

/// Whether `host` has the disks of a VM that ran on `home` last: what is in a pool that a host has for itself is where the VM was. `there` is that host
/// if it is connected.
pub(crate) fn has_its_disks(
    spec: &ResolvedSpec,
    home: &Name,
    there: Option<Candidate<'_>>,
    host: Candidate<'_>,
) -> Result<(), Refusal> {
    let alone = |volume: &VolumeRef| pool_of(volume, host).is_some_and(|pool| !pool.shared);
    let elsewhere =
        |volume: &&VolumeRef| home != host.name && there.map_or_else(|| alone(volume), |there| travels(volume, there, host));
    spec.volumes().find(elsewhere).map_or(Ok(()), |volume| {
        let facts = format!("volume {volume} is on host {home}, where the VM ran last; {} does not see it", host.name);
        Err(Refusal::new(ErrorCode::PoolUnavailable, facts)
            .hint(format!("start the VM on {home} (`--on {home}`, or leave `--on` out), and migrate it while it runs")))
    })
}

#[cfg(test)]
pub(crate) mod tests;
