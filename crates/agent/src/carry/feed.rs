//! The source's half of the way out: takes QEMU's stream apart, has the pages encoded, and passes all else on.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use godwit_carrier::Frame;
use godwit_carrier::frame::{Block, MAX_DATA, MAX_WANTED};
use godwit_carrier::pages::digest::ZERO;
use godwit_carrier::pages::{Batch, Digest, Digester, Encoder, EncoderLimits, Encoding, PAGE_SIZE, Page, Pieces, Place};
use godwit_stream::postcopy::{DeviceState, DeviceStateTooLong, put_advise, put_package};
use godwit_stream::{Element, PageContent, RamStart, Reader, StreamError, WriteError, Writer};
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{mpsc, oneshot};

use super::after::{After, MissedPages, OwnMemory, name_left};
use super::holdings::{Held, Holdings};
use super::images::{OwnImage, SharedImages};
use super::memory::ProcessMemory;
use super::pump::{ADVISED, LOADED, Pump};
use super::seal::{Sealers, Seals};

/// Room for one read from QEMU: so much is encoded before anything else is looked at.
const READ: usize = 256 << 10;
/// While QEMU has nothing to send it goes through its memory again and again, as fast as it is read: a core for nothing. So much is read
/// then, three sections at most, and so often. What piles up in the socket meanwhile is less than a quarter of a MiB, and flows at once when there is hurry.
const IDLE_READ: usize = 64;
/// The pause grows to the second: each time it goes through its memory, an emulating QEMU may miss a write, see [`Feed::look_again`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Most pages that are compared once more while the VM stands still: some tens of milliseconds.
const MOST_LOOKED_AT: usize = 8192;
/// How many are compared at once while the VM runs: less than a millisecond.
const LOOKED_AT_ONCE: usize = 64;
/// QEMU has nothing to send when it was silent for so long. Its socket, which holds a fraction of a batch, is emptied quicker than it is filled.
const SILENT: Duration = Duration::from_millis(1);
/// In the middle of a pass comparing takes one part in so many of the time, lest it takes that from a guest that writes to very many.
const LOOKING_SHARE: u32 = 8;

/// How long a QEMU that may switch over by itself takes at least to go through its memory: what is zero, or there already, no link slows down, and it
/// would be through before the agent could stop the VM.
const UNHELD_PASS: Duration = Duration::from_secs(1);
/// So many times as long where the destination holds more than one page in so many of it, and hardly anything travels.
const UNHELD_HOME: usize = 2;
const HOME: usize = 8;
/// So many of the first pages that the destination holds it is sent nevertheless: as long as nothing travels nobody knows the link, and without that no blackout can
/// be predicted.
const PROBE: usize = 64;
/// What it is read by then at most, a part of its memory if all of that were zeros: what was read already holds up nobody.
const UNHELD_READ: usize = 64;
/// A page of zeros in QEMU's stream.
const ZERO_PAGE: usize = 9;
/// Shorter pauses are saved up: timers are no finer. One that took longer than it should is made up for.
const SHORTEST_PAUSE: Duration = Duration::from_millis(2);
const LATE: Duration = Duration::from_millis(20);

/// So many pages that were left are named at once while the VM runs.
const NAMED_AT_ONCE: u64 = 4096;

/// Between two questions to the destination's QEMU.
const ASK_EVERY: Duration = Duration::from_millis(250);
/// QEMU's command that asks its peer for a sign of life, which comes back over the return path with the same number.
const PING: u16 = 2;

/// Why the stream cannot be passed on.
#[derive(Debug, thiserror::Error)]
pub(super) enum FeedError {
    #[error("QEMU's stream is not understood: {0}")]
    Stream(#[from] StreamError),
    #[error("QEMU's stream cannot be written again: {0}")]
    Write(#[from] WriteError),
    #[error("page {page} of block {block} is none")]
    Page { block: u16, page: u32 },
    #[error("the memory of QEMU cannot be looked at: {0}")]
    Memory(#[from] std::io::Error),
    #[error(transparent)]
    DeviceState(#[from] DeviceStateTooLong),
}

/// What the feed hears of the destination.
pub(super) struct Heard {
    /// Whether its QEMU can do post-copy; that comes first.
    pub(super) advise: oneshot::Receiver<bool>,
    pub(super) pieces: mpsc::UnboundedReceiver<ToldPieces>,
    pub(super) missed: mpsc::UnboundedReceiver<MissedPages>,
}

/// The guest's own memory.
pub(super) struct Own {
    pub(super) memory: ProcessMemory,
    /// Its QEMU emulates its vCPUs and may have missed a write; see [`Feed::look_again`].
    pub(super) emulated: bool,
}

/// Pages of a block with the hashes of their pieces, as the destination has told them.
pub(super) type ToldPieces = (u16, Vec<(u32, Pieces)>);

/// Which section of RAM the reader is in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Section {
    None,
    Part,
    End,
}

/// What the feed waited for, in all; the rest of the time it worked.
#[derive(Clone, Copy, Debug, Default)]
struct Waited {
    qemu: Duration,
    /// QEMU had nothing to send.
    idle: Duration,
    compression: Duration,
    link: Duration,
    /// Less was left to do for the destination.
    destination: Duration,
    /// Another VM of the host stood still.
    held: Duration,
    comparing: Duration,
}

/// QEMU's stream on its way to the peer.
pub(super) struct Feed<'a> {
    pump: &'a Pump,
    digester: Digester,
    reader: Reader,
    writer: Writer,
    /// What the destination's QEMU is to read, not yet in a frame.
    forward: BytesMut,
    encoder: Option<Encoder>,
    /// Pages of other VMs that the destination holds, until they are of use.
    common: Vec<Digest>,
    /// What the destination holds, as long as it tells more of it; what it holds before this place is known.
    held_there: Option<mpsc::UnboundedReceiver<Held>>,
    known: Place,
    seals: Seals<'a>,
    heard: Heard,
    /// Names of the blocks that the destination places.
    told: Vec<Bytes>,
    /// For each block of the stream its number at the destination, if that places its pages.
    placed: Vec<Option<u16>>,
    section: Section,
    /// A part was begun for the destination's QEMU, since it has a page that its carry does not place.
    part_open: bool,
    /// The section has had no page so far.
    part_empty: bool,
    /// The last section had none: QEMU has nothing to send.
    idle: bool,
    /// RAM is through: from here on all is device state, and the VM stands still.
    ended: bool,
    given: Option<Own>,
    /// The guest's own memory, by the destination's numbers, and whether it is compared.
    own: Option<OwnMemory>,
    looks: bool,
    /// No page is sent any more before the switch, see [`Feed::leave`]; and the state of the devices.
    leaving: bool,
    devices: DeviceState,
    section_number: u32,
    /// Images that the VM was made from, until it is known which of them the destination has.
    images: Vec<OwnImage>,
    /// QEMU cannot switch over by itself.
    held: bool,
    /// Pages that its stream is paced by, if it is: so many that cost nothing take [`UNHELD_PASS`]. How many were read last, and until when they last.
    pace: Option<usize>,
    free_pages: usize,
    /// Pages that are to be sent although they may be there.
    probing: usize,
    paced: Instant,
    /// How long to pause while QEMU has nothing to send.
    idle_pause: Duration,
    /// When to compare some in the middle of a pass.
    next_look: Instant,
    /// Of the time since the last read what neither QEMU nor this process needed for it.
    aside: Duration,
    /// Of the time since the level of compression was chosen what the destination was waited for to tell what it holds.
    not_told: Duration,
    waited: Waited,
    asked: Instant,
}

impl<'a> Feed<'a> {
    pub(super) fn new(
        pump: &'a Pump,
        sealers: Sealers,
        digester: Digester,
        own: Option<Own>,
        images: Vec<OwnImage>,
        held: bool,
        heard: Heard,
    ) -> Self {
        Self {
            pump,
            digester,
            reader: Reader::new(),
            writer: Writer::new(),
            forward: BytesMut::new(),
            encoder: None,
            common: Vec::new(),
            held_there: None,
            known: Place::default(),
            seals: Seals::new(pump, sealers),
            heard,
            told: Vec::new(),
            placed: Vec::new(),
            section: Section::None,
            part_open: false,
            idle: false,
            part_empty: false,
            ended: false,
            given: own,
            own: None,
            looks: false,
            leaving: false,
            devices: DeviceState::default(),
            section_number: 0,
            images,
            held,
            pace: None,
            free_pages: 0,
            probing: 0,
            paced: Instant::now(),
            idle_pause: FIRST_PAUSE,
            next_look: Instant::now(),
            aside: Duration::ZERO,
            not_told: Duration::ZERO,
            waited: Waited::default(),
            asked: Instant::now(),
        }
    }

    /// Runs until QEMU closes its side, which is passed on; in post-copy until all memory was sent.
    pub(super) async fn run(mut self, qemu: &OwnedReadHalf, holdings: impl Future<Output = Holdings>) -> Result<(), FeedError> {
        let mut holdings = Some(Box::pin(holdings));
        let first = Instant::now();
        let mut began = first;
        while let Some(count) = self.read(qemu).await? {
            let in_pass = !self.idle;
            self.begin_leaving();
            while let Some(element) = self.reader.next_element()? {
                if let Element::RamStart(start) = &element
                    && let Some(holdings) = holdings.take()
                {
                    let advised = self.advise().await;
                    let asked = Instant::now();
                    let holdings = holdings.await;
                    self.on_waited_for_held(asked.elapsed());
                    self.begin(start, holdings, advised).await;
                }
                self.wait_until_told(&element).await;
                self.pass(element)?;
            }
            if let Some(devices) = self.devices.take() {
                tracing::info!(took = ?first.elapsed(), waited = ?self.waited, "QEMU's stream is through");
                return self.switch(&devices).await;
            }
            self.keep_pace().await;
            if self.next_look <= began {
                self.compare_meanwhile()?;
            }
            let spent = began.elapsed().saturating_sub(std::mem::take(&mut self.aside));
            began = Instant::now();
            if in_pass && !self.idle {
                self.pump.on_passed(count, spent);
            }
            tokio::task::yield_now().await;
        }
        self.flush();
        self.settle_all().await;
        tracing::info!(took = ?first.elapsed(), waited = ?self.waited, "QEMU's stream is through");
        self.seals.push(Frame::ForwardEnd, 0);
        Ok(())
    }

    /// Reads what there is, and answers how many bytes; what was read before goes out if there is nothing. `None` at the end.
    async fn read(&mut self, qemu: &OwnedReadHalf) -> Result<Option<u64>, FeedError> {
        self.wait_for_room().await;
        self.hear_held();
        if self.idle && !self.ended && self.section == Section::None && self.encoder.is_some() {
            self.flush();
            self.settle_all().await;
            while self.compare_meanwhile()? {
                self.wait_for_room().await;
                tokio::task::yield_now().await;
            }
            let began = Instant::now();
            tokio::select! {
                () = self.pump.pause(self.idle_pause) => self.idle_pause = (self.idle_pause * 2).min(LONGEST_PAUSE),
                Some(told) = self.heard.pieces.recv() => self.on_pieces(&told),
            }
            self.waited.idle += began.elapsed();
        }
        loop {
            // One answer for each read, which found room.
            if let Ok(told) = self.heard.pieces.try_recv() {
                self.on_pieces(&told);
            }
            let limit = match self.pace {
                _ if self.ended || self.pump.is_hurried() => READ,
                _ if self.idle => IDLE_READ,
                Some(pages) => (pages.saturating_mul(ZERO_PAGE) / UNHELD_READ).clamp(PAGE_SIZE, READ),
                // How much memory there is stands at the beginning.
                None if !self.held && self.encoder.is_none() => PAGE_SIZE,
                None => READ,
            };
            let buffer = self.reader.buffer_mut();
            buffer.reserve(READ);
            match qemu.try_read_buf(&mut bytes::BufMut::limit(buffer, limit)) {
                Ok(0) => return Ok(None),
                Ok(count) => {
                    self.pump.on_read(count as u64);
                    return Ok(Some(count as u64));
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    let began = Instant::now();
                    tokio::select! {
                        readable = qemu.readable() => if readable.is_err() {
                            return Ok(None);
                        },
                        Some(told) = self.heard.pieces.recv() => self.on_pieces(&told),
                        sealed = self.seals.settle() => self.on_sealed(&sealed),
                        () = tokio::time::sleep(SILENT), if !self.is_flushed() => self.flush(),
                    }
                    self.waited.qemu += began.elapsed();
                }
                Err(_) => return Ok(None),
            }
        }
    }

    /// Compares some while the VM runs: whether there was something to compare.
    fn compare_meanwhile(&mut self) -> Result<bool, FeedError> {
        let (pages, _) = if self.is_looking() { self.compare(LOOKED_AT_ONCE)? } else { (0, 0) };
        Ok(pages > 0)
    }

    /// Whether memory is compared as long as QEMU has nothing to send.
    fn is_looking(&self) -> bool {
        self.looks && !self.ended && !self.pump.is_hurried()
    }

    /// Has the destination's QEMU prepare for post-copy, if it can do that: it forgets what is in its memory, so its carry waits for the answer.
    /// Whether it can.
    async fn advise(&mut self) -> bool {
        let advised = (&mut self.heard.advise).await.unwrap_or(false);
        if advised {
            put_advise(&mut self.forward);
            self.put_ping(ADVISED);
            self.pump.on_advised();
            self.flush();
        }
        advised
    }

    /// From here on pages are left, if that was decided, is possible, and the VM runs.
    fn begin_leaving(&mut self) {
        if self.pump.is_leaving() && !self.leaving && !self.ended {
            tracing::info!("sends no page any more before the switch");
            self.wait_no_longer();
            self.flush();
            self.leaving = true;
        }
    }

    /// A page is noted, instead of being sent, unless the destination has it as it is. What was noted is named now and then: the destination's
    /// QEMU is to forget it while the VM still runs here.
    fn leave(&mut self, place: Place, content: Option<&Page>, is_named: bool) -> Result<(), FeedError> {
        let none = FeedError::Page { block: place.block, page: place.page };
        let Some(encoder) = &mut self.encoder else { return Err(none) };
        if !encoder.leave(place, content, is_named) {
            return Err(none);
        }
        self.free_pages += 1;
        self.pump.set_left(encoder.left_in_all());
        if encoder.left().len() >= NAMED_AT_ONCE {
            self.name_left()?;
        }
        Ok(())
    }

    fn name_left(&mut self) -> Result<(), WriteError> {
        // What the destination is to say of it to its QEMU stands between two sections.
        self.close_part()?;
        self.flush();
        let Some(encoder) = &mut self.encoder else { return Ok(()) };
        name_left(&mut self.seals, &encoder.take_left());
        Ok(())
    }

    /// Ends the part for the destination's QEMU, if one was begun.
    fn close_part(&mut self) -> Result<(), WriteError> {
        if std::mem::take(&mut self.part_open) {
            self.writer.write(&Element::PartEnd, &mut self.forward)?;
        }
        Ok(())
    }

    /// The VM stands still, and all but what was left is at the destination: it goes on there, and what was left follows.
    async fn switch(mut self, devices: &[u8]) -> Result<(), FeedError> {
        self.name_left()?;
        let (Some(encoder), Some(own)) = (self.encoder.take(), self.own.take()) else {
            return Err(std::io::Error::other("there is no memory to send").into());
        };
        let (rest, last) = encoder.into_rest();
        name_left(&mut self.seals, &last);
        self.seals.push(Frame::Switch { section: self.section_number }, 0);
        put_package(&mut self.forward, devices, LOADED);
        self.flush();
        self.settle_all().await;
        self.pump.on_switched(rest.left().len());
        Ok(After { pump: self.pump, seals: self.seals, own, rest, missed: self.heard.missed }.run().await?)
    }

    /// Waits until more may be read: a thread must be free to compress it, and the link must take it.
    async fn wait_for_room(&mut self) {
        let began = Instant::now();
        while self.seals.is_full() {
            let sealed = self.seals.settle().await;
            self.on_sealed(&sealed);
        }
        let compression = began.elapsed();
        let pump = self.pump;
        self.settle_until(pump.wait_while_held()).await;
        let held = began.elapsed() - compression;
        let link_is_full = pump.is_link_full();
        self.settle_until(pump.wait_for_room()).await;
        let link = began.elapsed() - compression - held;
        self.aside += held;
        self.waited.held += held;
        if link_is_full {
            self.aside += link;
            self.waited.link += link;
        } else {
            self.waited.destination += link;
        }
        self.waited.compression += compression;
        let for_link = if link_is_full { link } else { Duration::ZERO };
        self.seals.on_waited(for_link, compression, held + std::mem::take(&mut self.not_told));
    }

    async fn settle_until(&mut self, done: impl Future<Output = ()>) {
        let mut done = std::pin::pin!(done);
        loop {
            tokio::select! {
                () = &mut done => return,
                sealed = self.seals.settle() => self.on_sealed(&sealed),
            }
        }
    }

    async fn settle_all(&mut self) {
        while !self.seals.is_empty() {
            let sealed = self.seals.settle().await;
            self.on_sealed(&sealed);
        }
    }

    fn on_sealed(&mut self, (batch, payload): &(Batch, usize)) {
        if let Some(encoder) = &mut self.encoder {
            encoder.on_sealed(batch, *payload);
        }
    }

    async fn keep_pace(&mut self) {
        let count = std::mem::take(&mut self.free_pages);
        let Some(pace) = self.pace else { return };
        let now = Instant::now();
        self.paced = self.paced.max(now.checked_sub(LATE).unwrap_or(now)) + UNHELD_PASS.mul_f64(count as f64 / pace as f64);
        let ahead = self.paced.saturating_duration_since(now);
        if ahead >= SHORTEST_PAUSE && !self.ended {
            self.flush();
            self.pump.pause(ahead).await;
            self.aside += now.elapsed();
        }
    }

    /// Pages that have waited for this go out, as the pieces that differ.
    fn on_pieces(&mut self, (block, pages): &ToldPieces) {
        for (page, pieces) in pages {
            if self.encoder.as_ref().is_some_and(Encoder::is_full) {
                self.flush_pages();
            }
            if let Some(encoder) = &mut self.encoder {
                encoder.on_pieces(Place { block: *block, page: *page }, pieces);
            }
        }
        self.flush_pages();
    }

    /// Nothing waits any more.
    fn wait_no_longer(&mut self) {
        while let Some(encoder) = &mut self.encoder {
            encoder.set_asks(false);
            if encoder.is_full() {
                self.flush_pages();
            } else if encoder.wait_no_longer().is_none() {
                break;
            }
        }
    }

    /// Waits until it is known what the destination holds where this page belongs.
    async fn wait_until_told(&mut self, element: &Element) {
        let Element::Page { block, page, .. } = element else { return };
        while let Some(held_there) = &mut self.held_there {
            let place = self.placed.get(usize::from(block.0)).copied().flatten().zip(u32::try_from(*page).ok());
            if place.is_none_or(|(block, page)| (Place { block, page }) < self.known) {
                return;
            }
            if held_there.is_empty() && !held_there.is_closed() {
                self.wait_for_held().await;
            } else {
                self.hear_held();
            }
        }
    }

    /// Learns what the destination has told meanwhile.
    fn hear_held(&mut self) {
        while let Some(held_there) = &mut self.held_there {
            match held_there.try_recv() {
                Ok(held) => self.on_held(held),
                Err(mpsc::error::TryRecvError::Disconnected) => self.held_there = None,
                Err(mpsc::error::TryRecvError::Empty) => return,
            }
        }
    }

    /// Waits until the destination has told more of what it holds. What was taken in goes out meanwhile.
    async fn wait_for_held(&mut self) {
        self.flush();
        let began = Instant::now();
        while let Some(held_there) = &mut self.held_there {
            tokio::select! {
                held = held_there.recv() => {
                    match held {
                        Some(held) => self.on_held(held),
                        None => self.held_there = None,
                    }
                    break;
                }
                Some(told) = self.heard.pieces.recv() => self.on_pieces(&told),
                sealed = self.seals.settle() => self.on_sealed(&sealed),
            }
        }
        self.on_waited_for_held(began.elapsed());
    }

    /// Time in which nothing could be sent says nothing about how quickly that is done.
    fn on_waited_for_held(&mut self, time: Duration) {
        self.aside += time;
        self.not_told += time;
        self.waited.destination += time;
    }

    fn on_held(&mut self, (first, digests): Held) {
        let Some(encoder) = &mut self.encoder else { return };
        let mut place = first;
        for mut digest in digests {
            if !self.held && self.probing < PROBE && digest != ZERO {
                self.probing += 1;
                // It holds something there that is nothing of ours.
                digest = digest.map(|byte| !byte);
            }
            encoder.on_held(place, digest);
            place.page = place.page.saturating_add(1);
        }
        self.known = place;
    }

    /// Learns which blocks the destination places. What it holds of them is learnt as it is told; all of it at once where QEMU's pace depends on that.
    async fn begin(&mut self, start: &RamStart, holdings: Holdings, advised: bool) {
        let number = |id: &[u8], pages: u64| {
            let same = |block: &Block| block.id == id && u64::from(block.pages) == pages;
            holdings.blocks.iter().position(same).and_then(|number| u16::try_from(number).ok())
        };
        self.placed = start.blocks.iter().map(|block| number(block.id.as_bytes(), block.pages())).collect();
        self.told = holdings.blocks.iter().map(|block| block.id.clone()).collect();
        // Of a block whose pages travel in the stream nothing is known: QEMU writes to it, and so no page is a copy of one of its.
        let length = |(number, block): (u16, &Block)| if self.placed.contains(&Some(number)) { block.pages } else { 0 };
        let lengths: Vec<u32> = (0..).zip(&holdings.blocks).map(length).collect();
        let mut encoder = Encoder::new(self.digester.clone(), &lengths, EncoderLimits::default());
        if let Some(shared) = SharedImages::new(std::mem::take(&mut self.images), &holdings.images) {
            encoder.set_images(Box::new(shared));
        }
        self.encoder = Some(encoder);
        self.held_there = holdings.held;
        self.common = holdings.common;
        if !self.held {
            let pages = usize::try_from(start.blocks.iter().map(|block| block.pages()).sum::<u64>()).unwrap_or(usize::MAX);
            let held = self.learn_all_held().await;
            self.pace = Some((pages / if held > pages / HOME { UNHELD_HOME } else { 1 }).max(1));
        }
        let (placed, told) = (self.placed.iter().flatten().count(), lengths.len());
        self.section_number = start.section;
        if let Some(Own { memory, emulated }) = self.given.take() {
            let own = OwnMemory::new(memory, &self.told);
            let all = (0..).zip(&lengths).all(|(number, pages)| *pages > 0 && own.has(number));
            self.pump.set_can_leave(advised && all && placed > 0);
            (self.own, self.looks) = (Some(own), emulated);
        }
        if placed < told {
            tracing::warn!(
                placed,
                told,
                "the destination names blocks of memory that QEMU does not have: they go through its socket"
            );
        }
        tracing::info!(blocks = start.blocks.len(), placed, "memory begins");
    }

    /// Learns all that the destination holds, but for the first pages, which are to be sent; how many there are.
    async fn learn_all_held(&mut self) -> usize {
        let (mut pages, began) = (0, Instant::now());
        while let Some(held_there) = &mut self.held_there {
            match held_there.recv().await {
                Some(held) => {
                    pages += held.1.len();
                    self.on_held(held);
                }
                None => self.held_there = None,
            }
        }
        self.on_waited_for_held(began.elapsed());
        pages
    }

    fn pass(&mut self, element: Element) -> Result<(), FeedError> {
        match &element {
            Element::PartBegin => (self.section, self.part_empty) = (Section::Part, true),
            Element::PartEnd => {
                self.section = Section::None;
                self.idle = self.part_empty;
                self.close_part()?;
                // QEMU keeps a section's last bytes until it has more: while pages flow, this is the one moment between sections.
                if self.asked.elapsed() >= ASK_EVERY {
                    self.flush();
                }
            }
            Element::Page { block, page, content } => {
                (self.part_empty, self.idle, self.idle_pause) = (false, false, FIRST_PAUSE);
                let place = self.placed.get(usize::from(block.0)).copied().flatten();
                let page = u32::try_from(*page).ok();
                match (place, page, &mut self.encoder) {
                    (Some(block), Some(page), Some(_)) => self.encode(Place { block, page }, content)?,
                    _ => self.write_page(&element)?,
                }
            }
            Element::EndBegin | Element::EndEnd | Element::Opaque(_) if self.leaving => self.pass_end_of_leaving(&element)?,
            _ => {
                if let Element::EndBegin = element {
                    (self.section, self.ended) = (Section::End, true);
                    self.encoder.iter_mut().for_each(Encoder::on_stopped);
                }
                if matches!(element, Element::Opaque(_)) {
                    self.ended = true;
                }
                if matches!(element, Element::EndEnd | Element::Opaque(_)) {
                    self.wait_no_longer();
                }
                if let Element::EndEnd = element {
                    self.look_again()?;
                }
                self.idle = false;
                self.writer.write(&element, &mut self.forward)?;
            }
        }
        if self.forward.len() >= READ {
            self.flush();
        }
        Ok(())
    }

    /// RAM does not end for the destination's QEMU, and what comes behind it is kept until it is whole.
    fn pass_end_of_leaving(&mut self, element: &Element) -> Result<(), FeedError> {
        match element {
            Element::EndBegin => {
                (self.section, self.ended) = (Section::Part, true);
                self.encoder.iter_mut().for_each(Encoder::on_stopped);
            }
            Element::EndEnd => {
                self.section = Section::None;
                self.close_part()?;
                self.look_again()?;
            }
            Element::Opaque(bytes) => self.devices.push(bytes)?,
            _ => {}
        }
        Ok(())
    }

    fn encode(&mut self, place: Place, content: &PageContent) -> Result<(), FeedError> {
        let page = match content {
            PageContent::Zero => None,
            PageContent::Data(data) => Some(data.first_chunk().ok_or(FeedError::Page { block: place.block, page: place.page })?),
        };
        if self.leaving { self.leave(place, page, true) } else { self.encode_page(place, page) }
    }

    fn encode_page(&mut self, place: Place, content: Option<&Page>) -> Result<(), FeedError> {
        let none = FeedError::Page { block: place.block, page: place.page };
        let Some(encoder) = &mut self.encoder else { return Err(none) };
        encoder.set_asks(self.probing == 0 && !self.ended && !self.pump.is_hurried());
        if self.probing == 0 && !self.common.is_empty() {
            encoder.set_common(std::mem::take(&mut self.common));
        }
        if content.is_some() {
            self.probing = self.probing.saturating_sub(1);
        }
        let free = |encoding: Encoding| encoding.zero + encoding.same;
        let before = free(encoder.encoding());
        // A page that is left out is a VM that is another.
        if !encoder.encode(place, content) {
            return Err(none);
        }
        self.free_pages += usize::from(free(encoder.encoding()) > before);
        if encoder.is_full() {
            self.flush_pages();
        }
        if self.encoder.as_ref().is_some_and(|encoder| encoder.unasked() >= MAX_WANTED) {
            self.ask_for_pieces();
        }
        Ok(())
    }

    /// Asks for the pieces of what waits. What the encoder has put together goes first: the destination answers as things stand then.
    fn ask_for_pieces(&mut self) {
        self.flush_pages();
        let Some(encoder) = &mut self.encoder else { return };
        let mut asked: Option<(u16, Vec<u32>)> = None;
        while let Some(place) = encoder.ask() {
            match &mut asked {
                Some((block, pages)) if *block == place.block && pages.len() < MAX_WANTED => pages.push(place.page),
                _ => {
                    let before = asked.replace((place.block, vec![place.page]));
                    self.seals.push_wanted(before);
                }
            }
        }
        self.pump.set_waiting(encoder.waiting());
        self.seals.push_wanted(asked);
    }

    /// An emulating QEMU can miss a write: its vCPU takes a page for watched no longer at the very moment at which the watch begins anew. So
    /// every page that was written to while it was watched is compared once more. Most of that is done while the VM runs; what was named
    /// since, when it stands still, which is bounded: a guest that writes to very many is watched anew seldom.
    fn look_again(&mut self) -> Result<(), FeedError> {
        let began = Instant::now();
        let (pages, missed) = self.compare(MOST_LOOKED_AT)?;
        self.looks = false;
        tracing::info!(pages, missed, took = ?began.elapsed(), "looked again at what the guest wrote to");
        Ok(())
    }

    /// Compares so many pages that were written to with the guest's memory; how many there were, and how many differed.
    fn compare(&mut self, most: usize) -> Result<(usize, usize), FeedError> {
        let began = Instant::now();
        let (mut pages, mut differed) = (0, 0);
        while self.looks
            && pages < most
            && let (Some(own), Some(encoder)) = (&mut self.own, &mut self.encoder)
            && let Some(place) = encoder.take_written_to()
        {
            if !own.has(place.block) {
                continue;
            }
            let mut page = [0; PAGE_SIZE];
            let content = own.read(place, &mut page)?;
            let before = encoder.encoding().same;
            pages += 1;
            if self.leaving {
                self.leave(place, content, false)?;
            } else {
                encoder.set_asks(!self.ended && !self.pump.is_hurried());
                if !encoder.encode_unnamed(place, content) {
                    return Err(FeedError::Page { block: place.block, page: place.page });
                }
                if encoder.is_full() {
                    self.flush_pages();
                }
            }
            differed += usize::from(self.encoder.as_ref().is_some_and(|encoder| encoder.encoding().same == before));
        }
        let took = began.elapsed();
        self.aside += took;
        self.waited.comparing += took;
        self.next_look = began + took * LOOKING_SHARE;
        self.pump.on_compared(pages, took);
        self.tell_looked_at();
        Ok((pages, differed))
    }

    /// A page of a block that the destination's carry does not place travels in the stream.
    fn write_page(&mut self, element: &Element) -> Result<(), FeedError> {
        if self.section == Section::Part && !self.part_open {
            self.writer.write(&Element::PartBegin, &mut self.forward)?;
            self.part_open = true;
        }
        Ok(self.writer.write(element, &mut self.forward)?)
    }

    fn flush_pages(&mut self) {
        let Some(encoder) = &mut self.encoder else { return };
        if let Some(batch) = encoder.take() {
            self.seals.seal(batch);
        }
        self.pump.on_cost(encoder.cost_again(), encoder.encoding());
        self.pump.set_waiting(encoder.waiting());
        self.tell_looked_at();
    }

    fn tell_looked_at(&self) {
        if let (true, Some(encoder)) = (self.looks, &self.encoder) {
            self.pump.set_looked_at(encoder.written_to().min(MOST_LOOKED_AT));
        }
    }

    /// Pages go to memory past the destination's QEMU: whether that lives must be asked. Between sections it takes questions.
    fn ask(&mut self) {
        let between = self.section == Section::None && !self.ended && self.encoder.is_some() && self.reader.tunnelled().is_none();
        if between
            && self.asked.elapsed() >= ASK_EVERY
            && let Some(number) = self.pump.ask_qemu()
        {
            self.asked = Instant::now();
            self.put_ping(number);
        }
    }

    fn put_ping(&mut self, number: u32) {
        let ping = Element::Command { number: PING, payload: Bytes::copy_from_slice(&number.to_be_bytes()) };
        if let Err(error) = self.writer.write(&ping, &mut self.forward) {
            tracing::error!(%error, "the destination's QEMU cannot be asked");
        }
    }

    fn is_flushed(&self) -> bool {
        self.forward.is_empty() && self.encoder.as_ref().is_none_or(|encoder| encoder.is_empty() && encoder.unasked() == 0)
    }

    /// Everything that was taken in goes out: pages first, since what follows may rely on them.
    fn flush(&mut self) {
        self.ask();
        self.ask_for_pieces();
        while !self.forward.is_empty() {
            let piece = self.forward.split_to(self.forward.len().min(MAX_DATA)).freeze();
            let raw = piece.len() as u64;
            self.seals.push(Frame::Forward(piece), raw);
        }
    }
}
