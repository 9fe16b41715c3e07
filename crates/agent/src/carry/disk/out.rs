//! The source's half of a disk: copies what is there, and passes on what is written to it meanwhile.
//!
//! Both leave in one order. A read that is under way while the mirror brings a write to the same place may be older than that, so it is made again; what is
//! newer than a write comes with a later one.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use bytes::BytesMut;
use godwit_carrier::Frame;
use godwit_carrier::frame::{Block, MAX_DIGESTS};
use godwit_carrier::pages::digest::{ZERO, is_zero};
use godwit_carrier::pages::{Digest, Digester, PAGE_SIZE, Page, Place, PlainEncoder};
use godwit_nbd::{ALLOCATION, Client, Event, Extent, Request, Server, dirty_bitmap, put_disconnect, put_read, put_status};
use godwit_qemu::disks::REMEMBERED;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::{BLOCK, DiskError, GRANULE, WINDOW, chunk_pages, pages_of, try_read, write_due};
use crate::carry::control::DiskStatus;
use crate::carry::images::{OwnImage, SharedImages};
use crate::carry::pump::Pump;
use crate::carry::seal::{Sealers, Seals};

/// Reads that are under way, and what each is for.
const DEPTH: usize = 8;
const READ: u32 = 4 * GRANULE;
/// Room for one read from a socket.
const BUFFER: usize = 256 << 10;
/// What of the mirror's writes may wait here before the mirror waits itself. It has less than this under way, so that stopping the VM, which waits
/// for what is under way, does not wait for the link.
const MOST_WAITING: u64 = 32 << 20;
/// How often it is looked at whether the mirror can have its answers, at least.
const PAY_EVERY: Duration = Duration::from_millis(100);

/// A disk as the agent describes it.
#[derive(Clone, Debug)]
pub(in crate::carry) struct OwnDisk {
    /// Name of the exports.
    pub(in crate::carry) export: String,
    pub(in crate::carry) size: u64,
    /// The dirty bitmap that has all that was written since the VM came, and the generation on which it came.
    pub(in crate::carry) since: Option<(String, u64)>,
}

/// What the destination's disk holds where nothing was sent.
enum Known {
    /// Zeros.
    Zeros,
    /// What it held when the bitmap began.
    Since,
    /// What these digests say, a chunk of so many pages each.
    Chunks(u32, Vec<Digest>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The destination says what it has.
    Meeting,
    /// It tells digests.
    Comparing,
    /// The agent has not said yet that the mirror runs.
    Waiting,
    Copying,
    Copied,
    /// The mirror is through, and the end was said.
    Ended,
}

/// A part of the disk that is to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    offset: u64,
    length: u32,
    is_zero: bool,
}

/// A part that is being read.
struct Reading {
    cookie: u64,
    part: Part,
    data: Vec<u8>,
    /// Something was written there meanwhile.
    stale: bool,
}

/// The extents of a window, as they come.
#[derive(Default)]
struct Asked {
    cookie: u64,
    offset: u64,
    length: u32,
    allocation: Vec<Extent>,
    dirty: Vec<Extent>,
}

/// The disk on its way.
pub(in crate::carry) struct DiskOut<'a> {
    pump: &'a Pump,
    seals: Seals<'a>,
    digester: Digester,
    encoder: PlainEncoder,
    images: Vec<OwnImage>,
    disk: OwnDisk,
    pages: u32,
    stage: Stage,
    known: Known,
    told: Vec<godwit_carrier::Image>,
    base: Option<u64>,
    size_told: bool,
    client: Client,
    to_disk: BytesMut,
    is_ready: bool,
    server: Server,
    to_mirror: BytesMut,
    /// Writes of the mirror that have no answer yet.
    owed: Vec<u64>,
    next_cookie: u64,
    /// Up to where extents were asked for.
    next: u64,
    asked: Option<Asked>,
    parts: VecDeque<Part>,
    reading: Vec<Reading>,
    /// Bytes that need not be looked at any more.
    copied: u64,
}

impl<'a> DiskOut<'a> {
    pub(in crate::carry) fn new(
        pump: &'a Pump,
        sealers: Sealers,
        digester: Digester,
        images: Vec<OwnImage>,
        disk: OwnDisk,
    ) -> Result<Self, DiskError> {
        let mut kinds = vec![ALLOCATION.to_owned()];
        kinds.extend(disk.since.as_ref().map(|(bitmap, _)| dirty_bitmap(bitmap)));
        let mut to_mirror = BytesMut::new();
        Ok(Self {
            pump,
            seals: Seals::new(pump, sealers),
            encoder: PlainEncoder::new(digester.clone(), None),
            digester,
            images,
            pages: pages_of(disk.size)?,
            stage: Stage::Meeting,
            known: Known::Zeros,
            told: Vec::new(),
            base: None,
            size_told: false,
            client: Client::new(&disk.export, kinds, false),
            to_disk: BytesMut::new(),
            is_ready: false,
            server: Server::new(&disk.export, disk.size, &mut to_mirror),
            to_mirror,
            owed: Vec::new(),
            next_cookie: 1,
            next: 0,
            asked: None,
            parts: VecDeque::new(),
            reading: Vec::new(),
            copied: 0,
            disk,
        })
    }

    /// Runs until the session ends; never returns but with an error.
    pub(in crate::carry) async fn run(
        mut self,
        mut disk: UnixStream,
        mut mirror: UnixStream,
        mut frames: mpsc::UnboundedReceiver<Frame>,
        tell: impl Fn(DiskStatus),
    ) -> Result<Infallible, DiskError> {
        let (mut disk_open, mut mirror_open) = (true, true);
        loop {
            self.go_on();
            self.pay();
            write_due(&mut mirror, &mut self.to_mirror).await?;
            write_due(&mut disk, &mut self.to_disk).await?;
            tell(self.status());
            let wants_room = self.stage == Stage::Copying || !self.owed.is_empty();
            let has_room = self.pump.has_room();
            tokio::select! {
                _ = self.seals.settle() => {}
                Some(frame) = frames.recv() => {
                    let size = frame.memory();
                    self.on_frame(frame)?;
                    self.pump.on_dealt(size, true);
                }
                readable = mirror.readable(), if mirror_open => {
                    readable?;
                    match try_read(&mirror, self.server.buffer_mut(), BUFFER)? {
                        Some(false) => {
                            mirror_open = false;
                            self.on_mirror_closed()?;
                        }
                        Some(true) => self.on_mirror().await?,
                        None => {}
                    }
                }
                readable = disk.readable(), if disk_open && self.pump.is_begun() => {
                    readable?;
                    match try_read(&disk, self.client.buffer_mut(), BUFFER)? {
                        Some(false) if matches!(self.stage, Stage::Copied | Stage::Ended) => disk_open = false,
                        Some(false) => return Err(DiskError::Closed),
                        Some(true) => self.on_disk().await?,
                        None => {}
                    }
                }
                () = self.pump.wait_for_room(), if wants_room && !has_room => {}
                () = self.pump.pause(PAY_EVERY), if !self.owed.is_empty() => {}
                () = self.pump.wait_for_begin(), if self.stage == Stage::Waiting && !self.pump.is_begun() => {}
                () = self.pump.wait_until_settled(), if self.stage == Stage::Ended && !self.pump.is_settled() => {}
            }
        }
    }

    fn status(&self) -> DiskStatus {
        DiskStatus {
            // What is under way is not there yet.
            looked_at: self.copied.saturating_sub(self.pump.raw_in_flight()),
            copied: matches!(self.stage, Stage::Copied | Stage::Ended) && self.seals.is_empty(),
            whole: self.stage == Stage::Ended && self.seals.is_empty() && self.pump.is_settled(),
        }
    }

    /// The mirror's writes are answered as long as not too much waits. Once the VM is to be stopped all are: it waits for them.
    fn pay(&mut self) {
        if self.pump.in_flight() < MOST_WAITING || self.pump.has_room() || self.pump.is_hurried() {
            for cookie in self.owed.drain(..) {
                Server::put_done(&mut self.to_mirror, cookie);
            }
        }
    }

    fn on_frame(&mut self, frame: Frame) -> Result<(), DiskError> {
        match (self.stage, frame) {
            (Stage::Meeting, Frame::Memory(blocks)) if !self.size_told => {
                let there = match &blocks[..] {
                    [Block { pages, .. }] => *pages,
                    _ => return Err(DiskError::Unexpected("other than one disk")),
                };
                if there != self.pages {
                    return Err(DiskError::Size { here: self.pages, there });
                }
                self.size_told = true;
            }
            (Stage::Meeting, Frame::Images(images)) if self.told.is_empty() => self.told = images,
            (Stage::Meeting, Frame::Base(generation)) if self.base.is_none() => self.base = Some(generation),
            (Stage::Meeting, Frame::HeldEnd) if self.size_told => self.begin(),
            (Stage::Comparing, Frame::Held { block: BLOCK, first, digests }) if digests.len() <= MAX_DIGESTS => {
                let Known::Chunks(_, chunks) = &mut self.known else { return Err(DiskError::Unexpected("digests")) };
                let known = chunks.get_mut(first as usize..).and_then(|rest| rest.get_mut(..digests.len()));
                known.ok_or(DiskError::Unexpected("digests of what is beyond the disk"))?.copy_from_slice(&digests);
            }
            (Stage::Comparing, Frame::HeldEnd) => self.stage = Stage::Waiting,
            _ => return Err(DiskError::Unexpected("a frame that does not belong there")),
        }
        Ok(())
    }

    fn begin(&mut self) {
        let shared = SharedImages::new(std::mem::take(&mut self.images), &self.told);
        if let Some(shared) = shared {
            self.encoder = PlainEncoder::new(self.digester.clone(), Some(Box::new(shared)));
        }
        let since = self.disk.since.as_ref().map(|(_, generation)| *generation);
        tracing::info!(base = ?self.base, ?since, pages = self.pages, "the disk begins");
        self.stage = Stage::Waiting;
        match self.base {
            None => {}
            Some(base) if base != 0 && Some(base) == since => self.known = Known::Since,
            Some(_) => {
                let chunk = chunk_pages(self.pages);
                self.known = Known::Chunks(chunk, vec![ZERO; self.pages.div_ceil(chunk) as usize]);
                self.flush_to_pump(Frame::Compare(chunk));
                self.stage = Stage::Comparing;
            }
        }
    }

    /// Asks for what comes next, as long as there is room.
    fn go_on(&mut self) {
        if self.stage == Stage::Waiting && self.pump.is_begun() && self.is_ready {
            self.stage = Stage::Copying;
        }
        if self.stage != Stage::Copying {
            return;
        }
        if self.asked.is_none() && self.parts.len() < DEPTH && self.next < self.disk.size {
            let length = (self.disk.size - self.next).min(WINDOW) as u32;
            let cookie = self.cookie();
            put_status(&mut self.to_disk, cookie, self.next, length);
            self.asked = Some(Asked { cookie, offset: self.next, length, ..Asked::default() });
        }
        while self.reading.len() < DEPTH
            && self.pump.has_room()
            && let Some(part) = self.parts.pop_front()
        {
            if part.is_zero {
                self.send_zeros(part);
                continue;
            }
            let cookie = self.cookie();
            put_read(&mut self.to_disk, cookie, part.offset, part.length);
            self.reading.push(Reading { cookie, part, data: vec![0; part.length as usize], stale: false });
        }
        if self.next >= self.disk.size && self.asked.is_none() && self.parts.is_empty() && self.reading.is_empty() {
            self.flush();
            put_disconnect(&mut self.to_disk);
            self.stage = Stage::Copied;
            self.copied = self.disk.size;
            tracing::info!(encoding = ?self.encoder.encoding(), "what was there is copied");
        }
    }

    fn cookie(&mut self) -> u64 {
        self.next_cookie += 1;
        self.next_cookie
    }

    async fn on_disk(&mut self) -> Result<(), DiskError> {
        while let Some(event) = self.client.next_event(&mut self.to_disk)? {
            match event {
                Event::Ready { size } => {
                    if size != self.disk.size {
                        return Err(DiskError::Size { here: self.pages, there: pages_of(size)? });
                    }
                    self.is_ready = true;
                }
                Event::Failed { error, .. } => return Err(DiskError::Disk { what: "read", error }),
                Event::Data { cookie, offset, data } => {
                    let reading = self.reading.iter_mut().find(|reading| reading.cookie == cookie);
                    let into = reading.and_then(|reading| {
                        let from = usize::try_from(offset.checked_sub(reading.part.offset)?).ok()?;
                        reading.data.get_mut(from..from.checked_add(data.len())?)
                    });
                    into.ok_or(DiskError::Unexpected("data that nobody asked for"))?.copy_from_slice(&data);
                }
                // It was made of zeros.
                Event::Hole { .. } => {}
                Event::Status { cookie, kind, extents } => {
                    let asked = self.asked.as_mut().filter(|asked| asked.cookie == cookie);
                    let asked = asked.ok_or(DiskError::Unexpected("extents that nobody asked for"))?;
                    *(if kind == 0 { &mut asked.allocation } else { &mut asked.dirty }) = extents;
                }
                Event::Done { cookie } => self.on_done(cookie).await?,
            }
        }
        Ok(())
    }

    async fn on_done(&mut self, cookie: u64) -> Result<(), DiskError> {
        if let Some(asked) = self.asked.take_if(|asked| asked.cookie == cookie) {
            return self.on_extents(&asked);
        }
        let Some(at) = self.reading.iter().position(|reading| reading.cookie == cookie) else {
            return Err(DiskError::Unexpected("an answer that nobody waits for"));
        };
        let Reading { part, data, stale, .. } = self.reading.swap_remove(at);
        if stale {
            self.parts.push_front(part);
            return Ok(());
        }
        self.copied += u64::from(part.length);
        if self.is_known(part, || self.digester.pages(&padded(&data))) {
            return Ok(());
        }
        let skips_zeros = matches!(self.known, Known::Zeros);
        self.send(part.offset, &data, skips_zeros).await;
        Ok(())
    }

    /// Whether the destination holds that very content there, as it has told.
    fn is_known(&self, part: Part, digest: impl FnOnce() -> Digest) -> bool {
        let Known::Chunks(pages, chunks) = &self.known else { return false };
        let chunk = part.offset / (u64::from(*pages) * PAGE_SIZE as u64);
        usize::try_from(chunk).ok().and_then(|chunk| chunks.get(chunk)).is_some_and(|known| *known == digest())
    }

    /// Divides what the extents cover into parts.
    fn on_extents(&mut self, asked: &Asked) -> Result<(), DiskError> {
        let kinds: &[&Vec<Extent>] =
            if self.disk.since.is_some() { &[&asked.allocation, &asked.dirty] } else { &[&asked.allocation] };
        let covered =
            kinds.iter().map(|extents| extents.iter().map(|extent| u64::from(extent.length)).sum()).min().unwrap_or(0_u64);
        let covered = covered.min(asked.length.into());
        let step = match &self.known {
            Known::Chunks(pages, _) => pages * PAGE_SIZE as u32,
            Known::Since => REMEMBERED,
            Known::Zeros => GRANULE,
        };
        // To the end of a chunk, or of the disk: a chunk is looked at once.
        let end = asked.offset + covered;
        let end = if end < self.disk.size { end / u64::from(step) * u64::from(step) } else { end };
        if end <= asked.offset {
            // Extents so short say nothing.
            let length = (self.disk.size - asked.offset).min(step.into());
            self.parts.push_back(Part { offset: asked.offset, length: length as u32, is_zero: false });
            self.next = asked.offset + length;
            return Ok(());
        }
        let zeros = Runs::new(asked.offset, &asked.allocation, Extent::is_zero);
        let dirty = Runs::new(asked.offset, &asked.dirty, Extent::is_dirty);
        let mut at = asked.offset;
        while at < end {
            let length = (end - at).min(step.into()) as u32;
            let is_zero = zeros.are_all(at, length);
            let part = Part { offset: at, length, is_zero };
            let skipped = match &self.known {
                Known::Zeros => is_zero,
                Known::Since => !dirty.is_any(at, length),
                Known::Chunks(..) => is_zero && self.is_known(part, || ZERO),
            };
            if skipped {
                self.copied += u64::from(length);
            } else {
                self.add(part);
            }
            at += u64::from(length);
        }
        self.next = end;
        Ok(())
    }

    /// Parts that follow each other are read together, unless they are compared one by one.
    fn add(&mut self, part: Part) {
        let together = !matches!(self.known, Known::Chunks(..)) || part.is_zero;
        let most = if part.is_zero { u32::MAX / 2 } else { READ };
        match self.parts.back_mut() {
            Some(last)
                if together
                    && last.is_zero == part.is_zero
                    && last.offset + u64::from(last.length) == part.offset
                    && last.length.saturating_add(part.length) <= most =>
            {
                last.length += part.length;
            }
            _ => self.parts.push_back(part),
        }
    }

    async fn on_mirror(&mut self) -> Result<(), DiskError> {
        while let Some(request) = self.server.next_request(&mut self.to_mirror)? {
            match request {
                Request::Write { cookie, offset, data } => {
                    self.on_written(offset, data.len() as u64)?;
                    self.send(offset, &data, false).await;
                    self.flush_if_idle();
                    self.owed.push(cookie);
                }
                Request::Zeroes { cookie, offset, length } => {
                    self.on_written(offset, length.into())?;
                    self.send_zeros(Part { offset, length, is_zero: true });
                    self.owed.push(cookie);
                }
                // What is durable is decided at the end.
                Request::Flush { cookie } => Server::put_done(&mut self.to_mirror, cookie),
                Request::Disconnect => {
                    if self.stage != Stage::Copied {
                        return Err(DiskError::TooSoon);
                    }
                    self.flush_to_pump(Frame::ForwardEnd);
                    self.stage = Stage::Ended;
                    tracing::info!(encoding = ?self.encoder.encoding(), "the mirror is through");
                }
            }
        }
        self.flush();
        Ok(())
    }

    fn on_mirror_closed(&self) -> Result<(), DiskError> {
        if self.stage == Stage::Ended { Ok(()) } else { Err(DiskError::Closed) }
    }

    fn on_written(&mut self, offset: u64, length: u64) -> Result<(), DiskError> {
        let page = PAGE_SIZE as u64;
        let end = offset + length;
        if !offset.is_multiple_of(page) || (!end.is_multiple_of(page) && end != self.disk.size) {
            return Err(DiskError::Unaligned { offset, length });
        }
        for reading in &mut self.reading {
            let Part { offset: first, length, .. } = reading.part;
            reading.stale |= first < end && offset < first + u64::from(length);
        }
        Ok(())
    }

    /// Sends pages; the last may be a part of one.
    async fn send(&mut self, offset: u64, data: &[u8], skips_zeros: bool) {
        let data = padded(data);
        let (pages, _) = data.as_chunks::<PAGE_SIZE>();
        let first = (offset / PAGE_SIZE as u64) as u32;
        for (page, content) in (first..).zip(pages) {
            if skips_zeros && is_zero(content) {
                continue;
            }
            self.send_page(page, content).await;
        }
    }

    async fn send_page(&mut self, page: u32, content: &Page) {
        if self.encoder.is_full() {
            self.flush();
            while self.seals.is_full() {
                self.seals.settle().await;
            }
        }
        self.encoder.encode(Place { block: BLOCK, page }, content);
    }

    fn send_zeros(&mut self, part: Part) {
        let page = PAGE_SIZE as u64;
        let (first, pages) = ((part.offset / page) as u32, u64::from(part.length).div_ceil(page) as u32);
        self.flush_to_pump(Frame::Zeros { block: BLOCK, runs: vec![(first, pages)] });
    }

    fn flush_if_idle(&mut self) {
        if self.encoder.is_full() {
            self.flush();
        }
    }

    fn flush(&mut self) {
        if let Some(batch) = self.encoder.take() {
            self.seals.seal(batch);
        }
    }

    /// After all that was sent before.
    fn flush_to_pump(&mut self, frame: Frame) {
        self.flush();
        self.seals.push(frame, 0);
    }
}

/// Whole pages, filled up with zeros.
fn padded(data: &[u8]) -> std::borrow::Cow<'_, [u8]> {
    if data.len().is_multiple_of(PAGE_SIZE) {
        return data.into();
    }
    let mut whole = data.to_vec();
    whole.resize(data.len().next_multiple_of(PAGE_SIZE), 0);
    whole.into()
}

/// Extents of which something is true, as ranges in their order.
struct Runs(Vec<(u64, u64)>);

impl Runs {
    fn new(mut at: u64, extents: &[Extent], is: fn(Extent) -> bool) -> Self {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for extent in extents {
            let end = at + u64::from(extent.length);
            match runs.last_mut() {
                _ if !is(*extent) => {}
                Some((_, last)) if *last == at => *last = end,
                _ => runs.push((at, end)),
            }
            at = end;
        }
        Self(runs)
    }

    /// The first run that ends behind `at`.
    fn from(&self, at: u64) -> Option<(u64, u64)> {
        self.0.get(self.0.partition_point(|(_, end)| *end <= at)).copied()
    }

    fn are_all(&self, at: u64, length: u32) -> bool {
        self.from(at).is_some_and(|(first, end)| first <= at && at + u64::from(length) <= end)
    }

    fn is_any(&self, at: u64, length: u32) -> bool {
        self.from(at).is_some_and(|(first, _)| first < at + u64::from(length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_what_their_extents_say() {
        let extent = |length, flags| Extent { length, flags };
        let runs = Runs::new(100, &[extent(10, 2), extent(10, 2), extent(10, 0), extent(10, 3)], Extent::is_zero);
        assert_eq!(runs.0, [(100, 120), (130, 140)]);
        assert!(runs.are_all(100, 20) && runs.are_all(130, 10));
        assert!(!runs.are_all(110, 20) && !runs.are_all(120, 5) && !runs.are_all(139, 2) && !runs.are_all(90, 20));
        assert!(runs.is_any(90, 11) && runs.is_any(119, 1) && runs.is_any(120, 11));
        assert!(!runs.is_any(90, 10) && !runs.is_any(120, 10) && !runs.is_any(140, 100));
    }

    #[test]
    fn pages_are_filled_up_with_zeros() {
        assert_eq!(padded(&[1; PAGE_SIZE]).len(), PAGE_SIZE);
        let filled = padded(&[1; 512]);
        assert_eq!((filled.len(), filled[511], filled[512]), (PAGE_SIZE, 1, 0));
    }
}
