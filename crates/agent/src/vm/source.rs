//! The source's side of a move: carries out what `godwit_migration::Source` decides.

use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use godwit_link::v1;
use godwit_link::v1::agent_message::Body;
use godwit_migration::{
    Outcome, Peer, PeerMessage, QemuMigration, Source, SourceAction, SourceRecord, SourceView, Vcpus, predict_blackout, warm_up_of,
};
use godwit_model::{
    Accelerator, Bytes, BytesPerSec, ErrorCode, Grant, MigrationFigures, MigrationForecast, MigrationPhase, MigrationPolicy,
    MigrationProgress, Millis, PastMoves, Refusal, ResolvedSpec, RunState, Rung, TaskId, TravellingDisk,
};
use godwit_qemu::PassedFds;
use godwit_qemu::qmp::Qmp;
use godwit_qemu::qmp::commands::{CpuThrottle, MigrationParameters, StoppedBy};
use godwit_vault::StayKey;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::actor::{Actor, Moving, RETRY, qemu_failed};
use super::disks::out::{self, DisksOut};
use super::forecast::{SAMPLE_LIMIT, of_measured};
use super::moving::{Told, Watch, carry_view, millis, tell};
use super::placement::Access;
use super::snapshot::memory_is_whole;
use super::start_carry::LaneStart;
use crate::carry::{CarryClient, CarryNotice, CarryStatus, PlacedBlock, Role};
use crate::host::{SharedHost, host_failed, unix_now};
use crate::journal::{EndedMove, Holding, Outgoing, OutgoingDisk};
use crate::turns::Seat;

/// The name under which QEMU holds the socket to carry.
const MIGRATION_FD: &str = "godwit-migration";
/// How long a move waits for memory that still comes out of a snapshot.
const ARRIVING: Duration = Duration::from_secs(30);
/// Of QEMU's socket to carry.
const SEND_BUFFER: usize = 32 << 10;
/// QEMU must never be what limits the rate: carry does.
const UNLIMITED: BytesPerSec = BytesPerSec(16 << 30);
/// QEMU's own switch-over is to come as late as it lets us ask.
const LATE: Millis = Millis(1);
/// Of a guest's memory.
const PAGE: u64 = 4096;
/// How often carry says what it does.
const LEAVING: Duration = Duration::from_millis(100);
/// How QEMU slows a VM down: not at all, though it is set up for that before the migration begins; and when it is to do so.
const UNTHROTTLED: MigrationParameters = throttled(1);
const THROTTLED: MigrationParameters = throttled(99);
/// How often to ask whether another VM's turn is over.
const TURN: Millis = Millis(50);
/// How long what carry says of the link may be older than what it was told to take.
const LIMIT_LAG: Duration = Duration::from_millis(500);
const PROGRESS_EVERY: Duration = Duration::from_millis(300);

/// The volatile half of a move away from here.
pub(super) struct SourceMove {
    pub(super) grant: Grant,
    machine: Source,
    carry: Option<CarryClient>,
    disks: DisksOut,
    /// What was not empty of them, and when that was copied.
    allocated: Bytes,
    copied: Option<Millis>,
    watch: Watch,
    began: Instant,
    /// When the destination's agent was last heard.
    heard: Instant,
    declined: Option<Refusal>,
    running: Option<Millis>,
    whole: bool,
    next_port: Option<u16>,
    /// What carries before the present one have sent.
    sent_before: u64,
    cancel: bool,
    /// QEMU cannot switch over by itself while the VM runs.
    held: bool,
    /// How long QEMU may take to stop the VM.
    stop_limit: Duration,
    stopped: Option<Instant>,
    /// Its turn is from the stop until the VM runs on its new host, or here again.
    seat: Option<Seat>,
    /// Carry knows that the VM stands still.
    hurried: bool,
    /// The blackout as it was predicted when the VM was stopped, and as it was.
    predicted: Option<Millis>,
    blackout: Option<Millis>,
    told: Option<(Instant, MigrationPhase, u16)>,
    told_peer: Told,
    /// Earlier moves of the VM, and the memory that it has touched: what this one is expected to cost is known when its writes have been measured.
    past: PastMoves,
    touched: Option<JoinHandle<Option<Bytes>>>,
    forecast: Option<MigrationForecast>,
    /// What carry was told to take of the wire at most, and when that became much less: what it says of the link lags behind.
    bandwidth: Option<Option<BytesPerSec>>,
    limited: Option<Instant>,
    /// Memory that was left for after the switch, as a carry before the present one has told it.
    left: Bytes,
    /// What is done about a blackout that cannot be kept.
    rung: Option<Rung>,
    /// Key and places of the VM's memory, which is kept when it has left. The key is in no journal: an agent that began after the move has none.
    keep: Option<(StayKey, Vec<PlacedBlock>)>,
}

impl SourceMove {
    fn new(host: &SharedHost, grant: Grant, policy: MigrationPolicy, carry: Option<CarryClient>, held: bool) -> Self {
        let blackout = Duration::from_millis(policy.max_blackout.get());
        let seat = carry.as_ref().map(|carry| host.turns.join(grant.vm, blackout, carry.holder()));
        let machine = Source::new(policy, grant.expires, Millis(0)).held(held);
        Self {
            grant,
            machine,
            carry,
            disks: DisksOut::default(),
            allocated: Bytes(0),
            copied: None,
            watch: Watch::new(),
            began: Instant::now(),
            heard: Instant::now(),
            declined: None,
            running: None,
            whole: false,
            next_port: None,
            sent_before: 0,
            cancel: false,
            held,
            stop_limit: Duration::from_millis(policy.stop_limit.get()),
            stopped: None,
            seat,
            hurried: false,
            predicted: None,
            blackout: None,
            told: None,
            told_peer: Told::default(),
            past: PastMoves::default(),
            touched: None,
            forecast: None,
            bandwidth: None,
            limited: None,
            left: Bytes(0),
            rung: None,
            keep: None,
        }
    }

    /// Says what the move is expected to cost, as soon as that can be said.
    async fn foresee(&mut self, host: &SharedHost) {
        let Some(dirty_rate) = self.watch.sampled else { return };
        let Some(touched) = self.touched.take_if(|touched| touched.is_finished()) else { return };
        let Ok(Some(memory)) = touched.await else { return };
        let forecast = of_measured(host, (memory, self.allocated), dirty_rate, self.machine.policy(), &self.past);
        tracing::info!(?forecast, "what the move is expected to cost");
        self.forecast = Some(forecast);
    }

    /// Goes on after a restart of the agent, from the journal.
    pub(super) fn resume(host: &SharedHost, spec: &ResolvedSpec, outgoing: &Outgoing, notices: &mpsc::Sender<CarryNotice>) -> Self {
        let vm = spec.vm;
        let carry = outgoing.carry.as_ref().and_then(|identity| {
            CarryClient::adopt(identity, &host.carry_socket(vm, 0), notices.clone())
                .inspect_err(|error| tracing::warn!(error = error as &dyn std::error::Error, "no carry"))
                .ok()
        });
        let moving = Self::new(host, outgoing.grant.clone(), outgoing.policy, carry, outgoing.held);
        let disks = DisksOut::adopt(host, spec, &outgoing.disks, notices);
        Self { machine: moving.machine.leaving(outgoing.leaving), disks, ..moving }
    }

    /// Whether the VM may be stopped now. A QEMU that may switch over by itself cannot wait.
    fn take_turn(&self, now: Instant) -> bool {
        let limited = self.limited.is_some_and(|limited| now.saturating_duration_since(limited) < LIMIT_LAG);
        let turn = !limited && self.seat.as_ref().is_none_or(|seat| seat.take(now));
        turn || !self.held
    }

    pub(super) fn on_peer(&mut self, peer: &Peer) {
        if peer.generation != self.grant.generation {
            return;
        }
        self.heard = Instant::now();
        match &peer.message {
            PeerMessage::Declined { reason } => self.declined = Some(reason.clone()),
            PeerMessage::Running { since } | PeerMessage::Whole { since } => {
                self.whole |= matches!(peer.message, PeerMessage::Whole { .. });
                self.seat.iter().for_each(Seat::end);
                if self.running.is_none() {
                    self.running = Some(*since);
                    let (view, _) = carry_view(self.carry.as_ref());
                    self.blackout = self.stopped.map(|stopped| {
                        let late = since.get().saturating_add(view.round_trip.get() / 2);
                        Millis(millis(stopped.elapsed()).get().saturating_sub(late))
                    });
                }
            }
            PeerMessage::GoOn { port } => {
                // Only who runs it says that.
                self.running.get_or_insert(Millis(0));
                self.next_port = Some(*port);
            }
            PeerMessage::Prepared
            | PeerMessage::Released
            | PeerMessage::Aborted { .. }
            | PeerMessage::Cut { .. }
            | PeerMessage::Lost
            | PeerMessage::Settled => {}
        }
    }
}

/// What a source has begun with.
struct Begun {
    carry: CarryClient,
    disks: DisksOut,
    held: bool,
    blocks: Option<Vec<PlacedBlock>>,
}

impl Actor {
    /// Accepts a move away from here.
    pub(super) async fn migrate(
        &mut self,
        grant: Grant,
        address: SocketAddr,
        policy: MigrationPolicy,
        memory_key: Option<StayKey>,
        past: PastMoves,
        travelling: Vec<TravellingDisk>,
    ) -> Result<(), Refusal> {
        if let Some(Moving::Source(moving)) = &self.moving
            && moving.grant == grant
        {
            return Ok(());
        }
        if self.host.journal.has_ended(grant.task, grant.generation, true) {
            return Ok(());
        }
        self.above_floor(grant.generation)?;
        let owned = self.record.as_ref().is_some_and(|record| grant.generation > record.generation);
        if !owned {
            return Err(Refusal::new(ErrorCode::GenerationStale, "the grant is not newer than what this host holds"));
        }
        let generation = self.record.as_ref().map(|record| record.generation).unwrap_or_default();
        self.owned(generation)?;
        self.undisturbed()?;
        memory_is_whole(self.monitor()?, ARRIVING).await?;
        self.refresh().await;
        if self.state != RunState::Running {
            return Err(Refusal::new(ErrorCode::VmNotRunning, "the VM does not run on this host").hint("start it first"));
        }
        self.moves.store(true, Ordering::Release);
        // It leaves again: what still announces it here would mislead.
        self.announcements.drain(..).for_each(|announcement| announcement.abort());
        if let Some(record) = &mut self.record {
            record.holding = Holding::Source(Outgoing {
                grant: grant.clone(),
                policy,
                record: SourceRecord::Offered,
                carry: None,
                held: false,
                leaving: false,
                address: Some(address),
                disks: travelling
                    .iter()
                    .map(|disk| OutgoingDisk { volume: disk.volume.clone(), size: disk.size, carry: None })
                    .collect(),
                began: unix_now(),
            });
        }
        let begun = async {
            self.save()?;
            self.begin_source(&grant, address, policy, &travelling).await
        };
        let allocated = Bytes(bytes_of(&travelling));
        match begun.await {
            Ok(Begun { carry, disks, held, blocks }) => {
                let moving = SourceMove { disks, allocated, ..SourceMove::new(&self.host, grant, policy, Some(carry), held) };
                let touched = Some(self.count_touched(blocks.clone()));
                let keep = memory_key.zip(blocks);
                self.moving = Some(Moving::Source(Box::new(SourceMove { keep, past, touched, ..moving })));
                Ok(())
            }
            Err(refusal) => {
                self.own_again();
                Err(refusal)
            }
        }
    }

    async fn begin_source(
        &mut self,
        grant: &Grant,
        address: SocketAddr,
        policy: MigrationPolicy,
        disks: &[TravellingDisk],
    ) -> Result<Begun, Refusal> {
        let qmp = self.monitor()?.clone();
        let held = prepare_source(&qmp, policy.prepares_throttle()).await?;
        let (ours, qemus) = UnixStream::pair().map_err(|error| host_failed("no socket pair", &error))?;
        // What QEMU has put there is behind the present; and each time it has nothing to say, it says so until there is no room.
        let shortened = rustix::net::sockopt::set_socket_send_buffer_size(&qemus, SEND_BUFFER);
        shortened.map_err(|error| host_failed("no socket pair", &std::io::Error::from(error)))?;
        qmp.getfd(MIGRATION_FD, qemus.into()).await.map_err(qemu_failed)?;
        let mut fds = PassedFds::new();
        let emulated = self.host.facts.accelerator == Accelerator::Tcg;
        // Later QEMU may hang, and nothing is to wait for it.
        let blocks = self.memory_blocks(&qmp).await;
        let needed = emulated || policy.prepares_postcopy();
        let own = blocks.clone().filter(|_| needed).and_then(|blocks| self.place(blocks, Access::Read, &mut fds));
        let images = self.lend_indexed_images(&mut fds).await;
        let bandwidth = out::share(policy.bandwidth, disks.len(), 0, false);
        let role = Role::Source { address, bandwidth, own, emulated, held, images, again: false };
        let start = LaneStart::of_memory(&grant.destination, policy.stall);
        let carry = self.start_carry(role, grant, start, ours.into(), fds).await?;
        if let Some(Holding::Source(outgoing)) = self.record.as_mut().map(|record| &mut record.holding) {
            outgoing.carry = Some(carry.identity().clone());
            outgoing.held = held;
        }
        let lanes = match self.save() {
            Ok(()) => self.begin_disks(&qmp, grant, address.ip(), policy, disks).await,
            Err(refusal) => Err(refusal),
        };
        let disks = match lanes.map(DisksOut::new) {
            Ok(disks) => disks,
            Err(refusal) => {
                carry.end().await;
                return Err(refusal);
            }
        };
        if let Err(refusal) = self.save() {
            carry.end().await;
            disks.end().await;
            self.undo_disks().await;
            return Err(refusal);
        }
        Ok(Begun { carry, disks, held, blocks })
    }

    /// The VM is this host's as before the move.
    fn own_again(&mut self) {
        if let Some(record) = &mut self.record {
            record.holding = Holding::Owner;
        }
        self.save_or_log();
    }

    /// Whether the VM has gone on elsewhere, and memory that was left is here.
    pub(super) fn keeps_memory(&self) -> bool {
        let record = self.record.as_ref().map(|record| &record.holding);
        matches!(record, Some(Holding::Source(outgoing)) if outgoing.leaving && outgoing.record == SourceRecord::Released)
    }

    /// Asks for the move of `task` to be cancelled.
    pub(super) fn cancel(&mut self, task: TaskId) -> Result<(), Refusal> {
        let too_late = || Refusal::new(ErrorCode::TooLate, "the switch has begun: the VM is about to run on the destination");
        let offered = matches!(
            self.record.as_ref().map(|record| &record.holding),
            Some(Holding::Source(outgoing)) if outgoing.record == SourceRecord::Offered
        );
        match &mut self.moving {
            Some(Moving::Source(moving)) if moving.grant.task == task => {
                if !offered || moving.stopped.is_some() {
                    return Err(too_late());
                }
                moving.cancel = true;
                Ok(())
            }
            _ => Err(Refusal::new(ErrorCode::NotFound, "this host carries out no such move")),
        }
    }

    /// The move of `task` keeps this policy from here on, also after a restart.
    pub(super) fn set_policy(&mut self, task: TaskId, policy: MigrationPolicy) -> Result<(), Refusal> {
        match (&mut self.moving, self.record.as_mut().map(|record| &mut record.holding)) {
            (Some(Moving::Source(moving)), Some(Holding::Source(outgoing))) if moving.grant.task == task => {
                let before = std::mem::replace(&mut outgoing.policy, policy);
                moving.machine.set_policy(policy);
                self.save().inspect_err(|_| self.take_policy_back(before))
            }
            _ => Err(Refusal::new(ErrorCode::NotFound, "this host carries out no such move")),
        }
    }

    /// It could not be journalled: what was before counts.
    fn take_policy_back(&mut self, before: MigrationPolicy) {
        if let (Some(Moving::Source(moving)), Some(Holding::Source(outgoing))) =
            (&mut self.moving, self.record.as_mut().map(|record| &mut record.holding))
        {
            outgoing.policy = before;
            moving.machine.set_policy(before);
        }
    }

    /// Pages may be left for after the switch from here on, also after a restart: then this host must keep them.
    fn leave(&mut self) -> Result<(), Refusal> {
        if let Some(Holding::Source(outgoing)) = self.record.as_mut().map(|record| &mut record.holding)
            && !std::mem::replace(&mut outgoing.leaving, true)
        {
            if let Err(refusal) = self.save() {
                if let Some(Holding::Source(outgoing)) = self.record.as_mut().map(|record| &mut record.holding) {
                    outgoing.leaving = false;
                }
                return Err(refusal);
            }
            tracing::info!("post-copy: pages are left for after the switch");
        }
        if let Some(Moving::Source(moving)) = &mut self.moving {
            moving.machine.on_leaving();
            moving.carry.iter().for_each(CarryClient::leave);
        }
        Ok(())
    }

    /// Has another carry send what the destination does not have, to one that listens on this port there.
    async fn go_on_as_source(&mut self, port: u16) -> Result<(), Refusal> {
        let unknown = || Refusal::new(ErrorCode::Internal, "the journal does not say where the VM went");
        let Some(Holding::Source(outgoing)) = self.record.as_ref().map(|record| &record.holding) else { return Err(unknown()) };
        let (grant, policy) = (outgoing.grant.clone(), outgoing.policy);
        let mut address = outgoing.address.ok_or_else(unknown)?;
        address.set_port(port);
        if let Some(Moving::Source(moving)) = &mut self.moving
            && let Some(carry) = moving.carry.take()
        {
            moving.sent_before += carry.status().wire_bytes;
            moving.left = moving.left.max(left_at_switch(&carry.status()));
            carry.end().await;
        }
        let qmp = self.monitor()?.clone();
        let blocks = self.memory_blocks(&qmp).await;
        let mut fds = PassedFds::new();
        let own = blocks.and_then(|blocks| self.place(blocks, Access::Read, &mut fds));
        // QEMU's socket was closed when it had completed.
        let (ours, _) = UnixStream::pair().map_err(|error| host_failed("no socket pair", &error))?;
        let bandwidth = policy.bandwidth;
        let role = Role::Source { address, bandwidth, own, emulated: false, held: true, images: Vec::new(), again: true };
        let start = LaneStart::of_memory(&grant.destination, policy.stall);
        let carry = self.start_carry(role, &grant, start, ours.into(), fds).await?;
        if let Some(Holding::Source(outgoing)) = self.record.as_mut().map(|record| &mut record.holding) {
            (outgoing.carry, outgoing.address) = (Some(carry.identity().clone()), Some(address));
        }
        // One that is in no journal is merely not adopted.
        self.save_or_log();
        tracing::info!(port, "another carry sends what was left");
        if let Some(Moving::Source(moving)) = &mut self.moving {
            moving.carry = Some(carry);
            moving.bandwidth = None;
        }
        Ok(())
    }

    /// Has QEMU slow the VM down, more and more, until it can be stopped within its budget.
    async fn throttle(&mut self) -> Result<(), Refusal> {
        let qmp = self.monitor()?.clone();
        qmp.set_migration_parameters(THROTTLED).await.map_err(qemu_failed)?;
        tracing::info!("the VM is slowed down");
        if let Some(Moving::Source(moving)) = &mut self.moving {
            moving.machine.on_throttled();
        }
        Ok(())
    }

    /// Looks at the move, if there is one, and does what is to be done, until there is something to wait for.
    pub(super) async fn look_at_move(&mut self) {
        loop {
            let wait = match &self.moving {
                None => return,
                Some(Moving::Source(_)) => self.step_source().await,
                Some(Moving::Destination(_)) => self.step_destination().await,
            };
            if let Some(wait) = wait {
                let wake = tokio::time::Instant::now() + wait;
                self.wake = if self.process.is_some() && self.qmp.is_none() { self.wake.min(wake) } else { wake };
                return;
            }
        }
    }

    /// One look and one action; how long to wait then, or `None` to look again at once.
    async fn step_source(&mut self) -> Option<Duration> {
        self.share_bandwidth();
        let (record, view) = match self.see_source().await {
            Ok(seen) => seen,
            Err(refusal) => {
                tracing::warn!(message = refusal.message, "QEMU cannot be looked at");
                return Some(RETRY);
            }
        };
        let Some(Moving::Source(moving)) = &mut self.moving else { return Some(RETRY) };
        let action = moving.machine.decide(record, &view);
        let rung = moving.machine.rung(view.now);
        if std::mem::replace(&mut moving.rung, rung) != rung {
            let (dirty, rate) = (view.qemu.as_ref().and_then(|qemu| qemu.dirty_rate), view.carry.rate);
            tracing::info!(?rung, dirty = dirty.map(tracing::field::display), %rate, "what is done about the blackout");
        }
        // Whoever stopped it.
        let now = Instant::now();
        if moving.machine.stopped().is_some() && !std::mem::replace(&mut moving.hurried, true) {
            moving.carry.iter().for_each(CarryClient::hurry);
            moving.disks.hurry();
            // It has its turn, or another has: nobody waits for that any more.
            let _ = moving.seat.as_ref().map(|seat| seat.take(now));
        }
        let action = match action {
            SourceAction::Stop if !moving.take_turn(now) => SourceAction::Wait(TURN),
            SourceAction::ContinueVm => {
                moving.seat.iter().for_each(Seat::end);
                action
            }
            _ => action,
        };
        if !matches!(action, SourceAction::Wait(_) | SourceAction::Tell(..)) {
            tracing::info!(?action, qemu = ?view.qemu, rate = %view.carry.rate, "source");
        }
        if action == SourceAction::Stop {
            moving.predicted = predicted_blackout(&view);
        }
        self.tell_progress(record, &view);
        self.act_source(action).await
    }

    /// Carry takes what is this move's of what all that leave this host may take.
    fn share_bandwidth(&mut self) {
        let Some(Moving::Source(moving)) = &mut self.moving else { return };
        let Some(carry) = &moving.carry else { return };
        let (own, sent, now) = (moving.machine.policy().bandwidth, carry.status().wire_bytes, Instant::now());
        let copied = moving.disks.are_copied();
        let count = moving.disks.lanes.len();
        for (lane, disk) in (1..).zip(&mut moving.disks.lanes) {
            let own = out::share(own, count, lane, copied);
            let share = self.host.budget.share((self.vm, lane), own, disk.carry.status().wire_bytes, now);
            disk.set_bandwidth(share);
        }
        let own = out::share(own, count, 0, copied);
        let Some(share) = self.host.budget.share((self.vm, 0), own, sent, now) else { return };
        if moving.bandwidth != Some(share) && carry.set_bandwidth(share) {
            let bytes = |limit: Option<BytesPerSec>| limit.map_or(u64::MAX, BytesPerSec::get);
            let before = moving.bandwidth.replace(share);
            // Shares change all the time, by a little.
            if before.is_some_and(|before| bytes(share) < bytes(before) / 4 * 3) {
                moving.limited = Some(Instant::now());
            }
        }
    }

    async fn see_source(&mut self) -> Result<(SourceRecord, SourceView), Refusal> {
        let (record, port) = match self.record.as_ref().map(|record| &record.holding) {
            Some(Holding::Source(outgoing)) => (outgoing.record, outgoing.address.map_or(0, |address| address.port())),
            _ => return Err(Refusal::new(ErrorCode::Internal, "the journal knows no move")),
        };
        // What was released, or is confirmed, no longer depends on this QEMU: one that hangs must hold up nothing.
        let asks = matches!(record, SourceRecord::Offered | SourceRecord::Returned);
        let qmp = if asks && self.process.is_some() { Some(self.monitor()?.clone()) } else { None };
        let is_dead = self.process.is_none();
        let Some(Moving::Source(moving)) = &mut self.moving else {
            return Err(Refusal::new(ErrorCode::Internal, "no move"));
        };
        let all_sent = moving.carry.as_ref().is_some_and(|carry| {
            let postcopy = carry.status().postcopy;
            carry.is_usable() && postcopy.switched && postcopy.left == 0
        });
        // What is on its way arrives without it.
        let memory_gone = is_dead && !all_sent;
        let qemu = match &qmp {
            Some(qmp) => {
                moving.watch.sample(qmp).await;
                moving.foresee(&self.host).await;
                Some(moving.watch.look(qmp).await.map_err(qemu_failed)?)
            }
            None => None,
        };
        let runs = qemu.as_ref().is_some_and(|qemu| qemu.vcpus == Vcpus::Running);
        let disks = moving.disks.look(qmp.as_ref(), runs).await.map_err(qemu_failed)?;
        if disks.copied && !moving.disks.lanes.is_empty() {
            moving.copied.get_or_insert(millis(moving.began.elapsed()));
        }
        let (carry, _) = carry_view(moving.carry.as_ref());
        let view = SourceView {
            now: millis(moving.began.elapsed()),
            unix_now: unix_now(),
            qemu,
            carry,
            disks,
            silent: millis(moving.heard.elapsed()),
            declined: moving.declined.clone(),
            running: moving.running.is_some(),
            whole: moving.whole,
            port,
            next_port: moving.next_port,
            memory_gone,
            cancel: moving.cancel,
        };
        Ok((record, view))
    }

    async fn act_source(&mut self, action: SourceAction) -> Option<Duration> {
        let done = match action {
            SourceAction::Wait(wait) => return Some(Duration::from_millis(wait.get())),
            SourceAction::End(outcome) => return self.end_source(outcome).await,
            SourceAction::Tell(message, wait) => {
                let wait = Duration::from_millis(wait.get());
                if let Some(Moving::Source(moving)) = &mut self.moving {
                    if let Err(rest) = moving.told_peer.is_due(&message, wait) {
                        return Some(rest);
                    }
                    tell(&self.host, moving.carry.as_ref(), &moving.grant, &moving.grant.destination, message);
                }
                return Some(wait);
            }
            SourceAction::Record(next) => {
                return (!self.record_source(next)).then_some(RETRY);
            }
            SourceAction::Stop => {
                if let Some(Moving::Source(moving)) = &mut self.moving {
                    moving.stopped = Some(Instant::now());
                    moving.carry.iter().for_each(CarryClient::hurry);
                    moving.disks.hurry();
                }
                let stopped = self.stop_first().await;
                if let (Err(_), Some(Moving::Source(moving))) = (&stopped, &self.moving) {
                    moving.seat.iter().for_each(Seat::end);
                }
                stopped
            }
            SourceAction::Leave => {
                if let Err(refusal) = self.leave() {
                    tracing::warn!(message = refusal.message, "post-copy cannot be begun");
                    return Some(RETRY);
                }
                // Until carry says that it does so.
                return Some(LEAVING);
            }
            SourceAction::Throttle => self.throttle().await,
            SourceAction::GoOn(port) => {
                if let Err(refusal) = self.go_on_as_source(port).await {
                    tracing::warn!(message = refusal.message, "what was left cannot be sent yet");
                    return Some(RETRY);
                }
                Ok(())
            }
            SourceAction::FinishDisks => {
                let finished = match (self.monitor(), &self.moving) {
                    (Ok(qmp), Some(Moving::Source(moving))) => moving.disks.finish(qmp).await.map_err(qemu_failed),
                    (Err(refusal), _) => Err(refusal),
                    _ => Ok(()),
                };
                if let Err(refusal) = finished {
                    tracing::warn!(message = refusal.message, "the disks' mirrors do not end");
                }
                return Some(out::ENDING);
            }
            SourceAction::Migrate => match self.monitor().cloned() {
                Ok(qmp) => {
                    if let Some(Moving::Source(moving)) = &mut self.moving {
                        moving.disks.unserve(&qmp).await;
                    }
                    qmp.migrate_fd(MIGRATION_FD).await.map_err(qemu_failed)
                }
                Err(refusal) => Err(refusal),
            }
            .inspect_err(|refusal| {
                if let Some(Moving::Source(moving)) = &mut self.moving {
                    moving.machine.on_refused(refusal.clone());
                }
            }),
            SourceAction::ContinueSwitchOver => {
                if let Err(refusal) = self.command(Qmp::migrate_continue).await {
                    // Asked twice, because QEMU still showed its old state after the first time: it goes on already. A real refusal shows
                    // in the next look, and ends the move by its limit.
                    tracing::debug!(message = refusal.message, "QEMU did not take a continue");
                    return Some(Duration::from_millis(5));
                }
                Ok(())
            }
            SourceAction::CancelQemu => self.command(Qmp::migrate_cancel).await,
            SourceAction::ContinueVm => self.command(Qmp::cont).await,
        };
        if let Err(refusal) = done {
            tracing::warn!(message = refusal.message, "QEMU did not do as told");
            return Some(Duration::from_millis(20));
        }
        None
    }

    /// Stops the VM, and remembers whether that is proven to have been before QEMU's own switch-over.
    async fn stop_first(&mut self) -> Result<(), Refusal> {
        let qmp = self.monitor()?.clone();
        let Some(Moving::Source(moving)) = &mut self.moving else { return Ok(()) };
        let stopped = qmp.stop_first(moving.held, moving.stop_limit).await.map_err(qemu_failed)?;
        match stopped {
            StoppedBy::Us => moving.machine.on_stopped(millis(moving.began.elapsed())),
            StoppedBy::Unproven(status) => tracing::info!(%status, "QEMU may have been first"),
        }
        Ok(())
    }

    pub(super) async fn command<'a, F>(&'a self, command: impl FnOnce(&'a Qmp) -> F) -> Result<(), Refusal>
    where
        F: Future<Output = Result<(), godwit_qemu::QmpError>>,
    {
        command(self.monitor()?).await.map_err(qemu_failed)
    }

    /// Sets the record, and says whether it holds; if it cannot be written the one before stands, in memory too.
    fn record_source(&mut self, next: SourceRecord) -> bool {
        let Some(record) = &mut self.record else { return false };
        let before = record.clone();
        if let Holding::Source(outgoing) = &mut record.holding {
            outgoing.record = next;
        }
        if let Err(error) = self.host.journal.write(record) {
            tracing::error!(error = &error as &dyn std::error::Error, "the journal could not be written");
            // To own it again is safe even if only this process knows: nothing but a stop that this process has proven leads from the
            // record before to a release. A full disk must not keep the VM standing still.
            if next != SourceRecord::Returned {
                *record = before;
                return false;
            }
        } else {
            tracing::info!(record = ?next, "journalled");
        }
        true
    }

    async fn end_source(&mut self, outcome: Outcome) -> Option<Duration> {
        let Some(Moving::Source(moving)) = &self.moving else { return None };
        moving.seat.iter().for_each(Seat::end);
        let (_, status) = carry_view(moving.carry.as_ref());
        let ended = EndedMove {
            task: moving.grant.task,
            vm: self.vm,
            generation: moving.grant.generation,
            source: true,
            reason: match &outcome {
                Outcome::Moved => None,
                Outcome::Stayed(reason) => Some(with_cause(reason, status.broken.as_deref())),
            },
            figures: MigrationFigures {
                total: millis(moving.began.elapsed()),
                blackout: moving.blackout.unwrap_or_default(),
                predicted_blackout: moving.predicted,
                wire_bytes: Bytes(moving.sent_before + status.wire_bytes + moving.disks.wire_bytes()),
                disk_bytes: Bytes(moving.disks.wire_bytes()),
                disk_time: moving.copied.unwrap_or_default(),
                ram_bytes: Bytes(status.stream_bytes),
                rounds: moving.watch.ram.rounds,
                left: moving.left.max(left_at_switch(&status)),
                forecast: moving.forecast,
            },
        };
        if let Err(error) = self.host.end_move(&ended) {
            tracing::error!(error = &error as &dyn std::error::Error, "the end of the move could not be kept");
            return Some(RETRY);
        }
        if outcome == Outcome::Moved && !(self.raise_floor(ended.generation) && self.leave_disks(ended.generation).await) {
            return Some(RETRY);
        }
        let last = match &outcome {
            Outcome::Moved => PeerMessage::Settled,
            Outcome::Stayed(reason) => PeerMessage::Aborted { reason: reason.clone() },
        };
        tell(&self.host, moving.carry.as_ref(), &moving.grant, &moving.grant.destination, last);
        tracing::info!(?outcome, figures = ?ended.figures, pages = ?status.pages, "the move has ended here");
        self.host.budget.leave(self.vm);
        let Some(Moving::Source(moving)) = self.moving.take() else { return None };
        if let Some(carry) = moving.carry {
            // The last fact is on its way through the controller, too.
            tokio::time::sleep(Duration::from_millis(100)).await;
            carry.end().await;
        }
        if outcome != Outcome::Moved {
            self.undo_disks().await;
        }
        moving.disks.end().await;
        match outcome {
            Outcome::Moved => {
                if let Some(record) = &mut self.record {
                    record.end_wanted = true;
                }
                if let Some((key, blocks)) = moving.keep {
                    self.keep_memory(key, blocks, ended.generation).await;
                }
                self.end_process().await;
                self.drop_record();
            }
            Outcome::Stayed(_) => {
                self.own_again();
                self.refresh().await;
                // The destination may have announced it already.
                if self.state == RunState::Running {
                    self.announce_by_host();
                }
            }
        }
        None
    }

    fn tell_progress(&mut self, record: SourceRecord, view: &SourceView) {
        let Some(Moving::Source(moving)) = &mut self.moving else { return };
        let (_, status) = carry_view(moving.carry.as_ref());
        let qemu = view.qemu.as_ref();
        let copied = moving.disks.copied();
        let phase = match (record, qemu.map(|qemu| (qemu.vcpus, qemu.migration))) {
            (SourceRecord::Offered, Some((_, QemuMigration::None))) if !view.disks.copied => MigrationPhase::Disks,
            (SourceRecord::Offered, Some((_, QemuMigration::None))) => MigrationPhase::Prepare,
            (SourceRecord::Offered, Some((Vcpus::Running, _))) => MigrationPhase::WarmUp,
            (SourceRecord::Offered, _) => MigrationPhase::StopAndCopy,
            (SourceRecord::Released, _) if view.running => MigrationPhase::PostCopy,
            (SourceRecord::Released, _) => MigrationPhase::HandOver,
            (SourceRecord::Returned | SourceRecord::Confirmed, _) => MigrationPhase::CleanUp,
        };
        let last = moving.told.map_or((None, 0), |(at, phase, permille)| (Some((at, phase)), permille));
        if last.0.is_some_and(|(at, before)| before == phase && at.elapsed() < PROGRESS_EVERY) {
            return;
        }
        let left = Bytes(status.postcopy.left.saturating_mul(PAGE));
        let remaining = match phase {
            MigrationPhase::PostCopy => left,
            MigrationPhase::Disks => out::remaining(copied),
            _ => qemu.map_or(Bytes(0), |qemu| qemu.remaining),
        };
        let total = moving.watch.ram.total.get();
        let believed = match phase {
            MigrationPhase::Prepare => 0,
            // Memory is believed to be half of the work, whatever there is of it.
            MigrationPhase::Disks => u64::from(out::permille(copied) / 2),
            // Nothing is known yet, or a pass has just ended.
            MigrationPhase::WarmUp if total == 0 || remaining == Bytes(0) => 0,
            // The first pass is most of the work; what later passes still have to do shrinks with what remains.
            MigrationPhase::WarmUp if moving.watch.ram.rounds <= 1 => 900 * total.saturating_sub(remaining.get()) / total,
            MigrationPhase::WarmUp => 900 + 60 * total.saturating_sub(remaining.get()) / total,
            MigrationPhase::StopAndCopy => 970,
            MigrationPhase::HandOver => 985,
            MigrationPhase::PostCopy => 990,
            MigrationPhase::CleanUp => 995,
        };
        let permille = last.1.max(u16::try_from(believed).unwrap_or(0));
        let rate = view.carry.rate;
        let dirty_rate = qemu.and_then(|qemu| qemu.dirty_rate);
        let converges = rate.get() > dirty_rate.map_or(0, |rate| rate.get());
        let time_left = (converges && phase == MigrationPhase::WarmUp)
            .then(|| Millis(remaining.get().saturating_mul(1_000) / (rate.get() - dirty_rate.map_or(0, |rate| rate.get())).max(1)));
        let progress = MigrationProgress {
            phase,
            permille,
            wire_bytes: Bytes(status.wire_bytes + moving.disks.wire_bytes()),
            ram_bytes: Bytes(status.stream_bytes),
            remaining,
            rate,
            dirty_rate,
            rounds: moving.watch.ram.rounds,
            predicted_blackout: predicted_blackout(view),
            time_left,
            rung: moving.machine.rung(view.now).filter(|_| phase == MigrationPhase::WarmUp),
        };
        moving.told = Some((Instant::now(), phase, permille));
        let progress = godwit_link::encode(&progress);
        self.host.controller.send(Body::Progress(v1::Progress { task: moving.grant.task.to_string(), progress }));
    }
}

/// What is not empty of these.
fn bytes_of(disks: &[TravellingDisk]) -> u64 {
    disks.iter().fold(0, |sum, disk| sum.saturating_add(disk.allocated.get()))
}

/// Memory that this carry left for after the switch.
fn left_at_switch(status: &CarryStatus) -> Bytes {
    Bytes(status.postcopy.left_at_switch.saturating_mul(PAGE))
}

/// By so many percent at most, in steps of 10.
const fn throttled(most: u8) -> MigrationParameters {
    MigrationParameters {
        max_bandwidth: None,
        downtime_limit: None,
        avail_switchover_bandwidth: None,
        cpu_throttle: Some(CpuThrottle { initial: if most < 20 { most } else { 20 }, increment: 10, most }),
    }
}

/// Blackout if the VM were stopped now, once that is known.
fn predicted_blackout(view: &SourceView) -> Option<Millis> {
    view.qemu.as_ref().and_then(|qemu| warm_up_of(qemu, view)).map(|warm_up| predict_blackout(&warm_up))
}

/// A failure together with what carry knows of it.
fn with_cause(reason: &Refusal, broken: Option<&str>) -> Refusal {
    match broken {
        Some(broken) if reason.code == ErrorCode::MigrationFailed => {
            Refusal { message: format!("{} (carry: {broken})", reason.message), ..reason.clone() }
        }
        _ => reason.clone(),
    }
}

/// Sets what a source needs. What this QEMU does not have is left out where that is safe. Answers whether QEMU is held from switching over by
/// itself while the VM runs.
async fn prepare_source(qmp: &Qmp, may_throttle: bool) -> Result<bool, Refusal> {
    let known: Vec<String> =
        qmp.query_migrate_capabilities().await.map_err(qemu_failed)?.into_iter().map(|known| known.capability).collect();
    let mut capabilities = vec![("events", true), ("return-path", true), ("pause-before-switchover", true)];
    for (capability, _) in &capabilities {
        if !known.iter().any(|known| known == capability) {
            return Err(Refusal::new(ErrorCode::HostIncompatible, format!("this QEMU has no migration capability {capability}"))
                .hint("install QEMU 7.2 or newer on the source host"));
        }
    }
    // Asked of the source alone, the destination never acknowledges: QEMU then cannot switch over by itself while the VM runs.
    let held = known.iter().any(|known| known == "switchover-ack");
    if held {
        capabilities.push(("switchover-ack", true));
    }
    // What this QEMU was set up for before is still set: post-copy when the VM came, the other when it did not leave.
    for (capability, wanted) in [("postcopy-ram", false), ("auto-converge", may_throttle)] {
        if known.iter().any(|known| known == capability) {
            capabilities.push((capability, wanted));
        }
    }
    qmp.set_migration_capabilities(&capabilities).await.map_err(qemu_failed)?;
    if may_throttle {
        qmp.set_migration_parameters(UNTHROTTLED).await.map_err(qemu_failed)?;
    }
    let parameters =
        MigrationParameters { max_bandwidth: Some(UNLIMITED), downtime_limit: Some(LATE), ..MigrationParameters::default() };
    qmp.set_migration_parameters(parameters).await.map_err(qemu_failed)?;
    // Without a sample the VM could not be stopped before the second pass.
    if let Err(error) = qmp.begin_dirty_rate(1).await {
        tracing::info!(%error, "no dirty rate can be sampled");
    } else if !held {
        // It may be through with a quiet guest before the sample is there, and then the VM could not be stopped in time.
        match qmp.wait_for_dirty_rate(SAMPLE_LIMIT).await {
            Ok(Some(_)) => {}
            Ok(None) => tracing::warn!("no dirty rate after {SAMPLE_LIMIT:?}"),
            Err(error) => tracing::warn!(%error, "no dirty rate was sampled"),
        }
    }
    Ok(held)
}
