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
use godwit_carrier::pages::{Digester, Encoding};
use godwit_carrier::{Frame, Identity, Image, Side};
use godwit_qemu::cage::relay::{self, RelayError};
use godwit_stream::postcopy::put_resume;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::codec::{FramedRead, LinesCodec};

use super::arrive::Arrival;
use super::behind::WriteBehind;
use super::connect::{self, Acceptor, Dialler};
use super::control::{
    CarryConfig, CarryStatus, DiskStatus, FromCarry, ImageFd, IndexedImageFds, LentMemory, MAX_LINE, OwnDiskFacts, PageCounts,
    Placement, PostCopyStatus, Role, ToCarry,
};
use super::deal::{DealError, Listening};
use super::disk::DiskError;
use super::disk::into::{DiskInto, WaitingDisk};
use super::disk::out::{DiskOut, OwnDisk};
use super::feed::{Feed, Heard, Own};
use super::holdings::Holdings;
use super::home::{Bringing, Earlier, Lent};
use super::images::{OwnImage, ReadableImage};
use super::memory::ProcessMemory;
use super::neighbours::Neighbours;
use super::pump::{Gauge, KeepAlive, Pump};
use super::return_path::{from_qemu, return_path};
use super::seal::Sealers;
use super::threads::{Threads, ThreadsError};
use super::{after, connections, deal};
use crate::tls::Material;

/// Time without any agent after which an orphan ends.
const ORPHAN: Duration = Duration::from_secs(600);
/// A connection that is silent for so long is dropped: dialling again is quicker than what the kernel repeats, and costs nothing.
const KEEP_ALIVE: KeepAlive = KeepAlive { every: Duration::from_secs(1), silence: Duration::from_secs(5) };
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
    let threads = match config.role {
        Role::Source { .. } | Role::DiskSource { .. } | Role::Destination { .. } => {
            Some(Threads::start(|| relay::confine(None).map(drop)).map_err(|error| match error {
                ThreadsError::Thread(error) => CarryError::Thread(error),
                ThreadsError::Confine(error) => CarryError::Confine(error),
            })?)
        }
        Role::DiskDestination { .. } => None,
    };
    confine(&config).map_err(CarryError::Confine)?;
    runtime.block_on(tokio::task::LocalSet::new().run_until(serve(config, threads)))
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
        Role::Source { address, .. } | Role::DiskSource { address, .. } => Some(address.port()),
        Role::Destination { .. } | Role::DiskDestination { .. } => None,
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
    /// Of all but the destination of a disk.
    threads: Option<Threads>,
}

async fn serve(config: CarryConfig, threads: Option<Threads>) -> Result<(), CarryError> {
    let control = StdUnixListener::from(take(config.control_fd));
    control.set_nonblocking(true).map_err(CarryError::Descriptor)?;
    let control = UnixListener::from_std(control).map_err(CarryError::Descriptor)?;
    let qemu = stream(config.qemu_fd).map_err(CarryError::Descriptor)?;

    let (to_peer, from_agent) = mpsc::channel(64);
    let (to_agent, from_peer) = mpsc::channel(64);
    let status = Rc::new(watch::Sender::new(CarryStatus::default()));
    let (vm, task) = (*config.vm.uuid().as_bytes(), *config.task.uuid().as_bytes());
    let identity = Identity { vm, task, generation: config.generation.0, lane: config.lane };
    let (side, bandwidth) = match &config.role {
        Role::Source { bandwidth, .. } | Role::DiskSource { bandwidth, .. } => (Side::Source, *bandwidth),
        Role::Destination { .. } | Role::DiskDestination { .. } => (Side::Destination, None),
    };
    let (pump, frames) = Pump::new(side, identity, KEEP_ALIVE, bandwidth, to_agent);
    let pump = Rc::new(pump);
    let mover =
        tokio::task::spawn_local(carry(config, Means { qemu, threads }, Rc::clone(&pump), frames, from_agent, Rc::clone(&status)));
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
    let Encoding { same, zero, copy, image, common, patch, data } = gauge.encoding;
    status.send_modify(|status| {
        status.wire_bytes = wire_bytes;
        status.stream_bytes = gauge.stream_bytes;
        status.rate = gauge.rate;
        status.link_rate = gauge.link_rate;
        status.in_flight = gauge.in_flight;
        status.pages = PageCounts { same, zero, copy, image, common, patch, data };
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
    let tell_disk = tell_disk(status);
    match config.role {
        Role::DiskSource { address, disk_fd, disk, images, .. } => {
            let key = session_key()?;
            let dialler = Dialler::new(address, peer, &material, wire).map_err(text)?;
            let sealers = Sealers::new(means.threads.ok_or("a source has threads that compress")?);
            let images = images.into_iter().filter_map(own_image).collect();
            let OwnDiskFacts { export, size, since } = disk;
            let out = DiskOut::new(pump, sealers, Digester::new(&key), images, OwnDisk { export, size, since }).map_err(text)?;
            let disk = stream(disk_fd).map_err(text)?;
            tokio::select! {
                error = connections::of_source(pump, &dialler, key, patience, from_agent, tell) => Err(text(error)),
                Err(error) = out.run(disk, means.qemu, frames, tell_disk) => Err(text(error)),
            }
        }
        Role::DiskDestination { listen_fd, export, size, base, images } => {
            let mut acceptor = acceptor(listen_fd, peer, &material, wire)?;
            let images = images.into_iter().map(readable_image).collect();
            let (told, key) = oneshot::channel();
            let arrive = async {
                let mut into = DiskInto::new(pump, means.qemu, &export, images, WaitingDisk { size, base })?;
                into.meet().await?;
                let Ok(key) = key.await else { return std::future::pending().await };
                into.run(Digester::new(&key), frames, tell_disk).await
            };
            tokio::select! {
                error = connections::of_destination(pump, &mut acceptor, told, patience, from_agent, tell) => Err(text(error)),
                Err(error) = arrive => {
                    if let DiskError::Image(digest) = error {
                        status.send_modify(|status| status.changed_image = Some(digest));
                    }
                    Err(text(error))
                }
            }
        }
        Role::Source { address, own, emulated, held, images, again, .. } => {
            let (reader, writer) = means.qemu.into_split();
            let key = session_key()?;
            let dialler = Dialler::new(address, peer, &material, wire).map_err(text)?;
            let (listening, holdings, heard) = listen();
            let holdings = async { holdings.await.unwrap_or_default() };
            let sealers = Sealers::new(means.threads.ok_or("a source has threads that compress")?);
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
        Role::Destination { listen_fd, placement, advises, kept, lent, images, neighbours, again } => {
            let (reader, writer) = means.qemu.into_split();
            let mut acceptor = acceptor(listen_fd, peer, &material, wire)?;
            let images = images.into_iter().map(readable_image).collect();
            let memory = placement.map(|placement| memory(placement).with_images(images));
            let stay = kept.map(|kept| (std::fs::File::from(take(kept.file_fd)), kept.key));
            let lent = lent.map(self::lent).transpose().map_err(text)?;
            let earlier = Earlier { stay, lent };
            let neighbours = Neighbours::new(neighbours.into_iter().map(self::memory).collect());
            let (told, mut key) = oneshot::channel();
            let (to_carry, from_qemu) = from_qemu(advises);
            let tell_post_copy = |arrival: &Arrival| tell_arrival(status, arrival);
            let threads = means.threads.ok_or("a destination has threads that write")?;
            let deal = async {
                let mut writer = writer;
                if let Some(section) = again {
                    // It is to find this when it gets the connection: with nothing on it, or none any more, an old one ends.
                    let mut resume = BytesMut::new();
                    put_resume(&mut resume);
                    writer.write_all(&resume).await.map_err(DealError::Memory)?;
                    let memory = (memory.ok_or(DealError::Unexpected("pages for no memory"))?, section);
                    let Ok(key) = key.await else { return std::future::pending().await };
                    let digester = Digester::new(&key);
                    return deal::at_destination_again(pump, writer, frames, digester, memory, from_qemu, tell_post_copy).await;
                }
                let mut memory = memory.map(|memory| WriteBehind::new(memory, threads));
                // A QEMU that is advised of post-copy forgets what is in its memory.
                let (mut bringing, mut earlier) = (None, Some(earlier));
                if !advises && let (Some(memory), Some(earlier)) = (&mut memory, earlier.take()) {
                    bringing = Some(Bringing::begin(earlier, memory).await);
                }
                let key = match (&mut bringing, &mut memory) {
                    (Some(bringing), Some(memory)) => tokio::select! {
                        key = &mut key => key,
                        never = bringing.go_on(memory) => match never {},
                    },
                    _ => key.await,
                };
                let prepare = async |memory: &mut WriteBehind| {
                    let bringing = match (bringing, earlier) {
                        (Some(bringing), _) => bringing,
                        (None, Some(earlier)) => Bringing::begin(earlier, memory).await,
                        (None, None) => Bringing::default(),
                    };
                    (bringing, neighbours)
                };
                let Ok(key) = key else { return std::future::pending().await };
                deal::at_destination(pump, writer, frames, Digester::new(&key), (memory, from_qemu), prepare, tell_post_copy).await
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

/// How post-copy goes at the destination.
fn tell_arrival(status: &watch::Sender<CarryStatus>, arrival: &Arrival) {
    let (section, left) = (arrival.section(), arrival.missing());
    let told = PostCopyStatus { possible: true, section, left, ..PostCopyStatus::default() };
    status.send_if_modified(|status| std::mem::replace(&mut status.postcopy, told) != told);
}

/// How a disk is, several times a second and whenever something is through.
fn tell_disk(status: &watch::Sender<CarryStatus>) -> impl Fn(DiskStatus) {
    let last = std::cell::Cell::new(Instant::now());
    move |disk| {
        let before = status.borrow().disk;
        let turned = (before.copied, before.whole) != (disk.copied, disk.whole);
        if turned || (before != disk && last.get().elapsed() >= STATUS_EVERY) {
            last.set(Instant::now());
            status.send_modify(|status| status.disk = disk);
        }
    }
}

fn acceptor(listen_fd: RawFd, peer: connect::Expected, material: &Material, wire: Arc<AtomicU64>) -> Result<Acceptor, String> {
    let listener = StdTcpListener::from(take(listen_fd));
    let listener = listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener)).map_err(text)?;
    Acceptor::new(listener, peer, material, wire).map_err(text)
}

fn stream(fd: RawFd) -> std::io::Result<UnixStream> {
    let stream = StdUnixStream::from(take(fd));
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

fn readable_image(ImageFd { fd, digest, pages }: ImageFd) -> ReadableImage {
    ReadableImage::new(take(fd), Image { digest, pages })
}

/// One that cannot be read is done without.
fn own_image(fds: IndexedImageFds) -> Option<OwnImage> {
    let image = OwnImage::read(take(fds.image_fd), take(fds.index_fd));
    image.inspect_err(|error| tracing::info!(error = error as &dyn std::error::Error, "an image is of no use")).ok()
}

fn lent(LentMemory { from_fd, generation, within }: LentMemory) -> std::io::Result<Lent> {
    Ok(Lent { from: stream(from_fd)?, generation, within: Duration::from_millis(within.get()) })
}

fn memory(placement: Placement) -> ProcessMemory {
    ProcessMemory::new(take(placement.memory_fd), take(placement.map_fd), placement.blocks)
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
                    Ok(ToCarry::Begin) => pump.begin_copying(),
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
