//! What a VM is made of. [`VmSpec`] is what was asked for; [`ResolvedSpec`] is what it was started with: its ABI for life.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Bytes, ErrorCode, ImageId, InvalidName, Name, Refusal, VmId};

/// Schema version of [`VmSpec`] and [`ResolvedSpec`] in stores and on links.
pub const SPEC_SCHEMA: u32 = 1;

const MAX_VCPUS: u16 = 64;
const MIN_MEMORY: Bytes = Bytes::mib(32);
const MAX_MEMORY: Bytes = Bytes(1 << 40);
const MAX_DEVICES: usize = 8;
const MAX_CMDLINE: usize = 2_048;

/// What the user asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Number of vCPUs, 1 to 64.
    pub vcpus: u16,
    /// RAM in bytes, a multiple of 1 MiB.
    pub memory: Bytes,
    /// What it boots.
    pub boot: Boot,
    /// Disks in the order of their slots, at most 8.
    #[serde(default)]
    pub disks: Vec<DiskSpec>,
    /// Network interfaces in the order of their slots, at most 8.
    #[serde(default)]
    pub nics: Vec<NicSpec>,
    /// Machine type: `q35`, or a versioned one such as `pc-q35-7.2`. Default: the newest `pc-q35` that every host of the cluster knows.
    #[serde(default)]
    pub machine: Option<String>,
    /// Named CPU model, such as `qemu64-v1`. `host` and `max` tie the VM to equal hosts. Default: a baseline of the cluster's accelerator.
    #[serde(default)]
    pub cpu: Option<String>,
}

/// What a VM boots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "from", rename_all = "snake_case")]
pub enum Boot {
    /// A kernel handed over directly.
    Kernel {
        /// Name of an imported image of kind `kernel`.
        kernel: Name,
        /// Name of an imported image of kind `initrd`.
        #[serde(default)]
        initrd: Option<Name>,
        /// Kernel command line.
        #[serde(default)]
        cmdline: String,
    },
    /// The first disk, by SeaBIOS.
    Disk,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// Where it lives.
    pub volume: VolumeRef,
    /// Its format: declared, never probed.
    pub format: DiskFormat,
    /// How the host caches it.
    #[serde(default)]
    pub cache: CacheMode,
    /// Size to create it with, if the volume does not exist yet; without it the volume must exist.
    #[serde(default)]
    pub size: Option<Bytes>,
    /// Disk image to copy it from when it is created.
    #[serde(default)]
    pub image: Option<Name>,
}

/// Format of a volume or disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// Plain bytes.
    Raw,
    /// QEMU's qcow2.
    Qcow2,
}

impl DiskFormat {
    /// QEMU's name of the block driver.
    #[must_use]
    pub const fn driver(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// How the host caches a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CacheMode {
    /// No host page cache (`cache.direct=on`): required for volumes that move on shared storage.
    #[default]
    Direct,
    /// Host page cache, guest flushes honoured. Refused by the migration precheck on shared pools.
    Writeback,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NicSpec {
    /// The network it is on.
    pub network: Name,
    /// Its address; drawn at creation if absent.
    #[serde(default)]
    pub mac: Option<MacAddress>,
}

/// What an image is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ImageKind {
    /// A bzImage for direct boot.
    Kernel,
    /// An initial ramdisk.
    Initrd,
    /// A raw disk.
    Raw,
    /// A qcow2 disk without backing file or external data file.
    Qcow2,
}

/// An image that a resolved spec depends on, by content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRef {
    /// Identity in the controller's store.
    pub id: ImageId,
    /// BLAKE3 of the content, hexadecimal: hosts cache by it and refuse anything else.
    pub digest: String,
    /// Size in bytes.
    pub size: Bytes,
}

/// Where a VM's instructions are executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Accelerator {
    /// Hardware virtualisation.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

/// What a VM was started with, for life: nothing in it is a default, an alias or a name that could come to mean something else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedSpec {
    /// [`SPEC_SCHEMA`] of the writer.
    pub schema: u32,
    /// The VM.
    pub vm: VmId,
    /// Its name when it was started (process title, guest-visible name).
    pub name: Name,
    /// The accelerator of its first host.
    pub accelerator: Accelerator,
    /// Versioned machine type.
    pub machine: String,
    /// Named CPU model.
    pub cpu: String,
    /// vCPUs.
    pub vcpus: u16,
    /// RAM.
    pub memory: Bytes,
    /// Kernel, for direct boot.
    pub kernel: Option<ImageRef>,
    /// Initial ramdisk, for direct boot.
    pub initrd: Option<ImageRef>,
    /// Kernel command line, for direct boot.
    pub cmdline: String,
    /// Disks in slot order.
    pub disks: Vec<ResolvedDisk>,
    /// Interfaces in slot order.
    pub nics: Vec<ResolvedNic>,
}

/// A disk of a [`ResolvedSpec`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedDisk {
    /// Where it lives.
    pub volume: VolumeRef,
    /// Declared format.
    pub format: DiskFormat,
    /// Cache mode.
    pub cache: CacheMode,
    /// Size to create it with if it is missing.
    pub create: Option<Bytes>,
    /// Image to copy it from when it is created, with its kind.
    pub image: Option<(ImageRef, ImageKind)>,
}

/// An interface of a [`ResolvedSpec`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedNic {
    /// The network it is on.
    pub network: Name,
    /// Its address.
    pub mac: MacAddress,
}

impl ResolvedSpec {
    /// Images that a host needs before it can start the VM.
    pub fn images(&self) -> impl Iterator<Item = &ImageRef> {
        let disks = self.disks.iter().filter_map(|disk| disk.image.as_ref().map(|(image, _)| image));
        self.kernel.iter().chain(&self.initrd).chain(disks)
    }
}

/// A volume: `pool/volume`, never a path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeRef {
    /// The pool.
    pub pool: Name,
    /// The volume in it.
    pub volume: Name,
}

/// Why a text is not a [`VolumeRef`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidVolume {
    /// Not exactly one slash.
    #[error("a volume is written pool/volume")]
    Shape,
    /// One of the two names is not a name.
    #[error("a volume is written pool/volume: {0}")]
    Name(#[from] InvalidName),
}

impl FromStr for VolumeRef {
    type Err = InvalidVolume;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (pool, volume) = text.split_once('/').ok_or(InvalidVolume::Shape)?;
        Ok(Self { pool: Name::new(pool)?, volume: Name::new(volume)? })
    }
}

impl fmt::Display for VolumeRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.pool, self.volume)
    }
}

/// A unicast Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddress(pub [u8; 6]);

/// A text that is not a unicast Ethernet address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a MAC address is six hexadecimal pairs joined by colons, and not a multicast or zero address")]
pub struct InvalidMac;

impl FromStr for MacAddress {
    type Err = InvalidMac;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut octets = [0_u8; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().filter(|part| part.len() == 2).ok_or(InvalidMac)?;
            *octet = u8::from_str_radix(part, 16).map_err(|_| InvalidMac)?;
        }
        let unicast = octets[0] & 1 == 0 && octets != [0; 6];
        if parts.next().is_some() || !unicast { Err(InvalidMac) } else { Ok(Self(octets)) }
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

macro_rules! serde_by_text {
    ($($kind:ident = $example:literal),*) => {$(
        impl utoipa::PartialSchema for $kind {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
                utoipa::openapi::ObjectBuilder::new()
                    .schema_type(utoipa::openapi::schema::Type::String)
                    .examples([$example])
                    .into()
            }
        }

        impl utoipa::ToSchema for $kind {}

        impl Serialize for $kind {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $kind {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}
serde_by_text!(VolumeRef = "shared/web1-root", MacAddress = "52:54:00:12:34:56");

/// Why a [`VmSpec`] cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSpec {
    /// Number of vCPUs outside 1 to 64.
    #[error("a VM has 1 to {MAX_VCPUS} vCPUs, not {0}")]
    Vcpus(u16),
    /// RAM out of range or not a multiple of 1 MiB.
    #[error("memory is a multiple of 1 MiB from {MIN_MEMORY} to {MAX_MEMORY}, not {0} ({n} bytes)", n = .0.get())]
    Memory(Bytes),
    /// Too many disks or interfaces.
    #[error("a VM has at most {MAX_DEVICES} disks and {MAX_DEVICES} interfaces")]
    Devices,
    /// Boot from disk without a disk.
    #[error("the VM boots from its first disk but has none")]
    NoBootDisk,
    /// Command line too long or with control characters.
    #[error("a kernel command line has at most {MAX_CMDLINE} printable ASCII characters")]
    Cmdline,
    /// The same volume twice.
    #[error("volume {0} is attached twice")]
    VolumeTwice(VolumeRef),
    /// A machine type or CPU model with characters that QEMU would read as further options.
    #[error("{0} may consist of letters, digits, '-', '_', '.' only")]
    Identifier(&'static str),
    /// A size that is no multiple of 512, zero, or over 64 TiB.
    #[error("the size of {0} must be a multiple of 512 bytes, at most 64 TiB")]
    DiskSize(VolumeRef),
}

impl From<InvalidSpec> for Refusal {
    fn from(error: InvalidSpec) -> Self {
        Self::new(ErrorCode::SpecInvalid, error.to_string()).hint("correct the field and send the request again")
    }
}

impl VmSpec {
    /// Checks what can be checked without looking at any host.
    ///
    /// # Errors
    /// The first rule that the spec breaks.
    pub fn validate(&self) -> Result<(), InvalidSpec> {
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return Err(InvalidSpec::Vcpus(self.vcpus));
        }
        if self.memory < MIN_MEMORY || self.memory > MAX_MEMORY || !self.memory.get().is_multiple_of(Bytes::MIB.get()) {
            return Err(InvalidSpec::Memory(self.memory));
        }
        if self.disks.len() > MAX_DEVICES || self.nics.len() > MAX_DEVICES {
            return Err(InvalidSpec::Devices);
        }
        match &self.boot {
            Boot::Disk if self.disks.is_empty() => return Err(InvalidSpec::NoBootDisk),
            Boot::Kernel { cmdline, .. } if cmdline.len() > MAX_CMDLINE || !cmdline.bytes().all(|b| (b' '..=b'~').contains(&b)) => {
                return Err(InvalidSpec::Cmdline);
            }
            _ => {}
        }
        for (index, disk) in self.disks.iter().enumerate() {
            if self.disks.iter().take(index).any(|other| other.volume == disk.volume) {
                return Err(InvalidSpec::VolumeTwice(disk.volume.clone()));
            }
            if disk.size.is_some_and(|size| size.get() == 0 || size.get() > 64 << 40 || !size.get().is_multiple_of(512)) {
                return Err(InvalidSpec::DiskSize(disk.volume.clone()));
            }
        }
        for (what, text) in [("a machine type", &self.machine), ("a CPU model", &self.cpu)] {
            let plain = |text: &String| {
                (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
            };
            if text.as_ref().is_some_and(|text| !plain(text)) {
                return Err(InvalidSpec::Identifier(what));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VmSpec {
        VmSpec {
            vcpus: 2,
            memory: Bytes::mib(512),
            boot: Boot::Kernel { kernel: Name::new("k").expect("name"), initrd: None, cmdline: "quiet".into() },
            disks: vec![],
            nics: vec![],
            machine: None,
            cpu: None,
        }
    }

    #[test]
    fn a_spec_that_qemu_would_misread_is_refused() {
        type Change = fn(&mut VmSpec);
        let cases: [(&str, Change); 7] = [
            ("no vcpu", |s| s.vcpus = 0),
            ("odd memory", |s| s.memory = Bytes(Bytes::mib(512).get() + 1)),
            ("tiny memory", |s| s.memory = Bytes::MIB),
            ("option injection in the CPU", |s| s.cpu = Some("qemu64,+svm".into())),
            ("option injection in the machine", |s| s.machine = Some("q35,dumpdtb=/x".into())),
            ("newline in the command line", |s| {
                s.boot = Boot::Kernel { kernel: Name::new("k").expect("name"), initrd: None, cmdline: "a\nb".into() };
            }),
            ("boot from no disk", |s| s.boot = Boot::Disk),
        ];
        assert_eq!(spec().validate(), Ok(()));
        for (what, change) in cases {
            let mut changed = spec();
            change(&mut changed);
            assert!(changed.validate().is_err(), "{what} was accepted");
        }
    }

    #[test]
    fn volumes_and_macs_are_read_strictly() {
        assert!("shared/web1".parse::<VolumeRef>().is_ok());
        for bad in ["web1", "a/b/c", "/etc/passwd", "a/..", "../b/c"] {
            assert!(bad.parse::<VolumeRef>().is_err(), "{bad:?} was accepted");
        }
        assert_eq!("52:54:00:aB:cd:01".parse::<MacAddress>().expect("mac").to_string(), "52:54:00:ab:cd:01");
        for bad in ["", "52:54:00:ab:cd", "53:54:00:ab:cd:01", "00:00:00:00:00:00", "52:54:00:ab:cd:01:02", "+1:54:00:ab:cd:01"] {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad:?} was accepted");
        }
    }
}
