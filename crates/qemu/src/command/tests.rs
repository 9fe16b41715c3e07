//! Golden command lines, and that no value can become an option.

use godwit_model::spec::{ResolvedDisk, ResolvedNic};
use godwit_model::{
    Bytes, Dimm, DimmAddress, Discard, DiskBus, DiskFormat, Firmware, Growth, HugePages, Hyperv, ImageId, ImageRef, Name, NicModel,
    Numa, Platform, ResolvedCdrom, Rtc, RtcBase, RtcDrift, Smbios, Tpm, TpmVersion, Video, VmId, Vmgenid, Watchdog, WatchdogAction,
};
use proptest::prelude::*;
use uuid::Uuid;

use super::*;

fn image(digest: &str) -> ImageRef {
    ImageRef { id: ImageId::new(Uuid::from_u128(7)), digest: digest.into(), size: Bytes::MIB }
}

fn disk(volume: &str, format: DiskFormat, cache: CacheMode) -> ResolvedDisk {
    ResolvedDisk { cache, ..ResolvedDisk::new(volume.parse().expect("volume"), format) }
}

fn spec() -> ResolvedSpec {
    let nic = |mac: &str| ResolvedNic::new(Name::new("default").expect("name"), mac.parse().expect("mac"));
    ResolvedSpec {
        schema: godwit_model::spec::SPEC_SCHEMA,
        vm: VmId::new(Uuid::from_u128(0x1111_2222_3333_4444_5555_6666_7777_8888)),
        name: Name::new("web1").expect("name"),
        accelerator: Accelerator::Tcg,
        machine: "pc-q35-7.2".into(),
        cpu: "qemu64-v1".into(),
        vcpus: 2,
        memory: Bytes::mib(512),
        growth: None,
        kernel: Some(image("aa")),
        initrd: Some(image("bb")),
        cmdline: "console=ttyS0 quiet".into(),
        disks: vec![
            disk("shared/web1", DiskFormat::Qcow2, CacheMode::Direct),
            disk("local/x", DiskFormat::Raw, CacheMode::Writeback),
        ],
        nics: vec![nic("52:54:00:00:00:01")],
        cdroms: vec![],
        platform: Platform::default(),
        cloud_init: None,
        power_off: godwit_model::PowerOff::default(),
    }
}

#[test]
fn a_machine_that_is_started_by_hand_is_the_same_for_its_guest() {
    let seen = |arguments: &[String]| -> Vec<String> {
        let visible =
            |flag: &str| matches!(flag, "-machine" | "-cpu" | "-smp" | "-m" | "-device" | "-uuid" | "-smbios" | "-append");
        arguments.windows(2).filter(|pair| visible(&pair[0])).map(|pair| pair.join(" ")).collect()
    };
    let files = |memory: bool| PlainFiles {
        disks: vec!["run/disk0.qcow2".into(), "run/disk1.qcow2".into()],
        kernel: Some("kernel".into()),
        initrd: Some("initrd".into()),
        memory: memory.then(|| "memory.qemu".to_owned()),
        ..PlainFiles::default()
    };
    let mut spec = spec();
    // A command line that begins like an option is none.
    spec.cmdline = "-S quiet".into();
    let caged = qemu_arguments(&spec, &resources()).expect("arguments");
    for memory in [false, true] {
        let plain = plain_arguments(&spec, &files(memory)).expect("arguments");
        assert_eq!(seen(&plain), seen(&caged));
        let text = plain.join(" ");
        assert!(!["fdset", "/proc/", "fd=", "-sandbox", "-vnc"].iter().any(|word| text.contains(word)), "{text}");
        assert_eq!(plain.iter().filter(|word| *word == "-S" || word.contains("\"driver\":\"raw\"")).count(), 0, "{text}");
        for path in ["run/disk0.qcow2", "run/disk1.qcow2"] {
            assert!(text.contains(&format!("\"filename\":\"{path}\"")), "{text}");
        }
        let (network, incoming) = if memory { ("tap", true) } else { ("user", false) };
        assert!(text.contains(&format!("\"type\":\"{network}\"")), "{text}");
        assert_eq!(text.ends_with("-incoming exec:cat memory.qemu"), incoming, "{text}");
    }
    assert!(plain_arguments(&spec, &PlainFiles::default()).is_err(), "there are no files");
}

fn resources() -> Resources {
    Resources {
        runtime_dir: "/run/godwit/vm/1".into(),
        channels: ChannelFds { qmp: 20, console: 21, guest_agent: 22 },
        kernel: Some(10),
        initrd: Some(11),
        flash: None,
        disks: vec![DiskFds { read_only: 12, read_write: 13 }, DiskFds { read_only: 14, read_write: 15 }],
        media: vec![],
        taps: vec![16],
        seed: None,
        tpm: None,
        node: None,
        start: Start::Incoming,
    }
}

/// One option per line, with its value.
fn lines(arguments: &[String]) -> String {
    let mut text = String::new();
    for argument in arguments {
        text.push_str(if !argument.starts_with('-') {
            " "
        } else if text.is_empty() {
            ""
        } else {
            "\n"
        });
        text.push_str(argument);
    }
    text + "\n"
}

#[test]
fn the_command_line_is_the_golden_one() {
    let arguments = qemu_arguments(&spec(), &resources()).expect("arguments");
    let golden = include_str!("../../tests/golden/q35-7.2-incoming.txt");
    assert_eq!(lines(&arguments), golden, "the command line is the ABI of VMs that run: see the module's documentation");
}

/// One of everything, on every bus and in a root port, on a machine of another age.
fn full() -> (ResolvedSpec, Resources) {
    let nic = |mac: &str| ResolvedNic::new(Name::new("default").expect("name"), mac.parse().expect("mac"));
    let volume = |text: &str| text.parse().expect("volume");
    let base = spec();
    let disks = vec![
        ResolvedDisk { serial: Some("WD-1".into()), slot: Some(0), ..ResolvedDisk::new(volume("a/0"), DiskFormat::Raw) },
        ResolvedDisk { bus: DiskBus::Scsi, slot: Some(1), ..ResolvedDisk::new(volume("a/1"), DiskFormat::Qcow2) },
        ResolvedDisk { bus: DiskBus::Sata, slot: Some(5), ..ResolvedDisk::new(volume("a/2"), DiskFormat::Raw) },
        ResolvedDisk { discard: Discard::Ignore, slot: Some(9), ..ResolvedDisk::new(volume("a/3"), DiskFormat::Raw) },
    ];
    let smbios =
        Smbios { product: Some("One, and two".into()), oem_strings: vec!["a=b,c".into(), "d".into()], ..Smbios::default() };
    let platform = Platform {
        firmware: Firmware::Uefi { variables: volume("a/efi"), secure_boot: true },
        video: Video::Virtio,
        tablet: true,
        rtc: Rtc { base: RtcBase::Localtime, drift: RtcDrift::Drop },
        hyperv: Hyperv::WindowsV1,
        smbios,
        vmgenid: Some(Vmgenid::new(Uuid::from_u128(0x9999))),
        tpm: Some(Tpm { version: TpmVersion::V2, state: volume("a/tpm") }),
        hugepages: Some(HugePages::Mib2),
        numa: Numa::Any,
        hotplug_ports: 2,
        free_page_reporting: true,
        watchdog: Some(Watchdog { action: WatchdogAction::Poweroff }),
    };
    let spec = ResolvedSpec {
        accelerator: Accelerator::Kvm,
        machine: "pc-q35-10.0".into(),
        cpu: "Nehalem-v2".into(),
        kernel: None,
        initrd: None,
        cmdline: String::new(),
        disks,
        nics: vec![
            ResolvedNic { slot: Some(1), ..nic("52:54:00:00:00:01") },
            ResolvedNic { model: NicModel::E1000e, slot: Some(8), ..nic("52:54:00:00:00:02") },
        ],
        cdroms: vec![ResolvedCdrom { medium: Some(image("cc")) }, ResolvedCdrom::default()],
        platform,
        ..base
    };
    let fds = |first| DiskFds { read_only: first, read_write: first + 1 };
    let resources = Resources {
        kernel: None,
        initrd: None,
        flash: Some(FlashFds { code: 30, variables: fds(31) }),
        disks: vec![fds(40), fds(42), fds(44), fds(46)],
        media: vec![Some(50), None],
        taps: vec![51, 52],
        tpm: Some(60),
        start: Start::Fresh,
        ..resources()
    };
    (spec, resources)
}

#[test]
fn the_command_line_of_one_of_everything_is_the_golden_one() {
    let (spec, resources) = full();
    let arguments = qemu_arguments(&spec, &resources).expect("arguments");
    let golden = include_str!("../../tests/golden/q35-10.0-full.txt");
    assert_eq!(lines(&arguments), golden, "the command line is the ABI of VMs that run: see the module's documentation");
}

/// DIMMs of (slot, address in MiB, size in MiB) in a VM that may have 1 GiB.
fn with_dimms(spec: &mut ResolvedSpec, dimms: &[(u8, u64, u64)]) {
    let dimm = |(slot, address, size): &(u8, u64, u64)| {
        let address = DimmAddress(*address << 20);
        Dimm { slot: *slot, address, size: Bytes::mib(*size) }
    };
    spec.growth = Some(Growth { dimms: dimms.iter().map(dimm).collect(), ..Growth::to(Bytes::GIB) });
}

#[test]
fn memory_has_room_only_where_the_spec_says_so_and_dimms_are_where_they_were() {
    let options = |spec: &ResolvedSpec| {
        let arguments = qemu_arguments(spec, &resources()).expect("arguments");
        let of_memory = |pair: &&[String]| pair[0] == "-m" || pair[1].contains("dimm");
        arguments.windows(2).filter(of_memory).map(|pair| pair.join(" ")).collect::<Vec<_>>()
    };
    let mut vm = spec();
    assert_eq!(options(&vm), ["-m size=524288k"]);
    vm.growth = Some(Growth::to(vm.memory));
    assert_eq!(options(&vm), ["-m size=524288k"], "QEMU takes no slots without room");
    with_dimms(&mut vm, &[(0, 4_096, 128), (1, 4_224, 256)]);
    vm.memory = Bytes(vm.memory.get() + (8 << 10));
    assert_eq!(
        options(&vm),
        [
            "-m size=524296k,slots=16,maxmem=1048584k",
            r#"-object {"qom-type":"memory-backend-ram","id":"dimm0-memory","size":134217728,"merge":false,"dump":false}"#,
            r#"-device {"driver":"pc-dimm","id":"dimm0","memdev":"dimm0-memory","slot":0,"addr":4294967296}"#,
            r#"-object {"qom-type":"memory-backend-ram","id":"dimm1-memory","size":268435456,"merge":false,"dump":false}"#,
            r#"-device {"driver":"pc-dimm","id":"dimm1","memdev":"dimm1-memory","slot":1,"addr":4429185024}"#,
        ]
    );
    let (mut huge, resources) = full();
    with_dimms(&mut huge, &[(0, 4_096, 128)]);
    let backend = r#"{"qom-type":"memory-backend-memfd","id":"dimm0-memory","size":134217728,"hugetlb":true,"hugetlbsize":2097152,"prealloc":true,"share":true,"merge":false,"dump":false}"#;
    let arguments = qemu_arguments(&huge, &resources).expect("arguments");
    assert!(arguments.iter().any(|argument| argument == backend), "{arguments:#?}");
}

#[test]
fn a_memory_node_is_bound_to_without_a_change_that_the_guest_or_a_migration_sees() {
    let mut vm = spec();
    with_dimms(&mut vm, &[(0, 4_096, 128)]);
    let free = qemu_arguments(&vm, &resources()).expect("arguments");
    let bound = qemu_arguments(&vm, &Resources { node: Some(1), ..resources() }).expect("arguments");
    let bound = bound.join("\n");
    assert!(bound.contains("mem-merge=off,memory-backend=pc.ram\n"), "{bound}");
    for backend in [
        r#"{"qom-type":"memory-backend-ram","id":"pc.ram","size":536870912,"host-nodes":[1],"policy":"bind","merge":false,"dump":false,"x-use-canonical-path-for-ramblock-id":false}"#,
        r#"{"qom-type":"memory-backend-ram","id":"dimm0-memory","size":134217728,"host-nodes":[1],"policy":"bind","merge":false,"dump":false}"#,
    ] {
        assert!(bound.contains(backend), "{bound}");
    }
    // Nothing else differs.
    let same = bound.replace(r#""host-nodes":[1],"policy":"bind","#, "").replace(",memory-backend=pc.ram", "");
    let ram = "-object\n{\"qom-type\":\"memory-backend-ram\",\"id\":\"pc.ram\",\"size\":536870912,\"merge\":false,\"dump\":false,\"x-use-canonical-path-for-ramblock-id\":false}\n";
    assert_eq!(same.replace(ram, ""), free.join("\n"));
    let (huge, resources) = full();
    let bound = qemu_arguments(&huge, &Resources { node: Some(0), ..resources }).expect("arguments").join("\n");
    assert!(bound.contains(r#""size":536870912,"host-nodes":[0],"policy":"bind","hugetlb":true"#), "{bound}");
    assert!(!bound.contains("ramblock"), "RAM of huge pages keeps the name that it had: {bound}");
}

#[test]
fn what_a_later_or_hostile_controller_sends_is_refused() {
    type Change = fn(&mut ResolvedSpec);
    let cases: [(&str, Change); 18] = [
        ("a later schema", |s| s.schema = SPEC_SCHEMA + 1),
        ("NVMe", |s| s.disks[0].bus = DiskBus::Nvme),
        ("an option in a serial number", |s| s.disks[0].serial = Some("a,drive=b".into())),
        ("a root port that is not there", |s| s.disks[0].slot = Some(10)),
        ("a root port for SCSI", |s| s.disks[1].slot = Some(9)),
        ("two devices in one root port", |s| s.nics[1].slot = Some(9)),
        ("a line break in SMBIOS", |s| s.platform.smbios.family = Some("a\n-daemonize".into())),
        ("a long OEM string", |s| s.platform.smbios.oem_strings = vec!["x".repeat(256)]),
        ("enlightenments that nobody would give", |s| s.accelerator = Accelerator::Tcg),
        ("RAM that is not whole huge pages", |s| s.memory = Bytes(s.memory.get() + (8 << 10))),
        ("memory without end", |s| s.growth = Some(Growth::to(Bytes(u64::MAX)))),
        ("slots without end", |s| s.growth = Some(Growth { slots: 255, ..Growth::to(Bytes::GIB) })),
        ("a slot that is not there", |s| with_dimms(s, &[(16, 4_096, 128)])),
        ("two DIMMs in one slot", |s| with_dimms(s, &[(0, 4_096, 128), (0, 4_224, 128)])),
        ("a DIMM of nothing", |s| with_dimms(s, &[(0, 4_096, 0)])),
        ("a DIMM that no guest takes", |s| with_dimms(s, &[(0, 4_096, 64)])),
        ("a DIMM between blocks", |s| with_dimms(s, &[(0, 4_100, 128)])),
        ("more DIMMs than there is room for", |s| with_dimms(s, &[(0, 4_096, 256), (1, 4_352, 384)])),
    ];
    for (what, change) in cases {
        let (mut spec, resources) = full();
        change(&mut spec);
        assert!(qemu_arguments(&spec, &resources).is_err(), "{what} was accepted");
    }
}

#[test]
fn the_guest_sees_the_same_on_every_host() {
    let here = qemu_arguments(&spec(), &resources()).expect("arguments");
    let elsewhere = Resources {
        runtime_dir: "/var/run/other".into(),
        channels: ChannelFds { qmp: 60, console: 61, guest_agent: 62 },
        kernel: Some(30),
        initrd: Some(31),
        flash: None,
        disks: vec![DiskFds { read_only: 42, read_write: 43 }, DiskFds { read_only: 44, read_write: 45 }],
        media: vec![],
        taps: vec![50],
        seed: None,
        tpm: None,
        node: None,
        start: Start::Fresh,
    };
    let there = qemu_arguments(&spec(), &elsewhere).expect("arguments");
    let visible = |arguments: &[String]| -> Vec<String> {
        let options = ["-device", "-machine", "-cpu", "-smp", "-m", "-uuid", "-append", "-boot", "-rtc"];
        arguments.windows(2).filter(|pair| options.contains(&pair[0].as_str())).map(|pair| pair.join(" ")).collect()
    };
    assert_eq!(visible(&here), visible(&there));
    assert!(visible(&here).len() > 15);
}

#[test]
fn a_fresh_vm_waits_for_cont_and_not_for_a_migration() {
    let arguments = qemu_arguments(&spec(), &Resources { start: Start::Fresh, ..resources() }).expect("arguments");
    assert!(arguments.contains(&"-S".to_owned()) && !arguments.contains(&"-incoming".to_owned()));
    let arguments = qemu_arguments(&spec(), &resources()).expect("arguments");
    assert!(arguments.contains(&"-S".to_owned()) && arguments.windows(2).any(|pair| pair == ["-incoming", "defer"]));
}

#[test]
fn a_disk_without_a_boot_kernel_boots_from_the_first_disk() {
    let spec = ResolvedSpec { kernel: None, initrd: None, cmdline: String::new(), ..spec() };
    let arguments = qemu_arguments(&spec, &Resources { kernel: None, initrd: None, ..resources() }).expect("arguments");
    assert!(!arguments.iter().any(|argument| ["-kernel", "-append", "-initrd"].contains(&argument.as_str())));
    assert_eq!(arguments.iter().filter(|argument| argument.contains("bootindex")).count(), 1);
}

#[test]
fn udp_segmentation_is_off_where_it_exists() {
    for (machine, named) in
        [("pc-q35-7.2", false), ("pc-q35-8.1", false), ("pc-q35-8.2", true), ("pc-q35-10.0", true), ("q35", false)]
    {
        assert_eq!(devices::has_udp_segmentation(machine), named, "{machine}");
    }
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let count = |what| move |error: CommandError| matches!(error, CommandError::Count { what: of, .. } if of == what);
    type Expected = fn(CommandError) -> bool;
    let cases: [(&str, ResolvedSpec, Resources, Expected); 5] = [
        ("machine", ResolvedSpec { machine: "q35,dumpdtb=/x".into(), ..spec() }, resources(), |e| {
            matches!(e, CommandError::Identifier { .. })
        }),
        ("cpu", ResolvedSpec { cpu: "qemu64\n-daemonize".into(), ..spec() }, resources(), |e| {
            matches!(e, CommandError::Identifier { .. })
        }),
        ("cmdline", ResolvedSpec { cmdline: "a\nb".into(), ..spec() }, resources(), |e| e == CommandError::Cmdline),
        ("long path", spec(), Resources { runtime_dir: format!("/{}", "x".repeat(100)).into(), ..resources() }, |e| {
            matches!(e, CommandError::RuntimeDir(_))
        }),
        ("relative path", spec(), Resources { runtime_dir: "run".into(), ..resources() }, |e| {
            matches!(e, CommandError::RuntimeDir(_))
        }),
    ];
    for (what, spec, resources, expected) in cases {
        let error = qemu_arguments(&spec, &resources).expect_err(what);
        assert!(expected(error.clone()), "{what}: {error}");
    }
    let error = qemu_arguments(&spec(), &Resources { taps: vec![], ..resources() }).expect_err("a tap is missing");
    assert!(count("interfaces")(error));
    let error = qemu_arguments(&spec(), &Resources { tpm: Some(60), ..resources() }).expect_err("a TPM that nobody wants");
    assert!(count("TPMs")(error));
}

/// Splits like QEMU: at commas that are not doubled.
fn split_like_qemu(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(character) = rest.next() {
        if character == ',' && rest.peek() != Some(&',') {
            parts.push(String::new());
            continue;
        }
        if character == ',' {
            rest.next();
        }
        parts.last_mut().expect("never empty").push(character);
    }
    parts
}

#[test]
fn commas_and_newlines_in_paths_and_command_lines_stay_values() {
    let odd = Resources { runtime_dir: "/run/a,server=off,b".into(), ..resources() };
    let spec = ResolvedSpec { cmdline: "-daemonize,x=y -incoming exec:id".into(), ..spec() };
    let arguments = qemu_arguments(&spec, &odd).expect("arguments");
    let vnc = arguments.windows(2).find(|pair| pair[0] == "-vnc").expect("VNC");
    assert_eq!(split_like_qemu(&vnc[1]), ["unix:/run/a,server=off,b/own/vnc"]);
    let position = arguments.iter().position(|argument| *argument == spec.cmdline).expect("passed unchanged");
    assert_eq!(arguments[position - 1], "-append");
}

proptest! {
    /// Whatever text reaches a value, the number of arguments and QEMU's view of keys stay the same, or the spec is refused.
    #[test]
    fn prop_no_text_of_a_spec_becomes_an_option(
        cmdline in "[ -~]{0,99}|.*",
        machine in "[a-z0-9.-]{1,20}|[ -~]{0,20}|.*",
        cpu in "[A-Za-z0-9-]{1,20}|[ -~]{0,20}|.*",
        directory in "[ -~]{0,60}|.*",
    ) {
        let plain = qemu_arguments(&spec(), &resources()).expect("arguments");
        let odd = ResolvedSpec { cmdline, machine, cpu, ..spec() };
        if let Ok(arguments) = qemu_arguments(&odd, &Resources { runtime_dir: format!("/{directory}").into(), ..resources() }) {
            prop_assert_eq!(arguments.len(), plain.len());
            for (index, (argument, usual)) in arguments.iter().zip(&plain).enumerate() {
                if usual == &spec().cmdline {
                    prop_assert_eq!(&arguments[index - 1], "-append");
                } else if usual.starts_with('{') {
                    prop_assert!(serde_json::from_str::<serde_json::Value>(argument).is_ok());
                } else {
                    prop_assert_eq!(split_like_qemu(argument).len(), split_like_qemu(usual).len());
                }
            }
        }
    }
}

#[test]
fn a_seed_is_a_read_only_disk_at_a_place_of_its_own() {
    let spec = ResolvedSpec { cloud_init: Some(godwit_model::CloudInit::default()), ..spec() };
    let error = qemu_arguments(&spec, &resources()).expect_err("no seed was made");
    assert!(matches!(error, CommandError::Count { what: "seeds", wanted: 1, given: 0 }), "{error:?}");
    let text = lines(&qemu_arguments(&spec, &Resources { seed: Some(33), ..resources() }).expect("arguments"));
    let expected = [
        "-add-fd fd=33,set=200,opaque=seed",
        r#"-blockdev {"driver":"file","node-name":"seed-file","filename":"/dev/fdset/200","locking":"off","read-only":true,"auto-read-only":false}"#,
        r#"-blockdev {"driver":"raw","node-name":"seed","file":"seed-file","read-only":true}"#,
        r#"-device {"driver":"virtio-blk-pci","id":"seed-device","bus":"pcie.0","addr":"0x1e","disable-legacy":"on","disable-modern":false,"drive":"seed","serial":"seed","num-queues":1,"logical_block_size":512,"physical_block_size":512}"#,
    ];
    for line in expected {
        assert!(text.lines().any(|other| other == line), "{line} is not in {text}");
    }
}

#[test]
fn nobody_waits_for_a_connection_that_another_has_taken() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut fds = PassedFds::new();
    Sockets::in_dir(dir.path()).listen(&mut fds).expect("sockets");
    assert_eq!(fds.all().count(), 3);
    for fd in fds.all() {
        let flags = rustix::fs::fcntl_getfl(fd).expect("flags");
        assert!(flags.contains(rustix::fs::OFlags::NONBLOCK), "{flags:?}");
    }
}
