//! Identities: one newtype per kind of object, so that a task can never be taken for a VM.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
        #[serde(transparent)]
        #[schema(value_type = String, format = "uuid")]
        pub struct $name(Uuid);

        impl $name {
            /// Wraps a UUID that the caller drew: this crate has no random source.
            #[must_use]
            pub const fn new(uuid: Uuid) -> Self {
                Self(uuid)
            }

            /// The UUID itself.
            #[must_use]
            pub const fn uuid(self) -> Uuid {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0.hyphenated())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0.hyphenated())
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::parse_str(text).map(Self)
            }
        }
    };
}

id! {
    /// A virtual machine, for life. Also its SMBIOS UUID.
    VmId
}
id! {
    /// A VM's disks at one instant, with its memory if wanted.
    SnapshotId
}
id! {
    /// A schedule of snapshots.
    ScheduleId
}
id! {
    /// A long operation.
    TaskId
}
id! {
    /// An imported kernel, initrd or disk image.
    ImageId
}
id! {
    /// A team: the owner of every object.
    TeamId
}
id! {
    /// An API or join token (its public half).
    TokenId
}
id! {
    /// What a guest reads to learn that it was turned back to an earlier moment, or doubled. Not a [`crate::Generation`].
    Vmgenid
}
id! {
    /// A network of VMs.
    NetworkId
}
