//! What may go wrong, as often as a run's faults allow.

use godwit_migration::SourceRecord;

use super::agent::{forget, keep_end, keep_that_it_ran, raise_floor, with_destination, with_source, write};
use super::{Doing, EVERY_FACT, Ending, Fault, HOSTS, Holding, Record, Steps, Taken, Wire, World};

pub(super) fn steps(steps: &mut Steps<'_>) {
    for host in 0..HOSTS as u8 {
        agent(steps, host);
        power(steps, host);
        if steps.world.hosts[usize::from(host)].qemu.is_some() {
            steps.fault(Fault::QemuDies(host), |after| qemu_dies(after, host));
        }
        journal(steps, host);
    }
    for number in 0..=steps.world.current {
        let going = &steps.world.moves[usize::from(number)];
        if matches!(going.wire, Wire::Listening | Wire::Connected) {
            steps.fault(Fault::Cut(number), |after| after.cut(number));
        }
        for fact in EVERY_FACT {
            if going.said[fact as usize] {
                steps.fault(Fault::Lost(number, fact), |after| after.moves[usize::from(number)].said[fact as usize] = false);
            }
        }
    }
    if steps.world.controller_up {
        steps.fault(Fault::ControllerAway, |after| after.controller_up = false);
    }
}

/// An agent dies. Commands and writes that it was in the middle of are lost, or come to pass.
fn agent(steps: &mut Steps<'_>, host: u8) {
    let here = &steps.world.hosts[usize::from(host)];
    // An agent that holds nothing loses nothing: it is merely late.
    if !here.up || (here.memory.is_none() && here.disk.is_none()) {
        return;
    }
    steps.fault(Fault::AgentDies(host), |after| dies(after, host, false));
    if matches!(here.doing, Doing::Told(_) | Doing::Stopping(_) | Doing::WritesSource(_) | Doing::WritesDestination(_)) {
        steps.fault(Fault::AgentDiesTooLate(host), |after| dies(after, host, true));
    }
}

fn dies(world: &mut World, host: u8, too_late: bool) {
    let here = &mut world.hosts[usize::from(host)];
    let doing = std::mem::take(&mut here.doing);
    if let Some(qemu) = &mut here.qemu
        && !too_late
    {
        qemu.descriptor = false;
    }
    if too_late {
        match doing {
            Doing::Told(command) => here.stale = Some(command),
            Doing::Stopping(_) => here.stale = Some(super::Command::Stop),
            _ => {
                if let Some(qemu) = &mut here.qemu {
                    qemu.descriptor = false;
                }
                comes_to_pass(world, host, doing);
            }
        }
    }
    let here = &mut world.hosts[usize::from(host)];
    here.up = false;
    here.memory = None;
    here.moving = None;
}

/// A write that the agent no longer heard the end of.
fn comes_to_pass(world: &mut World, host: u8, doing: Doing) {
    let disk = world.hosts[usize::from(host)].disk;
    match doing {
        Doing::WritesSource(next) => write(world, host, with_source(disk, next)),
        Doing::WritesDestination(next) => write(world, host, with_destination(disk, next)),
        _ => {}
    }
}

fn power(steps: &mut Steps<'_>, host: u8) {
    let here = &steps.world.hosts[usize::from(host)];
    if here.qemu.is_none() {
        // Nothing is lost that an agent's death does not lose, but for the wire, which can be cut.
        return;
    }
    steps.fault(Fault::Power(host), |after| {
        qemu_dies(after, host);
        dies(after, host, false);
    });
    if matches!(here.doing, Doing::WritesSource(_) | Doing::WritesDestination(_)) {
        steps.fault(Fault::PowerAfterWrite(host), |after| {
            let doing = after.hosts[usize::from(host)].doing;
            comes_to_pass(after, host, doing);
            qemu_dies(after, host);
            dies(after, host, false);
        });
    }
}

fn qemu_dies(world: &mut World, host: u8) {
    let here = &mut world.hosts[usize::from(host)];
    here.stale = None;
    let Some(qemu) = here.qemu.take() else { return };
    // What a destination has loaded and not been told to run is a copy. A source that has not returned may still hand its VM over: see the rules.
    let told = world.moves[usize::from(qemu.of)].past.told;
    let owned = |record: Option<Record>| match record.map(|record| record.holding) {
        Some(Holding::Owner | Holding::Destination(_, Taken::Running)) => true,
        Some(Holding::Destination(_, Taken::Activated)) => told,
        Some(Holding::Source(..) | Holding::Destination(..)) | None => false,
    };
    world.vm_crashed |= owned(here.disk) || owned(here.memory);
    // With its source's QEMU a VM loses the memory that was left, and before the release itself.
    let going = world.moves[usize::from(qemu.of)];
    let there = world.hosts[usize::from(going.destination)].qemu;
    world.vm_crashed |= going.source == host && there.is_some_and(|there| there.of == qemu.of && there.migration.needs_pages());
    world.cut(qemu.of);
}

/// Writes that fail: the file is as before, or, if only its directory could not be synced, as wanted.
fn journal(steps: &mut Steps<'_>, host: u8) {
    let place = usize::from(host);
    let here = &steps.world.hosts[place];
    match here.doing {
        Doing::WritesSource(next) => {
            let fail = |after: &mut World, holds: bool| {
                let here = &mut after.hosts[place];
                here.doing = Doing::Idle;
                let wanted = with_source(here.memory, next);
                // To own it again is safe even if only this process knows.
                if next == SourceRecord::Returned {
                    here.memory = wanted;
                }
                if holds {
                    write(after, host, wanted);
                }
            };
            steps.fault(Fault::WriteFails(host), |after| fail(after, false));
            steps.fault(Fault::WriteHolds(host), |after| fail(after, true));
        }
        Doing::WritesDestination(next) => {
            let fail = |after: &mut World, holds: bool| {
                let here = &mut after.hosts[place];
                here.doing = Doing::Idle;
                let wanted = with_destination(here.memory, next);
                if holds {
                    write(after, host, wanted);
                }
            };
            steps.fault(Fault::WriteFails(host), |after| fail(after, false));
            steps.fault(Fault::WriteHolds(host), |after| fail(after, true));
        }
        Doing::Ends(moved, Ending::Keep) => {
            steps.fault(Fault::WriteFails(host), |after| after.hosts[place].doing = Doing::Idle);
            steps.fault(Fault::WriteHolds(host), |after| {
                keep_end(after, host, moved);
                after.hosts[place].doing = Doing::Idle;
            });
        }
        Doing::Ends(moved, Ending::RaiseFloor) => {
            steps.fault(Fault::WriteFails(host), |after| after.hosts[place].doing = Doing::Idle);
            steps.fault(Fault::WriteHolds(host), |after| {
                raise_floor(after, host, moved);
                keep_that_it_ran(after, host, moved);
                after.hosts[place].doing = Doing::Idle;
            });
        }
        Doing::Ends(moved, Ending::Forget) => {
            steps.fault(Fault::WriteFails(host), |after| {
                after.hosts[place].doing = Doing::Idle;
                forget(after, host, moved, false);
            });
        }
        _ => {}
    }
}
