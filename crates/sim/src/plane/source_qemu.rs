//! The QEMU of the source: runs the guest, writes its migration stream as QEMU does, and waits for the last word of its peer.

use bytes::{Bytes, BytesMut};
use godwit_migration::{QemuMigration, Vcpus};
use godwit_stream::{
    BlockId, BlockIndex, Configuration, Element, PAGE_SIZE, PageContent, RamBlock, RamStart, ReturnMessage, ReturnReader,
    Subsection, Writer,
};

use super::guest::{self, At, Memory};
use super::plan::{MILLISECOND, Micros, Plan, SECOND};
use super::random::Random;
use super::rules::{Broken, Ledger, RETURN_PATH, broken};

const OPEN_RETURN_PATH: u16 = 1;
const PING: u16 = 2;
const SWITCHOVER_START: u16 = 11;

/// Section number of RAM.
const RAM: u32 = 2;

pub(super) struct SourceQemu {
    pub(super) alive: bool,
    pub(super) vcpus: Vcpus,
    pub(super) migration: QemuMigration,
    pub(super) memory: Memory,
    /// What the guest wrote to since the last collection.
    log: Vec<bool>,
    /// What is to be sent in this pass.
    pass: Vec<bool>,
    next: usize,
    places: Vec<At>,
    writer: Writer,
    began: bool,
    /// Written and not yet in the socket.
    pending: BytesMut,
    /// The socket to carry, and whether this side has closed it.
    pub(super) socket: BytesMut,
    pub(super) closed: bool,
    /// Carry has closed it.
    pub(super) hung_up: bool,
    returns: ReturnReader,
    /// Bytes of the return path that it has not looked at.
    unread: BytesMut,
    blocks: Vec<RamBlock>,
    pub(super) device: Bytes,
    device_written: bool,
    /// The memory that belongs to the device state.
    pub(super) last: Option<Memory>,
    resumes: bool,
    held_back: bool,
    buffer: usize,
    synced: Micros,
    dirty_rate: Option<u64>,
    budget: u64,
    /// It has nothing to do before.
    pub(super) idle_until: Micros,
}

impl SourceQemu {
    pub(super) fn new(plan: &Plan, random: &mut Random) -> Self {
        let memory = Memory::of_source(plan, random);
        let places = memory.places();
        let length = random.between(100, 90_000) as usize;
        let mut device = vec![4];
        device.extend_from_slice(&(length as u32).to_be_bytes());
        device.extend((0..length).map(|_| random.next() as u8));
        Self {
            alive: true,
            vcpus: Vcpus::Running,
            migration: QemuMigration::None,
            log: vec![false; places.len()],
            pass: vec![false; places.len()],
            next: 0,
            memory,
            places,
            writer: Writer::new(),
            began: false,
            pending: BytesMut::new(),
            socket: BytesMut::new(),
            closed: false,
            hung_up: false,
            returns: ReturnReader::new(),
            unread: BytesMut::new(),
            blocks: blocks(plan),
            device: device.into(),
            device_written: false,
            last: None,
            resumes: false,
            held_back: plan.held_back,
            buffer: plan.buffer,
            synced: 0,
            dirty_rate: None,
            budget: plan.guest.budget,
            idle_until: 0,
        }
    }

    pub(super) fn runs(&self) -> bool {
        self.alive && self.vcpus == Vcpus::Running
    }

    /// The guest's turn.
    pub(super) fn run_guest(&mut self, plan: &Plan, random: &mut Random) {
        if !self.runs() {
            return;
        }
        for _ in 0..plan.guest.writes.min(self.budget) {
            self.budget -= 1;
            for at in guest::write(&mut self.memory, &plan.guest, random) {
                if let Ok(place) = self.places.binary_search(&at) {
                    self.log[place] = true;
                }
            }
        }
    }

    pub(super) const fn is_under_way(&self) -> bool {
        matches!(self.migration, QemuMigration::Active | QemuMigration::PreSwitchover | QemuMigration::Device)
    }

    /// Pages still to send in this pass, in bytes.
    pub(super) fn remaining(&self) -> u64 {
        (self.pass.iter().filter(|dirty| **dirty).count() * PAGE_SIZE) as u64
    }

    pub(super) const fn dirty_rate(&self) -> Option<u64> {
        self.dirty_rate
    }

    pub(super) const fn since_sync(&self, now: Micros) -> Micros {
        now - self.synced
    }

    /// Whether there is something to do now.
    pub(super) fn is_busy(&self, now: Micros) -> bool {
        let writes = !self.pending.is_empty() && self.socket.len() < self.buffer;
        let makes = self.pending.is_empty()
            && self.is_under_way()
            && now >= self.idle_until
            && self.migration != QemuMigration::PreSwitchover;
        let hears = !self.unread.is_empty();
        let ends = self.migration == QemuMigration::Cancelling || (self.hung_up && self.is_under_way());
        self.alive && (hears || ends || (!self.closed && (writes || (makes && !self.device_written))))
    }

    /// Carry writes to its socket.
    pub(super) fn hear(&mut self, data: &[u8]) {
        self.unread.extend_from_slice(data);
    }

    pub(super) fn migrate(&mut self) -> bool {
        let can = self.alive && self.migration == QemuMigration::None;
        if can {
            self.migration = QemuMigration::Active;
        }
        can
    }

    /// Our stop, which changes nothing once QEMU has stopped the VM itself.
    pub(super) fn stop(&mut self) {
        if self.vcpus == Vcpus::Running {
            self.vcpus = Vcpus::Paused;
        }
    }

    pub(super) fn continue_switch_over(&mut self) {
        if self.migration == QemuMigration::PreSwitchover {
            self.migration = QemuMigration::Device;
        }
    }

    pub(super) fn cancel(&mut self) {
        if self.is_under_way() {
            self.migration = QemuMigration::Cancelling;
        }
    }

    pub(super) fn run_on(&mut self) {
        if matches!(self.vcpus, Vcpus::Paused | Vcpus::PostMigrate) {
            self.vcpus = Vcpus::Running;
        }
    }

    fn come_to_nothing(&mut self, migration: QemuMigration) {
        self.migration = migration;
        if self.vcpus == Vcpus::FinishMigrate {
            self.vcpus = match (self.resumes, self.held_back) {
                (true, _) => Vcpus::Running,
                (false, true) => Vcpus::Paused,
                (false, false) => Vcpus::PostMigrate,
            };
        }
        self.close();
    }

    fn close(&mut self) {
        self.closed = true;
        self.pending.clear();
    }

    /// Reads what the peer has said.
    fn listen(&mut self, ledger: &mut Ledger) -> Result<(), Broken> {
        self.returns.buffer_mut().extend_from_slice(&self.unread.split());
        loop {
            match self.returns.next_message() {
                Ok(Some(message)) => {
                    ledger.on_heard(&message)?;
                    self.on_return(&message);
                }
                Ok(None) => return Ok(()),
                Err(error) => return broken(RETURN_PATH, error.to_string()),
            }
        }
    }

    fn on_return(&mut self, message: &ReturnMessage) {
        match message {
            ReturnMessage::Shut(0) if self.migration == QemuMigration::Device && self.device_written && self.pending.is_empty() => {
                self.migration = QemuMigration::Completed;
                self.vcpus = Vcpus::PostMigrate;
                self.close();
            }
            ReturnMessage::Shut(_) if self.is_under_way() => self.come_to_nothing(QemuMigration::Failed),
            _ => {}
        }
    }

    /// One step of the thread that migrates; what it wrote is in the socket.
    pub(super) fn step(&mut self, now: Micros, ledger: &mut Ledger, random: &mut Random) -> Result<(), Broken> {
        self.listen(ledger)?;
        self.migrate_on(now, random);
        Ok(())
    }

    fn migrate_on(&mut self, now: Micros, random: &mut Random) {
        if self.migration == QemuMigration::Cancelling {
            return self.come_to_nothing(QemuMigration::Cancelled);
        }
        if self.hung_up && self.is_under_way() {
            return self.come_to_nothing(QemuMigration::Failed);
        }
        if self.pending.is_empty() && now >= self.idle_until && !self.device_written {
            self.make(now, random);
        }
        let room = self.buffer.saturating_sub(self.socket.len()).min(self.pending.len());
        let most = random.between(1, 32 << 10) as usize;
        self.socket.extend_from_slice(&self.pending.split_to(room.min(most)));
    }

    fn make(&mut self, now: Micros, random: &mut Random) {
        match (self.migration, self.vcpus) {
            (QemuMigration::Active, _) if !self.began => self.begin(now),
            (QemuMigration::Active, Vcpus::FinishMigrate) => self.migration = QemuMigration::PreSwitchover,
            (QemuMigration::Active, Vcpus::Paused) if self.remaining() <= random.below(64) * PAGE_SIZE as u64 => self.finish(now),
            (QemuMigration::Active, _) => self.make_part(now, random),
            (QemuMigration::Device, _) => self.make_end(random),
            _ => {}
        }
    }

    fn put(&mut self, element: &Element) {
        self.writer.write(element, &mut self.pending).expect("a QEMU keeps the order of its stream");
    }

    fn begin(&mut self, now: Micros) {
        self.began = true;
        self.put(&Element::Header);
        let machine = "pc-q35-7.2".into();
        self.put(&Element::Configuration(Configuration { machine, subsections: vec![Subsection::Uuid([7; 16])] }));
        self.put(&Element::Command { number: OPEN_RETURN_PATH, payload: Bytes::new() });
        self.put(&ping(1));
        self.put(&Element::RamStart(RamStart { section: RAM, instance: 0, blocks: self.blocks.clone(), multifd_flush: false }));
        self.pass.fill(true);
        self.log.fill(false);
        self.synced = now;
    }

    /// A QEMU collects dirty pages at the end of a pass.
    fn collect(&mut self, now: Micros) {
        let mut count = 0;
        for (pass, log) in self.pass.iter_mut().zip(&mut self.log) {
            count += u64::from(*log);
            *pass |= std::mem::take(log);
        }
        let time = (now - self.synced).max(MILLISECOND);
        self.dirty_rate = Some(count * PAGE_SIZE as u64 * SECOND / time);
        (self.synced, self.next) = (now, 0);
    }

    fn make_part(&mut self, now: Micros, random: &mut Random) {
        let pages = self.next_pages(random.between(1, 80) as usize);
        self.put(&Element::PartBegin);
        let none = pages.is_empty();
        self.put_pages(pages);
        self.put(&Element::PartEnd);
        if !none {
            return;
        }
        self.collect(now);
        if self.remaining() > 0 {
            return;
        }
        if self.vcpus == Vcpus::Paused {
            self.finish(now);
        } else if !self.held_back && random.one_in(60) {
            self.resumes = true;
            self.finish(now);
        } else {
            self.idle_until = now + random.between(1, 60) * MILLISECOND;
        }
    }

    /// The VM stands still for the switch-over.
    fn finish(&mut self, now: Micros) {
        self.vcpus = Vcpus::FinishMigrate;
        self.collect(now);
    }

    fn make_end(&mut self, random: &mut Random) {
        if random.one_in(2) {
            self.put(&Element::Command { number: SWITCHOVER_START, payload: Bytes::new() });
        }
        self.put(&Element::EndBegin);
        let pages = self.next_pages(usize::MAX);
        self.put_pages(pages);
        self.put(&Element::EndEnd);
        self.put(&ping(3));
        let device = self.device.clone();
        self.put(&Element::Opaque(device));
        (self.device_written, self.last) = (true, Some(self.memory.clone()));
    }

    /// Whether device state was written.
    pub(super) const fn has_device_written(&self) -> bool {
        self.device_written
    }

    fn next_pages(&mut self, most: usize) -> Vec<At> {
        let mut pages = vec![];
        while self.next < self.places.len() && pages.len() < most {
            if std::mem::take(&mut self.pass[self.next]) {
                pages.push(self.places[self.next]);
            }
            self.next += 1;
        }
        pages
    }

    fn put_pages(&mut self, pages: Vec<At>) {
        for at in pages {
            let content = self.memory.page(at);
            let zero = godwit_carrier::pages::digest::is_zero(content);
            let content = if zero { PageContent::Zero } else { PageContent::Data(Bytes::copy_from_slice(content)) };
            self.put(&Element::Page { block: BlockIndex(at.0 as u16), page: at.1.into(), content });
        }
    }
}

/// The blocks as the stream lists them.
pub(super) fn blocks(plan: &Plan) -> Vec<RamBlock> {
    let block = |name: &str, pages: u32| RamBlock {
        id: BlockId::new(name.as_bytes()).expect("a short name"),
        length: u64::from(pages) * PAGE_SIZE as u64,
    };
    plan.blocks.iter().map(|plan| block(plan.name, plan.pages)).collect()
}

fn ping(number: u32) -> Element {
    Element::Command { number: PING, payload: Bytes::copy_from_slice(&number.to_be_bytes()) }
}
