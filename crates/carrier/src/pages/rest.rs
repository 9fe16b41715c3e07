//! Pages that are sent after the switch of post-copy: each once, as zeros or as a whole, since the guest has gone on with everything else by then.

use super::batch::{Entry, Writer};
use super::encode::{Batch, Encoding, Place};
use super::{PAGE_SIZE, Page};

/// A set of pages of blocks whose lengths are known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    blocks: Vec<(u32, Vec<u64>)>,
    count: u64,
}

impl PageSet {
    /// Of blocks of these lengths in pages; empty.
    #[must_use]
    pub fn new(blocks: &[u32]) -> Self {
        let words = |pages: u32| vec![0; (pages as usize).div_ceil(64)];
        Self { blocks: blocks.iter().map(|pages| (*pages, words(*pages))).collect(), count: 0 }
    }

    /// An empty one of the same blocks.
    #[must_use]
    pub fn emptied(&self) -> Self {
        let blocks = self.blocks.iter().map(|(pages, words)| (*pages, vec![0; words.len()])).collect();
        Self { blocks, count: 0 }
    }

    /// How many pages are in it.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.count
    }

    /// Whether no page is in it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether there is such a page at all.
    #[must_use]
    pub fn has_place(&self, place: Place) -> bool {
        self.blocks.get(usize::from(place.block)).is_some_and(|(pages, _)| place.page < *pages)
    }

    /// Whether the page is in it.
    #[must_use]
    pub fn contains(&self, place: Place) -> bool {
        self.has_place(place) && self.words(place.block).get(place.page as usize / 64).is_some_and(|word| word & bit(place) != 0)
    }

    /// Whether the page is in it now and was not before.
    pub fn insert(&mut self, place: Place) -> bool {
        if !self.has_place(place) || self.contains(place) {
            return false;
        }
        self.flip(place);
        self.count += 1;
        true
    }

    /// Whether the page was in it and is not any more.
    pub fn remove(&mut self, place: Place) -> bool {
        let was = self.contains(place);
        if was {
            self.flip(place);
            self.count -= 1;
        }
        was
    }

    /// The first page of it from `place` on, and from the beginning if there is none behind.
    #[must_use]
    pub fn next(&self, place: Place) -> Option<Place> {
        self.from(place).or_else(|| self.from(Place { block: 0, page: 0 }))
    }

    fn from(&self, place: Place) -> Option<Place> {
        (usize::from(place.block)..self.blocks.len()).find_map(|number| {
            let block = u16::try_from(number).ok()?;
            let first = if block == place.block { place.page } else { 0 };
            let mut words = self.words(block).iter().enumerate().skip(first as usize / 64);
            words.find_map(|(at, word)| {
                let skipped = if at == first as usize / 64 { u64::MAX << (first % 64) } else { u64::MAX };
                let found = word & skipped;
                (found != 0).then(|| Place { block, page: at as u32 * 64 + found.trailing_zeros() })
            })
        })
    }

    /// Its pages of a block as runs: the first, and how many follow each other.
    #[must_use]
    pub fn runs(&self, block: u16) -> Vec<(u32, u32)> {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        let mut next = self.from(Place { block, page: 0 });
        while let Some(place) = next.filter(|place| place.block == block) {
            match runs.last_mut() {
                Some((first, pages)) if *first + *pages == place.page => *pages += 1,
                _ => runs.push((place.page, 1)),
            }
            next = place.page.checked_add(1).and_then(|page| self.from(Place { block, page }));
        }
        runs
    }

    /// How many blocks there are.
    #[must_use]
    pub fn blocks(&self) -> u16 {
        u16::try_from(self.blocks.len()).unwrap_or(u16::MAX)
    }

    fn words(&self, block: u16) -> &[u64] {
        self.blocks.get(usize::from(block)).map_or(&[], |(_, words)| words)
    }

    fn flip(&mut self, place: Place) {
        let words = self.blocks.get_mut(usize::from(place.block)).map(|(_, words)| words);
        if let Some(word) = words.and_then(|words| words.get_mut(place.page as usize / 64)) {
            *word ^= bit(place);
        }
    }
}

const fn bit(place: Place) -> u64 {
    1 << (place.page % 64)
}

/// The source's half after the switch.
pub struct Rest {
    left: PageSet,
    batch: Writer,
    pages: u64,
    encoding: Encoding,
}

impl std::fmt::Debug for Rest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rest").field("left", &self.left.len()).finish_non_exhaustive()
    }
}

impl Rest {
    /// These pages are left; others were sent as `encoding` says.
    #[must_use]
    pub fn new(left: PageSet, encoding: Encoding) -> Self {
        Self { left, batch: Writer::default(), pages: 0, encoding }
    }

    /// Those that were not sent.
    #[must_use]
    pub const fn left(&self) -> &PageSet {
        &self.left
    }

    /// How all pages were sent.
    #[must_use]
    pub const fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// Adds a page to the batch, if it is left; there must be room.
    pub fn encode(&mut self, place: Place, content: Option<&Page>) {
        if self.take_left(place, content) {
            self.batch.put(place.block, place.page, &entry(content));
            self.pages += 1;
        }
    }

    /// A batch of this page alone, if it is left.
    pub fn alone(&mut self, place: Place, content: Option<&Page>) -> Option<Batch> {
        self.take_left(place, content).then(|| {
            let mut batch = Writer::default();
            batch.put(place.block, place.page, &entry(content));
            Batch::after(batch.finish(), PAGE_SIZE as u64)
        })
    }

    /// Whether the batch must be taken before the next page.
    #[must_use]
    pub fn is_full(&self) -> bool {
        !self.batch.has_room()
    }

    /// The batch of all pages since the last call, unless there are none.
    pub fn take(&mut self) -> Option<Batch> {
        let pages = std::mem::take(&mut self.pages);
        (!self.batch.is_empty()).then(|| Batch::after(self.batch.finish(), pages * PAGE_SIZE as u64))
    }

    fn take_left(&mut self, place: Place, content: Option<&Page>) -> bool {
        let left = self.left.remove(place);
        self.encoding.zero += u64::from(left && content.is_none());
        self.encoding.data += u64::from(left && content.is_some());
        left
    }
}

fn entry(content: Option<&Page>) -> Entry<'_> {
    content.map_or(Entry::Zero, Entry::Data)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const BLOCKS: [u32; 3] = [130, 0, 65];

    fn place(block: u16, page: u32) -> Place {
        Place { block, page }
    }

    #[test]
    fn pages_that_are_none_are_in_no_set() {
        let mut set = PageSet::new(&BLOCKS);
        for none in [place(0, 130), place(1, 0), place(2, 65), place(3, 0), place(u16::MAX, u32::MAX)] {
            assert!(!set.insert(none) && !set.contains(none) && !set.remove(none) && !set.has_place(none), "{none:?}");
            assert_eq!(set.next(none), None);
        }
        assert!(set.is_empty() && set.runs(0).is_empty() && set.runs(3).is_empty());
    }

    #[test]
    fn every_page_that_is_left_is_sent_once_and_no_other() {
        let mut set = PageSet::new(&BLOCKS);
        (0..100).for_each(|page| assert!(set.insert(place(0, page))));
        let mut rest = Rest::new(set, Encoding::default());
        assert!(rest.alone(place(0, 100), Some(&[1; PAGE_SIZE])).is_none(), "the destination has it");
        let alone = rest.alone(place(0, 7), Some(&[1; PAGE_SIZE])).expect("it is left");
        assert_eq!(alone.raw, PAGE_SIZE as u64);
        assert!(rest.alone(place(0, 7), Some(&[1; PAGE_SIZE])).is_none(), "it has left");
        let mut raw = 0;
        while let Some(next) = rest.left().next(place(0, 7)) {
            if rest.is_full() {
                raw += rest.take().map_or(0, |batch| batch.raw);
            }
            rest.encode(next, (next.page % 2 == 0).then_some(&[2; PAGE_SIZE]));
        }
        raw += rest.take().map_or(0, |batch| batch.raw);
        assert_eq!((raw, rest.take()), (99 * PAGE_SIZE as u64, None));
        assert_eq!((rest.encoding().data, rest.encoding().zero), (51, 49));
    }

    proptest! {
        #[test]
        fn prop_a_set_is_what_was_put_into_it(steps in prop::collection::vec((0..3_u16, 0..140_u32, any::<bool>()), 0..300)) {
            let (mut set, mut model) = (PageSet::new(&BLOCKS), BTreeSet::new());
            for (block, page, put) in steps {
                let there = page < BLOCKS[usize::from(block)];
                if put {
                    prop_assert_eq!(set.insert(place(block, page)), there && model.insert((block, page)));
                } else {
                    prop_assert_eq!(set.remove(place(block, page)), model.remove(&(block, page)));
                }
            }
            model.retain(|(block, page)| *page < BLOCKS[usize::from(*block)]);
            prop_assert_eq!(set.len(), model.len() as u64);
            for block in 0..3 {
                let runs = set.runs(block).into_iter().flat_map(|(first, pages)| first..first + pages);
                prop_assert!(runs.eq(model.iter().filter(|(of, _)| *of == block).map(|(_, page)| *page)));
                for page in [0, 63, 64, 129, 200] {
                    let next = model.range((block, page)..).next().or(model.first()).map(|(block, page)| place(*block, *page));
                    prop_assert_eq!(set.next(place(block, page)), next);
                }
            }
        }
    }
}
