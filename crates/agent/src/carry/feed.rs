//! The source's half of the way out: takes QEMU's stream apart, has the pages encoded, and passes all else on.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use godwit_carrier::Frame;
use godwit_carrier::frame::{Block, MAX_DATA};
use godwit_carrier::pages::{Digest, Digester, Encoder, EncoderLimits, Place};
use godwit_stream::{Element, PAGE_SIZE, PageContent, RamStart, Reader, StreamError, WriteError, Writer};
use tokio::net::unix::OwnedReadHalf;

use super::pump::Pump;

/// Room for one read from QEMU: so much is encoded before anything else is looked at.
const READ: usize = 256 << 10;
/// While QEMU has nothing to send it goes through its memory again and again, as fast as it is read: a core for nothing. So much is read
/// then, three sections at most, and so often. What piles up in the socket meanwhile is less than a quarter of a MiB, and flows at once when there is hurry.
const IDLE_READ: usize = 64;
const IDLE_PAUSE: Duration = Duration::from_millis(100);

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
}

/// What the destination has said of its memory.
#[derive(Debug, Default)]
pub(super) struct Holdings {
    /// Where it places pages itself.
    pub(super) blocks: Vec<Block>,
    /// Digests of consecutive pages: block, first page.
    pub(super) held: Vec<(u16, u32, Vec<Digest>)>,
}

/// Which section of RAM the reader is in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Section {
    None,
    Part,
    End,
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
    /// For each block of the stream its number at the destination, if that places its pages.
    placed: Vec<Option<u16>>,
    section: Section,
    /// A part was begun for the destination's QEMU, since it has a page that its carry does not place.
    part_open: bool,
    /// Nothing that was read lately was a page, or anything else that a destination needs.
    idle: bool,
    /// RAM is through: from here on all is device state, and the VM stands still.
    ended: bool,
    asked: Instant,
}

impl<'a> Feed<'a> {
    pub(super) fn new(pump: &'a Pump, digester: Digester) -> Self {
        Self {
            pump,
            digester,
            reader: Reader::new(),
            writer: Writer::new(),
            forward: BytesMut::new(),
            encoder: None,
            placed: Vec::new(),
            section: Section::None,
            part_open: false,
            idle: false,
            ended: false,
            asked: Instant::now(),
        }
    }

    /// Runs until QEMU closes its side, which is passed on.
    pub(super) async fn run(mut self, qemu: &OwnedReadHalf, holdings: impl Future<Output = Holdings>) -> Result<(), FeedError> {
        let mut holdings = Some(Box::pin(holdings));
        while let Some(count) = self.read(qemu).await {
            let mut began = Instant::now();
            self.idle = true;
            while let Some(element) = self.reader.next_element()? {
                if let Element::RamStart(start) = &element
                    && let Some(holdings) = holdings.take()
                {
                    self.begin(start, holdings.await);
                    began = Instant::now();
                }
                self.pass(element)?;
            }
            self.pump.on_encoded(count, began.elapsed());
            tokio::task::yield_now().await;
        }
        self.flush();
        self.pump.push(&Frame::ForwardEnd, 0);
        Ok(())
    }

    /// Reads what there is, and answers how many bytes; what was read before goes out if there is nothing. `None` at the end.
    async fn read(&mut self, qemu: &OwnedReadHalf) -> Option<u64> {
        self.pump.wait_for_room().await;
        if self.idle && !self.ended && self.section == Section::None && self.encoder.is_some() {
            self.flush();
            self.pump.pause(IDLE_PAUSE).await;
        }
        loop {
            let limit = if self.idle && !self.ended && !self.pump.is_hurried() { IDLE_READ } else { READ };
            let buffer = self.reader.buffer_mut();
            buffer.reserve(READ);
            match qemu.try_read_buf(&mut bytes::BufMut::limit(buffer, limit)) {
                Ok(0) => return None,
                Ok(count) => {
                    self.pump.on_read(count as u64);
                    return Some(count as u64);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    self.flush();
                    if qemu.readable().await.is_err() {
                        return None;
                    }
                }
                Err(_) => return None,
            }
        }
    }

    /// Learns which blocks the destination places, and what it holds of them.
    fn begin(&mut self, start: &RamStart, holdings: Holdings) {
        let number = |id: &[u8], pages: u64| {
            let same = |block: &Block| block.id == id && u64::from(block.pages) == pages;
            holdings.blocks.iter().position(same).and_then(|number| u16::try_from(number).ok())
        };
        self.placed = start.blocks.iter().map(|block| number(block.id.as_bytes(), block.pages())).collect();
        // Of a block whose pages travel in the stream nothing is known: QEMU writes to it, and so no page is a copy of one of its.
        let length = |(number, block): (u16, &Block)| if self.placed.contains(&Some(number)) { block.pages } else { 0 };
        let lengths: Vec<u32> = (0..).zip(&holdings.blocks).map(length).collect();
        let mut encoder = Encoder::new(self.digester.clone(), &lengths, EncoderLimits::default());
        for (block, first, digests) in holdings.held {
            for (page, digest) in (first..).zip(digests) {
                encoder.on_held(Place { block, page }, digest);
            }
        }
        let (placed, told) = (self.placed.iter().flatten().count(), lengths.len());
        if placed < told {
            tracing::warn!(
                placed,
                told,
                "the destination names blocks of memory that QEMU does not have: they go through its socket"
            );
        }
        tracing::info!(blocks = start.blocks.len(), placed, "memory begins");
        self.encoder = Some(encoder);
    }

    fn pass(&mut self, element: Element) -> Result<(), FeedError> {
        match &element {
            Element::PartBegin => self.section = Section::Part,
            Element::PartEnd => {
                self.section = Section::None;
                if std::mem::take(&mut self.part_open) {
                    self.writer.write(&element, &mut self.forward)?;
                }
                // QEMU keeps a section's last bytes until it has more: while pages flow, this is the one moment between sections.
                if self.asked.elapsed() >= ASK_EVERY {
                    self.flush();
                }
            }
            Element::Page { block, page, content } => {
                self.idle = false;
                let place = self.placed.get(usize::from(block.0)).copied().flatten();
                let page = u32::try_from(*page).ok();
                match (place, page, &mut self.encoder) {
                    (Some(block), Some(page), Some(_)) => self.encode(Place { block, page }, content)?,
                    _ => self.write_page(&element)?,
                }
            }
            _ => {
                if let Element::EndBegin = element {
                    (self.section, self.ended) = (Section::End, true);
                }
                if matches!(element, Element::Opaque(_)) {
                    self.ended = true;
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

    fn encode(&mut self, place: Place, content: &PageContent) -> Result<(), FeedError> {
        let none = FeedError::Page { block: place.block, page: place.page };
        let Some(encoder) = &mut self.encoder else { return Err(none) };
        let content = match content {
            PageContent::Zero => None,
            PageContent::Data(data) => match data.first_chunk::<PAGE_SIZE>() {
                Some(page) => Some(page),
                None => return Err(none),
            },
        };
        // A page that is left out is a VM that is another.
        if !encoder.encode(place, content) {
            return Err(none);
        }
        if encoder.is_full() {
            self.flush_pages();
        }
        Ok(())
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
            self.pump.push(&Frame::Pages(batch.payload), batch.raw);
        }
        self.pump.on_cost(encoder.cost_again(), encoder.encoding());
    }

    /// Pages go to memory past the destination's QEMU: whether that lives must be asked. Between sections it takes questions.
    fn ask(&mut self) {
        let between = self.section == Section::None && !self.ended && self.encoder.is_some() && self.reader.tunnelled().is_none();
        if between
            && self.asked.elapsed() >= ASK_EVERY
            && let Some(number) = self.pump.ask_qemu()
        {
            self.asked = Instant::now();
            let ping = Element::Command { number: PING, payload: Bytes::copy_from_slice(&number.to_be_bytes()) };
            if let Err(error) = self.writer.write(&ping, &mut self.forward) {
                tracing::error!(%error, "the destination's QEMU cannot be asked");
            }
        }
    }

    /// Everything that was taken in goes out: pages first, since what follows may rely on them.
    fn flush(&mut self) {
        self.ask();
        self.flush_pages();
        while !self.forward.is_empty() {
            let piece = self.forward.split_to(self.forward.len().min(MAX_DATA)).freeze();
            let raw = piece.len() as u64;
            self.pump.push(&Frame::Forward(piece), raw);
        }
    }
}
