//! Reads a disk of a snapshot, which QEMU exports as it was at one instant while the guest writes on, and has its pages written.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use bytes::BytesMut;
use godwit_nbd::{ALLOCATION, Client, Event, Extent, Malformed, put_disconnect, put_read, put_status};
use godwit_stream::PAGE_SIZE;
use godwit_vault::{Sink, SnapshotWriter};

/// Bytes whose extents are asked for at once, and that are read at once.
const ASKED: u64 = 256 << 20;
const READ: u64 = 1 << 20;
const PAGE: u64 = PAGE_SIZE as u64;

/// Why a snapshot's disk cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum TakeDiskError {
    /// QEMU says what is not known.
    #[error("what QEMU says of the disk is not understood")]
    Malformed(#[from] Malformed),
    /// QEMU could not read it.
    #[error("QEMU cannot read the disk (error {0} of its protocol)")]
    Failed(u32),
    /// QEMU said more, or less, than it was asked for.
    #[error("QEMU did not answer what it was asked")]
    Unasked,
    /// QEMU's socket.
    #[error("QEMU's socket cannot be used")]
    Socket(#[source] io::Error),
    /// The vault cannot be written.
    #[error("the snapshot cannot be written")]
    Write(#[source] io::Error),
}

/// Reads an export from its beginning to its end; its pages are those of `space`. How many bytes were read: what QEMU knows to be zeros is not.
///
/// # Errors
/// [`TakeDiskError`]
pub fn take_disk<S: Sink, P: Sink>(
    socket: UnixStream,
    export: &str,
    space: u16,
    writer: &mut SnapshotWriter<S, P>,
) -> Result<u64, TakeDiskError> {
    let mut disk =
        Disk { socket, client: Client::new(export, vec![ALLOCATION.to_owned()], false), out: BytesMut::new(), cookie: 0 };
    let size = disk.ready()?;
    let (mut at, mut read, mut buffer) = (0, 0, vec![0; READ as usize]);
    // Up to where pages were written: an extent may begin within one.
    let mut next = 0;
    while at < size {
        for extent in disk.extents(at, (size - at).min(ASKED))? {
            let end = (at + u64::from(extent.length)).min(size);
            if !extent.is_zero() {
                let mut from = next.max(at / PAGE * PAGE);
                while from < end {
                    let length = (size - from).min(READ);
                    let content = buffer.get_mut(..length as usize).unwrap_or_default();
                    disk.read(from, content)?;
                    read += length;
                    put(writer, space, from / PAGE, content).map_err(TakeDiskError::Write)?;
                    from += length.next_multiple_of(PAGE);
                }
                next = from;
            }
            at = end;
        }
    }
    put_disconnect(&mut disk.out);
    disk.say()?;
    Ok(read)
}

/// Writes consecutive pages; the last may be cut.
fn put<S: Sink, P: Sink>(writer: &mut SnapshotWriter<S, P>, space: u16, first: u64, content: &[u8]) -> io::Result<()> {
    for (page, content) in (first..).zip(content.chunks(PAGE_SIZE)) {
        let mut whole = [0; PAGE_SIZE];
        whole[..content.len()].copy_from_slice(content);
        writer.page(space, u32::try_from(page).map_err(|_| io::ErrorKind::FileTooLarge)?, &whole)?;
    }
    Ok(())
}

struct Disk {
    socket: UnixStream,
    client: Client,
    out: BytesMut,
    cookie: u64,
}

impl Disk {
    fn say(&mut self) -> Result<(), TakeDiskError> {
        self.socket.write_all(&self.out.split()).map_err(TakeDiskError::Socket)
    }

    fn hear(&mut self) -> Result<Event, TakeDiskError> {
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
                Ok(0) => return Err(TakeDiskError::Socket(io::ErrorKind::UnexpectedEof.into())),
                Ok(length) => self.client.buffer_mut().extend_from_slice(&piece[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(TakeDiskError::Socket(error)),
            }
        }
    }

    fn ready(&mut self) -> Result<u64, TakeDiskError> {
        match self.hear()? {
            Event::Ready { size } => Ok(size),
            _ => Err(TakeDiskError::Unasked),
        }
    }

    /// Extents from a place on: at least one, and perhaps not all that were asked for.
    fn extents(&mut self, at: u64, length: u64) -> Result<Vec<Extent>, TakeDiskError> {
        self.cookie += 1;
        put_status(&mut self.out, self.cookie, at, u32::try_from(length).map_err(|_| TakeDiskError::Unasked)?);
        self.say()?;
        let mut found = None;
        loop {
            match self.hear()? {
                Event::Status { cookie, kind: 0, extents } if cookie == self.cookie && found.is_none() => found = Some(extents),
                Event::Done { cookie } if cookie == self.cookie => return found.ok_or(TakeDiskError::Unasked),
                Event::Failed { error, .. } => return Err(TakeDiskError::Failed(error)),
                _ => return Err(TakeDiskError::Unasked),
            }
        }
    }

    /// Fills `content` with what is at a place.
    fn read(&mut self, at: u64, content: &mut [u8]) -> Result<(), TakeDiskError> {
        self.cookie += 1;
        put_read(&mut self.out, self.cookie, at, u32::try_from(content.len()).map_err(|_| TakeDiskError::Unasked)?);
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
                    room.ok_or(TakeDiskError::Unasked)?.copy_from_slice(&data);
                    filled += data.len();
                }
                Event::Hole { cookie, offset, length } if cookie == self.cookie => {
                    let room = place(offset, length as usize).and_then(|range| content.get_mut(range));
                    room.ok_or(TakeDiskError::Unasked)?.fill(0);
                    filled += length as usize;
                }
                Event::Done { cookie } if cookie == self.cookie && filled == content.len() => return Ok(()),
                Event::Failed { error, .. } => return Err(TakeDiskError::Failed(error)),
                _ => return Err(TakeDiskError::Unasked),
            }
        }
    }
}
