//! The NBD client: any bytes, cut anywhere, are understood as the same and answered the same, and never panic.
//!
//! `scripts/fuzz nbd_client`; what it finds goes into `crates/nbd/tests/corpus/nbd_client`, which an ordinary test runs through.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../crates/nbd/tests/fuzzed/nbd_client.rs"]
mod nbd_client;

fuzz_target!(|bytes: &[u8]| {
    nbd_client::check(bytes);
});
