//! The kernel's links and forwarding entries. The only module that names the netlink libraries, which change their API often.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{
    BridgeBooleanOptionFlags, BridgeBooleanOptions, BridgeStpState, InfoBridge, InfoData, InfoKind, InfoVlan, InfoVxlan,
    LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{Error, Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVlan, LinkVxlan};

/// The address of what has no address: an entry for it is where frames to unknown and to all addresses go.
const FLOOD: [u8; 6] = [0; 6];

/// A connection to the kernel, for the network namespace in which it was made.
#[derive(Clone)]
pub(super) struct Netlink {
    handle: Handle,
    /// The kernel makes one list at a time for a socket, and refuses the next one as busy until the first has been read.
    listing: Arc<tokio::sync::Mutex<()>>,
}

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mtu: u32,
    pub(super) up: bool,
    /// The bridge that it is a port of.
    pub(super) master: Option<u32>,
    pub(super) alias: Option<String>,
    pub(super) kind: LinkKind,
}

/// What an interface is, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LinkKind {
    Bridge,
    /// A tap, ours or another's.
    Tap,
    /// Of the interface with the index `of`.
    Vlan {
        of: u32,
        id: u16,
    },
    Vxlan(Vxlan),
    Other,
}

impl Link {
    /// Present if it is a VXLAN.
    pub(super) fn vxlan(&self) -> Option<Vxlan> {
        match self.kind {
            LinkKind::Vxlan(vxlan) => Some(vxlan),
            _ => None,
        }
    }
}

/// What makes one VXLAN differ from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Vxlan {
    pub(super) vni: u32,
    pub(super) local: IpAddr,
    pub(super) port: u16,
}

/// What to change of a link; absent: leave it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct LinkChange {
    pub(super) mtu: Option<u32>,
    pub(super) master: Option<u32>,
    pub(super) alias: Option<String>,
    pub(super) mac: Option<[u8; 6]>,
    pub(super) up: bool,
}

/// One forwarding entry of a VXLAN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Forward {
    pub(super) mac: [u8; 6],
    pub(super) to: IpAddr,
}

impl Forward {
    /// Whether it says where floods go.
    pub(super) fn is_flood(&self) -> bool {
        self.mac == FLOOD
    }
}

impl Netlink {
    /// Opens a connection in the caller's network namespace; it is served by a task of the current runtime.
    pub(super) fn open() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Ok(Self { handle, listing: Arc::default() })
    }

    /// Every interface.
    pub(super) async fn links(&self) -> io::Result<Vec<Link>> {
        let _one = self.listing.lock().await;
        let messages: Vec<LinkMessage> = self.handle.link().get().execute().try_collect().await.map_err(into_io)?;
        Ok(messages.into_iter().filter_map(read_link).collect())
    }

    /// The interface with this name, if there is one.
    pub(super) async fn link(&self, name: &str) -> io::Result<Option<Link>> {
        let answer = self.handle.link().get().match_name(name).execute().try_next().await.map_err(into_io);
        match answer {
            Ok(message) => Ok(message.and_then(read_link)),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The interface that carries an address of this host.
    pub(super) async fn index_of_address(&self, address: IpAddr) -> io::Result<Option<u32>> {
        let _one = self.listing.lock().await;
        let mut addresses = std::pin::pin!(self.handle.address().get().execute());
        let mut found = None;
        // Read to the end: what is left of an answer would be taken for that to the next question.
        while let Some(message) = addresses.try_next().await.map_err(into_io)? {
            let is_it = |attribute: &AddressAttribute| matches!(attribute, AddressAttribute::Address(a) | AddressAttribute::Local(a) if *a == address);
            if message.attributes.iter().any(is_it) {
                found = Some(message.header.index);
            }
        }
        Ok(found)
    }

    /// Makes a bridge that only forwards: no spanning tree (a port works at once), no snooping, nothing of the host's firewall. It learns
    /// nothing from frames that it keeps for itself: no filter sees all of those.
    pub(super) async fn add_bridge(&self, name: &str) -> io::Result<()> {
        let no_learning = BridgeBooleanOptionFlags::NoLinkLocalLearn;
        let message = LinkMessageBuilder::<LinkBridge>::new(name)
            .append_info_data(InfoBridge::StpState(BridgeStpState::Disabled))
            .forward_delay(0)
            .mcast_snooping(false)
            .nf_call_iptables(false)
            .nf_call_ip6tables(false)
            .nf_call_arptables(false)
            .append_info_data(InfoBridge::MultiBoolOpt(BridgeBooleanOptions { value: no_learning, mask: no_learning }))
            .build();
        self.handle.link().add(message).execute().await.map_err(into_io)
    }

    /// Makes a VXLAN that learns, as a port of `master`.
    pub(super) async fn add_vxlan(&self, name: &str, vxlan: Vxlan, master: u32) -> io::Result<()> {
        let builder = LinkMessageBuilder::<LinkVxlan>::new(name).id(vxlan.vni).port(vxlan.port).learning(true).controller(master);
        let builder = match vxlan.local {
            IpAddr::V4(local) => builder.local(local),
            IpAddr::V6(local) => builder.local6(local),
        };
        self.handle.link().add(builder.build()).execute().await.map_err(into_io)
    }

    /// Makes a VLAN of the interface `of`, as a port of `master`.
    pub(super) async fn add_vlan(&self, name: &str, of: u32, id: u16, master: u32) -> io::Result<()> {
        let message = LinkVlan::new(name, of, id).controller(master).build();
        self.handle.link().add(message).execute().await.map_err(into_io)
    }

    /// Changes a link.
    pub(super) async fn change(&self, index: u32, change: LinkChange) -> io::Result<()> {
        let mut builder = LinkMessageBuilder::<LinkUnspec>::new().index(index);
        if let Some(mtu) = change.mtu {
            builder = builder.mtu(mtu);
        }
        if let Some(mac) = change.mac {
            builder = builder.address(mac.to_vec());
        }
        if let Some(master) = change.master {
            builder = builder.controller(master);
        }
        if let Some(alias) = change.alias {
            builder = builder.alias(alias);
        }
        if change.up {
            builder = builder.up();
        }
        self.handle.link().set(builder.build()).execute().await.map_err(into_io)
    }

    /// Removes a link; one that is gone is no error.
    pub(super) async fn delete(&self, index: u32) -> io::Result<()> {
        ignore(self.handle.link().del(index).execute().await.map_err(into_io), libc::ENODEV)
    }

    /// The forwarding entries of a VXLAN, learned ones included.
    pub(super) async fn forwards(&self, vxlan: u32) -> io::Result<Vec<Forward>> {
        let _one = self.listing.lock().await;
        let request = self.handle.neighbours().get().set_address_family(AddressFamily::Bridge);
        let messages: Vec<NeighbourMessage> = request.execute().try_collect().await.map_err(into_io)?;
        Ok(messages.iter().filter(|message| message.header.ifindex == vxlan).filter_map(read_forward).collect())
    }

    /// Adds a host to those that get floods.
    pub(super) async fn add_flood(&self, vxlan: u32, to: IpAddr) -> io::Result<()> {
        // Permanent, else it would age away; nothing learns this address, so nothing has to move it.
        let message = forward(vxlan, FLOOD, Some(to), NeighbourState::Permanent);
        ignore(self.request(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_APPEND).await, libc::EEXIST)
    }

    /// Says where an address is. Not permanent: the kernel moves the entry when it hears the address from another host.
    pub(super) async fn set_forward(&self, vxlan: u32, entry: Forward) -> io::Result<()> {
        let message = forward(vxlan, entry.mac, Some(entry.to), NeighbourState::Reachable);
        self.request(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE).await
    }

    /// Removes an entry; one that is gone is no error.
    pub(super) async fn remove_forward(&self, vxlan: u32, entry: Forward) -> io::Result<()> {
        let message = forward(vxlan, entry.mac, Some(entry.to), NeighbourState::None);
        ignore(self.request(RouteNetlinkMessage::DelNeighbour(message), 0).await, libc::ENOENT)
    }

    /// Makes the bridge forget that it saw `mac` on `port`; does nothing if it knows it elsewhere or not at all.
    pub(super) async fn forget_on_port(&self, port: u32, mac: [u8; 6]) -> io::Result<()> {
        let mut message = forward(port, mac, None, NeighbourState::None);
        message.header.flags = NeighbourFlags::Controller;
        ignore(self.request(RouteNetlinkMessage::DelNeighbour(message), 0).await, libc::ENOENT)
    }

    async fn request(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut answers = self.handle.clone().request(message).map_err(into_io)?;
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                _ => {}
            }
        }
        Ok(())
    }
}

fn forward(link: u32, mac: [u8; 6], to: Option<IpAddr>, state: NeighbourState) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = link;
    message.header.state = state;
    message.header.flags = NeighbourFlags::Own;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
    message.attributes.extend(to.map(|to| NeighbourAttribute::Destination(to.into())));
    message
}

fn read_forward(message: &NeighbourMessage) -> Option<Forward> {
    let (mut mac, mut to) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(octets) => mac = octets.as_slice().try_into().ok(),
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => to = Some(IpAddr::V4(*address)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => to = Some(IpAddr::V6(*address)),
            NeighbourAttribute::Destination(NeighbourAddress::Other(octets)) => {
                to = <[u8; 4]>::try_from(octets.as_slice())
                    .map(IpAddr::from)
                    .or_else(|_| <[u8; 16]>::try_from(octets.as_slice()).map(IpAddr::from))
                    .ok();
            }
            _ => {}
        }
    }
    Some(Forward { mac: mac?, to: to? })
}

fn read_link(message: LinkMessage) -> Option<Link> {
    let up = message.header.flags.contains(LinkFlags::Up);
    let mut link =
        Link { index: message.header.index, name: String::new(), mtu: 0, up, master: None, alias: None, kind: LinkKind::Other };
    let mut of = None;
    let mut infos = Vec::new();
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Controller(index) => link.master = Some(index).filter(|index| *index != 0),
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
            LinkAttribute::Link(index) => of = Some(index),
            LinkAttribute::LinkInfo(all) => infos = all,
            _ => {}
        }
    }
    link.kind = read_kind(&infos, of);
    Some(link).filter(|link| !link.name.is_empty())
}

fn read_kind(infos: &[LinkInfo], of: Option<u32>) -> LinkKind {
    let kind = infos.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    });
    match kind {
        Some(InfoKind::Bridge) => LinkKind::Bridge,
        Some(InfoKind::Tun) => LinkKind::Tap,
        Some(InfoKind::Vxlan) => infos.iter().find_map(read_vxlan).map_or(LinkKind::Other, LinkKind::Vxlan),
        Some(InfoKind::Vlan) => {
            let id = infos.iter().find_map(|info| match info {
                LinkInfo::Data(InfoData::Vlan(attributes)) => attributes.iter().find_map(|attribute| match attribute {
                    InfoVlan::Id(id) => Some(*id),
                    _ => None,
                }),
                _ => None,
            });
            of.zip(id).map_or(LinkKind::Other, |(of, id)| LinkKind::Vlan { of, id })
        }
        _ => LinkKind::Other,
    }
}

fn read_vxlan(info: &LinkInfo) -> Option<Vxlan> {
    let LinkInfo::Data(InfoData::Vxlan(attributes)) = info else { return None };
    let (mut vni, mut local, mut port) = (None, None, None);
    for attribute in attributes {
        match attribute {
            InfoVxlan::Id(id) => vni = Some(*id),
            InfoVxlan::Local(address) => local = Some(IpAddr::V4(*address)),
            InfoVxlan::Local6(address) => local = Some(IpAddr::V6(*address)),
            InfoVxlan::Port(number) => port = Some(*number),
            _ => {}
        }
    }
    Some(Vxlan { vni: vni?, local: local?, port: port? })
}

fn ignore(result: io::Result<()>, errno: i32) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(errno) => Ok(()),
        other => other,
    }
}

fn into_io(error: Error) -> io::Error {
    match error {
        Error::NetlinkError(error) => error.to_io(),
        other => io::Error::other(other),
    }
}
