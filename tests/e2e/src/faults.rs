//! Real faults at random moments of real moves, judged from outside.
//!
//! ```text
//!  seed ─▶ Plan ─▶ boot ─▶ move ──────────────▶ mend ─▶ settle ─▶ judge ─▶ clear
//!                            └─ faults, each at its moment
//! ```
//! A run is a function of its seed as far as the machine lets it be: versions of QEMU, guest, disk, limits, faults and moments are. Several
//! runs share a [ground](ground::Ground); one on which something is left or does not work any more is built anew.
//!
//! Nothing here may ask Godwit how a run went: runners are counted by the witness, processes by `/proc`, pages by the guest.

mod clock;
pub mod disk;
mod fault;
mod ground;
mod inject;
mod moment;
mod plan;
mod report;
mod run;

use std::num::NonZero;
use std::path::Path;
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;

use anyhow::{Context, Result};

pub use fault::{Fault, FaultKind, FullDisk, Party, Planned, Side};
use ground::Ground;
pub use moment::{Mark, Moment, Tracks};
pub use plan::{Disk, Emulator, Load, Plan};
pub use report::{DiskCompare, FaultReport, Outcome, Run};

/// Runs that one ground serves: each leaves an address and a record of the witness behind.
const SERVES: u8 = 60;

/// Does one run for each plan, as many at a time as there are lanes, each lane on ground of its own; hands all that there are to `tell`
/// whenever one is judged, which is the last. A run mostly waits, so that two lanes per core disturb each other little. Logs of runs that
/// broke a promise are kept below `logs`.
///
/// # Errors
/// When a run cannot be done even on new ground, or what `tell` says: the runs under way end, and no other begins.
pub fn run_all(
    plans: impl Iterator<Item = Plan> + Send,
    lanes: NonZero<usize>,
    logs: &Path,
    mut tell: impl FnMut(&FaultReport) -> Result<()>,
) -> Result<FaultReport> {
    let plans = Mutex::new(plans.fuse());
    let mut report = FaultReport::default();
    thread::scope(|scope| {
        let (judged, runs) = mpsc::channel();
        for _ in 0..lanes.get() {
            let (plans, judged) = (&plans, judged.clone());
            scope.spawn(move || {
                if let Err(error) = lane(plans, logs, &judged) {
                    // Nobody hears it where another lane has failed before.
                    let _ = judged.send(Err(error));
                }
            });
        }
        drop(judged);
        // Nobody to hear of the next run any more is what ends the lanes early.
        runs.into_iter().try_for_each(|run| {
            report.runs.push(run?);
            tell(&report)
        })
    })?;
    report.runs.sort_by_key(|run| run.seed);
    Ok(report)
}

/// Does one run after the other until there is no plan left or nobody hears of them.
fn lane(plans: &Mutex<impl Iterator<Item = Plan>>, logs: &Path, judged: &mpsc::Sender<Result<Run>>) -> Result<()> {
    let mut ground: Option<Ground> = None;
    let next = || plans.lock().unwrap_or_else(PoisonError::into_inner).next();
    while let Some(plan) = next() {
        let (run, after) = one(&plan, ground.take(), logs).with_context(|| format!("seed {}", plan.seed))?;
        ground = after;
        if judged.send(Ok(run)).is_err() {
            break;
        }
    }
    ground.map_or(Ok(()), |ground| ground.cluster.take_down())
}

/// One run, and the ground for the next where it is good for another.
fn one(plan: &Plan, old: Option<Ground>, logs: &Path) -> Result<(Run, Option<Ground>)> {
    if let Some(mut ground) = old {
        match run::run(&mut ground, plan, logs) {
            Ok(run) => return cleared(ground, plan, run, logs),
            Err(error) => {
                eprintln!("   builds new ground, because on the old one: {error:#}");
                ground.cluster.take_down()?;
            }
        }
    }
    let mut ground = Ground::build()?;
    let run = run::run(&mut ground, plan, logs)?;
    cleared(ground, plan, run, logs)
}

/// The run, and the ground without its VM, if that is good for another: what cannot be removed, or is left, is a promise broken, too.
fn cleared(mut ground: Ground, plan: &Plan, mut run: Run, logs: &Path) -> Result<(Run, Option<Ground>)> {
    let result = run::clear(&mut ground, plan);
    if let Err(error) = &result {
        run.broken.push(format!("not cleared: {error:#}"));
        ground.keep_logs(&logs.join(plan.seed.to_string()))?;
    }
    if result.is_err() || ground.served >= SERVES {
        ground.cluster.take_down()?;
        return Ok((run, None));
    }
    Ok((run, Some(ground)))
}
