//! The images that a VM was made from, lent to the carries of its moves: what both hosts have of them does not travel.

use godwit_carrier::pages::PAGE_SIZE;
use godwit_model::ImageRef;
use godwit_qemu::PassedFds;

use super::actor::Actor;
use crate::carry::{ImageFd, IndexedImageFds};
use crate::storage::IndexedImage;

/// Most images of one VM that are looked into.
const MOST_IMAGES: usize = 4;

impl Actor {
    fn images(&self) -> Vec<ImageRef> {
        let disks = self.record.iter().flat_map(|record| &record.spec.disks);
        disks.filter_map(|disk| disk.image.as_ref()).map(|(image, _)| image.clone()).take(MOST_IMAGES).collect()
    }

    /// The images that the VM was made from, as far as this host has them and knows what is in them, for the carry that moves the VM away.
    pub(super) async fn lend_indexed_images(&self, fds: &mut PassedFds) -> Vec<IndexedImageFds> {
        let mut lent = Vec::new();
        for image in self.images() {
            if let Some(IndexedImage { image, index }) = self.host.images.find_indexed(&image).await {
                lent.push(IndexedImageFds { image_fd: fds.pass(image), index_fd: fds.pass(index) });
            }
        }
        lent
    }

    /// The images that the VM was made from, as far as this host has them, for the carry that waits for the VM.
    pub(super) async fn lend_images(&self, fds: &mut PassedFds) -> Vec<ImageFd> {
        let mut lent = Vec::new();
        for image in self.images() {
            let (Ok(digest), Ok(pages)) =
                (blake3::Hash::from_hex(&image.digest), u32::try_from(image.size.get() / PAGE_SIZE as u64))
            else {
                continue;
            };
            if let Some(file) = self.host.images.find(&image).await {
                lent.push(ImageFd { fd: fds.pass(file), digest: *digest.as_bytes(), pages });
            }
        }
        lent
    }
}
