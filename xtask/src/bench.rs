//! Builds what `cargo xtask bench` needs, Godwit as it is released, and starts the program that measures:
//! `tests/e2e/src/bin/bench-migration.rs`, `bench-prediction.rs`, `bench-disks.rs` or `bench-snapshot.rs`.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::ci::{images, is_root, runner};

/// True when everything was measured.
pub(crate) fn run(root: &Path, arguments: &[String]) -> Result<bool> {
    let Some((kind, rest)) =
        arguments.split_first().filter(|(kind, _)| matches!(kind.as_str(), "migration" | "prediction" | "disks" | "snapshot"))
    else {
        bail!("there are four kinds of bench: cargo xtask bench migration, prediction, disks, snapshot");
    };
    let bench = format!("bench-{kind}");
    if !is_root() {
        bail!("a bench makes network namespaces and needs root");
    }
    let mut environment = images::guest(root)?;
    environment.extend(images::other_qemu(root)?);
    for (package, program) in [("godwit", "godwit"), ("godwit-e2e", bench.as_str())] {
        let build = ["build", "--locked", "--release", "--package", package, "--bin", program];
        if !runner::cargo(root).args(build).status()?.success() {
            bail!("{program} does not build");
        }
    }
    let built = runner::target(root).join("release");
    let mut bench = std::process::Command::new(built.join(&bench));
    bench.args(rest).current_dir(root).envs(environment).env("GODWIT_BIN", built.join("godwit"));
    Ok(bench.status().context("run the bench")?.success())
}
