//! `godwit image`: what VMs boot or are copied from.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, Subcommand, ValueEnum};
use futures::{Stream, StreamExt};
use godwit_api::client::Imported;
use godwit_api::v1::{Image, ImageFetch, Task, Vm};
use godwit_model::{Boot, Bytes, BytesPerSec, ImportFormat, Name};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio_util::io::ReaderStream;

use crate::confirm::{ConfirmArgs, each};
use crate::error::Failure;
use crate::output::{Facts, Table, note, print, print_data, word};
use crate::progress::StatusLine;
use crate::session::{Session, WaitArgs};
use crate::text::{moment, visible};
use crate::watch::watch;

/// Bytes read at once.
const CHUNK: usize = 256 << 10;

/// What can be done with images.
#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Bring a file, or what a URL names, into the cluster as an image
    #[command(after_help = "Examples:
  godwit image import debian-kernel vmlinuz-6.1 --kind kernel
  zstdcat disk.raw.zst | godwit image import debian - --kind raw
  godwit image import appliance web.ova --kind ova
  godwit image import debian https://images.example.org/debian.qcow2 --kind qcow2 --sha256 9f86d0…")]
    Import(ImportArgs),
    /// List images
    List {
        /// Go on with every change, as JSON lines
        #[arg(long)]
        watch: bool,
    },
    /// Write the content of an image into a file
    #[command(after_help = "Examples:
  godwit image export debian debian.qcow2 --format qcow2
  godwit image export debian - > debian.img")]
    Export(ExportArgs),
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
    /// The file, `-` for standard input, or an https:// URL that the controller fetches
    #[arg(value_name = "FILE|URL")]
    file: PathBuf,
    /// What it is; declared, never guessed
    #[arg(long, value_enum)]
    kind: KindArg,
    /// SHA-256 that what the URL names must have
    #[arg(long, value_name = "HEX")]
    sha256: Option<String>,
    #[command(flatten)]
    wait: WaitArgs,
}

/// What to export.
#[derive(Args)]
pub(crate) struct ExportArgs {
    /// Name of the image
    name: Name,
    /// The file, which must not exist yet; `-` for standard output
    file: PathBuf,
    /// What to write
    #[arg(long, value_enum, default_value = "stored")]
    format: ExportArg,
}

#[derive(Clone, Copy, ValueEnum)]
enum ExportArg {
    /// The content as it is kept
    Stored,
    /// A qcow2 disk
    Qcow2,
    /// An appliance with one disk
    Ova,
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
    /// A VMDK disk in one file; becomes qcow2
    Vmdk,
    /// A VHDX disk; becomes qcow2
    Vhdx,
    /// An appliance with one disk, which becomes qcow2
    Ova,
}

pub(crate) async fn run(session: Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::Import(args) => import(&session, args).await,
        Verb::Export(args) => export(&session, args).await,
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
        KindArg::Kernel => ImportFormat::Kernel,
        KindArg::Initrd => ImportFormat::Initrd,
        KindArg::Raw => ImportFormat::Raw,
        KindArg::Qcow2 => ImportFormat::Qcow2,
        KindArg::Iso => ImportFormat::Iso,
        KindArg::Vmdk => ImportFormat::Vmdk,
        KindArg::Vhdx => ImportFormat::Vhdx,
        KindArg::Ova => ImportFormat::Ova,
    };
    let url = args.file.to_str().filter(|text| text.contains("://"));
    if args.sha256.is_some() && url.is_none() {
        return Err(Failure::usage(
            "--sha256 goes with a URL",
            "a file's digest is checked with `sha256sum -c` before it is imported",
        ));
    }
    let imported = if let Some(url) = url {
        let request = ImageFetch { url: url.to_owned(), kind, sha256: args.sha256 };
        Imported::Task(Box::new(session.client.fetch_image(&args.name, &request).await?))
    } else if args.file == Path::new("-") {
        session.client.import_image(&args.name, kind, metered(tokio::io::stdin(), None)).await?
    } else {
        let refused = |source| Failure::File { action: "read", path: args.file.clone(), source };
        let mut file = std::fs::File::open(&args.file).map_err(refused)?;
        // A directory opens but does not read; better to know before anything is sent.
        let _: usize = file.read(&mut []).map_err(refused)?;
        let size = file.metadata().ok().filter(std::fs::Metadata::is_file).map(|meta| Bytes(meta.len()));
        session.client.import_image(&args.name, kind, metered(tokio::fs::File::from_std(file), size)).await?
    };
    let said = |image: &Image| format!("image {} imported: {}, {}", image.name, word(&image.kind), image.size);
    match imported {
        Imported::Image(image) => print_data(session.format, &image, || said(&image)),
        Imported::Task(task) => {
            let sentence = async |_: &Task| match session.client.image(&args.name).await {
                Ok(image) => said(&image),
                Err(_) => format!("image {} imported", args.name),
            };
            session.conclude(*task, &args.wait, None, sentence).await
        }
    }
}

async fn export(session: &Session, args: ExportArgs) -> Result<(), Failure> {
    let format = match args.format {
        ExportArg::Stored => "stored",
        ExportArg::Qcow2 => "qcow2",
        ExportArg::Ova => "ova",
    };
    let failed = |source| Failure::File { action: "write", path: args.file.clone(), source };
    let to_stdout = args.file == Path::new("-");
    // Claimed before anything is sent, and empty until all of it is there.
    let mut out: Box<dyn AsyncWrite + Unpin> = if to_stdout {
        Box::new(tokio::io::stdout())
    } else {
        Box::new(tokio::fs::OpenOptions::new().write(true).create_new(true).open(&args.file).await.map_err(failed)?)
    };
    let written = async {
        let (length, content) = session.client.export_image(&args.name, format).await?;
        let (begun, mut line, mut done) = (Instant::now(), StatusLine::on_terminal(), 0);
        let mut content = std::pin::pin!(content);
        while let Some(chunk) = content.next().await {
            let chunk = chunk?;
            out.write_all(&chunk).await.map_err(failed)?;
            done += chunk.len() as u64;
            if let Some(line) = &mut line {
                line.write(&transfer(Bytes(done), length.map(Bytes), begun.elapsed().as_millis()));
            }
        }
        out.flush().await.map_err(failed)?;
        Ok(done)
    };
    match written.await {
        Ok(done) if to_stdout => {
            note(&format!("image {} exported: {}", args.name, Bytes(done)));
            Ok(())
        }
        Ok(done) => print(&format!("image {} exported to {}: {}", args.name, args.file.display(), Bytes(done))),
        Err(failure) => {
            if !to_stdout {
                // Half an image is none.
                let _ = std::fs::remove_file(&args.file);
            }
            Err(failure)
        }
    }
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
        Some(size) => format!("{sent} of {size} ({} %), {rate}", u128::from(sent.get()) * 100 / u128::from(size.get().max(1))),
        None => format!("{sent}, {rate}"),
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
        assert_eq!(transfer(Bytes::mib(5), Some(Bytes::mib(10)), 1_000), "5 MiB of 10 MiB (50 %), 5 MiB/s");
        assert_eq!(transfer(Bytes(0), Some(Bytes(0)), 0), "0 B of 0 B (0 %), 0 B/s");
        assert_eq!(transfer(Bytes::mib(5), None, 500), "5 MiB, 10 MiB/s");
    }
}
