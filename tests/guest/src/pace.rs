//! How much work is due at a given time, for a given rate. Time that was missed is not made up for.

use std::time::Duration;

/// Hands out work at a rate.
#[derive(Debug, Clone)]
pub struct Pace {
    per_second: u64,
    phase: Option<Duration>,
    last: Duration,
    rest: u64,
}

impl Pace {
    /// After a pause at most the work of this time is due: a burst after a blackout would hide what it cost.
    const MOST: Duration = Duration::from_millis(50);

    /// `per_second` units of work, from `now` on (a monotonic clock).
    #[must_use]
    pub const fn new(per_second: u64, now: Duration) -> Self {
        Self { per_second, phase: None, last: now, rest: 0 }
    }

    /// Work is due in every other span of this length, the first of them.
    #[must_use]
    pub const fn in_phases(self, phase: Option<Duration>) -> Self {
        Self { phase, ..self }
    }

    /// Units that are due at `now` and were not before.
    pub fn due(&mut self, now: Duration) -> u64 {
        if self.phase.is_some_and(|phase| now.as_millis() / phase.as_millis().max(1) % 2 == 1) {
            self.last = now;
            return 0;
        }
        let passed = now.saturating_sub(self.last).min(Self::MOST).as_nanos();
        self.last = now;
        let nanos = u128::from(self.per_second) * passed + u128::from(self.rest);
        // Both fit: 50 ms of a u64 rate is less than a u64, the rest is below a second.
        self.rest = (nanos % 1_000_000_000) as u64;
        (nanos / 1_000_000_000) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_in_small_steps() {
        let mut pace = Pace::new(1000, Duration::ZERO);
        let sum: u64 = (1..=30_000).map(|step| pace.due(Duration::from_micros(333 * step))).sum();
        assert_eq!(sum, 9990);
    }

    #[test]
    fn a_pause_is_not_made_up_for() {
        let mut pace = Pace::new(1000, Duration::ZERO);
        assert_eq!(pace.due(Duration::from_secs(10)), 50);
        assert_eq!(pace.due(Duration::from_secs(9)), 0);
        assert_eq!(Pace::new(u64::MAX, Duration::ZERO).due(Duration::from_secs(9)), u64::MAX / 20);
    }

    #[test]
    fn in_every_other_phase_nothing_is_due() {
        let mut pace = Pace::new(1_000, Duration::ZERO).in_phases(Some(Duration::from_secs(2)));
        let mut due = [0; 6];
        for millis in 1..6_000 {
            due[millis / 1_000] += pace.due(Duration::from_millis(millis as u64));
        }
        assert_eq!(due, [999, 1_000, 0, 0, 1_000, 1_000]);
    }
}
