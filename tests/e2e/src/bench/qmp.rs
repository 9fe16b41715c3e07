//! A monitor of a plain QEMU: commands one after the other, and the moments of events by QEMU's own clock, which is this machine's.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

const ANSWER: Duration = Duration::from_secs(30);
const ASK: Duration = Duration::from_millis(20);

/// A connected monitor.
pub(super) struct Qmp {
    writer: UnixStream,
    answers: Receiver<Value>,
    events: Events,
}

type Events = Arc<Mutex<Vec<(String, Duration)>>>;

impl Qmp {
    /// Connects to a monitor that may not be there yet.
    pub(super) fn connect(path: &Path, patience: Duration) -> Result<Self> {
        let deadline = Instant::now() + patience;
        let writer = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < deadline => thread::sleep(ASK),
                Err(error) => return Err(error).with_context(|| format!("connect to {}", path.display())),
            }
        };
        let (reader, events) = (writer.try_clone()?, Events::default());
        let (sender, answers) = channel();
        let heard = Arc::clone(&events);
        // Ends with the connection.
        thread::Builder::new().name("qmp".into()).spawn(move || read(reader, &sender, &heard))?;
        let mut qmp = Self { writer, answers, events };
        qmp.run("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command.
    pub(super) fn run(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.writer.write_all(line.as_bytes()).with_context(|| format!("send {command}"))?;
        let mut answer = self.answers.recv_timeout(ANSWER).with_context(|| format!("no answer to {command}"))?;
        match answer.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => bail!("{command}: {}", answer["error"]["desc"].as_str().unwrap_or("failed")),
        }
    }

    /// When the last event of this name was, since 1970.
    pub(super) fn last(&self, event: &str) -> Option<Duration> {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.iter().rev().find(|(name, _)| name == event).map(|(_, at)| *at)
    }

    /// Waits for an event of this name.
    pub(super) fn wait(&self, event: &str, patience: Duration) -> Result<Duration> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(at) = self.last(event) {
                return Ok(at);
            }
            ensure!(Instant::now() < deadline, "no event {event} within {patience:?}");
            thread::sleep(ASK);
        }
    }
}

fn read(stream: UnixStream, answers: &Sender<Value>, events: &Events) {
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { return };
        let Ok(value) = serde_json::from_str::<Value>(&line) else { continue };
        if let Some((name, at)) = event(&value) {
            events.lock().unwrap_or_else(PoisonError::into_inner).push((name, at));
        } else if value.get("QMP").is_none() && answers.send(value).is_err() {
            return;
        }
    }
}

fn event(value: &Value) -> Option<(String, Duration)> {
    let name = value.get("event")?.as_str()?.to_owned();
    let number = |key| value["timestamp"][key].as_u64();
    Some((name, Duration::from_secs(number("seconds")?) + Duration::from_micros(number("microseconds")?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_told_from_answers() {
        let stop = json!({ "event": "STOP", "timestamp": { "seconds": 5, "microseconds": 7 } });
        assert_eq!(event(&stop), Some(("STOP".to_owned(), Duration::new(5, 7_000))));
        assert_eq!(event(&json!({ "return": {} })), None);
    }
}
