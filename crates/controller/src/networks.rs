//! Networks: their numbers, their MTU, and whether a host can take part in one.

use godwit_link::v1;
use godwit_model::network::{DEFAULT_OVERLAY_MTU, ETHERNET_MTU, NETWORK_MTU};
use godwit_model::{ErrorCode, HostNetworks, Name, NetworkId, NetworkKind, Refusal, ResolvedNic, ResolvedSpec};

use crate::checks::Candidate;
use crate::clock;
use crate::db::{Batch, Db, Fault, Stored};
use crate::rows::{NetworkRow, VniRow};

/// The network that there is from the beginning.
pub(crate) const DEFAULT_NETWORK: &str = "default";
/// Numbers of overlays have 24 bits; 0 is none.
const LAST_VNI: u32 = (1 << 24) - 1;

/// The number behind the last one given: one that was just freed may still be in frames under way, and in tables of hosts that are away.
fn next_vni(last: u32, taken: impl Fn(u32) -> bool) -> Option<u32> {
    let behind = |vni: u32| if vni >= LAST_VNI { 1 } else { vni + 1 };
    let mut vni = behind(last);
    for _ in 0..LAST_VNI {
        if !taken(vni) {
            return Some(vni);
        }
        vni = behind(vni);
    }
    None
}

/// A number for a new overlay, in the transaction that creates it.
pub(crate) async fn allocate(db: &Db, batch: Batch) -> Result<(u32, Batch), Fault> {
    let taken: std::collections::HashSet<u32> =
        db.all::<NetworkRow>().await?.iter().filter_map(|network| network.row.vni).collect();
    let last = db.find::<VniRow>("").await?;
    let vni = next_vni(last.as_ref().map_or(0, |last| last.row.last), |vni| taken.contains(&vni));
    let vni = vni.ok_or_else(|| {
        Refusal::new(ErrorCode::InUse, format!("all {LAST_VNI} numbers of overlays are taken")).hint("delete a network first")
    })?;
    let batch = match last {
        Some(mut last) => {
            last.row.last = vni;
            batch.update(&last)
        }
        None => batch.create(&VniRow { last: vni }),
    };
    Ok((vni, batch))
}

/// The MTU that a new network gets if none is wanted: what all connected hosts carry. It is kept: what a guest is told must not depend on
/// which hosts are there later.
pub(crate) fn default_mtu<'a>(kind: &NetworkKind, hosts: impl Iterator<Item = &'a HostNetworks>) -> u32 {
    let (carried, otherwise) = match kind {
        NetworkKind::Overlay {} => (hosts.filter_map(|host| host.overlay_mtu).min(), DEFAULT_OVERLAY_MTU),
        NetworkKind::Bridge { bridge, .. } => {
            let mtus = hosts.filter_map(|host| host.bridges.iter().find(|known| known.name == bridge.as_str()));
            (mtus.map(|known| known.mtu).min(), ETHERNET_MTU)
        }
    };
    // More than Ethernet's must be asked for: what is behind a gateway may not carry it.
    carried.unwrap_or(otherwise).clamp(*NETWORK_MTU.start(), ETHERNET_MTU)
}

/// Makes the default network, unless there once was a network.
pub(crate) async fn first_network(db: &Db, team: Name) -> Result<(), Fault> {
    if db.find::<VniRow>("").await?.is_some() {
        return Ok(());
    }
    let name = Name::new(DEFAULT_NETWORK).map_err(|_| Refusal::new(ErrorCode::Internal, "the default network has no name"))?;
    let (vni, batch) = allocate(db, Batch::default()).await?;
    let row = NetworkRow {
        id: NetworkId::new(clock::fresh()),
        name,
        team,
        kind: NetworkKind::default(),
        vni: Some(vni),
        mtu: DEFAULT_OVERLAY_MTU,
        created: clock::now(),
    };
    db.commit(batch.create(&row)).await
}

/// A network as agents are told of it.
pub(crate) fn told(row: &NetworkRow) -> v1::Network {
    let (bridge, vlan) = match &row.kind {
        NetworkKind::Overlay {} => (String::new(), 0),
        NetworkKind::Bridge { bridge, vlan } => (bridge.to_string(), vlan.map_or(0, |vlan| u32::from(vlan.get()))),
    };
    let (name, id) = (row.name.to_string(), row.id.to_string());
    v1::Network { name, vni: row.vni.unwrap_or(0), id, mtu: row.mtu, bridge, vlan }
}

/// Why `host` cannot take part in a network with frames of `mtu` bytes: what, and the fix.
pub(crate) fn lacks(row: &NetworkRow, mtu: u32, (host, networks): (&Name, &HostNetworks)) -> Option<(String, String)> {
    let name = &row.name;
    match &row.kind {
        NetworkKind::Overlay {} => {
            let carried = networks.overlay_mtu.filter(|carried| *carried < mtu)?;
            Some((
                format!("overlays on host {host} carry {carried} bytes, network {name} needs {mtu}"),
                format!("raise the MTU of {host}'s underlay by {}, or choose another host", mtu - carried),
            ))
        }
        NetworkKind::Bridge { bridge, vlan } => {
            let Some(known) = networks.bridges.iter().find(|known| known.name == bridge.as_str()) else {
                return Some((
                    format!("host {host} has no bridge {bridge} for network {name}"),
                    format!("make the bridge on {host}, or choose another host"),
                ));
            };
            if known.mtu < mtu {
                return Some((
                    format!("bridge {bridge} on host {host} carries {} bytes, network {name} needs {mtu}", known.mtu),
                    format!("raise the MTU of {bridge} on {host}, or choose another host"),
                ));
            }
            if let Some(vlan) = vlan.filter(|_| networks.no_vlans) {
                return Some((
                    format!("the kernel of host {host} knows no VLANs, network {name} is VLAN {vlan}"),
                    format!(
                        "load the module 8021q on {host} (CONFIG_VLAN_8021Q), or make a bridge for the VLAN and a network of that"
                    ),
                ));
            }
            let vlan = vlan.filter(|_| known.uplink.is_none())?;
            Some((
                format!("bridge {bridge} on host {host} has no port that is known to lead out, for VLAN {vlan} of network {name}"),
                format!("leave {bridge} one port besides those of VMs, or make a bridge for the VLAN and a network of that"),
            ))
        }
    }
}

fn of_nic<'a>(nic: &ResolvedNic, networks: &'a [Stored<NetworkRow>]) -> Option<&'a NetworkRow> {
    let same = |row: &&NetworkRow| nic.network_id.map_or(row.name == nic.network, |id| row.id == id);
    networks.iter().map(|stored| &stored.row).find(same)
}

/// Whether `host` can take part in all networks of a VM, and holds what it sends against its addresses. `networks` are those of its team.
pub(crate) fn check_networks(spec: &ResolvedSpec, networks: &[Stored<NetworkRow>], host: Candidate<'_>) -> Result<(), Refusal> {
    let load = &host.load.networks;
    for nic in &spec.nics {
        let row = of_nic(nic, networks).ok_or_else(|| network_missing(&nic.network))?;
        if let Some((message, fix)) = lacks(row, nic.mtu.unwrap_or(row.mtu), (host.name, load)) {
            return Err(Refusal::new(ErrorCode::HostIncompatible, message).hint(fix));
        }
    }
    if !load.filters && spec.nics.iter().any(|nic| !nic.addresses.is_empty()) {
        let message = format!("the VM's interfaces have addresses, and host {} cannot hold what they send against them", host.name);
        return Err(Refusal::new(ErrorCode::HostIncompatible, message)
            .hint(format!("`godwit host show {}` says what it lacks (condition `guest_filter`)", host.name)));
    }
    Ok(())
}

/// The VM names a network that is not there any more.
pub(crate) fn network_missing(network: &Name) -> Refusal {
    Refusal::new(ErrorCode::NotFound, format!("the VM needs network {network}, which does not exist"))
        .hint("`godwit network list` shows what there is; `godwit network create` makes one")
}

#[cfg(test)]
mod tests;
