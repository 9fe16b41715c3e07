//! The NBD server: any bytes, cut anywhere, are understood as the same and answered the same, and never panic.
//!
//! `scripts/fuzz nbd_server`; what it finds goes into `crates/nbd/tests/corpus/nbd_server`, which an ordinary test runs through.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../crates/nbd/tests/fuzzed/nbd_server.rs"]
mod nbd_server;

fuzz_target!(|bytes: &[u8]| {
    nbd_server::check(bytes);
});
