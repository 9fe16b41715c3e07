//! Takes the stream of a background snapshot apart, and has its pages written.

use std::fs::File;
use std::io::{self, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use bytes::{Buf, Bytes, BytesMut};
use godwit_stream::postcopy::{DeviceState, DeviceStateTooLong};
use godwit_stream::{Element, PAGE_SIZE, PageContent, RamBlock, Reader, StreamError, WriteError, Writer};
use godwit_vault::{Earlier, Parts, Sink, SnapshotWriter, Space, SpaceKind};

/// Bytes that are read from QEMU at once, and how many such pieces may wait for being written: a guest that writes to a page which QEMU has not saved waits until
/// QEMU has passed it on, and that is to be no longer than copying takes.
const PIECE: usize = 1 << 20;
const WAITING: usize = 64;

/// Why a snapshot's memory cannot be taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum TakeError {
    /// QEMU's stream says what is not known.
    #[error("QEMU's stream is not understood")]
    Stream(#[from] StreamError),
    /// The beginning of the stream cannot be kept.
    #[error("QEMU's stream cannot be written again")]
    Preamble(#[from] WriteError),
    /// The state of the devices is too long.
    #[error(transparent)]
    DeviceState(#[from] DeviceStateTooLong),
    /// A block's name or length is one that no snapshot has.
    #[error("a block of QEMU's memory cannot be kept: {0}")]
    Block(String),
    /// QEMU ended, or gave up.
    #[error("QEMU's stream ended before it was whole")]
    Cut,
    /// QEMU's socket cannot be read.
    #[error("QEMU's stream cannot be read")]
    Read(#[source] io::Error),
    /// The vault cannot be written.
    #[error("the snapshot cannot be written")]
    Write(#[source] io::Error),
}

/// The memory of a snapshot: its writer, which has all pages of RAM, and what is kept beside them.
pub(super) struct Taken<S: Sink, P: Sink> {
    /// To be finished, when the disks are in.
    pub writer: SnapshotWriter<S, P>,
    /// Preamble and devices.
    pub parts: Parts,
}

impl<S: Sink, P: Sink> std::fmt::Debug for Taken<S, P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Taken").field("writer", &self.writer).finish_non_exhaustive()
    }
}

/// Reads the stream of a background snapshot to its end. What is new may become differences to what `earlier` had in the same place. `begin` gets the blocks of RAM when they are known, in QEMU's order; `started` is called when the first pages come: from then on
/// QEMU watches the guest's writes, and the guest may run. After an error, too, it returns when QEMU has written everything.
///
/// # Errors
/// [`TakeError`]
pub(super) fn take<S: Sink, P: Sink>(
    from: impl Read + Send,
    earlier: Option<&mut Earlier<File>>,
    begin: impl FnOnce(Vec<Space>) -> io::Result<SnapshotWriter<S, P>>,
    started: impl FnOnce(),
) -> Result<Taken<S, P>, TakeError> {
    let (pieces, read) = sync_channel(WAITING);
    std::thread::scope(|scope| {
        scope.spawn(move || read_pieces(from, &pieces));
        let outcome =
            Taking { reader: Reader::of_snapshot(), preamble: Some(Preamble::default()), devices: DeviceState::default() };
        outcome.run(read, earlier.map(Before::new), begin, started)
    })
}

/// Reads until the end, or the first error; also when nobody listens any more, since QEMU must be able to write everything.
fn read_pieces(mut from: impl Read, to: &SyncSender<io::Result<Bytes>>) {
    let mut is_heard = true;
    loop {
        let mut piece = vec![0; PIECE];
        let read = from.read(&mut piece);
        let is_last = !matches!(read, Ok(1..));
        let read = read.map(|length| {
            piece.truncate(length);
            Bytes::from(piece)
        });
        match read {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => is_heard = is_heard && to.send(read).is_ok(),
        }
        if is_last {
            return;
        }
    }
}

/// What comes before the first page, as it is kept.
#[derive(Default)]
struct Preamble {
    writer: Writer,
    bytes: BytesMut,
}

struct Taking {
    reader: Reader,
    /// Until the first page.
    preamble: Option<Preamble>,
    devices: DeviceState,
}

impl Taking {
    fn run<S: Sink, P: Sink>(
        mut self,
        read: Receiver<io::Result<Bytes>>,
        mut before: Option<Before<'_>>,
        begin: impl FnOnce(Vec<Space>) -> io::Result<SnapshotWriter<S, P>>,
        started: impl FnOnce(),
    ) -> Result<Taken<S, P>, TakeError> {
        let (mut begin, mut started, mut writer, mut parts) = (Some(begin), Some(started), None, Parts::default());
        for piece in read {
            let piece = piece.map_err(TakeError::Read)?;
            if piece.is_empty() {
                break;
            }
            self.reader.buffer_mut().extend_from_slice(piece.chunk());
            while let Some(element) = self.reader.next_element()? {
                match element {
                    Element::Page { block, page, content } => {
                        let writer = writer.as_mut().ok_or(TakeError::Cut)?;
                        put(writer, block.0, page, &content, before.as_mut()).map_err(TakeError::Write)?;
                        continue;
                    }
                    Element::Opaque(bytes) => {
                        self.devices.push(&bytes)?;
                        continue;
                    }
                    Element::PartBegin => {
                        if let Some(preamble) = self.preamble.take() {
                            parts.preamble = preamble.bytes.to_vec();
                        }
                        if let Some(started) = started.take() {
                            started();
                        }
                        continue;
                    }
                    _ => {}
                }
                if let Element::RamStart(start) = &element
                    && let Some(begin) = begin.take()
                {
                    let spaces = start.blocks.iter().map(space).collect::<Result<Vec<_>, _>>()?;
                    if let Some(before) = &mut before {
                        before.find(&spaces);
                    }
                    writer = Some(begin(spaces).map_err(TakeError::Write)?);
                }
                if let Some(preamble) = &mut self.preamble {
                    preamble.writer.write(&element, &mut preamble.bytes)?;
                }
            }
        }
        parts.devices = self.devices.take().ok_or(TakeError::Cut)?.to_vec();
        let writer = writer.ok_or(TakeError::Cut)?;
        Ok(Taken { writer, parts })
    }
}

pub(super) fn space(block: &RamBlock) -> Result<Space, TakeError> {
    let name = String::from_utf8_lossy(block.id.as_bytes()).into_owned();
    let pages = u32::try_from(block.pages()).ok().filter(|_| name.as_bytes() == block.id.as_bytes());
    pages.map(|pages| Space { kind: SpaceKind::Ram, name: name.clone(), pages }).ok_or(TakeError::Block(name))
}

/// An earlier snapshot of the same VM, and which of its spaces each block was.
struct Before<'a> {
    earlier: &'a mut Earlier<File>,
    spaces: Vec<Option<u16>>,
}

impl<'a> Before<'a> {
    fn new(earlier: &'a mut Earlier<File>) -> Self {
        let began = Instant::now();
        earlier.hurry(move || began.elapsed());
        Self { earlier, spaces: vec![] }
    }

    fn find(&mut self, blocks: &[Space]) {
        self.spaces = blocks.iter().map(|block| self.earlier.space(SpaceKind::Ram, &block.name)).collect();
    }

    fn of(&mut self, block: u16) -> Option<(&mut Earlier<File>, u16)> {
        let space = self.spaces.get(usize::from(block)).copied().flatten()?;
        Some((&mut *self.earlier, space))
    }
}

fn put<S: Sink, P: Sink>(
    writer: &mut SnapshotWriter<S, P>,
    block: u16,
    page: u64,
    content: &PageContent,
    before: Option<&mut Before<'_>>,
) -> io::Result<()> {
    // What is zero needs not be told.
    let PageContent::Data(data) = content else { return Ok(()) };
    let page = u32::try_from(page).map_err(|_| io::ErrorKind::InvalidData)?;
    let content: &[u8; PAGE_SIZE] = data[..].try_into().map_err(|_| io::ErrorKind::InvalidData)?;
    match before.and_then(|before| before.of(block)) {
        Some(since) => writer.page_since(block, page, content, since)?,
        None => writer.page(block, page, content)?,
    };
    Ok(())
}
