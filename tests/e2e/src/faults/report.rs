//! What the runs came to: a file for programs and a summary for people.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::{Deserialize, Serialize};

/// `target/faults.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultReport {
    /// Every run in order.
    pub runs: Vec<Run>,
}

/// One run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// What its plan was drawn from.
    pub seed: u64,
    /// The way in which the VM was to move.
    pub kind: String,
    /// What was done to whom.
    pub fault: String,
    /// When, as planned; and how long after the request that was.
    pub moment: String,
    /// Where the VM was in the end.
    pub outcome: Outcome,
    /// How many runners the witness heard at most at a time.
    pub max_runners: u32,
    /// Pages that the guest found wrong, after it had looked at all of them.
    pub page_errors: u64,
    /// Whether what should be the same on the disks is.
    pub disk_compare: DiskCompare,
    /// Versions of QEMU, from and to.
    pub qemu: String,
    /// What the guest did.
    pub guest: String,
    /// What disk it had.
    pub disk: String,
    /// How the task ended, by its own word.
    pub ended: String,
    /// Faults that found something to be done to, without their figures: what is counted together.
    pub faults: Vec<String>,
    /// Promises that were not kept.
    pub broken: Vec<String>,
}

/// Where the VM was in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It runs on the destination.
    Moved,
    /// It runs on the source.
    Stayed,
    /// It runs nowhere.
    Lost,
}

/// Whether what should be the same on the disks is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskCompare {
    /// Both copies are as they were; or all that the guest has written to its disk is there.
    Ok,
    /// A copy was written to; or the guest misses something.
    Differs,
    /// There is one disk or none: nothing to compare.
    Shared,
}

impl Run {
    /// Adds the promises that its own figures show as broken. `held`: a process was killed while it held the VM, which is then dead.
    pub(super) fn judge(&mut self, held: bool) {
        if self.max_runners > 1 {
            self.broken.push("two runners".to_owned());
        }
        if self.outcome == Outcome::Lost && !held {
            self.broken.push("the VM is lost".to_owned());
        }
        if self.page_errors > 0 {
            self.broken.push(format!("{} wrong pages", self.page_errors));
        }
        if self.disk_compare == DiskCompare::Differs {
            self.broken.push("a disk is not what it should be".to_owned());
        }
    }

    /// One line for people.
    #[must_use]
    pub fn line(&self) -> String {
        let Self { seed, fault, moment, outcome, qemu, guest, disk, ended, broken, .. } = self;
        let mut line = format!("{seed}: {outcome:?}: {fault}; at {moment}; {qemu}, {guest}, disk {disk}; task {ended}");
        for promise in broken {
            // Writing to a string cannot fail.
            let _ = write!(line, "; BROKEN: {promise}");
        }
        line
    }
}

impl FaultReport {
    /// Whether every promise was kept in every run.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.runs.iter().all(|run| run.broken.is_empty())
    }

    /// Counts for people.
    #[must_use]
    pub fn summary(&self) -> String {
        let mut by_fault: BTreeMap<&str, [usize; 3]> = BTreeMap::new();
        let mut outcomes = [0; 3];
        for run in &self.runs {
            let index = match run.outcome {
                Outcome::Moved => 0,
                Outcome::Stayed => 1,
                Outcome::Lost => 2,
            };
            outcomes[index] += 1;
            for fault in &run.faults {
                by_fault.entry(fault).or_default()[index] += 1;
            }
        }
        let mut text = format!("{:<42} {:>6} {:>6} {:>6}\n", "FAULT", "MOVED", "STAYED", "LOST");
        for (fault, [moved, stayed, lost]) in by_fault {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{fault:<42} {moved:>6} {stayed:>6} {lost:>6}");
        }
        let count = |bad: fn(&Run) -> bool| self.runs.iter().filter(|run| bad(run)).count();
        let [moved, stayed, lost] = outcomes;
        let _ = writeln!(
            text,
            "{} runs: {moved} moved, {stayed} stayed, {lost} lost ({} of them without the end of the VM's own process); \
             two runners {}, page errors {}, disks that differ {}, runs with a broken promise {}",
            self.runs.len(),
            count(|run| run.broken.iter().any(|promise| promise == "the VM is lost")),
            count(|run| run.max_runners > 1),
            self.runs.iter().map(|run| run.page_errors).sum::<u64>(),
            count(|run| run.disk_compare == DiskCompare::Differs),
            count(|run| !run.broken.is_empty()),
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Run {
        Run {
            seed: 7,
            kind: "pre-copy".into(),
            fault: "kill the source's carry".into(),
            moment: "release +3 ms (at 5000 ms)".into(),
            outcome: Outcome::Moved,
            max_runners: 1,
            page_errors: 0,
            disk_compare: DiskCompare::Ok,
            qemu: "7.2.0 to 10.0.2".into(),
            guest: "busy".into(),
            disk: "copies".into(),
            ended: "done".into(),
            faults: vec!["kill the source's carry".into()],
            broken: Vec::new(),
        }
    }

    #[test]
    fn each_broken_promise_is_found() {
        type Spoil = fn(&mut Run);
        let table: [(Spoil, bool, usize); 6] = [
            (|_| (), false, 0),
            (|run| run.max_runners = 2, false, 1),
            (|run| run.page_errors = 1, false, 1),
            (|run| run.disk_compare = DiskCompare::Differs, false, 1),
            (|run| run.outcome = Outcome::Lost, false, 1),
            // Nobody can bring back a VM whose own process was killed.
            (|run| run.outcome = Outcome::Lost, true, 0),
        ];
        for (number, (spoil, held, broken)) in table.into_iter().enumerate() {
            let mut run = good();
            spoil(&mut run);
            run.judge(held);
            assert_eq!(run.broken.len(), broken, "{number}: {run:?}");
            assert_eq!(FaultReport { runs: vec![run] }.is_clean(), broken == 0);
        }
    }

    #[test]
    fn the_file_has_the_documented_shape() {
        let value = serde_json::to_value(FaultReport { runs: vec![good()] }).unwrap();
        let run = &value["runs"][0];
        for (key, expected) in [
            ("seed", serde_json::json!(7)),
            ("kind", "pre-copy".into()),
            ("fault", "kill the source's carry".into()),
            ("moment", "release +3 ms (at 5000 ms)".into()),
            ("outcome", "moved".into()),
            ("max_runners", 1.into()),
            ("page_errors", 0.into()),
            ("disk_compare", "ok".into()),
        ] {
            assert_eq!(run[key], expected, "{key}");
        }
    }

    #[test]
    fn the_summary_counts_by_outcome_and_fault() {
        let stayed = Run { outcome: Outcome::Stayed, ..good() };
        let text = FaultReport { runs: vec![good(), stayed] }.summary();
        let line = text.lines().find(|line| line.starts_with("kill the source's carry")).unwrap();
        assert_eq!(line.split_whitespace().rev().take(3).collect::<Vec<_>>(), ["0", "1", "1"]);
        assert!(text.contains("2 runs: 1 moved, 1 stayed, 0 lost"), "{text}");
    }
}
