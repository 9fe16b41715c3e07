//! Which pages of which packs the snapshots need.

use std::collections::BTreeMap;

use crate::PackKey;
use crate::contents::Contents;
use crate::pack::{KeptPages, PackId};
use crate::snapshot::Located;
use crate::stored::{FileError, Malformed, Stored};

/// The packs to which snapshots refer. In memory is a bit for each of their pages.
#[derive(Default)]
pub(super) struct Needs {
    packs: Vec<Need>,
    places: BTreeMap<PackId, usize>,
}

/// What is needed of a pack.
pub(super) struct Need {
    pub(super) id: PackId,
    pub(super) key: PackKey,
    kept: KeptPages,
    bits: Vec<u64>,
}

impl Needs {
    /// Adds what a snapshot needs: each page of its leaves, and the base of each of these that is a difference.
    ///
    /// # Errors
    /// [`FileError`]: of the snapshot; a place that is none among them.
    pub(super) fn add<S: Stored>(&mut self, contents: &Contents<S>) -> Result<(), FileError> {
        let snapshot = contents.snapshot();
        let listed = (0..).zip(snapshot.packs());
        let places = listed.map(|(at, (id, key, pages))| {
            let kept = contents.pack(at).ok_or(Malformed::Place)?.kept();
            Ok::<_, Malformed>(*self.places.entry(*id).or_insert_with(|| {
                self.packs.push(Need::new(*id, key.clone(), kept.clone(), *pages));
                self.packs.len() - 1
            }))
        });
        let places = places.collect::<Result<Vec<_>, _>>()?;
        let mut mark = |at: Located| {
            let place = places.get(usize::from(at.pack)).copied();
            place.and_then(|place| self.packs.get_mut(place)).is_some_and(|need| need.mark(at.page))
        };
        for space in 0..snapshot.spaces().len() as u16 {
            for first in snapshot.leaves(space) {
                for (_, at) in snapshot.leaf(space, first)?.located() {
                    let base = contents.base_of(at)?;
                    if !mark(at) || !base.is_none_or(&mut mark) {
                        return Err(Malformed::Place.into());
                    }
                }
            }
        }
        Ok(())
    }

    /// All packs, in order.
    pub(super) fn into_packs(mut self) -> Vec<Need> {
        self.packs.sort_unstable_by_key(|need| need.id);
        self.packs
    }
}

impl Need {
    fn new(id: PackId, key: PackKey, kept: KeptPages, pages: u32) -> Self {
        Self { id, key, kept, bits: vec![0; pages.div_ceil(u64::BITS) as usize] }
    }

    /// A page is needed; `false` if there is none of this number.
    fn mark(&mut self, page: u32) -> bool {
        let word = self.bits.get_mut((page / u64::BITS) as usize);
        word.is_some_and(|word| {
            *word |= 1 << (page % u64::BITS);
            true
        })
    }

    fn is_needed(&self, page: u32) -> bool {
        self.bits.get((page / u64::BITS) as usize).is_some_and(|word| word >> (page % u64::BITS) & 1 == 1)
    }

    /// How many pages it has now.
    pub(super) fn has(&self) -> u32 {
        self.kept.count()
    }

    /// What is to be kept. A pack that is in a list keeps a page whatever is needed, since whoever opens the snapshot opens it.
    pub(super) fn keep(&self) -> KeptPages {
        let needed = self.kept.only(|page| self.is_needed(page));
        let first = self.kept.page(0);
        if needed.count() == 0 { self.kept.only(|page| Some(page) == first) } else { needed }
    }
}
