//! Moves the frames of a session, over one connection after the other. Ends only with an error; QEMU's own end is none.
//!
//! ```text
//!   feed (source) ──push──▶ session ──▶ connection ──▶ queue ──▶ deal (destination) ──▶ memory, QEMU
//!        ▲ waits for room      ▲                                   │ acknowledges
//!        └─────────────────────┴───────────────────────────────────┘
//! ```
//! All loops run in one task; a connection that fails ends its own loops only.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use godwit_carrier::pages::{Encoding, PAGE_SIZE};
use godwit_carrier::{Decoder, Frame, Greeting, Identity, MalformedFrame, Session, Side};
use godwit_model::BytesPerSec;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use super::connect::Connection;
use super::speed::Speed;

/// Why a connection, or the session, is over.
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

impl PumpError {
    /// Whether another connection may go on where this one ended.
    pub(super) const fn is_passing(&self) -> bool {
        matches!(self, Self::Connection(_) | Self::Closed | Self::Silent(_))
    }
}

/// What is written to a connection at once.
const GATHER: usize = 64 << 10;
/// Largest single read.
const READ: usize = 64 << 10;
/// Most that a destination may leave unacknowledged of what it says it misses.
const MOST_UNDER_WAY: u64 = 64 << 20;
/// What waits to be dealt with before nothing more is read.
const MAX_QUEUED: usize = 64 << 20;
/// Numbers of our questions to the destination's QEMU; QEMU's own are small.
const OUR_QUESTIONS: u32 = 0x4757_0000;
/// Of the question behind the advice of post-copy, and of the one behind the state of the devices.
pub(super) const ADVISED: u32 = 0x4758_0001;
pub(super) const LOADED: u32 = 0x4758_0002;
/// A page was missed so lately that the next is expected: what it would wait for is kept short.
const MISSING: Duration = Duration::from_millis(100);

/// How a connection's life is watched.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeepAlive {
    /// At most one ping in this time; also how often silence is looked for.
    pub(super) every: Duration,
    /// How long a connection may say nothing before it is dropped.
    pub(super) silence: Duration,
}

/// One side's state, shared by its loops.
pub(super) struct Pump {
    side: Side,
    identity: Identity,
    started: Instant,
    keep_alive: KeepAlive,
    pace: RefCell<Pace>,
    session: RefCell<Session>,
    /// Something is to be written.
    wake: Notify,
    room: Notify,
    frames: mpsc::UnboundedSender<Frame>,
    queued: Cell<usize>,
    drained: Notify,
    to_agent: mpsc::Sender<Bytes>,
    hurried: Cell<bool>,
    hurry: Notify,
    /// Until when nothing is read from QEMU.
    held_until: Cell<Option<Instant>>,
    /// That may be sooner now.
    released: Notify,
    stream_bytes: Cell<u64>,
    /// What goes from QEMU through this process, whatever takes the time but the link.
    speed: Cell<Speed>,
    /// Of comparing memory.
    look_speed: Cell<Speed>,
    cost: Cell<Option<u64>>,
    encoding: Cell<Encoding>,
    /// The last question to the destination's QEMU, and when it was asked if it was not answered.
    question: Cell<(u32, Option<Duration>)>,
    /// Pages that wait in the feed for an answer of the destination.
    waiting: Cell<usize>,
    /// Pages that are to be compared once more when the VM stands still.
    looked_at: Cell<usize>,
    /// Pages whose pieces were asked for and not told yet.
    wanted: Cell<usize>,
    /// The destination tells what it holds, and is not through with that.
    telling: Cell<bool>,
    /// Of a disk: its mirror runs.
    begun: Cell<bool>,
    begins: Notify,
    after: After,
}

/// What post-copy needs to know.
#[derive(Default)]
struct After {
    can_leave: Cell<bool>,
    leaving: Cell<bool>,
    switched: Cell<bool>,
    left: Cell<u64>,
    left_at_switch: Cell<u64>,
    /// When a page was missed last.
    missed: Cell<Option<Instant>>,
}

/// What the agent is told.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gauge {
    pub(super) stream_bytes: u64,
    /// Bytes of guest memory that would be moved per second if all of it were sent again as it was lately.
    pub(super) rate: u64,
    pub(super) link_rate: u64,
    pub(super) in_flight: u64,
    pub(super) round_trip: Duration,
    pub(super) stalled: Duration,
    /// How long the destination's QEMU has not answered.
    pub(super) unanswered: Duration,
    /// How long it takes to compare what is to be compared once more.
    pub(super) looking: Duration,
    pub(super) encoding: Encoding,
    /// Post-copy is possible; it was begun; pages that come after the switch.
    pub(super) can_leave: bool,
    pub(super) leaving: bool,
    pub(super) switched: bool,
    pub(super) left: u64,
    pub(super) left_at_switch: u64,
}

/// What the loops of one connection share.
struct Life {
    /// Something came from the peer since the last tick.
    heard: Cell<bool>,
    /// A ping that is to be written.
    ask: Cell<Option<u64>>,
    /// Our ping that the peer has not answered yet: the next one waits for it, so that a peer that stood still finds one ping, not hundreds.
    asked: Cell<Option<u64>>,
    /// The peer's ping whose answer waits to be written.
    answer: Cell<Option<u64>>,
}

impl Pump {
    /// The pump, and the peer's sequenced frames in their order.
    pub(super) fn new(
        side: Side,
        identity: Identity,
        keep_alive: KeepAlive,
        bandwidth: Option<BytesPerSec>,
        to_agent: mpsc::Sender<Bytes>,
    ) -> (Self, mpsc::UnboundedReceiver<Frame>) {
        let (frames, queue) = mpsc::unbounded_channel();
        let pump = Self {
            side,
            identity,
            started: Instant::now(),
            keep_alive,
            pace: RefCell::new(Pace::new(bandwidth)),
            session: RefCell::new(Session::new(Duration::ZERO)),
            wake: Notify::new(),
            room: Notify::new(),
            frames,
            queued: Cell::new(0),
            drained: Notify::new(),
            to_agent,
            hurried: Cell::new(false),
            hurry: Notify::new(),
            held_until: Cell::new(None),
            released: Notify::new(),
            stream_bytes: Cell::new(0),
            speed: Cell::default(),
            look_speed: Cell::default(),
            cost: Cell::new(None),
            encoding: Cell::new(Encoding::default()),
            question: Cell::new((OUR_QUESTIONS, None)),
            waiting: Cell::new(0),
            looked_at: Cell::new(0),
            wanted: Cell::new(0),
            telling: Cell::new(false),
            begun: Cell::new(false),
            begins: Notify::new(),
            after: After::default(),
        };
        (pump, queue)
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    pub(super) fn identity(&self) -> Identity {
        self.identity
    }

    pub(super) fn gauge(&self) -> Gauge {
        let session = self.session.borrow();
        let window = session.window();
        let stalled = if session.is_settled() { Duration::ZERO } else { self.now().saturating_sub(window.last_applied()) };
        // What it may take counts from the moment at which that is said, not when it has been measured.
        let link_rate = self.link_rate().unwrap_or(0);
        Gauge {
            stream_bytes: self.stream_bytes.get(),
            rate: self.rate(link_rate, window.wire_sent()),
            link_rate,
            in_flight: window.in_flight() + (self.waiting.get() * PAGE_SIZE) as u64,
            round_trip: window.round_trip(),
            stalled,
            unanswered: self.question.get().1.map_or(Duration::ZERO, |asked| self.now().saturating_sub(asked)),
            looking: self.look_speed.get().time_for((self.looked_at.get() * PAGE_SIZE) as u64),
            encoding: self.encoding.get(),
            can_leave: self.after.can_leave.get(),
            leaving: self.after.leaving.get(),
            switched: self.after.switched.get(),
            left: self.after.left.get(),
            left_at_switch: self.after.left_at_switch.get(),
        }
    }

    /// Bytes per second that the link takes, as far as that is known.
    pub(super) fn link_rate(&self) -> Option<u64> {
        let rate = self.session.borrow().window().rate();
        (rate > 0).then(|| rate.min(self.pace.borrow().rate.map_or(u64::MAX, BytesPerSec::get)))
    }

    /// A page takes its time on the link, and its time in QEMU and this process.
    fn rate(&self, link_rate: u64, wire_sent: u64) -> u64 {
        if self.after.leaving.get() {
            // No page takes the link.
            return self.speed.get().per_second();
        }
        // As long as pages wait for what the destination has still to tell, neither link nor processor is what they take their time for.
        if link_rate == 0 || self.telling.get() {
            return 0;
        }
        let page = PAGE_SIZE as f64;
        // As long as hardly any page was sent again: what those cost that had to be sent. Pages of zeros say nothing about others.
        let Encoding { same: _, zero: _, copy, image, common, patch, data } = self.encoding.get();
        let first = || (wire_sent as f64 / (copy + image + common + patch + data).max(1) as f64).min(page);
        let cost = self.cost.get().map_or_else(first, |cost| cost as f64);
        let seconds = cost / link_rate as f64 + page / self.speed.get().per_second() as f64;
        (page / seconds) as u64
    }

    /// What may go on the wire per second from here on.
    pub(super) fn set_bandwidth(&self, bandwidth: Option<BytesPerSec>) {
        self.pace.borrow_mut().set(bandwidth);
        self.wake.notify_one();
    }

    /// The VM is about to stop, or stands still: nothing waits any more for the sake of a quiet host.
    pub(super) fn hurry(&self) {
        self.hurried.set(true);
        self.hurry.notify_one();
        self.released.notify_one();
    }

    /// Nothing is read from QEMU for so long, unless there is hurry.
    pub(super) fn hold(&self, time: Duration) {
        self.held_until.set(Instant::now().checked_add(time));
        self.released.notify_one();
    }

    /// What is on the disk may be copied: what is written to it comes by itself.
    pub(super) fn begin_copying(&self) {
        self.begun.set(true);
        self.begins.notify_one();
    }

    pub(super) fn is_begun(&self) -> bool {
        self.begun.get()
    }

    pub(super) async fn wait_for_begin(&self) {
        while !self.begun.get() {
            self.begins.notified().await;
        }
    }

    fn hold_end(&self) -> Option<Instant> {
        self.held_until.get().filter(|until| !self.hurried.get() && *until > Instant::now())
    }

    pub(super) fn is_hurried(&self) -> bool {
        self.hurried.get()
    }

    /// Waits this long, unless there is hurry.
    pub(super) async fn pause(&self, time: Duration) {
        if !self.hurried.get() {
            let _ = tokio::time::timeout(time, self.hurry.notified()).await;
        }
    }

    /// Pages are left from here on, if that is possible.
    pub(super) fn leave(&self) {
        if self.after.can_leave.get() {
            self.after.leaving.set(true);
            self.hurry.notify_one();
        }
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.after.leaving.get()
    }

    pub(super) fn set_can_leave(&self, can: bool) {
        self.after.can_leave.set(can);
    }

    pub(super) fn set_left(&self, pages: u64) {
        self.after.left.set(pages);
    }

    /// The destination is told to go on without these pages.
    pub(super) fn on_switched(&self, pages: u64) {
        self.after.left.set(pages);
        self.after.left_at_switch.set(pages);
        self.after.switched.set(true);
        self.telling.set(false);
    }

    pub(super) fn is_switched(&self) -> bool {
        self.after.switched.get()
    }

    /// The destination's QEMU waits for a page.
    pub(super) fn on_missed(&self) {
        self.after.missed.set(Some(Instant::now()));
    }

    /// Whether it did so lately.
    pub(super) fn is_missing(&self) -> bool {
        self.after.missed.get().is_some_and(|missed| missed.elapsed() < MISSING)
    }

    /// Whether more of what is left may be sent, of which nobody waits for.
    pub(super) fn has_room_after(&self) -> bool {
        let session = self.session.borrow();
        let window = session.window();
        window.has_room() && (!self.is_missing() || window.in_flight() < window.short_limit())
    }

    /// Whether so much is under way that not even what is missed may be added.
    pub(super) fn is_flooded(&self) -> bool {
        self.session.borrow().window().in_flight() >= MOST_UNDER_WAY
    }

    /// Waits until that is so.
    pub(super) async fn wait_for_room_after(&self) {
        while !self.has_room_after() {
            let _ = tokio::time::timeout(MISSING, self.room.notified()).await;
        }
    }

    /// Bytes of QEMU's stream, or of the memory that stands for it, have gone by.
    pub(super) fn on_read(&self, bytes: u64) {
        self.stream_bytes.set(self.stream_bytes.get() + bytes);
    }

    /// So many bytes in the middle of a pass took QEMU and this process so long.
    pub(super) fn on_passed(&self, bytes: u64, time: Duration) {
        self.speed.set(self.speed.get().with(bytes, time));
    }

    /// So many pages were compared.
    pub(super) fn on_compared(&self, pages: usize, time: Duration) {
        self.look_speed.set(self.look_speed.get().with((pages * PAGE_SIZE) as u64, time));
    }

    /// So many pages wait in the feed.
    pub(super) fn set_waiting(&self, pages: usize) {
        self.waiting.set(pages);
    }

    /// So many pages are to be compared once more when the VM stands still.
    pub(super) fn set_looked_at(&self, pages: usize) {
        self.looked_at.set(pages);
    }

    /// The pieces of so many pages are asked for.
    pub(super) fn on_wanted(&self, pages: usize) {
        self.wanted.set(self.wanted.get() + pages);
    }

    /// The pieces of so many pages were told. Whether as many were asked for.
    pub(super) fn on_pieces(&self, pages: usize) -> bool {
        let left = self.wanted.get().checked_sub(pages);
        self.wanted.set(left.unwrap_or(0));
        left.is_some()
    }

    /// The number of a question to the destination's QEMU, unless one is open.
    pub(super) fn ask_qemu(&self) -> Option<u32> {
        let (last, open) = self.question.get();
        if open.is_some() {
            return None;
        }
        let number = OUR_QUESTIONS | (last.wrapping_add(1) & 0xffff);
        self.question.set((number, Some(self.now())));
        Some(number)
    }

    /// It is asked whether it has prepared for post-copy. No other question is open then.
    pub(super) fn on_advised(&self) {
        self.question.set((ADVISED, Some(self.now())));
    }

    /// The destination's QEMU has answered a question: whether it was one of ours, which its peer must not see.
    pub(super) fn on_qemu_answered(&self, number: u32) -> bool {
        let (last, _) = self.question.get();
        if last == number {
            self.question.set((last, None));
        }
        number & 0xffff_0000 == OUR_QUESTIONS
    }

    pub(super) fn on_cost(&self, cost: Option<u64>, encoding: Encoding) {
        self.cost.set(cost);
        self.encoding.set(encoding);
    }

    /// How many of this side's frames the peer is known to have.
    pub(super) fn acknowledged(&self) -> u64 {
        self.session.borrow().acknowledged()
    }

    /// Adds a sequenced frame, which stands for `raw` bytes of memory or stream.
    pub(super) fn push(&self, frame: &Frame, raw: u64) {
        let mut bytes = BytesMut::new();
        frame.encode(&mut bytes);
        self.session.borrow_mut().push(bytes.freeze(), raw, self.now());
        self.wake.notify_one();
    }

    pub(super) fn has_room(&self) -> bool {
        self.session.borrow().window().has_room()
    }

    /// Waits until more may be sent: read from QEMU, or answered.
    pub(super) async fn wait_for_room(&self) {
        while !self.has_room() {
            self.room.notified().await;
        }
    }

    /// Bytes on the wire that the peer has not dealt with.
    pub(super) fn in_flight(&self) -> u64 {
        self.session.borrow().window().in_flight()
    }

    /// Bytes of memory, or of a disk, that they stand for.
    pub(super) fn raw_in_flight(&self) -> u64 {
        self.session.borrow().window().raw_in_flight()
    }

    /// Bytes of a disk that the peer has dealt with, all in all.
    pub(super) fn raw_applied(&self) -> u64 {
        self.session.borrow().window().raw_applied()
    }

    /// The destination begins, or has ended, to tell what it holds.
    pub(super) fn set_telling(&self, telling: bool) {
        self.telling.set(telling);
    }

    /// The peer is at work, although it acknowledges nothing.
    pub(super) fn on_sign_of_work(&self) {
        self.session.borrow_mut().on_sign_of_work(self.now());
    }

    /// Waits as long as another move of the host has its turn.
    pub(super) async fn wait_while_held(&self) {
        while let Some(until) = self.hold_end() {
            tokio::select! {
                () = self.released.notified() => {}
                () = tokio::time::sleep_until(until) => {}
            }
        }
    }

    /// Whether there is no room because of the link, rather than of the work that is left to the destination.
    pub(super) fn is_link_full(&self) -> bool {
        self.session.borrow().window().is_link_full()
    }

    /// A frame of the peer's that took `size` bytes is off the queue. It is acknowledged unless it came to nothing.
    pub(super) fn on_dealt(&self, size: usize, done: bool) {
        self.queued.set(self.queued.get().saturating_sub(size));
        self.drained.notify_one();
        if done {
            self.session.borrow_mut().on_dealt();
            self.wake.notify_one();
        }
    }

    /// What this side says first on a connection.
    pub(super) fn greeting(&self, key: [u8; 32]) -> Greeting {
        Greeting { identity: self.identity, key, taken: self.session.borrow().taken() }
    }

    /// The source's part of a greeting.
    pub(super) async fn greet(&self, connection: &mut Connection, decoder: &mut Decoder, key: [u8; 32]) -> Result<(), PumpError> {
        say(connection, &Frame::Hello(self.greeting(key))).await?;
        let Frame::Welcome(theirs) = next_frame(connection, decoder).await? else {
            return Err(PumpError::Unexpected("no greeting"));
        };
        if (theirs.identity, theirs.key) != (self.identity, key) {
            return Err(PumpError::Identity);
        }
        self.begin(theirs.taken)
    }

    /// The destination's answer to a greeting that it has found right.
    pub(super) async fn welcome(&self, connection: &mut Connection, theirs: Greeting) -> Result<(), PumpError> {
        say(connection, &Frame::Welcome(self.greeting(theirs.key))).await?;
        self.begin(theirs.taken)
    }

    fn begin(&self, taken: u64) -> Result<(), PumpError> {
        let possible = self.session.borrow_mut().on_connected(taken, self.now());
        self.room.notify_one();
        if possible { Ok(()) } else { Err(PumpError::Unexpected("an impossible count")) }
    }

    /// Moves frames over a connection until it is over.
    pub(super) async fn run(&self, connection: Connection, decoder: Decoder, from_agent: &mut mpsc::Receiver<Bytes>) -> PumpError {
        let (reader, writer) = tokio::io::split(connection);
        let life = Life { heard: Cell::new(true), ask: Cell::new(None), asked: Cell::new(None), answer: Cell::new(None) };
        tokio::select! {
            error = self.read_connection(reader, decoder, &life) => error,
            Err(error) = self.write_connection(writer, &life, from_agent) => error,
            error = self.watch_life(&life) => error,
        }
    }

    /// Asks for a sign of life and judges silence, in ticks of its own: time in which this very process stood still does not count.
    async fn watch_life(&self, life: &Life) -> PumpError {
        let KeepAlive { every, silence } = self.keep_alive;
        let mut tick = tokio::time::interval(every);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut silent = Duration::ZERO;
        loop {
            tick.tick().await;
            silent = if life.heard.replace(false) { Duration::ZERO } else { silent + every };
            if silent > silence {
                return PumpError::Silent(silent);
            }
            if life.asked.get().is_none() {
                let number = u64::try_from(self.now().as_micros()).unwrap_or(u64::MAX);
                life.asked.set(Some(number));
                life.ask.set(Some(number));
                self.wake.notify_one();
            }
        }
    }

    async fn read_connection(&self, mut connection: ReadHalf<Connection>, mut decoder: Decoder, life: &Life) -> PumpError {
        loop {
            while self.queued.get() > MAX_QUEUED {
                self.drained.notified().await;
            }
            match next_frame_heard(&mut connection, &mut decoder, &life.heard).await {
                Ok(frame) => {
                    if let Err(error) = self.on_frame(frame, life) {
                        return error;
                    }
                }
                Err(error) => return error,
            }
        }
    }

    fn on_frame(&self, frame: Frame, life: &Life) -> Result<(), PumpError> {
        match (self.side, frame) {
            (_, Frame::Ping(number)) => {
                if life.answer.replace(Some(number)).is_some() {
                    return Err(PumpError::Unexpected("a ping before it had the answer to its last"));
                }
                self.wake.notify_one();
            }
            (_, Frame::Pong(number)) => {
                if life.asked.take() != Some(number) {
                    return Err(PumpError::Unexpected("an answer to no ping of ours"));
                }
                let round_trip = self.now().saturating_sub(Duration::from_micros(number));
                self.session.borrow_mut().on_round_trip(round_trip);
            }
            // Facts are repeated until answered: one that finds no agent may be dropped.
            (_, Frame::Control(message)) => drop(self.to_agent.try_send(message)),
            (_, Frame::Ack(total)) => {
                if !self.session.borrow_mut().on_ack(total, self.now()) {
                    return Err(PumpError::Unexpected("an impossible count"));
                }
                self.room.notify_one();
            }
            (_, Frame::Hello(_) | Frame::Welcome(_)) => return Err(PumpError::Unexpected("a second greeting")),
            (side, frame) if frame.sequenced_by() == Some(side.peer()) => {
                self.session.borrow_mut().on_taken();
                self.queued.set(self.queued.get() + frame.memory());
                let _ = self.frames.send(frame);
            }
            _ => return Err(PumpError::Unexpected("the other side's frame")),
        }
        Ok(())
    }

    async fn write_connection(
        &self,
        mut connection: WriteHalf<Connection>,
        life: &Life,
        from_agent: &mut mpsc::Receiver<Bytes>,
    ) -> Result<Infallible, PumpError> {
        let mut out = BytesMut::new();
        loop {
            self.gather_urgent(life, from_agent, &mut out);
            if out.is_empty()
                && let Some(until) = self.gather(&mut out)
            {
                self.write_until(until, &mut connection, life, from_agent).await?;
            }
            if out.is_empty() {
                tokio::select! {
                    () = self.wake.notified() => {}
                    Some(message) = from_agent.recv() => Frame::Control(message).encode(&mut out),
                }
            }
            write(&mut connection, &mut out).await?;
        }
    }

    /// Writes what cannot wait until bulk may go, at the rate that is allowed.
    async fn write_until(
        &self,
        until: Instant,
        connection: &mut WriteHalf<Connection>,
        life: &Life,
        from_agent: &mut mpsc::Receiver<Bytes>,
    ) -> Result<(), PumpError> {
        let mut out = BytesMut::new();
        while Instant::now() < until {
            tokio::select! {
                () = tokio::time::sleep_until(until) => {}
                () = self.wake.notified() => {}
            }
            self.gather_urgent(life, from_agent, &mut out);
            write(connection, &mut out).await?;
        }
        Ok(())
    }

    fn gather_urgent(&self, life: &Life, from_agent: &mut mpsc::Receiver<Bytes>, out: &mut BytesMut) {
        if let Some(number) = life.answer.take() {
            Frame::Pong(number).encode(out);
        }
        if let Some(number) = life.ask.take() {
            Frame::Ping(number).encode(out);
        }
        if let Some(total) = self.session.borrow_mut().ack_due() {
            Frame::Ack(total).encode(out);
        }
        while let Ok(message) = from_agent.try_recv() {
            Frame::Control(message).encode(out);
        }
    }

    /// Sequenced frames for one write, and the moment from which they may go, unless that is now.
    fn gather(&self, out: &mut BytesMut) -> Option<Instant> {
        while out.len() < GATHER
            && let Some(frame) = self.session.borrow_mut().next_to_send()
        {
            out.extend_from_slice(&frame);
        }
        if out.is_empty() { None } else { self.pace.borrow_mut().take(out.len() as u64) }
    }
}

async fn write<W: AsyncWrite + Unpin>(connection: &mut W, out: &mut BytesMut) -> Result<(), PumpError> {
    if !out.is_empty() {
        connection.write_all(out).await.map_err(PumpError::Connection)?;
        connection.flush().await.map_err(PumpError::Connection)?;
        out.clear();
    }
    Ok(())
}

async fn say(connection: &mut Connection, frame: &Frame) -> Result<(), PumpError> {
    let mut out = BytesMut::new();
    frame.encode(&mut out);
    write(connection, &mut out).await
}

/// The next frame of a connection.
pub(super) async fn next_frame<R: AsyncRead + Unpin>(connection: &mut R, decoder: &mut Decoder) -> Result<Frame, PumpError> {
    next_frame_heard(connection, decoder, &Cell::default()).await
}

/// The next frame; `heard` is set with every byte, since a large frame takes its time on a slow link.
async fn next_frame_heard<R: AsyncRead + Unpin>(
    connection: &mut R,
    decoder: &mut Decoder,
    heard: &Cell<bool>,
) -> Result<Frame, PumpError> {
    loop {
        if let Some(frame) = decoder.next_frame()? {
            return Ok(frame);
        }
        let buffer = decoder.buffer_mut();
        buffer.reserve(READ);
        match connection.read_buf(buffer).await {
            Ok(0) => return Err(PumpError::Closed),
            Ok(_) => heard.set(true),
            // A process that ends does not say goodbye to TLS; every end that counts is a frame of ours.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(PumpError::Closed),
            Err(error) => return Err(PumpError::Connection(error)),
        }
    }
}

/// Keeps a rate on the wire: each piece waits until the pieces before it have had their time.
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

    fn set(&mut self, rate: Option<BytesPerSec>) {
        if self.rate != rate {
            *self = Self::new(rate);
        }
    }

    /// When so many bytes may go.
    fn take(&mut self, bytes: u64) -> Option<Instant> {
        let rate = self.rate?;
        let now = Instant::now();
        self.free_at = self.free_at.max(now.checked_sub(Self::BURST).unwrap_or(now));
        self.free_at += Duration::from_secs_f64(bytes as f64 / rate.get().max(1) as f64);
        (self.free_at > now).then_some(self.free_at)
    }
}
