//! Reading and writing the monitor's socket: messages in, lines and descriptors out.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::{Ending, LineDecoder, Message};

const CHUNK: usize = 16 << 10;

/// A command on its way.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) line: Vec<u8>,
    pub(super) fd: Option<OwnedFd>,
}

/// The receiving half.
pub(super) struct Reader {
    stream: Arc<UnixStream>,
    decoder: LineDecoder,
    chunk: Box<[u8; CHUNK]>,
    start: usize,
    end: usize,
}

impl Reader {
    pub(super) fn new(stream: Arc<UnixStream>) -> Self {
        Self { stream, decoder: LineDecoder::default(), chunk: Box::new([0; CHUNK]), start: 0, end: 0 }
    }

    /// The next message. Dropping the future loses nothing.
    pub(super) async fn next(&mut self) -> Result<Message, Ending> {
        loop {
            let mut rest = self.chunk.get(self.start..self.end).unwrap_or_default();
            let decoded = self.decoder.decode(&mut rest);
            self.start = self.end - rest.len();
            if let Some(message) = decoded.map_err(Ending::Protocol)? {
                return Ok(message);
            }
            self.stream.readable().await.map_err(Ending::Socket)?;
            match self.stream.try_read(&mut self.chunk[..]) {
                Ok(0) => return Err(Ending::Closed),
                Ok(length) => (self.start, self.end) = (0, length),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(Ending::Closed),
                Err(error) => return Err(Ending::Socket(error)),
            }
        }
    }
}

/// Sends one command with its descriptor, all of it.
pub(super) async fn write(stream: &UnixStream, command: Outgoing) -> io::Result<()> {
    let fds: Vec<BorrowedFd<'_>> = command.fd.iter().map(AsFd::as_fd).collect();
    let mut rest = command.line.as_slice();
    let mut sent_fds = fds.is_empty();
    while !rest.is_empty() {
        stream.writable().await?;
        let attempt = stream.try_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !sent_fds && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
                return Err(io::Error::other("no room for the descriptor"));
            }
            Ok(sendmsg(stream, &[IoSlice::new(rest)], &mut ancillary, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?)
        });
        match attempt {
            Ok(length) => {
                sent_fds = true;
                rest = rest.get(length..).unwrap_or_default();
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
