//! Memory out of the VM's own snapshot, which a vault worker reads: it is put where the VM's QEMU waits, as what an earlier stay has left is.

use std::io;
use std::time::Duration;

use godwit_carrier::pages::{GuestMemory, PAGE_SIZE};
use tokio::io::{AsyncRead, AsyncReadExt, BufReader};

use super::behind::WriteBehind;
use super::memory::ProcessMemory;
use crate::snapshot::{END, MOST_BLOCKS, MOST_PAGES};

/// Room for what was read from the worker and not yet written.
const ROOM: usize = 256 << 10;

/// Why there is not more.
#[derive(Debug, thiserror::Error)]
pub(super) enum LentError {
    /// The worker has ended before its end, as it does when the snapshot cannot be read.
    #[error("it ended before its end")]
    Io(#[from] io::Error),
    /// What it says makes no sense.
    #[error("it is malformed")]
    Malformed,
    /// It is not waited for any longer.
    #[error("the time for it is over")]
    Late,
}

/// Puts the pages of a snapshot into the blocks of the same names and lengths, for so long at most, and answers how many there were. What did not come is not
/// there, and travels; what came is compared by its digest afterwards.
pub(super) async fn bring_lent(from: impl AsyncRead + Unpin, within: Duration, memory: &mut WriteBehind) -> u64 {
    let mut count = 0;
    let brought = tokio::time::timeout(within, bring_all(from, memory, &mut count)).await;
    match brought.unwrap_or(Err(LentError::Late)) {
        Ok(()) => tracing::info!(pages = count, bytes = count * PAGE_SIZE as u64, "memory of a snapshot is here"),
        Err(error) => {
            tracing::info!(pages = count, error = &error as &dyn std::error::Error, "no more of a snapshot's memory is here");
        }
    }
    count
}

async fn bring_all(from: impl AsyncRead + Unpin, memory: &mut WriteBehind, count: &mut u64) -> Result<(), LentError> {
    let mut from = BufReader::with_capacity(ROOM, from);
    let blocks = read_blocks(&mut from, memory.memory()).await?;
    let mut content = vec![0; MOST_PAGES * PAGE_SIZE];
    loop {
        let block = from.read_u16().await?;
        if block == END {
            return Ok(());
        }
        let (first, pages) = (from.read_u32().await?, usize::from(from.read_u16().await?));
        let content = content.get_mut(..pages * PAGE_SIZE).filter(|content| !content.is_empty()).ok_or(LentError::Malformed)?;
        from.read_exact(content).await?;
        // One that is not here, or of another length now, is of no use.
        if let Some(here) = blocks.get(usize::from(block)).ok_or(LentError::Malformed)? {
            memory.write(*here, first, content)?;
            *count += pages as u64;
        }
        tokio::task::yield_now().await;
    }
}

/// For each block of the snapshot, which it is here.
async fn read_blocks(from: &mut (impl AsyncRead + Unpin), memory: &ProcessMemory) -> Result<Vec<Option<u16>>, LentError> {
    let count = from.read_u16().await?;
    if count > MOST_BLOCKS {
        return Err(LentError::Malformed);
    }
    let mut blocks = Vec::with_capacity(usize::from(count));
    for _ in 0..count {
        let mut name = vec![0; usize::from(from.read_u8().await?)];
        from.read_exact(&mut name).await?;
        let pages = from.read_u32().await?;
        let here = memory.blocks().iter().position(|here| here.id.as_bytes() == name && here.pages == pages);
        blocks.push(here.and_then(|number| u16::try_from(number).ok()));
    }
    Ok(blocks)
}

#[cfg(test)]
mod tests;
