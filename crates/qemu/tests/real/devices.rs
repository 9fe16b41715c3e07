//! Every device that a spec can have: accepted by every version, at the same place in each, moving between them, and changed while it runs.

use std::fs;
use std::path::PathBuf;

use godwit_model::spec::{ResolvedDisk, ResolvedNic};
use godwit_model::{
    Bytes, DiskBus, DiskFormat, Firmware, ImageId, ImageRef, IoLimits, Name, NicModel, Platform, ResolvedCdrom, ResolvedSpec,
    Smbios, Tpm, TpmVersion, Video, Vmgenid, Watchdog, WatchdogAction,
};
use godwit_qemu::qmp::commands::StoppedBy;
use godwit_qemu::qmp::views::{MigrationStatus, RunStatus};
use godwit_qemu::{Qmp, Start};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::place::{LIMIT, Place, Vm, launch, pairs, qemus, spec, tap, wait_migration};
use crate::wire::{FULL_SPEED, begin, has};

/// One of everything, but for what needs KVM or huge pages.
fn full(place: &Place) -> (ResolvedSpec, Vec<PathBuf>) {
    let disk = |slot: u8, bus, format| {
        let volume = format!("shared/disk{slot}").parse().expect("volume");
        ResolvedDisk { bus, slot: Some(slot), serial: Some(format!("S-{slot}")), ..ResolvedDisk::new(volume, format) }
    };
    let nic = |slot: u8, model| {
        let mac = format!("52:54:00:aa:bb:{slot:02x}").parse().expect("mac");
        ResolvedNic { slot: Some(slot), model, ..ResolvedNic::new(Name::new("default").expect("name"), mac) }
    };
    fs::write(place.path().join("medium0"), vec![7; 64 << 10]).expect("a medium");
    let medium = ImageRef { id: ImageId::new(Uuid::from_u128(3)), digest: String::new(), size: Bytes(64 << 10) };
    let full = ResolvedSpec {
        disks: vec![
            disk(0, DiskBus::Virtio, DiskFormat::Raw),
            disk(2, DiskBus::Scsi, DiskFormat::Qcow2),
            disk(5, DiskBus::Sata, DiskFormat::Raw),
            disk(8, DiskBus::Virtio, DiskFormat::Raw),
        ],
        nics: vec![nic(0, NicModel::Virtio), nic(3, NicModel::E1000e), nic(10, NicModel::Virtio)],
        cdroms: vec![ResolvedCdrom { medium: Some(medium) }, ResolvedCdrom::default()],
        platform: Platform {
            firmware: Firmware::Uefi { variables: "shared/efi".parse().expect("volume"), secure_boot: false },
            video: Video::Virtio,
            tablet: true,
            smbios: Smbios { product: Some("One, and two".into()), oem_strings: vec!["a,b=c".into()], ..Smbios::default() },
            vmgenid: Some(Vmgenid::new(Uuid::from_u128(9))),
            hotplug_ports: 4,
            free_page_reporting: true,
            watchdog: Some(Watchdog { action: WatchdogAction::Pause }),
            ..Platform::default()
        },
        ..spec("pc-q35-7.2", &[])
    };
    let files = vec![
        place.raw_disk("a", Bytes::mib(16)),
        place.qcow2_disk("b"),
        place.raw_disk("c", Bytes::mib(16)),
        place.raw_disk("d", Bytes::mib(16)),
    ];
    (full, files)
}

async fn ask(qmp: &Qmp, command: &str) -> Value {
    qmp.execute(command, Value::Null).await.expect(command)
}

/// Where every PCI device is, what it is, and how large its windows are: lines such as `0:8.0 1af4:1042 disk0-device`.
fn topology(buses: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    let devices = buses.as_array().into_iter().flatten().filter_map(|bus| bus["devices"].as_array()).flatten();
    for device in devices {
        let sizes: Vec<u64> =
            device["regions"].as_array().into_iter().flatten().filter_map(|region| region["size"].as_u64()).collect();
        let number = |value: &Value| value.as_u64().unwrap_or(u64::MAX);
        let place = format!("{:x}.{:x}", number(&device["slot"]), number(&device["function"]));
        let identity = format!("{:04x}:{:04x}", number(&device["id"]["vendor"]), number(&device["id"]["device"]));
        lines.push(format!("{place} {identity} {} {sizes:?}", device["qdev_id"].as_str().unwrap_or_default()));
    }
    lines.sort();
    lines
}

#[tokio::test]
async fn every_device_is_accepted_by_every_version_and_is_at_the_same_place_in_each() {
    let mut seen: Option<Vec<String>> = None;
    for binary in qemus() {
        let place = Place::new();
        let (mut spec, disks) = full(&place);
        // Not where firmware runs: it measures all that it boots, slowly where it is emulated.
        spec.platform.tpm = Some(Tpm { version: TpmVersion::V2, state: "shared/tpm".parse().expect("volume") });
        let vm = launch(&place, &binary, &spec, &disks, Start::Fresh).await;
        let found = topology(&ask(&vm.qmp, "query-pci").await);
        let at = |place: &str, name: &str| found.iter().any(|line| line.starts_with(&format!("{place} ")) && line.contains(name));
        for (place, name) in [
            ("1.0", "rng0"),
            ("2.0", "balloon0"),
            ("3.0", "channels"),
            ("4.0", "vga"),
            ("5.0", "scsi"),
            ("6.0", "sata"),
            ("7.0", "usb"),
            ("8.0", "disk0-device"),
            ("10.0", "net0"),
            ("13.0", "net3"),
            ("18.0", "port0"),
            ("18.3", "port3"),
            ("19.0", "watchdog"),
        ] {
            assert!(at(place, name), "{}: {name} is not at {place}: {found:#?}", binary.display());
        }
        // Firmware numbers the buses behind root ports; before it has run they are known by name only.
        for (device, port) in [("disk8-device", "port0"), ("net10", "port2")] {
            let of = json!({"path": format!("/machine/peripheral/{device}"), "property": "parent_bus"});
            let bus = vm.qmp.execute("qom-get", of).await.expect("its bus");
            assert_eq!(bus, json!(format!("/machine/peripheral/{port}/{port}")), "{}", binary.display());
        }
        let mapped = vm.qmp.execute("human-monitor-command", json!({"command-line": "info mtree"})).await.expect("memory");
        let tpm = mapped.as_str().unwrap_or_default().lines().find(|line| line.contains("tpm-crb-mmio")).unwrap_or_default();
        assert!(tpm.contains("00000000fed40000-"), "{}: the TPM is at {tpm:?}", binary.display());
        assert_eq!(seen.get_or_insert_with(|| found.clone()), &found, "{}", binary.display());
        assert!(vm.log().is_empty(), "{}: QEMU complained: {}", binary.display(), vm.log());
    }
}

pub(crate) async fn complete(source: &Vm, destination: &Vm, way: &str) {
    let blocked = source.qmp.query_migrate().await.expect("migration").blocked_reasons;
    assert!(blocked.is_empty(), "{way}: {blocked:?}");
    let mut notices = source.qmp.listen();
    let held = has(source, "switchover-ack").await;
    let _wire = begin(source, destination, held, FULL_SPEED).await;
    assert_eq!(source.qmp.stop_first(held, LIMIT).await.expect("stop"), StoppedBy::Us, "{way}");
    wait_migration(&mut notices, &MigrationStatus::PreSwitchover).await;
    source.qmp.migrate_continue().await.expect("continue");
    wait_migration(&mut notices, &MigrationStatus::Completed).await;
    assert_eq!(destination.run_status().await, RunStatus::Paused, "{way}");
    destination.qmp.cont().await.expect("cont");
    assert_eq!(destination.run_status().await, RunStatus::Running, "{way}");
    source.qmp.quit().await.expect("quit");
    source.process.exited().await;
    assert!(destination.log().is_empty(), "{way}: {}", destination.log());
}

#[tokio::test]
async fn a_vm_with_every_device_moves_between_versions_with_what_was_changed_while_it_ran() {
    for (from, to) in pairs() {
        let way = format!("{} -> {}", from.display(), to.display());
        let place = Place::new();
        let (mut spec, disks) = full(&place);
        let source = launch(&place, &from, &spec, &disks, Start::Fresh).await;
        source.boot().await;
        let limits = IoLimits { iops: Some(500), ..IoLimits::default() };
        for slot in [0, 2, 5, 8] {
            source.qmp.set_io_limits(slot, limits).await.expect("limits");
        }
        source.qmp.set_link(3, false).await.expect("link");
        source.qmp.resize_disk(8, Bytes::mib(24)).await.expect("larger");
        assert_eq!(fs::metadata(&disks[3]).expect("a disk").len(), 24 << 20, "{way}");
        fs::write(place.path().join("medium1"), vec![9; 128 << 10]).expect("a medium");
        let open = |name: &str| fs::File::open(place.path().join(name)).expect("a medium").into();
        source.qmp.change_medium(0, None).await.expect("taken out");
        source.qmp.change_medium(1, Some(open("medium1"))).await.expect("put in");
        source.qmp.change_medium(1, Some(open("medium1"))).await.expect("changed");
        spec.cdroms.reverse();
        let plugged = ResolvedNic { slot: Some(9), mac: "52:54:00:aa:bb:09".parse().expect("mac"), ..spec.nics[0].clone() };
        source.qmp.plug_nic(9, &plugged, &spec.machine, tap()).await.expect("plugged");
        assert!(source.qmp.plug_nic(9, &plugged, &spec.machine, tap()).await.is_err(), "the place is taken");
        spec.nics.push(plugged);
        source.qmp.unplug_nic(10).await.expect("unplugged");
        spec.nics.retain(|nic| nic.slot != Some(10));
        let destination = launch(&place, &to, &spec, &disks, Start::Incoming).await;
        complete(&source, &destination, &way).await;
        let drives = destination.qmp.query_block().await.expect("block");
        let inserted = |name: &str| {
            let drive = drives.iter().find(|drive| drive.qdev.as_deref() == Some(name)).expect("a drive");
            drive.inserted.is_some()
        };
        assert_eq!((inserted("cdrom0"), inserted("cdrom1")), (false, true), "{way}");
        destination.qmp.change_medium(1, None).await.expect("taken out after the move");
        destination.qmp.unplug_nic(9).await.expect("unplugged after the move");
    }
}

#[tokio::test]
async fn firmware_keeps_its_variables_in_their_volume_and_with_secure_boot_starts_too() {
    for (binary, secure_boot) in qemus().into_iter().flat_map(|binary| [(binary.clone(), false), (binary, true)]) {
        let place = Place::new();
        let (mut spec, disks) = full(&place);
        spec.platform.firmware = Firmware::Uefi { variables: "shared/efi".parse().expect("volume"), secure_boot };
        let before = fs::metadata("/usr/share/OVMF/OVMF_VARS_4M.fd").expect("OVMF").len();
        let vm = launch(&place, &binary, &spec, &disks, Start::Fresh).await;
        let template = fs::read(place.path().join("variables")).expect("variables");
        if secure_boot {
            // The test kernel has no signature that the enrolled keys know: only that the firmware runs can be seen.
            vm.qmp.cont().await.expect("cont");
            wait_for_writes(&place, &template).await;
        } else {
            vm.boot().await;
        }
        let after = fs::read(place.path().join("variables")).expect("variables");
        assert_ne!(template, after, "{}: the firmware wrote no variables", binary.display());
        assert_eq!(after.len() as u64, before);
        assert!(vm.log().is_empty(), "{}: {}", binary.display(), vm.log());
    }
}

/// Waits until the firmware has written its variables.
async fn wait_for_writes(place: &Place, template: &[u8]) {
    let writing = async {
        while fs::read(place.path().join("variables")).expect("variables") == template {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, writing).await.expect("the firmware writes its variables");
}
