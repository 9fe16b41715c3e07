//! Indexes of images: any bytes give an index that is written again as it was, or an error, never a panic.
//!
//! `scripts/fuzz image_index`; what it finds goes into `crates/vault/tests/corpus/image_index`, which an ordinary test runs through.
#![no_main]

use godwit_vault::ImageIndex;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // Nobody guesses the sum: it is put right.
    let (content, _) = bytes.split_at(bytes.len().saturating_sub(32));
    let mut summed = content.to_vec();
    summed.extend_from_slice(blake3::hash(content).as_bytes());
    for bytes in [bytes, &summed] {
        if let Ok(index) = ImageIndex::read(bytes) {
            let mut again = Vec::new();
            index.write(&mut again).expect("memory");
            assert_eq!(again, bytes);
            let _ = index.find(&[7; 4096]);
        }
    }
});
