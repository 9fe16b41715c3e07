//! What must be so in every state, and what a good end is.

use godwit_migration::{SourceRecord, Vcpus};

use super::{Doing, HandOver, Holding, Moving, Record, Stage, Taken, World, controller, qemu};

/// Counting every QEMU, whoever let it run.
pub const ONE_RUNNER: &str = "at most one QEMU runs the VM";
/// Counting what is on disk, and what an agent goes by that could not write it.
pub const ONE_OWNER: &str = "at most one journal allows to run the VM";
/// A source that runs on after the destination has loaded makes what is loaded worthless.
pub const NOT_OUTDATED: &str = "memory that is older than the disks never runs";
/// Neither journal nor memory of the destination leads to its running the VM.
pub const NOT_AFTER_RELEASE: &str = "a released VM is continued at the source only if the destination can never run it";
/// The source's QEMU is ended only then.
pub const NOTHING_REMOVED: &str = "nothing is removed before the other side is proven to run";
/// Nor does it end its QEMU.
pub const NOT_DECLINED_AFTER_RUN: &str = "a destination that has run the VM does not decline it";
/// The controller would have it there, and not hear its source any more.
pub const NOT_CLAIMED_IN_VAIN: &str = "a host that has told the controller that it owns the VM does not decline it";
/// As they keep it for the controller.
pub const ONE_OUTCOME: &str = "both sides agree about the outcome";

fn runs(world: &World, host: usize) -> bool {
    world.hosts[host].qemu.is_some_and(|qemu| qemu.vcpus == Vcpus::Running)
}

const fn allows(record: Option<Record>) -> bool {
    match record {
        Some(Record { holding: Holding::Owner, .. }) => true,
        Some(Record { holding: Holding::Source(_, record), .. }) => {
            matches!(record, SourceRecord::Offered | SourceRecord::Returned)
        }
        Some(Record { holding: Holding::Destination(_, taken), .. }) => matches!(taken, Taken::Activated | Taken::Running),
        None => false,
    }
}

/// Looks at a state that has just been reached.
pub(super) fn look(world: &mut World) {
    if (0..world.hosts.len()).filter(|host| runs(world, *host)).count() > 1 {
        world.breaks(ONE_RUNNER);
    }
    // The journal, and what an agent goes by that could not write it.
    if world.hosts.iter().filter(|here| allows(here.disk) || allows(here.memory)).count() > 1 {
        world.breaks(ONE_OWNER);
    }
    // What has returned to a QEMU that is dead has crashed.
    let returned =
        |record: Option<Record>| record.is_some_and(|record| matches!(record.holding, Holding::Source(_, SourceRecord::Returned)));
    world.vm_crashed |= world.hosts.iter().any(|here| here.qemu.is_none() && returned(here.memory));
    for number in 0..=world.current {
        let going = world.moves[usize::from(number)];
        let loaded = world.hosts[usize::from(going.destination)].qemu;
        let loaded = loaded.is_some_and(|qemu| qemu.of == number && qemu::has_loaded(qemu.migration));
        let source = world.hosts[usize::from(going.source)].qemu;
        let source_runs = source.is_some_and(|qemu| qemu.of == number && qemu.vcpus == Vcpus::Running);
        let past = &mut world.moves[usize::from(number)].past;
        past.outdated |= loaded && source_runs && !past.ran;
        if past.outdated && past.ran {
            world.breaks(NOT_OUTDATED);
        }
    }
    for host in 0..world.hosts.len() {
        if runs(world, host) {
            not_after_release(world, host);
        }
    }
}

/// A QEMU that runs where the VM was released must be the last that can.
fn not_after_release(world: &mut World, host: usize) {
    let here = &world.hosts[host];
    let Some(qemu) = here.qemu else { return };
    let number = usize::from(qemu.of);
    let going = world.moves[number];
    if usize::from(going.source) != host || !going.past.released {
        return;
    }
    let there = &world.hosts[usize::from(going.destination)];
    let may_run = |record: Option<Record>| {
        record.is_some_and(|record| match record.holding {
            Holding::Destination(of, taken) => usize::from(of) == number && taken != Taken::Declined,
            Holding::Owner | Holding::Source(..) => false,
        })
    };
    if going.past.ran || may_run(there.disk) || may_run(there.memory) {
        world.breaks(NOT_AFTER_RELEASE);
    }
}

/// An agent's `cont` was carried out.
pub(super) fn on_continued(world: &mut World, host: u8) {
    let Some(qemu) = world.hosts[usize::from(host)].qemu else { return };
    let going = &mut world.moves[usize::from(qemu.of)];
    if going.destination == host && going.stage != Stage::NotYet {
        going.past.ran = true;
    }
}

/// A record is durable.
pub(super) fn on_written(world: &mut World, host: u8) {
    let Some(record) = world.hosts[usize::from(host)].disk else { return };
    match record.holding {
        Holding::Source(number, SourceRecord::Released) => world.moves[usize::from(number)].past.released = true,
        Holding::Destination(number, Taken::Declined) if world.moves[usize::from(number)].past.ran => {
            world.breaks(NOT_DECLINED_AFTER_RUN)
        }
        _ => {}
    }
}

/// An agent ends its QEMU.
pub(super) fn on_qemu_ended(world: &mut World, host: u8) {
    let here = &world.hosts[usize::from(host)];
    match &here.moving {
        Some(Moving::Source(number, _)) => {
            // A destination whose QEMU died after it took the VM over has run it, or the VM has crashed.
            let going = world.moves[usize::from(*number)];
            let there = world.hosts[usize::from(going.destination)].qemu;
            let needs_more = there.is_some_and(|qemu| qemu.of == *number && qemu.migration.needs_pages());
            if !(world.vm_crashed || (going.past.ran && !needs_more)) {
                world.breaks(NOTHING_REMOVED);
            }
        }
        // One whose memory is lost has crashed.
        Some(Moving::Destination(number, moving))
            if world.moves[usize::from(*number)].past.ran && !(moving.lost && world.vm_crashed) =>
        {
            world.breaks(NOT_DECLINED_AFTER_RUN)
        }
        _ => {}
    }
}

/// A side has kept how the move ended.
pub(super) fn on_end_kept(world: &mut World, host: u8, number: u8, moved: bool) {
    let going = &mut world.moves[usize::from(number)];
    let side = if going.source == host { &mut going.past.source } else { &mut going.past.destination };
    side.get_or_insert(moved);
    if let (Some(source), Some(destination)) = (going.past.source, going.past.destination)
        && source != destination
    {
        world.breaks(ONE_OUTCOME);
    }
}

/// Everything has been done and said, one host owns the VM and runs it, and the controller knows which.
pub(super) fn is_good_end(model: &HandOver, world: &World) -> bool {
    let all_done = usize::from(world.current) + 1 == model.moves() && world.moves[usize::from(world.current)].stage == Stage::Done;
    let quiet = world.hosts.iter().all(|here| {
        here.up && here.doing == Doing::Idle && here.moving.is_none() && here.stale.is_none() && here.ended == [None; super::MOVES]
    });
    if !all_done || !quiet || !world.controller_up {
        return false;
    }
    let owner = usize::from(controller::owner(world));
    let owned = world.hosts.iter().enumerate().all(|(host, here)| match here.memory {
        Some(record) => host == owner && record.holding == Holding::Owner,
        None => host != owner && here.qemu.is_none(),
    });
    owned && (world.vm_crashed || runs(world, owner))
}
