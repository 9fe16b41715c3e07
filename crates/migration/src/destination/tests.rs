//! Tables for single decisions; whole runs are in `tests/simulation.rs`.

use godwit_model::Bytes;

use super::*;

fn view(qemu: Option<(Vcpus, QemuMigration)>) -> DestinationView {
    DestinationView {
        now: Millis(0),
        unix_now: UnixMillis(0),
        qemu: qemu.map(|(vcpus, migration)| QemuView {
            vcpus,
            migration,
            remaining: Bytes(0),
            dirty_rate: None,
            since_sync: Millis(0),
            rounds: 0,
        }),
        released: true,
        aborted: None,
        carry: ArrivingCarry { usable: true, connected: true, again: false, port: 0, has_section: true },
        lost: false,
        settled: false,
        source_given_up: false,
        cont_refused: None,
        announced: false,
    }
}

const LOADED: Option<(Vcpus, QemuMigration)> = Some((Vcpus::Paused, QemuMigration::Completed));

/// A destination that has just decided to take the VM over.
fn taken_over() -> Destination {
    let mut destination = Destination::new(UnixMillis(1_000));
    let action = destination.decide(&DestinationRecord::Prepared, &view(LOADED));
    assert_eq!(action, DestinationAction::Record(DestinationRecord::Activated));
    destination
}

fn declines(action: &DestinationAction) -> bool {
    matches!(action, DestinationAction::Record(DestinationRecord::Declined { .. }))
}

#[test]
fn a_qemu_that_died_before_it_was_told_to_run_gives_the_vm_back() {
    assert!(declines(&taken_over().decide(&DestinationRecord::Activated, &view(None))));
}

#[test]
fn a_qemu_that_died_after_it_was_told_to_run_may_have_run() {
    let mut destination = taken_over();
    assert_eq!(destination.decide(&DestinationRecord::Activated, &view(LOADED)), DestinationAction::ContinueVm);
    let action = destination.decide(&DestinationRecord::Activated, &view(None));
    assert_eq!(action, DestinationAction::Record(DestinationRecord::Running));
}

#[test]
fn after_a_restart_nobody_knows_whether_a_dead_qemu_has_run() {
    let action = Destination::new(UnixMillis(1_000)).decide(&DestinationRecord::Activated, &view(None));
    assert_eq!(action, DestinationAction::Record(DestinationRecord::Running));
}

#[test]
fn qemus_own_refusal_gives_the_vm_back() {
    let mut destination = taken_over();
    let _ = destination.decide(&DestinationRecord::Activated, &view(LOADED));
    let refused = Some(Refusal::new(ErrorCode::QemuFailed, "no lock"));
    let refused = DestinationView { cont_refused: refused, ..view(LOADED) };
    assert!(declines(&destination.decide(&DestinationRecord::Activated, &refused)));
}

#[test]
fn a_carry_that_is_gone_before_cont_gives_the_vm_back_and_after_it_does_not() {
    let mut without = view(Some((Vcpus::Paused, QemuMigration::PostCopyPaused)));
    without.carry.usable = false;
    assert!(declines(&taken_over().decide(&DestinationRecord::Activated, &without)));
    let mut told = taken_over();
    let waiting = view(Some((Vcpus::Paused, QemuMigration::PostCopy)));
    assert_eq!(told.decide(&DestinationRecord::Activated, &waiting), DestinationAction::ContinueVm);
    assert_eq!(told.decide(&DestinationRecord::Activated, &without), DestinationAction::ContinueVm);
    // It does not answer any more.
    without.qemu.as_mut().expect("alive").vcpus = Vcpus::Other;
    let action = told.decide(&DestinationRecord::Activated, &without);
    assert_eq!(action, DestinationAction::Record(DestinationRecord::Running), "it may have run");
    let after_a_restart = Destination::new(UnixMillis(1_000)).decide(&DestinationRecord::Activated, &without);
    assert_eq!(after_a_restart, DestinationAction::Record(DestinationRecord::Running));
}

#[test]
fn a_destination_in_post_copy_takes_the_vm_over_and_says_when_it_is_whole() {
    let waiting = |vcpus| view(Some((vcpus, QemuMigration::PostCopy)));
    let mut destination = Destination::new(UnixMillis(1_000));
    let action = destination.decide(&DestinationRecord::Prepared, &waiting(Vcpus::Paused));
    assert_eq!(action, DestinationAction::Record(DestinationRecord::Activated));
    let running = |change: fn(&mut DestinationView)| {
        let mut seen = DestinationView { announced: true, ..waiting(Vcpus::Running) };
        change(&mut seen);
        Destination::new(UnixMillis(1_000)).decide(&DestinationRecord::Running, &seen)
    };
    let tells = |action: DestinationAction| match action {
        DestinationAction::Tell(message, _) => message,
        other => panic!("{other:?}"),
    };
    assert!(matches!(tells(running(|_| ())), PeerMessage::Running { .. }));
    assert_eq!(running(|seen| seen.carry.usable = false), DestinationAction::GoOn);
    let message = tells(running(|seen| {
        seen.carry = ArrivingCarry { usable: true, connected: false, again: true, port: 7, has_section: true };
    }));
    assert_eq!(message, PeerMessage::GoOn { port: 7 });
    let came = |seen: &mut DestinationView| {
        seen.carry.again = true;
        seen.qemu.as_mut().expect("alive").migration = QemuMigration::PostCopyPaused;
    };
    assert_eq!(running(came), DestinationAction::Recover, "the source's carry has come");
    assert_eq!(running(|seen| seen.lost = true), DestinationAction::EndQemu);
    assert_eq!(running(|seen| seen.settled = true), DestinationAction::EndQemu, "nobody knows of its memory any more");
    // Before it has been taken over the source has all of it.
    let mut without = waiting(Vcpus::Paused);
    without.carry.usable = false;
    assert!(declines(&Destination::new(UnixMillis(1_000)).decide(&DestinationRecord::Prepared, &without)));
    let mut early = waiting(Vcpus::Paused);
    early.carry.has_section = false;
    let action = Destination::new(UnixMillis(1_000)).decide(&DestinationRecord::Prepared, &early);
    assert!(matches!(action, DestinationAction::Wait(_)), "no other carry could go on in its place");
    for whole in
        [running(|seen| seen.qemu = None), running(|seen| seen.qemu.as_mut().expect("alive").migration = QemuMigration::Completed)]
    {
        assert!(matches!(tells(whole), PeerMessage::Whole { .. }));
    }
    let given_up = |migration| {
        let seen = DestinationView { announced: true, source_given_up: true, ..view(Some((Vcpus::Running, migration))) };
        Destination::new(UnixMillis(1_000)).decide(&DestinationRecord::Running, &seen)
    };
    assert_eq!(given_up(QemuMigration::Completed), DestinationAction::End(Outcome::Moved));
    assert!(matches!(tells(given_up(QemuMigration::PostCopy)), PeerMessage::Running { .. }), "memory is still to come");
}
