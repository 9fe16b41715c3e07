//! How much may be in flight: what was read from the source's QEMU and has not reached the destination's memory or QEMU yet.
//!
//! QEMU takes what we swallow for the speed of the link, and all that is in flight when the VM stops is blackout. The window keeps both small:
//! on the wire round trip × rate + 50 ms of rate within fixed bounds, and a bound on the memory that it becomes at the destination.

use std::time::Duration;

const MIN_WINDOW: u64 = 256 << 10;
const MAX_WINDOW: u64 = 64 << 20;
/// Most guest memory, and stream, that what is in flight stands for.
const MAX_RAW: u64 = 32 << 20;
const QUEUE: Duration = Duration::from_millis(50);
/// The same while the destination's QEMU waits for pages.
const SHORT_QUEUE: Duration = Duration::from_millis(5);
const MIN_SHORT_WINDOW: u64 = 64 << 10;
/// So much must be in flight at least for the link to count as used, and half of the window: less says nothing about what it could take. On a long way a
/// little at a time is always in flight.
const BUSY: u64 = 64 << 10;
/// A burst of at least so much, that took at least so long, shows what the link can take at least.
const BURST: u64 = 4 << 10;
const SHORTEST_BURST: Duration = Duration::from_micros(100);
/// How much busy time gives a rate.
const SPAN: Duration = Duration::from_millis(300);
/// How many of those are remembered for the window: the best of some seconds counts, else a window that is too small would measure what it lets through, and
/// stay so.
const RATES: usize = 8;
/// At first the window is three times as large, until so many rates in a row were hardly better than the best before: TCP's BBR begins with 2.9 times the
/// rate that it knows, and learns of no limit, whatever is lost, as long as it is not given so much to send. Later it is a quarter larger for one rate in
/// [`RATES`]: a link that takes more shows it only when it is given more.
const FLAT: u8 = 3;
/// Round trips that are remembered; the shortest of them counts, so that one that waited (in a queue, or for a process that stood still)
/// does not widen the window. They are of a minute: while a link is full all of them have waited in the queue that the window itself makes, and
/// each widening would justify the next.
const ROUND_TRIPS: usize = 64;

/// Counts what is in flight, and measures round trip and rate. Times are since any fixed moment.
#[derive(Clone, Debug)]
pub struct Window {
    wire: Count,
    raw: Count,
    began: Duration,
    last_event: Duration,
    last_applied: Duration,
    /// When the destination showed last that it is at work, without applying anything.
    last_sign: Duration,
    busy: Duration,
    busy_bytes: u64,
    rate: u64,
    rates: [u64; RATES],
    next_rate: usize,
    /// The best rate, and how many came after it without a better one.
    best: u64,
    flat: u8,
    /// When nothing was in flight last, and the bytes since.
    burst: (Duration, u64),
    /// The quickest burst, per second.
    quickest: u64,
    round_trips: [Option<Duration>; ROUND_TRIPS],
    next_round_trip: usize,
}

/// Bytes that were sent, and that were applied of them.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    sent: u64,
    applied: u64,
}

impl Count {
    const fn in_flight(self) -> u64 {
        self.sent - self.applied
    }
}

impl Window {
    /// An empty window at `now`.
    #[must_use]
    pub fn new(now: Duration) -> Self {
        Self {
            wire: Count::default(),
            raw: Count::default(),
            began: now,
            last_event: now,
            last_applied: now,
            last_sign: now,
            busy: Duration::ZERO,
            busy_bytes: 0,
            rate: 0,
            rates: [0; RATES],
            next_rate: 0,
            best: 0,
            flat: 0,
            burst: (now, 0),
            quickest: 0,
            round_trips: [None; ROUND_TRIPS],
            next_round_trip: 0,
        }
    }

    /// Whether more may be read from QEMU now.
    #[must_use]
    pub fn has_room(&self) -> bool {
        !self.is_link_full() && self.raw.in_flight() < MAX_RAW
    }

    /// Whether it is the link that must take something first.
    #[must_use]
    pub fn is_link_full(&self) -> bool {
        self.in_flight() >= self.limit()
    }

    /// The most that may be in flight on the wire at the best rate of some seconds and the measured round trip; more while it is tried whether the link
    /// takes more.
    #[must_use]
    pub fn limit(&self) -> u64 {
        let time = self.round_trip() + QUEUE;
        let rate = self.rates.iter().max().copied().unwrap_or_default();
        let percent = match (self.flat < FLAT, self.next_rate) {
            (true, _) => 300,
            (false, 0) => 125,
            (false, _) => 100,
        };
        let bytes = u128::from(rate) * time.as_micros() * percent / 100_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX).clamp(MIN_WINDOW, MAX_WINDOW)
    }

    /// The most that may be in flight while somebody waits for what comes behind it.
    #[must_use]
    pub fn short_limit(&self) -> u64 {
        let rate = self.rates.iter().max().copied().unwrap_or_default();
        if rate == 0 {
            // It must be learnt first.
            return self.limit();
        }
        let bytes = u128::from(rate) * (self.round_trip() + SHORT_QUEUE).as_micros() / 1_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX).clamp(MIN_SHORT_WINDOW, MAX_WINDOW)
    }

    /// Bytes of frames sent and not yet applied.
    #[must_use]
    pub const fn in_flight(&self) -> u64 {
        self.wire.in_flight()
    }

    /// What these frames stand for.
    #[must_use]
    pub const fn raw_in_flight(&self) -> u64 {
        self.raw.in_flight()
    }

    /// Bytes of frames sent so far.
    #[must_use]
    pub const fn wire_sent(&self) -> u64 {
        self.wire.sent
    }

    /// Bytes of frames that the destination took per second while the link was used, lately. Before it ever was: what it took on average, or in the
    /// quickest burst, since little on an idle link says nothing against the link. 0 before anything was taken.
    #[must_use]
    pub fn rate(&self) -> u64 {
        if self.rate > 0 || self.wire.applied == 0 {
            return self.rate;
        }
        per_second(self.wire.applied, self.last_applied.saturating_sub(self.began)).max(self.quickest).max(1)
    }

    /// The shortest of the latest round trips; zero before there was one.
    #[must_use]
    pub fn round_trip(&self) -> Duration {
        self.round_trips.iter().flatten().min().copied().unwrap_or_default()
    }

    /// When the destination last applied anything, or showed that it is at work, or the moment since nothing has been in flight.
    #[must_use]
    pub fn last_applied(&self) -> Duration {
        self.last_applied.max(self.last_sign)
    }

    /// The destination has shown at `now` that it is at work.
    pub const fn on_sign_of_work(&mut self, now: Duration) {
        self.last_sign = now;
    }

    /// What was applied stands for.
    #[must_use]
    pub const fn raw_applied(&self) -> u64 {
        self.raw.applied
    }

    /// Frames of `wire` bytes that stand for `raw` bytes were sent at `now`.
    pub fn on_sent(&mut self, wire: u64, raw: u64, now: Duration) {
        if self.in_flight() == 0 {
            self.burst = (now, 0);
            self.last_applied = now;
            if self.wire.applied == 0 {
                self.began = now;
            }
        }
        self.pass(now);
        self.burst.1 += wire;
        self.wire.sent += wire;
        self.raw.sent += raw;
    }

    /// Frames of `wire` bytes that stand for `raw` bytes have been applied. They must have been sent.
    pub(crate) fn on_applied(&mut self, wire: u64, raw: u64, now: Duration) {
        let busy = self.pass(now);
        if wire > 0 || raw > 0 {
            self.last_applied = now;
        }
        self.wire.applied = self.wire.applied.saturating_add(wire).min(self.wire.sent);
        self.raw.applied = self.raw.applied.saturating_add(raw).min(self.raw.sent);
        let (began, bytes) = self.burst;
        let time = now.saturating_sub(began);
        if self.in_flight() == 0 && bytes >= BURST && time >= SHORTEST_BURST {
            self.quickest = self.quickest.max(per_second(bytes, time));
        }
        if busy {
            self.busy_bytes += wire;
        }
        if self.busy >= SPAN {
            // Too little for a rate: somebody stood still.
            if self.busy_bytes >= BUSY {
                self.rate = per_second(self.busy_bytes, self.busy).max(1);
                if let Some(oldest) = self.rates.get_mut(self.next_rate) {
                    *oldest = self.rate;
                }
                self.next_rate = (self.next_rate + 1) % RATES;
                if self.rate > self.best + self.best / 4 {
                    (self.best, self.flat) = (self.rate, 0);
                } else {
                    self.flat = self.flat.saturating_add(1);
                }
            }
            (self.busy, self.busy_bytes) = (Duration::ZERO, 0);
        }
    }

    /// A connection begins: the time without one says nothing about what the link takes.
    pub(crate) fn on_connected(&mut self, now: Duration) {
        (self.last_event, self.busy, self.busy_bytes) = (now, Duration::ZERO, 0);
    }

    /// Time has gone by to `now`; whether the link was used in it.
    fn pass(&mut self, now: Duration) -> bool {
        let busy = self.in_flight() >= (self.limit() / 2).max(BUSY);
        if busy {
            self.busy += now.saturating_sub(self.last_event);
        }
        self.last_event = now;
        busy
    }

    /// A ping came back after `round_trip`.
    pub fn on_round_trip(&mut self, round_trip: Duration) {
        if let Some(oldest) = self.round_trips.get_mut(self.next_round_trip) {
            *oldest = Some(round_trip);
        }
        self.next_round_trip = (self.next_round_trip + 1) % ROUND_TRIPS;
    }
}

fn per_second(bytes: u64, time: Duration) -> u64 {
    let rate = u128::from(bytes) * 1_000_000 / time.as_micros().max(1);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_window_follows_rate_and_round_trip() {
        let mut window = Window::new(Duration::ZERO);
        assert_eq!((window.limit(), window.rate()), (MIN_WINDOW, 0));
        window.on_round_trip(Duration::from_millis(40));
        window.on_sent(100 * MIB, 0, Duration::ZERO);
        assert!(!window.has_room());
        window.on_applied(100 * MIB, 0, Duration::from_secs(1));
        assert_eq!(window.rate(), 100 * MIB);
        let limit = 100 * MIB * 90 / 1_000;
        assert_eq!(window.limit(), 3 * limit, "three times 40 ms round trip + 50 ms, at first");
        let mut limits = vec![];
        for second in 1..20 {
            let now = Duration::from_secs(second);
            window.on_sent(100 * MIB, 0, now);
            window.on_applied(100 * MIB, 0, now + Duration::from_secs(1));
            limits.push(window.limit() * 100 / limit);
        }
        let mut expected = [100; 19];
        (expected[0], expected[1]) = (300, 300);
        (expected[6], expected[14]) = (125, 125);
        assert_eq!(limits, expected);
    }

    #[test]
    fn pages_that_are_cheap_on_the_wire_are_bounded_by_what_they_become() {
        let mut window = Window::new(Duration::ZERO);
        window.on_sent(10, MAX_RAW, Duration::ZERO);
        assert!(!window.has_room());
        window.on_applied(10, 1, Duration::ZERO);
        assert!(window.has_room());
    }

    #[test]
    fn a_link_that_was_hardly_used_does_not_become_slow() {
        let mut window = Window::new(Duration::ZERO);
        window.on_sent(10 * MIB, 0, Duration::ZERO);
        window.on_applied(10 * MIB, 0, Duration::from_secs(1));
        for second in 2..20 {
            window.on_sent(1_000, 0, Duration::from_secs(second));
            window.on_applied(1_000, 0, Duration::from_millis(second * 1_000 + 900));
        }
        assert_eq!(window.rate(), 10 * MIB);
        let mut small = Window::new(Duration::ZERO);
        small.on_sent(10_000, 0, Duration::from_secs(5));
        small.on_applied(10_000, 0, Duration::from_millis(5_100));
        assert_eq!(small.rate(), 100_000, "better than nothing");
    }

    #[test]
    fn what_a_long_way_holds_of_a_little_does_not_make_it_slow() {
        let mut window = Window::new(Duration::ZERO);
        window.on_round_trip(Duration::from_millis(80));
        window.on_sent(10 * MIB, 0, Duration::ZERO);
        window.on_applied(10 * MIB, 0, Duration::from_secs(1));
        // 2 MiB a second, each part 80 ms on its way.
        let part = 2 * MIB / 50;
        for step in 0..500_u64 {
            let now = Duration::from_millis(2_000 + 20 * step);
            window.on_sent(part, 0, now);
            if step >= 4 {
                window.on_applied(part, 0, now);
            }
        }
        assert!(window.in_flight() > 2 * BUSY);
        assert_eq!(window.rate(), 10 * MIB);
        // Slower it is when it takes less than it is given.
        let began = Duration::from_secs(13);
        while window.has_room() {
            window.on_sent(part, 0, began);
        }
        for step in 1..10 {
            window.on_applied(MIB / 10, 0, began + Duration::from_millis(100 * step));
        }
        assert!((MIB / 2..2 * MIB).contains(&window.rate()), "{}", window.rate());
    }

    #[test]
    fn a_window_that_is_too_small_grows_until_the_link_is_used() {
        // 12 MB/s, 80 ms, and what was sent is acknowledged 60 ms later than that: more than the window makes up for.
        const LINK: u64 = 12_000;
        let (mut window, mut under_way, mut left) = (Window::new(Duration::ZERO), std::collections::VecDeque::new(), 0);
        window.on_round_trip(Duration::from_millis(80));
        let mut acknowledged = 0;
        for milli in 0..20_000_u64 {
            let now = Duration::from_millis(milli);
            while window.has_room() {
                window.on_sent(40_000, 0, now);
                left += 40_000;
            }
            let gone = LINK.min(left);
            left -= gone;
            under_way.push_back(gone);
            // Work at the destination comes in bursts.
            if under_way.len() > 140 && milli % 15 == 0 {
                let arrived: u64 = under_way.drain(..under_way.len() - 140).sum();
                acknowledged = arrived;
                window.on_applied(arrived, 0, now);
            }
        }
        assert!(acknowledged > 0 && window.rate() > 9_000_000, "{} bytes per second", window.rate());
    }

    #[test]
    fn little_on_an_idle_link_does_not_make_it_slow() {
        let mut window = Window::new(Duration::ZERO);
        for second in 0..5 {
            let now = Duration::from_secs(second);
            window.on_sent(20_000, 0, now);
            window.on_applied(20_000, 0, now + Duration::from_millis(2));
        }
        assert_eq!(window.rate(), 10_000_000);
        window.on_sent(10 * MIB, 0, Duration::from_secs(6));
        window.on_applied(10 * MIB, 0, Duration::from_secs(16));
        assert_eq!(window.rate(), MIB, "what was measured counts");
    }

    #[test]
    fn a_link_that_was_out_is_no_slower_for_it() {
        let mut window = Window::new(Duration::ZERO);
        window.on_sent(10 * MIB, 0, Duration::ZERO);
        window.on_applied(9 * MIB, 0, Duration::from_secs(1));
        window.on_connected(Duration::from_secs(20));
        window.on_applied(1_000, 0, Duration::from_millis(20_010));
        assert_eq!(window.rate(), 9 * MIB);
        window.on_applied(1_000, 0, Duration::from_secs(30));
        assert_eq!(window.rate(), 9 * MIB, "a destination that stood still");
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

    proptest! {
        #[test]
        fn prop_in_flight_exceeds_the_largest_window_by_one_frame_at_most(steps in prop::collection::vec((0..2_u8, 0..1_000_000_u64, 1..300_u64), 1..200)) {
            let mut window = Window::new(Duration::ZERO);
            let mut now = Duration::ZERO;
            for (kind, bytes, pause) in steps {
                now += Duration::from_millis(pause);
                if kind == 0 && window.has_room() {
                    window.on_sent(bytes, 2 * bytes, now);
                } else {
                    let applied = bytes.min(window.in_flight());
                    window.on_applied(applied, 2 * applied, now);
                }
                prop_assert!(window.in_flight() <= MAX_WINDOW + 1_000_000);
                prop_assert!(window.raw.in_flight() <= MAX_RAW + 2_000_000);
            }
        }
    }
}
