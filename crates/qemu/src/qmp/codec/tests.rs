//! Tests of the QMP decoder: every cut, every limit, any bytes.

use proptest::prelude::*;
use serde_json::json;

use super::*;

const SESSION: &str = concat!(
    r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}"#,
    "\r\n",
    r#"{"return": {}, "id": 1}"#,
    "\r\n\r\n",
    r#"{"timestamp": {"seconds": 5, "microseconds": 7}, "event": "BRAND_NEW_EVENT", "data": {"x": [1]}, "colour": "blue"}"#,
    "\r\n",
    r#"{"id": 2, "error": {"class": "GenericError", "desc": "no such thing", "weight": 3}}"#,
    "\r\n",
    r#"{"error": {"class": "GenericError", "desc": "JSON parse error"}}"#,
    "\r\n",
    r#"{"future": true}"#,
    "\r\n",
);

fn decode_in_pieces(bytes: &[u8], sizes: impl Iterator<Item = usize>, limit: usize) -> (Vec<Message>, Option<DecodeError>) {
    let mut decoder = LineDecoder::new(limit);
    let mut messages = Vec::new();
    let mut rest = bytes;
    for size in sizes {
        if rest.is_empty() {
            break;
        }
        let (mut piece, later) = rest.split_at(size.clamp(1, rest.len()));
        rest = later;
        loop {
            match decoder.decode(&mut piece) {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => return (messages, Some(error)),
            }
        }
    }
    (messages, None)
}

fn whole_session() -> Vec<Message> {
    let (messages, error) = decode_in_pieces(SESSION.as_bytes(), std::iter::repeat(SESSION.len()), MAX_LINE);
    assert!(error.is_none(), "{error:?}");
    messages
}

#[test]
fn an_error_of_qemu_is_harmless_and_short() {
    let long = "x".repeat(100_000);
    for (description, shown) in [
        ("\\u001b]0;owned\\u0007", "\\u{1b}]0;owned\\u{7}".to_owned()),
        ("\\u009b2J\\u202e", "\\u{9b}2J\\u{202e}".to_owned()),
        ("two\\r\\nlines", "two\\r\\nlines".to_owned()),
        (&long, format!("{}…", "x".repeat(SENTENCE - 1))),
    ] {
        let line = format!("{{\"id\": 1, \"error\": {{\"class\": \"{description}\", \"desc\": \"{description}\"}}}}\n");
        let message = LineDecoder::default().decode(&mut line.as_bytes()).expect("decoded");
        let Some(Message::Failure { failure, .. }) = message else { panic!("{message:?}") };
        assert_eq!(failure.description, shown);
        let error = crate::QmpError::Refused { command: "cont".into(), failure };
        assert!(!error.to_string().contains(hostile::is_hostile), "{error}");
    }
}

#[test]
fn a_session_is_understood_and_the_unknown_is_kept() {
    let failure = |description: &str| Failure { class: "GenericError".into(), description: description.into() };
    assert_eq!(
        whole_session(),
        [
            Message::Greeting(Greeting { version: "7.2.22 (Debian)".into(), capabilities: vec!["oob".into()] }),
            Message::Return { id: 1, value: json!({}) },
            Message::Event(Event { name: "BRAND_NEW_EVENT".into(), data: json!({"x": [1]}), micros: Some(5_000_007) }),
            Message::Failure { id: Some(2), failure: failure("no such thing") },
            Message::Failure { id: None, failure: failure("JSON parse error") },
            Message::Other(json!({"future": true}).as_object().expect("object").clone()),
        ]
    );
}

#[test]
fn a_session_cut_at_any_byte_gives_a_prefix_and_no_error() {
    let whole = whole_session();
    for length in 0..SESSION.len() {
        let (messages, error) = decode_in_pieces(&SESSION.as_bytes()[..length], std::iter::repeat(SESSION.len()), MAX_LINE);
        assert!(error.is_none(), "cut at {length}: {error:?}");
        assert_eq!(messages, whole[..messages.len()], "cut at {length}");
    }
}

#[test]
fn a_line_over_the_limit_is_refused_before_it_is_stored() {
    let mut decoder = LineDecoder::new(10);
    assert!(matches!(decoder.decode(&mut &b"0123456789"[..]), Ok(None)), "the limit itself fits");
    assert!(matches!(decoder.decode(&mut &b"x"[..]), Err(DecodeError::TooLong { limit: 10 })));
    assert!(decoder.partial.capacity() < 100);
    let (messages, error) = decode_in_pieces(&[b'{'; 4096], std::iter::repeat(4096), 100);
    assert!(messages.is_empty() && matches!(error, Some(DecodeError::TooLong { .. })));
}

#[test]
fn deep_nesting_is_an_error_and_no_stack_overflow() {
    let mut line = vec![b'['; 1 << 20];
    line.push(b'\n');
    assert!(matches!(LineDecoder::default().decode(&mut &line[..]), Err(DecodeError::NotAnObject(_))));
}

/// Every file of the corpus goes through the decoder in several cuts, with the same outcome; the fuzzer starts from the same files.
#[test]
fn corpus_qmp_decodes_alike_in_any_pieces() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/qmp");
    let mut files = 0;
    for entry in std::fs::read_dir(folder).expect("the corpus is there") {
        let bytes = std::fs::read(entry.expect("entry").path()).expect("readable");
        let (whole, error) = decode_in_pieces(&bytes, std::iter::repeat(bytes.len()), 4096);
        for size in [1, 2, 7, 64] {
            let (messages, other) = decode_in_pieces(&bytes, std::iter::repeat(size), 4096);
            assert_eq!(messages, whole);
            assert_eq!(error.is_some(), other.is_some());
        }
        files += 1;
    }
    assert!(files >= 8, "only {files} files in the corpus");
}

proptest! {
    #[test]
    fn prop_any_bytes_in_any_pieces_end_in_messages_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..600), size in 1_usize..50) {
        let (whole, error) = decode_in_pieces(&bytes, std::iter::repeat(bytes.len().max(1)), 64);
        let (pieces, other) = decode_in_pieces(&bytes, std::iter::repeat(size), 64);
        prop_assert_eq!(whole, pieces);
        prop_assert_eq!(error.is_some(), other.is_some());
    }

    #[test]
    fn prop_a_session_in_any_pieces_is_the_same_session(sizes in proptest::collection::vec(1_usize..90, 1..200)) {
        let (messages, error) = decode_in_pieces(SESSION.as_bytes(), sizes.into_iter().chain(std::iter::repeat(13)), MAX_LINE);
        prop_assert!(error.is_none());
        prop_assert_eq!(messages, whole_session());
    }

    #[test]
    fn prop_damage_to_a_session_never_panics(position in 0..SESSION.len(), byte in any::<u8>()) {
        let mut bytes = SESSION.as_bytes().to_vec();
        bytes[position] = byte;
        let _ = decode_in_pieces(&bytes, std::iter::repeat(17), MAX_LINE);
    }
}
