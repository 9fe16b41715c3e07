//! Runs that are drawn anew each time: real faults at random moments of real moves, judged from outside.

use std::num::NonZero;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use godwit_e2e::faults::{Plan, run_all};

/// Beside the other tests that mostly wait.
const LANES: NonZero<usize> = NonZero::new(2).unwrap();
/// Longer faults are left to the long runs of `cargo xtask faults`.
const LONGEST: Duration = Duration::from_secs(7);

#[test]
fn twelve_moves_with_faults_at_random_moments_break_no_promise() -> Result<()> {
    let first = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    println!("from seed {first}; `cargo xtask faults --count 1 --seed SEED` repeats one run");
    let plans = (first..).map(Plan::of).filter(|plan| plan.longest_fault() <= LONGEST).take(12);
    let logs = Path::new(env!("CARGO_TARGET_TMPDIR")).join("faults.logs");
    let report = run_all(plans, LANES, &logs, |report| {
        report.runs.iter().last().inspect(|run| println!("{}", run.line()));
        Ok(())
    })?;
    println!("{}", report.summary());
    ensure!(report.is_clean(), "a promise was broken");
    Ok(())
}
