//! Where a QEMU has the guest's memory, so that carry reads it, or writes pages straight into that of a QEMU that waits.

use std::cmp::Reverse;
use std::fs::File;
use std::io;

use godwit_model::ResolvedSpec;
use godwit_qemu::process::ProcessIdentity;
use godwit_qemu::qmp::Qmp;
use godwit_qemu::{PassedFds, QmpError};

use super::actor::Actor;
use crate::carry::{PlacedBlock, Placement};

const PAGE: u64 = 4096;

/// Why the memory is not found.
#[derive(Debug, thiserror::Error)]
enum NoPlacement {
    #[error("QEMU does not say where its memory is")]
    Qmp(#[from] QmpError),
    #[error("QEMU names no memory at guest address {0:#x}")]
    Nowhere(u64),
}

/// What carry may do with the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

/// Finds the RAM and the DIMMs of `spec` in its QEMU, the largest first: in that order QEMU goes through them when the VM moves.
async fn blocks(qmp: &Qmp, spec: &ResolvedSpec) -> Result<Vec<PlacedBlock>, NoPlacement> {
    let dimms = spec.dimms().iter().map(|dimm| (dimm.address.0, dimm.size.get()));
    let mut blocks = Vec::new();
    for (guest, size) in std::iter::once((0, spec.memory.get())).chain(dimms) {
        let (id, address) = qmp.host_address(guest).await?.ok_or(NoPlacement::Nowhere(guest))?;
        // A DIMM of more than 16 TiB is nobody's.
        let Ok(pages) = u32::try_from(size / PAGE) else { continue };
        blocks.push(PlacedBlock { id, address, pages });
    }
    blocks.sort_by_key(|block| Reverse(block.pages));
    Ok(blocks)
}

/// Memory and page map of a process.
pub(super) fn open(process: &ProcessIdentity, access: Access) -> io::Result<(File, File)> {
    let memory = File::options().read(true).write(access == Access::Write).open(format!("/proc/{}/mem", process.pid))?;
    Ok((memory, File::open(format!("/proc/{}/pagemap", process.pid))?))
}

impl Actor {
    /// Where QEMU has the VM's memory.
    pub(super) async fn memory_blocks(&self, qmp: &Qmp) -> Option<Vec<PlacedBlock>> {
        let found = blocks(qmp, &self.record.as_ref()?.spec).await;
        found.inspect_err(|error| tracing::warn!(error = error as &dyn std::error::Error, "the VM's memory is not found")).ok()
    }

    /// That memory, for carry. Without it pages go through QEMU's socket, which is slower and takes more bytes on the wire.
    pub(super) fn place(&self, blocks: Vec<PlacedBlock>, access: Access, fds: &mut PassedFds) -> Option<Placement> {
        let (memory, map) = open(self.process.as_ref()?.identity(), access)
            .inspect_err(|error| tracing::warn!(%error, "the VM's memory is not reached"))
            .ok()?;
        Some(Placement { memory_fd: fds.pass(memory), map_fd: fds.pass(map), blocks })
    }
}
