//! State of TPMs: a volume that one swtpm writes, secret, and exchanged for another file when its VM moves.
//!
//! swtpm takes no locks, and one file must never have two of them. So the TPM of a VM that comes writes a file of its own; before the VM's vCPUs run
//! here, that file gets the volume's name, and the one before is kept until the source is gone. Which file has the name is told by its inode, so
//! that each step can be done again from wherever it was left:
//!
//! ```text
//!               volumes/NAME     partial/UUID     partial/UUID.before
//!  begun        the source's     ours
//!  published    ours                              the source's
//!  settled      ours
//!  withdrawn    the source's
//! ```

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use godwit_model::{Bytes, DiskFormat, ErrorCode, Refusal, Retry, VolumeRef};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::place::{PARTIAL, Place, VOLUMES, volume_path};
use super::volume::{Draft, open_file};
use super::{Pools, locks, refusal};

/// How swtpm's file begins: it makes any other one anew, whatever was in it.
const MAGIC: [u8; 8] = *b"nilmptws";

/// State on its way to a volume, as the journal keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ArrivingState {
    /// Its name among the pool's partial files.
    partial: Uuid,
    /// The file that it is.
    inode: u64,
}

impl ArrivingState {
    fn path(&self) -> String {
        format!("{PARTIAL}/{}", self.partial)
    }

    /// What had the volume's name before.
    fn before(&self) -> String {
        format!("{}.before", self.path())
    }
}

impl Pools {
    /// Opens the state of a TPM for a swtpm of `uid`, alone, and makes the volume if it is missing. It is given to `uid`, and nobody else may read
    /// it.
    ///
    /// # Errors
    /// `in_use` while another swtpm holds it, `volume_format` for a file that is something else; `pool_unavailable` and `host_failed`.
    pub(crate) async fn open_tpm(&self, volume: &VolumeRef, uid: u32) -> Result<OwnedFd, Refusal> {
        let volume = volume.clone();
        self.at(&volume.pool.clone(), move |place| open(&place, &volume, uid)).await
    }

    /// A file for the state of a TPM that comes: empty, locked, not yet under the volume's name.
    ///
    /// # Errors
    /// `pool_unavailable` and `host_failed`.
    pub(crate) async fn begin_tpm(&self, volume: &VolumeRef, uid: u32) -> Result<(ArrivingState, OwnedFd), Refusal> {
        let system = |error| refusal::system("make room for the state of a TPM", &error);
        self.at(&volume.pool, move |place| begin(&place, uid).map_err(system)).await
    }

    /// Gives the state the volume's name, and keeps what had it.
    ///
    /// # Errors
    /// As [`Pools::begin_tpm`]. It may be published nevertheless, until it is withdrawn.
    pub(crate) async fn publish_tpm(&self, volume: &VolumeRef, state: &ArrivingState) -> Result<(), Refusal> {
        self.step(volume, state, "take over", publish).await
    }

    /// Gives the volume its state of before back, if it was taken, and removes what came. The TPM here must not be used any more.
    ///
    /// # Errors
    /// As [`Pools::begin_tpm`]; to be repeated until there is none, if it was published.
    pub(crate) async fn withdraw_tpm(&self, volume: &VolumeRef, state: &ArrivingState) -> Result<(), Refusal> {
        self.step(volume, state, "give back", withdraw).await
    }

    /// Removes what had the volume's name before: whoever wrote it is gone.
    ///
    /// # Errors
    /// As [`Pools::begin_tpm`].
    pub(crate) async fn settle_tpm(&self, volume: &VolumeRef, state: &ArrivingState) -> Result<(), Refusal> {
        self.step(volume, state, "clear up behind", settle).await
    }

    async fn step(
        &self,
        volume: &VolumeRef,
        state: &ArrivingState,
        what: &'static str,
        step: fn(&Place, &str, &ArrivingState) -> io::Result<()>,
    ) -> Result<(), Refusal> {
        let (pool, volume, state) = (volume.pool.clone(), volume.clone(), state.clone());
        let work = move |place: Place| {
            step(&place, &volume_path(&volume.volume), &state)
                .map_err(|error| refusal::system(&format!("{what} the TPM's state in volume {volume}"), &error))
        };
        self.at(&pool, work).await
    }
}

fn open(place: &Place, volume: &VolumeRef, uid: u32) -> Result<OwnedFd, Refusal> {
    let system = |error| refusal::system(&format!("open the TPM's state in volume {volume}"), &error);
    if !place.exists(&volume.volume)? {
        let partial = place.partial().map_err(system)?;
        Draft { volume: volume.clone(), format: DiskFormat::Raw, size: Bytes(0), image: None, partial }.publish()?;
    }
    let file = open_file(place, volume, OFlags::RDWR)?;
    if !locks::try_use(&file).map_err(system)? {
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

fn begin(place: &Place, uid: u32) -> io::Result<(ArrivingState, OwnedFd)> {
    let partial = place.partial()?;
    locks::try_use(&partial.file)?;
    give(&partial.file, uid)?;
    place.sync(PARTIAL)?;
    let (name, file) = partial.keep()?;
    let partial = name.parse().map_err(io::Error::other)?;
    Ok((ArrivingState { partial, inode: file.metadata()?.ino() }, file.into()))
}

fn publish(place: &Place, volume: &str, state: &ArrivingState) -> io::Result<()> {
    let (own, before) = (state.path(), state.before());
    if place.inode(volume)? == Some(state.inode) {
        return Ok(());
    }
    if place.inode(&own)? != Some(state.inode) {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the state that came with the VM is not there any more"));
    }
    match rustix::fs::linkat(&place.root, volume, &place.root, &before, AtFlags::empty()) {
        // Done before; or there is nothing to keep.
        Ok(()) | Err(Errno::EXIST | Errno::NOENT) => {}
        // A file system without hard links: for a moment nothing has the name.
        Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS) => place.rename(volume, &before)?,
        Err(error) => return Err(error.into()),
    }
    place.rename(&own, volume)
}

fn withdraw(place: &Place, volume: &str, state: &ArrivingState) -> io::Result<()> {
    let taken = place.inode(volume)?.is_none_or(|inode| inode == state.inode);
    // Without one to give back, what came stays: nothing has run on it, so it is what was there.
    if taken && place.inode(&state.before())?.is_some() {
        place.rename(&state.before(), volume)?;
    }
    place.sync(VOLUMES)?;
    place.unlink(&state.path())?;
    place.unlink(&state.before())
}

fn settle(place: &Place, volume: &str, state: &ArrivingState) -> io::Result<()> {
    publish(place, volume, state)?;
    place.sync(VOLUMES)?;
    place.unlink(&state.before())
}

impl Place {
    /// The file at `path`, if there is one.
    fn inode(&self, path: &str) -> io::Result<Option<u64>> {
        match rustix::fs::statat(&self.root, path, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(facts) => Ok(Some(facts.st_ino)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.root, from, &self.root, to)?)
    }

    /// What is not there is removed already.
    fn unlink(&self, path: &str) -> io::Result<()> {
        match rustix::fs::unlinkat(&self.root, path, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests;
