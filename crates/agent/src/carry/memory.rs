//! The memory of a QEMU, reached through `/proc/PID/mem` and `/proc/PID/pagemap`, which the agent has opened.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use godwit_carrier::pages::{FIRST_IMAGE, GuestMemory, PAGE_SIZE, Page, PageSet, Place};
use rustix::io::{Errno, pread, pwrite};

use super::control::PlacedBlock;
use super::images::ReadableImage;

/// A page is there, in memory or swapped out.
const PRESENT: u64 = 0b11 << 62;
/// It has been swapped out.
const SWAPPED: u64 = 1 << 62;
/// Nobody else has it: what was only ever read is the kernel's page, or two MiB, of zeros, which everybody has.
pub(super) const EXCLUSIVE: u64 = 1 << 56;
/// It is in memory, and nobody else has it.
const RESIDENT: u64 = 1 << 63 | EXCLUSIVE;
/// Entries of a page map that are read at once.
pub(super) const ENTRIES: u32 = 8192;

/// Blocks of the memory of a process, and images beside them.
pub(crate) struct ProcessMemory {
    memory: OwnedFd,
    map: OwnedFd,
    blocks: Vec<PlacedBlock>,
    images: Vec<ReadableImage>,
}

impl ProcessMemory {
    pub(crate) fn new(memory: OwnedFd, map: OwnedFd, blocks: Vec<PlacedBlock>) -> Self {
        Self { memory, map, blocks, images: Vec::new() }
    }

    /// With images, which are read as blocks from [`FIRST_IMAGE`] on.
    pub(crate) fn with_images(self, images: Vec<ReadableImage>) -> Self {
        Self { images, ..self }
    }

    pub(super) fn images(&self) -> &[ReadableImage] {
        &self.images
    }

    pub(crate) fn blocks(&self) -> &[PlacedBlock] {
        &self.blocks
    }

    fn address(&self, block: u16, page: u32, pages: u64) -> io::Result<u64> {
        let block = self.blocks.get(usize::from(block)).ok_or(io::ErrorKind::InvalidInput)?;
        let end = u64::from(page).saturating_add(pages);
        if end > u64::from(block.pages) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(block.address + u64::from(page) * PAGE_SIZE as u64)
    }

    /// The pages from `first` on that were ever written to, of as many as are looked at in one go; and the page to go on with. QEMU reads all of its
    /// guest's memory when that moves, and samples of it when it measures what the guest writes: what has only been read holds nothing.
    pub(crate) fn touched(&self, block: u16, first: u32) -> io::Result<(Vec<u32>, u32)> {
        self.pages_with(|entry| entry & (SWAPPED | EXCLUSIVE) != 0, block, first)
    }

    /// The pages from `first` on that somebody has written to and that are in memory, and the page to go on with, as in [`Self::touched`].
    pub(super) fn resident(&self, block: u16, first: u32) -> io::Result<(Vec<u32>, u32)> {
        self.pages_with(|entry| entry & RESIDENT == RESIDENT, block, first)
    }

    fn pages_with(&self, wanted: impl Fn(u64) -> bool, block: u16, first: u32) -> io::Result<(Vec<u32>, u32)> {
        let pages = self.blocks.get(usize::from(block)).map_or(0, |block| block.pages);
        let count = pages.saturating_sub(first).min(ENTRIES);
        let numbered = (first..).zip(self.entries(block, first, count)?);
        let found = numbered.filter(|(_, entry)| wanted(*entry)).map(|(page, _)| page).collect();
        Ok((found, first.saturating_add(count)))
    }

    /// What the page map says of pages, which the block must have.
    pub(super) fn entries(&self, block: u16, first: u32, count: u32) -> io::Result<Vec<u64>> {
        let address = self.address(block, first, u64::from(count))?;
        let mut entries = vec![0; count as usize * 8];
        read_whole(&self.map, &mut entries, address / PAGE_SIZE as u64 * 8)?;
        let (entries, _) = entries.as_chunks::<8>();
        Ok(entries.iter().map(|entry| u64::from_ne_bytes(*entry)).collect())
    }
}

impl ProcessMemory {
    /// Pages that are in no memory: a QEMU that was told to forget them has not got them since.
    pub(super) fn absent(&self) -> io::Result<PageSet> {
        let lengths: Vec<u32> = self.blocks.iter().map(|block| block.pages).collect();
        let mut absent = PageSet::new(&lengths);
        for (block, pages) in (0..).zip(lengths) {
            let mut first = 0;
            while first < pages {
                let (present, then) = self.pages_with(|entry| entry & PRESENT != 0, block, first)?;
                let mut present = present.into_iter().peekable();
                for page in first..then.min(pages) {
                    if present.next_if_eq(&page).is_none() {
                        absent.insert(Place { block, page });
                    }
                }
                first = then;
            }
        }
        Ok(absent)
    }
}

impl ProcessMemory {
    /// Has the kernel map every page, also those that nobody has touched: whoever goes through all memory afterwards does not wait for that.
    pub(crate) fn map_all(&self) -> io::Result<()> {
        let (mut absent, mut at) = (self.absent()?, Place { block: 0, page: 0 });
        while let Some(place) = absent.next(at) {
            absent.remove(place);
            read_whole(&self.memory, &mut [0], self.address(place.block, place.page, 1)?)?;
            at = place;
        }
        Ok(())
    }
}

impl ProcessMemory {
    /// Whether this is a whole number of pages, of a block that has them.
    pub(super) fn check(&self, block: u16, page: u32, bytes: usize) -> io::Result<()> {
        if !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.address(block, page, (bytes / PAGE_SIZE) as u64).map(drop)
    }

    /// Reads a page, also of an image.
    pub(super) fn get(&self, block: u16, page: u32, into: &mut Page) -> io::Result<()> {
        if let Some(image) = block.checked_sub(FIRST_IMAGE) {
            return self.images.get(usize::from(image)).ok_or(io::ErrorKind::InvalidInput)?.read(page, into);
        }
        let address = self.address(block, page, 1)?;
        read_whole(&self.memory, into, address)
    }

    /// Writes consecutive pages.
    pub(super) fn put(&self, block: u16, page: u32, mut content: &[u8]) -> io::Result<()> {
        let mut address = self.address(block, page, content.len().div_ceil(PAGE_SIZE) as u64)?;
        while !content.is_empty() {
            match pwrite(&self.memory, content, address) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    content = content.get(count..).unwrap_or_default();
                    address += count as u64;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}

impl GuestMemory for ProcessMemory {
    type Error = io::Error;

    fn read(&mut self, block: u16, page: u32, into: &mut Page) -> io::Result<()> {
        self.get(block, page, into)
    }

    fn write(&mut self, block: u16, page: u32, content: &[u8]) -> io::Result<()> {
        self.put(block, page, content)
    }
}

fn read_whole(fd: impl AsFd, mut into: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !into.is_empty() {
        match pread(&fd, &mut *into, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                into = into.get_mut(count..).unwrap_or_default();
                offset += count as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    /// A block of this very process.
    fn own(pages: &[Page]) -> ProcessMemory {
        let open =
            |name: &str, write| File::options().read(true).write(write).open(format!("/proc/self/{name}")).expect("own memory");
        let block = PlacedBlock {
            id: "pc.ram".into(),
            address: u64::try_from(pages.as_ptr().addr()).expect("an address"),
            pages: u32::try_from(pages.len()).expect("few"),
        };
        ProcessMemory::new(open("mem", true).into(), open("pagemap", false).into(), vec![block])
    }

    #[test]
    fn pages_are_written_and_read_within_their_block_only() {
        let pages = vec![[0; PAGE_SIZE]; 8];
        let mut memory = own(&pages);
        memory.write(0, 2, &[7; 2 * PAGE_SIZE]).expect("written");
        let mut page = [0; PAGE_SIZE];
        for (number, byte) in [(1, 0), (2, 7), (3, 7), (4, 0)] {
            memory.read(0, number, &mut page).expect("read");
            assert_eq!(page, [byte; PAGE_SIZE], "page {number}");
        }
        assert!(memory.write(0, 7, &[1; 2 * PAGE_SIZE]).is_err() && memory.read(0, 8, &mut page).is_err());
        assert!(memory.write(1, 0, &page).is_err() && memory.read(0, u32::MAX, &mut page).is_err());
        assert_eq!(std::hint::black_box(&pages)[3], [7; PAGE_SIZE]);
    }

    #[test]
    fn what_was_never_touched_is_told_from_what_was() {
        // The C library maps what is as large as this anew, and nobody has touched it.
        let mut bytes = vec![0_u8; 20_000 * PAGE_SIZE];
        let start = bytes.as_ptr().align_offset(PAGE_SIZE);
        bytes[start + 12_000 * PAGE_SIZE] = 1;
        assert_eq!(std::hint::black_box(&bytes)[start + 3_000 * PAGE_SIZE], 0);
        let block = PlacedBlock { address: bytes[start..].as_ptr().addr() as u64, pages: 19_000, id: "pc.ram".into() };
        let memory = ProcessMemory { blocks: vec![block], ..own(&[]) };
        let (mut touched, mut next) = (Vec::new(), 0);
        while next < 19_000 {
            let (more, then) = memory.touched(0, next).expect("the page map");
            touched.extend(more);
            next = then;
        }
        let absent = memory.absent().expect("the page map");
        assert!(absent.len() + (touched.len() as u64) < 19_000, "what was read is there, and not touched");
        assert!(!absent.contains(Place { block: 0, page: 3_000 }) && !touched.contains(&3_000));
        assert!(touched.iter().all(|page| !absent.contains(Place { block: 0, page: *page })));
        assert!(touched.contains(&12_000), "{touched:?}");
        assert!(touched.len() < 9_000, "{} of 19,000 pages were touched", touched.len());
    }
}
