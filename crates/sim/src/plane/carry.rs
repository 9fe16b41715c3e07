//! A carry's side of a session, around the real [`Session`] and [`Decoder`]: what `crates/agent/src/carry/pump.rs` does, in simulated time.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use godwit_carrier::{Decoder, Frame, Greeting, Identity, Session};

use godwit_carrier::Side;

use super::Wrong;
use super::plan::{Micros, Plan, SECOND};
use super::rules::{BOUNDED_QUEUE, Broken, Ledger, Write, broken};

/// What is written to a connection at once.
const GATHER: usize = 64 << 10;
/// Between two looks at the peer's life, and how long it may be silent.
pub(super) const TICK: Micros = SECOND;
const SILENCE: Micros = 5 * SECOND;
const LARGEST: usize = 512 << 10;
/// Facts that wait for a connection.
const MOST_FACTS: usize = 64;

/// What both carries know of the move.
pub(super) const IDENTITY: Identity = Identity { vm: [1; 16], task: [2; 16], generation: 3, lane: 0 };
pub(super) const KEY: [u8; 32] = [4; 32];

/// Why a carry goes no further.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// It was killed, or its agent needs it no longer.
    Gone,
    /// The other's is.
    PeerGone,
    /// Its QEMU is, whose memory it would write to.
    QemuGone,
    /// Nobody was reached the first time.
    NeverConnected,
    /// What must not happen.
    Failed(String),
}

/// How a connection ends.
pub(super) enum Lost {
    /// Another may go on.
    Connection,
    /// None may.
    Session(String),
}

/// Signs of life of one connection.
#[derive(Debug, Default)]
struct Life {
    heard: bool,
    ask: Option<u64>,
    asked: Option<u64>,
    answer: Option<u64>,
    silent: Micros,
}

pub(super) struct Carry {
    pub(super) side: Side,
    pub(super) ended: Option<Ended>,
    pub(super) frozen_until: Micros,
    pub(super) session: Session,
    /// The connection that counts.
    pub(super) connection: Option<usize>,
    pub(super) decoder: Decoder,
    /// What is being written to it.
    pub(super) out: BytesMut,
    life: Life,
    /// Frames that were taken and not dealt with.
    pub(super) queue: VecDeque<Frame>,
    queued: usize,
    most_queued: usize,
    facts: VecDeque<Bytes>,
    /// Something is to be written.
    pub(super) wake: bool,
    wrong: Wrong,
}

pub(super) const fn at(now: Micros) -> Duration {
    Duration::from_micros(now)
}

impl Carry {
    pub(super) fn new(side: Side, plan: &Plan, wrong: Wrong) -> Self {
        Self {
            side,
            ended: None,
            frozen_until: 0,
            session: Session::new(Duration::ZERO),
            connection: None,
            decoder: Decoder::default(),
            out: BytesMut::new(),
            life: Life::default(),
            queue: VecDeque::new(),
            queued: 0,
            most_queued: plan.most_queued,
            facts: VecDeque::new(),
            wake: false,
            wrong,
        }
    }

    /// Whether it can do anything now.
    pub(super) const fn is_up(&self, now: Micros) -> bool {
        self.ended.is_none() && now >= self.frozen_until
    }

    pub(super) fn greeting(&self) -> Greeting {
        Greeting { identity: IDENTITY, key: KEY, taken: self.session.taken() }
    }

    /// Adds a sequenced frame.
    pub(super) fn push(&mut self, frame: Frame, raw: u64, writes: Vec<Write>, now: Micros, ledger: &mut Ledger) {
        let mut bytes = BytesMut::new();
        frame.encode(&mut bytes);
        let length = bytes.len() as u64;
        self.session.push(bytes.freeze(), raw, at(now));
        ledger.on_pushed(self.side, frame, length, writes);
        self.wake = true;
    }

    pub(super) fn say_fact(&mut self, number: u64) {
        if self.facts.len() < MOST_FACTS {
            self.facts.push_back(Bytes::copy_from_slice(&number.to_be_bytes()));
            self.wake = true;
        }
    }

    /// A connection on which both have greeted.
    pub(super) fn begin(&mut self, connection: usize, mut decoder: Decoder, taken: u64, now: Micros) -> Result<(), Lost> {
        if self.wrong == Wrong::KeepsHalfAFrame {
            self.decoder.buffer_mut().extend_from_slice(&decoder.buffer_mut().split());
        } else {
            self.decoder = decoder;
        }
        self.life = Life { heard: true, ..Life::default() };
        self.connection = Some(connection);
        self.wake = true;
        let possible = if self.wrong == Wrong::SendsNothingAgain {
            self.session.on_ack(taken, at(now))
        } else {
            self.session.on_connected(taken, at(now))
        };
        if self.wrong == Wrong::SkipsOneWhenSendingAgain && self.side == Side::Source && taken > 0 {
            self.session.next_to_send();
        }
        if self.wrong == Wrong::DealsWithNewestFirst {
            self.queue.rotate_right(usize::from(!self.queue.is_empty()));
        }
        if possible { Ok(()) } else { Err(Lost::Session("an impossible count".into())) }
    }

    /// Fills `out` if there is anything to be written.
    pub(super) fn gather(&mut self) {
        if let Some(number) = self.life.answer.take() {
            Frame::Pong(number).encode(&mut self.out);
        }
        if let Some(number) = self.life.ask.take() {
            Frame::Ping(number).encode(&mut self.out);
        }
        if let Some(total) = self.session.ack_due() {
            Frame::Ack(total).encode(&mut self.out);
        }
        while let Some(fact) = self.facts.pop_front() {
            Frame::Control(fact).encode(&mut self.out);
        }
        if self.out.is_empty() {
            while self.out.len() < GATHER
                && let Some(frame) = self.session.next_to_send()
            {
                self.out.extend_from_slice(&frame);
            }
        }
        self.wake = !self.out.is_empty();
    }

    /// A second has passed on this connection.
    pub(super) fn tick(&mut self, now: Micros) -> Result<(), Lost> {
        self.life.silent = if std::mem::take(&mut self.life.heard) { 0 } else { self.life.silent + TICK };
        if self.life.silent > SILENCE {
            return Err(Lost::Connection);
        }
        if self.life.asked.is_none() {
            (self.life.asked, self.life.ask, self.wake) = (Some(now), Some(now), true);
        }
        Ok(())
    }

    /// Whether it would read from its connection.
    pub(super) const fn has_room(&self) -> bool {
        self.queued <= self.most_queued
    }

    pub(super) fn on_heard(&mut self, data: &[u8]) {
        self.life.heard = true;
        self.decoder.buffer_mut().extend_from_slice(data);
    }

    /// Deals with a frame that came, but for those that wait in the queue; a fact is passed on.
    pub(super) fn on_frame(&mut self, frame: Frame, now: Micros, ledger: &mut Ledger) -> Result<Result<Option<u64>, Lost>, Broken> {
        let lost = |why: &str| Ok(Err(Lost::Session(why.into())));
        match (self.side, frame) {
            (_, Frame::Ping(number)) => {
                if self.life.answer.replace(number).is_some() {
                    return lost("a ping before it had the answer to its last");
                }
                self.wake = true;
            }
            (_, Frame::Pong(number)) => {
                if self.life.asked.take() != Some(number) {
                    return lost("an answer to no ping of ours");
                }
                self.session.on_round_trip(at(now - number));
            }
            (_, Frame::Control(fact)) => return Ok(Ok(fact.first_chunk().map(|bytes| u64::from_be_bytes(*bytes)))),
            (_, Frame::Ack(total)) => {
                if !self.session.on_ack(total, at(now)) {
                    return lost("an impossible count");
                }
                ledger.on_acknowledged(self.side, total)?;
            }
            (side, frame) if frame.sequenced_by() == Some(side.peer()) => {
                ledger.on_taken(self.side.peer(), &frame)?;
                self.session.on_taken();
                if self.wrong == Wrong::AcknowledgesWhatWaits {
                    self.session.on_dealt();
                    self.wake = true;
                }
                self.queued += frame.memory();
                self.queue.push_back(frame);
                if self.queued > self.most_queued + LARGEST {
                    return broken(BOUNDED_QUEUE, format!("{} bytes wait at the {:?}", self.queued, self.side));
                }
            }
            _ => return lost("a frame that is not its part"),
        }
        Ok(Ok(None))
    }

    /// A frame is off the queue; it is acknowledged unless it came to nothing.
    pub(super) fn on_dealt(&mut self, frame: &Frame, done: bool) {
        self.queued = self.queued.saturating_sub(frame.memory());
        if done && self.wrong != Wrong::AcknowledgesWhatWaits {
            self.session.on_dealt();
            self.wake = true;
        }
    }
}
