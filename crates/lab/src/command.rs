//! Running `ip` and `tc`, with errors that say what was run and what it said.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::LabError;

/// Runs a command to its end; its output is only looked at when it fails.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Result<(), LabError> {
    run_with_input(program, arguments, "")
}

/// Runs `ip` or `tc` commands in a namespace, one per line, in one process.
pub(crate) fn batch(program: &str, namespace: &str, lines: &str) -> Result<(), LabError> {
    run_with_input(program, &["-n", namespace, "-batch", "-"], lines)
}

fn run_with_input(program: &str, arguments: &[&str], input: &str) -> Result<(), LabError> {
    let describe = || {
        let mut text = format!("{program} {}", arguments.join(" "));
        if !input.is_empty() {
            text.push_str(&format!(" <<< '{}'", input.trim()));
        }
        text
    };
    let failed_to_start = |source| LabError::CommandStart { command: describe(), source };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed_to_start)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A command that ends early closes its input; its status tells more than the broken pipe.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(failed_to_start)?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(LabError::Command { command: describe(), stderr })
}
