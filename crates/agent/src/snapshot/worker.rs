//! The vault worker: one job on a team's vault, in a cage, with the sockets that it was given.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use godwit_model::{Bytes, ErrorCode, SnapshotId, VaultFile, VaultFindings, VaultPlan, VaultRewrite};
use godwit_qemu::cage::worker::confine_to;
use godwit_stream::PAGE_SIZE;
use godwit_vault::{
    Contents, ContentsError, Earlier, FileError, Keys, Known, PackKey, Parts, PrunePlan, SnapshotDraft, SnapshotKey,
    SnapshotWriter, Space, SpaceKind, TeamKey, Vault, VaultError,
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde::Serialize;

use super::changed::Changed;
use super::control::{BitmapOf, DiskFile, DiskOf, DiskTo, Job, Kept, Keyed, MemoryFile, Restored, Said, WorkerConfig};
use super::disk::{TakeDiskError, take_changes, take_disk};
use super::lend::{LendError, lend};
use super::load::{LoadError, load_disk, load_memory};
use super::play::{PlayError, play, play_on};
use super::restore::{RestoreError, restore};
use super::serve::{ServeError, serve};
use super::take::{TakeError, take};
use super::unload::{UnloadError, unload_disk, unload_memory};

/// Pages of earlier snapshots that are known while one is taken: those of 64 GiB.
const KNOWN: usize = 16 << 20;
/// How many of these are looked through for one with memory.
const BEFORE: usize = 8;
/// How much of a vault's damage is told.
const MOST_DAMAGE: usize = 1_000;

/// Why a worker did not begin.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The descriptor that should hold the configuration does not.
    #[error("the configuration cannot be read")]
    Config(#[source] io::Error),
    /// It could not renounce all other files.
    #[error("it cannot be confined")]
    Confine(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Why a job is not done.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Vault(#[from] VaultError),
    #[error(transparent)]
    Take(#[from] TakeError),
    #[error(transparent)]
    Disk(#[from] TakeDiskError),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error(transparent)]
    Play(#[from] PlayError),
    #[error(transparent)]
    Unload(#[from] UnloadError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Lend(#[from] LendError),
    #[error("the snapshot cannot be written")]
    Write(#[source] io::Error),
    #[error("the snapshot has more disks, or larger ones, than can be kept")]
    Disks,
    #[error("the agent is gone")]
    Alone(#[source] io::Error),
    #[error("the job needs a vault, and was given none")]
    NoVault,
}

/// Runs `godwit vault-worker --config-fd N`: called before any thread exists.
///
/// # Errors
/// [`WorkerError`] if it could not begin; what fails later is told to the agent.
pub fn run(config_fd: RawFd) -> Result<(), WorkerError> {
    // Keys are in this process: no core, no debugger of the same uid.
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    open_as_many_files_as_allowed();
    let mut text = Vec::new();
    File::from(own(config_fd)).read_to_end(&mut text).map_err(WorkerError::Config)?;
    let config: WorkerConfig = serde_json::from_slice(&text).map_err(|error| WorkerError::Config(error.into()))?;
    text.fill(0);
    let vault = config.vault_fd.map(own);
    confine_to(vault.as_ref().map(AsFd::as_fd)).map_err(|error| WorkerError::Confine(error.into()))?;
    let agent = Agent { control: Mutex::new(own(config.control_fd).into()), disks: own(config.disks_fd).into() };
    let worked = match (vault, config.job) {
        (None, Job::Changed { disks }) => changed(&agent, &disks),
        (Some(vault), job) => Vault::at(vault.into()).map_err(Failure::from).and_then(|vault| work(&vault, job, &agent)),
        (None, _) => Err(Failure::NoVault),
    };
    let said = match worked {
        Ok(told) => Said::Done(told),
        Err(failure) => {
            let message = told(&failure);
            tracing::warn!(message, "failed");
            Said::Failed { code: failure.code(), message }
        }
    };
    // Who does not hear it any more knows that it ended.
    let _ = agent.say(&said);
    Ok(())
}

/// A snapshot may refer to many packs.
fn open_as_many_files_as_allowed() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let limits = getrlimit(Resource::Nofile);
    // It works with fewer, on fewer packs.
    let _ = setrlimit(Resource::Nofile, rustix::process::Rlimit { current: limits.maximum, ..limits });
}

#[expect(unsafe_code, reason = "descriptors that were inherited are plain numbers")]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the agent passed it for this alone, and each is taken once.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn told(failure: &Failure) -> String {
    crate::host::with_causes(failure)
}

/// Whoever started this.
struct Agent {
    control: Mutex<UnixStream>,
    disks: UnixStream,
}

impl Agent {
    fn say(&self, said: &Said) -> io::Result<()> {
        let mut line = serde_json::to_vec(said)?;
        line.push(b'\n');
        self.control.lock().unwrap_or_else(std::sync::PoisonError::into_inner).write_all(&line)
    }

    /// Asks for the socket of the next disk.
    fn next_disk(&self) -> Result<UnixStream, Failure> {
        self.say(&Said::NextDisk).map_err(Failure::Alone)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let received = loop {
            match rustix::net::recvmsg(&self.disks, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                received => break received,
            }
        };
        received.map_err(|error| Failure::Alone(error.into()))?;
        let rights = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        rights.map(UnixStream::from).ok_or_else(|| Failure::Alone(io::ErrorKind::UnexpectedEof.into()))
    }
}

fn work(vault: &Vault, job: Job, agent: &Agent) -> Result<serde_json::Value, Failure> {
    let keyed = |snapshots: &[Keyed]| snapshots.iter().map(Keyed::opened).collect::<Vec<(SnapshotId, SnapshotKey)>>();
    match job {
        Job::Take { snapshot, team, known, memory_fd, disks, about } => {
            let memory = memory_fd.map(|fd| UnixStream::from(own(fd)));
            let mut new = New::begin(vault, &snapshot, team, &known, disks.iter().map(|disk| (&disk.node, disk.size)))?;
            new.open_earlier(vault, &known, &disks);
            if memory.is_some() {
                new.open_before(vault, &known);
            }
            take_all(agent, new, memory, &disks, about)
        }
        Job::Restore { snapshot, disks } => {
            let (id, key) = snapshot.opened();
            let mut contents = vault.snapshot(id, &key)?;
            agent.say(&Said::Ready).map_err(Failure::Alone)?;
            let mut all = Restored::default();
            for DiskTo { node, changed } in disks {
                let Restored { read, written } = restore(agent.next_disk()?, &mut contents, &node, changed.as_ref())?;
                (all.read.0, all.written.0) = (all.read.0 + read.0, all.written.0 + written.0);
            }
            Ok(json(&all))
        }
        Job::Serve { snapshot, disk } => {
            let (id, key) = snapshot.opened();
            let mut contents = vault.snapshot(id, &key)?;
            agent.say(&Said::Ready).map_err(Failure::Alone)?;
            loop {
                match serve(agent.next_disk()?, &mut contents, &disk) {
                    Err(error) if !error.is_of_connection() => return Err(error.into()),
                    served => tracing::info!(%disk, failed = served.err().map(tracing::field::display), "QEMU has left"),
                }
            }
        }
        Job::Changed { disks } => changed(agent, &disks),
        Job::Unload { snapshot, disk, to_fd } => {
            let (id, key) = snapshot.opened();
            let mut contents = vault.snapshot(id, &key)?;
            let to = File::from(own(to_fd));
            let length = match disk {
                Some(disk) => unload_disk(&mut contents, &disk, &to)?,
                None => unload_memory(&mut contents, &to)?,
            };
            to.sync_all().map_err(UnloadError::Write)?;
            Ok(json(&Bytes(length)))
        }
        Job::Load { snapshot, team, known, memory, disks, about } => {
            let new = New::begin(vault, &snapshot, team, &known, disks.iter().map(|disk| (&disk.node, disk.size)))?;
            load_all(new, memory, &disks, about)
        }
        Job::Play { snapshot, qemu_fd, on } => {
            let (id, key) = snapshot.opened();
            let contents = vault.snapshot(id, &key)?;
            agent.say(&Said::Ready).map_err(Failure::Alone)?;
            // An agent that is gone is no reason to leave a VM without its memory.
            let played = if on {
                play_on(own(qemu_fd).into(), contents, || drop(agent.say(&Said::Resumed)))?
            } else {
                let first = vault.first_pages(id, &key);
                let keep = |first: &[_]| keep_first(vault, id, &key, first);
                play(own(qemu_fd).into(), contents, &first, || drop(agent.say(&Said::Loaded)), keep)?
            };
            tracing::info!(%id, asked = played.asked, background = played.background, on, "played");
            Ok(serde_json::Value::Null)
        }
        Job::Lend { snapshot, to_fd } => {
            let (id, key) = snapshot.opened();
            let to = UnixStream::from(own(to_fd));
            let lent = lend(&mut vault.snapshot(id, &key)?, &to)?;
            tracing::info!(%id, pages = lent, "lent");
            Ok(serde_json::Value::Null)
        }
        Job::Delete { snapshot } => {
            vault.delete(snapshot)?;
            Ok(serde_json::Value::Null)
        }
        Job::Usage => {
            let usage = vault.usage()?;
            Ok(json(&godwit_model::VaultUsage { snapshots: usage.snapshots, packs: usage.packs, bytes: usage.bytes }))
        }
        Job::Verify { snapshots, team } => {
            let wrong = vault.verify(&keyed(&snapshots), &TeamKey::new(team))?;
            let damage = wrong.iter().take(MOST_DAMAGE).map(|error| crate::host::with_causes(error)).collect();
            Ok(json(&VaultFindings { damage }))
        }
        Job::PlanPrune { snapshots } => Ok(json(&shown(&vault.plan_prune(&keyed(&snapshots).into_iter().collect())?))),
        Job::Prune { snapshots, plan } => {
            let keys: BTreeMap<SnapshotId, SnapshotKey> = keyed(&snapshots).into_iter().collect();
            vault.prune_if(&keys, |now| shown(now) == plan)?;
            Ok(json(&plan))
        }
    }
}

/// What a VM has asked for first is sent ahead the next time. It comes without, too.
fn keep_first(vault: &Vault, id: SnapshotId, key: &SnapshotKey, first: &[(u16, u32)]) {
    if let Err(error) = vault.keep_first_pages(id, key, first) {
        tracing::info!(%id, error = &error as &dyn std::error::Error, "what was asked for first is not kept");
    }
}

fn json<T: Serialize>(value: &T) -> serde_json::Value {
    serde_json::to_value(value).unwrap_or_default()
}

fn shown(plan: &PrunePlan) -> VaultPlan {
    let snapshots = plan.snapshots.iter().map(|(id, bytes)| VaultFile { name: format!("{id}.snapshot"), bytes: *bytes });
    let packs = plan.packs.iter().map(|(pack, bytes)| VaultFile { name: format!("{pack}.pack"), bytes: *bytes });
    let drafts = plan.drafts.iter().map(|(name, bytes)| VaultFile { name: name.clone(), bytes: *bytes });
    let rewrites = plan.rewrites.iter().map(|rewrite| VaultRewrite {
        name: format!("{}.pack", rewrite.pack),
        bytes: rewrite.bytes,
        freed: rewrite.freed(),
    });
    VaultPlan { files: snapshots.chain(packs).chain(drafts).collect(), rewrites: rewrites.collect() }
}

/// A snapshot that is being written.
struct New {
    draft: SnapshotDraft,
    keys: Keys,
    known: Known,
    disks: Vec<Space>,
    /// The number of the first disk's space, behind those of memory.
    first_disk: usize,
    /// Snapshots from which pages of disks are taken over.
    earlier: BTreeMap<SnapshotId, Earlier<File>>,
    /// The one to which pages of memory may be differences.
    before: Option<Earlier<File>>,
}

impl New {
    /// Reads what its writer is to know.
    fn begin<'a>(
        vault: &Vault,
        snapshot: &Keyed,
        team: [u8; 32],
        known: &[Keyed],
        disks: impl Iterator<Item = (&'a String, Bytes)>,
    ) -> Result<Self, Failure> {
        let (id, key) = snapshot.opened();
        // Of a try whose end nobody heard: it has not come to one, and does not any more.
        vault.forsake(id)?;
        let space = |(name, size): (&String, Bytes)| {
            let pages = u32::try_from(size.get().div_ceil(PAGE_SIZE as u64)).map_err(|_| Failure::Disks)?;
            Ok::<_, Failure>(Space { kind: SpaceKind::Disk, name: name.clone(), pages })
        };
        let disks = disks.map(space).collect::<Result<_, _>>()?;
        let known: Vec<(SnapshotId, SnapshotKey)> = known.iter().map(Keyed::opened).collect();
        let keys = Keys { snapshot: key, team: TeamKey::new(team), pack: PackKey::draw().map_err(Failure::Write)? };
        // The draft first: with it nothing is pruned that is known from here on.
        let draft = vault.begin(id)?;
        Ok(Self { draft, known: vault.known(&known, KNOWN)?, keys, disks, first_disk: 0, earlier: BTreeMap::new(), before: None })
    }

    /// Opens the snapshots since which what has changed on the disks is known. Of one that cannot be read nothing is taken over.
    fn open_earlier(&mut self, vault: &Vault, known: &[Keyed], disks: &[DiskOf]) {
        for id in disks.iter().filter_map(|disk| disk.since) {
            let Some((id, key)) = known.iter().find(|known| known.id == id && !self.earlier.contains_key(&id)).map(Keyed::opened)
            else {
                continue;
            };
            match vault.earlier(id, &key, &mut self.known) {
                Ok(earlier) => self.earlier.extend(earlier.map(|earlier| (id, earlier))),
                Err(error) => {
                    tracing::warn!(%id, error = &error as &dyn std::error::Error, "an earlier snapshot cannot be read: the disks are, whole");
                }
            }
        }
    }

    /// Opens the snapshot to which pages of memory may be differences: the first of those that are known which has memory, since those of the same VM come first, the newest of
    /// them before all. Without one, pages are written whole.
    fn open_before(&mut self, vault: &Vault, known: &[Keyed]) {
        let mut opened = known.iter().take(BEFORE).map(Keyed::opened).filter_map(|(id, key)| vault.snapshot(id, &key).ok());
        let has_memory = |contents: &Contents| contents.spaces().iter().any(|space| space.kind == SpaceKind::Ram);
        self.before = opened.find(has_memory).and_then(|contents| self.known.earlier(contents));
    }

    /// The snapshot from which a disk's pages are taken over, and its space there: if it had the same size.
    fn earlier(&mut self, disk: &DiskOf) -> Option<(&mut Earlier<File>, u16)> {
        let earlier = self.earlier.get_mut(&disk.since?)?;
        let pages = u32::try_from(disk.size.get().div_ceil(PAGE_SIZE as u64)).ok()?;
        let space = earlier.disk(&disk.node, pages)?;
        Some((earlier, space))
    }

    /// Its writer, once the spaces of memory are known. There is to be one.
    fn writer(&mut self, mut spaces: Vec<Space>) -> io::Result<SnapshotWriter<File, File>> {
        self.first_disk = spaces.len();
        spaces.append(&mut self.disks);
        let known = std::mem::replace(&mut self.known, Known::new(0));
        self.draft.writer(&self.keys, spaces, known, Bytes(u64::MAX))
    }

    /// The number of a disk's space.
    fn space(&self, disk: usize) -> Result<u16, Failure> {
        u16::try_from(self.first_disk + disk).map_err(|_| Failure::Disks)
    }

    fn commit(self, writer: SnapshotWriter<File, File>, parts: &Parts, read: u64) -> Result<serde_json::Value, Failure> {
        let (_, _, totals) = writer.finish(parts).map_err(Failure::Write)?;
        self.draft.commit(&totals)?;
        let written = Bytes(totals.snapshot.get().saturating_add(totals.pack.get()));
        Ok(json(&Kept { known: totals.known, new: totals.new, written, read: Bytes(read) }))
    }
}

fn take_all(
    agent: &Agent,
    mut new: New,
    memory: Option<UnixStream>,
    disks: &[DiskOf],
    about: Vec<u8>,
) -> Result<serde_json::Value, Failure> {
    agent.say(&Said::Ready).map_err(Failure::Alone)?;
    let (mut writer, parts) = match memory {
        Some(memory) => {
            let mut before = new.before.take();
            let taken = take(memory, before.as_mut(), |spaces| new.writer(spaces), || drop(agent.say(&Said::Began)))?;
            (taken.writer, taken.parts)
        }
        None => (new.writer(vec![]).map_err(Failure::Write)?, Parts::default()),
    };
    let mut read = 0;
    for (number, disk) in disks.iter().enumerate() {
        let (socket, space) = (agent.next_disk()?, new.space(number)?);
        read += match new.earlier(disk) {
            Some(earlier) => take_changes(socket, &disk.export, space, &mut writer, earlier)?,
            None => take_disk(socket, &disk.export, space, &mut writer)?,
        };
    }
    // Whoever asked for it may be gone, and has asked another.
    agent.say(&Said::Ready).map_err(Failure::Alone)?;
    new.commit(writer, &Parts { about, ..parts }, read)
}

/// What has changed on each disk.
fn changed(agent: &Agent, disks: &[BitmapOf]) -> Result<serde_json::Value, Failure> {
    let mut all = Vec::with_capacity(disks.len());
    for BitmapOf { export, bitmap } in disks {
        let changed = Changed::read(agent.next_disk()?, export, bitmap).map_err(TakeDiskError::from)?;
        all.push(changed.few(disks.len()));
    }
    Ok(json(&all))
}

fn load_all(mut new: New, memory: Option<MemoryFile>, disks: &[DiskFile], about: Vec<u8>) -> Result<serde_json::Value, Failure> {
    let (mut writer, parts) = match memory {
        Some(MemoryFile { fd, machine }) => load_memory(File::from(own(fd)), &machine, |spaces| new.writer(spaces))?,
        None => (new.writer(vec![]).map_err(Failure::Write)?, Parts::default()),
    };
    for (number, disk) in disks.iter().enumerate() {
        load_disk(&File::from(own(disk.fd)), new.space(number)?, &mut writer)?;
    }
    new.commit(writer, &Parts { about, ..parts }, 0)
}

impl Failure {
    fn code(&self) -> ErrorCode {
        use ErrorCode as E;
        match self {
            Self::Vault(VaultError::Busy) => E::VmBusy,
            Self::Vault(VaultError::NotFound(_)) => E::NotFound,
            Self::Vault(VaultError::Changed) => E::RevisionConflict,
            Self::Vault(VaultError::File { .. } | VaultError::Missing { .. }) => E::SnapshotDamaged,
            Self::Restore(RestoreError::Contents(error)) | Self::Play(PlayError::Contents(error)) => of_contents(error),
            Self::Unload(UnloadError::Contents(error)) | Self::Serve(ServeError::Contents(error)) => of_contents(error),
            Self::Lend(LendError::Contents(error)) => of_contents(error),
            Self::Lend(LendError::NoRam) => E::SnapshotDamaged,
            Self::Play(PlayError::Preamble(_) | PlayError::NoRam) | Self::Unload(UnloadError::Preamble(_)) => E::SnapshotDamaged,
            Self::Play(PlayError::Refused | PlayError::Answer(_)) => E::QemuFailed,
            Self::Restore(RestoreError::TooSmall { .. }) => E::VolumeTruncated,
            Self::Restore(RestoreError::NoDisk(_)) | Self::Unload(UnloadError::NoDisk(_)) => E::NotFound,
            Self::Restore(RestoreError::Disk(error)) if error.is_no_space() => E::NotEnoughSpace,
            failure if failure.is_no_space() => E::NotEnoughSpace,
            Self::Take(_) | Self::Disk(_) | Self::Disks | Self::Alone(_) => E::SnapshotFailed,
            Self::Serve(ServeError::NoDisk(_)) => E::NotFound,
            Self::Restore(_) | Self::Play(_) | Self::Serve(_) => E::QemuFailed,
            Self::Load(LoadError::Read(_) | LoadError::Write(_)) | Self::Unload(_) => E::HostFailed,
            Self::Load(_) => E::SnapshotInvalid,
            Self::Vault(_) | Self::Write(_) | Self::Lend(LendError::Write(_)) => E::HostFailed,
            Self::NoVault => E::Internal,
        }
    }

    fn is_no_space(&self) -> bool {
        let is = |error: &io::Error| {
            matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge)
        };
        match self {
            Self::Vault(VaultError::Io { source, .. })
            | Self::Take(TakeError::Write(source))
            | Self::Disk(TakeDiskError::Write(source))
            | Self::Unload(UnloadError::Write(source))
            | Self::Load(LoadError::Write(source))
            | Self::Write(source) => is(source),
            _ => false,
        }
    }
}

fn of_contents(error: &ContentsError) -> ErrorCode {
    match error {
        ContentsError::Snapshot(FileError::Io(_)) | ContentsError::Pack { source: FileError::Io(_), .. } => ErrorCode::HostFailed,
        _ => ErrorCode::SnapshotDamaged,
    }
}
