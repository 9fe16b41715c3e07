//! What reads and writes a disk of QEMU.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::MAX_DATA;
use crate::wire::{
    FIXED_NEWSTYLE, MAGIC, MAX_OPTION, Malformed, NO_ZEROES, OPTION, OPTION_REPLY, SIMPLE_REPLY, STRUCTURED_REPLY, answer, chunk,
    flag, info, option,
};

/// A part of a disk that is of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub length: u32,
    /// What is true of it, as the kind of extents defines. Of [`crate::ALLOCATION`]: bit 0 a hole, bit 1 zeros. Of a dirty bitmap: bit 0 dirty.
    pub flags: u32,
}

impl Extent {
    /// Of [`crate::ALLOCATION`]: whether it reads as zeros.
    #[must_use]
    pub const fn is_zero(self) -> bool {
        self.flags & 2 != 0
    }

    /// Of a dirty bitmap: whether it was written to.
    #[must_use]
    pub const fn is_dirty(self) -> bool {
        self.flags & 1 != 0
    }
}

/// What a server says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The handshake is over, and requests may be made.
    Ready {
        /// Of the disk, in bytes.
        size: u64,
    },
    /// A part of what was asked for.
    Data {
        /// Of the request.
        cookie: u64,
        /// Where it is on the disk.
        offset: u64,
        /// What is there.
        data: Bytes,
    },
    /// The same, of zeros.
    Hole {
        /// Of the request.
        cookie: u64,
        /// Where it is on the disk.
        offset: u64,
        /// How many.
        length: u32,
    },
    /// Extents, from the request's offset on.
    Status {
        /// Of the request.
        cookie: u64,
        /// Of which kind: its place in what [`Client::new`] was given.
        kind: usize,
        /// At least one.
        extents: Vec<Extent>,
    },
    /// The request is done.
    Done {
        /// Of the request.
        cookie: u64,
    },
    /// It failed.
    Failed {
        /// Of the request.
        cookie: u64,
        /// Why, as the protocol numbers it.
        error: u32,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Greeting,
    Structured,
    Contexts,
    Go,
    Replies,
}

/// The client of one connection.
#[derive(Debug)]
pub struct Client {
    export: String,
    kinds: Vec<String>,
    /// Number that the server gave each of them.
    contexts: Vec<Option<u32>>,
    writes: bool,
    buffer: BytesMut,
    stage: Stage,
    size: Option<u64>,
    /// A chunk was not the last of its reply: what comes next is something more, or an end.
    ended: Option<Event>,
}

const GREETING: usize = 18;
const ANSWER_HEADER: usize = 20;
const SIMPLE: usize = 16;
const STRUCTURED: usize = 20;
/// Beyond its data a chunk has an offset; and extents are 8 bytes each.
const MAX_CHUNK: u32 = MAX_DATA + 64;

impl Client {
    /// Of an export with these kinds of extents, each of which the server must have; and whether it is to be written to.
    #[must_use]
    pub fn new(export: &str, kinds: Vec<String>, writes: bool) -> Self {
        let contexts = vec![None; kinds.len()];
        let (export, buffer) = (export.to_owned(), BytesMut::new());
        Self { export, kinds, contexts, writes, buffer, stage: Stage::Greeting, size: None, ended: None }
    }

    /// The buffer to read the connection into.
    pub fn buffer_mut(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// What the server said next, or `None` until more bytes are there. What the handshake has to say goes to `out`.
    ///
    /// # Errors
    /// [`Malformed`]: there is no way on.
    pub fn next_event(&mut self, out: &mut BytesMut) -> Result<Option<Event>, Malformed> {
        if let Some(event) = self.ended.take() {
            return Ok(Some(event));
        }
        loop {
            match self.stage {
                Stage::Greeting => {
                    let Some(mut greeting) = self.buffer.first_chunk::<GREETING>().map(|greeting| &greeting[..]) else {
                        return Ok(None);
                    };
                    let flags = FIXED_NEWSTYLE | NO_ZEROES;
                    if (greeting.get_u64(), greeting.get_u64()) != (MAGIC, OPTION) || greeting.get_u16() & flags != flags {
                        return Err(Malformed::Greeting);
                    }
                    self.buffer.advance(GREETING);
                    out.put_u32(flags.into());
                    put_option(out, option::STRUCTURED_REPLY, &[]);
                    self.stage = Stage::Structured;
                }
                Stage::Structured | Stage::Contexts | Stage::Go => {
                    let Some((kind, payload)) = self.answer()? else { return Ok(None) };
                    if let Some(event) = self.on_answer(kind, payload, out)? {
                        return Ok(Some(event));
                    }
                }
                Stage::Replies => {
                    let Some(&[a, b, c, d]) = self.buffer.first_chunk::<4>() else { return Ok(None) };
                    return match u32::from_be_bytes([a, b, c, d]) {
                        SIMPLE_REPLY => Ok(self.simple_reply()),
                        STRUCTURED_REPLY => self.structured_reply(),
                        other => Err(Malformed::Magic(other.into())),
                    };
                }
            }
        }
    }

    /// The next answer to an option.
    fn answer(&mut self) -> Result<Option<(u32, Bytes)>, Malformed> {
        let Some(mut header) = self.buffer.first_chunk::<ANSWER_HEADER>().map(|header| &header[..]) else { return Ok(None) };
        let (magic, option, kind, length) = (header.get_u64(), header.get_u32(), header.get_u32(), header.get_u32());
        if magic != OPTION_REPLY {
            return Err(Malformed::Magic(magic));
        }
        if length > MAX_OPTION {
            return Err(Malformed::Length(length));
        }
        let expected = match self.stage {
            Stage::Structured => option::STRUCTURED_REPLY,
            Stage::Contexts => option::SET_META_CONTEXT,
            _ => option::GO,
        };
        if option != expected {
            return Err(Malformed::Answer);
        }
        if self.buffer.len() < ANSWER_HEADER + length as usize {
            return Ok(None);
        }
        self.buffer.advance(ANSWER_HEADER);
        let payload = self.buffer.split_to(length as usize).freeze();
        if kind & answer::ERROR != 0 {
            return Err(Malformed::Refused { option, code: kind });
        }
        Ok(Some((kind, payload)))
    }

    fn on_answer(&mut self, kind: u32, mut payload: Bytes, out: &mut BytesMut) -> Result<Option<Event>, Malformed> {
        match (self.stage, kind) {
            (Stage::Structured, answer::ACK) => {
                if self.kinds.is_empty() {
                    self.go(out);
                } else {
                    let mut wanted = self.name();
                    wanted.put_u32(u32::try_from(self.kinds.len()).expect("a handful"));
                    for kind in &self.kinds {
                        put_text(&mut wanted, kind);
                    }
                    put_option(out, option::SET_META_CONTEXT, &wanted);
                    self.stage = Stage::Contexts;
                }
            }
            (Stage::Contexts, answer::META_CONTEXT) => {
                let number = payload.try_get_u32().map_err(|_| Malformed::Answer)?;
                let place = self.kinds.iter().position(|kind| payload == kind.as_bytes());
                *place.and_then(|place| self.contexts.get_mut(place)).ok_or(Malformed::Answer)? = Some(number);
            }
            (Stage::Contexts, answer::ACK) => {
                if self.contexts.iter().any(Option::is_none) {
                    return Err(Malformed::Cannot("tell all its extents"));
                }
                self.go(out);
            }
            (Stage::Go, answer::INFO) => {
                let what = payload.try_get_u16().map_err(|_| Malformed::Answer)?;
                if what == info::EXPORT {
                    let size = payload.try_get_u64().map_err(|_| Malformed::Answer)?;
                    let flags = payload.try_get_u16().map_err(|_| Malformed::Answer)?;
                    let needed = flag::FLUSH | flag::WRITE_ZEROES;
                    if self.writes && (flags & needed != needed || flags & flag::READ_ONLY != 0) {
                        return Err(Malformed::Cannot("be written to"));
                    }
                    self.size = Some(size);
                }
            }
            (Stage::Go, answer::ACK) => {
                let size = self.size.ok_or(Malformed::Answer)?;
                self.stage = Stage::Replies;
                return Ok(Some(Event::Ready { size }));
            }
            _ => return Err(Malformed::Answer),
        }
        Ok(None)
    }

    fn name(&self) -> BytesMut {
        let mut name = BytesMut::new();
        put_text(&mut name, &self.export);
        name
    }

    fn go(&mut self, out: &mut BytesMut) {
        let mut payload = self.name();
        payload.put_u16(0);
        put_option(out, option::GO, &payload);
        self.stage = Stage::Go;
    }

    fn simple_reply(&mut self) -> Option<Event> {
        let mut header = self.buffer.first_chunk::<SIMPLE>().map(|header| &header[..])?;
        header.advance(4);
        let (error, cookie) = (header.get_u32(), header.get_u64());
        self.buffer.advance(SIMPLE);
        Some(if error == 0 { Event::Done { cookie } } else { Event::Failed { cookie, error } })
    }

    fn structured_reply(&mut self) -> Result<Option<Event>, Malformed> {
        let Some(mut header) = self.buffer.first_chunk::<STRUCTURED>().map(|header| &header[..]) else { return Ok(None) };
        header.advance(4);
        let (flags, kind, cookie, length) = (header.get_u16(), header.get_u16(), header.get_u64(), header.get_u32());
        if length > MAX_CHUNK {
            return Err(Malformed::Length(length));
        }
        let size = STRUCTURED + length as usize;
        if self.buffer.len() < size {
            self.buffer.reserve(size - self.buffer.len());
            return Ok(None);
        }
        self.buffer.advance(STRUCTURED);
        let payload = self.buffer.split_to(length as usize).freeze();
        let is_last = flags & chunk::DONE != 0;
        let event = self.chunk(kind, cookie, payload)?;
        Ok(Some(match event {
            Some(event @ Event::Failed { .. }) => event,
            Some(event) => {
                if is_last {
                    self.ended = Some(Event::Done { cookie });
                }
                event
            }
            None if is_last => Event::Done { cookie },
            None => return Err(Malformed::Answer),
        }))
    }

    fn chunk(&self, kind: u16, cookie: u64, mut payload: Bytes) -> Result<Option<Event>, Malformed> {
        let short = |_| Malformed::Answer;
        Ok(Some(match kind {
            chunk::NONE => return Ok(None),
            chunk::DATA => {
                let offset = payload.try_get_u64().map_err(short)?;
                Event::Data { cookie, offset, data: payload }
            }
            chunk::HOLE => {
                let offset = payload.try_get_u64().map_err(short)?;
                Event::Hole { cookie, offset, length: payload.try_get_u32().map_err(short)? }
            }
            chunk::STATUS => {
                let number = payload.try_get_u32().map_err(short)?;
                let kind = self.contexts.iter().position(|context| *context == Some(number)).ok_or(Malformed::Answer)?;
                let (extents, rest) = payload.as_chunks::<8>();
                let extent = |[a, b, c, d, e, f, g, h]: [u8; 8]| Extent {
                    length: u32::from_be_bytes([a, b, c, d]),
                    flags: u32::from_be_bytes([e, f, g, h]),
                };
                let extents: Vec<Extent> = extents.iter().copied().map(extent).collect();
                if !rest.is_empty() || extents.is_empty() || extents.iter().any(|extent| extent.length == 0) {
                    return Err(Malformed::Answer);
                }
                Event::Status { cookie, kind, extents }
            }
            kind if kind & chunk::ERROR != 0 => Event::Failed { cookie, error: payload.try_get_u32().map_err(short)? },
            _ => return Err(Malformed::Answer),
        }))
    }
}

fn put_text(out: &mut BytesMut, text: &str) {
    out.put_u32(u32::try_from(text.len()).expect("names are short"));
    out.put_slice(text.as_bytes());
}

fn put_option(out: &mut BytesMut, option: u32, payload: &[u8]) {
    out.put_u64(OPTION);
    out.put_u32(option);
    out.put_u32(u32::try_from(payload.len()).expect("options are short"));
    out.put_slice(payload);
}
