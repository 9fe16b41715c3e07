//! Frames: what two carry processes say to each other. One byte kind, four bytes length, payload; integers are big-endian.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Version of the format; both sides must name the same.
pub const VERSION: u16 = 1;

/// Largest payload of a data frame.
pub const MAX_DATA: usize = 256 << 10;

/// Largest message between the agents.
pub const MAX_CONTROL: usize = 64 << 10;

const HEADER: usize = 5;
const IDENTITY: usize = 2 + 16 + 16 + 8;

/// Which move a connection belongs to. Both sides say it first and refuse anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The VM's UUID.
    pub vm: [u8; 16],
    /// The task's UUID.
    pub task: [u8; 16],
    /// The generation that the destination will run.
    pub generation: u64,
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// First frame of the source.
    Hello(Identity),
    /// First frame of the destination: the same identity.
    Welcome(Identity),
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
    /// The destination has handed this many stream bytes in total to its QEMU.
    Applied(u64),
    /// Answer with the same number.
    Ping(u64),
    /// The answer.
    Pong(u64),
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
}

mod kind {
    pub(super) const HELLO: u8 = 1;
    pub(super) const WELCOME: u8 = 2;
    pub(super) const FORWARD: u8 = 3;
    pub(super) const FORWARD_END: u8 = 4;
    pub(super) const RETURN: u8 = 5;
    pub(super) const RETURN_END: u8 = 6;
    pub(super) const CONTROL: u8 = 7;
    pub(super) const APPLIED: u8 = 8;
    pub(super) const PING: u8 = 9;
    pub(super) const PONG: u8 = 10;
}

impl Frame {
    /// Appends the frame's bytes to `out`.
    ///
    /// A data frame must not be longer than [`MAX_DATA`], a control frame than [`MAX_CONTROL`]; the sender cuts before.
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::Hello(identity) => put_identity(out, kind::HELLO, identity),
            Self::Welcome(identity) => put_identity(out, kind::WELCOME, identity),
            Self::Forward(data) => put(out, kind::FORWARD, data),
            Self::ForwardEnd => put(out, kind::FORWARD_END, &[]),
            Self::Return(data) => put(out, kind::RETURN, data),
            Self::ReturnEnd => put(out, kind::RETURN_END, &[]),
            Self::Control(data) => put(out, kind::CONTROL, data),
            Self::Applied(total) => put(out, kind::APPLIED, &total.to_be_bytes()),
            Self::Ping(number) => put(out, kind::PING, &number.to_be_bytes()),
            Self::Pong(number) => put(out, kind::PONG, &number.to_be_bytes()),
        }
    }
}

fn put(out: &mut BytesMut, kind: u8, payload: &[u8]) {
    debug_assert!(payload.len() <= MAX_DATA, "the sender cuts data before framing it");
    out.reserve(HEADER + payload.len());
    out.put_u8(kind);
    out.put_u32(u32::try_from(payload.len()).expect("payloads are at most MAX_DATA bytes"));
    out.put_slice(payload);
}

fn put_identity(out: &mut BytesMut, kind: u8, identity: &Identity) {
    let mut payload = BytesMut::with_capacity(IDENTITY);
    payload.put_u16(VERSION);
    payload.put_slice(&identity.vm);
    payload.put_slice(&identity.task);
    payload.put_u64(identity.generation);
    put(out, kind, &payload);
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
            kind::FORWARD_END | kind::RETURN_END => size == 0,
            kind::CONTROL => size <= MAX_CONTROL,
            kind::APPLIED | kind::PING | kind::PONG => size == 8,
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
            kind::HELLO => Frame::Hello(identity(payload)?),
            kind::WELCOME => Frame::Welcome(identity(payload)?),
            kind::FORWARD => Frame::Forward(payload),
            kind::FORWARD_END => Frame::ForwardEnd,
            kind::RETURN => Frame::Return(payload),
            kind::RETURN_END => Frame::ReturnEnd,
            kind::CONTROL => Frame::Control(payload),
            kind::APPLIED => Frame::Applied(payload.get_u64()),
            kind::PING => Frame::Ping(payload.get_u64()),
            _ => Frame::Pong(payload.get_u64()),
        }))
    }
}

/// Reads an identity from a payload whose length was checked.
fn identity(mut payload: Bytes) -> Result<Identity, MalformedFrame> {
    let version = payload.get_u16();
    if version != VERSION {
        return Err(MalformedFrame::Version(version));
    }
    let (mut vm, mut task) = ([0; 16], [0; 16]);
    payload.copy_to_slice(&mut vm);
    payload.copy_to_slice(&mut task);
    Ok(Identity { vm, task, generation: payload.get_u64() })
}

#[cfg(test)]
mod tests;
