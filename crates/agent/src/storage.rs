//! The host's storage: pools with volumes, and the cache of images.
//!
//! A pool is made of what its driver ([`driver`]) says; so far, of a directory ([`directory`]). Every kind must pass one suite ([`suite`]), which
//! administrators can run on their storage, too.
//!
//! Everything in a volume was written by a guest or a user. This process reads the header and the tables of a qcow2 file with a small
//! reader of its own ([`qcow2`], [`tables`]). `qemu-img` creates empty volumes and copies images, never opens an existing volume, and
//! reads an image only after that reader has passed it, as a user without rights and with two files in its hands.

mod arrival;
mod convert;
mod directory;
mod driver;
mod exports;
mod image;
mod locks;
mod qcow2;
mod refusal;
pub(crate) mod suite;
mod tables;
#[cfg(test)]
mod tests;
mod tpm;
mod volume;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use godwit_model::spec::ResolvedDisk;
use godwit_model::{Bytes, ErrorCode, HostCondition, Name, PoolFacts, Refusal, VolumeRef};
use godwit_qemu::Launcher;

pub(crate) use arrival::{Arrived, Begun};
pub(crate) use driver::Successor;
pub(crate) use exports::Export;
pub(crate) use image::{CachedImage, ImageCache, IndexedImage};
pub(crate) use locks::locks_hold;
pub(crate) use volume::Stamp;

use directory::Directory;
use driver::{Driver, Storage};

/// A pool as the administrator declares it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct PoolConfig {
    /// Its name.
    pub(crate) name: Name,
    /// Its directory. One that is not shared is made if it is missing; a shared one must be there.
    pub(crate) path: PathBuf,
    /// Whether other hosts see the same directory.
    pub(crate) shared: bool,
}

/// Why the declared pools cannot be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StorageError {
    /// Two pools of one name.
    #[error("pool {0} is declared twice")]
    Duplicate(Name),
    /// A path that depends on where the agent was started.
    #[error("the path of pool {0} must be absolute")]
    Relative(Name),
}

/// The pools of this host. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Pools {
    pools: Arc<[Pool]>,
    /// How the tools that fill volumes are confined.
    cage: Option<Arc<Launcher>>,
}

struct Pool {
    name: Name,
    shared: bool,
    driver: Box<dyn Driver>,
}

impl Pools {
    /// Takes the declared pools. One whose storage is not there is no error: it is tried again at each use, see [`Pools::conditions`].
    ///
    /// # Errors
    /// A declaration that cannot be right.
    pub(crate) fn open(configs: Vec<PoolConfig>) -> Result<Self, StorageError> {
        for (index, config) in configs.iter().enumerate() {
            if configs.iter().take(index).any(|other| other.name == config.name) {
                return Err(StorageError::Duplicate(config.name.clone()));
            }
            if !config.path.is_absolute() {
                return Err(StorageError::Relative(config.name.clone()));
            }
        }
        let pools = configs.into_iter().map(|config| Pool {
            name: config.name.clone(),
            shared: config.shared,
            driver: Box::new(Directory::new(config)),
        });
        let pools = Self { pools: pools.collect(), cage: None };
        for storage in pools.pools.iter().filter_map(|pool| pool.driver.open().ok()) {
            storage.remove_abandoned();
        }
        Ok(pools)
    }

    /// Confines the tools that fill volumes.
    #[must_use]
    pub(crate) fn with_cage(self, launcher: &Launcher) -> Self {
        Self { cage: Some(Arc::new(launcher.clone())), ..self }
    }

    /// The pools whose storage is there. Blocks on the file system.
    pub(crate) fn facts(&self) -> Vec<PoolFacts> {
        let facts = |pool: &Pool| {
            let storage = pool.driver.open().ok()?;
            let (identity, capacity) = (storage.identity().to_owned(), storage.space().ok()?.capacity);
            Some(PoolFacts { name: pool.name.clone(), identity, shared: pool.shared, capacity })
        };
        self.pools.iter().filter_map(facts).collect()
    }

    /// Free space of the pools whose storage is there. Blocks on the file system.
    pub(crate) fn free(&self) -> Vec<(Name, Bytes)> {
        let free = |pool: &Pool| Some((pool.name.clone(), pool.driver.open().ok()?.space().ok()?.free));
        self.pools.iter().filter_map(free).collect()
    }

    /// Pools whose storage is not there. Blocks on the file system.
    pub(crate) fn conditions(&self) -> Vec<HostCondition> {
        let condition = |refusal: Refusal| HostCondition {
            name: "pool_unavailable".to_owned(),
            message: refusal.message,
            fix: refusal.hint.unwrap_or_default(),
        };
        self.pools.iter().filter_map(|pool| pool.driver.open().err()).map(condition).collect()
    }

    /// Checks a disk that must exist: there, whole, of the declared format, and sufficient to itself. The tables of a qcow2 volume that a
    /// QEMU holds are not looked at: they change meanwhile.
    ///
    /// # Errors
    /// `volume_missing`, `volume_truncated`, `volume_format`; `pool_unavailable` and `host_failed` where that is the cause.
    pub(crate) async fn check(&self, disk: &ResolvedDisk) -> Result<(), Refusal> {
        let disk = disk.clone();
        self.at(&disk.volume.pool.clone(), move |storage| volume::check(storage, &disk)).await
    }

    /// Whether anything has the volume's name.
    ///
    /// # Errors
    /// `pool_unavailable`, `host_failed`
    pub(crate) async fn exists(&self, volume: &VolumeRef) -> Result<bool, Refusal> {
        let volume = volume.clone();
        self.at(&volume.pool.clone(), move |storage| volume::exists(storage, &volume)).await
    }

    /// Makes the volume if it is missing and the disk says how; one that exists is left alone, whatever it is. Nothing half made is ever
    /// seen under its name, and of several that make it at once one wins. `image` is the file of the disk's image.
    ///
    /// # Errors
    /// As [`Pools::check`]; `image_invalid`, `not_enough_space`, `spec_invalid` for a size smaller than the image.
    pub(crate) async fn prepare(&self, disk: &ResolvedDisk, image: Option<&Path>) -> Result<(), Refusal> {
        let (wanted, image) = (disk.clone(), image.map(Path::to_owned));
        let draft = self.at(&disk.volume.pool, move |storage| {
            let there = volume::exists(storage, &wanted.volume)?;
            if there {
                return Ok(None);
            }
            arrival::is_elsewhere(storage, &wanted.volume)?;
            volume::draft(storage, &wanted, image.as_deref()).map(Some)
        });
        let Some(draft) = draft.await? else { return Ok(()) };
        let draft = convert::fill(draft, self.cage.as_deref()).await?;
        blocking(move || draft.publish()).await
    }

    /// Makes a raw volume with the content of a file of this host if it is missing; one that exists is left alone, whatever it is.
    ///
    /// # Errors
    /// As [`Pools::check`]; `not_enough_space`.
    pub(crate) async fn prepare_copy(&self, volume: &VolumeRef, from: &Path) -> Result<(), Refusal> {
        let (volume, from) = (volume.clone(), from.to_owned());
        self.at(&volume.pool.clone(), move |storage| {
            if volume::exists(storage, &volume)? {
                return Ok(());
            }
            arrival::is_elsewhere(storage, &volume)?;
            volume::copy(storage, &volume, &from)
        })
        .await
    }

    /// Opens a raw volume of exactly `size` for QEMU, as a disk with cache mode `direct`.
    ///
    /// # Errors
    /// As [`Pools::check`]; `volume_format` for one of another size.
    pub(crate) async fn open_exact(&self, volume: &VolumeRef, size: Bytes) -> Result<(OwnedFd, OwnedFd), Refusal> {
        let wanted = ResolvedDisk { create: Some(size), ..ResolvedDisk::new(volume.clone(), godwit_model::DiskFormat::Raw) };
        self.check(&wanted).await?;
        let volume = volume.clone();
        self.at(&volume.pool.clone(), move |storage| volume::open_exact(storage, &volume, size)).await
    }

    /// Opens a disk for QEMU: once read-only and once read-write, each a file description of its own.
    ///
    /// # Errors
    /// As [`Pools::check`], without looking inside.
    pub(crate) fn open_disk(&self, disk: &ResolvedDisk) -> Result<(OwnedFd, OwnedFd), Refusal> {
        volume::open(&*self.find(&disk.volume.pool)?.driver.open()?, &disk.volume, disk.cache)
    }

    /// By what it is seen later whether anybody has written to a volume.
    ///
    /// # Errors
    /// As [`Pools::check`], without looking inside.
    pub(crate) async fn stamp(&self, volume: &VolumeRef) -> Result<Stamp, Refusal> {
        let volume = volume.clone();
        self.at(&volume.pool.clone(), move |storage| volume::stamp(storage, &volume)).await
    }

    /// An empty qcow2 image of this size in a pool, opened for reading and writing. It has no name, and is gone with its last descriptor.
    ///
    /// # Errors
    /// As [`Pools::prepare`].
    pub(crate) async fn scratch(&self, pool: &Name, size: Bytes) -> Result<OwnedFd, Refusal> {
        let volume = VolumeRef { pool: pool.clone(), volume: Name::new("scratch").expect("a name") };
        let wanted = ResolvedDisk { create: Some(size), ..ResolvedDisk::new(volume, godwit_model::DiskFormat::Qcow2) };
        let draft = self.at(pool, move |storage| volume::draft(storage, &wanted, None)).await?;
        let draft = convert::fill(draft, self.cage.as_deref()).await?;
        let file = draft.room.file().try_clone();
        Ok(file.map_err(|error| refusal::system("make room for what is written over", &error))?.into())
    }

    /// The directory of a team's vault in a pool. It is made if it is missing, and belongs to this uid.
    ///
    /// # Errors
    /// `pool_unavailable`, `host_failed`.
    pub(crate) async fn vault(&self, pool: &Name, team: &Name, uid: u32) -> Result<OwnedFd, Refusal> {
        let team = team.clone();
        let failed = |error| refusal::system("make the team's vault", &error);
        self.at(pool, move |storage| storage.vault(&team, uid).map(OwnedFd::from).map_err(failed)).await
    }

    /// Removes a volume; one that does not exist is removed already.
    ///
    /// # Errors
    /// `in_use` while a QEMU on this or another host holds it.
    pub(crate) async fn delete(&self, volume: &VolumeRef) -> Result<(), Refusal> {
        let volume = volume.clone();
        self.at(&volume.pool.clone(), move |storage| volume::delete(storage, &volume)).await
    }

    fn find(&self, name: &Name) -> Result<&Pool, Refusal> {
        self.pools.iter().find(|pool| pool.name == *name).ok_or_else(|| {
            let known: Vec<&str> = self.pools.iter().map(|pool| pool.name.as_str()).collect();
            Refusal::new(ErrorCode::PoolUnavailable, format!("this host has no pool {name}, only: {}", known.join(", ")))
                .hint("use a pool of this host, or declare it to the host's agent")
        })
    }

    /// Works in a pool, where it may block.
    async fn at<T: Send + 'static>(
        &self,
        name: &Name,
        work: impl FnOnce(&dyn Storage) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        let (pools, name) = (self.clone(), name.clone());
        blocking(move || work(&*pools.find(&name)?.driver.open()?)).await
    }
}

/// Tries whether the storage of a pool does all that volumes need; see [`suite`]. Blocks for some seconds.
pub(crate) fn try_pool(config: &PoolConfig) -> Vec<suite::Tried> {
    suite::run(&config.name, &Directory::new(config.clone()), &Directory::new(config.clone()))
}

/// Runs what may block on a file system on a thread of its own.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Refusal> + Send + 'static) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Refusal::new(ErrorCode::Internal, format!("work on storage ended unexpectedly: {error}"))))
}
