//! From what is stored and what is connected to what is sent.

use std::collections::BTreeMap;

use godwit_api::v1;
use godwit_model::{
    Bytes, CloudInit, ErrorCode, HostCondition, HostFacts, InterfaceDrops, Name, PoolFacts, Refusal, ResolvedDisk, RunState, VmSpec,
};
use serde::Serialize;

use crate::clock;
use crate::db::Stored;
use crate::hub::Hub;
use crate::networks::lacks;
use crate::rows::{
    ErrandEnd, HistoryRow, HostRow, ImageRow, Later, MigratableRow, NetworkRow, OriginKind, PolicyRow, Reign, RunRow, ScheduleRow,
    SnapshotRow, TaskRow, TeamRow, TokenRow, VmRow, Work,
};
use crate::schedules;
use crate::specs::Waiting;
use crate::tasks::cancellable;

fn condition(name: &str, message: String, fix: &str) -> v1::Condition {
    v1::Condition { name: name.into(), message, fix: fix.into() }
}

/// A VM.
pub(crate) fn vm(stored: &Stored<VmRow>, hub: &Hub) -> v1::Vm {
    let row = &stored.row;
    let mut conditions = Vec::new();
    if let Some(host) = row.host.as_ref().filter(|host| row.has_process() && hub.presence(host).is_none()) {
        let since = hub.since(host).map_or_else(|| "the controller started".into(), clock::readable);
        let message = format!("host {host} is not connected since {since}: what is shown is what was last known");
        conditions.push(condition(
            "host_unreachable",
            message,
            "restore the host's agent or link; the VM keeps running without it",
        ));
    }
    if row.state == RunState::Crashed {
        let detail = if row.detail.is_empty() { "its host gave no detail" } else { &row.detail };
        let message = format!("QEMU ended without being asked to: {detail}");
        conditions.push(condition("crashed", message, "look at the agent's log on its host, then start the VM again"));
    } else if !row.detail.is_empty() {
        conditions.push(condition(
            "unknown_to_host",
            row.detail.clone(),
            "check the state directory of that host's agent before starting the VM",
        ));
    }
    if let Some(refusal) = &row.not_started {
        let message = format!("it was not started again when its host came back: {}", refusal.message);
        conditions.push(condition("not_started_again", message, refusal.hint.as_deref().unwrap_or("start it")));
    }
    if let Some(snapshot) = row.unfinished.as_ref().filter(|_| row.activity.is_none()) {
        let message = format!("its disks may be half of snapshot {snapshot}: a rollback did not end well");
        let fix = format!("roll back once more (`godwit snapshot rollback {snapshot}`), or to another snapshot of the VM");
        conditions.push(condition("disks_unfinished", message, &fix));
    }
    let origin = row.origin.as_ref().filter(|_| row.activity.is_none());
    if let Some(origin) = origin.filter(|origin| origin.kind == OriginKind::Suspended) {
        let message = format!("it is suspended: what it was is kept in snapshot {}", origin.snapshot);
        conditions.push(condition("suspended", message, &format!("let it go on: `godwit vm unsuspend {}`", row.name)));
    }
    if let Some(origin) = origin.filter(|origin| origin.kind == OriginKind::Clone) {
        let what = if origin.memory { "memory and disks" } else { "the disks" };
        let message = format!("it has not run yet: it begins from {what} of snapshot {}", origin.snapshot);
        conditions.push(condition("begins_from_snapshot", message, &format!("start it: `godwit vm start {}`", row.name)));
    }
    if let Some(other) = row.copied.as_ref().filter(|_| row.has_process() && row.spec.nics.iter().any(|nic| !nic.link_up)) {
        let message = format!(
            "it went on with the memory of {other} and takes itself for that: addresses, host keys and machine id in it are those of {other}; its interfaces are plugged out"
        );
        let fix = format!(
            "give it an identity of its own at its console, with the address that the interface has here, then `godwit vm set {} --plug MAC`",
            row.name
        );
        conditions.push(condition("isolated", message, &fix));
    }
    let started = row.resolved.as_ref().filter(|_| row.generation.0 > 0).map(|spec| v1::Started {
        machine: spec.machine.clone(),
        cpu: spec.cpu.clone(),
        accelerator: spec.accelerator,
    });
    v1::Vm {
        id: row.id,
        name: row.name.clone(),
        team: row.team.clone(),
        revision: stored.revision,
        created: row.created,
        spec: shown(&row.spec),
        status: v1::VmStatus {
            state: row.state,
            host: row.host.clone(),
            generation: row.pending.as_ref().map_or(row.generation, |pending| pending.generation),
            activity: row.activity,
            started,
            waiting: row.waiting.iter().filter(|_| row.has_process()).map(waits).collect(),
            macs: row.spec.nics.iter().map(|nic| nic.mac.map(|mac| mac.to_string()).unwrap_or_default()).collect(),
            dropped: dropped(row, hub),
            conditions,
            migratable: hub.migratable(row.id).filter(|_| row.has_process()),
            dirty_rate: hub.habits.last(row.id, row.since, clock::now()).filter(|_| row.has_process()),
            quiet: hub.habits.quiet(row.id),
            cloud_init: row.spec.cloud_init.as_ref().map(seed_facts),
            guest: row.host.as_ref().filter(|_| row.has_process()).and_then(|host| hub.guest(host, row.id)),
            since: row.since,
        },
    }
}

/// Whether a VM could move.
pub(crate) fn migratable(row: &MigratableRow) -> v1::Migratable {
    v1::Migratable { possible: row.possible, reason: row.reason.clone(), since: row.since }
}

/// What became of a VM's generations.
pub(crate) fn history(row: HistoryRow) -> v1::VmHistory {
    let generations = row.reigns.into_iter().map(|reign| {
        let Reign { generation, host, granted, began, ended, end, task, kind, principal, reason, figures } = reign;
        v1::Reign { generation, host, granted, began, ended, end, task, kind, principal, reason, figures }
    });
    v1::VmHistory { generations: generations.collect() }
}

fn waits(waiting: &Waiting) -> v1::Waiting {
    let Waiting { field, running, wanted, reason } = waiting.clone();
    v1::Waiting { field, running, wanted, reason }
}

/// A spec as it is shown: what cloud-init tells a guest often holds passwords, and is written only.
fn shown(spec: &VmSpec) -> VmSpec {
    let mut spec = spec.clone();
    if let Some(seed) = &mut spec.cloud_init {
        (seed.user_data, seed.network_config, seed.vendor_data) = (None, None, None);
    }
    spec
}

fn seed_facts(seed: &CloudInit) -> v1::SeedFacts {
    let size = |text: &Option<String>| text.as_ref().map(|text| Bytes(text.len() as u64));
    v1::SeedFacts {
        user_data: size(&seed.user_data),
        network_config: size(&seed.network_config),
        vendor_data: size(&seed.vendor_data),
    }
}

/// How far a host's clock may be off: grants and certificates have a beginning and an end.
const MAX_SKEW: u64 = 5_000;

/// The facts with what only the controller can see of a host.
fn with_skew(mut facts: HostFacts, skew: Option<i64>) -> HostFacts {
    if let Some(skew) = skew.filter(|skew| skew.unsigned_abs() > MAX_SKEW) {
        let (seconds, way) = ((skew.unsigned_abs() + 500) / 1_000, if skew > 0 { "ahead of" } else { "behind" });
        facts.conditions.push(HostCondition {
            name: "clock_skew".into(),
            message: format!(
                "the host's clock is {seconds} s {way} the controller's: grants seem older or younger there than they are"
            ),
            fix: "let both keep time by NTP (`systemctl enable --now systemd-timesyncd`, or chrony)".into(),
        });
    }
    facts
}

/// A host.
pub(crate) fn host(stored: &Stored<HostRow>, hub: &Hub) -> v1::Host {
    let row = &stored.row;
    let presence = hub.presence(&row.name);
    v1::Host {
        name: row.name.clone(),
        revision: stored.revision,
        address: presence.as_ref().map_or_else(|| row.address.clone(), |presence| presence.address.clone()),
        connected: presence.is_some(),
        since: hub.since(&row.name).unwrap_or(row.since),
        facts: presence.as_ref().map(|presence| with_skew((*presence.facts).clone(), presence.skew)).or_else(|| row.facts.clone()),
        migration_address: presence
            .as_ref()
            .and_then(|presence| presence.migration_address.clone())
            .or(row.migration_address.clone()),
        migration_bandwidth: row.migration_bandwidth,
        load: presence.map(|presence| {
            let mut load = presence.load;
            // Hosts are shown to everybody, VMs only to their teams.
            load.networks.interfaces.clear();
            load
        }),
    }
}

/// A network.
pub(crate) fn network(stored: &Stored<NetworkRow>, hub: &Hub) -> v1::Network {
    let row = &stored.row;
    let lacking = |(host, presence): &(Name, crate::hub::Presence)| {
        let (message, fix) = lacks(row, row.mtu, (host, &presence.load.networks))?;
        Some(v1::Condition { name: "not_on_host".into(), message, fix })
    };
    v1::Network {
        id: row.id,
        name: row.name.clone(),
        team: row.team.clone(),
        revision: stored.revision,
        kind: row.kind.clone(),
        vni: row.vni,
        mtu: row.mtu,
        conditions: hub.present().iter().filter_map(lacking).collect(),
        created: row.created,
    }
}

/// A migration policy.
pub(crate) fn policy(stored: &Stored<PolicyRow>) -> v1::Policy {
    let PolicyRow { name, team, labels, limits, created } = stored.row.clone();
    v1::Policy { name, team, revision: stored.revision, labels, limits, created }
}

/// A schedule.
pub(crate) fn schedule(stored: &Stored<ScheduleRow>) -> v1::Schedule {
    let ScheduleRow { id, name, team, created, spec, handled, last, missed } = stored.row.clone();
    // Of a zone that is not known any more nobody can say when it runs.
    let table = schedules::timetable(&spec).ok().filter(|_| spec.enabled);
    let last = last.map(|RunRow { due, began, principal }| v1::ScheduledRun { due, began, principal });
    let next = table.and_then(|table| table.next(handled));
    v1::Schedule { id, name, team, revision: stored.revision, created, spec, next, last, missed }
}

/// What became of a VM's part in a run.
pub(crate) fn errand_end(end: &ErrandEnd) -> v1::ScheduledOutcome {
    let ErrandEnd { due, ended, result, snapshot, error } = end.clone();
    v1::ScheduledOutcome { due, ended, result, snapshot, error }
}

/// What was dropped of each interface of a VM, on the host where it runs.
fn dropped(row: &VmRow, hub: &Hub) -> Vec<InterfaceDrops> {
    let presence = row.host.as_ref().filter(|_| row.has_process()).and_then(|host| hub.presence(host));
    let all = presence.map(|presence| presence.load.networks.interfaces).unwrap_or_default();
    all.into_iter().filter(|interface| interface.vm == row.id).collect()
}

/// An image.
pub(crate) fn image(stored: &Stored<ImageRow>) -> v1::Image {
    let row = &stored.row;
    v1::Image {
        id: row.id,
        name: row.name.clone(),
        team: row.team.clone(),
        revision: stored.revision,
        kind: row.kind,
        size: row.size,
        digest: row.digest.clone(),
        created: row.created,
    }
}

/// A snapshot.
pub(crate) fn snapshot(stored: &Stored<SnapshotRow>) -> v1::Snapshot {
    let row = &stored.row;
    let measured = |disk: &ResolvedDisk| {
        let size = row.figures.iter().flat_map(|figures| &figures.sizes).find(|size| size.volume == disk.volume);
        size.map(|size| size.size)
    };
    let disks = row
        .resolved
        .disks
        .iter()
        .map(|disk| v1::SnapshotDisk { volume: disk.volume.clone(), size: measured(disk).or(disk.create) });
    v1::Snapshot {
        id: row.id,
        name: row.name.clone(),
        team: row.team.clone(),
        revision: stored.revision,
        vm: row.vm_name.clone(),
        created: row.created,
        pool: row.pool.clone(),
        host: row.host.clone(),
        memory: row.has_memory().then(|| row.resolved.memory_with_dimms()),
        disks: disks.collect(),
        golden: row.golden,
        state: row.state,
        figures: row.figures.clone(),
        principal: row.principal.clone(),
        reason: row.reason.clone(),
    }
}

/// A task.
pub(crate) fn task(stored: &Stored<TaskRow>) -> v1::Task {
    let row = &stored.row;
    let (snapshot, kept) = match &row.work {
        Work::Snapshot { name, .. }
        | Work::SnapshotExport { name, .. }
        | Work::SnapshotImport { name, .. }
        | Work::SnapshotDelete { name, .. } => (Some(name.clone()), None),
        Work::Wait { asked: Later::Snapshot(request) } => (request.name.clone(), None),
        Work::Start { from: Some(origin), .. } => (Some(origin.snapshot.clone()), None),
        Work::Suspend(work) => (Some(work.name.clone()), None),
        Work::Clone { snapshot } => (Some(snapshot.clone()), None),
        Work::Rollback(work) => (Some(work.name.clone()), work.present.clone()),
        _ => (None, None),
    };
    v1::Task {
        id: row.id,
        team: row.team.clone(),
        kind: row.work.kind().into(),
        subject: row.subject.clone(),
        state: row.state,
        revision: stored.revision,
        created: row.created,
        ended: row.ended,
        principal: row.principal.clone(),
        reason: row.reason.clone(),
        step: row.step.clone(),
        cancellable: cancellable(row),
        progress: row.progress.clone(),
        transfer: row.transfer.filter(|_| !row.state.ended()),
        forecast: row.forecast,
        figures: row.figures,
        snapshot,
        kept,
        restore: row.restore,
        export: match &row.work {
            Work::SnapshotExport { written, .. } => written.clone(),
            _ => None,
        },
        error: row.error.clone().filter(|_| row.state.ended()),
        trail: row.trail.clone(),
    }
}

/// A team.
pub(crate) fn team(row: &TeamRow) -> v1::Team {
    v1::Team { name: row.name.clone(), created: row.created, share_memory: row.share_memory }
}

/// A token, without its secret.
pub(crate) fn token(row: &TokenRow) -> v1::Token {
    v1::Token { id: row.id, team: row.team.clone(), role: row.role, description: row.description.clone(), created: row.created }
}

/// The pools of all hosts, put together by name.
pub(crate) fn pools(hosts: &[Stored<HostRow>], hub: &Hub) -> Vec<v1::Pool> {
    let mut pools: BTreeMap<Name, Vec<(Name, PoolFacts, Option<Bytes>)>> = BTreeMap::new();
    for host in hosts {
        let name = &host.row.name;
        let presence = hub.presence(name);
        let facts: Option<&HostFacts> = presence.as_ref().map(|presence| &*presence.facts).or(host.row.facts.as_ref());
        for pool in facts.map(|facts| facts.pools.as_slice()).unwrap_or_default() {
            let frees = presence.as_ref().map(|presence| presence.load.pools_free.as_slice()).unwrap_or_default();
            let free = frees.iter().find(|(free, _)| *free == pool.name).map(|(_, free)| *free);
            pools.entry(pool.name.clone()).or_default().push((name.clone(), pool.clone(), free));
        }
    }
    pools.into_iter().map(|(name, seen)| pool(name, &seen)).collect()
}

fn pool(name: Name, seen: &[(Name, PoolFacts, Option<Bytes>)]) -> v1::Pool {
    let mut conditions = Vec::new();
    let declared = seen.iter().filter(|(_, facts, _)| facts.shared).count();
    let same = seen.iter().all(|(_, facts, _)| seen.first().is_some_and(|(_, first, _)| first.identity == facts.identity));
    if declared > 0 && declared < seen.len() {
        let message = format!("{declared} of {} hosts declare the pool shared", seen.len());
        conditions.push(condition("declared_differently", message, "start all its agents with the same `--shared-pool`"));
    } else if declared > 0 && !same {
        let message = "hosts declare the pool shared but see different storage".to_owned();
        conditions.push(condition("different_storage", message, "mount the same directory on every host of the pool"));
    }
    v1::Pool {
        name,
        shared: declared == seen.len() && same,
        hosts: seen.iter().map(|(host, ..)| host.clone()).collect(),
        capacity: seen.iter().map(|(_, facts, _)| facts.capacity).min().unwrap_or_default(),
        free: seen.iter().filter_map(|(.., free)| *free).min().unwrap_or_default(),
        conditions,
    }
}

/// An object as an event carries it.
pub(crate) fn value(object: &impl Serialize) -> Result<serde_json::Value, Refusal> {
    serde_json::to_value(object).map_err(|_| Refusal::new(ErrorCode::Internal, "an object cannot be written as JSON"))
}
