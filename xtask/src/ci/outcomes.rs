//! Tests that ran, sorted by kind: end-to-end by package, property (`prop_`) and fuzz-corpus (`corpus_`) by name, and the
//! rest are unit tests. Reads what nextest (JUnit) and `cargo test` (text) report.

/// Kinds of tests, as the summary counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Unit,
    Property,
    FuzzCorpus,
    EndToEnd,
}

impl Kind {
    const ALL: [(Self, &'static str); 4] =
        [(Self::Unit, "unit"), (Self::Property, "property"), (Self::FuzzCorpus, "fuzz-corpus"), (Self::EndToEnd, "end-to-end")];

    /// `binary` as nextest calls it: `package`, `package::file` of its `tests/`, or `package::bin/name`.
    pub(super) fn of(binary: &str, test: &str) -> Self {
        let file = binary.strip_prefix("godwit-e2e::");
        if file.is_some_and(|file| !file.starts_with("bin/")) {
            return Self::EndToEnd;
        }
        let parts = || binary.split("::").chain(test.split("::"));
        let named = |word: &str| parts().any(|part| part == word || part.split('_').any(|own| own == word) && part.contains('_'));
        if named("prop") {
            Self::Property
        } else if named("corpus") {
            Self::FuzzCorpus
        } else {
            Self::Unit
        }
    }
}

/// One test that ran.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) kind: Kind,
    pub(super) passed: bool,
}

/// What ran so far.
#[derive(Default)]
pub(super) struct Tally {
    outcomes: Vec<Outcome>,
    failed_steps: usize,
}

impl Tally {
    pub(super) fn add(&mut self, outcomes: Vec<Outcome>) {
        self.outcomes.extend(outcomes);
    }

    /// A step that failed without a failed test counts as one, so that the last line never says `0 failed` of a bad run.
    pub(super) fn count_failed_step(&mut self) {
        self.failed_steps += 1;
    }

    pub(super) fn passed(&self) -> usize {
        self.outcomes.iter().filter(|outcome| outcome.passed).count()
    }

    pub(super) fn failed(&self) -> usize {
        self.outcomes.len() - self.passed() + self.failed_steps
    }

    /// `tests: 12 unit, 3 property, 2 fuzz-corpus, 4 end-to-end`.
    pub(super) fn by_kind(&self) -> String {
        let count = |kind| self.outcomes.iter().filter(|outcome| outcome.kind == kind).count();
        let parts = Kind::ALL.map(|(kind, name)| format!("{} {name}", count(kind)));
        format!("tests: {}", parts.join(", "))
    }
}

/// Outcomes in a JUnit report of nextest. Captured output in it is escaped, so that it cannot be taken for an element.
pub(super) fn read_junit(report: &str) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for case in report.split("<testcase ").skip(1) {
        let Some((head, rest)) = case.split_once('>') else { continue };
        let (Some(binary), Some(test)) = (attribute(head, "classname"), attribute(head, "name")) else { continue };
        let body = if head.ends_with('/') { "" } else { rest.split("</testcase>").next().unwrap_or_default() };
        let passed = !body.contains("<failure") && !body.contains("<error");
        outcomes.push(Outcome { kind: Kind::of(binary, test), passed });
    }
    outcomes
}

fn attribute<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.split(&format!("{name}=\"")).enumerate().skip(1).find_map(|(_, rest)| rest.split('"').next())
}

/// Outcomes in the joined output of `cargo test`. `package` is what its `tests/` files belong to, where only one runs.
pub(super) fn read_cargo_test(output: &str, package: Option<&str>) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    let mut binary = String::new();
    for line in output.lines() {
        let trimmed = line.trim_start();
        if let Some(running) = trimmed.strip_prefix("Running ") {
            binary = binary_of(running, package);
        } else if let Some(name) = trimmed.strip_prefix("Doc-tests ") {
            binary = name.to_owned();
        } else if let Some((test, result)) = line.strip_prefix("test ").and_then(|rest| rest.rsplit_once(" ... ")) {
            let passed = match result {
                "ok" => true,
                "FAILED" => false,
                _ => continue,
            };
            // `path - item (line 3) - compile` is a documentation test.
            outcomes.push(Outcome { kind: Kind::of(&binary, test), passed });
        }
    }
    outcomes
}

/// From `unittests src/lib.rs (target/debug/deps/godwit_model-0123)` or `tests/faults.rs (…)`.
fn binary_of(running: &str, package: Option<&str>) -> String {
    let source = running.split(" (").next().unwrap_or_default();
    match source.strip_prefix("tests/").and_then(|file| file.strip_suffix(".rs")) {
        Some(file) => format!("{}::{file}", package.unwrap_or_default()),
        None => package.unwrap_or_default().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(kind: Kind, passed: bool) -> Outcome {
        Outcome { kind, passed }
    }

    #[test]
    fn tests_are_sorted_by_package_and_name() {
        let table = [
            ("godwit-model", "ids::tests::names_are_checked", Kind::Unit),
            ("godwit-model", "lifecycle::tests::prop_never_two_runners", Kind::Property),
            ("godwit-migration", "tests::prop::invariants_hold", Kind::Property),
            ("godwit-carrier::prop_frames", "round_trip", Kind::Property),
            ("godwit-qemu", "qmp::tests::corpus_decodes", Kind::FuzzCorpus),
            ("godwit-qemu", "qmp::tests::corpus_prop", Kind::Property),
            ("godwit-qemu", "qmp::tests::properties_are_listed", Kind::Unit),
            ("godwit-qemu", "qmp::tests::drop_closes", Kind::Unit),
            ("godwit-e2e::faults", "a_cut_link_leaves_one_runner", Kind::EndToEnd),
            ("godwit-e2e", "report::tests::a_row_is_aligned", Kind::Unit),
            ("godwit-e2e::bin/demo", "tests::a_table", Kind::Unit),
        ];
        for (binary, test, kind) in table {
            assert_eq!(Kind::of(binary, test), kind, "{binary} {test}");
        }
    }

    #[test]
    fn junit_is_read_and_captured_output_is_not() {
        let report = r#"<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="nextest-run" tests="4">
  <testsuite name="godwit-model" tests="2">
    <testcase name="tests::fine" classname="godwit-model" timestamp="x" time="0.008"/>
    <testcase name="tests::prop_wrong" classname="godwit-model" time="0.1">
      <failure message="panicked" type="test failure">at &lt;/testcase&gt;</failure>
    </testcase>
  </testsuite>
  <testsuite name="godwit-e2e::moves">
    <testcase name="there_and_back" classname="godwit-e2e::moves" time="9">
      <system-out>&lt;failure</system-out>
    </testcase>
    <testcase name="hangs" classname="godwit-e2e::moves" time="300"><error type="test timeout"/></testcase>
  </testsuite>
</testsuites>"#;
        let expected = [
            outcome(Kind::Unit, true),
            outcome(Kind::Property, false),
            outcome(Kind::EndToEnd, true),
            outcome(Kind::EndToEnd, false),
        ];
        assert_eq!(read_junit(report), expected);
    }

    #[test]
    fn cargo_test_is_read() {
        let output = "   Compiling godwit-model v0.1.0\n     Running unittests src/lib.rs (target/debug/deps/godwit_model-1f)\n\
            running 3 tests\ntest a::fine ... ok\ntest a::corpus_all ... FAILED\ntest a::later ... ignored\n\n\
            \x20    Running tests/faults.rs (target/debug/deps/faults-2e)\ntest one ... ok\n   Doc-tests godwit_model\n\
            test src/lib.rs - Bytes (line 3) ... ok\ntest result: ok. 1 passed\n";
        let unit = [outcome(Kind::Unit, true), outcome(Kind::FuzzCorpus, false)];
        let last = outcome(Kind::Unit, true);
        let mixed = read_cargo_test(output, None);
        assert_eq!((&mixed[..2], &mixed[2], &mixed[3]), (&unit[..], &outcome(Kind::Unit, true), &last));
        let alone = read_cargo_test(output, Some("godwit-e2e"));
        assert_eq!(alone[2], outcome(Kind::EndToEnd, true));
    }

    #[test]
    fn the_summary_counts_every_kind_and_every_failure() {
        let mut tally = Tally::default();
        assert_eq!(tally.by_kind(), "tests: 0 unit, 0 property, 0 fuzz-corpus, 0 end-to-end");
        tally.add(vec![outcome(Kind::Unit, true), outcome(Kind::Unit, false), outcome(Kind::FuzzCorpus, true)]);
        tally.count_failed_step();
        assert_eq!(tally.by_kind(), "tests: 2 unit, 0 property, 1 fuzz-corpus, 0 end-to-end");
        assert_eq!((tally.passed(), tally.failed()), (2, 2));
    }
}
