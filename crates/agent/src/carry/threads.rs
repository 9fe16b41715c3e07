//! The threads of a carry beside its first one. All are begun, and confined, before the first byte from outside is read.

use std::io;
use std::num::NonZero;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, available_parallelism};

/// Most threads of one carry.
const MOST_THREADS: usize = 4;
/// Nothing that they call goes deep.
const STACK: usize = 256 << 10;

type Job = Box<dyn FnOnce() + Send>;

/// Threads that take one job after the other, in the order in which they are given, until this is dropped.
#[derive(Debug)]
pub(super) struct Threads {
    jobs: mpsc::Sender<Job>,
    count: usize,
}

impl Threads {
    /// Starts as many as there are processors, four at most. Each confines itself by `confine` before it takes anything.
    pub(super) fn start<E: Send + 'static>(confine: fn() -> Result<(), E>) -> Result<Self, ThreadsError<E>> {
        let count = available_parallelism().map_or(1, NonZero::get).min(MOST_THREADS);
        let (jobs, queue) = mpsc::channel();
        let queue = Arc::new(Mutex::new(queue));
        let (ready, confined) = mpsc::channel();
        for _ in 0..count {
            let (queue, ready) = (Arc::clone(&queue), ready.clone());
            let body = move || {
                let confined = confine();
                let confined_well = confined.is_ok();
                if ready.send(confined).is_ok() && confined_well {
                    work(&queue);
                }
            };
            thread::Builder::new().name("carry".into()).stack_size(STACK).spawn(body).map_err(ThreadsError::Thread)?;
        }
        for confined in confined.iter().take(count) {
            confined.map_err(ThreadsError::Confine)?;
        }
        Ok(Self { jobs, count })
    }

    pub(super) const fn count(&self) -> usize {
        self.count
    }

    /// One of them does this.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        self.jobs.send(Box::new(job)).expect("the threads live as long as this");
    }
}

impl Threads {
    /// One of them lets go of this, if there is one.
    pub(super) fn let_go(&self, value: impl Send + 'static) {
        let _ = self.jobs.send(Box::new(move || drop(value)));
    }
}

/// Why there are none.
#[derive(Debug, thiserror::Error)]
pub(super) enum ThreadsError<E> {
    #[error("a thread cannot be started")]
    Thread(#[source] io::Error),
    #[error("a thread cannot be confined")]
    Confine(#[source] E),
}

fn work(queue: &Mutex<mpsc::Receiver<Job>>) {
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        job();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_cannot_be_confined_do_nothing() {
        assert!(matches!(Threads::start(|| Err("refused")), Err(ThreadsError::Confine("refused"))));
    }

    #[test]
    fn every_job_is_done() {
        let threads = Threads::start(|| Ok::<_, ()>(())).expect("threads");
        let (done, all) = mpsc::channel();
        for number in 0..100_u32 {
            let done = done.clone();
            threads.run(move || done.send(number).expect("heard"));
        }
        drop(done);
        let mut all: Vec<u32> = all.iter().collect();
        all.sort_unstable();
        assert_eq!(all, (0..100).collect::<Vec<u32>>());
    }
}
