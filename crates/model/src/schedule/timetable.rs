//! The instants at which a schedule runs: an expression of what clocks show, and the rules of a time zone.
//!
//! ```text
//!   clocks go forward   01:59 03:00      what is due at 02:00 … 02:59 runs once, at 03:00
//!   clocks go back      02:59 02:00      what is due at 02:00 … 02:59 runs the first time that clocks show it
//! ```

use croner::parser::{CronParser, Seconds, Year};
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, TimeZone};

use super::retention::local;
use crate::{ErrorCode, Millis, Refusal, UnixMillis};

/// Longest expression.
const LONGEST: usize = 200;
/// In milliseconds.
const HOUR: u64 = 3_600_000;
const FIX: &str = "minute, hour, day of the month, month, day of the week: `30 2 * * *` is half past two each night, `0 */6 * * MON-FRI` every six hours on workdays";

/// When a schedule runs.
#[derive(Clone, Debug)]
pub struct Timetable {
    cron: croner::Cron,
    zone: TimeZone,
}

/// What there is to do at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Nothing until then; without an instant, nothing ever.
    Later(Option<UnixMillis>),
    /// The run of this instant. Those before it that were missed are not made up.
    Run(UnixMillis),
    /// The run of this instant was missed by more than may be made up.
    Missed(UnixMillis),
}

impl Timetable {
    /// Reads an expression.
    ///
    /// # Errors
    /// `bad_request` for what is none, and for one that never comes to pass.
    pub fn new(when: &str, zone: TimeZone) -> Result<Self, Refusal> {
        let bad = |message: String| Refusal::new(ErrorCode::BadRequest, message).hint(FIX);
        let said = |character: char| character.is_ascii_alphanumeric() || " *,-/#+@?".contains(character);
        if when.len() > LONGEST || !when.chars().all(said) {
            return Err(bad(format!("when is at most {LONGEST} of letters, digits, spaces and *,-/#+@?")));
        }
        let fields = when.split_whitespace().count();
        if fields != 5 && !when.trim_start().starts_with('@') {
            return Err(bad(format!("when has to have 5 fields; it has {fields}")));
        }
        if when.split_whitespace().any(|field| field.split(',').any(str::is_empty)) {
            return Err(bad("when has a list with nothing between its commas".into()));
        }
        let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
        let cron = parser.parse(when).map_err(|error| bad(format!("when is not understood: {error}")))?;
        let table = Self { cron, zone };
        // Whatever comes to pass at all does so within the 400 years after which the calendar repeats itself.
        if table.next(UnixMillis(0)).is_none() {
            return Err(bad(format!("`{when}` never comes to pass")));
        }
        Ok(table)
    }

    /// The first instant behind `after` at which it runs.
    #[must_use]
    pub fn next(&self, after: UnixMillis) -> Option<UnixMillis> {
        let mut shown = local(after, &self.zone)?;
        loop {
            // In UTC whatever clocks show is there once: the zone's rules come after.
            let from = TimeZone::UTC.to_zoned(shown).ok()?;
            shown = self.cron.find_next_occurrence(&from, false).ok()?.datetime();
            let instant = self.instant(shown)?;
            // Clocks that go back show again what was there.
            if instant > after {
                return Some(instant);
            }
        }
    }

    /// What there is to do at `now`, when the instants up to `handled` are done with.
    #[must_use]
    pub fn decide_due(&self, handled: UnixMillis, now: UnixMillis, catch_up: Millis) -> Due {
        // Further ahead than clocks are set back for good reasons: then it was written by a clock that was wrong.
        let handled = if handled.get() > now.get().saturating_add(HOUR) { now } else { handled };
        let first = self.next(handled);
        if first.is_none_or(|first| first > now) {
            return Due::Later(first);
        }
        // Of those that were missed only the newest matters: it is looked for further and further back.
        let mut back = HOUR;
        let mut newest = loop {
            let from = handled.max(UnixMillis(now.get().saturating_sub(back)));
            match self.next(from).filter(|found| *found <= now) {
                Some(found) => break found,
                None => back = back.saturating_mul(2),
            }
        };
        while let Some(next) = self.next(newest).filter(|next| *next <= now) {
            newest = next;
        }
        let late = now.get().saturating_sub(newest.get());
        if late <= catch_up.get() { Due::Run(newest) } else { Due::Missed(newest) }
    }

    /// When clocks of the zone show this for the first time, or pass it.
    fn instant(&self, shown: DateTime) -> Option<UnixMillis> {
        let at = match self.zone.to_ambiguous_timestamp(shown).offset() {
            AmbiguousOffset::Unambiguous { offset } => offset.to_timestamp(shown).ok()?,
            AmbiguousOffset::Fold { before, .. } => before.to_timestamp(shown).ok()?,
            // By the offset of afterwards it lies before the change.
            AmbiguousOffset::Gap { after, .. } => {
                let before: Timestamp = after.to_timestamp(shown).ok()?;
                self.zone.following(before).next()?.timestamp()
            }
        };
        u64::try_from(at.as_millisecond()).ok().map(UnixMillis)
    }
}
