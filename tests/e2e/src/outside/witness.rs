//! The witness: hears the records of all guests of a lab.

use std::io::{self, Read};
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Result;
use godwit_guest::WitnessLog;
use socket2::Socket;

use super::ear;

/// A running witness.
#[derive(Debug)]
pub struct Witness {
    log: Arc<Mutex<WitnessLog>>,
    stop: Arc<AtomicBool>,
    began: Instant,
    threads: Vec<JoinHandle<()>>,
}

impl Witness {
    pub(super) fn start(socket: UdpSocket) -> Result<Self> {
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let (log, stop) = (Arc::new(Mutex::new(WitnessLog::new())), Arc::new(AtomicBool::new(false)));
        let mut witness = Self { log, stop, began: Instant::now(), threads: Vec::new() };
        witness.listen(move |buffer| socket.recv(buffer), |datagram| Some(datagram))?;
        Ok(witness)
    }

    /// Also hears what guests send in the namespace of a host, whatever becomes of it behind that. The same record is then heard more than
    /// once, which counts as a duplicate.
    pub(crate) fn listen_in(&mut self, namespace: &str) -> Result<()> {
        let mut socket: Socket = ear::open(namespace)?;
        self.listen(move |buffer| socket.read(buffer), ear::datagram)
    }

    fn listen(
        &mut self,
        mut receive: impl FnMut(&mut [u8]) -> io::Result<usize> + Send + 'static,
        datagram: fn(&[u8]) -> Option<&[u8]>,
    ) -> Result<()> {
        let (log, stop, began) = (Arc::clone(&self.log), Arc::clone(&self.stop), self.began);
        let thread = thread::Builder::new().name("witness".into()).spawn(move || {
            let mut buffer = [0; 2048];
            while !stop.load(Ordering::Relaxed) {
                if let Ok(length) = receive(&mut buffer)
                    && let Some(record) = buffer.get(..length).and_then(datagram)
                {
                    log.lock().unwrap_or_else(PoisonError::into_inner).consume_datagram(record, began.elapsed());
                }
            }
        })?;
        self.threads.push(thread);
        Ok(())
    }

    /// What was heard so far.
    #[must_use]
    pub fn log(&self) -> WitnessLog {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// See [`WitnessLog::forget`].
    pub(crate) fn forget(&self, vm: &str) {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).forget(vm);
    }

    /// How long each VM has said nothing.
    pub(crate) fn silent(&self) -> Vec<(String, Duration)> {
        let now = self.began.elapsed();
        self.log().vms().map(|(vm, heard)| (vm.to_owned(), now.saturating_sub(heard.last_received))).collect()
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
