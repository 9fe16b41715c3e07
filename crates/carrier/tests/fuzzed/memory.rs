//! A small guest memory that nobody writes beyond.

use std::convert::Infallible;

use godwit_carrier::pages::{COMMON, FIRST_IMAGE, GuestMemory, Images, PAGE_SIZE, Page, Place};

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    blocks: Vec<Vec<Page>>,
    /// Pages that were written.
    pub(crate) written: usize,
}

impl Memory {
    pub(crate) fn new(blocks: &[u32]) -> Self {
        Self { blocks: blocks.iter().map(|pages| vec![[0; PAGE_SIZE]; *pages as usize]).collect(), written: 0 }
    }

    pub(crate) fn get(&self, block: u16, page: u32) -> Option<&Page> {
        self.blocks.get(usize::from(block))?.get(page as usize)
    }

    pub(crate) fn set(&mut self, block: u16, page: u32, content: Page) {
        self.blocks[usize::from(block)][page as usize] = content;
    }

    pub(crate) fn places(&self) -> Vec<(u16, u32)> {
        let blocks = (0_u16..).zip(&self.blocks);
        blocks.flat_map(|(block, pages)| (0..).zip(pages).map(move |(page, _)| (block, page))).collect()
    }

    pub(crate) fn same_as(&self, other: &Self) -> bool {
        self.blocks == other.blocks
    }
}

/// How many pages the one image has.
pub(crate) const IMAGE: u32 = 3;

/// How many pages of other VMs there are.
pub(crate) const SHARED: u32 = 2;

/// What the image, and the other VMs, hold.
pub(crate) fn beside(block: u16, page: u32) -> Option<Page> {
    match block {
        FIRST_IMAGE if page < IMAGE => Some(noise(u64::from(page))),
        COMMON if page < SHARED => Some(noise(5 + u64::from(page))),
        _ => None,
    }
}

/// Knows the image.
pub(crate) struct Known;

impl Images for Known {
    fn find(&mut self, content: &Page) -> Option<Place> {
        let page = (0..IMAGE).find(|page| beside(FIRST_IMAGE, *page).as_ref() == Some(content))?;
        Some(Place { block: FIRST_IMAGE, page })
    }
}

impl GuestMemory for Memory {
    type Error = Infallible;

    fn read(&mut self, block: u16, page: u32, into: &mut Page) -> Result<(), Infallible> {
        let content = self.get(block, page).copied().or_else(|| beside(block, page));
        *into = content.expect("only pages that are there are read");
        Ok(())
    }

    fn write(&mut self, block: u16, page: u32, content: &[u8]) -> Result<(), Infallible> {
        let (pages, rest) = content.as_chunks::<PAGE_SIZE>();
        assert!(rest.is_empty() && !pages.is_empty(), "{} bytes are written", content.len());
        let targets = self.blocks.get_mut(usize::from(block)).and_then(|block| block.get_mut(page as usize..));
        let targets = targets.and_then(|targets| targets.get_mut(..pages.len())).expect("nothing is written beyond a block");
        targets.copy_from_slice(pages);
        self.written += pages.len();
        Ok(())
    }
}

pub(crate) fn filled(byte: u8) -> Page {
    [byte; PAGE_SIZE]
}

pub(crate) fn noise(seed: u64) -> Page {
    let mut state = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut page = [0; PAGE_SIZE];
    for word in page.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state.to_le_bytes();
    }
    page
}
