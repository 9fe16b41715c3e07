//! What becomes of the peer's frames, in their order: the destination's go to memory and QEMU, the source's to QEMU and to the [`super::feed`].

use std::io;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use godwit_carrier::frame::MAX_RUNS;
use godwit_carrier::pages::{Applier, ApplyError, Digester, GuestMemory, PAGE_SIZE, Place};
use godwit_carrier::{Frame, Image};
use godwit_stream::{ReturnError, ReturnMessage, ReturnReader, ReturnWriteError, ReturnWriter};
use rustix::net::Shutdown;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{mpsc, oneshot};

use super::after::MissedPages;
use super::arrive::{Arrival, NotItsPart};
use super::behind::WriteBehind;
use super::feed::ToldPieces;
use super::holdings::{Hearing, Holdings, Telling, told_blocks};
use super::home::Bringing;
use super::images::ReadableImage;
use super::memory::ProcessMemory;
use super::neighbours::Neighbours;
use super::pump::{ADVISED, LOADED, Pump};

/// How long the source's QEMU may keep its socket after the destination's QEMU closed: longer than it needs to close by itself.
const LINGER: Duration = Duration::from_secs(3);
/// How often what post-copy costs the guest is told.
const TELL_EVERY: Duration = Duration::from_millis(250);

/// Why the peer's frames cannot be dealt with.
#[derive(Debug, thiserror::Error)]
pub(super) enum DealError {
    #[error("the peer's pages cannot be applied: {0}")]
    Apply(String),
    #[error("an image is another here than at the source: one of the disks is damaged. This host forgets its copy: try again")]
    Image([u8; 32]),
    #[error("the memory of the destination's QEMU cannot be looked at: {0}")]
    Memory(#[from] io::Error),
    #[error("the destination's QEMU has closed its socket with memory missing")]
    QemuGone,
    #[error("the return path is not understood: {0}")]
    Return(#[from] ReturnError),
    #[error("the return path cannot be written again: {0}")]
    ReturnWrite(#[from] ReturnWriteError),
    #[error("the peer sent {0}, which is not its part")]
    Unexpected(NotItsPart),
}

impl From<ApplyError<io::Error>> for DealError {
    fn from(error: ApplyError<io::Error>) -> Self {
        match error {
            ApplyError::Memory(error) => Self::Memory(error),
            other => Self::Apply(other.to_string()),
        }
    }
}

/// Writes to a QEMU until it is gone, which is for others to find out.
struct ToQemu {
    qemu: OwnedWriteHalf,
    gone: bool,
}

impl ToQemu {
    async fn write(&mut self, data: &Bytes) {
        self.gone = self.gone || self.qemu.write_all(data).await.is_err();
    }

    fn close(&self, how: Shutdown) {
        // Closed already is as good.
        let _ = rustix::net::shutdown(self.qemu.as_ref(), how);
    }
}

/// What the destination's QEMU says that is for its carry, and whether it is set up for post-copy.
pub(super) struct FromQemu {
    pub(super) advises: bool,
    /// It has prepared for post-copy.
    pub(super) advised: oneshot::Receiver<()>,
    /// It asks for pages.
    pub(super) asks: mpsc::Receiver<ReturnMessage>,
}

/// The destination, as it deals with frames.
struct Destination<'a> {
    pump: &'a Pump,
    qemu: ToQemu,
    digester: Digester,
    applier: Applier,
    /// The memory of a QEMU that waits; none once the VM may run.
    memory: Option<WriteBehind>,
    /// As long as not all was told that is in it.
    telling: Option<Telling>,
    images: Vec<Image>,
    /// Of post-copy, if that is possible.
    arrival: Option<Arrival>,
    ended: bool,
}

/// The destination: never returns but with an error. `prepare` begins to bring back what was kept of the memory, and names the neighbours; `tell` is told what post-copy costs the guest.
pub(super) async fn at_destination(
    pump: &Pump,
    qemu: OwnedWriteHalf,
    mut frames: mpsc::UnboundedReceiver<Frame>,
    digester: Digester,
    (mut memory, mut from_qemu): (Option<WriteBehind>, FromQemu),
    prepare: impl AsyncFnOnce(&mut WriteBehind) -> (Bringing, Neighbours),
    tell: impl Fn(&Arrival),
) -> Result<std::convert::Infallible, DealError> {
    let mut qemu = ToQemu { qemu, gone: false };
    if from_qemu.advises {
        pump.push(&Frame::Advise, 0);
        wait_for_advice(pump, &mut qemu, &mut frames, &mut from_qemu.advised).await?;
    }
    let telling = match &mut memory {
        Some(memory) => {
            let (bringing, neighbours) = prepare(memory).await;
            Some(Telling::begin(pump, memory.memory(), bringing, neighbours))
        }
        None => {
            pump.push(&Frame::Memory(vec![]), 0);
            pump.push(&Frame::HeldEnd, 0);
            None
        }
    };
    let placed = memory.as_ref().map(WriteBehind::memory);
    let blocks = placed.map(told_blocks).unwrap_or_default();
    let images: Vec<Image> = placed.into_iter().flat_map(ProcessMemory::images).map(ReadableImage::told).collect();
    let applier = Applier::new(digester.clone(), blocks.iter().map(|block| block.pages).collect());
    let applier = applier.with_images(images.iter().map(|image| image.pages).collect());
    let arrival = Arrival::new(&blocks).filter(|_| from_qemu.advises);
    let destination = Destination { pump, qemu, digester, applier, memory, telling, images, arrival, ended: false };
    destination.run(frames, from_qemu.asks, tell).await
}

/// The destination in a session that goes on after a switch, with a QEMU that runs, was told to resume, and waits for pages; never returns but with an
/// error.
pub(super) async fn at_destination_again(
    pump: &Pump,
    qemu: OwnedWriteHalf,
    frames: mpsc::UnboundedReceiver<Frame>,
    digester: Digester,
    (memory, section): (ProcessMemory, u32),
    from_qemu: FromQemu,
    tell: impl Fn(&Arrival),
) -> Result<std::convert::Infallible, DealError> {
    let blocks = told_blocks(&memory);
    let absent = memory.absent()?;
    tracing::info!(pages = absent.len(), "goes on without these");
    pump.push(&Frame::Memory(blocks.clone()), 0);
    for block in 0..absent.blocks() {
        for runs in absent.runs(block).chunks(MAX_RUNS) {
            pump.push(&Frame::Absent { block, runs: runs.to_vec() }, 0);
        }
    }
    pump.push(&Frame::HeldEnd, 0);
    let applier = Applier::new(digester.clone(), blocks.iter().map(|block| block.pages).collect());
    let arrival = Arrival::again(&blocks, section, absent);
    let qemu = ToQemu { qemu, gone: false };
    let (memory, telling, images) = (None, None, Vec::new());
    let destination = Destination { pump, qemu, digester, applier, memory, telling, images, arrival, ended: false };
    destination.run(frames, from_qemu.asks, tell).await
}

/// Passes on what comes before RAM's start, until QEMU has prepared for post-copy.
async fn wait_for_advice(
    pump: &Pump,
    qemu: &mut ToQemu,
    frames: &mut mpsc::UnboundedReceiver<Frame>,
    advised: &mut oneshot::Receiver<()>,
) -> Result<(), DealError> {
    loop {
        tokio::select! {
            Ok(()) = &mut *advised => return Ok(()),
            Some(frame) = frames.recv() => {
                let Frame::Forward(data) = &frame else {
                    return Err(DealError::Unexpected("something other than the beginning"));
                };
                qemu.write(data).await;
                pump.on_dealt(frame.memory(), !qemu.gone);
            }
            else => return std::future::pending().await,
        }
    }
}

impl Destination<'_> {
    async fn run(
        mut self,
        mut frames: mpsc::UnboundedReceiver<Frame>,
        mut asks: mpsc::Receiver<ReturnMessage>,
        tell: impl Fn(&Arrival),
    ) -> Result<std::convert::Infallible, DealError> {
        let mut told = Instant::now();
        self.arrival.iter().for_each(&tell);
        loop {
            let mut turns = false;
            tokio::select! {
                biased;
                Some(message) = asks.recv() => self.on_asked(&message).await,
                Some(frame) = frames.recv() => {
                    self.deal(&frame).await?;
                    if frames.is_empty() && let Some(memory) = &mut self.memory {
                        memory.hand_over()?;
                    }
                    turns = matches!(frame, Frame::Switch { .. } | Frame::ForwardEnd);
                    // What QEMU did not take was not dealt with: the source must not go on.
                    self.pump.on_dealt(frame.memory(), !self.qemu.gone);
                }
                // Pages come while it tells, for places that it has told.
                () = tokio::task::yield_now(), if self.telling.is_some() => self.tell()?,
                else => return std::future::pending().await,
            }
            // Before the switch it is seen to have failed.
            if self.qemu.gone && !self.ended && self.arrival.as_ref().is_some_and(Arrival::is_switched) {
                return Err(DealError::QemuGone);
            }
            if turns || told.elapsed() >= TELL_EVERY {
                told = Instant::now();
                self.arrival.iter().for_each(&tell);
            }
        }
    }

    /// Waits until memory has all that came for it.
    fn settle(&mut self) -> io::Result<()> {
        self.memory.as_mut().map_or(Ok(()), WriteBehind::settle)
    }

    fn tell(&mut self) -> Result<(), DealError> {
        let done = match (&mut self.telling, &mut self.memory) {
            (Some(telling), Some(memory)) => {
                let done = telling.step(self.pump, &self.digester, memory)?;
                self.applier.set_common(u32::try_from(memory.common().len()).unwrap_or(u32::MAX));
                done
            }
            // A VM that may run writes to its memory itself.
            _ => true,
        };
        if done {
            self.telling = None;
        }
        Ok(())
    }

    async fn deal(&mut self, frame: &Frame) -> Result<(), DealError> {
        let pump = self.pump;
        match frame {
            Frame::Forward(data) => {
                // QEMU may rely on what came before.
                self.settle()?;
                self.qemu.write(data).await;
                pump.on_read(data.len() as u64);
            }
            Frame::Pages(payload) => self.apply(payload).await?,
            Frame::Wanted { block, pages } => {
                let memory = self.memory.as_mut().ok_or(DealError::Unexpected("questions about pages after the end"))?;
                if usize::from(*block) >= memory.memory().blocks().len() {
                    return Err(DealError::Unexpected("questions about pages that are not the VM's"));
                }
                // A question is a fraction of its answer: who does not take the answers gets no more of them.
                pump.wait_for_room().await;
                let mut told = Vec::with_capacity(pages.len());
                for page in pages {
                    let mut content = [0; PAGE_SIZE];
                    memory.read(*block, *page, &mut content)?;
                    told.push((*page, self.digester.told_pieces(&content)));
                }
                pump.push(&Frame::Pieces { block: *block, pages: told }, 0);
            }
            Frame::Left { block, runs } => {
                // QEMU is to forget pages: nothing but what comes from the source is put where it may have forgotten one.
                self.telling.iter_mut().for_each(Telling::bring_no_more);
                self.settle()?;
                let told = self.arrival()?.on_left(*block, runs).map_err(DealError::Unexpected)?;
                self.qemu.write(&told).await;
            }
            Frame::Switch { section } => {
                self.settle()?;
                self.arrival()?.on_switch(*section).map_err(DealError::Unexpected)?;
                // A look at a page that is missing would wait for it, and with it all that could bring it.
                self.memory = None;
            }
            Frame::ForwardEnd if !self.ended => {
                self.settle()?;
                self.ended = true;
                // The VM may run from here on: nobody writes to its memory any more.
                self.memory = None;
                if let Some(arrival) = self.arrival.as_ref().filter(|arrival| arrival.is_switched()) {
                    let end = arrival.end().map_err(DealError::Unexpected)?;
                    tracing::info!(figures = ?arrival.figures(), "all memory has come");
                    self.qemu.write(&end).await;
                }
                self.qemu.close(Shutdown::Write);
            }
            _ => return Err(DealError::Unexpected("a second end")),
        }
        Ok(())
    }

    fn arrival(&mut self) -> Result<&mut Arrival, DealError> {
        self.arrival.as_mut().ok_or(DealError::Unexpected("post-copy"))
    }

    async fn apply(&mut self, payload: &[u8]) -> Result<(), DealError> {
        let mut out = BytesMut::new();
        let applied = if let Some(mut arriving) = self.arrival.as_mut().and_then(|arrival| arrival.memory(&mut out)) {
            let applied = self.applier.apply(payload, &mut arriving)?;
            arriving.end();
            applied
        } else {
            let memory = self.memory.as_mut().ok_or(DealError::Unexpected("pages that it was not asked for"))?;
            self.applier.apply(payload, memory).map_err(|error| match error {
                ApplyError::Image { image } => {
                    DealError::Image(self.images.get(usize::from(image)).map(|image| image.digest).unwrap_or_default())
                }
                other => other.into(),
            })?
        };
        self.pump.on_read(u64::from(applied.pages) * PAGE_SIZE as u64);
        if !out.is_empty() {
            self.qemu.write(&out.freeze()).await;
        }
        tokio::task::yield_now().await;
        Ok(())
    }

    async fn on_asked(&mut self, message: &ReturnMessage) {
        let pump = self.pump;
        if let Some(arrival) = &mut self.arrival {
            let supplied = arrival.on_asked(message, pump);
            self.qemu.write(&supplied).await;
        }
    }
}

/// The return path: the answers to our own questions are taken out, everything else is QEMU's.
#[derive(Default)]
struct Answers {
    reader: ReturnReader,
    writer: ReturnWriter,
    /// In post-copy: the destination's QEMU has the devices' state.
    loaded: bool,
}

impl Answers {
    fn pass(&mut self, pump: &Pump, data: &Bytes) -> Result<Bytes, DealError> {
        self.reader.buffer_mut().extend_from_slice(data);
        let mut kept = BytesMut::new();
        while let Some(message) = self.reader.next_message()? {
            match message {
                // The devices' state was taken: for the source's QEMU this is the end, see `docs/spec/carrier.md`.
                ReturnMessage::Pong(LOADED) if pump.is_switched() => {
                    self.loaded = true;
                    self.writer.write(&ReturnMessage::Shut(0), &mut kept)?;
                }
                ReturnMessage::Pong(number) if pump.on_qemu_answered(number) => {}
                // Of the destination's QEMU, when it has all: the source's has ended.
                ReturnMessage::Shut(_) if self.loaded => {}
                message => self.writer.write(&message, &mut kept)?,
            }
        }
        Ok(kept.freeze())
    }
}

/// Who is told what the destination says.
pub(super) struct Listening {
    pub(super) advise: oneshot::Sender<bool>,
    pub(super) told: oneshot::Sender<Holdings>,
    pub(super) pieces: mpsc::UnboundedSender<ToldPieces>,
    pub(super) missed: mpsc::UnboundedSender<MissedPages>,
}

/// The source: never returns but with an error. `pages` is how many pages the VM has at most.
pub(super) async fn at_source(
    pump: &Pump,
    qemu: OwnedWriteHalf,
    mut frames: mpsc::UnboundedReceiver<Frame>,
    pages: u64,
    listening: Listening,
) -> Result<std::convert::Infallible, DealError> {
    let Listening { advise, told, pieces, missed } = listening;
    let mut qemu = ToQemu { qemu, gone: false };
    let mut answers = Answers::default();
    let mut advise = Some(advise);
    let mut missed_left = pages;
    let mut hearing = Hearing::new(told, pages);
    let mut ended = false;
    while let Some(frame) = frames.recv().await {
        let frame_size = frame.memory();
        match frame {
            Frame::Return(data) => {
                let kept = answers.pass(pump, &data)?;
                qemu.write(&kept).await;
            }
            Frame::ReturnEnd if !ended => {
                ended = true;
                tokio::time::sleep(LINGER).await;
                qemu.close(Shutdown::Both);
            }
            Frame::Advise if hearing.is_new() && advise.is_some() => {
                // Nobody listens any more: then QEMU has closed before it began. The same below.
                let _ = advise.take().map(|advise| advise.send(true));
            }
            Frame::Missed { block, pages } => {
                // Each page once.
                missed_left = missed_left
                    .checked_sub(pages.len() as u64)
                    .filter(|_| pump.is_switched())
                    .ok_or(DealError::Unexpected("pages that it cannot miss"))?;
                let _ = missed.send((block, pages));
            }
            Frame::Memory(blocks) if hearing.is_new() => {
                let _ = advise.take().map(|advise| advise.send(false));
                pump.on_qemu_answered(ADVISED);
                hearing.on_memory(blocks).map_err(DealError::Unexpected)?;
                pump.set_telling(true);
            }
            Frame::Held { block, first, digests } if !pump.is_switched() => {
                pump.on_sign_of_work();
                hearing.on_held(Place { block, page: first }, digests).map_err(DealError::Unexpected)?;
            }
            Frame::Common(digests) if !pump.is_switched() => {
                pump.on_sign_of_work();
                hearing.on_common(digests).map_err(DealError::Unexpected)?;
            }
            Frame::Absent { block, runs } if pump.is_switched() => hearing.on_absent(block, runs).map_err(DealError::Unexpected)?,
            Frame::Images(images) => hearing.on_images(images).map_err(DealError::Unexpected)?,
            Frame::HeldEnd => {
                hearing.on_end().map_err(DealError::Unexpected)?;
                pump.set_telling(false);
            }
            Frame::Pieces { block, pages } => {
                if !pump.on_pieces(pages.len()) {
                    return Err(DealError::Unexpected("pieces of pages that it was not asked for"));
                }
                // Nobody listens any more: then QEMU has closed.
                let _ = pieces.send((block, pages));
            }
            _ => return Err(DealError::Unexpected("a frame twice")),
        }
        pump.on_dealt(frame_size, true);
    }
    std::future::pending().await
}
