//! What plain QEMUs get on a host that Godwit would make for its VMs: the machine, its disk, and the guests' network.

use std::fmt::Write;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use godwit_lab::Lab;
use godwit_lab::layout::{DEFAULT_NETWORK_ID, OUTSIDE_ADDRESS, VXLAN_PORT, host_address, host_number};
use serde_json::json;

use super::journey::HOSTS;
use super::scenario::Scenario;
use super::system::System;
use super::wire::OVERLAY;
use crate::artefacts::{CloudImage, GuestImages, cloud_image, guest_images};
use crate::command::{run, run_with_input, text};
use crate::guest::command_line;

const BRIDGE: &str = "gwbr1";

/// The address of a guest, counted from 0.
pub(super) const fn address(guest: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 99, 0, 10 + guest)
}

/// What the guests of a row boot.
pub(super) struct Ground {
    images: GuestImages,
    /// By guest; none where nothing is on disk.
    disks: Vec<PathBuf>,
}

impl Ground {
    /// Makes the disks in a directory that both hosts reach.
    pub(super) fn make(scenario: Scenario, dir: &Path) -> Result<Self> {
        let GuestImages { kernel, initrd } = guest_images()?;
        if scenario.debian().is_none() {
            return Ok(Self { images: GuestImages { kernel, initrd }, disks: Vec::new() });
        }
        let CloudImage { disk, boot } = cloud_image()?;
        let read = |path: &Path| fs::read(path).with_context(|| path.display().to_string());
        let both = dir.join("initrd");
        fs::write(&both, [read(&initrd)?, read(&boot)?].concat()).with_context(|| both.display().to_string())?;
        let disks: Vec<PathBuf> = (0..scenario.guests()).map(|guest| dir.join(format!("{guest}.qcow2"))).collect();
        for of_guest in &disks {
            run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", text(&disk)?, text(of_guest)?])?;
        }
        Ok(Self { images: GuestImages { kernel, initrd: both }, disks })
    }
}

fn tap(guest: u8) -> String {
    format!("gwt{guest}")
}

/// The machine that an agent gives to an emulated VM of that size, without what a bench has no use for.
pub(super) fn arguments(system: System, scenario: Scenario, ground: &Ground, guest: u8, monitor: &Path) -> Result<Vec<String>> {
    let mut all = vec!["-nodefaults".to_owned(), "-no-user-config".to_owned(), "-no-reboot".to_owned()];
    let mut option = |name: &str, value: &str| all.extend([name.to_owned(), value.to_owned()]);
    option("-name", "guest=peer,debug-threads=on");
    option("-machine", "q35,usb=off,vmport=off,smm=off,dump-guest-core=off,mem-merge=off");
    option("-accel", "tcg,thread=multi,tb-size=256");
    option("-cpu", "qemu64-v1,enforce");
    option("-smp", "cpus=1");
    option("-m", &format!("size={}k", scenario.memory().get() >> 10));
    option("-overcommit", "mem-lock=off");
    option("-display", "none");
    option("-qmp", &format!("unix:{},server=on,wait=off", text(monitor)?));
    option("-chardev", "null,id=console");
    option("-device", "isa-serial,chardev=console");
    option("-object", "rng-builtin,id=entropy");
    option("-device", "virtio-rng-pci,rng=entropy,disable-legacy=on");
    option("-device", "virtio-balloon-pci,disable-legacy=on,deflate-on-oom=on");
    option("-device", "VGA,vgamem_mb=8");
    if let Some(disk) = ground.disks.get(usize::from(guest)) {
        let cache = json!({ "direct": true });
        let file = json!({ "driver": "file", "filename": disk, "aio": "threads", "discard": "unmap", "cache": cache });
        let node = json!({ "driver": "qcow2", "node-name": "disk", "file": file, "discard": "unmap", "cache": cache });
        option("-blockdev", &node.to_string());
        option("-device", "virtio-blk-pci,drive=disk,disable-legacy=on,num-queues=1,write-cache=on");
    }
    option("-netdev", &format!("tap,id=nic,ifname={},script=no,downscript=no,vhost=off", tap(guest)));
    option("-device", &format!("virtio-net-pci,netdev=nic,mac=52:54:00:00:00:{:02x},disable-legacy=on,romfile=", 0x10 + guest));
    option("-kernel", text(&ground.images.kernel)?);
    option("-initrd", text(&ground.images.initrd)?);
    option("-append", &command_line(system.as_str(), address(guest), &scenario.words(), &scenario.knobs()));
    Ok(all)
}

/// The guests' network on a host: taps, a bridge, and a VXLAN to everybody, as the agent makes it.
pub(super) fn connect_guests(lab: &Lab, host: &str, guests: u8) -> Result<()> {
    let namespace = lab.namespace(host)?;
    let own = lab.address(host)?;
    let mut links = format!(
        "link add {BRIDGE} mtu 1500 type bridge stp_state 0 forward_delay 0\n\
         link add {OVERLAY} mtu 1500 type vxlan id {DEFAULT_NETWORK_ID} dstport {VXLAN_PORT} local {own} learning\n\
         link set {OVERLAY} master {BRIDGE} up\n\
         link set {BRIDGE} up\n"
    );
    for tap in (0..guests).map(tap) {
        // Writing to a string cannot fail.
        let _ = writeln!(links, "tuntap add {tap} mode tap\nlink set {tap} master {BRIDGE} up");
    }
    run_with_input("ip", &["-n", &namespace, "-batch", "-"], &links)?;
    let others = HOSTS.into_iter().filter_map(host_number).map(host_address).filter(|address| *address != own);
    let mut flood = String::new();
    for to in others.chain([OUTSIDE_ADDRESS]) {
        let _ = writeln!(flood, "fdb append 00:00:00:00:00:00 dev {OVERLAY} dst {to}");
    }
    run_with_input("bridge", &["-n", &namespace, "-batch", "-"], &flood)
}
