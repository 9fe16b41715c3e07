//! Gives QEMU a disk of a snapshot to read, over NBD, while a VM begins with it.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use bytes::BytesMut;
use godwit_nbd::{Extent, Malformed, Request, Server};
use godwit_stream::PAGE_SIZE;
use godwit_vault::{Contents, ContentsError, Leaf};

use super::restore::{disk_of, fill};

const PAGE: u64 = PAGE_SIZE as u64;
/// Bytes that are taken from the connection at once: requests are short.
const READ: usize = 64 << 10;
/// Leaves that are looked at for one answer of where zeros are: those of a GiB.
const LOOKED_AT: usize = 512;
/// Of an extent that is a hole, and zeros.
const HOLE: u32 = 3;

/// Why a disk is served no more.
#[derive(Debug, thiserror::Error)]
pub(super) enum ServeError {
    /// The snapshot cannot be read.
    #[error(transparent)]
    Contents(#[from] ContentsError),
    /// The snapshot has no such disk.
    #[error("the snapshot has no disk {0}")]
    NoDisk(String),
    /// QEMU's connection.
    #[error("QEMU's connection cannot be used")]
    Socket(#[from] io::Error),
    /// QEMU says what is not known.
    #[error("what QEMU asks is not understood")]
    Malformed(#[from] Malformed),
}

impl ServeError {
    /// Whether QEMU may connect once more and be served.
    pub(super) const fn is_of_connection(&self) -> bool {
        matches!(self, Self::Socket(_) | Self::Malformed(_))
    }
}

/// Serves the disk of this name until QEMU has enough of it.
///
/// # Errors
/// [`ServeError`]; what cannot be read is not answered.
pub(super) fn serve(mut socket: UnixStream, contents: &mut Contents, name: &str) -> Result<(), ServeError> {
    let (space, pages) = disk_of(contents, name).ok_or_else(|| ServeError::NoDisk(name.to_owned()))?;
    let size = u64::from(pages) * PAGE;
    let (mut out, mut data) = (BytesMut::new(), Vec::new());
    let mut server = Server::of_reads(name, size, &mut out);
    let mut piece = vec![0; READ];
    loop {
        while let Some(request) = server.next_request(&mut out)? {
            match request {
                Request::Read { cookie, offset, length } => {
                    read(contents, space, offset, length, &mut data)?;
                    server.put_data(&mut out, cookie, offset, &data);
                    // What is waited for is not kept until what comes after it is read, too.
                    socket.write_all(&out.split())?;
                }
                Request::Status { cookie, offset, length } => {
                    Server::put_extent(&mut out, cookie, extent(contents, space, offset, length)?);
                }
                Request::Disconnect => return Ok(()),
                // Of a disk that is only read there are no others.
                Request::Write { .. } | Request::Zeroes { .. } | Request::Flush { .. } => {}
            }
        }
        socket.write_all(&out.split())?;
        match socket.read(&mut piece)? {
            0 => return Ok(()),
            length => server.buffer_mut().extend_from_slice(&piece[..length]),
        }
    }
}

/// Reads so many bytes from there on, which need not begin with a page.
fn read(contents: &mut Contents, space: u16, offset: u64, length: u32, to: &mut Vec<u8>) -> Result<(), ContentsError> {
    let end = offset + u64::from(length);
    to.clear();
    to.resize(length as usize, 0);
    let part = u64::from(Leaf::PAGES) * PAGE;
    let (mut at, mut room) = (offset, vec![0; part as usize]);
    while at < end {
        // What lies in one leaf is read together, from the beginning of a page.
        let first = at - at % PAGE;
        let until = end.min(at - at % part + part);
        let room = &mut room[..(until - first) as usize];
        fill(contents, space, first, room)?;
        to[(at - offset) as usize..(until - offset) as usize].copy_from_slice(&room[(at - first) as usize..]);
        at = until;
    }
    Ok(())
}

/// Whether there are zeros from there on, and up to where.
fn extent(contents: &mut Contents, space: u16, offset: u64, length: u32) -> Result<Extent, ContentsError> {
    let (begin, end) = (offset / PAGE, (offset + u64::from(length)).div_ceil(PAGE));
    let (mut page, mut kind) = (begin, None);
    for _ in 0..LOOKED_AT {
        let first = page - page % u64::from(Leaf::PAGES);
        let until = end.min(first + u64::from(Leaf::PAGES));
        let located: Vec<u64> = contents.located(space, u32::try_from(page).unwrap_or(u32::MAX))?.map(u64::from).collect();
        while page < until {
            let has_content = located.binary_search(&page).is_ok();
            if *kind.get_or_insert(has_content) != has_content {
                break;
            }
            page += 1;
        }
        if page < until || page >= end {
            break;
        }
    }
    let length = (page * PAGE).min(offset + u64::from(length)) - offset;
    let length = u32::try_from(length).unwrap_or(u32::MAX);
    Ok(Extent { length, flags: if kind == Some(true) { 0 } else { HOLE } })
}
