//! QMP's bytes into messages: pure, bounded, and unable to panic.
//!
//! QEMU sends one JSON object per line. [`LineDecoder`] takes bytes in whatever pieces they arrive and gives messages. What it does not
//! know is a [`Message::Other`], never an error: a newer QEMU must not blind us in the middle of a migration.

use godwit_model::hostile::{self, SENTENCE, WORD};
use serde_json::{Map, Value};

/// Longest line that is accepted from QEMU. The longest it sends, the answer to `query-qmp-schema`, is under 1 MiB.
pub const MAX_LINE: usize = 16 << 20;

/// Longest command that is sent: QEMU's own parser gives up at 64 MiB, we need far less.
pub const MAX_COMMAND: usize = 1 << 20;

/// What QEMU said in one line.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// The first line of a session.
    Greeting(Greeting),
    /// A command succeeded.
    Return {
        /// Its number.
        id: u64,
        /// What it answered.
        value: Value,
    },
    /// A command failed.
    Failure {
        /// Its number, if QEMU could tell which command it was.
        id: Option<u64>,
        /// Why.
        failure: Failure,
    },
    /// Something happened.
    Event(Event),
    /// A JSON object of a kind that this version does not know.
    Other(Map<String, Value>),
}

/// What QEMU says of itself when a session begins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Greeting {
    /// Version, for display only: what a QEMU can do is asked, never concluded from this.
    pub version: String,
    /// Protocol extensions on offer, such as `oob`.
    pub capabilities: Vec<String>,
}

/// An error that QEMU answered. A QEMU that a guest has taken over chooses the text: it is made harmless and short when it is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// QEMU's error class: `GenericError`, `CommandNotFound`, …
    pub class: String,
    /// QEMU's text.
    pub description: String,
}

/// An event of QEMU.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name, such as `STOP` or `MIGRATION`.
    pub name: String,
    /// Its data, [`Value::Null`] if it has none.
    pub data: Value,
    /// When QEMU says it happened: microseconds since 1970 by the host's clock.
    pub micros: Option<u64>,
}

/// Why a session cannot be understood any further.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// A line without end.
    #[error("QEMU sent a line longer than {limit} bytes")]
    TooLong {
        /// The limit that was passed.
        limit: usize,
    },
    /// A line that is not a JSON object.
    #[error("QEMU sent a line that is not a JSON object")]
    NotAnObject(#[source] Option<serde_json::Error>),
}

/// Cuts bytes into lines and lines into messages.
#[derive(Debug)]
pub struct LineDecoder {
    partial: Vec<u8>,
    limit: usize,
}

impl Default for LineDecoder {
    fn default() -> Self {
        Self::new(MAX_LINE)
    }
}

impl LineDecoder {
    /// A decoder that refuses lines over `limit` bytes, before it allocates for them.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        Self { partial: Vec::new(), limit }
    }

    /// Takes from the front of `input` up to the end of one line; gives its message once the line is complete, `None` when all input is
    /// used up. Blank lines are skipped.
    ///
    /// # Errors
    /// See [`DecodeError`]; the session cannot go on after one.
    pub fn decode(&mut self, input: &mut &[u8]) -> Result<Option<Message>, DecodeError> {
        while !input.is_empty() {
            let end = input.iter().position(|byte| *byte == b'\n');
            let (line, rest) = input.split_at(end.unwrap_or(input.len()));
            if line.len() > self.limit.saturating_sub(self.partial.len()) {
                return Err(DecodeError::TooLong { limit: self.limit });
            }
            self.partial.extend_from_slice(line);
            *input = if end.is_some() { rest.split_first().map_or(rest, |(_, rest)| rest) } else { rest };
            if end.is_some() {
                let line = std::mem::take(&mut self.partial);
                if !line.iter().all(u8::is_ascii_whitespace) {
                    return parse(&line).map(Some);
                }
            }
        }
        Ok(None)
    }
}

/// Reads one line.
fn parse(line: &[u8]) -> Result<Message, DecodeError> {
    match serde_json::from_slice(line) {
        Ok(Value::Object(object)) => Ok(classify(object)),
        Ok(_) => Err(DecodeError::NotAnObject(None)),
        Err(error) => Err(DecodeError::NotAnObject(Some(error))),
    }
}

fn classify(mut object: Map<String, Value>) -> Message {
    let id = object.get("id").and_then(Value::as_u64);
    if let Some(Value::String(name)) = object.get("event") {
        return Message::Event(Event {
            name: name.clone(),
            micros: object.get("timestamp").and_then(micros),
            data: object.remove("data").unwrap_or(Value::Null),
        });
    }
    if let (Some(id), Some(value)) = (id, object.get_mut("return")) {
        return Message::Return { id, value: value.take() };
    }
    if let Some(error) = object.get("error") {
        let text = |key, limit| hostile::bounded(error.get(key).and_then(Value::as_str).unwrap_or_default(), limit);
        return Message::Failure { id, failure: Failure { class: text("class", WORD), description: text("desc", SENTENCE) } };
    }
    if let Some(greeting) = object.get("QMP") {
        return Message::Greeting(greet(greeting));
    }
    Message::Other(object)
}

fn micros(timestamp: &Value) -> Option<u64> {
    let part = |key| timestamp.get(key).and_then(Value::as_u64);
    part("seconds")?.checked_mul(1_000_000)?.checked_add(part("microseconds")?)
}

fn greet(greeting: &Value) -> Greeting {
    let version = greeting.get("version");
    let number = |key| version.and_then(|v| v.get("qemu")?.get(key)?.as_u64());
    let package = hostile::bounded(version.and_then(|v| v.get("package")?.as_str()).unwrap_or_default(), WORD);
    let version = match (number("major"), number("minor"), number("micro")) {
        (Some(major), Some(minor), Some(micro)) if package.is_empty() => format!("{major}.{minor}.{micro}"),
        (Some(major), Some(minor), Some(micro)) => format!("{major}.{minor}.{micro} ({package})"),
        _ => "unknown".to_owned(),
    };
    let capabilities = greeting.get("capabilities").and_then(Value::as_array);
    let capabilities = capabilities.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
    Greeting { version, capabilities }
}

#[cfg(test)]
mod tests;
