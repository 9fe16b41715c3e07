//! What QEMU's mirror writes to: a disk that takes writes, and gives nothing back.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::MAX_DATA;
use crate::wire::{
    EINVAL, FIXED_NEWSTYLE, MAGIC, MAX_OPTION, Malformed, NO_ZEROES, OPTION, OPTION_REPLY, REQUEST, SIMPLE_REPLY, answer, command,
    flag, info, option,
};

/// What a client wants. Each but the last is answered by [`Server::put_done`] when that is due.
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
    buffer: BytesMut,
    stage: Stage,
}

const OPTION_HEADER: usize = 16;
const REQUEST_HEADER: usize = 28;
/// Smallest and best size of a request.
const LEAST: u32 = 512;
const BEST: u32 = 64 << 10;

impl Server {
    /// Of a disk of `size` bytes; `out` is what is said first.
    pub fn new(export: &str, size: u64, out: &mut BytesMut) -> Self {
        out.put_u64(MAGIC);
        out.put_u64(OPTION);
        out.put_u16(FIXED_NEWSTYLE | NO_ZEROES);
        Self { export: export.to_owned(), size, buffer: BytesMut::new(), stage: Stage::ClientFlags }
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
            // Structured replies among them: there is nothing to read here.
            _ => put_answer(out, option, answer::UNSUPPORTED, &[]),
        }
        Ok(true)
    }

    fn go(&mut self, mut payload: Bytes, out: &mut BytesMut) -> Result<(), Malformed> {
        let name = payload.try_get_u32().ok().filter(|length| *length as usize <= payload.len());
        let Some(length) = name else {
            put_answer(out, option::GO, answer::INVALID, &[]);
            return Ok(());
        };
        if payload.split_to(length as usize) != self.export.as_bytes() {
            put_answer(out, option::GO, answer::UNKNOWN, &[]);
            return Err(Malformed::Export);
        }
        let mut export = BytesMut::new();
        export.put_u16(info::EXPORT);
        export.put_u64(self.size);
        export.put_u16(flag::HAS_FLAGS | flag::FLUSH | flag::TRIM | flag::WRITE_ZEROES);
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
        Ok(match command {
            command::WRITE if inside => Step::Request(Request::Write { cookie, offset, data }),
            // What is not read any more may as well be zero.
            command::WRITE_ZEROES | command::TRIM if inside => Step::Request(Request::Zeroes { cookie, offset, length }),
            command::FLUSH => Step::Request(Request::Flush { cookie }),
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
