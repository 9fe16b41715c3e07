//! The guest's own work: writing pages, checking pages, watching the clocks.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use godwit_guest::{ClockReading, ClockWatch, ConsoleLine, DiskError, DiskPool, Knobs, Load, Noise, PAGE_SIZE, Pace, PagePool};
use rustix::process::setpriority_process;
use rustix::thread::gettid;
use rustix::time::ClockId;

use crate::console::Console;
use crate::counters::Counters;
use crate::{clock, now, thread};

/// Wrong pages that are described; more are only counted.
const MOST_TOLD: u64 = 16;
/// Blocks of each disk that are checked per second.
const DISK_CHECKS: u64 = 1_024;

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

/// Writes blocks of every virtio disk, and checks them against what memory knows of them.
pub(crate) fn start_disks(knobs: &Knobs, boot: u64, counters: &Arc<Counters>, console: &Console) -> std::io::Result<()> {
    for letter in ('a'..='h').filter(|_| knobs.disk > 0) {
        let path = format!("/dev/vd{letter}");
        if !Path::new(&path).exists() {
            continue;
        }
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::DIRECT | rustix::fs::OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(&path, flags, rustix::fs::Mode::empty())?);
        let size = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))?;
        let seed = boot ^ u64::from(u32::from(letter));
        let mut pool = DiskPool::new(file, knobs.disk.min(size), seed);
        let (counters, console, tick) = (Arc::clone(counters), console.clone(), knobs.tick);
        let rate = knobs.disk_dirty / PAGE_SIZE as u64;
        // Before the guest is ready, so that whoever moves it then moves disks with something on them.
        pool.fill().map_err(std::io::Error::other)?;
        thread("disk", move || {
            give_way();
            let (mut noise, mut next) = (Noise::new(seed), 0);
            let (mut writes, mut checks) = (Pace::new(rate, now()), Pace::new(DISK_CHECKS, now()));
            loop {
                let blocks = pool.blocks().max(1);
                let (due, looks) = (writes.due(now()), checks.due(now()));
                let wrong = |result: Result<(), DiskError>| {
                    if let Err(error) = result {
                        counters.disk_errors.add(1);
                        if counters.disk_errors.get() <= MOST_TOLD {
                            console.say(ConsoleLine::PageError { message: format!("{path}: {error}") });
                        }
                    }
                };
                for _ in 0..due {
                    wrong(pool.write(noise.below(blocks as u64) as usize));
                }
                for _ in 0..looks {
                    wrong(pool.check(next));
                    next = (next + 1) % blocks;
                }
                counters.disk_written.add(due);
                counters.disk_checked.add(looks);
                std::thread::sleep(tick);
            }
        })?;
    }
    Ok(())
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
