//! The echo prober: a thousand datagrams a second, and when each came back, on the prober's own clock.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Result;

/// A sender that was held up does not make up for more than this.
const BACKLOG: Duration = Duration::from_millis(5);

/// A running prober.
#[derive(Debug)]
pub struct Echo {
    answered: Arc<Mutex<Vec<Instant>>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Echo {
    /// The time between two probes, where nobody wants another.
    pub(crate) const PERIOD: Duration = Duration::from_millis(1);

    pub(super) fn start(socket: UdpSocket, period: Duration) -> Result<Self> {
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let (answered, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let sender = {
            let (socket, stop) = (socket.try_clone()?, Arc::clone(&stop));
            thread::Builder::new().name("echo-send".into()).spawn(move || send(&socket, period, &stop))?
        };
        let receiver = {
            let (answered, stop) = (Arc::clone(&answered), Arc::clone(&stop));
            thread::Builder::new().name("echo-receive".into()).spawn(move || {
                let mut datagram = [0; 64];
                while !stop.load(Ordering::Relaxed) {
                    if socket.recv(&mut datagram).is_ok() {
                        answered.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
                    }
                }
            })?
        };
        Ok(Self { answered, stop, threads: vec![sender, receiver] })
    }

    /// The longest time without an answer that touches the span from `from` to `to`.
    #[must_use]
    pub fn longest_gap(&self, from: Instant, to: Instant) -> Duration {
        longest_gap(&self.answered.lock().unwrap_or_else(PoisonError::into_inner), from, to)
    }

    /// The first answer from a moment on, if one comes in time.
    #[must_use]
    pub fn first_after(&self, from: Instant, patience: Duration) -> Option<Instant> {
        let deadline = Instant::now() + patience;
        loop {
            let answered = self.answered.lock().unwrap_or_else(PoisonError::into_inner);
            let first = answered.get(answered.partition_point(|at| *at < from)).copied();
            drop(answered);
            if first.is_some() || Instant::now() > deadline {
                return first;
            }
            thread::sleep(Self::PERIOD);
        }
    }

    /// How many answers came.
    #[must_use]
    pub fn answers(&self) -> usize {
        self.answered.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn send(socket: &UdpSocket, period: Duration, stop: &AtomicBool) {
    let mut next = Instant::now();
    let mut number = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        // A datagram that cannot be sent is a lost one.
        let _ = socket.send(&number.to_le_bytes());
        number += 1;
        let now = Instant::now();
        next = (next + period).max(now.checked_sub(BACKLOG).unwrap_or(now));
        // The probe's period: there is nothing to wait for but time.
        thread::sleep(next.saturating_duration_since(now));
    }
}

/// Gaps count whole, also where they begin before or end behind the span.
fn longest_gap(answered: &[Instant], from: Instant, to: Instant) -> Duration {
    let first = answered.partition_point(|at| *at < from);
    let beyond = answered.partition_point(|at| *at <= to);
    let before = first.checked_sub(1).and_then(|index| answered.get(index)).copied().unwrap_or(from);
    let after = answered.get(beyond).copied().unwrap_or(to);
    let inside = answered.get(first..beyond).unwrap_or_default().iter().copied();
    let mut last = before;
    let mut longest = Duration::ZERO;
    for at in inside.chain([after]) {
        longest = longest.max(at.saturating_duration_since(last));
        last = at;
    }
    longest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_found_inside_and_across_the_ends_of_a_span() {
        let zero = Instant::now();
        let at = |ms: u64| zero + Duration::from_millis(ms);
        let answered: Vec<Instant> = [10, 20, 30, 200, 210, 500].map(at).to_vec();
        for (from, to, longest) in [
            (10, 30, 170),
            (25, 26, 10),
            (30, 31, 170),
            (201, 220, 290),
            (205, 206, 10),
            (0, 15, 10),
            (505, 900, 400),
            (600, 700, 200),
            (0, 5, 10),
        ] {
            assert_eq!(longest_gap(&answered, at(from), at(to)), Duration::from_millis(longest), "{from} to {to}");
        }
        assert_eq!(longest_gap(&[], at(0), at(70)), Duration::from_millis(70));
    }
}
