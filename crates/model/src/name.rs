//! Names that people give: short, lower case, safe in a path, a log line and a host name.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A name of a host, VM, image, pool, volume, network or team: 1 to 63 characters of `a-z`, `0-9`, `-`, `.` and `_`, the first a letter or
/// digit. Nothing else can be expressed, so a path separator or control character never gets past the edge.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, utoipa::ToSchema)]
#[serde(transparent)]
#[schema(value_type = String, pattern = "^[a-z0-9][a-z0-9._-]{0,62}$", example = "web1")]
pub struct Name(String);

/// Longest name, in characters.
pub const MAX_NAME: usize = 63;

/// Why a text is not a [`Name`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidName {
    /// Empty text.
    #[error("a name must not be empty")]
    Empty,
    /// More than [`MAX_NAME`] characters.
    #[error("a name has at most {MAX_NAME} characters, this has {length}")]
    TooLong {
        /// Length in bytes.
        length: usize,
    },
    /// A character outside the alphabet, or a first character that is neither letter nor digit.
    #[error("character {} at position {position} is not allowed in a name", character.escape_default())]
    Character {
        /// The offending character.
        character: char,
        /// Its position, from 0.
        position: usize,
    },
}

impl Name {
    /// Checks and wraps `text`.
    ///
    /// # Errors
    /// [`InvalidName`] says which rule the text breaks.
    pub fn new(text: impl Into<String>) -> Result<Self, InvalidName> {
        let text = text.into();
        if text.is_empty() {
            return Err(InvalidName::Empty);
        }
        if text.len() > MAX_NAME {
            return Err(InvalidName::TooLong { length: text.len() });
        }
        for (position, character) in text.chars().enumerate() {
            let plain = character.is_ascii_lowercase() || character.is_ascii_digit();
            if !plain && (position == 0 || !matches!(character, '-' | '.' | '_')) {
                return Err(InvalidName::Character { character, position });
            }
        }
        Ok(Self(text))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl FromStr for Name {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::new(text)
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_that_could_leave_a_directory_or_a_line_are_refused() {
        for bad in ["", ".", "..", "../x", "a/b", "a\0b", "a\nb", "\u{202e}x", "-x", "Äh", "A", " a", &"x".repeat(64)] {
            assert!(Name::new(bad).is_err(), "{bad:?} was accepted");
        }
        for good in ["a", "web1", "h-1.rack_2", "0", &"x".repeat(63)] {
            assert_eq!(Name::new(good).expect("valid").as_str(), good);
        }
    }

    proptest! {
        #[test]
        fn prop_an_accepted_name_is_one_plain_path_component(text in "\\PC{0,70}") {
            if let Ok(name) = Name::new(text) {
                let path = std::path::Path::new(name.as_str());
                prop_assert_eq!(path.components().count(), 1);
                prop_assert!(matches!(path.components().next(), Some(std::path::Component::Normal(_))));
            }
        }
    }
}
