//! Which pages of a pack are differences, and what their bases are.

use bytes::{Buf, BufMut};
use uuid::Uuid;

use super::{BASE, KeptPages, MAX_RUNS, PackId, RUN};
use crate::stored::Malformed;

/// What a difference is joined with: a page, which is no difference, of a pack in the list of bases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Base {
    /// Place in the list of bases.
    pub(crate) pack: u16,
    /// Number of the page.
    pub(crate) page: u32,
}

/// Consecutive pages whose bases are consecutive pages of one pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    first: u32,
    pages: u16,
    base: Base,
}

impl Run {
    const fn end(&self) -> u32 {
        self.first.saturating_add(self.pages as u32)
    }

    fn base_of(&self, page: u32) -> Base {
        Base { page: self.base.page + (page - self.first), ..self.base }
    }
}

/// The differences of a pack. In memory are twelve bytes for each run, of which there are at most 1,048,576.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Differences {
    bases: Vec<PackId>,
    /// Ascending, none beyond the first page of the next.
    runs: Vec<Run>,
}

impl Differences {
    /// The packs that have bases.
    pub(crate) fn bases(&self) -> &[PackId] {
        &self.bases
    }

    /// The base of a page, if it is a difference.
    pub(crate) fn of(&self, page: u32) -> Option<Base> {
        let behind = self.runs.partition_point(|run| run.first <= page);
        let run = self.runs.get(behind.checked_sub(1)?)?;
        (page < run.end()).then(|| run.base_of(page))
    }

    /// Adds a page, which is beyond all others; `false` if there are too many runs or bases, and it is none then.
    pub(super) fn push(&mut self, page: u32, pack: PackId, base: u32) -> bool {
        if let Some(last) = self.runs.last_mut()
            && last.end() == page
            && last.pages < u16::MAX
            && self.bases.get(usize::from(last.base.pack)) == Some(&pack)
            && last.base.page.checked_add(u32::from(last.pages)) == Some(base)
        {
            last.pages += 1;
            return true;
        }
        let place = self.bases.iter().position(|known| *known == pack).unwrap_or(self.bases.len());
        let Some(place) = u16::try_from(place).ok().filter(|place| *place < u16::MAX && self.runs.len() < MAX_RUNS) else {
            return false;
        };
        if usize::from(place) == self.bases.len() {
            self.bases.push(pack);
        }
        self.runs.push(Run { first: page, pages: 1, base: Base { pack: place, page: base } });
        true
    }

    /// Those of pages that are kept, and the packs that have bases of these. A run may still go over pages that are not kept: so there are never more runs than there were.
    pub(super) fn only(&self, kept: &KeptPages) -> Self {
        let mut only = Self::default();
        let mut places = vec![None; self.bases.len()];
        for run in &self.runs {
            let within = kept.first_from(run.first).zip(kept.last_before(run.end())).filter(|(first, last)| first <= last);
            let Some((first, last)) = within else { continue };
            let place = places[usize::from(run.base.pack)].get_or_insert_with(|| {
                only.bases.push(self.bases[usize::from(run.base.pack)]);
                u16::try_from(only.bases.len() - 1).expect("no more than there were")
            });
            let pages = u16::try_from(last - first + 1).expect("no longer than it was");
            only.runs.push(Run { first, pages, base: Base { pack: *place, ..run.base_of(first) } });
        }
        only
    }

    /// The bytes of the two lists.
    pub(super) fn encode(&self) -> (Vec<u8>, Vec<u8>) {
        let bases = self.bases.iter().flat_map(|pack| *pack.uuid().as_bytes()).collect();
        let mut runs = Vec::with_capacity(self.runs.len() * RUN);
        for Run { first, pages, base } in &self.runs {
            runs.put_u32(*first);
            runs.put_u16(*pages);
            runs.put_u16(base.pack);
            runs.put_u32(base.page);
        }
        (bases, runs)
    }

    /// The differences of a pack of so many pages, from its two lists.
    ///
    /// # Errors
    /// [`Malformed::Differences`]
    pub(super) fn decode(bases: &[u8], mut runs: &[u8], pages: u32) -> Result<Self, Malformed> {
        let (bases, _) = bases.as_chunks::<BASE>();
        let bases: Vec<_> = bases.iter().map(|id| PackId::new(Uuid::from_bytes(*id))).collect();
        let mut decoded = Vec::with_capacity(runs.len() / RUN);
        let mut next = 0;
        while runs.len() >= RUN {
            let (first, count) = (runs.get_u32(), runs.get_u16());
            let base = Base { pack: runs.get_u16(), page: runs.get_u32() };
            let end = first.checked_add(u32::from(count)).filter(|end| first >= next && *end > first && *end <= pages);
            next = end.ok_or(Malformed::Differences)?;
            if usize::from(base.pack) >= bases.len() || base.page.checked_add(u32::from(count)).is_none() {
                return Err(Malformed::Differences);
            }
            decoded.push(Run { first, pages: count, base });
        }
        if runs.is_empty() { Ok(Self { bases, runs: decoded }) } else { Err(Malformed::Differences) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn prop_any_bytes_are_differences_within_their_pack_or_refused(bases in 0..3_usize, runs in prop::collection::vec(any::<u8>(), 0..60)) {
            if let Ok(differences) = Differences::decode(&[7; 48][..bases * BASE], &runs, 1_000) {
                prop_assert!((0..1_000).filter_map(|page| differences.of(page)).all(|base| usize::from(base.pack) < bases));
                prop_assert_eq!(differences.of(1_000), None);
                prop_assert_eq!(differences.encode().1, runs);
            }
        }
    }

    fn pack(number: u8) -> PackId {
        PackId::new(Uuid::from_bytes([number; 16]))
    }

    #[test]
    fn runs_say_of_each_page_what_its_base_is() {
        let given = [(3, 1, 10), (4, 1, 11), (5, 1, 13), (6, 2, 14), (9, 2, 15), (10, 2, 16), (11, 1, 17)];
        let mut differences = Differences::default();
        for (page, base, at) in given {
            assert!(differences.push(page, pack(base), at));
        }
        assert_eq!((differences.bases(), differences.runs.len()), (&[pack(1), pack(2)][..], 5));
        let (bases, runs) = differences.encode();
        let decoded = Differences::decode(&bases, &runs, 12).expect("as it was encoded");
        assert_eq!(decoded, differences);
        for page in 0..20 {
            let wanted = given.iter().find(|(of, ..)| *of == page).map(|(_, base, at)| (pack(*base), *at));
            let found = decoded.of(page).map(|base| (decoded.bases()[usize::from(base.pack)], base.page));
            assert_eq!(found, wanted, "page {page}");
        }
        // Of one page less than they name.
        assert_eq!(Differences::decode(&bases, &runs, 11), Err(Malformed::Differences));
    }

    #[test]
    fn what_is_no_list_of_differences_is_refused() {
        let run = |first: u32, pages: u16, pack: u16, base: u32| {
            [&first.to_be_bytes()[..], &pages.to_be_bytes(), &pack.to_be_bytes(), &base.to_be_bytes()].concat()
        };
        let bases = [1; BASE];
        assert!(Differences::decode(&bases, &[run(0, 2, 0, 5), run(2, 1, 0, 1)].concat(), 9).is_ok());
        let wrong = [
            run(0, 0, 0, 0),
            run(8, 2, 0, 0),
            run(u32::MAX, 2, 0, 0),
            run(0, 1, 1, 0),
            run(0, 2, 0, u32::MAX),
            run(0, 1, 0, 0)[..RUN - 1].to_vec(),
            [run(0, 2, 0, 0), run(1, 1, 0, 0)].concat(),
            [run(5, 1, 0, 0), run(2, 1, 0, 0)].concat(),
        ];
        for runs in wrong {
            assert_eq!(Differences::decode(&bases, &runs, 9), Err(Malformed::Differences), "{runs:?}");
        }
    }

    #[test]
    fn there_are_no_more_runs_than_fit() {
        let mut differences = Differences::default();
        let taken = (0..MAX_RUNS as u32 + 5).take_while(|page| differences.push(2 * page, pack(1), 7)).count();
        assert_eq!(taken, MAX_RUNS);
        assert!(differences.push(2 * MAX_RUNS as u32 - 1, pack(1), 8), "the last run grows");
    }
}
