//! Snapshots: what they are called, which pool holds them, which hosts see it, and where a VM can become what it was. Pure: facts in, answer out.

use godwit_api::v1::SnapshotState;
use godwit_model::name::MAX_NAME;
use godwit_model::{Bytes, ErrorCode, Name, PoolFacts, Refusal, Retry, UnixMillis, VmId};

use crate::checks::{Candidate, check_equal, check_restore, has_its_disks, takes_memory_later};
use crate::clock;
use crate::db::Stored;
use crate::networks::check_networks;
use crate::rows::{NetworkRow, SnapshotRow, VmRow};

/// Snapshots that a team can have.
pub(crate) const MOST: usize = 1_000;
/// Room for what tells snapshots of one second apart.
const SUFFIX: usize = 4;

/// A name for a snapshot that nobody has named: the VM's, `what` it is for, and the moment.
pub(crate) fn free_name(vm: &Name, what: &str, now: UnixMillis, taken: impl Fn(&str) -> bool) -> Result<Name, Refusal> {
    let ending = format!("{what}-{}", clock::stamp(now));
    let vm: String = vm.as_str().chars().take(MAX_NAME.saturating_sub(ending.len() + SUFFIX)).collect();
    let stem = format!("{vm}{ending}");
    let mut names = std::iter::once(stem.clone()).chain((2..=MOST + 1).map(|number| format!("{stem}-{number}")));
    let name = names.find(|name| !taken(name)).and_then(|name| Name::new(name).ok());
    name.ok_or_else(|| Refusal::new(ErrorCode::NameTaken, format!("no name like {stem} is free")).hint("name the snapshot"))
}

/// Whether a team that has `count` snapshots can have another.
pub(crate) fn check_room(count: usize) -> Result<(), Refusal> {
    if count < MOST {
        return Ok(());
    }
    Err(Refusal::new(ErrorCode::BadRequest, format!("a team has at most {MOST} snapshots"))
        .hint("delete some that are not needed: `godwit snapshot list`, `godwit snapshot delete`"))
}

/// The pool of a VM's host that is to hold its snapshot: the wanted one, else that of its first disk, else the first that is shared, else the first.
pub(crate) fn choose_pool<'a>(
    pools: &'a [PoolFacts],
    host: &Name,
    wanted: Option<&Name>,
    of_disk: Option<&Name>,
) -> Result<&'a PoolFacts, Refusal> {
    let named = |name: &Name| pools.iter().find(|pool| pool.name == *name);
    let unavailable = |message: String| Refusal::new(ErrorCode::PoolUnavailable, message);
    if let Some(wanted) = wanted {
        return named(wanted).ok_or_else(|| {
            let names: Vec<&str> = pools.iter().map(|pool| pool.name.as_str()).collect();
            let others =
                if names.is_empty() { String::new() } else { format!(", or choose another of its pools: {}", names.join(", ")) };
            unavailable(format!("host {host}, where the VM runs, has no pool {wanted}"))
                .hint(format!("start the agent of {host} with `--pool {wanted}=DIRECTORY`{others}"))
        });
    }
    let shared = || pools.iter().find(|pool| pool.shared);
    of_disk.and_then(named).or_else(shared).or_else(|| pools.first()).ok_or_else(|| {
        unavailable(format!("host {host}, where the VM runs, has no pool that could hold a snapshot"))
            .hint(format!("start the agent of {host} with `--pool NAME=DIRECTORY`"))
    })
}

/// What a host calls the pool with this identity, if it has it.
pub(crate) fn pool_there<'a>(pools: &'a [PoolFacts], identity: &str) -> Option<&'a Name> {
    pools.iter().find(|pool| pool.identity == identity).map(|pool| &pool.name)
}

/// The newest snapshot with memory of a VM among those of its team that a host with these pools sees, and what it calls the pool: the host need not be sent
/// what is in it. Of another VM none counts: what its memory holds nobody learns from a move.
pub(crate) fn newest_memory<'a>(
    snapshots: &'a [SnapshotRow],
    vm: VmId,
    pools: &'a [PoolFacts],
) -> Option<(&'a SnapshotRow, &'a Name)> {
    let own = |row: &&SnapshotRow| row.vm == vm && row.state == SnapshotState::Ready && row.has_memory();
    let seen = |row: &'a SnapshotRow| Some((row, pool_there(pools, &row.identity)?));
    snapshots.iter().filter(own).filter_map(seen).max_by_key(|(row, _)| row.created)
}

/// Everything that a VM becomes by a rollback, as far as it matters where.
pub(crate) struct Rollback<'a> {
    pub(crate) vm: &'a VmRow,
    pub(crate) snapshot: &'a SnapshotRow,
    pub(crate) networks: &'a [Stored<NetworkRow>],
    /// The host where the snapshot was taken, as it is or was.
    pub(crate) origin: Option<Candidate<'a>>,
}

impl Rollback<'_> {
    /// The host that the VM begins on: the wanted one, else the first that can of its own, the snapshot's, and all others of `hosts`, the connected ones.
    pub(crate) fn decide_host(&self, wanted: Option<&Name>, hosts: &[Candidate<'_>]) -> Result<Name, Refusal> {
        let Self { vm, snapshot, .. } = self;
        let rank = |host: &Candidate<'_>| match host.name {
            name if vm.host.as_ref() == Some(name) => 0,
            name if *name == snapshot.host => 1,
            _ => 2,
        };
        let mut able: Vec<Candidate<'_>> =
            hosts.iter().filter(|host| wanted.is_none_or(|wanted| wanted == host.name)).copied().collect();
        able.sort_by_key(rank);
        let mut first = None;
        for host in able {
            match self.check(host, hosts) {
                Ok(()) => return Ok(host.name.clone()),
                // A host without the pool says less than one that has it and still cannot.
                Err(refusal) if pool_there(&host.facts.pools, &snapshot.identity).is_some() => {
                    first.get_or_insert(refusal);
                }
                Err(_) => {}
            }
        }
        Err(first.unwrap_or_else(|| self.out_of_reach(wanted, hosts)))
    }

    fn out_of_reach(&self, wanted: Option<&Name>, hosts: &[Candidate<'_>]) -> Refusal {
        let SnapshotRow { name, pool, identity, host, .. } = self.snapshot;
        let having: Vec<&str> =
            hosts.iter().filter(|host| pool_there(&host.facts.pools, identity).is_some()).map(|host| host.name.as_str()).collect();
        let whose = wanted.map_or_else(|| "no connected host has".to_owned(), |wanted| format!("host {wanted} does not have"));
        let message = format!("{whose} the pool {pool} that holds snapshot {name}");
        let fix = if having.is_empty() {
            format!("start the agent of a host that has it; the snapshot was taken on {host}")
        } else {
            format!("choose a host that has it: {}", having.join(", "))
        };
        Refusal::new(ErrorCode::PoolUnavailable, message).hint(fix)
    }

    fn check(&self, host: Candidate<'_>, hosts: &[Candidate<'_>]) -> Result<(), Refusal> {
        let Self { vm, snapshot, networks, origin } = self;
        if pool_there(&host.facts.pools, &snapshot.identity).is_none() {
            return Err(self.out_of_reach(Some(host.name), hosts));
        }
        let spec = &snapshot.resolved;
        let here = vm.host.as_ref() == Some(host.name) && vm.has_process();
        let freed = vm.resolved.as_ref().filter(|_| here).map_or(Bytes(0), |running| running.memory_with_dimms());
        check_restore(spec, host, freed)?;
        if snapshot.has_memory() {
            takes_memory_later(host, "choose another host")?;
        }
        if snapshot.has_memory() && snapshot.host != *host.name {
            match origin {
                Some(origin) => check_equal(spec, *origin, host)?,
                None if matches!(spec.cpu.as_str(), "host" | "max") => {
                    let message = format!("the VM had the CPU of host {}, of which nothing is known any more", snapshot.host);
                    return Err(Refusal::new(ErrorCode::HostIncompatible, message).hint("let that host join again"));
                }
                None => {}
            }
        }
        check_networks(spec, networks, host)?;
        let Some(home) = vm.host.as_ref().filter(|_| vm.reported.0 > 0) else { return Ok(()) };
        has_its_disks(spec, home, hosts.iter().find(|host| host.name == home).copied(), host)
    }
}

/// The snapshot is not there for this now.
pub(crate) fn not_ready(snapshot: &SnapshotRow) -> Refusal {
    use godwit_api::v1::SnapshotState as S;
    let name = &snapshot.name;
    match snapshot.state {
        S::Taking | S::Ready => Refusal::new(ErrorCode::InUse, format!("snapshot {name} is being taken"))
            .hint("wait for its task: `godwit task list --running`")
            .retry(Retry::Safe),
        S::Failed => Refusal::new(ErrorCode::SnapshotFailed, format!("snapshot {name} was not taken"))
            .hint(format!("choose another one, and delete this: `godwit snapshot delete {name}`")),
        S::Deleting => Refusal::new(ErrorCode::InUse, format!("snapshot {name} is being deleted"))
            .hint("choose another one; `godwit snapshot list` shows what there is"),
    }
}

#[cfg(test)]
mod tests {
    use godwit_model::{
        HostBridge, HostCondition, HostFacts, HostLoad, NetworkId, NetworkKind, ResolvedNic, RunState, SnapshotId, SnapshotRequest,
    };

    use super::*;
    use crate::checks::tests::{facts, load, spec};
    use crate::tests::support::{name, vm_row};

    /// Of a VM that ran on h2 last, taken on h3.
    fn snapshot() -> (VmRow, SnapshotRow) {
        let (mut vm, resolved) = (vm_row(), spec());
        (vm.host, vm.reported, vm.resolved) = (Some(name("h2")), godwit_model::Generation(1), Some(resolved.clone()));
        let row = SnapshotRow {
            id: SnapshotId::new(uuid::Uuid::nil()),
            name: name("one"),
            team: vm.team.clone(),
            vm: vm.id,
            vm_name: vm.name.clone(),
            created: UnixMillis(0),
            pool: name("shared"),
            identity: "one".into(),
            host: name("h3"),
            generation: godwit_model::Generation(1),
            state: SnapshotState::Ready,
            salt: String::new(),
            request: SnapshotRequest { memory: true, quiesce: None },
            spec: vm.spec.clone(),
            resolved,
            waiting: vec![],
            figures: None,
            golden: false,
            principal: String::new(),
            reason: None,
            schedule: None,
        };
        (vm, row)
    }

    #[test]
    fn the_newest_memory_of_a_vm_is_its_own_whole_and_seen() {
        type Change = fn(&mut SnapshotRow);
        let found = |change: Change| {
            let (vm, row) = snapshot();
            let number =
                |number: u64| SnapshotRow { created: UnixMillis(number), name: name(&format!("s{number}")), ..row.clone() };
            let mut rows = [number(1), number(3), number(2)];
            change(&mut rows[1]);
            newest_memory(&rows, vm.id, &facts().pools).map(|(row, pool)| (row.name.to_string(), pool.to_string()))
        };
        let newest = |name: &str| Some((name.to_owned(), "shared".to_owned()));
        assert_eq!(found(|_| {}), newest("s3"));
        assert_eq!(found(|row| row.vm = VmId::new(uuid::Uuid::from_u128(7))), newest("s2"), "another VM's");
        assert_eq!(found(|row| row.state = SnapshotState::Deleting), newest("s2"));
        assert_eq!(found(|row| row.state = SnapshotState::Taking), newest("s2"));
        assert_eq!(found(|row| row.request.memory = false), newest("s2"), "disks alone");
        assert_eq!(found(|row| row.identity = "two".into()), newest("s2"), "in a pool that is not there");
        let (vm, row) = snapshot();
        assert_eq!(newest_memory(&[row], vm.id, &[]), None);
    }

    #[test]
    fn a_vm_begins_again_where_it_is_or_was_or_else_anywhere_that_can() {
        type Change = fn(&mut VmRow, &mut SnapshotRow, &mut Vec<(&str, HostFacts, HostLoad)>);
        let decided = |wanted: Option<&str>, change: Change| {
            let (mut vm, mut row) = snapshot();
            let mut hosts: Vec<_> = ["h1", "h2", "h3"].map(|host| (host, facts(), load(Bytes::GIB))).to_vec();
            change(&mut vm, &mut row, &mut hosts);
            let names: Vec<Name> = hosts.iter().map(|(host, ..)| name(host)).collect();
            let pairs = hosts.iter().zip(&names);
            let hosts: Vec<Candidate<'_>> =
                pairs.map(|((_, facts, load), name)| Candidate { name, facts, load, skew: None }).collect();
            let origin = hosts.iter().find(|host| *host.name == row.host).copied();
            let wanted = wanted.map(name);
            Rollback { vm: &vm, snapshot: &row, networks: &[], origin }
                .decide_host(wanted.as_ref(), &hosts)
                .map(|host| host.to_string())
                .map_err(|refusal| (refusal.code, refusal.hint.unwrap_or_default()))
        };
        let code = |wanted, change: Change| decided(wanted, change).map_err(|(code, _)| code);
        assert_eq!(code(None, |_, _, _| {}).as_deref(), Ok("h2"));
        assert_eq!(code(Some("h1"), |_, _, _| {}).as_deref(), Ok("h1"));
        assert_eq!(code(None, |_, _, hosts| hosts.retain(|(host, ..)| *host != "h2")).as_deref(), Ok("h3"));
        assert_eq!(code(None, |_, _, hosts| hosts.truncate(1)).as_deref(), Ok("h1"));
        // What it holds of its host's memory it gives back first.
        assert_eq!(code(None, |_, _, hosts| hosts[1].2.memory_free = Bytes(0)).as_deref(), Ok("h3"));
        let runs = code(None, |vm, _, hosts| {
            vm.state = RunState::Running;
            hosts[1].2.memory_free = Bytes(0);
        });
        assert_eq!(runs.as_deref(), Ok("h2"));
        // The pool with the vault is not everywhere.
        let vault: Change = |_, row, hosts| {
            row.identity = "vault".into();
            for host in [0, 2] {
                let pool = PoolFacts { name: name("vault"), identity: "vault".into(), shared: true, capacity: Bytes::GIB };
                hosts[host].1.pools.push(pool);
            }
        };
        assert_eq!(code(None, vault).as_deref(), Ok("h3"));
        let (lacks, hint) = decided(Some("h2"), vault).expect_err("no pool");
        assert_eq!((lacks, hint.as_str()), (ErrorCode::PoolUnavailable, "choose a host that has it: h1, h3"));
        let (none, hint) = decided(None, |_, row, _| row.identity = "gone".into()).expect_err("no host has it");
        assert!(none == ErrorCode::PoolUnavailable && hint.contains("h3"), "{hint}");
        // Its disks are where it ran last, if others do not see them.
        let alone: Change = |_, _, hosts| {
            for (number, (_, facts, _)) in hosts.iter_mut().enumerate() {
                let pool = &mut facts.pools[0];
                (pool.name, pool.shared) = (name("vaults"), true);
                let disks = PoolFacts { name: name("shared"), identity: number.to_string(), shared: false, capacity: Bytes::GIB };
                facts.pools.push(disks);
            }
        };
        assert_eq!(code(None, alone).as_deref(), Ok("h2"));
        assert_eq!(code(Some("h1"), alone), Err(ErrorCode::PoolUnavailable));
        // Memory of a VM with its host's CPU.
        let tied: Change = |_, row, hosts| {
            row.resolved.cpu = "max".into();
            hosts[0].1.cpu_features.clear();
        };
        assert_eq!(code(Some("h1"), tied), Err(ErrorCode::HostIncompatible));
        let forgotten: Change = |_, row, hosts| {
            row.resolved.cpu = "max".into();
            hosts.truncate(1);
        };
        assert_eq!(code(None, forgotten), Err(ErrorCode::HostIncompatible));
        let boots: Change = |_, row, hosts| {
            (row.resolved.cpu, row.request.memory) = ("max".into(), false);
            hosts.truncate(1);
        };
        assert_eq!(code(None, boots).as_deref(), Ok("h1"));
        // A QEMU that cannot run before its memory is there: nothing is begun that cannot end.
        let unable: Change = |_, _, hosts| {
            let name = HostCondition::NO_POSTCOPY.to_owned();
            hosts[1].1.conditions.push(HostCondition { name, message: "no userfaultfd".into(), fix: "set a sysctl".into() });
        };
        assert_eq!(code(Some("h2"), unable), Err(ErrorCode::UserfaultUnavailable));
        assert_eq!(code(None, unable).as_deref(), Ok("h3"));
        let boots_there: Change = |_, row, hosts| {
            row.request.memory = false;
            let name = HostCondition::NO_POSTCOPY.to_owned();
            hosts[1].1.conditions.push(HostCondition { name, message: "no userfaultfd".into(), fix: "set a sysctl".into() });
        };
        assert_eq!(code(None, boots_there).as_deref(), Ok("h2"));
    }

    #[test]
    fn a_vm_begins_again_only_where_its_networks_are() {
        let (vm, mut row) = snapshot();
        let nic = ResolvedNic::new(name("lan"), "52:54:00:00:00:01".parse().expect("an address"));
        row.resolved.nics = vec![nic];
        let lan = NetworkRow {
            id: NetworkId::new(uuid::Uuid::nil()),
            name: name("lan"),
            team: vm.team.clone(),
            kind: NetworkKind::Bridge { bridge: "br0".parse().expect("a bridge"), vlan: None },
            vni: None,
            mtu: 1_500,
            created: UnixMillis(0),
        };
        let lan = [Stored { row: lan, revision: 1 }];
        let (here, without) = (facts(), load(Bytes::GIB));
        let mut with = load(Bytes::GIB);
        with.networks.bridges = vec![HostBridge { name: "br0".into(), mtu: 1_500, uplink: Some("eth0".into()) }];
        let decided = |wanted: Option<&str>, has: [bool; 3], networks: &[Stored<NetworkRow>]| {
            let names = ["h1", "h2", "h3"].map(name);
            let loads = has.map(|has| if has { &with } else { &without });
            let hosts: Vec<Candidate<'_>> =
                names.iter().zip(loads).map(|(name, load)| Candidate { name, facts: &here, load, skew: None }).collect();
            let origin = hosts.iter().find(|host| *host.name == row.host).copied();
            let rollback = Rollback { vm: &vm, snapshot: &row, networks, origin };
            rollback.decide_host(wanted.map(name).as_ref(), &hosts).map(|host| host.to_string()).map_err(|refusal| {
                assert!(refusal.hint.is_some(), "{refusal:?}");
                (refusal.code, refusal.message)
            })
        };
        assert_eq!(decided(None, [true; 3], &lan).as_deref(), Ok("h2"));
        assert_eq!(decided(None, [true, false, true], &lan).as_deref(), Ok("h3"));
        let (code, message) = decided(Some("h2"), [true, false, true], &lan).expect_err("no bridge");
        assert!(code == ErrorCode::HostIncompatible && message.contains("br0"), "{message}");
        let (code, _) = decided(None, [false; 3], &lan).expect_err("no bridge anywhere");
        assert_eq!(code, ErrorCode::HostIncompatible);
        let (code, message) = decided(None, [true; 3], &[]).expect_err("it was deleted");
        assert!(code == ErrorCode::NotFound && message.contains("lan"), "{message}");
    }

    #[test]
    fn a_name_of_its_own_fits_and_is_free() {
        let (now, long) = (UnixMillis(1_795_804_200_000), name(&"x".repeat(63)));
        let named = |vm: &Name, what: &str, taken: &[&str]| {
            free_name(vm, what, now, |name| taken.contains(&name)).expect("a name").to_string()
        };
        assert_eq!(named(&name("web1"), "", &[]), "web1-20261127-183000");
        assert_eq!(named(&name("web1"), "", &["web1-20261127-183000", "web1-20261127-183000-2"]), "web1-20261127-183000-3");
        assert_eq!(named(&long, "-before-rollback", &[]).len(), MAX_NAME - SUFFIX);
        assert_eq!(free_name(&long, "", now, |_| true).expect_err("none is free").code, ErrorCode::NameTaken);
    }

    #[test]
    fn a_team_has_not_any_number_of_snapshots() {
        assert_eq!(check_room(MOST - 1), Ok(()));
        let refusal = check_room(MOST).expect_err("one too many");
        assert!(refusal.code == ErrorCode::BadRequest && refusal.hint.is_some(), "{refusal}");
    }

    #[test]
    fn the_pool_is_the_wanted_one_or_the_one_that_suits() {
        let pool = |text: &str, shared| PoolFacts { name: name(text), identity: text.into(), shared, capacity: Bytes::GIB };
        let pools = [pool("local", false), pool("nfs", true), pool("fast", false)];
        let h1 = name("h1");
        let chosen = |pools: &[PoolFacts], wanted: Option<&str>, disk: Option<&str>| {
            let (wanted, disk) = (wanted.map(name), disk.map(name));
            choose_pool(pools, &h1, wanted.as_ref(), disk.as_ref()).map(|pool| pool.name.to_string())
        };
        assert_eq!(chosen(&pools, Some("local"), Some("fast")).as_deref(), Ok("local"));
        assert_eq!(chosen(&pools, None, Some("fast")).as_deref(), Ok("fast"));
        assert_eq!(chosen(&pools, None, Some("gone")).as_deref(), Ok("nfs"));
        assert_eq!(chosen(&pools[..1], None, None).as_deref(), Ok("local"));
        let refusal = chosen(&pools, Some("gone"), None).expect_err("there is none");
        assert!(refusal.code == ErrorCode::PoolUnavailable && refusal.hint.is_some_and(|hint| hint.contains("local, nfs, fast")));
        assert_eq!(chosen(&[], None, None).expect_err("none at all").code, ErrorCode::PoolUnavailable);
    }
}
