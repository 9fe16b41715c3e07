//! A VM finds its memory where it comes to: as it was when it left, or as a snapshot has it. That is put where its QEMU waits, so that only what has changed
//! since has to travel.

use std::convert::Infallible;
use std::fs::File;
use std::time::Duration;

use godwit_carrier::pages::{GuestMemory, PAGE_SIZE, Place};
use godwit_model::Generation;
use godwit_vault::{StayError, StayKey, StayReader};
use tokio::net::UnixStream;

use super::behind::WriteBehind;
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

/// What there is, on its way into memory: part by part, in the order of the memory's pages, so that what lies before can be relied upon meanwhile.
#[derive(Default)]
pub(super) struct Bringing {
    stay: Option<Stay>,
    through: Place,
}

/// A stay that is being read.
struct Stay {
    reader: StayReader<File>,
    /// For each of its blocks the number of that of the same name and length here.
    blocks: Vec<Option<u16>>,
    /// They have the same order here, and so have their pages.
    in_order: bool,
    pages: u64,
}

impl Bringing {
    /// Begins with what is newer, or else with the other. A snapshot is here when this returns, a stay is to be [brought](Bringing::next). What cannot be
    /// read is done without.
    pub(super) async fn begin(earlier: Earlier, memory: &mut WriteBehind) -> Self {
        let Earlier { stay, lent } = earlier;
        let open = |(file, key)| StayReader::open(file, &StayKey::new(key)).inspect_err(no_use).ok();
        let stay = stay.and_then(open);
        // The VM left at the end of its generation here: a snapshot of the same is older.
        let is_newer = |lent: &Lent| stay.as_ref().is_none_or(|stay| stay.identity().generation < lent.generation);
        if let Some(Lent { from, within, .. }) = lent.filter(is_newer)
            && bring_lent(from, within, memory).await > 0
        {
            return Self::default();
        }
        Self { stay: stay.and_then(|reader| Stay::new(reader, memory.memory())), through: Place::default() }
    }

    /// Nothing before this place will be written to any more; `None` if nothing will be at all.
    pub(super) fn through(&self) -> Option<Place> {
        self.stay.as_ref().map(|_| self.through)
    }

    /// Brings a part of what is missing.
    pub(super) fn next(&mut self, memory: &mut WriteBehind) {
        let Some(stay) = &mut self.stay else { return };
        match stay.next(self.through, memory) {
            Ok(Some(through)) => self.through = through,
            Ok(None) => {
                tracing::info!(pages = stay.pages, bytes = stay.pages * PAGE_SIZE as u64, "memory of an earlier stay is back");
                self.stay = None;
            }
            Err(error) => {
                no_use(&error);
                self.stay = None;
            }
        }
    }

    /// Brings one part after the other, for as long as it is let.
    pub(super) async fn go_on(&mut self, memory: &mut WriteBehind) -> Infallible {
        while self.stay.is_some() {
            self.next(memory);
            tokio::task::yield_now().await;
        }
        std::future::pending().await
    }
}

impl Stay {
    /// None if it has none of today's blocks.
    fn new(reader: StayReader<File>, memory: &ProcessMemory) -> Option<Self> {
        let here = |block: &godwit_vault::Block| {
            let same = memory.blocks().iter().position(|here| here.id == block.id && here.pages == block.pages);
            same.and_then(|number| u16::try_from(number).ok())
        };
        let blocks: Vec<Option<u16>> = reader.identity().blocks.iter().map(here).collect();
        let in_order = blocks.iter().flatten().is_sorted();
        blocks.iter().any(Option::is_some).then_some(Self { reader, blocks, in_order, pages: 0 })
    }

    /// Writes the next chunk; through where there is all that comes back, or `None` at the end. Every page is compared by its digest afterwards, wherever it
    /// came from.
    fn next(&mut self, mut through: Place, memory: &mut WriteBehind) -> Result<Option<Place>, StayError> {
        let Self { reader, blocks, in_order, pages } = self;
        let Some(chunk) = reader.next_chunk()? else { return Ok(None) };
        let Some(Some(block)) = blocks.get(usize::from(chunk.block())).copied() else { return Ok(Some(through)) };
        for (page, run) in chunk.runs() {
            memory.write(block, page, run.as_flattened())?;
            *pages += run.len() as u64;
            if !*in_order {
                continue;
            }
            through = Place { block, page: page.saturating_add(u32::try_from(run.len()).unwrap_or(u32::MAX)) };
        }
        Ok(Some(through))
    }
}

fn no_use(error: &StayError) {
    tracing::info!(error = error as &dyn std::error::Error, "what was kept of the memory is of no use");
}
