//! The hand-over, explored as far as CI has time for; and protocols that are wrong on purpose, each of which must be found out.
//! `cargo xtask model` goes further.

use std::time::Instant;

use godwit_sim::handover::rules;
use godwit_sim::{Explored, HandOver, NO_GOOD_END, Route, Wrong, explore};

const LIMIT: usize = 10_000_000;

fn explored(model: HandOver) -> Explored {
    let begun = Instant::now();
    let found = explore(&model, LIMIT);
    let Explored { states, steps, depth, good_ends, .. } = found;
    println!("{model:?}: {states} states, {steps} steps, depth {depth}, {good_ends} good ends, {:?}", begun.elapsed());
    found
}

fn holds(model: HandOver) {
    let found = explored(model);
    if let Some(violation) = &found.violation {
        panic!("{}\n{}\n{}", violation.rule, violation.trace.join("\n"), violation.state);
    }
    assert!(!found.cut_short, "too many states for CI");
    assert!(found.good_ends > 0);
}

/// The first rule that a wrong protocol breaks.
fn caught(route: Route, faults: u8, held: bool, wrong: Wrong) -> &'static str {
    let found = explored(HandOver { route, faults, held, postcopy: wrong == Wrong::KeepsNothingBack, wrong });
    let violation = found.violation.unwrap_or_else(|| panic!("{wrong:?} was not found out"));
    println!("{}\n{}", violation.rule, violation.trace.join("\n"));
    violation.rule
}

#[test]
fn prop_one_move_with_two_faults_keeps_every_rule() {
    holds(HandOver { route: Route::Once, faults: 2, held: true, postcopy: false, wrong: Wrong::Nothing });
}

#[test]
fn prop_one_move_of_a_qemu_that_may_be_first_keeps_every_rule() {
    holds(HandOver { route: Route::Once, faults: 1, held: false, postcopy: false, wrong: Wrong::Nothing });
}

#[test]
fn prop_there_and_back_keeps_every_rule() {
    for held in [false, true] {
        holds(HandOver { route: Route::ThereAndBack, faults: 0, held, postcopy: false, wrong: Wrong::Nothing });
    }
}

#[test]
fn prop_post_copy_keeps_every_rule() {
    holds(HandOver { route: Route::Once, faults: 2, held: true, postcopy: true, wrong: Wrong::Nothing });
    holds(HandOver { route: Route::ThereAndBack, faults: 0, held: true, postcopy: true, wrong: Wrong::Nothing });
}

#[test]
fn a_source_that_does_not_keep_what_was_left_is_found_out() {
    assert_eq!(caught(Route::Once, 0, true, Wrong::KeepsNothingBack), rules::NOTHING_REMOVED);
}

#[test]
fn a_destination_that_runs_without_a_release_is_found_out() {
    assert_eq!(caught(Route::Once, 1, true, Wrong::RunsWithoutRelease), rules::ONE_OWNER);
}

#[test]
fn a_source_that_takes_silence_for_declined_is_found_out() {
    assert_eq!(caught(Route::Once, 0, true, Wrong::TakesSilenceForDeclined), rules::NOT_AFTER_RELEASE);
}

#[test]
fn a_release_that_is_said_before_it_is_durable_is_found_out() {
    assert_eq!(caught(Route::Once, 1, true, Wrong::SaysReleaseEarly), rules::ONE_OWNER);
}

#[test]
fn a_destination_that_runs_before_it_is_durable_that_it_may_is_found_out() {
    assert_eq!(caught(Route::Once, 1, true, Wrong::RunsBeforeDurable), rules::NOT_DECLINED_AFTER_RUN);
}

#[test]
fn a_stop_of_qemus_that_is_taken_for_ours_is_found_out() {
    assert_eq!(caught(Route::Once, 2, false, Wrong::TakesQemusStopForOurs), rules::NOT_OUTDATED);
}

#[test]
fn a_release_without_a_proven_stop_is_found_out() {
    assert_eq!(caught(Route::Once, 1, false, Wrong::ReleasesWithoutProvenStop), rules::NOT_AFTER_RELEASE);
}

#[test]
fn a_source_that_is_removed_after_its_release_is_found_out() {
    assert_eq!(caught(Route::Once, 0, true, Wrong::RemovesAfterRelease), rules::NOTHING_REMOVED);
}

#[test]
fn a_decline_that_is_said_before_it_is_durable_is_found_out() {
    assert_eq!(caught(Route::Once, 1, true, Wrong::SaysDeclinedEarly), rules::NOT_AFTER_RELEASE);
}

#[test]
fn a_generation_that_can_be_taken_up_twice_is_found_out() {
    assert_eq!(caught(Route::Once, 2, true, Wrong::KeepsNoFloor), rules::NOT_AFTER_RELEASE);
}

#[test]
fn a_vm_that_is_given_up_although_its_source_holds_it_is_found_out() {
    assert_eq!(caught(Route::Once, 1, true, Wrong::TakesDeathForCrash), rules::NOTHING_REMOVED);
}

#[test]
fn a_vm_that_is_claimed_before_it_is_there_for_good_is_found_out() {
    assert_eq!(caught(Route::Once, 1, true, Wrong::ClaimsWhatItMayDecline), rules::NOT_CLAIMED_IN_VAIN);
}

#[test]
fn a_vm_that_has_gone_on_before_its_first_source_knew_is_found_out_if_nobody_remembers() {
    assert_eq!(caught(Route::Onward, 0, true, Wrong::ForgetsThatItRan), rules::ONE_OWNER);
}

#[test]
fn hosts_that_answer_nothing_of_the_past_are_found_out() {
    assert_eq!(caught(Route::Once, 1, true, Wrong::AnswersNothingOfThePast), NO_GOOD_END);
}
