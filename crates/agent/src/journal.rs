//! The host's journal: which VMs this host holds, on which generation, and where each move stands. It, not any process, says who owns a VM.
//!
//! One file per VM, replaced as a whole: written beside, synced, renamed, the directory synced. A record is durable when [`Journal::write`]
//! returns; a failed write leaves the old record. RAM is never lost by losing this file, but ownership is: it is worth its two syncs.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use godwit_migration::{DestinationRecord, SourceRecord};
use godwit_model::{
    Bytes, Epoch, Generation, Grant, MigrationFigures, MigrationPolicy, Refusal, ResolvedSpec, TaskId, UnixMillis, VmId, VolumeRef,
};
use godwit_qemu::process::ProcessIdentity;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::storage::Successor;

const SCHEMA: u32 = 1;

/// What this host holds of one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VmRecord {
    /// Schema of the writer.
    pub(crate) schema: u32,
    /// What it was started with.
    pub(crate) spec: ResolvedSpec,
    /// The generation on which this host runs, or ran, the VM. For an incoming move: 0 until activated.
    pub(crate) generation: Generation,
    /// Its uid here.
    pub(crate) uid: u32,
    /// Its QEMU.
    pub(crate) process: Option<ProcessIdentity>,
    /// Its TPM, if it has one.
    #[serde(default)]
    pub(crate) tpm: TpmRecord,
    /// The memory node of this host that it was put on.
    #[serde(default)]
    pub(crate) node: Option<u32>,
    /// How this host holds it.
    pub(crate) holding: Holding,
    /// Whether its end was asked for: what tells a crash from a stop.
    pub(crate) end_wanted: bool,
    /// Whether it does not run because the host went down, and not because anybody wanted so.
    #[serde(default)]
    pub(crate) ended_with_host: bool,
    /// A snapshot of it is being taken, or was by an agent that is no more.
    #[serde(default)]
    pub(crate) snapshot: Option<SnapshotRecord>,
    /// Its memory came, or still comes, out of a snapshot, and not from another host.
    #[serde(default)]
    pub(crate) out_of_snapshot: bool,
    /// Nodes of disks that come out of a snapshot while it runs.
    #[serde(default)]
    pub(crate) filling: Vec<String>,
    /// They all have: whoever asks once more that it begin out of it has not heard so.
    #[serde(default)]
    pub(crate) whole: bool,
}

/// What a snapshot must leave as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SnapshotRecord {
    /// Its vCPUs ran.
    pub(crate) ran: bool,
    /// Nodes of the disks that it has.
    pub(crate) disks: Vec<String>,
    /// The inode of the socket on which its memory comes, if it has memory: QEMU holds it, and it is read to its end, whatever happens.
    pub(crate) socket: Option<u64>,
}

impl VmRecord {
    pub(crate) fn new(spec: ResolvedSpec, generation: Generation, uid: u32, holding: Holding) -> Self {
        let tpm = TpmRecord::default();
        Self {
            schema: SCHEMA,
            spec,
            generation,
            uid,
            process: None,
            tpm,
            node: None,
            holding,
            end_wanted: false,
            ended_with_host: false,
            snapshot: None,
            out_of_snapshot: false,
            filling: vec![],
            whole: false,
        }
    }
}

/// A VM's TPM here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TpmRecord {
    /// Its swtpm.
    pub(crate) process: Option<ProcessIdentity>,
    /// The file that it writes, of a move to here: that of the volume once the VM runs here.
    pub(crate) arriving: Option<Successor>,
}

/// How a host holds a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "as", rename_all = "snake_case")]
pub(crate) enum Holding {
    /// May run it.
    Owner,
    /// Tries to give it away; whether it may still run it is in the record.
    Source(Outgoing),
    /// Was offered it; whether it may run it is in the record.
    Destination(Incoming),
}

impl Holding {
    /// Whether a move has brought the VM here for good, and only its end is still to be told.
    pub(crate) fn has_arrived(&self) -> bool {
        matches!(self, Self::Destination(incoming) if incoming.record.is_for_good())
    }
}

/// A move away from this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Outgoing {
    pub(crate) grant: Grant,
    pub(crate) policy: MigrationPolicy,
    pub(crate) record: SourceRecord,
    /// QEMU cannot switch over by itself while the VM runs.
    pub(crate) held: bool,
    /// Pages may have been left for after the switch: this host keeps the memory until the destination has all of it.
    #[serde(default)]
    pub(crate) leaving: bool,
    /// Where the destination's carry listens.
    #[serde(default)]
    pub(crate) address: Option<SocketAddr>,
    pub(crate) carry: Option<ProcessIdentity>,
    /// Volumes that the destination does not see.
    #[serde(default)]
    pub(crate) disks: Vec<OutgoingDisk>,
    pub(crate) began: UnixMillis,
}

/// A volume that leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OutgoingDisk {
    pub(crate) volume: VolumeRef,
    pub(crate) size: Bytes,
    pub(crate) carry: Option<ProcessIdentity>,
}

/// A disk that comes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IncomingDisk {
    pub(crate) volume: VolumeRef,
    pub(crate) size: Bytes,
    /// What was left here before on which generation, 0 if that is not known; none: nothing was.
    pub(crate) base: Option<Generation>,
    /// What tells its file from whatever else may have its names.
    pub(crate) mark: u64,
    pub(crate) port: u16,
    pub(crate) carry: Option<ProcessIdentity>,
}

/// A move to this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Incoming {
    pub(crate) grant: Grant,
    pub(crate) record: DestinationRecord,
    pub(crate) carry: Option<ProcessIdentity>,
    pub(crate) carry_port: u16,
    /// Its QEMU is set up for post-copy.
    #[serde(default)]
    pub(crate) advises: bool,
    /// The number of QEMU's RAM section, known from the switch on: what another carry needs to go on.
    #[serde(default)]
    pub(crate) section: Option<u32>,
    /// The carry is not the first.
    #[serde(default)]
    pub(crate) again: bool,
    /// Disks that this host did not see before.
    #[serde(default)]
    pub(crate) disks: Vec<IncomingDisk>,
}

/// How a move ended here: kept and repeated until the controller has stored it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EndedMove {
    pub(crate) task: TaskId,
    pub(crate) vm: VmId,
    pub(crate) generation: Generation,
    pub(crate) source: bool,
    pub(crate) reason: Option<Refusal>,
    pub(crate) figures: MigrationFigures,
}

/// What is true of the host as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HostRecord {
    /// The highest epoch that it was told of.
    pub(crate) epoch: Epoch,
    /// Which of all controllers that ever counted to this epoch.
    #[serde(default)]
    pub(crate) epoch_id: String,
    /// How far its store was.
    #[serde(default)]
    pub(crate) mark: u64,
    /// The hosts that it had.
    #[serde(default)]
    pub(crate) members: Vec<String>,
}

/// The journal's directory.
#[derive(Debug)]
pub(crate) struct Journal {
    dir: PathBuf,
}

/// Why the journal could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JournalError {
    /// The file system refused; the old record stands.
    #[error("the journal at {path:?} cannot be {action}")]
    Io { path: PathBuf, action: &'static str, source: io::Error },
    /// A record that this version cannot read: nothing is guessed, the agent does not start.
    #[error("the journal's record {path:?} cannot be read by this version")]
    Record { path: PathBuf, source: serde_json::Error },
}

impl Journal {
    /// Opens, or begins, the journal in `dir`.
    pub(crate) fn open(dir: PathBuf) -> Result<Self, JournalError> {
        for sub in ["vms", "ended", "floors", "ran"] {
            let path = dir.join(sub);
            fs::create_dir_all(&path).map_err(|source| JournalError::Io { path, action: "made", source })?;
        }
        Ok(Self { dir })
    }

    fn vm_path(&self, vm: VmId) -> PathBuf {
        self.dir.join("vms").join(format!("{vm}.json"))
    }

    fn ended_path(&self, task: TaskId, generation: Generation, source: bool) -> PathBuf {
        let side = if source { "source" } else { "destination" };
        self.dir.join("ended").join(format!("{task}.{generation}.{side}.json"))
    }

    fn floor_path(&self, vm: VmId) -> PathBuf {
        self.dir.join("floors").join(format!("{vm}.json"))
    }

    /// The highest generation of a VM that was dealt with here and is not held any more.
    pub(crate) fn floor(&self, vm: VmId) -> Result<Generation, JournalError> {
        Ok(read(&self.floor_path(vm))?.unwrap_or_default())
    }

    /// Raises the floor; it never falls.
    pub(crate) fn write_floor(&self, vm: VmId, generation: Generation) -> Result<(), JournalError> {
        if self.floor(vm)? < generation { replace(&self.floor_path(vm), &generation) } else { Ok(()) }
    }

    fn ran_path(&self, vm: VmId) -> PathBuf {
        self.dir.join("ran").join(format!("{vm}.json"))
    }

    /// The highest generation of a VM that ran here after a move whose source does not know it.
    pub(crate) fn ran(&self, vm: VmId) -> Result<Generation, JournalError> {
        Ok(read(&self.ran_path(vm))?.unwrap_or_default())
    }

    /// See [`Journal::ran`]; it never falls.
    pub(crate) fn write_ran(&self, vm: VmId, generation: Generation) -> Result<(), JournalError> {
        if self.ran(vm)? < generation { replace(&self.ran_path(vm), &generation) } else { Ok(()) }
    }

    /// Whether a move has ended here and is not acknowledged yet.
    pub(crate) fn has_ended(&self, task: TaskId, generation: Generation, source: bool) -> bool {
        self.ended_path(task, generation, source).exists()
    }

    /// Every VM's record.
    pub(crate) fn vms(&self) -> Result<BTreeMap<VmId, VmRecord>, JournalError> {
        let records: Vec<VmRecord> = read_all(&self.dir.join("vms"))?;
        Ok(records.into_iter().map(|record| (record.spec.vm, record)).collect())
    }

    /// What this host holds of one VM.
    pub(crate) fn vm(&self, vm: VmId) -> Result<Option<VmRecord>, JournalError> {
        read(&self.vm_path(vm))
    }

    /// Makes `record` durable.
    pub(crate) fn write(&self, record: &VmRecord) -> Result<(), JournalError> {
        replace(&self.vm_path(record.spec.vm), record)
    }

    /// Forgets a VM.
    pub(crate) fn remove(&self, vm: VmId) -> Result<(), JournalError> {
        remove(&self.vm_path(vm))
    }

    /// Ended moves that the controller has not acknowledged.
    pub(crate) fn ended(&self) -> Result<Vec<EndedMove>, JournalError> {
        read_all(&self.dir.join("ended"))
    }

    /// Keeps the end of a move until it is acknowledged.
    /// The first word stands: after a restart less is known than before.
    pub(crate) fn write_ended(&self, ended: &EndedMove) -> Result<(), JournalError> {
        if self.has_ended(ended.task, ended.generation, ended.source) {
            return Ok(());
        }
        replace(&self.ended_path(ended.task, ended.generation, ended.source), ended)
    }

    /// The controller has stored the end of a move.
    pub(crate) fn remove_ended(&self, task: TaskId, generation: Generation, source: bool) -> Result<(), JournalError> {
        remove(&self.ended_path(task, generation, source))
    }

    /// The highest epoch this host has obeyed.
    pub(crate) fn epoch(&self) -> Result<Epoch, JournalError> {
        self.host().map(|host| host.epoch)
    }

    /// What this host was told of the controller.
    pub(crate) fn host(&self) -> Result<HostRecord, JournalError> {
        Ok(read(&self.dir.join("host.json"))?.unwrap_or_default())
    }

    /// From now on commands of an older epoch are refused.
    pub(crate) fn write_epoch(&self, epoch: Epoch, epoch_id: String) -> Result<(), JournalError> {
        replace(&self.dir.join("host.json"), &HostRecord { epoch, epoch_id, mark: 0, ..self.host()? })
    }

    /// From now on a controller whose store is behind this is told so, and one that does not know these hosts hears of them.
    pub(crate) fn write_mark(&self, mark: u64, members: Vec<String>) -> Result<(), JournalError> {
        let known = self.host()?;
        if mark <= known.mark {
            return Ok(());
        }
        replace(&self.dir.join("host.json"), &HostRecord { mark, members, ..known })
    }
}

/// A record, if there is one.
fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, JournalError> {
    match fs::read(path) {
        Ok(bytes) => parse(path, &bytes).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(JournalError::Io { path: path.to_owned(), action: "read", source }),
    }
}

fn parse<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T, JournalError> {
    serde_json::from_slice(bytes).map_err(|source| JournalError::Record { path: path.to_owned(), source })
}

fn read_all<T: DeserializeOwned>(dir: &Path) -> Result<Vec<T>, JournalError> {
    let failed = |source| JournalError::Io { path: dir.to_owned(), action: "read", source };
    let mut records = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        // Anything else was left by a crash before the rename, or is about to be renamed: not a record.
        if path.extension().is_some_and(|extension| extension == "json") {
            match fs::read(&path) {
                Ok(bytes) => records.push(parse(&path, &bytes)?),
                // Removed since the directory was read.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(error)),
            }
        }
    }
    Ok(records)
}

fn replace<T: Serialize>(path: &Path, value: &T) -> Result<(), JournalError> {
    let failed = |source| JournalError::Io { path: path.to_owned(), action: "written", source };
    let bytes = serde_json::to_vec_pretty(value).map_err(|error| failed(io::Error::other(error)))?;
    let beside = path.with_extension("new");
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        sync_parent(path)
    };
    write().map_err(|error| {
        let _ = fs::remove_file(&beside);
        failed(error)
    })
}

fn remove(path: &Path) -> Result<(), JournalError> {
    let removed = match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other,
    };
    removed.and_then(|()| sync_parent(path)).map_err(|source| JournalError::Io { path: path.to_owned(), action: "removed", source })
}

fn sync_parent(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

#[cfg(test)]
mod tests;
