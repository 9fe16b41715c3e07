//! Stays, and what is inside their sealed records: any bytes give chunks and an identity within the bounds or an error, never a panic.
//!
//! `scripts/fuzz stay`; what it finds goes into `crates/vault/tests/corpus/stay`, which an ordinary test runs through.
#![no_main]

use std::cell::RefCell;
use std::io::Cursor;

use godwit_vault::{Chunk, Identity, StayKey, StayReader, Unpacker};
use libfuzzer_sys::fuzz_target;

thread_local! {
    static UNPACKER: RefCell<Unpacker> = RefCell::new(Unpacker::new().expect("memory"));
}

fn check(chunk: &Chunk<'_>) {
    assert!((1..=64).contains(&chunk.len()));
    let pages: Vec<u32> = chunk.pages().map(|(page, _)| page).collect();
    assert_eq!(pages.len(), chunk.len());
    assert!(pages.windows(2).all(|pair| pair[0] < pair[1]) && pages[0] / 64 == pages[pages.len() - 1] / 64);
}

fuzz_target!(|bytes: &[u8]| {
    // Nothing but the corpus opens with a key; beyond the seals, records are read without them.
    if let Ok(mut reader) = StayReader::open(Cursor::new(bytes), &StayKey::new([0x22; 32])) {
        while let Ok(Some(chunk)) = reader.next_chunk() {
            check(&chunk);
        }
    }
    UNPACKER.with_borrow_mut(|unpacker| {
        if let Ok(chunk) = unpacker.unpack(bytes) {
            check(&chunk);
        }
    });
    if let Ok(identity) = Identity::decode(bytes) {
        assert_eq!(identity.encode().as_deref(), Ok(bytes));
    }
});
