//! Memory that comes after the switch, when its connection breaks while QEMU itself waits for a page.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use godwit_model::BytesPerSec;
use godwit_qemu::qmp::views::{MigrationStatus, RunStatus};
use godwit_qemu::{QmpError, Start};
use serde_json::{Value, json};

use crate::place::{LIMIT, Place, Vm, launch, pairs, spec, wait_run_status};
use crate::wire::{FULL_SPEED, begin, join, set_speed};

/// So slow that most of the memory is still to come at the switch.
const CRAWL: BytesPerSec = BytesPerSec(200_000);
const SPARE: &str = "spare";

async fn wait_status(vm: &Vm, wanted: &MigrationStatus) {
    let waits = async {
        while vm.qmp.query_migrate().await.expect("query-migrate").status() != *wanted {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LIMIT, waits).await.unwrap_or_else(|_| panic!("never {wanted:?}"));
}

#[tokio::test]
async fn a_qemu_whose_main_loop_waits_for_a_page_takes_another_connection_out_of_band() {
    // QEMU 7.2 knows no other way to userfaultfd than the system call, and these are not root's.
    std::fs::write("/proc/sys/vm/unprivileged_userfaultfd", "1").expect("this test is root's");
    for (from, to) in pairs() {
        let way = format!("{} -> {}", from.display(), to.display());
        let place = Place::new();
        let mut spec = spec("pc-q35-7.2", &[]);
        spec.cmdline.push_str(" nokaslr");
        let source = launch(&place, &from, &spec, &[], Start::Fresh).await;
        source.boot().await;
        let destination = launch(&place, &to, &spec, &[], Start::Incoming).await;
        for vm in [&destination, &source] {
            vm.qmp.set_migration_capabilities(&[("postcopy-ram", true)]).await.expect("post-copy");
        }
        let wire = begin(&source, &destination, false, CRAWL).await;
        source.qmp.execute("migrate-start-postcopy", Value::Null).await.expect("post-copy");
        wait_status(&source, &MigrationStatus::PreSwitchover).await;
        source.qmp.migrate_continue().await.expect("continue");
        wait_status(&destination, &MigrationStatus::PostcopyActive).await;
        wait_run_status(&destination, &[RunStatus::Paused]).await;

        let (ours, qemus) = UnixStream::pair().expect("sockets");
        destination.qmp.getfd(SPARE, OwnedFd::from(qemus)).await.expect("getfd");
        wire.cut();
        wait_status(&source, &MigrationStatus::PostcopyPaused).await;
        // Of the guest's kernel, which has not come: read in the main loop.
        let reads = tokio::spawn({
            let qmp = destination.qmp.clone();
            let read = json!({"command-line": "xp /131072gx 0x1600000"});
            async move { qmp.execute_within("human-monitor-command", read, LIMIT).await }
        });
        // It is on its way.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let silence = destination.qmp.execute_within("query-status", Value::Null, Duration::from_secs(3)).await;
        assert!(matches!(silence, Err(QmpError::TimedOut { .. })), "{way}: {silence:?}");

        destination.qmp.migrate_recover_fd(SPARE).await.expect("it is heard all the same");
        set_speed(&source, FULL_SPEED).await;
        let _wire = join(&source, ours, "out-again").await;
        source.qmp.execute("migrate", json!({"uri": "fd:out-again", "resume": true})).await.expect("resumed");
        reads.await.expect("no panic").expect("the page has come");
        wait_status(&destination, &MigrationStatus::Completed).await;
        destination.qmp.cont().await.expect("cont");
        assert_eq!(destination.run_status().await, RunStatus::Running, "{way}");
    }
}
