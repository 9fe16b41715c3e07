//! State of TPMs: a volume that one swtpm writes, secret, and exchanged for another file when its VM moves.
//!
//! swtpm takes no locks, and one file must never have two of them. So the TPM of a VM that comes writes a file of its own, a [`Successor`] of the
//! volume; before the VM's vCPUs run here it takes the volume's name, and what had it is kept until the source is gone.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;

use godwit_model::{Bytes, DiskFormat, ErrorCode, Refusal, Retry, VolumeRef};
use rustix::fs::{Gid, Mode, Uid};

use super::driver::{Access, Hold, Item, Storage, Successor};
use super::volume::{Draft, exists, open_file};
use super::{Pools, refusal};

/// How swtpm's file begins: it makes any other one anew, whatever was in it.
const MAGIC: [u8; 8] = *b"nilmptws";

impl Pools {
    /// Opens the state of a TPM for a swtpm of `uid`, alone, and makes the volume if it is missing. It is given to `uid`, and nobody else may read
    /// it.
    ///
    /// # Errors
    /// `in_use` while another swtpm holds it, `volume_format` for a file that is something else; `pool_unavailable` and `host_failed`.
    pub(crate) async fn open_tpm(&self, volume: &VolumeRef, uid: u32) -> Result<OwnedFd, Refusal> {
        let volume = volume.clone();
        self.at(&volume.pool.clone(), move |storage| open(storage, &volume, uid)).await
    }

    /// A file for the state of a TPM that comes: empty, locked, not yet under the volume's name.
    ///
    /// # Errors
    /// `pool_unavailable` and `host_failed`.
    pub(crate) async fn begin_tpm(&self, volume: &VolumeRef, uid: u32) -> Result<(Successor, OwnedFd), Refusal> {
        let system = |error| refusal::system("make room for the state of a TPM", &error);
        self.at(&volume.pool, move |storage| begin(storage, uid).map_err(system)).await
    }

    /// Gives the state the volume's name, and keeps what had it.
    ///
    /// # Errors
    /// As [`Pools::begin_tpm`]. It may be published nevertheless, until it is withdrawn.
    pub(crate) async fn publish_tpm(&self, volume: &VolumeRef, state: &Successor) -> Result<(), Refusal> {
        self.step(volume, state, "take over", |storage, item, state| storage.succeed(item, state)).await
    }

    /// Gives the volume its state of before back, if it was taken, and removes what came. The TPM here must not be used any more.
    ///
    /// # Errors
    /// As [`Pools::begin_tpm`]; to be repeated until there is none, if it was published.
    pub(crate) async fn withdraw_tpm(&self, volume: &VolumeRef, state: &Successor) -> Result<(), Refusal> {
        self.step(volume, state, "give back", |storage, item, state| storage.withdraw(item, state)).await
    }

    /// Removes what had the volume's name before: whoever wrote it is gone.
    ///
    /// # Errors
    /// As [`Pools::begin_tpm`].
    pub(crate) async fn settle_tpm(&self, volume: &VolumeRef, state: &Successor) -> Result<(), Refusal> {
        self.step(volume, state, "clear up behind", |storage, item, state| storage.settle(item, state)).await
    }

    async fn step(
        &self,
        volume: &VolumeRef,
        state: &Successor,
        what: &'static str,
        step: fn(&dyn Storage, &Item, &Successor) -> io::Result<()>,
    ) -> Result<(), Refusal> {
        let (pool, volume, state) = (volume.pool.clone(), volume.clone(), state.clone());
        let work = move |storage: &dyn Storage| {
            step(storage, &Item::volume(&volume.volume), &state)
                .map_err(|error| refusal::system(&format!("{what} the TPM's state in volume {volume}"), &error))
        };
        self.at(&pool, work).await
    }
}

fn open(storage: &dyn Storage, volume: &VolumeRef, uid: u32) -> Result<OwnedFd, Refusal> {
    let system = |error| refusal::system(&format!("open the TPM's state in volume {volume}"), &error);
    if !exists(storage, volume)? {
        let room = storage.begin().map_err(system)?;
        Draft { volume: volume.clone(), format: DiskFormat::Raw, size: Bytes(0), image: None, room }.publish()?;
    }
    let file = open_file(storage, volume, &Item::volume(&volume.volume), Access::WRITE)?;
    if !storage.hold(&file, Hold::Taken).map_err(system)? {
        return Err(Refusal::new(ErrorCode::InUse, format!("volume {volume} is in use by another TPM, on this host or another"))
            .hint("wait until the VM that uses it has ended")
            .retry(Retry::Safe));
    }
    let mut start = Vec::new();
    (&file).take(MAGIC.len() as u64).read_to_end(&mut start).map_err(system)?;
    if !start.is_empty() && start != MAGIC {
        let hint = "name a volume that does not exist, so that a new TPM is made, or restore this one from a backup";
        return Err(refusal::format(volume, "is not the state of a TPM", hint));
    }
    give(&file, uid).map_err(system)?;
    Ok(file.into())
}

/// To the TPM's user alone.
fn give(file: &File, uid: u32) -> io::Result<()> {
    rustix::fs::fchmod(file, Mode::RUSR | Mode::WUSR)?;
    Ok(rustix::fs::fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)))?)
}

fn begin(storage: &dyn Storage, uid: u32) -> io::Result<(Successor, OwnedFd)> {
    let (state, file) = storage.begin_successor()?;
    give(&file, uid)?;
    Ok((state, file.into()))
}

#[cfg(test)]
mod tests;
