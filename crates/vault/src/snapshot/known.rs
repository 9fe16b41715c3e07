//! What the team's packs have already, and the earlier snapshots of which a new one makes use.

use std::collections::HashMap;
use std::time::Duration;

use super::leaf::Leaf;
use super::spaces::SpaceKind;
use super::{Located, ZEROS};
use crate::contents::Contents;
use crate::pack::{PackId, Page};
use crate::stored::{FileError, Stored};
use crate::{ContentsError, PackKey, Space};

/// A base that is none, and the number that no pack has.
pub(super) const NONE: u16 = ZEROS;
/// Chunks of earlier snapshots that are kept while a new one is written: 16 MiB.
const RECENT_CHUNKS: usize = 256;
/// Leaves and chunks that may be read for bases at once; of those that were, one more for each chunk's worth of pages that came.
const READ_AHEAD: u64 = 1024;
const PAGES_PER_READ: u64 = 16;
/// How long reading for bases may take in all, and one time: the guest's writes wait for it.
const READING: Duration = Duration::from_secs(2);
const ONE_READING: Duration = Duration::from_millis(50);

/// Where a page is, by the numbers of known packs; `base` is that of its base's pack if it is a difference, or [`NONE`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) page: u32,
    pub(super) pack: u16,
    pub(super) base: u16,
}

#[derive(Debug)]
struct KnownPack {
    id: PackId,
    key: PackKey,
    pages: u32,
    /// Its digests are known.
    is_read: bool,
}

/// What is in the team's packs already, by digest. In memory it takes some forty bytes for each page.
#[derive(Debug)]
pub struct Known {
    packs: Vec<KnownPack>,
    pages: HashMap<u128, Place>,
    most: usize,
}

impl Known {
    /// Nothing; at most `most` pages are known.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self { packs: vec![], pages: HashMap::new(), most }
    }

    /// Adds what the packs of a snapshot have. One that is not as the list says, that has more pages than there is room for, or whose digests cannot be read, is left out. The snapshots that are likeliest to
    /// have what comes are added first.
    pub fn add<S: Stored>(&mut self, contents: &Contents<S>) {
        let numbers = self.numbers(contents);
        for (at, number) in (0..).zip(&numbers) {
            let Some(number) = *number else { continue };
            let Some(pack) = self.packs.get(usize::from(number)) else { continue };
            if pack.is_read || pack.pages as usize > self.most.saturating_sub(self.pages.len()) {
                continue;
            }
            // A pack whose digests cannot be read is as good as unknown.
            let Some(Ok(digests)) = contents.pack(at).map(|pack| pack.digests()) else { continue };
            for (page, digest) in digests {
                let base = match contents.base_of(Located { pack: at, page }) {
                    Ok(None) => NONE,
                    // Nobody could be told where it is without its base.
                    Ok(Some(base)) => match numbers.get(usize::from(base.pack)) {
                        Some(Some(base)) => *base,
                        _ => continue,
                    },
                    // A difference whose base this snapshot does not need, and so does not know, or that nobody needs, and whose base is not kept.
                    Err(_) => continue,
                };
                self.pages.entry(digest.number()).or_insert(Place { page, pack: number, base });
            }
            if let Some(pack) = self.packs.get_mut(usize::from(number)) {
                pack.is_read = true;
            }
        }
    }

    /// Makes a snapshot one from which pages are taken over, and that has bases: its packs are known from here on, also those whose pages are not. None if there are too many, or
    /// one that is not the one that is known by its id, or not the one of the list.
    pub fn earlier<S: Stored>(&mut self, mut contents: Contents<S>) -> Option<Earlier<S>> {
        let packs = self.numbers(&contents).into_iter().collect::<Option<_>>()?;
        contents.keep_chunks(RECENT_CHUNKS);
        Some(Earlier { contents, packs, credit: READ_AHEAD * PAGES_PER_READ, clock: None, reading: Duration::ZERO })
    }

    /// The numbers of a snapshot's packs. A pack that cannot be read, or does not have as many pages as the list says, gets none: who writes lists a pack by what is known of it.
    fn numbers<S: Stored>(&mut self, contents: &Contents<S>) -> Vec<Option<u16>> {
        let listed = (0..).zip(contents.snapshot().packs());
        let number = |(at, (id, key, pages)): (u16, &(PackId, PackKey, u32))| {
            let pack = contents.pack(at).filter(|pack| pack.pages() == *pages)?;
            self.number(*id, key, pack.pages())
        };
        listed.map(number).collect()
    }

    /// The number of a pack, which it gets now if it has none. None for one that is not the one that is known by its id, or if there are too many.
    fn number(&mut self, id: PackId, key: &PackKey, pages: u32) -> Option<u16> {
        let known = self.packs.iter().position(|known| known.id == id);
        let number = known.unwrap_or(self.packs.len());
        let number = u16::try_from(number).ok().filter(|number| *number < ZEROS - 1)?;
        match known.and_then(|at| self.packs.get(at)) {
            Some(known) if known.key.expose() != key.expose() || known.pages != pages => None,
            Some(_) => Some(number),
            None => {
                self.packs.push(KnownPack { id, key: key.clone(), pages, is_read: false });
                Some(number)
            }
        }
    }

    /// How many packs are known: the number of the next.
    pub(super) fn count(&self) -> u16 {
        u16::try_from(self.packs.len()).expect("there are fewer than u16 can say")
    }

    /// What is known by a number.
    pub(super) fn pack(&self, number: usize) -> Option<(PackId, &PackKey, u32)> {
        self.packs.get(number).map(|pack| (pack.id, &pack.key, pack.pages))
    }

    pub(super) fn find(&self, digest: u128) -> Option<Place> {
        self.pages.get(&digest).copied()
    }

    /// Makes a new page known, if there is room.
    pub(super) fn learn(&mut self, digest: u128, place: Place) {
        if self.pages.len() < self.most {
            self.pages.insert(digest, place);
        }
    }
}

/// An earlier snapshot, of which a new one takes over pages as they are, or takes pages as differences to what it has. Only where those are is written: afterwards neither
/// snapshot needs the other.
pub struct Earlier<S> {
    contents: Contents<S>,
    /// Of each pack of its list, the number by which it is known.
    packs: Vec<u16>,
    /// How many pages' worth of reads are left until more pages come.
    credit: u64,
    /// None if nobody waits for bases.
    clock: Option<Clock>,
    /// How long reading for bases has taken.
    reading: Duration,
}

/// Tells how long ago something was, the same thing always.
type Clock = Box<dyn Fn() -> Duration + Send>;

impl<S> std::fmt::Debug for Earlier<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Earlier").field("contents", &self.contents).finish_non_exhaustive()
    }
}

impl<S: Stored> Earlier<S> {
    /// From now on bases are read for only so long in all as the guest's writes may wait, by this clock, which tells how long ago something was; and no more once a single reading has
    /// taken long.
    pub fn hurry(&mut self, clock: impl Fn() -> Duration + Send + 'static) {
        self.clock = Some(Box::new(clock));
        self.reading = Duration::ZERO;
    }

    /// The number of the space of this kind and name.
    #[must_use]
    pub fn space(&self, kind: SpaceKind, name: &str) -> Option<u16> {
        let is_it = |space: &Space| space.kind == kind && space.name == name;
        self.contents.spaces().iter().position(is_it).and_then(|space| u16::try_from(space).ok())
    }

    /// The disk of this name, if it has as many pages: the number of its space.
    #[must_use]
    pub fn disk(&self, name: &str, pages: u32) -> Option<u16> {
        let space = self.space(SpaceKind::Disk, name)?;
        self.contents.spaces().get(usize::from(space)).is_some_and(|space| space.pages == pages).then_some(space)
    }

    /// Where the pages of a space are that are not zeros, of those in a leaf: for [`super::SnapshotWriter::take_over`].
    ///
    /// # Errors
    /// [`FileError`]
    pub fn leaf(&self, space: u16, page: u32) -> Result<Leaf, FileError> {
        self.contents.snapshot().leaf(space, page)
    }

    /// A page of it, by the numbers of known packs; none if it is in no pack.
    pub(super) fn place(&self, at: Located) -> Option<Place> {
        let (_, _, pages) = self.contents.snapshot().packs().get(usize::from(at.pack))?;
        let number = |place: u16| self.packs.get(usize::from(place)).copied();
        let base = match self.contents.base_of(at).ok()? {
            Some(base) => number(base.pack)?,
            None => NONE,
        };
        (at.page < *pages).then_some(Place { page: at.page, pack: number(at.pack)?, base })
    }

    /// What a new content of a page can be a difference to, and where that is: what the page held, or what that was a difference to. None if it was zero, cannot be read, or if as much
    /// has been read as taking a snapshot may wait for.
    pub(super) fn base(&mut self, space: u16, page: u32) -> Option<(Place, &Page)> {
        if self.clock.is_some() && self.reading >= READING {
            return None;
        }
        let located = if self.contents.has_leaf(space, page) {
            self.contents.located_at(space, page)
        } else {
            self.read(|contents| contents.located_at(space, page))?
        };
        let at = located.ok().flatten()?;
        let at = self.contents.base_of(at).ok()?.unwrap_or(at);
        let place = self.place(at).filter(|place| place.base == NONE)?;
        if !self.contents.has_chunk(at) {
            self.read(|contents| contents.content(at).map(drop))?.ok()?;
        }
        let content: Result<_, ContentsError> = self.contents.content(at);
        Some((place, content.ok()?))
    }

    /// Reads a leaf or a chunk, if that may be waited for.
    fn read<T>(&mut self, read: impl FnOnce(&mut Contents<S>) -> T) -> Option<T> {
        self.credit = self.credit.checked_sub(PAGES_PER_READ)?;
        let Some(clock) = &self.clock else { return Some(read(&mut self.contents)) };
        let before = clock();
        let outcome = read(&mut self.contents);
        let took = clock().saturating_sub(before);
        self.reading += if took > ONE_READING { READING } else { took };
        Some(outcome)
    }

    /// A page has come for which a base may be asked.
    pub(super) fn came(&mut self) {
        self.credit = (READ_AHEAD * PAGES_PER_READ).min(self.credit + 1);
    }
}
