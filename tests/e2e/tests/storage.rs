//! Disks that are not what they should be, and a store without space.

use std::fs;

use anyhow::{Context, Result, ensure};
use godwit_api::v1::{TaskState, TeamCreate, VmDelete};
use godwit_e2e::command::{self, text};
use godwit_e2e::faults::disk;
use godwit_e2e::{Cluster, ClusterSpec, GuestSpec};
use godwit_model::{Bytes, DiskFormat, DiskSpec, ErrorCode, Name};

fn disk(volume: &str, format: DiskFormat, size: Option<Bytes>) -> Result<DiskSpec> {
    Ok(DiskSpec { size, ..DiskSpec::new(format!("shared/{volume}").parse()?, format) })
}

/// Tries to start a VM with the disk; it must be refused, and the VM must be gone without a trace afterwards.
fn refused(cluster: &mut Cluster, proves: &str, disk: DiskSpec, code: ErrorCode) -> Result<()> {
    let name = disk.volume.volume.to_string();
    let vm = cluster.create(&GuestSpec::small(&name).disk(disk)).context(proves.to_owned())?;
    let refusal = match cluster.begin_start(&name, "h1") {
        Err(refusal) => refusal,
        Ok(task) => {
            let task = cluster.ended(task, std::time::Duration::from_secs(60))?;
            ensure!(task.state == TaskState::Failed, "{proves}: it ended {:?}", task.state);
            task.error.context("a failed task says why")?
        }
    };
    ensure!(refusal.code == code, "{proves}: {refusal:?}");
    ensure!(refusal.hint.is_some() && refusal.message.contains(&name), "{proves}: no fix, or not which disk: {refusal:?}");
    cluster.check().context(proves.to_owned())?;
    let deletion = cluster.ask(cluster.client().delete_vm(&vm.name, &VmDelete { volumes: false }))?;
    cluster.done(deletion.id, std::time::Duration::from_secs(30))?;
    Ok(())
}

#[test]
fn a_disk_that_is_missing_truncated_no_image_or_of_another_format_keeps_its_vm_from_starting() -> Result<()> {
    let mut cluster = ClusterSpec::new(1)?.up()?;
    let volumes = cluster.lab().shared_pool()?.join("volumes");
    fs::create_dir_all(&volumes)?;
    let at = |name: &str| volumes.join(name);
    use ErrorCode::{VolumeFormat, VolumeMissing, VolumeTruncated};

    refused(&mut cluster, "a missing disk", disk("missing", DiskFormat::Raw, None)?, VolumeMissing)?;

    fs::write(at("empty"), "")?;
    refused(&mut cluster, "an empty disk", disk("empty", DiskFormat::Raw, None)?, VolumeTruncated)?;

    fs::write(at("short"), vec![0; 1 << 20])?;
    refused(&mut cluster, "a disk shorter than declared", disk("short", DiskFormat::Raw, Some(Bytes::mib(2)))?, VolumeTruncated)?;

    command::run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", text(&at("cut"))?, "64M"])?;
    fs::OpenOptions::new().write(true).open(at("cut"))?.set_len(70_000)?;
    refused(&mut cluster, "a truncated qcow2", disk("cut", DiskFormat::Qcow2, None)?, VolumeTruncated)?;

    fs::write(at("text"), "this is no disk\n".repeat(64))?;
    refused(&mut cluster, "a text declared qcow2", disk("text", DiskFormat::Qcow2, None)?, VolumeFormat)?;

    command::run("qemu-img", &["create", "-q", "-f", "qcow2", text(&at("other"))?, "64M"])?;
    refused(&mut cluster, "a qcow2 declared raw", disk("other", DiskFormat::Raw, None)?, VolumeFormat)?;

    command::run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", text(&at("other"))?, "-F", "qcow2", text(&at("overlay"))?])?;
    refused(&mut cluster, "a qcow2 that refers to another file", disk("overlay", DiskFormat::Qcow2, None)?, VolumeFormat)?;

    // The same VM with a good disk starts.
    cluster.boot(&GuestSpec::small("good").disk(disk("other", DiskFormat::Qcow2, None)?), "h1")?;
    cluster.finish()
}

#[test]
fn a_controller_whose_disk_is_full_refuses_changes_loses_nothing_and_goes_on_when_there_is_space() -> Result<()> {
    let mut cluster = ClusterSpec::new(2)?.up()?;
    let data = cluster.lab().api()?.token_file.parent().context("the token is in the controller's data")?.to_owned();
    cluster.lab().controller().crash()?;
    disk::make_small(&data)?;
    cluster.lab().controller().spawn()?;
    for host in ["h1", "h2"] {
        cluster.wait_connected(host, true)?;
    }
    cluster.boot(&GuestSpec::small("web"), "h1")?;
    cluster.expect_log("store");
    cluster.expect_log("full");

    disk::fill(&data)?;
    let mut acknowledged = Vec::new();
    let refusal = loop {
        let name = Name::new(format!("team{}", acknowledged.len()))?;
        match cluster.ask(cluster.client().create_team(&TeamCreate { name: name.clone(), share_memory: false })) {
            Ok(_) => acknowledged.push(name),
            Err(refusal) => break refusal,
        }
        ensure!(acknowledged.len() < 20_000, "the store never gets full");
    };
    ensure!(refusal.code == ErrorCode::StoreFull && refusal.hint.is_some(), "{refusal:?}");
    let move_refused = cluster.begin_move("web", "h2", Default::default()).err().context("a migration began without a record")?;
    ensure!(move_refused.code == ErrorCode::StoreFull, "{move_refused:?}");
    cluster.check()?;

    disk::unfill(&data)?;
    let teams = cluster.ask(cluster.client().teams())?;
    for name in &acknowledged {
        ensure!(teams.iter().any(|team| team.name == *name), "{name} was acknowledged and is lost");
    }
    ensure!(teams.len() <= acknowledged.len() + 1, "{} teams are there, {} were acknowledged", teams.len(), acknowledged.len());
    cluster.ask(cluster.client().create_team(&TeamCreate { name: Name::new("after")?, share_memory: false }))?;
    cluster.migrate("web", "h2")?;
    cluster.finish()
}
