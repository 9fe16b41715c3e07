//! The source's half after the switch of post-copy: the VM stands still here for good, and its memory is read where QEMU has it.

use std::io;

use bytes::Bytes;
use godwit_carrier::frame::MAX_RUNS;
use godwit_carrier::pages::digest::is_zero;
use godwit_carrier::pages::{Encoding, GuestMemory, PAGE_SIZE, PageSet, Place, Rest, Sealer};
use godwit_carrier::{Frame, Level};
use tokio::sync::mpsc;

use super::holdings::Holdings;
use super::memory::ProcessMemory;
use super::pump::Pump;
use super::seal::{Sealers, Seals};

/// Pages that go into a batch at once; fewer while the destination's QEMU waits for some, which are to overtake them.
const BATCH: usize = 64;
const SMALL_BATCH: usize = 8;

/// Pages that the destination's QEMU waits for: block, pages.
pub(super) type MissedPages = (u16, Vec<u32>);

/// The VM's memory here, found by the blocks' numbers at the destination.
pub(super) struct OwnMemory {
    memory: ProcessMemory,
    numbers: Vec<Option<u16>>,
}

impl OwnMemory {
    /// `names` are those of the blocks, as the destination numbers them.
    pub(super) fn new(memory: ProcessMemory, names: &[Bytes]) -> Self {
        let number = |name: &Bytes| memory.blocks().iter().position(|block| block.id.as_bytes() == name);
        let numbers = names.iter().map(|name| number(name).and_then(|number| u16::try_from(number).ok())).collect();
        Self { memory, numbers }
    }

    /// Whether this block is here.
    pub(super) fn has(&self, block: u16) -> bool {
        self.numbers.get(usize::from(block)).is_some_and(Option::is_some)
    }

    /// What is in a page; `None` if that is zeros.
    pub(super) fn read<'a>(&mut self, place: Place, page: &'a mut [u8; PAGE_SIZE]) -> io::Result<Option<&'a [u8; PAGE_SIZE]>> {
        let number = self.numbers.get(usize::from(place.block)).copied().flatten().ok_or(io::ErrorKind::InvalidInput)?;
        self.memory.read(number, place.page, page)?;
        Ok((!is_zero(page)).then_some(&*page))
    }
}

/// Names pages that come after the switch.
pub(super) fn name_left(seals: &mut Seals<'_>, left: &PageSet) {
    for block in 0..left.blocks() {
        for runs in left.runs(block).chunks(MAX_RUNS) {
            seals.push(Frame::Left { block, runs: runs.to_vec() }, 0);
        }
    }
}

/// The source in a session that goes on after a switch: sends what the destination does not have.
pub(super) async fn again(
    pump: &Pump,
    sealers: Sealers,
    memory: ProcessMemory,
    holdings: Holdings,
    missed: mpsc::UnboundedReceiver<MissedPages>,
) -> io::Result<()> {
    let names: Vec<Bytes> = holdings.blocks.iter().map(|block| block.id.clone()).collect();
    let lengths: Vec<u32> = holdings.blocks.iter().map(|block| block.pages).collect();
    let mut left = PageSet::new(&lengths);
    for (block, runs) in holdings.absent {
        for page in runs.into_iter().flat_map(|(first, pages)| first..first.saturating_add(pages)) {
            left.insert(Place { block, page });
        }
    }
    pump.set_left(left.len());
    let rest = Rest::new(left, Encoding::default());
    After { pump, seals: Seals::new(pump, sealers), own: OwnMemory::new(memory, &names), rest, missed }.run().await
}

/// Sends what is left.
pub(super) struct After<'a> {
    pub(super) pump: &'a Pump,
    pub(super) seals: Seals<'a>,
    pub(super) own: OwnMemory,
    pub(super) rest: Rest,
    pub(super) missed: mpsc::UnboundedReceiver<MissedPages>,
}

impl After<'_> {
    /// Until every page was sent: what is missed at once, the rest from there on.
    pub(super) async fn run(mut self) -> io::Result<()> {
        let mut sealer = Sealer::new();
        let mut at = Place { block: 0, page: 0 };
        tracing::info!(pages = self.rest.left().len(), "sends what was left");
        while !self.rest.left().is_empty() {
            while !self.pump.is_flooded()
                && let Ok(missed) = self.missed.try_recv()
            {
                at = self.answer(&missed, &mut sealer)?.unwrap_or(at);
            }
            if !self.seals.is_full() && self.pump.has_room_after() {
                at = self.go_on(at)?;
                tokio::task::yield_now().await;
                continue;
            }
            tokio::select! {
                Some(missed) = self.missed.recv(), if !self.pump.is_flooded() => at = self.answer(&missed, &mut sealer)?.unwrap_or(at),
                _ = self.seals.settle() => {}
                () = self.pump.wait_for_room_after(), if !self.seals.is_full() => {}
            }
        }
        while !self.seals.is_empty() {
            self.seals.settle().await;
        }
        self.seals.push(Frame::ForwardEnd, 0);
        tracing::info!("all memory was sent");
        Ok(())
    }

    /// Sends pages that are missed, ahead of what is being compressed; where to go on.
    fn answer(&mut self, (block, pages): &MissedPages, sealer: &mut Sealer) -> io::Result<Option<Place>> {
        self.pump.on_missed();
        for page in pages {
            let place = Place { block: *block, page: *page };
            let mut content = [0; PAGE_SIZE];
            // One that was sent is on its way.
            if self.rest.left().contains(place)
                && let Some(batch) = self.rest.alone(place, self.own.read(place, &mut content)?)
            {
                self.pump.on_read(batch.raw);
                self.pump.push(&Frame::Pages(sealer.seal(&batch, Level::default())), batch.raw);
            }
        }
        self.tell();
        Ok(pages.last().map(|page| Place { block: *block, page: page.saturating_add(1) }))
    }

    /// Sends some pages from `at` on; where to go on.
    fn go_on(&mut self, mut at: Place) -> io::Result<Place> {
        let most = if self.pump.is_missing() { SMALL_BATCH } else { BATCH };
        for _ in 0..most {
            let Some(next) = self.rest.left().next(at).filter(|_| !self.rest.is_full()) else { break };
            let mut content = [0; PAGE_SIZE];
            self.rest.encode(next, self.own.read(next, &mut content)?);
            at = Place { page: next.page.saturating_add(1), ..next };
        }
        if let Some(batch) = self.rest.take() {
            self.pump.on_read(batch.raw);
            self.seals.seal(batch);
        }
        self.tell();
        Ok(at)
    }

    fn tell(&self) {
        self.pump.set_left(self.rest.left().len());
        self.pump.on_cost(None, self.rest.encoding());
    }
}
