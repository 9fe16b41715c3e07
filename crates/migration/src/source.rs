//! The source of a move: owns the VM until it has released it. Every record and restart is in `docs/spec/handover.md`.
//!
//! ```text
//!              completed, or QEMU proven dead            Running
//!   Offered ───────────────────────────────▶ Released ─────────────▶ Confirmed ──▶ cleared, ended: moved
//!      │                                        │ Declined
//!      │ given up, failed, declined             ▼
//!      └──────────────▶ ended: stayed ◀────── Returned (continued)
//! ```
//! In post-copy pages are left before the stop, and `Released` lasts until the destination has all of them.
//!
//! *Our stop*: the VM is stopped by us, proven by `paused` while QEMU still copies. If QEMU reaches its own switch-over first, the move is
//! cancelled and tried again. A destination is told `Released` only after the record is durable, and only then can it run.

use std::hash::{Hash, Hasher};

use godwit_model::{Bytes, ErrorCode, MigrationPolicy, Millis, PostCopy, Refusal, Retry, Rung, UnixMillis};
use serde::{Deserialize, Serialize};

use crate::convergence::{WarmUp, converges, predict_blackout, shrinks_soon};
use crate::message::PeerMessage;
use crate::view::{CarryView, DisksView, Outcome, QemuMigration, QemuView, Vcpus};

/// What the source's journal says. Durable before it is acted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceRecord {
    /// This host owns the VM and tries to move it.
    Offered,
    /// This host will never run the VM again unless the destination declines.
    Released,
    /// The move is off, given up or declined: this host owns the VM as before. Recorded before the VM is continued, so that what the
    /// destination holds can never be released after it.
    Returned,
    /// The destination runs it: what is left here may be removed.
    Confirmed,
}

/// All that the source sees at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceView {
    /// Monotonic time.
    pub now: Millis,
    /// Wall clock, for the grant's expiry.
    pub unix_now: UnixMillis,
    /// Its QEMU; `None` when the process is proven dead.
    pub qemu: Option<QemuView>,
    /// Its carry.
    pub carry: CarryView,
    /// Its disks that travel.
    pub disks: DisksView,
    /// How long the destination's agent has said nothing.
    pub silent: Millis,
    /// The destination has said that it declines.
    pub declined: Option<Refusal>,
    /// The destination has said that it runs the VM.
    pub running: bool,
    /// The destination has said that it runs the VM and has all of its memory.
    pub whole: bool,
    /// The port of the destination's carry that this side's was told to dial.
    pub port: u16,
    /// The destination has said that this one is to be dialled instead.
    pub next_port: Option<u16>,
    /// The VM's memory is no longer here: its QEMU has died.
    pub memory_gone: bool,
    /// The user wants it cancelled.
    pub cancel: bool,
}

/// What the source does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceAction {
    /// Nothing; look again when something happens, at the latest after this long.
    Wait(Millis),
    /// QMP `migrate` into carry's socket.
    Migrate,
    /// QMP `stop`, then look.
    Stop,
    /// Remember, durably, that pages may be left for after the switch, then have carry leave them.
    Leave,
    /// Have QEMU slow the VM down.
    Throttle,
    /// Have the mirrors of the disks end, and see whether the destination has everything.
    FinishDisks,
    /// Start another carry that sends what the destination does not have, to this port.
    GoOn(u16),
    /// QMP `migrate-continue` from `pre-switchover`.
    ContinueSwitchOver,
    /// QMP `migrate_cancel`.
    CancelQemu,
    /// QMP `cont`.
    ContinueVm,
    /// Make this record durable, then look.
    Record(SourceRecord),
    /// Tell the destination, by every way there is; then wait this long for an answer.
    Tell(PeerMessage, Millis),
    /// The move is over for the source. On `Moved` the local QEMU may now be ended.
    End(Outcome),
}

/// The volatile half of the source: all of it can be lost at any moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    policy: MigrationPolicy,
    expires: UnixMillis,
    began: Millis,
    held: bool,
    asked: bool,
    stopped: Option<Millis>,
    /// When the blackout was first within the budget, and worth shortening.
    within: Option<Millis>,
    /// The number of the pass under way, and what was left to send when it was first seen; and whether that was hardly less than the time before.
    pass: Option<(u32, Bytes)>,
    stuck: bool,
    /// Since when passes bring it no nearer to that.
    missed: Option<Millis>,
    throttles: bool,
    /// Pages may be left for after the switch.
    leaves: bool,
    giving_up: Option<Refusal>,
}

/// Of all that decisions depend on: why a move is given up is told, and decides nothing.
impl Hash for Source {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Self { policy, expires, began, held, asked, stopped, within, pass, stuck, missed, throttles, leaves, giving_up } = self;
        (policy, expires, began, held, asked, stopped, within).hash(state);
        (pass, stuck, missed, throttles, leaves, giving_up.is_some()).hash(state);
    }
}

/// The number of QEMU's pass that looks at every page.
const FIRST_PASS: u32 = 1;
/// A miss is none before it has lasted so long: one look may have seen a moment.
const MISS_LASTS: Millis = Millis(1_000);
/// How often to look when nothing is expected soon.
const IDLE: Millis = Millis(250);
/// How often to look while the decision to stop may be near.
const NEAR: Millis = Millis(20);
/// How long a blackout within the budget is shortened at most: the budget is a limit, and no aim.
const SHORTENED: Millis = Millis(1_000);
/// How long the destination's QEMU may leave a question open for the VM to be stopped, beside a round trip.
const ANSWER_LIMIT: Millis = Millis(500);
/// How long the destination's agent may have said nothing for the VM to be stopped: it says four times as often that it waits, and nobody else
/// lets the VM run there.
const SILENCE_LIMIT: Millis = Millis(2_000);
/// How often to look during the blackout; events usually wake earlier.
const BLACKOUT: Millis = Millis(5);

impl Source {
    /// A source that begins, or begins again after a restart, to look at `now`.
    #[must_use]
    pub fn new(policy: MigrationPolicy, expires: UnixMillis, now: Millis) -> Self {
        Self {
            policy,
            expires,
            began: now,
            held: false,
            asked: false,
            stopped: None,
            within: None,
            pass: None,
            stuck: false,
            missed: None,
            throttles: false,
            leaves: false,
            giving_up: None,
        }
    }

    /// Of a QEMU that cannot switch over by itself while the VM runs, so that the end of a pass may be waited for.
    #[must_use]
    pub const fn held(mut self, held: bool) -> Self {
        self.held = held;
        self
    }

    /// Of a move in which pages may have been left for after the switch, by this process or one before it.
    #[must_use]
    pub const fn leaving(mut self, leaves: bool) -> Self {
        self.leaves = leaves;
        self
    }

    /// The limits that it keeps.
    #[must_use]
    pub const fn policy(&self) -> &MigrationPolicy {
        &self.policy
    }

    /// It keeps these from here on.
    pub const fn set_policy(&mut self, policy: MigrationPolicy) {
        self.policy = policy;
    }

    /// Pages may be left for after the switch from here on.
    pub const fn on_leaving(&mut self) {
        self.leaves = true;
    }

    /// QEMU was told to slow the VM down.
    pub const fn on_throttled(&mut self) {
        self.throttles = true;
    }

    /// The rung on which it stands, if passes bring the blackout no nearer to the budget.
    #[must_use]
    pub fn rung(&self, now: Millis) -> Option<Rung> {
        let since = now.get().saturating_sub(self.missed?.get());
        Some(self.policy.on_miss.at(since, self.policy.patience.get()))
    }

    /// When our stop was proven, if it was.
    #[must_use]
    pub const fn stopped(&self) -> Option<Millis> {
        self.stopped
    }

    /// Why the move is being given up, if it is.
    #[must_use]
    pub const fn giving_up(&self) -> Option<&Refusal> {
        self.giving_up.as_ref()
    }

    /// Our stop is proven to have come before QEMU's own switch-over.
    pub fn on_stopped(&mut self, now: Millis) {
        self.stopped.get_or_insert(now);
    }

    /// QEMU refused to begin: the move is given up.
    pub fn on_refused(&mut self, reason: Refusal) {
        self.giving_up.get_or_insert(reason);
    }

    /// Decides the next action from the journal's record and what is seen.
    #[must_use]
    pub fn decide(&mut self, record: SourceRecord, view: &SourceView) -> SourceAction {
        match record {
            SourceRecord::Offered => self.decide_offered(view),
            SourceRecord::Released => self.decide_released(view),
            SourceRecord::Returned => self.decide_returned(view),
            SourceRecord::Confirmed => SourceAction::End(Outcome::Moved),
        }
    }

    fn decide_offered(&mut self, view: &SourceView) -> SourceAction {
        if !view.disks.copied {
            // Their copying takes what it takes: only that it does not get on ends it.
            self.began = view.now;
        }
        if let (None, Some(reason)) = (&self.giving_up, &view.declined) {
            self.giving_up = Some(reason.clone());
        }
        let Some(qemu) = &view.qemu else {
            // Proven dead it can never run again. If it had been stopped by us, nothing ran since, and the destination may hold everything;
            // otherwise what the destination holds may be older than the disks, and what was left is lost.
            let whole = self.stopped.is_some() && view.declined.is_none() && !self.leaves && view.disks.whole;
            return SourceAction::Record(if whole { SourceRecord::Released } else { SourceRecord::Returned });
        };
        match self.of_this_move(qemu) {
            // The run state follows a moment later.
            QemuMigration::Completed if qemu.vcpus == Vcpus::FinishMigrate => SourceAction::Wait(BLACKOUT),
            QemuMigration::Completed if view.declined.is_none() => SourceAction::Record(SourceRecord::Released),
            QemuMigration::Completed | QemuMigration::Failed | QemuMigration::Cancelled => {
                if self.giving_up.is_none() {
                    self.giving_up = self.reason_to_give_up(view);
                }
                SourceAction::Record(SourceRecord::Returned)
            }
            QemuMigration::None => self.decide_begin(qemu, view),
            QemuMigration::Cancelling => SourceAction::Wait(BLACKOUT),
            QemuMigration::Active
            | QemuMigration::PreSwitchover
            | QemuMigration::Device
            | QemuMigration::PostCopy
            | QemuMigration::PostCopyPaused
            | QemuMigration::Unknown => {
                self.asked = true;
                self.decide_under_way(qemu, view)
            }
        }
    }

    /// QEMU keeps the status of its last migration for ever: an end that this side has not begun is an earlier move's, and a completed
    /// migration is this one's only while the VM stands still.
    fn of_this_move(&self, qemu: &QemuView) -> QemuMigration {
        match qemu.migration {
            QemuMigration::Completed if qemu.vcpus == Vcpus::Running => QemuMigration::None,
            QemuMigration::Failed | QemuMigration::Cancelled if !self.asked => QemuMigration::None,
            migration => migration,
        }
    }

    fn decide_begin(&mut self, qemu: &QemuView, view: &SourceView) -> SourceAction {
        if self.giving_up.is_none() {
            self.giving_up = self.reason_to_give_up(view);
        }
        // Standing still before anything began: an agent before this one died in the middle.
        if self.giving_up.is_some() || qemu.vcpus != Vcpus::Running {
            return SourceAction::Record(SourceRecord::Returned);
        }
        match (view.carry.connected && view.disks.copied, self.asked) {
            (true, false) => {
                self.asked = true;
                SourceAction::Migrate
            }
            _ => SourceAction::Wait(IDLE),
        }
    }

    fn decide_under_way(&mut self, qemu: &QemuView, view: &SourceView) -> SourceAction {
        if self.stopped.is_none() {
            match (qemu.vcpus, qemu.migration) {
                // The device state flows only after our `migrate-continue`: whoever stopped the VM, the time runs.
                (Vcpus::Paused, _) | (_, QemuMigration::Device) => self.stopped = Some(view.now),
                (Vcpus::FinishMigrate, QemuMigration::PreSwitchover) => {
                    self.give_up(qemu_first);
                }
                _ => {}
            }
        }
        if self.giving_up.is_none() {
            self.giving_up = self.reason_to_give_up(view);
        }
        if self.giving_up.is_some() {
            return SourceAction::CancelQemu;
        }
        match (self.stopped, qemu.migration) {
            (Some(_), _) if !view.disks.whole => SourceAction::FinishDisks,
            (Some(_), QemuMigration::PreSwitchover) => SourceAction::ContinueSwitchOver,
            (Some(_), _) => SourceAction::Wait(BLACKOUT),
            (None, _) => self.decide_stop(qemu, view),
        }
    }

    fn decide_stop(&mut self, qemu: &QemuView, view: &SourceView) -> SourceAction {
        let Some(warm_up) = warm_up_of(qemu, view) else { return SourceAction::Wait(NEAR) };
        // Memory arrives although the destination's QEMU or agent stands still, or the link is out for a moment: the VM would not run there.
        let answers = view.carry.unanswered.get() <= ANSWER_LIMIT.get().saturating_add(view.carry.round_trip.get());
        if !answers || view.silent > SILENCE_LIMIT {
            return SourceAction::Wait(NEAR);
        }
        let blackout = predict_blackout(&warm_up);
        if blackout <= self.policy.max_blackout {
            self.missed = None;
            if self.held && shrinks_soon(&warm_up) {
                let within = *self.within.get_or_insert(view.now);
                if view.now.get().saturating_sub(within.get()) < SHORTENED.get() {
                    return SourceAction::Wait(NEAR);
                }
            }
            return SourceAction::Stop;
        }
        if let Some(action) = self.decide_miss(qemu, &warm_up, view) {
            return action;
        }
        let near = blackout.get() < self.policy.max_blackout.get().saturating_mul(4);
        SourceAction::Wait(if near || qemu.remaining.get() < 64 << 20 { NEAR } else { IDLE })
    }

    /// A guest that writes to all of its working set in each pass seems to write no faster than the link takes it, and leaves as much each time.
    fn follow_passes(&mut self, qemu: &QemuView) {
        match self.pass {
            Some((round, _)) if round == qemu.rounds => {}
            Some((round, before)) if round > FIRST_PASS => {
                self.stuck = qemu.remaining.get() / 4 > before.get() / 5;
                self.pass = Some((qemu.rounds, qemu.remaining));
            }
            _ => self.pass = Some((qemu.rounds, qemu.remaining)),
        }
    }

    /// What else is done about a budget that cannot be kept.
    fn decide_miss(&mut self, qemu: &QemuView, warm_up: &WarmUp, view: &SourceView) -> Option<SourceAction> {
        let is_through = qemu.rounds > FIRST_PASS;
        if view.carry.leaving {
            return None;
        }
        let wanted = self.leaves || (self.policy.postcopy == PostCopy::Now && is_through);
        if wanted && view.carry.can_leave {
            return Some(SourceAction::Leave);
        }
        self.follow_passes(qemu);
        if !is_through || (converges(warm_up, self.policy.max_blackout) && !self.stuck) {
            self.missed = None;
            return None;
        }
        let missed = *self.missed.get_or_insert(view.now);
        if view.now.get().saturating_sub(missed.get()) < MISS_LASTS.get() {
            return None;
        }
        match self.rung(view.now)? {
            Rung::Postcopy if view.carry.can_leave => Some(SourceAction::Leave),
            Rung::Throttle if !self.throttles => Some(SourceAction::Throttle),
            Rung::GiveUp => {
                self.giving_up = Some(self.not_converging(view));
                Some(SourceAction::CancelQemu)
            }
            Rung::WaitForQuiet | Rung::Throttle | Rung::Postcopy | Rung::Ask => None,
        }
    }

    fn reason_to_give_up(&self, view: &SourceView) -> Option<Refusal> {
        let refusal = |code, message: String, hint: &str| Some(Refusal::new(code, message).hint(hint).retry(Retry::Safe));
        if let Some(failed) = &view.disks.failed {
            return Some(failed.clone());
        }
        if let Some(stopped) = self.stopped {
            let since = Millis(view.now.get().saturating_sub(stopped.get()));
            return if !view.carry.usable {
                refusal(ErrorCode::MigrationFailed, "the connection broke during stop-and-copy".into(), RUNS_ON)
            } else if since > self.policy.stop_limit {
                let limit = self.policy.stop_limit;
                refusal(ErrorCode::MigrationStalled, format!("the switch took longer than {limit}; the VM was continued"), RUNS_ON)
            } else {
                None
            };
        }
        let warming = Millis(view.now.get().saturating_sub(self.began.get()));
        if view.cancel {
            refusal(ErrorCode::Cancelled, "cancelled by request; the VM runs where it was".into(), "start it again when it suits")
        } else if !view.carry.usable {
            refusal(ErrorCode::MigrationFailed, "the connection to the destination broke during warm-up".into(), RUNS_ON)
        } else if view.carry.stalled.max(view.carry.unanswered).max(view.disks.stalled) > self.policy.stall {
            let stall = self.policy.stall;
            refusal(ErrorCode::MigrationStalled, format!("the destination has taken nothing for {stall}"), RUNS_ON)
        } else if view.silent > self.policy.stall {
            let stall = self.policy.stall;
            refusal(ErrorCode::MigrationStalled, format!("the destination's agent has said nothing for {stall}"), RUNS_ON)
        } else if warming > self.policy.timeout {
            Some(self.not_converging(view))
        } else if view.unix_now >= self.expires {
            refusal(ErrorCode::GrantExpired, "the grant expired before the VM was stopped".into(), "start the migration again")
        } else {
            None
        }
    }

    fn not_converging(&self, view: &SourceView) -> Refusal {
        let dirty = view.qemu.as_ref().and_then(|qemu| qemu.dirty_rate);
        let dirty = dirty.map_or_else(|| "at an unknown rate".into(), |rate| format!("at {rate}"));
        let (rate, budget) = (view.carry.rate, self.policy.max_blackout);
        let time = Millis(view.now.get().saturating_sub(self.began.get()));
        // It was wanted, and this is why it was not done.
        let unable = self.policy.prepares_postcopy() && !view.carry.can_leave;
        let unable = if unable { "; the destination's QEMU cannot do post-copy" } else { "" };
        Refusal::new(
            ErrorCode::NotConverging,
            format!("after {time} the VM still dirties memory {dirty} while {rate} are moved: a blackout of {budget} cannot be kept{unable}"),
        )
        .hint(
            "try at a quieter time, allow a longer `--max-blackout` or `--on-miss throttle` or `postcopy`, or give the migration more bandwidth",
        )
        .retry(Retry::Safe)
    }

    fn give_up(&mut self, reason: fn() -> Refusal) {
        self.giving_up.get_or_insert_with(reason);
    }

    /// The VM is this side's: run it on, then say so.
    fn decide_returned(&mut self, view: &SourceView) -> SourceAction {
        match view.qemu.as_ref().map(|qemu| qemu.vcpus) {
            Some(Vcpus::Running | Vcpus::Other) | None => self.end_stayed(view),
            Some(Vcpus::Paused | Vcpus::PostMigrate) => SourceAction::ContinueVm,
            Some(Vcpus::FinishMigrate | Vcpus::InMigrate) => SourceAction::Wait(BLACKOUT),
        }
    }

    /// It cannot be run here any more: the destination is told until it answers, and keeps its memory here until it has all of it.
    fn decide_released(&self, view: &SourceView) -> SourceAction {
        match (&view.declined, view.running) {
            (_, true) if view.whole || !self.leaves => SourceAction::Record(SourceRecord::Confirmed),
            (_, true) if view.memory_gone => SourceAction::Tell(PeerMessage::Lost, Millis(500)),
            (_, true) if view.next_port.is_some_and(|port| port != view.port) => {
                SourceAction::GoOn(view.next_port.unwrap_or(view.port))
            }
            (_, true) if !view.carry.usable => SourceAction::Tell(PeerMessage::Cut { port: view.port }, Millis(500)),
            (Some(_), false) => SourceAction::Record(SourceRecord::Returned),
            // Also while memory still goes: a destination that has ended the move without us answers how.
            (_, true) | (None, false) => SourceAction::Tell(PeerMessage::Released, Millis(500)),
        }
    }

    fn end_stayed(&mut self, view: &SourceView) -> SourceAction {
        if view.qemu.is_none() {
            // Whatever else went wrong: every other reason says that the VM runs on.
            return SourceAction::End(Outcome::Stayed(qemu_ended()));
        }
        let reason = self.giving_up.clone().or_else(|| view.declined.clone()).unwrap_or_else(|| {
            Refusal::new(ErrorCode::MigrationFailed, "QEMU gave the migration up; the VM runs where it was")
                .hint(RUNS_ON)
                .retry(Retry::Safe)
        });
        SourceAction::End(Outcome::Stayed(reason))
    }
}

/// What the blackout is predicted from: what the guest wrote to its disks has to arrive, too.
#[must_use]
pub fn warm_up_of(qemu: &QemuView, view: &SourceView) -> Option<WarmUp> {
    let warm_up = WarmUp::of(qemu, &view.carry)?;
    Some(WarmUp { queued: Millis(warm_up.queued.get().saturating_add(view.disks.queued.get())), ..warm_up })
}

const RUNS_ON: &str = "the VM runs on its old host; look at both hosts' logs and try again";

fn qemu_ended() -> Refusal {
    Refusal::new(ErrorCode::QemuFailed, "the VM's QEMU ended on the source during the move: the VM runs nowhere")
        .hint("start the VM again; its log on the source may say why QEMU ended")
}

fn qemu_first() -> Refusal {
    Refusal::new(ErrorCode::QemuFirst, "QEMU reached its own switch-over before our stop; cancelled")
        .hint("it is tried again by itself")
        .retry(Retry::Safe)
}

#[cfg(test)]
mod tests;
