//! Indexes of the cached images, by which a VM's move leaves out what both hosts have of the image that it was made from.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use godwit_model::ImageRef;
use godwit_vault::{ImageIndex, ImageIndexError};
use uuid::Uuid;

use super::{ImageCache, PARTIAL, blocking, open};
use crate::background;
use crate::storage::refusal;

const PREFIX: &str = "index-";

/// An image of this host with the index of what is in it.
#[derive(Debug)]
pub(crate) struct IndexedImage {
    pub(crate) image: OwnedFd,
    pub(crate) index: OwnedFd,
}

impl ImageCache {
    /// The image, if it is in the cache.
    pub(crate) async fn find(&self, image: &ImageRef) -> Option<OwnedFd> {
        // What is no digest could be another path.
        let digest = blake3::Hash::from_hex(&image.digest).ok()?;
        let path = self.inner.directory.join(digest.to_hex().as_str());
        open(&path, image).await.ok().flatten().map(|found| found.file)
    }

    /// The image with its index. If it is here without a whole one, that is made for the next time.
    pub(crate) async fn find_indexed(&self, image: &ImageRef) -> Option<IndexedImage> {
        let file = self.find(image).await?;
        let path = self.index_path(image)?;
        let read = blocking(move || {
            let index = open_index(&path).and_then(|file| ImageIndex::read(&file).map(|_| ()));
            index
                .and_then(|()| open_index(&path))
                .map_err(|error| refusal::system("read the index of an image", &io::Error::other(error)))
        });
        match read.await {
            Ok(index) => Some(IndexedImage { image: file, index: index.into() }),
            Err(_) => {
                // Missing, or damaged.
                let _ = std::fs::remove_file(self.index_path(image)?);
                self.index_later(image).await;
                None
            }
        }
    }

    /// Makes the index of an image of this cache, unless it is there or being made, whenever there is time.
    pub(crate) async fn index_later(&self, image: &ImageRef) {
        let (Some(path), Ok(digest)) = (self.index_path(image), blake3::Hash::from_hex(&image.digest)) else { return };
        let Some(file) = self.find(image).await else { return };
        if path.exists() || !self.inner.indexing().insert(digest) {
            return;
        }
        let partial = self.inner.directory.join(format!("{PARTIAL}{}", Uuid::new_v4()));
        let (id, inner) = (image.id, Arc::clone(&self.inner));
        let work = move || {
            let made = make(&file.into(), *digest.as_bytes(), &partial).and_then(|()| std::fs::rename(&partial, &path));
            match made {
                Ok(()) => tracing::info!(image = %id, "image indexed"),
                Err(error) => {
                    let _ = std::fs::remove_file(&partial);
                    tracing::info!(image = %id, %error, "an image is not indexed");
                }
            }
            inner.indexing().remove(&digest);
        };
        if let Err(error) = background::spawn("index", work) {
            self.inner.indexing().remove(&digest);
            tracing::info!(image = %id, %error, "an image is not indexed");
        }
    }

    /// What is here under the digest differs from what another host has under it: it is fetched anew when it is wanted.
    pub(crate) async fn forget(&self, digest: &blake3::Hash) {
        let path = self.inner.directory.join(digest.to_hex().as_str());
        let removed =
            blocking(move || std::fs::remove_file(path).map_err(|error| refusal::system("remove an image", &error))).await;
        tracing::error!(%digest, ?removed, "an image is another here than where the VM is: one of the disks is damaged; this copy is fetched anew when it is wanted");
    }

    fn index_path(&self, image: &ImageRef) -> Option<PathBuf> {
        let digest = blake3::Hash::from_hex(&image.digest).ok()?;
        Some(self.inner.directory.join(format!("{PREFIX}{digest}")))
    }
}

fn open_index(path: &PathBuf) -> Result<File, ImageIndexError> {
    Ok(File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(path)?)
}

fn make(image: &File, digest: [u8; 32], partial: &PathBuf) -> io::Result<()> {
    let index = ImageIndex::build(image, digest)?;
    let file = File::options().write(true).create_new(true).mode(0o600).open(partial)?;
    index.write(io::BufWriter::new(&file))?;
    file.sync_all()
}
