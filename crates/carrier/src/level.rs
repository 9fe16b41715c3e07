//! How much work compression may be: more while the link is what a move waits for, less while compression is.

use std::time::Duration;

/// From no compression to much, for zstd. From the ordinary one on each step takes about twice as long as the one before.
const LADDER: [Option<i32>; 6] = [None, Some(-5), Some(-1), Some(1), Some(3), Some(6)];
/// How long is measured before anything is changed.
const SPAN: Duration = Duration::from_millis(500);
/// While the link is waited for one batch in so many is compressed at the next level, too: memory does not get smaller at a higher level as a rule, and
/// now and then larger.
const TRIED: u32 = 4;
/// After so many trials it is known what that level saves. It is worth its work from one byte in so many on.
const TRIALS: u32 = 8;
const WORTH: u64 = 100;
/// Compression becomes less only if the link takes so many times what goes into compression now: else it is bytes that cost the time, or would.
const IDLE_LINK: u64 = 4;

/// A level of compression.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level(u8);

impl Default for Level {
    /// zstd's quickest ordinary one.
    fn default() -> Self {
        Self(3)
    }
}

impl Level {
    /// Every level, the quickest first.
    pub fn all() -> impl Iterator<Item = Self> + Clone {
        (0_u8..).take(LADDER.len()).map(Self)
    }

    /// The level that zstd knows it by; none for no compression.
    #[must_use]
    pub fn zstd(self) -> Option<i32> {
        LADDER.get(usize::from(self.0)).copied().flatten()
    }

    fn higher(self) -> Self {
        Self(self.0.saturating_add(1).min(u8::try_from(LADDER.len() - 1).unwrap_or(u8::MAX)))
    }

    const fn lower(self) -> Self {
        Self(self.0.saturating_sub(1))
    }
}

/// What a move spent its time on, since this was last told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// All time.
    pub all: Duration,
    /// Nothing more could be read, since the link was full.
    pub link: Duration,
    /// Nothing more could be read, since compression was behind.
    pub compression: Duration,
    /// Bytes that were given to compression.
    pub bytes: u64,
}

/// Chooses the level.
#[derive(Clone, Copy, Debug, Default)]
pub struct LevelChoice {
    level: Level,
    spent: Spent,
    /// The link was what was waited for lately.
    link_is_full: bool,
    batches: u32,
    trials: Trials,
}

/// Batches that were compressed at two levels.
#[derive(Clone, Copy, Debug, Default)]
struct Trials {
    count: u32,
    here: u64,
    higher: u64,
}

impl LevelChoice {
    /// The level for the next batch, and the one at which it is to be compressed for a trial.
    #[must_use]
    pub fn next_batch(&mut self) -> (Level, Option<Level>) {
        self.batches = self.batches.wrapping_add(1);
        let higher = Some(self.level.higher()).filter(|higher| *higher > self.level);
        (self.level, higher.filter(|_| self.link_is_full && self.batches.is_multiple_of(TRIED)))
    }

    /// A batch took so many bytes at the level that was chosen for it, and so many at that of its trial.
    pub const fn on_trial(&mut self, (level, here): (Level, usize), higher: usize) {
        if level.0 == self.level.0 {
            self.trials.count = self.trials.count.saturating_add(1);
            self.trials.here = self.trials.here.saturating_add(here as u64);
            self.trials.higher = self.trials.higher.saturating_add(higher as u64);
        }
    }

    /// So much time was spent, over a link that takes so many bytes per second, if that is known. The level is higher when the link was waited for most of
    /// the time, compression hardly ever, and trials have shown that it saves something; lower when it is compression that was waited for, and the link could
    /// take the bytes; and stays otherwise.
    pub fn on_spent(&mut self, spent: Spent, link_rate: Option<u64>) {
        self.spent.all += spent.all;
        self.spent.link += spent.link;
        self.spent.compression += spent.compression;
        self.spent.bytes = self.spent.bytes.saturating_add(spent.bytes);
        let Spent { all, link, compression, bytes } = self.spent;
        if all < SPAN {
            return;
        }
        self.spent = Spent::default();
        let is_idle = |rate: u64| rate as f64 * all.as_secs_f64() >= bytes.saturating_mul(IDLE_LINK) as f64;
        self.link_is_full = link > all / 2 && compression < all / 20;
        if compression > link && compression > all / 4 && link_rate.is_some_and(is_idle) {
            (self.level, self.trials) = (self.level.lower(), Trials::default());
        } else if self.link_is_full && self.trials.saves() {
            (self.level, self.trials) = (self.level.higher(), Trials::default());
        }
    }
}

impl Trials {
    const fn saves(&self) -> bool {
        self.count >= TRIALS && self.higher < self.here - self.here / WORTH
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// The levels after half seconds of waiting for the link and for compression; trials come to so much, where there are any. 10 MiB go into compression each
    /// time.
    fn after(spent: &[(u64, u64)], link_rate: Option<u64>, tried: usize) -> Vec<Option<i32>> {
        let mut choice = LevelChoice::default();
        let each = spent.iter().map(|(link, compression)| {
            let millis = Duration::from_millis;
            for _ in 0..32 {
                if let (level, Some(higher)) = choice.next_batch() {
                    assert!(higher > level);
                    choice.on_trial((level, 1000), tried);
                }
            }
            let spent = Spent { all: millis(500), link: millis(*link), compression: millis(*compression), bytes: 10 * MIB };
            choice.on_spent(spent, link_rate);
            choice.level.zstd()
        });
        each.collect()
    }

    #[test]
    fn who_waits_for_the_link_compresses_more_up_to_a_limit() {
        assert_eq!(after(&[(400, 0); 5], Some(20 * MIB), 980), [Some(1), Some(3), Some(6), Some(6), Some(6)]);
    }

    #[test]
    fn more_work_that_saves_nothing_is_not_done() {
        assert_eq!(after(&[(400, 0); 5], Some(20 * MIB), 995), [Some(1); 5]);
        assert_eq!(after(&[(400, 0); 5], Some(20 * MIB), 1_100), [Some(1); 5]);
    }

    #[test]
    fn who_waits_for_compression_compresses_less_down_to_nothing_if_the_link_takes_it() {
        assert_eq!(after(&[(0, 400); 5], Some(80 * MIB), 0), [Some(-1), Some(-5), None, None, None]);
        assert_eq!(after(&[(0, 400); 5], Some(79 * MIB), 0), [Some(1); 5]);
        assert_eq!(after(&[(0, 400); 5], None, 0), [Some(1); 5]);
    }

    #[test]
    fn nothing_changes_when_neither_is_waited_for_or_both_are() {
        assert_eq!(after(&[(0, 0), (100, 100), (260, 100), (240, 0)], Some(80 * MIB), 500), [Some(1); 4]);
    }

    #[test]
    fn short_times_add_up_before_anything_changes() {
        let mut choice = LevelChoice::default();
        let millis = Duration::from_millis;
        let short = Spent { all: millis(100), link: Duration::ZERO, compression: millis(90), bytes: MIB };
        for _ in 0..4 {
            choice.on_spent(short, Some(80 * MIB));
        }
        assert_eq!(choice.level, Level::default());
        choice.on_spent(short, Some(80 * MIB));
        assert!(choice.level < Level::default());
    }

    #[test]
    fn what_was_tried_at_another_level_does_not_count() {
        let mut choice = LevelChoice::default();
        choice.on_trial((Level::default().lower(), 1000), 1);
        assert_eq!(choice.trials.count, 0);
    }
}
