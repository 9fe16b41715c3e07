//! The destination's half of a disk: writes what comes through the NBD server of the QEMU that waits, several frames at once, in an order in which no two that
//! touch the same place overtake each other.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;

use bytes::{Bytes, BytesMut};
use godwit_carrier::frame::Block;
use godwit_carrier::pages::digest::ZERO;
use godwit_carrier::pages::{Applier, ApplyError, Digest, Digester, FIRST_IMAGE, GuestMemory, PAGE_SIZE, Page};
use godwit_carrier::{Frame, Image};
use godwit_nbd::{ALLOCATION, Client, Event, Extent, put_disconnect, put_flush, put_read, put_status, put_write, put_write_zeroes};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::{BLOCK, DiskError, Ranges, WINDOW, is_chunk, pages_of, try_read, write_due};
use crate::carry::control::DiskStatus;
use crate::carry::images::ReadableImage;
use crate::carry::pump::Pump;

/// Most bytes that QEMU is given to write at once, and most requests.
const MOST_WRITING: u64 = 8 << 20;
const MOST_REQUESTS: usize = 128;
/// Room for one read from the socket.
const BUFFER: usize = 256 << 10;
/// Zeros are asked for in pieces of at most so many bytes.
const MOST_ZEROS: u64 = 1 << 30;
/// So much is written before it is made durable: what is left of that at the end is blackout.
const FLUSH_EVERY: u64 = 16 << 20;
/// Digests that are told at once: the source is to hear of the work every few seconds at most.
const MOST_TOLD: usize = 256;

/// What of the disk is here already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::carry) struct WaitingDisk {
    pub(in crate::carry) size: u64,
    /// An older content, as of this generation, or of an unknown one, which is 0. None: all of it is zero.
    pub(in crate::carry) base: Option<u64>,
}

/// The disk as it arrives.
pub(in crate::carry) struct DiskInto<'a> {
    pump: &'a Pump,
    socket: UnixStream,
    client: Client,
    due: BytesMut,
    images: Vec<ReadableImage>,
    disk: WaitingDisk,
    pages: u32,
    next_cookie: u64,
    /// Frames that are being written, oldest first.
    frames: VecDeque<Writing>,
    /// The number of the oldest.
    first: u64,
    requests: Vec<Written>,
    /// Bytes that are not known to be durable.
    unflushed: u64,
    compared: bool,
    whole: bool,
}

/// A frame of which some is not written yet.
struct Writing {
    memory: usize,
    left: usize,
}

/// A request under way.
struct Written {
    cookie: u64,
    frame: u64,
    first: u64,
    end: u64,
}

/// What a batch wants written where, and the images that it may name.
struct Collecting<'a> {
    images: &'a [ReadableImage],
    writes: Vec<(u64, Bytes)>,
}

impl GuestMemory for Collecting<'_> {
    type Error = io::Error;

    fn read(&mut self, block: u16, page: u32, into: &mut Page) -> Result<(), Self::Error> {
        let image = block.checked_sub(FIRST_IMAGE).and_then(|image| self.images.get(usize::from(image)));
        image.ok_or_else(|| io::Error::other("a page of a disk is no copy of another"))?.read(page, into)
    }

    fn write(&mut self, _: u16, page: u32, content: &[u8]) -> Result<(), Self::Error> {
        let offset = u64::from(page) * PAGE_SIZE as u64;
        self.writes.push((offset, Bytes::copy_from_slice(content)));
        Ok(())
    }
}

impl<'a> DiskInto<'a> {
    pub(in crate::carry) fn new(
        pump: &'a Pump,
        socket: UnixStream,
        export: &str,
        images: Vec<ReadableImage>,
        disk: WaitingDisk,
    ) -> Result<Self, DiskError> {
        Ok(Self {
            pump,
            socket,
            client: Client::new(export, vec![ALLOCATION.to_owned()], true),
            due: BytesMut::new(),
            images,
            pages: pages_of(disk.size)?,
            disk,
            next_cookie: 1,
            frames: VecDeque::new(),
            first: 0,
            requests: Vec::new(),
            unflushed: 0,
            compared: false,
            whole: false,
        })
    }

    /// Shakes hands with QEMU, which does not wait long for that.
    pub(in crate::carry) async fn meet(&mut self) -> Result<(), DiskError> {
        match self.event().await? {
            Event::Ready { size } if size == self.disk.size => Ok(()),
            Event::Ready { size } => Err(DiskError::Size { here: pages_of(size)?, there: self.pages }),
            _ => Err(DiskError::Unexpected("an answer before the beginning")),
        }
    }

    /// After that; never returns but with an error.
    pub(in crate::carry) async fn run(
        mut self,
        digester: Digester,
        mut frames: mpsc::UnboundedReceiver<Frame>,
        tell: impl Fn(DiskStatus),
    ) -> Result<Infallible, DiskError> {
        let told: Vec<u32> = self.images.iter().map(|image| image.told().pages).collect();
        let mut applier = Applier::new(digester.clone(), vec![self.pages]).with_images(told);
        self.pump.push(&Frame::Memory(vec![Block { id: Bytes::from_static(b"disk"), pages: self.pages }]), 0);
        let images: Vec<Image> = self.images.iter().map(ReadableImage::told).collect();
        if !images.is_empty() {
            self.pump.push(&Frame::Images(images), 0);
        }
        if let Some(generation) = self.disk.base {
            self.pump.push(&Frame::Base(generation), 0);
        }
        self.pump.push(&Frame::HeldEnd, 0);
        loop {
            tell(DiskStatus { whole: self.whole, ..DiskStatus::default() });
            tokio::select! {
                Some(frame) = frames.recv(), if self.has_room() => self.deal(frame, &digester, &mut applier).await?,
                event = self.event_if(!self.requests.is_empty()) => {
                    self.on_event(&event?)?;
                    self.acknowledge();
                }
                else => return std::future::pending().await,
            }
        }
    }

    fn has_room(&self) -> bool {
        let bytes: u64 = self.requests.iter().map(|written| written.end - written.first).sum();
        self.requests.is_empty() || (bytes < MOST_WRITING && self.requests.len() < MOST_REQUESTS)
    }

    async fn event_if(&mut self, wanted: bool) -> Result<Event, DiskError> {
        if wanted { self.event().await } else { std::future::pending().await }
    }

    /// What QEMU says next. Nothing is lost if this is given up.
    async fn event(&mut self) -> Result<Event, DiskError> {
        loop {
            if let Some(event) = self.client.next_event(&mut self.due)? {
                write_due(&mut self.socket, &mut self.due).await?;
                return Ok(event);
            }
            write_due(&mut self.socket, &mut self.due).await?;
            self.socket.readable().await?;
            if try_read(&self.socket, self.client.buffer_mut(), BUFFER)? == Some(false) {
                return Err(DiskError::Closed);
            }
        }
    }

    async fn deal(&mut self, frame: Frame, digester: &Digester, applier: &mut Applier) -> Result<(), DiskError> {
        let memory = frame.memory();
        if self.whole {
            return Err(DiskError::Unexpected("something behind the end"));
        }
        let number = self.first + self.frames.len() as u64;
        self.frames.push_back(Writing { memory, left: 0 });
        match frame {
            Frame::Pages(payload) => {
                let mut collecting = Collecting { images: &self.images, writes: Vec::new() };
                let applied = applier.apply(&payload, &mut collecting);
                let writes = collecting.writes;
                applied.map_err(|error| match error {
                    ApplyError::Image { image } => {
                        DiskError::Image(self.images.get(usize::from(image)).map(|image| image.told().digest).unwrap_or_default())
                    }
                    ApplyError::Memory(error) => DiskError::Apply(error.to_string()),
                    other => DiskError::Apply(other.to_string()),
                })?;
                self.pump.on_read(writes.iter().map(|(_, data)| data.len() as u64).sum());
                for (offset, data) in writes {
                    // The last page of a disk may be a part of one.
                    let length = (self.disk.size - offset).min(data.len() as u64);
                    let data = data.slice(..usize::try_from(length).unwrap_or(0));
                    let cookie = self.request(number, offset, length).await?;
                    put_write(&mut self.due, cookie, offset, &data);
                    write_due(&mut self.socket, &mut self.due).await?;
                    self.unflushed += length;
                }
                if self.unflushed >= FLUSH_EVERY {
                    self.unflushed = 0;
                    // It touches no place, and nothing waits for it.
                    let cookie = self.request(number, self.disk.size, 0).await?;
                    put_flush(&mut self.due, cookie);
                    write_due(&mut self.socket, &mut self.due).await?;
                }
            }
            Frame::Zeros { block: BLOCK, runs } => {
                for (first, pages) in runs {
                    if first.checked_add(pages).is_none_or(|end| end > self.pages) {
                        return Err(DiskError::Unexpected("zeros beyond the disk"));
                    }
                    self.zero(number, first, pages).await?;
                }
            }
            Frame::Compare(chunk) => {
                if self.disk.base.is_none() || self.compared || !is_chunk(chunk) {
                    return Err(DiskError::Unexpected("a question about a content that is not there"));
                }
                self.compared = true;
                self.drain().await?;
                // The source is not to take the time that it takes for a standstill.
                self.acknowledge();
                self.tell_digests(chunk, digester).await?;
            }
            Frame::ForwardEnd => {
                self.drain().await?;
                let cookie = self.cookie();
                put_flush(&mut self.due, cookie);
                match self.event().await? {
                    Event::Done { .. } => {}
                    Event::Failed { error, .. } => return Err(DiskError::Disk { what: "written to the end", error }),
                    _ => return Err(DiskError::Unexpected("another answer than to a flush")),
                }
                put_disconnect(&mut self.due);
                write_due(&mut self.socket, &mut self.due).await?;
                // A connection that is made anew takes what was taken for dealt with: only this says that it was.
                self.pump.push(&Frame::ReturnEnd, 0);
                self.whole = true;
                tracing::info!("the disk is whole");
            }
            _ => return Err(DiskError::Unexpected("a frame that does not belong there")),
        }
        self.acknowledge();
        Ok(())
    }

    async fn zero(&mut self, frame: u64, first: u32, pages: u32) -> Result<(), DiskError> {
        let mut at = u64::from(first) * PAGE_SIZE as u64;
        let end = ((u64::from(first) + u64::from(pages)) * PAGE_SIZE as u64).min(self.disk.size);
        while at < end {
            let length = (end - at).min(MOST_ZEROS);
            let cookie = self.request(frame, at, length).await?;
            put_write_zeroes(&mut self.due, cookie, at, length as u32);
            write_due(&mut self.socket, &mut self.due).await?;
            at += length;
        }
        Ok(())
    }

    fn cookie(&mut self) -> u64 {
        self.next_cookie += 1;
        self.next_cookie
    }

    /// Notes a request of a frame, after all that touch the same place are done.
    async fn request(&mut self, frame: u64, first: u64, length: u64) -> Result<u64, DiskError> {
        let end = first + length;
        while self.requests.iter().any(|other| other.first < end && first < other.end) || self.requests.len() >= MOST_REQUESTS {
            let event = self.event().await?;
            self.on_event(&event)?;
        }
        let cookie = self.cookie();
        self.requests.push(Written { cookie, frame, first, end });
        if let Some(writing) = self.writing(frame) {
            writing.left += 1;
        }
        Ok(cookie)
    }

    fn writing(&mut self, frame: u64) -> Option<&mut Writing> {
        usize::try_from(frame.checked_sub(self.first)?).ok().and_then(|at| self.frames.get_mut(at))
    }

    fn on_event(&mut self, event: &Event) -> Result<(), DiskError> {
        match event {
            Event::Done { cookie } => {
                let Some(at) = self.requests.iter().position(|written| written.cookie == *cookie) else {
                    return Err(DiskError::Unexpected("an answer that nobody waits for"));
                };
                let Written { frame, .. } = self.requests.swap_remove(at);
                if let Some(writing) = self.writing(frame) {
                    writing.left -= 1;
                }
                // The last may be the one that is being dealt with, which is not through when its first request is.
                while self.frames.len() > 1 && self.frames.front().is_some_and(|writing| writing.left == 0) {
                    self.acknowledge_first();
                }
                Ok(())
            }
            Event::Failed { error, .. } => Err(DiskError::Disk { what: "written", error: *error }),
            _ => Err(DiskError::Unexpected("an answer of another kind")),
        }
    }

    /// What is written.
    fn acknowledge(&mut self) {
        while self.frames.front().is_some_and(|writing| writing.left == 0) {
            self.acknowledge_first();
        }
    }

    fn acknowledge_first(&mut self) {
        if let Some(Writing { memory, .. }) = self.frames.pop_front() {
            self.first += 1;
            self.pump.on_dealt(memory, true);
        }
    }

    /// Waits until nothing is under way.
    async fn drain(&mut self) -> Result<(), DiskError> {
        while !self.requests.is_empty() {
            let event = self.event().await?;
            self.on_event(&event)?;
        }
        Ok(())
    }

    /// Says what is here already, chunk by chunk; what is not named is zero.
    async fn tell_digests(&mut self, chunk: u32, digester: &Digester) -> Result<(), DiskError> {
        let chunk_bytes = u64::from(chunk) * PAGE_SIZE as u64;
        let (mut at, mut run): (u64, Option<(u32, Vec<Digest>)>) = (0, None);
        let (mut zeros, mut known_until) = (Ranges::default(), 0);
        while at < self.disk.size {
            let length = (self.disk.size - at).min(chunk_bytes);
            if at + length > known_until {
                (zeros, known_until) = self.zeros_from(at).await?;
            }
            let digest = if zeros.are_all(at, length) { ZERO } else { self.digest_of(at, length as u32, digester).await? };
            let number = u32::try_from(at / chunk_bytes).unwrap_or(u32::MAX);
            run = match run.take() {
                Some((first, mut digests)) if digest != ZERO && digests.len() < MOST_TOLD => {
                    digests.push(digest);
                    Some((first, digests))
                }
                before => {
                    self.tell_run(before).await;
                    (digest != ZERO).then(|| (number, vec![digest]))
                }
            };
            at += length;
        }
        self.tell_run(run).await;
        self.pump.push(&Frame::HeldEnd, 0);
        Ok(())
    }

    async fn tell_run(&self, run: Option<(u32, Vec<Digest>)>) {
        if let Some((first, digests)) = run {
            self.pump.wait_for_room().await;
            self.pump.push(&Frame::Held { block: BLOCK, first, digests }, 0);
        }
    }

    /// Where there is nothing but zeros, and up to where that is known: at least a chunk.
    async fn zeros_from(&mut self, at: u64) -> Result<(Ranges, u64), DiskError> {
        let cookie = self.cookie();
        let length = (self.disk.size - at).min(WINDOW) as u32;
        put_status(&mut self.due, cookie, at, length);
        let (mut zeros, mut until) = (Ranges::default(), at);
        loop {
            match self.event().await? {
                Event::Status { extents, .. } => {
                    until = at + extents.iter().map(|extent| u64::from(extent.length)).sum::<u64>();
                    zeros = Ranges::of(at, &extents, Extent::is_zero);
                }
                Event::Done { .. } => return Ok((zeros, until)),
                Event::Failed { error, .. } => return Err(DiskError::Disk { what: "looked at", error }),
                _ => return Err(DiskError::Unexpected("an answer of another kind")),
            }
        }
    }

    async fn digest_of(&mut self, at: u64, length: u32, digester: &Digester) -> Result<Digest, DiskError> {
        let cookie = self.cookie();
        put_read(&mut self.due, cookie, at, length);
        let mut content = vec![0; (length as usize).next_multiple_of(PAGE_SIZE)];
        loop {
            match self.event().await? {
                Event::Data { offset, data, .. } => {
                    let from = offset.checked_sub(at).and_then(|from| usize::try_from(from).ok());
                    let into = from.and_then(|from| content.get_mut(from..from.checked_add(data.len())?));
                    into.ok_or(DiskError::Unexpected("data that nobody asked for"))?.copy_from_slice(&data);
                }
                Event::Hole { .. } => {}
                Event::Done { .. } => return Ok(digester.pages(&content)),
                Event::Failed { error, .. } => return Err(DiskError::Disk { what: "read", error }),
                _ => return Err(DiskError::Unexpected("an answer of another kind")),
            }
        }
    }
}
