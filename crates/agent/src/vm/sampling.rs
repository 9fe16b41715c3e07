//! Measures now and then how much a VM writes, so that it is known when it writes least.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use godwit_link::v1::{self, agent_message::Body};
use godwit_model::VmId;
use godwit_qemu::qmp::views::MigrationStatus;
use godwit_qemu::{Notice, Qmp};
use tokio::time::Instant;

use super::forecast::{SAMPLE_LIMIT, rate_of};
use crate::host::SharedHost;

/// Measures as long as the session with its QEMU lasts, but while `moves`: a move measures for itself, and must find what it has measured.
pub(super) fn watch(host: &SharedHost, vm: VmId, qmp: &Qmp, moves: &Arc<AtomicBool>) {
    let Some(period) = host.options.sample_writes else { return };
    tokio::spawn(attend(Arc::clone(host), vm, qmp.clone(), period, Arc::clone(moves)));
}

async fn attend(host: SharedHost, vm: VmId, qmp: Qmp, period: Duration, moves: Arc<AtomicBool>) {
    let mut notices = qmp.listen();
    // Those of a host that has just come up are not measured all at once.
    let share = u32::from(vm.uuid().as_bytes()[15]);
    let mut next = Instant::now() + period * share / 256;
    loop {
        tokio::select! {
            notice = notices.next() => if let Notice::Ended(_) = notice { return },
            () = tokio::time::sleep_until(next) => {
                next = Instant::now() + period;
                if let Some(bytes_per_second) = sample(&qmp, &moves).await {
                    host.controller.send(Body::Writes(v1::WritesReport { vm: vm.to_string(), bytes_per_second }));
                }
            }
        }
    }
}

/// Nothing while the VM stands still or is on its way: that is no habit of its own.
async fn sample(qmp: &Qmp, moves: &AtomicBool) -> Option<u64> {
    let runs = qmp.query_status().await.is_ok_and(|status| status.running);
    let status = qmp.query_migrate().await.ok()?.status();
    let migrates = !matches!(
        status,
        MigrationStatus::Idle | MigrationStatus::Completed | MigrationStatus::Failed | MigrationStatus::Cancelled
    );
    if !runs || migrates || moves.load(Ordering::Acquire) {
        return None;
    }
    qmp.begin_dirty_rate(1).await.ok()?;
    let measured = qmp.wait_for_dirty_rate(SAMPLE_LIMIT).await.ok()??;
    Some(rate_of(measured).get())
}
