//! Which pages of a block a destination QEMU has, as it says after a cut.

/// Pages in one word of the bitmap.
const WORD: u64 = 64;

/// What a destination says of a block that was asked for with [`put_ask_received`](super::put_ask_received): a bitmap, least bit first, in whole
/// words of 64 bits. It is checked against the block, and holds as much as the block's length says, whatever is claimed.
#[derive(Debug)]
pub struct Received {
    pages: u64,
    bits: Vec<u8>,
}

/// What was said cannot be of the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReceivedError {
    /// The bitmap of a block of another length.
    #[error("a bitmap of {found} bytes for a block that has one of {expected}")]
    Size {
        /// What the block's length asks for.
        expected: u64,
        /// What was said.
        found: u64,
    },
    /// More came than was said.
    #[error("more of a bitmap came than it has")]
    TooLong,
    /// It ends early, or names pages behind the block's end.
    #[error("a bitmap says something of pages that the block does not have, or nothing of some that it has")]
    Pages,
}

impl Received {
    /// Of a block of so many pages, for which a bitmap of `size` bytes was announced.
    ///
    /// # Errors
    /// [`ReceivedError::Size`]; nothing was allocated.
    pub fn begin(pages: u32, size: u64) -> Result<Self, ReceivedError> {
        let pages = u64::from(pages);
        let expected = pages.div_ceil(WORD) * (WORD / 8);
        if size != expected {
            return Err(ReceivedError::Size { expected, found: size });
        }
        Ok(Self { pages, bits: Vec::with_capacity(usize::try_from(size).unwrap_or_default()) })
    }

    /// Adds the next piece; whether that was the last.
    ///
    /// # Errors
    /// [`ReceivedError::TooLong`]
    pub fn push(&mut self, piece: &[u8]) -> Result<bool, ReceivedError> {
        let whole = self.pages.div_ceil(WORD) * (WORD / 8);
        let length = (self.bits.len() + piece.len()) as u64;
        if length > whole {
            return Err(ReceivedError::TooLong);
        }
        self.bits.extend_from_slice(piece);
        Ok(length == whole)
    }

    /// The pages that have arrived, in order, once the last piece is there.
    ///
    /// # Errors
    /// [`ReceivedError::Pages`]
    pub fn pages(&self) -> Result<impl Iterator<Item = u32>, ReceivedError> {
        let whole = self.pages.div_ceil(WORD) * (WORD / 8);
        let is_set = |page: u64| {
            let byte = usize::try_from(page / 8).ok().and_then(|byte| self.bits.get(byte));
            byte.is_some_and(|byte| byte & (1 << (page % 8)) != 0)
        };
        if self.bits.len() as u64 != whole || (self.pages..self.pages.next_multiple_of(WORD)).any(is_set) {
            return Err(ReceivedError::Pages);
        }
        Ok((0..self.pages).filter(move |page| is_set(*page)).filter_map(|page| u32::try_from(page).ok()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What QEMU would say of these pages.
    fn bits(pages: u32, received: &[u32]) -> Vec<u8> {
        let mut bits = vec![0; pages.div_ceil(64) as usize * 8];
        for page in received {
            bits[*page as usize / 8] |= 1 << (page % 8);
        }
        bits
    }

    fn heard(pages: u32, bits: &[u8], pieces: usize) -> Result<Vec<u32>, ReceivedError> {
        let mut received = Received::begin(pages, bits.len() as u64)?;
        for piece in bits.chunks(pieces) {
            received.push(piece)?;
        }
        received.pages().map(Iterator::collect)
    }

    #[test]
    fn the_pages_that_are_named_are_those_that_have_arrived() {
        for pages in [1, 63, 64, 65, 700] {
            let every_third: Vec<u32> = (0..pages).filter(|page| page % 3 == 0 || page + 1 == pages).collect();
            for piece in [1, 3, 8, 4096] {
                assert_eq!(heard(pages, &bits(pages, &every_third), piece).as_ref(), Ok(&every_third), "{pages} in {piece}");
            }
            assert_eq!(heard(pages, &bits(pages, &[]), 8), Ok(vec![]));
        }
    }

    #[test]
    fn a_bitmap_of_another_block_is_refused_before_anything_is_allocated() {
        let refused = |pages, size| Received::begin(pages, size).map(drop);
        assert_eq!(refused(65, 8), Err(ReceivedError::Size { expected: 16, found: 8 }));
        assert_eq!(refused(65, 24), Err(ReceivedError::Size { expected: 16, found: 24 }));
        assert_eq!(refused(1, u64::MAX), Err(ReceivedError::Size { expected: 8, found: u64::MAX }));
        assert_eq!(refused(u32::MAX, 1 << 29), Ok(()));
    }

    #[test]
    fn what_is_behind_the_end_or_missing_is_refused() {
        let mut received = Received::begin(65, 16).expect("its size");
        assert_eq!(received.push(&[0; 15]), Ok(false));
        assert_eq!(received.pages().map(|_| ()), Err(ReceivedError::Pages), "one byte is missing");
        assert_eq!(received.push(&[0; 2]), Err(ReceivedError::TooLong));
        assert_eq!(received.push(&[0]), Ok(true));
        assert_eq!(received.pages().map(Iterator::count), Ok(0));
        // Of 65 pages the last is number 64.
        for (page, is_refused) in [(64, false), (65, true), (72, true), (127, true)] {
            let said = heard(65, &bits(128, &[page]), 16);
            assert_eq!(said, if is_refused { Err(ReceivedError::Pages) } else { Ok(vec![page]) }, "page {page}");
        }
    }
}
