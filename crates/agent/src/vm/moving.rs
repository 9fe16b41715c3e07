//! What both sides of a move share: how QEMU and carry are looked at, and how the peer is told.

use std::mem::{self, Discriminant};
use std::time::{Duration, Instant};

use godwit_link::statement::grant_digest;
use godwit_link::v1;
use godwit_link::v1::agent_message::Body;
use godwit_migration::{CarryView, Peer, PeerMessage, QemuMigration, QemuView, Vcpus};
use godwit_model::{Bytes, BytesPerSec, Grant, Millis, Name, TaskId};
use godwit_qemu::qmp::views::{Migration, MigrationStatus, RunStatus};
use godwit_qemu::qmp::{Qmp, QmpError};

use super::forecast::rate_of;
use crate::carry::{CarryClient, CarryStatus};
use crate::facts::{self, Said};
use crate::host::SharedHost;

/// Milliseconds of a duration.
pub(super) fn millis(duration: Duration) -> Millis {
    Millis(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
}

/// Tells the peer a fact about the move of this grant, over the carrier and through the controller.
pub(super) fn tell(host: &SharedHost, carry: Option<&CarryClient>, grant: &Grant, to: &Name, message: PeerMessage) {
    let peer = Peer { vm: grant.vm, generation: grant.generation, message };
    say(host, carry, grant.task, to, Said { from: host.identity.name.clone(), grant: grant_digest(grant), peer });
}

/// Answers about a move that is in no journal here any more: in the terms of who asks, through the controller.
pub(super) fn answer(host: &SharedHost, task: TaskId, asked: &Said, message: PeerMessage) {
    let peer = Peer { message, ..asked.peer.clone() };
    let said = Said { from: host.identity.name.clone(), grant: asked.grant.clone(), peer };
    say(host, None, task, &asked.from, said);
}

fn say(host: &SharedHost, carry: Option<&CarryClient>, task: TaskId, to: &Name, said: Said) {
    match facts::seal(&host.identity.material(), &said) {
        Ok(text) => {
            let message = text.get().as_bytes().to_vec();
            if let Some(carry) = carry {
                carry.tell_peer(text);
            }
            host.controller.send(Body::Peer(v1::Peer { task: task.to_string(), host: to.to_string(), message }));
        }
        Err(error) => tracing::error!(error = &error as &dyn std::error::Error, "the other agent cannot be told"),
    }
}

/// What the peer was told last. A fact is repeated when it was not answered for long, and not whenever something else happens: each is signed, and
/// the other side looks at each, which it does while the VM has just begun to run.
#[derive(Debug, Default)]
pub(super) struct Told(Option<(Discriminant<PeerMessage>, Instant)>);

impl Told {
    /// Whether this is to be told now; if not, how long to wait until it is told again.
    pub(super) fn is_due(&mut self, message: &PeerMessage, every: Duration) -> Result<(), Duration> {
        let kind = mem::discriminant(message);
        let rest = self.0.filter(|(told, _)| *told == kind).map_or(Duration::ZERO, |(_, at)| every.saturating_sub(at.elapsed()));
        if !rest.is_zero() {
            return Err(rest);
        }
        self.0 = Some((kind, Instant::now()));
        Ok(())
    }
}

/// Follows what QEMU says between two looks.
#[derive(Debug)]
pub(super) struct Watch {
    syncs: u64,
    synced: Instant,
    /// What the guest wrote to per second before the move.
    pub(super) sampled: Option<BytesPerSec>,
    /// What QEMU said last about RAM, for progress.
    pub(super) ram: Ram,
}

/// RAM as QEMU counts it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ram {
    pub(super) total: Bytes,
    pub(super) rounds: u32,
}

impl Watch {
    pub(super) fn new() -> Self {
        Self { syncs: 0, synced: Instant::now(), sampled: None, ram: Ram::default() }
    }

    /// Takes over the dirty rate that QEMU has sampled before the migration, once it is there.
    pub(super) async fn sample(&mut self, qmp: &Qmp) {
        if self.sampled.is_none()
            && let Ok(rate) = qmp.query_dirty_rate().await
            && let (Some(mib), "measured") = (rate.mib_per_sec, rate.status.as_str())
        {
            self.sampled = Some(rate_of(mib));
        }
    }

    /// Looks at a QEMU that answers.
    pub(super) async fn look(&mut self, qmp: &Qmp) -> Result<QemuView, QmpError> {
        let status = qmp.query_status().await?;
        let migration = qmp.query_migrate().await?;
        let dirty_rate = self.follow(&migration);
        Ok(QemuView {
            vcpus: vcpus(&status.status),
            migration: phase(&migration),
            remaining: Bytes(migration.ram.as_ref().map_or(0, |ram| ram.remaining)),
            dirty_rate,
            since_sync: millis(self.synced.elapsed()),
            rounds: self.ram.rounds,
        })
    }

    fn follow(&mut self, migration: &Migration) -> Option<BytesPerSec> {
        let ram = migration.ram.as_ref()?;
        if ram.dirty_sync_count != self.syncs {
            self.syncs = ram.dirty_sync_count;
            self.synced = Instant::now();
        }
        self.ram = Ram { total: Bytes(ram.total), rounds: u32::try_from(ram.dirty_sync_count).unwrap_or(u32::MAX) };
        match ram.dirty_pages_rate.saturating_mul(ram.page_size.max(1)) {
            0 => self.sampled,
            rate => Some(BytesPerSec(rate)),
        }
    }
}

pub(super) fn vcpus(status: &RunStatus) -> Vcpus {
    match status {
        RunStatus::Running => Vcpus::Running,
        RunStatus::Paused | RunStatus::Prelaunch => Vcpus::Paused,
        RunStatus::FinishMigrate => Vcpus::FinishMigrate,
        RunStatus::PostMigrate => Vcpus::PostMigrate,
        RunStatus::InMigrate => Vcpus::InMigrate,
        _ => Vcpus::Other,
    }
}

fn phase(migration: &Migration) -> QemuMigration {
    match migration.status() {
        MigrationStatus::Idle => QemuMigration::None,
        MigrationStatus::Setup | MigrationStatus::Active => QemuMigration::Active,
        MigrationStatus::PreSwitchover => QemuMigration::PreSwitchover,
        MigrationStatus::Device => QemuMigration::Device,
        MigrationStatus::PostcopyActive => QemuMigration::PostCopy,
        MigrationStatus::PostcopyPaused => QemuMigration::PostCopyPaused,
        MigrationStatus::Completed => QemuMigration::Completed,
        MigrationStatus::Failed | MigrationStatus::Failing => QemuMigration::Failed,
        MigrationStatus::Cancelling => QemuMigration::Cancelling,
        MigrationStatus::Cancelled => QemuMigration::Cancelled,
        _ => QemuMigration::Unknown,
    }
}

/// What is seen of a carry, or of its absence.
pub(super) fn carry_view(carry: Option<&CarryClient>) -> (CarryView, CarryStatus) {
    let status = carry.map(CarryClient::status).unwrap_or_default();
    let usable = carry.is_some_and(CarryClient::is_alive) && status.broken.is_none();
    let view = CarryView {
        usable,
        connected: status.connected,
        rate: BytesPerSec(status.rate),
        queued: Millis(
            status.in_flight.saturating_mul(1_000).checked_div(status.link_rate).unwrap_or(0).saturating_add(status.looking_ms),
        ),
        round_trip: Millis(status.round_trip_us.div_ceil(1_000)),
        stalled: Millis(status.stalled_ms),
        unanswered: Millis(status.unanswered_ms),
        can_leave: status.postcopy.possible,
        leaving: status.postcopy.leaving,
    };
    (view, status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fact_is_repeated_when_its_time_has_come_and_another_is_told_at_once() {
        let (mut told, long) = (Told::default(), Duration::from_secs(3_600));
        let running = |since| PeerMessage::Running { since: Millis(since) };
        assert_eq!(told.is_due(&running(1), long), Ok(()));
        assert!(told.is_due(&running(2), long).is_err_and(|rest| rest > Duration::from_secs(3_500)));
        assert_eq!(told.is_due(&running(3), Duration::ZERO), Ok(()));
        assert_eq!(told.is_due(&PeerMessage::Released, long), Ok(()));
        assert!(told.is_due(&PeerMessage::Released, long).is_err());
    }
}
