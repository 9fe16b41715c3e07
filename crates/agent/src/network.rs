//! The host's layer 2: for each network a bridge with the taps of the VMs here and a VXLAN to the other hosts.
//!
//! ```text
//!  VM ── tap gwt… ──┐
//!  VM ── tap gwt… ──┴─ bridge gwbr<vni> ── VXLAN gwvx<vni> ══ UDP 4789 ══ gwvx<vni> of the other hosts
//! ```
//! Frames to unknown and to all addresses go to every member of the fleet; an address goes where it was last heard or where the fleet said
//! it is. What the fleet says is an entry that the kernel may move: after a move of a VM its announcement is faster than the controller.
//! Everything is made in the network namespace of the thread that calls [`HostNetwork::open`]. The host itself has no address there.

mod announce;
mod netlink;
mod tap;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use godwit_model::{ErrorCode, HostCondition, MacAddress, Name, Refusal, Retry, VmId};
use tokio::sync::Mutex;
use tokio::task::AbortHandle;

use netlink::{Forward, Link, LinkChange, Netlink, Vxlan};

/// UDP port of VXLAN.
const PORT: u16 = 4789;
const BRIDGE: &str = "gwbr";
const VXLAN: &str = "gwvx";
/// Written before the network's name into the alias of its bridge, so that a restarted agent knows its networks before the controller
/// has spoken.
const ALIAS: &str = "godwit:";
/// What the underlay is taken to carry if its interface cannot be found.
const ETHERNET_MTU: u32 = 1_500;

/// What the networks of this host should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FleetNetworks {
    /// Underlay addresses of all hosts, this one's included or not.
    pub(crate) members: Vec<IpAddr>,
    /// Networks with their VXLAN ids.
    pub(crate) networks: Vec<(Name, u32)>,
    /// Where each interface of a VM is: its address, its network, the underlay address of its host.
    pub(crate) locations: Vec<(MacAddress, Name, IpAddr)>,
}

/// Why the network could not be made as it should be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    /// The kernel refused something about an interface.
    #[error("the kernel refused to {doing} {interface}")]
    Kernel {
        /// What was tried.
        doing: &'static str,
        /// With which interface.
        interface: String,
        /// Its reason.
        #[source]
        source: io::Error,
    },
    /// No tap could be made.
    #[error("no tap could be made for interface {slot} of VM {vm}")]
    Tap {
        /// Whose.
        vm: VmId,
        /// Which.
        slot: usize,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The fleet has not named this network yet.
    #[error("this host does not know network {0}")]
    Unknown(Name),
}

impl From<NetworkError> for Refusal {
    fn from(error: NetworkError) -> Self {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
        let refusal = Self::new(ErrorCode::HostFailed, format!("{error}{cause}")).retry(Retry::Safe);
        match error {
            NetworkError::Unknown(_) => {
                refusal.hint("the host learns its networks from the controller: try again once it is connected")
            }
            NetworkError::Kernel { .. } => {
                refusal.hint("check that the agent has CAP_NET_ADMIN and that the kernel has the bridge and vxlan modules")
            }
            NetworkError::Tap { .. } => refusal.hint("check that /dev/net/tun exists and that the agent may open it"),
        }
    }
}

fn kernel(doing: &'static str, interface: &str) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Kernel { doing, interface: interface.to_owned(), source }
}

/// The networks of this host. Cheap to clone.
#[derive(Clone)]
pub(crate) struct HostNetwork {
    inner: Arc<Inner>,
}

struct Inner {
    underlay: IpAddr,
    netlink: Netlink,
    /// Held while links are changed: a network is not removed while it gets a tap.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    networks: BTreeMap<Name, u32>,
    /// What was last pushed: an entry is written when the fleet changes its mind, not over what the kernel has learned since.
    pushed: HashMap<(u32, [u8; 6]), IpAddr>,
}

impl HostNetwork {
    /// Opens the namespace's links; networks that an earlier agent made are known at once.
    ///
    /// # Errors
    /// The kernel's reason.
    pub(crate) async fn open(underlay: IpAddr) -> Result<Self, NetworkError> {
        let netlink = Netlink::open().map_err(kernel("open", "its netlink socket"))?;
        let links = netlink.links().await.map_err(kernel("list", "its links"))?;
        let networks = links.iter().filter_map(|link| {
            let name = link.alias.as_deref()?.strip_prefix(ALIAS)?;
            Some((Name::new(name).ok()?, vni_of(link)?))
        });
        let state = Mutex::new(State { networks: networks.collect(), pushed: HashMap::new() });
        Ok(Self { inner: Arc::new(Inner { underlay, netlink, state }) })
    }

    /// Makes the networks what the fleet says; what is so already is left alone. A network that the fleet does not name any more is removed
    /// once no tap is on it. One network that fails does not keep the others from being made.
    ///
    /// # Errors
    /// The first thing that could not be done.
    pub(crate) async fn apply(&self, fleet: &FleetNetworks) -> Result<(), NetworkError> {
        let mut state = self.inner.state.lock().await;
        let links = self.inner.netlink.links().await.map_err(kernel("list", "its links"))?;
        let mtu = self.inner.guest_mtu(&links).await?;
        let mut result = self.inner.remove_others(fleet, &links, &mut state).await;
        for (name, vni) in &fleet.networks {
            let one = match self.inner.apply_network(name, *vni, mtu, &links).await {
                Ok(vxlan) => {
                    state.networks.insert(name.clone(), *vni);
                    self.inner.apply_forwards(fleet, name, *vni, vxlan, &mut state).await
                }
                Err(error) => Err(error),
            };
            result = result.and(one);
        }
        result
    }

    /// Makes a tap on the network's bridge: `IFF_VNET_HDR`, gone with its last descriptor, with the MTU of the bridge.
    ///
    /// # Errors
    /// [`NetworkError::Unknown`] before the fleet has named the network, else the kernel's reason.
    pub(crate) async fn create_tap(&self, network: &Name, vm: VmId, slot: usize) -> Result<OwnedFd, NetworkError> {
        let state = self.inner.state.lock().await;
        let unknown = || NetworkError::Unknown(network.clone());
        let bridge = format!("{BRIDGE}{}", state.networks.get(network).ok_or_else(unknown)?);
        let netlink = &self.inner.netlink;
        let bridge = netlink.link(&bridge).await.map_err(kernel("find", &bridge))?.ok_or_else(unknown)?;
        let (tap, name) = tap::create(vm, slot).map_err(|source| NetworkError::Tap { vm, slot, source })?;
        disable_ipv6(&name);
        let link = netlink.link(&name).await.and_then(|link| link.ok_or_else(|| io::ErrorKind::NotFound.into()));
        let index = link.map_err(kernel("find", &name))?.index;
        let change =
            LinkChange { mtu: Some(bridge.mtu), master: Some(bridge.index), alias: Some(format!("{vm} {slot}")), up: true };
        netlink.change(index, change).await.map_err(kernel("attach", &name))?;
        Ok(tap)
    }

    /// Announces that `macs` are here now, several times over the next two seconds, and makes the bridge forget that they were elsewhere.
    /// Abort the task when the VM leaves again while it still runs.
    pub(crate) fn announce(&self, network: &Name, macs: Vec<MacAddress>) -> AbortHandle {
        let (inner, network) = (Arc::clone(&self.inner), network.clone());
        let task = tokio::spawn(async move {
            if let Err(error) = inner.announce(&network, &macs).await {
                tracing::warn!(%network, error = &error as &dyn std::error::Error, "addresses were not announced");
            }
        });
        task.abort_handle()
    }

    /// What about this host limits its guests' networks.
    pub(crate) async fn conditions(&self) -> Vec<HostCondition> {
        let mut conditions = Vec::new();
        let filters = ["iptables", "ip6tables", "arptables"].map(|filter| format!("bridge-nf-call-{filter}"));
        let on =
            |name: &String| std::fs::read_to_string(format!("/proc/sys/net/bridge/{name}")).is_ok_and(|text| text.trim() == "1");
        let on: Vec<String> = filters.into_iter().filter(on).collect();
        if !on.is_empty() {
            conditions.push(HostCondition {
                name: "bridge_netfilter".to_owned(),
                message: format!("{} on: the host's firewall also filters frames between guests", on.join(", ")),
                fix: on.iter().map(|name| format!("sysctl -w net.bridge.{name}=0")).collect::<Vec<_>>().join("; "),
            });
        }
        let links = self.inner.netlink.links().await.unwrap_or_default();
        if let Ok(mtu @ ..ETHERNET_MTU) = self.inner.guest_mtu(&links).await {
            let wanted = ETHERNET_MTU + overhead(self.inner.underlay);
            conditions.push(HostCondition {
                name: "underlay_mtu".to_owned(),
                message: format!("networks here carry {mtu} bytes, guests send up to {ETHERNET_MTU}: longer frames are lost"),
                fix: format!(
                    "set the MTU of the interface with {} to at least {wanted}, or that of the guests to {mtu}",
                    self.inner.underlay
                ),
            });
        }
        conditions
    }
}

impl Inner {
    /// What is left of the underlay's MTU.
    async fn guest_mtu(&self, links: &[Link]) -> Result<u32, NetworkError> {
        let index = self.netlink.index_of_address(self.underlay).await.map_err(kernel("list", "its addresses"))?;
        let underlay = links.iter().find(|link| Some(link.index) == index).map_or(ETHERNET_MTU, |link| link.mtu);
        Ok(underlay.saturating_sub(overhead(self.underlay)))
    }

    async fn remove_others(&self, fleet: &FleetNetworks, links: &[Link], state: &mut State) -> Result<(), NetworkError> {
        let wanted = |vni| fleet.networks.iter().any(|(_, wanted)| *wanted == vni);
        state.networks.retain(|name, vni| fleet.networks.iter().any(|(n, v)| n == name && v == vni));
        for (bridge, vni) in links.iter().filter_map(|link| Some((link, vni_of(link)?))).filter(|(_, vni)| !wanted(*vni)) {
            let (ours, taps): (Vec<_>, Vec<_>) =
                links.iter().filter(|link| link.master == Some(bridge.index)).partition(|link| link.vxlan.is_some());
            if !taps.is_empty() {
                continue;
            }
            for link in ours.into_iter().chain([bridge]) {
                self.netlink.delete(link.index).await.map_err(kernel("remove", &link.name))?;
            }
            state.pushed.retain(|(of, _), _| *of != vni);
        }
        Ok(())
    }

    /// Makes the bridge and the VXLAN, and returns the index of the latter.
    async fn apply_network(&self, name: &Name, vni: u32, mtu: u32, links: &[Link]) -> Result<u32, NetworkError> {
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
        if let Some(other) = vxlan.take_if(|link| link.vxlan != Some(wanted)) {
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
        for (link, master, alias) in [(&vxlan, Some(bridge.index), None), (&bridge, None, Some(format!("{ALIAS}{name}")))] {
            let change = LinkChange {
                mtu: Some(mtu).filter(|mtu| *mtu != link.mtu),
                master: master.filter(|_| link.master != master),
                alias: alias.filter(|alias| link.alias.as_ref() != Some(alias)),
                up: !link.up,
            };
            if change.mtu.is_some() || change.master.is_some() || change.alias.is_some() || change.up {
                disable_ipv6(&link.name);
                self.netlink.change(link.index, change).await.map_err(kernel("configure", &link.name))?;
            }
        }
        Ok(vxlan.index)
    }

    async fn made(&self, name: &str) -> Result<Link, NetworkError> {
        let link = self.netlink.link(name).await.and_then(|link| link.ok_or_else(|| io::ErrorKind::NotFound.into()));
        link.map_err(kernel("find", name))
    }

    async fn apply_forwards(
        &self,
        fleet: &FleetNetworks,
        network: &Name,
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
            fleet.locations.iter().filter(|(_, on, _)| on == network).map(|(mac, _, at)| (mac.0, *at)).collect();
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

    async fn announce(&self, network: &Name, macs: &[MacAddress]) -> Result<(), NetworkError> {
        let known = self.state.lock().await.networks.get(network).copied();
        let vni = known.ok_or_else(|| NetworkError::Unknown(network.clone()))?;
        let (bridge, vxlan) = (format!("{BRIDGE}{vni}"), format!("{VXLAN}{vni}"));
        let (from, port) = (self.made(&bridge).await?.index, self.made(&vxlan).await?.index);
        let sender = announce::open_sender(from).map_err(kernel("send on", &bridge))?;
        for pause in announce::PAUSES {
            tokio::time::sleep(pause).await;
            for mac in macs {
                // What the bridge sends itself teaches it nothing: it would go on sending the VM's frames to the host that it left.
                self.netlink.forget_on_port(port, mac.0).await.map_err(kernel("clear an entry of", &vxlan))?;
                match rustix::io::write(&sender, &announce::frame(*mac)) {
                    // A full queue: the next one will do.
                    Ok(_) | Err(rustix::io::Errno::NOBUFS | rustix::io::Errno::AGAIN) => {}
                    Err(error) => return Err(kernel("send on", &bridge)(error.into())),
                }
            }
        }
        Ok(())
    }
}

/// Headers that VXLAN puts before a frame's payload: the inner Ethernet, VXLAN, UDP, IP.
const fn overhead(underlay: IpAddr) -> u32 {
    14 + 8 + 8 + if underlay.is_ipv4() { 20 } else { 40 }
}

fn vni_of(bridge: &Link) -> Option<u32> {
    bridge.name.strip_prefix(BRIDGE)?.parse().ok()
}

/// Keeps the host's own IPv6 off the guests' network: no address there, and no frames of the host's own.
fn disable_ipv6(interface: &str) {
    match std::fs::write(format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"), "1") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(interface, %error, "the host's IPv6 could not be kept off an interface of guests");
        }
        _ => {}
    }
}
