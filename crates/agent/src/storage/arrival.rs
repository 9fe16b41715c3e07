//! Volumes that come to this host, and what is left of those that have gone.
//!
//! ```text
//!            arrive                 take over                    leave
//!   (none) ─────────▶ arriving NAME ─────────▶ volume NAME ────────────────▶ spare NAME ── arrive ──▶ arriving NAME …
//!                          └── set aside, as is the volume if its VM never ran here ──────┘
//! ```
//! A volume has its name only once its VM is about to run on it: until then, and afterwards where it has left, nothing can be started from it. A
//! spare is what a later arrival begins with. It is the first thing to go when a pool has no room, and goes with its VM.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;

use godwit_model::spec::ResolvedDisk;
use godwit_model::{Bytes, DiskFormat, ErrorCode, Generation, Refusal, Retry, VmId, VolumeRef};

use super::driver::{Access, Item, Left, Storage};
use super::qcow2::{Header, MAX_HEADER};
use super::volume::{check_item, draft, open_file, open_item};
use super::{Pools, blocking, convert, refusal};

/// An arriving volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arrived {
    /// What it holds.
    pub(crate) begun: Begun,
    /// What tells its file from whatever else may have its names.
    pub(crate) mark: u64,
}

/// What an arriving volume holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begun {
    /// Zeros.
    Empty,
    /// What was left here on this generation, or a state that the VM never had.
    Spare(Option<Generation>),
}

impl Pools {
    /// Makes room for a volume of `size` that is to come, of which `allocated` is not empty: what is left of it here, if that is of use, or an empty one.
    ///
    /// # Errors
    /// `name_taken` if this host has a volume of that name; `in_use` if it arrives already; `not_enough_space`; as [`Pools::check`].
    pub(crate) async fn arrive(&self, disk: &ResolvedDisk, size: Bytes, allocated: Bytes, vm: VmId) -> Result<Arrived, Refusal> {
        let disk = ResolvedDisk { create: Some(size), image: None, ..disk.clone() };
        let wanted = disk.clone();
        let begun = self.at(&disk.volume.pool, move |storage| begin(storage, &wanted, size, allocated, vm)).await?;
        let draft = match begun {
            Arrival::Spare(arrived) => return Ok(arrived),
            Arrival::Draft(draft) => draft,
        };
        let draft = convert::fill(draft, self.cage.as_deref()).await?;
        self.at(&disk.volume.pool.clone(), move |storage| {
            let (volume, spare) = (&disk.volume, Item::spare(&disk.volume.volume));
            // A spare at first, so that it is never without an owner's name for long.
            if !draft.publish_as(&spare)? {
                return Err(arrives(volume));
            }
            let mark = to_arriving(storage, volume, Left { vm, generation: None }, disk.format)?;
            Ok(Arrived { begun: Begun::Empty, mark })
        })
        .await
    }

    /// Opens an arriving volume for QEMU, as [`Pools::open_disk`].
    ///
    /// # Errors
    /// As [`Pools::check`].
    pub(crate) async fn open_arriving(&self, disk: &ResolvedDisk) -> Result<(OwnedFd, OwnedFd), Refusal> {
        let disk = disk.clone();
        self.at(&disk.volume.pool.clone(), move |storage| {
            let item = Item::arriving(&disk.volume.volume);
            check_item(storage, &disk, &item)?;
            open_item(storage, &disk.volume, &item, disk.cache)
        })
        .await
    }

    /// The VM is about to run on what has arrived: it gets the volume's name. Again: nothing happens.
    ///
    /// # Errors
    /// `name_taken`, as [`Pools::arrive`]; `host_failed`.
    pub(crate) async fn take_over(&self, disk: &ResolvedDisk, mark: u64) -> Result<(), Refusal> {
        let (volume, format) = (disk.volume.clone(), disk.format);
        self.at(&volume.pool.clone(), move |storage| {
            let (from, to) = (Item::arriving(&volume.volume), Item::volume(&volume.volume));
            match storage.rename(&from, &to, None, format) {
                Ok(true) if mark_of(storage, &volume, &to)? == Some(mark) => Ok(()),
                Ok(_) => Err(taken(&volume)),
                Err(error) => Err(refusal::system(&format!("take volume {volume} over"), &error)),
            }
        })
        .await
    }

    /// The VM does not come: what has arrived of the volume is kept as a spare, whether it had the volume's name already or not. Again: nothing happens.
    ///
    /// # Errors
    /// As [`Pools::check`].
    pub(crate) async fn set_aside(&self, disk: &ResolvedDisk, vm: VmId, mark: u64) -> Result<(), Refusal> {
        let (volume, format) = (disk.volume.clone(), disk.format);
        self.at(&volume.pool.clone(), move |storage| {
            for item in [Item::arriving(&volume.volume), Item::volume(&volume.volume)] {
                if mark_of(storage, &volume, &item)? == Some(mark) {
                    spare(storage, &volume, &item, Left { vm, generation: None }, format)?;
                }
            }
            Ok(())
        })
        .await
    }

    /// The VM has left on `generation`, and has the volume where it is now: what is here is kept as a spare. Again: nothing happens.
    ///
    /// # Errors
    /// As [`Pools::check`].
    pub(crate) async fn leave(&self, disk: &ResolvedDisk, vm: VmId, generation: Generation) -> Result<(), Refusal> {
        let (volume, format) = (disk.volume.clone(), disk.format);
        self.at(&volume.pool.clone(), move |storage| {
            let left = Left { vm, generation: Some(generation) };
            spare(storage, &volume, &Item::volume(&volume.volume), left, format)
        })
        .await
    }

    /// The VM is gone: so is what is left of its volumes, in all pools that are there.
    ///
    /// # Errors
    /// As [`Pools::check`].
    pub(crate) async fn forget_spares(&self, vm: VmId) -> Result<(), Refusal> {
        let pools = self.clone();
        blocking(move || {
            for storage in pools.pools.iter().filter_map(|pool| pool.driver.open().ok()) {
                let system = |error| refusal::system("remove what is left of a VM's volumes", &error);
                for item in storage.leftovers().map_err(system)? {
                    let Ok(file) = storage.open(&item, Access::READ) else { continue };
                    let is_its = storage.left(&item, &file).map_err(system)?.is_some_and(|left| left.vm == vm);
                    if is_its && !storage.in_use(&file).map_err(system)? {
                        storage.remove(&item).map_err(system)?;
                    }
                }
            }
            Ok(())
        })
        .await
    }

    /// Removes a volume that its VM has taken along in another way, as the state of its TPM.
    ///
    /// # Errors
    /// As [`Pools::check`].
    pub(crate) async fn drop_volume(&self, volume: &VolumeRef) -> Result<(), Refusal> {
        let volume = volume.clone();
        self.at(&volume.pool.clone(), move |storage| {
            let removed = storage.remove(&Item::volume(&volume.volume));
            removed.map_err(|error| refusal::system(&format!("remove volume {volume}"), &error))
        })
        .await
    }
}

enum Arrival {
    Spare(Arrived),
    Draft(super::volume::Draft),
}

fn arrives(volume: &VolumeRef) -> Refusal {
    Refusal::new(ErrorCode::InUse, format!("volume {volume} is on its way to this host already"))
        .hint("wait until the other move has ended")
        .retry(Retry::Safe)
}

fn taken(volume: &VolumeRef) -> Refusal {
    Refusal::new(ErrorCode::NameTaken, format!("the destination has a volume {volume} of its own"))
        .hint("move or delete that volume there, if nobody needs it, or choose another host")
}

/// A volume that does not exist must not be made where something of it is left: it is elsewhere.
pub(super) fn is_elsewhere(storage: &dyn Storage, volume: &VolumeRef) -> Result<(), Refusal> {
    for item in [Item::arriving(&volume.volume), Item::spare(&volume.volume)] {
        if storage.exists(&item).map_err(|error| refusal::system(&format!("look for volume {volume}"), &error))? {
            let facts =
                format!("volume {volume} is not on this host: here is only what its VM left when it moved, or what did not arrive");
            return Err(Refusal::new(ErrorCode::VolumeMissing, facts)
                .hint("start the VM where it ran last (`godwit vm show`); if the volume is lost, delete it first, so that a new one can be made"));
        }
    }
    Ok(())
}

fn begin(storage: &dyn Storage, disk: &ResolvedDisk, size: Bytes, allocated: Bytes, vm: VmId) -> Result<Arrival, Refusal> {
    let volume = &disk.volume;
    let system = |error| refusal::system(&format!("make room for volume {volume}"), &error);
    if storage.exists(&Item::volume(&volume.volume)).map_err(system)? {
        return Err(taken(volume));
    }
    let arriving = Item::arriving(&volume.volume);
    if storage.exists(&arriving).map_err(system)? {
        let file = open_file(storage, volume, &arriving, Access::READ)?;
        if storage.in_use(&file).map_err(system)? {
            return Err(arrives(volume));
        }
        // An agent that died has left it, of whichever VM.
        let left = storage.left(&arriving, &file).map_err(system)?.unwrap_or(Left { vm, generation: None });
        spare(storage, volume, &arriving, Left { generation: None, ..left }, disk.format)?;
    }
    let item = Item::spare(&volume.volume);
    if storage.exists(&item).map_err(system)? {
        let file = open_file(storage, volume, &item, Access::READ)?;
        let left = storage.left(&item, &file).map_err(system)?.filter(|left| left.vm == vm);
        let fits = size_in(&file, disk.format).map_err(system)? == Some(size) && check_item(storage, disk, &item).is_ok();
        if let Some(left) = left.filter(|_| fits) {
            make_room(storage, volume, Bytes(allocated.get().saturating_sub(taken_by(&file).map_err(system)?)), vm)?;
            // From here on it is no state that the VM ever had.
            let mark = to_arriving(storage, volume, Left { generation: None, ..left }, disk.format)?;
            return Ok(Arrival::Spare(Arrived { begun: Begun::Spare(left.generation), mark }));
        }
        storage.remove(&item).map_err(system)?;
    }
    make_room(storage, volume, allocated, vm)?;
    draft(storage, disk, None).map(Arrival::Draft)
}

/// Has the volume's spare be what arrives, and answers its mark.
fn to_arriving(storage: &dyn Storage, volume: &VolumeRef, left: Left, format: DiskFormat) -> Result<u64, Refusal> {
    let (spare, arriving) = (Item::spare(&volume.volume), Item::arriving(&volume.volume));
    let renamed = storage.rename(&spare, &arriving, Some(left), format);
    if !renamed.map_err(|error| refusal::system(&format!("make room for volume {volume}"), &error))? {
        return Err(arrives(volume));
    }
    mark_of(storage, volume, &arriving)?.ok_or_else(|| refusal::missing(volume))
}

fn mark_of(storage: &dyn Storage, volume: &VolumeRef, item: &Item) -> Result<Option<u64>, Refusal> {
    let system = |error| refusal::system(&format!("look at volume {volume}"), &error);
    if !storage.exists(item).map_err(system)? {
        return Ok(None);
    }
    let file = open_file(storage, volume, item, Access::READ)?;
    Ok(Some(std::os::unix::fs::MetadataExt::ino(&file.metadata().map_err(system)?)))
}

/// Size of the disk in a file.
fn size_in(file: &File, format: DiskFormat) -> io::Result<Option<Bytes>> {
    match format {
        DiskFormat::Raw => Ok(Some(Bytes(file.metadata()?.len()))),
        DiskFormat::Qcow2 => {
            let mut beginning = Vec::new();
            file.take(MAX_HEADER as u64).read_to_end(&mut beginning)?;
            Ok(Header::parse(&beginning).ok().map(|header| Bytes(header.size)))
        }
    }
}

fn taken_by(file: &File) -> io::Result<u64> {
    Ok(std::os::unix::fs::MetadataExt::blocks(&file.metadata()?) * 512)
}

/// Spares of other VMs go, the oldest first, until there is room; none, if all of them are not enough.
fn make_room(storage: &dyn Storage, volume: &VolumeRef, needed: Bytes, vm: VmId) -> Result<(), Refusal> {
    let doing = format!("make room for volume {volume}");
    let system = |error| refusal::system(&doing, &error);
    let free = storage.space().map_err(system)?.free;
    let mut missing = needed.get().saturating_sub(free.get());
    let mut given_up = Vec::new();
    for item in storage.leftovers().map_err(system)?.into_iter().filter(Item::is_spare) {
        if missing == 0 {
            break;
        }
        let Ok(file) = storage.open(&item, Access::READ) else { continue };
        if storage.left(&item, &file).map_err(system)?.is_none_or(|left| left.vm != vm) {
            missing = missing.saturating_sub(taken_by(&file).map_err(system)?);
            given_up.push(item);
        }
    }
    if missing > 0 {
        let facts = format!("it takes {needed}, pool {} has {free} free", volume.pool);
        return Err(refusal::no_space(&doing, &facts));
    }
    for item in given_up {
        tracing::info!(pool = %volume.pool, spare = %item, "a spare goes: there is no room");
        storage.remove(&item).map_err(system)?;
    }
    Ok(())
}

/// Makes `item` the volume's spare, instead of the one before. Nothing to make one of: nothing happens.
fn spare(storage: &dyn Storage, volume: &VolumeRef, item: &Item, left: Left, format: DiskFormat) -> Result<(), Refusal> {
    let system = |error| refusal::system(&format!("keep what is left of volume {volume}"), &error);
    if !storage.exists(item).map_err(system)? {
        return Ok(());
    }
    let to = Item::spare(&volume.volume);
    storage.remove(&to).map_err(system)?;
    match storage.rename(item, &to, Some(left), format).map_err(system)? {
        true => Ok(()),
        false => Err(arrives(volume)),
    }
}
