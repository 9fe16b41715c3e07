//! What a VM writes at which time of day, and when it writes least.

use serde::{Deserialize, Serialize};

use crate::{BytesPerSec, UnixMillis};

/// Length of a slot, in minutes.
pub const SLOT_MINUTES: u32 = 30;
const DAY_MINUTES: u32 = 24 * 60;
const SLOTS: usize = (DAY_MINUTES / SLOT_MINUTES) as usize;
/// Weight of a new day in what is remembered of the days before: after two weeks little is left of a day.
const WEIGHT: u64 = 5;
/// With fewer slots known, nobody can say which are quiet.
const LEAST_KNOWN: usize = SLOTS / 2;

/// How much a VM writes to its memory, by time of day.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Habits {
    slots: Vec<Option<Slot>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Slot {
    rate: BytesPerSec,
    days: u32,
}

/// The time of day at which a VM writes least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct QuietTime {
    /// When it begins, in minutes after midnight UTC.
    pub from: u32,
    /// When it ends, in minutes after midnight UTC; before `from` if it is a night's.
    pub until: u32,
    /// What it writes then, in bytes per second.
    pub dirty_rate: BytesPerSec,
    /// What it writes at half of all times at most, in bytes per second.
    pub usual: BytesPerSec,
    /// From how many days it is known.
    pub days: u32,
}

/// The slot of the day at this time.
#[must_use]
pub const fn slot_at(time: UnixMillis) -> usize {
    ((time.0 / 60_000) % DAY_MINUTES as u64 / SLOT_MINUTES as u64) as usize
}

impl Habits {
    /// Learns what was written on average in a slot of one day. A slot that no day has is not learned.
    pub fn learn(&mut self, slot: usize, rate: BytesPerSec) {
        self.slots.resize(SLOTS, None);
        let Some(known) = self.slots.get_mut(slot) else { return };
        *known = Some(match known {
            None => Slot { rate, days: 1 },
            Some(Slot { rate: before, days }) => {
                let mean = (u128::from(before.get()) * u128::from(WEIGHT - 1) + u128::from(rate.get())) / u128::from(WEIGHT);
                Slot { rate: BytesPerSec(u64::try_from(mean).unwrap_or(u64::MAX)), days: days.saturating_add(1) }
            }
        });
    }

    /// When it writes least, if that is less than half of what it usually writes.
    #[must_use]
    pub fn quiet(&self) -> Option<QuietTime> {
        let mut known: Vec<u64> = self.slots.iter().flatten().map(|slot| slot.rate.get()).collect();
        if known.len() < LEAST_KNOWN {
            return None;
        }
        known.sort_unstable();
        let (least, usual) = (*known.first()?, *known.get(known.len() / 2)?);
        if least >= usual / 2 {
            return None;
        }
        // Next to the quietest slot, those that are a good deal nearer to it than to what is usual.
        let limit = least + (usual - least) / 4;
        let at = |slot: usize| self.slots.get(slot % SLOTS).copied().flatten().filter(|slot| slot.rate.get() <= limit);
        let quietest = (0..SLOTS).find(|slot| at(*slot).is_some_and(|slot| slot.rate.get() == least))?;
        let before = (1..SLOTS).take_while(|back| at(quietest + SLOTS - back).is_some()).count();
        let after = (1..SLOTS - before).take_while(|on| at(quietest + on).is_some()).count();
        let first = quietest + SLOTS - before;
        let slots: Vec<Slot> = (first..=first + before + after).filter_map(at).collect();
        let sum: u128 = slots.iter().map(|slot| u128::from(slot.rate.get())).sum();
        let minutes = |slot: usize| u32::try_from(slot % SLOTS).unwrap_or(0) * SLOT_MINUTES;
        Some(QuietTime {
            from: minutes(first),
            until: minutes(first + before + after + 1),
            dirty_rate: BytesPerSec(u64::try_from(sum / slots.len() as u128).unwrap_or(u64::MAX)),
            usual: BytesPerSec(usual),
            days: slots.iter().map(|slot| slot.days).min()?,
        })
    }
}

impl std::fmt::Display for QuietTime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { from, until, dirty_rate, usual, days } = self;
        let clock = |minutes: &u32| format!("{:02}:{:02}", minutes / 60, minutes % 60);
        let days = if *days == 1 { "one day".to_owned() } else { format!("{days} days") };
        write!(f, "{} to {} UTC: {dirty_rate} instead of {usual}, known from {days}", clock(from), clock(until))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn habits(rate: impl Fn(usize) -> Option<u64>) -> Habits {
        let mut habits = Habits::default();
        for slot in 0..SLOTS {
            if let Some(rate) = rate(slot) {
                habits.learn(slot, BytesPerSec(rate));
            }
        }
        habits
    }

    #[test]
    fn a_night_that_is_quiet_is_found_over_midnight() {
        // From 23:00 to 02:00.
        let found = habits(|slot| Some(if !(4..46).contains(&slot) { 2 * MIB } else { 40 * MIB })).quiet().expect("quiet");
        assert_eq!((found.from, found.until, found.days), (23 * 60, 2 * 60, 1));
        assert_eq!((found.dirty_rate, found.usual), (BytesPerSec(2 * MIB), BytesPerSec(40 * MIB)));
        assert_eq!(found.to_string(), "23:00 to 02:00 UTC: 2 MiB/s instead of 40 MiB/s, known from one day");
    }

    #[test]
    fn a_vm_that_always_writes_the_same_or_is_hardly_known_has_no_quiet_time() {
        assert_eq!(habits(|_| Some(MIB)).quiet(), None);
        assert_eq!(habits(|_| Some(0)).quiet(), None);
        assert_eq!(habits(|slot| Some(if slot == 7 { 6 * MIB } else { 10 * MIB })).quiet(), None, "not by half");
        assert_eq!(habits(|slot| (slot < LEAST_KNOWN - 1).then_some(slot as u64)).quiet(), None);
        assert_eq!(Habits::default().quiet(), None);
    }

    #[test]
    fn a_new_day_counts_for_a_part_and_what_changed_is_learned() {
        let mut habits = habits(|slot| Some(if slot == 6 { 0 } else { 100 }));
        assert_eq!(habits.quiet().map(|quiet| (quiet.from, quiet.until)), Some((180, 210)));
        for _ in 0..4 {
            habits.learn(6, BytesPerSec(100));
        }
        assert_eq!(habits.quiet(), None, "0, 20, 36, 48, 58: more than half of 100");
        habits.learn(SLOTS, BytesPerSec(0));
        assert_eq!(habits.slots.len(), SLOTS);
    }

    #[test]
    fn the_slot_of_a_moment_is_that_of_its_time_of_day() {
        let day = 86_400_000;
        assert_eq!(slot_at(UnixMillis(20_000 * day)), 0);
        assert_eq!(slot_at(UnixMillis(20_000 * day + 29 * 60_000 + 59_999)), 0);
        assert_eq!(slot_at(UnixMillis(20_000 * day + 30 * 60_000)), 1);
        assert_eq!(slot_at(UnixMillis(20_001 * day - 1)), SLOTS - 1);
    }

    proptest! {
        #[test]
        fn prop_a_quiet_time_is_a_part_of_a_day_and_less_than_usual(rates in prop::collection::vec(prop::option::of(any::<u64>()), SLOTS)) {
            let habits = habits(|slot| rates[slot]);
            if let Some(quiet) = habits.quiet() {
                prop_assert!(quiet.from < DAY_MINUTES && quiet.until < DAY_MINUTES);
                prop_assert!(quiet.from % SLOT_MINUTES == 0 && quiet.until % SLOT_MINUTES == 0);
                prop_assert!(quiet.dirty_rate < quiet.usual);
            }
            let written = serde_json::to_string(&habits).expect("text");
            prop_assert_eq!(serde_json::from_str::<Habits>(&written).expect("habits"), habits);
        }
    }
}
