//! Volumes that come to this host, and what is left of those that have gone.
//!
//! ```text
//!            arrive                 take over                    leave
//!   (none) ─────────▶ arriving NAME ─────────▶ volume NAME ────────────────▶ spare NAME ── arrive ──▶ arriving NAME …
//!                          └── set aside, as is the volume if its VM never ran here ──────┘
//! ```
//! A volume has its name only once its VM is about to run on it: until then, and afterwards where it has left, nothing can be started from it. A
//! spare is what a later arrival begins with. It is the first thing to go when a pool has no room, and goes with its VM.

use std::os::fd::OwnedFd;

use godwit_model::spec::ResolvedDisk;
use godwit_model::{Bytes, ErrorCode, Generation, Refusal, Retry, VmId, VolumeRef};

use super::driver::{Access, Item, Left, Storage};
use super::volume::{check_item, draft, open_file, open_item};
use super::{Pools, blocking, convert, refusal};

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
    pub(crate) async fn arrive(&self, disk: &ResolvedDisk, size: Bytes, allocated: Bytes, vm: VmId) -> Result<Begun, Refusal> {
        let disk = ResolvedDisk { create: Some(size), image: None, ..disk.clone() };
        let wanted = disk.clone();
        let begun = self.at(&disk.volume.pool, move |storage| begin(storage, &wanted, size, allocated, vm)).await?;
        let (begun, draft) = match begun {
            Arrival::Spare(generation) => return Ok(Begun::Spare(generation)),
            Arrival::Draft(draft) => (Begun::Empty, draft),
        };
        let draft = convert::fill(draft, self.cage.as_deref()).await?;
        let volume = disk.volume.clone();
        let won = blocking(move || draft.publish_as(&Item::arriving(&disk.volume.volume))).await?;
        if won { Ok(begun) } else { Err(arrives(&volume)) }
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
    pub(crate) async fn take_over(&self, volume: &VolumeRef) -> Result<(), Refusal> {
        let volume = volume.clone();
        self.at(&volume.pool.clone(), move |storage| {
            let (from, to) = (Item::arriving(&volume.volume), Item::volume(&volume.volume));
            match storage.rename(&from, &to, None) {
                Ok(true) => Ok(()),
                Ok(false) => Err(taken(&volume)),
                Err(error) => Err(refusal::system(&format!("take volume {volume} over"), &error)),
            }
        })
        .await
    }

    /// The VM does not come: what has arrived of the volume is kept as a spare, `taken_over` or not. Again: nothing happens.
    ///
    /// # Errors
    /// As [`Pools::check`].
    pub(crate) async fn set_aside(&self, volume: &VolumeRef, vm: VmId, taken_over: bool) -> Result<(), Refusal> {
        let volume = volume.clone();
        self.at(&volume.pool.clone(), move |storage| {
            let left = Left { vm, generation: None };
            spare(storage, &volume, &Item::arriving(&volume.volume), left)?;
            if taken_over { spare(storage, &volume, &Item::volume(&volume.volume), left) } else { Ok(()) }
        })
        .await
    }

    /// The VM has left on `generation`, and has the volume where it is now: what is here is kept as a spare. Again: nothing happens.
    ///
    /// # Errors
    /// As [`Pools::check`].
    pub(crate) async fn leave(&self, volume: &VolumeRef, vm: VmId, generation: Generation) -> Result<(), Refusal> {
        let volume = volume.clone();
        self.at(&volume.pool.clone(), move |storage| {
            spare(storage, &volume, &Item::volume(&volume.volume), Left { vm, generation: Some(generation) })
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
                for name in storage.spares().map_err(system)? {
                    let item = Item::spare(&name);
                    let Ok(file) = storage.open(&item, Access::READ) else { continue };
                    if storage.left(&item, &file).map_err(system)?.is_some_and(|left| left.vm == vm) {
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
    Spare(Option<Generation>),
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
        // An agent that died has left it.
        spare(storage, volume, &arriving, Left { vm, generation: None })?;
    }
    let item = Item::spare(&volume.volume);
    if storage.exists(&item).map_err(system)? {
        let file = open_file(storage, volume, &item, Access::READ)?;
        let left = storage.left(&item, &file).map_err(system)?.filter(|left| left.vm == vm);
        let record = storage.record(&item, &file).map_err(system)?;
        let fits = record.is_some_and(|record| (record.format, record.size) == (disk.format, size));
        if let Some(left) = left.filter(|_| fits && check_item(storage, disk, &item).is_ok()) {
            // From here on it is no state that the VM ever had.
            let renamed = storage.rename(&item, &arriving, Some(Left { generation: None, ..left })).map_err(system)?;
            return if renamed { Ok(Arrival::Spare(left.generation)) } else { Err(arrives(volume)) };
        }
        storage.remove(&item).map_err(system)?;
    }
    make_room(storage, volume, allocated)?;
    draft(storage, disk, None).map(Arrival::Draft)
}

/// Spares go, the oldest first, until there is room.
fn make_room(storage: &dyn Storage, volume: &VolumeRef, needed: Bytes) -> Result<(), Refusal> {
    let doing = format!("make room for volume {volume}");
    let system = |error| refusal::system(&doing, &error);
    let mut spares = storage.spares().map_err(system)?.into_iter();
    loop {
        let free = storage.space().map_err(system)?.free;
        if free >= needed {
            return Ok(());
        }
        let Some(name) = spares.next() else {
            let facts = format!("it takes {needed}, pool {} has {free} free", volume.pool);
            return Err(refusal::no_space(&doing, &facts));
        };
        tracing::info!(pool = %volume.pool, spare = %name, "a spare goes: there is no room");
        storage.remove(&Item::spare(&name)).map_err(system)?;
    }
}

/// Makes `item` the volume's spare, instead of the one before. Nothing to make one of: nothing happens.
fn spare(storage: &dyn Storage, volume: &VolumeRef, item: &Item, left: Left) -> Result<(), Refusal> {
    let system = |error| refusal::system(&format!("keep what is left of volume {volume}"), &error);
    if !storage.exists(item).map_err(system)? {
        return Ok(());
    }
    let to = Item::spare(&volume.volume);
    storage.remove(&to).map_err(system)?;
    match storage.rename(item, &to, Some(left)).map_err(system)? {
        true => Ok(()),
        false => Err(arrives(volume)),
    }
}
