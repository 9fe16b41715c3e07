//! `godwit vault-worker --config-fd N`: started by an agent, does one job on a vault.

use std::ffi::OsString;
use std::process::ExitCode;

use super::{descriptors, log};
use crate::error::{Exit, with_causes};
use crate::output::note;

pub(super) fn run(arguments: Vec<OsString>) -> ExitCode {
    let Some([Some(config)]) = descriptors(&arguments, ["--config-fd"]) else {
        note("error: the vault worker is started by the agent, with --config-fd");
        return ExitCode::from(Exit::Usage as u8);
    };
    log();
    match godwit_agent::snapshot::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            note(&format!("error: {}", with_causes(&error)));
            ExitCode::FAILURE
        }
    }
}
