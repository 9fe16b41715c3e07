//! The host goes down: its guests are powered off first, in the reverse of the order in which they start, each with its own time.
//!
//! The controller is not asked and not told: the host is gone for it, and what comes back says of each VM that it ended with its host. A VM that is
//! on its way to another host is given the time to get there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_model::{ErrorCode, VmId};

use crate::host::SharedHost;
use crate::vm::{Registry, VmCommand};

/// Time for a guest that has no deadline of its own.
const DEADLINE: Duration = Duration::from_secs(300);
const LOOK: Duration = Duration::from_millis(200);

/// Powers off all guests. Returns when none runs here.
pub(crate) async fn power_off(host: &SharedHost, vms: &Arc<Registry>) {
    // Those that do not start by themselves are nobody's foundation: they go first.
    let mut groups: BTreeMap<std::cmp::Reverse<u32>, Vec<(VmId, Duration)>> = BTreeMap::new();
    let records = host.journal.vms().unwrap_or_else(|error| {
        tracing::error!(
            error = &error as &dyn std::error::Error,
            "the journal cannot be read: guests are powered off without their order"
        );
        BTreeMap::new()
    });
    for vm in vms.vms() {
        let wanted = records.get(&vm).map(|record| record.spec.power_off).unwrap_or_default();
        let order = wanted.order.map_or(u32::MAX, u32::from);
        let deadline = wanted.deadline.map_or(DEADLINE, |deadline| Duration::from_secs(deadline.get()));
        groups.entry(std::cmp::Reverse(order)).or_default().push((vm, deadline));
    }
    for group in groups.into_values() {
        tracing::info!(vms = group.len(), "powers off guests");
        futures::future::join_all(group.into_iter().map(|(vm, deadline)| end(vms, vm, deadline))).await;
    }
}

/// Asks one guest, waits, and ends it when its time is over.
async fn end(vms: &Arc<Registry>, vm: VmId, deadline: Duration) {
    let begun = Instant::now();
    let mut asked = false;
    loop {
        match vms.command(vm, VmCommand::HasEnded).await {
            Err(refusal) if refusal.code == ErrorCode::VmRunning => {}
            // It has ended, or has left.
            _ => return,
        }
        if begun.elapsed() >= deadline {
            break;
        }
        if !asked {
            match vms.command(vm, VmCommand::PowerOff).await {
                Ok(_) => asked = true,
                Err(refusal) => tracing::debug!(%vm, message = refusal.message, "cannot be asked to power off yet"),
            }
        }
        tokio::time::sleep(LOOK).await;
    }
    tracing::warn!(%vm, ?deadline, "did not power off in its time: ended");
    if let Err(refusal) = vms.command(vm, VmCommand::CutOff).await {
        tracing::error!(%vm, message = refusal.message, "could not be ended");
    }
}
