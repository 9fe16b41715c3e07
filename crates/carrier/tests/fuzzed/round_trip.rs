//! A whole move: bytes say what the guest writes, what the destination tells, and whether that is so. The destination becomes what the source
//! is, or finds out itself.

use std::collections::{BTreeMap, VecDeque};

use godwit_carrier::Level;
use godwit_carrier::pages::digest::{ZERO, is_zero};
use godwit_carrier::pages::{COMMON, Digest, Encoder, EncoderLimits, MAX_PAYLOAD, PAGE_SIZE, Page, Pieces, Place, Sealer};

use super::memory::{Known, Memory, SHARED, beside, filled, noise};
use super::reference::{Outcome, Receiver};
use super::{BLOCKS, Checked, digester};

/// More pages than there are places, so that some are none.
const NUMBERS: u8 = 8;

/// The destination has found out that it does not hold what it said.
struct Refused;

struct Move {
    encoder: Encoder,
    sealer: Sealer,
    level: Level,
    limits: EncoderLimits,
    source: Memory,
    destination: Receiver,
    /// Where the destination said that it holds what it does not hold.
    lies: BTreeMap<(u16, u32), Digest>,
    wrong_pieces: bool,
    /// Answers on their way.
    answers: VecDeque<(Place, Pieces)>,
    /// How often each page was encoded.
    encoded: BTreeMap<(u16, u32), u64>,
    raw: u64,
    batches: usize,
}

pub(crate) fn run(bytes: &[u8]) -> Checked {
    let mut bytes = bytes.iter().copied();
    let mut move_ = Move::begin(&mut bytes);
    let refused = move_.go(&mut bytes).and_then(|()| move_.end()).is_err();
    assert!(!refused || move_.wrong_pieces || !move_.lies.is_empty(), "an honest destination finds a wrong check");
    Checked::Move { batches: move_.batches, refused }
}

impl Move {
    /// A byte for the limits, and one for each page: what the destination holds, and what it tells of it.
    fn begin(bytes: &mut impl Iterator<Item = u8>) -> Self {
        let limits = bytes.next().unwrap_or(0xff);
        let level = Level::all().cycle().nth(usize::from(limits)).unwrap_or_default();
        let limits = EncoderLimits { signatures: u64::from(limits & 15) * 520, contents: u64::from(limits >> 4) * 40 };
        let mut encoder = Encoder::new(digester(), &BLOCKS, limits);
        encoder.set_images(Box::new(Known));
        encoder.set_common((0..SHARED).filter_map(|page| beside(COMMON, page)).map(|content| digester().page(&content)));
        let (mut source, mut memory, mut lies) = (Memory::new(&BLOCKS), Memory::new(&BLOCKS), BTreeMap::new());
        assert!(!encoder.on_held(Place { block: 1, page: 0 }, [1; 16]) && !encoder.on_held(Place { block: 3, page: 0 }, [1; 16]));
        for (block, page) in memory.places() {
            let kept = bytes.next().unwrap_or(0);
            let held = content(kept >> 5, page, &source);
            memory.set(block, page, held);
            // The source has an older version, a newer one or another page.
            let mut own = held;
            own[usize::from(kept) * 16] ^= kept & 1;
            source.set(block, page, if kept & 2 == 0 { own } else { noise(70 + u64::from(page)) });
            let (truth, new) = (digester().page(&held), digester().page(source.get(block, page).expect("it is there")));
            let told = match kept >> 2 & 7 {
                0..=4 => truth,
                5 => new,
                6 => ZERO,
                _ => [kept; 16],
            };
            if told != truth {
                lies.insert((block, page), told);
            }
            // Nothing is said of zeros, and sometimes nothing of others.
            if told != ZERO || kept & 1 == 1 {
                assert!(encoder.on_held(Place { block, page }, told));
            }
        }
        Self {
            encoder,
            sealer: Sealer::new(),
            level,
            limits,
            source,
            destination: Receiver::new(memory),
            lies,
            wrong_pieces: false,
            answers: VecDeque::new(),
            encoded: BTreeMap::new(),
            raw: 0,
            batches: 0,
        }
    }

    fn go(&mut self, bytes: &mut impl Iterator<Item = u8>) -> Result<(), Refused> {
        while let Some(step) = bytes.next() {
            match step & 7 {
                0..=2 => {
                    let (at, what) = (bytes.next().unwrap_or(0), bytes.next().unwrap_or(0));
                    let place = Place { block: u16::from(at / NUMBERS % 4), page: u32::from(at % NUMBERS) };
                    self.write(place, step >> 3, what)?;
                }
                3 => self.encoder.set_asks(step & 8 == 0),
                4 => self.ask(step >> 3)?,
                5 => self.answer()?,
                // Nobody asked for these.
                6 => {
                    let at = bytes.next().unwrap_or(0);
                    let place = Place { block: u16::from(at / NUMBERS % 4), page: u32::from(at % NUMBERS) };
                    self.tell(place, [u32::from(step); 64], true)?;
                }
                _ if step & 8 == 0 => self.flush()?,
                _ => {
                    self.make_room()?;
                    let before = self.encoder.waiting();
                    let sent = self.encoder.wait_no_longer();
                    assert_eq!(self.encoder.waiting() + usize::from(sent.is_some()), before);
                }
            }
            self.check_limits();
        }
        Ok(())
    }

    fn write(&mut self, place: Place, how: u8, what: u8) -> Result<(), Refused> {
        self.make_room()?;
        let Some(now) = self.source.get(place.block, place.page).copied() else {
            assert!(!self.encoder.encode(place, Some(&filled(1))), "{place:?} is none");
            return Ok(());
        };
        let mut content = match how & 3 {
            0 => now,
            1 => content(what, place.page, &self.source),
            2 => noise(u64::from(what)),
            // Back to what the destination holds.
            _ => *self.destination.memory.get(place.block, place.page).expect("both have it"),
        };
        // Change some pieces, from none to all.
        let count = [1, 0, 3, 64][usize::from(how >> 2 & 3)];
        for piece in 0..if how & 3 == 1 { 0 } else { count } {
            content[(usize::from(what) * 64 + piece * 64) % PAGE_SIZE] ^= what | 1;
        }
        self.source.set(place.block, place.page, content);
        self.encode(place, &content);
        Ok(())
    }

    fn encode(&mut self, place: Place, content: &Page) {
        assert!(self.encoder.encode(place, (!is_zero(content)).then_some(content)));
        *self.encoded.entry((place.block, place.page)).or_default() += 1;
    }

    /// Asks for one page. What the encoder has put together goes first: the destination answers as things stand then.
    fn ask(&mut self, how: u8) -> Result<(), Refused> {
        self.flush()?;
        let Some(place) = self.encoder.ask() else { return Ok(()) };
        let held = self.destination.memory.get(place.block, place.page).expect("only pages that are there are asked for");
        let mut pieces = digester().told_pieces(held);
        if how & 1 == 1 {
            // As if a piece, or all of them, were what the source has.
            let own = digester().told_pieces(self.source.get(place.block, place.page).expect("it is there"));
            let first = usize::from(how >> 1) * 4;
            let chosen = if how & 2 == 0 { first..first + 1 } else { 0..64 };
            self.wrong_pieces |= pieces[chosen.clone()] != own[chosen.clone()];
            pieces[chosen.clone()].copy_from_slice(&own[chosen]);
        }
        self.answers.push_back((place, pieces));
        Ok(())
    }

    fn answer(&mut self) -> Result<(), Refused> {
        let Some((place, pieces)) = self.answers.pop_front() else { return Ok(()) };
        self.tell(place, pieces, false)
    }

    fn tell(&mut self, place: Place, pieces: Pieces, wrong: bool) -> Result<(), Refused> {
        self.make_room()?;
        let before = self.encoder.waiting();
        self.encoder.on_pieces(place, &pieces);
        let taken = self.encoder.waiting() < before;
        self.wrong_pieces |= wrong && taken;
        Ok(())
    }

    fn make_room(&mut self) -> Result<(), Refused> {
        if self.encoder.is_full() { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), Refused> {
        let Some(batch) = self.encoder.take() else { return Ok(()) };
        let payload = self.sealer.seal(&batch, self.level);
        self.encoder.on_sealed(&batch, payload.len());
        assert!(payload.len() <= MAX_PAYLOAD, "{} bytes", payload.len());
        assert!(!self.encoder.is_full());
        self.raw += batch.raw;
        self.batches += 1;
        match self.destination.receive(&payload) {
            Outcome::Applied { .. } => Ok(()),
            Outcome::Check { .. } => Err(Refused),
            other => panic!("an encoder has written what is none: {other:?}"),
        }
    }

    fn check_limits(&self) {
        let used = self.encoder.used();
        assert!(used.signatures <= self.limits.signatures && used.contents <= self.limits.contents, "{used:?}");
        assert!(self.encoder.unasked() <= self.encoder.waiting() && self.encoder.waiting() <= self.source.places().len());
    }

    /// The VM stands still: what waits goes out, and what the guest has never written to.
    fn end(&mut self) -> Result<(), Refused> {
        self.encoder.set_asks(false);
        loop {
            self.make_room()?;
            if self.encoder.wait_no_longer().is_none() {
                break;
            }
        }
        for (block, page) in self.source.places() {
            if self.encoded.contains_key(&(block, page)) {
                continue;
            }
            self.make_room()?;
            let content = *self.source.get(block, page).expect("it is there");
            self.encode(Place { block, page }, &content);
        }
        self.flush()?;
        assert_eq!((self.encoder.waiting(), self.encoder.unasked()), (0, 0));
        assert!(self.raw <= self.encoded.values().sum::<u64>() * PAGE_SIZE as u64);
        let again: Vec<_> = self.encoded.iter().filter(|(_, times)| **times > 1).map(|(place, _)| *place).collect();
        self.encoder.on_stopped();
        let said: Vec<_> = std::iter::from_fn(|| self.encoder.take_written_to()).map(|place| (place.block, place.page)).collect();
        assert_eq!(said, again);
        for (block, page) in self.source.places() {
            let (own, there) = (self.source.get(block, page), self.destination.memory.get(block, page));
            // Of a page of which the destination claims to hold just what the source has, nothing is sent: no check can find that out.
            let lie = self.lies.get(&(block, page));
            let believed = lie.is_some_and(|lie| Some(*lie) == own.map(|own| digester().page(own)));
            assert!(own == there || believed, "page {page} of block {block} is another");
        }
        Ok(())
    }
}

fn content(what: u8, page: u32, source: &Memory) -> Page {
    match what & 7 {
        0 => filled(0),
        1 => filled(b'a' + (what >> 3)),
        2 => *source.get(0, u32::from(what >> 3) % BLOCKS[0]).expect("block 0 has it"),
        3 | 4 => noise(40),
        _ => noise(50 + u64::from(page)),
    }
}
