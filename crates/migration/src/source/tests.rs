//! Tables for single decisions; whole runs are in `tests/simulation.rs`.

use godwit_model::{Bytes, BytesPerSec, Ladder};

use super::*;

fn view(vcpus: Vcpus, migration: QemuMigration) -> SourceView {
    SourceView {
        now: Millis(1_000),
        unix_now: UnixMillis(1_000),
        qemu: Some(QemuView {
            vcpus,
            migration,
            remaining: Bytes(1 << 30),
            dirty_rate: Some(BytesPerSec(1 << 20)),
            since_sync: Millis(100),
            rounds: 1,
        }),
        carry: CarryView {
            usable: true,
            connected: true,
            rate: BytesPerSec(100 << 20),
            queued: Millis(0),
            round_trip: Millis(1),
            stalled: Millis(0),
            unanswered: Millis(0),
            can_leave: false,
            leaving: false,
        },
        disks: DisksView::NONE,
        silent: Millis(0),
        declined: None,
        running: false,
        whole: false,
        port: 0,
        next_port: None,
        memory_gone: false,
        cancel: false,
    }
}

fn source() -> Source {
    Source::new(MigrationPolicy::default(), UnixMillis(1_000_000), Millis(0))
}

#[test]
fn the_vm_is_stopped_when_the_budget_holds_and_not_before() {
    let mut far = view(Vcpus::Running, QemuMigration::Active);
    assert!(matches!(source().decide(SourceRecord::Offered, &far), SourceAction::Wait(_)));
    far.qemu.as_mut().expect("alive").remaining = Bytes(10 << 20);
    assert_eq!(source().decide(SourceRecord::Offered, &far), SourceAction::Stop);
    far.qemu.as_mut().expect("alive").dirty_rate = None;
    assert!(matches!(source().decide(SourceRecord::Offered, &far), SourceAction::Wait(_)), "an unknown dirty rate is no promise");
}

#[test]
fn a_blackout_within_the_budget_is_shortened_for_a_moment_if_the_guest_lets_it() {
    let mut source = source().held(true);
    let mut near = view(Vcpus::Running, QemuMigration::Active);
    near.qemu.as_mut().expect("alive").remaining = Bytes(10 << 20);
    assert_eq!(source.decide(SourceRecord::Offered, &near), SourceAction::Wait(NEAR));
    let later = SourceView { now: Millis(1_900), ..near.clone() };
    assert_eq!(source.decide(SourceRecord::Offered, &later), SourceAction::Wait(NEAR));
    let mut hot = later.clone();
    hot.qemu.as_mut().expect("alive").dirty_rate = Some(BytesPerSec(80 << 20));
    assert_eq!(source.clone().decide(SourceRecord::Offered, &hot), SourceAction::Stop, "it will not be shorter");
    let end = SourceView { now: Millis(2_000), ..near };
    // A phase in which it is too long begins no new moment.
    let mut long = end.clone();
    long.qemu.as_mut().expect("alive").remaining = Bytes(1 << 30);
    assert!(matches!(source.decide(SourceRecord::Offered, &long), SourceAction::Wait(_)));
    assert_eq!(source.decide(SourceRecord::Offered, &end), SourceAction::Stop, "a moment, no more");
}

#[test]
fn the_vm_is_not_stopped_while_the_destinations_qemu_does_not_answer() {
    let mut near = view(Vcpus::Running, QemuMigration::Active);
    near.qemu.as_mut().expect("alive").remaining = Bytes(1 << 20);
    assert_eq!(source().decide(SourceRecord::Offered, &near), SourceAction::Stop);
    near.carry.unanswered = Millis(550);
    assert!(matches!(source().decide(SourceRecord::Offered, &near), SourceAction::Wait(_)));
    near.carry.round_trip = Millis(60);
    assert_eq!(source().decide(SourceRecord::Offered, &near), SourceAction::Stop, "it is far, not silent");
    near.carry.unanswered = Millis(MigrationPolicy::default().stall.get() + 1);
    let mut source = source();
    assert_eq!(source.decide(SourceRecord::Offered, &near), SourceAction::CancelQemu);
    assert_eq!(source.giving_up().map(|reason| reason.code), Some(ErrorCode::MigrationStalled));
}

#[test]
fn the_vm_is_not_stopped_for_an_agent_that_says_nothing() {
    let mut near = view(Vcpus::Running, QemuMigration::Active);
    near.qemu.as_mut().expect("alive").remaining = Bytes(1 << 20);
    near.silent = Millis(2_001);
    assert_eq!(source().decide(SourceRecord::Offered, &near), SourceAction::Wait(NEAR));
    near.silent = Millis(1_999);
    assert_eq!(source().decide(SourceRecord::Offered, &near), SourceAction::Stop);
    near.silent = Millis(MigrationPolicy::default().stall.get() + 1);
    let mut source = source();
    assert_eq!(source.decide(SourceRecord::Offered, &near), SourceAction::CancelQemu);
    assert_eq!(source.giving_up().map(|reason| reason.code), Some(ErrorCode::MigrationStalled));
}

#[test]
fn a_switch_over_that_qemu_reached_first_is_cancelled() {
    let mut source = source();
    let first = view(Vcpus::FinishMigrate, QemuMigration::PreSwitchover);
    assert_eq!(source.decide(SourceRecord::Offered, &first), SourceAction::CancelQemu);
    let after = view(Vcpus::Running, QemuMigration::Cancelled);
    assert_eq!(source.decide(SourceRecord::Offered, &after), SourceAction::Record(SourceRecord::Returned));
    let SourceAction::End(Outcome::Stayed(reason)) = source.decide(SourceRecord::Returned, &after) else { panic!("not ended") };
    assert_eq!(reason.code, ErrorCode::QemuFirst);
}

#[test]
fn a_vm_whose_qemu_ended_before_the_stop_is_not_said_to_run_on() {
    for (broken, cancel) in [(false, false), (true, false), (false, true)] {
        let mut source = source();
        let _ = source.decide(SourceRecord::Offered, &view(Vcpus::Running, QemuMigration::Active));
        let mut dead = SourceView { qemu: None, cancel, ..view(Vcpus::Running, QemuMigration::Active) };
        dead.carry.usable = !broken;
        assert_eq!(source.decide(SourceRecord::Offered, &dead), SourceAction::Record(SourceRecord::Returned));
        let SourceAction::End(Outcome::Stayed(reason)) = source.decide(SourceRecord::Returned, &dead) else { panic!("not ended") };
        assert_eq!(reason.code, ErrorCode::QemuFailed);
        assert!(reason.message.contains("runs nowhere"), "{reason}");
    }
}

#[test]
fn our_stop_is_proven_before_the_switch_over_goes_on() {
    let mut source = source();
    let _ = source.decide(SourceRecord::Offered, &view(Vcpus::Paused, QemuMigration::Active));
    assert_eq!(source.stopped(), Some(Millis(1_000)));
    let gate = view(Vcpus::FinishMigrate, QemuMigration::PreSwitchover);
    assert_eq!(source.decide(SourceRecord::Offered, &gate), SourceAction::ContinueSwitchOver);
}

#[test]
fn nothing_is_released_before_qemu_has_completed() {
    for migration in [QemuMigration::Active, QemuMigration::Device, QemuMigration::Failed, QemuMigration::Cancelled] {
        let action = source().decide(SourceRecord::Offered, &view(Vcpus::Paused, migration));
        assert_ne!(action, SourceAction::Record(SourceRecord::Released), "{migration:?}");
    }
    let completed = view(Vcpus::PostMigrate, QemuMigration::Completed);
    assert_eq!(source().decide(SourceRecord::Offered, &completed), SourceAction::Record(SourceRecord::Released));
}

#[test]
fn a_released_vm_is_continued_only_when_the_destination_declined() {
    let mut seen = view(Vcpus::PostMigrate, QemuMigration::Completed);
    seen.cancel = true;
    seen.carry.usable = false;
    seen.unix_now = UnixMillis(u64::MAX);
    assert_eq!(source().decide(SourceRecord::Released, &seen), SourceAction::Tell(PeerMessage::Released, Millis(500)));
    seen.declined = Some(Refusal::new(ErrorCode::MigrationFailed, "no"));
    assert_eq!(source().decide(SourceRecord::Released, &seen), SourceAction::Record(SourceRecord::Returned));
    assert_eq!(source().decide(SourceRecord::Returned, &seen), SourceAction::ContinueVm);
}

#[test]
fn every_reason_to_give_up_leaves_the_vm_running_and_is_named() {
    type Change = fn(&mut SourceView);
    let cases: [(ErrorCode, Change); 5] = [
        (ErrorCode::Cancelled, |view| view.cancel = true),
        (ErrorCode::MigrationFailed, |view| view.carry.usable = false),
        (ErrorCode::MigrationStalled, |view| view.carry.stalled = Millis(121_000)),
        (ErrorCode::NotConverging, |view| view.now = Millis(31 * 60_000)),
        (ErrorCode::GrantExpired, |view| view.unix_now = UnixMillis(1_000_000)),
    ];
    for (code, change) in cases {
        let mut seen = view(Vcpus::Running, QemuMigration::Active);
        change(&mut seen);
        let mut source = source();
        assert_eq!(source.decide(SourceRecord::Offered, &seen), SourceAction::CancelQemu, "{code}");
        let reason = source.giving_up().expect("given up");
        assert_eq!(reason.code, code);
        assert!(reason.hint.is_some(), "{code} has no fix");
    }
}

#[test]
fn a_switch_that_takes_too_long_is_undone() {
    let mut source = source();
    let _ = source.decide(SourceRecord::Offered, &view(Vcpus::Paused, QemuMigration::Active));
    let mut late = view(Vcpus::FinishMigrate, QemuMigration::Device);
    late.now = Millis(12_000);
    assert_eq!(source.decide(SourceRecord::Offered, &late), SourceAction::CancelQemu);
    let failed = view(Vcpus::Paused, QemuMigration::Failed);
    assert_eq!(source.decide(SourceRecord::Offered, &failed), SourceAction::Record(SourceRecord::Returned));
    assert_eq!(source.decide(SourceRecord::Returned, &failed), SourceAction::ContinueVm);
}

/// A guest that writes more than the link takes, at a moment of its warm-up.
fn hot(now: u64, can_leave: bool) -> SourceView {
    let mut hot = view(Vcpus::Running, QemuMigration::Active);
    hot.now = Millis(now);
    let qemu = hot.qemu.as_mut().expect("alive");
    (qemu.dirty_rate, qemu.rounds) = (Some(BytesPerSec(150 << 20)), 2);
    hot.carry.can_leave = can_leave;
    hot
}

fn on_miss(ladder: &str) -> Source {
    let on_miss: Ladder = ladder.parse().expect("a ladder");
    Source::new(
        MigrationPolicy { on_miss, patience: Millis(10_000), ..MigrationPolicy::default() },
        UnixMillis(1_000_000),
        Millis(0),
    )
}

#[test]
fn each_rung_comes_in_its_time_and_ends_as_promised() {
    let mut source = on_miss("wait_for_quiet,throttle,postcopy");
    let waits = |action| matches!(action, SourceAction::Wait(_));
    assert!(waits(source.decide(SourceRecord::Offered, &hot(1_000, true))));
    assert_eq!(source.rung(Millis(1_000)), Some(Rung::WaitForQuiet));
    assert!(waits(source.decide(SourceRecord::Offered, &hot(10_900, true))));
    assert_eq!(source.decide(SourceRecord::Offered, &hot(11_000, true)), SourceAction::Throttle);
    source.on_throttled();
    assert!(waits(source.decide(SourceRecord::Offered, &hot(20_900, true))), "once");
    assert_eq!(source.decide(SourceRecord::Offered, &hot(21_000, true)), SourceAction::Leave);
    source.on_leaving();
    // Until carry says that it does.
    assert_eq!(source.decide(SourceRecord::Offered, &hot(21_100, true)), SourceAction::Leave);
    let mut leaving = hot(21_200, true);
    leaving.carry.leaving = true;
    assert!(waits(source.decide(SourceRecord::Offered, &leaving)));
    leaving.carry.rate = BytesPerSec(8 << 30);
    assert_eq!(source.decide(SourceRecord::Offered, &leaving), SourceAction::Stop, "against the speed of memory");

    let mut source = on_miss("give_up");
    assert!(waits(source.decide(SourceRecord::Offered, &hot(1_000, true))), "one look may have seen a moment");
    assert_eq!(source.decide(SourceRecord::Offered, &hot(2_000, true)), SourceAction::CancelQemu);
    assert_eq!(source.giving_up().map(|reason| reason.code), Some(ErrorCode::NotConverging));
    let mut source = on_miss("ask");
    assert!(waits(source.decide(SourceRecord::Offered, &hot(900_000, true))));
    source.set_policy(MigrationPolicy { postcopy: PostCopy::Now, ..*source.policy() });
    assert_eq!(source.decide(SourceRecord::Offered, &hot(900_100, true)), SourceAction::Leave, "somebody has decided");
}

#[test]
fn a_quiet_moment_ends_the_miss_and_the_first_pass_is_none() {
    let mut source = on_miss("wait_for_quiet,give_up");
    let _ = source.decide(SourceRecord::Offered, &hot(1_000, false));
    let mut quiet = hot(10_000, false);
    quiet.qemu.as_mut().expect("alive").dirty_rate = Some(BytesPerSec(1 << 20));
    assert!(matches!(source.decide(SourceRecord::Offered, &quiet), SourceAction::Wait(_)));
    assert_eq!(source.rung(Millis(10_000)), None);
    assert!(matches!(source.decide(SourceRecord::Offered, &hot(11_500, false)), SourceAction::Wait(_)), "it begins anew");
    let mut source = on_miss("give_up");
    for now in [1_000, 9_000] {
        let mut first = hot(now, true);
        first.qemu.as_mut().expect("alive").rounds = 1;
        assert!(matches!(source.decide(SourceRecord::Offered, &first), SourceAction::Wait(_)));
    }
    // What every stop costs is more than this budget: a quiet guest does not help either.
    let on_miss = Ladder::only(Rung::GiveUp);
    let policy = MigrationPolicy { max_blackout: Millis(50), on_miss, ..MigrationPolicy::default() };
    let mut source = Source::new(policy, UnixMillis(1_000_000), Millis(0));
    let mut seen = SourceAction::Stop;
    for now in [1_000, 2_000] {
        let mut quiet = hot(now, false);
        quiet.qemu.as_mut().expect("alive").dirty_rate = Some(BytesPerSec(1));
        seen = source.decide(SourceRecord::Offered, &quiet);
    }
    assert_eq!(seen, SourceAction::CancelQemu);
}

#[test]
fn passes_that_leave_as_much_each_time_are_a_miss_however_slowly_the_guest_seems_to_write() {
    let mut source = on_miss("give_up");
    let at = |now: u64, rounds: u32, megabytes: u64| {
        let mut seen = hot(now, false);
        let qemu = seen.qemu.as_mut().expect("alive");
        (qemu.dirty_rate, qemu.rounds, qemu.remaining) = (Some(BytesPerSec(30 << 20)), rounds, Bytes(megabytes << 20));
        seen
    };
    for (now, rounds, left) in [(1_000, 1, 900), (9_000, 2, 400), (13_000, 3, 300), (13_500, 3, 250)] {
        assert!(
            matches!(source.decide(SourceRecord::Offered, &at(now, rounds, left)), SourceAction::Wait(_)),
            "pass {rounds} shrinks"
        );
    }
    assert!(matches!(source.decide(SourceRecord::Offered, &at(16_000, 4, 290)), SourceAction::Wait(_)));
    assert_eq!(source.decide(SourceRecord::Offered, &at(17_000, 4, 280)), SourceAction::CancelQemu);
}

#[test]
fn a_destination_that_cannot_do_post_copy_is_named_when_the_move_is_given_up() {
    let mut source = on_miss("postcopy");
    assert!(matches!(source.decide(SourceRecord::Offered, &hot(1_000, false)), SourceAction::Wait(_)));
    assert_eq!(source.decide(SourceRecord::Offered, &hot(31 * 60_000, false)), SourceAction::CancelQemu);
    let reason = source.giving_up().expect("given up");
    assert!(reason.code == ErrorCode::NotConverging && reason.message.contains("cannot do post-copy"), "{reason}");
}

#[test]
fn memory_that_was_left_is_kept_until_the_destination_has_it() {
    let source = || source().leaving(true);
    let mut seen = view(Vcpus::PostMigrate, QemuMigration::Completed);
    seen.running = true;
    // A destination that has ended the move without its source answers how.
    assert_eq!(source().decide(SourceRecord::Released, &seen), SourceAction::Tell(PeerMessage::Released, Millis(500)));
    seen.carry.usable = false;
    seen.port = 7;
    assert_eq!(source().decide(SourceRecord::Released, &seen), SourceAction::Tell(PeerMessage::Cut { port: 7 }, Millis(500)));
    seen.next_port = Some(9);
    assert_eq!(source().decide(SourceRecord::Released, &seen), SourceAction::GoOn(9));
    seen.memory_gone = true;
    assert_eq!(source().decide(SourceRecord::Released, &seen), SourceAction::Tell(PeerMessage::Lost, Millis(500)));
    seen.whole = true;
    assert_eq!(source().decide(SourceRecord::Released, &seen), SourceAction::Record(SourceRecord::Confirmed));
    // A QEMU that died before the release took it along.
    let mut source = source();
    source.on_stopped(Millis(900));
    let dead = SourceView { qemu: None, running: false, whole: false, ..seen };
    assert_eq!(source.decide(SourceRecord::Offered, &dead), SourceAction::Record(SourceRecord::Returned));
}

#[test]
fn memory_waits_for_the_disks_and_the_switch_for_all_that_was_written_to_them() {
    let mut source = source();
    let copying = DisksView { copied: false, whole: false, ..DisksView::NONE };
    let begin =
        |disks: &DisksView, now| SourceView { now: Millis(now), disks: disks.clone(), ..view(Vcpus::Running, QemuMigration::None) };
    // However long they take: it is not the time that memory has.
    for now in [0, 10_000_000] {
        assert!(matches!(source.decide(SourceRecord::Offered, &begin(&copying, now)), SourceAction::Wait(_)));
    }
    let copied = DisksView { copied: true, ..copying.clone() };
    assert_eq!(source.decide(SourceRecord::Offered, &begin(&copied, 10_000_100)), SourceAction::Migrate);
    let mut near = SourceView { now: Millis(10_000_200), disks: copied.clone(), ..view(Vcpus::Running, QemuMigration::Active) };
    near.qemu.as_mut().expect("alive").remaining = Bytes(1 << 20);
    near.disks.queued = Millis(1_000);
    assert!(matches!(source.decide(SourceRecord::Offered, &near), SourceAction::Wait(_)), "what waits for the disks is blackout");
    near.disks.queued = Millis(10);
    assert_eq!(source.decide(SourceRecord::Offered, &near), SourceAction::Stop);
    source.on_stopped(Millis(10_000_300));
    for migration in [QemuMigration::Active, QemuMigration::PreSwitchover] {
        let stopped = SourceView { now: Millis(10_000_310), disks: copied.clone(), ..view(Vcpus::Paused, migration) };
        assert_eq!(source.decide(SourceRecord::Offered, &stopped), SourceAction::FinishDisks);
    }
    let whole = SourceView { now: Millis(10_000_320), ..view(Vcpus::Paused, QemuMigration::PreSwitchover) };
    assert_eq!(source.decide(SourceRecord::Offered, &whole), SourceAction::ContinueSwitchOver);
    let dead = SourceView { qemu: None, disks: copied, now: Millis(10_000_330), ..view(Vcpus::Paused, QemuMigration::Device) };
    assert_eq!(
        source.decide(SourceRecord::Offered, &dead),
        SourceAction::Record(SourceRecord::Returned),
        "a destination without the disks must not run"
    );
}

#[test]
fn a_disk_that_cannot_travel_ends_the_move_with_its_reason() {
    let why = Refusal::new(ErrorCode::NotEnoughSpace, "no room");
    for (migration, expected) in
        [(QemuMigration::None, SourceAction::Record(SourceRecord::Returned)), (QemuMigration::Active, SourceAction::CancelQemu)]
    {
        let disks = DisksView { failed: Some(why.clone()), ..DisksView::NONE };
        let mut source = source();
        assert_eq!(source.decide(SourceRecord::Offered, &SourceView { disks, ..view(Vcpus::Running, migration) }), expected);
        assert_eq!(source.giving_up(), Some(&why));
    }
    let disks = DisksView { stalled: Millis(121_000), copied: false, ..DisksView::NONE };
    let mut source = source();
    let _ = source.decide(SourceRecord::Offered, &SourceView { disks, ..view(Vcpus::Running, QemuMigration::None) });
    assert_eq!(source.giving_up().map(|refusal| refusal.code), Some(ErrorCode::MigrationStalled));
}
