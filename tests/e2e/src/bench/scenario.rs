//! What is measured: guests with exact contents and writes, or with a Debian, and the links over which they move.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use godwit_lab::LinkRate;
use godwit_model::{Bytes, Ladder, MigrationPolicy, Rung};

const PAGE: u64 = 4096;

/// A guest, what it does, and what happens to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scenario {
    /// 300 MiB compressible, 100 MiB random, 100 MiB duplicate pages; 64 MiB of them written 8 bytes at a time, 2,000 pages/s.
    A,
    /// As `A`, but 256 MiB written, 40,000 pages/s, 8 bytes at random places.
    B8,
    /// As `B8`, 512 bytes at a time.
    B512,
    /// As `B8`, whole pages of new random content.
    B4096,
    /// As `B8`, with the values that are there already.
    C,
    /// The VM of `A` goes home after 10 s: the way home is measured.
    R,
    /// As `A`, and the destination's link is cut three times for 5 s.
    K,
    /// 500 MiB of random content, written as in `A`.
    X,
    /// As `A`, over 100 Mbit/s with round trips of 80 ms.
    W,
    /// A Debian whose redis holds 250 MiB, which are read and written by a load of its own.
    D,
    /// Eight Debians of 256 MiB, of one image that each of them has read for the most part, leave together.
    E,
}

/// A link between the hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Each way.
    pub rate: LinkRate,
    /// What a round trip takes longer.
    pub round_trip: Duration,
}

impl Scenario {
    /// All of them, in the order in which they are measured.
    pub const ALL: [Self; 11] =
        [Self::A, Self::B8, Self::B512, Self::B4096, Self::C, Self::R, Self::K, Self::X, Self::W, Self::D, Self::E];

    /// Its name in rows and arguments.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::A => "A",
            Self::B8 => "B8",
            Self::B512 => "B512",
            Self::B4096 => "B4096",
            Self::C => "C",
            Self::R => "R",
            Self::K => "K",
            Self::X => "X",
            Self::W => "W",
            Self::D => "D",
            Self::E => "E",
        }
    }

    /// What a word of the command line selects: `B` is all three of its variants.
    ///
    /// # Errors
    /// When it selects nothing.
    pub fn select(word: &str) -> Result<Vec<Self>> {
        let hot = |scenario: &Self| word == "B" && matches!(scenario, Self::B8 | Self::B512 | Self::B4096);
        let found: Vec<Self> = Self::ALL.into_iter().filter(|scenario| scenario.as_str() == word || hot(scenario)).collect();
        match found.is_empty() {
            false => Ok(found),
            true => bail!("no scenario {word}: there are {}, and B for all of its kind", Self::ALL.map(Self::as_str).join(", ")),
        }
    }

    /// The links over which it is measured, of those that were asked for.
    pub(super) fn links(self, asked: &[Link]) -> Vec<Link> {
        match self {
            Self::W => {
                vec![Link { rate: LinkRate::from_bits_per_second(100_000_000), round_trip: Duration::from_millis(80) }]
            }
            _ => asked.to_vec(),
        }
    }

    /// How many guests move together.
    pub(super) const fn guests(self) -> u8 {
        if matches!(self, Self::E) { 8 } else { 1 }
    }

    /// Godwit's policy: where the guest may write more than the link takes, post-copy.
    pub(super) fn policy(self) -> MigrationPolicy {
        let on_miss = if matches!(self, Self::B512 | Self::B4096) { Ladder::only(Rung::Postcopy) } else { Ladder::default() };
        MigrationPolicy { on_miss, ..MigrationPolicy::default() }
    }

    /// Whether the VMs' team has them share memory.
    pub(super) const fn shares_memory(self) -> bool {
        matches!(self, Self::E)
    }

    /// RAM of each guest.
    pub(super) const fn memory(self) -> Bytes {
        if matches!(self, Self::E) { Bytes::mib(256) } else { Bytes::GIB }
    }

    /// The work of its Debian (see `scripts/cloud-image`); nothing where the test guest is all that runs.
    pub(super) const fn debian(self) -> Option<&'static str> {
        match self {
            Self::D => Some("redis"),
            Self::E => Some("files"),
            _ => None,
        }
    }

    /// What is written again and again.
    pub(super) const fn working_set(self) -> Bytes {
        match self {
            Self::A | Self::R | Self::K | Self::X | Self::W | Self::E => Bytes::mib(64),
            Self::B8 | Self::B512 | Self::B4096 | Self::C | Self::D => Bytes::mib(256),
        }
    }

    /// Pages that the test guest writes per second.
    const fn rate(self) -> u64 {
        match self {
            Self::A | Self::R | Self::K | Self::X | Self::W => 2_000,
            Self::B8 | Self::B512 | Self::B4096 | Self::C => 40_000,
            Self::D | Self::E => 100,
        }
    }

    /// Words for the guest's kernel.
    pub(super) fn words(self) -> Vec<String> {
        self.debian().map_or_else(Vec::new, |work| vec!["rdinit=/boot-disk".to_owned(), format!("work={work}")])
    }

    /// Words `KEY=VALUE` for the guest.
    pub(super) fn knobs(self) -> Vec<String> {
        let mix = if self == Self::X { "unique:100" } else { "compressible:60,unique:20,duplicate:20" };
        let write_size = match self {
            Self::B512 => 512,
            Self::B4096 => PAGE,
            _ => 8,
        };
        // Beside a Debian only as much as shows what a move spoils.
        let (total, working_set) = match self.debian() {
            Some(_) => (Bytes::mib(8), Bytes::mib(2)),
            None => (Bytes::mib(500), self.working_set()),
        };
        let mut knobs = vec![
            format!("touch_total={}", total.get()),
            format!("mix={mix}"),
            format!("load={}", if self == Self::C { "equal" } else { "change" }),
            format!("working_set={}", working_set.get()),
            format!("dirty={}", self.rate() * PAGE),
            format!("write_size={write_size}"),
            "witness_every=1000".to_owned(),
        ];
        if self.guests() > 1 {
            // Else their emulated timers alone keep a small machine busy.
            knobs.push("tick=40".to_owned());
        }
        knobs
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Link {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(Self { rate: text.parse().with_context(|| format!("link {text}"))?, round_trip: Duration::ZERO })
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.round_trip.as_millis() {
            0 => self.rate.fmt(f),
            millis => write!(f, "{}+{millis}ms", self.rate),
        }
    }
}

#[cfg(test)]
mod tests {
    use godwit_guest::{Knobs, Rewrite};

    use super::*;

    fn knobs(scenario: Scenario) -> Knobs {
        let words: Vec<String> = scenario.knobs().iter().map(|word| format!("guest.{word}")).collect();
        Knobs::parse(&words.join(" ")).unwrap()
    }

    #[test]
    fn every_guest_is_what_its_scenario_says() {
        for (scenario, set, rate, size, rewrite) in [
            (Scenario::A, 64, 2_000, 8, Rewrite::Change),
            (Scenario::B8, 256, 40_000, 8, Rewrite::Change),
            (Scenario::B512, 256, 40_000, 512, Rewrite::Change),
            (Scenario::B4096, 256, 40_000, 4096, Rewrite::Change),
            (Scenario::C, 256, 40_000, 8, Rewrite::Equal),
            (Scenario::X, 64, 2_000, 8, Rewrite::Change),
        ] {
            let knobs = knobs(scenario);
            assert_eq!((knobs.touch_total, knobs.working_set), (500 << 20, set << 20), "{scenario}");
            assert_eq!((knobs.dirty, knobs.write_size, knobs.load), (rate * 4096, size..=size, Some(rewrite)), "{scenario}");
        }
        assert_eq!([Scenario::R, Scenario::K, Scenario::W].map(knobs), [(); 3].map(|()| knobs(Scenario::A)));
    }

    #[test]
    fn beside_a_debian_little_is_checked() {
        for (scenario, guests, memory) in [(Scenario::D, 1, Bytes::GIB), (Scenario::E, 8, Bytes::mib(256))] {
            assert_eq!((scenario.guests(), scenario.memory()), (guests, memory), "{scenario}");
            let knobs = knobs(scenario);
            assert_eq!((knobs.touch_total, knobs.working_set, knobs.dirty), (8 << 20, 2 << 20, 100 * PAGE), "{scenario}");
        }
        assert_eq!(Scenario::D.words(), ["rdinit=/boot-disk", "work=redis"]);
        assert!(Scenario::A.words().is_empty());
    }

    #[test]
    fn words_select_scenarios() {
        for scenario in Scenario::ALL {
            assert_eq!(Scenario::select(scenario.as_str()).unwrap(), [scenario]);
        }
        assert_eq!(Scenario::select("B").unwrap(), [Scenario::B8, Scenario::B512, Scenario::B4096]);
        assert!(Scenario::select("Z").is_err());
    }

    #[test]
    fn links_are_named_by_what_they_are() {
        let asked: [Link; 2] = ["200mbit", "1gbit"].map(|text| text.parse().unwrap());
        assert_eq!(Scenario::A.links(&asked).iter().map(ToString::to_string).collect::<Vec<_>>(), ["200mbit", "1gbit"]);
        assert_eq!(Scenario::W.links(&asked).iter().map(ToString::to_string).collect::<Vec<_>>(), ["100mbit+80ms"]);
    }
}
