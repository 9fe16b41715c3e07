//! Frames on their way from the feed to the pump: batches are compressed by other threads meanwhile, and all leave in the order in which they came.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use godwit_carrier::pages::{Batch, Sealer};
use godwit_carrier::{Frame, Level, LevelChoice, Spent};
use tokio::sync::{mpsc, oneshot};

use super::pump::Pump;
use super::threads::Threads;

/// Threads that compress, and what they do it with.
#[derive(Debug)]
pub(super) struct Sealers {
    threads: Threads,
    /// Those that nobody uses now.
    idle: Arc<Mutex<Vec<Sealer>>>,
}

/// A batch, and what it came to.
#[derive(Debug)]
struct Sealed {
    batch: Batch,
    payload: Bytes,
}

/// What a batch came to at the level that was chosen, and at another.
type Trial = ((Level, usize), (Level, usize));

impl Sealers {
    pub(super) fn new(threads: Threads) -> Self {
        let idle = std::iter::repeat_with(Sealer::new).take(threads.count()).collect();
        Self { threads, idle: Arc::new(Mutex::new(idle)) }
    }

    /// Has a batch compressed at a level, and, for a trial, at another one behind that.
    fn seal(&self, batch: Batch, level: Level, trial: Option<(Level, mpsc::UnboundedSender<Trial>)>) -> oneshot::Receiver<Sealed> {
        let (done, sealed) = oneshot::channel();
        let idle = Arc::clone(&self.idle);
        self.threads.run(move || {
            let sealers = || idle.lock().unwrap_or_else(PoisonError::into_inner);
            let mut sealer = sealers().pop().unwrap_or_default();
            let payload = sealer.seal(&batch, level);
            let (length, again) = (payload.len(), trial.is_some().then(|| batch.clone()));
            // Whoever waited may be gone. The same below.
            let _ = done.send(Sealed { batch, payload });
            if let (Some(batch), Some((other, told))) = (again, trial) {
                let _ = told.send(((level, length), (other, sealer.seal(&batch, other).len())));
            }
            sealers().push(sealer);
        });
        sealed
    }
}

/// Something that leaves when all before it have left.
enum Leaving {
    Frame(Frame, u64),
    /// A batch that is being compressed.
    Batch(oneshot::Receiver<Sealed>),
}

/// The queue, and the threads.
pub(super) struct Seals<'a> {
    pump: &'a Pump,
    leaving: VecDeque<Leaving>,
    /// How many of them are batches.
    sealing: usize,
    sealers: Sealers,
    choice: LevelChoice,
    trials: (mpsc::UnboundedSender<Trial>, mpsc::UnboundedReceiver<Trial>),
    /// What compression came to since the choice was told.
    bytes: u64,
    told: Instant,
}

impl<'a> Seals<'a> {
    pub(super) fn new(pump: &'a Pump, sealers: Sealers) -> Self {
        let (choice, trials) = (LevelChoice::default(), mpsc::unbounded_channel());
        Self { pump, leaving: VecDeque::new(), sealing: 0, sealers, choice, trials, bytes: 0, told: Instant::now() }
    }

    /// A frame leaves, after all that came before.
    pub(super) fn push(&mut self, frame: Frame, raw: u64) {
        if self.leaving.is_empty() {
            self.pump.push(&frame, raw);
        } else {
            self.leaving.push_back(Leaving::Frame(frame, raw));
        }
    }

    /// The pieces of these pages of a block are asked for.
    pub(super) fn push_wanted(&mut self, asked: Option<(u16, Vec<u32>)>) {
        if let Some((block, pages)) = asked {
            self.pump.on_wanted(pages.len());
            self.push(Frame::Wanted { block, pages }, 0);
        }
    }

    /// A batch leaves, when it is compressed.
    pub(super) fn seal(&mut self, batch: Batch) {
        let (mut level, mut trial) = self.choice.next_batch();
        if self.pump.is_hurried() || self.pump.is_switched() {
            // The guest waits.
            (level, trial) = (level.min(Level::default()), None);
        }
        let trial = trial.map(|trial| (trial, self.trials.0.clone()));
        self.leaving.push_back(Leaving::Batch(self.sealers.seal(batch, level, trial)));
        self.sealing += 1;
    }

    /// So long nothing could be read for the sake of the link, of compression, and of another move, since this was last told.
    pub(super) fn on_waited(&mut self, link: Duration, compression: Duration, held: Duration) {
        let all = self.told.elapsed();
        self.told += all;
        let all = all.saturating_sub(held);
        while let Ok((here, there)) = self.trials.1.try_recv() {
            self.choice.on_trial(here, there);
        }
        let spent = Spent { all, link, compression, bytes: std::mem::take(&mut self.bytes) };
        self.choice.on_spent(spent, self.pump.link_rate());
    }

    /// Whether one more batch would find no thread.
    pub(super) fn is_full(&self) -> bool {
        self.sealing >= self.sealers.threads.count()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.leaving.is_empty()
    }

    /// Waits until the first batch has left, with all that waited for it; answers it, and the length of its payload. Pending for ever if there is none.
    /// Nothing is lost if this is given up.
    pub(super) async fn settle(&mut self) -> (Batch, usize) {
        let Some(Leaving::Batch(sealed)) = self.leaving.front_mut() else { return std::future::pending().await };
        let sealed = sealed.await;
        self.leaving.pop_front();
        self.sealing -= 1;
        let Sealed { batch, payload } = sealed.expect("no thread that compresses panics");
        let length = payload.len();
        self.bytes += length as u64;
        self.pump.push(&Frame::Pages(payload), batch.raw);
        while let Some(Leaving::Frame(..)) = self.leaving.front() {
            if let Some(Leaving::Frame(frame, raw)) = self.leaving.pop_front() {
                self.pump.push(&frame, raw);
            }
        }
        (batch, length)
    }
}
