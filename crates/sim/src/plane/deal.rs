//! What becomes of frames that came, and of what the QEMUs write, around the real page applier and return path: what
//! `crates/agent/src/carry/deal.rs` does.

use bytes::BytesMut;
use godwit_carrier::Frame;
use godwit_carrier::frame::{Block, MAX_DIGESTS};
use godwit_carrier::pages::digest::ZERO;
use godwit_carrier::pages::{Applier, ApplyError, Digest, Digester};
use godwit_stream::{ReturnMessage, ReturnReader, ReturnWriter};

use godwit_carrier::Side;

use super::Wrong;
use super::carry::Ended;
use super::feed::Holdings;
use super::guest::{Placed, common};
use super::plan::{Mark, Micros, SECOND};
use super::rules::{self, Broken, broken};
use super::world::{Event, World};

const LINGER: Micros = 3 * SECOND;
/// QEMU's answers are short.
const RETURN_READ: usize = 16 << 10;

/// The source's half.
#[derive(Default)]
pub(super) struct AtSource {
    reader: ReturnReader,
    writer: ReturnWriter,
    holdings: Option<Holdings>,
}

/// The destination's half.
pub(super) struct AtDestination {
    applier: Applier,
    digester: Digester,
    /// Blocks by their numbers.
    placed: Vec<usize>,
    told: bool,
    /// Bytes of the oldest frame that QEMU has taken.
    written: usize,
    returned: bool,
}

impl AtDestination {
    pub(super) const fn new(applier: Applier, digester: Digester, placed: Vec<usize>) -> Self {
        Self { applier, digester, placed, told: false, written: 0, returned: false }
    }
}

/// Says, once, where pages are placed and what is there.
pub(super) fn tell_holdings(world: &mut World) {
    if std::mem::replace(&mut world.at_destination.told, true) {
        return;
    }
    let placed = world.at_destination.placed.clone();
    let name = |place: &usize| {
        let block = &world.plan.blocks[*place];
        Block { id: block.name.as_bytes().into(), pages: block.told() }
    };
    let mut frames = vec![Frame::Memory(placed.iter().map(name).collect())];
    let shared = common();
    world.at_destination.applier.set_common(shared.len() as u32);
    frames.push(Frame::Common(shared.iter().map(|page| world.at_destination.digester.page(page)).collect()));
    for (number, place) in (0_u16..).zip(&placed) {
        let pages = world.plan.blocks[*place].pages;
        let digest = |page: u32| world.at_destination.digester.page(world.destination_qemu.memory.page((*place, page)));
        let mut run: Option<(u32, Vec<Digest>)> = None;
        for page in 0..pages {
            let digest = digest(page);
            match &mut run {
                Some((_, digests)) if digest != ZERO && digests.len() < MAX_DIGESTS => digests.push(digest),
                _ => {
                    frames.extend(run.take().map(|(first, digests)| Frame::Held { block: number, first, digests }));
                    run = (digest != ZERO).then(|| (page, vec![digest]));
                }
            }
        }
        frames.extend(run.map(|(first, digests)| Frame::Held { block: number, first, digests }));
    }
    frames.push(Frame::HeldEnd);
    for frame in frames {
        world.destination.push(frame, 0, vec![], world.now, &mut world.ledger);
    }
    if matches!(world.wrong, Wrong::HoldsWhatIsOutdated | Wrong::IgnoresChecks) {
        // Something else writes there afterwards.
        for at in world.destination_qemu.memory.places() {
            if placed.contains(&at.0) && world.destination_qemu.memory.page(at) != &[0; 4096] && world.random.one_in(4) {
                let page = world.random.page();
                world.destination_qemu.memory.set(at, page);
                world.ledger.on_changed(at, page);
            }
        }
    }
}

impl World {
    /// Whether the source's carry finds bytes, or an end, at its QEMU's socket.
    pub(super) fn is_source_readable(&self) -> bool {
        let qemu = &self.source_qemu;
        !qemu.socket.is_empty() || qemu.closed || !qemu.alive || qemu.hung_up
    }

    pub(super) fn feed_on(&mut self) -> Result<(), Broken> {
        if !self.feed.told.is_empty() && self.feed.has_begun() {
            self.feed.on_pieces(&mut self.source, self.now, &mut self.ledger);
            return Ok(());
        }
        let most = self.feed.limit();
        let most = most.min(1 + self.random.index(most));
        let count = self.source_qemu.socket.len().min(most);
        let waits = self.feed.waits_for_holdings();
        let ended = count == 0 && self.is_source_readable() && !waits;
        let data = if waits { BytesMut::new() } else { self.source_qemu.socket.split_to(count) };
        let began = self.feed.has_begun();
        let read = if ended { None } else { Some(&data[..]) };
        let fed = self.feed.step(read, &mut self.source, self.now, &mut self.ledger)?;
        if let Err(why) = fed {
            self.end_carry(Side::Source, Ended::Failed(why));
        }
        if !began && self.feed.has_begun() {
            self.mark(Mark::Warming);
        }
        Ok(())
    }

    pub(super) fn deal_at_source(&mut self) -> Result<(), Broken> {
        let Some(frame) = self.source.queue.pop_front() else { return Ok(()) };
        let done = match &frame {
            Frame::Return(data) => self.pass_answers(data),
            Frame::ReturnEnd => {
                self.after(LINGER, Event::HangUp);
                Ok(())
            }
            Frame::Memory(blocks) => {
                self.at_source.holdings = Some(Holdings { blocks: blocks.clone(), common: vec![], held: vec![] });
                Ok(())
            }
            Frame::Common(digests) => {
                let holdings = self.at_source.holdings.as_mut().ok_or("pages of other VMs and no memory");
                holdings.map(|holdings| holdings.common.extend(digests)).map_err(str::to_owned)
            }
            Frame::Held { block, first, digests } => {
                let holdings = self.at_source.holdings.as_mut().ok_or("digests of no memory");
                holdings.map(|holdings| holdings.held.push((*block, *first, digests.clone()))).map_err(str::to_owned)
            }
            Frame::Pieces { block, pages } => {
                self.feed.told.push_back((*block, pages.clone()));
                Ok(())
            }
            _ => {
                self.feed.holdings = self.at_source.holdings.take();
                Ok(())
            }
        };
        if let Err(why) = done {
            self.end_carry(Side::Source, Ended::Failed(why));
            return Ok(());
        }
        self.ledger.on_dealt(Side::Destination, &frame, &self.destination_qemu.memory)?;
        self.source.on_dealt(&frame, true);
        Ok(())
    }

    /// The answers to our own questions are taken out of the return path.
    fn pass_answers(&mut self, data: &[u8]) -> Result<(), String> {
        let AtSource { reader, writer, .. } = &mut self.at_source;
        reader.buffer_mut().extend_from_slice(data);
        let mut kept = BytesMut::new();
        while let Some(message) = reader.next_message().map_err(|error| error.to_string())? {
            if !matches!(message, ReturnMessage::Pong(number) if self.feed.on_qemu_answered(number)) {
                writer.write(&message, &mut kept).map_err(|error| error.to_string())?;
            }
        }
        self.source_qemu.hear(&kept);
        Ok(())
    }

    pub(super) fn can_deal(&self) -> bool {
        match self.destination.queue.front() {
            Some(Frame::Forward(_)) => !self.destination_qemu.alive || self.destination_qemu.room() > 0,
            Some(_) => true,
            None => false,
        }
    }

    pub(super) fn deal_at_destination(&mut self) -> Result<(), Broken> {
        let Some(frame) = self.destination.queue.front().cloned() else { return Ok(()) };
        match &frame {
            Frame::Forward(data) if self.destination_qemu.alive => {
                let rest = &data[self.at_destination.written..];
                let count = rest.len().min(self.destination_qemu.room());
                self.destination_qemu.socket.extend_from_slice(&rest[..count]);
                self.at_destination.written += count;
                if count < rest.len() {
                    return Ok(());
                }
                self.at_destination.written = 0;
            }
            Frame::Pages(_) if !self.destination_qemu.alive => {
                self.end_carry(Side::Destination, Ended::QemuGone);
                return Ok(());
            }
            Frame::Pages(payload) => {
                let AtDestination { applier, placed, .. } = &mut self.at_destination;
                let mut memory = Placed { memory: &mut self.destination_qemu.memory, blocks: placed };
                match applier.apply(payload, &mut memory) {
                    Ok(_) => {}
                    Err(ApplyError::Check { .. }) if self.wrong == Wrong::IgnoresChecks => {}
                    Err(error) => {
                        self.end_carry(Side::Destination, Ended::Failed(error.to_string()));
                        return Ok(());
                    }
                }
            }
            Frame::Wanted { block, pages } => {
                let AtDestination { digester, placed, .. } = &self.at_destination;
                let place = placed.get(usize::from(*block)).copied().unwrap_or_default();
                let told = |page: &u32| (*page, digester.told_pieces(self.destination_qemu.memory.page((place, *page))));
                let answer = Frame::Pieces { block: *block, pages: pages.iter().map(told).collect() };
                self.destination.push(answer, 0, vec![], self.now, &mut self.ledger);
            }
            Frame::ForwardEnd => self.destination_qemu.input_ended = true,
            _ => {}
        }
        self.destination.queue.pop_front();
        if self.destination_qemu.alive {
            self.ledger.on_dealt(Side::Source, &frame, &self.destination_qemu.memory)?;
        }
        let done = self.destination_qemu.alive;
        self.destination.on_dealt(&frame, done);
        Ok(())
    }

    /// A wrong carry: all that the source's QEMU wrote is acknowledged, and so it is told that all was loaded.
    pub(super) fn make_up_the_last_word(&mut self) {
        let all = self.source_qemu.has_device_written() && self.source.session.is_settled() && self.source_qemu.socket.is_empty();
        if all {
            self.source_qemu.hear(&[0, 1, 0, 4, 0, 0, 0, 0]);
        }
    }

    pub(super) fn can_return(&self) -> bool {
        let qemu = &self.destination_qemu;
        !qemu.returns.is_empty() || (!self.at_destination.returned && (qemu.returns_ended || !qemu.alive))
    }

    pub(super) fn return_on(&mut self) {
        let count = self.destination_qemu.returns.len().min(1 + self.random.index(RETURN_READ));
        let frame = if count == 0 {
            self.at_destination.returned = true;
            Frame::ReturnEnd
        } else {
            Frame::Return(self.destination_qemu.returns.split_to(count).freeze())
        };
        self.destination.push(frame, count as u64, vec![], self.now, &mut self.ledger);
    }

    pub(super) fn source_qemu_on(&mut self) -> Result<(), Broken> {
        let before = self.source_qemu.has_device_written();
        self.source_qemu.step(self.now, &mut self.ledger, &mut self.random)?;
        if !before && self.source_qemu.has_device_written() {
            if self.source_qemu.runs() || !self.agents.has_stopped() {
                return broken(rules::ORDER, "device state is written and the VM was not stopped by us");
            }
            self.mark(Mark::Device);
        }
        Ok(())
    }

    pub(super) fn destination_qemu_on(&mut self) -> Result<(), Broken> {
        let had = self.destination_qemu.returns_ended;
        let last = &self.source_qemu.last;
        let on_device = |memory: &super::guest::Memory| match last.as_ref().map(|last| last.difference(memory)) {
            Some(None) => Ok(()),
            Some(Some(at)) => broken(rules::MEMORY_EQUAL, format!("page {at:?} when the device state comes")),
            None => broken(rules::ORDER, "device state comes that was not written"),
        };
        self.destination_qemu.step(self.now, &self.source_qemu.device, &mut self.ledger, &mut self.random, on_device)?;
        if !had && self.destination_qemu.returns_ended {
            self.mark(Mark::Loaded);
        }
        Ok(())
    }
}
