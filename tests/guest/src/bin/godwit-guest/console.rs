//! The serial console: a status line a second, and a few commands.
//!
//! All lines go through one thread, so that a slow or stopped console never holds up the work.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::Command;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use godwit_guest::{ConsoleLine, console_line};
use rustix::fs::{Mode, OFlags, open};
use rustix::termios::{LocalModes, OptionalActions, OutputModes, tcgetattr, tcsetattr};

use crate::counters::Counters;
use crate::{power, thread};

/// Lines that wait for a slow console; what comes on top of them is lost.
const WAITING: usize = 64;
const EVERY: Duration = Duration::from_secs(1);

enum Order {
    Say(Box<ConsoleLine>),
    Report,
    Poweroff(&'static str),
}

/// A handle to speak with.
#[derive(Clone)]
pub(crate) struct Console {
    device: Arc<Option<File>>,
    orders: SyncSender<Order>,
    waiting: Arc<Mutex<Option<Receiver<Order>>>>,
}

impl Console {
    /// Opens /dev/console; without one the guest stays silent.
    pub(crate) fn open() -> Self {
        let device = open("/dev/console", OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).ok();
        if let Some((device, mut settings)) = device.as_ref().and_then(|d| Some((d, tcgetattr(d).ok()?))) {
            // Commands must not show up between the lines; lines end as they are written.
            settings.local_modes.remove(LocalModes::ECHO);
            settings.output_modes.remove(OutputModes::OPOST);
            // A console that is no terminal has no such settings, and needs none.
            let _ = tcsetattr(device, OptionalActions::Now, &settings);
        }
        let (orders, waiting) = sync_channel(WAITING);
        Self { device: Arc::new(device.map(File::from)), orders, waiting: Arc::new(Mutex::new(Some(waiting))) }
    }

    /// Says a line soon.
    pub(crate) fn say(&self, line: ConsoleLine) {
        let _ = self.orders.try_send(Order::Say(Box::new(line)));
    }

    /// Powers off after a line that says by whom.
    pub(crate) fn poweroff(&self, by: &'static str) {
        let _ = self.orders.try_send(Order::Poweroff(by));
    }

    /// Says a line now: for those who have no later.
    pub(crate) fn say_at_once(&self, line: &ConsoleLine) {
        let Ok(mut text) = serde_json::to_string(line) else { return };
        debug_assert!(console_line(&text).is_some());
        text.push('\n');
        if let Some(mut device) = self.device.as_ref().as_ref() {
            // There is nobody else to tell about a console that fails.
            let _ = device.write_all(text.as_bytes());
        }
    }

    /// Says `ready`, then listens and reports.
    pub(crate) fn start(&self, counters: &Arc<Counters>) -> std::io::Result<()> {
        let Some(waiting) = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take() else { return Ok(()) };
        let (console, counters) = (self.clone(), Arc::clone(counters));
        thread("console", move || {
            console.say_at_once(&ConsoleLine::Ready(counters.status()));
            console.write(&waiting, &counters);
        })?;
        let console = self.clone();
        thread("commands", move || console.read())
    }

    fn write(&self, waiting: &Receiver<Order>, counters: &Counters) {
        let mut next = Instant::now() + EVERY;
        loop {
            match waiting.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(Order::Say(line)) => self.say_at_once(&line),
                Ok(Order::Report) => self.say_at_once(&ConsoleLine::Status(counters.status())),
                Ok(Order::Poweroff(by)) => {
                    self.say_at_once(&ConsoleLine::Poweroff { by: by.to_owned() });
                    power::off();
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.say_at_once(&ConsoleLine::Status(counters.status()));
                    next = Instant::now() + EVERY;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn read(&self) {
        let Some(device) = self.device.as_ref().as_ref() else { return };
        // The terminal cuts lines at 4096 bytes, so none can fill the memory.
        for line in BufReader::new(device).split(b'\n') {
            let Ok(line) = line else { return };
            let line = String::from_utf8_lossy(&line);
            match line.trim() {
                "report" => drop(self.orders.try_send(Order::Report)),
                "poweroff" => self.poweroff("console"),
                "" => {}
                other => match other.strip_prefix("sh ") {
                    Some(command) => self.say(shell(command)),
                    None => self.say(ConsoleLine::Warning { message: format!("unknown command {other:?}") }),
                },
            }
        }
    }
}

/// For people who look into a guest that misbehaves.
fn shell(command: &str) -> ConsoleLine {
    match Command::new("/bin/busybox").args(["sh", "-c", &format!("exec 2>&1; {command}")]).output() {
        Ok(done) => ConsoleLine::Shell { code: done.status.code(), output: String::from_utf8_lossy(&done.stdout).into_owned() },
        Err(error) => ConsoleLine::Warning { message: format!("shell: {error}") },
    }
}
