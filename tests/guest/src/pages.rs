//! Memory that knows what it should contain: every page carries where it is, how often it was written and a checksum.
//!
//! The expected generation of each page is kept beside the pages as well, so that a page that went back to an older
//! version (a lost update, which a checksum alone would not show) is found too.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::knobs::Mix;
use crate::noise::{Noise, mix};

/// Bytes of a page.
pub const PAGE_SIZE: usize = 4096;

const WORDS: usize = PAGE_SIZE / 8;
const MAGIC: u64 = 0x6764_7774_0000_0000; // "gdwt" and the kind
/// Words before the body: magic and kind, index, generation, checksum, pool.
const HEADER: usize = 5;
const INDEX: usize = 1;
const GENERATION: usize = 2;
const CHECKSUM: usize = 3;
const POOL: usize = 4;
/// Contents that duplicate pages share.
const PATTERNS: u64 = 8;
/// Few, so that the locks of a sweep dirty one page of the guest and not hundreds.
const STRIPES: usize = 64;
const TEXT: &[u8; 64] = b"the bar-tailed godwit flies 11,000 km and lands where it meant. ";

type Page = [u64; WORDS];

/// What a page contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageKind {
    /// Noise.
    Unique,
    /// Repeated text.
    Compressible,
    /// One of a few contents, without anything of the page itself.
    Duplicate,
    /// Zeros.
    Zero,
    /// Noise that changes by eight bytes at a time.
    Slow,
}

/// A page that is not what was written to it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("page {index} ({kind:?}, generation {generation}): {fault}")]
pub struct PageError {
    /// Which page.
    pub index: usize,
    /// What it should contain.
    pub kind: PageKind,
    /// The version that it should have.
    pub generation: u64,
    /// What is wrong.
    pub fault: PageFault,
}

/// How a page is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageFault {
    /// Not a page of this kind at all; `found` is its first word.
    Foreign {
        /// The first word.
        found: u64,
    },
    /// A good page from another place.
    Moved {
        /// The index that it carries.
        found: u64,
    },
    /// A good page of another version: a write was lost, or came twice.
    Version {
        /// The generation that it carries.
        found: u64,
    },
    /// A good page of another guest or another boot.
    Stranger,
    /// The content does not fit the checksum, the pattern or zero.
    Content,
}

impl fmt::Display for PageFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign { found } => write!(f, "starts with {found:#018x}"),
            Self::Moved { found } => write!(f, "is page {found}"),
            Self::Version { found } => write!(f, "has generation {found}"),
            Self::Stranger => write!(f, "belongs to another boot"),
            Self::Content => write!(f, "has wrong content"),
        }
    }
}

/// The memory under test. Writers and checkers may use it at the same time.
pub struct PagePool {
    stripes: Vec<Mutex<Stripe>>,
    pages_per_stripe: usize,
    pages: usize,
    mix: Mix,
    seed: u64,
}

struct Stripe {
    /// One page longer than needed, to start at a page of the machine: a page of ours must be one of the hypervisor's.
    words: Vec<u64>,
    start: usize,
    generations: Vec<u64>,
}

impl Stripe {
    /// Fresh memory of the kernel, not touched yet.
    fn new(pages: usize) -> Self {
        let words = vec![0; (pages + 1) * WORDS];
        let start = (words.as_ptr() as usize).wrapping_neg() % PAGE_SIZE / 8;
        Self { words, start, generations: vec![0; pages] }
    }

    fn page(&mut self, offset: usize) -> Option<(&mut Page, &mut u64)> {
        let start = self.start + offset * WORDS;
        let page = self.words.get_mut(start..)?.first_chunk_mut()?;
        Some((page, self.generations.get_mut(offset)?))
    }
}

impl PagePool {
    /// Allocates and writes `bytes` (rounded down to pages); `seed` is unlike that of any other guest.
    #[must_use]
    pub fn new(bytes: u64, mix: Mix, seed: u64) -> Self {
        let pages = usize::try_from(bytes / PAGE_SIZE as u64).unwrap_or(usize::MAX);
        let pages_per_stripe = pages.div_ceil(STRIPES).max(1);
        let sizes = (0..pages).step_by(pages_per_stripe).map(|first| pages_per_stripe.min(pages - first));
        let stripes = sizes.map(|count| Mutex::new(Stripe::new(count))).collect();
        let pool = Self { stripes, pages_per_stripe, pages, mix, seed };
        // Two halves at once: this is most of the time from boot to ready.
        let half = STRIPES / 2 * pages_per_stripe;
        std::thread::scope(|scope| {
            scope.spawn(|| (0..pages.min(half)).for_each(|index| pool.start(index)));
            (half..pages).for_each(|index| pool.start(index));
        });
        pool
    }

    /// Number of pages.
    #[must_use]
    pub const fn pages(&self) -> usize {
        self.pages
    }

    /// What the page at `index` contains.
    #[must_use]
    pub const fn kind(&self, index: usize) -> PageKind {
        self.mix.kind(index)
    }

    /// Writes `size` bytes of the page at `index` (a slow page: eight) and makes it its next generation.
    pub fn write(&self, index: usize, size: usize, noise: &mut Noise) {
        let Some((mut stripe, offset)) = self.stripe(index) else { return };
        let Some((content, generation)) = stripe.page(offset) else { return };
        *generation += 1;
        let kind = self.kind(index);
        let words = if kind == PageKind::Slow { 1 } else { size.div_ceil(8).clamp(1, WORDS - HEADER) };
        let first = HEADER + noise.below((WORDS - HEADER - words + 1) as u64) as usize;
        let body = content.get_mut(first..first + words).unwrap_or_default();
        match kind {
            PageKind::Zero => body.fill(0),
            PageKind::Duplicate => fill_pattern(content, *generation),
            PageKind::Compressible => fill_text(body, *generation),
            PageKind::Unique | PageKind::Slow => body.fill_with(|| noise.next_word()),
        }
        if !matches!(kind, PageKind::Zero | PageKind::Duplicate) {
            content[GENERATION] = *generation;
            content[CHECKSUM] = checksum(content);
        }
    }

    /// Whether the page at `index` is what was written to it.
    ///
    /// # Errors
    /// How it differs.
    pub fn check(&self, index: usize) -> Result<(), PageError> {
        let Some((mut stripe, offset)) = self.stripe(index) else { return Ok(()) };
        let Some((content, &mut generation)) = stripe.page(offset) else { return Ok(()) };
        let kind = self.kind(index);
        self.examine(index, kind, generation, content).map_err(|fault| PageError { index, kind, generation, fault })
    }

    fn examine(&self, index: usize, kind: PageKind, generation: u64, content: &Page) -> Result<(), PageFault> {
        if kind == PageKind::Zero {
            let any = content.iter().fold(0, |any, word| any | word);
            return if any == 0 { Ok(()) } else { Err(PageFault::Content) };
        }
        if content[0] != MAGIC | kind as u64 {
            return Err(PageFault::Foreign { found: content[0] });
        }
        if kind == PageKind::Duplicate {
            if content[GENERATION] != generation % PATTERNS {
                return Err(PageFault::Version { found: content[GENERATION] });
            }
            let mut noise = pattern(generation);
            let same = content.iter().skip(HEADER).all(|word| *word == noise.next_word());
            return if same { Ok(()) } else { Err(PageFault::Content) };
        }
        // First of all the checksum: only of a page that is whole does the header say anything.
        if content[CHECKSUM] != checksum(content) {
            return Err(PageFault::Content);
        }
        if content[POOL] != self.seed {
            return Err(PageFault::Stranger);
        }
        if content[INDEX] != index as u64 {
            return Err(PageFault::Moved { found: content[INDEX] });
        }
        if content[GENERATION] != generation {
            return Err(PageFault::Version { found: content[GENERATION] });
        }
        Ok(())
    }

    fn start(&self, index: usize) {
        let Some((mut stripe, offset)) = self.stripe(index) else { return };
        let Some((content, _)) = stripe.page(offset) else { return };
        let kind = self.kind(index);
        match kind {
            PageKind::Zero => return content.fill(0),
            PageKind::Duplicate => return fill_pattern(content, 0),
            PageKind::Compressible => fill_text(content, 0),
            PageKind::Unique | PageKind::Slow => {
                let mut noise = Noise::new(mix(self.seed) ^ index as u64);
                content.fill_with(|| noise.next_word());
            }
        }
        content[0] = MAGIC | kind as u64;
        content[INDEX] = index as u64;
        content[GENERATION] = 0;
        content[POOL] = self.seed;
        content[CHECKSUM] = checksum(content);
    }

    fn stripe(&self, index: usize) -> Option<(MutexGuard<'_, Stripe>, usize)> {
        let stripe = self.stripes.get(index / self.pages_per_stripe)?;
        // A thread that panicked in between left a page that its check will find.
        Some((stripe.lock().unwrap_or_else(PoisonError::into_inner), index % self.pages_per_stripe))
    }
}

/// Over the whole page but the checksum's own word. Four lanes, and no vector instructions: those are slow when emulated.
fn checksum(content: &Page) -> u64 {
    const FACTOR: u64 = 0x9fb2_1c65_1e98_df25;
    let mut lanes = [mix(content[0]), mix(content[INDEX].wrapping_add(1)), mix(content[GENERATION].wrapping_add(2)), FACTOR];
    for group in content.as_chunks::<4>().0.iter().skip(1) {
        for (lane, word) in lanes.iter_mut().zip(group) {
            *lane = (*lane ^ word).wrapping_mul(FACTOR).rotate_left(29);
        }
    }
    let [a, b, c, d] = lanes;
    mix(a ^ b.rotate_left(16) ^ c.rotate_left(32) ^ d.rotate_left(48))
}

fn fill_text(words: &mut [u64], version: u64) {
    let text = TEXT.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).cycle();
    for (word, text) in words.iter_mut().zip(text.skip((version % 8) as usize)) {
        *word = text;
    }
}

fn pattern(generation: u64) -> Noise {
    Noise::new(MAGIC ^ (generation % PATTERNS))
}

fn fill_pattern(content: &mut Page, generation: u64) {
    let mut noise = pattern(generation);
    content.fill(0);
    content[0] = MAGIC | PageKind::Duplicate as u64;
    content[GENERATION] = generation % PATTERNS;
    for word in content.iter_mut().skip(HEADER) {
        *word = noise.next_word();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> PagePool {
        PagePool::new(200 * PAGE_SIZE as u64, Mix::default(), 42)
    }

    fn damage(pool: &PagePool, index: usize, how: impl FnOnce(&mut Page)) {
        let (mut stripe, offset) = pool.stripe(index).unwrap();
        how(stripe.page(offset).unwrap().0);
    }

    fn content(pool: &PagePool, index: usize) -> Page {
        let (mut stripe, offset) = pool.stripe(index).unwrap();
        *stripe.page(offset).unwrap().0
    }

    fn first(pool: &PagePool, kind: PageKind) -> usize {
        (0..pool.pages()).find(|index| pool.kind(*index) == kind).unwrap()
    }

    const KINDS: [PageKind; 5] = [PageKind::Unique, PageKind::Compressible, PageKind::Duplicate, PageKind::Zero, PageKind::Slow];

    #[test]
    fn every_page_is_right_however_it_was_written() {
        let pool = pool();
        let mut noise = Noise::new(1);
        for round in 0..2000 {
            let index = noise.below(200) as usize;
            pool.write(index, 8 + round % 4089, &mut noise);
        }
        for index in 0..200 {
            assert_eq!(pool.check(index), Ok(()));
        }
    }

    #[test]
    fn the_mix_is_exact_in_every_hundred_pages() {
        let pool = pool();
        let count = |kind| (100..200).filter(|index| pool.kind(*index) == kind).count();
        assert_eq!(KINDS.map(count), [40, 30, 10, 10, 10]);
    }

    #[test]
    fn one_flipped_bit_anywhere_is_found() {
        let pool = pool();
        for kind in KINDS {
            let index = first(&pool, kind);
            for word in 0..WORDS {
                // Word 1, 3 and 4 of a duplicate page are not used, and zero for that reason only.
                if kind == PageKind::Duplicate && [INDEX, CHECKSUM, POOL].contains(&word) {
                    continue;
                }
                damage(&pool, index, |content| content[word] ^= 1 << (word % 64));
                let found = pool.check(index).expect_err("a damaged page");
                assert_eq!((found.index, found.kind), (index, kind));
                damage(&pool, index, |content| content[word] ^= 1 << (word % 64));
            }
            assert_eq!(pool.check(index), Ok(()));
        }
    }

    #[test]
    fn an_older_version_of_a_page_is_found() {
        let pool = pool();
        let mut noise = Noise::new(3);
        for kind in [PageKind::Unique, PageKind::Compressible, PageKind::Duplicate, PageKind::Slow] {
            let index = first(&pool, kind);
            let before = content(&pool, index);
            pool.write(index, 512, &mut noise);
            assert_eq!(pool.check(index), Ok(()));
            damage(&pool, index, |content| *content = before);
            assert_eq!(pool.check(index).unwrap_err().fault, PageFault::Version { found: 0 });
        }
    }

    #[test]
    fn a_page_of_another_place_or_another_guest_is_found() {
        let (pool, stranger) = (pool(), PagePool::new(200 * PAGE_SIZE as u64, Mix::default(), 43));
        let index = first(&pool, PageKind::Unique);
        let other = (index + 1..200).find(|index| pool.kind(*index) == PageKind::Unique).unwrap();
        let moved = content(&pool, other);
        damage(&pool, index, |content| *content = moved);
        assert_eq!(pool.check(index).unwrap_err().fault, PageFault::Moved { found: other as u64 });
        let strange = content(&stranger, index);
        damage(&pool, index, |content| *content = strange);
        assert_eq!(pool.check(index).unwrap_err().fault, PageFault::Stranger);
        damage(&pool, index, |content| content.fill(0));
        assert_eq!(pool.check(index).unwrap_err().fault, PageFault::Foreign { found: 0 });
    }

    #[test]
    fn kinds_are_what_they_promise() {
        let pool = pool();
        let mut noise = Noise::new(5);
        let duplicates: Vec<usize> = (0..200).filter(|index| pool.kind(*index) == PageKind::Duplicate).collect();
        assert!(duplicates.iter().all(|index| content(&pool, *index) == content(&pool, duplicates[0])));
        let slow = first(&pool, PageKind::Slow);
        let before = content(&pool, slow);
        pool.write(slow, PAGE_SIZE, &mut noise);
        let changed = before.iter().zip(content(&pool, slow)).filter(|(a, b)| **a != *b).count();
        assert_eq!(changed, 3); // generation, checksum and eight bytes
    }

    #[test]
    fn writers_and_checkers_do_not_disturb_each_other() {
        let pool = pool();
        std::thread::scope(|scope| {
            let checker = scope.spawn(|| (0..40).flat_map(|_| 0..200).filter(|i| pool.check(*i).is_err()).count());
            let mut noise = Noise::new(9);
            for _ in 0..10_000 {
                let index = noise.below(200) as usize;
                pool.write(index, 256, &mut noise);
            }
            assert_eq!(checker.join().unwrap(), 0);
        });
    }

    #[test]
    fn sizes_that_do_not_divide() {
        for pages in [0, 1, 63, 65, 129] {
            let pool = PagePool::new(pages * PAGE_SIZE as u64 + 100, Mix::default(), 1);
            assert_eq!(pool.pages() as u64, pages);
            assert!((0..pool.pages() + 2).all(|index| pool.check(index).is_ok()));
        }
    }
}
