//! What QEMU's mirror writes to, a disk that takes writes and gives nothing back; and what QEMU reads a disk from that is never written.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::wire::{
    EINVAL, EIO, FIXED_NEWSTYLE, MAGIC, MAX_OPTION, Malformed, NO_ZEROES, OPTION, OPTION_REPLY, REQUEST, SIMPLE_REPLY,
    STRUCTURED_REPLY, answer, chunk, command, flag, info, option,
};
use crate::{ALLOCATION, Extent, MAX_DATA};

/// What a client wants. Each but the last is answered when that is due: what reads by [`Server::put_data`], [`Server::put_extent`] or [`Server::put_failed`],
/// all else by [`Server::put_done`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// These bytes.
    Write {
        /// What the answer is for.
        cookie: u64,
        /// Where.
        offset: u64,
        /// What.
        data: Bytes,
    },
    /// Zeros.
    Zeroes {
        /// What the answer is for.
        cookie: u64,
        /// Where.
        offset: u64,
        /// How many.
        length: u32,
    },
    /// Everything durable.
    Flush {
        /// What the answer is for.
        cookie: u64,
    },
    /// What is there, at most [`MAX_DATA`] bytes.
    Read {
        /// What the answer is for.
        cookie: u64,
        /// Where.
        offset: u64,
        /// How many.
        length: u32,
    },
    /// Of which kind the bytes from there on are.
    Status {
        /// What the answer is for.
        cookie: u64,
        /// Where.
        offset: u64,
        /// How many at most.
        length: u32,
    },
    /// It is through.
    Disconnect,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    ClientFlags,
    Options,
    Requests,
    Ended,
}

/// The server of one connection.
#[derive(Debug)]
pub struct Server {
    export: String,
    size: u64,
    reads: bool,
    /// What the client has chosen, where it reads.
    is_structured: bool,
    tells_extents: bool,
    buffer: BytesMut,
    stage: Stage,
}

/// The number of the one kind of extents that is told.
const CONTEXT: u32 = 1;
const OPTION_HEADER: usize = 16;
const REQUEST_HEADER: usize = 28;
/// Smallest and best size of a request.
const LEAST: u32 = 512;
const BEST: u32 = 64 << 10;

impl Server {
    /// Of a disk of `size` bytes that takes writes; `out` is what is said first.
    pub fn new(export: &str, size: u64, out: &mut BytesMut) -> Self {
        Self::begin(export, size, false, out)
    }

    /// The same of one that is read alone.
    pub fn of_reads(export: &str, size: u64, out: &mut BytesMut) -> Self {
        Self::begin(export, size, true, out)
    }

    fn begin(export: &str, size: u64, reads: bool, out: &mut BytesMut) -> Self {
        out.put_u64(MAGIC);
        out.put_u64(OPTION);
        out.put_u16(FIXED_NEWSTYLE | NO_ZEROES);
        let (export, buffer, stage) = (export.to_owned(), BytesMut::new(), Stage::ClientFlags);
        Self { export, size, reads, is_structured: false, tells_extents: false, buffer, stage }
    }

    /// The buffer to read the connection into.
    pub fn buffer_mut(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// The next request, or `None` until more bytes are there. Answers that are due at once go to `out`.
    ///
    /// # Errors
    /// [`Malformed`]: there is no way on.
    pub fn next_request(&mut self, out: &mut BytesMut) -> Result<Option<Request>, Malformed> {
        loop {
            match self.stage {
                Stage::ClientFlags => {
                    if self.buffer.len() < 4 {
                        return Ok(None);
                    }
                    let flags = self.buffer.get_u32();
                    // Whoever does not know them would be sent padding.
                    if flags != u32::from(FIXED_NEWSTYLE | NO_ZEROES) {
                        return Err(Malformed::Greeting);
                    }
                    self.stage = Stage::Options;
                }
                Stage::Options => {
                    if !self.option(out)? {
                        return Ok(None);
                    }
                }
                Stage::Requests => match self.request(out)? {
                    Step::Wait => return Ok(None),
                    Step::Refused => {}
                    Step::Request(request) => return Ok(Some(request)),
                },
                Stage::Ended => return Ok(None),
            }
        }
    }

    /// A request was carried out.
    pub fn put_done(out: &mut BytesMut, cookie: u64) {
        put_reply(out, 0, cookie);
    }

    /// What was read, all of it.
    ///
    /// # Panics
    /// With more than [`MAX_DATA`] bytes: no request is for more.
    pub fn put_data(&self, out: &mut BytesMut, cookie: u64, offset: u64, data: &[u8]) {
        assert!(data.len() <= MAX_DATA as usize, "nobody may ask for as much");
        if self.is_structured {
            put_chunk(out, chunk::DATA, cookie, 8 + data.len());
            out.put_u64(offset);
        } else {
            put_reply(out, 0, cookie);
        }
        out.put_slice(data);
    }

    /// Of which kind the first bytes are that were asked for.
    pub fn put_extent(out: &mut BytesMut, cookie: u64, extent: Extent) {
        put_chunk(out, chunk::STATUS, cookie, 12);
        out.put_u32(CONTEXT);
        out.put_u32(extent.length);
        out.put_u32(extent.flags);
    }

    /// What was asked for cannot be read.
    pub fn put_failed(&self, out: &mut BytesMut, cookie: u64) {
        if self.is_structured {
            put_chunk(out, chunk::FAILED, cookie, 6);
            out.put_u32(EIO);
            out.put_u16(0);
        } else {
            put_reply(out, EIO, cookie);
        }
    }

    /// Whether there was a whole option.
    fn option(&mut self, out: &mut BytesMut) -> Result<bool, Malformed> {
        let Some((mut header, _)) = self.buffer.split_first_chunk::<OPTION_HEADER>().map(|(header, rest)| (&header[..], rest))
        else {
            return Ok(false);
        };
        let (magic, option, length) = (header.get_u64(), header.get_u32(), header.get_u32());
        if magic != OPTION {
            return Err(Malformed::Magic(magic));
        }
        if length > MAX_OPTION {
            return Err(Malformed::Length(length));
        }
        let size = length as usize;
        if self.buffer.len() < OPTION_HEADER + size {
            return Ok(false);
        }
        self.buffer.advance(OPTION_HEADER);
        let payload = self.buffer.split_to(size).freeze();
        match option {
            option::GO => self.go(payload, out)?,
            option::ABORT => return Err(Malformed::Aborted),
            option::STRUCTURED_REPLY if self.reads => {
                self.is_structured = true;
                put_answer(out, option, answer::ACK, &[]);
            }
            option::SET_META_CONTEXT if self.is_structured => self.choose_kinds(payload, out),
            // Structured replies among them, where there is nothing to read.
            _ => put_answer(out, option, answer::UNSUPPORTED, &[]),
        }
        Ok(true)
    }

    /// A client names kinds of extents; one is known.
    fn choose_kinds(&mut self, mut payload: Bytes, out: &mut BytesMut) {
        let mut kinds = || {
            let export = take_text(&mut payload)?;
            let count = payload.try_get_u32().ok()?;
            // Each takes four bytes at least.
            let fits = count as usize <= payload.len() / 4;
            let kinds: Option<Vec<Bytes>> = fits.then(|| (0..count).map(|_| take_text(&mut payload)).collect())?;
            kinds.filter(|_| payload.is_empty() && export == self.export.as_bytes())
        };
        let Some(kinds) = kinds() else { return put_answer(out, option::SET_META_CONTEXT, answer::INVALID, &[]) };
        self.tells_extents = kinds.iter().any(|kind| kind == ALLOCATION.as_bytes());
        if self.tells_extents {
            let mut context = BytesMut::new();
            context.put_u32(CONTEXT);
            context.put_slice(ALLOCATION.as_bytes());
            put_answer(out, option::SET_META_CONTEXT, answer::META_CONTEXT, &context);
        }
        put_answer(out, option::SET_META_CONTEXT, answer::ACK, &[]);
    }

    fn go(&mut self, mut payload: Bytes, out: &mut BytesMut) -> Result<(), Malformed> {
        let Some(name) = take_text(&mut payload) else {
            put_answer(out, option::GO, answer::INVALID, &[]);
            return Ok(());
        };
        if name != self.export.as_bytes() {
            put_answer(out, option::GO, answer::UNKNOWN, &[]);
            return Err(Malformed::Export);
        }
        let mut export = BytesMut::new();
        export.put_u16(info::EXPORT);
        export.put_u64(self.size);
        let can = if self.reads { flag::READ_ONLY } else { flag::FLUSH | flag::TRIM | flag::WRITE_ZEROES };
        export.put_u16(flag::HAS_FLAGS | can);
        put_answer(out, option::GO, answer::INFO, &export);
        let mut sizes = BytesMut::new();
        sizes.put_u16(info::BLOCK_SIZE);
        for size in [LEAST, BEST, MAX_DATA] {
            sizes.put_u32(size);
        }
        put_answer(out, option::GO, answer::INFO, &sizes);
        put_answer(out, option::GO, answer::ACK, &[]);
        self.stage = Stage::Requests;
        Ok(())
    }

    fn request(&mut self, out: &mut BytesMut) -> Result<Step, Malformed> {
        let Some(mut header) = self.buffer.first_chunk::<REQUEST_HEADER>().map(|header| &header[..]) else { return Ok(Step::Wait) };
        let (magic, _flags, command) = (header.get_u32(), header.get_u16(), header.get_u16());
        let (cookie, offset, length) = (header.get_u64(), header.get_u64(), header.get_u32());
        if magic != REQUEST {
            return Err(Malformed::Magic(magic.into()));
        }
        let mut size = REQUEST_HEADER;
        if command == command::WRITE {
            if length > MAX_DATA {
                return Err(Malformed::Length(length));
            }
            size += length as usize;
        }
        if self.buffer.len() < size {
            self.buffer.reserve(size - self.buffer.len());
            return Ok(Step::Wait);
        }
        self.buffer.advance(REQUEST_HEADER);
        let data = self.buffer.split_to(size - REQUEST_HEADER).freeze();
        let inside = offset.checked_add(length.into()).is_some_and(|end| end <= self.size) && length > 0;
        let (reads, writes) = (inside && self.reads, inside && !self.reads);
        Ok(match command {
            command::READ if reads && length <= MAX_DATA => Step::Request(Request::Read { cookie, offset, length }),
            command::BLOCK_STATUS if reads && self.tells_extents => Step::Request(Request::Status { cookie, offset, length }),
            // A simple reply to a read would not be one here.
            command::READ if self.is_structured => return Err(Malformed::Length(length)),
            command::WRITE if writes => Step::Request(Request::Write { cookie, offset, data }),
            // What is not read any more may as well be zero.
            command::WRITE_ZEROES | command::TRIM if writes => Step::Request(Request::Zeroes { cookie, offset, length }),
            command::FLUSH if !self.reads => Step::Request(Request::Flush { cookie }),
            command::DISCONNECT => {
                self.stage = Stage::Ended;
                Step::Request(Request::Disconnect)
            }
            _ => {
                put_reply(out, EINVAL, cookie);
                Step::Refused
            }
        })
    }
}

enum Step {
    Wait,
    Refused,
    Request(Request),
}

/// A length, and so many bytes.
fn take_text(payload: &mut Bytes) -> Option<Bytes> {
    let length = payload.try_get_u32().ok().filter(|length| *length as usize <= payload.len())?;
    Some(payload.split_to(length as usize))
}

/// The only chunk of a reply, but for its payload.
fn put_chunk(out: &mut BytesMut, kind: u16, cookie: u64, length: usize) {
    out.put_u32(STRUCTURED_REPLY);
    out.put_u16(chunk::DONE);
    out.put_u16(kind);
    out.put_u64(cookie);
    out.put_u32(u32::try_from(length).expect("chunks are short"));
}

fn put_reply(out: &mut BytesMut, error: u32, cookie: u64) {
    out.put_u32(SIMPLE_REPLY);
    out.put_u32(error);
    out.put_u64(cookie);
}

fn put_answer(out: &mut BytesMut, option: u32, kind: u32, payload: &[u8]) {
    out.put_u64(OPTION_REPLY);
    out.put_u32(option);
    out.put_u32(kind);
    out.put_u32(u32::try_from(payload.len()).expect("answers are short"));
    out.put_slice(payload);
}
