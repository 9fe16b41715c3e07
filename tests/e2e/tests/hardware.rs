//! What a VM is made of, before and after a move: firmware with its variables, media, sizes and interfaces that change while it runs.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit_api::v1::Waiting;
use godwit_e2e::{Cluster, ClusterSpec, GuestSpec, other_qemu};
use godwit_model::{
    Boot, Bytes, CdromSpec, DiskBus, DiskFormat, DiskSpec, ErrorCode, Firmware, ImportFormat, IoLimits, MigrationPolicy, Name,
    NicSpec, Refusal, TaskId, VmSpec, Watchdog,
};

const SOON: Duration = Duration::from_secs(60);

/// The content of a CD-ROM, as far as anybody looks.
fn disc(fill: u8) -> Vec<u8> {
    let mut content = vec![fill; 64 << 10];
    content[16 * 2_048 + 1..16 * 2_048 + 6].copy_from_slice(b"CD001");
    content
}

fn web() -> Result<Name> {
    Ok(Name::new("web")?)
}

/// Changes the VM's spec.
fn begin_set(cluster: &Cluster, change: impl Fn(&mut VmSpec)) -> Result<TaskId> {
    let vm = cluster.ask(cluster.client().vm(&web()?))?;
    let mut spec = vm.spec;
    change(&mut spec);
    Ok(cluster.ask(cluster.client().set_vm(&web()?, &spec, Some(vm.revision)))?.id)
}

/// Changes the VM's spec and waits until what can change has.
fn set(cluster: &Cluster, change: impl Fn(&mut VmSpec)) -> Result<()> {
    cluster.done(begin_set(cluster, change)?, SOON).map(drop)
}

/// What waits for the next start.
fn waiting(cluster: &Cluster) -> Result<Vec<String>> {
    let status = cluster.ask(cluster.client().vm(&web()?))?.status;
    Ok(status.waiting.into_iter().map(|waiting| waiting.field).collect())
}

/// Whether the VM's QEMU on `host` has the image of this name open.
fn holds(cluster: &Cluster, host: &str, image: &str) -> Result<bool> {
    let digest = cluster.ask(cluster.client().image(&Name::new(image)?))?.digest;
    has_open(cluster, host, &digest)
}

/// Whether the VM's QEMU on `host` has a file with this end of its path open.
fn has_open(cluster: &Cluster, host: &str, end: &str) -> Result<bool> {
    let links = fs::read_dir(format!("/proc/{}/fd", cluster.qemu("web", host)?))?
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok());
    Ok(links.map(|link| link.to_string_lossy().into_owned()).any(|link| link.ends_with(end)))
}

fn volume(cluster: &Cluster, name: &str) -> Result<PathBuf> {
    Ok(cluster.lab().shared_pool()?.join("volumes").join(name))
}

#[test]
fn a_uefi_vm_moves_with_its_variables_and_changes_on_either_side_of_the_move() -> Result<()> {
    let mut cluster = ClusterSpec::new(2)?.up()?;
    for (name, fill) in [("disc-a", 1), ("disc-b", 2)] {
        cluster.import(&Name::new(name)?, ImportFormat::Iso, disc(fill))?;
    }
    let no_disc = cluster.import(&Name::new("no-disc")?, ImportFormat::Iso, vec![0; 64 << 10]);
    ensure!(no_disc.is_err_and(|refusal| refusal.code == ErrorCode::ImageInvalid), "zeros are no CD-ROM");
    let disk = |name: &str, format| -> Result<DiskSpec> {
        Ok(DiskSpec { size: Some(Bytes::mib(64)), ..DiskSpec::new(format!("shared/{name}").parse()?, format) })
    };
    let second = DiskSpec { bus: DiskBus::Scsi, ..disk("data", DiskFormat::Raw)? };
    let guest = GuestSpec::small("web").memory(Bytes::mib(256)).disk(disk("root", DiskFormat::Qcow2)?).disk(second).shape(|spec| {
        spec.firmware = Firmware::Uefi { variables: "shared/web-efi".parse().expect("a volume"), secure_boot: false };
        spec.cdroms = vec![CdromSpec { image: Some(Name::new("disc-a").expect("a name")) }, CdromSpec::default()];
        spec.tablet = true;
        spec.watchdog = Some(Watchdog::default());
    });
    cluster.boot(&guest, "h1")?;
    let variables = volume(&cluster, "web-efi")?;
    let written = fs::read(&variables)?;
    ensure!(written != fs::read("/usr/share/OVMF/OVMF_VARS_4M.fd")?, "the firmware wrote no variables");
    ensure!(holds(&cluster, "h1", "disc-a")?, "the drive is empty");

    // Before the move: another disc, a larger disk, a limit, one interface more. Memory has to wait.
    set(&cluster, |spec| {
        spec.cdroms[0].image = None;
        spec.cdroms[1].image = Some(Name::new("disc-b").expect("a name"));
        spec.disks[1].size = Some(Bytes::mib(96));
        spec.disks[0].io_limits = IoLimits { iops: Some(2_000), ..IoLimits::default() };
        spec.nics.push(NicSpec::new(Name::new("default").expect("a name")));
        spec.memory = Bytes::mib(320);
    })?;
    ensure!(!holds(&cluster, "h1", "disc-a")? && holds(&cluster, "h1", "disc-b")?, "the disc was not changed");
    ensure!(fs::metadata(volume(&cluster, "data")?)?.len() == 96 << 20, "the disk did not grow");
    ensure!(waiting(&cluster)? == ["memory"], "{:?}", waiting(&cluster)?);
    let vm = cluster.ask(cluster.client().vm(&web()?))?;
    ensure!(vm.spec.nics[1].slot == Some(8), "{:?}", vm.spec.nics);
    let extra = disk("extra", DiskFormat::Raw)?;
    set(&cluster, |spec| spec.disks.push(extra.clone()))?;
    ensure!(has_open(&cluster, "h1", "/volumes/extra")?, "the disk was not put in");
    ensure!(waiting(&cluster)? == ["memory"], "{:?}", waiting(&cluster)?);
    cluster.check()?;

    cluster.migrate("web", "h2")?;
    ensure!(has_open(&cluster, "h2", "/volumes/extra")?, "the new disk did not come along");
    ensure!(holds(&cluster, "h2", "disc-b")?, "the disc did not come along");
    ensure!(fs::read(&variables)? == written, "the variables changed on the way");

    // After it: the disc out, the interface out, a stale change refused.
    set(&cluster, |spec| {
        spec.cdroms[1].image = None;
        spec.nics.truncate(1);
        spec.disks.truncate(2);
    })?;
    ensure!(!has_open(&cluster, "h2", "/volumes/extra")?, "the disk was not taken out");
    ensure!(volume(&cluster, "extra")?.exists(), "its volume went with it");
    ensure!(!holds(&cluster, "h2", "disc-b")?, "the disc is still there");
    let stale = cluster.ask(cluster.client().set_vm(&web()?, &vm.spec, Some(vm.revision)));
    ensure!(stale.is_err_and(|refusal: Refusal| refusal.code == ErrorCode::RevisionConflict), "a stale change was made");
    cluster.migrate("web", "h1")?;
    ensure!(fs::read(&variables)? == written, "the variables changed on the way back");
    ensure!(waiting(&cluster)? == ["memory"], "{:?}", waiting(&cluster)?);
    cluster.finish()
}

#[test]
fn what_a_host_lacks_or_a_running_vm_needs_is_refused_with_its_fix() -> Result<()> {
    let mut cluster = ClusterSpec::new(1)?.up()?;
    let disk = DiskSpec { size: Some(Bytes::mib(16)), ..DiskSpec::new("shared/root".parse()?, DiskFormat::Raw) };
    cluster.boot(&GuestSpec::small("web").disk(disk), "h1")?;
    let vm = cluster.ask(cluster.client().vm(&web()?))?;
    let attempt = |change: fn(&mut VmSpec)| {
        let mut spec = vm.spec.clone();
        change(&mut spec);
        cluster.ask(cluster.client().set_vm(&vm.name, &spec, None)).map(|task| task.id)
    };
    type Case = (&'static str, ErrorCode, fn(&mut VmSpec));
    let cases: [Case; 5] = [
        ("a disk that a running VM uses is taken out", ErrorCode::VmRunning, |spec| spec.disks.clear()),
        ("an interface on the root bus is taken out", ErrorCode::VmRunning, |spec| spec.nics.clear()),
        ("a disk becomes smaller", ErrorCode::SpecInvalid, |spec| spec.disks[0].size = Some(Bytes::MIB)),
        ("NVMe", ErrorCode::SpecInvalid, |spec| spec.disks[0].bus = DiskBus::Nvme),
        ("a medium that does not exist", ErrorCode::NotFound, |spec| {
            spec.cdroms = vec![CdromSpec { image: Some(Name::new("nothing").expect("a name")) }];
        }),
    ];
    for (what, code, change) in cases {
        let refusal = attempt(change).err().with_context(|| format!("accepted: {what}"))?;
        ensure!(refusal.code == code && refusal.hint.is_some(), "{what}: {refusal:?}");
    }
    let after = cluster.ask(cluster.client().vm(&vm.name))?;
    ensure!(after.spec == vm.spec, "a refused change was made");
    cluster.finish()
}

/// Waits until the guest counts this much more memory than `before`, in MiB, and gives back what it counts.
fn memory(cluster: &Cluster, before: u64, more: u64) -> Result<u64> {
    let deadline = Instant::now() + SOON;
    loop {
        let text = cluster.shell("web", "grep MemTotal /proc/meminfo")?;
        let total: u64 = text.split_whitespace().nth(1).context("no size")?.parse::<u64>()? >> 10;
        if total >= before + more {
            return Ok(total);
        }
        ensure!(Instant::now() < deadline, "the guest counts {total} MiB, {more} more than {before} were given");
        thread::sleep(Duration::from_millis(100));
    }
}

/// Arguments of the VM's QEMU on `host`.
fn arguments(cluster: &Cluster, host: &str) -> Result<String> {
    Ok(String::from_utf8_lossy(&fs::read(format!("/proc/{}/cmdline", cluster.qemu("web", host)?))?).replace('\0', " "))
}

#[test]
fn a_vm_gets_memory_while_it_runs_and_takes_it_along() -> Result<()> {
    let room = ["--memory", "1536MiB"];
    let spec = ClusterSpec::new(2)?.agent("h1", &room).agent("h2", &room);
    let mut cluster = other_qemu().iter().fold(spec, |spec, qemu| spec.qemu("h2", qemu)).up()?;
    cluster.import_guest_with_agent()?;
    let hosts = cluster.ask(cluster.client().hosts())?;
    let is_old = |name: &str| {
        let facts = hosts.iter().find(|host| host.name.as_str() == name).and_then(|host| host.facts.as_ref());
        facts.is_some_and(|facts| facts.is_old_emulator())
    };
    // From an old QEMU that emulates it would not get away again.
    let (from, to) = if is_old("h1") { ("h2", "h1") } else { ("h1", "h2") };
    let guest = GuestSpec::small("web").memory(Bytes::mib(256)).shape(|spec| {
        spec.memory_max = Some(Bytes(4 << 30));
        if let Boot::Kernel { cmdline, .. } = &mut spec.boot {
            cmdline.push_str(" memhp_default_state=online");
        }
    });
    cluster.boot(&guest, from)?;
    let ready = Instant::now() + SOON;
    while cluster.ask(cluster.client().vm(&web()?))?.status.guest.is_none() {
        ensure!(Instant::now() < ready, "the guest's agent says nothing");
        thread::sleep(Duration::from_millis(100));
    }
    let before = memory(&cluster, 0, 0)?;

    // More than the host has: nothing comes, and it is said. Then what it has.
    let task = begin_set(&cluster, |spec| spec.memory = Bytes(2 << 30))?;
    let refusal = cluster.ended(task, SOON)?.error.context("the host has no such memory")?;
    ensure!(refusal.code == ErrorCode::NotEnoughMemory && refusal.hint.is_some(), "{refusal:?}");
    ensure!(waiting(&cluster)? == ["memory"], "{:?}", waiting(&cluster)?);
    set(&cluster, |spec| spec.memory = Bytes::mib(512))?;
    ensure!(waiting(&cluster)?.is_empty(), "{:?}", waiting(&cluster)?);
    memory(&cluster, before, 256)?;
    // Linux takes memory above 4 GiB first, where DIMMs are.
    cluster.shell("web", "head -c 8000000 /dev/urandom > /noise")?;
    let noise = cluster.shell("web", "md5sum /noise")?;

    if is_old(from) {
        eprintln!("there is no other QEMU than an old one that emulates: the move is not proven here");
    } else {
        cluster.migrate("web", to)?;
        ensure!(cluster.shell("web", "md5sum /noise")? == noise, "the guest's memory changed on the way");
        if is_old(to) {
            let refused = cluster.begin_move("web", from, MigrationPolicy::default()).err().context("its memory would be lost")?;
            ensure!(refused.code == ErrorCode::HostIncompatible && refused.hint.is_some(), "{refused:?}");
        }
    }
    let host = cluster.host_of("web")?;
    set(&cluster, |spec| spec.memory = Bytes::mib(640))?;
    memory(&cluster, before, 384)?;
    // What no guest takes waits, and says why; so does less.
    for (wanted, why) in [(700, "multiples of 128 MiB"), (256, "smaller")] {
        set(&cluster, |spec| spec.memory = Bytes::mib(wanted))?;
        let waiting: Vec<Waiting> = cluster.ask(cluster.client().vm(&web()?))?.status.waiting;
        let reason = waiting.first().and_then(|waiting| waiting.reason.clone()).unwrap_or_default();
        ensure!(waiting.len() == 1 && reason.contains(why), "{waiting:?}");
    }
    set(&cluster, |spec| spec.memory = Bytes::mib(640))?;
    ensure!(waiting(&cluster)?.is_empty(), "{:?}", waiting(&cluster)?);
    cluster.check()?;

    cluster.stop_and_start("web", &host)?;
    let started = arguments(&cluster, &host)?;
    ensure!(!started.contains("pc-dimm") && started.contains("slots=16"), "{started}");
    ensure!(waiting(&cluster)?.is_empty(), "{:?}", waiting(&cluster)?);
    cluster.finish()
}
