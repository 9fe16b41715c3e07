//! Each rule broken alone, and what is said of it.

use godwit_model::{
    Boot, DiskFormat, HostCondition, HostNetworks, HugePages, LiveChange, PoolFacts, ResolvedDisk, Tpm, TpmVersion, VmId, VmSpec,
};

use super::*;
use crate::resolve::decide_start;

/// A host that can run everything the tests ask for.
pub(crate) fn facts() -> HostFacts {
    HostFacts {
        agent: "0".into(),
        qemu: "7.2.0".into(),
        accelerator: Accelerator::Tcg,
        accelerator_reason: "no /dev/kvm".into(),
        cpus: 2,
        memory: Bytes::mib(4096),
        machines: ["pc-q35-7.1", "pc-q35-7.2", "pc-q35-10.0", "pc-i440fx-7.2", "q35"].map(String::from).to_vec(),
        cpu_models: vec!["qemu64-v1".into()],
        cpu_features: ["avx", "sse4-2"].map(String::from).to_vec(),
        carrier: 1,
        migration_capabilities: vec!["mapped-ram".into()],
        pools: vec![PoolFacts { name: name("shared"), identity: "one".into(), shared: true, capacity: Bytes::GIB }],
        uefi: true,
        secure_boot: true,
        tpm: true,
        hugepages: vec![],
        numa_nodes: 1,
        node_memory: vec![],
        conditions: vec![],
    }
}

pub(crate) fn load(free: Bytes) -> HostLoad {
    let networks = HostNetworks { overlay_mtu: Some(1_450), filters: true, ..HostNetworks::default() };
    HostLoad { memory_free: free, vms: 0, pools_free: vec![(name("shared"), Bytes::GIB)], networks }
}

fn name(text: &str) -> Name {
    Name::new(text).expect("name")
}

fn vm() -> VmSpec {
    VmSpec::new(1, Bytes::mib(512), Boot::Disk)
}

pub(crate) fn spec() -> ResolvedSpec {
    let (h, load) = (facts(), load(Bytes::GIB));
    let id = VmId::new(uuid::Uuid::nil());
    let candidate = Candidate { name: &name("h1"), facts: &h, load: &load, skew: None };
    let (_, mut spec) = decide_start((id, &name("web1"), &vm()), None, None, &[candidate], &|_| None, &[]).expect("a host");
    spec.disks.push(ResolvedDisk::new("shared/root".parse().expect("volume"), DiskFormat::Raw));
    spec.platform.tpm = Some(Tpm { version: TpmVersion::V2, state: "shared/tpm".parse().expect("volume") });
    spec
}

#[test]
fn every_broken_rule_of_a_move_is_refused_with_its_fix() {
    type Break = fn(&mut ResolvedSpec, &mut HostFacts, &mut HostFacts, &mut HostLoad);
    let cases: [(ErrorCode, Break); 11] = [
        (ErrorCode::HostIncompatible, |_, _, to, _| to.accelerator = Accelerator::Kvm),
        (ErrorCode::HostIncompatible, |_, _, to, _| to.machines.retain(|machine| machine != "pc-q35-10.0")),
        (ErrorCode::HostIncompatible, |_, _, to, _| to.cpu_models.clear()),
        (ErrorCode::HostIncompatible, |_, _, to, _| to.tpm = false),
        (ErrorCode::HostIncompatible, |_, _, to, _| to.carrier = 2),
        (ErrorCode::HostIncompatible, |spec, _, to, _| {
            (spec.cpu, to.cpu_models) = ("max".into(), vec![]);
            to.cpu_features = vec!["avx".into()];
        }),
        (ErrorCode::HostIncompatible, |spec, from, _, _| {
            spec.cpu = "host".into();
            from.cpu_features = vec!["avx".into()];
        }),
        (ErrorCode::HostIncompatible, |_, from, _, _| from.migration_capabilities.clear()),
        (ErrorCode::PoolUnavailable, |_, _, to, _| to.pools.clear()),
        (ErrorCode::HostIncompatible, |spec, _, _, _| spec.disks[0].cache = CacheMode::Writeback),
        (ErrorCode::NotEnoughMemory, |_, _, _, load| load.memory_free = Bytes::mib(500)),
    ];
    let check = |change: Break| {
        let (mut spec, mut from, mut to, mut there) = (spec(), facts(), facts(), load(Bytes::GIB));
        change(&mut spec, &mut from, &mut to, &mut there);
        let (h1, h2, here) = (name("h1"), name("h2"), load(Bytes(0)));
        let source = Candidate { name: &h1, facts: &from, load: &here, skew: Some(900) };
        check_move(&spec, source, Candidate { name: &h2, facts: &to, load: &there, skew: None })
    };
    assert_eq!(check(|_, _, _, _| {}), Ok(()));
    for (number, (code, change)) in cases.into_iter().enumerate() {
        let refusal = check(change).expect_err("accepted");
        assert_eq!(refusal.code, code, "case {number}: {refusal}");
        assert!(refusal.hint.is_some(), "case {number} names no fix");
    }
    let refusal = check(|_, _, _, load| load.memory_free = Bytes::mib(500)).expect_err("too little");
    assert!(refusal.message.contains("12 MiB (12582912 bytes) are missing"), "{refusal}");
}

#[test]
fn a_host_that_cannot_do_post_copy_is_refused_only_where_it_is_wanted() {
    let lacks =
        HostCondition { name: HostCondition::NO_POSTCOPY.into(), message: "no userfaultfd".into(), fix: "set a sysctl".into() };
    let (able, unable) = (facts(), HostFacts { conditions: vec![lacks], ..facts() });
    let ladder = |rungs: &str| MigrationPolicy { on_miss: rungs.parse().expect("a ladder"), ..MigrationPolicy::default() };
    let now = MigrationPolicy { postcopy: PostCopy::Now, ..MigrationPolicy::default() };
    let (h2, load) = (name("h2"), load(Bytes::GIB));
    let on = |facts, policy: &MigrationPolicy, spec: &ResolvedSpec| {
        can_do_postcopy(policy, spec, Candidate { name: &h2, facts, load: &load, skew: None })
    };
    let mut huge = spec();
    huge.platform.hugepages = Some(HugePages::Mib2);
    for wanted in [now, ladder("throttle,postcopy")] {
        assert!(on(&able, &wanted, &spec()).is_ok());
        for refused in [on(&unable, &wanted, &spec()), on(&able, &wanted, &huge)] {
            let refusal = refused.expect_err("it cannot");
            assert!(refusal.code == ErrorCode::UserfaultUnavailable && refusal.hint.is_some(), "{refusal}");
        }
    }
    for unwanted in [MigrationPolicy::default(), ladder("ask"), ladder("throttle,give_up")] {
        assert!(on(&unable, &unwanted, &huge).is_ok());
    }
}

#[test]
fn ram_is_uneven_where_an_old_qemu_emulates_and_then_moves_from_there() {
    let old = HostFacts { migration_capabilities: vec![], ..facts() };
    let (new, free) = (facts(), load(Bytes::GIB));
    let (h1, h2) = (name("h1"), name("h2"));
    let hosts = [
        Candidate { name: &h1, facts: &new, load: &free, skew: None },
        Candidate { name: &h2, facts: &old, load: &free, skew: None },
    ];
    let (id, web1, vm) = (VmId::new(uuid::Uuid::nil()), name("web1"), vm());
    let (_, spec) = decide_start((id, &web1, &vm), None, Some(&h1), &hosts, &|_| None, &[]).expect("started");
    assert_eq!(spec.memory, Bytes(vm.memory.get() + HostFacts::UNEVEN.get()));
    assert_eq!(check_move(&spec, hosts[1], hosts[0]), Ok(()));
    let (_, spec) = decide_start((id, &web1, &vm), None, Some(&h1), &hosts[..1], &|_| None, &[]).expect("started");
    assert_eq!(spec.memory, vm.memory);
    // Whatever its RAM is, a DIMM is even.
    let grows = VmSpec { memory_max: Some(Bytes::GIB), ..vm.clone() };
    let (_, mut spec) = decide_start((id, &web1, &grows), None, Some(&h1), &hosts, &|_| None, &[]).expect("started");
    assert_eq!(check_move(&spec, hosts[1], hosts[0]), Ok(()));
    let larger = ResolvedSpec { memory: Bytes::mib(640), ..spec.clone() };
    let dimm = spec.growth_to(&larger).expect("room").expect("a DIMM");
    LiveChange::Memory { dimm }.apply(&mut spec);
    assert_eq!(check_move(&spec, hosts[1], hosts[0]).expect_err("even").code, ErrorCode::HostIncompatible);
    assert_eq!(check_move(&spec, hosts[0], hosts[1]), Ok(()));
    // It needs what it has grown to.
    let little = load(Bytes::mib(600));
    let refusal = check_move(&spec, hosts[0], Candidate { load: &little, ..hosts[1] }).expect_err("too little");
    assert_eq!(refusal.code, ErrorCode::NotEnoughMemory);
    let kvm = HostFacts { accelerator: Accelerator::Kvm, ..old };
    assert!(!kvm.loses_writes_to(vm.memory), "KVM keeps a log of its own");
}

#[test]
fn a_vm_on_one_memory_node_needs_a_host_with_one_or_an_agent_that_binds_and_a_node_that_is_large_enough() {
    let vm = VmSpec { numa: Numa::OneNode, ..vm() };
    let (h1, free, id, web1) = (name("h1"), load(Bytes::GIB), VmId::new(uuid::Uuid::nil()), name("web1"));
    let start = |numa_nodes, node_memory: &[Bytes]| {
        let facts = HostFacts { numa_nodes, node_memory: node_memory.to_vec(), ..facts() };
        let hosts = [Candidate { name: &h1, facts: &facts, load: &free, skew: None }];
        decide_start((id, &web1, &vm), None, None, &hosts, &|_| None, &[]).map(drop)
    };
    assert_eq!(start(1, &[]), Ok(()));
    assert_eq!(start(2, &[Bytes::mib(256), Bytes::mib(512)]), Ok(()));
    for (nodes, memory) in [(2, &[][..]), (0, &[]), (2, &[Bytes::mib(511); 2])] {
        let refusal = start(nodes, memory).expect_err("it cannot be bound");
        assert_eq!((refusal.code, refusal.hint.is_some()), (ErrorCode::HostIncompatible, true), "{nodes} {memory:?}");
    }
}

#[test]
fn a_vm_starts_where_most_memory_is_free_with_the_newest_machine_that_all_know() {
    let (old, new) = (HostFacts { machines: vec!["pc-q35-7.2".into(), "pc-q35-7.1".into()], ..facts() }, facts());
    let (little, much, none) = (load(Bytes::mib(600)), load(Bytes::mib(700)), load(Bytes::mib(1)));
    let (h1, h2, h3) = (name("h1"), name("h2"), name("h3"));
    let hosts = [
        Candidate { name: &h1, facts: &old, load: &little, skew: None },
        Candidate { name: &h2, facts: &new, load: &much, skew: None },
        Candidate { name: &h3, facts: &new, load: &none, skew: None },
    ];
    let (id, web1, vm) = (VmId::new(uuid::Uuid::nil()), name("web1"), vm());
    let (host, spec) = decide_start((id, &web1, &vm), None, None, &hosts, &|_| None, &[]).expect("a host");
    assert_eq!((&host, spec.machine.as_str(), spec.cpu.as_str()), (&h2, "pc-q35-7.2", "qemu64-v1"));
    assert_eq!(decide_start((id, &web1, &vm), None, Some(&h1), &hosts, &|_| None, &[]).expect("h1").0, h1);
    let code = |wanted: Option<&Name>, hosts: &[Candidate<'_>]| {
        decide_start((id, &web1, &vm), None, wanted, hosts, &|_| None, &[]).expect_err("refused").code
    };
    assert_eq!(code(Some(&h3), &hosts), ErrorCode::NotEnoughMemory);
    assert_eq!(code(None, &[]), ErrorCode::NoHost);
    let unversioned = HostFacts { machines: vec!["q35".into()], ..facts() };
    assert_eq!(code(None, &[Candidate { facts: &unversioned, ..hosts[1] }]), ErrorCode::NoHost);
}

#[test]
fn on_hardware_the_baseline_is_newer_where_it_runs() {
    let kvm = HostFacts { accelerator: Accelerator::Kvm, cpu_models: vec!["Nehalem-v2".into()], ..facts() };
    let (h1, free) = (name("h1"), load(Bytes::GIB));
    let host = Candidate { name: &h1, facts: &kvm, load: &free, skew: None };
    let id = VmId::new(uuid::Uuid::nil());
    let (_, spec) = decide_start((id, &name("web1"), &vm()), None, None, &[host], &|_| None, &[]).expect("a host");
    assert_eq!((spec.cpu.as_str(), spec.accelerator), ("Nehalem-v2", Accelerator::Kvm));
}

#[test]
fn a_vm_with_its_hosts_cpu_moves_to_equal_hosts_and_is_told_what_differs() {
    let mut spec = spec();
    spec.cpu = "max".into();
    let (h1, h2, free) = (name("h1"), name("h2"), load(Bytes::GIB));
    let (here, mut there) = (facts(), facts());
    let check = |there: &HostFacts| {
        let source = Candidate { name: &h1, facts: &here, load: &free, skew: None };
        check_move(&spec, source, Candidate { name: &h2, facts: there, load: &free, skew: None })
    };
    assert_eq!(check(&there), Ok(()));
    there.cpu_features = vec!["avx2".into(), "sse4-2".into()];
    let refusal = check(&there).expect_err("refused");
    assert!(refusal.message.contains("h1 has avx that h2 has not, which has avx2 more"), "{refusal}");
}

#[test]
fn a_clock_that_is_far_off_on_either_side_keeps_a_vm_from_moving() {
    let (spec, facts, free) = (spec(), facts(), load(Bytes::GIB));
    let (h1, h2) = (name("h1"), name("h2"));
    let check = |here: Option<i64>, there: Option<i64>| {
        let source = Candidate { name: &h1, facts: &facts, load: &free, skew: here };
        check_move(&spec, source, Candidate { name: &h2, facts: &facts, load: &free, skew: there }).map_err(|refusal| refusal.code)
    };
    assert_eq!(check(Some(-59_000), Some(59_000)), Ok(()));
    assert_eq!(check(Some(-61_000), None), Err(ErrorCode::ClockSkew));
    assert_eq!(check(None, Some(7_200_000)), Err(ErrorCode::ClockSkew));
}

#[test]
fn what_qemu_has_against_a_move_is_said_in_its_words() {
    assert_eq!(blocked(&[]), None);
    let refusal = blocked(&["State blocked by non-migratable device".into()]).expect("a refusal");
    assert_eq!(refusal.code, ErrorCode::MigrationBlocked);
    assert!(refusal.message.contains("non-migratable device") && refusal.hint.is_some(), "{refusal}");
}

#[test]
fn a_volume_travels_unless_both_hosts_share_it_and_its_vm_starts_where_it_is() {
    let (h1, h2, load) = (name("h1"), name("h2"), load(Bytes::GIB));
    let mut spec = spec();
    spec.disks.iter_mut().for_each(|disk| disk.cache = CacheMode::Writeback);
    let with = |shared: bool, identity: &str| {
        let pool = PoolFacts { name: name("shared"), identity: identity.into(), shared, capacity: Bytes::GIB };
        HostFacts { pools: vec![pool], ..facts() }
    };
    for (from, to, travels) in [
        (with(true, "one"), with(true, "one"), false),
        (with(true, "one"), with(true, "other"), true),
        (with(false, "one"), with(true, "one"), true),
        (with(true, "one"), with(false, "one"), true),
        (with(false, "one"), with(false, "other"), true),
    ] {
        let source = Candidate { name: &h1, facts: &from, load: &load, skew: None };
        let destination = Candidate { name: &h2, facts: &to, load: &load, skew: None };
        let volumes: Vec<String> = travelling(&spec, source, destination).iter().map(VolumeRef::to_string).collect();
        assert_eq!(volumes, if travels { vec!["shared/root", "shared/tpm"] } else { vec![] });
        // What the host caches is written to the destination like everything else; shared it would be incoherent.
        assert_eq!(check_move(&spec, source, destination).is_ok(), travels);
        assert!(has_its_disks(&spec, &h2, Some(destination), destination).is_ok(), "where it was it starts");
        let elsewhere =
            |there| has_its_disks(&spec, &h1, there, destination).err().map(|refusal| (refusal.code, refusal.hint.is_some()));
        assert_eq!(elsewhere(Some(source)), travels.then_some((ErrorCode::PoolUnavailable, true)));
        // What that host's pool is like is not known while it is away.
        assert_eq!(elsewhere(None), (!to.pools[0].shared).then_some((ErrorCode::PoolUnavailable, true)));
    }
}
