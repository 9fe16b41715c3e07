//! What QEMUs do by themselves and when told, as measured on 7.2 and 10.0. What matters most: a source that QEMU itself stopped runs on by itself
//! when its migration fails, one that we stopped does not; and a source has completed only after the destination's closing message.

use godwit_migration::{QemuMigration, Vcpus};

use super::{Command, HandOver, Qemu, Step, Steps, Wire, World};

pub(super) fn steps(model: &HandOver, steps: &mut Steps<'_>, host: u8) {
    let place = usize::from(host);
    let world = steps.world;
    let Some(qemu) = world.hosts[place].qemu else { return };
    let going = world.moves[usize::from(qemu.of)];
    let cut = going.wire == Wire::Cut;
    let mut goes_on = |change: fn(&mut Qemu)| {
        steps.add(Step::Qemu(host), |after| {
            if let Some(qemu) = &mut after.hosts[place].qemu {
                change(qemu);
            }
        });
    };
    match (qemu.vcpus, qemu.migration) {
        // A destination.
        (Vcpus::InMigrate, _) if going.whole => {
            let loaded = if world.postcopy { QemuMigration::PostCopy } else { QemuMigration::Completed };
            steps.add(Step::Qemu(host), |after| {
                if let Some(qemu) = &mut after.hosts[place].qemu {
                    (qemu.migration, qemu.vcpus) = (loaded, Vcpus::Paused);
                }
            });
        }
        // What was left comes as long as it is at the source; connections are made anew.
        (_, QemuMigration::PostCopy) => {
            let source = world.hosts[usize::from(going.source)].qemu;
            if source.is_some_and(|source| source.of == qemu.of) {
                steps.add(Step::LastPage(qemu.of), |after| {
                    if let Some(qemu) = &mut after.hosts[place].qemu {
                        qemu.migration = QemuMigration::Completed;
                    }
                });
            }
        }
        (Vcpus::InMigrate, _) if cut => steps.add(Step::Qemu(host), |after| after.hosts[place].qemu = None),
        (Vcpus::InMigrate, _) => {}
        // A source: our stop, or its own, leads to `finish-migrate`, and that to the gate.
        (_, QemuMigration::Active) if cut => goes_on(|qemu| qemu.migration = QemuMigration::Failed),
        (Vcpus::Paused, QemuMigration::Active) => goes_on(|qemu| {
            qemu.resumes = false;
            qemu.vcpus = Vcpus::FinishMigrate;
        }),
        (Vcpus::Running, QemuMigration::Active) if !model.held => steps.add(Step::QemuIsFirst(host), |after| {
            if let Some(qemu) = &mut after.hosts[place].qemu {
                qemu.resumes = true;
                qemu.vcpus = Vcpus::FinishMigrate;
            }
        }),
        (Vcpus::FinishMigrate, QemuMigration::Active) => goes_on(|qemu| qemu.migration = QemuMigration::PreSwitchover),
        (_, QemuMigration::PreSwitchover | QemuMigration::Device) if cut => goes_on(|qemu| qemu.migration = QemuMigration::Failed),
        (_, QemuMigration::Device) => {
            let loaded = world.hosts[usize::from(going.destination)].qemu;
            let loaded = loaded.is_some_and(|other| other.of == qemu.of && has_loaded(other.migration));
            if loaded {
                goes_on(|qemu| qemu.migration = QemuMigration::Completed);
            } else if !going.whole {
                steps.add(Step::LastByte(qemu.of), |after| after.moves[usize::from(qemu.of)].whole = true);
            }
        }
        (_, QemuMigration::Cancelling) => steps.add(Step::Qemu(host), |after| {
            if let Some(qemu) = &mut after.hosts[place].qemu {
                qemu.migration = QemuMigration::Cancelled;
            }
            after.cut(qemu.of);
        }),
        // The run state lags behind the status.
        (Vcpus::FinishMigrate, QemuMigration::Completed) => goes_on(|qemu| qemu.vcpus = Vcpus::PostMigrate),
        (Vcpus::FinishMigrate, QemuMigration::Failed | QemuMigration::Cancelled) => {
            steps.add(Step::Qemu(host), |after| comes_to_nothing(model, after, host));
        }
        _ => {}
    }
}

/// Whether a destination has the devices' state.
pub(super) const fn has_loaded(migration: QemuMigration) -> bool {
    matches!(migration, QemuMigration::Completed | QemuMigration::PostCopy)
}

fn comes_to_nothing(model: &HandOver, world: &mut World, host: u8) {
    let Some(qemu) = &mut world.hosts[usize::from(host)].qemu else { return };
    qemu.vcpus = match (qemu.resumes, model.held) {
        (true, _) => Vcpus::Running,
        (false, true) => Vcpus::Paused,
        (false, false) => Vcpus::PostMigrate,
    };
}

/// Whether QEMU does as told.
pub(super) fn tell(world: &mut World, host: u8, command: Command) -> bool {
    let Some(qemu) = &mut world.hosts[usize::from(host)].qemu else { return false };
    let under_way = !qemu.migration.is_over() && qemu.migration != QemuMigration::None;
    match command {
        Command::Migrate if qemu.descriptor && !under_way => {
            qemu.descriptor = false;
            qemu.resumes = false;
            qemu.migration = QemuMigration::Active;
            true
        }
        Command::Migrate => false,
        Command::Stop => {
            // In `finish-migrate` QEMU answers success and changes nothing.
            if qemu.vcpus == Vcpus::Running {
                qemu.vcpus = Vcpus::Paused;
            }
            true
        }
        Command::Continue if qemu.migration == QemuMigration::PreSwitchover => {
            qemu.migration = QemuMigration::Device;
            true
        }
        Command::Continue => false,
        Command::Cancel => {
            if under_way && qemu.vcpus != Vcpus::InMigrate {
                qemu.migration = QemuMigration::Cancelling;
            }
            true
        }
        Command::Cont if matches!(qemu.vcpus, Vcpus::Paused | Vcpus::PostMigrate | Vcpus::Running) => {
            qemu.vcpus = Vcpus::Running;
            true
        }
        Command::Cont => false,
    }
}
