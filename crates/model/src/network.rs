//! Networks of VMs: what one is made of, what a host can offer of it, and what was dropped on it.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{ErrorCode, Refusal, VmId};

/// Smallest and largest MTU of a network: what IPv6 needs at least, and what common switches carry.
pub const NETWORK_MTU: std::ops::RangeInclusive<u32> = 1_280..=9_216;
/// MTU of an overlay when no host says what it carries: what an underlay of 1,500 bytes and IPv4 leaves.
pub const DEFAULT_OVERLAY_MTU: u32 = 1_450;
/// MTU of Ethernet, and so of a bridge unless it says otherwise.
pub const ETHERNET_MTU: u32 = 1_500;

/// How the hosts of a network are joined.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum NetworkKind {
    /// A VXLAN between all hosts of the cluster.
    // With braces: of a unit variant serde would overlook unknown fields.
    Overlay {},
    /// A bridge that every host of it already has, used as it is.
    Bridge {
        /// The bridge's name, the same on every host.
        bridge: BridgeName,
        /// A VLAN of the bridge's uplink, instead of the bridge's own frames.
        #[serde(default)]
        vlan: Option<VlanId>,
    },
}

impl Default for NetworkKind {
    fn default() -> Self {
        Self::Overlay {}
    }
}

/// Name of a bridge on a host: 1 to 15 characters of `A-Z`, `a-z`, `0-9`, `-`, `.` and `_`, the first a letter or digit, and none of the
/// names that Godwit gives to its own interfaces.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, utoipa::ToSchema)]
#[serde(transparent)]
#[schema(value_type = String, pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,14}$", example = "br0")]
pub struct BridgeName(String);

/// A text that is no [`BridgeName`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a bridge's name has 1 to 15 of A-Z, a-z, 0-9, '-', '.', '_', begins with a letter or digit, and not with `gwt`, `gwbr`, `gwvx`, `gwvb` or `gwvl`"
)]
pub struct InvalidBridgeName;

/// What interfaces begin with that agents make.
const OURS: [&str; 5] = ["gwt", "gwbr", "gwvx", "gwvb", "gwvl"];

impl BridgeName {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for BridgeName {
    type Err = InvalidBridgeName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
        let begins = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        if !plain || !begins || text.len() > 15 || OURS.iter().any(|ours| text.starts_with(ours)) {
            return Err(InvalidBridgeName);
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for BridgeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl<'de> Deserialize<'de> for BridgeName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A VLAN: 1 to 4094.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, utoipa::ToSchema)]
#[serde(transparent)]
#[schema(value_type = u16, minimum = 1, maximum = 4094)]
pub struct VlanId(u16);

/// A number that is no [`VlanId`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a VLAN is a number from 1 to 4094")]
pub struct InvalidVlan;

impl VlanId {
    /// Checks and wraps `number`.
    ///
    /// # Errors
    /// [`InvalidVlan`].
    pub const fn new(number: u16) -> Result<Self, InvalidVlan> {
        if number >= 1 && number <= 4_094 { Ok(Self(number)) } else { Err(InvalidVlan) }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl FromStr for VlanId {
    type Err = InvalidVlan;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map_err(|_| InvalidVlan).and_then(Self::new)
    }
}

impl fmt::Display for VlanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for VlanId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(u16::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// Checks the MTU of a network.
///
/// # Errors
/// A refusal if it is out of range.
pub fn check_mtu(mtu: u32) -> Result<u32, Refusal> {
    if NETWORK_MTU.contains(&mtu) {
        return Ok(mtu);
    }
    let (low, high) = (NETWORK_MTU.start(), NETWORK_MTU.end());
    Err(Refusal::new(ErrorCode::BadRequest, format!("the MTU of a network is {low} to {high}, not {mtu}"))
        .hint("leave it out for what the connected hosts carry"))
}

/// Bytes that VXLAN takes of the underlay's MTU: the inner Ethernet header, VXLAN, UDP, IP.
#[must_use]
pub const fn overlay_overhead(underlay: IpAddr) -> u32 {
    14 + 8 + 8 + if underlay.is_ipv4() { 20 } else { 40 }
}

/// What a host offers to networks, and what it dropped on them, since its agent started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default)]
pub struct HostNetworks {
    /// MTU that its underlay leaves to overlays, if that is known.
    pub overlay_mtu: Option<u32>,
    /// Its bridges, but for those that the agent made.
    pub bridges: Vec<HostBridge>,
    /// Whether its kernel has turned out to have no VLAN interfaces.
    pub no_vlans: bool,
    /// Whether what guests send is held against what they may send.
    pub filters: bool,
    /// VXLAN packets from addresses that are no hosts of the cluster: dropped.
    pub strangers: u64,
    /// Frames of all guests here that were dropped.
    pub dropped: DroppedFrames,
    /// The same by interface; those of which nothing was dropped are left out. Left out where others' VMs must not be seen.
    pub interfaces: Vec<InterfaceDrops>,
}

/// A bridge of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct HostBridge {
    /// Its name.
    pub name: String,
    /// Its MTU.
    pub mtu: u32,
    /// Its one port that leads out of the host; none if that cannot be told. VLANs need it.
    pub uplink: Option<String>,
}

/// What was dropped of one interface, since it came to its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct InterfaceDrops {
    /// Whose.
    pub vm: VmId,
    /// Which, by its place.
    pub slot: u8,
    /// What.
    pub dropped: DroppedFrames,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $reason:ident,)*) => {
        /// Frames that guests sent and that were dropped, by what was wrong with them.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
        #[serde(default)]
        pub struct DroppedFrames {
            $($(#[$doc])* pub $reason: u64,)*
        }

        impl DroppedFrames {
            /// The reasons, as their fields are called.
            pub const REASONS: &'static [&'static str] = &[$(stringify!($reason),)*];

            /// The count of a reason, by its name.
            pub fn of(&mut self, reason: &str) -> Option<&mut u64> {
                match reason { $(stringify!($reason) => Some(&mut self.$reason),)* _ => None }
            }

            /// Each reason with its count.
            pub fn each(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($reason), self.$reason),)*].into_iter()
            }
        }
    };
}

reasons! {
    /// A source address that is not the interface's.
    mac,
    /// Tagged with a VLAN.
    vlan,
    /// An ARP message that is malformed, or claims another interface's MAC or IP address.
    arp,
    /// IPv4 or IPv6 from an address that the interface may not use.
    source,
    /// A neighbour discovery message that claims an IPv6 address that the interface may not use.
    neighbour,
    /// A router advertisement or redirect.
    router,
    /// An answer of a DHCP server.
    dhcp,
    /// Another protocol than those that an interface with addresses may speak, or one that only switches speak.
    protocol,
    /// Sent before anything was known of the interface.
    unknown,
}

impl DroppedFrames {
    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.each().map(|(_, count)| count).sum()
    }

    /// Adds those of `other`.
    pub fn add(&mut self, other: &Self) {
        for (reason, count) in other.each() {
            if let Some(mine) = self.of(reason) {
                *mine = mine.saturating_add(count);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_an_interface_cannot_have_or_that_are_ours_are_refused() {
        for good in ["br0", "vmbr10", "br-lan.1", "0"] {
            assert_eq!(good.parse::<BridgeName>().expect(good).to_string(), good);
        }
        for bad in ["", ".", "..", "a/b", "a b", "br0;x", "sixteen-letters!", "gwbr1", "gwt12345678", "gwvb1", "-x", "a\n"] {
            assert!(bad.parse::<BridgeName>().is_err(), "{bad:?} was accepted");
        }
        assert!(VlanId::new(0).is_err() && VlanId::new(4_095).is_err() && "1".parse::<VlanId>().is_ok());
        assert!("+1x".parse::<VlanId>().is_err());
    }

    #[test]
    fn a_kind_is_told_by_its_type_and_takes_nothing_else() {
        let read = serde_json::from_str::<NetworkKind>;
        assert_eq!(read(r#"{"type":"overlay"}"#).expect("overlay"), NetworkKind::default());
        let bridge = read(r#"{"type":"bridge","bridge":"br0","vlan":20}"#).expect("bridge");
        assert!(matches!(&bridge, NetworkKind::Bridge { vlan: Some(vlan), .. } if vlan.get() == 20));
        for bad in [r#"{"type":"bridge"}"#, r#"{"type":"bridge","bridge":"br0","vlan":0}"#, r#"{"type":"overlay","vni":3}"#] {
            assert!(read(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn every_reason_is_counted_by_its_name() {
        let mut frames = DroppedFrames::default();
        for reason in DroppedFrames::REASONS {
            *frames.of(reason).expect("its own name") += 1;
        }
        assert_eq!(frames.total(), DroppedFrames::REASONS.len() as u64);
        let once = frames;
        frames.add(&once);
        assert_eq!((frames.total(), frames.of("nothing")), (2 * once.total(), None));
    }
}
