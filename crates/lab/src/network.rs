//! The namespaces of a lab and what connects them: a bridge, one veth pair per place, the outside client's VXLAN.

use std::fmt::Write;
use std::fs;
use std::io;
use std::net::Ipv4Addr;

use crate::layout::{
    CONTROLLER_ADDRESS, DEFAULT_NETWORK_ID, OUTSIDE, OUTSIDE_ADDRESS, OUTSIDE_GUEST_ADDRESS, UNDERLAY_MTU, VXLAN_PORT,
    host_address, host_number, namespace, switch_port,
};
use crate::namespace::{NAMES, in_namespace};
use crate::{LabError, LabSpec, command};

/// The place of the switch and the controller.
pub(crate) const SWITCH: &str = "sw";

/// Builds everything but the limits of the links.
pub(crate) fn build(spec: &LabSpec) -> Result<(), LabError> {
    let switch = namespace(&spec.name, SWITCH);
    add_namespace(&switch)?;
    command::batch(
        "ip",
        &switch,
        &format!(
            "link set lo up\n\
             link add br0 mtu {UNDERLAY_MTU} type bridge stp_state 0 forward_delay 0\n\
             link set br0 up\n\
             addr add {CONTROLLER_ADDRESS}/24 dev br0\n"
        ),
    )?;
    for host in spec.host_names() {
        let number = host_number(&host).unwrap_or_default();
        attach(&spec.name, &host, host_address(number))?;
    }
    attach(&spec.name, OUTSIDE, OUTSIDE_ADDRESS)?;
    outside_client(spec)
}

/// A namespace for `place`, joined to the switch.
fn attach(lab: &str, place: &str, address: Ipv4Addr) -> Result<(), LabError> {
    let here = namespace(lab, place);
    let port = switch_port(place);
    add_namespace(&here)?;
    // Both ends are made inside their namespaces: no name ever appears in the root namespace.
    command::batch(
        "ip",
        &namespace(lab, SWITCH),
        &format!(
            "link add {port} mtu {UNDERLAY_MTU} type veth peer name eth0 mtu {UNDERLAY_MTU} netns {here}\n\
             link set {port} master br0 up\n"
        ),
    )?;
    command::batch("ip", &here, &format!("link set lo up\nlink set eth0 up\naddr add {address}/24 dev eth0\n"))
}

/// Lets the outside client speak with guests on the default network, wherever they are.
fn outside_client(spec: &LabSpec) -> Result<(), LabError> {
    let here = namespace(&spec.name, OUTSIDE);
    command::batch(
        "ip",
        &here,
        &format!(
            "link add guests type vxlan id {DEFAULT_NETWORK_ID} dstport {VXLAN_PORT} local {OUTSIDE_ADDRESS} learning\n\
             link set guests mtu 1500 up\n\
             addr add {OUTSIDE_GUEST_ADDRESS}/24 dev guests\n"
        ),
    )?;
    let mut flood = String::new();
    for number in 1..=spec.hosts {
        // Writing to a string cannot fail.
        let _ = writeln!(flood, "fdb append 00:00:00:00:00:00 dev guests dst {}", host_address(number));
    }
    command::batch("bridge", &here, &flood)
}

fn add_namespace(name: &str) -> Result<(), LabError> {
    command::run("ip", &["netns", "add", name])?;
    in_namespace(name, quiet)?
}

/// Keeps the kernel from adding traffic and filters of its own, and from dropping what takes another way back.
fn quiet() -> Result<(), LabError> {
    let settings = [
        ("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1"),
        ("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"),
        ("/proc/sys/net/ipv4/conf/all/rp_filter", "0"),
        ("/proc/sys/net/ipv4/conf/default/rp_filter", "0"),
        ("/proc/sys/net/bridge/bridge-nf-call-iptables", "0"),
        ("/proc/sys/net/bridge/bridge-nf-call-ip6tables", "0"),
        ("/proc/sys/net/bridge/bridge-nf-call-arptables", "0"),
    ];
    for (path, value) in settings {
        match fs::write(path, value) {
            Ok(()) => {}
            // A kernel without the feature needs no setting.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(LabError::file("write", path)(error)),
        }
    }
    Ok(())
}

/// The namespaces of a lab that exist now, whether or not a record knows them.
pub(crate) fn existing(lab: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(NAMES) else { return Vec::new() };
    let prefix = namespace(lab, "");
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| {
            name.strip_prefix(&prefix).is_some_and(|place| place == SWITCH || place == OUTSIDE || host_number(place).is_some())
        })
        .collect();
    names.sort();
    names
}

/// Removes a namespace; what is in it goes with it once no process holds it.
pub(crate) fn remove(name: &str) -> Result<(), LabError> {
    match command::run("ip", &["netns", "del", name]) {
        Err(LabError::Command { .. }) if !crate::namespace::path(name).exists() => Ok(()),
        other => other,
    }
}
