//! A series of rows: which, in which order, and what is said about the machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::godwit::Godwit;
use super::journey::{LIMIT, measure};
use super::peer::Peer;
use super::rows::{BenchFile, Row};
use super::scenario::{Link, Scenario};
use super::system::System;
use crate::artefacts::{godwit_binary, other_qemu};

/// What is to be measured.
#[derive(Debug, Clone)]
pub struct Series {
    /// What is moved.
    pub scenarios: Vec<Scenario>,
    /// By whom.
    pub systems: Vec<System>,
    /// Over which links.
    pub links: Vec<Link>,
    /// How often.
    pub pairs: u32,
    /// No row is begun after this time.
    pub ends: Option<Duration>,
}

impl Series {
    /// Measures what is not in the file yet, and has not been seen never to end. A row that fails is one that was not completed, and says why; it is
    /// tried again by the next run.
    ///
    /// # Errors
    /// When nothing can be measured, or the file cannot be written.
    pub fn run(&self, file: &mut BenchFile) -> Result<()> {
        let begun = Instant::now();
        let qemu = qemu()?;
        self.describe(file, &qemu)?;
        for (pair, scenario, link, system) in self.order() {
            let (names, place) = ((scenario.as_str(), system.as_str()), link.to_string());
            if file.has(names.0, names.1, &place, pair) || file.was_cut_off(names.0, names.1, &place) {
                continue;
            }
            if self.ends.is_some_and(|ends| begun.elapsed() > ends) {
                println!("bench: the time is over; started again, it goes on here");
                break;
            }
            let load = load();
            let row = row(scenario, system, link, &qemu).unwrap_or_else(|error| {
                eprintln!("bench: {error:?}");
                Row { note: format!("{error:#}"), ..Row::default() }
            });
            let row = Row { scenario: names.0.to_owned(), system: names.1.to_owned(), link: place, pair, load, ..row };
            println!("bench: {}", row.line());
            file.push(row)?;
        }
        Ok(())
    }

    /// Systems take turns within each scenario and link, and all of that is done again for the next pair.
    fn order(&self) -> Vec<(u32, Scenario, Link, System)> {
        let mut order = Vec::new();
        for pair in 1..=self.pairs {
            for scenario in &self.scenarios {
                for link in scenario.links(&self.links) {
                    order.extend(self.systems.iter().map(|system| (pair, *scenario, link, *system)));
                }
            }
        }
        order
    }

    fn describe(&self, file: &mut BenchFile, qemu: &Path) -> Result<()> {
        let settings = &mut file.bench.settings;
        let mut set = |key: &str, value: String| {
            println!("bench: {key}: {value}");
            settings.insert(key.to_owned(), value);
        };
        set("machine", machine()?);
        set("qemu", format!("{} ({})", version(qemu)?, qemu.display()));
        set("version", version(&godwit_binary()?)?);
        set("limit", format!("cut off after {} s", LIMIT.as_secs()));
        for system in &self.systems {
            set(system.as_str(), system.settings());
        }
        file.write()
    }
}

/// One row; everything that was started for it is gone at the end.
fn row(scenario: Scenario, system: System, link: Link, qemu: &Path) -> Result<Row> {
    match system {
        System::Godwit => {
            let mut godwit = Godwit::up(scenario, link, qemu)?;
            let row = measure(&mut godwit, scenario)?;
            godwit.down()?;
            Ok(row)
        }
        _ => {
            let mut peer = Peer::up(system, scenario, link, qemu)?;
            let row = measure(&mut peer, scenario)?;
            peer.down()?;
            Ok(row)
        }
    }
}

/// The same for everybody: the other one at hand, if there is one, because old ones lose writes while they emulate.
fn qemu() -> Result<PathBuf> {
    if let Some(other) = other_qemu() {
        return Ok(other);
    }
    let paths = std::env::var_os("PATH").context("PATH")?;
    let found = std::env::split_paths(&paths).map(|dir| dir.join("qemu-system-x86_64")).find(|path| path.is_file());
    found.context("no qemu-system-x86_64 on PATH")
}

fn version(program: &Path) -> Result<String> {
    let output = Command::new(program).arg("--version").output().with_context(|| format!("run {}", program.display()))?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
}

fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or_default()
}

fn machine() -> Result<String> {
    let cpus = std::thread::available_parallelism()?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").context("the kernel's version")?;
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map_or("", |(_, model)| model);
    Ok(format!("{cpus} CPUs ({model}), Linux {}", kernel.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systems_take_turns() {
        let series = Series {
            scenarios: vec![Scenario::A, Scenario::W],
            systems: vec![System::Godwit, System::Precopy],
            links: ["200mbit", "1gbit"].map(|text| text.parse().unwrap()).to_vec(),
            pairs: 2,
            ends: None,
        };
        let order: Vec<String> =
            series.order().iter().map(|(pair, scenario, link, system)| format!("{pair} {scenario} {link} {system}")).collect();
        assert_eq!(order.len(), 2 * (2 * 2 + 2));
        assert_eq!(order[..4], ["1 A 200mbit godwit", "1 A 200mbit qemu-precopy", "1 A 1gbit godwit", "1 A 1gbit qemu-precopy"]);
        assert_eq!(order[4..7], ["1 W 100mbit+80ms godwit", "1 W 100mbit+80ms qemu-precopy", "2 A 200mbit godwit"]);
    }
}
