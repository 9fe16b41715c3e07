//! Names with a shape of their own: a volume in its pool, an Ethernet address. Read strictly, shown in one way.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{InvalidName, Name};

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

#[cfg(test)]
mod tests {
    use super::*;

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
