//! The QEMU of the destination: reads what it is given, answers over the return path, and waits to be told to run.

use bytes::{Bytes, BytesMut};
use godwit_migration::{QemuMigration, Vcpus};
use godwit_stream::{Element, PageContent, RamBlock, Reader, ReturnMessage, ReturnWriter};

use super::guest::Memory;
use super::plan::{MILLISECOND, Micros, Plan};
use super::random::Random;
use super::rules::{Broken, Ledger, STREAM, broken};
use super::source_qemu;

const PING: u16 = 2;
/// Numbers of the carries' own questions.
const OUR_QUESTIONS: u32 = 0x4757_0000;

pub(super) const fn is_ours(number: u32) -> bool {
    number & 0xffff_0000 == OUR_QUESTIONS
}

pub(super) struct DestinationQemu {
    pub(super) alive: bool,
    pub(super) vcpus: Vcpus,
    pub(super) migration: QemuMigration,
    pub(super) memory: Memory,
    blocks: Vec<RamBlock>,
    reader: Reader,
    /// The socket from carry, and whether that has closed it.
    pub(super) socket: BytesMut,
    pub(super) input_ended: bool,
    pub(super) frozen_until: Micros,
    buffer: usize,
    /// What came of the device state.
    pub(super) device: BytesMut,
    load_until: Option<Micros>,
    writer: ReturnWriter,
    /// What carry has not read yet.
    pub(super) returns: BytesMut,
    pub(super) returns_ended: bool,
}

impl DestinationQemu {
    pub(super) fn new(plan: &Plan, source: &Memory, random: &mut Random) -> Self {
        Self {
            alive: true,
            vcpus: Vcpus::InMigrate,
            migration: QemuMigration::None,
            memory: Memory::of_destination(plan, source, random),
            blocks: source_qemu::blocks(plan),
            reader: Reader::new(),
            socket: BytesMut::new(),
            input_ended: false,
            frozen_until: 0,
            buffer: plan.buffer,
            device: BytesMut::new(),
            load_until: None,
            writer: ReturnWriter::new(),
            returns: BytesMut::new(),
            returns_ended: false,
        }
    }

    pub(super) fn runs(&self) -> bool {
        self.alive && self.vcpus == Vcpus::Running
    }

    /// Room in its socket.
    pub(super) fn room(&self) -> usize {
        if self.returns_ended { usize::MAX } else { self.buffer.saturating_sub(self.socket.len()) }
    }

    pub(super) fn is_busy(&self, now: Micros) -> bool {
        let loads = self.load_until.is_some_and(|until| now >= until);
        let reads = !self.socket.is_empty() || (self.input_ended && self.load_until.is_none());
        self.alive && now >= self.frozen_until && !self.returns_ended && (loads || reads)
    }

    pub(super) const fn loads_until(&self) -> Option<Micros> {
        if self.returns_ended { None } else { self.load_until }
    }

    /// Reads a piece of what it was given. `on_device` is called before the first byte of device state is looked at.
    pub(super) fn step(
        &mut self,
        now: Micros,
        whole_device: &Bytes,
        ledger: &mut Ledger,
        random: &mut Random,
        on_device: impl Fn(&Memory) -> Result<(), Broken>,
    ) -> Result<(), Broken> {
        if let Some(until) = self.load_until {
            if now >= until {
                self.complete(ledger);
            }
            return Ok(());
        }
        self.migration = QemuMigration::Active;
        let most = random.between(1, 32 << 10) as usize;
        let count = most.min(self.socket.len());
        self.reader.buffer_mut().extend_from_slice(&self.socket.split_to(count));
        loop {
            match self.reader.next_element() {
                Ok(Some(Element::Opaque(bytes))) => {
                    if self.device.is_empty() {
                        on_device(&self.memory)?;
                    }
                    self.device.extend_from_slice(&bytes);
                    if !whole_device.starts_with(&self.device) {
                        return broken(STREAM, "the device state differs");
                    }
                }
                Ok(Some(element)) => self.on_element(&element, ledger)?,
                Ok(None) => break,
                Err(error) => return broken(STREAM, error.to_string()),
            }
        }
        if self.device.len() == whole_device.len() {
            self.load_until = Some(now + random.between(1, 80) * MILLISECOND);
        } else if self.input_ended && self.socket.is_empty() {
            self.fail(ledger, random);
        }
        Ok(())
    }

    fn on_element(&mut self, element: &Element, ledger: &mut Ledger) -> Result<(), Broken> {
        match element {
            Element::RamStart(start) if start.blocks != self.blocks => return broken(STREAM, "the blocks differ"),
            Element::Page { block, page, content } => {
                let page = u32::try_from(*page).expect("blocks are small");
                let content = match content {
                    PageContent::Zero => [0; 4096],
                    PageContent::Data(data) => *data.first_chunk().expect("a page"),
                };
                self.memory.set((usize::from(block.0), page), content);
            }
            Element::Command { number: PING, payload } => {
                let number = payload.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
                self.say(ReturnMessage::Pong(number), ledger);
            }
            _ => {}
        }
        Ok(())
    }

    fn say(&mut self, message: ReturnMessage, ledger: &mut Ledger) {
        self.writer.write(&message, &mut self.returns).expect("no bitmap is open");
        if !matches!(message, ReturnMessage::Pong(number) if is_ours(number)) {
            ledger.on_said(message);
        }
    }

    fn complete(&mut self, ledger: &mut Ledger) {
        self.migration = QemuMigration::Completed;
        self.vcpus = Vcpus::Paused;
        self.say(ReturnMessage::Shut(0), ledger);
        self.returns_ended = true;
    }

    /// Its stream ended too early.
    fn fail(&mut self, ledger: &mut Ledger, random: &mut Random) {
        self.migration = QemuMigration::Failed;
        if random.one_in(2) {
            self.say(ReturnMessage::Shut(1), ledger);
        }
        self.returns_ended = true;
        self.alive = random.one_in(2);
    }
}
