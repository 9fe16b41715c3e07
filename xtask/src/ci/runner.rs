//! Runs suites of tests: under nextest where it is installed (a process and a time limit for each test), else under
//! `cargo test` with one time limit for all. Either way the outcome of every test is counted.

use std::fmt;
use std::io::{BufRead, BufReader, ErrorKind, pipe};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

use anyhow::{Context, Result};

use super::outcomes::{self, Tally};

/// For `timeout`, where no runner of tests ends what hangs.
const LIMIT: &str = "25m";

/// Tests that run together.
#[derive(Debug, Clone, Copy)]
pub(super) enum Suite {
    /// Unit, property and fuzz-corpus tests of all crates.
    Crates,
    /// Examples in documentation.
    Documents,
    /// Real QEMU and real kernels, one test at a time.
    EndToEnd,
}

/// What runs the tests.
pub(super) enum Runner {
    Nextest,
    CargoTest,
}

impl fmt::Display for Runner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nextest => "cargo nextest",
            Self::CargoTest => "cargo test (cargo-nextest is not installed: a test that hangs ends its whole suite)",
        })
    }
}

impl Runner {
    pub(super) fn find(root: &Path) -> Self {
        if has_subcommand(root, "nextest") { Self::Nextest } else { Self::CargoTest }
    }

    /// True when every test of the suite passed.
    pub(super) fn run(&self, root: &Path, suite: Suite, environment: &[(String, String)], tally: &mut Tally) -> Result<bool> {
        match (self, suite) {
            (Self::Nextest, Suite::Crates) => nextest(root, "ci", "not package(godwit-e2e)", environment, tally),
            (Self::Nextest, Suite::EndToEnd) => nextest(root, "e2e", "package(godwit-e2e)", environment, tally),
            (Self::CargoTest, Suite::Crates) => {
                let arguments = ["--workspace", "--exclude", "godwit-e2e", "--tests"];
                cargo_test(root, &arguments, None, environment, tally)
            }
            (Self::CargoTest, Suite::EndToEnd) => {
                let arguments = ["--package", "godwit-e2e", "--tests", "--", "--test-threads=1"];
                cargo_test(root, &arguments, Some("godwit-e2e"), environment, tally)
            }
            // nextest does not run these.
            (_, Suite::Documents) => cargo_test(root, &["--workspace", "--doc"], None, environment, tally),
        }
    }
}

/// The cargo that runs this program, in the repository, without standard input.
pub(crate) fn cargo(root: &Path) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root).stdin(Stdio::null());
    command
}

/// The same, with these arguments, where it takes only the time that nobody else wants.
pub(super) fn idle_cargo(root: &Path, arguments: &[&str]) -> Command {
    let cargo = cargo(root);
    let mut command = Command::new("nice");
    command.args(["-n", "19"]).arg(cargo.get_program()).args(arguments).current_dir(root).stdin(Stdio::null());
    command
}

/// Where cargo builds.
pub(crate) fn target(root: &Path) -> PathBuf {
    root.join(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

pub(super) fn has_subcommand(root: &Path, name: &str) -> bool {
    cargo(root).args([name, "--version"]).output().is_ok_and(|output| output.status.success())
}

/// Profiles are in `.config/nextest.toml`; each writes a JUnit report. All of the workspace is built whatever runs, so that all suites have the
/// same features of what they depend on, and nothing is built twice.
fn nextest(root: &Path, profile: &str, which: &str, environment: &[(String, String)], tally: &mut Tally) -> Result<bool> {
    let report = target(root).join("nextest").join(profile).join("junit.xml");
    match fs::remove_file(&report) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("remove the last report, {}", report.display()));
        }
        _ => {}
    }
    let status = cargo(root)
        .args(["nextest", "run", "--locked", "--workspace", "--profile", profile, "--filterset", which])
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .status()
        .context("run cargo nextest")?;
    match fs::read_to_string(&report) {
        Ok(text) => tally.add(outcomes::read_junit(&text)),
        // Nothing compiled, nothing ran: the exit status says it.
        Err(error) if error.kind() == ErrorKind::NotFound && !status.success() => {}
        Err(error) => return Err(error).with_context(|| format!("read the report, {}", report.display())),
    }
    Ok(status.success())
}

/// Output of cargo and of the tests goes through one pipe: which binary a test belongs to is told by the order of lines.
fn cargo_test(
    root: &Path,
    which: &[&str],
    package: Option<&str>,
    environment: &[(String, String)],
    tally: &mut Tally,
) -> Result<bool> {
    let (reader, writer) = pipe().context("make a pipe")?;
    let plain = cargo(root);
    let mut command = Command::new("timeout");
    command
        .args(["--kill-after=30s", LIMIT])
        .arg(plain.get_program())
        .args(["test", "--locked", "--no-fail-fast"])
        .args(which)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .current_dir(root)
        .stdin(Stdio::null())
        .stdout(writer.try_clone().context("double the pipe")?)
        .stderr(writer);
    let mut child = command.spawn().context("run cargo test under timeout")?;
    // Our ends of the pipe: without this the reader would never see its end.
    drop(command);
    let mut output = String::new();
    for line in BufReader::new(reader).split(b'\n') {
        let line = line.context("read the output of cargo test")?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        output.push_str(&line);
        output.push('\n');
    }
    let status = child.wait().context("wait for cargo test")?;
    tally.add(outcomes::read_cargo_test(&output, package));
    Ok(status.success())
}
