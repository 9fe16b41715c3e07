//! Imported images: their content in files named after their id, whole or not there; what they are is checked before they exist.
//!
//! ```text
//!  ID          an image
//!  ID.source   what an import that is a task works on, whole as it came
//!  ID.*        on the way; of no use after a crash
//! ```

use std::io::{self, Read, SeekFrom};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use bytes::Bytes as Chunk;
use futures::{Stream, StreamExt};
use godwit_model::{Bytes, ErrorCode, ImageId, ImageKind, Refusal, Retry};
use tokio::fs::{self, File};
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};

use crate::clock;

mod address;
mod convert;
mod export;
mod fetch;
mod import;
mod ova;
mod validate;
mod vmdk;

pub use convert::Converter;
pub use fetch::FetchRules;

pub(crate) use export::ExportFormat;
pub(crate) use fetch::{check_url, shown};
pub(crate) use import::{ImportStep, read_sha256};

/// Bytes from the beginning that decide what an image is.
const HEAD: u64 = 34_816;

/// The directory of images.
pub(crate) struct Images {
    dir: PathBuf,
    limit: Bytes,
    converter: Converter,
    rules: FetchRules,
}

/// Content that has arrived and is what it was said to be.
pub(crate) struct Received {
    pub(crate) id: ImageId,
    pub(crate) size: Bytes,
    pub(crate) digest: String,
}

/// A file that goes away unless it got another name.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // At worst the next start removes it.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The name of what an import works on.
pub(crate) fn source_of(id: ImageId) -> String {
    format!("{id}.source")
}

/// Runs what blocks on a thread of its own.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Refusal> + Send + 'static) -> Result<T, Refusal> {
    let ended = |error| Refusal::new(ErrorCode::Internal, format!("work on an image ended unexpectedly: {error}"));
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(ended(error)))
}

/// Size and digest of a file, and its synced content.
fn measure(path: &Path) -> io::Result<(Bytes, blake3::Hash)> {
    let mut file = std::fs::File::open(path)?;
    file.sync_all()?;
    let (mut hasher, mut size, mut buffer) = (blake3::Hasher::new(), 0, vec![0; 1 << 20]);
    loop {
        let count = file.read(&mut buffer)?;
        let part = buffer.get(..count).unwrap_or_default();
        if part.is_empty() {
            return Ok((Bytes(size), hasher.finalize()));
        }
        hasher.update(part);
        size += part.len() as u64;
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
    pub(crate) fn open_dir(
        dir: &Path,
        limit: Bytes,
        (converter, rules): (Converter, FetchRules),
        known: impl Fn(&str) -> bool,
    ) -> io::Result<Self> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            if !entry.file_name().to_str().is_some_and(&known) {
                tracing::info!(file = ?entry.file_name(), "an image that was never finished is removed");
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(Self { dir: dir.to_owned(), limit, converter, rules })
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
        let (temporary, size, digest) = self.write(id, content).await?;
        self.publish(id, kind, temporary, size, digest).await
    }

    /// Keeps content that a task is going to work on. Nothing is left of what ends too early.
    pub(crate) async fn keep_source<E>(&self, id: ImageId, content: impl Stream<Item = Result<Chunk, E>>) -> Result<(), Refusal>
    where
        E: std::fmt::Display,
    {
        let (temporary, ..) = self.write(id, content).await?;
        self.rename(temporary, &source_of(id)).await
    }

    /// Writes content into a new file.
    async fn write<E>(
        &self,
        id: ImageId,
        content: impl Stream<Item = Result<Chunk, E>>,
    ) -> Result<(Temporary, Bytes, blake3::Hash), Refusal>
    where
        E: std::fmt::Display,
    {
        let (temporary, mut file) = self.temporary(id, "new").await?;
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
        file.sync_all().await.map_err(|error| trouble(&error))?;
        Ok((temporary, Bytes(size), hasher.finalize()))
    }

    /// A new file `ID.ending`, in place of what a crash may have left there.
    async fn temporary(&self, id: ImageId, ending: &str) -> Result<(Temporary, File), Refusal> {
        let path = self.dir.join(format!("{id}.{ending}"));
        let _ = fs::remove_file(&path).await;
        let temporary = Temporary(path.clone());
        let file = File::options().read(true).write(true).create_new(true).open(&path).await.map_err(|error| trouble(&error))?;
        Ok((temporary, file))
    }

    /// Gives a finished file its name, durably.
    async fn rename(&self, temporary: Temporary, to: &str) -> Result<(), Refusal> {
        fs::rename(&temporary.0, self.dir.join(to)).await.map_err(|error| trouble(&error))?;
        let dir = File::open(&self.dir).await.map_err(|error| trouble(&error))?;
        dir.sync_all().await.map_err(|error| trouble(&error))
    }

    /// Makes a finished file an image, if it is what it was said to be.
    async fn publish(
        &self,
        id: ImageId,
        kind: ImageKind,
        temporary: Temporary,
        size: Bytes,
        digest: blake3::Hash,
    ) -> Result<Received, Refusal> {
        let mut file = File::open(&temporary.0).await.map_err(|error| trouble(&error))?;
        let mut head = Vec::new();
        file.seek(SeekFrom::Start(0)).await.map_err(|error| trouble(&error))?;
        (&mut file).take(HEAD).read_to_end(&mut head).await.map_err(|error| trouble(&error))?;
        validate::validate(kind, &head, size.get())
            .map_err(|invalid| Refusal::new(ErrorCode::ImageInvalid, invalid.to_string()).hint(invalid.fix()))?;
        self.rename(temporary, &id.to_string()).await?;
        Ok(Received { id, size, digest: digest.to_hex().to_string() })
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
