//! What plain QEMUs get on a host that Godwit would make for its VM: the machine, and the guests' network.

use std::fmt::Write;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::Result;
use godwit_lab::Lab;
use godwit_lab::layout::{DEFAULT_NETWORK_ID, OUTSIDE_ADDRESS, OUTSIDE_GUEST_ADDRESS, VXLAN_PORT, host_address, host_number};

use super::journey::HOSTS;
use super::scenario::{MEMORY, Scenario};
use super::system::System;
use super::wire::OVERLAY;
use crate::artefacts::GuestImages;
use crate::command::{run_with_input, text};
use crate::guest::KERNEL_WORDS;
use crate::outside::WITNESS_PORT;

/// The guest.
pub(super) const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 10);
const BRIDGE: &str = "gwbr1";
const TAP: &str = "gwt0";

/// The machine that an agent gives to an emulated VM of that size, without what a bench has no use for.
pub(super) fn arguments(system: System, scenario: Scenario, images: &GuestImages, monitor: &Path) -> Result<Vec<String>> {
    let own = [format!("id={system}"), format!("ip={ADDRESS}/24"), format!("witness={OUTSIDE_GUEST_ADDRESS}:{WITNESS_PORT}")];
    let words: Vec<String> = own.iter().chain(&scenario.knobs()).map(|word| format!("guest.{word}")).collect();
    let mut all = vec!["-nodefaults".to_owned(), "-no-user-config".to_owned(), "-no-reboot".to_owned()];
    let mut option = |name: &str, value: &str| all.extend([name.to_owned(), value.to_owned()]);
    option("-name", "guest=peer,debug-threads=on");
    option("-machine", "q35,usb=off,vmport=off,smm=off,dump-guest-core=off,mem-merge=off");
    option("-accel", "tcg,thread=multi,tb-size=256");
    option("-cpu", "qemu64-v1,enforce");
    option("-smp", "cpus=1");
    option("-m", &format!("size={}k", MEMORY.get() >> 10));
    option("-overcommit", "mem-lock=off");
    option("-display", "none");
    option("-qmp", &format!("unix:{},server=on,wait=off", text(monitor)?));
    option("-chardev", "null,id=console");
    option("-device", "isa-serial,chardev=console");
    option("-object", "rng-builtin,id=entropy");
    option("-device", "virtio-rng-pci,rng=entropy,disable-legacy=on");
    option("-device", "virtio-balloon-pci,disable-legacy=on,deflate-on-oom=on");
    option("-device", "VGA,vgamem_mb=8");
    option("-netdev", &format!("tap,id=nic,ifname={TAP},script=no,downscript=no,vhost=off"));
    option("-device", "virtio-net-pci,netdev=nic,mac=52:54:00:00:00:10,disable-legacy=on,romfile=");
    option("-kernel", text(&images.kernel)?);
    option("-initrd", text(&images.initrd)?);
    option("-append", &format!("{KERNEL_WORDS} {}", words.join(" ")));
    Ok(all)
}

/// The guests' network on a host: a tap, a bridge, and a VXLAN to everybody, as the agent makes it.
pub(super) fn connect_guests(lab: &Lab, host: &str) -> Result<()> {
    let namespace = lab.namespace(host)?;
    let own = lab.address(host)?;
    run_with_input(
        "ip",
        &["-n", &namespace, "-batch", "-"],
        &format!(
            "link add {BRIDGE} mtu 1500 type bridge stp_state 0 forward_delay 0\n\
             link add {OVERLAY} mtu 1500 type vxlan id {DEFAULT_NETWORK_ID} dstport {VXLAN_PORT} local {own} learning\n\
             tuntap add {TAP} mode tap\n\
             link set {OVERLAY} master {BRIDGE} up\n\
             link set {TAP} master {BRIDGE} up\n\
             link set {BRIDGE} up\n"
        ),
    )?;
    let others = HOSTS.into_iter().filter_map(host_number).map(host_address).filter(|address| *address != own);
    let mut flood = String::new();
    for to in others.chain([OUTSIDE_ADDRESS]) {
        // Writing to a string cannot fail.
        let _ = writeln!(flood, "fdb append 00:00:00:00:00:00 dev {OVERLAY} dst {to}");
    }
    run_with_input("bridge", &["-n", &namespace, "-batch", "-"], &flood)
}
