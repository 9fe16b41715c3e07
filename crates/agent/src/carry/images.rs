//! Images that the VM was made from, at both ends of a move.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use godwit_carrier::Image;
use godwit_carrier::pages::{FIRST_IMAGE, Images, PAGE_SIZE, Page, Place};
use godwit_vault::{ImageIndex, ImageIndexError};

/// An image of the source, with its index.
pub(super) struct OwnImage {
    image: File,
    index: ImageIndex,
}

impl OwnImage {
    pub(super) fn read(image: OwnedFd, index: OwnedFd) -> Result<Self, ImageIndexError> {
        Ok(Self { image: image.into(), index: ImageIndex::read(File::from(index))? })
    }

    /// Where it has this very content.
    fn find(&self, content: &Page) -> Option<u32> {
        let page = self.index.find(content)?;
        let mut there = [0; PAGE_SIZE];
        self.image.read_exact_at(&mut there, u64::from(page) * PAGE_SIZE as u64).ok()?;
        (there == *content).then_some(page)
    }
}

/// Those that the destination has, too, by its numbers.
pub(super) struct SharedImages(Vec<(u16, OwnImage)>);

impl SharedImages {
    /// `told` is what the destination has said. None if there is no such image.
    pub(super) fn new(own: Vec<OwnImage>, told: &[Image]) -> Option<Self> {
        let number = |own: &OwnImage| {
            let same = |image: &Image| image.digest == *own.index.digest() && image.pages == own.index.pages();
            told.iter().position(same).and_then(|number| FIRST_IMAGE.checked_add(u16::try_from(number).ok()?))
        };
        let shared: Vec<_> = own.into_iter().filter_map(|own| Some((number(&own)?, own))).collect();
        (!shared.is_empty()).then_some(Self(shared))
    }
}

impl Images for SharedImages {
    fn find(&mut self, content: &Page) -> Option<Place> {
        self.0.iter().find_map(|(block, image)| Some(Place { block: *block, page: image.find(content)? }))
    }
}

/// An image of the destination.
pub(crate) struct ReadableImage {
    file: File,
    told: Image,
}

impl ReadableImage {
    pub(crate) fn new(file: OwnedFd, told: Image) -> Self {
        Self { file: file.into(), told }
    }

    pub(super) const fn told(&self) -> Image {
        self.told
    }

    pub(super) fn read(&self, page: u32, into: &mut Page) -> io::Result<()> {
        self.file.read_exact_at(into, u64::from(page) * PAGE_SIZE as u64)
    }
}
