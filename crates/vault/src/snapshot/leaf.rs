//! A leaf: where up to 512 pages of a space are.

use bytes::{Buf, BufMut};

use super::{Located, RUN, ZEROS};
use crate::stored::Malformed;

/// Where 512 pages of a space are, of which the first is at a multiple of 512.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf(Box<[Option<Located>; Leaf::PAGES as usize]>);

impl Leaf {
    /// How many pages a leaf has.
    pub const PAGES: u32 = 512;

    /// All zeros.
    #[must_use]
    pub fn zeros() -> Self {
        Self(Box::new([None; Self::PAGES as usize]))
    }

    /// Where a page is, counted from the leaf's first; `None` for zeros.
    #[must_use]
    pub fn get(&self, page: u32) -> Option<Located> {
        self.0.get(page as usize).copied().flatten()
    }

    /// Where the pages are that are not zeros, ascending.
    pub fn located(&self) -> impl Iterator<Item = (u32, Located)> {
        (0..).zip(&self.0[..]).filter_map(|(page, at)| Some((page, (*at)?)))
    }

    pub(super) fn set(&mut self, page: u32, at: Located) {
        self.0[page as usize] = Some(at);
    }

    /// The bytes of it. Zeros at its end are left out.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let used = self.0.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        let mut rest = &self.0[..used];
        while let Some(first) = rest.first() {
            let follows = |(distance, page): &(u32, &Option<Located>)| match (first, page) {
                (None, None) => true,
                (Some(first), Some(page)) => first.pack == page.pack && first.page.checked_add(*distance) == Some(page.page),
                _ => false,
            };
            let length = (0..).zip(rest).take_while(follows).count();
            out.put_u16(u16::try_from(length).expect("a leaf has 512 pages"));
            out.put_u16(first.map_or(ZEROS, |first| first.pack));
            out.put_u32(first.map_or(0, |first| first.page));
            rest = &rest[length..];
        }
        out
    }

    /// The leaf of these bytes. `room` is how many of its pages are in the space, `packs` how many pages each pack has.
    ///
    /// # Errors
    /// [`Malformed::Leaf`], [`Malformed::Place`]
    pub fn decode(mut bytes: &[u8], room: u32, packs: impl Fn(u16) -> u32) -> Result<Self, Malformed> {
        let mut leaf = Self::zeros();
        let mut rest = leaf.0.get_mut(..room.min(Self::PAGES) as usize).unwrap_or_default();
        while bytes.len() >= RUN {
            let (length, pack, first) = (bytes.get_u16(), bytes.get_u16(), bytes.get_u32());
            let (run, behind) = rest.split_at_mut_checked(usize::from(length)).filter(|_| length > 0).ok_or(Malformed::Leaf)?;
            rest = behind;
            if pack == ZEROS {
                continue;
            }
            if first.checked_add(u32::from(length)).is_none_or(|end| end > packs(pack)) {
                return Err(Malformed::Place);
            }
            for (at, page) in run.iter_mut().zip(first..) {
                *at = Some(Located { pack, page });
            }
        }
        if bytes.is_empty() { Ok(leaf) } else { Err(Malformed::Leaf) }
    }
}
