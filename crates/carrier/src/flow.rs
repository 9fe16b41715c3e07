//! How much may be in flight: bytes read from the source's QEMU that the destination's QEMU does not have yet.
//!
//! QEMU takes what we swallow for the speed of the link. The window keeps the lie small: round trip × rate + 50 ms of rate, within fixed
//! bounds. Everything in it when the VM stops is blackout.

use std::time::Duration;

const MIN_WINDOW: u64 = 512 << 10;
const MAX_WINDOW: u64 = 64 << 20;
const QUEUE: Duration = Duration::from_millis(50);
/// How long the rate is averaged.
const SPAN: Duration = Duration::from_millis(500);
/// Round trips that are remembered; the shortest of them counts, so that one that waited (in a queue, or for a process that stood still)
/// does not widen the window.
const ROUND_TRIPS: usize = 8;

/// Counts what is in flight, and measures round trip and rate. Times are since any fixed moment.
#[derive(Clone, Debug)]
pub struct Window {
    sent: u64,
    applied: u64,
    last_applied: Duration,
    span_start: Duration,
    span_applied: u64,
    rate: u64,
    round_trips: [Option<Duration>; ROUND_TRIPS],
    next_round_trip: usize,
}

impl Window {
    /// An empty window at `now`.
    #[must_use]
    pub fn new(now: Duration) -> Self {
        Self {
            sent: 0,
            applied: 0,
            last_applied: now,
            span_start: now,
            span_applied: 0,
            rate: 0,
            round_trips: [None; ROUND_TRIPS],
            next_round_trip: 0,
        }
    }

    /// How many more bytes may be read from QEMU now.
    #[must_use]
    pub fn room(&self) -> u64 {
        self.limit().saturating_sub(self.in_flight())
    }

    /// The most that may be in flight at the measured rate and round trip.
    #[must_use]
    pub fn limit(&self) -> u64 {
        let time = self.round_trip() + QUEUE;
        let bytes = u128::from(self.rate) * time.as_micros() / 1_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX).clamp(MIN_WINDOW, MAX_WINDOW)
    }

    /// Bytes sent and not yet applied.
    #[must_use]
    pub const fn in_flight(&self) -> u64 {
        self.sent - self.applied
    }

    /// Bytes sent so far.
    #[must_use]
    pub const fn sent(&self) -> u64 {
        self.sent
    }

    /// Bytes per second that the destination applied lately.
    #[must_use]
    pub const fn rate(&self) -> u64 {
        self.rate
    }

    /// The shortest of the latest round trips; zero before there was one.
    #[must_use]
    pub fn round_trip(&self) -> Duration {
        self.round_trips.iter().flatten().min().copied().unwrap_or_default()
    }

    /// When the destination last applied anything, or the moment since nothing has been in flight.
    #[must_use]
    pub const fn last_applied(&self) -> Duration {
        self.last_applied
    }

    /// `bytes` were sent at `now`.
    pub fn on_sent(&mut self, bytes: u64, now: Duration) {
        if self.in_flight() == 0 {
            self.last_applied = now;
        }
        self.sent += bytes;
    }

    /// The destination says that it has applied `total` bytes. A total beyond what was sent, or one that goes back, is refused: the peer lies.
    #[must_use]
    pub fn on_applied(&mut self, total: u64, now: Duration) -> bool {
        if total > self.sent || total < self.applied {
            return false;
        }
        if total > self.applied {
            self.last_applied = now;
        }
        self.applied = total;
        let span = now.saturating_sub(self.span_start);
        if span >= SPAN {
            let bytes = u128::from(total - self.span_applied) * 1_000_000 / span.as_micros().max(1);
            self.rate = u64::try_from(bytes).unwrap_or(u64::MAX);
            self.span_start = now;
            self.span_applied = total;
        }
        true
    }

    /// A ping came back after `round_trip`.
    pub fn on_round_trip(&mut self, round_trip: Duration) {
        if let Some(oldest) = self.round_trips.get_mut(self.next_round_trip) {
            *oldest = Some(round_trip);
        }
        self.next_round_trip = (self.next_round_trip + 1) % ROUND_TRIPS;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_window_follows_rate_and_round_trip() {
        let mut window = Window::new(Duration::ZERO);
        assert_eq!(window.room(), MIN_WINDOW);
        window.on_round_trip(Duration::from_millis(40));
        window.on_sent(100 << 20, Duration::ZERO);
        assert!(window.on_applied(100 << 20, Duration::from_secs(1)));
        assert_eq!(window.rate(), 100 << 20);
        let nine_tenths_of_a_tenth = (100 << 20) * 90 / 1_000;
        assert_eq!(window.limit(), nine_tenths_of_a_tenth, "40 ms round trip + 50 ms");
    }

    #[test]
    fn one_round_trip_that_waited_does_not_widen_the_window() {
        let mut window = Window::new(Duration::ZERO);
        window.on_round_trip(Duration::from_millis(40));
        window.on_round_trip(Duration::from_secs(60));
        assert_eq!(window.round_trip(), Duration::from_millis(40));
        for _ in 0..ROUND_TRIPS {
            window.on_round_trip(Duration::from_millis(80));
        }
        assert_eq!(window.round_trip(), Duration::from_millis(80), "a path that became longer is believed");
    }

    #[test]
    fn a_peer_that_claims_more_than_was_sent_is_caught() {
        let mut window = Window::new(Duration::ZERO);
        window.on_sent(10, Duration::ZERO);
        assert!(!window.on_applied(11, Duration::ZERO));
        assert!(window.on_applied(10, Duration::ZERO));
        assert!(!window.on_applied(9, Duration::ZERO), "a total cannot go back");
    }

    proptest! {
        #[test]
        fn prop_in_flight_never_exceeds_the_largest_window(steps in prop::collection::vec((0..2_u8, 0..1_000_000_u64, 1..300_u64), 1..200)) {
            let mut window = Window::new(Duration::ZERO);
            let mut now = Duration::ZERO;
            for (kind, bytes, pause) in steps {
                now += Duration::from_millis(pause);
                if kind == 0 {
                    window.on_sent(bytes.min(window.room()), now);
                } else {
                    let total = window.sent() - window.in_flight() + bytes.min(window.in_flight());
                    prop_assert!(window.on_applied(total, now));
                }
                prop_assert!(window.in_flight() <= MAX_WINDOW);
            }
        }
    }
}
