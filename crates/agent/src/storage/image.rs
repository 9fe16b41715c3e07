//! The cache of images: files by the digest of their content. A file under a digest was verified before it got that name.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::{Stream, StreamExt};
use godwit_model::{ErrorCode, ImageRef, Refusal, Retry};
use tokio::io::AsyncWriteExt;
use uuid::Uuid;

use super::{blocking, refusal};

mod index;

pub(crate) use index::IndexedImage;

const PARTIAL: &str = "partial-";

/// Images of this host. Cheap to clone.
#[derive(Clone)]
pub(crate) struct ImageCache {
    inner: Arc<Inner>,
}

struct Inner {
    directory: PathBuf,
    /// One lock per digest: the second who wants an image waits for the first.
    fetching: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Whose index is being made.
    indexing: Mutex<HashSet<blake3::Hash>>,
}

impl Inner {
    fn indexing(&self) -> MutexGuard<'_, HashSet<blake3::Hash>> {
        self.indexing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An image on this host.
#[derive(Debug)]
pub(crate) struct CachedImage {
    /// Where it is; readable for all who get there.
    pub(crate) path: PathBuf,
    /// Opened for reading.
    pub(crate) file: OwnedFd,
}

/// A file being fetched: removed when dropped.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl ImageCache {
    /// Opens the cache in a directory of one agent, makes it if it is missing, and removes what was half fetched.
    ///
    /// # Errors
    /// The operating system's reason.
    pub(crate) fn open(directory: PathBuf) -> io::Result<Self> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
        for entry in std::fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(PARTIAL) {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(Self { inner: Arc::new(Inner { directory, fetching: Mutex::default(), indexing: Mutex::default() }) })
    }

    /// The file with exactly this content, mode 0444. It is fetched unless it is there; whoever asks meanwhile waits for it.
    ///
    /// # Errors
    /// `image_invalid` if what was fetched is something else; `not_enough_space`; `host_failed` if fetching or writing fails.
    pub(crate) async fn get<S, B>(&self, image: &ImageRef, fetch: impl FnOnce() -> S) -> Result<CachedImage, Refusal>
    where
        S: Stream<Item = io::Result<B>>,
        B: AsRef<[u8]>,
    {
        let digest = blake3::Hash::from_hex(&image.digest).map_err(|_| {
            Refusal::new(ErrorCode::ImageInvalid, format!("image {} has no valid digest", image.id)).hint("import the image anew")
        })?;
        let name = digest.to_hex().to_string();
        let lock = Arc::clone(self.inner.fetching.lock().unwrap_or_else(PoisonError::into_inner).entry(name.clone()).or_default());
        let _one = lock.lock().await;
        let path = self.inner.directory.join(&name);
        if let Some(found) = open(&path, image).await? {
            return Ok(found);
        }
        let partial = Partial(self.inner.directory.join(format!("{PARTIAL}{}", Uuid::new_v4())));
        receive(&partial.0, image, digest, fetch()).await?;
        let (from, to) = (partial.0.clone(), path.clone());
        let directory = self.inner.directory.clone();
        let publish = move || std::fs::rename(from, to).and_then(|()| std::fs::File::open(directory)?.sync_all());
        blocking(move || publish().map_err(|error| refusal::system("keep an image", &error))).await?;
        tracing::info!(image = %image.id, size = %image.size, "image fetched");
        open(&path, image).await?.ok_or_else(|| refusal::system("open an image just fetched", &io::ErrorKind::NotFound.into()))
    }
}

/// Opens an image that is there and whole.
async fn open(path: &Path, image: &ImageRef) -> Result<Option<CachedImage>, Refusal> {
    let (path, size) = (path.to_owned(), image.size.get());
    let open = move || {
        let file = match std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let facts = file.metadata()?;
        // Cut short, by a disk that lost it: fetched anew.
        let whole = facts.is_file() && facts.len() == size;
        Ok(whole.then(|| CachedImage { path, file: file.into() }))
    };
    blocking(move || open().map_err(|error| refusal::system("open an image", &error))).await
}

/// Writes a stream into a new file while it verifies it.
async fn receive<B: AsRef<[u8]>>(
    path: &Path,
    image: &ImageRef,
    digest: blake3::Hash,
    stream: impl Stream<Item = io::Result<B>>,
) -> Result<(), Refusal> {
    let write = |error| refusal::system(&format!("write image {}", image.id), &error);
    let wrong = |facts: String| {
        let facts = format!("image {} {facts}", image.id);
        Refusal::new(ErrorCode::ImageInvalid, facts)
            .hint("import the image anew: the controller's copy is damaged")
            .retry(Retry::Safe)
    };
    let mut file = tokio::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).await.map_err(write)?;
    let (mut hasher, mut length) = (blake3::Hasher::new(), 0_u64);
    let mut stream = std::pin::pin!(stream);
    while let Some(part) = stream.next().await {
        let part = part.map_err(|error| {
            Refusal::new(ErrorCode::HostFailed, format!("fetching image {} failed after {length} bytes: {error}", image.id))
                .hint("try again once the host is connected to its controller")
                .retry(Retry::Safe)
        })?;
        let part = part.as_ref();
        length += part.len() as u64;
        if length > image.size.get() {
            return Err(wrong(format!("is longer than its {} bytes", image.size.get())));
        }
        hasher.update(part);
        file.write_all(part).await.map_err(write)?;
    }
    if length != image.size.get() {
        return Err(wrong(format!("ended after {length} of {} bytes", image.size.get())));
    }
    let found = hasher.finalize();
    if found != digest {
        return Err(wrong(format!("should have digest {digest}, what came has {found}")));
    }
    file.set_permissions(std::fs::Permissions::from_mode(0o444)).await.map_err(write)?;
    file.flush().await.map_err(write)?;
    file.sync_all().await.map_err(write)
}
