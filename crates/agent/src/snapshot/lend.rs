//! Lends the memory of a snapshot to the carry that waits for the VM: what it holds already does not travel.
//!
//! ```text
//! what the worker writes = blocks  runs  end
//! blocks = u16 count, for each u8 length, name, u32 pages
//! run    = u16 block, its place in the list  u32 first page  u16 pages, 1 to 16  4,096 bytes for each
//! end    = u16 ffff
//! ```
//! All numbers are big-endian. Both ends are of one version: it is no format of ours on a wire or a disk. Whoever has read enough closes.

use std::io::{self, Write};

use godwit_stream::PAGE_SIZE;
use godwit_vault::{Contents, ContentsError, SpaceKind};

/// Pages of a run: those of a chunk.
pub(crate) const MOST_PAGES: usize = 16;
/// Blocks of a QEMU's memory, more than it has.
pub(crate) const MOST_BLOCKS: u16 = 1024;
/// In the place of a block's number: nothing follows.
pub(crate) const END: u16 = u16::MAX;

/// Why not all of it was lent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LendError {
    /// The snapshot cannot be read.
    #[error(transparent)]
    Contents(#[from] ContentsError),
    /// It has no memory, or more blocks than a QEMU has.
    #[error("the snapshot has no memory that could be lent")]
    NoRam,
    /// Whoever reads it cannot be written to.
    #[error("the memory of the snapshot cannot be passed on")]
    Write(#[source] io::Error),
}

/// Writes every page of RAM that is not zero, in order, until the end or until nobody reads any more; how many pages there were.
///
/// # Errors
/// [`LendError`]; what was written before is right.
pub(crate) fn lend(contents: &mut Contents, to: impl Write) -> Result<u64, LendError> {
    let mut lent = 0;
    match lend_all(contents, to, &mut lent) {
        // It has enough.
        Err(LendError::Write(error)) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
            Ok(lent)
        }
        lend => lend.map(|()| lent),
    }
}

fn lend_all(contents: &mut Contents, mut to: impl Write, lent: &mut u64) -> Result<(), LendError> {
    // They come first, and have the numbers of QEMU's blocks.
    let blocks: Vec<(String, u32)> = contents
        .spaces()
        .iter()
        .take_while(|space| space.kind == SpaceKind::Ram)
        .map(|space| (space.name.clone(), space.pages))
        .collect();
    let count = u16::try_from(blocks.len()).ok().filter(|count| (1..=MOST_BLOCKS).contains(count)).ok_or(LendError::NoRam)?;
    let mut out = count.to_be_bytes().to_vec();
    for (name, pages) in &blocks {
        out.push(u8::try_from(name.len()).map_err(|_| LendError::NoRam)?);
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(&pages.to_be_bytes());
    }
    to.write_all(&out).map_err(LendError::Write)?;
    for block in 0..count {
        for first in contents.snapshot().leaves(block).collect::<Vec<_>>() {
            let located: Vec<u32> = contents.located(block, first)?.collect();
            let runs = located.chunk_by(|page, next| page + 1 == *next).flat_map(|run| run.chunks(MOST_PAGES));
            for run in runs {
                put(contents, block, run, &mut out)?;
                to.write_all(&out).map_err(LendError::Write)?;
                *lent += run.len() as u64;
            }
        }
    }
    to.write_all(&END.to_be_bytes()).map_err(LendError::Write)
}

/// What `out` is to be: a run of consecutive pages.
fn put(contents: &mut Contents, block: u16, run: &[u32], out: &mut Vec<u8>) -> Result<(), LendError> {
    let (Some(first), Ok(pages)) = (run.first(), u16::try_from(run.len())) else { return Ok(()) };
    out.clear();
    out.extend_from_slice(&block.to_be_bytes());
    out.extend_from_slice(&first.to_be_bytes());
    out.extend_from_slice(&pages.to_be_bytes());
    for page in run {
        // Whatever is located holds something; zeros are as right.
        out.extend_from_slice(contents.page(block, *page)?.unwrap_or(&[0; PAGE_SIZE]));
    }
    Ok(())
}
