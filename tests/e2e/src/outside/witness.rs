//! The witness: hears the records of all guests of a lab.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Result;
use godwit_guest::WitnessLog;

/// A running witness.
#[derive(Debug)]
pub struct Witness {
    log: Arc<Mutex<WitnessLog>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Witness {
    pub(super) fn start(socket: UdpSocket) -> Result<Self> {
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let (log, stop) = (Arc::new(Mutex::new(WitnessLog::new())), Arc::new(AtomicBool::new(false)));
        let (kept, told) = (Arc::clone(&log), Arc::clone(&stop));
        let thread = thread::Builder::new().name("witness".into()).spawn(move || {
            let began = Instant::now();
            let mut datagram = [0; 2048];
            while !told.load(Ordering::Relaxed) {
                if let Ok(length) = socket.recv(&mut datagram) {
                    let record = datagram.get(..length).unwrap_or_default();
                    kept.lock().unwrap_or_else(PoisonError::into_inner).consume_datagram(record, began.elapsed());
                }
            }
        })?;
        Ok(Self { log, stop, thread: Some(thread) })
    }

    /// What was heard so far.
    #[must_use]
    pub fn log(&self) -> WitnessLog {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
