//! What the daemons wrote: warnings and errors that nobody expected fail a test.

use std::fs;
use std::path::{Path, PathBuf};

use godwit_lab::LabStatus;

/// A line that somebody should have looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Complaint {
    pub(crate) log: PathBuf,
    pub(crate) line: String,
}

/// The logs of controller, agents, carries and relays; QEMU's own are not held to our levels.
pub(crate) fn all(lab: &LabStatus) -> Vec<PathBuf> {
    let mut logs = vec![lab.controller.log.clone()];
    for host in &lab.hosts {
        logs.push(host.agent.log.clone());
        logs.extend(["carry.log", "carry.old"].map(|name| lab.dir.join(&host.name).join("state/log").join(name)));
        logs.push(lab.dir.join(format!("relay-{}.log", host.name)));
    }
    logs
}

/// Logs of the QEMUs of one host.
pub(crate) fn of_qemus(lab: &LabStatus, host: &str) -> Vec<PathBuf> {
    let dir = lab.dir.join(host).join("state/log");
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|path| !path.ends_with("carry.log") && !path.ends_with("carry.old")).collect()
}

/// Unexpected lines in a log; a log that is not there has none.
pub(crate) fn complaints(log: &Path, expected: &[String]) -> Vec<Complaint> {
    let text = fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let bad = text.lines().filter(|line| is_complaint(line) && !expected.iter().any(|words| line.contains(words.as_str())));
    bad.map(|line| Complaint { log: log.to_owned(), line: line.to_owned() }).collect()
}

/// The level is the second word of a line of `tracing`; a panic has no level.
fn is_complaint(line: &str) -> bool {
    let level = line.split_whitespace().nth(1).unwrap_or_default();
    matches!(level, "WARN" | "ERROR") || line.contains("panicked at")
}

/// The end of a log, for people.
pub(crate) fn tail(log: &Path, lines: usize) -> String {
    let text = fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all.get(all.len().saturating_sub(lines)..).unwrap_or_default().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_known_by_their_level() {
        for (line, bad) in [
            ("2026-01-01T00:00:00.000000Z  WARN godwit_agent: x", true),
            ("2026-01-01T00:00:00.000000Z ERROR godwit_agent: x", true),
            ("2026-01-01T00:00:00.000000Z  INFO godwit_agent: a WARN of before", false),
            ("thread 'main' panicked at src/x.rs:1:2:", true),
            ("", false),
        ] {
            assert_eq!(is_complaint(line), bad, "{line}");
        }
    }
}
