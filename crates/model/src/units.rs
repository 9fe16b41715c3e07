//! Quantities: each has a unit, so that no bare number crosses a public signature.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

macro_rules! quantity {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema,
        )]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The bare number, in this unit.
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }
        }
    };
}

quantity! {
    /// An amount of memory, disk or wire, in bytes.
    Bytes
}
quantity! {
    /// A rate, in bytes per second.
    BytesPerSec
}
quantity! {
    /// A span of time, in milliseconds.
    Millis
}
quantity! {
    /// A span of time that people set, in seconds.
    Seconds
}
quantity! {
    /// A moment: milliseconds since 1970-01-01 UTC.
    UnixMillis
}

impl Bytes {
    /// One KiB.
    pub const KIB: Self = Self(1 << 10);
    /// One MiB.
    pub const MIB: Self = Self(1 << 20);
    /// One GiB.
    pub const GIB: Self = Self(1 << 30);

    /// This many MiB.
    #[must_use]
    pub const fn mib(count: u64) -> Self {
        Self(count << 20)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, name) = match self.0 {
            n if n >= 1 << 40 => (1_u64 << 40, "TiB"),
            n if n >= 1 << 30 => (1 << 30, "GiB"),
            n if n >= 1 << 20 => (1 << 20, "MiB"),
            n if n >= 1 << 10 => (1 << 10, "KiB"),
            n => return f.pad(&format!("{n} B")),
        };
        let whole = self.0 / unit;
        let tenth = (self.0 % unit) * 10 / unit;
        f.pad(&if tenth == 0 { format!("{whole} {name}") } else { format!("{whole}.{tenth} {name}") })
    }
}

impl fmt::Display for BytesPerSec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}/s", Bytes(self.0)))
    }
}

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&match self.0 {
            ms if ms < 1_000 => format!("{ms} ms"),
            ms if ms < 60_000 => format!("{}.{} s", ms / 1_000, ms % 1_000 / 100),
            ms => format!("{} min {} s", ms / 60_000, ms % 60_000 / 1_000),
        })
    }
}

/// Why a text is not an amount.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an amount: write a whole number with an optional unit, {expected}")]
pub struct InvalidAmount {
    text: String,
    expected: &'static str,
}

/// Splits `text` into number and unit and multiplies; `None` on any surprise, overflow included.
fn parse_amount(text: &str, unit_of: impl Fn(&str) -> Option<u64>) -> Option<u64> {
    let text = text.trim();
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    number.parse::<u64>().ok()?.checked_mul(unit_of(&unit.trim().to_ascii_lowercase())?)
}

impl FromStr for Bytes {
    type Err = InvalidAmount;

    /// `1073741824`, `512M`, `512MiB`, `1G`: powers of 1,024.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_amount(text, |unit| {
            Some(match unit {
                "" | "b" => 1,
                "k" | "kib" => 1 << 10,
                "m" | "mib" => 1 << 20,
                "g" | "gib" => 1 << 30,
                "t" | "tib" => 1 << 40,
                _ => return None,
            })
        })
        .map(Self)
        .ok_or_else(|| InvalidAmount { text: text.chars().take(40).collect(), expected: "K, M, G or T (powers of 1,024)" })
    }
}

impl FromStr for BytesPerSec {
    type Err = InvalidAmount;

    /// `125000000`, `100MiB/s`, or as links are named: `1gbit`, `200mbit` (powers of 1,000).
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_amount(text, |unit| {
            Some(match unit.trim_end_matches("/s") {
                "" | "b" => 1,
                "k" | "kib" => 1 << 10,
                "m" | "mib" => 1 << 20,
                "g" | "gib" => 1 << 30,
                "kbit" => 125,
                "mbit" => 125_000,
                "gbit" => 125_000_000,
                _ => return None,
            })
        })
        .map(Self)
        .ok_or_else(|| InvalidAmount { text: text.chars().take(40).collect(), expected: "KiB/s, MiB/s, GiB/s, kbit, mbit or gbit" })
    }
}

impl FromStr for Millis {
    type Err = InvalidAmount;

    /// `300ms`, `10s`, `5m`, `1h`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_amount(text, |unit| {
            Some(match unit {
                "ms" => 1,
                "s" => 1_000,
                "m" | "min" => 60_000,
                "h" => 3_600_000,
                _ => return None,
            })
        })
        .map(Self)
        .ok_or_else(|| InvalidAmount { text: text.chars().take(40).collect(), expected: "ms, s, m or h (the unit is required)" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_with_their_units() {
        assert_eq!("512M".parse(), Ok(Bytes::mib(512)));
        assert_eq!("1 GiB".parse(), Ok(Bytes::GIB));
        assert_eq!("1gbit".parse(), Ok(BytesPerSec(125_000_000)));
        assert_eq!("300ms".parse(), Ok(Millis(300)));
        for bad in ["", "M", "-1", "1.5G", "1X", "99999999999999999999", "18446744073709551615K"] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad:?} was accepted");
        }
        assert!("300".parse::<Millis>().is_err(), "a bare number has no unit of time");
    }

    #[test]
    fn amounts_are_shown_with_one_decimal() {
        assert_eq!(Bytes(1 << 30).to_string(), "1 GiB");
        assert_eq!(Bytes(1_610_612_736).to_string(), "1.5 GiB");
        assert_eq!(Bytes(17).to_string(), "17 B");
        assert_eq!(Millis(1_234).to_string(), "1.2 s");
    }
}
