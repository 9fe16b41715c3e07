//! The stream client: one TCP connection to a guest that is read and verified for as long as it is there.

use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Result;
use godwit_guest::{STREAM_PORT, StreamVerifier};

use super::Outside;

const STALL: Duration = Duration::from_secs(1);

/// What a stream went through.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StreamReport {
    /// Bytes that came, each the right one at its place.
    pub bytes: u64,
    /// Connections that ended before we ended them.
    pub resets: u64,
    /// Times of over a second in which nothing came.
    pub stalls_over_1s: u64,
    /// Wrong bytes: the connection was given up at each.
    pub mismatches: u64,
}

/// A running client.
#[derive(Debug)]
pub struct StreamClient {
    report: Arc<Mutex<StreamReport>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A guest that has just become ready may not listen yet.
fn first_connection(outside: &Outside, address: Ipv4Addr) -> Result<TcpStream> {
    const PATIENCE: Duration = Duration::from_secs(10);
    let begun = std::time::Instant::now();
    loop {
        match outside.connection(address, STREAM_PORT, PATIENCE) {
            Err(_) if begun.elapsed() < PATIENCE => thread::sleep(Duration::from_millis(100)),
            answer => return answer,
        }
    }
}

impl StreamClient {
    pub(super) fn start(outside: Outside, address: Ipv4Addr) -> Result<Self> {
        let connection = first_connection(&outside, address)?;
        let (report, stop) = (Arc::new(Mutex::new(StreamReport::default())), Arc::new(AtomicBool::new(false)));
        let client = Client { outside, address, report: Arc::clone(&report), stop: Arc::clone(&stop) };
        let thread = thread::Builder::new().name("stream".into()).spawn(move || client.run(connection))?;
        Ok(Self { report, stop, thread: Some(thread) })
    }

    /// How it went so far.
    #[must_use]
    pub fn report(&self) -> StreamReport {
        *self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for StreamClient {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Client {
    outside: Outside,
    address: Ipv4Addr,
    report: Arc<Mutex<StreamReport>>,
    stop: Arc<AtomicBool>,
}

impl Client {
    fn run(&self, mut connection: TcpStream) {
        while !self.read(&mut connection) {
            self.count(|report| report.resets += 1);
            // The guest is there, or the test has failed anyway.
            loop {
                if self.stop.load(Ordering::Relaxed) {
                    return;
                }
                if let Ok(new) = self.outside.connection(self.address, STREAM_PORT, STALL) {
                    connection = new;
                    break;
                }
            }
        }
    }

    /// Reads until told to stop (`true`) or until the connection is of no more use.
    fn read(&self, connection: &mut TcpStream) -> bool {
        let mut verifier = StreamVerifier::new();
        let mut bytes = vec![0; 64 << 10];
        let (mut last, mut stalled) = (Instant::now(), false);
        if connection.set_read_timeout(Some(Duration::from_millis(100))).is_err() {
            return false;
        }
        while !self.stop.load(Ordering::Relaxed) {
            match connection.read(&mut bytes) {
                Ok(0) => return false,
                Ok(length) => {
                    (last, stalled) = (Instant::now(), false);
                    if verifier.consume(bytes.get(..length).unwrap_or_default()).is_err() {
                        self.count(|report| report.mismatches += 1);
                        return false;
                    }
                    self.count(|report| report.bytes += length as u64);
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {
                    if !stalled && last.elapsed() > STALL {
                        stalled = true;
                        self.count(|report| report.stalls_over_1s += 1);
                    }
                }
                Err(_) => return false,
            }
        }
        true
    }

    fn count(&self, count: impl FnOnce(&mut StreamReport)) {
        count(&mut self.report.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
