//! Who switches over, QEMU or we, and who runs after a failure: the facts under "our stop, our release, our start".

use std::path::Path;
use std::time::Duration;

use godwit_model::{BytesPerSec, DiskFormat};
use godwit_qemu::qmp::commands::StoppedBy;
use godwit_qemu::qmp::views::{Known, MigrationStatus, RunStatus};
use godwit_qemu::{Notice, Start};

use crate::place::{LIMIT, Place, Vm, launch, pairs, qemus, spec, wait_event, wait_migration, wait_run_status};
use crate::wire::{FULL_SPEED, begin, has, set_speed};

/// So slow that QEMU is still in its first pass when our `stop` comes.
const SLOW: BytesPerSec = BytesPerSec(100 << 10);

/// A source with an idle guest (firmware that finds nothing to boot) and its destination, with one shared disk.
async fn idle(place: &Place, from: &Path, to: &Path) -> (Vm, Vm) {
    let disk = [place.qcow2_disk("disk")];
    let mut spec = spec("pc-q35-7.2", &[DiskFormat::Qcow2]);
    (spec.kernel, spec.initrd, spec.cmdline) = (None, None, String::new());
    let source = launch(place, from, &spec, &disk, Start::Fresh).await;
    source.qmp.cont().await.expect("cont");
    let destination = launch(place, to, &spec, &disk, Start::Incoming).await;
    (source, destination)
}

#[tokio::test]
async fn with_switchover_ack_at_the_source_alone_qemu_waits_for_our_stop() {
    for (from, to) in pairs() {
        let place = Place::new();
        let (source, destination) = idle(&place, &from, &to).await;
        if !has(&source, "switchover-ack").await {
            continue;
        }
        let mut notices = source.qmp.listen();
        let _wire = begin(&source, &destination, true, FULL_SPEED).await;
        // An idle guest has nothing left to send after the first pass; QEMU would be done at once if it were free to.
        let mut passes = 0;
        while passes < 3_000 {
            match notices.next().await {
                Notice::Event(event) => match event.known() {
                    Known::MigrationPass(_) => passes += 1,
                    Known::Migration(MigrationStatus::Setup | MigrationStatus::Active) => {}
                    other => panic!("{other:?}"),
                },
                Notice::Missed(missed) => passes += missed,
                Notice::Ended(reason) => panic!("{reason}"),
            }
        }
        assert_eq!(source.migration_status().await, MigrationStatus::Active);
        assert_eq!(source.run_status().await, RunStatus::Running);
        let mut notices = source.qmp.listen();
        assert_eq!(source.qmp.stop_first(true, LIMIT).await.expect("stop"), StoppedBy::Us);
        wait_migration(&mut notices, &MigrationStatus::PreSwitchover).await;
        source.qmp.migrate_continue().await.expect("continue");
        wait_migration(&mut notices, &MigrationStatus::Completed).await;
        destination.qmp.cont().await.expect("cont");
        assert_eq!(destination.run_status().await, RunStatus::Running);
    }
}

#[tokio::test]
async fn a_dirty_rate_that_was_asked_for_is_there_once_waited_for() {
    for binary in qemus() {
        let place = Place::new();
        let (source, _destination) = idle(&place, &binary, &binary).await;
        // Twice: the second is not answered with the first one's.
        for _ in 0..2 {
            source.qmp.calc_dirty_rate(1).await.expect("calc-dirty-rate");
            assert_eq!(source.qmp.wait_for_dirty_rate(Duration::ZERO).await.expect("query"), None);
            let rate = source.qmp.wait_for_dirty_rate(LIMIT).await.expect("wait").expect("a rate within the limit");
            assert!(rate < 100, "{rate} MiB/s of a guest that does nothing");
        }
    }
}

#[tokio::test]
async fn without_it_qemu_can_be_first_and_a_cancel_undoes_that() {
    for binary in qemus() {
        let place = Place::new();
        let (source, destination) = idle(&place, &binary, &binary).await;
        let mut notices = source.qmp.listen();
        let _wire = begin(&source, &destination, false, FULL_SPEED).await;
        wait_migration(&mut notices, &MigrationStatus::PreSwitchover).await;
        // Our stop comes too late, is accepted, changes nothing, and is not taken for a proof.
        let stopped = source.qmp.stop_first(false, LIMIT).await.expect("stop");
        assert_eq!(stopped, StoppedBy::Unproven(RunStatus::FinishMigrate));
        let mut notices = source.qmp.listen();
        source.qmp.migrate_cancel().await.expect("cancel");
        wait_migration(&mut notices, &MigrationStatus::Cancelled).await;
        wait_run_status(&source, &[RunStatus::Running]).await;
        // A destination that loses its connection before it is loaded ends by itself.
        tokio::time::timeout(LIMIT, destination.process.exited()).await.expect("the destination ends");
    }
}

/// Begins, stops first or lets QEMU be first, and passes `pre-switchover`.
async fn switch_over(source: &Vm, destination: &Vm, stop: bool) -> crate::wire::Wire {
    let mut notices = source.qmp.listen();
    let wire = begin(source, destination, false, if stop { SLOW } else { FULL_SPEED }).await;
    if stop {
        assert_eq!(source.qmp.stop_first(false, LIMIT).await.expect("stop"), StoppedBy::Us);
        set_speed(source, FULL_SPEED).await;
    }
    wait_migration(&mut notices, &MigrationStatus::PreSwitchover).await;
    // Nothing in QEMU's status tells any more who was first.
    assert_eq!(source.run_status().await, RunStatus::FinishMigrate);
    wire
}

#[tokio::test]
async fn after_our_stop_a_lost_answer_leaves_the_source_stopped_and_without_it_qemu_resumes() {
    for binary in qemus() {
        for stop in [true, false] {
            let place = Place::new();
            let (source, destination) = idle(&place, &binary, &binary).await;
            let wire = switch_over(&source, &destination, stop).await;
            wire.swallow_answers();
            let (mut notices, mut loaded) = (source.qmp.listen(), destination.qmp.listen());
            source.qmp.migrate_continue().await.expect("continue");
            wait_migration(&mut loaded, &MigrationStatus::Completed).await;
            assert_eq!(destination.run_status().await, RunStatus::Paused);
            assert_eq!(source.migration_status().await, MigrationStatus::Device);
            let early = source.qmp.cont().await.expect_err("not while the answer may still come");
            assert!(early.refused().is_some_and(|failure| failure.description.contains("not finalized")), "{early}");
            wire.cut();
            wait_migration(&mut notices, &MigrationStatus::Failed).await;
            if stop {
                wait_run_status(&source, &[RunStatus::Paused, RunStatus::PostMigrate]).await;
                source.qmp.cont().await.expect("we, and only we, let it run on");
            } else {
                wait_event(&mut notices, &Known::Resume).await;
            }
            wait_run_status(&source, &[RunStatus::Running]).await;
            let refused = destination.qmp.cont().await.expect_err("the source holds the image");
            assert!(refused.refused().is_some_and(|failure| failure.description.contains("lock")), "{refused}");
            assert_eq!(destination.run_status().await, RunStatus::Paused);
        }
    }
}

#[tokio::test]
async fn a_completed_source_runs_again_if_told_so_and_then_keeps_the_destination_out() {
    for binary in qemus() {
        let place = Place::new();
        let (source, destination) = idle(&place, &binary, &binary).await;
        let _wire = switch_over(&source, &destination, true).await;
        let mut notices = source.qmp.listen();
        source.qmp.migrate_continue().await.expect("continue");
        wait_migration(&mut notices, &MigrationStatus::Completed).await;
        wait_run_status(&source, &[RunStatus::PostMigrate]).await;
        assert_eq!(destination.run_status().await, RunStatus::Paused);
        source.qmp.cont().await.expect("QEMU does as it is told: only the grant says who may");
        assert_eq!(source.run_status().await, RunStatus::Running);
        destination.qmp.cont().await.expect_err("the source holds the image");
    }
}
