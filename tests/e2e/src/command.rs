//! Programs of this machine that are run for a test.

use std::path::Path;
use std::process::Command;

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

/// A path as an argument.
///
/// # Errors
/// When it is no text.
pub fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path of text")
}
