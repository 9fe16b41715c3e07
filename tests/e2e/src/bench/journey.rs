//! One row: guests are booted, moved and watched, whoever moves them.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use godwit_lab::{Lab, LinkChange, LinkState};

use super::cpu::CpuWatch;
use super::rows::Row;
use super::scenario::{Link, Scenario};
use super::wire;
use crate::{Echo, Outside};

/// The two hosts; guests begin on the first.
pub(super) const HOSTS: [&str; 2] = ["h1", "h2"];
/// How many guests boot at the same time: more of them would only take longer each.
pub(super) const BOOTING: usize = 2;
/// How long a move may take.
pub(super) const LIMIT: Duration = Duration::from_secs(180);
/// The guest is left in peace before and after a move; what follows the switch belongs to the outage.
const PEACE: Duration = Duration::from_secs(3);
/// How long the guest of `R` is away.
const AWAY: Duration = Duration::from_secs(10);
/// The cuts of `K`: how many, how long, and how long the link is whole before each.
const CUTS: usize = 3;
const CUT: Duration = Duration::from_secs(5);
const WHOLE: Duration = Duration::from_secs(1);
/// How long a guest may take to answer, and to verify its memory.
const ANSWER: Duration = Duration::from_secs(20);
const VERIFIED: Duration = Duration::from_secs(90);

/// How a move ended.
#[derive(Debug, Clone, Default)]
pub(super) struct Ended {
    pub(super) seconds: f64,
    pub(super) blackout: Option<Duration>,
    pub(super) completed: bool,
    pub(super) note: String,
}

impl Ended {
    /// How moves that were begun at the same time ended as a whole.
    pub(super) fn together(moves: &[Self]) -> Self {
        let notes: BTreeSet<&str> = moves.iter().map(|ended| ended.note.as_str()).collect();
        Self {
            seconds: moves.iter().map(|ended| ended.seconds).fold(0.0, f64::max),
            blackout: moves.iter().filter_map(|ended| ended.blackout).max(),
            completed: moves.iter().all(|ended| ended.completed),
            note: notes.into_iter().collect::<Vec<_>>().join(", "),
        }
    }
}

/// Running guests and who moves them.
pub(super) trait Mover {
    fn lab(&self) -> &Lab;
    fn outside(&self) -> &Outside;
    fn addresses(&self) -> &[Ipv4Addr];
    /// Makes ready what is not part of the move.
    fn prepare(&mut self, to: &'static str) -> Result<()>;
    /// Moves the guests at the same time; gives up after `LIMIT`.
    fn run(&mut self, to: &'static str) -> Result<Ended>;
}

/// Makes both hosts' links what they should be.
pub(super) fn set_links(lab: &Lab, link: Link) -> Result<()> {
    for host in HOSTS {
        let change = LinkChange { rate: Some(link.rate), delay: Some(link.round_trip / 2), ..LinkChange::default() };
        lab.set_link(host, change)?;
    }
    Ok(())
}

/// Moves the guests as their scenario says; what is filled in is everything that was measured.
pub(super) fn measure(mover: &mut dyn Mover, scenario: Scenario) -> Result<Row> {
    let [home, away] = HOSTS;
    let (from, to) = if scenario == Scenario::R { (away, home) } else { (home, away) };
    // Together as many probes as of one guest: emulated network interfaces cost more than a move.
    let period = Echo::PERIOD * u32::from(scenario.guests());
    let echoes: Vec<Echo> =
        mover.addresses().iter().map(|address| mover.outside().echo_every(period, *address)).collect::<Result<_>>()?;
    if scenario == Scenario::R {
        mover.prepare(away)?;
        let ended = mover.run(away)?;
        anyhow::ensure!(ended.completed, "the guest did not get away from home: {}", ended.note);
        thread::sleep(AWAY - PEACE);
    }
    mover.prepare(to)?;
    let namespace = mover.lab().namespace(from)?;
    let hosts = mover.lab().status()?.hosts;
    let (before, idle) = (Written::now(mover)?, CpuWatch::start(&hosts)?);
    thread::sleep(PEACE);
    let (at_start, idle) = (Written::now(mover)?, idle.end()? / PEACE.as_secs_f64());

    let (wire, cpu) = (wire::passed(&namespace)?, CpuWatch::start(&hosts)?);
    let began = Instant::now();
    let cuts = (scenario == Scenario::K).then(|| Cuts::start(mover.lab().clone(), to));
    let ended = mover.run(to);
    let lasted = began.elapsed().as_secs_f64();
    let (wire_bytes, cpu_seconds_all) = (wire::passed(&namespace)?.saturating_sub(wire), cpu.end()?);
    let cuts = cuts.map(Cuts::end).transpose()?;
    let ended = ended?;

    thread::sleep(PEACE);
    let over = Instant::now();
    let outage = echoes.iter().map(|echo| echo.longest_gap(began, over)).max().unwrap_or_default();
    drop(echoes);
    // A guest that is lost is a result, too.
    let after = Written::now(mover);
    let mut notes = vec![ended.note];
    notes.extend(cuts.map(|cuts| format!("{cuts} cuts")));
    let verified = page_errors(mover);
    notes.extend(verified.as_ref().err().map(|error| format!("{error:#}")));
    notes.retain(|note| !note.is_empty());
    Ok(Row {
        seconds: ended.seconds,
        wire_bytes,
        blackout_ms: ended.blackout.map(|blackout| blackout.as_secs_f64() * 1e3),
        outage_ms: outage.as_secs_f64() * 1e3,
        cpu_seconds: (cpu_seconds_all - idle * lasted).max(0.0),
        cpu_seconds_all,
        completed: ended.completed,
        page_errors: verified.ok(),
        pages_per_second: at_start.since(&before),
        pages_per_second_moving: after.map_or(0, |after| after.since(&at_start)),
        note: notes.join("; "),
        ..Row::default()
    })
}

/// What is wrong in the memory of all guests.
fn page_errors(mover: &dyn Mover) -> Result<u64> {
    let of = |address: &Ipv4Addr| Ok(mover.outside().verify(*address, VERIFIED)?.page_errors);
    mover.addresses().iter().map(of).sum()
}

/// How much the guests had written at some time.
struct Written {
    pages: u64,
    at: Instant,
}

impl Written {
    fn now(mover: &dyn Mover) -> Result<Self> {
        let of = |address: &Ipv4Addr| Ok(mover.outside().status(*address, ANSWER).context("the guest")?.pages_written);
        let pages = mover.addresses().iter().map(of).sum::<Result<u64>>()?;
        Ok(Self { pages, at: Instant::now() })
    }

    fn since(&self, earlier: &Self) -> u64 {
        let seconds = self.at.saturating_duration_since(earlier.at).as_secs_f64().max(0.001);
        (self.pages.saturating_sub(earlier.pages) as f64 / seconds).round() as u64
    }
}

/// Cuts the link of a host while a move runs.
struct Cuts {
    over: std::sync::Arc<AtomicBool>,
    thread: thread::JoinHandle<Result<usize>>,
}

impl Cuts {
    fn start(lab: Lab, host: &'static str) -> Self {
        let over = std::sync::Arc::new(AtomicBool::new(false));
        let told = std::sync::Arc::clone(&over);
        let thread = thread::spawn(move || {
            let set = |state| lab.set_link(host, LinkChange { state: Some(state), ..LinkChange::default() });
            for done in 0..CUTS {
                thread::sleep(WHOLE);
                if told.load(Ordering::Relaxed) {
                    return Ok(done);
                }
                set(LinkState::Down)?;
                thread::sleep(CUT);
                set(LinkState::Up)?;
            }
            Ok(CUTS)
        });
        Self { over, thread }
    }

    /// How many cuts there were.
    fn end(self) -> Result<usize> {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().ok().context("the thread of the cuts")?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_is_over_with_its_last_and_as_long_as_its_longest() {
        let ended = |seconds, blackout, completed| Ended {
            seconds,
            blackout: Some(Duration::from_millis(blackout)),
            completed,
            note: "3 passes".to_owned(),
        };
        let whole =
            Ended::together(&[ended(2.0, 90, true), ended(7.0, 80, true), Ended { note: "lost".into(), ..Ended::default() }]);
        assert_eq!((whole.seconds, whole.blackout, whole.completed), (7.0, Some(Duration::from_millis(90)), false));
        assert_eq!(whole.note, "3 passes, lost");
        assert!(Ended::together(&[ended(2.0, 90, true), ended(1.0, 10, true)]).completed);
    }
}
