//! The machine itself: type, firmware, CPU, clock, and what the guest reads about its maker.

use godwit_model::{Accelerator, Firmware, Hyperv, ResolvedSpec, RtcBase, RtcDrift, Smbios};

use super::options::Pairs;
use super::{CommandError, Line, memory};

/// `windows_v1`, for ever: each is known to QEMU 7.2 and moves with the VM. What ties a VM to one host's clock rate is not among them.
const WINDOWS_V1: [&str; 11] = [
    "hv-relaxed",
    "hv-vapic",
    "hv-vpindex",
    "hv-runtime",
    "hv-synic",
    "hv-stimer",
    "hv-time",
    "hv-frequencies",
    "hv-reset",
    "hv-tlbflush",
    "hv-ipi",
];

/// A spec may have crossed the network since it was validated.
pub(super) fn check(spec: &ResolvedSpec) -> Result<(), CommandError> {
    let printable =
        |text: &String, longest: usize| (1..=longest).contains(&text.len()) && text.bytes().all(|b| (b' '..=b'~').contains(&b));
    let Smbios { manufacturer, product, version, serial, sku, family, oem_strings } = &spec.platform.smbios;
    let texts = [manufacturer, product, version, serial, sku, family];
    if !texts.into_iter().flatten().all(|text| printable(text, 64)) || oem_strings.len() > 16 {
        return Err(CommandError::Text("an SMBIOS text"));
    }
    if !oem_strings.iter().all(|text| printable(text, 255)) {
        return Err(CommandError::Text("an OEM string"));
    }
    if spec.platform.hyperv != Hyperv::Off && spec.accelerator != Accelerator::Kvm {
        return Err(CommandError::Unsupported("a Hyper-V enlightenment without KVM"));
    }
    Ok(())
}

pub(super) fn add(line: &mut Line, spec: &ResolvedSpec, node: Option<u32>) {
    let platform = &spec.platform;
    let secure_boot = matches!(platform.firmware, Firmware::Uefi { secure_boot: true, .. });
    // Variables that decide what may boot are written in system management mode only.
    let smm = if secure_boot { "on" } else { "off" };
    let machine = Pairs::new().first(&spec.machine).with("usb", "off").with("vmport", "off").with("smm", smm);
    // Merging equal pages across VMs lets one team's VM measure another's memory.
    let machine = machine.with("dump-guest-core", "off").with("mem-merge", "off");
    let uefi = platform.firmware.is_uefi();
    let machine = if uefi { machine.with("pflash0", "firmware").with("pflash1", "variables") } else { machine };
    let machine = if memory::has_backend(platform, node) { machine.with("memory-backend", memory::RAM) } else { machine };
    line.pairs("-machine", machine);
    if secure_boot {
        line.pairs("-global", Pairs::new().with("driver", "cfi.pflash01").with("property", "secure").with("value", "on"));
    }
    add_accelerator(line, spec.accelerator, spec.vcpus);
    let mut cpu = Pairs::new().first(&spec.cpu).first("enforce");
    if platform.hyperv == Hyperv::WindowsV1 {
        cpu = WINDOWS_V1.iter().fold(cpu.with("hv-spinlocks", "0x1fff"), |cpu, flag| cpu.with(flag, "on"));
    }
    line.pairs("-cpu", cpu);
    line.pairs("-smp", Pairs::new().with("cpus", spec.vcpus).with("sockets", 1).with("cores", spec.vcpus).with("threads", 1));
    memory::add(line, spec, node);
    line.pairs("-overcommit", Pairs::new().with("mem-lock", "off"));
    let base = match platform.rtc.base {
        RtcBase::Utc => "utc",
        RtcBase::Localtime => "localtime",
    };
    let drift = match platform.rtc.drift {
        RtcDrift::Slew => "slew",
        RtcDrift::Drop => "none",
    };
    line.pairs("-rtc", Pairs::new().with("base", base).with("driftfix", drift));
    line.pairs("-boot", Pairs::new().with("menu", "off").with("strict", "on"));
    add_smbios(line, &platform.smbios);
    line.option("-display", "none");
}

pub(super) fn add_accelerator(line: &mut Line, accelerator: Accelerator, vcpus: u16) {
    // With a thread for each QEMU 10.0 was seen to abort while a guest places its PCI devices (`iotlb_to_section`). No guest sees which it is,
    // and nothing of it travels.
    let threads = if vcpus > 1 { "single" } else { "multi" };
    line.pairs(
        "-accel",
        match accelerator {
            Accelerator::Kvm => Pairs::new().first("kvm"),
            // The translation cache, in MiB, grows to this and is no guest RAM.
            Accelerator::Tcg => Pairs::new().first("tcg").with("thread", threads).with("tb-size", 256),
        },
    );
}

fn add_smbios(line: &mut Line, smbios: &Smbios) {
    let Smbios { manufacturer, product, version, serial, sku, family, oem_strings } = smbios;
    let texts = [
        ("manufacturer", manufacturer),
        ("product", product),
        ("version", version),
        ("serial", serial),
        ("sku", sku),
        ("family", family),
    ];
    let texts: Vec<_> = texts.into_iter().filter_map(|(key, text)| Some((key, text.as_ref()?))).collect();
    if !texts.is_empty() {
        line.pairs("-smbios", texts.into_iter().fold(Pairs::new().with("type", 1), |pairs, (key, text)| pairs.with(key, text)));
    }
    if !oem_strings.is_empty() {
        line.pairs("-smbios", oem_strings.iter().fold(Pairs::new().with("type", 11), |pairs, text| pairs.with("value", text)));
    }
}
