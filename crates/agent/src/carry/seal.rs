//! Frames on their way from the feed to the pump: batches are compressed by other threads meanwhile, and all leave in the order in which they came.

use std::collections::VecDeque;
use std::io;
use std::num::NonZero;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, available_parallelism};
use std::time::{Duration, Instant};

use bytes::Bytes;
use godwit_carrier::pages::{Batch, Sealer};
use godwit_carrier::{Frame, Level, LevelChoice, Spent};
use tokio::sync::oneshot;

use super::pump::Pump;

/// Most threads that compress for one move.
const MOST_THREADS: usize = 4;
/// Nothing that they call goes deep.
const STACK: usize = 256 << 10;

/// Threads that compress, until this is dropped.
#[derive(Debug)]
pub(super) struct Sealers {
    jobs: mpsc::Sender<Job>,
    threads: usize,
}

#[derive(Debug)]
struct Job {
    batch: Batch,
    level: Level,
    /// At which it is compressed, too, to see how long it would be.
    trial: Option<Level>,
    done: oneshot::Sender<Sealed>,
}

/// A batch, and what it came to.
#[derive(Debug)]
struct Sealed {
    batch: Batch,
    level: Level,
    payload: Bytes,
    tried: Option<usize>,
}

impl Sealers {
    /// Starts as many as there are processors, four at most. Each confines itself by `confine` before it takes anything.
    pub(super) fn start<E: Send + 'static>(confine: fn() -> Result<(), E>) -> Result<Self, SealersError<E>> {
        let threads = available_parallelism().map_or(1, NonZero::get).min(MOST_THREADS);
        let (jobs, queue) = mpsc::channel();
        let queue = Arc::new(Mutex::new(queue));
        let (ready, confined) = mpsc::channel();
        for _ in 0..threads {
            let (queue, ready) = (Arc::clone(&queue), ready.clone());
            let body = move || {
                let confined = confine();
                let confined_well = confined.is_ok();
                if ready.send(confined).is_ok() && confined_well {
                    work(&queue);
                }
            };
            thread::Builder::new().name("sealer".into()).stack_size(STACK).spawn(body).map_err(SealersError::Thread)?;
        }
        for confined in confined.iter().take(threads) {
            confined.map_err(SealersError::Confine)?;
        }
        Ok(Self { jobs, threads })
    }
}

/// Why there are none.
#[derive(Debug, thiserror::Error)]
pub(super) enum SealersError<E> {
    #[error("a thread cannot be started")]
    Thread(#[source] io::Error),
    #[error("a thread cannot be confined")]
    Confine(#[source] E),
}

fn work(queue: &Mutex<mpsc::Receiver<Job>>) {
    let mut sealer = Sealer::new();
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { batch, level, trial, done }) = job else { return };
        let payload = sealer.seal(&batch, level);
        let tried = trial.map(|trial| sealer.seal(&batch, trial).len());
        // Whoever waited may be gone.
        let _ = done.send(Sealed { batch, level, payload, tried });
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
    /// Bytes given to compression since the choice was told.
    given: u64,
    told: Instant,
}

impl<'a> Seals<'a> {
    pub(super) fn new(pump: &'a Pump, sealers: Sealers) -> Self {
        Self { pump, leaving: VecDeque::new(), sealing: 0, sealers, choice: LevelChoice::default(), given: 0, told: Instant::now() }
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
        let (done, sealed) = oneshot::channel();
        let (level, trial) = self.choice.next_batch();
        self.given += batch.length() as u64;
        let job = Job { batch, level, trial, done };
        self.sealers.jobs.send(job).expect("the threads live as long as this");
        self.leaving.push_back(Leaving::Batch(sealed));
        self.sealing += 1;
    }

    /// So long nothing could be read for the sake of the link, of compression, and of another move, since this was last told.
    pub(super) fn on_waited(&mut self, link: Duration, compression: Duration, held: Duration) {
        let all = self.told.elapsed();
        self.told += all;
        let all = all.saturating_sub(held);
        let spent = Spent { all, link, compression, bytes: std::mem::take(&mut self.given) };
        self.choice.on_spent(spent, self.pump.link_rate());
    }

    /// Whether one more batch would find no thread.
    pub(super) fn is_full(&self) -> bool {
        self.sealing >= self.sealers.threads
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
        let Sealed { batch, level, payload, tried } = sealed.expect("no thread that compresses panics");
        let length = payload.len();
        if let Some(tried) = tried {
            self.choice.on_trial((level, length), tried);
        }
        self.pump.push(&Frame::Pages(payload), batch.raw);
        while let Some(Leaving::Frame(..)) = self.leaving.front() {
            if let Some(Leaving::Frame(frame, raw)) = self.leaving.pop_front() {
                self.pump.push(&frame, raw);
            }
        }
        (batch, length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_cannot_be_confined_compress_nothing() {
        assert!(matches!(Sealers::start(|| Err("refused")), Err(SealersError::Confine("refused"))));
        assert!(Sealers::start(|| Ok::<_, ()>(())).is_ok());
    }
}
