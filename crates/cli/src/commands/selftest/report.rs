//! What a self-test found.

use godwit_api::v1::Host;
use godwit_model::{Accelerator, Bytes, HostCondition, MigrationFigures, Name};
use serde::Serialize;

use crate::output::{Table, or_nothing, word};
use crate::text::visible;

/// The whole.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Of Godwit.
    pub(super) version: &'static str,
    pub(super) hosts: Vec<HostReport>,
    pub(super) checks: Vec<Check>,
}

/// A host that took part.
#[derive(Debug, Serialize)]
pub(super) struct HostReport {
    pub(super) name: Name,
    pub(super) agent: Option<String>,
    pub(super) qemu: Option<String>,
    pub(super) accelerator: Option<Accelerator>,
    pub(super) accelerator_reason: Option<String>,
    pub(super) cpus: Option<u32>,
    pub(super) memory: Option<Bytes>,
    pub(super) conditions: Vec<HostCondition>,
}

impl HostReport {
    pub(super) fn of(host: &Host) -> Self {
        let facts = host.facts.as_ref();
        Self {
            name: host.name.clone(),
            agent: facts.map(|facts| facts.agent.clone()),
            qemu: facts.map(|facts| facts.qemu.clone()),
            accelerator: facts.map(|facts| facts.accelerator),
            accelerator_reason: facts.map(|facts| facts.accelerator_reason.clone()),
            cpus: facts.map(|facts| facts.cpus),
            memory: facts.map(|facts| facts.memory),
            conditions: facts.map(|facts| facts.conditions.clone()).unwrap_or_default(),
        }
    }
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Verdict {
    /// As promised.
    Passed,
    /// Not as promised.
    Failed,
    /// It cannot be on these hosts, and the detail says why.
    Skipped,
}

/// One of them.
#[derive(Debug, Serialize)]
pub(super) struct Check {
    pub(super) check: String,
    pub(super) verdict: Verdict,
    pub(super) detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) to: Option<Name>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) figures: Option<MigrationFigures>,
}

/// The default of every migration that asks for nothing else.
const BUDGET: u64 = 300;

impl Check {
    pub(super) fn failed(check: &str, detail: impl Into<String>) -> Self {
        Self { check: check.into(), verdict: Verdict::Failed, detail: detail.into(), to: None, figures: None }
    }
}

impl Report {
    pub(super) fn new(hosts: Vec<HostReport>) -> Self {
        Self { version: env!("CARGO_PKG_VERSION"), hosts, checks: Vec::new() }
    }

    pub(super) fn note(&mut self, check: &str, found: Result<(Verdict, String), String>) {
        let (verdict, detail) = found.unwrap_or_else(|stop| (Verdict::Failed, stop));
        self.checks.push(Check { check: check.into(), verdict, detail, to: None, figures: None });
    }

    pub(super) fn moved(&mut self, check: &str, to: &Name, figures: MigrationFigures, detail: String) {
        let check = Check { check: check.into(), verdict: Verdict::Passed, detail, to: Some(to.clone()), figures: Some(figures) };
        self.checks.push(check);
    }

    /// What can only be said of all moves together.
    pub(super) fn conclude(&mut self) {
        let blackouts: Vec<u64> = self.checks.iter().filter_map(|check| check.figures.map(|moved| moved.blackout.get())).collect();
        let Some(longest) = blackouts.iter().max() else { return };
        let verdict = if *longest <= BUDGET { Verdict::Passed } else { Verdict::Failed };
        self.note("every blackout is within its budget", Ok((verdict, format!("the longest was {longest} ms of {BUDGET}"))));
    }

    pub(super) fn failed(&self) -> usize {
        self.checks.iter().filter(|check| check.verdict == Verdict::Failed).count()
    }

    /// For people.
    pub(super) fn table(&self) -> String {
        let mut text = String::new();
        for host in &self.hosts {
            let HostReport { name, qemu, accelerator, cpus, memory, .. } = host;
            let (qemu, by) = (or_nothing(qemu.as_ref()), or_nothing(accelerator.as_ref().map(word)));
            let (cpus, memory) = (or_nothing(*cpus), or_nothing(*memory));
            let mut line = |what: &str| text.extend([visible(what).as_ref(), "\n"]);
            line(&format!("{name}: QEMU {qemu}, {by}, {cpus} processors, {memory}"));
            for condition in &host.conditions {
                line(&format!("  {}: {}", condition.name, condition.message));
            }
        }
        let mut table = Table::new(&["CHECK", "TIME", "BLACKOUT", "WIRE", "RESULT"]);
        for check in &self.checks {
            let figures = check.figures.as_ref();
            table.row([
                check.check.clone(),
                or_nothing(figures.map(|moved| moved.total)),
                or_nothing(figures.map(|moved| moved.blackout)),
                or_nothing(figures.map(|moved| moved.wire_bytes)),
                visible(&format!("{}: {}", word(&check.verdict), check.detail)).into_owned(),
            ]);
        }
        format!("{text}\n{}", table.render())
    }
}

#[cfg(test)]
mod tests {
    use godwit_model::Millis;

    use super::*;

    #[test]
    fn a_blackout_over_its_budget_is_a_failure_and_what_cannot_be_is_none() {
        let mut report = Report::new(vec![]);
        let moved = |blackout| MigrationFigures { blackout: Millis(blackout), ..MigrationFigures::default() };
        let host = Name::new("h2").expect("name");
        report.moved("a move", &host, moved(250), String::new());
        report.note("post-copy", Ok((Verdict::Skipped, "no userfaultfd".into())));
        report.conclude();
        assert_eq!(report.failed(), 0);
        report.moved("a move", &host, moved(301), String::new());
        report.conclude();
        assert_eq!(report.failed(), 1);
        report.note("a check", Err("it went wrong \u{1b}[2J".into()));
        assert_eq!(report.failed(), 2);
        let table = report.table();
        assert!(table.contains("failed: the longest was 301 ms of 300") && !table.contains('\u{1b}'), "{table}");
    }
}
