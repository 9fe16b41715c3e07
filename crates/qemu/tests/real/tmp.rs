//! x
use crate::place::*; use crate::wire::*; use godwit_qemu::Start; use godwit_model::*;
use godwit_qemu::qmp::views::*; use godwit_qemu::Notice;
#[tokio::test]
async fn tmp_reliability() {
    for binary in qemus() {
        let place = Place::new();
        let spec = spec("pc-q35-7.2", &[]);
        let source = launch(&place, &binary, &spec, &[], Start::Fresh).await;
        source.boot().await;
        let held = has(&source, "switchover-ack").await;
        let mut seen = vec![];
        for round in 0..16 {
            let destination = launch(&place, &binary, &spec, &[], Start::Incoming).await;
            let mut n = source.qmp.listen();
            let wire = begin(&source, &destination, held, FULL_SPEED).await;
            if round % 2 == 1 { loop { match n.next().await { Notice::Event(e) if matches!(e.known(), Known::MigrationPass(p) if p >= 2) => break, Notice::Missed(_) => break, Notice::Ended(r) => panic!("{r}"), _ => {} } } }
            let s = source.qmp.stop_first(held, LIMIT).await.expect("stop");
            let after = source.run_status().await;
            let mut n = source.qmp.listen();
            source.qmp.migrate_cancel().await.expect("cancel");
            wait_migration(&mut n, &MigrationStatus::Cancelled).await;
            let st = loop { let s = source.run_status().await; if s != RunStatus::FinishMigrate { break s } };
            seen.push(format!("{} {s:?}/{after}->{st}", round % 2));
            if st != RunStatus::Running { source.qmp.cont().await.expect("cont"); }
            drop(wire);
        }
        eprintln!("{} held={held}: {seen:#?}", binary.display());
    }
}
#[tokio::test]
async fn tmp_late() {
    for (from, to) in pairs() {
        let place = Place::new();
        let disk = [place.qcow2_disk("disk")];
        let mut spec = spec("pc-q35-7.2", &[DiskFormat::Qcow2]);
        (spec.kernel, spec.initrd, spec.cmdline) = (None, None, String::new());
        let source = launch(&place, &from, &spec, &disk, Start::Fresh).await;
        source.qmp.cont().await.expect("cont");
        let destination = launch(&place, &to, &spec, &disk, Start::Incoming).await;
        let known = has(&destination, "late-block-activate").await;
        let (a, b) = std::os::unix::net::UnixStream::pair().expect("p");
        let (c, d) = std::os::unix::net::UnixStream::pair().expect("p");
        for vm in [&source, &destination] { vm.qmp.set_migration_capabilities(&[("return-path", true), ("events", true)]).await.expect("c"); }
        source.qmp.set_migration_capabilities(&[("pause-before-switchover", true)]).await.expect("c");
        set_speed(&source, FULL_SPEED).await;
        source.qmp.getfd("out", a.into()).await.expect("g");
        destination.qmp.getfd("in", d.into()).await.expect("g");
        destination.qmp.migrate_incoming_fd("in").await.expect("g");
        let (mut b1, mut c1, b2) = (b.try_clone().expect("x"), c.try_clone().expect("x"), b.try_clone().expect("x"));
        std::thread::spawn(move || { let _ = std::io::copy(&mut b1, &mut c1); });
        let mut n = source.qmp.listen(); let mut m = destination.qmp.listen();
        source.qmp.migrate_fd("out").await.expect("m");
        wait_migration(&mut n, &MigrationStatus::PreSwitchover).await;
        source.qmp.migrate_continue().await.expect("c");
        wait_migration(&mut m, &MigrationStatus::Completed).await;
        eprintln!("{} -> {} late known={known} not set: dest {} src {} dest block {:?}", from.display(), to.display(), destination.run_status().await, source.run_status().await, destination.qmp.query_block().await.expect("b")[0].inserted);
        let _ = b2.shutdown(std::net::Shutdown::Both);
        wait_migration(&mut n, &MigrationStatus::Failed).await;
        let st = loop { let s = source.run_status().await; if s != RunStatus::FinishMigrate { break s } };
        eprintln!("   failed: src {st} cont {:?} log {}", source.qmp.cont().await, source.log());
        eprintln!("   dest cont {:?} {} {}", destination.qmp.cont().await, destination.run_status().await, destination.log());
        eprintln!("   src {}", source.run_status().await);
    }
}
#[tokio::test]
async fn tmp_ten() {
    let binary = &qemus()[1];
    let place = Place::new();
    let disk = [place.qcow2_disk("disk")];
    let spec = spec("pc-q35-10.0", &[DiskFormat::Qcow2]);
    let source = launch(&place, binary, &spec, &disk, Start::Fresh).await;
    source.boot().await;
    let destination = launch(&place, binary, &spec, &disk, Start::Incoming).await;
    let mut n = source.qmp.listen();
    let _w = begin(&source, &destination, true, FULL_SPEED).await;
    source.qmp.stop_first(true, LIMIT).await.expect("stop");
    wait_migration(&mut n, &MigrationStatus::PreSwitchover).await;
    source.qmp.migrate_continue().await.expect("c");
    wait_migration(&mut n, &MigrationStatus::Completed).await;
    destination.qmp.cont().await.expect("cont");
    eprintln!("10.0 {} {} {}", destination.run_status().await, source.log(), destination.log());
}
