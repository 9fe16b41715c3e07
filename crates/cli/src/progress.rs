//! Progress on standard error: one line that is written anew on a terminal, else a plain line now and then.
//!
//! [`Meter`] decides what is said and never lets a number go back; [`Reporter`] writes it.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use godwit_api::v1::{Task, Transfer};
use godwit_model::{Bytes, MigrationPhase, MigrationProgress, Millis, Name, Rung};

use crate::text::visible;

/// Without a terminal: how often something is said while nothing special happens.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);
/// Cells of the bar.
const BAR: usize = 24;

/// What a task's progress is for people.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    /// Where a migration goes, if that is known.
    towards: Option<String>,
    subject: String,
    step: String,
    migration: Option<MigrationProgress>,
    transfer: Option<Transfer>,
}

impl Meter {
    /// A meter of a task; a migration goes `towards` a host.
    pub(crate) fn new(towards: Option<&Name>) -> Self {
        Self { towards: towards.map(ToString::to_string), ..Self::default() }
    }

    /// Takes in a task's newest state. Totals never go back, whatever the sender says.
    pub(crate) fn update(&mut self, task: &Task) {
        self.subject = visible(task.subject.as_str()).into_owned();
        self.step = visible(if task.step.is_empty() { &task.kind } else { &task.step }).into_owned();
        self.transfer = task.transfer;
        if let Some(new) = &task.progress {
            let mut new = new.clone();
            if let Some(old) = &self.migration {
                new.permille = new.permille.max(old.permille);
                new.wire_bytes = new.wire_bytes.max(old.wire_bytes);
                new.ram_bytes = new.ram_bytes.max(old.ram_bytes);
                new.rounds = new.rounds.max(old.rounds);
            }
            new.permille = new.permille.min(1_000);
            self.migration = Some(new);
        }
    }

    /// What changes seldom: when it does, a plain line is due.
    fn stage(&self) -> (Option<MigrationPhase>, &str) {
        match &self.migration {
            Some(migration) => (Some(migration.phase), ""),
            None => (None, &self.step),
        }
    }

    /// Subject and destination.
    fn title(&self) -> String {
        match &self.towards {
            Some(towards) => format!("{} → {towards}", self.subject),
            None => self.subject.clone(),
        }
    }

    /// The whole progress on one line; with a bar if it is written anew all the time.
    pub(crate) fn line(&self, bar: bool) -> String {
        let share = |line: &mut String, permille: u16| {
            let permille = permille.min(1_000);
            if bar {
                let filled = BAR * usize::from(permille) / 1_000;
                line.push_str(&format!("[{:-<BAR$}] ", "#".repeat(filled)));
            }
            line.push_str(&format!("{:>3}.{} %  ", permille / 10, permille % 10));
        };
        let Some(migration) = &self.migration else {
            let mut line = format!("{}: {}  ", self.title(), self.step);
            if let Some(transfer) = &self.transfer {
                transfer.permille.into_iter().for_each(|permille| share(&mut line, permille));
                transfer.done.into_iter().for_each(|done| line.push_str(&done.to_string()));
            }
            return line.trim_end().to_owned();
        };
        let mut line = format!("{}: {:<13} ", self.title(), migration.phase.as_str());
        share(&mut line, migration.permille);
        line.push_str(&format!("{}  {}", migration.wire_bytes, migration.rate));
        let mut add = |what: &str, value: Option<String>| {
            if let Some(value) = value {
                line.push_str(&format!("  {what} {value}"));
            }
        };
        add("dirty", migration.dirty_rate.map(|rate| rate.to_string()));
        add("blackout ≈", migration.predicted_blackout.map(|blackout| blackout.to_string()));
        add("left", migration.time_left.map(|left| left.to_string()));
        match migration.rung {
            // Nothing else is being done than before.
            None | Some(Rung::WaitForQuiet | Rung::GiveUp) => {}
            Some(Rung::Ask) => line.push_str("  waits for `godwit task postcopy`, `throttle` or `cancel`"),
            Some(rung) => line.push_str(&format!("  {}", rung.as_str())),
        }
        line
    }
}

/// What a migration cost, in one sentence.
pub(crate) fn summary(task: &Task, journey: Option<(&Name, &Name)>, ram: Option<Bytes>) -> String {
    let subject = visible(task.subject.as_str());
    let journey = journey.map(|(from, to)| format!(" {from} → {to}")).unwrap_or_default();
    let Some(figures) = &task.figures else { return format!("{subject} moved{journey}") };
    let Millis(total) = figures.total;
    let ram = ram.map(|ram| format!(" (RAM {ram})")).unwrap_or_default();
    let passes = if figures.rounds == 1 { "pass" } else { "passes" };
    let left = figures.left;
    let left = if left == Bytes(0) { String::new() } else { format!(", {left} followed after the switch") };
    format!(
        "{subject} moved{journey} in {}.{} s, blackout {}, {} on the wire{ram}, {} {passes}{left}",
        total / 1_000,
        total % 1_000 / 100,
        figures.blackout,
        figures.wire_bytes,
        figures.rounds
    )
}

/// A line at the bottom of a terminal that is written anew, and is gone when this is dropped.
#[derive(Debug)]
pub(crate) struct StatusLine {
    written: bool,
}

impl StatusLine {
    /// One on standard error, if that is a terminal.
    pub(crate) fn on_terminal() -> Option<Self> {
        io::stderr().is_terminal().then_some(Self { written: false })
    }

    /// Writes the line anew, cut at the terminal's edge so that it stays one line.
    pub(crate) fn write(&mut self, line: &str) {
        let width = rustix::termios::tcgetwinsize(io::stderr()).map_or(80, |size| usize::from(size.ws_col).max(20));
        let line: String = line.chars().take(width - 1).collect();
        let mut stderr = io::stderr();
        let _ = write!(stderr, "\r{line}\x1b[K").and_then(|()| stderr.flush());
        self.written = true;
    }

    /// Removes the line.
    pub(crate) fn clear(&mut self) {
        if std::mem::take(&mut self.written) {
            let mut stderr = io::stderr();
            let _ = write!(stderr, "\r\x1b[K").and_then(|()| stderr.flush());
        }
    }
}

impl Drop for StatusLine {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Shows a task's progress on standard error.
pub(crate) struct Reporter {
    meter: Meter,
    line: Option<StatusLine>,
    said: Option<(Instant, (Option<MigrationPhase>, String))>,
}

impl Reporter {
    /// A reporter of one task.
    pub(crate) fn new(towards: Option<&Name>) -> Self {
        Self { meter: Meter::new(towards), line: StatusLine::on_terminal(), said: None }
    }

    /// Shows a task's newest state.
    pub(crate) fn show(&mut self, task: &Task) {
        self.meter.update(task);
        if task.state.ended() {
            self.line = None;
        } else if let Some(line) = &mut self.line {
            line.write(&self.meter.line(true));
        } else if self.is_due(Instant::now()) {
            crate::output::note(&self.meter.line(false));
        }
    }

    /// Clears the terminal's last line, so that something else can be written; the next [`Reporter::show`] writes it anew.
    pub(crate) fn pause(&mut self) {
        if let Some(line) = &mut self.line {
            line.clear();
        }
    }

    /// Whether a plain line is due now; if so, the next is due later.
    fn is_due(&mut self, now: Instant) -> bool {
        let (phase, step) = self.meter.stage();
        let stage = (phase, step.to_owned());
        let due = self.said.as_ref().is_none_or(|(at, said)| *said != stage || now.duration_since(*at) >= PLAIN_INTERVAL);
        if due {
            self.said = Some((now, stage));
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use godwit_api::v1::TaskState;
    use godwit_model::{BytesPerSec, MigrationFigures, TaskId, UnixMillis};

    use super::*;

    fn progress(phase: MigrationPhase, permille: u16, wire: u64) -> MigrationProgress {
        MigrationProgress {
            phase,
            permille,
            wire_bytes: Bytes::mib(wire),
            ram_bytes: Bytes::mib(wire),
            remaining: Bytes(0),
            rate: BytesPerSec(118 << 20),
            dirty_rate: Some(BytesPerSec(12 << 20)),
            rounds: 1,
            predicted_blackout: Some(Millis(84)),
            time_left: Some(Millis(12_300)),
            rung: None,
        }
    }

    fn task(progress: Option<MigrationProgress>) -> Task {
        Task {
            id: TaskId::new(uuid::Uuid::nil()),
            team: Name::new("default").expect("name"),
            kind: "vm.migrate".into(),
            subject: Name::new("web1").expect("name"),
            state: TaskState::Running,
            revision: 1,
            created: UnixMillis(0),
            ended: None,
            principal: "admin".into(),
            reason: None,
            step: "copying\u{1b}[2J".into(),
            cancellable: true,
            progress,
            transfer: None,
            forecast: None,
            figures: None,
            snapshot: None,
            kept: None,
            restore: None,
            export: None,
            error: None,
            trail: vec![],
        }
    }

    #[test]
    fn a_migration_is_one_line() {
        let mut meter = Meter::new(Some(&Name::new("h2").expect("name")));
        meter.update(&task(None));
        assert_eq!(meter.line(true), "web1 → h2: copying\\u{1b}[2J");
        meter.update(&task(Some(progress(MigrationPhase::WarmUp, 432, 412))));
        assert_eq!(
            meter.line(true),
            "web1 → h2: warm-up       [##########--------------]  43.2 %  412 MiB  118 MiB/s  dirty 12 MiB/s  blackout ≈ 84 ms  left 12.3 s"
        );
        assert_eq!(
            meter.line(false),
            "web1 → h2: warm-up        43.2 %  412 MiB  118 MiB/s  dirty 12 MiB/s  blackout ≈ 84 ms  left 12.3 s"
        );
    }

    #[test]
    fn the_bar_and_the_totals_never_go_back() {
        let mut meter = Meter::new(None);
        let mut shown = (0, Bytes(0));
        for (permille, wire) in [(100, 10), (90, 9), (400, 50), (0, 0), (2_000, 51), (999, 52), (1_000, 52)] {
            meter.update(&task(Some(progress(MigrationPhase::WarmUp, permille, wire))));
            let now = meter.migration.as_ref().map(|migration| (migration.permille, migration.wire_bytes)).expect("known");
            assert!(now.0 >= shown.0 && now.1 >= shown.1 && now.0 <= 1_000, "{now:?} after {shown:?}");
            assert!(meter.line(true).matches('#').count() <= BAR);
            shown = now;
        }
        assert_eq!(shown, (1_000, Bytes::mib(52)));
    }

    #[test]
    fn without_a_terminal_a_line_is_due_at_each_phase_and_every_five_seconds() {
        let mut reporter = Reporter { meter: Meter::new(None), line: None, said: None };
        let start = Instant::now();
        let mut due = |seconds, phase| {
            reporter.meter.update(&task(Some(progress(phase, 1, 1))));
            reporter.is_due(start + Duration::from_secs(seconds))
        };
        assert!(due(0, MigrationPhase::Prepare));
        assert!(!due(1, MigrationPhase::Prepare));
        assert!(due(1, MigrationPhase::WarmUp));
        assert!(!due(5, MigrationPhase::WarmUp));
        assert!(due(6, MigrationPhase::WarmUp));
    }

    #[test]
    fn the_summary_says_what_it_cost() {
        let mut done = task(None);
        done.figures = Some(MigrationFigures {
            total: Millis(7_260),
            blackout: Millis(84),
            predicted_blackout: Some(Millis(110)),
            wire_bytes: Bytes::mib(412),
            ram_bytes: Bytes::mib(1_100),
            rounds: 3,
            disk_bytes: Bytes(0),
            disk_time: Millis(0),
            left: Bytes(0),
            forecast: None,
        });
        let (h1, h2) = (Name::new("h1").expect("name"), Name::new("h2").expect("name"));
        assert_eq!(
            summary(&done, Some((&h1, &h2)), Some(Bytes::GIB)),
            "web1 moved h1 → h2 in 7.2 s, blackout 84 ms, 412 MiB on the wire (RAM 1 GiB), 3 passes"
        );
        done.figures = None;
        assert_eq!(summary(&done, None, None), "web1 moved");
    }
}
