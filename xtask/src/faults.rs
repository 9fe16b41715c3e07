//! Builds what `cargo xtask faults` needs, and starts the program that does the runs: `tests/e2e/src/bin/faults.rs`.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::ci::{images, is_root, runner};

/// True when every promise was kept in every run.
pub(crate) fn run(root: &Path, arguments: &[String]) -> Result<bool> {
    if !is_root() {
        bail!("the runs make network namespaces and need root");
    }
    let environment = images::environment(root)?;
    // Without `--workspace` some libraries would be built again with other features.
    if !runner::cargo(root).args(["build", "--locked", "--workspace", "--bins"]).status()?.success() {
        bail!("the programs do not build");
    }
    let built = runner::target(root).join("debug");
    let mut faults = std::process::Command::new(built.join("faults"));
    faults.args(arguments).current_dir(root).envs(environment).env("GODWIT_BIN", built.join("godwit"));
    Ok(faults.status().context("run the faults")?.success())
}
