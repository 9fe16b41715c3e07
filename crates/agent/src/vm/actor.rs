//! The actor: one loop over one closed event type, owner of everything about one VM on this host.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use godwit_link::statement::grant_digest;
use godwit_link::v1;
use godwit_migration::{DestinationRecord, Peer, PeerMessage, SourceRecord};
use godwit_model::{
    ErrorCode, ForecastRequest, Generation, Grant, MigrationPolicy, Millis, Name, PastMoves, Refusal, ResolvedSpec, Retry,
    RunState, TaskId, TravellingDisk, VmId,
};
use godwit_qemu::process::{AdoptError, Exit, QemuProcess};
use godwit_qemu::qmp::{ConnectError, Ending, Notice, Notices, Qmp, QmpError};
use godwit_vault::StayKey;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::destination::DestinationMove;
use super::fill::Filling;
use super::lend::EarlierMemory;
use super::moving::{answer, vcpus};
use super::neighbours::Neighbour;
use super::playing::EndReason;
use super::registry::{answer_for_nobody, asks_how_it_ended};
use super::sampling;
use super::snapshot::{Joining, Snapshotting};
use super::source::SourceMove;
use super::tpm::TPM_GRACE;
use super::turn_back::{Remembered, TurnBack};
use crate::carry::CarryNotice;
use crate::facts::Said;
use crate::guest;
use crate::host::{SharedHost, host_failed};
use crate::journal::{Holding, VmRecord};
use crate::snapshot::{FromSnapshot, MemoryInVault, SnapshotJob};

/// All that can happen to a VM here.
pub(crate) enum VmEvent {
    /// The controller wants something.
    Command { command: Box<VmCommand>, reply: oneshot::Sender<Result<Answer, Refusal>> },
    /// The other agent of a move said something.
    Peer { task: TaskId, said: Said },
    /// Another VM of its team is to come.
    Neighbour { reply: oneshot::Sender<Option<Neighbour>> },
}

/// What the controller can want.
#[derive(Clone)]
pub(crate) enum VmCommand {
    /// Begins the VM, as it was in a snapshot if one is named.
    Start {
        grant: Grant,
        spec: ResolvedSpec,
        from: Option<Box<FromSnapshot>>,
    },
    /// Keeps the VM as it is.
    Snapshot {
        generation: Generation,
        task: TaskId,
        job: Box<SnapshotJob>,
    },
    Stop {
        generation: Generation,
    },
    /// Ends it, perhaps in order to roll it back.
    Kill {
        generation: Generation,
        back: Option<TurnBack>,
    },
    Pause {
        generation: Generation,
    },
    Unpause {
        generation: Generation,
    },
    Change {
        generation: Generation,
        spec: ResolvedSpec,
    },
    Forget,
    Prepare {
        grant: Grant,
        spec: ResolvedSpec,
        policy: MigrationPolicy,
        memory_key: Option<StayKey>,
        /// What a vault has of its memory.
        snapshot: Option<Box<MemoryInVault>>,
        /// VMs that it may have something in common with.
        neighbours: Arc<[Neighbour]>,
        disks: Vec<TravellingDisk>,
    },
    Migrate {
        grant: Grant,
        address: std::net::SocketAddr,
        policy: MigrationPolicy,
        memory_key: Option<StayKey>,
        past: PastMoves,
        disks: Vec<TravellingDisk>,
    },
    /// How large these disks are.
    Measure {
        generation: Generation,
        disks: Vec<TravellingDisk>,
    },
    Cancel {
        task: TaskId,
    },
    /// The limits of the move are others.
    SetPolicy {
        task: TaskId,
        policy: MigrationPolicy,
    },
    /// Nothing more is waited for of a move.
    Settle {
        generation: Generation,
    },
    /// What a move would cost.
    Forecast {
        generation: Generation,
        request: ForecastRequest,
    },
    /// Whether something may be begun in the guest now.
    MayBegin {
        generation: Generation,
    },
    /// Whether the guest runs here, so that it can be asked.
    MayAsk,
    /// The host goes down: the guest is asked to power off, and the journal says why.
    PowerOff,
    /// It has had its time.
    CutOff,
    /// Whether its process has ended.
    HasEnded,
}

impl VmCommand {
    pub(super) const fn brings_vm(&self) -> bool {
        matches!(self, Self::Start { .. } | Self::Prepare { .. })
    }

    /// Commands whose aim is reached where nothing is known of the VM.
    pub(super) const fn is_done_without_vm(&self) -> bool {
        matches!(self, Self::Forget | Self::Settle { .. } | Self::Kill { .. })
    }
}

/// What a command answers beside success.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Where the prepared carry listens.
    pub(crate) carry_port: u16,
    /// What there is to tell, JSON.
    pub(crate) result: Vec<u8>,
}

/// A move under way, its volatile half.
pub(super) enum Moving {
    Source(Box<SourceMove>),
    Destination(Box<DestinationMove>),
}

/// The owner of one VM on this host.
pub(super) struct Actor {
    pub(super) host: SharedHost,
    pub(super) vm: VmId,
    pub(super) record: Option<VmRecord>,
    pub(super) state: RunState,
    pub(super) process: Option<Arc<QemuProcess>>,
    /// Its TPM, which ends with QEMU.
    pub(super) tpm: Option<Arc<QemuProcess>>,
    pub(super) qmp: Option<Qmp>,
    pub(super) notices: Option<Notices>,
    pub(super) moving: Option<Moving>,
    pub(super) snapshot: Option<Snapshotting>,
    /// Disks come out of a snapshot.
    pub(super) filling: Option<Filling>,
    /// Where memory of a snapshot comes that an agent which is no more has begun.
    pub(super) held: Option<UnixStream>,
    /// Whose pages are joined, nobody protects.
    pub(super) joining: Joining,
    pub(super) end_reason: EndReason,
    /// What sees to memory that comes out of a snapshot.
    pub(super) playing: Option<JoinHandle<()>>,
    /// What a rollback under way need not look at.
    pub(super) remembered: Option<Remembered>,
    /// The VM is about to move, or does.
    pub(super) moves: Arc<AtomicBool>,
    pub(super) carry_notices: (mpsc::Sender<CarryNotice>, mpsc::Receiver<CarryNotice>),
    pub(super) wake: Instant,
    pub(super) guest_shut_down: bool,
    /// Why QEMU would not let the VM move, in its words, as it said when it was last asked.
    pub(super) blocked: Vec<String>,
    /// Announcements that are still being repeated.
    pub(super) announcements: Vec<tokio::task::AbortHandle>,
    events: mpsc::Receiver<VmEvent>,
}

/// How long an actor without anything to expect sleeps.
const IDLE: Duration = Duration::from_secs(30);
/// How long until a monitor that does not answer is tried again.
pub(super) const RETRY: Duration = Duration::from_millis(500);
const QMP_LIMIT: Duration = Duration::from_secs(10);

impl Actor {
    pub(super) fn new(host: SharedHost, vm: VmId, record: Option<VmRecord>, events: mpsc::Receiver<VmEvent>) -> Self {
        Self {
            host,
            vm,
            state: record.as_ref().map_or(RunState::Stopped, last_known),
            record,
            process: None,
            tpm: None,
            qmp: None,
            notices: None,
            moving: None,
            snapshot: None,
            filling: None,
            held: None,
            joining: Joining::default(),
            end_reason: EndReason::default(),
            playing: None,
            remembered: None,
            moves: Arc::default(),
            carry_notices: mpsc::channel(64),
            wake: Instant::now(),
            guest_shut_down: false,
            blocked: Vec::new(),
            announcements: Vec::new(),
            events,
        }
    }

    /// Runs until nothing is held of the VM any more.
    #[tracing::instrument(name = "vm", skip_all, fields(vm = %self.vm))]
    pub(super) async fn run(mut self) {
        self.adopt().await;
        loop {
            self.look_at_move().await;
            self.clear_up_snapshot().await;
            self.see_to_filling();
            self.moves.store(self.moving.is_some() || self.snapshot.is_some(), Ordering::Release);
            self.publish();
            let Self { events, notices, process, tpm, snapshot, filling, carry_notices, wake, .. } = &mut self;
            let (process, tpm) = (process.clone(), tpm.clone());
            tokio::select! {
                biased;
                event = events.recv() => match event {
                    Some(event) => self.on_event(event).await,
                    None => return,
                },
                exit = async { process.expect("guarded").exited().await }, if process.is_some() => self.on_exit(exit).await,
                exit = async { tpm.expect("guarded").exited().await }, if tpm.is_some() => self.on_tpm_exit(exit).await,
                ended = async { snapshot.as_mut().expect("guarded").ended().await }, if snapshot.is_some() => self.on_snapshot_ended(ended),
                ended = async { filling.as_mut().expect("guarded").ended().await }, if filling.as_ref().is_some_and(Filling::is_at_work) => self.on_filled(ended).await,
                notice = async { notices.as_mut().expect("guarded").next().await }, if notices.is_some() => self.on_notice(notice),
                Some(notice) = carry_notices.1.recv() => self.on_carry(notice),
                () = tokio::time::sleep_until(*wake) => self.on_wake().await,
            }
            if self.record.is_none() && self.moving.is_none() && self.snapshot.is_none() && self.events.is_empty() {
                return;
            }
        }
    }

    /// Finds again what an earlier life of the agent left running.
    async fn adopt(&mut self) {
        let Some(record) = self.record.clone() else { return };
        self.adopt_tpm(&record);
        if let Some(identity) = &record.process {
            loop {
                match QemuProcess::adopt(identity) {
                    Ok(process) => {
                        // It fitted when it was started: what is here is here.
                        let _ = self.host.memory.reserve(self.vm, record.spec.memory_with_dimms());
                        self.host.memory.is_on_node(self.vm, record.node);
                        self.process = Some(Arc::new(process));
                        // Until QEMU says otherwise: a living VM must never be taken for a stopped one.
                        self.state = RunState::Running;
                        self.read_what_is_left_of_a_snapshot(&record, identity);
                        self.connect().await;
                        tracing::info!(pid = identity.pid, "adopted");
                        break;
                    }
                    Err(AdoptError::Gone(_)) => {
                        if let Some(record) = &mut self.record {
                            record.ended_with_host |= !record.end_wanted && !identity.is_of_this_boot();
                        }
                        break self.on_exit(Exit::Unknown).await;
                    }
                    Err(error) => {
                        // Not known to be dead: nothing may be concluded from it.
                        tracing::error!(error = &error as &dyn std::error::Error, "the VM's QEMU cannot be watched yet");
                        tokio::time::sleep(RETRY).await;
                    }
                }
            }
        }
        match &record.holding {
            Holding::Owner => self.settle_tpm().await,
            Holding::Source(outgoing) => {
                self.moving =
                    Some(Moving::Source(Box::new(SourceMove::resume(&self.host, &record.spec, outgoing, &self.carry_notices.0))));
            }
            Holding::Destination(incoming) => {
                let resumed = DestinationMove::resume(&self.host, &record.spec, incoming, &self.carry_notices.0);
                self.moving = Some(Moving::Destination(Box::new(resumed)));
            }
        }
    }

    /// Opens the monitor; on failure it is tried again later.
    pub(super) async fn connect(&mut self) {
        let path = self.host.vm_dir(self.vm).join("qmp");
        match Qmp::connect(&path, Duration::from_secs(3)).await {
            Ok(qmp) => {
                self.notices = Some(qmp.listen());
                self.attend(&qmp);
                self.qmp = Some(qmp);
                self.refresh().await;
            }
            Err(error) => {
                // Its sockets close some moments before its end is heard, while the kernel takes its namespaces down; who is connected by
                // then is not greeted.
                let ending = match &error {
                    ConnectError::Connect(source) => source.kind() == std::io::ErrorKind::ConnectionRefused,
                    ConnectError::Ended(ending) => matches!(**ending, Ending::Closed),
                    _ => false,
                };
                if ending {
                    tracing::info!("QEMU listens no more");
                } else {
                    tracing::warn!(error = &error as &dyn std::error::Error, "the VM's monitor does not answer");
                }
                self.wake = Instant::now() + RETRY;
            }
        }
    }

    /// What lasts as long as this session with QEMU.
    pub(super) fn attend(&self, qmp: &Qmp) {
        guest::watch(&self.host, self.vm, qmp);
        sampling::watch(&self.host, self.vm, qmp, &self.moves);
    }

    /// Reads the run state from QEMU.
    pub(super) async fn refresh(&mut self) {
        let Some(qmp) = &self.qmp else { return };
        if let Ok(status) = qmp.query_status().await {
            use godwit_migration::Vcpus;
            self.state = match vcpus(&status.status) {
                Vcpus::Running => RunState::Running,
                _ => RunState::Paused,
            };
        }
        if let Ok(migration) = qmp.query_migrate().await {
            self.blocked = migration.blocked_reasons;
        }
    }

    async fn on_wake(&mut self) {
        self.wake = Instant::now() + IDLE;
        match (&self.process, &self.qmp) {
            (Some(_), None) => self.connect().await,
            (Some(_), Some(_)) if self.moving.is_none() => {
                self.refresh().await;
                self.end_what_waits_for_a_snapshot().await;
            }
            _ => {}
        }
    }

    fn on_carry(&mut self, notice: CarryNotice) {
        self.wake = Instant::now();
        let CarryNotice::Peer(text) = notice else { return };
        match self.host.open_fact(text.get()) {
            Ok(said) if self.is_of_move(&said) => self.on_peer_message(&said.peer),
            // Mostly the other side's last words.
            Ok(said) => tracing::debug!(from = %said.from, "the other agent said something that is not about a move under way"),
            Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "what the other agent said is not believed"),
        }
    }

    fn on_notice(&mut self, notice: Notice) {
        match notice {
            Notice::Event(event) => match event.name.as_str() {
                "SHUTDOWN" => self.guest_shut_down = true,
                "STOP" => self.state = RunState::Paused,
                "RESUME" => self.state = RunState::Running,
                _ => {}
            },
            Notice::Missed(_) => {}
            Notice::Ended(_) => {
                self.qmp = None;
                self.notices = None;
                self.wake = Instant::now() + RETRY;
                return;
            }
        }
        if self.moving.is_some() {
            self.wake = Instant::now();
        }
    }

    /// The process is proven dead.
    async fn on_exit(&mut self, exit: Exit) {
        self.process = None;
        self.forget_filling();
        self.end_tpm(TPM_GRACE).await;
        self.qmp = None;
        self.notices = None;
        self.host.memory.release(self.vm);
        self.host.remove_cgroup(self.vm);
        self.host.guests.forget(&self.host, self.vm);
        self.host.interfaces_ended.notify_one();
        self.wake = Instant::now();
        let Some(record) = &mut self.record else { return };
        let clean = matches!(exit, Exit::Status(status) if status.success());
        let expected = record.end_wanted || self.guest_shut_down || clean;
        self.state = if expected { RunState::Stopped } else { RunState::Crashed };
        self.guest_shut_down = false;
        tracing::info!(?exit, state = ?self.state, "QEMU has ended");
        record.process = None;
        record.tpm.process = None;
        record.end_wanted = expected;
        self.save_or_log();
    }

    /// Writes the record; a failure is logged, since what is lost can be read again from the world.
    pub(super) fn save_or_log(&self) {
        if let Err(error) = self.save() {
            tracing::error!(error = %error.message, "the journal could not be written");
        }
    }

    /// Writes the record.
    pub(super) fn save(&self) -> Result<(), Refusal> {
        let Some(record) = &self.record else { return Ok(()) };
        self.host.journal.write(record).map_err(|error| host_failed("the journal could not be written", &error))
    }

    /// Forgets the VM.
    pub(super) fn drop_record(&mut self) {
        if let Err(error) = self.host.journal.remove(self.vm) {
            tracing::error!(error = &error as &dyn std::error::Error, "the journal's record could not be removed");
        }
        self.record = None;
        self.host.memory.release(self.vm);
        self.host.uids.give_back(self.vm);
        let _ = std::fs::remove_dir_all(self.host.vm_dir(self.vm));
        self.host.report(self.vm, None);
    }

    async fn on_event(&mut self, event: VmEvent) {
        match event {
            VmEvent::Command { command, reply } => {
                let answer = match *command {
                    VmCommand::Forecast { generation, request } => return self.on_forecast(generation, request, reply).await,
                    VmCommand::Start { grant, spec, from: Some(from) } => {
                        return self.on_start_from(grant, spec, *from, reply).await;
                    }
                    VmCommand::Snapshot { generation, task, job } => return self.on_snapshot(generation, task, *job, reply).await,
                    command => self.on_command(command).await,
                };
                if let Err(refusal) = &answer {
                    tracing::info!(code = %refusal.code, message = refusal.message, "refused");
                }
                self.publish();
                let _ = reply.send(answer);
            }
            VmEvent::Peer { task, said } => {
                if self.is_of_move(&said) {
                    self.on_peer_message(&said.peer);
                } else {
                    self.answer_of_past(task, &said);
                }
            }
            // Whoever asked may wait no longer.
            VmEvent::Neighbour { reply } if reply.is_closed() => {}
            VmEvent::Neighbour { reply } => drop(reply.send(self.neighbour().await)),
        }
        self.wake = Instant::now();
    }

    /// A message about a move that this host carries out no more, or never did.
    fn answer_of_past(&self, task: TaskId, said: &Said) {
        let ran = self.record.as_ref().is_some_and(|record| record.generation >= said.peer.generation);
        if ran && asks_how_it_ended(&said.peer.message) {
            // It was activated here, and may have gone on from here since; it is forgotten only when nothing more is needed.
            return answer(&self.host, task, said, PeerMessage::Whole { since: Millis(0) });
        }
        answer_for_nobody(&self.host, task, said);
    }

    /// Whether the other side of the move under way has said it, about this very move.
    fn is_of_move(&self, said: &Said) -> bool {
        self.moving.as_ref().is_some_and(|moving| moving.peer() == Some(&said.from) && grant_digest(moving.grant()) == said.grant)
    }

    fn on_peer_message(&mut self, peer: &Peer) {
        let may_settle = matches!(
            self.record.as_ref().map(|record| &record.holding),
            Some(Holding::Destination(incoming))
                if matches!(incoming.record, DestinationRecord::Running | DestinationRecord::Declined { .. })
        );
        if peer.message == PeerMessage::Settled && !may_settle {
            // Said about an attempt before this one.
            return;
        }
        match &mut self.moving {
            Some(Moving::Source(moving)) => moving.on_peer(peer),
            Some(Moving::Destination(moving)) => moving.on_peer(peer),
            None => {}
        }
    }

    async fn on_command(&mut self, command: VmCommand) -> Result<Answer, Refusal> {
        match command {
            VmCommand::Start { grant, spec, .. } => self.start(grant, spec, None).await.map(|_| Answer::default()),
            VmCommand::Prepare { grant, spec, policy, memory_key, snapshot, neighbours, disks } => {
                self.prepare(grant, spec, policy, EarlierMemory { memory_key, snapshot, neighbours }, disks).await
            }
            VmCommand::Migrate { grant, address, policy, memory_key, past, disks } => {
                self.migrate(grant, address, policy, memory_key, past, disks).await.map(|()| Answer::default())
            }
            VmCommand::Measure { generation, disks } => self.measure_disks(generation, disks).await,
            VmCommand::Cancel { task } if self.cancel_snapshot(task) => Ok(Answer::default()),
            VmCommand::Cancel { task } => self.cancel(task).map(|()| Answer::default()),
            VmCommand::SetPolicy { task, policy } => self.set_policy(task, policy).map(|()| Answer::default()),
            VmCommand::Settle { generation } => {
                self.settle(generation);
                Ok(Answer::default())
            }
            VmCommand::Forget => self.forget().map(|()| Answer::default()),
            VmCommand::Forecast { .. } | VmCommand::Snapshot { .. } => {
                Err(Refusal::new(ErrorCode::Internal, "it is answered later"))
            }
            VmCommand::MayBegin { generation } => {
                self.owned(generation)?;
                self.runs_here()?;
                let open = self.monitor()?.query_channel_open(guest::CHANNEL).await.map_err(qemu_failed)?;
                if open { Ok(Answer::default()) } else { Err(guest::no_agent()) }
            }
            VmCommand::PowerOff => self.power_off().await,
            // A VM that runs elsewhere needs its memory.
            VmCommand::CutOff if self.keeps_memory() => {
                Err(Refusal::new(ErrorCode::VmBusy, "memory of the VM is still on its way"))
            }
            VmCommand::CutOff => {
                self.end_process().await;
                Ok(Answer::default())
            }
            VmCommand::HasEnded if self.process.is_none() => Ok(Answer::default()),
            VmCommand::HasEnded => Err(Refusal::new(ErrorCode::VmRunning, "the VM still runs")),
            VmCommand::MayAsk => self.runs_here().map(|()| Answer::default()),
            VmCommand::Stop { generation } => {
                self.owned(generation)?;
                self.ask(Qmp::system_powerdown).await
            }
            VmCommand::Pause { generation } => {
                self.owned(generation)?;
                self.undisturbed()?;
                let qmp = self.monitor()?.clone();
                qmp.stop(QMP_LIMIT).await.map_err(qemu_failed)?;
                self.refresh().await;
                Ok(Answer::default())
            }
            VmCommand::Unpause { generation } => {
                self.owned(generation)?;
                self.undisturbed()?;
                self.ask(Qmp::cont).await
            }
            VmCommand::Change { generation, spec } => self.change(generation, spec).await.map(|()| Answer::default()),
            VmCommand::Kill { generation, back } => {
                if self.process.is_none() {
                    return self.between_hosts().map(|()| Answer::default());
                }
                self.may_end(generation)?;
                if let Some(record) = &mut self.record {
                    record.end_wanted = true;
                }
                // A full disk must not keep a VM alive.
                self.save_or_log();
                match back {
                    Some(back) => self.end_to_turn_back(generation, back).await,
                    None => self.end_process().await,
                }
                Ok(Answer::default())
            }
        }
    }

    /// The journal is written first: a host that goes down faster than its guests shall know afterwards what was meant.
    async fn power_off(&mut self) -> Result<Answer, Refusal> {
        if self.process.is_none() {
            return Ok(Answer::default());
        }
        let generation = self.record.as_ref().map(|record| record.generation).unwrap_or_default();
        self.may_end(generation)?;
        if let Some(record) = &mut self.record {
            record.ended_with_host = true;
        }
        self.save_or_log();
        // A guest that stands still hears no button.
        self.run_on().await?;
        self.ask(Qmp::system_powerdown).await
    }

    async fn ask<'a, F>(&'a mut self, command: impl FnOnce(&'a Qmp) -> F) -> Result<Answer, Refusal>
    where
        F: Future<Output = Result<(), QmpError>>,
    {
        command(self.monitor()?).await.map_err(qemu_failed)?;
        Ok(Answer::default())
    }

    pub(super) fn monitor(&self) -> Result<&Qmp, Refusal> {
        let silent = || {
            if self.process.is_none() {
                return Refusal::new(ErrorCode::VmNotRunning, "the VM does not run on this host");
            }
            Refusal::new(ErrorCode::QemuFailed, "the VM's QEMU does not answer")
                .hint("look at the VM's log on its host; `godwit vm kill` ends it")
                .retry(Retry::Safe)
        };
        self.qmp.as_ref().ok_or_else(silent)
    }

    /// Only a guest whose vCPUs run can answer.
    pub(super) fn runs_here(&self) -> Result<(), Refusal> {
        if self.process.is_some() && self.state == RunState::Running {
            return Ok(());
        }
        let refusal = Refusal::new(ErrorCode::VmNotRunning, "the VM's vCPUs do not run on this host at the moment");
        Err(refusal
            .hint("run it on (`godwit vm unpause`) or start it; a VM that is being moved is back in a moment")
            .retry(Retry::Safe))
    }

    /// Kills QEMU and waits until that is certain.
    pub(super) async fn end_process(&mut self) {
        if let Some(process) = self.process.clone() {
            process.kill();
            let exit = process.exited().await;
            self.on_exit(exit).await;
        }
    }

    /// Checks that this host owns the VM on exactly this generation, with no move in between.
    pub(super) fn owned(&self, generation: Generation) -> Result<(), Refusal> {
        let record = self.record.as_ref().ok_or_else(|| Refusal::new(ErrorCode::NotFound, "this host does not hold the VM"))?;
        if record.holding != Holding::Owner {
            return Err(Refusal::new(ErrorCode::VmBusy, "the VM is being moved")
                .hint("wait for the task or cancel it")
                .retry(Retry::Safe));
        }
        if record.generation != generation {
            let (held, wanted) = (record.generation, generation);
            return Err(Refusal::new(ErrorCode::GenerationStale, format!("this host holds generation {held}, not {wanted}")));
        }
        Ok(())
    }

    /// Checks that this host runs the VM on exactly this generation: also at the end of a move to here, which may have to wait for a source that is gone.
    fn may_end(&self, generation: Generation) -> Result<(), Refusal> {
        match &self.record {
            Some(record) if record.generation == generation && record.holding.has_arrived() => Ok(()),
            _ => self.owned(generation),
        }
    }

    /// Refuses while another host may be about to run the VM: that it does not run here says nothing then.
    pub(super) fn between_hosts(&self) -> Result<(), Refusal> {
        match self.record.as_ref().map(|record| &record.holding) {
            None | Some(Holding::Owner) => Ok(()),
            Some(holding) if holding.has_arrived() => Ok(()),
            Some(Holding::Source(_) | Holding::Destination(_)) => {
                Err(Refusal::new(ErrorCode::VmBusy, "the VM is between two hosts")
                    .hint("wait until its move has ended: `godwit task list` shows it")
                    .retry(Retry::Safe))
            }
        }
    }

    /// Generations up to the floor have been here before, or were declined here: they are never taken up again.
    pub(super) fn above_floor(&self, generation: Generation) -> Result<(), Refusal> {
        let floor = self.host.journal.floor(self.vm).map_err(|error| host_failed("the journal cannot be read", &error))?;
        if generation > floor {
            return Ok(());
        }
        Err(Refusal::new(ErrorCode::GenerationStale, format!("generation {generation} has been dealt with on this host")))
    }

    /// See [`Actor::above_floor`]. Whether it is raised, durably: if not, nothing of the generation may be forgotten yet. Taken up once more, it
    /// would be subject to what was said about it before.
    #[must_use]
    pub(super) fn raise_floor(&self, generation: Generation) -> bool {
        let raised = self.host.journal.write_floor(self.vm, generation);
        if let Err(error) = &raised {
            tracing::error!(error = error as &dyn std::error::Error, "the floor of generations could not be raised");
        }
        raised.is_ok()
    }

    /// Whether it is durable that the VM ran here on this generation, so that its source is answered truly when the VM is here no more.
    #[must_use]
    pub(super) fn keep_that_it_ran(&self, generation: Generation) -> bool {
        let kept = self.host.journal.write_ran(self.vm, generation);
        if let Err(error) = &kept {
            tracing::error!(error = error as &dyn std::error::Error, "that the VM ran here could not be kept");
        }
        kept.is_ok()
    }

    fn forget(&mut self) -> Result<(), Refusal> {
        if self.process.is_some() {
            return Err(Refusal::new(ErrorCode::VmRunning, "the VM runs here").hint("stop it first"));
        }
        if self.moving.is_some() {
            return Err(Refusal::new(ErrorCode::VmBusy, "the VM is being moved").retry(Retry::Safe));
        }
        if let Some(shelf) = &self.host.stays
            && let Err(error) = shelf.remove(self.vm)
        {
            tracing::warn!(error = &error as &dyn std::error::Error, "what is kept of the VM's memory could not be removed");
        }
        self.drop_record();
        Ok(())
    }

    /// Tells what is, if it changed.
    pub(super) fn publish(&self) {
        let Some(record) = &self.record else { return };
        let (holding, generation) = match &record.holding {
            Holding::Source(outgoing) if outgoing.record != SourceRecord::Offered && outgoing.record != SourceRecord::Returned => {
                (v1::Holding::Released, record.generation)
            }
            Holding::Destination(incoming) if record.holding.has_arrived() => (v1::Holding::Owner, incoming.grant.generation),
            Holding::Destination(incoming) => (v1::Holding::Incoming, incoming.grant.generation),
            _ => (v1::Holding::Owner, record.generation),
        };
        let report = v1::VmReport {
            vm: self.vm.to_string(),
            generation: generation.0,
            state: v1::RunState::from(self.state).into(),
            holding: holding.into(),
            detail: if self.state == RunState::Crashed { self.end_reason.get() } else { String::new() },
            ended_with_host: record.ended_with_host && self.process.is_none(),
            blocked: if self.process.is_some() { self.blocked.clone() } else { Vec::new() },
        };
        self.host.report(self.vm, Some(report));
    }
}

impl Moving {
    fn grant(&self) -> &Grant {
        match self {
            Self::Source(moving) => &moving.grant,
            Self::Destination(moving) => &moving.grant,
        }
    }

    /// The host of the other side.
    fn peer(&self) -> Option<&Name> {
        match self {
            Self::Source(moving) => Some(&moving.grant.destination),
            Self::Destination(moving) => moving.grant.source.as_ref(),
        }
    }
}

/// What can be said of a VM before anything was looked at.
fn last_known(record: &VmRecord) -> RunState {
    match (&record.process, record.end_wanted) {
        (Some(_), _) => RunState::Running,
        (None, true) => RunState::Stopped,
        (None, false) => RunState::Crashed,
    }
}

/// QEMU's refusal as ours.
pub(super) fn qemu_failed(error: QmpError) -> Refusal {
    let retry = if error.refused().is_some() { Retry::Safe } else { Retry::Unknown };
    let text: String = error.to_string().chars().take(500).collect();
    Refusal::new(ErrorCode::QemuFailed, text).hint("look at the VM's log on its host").retry(retry)
}
