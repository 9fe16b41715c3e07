//! The data plane of moves, as many as CI has time for; and carries that are wrong on purpose, each of which must be found out.
//! `cargo xtask sim` does more.

use std::ops::AddAssign;

use godwit_sim::plane::{self, Seen, Wrong, rules};

/// A wrong carry must be found out within so many.
const SEEDS: u64 = 500;

#[test]
fn prop_a_hundred_moves_keep_every_rule() {
    let (mut moved, mut stayed, mut seen) = (0, 0, Seen::default());
    for seed in 0..100 {
        match plane::run(seed, Wrong::Nothing) {
            Ok(ran) => {
                (if ran.moved { &mut moved } else { &mut stayed }).add_assign(1);
                seen += ran.seen;
            }
            Err(broken) => panic!("seed {seed}: {broken:?}"),
        }
    }
    println!("{moved} moved, {stayed} stayed, {seen:?}");
    assert!(moved > 50 && stayed > 10, "too many or too few faults to prove anything: {moved} moved, {stayed} stayed");
    let Seen { faults, connections, kept, old_greetings, full, pages, streamed } = seen;
    let rare = [connections - 100, old_greetings, full, kept, faults];
    let often = [pages.same, pages.zero, pages.copy, pages.common, pages.patch, pages.data, streamed];
    assert!(
        rare.iter().all(|count| *count > 0) && often.iter().all(|count| *count > 100),
        "something hardly ever happens: {seen:?}"
    );
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in 0..10 {
        assert_eq!(plane::run(seed, Wrong::Nothing), plane::run(seed, Wrong::Nothing));
    }
}

/// The wrong carry breaks this rule within some hundred runs.
fn is_found_out(wrong: Wrong, rule: &str) {
    let broken = (0..SEEDS).map(|seed| (seed, plane::run(seed, wrong)));
    let found = broken.filter_map(|(seed, ran)| Some((seed, ran.err()?))).find(|(_, broken)| broken.rule == rule);
    let (seed, broken) = found.unwrap_or_else(|| panic!("{wrong:?} was not found out"));
    println!("seed {seed}: {broken:?}");
}

#[test]
fn an_acknowledgement_before_a_frame_is_dealt_with_is_found_out() {
    is_found_out(Wrong::AcknowledgesWhatWaits, rules::ACKNOWLEDGED_IS_DEALT_WITH);
}

#[test]
fn frames_that_are_dealt_with_out_of_turn_are_found_out() {
    is_found_out(Wrong::DealsWithNewestFirst, rules::IN_ORDER);
}

#[test]
fn a_frame_that_is_not_sent_again_is_found_out() {
    is_found_out(Wrong::SkipsOneWhenSendingAgain, rules::IN_ORDER);
}

#[test]
fn a_connection_that_begins_where_the_last_one_ended_is_found_out() {
    is_found_out(Wrong::SendsNothingAgain, rules::IN_ORDER);
}

#[test]
fn half_a_frame_that_is_kept_for_the_next_connection_is_found_out() {
    is_found_out(Wrong::KeepsHalfAFrame, rules::IN_ORDER);
}

#[test]
fn a_greeting_that_says_too_much_is_found_out() {
    is_found_out(Wrong::GreetsWithOneMore, rules::GREETING_IS_TAKEN);
}

#[test]
fn an_old_greeting_that_is_taken_for_a_new_one_is_found_out() {
    is_found_out(Wrong::TakesOldGreetings, rules::NO_END_WITHOUT_CAUSE);
}

#[test]
fn digests_of_what_is_outdated_are_found_out() {
    is_found_out(Wrong::HoldsWhatIsOutdated, rules::MEMORY_FOLLOWS);
}

#[test]
fn checks_that_are_passed_over_are_found_out() {
    is_found_out(Wrong::IgnoresChecks, rules::MEMORY_FOLLOWS);
}

#[test]
fn copies_of_pages_that_qemu_itself_writes_to_are_found_out() {
    is_found_out(Wrong::CopiesFromWhatQemuWrites, rules::NO_END_WITHOUT_CAUSE);
}

#[test]
fn device_state_that_overtakes_pages_is_found_out() {
    is_found_out(Wrong::LetsTheStreamOvertakePages, rules::MEMORY_EQUAL);
}

#[test]
fn a_carry_that_reads_more_than_there_is_room_for_is_found_out() {
    is_found_out(Wrong::ReadsWithoutRoom, rules::BOUNDED_SESSION);
}

#[test]
fn a_last_word_that_is_made_up_is_found_out() {
    is_found_out(Wrong::MakesUpTheLastWord, rules::RETURN_PATH);
}

#[test]
fn a_destination_that_runs_without_a_release_is_found_out() {
    is_found_out(Wrong::RunsWithoutRelease, rules::ORDER);
}
