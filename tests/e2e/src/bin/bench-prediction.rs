//! `cargo xtask bench prediction`: guests of several kinds move again and again, and what was forecast is held against what it cost.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use godwit_e2e::{Cluster, ClusterSpec, GuestSpec, other_qemu};
use godwit_model::{Bytes, MigrationFigures, MigrationForecast, MigrationPolicy};
use serde::Serialize;

const USAGE: &str = "\
Usage: cargo xtask bench prediction [--moves N] [--link RATE] [--out FILE]

  --moves N    how often each guest moves [default: 6]
  --link RATE  between the hosts [default: 1gbit]
  --out FILE   where rows go [default: target/bench/prediction.json]";

/// Longest that a move may take.
const PATIENCE: Duration = Duration::from_secs(180);
const HOSTS: [&str; 3] = ["h1", "h2", "h3"];

/// One move of one guest.
#[derive(Debug, Serialize)]
struct Row {
    guest: String,
    number: usize,
    to: String,
    learned_from: u32,
    seconds: f64,
    forecast_seconds: f64,
    blackout_ms: u64,
    forecast_blackout_ms: u64,
    wire_bytes: u64,
    forecast_wire_bytes: u64,
    /// The time was between the least and the most that was named.
    in_range: bool,
}

struct Arguments {
    moves: usize,
    link: String,
    out: PathBuf,
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match Arguments::parse(&words).and_then(|arguments| run(&arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

impl Arguments {
    fn parse(words: &[String]) -> Result<Self> {
        let mut arguments = Self { moves: 6, link: "1gbit".into(), out: PathBuf::from("target/bench/prediction.json") };
        for pair in words.chunks(2) {
            match pair {
                [key, value] if key == "--moves" => arguments.moves = value.parse().with_context(|| format!("--moves {value}"))?,
                [key, value] if key == "--link" => arguments.link.clone_from(value),
                [key, value] if key == "--out" => arguments.out = value.into(),
                _ => bail!("not understood: {}\n\n{USAGE}", pair.join(" ")),
            }
        }
        Ok(arguments)
    }
}

/// Guests that differ in what they have and in how they write; one of them writes for some seconds, and then rests for as long.
fn kinds() -> Vec<(&'static str, GuestSpec)> {
    let guest = |name: &'static str, mib, knobs: &[&str]| {
        let idle = GuestSpec::idle(name).memory(Bytes::mib(mib));
        (name, knobs.iter().fold(idle, |guest, knob| guest.knob(knob)))
    };
    vec![
        guest("idle", 256, &["touch_total=32M"]),
        guest("unique", 512, &["touch_total=200M", "mix=unique:100", "working_set=8M", "dirty=2M"]),
        guest("dense", 512, &["touch_total=300M", "mix=compressible:70,duplicate:30", "working_set=8M", "dirty=2M"]),
        guest("busy", 512, &["touch_total=200M", "working_set=64M", "dirty=16M"]),
        guest("phases", 512, &["touch_total=200M", "working_set=64M", "dirty=32M", "phase=7"]),
    ]
}

fn run(arguments: &Arguments) -> Result<()> {
    let mut rows = Vec::new();
    for (name, spec) in kinds() {
        let mut lab = ClusterSpec::new(3)?.link(&arguments.link);
        // It keeps a QEMU from switching over by itself.
        if let Some(qemu) = other_qemu() {
            lab = HOSTS.iter().fold(lab, |lab, host| lab.qemu(host, &qemu));
        }
        let mut cluster = lab.up()?;
        cluster.boot(&spec, "h1")?;
        for number in 1..=arguments.moves {
            let to = HOSTS.get(number % HOSTS.len()).context("a host")?;
            let row = measure(&mut cluster, name, number, to)?;
            println!("{row:?}");
            rows.push(row);
            if let Some(folder) = arguments.out.parent() {
                fs::create_dir_all(folder)?;
            }
            fs::write(&arguments.out, serde_json::to_vec_pretty(&rows)?)?;
        }
        cluster.check()?;
        cluster.finish()?;
    }
    print!("{}", summary(&rows));
    Ok(())
}

fn measure(cluster: &mut Cluster, guest: &str, number: usize, to: &str) -> Result<Row> {
    // It is somewhere in its phases, and the host is done with the move before.
    std::thread::sleep(Duration::from_secs(5));
    let task = cluster.begin_move(guest, to, MigrationPolicy::default())?;
    let figures = cluster.done(task, PATIENCE)?.figures.context("figures")?;
    let forecast = figures.forecast.context("a forecast: the move was over before the VM's writes were measured")?;
    Ok(Row::of(guest, number, to, &figures, &forecast))
}

impl Row {
    fn of(guest: &str, number: usize, to: &str, figures: &MigrationFigures, forecast: &MigrationForecast) -> Self {
        let seconds = |time: godwit_model::Millis| time.get() as f64 / 1_000.0;
        Self {
            guest: guest.to_owned(),
            number,
            to: to.to_owned(),
            learned_from: forecast.learned_from,
            seconds: seconds(figures.total),
            forecast_seconds: seconds(forecast.total.expected),
            blackout_ms: figures.blackout.get(),
            forecast_blackout_ms: forecast.blackout.expected.get(),
            wire_bytes: figures.wire_bytes.get(),
            forecast_wire_bytes: forecast.wire_bytes.expected.get(),
            in_range: (forecast.total.least..=forecast.total.most).contains(&figures.total),
        }
    }
}

/// Median and 90th percentile of how far off the forecasts were, of all moves and of those that could learn.
fn summary(rows: &[Row]) -> String {
    let mut text = String::new();
    for (name, learned) in [("all", false), ("learned", true)] {
        let rows: Vec<&Row> = rows.iter().filter(|row| !learned || row.learned_from > 0).collect();
        let error = |forecast: fn(&Row) -> f64, actual: fn(&Row) -> f64| {
            let mut errors: Vec<f64> =
                rows.iter().map(|row| (forecast(row) - actual(row)).abs() / actual(row).max(f64::MIN_POSITIVE)).collect();
            errors.sort_by(f64::total_cmp);
            let at = |part: usize| {
                errors.get((errors.len() * part / 100).min(errors.len().saturating_sub(1))).copied().unwrap_or_default()
            };
            format!("{:.2} and {:.2}", at(50), at(90))
        };
        let within = rows.iter().filter(|row| row.in_range).count();
        text += &format!(
            "{name}: {} moves; |forecast - actual| / actual, median and p90: time {}, blackout {}, bytes {}; time within its range {within} times\n",
            rows.len(),
            error(|row| row.forecast_seconds, |row| row.seconds),
            error(|row| row.forecast_blackout_ms as f64, |row| row.blackout_ms as f64),
            error(|row| row.forecast_wire_bytes as f64, |row| row.wire_bytes as f64),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(learned_from: u32, seconds: f64, forecast_seconds: f64) -> Row {
        let figures = MigrationFigures { total: godwit_model::Millis(1), ..MigrationFigures::default() };
        Row { learned_from, seconds, forecast_seconds, ..Row::of("web", 1, "h2", &figures, &MigrationForecast::default()) }
    }

    #[test]
    fn errors_are_those_of_all_moves_and_of_those_that_could_learn() {
        let rows = [row(0, 10.0, 30.0), row(1, 10.0, 9.0), row(2, 10.0, 10.0)];
        let said = summary(&rows);
        assert!(said.contains("all: 3 moves; |forecast - actual| / actual, median and p90: time 0.10 and 2.00"), "{said}");
        assert!(said.contains("learned: 2 moves; |forecast - actual| / actual, median and p90: time 0.10 and 0.10"), "{said}");
    }
}
