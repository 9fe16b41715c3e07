//! How quickly guest memory is dealt with here.

use std::time::Duration;

/// At first, as long as nothing was measured.
const FIRST: u64 = 200 << 20;
/// So many bytes give a measurement.
const SPAN: u64 = 4 << 20;

/// Bytes per second, of the last some measurements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Speed {
    per_second: u64,
    bytes: u64,
    time: Duration,
}

impl Default for Speed {
    fn default() -> Self {
        Self { per_second: FIRST, bytes: 0, time: Duration::ZERO }
    }
}

impl Speed {
    /// Never 0.
    pub(super) const fn per_second(self) -> u64 {
        self.per_second
    }

    /// How long so many bytes take.
    pub(super) fn time_for(self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.per_second as f64)
    }

    /// With this many bytes more, which took so long.
    pub(super) fn with(self, bytes: u64, time: Duration) -> Self {
        let (bytes, time) = (self.bytes + bytes, self.time + time);
        if bytes < SPAN {
            return Self { bytes, time, ..self };
        }
        let now = (bytes as f64 / time.as_secs_f64().max(1e-6)) as u64;
        let per_second = (self.per_second.saturating_mul(3).saturating_add(now) / 4).max(1);
        Self { per_second, bytes: 0, time: Duration::ZERO }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_speed_follows_what_is_measured_and_short_times_add_up() {
        let mut speed = Speed::default();
        assert_eq!(speed.with(SPAN - 1, Duration::from_secs(9)).per_second(), FIRST);
        for _ in 0..100 {
            speed = speed.with(SPAN / 4, Duration::from_millis(10));
        }
        let expected = SPAN * 25;
        assert!((expected..=expected * 101 / 100).contains(&speed.per_second()), "{speed:?}");
        assert!((1_900..=2_000).contains(&speed.time_for(expected * 2).as_millis()));
        assert!(speed.with(SPAN, Duration::from_secs(1 << 40)).per_second() > 0);
    }
}
