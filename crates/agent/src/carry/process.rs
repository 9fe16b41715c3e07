//! The process itself: reads its configuration, connects, pumps, and answers the agent until it is told to quit, or has been without an agent
//! for long after everything is over.

use std::convert::Infallible;
use std::io::Read;
use std::net::TcpListener as StdTcpListener;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use godwit_carrier::frame::MAX_DATA;
use godwit_carrier::pages::{Digester, Encoding};
use godwit_carrier::{Frame, Identity, Image, Side};
use godwit_qemu::cage::relay::{self, RelayError};
use godwit_stream::postcopy::put_resume;
use godwit_stream::{ReturnError, ReturnMessage, ReturnReader, ReturnWriteError, ReturnWriter};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::OwnedReadHalf;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::codec::{FramedRead, LinesCodec};

use super::arrive::Arrival;
use super::connect::{self, Acceptor, Dialler};
use super::control::{
    CarryConfig, CarryStatus, FromCarry, ImageFd, IndexedImageFds, MAX_LINE, PageCounts, Placement, PostCopyStatus, Role, ToCarry,
};
use super::deal::{DealError, FromQemu, Listening};
use super::feed::{Feed, Heard, Holdings, Own};
use super::images::{OwnImage, ReadableImage};
use super::memory::ProcessMemory;
use super::pump::{ADVISED, Gauge, KeepAlive, Pump};
use super::seal::{Sealers, SealersError};
use super::{after, connections, deal, home};
use crate::tls::Material;

/// Time without any agent after which an orphan ends.
const ORPHAN: Duration = Duration::from_secs(600);
/// A connection that is silent for so long is dropped: dialling again is quicker than what the kernel repeats, and costs nothing.
const KEEP_ALIVE: KeepAlive = KeepAlive { every: Duration::from_secs(1), silence: Duration::from_secs(5) };
/// QEMU's answers are short.
const RETURN_READ: usize = 16 << 10;
/// Requests for pages that wait before no more is heard of QEMU: each of its threads can wait for one.
const MOST_ASKS: usize = 4096;
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
    /// The C library will not have one heap for all threads.
    #[error("the memory of all threads cannot be managed together")]
    Heap,
    /// The system gives it no threads.
    #[error("a thread cannot be started")]
    Thread(#[source] std::io::Error),
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
    share_one_heap().ok_or(CarryError::Heap)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CarryError::Descriptor)?;
    let sealers = match config.role {
        Role::Source { .. } => Some(Sealers::start(|| relay::confine(None).map(drop)).map_err(|error| match error {
            SealersError::Thread(error) => CarryError::Thread(error),
            SealersError::Confine(error) => CarryError::Confine(error),
        })?),
        Role::Destination { .. } => None,
    };
    confine(&config).map_err(CarryError::Confine)?;
    runtime.block_on(tokio::task::LocalSet::new().run_until(serve(config, sealers)))
}

/// With a heap for each thread the C library would open a file of /proc when it makes one smaller, which is not allowed later.
#[expect(unsafe_code, reason = "a setting of the C library has no other interface")]
fn share_one_heap() -> Option<()> {
    // SAFETY: it changes how memory that is asked for from now on is managed, and there is one thread.
    let done = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    (done == 1).then_some(())
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

/// What a carry works with.
struct Means {
    qemu: UnixStream,
    /// Of a source.
    sealers: Option<Sealers>,
}

async fn serve(config: CarryConfig, sealers: Option<Sealers>) -> Result<(), CarryError> {
    let control = StdUnixListener::from(take(config.control_fd));
    control.set_nonblocking(true).map_err(CarryError::Descriptor)?;
    let control = UnixListener::from_std(control).map_err(CarryError::Descriptor)?;
    let qemu = StdUnixStream::from(take(config.qemu_fd));
    qemu.set_nonblocking(true).map_err(CarryError::Descriptor)?;
    let qemu = UnixStream::from_std(qemu).map_err(CarryError::Descriptor)?;

    let (to_peer, from_agent) = mpsc::channel(64);
    let (to_agent, from_peer) = mpsc::channel(64);
    let status = Rc::new(watch::Sender::new(CarryStatus::default()));
    let identity =
        Identity { vm: *config.vm.uuid().as_bytes(), task: *config.task.uuid().as_bytes(), generation: config.generation.0 };
    let (side, bandwidth) = match &config.role {
        Role::Source { bandwidth, .. } => (Side::Source, *bandwidth),
        Role::Destination { .. } => (Side::Destination, None),
    };
    let (pump, frames) = Pump::new(side, identity, KEEP_ALIVE, bandwidth, to_agent);
    let pump = Rc::new(pump);
    let mover =
        tokio::task::spawn_local(carry(config, Means { qemu, sealers }, Rc::clone(&pump), frames, from_agent, Rc::clone(&status)));
    answer_agents(control, to_peer, from_peer, &status, &pump).await;
    mover.abort();
    Ok(())
}

/// Moves the VM's bytes; whatever ends it stands in the status afterwards.
async fn carry(
    config: CarryConfig,
    means: Means,
    pump: Rc<Pump>,
    frames: mpsc::UnboundedReceiver<Frame>,
    mut from_agent: mpsc::Receiver<Bytes>,
    status: Rc<watch::Sender<CarryStatus>>,
) {
    let wire = Arc::new(AtomicU64::new(0));
    let gauge = || tell_gauge(&status, pump.gauge(), wire.load(Ordering::Relaxed));
    let watch = async {
        let mut every = tokio::time::interval(STATUS_EVERY);
        loop {
            every.tick().await;
            gauge();
        }
    };
    let ended = tokio::select! {
        ended = move_bytes(config, means, &pump, frames, &mut from_agent, Arc::clone(&wire), &status) => ended,
        never = watch => never,
    };
    gauge();
    let Err(broken) = ended;
    tracing::info!(%broken, "the session is over");
    status.send_modify(|status| {
        status.connected = false;
        status.broken = Some(broken);
    });
}

fn tell_gauge(status: &watch::Sender<CarryStatus>, gauge: Gauge, wire_bytes: u64) {
    let Encoding { same, zero, copy, image, patch, data } = gauge.encoding;
    status.send_modify(|status| {
        status.wire_bytes = wire_bytes;
        status.stream_bytes = gauge.stream_bytes;
        status.rate = gauge.rate;
        status.link_rate = gauge.link_rate;
        status.in_flight = gauge.in_flight;
        status.pages = PageCounts { same, zero, copy, image, patch, data };
        status.round_trip_us = u64::try_from(gauge.round_trip.as_micros()).unwrap_or(u64::MAX);
        status.looking_ms = u64::try_from(gauge.looking.as_millis()).unwrap_or(u64::MAX);
        status.unanswered_ms = u64::try_from(gauge.unanswered.as_millis()).unwrap_or(u64::MAX);
        status.stalled_ms = u64::try_from(gauge.stalled.as_millis()).unwrap_or(u64::MAX);
        // The destination's are told as pages come.
        if gauge.can_leave || gauge.switched {
            let Gauge { leaving, switched, left, left_at_switch, .. } = gauge;
            status.postcopy = PostCopyStatus { possible: true, leaving, switched, left, left_at_switch, ..status.postcopy };
        }
    });
}

async fn move_bytes(
    config: CarryConfig,
    means: Means,
    pump: &Pump,
    frames: mpsc::UnboundedReceiver<Frame>,
    from_agent: &mut mpsc::Receiver<Bytes>,
    wire: Arc<AtomicU64>,
    status: &watch::Sender<CarryStatus>,
) -> Result<Infallible, String> {
    let material = Material { certificate: config.certificate, key: config.key, authority: config.authority };
    let peer = connect::Expected { host: config.peer, keys: config.peer_keys };
    let patience = Duration::from_millis(config.patience.get());
    let tell = |connected| {
        status.send_if_modified(|status| std::mem::replace(&mut status.connected, connected) != connected);
    };
    let (reader, writer) = means.qemu.into_split();
    match config.role {
        Role::Source { address, own, emulated, held, images, again, .. } => {
            let key = session_key()?;
            let dialler = Dialler::new(address, peer, &material, wire).map_err(text)?;
            let (listening, holdings, heard) = listen();
            let holdings = async { holdings.await.unwrap_or_default() };
            let sealers = means.sealers.ok_or("a source has threads that compress")?;
            if again {
                let own = memory(own.ok_or("a source that goes on has the VM's memory")?);
                pump.on_switched(0);
                let Heard { missed, .. } = heard;
                return tokio::select! {
                    error = connections::of_source(pump, &dialler, key, patience, from_agent, tell) => Err(text(error)),
                    error = deal::at_source(pump, writer, frames, config.pages, listening) => error.map_err(text),
                    Err(error) = async { after::again(pump, sealers, own, holdings.await, missed).await } => Err(text(error)),
                };
            }
            let own = own.map(|own| Own { memory: memory(own), emulated });
            let images = images.into_iter().filter_map(own_image).collect();
            let feed = Feed::new(pump, sealers, Digester::new(&key), own, images, held, heard);
            tokio::select! {
                error = connections::of_source(pump, &dialler, key, patience, from_agent, tell) => Err(text(error)),
                error = deal::at_source(pump, writer, frames, config.pages, listening) => error.map_err(text),
                Err(error) = feed.run(&reader, holdings) => Err(text(error)),
            }
        }
        Role::Destination { listen_fd, placement, advises, kept, images, again } => {
            let listener = StdTcpListener::from(take(listen_fd));
            let listener = listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener)).map_err(text)?;
            let mut acceptor = Acceptor::new(listener, peer, &material, wire).map_err(text)?;
            let image = |ImageFd { fd, digest, pages }| ReadableImage::new(take(fd), Image { digest, pages });
            let mut memory = placement.map(|placement| memory(placement).with_images(images.into_iter().map(image).collect()));
            let mut kept = kept.map(|kept| (std::fs::File::from(take(kept.file_fd)), kept.key));
            let (told, key) = oneshot::channel();
            let (to_carry, from_qemu) = from_qemu(advises);
            let deal = async {
                // A QEMU that is advised of post-copy forgets what is in its memory.
                if !advises
                    && again.is_none()
                    && let Some(memory) = &mut memory
                {
                    bring_back(kept.take(), memory).await;
                }
                let mut writer = writer;
                if again.is_some() {
                    // It is to find this when it gets the connection: with nothing on it, or none any more, an old one ends.
                    let mut resume = BytesMut::new();
                    put_resume(&mut resume);
                    writer.write_all(&resume).await.map_err(DealError::Memory)?;
                }
                let prepare = async |memory: &mut ProcessMemory| bring_back(kept, memory).await;
                let tell = |arrival: &Arrival| tell_arrival(status, arrival);
                match key.await {
                    Ok(key) => {
                        let digester = Digester::new(&key);
                        if let Some(section) = again {
                            let memory = (memory.ok_or(DealError::Unexpected("pages for no memory"))?, section);
                            return deal::at_destination_again(pump, writer, frames, digester, memory, from_qemu, tell).await;
                        }
                        deal::at_destination(pump, writer, frames, digester, (memory, from_qemu), prepare, tell).await
                    }
                    Err(_) => std::future::pending().await,
                }
            };
            tokio::select! {
                error = connections::of_destination(pump, &mut acceptor, told, patience, from_agent, tell) => Err(text(error)),
                Err(error) = deal => {
                    if let DealError::Image(digest) = error {
                        status.send_modify(|status| status.changed_image = Some(digest));
                    }
                    Err(text(error))
                }
                error = return_path(pump, &reader, to_carry) => Err(text(error)),
            }
        }
    }
}

/// What a source hears: who is told, and who listens.
pub(super) fn listen() -> (Listening, oneshot::Receiver<Holdings>, Heard) {
    let (advise, advised) = oneshot::channel();
    let (told, holdings) = oneshot::channel();
    let (told_pieces, pieces) = mpsc::unbounded_channel();
    let (told_missed, missed) = mpsc::unbounded_channel();
    let listening = Listening { advise, told, pieces: told_pieces, missed: told_missed };
    (listening, holdings, Heard { advise: advised, pieces, missed })
}

/// What the destination's QEMU says to its carry.
pub(super) fn from_qemu(advises: bool) -> (ToCarryOfQemu, FromQemu) {
    let (advised, is_advised) = oneshot::channel();
    let (asks, asked) = mpsc::channel(MOST_ASKS);
    (ToCarryOfQemu { advised: Some(advised), asks }, FromQemu { advises, advised: is_advised, asks: asked })
}

async fn bring_back(kept: Option<(std::fs::File, [u8; 32])>, memory: &mut ProcessMemory) {
    if let Some((file, key)) = kept
        && let Err(error) = home::bring_back(file, key, memory).await
    {
        tracing::info!(error = &error as &dyn std::error::Error, "what was kept of the memory is of no use");
    }
}

/// How post-copy goes at the destination.
fn tell_arrival(status: &watch::Sender<CarryStatus>, arrival: &Arrival) {
    let (section, left) = (arrival.section(), arrival.missing());
    let told = PostCopyStatus { possible: true, section, left, ..PostCopyStatus::default() };
    status.send_if_modified(|status| std::mem::replace(&mut status.postcopy, told) != told);
}

/// One that cannot be read is done without.
fn own_image(fds: IndexedImageFds) -> Option<OwnImage> {
    let image = OwnImage::read(take(fds.image_fd), take(fds.index_fd));
    image.inspect_err(|error| tracing::info!(error = error as &dyn std::error::Error, "an image is of no use")).ok()
}

fn memory(placement: Placement) -> ProcessMemory {
    ProcessMemory::new(take(placement.memory_fd), take(placement.map_fd), placement.blocks)
}

/// Where what the destination's QEMU says goes, if it is for its carry.
pub(super) struct ToCarryOfQemu {
    advised: Option<oneshot::Sender<()>>,
    asks: mpsc::Sender<ReturnMessage>,
}

/// The destination's QEMU answers: its words go back as they are, but for those of post-copy, which are its carry's.
pub(super) async fn return_path(pump: &Pump, qemu: &OwnedReadHalf, mut to_carry: ToCarryOfQemu) -> ReturnPathError {
    let mut reader = ReturnReader::new();
    let mut writer = ReturnWriter::default();
    loop {
        let buffer = reader.buffer_mut();
        buffer.reserve(RETURN_READ);
        match qemu.try_read_buf(buffer) {
            Ok(0) => break,
            Ok(_) => {
                let mut passed = BytesMut::new();
                loop {
                    let message = match reader.next_message() {
                        Ok(Some(message)) => message,
                        Ok(None) => break,
                        Err(error) => return error.into(),
                    };
                    match message {
                        ReturnMessage::Pong(ADVISED) => drop(to_carry.advised.take().map(|advised| advised.send(()))),
                        ReturnMessage::ReqPages { .. } | ReturnMessage::ReqPagesId { .. } => {
                            drop(to_carry.asks.send(message).await)
                        }
                        ReturnMessage::ResumeAck(_) => tracing::info!("QEMU goes on"),
                        message => {
                            if let Err(error) = writer.write(&message, &mut passed) {
                                return error.into();
                            }
                        }
                    }
                }
                while !passed.is_empty() {
                    let data = passed.split_to(passed.len().min(MAX_DATA)).freeze();
                    let raw = data.len() as u64;
                    pump.push(&Frame::Return(data), raw);
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                if qemu.readable().await.is_err() {
                    break;
                }
            }
            Err(_) => break,
        }
    }
    pump.push(&Frame::ReturnEnd, 0);
    std::future::pending().await
}

/// Why the return path cannot be passed on.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReturnPathError {
    #[error("the return path is not understood: {0}")]
    Read(#[from] ReturnError),
    #[error("the return path cannot be written again: {0}")]
    Write(#[from] ReturnWriteError),
}

fn session_key() -> Result<[u8; 32], String> {
    let mut key = [0; 32];
    let provider = rustls::crypto::CryptoProvider::get_default().ok_or("there is no source of random numbers")?;
    provider.secure_random.fill(&mut key).map_err(|_| "there are no random numbers")?;
    Ok(key)
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Serves one agent after the other until one says quit or none has come for long.
async fn answer_agents(
    control: UnixListener,
    to_peer: mpsc::Sender<Bytes>,
    mut from_peer: mpsc::Receiver<Bytes>,
    status: &watch::Sender<CarryStatus>,
    pump: &Pump,
) {
    loop {
        let agent = match tokio::time::timeout(ORPHAN, control.accept()).await {
            Ok(Ok((agent, _))) => agent,
            // A VM that runs waits for what is left.
            Err(_) if is_serving(&status.borrow()) => continue,
            Ok(Err(_)) | Err(_) => return,
        };
        if answer_agent(agent, &to_peer, &mut from_peer, status.subscribe(), pump).await {
            return;
        }
    }
}

/// Whether there is memory that a VM which runs still needs.
fn is_serving(status: &CarryStatus) -> bool {
    let PostCopyStatus { switched, section, left, .. } = status.postcopy;
    status.broken.is_none() && left > 0 && (switched || section.is_some())
}

/// Whether the agent said quit, rather than being gone.
async fn answer_agent(
    agent: UnixStream,
    to_peer: &mpsc::Sender<Bytes>,
    from_peer: &mut mpsc::Receiver<Bytes>,
    mut status: watch::Receiver<CarryStatus>,
    pump: &Pump,
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
                    Ok(ToCarry::Hurry) => pump.hurry(),
                    Ok(ToCarry::Hold(time)) => pump.hold(Duration::from_millis(time.get())),
                    Ok(ToCarry::Bandwidth(bandwidth)) => pump.set_bandwidth(bandwidth),
                    Ok(ToCarry::Leave) => pump.leave(),
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
                FromCarry::Status(Box::new(status.borrow_and_update().clone()))
            }
            () = tokio::time::sleep_until(told + Duration::from_secs(5)) => {
                told = Instant::now();
                FromCarry::Status(Box::new(status.borrow().clone()))
            }
        };
        let mut text = serde_json::to_vec(&say).expect("our own types serialise");
        text.push(b'\n');
        if writer.write_all(&text).await.is_err() {
            return false;
        }
    }
}
