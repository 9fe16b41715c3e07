//! The link between the hosts: connections whose bytes arrive in pieces of any size, late, slowly, or never.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use godwit_carrier::Decoder;

use godwit_carrier::Side;

use super::plan::{Micros, Plan, SECOND, SIDES};
use super::random::Random;

/// What the receiver's kernel keeps until the process reads.
const RECEIVE: usize = 256 << 10;

/// One direction of a connection.
#[derive(Debug, Default)]
struct Pipe {
    /// Written and not yet on the wire.
    socket: BytesMut,
    /// On the wire, with the time of arrival; `None` is the end.
    flying: VecDeque<(Micros, Option<Bytes>)>,
    flying_bytes: usize,
    last_arrival: Micros,
    /// Arrived and not yet read.
    inbox: BytesMut,
    ended: bool,
    /// The sender has closed.
    closing: bool,
    /// Nothing arrives any more, and nobody is told.
    silent: bool,
    /// The first piece arrives that much later than it should.
    late: Micros,
    /// An event for the next piece is under way.
    scheduled: bool,
}

/// A connection.
#[derive(Debug, Default)]
pub(super) struct Connection {
    pipes: [Pipe; 2],
    /// The side has closed it, or knows that it is broken.
    dropped: [bool; 2],
    /// The destination's reader until it was greeted.
    pub(super) greeting: Decoder,
}

/// When the next piece may be sent, and when the one that was sent arrives.
pub(super) struct Piece {
    pub(super) next: Micros,
    pub(super) arrives: Option<Micros>,
}

pub(super) struct Wire {
    connections: Vec<Connection>,
    rate: u64,
    latency: Micros,
    chunk: u64,
    buffer: usize,
    slow: (u64, Micros),
    down_until: Micros,
    /// The next connection's greeting arrives that much later.
    pub(super) late: Micros,
}

impl Wire {
    pub(super) fn new(plan: &Plan) -> Self {
        Self {
            connections: vec![],
            rate: plan.rate,
            latency: plan.latency,
            chunk: plan.chunk,
            buffer: plan.buffer,
            slow: (0, 0),
            down_until: 0,
            late: 0,
        }
    }

    pub(super) const fn latency(&self) -> Micros {
        self.latency
    }

    pub(super) const fn down_until(&self) -> Micros {
        self.down_until
    }

    pub(super) fn take_down(&mut self, until: Micros) {
        self.down_until = self.down_until.max(until);
    }

    pub(super) const fn slow_down(&mut self, rate: u64, until: Micros) {
        self.slow = (rate, until);
    }

    pub(super) fn connect(&mut self) -> usize {
        let mut connection = Connection::default();
        connection.pipes[Side::Source as usize].late = std::mem::take(&mut self.late);
        self.connections.push(connection);
        self.connections.len() - 1
    }

    pub(super) fn connection(&mut self, number: usize) -> &mut Connection {
        &mut self.connections[number]
    }

    pub(super) const fn count(&self) -> usize {
        self.connections.len()
    }

    /// Takes from `out` what there is room for.
    pub(super) fn write(&mut self, number: usize, from: Side, out: &mut BytesMut) {
        let pipe = &mut self.connections[number].pipes[from as usize];
        let room = self.buffer.saturating_sub(pipe.socket.len()).min(out.len());
        pipe.socket.extend_from_slice(&out.split_to(room));
    }

    /// Whether the side can still use it.
    pub(super) fn is_open(&self, number: usize, side: Side) -> bool {
        !self.connections[number].dropped[side as usize]
    }

    /// The side closes it: what it wrote still arrives.
    pub(super) fn close(&mut self, number: usize, side: Side) {
        let connection = &mut self.connections[number];
        connection.dropped[side as usize] = true;
        connection.pipes[side as usize].closing = true;
    }

    /// It breaks: all that is under way is lost.
    pub(super) fn cut(&mut self, number: usize) {
        for pipe in &mut self.connections[number].pipes {
            pipe.socket.clear();
            pipe.flying.clear();
            (pipe.flying_bytes, pipe.silent) = (0, true);
        }
    }

    /// What the side sends arrives no more.
    pub(super) fn silence(&mut self, number: usize, from: Side) {
        let pipe = &mut self.connections[number].pipes[from as usize];
        pipe.flying.clear();
        (pipe.flying_bytes, pipe.silent) = (0, true);
    }

    /// Directions that have something to send and no event for it.
    pub(super) fn idle_pipes(&mut self) -> Vec<(usize, Side)> {
        let mut found = vec![];
        for number in 0..self.connections.len() {
            for side in SIDES {
                if !self.connections[number].pipes[side as usize].scheduled && self.wants_to_send(number, side) {
                    self.connections[number].pipes[side as usize].scheduled = true;
                    found.push((number, side));
                }
            }
        }
        found
    }

    pub(super) fn wants_to_send(&self, number: usize, from: Side) -> bool {
        let connection = &self.connections[number];
        let pipe = &connection.pipes[from as usize];
        let waits = !pipe.socket.is_empty() && pipe.flying_bytes + pipe.inbox.len() < RECEIVE;
        let ends = pipe.closing && pipe.socket.is_empty();
        !pipe.silent && !connection.dropped[from.peer() as usize] && (waits || ends)
    }

    /// Whether the sender's socket takes more.
    pub(super) fn has_room(&self, number: usize, from: Side) -> bool {
        self.connections[number].pipes[from as usize].socket.len() < self.buffer
    }

    /// Puts a piece on the wire.
    pub(super) fn send(&mut self, number: usize, from: Side, now: Micros, random: &mut Random) -> Piece {
        if now < self.down_until {
            self.connections[number].pipes[from as usize].scheduled = true;
            return Piece { next: self.down_until + random.below(SECOND), arrives: None };
        }
        let rate = if now < self.slow.1 { self.slow.0 } else { self.rate };
        let pipe = &mut self.connections[number].pipes[from as usize];
        let most = if random.one_in(4) { random.between(1, 64) } else { random.between(1, self.chunk) };
        let piece = pipe.socket.split_to(pipe.socket.len().min(most as usize)).freeze();
        let next = now + 1 + piece.len() as u64 * SECOND / rate;
        let jitter = random.below(1 + self.latency / 4);
        let arrives = (next + self.latency + jitter + std::mem::take(&mut pipe.late)).max(pipe.last_arrival + 1);
        pipe.last_arrival = arrives;
        pipe.flying_bytes += piece.len();
        let end = piece.is_empty();
        pipe.flying.push_back((arrives, if end { None } else { Some(piece) }));
        // One end is enough.
        pipe.closing &= !end;
        pipe.scheduled = true;
        Piece { next, arrives: Some(arrives) }
    }

    /// The time for the next piece has come.
    pub(super) fn is_free(&mut self, number: usize, from: Side) {
        self.connections[number].pipes[from as usize].scheduled = false;
    }

    /// Takes in what has arrived by now; when to look again if the link is down.
    pub(super) fn arrive(&mut self, number: usize, from: Side, now: Micros) -> Option<Micros> {
        if now < self.down_until {
            return Some(self.down_until + 1);
        }
        let pipe = &mut self.connections[number].pipes[from as usize];
        while let Some((at, _)) = pipe.flying.front()
            && *at <= now
        {
            match pipe.flying.pop_front() {
                Some((_, Some(piece))) => {
                    pipe.flying_bytes -= piece.len();
                    pipe.inbox.extend_from_slice(&piece);
                }
                _ => pipe.ended = true,
            }
        }
        None
    }

    /// Whether there is something to read, or the end.
    pub(super) fn is_readable(&self, number: usize, side: Side) -> bool {
        let pipe = &self.connections[number].pipes[side.peer() as usize];
        !self.connections[number].dropped[side as usize] && (!pipe.inbox.is_empty() || pipe.ended)
    }

    /// Reads what has arrived, at most `most`; `None` at the end.
    pub(super) fn read(&mut self, number: usize, side: Side, most: usize) -> Option<BytesMut> {
        let pipe = &mut self.connections[number].pipes[side.peer() as usize];
        let count = pipe.inbox.len().min(most);
        if count == 0 && pipe.ended { None } else { Some(pipe.inbox.split_to(count)) }
    }
}
