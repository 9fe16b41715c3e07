//! What can be brought into the cluster as an image, and as which kind of image it stays.

use serde::{Deserialize, Serialize};

use crate::ImageKind;

/// Format of what is imported: declared, never probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ImportFormat {
    /// A bzImage for direct boot.
    Kernel,
    /// An initial ramdisk.
    Initrd,
    /// A raw disk.
    Raw,
    /// A qcow2 disk without backing file or external data file.
    Qcow2,
    /// The content of a CD-ROM.
    Iso,
    /// A VMDK disk in one file (monolithic sparse or stream-optimised); becomes qcow2.
    Vmdk,
    /// A VHDX disk without parent; becomes qcow2.
    Vhdx,
    /// An appliance with one disk; the disk becomes qcow2.
    Ova,
}

impl ImportFormat {
    /// The kind of image that it becomes.
    #[must_use]
    pub const fn becomes(self) -> ImageKind {
        match self {
            Self::Kernel => ImageKind::Kernel,
            Self::Initrd => ImageKind::Initrd,
            Self::Raw => ImageKind::Raw,
            Self::Iso => ImageKind::Iso,
            Self::Qcow2 | Self::Vmdk | Self::Vhdx | Self::Ova => ImageKind::Qcow2,
        }
    }

    /// Whether its content is rewritten on the way: that takes time, and is a task.
    #[must_use]
    pub const fn is_converted(self) -> bool {
        matches!(self, Self::Vmdk | Self::Vhdx | Self::Ova)
    }
}
