//! Pages of which the destination holds an older version that this session has not sent: what differs is known once the destination has told
//! the pieces of its version.

use std::collections::{BTreeMap, BTreeSet};

use super::{PIECES, Page};

/// Most pages that wait.
const MOST: usize = 1024;
/// After so many answers it is known whether asking is of use,
const TRIED: u32 = 512;
/// which it is if one page in so many was worth it.
const WORTH: u32 = 8;

/// Hashes of the pieces of a page as the destination tells them, cut to 32 bits: a wrong match is found by the check.
pub type Pieces = [u32; PIECES];

/// What waits for pieces.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    /// The destination holds there what it has told, and nothing was sent since: a bit for each page.
    told: Vec<u64>,
    waiting: BTreeMap<u32, Box<Page>>,
    /// Those that were not asked for yet.
    unasked: BTreeSet<u32>,
    answers: u32,
    useful: u32,
}

impl Wanted {
    pub(super) fn new(pages: usize) -> Self {
        Self { told: vec![0; pages.div_ceil(64)], ..Self::default() }
    }

    pub(super) fn set_told(&mut self, page: u32, told: bool) {
        if let Some(word) = self.told.get_mut(page as usize / 64) {
            let bit = 1 << (page % 64);
            *word = if told { *word | bit } else { *word & !bit };
        }
    }

    /// Whether asking for the pieces of this page may save something.
    pub(super) fn is_worth(&self, page: u32) -> bool {
        let told = self.told.get(page as usize / 64).is_some_and(|word| word >> (page % 64) & 1 == 1);
        let useful = self.answers < TRIED || self.useful.saturating_mul(WORTH) >= self.answers;
        told && useful && (self.waiting.len() < MOST || self.waiting.contains_key(&page))
    }

    /// The page waits, with its newest content.
    pub(super) fn put(&mut self, page: u32, content: &Page) {
        if self.waiting.insert(page, Box::new(*content)).is_none() {
            self.unasked.insert(page);
        }
    }

    /// The page does not wait any more.
    pub(super) fn take(&mut self, page: u32) -> Option<Box<Page>> {
        self.unasked.remove(&page);
        self.waiting.remove(&page)
    }

    pub(super) fn waits(&self, page: u32) -> bool {
        self.waiting.contains_key(&page)
    }

    /// One that waits.
    pub(super) fn first(&self) -> Option<u32> {
        self.waiting.first_key_value().map(|(page, _)| *page)
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// One that was not asked for yet, and counts as asked for now.
    pub(super) fn ask(&mut self) -> Option<u32> {
        self.unasked.pop_first()
    }

    pub(super) fn unasked(&self) -> usize {
        self.unasked.len()
    }

    pub(super) fn on_answer(&mut self, useful: bool) {
        self.answers = self.answers.saturating_add(1);
        self.useful = self.useful.saturating_add(u32::from(useful));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_told_is_asked_for_and_not_without_end() {
        let mut wanted = Wanted::new(2_000);
        assert!(!wanted.is_worth(3), "nothing was told");
        (0..2_000).for_each(|page| wanted.set_told(page, true));
        wanted.set_told(4, false);
        assert!(wanted.is_worth(3) && !wanted.is_worth(4) && !wanted.is_worth(2_001));
        (0..MOST as u32).for_each(|page| wanted.put(page, &[1; 4096]));
        assert!(!wanted.is_worth(1_500), "enough wait");
        assert!(wanted.is_worth(3), "it waits already");
        wanted.put(3, &[2; 4096]);
        assert_eq!((wanted.len(), wanted.unasked(), wanted.ask()), (MOST, MOST, Some(0)));
        assert_eq!(wanted.take(3), Some(Box::new([2; 4096])));
        assert_eq!((wanted.take(3), wanted.len(), wanted.unasked()), (None, MOST - 1, MOST - 2));
    }

    #[test]
    fn it_is_given_up_where_it_is_of_no_use() {
        let mut wanted = Wanted::new(10);
        wanted.set_told(1, true);
        (0..TRIED).for_each(|number| wanted.on_answer(number % WORTH == 0));
        assert!(wanted.is_worth(1));
        wanted.on_answer(false);
        assert!(!wanted.is_worth(1));
    }
}
