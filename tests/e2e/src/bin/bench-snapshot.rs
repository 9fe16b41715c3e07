//! `cargo xtask bench snapshot`: pauses, bytes and ways back, beside a plain QEMU that writes and loads a file.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use godwit_e2e::bench::snapshot::{self, PARTS};
use serde_json::json;

const USAGE: &str = "\
Usage: cargo xtask bench snapshot [--only pause,bytes,rollback,disk,clones] [--apart SECONDS] [--out FILE]

  --only PARTS      some of them
  --apart SECONDS   between two of ten snapshots [default: 60]
  --out FILE        where rows go [default: target/bench/snapshot.json]";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[String]) -> Result<()> {
    let (mut only, mut apart, mut out) = (PARTS.to_vec(), 60, PathBuf::from("target/bench/snapshot.json"));
    for pair in words.chunks(2) {
        match pair {
            [key, value] if key == "--only" && value.split(',').all(|part| PARTS.contains(&part)) => {
                only.retain(|part| value.split(',').any(|wanted| wanted == *part));
            }
            [key, value] if key == "--apart" => apart = value.parse().with_context(|| format!("--apart {value}"))?,
            [key, value] if key == "--out" => out = value.into(),
            _ => bail!("not understood: {}\n\n{USAGE}", pair.join(" ")),
        }
    }
    let mut rows = Vec::new();
    for part in only {
        rows.extend(snapshot::measure(part, Duration::from_secs(apart), &|row| println!("{row:?}"))?);
        if let Some(folder) = out.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&out, serde_json::to_vec_pretty(&json!({ "rows": rows }))?)?;
    }
    print!("{}", snapshot::table(&rows));
    Ok(())
}
