//! Guest memory, and a guest that writes to it in ways that pages are encoded differently for.

use godwit_carrier::pages::{COMMON, GuestMemory, PAGE_SIZE, Page};

use super::plan::{GuestPlan, Plan};
use super::random::Random;

/// A page of a block, by its place in the stream's list of blocks.
pub(super) type At = (usize, u32);

/// The memory of a QEMU, in the order of the stream's list of blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Memory(Vec<Vec<Page>>);

const ZERO: Page = [0; PAGE_SIZE];

impl Memory {
    fn empty(plan: &Plan) -> Self {
        Self(plan.blocks.iter().map(|block| vec![ZERO; block.pages as usize]).collect())
    }

    /// Of the VM.
    pub(super) fn of_source(plan: &Plan, random: &mut Random) -> Self {
        let mut memory = Self::empty(plan);
        for at in memory.places() {
            if random.below(100) >= plan.zero {
                let content = content(&memory, at, random);
                memory.set(at, content);
            }
        }
        memory
    }

    /// Of a QEMU that waits: in places it holds what the VM holds there or elsewhere, an older version of it, or something else.
    pub(super) fn of_destination(plan: &Plan, source: &Self, random: &mut Random) -> Self {
        let mut memory = Self::empty(plan);
        for at in memory.places() {
            if random.below(100) < plan.held {
                let other = random.pick(&source.places());
                let content = match random.below(8) {
                    0..=2 => *source.page(at),
                    3 => *source.page(other),
                    4 => random.page(),
                    5..=6 => older(source.page(at), random),
                    _ => ZERO,
                };
                memory.set(at, content);
            }
        }
        memory
    }

    pub(super) fn page(&self, (block, page): At) -> &Page {
        &self.0[block][page as usize]
    }

    pub(super) fn set(&mut self, (block, page): At, content: Page) {
        self.0[block][page as usize] = content;
    }

    pub(super) fn places(&self) -> Vec<At> {
        self.0.iter().enumerate().flat_map(|(block, pages)| (0..pages.len() as u32).map(move |page| (block, page))).collect()
    }

    /// The first page in which two memories differ.
    pub(super) fn difference(&self, other: &Self) -> Option<At> {
        if self == other { None } else { self.places().into_iter().find(|at| self.page(*at) != other.page(*at)) }
    }
}

fn older(page: &Page, random: &mut Random) -> Page {
    let mut page = *page;
    for _ in 0..=random.index(4) {
        page[random.index(4096)] ^= 1;
    }
    page
}

fn content(memory: &Memory, at: At, random: &mut Random) -> Page {
    match random.below(8) {
        0..=2 => random.page(),
        3..=4 => [b'a' + random.below(5) as u8; PAGE_SIZE],
        5 => {
            let mut page = ZERO;
            page[random.index(PAGE_SIZE)] = 1 + random.below(200) as u8;
            page
        }
        6 => *memory.page(random.pick(&memory.places())),
        _ => *memory.page(at),
    }
}

/// What the guest does with its memory: the pages that it wrote to, though not all of them changed.
pub(super) fn write(memory: &mut Memory, plan: &GuestPlan, random: &mut Random) -> Vec<At> {
    let places = memory.places();
    let hot = &places[..places.len().min(plan.hot as usize)];
    let at = if random.one_in(4) { random.pick(&places) } else { random.pick(hot) };
    let other = random.pick(&places);
    let (mut page, mut written) = (*memory.page(at), vec![at]);
    match random.below(12) {
        0..=3 => {
            let start = random.index(PAGE_SIZE / 8) * 8;
            page[start..start + 8].copy_from_slice(&random.next().to_le_bytes());
        }
        4 => {}
        5 => page = random.page(),
        6 => page = [b'a' + random.below(5) as u8; PAGE_SIZE],
        7 => page = ZERO,
        8 => page = *memory.page(other),
        9 => {
            // The page moves: what a copy is made from is overwritten soon after.
            let moved = std::mem::replace(&mut page, *memory.page(other));
            memory.set(other, moved);
            written.push(other);
        }
        10 => page.rotate_left(1 + random.index(PAGE_SIZE - 1)),
        _ => {
            for _ in 0..random.between(1, 64) {
                page[random.index(PAGE_SIZE)] ^= 0x5a;
            }
        }
    }
    memory.set(at, page);
    written
}

/// What other VMs at the destination have: some of what this guest writes, too.
pub(super) fn common() -> Vec<Page> {
    [b'a', b'b'].map(|byte| [byte; PAGE_SIZE]).to_vec()
}

/// The blocks of a destination that its carry writes to, by their numbers there.
pub(super) struct Placed<'a> {
    pub(super) memory: &'a mut Memory,
    /// Place in the stream's list by number.
    pub(super) blocks: &'a [usize],
}

/// A page that is none.
#[derive(Debug)]
pub(super) struct NoSuchPage;

impl GuestMemory for Placed<'_> {
    type Error = NoSuchPage;

    fn read(&mut self, block: u16, page: u32, into: &mut Page) -> Result<(), NoSuchPage> {
        if block == COMMON {
            *into = *common().get(page as usize).ok_or(NoSuchPage)?;
            return Ok(());
        }
        let block = *self.blocks.get(usize::from(block)).ok_or(NoSuchPage)?;
        *into = *self.memory.0[block].get(page as usize).ok_or(NoSuchPage)?;
        Ok(())
    }

    fn write(&mut self, block: u16, page: u32, content: &[u8]) -> Result<(), NoSuchPage> {
        let block = *self.blocks.get(usize::from(block)).ok_or(NoSuchPage)?;
        let (pages, rest) = content.as_chunks::<PAGE_SIZE>();
        let first = page as usize;
        let targets = self.memory.0[block].get_mut(first..first + pages.len()).ok_or(NoSuchPage)?;
        targets.copy_from_slice(pages);
        if rest.is_empty() { Ok(()) } else { Err(NoSuchPage) }
    }
}
