//! The guest agent's bytes into lines: pure, bounded, and unable to panic.
//!
//! The agent answers one JSON object per line, and a guest may answer anything. A line keeps at most `line` bytes, each string in it at most
//! `string`: what a program wrote without end costs no memory here, and what is left of its text is still JSON. The byte 0xFF, which JSON
//! never contains, makes void what stood before it.

use serde::Deserialize;
use serde_json::value::RawValue;

/// What is kept of what a guest says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a line; a longer one is left out whole.
    pub line: usize,
    /// Bytes of one string in it; the rest of a longer one is left out.
    pub string: usize,
}

impl Limits {
    /// For answers that hold facts.
    pub const FACTS: Self = Self { line: 256 << 10, string: 4 << 10 };
}

/// What the bytes amount to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// 0xFF: what stood before it is void.
    Mark,
    /// A line.
    Line {
        /// Without its end.
        text: Vec<u8>,
        /// Whether a string in it was longer than what is kept.
        cut: bool,
    },
    /// A line that is longer than what is kept.
    Overlong,
}

/// Where in a string the decoder is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In none.
    Outside,
    /// Between two characters.
    Inside,
    /// Behind a backslash.
    Escaped,
    /// In the digits of `\uXXXX`, so many before their end.
    Digits(u8),
}

/// Cuts bytes into [`Piece`]s.
#[derive(Debug)]
pub struct Decoder {
    limits: Limits,
    text: Vec<u8>,
    place: Place,
    /// Bytes of the string so far.
    string: usize,
    leaves_out: bool,
    cut: bool,
    overlong: bool,
}

impl Decoder {
    /// A decoder at the beginning of a line.
    #[must_use]
    pub const fn new(limits: Limits) -> Self {
        Self { limits, text: Vec::new(), place: Place::Outside, string: 0, leaves_out: false, cut: false, overlong: false }
    }

    /// What is kept from now on.
    pub const fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Takes bytes off `input` until there is a piece. Blank lines are none.
    pub fn decode(&mut self, input: &mut &[u8]) -> Option<Piece> {
        while let Some((&byte, rest)) = input.split_first() {
            *input = rest;
            match byte {
                0xff => {
                    self.begin_line();
                    return Some(Piece::Mark);
                }
                b'\n' => {
                    if let Some(piece) = self.end_line() {
                        return Some(piece);
                    }
                }
                _ => self.take(byte),
            }
        }
        None
    }

    fn begin_line(&mut self) {
        *self = Self::new(self.limits);
    }

    fn end_line(&mut self) -> Option<Piece> {
        let Self { text, cut, overlong, .. } = std::mem::replace(self, Self::new(self.limits));
        if overlong {
            return Some(Piece::Overlong);
        }
        (!text.trim_ascii().is_empty()).then_some(Piece::Line { text, cut })
    }

    fn take(&mut self, byte: u8) {
        if self.overlong {
            return;
        }
        let begins_character = byte & 0xc0 != 0x80;
        let ends_string = self.place == Place::Inside && byte == b'"';
        if self.place == Place::Inside && !ends_string && begins_character && self.string >= self.limits.string {
            self.leaves_out = true;
            self.cut = true;
        }
        self.string += 1;
        self.place = match (self.place, byte) {
            (Place::Outside, b'"') => {
                (self.string, self.leaves_out) = (0, false);
                Place::Inside
            }
            (Place::Outside, _) => Place::Outside,
            (Place::Inside, b'"') => {
                self.leaves_out = false;
                Place::Outside
            }
            (Place::Inside, b'\\') => Place::Escaped,
            (Place::Escaped, b'u') => Place::Digits(4),
            (Place::Digits(left @ 2..), _) => Place::Digits(left - 1),
            (Place::Inside | Place::Escaped | Place::Digits(_), _) => Place::Inside,
        };
        if self.leaves_out {
            return;
        }
        if self.text.len() >= self.limits.line {
            self.overlong = true;
            self.text = Vec::new();
            return;
        }
        self.text.push(byte);
    }
}

/// What a line says.
#[derive(Debug)]
pub enum Answer {
    /// The command succeeded with this.
    Return(Box<RawValue>),
    /// The guest's agent refused.
    Error {
        /// Its class of errors.
        class: String,
        /// Its text.
        description: String,
    },
    /// An object of another kind.
    Other,
}

#[derive(Deserialize)]
struct Envelope {
    #[serde(rename = "return")]
    value: Option<Box<RawValue>>,
    error: Option<ErrorBody>,
}

#[derive(Deserialize)]
struct ErrorBody {
    #[serde(default)]
    class: String,
    #[serde(default, rename = "desc")]
    description: String,
}

/// Reads a line. Fields that we do not know are passed over, without recursion; what is returned is not looked into yet.
///
/// # Errors
/// The reader's reason; the line is then no answer at all.
pub fn read(line: &[u8]) -> Result<Answer, serde_json::Error> {
    let Envelope { value, error } = serde_json::from_slice(line)?;
    Ok(match (value, error) {
        (_, Some(ErrorBody { class, description })) => Answer::Error { class, description },
        (Some(value), None) => Answer::Return(value),
        (None, None) => Answer::Other,
    })
}

#[cfg(test)]
mod tests;
