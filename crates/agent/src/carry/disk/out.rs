//! The source's half of a disk: copies what is there, and passes on what is written to it meanwhile.
//!
//! Both leave in one order. What is under way of the one when the mirror brings a write to the same place may be older than that, so it is not sent; what is
//! newer than a write comes with a later one.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use godwit_carrier::Frame;
use godwit_carrier::frame::{Block, MAX_DIGESTS, MAX_RUNS};
use godwit_carrier::pages::digest::{ZERO, is_zero};
use godwit_carrier::pages::{Digest, Digester, PAGE_SIZE, Page, Place, PlainEncoder};
use godwit_nbd::{ALLOCATION, Client, Event, Extent, Request, Server, dirty_bitmap, put_disconnect, put_read, put_status};
use godwit_qemu::disks::REMEMBERED;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::{BLOCK, DiskError, GRANULE, Ranges, WINDOW, chunk_pages, pages_of, try_read, write_due};
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
const LONGEST_OWED: Duration = Duration::from_secs(1);
/// What may wait here at most, whatever the mirror does: then nothing more is heard of it.
const MOST_HELD: u64 = 128 << 20;
/// What the destination writes is measured while so much waits for it, for so long.
const ENOUGH: u64 = 1 << 20;
const MEASURED: Duration = Duration::from_millis(250);
/// What a run of zeros weighs among what waits.
const ZEROS_WEIGH: u64 = 64 << 10;

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
    /// The destination has said that it has everything.
    Whole,
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
    /// What was written there meanwhile: this may be older.
    written: Ranges,
}

/// The extents of a window, as they come.
#[derive(Default)]
struct Asked {
    cookie: u64,
    offset: u64,
    length: u32,
    allocation: Vec<Extent>,
    dirty: Vec<Extent>,
    /// What was written meanwhile: it may be no zeros any more.
    written: Ranges,
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
    /// Writes of the mirror that have no answer yet, and since when.
    owed: Vec<(u64, Instant)>,
    /// What the mirror has turned to zeros, and is not sent yet.
    zeros: Vec<(u32, u32)>,
    next_cookie: u64,
    /// Up to where extents were asked for.
    next: u64,
    asked: Option<Asked>,
    parts: VecDeque<Part>,
    reading: Vec<Reading>,
    /// Bytes that need not be looked at any more.
    copied: u64,
    /// Since when what the destination writes is measured, and what it had written then; and what it wrote per second, once that is known.
    measured: (Instant, u64),
    rate: u64,
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
            zeros: Vec::new(),
            next_cookie: 1,
            next: 0,
            asked: None,
            parts: VecDeque::new(),
            reading: Vec::new(),
            copied: 0,
            measured: (Instant::now(), 0),
            rate: 0,
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
            // What there was before: room that comes while this works is found the next time.
            let had_room = self.pump.has_room();
            self.go_on();
            self.pay();
            self.measure();
            write_due(&mut mirror, &mut self.to_mirror).await?;
            write_due(&mut disk, &mut self.to_disk).await?;
            tell(self.status());
            let reads_mirror = mirror_open && self.pump.raw_in_flight() < MOST_HELD;
            let wants_room = self.stage == Stage::Copying || !self.owed.is_empty() || !reads_mirror;
            tokio::select! {
                _ = self.seals.settle() => {}
                Some(frame) = frames.recv() => {
                    let size = frame.memory();
                    self.on_frame(frame)?;
                    self.pump.on_dealt(size, true);
                }
                readable = mirror.readable(), if reads_mirror => {
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
                        Some(false) if matches!(self.stage, Stage::Copied | Stage::Ended | Stage::Whole) => disk_open = false,
                        Some(false) => return Err(DiskError::Closed),
                        Some(true) => self.on_disk().await?,
                        None => {}
                    }
                }
                () = self.pump.wait_for_room(), if wants_room && !had_room => {}
                () = self.pump.pause(PAY_EVERY), if !self.owed.is_empty() => {}
                () = self.pump.wait_for_begin(), if self.stage == Stage::Waiting && !self.pump.is_begun() => {}
            }
        }
    }

    fn status(&self) -> DiskStatus {
        let waiting = self.pump.raw_in_flight();
        DiskStatus {
            // What is under way is not there yet.
            looked_at: self.copied.saturating_sub(waiting),
            copied: matches!(self.stage, Stage::Copied | Stage::Ended | Stage::Whole),
            whole: self.stage == Stage::Whole,
            waiting_ms: (waiting * 1_000).checked_div(self.rate).unwrap_or(0),
        }
    }

    /// The mirror's writes are answered as long as not too much waits. Once the VM is to be stopped all are, since it waits for them; and in any case
    /// after a second, since QEMU stands still as long as it waits for one of them for another reason.
    fn pay(&mut self) {
        let little = self.pump.in_flight() < MOST_WAITING && self.pump.raw_in_flight() < MOST_WAITING;
        let all = little || self.pump.has_room() || self.pump.is_hurried();
        let due = if all { self.owed.len() } else { self.owed.partition_point(|(_, since)| since.elapsed() > LONGEST_OWED) };
        for (cookie, _) in self.owed.drain(..due) {
            Server::put_done(&mut self.to_mirror, cookie);
        }
    }

    /// What the destination writes per second, while it has enough to write.
    fn measure(&mut self) {
        let (began, before) = self.measured;
        let (waiting, written) = (self.pump.raw_in_flight(), self.pump.raw_applied());
        if waiting < ENOUGH {
            self.measured = (Instant::now(), written);
        } else if began.elapsed() >= MEASURED {
            let rate = (written - before) as f64 / began.elapsed().as_secs_f64();
            self.rate = rate as u64;
            self.measured = (Instant::now(), written);
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
                // It writes nothing meanwhile, and is at work.
                self.pump.on_sign_of_work();
            }
            (Stage::Comparing, Frame::HeldEnd) => self.stage = Stage::Waiting,
            (Stage::Ended, Frame::ReturnEnd) => self.stage = Stage::Whole,
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
                self.flush_to_pump(Frame::Compare(chunk), 0);
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
                self.copied += u64::from(part.length);
                self.send_zeros(part);
                continue;
            }
            let cookie = self.cookie();
            put_read(&mut self.to_disk, cookie, part.offset, part.length);
            self.reading.push(Reading { cookie, part, data: vec![0; part.length as usize], written: Ranges::default() });
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
        let Reading { part, data, written, .. } = self.reading.swap_remove(at);
        self.copied += u64::from(part.length);
        if self.is_known(part, || self.digester.pages(&padded(&data))) {
            return Ok(());
        }
        let skips_zeros = matches!(self.known, Known::Zeros);
        self.send(part.offset, &data, skips_zeros, &written).await;
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
        let zeros = Ranges::of(asked.offset, &asked.allocation, Extent::is_zero);
        let dirty = Ranges::of(asked.offset, &asked.dirty, Extent::is_dirty);
        let mut at = asked.offset;
        while at < end {
            let length = (end - at).min(step.into()) as u32;
            let is_zero = zeros.are_all(at, length.into()) && !asked.written.is_any(at, length.into());
            let part = Part { offset: at, length, is_zero };
            let skipped = match &self.known {
                Known::Zeros => is_zero,
                Known::Since => !dirty.is_any(at, length.into()),
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
                    self.flush_zeros();
                    self.send(offset, &data, false, &Ranges::default()).await;
                    self.owed.push((cookie, Instant::now()));
                }
                Request::Zeroes { cookie, offset, length } => {
                    self.on_written(offset, length.into())?;
                    self.zeros.push(pages_in(offset, length));
                    if self.zeros.len() == MAX_RUNS {
                        self.flush_zeros();
                    }
                    self.owed.push((cookie, Instant::now()));
                }
                // What is durable is decided at the end.
                Request::Flush { cookie } => Server::put_done(&mut self.to_mirror, cookie),
                // It serves writes alone.
                Request::Read { .. } | Request::Status { .. } => {}
                Request::Disconnect => {
                    if self.stage != Stage::Copied {
                        return Err(DiskError::TooSoon);
                    }
                    self.flush_zeros();
                    self.flush_to_pump(Frame::ForwardEnd, 0);
                    self.stage = Stage::Ended;
                    tracing::info!(encoding = ?self.encoder.encoding(), "the mirror is through");
                }
            }
        }
        self.flush_zeros();
        self.flush();
        while self.seals.is_full() {
            self.seals.settle().await;
        }
        Ok(())
    }

    fn on_mirror_closed(&self) -> Result<(), DiskError> {
        if matches!(self.stage, Stage::Ended | Stage::Whole) { Ok(()) } else { Err(DiskError::Closed) }
    }

    fn on_written(&mut self, offset: u64, length: u64) -> Result<(), DiskError> {
        let page = PAGE_SIZE as u64;
        let end = offset + length;
        if !offset.is_multiple_of(page) || (!end.is_multiple_of(page) && end != self.disk.size) {
            return Err(DiskError::Unaligned { offset, length });
        }
        for Reading { part, written, .. } in &mut self.reading {
            if part.offset < end && offset < part.offset + u64::from(part.length) {
                written.add(offset, end);
            }
        }
        if let Some(asked) = &mut self.asked {
            asked.written.add(offset, end);
        }
        cut(&mut self.parts, offset, end);
        Ok(())
    }

    /// Sends pages, the last of which may be a part of one, but for those that were written meanwhile.
    async fn send(&mut self, offset: u64, data: &[u8], skips_zeros: bool, written: &Ranges) {
        let data = padded(data);
        let (pages, _) = data.as_chunks::<PAGE_SIZE>();
        let first = (offset / PAGE_SIZE as u64) as u32;
        for (page, content) in (first..).zip(pages) {
            let newer = written.is_any(u64::from(page) * PAGE_SIZE as u64, PAGE_SIZE as u64);
            if newer || (skips_zeros && is_zero(content)) {
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
        self.zeros.push(pages_in(part.offset, part.length));
        self.flush_zeros();
    }

    fn flush_zeros(&mut self) {
        let runs = std::mem::take(&mut self.zeros);
        if !runs.is_empty() {
            let weight = runs.len() as u64 * ZEROS_WEIGH;
            self.flush_to_pump(Frame::Zeros { block: BLOCK, runs }, weight);
        }
    }

    fn flush(&mut self) {
        if let Some(batch) = self.encoder.take() {
            self.seals.seal(batch);
        }
    }

    /// After all that was sent before.
    fn flush_to_pump(&mut self, frame: Frame, raw: u64) {
        self.flush();
        self.seals.push(frame, raw);
    }
}

/// First page, and how many, of a range that begins with a page and ends with one or with the disk.
fn pages_in(offset: u64, length: u32) -> (u32, u32) {
    let page = PAGE_SIZE as u64;
    ((offset / page) as u32, u64::from(length).div_ceil(page) as u32)
}

/// Takes a range out of the parts that are to become zero: something newer was sent there.
fn cut(parts: &mut VecDeque<Part>, first: u64, end: u64) {
    let touched = |part: &Part| part.is_zero && part.offset < end && first < part.offset + u64::from(part.length);
    if !parts.iter().any(touched) {
        return;
    }
    let pieces = std::mem::take(parts).into_iter().flat_map(|part| {
        let part_end = part.offset + u64::from(part.length);
        let pieces = if touched(&part) { [(part.offset, first), (end, part_end)] } else { [(part.offset, part_end), (0, 0)] };
        let piece = move |(from, to): (u64, u64)| (from < to).then(|| Part { offset: from, length: (to - from) as u32, ..part });
        pieces.into_iter().filter_map(piece)
    });
    *parts = pieces.collect();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_cut_out_of_what_waits_to_become_zero() {
        let part = |offset, length, is_zero| Part { offset, length, is_zero };
        let mut parts: VecDeque<Part> = [part(0, 100, true), part(100, 50, false), part(150, 50, true)].into();
        for (first, end) in [(90, 110), (20, 30), (150, 200), (500, 600)] {
            cut(&mut parts, first, end);
        }
        assert_eq!(parts, [part(0, 20, true), part(30, 60, true), part(100, 50, false)]);
    }

    #[test]
    fn pages_are_filled_up_with_zeros() {
        assert_eq!(padded(&[1; PAGE_SIZE]).len(), PAGE_SIZE);
        let filled = padded(&[1; 512]);
        assert_eq!((filled.len(), filled[511], filled[512]), (PAGE_SIZE, 1, 0));
    }
}
