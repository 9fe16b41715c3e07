//! The carrier's frames: any bytes, cut anywhere, give the same frames or the same error; what was read is written again byte for byte, and
//! no more than one frame waits.
//!
//! `scripts/fuzz frames`; what it finds goes into `crates/carrier/tests/corpus/frames`, which an ordinary test runs through.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../crates/carrier/tests/fuzzed/frames.rs"]
mod frames;

fuzz_target!(|bytes: &[u8]| {
    frames::check(bytes);
});
