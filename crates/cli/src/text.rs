//! Making text harmless and readable: what comes from guests, hosts, peers and files may contain anything.

use std::borrow::Cow;
use std::fmt::Write;

use godwit_model::UnixMillis;
pub(crate) use godwit_model::hostile::{is_hostile, visible, visible_lines};
use jiff::Timestamp;

/// JSON in which every character that [`visible`] would escape is escaped too. Outside strings JSON has none of them but line breaks.
pub(crate) fn safe_json(json: &str) -> Cow<'_, str> {
    let hostile = |character| character != '\n' && is_hostile(character);
    if !json.contains(hostile) {
        return Cow::Borrowed(json);
    }
    let mut shown = String::with_capacity(json.len() + 16);
    for character in json.chars() {
        if hostile(character) {
            for unit in character.encode_utf16(&mut [0; 2]) {
                // Writing to a String cannot fail.
                let _ = write!(shown, "\\u{unit:04x}");
            }
        } else {
            shown.push(character);
        }
    }
    Cow::Owned(shown)
}

/// A moment, in UTC.
pub(crate) fn moment(at: UnixMillis) -> String {
    let known = i64::try_from(at.get()).ok().and_then(|millis| Timestamp::from_millisecond(millis).ok());
    known.map_or_else(|| "?".to_owned(), |at| at.strftime("%Y-%m-%d %H:%M:%SZ").to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_stays_the_same_json() {
        let value = serde_json::json!({ "message": "\u{1b}[2J\u{9b}\u{202e}\u{e0041}\n", "plain": "ä" });
        for json in [value.to_string(), serde_json::to_string_pretty(&value).expect("JSON")] {
            let shown = safe_json(&json);
            assert!(!shown.contains(|character| character != '\n' && is_hostile(character)));
            assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).expect("still JSON"), value);
        }
    }

    #[test]
    fn moments_are_utc() {
        assert_eq!(moment(UnixMillis(0)), "1970-01-01 00:00:00Z");
        assert_eq!(moment(UnixMillis(u64::MAX)), "?");
    }
}
