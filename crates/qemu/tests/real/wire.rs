//! A migration's connection through a relay of ours, which can swallow the destination's answers and be cut.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use godwit_model::{BytesPerSec, Millis};
use godwit_qemu::qmp::commands::MigrationParameters;

use crate::place::Vm;

/// Fast enough that QEMU never waits for it.
pub(crate) const FULL_SPEED: BytesPerSec = BytesPerSec(10 << 30);

/// Both sockets of the relay; closed when dropped.
pub(crate) struct Wire {
    ends: [UnixStream; 2],
    answers: Arc<AtomicBool>,
}

impl Wire {
    /// From now on nothing from the destination reaches the source.
    pub(crate) fn swallow_answers(&self) {
        self.answers.store(false, Ordering::SeqCst);
    }

    /// Closes both connections.
    pub(crate) fn cut(&self) {
        for end in &self.ends {
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.cut();
    }
}

fn copy(mut from: UnixStream, mut to: UnixStream, open: Arc<AtomicBool>) {
    std::thread::spawn(move || {
        let mut piece = vec![0; 64 << 10];
        while let Ok(length @ 1..) = from.read(&mut piece) {
            if open.load(Ordering::SeqCst) && to.write_all(&piece[..length]).is_err() {
                break;
            }
        }
        if open.load(Ordering::SeqCst) {
            let _ = to.shutdown(Shutdown::Both);
        }
    });
}

/// Whether QEMU has a capability.
pub(crate) async fn has(vm: &Vm, capability: &str) -> bool {
    vm.qmp.query_migrate_capabilities().await.expect("capabilities").iter().any(|known| known.capability == capability)
}

/// Sets both ends up as Godwit does and begins; `held` keeps QEMU from switching over while the VM runs, where QEMU can do that.
pub(crate) async fn begin(source: &Vm, destination: &Vm, held: bool, speed: BytesPerSec) -> Wire {
    let mut at_destination = vec![("return-path", true), ("events", true)];
    if has(destination, "late-block-activate").await {
        at_destination.push(("late-block-activate", true));
    }
    let mut at_source = vec![("return-path", true), ("events", true), ("pause-before-switchover", true)];
    if held {
        at_source.push(("switchover-ack", true));
    }
    destination.qmp.set_migration_capabilities(&at_destination).await.expect("the destination's capabilities");
    source.qmp.set_migration_capabilities(&at_source).await.expect("the source's capabilities");
    set_speed(source, speed).await;
    let (far, into) = UnixStream::pair().expect("sockets");
    let wire = join(source, far, "out").await;
    destination.qmp.getfd("in", OwnedFd::from(into)).await.expect("getfd");
    destination.qmp.migrate_incoming_fd("in").await.expect("migrate-incoming");
    source.qmp.migrate_fd("out").await.expect("migrate");
    wire
}

/// A relay from the source, which knows it as `name`, to who holds the other end of `far`.
pub(crate) async fn join(source: &Vm, far: UnixStream, name: &str) -> Wire {
    let (out, near) = UnixStream::pair().expect("sockets");
    let wire = Wire { ends: [near, far], answers: Arc::new(AtomicBool::new(true)) };
    let end = |index: usize| wire.ends[index].try_clone().expect("a socket");
    copy(end(0), end(1), Arc::new(AtomicBool::new(true)));
    copy(end(1), end(0), Arc::clone(&wire.answers));
    source.qmp.getfd(name, OwnedFd::from(out)).await.expect("getfd");
    wire
}

pub(crate) async fn set_speed(source: &Vm, speed: BytesPerSec) {
    let parameters =
        MigrationParameters { max_bandwidth: Some(speed), downtime_limit: Some(Millis(1)), ..MigrationParameters::default() };
    source.qmp.set_migration_parameters(parameters).await.expect("parameters");
}
