//! What the controller asks for, read once.

use godwit_link::{Malformed, convert, decode, v1};
use godwit_model::{Generation, Name, SnapshotId, SnapshotRequest};

use super::control::Keyed;

/// Where a team's vault is, and the key of its digests.
#[derive(Clone)]
pub(crate) struct VaultAt {
    pub(crate) pool: Name,
    pub(crate) team: Name,
    pub(crate) key: [u8; 32],
}

/// A snapshot to be taken.
#[derive(Clone)]
pub(crate) struct SnapshotJob {
    pub(crate) vault: VaultAt,
    pub(crate) snapshot: Keyed,
    /// Whose pages need not be kept once more.
    pub(crate) known: Vec<Keyed>,
    pub(crate) request: SnapshotRequest,
    pub(crate) about: Vec<u8>,
}

/// A snapshot that a VM begins from.
#[derive(Clone)]
pub(crate) struct FromSnapshot {
    pub(crate) vault: VaultAt,
    pub(crate) snapshot: Keyed,
    pub(crate) memory: bool,
    /// Its volumes are made for it.
    pub(crate) fresh: bool,
}

/// The memory of a VM that is to come, as a snapshot has it.
#[derive(Clone)]
pub(crate) struct MemoryInVault {
    pub(crate) pool: Name,
    pub(crate) team: Name,
    pub(crate) snapshot: Keyed,
    /// On which the VM ran then; 0 if that is not known.
    pub(crate) generation: Generation,
}

fn key(field: &'static str, bytes: &[u8]) -> Result<[u8; 32], Malformed> {
    bytes.try_into().map_err(|_| Malformed::Field { field })
}

/// Reads a snapshot's id.
pub(crate) fn id_of(text: &str) -> Result<SnapshotId, Malformed> {
    text.parse().map_err(|_| Malformed::Field { field: "snapshot" })
}

/// Reads a snapshot with its key.
pub(crate) fn key_of(snapshot: &v1::SnapshotKey) -> Result<Keyed, Malformed> {
    Ok(Keyed { id: id_of(&snapshot.snapshot)?, key: key("key", &snapshot.key)? })
}

fn one(snapshot: Option<&v1::SnapshotKey>) -> Result<Keyed, Malformed> {
    key_of(snapshot.ok_or(Malformed::Field { field: "snapshot" })?)
}

impl VaultAt {
    /// Reads it; it must be there.
    pub(crate) fn read(vault: Option<&v1::VaultAt>) -> Result<Self, Malformed> {
        let vault = vault.ok_or(Malformed::Field { field: "vault" })?;
        Ok(Self {
            pool: convert::name("pool", &vault.pool)?,
            team: convert::name("team", &vault.team)?,
            key: key("key", &vault.key)?,
        })
    }
}

impl MemoryInVault {
    /// Reads it.
    pub(crate) fn read(memory: &v1::MemoryInVault) -> Result<Self, Malformed> {
        let v1::MemoryInVault { pool, team, snapshot, generation } = memory;
        let (pool, team) = (convert::name("pool", pool)?, convert::name("team", team)?);
        Ok(Self { pool, team, snapshot: one(snapshot.as_ref())?, generation: Generation(*generation) })
    }
}

impl SnapshotJob {
    /// Reads it.
    pub(crate) fn read(take: &v1::TakeSnapshot) -> Result<Self, Malformed> {
        Ok(Self {
            vault: VaultAt::read(take.vault.as_ref())?,
            snapshot: one(take.snapshot.as_ref())?,
            known: take.known.iter().map(key_of).collect::<Result<_, _>>()?,
            request: decode("request", &take.request)?,
            about: take.about.clone(),
        })
    }
}

impl FromSnapshot {
    /// Reads it.
    pub(crate) fn read(from: &v1::FromSnapshot) -> Result<Self, Malformed> {
        let v1::FromSnapshot { vault, snapshot, memory, fresh } = from;
        Ok(Self { vault: VaultAt::read(vault.as_ref())?, snapshot: one(snapshot.as_ref())?, memory: *memory, fresh: *fresh })
    }
}
