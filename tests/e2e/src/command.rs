//! Programs of this machine that are run for a test.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// Runs a program, which must succeed.
///
/// # Errors
/// What it said on its standard error.
pub fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).output().with_context(|| format!("run {program}"))?;
    ensure!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Runs a program with something to read, which must succeed.
///
/// # Errors
/// What it said on its standard error.
pub fn run_with_input(program: &str, arguments: &[&str], input: &str) -> Result<()> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("run {program}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // What it says itself tells more than a broken pipe.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().with_context(|| format!("run {program}"))?;
    ensure!(output.status.success(), "{program} {arguments:?} <<< {input:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A path as an argument.
///
/// # Errors
/// When it is no text.
pub fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path of text")
}
