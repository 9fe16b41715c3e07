//! A VM that runs while its disks still come out of a snapshot.
//!
//! ```text
//! workers have the snapshot ─▶ QEMU is there ─▶ room between the guest and each disk ─▶ vCPUs run ─▶ memory is whole ─▶ one disk after the other comes ─▶ done
//! ```
//! What the guest reads comes from a worker at once; what it writes lies in room of its own, and on its disk too once that comes. Until all has come, a disk is half of what it was and half of
//! what it is to be, and what the guest has written since it began is lost with QEMU: whoever asked for it is answered only then, and begins anew if it comes to no end.
//!
//! Workers outlive the agent, and one that ends before its time has a successor. The journal names the disks, so that an agent that was restarted sees it to its end; once it is asked for the same again, which
//! brings the snapshot's key, there are successors again, too.

use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use godwit_model::{Bytes, ErrorCode, Refusal, ResolvedDisk, ResolvedSpec, RestoreFigures, Retry, VmId};
use godwit_qemu::PassedFds;
use godwit_qemu::disks::disk_node;
use godwit_qemu::fill::Fill;
use godwit_qemu::qmp::views::RunStatus;
use godwit_qemu::qmp::{Qmp, QmpError};
use godwit_stream::PAGE_SIZE;
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};

use super::actor::{Actor, Answer, qemu_failed};
use super::moving::millis;
use super::playing::{PAUSES, is_for_good, opened};
use super::start::has_shut_down;
use crate::host::{SharedHost, host_failed};
use crate::snapshot::{FromSnapshot, Job, Said, Worker};

/// How long disks wait for memory, which the guest needs sooner.
const MEMORY_FIRST: Duration = Duration::from_secs(600);
const LOOK: Duration = Duration::from_millis(100);
/// How often QEMU may refuse a step, and how long until it is said again.
const MOST_REFUSALS: u32 = 3;
const AGAIN: Duration = Duration::from_secs(1);

const ONCE_MORE: &str = "roll it back, or start it, once more: it begins from the snapshot anew";

pub(super) type Reply = oneshot::Sender<Result<Answer, Refusal>>;

/// Disks that are being filled.
pub(super) struct Filling {
    /// None while there is no session with QEMU.
    work: Option<JoinHandle<Result<Filled, Stop>>>,
    /// Workers of this agent serve.
    is_served: bool,
    /// Who waits for it, and what is to be told.
    waits: Vec<(Reply, RestoreFigures)>,
}

/// How long it took in milliseconds, and how many bytes there are.
pub(super) type Filled = (u64, Bytes);

/// Why it does not go on.
pub(super) enum Stop {
    /// The session with QEMU is lost. QEMU need not be.
    Lost,
    /// It cannot.
    Failed(Refusal),
}

impl Filling {
    pub(super) const fn is_at_work(&self) -> bool {
        self.work.is_some()
    }

    /// Answers when it has ended, with these figures and its own.
    pub(super) fn answer_later(&mut self, reply: Reply, figures: RestoreFigures) {
        self.waits.push((reply, figures));
    }

    /// Waits for the end of its work.
    pub(super) async fn ended(&mut self) -> Result<Filled, Stop> {
        let Some(work) = &mut self.work else { return std::future::pending().await };
        let unexpected = |error| Refusal::new(ErrorCode::Internal, format!("filling the VM's disks ended unexpectedly: {error}"));
        work.await.unwrap_or_else(|error| Err(Stop::Failed(unexpected(error))))
    }

    fn answer(&mut self, ended: &Result<Filled, Refusal>) {
        for (reply, figures) in self.waits.drain(..) {
            let told = |(filled_ms, filled): &Filled| {
                let figures = RestoreFigures { filled_ms: *filled_ms, filled: *filled, ..figures };
                Answer { result: godwit_link::encode(&figures), ..Answer::default() }
            };
            let _ = reply.send(ended.as_ref().map(told).map_err(Clone::clone));
        }
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        self.work.iter().for_each(JoinHandle::abort);
    }
}

/// A disk that comes while the VM runs.
pub(super) struct ToFill {
    slot: usize,
    disk: ResolvedDisk,
    worker: Worker,
}

impl ToFill {
    /// When its worker has opened the snapshot.
    pub(super) async fn begin(host: &SharedHost, from: &FromSnapshot, slot: usize, disk: &ResolvedDisk) -> Result<Self, Refusal> {
        let worker = start_worker(host, from, &disk_node(slot)).await?;
        Ok(Self { slot, disk: disk.clone(), worker })
    }

    pub(super) fn node(&self) -> String {
        disk_node(self.slot)
    }
}

impl Actor {
    /// Puts room between the guest and these disks; what serves them. No vCPU has run.
    pub(super) async fn insert_fills(&self, from: &FromSnapshot, disks: Vec<ToFill>) -> Result<JoinSet<Refusal>, Refusal> {
        let mut servers = JoinSet::new();
        let qmp = self.monitor()?;
        for ToFill { slot, disk, worker } in disks {
            let node = disk_node(slot);
            let socket = socket_of(&self.host, self.vm, &node);
            servers.spawn(self.server(from, &node, worker)?.run());
            let size = qmp.size_of_disk(&node).await.map_err(qemu_failed)?;
            let size = size.ok_or_else(|| Refusal::new(ErrorCode::Internal, format!("QEMU has no disk {}", disk.volume)))?.size;
            let room = both_ways(self.host.pools.scratch(&disk.volume.pool, size).await?);
            let room = room.map_err(|error| host_failed("room for what the VM writes cannot be opened", &error))?;
            tokio::select! {
                inserted = qmp.insert_fill(&node, &socket, room) => inserted.map_err(qemu_failed)?,
                Some(Ok(refusal)) = servers.join_next() => return Err(refusal),
            }
            let had = qmp.served_size(&node).await.map_err(qemu_failed)?.unwrap_or_default();
            // The last page may be beyond the end of a disk that is no multiple of it.
            if had.get() > size.get().next_multiple_of(PAGE_SIZE as u64) {
                let message = format!("{} has {size}, and had {had} in the snapshot", disk.volume);
                return Err(Refusal::new(ErrorCode::VolumeTruncated, message)
                    .hint("make the volume as large as it was, or clone the snapshot: a clone gets disks of its own"));
            }
        }
        if !servers.is_empty() {
            qmp.stay_at_shutdown(true).await.map_err(qemu_failed)?;
        }
        Ok(servers)
    }

    /// Serves a disk to whoever connects to its socket.
    fn server(&self, from: &FromSnapshot, node: &str, mut worker: Worker) -> Result<Server, Refusal> {
        let uid = self.record.as_ref().map(|record| record.uid).unwrap_or_default();
        let listener = listen(&socket_of(&self.host, self.vm, node), uid);
        let listener = listener.map_err(|error| host_failed("the VM's disks cannot be served", &error))?;
        worker.outlive();
        Ok(Server { host: self.host.clone(), from: from.clone(), node: node.to_owned(), listener, worker })
    }

    /// An agent that was restarted is told of the snapshot once more. What still serves goes on until its connection breaks.
    pub(super) async fn serve_fills_again(&mut self, from: &FromSnapshot) -> Result<(), Refusal> {
        let Some(record) = &self.record else { return Ok(()) };
        if self.filling.as_ref().is_some_and(|filling| filling.is_served) {
            return Ok(());
        }
        let mut servers = JoinSet::new();
        for node in record.filling.clone() {
            let worker = start_worker(&self.host, from, &node).await?;
            servers.spawn(self.server(from, &node, worker)?.run());
        }
        self.begin_filling(servers)
    }

    /// The VM runs, and its disks follow.
    pub(super) fn begin_filling(&mut self, servers: JoinSet<Refusal>) -> Result<(), Refusal> {
        let Some(record) = self.record.as_ref().filter(|record| !record.filling.is_empty()) else { return Ok(()) };
        let (is_served, disks) = (!servers.is_empty(), to_fill(&record.spec, &record.filling));
        let work = tokio::spawn(fill(self.monitor()?.clone(), disks, servers));
        // Whoever waited for it goes on waiting.
        let waits = self.filling.take().map(|mut before| std::mem::take(&mut before.waits)).unwrap_or_default();
        self.filling = Some(Filling { work: Some(work), is_served, waits });
        Ok(())
    }

    /// QEMU has ended, or is to begin anew: nobody waits for this any longer.
    pub(super) fn forget_filling(&mut self) {
        if let Some(mut filling) = self.filling.take() {
            let ended = Refusal::new(ErrorCode::QemuFailed, "QEMU ended before the VM's disks had come out of the snapshot");
            filling.answer(&Err(self.why_it_ended(ended).hint(ONCE_MORE).retry(Retry::Safe)));
        }
    }

    /// Goes on where an agent that is no more has begun. Its workers go on by themselves.
    pub(super) fn see_to_filling(&mut self) {
        if self.filling.as_ref().is_some_and(Filling::is_at_work) || self.process.is_none() || self.qmp.is_none() {
            return;
        }
        if let Err(refusal) = self.begin_filling(JoinSet::new()) {
            tracing::warn!(message = refusal.message, "the VM's disks are not seen to yet");
        }
    }

    /// All of them have come, or they never will: then the VM is of no use.
    pub(super) async fn on_filled(&mut self, ended: Result<Filled, Stop>) {
        let Some(mut filling) = self.filling.take() else { return };
        let ended = match ended {
            Ok((filled_ms, filled)) => {
                tracing::info!(filled_ms, %filled, "the disks have come out of the snapshot");
                if let Some(record) = &mut self.record {
                    record.filling.clear();
                    record.whole = true;
                }
                self.save_or_log();
                self.end_what_has_shut_down().await;
                Ok((filled_ms, filled))
            }
            // It goes on with the next session; if QEMU has ended, that is heard.
            Err(Stop::Lost) => {
                filling.work = None;
                self.filling = Some(filling);
                return;
            }
            Err(Stop::Failed(refusal)) => {
                tracing::error!(message = refusal.message, "the VM's disks cannot come out of the snapshot: it is ended");
                self.end_reason.set(format!("ended since its disks cannot come out of the snapshot: {}", refusal.message));
                self.end_process().await;
                Err(refusal)
            }
        };
        filling.answer(&ended);
    }

    /// That QEMU has ended says less than why this host has ended it.
    pub(super) fn why_it_ended(&self, refusal: Refusal) -> Refusal {
        match self.end_reason.get() {
            reason if reason.is_empty() => refusal,
            reason => Refusal::new(ErrorCode::QemuFailed, format!("the VM is no more: {reason}"))
                .hint("`godwit vault verify` says whether the snapshot is damaged; begin from it once more, or from another"),
        }
    }

    /// A guest that has powered off meanwhile was kept for its disks.
    async fn end_what_has_shut_down(&self) {
        let Ok(qmp) = self.monitor() else { return };
        if has_shut_down(qmp).await
            && let Err(error) = qmp.quit().await
        {
            tracing::warn!(error = &error as &dyn std::error::Error, "QEMU was not told that it may end with its guest");
        }
    }
}

/// These disks of the VM, with their slots.
fn to_fill(spec: &ResolvedSpec, nodes: &[String]) -> Vec<(usize, ResolvedDisk)> {
    let disks = spec.disk_slots().map(|(slot, disk)| (slot, disk.clone()));
    disks.filter(|(slot, _)| nodes.contains(&disk_node(*slot))).collect()
}

/// Follows QEMU from one disk to the next. Wherever it stands, it goes on from there.
async fn fill(qmp: Qmp, disks: Vec<(usize, ResolvedDisk)>, mut servers: JoinSet<Refusal>) -> Result<Filled, Stop> {
    let began = Instant::now();
    let filled = async {
        may_begin(&qmp).await?;
        let mut bytes = 0_u64;
        for (slot, disk) in &disks {
            bytes = bytes.saturating_add(fill_one(&qmp, *slot, disk).await?.get());
        }
        while answered(qmp.stay_at_shutdown(false).await)?.is_none() {}
        Ok((millis(began.elapsed()).get(), Bytes(bytes)))
    };
    tokio::select! {
        filled = filled => filled,
        Some(Ok(refusal)) = servers.join_next() => Err(Stop::Failed(refusal)),
    }
}

/// What QEMU has answered. None: it has not, and is asked again; it may wait for a page, or for what serves a disk.
fn answered<T>(answer: Result<T, QmpError>) -> Result<Option<T>, Stop> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(QmpError::TimedOut { .. }) => Ok(None),
        Err(QmpError::Ended { .. }) => Err(Stop::Lost),
        Err(error) => Err(Stop::Failed(qemu_failed(error))),
    }
}

/// Waits while the guest has never run, since an agent that is no more may not have come to the end of its preparations; and while memory comes.
async fn may_begin(qmp: &Qmp) -> Result<(), Stop> {
    let waits = |status: &RunStatus| matches!(status, RunStatus::InMigrate | RunStatus::Prelaunch);
    while answered(qmp.query_status().await)?.is_none_or(|status| waits(&status.status)) {
        tokio::time::sleep(LOOK).await;
    }
    let began = Instant::now();
    while began.elapsed() < MEMORY_FIRST && answered(qmp.migration().await)?.is_none_or(|status| status.needs_pages()) {
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

async fn fill_one(qmp: &Qmp, slot: usize, disk: &ResolvedDisk) -> Result<Bytes, Stop> {
    let (node, mut refusals) = (disk_node(slot), 0);
    loop {
        let Some(state) = answered(qmp.fill_state(&node).await)? else { continue };
        let step = match state {
            None => break,
            Some(Fill::Inserted) => qmp.begin_fill(slot, disk).await,
            Some(Fill::Comes { follows: false, .. }) => {
                tokio::time::sleep(LOOK).await;
                continue;
            }
            Some(Fill::Comes { follows: true, .. } | Fill::Ended(None)) => qmp.end_fill(&node).await,
            Some(Fill::Ended(Some(why))) => {
                let message = format!("QEMU could not fill {}: {why}", disk.volume);
                let refusal = Refusal::new(ErrorCode::QemuFailed, message);
                let hint = "look at the VM's log on its host, and whether its pool has space";
                return Err(Stop::Failed(refusal.hint(hint).retry(Retry::Safe)));
            }
        };
        // What was said before an agent ended may have been done meanwhile.
        if matches!(&step, Err(error) if error.refused().is_some()) && refusals < MOST_REFUSALS {
            refusals += 1;
            tokio::time::sleep(AGAIN).await;
            continue;
        }
        answered(step)?;
    }
    loop {
        if let Some(size) = answered(qmp.size_of_disk(&node).await)? {
            return Ok(size.map_or(Bytes(0), |size| size.size));
        }
    }
}

/// The socket at which a disk is served. Its name is in the profile of the cage.
fn socket_of(host: &SharedHost, vm: VmId, node: &str) -> PathBuf {
    host.vm_dir(vm).join(format!("fill-{node}"))
}

/// Only this user connects.
fn listen(path: &std::path::Path, uid: u32) -> std::io::Result<UnixListener> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    std::os::unix::fs::chown(path, Some(uid), Some(uid))?;
    Ok(listener)
}

/// A file for QEMU: it looks for a descriptor with the very access that it needs.
fn both_ways(file: OwnedFd) -> std::io::Result<(OwnedFd, OwnedFd)> {
    use std::os::fd::AsRawFd;
    let read_only = std::fs::File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    Ok((read_only.into(), file))
}

async fn start_worker(host: &SharedHost, from: &FromSnapshot, disk: &str) -> Result<Worker, Refusal> {
    let directory = host.pools.vault(&from.vault.pool, &from.vault.team, host.vault_uid()).await?;
    let job = Job::Serve { snapshot: from.snapshot.clone(), disk: disk.to_owned() };
    let mut worker = Worker::start(host, directory, job, PassedFds::new()).await?;
    opened(&mut worker).await?;
    Ok(worker)
}

/// Serves one disk to QEMU.
struct Server {
    host: SharedHost,
    from: FromSnapshot,
    node: String,
    listener: UnixListener,
    worker: Worker,
}

impl Server {
    /// Until it cannot; why.
    async fn run(mut self) -> Refusal {
        let (mut pauses, mut takes) = (PAUSES.iter(), false);
        loop {
            let refusal = tokio::select! {
                // One after the other: whoever connects and says nothing keeps nobody else waiting.
                connected = self.listener.accept(), if takes => match self.pass(connected) {
                    Ok(()) => {
                        takes = false;
                        continue;
                    }
                    Err(refusal) => refusal,
                },
                said = self.worker.hear() => match said {
                    Ok(said) => {
                        takes |= matches!(said, Said::NextDisk);
                        continue;
                    }
                    Err(refusal) => refusal,
                },
            };
            takes = false;
            if let Err(refusal) = self.go_on(refusal, &mut pauses).await {
                return refusal;
            }
        }
    }

    /// Another worker serves, unless none can, or there were too many.
    async fn go_on(&mut self, mut failed: Refusal, pauses: &mut std::slice::Iter<'_, Duration>) -> Result<(), Refusal> {
        loop {
            let Some(pause) = pauses.next().filter(|_| !is_for_good(&failed)) else { return Err(failed) };
            tracing::warn!(disk = self.node, failed = failed.message, "another worker serves the disk");
            tokio::time::sleep(*pause).await;
            match start_worker(&self.host, &self.from, &self.node).await {
                Ok(mut worker) => {
                    worker.outlive();
                    self.worker = worker;
                    return Ok(());
                }
                Err(refusal) => failed = refusal,
            }
        }
    }

    fn pass(&self, connected: std::io::Result<(tokio::net::UnixStream, tokio::net::unix::SocketAddr)>) -> Result<(), Refusal> {
        let failed = |error: std::io::Error| host_failed("QEMU cannot connect to its disk", &error);
        let socket = connected.and_then(|(socket, _)| socket.into_std()).map_err(failed)?;
        socket.set_nonblocking(false).map_err(failed)?;
        self.worker.pass_disk(&socket)
    }
}
