//! Explores the hand-over of a VM further than CI has time for, and prints what was found, as a table for `docs/reliability.md`; or, with
//! `plane`, runs the data plane of thousands of moves.

mod many;

use std::process::ExitCode;
use std::time::Instant;

use godwit_sim::{HandOver, Route, Wrong, explore};

/// States that fit into some 16 GiB.
const LIMIT: usize = 120_000_000;

const USAGE: &str = "\
Usage: godwit-sim [ROUTE FAULTS QEMU]...          where ROUTE is once, back or onward, and QEMU is 7.2, 10.0 or postcopy
       godwit-sim plane [--seeds N] [--seed S]    N moves from seed S on, or that of seed S";

/// What is explored if nothing else is said.
const ALL: &[&str] = &[
    "once", "3", "7.2", "once", "3", "10.0", "back", "1", "7.2", "back", "1", "10.0", "onward", "0", "7.2", "onward", "0", "10.0",
    "once", "3", "postcopy", "back", "1", "postcopy",
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if let Some(("plane", rest)) = arguments.split_first().map(|(first, rest)| (*first, rest)) {
        return many::main(rest).unwrap_or_else(|| {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        });
    }
    if arguments.is_empty() {
        arguments = ALL.to_vec();
    }
    let mut models = vec![];
    for three in arguments.chunks(3) {
        let Some(model) = parse(three) else {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        };
        models.push((three.join(" "), model));
    }
    println!("| moves, faults, QEMU | states | steps | depth | good ends | time | result |");
    println!("|---|---|---|---|---|---|---|");
    let mut held = true;
    for (name, model) in models {
        let begun = Instant::now();
        let found = explore(&model, LIMIT);
        let result = match &found.violation {
            Some(violation) => violation.rule,
            None if found.cut_short => "more states than there is room for",
            None => "every rule holds",
        };
        held &= found.violation.is_none() && !found.cut_short;
        let (states, steps, depth, ends) = (found.states, found.steps, found.depth, found.good_ends);
        println!("| {name} | {states} | {steps} | {depth} | {ends} | {:.0} s | {result} |", begun.elapsed().as_secs_f64());
        if let Some(violation) = found.violation {
            eprintln!("{}\n{}", violation.trace.join("\n"), violation.state);
        }
    }
    if held { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn parse(three: &[&str]) -> Option<HandOver> {
    let [route, faults, qemu] = three else { return None };
    let route = match *route {
        "once" => Route::Once,
        "back" => Route::ThereAndBack,
        "onward" => Route::Onward,
        _ => return None,
    };
    let (held, postcopy) = match *qemu {
        "7.2" => (false, false),
        "10.0" => (true, false),
        "postcopy" => (true, true),
        _ => return None,
    };
    Some(HandOver { route, faults: faults.parse().ok()?, held, postcopy, wrong: Wrong::Nothing })
}
