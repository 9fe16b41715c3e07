//! Blocks of a disk that each carry their number, a generation and noise made of both, while the guest's memory knows which generation is where.
//! Disks and memory of one VM agree, or this finds out.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::noise::{Noise, mix};
use crate::pages::PAGE_SIZE;

const WORDS: usize = PAGE_SIZE / 8;
/// Blocks that are written at once in the beginning.
const FILLED_AT_ONCE: usize = 16;

/// A part of a disk, from its beginning, under test.
pub struct DiskPool {
    file: File,
    seed: u64,
    /// Of each block; 0 is one that was never written.
    generations: Vec<u32>,
}

/// A block that is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The disk failed.
    #[error("block {block} cannot be {what}")]
    Io {
        /// Which.
        block: usize,
        /// Written or read.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It holds something else.
    #[error("block {block} should be of generation {expected}, and holds block {number} of generation {found}{}", if *.damaged { ", damaged" } else { "" })]
    Content {
        /// Which.
        block: usize,
        /// What memory knows.
        expected: u32,
        /// What is written in it.
        number: u64,
        /// What is written in it.
        found: u64,
        /// Its noise is not what belongs to those two.
        damaged: bool,
    },
}

impl DiskPool {
    /// So many bytes of a disk, which was opened for direct I/O or is a file.
    #[must_use]
    pub fn new(file: File, bytes: u64, seed: u64) -> Self {
        let blocks = usize::try_from(bytes / PAGE_SIZE as u64).unwrap_or(0);
        Self { file, seed, generations: vec![0; blocks] }
    }

    /// Number of blocks.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.generations.len()
    }

    /// Writes every block once.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn fill(&mut self) -> Result<(), DiskError> {
        for first in (0..self.blocks()).step_by(FILLED_AT_ONCE) {
            let count = FILLED_AT_ONCE.min(self.blocks() - first);
            self.write_run(first, count)?;
        }
        Ok(())
    }

    /// Writes a block anew.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn write(&mut self, block: usize) -> Result<(), DiskError> {
        self.write_run(block, 1)
    }

    fn write_run(&mut self, first: usize, count: usize) -> Result<(), DiskError> {
        let blocks = first..first + count;
        let mut bytes = Aligned::new(count * PAGE_SIZE);
        let known = self.generations.get(blocks.clone()).unwrap_or_default();
        let words = blocks.clone().zip(known).flat_map(|(block, generation)| content(self.seed, block, generation + 1));
        for (chunk, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *chunk = word.to_le_bytes();
        }
        let offset = first as u64 * PAGE_SIZE as u64;
        self.file.write_all_at(&bytes, offset).map_err(|source| DiskError::Io { block: first, what: "written", source })?;
        self.generations.get_mut(blocks).unwrap_or_default().iter_mut().for_each(|generation| *generation += 1);
        Ok(())
    }

    /// Reads a block and compares it with what memory knows.
    ///
    /// # Errors
    /// If it is another, or the disk fails.
    pub fn check(&mut self, block: usize) -> Result<(), DiskError> {
        let expected = self.generations.get(block).copied().unwrap_or_default();
        let mut bytes = Aligned::new(PAGE_SIZE);
        let read = self.file.read_exact_at(&mut bytes, block as u64 * PAGE_SIZE as u64);
        read.map_err(|source| DiskError::Io { block, what: "read", source })?;
        let (chunks, _) = bytes.as_chunks::<8>();
        let words: Vec<u64> = chunks.iter().map(|chunk| u64::from_le_bytes(*chunk)).collect();
        let wanted = if expected == 0 { vec![0; WORDS] } else { content(self.seed, block, expected) };
        if words == wanted {
            return Ok(());
        }
        let told = |place: usize| words.get(place).copied().unwrap_or_default();
        let (number, found) = (told(0), told(1));
        let honest = usize::try_from(number).ok().zip(u32::try_from(found).ok());
        let damaged = honest.is_none_or(|(number, found)| words != content(self.seed, number, found));
        Err(DiskError::Content { block, expected, number, found, damaged })
    }
}

/// What a block holds.
fn content(seed: u64, block: usize, generation: u32) -> Vec<u64> {
    let mut noise = Noise::new(mix(seed ^ block as u64) ^ u64::from(generation));
    let head = [block as u64, u64::from(generation)];
    head.into_iter().chain(std::iter::repeat_with(|| noise.next_word())).take(WORDS).collect()
}

/// Bytes at the beginning of a page, as direct I/O wants them.
struct Aligned {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Aligned {
    fn new(length: usize) -> Self {
        let memory = vec![0; length + PAGE_SIZE];
        let start = memory.as_ptr().addr().wrapping_neg() % PAGE_SIZE;
        Self { memory, start, length }
    }
}

impl std::ops::Deref for Aligned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.memory.get(self.start..self.start + self.length).unwrap_or_default()
    }
}

impl std::ops::DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.memory.get_mut(self.start..self.start + self.length).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str) -> File {
        let path = std::env::temp_dir().join(format!("godwit-guest-disk-{name}-{}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).expect("a file");
        std::fs::remove_file(path).expect("a name");
        file.set_len(40 * PAGE_SIZE as u64).expect("a size");
        file
    }

    #[test]
    fn blocks_are_what_was_written_to_them_last() {
        let mut pool = DiskPool::new(file("written"), 40 * PAGE_SIZE as u64 + 5, 7);
        assert_eq!(pool.blocks(), 40);
        assert!((0..40).all(|block| pool.check(block).is_ok()), "nothing was written");
        pool.fill().expect("filled");
        for block in [3, 3, 39] {
            pool.write(block).expect("written");
        }
        assert!((0..40).all(|block| pool.check(block).is_ok()));
    }

    #[test]
    fn what_was_lost_mixed_up_or_damaged_is_found() {
        let file = file("lost");
        let mut pool = DiskPool::new(file.try_clone().expect("a descriptor"), 40 * PAGE_SIZE as u64, 7);
        pool.fill().expect("filled");
        let mut before = vec![0; PAGE_SIZE];
        file.read_exact_at(&mut before, 5 * PAGE_SIZE as u64).expect("read");
        pool.write(5).expect("written");
        // A write that was lost, and one that went elsewhere.
        for block in [5_usize, 6] {
            file.write_all_at(&before, (block * PAGE_SIZE) as u64).expect("written");
            let found = pool.check(block).expect_err("another").to_string();
            assert!(found.ends_with("holds block 5 of generation 1"), "{found}");
        }
        file.write_all_at(&[1], 8 * PAGE_SIZE as u64 - 1).expect("written");
        assert!(pool.check(7).expect_err("damaged").to_string().ends_with(", damaged"));
        file.set_len(0).expect("cut off");
        assert!(matches!(pool.check(1), Err(DiskError::Io { block: 1, .. })));
    }
}
