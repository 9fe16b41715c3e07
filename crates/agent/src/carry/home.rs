//! A VM finds its memory where it comes to: as it was when it left, or as a snapshot has it. That is put where its QEMU waits, so that only what has changed
//! since has to travel.

use std::fs::File;
use std::time::Duration;

use godwit_carrier::pages::{GuestMemory, PAGE_SIZE};
use godwit_model::Generation;
use godwit_vault::{StayError, StayKey, StayReader};
use tokio::net::UnixStream;

use super::lent::bring_lent;
use super::memory::ProcessMemory;

/// What there is of the VM's memory beside the VM itself.
#[derive(Default)]
pub(super) struct Earlier {
    /// Of an earlier stay on this host, with its key.
    pub(super) stay: Option<(File, [u8; 32])>,
    /// Of a snapshot.
    pub(super) lent: Option<Lent>,
}

/// The memory of a snapshot, as a vault worker writes it.
pub(super) struct Lent {
    pub(super) from: UnixStream,
    /// On which the VM ran when it was taken.
    pub(super) generation: Generation,
    /// How long it is waited for.
    pub(super) within: Duration,
}

/// Brings back what is newer, or else the other. What cannot be read is done without.
pub(super) async fn bring_back(earlier: Earlier, memory: &mut ProcessMemory) {
    let Earlier { stay, lent } = earlier;
    let open = |(file, key)| StayReader::open(file, &StayKey::new(key)).inspect_err(no_use).ok();
    let stay = stay.and_then(open);
    // The VM left at the end of its generation here: a snapshot of the same is older.
    let is_newer = |lent: &Lent| stay.as_ref().is_none_or(|stay| stay.identity().generation < lent.generation);
    if let Some(Lent { from, within, .. }) = lent.filter(is_newer)
        && bring_lent(from, within, memory).await > 0
    {
        return;
    }
    if let Some(stay) = stay
        && let Err(error) = bring_stay(stay, memory).await
    {
        no_use(&error);
    }
}

fn no_use(error: &StayError) {
    tracing::info!(error = error as &dyn std::error::Error, "what was kept of the memory is of no use");
}

/// Puts the pages of a stay into the blocks of the same names and lengths. What cannot be read is not put there: every page is compared by its digest
/// afterwards, wherever it came from.
async fn bring_stay(mut stay: StayReader<File>, memory: &mut ProcessMemory) -> Result<(), StayError> {
    let here = |block: &godwit_vault::Block| {
        let same = memory.blocks().iter().position(|here| here.id == block.id && here.pages == block.pages);
        same.and_then(|number| u16::try_from(number).ok())
    };
    let blocks: Vec<Option<u16>> = stay.identity().blocks.iter().map(here).collect();
    let mut count = 0;
    while let Some(chunk) = stay.next_chunk()? {
        let Some(Some(block)) = blocks.get(usize::from(chunk.block())) else { continue };
        for (first, run) in chunk.runs() {
            memory.write(*block, first, run.as_flattened())?;
            count += run.len() as u64;
        }
        tokio::task::yield_now().await;
    }
    tracing::info!(pages = count, bytes = count * PAGE_SIZE as u64, "memory of an earlier stay is back");
    Ok(())
}
