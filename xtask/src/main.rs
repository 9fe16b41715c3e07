//! Chores of this repository: `cargo xtask ci` runs everything that CI runs, `cargo xtask tidy` checks the house rules
//! that a machine can check, `cargo xtask sim` breaks simulated moves and `cargo xtask faults` real ones, `cargo xtask bench`
//! compares them with QEMU's own. Depends on little, so that it is built in seconds.

mod bench;
mod ci;
mod faults;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

const USAGE: &str = "\
Usage: cargo xtask <command>

Commands:
  ci [--skip STEP]...  every check and test, as CI runs them
  tidy                 house rules: crate edges, file heads and lengths, links, names
  model [ROUTE FAULTS QEMU]...
                       explores the hand-over further than CI does: half an hour
  sim [--seeds N] [--seed S]
                       the data plane of thousands of moves in simulated time, with faults, from seeds: docs/reliability.md
  faults [--count N] [--seed S] [--out FILE]
                       real faults at random moments of real moves, judged from outside: docs/reliability.md
  bench migration [--pairs N] [--scenario A,R] [--link 200mbit] [--system godwit,…] [--quick] [--table] [--out FILE]
                       Godwit and QEMU's own ways to migrate, on the same guests and links: docs/measurements.md
  bench prediction [--moves N] [--link RATE] [--out FILE]
                       what moves were forecast to cost beside what they cost: docs/measurements.md
  bench disks [--only ways|home] [--gib N] [--out FILE]
                       every way to move with shared and local disks, and the way home of a large one: docs/measurements.md
  help                 this text

Steps of ci, in order: images, fmt, test, doctest, e2e, clippy (beside e2e), tidy, deny";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// True when everything that was asked for is in order.
fn run(arguments: &[String]) -> Result<bool> {
    let Some((command, rest)) = arguments.split_first() else {
        bail!("no command\n\n{USAGE}");
    };
    match (command.as_str(), rest) {
        ("ci", rest) => ci::run(&repository()?, &ci::Skipped::parse(rest)?),
        ("bench", rest) => bench::run(&repository()?, rest),
        ("faults", rest) => faults::run(&repository()?, rest),
        ("tidy", []) => {
            let complaints = tidy::check(&repository()?)?;
            for complaint in &complaints {
                println!("{complaint}");
            }
            match complaints.len() {
                0 => println!("tidy: in order"),
                n => println!("tidy: {n} to mend"),
            }
            Ok(complaints.is_empty())
        }
        ("model", rest) => run_sim(&[], rest),
        ("sim", rest) => run_sim(&["plane"], rest),
        ("help" | "--help" | "-h", _) => {
            println!("{USAGE}");
            Ok(true)
        }
        _ => bail!("unknown: {}\n\n{USAGE}", arguments.join(" ")),
    }
}

/// Runs the program of `crates/sim`. Not as it is released: what costs time is optimised in every profile, and is built for the tests already.
fn run_sim(command: &[&str], arguments: &[String]) -> Result<bool> {
    let mut cargo = ci::runner::cargo(&repository()?);
    cargo.args(["run", "--locked", "--package", "godwit-sim", "--"]).args(command).args(arguments);
    Ok(cargo.status().context("start cargo")?.success())
}

/// The root of the repository: the folder above this package.
fn repository() -> Result<PathBuf> {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).context("xtask lies in the repository")
}
