//! Frames: what two carry processes say to each other. One byte kind, four bytes length, payload; integers are big-endian.
//!
//! Frames that move something are *sequenced*: both sides count them, and what a connection that died took with it is sent again on the
//! next, see [`crate::Session`]. The others belong to one connection, and may be lost with it.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::pages::{Digest, MAX_PAYLOAD, PIECES, Pieces};

/// Version of the format; both sides must name the same.
pub const VERSION: u16 = 7;

/// Largest payload of a data frame.
pub const MAX_DATA: usize = 256 << 10;

/// Largest message between the agents.
pub const MAX_CONTROL: usize = 64 << 10;

/// Most blocks of guest memory that a destination places pages in.
pub const MAX_BLOCKS: usize = 256;

/// Most images that a destination offers.
pub const MAX_IMAGES: usize = 16;

/// Most digests in one frame.
pub const MAX_DIGESTS: usize = 4096;

/// Most pages that a destination has in common with other VMs, in all frames.
pub const MAX_COMMON: usize = 32_768;

/// Most pages whose pieces are asked for, or told, in one frame.
pub const MAX_WANTED: usize = 256;

/// Most runs of pages in one frame.
pub const MAX_RUNS: usize = 1024;

/// Most pages that are missed in one frame.
pub const MAX_MISSED: usize = 256;

const HEADER: usize = 5;
const IDENTITY: usize = 2 + 16 + 16 + 8 + 2 + KEY + 8;
const KEY: usize = 32;
const HELD_HEADER: usize = 2 + 4;
const DIGEST: usize = 16;
const IMAGE: usize = 32 + 4;
const BLOCK: usize = 2;
const PAGE: usize = 4;
const RUN: usize = 4 + 4;
const PIECE_HASHES: usize = PIECES * 4;
/// Largest list of blocks: a count, and a name of up to 255 bytes and a length for each.
const MAX_MEMORY: usize = 2 + MAX_BLOCKS * (1 + 255 + 4);

/// Which move a connection belongs to. Both sides say it first and refuse anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The VM's UUID.
    pub vm: [u8; 16],
    /// The task's UUID.
    pub task: [u8; 16],
    /// The generation that the destination will run.
    pub generation: u64,
    /// What of the VM travels here: 0 its memory and devices, from 1 on one of its disks.
    pub lane: u16,
}

/// A side of the move; also the direction in which it sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// Where the VM leaves. It dials.
    Source,
    /// Where it goes.
    Destination,
}

impl Side {
    /// The other one.
    #[must_use]
    pub const fn peer(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }
}

/// What a side says first on every connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// The move.
    pub identity: Identity,
    /// The secret of this session, drawn by the source: key of all digests. Who does not know it cannot go on with the session.
    pub key: [u8; KEY],
    /// How many sequenced frames of the other side have come: the next is sent first.
    pub taken: u64,
}

/// A block of guest memory, as QEMU names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// QEMU's name, 1 to 255 bytes.
    pub id: Bytes,
    /// Its length in pages of 4 KiB.
    pub pages: u32,
}

/// An image that the destination can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image {
    /// BLAKE3 of all of it.
    pub digest: [u8; 32],
    /// How many whole pages of 4 KiB it has.
    pub pages: u32,
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// First frame of the source.
    Hello(Greeting),
    /// First frame of the destination: the same move and session.
    Welcome(Greeting),
    /// Bytes of QEMU's stream, source to destination.
    Forward(Bytes),
    /// The source's QEMU has closed its side.
    ForwardEnd,
    /// Bytes of QEMU's return path, destination to source.
    Return(Bytes),
    /// The destination's QEMU has closed its side.
    ReturnEnd,
    /// A message from agent to agent; carry does not look into it.
    Control(Bytes),
    /// This many sequenced frames in total have been dealt with: written to memory, or taken by QEMU.
    Ack(u64),
    /// Answer with the same number.
    Ping(u64),
    /// The answer.
    Pong(u64),
    /// A batch of pages, source to destination, see [`crate::pages`].
    Pages(Bytes),
    /// The blocks in which the destination places pages itself, in the order of their numbers. Pages of others travel in QEMU's stream.
    Memory(Vec<Block>),
    /// The images from which pages can be copied, in the order of their numbers, see [`crate::pages::images`].
    Images(Vec<Image>),
    /// Digests of pages of other VMs that the destination holds, too; they are numbered in the order in which they are told, see
    /// [`crate::pages::COMMON`].
    Common(Vec<Digest>),
    /// Digests of what consecutive pages of a block hold at the destination already. What is not named is zero.
    Held {
        /// Number of the block.
        block: u16,
        /// The first page.
        first: u32,
        /// A digest for each page.
        digests: Vec<Digest>,
    },
    /// The destination has told all that it holds.
    HeldEnd,
    /// The source asks for the pieces of these pages, as they are at this point of the sequence.
    Wanted {
        /// Number of the block.
        block: u16,
        /// The pages.
        pages: Vec<u32>,
    },
    /// The answer: for each page the hashes of its pieces.
    Pieces {
        /// Number of the block.
        block: u16,
        /// The pages.
        pages: Vec<(u32, Pieces)>,
    },
    /// The destination's QEMU can do post-copy: it is to be advised first, and tells its memory after that.
    Advise,
    /// Pages that come after the switch: until then nobody has them. The destination forgets what it holds there.
    Left {
        /// Number of the block.
        block: u16,
        /// The first page, and how many follow each other.
        runs: Vec<(u32, u32)>,
    },
    /// All that is left was named. What follows in QEMU's stream has the VM run without it, and from there on each such page comes once.
    Switch {
        /// Number of the RAM section in QEMU's stream.
        section: u32,
    },
    /// Pages that the destination does not have, told to a source that goes on after the first connection of the two QEMUs was lost.
    Absent {
        /// Number of the block.
        block: u16,
        /// The first page, and how many follow each other.
        runs: Vec<(u32, u32)>,
    },
    /// The destination's QEMU waits for these pages.
    Missed {
        /// Number of the block.
        block: u16,
        /// The pages.
        pages: Vec<u32>,
    },
    /// Pages of a disk that are zero.
    Zeros {
        /// Number of the block.
        block: u16,
        /// The first page, and how many follow each other.
        runs: Vec<(u32, u32)>,
    },
    /// The disk at the destination has an older content already: as it was when the VM left on this generation, or 0, which is unknown.
    Base(u64),
    /// The source asks for digests of that content, in chunks of so many pages.
    Compare(u32),
}

/// Bytes that are not a frame. The connection is worthless from here on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MalformedFrame {
    /// A kind that this version does not know.
    #[error("unknown frame kind {0}")]
    Kind(u8),
    /// A length that the kind does not allow.
    #[error("a frame of kind {kind} cannot have {length} bytes")]
    Length {
        /// The kind.
        kind: u8,
        /// The length it claims.
        length: u32,
    },
    /// The peer speaks another version.
    #[error("the peer speaks version {0} of the carrier, this is version {VERSION}")]
    Version(u16),
    /// A list that is not one.
    #[error("a list of a frame of kind {0} is not one")]
    List(u8),
}

mod kind {
    pub(super) const HELLO: u8 = 1;
    pub(super) const WELCOME: u8 = 2;
    pub(super) const FORWARD: u8 = 3;
    pub(super) const FORWARD_END: u8 = 4;
    pub(super) const RETURN: u8 = 5;
    pub(super) const RETURN_END: u8 = 6;
    pub(super) const CONTROL: u8 = 7;
    pub(super) const ACK: u8 = 8;
    pub(super) const PING: u8 = 9;
    pub(super) const PONG: u8 = 10;
    pub(super) const PAGES: u8 = 11;
    pub(super) const MEMORY: u8 = 12;
    pub(super) const HELD: u8 = 13;
    pub(super) const HELD_END: u8 = 14;
    pub(super) const WANTED: u8 = 15;
    pub(super) const PIECES: u8 = 16;
    pub(super) const IMAGES: u8 = 17;
    pub(super) const ADVISE: u8 = 18;
    pub(super) const LEFT: u8 = 19;
    pub(super) const SWITCH: u8 = 20;
    pub(super) const MISSED: u8 = 21;
    pub(super) const ABSENT: u8 = 22;
    pub(super) const ZEROS: u8 = 23;
    pub(super) const BASE: u8 = 24;
    pub(super) const COMPARE: u8 = 25;
    pub(super) const COMMON: u8 = 26;
}

impl Frame {
    /// Which side sends it, if it is sequenced; the others belong to one connection.
    #[must_use]
    pub const fn sequenced_by(&self) -> Option<Side> {
        match self {
            Self::Forward(_)
            | Self::ForwardEnd
            | Self::Pages(_)
            | Self::Wanted { .. }
            | Self::Left { .. }
            | Self::Switch { .. }
            | Self::Zeros { .. }
            | Self::Compare(_) => Some(Side::Source),
            Self::Return(_)
            | Self::ReturnEnd
            | Self::Memory(_)
            | Self::Images(_)
            | Self::Common(_)
            | Self::Held { .. }
            | Self::HeldEnd
            | Self::Pieces { .. }
            | Self::Advise
            | Self::Absent { .. }
            | Self::Missed { .. }
            | Self::Base(_) => Some(Side::Destination),
            Self::Hello(_) | Self::Welcome(_) | Self::Control(_) | Self::Ack(_) | Self::Ping(_) | Self::Pong(_) => None,
        }
    }

    /// Bytes of memory that the frame takes while it waits, about.
    #[must_use]
    pub fn memory(&self) -> usize {
        const ITSELF: usize = 128;
        let content = match self {
            Self::Forward(data) | Self::Return(data) | Self::Pages(data) | Self::Control(data) => data.len(),
            Self::Held { digests, .. } | Self::Common(digests) => digests.len() * DIGEST,
            Self::Memory(blocks) => blocks.len() * 64,
            Self::Images(images) => images.len() * size_of::<Image>(),
            Self::Wanted { pages, .. } | Self::Missed { pages, .. } => pages.len() * PAGE,
            Self::Left { runs, .. } | Self::Absent { runs, .. } | Self::Zeros { runs, .. } => runs.len() * RUN,
            Self::Pieces { pages, .. } => pages.len() * size_of::<(u32, Pieces)>(),
            _ => 0,
        };
        content + ITSELF
    }

    /// Appends the frame's bytes to `out`.
    ///
    /// Nothing may be longer than its kind allows ([`MAX_DATA`], [`MAX_CONTROL`], [`crate::pages::MAX_PAYLOAD`], [`MAX_BLOCKS`],
    /// [`MAX_IMAGES`], [`MAX_DIGESTS`], [`MAX_WANTED`], [`MAX_RUNS`], [`MAX_MISSED`]); the sender cuts before.
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::Hello(greeting) => put_greeting(out, kind::HELLO, greeting),
            Self::Welcome(greeting) => put_greeting(out, kind::WELCOME, greeting),
            Self::Forward(data) => put(out, kind::FORWARD, data),
            Self::ForwardEnd => put(out, kind::FORWARD_END, &[]),
            Self::Return(data) => put(out, kind::RETURN, data),
            Self::ReturnEnd => put(out, kind::RETURN_END, &[]),
            Self::Control(data) => put(out, kind::CONTROL, data),
            Self::Ack(total) => put(out, kind::ACK, &total.to_be_bytes()),
            Self::Ping(number) => put(out, kind::PING, &number.to_be_bytes()),
            Self::Pong(number) => put(out, kind::PONG, &number.to_be_bytes()),
            Self::Pages(batch) => put(out, kind::PAGES, batch),
            Self::Memory(blocks) => put_blocks(out, blocks),
            Self::Images(images) => {
                let mut payload = BytesMut::with_capacity(images.len() * IMAGE);
                for Image { digest, pages } in images {
                    payload.put_slice(digest);
                    payload.put_u32(*pages);
                }
                put(out, kind::IMAGES, &payload);
            }
            Self::Common(digests) => put(out, kind::COMMON, digests.as_flattened()),
            Self::Held { block, first, digests } => {
                let mut payload = BytesMut::with_capacity(HELD_HEADER + digests.len() * DIGEST);
                payload.put_u16(*block);
                payload.put_u32(*first);
                digests.iter().for_each(|digest| payload.put_slice(digest));
                put(out, kind::HELD, &payload);
            }
            Self::HeldEnd => put(out, kind::HELD_END, &[]),
            Self::Wanted { block, pages } => put_pages(out, kind::WANTED, *block, pages),
            Self::Missed { block, pages } => put_pages(out, kind::MISSED, *block, pages),
            Self::Advise => put(out, kind::ADVISE, &[]),
            Self::Switch { section } => put(out, kind::SWITCH, &section.to_be_bytes()),
            Self::Left { block, runs } => put_runs(out, kind::LEFT, *block, runs),
            Self::Absent { block, runs } => put_runs(out, kind::ABSENT, *block, runs),
            Self::Zeros { block, runs } => put_runs(out, kind::ZEROS, *block, runs),
            Self::Base(generation) => put(out, kind::BASE, &generation.to_be_bytes()),
            Self::Compare(pages) => put(out, kind::COMPARE, &pages.to_be_bytes()),
            Self::Pieces { block, pages } => {
                let mut payload = BytesMut::with_capacity(BLOCK + pages.len() * (PAGE + PIECE_HASHES));
                payload.put_u16(*block);
                for (page, pieces) in pages {
                    payload.put_u32(*page);
                    pieces.iter().for_each(|piece| payload.put_u32(*piece));
                }
                put(out, kind::PIECES, &payload);
            }
        }
    }
}

fn put(out: &mut BytesMut, kind: u8, payload: &[u8]) {
    debug_assert!(payload.len() <= MAX_PAYLOAD.max(MAX_DATA), "the sender cuts data before framing it");
    out.reserve(HEADER + payload.len());
    out.put_u8(kind);
    out.put_u32(u32::try_from(payload.len()).expect("payloads are far below 4 GiB"));
    out.put_slice(payload);
}

fn put_greeting(out: &mut BytesMut, kind: u8, greeting: &Greeting) {
    let Greeting { identity, key, taken } = greeting;
    let mut payload = BytesMut::with_capacity(IDENTITY);
    payload.put_u16(VERSION);
    payload.put_slice(&identity.vm);
    payload.put_slice(&identity.task);
    payload.put_u64(identity.generation);
    payload.put_u16(identity.lane);
    payload.put_slice(key);
    payload.put_u64(*taken);
    put(out, kind, &payload);
}

fn put_pages(out: &mut BytesMut, kind: u8, block: u16, pages: &[u32]) {
    let mut payload = BytesMut::with_capacity(BLOCK + pages.len() * PAGE);
    payload.put_u16(block);
    pages.iter().for_each(|page| payload.put_u32(*page));
    put(out, kind, &payload);
}

fn put_runs(out: &mut BytesMut, kind: u8, block: u16, runs: &[(u32, u32)]) {
    let mut payload = BytesMut::with_capacity(BLOCK + runs.len() * RUN);
    payload.put_u16(block);
    for (first, pages) in runs {
        payload.put_u32(*first);
        payload.put_u32(*pages);
    }
    put(out, kind, &payload);
}

fn put_blocks(out: &mut BytesMut, blocks: &[Block]) {
    let mut payload = BytesMut::new();
    payload.put_u16(u16::try_from(blocks.len()).expect("at most MAX_BLOCKS"));
    for block in blocks {
        payload.put_u8(u8::try_from(block.id.len()).expect("a name has at most 255 bytes"));
        payload.put_slice(&block.id);
        payload.put_u32(block.pages);
    }
    put(out, kind::MEMORY, &payload);
}

/// Cuts a byte stream into frames. Never holds more than one frame beyond what it was fed, checks the length before it waits for the payload,
/// and cannot panic on any input.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
    broken: Option<MalformedFrame>,
}

impl Decoder {
    /// The buffer to read the connection into.
    pub fn buffer_mut(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// The next whole frame, or `None` until more bytes are there.
    ///
    /// # Errors
    /// [`MalformedFrame`], and the same again on every later call: there is no way back into step.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, MalformedFrame> {
        if let Some(broken) = self.broken {
            return Err(broken);
        }
        self.decode().inspect_err(|error| self.broken = Some(*error))
    }

    fn decode(&mut self) -> Result<Option<Frame>, MalformedFrame> {
        let Some(header) = self.buffer.first_chunk::<HEADER>() else { return Ok(None) };
        let [kind, length @ ..] = *header;
        let length = u32::from_be_bytes(length);
        let size = usize::try_from(length).unwrap_or(usize::MAX);
        let fits = match kind {
            kind::HELLO | kind::WELCOME => size == IDENTITY,
            kind::FORWARD | kind::RETURN => (1..=MAX_DATA).contains(&size),
            kind::FORWARD_END | kind::RETURN_END | kind::HELD_END | kind::ADVISE => size == 0,
            kind::CONTROL => size <= MAX_CONTROL,
            kind::ACK | kind::PING | kind::PONG | kind::BASE => size == 8,
            kind::PAGES => (1..=MAX_PAYLOAD).contains(&size),
            kind::MEMORY => (2..=MAX_MEMORY).contains(&size),
            kind::IMAGES => is_list(size, 0, IMAGE, MAX_IMAGES),
            kind::COMMON => is_list(size, 0, DIGEST, MAX_DIGESTS),
            kind::HELD => is_list(size, HELD_HEADER, DIGEST, MAX_DIGESTS),
            kind::WANTED => is_list(size, BLOCK, PAGE, MAX_WANTED),
            kind::PIECES => is_list(size, BLOCK, PAGE + PIECE_HASHES, MAX_WANTED),
            kind::LEFT | kind::ABSENT | kind::ZEROS => is_list(size, BLOCK, RUN, MAX_RUNS),
            kind::SWITCH | kind::COMPARE => size == 4,
            kind::MISSED => is_list(size, BLOCK, PAGE, MAX_MISSED),
            _ => return Err(MalformedFrame::Kind(kind)),
        };
        if !fits {
            return Err(MalformedFrame::Length { kind, length });
        }
        if self.buffer.len() < HEADER + size {
            self.buffer.reserve(HEADER + size - self.buffer.len());
            return Ok(None);
        }
        self.buffer.advance(HEADER);
        let mut payload = self.buffer.split_to(size).freeze();
        Ok(Some(match kind {
            kind::HELLO => Frame::Hello(greeting(payload)?),
            kind::WELCOME => Frame::Welcome(greeting(payload)?),
            kind::FORWARD => Frame::Forward(payload),
            kind::FORWARD_END => Frame::ForwardEnd,
            kind::RETURN => Frame::Return(payload),
            kind::RETURN_END => Frame::ReturnEnd,
            kind::CONTROL => Frame::Control(payload),
            kind::ACK => Frame::Ack(payload.get_u64()),
            kind::PING => Frame::Ping(payload.get_u64()),
            kind::PONG => Frame::Pong(payload.get_u64()),
            kind::PAGES => Frame::Pages(payload),
            kind::MEMORY => Frame::Memory(blocks(payload).ok_or(MalformedFrame::List(kind))?),
            kind::COMMON => Frame::Common(payload.as_chunks().0.to_vec()),
            kind::HELD => held(payload),
            kind::WANTED => {
                let (block, pages) = pages(payload);
                Frame::Wanted { block, pages }
            }
            kind::MISSED => {
                let (block, pages) = pages(payload);
                Frame::Missed { block, pages }
            }
            kind::LEFT => {
                let (block, runs) = runs(payload);
                Frame::Left { block, runs }
            }
            kind::ABSENT => {
                let (block, runs) = runs(payload);
                Frame::Absent { block, runs }
            }
            kind::ZEROS => {
                let (block, runs) = runs(payload);
                Frame::Zeros { block, runs }
            }
            kind::BASE => Frame::Base(payload.get_u64()),
            kind::COMPARE => Frame::Compare(payload.get_u32()),
            kind::SWITCH => Frame::Switch { section: payload.get_u32() },
            kind::ADVISE => Frame::Advise,
            kind::PIECES => pieces(payload),
            kind::IMAGES => images(payload),
            _ => Frame::HeldEnd,
        }))
    }
}

/// Reads a greeting from a payload whose length was checked.
fn greeting(mut payload: Bytes) -> Result<Greeting, MalformedFrame> {
    let version = payload.get_u16();
    if version != VERSION {
        return Err(MalformedFrame::Version(version));
    }
    let (mut vm, mut task, mut key) = ([0; 16], [0; 16], [0; KEY]);
    payload.copy_to_slice(&mut vm);
    payload.copy_to_slice(&mut task);
    let (generation, lane) = (payload.get_u64(), payload.get_u16());
    payload.copy_to_slice(&mut key);
    Ok(Greeting { identity: Identity { vm, task, generation, lane }, key, taken: payload.get_u64() })
}

fn blocks(mut payload: Bytes) -> Option<Vec<Block>> {
    let count = usize::from(payload.try_get_u16().ok()?);
    if count > MAX_BLOCKS {
        return None;
    }
    let mut blocks = Vec::with_capacity(count);
    for _ in 0..count {
        let length = usize::from(payload.try_get_u8().ok()?);
        if length == 0 || length > payload.len() {
            return None;
        }
        let id = payload.split_to(length);
        blocks.push(Block { id, pages: payload.try_get_u32().ok()? });
    }
    payload.is_empty().then_some(blocks)
}

/// Whether `head` bytes and 1 to `most` of what has `each` bytes take `size` bytes.
const fn is_list(size: usize, head: usize, each: usize, most: usize) -> bool {
    let list = size.saturating_sub(head);
    list != 0 && list.is_multiple_of(each) && list / each <= most
}

/// Reads pages from a payload whose length was checked.
fn pages(mut payload: Bytes) -> (u16, Vec<u32>) {
    let block = payload.get_u16();
    let (pages, _) = payload.as_chunks::<PAGE>();
    (block, pages.iter().map(|page| u32::from_be_bytes(*page)).collect())
}

/// Reads runs of pages from a payload whose length was checked.
fn runs(mut payload: Bytes) -> (u16, Vec<(u32, u32)>) {
    let block = payload.get_u16();
    let mut runs = Vec::with_capacity(payload.len() / RUN);
    while payload.has_remaining() {
        runs.push((payload.get_u32(), payload.get_u32()));
    }
    (block, runs)
}

/// Reads pages and their pieces from a payload whose length was checked.
fn pieces(mut payload: Bytes) -> Frame {
    let block = payload.get_u16();
    let mut pages = Vec::with_capacity(payload.len() / (PAGE + PIECE_HASHES));
    while payload.has_remaining() {
        let page = payload.get_u32();
        pages.push((page, std::array::from_fn(|_| payload.get_u32())));
    }
    Frame::Pieces { block, pages }
}

/// Reads images from a payload whose length was checked.
fn images(payload: Bytes) -> Frame {
    let (images, _) = payload.as_chunks::<IMAGE>();
    let image = |bytes: &[u8; IMAGE]| {
        let ([digest @ .., _, _, _, _], [.., a, b, c, d]) = (*bytes, *bytes);
        Image { digest, pages: u32::from_be_bytes([a, b, c, d]) }
    };
    Frame::Images(images.iter().map(image).collect())
}

/// Reads digests from a payload whose length was checked.
fn held(mut payload: Bytes) -> Frame {
    let (block, first) = (payload.get_u16(), payload.get_u32());
    let (digests, _) = payload.as_chunks::<DIGEST>();
    Frame::Held { block, first, digests: digests.to_vec() }
}

#[cfg(test)]
mod tests;
