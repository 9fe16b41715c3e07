//! The process itself: reads its configuration, connects, pumps, and answers the agent until it is told to quit, or has been without an agent
//! for long after everything is over.

use std::io::Read;
use std::net::TcpListener as StdTcpListener;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use godwit_carrier::{Decoder, Identity};
use godwit_qemu::cage::relay::{self, RelayError};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::codec::{FramedRead, LinesCodec};

use super::connect;
use super::control::{CarryConfig, CarryStatus, FromCarry, MAX_LINE, Role, ToCarry};
use super::pump::{Ends, KeepAlive, Pump, Side};
use crate::tls::Material;

/// Time without any agent after which an orphan ends.
const ORPHAN: Duration = Duration::from_secs(600);
const PING_EVERY: Duration = Duration::from_secs(1);
const STATUS_EVERY: Duration = Duration::from_millis(100);

/// Why a carry did not begin.
#[derive(Debug, thiserror::Error)]
pub enum CarryError {
    /// The descriptor that should hold the configuration does not.
    #[error("the configuration cannot be read")]
    Config(#[source] std::io::Error),
    /// It could not give up its rights, and does not begin with them.
    #[error("it cannot be confined")]
    Confine(#[source] RelayError),
    /// A descriptor, or the runtime, cannot be used.
    #[error("a descriptor cannot be used")]
    Descriptor(#[source] std::io::Error),
}

/// Runs `godwit carry --config-fd N`: called before any thread or runtime exists.
///
/// # Errors
/// [`CarryError`] if it could not begin; what fails later is told to the agent.
pub fn run(config_fd: RawFd) -> Result<(), CarryError> {
    // The host's key is in this process: no core, no debugger of the same uid.
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    let mut text = Vec::new();
    std::fs::File::from(take(config_fd)).read_to_end(&mut text).map_err(CarryError::Config)?;
    let config: CarryConfig = serde_json::from_slice(&text).map_err(|error| CarryError::Config(error.into()))?;
    // The runtime makes its own descriptors while it may.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CarryError::Descriptor)?;
    confine(&config).map_err(CarryError::Confine)?;
    runtime.block_on(tokio::task::LocalSet::new().run_until(serve(config)))
}

/// Gives up all that moving bytes does not need, before the first byte from outside is looked at.
fn confine(config: &CarryConfig) -> Result<(), RelayError> {
    // The source of random numbers opens what it needs now, while it may.
    if let Some(crypto) = rustls::crypto::CryptoProvider::get_default() {
        let _ = crypto.secure_random.fill(&mut [0; 32]);
    }
    let dials = match &config.role {
        Role::Source { address, .. } => Some(address.port()),
        Role::Destination { .. } => None,
    };
    let confined = relay::confine(dials)?;
    tracing::info!(?confined, "confined");
    Ok(())
}

/// Takes over a descriptor that this process was started with.
#[expect(unsafe_code, reason = "a descriptor that was inherited has no owner yet")]
fn take(fd: RawFd) -> OwnedFd {
    // SAFETY: the agent passes each descriptor for this process alone, and each number is taken once.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

async fn serve(config: CarryConfig) -> Result<(), CarryError> {
    let control = StdUnixListener::from(take(config.control_fd));
    control.set_nonblocking(true).map_err(CarryError::Descriptor)?;
    let control = UnixListener::from_std(control).map_err(CarryError::Descriptor)?;
    let qemu = StdUnixStream::from(take(config.qemu_fd));
    qemu.set_nonblocking(true).map_err(CarryError::Descriptor)?;
    let qemu = UnixStream::from_std(qemu).map_err(CarryError::Descriptor)?;

    let (to_peer, from_agent) = mpsc::channel(64);
    let (to_agent, from_peer) = mpsc::channel(64);
    let status = Rc::new(watch::Sender::new(CarryStatus::default()));
    let mover = tokio::task::spawn_local(carry(config, qemu, from_agent, to_agent, Rc::clone(&status)));
    answer_agents(control, to_peer, from_peer, &status).await;
    mover.abort();
    Ok(())
}

/// Connects and pumps; whatever ends it stands in the status afterwards.
async fn carry(
    config: CarryConfig,
    qemu: UnixStream,
    from_agent: mpsc::Receiver<Bytes>,
    to_agent: mpsc::Sender<Bytes>,
    status: Rc<watch::Sender<CarryStatus>>,
) {
    let broken = match move_bytes(config, qemu, from_agent, to_agent, &status).await {
        Ok(never) => match never {},
        Err(reason) => reason,
    };
    tracing::info!(%broken, "the connection is over");
    status.send_modify(|status| {
        status.connected = false;
        status.broken = Some(broken);
    });
}

async fn move_bytes(
    config: CarryConfig,
    qemu: UnixStream,
    from_agent: mpsc::Receiver<Bytes>,
    to_agent: mpsc::Sender<Bytes>,
    status: &watch::Sender<CarryStatus>,
) -> Result<std::convert::Infallible, String> {
    let material = Material { certificate: config.certificate, key: config.key, authority: config.authority };
    let peer = connect::Expected { host: config.peer, keys: config.peer_keys };
    let wire = Arc::new(AtomicU64::new(0));
    let (side, bandwidth, connected) = match config.role {
        Role::Source { address, bandwidth } => {
            (Side::Source, bandwidth, connect::dial(address, &peer, &material, Arc::clone(&wire)).await)
        }
        Role::Destination { listen_fd } => {
            let listener = StdTcpListener::from(take(listen_fd));
            let listener = listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener));
            let listener = listener.map_err(|error| error.to_string())?;
            (Side::Destination, None, connect::accept(listener, &peer, &material, Arc::clone(&wire)).await)
        }
    };
    let mut connection = connected.map_err(|error| error.to_string())?;
    let identity =
        Identity { vm: *config.vm.uuid().as_bytes(), task: *config.task.uuid().as_bytes(), generation: config.generation.0 };
    let keep_alive = KeepAlive { every: PING_EVERY, silence: Duration::from_millis(config.silence.get()) };
    let (pump, queues) = Pump::new(side, identity, keep_alive, bandwidth, to_agent);
    let mut decoder = Decoder::default();
    tokio::time::timeout(Duration::from_secs(15), pump.greet(&mut connection, &mut decoder))
        .await
        .map_err(|_| "the peer did not greet".to_owned())?
        .map_err(|error| error.to_string())?;
    status.send_modify(|status| status.connected = true);
    let gauge = || {
        let gauge = pump.gauge();
        status.send_modify(|status| {
            status.wire_bytes = wire.load(Ordering::Relaxed);
            status.stream_bytes = gauge.stream_bytes;
            status.rate = gauge.rate;
            status.round_trip_us = u64::try_from(gauge.round_trip.as_micros()).unwrap_or(u64::MAX);
            status.stalled_ms = u64::try_from(gauge.stalled.as_millis()).unwrap_or(u64::MAX);
        });
    };
    let watch = async {
        let mut every = tokio::time::interval(STATUS_EVERY);
        loop {
            every.tick().await;
            gauge();
        }
    };
    let ends = Ends { connection, qemu, from_agent };
    let error = tokio::select! {
        error = pump.run(ends, queues, decoder) => error,
        () = watch => unreachable!("the watch never ends"),
    };
    gauge();
    Err(error.to_string())
}

/// Serves one agent after the other until one says quit or none has come for long.
async fn answer_agents(
    control: UnixListener,
    to_peer: mpsc::Sender<Bytes>,
    mut from_peer: mpsc::Receiver<Bytes>,
    status: &watch::Sender<CarryStatus>,
) {
    loop {
        let Ok(Ok((agent, _))) = tokio::time::timeout(ORPHAN, control.accept()).await else { return };
        if answer_agent(agent, &to_peer, &mut from_peer, status.subscribe()).await {
            return;
        }
    }
}

/// Whether the agent said quit, rather than being gone.
async fn answer_agent(
    agent: UnixStream,
    to_peer: &mpsc::Sender<Bytes>,
    from_peer: &mut mpsc::Receiver<Bytes>,
    mut status: watch::Receiver<CarryStatus>,
) -> bool {
    let (reader, mut writer) = agent.into_split();
    let mut lines = FramedRead::new(reader, LinesCodec::new_with_max_length(MAX_LINE));
    status.mark_changed();
    let mut told = Instant::now();
    loop {
        let say = tokio::select! {
            line = lines.next() => {
                let Some(Ok(line)) = line else { return false };
                match serde_json::from_str(&line) {
                    Ok(ToCarry::Peer(message)) => drop(to_peer.try_send(Bytes::from(message.get().to_owned()))),
                    Ok(ToCarry::Quit) => return true,
                    Err(_) => return false,
                }
                continue;
            }
            // Written anew: a line break inside the peer's JSON would break ours.
            Some(message) = from_peer.recv() => {
                let value = serde_json::from_slice::<serde_json::Value>(&message);
                match value.and_then(|value| serde_json::value::to_raw_value(&value)) {
                    Ok(message) => FromCarry::Peer(message),
                    Err(_) => continue,
                }
            }
            Ok(()) = status.changed() => {
                told = Instant::now();
                FromCarry::Status(status.borrow_and_update().clone())
            }
            () = tokio::time::sleep_until(told + Duration::from_secs(5)) => {
                told = Instant::now();
                FromCarry::Status(status.borrow().clone())
            }
        };
        let mut text = serde_json::to_vec(&say).expect("our own types serialise");
        text.push(b'\n');
        if writer.write_all(&text).await.is_err() {
            return false;
        }
    }
}
