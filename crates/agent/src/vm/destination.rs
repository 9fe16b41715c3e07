//! The destination's side of a move: prepares a QEMU that waits, then carries out what `godwit_migration::Destination` decides.

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use godwit_migration::{
    ArrivingCarry, Destination, DestinationAction, DestinationRecord, DestinationView, Outcome, Peer, PeerMessage, QemuMigration,
    QemuView, Vcpus,
};
use godwit_model::{
    Bytes, ErrorCode, Generation, Grant, MigrationFigures, MigrationPolicy, Millis, PostCopy, Refusal, ResolvedSpec, Retry,
    RunState, TravellingDisk,
};
use godwit_qemu::process::ProcessIdentity;
use godwit_qemu::qmp::commands::AnnounceSchedule;
use godwit_qemu::qmp::views::MigrationStatus;
use godwit_qemu::qmp::{COMMAND_LIMIT, Qmp, QmpError};
use godwit_qemu::{PassedFds, Start};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::actor::{Actor, Answer, Moving, RETRY, qemu_failed};
use super::disks::{Lane, into};
use super::lend::EarlierMemory;
use super::moving::{Told, Watch, millis, tell};
use super::neighbours;
use super::placement::Access;
use super::start_carry::LaneStart;
use crate::carry::{CarryClient, CarryNotice, PlacedBlock, Role};
use crate::host::{SharedHost, host_failed, unix_now};
use crate::journal::{EndedMove, Holding, Incoming, VmRecord};

const INCOMING_FD: &str = "godwit-incoming";
/// A connection that QEMU gets before it needs it: once it waits for a page in its main loop, it takes none any more.
const SPARE_FD: &str = "godwit-spare";
/// How long QEMU may not answer before it is taken to be waiting for a page.
const WAITS_FOR_PAGE: Duration = Duration::from_secs(1);
/// A question that stays open until QEMU answers again.
const LONG: Duration = Duration::from_secs(24 * 3_600);
/// How long QEMU may take to go on with a connection that it was given.
const RECOVERING: Duration = Duration::from_secs(10);
/// How often the source hears that this agent waits.
const PRESENT: Duration = Duration::from_millis(500);

/// A QEMU that lives and does not say how it is.
const UNKNOWN: QemuView = QemuView {
    vcpus: Vcpus::InMigrate,
    migration: QemuMigration::Unknown,
    remaining: Bytes(0),
    dirty_rate: None,
    since_sync: Millis(0),
    rounds: 0,
};

/// The volatile half of a move to here.
pub(super) struct DestinationMove {
    pub(super) grant: Grant,
    machine: Destination,
    carry: Option<CarryClient>,
    disks: Vec<Lane>,
    watch: Watch,
    began: Instant,
    released: bool,
    aborted: Option<Refusal>,
    /// The port that the source cannot send to.
    cut: Option<u16>,
    /// The connection to a carry that goes on: QEMU gets it when the source's has come. One that is closed before it has resumed ends QEMU 7.2.
    recovers: Option<Recovers>,
    /// When it got it.
    recovered: Option<Instant>,
    /// Our end of a connection that QEMU holds in case.
    spare: Option<UnixStream>,
    /// What QEMU said last of its migration.
    seen: QemuMigration,
    /// A question that QEMU has not answered yet.
    asked: Option<JoinHandle<()>>,
    /// Where the VM's memory is.
    blocks: Option<Vec<PlacedBlock>>,
    lost: bool,
    settled: bool,
    /// The controller waits for the source no more.
    source_given_up: bool,
    cont_refused: Option<Refusal>,
    announced: bool,
    told_peer: Told,
}

/// What QEMU gets a connection by.
enum Recovers {
    /// Its end.
    Socket(OwnedFd),
    /// It has it.
    Spare,
}

impl DestinationMove {
    fn new(grant: Grant, carry: Option<CarryClient>) -> Self {
        Self {
            machine: Destination::new(grant.expires),
            grant,
            carry,
            disks: Vec::new(),
            watch: Watch::new(),
            began: Instant::now(),
            released: false,
            aborted: None,
            cut: None,
            recovers: None,
            spare: None,
            seen: QemuMigration::None,
            asked: None,
            blocks: None,
            recovered: None,
            lost: false,
            settled: false,
            source_given_up: false,
            cont_refused: None,
            announced: false,
            told_peer: Told::default(),
        }
    }

    /// Goes on after a restart of the agent, from the journal.
    pub(super) fn resume(host: &SharedHost, spec: &ResolvedSpec, incoming: &Incoming, notices: &mpsc::Sender<CarryNotice>) -> Self {
        let adopt = |identity: &ProcessIdentity, lane| {
            CarryClient::adopt(identity, &host.carry_socket(spec.vm, lane), notices.clone()).ok()
        };
        let carry = incoming.carry.as_ref().and_then(|identity| adopt(identity, 0));
        let disks = into::adopt(spec, &incoming.disks, adopt);
        // Told before the restart, and not told again once the end is.
        let source_given_up = host.journal.ran(spec.vm).is_ok_and(|ran| ran >= incoming.grant.generation);
        Self { disks, source_given_up, ..Self::new(incoming.grant.clone(), carry) }
    }

    /// Looks at QEMU. One that does not answer is not asked again before it has: it takes only a handful of questions, and after those not even what
    /// it is told out of band.
    async fn look(&mut self, qmp: &Qmp) -> Result<QemuView, QmpError> {
        let limit = if self.seen.needs_pages() { WAITS_FOR_PAGE } else { COMMAND_LIMIT };
        let silent = || QmpError::TimedOut { command: "query-status".into(), limit };
        if self.is_silent() {
            return Err(silent());
        }
        let looked = tokio::time::timeout(limit, self.watch.look(qmp)).await.unwrap_or_else(|_| Err(silent()));
        match &looked {
            Ok(seen) => self.seen = seen.migration,
            Err(QmpError::TimedOut { .. }) => {
                let qmp = qmp.clone();
                self.asked = Some(tokio::spawn(async move { drop(qmp.execute_within("query-status", Value::Null, LONG).await) }));
            }
            Err(_) => {}
        }
        looked
    }

    /// Whether QEMU has left a question open.
    fn is_silent(&self) -> bool {
        self.asked.as_ref().is_some_and(|asked| !asked.is_finished())
    }

    fn carry_is_usable(&self) -> bool {
        self.carry.as_ref().is_some_and(CarryClient::is_usable)
    }

    /// Whether memory is still to come over a connection that is gone.
    fn waits_in_vain(&self) -> bool {
        self.seen.needs_pages() && !self.carry_is_usable()
    }

    /// A QEMU in post-copy that does not answer, since it waits for a page: what it would say.
    fn as_it_must_be(&self, again: bool) -> Option<QemuView> {
        let has_connection = self.carry_is_usable() && (!again || self.recovered.is_some());
        let migration = if has_connection { QemuMigration::PostCopy } else { QemuMigration::PostCopyPaused };
        self.seen.needs_pages().then_some(QemuView { vcpus: Vcpus::Other, migration, ..UNKNOWN })
    }

    /// Gives QEMU a connection in case.
    async fn provide(&mut self, qmp: &Qmp) {
        if !self.seen.needs_pages() || self.spare.is_some() || self.recovers.is_some() || !qmp.is_heard_out_of_band() {
            return;
        }
        let Ok((ours, qemus)) = UnixStream::pair() else { return };
        match qmp.getfd(SPARE_FD, qemus.into()).await {
            Ok(()) => self.spare = Some(ours),
            Err(error) => tracing::debug!(%error, "QEMU has no spare connection"),
        }
    }

    /// Tells the source, unless it was told so lately; how long until that is due again.
    fn tell(&mut self, host: &SharedHost, message: PeerMessage, every: Duration) -> Duration {
        let Some(source) = &self.grant.source else { return every };
        match self.told_peer.is_due(&message, every) {
            Ok(()) => {
                tell(host, self.carry.as_ref(), &self.grant, source, message);
                every
            }
            Err(rest) => rest,
        }
    }

    pub(super) fn on_peer(&mut self, peer: &Peer) {
        if peer.generation != self.grant.generation {
            return;
        }
        match &peer.message {
            PeerMessage::Released => self.released = true,
            PeerMessage::Aborted { reason } => self.aborted = Some(reason.clone()),
            PeerMessage::Cut { port } => self.cut = Some(*port),
            PeerMessage::Lost => self.lost = true,
            PeerMessage::Settled => self.settled = true,
            PeerMessage::Prepared
            | PeerMessage::Running { .. }
            | PeerMessage::Whole { .. }
            | PeerMessage::GoOn { .. }
            | PeerMessage::Declined { .. } => {}
        }
    }
}

impl Actor {
    /// Prepares for a VM that is to come.
    pub(super) async fn prepare(
        &mut self,
        grant: Grant,
        spec: ResolvedSpec,
        policy: MigrationPolicy,
        earlier: EarlierMemory,
        disks: Vec<TravellingDisk>,
    ) -> Result<Answer, Refusal> {
        if let Some(record) = &self.record {
            match &record.holding {
                Holding::Destination(incoming)
                    if incoming.grant == grant && incoming.record == DestinationRecord::Prepared && self.carry_is_usable() =>
                {
                    return Ok(prepared(incoming));
                }
                Holding::Owner if self.process.is_none() && record.generation < grant.generation => {}
                Holding::Owner if self.process.is_some() => {
                    return Err(Refusal::new(ErrorCode::AlreadyOnHost, "the VM runs on this host"));
                }
                _ => {
                    return Err(Refusal::new(ErrorCode::VmBusy, "another move of the VM has not ended on this host")
                        .hint("wait until it has ended; `godwit task list` shows it")
                        .retry(Retry::Safe));
                }
            }
        }
        self.above_floor(grant.generation)?;
        let address = self.host.migration_address();
        let listener = TcpListener::bind((address, 0)).map_err(|error| host_failed("cannot listen for the source", &error))?;
        let carry_port = listener.local_addr().map_err(|error| host_failed("cannot listen for the source", &error))?.port();
        let disks = self.arrive_disks(&spec, &disks).await?;
        let incoming = Incoming {
            grant: grant.clone(),
            record: DestinationRecord::Prepared,
            carry: None,
            carry_port,
            advises: false,
            section: None,
            again: false,
            disks: disks.clone(),
        };
        let record = VmRecord::new(spec.clone(), Generation(0), 0, Holding::Destination(incoming));
        if let Err(refusal) = self.begin(record, Start::Incoming).await {
            self.set_aside(&spec, &disks).await;
            return Err(refusal);
        }
        match self.begin_destination(&grant, listener, policy, earlier).await {
            Ok((carry, disks, blocks)) => {
                let moving = DestinationMove { disks, blocks, ..DestinationMove::new(grant, Some(carry)) };
                self.moving = Some(Moving::Destination(Box::new(moving)));
                match self.record.as_ref().map(|record| &record.holding) {
                    Some(Holding::Destination(incoming)) => Ok(prepared(incoming)),
                    _ => Ok(Answer { carry_port, ..Answer::default() }),
                }
            }
            Err(refusal) => {
                self.end_process().await;
                self.set_aside(&spec, &disks).await;
                self.forsake_tpm().await;
                self.drop_record();
                Err(refusal)
            }
        }
    }

    async fn begin_destination(
        &mut self,
        grant: &Grant,
        listener: TcpListener,
        policy: MigrationPolicy,
        earlier: EarlierMemory,
    ) -> Result<(CarryClient, Vec<Lane>, Option<Vec<PlacedBlock>>), Refusal> {
        let qmp = self.monitor()?.clone();
        let known = qmp.query_migrate_capabilities().await.map_err(qemu_failed)?;
        let wanted = [("events", true), ("return-path", true), ("late-block-activate", true)];
        let capabilities: Vec<(&str, bool)> =
            wanted.into_iter().filter(|(wanted, _)| known.iter().any(|known| known.capability == *wanted)).collect();
        qmp.set_migration_capabilities(&capabilities).await.map_err(qemu_failed)?;
        // QEMU asks for whole huge pages, which are not what memory is counted in here.
        let ordinary = self.record.as_ref().is_some_and(|record| record.spec.platform.hugepages.is_none());
        let advises = ordinary && policy.prepares_postcopy() && can_do_postcopy(&qmp).await;
        let (ours, qemus) = UnixStream::pair().map_err(|error| host_failed("no socket pair", &error))?;
        qmp.getfd(INCOMING_FD, qemus.into()).await.map_err(qemu_failed)?;
        let source = grant.source.clone().ok_or_else(|| Refusal::new(ErrorCode::BadRequest, "the grant names no source"))?;
        let mut fds = PassedFds::new();
        let listen_fd = fds.pass(listener);
        let blocks = self.memory_blocks(&qmp).await;
        let placement = blocks.clone().and_then(|blocks| self.place(blocks, Access::Write, &mut fds));
        let kept = earlier.memory_key.and_then(|key| self.lend_memory(&key, &mut fds));
        // Who asks for post-copy at once does not wait for memory.
        let is_lent = placement.is_some() && policy.postcopy != PostCopy::Now;
        let lent = match earlier.snapshot.filter(|_| is_lent) {
            Some(snapshot) => self.lend_snapshot(*snapshot, &policy, &mut fds).await,
            None => None,
        };
        let images = self.lend_images(&mut fds).await;
        let neighbours = if is_lent { neighbours::lend(&earlier.neighbours, &mut fds) } else { Vec::new() };
        let role = Role::Destination { listen_fd, placement, advises, kept, lent, images, neighbours, again: None };
        let carry = self.start_carry(role, grant, LaneStart::of_memory(&source, policy.stall), ours.into(), fds).await?;
        if let Some(Holding::Destination(incoming)) = self.record.as_mut().map(|record| &mut record.holding) {
            incoming.carry = Some(carry.identity().clone());
            incoming.advises = advises;
        }
        let disks = match self.begin_arriving_disks(&qmp, grant, &source, policy.stall).await {
            Ok(disks) => disks,
            Err(refusal) => {
                carry.end().await;
                return Err(refusal);
            }
        };
        let kept = match self.save() {
            Ok(()) => qmp.migrate_incoming_fd(INCOMING_FD).await.map_err(qemu_failed),
            Err(refusal) => Err(refusal),
        };
        if let Err(refusal) = kept {
            carry.end().await;
            into::end(disks).await;
            return Err(refusal);
        }
        Ok((carry, disks, blocks))
    }

    /// The controller waits for nothing more of this move: without a release the destination declines; what runs here needs no word of the source.
    pub(super) fn settle(&mut self, generation: Generation) {
        let arrived = self.record.as_ref().is_some_and(|record| record.holding.has_arrived());
        if let Some(Moving::Destination(moving)) = &mut self.moving
            && moving.grant.generation == generation
        {
            moving.source_given_up |= arrived;
            let reason = Refusal::new(ErrorCode::Cancelled, "the task is over").retry(Retry::Safe);
            moving.aborted.get_or_insert(reason);
        }
    }

    /// One look and one action; how long to wait then, or `None` to look again at once.
    pub(super) async fn step_destination(&mut self) -> Option<Duration> {
        let (record, view) = match self.see_destination().await {
            Ok(seen) => seen,
            Err(refusal) => {
                match &self.moving {
                    Some(Moving::Destination(moving)) if moving.seen.needs_pages() => {
                        tracing::info!(message = refusal.message, "QEMU waits for a page, it seems");
                    }
                    _ => tracing::warn!(message = refusal.message, "QEMU cannot be looked at"),
                }
                return Some(RETRY);
            }
        };
        if matches!(record, DestinationRecord::Declined { .. }) && !self.decline_disks().await {
            return Some(RETRY);
        }
        let Some(Moving::Destination(moving)) = &mut self.moving else { return Some(RETRY) };
        if record == DestinationRecord::Prepared && !view.released {
            moving.tell(&self.host, PeerMessage::Prepared, PRESENT);
        }
        let action = moving.machine.decide(&record, &view);
        if !matches!(action, DestinationAction::Wait(_) | DestinationAction::Tell(..)) {
            tracing::info!(?action, "destination");
        }
        self.act_destination(action).await
    }

    async fn see_destination(&mut self) -> Result<(DestinationRecord, DestinationView), Refusal> {
        let (record, advises, port, again, section) = match self.record.as_ref().map(|record| &record.holding) {
            Some(Holding::Destination(incoming)) => {
                (incoming.record.clone(), incoming.advises, incoming.carry_port, incoming.again, incoming.section)
            }
            _ => return Err(Refusal::new(ErrorCode::Internal, "the journal knows no move")),
        };
        // What is decided needs no answer of QEMU; and one that hangs while it loads must not keep this host from declining.
        let asked = match record {
            DestinationRecord::Prepared if self.process.is_some() => self.monitor().ok().cloned(),
            DestinationRecord::Activated if self.process.is_some() => Some(self.monitor()?.clone()),
            // Whether all of its memory has come.
            DestinationRecord::Running if advises && self.process.is_some() => self.monitor().ok().cloned(),
            _ => None,
        };
        let must_answer = record == DestinationRecord::Activated;
        let alive = self.process.is_some();
        let Some(Moving::Destination(moving)) = &mut self.moving else {
            return Err(Refusal::new(ErrorCode::Internal, "no move"));
        };
        let looked = match &asked {
            Some(qmp) => moving.look(qmp).await.map(Some),
            None => Ok(None),
        };
        let qemu = match looked {
            Ok(Some(seen)) => {
                if let Some(qmp) = asked.filter(|_| record != DestinationRecord::Prepared) {
                    moving.provide(&qmp).await;
                }
                Some(seen)
            }
            // It was told to run, or could not be: without a connection it will not say more.
            Err(_) if must_answer && moving.is_silent() && moving.waits_in_vain() => moving.as_it_must_be(again),
            Err(error) if must_answer => return Err(qemu_failed(error)),
            Err(_) if moving.is_silent() => moving.as_it_must_be(again).or(alive.then_some(UNKNOWN)),
            // Without post-copy all of it came before.
            _ if record == DestinationRecord::Running && !advises => {
                alive.then_some(QemuView { migration: QemuMigration::Completed, ..UNKNOWN })
            }
            _ => alive.then_some(UNKNOWN),
        };
        let view = DestinationView {
            now: millis(moving.began.elapsed()),
            unix_now: unix_now(),
            qemu,
            released: moving.released,
            // Later the VM is released, or declined already.
            aborted: moving
                .aborted
                .clone()
                .or_else(|| into::broken(&moving.disks).filter(|_| record == DestinationRecord::Prepared)),
            carry: ArrivingCarry {
                usable: moving.carry_is_usable() && moving.cut != Some(port),
                connected: moving.carry.as_ref().is_some_and(|carry| carry.status().connected),
                again,
                port,
                has_section: section.is_some() || arriving_section(moving.carry.as_ref()).is_some(),
            },
            lost: moving.lost,
            settled: moving.settled,
            source_given_up: moving.source_given_up,
            cont_refused: moving.cont_refused.clone(),
            announced: moving.announced,
        };
        Ok((record, view))
    }

    fn carry_is_usable(&self) -> bool {
        match &self.moving {
            Some(Moving::Destination(moving)) => moving.carry_is_usable(),
            _ => false,
        }
    }

    async fn act_destination(&mut self, action: DestinationAction) -> Option<Duration> {
        match action {
            DestinationAction::Wait(wait) => Some(Duration::from_millis(wait.get())),
            DestinationAction::Tell(message, wait) => {
                let wait = Duration::from_millis(wait.get());
                match &mut self.moving {
                    Some(Moving::Destination(moving)) => Some(moving.tell(&self.host, message, wait)),
                    _ => Some(wait),
                }
            }
            DestinationAction::Record(next) => {
                let declines = matches!(next, DestinationRecord::Declined { .. });
                // Once it may have run, what it has are its disks, whatever became of the steps before.
                let runs = next == DestinationRecord::Running;
                if runs && let Err(refusal) = self.name_disks().await {
                    tracing::warn!(message = refusal.message, "the VM's disks are not volumes yet");
                    return Some(RETRY);
                }
                let done = (!declines || self.decline_tpm().await) && self.record_destination(next);
                (!done).then_some(RETRY)
            }
            DestinationAction::EndQemu => {
                self.end_process().await;
                None
            }
            DestinationAction::Announce => {
                self.announce().await;
                None
            }
            DestinationAction::GoOn => {
                let done = self.go_on_as_destination().await;
                let done = done.inspect_err(|refusal| tracing::warn!(message = refusal.message, "memory cannot follow yet"));
                done.is_err().then_some(RETRY)
            }
            DestinationAction::Recover => {
                let since = match &self.moving {
                    Some(Moving::Destination(moving)) => moving.recovered.map(|recovered| recovered.elapsed()),
                    _ => None,
                };
                if since.is_some_and(|since| since < RECOVERING) {
                    return Some(RETRY);
                }
                let done = self.recover().await;
                let done = done.inspect_err(|refusal| tracing::warn!(message = refusal.message, "QEMU does not go on yet"));
                done.is_err().then_some(RETRY)
            }
            DestinationAction::ContinueVm => self.continue_destination().await,
            DestinationAction::End(outcome) => self.end_destination(outcome).await,
        }
    }

    /// Has another carry receive what was left, for a QEMU that runs and waits for it.
    async fn go_on_as_destination(&mut self) -> Result<(), Refusal> {
        let Some(Holding::Destination(incoming)) = self.record.as_ref().map(|record| &record.holding) else {
            return Err(Refusal::new(ErrorCode::Internal, "the journal knows no move"));
        };
        let (grant, section) = (incoming.grant.clone(), incoming.section);
        let section = section.ok_or_else(|| Refusal::new(ErrorCode::Internal, "the journal knows no section of memory"))?;
        let source = grant.source.clone().ok_or_else(|| Refusal::new(ErrorCode::BadRequest, "the grant names no source"))?;
        // QEMU notices that its socket is closed, and waits for another.
        if let Some(Moving::Destination(moving)) = &mut self.moving
            && let Some(carry) = moving.carry.take()
        {
            carry.end().await;
        }
        let qmp = self.monitor()?.clone();
        let (silent, blocks) = match &self.moving {
            Some(Moving::Destination(moving)) => (moving.is_silent(), moving.blocks.clone()),
            _ => return Ok(()),
        };
        if !silent {
            let status = qmp.query_migrate().await.map_err(qemu_failed)?.status();
            if status != MigrationStatus::PostcopyPaused {
                return Err(Refusal::new(ErrorCode::QemuFailed, "QEMU has not noticed yet that its connection is gone"));
            }
        }
        let address = self.host.migration_address();
        let listener = TcpListener::bind((address, 0)).map_err(|error| host_failed("cannot listen for the source", &error))?;
        let port = listener.local_addr().map_err(|error| host_failed("cannot listen for the source", &error))?.port();
        let no_pair = |error| host_failed("no socket pair", &error);
        let (ours, recovers) = match &self.moving {
            Some(Moving::Destination(moving)) if silent => {
                let lost = || Refusal::new(ErrorCode::QemuFailed, "QEMU waits for a page, and has no other connection");
                (moving.spare.as_ref().ok_or_else(lost)?.try_clone().map_err(no_pair)?, Recovers::Spare)
            }
            _ => {
                let (ours, qemus) = UnixStream::pair().map_err(no_pair)?;
                (ours, Recovers::Socket(qemus.into()))
            }
        };
        let mut fds = PassedFds::new();
        let listen_fd = fds.pass(listener);
        let blocks = match blocks {
            None if !silent => self.memory_blocks(&qmp).await,
            blocks => blocks,
        };
        let placement = blocks.and_then(|blocks| self.place(blocks, Access::Read, &mut fds));
        let again = Some(section);
        let (images, neighbours) = (Vec::new(), Vec::new());
        let role = Role::Destination { listen_fd, placement, advises: true, kept: None, lent: None, images, neighbours, again };
        let stall = MigrationPolicy::default().stall;
        let carry = self.start_carry(role, &grant, LaneStart::of_memory(&source, stall), ours.into(), fds).await?;
        if let Some(Holding::Destination(incoming)) = self.record.as_mut().map(|record| &mut record.holding) {
            (incoming.carry, incoming.carry_port, incoming.again) = (Some(carry.identity().clone()), port, true);
        }
        self.save_or_log();
        tracing::info!(port, "another carry waits for what was left");
        if let Some(Moving::Destination(moving)) = &mut self.moving {
            if matches!(recovers, Recovers::Spare) {
                moving.spare = None;
            }
            (moving.carry, moving.recovers, moving.recovered) = (Some(carry), Some(recovers), None);
        }
        Ok(())
    }

    /// The source's carry has come: QEMU gets the connection.
    async fn recover(&mut self) -> Result<(), Refusal> {
        let qmp = self.monitor()?.clone();
        let Some(Moving::Destination(moving)) = &mut self.moving else { return Ok(()) };
        let recovered = match moving.recovers.take() {
            Some(Recovers::Socket(socket)) => match qmp.getfd(INCOMING_FD, socket).await {
                Ok(()) => qmp.migrate_recover_fd(INCOMING_FD).await.map_err(qemu_failed),
                Err(error) => Err(qemu_failed(error)),
            },
            Some(Recovers::Spare) => {
                let recovered = qmp.migrate_recover_fd(SPARE_FD).await;
                if moving.is_silent() && recovered.as_ref().is_err_and(|error| error.refused().is_some()) {
                    // It has not noticed yet that its connection is gone.
                    moving.recovers = Some(Recovers::Spare);
                    return recovered.map_err(qemu_failed);
                }
                recovered.map_err(qemu_failed)
            }
            None => Err(Refusal::new(ErrorCode::Internal, "an agent before this one had the connection")),
        };
        moving.recovered = recovered.is_ok().then(Instant::now);
        // With it the carry is of no use.
        if recovered.is_err()
            && let Some(carry) = moving.carry.take()
        {
            carry.end().await;
        }
        recovered
    }

    async fn continue_destination(&mut self) -> Option<Duration> {
        let taken_over = match self.publish_tpm().await {
            Ok(()) => self.take_disks_over().await,
            Err(refusal) => Err(refusal),
        };
        let continued = match taken_over {
            Ok(()) => {
                // What comes for the VM from here on waits at its tap instead of going to where it was.
                self.announce_by_host();
                // It may be waiting for a page that cannot come: what it does then is looked at.
                let needs_pages = matches!(&self.moving, Some(Moving::Destination(moving)) if moving.seen.needs_pages());
                let limit = if needs_pages { WAITS_FOR_PAGE } else { COMMAND_LIMIT };
                let late = |_| Err(QmpError::TimedOut { command: "cont".into(), limit });
                self.command(async |qmp: &Qmp| tokio::time::timeout(limit, qmp.cont()).await.unwrap_or_else(late)).await
            }
            // Nothing has run.
            Err(refusal) => Err(refusal.retry(Retry::Safe)),
        };
        let Some(Moving::Destination(moving)) = &mut self.moving else { return None };
        match continued {
            Ok(()) => {
                moving.machine.on_continued(millis(moving.began.elapsed()));
                self.state = RunState::Running;
                None
            }
            // Only QEMU's own refusal, or not having asked it, proves that nothing ran.
            Err(refusal) if refusal.retry == Retry::Safe => {
                tracing::error!(message = refusal.message, "the VM was not let run here");
                self.announcements.drain(..).for_each(|announcement| announcement.abort());
                moving.cont_refused = Some(refusal);
                None
            }
            Err(_) => Some(RETRY),
        }
    }

    /// Unless that is under way already.
    pub(super) fn announce_by_host(&mut self) {
        self.announcements.retain(|announcement| !announcement.is_finished());
        if let Some(record) = self.record.as_ref().filter(|_| self.announcements.is_empty()) {
            let plugged = record.spec.nics.iter().filter(|nic| nic.link_up);
            self.announcements.extend(plugged.map(|nic| self.host.network.announce(nic)));
        }
    }

    /// Announces the VM's addresses: by the host itself, and by QEMU on the guest's behalf.
    async fn announce(&mut self) {
        self.announce_by_host();
        let silent = matches!(&self.moving, Some(Moving::Destination(moving)) if moving.is_silent());
        if !silent
            && let Ok(qmp) = self.monitor()
            && let Err(error) = qmp.announce_self(AnnounceSchedule::default()).await
        {
            tracing::warn!(%error, "QEMU could not announce the VM");
        }
        if let Some(Moving::Destination(moving)) = &mut self.moving {
            moving.announced = true;
        }
    }

    /// Whether the record is durable; if not the one before stands, in memory too.
    fn record_destination(&mut self, next: DestinationRecord) -> bool {
        let Some(record) = &mut self.record else { return false };
        let before = record.clone();
        let section = match &self.moving {
            Some(Moving::Destination(moving)) => arriving_section(moving.carry.as_ref()),
            _ => None,
        };
        if let Holding::Destination(incoming) = &mut record.holding {
            if next == DestinationRecord::Activated {
                record.generation = incoming.grant.generation;
                incoming.section = section.or(incoming.section);
            }
            incoming.record = next.clone();
        }
        match self.host.journal.write(record) {
            Ok(()) => {
                tracing::info!(record = ?next, "journalled");
                true
            }
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "the journal could not be written");
                *record = before;
                false
            }
        }
    }

    pub(super) async fn end_destination(&mut self, outcome: Outcome) -> Option<Duration> {
        let Some(Moving::Destination(moving)) = &self.moving else { return None };
        let ended = EndedMove {
            task: moving.grant.task,
            vm: self.vm,
            generation: moving.grant.generation,
            source: false,
            reason: match &outcome {
                Outcome::Moved => None,
                Outcome::Stayed(reason) => Some(reason.clone()),
            },
            figures: MigrationFigures::default(),
        };
        let kept = match outcome {
            // Whoever does not know yet how it ended will ask, whatever has become of the VM by then.
            Outcome::Moved => moving.settled || self.keep_that_it_ran(ended.generation),
            Outcome::Stayed(_) => self.raise_floor(ended.generation),
        };
        if !kept {
            return Some(RETRY);
        }
        if let Err(error) = self.host.end_move(&ended) {
            tracing::error!(error = &error as &dyn std::error::Error, "the end of the move could not be kept");
            return Some(RETRY);
        }
        tracing::info!(?outcome, "the move has ended here");
        let Some(Moving::Destination(moving)) = self.moving.take() else { return None };
        if let (Some(_), Some(qmp)) = (&moving.spare, &self.qmp) {
            // It is closed at our end: what is left at QEMU's is nothing but a number.
            let _ = qmp.closefd(SPARE_FD).await;
        }
        if let Some(carry) = moving.carry {
            if let Some(changed) = carry.status().changed_image {
                self.host.images.forget(&changed.into()).await;
            }
            carry.end().await;
        }
        into::end(moving.disks).await;
        match outcome {
            Outcome::Moved => {
                if let Some(record) = &mut self.record {
                    record.holding = Holding::Owner;
                }
                self.save_or_log();
                self.settle_tpm().await;
                self.refresh().await;
            }
            Outcome::Stayed(_) => self.drop_record(),
        }
        None
    }
}

/// What the controller is told of a destination that waits.
fn prepared(incoming: &Incoming) -> Answer {
    let result = if incoming.disks.is_empty() { vec![] } else { godwit_link::encode(&into::told(&incoming.disks)) };
    Answer { carry_port: incoming.carry_port, result }
}

/// The number of the RAM section, once this carry has told it.
fn arriving_section(carry: Option<&CarryClient>) -> Option<u32> {
    carry.and_then(|carry| carry.status().postcopy.section)
}

/// Sets this QEMU up for post-copy, if it can do that.
async fn can_do_postcopy(qmp: &Qmp) -> bool {
    let set = qmp.set_migration_capabilities(&[("postcopy-ram", true)]).await;
    set.inspect_err(|error| tracing::warn!(%error, "no post-copy: QEMU needs userfaultfd, see `godwit host show`")).is_ok()
}
