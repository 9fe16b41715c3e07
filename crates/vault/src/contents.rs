//! A snapshot with its packs: any page, read when it is asked for.

use std::collections::VecDeque;
use std::fs::File;
use std::io;

use crate::pack::{PackReader, Page, Unsealed};
use crate::snapshot::{Leaf, PackId, SnapshotReader};
use crate::stored::{FileError, Malformed};
use crate::{PackKey, Space};

/// How many leaves and chunks are kept that were read last. Who reads in order reads each once.
const RECENT_LEAVES: usize = 16;
const RECENT_CHUNKS: usize = 64;

/// Why a page cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ContentsError {
    /// The snapshot's own file is damaged.
    #[error("the snapshot cannot be read")]
    Snapshot(#[source] FileError),
    /// A pack is.
    #[error("pack {pack} cannot be read")]
    Pack {
        /// Which pack.
        pack: PackId,
        /// What is wrong with it.
        #[source]
        source: FileError,
    },
}

/// A snapshot and its packs.
pub struct Contents {
    snapshot: SnapshotReader<File>,
    packs: Vec<PackReader<File>>,
    room: Unsealed,
    leaves: Recent<(u16, u32), Leaf>,
    chunks: Recent<(u16, u32), Vec<Page>>,
}

impl std::fmt::Debug for Contents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Contents").field("snapshot", &self.snapshot).finish_non_exhaustive()
    }
}

impl Contents {
    /// `packs` are those of the snapshot's list, in its order.
    pub(crate) fn new(snapshot: SnapshotReader<File>, packs: Vec<PackReader<File>>) -> io::Result<Self> {
        let (leaves, chunks) = (Recent::new(RECENT_LEAVES), Recent::new(RECENT_CHUNKS));
        Ok(Self { snapshot, packs, room: Unsealed::new()?, leaves, chunks })
    }

    /// What the snapshot says beside its pages.
    #[must_use]
    pub const fn snapshot(&self) -> &SnapshotReader<File> {
        &self.snapshot
    }

    /// What it has pages of.
    #[must_use]
    pub fn spaces(&self) -> &[Space] {
        self.snapshot.spaces()
    }

    /// A page of a space; `None` if it holds zeros, or is beyond the end.
    ///
    /// # Errors
    /// [`ContentsError`]
    pub fn page(&mut self, space: u16, page: u32) -> Result<Option<&Page>, ContentsError> {
        let leaf = self.leaves.get((space, page / Leaf::PAGES), || self.snapshot.leaf(space, page));
        let Some(at) = leaf.map_err(ContentsError::Snapshot)?.get(page % Leaf::PAGES) else { return Ok(None) };
        let (chunk, within) = PackReader::<File>::chunk_of(at.page);
        // The leaf was checked against the list, and the list against the packs: neither of the two can be missing.
        let nowhere = || ContentsError::Snapshot(Malformed::Place.into());
        let pack = self.packs.get(usize::from(at.pack)).ok_or_else(nowhere)?;
        let (id, ..) = self.snapshot.packs().get(usize::from(at.pack)).ok_or_else(nowhere)?;
        let room = &mut self.room;
        let pages = self.chunks.get((at.pack, chunk), || pack.chunk(chunk, room).map(<[Page]>::to_vec));
        let pages = pages.map_err(|source| ContentsError::Pack { pack: *id, source })?;
        pages.get(within).map(Some).ok_or_else(nowhere)
    }

    /// Where pages are that are not zeros, ascending, of the leaf in which `page` is: their numbers in the space.
    ///
    /// # Errors
    /// [`ContentsError`]
    pub fn located(&mut self, space: u16, page: u32) -> Result<impl Iterator<Item = u32>, ContentsError> {
        let first = page - page % Leaf::PAGES;
        let leaf = self.leaves.get((space, page / Leaf::PAGES), || self.snapshot.leaf(space, page));
        Ok(leaf.map_err(ContentsError::Snapshot)?.located().map(move |(page, _)| first + page))
    }

    /// Where its pages are, alone.
    pub(crate) fn into_snapshot(self) -> SnapshotReader<File> {
        self.snapshot
    }

    /// The packs alone.
    pub(crate) fn into_packs(self) -> impl Iterator<Item = ((PackId, PackKey, u32), PackReader<File>)> {
        self.snapshot.packs().to_vec().into_iter().zip(self.packs)
    }
}

/// What was used last, the latest first.
struct Recent<K, V> {
    entries: VecDeque<(K, V)>,
    most: usize,
}

impl<K: PartialEq + Copy, V> Recent<K, V> {
    const fn new(most: usize) -> Self {
        Self { entries: VecDeque::new(), most }
    }

    fn get(&mut self, key: K, make: impl FnOnce() -> Result<V, FileError>) -> Result<&V, FileError> {
        match self.entries.iter().position(|(known, _)| *known == key) {
            Some(0) => {}
            Some(at) => {
                let entry = self.entries.remove(at).expect("it was found there");
                self.entries.push_front(entry);
            }
            None => {
                let value = make()?;
                self.entries.truncate(self.most - 1);
                self.entries.push_front((key, value));
            }
        }
        Ok(&self.entries[0].1)
    }
}
