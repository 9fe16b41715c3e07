//! The source's half of the way out, around the real stream reader and page encoder: what `crates/agent/src/carry/feed.rs` does.

use std::collections::{BTreeMap, VecDeque};

use bytes::{Bytes, BytesMut};
use godwit_carrier::frame::{Block, MAX_DATA, MAX_WANTED};
use godwit_carrier::pages::{Digest, Digester, Encoder, EncoderLimits, Encoding, Pieces, Place, Sealer};
use godwit_carrier::{Frame, Level};
use godwit_stream::{Element, PAGE_SIZE, PageContent, RamStart, Reader, Writer};

use super::Wrong;
use super::carry::Carry;
use super::destination_qemu::is_ours;
use super::plan::{MILLISECOND, Micros};
use super::rules::{BOUNDED_ENCODER, Broken, Ledger, Write, broken};

/// Room for one read from QEMU.
pub(super) const READ: usize = 256 << 10;
const IDLE_READ: usize = 64;
const IDLE_PAUSE: Micros = 100 * MILLISECOND;
const ASK_EVERY: Micros = 250 * MILLISECOND;
const PING: u16 = 2;
const OUR_QUESTIONS: u32 = 0x4757_0000;

/// What the destination has said of its memory.
#[derive(Default)]
pub(super) struct Holdings {
    pub(super) blocks: Vec<Block>,
    pub(super) common: Vec<Digest>,
    pub(super) held: Vec<(u16, u32, Vec<Digest>)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Section {
    None,
    Part,
    End,
}

pub(super) struct Feed {
    digester: Digester,
    limits: EncoderLimits,
    reader: Reader,
    writer: Writer,
    forward: BytesMut,
    encoder: Option<Encoder>,
    sealer: Sealer,
    /// For each block of the stream its number at the destination.
    placed: Vec<Option<u16>>,
    section: Section,
    part_open: bool,
    idle: bool,
    ended: bool,
    closed: bool,
    hurried: bool,
    pub(super) paused_until: Micros,
    asked: Micros,
    /// The last question, and when it was asked if it is open.
    question: (u32, Option<Micros>),
    /// RAM's start, which waits for the holdings.
    waiting: Option<RamStart>,
    pub(super) holdings: Option<Holdings>,
    /// Pages that were taken in since the last frame.
    writes: Vec<Write>,
    /// Pages that wait for their pieces, and those pieces as the destination has told them.
    kept_back: BTreeMap<(u16, u32), Write>,
    pub(super) told: VecDeque<(u16, Vec<(u32, Pieces)>)>,
    /// Those that are left are the same at the destination.
    quiet: bool,
    streamed: u64,
    wrong: Wrong,
}

impl Feed {
    pub(super) fn new(digester: Digester, limits: EncoderLimits, wrong: Wrong) -> Self {
        Self {
            digester,
            limits,
            reader: Reader::new(),
            writer: Writer::new(),
            forward: BytesMut::new(),
            encoder: None,
            sealer: Sealer::new(),
            placed: vec![],
            section: Section::None,
            part_open: false,
            idle: false,
            ended: false,
            closed: false,
            hurried: false,
            paused_until: 0,
            asked: 0,
            question: (OUR_QUESTIONS, None),
            waiting: None,
            holdings: None,
            writes: vec![],
            kept_back: BTreeMap::new(),
            told: VecDeque::new(),
            quiet: true,
            streamed: 0,
            wrong,
        }
    }

    pub(super) const fn hurry(&mut self) {
        (self.hurried, self.paused_until) = (true, 0);
    }

    /// RAM begins, and the destination has not told yet what it holds.
    pub(super) const fn waits_for_holdings(&self) -> bool {
        self.waiting.is_some()
    }

    /// Whether pages flow.
    pub(super) const fn has_begun(&self) -> bool {
        self.encoder.is_some()
    }

    /// Whether there is something to do now; `readable` if QEMU's socket has bytes or an end.
    pub(super) fn is_busy(&self, readable: bool, carry: &Carry, now: Micros) -> bool {
        if self.waiting.is_some() {
            return self.holdings.is_some();
        }
        let room = carry.session.window().has_room() || self.wrong == Wrong::ReadsWithoutRoom;
        let told = !self.told.is_empty();
        !self.closed && (told || now >= self.paused_until) && room && (readable || told || self.has_taken())
    }

    /// Something was taken in that is not in a frame yet.
    fn has_taken(&self) -> bool {
        !self.forward.is_empty() || !self.quiet || self.encoder.as_ref().is_some_and(|encoder| encoder.unasked() > 0)
    }

    /// Pages that have waited for this go out, as the pieces that differ.
    pub(super) fn on_pieces(&mut self, carry: &mut Carry, now: Micros, ledger: &mut Ledger) {
        ledger.on_read(&carry.session);
        let Some((block, pages)) = self.told.pop_front() else { return };
        for (page, pieces) in pages {
            if self.encoder.as_ref().is_some_and(Encoder::is_full) {
                self.flush_pages(carry, now, ledger);
            }
            if let Some(encoder) = &mut self.encoder {
                encoder.on_pieces(Place { block, page }, &pieces);
                self.writes.extend(self.kept_back.remove(&(block, page)));
            }
        }
        self.flush_pages(carry, now, ledger);
    }

    /// Nothing waits any more.
    fn wait_no_longer(&mut self, carry: &mut Carry, now: Micros, ledger: &mut Ledger) {
        while let Some(encoder) = &mut self.encoder {
            encoder.set_asks(false);
            if encoder.is_full() {
                self.flush_pages(carry, now, ledger);
            } else if let Some(Place { block, page }) = encoder.wait_no_longer() {
                self.writes.extend(self.kept_back.remove(&(block, page)));
                self.quiet = false;
            } else {
                break;
            }
        }
    }

    /// Asks for the pieces of what waits.
    fn ask_for_pieces(&mut self, carry: &mut Carry, now: Micros, ledger: &mut Ledger) {
        self.flush_pages(carry, now, ledger);
        let Some(encoder) = &mut self.encoder else { return };
        let mut asked: Vec<(u16, Vec<u32>)> = vec![];
        while let Some(place) = encoder.ask() {
            match asked.last_mut() {
                Some((block, pages)) if *block == place.block && pages.len() < MAX_WANTED => pages.push(place.page),
                _ => asked.push((place.block, vec![place.page])),
            }
        }
        for (block, pages) in asked {
            carry.push(Frame::Wanted { block, pages }, 0, vec![], now, ledger);
        }
    }

    /// How long the destination's QEMU has not answered.
    pub(super) fn unanswered(&self, now: Micros) -> Micros {
        self.question.1.map_or(0, |asked| now - asked)
    }

    /// The destination's QEMU has answered: whether one of our questions.
    pub(super) fn on_qemu_answered(&mut self, number: u32) -> bool {
        if self.question.0 == number {
            self.question.1 = None;
        }
        is_ours(number)
    }

    /// How pages went so far, and how many in QEMU's own stream.
    pub(super) fn encoding(&self) -> (Encoding, u64) {
        (self.encoder.as_ref().map(Encoder::encoding).unwrap_or_default(), self.streamed)
    }

    /// How much would be read next.
    pub(super) const fn limit(&self) -> usize {
        if self.idle && !self.ended && !self.hurried { IDLE_READ } else { READ }
    }

    /// One turn: what was read from QEMU, or nothing, or the end.
    pub(super) fn step(
        &mut self,
        read: Option<&[u8]>,
        carry: &mut Carry,
        now: Micros,
        ledger: &mut Ledger,
    ) -> Result<Result<(), String>, Broken> {
        ledger.on_read(&carry.session);
        let Some(read) = read else {
            self.flush(carry, now, ledger);
            let writes = std::mem::take(&mut self.writes);
            carry.push(Frame::ForwardEnd, 0, writes, now, ledger);
            self.closed = true;
            return Ok(Ok(()));
        };
        if let Some(start) = self.waiting.take() {
            let Some(holdings) = self.holdings.take() else { return Ok(Ok(())) };
            self.begin(&start, holdings);
            if let Err(error) = self.pass(Element::RamStart(start), carry, now, ledger) {
                return Ok(Err(error));
            }
        } else if read.is_empty() {
            self.flush(carry, now, ledger);
            return Ok(Ok(()));
        } else {
            self.idle = true;
            self.reader.buffer_mut().extend_from_slice(read);
        }
        loop {
            match self.reader.next_element() {
                Ok(Some(Element::RamStart(start))) if self.encoder.is_none() => {
                    self.waiting = Some(start);
                    break;
                }
                Ok(Some(element)) => {
                    if let Err(error) = self.pass(element, carry, now, ledger) {
                        return Ok(Err(error));
                    }
                }
                Ok(None) => break,
                Err(error) => return Ok(Err(error.to_string())),
            }
        }
        if self.idle && !self.ended && self.section == Section::None && self.encoder.is_some() {
            self.flush(carry, now, ledger);
            if !self.hurried {
                self.paused_until = now + IDLE_PAUSE;
            }
        }
        self.check_memory()?;
        Ok(Ok(()))
    }

    fn check_memory(&self) -> Result<(), Broken> {
        let Some(encoder) = &self.encoder else { return Ok(()) };
        let used = encoder.used();
        if used.signatures > self.limits.signatures || used.contents > self.limits.contents {
            return broken(BOUNDED_ENCODER, format!("{used:?} of {:?}", self.limits));
        }
        Ok(())
    }

    fn begin(&mut self, start: &RamStart, holdings: Holdings) {
        let number = |id: &[u8], pages: u64| {
            let same = |block: &Block| block.id == id && u64::from(block.pages) == pages;
            holdings.blocks.iter().position(same).and_then(|number| u16::try_from(number).ok())
        };
        self.placed = start.blocks.iter().map(|block| number(block.id.as_bytes(), block.pages())).collect();
        let length = |(number, block): (u16, &Block)| {
            let known = self.placed.contains(&Some(number)) || self.wrong == Wrong::CopiesFromWhatQemuWrites;
            if known { block.pages } else { 0 }
        };
        let lengths: Vec<u32> = (0..).zip(&holdings.blocks).map(length).collect();
        let mut encoder = Encoder::new(self.digester.clone(), &lengths, self.limits);
        encoder.set_common(holdings.common);
        for (block, first, digests) in holdings.held {
            for (page, digest) in (first..).zip(digests) {
                encoder.on_held(Place { block, page }, digest);
            }
        }
        self.encoder = Some(encoder);
    }

    fn pass(&mut self, element: Element, carry: &mut Carry, now: Micros, ledger: &mut Ledger) -> Result<(), String> {
        match &element {
            Element::PartBegin => self.section = Section::Part,
            Element::PartEnd => {
                self.section = Section::None;
                if std::mem::take(&mut self.part_open) {
                    self.write(&element)?;
                }
                if now - self.asked >= ASK_EVERY {
                    self.flush(carry, now, ledger);
                }
            }
            Element::Page { block, page, content } => {
                self.idle = false;
                let place = self.placed.get(usize::from(block.0)).copied().flatten();
                match (place, u32::try_from(*page), self.encoder.is_some()) {
                    (Some(number), Ok(page), true) => {
                        let at = (usize::from(block.0), page);
                        self.encode(Place { block: number, page }, at, content, carry, now, ledger)?;
                    }
                    _ => self.write_page(&element)?,
                }
            }
            _ => {
                if let Element::EndBegin = element {
                    (self.section, self.ended) = (Section::End, true);
                }
                if matches!(element, Element::EndEnd | Element::Opaque(_)) {
                    self.wait_no_longer(carry, now, ledger);
                }
                if matches!(element, Element::Opaque(_)) {
                    self.ended = true;
                }
                self.idle = false;
                self.write(&element)?;
            }
        }
        if self.forward.len() >= READ {
            self.flush(carry, now, ledger);
        }
        Ok(())
    }

    fn write(&mut self, element: &Element) -> Result<(), String> {
        self.writer.write(element, &mut self.forward).map_err(|error| error.to_string())
    }

    fn encode(
        &mut self,
        place: Place,
        at: (usize, u32),
        content: &PageContent,
        carry: &mut Carry,
        now: Micros,
        ledger: &mut Ledger,
    ) -> Result<(), String> {
        let Some(encoder) = &mut self.encoder else { return Err("no encoder".into()) };
        let (page, kept): (_, Option<Bytes>) = match content {
            PageContent::Zero => (None, None),
            PageContent::Data(data) => (data.first_chunk::<PAGE_SIZE>(), Some(data.clone())),
        };
        encoder.set_asks(!self.ended && !self.hurried);
        if !encoder.encode(place, page) {
            return Err(format!("page {place:?} is none"));
        }
        self.kept_back.remove(&(place.block, place.page));
        if encoder.is_waiting(place) {
            self.kept_back.insert((place.block, place.page), (at, kept));
        } else {
            self.writes.push((at, kept));
        }
        self.quiet = false;
        let asks = encoder.unasked() >= MAX_WANTED;
        if encoder.is_full() {
            self.flush_pages(carry, now, ledger);
        }
        if asks {
            self.ask_for_pieces(carry, now, ledger);
        }
        Ok(())
    }

    /// A page of a block that the destination's carry does not place travels in the stream.
    fn write_page(&mut self, element: &Element) -> Result<(), String> {
        if self.section == Section::Part && !self.part_open {
            self.write(&Element::PartBegin)?;
            self.part_open = true;
        }
        self.streamed += 1;
        self.write(element)
    }

    fn flush_pages(&mut self, carry: &mut Carry, now: Micros, ledger: &mut Ledger) {
        let Some(encoder) = &mut self.encoder else { return };
        if let Some(batch) = encoder.take() {
            let writes = std::mem::take(&mut self.writes);
            let payload = self.sealer.seal(&batch, Level::default());
            encoder.on_sealed(&batch, payload.len());
            carry.push(Frame::Pages(payload), batch.raw, writes, now, ledger);
        }
        self.quiet = true;
    }

    /// Between sections the destination's QEMU takes questions.
    fn ask(&mut self, now: Micros) {
        let between = self.section == Section::None && !self.ended && self.encoder.is_some() && self.reader.tunnelled().is_none();
        if between && now - self.asked >= ASK_EVERY && self.question.1.is_none() {
            let number = OUR_QUESTIONS | (self.question.0.wrapping_add(1) & 0xffff);
            (self.question, self.asked) = ((number, Some(now)), now);
            let ping = Element::Command { number: PING, payload: Bytes::copy_from_slice(&number.to_be_bytes()) };
            self.write(&ping).expect("commands may come between sections");
        }
    }

    /// Everything that was taken in goes out: pages first, since what follows may rely on them.
    fn flush(&mut self, carry: &mut Carry, now: Micros, ledger: &mut Ledger) {
        self.ask(now);
        if self.wrong != Wrong::LetsTheStreamOvertakePages {
            self.ask_for_pieces(carry, now, ledger);
        }
        while !self.forward.is_empty() {
            let piece = self.forward.split_to(self.forward.len().min(MAX_DATA)).freeze();
            let raw = piece.len() as u64;
            let writes = if self.quiet { std::mem::take(&mut self.writes) } else { vec![] };
            carry.push(Frame::Forward(piece), raw, writes, now, ledger);
        }
        self.flush_pages(carry, now, ledger);
    }
}
