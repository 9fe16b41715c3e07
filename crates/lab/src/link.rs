//! The link of a place: rate, delay, loss, and whether the cable is whole.
//!
//! ```text
//!  host namespace                                            switch namespace
//!  sender -> eth0 clsact filter -(no mark)-> tap -> relay     p-hN -> bridge
//!                 \--(mark of the relay)--> eth0 qdisc ======> |
//!  receiver <------------------------------ eth0 <============ p-hN qdisc
//! ```
//! The qdisc of each end is `tbf` while frames pass that way, `blackhole` while they do not. A dropped frame is
//! reported to its sender as sent, and no carrier is lost: exactly what a cut behind the nearest switch looks like.
//! Delay and loss act on frames leaving the host; the tap exists only while there are any.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::layout::{Paths, UNDERLAY_MTU, namespace, switch_port};
use crate::network::SWITCH;
use crate::process::ProcessRef;
use crate::record::Record;
use crate::relay::{self, MARK, RelayPlan};
use crate::{LabError, command};

/// A rate in bits per second, each way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LinkRate(u64);

/// The share of frames that get lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Loss(u32);

/// Whether frames pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkState {
    /// Both ways.
    #[default]
    Up,
    /// Neither way; the host sees no loss of carrier.
    Down,
    /// What leaves the host is lost, what comes in arrives.
    OneWay,
}

/// What a link is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkStatus {
    /// Each way.
    pub rate: LinkRate,
    /// Added to frames leaving the host, in microseconds; the round trip grows by this much.
    pub delay_us: u64,
    /// Of frames leaving the host.
    pub loss: Loss,
    /// Whether frames pass.
    pub state: LinkState,
}

/// A change of a link; what is absent stays. A change of delay or loss loses the frames that are being held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinkChange {
    /// The new rate.
    pub rate: Option<LinkRate>,
    /// The new delay; zero for none.
    pub delay: Option<Duration>,
    /// The new loss; zero for none.
    pub loss: Option<Loss>,
    /// Cut, half cut, or mend.
    pub state: Option<LinkState>,
}

/// Why a rate or a loss cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseLinkError {
    /// Not a rate.
    #[error("{text:?} is not a rate: write 200mbit, 1gbit, or unlimited; at least 8kbit")]
    Rate {
        /// What was given.
        text: String,
    },
    /// Not a share.
    #[error("{text:?} is not a loss: write a number from 0% to 100%")]
    Loss {
        /// What was given.
        text: String,
    },
}

impl LinkRate {
    /// As fast as the machine can.
    pub const UNLIMITED: Self = Self(u64::MAX);

    /// A rate in bits per second, at least 8000.
    #[must_use]
    pub const fn from_bits_per_second(bits: u64) -> Self {
        Self(if bits < 8000 { 8000 } else { bits })
    }

    /// Bits per second; `u64::MAX` when unlimited.
    #[must_use]
    pub const fn bits_per_second(self) -> u64 {
        self.0
    }

    /// The arguments of `tc qdisc replace dev X root` that make this rate.
    fn qdisc(self) -> String {
        if self == Self::UNLIMITED {
            return "noqueue".to_owned();
        }
        // 2 ms of data at once keeps the cost of timers low; a frame must fit, larger ones are cut by tbf itself.
        let burst = (self.0 / 8 / 500).clamp(16 * 1024, 32 << 20);
        format!("handle 1: tbf rate {}bit burst {burst}b latency 20ms", self.0)
    }
}

impl FromStr for LinkRate {
    type Err = ParseLinkError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "unlimited" {
            return Ok(Self::UNLIMITED);
        }
        let wrong = || ParseLinkError::Rate { text: text.to_owned() };
        let lower = text.to_ascii_lowercase();
        let digits = lower.find(|c: char| !c.is_ascii_digit()).unwrap_or(lower.len());
        let (number, unit) = lower.split_at(digits);
        let factor: u64 = match unit {
            "" | "bit" => 1,
            "k" | "kbit" => 1000,
            "m" | "mbit" => 1_000_000,
            "g" | "gbit" => 1_000_000_000,
            _ => return Err(wrong()),
        };
        let bits = number.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)).ok_or_else(wrong)?;
        if (8000..=1_000_000_000_000).contains(&bits) { Ok(Self(bits)) } else { Err(wrong()) }
    }
}

impl fmt::Display for LinkRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::UNLIMITED {
            return f.write_str("unlimited");
        }
        for (factor, unit) in [(1_000_000_000, "gbit"), (1_000_000, "mbit"), (1000, "kbit")] {
            if self.0.is_multiple_of(factor) {
                return write!(f, "{}{unit}", self.0 / factor);
            }
        }
        write!(f, "{}bit", self.0)
    }
}

impl Loss {
    /// Nothing is lost.
    pub const NONE: Self = Self(0);

    /// Parts per million, at most a million.
    #[must_use]
    pub const fn from_parts_per_million(parts: u32) -> Self {
        Self(if parts > 1_000_000 { 1_000_000 } else { parts })
    }

    /// Parts per million.
    #[must_use]
    pub const fn parts_per_million(self) -> u32 {
        self.0
    }
}

impl FromStr for Loss {
    type Err = ParseLinkError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseLinkError::Loss { text: text.to_owned() };
        let percent: f64 = text.strip_suffix('%').unwrap_or(text).parse().map_err(|_| wrong())?;
        if !(0.0..=100.0).contains(&percent) {
            return Err(wrong());
        }
        // In range, so the cast only rounds.
        Ok(Self((percent * 10_000.0).round() as u32))
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", f64::from(self.0) / 10_000.0)
    }
}

impl LinkStatus {
    /// A whole cable of the given rate.
    #[must_use]
    pub const fn with_rate(rate: LinkRate) -> Self {
        Self { rate, delay_us: 0, loss: Loss::NONE, state: LinkState::Up }
    }

    /// What it is after `change`.
    #[must_use]
    pub fn after(self, change: LinkChange) -> Self {
        let delay_us = change.delay.map(|delay| u64::try_from(delay.as_micros()).unwrap_or(u64::MAX));
        Self {
            rate: change.rate.unwrap_or(self.rate),
            delay_us: delay_us.unwrap_or(self.delay_us),
            loss: change.loss.unwrap_or(self.loss),
            state: change.state.unwrap_or(self.state),
        }
    }

    fn needs_relay(self) -> bool {
        self.delay_us > 0 || self.loss > Loss::NONE
    }
}

/// A link as recorded: what it is like, and the relay that makes it so.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Link {
    pub(crate) status: LinkStatus,
    pub(crate) relay: Option<Relay>,
}

/// A running relay.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Relay {
    pub(crate) process: ProcessRef,
    /// 0 or 1: two sets of names, so that a new relay is in place before the old one goes.
    pub(crate) set: u8,
}

/// Makes the qdiscs of both ends what `status` says.
pub(crate) fn apply_qdiscs(lab: &str, place: &str, status: LinkStatus) -> Result<(), LabError> {
    let rate = status.rate.qdisc();
    let leaving = if status.state == LinkState::Up { rate.as_str() } else { "blackhole" };
    let arriving = if status.state == LinkState::Down { "blackhole" } else { rate.as_str() };
    let port = switch_port(place);
    command::batch("tc", &namespace(lab, place), &format!("qdisc replace dev eth0 root {leaving}\n"))?;
    command::batch("tc", &namespace(lab, SWITCH), &format!("qdisc replace dev {port} root {arriving}\n"))
}

/// Changes the link of `place` and records it.
pub(crate) fn change(record: &mut Record, place: &str, change: LinkChange) -> Result<(), LabError> {
    let lab = record.spec.name.clone();
    let unknown = || LabError::UnknownHost { lab: lab.clone(), host: place.to_owned() };
    let link = *record.links.get(place).ok_or_else(unknown)?;
    let status = link.status.after(change);
    let same_relay = (status.delay_us, status.loss) == (link.status.delay_us, link.status.loss);
    apply_qdiscs(&lab, place, status)?;
    let alive = record.is_of_this_boot() && link.relay.is_some_and(|relay| relay.process.is_running());
    let relay = if same_relay && alive == status.needs_relay() {
        link.relay
    } else if status.needs_relay() {
        Some(start_relay(record, place, status, link.relay)?)
    } else {
        None
    };
    record.links.insert(place.to_owned(), Link { status, relay });
    record.save()?;
    match link.relay {
        Some(old) if relay.map(|new| new.set) != Some(old.set) => stop_relay(&lab, place, old, relay.is_none()),
        _ => Ok(()),
    }
}

/// Starts a relay beside the present one, if any, and leads the frames to it.
fn start_relay(record: &Record, place: &str, status: LinkStatus, old: Option<Relay>) -> Result<Relay, LabError> {
    let set = old.map_or(0, |old| 1 - old.set.min(1));
    let plan = RelayPlan {
        tap: tap(set),
        out: "eth0".to_owned(),
        delay_us: status.delay_us,
        loss: status.loss,
        seed: u64::from(record.uid_slot),
    };
    let paths: Paths = record.paths();
    let here = namespace(&record.spec.name, place);
    let process = relay::start(&record.spec.godwit, &here, &plan, &paths.relay_log(place))?;
    let device = &plan.tap;
    command::batch("ip", &here, &format!("link set {device} mtu {UNDERLAY_MTU} up\n"))?;
    if old.is_none() {
        // One may be left from a change that did not come to its end.
        let _ = command::batch("tc", &here, REMOVE_FILTERS);
        command::batch("tc", &here, "qdisc add dev eth0 clsact\n")?;
    }
    // Classic BPF: frames without the relay's mark match. `u32 match mark` is taken and ignored by kernels without it.
    let bytecode = format!("4,32 0 0 4294963220,21 1 0 {MARK},6 0 0 4294967295,6 0 0 0");
    let pref = preference(set);
    command::run(
        "tc",
        &[
            "-n", &here, "filter", "add", "dev", "eth0", "egress", "pref", &pref, "protocol", "all", "bpf", "bytecode", &bytecode,
            "action", "mirred", "egress", "redirect", "dev", device,
        ],
    )?;
    Ok(Relay { process, set })
}

/// Takes the frames away from a relay, then ends it; its tap goes with it.
fn stop_relay(lab: &str, place: &str, relay: Relay, last: bool) -> Result<(), LabError> {
    let here = namespace(lab, place);
    let pref = preference(relay.set);
    if last {
        command::batch("tc", &here, REMOVE_FILTERS)?;
    } else {
        command::batch("tc", &here, &format!("filter del dev eth0 egress pref {pref}\n"))?;
    }
    relay.process.signal(rustix::process::Signal::TERM)?;
    relay.process.wait_exit(Duration::from_secs(5))
}

/// Removes the hook on frames that leave, and all filters on it.
const REMOVE_FILTERS: &str = "qdisc del dev eth0 clsact\n";

fn tap(set: u8) -> String {
    format!("gwdelay{set}")
}

fn preference(set: u8) -> String {
    (u16::from(set) + 1).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_as_they_are_shown() {
        for (text, bits) in [("1gbit", 1_000_000_000), ("200mbit", 200_000_000), ("8kbit", 8000), ("9001bit", 9001)] {
            let rate: LinkRate = text.parse().expect(text);
            assert_eq!((rate.bits_per_second(), rate.to_string().as_str()), (bits, text));
        }
        assert_eq!("unlimited".parse(), Ok(LinkRate::UNLIMITED));
        for bad in ["", "fast", "1", "-1mbit", "1 gbit", "99999999999999999999gbit", "18446744073709551615gbit", "1mb"] {
            assert!(bad.parse::<LinkRate>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn loss_is_a_percentage() {
        assert_eq!("0.5%".parse(), Ok(Loss::from_parts_per_million(5000)));
        assert_eq!("100".parse(), Ok(Loss::from_parts_per_million(1_000_000)));
        assert_eq!(Loss::from_parts_per_million(5000).to_string(), "0.5%");
        for bad in ["", "-1%", "101%", "NaN", "x"] {
            assert!(bad.parse::<Loss>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_change_leaves_alone_what_it_does_not_name() {
        let before = LinkStatus::with_rate(LinkRate::from_bits_per_second(1_000_000));
        let cut = before.after(LinkChange { state: Some(LinkState::Down), ..LinkChange::default() });
        assert_eq!((cut.rate, cut.state), (before.rate, LinkState::Down));
        let slow = cut.after(LinkChange { delay: Some(Duration::from_millis(40)), ..LinkChange::default() });
        assert_eq!((slow.state, slow.delay_us), (LinkState::Down, 40_000));
        assert!(slow.needs_relay());
    }

    #[test]
    fn the_queue_of_a_slow_link_stays_short() {
        let slow = LinkRate::from_bits_per_second(10_000_000).qdisc();
        assert_eq!(slow, "handle 1: tbf rate 10000000bit burst 16384b latency 20ms");
        let fast = LinkRate::from_bits_per_second(1_000_000_000).qdisc();
        assert_eq!(fast, "handle 1: tbf rate 1000000000bit burst 250000b latency 20ms");
    }
}
