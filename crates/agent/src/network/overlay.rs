//! Overlays: a bridge and a VXLAN each, and the forwarding entries that say where other hosts and their VMs are.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use godwit_model::NetworkId;

use super::netlink::{Forward, Link, LinkChange, LinkKind, Vxlan};
use super::{BRIDGE, FleetNetwork, FleetNetworks, Inner, NetworkError, PORT, State, VXLAN, alias, disable_ipv6, kernel};

impl Inner {
    /// Makes the bridge and the VXLAN, and returns the index of the latter.
    pub(super) async fn apply_overlay(
        &self,
        network: &FleetNetwork,
        vni: u32,
        mtu: u32,
        links: &[Link],
    ) -> Result<u32, NetworkError> {
        let find = |name: &str| links.iter().find(|link| link.name == name).cloned();
        let bridge_name = format!("{BRIDGE}{vni}");
        let bridge = match find(&bridge_name) {
            Some(bridge) => bridge,
            None => {
                self.netlink.add_bridge(&bridge_name).await.map_err(kernel("make", &bridge_name))?;
                self.made(&bridge_name).await?
            }
        };
        let vxlan_name = format!("{VXLAN}{vni}");
        let wanted = Vxlan { vni, local: self.underlay, port: PORT };
        let mut vxlan = find(&vxlan_name);
        if let Some(other) = vxlan.take_if(|link| link.kind != LinkKind::Vxlan(wanted)) {
            self.netlink.delete(other.index).await.map_err(kernel("remove", &vxlan_name))?;
        }
        let vxlan = match vxlan {
            Some(vxlan) => vxlan,
            None => {
                self.netlink.add_vxlan(&vxlan_name, wanted, bridge.index).await.map_err(kernel("make", &vxlan_name))?;
                self.made(&vxlan_name).await?
            }
        };
        // The VXLAN first: a bridge that is set up while its ports are smaller would have to fragment.
        for (link, master, alias) in [(&vxlan, Some(bridge.index), None), (&bridge, None, Some(alias(network)))] {
            let change = LinkChange {
                mtu: Some(mtu).filter(|mtu| *mtu != link.mtu),
                master: master.filter(|_| link.master != master),
                alias: alias.filter(|alias| link.alias.as_ref() != Some(alias)),
                mac: None,
                up: !link.up,
            };
            if change != LinkChange::default() {
                disable_ipv6(&link.name);
                self.netlink.change(link.index, change).await.map_err(kernel("configure", &link.name))?;
            }
        }
        Ok(vxlan.index)
    }

    pub(super) async fn apply_forwards(
        &self,
        fleet: &FleetNetworks,
        network: NetworkId,
        vni: u32,
        vxlan: u32,
        state: &mut State,
    ) -> Result<(), NetworkError> {
        let interface = format!("{VXLAN}{vni}");
        let failed = || kernel("set a forwarding entry of", &interface);
        let present = self.netlink.forwards(vxlan).await.map_err(failed())?;
        let members: BTreeSet<IpAddr> =
            fleet.members.iter().copied().filter(|to| *to != self.underlay && to.is_ipv4() == self.underlay.is_ipv4()).collect();
        for to in &members {
            if !present.iter().any(|entry| entry.is_flood() && entry.to == *to) {
                self.netlink.add_flood(vxlan, *to).await.map_err(failed())?;
            }
        }
        for entry in present.iter().filter(|entry| entry.is_flood() && !members.contains(&entry.to)) {
            self.netlink.remove_forward(vxlan, *entry).await.map_err(failed())?;
        }

        let wanted: HashMap<[u8; 6], IpAddr> =
            fleet.locations.iter().filter(|(_, on, _)| *on == network).map(|(mac, _, at)| (mac.0, *at)).collect();
        for (mac, to) in &wanted {
            let known = present.iter().find(|entry| entry.mac == *mac);
            let news = state.pushed.get(&(vni, *mac)) != Some(to);
            match known {
                // A VM here is reached through its tap.
                Some(entry) if *to == self.underlay && news => self.netlink.remove_forward(vxlan, *entry).await,
                _ if *to == self.underlay => Ok(()),
                Some(entry) if entry.to == *to || !news => Ok(()),
                _ => self.netlink.set_forward(vxlan, Forward { mac: *mac, to: *to }).await,
            }
            .map_err(failed())?;
            state.pushed.insert((vni, *mac), *to);
        }
        let gone: Vec<[u8; 6]> =
            state.pushed.keys().filter(|(of, mac)| *of == vni && !wanted.contains_key(mac)).map(|(_, mac)| *mac).collect();
        for mac in gone {
            state.pushed.remove(&(vni, mac));
            for entry in present.iter().filter(|entry| entry.mac == mac) {
                self.netlink.remove_forward(vxlan, *entry).await.map_err(failed())?;
            }
        }
        Ok(())
    }
}
