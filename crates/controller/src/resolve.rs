//! From what was asked for to what a VM is started with: nothing stays a default or an alias. Images and networks are given.

use godwit_model::{
    Accelerator, Boot, Bytes, CdromSpec, ErrorCode, Growth, HostFacts, ImageKind, ImageRef, Name, NicModel, Platform, PowerOff,
    Refusal, ResolvedCdrom, ResolvedDisk, ResolvedNic, ResolvedSpec, SPEC_SCHEMA, VmId, VmSpec,
};

use crate::checks::{Candidate, check_start, has_its_disks};
use crate::db::Stored;
use crate::networks::{check_networks, network_missing};
use crate::rows::NetworkRow;

const FAMILY: &str = "pc-q35-";
/// The oldest CPU model that every TCG has.
const TCG_BASELINE: &str = "qemu64-v1";
/// The oldest CPU model that a current operating system wants (x86-64-v2).
const KVM_BASELINE: &str = "Nehalem-v2";

/// An image that a spec names, found in the store.
pub(crate) type FindImage<'a> = &'a dyn Fn(&Name) -> Option<(ImageRef, ImageKind)>;

/// Position of a machine type in the order of its family.
fn version_of(machine: &str) -> Option<(u32, u32)> {
    let (major, minor) = machine.strip_prefix(FAMILY)?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The newest machine type of the family that all of `hosts` know.
fn newest_common_machine(hosts: &[Candidate<'_>]) -> Option<String> {
    let known = hosts.first()?.facts.machines.iter();
    known
        .filter(|machine| hosts.iter().all(|host| host.facts.machines.contains(machine)))
        .filter_map(|machine| Some((version_of(machine)?, machine)))
        .max()
        .map(|(_, machine)| machine.clone())
}

pub(crate) fn baseline(accelerator: Accelerator, facts: &HostFacts) -> &'static str {
    let nehalem = facts.cpu_models.iter().any(|model| model == KVM_BASELINE);
    if accelerator == Accelerator::Kvm && nehalem { KVM_BASELINE } else { TCG_BASELINE }
}

/// RAM for life: uneven if the VM might come to a host where even sizes lose writes. It costs such VMs a slower warm-up.
fn ram(wanted: Bytes, hosts: &[Candidate<'_>]) -> Bytes {
    let uneven = hosts.iter().any(|host| host.facts.is_old_emulator());
    if uneven { Bytes(wanted.get() + HostFacts::UNEVEN.get()) } else { wanted }
}

/// What a spec says without looking at any host.
struct Parts {
    kernel: Option<ImageRef>,
    initrd: Option<ImageRef>,
    cmdline: String,
    disks: Vec<ResolvedDisk>,
    nics: Vec<ResolvedNic>,
    cdroms: Vec<ResolvedCdrom>,
}

fn parts(spec: &VmSpec, images: FindImage<'_>, networks: &[Stored<NetworkRow>]) -> Result<Parts, Refusal> {
    let find = |image: &Name| {
        images(image).ok_or_else(|| {
            Refusal::new(ErrorCode::NotFound, format!("the VM needs image {image}, which does not exist"))
                .hint("import it with `godwit image import`")
        })
    };
    let (kernel, initrd, cmdline) = match &spec.boot {
        Boot::Disk => (None, None, String::new()),
        Boot::Kernel { kernel, initrd, cmdline } => {
            let initrd = initrd.as_ref().map(&find).transpose()?;
            (Some(find(kernel)?.0), initrd.map(|(image, _)| image), cmdline.clone())
        }
    };
    let mut disks = Vec::new();
    for disk in &spec.disks {
        let slot = disk.slot.map_or(disks.len(), usize::from);
        disks.push(ResolvedDisk {
            volume: disk.volume.clone(),
            format: disk.format,
            cache: disk.cache,
            create: disk.size,
            image: disk.image.as_ref().map(&find).transpose()?,
            bus: disk.bus,
            discard: disk.discard,
            serial: Some(disk.serial.clone().unwrap_or_else(|| format!("disk{slot}"))),
            io_limits: disk.io_limits,
            slot: Some(place(slot)),
        });
    }
    let medium = |cdrom: &CdromSpec| cdrom.image.as_ref().map(&find).transpose().map(|found| found.map(|(image, _)| image));
    let cdroms = spec.cdroms.iter().map(|cdrom| Ok(ResolvedCdrom { medium: medium(cdrom)? }));
    let cdroms = cdroms.collect::<Result<_, Refusal>>()?;
    let mac = |nic: &godwit_model::NicSpec| nic.mac.ok_or_else(|| Refusal::new(ErrorCode::Internal, "an interface has no address"));
    let nics = spec.nics.iter().enumerate().map(|(index, nic)| {
        let network = networks.iter().map(|stored| &stored.row).find(|row| row.name == nic.network);
        let network = network.ok_or_else(|| network_missing(&nic.network))?;
        Ok(ResolvedNic {
            network: nic.network.clone(),
            mac: mac(nic)?,
            model: nic.model,
            addresses: nic.addresses.clone(),
            link_up: nic.link_up,
            slot: Some(nic.slot.unwrap_or(place(index))),
            network_id: Some(network.id),
            // What other models cannot be told.
            mtu: (nic.model == NicModel::Virtio).then_some(network.mtu),
        })
    });
    let nics = nics.collect::<Result<_, Refusal>>()?;
    Ok(Parts { kernel, initrd, cmdline, disks, nics, cdroms })
}

fn power_off(spec: &VmSpec) -> PowerOff {
    PowerOff { order: spec.autostart.map(|autostart| autostart.order), deadline: spec.shutdown_deadline }
}

/// What a running VM would be if it were started anew on its host with `spec`.
pub(crate) fn wanted_of(
    spec: &VmSpec,
    running: &ResolvedSpec,
    images: FindImage<'_>,
    networks: &[Stored<NetworkRow>],
) -> Result<ResolvedSpec, Refusal> {
    let Parts { kernel, initrd, cmdline, disks, nics, cdroms } = parts(spec, images, networks)?;
    Ok(ResolvedSpec {
        machine: spec.machine.clone().filter(|machine| machine != "q35").unwrap_or_else(|| running.machine.clone()),
        cpu: spec.cpu.clone().unwrap_or_else(|| running.cpu.clone()),
        vcpus: spec.vcpus,
        memory: spec.memory,
        growth: spec.memory_max.map(Growth::to),
        kernel,
        initrd,
        cmdline,
        disks,
        nics,
        cdroms,
        platform: platform(spec),
        cloud_init: spec.cloud_init.clone(),
        power_off: power_off(spec),
        ..running.clone()
    })
}

/// What the VM is started with on `host`, one of the connected `hosts`.
pub(crate) fn resolve(
    (vm, name, spec): (VmId, &Name, &VmSpec),
    host: Candidate<'_>,
    hosts: &[Candidate<'_>],
    images: FindImage<'_>,
    networks: &[Stored<NetworkRow>],
) -> Result<ResolvedSpec, Refusal> {
    let machine = match spec.machine.as_deref() {
        Some(machine) if machine != "q35" => machine.to_owned(),
        _ => newest_common_machine(hosts).ok_or_else(|| {
            Refusal::new(ErrorCode::NoHost, "the connected hosts have no versioned q35 machine type in common")
                .hint("bring their QEMU versions closer together, or give the VM a machine type of the host it shall run on")
        })?,
    };
    let Parts { kernel, initrd, cmdline, disks, nics, cdroms } = parts(spec, images, networks)?;
    Ok(ResolvedSpec {
        schema: SPEC_SCHEMA,
        vm,
        name: name.clone(),
        accelerator: host.facts.accelerator,
        machine,
        cpu: spec.cpu.clone().unwrap_or_else(|| baseline(host.facts.accelerator, host.facts).to_owned()),
        vcpus: spec.vcpus,
        memory: ram(spec.memory, hosts),
        growth: spec.memory_max.map(Growth::to),
        kernel,
        initrd,
        cmdline,
        disks,
        nics,
        cdroms,
        platform: platform(spec),
        cloud_init: spec.cloud_init.clone(),
        power_off: power_off(spec),
    })
}

/// A place from a position; specs are bounded well below.
fn place(position: usize) -> u8 {
    u8::try_from(position).unwrap_or(u8::MAX)
}

fn platform(spec: &VmSpec) -> Platform {
    Platform {
        firmware: spec.firmware.clone(),
        video: spec.video,
        tablet: spec.tablet,
        rtc: spec.rtc,
        hyperv: spec.hyperv,
        smbios: spec.smbios.clone(),
        vmgenid: spec.vmgenid,
        tpm: spec.tpm.clone(),
        hugepages: spec.hugepages,
        numa: spec.numa,
        hotplug_ports: spec.hotplug_ports.unwrap_or(0),
        free_page_reporting: spec.free_page_reporting.unwrap_or(false) && spec.hugepages.is_none(),
        watchdog: spec.watchdog,
    }
}

/// The host to start on, and what with: the wanted one, or the one with most free memory of those that can. `home` is where the VM ran last.
pub(crate) fn decide_start(
    vm: (VmId, &Name, &VmSpec),
    home: Option<&Name>,
    wanted: Option<&Name>,
    hosts: &[Candidate<'_>],
    images: FindImage<'_>,
    networks: &[Stored<NetworkRow>],
) -> Result<(Name, ResolvedSpec), Refusal> {
    decide_start_where(vm, home, wanted, hosts, images, networks, &|_| Ok(()))
}

/// As [`decide_start`], on a host for which `also` holds.
pub(crate) fn decide_start_where(
    vm: (VmId, &Name, &VmSpec),
    home: Option<&Name>,
    wanted: Option<&Name>,
    hosts: &[Candidate<'_>],
    images: FindImage<'_>,
    networks: &[Stored<NetworkRow>],
    also: &dyn Fn(Candidate<'_>) -> Result<(), Refusal>,
) -> Result<(Name, ResolvedSpec), Refusal> {
    let mut best: Option<(Candidate<'_>, ResolvedSpec)> = None;
    let mut reasons = Vec::new();
    let there = hosts.iter().find(|host| Some(host.name) == home).copied();
    for host in hosts.iter().filter(|host| wanted.is_none_or(|wanted| wanted == host.name)) {
        let spec = resolve(vm, *host, hosts, images, networks)?;
        let at_home = || home.map_or(Ok(()), |home| has_its_disks(&spec, home, there, *host));
        let fits = || check_start(&spec, *host).and_then(|()| check_networks(&spec, networks, *host));
        match also(*host).and_then(|()| fits()).and_then(|()| at_home()) {
            Ok(()) if best.as_ref().is_none_or(|(best, _)| host.load.memory_free > best.load.memory_free) => {
                best = Some((*host, spec))
            }
            Ok(()) => {}
            Err(refusal) => reasons.push(refusal),
        }
    }
    match (best, reasons.len(), wanted) {
        (Some((host, spec)), ..) => Ok((host.name.clone(), spec)),
        (None, 0, _) => {
            Err(Refusal::new(ErrorCode::NoHost, "no host is connected").hint("start an agent: `godwit host join`, `godwit agent`"))
        }
        (None, 1, _) | (None, _, Some(_)) => Err(reasons.swap_remove(0)),
        (None, count, None) => {
            // One reason that all share keeps its code: it says more than that there is no host.
            let code = reasons.first().map(|first| first.code).filter(|code| reasons.iter().all(|reason| reason.code == *code));
            let all: Vec<_> = reasons.iter().map(|reason| reason.message.clone()).collect();
            let hint = reasons.first().and_then(|first| first.hint.clone()).unwrap_or_default();
            Err(Refusal::new(
                code.unwrap_or(ErrorCode::NoHost),
                format!("none of {count} hosts can run the VM: {}", all.join("; ")),
            )
            .hint(hint))
        }
    }
}
