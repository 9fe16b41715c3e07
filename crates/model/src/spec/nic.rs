//! Network interfaces as they are asked for.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{MacAddress, Name};

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NicSpec {
    /// The network it is on.
    pub network: Name,
    /// Its address; drawn at creation if absent.
    #[serde(default)]
    pub mac: Option<MacAddress>,
    /// What the guest sees.
    #[serde(default)]
    pub model: NicModel,
    /// IP addresses that the guest may use on it, at most 32; none means any.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub addresses: Vec<IpAddr>,
    /// Whether its cable is plugged in.
    #[serde(default = "plugged")]
    pub link_up: bool,
    /// Its place, see [`crate::spec::FIXED_SLOTS`]. Chosen when the interface is added, and kept.
    #[serde(default)]
    pub slot: Option<u8>,
}

pub(super) const fn plugged() -> bool {
    true
}

impl NicSpec {
    /// An interface on `network`, with everything else by default.
    #[must_use]
    pub const fn new(network: Name) -> Self {
        Self { network, mac: None, model: NicModel::Virtio, addresses: Vec::new(), link_up: true, slot: None }
    }
}

/// What the guest sees of an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum NicModel {
    /// virtio.
    #[default]
    Virtio,
    /// Intel's 82574L, for guests without virtio drivers.
    E1000e,
}
