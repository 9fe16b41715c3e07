//! The destination's half of post-copy: plays the source to a QEMU that runs the VM already, and gives it each page that was left once.

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use godwit_carrier::Frame;
use godwit_carrier::frame::{Block, MAX_MISSED};
use godwit_carrier::pages::{GuestMemory, PAGE_SIZE, Page, PageSet, Place};
use godwit_stream::postcopy::{PagesAfter, put_discards, put_end};
use godwit_stream::{BlockId, ReturnMessage};

use super::pump::Pump;

/// Waits that are kept for the figures.
const MOST_WAITS: usize = 1 << 16;

/// Why the peer's part of post-copy cannot be.
pub(super) type NotItsPart = &'static str;

/// What the destination's QEMU does not have.
pub(super) struct Arrival {
    ids: Vec<BlockId>,
    /// What comes after the switch, and what of it has not come.
    left: PageSet,
    missing: PageSet,
    /// Pages of zeros that were supplied here: nobody ever wrote to them.
    supplied: PageSet,
    section: Option<u32>,
    /// The block that QEMU asked for last.
    asked: Option<u16>,
    waits: Waits,
}

/// How long QEMU waited for pages.
#[derive(Default)]
struct Waits {
    open: BTreeMap<(u16, u32), Instant>,
    took: Vec<Duration>,
}

/// Figures of it, so far: how many there were, the middle, the one of a hundred that is longest, and the longest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct WaitFigures {
    pub(super) count: u64,
    pub(super) median: Duration,
    pub(super) p99: Duration,
    pub(super) longest: Duration,
}

impl Arrival {
    /// Of blocks whose names QEMU takes.
    pub(super) fn new(blocks: &[Block]) -> Option<Self> {
        let ids = blocks.iter().map(|block| BlockId::new(&block.id).ok()).collect::<Option<_>>()?;
        let lengths: Vec<u32> = blocks.iter().map(|block| block.pages).collect();
        let none = PageSet::new(&lengths);
        let (left, missing) = (none.clone(), none.clone());
        Some(Self { ids, left, missing, supplied: none, section: None, asked: None, waits: Waits::default() })
    }

    /// After the first connection was lost: these pages have not come.
    pub(super) fn again(blocks: &[Block], section: u32, absent: PageSet) -> Option<Self> {
        let arrival = Self::new(blocks)?;
        Some(Self { left: absent.clone(), missing: absent, section: Some(section), ..arrival })
    }

    /// Number of the RAM section, once the destination has switched.
    pub(super) const fn section(&self) -> Option<u32> {
        self.section
    }

    pub(super) fn is_switched(&self) -> bool {
        self.section.is_some()
    }

    /// These pages come later: what QEMU is to be told.
    pub(super) fn on_left(&mut self, block: u16, runs: &[(u32, u32)]) -> Result<Bytes, NotItsPart> {
        let id = self.ids.get(usize::from(block)).filter(|_| self.section.is_none()).ok_or("pages that come at no time")?;
        for (first, pages) in runs {
            let end = first.checked_add(*pages).ok_or("pages beyond a block")?;
            // The last page is there, and with it all before it.
            let last = end.checked_sub(1).map(|page| Place { block, page });
            if *pages == 0 || !last.is_some_and(|last| self.left.has_place(last)) {
                return Err("pages beyond a block");
            }
            for page in *first..end {
                if !self.left.insert(Place { block, page }) {
                    return Err("a page that comes twice");
                }
                self.missing.insert(Place { block, page });
            }
        }
        let mut out = BytesMut::new();
        put_discards(&mut out, id, runs);
        Ok(out.freeze())
    }

    pub(super) fn on_switch(&mut self, section: u32) -> Result<(), NotItsPart> {
        if self.section.is_some() || self.left.is_empty() {
            return Err("a switch at no time");
        }
        self.section = Some(section);
        Ok(())
    }

    /// Where a batch goes.
    pub(super) fn memory<'a>(&'a mut self, out: &'a mut BytesMut) -> Option<ArrivingMemory<'a>> {
        let pages = PagesAfter::begin(out, self.section?);
        Some(ArrivingMemory { ids: &self.ids, missing: &mut self.missing, waits: &mut self.waits, pages })
    }

    /// The source has sent all: what QEMU is to be told.
    pub(super) fn end(&self) -> Result<Bytes, NotItsPart> {
        if !self.missing.is_empty() {
            return Err("an end with pages missing");
        }
        let mut out = BytesMut::new();
        put_end(&mut out, self.section.ok_or("an end at no time")?);
        Ok(out.freeze())
    }

    /// QEMU asks for pages: the source is, for those that it has; what was never written to is supplied here.
    pub(super) fn on_asked(&mut self, message: &ReturnMessage, pump: &Pump) -> Bytes {
        let mut out = BytesMut::new();
        let (start, length) = match message {
            ReturnMessage::ReqPagesId { start, length, block } => {
                self.asked = self.ids.iter().position(|id| id == block).and_then(|number| u16::try_from(number).ok());
                (*start, *length)
            }
            ReturnMessage::ReqPages { start, length } => (*start, *length),
            _ => return out.freeze(),
        };
        let (Some(block), Some(section)) = (self.asked, self.section) else {
            tracing::warn!(?message, "QEMU waits for a page of memory that is not placed here");
            return out.freeze();
        };
        let page_size = PAGE_SIZE as u64;
        let last = start.saturating_add(u64::from(length)).div_ceil(page_size);
        let mut missed = Vec::new();
        let now = Instant::now();
        for page in (start / page_size)..last {
            let Ok(page) = u32::try_from(page) else { break };
            let place = Place { block, page };
            if self.missing.contains(place) {
                // Each is asked for once: what is on its way does not come sooner.
                if self.waits.begin(place, now) {
                    missed.push(page);
                }
            } else if !self.left.contains(place) && self.supplied.insert(place) {
                let mut pages = PagesAfter::begin(&mut out, section);
                if let Some(id) = self.ids.get(usize::from(block)) {
                    pages.put((block, id), page, &[0; PAGE_SIZE]);
                }
                pages.end();
            }
        }
        for pages in missed.chunks(MAX_MISSED) {
            pump.push(&Frame::Missed { block, pages: pages.to_vec() }, 0);
        }
        out.freeze()
    }

    pub(super) fn figures(&self) -> WaitFigures {
        self.waits.figures()
    }

    pub(super) fn missing(&self) -> u64 {
        self.missing.len()
    }
}

impl Waits {
    /// Whether the page is waited for since now.
    fn begin(&mut self, place: Place, now: Instant) -> bool {
        let key = (place.block, place.page);
        if self.open.contains_key(&key) {
            return false;
        }
        self.open.insert(key, now);
        true
    }

    fn end(&mut self, place: Place) {
        if let Some(began) = self.open.remove(&(place.block, place.page))
            && self.took.len() < MOST_WAITS
        {
            self.took.push(began.elapsed());
        }
    }

    fn figures(&self) -> WaitFigures {
        let mut took = self.took.clone();
        took.sort_unstable();
        let at = |permille: usize| took.get(took.len().saturating_sub(1) * permille / 1000).copied().unwrap_or_default();
        WaitFigures { count: took.len() as u64, median: at(500), p99: at(990), longest: at(1000) }
    }
}

/// Takes the pages of a batch to QEMU; nothing can be read.
pub(super) struct ArrivingMemory<'a> {
    ids: &'a [BlockId],
    missing: &'a mut PageSet,
    waits: &'a mut Waits,
    pages: PagesAfter<'a>,
}

impl ArrivingMemory<'_> {
    /// The batch is through.
    pub(super) fn end(self) {
        self.pages.end();
    }
}

impl GuestMemory for ArrivingMemory<'_> {
    type Error = io::Error;

    fn read(&mut self, _block: u16, _page: u32, _into: &mut Page) -> io::Result<()> {
        Err(io::Error::other("the VM runs, and its pages are no longer what the source knows"))
    }

    fn write(&mut self, block: u16, page: u32, content: &[u8]) -> io::Result<()> {
        let id = self.ids.get(usize::from(block)).ok_or(io::ErrorKind::InvalidInput)?;
        let (contents, _) = content.as_chunks::<PAGE_SIZE>();
        for (page, content) in (page..).zip(contents) {
            let place = Place { block, page };
            if !self.missing.remove(place) {
                return Err(io::Error::other("a page that is not missing"));
            }
            self.pages.put((block, id), page, content);
            self.waits.end(place);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrival() -> Arrival {
        Arrival::new(&[Block { id: Bytes::from_static(b"pc.ram"), pages: 100 }]).expect("names that QEMU takes")
    }

    #[test]
    fn what_is_not_the_sources_part_is_refused() {
        let mut arrival = arrival();
        assert!(arrival.on_switch(2).is_err(), "nothing is left");
        for runs in [&[(100, 1)][..], &[(0, 101)], &[(5, 0)], &[(u32::MAX, 2)], &[(1, 2), (2, 1)]] {
            assert!(super::tests::arrival().on_left(0, runs).is_err(), "{runs:?}");
        }
        assert!(arrival.on_left(1, &[(0, 1)]).is_err());
        assert!(arrival.memory(&mut BytesMut::new()).is_none() && arrival.end().is_err());
        arrival.on_left(0, &[(1, 2)]).expect("pages of the block");
        arrival.on_switch(2).expect("something is left");
        assert!(arrival.on_switch(2).is_err() && arrival.on_left(0, &[(9, 1)]).is_err(), "it has been");
        assert!(arrival.end().is_err(), "pages are missing");
        let mut out = BytesMut::new();
        let mut memory = arrival.memory(&mut out).expect("switched");
        assert!(memory.write(0, 3, &[1; PAGE_SIZE]).is_err(), "not left");
        assert!(memory.read(0, 1, &mut [0; PAGE_SIZE]).is_err());
        memory.write(0, 1, &[1; 2 * PAGE_SIZE]).expect("left");
        assert!(memory.write(0, 1, &[1; PAGE_SIZE]).is_err(), "it has come");
        memory.end();
        assert!(arrival.end().is_ok());
    }
}
