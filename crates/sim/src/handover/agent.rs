//! What an agent does: looks, lets the real machine decide, acts, and answers for moves of the past. As in `crates/agent/src/vm`, step by step,
//! so that between any two of them an agent can die or be frozen.

use godwit_migration::{
    ArrivingCarry, CarryView, Destination, DestinationAction, DestinationRecord, DestinationView, DisksView, Outcome, PeerMessage,
    QemuMigration, QemuView, Source, SourceAction, SourceRecord, SourceView, Vcpus,
};
use godwit_model::{Bytes, BytesPerSec, ErrorCode, MigrationPolicy, Millis, Refusal, UnixMillis};

use super::{
    Command, DestinationMove, Doing, EVERY_FACT, Ending, Fact, Fault, HandOver, Holding, Moving, Record, SourceMove, Step, Steps,
    Taken, Wire, World, Wrong, generation, qemu, rules,
};

/// A moment after the grant has expired.
const EXPIRES: UnixMillis = UnixMillis(1);
/// Longer than a warm-up may take, longer than a stop may take, longer than loading may take.
const LATE: [u64; 3] = [31 * 60_000, 11_000, 61_000];

fn reason() -> Refusal {
    Refusal::new(ErrorCode::MigrationFailed, "because")
}

pub(super) fn source_move(postcopy: bool) -> SourceMove {
    // The wall clock never passes it: that would end the warm-up just as its own limit does.
    let machine = Source::new(MigrationPolicy::default(), EXPIRES, Millis(0)).leaving(postcopy);
    SourceMove { machine, clock: 0, declined: false, running: false, whole: false, cancel: false }
}

pub(super) fn destination_move() -> DestinationMove {
    DestinationMove {
        machine: Destination::new(EXPIRES),
        clock: 0,
        released: false,
        aborted: false,
        lost: false,
        settled: false,
        source_given_up: false,
        cont_refused: false,
        announced: false,
    }
}

pub(super) fn new_source(world: &World, number: u8) -> Moving {
    Moving::Source(number, source_move(world.postcopy))
}

pub(super) fn new_destination(number: u8) -> Moving {
    Moving::Destination(number, destination_move())
}

pub(super) fn steps(model: &HandOver, steps: &mut Steps<'_>, host: u8) {
    let here = &steps.world.hosts[usize::from(host)];
    if here.stale.is_some() {
        steps.add(Step::StaleCommand(host), |after| stale(after, host, true));
        steps.add(Step::StaleCommandDropped(host), |after| stale(after, host, false));
    }
    if !here.up {
        steps.add(Step::Restarts(host), |after| restart(after, host));
        return;
    }
    match here.doing {
        Doing::Idle => {
            idle(model, steps, host);
            arrivals(model, steps, host);
        }
        Doing::Seen(vcpus) => {
            steps.add(Step::Decides(host), |after| decide(model, after, host, Some(vcpus), true));
            let warms_up = here.qemu.is_some_and(|qemu| qemu.migration == QemuMigration::Active) && vcpus == Vcpus::Running;
            if warms_up {
                steps.add(Step::DecidesThatItDoesNotFit(host), |after| decide(model, after, host, Some(vcpus), false));
            }
        }
        _ => {
            steps.add(Step::Acts(host), |after| act(model, after, host));
            if here.doing == Doing::Told(Command::Cont) && matches!(here.moving, Some(Moving::Destination(..))) {
                steps.fault(Fault::ContRefused(host), |after| {
                    let here = &mut after.hosts[usize::from(host)];
                    here.doing = Doing::Idle;
                    if let Some(Moving::Destination(_, moving)) = &mut here.moving {
                        moving.cont_refused = true;
                    }
                });
            }
        }
    }
}

/// Looking, and time that passes.
fn idle(model: &HandOver, steps: &mut Steps<'_>, host: u8) {
    let here = &steps.world.hosts[usize::from(host)];
    // A monitor that is opened again first drops, or has carried out, what the agent before had asked for.
    if here.stale.is_some() {
        return;
    }
    let (Some(moving), Some(record)) = (&here.moving, here.memory) else { return };
    let asks = here.qemu.is_some()
        && matches!(
            record.holding,
            Holding::Source(_, SourceRecord::Offered | SourceRecord::Returned)
                | Holding::Destination(_, Taken::Prepared | Taken::Activated)
        );
    let asks =
        asks || (here.qemu.is_some() && steps.world.postcopy && matches!(record.holding, Holding::Destination(_, Taken::Running)));
    if asks {
        let vcpus = here.qemu.map_or(Vcpus::Other, |qemu| qemu.vcpus);
        steps.add(Step::LooksAtStatus(host), |after| after.hosts[usize::from(host)].doing = Doing::Seen(vcpus));
        if record.holding == Holding::Destination(0, Taken::Prepared) || record.holding == Holding::Destination(1, Taken::Prepared)
        {
            steps.fault(Fault::QemuHangs(host), |after| decide(model, after, host, None, true));
        }
    } else {
        steps.add(Step::Decides(host), |after| decide(model, after, host, None, true));
    }
    match (moving, record.holding) {
        (Moving::Source(_, moving), Holding::Source(_, SourceRecord::Offered)) => {
            let passed = match moving.machine.stopped() {
                Some(stopped) => stopped.get() + LATE[1],
                None => LATE[0],
            };
            if moving.clock < passed && moving.machine.giving_up().is_none() {
                steps.add(Step::LimitPasses(host), |after| {
                    if let Some(Moving::Source(_, moving)) = &mut after.hosts[usize::from(host)].moving {
                        moving.clock = passed;
                    }
                });
            }
        }
        (Moving::Destination(number, moving), Holding::Destination(_, Taken::Prepared)) => {
            let number = usize::from(*number);
            if moving.released && moving.clock < 2 * LATE[2] {
                steps.add(Step::LimitPasses(host), |after| {
                    if let Some(Moving::Destination(_, moving)) = &mut after.hosts[usize::from(host)].moving {
                        moving.clock += LATE[2];
                    }
                });
            } else if !moving.released && !steps.world.moves[number].expired {
                steps.add(Step::LimitPasses(host), |after| after.moves[number].expired = true);
            }
        }
        _ => {}
    }
}

/// Facts that arrive here and change something.
fn arrivals(model: &HandOver, steps: &mut Steps<'_>, host: u8) {
    for number in 0..steps.world.moves.len() as u8 {
        let going = steps.world.moves[usize::from(number)];
        for fact in EVERY_FACT {
            let to = if fact.is_for_destination() { going.destination } else { going.source };
            if to == host && going.said[fact as usize] {
                steps.add(Step::Arrives(number, fact), |after| arrive(model, after, host, number, fact));
            }
        }
    }
}

fn arrive(model: &HandOver, world: &mut World, host: u8, number: u8, fact: Fact) {
    let here = &mut world.hosts[usize::from(host)];
    let may_settle = matches!(here.memory, Some(Record { holding: Holding::Destination(_, Taken::Running | Taken::Declined), .. }));
    match &mut here.moving {
        Some(Moving::Source(of, moving)) if *of == number => match fact {
            Fact::Declined => moving.declined = true,
            Fact::Running => moving.running = true,
            Fact::Whole => (moving.running, moving.whole) = (true, true),
            _ => {}
        },
        Some(Moving::Destination(of, moving)) if *of == number => match fact {
            Fact::Released => moving.released = true,
            Fact::Aborted => moving.aborted = true,
            Fact::Lost => moving.lost = true,
            Fact::Settled if may_settle => moving.settled = true,
            _ => {}
        },
        _ if model.wrong == Wrong::AnswersNothingOfThePast => {}
        _ => {
            let held = here.memory.map_or(0, |record| record.generation);
            let ran = held.max(here.ran) >= generation(number);
            match fact {
                Fact::Released | Fact::Lost if ran => world.say(number, Fact::Whole),
                Fact::Released => world.say(number, Fact::Declined),
                Fact::Running | Fact::Whole | Fact::Declined => world.say(number, Fact::Settled),
                Fact::Aborted | Fact::Lost | Fact::Settled => {}
            }
        }
    }
}

fn stale(world: &mut World, host: u8, carried_out: bool) {
    let Some(command) = world.hosts[usize::from(host)].stale.take() else { return };
    if carried_out {
        command_qemu(world, host, command);
    }
    // The monitor closes what was passed to it when its session ends.
    if let Some(qemu) = &mut world.hosts[usize::from(host)].qemu {
        qemu.descriptor = false;
    }
}

fn restart(world: &mut World, host: u8) {
    let moving = match world.hosts[usize::from(host)].disk.map(|record| record.holding) {
        Some(Holding::Source(number, _)) => Some(new_source(world, number)),
        Some(Holding::Destination(number, _)) => {
            let source_given_up = world.hosts[usize::from(host)].ran >= generation(number);
            Some(Moving::Destination(number, DestinationMove { source_given_up, ..destination_move() }))
        }
        Some(Holding::Owner) | None => None,
    };
    let here = &mut world.hosts[usize::from(host)];
    here.up = true;
    here.memory = here.disk;
    here.moving = moving;
    // A QEMU that no record names was never continued, and is ended.
    if here.disk.is_none() {
        here.qemu = None;
    }
    // Nobody is left who knows whether QEMU had been told to run.
    if let Some(Record { holding: Holding::Destination(number, Taken::Activated), .. }) = here.disk {
        world.vm_crashed |= here.qemu.is_none();
        world.moves[usize::from(number)].past.told = true;
    }
}

/// Looks at the rest and decides. `status` is what `query-status` said, if it was asked and answered.
fn decide(model: &HandOver, world: &mut World, host: u8, status: Option<Vcpus>, fits: bool) {
    let place = usize::from(host);
    world.hosts[place].doing = Doing::Idle;
    let qemu = world.hosts[place].qemu;
    if status.is_some() && qemu.is_none() {
        // It died between the two questions: looked at again.
        return;
    }
    let seen = qemu.zip(status).map(|(qemu, vcpus)| QemuView {
        vcpus,
        migration: qemu.migration,
        remaining: Bytes(0),
        dirty_rate: fits.then_some(BytesPerSec(1)),
        since_sync: Millis(0),
        rounds: 1,
    });
    let Some(record) = world.hosts[place].memory else { return };
    match (world.hosts[place].moving.clone(), record.holding) {
        (Some(Moving::Source(number, moving)), Holding::Source(_, record)) => {
            decide_source(model, world, host, (number, moving), record, seen);
        }
        (Some(Moving::Destination(number, moving)), Holding::Destination(_, taken)) => {
            // Without post-copy all memory came before.
            let whole = taken == Taken::Running && !world.postcopy;
            let unknown = qemu.map(|_| QemuView {
                vcpus: Vcpus::InMigrate,
                migration: if whole { QemuMigration::Completed } else { QemuMigration::Unknown },
                remaining: Bytes(0),
                dirty_rate: None,
                since_sync: Millis(0),
                rounds: 1,
            });
            decide_destination(model, world, host, (number, moving), taken, seen.or(unknown));
        }
        _ => {}
    }
}

fn decide_source(
    model: &HandOver,
    world: &mut World,
    host: u8,
    (number, mut moving): (u8, SourceMove),
    record: SourceRecord,
    qemu: Option<QemuView>,
) {
    let wire = world.moves[usize::from(number)].wire;
    let mut view = SourceView {
        now: Millis(moving.clock),
        unix_now: UnixMillis(0),
        qemu,
        carry: CarryView {
            // After the switch connections are made anew.
            usable: matches!(wire, Wire::Connected) || record == SourceRecord::Released,
            connected: wire == Wire::Connected,
            rate: BytesPerSec(1 << 20),
            queued: Millis(0),
            unanswered: Millis(0),
            round_trip: Millis(0),
            stalled: Millis(0),
            can_leave: true,
            leaving: true,
        },
        disks: DisksView::NONE,
        silent: Millis(0),
        declined: moving.declined.then(reason),
        running: moving.running,
        whole: moving.whole,
        port: 0,
        next_port: None,
        memory_gone: world.hosts[usize::from(host)].qemu.is_none(),
        cancel: moving.cancel,
    };
    spoil_source(model.wrong, record, &mut view);
    let action = moving.machine.decide(record, &view);
    world.hosts[usize::from(host)].moving = Some(Moving::Source(number, moving));
    let doing = match action {
        SourceAction::Wait(_) => Doing::Idle,
        SourceAction::Tell(message, _) => {
            world.say(number, fact(&message));
            Doing::Idle
        }
        SourceAction::Migrate => Doing::Told(Command::Migrate),
        // Nothing that could go wrong comes of it.
        SourceAction::Leave | SourceAction::Throttle | SourceAction::FinishDisks | SourceAction::GoOn(_) => Doing::Idle,
        SourceAction::Stop => Doing::Told(Command::Stop),
        SourceAction::ContinueSwitchOver => Doing::Told(Command::Continue),
        SourceAction::CancelQemu => Doing::Told(Command::Cancel),
        SourceAction::ContinueVm => Doing::Told(Command::Cont),
        SourceAction::Record(next) => {
            if model.wrong == Wrong::SaysReleaseEarly && next == SourceRecord::Released {
                world.say(number, Fact::Released);
            }
            Doing::WritesSource(next)
        }
        SourceAction::End(outcome) => Doing::Ends(outcome == Outcome::Moved, Ending::Keep),
    };
    world.hosts[usize::from(host)].doing = doing;
}

/// What the deliberately wrong variants see instead.
fn spoil_source(wrong: Wrong, record: SourceRecord, view: &mut SourceView) {
    match (wrong, record, &mut view.qemu) {
        (Wrong::TakesSilenceForDeclined, SourceRecord::Released, _) if !view.running => view.declined = Some(reason()),
        (Wrong::RemovesAfterRelease, SourceRecord::Released, _) => view.running = true,
        (Wrong::KeepsNothingBack, SourceRecord::Released, _) => view.whole |= view.running,
        (Wrong::TakesQemusStopForOurs | Wrong::ReleasesWithoutProvenStop, SourceRecord::Offered, Some(qemu)) => {
            if qemu.vcpus == Vcpus::FinishMigrate && qemu.migration == QemuMigration::PreSwitchover {
                qemu.vcpus = Vcpus::Paused;
            }
            if wrong == Wrong::ReleasesWithoutProvenStop && qemu.migration == QemuMigration::Device {
                qemu.vcpus = Vcpus::PostMigrate;
                qemu.migration = QemuMigration::Completed;
            }
        }
        _ => {}
    }
}

fn decide_destination(
    model: &HandOver,
    world: &mut World,
    host: u8,
    (number, mut moving): (u8, DestinationMove),
    taken: Taken,
    qemu: Option<QemuView>,
) {
    let record = match taken {
        Taken::Prepared => DestinationRecord::Prepared,
        Taken::Activated => DestinationRecord::Activated,
        Taken::Running => DestinationRecord::Running,
        Taken::Declined => DestinationRecord::Declined { reason: reason() },
    };
    let expired = world.moves[usize::from(number)].expired;
    let mut view = DestinationView {
        now: Millis(moving.clock),
        unix_now: if expired { EXPIRES } else { UnixMillis(0) },
        qemu,
        released: moving.released,
        aborted: moving.aborted.then(reason),
        carry: ArrivingCarry { usable: true, connected: true, again: false, port: 0, has_section: true },
        lost: moving.lost,
        settled: moving.settled,
        source_given_up: moving.source_given_up,
        cont_refused: moving.cont_refused.then(reason),
        announced: moving.announced,
    };
    let loaded = view.qemu.as_ref().is_some_and(|seen| qemu::has_loaded(seen.migration) && seen.vcpus == Vcpus::Paused);
    view.released |= model.wrong == Wrong::RunsWithoutRelease && loaded;
    let action = moving.machine.decide(&record, &view);
    let mut doing = Doing::Idle;
    match action {
        DestinationAction::Wait(_) | DestinationAction::GoOn | DestinationAction::Recover => {}
        DestinationAction::Tell(message, _) => world.say(number, fact(&message)),
        DestinationAction::Announce => moving.announced = true,
        DestinationAction::ContinueVm => {
            world.moves[usize::from(number)].past.told = true;
            doing = Doing::Told(Command::Cont);
        }
        DestinationAction::EndQemu => doing = Doing::EndsQemu,
        DestinationAction::Record(next) => {
            doing = Doing::WritesDestination(match next {
                DestinationRecord::Prepared => Taken::Prepared,
                DestinationRecord::Activated => Taken::Activated,
                DestinationRecord::Running => Taken::Running,
                DestinationRecord::Declined { .. } => Taken::Declined,
            });
            if model.wrong == Wrong::RunsBeforeDurable && next == DestinationRecord::Activated {
                command_qemu(world, host, Command::Cont);
            }
        }
        DestinationAction::End(outcome) => doing = Doing::Ends(outcome == Outcome::Moved, Ending::RaiseFloor),
    }
    if doing == Doing::WritesDestination(Taken::Declined) {
        // As `Actor::publish`.
        if record.is_for_good() || (model.wrong == Wrong::ClaimsWhatItMayDecline && taken == Taken::Activated) {
            world.breaks(rules::NOT_CLAIMED_IN_VAIN);
        }
        if model.wrong == Wrong::SaysDeclinedEarly {
            world.say(number, Fact::Declined);
        }
        if model.wrong == Wrong::TakesDeathForCrash && taken == Taken::Activated && !moving.cont_refused {
            doing = Doing::WritesDestination(Taken::Running);
        }
    }
    let here = &mut world.hosts[usize::from(host)];
    here.moving = Some(Moving::Destination(number, moving));
    here.doing = doing;
}

fn fact(message: &PeerMessage) -> Fact {
    match message {
        PeerMessage::Cut { .. } | PeerMessage::GoOn { .. } => unreachable!("connections are made anew without being asked for"),
        PeerMessage::Prepared => unreachable!("no machine says it"),
        PeerMessage::Released => Fact::Released,
        PeerMessage::Aborted { .. } => Fact::Aborted,
        PeerMessage::Running { .. } => Fact::Running,
        PeerMessage::Whole { .. } => Fact::Whole,
        PeerMessage::Lost => Fact::Lost,
        PeerMessage::Declined { .. } => Fact::Declined,
        PeerMessage::Settled => Fact::Settled,
    }
}

/// Carries out what is decided, or the next part of it.
fn act(model: &HandOver, world: &mut World, host: u8) {
    let place = usize::from(host);
    let doing = std::mem::take(&mut world.hosts[place].doing);
    match doing {
        Doing::Idle | Doing::Seen(_) => {}
        Doing::Told(Command::Stop) if model.held => {
            let ran = world.hosts[place].qemu.is_some_and(|qemu| qemu.vcpus == Vcpus::Running);
            world.hosts[place].doing = Doing::Stopping(ran);
        }
        Doing::Told(Command::Stop) => stop(world, host, false),
        Doing::Stopping(ran) => stop(world, host, ran),
        Doing::Stopped(ran) => stopped(model, world, host, ran),
        Doing::Told(command) => {
            let taken = command_qemu(world, host, command);
            match &mut world.hosts[place].moving {
                Some(Moving::Source(_, moving)) if command == Command::Migrate && !taken => moving.machine.on_refused(reason()),
                Some(Moving::Destination(_, moving)) if taken => moving.machine.on_continued(Millis(moving.clock)),
                _ => {}
            }
        }
        Doing::WritesSource(next) => {
            let after = with_source(world.hosts[place].memory, next);
            world.hosts[place].memory = after;
            write(world, host, after);
        }
        Doing::WritesDestination(next) => {
            let after = with_destination(world.hosts[place].memory, next);
            world.hosts[place].memory = after;
            write(world, host, after);
        }
        Doing::EndsQemu => end_qemu(world, host),
        Doing::Ends(moved, ending) => end(model, world, host, moved, ending),
    }
}

fn stop(world: &mut World, host: u8, ran: bool) {
    if command_qemu(world, host, Command::Stop) {
        world.hosts[usize::from(host)].doing = Doing::Stopped(ran);
    }
}

fn stopped(model: &HandOver, world: &mut World, host: u8, ran: bool) {
    let here = &mut world.hosts[usize::from(host)];
    let (Some(qemu), Some(Moving::Source(_, moving))) = (here.qemu, &mut here.moving) else { return };
    if qemu.vcpus == Vcpus::Paused || (model.held && ran && qemu.vcpus != Vcpus::Running) {
        moving.machine.on_stopped(Millis(moving.clock));
    }
}

/// Whether QEMU did as told.
pub(super) fn command_qemu(world: &mut World, host: u8, command: Command) -> bool {
    let done = qemu::tell(world, host, command);
    if command == Command::Cont && done {
        rules::on_continued(world, host);
    }
    done
}

pub(super) fn with_source(record: Option<Record>, next: SourceRecord) -> Option<Record> {
    record.map(|record| match record.holding {
        Holding::Source(number, _) => Record { holding: Holding::Source(number, next), ..record },
        _ => record,
    })
}

pub(super) fn with_destination(record: Option<Record>, next: Taken) -> Option<Record> {
    record.map(|record| match record.holding {
        Holding::Destination(number, _) => {
            let generation = if next == Taken::Activated { generation(number) } else { record.generation };
            Record { generation, holding: Holding::Destination(number, next) }
        }
        _ => record,
    })
}

/// Makes a record durable.
pub(super) fn write(world: &mut World, host: u8, record: Option<Record>) {
    world.hosts[usize::from(host)].disk = record;
    rules::on_written(world, host);
}

fn end_qemu(world: &mut World, host: u8) {
    rules::on_qemu_ended(world, host);
    if let Some(qemu) = world.hosts[usize::from(host)].qemu.take() {
        world.cut(qemu.of);
    }
}

/// The next part of an end.
fn end(model: &HandOver, world: &mut World, host: u8, moved: bool, ending: Ending) {
    let place = usize::from(host);
    let (number, is_source) = match &world.hosts[place].moving {
        Some(Moving::Source(number, _)) => (*number, true),
        Some(Moving::Destination(number, _)) => (*number, false),
        None => return,
    };
    // A destination keeps the end last of the two: with it the controller may be through.
    let (after_keep, after_floor) = if is_source { (Ending::RaiseFloor, Ending::Tell) } else { (Ending::Tell, Ending::Keep) };
    world.hosts[place].doing = match ending {
        Ending::Keep => {
            keep_end(world, host, moved);
            Doing::Ends(moved, after_keep)
        }
        Ending::RaiseFloor => {
            if model.wrong != Wrong::KeepsNoFloor {
                raise_floor(world, host, moved);
            }
            if model.wrong != Wrong::ForgetsThatItRan {
                keep_that_it_ran(world, host, moved);
            }
            Doing::Ends(moved, after_floor)
        }
        Ending::Tell => {
            if is_source {
                world.say(number, if moved { Fact::Settled } else { Fact::Aborted });
            }
            world.cut(number);
            let next = if is_source && moved { Ending::EndQemu } else { Ending::Forget };
            Doing::Ends(moved, next)
        }
        Ending::EndQemu => {
            end_qemu(world, host);
            Doing::Ends(moved, Ending::Forget)
        }
        Ending::Forget => {
            forget(world, host, moved, true);
            Doing::Idle
        }
    };
}

/// Keeps how the move ended; the first word stands.
pub(super) fn keep_end(world: &mut World, host: u8, moved: bool) {
    let place = usize::from(host);
    let Some(Moving::Source(number, _) | Moving::Destination(number, _)) = world.hosts[place].moving else { return };
    let kept = &mut world.hosts[place].ended[usize::from(number)];
    kept.get_or_insert(moved);
    rules::on_end_kept(world, host, number, moved);
}

/// A generation that leaves this host, or was declined here, is not taken up again.
pub(super) fn raise_floor(world: &mut World, host: u8, moved: bool) {
    let here = &mut world.hosts[usize::from(host)];
    match here.moving {
        Some(Moving::Source(number, _)) if moved => here.floor = here.floor.max(generation(number)),
        Some(Moving::Destination(number, _)) if !moved => here.floor = here.floor.max(generation(number)),
        _ => {}
    }
}

/// Whoever does not know that a move has ended will ask, whatever has become of the VM by then.
pub(super) fn keep_that_it_ran(world: &mut World, host: u8, moved: bool) {
    let here = &mut world.hosts[usize::from(host)];
    match &here.moving {
        Some(Moving::Destination(number, moving)) if moved && !moving.settled => here.ran = here.ran.max(generation(*number)),
        _ => {}
    }
}

/// The last part of an end: forgets the VM, or owns it. A write that fails is only logged.
pub(super) fn forget(world: &mut World, host: u8, moved: bool, written: bool) {
    let here = &mut world.hosts[usize::from(host)];
    let goes = match here.moving.take() {
        Some(Moving::Source(..)) => moved,
        Some(Moving::Destination(..)) => !moved,
        None => return,
    };
    let after = if goes { None } else { here.memory.map(|record| Record { holding: Holding::Owner, ..record }) };
    here.memory = after;
    if written {
        write(world, host, after);
    }
}
