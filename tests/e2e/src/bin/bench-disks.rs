//! `cargo xtask bench disks`: every way to move with every kind of disk, and the way home of a large one beside a full copy by QEMU itself.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use godwit_e2e::bench::disks;
use serde_json::json;

const USAGE: &str = "\
Usage: cargo xtask bench disks [--only ways|home] [--gib N] [--out FILE]

  --only ways|home  one of the two
  --gib N           size of the large disk [default: 10]
  --out FILE        where rows go [default: target/bench/disks.json]";

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
    let (mut only, mut gib, mut out) = (None, 10, PathBuf::from("target/bench/disks.json"));
    for pair in words.chunks(2) {
        match pair {
            [key, value] if key == "--only" && matches!(value.as_str(), "ways" | "home") => only = Some(value.as_str()),
            [key, value] if key == "--gib" => gib = value.parse().with_context(|| format!("--gib {value}"))?,
            [key, value] if key == "--out" => out = value.into(),
            _ => bail!("not understood: {}\n\n{USAGE}", pair.join(" ")),
        }
    }
    let wants = |what| only.is_none_or(|only| only == what);
    let ways = if wants("ways") { disks::ways(|row| println!("{row:?}"))? } else { vec![] };
    let home = if wants("home") { disks::home(gib, |row| println!("{row:?}"))? } else { vec![] };
    if let Some(folder) = out.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(&out, serde_json::to_vec_pretty(&json!({ "ways": ways, "home": home }))?)?;
    print!("{}\n{}", disks::ways_table(&ways), disks::home_table(&home));
    Ok(())
}
