//! The controller: one task after the other, each from its grant to its end; and what arrives of it at the hosts.

use godwit_migration::{QemuMigration, SourceRecord, Vcpus};

use super::agent::{new_destination, new_source, write};
use super::{
    Doing, Fault, HandOver, Holding, Move, Moving, Order, Qemu, Record, Route, Stage, Step, Steps, Taken, Wire, World, generation,
};

pub(super) fn steps(model: &HandOver, steps: &mut Steps<'_>) {
    for number in 0..model.moves() as u8 {
        arrivals(steps, number);
    }
    if !steps.world.controller_up {
        steps.add(Step::Controller(Order::Returns), |after| after.controller_up = true);
        return;
    }
    let number = steps.world.current;
    let going = steps.world.moves[usize::from(number)];
    match going.stage {
        Stage::NotYet => {}
        Stage::Prepare => {
            command(
                steps,
                Order::Prepare,
                going.destination,
                |after| prepare(after, number),
                |going, taken| match taken {
                    true => going.stage = Stage::MoveOut,
                    false => give_up(going),
                },
            );
        }
        Stage::MoveOut => {
            command(
                steps,
                Order::MoveOut,
                going.source,
                |after| move_out(after, number),
                |going, taken| match taken {
                    true => going.stage = Stage::Moving,
                    false => give_up(going),
                },
            );
        }
        Stage::Moving => {
            if let Some(moved) = going.source_ended {
                steps.add(Step::Controller(Order::Finish), |after| {
                    let going = &mut after.moves[usize::from(number)];
                    going.settle |= !moved && going.destination_ended.is_none();
                    going.stage = Stage::Done;
                });
                return ends(steps);
            }
            if !going.cancel {
                steps.fault(Fault::Cancelled, |after| after.moves[usize::from(number)].cancel = true);
            }
            give_source_up(steps, number);
        }
        Stage::Done => {
            if usize::from(number) + 1 < model.moves() {
                steps.add(Step::Controller(Order::Next), |after| next_move(model, after, number));
            }
            reports(steps);
        }
    }
    ends(steps);
}

/// A source that is silent may be so for ever, or for as long as everything else takes.
fn give_source_up(steps: &mut Steps<'_>, number: u8) {
    let going = steps.world.moves[usize::from(number)];
    let there = &steps.world.hosts[usize::from(going.destination)];
    let runs = there.up && there.memory.is_some_and(|record| record.holding == Holding::Destination(number, Taken::Running));
    if runs && !going.source_given_up {
        steps.add(Step::Controller(Order::GiveSourceUp), |after| after.moves[usize::from(number)].source_given_up = true);
    }
    if going.source_given_up && going.destination_ended == Some(true) {
        steps.add(Step::Controller(Order::Finish), |after| after.moves[usize::from(number)].stage = Stage::Done);
    }
}

/// A command is repeated until its answer has arrived; agents carry commands out one after the other.
fn command(
    steps: &mut Steps<'_>,
    order: Order,
    host: u8,
    carry_out: impl Fn(&mut World) -> bool,
    answered: impl Fn(&mut Move, bool),
) {
    let here = &steps.world.hosts[usize::from(host)];
    if !here.up || here.doing != Doing::Idle {
        return;
    }
    let current = usize::from(steps.world.current);
    steps.add(Step::Controller(order), |after| {
        let taken = carry_out(after);
        answered(&mut after.moves[current], taken);
    });
    steps.fault(Fault::AnswerLost, |after| {
        carry_out(after);
    });
}

fn give_up(going: &mut Move) {
    going.settle = true;
    going.stage = Stage::Done;
}

/// As `Actor::prepare`.
fn prepare(world: &mut World, number: u8) -> bool {
    let host = world.moves[usize::from(number)].destination;
    let wire = world.moves[usize::from(number)].wire;
    let here = &mut world.hosts[usize::from(host)];
    match here.memory {
        Some(Record { holding: Holding::Destination(of, Taken::Prepared), .. }) if of == number && wire != Wire::Cut => {
            return true;
        }
        Some(Record { holding: Holding::Owner, generation: held }) if here.qemu.is_none() && held < generation(number) => {}
        Some(_) => return false,
        None => {}
    }
    if here.floor >= generation(number) || world.moves[usize::from(number)].expired {
        return false;
    }
    let record = Some(Record { generation: 0, holding: Holding::Destination(number, Taken::Prepared) });
    here.memory = record;
    here.moving = Some(new_destination(number));
    here.qemu =
        Some(Qemu { vcpus: Vcpus::InMigrate, migration: QemuMigration::None, of: number, resumes: false, descriptor: false });
    let going = &mut world.moves[usize::from(number)];
    going.wire = Wire::Listening;
    going.whole = false;
    write(world, host, record);
    true
}

/// As `Actor::migrate`.
fn move_out(world: &mut World, number: u8) -> bool {
    let going = world.moves[usize::from(number)];
    let here = &mut world.hosts[usize::from(going.source)];
    if matches!(&here.moving, Some(Moving::Source(of, _)) if *of == number) || here.ended[usize::from(number)].is_some() {
        return true;
    }
    let Some(record) = here.memory else { return false };
    let Some(qemu) = &mut here.qemu else { return false };
    let owned = record.holding == Holding::Owner && record.generation < generation(number) && here.floor < generation(number);
    // A monitor that is not open yet answers nothing.
    if !owned || qemu.vcpus != Vcpus::Running || here.stale.is_some() {
        return false;
    }
    qemu.of = number;
    qemu.descriptor = true;
    let record = Some(Record { holding: Holding::Source(number, SourceRecord::Offered), ..record });
    here.memory = record;
    let moving = new_source(world, number);
    world.hosts[usize::from(going.source)].moving = Some(moving);
    let wire = &mut world.moves[usize::from(number)].wire;
    *wire = if *wire == Wire::Listening { Wire::Connected } else { Wire::Cut };
    write(world, going.source, record);
    true
}

/// What the controller has said and may arrive at any time.
fn arrivals(steps: &mut Steps<'_>, number: u8) {
    let going = steps.world.moves[usize::from(number)];
    let idle = |host: u8| {
        let here = &steps.world.hosts[usize::from(host)];
        here.up && here.doing == Doing::Idle
    };
    let (to_destination, to_source) = (idle(going.destination), idle(going.source));
    // It is said as long as the task lasts.
    if going.source_given_up && to_destination && going.stage == Stage::Moving {
        steps.add(Step::Controller(Order::GiveSourceUp), |after| {
            let destination = &mut after.hosts[usize::from(going.destination)];
            let arrived = matches!(destination.memory, Some(Record { holding: Holding::Destination(_, Taken::Running), .. }));
            if let Some(Moving::Destination(of, moving)) = &mut destination.moving
                && *of == number
            {
                moving.source_given_up |= arrived;
            }
        });
    }
    if going.settle && to_destination {
        steps.add(Step::Controller(Order::Settle(number)), |after| {
            let destination = &mut after.hosts[usize::from(going.destination)];
            if let Some(Moving::Destination(of, moving)) = &mut destination.moving
                && *of == number
            {
                moving.aborted = true;
            }
        });
    }
    if going.cancel && to_source {
        steps.add(Step::Controller(Order::Cancel(number)), |after| {
            let source = &mut after.hosts[usize::from(going.source)];
            let offered = matches!(source.memory, Some(Record { holding: Holding::Source(_, SourceRecord::Offered), .. }));
            if let Some(Moving::Source(of, moving)) = &mut source.moving
                && *of == number
                && offered
            {
                moving.cancel = true;
            }
        });
    }
}

/// Ends that hosts repeat until they are stored.
fn ends(steps: &mut Steps<'_>) {
    for (place, here) in steps.world.hosts.iter().enumerate() {
        if !here.up {
            continue;
        }
        for (number, ended) in here.ended.iter().enumerate() {
            let Some(moved) = *ended else { continue };
            steps.add(Step::Controller(Order::Ended(place as u8)), |after| store_end(after, place, number, moved, true));
            steps.fault(Fault::AckLost(place as u8), |after| store_end(after, place, number, moved, false));
        }
    }
}

/// As `Reports::store_ended`.
fn store_end(world: &mut World, place: usize, number: usize, moved: bool, acknowledged: bool) {
    let going = &mut world.moves[number];
    let is_source = usize::from(going.source) == place;
    if !is_source && moved && going.source_ended == Some(false) {
        return;
    }
    let side = if is_source { &mut going.source_ended } else { &mut going.destination_ended };
    if going.stage != Stage::Done {
        side.get_or_insert(moved);
    }
    if acknowledged {
        world.hosts[place].ended[number] = None;
    }
}

/// A host that still waits for a move whose task is over is told so.
fn reports(steps: &mut Steps<'_>) {
    for number in 0..=steps.world.current {
        let going = steps.world.moves[usize::from(number)];
        let here = &steps.world.hosts[usize::from(going.destination)];
        let waits = here.memory.is_some_and(|record| {
            record.holding == Holding::Destination(number, Taken::Prepared)
                || record.holding == Holding::Destination(number, Taken::Declined)
        });
        if here.up && waits && going.stage == Stage::Done && !going.settle {
            steps.add(Step::Controller(Order::Settle(number)), |after| after.moves[usize::from(number)].settle = true);
        }
    }
}

/// Where the VM is as far as the controller knows.
pub(super) fn owner(world: &World) -> u8 {
    let going = world.moves[usize::from(world.current)];
    let moved = going.source_ended == Some(true) || going.destination_ended == Some(true);
    if going.stage == Stage::Done && moved { going.destination } else { going.source }
}

fn next_move(model: &HandOver, world: &mut World, number: u8) {
    let source = owner(world);
    let destination = match (model.route, source) {
        (Route::Onward, _) => 2,
        (_, 0) => 1,
        _ => 0,
    };
    world.current = number + 1;
    let next = &mut world.moves[usize::from(number) + 1];
    (next.source, next.destination, next.stage) = (source, destination, Stage::Prepare);
}
