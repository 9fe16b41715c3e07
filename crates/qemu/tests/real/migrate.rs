//! Moving a VM between QEMUs of the same and of different versions, with its disks.

use godwit_model::{Bytes, DiskFormat};
use godwit_qemu::qmp::commands::StoppedBy;
use godwit_qemu::qmp::views::{MigrationStatus, RunStatus};
use godwit_qemu::{QmpError, Start};

use crate::place::{LIMIT, Place, launch, pairs, spec, wait_migration, wait_run_status};
use crate::wire::{FULL_SPEED, begin, has};

#[tokio::test]
async fn a_booted_vm_moves_between_versions_and_takes_its_image_locks_along() {
    for (from, to) in pairs() {
        let way = format!("{} -> {}", from.display(), to.display());
        let place = Place::new();
        let disks = [place.qcow2_disk("a"), place.raw_disk("b", Bytes::mib(16))];
        let spec = spec("pc-q35-7.2", &[DiskFormat::Qcow2, DiskFormat::Raw]);
        let source = launch(&place, &from, &spec, &disks, Start::Fresh).await;
        source.boot().await;
        let destination = launch(&place, &to, &spec, &disks, Start::Incoming).await;
        assert_eq!(destination.run_status().await, RunStatus::InMigrate);
        let blocked = source.qmp.query_migrate().await.expect("migration").blocked_reasons;
        assert!(blocked.is_empty(), "{blocked:?}");
        let mut notices = source.qmp.listen();
        let held = has(&source, "switchover-ack").await;
        let _wire = begin(&source, &destination, held, FULL_SPEED).await;
        let stopped = source.qmp.stop_first(held, LIMIT).await.expect("stop");
        assert_eq!(stopped, StoppedBy::Us, "{way}");
        wait_migration(&mut notices, &MigrationStatus::PreSwitchover).await;
        assert!(matches!(destination.qmp.cont().await, Err(QmpError::NotLoaded)), "QEMU would start by itself once loaded");
        source.qmp.migrate_continue().await.expect("continue");
        wait_migration(&mut notices, &MigrationStatus::Completed).await;
        assert_eq!(destination.run_status().await, RunStatus::Paused, "{way}");
        destination.qmp.cont().await.expect("cont");
        assert_eq!(destination.run_status().await, RunStatus::Running, "{way}");
        wait_run_status(&source, &[RunStatus::PostMigrate]).await;
        let refused = source.qmp.cont().await.expect_err("the destination holds the images");
        assert!(refused.refused().is_some_and(|failure| failure.description.contains("lock")), "{way}: {refused}");
        source.qmp.quit().await.expect("quit");
        source.process.exited().await;
        assert_eq!(destination.run_status().await, RunStatus::Running, "{way}");
        assert!(destination.log().is_empty(), "{way}: {}", destination.log());
    }
}
