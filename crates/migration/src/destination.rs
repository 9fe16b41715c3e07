//! The destination of a move: runs the VM only on the source's release. Every record and restart is in `docs/spec/handover.md`.
//!
//! ```text
//!               released and loaded                 vCPUs run
//!   Prepared ─────────────────────────▶ Activated ─────────────▶ Running ──▶ announced, told, ended: moved
//!      │                                   │ `cont` refused by QEMU, or QEMU dead before it was told
//!      │ aborted, failed, expired          ▼
//!      └────────────────────────────▶ Declined ──▶ cleared, told until settled, ended: stayed
//! ```
//! `Declined` is final: it is recorded before it is said, and nothing leads from it to `cont`. Declining is always safe before `Activated`.

use godwit_model::{ErrorCode, Millis, Refusal, Retry, UnixMillis};
use serde::{Deserialize, Serialize};

use crate::message::PeerMessage;
use crate::view::{Outcome, QemuMigration, QemuView, Vcpus};

/// What the destination's journal says. Durable before it is acted on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "record")]
pub enum DestinationRecord {
    /// A conditional grant is held; QEMU loads, stopped.
    Prepared,
    /// The source's release is held: this host owns the VM and may run it.
    Activated,
    /// It was seen running here.
    Running,
    /// Never run here on this generation, and never to be.
    Declined {
        /// Why.
        reason: Refusal,
    },
}

impl DestinationRecord {
    /// Whether the VM is this host's and cannot go back any more. What was activated may still be declined, so that nobody outside the move hears
    /// of an owner before.
    #[must_use]
    pub const fn is_for_good(&self) -> bool {
        matches!(self, Self::Running)
    }
}

/// All that the destination sees at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DestinationView {
    /// Monotonic time.
    pub now: Millis,
    /// Wall clock, for the grant's expiry.
    pub unix_now: UnixMillis,
    /// Its QEMU; `None` when the process is proven dead.
    pub qemu: Option<QemuView>,
    /// The source has said that it released the VM.
    pub released: bool,
    /// The source has said that it keeps the VM, or the controller that the task is over.
    pub aborted: Option<Refusal>,
    /// The source has said that it knows how it ended.
    pub settled: bool,
    /// The controller waits for the source no more: it is away.
    pub source_given_up: bool,
    /// This side's carry.
    pub carry: ArrivingCarry,
    /// The source has said that memory that was left is lost.
    pub lost: bool,
    /// `cont` was refused since this process began to look.
    pub cont_refused: Option<Refusal>,
    /// The VM has been announced on its networks since this process began to look.
    pub announced: bool,
}

/// The carry of a destination, as far as its machine has to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArrivingCarry {
    /// The process lives, its session is not over, and the source has not said that it cannot reach it.
    pub usable: bool,
    /// The source's carry has said who it is.
    pub connected: bool,
    /// It is not the first of this move.
    pub again: bool,
    /// Where it listens.
    pub port: u16,
    /// It has told which section of QEMU's stream is memory: without that no other could go on in its place.
    pub has_section: bool,
}

/// What the destination does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestinationAction {
    /// Nothing; look again when something happens, at the latest after this long.
    Wait(Millis),
    /// QMP `cont`.
    ContinueVm,
    /// End the local QEMU and look until it is proven dead.
    EndQemu,
    /// Announce the VM's addresses on its networks.
    Announce,
    /// Start another carry for a QEMU that runs and waits for pages.
    GoOn,
    /// Give QEMU the connection to that carry.
    Recover,
    /// Make this record durable, then look.
    Record(DestinationRecord),
    /// Tell the source, by every way there is; then wait this long for an answer.
    Tell(PeerMessage, Millis),
    /// The move is over for the destination.
    End(Outcome),
}

/// The volatile half of the destination: all of it can be lost at any moment.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Destination {
    expires: UnixMillis,
    released_seen: Option<Millis>,
    resumed: Option<Millis>,
    /// This process has looked since before `Activated` and has not told QEMU to run the VM: then nobody has.
    never_told: bool,
}

/// How long QEMU may take to load what was released to it.
const LOAD_LIMIT: Millis = Millis(60_000);
const IDLE: Millis = Millis(500);
const BLACKOUT: Millis = Millis(5);
const REPEAT: Millis = Millis(500);

impl Destination {
    /// A destination that begins, or begins again after a restart, to look.
    #[must_use]
    pub fn new(expires: UnixMillis) -> Self {
        Self { expires, released_seen: None, resumed: None, never_told: false }
    }

    /// The vCPUs were told to run at `now`: what `Running` counts from.
    pub fn on_continued(&mut self, now: Millis) {
        self.resumed.get_or_insert(now);
    }

    /// Decides the next action from the journal's record and what is seen.
    #[must_use]
    pub fn decide(&mut self, record: &DestinationRecord, view: &DestinationView) -> DestinationAction {
        match record {
            DestinationRecord::Prepared => {
                self.never_told = true;
                self.decide_prepared(view)
            }
            DestinationRecord::Activated => self.decide_activated(view),
            DestinationRecord::Running => self.decide_running(view),
            DestinationRecord::Declined { reason } => decide_declined(reason, view),
        }
    }

    fn decide_prepared(&mut self, view: &DestinationView) -> DestinationAction {
        let decline = |reason| DestinationAction::Record(DestinationRecord::Declined { reason });
        if let Some(reason) = &view.aborted {
            return decline(reason.clone());
        }
        let Some(qemu) = &view.qemu else { return decline(failed("the destination's QEMU ended before it had loaded the VM")) };
        if qemu.migration.needs_pages() && !view.carry.usable {
            return decline(failed("the destination's carry ended before the VM was taken over"));
        }
        if matches!(qemu.migration, QemuMigration::Failed | QemuMigration::Cancelled) {
            return decline(failed("the destination's QEMU could not load the VM"));
        }
        if !view.released {
            let expired = view.unix_now >= self.expires;
            let reason = Refusal::new(ErrorCode::GrantExpired, "the grant expired before the source released the VM");
            return if expired { decline(reason.retry(Retry::Safe)) } else { DestinationAction::Wait(IDLE) };
        }
        let since = *self.released_seen.get_or_insert(view.now);
        match (qemu.migration, qemu.vcpus) {
            (QemuMigration::PostCopy | QemuMigration::PostCopyPaused, Vcpus::Paused) if view.carry.has_section => {
                DestinationAction::Record(DestinationRecord::Activated)
            }
            (QemuMigration::Completed, Vcpus::Paused) => DestinationAction::Record(DestinationRecord::Activated),
            _ if view.now.get().saturating_sub(since.get()) > LOAD_LIMIT.get() => {
                decline(failed("the destination's QEMU did not finish loading what was released to it"))
            }
            _ => DestinationAction::Wait(BLACKOUT),
        }
    }

    fn decide_activated(&mut self, view: &DestinationView) -> DestinationAction {
        match (&view.qemu, &view.cont_refused) {
            // QEMU itself said no and nothing runs: recorded before QEMU is ended, so that its death is not taken for a crash afterwards.
            (_, Some(reason)) if view.qemu.as_ref().is_none_or(|qemu| !may_run(qemu.vcpus)) => {
                DestinationAction::Record(DestinationRecord::Declined { reason: reason.clone() })
            }
            // The source still holds all of the VM, standing still as it was.
            (None, _) if self.never_told => {
                let reason = failed("the destination's QEMU ended before it was told to run the VM");
                DestinationAction::Record(DestinationRecord::Declined { reason })
            }
            // Neither has anything run, and nothing can before a new connection is there: the source can run it on at once.
            (Some(qemu), _) if self.never_told && qemu.migration.needs_pages() && !view.carry.usable => {
                let reason = failed("the destination's carry ended before the VM was told to run");
                DestinationAction::Record(DestinationRecord::Declined { reason })
            }
            // It may have run: from here on its death is a crash of the VM on this host, not a reason to return it.
            (None, _) => DestinationAction::Record(DestinationRecord::Running),
            (Some(qemu), _) if may_run(qemu.vcpus) => DestinationAction::Record(DestinationRecord::Running),
            (Some(_), _) => {
                self.never_told = false;
                DestinationAction::ContinueVm
            }
        }
    }

    fn decide_running(&mut self, view: &DestinationView) -> DestinationAction {
        if !view.announced && view.qemu.is_some() {
            return DestinationAction::Announce;
        }
        let needs_pages = view.qemu.as_ref().is_some_and(|qemu| qemu.migration.needs_pages());
        if needs_pages && (view.lost || view.settled) {
            // It would wait for its memory for ever: it is lost, or the source knows nothing of it any more.
            return DestinationAction::EndQemu;
        }
        if view.settled {
            return DestinationAction::End(Outcome::Moved);
        }
        let resumed = *self.resumed.get_or_insert(view.now);
        let since = Millis(view.now.get().saturating_sub(resumed.get()));
        let paused = view.qemu.as_ref().is_some_and(|qemu| qemu.migration == QemuMigration::PostCopyPaused);
        // The first carry's connection is given to QEMU with its start: once lost, it is lost.
        if needs_pages && (!view.carry.usable || (paused && !view.carry.again)) {
            return DestinationAction::GoOn;
        }
        if needs_pages && view.carry.again {
            match view.carry.connected {
                false => return DestinationAction::Tell(PeerMessage::GoOn { port: view.carry.port }, REPEAT),
                true if paused => return DestinationAction::Recover,
                true => {}
            }
        }
        // A QEMU that is dead needs nothing more.
        let whole = view.qemu.as_ref().is_none_or(|qemu| qemu.migration == QemuMigration::Completed);
        if whole && view.source_given_up {
            return DestinationAction::End(Outcome::Moved);
        }
        DestinationAction::Tell(if whole { PeerMessage::Whole { since } } else { PeerMessage::Running { since } }, REPEAT)
    }
}

const fn may_run(vcpus: Vcpus) -> bool {
    matches!(vcpus, Vcpus::Running | Vcpus::Other)
}

fn decide_declined(reason: &Refusal, view: &DestinationView) -> DestinationAction {
    if view.qemu.is_some() {
        return DestinationAction::EndQemu;
    }
    if view.settled || view.aborted.is_some() {
        return DestinationAction::End(Outcome::Stayed(reason.clone()));
    }
    DestinationAction::Tell(PeerMessage::Declined { reason: reason.clone() }, REPEAT)
}

fn failed(message: &str) -> Refusal {
    Refusal::new(ErrorCode::MigrationFailed, message).hint("look at the destination's log of this VM").retry(Retry::Safe)
}

#[cfg(test)]
mod tests;
