//! What a VM's memory is made of, and what of it its guest has given back.

use std::fs::{self, File};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit_e2e::{Cluster, ClusterSpec, GuestSpec, other_qemu};
use godwit_model::{Bytes, ErrorCode, HugePages, MigrationPolicy, Name, Numa, PostCopy};
use rustix::fs::{FlockOperation, flock};

const SOON: Duration = Duration::from_secs(60);

/// A line of `/proc/PID/smaps_rollup` of the VM's QEMU on `host`, in MiB.
fn taken(cluster: &Cluster, vm: &str, host: &str, line: &str) -> Result<u64> {
    let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", cluster.qemu(vm, host)?))?;
    let found = rollup.lines().find_map(|found| found.strip_prefix(line)?.trim().strip_suffix(" kB"));
    Ok(found.with_context(|| format!("no {line}"))?.trim().parse::<u64>()? >> 10)
}

/// Waits until `holds`.
fn wait(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while !holds()? {
        ensure!(Instant::now() < deadline, "not within {SOON:?}: {what}");
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

#[test]
fn what_a_guest_has_freed_is_its_hosts_again_and_does_not_travel() -> Result<()> {
    let spec = ClusterSpec::new(2)?;
    let mut cluster = other_qemu().iter().fold(spec, |spec, qemu| spec.qemu("h2", qemu)).up()?;
    cluster.import_guest_with_agent()?;
    let [gives, keeps] = ["gives", "keeps"].map(|name| GuestSpec::idle(name).memory(Bytes::mib(256)));
    cluster.boot(&gives, "h1")?;
    cluster.boot(&keeps.shape(|spec| spec.free_page_reporting = Some(false)), "h1")?;
    for vm in ["gives", "keeps"] {
        let name = Name::new(vm)?;
        wait("the guest's agent answers", || Ok(cluster.ask(cluster.client().vm(&name))?.status.guest.is_some()))?;
        cluster.shell(vm, "dd if=/dev/urandom of=/noise bs=1048576 count=64 && rm /noise")?;
    }
    let kept = taken(&cluster, "keeps", "h1", "Rss:")?;
    let given_back = || Ok(taken(&cluster, "gives", "h1", "Rss:")? + 48 < kept);
    wait("the guest gives 64 MiB back", given_back)?;
    let mut moved = |vm: &str, to: &str| -> Result<u64> {
        let figures = cluster.migrate(vm, to)?.figures.context("figures")?;
        cluster.check()?;
        eprintln!("{vm} to {to}: {figures:?}");
        Ok(figures.wire_bytes.get() >> 20)
    };
    for to in ["h2", "h1"] {
        let (gave, kept) = (moved("gives", to)?, moved("keeps", to)?);
        // The way home sends of neither what is there.
        ensure!(to == "h1" || gave + 48 < kept, "{gave} MiB after 64 MiB were given back, {kept} without");
    }
    // It still gives, where it is now.
    let before = taken(&cluster, "gives", "h1", "Rss:")?;
    cluster.shell("gives", "dd if=/dev/urandom of=/noise bs=1048576 count=64")?;
    let full = taken(&cluster, "gives", "h1", "Rss:")?;
    ensure!(full > before + 32, "{before} MiB, then {full} with 64 MiB more");
    cluster.shell("gives", "rm /noise")?;
    wait("the guest gives after its moves", || Ok(taken(&cluster, "gives", "h1", "Rss:")? + 32 < full))?;
    cluster.finish()
}

/// Huge pages that this machine has for as long as this lives; those who want some take turns. The file says how many there were before: who was
/// killed could not put them back, and the next one does.
struct HugePagesHere {
    before: u64,
    turn: File,
}

const TURN: &str = "/run/godwit-e2e-hugepages";
const COUNT: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl HugePagesHere {
    fn set_aside(more: u64) -> Result<Self> {
        let turn = File::options().create(true).truncate(false).read(true).write(true).open(TURN)?;
        flock(&turn, FlockOperation::LockExclusive)?;
        let count = || -> Result<u64> { Ok(fs::read_to_string(COUNT)?.trim().parse()?) };
        let before = fs::read_to_string(TURN)?.trim().parse().or_else(|_| count())?;
        fs::write(TURN, before.to_string())?;
        let here = Self { before, turn };
        fs::write(COUNT, (here.before + more).to_string())?;
        ensure!(count()? >= here.before + more, "this machine has no {more} huge pages");
        Ok(here)
    }
}

impl Drop for HugePagesHere {
    fn drop(&mut self) {
        if fs::write(COUNT, self.before.to_string()).is_ok() {
            let _ = self.turn.set_len(0);
        }
    }
}

/// Whether the QEMU on PATH is one that, emulating, needs RAM of a size which huge pages cannot make up.
fn is_old() -> bool {
    let asked = Command::new("qemu-system-x86_64").arg("--version").output();
    asked.is_ok_and(|answer| String::from_utf8_lossy(&answer.stdout).contains("version 7."))
}

#[test]
fn a_vm_of_huge_pages_on_one_node_moves_there_and_back() -> Result<()> {
    // Of 256 MiB on either host.
    let _pages = HugePagesHere::set_aside(256)?;
    let spec = ClusterSpec::new(2)?;
    let modern = other_qemu().filter(|_| is_old());
    if is_old() && modern.is_none() {
        eprintln!("there is no other QEMU than an old one that emulates: nothing is proven here");
        return Ok(());
    }
    let mut cluster = modern.iter().fold(spec, |spec, qemu| spec.qemu("h1", qemu).qemu("h2", qemu)).up()?;
    let guest = GuestSpec::small("web").memory(Bytes::mib(256)).vcpus(2).shape(|spec| {
        (spec.hugepages, spec.numa) = (Some(HugePages::Mib2), Numa::OneNode);
    });
    cluster.boot(&guest, "h1")?;
    for to in ["h2", "h1"] {
        let figures = cluster.migrate("web", to)?.figures.context("figures")?;
        eprintln!("to {to}: {figures:?}");
        let huge = taken(&cluster, "web", to, "Shared_Hugetlb:")? + taken(&cluster, "web", to, "Private_Hugetlb:")?;
        ensure!(huge == 256, "{huge} of 256 MiB are huge pages on {to}");
        cluster.check()?;
    }
    let now = MigrationPolicy { postcopy: PostCopy::Now, ..MigrationPolicy::default() };
    let refusal = cluster.begin_move("web", "h2", now).err().context("huge pages cannot come one by one")?;
    ensure!(refusal.code == ErrorCode::UserfaultUnavailable && refusal.hint.is_some(), "{refusal:?}");
    cluster.finish()
}
