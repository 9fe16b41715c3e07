//! Pages of guest memory: any batch does what a second reader of the specification does with it, and a destination that follows an encoder
//! becomes what the source is, or finds out that it has told something wrong.
//!
//! `scripts/fuzz pages`; what it finds goes into `crates/carrier/tests/corpus/pages`, which an ordinary test runs through.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../crates/carrier/tests/fuzzed/pages.rs"]
mod pages;

fuzz_target!(|bytes: &[u8]| {
    pages::check(bytes);
});
