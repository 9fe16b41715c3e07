//! The agents of both sides: the real `Source` and `Destination` decide, here it is done. Journals do not fail and agents do not die here: that
//! is explored in [`crate::handover`].

use godwit_migration::{
    ArrivingCarry, CarryView, Destination, DestinationAction, DestinationRecord, DestinationView, DisksView, Outcome, PeerMessage,
    QemuMigration, QemuView, Source, SourceAction, SourceRecord, SourceView, Vcpus,
};
use godwit_model::{Bytes, BytesPerSec, ErrorCode, Millis, Refusal, UnixMillis};

use godwit_carrier::Side;

use super::Wrong;
use super::carry::Ended;
use super::plan::{Fault, Harm, MILLISECOND, Mark, Micros, Party, Plan, SECOND, SIDES};
use super::rules::{self, Broken, broken};
use super::world::{Event, World};

/// Later than any run goes.
const EXPIRES: UnixMillis = UnixMillis(1_000_000);

/// A fact on its way to an agent.
#[derive(Clone, Debug)]
pub(super) struct Fact {
    to: Side,
    message: PeerMessage,
}

pub(super) struct Agents {
    source: Source,
    source_record: SourceRecord,
    source_ended: Option<Outcome>,
    destination: Destination,
    destination_record: DestinationRecord,
    destination_ended: Option<Outcome>,
    /// Our `stop` has found the VM running.
    stopped: bool,
    frozen_until: [Micros; 2],
    // What the source has heard.
    declined: Option<Refusal>,
    running: bool,
    pub(super) cancel: bool,
    // What the destination has heard.
    released: bool,
    aborted: Option<Refusal>,
    settled: bool,
    announced: bool,
}

impl Agents {
    pub(super) fn new(plan: &Plan) -> Self {
        Self {
            source: Source::new(plan.policy, EXPIRES, Millis(0)).held(plan.held_back),
            source_record: SourceRecord::Offered,
            source_ended: None,
            destination: Destination::new(EXPIRES),
            destination_record: DestinationRecord::Prepared,
            destination_ended: None,
            stopped: false,
            frozen_until: [0; 2],
            declined: None,
            running: false,
            cancel: false,
            released: false,
            aborted: None,
            settled: false,
            announced: false,
        }
    }

    pub(super) const fn is_done(&self, side: Side) -> bool {
        match side {
            Side::Source => self.source_ended.is_some(),
            Side::Destination => self.destination_ended.is_some(),
        }
    }

    pub(super) const fn are_done(&self) -> bool {
        self.is_done(Side::Source) && self.is_done(Side::Destination)
    }

    pub(super) const fn has_stopped(&self) -> bool {
        self.stopped
    }

    pub(super) fn moved(&self) -> bool {
        self.source_ended == Some(Outcome::Moved)
    }

    pub(super) fn tell(&self) -> String {
        format!("{:?} {:?}", self.source_record, self.destination_record)
    }
}

impl World {
    fn millis(&self) -> Millis {
        Millis(self.now / MILLISECOND)
    }

    pub(super) fn on_agent(&mut self, side: Side) -> Result<(), Broken> {
        if self.agents.is_done(side) {
            return Ok(());
        }
        if self.now < self.agents.frozen_until[side as usize] {
            self.at(self.agents.frozen_until[side as usize], Event::Agent(side));
            return Ok(());
        }
        let wait = match side {
            Side::Source => self.source_agent()?,
            Side::Destination => self.destination_agent()?,
        };
        let wait = wait + self.random.between(1, 2_000);
        self.after(wait, Event::Agent(side));
        Ok(())
    }

    /// Says a fact by every way there is.
    fn tell(&mut self, to: Side, message: PeerMessage) {
        let number = self.facts.len();
        self.facts.push(Fact { to, message });
        self.carry(to.peer()).say_fact(number as u64);
        let arrives = self.now.max(self.controller_away_until) + self.random.between(5, 400) * MILLISECOND;
        self.at(arrives, Event::Fact(number));
    }

    pub(super) fn on_fact(&mut self, number: usize) {
        let Some(Fact { to, message }) = self.facts.get(number).cloned() else { return };
        if self.agents.is_done(to) {
            return self.answer_about_the_past(to, &message);
        }
        let agents = &mut self.agents;
        match message {
            PeerMessage::Released => agents.released = true,
            PeerMessage::Aborted { reason } => agents.aborted = Some(reason),
            PeerMessage::Settled => agents.settled = true,
            PeerMessage::Running { .. } | PeerMessage::Whole { .. } => agents.running = true,
            // Of post-copy, which these agents do not do; and of an agent that may stand still, which none does.
            PeerMessage::Prepared | PeerMessage::Cut { .. } | PeerMessage::GoOn { .. } | PeerMessage::Lost => {}
            PeerMessage::Declined { reason } => agents.declined = Some(reason),
        }
    }

    /// A side that has forgotten the move is asked about it.
    fn answer_about_the_past(&mut self, side: Side, message: &PeerMessage) {
        let answer = match (message, &self.agents.destination_ended) {
            (PeerMessage::Running { .. } | PeerMessage::Whole { .. } | PeerMessage::Declined { .. }, _) => PeerMessage::Settled,
            (PeerMessage::Released, Some(Outcome::Moved)) => PeerMessage::Whole { since: Millis(0) },
            (PeerMessage::Released, Some(Outcome::Stayed(reason))) => PeerMessage::Declined { reason: reason.clone() },
            _ => return,
        };
        if !self.agents.is_done(side.peer()) {
            self.tell(side.peer(), answer);
        }
    }

    fn source_view(&self) -> SourceView {
        let (qemu, window) = (&self.source_qemu, self.source.session.window());
        let view = QemuView {
            vcpus: qemu.vcpus,
            migration: qemu.migration,
            remaining: Bytes(qemu.remaining()),
            dirty_rate: qemu.dirty_rate().map(BytesPerSec),
            since_sync: Millis(qemu.since_sync(self.now) / MILLISECOND),
            rounds: 1,
        };
        let millis = |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let waits = if self.source.session.is_settled() { 0 } else { self.now / MILLISECOND - millis(window.last_applied()) };
        SourceView {
            now: self.millis(),
            unix_now: UnixMillis(self.now / MILLISECOND),
            qemu: qemu.alive.then_some(view),
            carry: CarryView {
                usable: self.source.ended.is_none(),
                connected: self.source.connection.is_some(),
                rate: BytesPerSec(window.rate()),
                queued: Millis(window.in_flight() * 1_000 / window.rate().max(1)),
                round_trip: Millis(millis(window.round_trip())),
                stalled: Millis(waits),
                unanswered: Millis(self.feed.unanswered(self.now) / MILLISECOND),
                can_leave: false,
                leaving: false,
            },
            disks: DisksView::NONE,
            silent: Millis(0),
            declined: self.agents.declined.clone(),
            running: self.agents.running,
            whole: false,
            port: 0,
            next_port: None,
            memory_gone: false,
            cancel: self.agents.cancel,
        }
    }

    /// Looks, decides and does; how long to wait then.
    fn source_agent(&mut self) -> Result<Micros, Broken> {
        let view = self.source_view();
        match self.agents.source.decide(self.agents.source_record, &view) {
            SourceAction::Wait(time) => return Ok(time.get() * MILLISECOND),
            SourceAction::Migrate if self.source_qemu.migrate() => {}
            SourceAction::Migrate => self.agents.source.on_refused(Refusal::new(ErrorCode::QemuFailed, "refused")),
            SourceAction::Stop => {
                self.feed.hurry();
                self.agents.stopped |= self.source_qemu.runs();
                self.source_qemu.stop();
                // The answer right after it, unless QEMU was first.
                if self.source_qemu.vcpus == Vcpus::Paused {
                    self.agents.source.on_stopped(Millis(self.now / MILLISECOND));
                }
                self.mark(Mark::Stopped);
            }
            SourceAction::Leave | SourceAction::Throttle | SourceAction::FinishDisks | SourceAction::GoOn(_) => {}
            SourceAction::ContinueSwitchOver => self.source_qemu.continue_switch_over(),
            SourceAction::CancelQemu => self.source_qemu.cancel(),
            SourceAction::ContinueVm => self.source_qemu.run_on(),
            SourceAction::Record(record) => {
                if record == SourceRecord::Released {
                    self.check_release()?;
                    self.mark(Mark::Released);
                }
                self.agents.source_record = record;
            }
            SourceAction::Tell(message, time) => {
                self.tell(Side::Destination, message);
                return Ok(time.get() * MILLISECOND);
            }
            SourceAction::End(outcome) => self.end_source(outcome)?,
        }
        Ok(0)
    }

    /// Stop, last byte, release.
    fn check_release(&self) -> Result<(), Broken> {
        let qemu = &self.source_qemu;
        if !qemu.alive {
            // Stopped by us and proven dead: the destination may have all of it, or declines.
            return if self.agents.stopped { Ok(()) } else { broken(rules::ORDER, "released a VM that was not stopped") };
        }
        let loaded = self.destination_qemu.migration == QemuMigration::Completed;
        if qemu.runs() || qemu.migration != QemuMigration::Completed || !loaded {
            let (vcpus, migration) = (qemu.vcpus, qemu.migration);
            return broken(rules::ORDER, format!("released with {vcpus:?}, {migration:?}, loaded: {loaded}"));
        }
        Ok(())
    }

    fn end_source(&mut self, outcome: Outcome) -> Result<(), Broken> {
        let last = match &outcome {
            Outcome::Moved if !self.ran_at_destination => return broken(rules::NOTHING_REMOVED, "the source's QEMU is ended"),
            Outcome::Moved => {
                self.source_qemu.alive = false;
                PeerMessage::Settled
            }
            Outcome::Stayed(reason) => PeerMessage::Aborted { reason: reason.clone() },
        };
        self.agents.source_ended = Some(outcome);
        self.tell(Side::Destination, last);
        self.end_carry(Side::Source, Ended::Gone);
        Ok(())
    }

    fn destination_agent(&mut self) -> Result<Micros, Broken> {
        let qemu = &self.destination_qemu;
        let view = DestinationView {
            now: self.millis(),
            unix_now: UnixMillis(self.now / MILLISECOND),
            qemu: qemu.alive.then_some(QemuView {
                vcpus: qemu.vcpus,
                migration: qemu.migration,
                remaining: Bytes(0),
                dirty_rate: None,
                since_sync: Millis(0),
                rounds: 0,
            }),
            released: self.agents.released
                || (self.wrong == Wrong::RunsWithoutRelease && qemu.migration == QemuMigration::Completed),
            aborted: self.agents.aborted.clone(),
            carry: ArrivingCarry { usable: true, connected: true, again: false, port: 0, has_section: true },
            lost: false,
            settled: self.agents.settled,
            source_given_up: false,
            cont_refused: None,
            announced: self.agents.announced,
        };
        match self.agents.destination.decide(&self.agents.destination_record, &view) {
            DestinationAction::Wait(time) => return Ok(time.get() * MILLISECOND),
            DestinationAction::ContinueVm => self.run_at_destination()?,
            DestinationAction::EndQemu => self.destination_qemu.alive = false,
            DestinationAction::GoOn | DestinationAction::Recover => {}
            DestinationAction::Announce => self.agents.announced = true,
            DestinationAction::Record(record) => {
                if record == DestinationRecord::Activated {
                    self.mark(Mark::Activated);
                }
                self.agents.destination_record = record;
            }
            DestinationAction::Tell(message, time) => {
                self.tell(Side::Source, message);
                return Ok(time.get() * MILLISECOND);
            }
            DestinationAction::End(outcome) => {
                self.agents.destination_ended = Some(outcome);
                self.end_carry(Side::Destination, Ended::Gone);
            }
        }
        Ok(0)
    }

    fn run_at_destination(&mut self) -> Result<(), Broken> {
        if !self.destination_qemu.alive || self.destination_qemu.vcpus != Vcpus::Paused {
            return Ok(());
        }
        if !matches!(self.agents.source_record, SourceRecord::Released | SourceRecord::Confirmed) || self.outdated {
            return broken(rules::ORDER, format!("the destination runs, the source is {:?}", self.agents.source_record));
        }
        let same = self.source_qemu.last.as_ref().map(|last| last.difference(&self.destination_qemu.memory));
        if same != Some(None) || self.destination_qemu.device != self.source_qemu.device {
            return broken(rules::MEMORY_EQUAL, format!("{same:?} when the VM runs on"));
        }
        self.destination_qemu.vcpus = Vcpus::Running;
        self.ran_at_destination = true;
        self.agents.destination.on_continued(self.millis());
        Ok(())
    }

    fn was_killed(&self, side: Side) -> bool {
        self.killed.contains(&Party::Qemu(side))
    }

    /// How it ended must be good, and a move that came to nothing needs a reason.
    pub(super) fn check_end(&self) -> Result<(), Broken> {
        match (&self.agents.source_ended, &self.agents.destination_ended) {
            (Some(Outcome::Moved), Some(Outcome::Moved)) => {
                if self.destination_qemu.runs() || self.was_killed(Side::Destination) {
                    Ok(())
                } else {
                    broken(rules::GOOD_END, "moved, and nobody runs")
                }
            }
            (Some(Outcome::Stayed(reason)), Some(Outcome::Stayed(_))) => {
                if !self.source_qemu.runs() && !self.was_killed(Side::Source) {
                    return broken(rules::GOOD_END, "stayed, and nobody runs");
                }
                self.check_reason(reason)
            }
            (source, destination) => broken(rules::GOOD_END, format!("{source:?}, {destination:?}")),
        }
    }

    fn check_reason(&self, reason: &Refusal) -> Result<(), Broken> {
        let killed = !self.killed.is_empty();
        let slow = |harm: &Harm| !matches!(harm, Harm::Cancel | Harm::NoController(_));
        let was_slow = self.struck.iter().any(|fault| slow(&fault.harm));
        let broke_once = matches!(self.struck[..], [Fault { harm: Harm::Cut | Harm::Silent(_), .. }]);
        let excused = match reason.code {
            ErrorCode::Cancelled => self.agents.cancel,
            ErrorCode::QemuFirst => !self.plan.held_back,
            // One break is missed after six seconds at the latest, and mended before any limit.
            ErrorCode::MigrationStalled => was_slow && !broke_once,
            // A session outlives whatever happens to the link, once there was one.
            _ => killed || (was_slow && self.source.ended == Some(Ended::NeverConnected)),
        };
        if excused { Ok(()) } else { broken(rules::GOOD_END, format!("given up for no reason: {reason:?}")) }
    }

    /// A fault strikes, unless it did before.
    pub(super) fn strike(&mut self, number: usize) {
        if !std::mem::replace(&mut self.ahead[number], false) {
            return;
        }
        let fault = self.plan.faults[number];
        let connection = self.source.connection.or(self.destination.connection);
        // A connection that dies silently is missed after some seconds.
        let mut lasts = 8 * SECOND;
        match fault.harm {
            Harm::Cut | Harm::LateGreeting(_) => {
                if let Harm::LateGreeting(late) = fault.harm {
                    self.wire.late = late;
                    lasts += late;
                }
                if let Some(connection) = connection {
                    self.wire.cut(connection);
                    for side in SIDES {
                        if !self.random.one_in(4) {
                            let time = self.random.below(300 * MILLISECOND);
                            self.after(time, Event::Reset(connection, side));
                        }
                    }
                }
            }
            Harm::Silent(from) => {
                if let Some(connection) = connection {
                    self.wire.silence(connection, from);
                }
            }
            Harm::Down(time) => {
                self.wire.take_down(self.now + time);
                lasts += time;
            }
            Harm::Slow(rate, time) => {
                self.wire.slow_down(rate, self.now + time);
                lasts += time;
            }
            Harm::Freeze(party, time) => {
                self.freeze(party, self.now + time);
                lasts += time;
            }
            Harm::Kill(party) => self.kill(party),
            Harm::NoController(time) => {
                self.controller_away_until = self.now + time;
                lasts = time;
            }
            Harm::Cancel => self.agents.cancel = true,
        }
        self.healed = self.healed.max(self.now + lasts);
        self.struck.push(fault);
    }

    fn freeze(&mut self, party: Party, until: Micros) {
        match party {
            Party::Agent(side) => self.agents.frozen_until[side as usize] = until,
            Party::Carry(side) => self.carry(side).frozen_until = until,
            Party::Qemu(Side::Source) => self.source_qemu_frozen_until = until,
            Party::Qemu(Side::Destination) => self.destination_qemu.frozen_until = until,
        }
    }

    fn kill(&mut self, party: Party) {
        match party {
            // What becomes of an agent that dies is explored in `crate::handover`.
            Party::Agent(_) => {}
            Party::Carry(side) => self.end_carry(side, Ended::Gone),
            Party::Qemu(Side::Source) => self.source_qemu.alive = false,
            Party::Qemu(Side::Destination) => self.destination_qemu.alive = false,
        }
        self.killed.push(party);
    }
}
