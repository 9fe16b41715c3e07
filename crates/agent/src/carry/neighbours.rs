//! What other VMs of the team, which run on the host that a VM comes to, hold: where the team has them share memory, pages that are the same need not travel.
//!
//! What is told of them are copies, since they run on and write to theirs. The copies go when the VM may run.

use std::collections::BTreeSet;
use std::io;

use godwit_carrier::frame::MAX_COMMON;
use godwit_carrier::pages::digest::ZERO;
use godwit_carrier::pages::{Digest, Digester, PAGE_SIZE, Page, Place};

use super::memory::ProcessMemory;

/// Most pages that are looked at, and most entries of page maps: some tenths of a second, in which nothing travels.
const MOST_LOOKED_AT: usize = 2 * MAX_COMMON;
const MOST_ENTRIES: usize = 4 << 20;
/// So many are looked at in one go.
const AT_ONCE: usize = 1024;

/// The memory of such VMs, as far as it was not looked at.
#[derive(Default)]
pub(super) struct Neighbours {
    /// The next one is the last.
    memories: Vec<ProcessMemory>,
    at: Place,
    /// What each may be copied, and looked at, and what is left of that of this one.
    each: Budget,
    left: Budget,
    known: BTreeSet<Digest>,
}

#[derive(Clone, Copy, Default)]
struct Budget {
    copies: usize,
    pages: usize,
    entries: usize,
}

impl Budget {
    const fn is_spent(&self) -> bool {
        self.copies == 0 || self.pages == 0 || self.entries == 0
    }
}

impl Neighbours {
    /// Of VMs that run; the likeliest to have something in common comes first.
    pub(super) fn new(mut memories: Vec<ProcessMemory>) -> Self {
        memories.reverse();
        let share = |most: usize| most / memories.len().max(1);
        let each = Budget { copies: share(MAX_COMMON), pages: share(MOST_LOOKED_AT), entries: share(MOST_ENTRIES) };
        Self { memories, each, left: each, ..Self::default() }
    }

    /// Copies some of their pages to `copies`, each content once. Their digests; `None` when there are enough, or no more.
    pub(super) fn step(&mut self, digester: &Digester, copies: &mut Vec<Page>) -> Option<Vec<Digest>> {
        let memory = self.memories.last()?;
        let Some(block) = memory.blocks().get(usize::from(self.at.block)).filter(|_| !self.left.is_spent()) else {
            self.go_on();
            return Some(Vec::new());
        };
        if self.at.page >= block.pages {
            self.at = Place { block: self.at.block.saturating_add(1), page: 0 };
            return Some(Vec::new());
        }
        let mut digests = Vec::new();
        if let Err(error) = self.look(digester, copies, &mut digests) {
            // It may have ended, or moved away.
            tracing::info!(%error, "a neighbour's memory cannot be read");
            self.go_on();
        }
        Some(digests)
    }

    /// With the next neighbour.
    fn go_on(&mut self) {
        self.memories.pop();
        (self.at, self.left) = (Place::default(), self.each);
    }

    fn look(&mut self, digester: &Digester, copies: &mut Vec<Page>, digests: &mut Vec<Digest>) -> io::Result<()> {
        let memory = self.memories.last().ok_or(io::ErrorKind::NotFound)?;
        let (resident, mut then) = memory.resident(self.at.block, self.at.page)?;
        if let Some(next) = resident.get(AT_ONCE) {
            then = *next;
        }
        self.left.entries = self.left.entries.saturating_sub(then.saturating_sub(self.at.page) as usize);
        for page in resident.into_iter().take(AT_ONCE.min(self.left.pages)) {
            let mut content = [0; PAGE_SIZE];
            memory.get(self.at.block, page, &mut content)?;
            self.left.pages -= 1;
            let digest = digester.page(&content);
            if digest != ZERO && self.left.copies > 0 && self.known.insert(digest) {
                self.left.copies -= 1;
                copies.push(content);
                digests.push(digest);
            }
        }
        self.at.page = then;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::super::control::PlacedBlock;
    use super::*;

    const FULL: Budget = Budget { copies: MAX_COMMON, pages: MOST_LOOKED_AT, entries: MOST_ENTRIES };

    /// A neighbour in this very process, whose page `n` holds `content(n)`.
    fn neighbour(pages: u32, content: impl Fn(u32) -> u8) -> ProcessMemory {
        let bytes: &'static mut [u8] = Vec::leak(vec![0; (pages as usize + 1) * PAGE_SIZE]);
        let start = bytes.as_ptr().align_offset(PAGE_SIZE);
        for page in (0..pages).filter(|page| content(*page) != 0) {
            bytes[start + page as usize * PAGE_SIZE..][..PAGE_SIZE].fill(content(page));
            bytes[start + page as usize * PAGE_SIZE..][..4].copy_from_slice(&page.to_le_bytes());
        }
        let block = PlacedBlock { id: "pc.ram".into(), address: bytes[start..].as_ptr().addr() as u64, pages };
        let open = |name: &str| File::open(format!("/proc/self/{name}")).expect("own memory");
        ProcessMemory::new(open("mem").into(), open("pagemap").into(), vec![block])
    }

    fn all(mut neighbours: Neighbours) -> (Vec<Digest>, Vec<Page>) {
        let (digester, mut copies, mut told) = (Digester::new(&[7; 32]), Vec::new(), Vec::new());
        while let Some(digests) = neighbours.step(&digester, &mut copies) {
            assert!(digests.len() <= AT_ONCE);
            told.extend(digests);
        }
        assert!(told.iter().eq(copies.iter().map(|copy| digester.page(copy)).collect::<Vec<_>>().iter()));
        (told, copies)
    }

    #[test]
    fn each_content_is_copied_once_and_whoever_is_gone_is_left_out() {
        let gone = ProcessMemory::new(
            File::open("/dev/null").expect("a device").into(),
            File::open("/dev/null").expect("a device").into(),
            vec![PlacedBlock { id: "pc.ram".into(), address: 0, pages: 10 }],
        );
        let first = neighbour(3_000, |page| u8::from(page % 3 == 0));
        // Differs from the first in every sixth page.
        let second = neighbour(3_000, |page| if page % 3 == 0 { 1 + u8::from(page % 6 == 0) } else { 0 });
        let (told, copies) = all(Neighbours::new(vec![first, gone, second]));
        assert_eq!(told.len(), 1_000 + 500);
        assert!(copies[..1_000].iter().all(|copy| copy[4..] == [1; PAGE_SIZE - 4]));
        assert!(copies[1_000..].iter().all(|copy| copy[4..] == [2; PAGE_SIZE - 4]));
        assert!(all(Neighbours::default()).0.is_empty());
    }

    #[test]
    fn there_is_an_end_to_what_is_copied_and_looked_at() {
        let many = |byte: u8| neighbour(MAX_COMMON as u32 / 2 + 500, move |_| byte);
        assert_eq!(all(Neighbours::new(vec![many(1)])).0.len(), MAX_COMMON / 2 + 500);
        let (told, copies) = all(Neighbours::new(vec![many(1), many(2)]));
        assert_eq!((told.len(), copies[MAX_COMMON / 2 - 1][9], copies[MAX_COMMON / 2][9]), (MAX_COMMON, 1, 2), "each has its half");
        for (spent, copied) in [(Budget { pages: 700, ..FULL }, 700), (Budget { entries: 5_000, ..FULL }, 1_000), (FULL, 2_000)] {
            // Every fourth page was written to.
            let mut neighbours = Neighbours::new(vec![neighbour(8_000, |page| u8::from(page % 4 == 0))]);
            neighbours.left = spent;
            let is = all(neighbours).0.len();
            assert!((copied..copied + AT_ONCE).contains(&is), "{is} pages");
        }
    }
}
