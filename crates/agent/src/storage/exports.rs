//! Snapshots as directories of files: written for people, and read from what people bring. What they bring is hostile: a qcow2 file is copied, the copy is checked as any that comes from
//! outside, and only then `qemu-img` reads it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use godwit_model::spec::ResolvedDisk;
use godwit_model::{Bytes, DiskFormat, ErrorCode, Name, Refusal};

use super::driver::{Access, ExportRoom, Item, OpenError, Room, Storage};
use super::tables::{self, Unsound};
use super::{Pools, blocking, convert, refusal, volume};

/// The file with the digests of all others, as `b3sum` writes and checks them.
const SUMS: &str = "BLAKE3SUMS";
/// Longest such file that is read.
const MAX_SUMS: u64 = 64 << 10;
/// Bytes that are read at once.
const PIECE: usize = 1 << 20;
/// What snapshots count disks in.
const PAGE: u64 = 4_096;
const WRITE: &str = "write an export";
const READ: &str = "read what is to be imported";

/// An export that is being made: gone when it is dropped, unless it was published.
pub(crate) struct Export {
    room: Box<dyn ExportRoom>,
    sums: BTreeMap<String, String>,
    bytes: u64,
}

/// A file without a name: gone when it is dropped.
pub(crate) struct Unnamed(Box<dyn Room>);

impl Unnamed {
    /// Another descriptor of it.
    pub(crate) fn descriptor(&self) -> Result<OwnedFd, Refusal> {
        descriptor(self.0.file())
    }
}

fn descriptor(file: &File) -> Result<OwnedFd, Refusal> {
    file.try_clone().map(OwnedFd::from).map_err(|error| refusal::system(WRITE, &error))
}

fn invalid(facts: String) -> Refusal {
    Refusal::new(ErrorCode::SnapshotInvalid, facts)
        .hint("bring the files of an export as they were written; docs/spec/export.md says what each must be")
}

fn digest(file: &mut File) -> io::Result<blake3::Hash> {
    io::Seek::rewind(file)?;
    let (mut hasher, mut piece) = (blake3::Hasher::new(), vec![0; PIECE]);
    loop {
        match file.read(&mut piece) {
            Ok(0) => return Ok(hasher.finalize()),
            Ok(length) => drop(hasher.update(piece.get(..length).unwrap_or_default())),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

impl Export {
    /// A new file, for whoever fills it.
    pub(crate) fn create(&self, name: &str) -> Result<(File, OwnedFd), Refusal> {
        let file = self.room.create(name).map_err(|error| refusal::system(WRITE, &error))?;
        let theirs = descriptor(&file)?;
        Ok((file, theirs))
    }

    /// A file is whole: it is made durable, and its digest noted.
    pub(crate) async fn close(&mut self, name: &str, mut file: File) -> Result<(), Refusal> {
        let mut closing = move || {
            file.sync_all()?;
            Ok((digest(&mut file)?, file.metadata()?.len()))
        };
        let (digest, length) = blocking(move || closing().map_err(|error| refusal::system(WRITE, &error))).await?;
        self.sums.insert(name.to_owned(), digest.to_hex().to_string());
        self.bytes += length;
        Ok(())
    }

    /// A whole file with what can be read there.
    pub(crate) async fn write(&mut self, name: &str, mut content: impl Read + Send + 'static) -> Result<(), Refusal> {
        let (mut file, _) = self.create(name)?;
        let file = blocking(move || {
            io::copy(&mut content, &mut file).map_err(|error| refusal::system(WRITE, &error))?;
            Ok(file)
        });
        self.close(name, file.await?).await
    }

    /// The same, which people can run.
    pub(crate) async fn write_script(&mut self, name: &str, content: String) -> Result<(), Refusal> {
        let (file, _) = self.create(name)?;
        rustix::fs::fchmod(&file, rustix::fs::Mode::RWXU).map_err(|error| refusal::system(WRITE, &error.into()))?;
        io::Write::write_all(&mut &file, content.as_bytes()).map_err(|error| refusal::system(WRITE, &error))?;
        self.close(name, file).await
    }

    /// Gives it its name; where it is, and how large.
    pub(crate) async fn publish(self) -> Result<(PathBuf, Bytes), Refusal> {
        let Self { room, sums, bytes } = self;
        let text: String = sums.iter().map(|(name, digest)| format!("{digest}  {name}\n")).collect();
        let publishing = move || {
            let mut file = room.create(SUMS)?;
            io::Write::write_all(&mut file, text.as_bytes())?;
            file.sync_all()?;
            Ok((room.publish()?, Bytes(bytes + text.len() as u64)))
        };
        blocking(move || publishing().map_err(|error| refusal::system(WRITE, &error))).await
    }
}

impl Pools {
    /// Begins an export of a team in a pool.
    ///
    /// # Errors
    /// `pool_unavailable`, `not_enough_space`, `host_failed`.
    pub(crate) async fn begin_export(&self, pool: &Name, team: &Name, name: &Name) -> Result<Export, Refusal> {
        let (team, name) = (team.clone(), name.clone());
        let room = self.at(pool, move |storage| storage.begin_export(&team, &name).map_err(|error| refusal::system(WRITE, &error)));
        Ok(Export { room: room.await?, sums: BTreeMap::new(), bytes: 0 })
    }

    /// Room for a raw image in a pool.
    ///
    /// # Errors
    /// As [`Pools::begin_export`].
    pub(crate) async fn unnamed(&self, pool: &Name) -> Result<Unnamed, Refusal> {
        self.at(pool, move |storage| storage.begin().map(Unnamed).map_err(|error| refusal::system(WRITE, &error))).await
    }

    /// Writes a raw image as a qcow2 file of an export.
    ///
    /// # Errors
    /// As [`Pools::begin_export`].
    pub(crate) async fn export_disk(&self, export: &mut Export, name: &str, raw: &Unnamed, size: Bytes) -> Result<(), Refusal> {
        let (file, _) = export.create(name)?;
        let (from, to) = ((raw.0.file(), DiskFormat::Raw), (&file, DiskFormat::Qcow2));
        convert::convert(from, to, size, self.cage.as_deref(), WRITE).await?;
        export.close(name, file).await
    }

    /// What was brought under this name, see [`Brought`].
    ///
    /// # Errors
    /// `pool_unavailable`; `snapshot_invalid` for digests that are none.
    pub(crate) async fn brought(&self, pool: &Name, team: &Name, name: &Name) -> Result<Brought, Refusal> {
        let brought = Brought { pool: pool.clone(), team: team.clone(), name: name.clone(), sums: None };
        let Some(file) = self.find_brought(&brought, SUMS).await? else { return Ok(brought) };
        let read = blocking(move || {
            let mut text = String::new();
            file.take(MAX_SUMS).read_to_string(&mut text).map_err(|error| invalid(format!("{SUMS} cannot be read: {error}")))?;
            Ok(text)
        });
        let text = read.await?;
        let sum = |line: &str| {
            let (digest, name) = line.split_once("  ")?;
            Some((name.to_owned(), blake3::Hash::from_hex(digest).ok()?))
        };
        let sums: Option<BTreeMap<_, _>> = text.lines().map(sum).collect();
        Ok(Brought {
            sums: Some(Arc::new(sums.ok_or_else(|| invalid(format!("{SUMS} has a line that is no digest")))?)),
            ..brought
        })
    }

    async fn find_brought(&self, brought: &Brought, file: &str) -> Result<Option<File>, Refusal> {
        let (Brought { pool, team, name, .. }, file) = (brought.clone(), file.to_owned());
        self.at(&pool, move |storage| match storage.open_brought(&team, &name, &file) {
            Ok(found) => Ok(Some(found)),
            Err(OpenError::Missing) => Ok(None),
            Err(OpenError::Link | OpenError::NotAVolume) => Err(invalid(format!("{file} is a link, or no file"))),
            Err(OpenError::System(error)) => Err(refusal::system(READ, &error)),
            Err(OpenError::NoDirect) => Err(refusal::system(READ, &io::ErrorKind::Unsupported.into())),
        })
        .await
    }

    /// Opens a file that was brought; its digest is as it was said to be, if one was.
    ///
    /// # Errors
    /// `snapshot_invalid`; `pool_unavailable`, `host_failed`.
    pub(crate) async fn open_brought(&self, brought: &Brought, name: &str) -> Result<File, Refusal> {
        let Some(mut file) = self.find_brought(brought, name).await? else {
            return Err(invalid(format!("there is no {name} in {} of pool {}", brought.name, brought.pool)));
        };
        let (sums, name) = (brought.sums.clone(), name.to_owned());
        blocking(move || {
            if let Some(sums) = sums {
                let wanted = sums.get(&name).ok_or_else(|| invalid(format!("{SUMS} does not name {name}")))?;
                if digest(&mut file).map_err(|error| refusal::system(READ, &error))? != *wanted {
                    return Err(invalid(format!("{name} is not what {SUMS} says of it: it is damaged, or was changed")));
                }
            }
            io::Seek::rewind(&mut file).map_err(|error| refusal::system(READ, &error))?;
            Ok(file)
        })
        .await
    }

    /// Makes a file that was brought a raw image, as large as the VM's disk: a qcow2 file, or a raw one that is taken as it is.
    ///
    /// # Errors
    /// As [`Pools::open_brought`]; `not_enough_space`.
    pub(crate) async fn import_disk(
        &self,
        brought: &Brought,
        name: &str,
        format: DiskFormat,
        size: Bytes,
    ) -> Result<Unnamed, Refusal> {
        let mut from = self.open_brought(brought, name).await?;
        let what = name.to_owned();
        // Whoever brought it may still write to it: what is looked at is a copy.
        let copied = self.at(&brought.pool, move |storage| {
            let system = |error| refusal::system(READ, &error);
            let length = from.metadata().map_err(system)?.len();
            if storage.space().map_err(system)?.free.get() < length {
                return Err(refusal::no_space(READ, "the pool has less free than the file is long"));
            }
            let copy = storage.begin().map_err(system)?;
            io::copy(&mut from, &mut copy.file()).map_err(system)?;
            let has = check(copy.file(), &what, format, size)?;
            Ok((copy, has))
        });
        let (copy, has) = copied.await?;
        if format == DiskFormat::Raw {
            return Ok(Unnamed(copy));
        }
        let raw = self.unnamed(&brought.pool).await?;
        let converted =
            convert::convert((copy.file(), format), (raw.0.file(), DiskFormat::Raw), has, self.cage.as_deref(), READ).await;
        converted.map_err(|refusal| match refusal.code {
            ErrorCode::ImageInvalid => invalid(format!("{name} cannot be read: {}", refusal.message)),
            _ => refusal,
        })?;
        Ok(raw)
    }

    /// How large a volume is for its guest.
    ///
    /// # Errors
    /// As [`Pools::check`].
    pub(crate) async fn size_of(&self, disk: &ResolvedDisk) -> Result<Bytes, Refusal> {
        let disk = disk.clone();
        self.at(&disk.volume.pool.clone(), move |storage| size_of(storage, &disk)).await
    }
}

/// A directory in which somebody brought files for a team.
#[derive(Clone)]
pub(crate) struct Brought {
    pool: Name,
    team: Name,
    name: Name,
    /// Digests, if any were brought.
    sums: Option<Arc<BTreeMap<String, blake3::Hash>>>,
}

/// How large the disk in a copied file is, which is sound and as large as the VM's, but for the end of a page.
fn check(file: &File, name: &str, format: DiskFormat, size: Bytes) -> Result<Bytes, Refusal> {
    let system = |error| refusal::system(READ, &error);
    io::Seek::rewind(&mut &*file).map_err(system)?;
    let has = match format {
        DiskFormat::Raw => file.metadata().map_err(system)?.len(),
        DiskFormat::Qcow2 => {
            let header = volume::header(file).map_err(system)?.map_err(|unusable| invalid(format!("{name} {unusable}")))?;
            tables::check(file, &header).map_err(|unsound| match unsound {
                Unsound::Io(error) => system(error),
                unsound => invalid(format!("{name} is damaged or truncated: {unsound}")),
            })?;
            header.size
        }
    };
    if has.div_ceil(PAGE) == size.get().div_ceil(PAGE) {
        return Ok(Bytes(has.next_multiple_of(PAGE)));
    }
    Err(invalid(format!("{name} is a disk of {has} bytes, that of the VM has {}", size.get())))
}

fn size_of(storage: &dyn Storage, disk: &ResolvedDisk) -> Result<Bytes, Refusal> {
    let system = |error| refusal::system(&format!("read volume {}", disk.volume), &error);
    let file = volume::open_file(storage, &disk.volume, &Item::volume(&disk.volume.volume), Access::READ)?;
    match disk.format {
        DiskFormat::Raw => Ok(Bytes(file.metadata().map_err(system)?.len())),
        DiskFormat::Qcow2 => {
            let header = volume::header(&file).map_err(system)?;
            header.map(|header| Bytes(header.size)).map_err(|unusable| volume::unusable_volume(&disk.volume, unusable))
        }
    }
}
