//! `cargo xtask bench migration`: moves of the same guests over the same links, by Godwit and by QEMU itself.
//!
//! Writes every row at once, goes on where it stopped, prints a table and draws a picture.

use std::env;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use godwit_e2e::bench::{BenchFile, Link, Scenario, Series, System};

const USAGE: &str = "\
Usage: cargo xtask bench migration [--pairs N] [--scenario A,B,…] [--link 200mbit,1gbit] [--system godwit,…] [--quick] [--table] [--out FILE]

  --pairs N      how often each is measured [default: 3]
  --scenario L   A, B8, B512, B4096 (B for all three), C, R, K, X, W, D, E [default: all]
  --link L       links between the hosts [default: 200mbit,1gbit]; W has its own
  --system L     godwit, qemu-precopy, qemu-precopy-tls, qemu-multifd-zstd, qemu-multifd-zstd-tls, qemu-xbzrle, qemu-auto-converge,
                 qemu-postcopy [default: all]
  --quick        what ends within ten minutes: A, B8, R and K once over 1gbit, by godwit, qemu-precopy and qemu-multifd-zstd
  --table        measures nothing, prints what there is
  --out FILE     where rows are, and are added to [default: bench/migration.json in the target directory]";

/// No row of `--quick` is begun after this time.
const QUICK: Duration = Duration::from_secs(9 * 60);

struct Arguments {
    series: Series,
    only_table: bool,
    out: PathBuf,
}

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    match Arguments::parse(&words).and_then(|arguments| run(&arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:?}");
            ExitCode::from(2)
        }
    }
}

impl Arguments {
    fn parse(words: &[String]) -> Result<Self> {
        let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
        let links = ["200mbit", "1gbit"].map(str::parse::<Link>).into_iter().collect::<Result<_>>()?;
        let mut series = Series { scenarios: Scenario::ALL.to_vec(), systems: System::ALL.to_vec(), links, pairs: 3, ends: None };
        let (mut only_table, mut out) = (false, target.join("bench/migration.json"));
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let mut value = || words.next().with_context(|| format!("{word} needs a value\n\n{USAGE}"));
            match word.as_str() {
                "--quick" => {
                    series.scenarios = vec![Scenario::A, Scenario::B8, Scenario::R, Scenario::K];
                    series.systems = vec![System::Godwit, System::Precopy, System::MultifdZstd];
                    series.links = vec!["1gbit".parse()?];
                    (series.pairs, series.ends) = (1, Some(QUICK));
                }
                "--table" => only_table = true,
                "--pairs" => series.pairs = value()?.parse().context("--pairs")?,
                "--out" => out = value()?.into(),
                "--link" => series.links = value()?.split(',').map(str::parse).collect::<Result<_>>()?,
                "--system" => series.systems = value()?.split(',').map(System::named).collect::<Result<_>>()?,
                "--scenario" => {
                    let selected = value()?.split(',').map(Scenario::select).collect::<Result<Vec<_>>>()?;
                    series.scenarios = selected.concat();
                }
                _ => bail!("not understood: {word}\n\n{USAGE}"),
            }
        }
        Ok(Self { series, only_table, out })
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let mut file = BenchFile::open(&arguments.out)?;
    if !arguments.only_table {
        arguments.series.run(&mut file)?;
        println!("bench: wrote {}", arguments.out.display());
    }
    let picture = arguments.out.with_extension("svg");
    file.bench.plot(&picture)?;
    println!("bench: drew {}", picture.display());
    print!("\n{}", file.bench.table());
    Ok(())
}
