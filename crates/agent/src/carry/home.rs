//! A VM comes home: its memory as it was when it left is put where its QEMU waits, so that only what has changed since has to travel.

use godwit_carrier::pages::{GuestMemory, PAGE_SIZE};
use godwit_vault::{StayError, StayKey, StayReader};

use super::memory::ProcessMemory;

/// Puts the pages of a stay into the blocks of the same names and lengths, and answers how many there were. What cannot be read is not put
/// there: every page is compared by its digest afterwards, wherever it came from.
pub(super) async fn bring_back(file: std::fs::File, key: [u8; 32], memory: &mut ProcessMemory) -> Result<u64, StayError> {
    let mut stay = StayReader::open(file, &StayKey::new(key))?;
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
    Ok(count)
}
