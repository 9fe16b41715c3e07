//! `godwit kvm-probe`: started by an agent, tries `/dev/kvm` and may hang or die over it.

use std::ffi::OsString;
use std::process::ExitCode;

pub(super) fn run(_arguments: Vec<OsString>) -> ExitCode {
    godwit_qemu::accel::run_probe_child()
}
