//! A snapshot with its packs: any page, read when it is asked for.

use std::collections::VecDeque;
use std::fs::File;
use std::io;

use godwit_stream::PAGE_SIZE;

use crate::pack::{PackId, PackReader, Page, PageDigest, Unsealed};
use crate::snapshot::{Leaf, Located, SnapshotReader};
use crate::stored::{FileError, Malformed, Stored};
use crate::{Space, TeamKey};

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
pub struct Contents<S = File> {
    snapshot: SnapshotReader<S>,
    /// Those of its list, in its order; none for one that cannot be read.
    packs: Vec<Option<PackReader<S>>>,
    /// Of each pack, where those of its bases are in the snapshot's list.
    bases: Vec<Vec<Option<u16>>>,
    room: Unsealed,
    leaves: Recent<(u16, u32), Leaf>,
    chunks: Recent<(u16, u32), Opened>,
    joined: Box<Page>,
}

/// A chunk as it is kept.
struct Opened {
    pages: Vec<Page>,
    checks: Vec<[u8; 8]>,
}

impl<S> std::fmt::Debug for Contents<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Contents").field("snapshot", &self.snapshot).finish_non_exhaustive()
    }
}

/// The leaf was checked against the list, and the list against the packs: what is said to be somewhere else was written by no writer that keeps the rules.
fn nowhere() -> ContentsError {
    ContentsError::Snapshot(Malformed::Place.into())
}

impl<S: Stored> Contents<S> {
    /// `packs` are those of the snapshot's list, in its order; what is in one that is none cannot be read.
    pub(crate) fn new(snapshot: SnapshotReader<S>, packs: Vec<Option<PackReader<S>>>) -> io::Result<Self> {
        let (leaves, chunks) = (Recent::new(RECENT_LEAVES), Recent::new(RECENT_CHUNKS));
        let place = |base: &PackId| snapshot.packs().iter().position(|(id, ..)| id == base).and_then(|at| u16::try_from(at).ok());
        let bases = |pack: &Option<PackReader<S>>| pack.iter().flat_map(PackReader::bases).map(place).collect();
        let bases = packs.iter().map(bases).collect();
        Ok(Self { snapshot, packs, bases, room: Unsealed::new()?, leaves, chunks, joined: Box::new([0; PAGE_SIZE]) })
    }

    /// What the snapshot says beside its pages.
    #[must_use]
    pub const fn snapshot(&self) -> &SnapshotReader<S> {
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
        match self.located_at(space, page)? {
            Some(at) => self.content(at).map(Some),
            None => Ok(None),
        }
    }

    /// Where a page of a space is.
    pub(crate) fn located_at(&mut self, space: u16, page: u32) -> Result<Option<Located>, ContentsError> {
        let leaf = self.leaves.get((space, page / Leaf::PAGES), || self.snapshot.leaf(space, page));
        Ok(leaf.map_err(ContentsError::Snapshot)?.get(page % Leaf::PAGES))
    }

    /// Where the base of a page is, if it is a difference.
    ///
    /// # Errors
    /// [`Malformed`]: the page is not kept, or its base is not, or is in a pack that is not in the snapshot's list, which so does not need this page.
    pub(crate) fn base_of(&self, at: Located) -> Result<Option<Located>, Malformed> {
        let pack = self.pack(at.pack).filter(|pack| pack.place_of(at.page).is_some()).ok_or(Malformed::Place)?;
        let Some(base) = pack.base_of(at.page) else { return Ok(None) };
        let places = self.bases.get(usize::from(at.pack)).ok_or(Malformed::Place)?;
        let place = places.get(usize::from(base.pack)).copied().flatten().ok_or(Malformed::Place)?;
        // Of a pack that cannot be read nobody knows.
        if self.pack(place).is_some_and(|pack| pack.place_of(base.page).is_none()) {
            return Err(Malformed::Place);
        }
        Ok(Some(Located { pack: place, page: base.page }))
    }

    /// What is in a page of a pack; a difference is joined with its base.
    ///
    /// # Errors
    /// [`ContentsError`]
    pub(crate) fn content(&mut self, at: Located) -> Result<&Page, ContentsError> {
        let (chunk, within) = self.place(at).ok_or_else(nowhere)?;
        let Some(base) = self.base_of(at).map_err(|error| ContentsError::Snapshot(error.into()))? else {
            return self.chunk(at.pack, chunk)?.pages.get(within).ok_or_else(nowhere);
        };
        // What is missing is said of the pack that is.
        if self.pack(base.pack).is_none() {
            return Err(self.wrong(base.pack, Malformed::Place.into()));
        }
        // Whatever files say, no more than one base is looked for.
        if !matches!(self.base_of(base), Ok(None)) {
            return Err(self.wrong(at.pack, Malformed::Differences.into()));
        }
        let (base_chunk, base_within) = self.place(base).ok_or_else(nowhere)?;
        let whole = *self.chunk(base.pack, base_chunk)?.pages.get(base_within).ok_or_else(nowhere)?;
        let before = self.pack(at.pack).map_or(0, |pack| pack.differences_before(chunk, within));
        let opened = self.chunk(at.pack, chunk)?;
        let (Some(differs), Some(check)) = (opened.pages.get(within), opened.checks.get(before)) else { return Err(nowhere()) };
        let (differs, check) = (*differs, *check);
        let pack = self.pack(at.pack).ok_or_else(nowhere)?;
        let joined = pack.join(at.page, &differs, &check, &whole);
        *self.joined = joined.map_err(|error| self.wrong(at.pack, error))?;
        Ok(&self.joined)
    }

    /// In which chunk of its pack a page is, and where there.
    fn place(&self, at: Located) -> Option<(u32, usize)> {
        self.pack(at.pack)?.place_of(at.page)
    }

    fn chunk(&mut self, pack: u16, chunk: u32) -> Result<&Opened, ContentsError> {
        let reader = self.packs.get(usize::from(pack)).and_then(Option::as_ref).ok_or_else(nowhere)?;
        let room = &mut self.room;
        let open = || {
            let chunk = reader.chunk(chunk, room)?;
            Ok(Opened { pages: chunk.pages.to_vec(), checks: chunk.checks.to_vec() })
        };
        let id = self.snapshot.packs().get(usize::from(pack)).map(|(id, ..)| *id).ok_or_else(nowhere)?;
        self.chunks.get((pack, chunk), open).map_err(|source| ContentsError::Pack { pack: id, source })
    }

    fn wrong(&self, pack: u16, source: FileError) -> ContentsError {
        match self.snapshot.packs().get(usize::from(pack)) {
            Some((pack, ..)) => ContentsError::Pack { pack: *pack, source },
            None => nowhere(),
        }
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

    /// Reads all of a pack of the list, and compares each page with its digest, but those that are differences to what this snapshot does not need, or to what
    /// cannot be read of another pack.
    ///
    /// # Errors
    /// [`FileError`]
    pub(crate) fn verify_pack(&mut self, pack: u16, team: &TeamKey) -> Result<(), FileError> {
        let reader = self.pack(pack).ok_or(Malformed::Place)?;
        let id = self.snapshot.packs().get(usize::from(pack)).map(|(id, ..)| *id).ok_or(Malformed::Place)?;
        let digests = reader.digests()?;
        for (page, digest) in digests {
            let at = Located { pack, page };
            match self.content(at) {
                Ok(content) if PageDigest::of(team, content) == digest => {}
                Ok(_) => return Err(FileError::Digest(page)),
                Err(ContentsError::Pack { pack, source }) if pack == id => return Err(source),
                // It is said where that pack is verified. What it is to be joined with opens nevertheless.
                Err(_) => {
                    let (chunk, _) = self.place(at).ok_or(Malformed::Place)?;
                    match self.chunk(pack, chunk) {
                        Err(ContentsError::Snapshot(source) | ContentsError::Pack { source, .. }) => return Err(source),
                        Ok(_) => {}
                    }
                }
            }
        }
        Ok(())
    }

    /// A pack of the list.
    pub(crate) fn pack(&self, pack: u16) -> Option<&PackReader<S>> {
        self.packs.get(usize::from(pack)).and_then(Option::as_ref)
    }

    /// How many packs, with which differences of one of the list are joined, are not in the list, or cannot be read.
    pub(crate) fn unlisted(&self, pack: u16) -> usize {
        let is_there = |at: &Option<u16>| at.is_some_and(|at| self.pack(at).is_some());
        self.bases.get(usize::from(pack)).map_or(0, |bases| bases.iter().filter(|at| !is_there(at)).count())
    }

    /// Reads where all pages are. The list must name all that they need.
    ///
    /// # Errors
    /// [`FileError`]
    pub(crate) fn verify_places(&self) -> Result<(), FileError> {
        for space in 0..self.spaces().len() as u16 {
            for first in self.snapshot.leaves(space).collect::<Vec<_>>() {
                for (_, at) in self.snapshot.leaf(space, first)?.located() {
                    if self.pack(at.pack).is_some() {
                        self.base_of(at)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// From now on so many chunks are kept that were read last.
    pub(crate) const fn keep_chunks(&mut self, most: usize) {
        self.chunks.most = most;
    }

    /// Whether the leaf of a page of a space is at hand.
    pub(crate) fn has_leaf(&self, space: u16, page: u32) -> bool {
        self.leaves.has((space, page / Leaf::PAGES))
    }

    /// Whether the chunk of a page is at hand.
    pub(crate) fn has_chunk(&self, at: Located) -> bool {
        self.place(at).is_some_and(|(chunk, _)| self.chunks.has((at.pack, chunk)))
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

    fn has(&self, key: K) -> bool {
        self.entries.iter().any(|(known, _)| *known == key)
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
