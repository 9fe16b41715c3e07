//! A disk that QEMU exports over NBD: read by one request after the other, written by several at once.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use bytes::BytesMut;
use godwit_nbd::{Client, Event, Extent, Malformed, put_disconnect, put_flush, put_read, put_status, put_write, put_write_zeroes};

/// Why a disk cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub(super) enum DiskError {
    /// QEMU says what is not known.
    #[error("what QEMU says of the disk is not understood")]
    Malformed(#[from] Malformed),
    /// QEMU could not read or write it.
    #[error("QEMU cannot read or write the disk (error {0} of its protocol)")]
    Failed(u32),
    /// QEMU said more, or less, than it was asked for.
    #[error("QEMU did not answer what it was asked")]
    Unasked,
    /// QEMU's socket.
    #[error("QEMU's socket cannot be used")]
    Socket(#[source] io::Error),
}

impl DiskError {
    /// Whether the disk's storage has no room.
    pub(super) const fn is_no_space(&self) -> bool {
        matches!(self, Self::Failed(28))
    }
}

/// Writes that may be under way: their answers fit into the socket while nobody reads them.
const WRITES: usize = 32;

/// A disk that QEMU exports.
pub(super) struct Disk {
    socket: UnixStream,
    client: Client,
    out: BytesMut,
    cookie: u64,
    /// Writes that are not answered yet.
    writes: BTreeSet<u64>,
}

impl Disk {
    fn say(&mut self) -> Result<(), DiskError> {
        self.socket.write_all(&self.out.split()).map_err(DiskError::Socket)
    }

    fn hear(&mut self) -> Result<Event, DiskError> {
        loop {
            let event = self.client.next_event(&mut self.out)?;
            if !self.out.is_empty() {
                self.say()?;
            }
            if let Some(event) = event {
                return Ok(event);
            }
            let mut piece = [0; 64 << 10];
            match self.socket.read(&mut piece) {
                Ok(0) => return Err(DiskError::Socket(io::ErrorKind::UnexpectedEof.into())),
                Ok(length) => self.client.buffer_mut().extend_from_slice(&piece[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(DiskError::Socket(error)),
            }
        }
    }

    /// The disk of this name, with extents of this kind; its size, too.
    pub(super) fn open(socket: UnixStream, export: &str, extents: &str, writes: bool) -> Result<(Self, u64), DiskError> {
        let client = Client::new(export, vec![extents.to_owned()], writes);
        let mut disk = Self { socket, client, out: BytesMut::new(), cookie: 0, writes: BTreeSet::new() };
        let size = disk.ready()?;
        Ok((disk, size))
    }

    /// Lets go of it.
    pub(super) fn close(mut self) -> Result<(), DiskError> {
        self.settle(0)?;
        put_disconnect(&mut self.out);
        self.say()
    }

    fn ready(&mut self) -> Result<u64, DiskError> {
        match self.hear()? {
            Event::Ready { size } => Ok(size),
            _ => Err(DiskError::Unasked),
        }
    }

    /// Extents from a place on: at least one, and perhaps not all that were asked for.
    pub(super) fn extents(&mut self, at: u64, length: u64) -> Result<Vec<Extent>, DiskError> {
        self.settle(0)?;
        self.cookie += 1;
        put_status(&mut self.out, self.cookie, at, u32::try_from(length).map_err(|_| DiskError::Unasked)?);
        self.say()?;
        let mut found = None;
        loop {
            match self.hear()? {
                Event::Status { cookie, kind: 0, extents } if cookie == self.cookie && found.is_none() => found = Some(extents),
                Event::Done { cookie } if cookie == self.cookie => return found.ok_or(DiskError::Unasked),
                Event::Failed { error, .. } => return Err(DiskError::Failed(error)),
                _ => return Err(DiskError::Unasked),
            }
        }
    }

    /// Fills `content` with what is at a place.
    pub(super) fn read(&mut self, at: u64, content: &mut [u8]) -> Result<(), DiskError> {
        self.settle(0)?;
        self.cookie += 1;
        put_read(&mut self.out, self.cookie, at, u32::try_from(content.len()).map_err(|_| DiskError::Unasked)?);
        self.say()?;
        let mut filled = 0;
        loop {
            // Where a piece goes: within what was asked for.
            let place = |offset: u64, length: usize| {
                let from = usize::try_from(offset.checked_sub(at)?).ok()?;
                Some(from..from.checked_add(length)?)
            };
            match self.hear()? {
                Event::Data { cookie, offset, data } if cookie == self.cookie => {
                    let room = place(offset, data.len()).and_then(|range| content.get_mut(range));
                    room.ok_or(DiskError::Unasked)?.copy_from_slice(&data);
                    filled += data.len();
                }
                Event::Hole { cookie, offset, length } if cookie == self.cookie => {
                    let room = place(offset, length as usize).and_then(|range| content.get_mut(range));
                    room.ok_or(DiskError::Unasked)?.fill(0);
                    filled += length as usize;
                }
                Event::Done { cookie } if cookie == self.cookie && filled == content.len() => return Ok(()),
                Event::Failed { error, .. } => return Err(DiskError::Failed(error)),
                _ => return Err(DiskError::Unasked),
            }
        }
    }

    /// Writes what `content` has to a place. Whether it could be is said by what is called next, at the latest by [`Self::flush`]. Of two writes to one place the second may come first.
    pub(super) fn write(&mut self, at: u64, content: &[u8]) -> Result<(), DiskError> {
        self.cookie += 1;
        put_write(&mut self.out, self.cookie, at, content);
        self.later()
    }

    /// Makes a part of it zeros; as [`Self::write`].
    pub(super) fn write_zeroes(&mut self, at: u64, length: u32) -> Result<(), DiskError> {
        self.cookie += 1;
        put_write_zeroes(&mut self.out, self.cookie, at, length);
        self.later()
    }

    /// What was written is durable when this returns.
    pub(super) fn flush(&mut self) -> Result<(), DiskError> {
        self.settle(0)?;
        self.cookie += 1;
        put_flush(&mut self.out, self.cookie);
        self.later()?;
        self.settle(0)
    }

    fn later(&mut self) -> Result<(), DiskError> {
        self.say()?;
        self.writes.insert(self.cookie);
        self.settle(WRITES)
    }

    /// Waits until no more than so many writes are under way.
    fn settle(&mut self, most: usize) -> Result<(), DiskError> {
        while self.writes.len() > most {
            match self.hear()? {
                Event::Done { cookie } if self.writes.remove(&cookie) => {}
                Event::Failed { error, .. } => return Err(DiskError::Failed(error)),
                _ => return Err(DiskError::Unasked),
            }
        }
        Ok(())
    }
}
