//! `cargo xtask faults`: real faults at random moments of real moves, judged from outside.
//!
//! Writes what every run came to into a file, prints a summary, and fails when a promise was broken.

use std::fs;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use godwit_e2e::faults::{FaultReport, Plan, Run, run_all};

const USAGE: &str = "\
Usage: cargo xtask faults [--count N] [--seed S] [--lanes L] [--out FILE]

  --count N   how many runs [default: 20]
  --seed S    seed of the first run; each further run takes the next number [default: from the clock]
  --lanes L   runs at a time, each on hosts of its own [default: 1]
  --out FILE  where the results go [default: target/faults.json]

One run is repeated by its seed: --count 1 --seed S";

/// What was asked for.
struct Arguments {
    count: u64,
    seed: u64,
    lanes: NonZero<usize>,
    out: PathBuf,
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let result = Arguments::parse(&words).and_then(|arguments| run(&arguments));
    match result {
        Ok(report) => ExitCode::from(u8::from(!report.is_clean())),
        Err(error) => {
            eprintln!("faults: {error:?}");
            ExitCode::from(2)
        }
    }
}

impl Arguments {
    fn parse(words: &[String]) -> Result<Self> {
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
        let mut arguments =
            Self { count: 20, seed: clock.as_secs(), lanes: NonZero::<usize>::MIN, out: PathBuf::from("target/faults.json") };
        for pair in words.chunks(2) {
            match pair {
                [key, value] if key == "--count" => arguments.count = value.parse().with_context(|| format!("--count {value}"))?,
                [key, value] if key == "--seed" => arguments.seed = value.parse().with_context(|| format!("--seed {value}"))?,
                [key, value] if key == "--lanes" => arguments.lanes = value.parse().with_context(|| format!("--lanes {value}"))?,
                [key, value] if key == "--out" => arguments.out = value.into(),
                _ => bail!("not understood: {}\n\n{USAGE}", pair.join(" ")),
            }
        }
        Ok(arguments)
    }
}

fn run(arguments: &Arguments) -> Result<FaultReport> {
    let Arguments { count, seed, lanes, out } = arguments;
    println!("faults: {count} runs from seed {seed}");
    let plans = (0..*count).map(|number| Plan::of(seed.wrapping_add(number)));
    let report = run_all(plans, *lanes, &out.with_extension("logs"), |report| {
        let line = report.runs.last().map(Run::line).unwrap_or_default();
        println!("faults: {} of {count}: {line}", report.runs.len());
        // After each: a long series may be ended early.
        write(report, out)
    })?;
    print!("\n{}", report.summary());
    println!("faults: wrote {}", out.display());
    Ok(report)
}

fn write(report: &FaultReport, out: &Path) -> Result<()> {
    if let Some(parent) = out.parent() {
        fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
    }
    let text = serde_json::to_string_pretty(report)?;
    fs::write(out, text + "\n").with_context(|| out.display().to_string())
}
