//! `godwit lab-relay`: started by a lab for a link with delay or loss.

use std::ffi::OsString;
use std::process::ExitCode;

use crate::error::with_causes;
use crate::output::note;

pub(super) fn run(arguments: Vec<OsString>) -> ExitCode {
    match godwit_lab::run_relay(arguments) {
        Ok(never) => match never {},
        Err(error) => {
            note(&format!("error: {}", with_causes(&error)));
            ExitCode::FAILURE
        }
    }
}
