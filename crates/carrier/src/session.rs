//! A session outlives its connections: what the other side has not dealt with yet is kept, and sent again on the next connection.
//!
//! ```text
//!   push ──▶ [ dealt with, forgotten | under way | not yet sent ] ◀── next_to_send
//!                     on_ack ──▶          ▲
//!            a new connection: back to ───┘  the first that the peer has not dealt with
//! ```
//! Both sides count the sequenced frames of each direction from 0. Every connection begins with how many each side has *taken*: these it
//! holds and deals with, whatever becomes of the connection. An acknowledgement says how many it has *dealt with*.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;

use crate::flow::Window;

/// One side's part of a session.
#[derive(Debug)]
pub struct Session {
    /// Not acknowledged, oldest first.
    kept: VecDeque<Kept>,
    /// Number of the oldest.
    first: u64,
    /// How many of them were given to this connection.
    given: usize,
    /// The highest number that was ever given to any, plus one.
    reached: u64,
    taken: u64,
    dealt: u64,
    told: u64,
    window: Window,
}

#[derive(Debug)]
struct Kept {
    bytes: Bytes,
    raw: u64,
}

impl Session {
    /// A session that begins at `now`, which is a time since any fixed moment, as all times here.
    #[must_use]
    pub fn new(now: Duration) -> Self {
        Self { kept: VecDeque::new(), first: 0, given: 0, reached: 0, taken: 0, dealt: 0, told: 0, window: Window::new(now) }
    }

    /// What is in flight, and how fast it goes.
    #[must_use]
    pub const fn window(&self) -> &Window {
        &self.window
    }

    /// A round trip was measured.
    pub fn on_round_trip(&mut self, round_trip: Duration) {
        self.window.on_round_trip(round_trip);
    }

    /// The peer has shown that it is at work, although it has dealt with nothing.
    pub fn on_sign_of_work(&mut self, now: Duration) {
        self.window.on_sign_of_work(now);
    }

    /// Adds an encoded sequenced frame. `raw` is how much guest memory or stream it stands for.
    pub fn push(&mut self, bytes: Bytes, raw: u64, now: Duration) {
        self.window.on_sent(bytes.len() as u64, raw, now);
        self.kept.push_back(Kept { bytes, raw });
    }

    /// The next frame for this connection.
    pub fn next_to_send(&mut self) -> Option<Bytes> {
        let next = self.kept.get(self.given)?.bytes.clone();
        self.given += 1;
        self.reached = self.reached.max(self.first + self.given as u64);
        Some(next)
    }

    /// Whether every frame has been dealt with by the peer.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.kept.is_empty()
    }

    /// How many frames the peer is known to have taken.
    #[must_use]
    pub const fn acknowledged(&self) -> u64 {
        self.first
    }

    /// The peer has dealt with `total` frames. More than it was ever sent, or fewer than before, is refused: the peer lies.
    #[must_use]
    pub fn on_ack(&mut self, total: u64, now: Duration) -> bool {
        if total > self.reached || total < self.first {
            return false;
        }
        let (mut wire, mut raw) = (0, 0);
        while self.first < total {
            // There are as many as `reached` says.
            let Some(kept) = self.kept.pop_front() else { return false };
            wire += kept.bytes.len() as u64;
            raw += kept.raw;
            self.first += 1;
            self.given = self.given.saturating_sub(1);
        }
        self.window.on_applied(wire, raw, now);
        true
    }

    /// A sequenced frame of the peer has come whole, and is kept until it is dealt with.
    pub const fn on_taken(&mut self) {
        self.taken += 1;
    }

    /// How many sequenced frames of the peer have come: what a greeting says.
    #[must_use]
    pub const fn taken(&self) -> u64 {
        self.taken
    }

    /// A sequenced frame of the peer has been dealt with.
    pub fn on_dealt(&mut self) {
        self.dealt = self.dealt.saturating_add(1).min(self.taken);
    }

    /// What the peer is to be told now, if it does not know it.
    pub fn ack_due(&mut self) -> Option<u64> {
        let due = self.dealt > self.told;
        self.told = self.told.max(self.dealt);
        due.then_some(self.dealt)
    }

    /// A new connection, on which the peer has said that it has `taken` so many, and was told what this side has: all that it has not taken
    /// goes again. Whether that can be.
    #[must_use]
    pub fn on_connected(&mut self, taken: u64, now: Duration) -> bool {
        self.window.on_connected(now);
        let possible = self.on_ack(taken, now);
        self.given = 0;
        self.told = self.taken;
        possible
    }
}

#[cfg(test)]
mod tests;
