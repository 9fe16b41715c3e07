//! An image on its way out: as it is kept, as qcow2, or as an appliance that other systems take.

use std::fs::File as StdFile;

use godwit_model::{Bytes, ErrorCode, ImageId, ImageKind, Name, Refusal};
use serde::Deserialize;
use tokio::fs::File;

use super::convert::Format;
use super::{Images, blocking, ova, trouble};
use crate::clock;

/// What an image is exported as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ExportFormat {
    /// As it is kept.
    #[default]
    Stored,
    /// A qcow2 disk.
    Qcow2,
    /// An appliance with one stream-optimised VMDK.
    Ova,
}

impl Images {
    /// The content of an image in a format, with its length. What had to be converted has no name any more and goes with the file.
    pub(crate) async fn export(
        &self,
        id: ImageId,
        kind: ImageKind,
        name: &Name,
        format: ExportFormat,
    ) -> Result<(File, Bytes), Refusal> {
        let mut stored = self.open(id).await?;
        let from = match kind {
            ImageKind::Raw => Format::Raw,
            ImageKind::Qcow2 => Format::Qcow2,
            _ if format == ExportFormat::Stored => Format::Raw,
            _ => {
                return Err(Refusal::new(ErrorCode::BadRequest, format!("image {name} is no disk"))
                    .hint("export it as it is stored: leave the format out"));
            }
        };
        let file = match (format, from) {
            (ExportFormat::Stored, _) | (ExportFormat::Qcow2, Format::Qcow2) => stored,
            (ExportFormat::Qcow2, _) => self.converted(&mut stored, from, Format::Qcow2).await?,
            (ExportFormat::Ova, _) => {
                let capacity = self.capacity(&mut stored, kind == ImageKind::Qcow2).await?;
                let vmdk = self.converted(&mut stored, from, Format::Vmdk).await?.into_std().await;
                let (temporary, out) = self.temporary(ImageId::new(clock::fresh()), "ova").await?;
                let (name, out) = (name.to_string(), out.into_std().await);
                let written = blocking(move || {
                    let (mut vmdk, out): (StdFile, StdFile) = (vmdk, out);
                    ova::write(&out, &name, &mut vmdk, capacity).map_err(|error| trouble(&error))
                });
                written.await?;
                File::open(&temporary.0).await.map_err(|error| trouble(&error))?
            }
        };
        let length = file.metadata().await.map_err(|error| trouble(&error))?.len();
        Ok((file, Bytes(length)))
    }

    /// A converted copy that has no name.
    async fn converted(&self, stored: &mut File, from: Format, to: Format) -> Result<File, Refusal> {
        let input = stored.try_clone().await.map_err(|error| trouble(&error))?.into_std().await;
        let (temporary, output) = self.temporary(ImageId::new(clock::fresh()), "export").await?;
        self.converter.convert((input, from), (output.into_std().await, to), self.limit, |_| {}).await?;
        File::open(&temporary.0).await.map_err(|error| trouble(&error))
    }
}
