//! A snapshot of a VM that runs on.
//!
//! ```text
//! worker knows the vault, all memory is mapped, fleeces are made ─▶ stop ─▶ fleeces begin, memory begins ─▶ run on
//!                                              all that is slow │      the guest stands still      │
//! ─▶ memory comes ─▶ each disk is read from its fleece ─▶ durable ─▶ what is written since is known ─▶ fleeces end
//! ```
//! With the fleeces begins on each disk a bitmap of what is written from then on. It says something once the snapshot is durable, and from then on as long as QEMU lives: the next snapshot reads
//! what has changed since, and takes over all else ([`godwit_qemu::since`]).
//!
//! Whatever ends it, QEMU is then as before: the journal says that a snapshot is under way before anything is done, so that an agent that was killed puts it
//! right in its next life. Memory that QEMU has begun to write is read to the end in any case, by whoever there is: see [`godwit_qemu::snapshot`].

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_model::{
    Bytes, ErrorCode, Generation, HostCondition, Refusal, Retry, RunState, SnapshotFigures, SnapshotId, SnapshotSize, TaskId, VmId,
    VolumeRef,
};
use godwit_qemu::PassedFds;
use godwit_qemu::fleece::fleece_node;
use godwit_qemu::process::ProcessIdentity;
use godwit_qemu::qga::{Frozen, Thawed};
use godwit_qemu::qmp::views::RunStatus;
use godwit_qemu::qmp::{Notice, Notices, Qmp, QmpError};
use godwit_qemu::since::{CHANGED, Since};
use godwit_qemu::snapshot::held_socket;
use tokio::sync::{OwnedMutexGuard, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::actor::{Actor, Answer, RETRY, qemu_failed};
use super::disks;
use super::placement::{self, Access};
use super::playing::has_ended;
use crate::carry::ProcessMemory;
use crate::guest;
use crate::host::{SharedHost, host_failed};
use crate::journal::{SnapshotRecord, VmRecord};
use crate::snapshot::{DiskOf, Job, Kept, Said, SnapshotJob, Worker};

/// How long the guest may stand still while QEMU begins.
const BEGINNING: Duration = Duration::from_secs(20);
const STOPPING: Duration = Duration::from_secs(10);
/// How long a snapshot waits for memory that still comes out of another.
const ARRIVING: Duration = Duration::from_secs(600);
const LOOK: Duration = Duration::from_millis(5);
/// Questions that QEMU leaves unanswered, ten seconds each, before others have their turn.
const MOST_UNANSWERED: u32 = 3;

/// How a snapshot has ended.
pub(super) struct Ended {
    taken: Result<SnapshotFigures, Refusal>,
    /// QEMU is as it was before; else it is yet to be put right.
    is_right: bool,
}

/// A snapshot that is being taken.
pub(super) struct Snapshotting {
    task: TaskId,
    cancel: CancellationToken,
    work: JoinHandle<Ended>,
    reply: oneshot::Sender<Result<Answer, Refusal>>,
}

impl Snapshotting {
    /// Waits for its end.
    pub(super) async fn ended(&mut self) -> Ended {
        (&mut self.work).await.unwrap_or_else(|error| {
            let message = format!("taking a snapshot ended unexpectedly: {error}");
            Ended { taken: Err(Refusal::new(ErrorCode::Internal, message)), is_right: false }
        })
    }
}

impl Actor {
    /// Answers when the snapshot is durable, and holds up nothing meanwhile.
    pub(super) async fn on_snapshot(
        &mut self,
        generation: Generation,
        task: TaskId,
        job: SnapshotJob,
        reply: oneshot::Sender<Result<Answer, Refusal>>,
    ) {
        match self.begin_snapshot(generation, job).await {
            Ok((cancel, work)) => self.snapshot = Some(Snapshotting { task, cancel, work, reply }),
            Err(refusal) => {
                tracing::info!(code = %refusal.code, message = refusal.message, "no snapshot is begun");
                let _ = reply.send(Err(refusal));
            }
        }
    }

    async fn begin_snapshot(
        &mut self,
        generation: Generation,
        job: SnapshotJob,
    ) -> Result<(CancellationToken, JoinHandle<Ended>), Refusal> {
        self.owned(generation)?;
        self.undisturbed()?;
        let qmp = self.monitor()?.clone();
        self.refresh().await;
        let ran = self.state == RunState::Running;
        if !ran && job.request.memory && !self.host.facts.keeps_memory_of_paused() {
            let version = &self.host.facts.qemu;
            return Err(Refusal::new(
                ErrorCode::Unsupported,
                format!("QEMU {version} would let a paused VM run while its memory is kept"),
            )
            .hint("let it run first (`godwit vm unpause`), or take its disks alone: `--disks-only`"));
        }
        let Some(record) = &mut self.record else {
            return Err(Refusal::new(ErrorCode::NotFound, "this host does not hold the VM"));
        };
        let mut disks = Vec::new();
        for (node, volume) in disks::nodes(&record.spec) {
            let size = qmp.size_of_disk(&node).await.map_err(qemu_failed)?;
            let size = size.ok_or_else(|| Refusal::new(ErrorCode::Internal, format!("QEMU has no disk {volume}")))?.size;
            disks.push(TakenDisk { node, volume, size, since: None });
        }
        if disks.is_empty() && !job.request.memory {
            return Err(Refusal::new(
                ErrorCode::BadRequest,
                "the VM has no disk, and its memory is not wanted: nothing would be kept",
            ));
        }
        let stream = if job.request.memory { Some(Stream::new()?) } else { None };
        let left = SnapshotRecord {
            ran,
            disks: disks.iter().map(|disk| disk.node.clone()).collect(),
            socket: stream.as_ref().map(Stream::inode).transpose()?,
        };
        record.snapshot = Some(left.clone());
        self.save()?;
        let memory = if stream.is_some() { self.memory_to_prepare(&qmp).await.map(Arc::new) } else { None };
        let (host, vm, cancel) = (Arc::clone(&self.host), self.vm, CancellationToken::new());
        let held = stream.as_ref().and_then(|stream| stream.read.try_clone().ok());
        self.held = held.as_ref().and_then(|held| held.try_clone().ok());
        let mut taking = Taking { host, vm, qmp, disks, job, ran, figures: SnapshotFigures::default() };
        let (cancelled, process) = (cancel.clone(), self.process.clone());
        let work = tokio::spawn(async move {
            let taken = tokio::select! {
                taken = taking.take(stream, memory.clone()) => taken,
                () = cancelled.cancelled() => Err(Refusal::new(ErrorCode::Cancelled, "cancelled by request")),
            };
            let right = put_right(&taking.qmp, &left, held).await;
            // Memory that was protected is in small pages now, which slow the guest down.
            if right.is_ok()
                && let Some(memory) = memory.filter(|_| taking.figures.memory)
            {
                let joining = Arc::clone(&memory.joining).lock_owned().await;
                drop(tokio::task::spawn_blocking(move || memory.join(&joining)));
            }
            // One that has ended has nothing left to put right.
            let is_right = match &right {
                Ok(()) => true,
                Err(QmpError::Ended { .. }) => match process {
                    Some(process) => has_ended(&process).await,
                    None => true,
                },
                Err(_) => false,
            };
            if let (false, Err(error)) = (is_right, &right) {
                tracing::warn!(error = error as &dyn std::error::Error, "QEMU is not as before the snapshot yet");
            }
            Ended { taken: taken.map(|()| taking.figures), is_right }
        });
        Ok((cancel, work))
    }

    /// The VM's memory, if it is found: without it the guest stands still for longer.
    async fn memory_to_prepare(&self, qmp: &Qmp) -> Option<Mapped> {
        let blocks = self.memory_blocks(qmp).await?;
        let process = self.process.as_ref()?;
        let (memory, map) = placement::open(process.identity(), Access::Read).ok()?;
        let memory = ProcessMemory::new(memory.into(), map.into(), blocks);
        Some(Mapped { process: process.pidfd().ok()?, memory, joining: Arc::clone(&self.joining) })
    }

    /// Nothing else works on the VM's memory or disks.
    pub(super) fn undisturbed(&self) -> Result<(), Refusal> {
        if self.record.as_ref().is_some_and(|record| self.process.is_some() && !record.filling.is_empty()) {
            return Err(Refusal::new(ErrorCode::VmBusy, "disks of the VM still come out of a snapshot")
                .hint("wait until the task that began it has ended; `godwit task list` shows it")
                .retry(Retry::Safe));
        }
        if self.snapshot.is_none() {
            return Ok(());
        }
        Err(Refusal::new(ErrorCode::VmBusy, "a snapshot of the VM is being taken")
            .hint("wait until it has ended; `godwit task list` shows it")
            .retry(Retry::Safe))
    }

    /// Ends a snapshot, if it is this task's.
    pub(super) fn cancel_snapshot(&self, task: TaskId) -> bool {
        let found = self.snapshot.as_ref().filter(|snapshot| snapshot.task == task);
        found.inspect(|snapshot| snapshot.cancel.cancel()).is_some()
    }

    /// It has ended. What QEMU was not put right from is tried again, as after a restart.
    pub(super) fn on_snapshot_ended(&mut self, Ended { taken, is_right }: Ended) {
        if is_right {
            self.forget_snapshot();
        } else {
            self.wake = tokio::time::Instant::now() + RETRY;
        }
        match &taken {
            Ok(figures) => tracing::info!(?figures, "a snapshot was taken"),
            Err(refusal) => tracing::info!(code = %refusal.code, message = refusal.message, "no snapshot was taken"),
        }
        let answer = taken.map(|figures| Answer { result: godwit_link::encode(&figures), ..Answer::default() });
        if let Some(snapshot) = self.snapshot.take() {
            let _ = snapshot.reply.send(answer);
        }
    }

    /// Nothing of a snapshot is left in QEMU.
    fn forget_snapshot(&mut self) {
        self.held = None;
        if let Some(record) = &mut self.record {
            record.snapshot = None;
        }
        self.save_or_log();
    }

    /// An agent that is no more was taking a snapshot: what QEMU still writes of it is read, since QEMU may not even answer before that.
    pub(super) fn read_what_is_left_of_a_snapshot(&mut self, record: &VmRecord, qemu: &ProcessIdentity) {
        let Some(inode) = record.snapshot.as_ref().and_then(|snapshot| snapshot.socket) else { return };
        match held_socket(qemu, inode) {
            Ok(held) => self.held = held,
            Err(error) => tracing::error!(%error, "the socket of a snapshot cannot be taken from QEMU: it may stand still"),
        }
        if let Some(held) = self.held.as_ref().and_then(|held| held.try_clone().ok()) {
            drop(throw_away(held));
        }
    }

    /// Puts right what a snapshot has left in QEMU that nobody takes any more.
    pub(super) async fn clear_up_snapshot(&mut self) {
        let (Some(qmp), None, None) = (&self.qmp, &self.snapshot, &self.moving) else { return };
        let Some(left) = self.record.as_ref().and_then(|record| record.snapshot.clone()) else { return };
        tracing::info!("puts an end to a snapshot that nobody takes any more");
        let held = self.held.as_ref().and_then(|held| held.try_clone().ok());
        if let Err(error) = put_right(qmp, &left, held).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "QEMU is not as before the snapshot yet");
            self.wake = tokio::time::Instant::now() + RETRY;
            return;
        }
        self.forget_snapshot();
        self.refresh().await;
    }
}

/// Waits while memory of the VM is still coming out of a snapshot, for so long.
pub(super) async fn memory_is_whole(qmp: &Qmp, limit: Duration) -> Result<(), Refusal> {
    let began = Instant::now();
    while qmp.migration().await.map_err(qemu_failed)?.needs_pages() {
        if began.elapsed() > limit {
            return Err(Refusal::new(ErrorCode::VmBusy, "memory of the VM is still coming out of its snapshot")
                .hint("try again in a moment")
                .retry(Retry::Safe));
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// Whatever a snapshot has done to QEMU, nothing of it is left. `held` is where its memory comes, if it does: nobody else reads that any more.
async fn put_right(qmp: &Qmp, left: &SnapshotRecord, held: Option<UnixStream>) -> Result<(), QmpError> {
    if let Some(held) = held {
        read_to_the_end(qmp, held).await?;
    }
    if left.socket.is_some() {
        qmp.end_memory_snapshot().await?;
    }
    qmp.stop_serving_disks().await?;
    for disk in &left.disks {
        qmp.end_fleece(disk).await?;
    }
    // Also a VM that stands still because there was no room for what it wrote over: now nothing needs room.
    if left.ran && !qmp.query_status().await?.running {
        qmp.cont().await?;
    }
    for disk in &left.disks {
        if let Err(error) = qmp.forget_taking(disk).await {
            tracing::info!(%error, disk, "a bitmap stays until the next snapshot");
        }
    }
    Ok(())
}

fn throw_away(mut reading: UnixStream) -> JoinHandle<()> {
    tokio::task::spawn_blocking(move || {
        let mut piece = vec![0; 1 << 20];
        while matches!(std::io::Read::read(&mut reading, &mut piece), Ok(1..)) {}
    })
}

/// Throws away what QEMU still writes of a snapshot, until it has written everything. QEMU may answer nothing before that; if it does not for long, the
/// reading goes on alone.
async fn read_to_the_end(qmp: &Qmp, from: UnixStream) -> Result<(), QmpError> {
    let Ok(reading) = from.try_clone() else { return Ok(()) };
    let thrown_away = throw_away(reading);
    let mut unanswered = 0;
    loop {
        match qmp.migration().await {
            Ok(status) if status.is_final() => break,
            Ok(_) => tokio::time::sleep(LOOK).await,
            Err(QmpError::TimedOut { .. }) if unanswered < MOST_UNANSWERED => unanswered += 1,
            // The socket stays open: QEMU may still write.
            Err(error) => return Err(error),
        }
    }
    // One that never began has no end.
    let _ = from.shutdown(std::net::Shutdown::Both);
    let _ = thrown_away.await;
    Ok(())
}

/// The socket on which memory comes: QEMU's end, and that which is read.
struct Stream {
    written: UnixStream,
    read: UnixStream,
}

impl Stream {
    fn new() -> Result<Self, Refusal> {
        let (read, written) = UnixStream::pair().map_err(|error| host_failed("no socket pair", &error))?;
        Ok(Self { written, read })
    }

    fn inode(&self) -> Result<u64, Refusal> {
        let known = rustix::fs::fstat(&self.read).map(|known| known.st_ino);
        known.map_err(|error| host_failed("a socket cannot be looked at", &std::io::Error::from(error)))
    }
}

/// The VM's memory as QEMU has it.
struct Mapped {
    process: OwnedFd,
    memory: ProcessMemory,
    /// Held by whoever joins its pages. None may be joined while they are protected.
    joining: Joining,
}

/// One for each VM.
pub(super) type Joining = Arc<tokio::sync::Mutex<()>>;

impl Mapped {
    /// Makes short what the guest stands still for.
    fn prepare(&self, joining: &OwnedMutexGuard<()>) -> std::io::Result<()> {
        self.join(joining);
        self.memory.map_all()
    }

    fn join(&self, _: &OwnedMutexGuard<()>) {
        match self.memory.join_pages(&self.process) {
            Ok(large_pages) => tracing::debug!(large_pages, "the VM's memory is in large pages where it can be"),
            Err(error) => tracing::info!(%error, "the VM's memory stays in small pages"),
        }
    }
}

struct TakenDisk {
    node: String,
    volume: VolumeRef,
    size: Bytes,
    /// What was written to it since an earlier snapshot is known.
    since: Option<Since>,
}

/// What it takes.
struct Taking {
    host: SharedHost,
    vm: VmId,
    qmp: Qmp,
    disks: Vec<TakenDisk>,
    job: SnapshotJob,
    ran: bool,
    figures: SnapshotFigures,
}

impl Taking {
    async fn take(&mut self, stream: Option<Stream>, mapped: Option<Arc<Mapped>>) -> Result<(), Refusal> {
        let began = Instant::now();
        memory_is_whole(&self.qmp, ARRIVING).await?;
        let stream = self.prepare_memory(stream, mapped).await?;
        let memory = stream.is_some();
        for TakenDisk { node, volume, size, .. } in &self.disks {
            let room = self.host.pools.scratch(&volume.pool, *size).await?;
            self.qmp.add_fleece(node, room).await.map_err(failed)?;
        }
        if !self.disks.is_empty() {
            disks::serve(&self.host, self.vm, &self.qmp).await?;
            if let Err(error) = self.choose_earlier().await {
                tracing::info!(%error, "what has changed is not known: the disks are read whole");
                self.disks.iter_mut().for_each(|disk| disk.since = None);
            }
        }
        let mut worker = self.start_worker(stream).await?;
        let frozen = self.freeze().await;
        let pause = self.begin(&mut worker, memory).await;
        if let Some(frozen) = frozen
            && frozen.thaw().await == Thawed::TimeWasOver
        {
            let warning = "the guest's file systems were let go before the instant of the snapshot: they are as after a power cut";
            self.figures.warnings.push(warning.into());
        }
        self.figures.pause_us = pause?.map(|pause| u64::try_from(pause.as_micros()).unwrap_or(u64::MAX));
        let notices = self.qmp.listen();
        let kept = tokio::select! {
            kept = self.follow(&mut worker) => kept?,
            refusal = stopped_for_want_of_room(&self.qmp, notices) => return Err(refusal),
        };
        let there: Vec<SnapshotId> = self.job.known.iter().map(|known| known.id).collect();
        if let Err(error) = self.qmp.keep_since(&self.nodes(), self.job.snapshot.id, &there).await {
            tracing::info!(%error, "what is written since the snapshot is not known: the next one reads the disks whole");
        }
        self.figures.memory = memory;
        let size_of = |disk: &TakenDisk| SnapshotSize { volume: disk.volume.clone(), size: disk.size };
        self.figures.sizes = self.disks.iter().map(size_of).collect();
        self.figures.took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        (self.figures.pages_known, self.figures.pages_new) = (kept.known, kept.new);
        (self.figures.written, self.figures.disks_read) = (kept.written, kept.read);
        Ok(())
    }

    fn nodes(&self) -> Vec<String> {
        self.disks.iter().map(|disk| disk.node.clone()).collect()
    }

    /// Of each disk the newest snapshot since which all that was written to it is known, if its pages need not be kept once more. What a try before this one has left is removed.
    async fn choose_earlier(&mut self) -> Result<(), QmpError> {
        let SnapshotJob { snapshot, known, .. } = &self.job;
        for disk in &mut self.disks {
            self.qmp.forget_taking(&disk.node).await?;
            self.qmp.forget_since(&disk.node, Some(snapshot.id)).await?;
            let since = self.qmp.since(&disk.node).await?;
            disk.since = since.into_iter().rfind(|since| known.iter().any(|known| known.id == since.snapshot));
        }
        Ok(())
    }

    /// Whether memory is kept. Where QEMU does not let it, the disks alone are, with a warning; a VM without disks has nothing else to keep.
    async fn prepare_memory(&mut self, stream: Option<Stream>, mapped: Option<Arc<Mapped>>) -> Result<Option<UnixStream>, Refusal> {
        let Some(Stream { written, read }) = stream else { return Ok(None) };
        match self.qmp.prepare_memory_snapshot().await {
            Ok(()) => {}
            Err(error) => {
                let lacks = self.host.facts.condition(HostCondition::NO_MEMORY_SNAPSHOT);
                let is_refused = error.refused().is_some();
                let refusal = match lacks.filter(|_| is_refused) {
                    Some(lacks) => Refusal::new(ErrorCode::UserfaultUnavailable, error.to_string())
                        .hint(format!("{}; or take its disks alone: `--disks-only`", lacks.fix)),
                    None => failed(error),
                };
                if !is_refused || self.disks.is_empty() {
                    return Err(refusal);
                }
                let fix = refusal.hint.as_deref().unwrap_or_default();
                self.figures.warnings.push(format!("memory is not in it, the VM would boot from its disks: {refusal}: {fix}"));
                return Ok(None);
            }
        }
        let copied = read.try_clone().map_err(|error| host_failed("a socket cannot be copied", &error))?;
        self.qmp.hold_snapshot_socket(written.into(), copied.into()).await.map_err(failed)?;
        if let Some(mapped) = mapped {
            let joining = Arc::clone(&mapped.joining).lock_owned().await;
            let mapping = tokio::task::spawn_blocking(move || mapped.prepare(&joining)).await;
            if let Ok(Err(error)) = mapping {
                tracing::info!(%error, "the VM's memory is not all prepared: it stands still for longer");
            }
        }
        Ok(Some(read))
    }

    async fn start_worker(&self, memory: Option<UnixStream>) -> Result<Worker, Refusal> {
        let SnapshotJob { vault, snapshot, known, about, .. } = &self.job;
        let directory = self.host.pools.vault(&vault.pool, &vault.team, self.host.vault_uid()).await?;
        let mut fds = PassedFds::new();
        let of_disk = |TakenDisk { node, size, since, .. }: &TakenDisk| DiskOf {
            node: node.clone(),
            export: fleece_node(node),
            size: *size,
            since: since.as_ref().map(|since| since.snapshot),
        };
        let job = Job::Take {
            snapshot: snapshot.clone(),
            team: vault.key,
            known: known.clone(),
            memory_fd: memory.map(|memory| fds.pass(memory)),
            disks: self.disks.iter().map(of_disk).collect(),
            about: about.clone(),
        };
        let mut worker = Worker::start(&self.host, directory, job, fds).await?;
        match worker.hear().await? {
            Said::Ready => Ok(worker),
            said => Err(unexpected(&said)),
        }
    }

    /// Brings the guest's file systems to rest, if that is wanted. A guest that cannot is no reason not to keep it.
    async fn freeze(&mut self) -> Option<Frozen> {
        let limit = Duration::from_millis(self.job.request.quiesce?.get());
        match guest::freeze(&self.host, self.vm, limit).await {
            Ok(frozen) => Some(frozen),
            Err(refusal) => {
                let warning =
                    format!("the guest's file systems were not brought to rest, they are as after a power cut: {refusal}");
                self.figures.warnings.push(warning);
                None
            }
        }
    }

    /// The instant of the snapshot; how long the guest stood still.
    async fn begin(&self, worker: &mut Worker, memory: bool) -> Result<Option<Duration>, Refusal> {
        let disks: Vec<(String, Option<Since>)> = self.disks.iter().map(|disk| (disk.node.clone(), disk.since.clone())).collect();
        let (began, mut notices) = (Instant::now(), self.qmp.listen());
        // What has no disks is of one instant whenever QEMU takes it, and QEMU stops the guest for less long.
        let stops = memory && self.ran && !disks.is_empty();
        // Sent at once: QEMU does one after the other, and the guest stands still for less long.
        let stop = async { if stops { self.qmp.stop(STOPPING).await } else { Ok(()) } };
        let fleeces = async { if disks.is_empty() { Ok(()) } else { self.qmp.begin_fleeces(&disks, self.job.snapshot.id).await } };
        let (stopped, fleeced) = tokio::join!(biased; stop, fleeces);
        stopped.and(fleeced).map_err(failed)?;
        // After the fleeces: an old QEMU lets the guest run when memory has begun, without being told. And not before they are there: memory that has begun comes to its end.
        if memory {
            self.qmp.begin_memory_snapshot().await.map_err(failed)?;
        }
        let asked = began.elapsed();
        let mut written = asked;
        if memory {
            let said = tokio::time::timeout(BEGINNING, worker.hear()).await;
            let late =
                |_| Refusal::new(ErrorCode::SnapshotFailed, format!("QEMU did not begin to write memory within {BEGINNING:?}"));
            match said.map_err(late)? {
                Ok(Said::Began) => {}
                Ok(said) => return Err(unexpected(&said)),
                Err(refusal) => return Err(self.why(refusal).await),
            }
            written = began.elapsed();
            if stops {
                self.qmp.cont().await.map_err(failed)?;
            }
        }
        tracing::debug!(?asked, ?written, over = ?began.elapsed(), "the instant of a snapshot");
        if !self.ran {
            return Ok(None);
        }
        let (elapsed, told) = (began.elapsed(), if memory { stood_still(&mut notices).await } else { None });
        Ok(Some(told.unwrap_or(elapsed)))
    }

    /// Gives the worker each disk as it asks for it, until it is done.
    async fn follow(&self, worker: &mut Worker) -> Result<Kept, Refusal> {
        let mut disks = self.disks.iter();
        loop {
            match worker.hear().await {
                Ok(Said::NextDisk) => {
                    let Some(TakenDisk { node, since, .. }) = disks.next() else { return Err(unexpected(&Said::NextDisk)) };
                    let bitmap = since.as_ref().map(|_| CHANGED);
                    self.qmp.export_disk(&fleece_node(node), false, bitmap).await.map_err(failed)?;
                    worker.pass_disk(&disks::connect(&self.host, self.vm)?)?;
                }
                Ok(Said::Done(told)) => {
                    return serde_json::from_value(told)
                        .map_err(|error| host_failed("what the vault worker tells is not understood", &error));
                }
                Ok(Said::Ready) => {}
                Ok(said) => return Err(unexpected(&said)),
                Err(refusal) => return Err(self.why(refusal).await),
            }
        }
    }

    /// What QEMU says of a stream that ended before its time says more than that it did.
    async fn why(&self, refusal: Refusal) -> Refusal {
        match self.qmp.query_migrate().await {
            Ok(migration) if refusal.code == ErrorCode::SnapshotFailed => match migration.error_desc {
                Some(said) => Refusal { message: format!("{}: {said}", refusal.message), ..refusal },
                None => refusal,
            },
            _ => refusal,
        }
    }
}

/// How long the guest stood still, as QEMU says; it is told that it runs by now, or in a moment.
async fn stood_still(notices: &mut Notices) -> Option<Duration> {
    const TOLD: Duration = Duration::from_secs(1);
    let told = async {
        let mut stopped = None;
        loop {
            match notices.next().await {
                Notice::Event(event) if event.name == "STOP" => stopped = event.micros,
                Notice::Event(event) if event.name == "RESUME" => return event.micros?.checked_sub(stopped?),
                Notice::Event(_) => {}
                Notice::Missed(_) | Notice::Ended(_) => return None,
            }
        }
    };
    tokio::time::timeout(TOLD, told).await.ok()?.map(Duration::from_micros)
}

/// Ends when the guest was stopped because what it writes over could not be kept.
async fn stopped_for_want_of_room(qmp: &Qmp, mut notices: Notices) -> Refusal {
    loop {
        match notices.next().await {
            Notice::Event(event) if event.name == "STOP" => {
                if qmp.query_status().await.is_ok_and(|status| status.status == RunStatus::IoError) {
                    let message = "there was no room to keep what the guest writes over while its disks are read";
                    return Refusal::new(ErrorCode::NotEnoughSpace, message)
                        .hint("free space in the pools of the VM's disks; the VM runs on")
                        .retry(Retry::Safe);
                }
            }
            Notice::Event(_) | Notice::Missed(_) => {}
            // The worker says what became of it.
            Notice::Ended(_) => std::future::pending().await,
        }
    }
}

fn failed(error: QmpError) -> Refusal {
    Refusal { code: ErrorCode::SnapshotFailed, ..qemu_failed(error) }
}

fn unexpected(said: &Said) -> Refusal {
    Refusal::new(ErrorCode::Internal, format!("the vault worker said {said:?} where nobody expects it"))
}
