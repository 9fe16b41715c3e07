//! Networks on bridges that the host has already. They are used as they are: nothing about such a bridge is changed, now or at the end.
//!
//! ```text
//!  VM ── tap gwt… ── bridge br0 ── uplink eth0              the bridge's own frames
//!  VM ── tap gwt… ── bridge gwvb… ── VLAN gwvl… of eth0     a VLAN of its uplink
//! ```
//! A VLAN gets a bridge of ours, over a VLAN interface on the one port of the given bridge that is no tap. The given bridge itself would
//! have to filter by VLAN, and a VLAN interface on top of it would flood other guests there with tagged frames.

use std::collections::BTreeSet;

use godwit_model::{BridgeName, HostBridge, VlanId};

use super::netlink::{Link, LinkChange, LinkKind};
use super::{FleetNetworks, Inner, Kind, NetworkError, State, disable_ipv6, kernel};

/// Bridges of ours for VLANs.
const BRIDGE: &str = "gwvb";
const VLAN: &str = "gwvl";
/// Written before bridge and VLAN into the alias of a bridge of ours.
const ALIAS: &str = "godwit-vlan:";

fn alias(bridge: &BridgeName, vlan: VlanId) -> String {
    format!("{ALIAS}{bridge} {vlan}")
}

/// The one port of a bridge by which frames leave the host, if there is exactly one that can be it.
fn uplink<'a>(bridge: &Link, links: &'a [Link]) -> Option<&'a Link> {
    let mut ports = links.iter().filter(|link| link.master == Some(bridge.index) && link.kind != LinkKind::Tap);
    let first = ports.next()?;
    ports.next().is_none().then_some(first)
}

fn is_ours(bridge: &Link) -> bool {
    bridge.alias.as_ref().is_some_and(|alias| alias.starts_with(super::ALIAS) || alias.starts_with(ALIAS))
}

/// The bridges that the host offers.
pub(super) fn offered(links: &[Link]) -> Vec<HostBridge> {
    let bridges = links.iter().filter(|link| link.kind == LinkKind::Bridge && !is_ours(link));
    let offer = |bridge: &Link| HostBridge {
        name: bridge.name.clone(),
        mtu: bridge.mtu,
        uplink: uplink(bridge, links).map(|uplink| uplink.name.clone()),
    };
    bridges.map(offer).collect()
}

/// The bridge that taps of such a network are attached to.
pub(super) fn find<'a>(bridge: &BridgeName, vlan: Option<VlanId>, links: &'a [Link]) -> Option<&'a Link> {
    let mut bridges = links.iter().filter(|link| link.kind == LinkKind::Bridge);
    match vlan {
        None => bridges.find(|link| link.name == bridge.as_str() && !is_ours(link)),
        Some(vlan) => bridges.find(|link| link.alias.as_ref() == Some(&alias(bridge, vlan))),
    }
}

impl Inner {
    /// Makes the bridge of a VLAN. A host that does not have the given bridge, where its uplink cannot be told, or whose kernel knows no VLANs,
    /// does not offer the network: no failure.
    pub(super) async fn apply_vlan(
        &self,
        bridge: &BridgeName,
        vlan: VlanId,
        links: &[Link],
        state: &mut State,
    ) -> Result<(), NetworkError> {
        let Some(given) = find(bridge, None, links) else { return Ok(()) };
        let Some(uplink) = uplink(given, links) else { return Ok(()) };
        let on_uplink = LinkKind::Vlan { of: uplink.index, id: vlan.get() };
        let known = find(bridge, Some(vlan), links);
        let port = links.iter().find(|link| link.kind == on_uplink);
        if let Some(port) = port.filter(|port| port.master.is_none() || port.master != known.map(|known| known.index)) {
            return Err(NetworkError::VlanTaken { vlan, interface: port.name.clone(), uplink: uplink.name.clone() });
        }
        let ours = match known {
            Some(ours) => ours.clone(),
            None => {
                let name = format!("{BRIDGE}{}.{vlan}", given.index);
                self.netlink.add_bridge(&name).await.map_err(kernel("make", &name))?;
                let made = self.made(&name).await?;
                let change = LinkChange { alias: Some(alias(bridge, vlan)), ..LinkChange::default() };
                self.netlink.change(made.index, change).await.map_err(kernel("configure", &name))?;
                made
            }
        };
        // After a change of the uplink what is left of the one before would lead elsewhere.
        for stale in links.iter().filter(|link| link.master == Some(ours.index) && is_vlan(link) && link.kind != on_uplink) {
            self.netlink.delete(stale.index).await.map_err(kernel("remove", &stale.name))?;
        }
        let port = match port {
            Some(port) => port.clone(),
            None => {
                let name = format!("{VLAN}{}.{vlan}", given.index);
                let made = self.netlink.add_vlan(&name, uplink.index, vlan.get(), ours.index).await;
                state.no_vlans = made.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EOPNOTSUPP));
                if state.no_vlans {
                    return self.netlink.delete(ours.index).await.map_err(kernel("remove", &ours.name));
                }
                made.map_err(kernel("make", &name))?;
                self.made(&name).await?
            }
        };
        for link in [&port, &ours] {
            let change = LinkChange { mtu: Some(uplink.mtu).filter(|mtu| *mtu != link.mtu), up: !link.up, ..LinkChange::default() };
            if change != LinkChange::default() {
                disable_ipv6(&link.name);
                self.netlink.change(link.index, change).await.map_err(kernel("configure", &link.name))?;
            }
        }
        Ok(())
    }

    /// Removes bridges of VLANs that the fleet does not name any more, once no VM is on them.
    pub(super) async fn remove_other_vlans(&self, fleet: &FleetNetworks, links: &[Link]) -> Result<(), NetworkError> {
        let wanted: BTreeSet<String> = fleet
            .networks
            .iter()
            .filter_map(|network| match &network.kind {
                Kind::Bridge { bridge, vlan: Some(vlan) } => Some(alias(bridge, *vlan)),
                _ => None,
            })
            .collect();
        let stale = |link: &&Link| link.alias.as_ref().is_some_and(|alias| alias.starts_with(ALIAS) && !wanted.contains(alias));
        for bridge in links.iter().filter(stale) {
            let (ours, others): (Vec<_>, Vec<_>) =
                links.iter().filter(|link| link.master == Some(bridge.index)).partition(|link| is_vlan(link));
            if !others.is_empty() {
                continue;
            }
            for link in ours.into_iter().chain([bridge]) {
                self.netlink.delete(link.index).await.map_err(kernel("remove", &link.name))?;
            }
        }
        Ok(())
    }
}

fn is_vlan(link: &Link) -> bool {
    link.name.starts_with(VLAN) && matches!(link.kind, LinkKind::Vlan { .. })
}
