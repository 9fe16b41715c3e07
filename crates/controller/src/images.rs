//! Imported images: their content in files named after their id, whole or not there; what they are is checked before they exist.

use std::io::{self, SeekFrom};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use bytes::Bytes as Chunk;
use futures::{Stream, StreamExt};
use godwit_model::{Bytes, ErrorCode, ImageId, ImageKind, Refusal, Retry};
use tokio::fs::{self, File};
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};

use crate::clock;

mod validate;

/// Bytes from the beginning that decide what an image is.
const HEAD: u64 = 34_816;

/// The directory of images.
pub(crate) struct Images {
    dir: PathBuf,
    limit: Bytes,
}

/// Content that has arrived and is what it was said to be.
pub(crate) struct Received {
    pub(crate) id: ImageId,
    pub(crate) size: Bytes,
    pub(crate) digest: String,
}

/// A file that goes away unless it is kept.
struct Temporary(Option<PathBuf>);

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(path) = self.0.take() {
            // At worst the next start removes it.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn trouble(error: &io::Error) -> Refusal {
    if error.kind() == io::ErrorKind::StorageFull {
        return Refusal::new(ErrorCode::StoreFull, "the controller has no space for the image; nothing was kept")
            .hint("make space on the file system of the controller's data directory, then import again")
            .retry(Retry::Safe);
    }
    tracing::error!(%error, "an image cannot be stored or read");
    Refusal::new(ErrorCode::Internal, format!("the image cannot be stored or read: {error}")).retry(Retry::Safe)
}

impl Images {
    /// Opens the directory and removes what a crash left: files that `known` does not know.
    pub(crate) fn open_dir(dir: &Path, limit: Bytes, known: impl Fn(&str) -> bool) -> io::Result<Self> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            if !entry.file_name().to_str().is_some_and(&known) {
                tracing::info!(file = ?entry.file_name(), "an image that was never finished is removed");
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(Self { dir: dir.to_owned(), limit })
    }

    fn path(&self, id: ImageId) -> PathBuf {
        self.dir.join(id.to_string())
    }

    /// What is said to a body of `size` before it is read.
    pub(crate) fn check_size(&self, size: u64) -> Result<(), Refusal> {
        if size > self.limit.0 {
            return Err(Refusal::new(
                ErrorCode::BodyTooLarge,
                format!("an image has at most {}, this has {}", self.limit, Bytes(size)),
            )
            .hint("import a smaller image, or raise the controller's limit for images"));
        }
        Ok(())
    }

    /// Takes in content. Nothing is left of what is refused, or of what ends too early.
    pub(crate) async fn receive<E>(
        &self,
        kind: ImageKind,
        content: impl Stream<Item = Result<Chunk, E>>,
    ) -> Result<Received, Refusal>
    where
        E: std::fmt::Display,
    {
        let id = ImageId::new(clock::fresh());
        let path = self.dir.join(format!("{id}.new"));
        let mut temporary = Temporary(Some(path.clone()));
        let mut file = File::options().read(true).write(true).create_new(true).open(&path).await.map_err(|e| trouble(&e))?;
        let mut hasher = blake3::Hasher::new();
        let mut size = 0_u64;
        let mut content = std::pin::pin!(content);
        while let Some(chunk) = content.next().await {
            let chunk = chunk.map_err(|error| {
                Refusal::new(ErrorCode::BadRequest, format!("the upload broke off after {size} bytes: {error}"))
                    .hint("import it again")
                    .retry(Retry::Safe)
            })?;
            size += chunk.len() as u64;
            self.check_size(size)?;
            hasher.update(&chunk);
            file.write_all(&chunk).await.map_err(|error| trouble(&error))?;
        }
        file.flush().await.map_err(|error| trouble(&error))?;
        file.seek(SeekFrom::Start(0)).await.map_err(|error| trouble(&error))?;
        let mut head = Vec::new();
        (&mut file).take(HEAD).read_to_end(&mut head).await.map_err(|error| trouble(&error))?;
        validate::validate(kind, &head, size)
            .map_err(|invalid| Refusal::new(ErrorCode::ImageInvalid, invalid.to_string()).hint(invalid.fix()))?;
        file.sync_all().await.map_err(|error| trouble(&error))?;
        fs::rename(&path, self.path(id)).await.map_err(|error| trouble(&error))?;
        temporary.0 = None;
        let dir = File::open(&self.dir).await.map_err(|error| trouble(&error))?;
        dir.sync_all().await.map_err(|error| trouble(&error))?;
        Ok(Received { id, size: Bytes(size), digest: hasher.finalize().to_hex().to_string() })
    }

    /// Removes content. What is not there is as good as removed.
    pub(crate) async fn remove(&self, id: ImageId) {
        if let Err(error) = fs::remove_file(self.path(id)).await
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(image = %id, %error, "the content of a deleted image cannot be removed; the next start tries again");
        }
    }

    /// Content to read.
    pub(crate) async fn open(&self, id: ImageId) -> Result<File, Refusal> {
        File::open(self.path(id)).await.map_err(|error| trouble(&error))
    }
}
