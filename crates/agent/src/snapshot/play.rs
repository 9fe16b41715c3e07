//! Plays the source of a post-copy migration to a QEMU, out of the vault: the VM runs as soon as its devices are loaded, whatever its size.
//!
//! ```text
//! header, configuration, advise, RAM's start   discard   package { devices }   pages … end
//!                                                                  ◀── loaded ── asks for pages ──  shut
//! ```
//! A page that is asked for goes ahead of all others, and takes those around it along; those that hold zeros are sent only in that way. While the guest finds its feet, every page that
//! nobody has asked for costs it time: such pages wait until it asks for nothing. No page goes twice: QEMU gives up over it. What a VM has asked for first when it began from the snapshot before
//! is sent while the devices are loaded, and after them.
//!
//! Who plays may die in the middle of it: QEMU waits then, and whoever plays on asks it what it has.
//!
//! ```text
//! received? …                   resume                    pages … end
//!             ◀── what it has ──        ◀── it goes on ── asks for pages ──  shut
//! ```

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use godwit_carrier::pages::{PageSet, Place};
use godwit_stream::postcopy::{
    PagesAfter, Received, ReceivedError, put_advise, put_ask_received, put_discards, put_end, put_package, put_resume,
};
use godwit_stream::{
    BlockId, Element, PAGE_SIZE, RamBlock, RamStart, Reader, ReturnError, ReturnMessage, ReturnReader, StreamError, WriteError,
    Writer,
};
use godwit_vault::{Contents, ContentsError, Space};
use rustix::net::sockopt::set_socket_send_buffer_size;

/// Number of the sign of life that QEMU gives when it has loaded the devices.
const LOADED: u32 = 3;
/// QEMU's commands to open the way back, and to ask for a sign of life.
const OPEN_RETURN_PATH: u16 = 1;
const PING: u16 = 2;
/// What may lie in the socket ahead of a page that is asked for.
const AHEAD: usize = 64 << 10;
/// Messages of QEMU that may wait.
const UNHEARD: usize = 1024;
/// Pages that QEMU asks for at once: those of a large page.
const MOST_ASKED: u64 = 512;
/// Pages that are sent in the background before requests are looked at: those of a chunk.
const BURST: usize = 16;
/// Pages that are likely to be asked for that are sent before requests are looked at.
const FEW: usize = 4;
/// Pages, at a multiple of it, that go along with one of them: they are read with it, and likely to be wanted next.
const AROUND: u32 = 16;
/// Pages of zeros that go along with those before them: a guest that uses new memory uses more of it.
const ZEROS_AHEAD: u32 = 64;
/// So long the guest must ask for nothing before pages are sent in the background, in its first moments.
const SILENCE: Duration = Duration::from_millis(3);
const FIRST_MOMENTS: Duration = Duration::from_secs(1);

/// Why a VM cannot be had out of a snapshot.
#[derive(Debug, thiserror::Error)]
pub(super) enum PlayError {
    /// A page cannot be read.
    #[error(transparent)]
    Contents(#[from] ContentsError),
    /// The snapshot has no RAM, or other blocks than its stream.
    #[error("the snapshot has no memory, or another than its stream says")]
    NoRam,
    /// The beginning of the stream that was kept is none.
    #[error("the beginning of the kept stream is not understood")]
    Preamble(#[from] StreamError),
    /// The stream cannot be written.
    #[error("the stream cannot be written")]
    Write(#[from] WriteError),
    /// QEMU's socket.
    #[error("QEMU's socket cannot be used")]
    Socket(#[from] io::Error),
    /// QEMU says what is not known.
    #[error("what QEMU says is not understood")]
    Answer(#[from] ReturnError),
    /// QEMU says that it has what it cannot have.
    #[error("what QEMU says of the memory that it has cannot be")]
    Received(#[from] ReceivedError),
    /// QEMU says something else than it was asked.
    #[error("QEMU does not answer what it was asked")]
    Unasked,
    /// QEMU could not load it, or ended.
    #[error("QEMU did not take the snapshot")]
    Refused,
}

/// What was played.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Played {
    /// Pages that QEMU asked for and that were sent for it.
    pub asked: u64,
    /// Pages that were sent in the background.
    pub background: u64,
}

/// Who is told what was asked for first.
type Keep<'a> = Box<dyn FnOnce(&[(u16, u32)]) + 'a>;

/// What QEMU says, and that it says no more.
type Said = Option<Result<ReturnMessage, PlayError>>;

/// Plays a snapshot to a QEMU that waits for a post-copy migration on the other end of `socket`; `loaded` is called when it has taken the devices and may run. Returns
/// when QEMU has all memory. It waits as long as QEMU lives: whoever gives up ends that. The pages of `first`, as block and number, are likely to be wanted first; `keep` is told, after the guest's
/// first moments, which others were.
///
/// # Errors
/// [`PlayError`]. Before `loaded` QEMU has ended, or is to be; after it the VM waits for the memory that it does not have, until somebody [plays on](play_on).
pub(super) fn play(
    socket: UnixStream,
    contents: Contents,
    first: &[(u16, u32)],
    loaded: impl FnOnce(),
    keep: impl FnOnce(&[(u16, u32)]),
) -> Result<Played, PlayError> {
    converse(&socket, |said| {
        let mut player = Player::begin(&socket, contents)?;
        player.keep = Some(Box::new(keep));
        player.first = first.iter().map(|(block, page)| Place { block: *block, page: *page }).collect();
        player.run(said, Some(loaded))
    })
}

/// Plays on to a QEMU that has lost whoever played the snapshot to it after it had loaded the devices, and recovers on the other end of `socket`; `resumed` is called when it
/// goes on. Returns as [`play`] does.
///
/// # Errors
/// [`PlayError`]. Before `resumed` an old QEMU may have ended; else the VM waits for the memory that it does not have, as before.
pub(super) fn play_on(socket: UnixStream, contents: Contents, resumed: impl FnOnce()) -> Result<Played, PlayError> {
    converse(&socket, |said| {
        let mut player = Player::open(&socket, contents)?.0;
        let early = player.resume(said)?;
        resumed();
        player.early = early;
        player.run(said, None::<fn()>)
    })
}

/// Has QEMU heard while somebody speaks to it.
fn converse(socket: &UnixStream, speak: impl FnOnce(&Receiver<Said>) -> Result<Played, PlayError>) -> Result<Played, PlayError> {
    set_socket_send_buffer_size(socket, AHEAD).map_err(io::Error::from)?;
    let (sender, said) = sync_channel(UNHEARD);
    let listening = socket.try_clone()?;
    std::thread::scope(|scope| {
        scope.spawn(move || listen(listening, &sender));
        let played = speak(&said);
        // Whoever listens ends with it, also if it waits for being heard.
        drop(said);
        let _ = socket.shutdown(Shutdown::Both);
        played
    })
}

/// Hears QEMU until the end.
fn listen(mut socket: UnixStream, to: &SyncSender<Said>) {
    let (mut reader, mut piece) = (ReturnReader::new(), vec![0; 4096]);
    loop {
        loop {
            let message = match reader.next_message() {
                Ok(Some(message)) => Ok(message),
                Ok(None) => break,
                Err(error) => Err(error.into()),
            };
            let is_wrong = message.is_err();
            if to.send(Some(message)).is_err() || is_wrong {
                return;
            }
        }
        match socket.read(&mut piece) {
            Ok(0) | Err(_) => {
                let _ = to.send(None);
                return;
            }
            Ok(length) => reader.buffer_mut().extend_from_slice(&piece[..length]),
        }
    }
}

struct Player<'a> {
    socket: &'a UnixStream,
    contents: Contents,
    ids: Vec<BlockId>,
    section: u32,
    /// What is to be sent, and zeros that were.
    left: PageSet,
    zeros: PageSet,
    /// The block that QEMU asked for last.
    asked: Option<u16>,
    /// What QEMU asked for before it could be answered.
    early: VecDeque<ReturnMessage>,
    /// What is likely to be asked for first; what was, and who is told of that.
    first: VecDeque<Place>,
    was_first: Vec<(u16, u32)>,
    keep: Option<Keep<'a>>,
    /// Since when the guest runs, as far as it is known.
    ran: Option<Instant>,
    played: Played,
}

impl<'a> Player<'a> {
    /// Knows what there is to send; with what comes before RAM's start, and that start.
    fn open(socket: &'a UnixStream, mut contents: Contents) -> Result<(Self, Vec<Element>, RamStart), PlayError> {
        let (before, start) = preamble(&contents.snapshot().parts().preamble)?;
        let lengths: Vec<u32> = contents.spaces().iter().map(|space| space.pages).collect();
        let is_same = |(block, space): &(&RamBlock, &Space)| {
            block.id.as_bytes() == space.name.as_bytes() && block.pages() == u64::from(space.pages)
        };
        if start.blocks.iter().zip(contents.spaces()).take_while(is_same).count() != start.blocks.len() {
            return Err(PlayError::NoRam);
        }
        let (mut left, zeros) = (PageSet::new(&lengths), PageSet::new(&lengths));
        let ids: Vec<BlockId> = start.blocks.iter().map(|block| block.id.clone()).collect();
        for block in 0..ids.len() as u16 {
            for first in contents.snapshot().leaves(block).collect::<Vec<_>>() {
                for page in contents.located(block, first)? {
                    left.insert(Place { block, page });
                }
            }
        }
        let player = Self {
            socket,
            contents,
            ids,
            section: start.section,
            left,
            zeros,
            asked: None,
            early: VecDeque::new(),
            first: VecDeque::new(),
            was_first: vec![],
            keep: None,
            ran: None,
            played: Played::default(),
        };
        Ok((player, before, start))
    }

    /// Says everything before the first page.
    fn begin(socket: &'a UnixStream, contents: Contents) -> Result<Self, PlayError> {
        let (player, before, start) = Self::open(socket, contents)?;
        let mut out = BytesMut::new();
        let mut writer = Writer::new();
        let ping = |number: u32| Element::Command { number: PING, payload: Bytes::copy_from_slice(&number.to_be_bytes()) };
        for element in &before {
            writer.write(element, &mut out)?;
        }
        writer.write(&Element::Command { number: OPEN_RETURN_PATH, payload: Bytes::new() }, &mut out)?;
        writer.write(&ping(1), &mut out)?;
        put_advise(&mut out);
        let first = player.ids.first().cloned().ok_or(PlayError::NoRam)?;
        writer.write(&Element::RamStart(start), &mut out)?;
        // One page at least: without it QEMU takes another way, and stands still for ever.
        put_discards(&mut out, &first, &[(0, 1)]);
        writer.write(&ping(2), &mut out)?;
        put_package(&mut out, &player.contents.snapshot().parts().devices, LOADED);
        player.send(&out)?;
        Ok(player)
    }

    /// Asks a QEMU that recovers what it has, and has it go on; what it has asked for by then.
    fn resume(&mut self, said: &Receiver<Said>) -> Result<VecDeque<ReturnMessage>, PlayError> {
        let mut early = VecDeque::new();
        // One after the other: so neither waits for being heard.
        for block in 0..self.ids.len() {
            self.ask_received(block, said, &mut early)?;
        }
        let mut out = BytesMut::new();
        put_resume(&mut out);
        self.send(&out)?;
        match answer(said, &mut early)? {
            ReturnMessage::ResumeAck(1) => Ok(early),
            _ => Err(PlayError::Unasked),
        }
    }

    /// Nothing that QEMU has of a block is sent.
    fn ask_received(&mut self, block: usize, said: &Receiver<Said>, early: &mut VecDeque<ReturnMessage>) -> Result<(), PlayError> {
        let (Some(id), Some(space)) = (self.ids.get(block), self.contents.spaces().get(block)) else {
            return Err(PlayError::NoRam);
        };
        let mut out = BytesMut::new();
        put_ask_received(&mut out, id);
        let (id, pages) = (id.clone(), space.pages);
        self.send(&out)?;
        let mut received = match answer(said, early)? {
            ReturnMessage::RecvBitmap { block, size } if block == id => Received::begin(pages, size)?,
            _ => return Err(PlayError::Unasked),
        };
        loop {
            match answer(said, early)? {
                ReturnMessage::Bitmap(piece) => {
                    if received.push(&piece)? {
                        break;
                    }
                }
                _ => return Err(PlayError::Unasked),
            }
        }
        let block = u16::try_from(block).map_err(|_| PlayError::NoRam)?;
        for page in received.pages()? {
            let place = Place { block, page };
            if !self.left.remove(place) {
                self.zeros.insert(place);
            }
        }
        Ok(())
    }

    /// Sends what is asked for, and all else, until QEMU has it.
    fn run(mut self, said: &Receiver<Said>, mut loaded: Option<impl FnOnce()>) -> Result<Played, PlayError> {
        let mut at = Place { block: 0, page: 0 };
        self.ran = loaded.is_none().then(Instant::now);
        let mut has_ended = false;
        loop {
            if self.ran.is_some() && !self.is_in_first_moments() {
                self.keep_first();
            }
            // While there is something to send, whether something was said; then, what is said.
            let heard = if let Some(message) = self.early.pop_front() {
                Some(Some(Ok(message)))
            } else if !self.first.is_empty() {
                said.try_recv().map_or_else(|why| (why == TryRecvError::Disconnected).then_some(None), Some)
            } else if self.left.is_empty() && has_ended || loaded.is_some() {
                Some(said.recv().unwrap_or(None))
            } else if self.is_in_first_moments() {
                match said.recv_timeout(SILENCE) {
                    Err(RecvTimeoutError::Timeout) => None,
                    said => Some(said.unwrap_or(None)),
                }
            } else {
                said.try_recv().ok()
            };
            match heard {
                None => {}
                Some(None) => return Err(PlayError::Refused),
                Some(Some(message)) => {
                    match message? {
                        ReturnMessage::Shut(0) if has_ended => {
                            self.keep_first();
                            return Ok(self.played);
                        }
                        ReturnMessage::Shut(_) => return Err(PlayError::Refused),
                        ReturnMessage::Pong(LOADED) => {
                            if let Some(loaded) = loaded.take() {
                                loaded();
                                self.ran = Some(Instant::now());
                            }
                        }
                        // It has asked for zeros before it heard the end, which gives it all zeros there are, and reads no more.
                        ReturnMessage::ReqPagesId { .. } | ReturnMessage::ReqPages { .. } if has_ended => {}
                        ReturnMessage::ReqPagesId { start, length, block } => {
                            self.asked = self.ids.iter().position(|id| *id == block).and_then(|block| u16::try_from(block).ok());
                            at = self.answer(start, length)?.unwrap_or(at);
                        }
                        ReturnMessage::ReqPages { start, length } => at = self.answer(start, length)?.unwrap_or(at),
                        _ => {}
                    }
                    continue;
                }
            }
            if !self.first.is_empty() {
                self.send_first()?;
            } else if self.left.is_empty() {
                let mut out = BytesMut::new();
                put_end(&mut out, self.section);
                self.send(&out)?;
                has_ended = true;
            } else {
                at = self.go_on(at)?;
            }
        }
    }

    fn is_in_first_moments(&self) -> bool {
        self.ran.is_some_and(|ran| ran.elapsed() < FIRST_MOMENTS)
    }

    fn keep_first(&mut self) {
        if let Some(keep) = self.keep.take() {
            keep(&std::mem::take(&mut self.was_first));
        }
    }

    /// Sends the next of what is likely to be asked for first.
    fn send_first(&mut self) -> Result<(), PlayError> {
        let mut places = Vec::with_capacity(FEW);
        while places.len() < FEW
            && let Some(place) = self.first.pop_front()
        {
            if self.left.remove(place) {
                places.push(place);
            }
        }
        self.played.background += places.len() as u64;
        self.pages(&places)
    }

    /// Sends pages that QEMU waits for, unless it has them; where to go on.
    fn answer(&mut self, start: u64, length: u32) -> Result<Option<Place>, PlayError> {
        let Some(block) = self.asked else { return Ok(None) };
        let size = PAGE_SIZE as u64;
        let (first, last) = (start / size, start.saturating_add(u64::from(length)).div_ceil(size));
        let pages = first..last.min(first.saturating_add(MOST_ASKED));
        let places: Vec<Place> = pages.filter_map(|page| Some(Place { block, page: u32::try_from(page).ok()? })).collect();
        let mut wanted = Vec::with_capacity(places.len());
        let is_first = self.keep.is_some();
        for place in &places {
            if self.left.remove(*place) {
                wanted.push(*place);
                if is_first {
                    self.was_first.push((place.block, place.page));
                }
            } else if self.is_new_zero(*place)? {
                wanted.push(*place);
            }
        }
        self.played.asked += wanted.len() as u64;
        self.pages(&wanted)?;
        if let Some(last) = wanted.last() {
            self.along_with(*last)?;
        }
        Ok(places.last().map(|last| Place { page: last.page.saturating_add(1), ..*last }))
    }

    /// Sends what is likely to be asked for after a page.
    fn along_with(&mut self, asked: Place) -> Result<(), PlayError> {
        let Place { block, page } = asked;
        let pages = self.contents.spaces().get(usize::from(block)).map_or(0, |space| space.pages);
        let mut along = Vec::new();
        if self.contents.page(block, page)?.is_none() {
            for page in (page + 1)..page.saturating_add(ZEROS_AHEAD).min(pages) {
                let place = Place { block, page };
                if self.left.contains(place) || !self.is_new_zero(place)? {
                    break;
                }
                along.push(place);
            }
        } else {
            let first = page - page % AROUND;
            let around = (first..first.saturating_add(AROUND)).map(|page| Place { block, page });
            along.extend(around.filter(|place| self.left.remove(*place)));
        }
        self.played.background += along.len() as u64;
        self.pages(&along)
    }

    /// Whether a page holds zeros and was not sent as that. One that was in `left` has gone already.
    fn is_new_zero(&mut self, place: Place) -> Result<bool, PlayError> {
        let is_zero = self.contents.page(place.block, place.page)?.is_none();
        Ok(is_zero && self.zeros.insert(place))
    }

    /// Sends the next pages in the background; where to go on.
    fn go_on(&mut self, mut at: Place) -> Result<Place, PlayError> {
        let mut places = Vec::with_capacity(BURST);
        while places.len() < BURST
            && let Some(place) = self.left.next(at)
        {
            self.left.remove(place);
            places.push(place);
            at = Place { page: place.page.saturating_add(1), ..place };
        }
        self.played.background += places.len() as u64;
        self.pages(&places)?;
        Ok(at)
    }

    fn pages(&mut self, places: &[Place]) -> Result<(), PlayError> {
        if places.is_empty() {
            return Ok(());
        }
        let mut out = BytesMut::with_capacity(places.len() * (PAGE_SIZE + 64));
        let mut pages = PagesAfter::begin(&mut out, self.section);
        for place in places {
            let Some(id) = self.ids.get(usize::from(place.block)) else { continue };
            let content = self.contents.page(place.block, place.page)?;
            pages.put((place.block, id), place.page, content.unwrap_or(&[0; PAGE_SIZE]));
        }
        pages.end();
        self.send(&out)
    }

    fn send(&self, bytes: &[u8]) -> Result<(), PlayError> {
        let mut to = self.socket;
        Ok(to.write_all(bytes)?)
    }
}

/// What QEMU answers to a question; what it asks for meanwhile is put by. There is no more of that than it has threads that wait.
fn answer(said: &Receiver<Said>, early: &mut VecDeque<ReturnMessage>) -> Result<ReturnMessage, PlayError> {
    loop {
        let message = said.recv().unwrap_or(None).ok_or(PlayError::Refused)??;
        match message {
            ReturnMessage::ReqPagesId { .. } | ReturnMessage::ReqPages { .. } if early.len() < UNHEARD => early.push_back(message),
            message => return Ok(message),
        }
    }
}

/// What comes before RAM's start, but commands; and that start.
pub(super) fn preamble(bytes: &[u8]) -> Result<(Vec<Element>, RamStart), PlayError> {
    let mut reader = Reader::of_snapshot();
    reader.buffer_mut().extend_from_slice(bytes);
    let mut before = Vec::new();
    while let Some(element) = reader.next_element()? {
        match element {
            Element::RamStart(start) => return Ok((before, start)),
            Element::Command { .. } => {}
            element => before.push(element),
        }
    }
    Err(PlayError::NoRam)
}
