//! Which snapshots of a VM are kept: the newest ones, and the newest of each of the last hours, days, weeks, months, years that have any.

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

use crate::{ErrorCode, Refusal, UnixMillis};

/// The most that a rule can keep: a team has no more snapshots.
const MOST: u32 = 1_000;

/// Rules of what is kept. A snapshot is kept if any of them keeps it; without any, all are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// So many of the newest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last: Option<u32>,
    /// The newest of each of so many hours that have any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hourly: Option<u32>,
    /// The newest of each of so many days that have any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub daily: Option<u32>,
    /// The newest of each of so many weeks that have any; they begin on Monday.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weekly: Option<u32>,
    /// The newest of each of so many months that have any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub monthly: Option<u32>,
    /// The newest of each of so many years that have any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub yearly: Option<u32>,
}

/// What tells the periods of a rule apart.
type Period = fn(&DateTime) -> (i16, i16, i8);

impl Retention {
    fn rules(&self) -> [(&'static str, Option<u32>); 6] {
        [
            ("last", self.last),
            ("hourly", self.hourly),
            ("daily", self.daily),
            ("weekly", self.weekly),
            ("monthly", self.monthly),
            ("yearly", self.yearly),
        ]
    }

    /// The rules that there are, with what each keeps.
    pub fn said(&self) -> impl Iterator<Item = (&'static str, u32)> {
        self.rules().into_iter().filter_map(|(name, count)| Some((name, count?)))
    }

    /// Whether nothing is ever deleted.
    #[must_use]
    pub fn keeps_all(&self) -> bool {
        self.said().next().is_none()
    }

    /// # Errors
    /// `bad_request` for a rule that keeps nothing, or more than there can be.
    pub fn check(&self) -> Result<(), Refusal> {
        let odd = self.said().find(|(_, count)| !(1..=MOST).contains(count));
        let Some((name, count)) = odd else { return Ok(()) };
        let message = if count == 0 {
            format!("keep.{name} is 0: that rule keeps nothing")
        } else {
            format!("keep.{name} is {count}: a team has at most {MOST} snapshots")
        };
        Err(Refusal::new(ErrorCode::BadRequest, message)
            .hint(format!("say how many are kept, 1 to {MOST}, or leave the rule out; without any rule all are kept")))
    }

    fn periods(&self) -> [(Option<u32>, Period); 5] {
        [
            (self.hourly, |at| (at.year(), at.day_of_year(), at.hour())),
            (self.daily, |at| (at.year(), at.day_of_year(), 0)),
            (self.weekly, |at| {
                let week = at.date().iso_week_date();
                (week.year(), 0, week.week())
            }),
            (self.monthly, |at| (at.year(), 0, at.month())),
            (self.yearly, |at| (at.year(), 0, 0)),
        ]
    }
}

/// Whether each of the snapshots of one VM that were taken at these moments is kept, by the calendar of `zone`. With any rule the newest always is.
#[must_use]
pub fn plan_retention(taken: &[UnixMillis], keep: &Retention, zone: &TimeZone) -> Vec<bool> {
    if keep.keeps_all() {
        return vec![true; taken.len()];
    }
    let mut newest_first: Vec<usize> = (0..taken.len()).collect();
    newest_first.sort_by_key(|index| std::cmp::Reverse((taken.get(*index).copied(), *index)));
    let mut kept = vec![false; taken.len()];
    let mut keeps = |index: usize| {
        if let Some(kept) = kept.get_mut(index) {
            *kept = true;
        }
    };
    newest_first.iter().take(keep.last.map_or(0, |last| last as usize)).for_each(|index| keeps(*index));
    for (count, period) in keep.periods() {
        let (mut left, mut seen) = (count.unwrap_or(0), None);
        for index in &newest_first {
            if left == 0 {
                break;
            }
            let of = taken.get(*index).and_then(|at| local(*at, zone)).map(|at| period(&at));
            if of != seen || of.is_none() {
                (seen, left) = (of, left - 1);
                keeps(*index);
            }
        }
    }
    kept
}

/// What clocks in the zone show; nothing beyond the calendar.
pub(super) fn local(at: UnixMillis, zone: &TimeZone) -> Option<DateTime> {
    let at = Timestamp::from_millisecond(i64::try_from(at.get()).ok()?).ok()?;
    Some(zone.to_datetime(at))
}
