//! The guest's own work: writing pages, checking pages, watching the clocks.

use std::sync::Arc;
use std::time::Duration;

use godwit_guest::{ClockReading, ClockWatch, ConsoleLine, Knobs, Load, Noise, PAGE_SIZE, Pace, PagePool};
use rustix::process::setpriority_process;
use rustix::thread::gettid;
use rustix::time::ClockId;

use crate::console::Console;
use crate::counters::Counters;
use crate::{clock, now, thread};

/// Wrong pages that are described; more are only counted.
const MOST_TOLD: u64 = 16;

/// Dirties pages of the working set at the rate that was asked for.
pub(crate) fn start_writer(knobs: &Knobs, pool: &Arc<PagePool>, counters: &Arc<Counters>, mut noise: Noise) -> std::io::Result<()> {
    let in_set = (knobs.working_set / PAGE_SIZE as u64).min(pool.pages() as u64);
    let rate = knobs.dirty / PAGE_SIZE as u64;
    if in_set == 0 || rate == 0 {
        return Ok(());
    }
    let (pool, counters, sizes, tick) = (Arc::clone(pool), Arc::clone(counters), knobs.write_size.clone(), knobs.tick);
    let phase = knobs.phase;
    thread("writer", move || {
        give_way();
        let mut pace = Pace::new(rate, now()).in_phases(phase);
        let spread = (sizes.end() - sizes.start() + 1) as u64;
        loop {
            let due = pace.due(now());
            for _ in 0..due {
                let index = noise.below(in_set) as usize;
                let size = sizes.start() + noise.below(spread) as usize;
                pool.write(index, size, &mut noise);
            }
            counters.pages_written.add(due);
            std::thread::sleep(tick);
        }
    })
}

/// Writes to memory for measurements at the rate that was asked for, and verifies it when somebody wants that.
pub(crate) fn start_load(knobs: &Knobs, mut load: Load, counters: &Arc<Counters>) -> std::io::Result<()> {
    let rate = if knobs.working_set < PAGE_SIZE as u64 { 0 } else { knobs.dirty / PAGE_SIZE as u64 };
    let (counters, tick, phase) = (Arc::clone(counters), knobs.tick, knobs.phase);
    thread("load", move || {
        give_way();
        let mut pace = Pace::new(rate, now()).in_phases(phase);
        loop {
            let due = pace.due(now());
            for _ in 0..due {
                load.write();
            }
            counters.pages_written.add(due);
            if counters.verify.get() > 0 {
                counters.page_errors.add(load.verify());
                counters.pages_checked.add(load.pages() as u64);
                counters.verify.set(0);
                counters.sweeps.add(1);
            }
            std::thread::sleep(tick);
        }
    })
}

/// Checks all pages again and again.
pub(crate) fn start_checker(
    knobs: &Knobs,
    pool: &Arc<PagePool>,
    counters: &Arc<Counters>,
    console: &Console,
) -> std::io::Result<()> {
    let rate = knobs.check.map(|bytes| bytes / PAGE_SIZE as u64);
    if pool.pages() == 0 || rate == Some(0) {
        return Ok(());
    }
    let (pool, counters, console, tick) = (Arc::clone(pool), Arc::clone(counters), console.clone(), knobs.tick);
    thread("checker", move || {
        give_way();
        let mut pace = rate.map(|rate| Pace::new(rate, now()));
        let mut index = 0;
        loop {
            let due = pace.as_mut().map_or(1024, |pace| pace.due(now()));
            for _ in 0..due {
                if let Err(error) = pool.check(index) {
                    counters.page_errors.add(1);
                    if counters.page_errors.get() <= MOST_TOLD {
                        console.say(ConsoleLine::PageError { message: error.to_string() });
                    }
                }
                index += 1;
                if index == pool.pages() {
                    index = 0;
                    counters.sweeps.add(1);
                }
            }
            counters.pages_checked.add(due);
            if pace.is_some() {
                std::thread::sleep(tick);
            }
        }
    })
}

/// Looks at the clocks all the time.
pub(crate) fn start_clock_watch(knobs: &Knobs, counters: &Arc<Counters>) -> std::io::Result<()> {
    let (counters, tick) = (Arc::clone(counters), knobs.tick);
    thread("clock", move || {
        let mut watch = ClockWatch::default();
        loop {
            watch.observe(ClockReading { before: now(), real: clock(ClockId::Realtime), after: now() });
            let report = watch.report();
            counters.clock_jumps.set(report.jumps);
            counters.largest_clock_jump_ms.set(millis(report.largest_jump));
            counters.stalls.set(report.stalls);
            counters.longest_stall_ms.set(millis(report.longest_stall));
            std::thread::sleep(tick);
        }
    })
}

/// Work in the background must not be seen as a delay of an echo.
fn give_way() {
    // A priority of a process is one of a thread here, and stays as it is where that is not allowed.
    let _ = setpriority_process(Some(gettid()), 10);
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
