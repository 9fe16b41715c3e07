//! The QMP decoder: any bytes, cut anywhere, give the same messages or an error, and never a panic.
//!
//! `scripts/fuzz qmp`; what it finds goes into `crates/qemu/tests/corpus/qmp`, which an ordinary test runs through.
#![no_main]

use godwit_qemu::qmp::{LineDecoder, Message};
use libfuzzer_sys::fuzz_target;

const LIMIT: usize = 4_096;

fn decode(pieces: &[&[u8]]) -> (Vec<Message>, bool) {
    let mut decoder = LineDecoder::new(LIMIT);
    let mut messages = Vec::new();
    for piece in pieces {
        let mut rest = *piece;
        loop {
            match decoder.decode(&mut rest) {
                Ok(Some(message)) => {
                    if let Message::Event(event) = &message {
                        let _ = event.known();
                    }
                    messages.push(message);
                }
                Ok(None) => break,
                Err(_) => return (messages, true),
            }
        }
    }
    (messages, false)
}

fuzz_target!(|bytes: &[u8]| {
    let whole = decode(&[bytes]);
    // The cut follows from the input, so that files of the corpus are plain recordings.
    let pieces: Vec<&[u8]> = bytes.chunks(bytes.len() % 61 + 1).collect();
    assert_eq!(whole, decode(&pieces));
});
