//! Files that QEMU wrote, or that a snapshot was written to, into the vault: the stream of a migration, and raw images. Both may come from anywhere: what is not understood
//! is refused.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use bytes::BytesMut;
use godwit_carrier::pages::{PageSet, Place};
use godwit_stream::postcopy::{DeviceState, DeviceStateTooLong};
use godwit_stream::{Element, PAGE_SIZE, PageContent, Reader, StreamError, WriteError, Writer};
use godwit_vault::{Parts, Sink, SnapshotWriter, Space};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::take::{TakeError, space};

const PAGE: u64 = PAGE_SIZE as u64;
/// Bytes that are read at once.
const PIECE: usize = 1 << 20;

/// Why a file's content is not in the vault.
#[derive(Debug, thiserror::Error)]
pub(super) enum LoadError {
    /// The stream says what is not known.
    #[error("the stream of memory.qemu is not understood")]
    Stream(#[from] StreamError),
    /// Its beginning cannot be kept.
    #[error("the beginning of memory.qemu cannot be kept")]
    Preamble(#[from] WriteError),
    /// The state of the devices is too long.
    #[error(transparent)]
    DeviceState(#[from] DeviceStateTooLong),
    /// A block's name or length is one that no snapshot has.
    #[error(transparent)]
    Block(#[from] TakeError),
    /// The stream ends before it is whole.
    #[error("memory.qemu ends before it is whole")]
    Cut,
    /// A page comes twice: it was written while the VM ran.
    #[error("memory.qemu says a page twice: it was written while its VM ran")]
    Twice,
    /// A stream of another machine.
    #[error("memory.qemu is of machine {found}, the VM has {wanted}")]
    Machine {
        /// In the stream.
        found: String,
        /// The VM's.
        wanted: String,
    },
    /// A file cannot be read.
    #[error("a file cannot be read")]
    Read(#[source] io::Error),
    /// The vault cannot be written.
    #[error("the snapshot cannot be written")]
    Write(#[source] io::Error),
}

/// Reads the stream of a migration whose VM stood still, to its end. `begin` gets the blocks of RAM, in the stream's order.
///
/// # Errors
/// [`LoadError`]
pub(super) fn load_memory<S: Sink, P: Sink>(
    mut from: impl Read,
    machine: &str,
    begin: impl FnOnce(Vec<Space>) -> io::Result<SnapshotWriter<S, P>>,
) -> Result<(SnapshotWriter<S, P>, Parts), LoadError> {
    let (mut reader, mut preamble, mut devices) = (Reader::new(), (Writer::new(), BytesMut::new()), DeviceState::default());
    let (mut begin, mut loading, mut piece) = (Some(begin), None, vec![0; PIECE]);
    loop {
        match from.read(&mut piece) {
            Ok(0) => break,
            Ok(length) => reader.buffer_mut().extend_from_slice(piece.get(..length).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(LoadError::Read(error)),
        }
        while let Some(element) = reader.next_element()? {
            match &element {
                Element::Page { block, page, content } => {
                    let (writer, seen): &mut (SnapshotWriter<S, P>, PageSet) = loading.as_mut().ok_or(LoadError::Cut)?;
                    let page = u32::try_from(*page).map_err(|_| LoadError::Cut)?;
                    if !seen.insert(Place { block: block.0, page }) {
                        return Err(LoadError::Twice);
                    }
                    // What is zero needs not be told.
                    let PageContent::Data(data) = content else { continue };
                    let content: &[u8; PAGE_SIZE] = data[..].try_into().map_err(|_| LoadError::Cut)?;
                    writer.page(block.0, page, content).map_err(LoadError::Write)?;
                }
                Element::Opaque(bytes) => devices.push(bytes)?,
                Element::Configuration(configuration) if configuration.machine != machine => {
                    return Err(LoadError::Machine { found: configuration.machine.clone(), wanted: machine.to_owned() });
                }
                Element::RamStart(start) => {
                    preamble.0.write(&element, &mut preamble.1)?;
                    let spaces: Vec<Space> = start.blocks.iter().map(space).collect::<Result<_, _>>()?;
                    let seen = PageSet::new(&spaces.iter().map(|space| space.pages).collect::<Vec<u32>>());
                    let begin = begin.take().ok_or(LoadError::Cut)?;
                    loading = Some((begin(spaces).map_err(LoadError::Write)?, seen));
                }
                _ if loading.is_none() => preamble.0.write(&element, &mut preamble.1)?,
                _ => {}
            }
        }
    }
    let devices = devices.take().ok_or(LoadError::Cut)?.to_vec();
    let (writer, _) = loading.ok_or(LoadError::Cut)?;
    Ok((writer, Parts { preamble: preamble.1.to_vec(), devices, ..Parts::default() }))
}

/// Reads a raw image; its pages are those of `space`.
///
/// # Errors
/// [`LoadError`]
pub(super) fn load_disk<S: Sink, P: Sink>(from: &File, space: u16, writer: &mut SnapshotWriter<S, P>) -> Result<(), LoadError> {
    let length = from.metadata().map_err(LoadError::Read)?.len();
    let (mut at, mut buffer) = (0, vec![0; PIECE]);
    while at < length {
        let data = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => break,
            // A file system that does not know holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            data => data.map_err(|error| LoadError::Read(error.into()))?,
        };
        at = at.max(data / PAGE * PAGE);
        let most = usize::try_from(length - at).unwrap_or(usize::MAX).min(PIECE);
        let content = buffer.get_mut(..most).unwrap_or_default();
        from.read_exact_at(content, at).map_err(LoadError::Read)?;
        for (page, content) in (at / PAGE..).zip(content.chunks(PAGE_SIZE)) {
            let mut whole = [0; PAGE_SIZE];
            whole[..content.len()].copy_from_slice(content);
            let page = u32::try_from(page).map_err(|_| LoadError::Write(io::ErrorKind::FileTooLarge.into()))?;
            writer.page(space, page, &whole).map_err(LoadError::Write)?;
        }
        at += most as u64;
    }
    Ok(())
}
