//! The TPM: a command response buffer (CRB) at fed40000, where every PC has it. It is on no bus and has no slot, so nothing can be in its place.
//!
//! The guest talks to swtpm; QEMU hands on, and collects its state for a migration.

use std::os::fd::RawFd;

use super::Line;
use super::options::{Object, Pairs};

/// `control` is QEMU's end of swtpm's control socket.
pub(super) fn add(line: &mut Line, control: RawFd) {
    line.pairs("-chardev", Pairs::new().first("socket").with("id", "tpm-control").with("fd", control));
    line.pairs("-tpmdev", Pairs::new().first("emulator").with("id", "tpm-emulator").with("chardev", "tpm-control"));
    line.json("-device", Object::device("tpm-crb", "tpm").with("tpmdev", "tpm-emulator"));
}
