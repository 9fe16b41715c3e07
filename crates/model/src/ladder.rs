//! What is done when a migration cannot keep its blackout budget.

use serde::{Deserialize, Serialize};

/// One thing that may be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Rung {
    /// The warm-up goes on: the VM may have a quiet moment.
    WaitForQuiet,
    /// The VM is slowed down until the budget can be kept.
    Throttle,
    /// The VM goes on at the destination without the memory that is left, which follows. From then on it needs both hosts until all has come.
    Postcopy,
    /// Somebody is to decide: the warm-up goes on, and the task says that it waits for `task postcopy`, `throttle` or `cancel`.
    Ask,
    /// The migration ends; the VM stays where it is.
    GiveUp,
}

impl Rung {
    const ALL: [Self; 5] = [Self::WaitForQuiet, Self::Throttle, Self::Postcopy, Self::Ask, Self::GiveUp];

    /// As it is written.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::WaitForQuiet => "wait_for_quiet",
            Self::Throttle => "throttle",
            Self::Postcopy => "postcopy",
            Self::Ask => "ask",
            Self::GiveUp => "give_up",
        }
    }

    /// Whether another rung may follow when this one did not help for some time.
    const fn leads_on(self) -> bool {
        matches!(self, Self::WaitForQuiet | Self::Throttle)
    }
}

impl std::str::FromStr for Rung {
    type Err = MalformedLadder;

    fn from_str(text: &str) -> Result<Self, MalformedLadder> {
        Self::ALL.into_iter().find(|rung| rung.as_str() == text).ok_or_else(|| MalformedLadder::Unknown(text.to_owned()))
    }
}

/// Rungs in the order in which they are taken; the last one stands until the migration's time-out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<Rung>", into = "Vec<Rung>")]
pub struct Ladder {
    rungs: [Option<Rung>; Rung::ALL.len()],
}

/// Rungs that are no ladder.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MalformedLadder {
    /// There is no such rung.
    #[error("there is no rung {0:?}: wait_for_quiet, throttle, postcopy, ask and give_up are")]
    Unknown(String),
    /// There is none at all.
    #[error("a ladder has at least one rung")]
    Empty,
    /// One twice.
    #[error("{0} stands twice")]
    Twice(&'static str),
    /// One behind which nothing comes.
    #[error("nothing comes after {0}")]
    Behind(&'static str),
}

impl Ladder {
    /// A ladder of one rung.
    #[must_use]
    pub const fn only(rung: Rung) -> Self {
        Self { rungs: [Some(rung), None, None, None, None] }
    }

    /// The rungs in their order.
    pub fn rungs(self) -> impl Iterator<Item = Rung> {
        self.rungs.into_iter().flatten()
    }

    /// Whether this rung is one of them.
    #[must_use]
    pub fn has(self, rung: Rung) -> bool {
        self.rungs().any(|other| other == rung)
    }

    /// The others; a ladder of which nothing is left is the default one.
    #[must_use]
    pub fn without(self, rung: Rung) -> Self {
        let left: Vec<Rung> = self.rungs().filter(|other| *other != rung).collect();
        Self::try_from(left).unwrap_or_default()
    }

    /// Where one stands when each rung that leads on was given `patience` (in any unit), after a time in the same unit.
    #[must_use]
    pub fn at(self, time: u64, patience: u64) -> Rung {
        let mut left = time;
        let mut last = Rung::WaitForQuiet;
        for rung in self.rungs() {
            last = rung;
            if !rung.leads_on() || left < patience {
                break;
            }
            left -= patience;
        }
        last
    }
}

impl Default for Ladder {
    fn default() -> Self {
        Self::only(Rung::WaitForQuiet)
    }
}

impl TryFrom<Vec<Rung>> for Ladder {
    type Error = MalformedLadder;

    fn try_from(given: Vec<Rung>) -> Result<Self, MalformedLadder> {
        let mut rungs = [None; Rung::ALL.len()];
        for (number, rung) in given.iter().enumerate() {
            let before = given.get(..number).unwrap_or_default();
            if before.contains(rung) {
                return Err(MalformedLadder::Twice(rung.as_str()));
            }
            if let Some(end) = before.last().filter(|before| !before.leads_on()) {
                return Err(MalformedLadder::Behind(end.as_str()));
            }
            if let Some(place) = rungs.get_mut(number) {
                *place = Some(*rung);
            }
        }
        if given.is_empty() { Err(MalformedLadder::Empty) } else { Ok(Self { rungs }) }
    }
}

impl From<Ladder> for Vec<Rung> {
    fn from(ladder: Ladder) -> Self {
        ladder.rungs().collect()
    }
}

impl std::str::FromStr for Ladder {
    type Err = MalformedLadder;

    /// Rungs with commas between them.
    fn from_str(text: &str) -> Result<Self, MalformedLadder> {
        let rungs: Result<Vec<Rung>, _> = text.split(',').map(|rung| rung.trim().replace('-', "_").parse()).collect();
        rungs?.try_into()
    }
}

impl std::fmt::Display for Ladder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rungs: Vec<&str> = self.rungs().map(Rung::as_str).collect();
        f.write_str(&rungs.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ladder_is_climbed_in_time_and_ends_at_its_last_rung() {
        let ladder: Ladder = "wait-for-quiet, throttle,postcopy".parse().expect("a ladder");
        assert_eq!(ladder.to_string(), "wait_for_quiet,throttle,postcopy");
        for (time, rung) in
            [(0, Rung::WaitForQuiet), (9, Rung::WaitForQuiet), (10, Rung::Throttle), (20, Rung::Postcopy), (99, Rung::Postcopy)]
        {
            assert_eq!(ladder.at(time, 10), rung, "{time}");
        }
        assert_eq!(Ladder::default().at(u64::MAX, 10), Rung::WaitForQuiet);
        assert_eq!(Ladder::only(Rung::GiveUp).at(0, 10), Rung::GiveUp);
        assert!(ladder.has(Rung::Throttle) && !ladder.has(Rung::Ask));
    }

    #[test]
    fn what_is_no_ladder_is_refused_with_its_reason() {
        for (text, error) in [
            ("", MalformedLadder::Unknown(String::new())),
            ("jump", MalformedLadder::Unknown("jump".into())),
            ("ask,give_up", MalformedLadder::Behind("ask")),
            ("throttle,throttle", MalformedLadder::Twice("throttle")),
        ] {
            assert_eq!(text.parse::<Ladder>(), Err(error), "{text:?}");
        }
        assert_eq!(Ladder::try_from(vec![]), Err(MalformedLadder::Empty));
        let written = serde_json::to_string(&Ladder::default()).expect("serialises");
        assert_eq!(written, r#"["wait_for_quiet"]"#);
        assert!(serde_json::from_str::<Ladder>("[]").is_err());
    }
}
