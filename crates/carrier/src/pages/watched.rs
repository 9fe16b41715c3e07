//! Which pages are compared once more, and when that is worth something.
//!
//! QEMU watches an emulated guest's memory by a bit for each page and by marks of the vCPUs' translation buffers. It can lose a mark at the moment at which it takes a
//! page's bit: until marks are put back, stores to that page go by unseen. The page was named then, for its bit was set, and all marks of a block are put back whenever QEMU takes a bit of
//! that block the next time. So a page that was named must be compared once after that, and one that was compared before it must be again:
//!
//! ```text
//! named ─▶ fresh ── marks were put back, surely ─▶ before ── once more ─▶ due ── compared ─▶
//!            ▲                                        │                     │
//!            └────────────────── named ───────────────┴─────────────────────┘
//! ```
//! That marks were put back since the last time shows in the order of pages: QEMU goes through those that it has to send in ascending order, from where it was and around at
//! the end. One that comes again was named anew, and so was one at which the order goes back for the second time.

/// Pages, as bits.
#[derive(Debug, Default)]
struct Bits {
    words: Vec<u64>,
    count: usize,
}

impl Bits {
    fn new(pages: usize) -> Self {
        Self { words: vec![0; pages.div_ceil(64)], count: 0 }
    }

    fn has(&self, number: u32) -> bool {
        self.words.get(number as usize / 64).is_some_and(|word| word & bit(number) != 0)
    }

    /// Whether it is new.
    fn insert(&mut self, number: u32) -> bool {
        let is_new = !self.has(number);
        if let Some(word) = self.words.get_mut(number as usize / 64) {
            *word |= bit(number);
            self.count += usize::from(is_new);
        }
        is_new
    }

    fn remove(&mut self, number: u32) -> bool {
        let was = self.has(number);
        if let Some(word) = self.words.get_mut(number as usize / 64) {
            *word &= !bit(number);
            self.count -= usize::from(was);
        }
        was
    }
}

const fn bit(number: u32) -> u64 {
    1 << (number % 64)
}

/// What QEMU named of one block.
#[derive(Debug, Default)]
struct Round {
    /// The page that came last, and how often the order went back since the last shift.
    last: Option<u32>,
    backs: u8,
    /// Named since the last shift, and between that and the one before.
    fresh: Vec<u32>,
    before: Vec<u32>,
}

/// The pages that came more than once.
#[derive(Debug, Default)]
pub(super) struct Watched {
    rounds: Vec<Round>,
    fresh: Bits,
    before: Bits,
    due: Bits,
    /// Where in `due` to go on.
    taken: usize,
    stopped: bool,
}

impl Watched {
    pub(super) fn new(blocks: usize, pages: usize) -> Self {
        let rounds = (0..blocks).map(|_| Round::default()).collect();
        Self { rounds, fresh: Bits::new(pages), before: Bits::new(pages), due: Bits::new(pages), taken: 0, stopped: false }
    }

    /// QEMU has named this page of a block, perhaps for the first time.
    pub(super) fn on_named(&mut self, block: u16, number: u32, again: bool) {
        let Some(round) = self.rounds.get_mut(usize::from(block)) else { return };
        if self.stopped {
            // What is sent now stays as it is.
            self.forget(number);
            return;
        }
        round.backs += u8::from(round.last.is_some_and(|last| number <= last));
        round.last = Some(number);
        if round.backs >= 2 || self.fresh.has(number) {
            self.shift(block);
        }
        if again
            && self.fresh.insert(number)
            && let Some(round) = self.rounds.get_mut(usize::from(block))
        {
            round.fresh.push(number);
        }
    }

    /// Marks were put back since the last shift: what was named before that shift may be compared.
    fn shift(&mut self, block: u16) {
        let Some(round) = self.rounds.get_mut(usize::from(block)) else { return };
        round.backs = 0;
        for number in round.before.drain(..) {
            if self.before.remove(number) {
                self.due.insert(number);
            }
        }
        std::mem::swap(&mut round.before, &mut round.fresh);
        for number in &round.before {
            if self.fresh.remove(*number) {
                self.before.insert(*number);
            }
        }
    }

    /// The guest stands still: whatever is compared now stays as it is.
    pub(super) fn on_stopped(&mut self) {
        for block in 0..self.rounds.len() as u16 {
            self.shift(block);
            self.shift(block);
        }
        self.stopped = true;
    }

    /// Whatever is in it, nobody compares it.
    pub(super) fn forget(&mut self, number: u32) {
        for bits in [&mut self.fresh, &mut self.before, &mut self.due] {
            bits.remove(number);
        }
    }

    /// How many would have to be compared if the guest stood still now; one may be counted more than once.
    pub(super) const fn len(&self) -> usize {
        self.fresh.count + self.before.count + self.due.count
    }

    /// Takes one that is due, in turn.
    pub(super) fn take(&mut self) -> Option<u32> {
        if self.due.count == 0 {
            return None;
        }
        let words = self.due.words.len();
        for _ in 0..=words {
            if let Some(bits) = self.due.words.get_mut(self.taken).filter(|bits| **bits != 0) {
                let number = u32::try_from(self.taken * 64).ok()? + bits.trailing_zeros();
                *bits &= *bits - 1;
                self.due.count -= 1;
                return Some(number);
            }
            self.taken = if self.taken + 1 < words { self.taken + 1 } else { 0 };
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGES: u32 = 9;

    /// QEMU and its guest, with the race as it is: a vCPU that stores to a marked page sets the bit, and takes the mark away if the bit is set; if QEMU takes the bits in between,
    /// the mark is gone with its bit taken.
    struct Qemu {
        memory: [u32; PAGES as usize],
        marked: [bool; PAGES as usize],
        bits: [bool; PAGES as usize],
        /// To be sent, and where to go on.
        named: [bool; PAGES as usize],
        at: u32,
        there: [u32; PAGES as usize],
        sent: [bool; PAGES as usize],
        watched: Watched,
    }

    impl Qemu {
        fn new() -> Self {
            Self {
                memory: [0; PAGES as usize],
                marked: [true; PAGES as usize],
                bits: [false; PAGES as usize],
                named: [true; PAGES as usize],
                at: 0,
                there: [u32::MAX; PAGES as usize],
                sent: [false; PAGES as usize],
                watched: Watched::new(1, PAGES as usize),
            }
        }

        fn store(&mut self, page: usize, races: bool) {
            self.memory[page] += 1;
            if self.marked[page] {
                self.bits[page] = true;
                if races {
                    self.take_bits();
                }
                self.marked[page] = false;
            }
        }

        fn take_bits(&mut self) {
            if self.bits.contains(&true) {
                for page in 0..PAGES as usize {
                    self.named[page] |= self.bits[page];
                }
                self.bits = [false; PAGES as usize];
                self.marked = [true; PAGES as usize];
            }
        }

        fn send(&mut self) -> bool {
            let next = (self.at..PAGES).chain(0..self.at).find(|page| self.named[*page as usize]);
            let Some(page) = next else { return false };
            let at = page as usize;
            self.named[at] = false;
            self.there[at] = self.memory[at];
            self.watched.on_named(0, page, std::mem::replace(&mut self.sent[at], true));
            self.at = (page + 1) % PAGES;
            true
        }

        fn compare(&mut self) -> bool {
            let Some(page) = self.watched.take() else { return false };
            self.there[page as usize] = self.memory[page as usize];
            true
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Store(usize, bool),
        TakeBits,
        Send,
        Compare,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..PAGES as usize, any::<bool>()).prop_map(|(page, races)| Step::Store(page, races)),
            2 => Just(Step::TakeBits),
            6 => Just(Step::Send),
            4 => Just(Step::Compare),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4_000))]
        #[test]
        fn a_store_that_went_by_unseen_is_found(steps in prop::collection::vec(step(), 0..160)) {
            let mut qemu = Qemu::new();
            while qemu.send() {}
            for step in steps {
                match step {
                    Step::Store(page, races) => qemu.store(page, races),
                    // As QEMU does, when little is left.
                    Step::TakeBits => qemu.take_bits(),
                    Step::Send => drop(qemu.send()),
                    Step::Compare => drop(qemu.compare()),
                }
            }
            qemu.take_bits();
            qemu.watched.on_stopped();
            while qemu.send() {}
            while qemu.compare() {}
            prop_assert_eq!(qemu.there, qemu.memory);
        }
    }

    #[test]
    fn what_is_named_again_and_again_is_due_in_time() {
        let mut watched = Watched::new(1, 100);
        for round in 0..3 {
            for page in [3, 40, 90] {
                watched.on_named(0, page, round > 0);
            }
        }
        assert_eq!((watched.take(), watched.len()), (None, 6), "three that are fresh, and three of the round before");
        watched.on_named(0, 3, true);
        assert_eq!([watched.take(), watched.take(), watched.take(), watched.take()], [Some(3), Some(40), Some(90), None]);
        watched.forget(40);
        watched.on_stopped();
        assert_eq!([watched.take(), watched.take(), watched.take()], [Some(90), Some(3), None]);
        watched.on_named(0, 3, true);
        assert_eq!((watched.take(), watched.len()), (None, 0), "sent while the guest stands still");
    }
}
