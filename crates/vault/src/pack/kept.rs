//! Which of its pages a pack still has, and where each is among them: a pack that was written anew has not all.

use bytes::{Buf, BufMut};

use super::{KEPT, MAX_RUNS};
use crate::stored::Malformed;

/// Consecutive pages that are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    first: u32,
    pages: u32,
    /// Of its first page.
    position: u32,
}

impl Run {
    const fn end(&self) -> u32 {
        self.first.saturating_add(self.pages)
    }
}

/// The pages that a pack has. In memory are twelve bytes for each run, of which there are at most 1,048,576.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct KeptPages {
    /// Ascending, none touches the next.
    runs: Vec<Run>,
}

impl KeptPages {
    /// All pages of a pack that has so many.
    pub(super) fn all(pages: u32) -> Self {
        Self { runs: if pages == 0 { vec![] } else { vec![Run { first: 0, pages, position: 0 }] } }
    }

    /// How many they are.
    pub(crate) fn count(&self) -> u32 {
        self.runs.last().map_or(0, |run| run.position + run.pages)
    }

    /// How many are kept before a page, if that is kept.
    pub(crate) fn position(&self, page: u32) -> Option<u32> {
        let behind = self.runs.partition_point(|run| run.first <= page);
        let run = self.runs.get(behind.checked_sub(1)?)?;
        (page < run.end()).then(|| run.position + (page - run.first))
    }

    /// The page at a position.
    pub(crate) fn page(&self, position: u32) -> Option<u32> {
        let behind = self.runs.partition_point(|run| run.position <= position);
        let run = self.runs.get(behind.checked_sub(1)?)?;
        let within = position - run.position;
        (within < run.pages).then(|| run.first + within)
    }

    /// All of them, ascending.
    pub(crate) fn pages(&self) -> impl Iterator<Item = u32> + use<> {
        self.runs.clone().into_iter().flat_map(|run| run.first..run.end())
    }

    /// The first page that is kept, from one on.
    pub(super) fn first_from(&self, page: u32) -> Option<u32> {
        let next = self.runs.partition_point(|run| run.end() <= page);
        self.runs.get(next).map(|run| run.first.max(page))
    }

    /// The last page before one that is kept.
    pub(super) fn last_before(&self, page: u32) -> Option<u32> {
        let behind = self.runs.partition_point(|run| run.first < page);
        self.runs.get(behind.checked_sub(1)?).map(|run| run.end().min(page) - 1)
    }

    /// Adds a page, which is beyond all others.
    pub(crate) fn push(&mut self, page: u32) {
        let position = self.count();
        match self.runs.last_mut() {
            Some(last) if last.end() == page => last.pages += 1,
            _ => self.runs.push(Run { first: page, pages: 1, position }),
        }
    }

    /// Those of these pages of which `is_needed` is true, and of others as few as must be kept so that there are no more runs than a pack may have.
    pub(crate) fn only(&self, is_needed: impl Fn(u32) -> bool) -> Self {
        self.at_most(MAX_RUNS, is_needed)
    }

    fn at_most(&self, runs: usize, is_needed: impl Fn(u32) -> bool) -> Self {
        // Pages between two needed ones are kept if they are so few: more, until the runs do.
        for gap in (0..u32::BITS).map(|power| (1_u32 << power) - 1) {
            let mut kept = Self::default();
            let mut skipped = Vec::new();
            for page in self.pages() {
                if !is_needed(page) {
                    if skipped.len() <= gap as usize {
                        skipped.push(page);
                    }
                    continue;
                }
                if !kept.runs.is_empty() && skipped.len() <= gap as usize {
                    skipped.iter().for_each(|page| kept.push(*page));
                }
                skipped.clear();
                kept.push(page);
                if kept.runs.len() > runs {
                    break;
                }
            }
            if kept.runs.len() <= runs {
                return kept;
            }
        }
        self.clone()
    }

    /// The bytes of the list; none if all of so many pages are kept.
    pub(super) fn encode(&self, pages: u32) -> Vec<u8> {
        let mut out = Vec::new();
        if self.count() < pages {
            out.reserve(self.runs.len() * KEPT);
            for run in &self.runs {
                out.put_u32(run.first);
                out.put_u32(run.pages);
            }
        }
        out
    }

    /// What a pack of once so many pages has, from its list and how many they are to be.
    ///
    /// # Errors
    /// [`Malformed::Kept`]
    pub(super) fn decode(mut bytes: &[u8], pages: u32, count: u32) -> Result<Self, Malformed> {
        if bytes.is_empty() && count == pages {
            return Ok(Self::all(pages));
        }
        let (mut kept, mut next) = (Self { runs: Vec::with_capacity(bytes.len() / KEPT) }, 0);
        while bytes.len() >= KEPT {
            let (first, length) = (bytes.get_u32(), bytes.get_u32());
            let touches = first < next || (first == next && !kept.runs.is_empty());
            let end = first.checked_add(length).filter(|end| !touches && *end > first && *end <= pages);
            next = end.ok_or(Malformed::Kept)?;
            let position = kept.count();
            kept.runs.push(Run { first, pages: length, position });
        }
        // None is no pack, and all have no list.
        let right = bytes.is_empty() && kept.count() == count && (1..pages).contains(&count);
        if right { Ok(kept) } else { Err(Malformed::Kept) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn list(runs: &[(u32, u32)]) -> Vec<u8> {
        runs.iter().flat_map(|(first, pages)| [first.to_be_bytes(), pages.to_be_bytes()].concat()).collect()
    }

    fn of(pages: &BTreeSet<u32>) -> KeptPages {
        let mut kept = KeptPages::default();
        pages.iter().for_each(|page| kept.push(*page));
        kept
    }

    proptest! {
        #[test]
        fn prop_each_page_has_its_position_and_the_list_says_all(pages in prop::collection::btree_set(0..200_u32, 1..150)) {
            let kept = of(&pages);
            prop_assert!(kept.pages().eq(pages.iter().copied()));
            prop_assert_eq!(kept.count() as usize, pages.len());
            for page in 0..210 {
                let wanted = pages.iter().position(|known| *known == page).map(|at| at as u32);
                prop_assert_eq!(kept.position(page), wanted);
                prop_assert_eq!(kept.first_from(page), pages.range(page..).next().copied());
                prop_assert_eq!(kept.last_before(page), pages.range(..page).next_back().copied());
            }
            for position in 0..210 {
                prop_assert_eq!(kept.page(position), pages.iter().nth(position as usize).copied());
            }
            prop_assert_eq!(KeptPages::decode(&kept.encode(200), 200, kept.count()), Ok(kept));
        }

        #[test]
        fn prop_any_bytes_are_pages_of_the_pack_or_refused(bytes in prop::collection::vec(0..4_u8, 0..60), pages in 0..100_000_000_u32, count in 0..60_u32) {
            if let Ok(kept) = KeptPages::decode(&bytes, pages, count) {
                prop_assert!(kept.pages().last().is_none_or(|last| last < pages));
                prop_assert_eq!((kept.count(), kept.encode(pages)), (count, bytes));
            }
        }

        #[test]
        fn prop_what_is_needed_is_kept_in_as_many_runs_as_may_be(
            has in prop::collection::btree_set(0..300_u32, 1..250),
            needed in prop::collection::btree_set(0..300_u32, 0..200),
            runs in 1..20_usize,
        ) {
            let kept = of(&has).at_most(runs, |page| needed.contains(&page));
            prop_assert!(needed.intersection(&has).all(|page| kept.position(*page).is_some()));
            prop_assert!(kept.pages().all(|page| has.contains(&page)));
            let exact = of(&has.intersection(&needed).copied().collect());
            if exact.runs.len() <= runs {
                prop_assert_eq!(kept, exact);
            } else {
                prop_assert!(kept.runs.len() <= runs.max(of(&has).runs.len()));
            }
        }
    }

    #[test]
    fn what_is_no_list_of_kept_pages_is_refused() {
        assert!(KeptPages::decode(&list(&[(0, 2), (3, 1), (7, 2)]), 9, 5).is_ok());
        assert_eq!(KeptPages::decode(&[], 9, 9), Ok(KeptPages::all(9)));
        assert_eq!(KeptPages::decode(&[], 0, 0).map(|kept| kept.count()), Ok(0));
        let wrong: [(&[(u32, u32)], u32); 11] = [
            (&[(5, 1), (2, 1)], 2),
            (&[(2, 2), (4, 1)], 3),
            (&[(2, 2), (3, 1)], 3),
            (&[(2, 0)], 0),
            (&[(8, 2)], 2),
            (&[(u32::MAX, 2)], 2),
            (&[(1, u32::MAX)], u32::MAX),
            (&[(0, 9)], 9),
            (&[(0, 2)], 3),
            (&[(0, 2)], 1),
            (&[], 0),
        ];
        for (runs, count) in wrong {
            assert_eq!(KeptPages::decode(&list(runs), 9, count), Err(Malformed::Kept), "{runs:?}");
        }
        assert_eq!(KeptPages::decode(&list(&[(0, 2)])[..7], 9, 2), Err(Malformed::Kept));
        assert_eq!(KeptPages::decode(&[list(&[(0, 2)]), vec![0]].concat(), 9, 2), Err(Malformed::Kept));
    }
}
