//! Moves the bytes: four loops around one connection, one QEMU socket and one window. Ends only with an error; QEMU's own end is none.

use std::cell::{Cell, RefCell};
use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use godwit_carrier::{Decoder, Frame, Identity, MalformedFrame, Window};
use godwit_model::BytesPerSec;
use rustix::net::Shutdown;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use super::connect::Connection;

/// Why the bytes no longer move.
#[derive(Debug, thiserror::Error)]
pub(super) enum PumpError {
    #[error("the connection failed: {0}")]
    Connection(io::Error),
    #[error("the peer closed the connection")]
    Closed,
    #[error("the peer was silent for {0:?}")]
    Silent(Duration),
    #[error("the peer sent what is not the carrier's: {0}")]
    Malformed(#[from] MalformedFrame),
    #[error("the peer carries another move")]
    Identity,
    #[error("the peer sent {0}, which is not its part")]
    Unexpected(&'static str),
}

/// Which way the stream goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Destination,
}

/// Largest single read from QEMU.
const READ: u64 = 64 << 10;
/// What a peer may have under way beyond the window before it is cut off.
const MAX_QUEUED: u64 = (64 << 20) + (1 << 20);
/// How long the source's QEMU may keep its socket after the destination's QEMU closed: longer than it needs to close by itself.
const LINGER: Duration = Duration::from_secs(3);

/// How a peer's life is watched.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeepAlive {
    /// At most one ping in this time; also how often silence is looked for.
    pub(super) every: Duration,
    /// How long the peer may say nothing.
    pub(super) silence: Duration,
}

/// One side's state, shared by its loops, which all run in one task.
pub(super) struct Pump {
    side: Side,
    identity: Identity,
    started: Instant,
    keep_alive: KeepAlive,
    bandwidth: Option<BytesPerSec>,
    window: RefCell<Window>,
    room: Notify,
    applied: Cell<u64>,
    applied_changed: Notify,
    queued: Cell<u64>,
    /// Something came from the peer since the last tick.
    heard: Cell<bool>,
    /// Our ping that the peer has not answered yet: the next one waits for it, so that a peer that stood still finds one ping, not hundreds.
    asked: Cell<Option<u64>>,
    /// The peer's ping has an answer that waits to be written.
    answering: Cell<bool>,
    /// The peer's QEMU has closed its side.
    peer_ended: Cell<bool>,
    urgent: mpsc::UnboundedSender<Frame>,
    bulk: mpsc::Sender<Frame>,
    to_qemu: mpsc::UnboundedSender<Option<Bytes>>,
    to_agent: mpsc::Sender<Bytes>,
}

/// What the loops read from.
pub(super) struct Ends {
    pub(super) connection: Connection,
    pub(super) qemu: UnixStream,
    pub(super) from_agent: mpsc::Receiver<Bytes>,
}

/// The receiving ends that belong to a [`Pump`].
pub(super) struct Queues {
    urgent: mpsc::UnboundedReceiver<Frame>,
    bulk: mpsc::Receiver<Frame>,
    to_qemu: mpsc::UnboundedReceiver<Option<Bytes>>,
}

/// What the agent is told.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gauge {
    pub(super) stream_bytes: u64,
    pub(super) rate: u64,
    pub(super) round_trip: Duration,
    pub(super) stalled: Duration,
}

impl Pump {
    pub(super) fn new(
        side: Side,
        identity: Identity,
        keep_alive: KeepAlive,
        bandwidth: Option<BytesPerSec>,
        to_agent: mpsc::Sender<Bytes>,
    ) -> (Self, Queues) {
        let (urgent, urgent_queue) = mpsc::unbounded_channel();
        let (bulk, bulk_queue) = mpsc::channel(1);
        let (to_qemu, qemu_queue) = mpsc::unbounded_channel();
        let started = Instant::now();
        let pump = Self {
            side,
            identity,
            started,
            keep_alive,
            bandwidth,
            window: RefCell::new(Window::new(Duration::ZERO)),
            room: Notify::new(),
            applied: Cell::new(0),
            applied_changed: Notify::new(),
            queued: Cell::new(0),
            heard: Cell::new(true),
            asked: Cell::new(None),
            answering: Cell::new(false),
            peer_ended: Cell::new(false),
            urgent,
            bulk,
            to_qemu,
            to_agent,
        };
        (pump, Queues { urgent: urgent_queue, bulk: bulk_queue, to_qemu: qemu_queue })
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    pub(super) fn gauge(&self) -> Gauge {
        let window = self.window.borrow();
        let stalled = if window.in_flight() == 0 { Duration::ZERO } else { self.now().saturating_sub(window.last_applied()) };
        let stream_bytes = if self.side == Side::Source { window.sent() } else { self.applied.get() };
        Gauge { stream_bytes, rate: window.rate(), round_trip: window.round_trip(), stalled }
    }

    /// Exchanges identities. The destination says nothing before it has seen the right one.
    pub(super) async fn greet(&self, connection: &mut Connection, decoder: &mut Decoder) -> Result<(), PumpError> {
        if self.side == Side::Source {
            send(connection, &Frame::Hello(self.identity)).await?;
        }
        let said = match (self.side, next_frame(connection, decoder).await?) {
            (Side::Source, Frame::Welcome(identity)) | (Side::Destination, Frame::Hello(identity)) => identity,
            _ => return Err(PumpError::Unexpected("no greeting")),
        };
        if said != self.identity {
            return Err(PumpError::Identity);
        }
        if self.side == Side::Destination {
            send(connection, &Frame::Welcome(self.identity)).await?;
        }
        Ok(())
    }

    /// Runs until the connection is over. Dropping the ends afterwards closes QEMU's socket.
    pub(super) async fn run(&self, ends: Ends, queues: Queues, decoder: Decoder) -> PumpError {
        let socket = ends.qemu.into_split();
        let (connection_reader, connection_writer) = tokio::io::split(ends.connection);
        tokio::select! {
            error = self.read_connection(connection_reader, decoder) => error,
            error = self.write_connection(connection_writer, queues.urgent, queues.bulk, ends.from_agent) => error,
            error = self.watch_life() => error,
            never = self.serve_qemu(socket, queues.to_qemu) => match never {},
        }
    }

    /// Asks for a sign of life and judges silence, in ticks of its own: time in which this very process stood still does not count.
    async fn watch_life(&self) -> PumpError {
        let KeepAlive { every, silence } = self.keep_alive;
        let mut tick = tokio::time::interval(every);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut silent = Duration::ZERO;
        loop {
            tick.tick().await;
            silent = if self.heard.replace(false) { Duration::ZERO } else { silent + every };
            if silent > silence {
                return PumpError::Silent(silent);
            }
            if self.asked.get().is_none() {
                let number = u64::try_from(self.now().as_micros()).unwrap_or(u64::MAX);
                self.asked.set(Some(number));
                let _ = self.urgent.send(Frame::Ping(number));
            }
        }
    }

    async fn serve_qemu(
        &self,
        (reader, writer): (OwnedReadHalf, OwnedWriteHalf),
        queue: mpsc::UnboundedReceiver<Option<Bytes>>,
    ) -> std::convert::Infallible {
        tokio::join!(self.read_qemu(reader), self.write_qemu(writer, queue));
        std::future::pending().await
    }

    async fn read_qemu(&self, mut qemu: OwnedReadHalf) {
        let mut buffer = BytesMut::new();
        let mut pace = Pace::new(self.bandwidth);
        loop {
            let limit = match self.side {
                Side::Source => self.wait_for_room().await,
                Side::Destination => READ,
            };
            buffer.reserve(READ as usize);
            match (&mut qemu).take(limit).read_buf(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(count) => {
                    let data = buffer.split().freeze();
                    if self.side == Side::Source {
                        pace.wait(count as u64).await;
                        self.window.borrow_mut().on_sent(count as u64, self.now());
                        if self.bulk.send(Frame::Forward(data)).await.is_err() {
                            return;
                        }
                    } else if self.bulk.send(Frame::Return(data)).await.is_err() {
                        return;
                    }
                }
            }
        }
        match self.side {
            Side::Source => drop(self.bulk.send(Frame::ForwardEnd).await),
            Side::Destination => drop(self.bulk.send(Frame::ReturnEnd).await),
        }
    }

    async fn wait_for_room(&self) -> u64 {
        loop {
            let room = self.window.borrow().room();
            // Small dribbles cost a frame each: wait for some room, unless nothing at all is under way.
            if room >= READ / 4 {
                return room.min(READ);
            }
            self.room.notified().await;
        }
    }

    async fn write_qemu(&self, mut qemu: OwnedWriteHalf, mut queue: mpsc::UnboundedReceiver<Option<Bytes>>) {
        let mut gone = false;
        while let Some(part) = queue.recv().await {
            match part {
                Some(data) => {
                    gone = gone || qemu.write_all(&data).await.is_err();
                    self.queued.set(self.queued.get().saturating_sub(data.len() as u64));
                    if !gone && self.side == Side::Destination {
                        self.applied.set(self.applied.get() + data.len() as u64);
                        self.applied_changed.notify_one();
                    }
                }
                None => {
                    if self.side == Side::Source {
                        tokio::time::sleep(LINGER).await;
                    }
                    let how = if self.side == Side::Source { Shutdown::Both } else { Shutdown::Write };
                    // Closed already is as good.
                    let _ = rustix::net::shutdown(qemu.as_ref(), how);
                }
            }
        }
    }

    async fn read_connection(&self, mut connection: ReadHalf<Connection>, mut decoder: Decoder) -> PumpError {
        loop {
            match next_frame(&mut connection, &mut decoder).await {
                Ok(frame) => {
                    self.heard.set(true);
                    if let Err(error) = self.on_frame(frame).await {
                        return error;
                    }
                }
                Err(error) => return error,
            }
        }
    }

    async fn on_frame(&self, frame: Frame) -> Result<(), PumpError> {
        match (self.side, frame) {
            (_, Frame::Ping(number)) => {
                if self.answering.replace(true) {
                    return Err(PumpError::Unexpected("a ping before it had the answer to its last"));
                }
                let _ = self.urgent.send(Frame::Pong(number));
            }
            (_, Frame::Pong(number)) => {
                if self.asked.take() != Some(number) {
                    return Err(PumpError::Unexpected("an answer to no ping of ours"));
                }
                let round_trip = self.now().saturating_sub(Duration::from_micros(number));
                self.window.borrow_mut().on_round_trip(round_trip);
            }
            // Facts are repeated until answered: one that finds no agent may be dropped.
            (_, Frame::Control(message)) => drop(self.to_agent.try_send(message)),
            (Side::Source, Frame::Applied(total)) => {
                if !self.window.borrow_mut().on_applied(total, self.now()) {
                    return Err(PumpError::Unexpected("an impossible count"));
                }
                self.room.notify_one();
            }
            (Side::Source, Frame::Return(data)) | (Side::Destination, Frame::Forward(data)) => {
                let queued = self.queued.get() + data.len() as u64;
                if queued > MAX_QUEUED {
                    return Err(PumpError::Unexpected("more than the window allows"));
                }
                self.queued.set(queued);
                let _ = self.to_qemu.send(Some(data));
            }
            (Side::Source, Frame::ReturnEnd) | (Side::Destination, Frame::ForwardEnd) => {
                if self.peer_ended.replace(true) {
                    return Err(PumpError::Unexpected("a second end"));
                }
                let _ = self.to_qemu.send(None);
            }
            (_, Frame::Hello(_) | Frame::Welcome(_)) => return Err(PumpError::Unexpected("a second greeting")),
            _ => return Err(PumpError::Unexpected("the other side's frame")),
        }
        Ok(())
    }

    async fn write_connection(
        &self,
        mut connection: WriteHalf<Connection>,
        mut urgent: mpsc::UnboundedReceiver<Frame>,
        mut bulk: mpsc::Receiver<Frame>,
        mut from_agent: mpsc::Receiver<Bytes>,
    ) -> PumpError {
        let mut out = BytesMut::new();
        loop {
            // The writer outlives every sender: `self` holds one of each.
            let frame = tokio::select! {
                biased;
                Some(frame) = urgent.recv() => frame,
                () = self.applied_changed.notified() => Frame::Applied(self.applied.get()),
                Some(message) = from_agent.recv() => Frame::Control(message),
                Some(frame) = bulk.recv() => frame,
            };
            if matches!(frame, Frame::Pong(_)) {
                self.answering.set(false);
            }
            frame.encode(&mut out);
            let written = async {
                connection.write_all(&out).await?;
                connection.flush().await
            };
            if let Err(error) = written.await {
                return PumpError::Connection(error);
            }
            out.clear();
        }
    }
}

async fn send(connection: &mut Connection, frame: &Frame) -> Result<(), PumpError> {
    let mut out = BytesMut::new();
    frame.encode(&mut out);
    connection.write_all(&out).await.map_err(PumpError::Connection)?;
    connection.flush().await.map_err(PumpError::Connection)
}

async fn next_frame<R: tokio::io::AsyncRead + Unpin>(connection: &mut R, decoder: &mut Decoder) -> Result<Frame, PumpError> {
    loop {
        if let Some(frame) = decoder.next_frame()? {
            return Ok(frame);
        }
        let buffer = decoder.buffer_mut();
        buffer.reserve(READ as usize);
        match connection.read_buf(buffer).await {
            Ok(0) => return Err(PumpError::Closed),
            Ok(_) => {}
            // A process that ends does not say goodbye to TLS; every end that counts is a frame of ours.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(PumpError::Closed),
            Err(error) => return Err(PumpError::Connection(error)),
        }
    }
}

/// Keeps a rate: each piece waits until the pieces before it have had their time.
struct Pace {
    rate: Option<BytesPerSec>,
    free_at: Instant,
}

impl Pace {
    /// Credit that an idle time may save up.
    const BURST: Duration = Duration::from_millis(20);

    fn new(rate: Option<BytesPerSec>) -> Self {
        Self { rate, free_at: Instant::now() }
    }

    async fn wait(&mut self, bytes: u64) {
        let Some(rate) = self.rate else { return };
        let now = Instant::now();
        self.free_at = self.free_at.max(now.checked_sub(Self::BURST).unwrap_or(now));
        self.free_at += Duration::from_secs_f64(bytes as f64 / rate.get().max(1) as f64);
        if self.free_at > now {
            tokio::time::sleep_until(self.free_at).await;
        }
    }
}
