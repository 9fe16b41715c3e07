//! What was measured: a file that grows row by row, so that a run that was ended goes on where it stopped.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::journey::LIMIT;

/// `target/bench/migration.json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Bench {
    /// The machine, versions, and how each system is set.
    pub settings: BTreeMap<String, String>,
    /// Every move in order.
    pub rows: Vec<Row>,
}

/// One move.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Row {
    /// What was moved.
    pub scenario: String,
    /// By whom.
    pub system: String,
    /// Over which link.
    pub link: String,
    /// Counted from 1: rows of one pair were measured one after the other.
    pub pair: u32,
    /// From the request to the VM proven on its new host, or until it was given up.
    pub seconds: f64,
    /// What passed the source's interface meanwhile, both ways, without the guest's own traffic.
    pub wire_bytes: u64,
    /// No vCPU ran anywhere.
    pub blackout_ms: Option<f64>,
    /// Longest gap of the echo as seen from outside.
    pub outage_ms: f64,
    /// Of agents, carries and QEMUs on both hosts, without vCPUs, beyond what they used before the move: devices of an emulated guest cost, too.
    pub cpu_seconds: f64,
    /// The same, all of it.
    pub cpu_seconds_all: f64,
    /// Whether the VM got there.
    pub completed: bool,
    /// Pages that the guest found wrong afterwards; nothing where it could not be asked.
    pub page_errors: Option<u64>,
    /// Pages that the guest wrote per second before the move.
    pub pages_per_second: u64,
    /// The same during the move.
    pub pages_per_second_moving: u64,
    /// Load of the machine in the last minute before the row: with other work beside it figures say little.
    pub load: f64,
    /// What else is to be said.
    pub note: String,
}

/// The file.
#[derive(Debug)]
pub struct BenchFile {
    path: PathBuf,
    /// What is in it.
    pub bench: Bench,
}

impl BenchFile {
    /// Opens the file, or begins one.
    ///
    /// # Errors
    /// When it is no file of ours.
    pub fn open(path: &Path) -> Result<Self> {
        let bench = match fs::read(path) {
            Ok(text) => serde_json::from_slice(&text).with_context(|| format!("{} is not what a bench wrote", path.display()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Bench::default(),
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
        Ok(Self { path: path.to_owned(), bench })
    }

    /// Whether there is a row of this scenario, system, link and pair in which something was measured.
    #[must_use]
    pub fn has(&self, scenario: &str, system: &str, link: &str, pair: u32) -> bool {
        let key = (scenario, system, link, pair);
        self.bench.rows.iter().any(|row| row.key() == key && row.was_measured())
    }

    /// Whether it was cut off over this link before. Nobody who writes as much as before ends the next time: that need not be waited for again.
    #[must_use]
    pub fn was_cut_off(&self, scenario: &str, system: &str, link: &str) -> bool {
        let mut rows = self.bench.rows.iter().filter(|row| (&*row.scenario, &*row.system, &*row.link) == (scenario, system, link));
        rows.any(|row| !row.completed && row.seconds >= LIMIT.as_secs_f64())
    }

    /// Adds a row, in the place of one in which nothing was measured, and writes the file in one step.
    ///
    /// # Errors
    /// When it cannot be written; the row is kept.
    pub fn push(&mut self, row: Row) -> Result<()> {
        self.bench.rows.retain(|old| old.key() != row.key() || old.was_measured());
        self.bench.rows.push(row);
        self.write()
    }

    /// Writes the file in one step.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self) -> Result<()> {
        let failed = || self.path.display().to_string();
        if let Some(parent) = self.path.parent() {
            fs::create_dir_all(parent).with_context(failed)?;
        }
        let partial = self.path.with_extension("partial");
        fs::write(&partial, serde_json::to_string_pretty(&self.bench)? + "\n").with_context(failed)?;
        fs::rename(&partial, &self.path).with_context(failed)
    }
}

impl Row {
    fn key(&self) -> (&str, &str, &str, u32) {
        (&self.scenario, &self.system, &self.link, self.pair)
    }

    /// Not so where the guest did not come up, say, or the run was ended.
    fn was_measured(&self) -> bool {
        self.seconds > 0.0
    }
}

impl Bench {
    /// Rows of one scenario, link and system, in the order in which such groups first came.
    #[must_use]
    pub fn groups(&self) -> Vec<Vec<&Row>> {
        let mut groups: Vec<Vec<&Row>> = Vec::new();
        for row in &self.rows {
            let same = |of: &&Row| (&of.scenario, &of.link, &of.system) == (&row.scenario, &row.link, &row.system);
            match groups.iter_mut().find(|group| group.first().is_some_and(same)) {
                Some(group) => group.push(row),
                None => groups.push(vec![row]),
            }
        }
        let place = |group: &Vec<&Row>| {
            let first = group.first().map(|row| (row.scenario.clone(), row.link.clone()));
            self.rows.iter().position(|row| Some((row.scenario.clone(), row.link.clone())) == first)
        };
        groups.sort_by_key(place);
        groups
    }
}

/// The middle of some figures; nothing if there are none.
#[must_use]
pub(super) fn median(figures: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut sorted: Vec<f64> = figures.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (sorted.get(sorted.len().checked_sub(1)? / 2)?, sorted.get(sorted.len() / 2)?);
    Some(f64::midpoint(*low, *high))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(scenario: &str, system: &str, pair: u32) -> Row {
        Row { scenario: scenario.into(), system: system.into(), link: "1gbit".into(), pair, seconds: 1.0, ..Row::default() }
    }

    #[test]
    fn a_run_goes_on_where_it_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bench/migration.json");
        let mut file = BenchFile::open(&path).unwrap();
        assert!(!file.has("A", "godwit", "1gbit", 1));
        file.push(Row { seconds: 0.0, ..row("A", "godwit", 1) }).unwrap();
        assert!(!file.has("A", "godwit", "1gbit", 1), "nothing was measured");
        file.push(row("A", "godwit", 1)).unwrap();
        assert_eq!(file.bench.rows.len(), 1);
        let again = BenchFile::open(&path).unwrap();
        assert_eq!(again.bench, file.bench);
        assert!(again.has("A", "godwit", "1gbit", 1));
        for (scenario, system, link, pair) in
            [("R", "godwit", "1gbit", 1), ("A", "x", "1gbit", 1), ("A", "godwit", "2gbit", 1), ("A", "godwit", "1gbit", 2)]
        {
            assert!(!again.has(scenario, system, link, pair));
        }
        fs::write(&path, "[]").unwrap();
        assert!(BenchFile::open(&path).is_err());
    }

    #[test]
    fn who_was_cut_off_is_known() {
        let limit = LIMIT.as_secs_f64();
        let rows = vec![Row { seconds: limit, ..row("A", "x", 1) }, Row { seconds: limit, completed: true, ..row("A", "y", 1) }];
        let file = BenchFile { path: PathBuf::new(), bench: Bench { rows, ..Bench::default() } };
        assert!(file.was_cut_off("A", "x", "1gbit"));
        for (scenario, system, link) in [("A", "y", "1gbit"), ("B8", "x", "1gbit"), ("A", "x", "200mbit")] {
            assert!(!file.was_cut_off(scenario, system, link));
        }
    }

    #[test]
    fn the_file_has_the_documented_shape() {
        let bench = Bench { rows: vec![row("A", "godwit", 1)], ..Bench::default() };
        let value = serde_json::to_value(bench).unwrap();
        for key in ["scenario", "system", "link", "seconds", "wire_bytes", "blackout_ms", "outage_ms", "cpu_seconds", "completed"] {
            assert!(value["rows"][0].get(key).is_some(), "{key}");
        }
    }

    #[test]
    fn groups_keep_scenarios_together() {
        let rows = vec![row("A", "godwit", 1), row("R", "godwit", 1), row("A", "qemu", 1), row("A", "godwit", 2)];
        let bench = Bench { rows, ..Bench::default() };
        let names: Vec<(&str, &str, usize)> =
            bench.groups().iter().map(|group| (group[0].scenario.as_str(), group[0].system.as_str(), group.len())).collect();
        assert_eq!(names, [("A", "godwit", 2), ("A", "qemu", 1), ("R", "godwit", 1)]);
    }

    #[test]
    fn the_middle_of_figures() {
        for (figures, middle) in
            [(vec![], None), (vec![3.0], Some(3.0)), (vec![9.0, 1.0], Some(5.0)), (vec![9.0, 1.0, 2.0], Some(2.0))]
        {
            assert_eq!(median(figures), middle);
        }
    }
}
