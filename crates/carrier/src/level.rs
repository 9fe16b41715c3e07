//! How much work compression may be: more while the link is what a move waits for, less while compression is.

use std::time::Duration;

/// From no compression to much, for zstd. Each step takes about half as long again as the one before, from the second on.
const LADDER: [Option<i32>; 7] = [None, Some(-5), Some(-1), Some(1), Some(2), Some(3), Some(5)];
/// How long is measured before anything is changed.
const SPAN: Duration = Duration::from_millis(500);

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
    pub fn all() -> impl Iterator<Item = Self> {
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
}

/// Chooses the level.
#[derive(Clone, Copy, Debug, Default)]
pub struct LevelChoice {
    level: Level,
    spent: Spent,
}

impl LevelChoice {
    /// The level for the next batch.
    #[must_use]
    pub const fn level(&self) -> Level {
        self.level
    }

    /// So much time was spent. A level is higher when the link was waited for most of the time and compression hardly ever, lower when it
    /// is compression that was waited for, and stays otherwise.
    pub fn on_spent(&mut self, spent: Spent) {
        self.spent.all += spent.all;
        self.spent.link += spent.link;
        self.spent.compression += spent.compression;
        let Spent { all, link, compression } = self.spent;
        if all < SPAN {
            return;
        }
        self.spent = Spent::default();
        if compression > link && compression > all / 4 {
            self.level = self.level.lower();
        } else if link > all / 2 && compression < all / 20 {
            self.level = self.level.higher();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(spent: &[(u64, u64)]) -> Vec<Option<i32>> {
        let mut choice = LevelChoice::default();
        let each = spent.iter().map(|(link, compression)| {
            let millis = Duration::from_millis;
            choice.on_spent(Spent { all: millis(500), link: millis(*link), compression: millis(*compression) });
            choice.level().zstd()
        });
        each.collect()
    }

    #[test]
    fn who_waits_for_the_link_compresses_more_up_to_a_limit() {
        assert_eq!(after(&[(400, 0); 5]), [Some(2), Some(3), Some(5), Some(5), Some(5)]);
    }

    #[test]
    fn who_waits_for_compression_compresses_less_down_to_nothing() {
        assert_eq!(after(&[(0, 400); 5]), [Some(-1), Some(-5), None, None, None]);
    }

    #[test]
    fn nothing_changes_when_neither_is_waited_for_or_both_are() {
        assert_eq!(after(&[(0, 0), (100, 100), (260, 100), (240, 0)]), [Some(1); 4]);
    }

    #[test]
    fn short_times_add_up_before_anything_changes() {
        let mut choice = LevelChoice::default();
        let short = Spent { all: Duration::from_millis(100), link: Duration::from_millis(90), compression: Duration::ZERO };
        for _ in 0..4 {
            choice.on_spent(short);
        }
        assert_eq!(choice.level(), Level::default());
        choice.on_spent(short);
        assert!(choice.level() > Level::default());
    }
}
