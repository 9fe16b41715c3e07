//! What is refused, what old stores hold, and that the documentation lists every field.

use super::*;

fn name(text: &str) -> Name {
    Name::new(text).expect("name")
}

fn volume(text: &str) -> VolumeRef {
    text.parse().expect("volume")
}

fn disk(text: &str) -> DiskSpec {
    DiskSpec::new(volume(text), DiskFormat::Raw)
}

fn spec() -> VmSpec {
    VmSpec::new(2, Bytes::mib(512), Boot::Kernel { kernel: name("k"), initrd: None, cmdline: "quiet".into() })
}

fn nic(change: impl FnOnce(&mut NicSpec)) -> Vec<NicSpec> {
    let mut nic = NicSpec::new(name("default"));
    change(&mut nic);
    vec![nic]
}

fn with_disk(change: impl FnOnce(&mut DiskSpec)) -> Vec<DiskSpec> {
    let mut disk = disk("shared/a");
    change(&mut disk);
    vec![disk]
}

#[test]
fn a_spec_that_qemu_would_misread_is_refused() {
    type Change = fn(&mut VmSpec);
    let cases: &[(&str, Change)] = &[
        ("no vcpu", |s| s.vcpus = 0),
        ("odd memory", |s| s.memory = Bytes(Bytes::mib(512).get() + 1)),
        ("tiny memory", |s| s.memory = Bytes::MIB),
        ("memory that is not whole huge pages", |s| s.hugepages = Some(HugePages::Gib1)),
        ("growth to less", |s| s.memory_max = Some(Bytes::mib(384))),
        ("growth to nothing", |s| s.memory_max = Some(Bytes(0))),
        ("growth in steps that no guest takes", |s| s.memory_max = Some(Bytes::mib(513))),
        ("growth beyond every address", |s| s.memory_max = Some(Bytes(u64::MAX - (128 << 20) + 1))),
        ("growth beyond a CPU's addresses", |s| s.memory_max = Some(Bytes(1 << 40))),
        ("growth by parts of huge pages", |s| {
            (s.memory, s.memory_max, s.hugepages) = (Bytes::GIB, Some(Bytes::mib(1_152)), Some(HugePages::Gib1));
        }),
        ("option injection in the CPU", |s| s.cpu = Some("qemu64,+svm".into())),
        ("option injection in the machine", |s| s.machine = Some("q35,dumpdtb=/x".into())),
        ("newline in the command line", |s| {
            s.boot = Boot::Kernel { kernel: name("k"), initrd: None, cmdline: "a\nb".into() };
        }),
        ("boot from no disk", |s| s.boot = Boot::Disk),
        ("five drives", |s| s.cdroms = vec![CdromSpec::default(); 5]),
        ("nine disks", |s| s.disks = (0..9).map(|n| disk(&format!("a/d{n}"))).collect()),
        ("nine interfaces", |s| s.nics = vec![NicSpec::new(name("default")); 9]),
        ("a volume twice", |s| s.disks = vec![disk("a/b"), disk("a/b")]),
        ("a disk as firmware variables", |s| {
            s.disks = vec![disk("a/b")];
            s.firmware = Firmware::Uefi { variables: volume("a/b"), secure_boot: false };
        }),
        ("firmware variables as TPM state", |s| {
            s.firmware = Firmware::Uefi { variables: volume("a/b"), secure_boot: false };
            s.tpm = Some(Tpm { version: TpmVersion::V2, state: volume("a/b") });
        }),
        ("half a sector", |s| s.disks = with_disk(|d| d.size = Some(Bytes(1_000)))),
        ("NVMe", |s| s.disks = with_disk(|d| d.bus = DiskBus::Nvme)),
        ("option injection in a serial number", |s| s.disks = with_disk(|d| d.serial = Some("a,drive=x".into()))),
        ("an empty serial number", |s| s.disks = with_disk(|d| d.serial = Some(String::new()))),
        ("a serial number that would be cut", |s| s.disks = with_disk(|d| d.serial = Some("x".repeat(21)))),
        ("a limit of nothing", |s| s.disks = with_disk(|d| d.io_limits.iops = Some(0))),
        ("a limit that QEMU refuses", |s| s.disks = with_disk(|d| d.io_limits.iops = Some(u64::MAX))),
        ("a total and a part", |s| {
            s.disks = with_disk(|d| {
                d.io_limits = IoLimits { iops: Some(5), read_iops: Some(5), ..IoLimits::default() };
            });
        }),
        ("a seventh SATA port", |s| {
            s.disks = with_disk(|d| {
                (d.bus, d.slot) = (DiskBus::Sata, Some(6));
            });
        }),
        ("SCSI on a root port", |s| {
            s.hotplug_ports = Some(8);
            s.disks = with_disk(|d| {
                (d.bus, d.slot) = (DiskBus::Scsi, Some(8));
            });
        }),
        ("a root port that is not there", |s| s.disks = with_disk(|d| d.slot = Some(8))),
        ("two devices in one root port", |s| {
            s.hotplug_ports = Some(1);
            s.disks = with_disk(|d| d.slot = Some(8));
            s.nics = nic(|n| n.slot = Some(8));
        }),
        ("two disks in one slot", |s| {
            s.disks = with_disk(|d| d.slot = Some(1));
            s.disks.push(DiskSpec { slot: Some(1), ..disk("shared/b") });
        }),
        ("nine root ports", |s| s.hotplug_ports = Some(9)),
        ("everybody's address", |s| s.nics = nic(|n| n.addresses = vec!["255.255.255.255".parse().expect("ip")])),
        ("nobody's address", |s| s.nics = nic(|n| n.addresses = vec!["::".parse().expect("ip")])),
        ("an address in disguise", |s| s.nics = nic(|n| n.addresses = vec!["::ffff:10.0.0.1".parse().expect("ip")])),
        ("an address twice", |s| s.nics = nic(|n| n.addresses = vec!["10.0.0.1".parse().expect("ip"); 2])),
        ("newline in SMBIOS", |s| s.smbios.product = Some("a\nb".into())),
        ("NUL in an OEM string", |s| s.smbios.oem_strings = vec!["a\0b".into()]),
        ("seventeen OEM strings", |s| s.smbios.oem_strings = vec!["a".into(); 17]),
        ("a long SMBIOS text", |s| s.smbios.serial = Some("x".repeat(65))),
        ("an escape sequence in a label", |s| {
            s.labels.insert(name("a"), "\u{1b}[2J".into());
        }),
        ("65 labels", |s| s.labels = (0..65).map(|n| (name(&format!("l{n}")), String::new())).collect()),
        ("no time to shut down", |s| s.shutdown_deadline = Some(Seconds(0))),
        ("long user data", |s| {
            s.cloud_init = Some(CloudInit { user_data: Some("x".repeat(MAX_USER_DATA + 1)), ..CloudInit::default() });
        }),
        ("user data that is no text", |s| {
            s.cloud_init = Some(CloudInit { user_data: Some("a\0".into()), ..CloudInit::default() });
        }),
        ("a host name that is none", |s| {
            s.cloud_init = Some(CloudInit { host_name: Some(name("a_b")), ..CloudInit::default() });
        }),
    ];
    assert_eq!(spec().validate(), Ok(()));
    for (what, change) in cases {
        let mut changed = spec();
        change(&mut changed);
        assert!(changed.validate().is_err(), "{what} was accepted");
    }
}

#[test]
fn a_spec_with_one_of_everything_is_accepted() {
    let mut spec = spec();
    spec.boot = Boot::Disk;
    spec.disks = vec![disk("shared/a"), disk("shared/b"), disk("shared/c"), disk("shared/d")];
    (spec.disks[1].bus, spec.disks[2].bus) = (DiskBus::Scsi, DiskBus::Sata);
    spec.disks[3].slot = Some(8);
    spec.disks[0].serial = Some("WD-1.2_3".into());
    spec.disks[0].io_limits = IoLimits { iops: Some(100), read_rate: Some(crate::BytesPerSec(1 << 20)), ..IoLimits::default() };
    spec.nics = nic(|n| (n.slot, n.model, n.link_up) = (Some(9), NicModel::E1000e, false));
    spec.nics[0].addresses = vec!["10.0.0.1".parse().expect("ip"), "fd00::1".parse().expect("ip")];
    spec.cdroms = vec![CdromSpec { image: Some(name("debian")) }, CdromSpec::default()];
    spec.firmware = Firmware::Uefi { variables: volume("shared/efi"), secure_boot: true };
    spec.smbios.manufacturer = Some("A, B & C".into());
    spec.hotplug_ports = Some(2);
    spec.memory_max = Some(spec.memory);
    // It may get any place that is free, also where its position is taken.
    spec.nics.push(NicSpec { slot: Some(2), ..NicSpec::new(name("default")) });
    spec.nics.push(NicSpec::new(name("default")));
    spec.labels.insert(name("tier"), "web front".into());
    assert_eq!(spec.validate(), Ok(()));
    let text = serde_json::to_string(&spec).expect("JSON");
    assert_eq!(serde_json::from_str::<VmSpec>(&text).expect("its own JSON"), spec);
}

/// As stored by the version before.
pub(super) fn resolved() -> ResolvedSpec {
    let stored = r#"{"schema":1,"vm":"11112222-3333-4444-5555-666677778888","name":"web1","accelerator":"tcg",
        "machine":"pc-q35-7.2","cpu":"qemu64-v1","vcpus":2,"memory":536870912,"kernel":null,"initrd":null,"cmdline":"",
        "disks":[{"volume":"shared/a","format":"raw","cache":"direct","create":null,"image":null}],
        "nics":[{"network":"default","mac":"52:54:00:00:00:01"}]}"#;
    serde_json::from_str(stored).expect("a resolved spec of schema 1")
}

#[test]
fn what_was_stored_with_schema_1_reads_as_what_it_was() {
    let stored = r#"{"vcpus":2,"memory":536870912,"boot":{"from":"disk"},
        "disks":[{"volume":"shared/a","format":"qcow2","cache":"direct","size":null,"image":null}],
        "nics":[{"network":"default","mac":"52:54:00:00:00:01"}],"machine":null,"cpu":null}"#;
    let read: VmSpec = serde_json::from_str(stored).expect("a spec of schema 1");
    let mut expected = VmSpec::new(2, Bytes::mib(512), Boot::Disk);
    expected.disks = vec![DiskSpec::new(volume("shared/a"), DiskFormat::Qcow2)];
    expected.nics = nic(|nic| nic.mac = Some("52:54:00:00:00:01".parse().expect("mac")));
    assert_eq!(read, expected);
    assert_eq!(read.validate(), Ok(()));

    let read = resolved();
    assert_eq!((read.schema, read.platform.hotplug_ports, &read.platform.vmgenid), (1, 0, &None));
    assert_eq!(read.platform, Platform::default());
    assert_eq!(read.disks, [ResolvedDisk::new(volume("shared/a"), DiskFormat::Raw)]);
    assert_eq!(read.nics, [ResolvedNic::new(name("default"), "52:54:00:00:00:01".parse().expect("mac"))]);
    assert_eq!(read.disk_slots().map(|(slot, _)| slot).collect::<Vec<_>>(), [0]);
    assert!(read.cdroms.is_empty() && read.cloud_init.is_none() && read.growth.is_none());
}

#[test]
fn what_cloud_init_holds_is_not_printed() {
    let secret = CloudInit { user_data: Some("password: hunter2".into()), ..CloudInit::default() };
    let mut spec = spec();
    spec.cloud_init = Some(secret);
    assert!(!format!("{spec:?}").contains("hunter2"));
}

/// Every field of a schema as a path: `disks[].bus`.
fn fields(schema: &serde_json::Value, all: &serde_json::Value, path: &str, found: &mut Vec<String>) {
    if let Some(name) = schema["$ref"].as_str().and_then(|reference| reference.rsplit('/').next()) {
        return fields(&all[name], all, path, found);
    }
    let choices = ["oneOf", "anyOf", "allOf"].iter().filter_map(|key| schema[*key].as_array()).flatten();
    let before = found.len();
    choices.for_each(|choice| fields(choice, all, path, found));
    if let Some(properties) = schema["properties"].as_object() {
        for (name, property) in properties {
            let dot = if path.is_empty() { "" } else { "." };
            fields(property, all, &format!("{path}{dot}{name}"), found);
        }
    } else if schema["items"].is_object() && before == found.len() {
        let leaf = found.len();
        fields(&schema["items"], all, &format!("{path}[]"), found);
        // A list of plain values is one field.
        if found.get(leaf).is_some_and(|only| *only == format!("{path}[]")) {
            found[leaf] = path.to_owned();
        }
    } else if before == found.len() && schema["type"] != "null" {
        found.push(path.to_owned());
    }
}

#[test]
fn the_documentation_lists_every_field_and_no_other() {
    let mut schemas = vec![];
    <VmSpec as utoipa::ToSchema>::schemas(&mut schemas);
    let all: serde_json::Map<_, _> =
        schemas.into_iter().map(|(name, schema)| (name, serde_json::to_value(schema).expect("JSON"))).collect();
    let root = serde_json::to_value(<VmSpec as utoipa::PartialSchema>::schema()).expect("JSON");
    let mut found = Vec::new();
    fields(&root, &all.into(), "", &mut found);
    found.sort();
    found.dedup();
    let page = include_str!("../../../../docs/vm-spec.md");
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` |"));
    let mut listed: Vec<&str> = rows.map(|(field, _)| field).collect();
    listed.sort_unstable();
    assert!(found.len() > 50 && found.contains(&"disks[].io_limits.rate".to_owned()), "the walk found little: {found:?}");
    assert_eq!(listed, found);
}
