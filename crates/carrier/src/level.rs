//! How much work compression may be: more while the link is what a move waits for, less while compression is.

use std::time::Duration;

/// From no compression to much, for zstd. From the ordinary one on each step takes about twice as long as the one before.
const LADDER: [Option<i32>; 6] = [None, Some(-5), Some(-1), Some(1), Some(3), Some(6)];
/// How long is measured before anything is changed.
const SPAN: Duration = Duration::from_millis(500);
/// While the link is waited for one batch in so many is compressed at another level, too: memory does not get smaller at a higher level as a rule, and now and then
/// larger. After a series that changed nothing it is one in [`SELDOM`], since memory may be another further on.
const OFTEN: u32 = 4;
const SELDOM: u32 = 64;
/// A series of trials, which shows what the work is worth: it is from one byte in so many on.
const TRIALS: u32 = 8;
const WORTH: u64 = 100;
/// Compression becomes less than the ordinary only if the link takes so many times what it comes to: a step doubles what goes into it, and may bring almost
/// twice the bytes for it.
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
    /// What compression came to.
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
    series: Series,
}

/// Batches that were compressed at two levels.
#[derive(Clone, Copy, Debug)]
struct Series {
    /// One batch in so many.
    every: u32,
    /// The other level is the lower one.
    lower: bool,
    count: u32,
    here: u64,
    there: u64,
}

impl Series {
    const fn new(every: u32, lower: bool) -> Self {
        Self { every, lower, count: 0, here: 0, there: 0 }
    }
}

impl Default for Series {
    fn default() -> Self {
        Self::new(OFTEN, false)
    }
}

/// Whether what takes `less` saves enough.
const fn saves(less: u64, more: u64) -> bool {
    less < more - more / WORTH
}

impl LevelChoice {
    /// The level for the next batch, and the one at which it is to be compressed for a trial.
    #[must_use]
    pub fn next_batch(&mut self) -> (Level, Option<Level>) {
        self.batches = self.batches.wrapping_add(1);
        let is_due = self.link_is_full && self.batches.is_multiple_of(self.series.every);
        (self.level, Some(self.other()).filter(|other| is_due && *other != self.level))
    }

    fn other(&self) -> Level {
        if self.series.lower { self.level.lower() } else { self.level.higher() }
    }

    /// A batch took so many bytes at the level that was chosen for it, and so many at that of its trial. The level is higher when trials have shown that it
    /// saves something, and lower, down to the ordinary one, when they have shown that it does not.
    pub fn on_trial(&mut self, (level, here): (Level, usize), (other, there): (Level, usize)) {
        if level != self.level || other != self.other() {
            return;
        }
        let series = &mut self.series;
        series.count += 1;
        series.here = series.here.saturating_add(here as u64);
        series.there = series.there.saturating_add(there as u64);
        let Series { lower, count, here, there, .. } = *series;
        if count < TRIALS {
            return;
        }
        match lower {
            false if saves(there, here) => self.set(other, OFTEN),
            true if !saves(here, there) => self.set(other, OFTEN),
            _ => self.series = Series::new(SELDOM, !lower && level > Level::default() || level.higher() == level),
        }
    }

    fn set(&mut self, level: Level, every: u32) {
        self.level = level;
        self.series = Series::new(every, level.higher() == level);
    }

    /// So much time was spent, over a link that takes so many bytes per second, if that is known. While the link was waited for most of the time, and
    /// compression hardly ever, other levels are tried. The level is lower when it is compression that was waited for: below the ordinary one only if the link
    /// could take what that comes to.
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
        self.link_is_full = link > all / 2 && compression < all / 20;
        let is_idle = |rate: u64| rate as f64 * all.as_secs_f64() >= bytes.saturating_mul(IDLE_LINK) as f64;
        let may_fall = self.level > Level::default() || link_rate.is_some_and(is_idle);
        if compression > link && compression > all / 4 && may_fall {
            // A higher one was too slow, and is not tried again soon.
            self.set(self.level.lower(), SELDOM);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// The levels after half seconds of waiting for the link and for compression, of memory that gets so many bytes per thousand smaller with each level. Each
    /// half second 320 batches become 10 MiB.
    fn after(spent: &[(u64, u64)], link_rate: Option<u64>, smaller: i64) -> Vec<Option<i32>> {
        let mut choice = LevelChoice::default();
        let each = spent.iter().map(|(link, compression)| run(&mut choice, (*link, *compression), link_rate, smaller));
        each.collect()
    }

    fn run(choice: &mut LevelChoice, (link, compression): (u64, u64), link_rate: Option<u64>, smaller: i64) -> Option<i32> {
        let millis = Duration::from_millis;
        let length = |level: Level| usize::try_from(100_000 - smaller * 100 * i64::from(level.0)).unwrap_or(0);
        for _ in 0..320 {
            if let (level, Some(other)) = choice.next_batch() {
                choice.on_trial((level, length(level)), (other, length(other)));
            }
        }
        let spent = Spent { all: millis(500), link: millis(link), compression: millis(compression), bytes: 10 * MIB };
        choice.on_spent(spent, link_rate);
        choice.level.zstd()
    }

    #[test]
    fn who_waits_for_the_link_compresses_more_up_to_a_limit() {
        assert_eq!(after(&[(400, 0); 4], Some(20 * MIB), 15), [Some(1), Some(6), Some(6), Some(6)]);
    }

    #[test]
    fn more_work_that_saves_nothing_is_not_done() {
        assert_eq!(after(&[(400, 0); 9], Some(20 * MIB), 5), [Some(1); 9]);
        assert_eq!(after(&[(400, 0); 9], Some(20 * MIB), -50), [Some(1); 9]);
    }

    #[test]
    fn work_that_saves_nothing_any_more_is_given_up() {
        let mut choice = LevelChoice::default();
        for smaller in [15, 15, 15] {
            run(&mut choice, (400, 0), Some(20 * MIB), smaller);
        }
        assert_eq!(choice.level.zstd(), Some(6));
        // What seldom happens takes its time.
        let levels: Vec<_> = (0..12).map(|_| run(&mut choice, (400, 0), Some(20 * MIB), -5)).collect();
        assert_eq!(levels.last(), Some(&Some(1)), "{levels:?}");
        assert_eq!(run(&mut choice, (400, 0), Some(20 * MIB), -5), Some(1));
    }

    #[test]
    fn trials_become_seldom_when_they_change_nothing() {
        let mut choice = LevelChoice::default();
        run(&mut choice, (400, 0), None, 0);
        let mut trials = 0;
        for _ in 0..640 {
            if let (level, Some(other)) = choice.next_batch() {
                trials += 1;
                choice.on_trial((level, 1_000), (other, 1_000));
            }
        }
        assert!((8..=20).contains(&trials), "{trials} trials of 640 batches");
    }

    #[test]
    fn who_waits_for_compression_compresses_less_down_to_nothing_if_the_link_takes_it() {
        assert_eq!(after(&[(0, 400); 5], Some(80 * MIB), 0), [Some(-1), Some(-5), None, None, None]);
        assert_eq!(after(&[(0, 400); 5], Some(79 * MIB), 0), [Some(1); 5]);
        assert_eq!(after(&[(0, 400); 5], None, 0), [Some(1); 5]);
    }

    #[test]
    fn above_the_ordinary_level_compression_that_is_waited_for_falls_whatever_the_link_takes() {
        let spent = [(400, 0), (400, 0), (0, 400), (0, 400), (0, 400)];
        assert_eq!(after(&spent, Some(20 * MIB), 15), [Some(1), Some(6), Some(3), Some(1), Some(1)]);
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
        for _ in 0..100 {
            choice.on_trial((Level::default().lower(), 1000), (Level::default().higher(), 1));
            choice.on_trial((Level::default(), 1000), (Level::default(), 1));
        }
        assert_eq!((choice.level, choice.series.count), (Level::default(), 0));
    }
}
