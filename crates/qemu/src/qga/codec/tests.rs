//! Tests of the guest agent's decoder: every cut, every limit, any bytes.

use proptest::prelude::*;

use super::*;

const SMALL: Limits = Limits { line: 64, string: 16 };

fn decode_in_pieces(bytes: &[u8], size: usize, limits: Limits) -> Vec<Piece> {
    let mut decoder = Decoder::new(limits);
    let mut pieces = Vec::new();
    for mut rest in bytes.chunks(size.max(1)) {
        while let Some(piece) = decoder.decode(&mut rest) {
            pieces.push(piece);
        }
    }
    pieces
}

fn line(text: &str, cut: bool) -> Piece {
    Piece::Line { text: text.as_bytes().to_vec(), cut }
}

#[test]
fn what_stands_before_the_mark_is_void_and_lines_are_told_apart() {
    let pieces = decode_in_pieces(b"{\"half\": \"a\xff\n\r\n{\"return\": 7}\r\n{}\n{", 3, Limits::FACTS);
    assert_eq!(pieces, [Piece::Mark, line("{\"return\": 7}\r", false), line("{}", false)]);
}

#[test]
fn a_string_is_cut_where_it_stays_a_string() {
    let table: [(&str, &str, bool); 6] = [
        (r#"{"a":"0123456789abcdef","b":1}"#, r#"{"a":"0123456789abcdef","b":1}"#, false),
        (r#"{"a":"0123456789abcdefXYZ","b":1}"#, r#"{"a":"0123456789abcdef","b":1}"#, true),
        // The limit falls into an escape: it is kept whole, the quote behind it ends the string.
        (r#"{"a":"0123456789abcde\"XYZ","b":1}"#, r#"{"a":"0123456789abcde\"","b":1}"#, true),
        (r#"{"a":"0123456789abcd\u0041XYZ\"","b":1}"#, r#"{"a":"0123456789abcd\u0041","b":1}"#, true),
        (r#"{"a":"0123456789abcdeé€","b":1}"#, r#"{"a":"0123456789abcdeé","b":1}"#, true),
        (r#"{"a":"0123456789abcdef\\","b":"x"}"#, r#"{"a":"0123456789abcdef","b":"x"}"#, true),
    ];
    for (given, kept, cut) in table {
        assert_eq!(decode_in_pieces(format!("{given}\n").as_bytes(), 5, SMALL), [line(kept, cut)], "{given}");
        serde_json::from_str::<serde_json::Value>(kept).expect("still JSON");
    }
}

#[test]
fn what_has_no_end_costs_no_memory() {
    let mut decoder = Decoder::new(SMALL);
    assert_eq!(decoder.decode(&mut &b"{\"a\":\""[..]), None);
    for _ in 0..1_000 {
        assert_eq!(decoder.decode(&mut &[b'x'; 1_000][..]), None);
    }
    assert!(decoder.text.capacity() < 256);
    assert_eq!(decoder.decode(&mut &b"\"}\n"[..]), Some(line("{\"a\":\"xxxxxxxxxxxxxxxx\"}", true)));
    for _ in 0..1_000 {
        assert_eq!(decoder.decode(&mut &[b'['; 1_000][..]), None);
    }
    assert_eq!(decoder.text.capacity(), 0);
    assert_eq!(decoder.decode(&mut &b"\n"[..]), Some(Piece::Overlong));
    assert_eq!(decoder.decode(&mut &b"{}\n"[..]), Some(line("{}", false)), "the next line is read again");
}

#[test]
fn answers_are_read_and_the_unknown_is_passed_over() {
    assert!(
        matches!(read(br#"{"id": 4, "return": {"a": []}, "new": [[{}]]}"#), Ok(Answer::Return(value)) if value.get() == r#"{"a": []}"#)
    );
    let Ok(Answer::Error { class, description }) = read(br#"{"error": {"class": "GenericError", "desc": "no", "more": 1}}"#) else {
        panic!("no error")
    };
    assert_eq!((class.as_str(), description.as_str()), ("GenericError", "no"));
    assert!(matches!(read(br#"{"event": "FROM_THE_FUTURE"}"#), Ok(Answer::Other)));
    for bad in [&b"[]"[..], b"7", b"{", b"HTTP/1.1 400 Bad Request", b"{\"return\": }", b"\x80"] {
        assert!(read(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn deep_nesting_is_an_error_and_no_stack_overflow() {
    let deep = |open: &str, key: &str| format!("{{\"{key}\": {}", open.repeat(100_000));
    for key in ["return", "unknown", "error"] {
        assert!(read(deep("[", key).as_bytes()).is_err());
        assert!(read(deep("{\"a\":", key).as_bytes()).is_err());
    }
    let closed = format!("{{\"return\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    // Passed over without recursion, and refused by whoever wants to know what is in it.
    let Ok(Answer::Return(value)) = read(closed.as_bytes()) else { panic!("no answer") };
    assert!(serde_json::from_str::<serde_json::Value>(value.get()).is_err());
}

/// Every file of the corpus goes through the decoder in several cuts, with the same outcome; the fuzzer starts from the same files.
#[test]
fn corpus_qga_decodes_alike_in_any_pieces() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/qga");
    let mut files = 0;
    for entry in std::fs::read_dir(folder).expect("the corpus is there") {
        let bytes = std::fs::read(entry.expect("entry").path()).expect("readable");
        let whole = decode_in_pieces(&bytes, bytes.len(), SMALL);
        for size in [1, 2, 7, 64] {
            assert_eq!(decode_in_pieces(&bytes, size, SMALL), whole);
        }
        for piece in &whole {
            if let Piece::Line { text, .. } = piece {
                let _ = read(text);
            }
        }
        files += 1;
    }
    assert!(files >= 8, "only {files} files in the corpus");
}

proptest! {
    #[test]
    fn prop_any_bytes_in_any_pieces_give_the_same_within_the_limits(bytes in proptest::collection::vec(any::<u8>(), 0..600), size in 1_usize..50) {
        let whole = decode_in_pieces(&bytes, bytes.len(), SMALL);
        prop_assert_eq!(&whole, &decode_in_pieces(&bytes, size, SMALL));
        for piece in whole {
            if let Piece::Line { text, .. } = piece {
                prop_assert!(text.len() <= SMALL.line);
                let _ = read(&text);
            }
        }
    }

    #[test]
    fn prop_json_with_strings_of_any_length_stays_json(texts in proptest::collection::vec("[ -~äöü€\"\\\\\n]{0,60}", 0..4)) {
        let limits = Limits { line: 4_096, string: 16 };
        let bytes = format!("{}\n", serde_json::json!({"return": texts}));
        let pieces = decode_in_pieces(bytes.as_bytes(), 9, limits);
        let [Piece::Line { text, .. }] = pieces.as_slice() else { panic!("{pieces:?}") };
        let Answer::Return(value) = read(text).expect("still an answer") else { panic!("no return") };
        let kept: Vec<String> = serde_json::from_str(value.get()).expect("still strings");
        prop_assert_eq!(kept.len(), texts.len());
        for (kept, text) in kept.iter().zip(&texts) {
            prop_assert!(text.starts_with(kept.as_str()));
        }
    }
}
