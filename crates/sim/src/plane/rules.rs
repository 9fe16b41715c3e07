//! What must be so after every step, and the books that are kept to know it: who sent what, and what the destination must hold after it.

use bytes::Bytes;
use godwit_carrier::pages::{Page, batch};
use godwit_carrier::{Frame, Session};
use godwit_stream::ReturnMessage;

use super::guest::{At, Memory};
use godwit_carrier::Side;

/// Sequenced frames arrive as they were sent, none twice, none lost.
pub const IN_ORDER: &str = "every frame is taken once, in order, as it was sent";
/// Page by page as a frame is dealt with, and all of it when a connection begins and when the device state comes.
pub const MEMORY_FOLLOWS: &str = "the destination's memory is what the source has sent up to there";
/// Byte for byte.
pub const MEMORY_EQUAL: &str = "what the destination loads and runs is the source's memory";
/// An acknowledgement is no promise.
pub const ACKNOWLEDGED_IS_DEALT_WITH: &str = "what is acknowledged has been dealt with";
/// A greeting says what is held, not what is hoped for.
pub const GREETING_IS_TAKEN: &str = "what a greeting says to be taken has come";
/// The session keeps what is not acknowledged, and that is no more than the window and one read.
pub const BOUNDED_SESSION: &str = "what a session keeps is bounded";
/// Signatures and contents.
pub const BOUNDED_ENCODER: &str = "the encoder's memory is bounded";
/// What waits to be dealt with.
pub const BOUNDED_QUEUE: &str = "what waits at a carry is bounded";
/// In order, nothing added, nothing left out but our own answers.
pub const RETURN_PATH: &str = "the source's QEMU hears what the destination's QEMU said, and nothing else";
/// The reader of the destination's QEMU, and its device state.
pub const STREAM: &str = "the destination's QEMU understands what it is given";
/// vCPUs of both sides.
pub const ONE_RUNNER: &str = "at most one QEMU runs the VM";
/// Stop, drain, last byte, release, run.
pub const ORDER: &str =
    "device state leaves after our stop, the release comes after the last byte, and the VM runs after the release";
/// The source's QEMU is ended only then.
pub const NOTHING_REMOVED: &str = "nothing is removed before the other side is proven to run";
/// A crash apart.
pub const NO_END_WITHOUT_CAUSE: &str = "a session does not end unless a process is gone";
/// In simulated time after the last fault.
pub const COMES_TO_AN_END: &str = "the move ends soon after the last fault has healed";
/// And exactly one runs, unless a QEMU that held the VM was killed.
pub const GOOD_END: &str = "both sides agree, and the VM runs";

/// One read from QEMU, what was taken in before it and is not yet in a frame, pages that wait for their pieces and wait no longer, and what
/// stands in no relation to its size: headers of frames and entries.
const ONE_READ: u64 = (256 << 10) * 2 + batch::MAX_PAYLOAD as u64 + (64 << 10) + 1024 * 4096;

/// A rule that was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// Which.
    pub rule: &'static str,
    /// What was seen.
    pub what: String,
}

pub(super) fn broken<T>(rule: &'static str, what: impl Into<String>) -> Result<T, Broken> {
    Err(Broken { rule, what: what.into() })
}

/// A page as the source's QEMU sent it; `None` for zeros.
pub(super) type Write = (At, Option<Bytes>);

struct Sent {
    frame: Frame,
    bytes: u64,
    /// Pages that the destination's memory holds once this is dealt with.
    writes: Vec<Write>,
}

/// What a side has sent, and the other done with it.
#[derive(Default)]
struct Book {
    sent: Vec<Sent>,
    sent_bytes: u64,
    acknowledged: usize,
    acknowledged_bytes: u64,
    taken: usize,
    dealt: usize,
    /// Of the window and what may come on top of it when the last read began.
    allowed: u64,
}

pub(super) struct Ledger {
    books: [Book; 2],
    /// What the destination's memory must be after the frames that it dealt with, where its carry writes it.
    expected: Memory,
    placed: Vec<bool>,
    said: Vec<ReturnMessage>,
    heard: usize,
}

impl Ledger {
    pub(super) fn new(destination: Memory, placed: Vec<bool>, pages: u64) -> Self {
        let mut ledger = Self { books: Default::default(), expected: destination, placed, said: vec![], heard: 0 };
        // Digests, pieces and the answers of QEMU, which wait for no room.
        ledger.books[Side::Destination as usize].allowed = (64 << 10) + (48 + 280) * pages;
        ledger
    }

    pub(super) fn on_pushed(&mut self, from: Side, frame: Frame, bytes: u64, writes: Vec<Write>) {
        let book = &mut self.books[from as usize];
        book.sent_bytes += bytes;
        book.sent.push(Sent { frame, bytes, writes });
    }

    /// A frame of `from` has come whole.
    pub(super) fn on_taken(&mut self, from: Side, frame: &Frame) -> Result<(), Broken> {
        let book = &mut self.books[from as usize];
        if book.sent.get(book.taken).is_none_or(|sent| sent.frame != *frame) {
            return broken(IN_ORDER, format!("number {} of the {from:?}", book.taken));
        }
        book.taken += 1;
        Ok(())
    }

    /// The oldest frame of `from` that was not dealt with has been.
    pub(super) fn on_dealt(&mut self, from: Side, frame: &Frame, destination: &Memory) -> Result<(), Broken> {
        let book = &mut self.books[from as usize];
        let number = book.dealt;
        if book.sent.get(number).is_none_or(|sent| sent.frame != *frame) {
            return broken(IN_ORDER, format!("number {number} of the {from:?} is dealt with out of turn"));
        }
        book.dealt += 1;
        let sent = &mut book.sent[number];
        // The books keep no more than what is under way.
        sent.frame = Frame::HeldEnd;
        let writes = std::mem::take(&mut sent.writes);
        for (at, content) in &writes {
            self.expected.set(*at, content.as_ref().and_then(|content| content.first_chunk()).copied().unwrap_or([0; 4096]));
        }
        // A page may be in a frame twice: the last counts.
        match writes.iter().find(|(at, _)| self.expected.page(*at) != destination.page(*at)) {
            Some((at, _)) => broken(MEMORY_FOLLOWS, format!("page {at:?} after frame {number}")),
            None => Ok(()),
        }
    }

    /// `side` was told that the other has dealt with `total`.
    pub(super) fn on_acknowledged(&mut self, side: Side, total: u64) -> Result<(), Broken> {
        let book = &mut self.books[side as usize];
        if total > book.dealt as u64 {
            return broken(
                ACKNOWLEDGED_IS_DEALT_WITH,
                format!("{total} of the {side:?}'s are acknowledged, {} dealt with", book.dealt),
            );
        }
        book.forget(total);
        Ok(())
    }

    /// `side` was told on a new connection that the other has taken `total`.
    pub(super) fn on_greeted(&mut self, side: Side, total: u64, destination: &Memory) -> Result<(), Broken> {
        let book = &mut self.books[side as usize];
        if total > book.taken as u64 {
            return broken(GREETING_IS_TAKEN, format!("{total} of the {side:?}'s are said to be taken, {} are", book.taken));
        }
        book.forget(total);
        self.check_memory(destination)
    }

    /// Frames of a side that are not acknowledged.
    pub(super) const fn under_way(&self, side: Side) -> u64 {
        let book = &self.books[side as usize];
        (book.sent.len() - book.acknowledged) as u64
    }

    /// The destination's memory was changed behind its carry's back.
    pub(super) fn on_changed(&mut self, at: At, page: Page) {
        self.expected.set(at, page);
    }

    /// All that the destination's carry writes.
    pub(super) fn check_memory(&self, destination: &Memory) -> Result<(), Broken> {
        let differs = |at: &At| self.placed[at.0] && self.expected.page(*at) != destination.page(*at);
        match destination.places().into_iter().find(differs) {
            Some(at) => broken(MEMORY_FOLLOWS, format!("page {at:?}")),
            None => Ok(()),
        }
    }

    /// The source's carry is about to read from QEMU.
    pub(super) fn on_read(&mut self, session: &Session) {
        let book = &mut self.books[Side::Source as usize];
        book.allowed = session.window().limit() + ONE_READ;
    }

    /// What the session keeps is what was pushed and not acknowledged, and no more than it may be.
    pub(super) fn check_session(&self, side: Side, session: &Session) -> Result<(), Broken> {
        let book = &self.books[side as usize];
        let (kept, window) = (book.sent_bytes - book.acknowledged_bytes, session.window().in_flight());
        if kept != window || session.acknowledged() != book.acknowledged as u64 {
            return broken(BOUNDED_SESSION, format!("the {side:?} keeps {window} bytes, {kept} are under way"));
        }
        if kept > book.allowed {
            return broken(BOUNDED_SESSION, format!("the {side:?} keeps {kept} bytes, {} are allowed", book.allowed));
        }
        Ok(())
    }

    /// The destination's QEMU has said something that is not for the carries.
    pub(super) fn on_said(&mut self, message: ReturnMessage) {
        self.said.push(message);
    }

    /// The source's QEMU has heard something.
    pub(super) fn on_heard(&mut self, message: &ReturnMessage) -> Result<(), Broken> {
        if self.said.get(self.heard) != Some(message) {
            return broken(RETURN_PATH, format!("{message:?} as number {}", self.heard));
        }
        self.heard += 1;
        Ok(())
    }
}

impl Book {
    fn forget(&mut self, total: u64) {
        let total = usize::try_from(total).unwrap_or(usize::MAX).min(self.sent.len());
        while self.acknowledged < total {
            self.acknowledged_bytes += self.sent[self.acknowledged].bytes;
            self.acknowledged += 1;
        }
    }
}
