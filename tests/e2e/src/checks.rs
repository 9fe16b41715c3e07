//! What must hold after every action.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use godwit_api::v1::Vm;
use godwit_lab::HostStatus;
use godwit_lab::layout::{RUN_ROOT, STATE_ROOT};
use godwit_model::RunState;

use crate::Cluster;
use crate::processes::{self, ProcessRole};

/// How long the cluster may take to clear up behind a task.
const CLEARING: Duration = Duration::from_secs(20);

/// No VM was ever heard from two runners.
pub(crate) fn no_second_runner(cluster: &Cluster) -> Result<()> {
    let log = cluster.witness().log();
    for (id, vm) in log.vms() {
        ensure!(vm.interleaved == 0, "{id} ran twice: {} of {} records interleave", vm.interleaved, vm.records);
        ensure!(vm.reboots == cluster.reboots(id), "{id} was booted again: {} times", vm.reboots);
    }
    Ok(())
}

/// Every guest that should run answers, and found its memory as it was written.
pub(crate) fn guests_are_whole(cluster: &Cluster) -> Result<()> {
    let Some(vms) = cluster.ask_briefly(cluster.client().vms()) else {
        // The controller is away; the guests are not.
        return cluster.guests().try_for_each(|guest| whole(cluster, guest.name.as_str()));
    };
    vms.iter().filter(|vm| vm.status.state == RunState::Running).try_for_each(|vm| whole(cluster, vm.name.as_str()))
}

fn whole(cluster: &Cluster, vm: &str) -> Result<()> {
    if cluster.guest(vm).is_err() {
        return Ok(());
    }
    let status = cluster.status(vm)?;
    ensure!(status.page_errors == 0, "{vm} found {} wrong pages of {} checked", status.page_errors, status.pages_checked);
    ensure!(status.disk_errors == 0, "{vm} found {} wrong blocks of {} checked", status.disk_errors, status.disk_checked);
    Ok(())
}

/// Where no task runs and all hosts are there: every running VM has one QEMU, on its host, with its taps; and nothing else is there.
pub(crate) fn nothing_is_left(cluster: &Cluster) -> Result<()> {
    let deadline = Instant::now() + CLEARING;
    loop {
        let Some(tasks) = cluster.ask_briefly(cluster.client().tasks()) else { return Ok(()) };
        let Some(vms) = cluster.ask_briefly(cluster.client().vms()) else { return Ok(()) };
        let Some(hosts) = cluster.ask_briefly(cluster.client().hosts()) else { return Ok(()) };
        if tasks.iter().any(|task| !task.state.ended()) || hosts.iter().any(|host| !host.connected) {
            return Ok(());
        }
        let left: Vec<String> =
            cluster.lab_status()?.hosts.iter().map(|host| differences(cluster, host, &vms)).collect::<Result<Vec<_>>>()?.concat();
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("after {CLEARING:?} without a task: {}", left.join("; "));
        }
        // Clearing up is told to nobody: this is the interval of looking.
        thread::sleep(Duration::from_millis(200));
    }
}

/// What is on a host and should not be, and the other way round.
fn differences(cluster: &Cluster, host: &HostStatus, vms: &[Vm]) -> Result<Vec<String>> {
    let here = |vm: &&Vm| {
        let lives = matches!(vm.status.state, RunState::Running | RunState::Paused);
        lives && vm.status.host.as_ref().is_some_and(|name| name.as_str() == host.name)
    };
    let mut found = Vec::new();
    let mut missing: BTreeMap<_, _> = vms.iter().filter(here).map(|vm| (vm.id, vm)).collect();
    let mut tpms: BTreeMap<_, _> = vms.iter().filter(here).filter(|vm| vm.spec.tpm.is_some()).map(|vm| (vm.id, vm)).collect();
    let expected_taps: usize = missing.values().map(|vm| vm.spec.nics.len()).sum();
    for process in processes::of_host(host)? {
        let known = match &process.role {
            ProcessRole::Qemu(vm) => missing.remove(vm).is_some(),
            ProcessRole::Tpm(vm) => tpms.remove(vm).is_some(),
            ProcessRole::Carry(_) | ProcessRole::Other(_) => false,
        };
        if !known {
            found.push(format!("{}: process {process:?} belongs to nothing", host.name));
        }
    }
    found.extend(missing.values().map(|vm| format!("{}: no QEMU of {}", host.name, vm.name)));
    found.extend(tpms.values().map(|vm| format!("{}: no TPM of {}", host.name, vm.name)));
    let taps = processes::taps(host)?;
    if taps.len() != expected_taps {
        found.push(format!("{}: taps {taps:?}, expected {expected_taps}", host.name));
    }
    let run = Path::new(RUN_ROOT).join(cluster.lab().name()).join(&host.name);
    for entry in names_in(&run) {
        let sockets = names_in(&run.join(&entry));
        let of_a_vm = entry.len() >= 8 && entry.bytes().all(|byte| byte.is_ascii_hexdigit());
        let expected = vms.iter().filter(here).any(|vm| processes::names(&entry, vm.id));
        let left = if entry == "carry" { !sockets.is_empty() } else { of_a_vm && !expected };
        if left {
            found.push(format!("{}: {}/{entry} is left: {sockets:?}", host.name, run.display()));
        }
    }
    Ok(found)
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Everything on this machine that shows the name of a lab.
pub(crate) fn traces(lab: &str) -> Vec<String> {
    let mut candidates = Vec::new();
    for root in [RUN_ROOT, STATE_ROOT] {
        candidates.push(Path::new(root).join(lab));
        candidates.push(Path::new(root).join(format!("{lab}.lock")));
    }
    candidates.push(Path::new("/sys/fs/cgroup").join(format!("godwit-lab-{lab}")));
    for hierarchy in names_in(Path::new("/sys/fs/cgroup")) {
        candidates.push(Path::new("/sys/fs/cgroup").join(hierarchy).join(format!("godwit-lab-{lab}")));
    }
    let mut found: Vec<String> =
        candidates.iter().filter(|path| path.symlink_metadata().is_ok()).map(|path| path.display().to_string()).collect();
    found.extend(names_in(Path::new("/run/netns")).into_iter().filter(|name| name.starts_with(&format!("gw-{lab}-"))));
    for pid in names_in(Path::new("/proc")) {
        let line = fs::read(Path::new("/proc").join(&pid).join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(&format!("/{lab}/")) {
            found.push(format!("process {pid}: {line}"));
        }
    }
    found
}
