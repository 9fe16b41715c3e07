//! The host's layer 2: the taps of the VMs here, on a bridge per network.
//!
//! ```text
//!  VM ── tap gwt… ──┐
//!  VM ── tap gwt… ──┴─ bridge gwbr<vni> ── VXLAN gwvx<vni> ══ UDP 4789 ══ gwvx<vni> of the other hosts
//! ```
//! Frames to unknown and to all addresses go to every member of the fleet; an address goes where it was last heard or where the fleet said
//! it is. Other networks are on bridges that the host has already (see `bridge`). What guests send, and who sends VXLAN, is filtered
//! (see `filter`). Everything is made in the network namespace of the thread that calls [`HostNetwork::open`].

mod announce;
mod bridge;
mod filter;
mod guard;
mod netlink;
mod nft;
mod overlay;
mod tap;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use godwit_model::network::{DEFAULT_OVERLAY_MTU, ETHERNET_MTU, overlay_overhead};
use godwit_model::{
    BridgeName, ErrorCode, HostCondition, HostNetworks, MacAddress, Name, NetworkId, Refusal, ResolvedNic, Retry, VlanId, VmId,
};
use tokio::sync::{Mutex, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use filter::TapRules;
use guard::Guard;
use netlink::{Link, LinkChange, LinkKind, Netlink};
use nft::NftError;

/// UDP port of VXLAN.
const PORT: u16 = 4789;
const BRIDGE: &str = "gwbr";
const VXLAN: &str = "gwvx";
/// Written before the network's id and name into the alias of its bridge, so that a restarted agent knows its networks before the
/// controller has spoken.
const ALIAS: &str = "godwit:";
/// How long a network that is not known yet is waited for: the controller tells of it beside the command that needs it.
const PATIENCE: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 10_000 });

/// What the networks of this host should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FleetNetworks {
    /// Underlay addresses of all hosts, this one's included or not.
    pub(crate) members: Vec<IpAddr>,
    pub(crate) networks: Vec<FleetNetwork>,
    /// Where each interface of a VM is: its address, its network, the underlay address of its host.
    pub(crate) locations: Vec<(MacAddress, NetworkId, IpAddr)>,
}

/// A network of the fleet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FleetNetwork {
    pub(crate) id: NetworkId,
    /// Unique in its team only.
    pub(crate) name: Name,
    /// What guests on it may send.
    pub(crate) mtu: u32,
    pub(crate) kind: Kind,
}

/// How a network gets from host to host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Overlay { vni: u32 },
    Bridge { bridge: BridgeName, vlan: Option<VlanId> },
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
    /// What may be sent on an interface could not be limited.
    #[error("interface {slot} of VM {vm} has addresses, and what it sends cannot be held against them")]
    Unfiltered {
        /// Whose.
        vm: VmId,
        /// Which.
        slot: usize,
        /// Why.
        #[source]
        source: NftError,
    },
    /// The fleet has not named this network yet.
    #[error("this host does not know network {0}")]
    Unknown(Name),
    /// The host lacks what the network is on.
    #[error("network {network} is on bridge {bridge}, which this host does not offer")]
    NoBridge {
        /// The network.
        network: Name,
        /// The bridge, with its VLAN.
        bridge: String,
    },
    /// Somebody else uses the VLAN.
    #[error("VLAN {vlan} of {uplink} is the interface {interface} already, which is not Godwit's")]
    VlanTaken {
        /// The VLAN.
        vlan: VlanId,
        /// Whose.
        interface: String,
        /// On which interface.
        uplink: String,
    },
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
            NetworkError::Unfiltered { .. } => {
                Self { code: ErrorCode::HostIncompatible, ..refusal }.hint(format!("{FILTER_FIX}, or start the VM without addresses"))
            }
            NetworkError::NoBridge { .. } => Self { code: ErrorCode::HostIncompatible, ..refusal }
                .hint("make the bridge on this host; for a VLAN it must have exactly one port that is no tap, and the kernel the module 8021q"),
            NetworkError::VlanTaken { .. } => Self { code: ErrorCode::HostIncompatible, ..refusal }
                .hint("make a network of the bridge that this interface is on, without a VLAN, or remove the interface"),
        }
    }
}

/// What to do about a filter that does not work.
const FILTER_FIX: &str =
    "install nftables (Debian: nftables) and a kernel with nf_tables of the bridge family (CONFIG_NF_TABLES_BRIDGE)";

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
    /// Grows when networks have become known.
    applied: watch::Sender<u64>,
    /// As last looked at.
    offer: std::sync::Mutex<HostNetworks>,
}

#[derive(Default)]
struct State {
    networks: BTreeMap<NetworkId, (Name, Kind)>,
    /// What was last pushed: an entry is written when the fleet changes its mind, not over what the kernel has learned since.
    pushed: HashMap<(u32, [u8; 6]), IpAddr>,
    /// What the underlay leaves to guests.
    room: Option<u32>,
    /// The kernel has no VLAN interfaces.
    no_vlans: bool,
    guard: Guard,
}

impl HostNetwork {
    /// Opens the namespace's links; overlays that an earlier agent made are known at once.
    ///
    /// # Errors
    /// The kernel's reason.
    pub(crate) async fn open(underlay: IpAddr) -> Result<Self, NetworkError> {
        let netlink = Netlink::open().map_err(kernel("open", "its netlink socket"))?;
        let links = netlink.links().await.map_err(kernel("list", "its links"))?;
        let networks = links.iter().filter_map(|link| {
            let (id, name) = link.alias.as_deref()?.strip_prefix(ALIAS)?.split_once(' ')?;
            Some((id.parse().ok()?, (Name::new(name).ok()?, Kind::Overlay { vni: vni_of(link)? })))
        });
        let state = Mutex::new(State { networks: networks.collect(), ..State::default() });
        let inner = Inner { underlay, netlink, state, applied: watch::Sender::new(0), offer: std::sync::Mutex::default() };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Makes the networks what the fleet says; what is so already is left alone. A network that the fleet does not name any more is removed
    /// once no tap is on it. One network that fails does not keep the others from being made.
    ///
    /// # Errors
    /// The first thing that could not be done.
    pub(crate) async fn apply(&self, fleet: &FleetNetworks) -> Result<(), NetworkError> {
        let mut state = self.inner.state.lock().await;
        // Before there is a VXLAN that would hear it.
        self.inner.admit(&mut state, fleet.members.iter().copied().chain([self.inner.underlay]).collect()).await;
        let links = self.inner.netlink.links().await.map_err(kernel("list", "its links"))?;
        let room = self.inner.room(&links).await?;
        state.room = Some(room);
        let mut result = self.inner.remove_others(fleet, &links, &mut state).await;
        result = result.and(self.inner.remove_other_vlans(fleet, &links).await);
        for network in &fleet.networks {
            let one = match &network.kind {
                Kind::Overlay { vni } => match self.inner.apply_overlay(network, *vni, network.mtu.min(room), &links).await {
                    Ok(vxlan) => self.inner.apply_forwards(fleet, network.id, *vni, vxlan, &mut state).await,
                    Err(error) => Err(error),
                },
                Kind::Bridge { bridge, vlan: Some(vlan) } => self.inner.apply_vlan(bridge, *vlan, &links, &mut state).await,
                Kind::Bridge { vlan: None, .. } => Ok(()),
            };
            if one.is_ok() {
                state.networks.insert(network.id, (network.name.clone(), network.kind.clone()));
            }
            result = result.and(one);
        }
        self.inner.applied.send_modify(|count| *count += 1);
        result
    }

    /// Makes a tap on the network's bridge: `IFF_VNET_HDR`, gone with its last descriptor, with the MTU of the bridge. What the VM may send on
    /// it is limited before it is attached.
    ///
    /// # Errors
    /// [`NetworkError::Unknown`] if the fleet does not name the network, else what could not be done.
    pub(crate) async fn create_tap(&self, nic: &ResolvedNic, vm: VmId, slot: usize) -> Result<OwnedFd, NetworkError> {
        self.inner.await_network(nic).await?;
        let mut state = self.inner.state.lock().await;
        let netlink = &self.inner.netlink;
        let bridge = self.inner.bridge_of(&state, nic).await?;
        let (tap, name) = tap::create(vm, slot).map_err(|source| NetworkError::Tap { vm, slot, source })?;
        disable_ipv6(&name);
        let index = self.inner.made(&name).await?.index;
        let rules = TapRules { tap: name.clone(), index, vm, slot, mac: nic.mac, addresses: nic.addresses.clone() };
        self.inner.protect(&mut state, rules).await?;
        let change = LinkChange {
            // The bridge's own, else a bridge of the host would take over the smaller one.
            mtu: Some(bridge.mtu),
            master: Some(bridge.index),
            alias: Some(format!("{vm} {slot}")),
            mac: Some(host_side(nic.mac)),
            up: true,
        };
        netlink.change(index, change).await.map_err(kernel("attach", &name))?;
        Ok(tap)
    }

    /// Announces that `nic` is here now, several times over the next two seconds, and makes the bridge forget that it was elsewhere.
    /// Abort the task when the VM leaves again while it still runs.
    pub(crate) fn announce(&self, nic: &ResolvedNic) -> AbortHandle {
        let (inner, nic) = (Arc::clone(&self.inner), nic.clone());
        let task = tokio::spawn(async move {
            if let Err(error) = inner.announce(&nic).await {
                tracing::warn!(network = %nic.network, error = &error as &dyn std::error::Error, "an address was not announced");
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
        if let Ok(room @ ..DEFAULT_OVERLAY_MTU) = self.inner.room(&links).await {
            let wanted = DEFAULT_OVERLAY_MTU + overlay_overhead(self.inner.underlay);
            conditions.push(HostCondition {
                name: "underlay_mtu".to_owned(),
                message: format!("overlays here carry {room} bytes: VMs of networks with a larger MTU are refused"),
                fix: format!(
                    "set the MTU of the interface with {} to at least {wanted}, or that of the networks to {room}",
                    self.inner.underlay
                ),
            });
        }
        if let Some(reason) = &self.inner.state.lock().await.guard.broken {
            conditions.push(HostCondition {
                name: "guest_filter".to_owned(),
                message: format!(
                    "VMs whose interfaces have addresses are refused, and VXLAN is accepted from anywhere: what is sent cannot be filtered: {reason}"
                ),
                fix: FILTER_FIX.to_owned(),
            });
        }
        conditions
    }
}

impl Inner {
    /// What is left of the underlay's MTU.
    async fn room(&self, links: &[Link]) -> Result<u32, NetworkError> {
        let index = self.netlink.index_of_address(self.underlay).await.map_err(kernel("list", "its addresses"))?;
        // What the underlay is taken to carry if its interface cannot be found.
        let underlay = links.iter().find(|link| Some(link.index) == index).map_or(ETHERNET_MTU, |link| link.mtu);
        Ok(underlay.saturating_sub(overlay_overhead(self.underlay)))
    }

    async fn await_network(&self, nic: &ResolvedNic) -> Result<(), NetworkError> {
        let deadline = Instant::now() + PATIENCE;
        let mut applied = self.applied.subscribe();
        while kind_of(&*self.state.lock().await, nic).is_none() {
            // The sender lives as long as this.
            let later = tokio::time::timeout_at(deadline, applied.changed()).await;
            later
                .map_err(|_| NetworkError::Unknown(nic.network.clone()))?
                .map_err(|_| NetworkError::Unknown(nic.network.clone()))?;
        }
        Ok(())
    }

    /// The bridge that an interface's tap belongs on.
    async fn bridge_of(&self, state: &State, nic: &ResolvedNic) -> Result<Link, NetworkError> {
        let unknown = || NetworkError::Unknown(nic.network.clone());
        match kind_of(state, nic).ok_or_else(unknown)? {
            Kind::Overlay { vni } => {
                let name = format!("{BRIDGE}{vni}");
                self.netlink.link(&name).await.map_err(kernel("find", &name))?.ok_or_else(unknown)
            }
            Kind::Bridge { bridge, vlan } => {
                let links = self.netlink.links().await.map_err(kernel("list", "its links"))?;
                bridge::find(bridge, *vlan, &links).cloned().ok_or_else(|| NetworkError::NoBridge {
                    network: nic.network.clone(),
                    bridge: vlan.map_or_else(|| bridge.to_string(), |vlan| format!("{bridge}, VLAN {vlan}")),
                })
            }
        }
    }

    async fn remove_others(&self, fleet: &FleetNetworks, links: &[Link], state: &mut State) -> Result<(), NetworkError> {
        let wanted = |vni| fleet.networks.iter().any(|network| network.kind == Kind::Overlay { vni });
        state.networks.retain(|id, (_, kind)| fleet.networks.iter().any(|network| network.id == *id && network.kind == *kind));
        for (bridge, vni) in links.iter().filter_map(|link| Some((link, vni_of(link)?))).filter(|(_, vni)| !wanted(*vni)) {
            let (ours, taps): (Vec<_>, Vec<_>) =
                links.iter().filter(|link| link.master == Some(bridge.index)).partition(|link| link.vxlan().is_some());
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

    async fn made(&self, name: &str) -> Result<Link, NetworkError> {
        let link = self.netlink.link(name).await.and_then(|link| link.ok_or_else(|| io::ErrorKind::NotFound.into()));
        link.map_err(kernel("find", name))
    }

    async fn announce(&self, nic: &ResolvedNic) -> Result<(), NetworkError> {
        let state = self.state.lock().await;
        let bridge = self.bridge_of(&state, nic).await?;
        drop(state);
        let links = self.netlink.links().await.map_err(kernel("list", "its links"))?;
        let out = links.iter().filter(|link| link.master == Some(bridge.index) && link.kind != LinkKind::Tap);
        let out: Vec<&Link> = out.collect();
        let sender = announce::open_sender(bridge.index).map_err(kernel("send on", &bridge.name))?;
        for pause in announce::PAUSES {
            tokio::time::sleep(pause).await;
            // What the bridge sends itself teaches it nothing: it would go on sending the VM's frames to the host that it left.
            for port in &out {
                self.netlink.forget_on_port(port.index, nic.mac.0).await.map_err(kernel("clear an entry of", &port.name))?;
            }
            match rustix::io::write(&sender, &announce::frame(nic.mac)) {
                // A full queue: the next one will do.
                Ok(_) | Err(rustix::io::Errno::NOBUFS | rustix::io::Errno::AGAIN) => {}
                Err(error) => return Err(kernel("send on", &bridge.name)(error.into())),
            }
        }
        Ok(())
    }
}

/// The kind of an interface's network. Interfaces from before networks had ids go by the name.
fn kind_of<'a>(state: &'a State, nic: &ResolvedNic) -> Option<&'a Kind> {
    let known = match nic.network_id {
        Some(id) => state.networks.get(&id),
        // Another team may have taken the name since: the oldest number is that of the network there was.
        None => state.networks.values().filter(|(name, _)| *name == nic.network).min_by_key(|(_, kind)| match kind {
            Kind::Overlay { vni } => *vni,
            Kind::Bridge { .. } => u32::MAX,
        }),
    };
    known.map(|(_, kind)| kind)
}

fn alias(network: &FleetNetwork) -> String {
    format!("{ALIAS}{} {}", network.id, network.name)
}

/// The MAC address of the host's end of a tap: a bridge takes the lowest of its ports for its own, and a bridge of the host must keep its.
const fn host_side(mac: MacAddress) -> [u8; 6] {
    let [_, b, c, d, e, f] = mac.0;
    [0xfe, b, c, d, e, f]
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
