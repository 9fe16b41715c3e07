//! Finds jumps of the guest's clocks, and times in which both stood still for a reader.

use std::time::Duration;

/// One look at the clocks: CLOCK_REALTIME between two of CLOCK_MONOTONIC, which say how long the look took.
#[derive(Debug, Clone, Copy)]
pub struct ClockReading {
    /// CLOCK_MONOTONIC before.
    pub before: Duration,
    /// CLOCK_REALTIME.
    pub real: Duration,
    /// CLOCK_MONOTONIC after.
    pub after: Duration,
}

/// What was found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ClockReport {
    /// How often the clocks diverged by over 100 ms, or the monotonic one went back.
    pub jumps: u64,
    /// The largest of them.
    pub largest_jump: Duration,
    /// How often more than 300 ms passed between two looks.
    pub stalls: u64,
    /// The longest of them.
    pub longest_stall: Duration,
}

/// Compares one look with the last.
#[derive(Debug, Clone, Default)]
pub struct ClockWatch {
    last: Option<(Duration, i128)>,
    report: ClockReport,
}

impl ClockWatch {
    const JUMP: Duration = Duration::from_millis(100);
    const STALL: Duration = Duration::from_millis(300);
    /// A look that was interrupted for longer cannot tell where realtime stood: it is not used for comparing the two.
    const STEADY: Duration = Duration::from_millis(20);

    /// Takes a look, a few milliseconds after the last.
    pub fn observe(&mut self, look: ClockReading) {
        let ClockReading { before, real, after } = look;
        if after < before {
            self.jump(before - after);
        }
        let steady = after.saturating_sub(before) <= Self::STEADY;
        let offset = real.as_nanos() as i128 - before.as_nanos() as i128;
        let Some((last, last_offset)) = self.last else {
            self.last = steady.then_some((after, offset));
            return;
        };
        if before < last {
            self.jump(last - before);
        } else if before - last > Self::STALL {
            self.report.stalls += 1;
            self.report.longest_stall = self.report.longest_stall.max(before - last);
        }
        let mut known = last_offset;
        if steady {
            let apart = u64::try_from((offset - last_offset).unsigned_abs()).unwrap_or(u64::MAX);
            if Duration::from_nanos(apart) > Self::JUMP {
                self.jump(Duration::from_nanos(apart));
                known = offset;
            }
            // Drift of a disciplined clock is followed slowly enough that a series of small jumps still adds up.
            known += (offset - known) / 4096;
        }
        self.last = Some((after, known));
    }

    /// What was found so far.
    #[must_use]
    pub const fn report(&self) -> ClockReport {
        self.report
    }

    fn jump(&mut self, by: Duration) {
        self.report.jumps += 1;
        self.report.largest_jump = self.report.largest_jump.max(by);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Looks at (monotonic, real) in milliseconds.
    fn report(looks: &[(u32, u32)]) -> ClockReport {
        let mut watch = ClockWatch::default();
        for (monotonic, real) in looks {
            watch.observe(ClockReading { before: MS * *monotonic, real: MS * *real, after: MS * *monotonic });
        }
        watch.report()
    }

    #[test]
    fn even_clocks_are_quiet() {
        let looks: Vec<_> = (0..1000).map(|step| (step * 5, 1_000_000 + step * 5)).collect();
        assert_eq!(report(&looks), ClockReport::default());
    }

    #[test]
    fn each_kind_of_fault_is_counted_once() {
        let jump = |by| ClockReport { jumps: 1, largest_jump: MS * by, ..ClockReport::default() };
        let table = [
            ("real forward", [(0, 5000), (5, 5505), (10, 5510)], jump(500)),
            ("real back", [(0, 5000), (5, 4605), (10, 4610)], jump(400)),
            ("a small step", [(0, 5000), (5, 5095), (10, 5100)], ClockReport::default()),
            (
                "both stood still and went on",
                [(0, 5000), (900, 5900), (905, 5905)],
                ClockReport { stalls: 1, longest_stall: MS * 900, ..ClockReport::default() },
            ),
        ];
        for (name, looks, expected) in table {
            assert_eq!(report(&looks), expected, "{name}");
        }
        let back = report(&[(500, 5000), (100, 4600), (105, 4605)]);
        assert_eq!((back.jumps, back.largest_jump), (1, MS * 400));
    }

    #[test]
    fn a_look_that_was_interrupted_is_no_jump() {
        let mut watch = ClockWatch::default();
        watch.observe(ClockReading { before: MS, real: MS * 1001, after: MS });
        watch.observe(ClockReading { before: MS * 6, real: MS * 1206, after: MS * 206 });
        watch.observe(ClockReading { before: MS * 211, real: MS * 1211, after: MS * 211 });
        assert_eq!(watch.report(), ClockReport::default());
    }
}
