//! What a destination holds of the VM's memory: told by the one side while it is still being brought back, heard by the other, which relies on what was told
//! so far.
//!
//! Digests are told in the order of the pages. So whatever lies before the last of them is known: it is held as was told, or holds nothing.

use std::io;

use bytes::Bytes;
use godwit_carrier::frame::{Block, MAX_COMMON, MAX_DIGESTS};
use godwit_carrier::pages::digest::ZERO;
use godwit_carrier::pages::{Digest, Digester, GuestMemory, PAGE_SIZE, Place};
use godwit_carrier::{Frame, Image};
use tokio::sync::{mpsc, oneshot};

use super::arrive::NotItsPart;
use super::behind::WriteBehind;
use super::home::Bringing;
use super::images::ReadableImage;
use super::memory::{ENTRIES, ProcessMemory};
use super::neighbours::Neighbours;
use super::pump::Pump;

/// So many pages must have been brought back for it to be worth while to look at them, and so many are told at once.
const WORTH_TELLING: u32 = 1024;

/// What the destination has said of its memory.
#[derive(Debug, Default)]
pub(super) struct Holdings {
    /// Where it places pages itself.
    pub(super) blocks: Vec<Block>,
    /// Images that it can read.
    pub(super) images: Vec<Image>,
    /// Pages of other VMs that it holds.
    pub(super) common: Vec<Digest>,
    /// What it holds of the blocks, as it is told; closed when all was.
    pub(super) held: Option<mpsc::UnboundedReceiver<Held>>,
    /// Pages that it does not have, in a session that goes on after a switch: block, runs.
    pub(super) absent: Vec<(u16, Vec<(u32, u32)>)>,
}

/// Digests of consecutive pages, from this one on.
pub(super) type Held = (Place, Vec<Digest>);

/// The source, as it hears of the destination's memory.
pub(super) struct Hearing {
    /// Who is told; whoever does not listen any more has a QEMU that closed before it began.
    listening: Option<oneshot::Sender<Holdings>>,
    /// What was said, until it is passed on.
    holdings: Option<Holdings>,
    lengths: Vec<u32>,
    held: Option<mpsc::UnboundedSender<Held>>,
    /// What comes next lies here or behind.
    next: Place,
    /// How many pages the VM has, without those that were told.
    left: u64,
}

impl Hearing {
    /// Of a VM that has so many pages at most.
    pub(super) fn new(listening: oneshot::Sender<Holdings>, pages: u64) -> Self {
        Self { listening: Some(listening), holdings: None, lengths: Vec::new(), held: None, next: Place::default(), left: pages }
    }

    /// Nothing was said of the memory so far.
    pub(super) const fn is_new(&self) -> bool {
        self.listening.is_some() && self.holdings.is_none()
    }

    pub(super) fn on_memory(&mut self, blocks: Vec<Block>) -> Result<(), NotItsPart> {
        let pages: u64 = blocks.iter().map(|block| u64::from(block.pages)).sum();
        if pages > self.left {
            return Err("more memory than the VM has");
        }
        self.lengths = blocks.iter().map(|block| block.pages).collect();
        self.holdings = Some(Holdings { blocks, ..Holdings::default() });
        Ok(())
    }

    pub(super) fn on_images(&mut self, images: Vec<Image>) -> Result<(), NotItsPart> {
        let holdings = self.holdings.as_mut().filter(|holdings| holdings.images.is_empty());
        holdings.ok_or("images of no memory")?.images = images;
        Ok(())
    }

    pub(super) fn on_common(&mut self, digests: Vec<Digest>) -> Result<(), NotItsPart> {
        let common = &mut self.holdings.as_mut().ok_or("pages of other VMs behind its own")?.common;
        if common.len() + digests.len() > MAX_COMMON {
            return Err("more pages of other VMs than there may be");
        }
        common.extend(digests);
        Ok(())
    }

    pub(super) fn on_held(&mut self, place: Place, digests: Vec<Digest>) -> Result<(), NotItsPart> {
        let length = self.lengths.get(usize::from(place.block)).copied().unwrap_or(0);
        let end = u32::try_from(digests.len()).ok().and_then(|pages| place.page.checked_add(pages));
        let page = end.filter(|end| *end <= length).ok_or("digests of pages beyond a block")?;
        if place < self.next {
            return Err("digests in another order than that of the pages");
        }
        self.next = Place { page, ..place };
        self.left = self.left.checked_sub(digests.len() as u64).ok_or("more digests than the VM has pages")?;
        self.pass_on()?;
        let _ = self.held.as_ref().ok_or("digests after their end")?.send((place, digests));
        Ok(())
    }

    pub(super) fn on_absent(&mut self, block: u16, runs: Vec<(u32, u32)>) -> Result<(), NotItsPart> {
        // One without pages would cost nothing of what a destination may say.
        let pages: u64 = runs.iter().map(|(_, pages)| u64::from(*pages).max(1)).sum();
        self.left = self.left.checked_sub(pages).ok_or("more pages than the VM has")?;
        self.holdings.as_mut().ok_or("pages that are absent")?.absent.push((block, runs));
        Ok(())
    }

    pub(super) fn on_end(&mut self) -> Result<(), NotItsPart> {
        self.pass_on()?;
        self.held.take().map(drop).ok_or("an end of digests")
    }

    /// From here on the memory is known, and digests are passed on as they come.
    fn pass_on(&mut self) -> Result<(), NotItsPart> {
        if let Some(holdings) = self.holdings.take() {
            let (held, digests) = mpsc::unbounded_channel();
            self.held = Some(held);
            let listening = self.listening.take().ok_or("its memory twice")?;
            let _ = listening.send(Holdings { held: Some(digests), ..holdings });
        }
        Ok(())
    }
}

/// The destination, as it tells what it holds.
pub(super) struct Telling {
    /// What comes first.
    neighbours: Option<Neighbours>,
    bringing: Bringing,
    lengths: Vec<u32>,
    at: Place,
}

impl Telling {
    /// Says which memory there is. What it holds is told [step by step](Telling::step), and none of it must be written to by others before it was.
    pub(super) fn begin(pump: &Pump, memory: &ProcessMemory, bringing: Bringing, neighbours: Neighbours) -> Self {
        let blocks = told_blocks(memory);
        let lengths = blocks.iter().map(|block| block.pages).collect();
        pump.push(&Frame::Memory(blocks), 0);
        let images: Vec<Image> = memory.images().iter().map(ReadableImage::told).collect();
        if !images.is_empty() {
            pump.push(&Frame::Images(images), 0);
        }
        Self { neighbours: Some(neighbours), bringing, lengths, at: Place::default() }
    }

    /// What was not brought back so far stays away.
    pub(super) fn bring_no_more(&mut self) {
        self.bringing = Bringing::default();
    }

    /// Copies some of what neighbours have, brings some of what is to be brought back, or tells some of what is there for good. Whether that was all.
    pub(super) fn step(&mut self, pump: &Pump, digester: &Digester, memory: &mut WriteBehind) -> io::Result<bool> {
        if let Some(neighbours) = &mut self.neighbours {
            match neighbours.step(digester, memory.common()) {
                Some(digests) if digests.is_empty() => {}
                Some(digests) => pump.push(&Frame::Common(digests), 0),
                None => self.neighbours = None,
            }
            return Ok(false);
        }
        let Place { block, page } = self.at;
        let Some(length) = self.lengths.get(usize::from(block)).copied() else {
            pump.push(&Frame::HeldEnd, 0);
            return Ok(true);
        };
        // The last that were brought are still on their way.
        let end = match self.bringing.through() {
            Some(through) if through.block < block => 0,
            Some(through) if through.block == block => through.page.saturating_sub(memory.most_pages()),
            _ => length,
        };
        if page >= length {
            self.at = Place { block: block.saturating_add(1), page: 0 };
        } else if end < length && end < page.saturating_add(WORTH_TELLING) {
            self.bringing.next(memory);
        } else {
            self.at.page = tell(pump, digester, memory, self.at, end)?;
        }
        Ok(false)
    }
}

/// Tells what pages hold, up to `end` or as far as is looked at in one go; with which to go on.
fn tell(pump: &Pump, digester: &Digester, memory: &mut WriteBehind, from: Place, end: u32) -> io::Result<u32> {
    let mut end = end.min(from.page.saturating_add(ENTRIES));
    memory.wait_for(from, end.saturating_sub(from.page))?;
    let (mut touched, _) = memory.memory().touched(from.block, from.page)?;
    if let Some(next) = touched.get(WORTH_TELLING as usize) {
        end = end.min(*next);
    }
    touched.retain(|page| *page < end);
    let mut run: Option<Held> = None;
    for page in touched {
        let mut content = [0; PAGE_SIZE];
        memory.read(from.block, page, &mut content)?;
        let digest = digester.page(&content);
        run = match run.take() {
            Some((first, mut digests)) if first.page + digests.len() as u32 == page && digests.len() < MAX_DIGESTS => {
                digests.push(digest);
                Some((first, digests))
            }
            before => {
                tell_run(pump, before);
                Some((Place { page, ..from }, vec![digest]))
            }
        };
    }
    tell_run(pump, run);
    Ok(end)
}

fn tell_run(pump: &Pump, run: Option<Held>) {
    if let Some((Place { block, page: first }, digests)) = run
        && digests.iter().any(|digest| *digest != ZERO)
    {
        pump.push(&Frame::Held { block, first, digests }, 0);
    }
}

/// The blocks of a memory, as they are told.
pub(super) fn told_blocks(memory: &ProcessMemory) -> Vec<Block> {
    memory.blocks().iter().map(|block| Block { id: Bytes::from(block.id.clone()), pages: block.pages }).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::Duration;

    use godwit_carrier::{Identity, Side};
    use godwit_model::{Generation, VmId};
    use godwit_vault::{StayKey, StayWriter};
    use uuid::Uuid;

    use super::super::control::PlacedBlock;
    use super::super::home::Earlier;
    use super::super::pump::KeepAlive;
    use super::*;

    const PAGES: u32 = 10_000;

    fn block() -> Block {
        Block { id: Bytes::from_static(b"pc.ram"), pages: 100 }
    }

    fn place(page: u32) -> Place {
        Place { block: 0, page }
    }

    #[test]
    fn digests_come_in_the_order_of_pages_and_none_behind_the_end() {
        let hearing = || {
            let (listening, told) = oneshot::channel();
            let mut hearing = Hearing::new(listening, 100);
            hearing.on_memory(vec![block()]).expect("memory");
            (hearing, told)
        };
        let (mut right, mut told) = hearing();
        right.on_held(place(3), vec![[1; 16]; 7]).expect("digests");
        let mut held = told.try_recv().expect("told with the first").held.expect("more comes");
        right.on_held(place(10), vec![[2; 16]; 90]).expect("digests");
        assert_eq!(held.try_recv(), Ok((place(3), vec![[1; 16]; 7])));
        assert_eq!(held.try_recv(), Ok((place(10), vec![[2; 16]; 90])));
        assert_eq!(held.try_recv(), Err(mpsc::error::TryRecvError::Empty));
        right.on_end().expect("an end");
        assert_eq!(held.try_recv(), Err(mpsc::error::TryRecvError::Disconnected));
        assert!(right.on_end().is_err() && right.on_held(place(3), vec![]).is_err() && !right.is_new());

        let (mut before, mut told) = hearing();
        before.on_common(vec![[3; 16]; MAX_COMMON - 1]).expect("before what it holds itself");
        before.on_common(vec![[4; 16]]).expect("as many as there may be");
        assert!(before.on_common(vec![[4; 16]]).is_err());
        before.on_end().expect("an end");
        assert_eq!(told.try_recv().expect("told").common.last(), Some(&[4; 16]));
        assert!(before.on_common(vec![[3; 16]]).is_err(), "behind it");

        type Wrong = fn(&mut Hearing) -> Result<(), NotItsPart>;
        let wrong: [(&str, Wrong); 5] = [
            ("back", |hearing| hearing.on_held(place(10), vec![[1; 16]]).and_then(|()| hearing.on_held(place(10), vec![[1; 16]]))),
            ("beyond the block", |hearing| hearing.on_held(place(99), vec![[1; 16]; 2])),
            ("beyond all numbers", |hearing| hearing.on_held(place(u32::MAX), vec![[1; 16]; 2])),
            ("of no block", |hearing| hearing.on_held(Place { block: 1, page: 0 }, vec![[1; 16]])),
            ("absent beside held", |hearing| {
                hearing.on_held(place(0), vec![[1; 16]; 60]).and_then(|()| hearing.on_absent(0, vec![(60, 41)]))
            }),
        ];
        for (what, say) in wrong {
            assert!(say(&mut hearing().0).is_err(), "{what}");
        }
        let (listening, _) = oneshot::channel();
        assert!(Hearing::new(listening, 99).on_memory(vec![block()]).is_err());
    }

    #[tokio::test]
    async fn what_is_back_is_told_while_the_rest_is_still_brought() {
        let bytes: &'static [u8] = Vec::leak(vec![0; (PAGES as usize + 1) * PAGE_SIZE]);
        let address = bytes.as_ptr().addr() + bytes.as_ptr().align_offset(PAGE_SIZE);
        let open =
            |name: &str| File::options().read(true).write(name == "mem").open(format!("/proc/self/{name}")).expect("own memory");
        let placed = PlacedBlock { id: "pc.ram".into(), address: address as u64, pages: PAGES };
        let memory = ProcessMemory::new(open("mem").into(), open("pagemap").into(), vec![placed]);
        let mut memory = WriteBehind::new(memory, crate::carry::tests::threads());
        let blocks = vec![godwit_vault::Block { id: "pc.ram".into(), pages: PAGES }];
        let identity = godwit_vault::Identity { vm: VmId::new(Uuid::nil()), generation: Generation(1), blocks };
        let file = tempfile::tempfile().expect("a file");
        let mut stay = StayWriter::begin(file.try_clone().expect("a file"), &StayKey::new([4; 32]), &identity).expect("begun");
        let content = |page: u32| [page.to_le_bytes()[0] | 1; PAGE_SIZE];
        (100..9_000).for_each(|page| stay.page(0, page, &content(page)).expect("written"));
        stay.finish().expect("written");

        let identity = Identity { vm: [1; 16], task: [2; 16], generation: 3, lane: 0 };
        let keep_alive = KeepAlive { every: Duration::from_secs(5), silence: Duration::from_secs(20) };
        let (pump, _) = Pump::new(Side::Destination, identity, keep_alive, None, mpsc::channel(1).0);
        let earlier = Earlier { stay: Some((file, [4; 32])), lent: None };
        let bringing = Bringing::begin(earlier, &mut memory).await;
        let mut telling = Telling::begin(&pump, memory.memory(), bringing, Neighbours::default());
        let (digester, mut early) = (Digester::new(&[7; 32]), 0);
        while !telling.step(&pump, &digester, &mut memory).expect("its own memory") {
            if let Some(through) = telling.bringing.through() {
                assert!(telling.at <= through, "{:?} was told, and is written to later", telling.at);
                early = telling.at.page;
            }
        }
        assert!(early > PAGES / 2, "{early} pages were told before the last was brought");
        for page in [0, 99, 100, 5_000, 8_999, 9_000] {
            let mut is = [0; PAGE_SIZE];
            memory.read(0, page, &mut is).expect("its own memory");
            assert_eq!(is, if (100..9_000).contains(&page) { content(page) } else { [0; PAGE_SIZE] }, "page {page}");
        }
    }
}
