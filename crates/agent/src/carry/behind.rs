//! Writes to the memory of a QEMU that waits, by several threads: the first touch of a page, for which the kernel zeroes two MiB, takes longer than everything else
//! that is done for it.
//!
//! Nobody but this writes there. What was written is read as if it were there already, and whatever relies on memory beside this waits
//! [for all](WriteBehind::settle).

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, mpsc};

use godwit_carrier::pages::{COMMON, GuestMemory, PAGE_SIZE, Page, PageSet, Place};

use super::memory::ProcessMemory;
use super::threads::Threads;

/// So much is gathered before a thread is given it.
const GATHERED: usize = 256 << 10;
/// Most such pieces that are not written yet, for each thread.
const UNDER_WAY: usize = 2;

/// Memory, and what is on its way there.
pub(super) struct WriteBehind {
    memory: Arc<ProcessMemory>,
    /// Pages of other VMs, which are read as those of [`COMMON`].
    common: Vec<Page>,
    threads: Threads,
    gathered: Writes,
    under_way: VecDeque<mpsc::Receiver<(Writes, io::Result<()>)>>,
    /// Pages of all of that.
    busy: PageSet,
    /// Room of earlier pieces.
    spare: Vec<Writes>,
    /// Something was not written, and whoever relies on it is told so, however often it is asked.
    failed: Option<(io::ErrorKind, String)>,
}

/// Pages that follow each other, several times, and their contents one after the other.
#[derive(Default)]
struct Writes {
    runs: Vec<(Place, u32)>,
    contents: Vec<u8>,
}

impl WriteBehind {
    pub(super) fn new(memory: ProcessMemory, threads: Threads) -> Self {
        let lengths: Vec<u32> = memory.blocks().iter().map(|block| block.pages).collect();
        let busy = PageSet::new(&lengths);
        let (gathered, under_way, spare) = (Writes::default(), VecDeque::new(), Vec::new());
        Self { memory: Arc::new(memory), common: Vec::new(), threads, gathered, under_way, busy, spare, failed: None }
    }

    /// Copies of pages of other VMs.
    pub(super) const fn common(&mut self) -> &mut Vec<Page> {
        &mut self.common
    }

    /// More pages than can be on their way at a time.
    pub(super) fn most_pages(&self) -> u32 {
        let pieces = (self.threads.count() * UNDER_WAY + 1) as u32;
        // A piece is handed over when it has reached its size: the last run of it may be as long again.
        pieces * 2 * (GATHERED / PAGE_SIZE) as u32
    }

    /// The memory itself: what was written and not waited for may be missing there.
    pub(super) fn memory(&self) -> &ProcessMemory {
        &self.memory
    }

    /// Everything that was written is there when this returns.
    ///
    /// # Errors
    /// Something could not be written.
    pub(super) fn settle(&mut self) -> io::Result<()> {
        self.hand_over()?;
        while !self.under_way.is_empty() {
            self.settle_first();
        }
        self.result()
    }

    fn result(&self) -> io::Result<()> {
        self.failed.as_ref().map_or(Ok(()), |(kind, text)| Err(io::Error::new(*kind, text.clone())))
    }

    /// Has a thread write what was gathered.
    pub(super) fn hand_over(&mut self) -> io::Result<()> {
        if self.gathered.runs.is_empty() {
            return self.result();
        }
        while self.under_way.len() >= self.threads.count() * UNDER_WAY {
            self.settle_first();
        }
        let room = self.spare.pop().unwrap_or_default();
        let writes = std::mem::replace(&mut self.gathered, room);
        let (done, written) = mpsc::channel();
        let memory = Arc::clone(&self.memory);
        self.threads.run(move || {
            let result = writes.write_to(&memory);
            // Whoever waited may be gone.
            let _ = done.send((writes, result));
        });
        self.under_way.push_back(written);
        self.result()
    }

    /// Waits for the piece that was handed over first.
    fn settle_first(&mut self) {
        let Some(written) = self.under_way.pop_front() else { return };
        let (mut writes, result) =
            written.recv().unwrap_or_else(|_| (Writes::default(), Err(io::Error::other("a thread that writes has ended"))));
        if let Err(error) = result {
            self.failed.get_or_insert_with(|| (error.kind(), error.to_string()));
        }
        for place in writes.places() {
            self.busy.remove(place);
        }
        writes.runs.clear();
        writes.contents.clear();
        self.spare.push(writes);
    }

    /// Waits until none of these pages is on its way.
    pub(super) fn wait_for(&mut self, first: Place, pages: u32) -> io::Result<()> {
        let is_busy = |busy: &PageSet| !busy.is_empty() && run(first, pages).any(|place| busy.contains(place));
        if is_busy(&self.busy) {
            self.hand_over()?;
        }
        while !self.under_way.is_empty() && is_busy(&self.busy) {
            self.settle_first();
        }
        self.result()
    }
}

impl Drop for WriteBehind {
    /// The VM stands still when its memory is given up, and does not wait until the kernel has taken so many pages back.
    fn drop(&mut self) {
        let common = std::mem::take(&mut self.common);
        if !common.is_empty() {
            self.threads.let_go(common);
        }
    }
}

fn run(first: Place, pages: u32) -> impl Iterator<Item = Place> {
    (first.page..first.page.saturating_add(pages)).map(move |page| Place { page, ..first })
}

impl Writes {
    fn places(&self) -> impl Iterator<Item = Place> + use<> {
        self.runs.clone().into_iter().flat_map(|(first, pages)| run(first, pages))
    }

    fn write_to(&self, memory: &ProcessMemory) -> io::Result<()> {
        let mut rest = &self.contents[..];
        for (Place { block, page }, pages) in &self.runs {
            let (contents, behind) = rest.split_at_checked(*pages as usize * PAGE_SIZE).unwrap_or((rest, &[]));
            memory.put(*block, *page, contents)?;
            rest = behind;
        }
        Ok(())
    }
}

impl GuestMemory for WriteBehind {
    type Error = io::Error;

    fn read(&mut self, block: u16, page: u32, into: &mut Page) -> io::Result<()> {
        if block == COMMON {
            *into = *self.common.get(page as usize).ok_or(io::ErrorKind::InvalidInput)?;
            return Ok(());
        }
        self.wait_for(Place { block, page }, 1)?;
        self.memory.get(block, page, into)
    }

    /// Refused at once beyond a block; all other errors come later.
    fn write(&mut self, block: u16, page: u32, content: &[u8]) -> io::Result<()> {
        let first = Place { block, page };
        let pages = u32::try_from(content.len() / PAGE_SIZE).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.memory.check(block, page, content.len())?;
        self.wait_for(first, pages)?;
        for place in run(first, pages) {
            self.busy.insert(place);
        }
        self.gathered.runs.push((first, pages));
        self.gathered.contents.extend_from_slice(content);
        if self.gathered.contents.len() >= GATHERED { self.hand_over() } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::super::control::PlacedBlock;
    use super::*;
    use crate::carry::tests::threads;

    const PAGES: [u32; 2] = [2_000, 64];

    /// Blocks of this very process that nobody else uses.
    fn memory() -> ProcessMemory {
        let block = |pages: u32| {
            let bytes: &'static [u8] = Vec::leak(vec![0; (pages as usize + 1) * PAGE_SIZE]);
            let address = bytes.as_ptr().addr() + bytes.as_ptr().align_offset(PAGE_SIZE);
            PlacedBlock { id: format!("block of {pages}"), address: address as u64, pages }
        };
        let open =
            |name: &str| File::options().read(true).write(name == "mem").open(format!("/proc/self/{name}")).expect("own memory");
        ProcessMemory::new(open("mem").into(), open("pagemap").into(), PAGES.map(block).to_vec())
    }

    fn content(version: u64) -> Page {
        let mut page = [0; PAGE_SIZE];
        page.as_chunks_mut::<8>().0.fill(version.to_ne_bytes());
        page
    }

    #[test]
    fn what_was_written_is_read_wherever_it_is() {
        let mut behind = WriteBehind::new(memory(), threads());
        let mut expected = PAGES.map(|pages| vec![0_u64; pages as usize]);
        let (mut random, mut on_its_way) = (random_of(7), 0);
        for version in 1..20_000_u64 {
            let block = usize::from(random(4) == 0);
            let page = random(PAGES[block]);
            if random(3) == 0 {
                let place = Place { block: block as u16, page };
                on_its_way += u32::from(behind.busy.contains(place));
                let mut is = [0; PAGE_SIZE];
                behind.read(place.block, page, &mut is).expect("read");
                assert_eq!(is, content(expected[block][page as usize]), "{place:?} at {version}");
                continue;
            }
            let pages = (1 + random(8)).min(PAGES[block] - page);
            let run = &mut expected[block][page as usize..(page + pages) as usize];
            run.iter_mut().zip(version * 100..).for_each(|(page, version)| *page = version);
            let contents: Vec<u8> = run.iter().flat_map(|version| content(*version)).collect();
            behind.write(block as u16, page, &contents).expect("written");
            match random(50) {
                0 => behind.settle().expect("written"),
                1 => behind.hand_over().expect("handed over"),
                _ => {}
            }
        }
        assert!(on_its_way > 100, "only {on_its_way} pages were read that were not there yet");
        behind.settle().expect("written");
        assert!(behind.busy.is_empty());
        for (block, pages) in (0..).zip(expected) {
            for (page, version) in (0..).zip(pages) {
                let mut is = [0; PAGE_SIZE];
                behind.memory().get(block, page, &mut is).expect("read");
                assert_eq!(is, content(version), "page {page} of block {block}");
            }
        }
    }

    /// A sequence that a seed decides.
    fn random_of(seed: u64) -> impl FnMut(u32) -> u32 {
        let mut hasher = blake3::Hasher::new().update(&seed.to_be_bytes()).finalize_xof();
        move |below| {
            let mut bytes = [0; 4];
            hasher.fill(&mut bytes);
            u32::from_ne_bytes(bytes) % below
        }
    }

    #[test]
    fn what_is_no_page_is_refused_at_once_and_what_cannot_be_written_later() {
        let mut behind = WriteBehind::new(memory(), threads());
        for (block, page, bytes) in [(0, 1_999, 2 * PAGE_SIZE), (2, 0, PAGE_SIZE), (0, u32::MAX, PAGE_SIZE), (0, 0, 100)] {
            assert!(behind.write(block, page, &vec![1; bytes]).is_err(), "{block} {page} {bytes}");
        }
        assert!(behind.settle().is_ok() && behind.busy.is_empty());
        let gone = PlacedBlock { id: "none".into(), address: 4096, pages: 8 };
        let open = |name: &str| File::options().read(true).write(name == "mem").open(format!("/proc/self/{name}")).expect("own");
        let memory = ProcessMemory::new(open("mem").into(), open("pagemap").into(), vec![gone]);
        let mut behind = WriteBehind::new(memory, threads());
        behind.write(0, 3, &content(1)).expect("taken");
        assert!(behind.settle().is_err(), "nothing is mapped there");
        let told_again = [behind.settle(), behind.hand_over(), behind.write(0, 5, &content(1)), behind.read(0, 6, &mut content(1))];
        assert!(told_again.iter().all(Result::is_err), "{told_again:?}");
    }
}
