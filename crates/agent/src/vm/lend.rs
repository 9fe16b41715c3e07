//! What a vault has of the memory of a VM that is to come, lent to the carry that waits for it.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use godwit_model::{MigrationPolicy, Millis, Refusal};
use godwit_qemu::PassedFds;
use godwit_vault::StayKey;

use super::actor::Actor;
use super::neighbours::Neighbour;
use crate::carry::LentMemory;
use crate::host::host_failed;
use crate::snapshot::{Job, MemoryInVault, Worker};

/// How long the vault may take until its worker is there: the VM is not kept waiting for a pool that does not answer.
const STARTING: Duration = Duration::from_secs(5);
/// How long what a snapshot has is waited for at most. What has not come by then travels.
const LONGEST: Millis = Millis(60_000);

/// By what the memory of a VM that comes may be known here already.
pub(super) struct EarlierMemory {
    /// The key of what this host has kept of it.
    pub(super) memory_key: Option<StayKey>,
    /// Where a vault has it.
    pub(super) snapshot: Option<Box<MemoryInVault>>,
    /// Other VMs of its team, which run here.
    pub(super) neighbours: Arc<[Neighbour]>,
}

/// The source must not take it for a destination that stands still, and most of the time that the warm-up has is the warm-up's.
fn within(policy: &MigrationPolicy) -> Millis {
    Millis(LONGEST.get().min(policy.stall.get() / 4).min(policy.timeout.get() / 4))
}

impl Actor {
    /// Has a worker read the memory of a snapshot for the carry that waits for the VM. What is in the way of that is not in the way of anything else.
    pub(super) async fn lend_snapshot(
        &self,
        memory: MemoryInVault,
        policy: &MigrationPolicy,
        fds: &mut PassedFds,
    ) -> Option<LentMemory> {
        let (id, generation) = (memory.snapshot.id, memory.generation);
        match tokio::time::timeout(STARTING, self.start_lender(memory)).await {
            Ok(Ok(from)) => Some(LentMemory { from_fd: fds.pass(from), generation, within: within(policy) }),
            Ok(Err(refusal)) => {
                tracing::info!(%id, message = refusal.message, "a snapshot of the VM is not read");
                None
            }
            Err(_) => {
                tracing::info!(%id, "a snapshot of the VM is not read: its pool does not answer");
                None
            }
        }
    }

    async fn start_lender(&self, memory: MemoryInVault) -> Result<UnixStream, Refusal> {
        let (host, id) = (&self.host, memory.snapshot.id);
        let vault = host.pools.vault(&memory.pool, &memory.team, host.vault_uid()).await?;
        let (carrys, workers) = UnixStream::pair().map_err(|error| host_failed("no socket pair", &error))?;
        let mut fds = PassedFds::new();
        let job = Job::Lend { snapshot: memory.snapshot, to_fd: fds.pass(workers) };
        // It ends when it is through, or when carry reads no more: also without this agent.
        let mut lines = Worker::start(host, vault, job, fds).await?.let_go();
        tokio::spawn(async move {
            if let Err(refusal) = lines.done().await {
                tracing::info!(%id, message = refusal.message, "a snapshot of the VM cannot be read: what is missing of it travels");
            }
        });
        Ok(carrys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_move_that_must_be_quick_does_not_wait_for_a_vault() {
        let of = |stall, timeout| {
            within(&MigrationPolicy { stall: Millis(stall), timeout: Millis(timeout), ..MigrationPolicy::default() })
        };
        assert_eq!(of(120_000, 3_600_000), Millis(30_000));
        assert_eq!(of(120_000, 1_000), Millis(250));
        assert_eq!(of(u64::MAX, u64::MAX), LONGEST);
    }
}
