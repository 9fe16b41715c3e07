//! `godwit cage --plan-fd N [--status-fd N]`: started by an agent, becomes a VM's QEMU.

use std::ffi::OsString;
use std::process::ExitCode;

use super::descriptors;
use crate::error::Exit;
use crate::output::note;

pub(super) fn run(arguments: Vec<OsString>) -> ExitCode {
    let Some([Some(plan), status]) = descriptors(&arguments, ["--plan-fd", "--status-fd"]) else {
        note("error: the cage is started by the agent, with --plan-fd and --status-fd");
        return ExitCode::from(Exit::Usage as u8);
    };
    note(&format!("error: {}", godwit_qemu::cage::run(plan, status)));
    ExitCode::FAILURE
}
