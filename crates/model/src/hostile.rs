//! Text from outside: what guests, QEMU, tools, peers and files say may contain anything, and is made harmless and short before it is shown.

use std::borrow::Cow;

/// Most that is kept of one sentence of QEMU, a tool or a peer, in characters.
pub const SENTENCE: usize = 1_000;

/// Most that is kept of a word, such as the name of a state or an error class, in characters.
pub const WORD: usize = 64;

/// Whether a character could drive a terminal, break a line, or change the order in which others are shown.
#[must_use]
pub fn is_hostile(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{61c}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
                | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}'
        )
}

/// `text` as one line in which nothing acts on the terminal: control and direction characters are shown as escapes.
#[must_use]
pub fn visible(text: &str) -> Cow<'_, str> {
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
#[must_use]
pub fn visible_lines(text: &str) -> String {
    text.lines().map(visible).collect::<Vec<_>>().join("\n")
}

/// As [`visible`], and no longer than `limit` characters: what is cut off leaves `…`. What is visible and short already is not changed, so
/// that a text may pass through here twice.
#[must_use]
pub fn bounded(text: &str, limit: usize) -> String {
    // Cut before escaping too: the work depends on the limit, not on what somebody sent.
    let start = text.char_indices().nth(limit + 1).and_then(|(end, _)| text.get(..end)).unwrap_or(text);
    let shown = visible(start);
    if shown.chars().nth(limit).is_none() {
        return shown.into_owned();
    }
    shown.chars().take(limit.saturating_sub(1)).chain(['…']).collect()
}

/// As [`bounded`], but lines stay lines: for what a refusal says, which may quote anybody.
#[must_use]
pub fn bounded_lines(text: &str, limit: usize) -> String {
    text.lines().map(|line| bounded(line, limit)).take(LINES).collect::<Vec<_>>().join("\n")
}

/// Most lines that are kept of a text.
const LINES: usize = 64;

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
            assert_eq!(bounded(hostile, SENTENCE), shown);
        }
        for character in (0..=0x10_ffff).filter_map(char::from_u32).filter(|character| is_hostile(*character)) {
            assert!(!visible(&character.to_string()).contains(character), "{character:?}");
        }
        assert_eq!(visible_lines("a\nb\u{1b}"), "a\nb\\u{1b}");
        assert_eq!(bounded_lines("a\nbcd\u{1b}", 3), "a\nbc…");
        assert_eq!(bounded_lines(&"\n".repeat(1 << 20), 3).len(), LINES - 1);
    }

    #[test]
    fn long_text_is_cut_and_says_so_and_short_text_is_not_changed_again() {
        assert_eq!(bounded("abcd", 4), "abcd");
        assert_eq!(bounded("abcde", 4), "abc…");
        assert_eq!(bounded(&"\u{1b}".repeat(1 << 20), 8), "\\u{1b}\\…");
        assert_eq!(bounded("äöüß", 3), "äö…");
        for text in ["abcde", "\u{1b}[2J", "ä\nb"] {
            let once = bounded(text, 9);
            assert_eq!(bounded(&once, 9), once);
            assert!(once.chars().count() <= 9);
        }
    }
}
