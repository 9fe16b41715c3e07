//! `godwit image`: what VMs boot or are copied from.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, Subcommand, ValueEnum};
use futures::{Stream, StreamExt};
use godwit_api::v1::{Image, Vm};
use godwit_model::{Boot, Bytes, BytesPerSec, ImageKind, Name};
use tokio::io::AsyncRead;
use tokio_util::io::ReaderStream;

use crate::confirm::{ConfirmArgs, each};
use crate::error::Failure;
use crate::output::{Facts, Table, print, print_data, word};
use crate::progress::StatusLine;
use crate::session::Session;
use crate::text::{moment, visible};
use crate::watch::watch;

/// Bytes read at once.
const CHUNK: usize = 256 << 10;

/// What can be done with images.
#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Bring a file into the cluster as an image
    #[command(after_help = "Examples:
  godwit image import debian-kernel vmlinuz-6.1 --kind kernel
  zstdcat disk.raw.zst | godwit image import debian - --kind raw")]
    Import(ImportArgs),
    /// List images
    List {
        /// Go on with every change, as JSON lines
        #[arg(long)]
        watch: bool,
    },
    /// Show an image
    Show {
        /// Its name
        name: Name,
    },
    /// Delete images
    Delete {
        /// Their names
        #[arg(required = true, value_name = "NAME")]
        names: Vec<Name>,
        #[command(flatten)]
        confirm: ConfirmArgs,
    },
}

/// What to import.
#[derive(Args)]
pub(crate) struct ImportArgs {
    /// Name of the image
    name: Name,
    /// The file; `-` for standard input
    file: PathBuf,
    /// What it is; declared, never guessed
    #[arg(long, value_enum)]
    kind: KindArg,
}

#[derive(Clone, Copy, ValueEnum)]
enum KindArg {
    /// A bzImage for direct boot
    Kernel,
    /// An initial ramdisk
    Initrd,
    /// A raw disk
    Raw,
    /// A qcow2 disk without backing file
    Qcow2,
    /// The content of a CD-ROM
    Iso,
}

pub(crate) async fn run(session: Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::Import(args) => import(&session, args).await,
        Verb::List { watch: true } => watch::<Image>(&session.client).await,
        Verb::List { watch: false } => {
            let images = session.client.images().await?;
            print_data(session.format, &images, || {
                let mut table = Table::new(&["NAME", "KIND", "SIZE", "TEAM", "CREATED"]);
                for image in &images {
                    let (name, team) = (image.name.to_string(), image.team.to_string());
                    table.row([name, word(&image.kind), image.size.to_string(), team, moment(image.created)]);
                }
                table.render()
            })
        }
        Verb::Show { name } => {
            let image = session.client.image(&name).await?;
            print_data(session.format, &image, || {
                let mut facts = Facts::default();
                facts.fact("Name", &image.name).fact("Kind", word(&image.kind)).fact("Size", image.size);
                facts.fact("BLAKE3", &image.digest).fact("Id", image.id).fact("Team", &image.team);
                facts.fact("Created", moment(image.created)).render()
            })
        }
        Verb::Delete { names, confirm } => delete(&session, &names, &confirm).await,
    }
}

async fn import(session: &Session, args: ImportArgs) -> Result<(), Failure> {
    let kind = match args.kind {
        KindArg::Kernel => ImageKind::Kernel,
        KindArg::Initrd => ImageKind::Initrd,
        KindArg::Raw => ImageKind::Raw,
        KindArg::Qcow2 => ImageKind::Qcow2,
        KindArg::Iso => ImageKind::Iso,
    };
    let image = if args.file == Path::new("-") {
        session.client.import_image(&args.name, kind, metered(tokio::io::stdin(), None)).await?
    } else {
        let refused = |source| Failure::File { action: "read", path: args.file.clone(), source };
        let mut file = std::fs::File::open(&args.file).map_err(refused)?;
        // A directory opens but does not read; better to know before anything is sent.
        let _: usize = file.read(&mut []).map_err(refused)?;
        let size = file.metadata().ok().filter(std::fs::Metadata::is_file).map(|meta| Bytes(meta.len()));
        session.client.import_image(&args.name, kind, metered(tokio::fs::File::from_std(file), size)).await?
    };
    print_data(session.format, &image, || format!("image {} imported: {}, {}", image.name, word(&image.kind), image.size))
}

/// The chunks of `reader`, with their progress on the terminal.
fn metered(
    reader: impl AsyncRead + Send + Sync + 'static,
    size: Option<Bytes>,
) -> impl Stream<Item = io::Result<bytes::Bytes>> + Send + Sync + 'static {
    let begun = Instant::now();
    let mut sent = 0;
    let mut line = StatusLine::on_terminal();
    ReaderStream::with_capacity(reader, CHUNK).inspect(move |chunk| {
        sent += chunk.as_ref().map_or(0, |chunk| chunk.len() as u64);
        if let Some(line) = &mut line {
            line.write(&transfer(Bytes(sent), size, begun.elapsed().as_millis()));
        }
    })
}

fn transfer(sent: Bytes, size: Option<Bytes>, millis: u128) -> String {
    let rate = u128::from(sent.get()) * 1_000 / millis.max(1);
    let rate = BytesPerSec(u64::try_from(rate).unwrap_or(u64::MAX));
    match size {
        Some(size) => format!("sent {sent} of {size} ({} %), {rate}", u128::from(sent.get()) * 100 / u128::from(size.get().max(1))),
        None => format!("sent {sent}, {rate}"),
    }
}

async fn delete(session: &Session, names: &[Name], confirm: &ConfirmArgs) -> Result<(), Failure> {
    if confirm.dry_run {
        let vms = session.client.vms().await?;
        return each(names, async |name| {
            let image = session.client.image(name).await?;
            let users: Vec<&str> = vms.iter().filter(|vm| uses(vm, name)).map(|vm| vm.name.as_str()).collect();
            let users = if users.is_empty() { String::new() } else { format!("; VMs refer to it: {}", users.join(", ")) };
            print(&visible(&format!("image {name} ({}) would be deleted{users}", image.size)))
        })
        .await;
    }
    let list: Vec<&str> = names.iter().map(Name::as_str).collect();
    confirm.confirm(&format!("Delete image {}", list.join(", ")))?;
    each(names, async |name| {
        session.client.delete_image(name).await?;
        print(&format!("image {name} deleted"))
    })
    .await
}

fn uses(vm: &Vm, image: &Name) -> bool {
    let booted = match &vm.spec.boot {
        Boot::Kernel { kernel, initrd, .. } => kernel == image || initrd.as_ref() == Some(image),
        Boot::Disk => false,
    };
    booted || vm.spec.disks.iter().any(|disk| disk.image.as_ref() == Some(image))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_shows_its_rate_and_share() {
        assert_eq!(transfer(Bytes::mib(5), Some(Bytes::mib(10)), 1_000), "sent 5 MiB of 10 MiB (50 %), 5 MiB/s");
        assert_eq!(transfer(Bytes(0), Some(Bytes(0)), 0), "sent 0 B of 0 B (0 %), 0 B/s");
        assert_eq!(transfer(Bytes::mib(5), None, 500), "sent 5 MiB, 10 MiB/s");
    }
}
