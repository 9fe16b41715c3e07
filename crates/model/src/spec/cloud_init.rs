//! What a guest is told at its first boot (cloud-init, NoCloud). It often holds passwords: it is never printed.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Name;

/// Longest user data and vendor data, in bytes each.
pub const MAX_USER_DATA: usize = 64 << 10;
/// Longest network configuration, in bytes.
pub const MAX_NETWORK_CONFIG: usize = 16 << 10;

/// What a guest finds on its cloud-init disk.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CloudInit {
    /// `user-data`, at most 64 KiB.
    pub user_data: Option<String>,
    /// `network-config`, at most 16 KiB.
    pub network_config: Option<String>,
    /// `vendor-data`, at most 64 KiB.
    pub vendor_data: Option<String>,
    /// Host name in `meta-data`: letters, digits, `-` and `.`. Default: the VM's name.
    pub host_name: Option<Name>,
}

impl fmt::Debug for CloudInit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let length = |text: &Option<String>| text.as_ref().map(String::len);
        f.debug_struct("CloudInit")
            .field("user_data", &length(&self.user_data))
            .field("network_config", &length(&self.network_config))
            .field("vendor_data", &length(&self.vendor_data))
            .field("host_name", &self.host_name)
            .finish()
    }
}
