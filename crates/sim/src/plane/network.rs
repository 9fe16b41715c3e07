//! Connections, one after the other: the source dials again, the destination takes the newest. What `crates/agent/src/carry/connections.rs` does.

use bytes::BytesMut;
use godwit_carrier::{Decoder, Frame, Greeting};

use godwit_carrier::Side;

use super::Wrong;
use super::carry::{Ended, IDENTITY, KEY, Lost, TICK};
use super::deal;
use super::plan::{MILLISECOND, Micros, SECOND};
use super::rules::Broken;
use super::world::{Event, World};

const FIRST_ATTEMPT: Micros = 25 * SECOND;
const NEXT_DIAL: Micros = SECOND;
const NEXT_ATTEMPT: Micros = 4 * SECOND;
const PAUSE: Micros = 200 * MILLISECOND;
/// Largest single read.
const READ: u64 = 64 << 10;

/// Where the source is with its connection.
#[derive(Debug, Default)]
pub(super) struct Dial {
    /// The connection on which it waits for the answer to its greeting.
    attempt: Option<usize>,
    decoder: Decoder,
    /// It was connected before.
    pub(super) connected: bool,
}

impl World {
    pub(super) fn on_dial(&mut self) {
        if self.source.ended.is_some() || self.source.connection.is_some() || self.dial.attempt.is_some() {
            return;
        }
        if !self.source.is_up(self.now) {
            return self.at(self.source.frozen_until, Event::Dial);
        }
        if self.now < self.wire.down_until() {
            return self.after(NEXT_DIAL, Event::DialFailed);
        }
        let round_trip = 2 * self.wire.latency() + 1;
        if self.destination.ended.is_some() {
            let ended = if self.dial.connected { Ended::PeerGone } else { Ended::NeverConnected };
            return self.end_carry(Side::Source, ended);
        }
        let connection = self.wire.connect();
        self.dial.attempt = Some(connection);
        self.dial.decoder = Decoder::default();
        self.after(round_trip, Event::Established(connection));
        self.after(if self.dial.connected { NEXT_ATTEMPT } else { FIRST_ATTEMPT }, Event::AttemptOver(connection));
    }

    pub(super) fn on_dial_failed(&mut self) {
        if self.dial.connected {
            self.after(PAUSE, Event::Dial);
        } else if self.source.ended.is_none() {
            self.end_carry(Side::Source, Ended::NeverConnected);
        }
    }

    pub(super) fn on_established(&mut self, connection: usize) {
        if self.dial.attempt == Some(connection) && self.source.ended.is_none() {
            let mut hello = BytesMut::new();
            Frame::Hello(self.source.greeting()).encode(&mut hello);
            self.wire.write(connection, Side::Source, &mut hello);
        }
    }

    pub(super) fn on_attempt_over(&mut self, connection: usize) {
        if self.dial.attempt == Some(connection) {
            self.attempt_failed(connection);
        }
    }

    fn attempt_failed(&mut self, connection: usize) {
        self.wire.close(connection, Side::Source);
        self.dial.attempt = None;
        self.on_dial_failed();
    }

    /// A side has no use for a connection any more.
    pub(super) fn lose(&mut self, side: Side, connection: usize) {
        if !self.wire.is_open(connection, side) {
            return;
        }
        if side == Side::Source && self.dial.attempt == Some(connection) {
            return self.attempt_failed(connection);
        }
        self.wire.close(connection, side);
        let carry = self.carry(side);
        if carry.connection == Some(connection) {
            carry.connection = None;
            carry.out.clear();
            if side == Side::Source {
                self.after(PAUSE, Event::Dial);
            }
        }
    }

    /// A carry is over: its sockets close.
    pub(super) fn end_carry(&mut self, side: Side, ended: Ended) {
        let carry = self.carry(side);
        if carry.ended.is_some() {
            return;
        }
        carry.ended = Some(ended);
        for connection in 0..self.wire.count() {
            self.lose(side, connection);
        }
        match side {
            Side::Source => self.source_qemu.hung_up = true,
            Side::Destination => self.destination_qemu.input_ended = true,
        }
    }

    fn lost(&mut self, side: Side, connection: usize, lost: Lost) {
        match lost {
            Lost::Connection => self.lose(side, connection),
            Lost::Session(why) => self.end_carry(side, Ended::Failed(why)),
        }
    }

    pub(super) fn on_link(&mut self, connection: usize, from: Side) {
        self.wire.is_free(connection, from);
        if !self.wire.wants_to_send(connection, from) {
            return;
        }
        let piece = self.wire.send(connection, from, self.now, &mut self.random);
        if let Some(arrives) = piece.arrives {
            self.at(arrives, Event::Arrive(connection, from));
        }
        self.at(piece.next, Event::Link(connection, from));
    }

    pub(super) fn on_tick(&mut self, side: Side, connection: usize) {
        let now = self.now;
        let carry = self.carry(side);
        if carry.connection != Some(connection) || carry.ended.is_some() {
            return;
        }
        if !carry.is_up(now) {
            // Time in which the process stood still itself does not count.
            let until = carry.frozen_until;
            return self.at(until + 1, Event::Tick(side, connection));
        }
        match carry.tick(now) {
            Ok(()) => self.after(TICK, Event::Tick(side, connection)),
            Err(lost) => self.lost(side, connection, lost),
        }
    }

    pub(super) fn can_write(&self, side: Side) -> bool {
        let carry = if side == Side::Source { &self.source } else { &self.destination };
        let has = carry.wake || !carry.out.is_empty();
        carry.is_up(self.now) && has && carry.connection.is_some_and(|connection| self.wire.has_room(connection, side))
    }

    pub(super) fn write(&mut self, side: Side) {
        let carry = match side {
            Side::Source => &mut self.source,
            Side::Destination => &mut self.destination,
        };
        let Some(connection) = carry.connection else { return };
        if carry.out.is_empty() {
            carry.gather();
        }
        self.wire.write(connection, side, &mut carry.out);
    }

    /// The connections that a side reads from: its own, an attempt's, and at the destination those that have not greeted.
    fn readable(&self, side: Side) -> Option<usize> {
        let carry = if side == Side::Source { &self.source } else { &self.destination };
        let own = carry.connection.filter(|connection| carry.has_room() && self.wire.is_readable(*connection, side));
        let other = match side {
            Side::Source => self.dial.attempt.filter(|connection| self.wire.is_readable(*connection, side)),
            Side::Destination => {
                let waits = |connection: &usize| carry.connection != Some(*connection) && self.wire.is_readable(*connection, side);
                (0..self.wire.count()).find(waits)
            }
        };
        own.or(other)
    }

    pub(super) fn can_read(&self, side: Side) -> bool {
        let carry = if side == Side::Source { &self.source } else { &self.destination };
        carry.is_up(self.now) && self.readable(side).is_some()
    }

    pub(super) fn read(&mut self, side: Side) -> Result<(), Broken> {
        let Some(connection) = self.readable(side) else { return Ok(()) };
        let most = self.random.between(1, READ) as usize;
        let Some(data) = self.wire.read(connection, side, most) else {
            self.lose(side, connection);
            return Ok(());
        };
        if self.carry(side).connection == Some(connection) {
            self.on_data(side, connection, &data)?;
            if self.wrong == Wrong::MakesUpTheLastWord && side == Side::Source {
                self.make_up_the_last_word();
            }
            return Ok(());
        }
        match side {
            Side::Source => self.on_answer(connection, &data),
            Side::Destination => self.on_stranger(connection, &data),
        }
    }

    fn on_data(&mut self, side: Side, connection: usize, data: &[u8]) -> Result<(), Broken> {
        let now = self.now;
        self.carry(side).on_heard(data);
        loop {
            let carry = match side {
                Side::Source => &mut self.source,
                Side::Destination => &mut self.destination,
            };
            let frame = match carry.decoder.next_frame() {
                Ok(Some(frame)) => frame,
                Ok(None) => return Ok(()),
                Err(error) => {
                    self.lost(side, connection, Lost::Session(error.to_string()));
                    return Ok(());
                }
            };
            match carry.on_frame(frame, now, &mut self.ledger)? {
                Ok(None) => {}
                Ok(Some(fact)) => self.on_fact(fact as usize),
                Err(lost) => {
                    self.lost(side, connection, lost);
                    return Ok(());
                }
            }
        }
    }

    /// The source's attempt is answered.
    fn on_answer(&mut self, connection: usize, data: &[u8]) -> Result<(), Broken> {
        self.dial.decoder.buffer_mut().extend_from_slice(data);
        match self.dial.decoder.next_frame() {
            Ok(Some(Frame::Welcome(theirs))) if (theirs.identity, theirs.key) == (IDENTITY, KEY) => {
                self.ledger.on_greeted(Side::Source, theirs.taken, &self.destination_qemu.memory)?;
                let decoder = std::mem::take(&mut self.dial.decoder);
                (self.dial.attempt, self.dial.connected) = (None, true);
                self.seen.connections += 1;
                self.seen.kept += self.ledger.under_way(Side::Source);
                if let Err(lost) = self.source.begin(connection, decoder, theirs.taken, self.now) {
                    self.lost(Side::Source, connection, lost);
                    return Ok(());
                }
                self.after(0, Event::Tick(Side::Source, connection));
                // What came together with the greeting.
                self.on_data(Side::Source, connection, &[])
            }
            Ok(None) => Ok(()),
            other => {
                self.lost(Side::Source, connection, Lost::Session(format!("{other:?} for a greeting")));
                Ok(())
            }
        }
    }

    /// A connection that the destination does not know yet.
    fn on_stranger(&mut self, connection: usize, data: &[u8]) -> Result<(), Broken> {
        let stranger = self.wire.connection(connection);
        stranger.greeting.buffer_mut().extend_from_slice(data);
        let Ok(Some(Frame::Hello(Greeting { identity, key, taken }))) = stranger.greeting.next_frame() else { return Ok(()) };
        let decoder = std::mem::take(&mut stranger.greeting);
        let stale = taken < self.destination.session.acknowledged() && self.wrong != Wrong::TakesOldGreetings;
        if (identity, key) != (IDENTITY, KEY) || stale {
            self.wire.close(connection, Side::Destination);
            self.seen.old_greetings += 1;
            return Ok(());
        }
        if let Some(before) = self.destination.connection {
            self.lose(Side::Destination, before);
        }
        let mut welcome = BytesMut::new();
        let mut greeting = self.destination.greeting();
        if self.wrong == Wrong::GreetsWithOneMore {
            greeting.taken += 1;
        }
        Frame::Welcome(greeting).encode(&mut welcome);
        self.wire.write(connection, Side::Destination, &mut welcome);
        if taken >= self.destination.session.acknowledged() {
            self.ledger.on_greeted(Side::Destination, taken, &self.destination_qemu.memory)?;
        }
        if let Err(lost) = self.destination.begin(connection, decoder, taken, self.now) {
            self.lost(Side::Destination, connection, lost);
            return Ok(());
        }
        deal::tell_holdings(self);
        self.after(0, Event::Tick(Side::Destination, connection));
        self.on_data(Side::Destination, connection, &[])
    }
}
