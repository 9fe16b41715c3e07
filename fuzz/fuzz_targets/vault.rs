//! Packs and snapshots, and what is inside their sealed records: any bytes give pages and places within the bounds or an error, never a panic.
//!
//! `scripts/fuzz vault`; what it finds goes into `crates/vault/tests/corpus/vault`, which an ordinary test runs through.
#![no_main]

use std::cell::RefCell;

use godwit_vault::{Leaf, PackKey, PackReader, SnapshotKey, SnapshotReader, Space, Unsealed};
use libfuzzer_sys::fuzz_target;

/// So many pages each pack is said to have.
const PAGES: u32 = 1_000;

thread_local! {
    static UNSEALED: RefCell<Unsealed> = RefCell::new(Unsealed::new().expect("memory"));
}

fuzz_target!(|bytes: &[u8]| {
    // Nothing but the corpus opens with a key; beyond the seals, records are read without them.
    if let Ok(snapshot) = SnapshotReader::open(bytes, &SnapshotKey::new([0x22; 32])) {
        for space in 0..snapshot.spaces().len() as u16 {
            for page in snapshot.leaves(space).collect::<Vec<_>>() {
                let _ = snapshot.leaf(space, page);
            }
        }
    }
    UNSEALED.with_borrow_mut(|room| {
        for key in [0x55, 0x77, 0x99] {
            if let Ok(pack) = PackReader::open(bytes, &PackKey::new([key; 32])) {
                for chunk in 0..pack.chunks() {
                    let _ = pack.chunk(chunk, room);
                }
                let kept = (0..pack.pages().min(PAGES)).filter_map(|page| pack.place_of(page));
                assert!(kept.is_sorted() && pack.chunks() <= pack.pages().div_ceil(16));
            }
        }
        for differences in [0, 2] {
            if let Ok(packed) = room.unpack(bytes, 3, differences) {
                assert_eq!((packed.pages.len(), packed.checks.len()), (3, differences));
            }
        }
    });
    if let Ok(leaf) = Leaf::decode(bytes, 300, |pack| if pack < 3 { PAGES } else { 0 }) {
        assert!(leaf.located().all(|(page, at)| page < 300 && at.pack < 3 && at.page < PAGES));
        assert_eq!(Leaf::decode(&leaf.encode(), 300, |_| PAGES), Ok(leaf));
    }
    if let Ok(spaces) = Space::decode_all(bytes) {
        assert_eq!(Space::encode_all(&spaces).as_deref(), Ok(bytes));
    }
});
