//! VMs whose disks no other host sees.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_api::v1::{VmDelete, VmStop};
use godwit_e2e::{Action, Cluster, ClusterSpec, Ending, GuestSpec, Party, other_qemu};
use godwit_model::{Bytes, BytesPerSec, DiskFormat, DiskSpec, ErrorCode, MigrationFigures, MigrationPhase, MigrationPolicy, Name};

const MIB: u64 = 1 << 20;

fn disk(volume: &str, format: DiskFormat, mib: u64) -> Result<DiskSpec> {
    Ok(DiskSpec { size: Some(Bytes::mib(mib)), ..DiskSpec::new(volume.parse()?, format) })
}

/// A guest that writes to its disks and knows what is on them.
fn busy(name: &str) -> GuestSpec {
    GuestSpec::small(name).knob("disk=24M").knob("disk_dirty=512K")
}

fn moved(cluster: &mut Cluster, vm: &str, to: &str) -> Result<MigrationFigures> {
    let figures = cluster.migrate(vm, to)?.figures.context("figures")?;
    eprintln!("to {to}: {figures:?}");
    cluster.check()?;
    Ok(figures)
}

fn local(cluster: &Cluster, host: &str, path: &str) -> Result<PathBuf> {
    Ok(cluster.lab().local_pool(host)?.join(path))
}

/// Whether the disk is whole, and what it takes of its file system.
fn allocated(path: &Path, format: &str) -> Result<u64> {
    if format == "qcow2" {
        let check = Command::new("qemu-img").args(["check", "-q", "-f", format]).arg(path).output()?;
        ensure!(check.status.success(), "{}: {check:?}", path.display());
    }
    Ok(std::os::unix::fs::MetadataExt::blocks(&path.metadata()?) * 512)
}

/// Out, on, and home: a disk of each format, and one that all hosts share.
fn there_and_back(qemu_of_h2: Option<&Path>) -> Result<()> {
    let mut spec = ClusterSpec::new(2)?;
    if let Some(qemu) = qemu_of_h2 {
        spec = spec.qemu("h2", qemu);
    }
    let mut cluster = spec.up()?;
    let guest = busy("web")
        .disk(disk("local/root", DiskFormat::Qcow2, 64)?)
        .disk(disk("local/data", DiskFormat::Raw, 64)?)
        .disk(disk("shared/logs", DiskFormat::Raw, 64)?);
    cluster.boot(&guest, if qemu_of_h2.is_some() { "h2" } else { "h1" })?;
    let hosts = if qemu_of_h2.is_some() { ["h1", "h2"] } else { ["h2", "h1"] };
    let out = moved(&mut cluster, "web", hosts[0])?;
    ensure!((48 * MIB..60 * MIB).contains(&out.disk_bytes.get()), "two disks of 24 MiB of noise: {out:?}");
    for (volume, format) in [("root", "qcow2"), ("data", "raw")] {
        let (spare, here) = (format!("spares/{volume}~spare"), format!("volumes/{volume}"));
        ensure!(!local(&cluster, hosts[1], &here)?.exists(), "{volume} is still a volume where it was");
        ensure!(local(&cluster, hosts[1], &spare)?.exists(), "nothing is left of {volume}");
        // The VM that writes to it holds its lock: its size says that it is as thin as it was.
        let there = local(&cluster, hosts[0], &here)?;
        let taken = std::os::unix::fs::MetadataExt::blocks(&there.metadata()?) * 512;
        ensure!(taken < 30 * MIB, "{format}: {taken} bytes for 24 MiB");
    }
    let status = cluster.status("web")?;
    ensure!(status.disk_checked > 0 && status.disk_written > 0, "{status:?}");
    let home = moved(&mut cluster, "web", hosts[1])?;
    // Half a MiB a second on each of two, for as long as it was away, in pieces of 64 KiB.
    ensure!(home.disk_bytes.get() * 2 < out.disk_bytes.get(), "home {}, out {}", home.disk_bytes, out.disk_bytes);
    cluster.run(&[Action::Pass(Duration::from_secs(2))])?;
    cluster.check()?;
    let stop = cluster.ask(cluster.client().stop_vm(&Name::new("web")?, &VmStop::default())).context("stop")?.id;
    cluster.done(stop, Duration::from_secs(90))?;
    for (volume, format) in [("root", "qcow2"), ("data", "raw")] {
        allocated(&local(&cluster, hosts[1], &format!("volumes/{volume}"))?, format)?;
    }
    // It starts where its disks are, and nowhere else.
    let elsewhere = cluster.begin_start("web", hosts[0]).err().context("started without its disks")?;
    ensure!(elsewhere.code == ErrorCode::PoolUnavailable && elsewhere.hint.is_some(), "{elsewhere:?}");
    let delete = VmDelete { volumes: true };
    let delete = cluster.ask(cluster.client().delete_vm(&Name::new("web")?, &delete)).context("delete")?.id;
    cluster.done(delete, Duration::from_secs(60))?;
    for (host, kind) in hosts.into_iter().flat_map(|host| ["volumes", "spares", "arriving"].map(|kind| (host, kind))) {
        let left: Vec<_> = std::fs::read_dir(local(&cluster, host, kind)?).into_iter().flatten().flatten().collect();
        ensure!(left.is_empty(), "{left:?} is left of the VM on {host}");
    }
    cluster.finish()
}

#[test]
fn a_vm_takes_its_disks_along_and_brings_home_what_has_changed() -> Result<()> {
    there_and_back(None)
}

#[test]
fn disks_travel_between_versions_of_qemu() -> Result<()> {
    match other_qemu() {
        Some(other) => there_and_back(Some(&other)),
        None => {
            eprintln!("GODWIT_QEMU_OTHER is not set: nothing is proven here");
            Ok(())
        }
    }
}

#[test]
fn a_move_that_is_given_up_leaves_the_disks_where_they_were_and_the_next_sends_the_rest() -> Result<()> {
    let mut cluster = ClusterSpec::new(2)?.up()?;
    cluster.boot(&busy("web").knob("disk=48M").knob("disk_dirty=8K").disk(disk("local/data", DiskFormat::Raw, 64)?), "h1")?;
    let slow = MigrationPolicy { bandwidth: Some(BytesPerSec(8_000_000)), ..MigrationPolicy::default() };
    let task = cluster.begin_move("web", "h2", slow)?;
    cluster.wait_progress(task, |progress| progress.phase == MigrationPhase::Disks && progress.remaining < Bytes::mib(40))?;
    cluster.run(&[Action::Cancel("web"), Action::Ends("web", Ending::Cancelled("h1"))])?;
    ensure!(local(&cluster, "h1", "volumes/data")?.exists() && !local(&cluster, "h2", "volumes/data")?.exists());
    let figures = moved(&mut cluster, "web", "h2")?;
    ensure!(figures.disk_bytes < Bytes::mib(40), "what was there was sent again: {figures:?}");
    cluster.finish()
}

#[test]
fn agents_that_are_killed_while_disks_are_copied_go_on_with_them() -> Result<()> {
    let mut cluster = ClusterSpec::new(2)?.up()?;
    cluster.boot(&busy("web").knob("disk=48M").knob("disk_dirty=8K").disk(disk("local/data", DiskFormat::Raw, 64)?), "h1")?;
    let slow = MigrationPolicy { bandwidth: Some(BytesPerSec(4_000_000)), ..MigrationPolicy::default() };
    let task = cluster.begin_move("web", "h2", slow)?;
    cluster.wait_progress(task, |progress| progress.phase == MigrationPhase::Disks && progress.remaining < Bytes::mib(44))?;
    for host in ["h1", "h2"] {
        let agent = Party::Agent(host);
        cluster.run(&[Action::Kill(agent), Action::Pass(Duration::from_secs(1)), Action::Restart(agent)])?;
    }
    cluster.run(&[Action::Ends("web", Ending::Moved("h2"))])?;
    let figures = cluster.done(task, Duration::from_secs(60))?.figures.context("figures")?;
    ensure!(figures.disk_bytes < Bytes::mib(56), "what was there was sent again: {figures:?}");
    cluster.check()?;
    cluster.finish()
}
