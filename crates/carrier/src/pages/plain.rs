//! Pages of which nothing is remembered: those of a disk. A page of an image that the destination can read is named, all others are sent, compressed
//! together with the rest of their batch.

use super::batch::{Entry, Writer};
use super::digest::CHECK;
use super::encode::{Batch, Encoding, Place};
use super::images::Images;
use super::{Digester, PAGE_SIZE, Page};

/// Encodes pages as they are.
pub struct PlainEncoder {
    digester: Digester,
    images: Option<Box<dyn Images>>,
    batch: Writer,
    raw: u64,
    encoding: Encoding,
}

impl std::fmt::Debug for PlainEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PlainEncoder").field("encoding", &self.encoding).finish_non_exhaustive()
    }
}

impl PlainEncoder {
    /// Of the session of this digester.
    #[must_use]
    pub fn new(digester: Digester, images: Option<Box<dyn Images>>) -> Self {
        Self { digester, images, batch: Writer::default(), raw: 0, encoding: Encoding::default() }
    }

    /// How pages were sent so far.
    #[must_use]
    pub const fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// Whether the batch must be taken before the next page.
    #[must_use]
    pub fn is_full(&self) -> bool {
        !self.batch.has_room()
    }

    /// Adds a page; there must be room.
    pub fn encode(&mut self, place: Place, content: &Page) {
        self.raw += PAGE_SIZE as u64;
        if super::digest::is_zero(content) {
            self.encoding.zero += 1;
            self.batch.put(place.block, place.page, &Entry::Zero);
        } else if let Some(from) = self.images.as_mut().and_then(|images| images.find(content)) {
            self.encoding.image += 1;
            let digest = self.digester.page(content);
            let (check, _) = digest.split_first_chunk::<CHECK>().expect("a digest has more");
            self.batch.put(place.block, place.page, &Entry::Copy { block: from.block, page: from.page, check: *check });
        } else {
            self.encoding.data += 1;
            self.batch.put(place.block, place.page, &Entry::Data(content));
        }
    }

    /// The batch of all pages since the last call, if there are any.
    pub fn take(&mut self) -> Option<Batch> {
        let raw = std::mem::take(&mut self.raw);
        (!self.batch.is_empty()).then(|| Batch::after(self.batch.finish(), raw))
    }
}
