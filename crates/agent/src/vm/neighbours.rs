//! VMs that run here lend their memory, for reading, to the carry that waits for another VM of their team: what they have in common need not travel.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::future;
use godwit_model::{RunState, VmId};
use godwit_qemu::PassedFds;
use tokio::sync::oneshot;

use super::actor::{Actor, Moving, VmEvent};
use super::placement::{self, Access};
use super::registry::Registry;
use crate::carry::{PlacedBlock, Placement};

/// Most VMs that lend theirs to one that comes.
const MOST: usize = 2;
const MOST_ASKED: usize = 8;
/// How long they are waited for: an actor may have better things to do.
const LIMIT: Duration = Duration::from_secs(1);

/// The memory of a VM that runs here, for reading.
#[derive(Debug)]
pub(crate) struct Neighbour {
    memory: File,
    map: File,
    blocks: Vec<PlacedBlock>,
}

impl Neighbour {
    fn lend(&self, fds: &mut PassedFds) -> io::Result<Placement> {
        let (memory, map) = (self.memory.try_clone()?, self.map.try_clone()?);
        Ok(Placement { memory_fd: fds.pass(memory), map_fd: fds.pass(map), blocks: self.blocks.clone() })
    }
}

/// The memory of all of them, for a carry.
pub(super) fn lend(neighbours: &[Neighbour], fds: &mut PassedFds) -> Vec<Placement> {
    neighbours.iter().filter_map(|neighbour| neighbour.lend(fds).ok()).collect()
}

impl Registry {
    /// The memory of these VMs, as far as they run here and nothing is under way with them, for `vm`, which is to come.
    pub(crate) async fn neighbours(&self, vm: VmId, named: &[VmId]) -> Arc<[Neighbour]> {
        let asked = named.iter().filter(|neighbour| **neighbour != vm).take(MOST_ASKED).map(|neighbour| async {
            let (reply, answer) = oneshot::channel();
            self.known(*neighbour)?.send(VmEvent::Neighbour { reply }).await.ok()?;
            answer.await.ok()?
        });
        let asked = asked.map(|asked| async { tokio::time::timeout(LIMIT, asked).await.ok().flatten() });
        future::join_all(asked).await.into_iter().flatten().take(MOST).collect()
    }
}

impl Actor {
    /// The VM's memory for a neighbour that comes, if it is all here, stays, and QEMU answers soon.
    pub(super) async fn neighbour(&self) -> Option<Neighbour> {
        tokio::time::timeout(LIMIT, self.lent()).await.ok().flatten()
    }

    async fn lent(&self) -> Option<Neighbour> {
        let qmp = self.qmp.as_ref()?;
        let is_settled = match self.moving {
            None => true,
            // All that may be missing is the other side's last word.
            Some(Moving::Destination(_)) => self.record.as_ref().is_some_and(|record| record.holding.has_arrived()),
            Some(Moving::Source(_)) => false,
        };
        if self.state != RunState::Running || !is_settled || self.snapshot.is_some() {
            return None;
        }
        // Whoever looks at a page that is still to come waits for it.
        if qmp.migration().await.ok()?.needs_pages() {
            return None;
        }
        let blocks = self.memory_blocks(qmp).await?;
        let (memory, map) = placement::open(self.process.as_ref()?.identity(), Access::Read).ok()?;
        Some(Neighbour { memory, map, blocks })
    }
}
