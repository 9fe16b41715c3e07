//! The guest agent's decoder: any bytes, cut anywhere, give the same pieces within the limits, and never a panic.
//!
//! `scripts/fuzz qga`; what it finds goes into `crates/qemu/tests/corpus/qga`, which an ordinary test runs through.
#![no_main]

use godwit_qemu::qga::codec::{Decoder, Limits, Piece, read};
use libfuzzer_sys::fuzz_target;

const LIMITS: Limits = Limits { line: 256, string: 32 };

fn decode(pieces: &[&[u8]]) -> Vec<Piece> {
    let mut decoder = Decoder::new(LIMITS);
    let mut found = Vec::new();
    for piece in pieces {
        let mut rest = *piece;
        while let Some(piece) = decoder.decode(&mut rest) {
            found.push(piece);
        }
    }
    found
}

fuzz_target!(|bytes: &[u8]| {
    let whole = decode(&[bytes]);
    for piece in &whole {
        if let Piece::Line { text, .. } = piece {
            assert!(text.len() <= LIMITS.line);
            let _ = read(text);
        }
    }
    // The cut follows from the input, so that files of the corpus are plain recordings.
    let pieces: Vec<&[u8]> = bytes.chunks(bytes.len() % 61 + 1).collect();
    assert_eq!(whole, decode(&pieces));
});
