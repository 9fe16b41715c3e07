//! `godwit-sim plane`: the data plane of many moves, on all processors, and what came of them.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use godwit_carrier::pages::Encoding;
use godwit_sim::plane::{self, Broken, Ran, Seen, Wrong};

/// How many moves if nothing else is said.
const SEEDS: u64 = 2_000;

/// What several runs came to.
#[derive(Default)]
struct Sum {
    seeds: u64,
    events: u64,
    moved: u64,
    seen: Seen,
    simulated: u64,
    longest: (u64, u64),
    broken: Vec<(u64, Broken)>,
}

impl Sum {
    fn add(&mut self, seed: u64, ran: Result<Ran, Broken>) {
        self.seeds += 1;
        match ran {
            Ok(Ran { events, simulated, moved, seen }) => {
                self.events += events;
                self.moved += u64::from(moved);
                self.seen += seen;
                self.simulated += simulated;
                self.longest = self.longest.max((simulated, seed));
            }
            Err(broken) => self.broken.push((seed, broken)),
        }
    }

    fn join(mut self, other: Self) -> Self {
        self.broken.extend(other.broken);
        self.seen += other.seen;
        Self {
            seeds: self.seeds + other.seeds,
            events: self.events + other.events,
            moved: self.moved + other.moved,
            seen: self.seen,
            simulated: self.simulated + other.simulated,
            longest: self.longest.max(other.longest),
            broken: self.broken,
        }
    }
}

/// `None` if the arguments are none.
pub(crate) fn main(arguments: &[&str]) -> Option<ExitCode> {
    let (mut seeds, mut first) = (None, None);
    for pair in arguments.chunks(2) {
        match pair {
            ["--seeds", number] => seeds = Some(number.parse().ok()?),
            ["--seed", number] => first = Some(number.parse().ok()?),
            _ => return None,
        }
    }
    // A seed alone is that run alone.
    let seeds: u64 = seeds.unwrap_or(if first.is_some() { 1 } else { SEEDS });
    let begun = Instant::now();
    let mut sum = run(first.unwrap_or(0), seeds);
    sum.broken.sort_by_key(|(seed, _)| *seed);
    for (seed, Broken { rule, what }) in &sum.broken {
        println!("seed {seed}: broken: {rule}: {what}");
    }
    let Sum { seeds, events, moved, seen, simulated, longest: (longest, slowest), broken } = sum;
    let Seen { faults, connections, kept, old_greetings, full: _, pages, streamed } = seen;
    let Encoding { same, zero, copy, image: _, common, patch, data } = pages;
    let stayed = seeds - moved - broken.len() as u64;
    println!("{faults} faults, {connections} connections, {kept} frames kept for the next, {old_greetings} greetings out of date");
    println!(
        "pages: {same} same, {zero} zero, {copy} copies, {common} of other VMs, {patch} patches, {data} data, {streamed} in QEMU's stream"
    );
    println!(
        "{moved} moved, {stayed} stayed; {:.0} s simulated, the longest {:.1} s (seed {slowest})",
        simulated as f64 / 1e6,
        longest as f64 / 1e6
    );
    println!("{seeds} seeds, {events} events, {:.1} s, {} violations", begun.elapsed().as_secs_f64(), broken.len());
    Some(if broken.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// All seeds, until one is found in which a rule is broken.
fn run(first: u64, seeds: u64) -> Sum {
    let (next, found) = (AtomicU64::new(0), AtomicBool::new(false));
    let work = || {
        let mut sum = Sum::default();
        while !found.load(Ordering::Relaxed) {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= seeds {
                break;
            }
            let seed = first.wrapping_add(number);
            let ran = std::panic::catch_unwind(|| plane::run(seed, Wrong::Nothing));
            let panicked = || Err(Broken { rule: "nothing panics", what: "see above".into() });
            sum.add(seed, ran.unwrap_or_else(|_| panicked()));
            found.fetch_or(!sum.broken.is_empty(), Ordering::Relaxed);
        }
        sum
    };
    let workers = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        let started: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        started.into_iter().map(|worker| worker.join().expect("panics are caught")).fold(Sum::default(), Sum::join)
    })
}
