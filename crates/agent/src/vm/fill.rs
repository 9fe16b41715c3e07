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
use godwit_qemu::qmp::Qmp;
use godwit_qemu::qmp::views::RunStatus;
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};

use super::actor::{Actor, Answer, qemu_failed};
use super::moving::millis;
use super::snapshot::memory_is_whole;
use crate::host::{SharedHost, host_failed};
use crate::snapshot::{FromSnapshot, Job, Said, Worker};

/// How long disks wait for memory, which the guest needs sooner.
const MEMORY_FIRST: Duration = Duration::from_secs(600);
const LOOK: Duration = Duration::from_millis(20);
/// Successors that the worker of one disk may have.
const MOST_SUCCESSORS: u32 = 8;

pub(super) type Reply = oneshot::Sender<Result<Answer, Refusal>>;

/// Disks that are being filled.
pub(super) struct Filling {
    work: JoinHandle<Result<(u64, Bytes), Refusal>>,
    /// Workers of this agent serve.
    is_served: bool,
    /// Who waits for it, and what is to be told.
    waits: Option<(Reply, RestoreFigures)>,
}

impl Filling {
    fn begin(qmp: Qmp, disks: Vec<(usize, ResolvedDisk)>, servers: JoinSet<Refusal>) -> Self {
        Self { is_served: !servers.is_empty(), work: tokio::spawn(fill(qmp, disks, servers)), waits: None }
    }

    /// Answers when it has ended, with these figures and its own. Who waited before waits no more.
    pub(super) fn answer_later(&mut self, reply: Reply, figures: RestoreFigures) {
        self.waits = Some((reply, figures));
    }

    /// Waits for its end.
    pub(super) async fn ended(&mut self) -> Result<(u64, Bytes), Refusal> {
        let unexpected = |error| Refusal::new(ErrorCode::Internal, format!("filling the VM's disks ended unexpectedly: {error}"));
        (&mut self.work).await.unwrap_or_else(|error| Err(unexpected(error)))
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        self.work.abort();
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
        if let Some(record) = self.record.as_ref().filter(|record| !record.filling.is_empty()) {
            self.filling = Some(Filling::begin(self.monitor()?.clone(), to_fill(&record.spec, &record.filling), servers));
        }
        Ok(())
    }

    /// Goes on where an agent that is no more has begun. Its workers go on by themselves.
    pub(super) fn see_to_filling(&mut self) {
        if self.filling.is_some() || self.process.is_none() || self.qmp.is_none() {
            return;
        }
        if let Err(refusal) = self.begin_filling(JoinSet::new()) {
            tracing::warn!(message = refusal.message, "the VM's disks are not seen to yet");
        }
    }

    /// All of them have come, or they never will: then the VM is of no use.
    pub(super) async fn on_filled(&mut self, ended: Result<(u64, Bytes), Refusal>) {
        let Some(mut filling) = self.filling.take() else { return };
        let answer = match ended {
            Ok((filled_ms, filled)) => {
                tracing::info!(filled_ms, %filled, "the disks have come out of the snapshot");
                if let Some(record) = &mut self.record {
                    record.filling.clear();
                }
                self.save_or_log();
                self.end_what_has_shut_down().await;
                Ok((filled_ms, filled))
            }
            Err(refusal) => {
                let refusal = self.why_it_ended(refusal);
                if self.process.is_some() {
                    tracing::error!(message = refusal.message, "the VM's disks cannot come out of the snapshot: it is ended");
                    self.end_reason.set(format!("ended since its disks cannot come out of the snapshot: {}", refusal.message));
                    self.end_process().await;
                }
                Err(refusal)
            }
        };
        if let Some((reply, figures)) = filling.waits.take() {
            let told = |(filled_ms, filled)| RestoreFigures { filled_ms, filled, ..figures };
            let _ = reply.send(answer.map(|filled| Answer { result: godwit_link::encode(&told(filled)), ..Answer::default() }));
        }
    }

    /// That QEMU has ended says less than why this host has ended it.
    fn why_it_ended(&self, refusal: Refusal) -> Refusal {
        match self.end_reason.get() {
            reason if reason.is_empty() => refusal,
            reason => Refusal::new(ErrorCode::QemuFailed, format!("the VM is no more: {reason}")).retry(Retry::Safe),
        }
    }

    /// A guest that has powered off meanwhile was kept for its disks.
    async fn end_what_has_shut_down(&self) {
        let Ok(qmp) = self.monitor() else { return };
        let ended = async {
            qmp.stay_at_shutdown(false).await?;
            match qmp.query_status().await?.status {
                RunStatus::Shutdown => qmp.quit().await,
                _ => Ok(()),
            }
        };
        if let Err(error) = ended.await {
            tracing::warn!(error = &error as &dyn std::error::Error, "QEMU was not told that it may end with its guest");
        }
    }
}

/// These disks of the VM, with their slots.
fn to_fill(spec: &ResolvedSpec, nodes: &[String]) -> Vec<(usize, ResolvedDisk)> {
    let disks = spec.disk_slots().map(|(slot, disk)| (slot, disk.clone()));
    disks.filter(|(slot, _)| nodes.contains(&disk_node(*slot))).collect()
}

/// Follows QEMU from one disk to the next; how long it took in milliseconds, and their bytes. Wherever it stands, it goes on from there.
async fn fill(qmp: Qmp, disks: Vec<(usize, ResolvedDisk)>, mut servers: JoinSet<Refusal>) -> Result<(u64, Bytes), Refusal> {
    let began = Instant::now();
    let filled = async {
        has_begun(&qmp).await?;
        if let Err(refusal) = memory_is_whole(&qmp, MEMORY_FIRST).await {
            tracing::info!(message = refusal.message, "the disks do not wait any longer");
        }
        let mut bytes = 0_u64;
        for (slot, disk) in &disks {
            bytes = bytes.saturating_add(fill_one(&qmp, *slot, disk).await?.get());
        }
        Ok((millis(began.elapsed()).get(), Bytes(bytes)))
    };
    tokio::select! {
        filled = filled => filled,
        Some(Ok(refusal)) = servers.join_next() => Err(refusal),
    }
}

/// Waits while the guest has never run: an agent that is no more may not have come to the end of its preparations.
async fn has_begun(qmp: &Qmp) -> Result<(), Refusal> {
    while matches!(qmp.query_status().await.map_err(qemu_failed)?.status, RunStatus::InMigrate | RunStatus::Prelaunch) {
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

async fn fill_one(qmp: &Qmp, slot: usize, disk: &ResolvedDisk) -> Result<Bytes, Refusal> {
    let node = disk_node(slot);
    loop {
        match qmp.fill_state(&node).await.map_err(qemu_failed)? {
            None => break,
            Some(Fill::Inserted) => qmp.begin_fill(slot, disk).await.map_err(qemu_failed)?,
            Some(Fill::Comes { follows: false, .. }) => tokio::time::sleep(LOOK).await,
            Some(Fill::Comes { follows: true, .. } | Fill::Ended(None)) => qmp.end_fill(&node).await.map_err(qemu_failed)?,
            Some(Fill::Ended(Some(why))) => {
                let message = format!("QEMU could not fill {}: {why}", disk.volume);
                return Err(Refusal::new(ErrorCode::QemuFailed, message)
                    .hint("look at the VM's log on its host, and whether its pool has space")
                    .retry(Retry::Safe));
            }
        }
    }
    Ok(qmp.size_of_disk(&node).await.map_err(qemu_failed)?.map_or(Bytes(0), |size| size.size))
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
    match worker.hear().await? {
        Said::Ready => Ok(worker),
        _ => Err(Refusal::new(ErrorCode::Internal, "the vault worker said what nobody expects")),
    }
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
        let mut successors = 0;
        loop {
            let refusal = tokio::select! {
                connected = self.listener.accept() => match self.pass(connected) {
                    Ok(()) => continue,
                    Err(refusal) => refusal,
                },
                said = self.worker.hear() => match said {
                    Ok(_) => continue,
                    Err(refusal) => refusal,
                },
            };
            // What is damaged is so for its successor.
            if refusal.code != ErrorCode::HostFailed || successors == MOST_SUCCESSORS {
                return refusal;
            }
            successors += 1;
            tracing::warn!(disk = self.node, message = refusal.message, "another worker serves the disk");
            match start_worker(&self.host, &self.from, &self.node).await {
                Ok(mut worker) => {
                    worker.outlive();
                    self.worker = worker;
                }
                Err(refusal) => return refusal,
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
