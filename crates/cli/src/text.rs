//! Making text harmless and readable: what comes from guests, hosts, peers and files may contain anything.

use std::borrow::Cow;
use std::fmt::Write;

use godwit_model::UnixMillis;
use jiff::Timestamp;

/// Whether a character could drive a terminal, break a line, or change the order in which others are shown.
pub(crate) fn is_hostile(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{61c}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
                | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}'
        )
}

/// `text` as one line in which nothing acts on the terminal: control and direction characters are shown as escapes.
pub(crate) fn visible(text: &str) -> Cow<'_, str> {
    if !text.contains(is_hostile) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        match character {
            '\n' => shown.push_str("\\n"),
            '\r' => shown.push_str("\\r"),
            '\t' => shown.push_str("\\t"),
            hostile if is_hostile(hostile) => shown.extend(hostile.escape_unicode()),
            other => shown.push(other),
        }
    }
    Cow::Owned(shown)
}

/// As [`visible`], but lines stay lines.
pub(crate) fn visible_lines(text: &str) -> String {
    text.lines().map(visible).collect::<Vec<_>>().join("\n")
}

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
    fn nothing_that_acts_on_a_terminal_passes() {
        let cases = [
            ("web1", "web1"),
            ("größer → 3", "größer → 3"),
            ("\u{1b}]0;owned\u{7}", "\\u{1b}]0;owned\\u{7}"),
            ("a\r\nb\tc", "a\\r\\nb\\tc"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("\u{202e}gnp.exe", "\\u{202e}gnp.exe"),
            ("\u{7f}", "\\u{7f}"),
        ];
        for (hostile, shown) in cases {
            assert_eq!(visible(hostile), shown);
        }
        for character in (0..=0x10_ffff).filter_map(char::from_u32).filter(|character| is_hostile(*character)) {
            assert!(!visible(&character.to_string()).contains(character), "{character:?}");
        }
    }

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
    fn lines_stay_lines_and_moments_are_utc() {
        assert_eq!(visible_lines("a\nb\u{1b}"), "a\nb\\u{1b}");
        assert_eq!(moment(UnixMillis(0)), "1970-01-01 00:00:00Z");
        assert_eq!(moment(UnixMillis(u64::MAX)), "?");
    }
}
