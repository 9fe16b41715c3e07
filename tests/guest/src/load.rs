//! Memory for measurements: known contents in exact amounts, and writes of exactly so many bytes.
//!
//! Unlike a page of a `PagePool`, a page here carries nothing but its content, and no write touches anything beside the bytes that it
//! changes. Writes are exclusive ors with a sequence that is made again at will: to verify the memory they are taken back, and then
//! each page must be what it was filled with.

use std::hint::black_box;

use crate::knobs::Mix;
use crate::noise::{Noise, mix};
use crate::pages::{PAGE_SIZE, PageKind};

const WORDS: usize = PAGE_SIZE / 8;
/// Contents that duplicate pages share.
const PATTERNS: u64 = 8;
/// Compressible pages are words of eight bytes, drawn from this many: fast compressors make about a third of them.
const VOCABULARY: usize = 64;
const DRAW_BITS: u32 = VOCABULARY.ilog2();

/// What becomes of a word that is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rewrite {
    /// A new random value.
    Change,
    /// The value that it has.
    Equal,
}

/// The memory and the writes to it.
pub struct Load {
    /// One page longer than needed, to start at a page of the machine.
    words: Vec<u64>,
    start: usize,
    mix: Mix,
    seed: u64,
    rewrite: Rewrite,
    working_set: u64,
    words_per_write: usize,
    vocabulary: Vec<u64>,
    sequence: Noise,
    written: u64,
}

impl Load {
    /// Fills `bytes` of memory. The working set is its beginning, over which the kinds of pages are spread evenly, as over all of it.
    #[must_use]
    pub fn new(bytes: u64, mix: Mix, seed: u64, rewrite: Rewrite, working_set: u64, write_size: usize) -> Self {
        let pages = usize::try_from(bytes / PAGE_SIZE as u64).unwrap_or(usize::MAX);
        let words = vec![0; (pages + 1) * WORDS];
        let start = (words.as_ptr() as usize).wrapping_neg() % PAGE_SIZE / 8;
        let mut letters = Noise::new(seed);
        let vocabulary = (0..VOCABULARY).map(|_| letters.next_word()).collect();
        let mut load = Self {
            words,
            start,
            mix,
            seed,
            rewrite,
            working_set: (working_set / PAGE_SIZE as u64).min(pages as u64),
            words_per_write: (write_size / 8).clamp(1, WORDS),
            vocabulary,
            sequence: Self::sequence(seed),
            written: 0,
        };
        for index in 0..pages {
            let mut content = load.original(index);
            load.page(index).fill_with(|| content.next().unwrap_or_default());
        }
        load
    }

    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.words.len() / WORDS - 1
    }

    /// Writes to a random page of the working set.
    pub fn write(&mut self) {
        let mut sequence = self.sequence.clone();
        self.apply(&mut sequence);
        self.sequence = sequence;
        self.written += 1;
    }

    /// Takes all writes back and counts the pages that are not what they were filled with. Writing begins anew after that.
    pub fn verify(&mut self) -> u64 {
        let mut sequence = Self::sequence(self.seed);
        for _ in 0..std::mem::take(&mut self.written) {
            self.apply(&mut sequence);
        }
        self.sequence = Self::sequence(self.seed);
        (0..self.pages()).filter(|index| !self.is_original(*index)).count() as u64
    }

    /// The same for the same state of the sequence; done twice, it is undone.
    fn apply(&mut self, sequence: &mut Noise) {
        let (count, rewrite) = (self.words_per_write, self.rewrite);
        let index = sequence.below(self.working_set) as usize;
        let first = sequence.below((WORDS - count + 1) as u64) as usize;
        for word in self.page(index).iter_mut().skip(first).take(count) {
            match rewrite {
                Rewrite::Change => *word ^= sequence.next_word(),
                // Else the compiler would leave out the write.
                Rewrite::Equal => *word = black_box(*word),
            }
        }
    }

    fn is_original(&self, index: usize) -> bool {
        let first = self.start + index * WORDS;
        let content = self.words.get(first..first + WORDS).unwrap_or_default();
        content.iter().copied().eq(self.original(index))
    }

    /// What the page is filled with.
    fn original(&self, index: usize) -> impl Iterator<Item = u64> + use<> {
        let kind = self.mix.kind(index);
        let source = match kind {
            PageKind::Duplicate => index as u64 % PATTERNS,
            _ => index as u64,
        };
        let mut noise = Noise::new(mix(self.seed ^ kind as u64) ^ source);
        let vocabulary = if kind == PageKind::Compressible { self.vocabulary.clone() } else { Vec::new() };
        let (mut drawn, mut left) = (0, 0);
        std::iter::repeat_with(move || match kind {
            PageKind::Zero => 0,
            PageKind::Compressible => {
                if left == 0 {
                    (drawn, left) = (noise.next_word(), u64::BITS / DRAW_BITS);
                }
                let word = vocabulary.get(drawn as usize % VOCABULARY).copied().unwrap_or_default();
                drawn >>= DRAW_BITS;
                left -= 1;
                word
            }
            PageKind::Unique | PageKind::Duplicate | PageKind::Slow => noise.next_word(),
        })
        .take(WORDS)
    }

    fn page(&mut self, index: usize) -> &mut [u64] {
        let first = self.start + index * WORDS;
        self.words.get_mut(first..first + WORDS).unwrap_or_default()
    }

    fn sequence(seed: u64) -> Noise {
        Noise::new(mix(seed))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const PAGES: usize = 200;
    const SET: usize = 100;

    fn load(rewrite: Rewrite, write_size: usize) -> Load {
        let mix = Mix { unique: 20, compressible: 60, duplicate: 20, zero: 0, slow: 0 };
        Load::new((PAGES * PAGE_SIZE) as u64, mix, 42, rewrite, (SET * PAGE_SIZE) as u64, write_size)
    }

    fn content(load: &mut Load) -> Vec<Vec<u64>> {
        (0..PAGES).map(|index| load.page(index).to_vec()).collect()
    }

    fn differing(one: &[Vec<u64>], other: &[Vec<u64>]) -> usize {
        one.concat().iter().zip(other.concat()).filter(|(one, other)| *one != other).count()
    }

    #[test]
    fn a_write_changes_exactly_its_bytes() {
        for (size, words) in [(8, 1), (512, 64), (PAGE_SIZE, WORDS)] {
            let mut load = load(Rewrite::Change, size);
            let before = content(&mut load);
            load.write();
            assert_eq!(differing(&before, &content(&mut load)), words, "{size}");
        }
    }

    #[test]
    fn equal_values_change_nothing() {
        let mut load = load(Rewrite::Equal, 8);
        let before = content(&mut load);
        (0..1000).for_each(|_| load.write());
        assert_eq!(differing(&before, &content(&mut load)), 0);
        assert_eq!(load.verify(), 0);
    }

    #[test]
    fn writes_stay_in_the_working_set_and_are_taken_back() {
        for size in [8, 512, PAGE_SIZE] {
            let mut load = load(Rewrite::Change, size);
            let before = content(&mut load);
            for _ in 0..2 {
                (0..3000).for_each(|_| load.write());
                let now = content(&mut load);
                assert_ne!(now[..SET], before[..SET]);
                assert_eq!(now[SET..], before[SET..]);
                assert_eq!(load.verify(), 0);
                assert_eq!(content(&mut load), before);
            }
        }
    }

    #[test]
    fn a_lost_write_and_a_flipped_bit_are_found() {
        let mut load = load(Rewrite::Change, 8);
        load.write();
        let before = content(&mut load);
        load.write();
        for (index, page) in before.into_iter().enumerate() {
            load.page(index).copy_from_slice(&page);
        }
        assert_eq!(load.verify(), 1);
        load.page(150)[511] ^= 1;
        assert_eq!(load.verify(), 2);
    }

    #[test]
    fn the_kinds_are_there_in_their_amounts() {
        let mut load = load(Rewrite::Change, 8);
        let mut seen: BTreeMap<Vec<u64>, usize> = BTreeMap::new();
        for page in content(&mut load) {
            *seen.entry(page).or_default() += 1;
        }
        // 40 duplicate pages share eight contents, unless only few of the eight occur.
        let shared: usize = seen.values().filter(|count| **count > 1).sum();
        assert!((32..=40).contains(&shared), "{shared}");
        let words = |page: &Vec<u64>| page.iter().collect::<std::collections::BTreeSet<_>>().len();
        assert_eq!(seen.keys().filter(|page| words(page) <= VOCABULARY).count(), 120);
    }
}
