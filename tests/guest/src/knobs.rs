//! What can be asked of a guest: `guest.KEY=VALUE` words on the kernel's command line.

use std::net::{Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use crate::load::Rewrite;
use crate::pages::{PAGE_SIZE, PageKind};

/// The settings of one guest.
///
/// | word | default | meaning |
/// |---|---|---|
/// | `guest.id=web1` | `guest` | the name in records and status, up to 64 bytes |
/// | `guest.ip=10.99.0.10/24` | none | address of eth0; without it the network stays down |
/// | `guest.gw=10.99.0.1` | none | default route |
/// | `guest.mtu=1450` | the device's | MTU of eth0 |
/// | `guest.witness=10.99.0.1:9999` | none | where records of the witness go |
/// | `guest.witness_every=10` | 10 | milliseconds between two records |
/// | `guest.touch_total=256M` | 256M | memory that is allocated, written and checked |
/// | `guest.working_set=64M` | 64M | the part of it that is written again and again |
/// | `guest.dirty=20M` | 20M | bytes per second of pages that are dirtied, as migration counts them: 4096 per write |
/// | `guest.phase=20` | none | seconds for which it writes so, and then rests, in turns |
/// | `guest.write_size=64..4096` | `64..4096` | bytes changed by one write, rounded up to 8 |
/// | `guest.mix=unique:40,zero:60` | 40,30,10,10,10 | percent of pages per kind: unique, compressible, duplicate, zero, slow |
/// | `guest.load=change` | none | `change` or `equal`: memory for measurements, see `Load`, whose writes have exactly the smallest `write_size`; no checker |
/// | `guest.check=64M` | 64M | bytes per second that the checker reads; `max` for as many as it can, 0 for none |
/// | `guest.tick=10` | 10 | milliseconds between two turns of its work: emulated, each costs the host more than what is done in it |
/// | `guest.disk=32M` | 0 | bytes at the beginning of each virtio disk that are written, and checked again and again |
/// | `guest.disk_dirty=1M` | 1M | bytes per second that are written to each of them anew |
/// | `guest.tcp_rate=1M` | 1M | bytes per second of each stream connection |
///
/// Suggested words for the kernel itself:
/// `console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on`, with QEMU's `-no-reboot`: a panic then ends QEMU.
/// Emulated by QEMU 7.2 take `cx16` off the CPU (`-cpu NAME,-cx16`): its cmpxchg16b spoils the flags, and a kernel 6.12 dies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Knobs {
    /// Name of the VM in records and status.
    pub id: String,
    /// Address and prefix length of eth0.
    pub ip: Option<(Ipv4Addr, u8)>,
    /// Gateway of the default route.
    pub gateway: Option<Ipv4Addr>,
    /// MTU of eth0, where it is not the device's own.
    pub mtu: Option<u32>,
    /// Where records of the witness go.
    pub witness: Option<SocketAddr>,
    /// Time between two records.
    pub witness_every: Duration,
    /// Bytes of memory that are written and checked.
    pub touch_total: u64,
    /// Bytes of it that are written again and again.
    pub working_set: u64,
    /// Bytes of pages dirtied per second.
    pub dirty: u64,
    /// How long it writes, and then rests, in turns; `None` is without rest.
    pub phase: Option<Duration>,
    /// Bytes changed by one write.
    pub write_size: RangeInclusive<usize>,
    /// How many pages are of which kind.
    pub mix: Mix,
    /// What becomes of written words, where the memory is for measurements.
    pub load: Option<Rewrite>,
    /// Bytes checked per second; `None` is as many as possible.
    pub check: Option<u64>,
    /// Time between two turns of its work.
    pub tick: Duration,
    /// Bytes of each disk that are written and checked.
    pub disk: u64,
    /// Bytes of each disk written anew per second.
    pub disk_dirty: u64,
    /// Bytes per second of each stream connection.
    pub tcp_rate: u64,
}

/// Percent of pages of each kind; they sum up to 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mix {
    /// Noise: nothing to gain for anybody.
    pub unique: u8,
    /// Repeated text.
    pub compressible: u8,
    /// A few contents shared by all pages of this kind.
    pub duplicate: u8,
    /// Nothing but zeros, written again as zeros.
    pub zero: u8,
    /// Noise of which a write changes eight bytes only.
    pub slow: u8,
}

/// Why a command line was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KnobError {
    /// A key that no guest knows.
    #[error("unknown knob guest.{key}")]
    Unknown {
        /// The key.
        key: String,
    },
    /// A value that does not fit its key.
    #[error("guest.{key}={value}: expected {expected}")]
    Value {
        /// The key.
        key: String,
        /// What was given.
        value: String,
        /// What is accepted.
        expected: &'static str,
    },
}

impl Default for Mix {
    fn default() -> Self {
        Self { unique: 40, compressible: 30, duplicate: 10, zero: 10, slow: 10 }
    }
}

impl Mix {
    /// The kind of the page at `index`. Kinds are spread evenly, so that every working set has its share of each.
    #[must_use]
    pub const fn kind(&self, index: usize) -> PageKind {
        let Self { unique, compressible, duplicate, zero, .. } = *self;
        // 37 has no factor in common with 100: every hundred pages hold exactly the percentages.
        let mut place = ((index % 100) * 37 % 100) as u8;
        if place < unique {
            return PageKind::Unique;
        }
        place -= unique;
        if place < compressible {
            return PageKind::Compressible;
        }
        place -= compressible;
        if place < duplicate {
            return PageKind::Duplicate;
        }
        place -= duplicate;
        if place < zero { PageKind::Zero } else { PageKind::Slow }
    }
}

impl Default for Knobs {
    fn default() -> Self {
        Self {
            id: "guest".to_owned(),
            ip: None,
            gateway: None,
            mtu: None,
            witness: None,
            witness_every: Duration::from_millis(10),
            touch_total: 256 << 20,
            working_set: 64 << 20,
            dirty: 20 << 20,
            phase: None,
            write_size: 64..=PAGE_SIZE,
            mix: Mix::default(),
            load: None,
            check: Some(64 << 20),
            tick: Duration::from_millis(10),
            disk: 0,
            disk_dirty: 1 << 20,
            tcp_rate: 1 << 20,
        }
    }
}

impl Knobs {
    /// Reads the knobs out of a kernel command line; words of others are passed over.
    ///
    /// # Errors
    /// An unknown key or a bad value: a test that asks for something must not run without it.
    pub fn parse(cmdline: &str) -> Result<Self, KnobError> {
        let mut knobs = Self::default();
        for word in cmdline.split_whitespace() {
            if let Some((key, value)) = word.strip_prefix("guest.").and_then(|w| w.split_once('=')) {
                knobs.set(key, value)?;
            }
        }
        Ok(knobs)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), KnobError> {
        let bad = |expected| KnobError::Value { key: key.to_owned(), value: value.to_owned(), expected };
        let bytes = || size(value).ok_or_else(|| bad("bytes, such as 64M"));
        match key {
            "id" if !value.is_empty() && value.len() <= 64 => value.clone_into(&mut self.id),
            "id" => return Err(bad("1 to 64 bytes")),
            "ip" => self.ip = Some(address(value).ok_or_else(|| bad("ADDRESS/PREFIX"))?),
            "gw" => self.gateway = Some(value.parse().map_err(|_| bad("an IPv4 address"))?),
            "mtu" => self.mtu = Some(within(value, 68..=65_535).ok_or_else(|| bad("68 to 65535"))?),
            "witness" => self.witness = Some(value.parse().map_err(|_| bad("ADDRESS:PORT"))?),
            "witness_every" => {
                let millis = within(value, 1..=60_000).ok_or_else(|| bad("1 to 60000 milliseconds"))?;
                self.witness_every = Duration::from_millis(millis);
            }
            "touch_total" => self.touch_total = bytes()?,
            "working_set" => self.working_set = bytes()?,
            "dirty" => self.dirty = bytes()?,
            "phase" => self.phase = Some(Duration::from_secs(within(value, 1..=3_600).ok_or_else(|| bad("1 to 3600 seconds"))?)),
            "write_size" => self.write_size = write_size(value).ok_or_else(|| bad("8..4096 or part of it"))?,
            "mix" => self.mix = mix(value).ok_or_else(|| bad("KIND:PERCENT,… with a sum of 100"))?,
            "load" => {
                self.load = match value {
                    "change" => Some(Rewrite::Change),
                    "equal" => Some(Rewrite::Equal),
                    _ => return Err(bad("change or equal")),
                };
            }
            "check" => self.check = if value == "max" { None } else { Some(bytes()?) },
            "tick" => self.tick = Duration::from_millis(within(value, 1..=40).ok_or_else(|| bad("1 to 40 milliseconds"))?),
            "disk" => self.disk = bytes()?,
            "disk_dirty" => self.disk_dirty = bytes()?,
            "tcp_rate" => self.tcp_rate = bytes()?,
            _ => return Err(KnobError::Unknown { key: key.to_owned() }),
        }
        Ok(())
    }
}

fn size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.chars().last()? {
        'K' | 'k' => (text.get(..text.len() - 1)?, 10),
        'M' | 'm' => (text.get(..text.len() - 1)?, 20),
        'G' | 'g' => (text.get(..text.len() - 1)?, 30),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn within<T: FromStr + PartialOrd>(text: &str, range: RangeInclusive<T>) -> Option<T> {
    text.parse().ok().filter(|number| range.contains(number))
}

fn address(text: &str) -> Option<(Ipv4Addr, u8)> {
    let (address, prefix) = text.split_once('/')?;
    Some((address.parse().ok()?, within(prefix, 0..=32)?))
}

fn write_size(text: &str) -> Option<RangeInclusive<usize>> {
    let (low, high) = text.split_once("..").unwrap_or((text, text));
    let (low, high) = (within(low, 8..=PAGE_SIZE)?, within(high, 8..=PAGE_SIZE)?);
    (low <= high).then_some(low..=high)
}

fn mix(text: &str) -> Option<Mix> {
    let mut mix = Mix { unique: 0, compressible: 0, duplicate: 0, zero: 0, slow: 0 };
    for part in text.split(',') {
        let (kind, percent) = part.split_once(':')?;
        let percent = within(percent, 0..=100)?;
        *match kind {
            "unique" => &mut mix.unique,
            "compressible" => &mut mix.compressible,
            "duplicate" => &mut mix.duplicate,
            "zero" => &mut mix.zero,
            "slow" => &mut mix.slow,
            _ => return None,
        } = percent;
    }
    let sum: u32 = [mix.unique, mix.compressible, mix.duplicate, mix.zero, mix.slow].map(u32::from).iter().sum();
    (sum == 100).then_some(mix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_command_line() {
        let knobs = Knobs::parse(
            "console=ttyS0 quiet panic=-1 guest.id=web1 guest.ip=10.99.0.10/24 guest.gw=10.99.0.1 guest.mtu=1450 \
             guest.witness=10.99.0.1:9999 guest.witness_every=20 guest.touch_total=1G guest.working_set=64M \
             guest.dirty=0 guest.phase=7 guest.write_size=64..512 guest.mix=unique:50,zero:50 guest.load=equal guest.check=max guest.tick=40 \
             guest.disk=32M guest.disk_dirty=4K guest.tcp_rate=100K\n",
        )
        .unwrap();
        assert_eq!(knobs.id, "web1");
        assert_eq!(knobs.ip, Some((Ipv4Addr::new(10, 99, 0, 10), 24)));
        assert_eq!(knobs.gateway, Some(Ipv4Addr::new(10, 99, 0, 1)));
        assert_eq!(knobs.mtu, Some(1450));
        assert_eq!(knobs.witness, Some("10.99.0.1:9999".parse().unwrap()));
        assert_eq!(knobs.witness_every, Duration::from_millis(20));
        assert_eq!((knobs.touch_total, knobs.working_set, knobs.dirty), (1 << 30, 64 << 20, 0));
        assert_eq!(knobs.phase, Some(Duration::from_secs(7)));
        assert_eq!(knobs.write_size, 64..=512);
        assert_eq!(knobs.mix, Mix { unique: 50, compressible: 0, duplicate: 0, zero: 50, slow: 0 });
        assert_eq!(knobs.load, Some(Rewrite::Equal));
        assert_eq!(knobs.check, None);
        assert_eq!(knobs.tick, Duration::from_millis(40));
        assert_eq!((knobs.disk, knobs.disk_dirty, knobs.tcp_rate), (32 << 20, 4 << 10, 100 << 10));
    }

    #[test]
    fn without_words_the_defaults() {
        assert_eq!(Knobs::parse("console=ttyS0 root=/dev/vda guestbook=1").unwrap(), Knobs::default());
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        for word in [
            "ip=10.99.0.10",
            "ip=10.99.0.10/33",
            "gw=x",
            "mtu=9",
            "witness=10.0.0.1",
            "witness_every=0",
            "touch_total=64X",
            "touch_total=99999999999999999999G",
            "dirty=",
            "dirty=-1",
            "phase=0",
            "write_size=0..64",
            "write_size=512..64",
            "write_size=64..8192",
            "mix=unique:50",
            "mix=unique:50,other:50",
            "mix=unique:200",
            "load=checked",
            "tick=41",
            "id=",
        ] {
            let key = word.split('=').next().unwrap();
            match Knobs::parse(&format!("guest.{word}")) {
                Err(KnobError::Value { key: named, .. }) => assert_eq!(named, key),
                other => panic!("{word}: {other:?}"),
            }
        }
        assert_eq!(Knobs::parse("guest.colour=1"), Err(KnobError::Unknown { key: "colour".to_owned() }));
    }
}
