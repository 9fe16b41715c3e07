//! One volume: checked, drafted, opened, copied, made larger, removed.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use godwit_model::spec::ResolvedDisk;
use godwit_model::{Bytes, CacheMode, DiskFormat, ErrorCode, ImageKind, Name, Refusal, Retry, VolumeRef};

use super::driver::{Access, Hold, Item, OpenError, Record, Room, Storage};
use super::qcow2::{Header, MAX_HEADER, Unusable};
use super::refusal;
use super::tables::{self, Unsound};

const REPLACE: &str = "declare the format that the volume has, or replace the volume by one of the declared format";
const SUFFICIENT: &str = "replace the volume by one that is sufficient to itself (qemu-img convert makes one)";

/// A volume on its way: room for it, and what is to come into it.
pub(super) struct Draft {
    pub(super) volume: VolumeRef,
    pub(super) format: DiskFormat,
    pub(super) size: Bytes,
    pub(super) image: Option<(File, DiskFormat)>,
    pub(super) room: Box<dyn Room>,
}

impl Draft {
    /// Gives it its name. If another has that name by now, this one goes.
    pub(super) fn publish(self) -> Result<(), Refusal> {
        let item = Item::volume(&self.volume.volume);
        self.publish_as(&item).map(drop)
    }

    /// Gives it the name of this item; whether it has it then.
    pub(super) fn publish_as(self, item: &Item) -> Result<bool, Refusal> {
        let Self { volume, format, size, room, .. } = self;
        match room.publish(item, Record { format, size }) {
            Ok(won) => {
                tracing::info!(%volume, %item, %size, won, "volume created");
                Ok(won)
            }
            Err(error) => Err(refusal::system(&format!("finish volume {volume}"), &error)),
        }
    }
}

/// Whether anything has the volume's name.
pub(super) fn exists(storage: &dyn Storage, volume: &VolumeRef) -> Result<bool, Refusal> {
    storage.exists(&Item::volume(&volume.volume)).map_err(|error| refusal::system(&format!("look for volume {volume}"), &error))
}

/// See [`super::Pools::check`].
pub(super) fn check(storage: &dyn Storage, disk: &ResolvedDisk) -> Result<(), Refusal> {
    check_item(storage, disk, &Item::volume(&disk.volume.volume))
}

/// The same of what has another name than the disk's volume.
pub(super) fn check_item(storage: &dyn Storage, disk: &ResolvedDisk, item: &Item) -> Result<(), Refusal> {
    let volume = &disk.volume;
    let file = open_file(storage, volume, item, Access::READ)?;
    let system = |error: &std::io::Error| refusal::system(&format!("read volume {volume}"), error);
    let length = file.metadata().map_err(|error| system(&error))?.len();
    let record = storage.record(item, &file).map_err(|error| system(&error))?;
    if let Some(record) = record.filter(|record| record.format != disk.format) {
        let facts = format!("was created as {}, but is declared {}", record.format.driver(), disk.format.driver());
        return Err(refusal::format(volume, &facts, REPLACE));
    }
    let promised = record.map(|record| record.size).or(disk.create);
    if length == 0 {
        return Err(refusal::truncated(volume, "it is empty"));
    }
    match disk.format {
        DiskFormat::Raw => {
            // A guest may write what it likes into a disk that we made raw. Of one that came from elsewhere, this is an error of its owner.
            if record.is_none() && header(&file).map_err(|error| system(&error))?.is_ok() {
                return Err(refusal::format(volume, "is declared raw, but is a qcow2 file", REPLACE));
            }
            short_of(volume, Bytes(length), promised)?;
        }
        DiskFormat::Qcow2 => {
            let header = header(&file).map_err(|error| system(&error))?.map_err(|unusable| unusable_volume(volume, unusable))?;
            short_of(volume, Bytes(header.size), promised)?;
            if !storage.in_use(&file).map_err(|error| system(&error))? {
                tables::check(&file, &header).map_err(|unsound| match unsound {
                    Unsound::Truncated { .. } => refusal::truncated(volume, &unsound.to_string()),
                    Unsound::Damaged(_) => {
                        refusal::format(volume, &format!("is damaged: {unsound}"), "restore the volume from a backup")
                    }
                    Unsound::Io(error) => system(&error),
                })?;
            }
        }
    }
    if disk.cache == CacheMode::Direct
        && matches!(storage.open(item, Access { direct: true, ..Access::READ }), Err(OpenError::NoDirect))
    {
        return Err(no_direct(volume));
    }
    Ok(())
}

fn short_of(volume: &VolumeRef, size: Bytes, promised: Option<Bytes>) -> Result<(), Refusal> {
    match promised.filter(|promised| size < *promised) {
        Some(promised) => {
            let facts = format!("it should have {} bytes ({promised}), and has {} ({size})", promised.get(), size.get());
            Err(refusal::truncated(volume, &facts))
        }
        None => Ok(()),
    }
}

pub(super) fn unusable_volume(volume: &VolumeRef, unusable: Unusable) -> Refusal {
    match unusable {
        Unusable::Short => refusal::truncated(volume, "it ends within its qcow2 header"),
        Unusable::Magic => refusal::format(volume, "is declared qcow2, but does not begin as a qcow2 file", REPLACE),
        Unusable::Backing | Unusable::DataFile => {
            refusal::format(volume, &format!("{unusable}: it refers outside itself"), SUFFICIENT)
        }
        _ => refusal::format(volume, &unusable.to_string(), "replace the volume, or repair a copy of it (qemu-img check -r all)"),
    }
}

/// The qcow2 header at the beginning of `file`, if it is one.
pub(super) fn header(file: &File) -> std::io::Result<Result<Header, Unusable>> {
    let mut beginning = Vec::new();
    file.take(MAX_HEADER as u64).read_to_end(&mut beginning)?;
    Ok(Header::parse(&beginning))
}

/// Decides how a missing volume is made, and begins with it.
pub(super) fn draft(storage: &dyn Storage, disk: &ResolvedDisk, image: Option<&Path>) -> Result<Draft, Refusal> {
    let volume = disk.volume.clone();
    let image = match (&disk.image, image) {
        (None, _) => None,
        (Some((_, kind)), Some(path)) => Some(open_image(path, *kind)?),
        (Some((image, _)), None) => {
            return Err(Refusal::new(ErrorCode::Internal, format!("image {} for volume {volume} was not fetched", image.id))
                .hint("try again")
                .retry(Retry::Safe));
        }
    };
    let content = image.as_ref().map(|(_, _, size)| *size);
    let size = match (disk.create, content) {
        (None, None) => return Err(refusal::missing(&volume)),
        (Some(size), Some(content)) if size < content => {
            let facts = format!("volume {volume} is to have {size}, but its image has {content}");
            return Err(
                Refusal::new(ErrorCode::SpecInvalid, facts).hint("leave the size away, or make it at least that of the image")
            );
        }
        (Some(size), _) | (None, Some(size)) => size,
    };
    let doing = format!("create volume {volume}");
    if let Some((file, ..)) = &image {
        let system = |error| refusal::system(&doing, &error);
        let needed = Bytes(std::os::unix::fs::MetadataExt::blocks(&file.metadata().map_err(system)?).saturating_mul(512));
        let free = storage.space().map_err(system)?.free;
        if free < needed {
            let facts = format!(
                "the image takes {needed}, pool {} has {free} free, {} too little",
                volume.pool,
                Bytes(needed.get() - free.get())
            );
            return Err(refusal::no_space(&doing, &facts));
        }
    }
    let room = storage.begin().map_err(|error| refusal::system(&doing, &error))?;
    Ok(Draft { volume, format: disk.format, size, image: image.map(|(file, format, _)| (file, format)), room })
}

/// Opens an image that `qemu-img` may read, with its format and the size of the disk in it.
fn open_image(path: &Path, kind: ImageKind) -> Result<(File, DiskFormat, Bytes), Refusal> {
    let system = |error| refusal::system("read a disk image", &error);
    let file = File::open(path).map_err(system)?;
    let length = file.metadata().map_err(system)?.len();
    match kind {
        ImageKind::Raw if length == 0 => Err(refusal::image("is empty")),
        ImageKind::Raw => Ok((file, DiskFormat::Raw, Bytes(length.next_multiple_of(512)))),
        ImageKind::Qcow2 => {
            let header = header(&file).map_err(system)?.map_err(|unusable| refusal::image(&unusable.to_string()))?;
            tables::check(&file, &header).map_err(|unsound| match unsound {
                Unsound::Io(error) => system(error),
                unsound => refusal::image(&format!("is damaged or truncated: {unsound}")),
            })?;
            Ok((file, DiskFormat::Qcow2, Bytes(header.size.next_multiple_of(512))))
        }
        ImageKind::Kernel | ImageKind::Initrd | ImageKind::Iso => {
            Err(refusal::image("is a kernel, an initrd or a CD-ROM, not a disk"))
        }
    }
}

/// See [`super::Pools::prepare_copy`].
pub(super) fn copy(storage: &dyn Storage, volume: &VolumeRef, from: &Path) -> Result<(), Refusal> {
    let system = |error| refusal::system(&format!("create volume {volume}"), &error);
    let mut from = File::open(from).map_err(system)?;
    let room = storage.begin().map_err(system)?;
    let size = Bytes(std::io::copy(&mut from, &mut room.file()).map_err(system)?);
    Draft { volume: volume.clone(), format: DiskFormat::Raw, size, image: None, room }.publish()
}

/// See [`super::Pools::open_exact`].
pub(super) fn open_exact(storage: &dyn Storage, volume: &VolumeRef, size: Bytes) -> Result<(OwnedFd, OwnedFd), Refusal> {
    let (read_only, read_write) = open(storage, volume, CacheMode::Direct)?;
    let file = File::from(read_only);
    let length = file.metadata().map_err(|error| refusal::system(&format!("read volume {volume}"), &error))?.len();
    if length != size.get() {
        let facts = format!("has {length} bytes, firmware variables have {}", size.get());
        return Err(refusal::format(volume, &facts, "name a volume that does not exist, so that it is created"));
    }
    Ok((file.into(), read_write))
}

/// By what it is seen that nobody has written to a volume: which file it is, how long, and when it was last written. A block device tells only which it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    file: [u64; 3],
    length: u64,
    written: (i64, i64),
}

/// See [`super::Pools::stamp`].
pub(super) fn stamp(storage: &dyn Storage, volume: &VolumeRef) -> Result<Stamp, Refusal> {
    let file = open_file(storage, volume, &Item::volume(&volume.volume), Access::READ)?;
    let facts = file.metadata().map_err(|error| refusal::system(&format!("look at volume {volume}"), &error))?;
    let written = if facts.is_file() { (facts.mtime(), facts.mtime_nsec()) } else { (0, 0) };
    Ok(Stamp { file: [facts.dev(), facts.ino(), facts.rdev()], length: facts.len(), written })
}

/// See [`super::Pools::open_disk`].
pub(super) fn open(storage: &dyn Storage, volume: &VolumeRef, cache: CacheMode) -> Result<(OwnedFd, OwnedFd), Refusal> {
    open_item(storage, volume, &Item::volume(&volume.volume), cache)
}

/// The same of what has another name.
pub(super) fn open_item(
    storage: &dyn Storage,
    volume: &VolumeRef,
    item: &Item,
    cache: CacheMode,
) -> Result<(OwnedFd, OwnedFd), Refusal> {
    // Exactly the flags that QEMU will look for among its descriptors, direct I/O included.
    let open = |write| {
        let access = Access { write, direct: cache == CacheMode::Direct };
        open_file(storage, volume, item, access).map(OwnedFd::from)
    };
    Ok((open(false)?, open(true)?))
}

/// Keeps what is in a volume under a name of its own, see [`super::suite`].
pub(super) fn snapshot(storage: &dyn Storage, volume: &VolumeRef, name: &Name, declared: DiskFormat) -> Result<(), Refusal> {
    let doing = format!("make snapshot {name} of volume {volume}");
    let (file, record) = hold(storage, volume, &Item::volume(&volume.volume), (Hold::Still, declared), &doing)?;
    made(storage.snapshot(&file, &Item::snapshot(&volume.volume, name), record), &doing, &format!("{volume}@{name}"))
}

/// Makes volume `to` of the same pool from a volume, or from a snapshot of it.
pub(super) fn clone(
    storage: &dyn Storage,
    from: &VolumeRef,
    snapshot: Option<&Name>,
    to: &Name,
    declared: DiskFormat,
) -> Result<(), Refusal> {
    let doing = format!("clone volume {from} as {to}");
    let item = snapshot.map_or_else(|| Item::volume(&from.volume), |snapshot| Item::snapshot(&from.volume, snapshot));
    let (file, record) = hold(storage, from, &item, (Hold::Still, declared), &doing)?;
    made(storage.clone_item(&file, &Item::volume(to), record), &doing, &format!("{}/{to}", from.pool))
}

/// Makes a raw volume larger while nobody uses it. One of another format grows by itself, when QEMU is told.
pub(super) fn grow(storage: &dyn Storage, volume: &VolumeRef, size: Bytes) -> Result<(), Refusal> {
    let doing = format!("make volume {volume} larger");
    let item = Item::volume(&volume.volume);
    let (file, record) = hold(storage, volume, &item, (Hold::Alone, DiskFormat::Raw), &doing)?;
    if record.format != DiskFormat::Raw {
        return Err(refusal::format(volume, "is not raw", "start the VM with the larger size: QEMU makes it larger"));
    }
    if size < record.size {
        let facts = format!("volume {volume} has {}, {size} would cut its end off", record.size);
        return Err(Refusal::new(ErrorCode::SpecInvalid, facts).hint("a volume can only become larger"));
    }
    storage.grow(&item, &file, Record { size, ..record }).map_err(|error| refusal::system(&doing, &error))
}

/// See [`super::Pools::delete`].
pub(super) fn delete(storage: &dyn Storage, volume: &VolumeRef) -> Result<(), Refusal> {
    let doing = format!("delete volume {volume}");
    let system = |error| refusal::system(&doing, &error);
    let item = Item::volume(&volume.volume);
    // What is left of an earlier stay is nobody's.
    storage.remove(&Item::spare(&volume.volume)).map_err(system)?;
    match open_file(storage, volume, &item, Access::READ) {
        Ok(file) if storage.in_use(&file).map_err(system)? => return Err(in_use(volume)),
        Err(refusal) if refusal.code != ErrorCode::VolumeMissing => return Err(refusal),
        _ => {}
    }
    let snapshots = storage.snapshots(&volume.volume).map_err(system)?;
    if !snapshots.is_empty() {
        let names: Vec<&str> = snapshots.iter().map(Name::as_str).collect();
        let facts = format!("volume {volume} has snapshots: {}", names.join(", "));
        return Err(Refusal::new(ErrorCode::InUse, facts).hint("delete them first"));
    }
    storage.remove(&item).map_err(system)
}

/// Opens an item and keeps others from changing it, as long as the file is open. What it was made as is what its record says, or what is
/// declared of it.
fn hold(
    storage: &dyn Storage,
    volume: &VolumeRef,
    item: &Item,
    (hold, declared): (Hold, DiskFormat),
    doing: &str,
) -> Result<(File, Record), Refusal> {
    let system = |error| refusal::system(doing, &error);
    let file = open_file(storage, volume, item, Access::WRITE)?;
    if !storage.hold(&file, hold).map_err(system)? {
        return Err(in_use(volume));
    }
    let record = match storage.record(item, &file).map_err(system)? {
        Some(record) => record,
        None => Record { format: declared, size: Bytes(file.metadata().map_err(system)?.len()) },
    };
    Ok((file, record))
}

/// What became of an item that was to be made.
fn made(made: std::io::Result<bool>, doing: &str, name: &str) -> Result<(), Refusal> {
    match made {
        Ok(true) => Ok(()),
        Ok(false) => Err(Refusal::new(ErrorCode::NameTaken, format!("could not {doing}: {name} exists"))
            .hint("use another name, or delete what has it")),
        Err(error) => Err(refusal::system(doing, &error)),
    }
}

fn in_use(volume: &VolumeRef) -> Refusal {
    Refusal::new(ErrorCode::InUse, format!("volume {volume} is in use by a QEMU, on this host or another"))
        .hint("stop or delete the VM that uses it first")
        .retry(Retry::Safe)
}

/// Opens a volume that is a file.
pub(super) fn open_file(storage: &dyn Storage, volume: &VolumeRef, item: &Item, access: Access) -> Result<File, Refusal> {
    storage.open(item, access).map_err(|error| match error {
        OpenError::Missing => refusal::missing(volume),
        OpenError::Link => {
            let facts = "is a link: a volume lies in its pool itself";
            refusal::format(volume, facts, "put the file itself into the pool's directory, or declare a pool where it is")
        }
        OpenError::NotAVolume => refusal::format(volume, "is not a file", "put a disk file of the declared format in its place"),
        OpenError::NoDirect => no_direct(volume),
        OpenError::System(error) => refusal::system(&format!("open volume {volume}"), &error),
    })
}

fn no_direct(volume: &VolumeRef) -> Refusal {
    let facts = format!("the file system of pool {} has no direct I/O, which volume {volume} needs", volume.pool);
    Refusal::new(ErrorCode::PoolUnavailable, facts).hint("use cache mode writeback, or a pool on another file system")
}
