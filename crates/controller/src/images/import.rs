//! An import that takes its time: fetched if it comes from a URL, taken out of its appliance, converted, checked, published. Begun again
//! after a crash from the source, which stays until the image exists.

use std::fs::File as StdFile;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use godwit_api::v1::Transfer;
use godwit_model::{Bytes, ErrorCode, ImageId, ImportFormat, Refusal};
use tokio::fs::{self, File};
use tokio::sync::watch;

use super::convert::Format;
use super::{HEAD, Images, Received, Temporary, blocking, check_url, fetch, measure, ova, source_of, trouble, vmdk};
use crate::rows::ImportSource;

/// Largest virtual size of a disk that is converted.
const MAX_DISK: u64 = 64 << 40;

/// What an import does right now.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ImportStep {
    /// For people.
    pub(crate) step: &'static str,
    /// How far it is.
    pub(crate) transfer: Option<Transfer>,
}

/// Reads a SHA-256 in hexadecimal.
///
/// # Errors
/// `bad_request` if it is not 64 digits.
pub(crate) fn read_sha256(digits: &str) -> Result<Vec<u8>, Refusal> {
    ova::read_hex(digits).filter(|bytes| bytes.len() == 32).ok_or_else(|| {
        Refusal::new(ErrorCode::BadRequest, "the SHA-256 is not 64 hexadecimal digits").hint("give it as `sha256sum` prints it")
    })
}

fn invalid(message: String, fix: &str) -> Refusal {
    Refusal::new(ErrorCode::ImageInvalid, message).hint(fix)
}

impl Images {
    /// Does the whole import of an image; may be begun again at any time.
    pub(crate) async fn import(
        &self,
        id: ImageId,
        format: ImportFormat,
        source: &ImportSource,
        said: &watch::Sender<ImportStep>,
    ) -> Result<Received, Refusal> {
        let path = self.dir.join(source_of(id));
        if !fs::try_exists(&path).await.map_err(|error| trouble(&error))? {
            let ImportSource::Url { url, sha256 } = source else {
                return Err(Refusal::new(ErrorCode::Internal, "what was uploaded is gone").hint("import it again"));
            };
            self.fetch(id, url, sha256.as_deref(), said).await?;
        }
        let temporary = match format {
            ImportFormat::Kernel | ImportFormat::Initrd | ImportFormat::Raw | ImportFormat::Iso | ImportFormat::Qcow2 => {
                let link = Temporary(self.dir.join(format!("{id}.new")));
                let _ = fs::remove_file(&link.0).await;
                fs::hard_link(&path, &link.0).await.map_err(|error| trouble(&error))?;
                link
            }
            ImportFormat::Vmdk => self.convert(id, path, Format::Vmdk, said).await?,
            ImportFormat::Vhdx => self.convert(id, path, Format::Vhdx, said).await?,
            ImportFormat::Ova => {
                said.send_replace(ImportStep { step: "takes the disk out of the appliance", transfer: None });
                let disk = self.unpack(id).await?;
                self.convert(id, disk.0.clone(), Format::Vmdk, said).await?
            }
        };
        said.send_replace(ImportStep { step: "checks the image", transfer: None });
        let measured = temporary.0.clone();
        let (size, digest) = blocking(move || measure(&measured).map_err(|error| trouble(&error))).await?;
        self.check_size(size.get())?;
        self.publish(id, format.becomes(), temporary, size, digest).await
    }

    async fn fetch(&self, id: ImageId, url: &str, sha256: Option<&str>, said: &watch::Sender<ImportStep>) -> Result<(), Refusal> {
        let digest = sha256.map(read_sha256).transpose()?;
        let (temporary, file) = self.temporary(id, "part").await?;
        let progress = |done: Bytes, total: Option<Bytes>| {
            let permille = total.map(|total| permille(done, total));
            said.send_replace(ImportStep { step: "fetches", transfer: Some(Transfer { done: Some(done), total, permille }) });
        };
        fetch::fetch(&check_url(url)?, digest.as_deref(), self.limit, &self.rules, file, progress).await?;
        self.rename(temporary, &source_of(id)).await
    }

    /// Copies the disk of an appliance into a file of its own.
    async fn unpack(&self, id: ImageId) -> Result<Temporary, Refusal> {
        let (temporary, _) = self.temporary(id, "disk").await?;
        let (from, to) = (self.dir.join(source_of(id)), temporary.0.clone());
        blocking(move || {
            let mut archive = StdFile::open(from).map_err(|error| trouble(&error))?;
            let (start, size) = ova::find_disk(&mut archive).map_err(|error| {
                let fix = error.fix();
                invalid(error.to_string(), fix)
            })?;
            let copy = |mut archive: StdFile| -> io::Result<()> {
                archive.seek(SeekFrom::Start(start))?;
                let mut disk = StdFile::create(to)?;
                io::copy(&mut archive.take(size), &mut disk)?;
                Ok(())
            };
            copy(archive).map_err(|error| trouble(&error))
        })
        .await?;
        Ok(temporary)
    }

    async fn convert(
        &self,
        id: ImageId,
        from: PathBuf,
        format: Format,
        said: &watch::Sender<ImportStep>,
    ) -> Result<Temporary, Refusal> {
        let input = blocking(move || {
            let input = StdFile::open(from).map_err(|error| trouble(&error))?;
            if format == Format::Vmdk {
                check_vmdk(&input)?;
            }
            Ok(input)
        })
        .await?;
        let (temporary, output) = self.temporary(id, "new").await?;
        let output = output.into_std().await;
        let progress = |permille| {
            let transfer = Transfer { done: None, total: None, permille: Some(permille) };
            said.send_replace(ImportStep { step: "converts to qcow2", transfer: Some(transfer) });
        };
        progress(0);
        self.converter.convert((input, format), (output, Format::Qcow2), self.limit, progress).await?;
        Ok(temporary)
    }

    /// Removes what an import worked on.
    pub(crate) async fn remove_source(&self, id: ImageId) {
        let path = self.dir.join(source_of(id));
        if let Err(error) = fs::remove_file(&path).await
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(image = %id, %error, "what an import worked on cannot be removed; the next start tries again");
        }
    }

    /// The virtual size of the disk in an image.
    pub(super) async fn capacity(&self, file: &mut File, is_qcow2: bool) -> Result<Bytes, Refusal> {
        let file = file.try_clone().await.map_err(|error| trouble(&error))?.into_std().await;
        blocking(move || {
            let length = file.metadata().map_err(|error| trouble(&error))?.len();
            let mut size = [0; 8];
            if is_qcow2 {
                file.read_exact_at(&mut size, 24).map_err(|error| trouble(&error))?;
            }
            let size = if is_qcow2 { u64::from_be_bytes(size) } else { length };
            if size > MAX_DISK {
                return Err(invalid(format!("the disk is larger than {}", Bytes(MAX_DISK)), "use a smaller disk"));
            }
            Ok(Bytes(size))
        })
        .await
    }
}

fn check_vmdk(file: &StdFile) -> Result<(), Refusal> {
    let refuse = |error: vmdk::InvalidVmdk| invalid(error.to_string(), error.fix());
    let mut head = Vec::new();
    file.take(HEAD).read_to_end(&mut head).map_err(|error| trouble(&error))?;
    if let Some((start, length)) = vmdk::descriptor_of(&head).map_err(refuse)? {
        let mut descriptor = vec![0; length];
        file.read_exact_at(&mut descriptor, start)
            .map_err(|_| refuse(vmdk::InvalidVmdk::Header("its descriptor is beyond its end")))?;
        vmdk::check_descriptor(&descriptor).map_err(refuse)?;
    }
    Ok(())
}

fn permille(done: Bytes, total: Bytes) -> u16 {
    let permille = u128::from(done.get()) * 1_000 / u128::from(total.get().max(1));
    u16::try_from(permille).unwrap_or(1_000).min(1_000)
}
