//! What the pieces of pages were when they were sent: as many pages as memory allows, the longest unused go first.

use super::PIECES;

type Signature = [u64; PIECES];

/// A bounded store of signatures by page. The one that goes when there is no room is found by a clock hand that spares, once, those that were
/// used since it last came by.
#[derive(Debug)]
pub(super) struct Signatures {
    /// For each page its slot plus one, or 0.
    index: Vec<u32>,
    slots: Vec<Signature>,
    pages: Vec<(u32, bool)>,
    capacity: usize,
    hand: usize,
}

impl Signatures {
    /// Bytes of memory that one signature takes.
    pub(super) const SIZE: u64 = (size_of::<Signature>() + size_of::<(u32, bool)>()) as u64;

    pub(super) fn new(pages: usize, capacity: usize) -> Self {
        Self { index: vec![0; pages], slots: Vec::new(), pages: Vec::new(), capacity, hand: 0 }
    }

    /// How many signatures there is memory taken for.
    pub(super) const fn count(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn get(&mut self, page: u32) -> Option<&Signature> {
        let slot = self.slot(page)?;
        if let Some((_, used)) = self.pages.get_mut(slot) {
            *used = true;
        }
        self.slots.get(slot)
    }

    pub(super) fn set(&mut self, page: u32, signature: Signature) {
        let slot = match self.slot(page) {
            Some(slot) => slot,
            None if self.slots.len() < self.capacity => {
                self.slots.push(signature);
                self.pages.push((page, false));
                self.slots.len() - 1
            }
            None => match self.evict() {
                Some(slot) => slot,
                None => return,
            },
        };
        if let (Some(kept), Some(owner), Some(index)) =
            (self.slots.get_mut(slot), self.pages.get_mut(slot), self.index.get_mut(page as usize))
        {
            *kept = signature;
            owner.0 = page;
            *index = u32::try_from(slot + 1).unwrap_or(0);
        }
    }

    pub(super) fn forget(&mut self, page: u32) {
        // The slot stays with its owner's number and is found by nobody, until the hand comes by.
        if let Some(slot) = self.slot(page)
            && let (Some(owner), Some(index)) = (self.pages.get_mut(slot), self.index.get_mut(page as usize))
        {
            owner.1 = false;
            *index = 0;
        }
    }

    fn slot(&self, page: u32) -> Option<usize> {
        (*self.index.get(page as usize)? as usize).checked_sub(1)
    }

    /// A slot whose page no longer has a signature.
    fn evict(&mut self) -> Option<usize> {
        for _ in 0..self.pages.len().saturating_mul(2) {
            let slot = self.hand;
            self.hand = (self.hand + 1) % self.pages.len();
            let (page, used) = self.pages.get_mut(slot)?;
            if std::mem::take(used) {
                continue;
            }
            if let Some(index) = self.index.get_mut(*page as usize)
                && *index as usize == slot + 1
            {
                *index = 0;
            }
            return Some(slot);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_outlives_what_is_not() {
        let mut signatures = Signatures::new(100, 10);
        for page in 0..10 {
            signatures.set(page, [u64::from(page); PIECES]);
        }
        for round in 0..8_u32 {
            assert!(signatures.get(3).is_some());
            signatures.set(20 + round, [1; PIECES]);
            assert_eq!(signatures.get(3), Some(&[3; PIECES]), "round {round}");
        }
        assert_eq!(signatures.slots.len(), 10);
        assert_eq!((0..100).filter(|page| signatures.get(*page).is_some()).count(), 10);
        signatures.forget(3);
        assert_eq!(signatures.get(3), None);
        signatures.set(3, [7; PIECES]);
        assert_eq!(signatures.get(3), Some(&[7; PIECES]));
    }

    #[test]
    fn without_room_nothing_is_kept() {
        let mut signatures = Signatures::new(10, 0);
        signatures.set(1, [1; PIECES]);
        assert_eq!(signatures.get(1), None);
        signatures.set(10, [1; PIECES]);
    }
}
