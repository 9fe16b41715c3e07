//! Memory that comes while a VM runs: where every version has it, in the guest, and on the way to another version.

use std::fs;
use std::path::Path;

use godwit_model::{Bytes, Dimm, DimmAddress, Growth, LiveChange, Numa, ResolvedSpec};
use godwit_qemu::{GuestAgent, Qmp, Start};
use serde_json::{Value, json};

use crate::devices::complete;
use crate::guest::{run, shell};
use crate::place::{LIMIT, Place, Vm, initramfs_with_agent, launch, launch_with, qemus, spec};
use crate::start::status_field;

fn growing(memory: Bytes, max: Bytes) -> ResolvedSpec {
    let mut spec = ResolvedSpec { memory, growth: Some(Growth::to(max)), ..spec("pc-q35-7.2", &[]) };
    spec.cmdline.push_str(" memhp_default_state=online guest.touch_total=16M guest.working_set=1M guest.dirty=0 guest.check=1M");
    spec
}

/// The DIMM that makes the VM's memory `memory`.
fn dimm_for(spec: &ResolvedSpec, memory: Bytes) -> Dimm {
    let wanted = ResolvedSpec { memory, growth: None, ..spec.clone() };
    spec.growth_to(&wanted).expect("it can grow").expect("more memory")
}

/// Names of the backends that are there.
async fn backends(qmp: &Qmp) -> Vec<String> {
    let objects = qmp.execute("qom-list", json!({"path": "/objects"})).await.expect("objects");
    let names = objects.as_array().into_iter().flatten().filter_map(|object| object["name"].as_str());
    names.filter(|name| name.starts_with("dimm")).map(ToOwned::to_owned).collect()
}

#[tokio::test]
async fn every_version_has_dimms_where_they_are_computed_to_be() {
    for binary in qemus() {
        for ram in [256, 2_815, 2_816, 5_121] {
            let place = Place::new();
            let memory = Bytes::mib(ram);
            let spec = growing(memory, Bytes(16 << 30));
            let vm = launch(&place, &binary, &spec, &[], Start::Fresh).await;
            let backend = json!({"qom-type": "memory-backend-ram", "id": "probe", "size": 128 << 20});
            vm.qmp.execute("object-add", backend).await.expect("a backend");
            let device = json!({"driver": "pc-dimm", "id": "dimm", "memdev": "probe"});
            vm.qmp.execute("device_add", device).await.expect("a DIMM wherever QEMU likes");
            let devices = vm.qmp.execute("query-memory-devices", Value::Null).await.expect("DIMMs");
            let dimm = dimm_for(&spec, Bytes::mib(ram + 128));
            assert_eq!(devices[0]["data"]["addr"], json!(dimm.address.0), "{}, {ram} MiB", binary.display());
        }
    }
}

async fn memory_of(agent: &GuestAgent) -> u64 {
    let outcome = run(agent, &shell("grep MemTotal /proc/meminfo")).await;
    let text = String::from_utf8_lossy(&outcome.stdout.0).into_owned();
    text.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).unwrap_or_else(|| panic!("{text:?} is no size"))
}

async fn agent_of(vm: &Vm) -> GuestAgent {
    let opening = async { while !vm.qmp.query_channel_open("guest-agent").await.expect("asked") {} };
    tokio::time::timeout(LIMIT, opening).await.expect("the agent opens its channel");
    GuestAgent::at(vm.sockets.guest_agent.clone())
}

/// Waits until the guest has brought all of `more` online.
async fn wait_for_memory(agent: &GuestAgent, before: u64, more: Bytes) {
    let growing = async { while memory_of(agent).await < before + (more.get() >> 10) {} };
    tokio::time::timeout(LIMIT, growing).await.expect("the guest takes its memory");
}

async fn grow_and_move(from: &Path, to: &Path) {
    let way = format!("{} -> {}", from.display(), to.display());
    let place = Place::new();
    let initrd = initramfs_with_agent(&place);
    let mut spec = growing(Bytes::mib(256), Bytes::GIB);
    let source = launch_with(&place, from, &spec, &[], Start::Fresh, &initrd).await;
    source.boot().await;
    let agent = agent_of(&source).await;
    let before = memory_of(&agent).await;

    let dimm = dimm_for(&spec, Bytes::mib(512));
    assert!(!source.qmp.has_dimm(&dimm).await.expect("asked"), "{way}");
    source.qmp.plug_dimm(&dimm, &spec.platform, None).await.expect("memory");
    assert!(source.qmp.has_dimm(&dimm).await.expect("asked"), "{way}");
    source.qmp.plug_dimm(&dimm, &spec.platform, None).await.expect_err("it is there");
    assert!(source.qmp.has_dimm(&dimm).await.expect("asked"), "{way}");
    LiveChange::Memory { dimm }.apply(&mut spec);
    let misplaced = Dimm { address: DimmAddress(dimm.address.0 + (128 << 20)), ..dimm_for(&spec, Bytes::mib(640)) };
    source.qmp.plug_dimm(&misplaced, &spec.platform, None).await.expect_err("another DIMM is there");
    assert_eq!(backends(&source.qmp).await, ["dimm0-memory"], "{way}");
    wait_for_memory(&agent, before, dimm.size).await;
    // Linux takes memory above 4 GiB first, where DIMMs are.
    let written = run(&agent, &shell("head -c 8000000 /dev/urandom > /noise && md5sum /noise")).await;
    assert_eq!(written.exit_code, Some(0), "{way}: {}", String::from_utf8_lossy(&written.stderr.0));

    // An old QEMU that emulates loses what is written to a DIMM while it is copied.
    source.qmp.stop(LIMIT).await.expect("stopped");
    agent.close().await;
    let destination = launch_with(&place, to, &spec, &[], Start::Incoming, &initrd).await;
    complete(&source, &destination, &way).await;
    assert!(destination.qmp.has_dimm(&dimm).await.expect("asked"), "{way}");
    let agent = agent_of(&destination).await;
    let read = run(&agent, &shell("md5sum /noise")).await;
    assert_eq!(read.stdout.0, written.stdout.0, "{way}");
    let more = dimm_for(&spec, Bytes::mib(640));
    destination.qmp.plug_dimm(&more, &spec.platform, None).await.expect("more memory after the move");
    wait_for_memory(&agent, before, Bytes::mib(384)).await;
    assert!(destination.log().is_empty(), "{way}: {}", destination.log());
}

#[tokio::test]
async fn memory_comes_while_a_guest_runs_and_moves_to_another_version_with_what_is_in_it() {
    let all = qemus();
    grow_and_move(&all[0], all.last().expect("a QEMU")).await;
}

#[tokio::test]
async fn memory_comes_and_moves_from_the_other_version_too() {
    let all = qemus();
    match &all[..] {
        [here, other] => grow_and_move(other, here).await,
        _ => eprintln!("one version of QEMU: nothing is proven here"),
    }
}

/// Waits until the guest counts `memory` without what is in its balloon.
async fn wait_for_balloon(vm: &Vm, memory: Bytes) {
    let counted = async || vm.qmp.execute("query-balloon", Value::Null).await.expect("a balloon")["actual"].clone();
    let filling = async { while counted().await != json!(memory.get()) {} };
    tokio::time::timeout(LIMIT, filling).await.expect("the guest gives memory, or takes it back");
}

#[tokio::test]
async fn a_balloon_and_what_a_guest_reports_as_free_move_to_the_other_version_and_back() {
    let all = qemus();
    let [here, other] = [&all[0], all.last().expect("a QEMU")];
    let place = Place::new();
    let mut spec = growing(Bytes::mib(256), Bytes::GIB);
    spec.platform.free_page_reporting = true;
    let mut vm = launch(&place, here, &spec, &[], Start::Fresh).await;
    vm.boot().await;
    vm.qmp.execute("balloon", json!({"value": 192 << 20})).await.expect("filled");
    wait_for_balloon(&vm, Bytes::mib(192)).await;
    for to in [other, here] {
        let way = format!("to {}", to.display());
        vm.qmp.stop(LIMIT).await.expect("stopped");
        let next = launch(&place, to, &spec, &[], Start::Incoming).await;
        complete(&vm, &next, &way).await;
        wait_for_balloon(&next, Bytes::mib(192)).await;
        vm = next;
    }
    vm.qmp.execute("balloon", json!({"value": 256 << 20})).await.expect("emptied");
    wait_for_balloon(&vm, Bytes::mib(256)).await;
}

/// How many pieces of at least `size` a process has bound to node 0.
fn bound_pieces(pid: u32, size: Bytes) -> usize {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
    let length = |line: &str| {
        let (from, to) = line.split(' ').next()?.split_once('-')?;
        Some(u64::from_str_radix(to, 16).ok()? - u64::from_str_radix(from, 16).ok()?)
    };
    let large = maps.lines().filter(|line| length(line).is_some_and(|length| length >= size.get()));
    let large: Vec<&str> = large.filter_map(|line| line.split('-').next()).collect();
    let policies = fs::read_to_string(format!("/proc/{pid}/numa_maps")).expect("policies");
    let of =
        |address: &str| policies.lines().find(|line| line.trim_start_matches('0').starts_with(address.trim_start_matches('0')));
    large.into_iter().filter(|address| of(address).is_some_and(|line| line.contains(" bind:0"))).count()
}

#[tokio::test]
async fn a_vm_is_bound_to_a_memory_node_and_moves_to_and_from_hosts_where_it_is_not() {
    let all = qemus();
    for (from, to) in [(&all[0], all.last().expect("a QEMU")), (all.last().expect("a QEMU"), &all[0])] {
        let way = format!("{} -> {}", from.display(), to.display());
        let place = Place::new();
        let mut free = growing(Bytes::mib(256), Bytes::GIB);
        let mut bound = free.clone();
        bound.platform.numa = Numa::OneNode;
        let source = launch(&place, from, &bound, &[], Start::Fresh).await;
        let pid = source.process.identity().pid;
        assert_eq!(bound_pieces(pid, Bytes::mib(256)), 1, "{way}");
        assert_eq!(status_field(pid, "Cpus_allowed_list"), "0", "{way}");
        source.boot().await;
        let dimm = dimm_for(&bound, Bytes::mib(512));
        source.qmp.plug_dimm(&dimm, &bound.platform, Some(0)).await.expect("memory");
        assert_eq!(bound_pieces(pid, Bytes::mib(256)), 2, "{way}");
        [&mut free, &mut bound].into_iter().for_each(|spec| LiveChange::Memory { dimm }.apply(spec));
        source.qmp.stop(LIMIT).await.expect("stopped");
        let middle = launch(&place, to, &free, &[], Start::Incoming).await;
        assert_eq!(bound_pieces(middle.process.identity().pid, Bytes::mib(256)), 0, "{way}");
        complete(&source, &middle, &way).await;
        middle.qmp.stop(LIMIT).await.expect("stopped");
        let back = launch(&place, from, &bound, &[], Start::Incoming).await;
        assert_eq!(bound_pieces(back.process.identity().pid, Bytes::mib(256)), 2, "{way}");
        complete(&middle, &back, &way).await;
    }
}
