//! Everything that CI runs, one step after the other. A step that fails does not hide the next one: all of them run, then
//! the wall times, the tests counted by kind, and `N passed, N failed` are printed.

pub(crate) mod images;
mod outcomes;
pub(crate) mod runner;

use std::path::Path;
use std::process::{Command, Output};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::tidy;
use outcomes::Tally;
use runner::{Runner, Suite};

/// In the order in which they run.
const STEPS: &[(&str, Step)] = &[
    // First, because a download that fails should not take ten minutes to say so.
    ("images", |ci| ci.images()),
    ("fmt", |ci| ci.cargo(&["fmt", "--all", "--check"])),
    ("test", |ci| ci.suite(Suite::Crates)),
    ("doctest", |ci| ci.suite(Suite::Documents)),
    ("e2e", |ci| ci.end_to_end()),
    ("clippy", |ci| ci.clippy()),
    ("tidy", |ci| ci.tidy()),
    ("deny", |ci| ci.deny()),
];

const CLIPPY: &[&str] = &["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"];
/// Who builds first keeps others waiting: the tests are to have begun.
const HEAD_START: Duration = Duration::from_secs(60);

type Step = fn(&mut Ci<'_>) -> Result<Verdict>;

/// How a step ended.
enum Verdict {
    Passed,
    Failed,
    /// Nothing was checked, and why.
    Skipped(String),
}

impl Verdict {
    fn of(passed: bool) -> Self {
        if passed { Self::Passed } else { Self::Failed }
    }
}

/// Steps that the caller does not want now.
pub(crate) struct Skipped(Vec<String>);

impl Skipped {
    pub(crate) fn parse(arguments: &[String]) -> Result<Self> {
        let mut skipped = Vec::new();
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match (argument.as_str(), rest.next()) {
                ("--skip", Some(step)) if STEPS.iter().any(|(name, _)| name == step) => skipped.push(step.clone()),
                ("--skip", Some(step)) => bail!("no step is called `{step}`; there are {}", names().join(", ")),
                _ => bail!("`{argument}` is not understood; only `--skip STEP` is"),
            }
        }
        Ok(Self(skipped))
    }
}

fn names() -> Vec<&'static str> {
    STEPS.iter().map(|(name, _)| *name).collect()
}

/// One run: where, with what, and the tests seen so far.
struct Ci<'a> {
    root: &'a Path,
    runner: Runner,
    tally: Tally,
    /// Variables that lead the end-to-end tests to their images, once those are made.
    images: Option<Vec<(String, String)>>,
    /// What runs beside the end-to-end tests, which wait a good part of their time.
    beside: Option<JoinHandle<Result<Output>>>,
    wants_clippy: bool,
}

/// Runs every step that is not skipped; true when all of them passed.
pub(crate) fn run(root: &Path, skipped: &Skipped) -> Result<bool> {
    let wants_clippy = !skipped.0.iter().any(|step| step == "clippy");
    let mut ci = Ci { root, runner: Runner::find(root), tally: Tally::default(), images: None, beside: None, wants_clippy };
    println!("tests run under {}", ci.runner);
    let begun = Instant::now();
    let mut report = Vec::new();
    for (name, step) in STEPS {
        let started = Instant::now();
        let verdict = if skipped.0.iter().any(|other| other == name) {
            Verdict::Skipped("by request".to_owned())
        } else {
            println!("\n== {name}");
            let failed_before = ci.tally.failed();
            let verdict = step(&mut ci).unwrap_or_else(|error| {
                println!("{name}: {error:#}");
                Verdict::Failed
            });
            // A step may fail without naming a test: something did not compile, or a check is no test.
            if matches!(verdict, Verdict::Failed) && ci.tally.failed() == failed_before {
                ci.tally.count_failed_step();
            }
            verdict
        };
        report.push((*name, verdict, started.elapsed()));
    }
    println!();
    let mut all_passed = true;
    for (name, verdict, time) in &report {
        let said = match verdict {
            Verdict::Passed => "passed".to_owned(),
            Verdict::Skipped(why) => format!("SKIPPED, {why}"),
            Verdict::Failed => {
                all_passed = false;
                "FAILED".to_owned()
            }
        };
        println!("{name:<8} {:>9}  {said}", seconds(*time));
    }
    println!("{:<8} {:>9}", "all", seconds(begun.elapsed()));
    println!("{}", ci.tally.by_kind());
    println!("{} passed, {} failed", ci.tally.passed(), ci.tally.failed());
    Ok(all_passed)
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

impl Ci<'_> {
    fn cargo(&self, arguments: &[&str]) -> Result<Verdict> {
        Ok(Verdict::of(runner::cargo(self.root).args(arguments).status()?.success()))
    }

    fn suite(&mut self, suite: Suite) -> Result<Verdict> {
        let passed = self.runner.run(self.root, suite, &[], &mut self.tally)?;
        Ok(Verdict::of(passed))
    }

    fn images(&mut self) -> Result<Verdict> {
        self.images = Some(images::environment(self.root)?);
        Ok(Verdict::Passed)
    }

    /// Real QEMU, real kernel: needs root for namespaces, the guest's image, and both versions of QEMU.
    fn end_to_end(&mut self) -> Result<Verdict> {
        if !is_root() {
            bail!("end-to-end tests make network namespaces and need root: run as root, or leave them out with `--skip e2e`");
        }
        let Some(images) = &self.images else {
            bail!("nothing to boot: the step `images` made nothing");
        };
        // The tests start the binary, which the tests of the command line have built already, if they ran.
        if !runner::cargo(self.root).args(["test", "--locked", "--workspace", "--no-run"]).status()?.success() {
            bail!("the binary under test does not build");
        }
        let binary = runner::target(self.root).join("debug/godwit");
        let mut environment = images.clone();
        environment.push(("GODWIT_BIN".to_owned(), binary.to_str().context("the target folder is UTF-8")?.to_owned()));
        if self.wants_clippy {
            let mut clippy = runner::idle_cargo(self.root, CLIPPY);
            self.beside = Some(thread::spawn(move || {
                thread::sleep(HEAD_START);
                clippy.output().context("run cargo clippy")
            }));
        }
        let passed = self.runner.run(self.root, Suite::EndToEnd, &environment, &mut self.tally)?;
        Ok(Verdict::of(passed))
    }

    /// What has run beside the end-to-end tests is waited for; without those it runs now.
    fn clippy(&mut self) -> Result<Verdict> {
        let Some(beside) = self.beside.take() else { return self.cargo(CLIPPY) };
        let Ok(output) = beside.join() else { bail!("clippy ended unexpectedly") };
        let output = output?;
        print!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        Ok(Verdict::of(output.status.success()))
    }

    fn tidy(&mut self) -> Result<Verdict> {
        let complaints = tidy::check(self.root)?;
        for complaint in &complaints {
            println!("{complaint}");
        }
        Ok(Verdict::of(complaints.is_empty()))
    }

    /// Advisories are left out: their database is not on a package registry, and CI may reach nothing else.
    fn deny(&mut self) -> Result<Verdict> {
        if !runner::has_subcommand(self.root, "deny") {
            let why = "cargo-deny is not installed: licences, bans and sources were not checked";
            println!("{why}; `cargo install --locked cargo-deny` brings it");
            return Ok(Verdict::Skipped(why.to_owned()));
        }
        self.cargo(&["deny", "--locked", "check", "bans", "licenses", "sources"])
    }
}

/// By `id`, because the standard library does not tell.
pub(crate) fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

#[cfg(test)]
mod tests {
    use super::Skipped;

    fn parse(words: &[&str]) -> Option<Vec<String>> {
        let words: Vec<String> = words.iter().map(ToString::to_string).collect();
        Skipped::parse(&words).ok().map(|skipped| skipped.0)
    }

    #[test]
    fn steps_are_skipped_by_name_only() {
        assert_eq!(parse(&[]), Some(vec![]));
        assert_eq!(parse(&["--skip", "e2e", "--skip", "fmt"]), Some(vec!["e2e".to_owned(), "fmt".to_owned()]));
        assert_eq!(parse(&["--skip"]), None);
        assert_eq!(parse(&["--skip", "everything"]), None);
        assert_eq!(parse(&["e2e", "--skip"]), None);
    }
}
