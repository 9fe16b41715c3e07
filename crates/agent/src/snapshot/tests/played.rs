//! QEMU is played: streams that are cut, vaults that are full or damaged, a QEMU that asks for anything, or ends.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use bytes::{Bytes as Chunk, BytesMut};
use godwit_model::Bytes;
use godwit_stream::{
    BlockId, BlockIndex, Configuration, Element, PAGE_SIZE, PageContent, RamBlock, RamStart, ReturnMessage, ReturnWriter, Writer,
};
use godwit_vault::{Keys, Known, PackId, PackKey, SnapshotWriter, Space, TeamKey, Vault};
use uuid::Uuid;

use super::super::play::{PlayError, Played, play, play_on};
use super::super::take::{TakeError, take};
use super::{id, snapshot_key};

const DEVICES: &[u8] = &[4, 1, 2, 3];
const PAGES: u32 = 700;
/// How the commands before the first page end: QEMU may run.
const RUN: [u8; 5] = [8, 0, 5, 0, 0];

fn block(name: &str, pages: u32) -> RamBlock {
    RamBlock { id: BlockId::new(name.as_bytes()).expect("a name"), length: u64::from(pages) * PAGE_SIZE as u64 }
}

/// Most pages hold something, some the same, some zeros.
fn content(page: u32) -> [u8; PAGE_SIZE] {
    let mut content = [0; PAGE_SIZE];
    if !page.is_multiple_of(3) {
        blake3::Hasher::new().update(&(page % 500).to_be_bytes()).finalize_xof().fill(&mut content);
    }
    content
}

/// What QEMU writes with the capability `background-snapshot`, and how much of it comes before the first page.
fn stream() -> (Vec<u8>, usize) {
    let (mut out, mut writer) = (BytesMut::new(), Writer::new());
    let mut put = |element: Element, out: &mut BytesMut| writer.write(&element, out).expect("it may stand here");
    put(Element::Header, &mut out);
    put(Element::Configuration(Configuration { machine: "pc-q35-7.2".into(), subsections: vec![] }), &mut out);
    let blocks = vec![block("pc.ram", PAGES), block("pc.rom", 1)];
    put(Element::RamStart(RamStart { section: 2, instance: 0, blocks, multifd_flush: false }), &mut out);
    let before = out.len();
    // As the guest writes to them, and QEMU comes across them.
    for part in [300..PAGES, 0..300] {
        put(Element::PartBegin, &mut out);
        for page in part {
            let content = content(page);
            let is_zero = content == [0; PAGE_SIZE];
            let content = if is_zero { PageContent::Zero } else { PageContent::Data(Chunk::copy_from_slice(&content)) };
            put(Element::Page { block: BlockIndex(0), page: page.into(), content }, &mut out);
        }
        put(Element::PartEnd, &mut out);
    }
    out.extend_from_slice(DEVICES);
    out.extend_from_slice(&[0, 6, 0, 0, 0, 2, b'{', b'}']);
    (out.to_vec(), before)
}

fn keys() -> Keys {
    Keys { snapshot: snapshot_key(1), team: TeamKey::new([9; 32]), pack: PackKey::new([1; 32]) }
}

fn writer(spaces: Vec<Space>, limit: Bytes) -> std::io::Result<SnapshotWriter<Vec<u8>, Vec<u8>>> {
    SnapshotWriter::begin((vec![], vec![]), PackId::new(Uuid::nil()), &keys(), spaces, Known::new(10_000), limit)
}

#[test]
fn what_qemu_writes_is_taken_and_the_guest_may_run_when_its_pages_begin() {
    let (stream, before) = stream();
    let mut started = 0;
    let taken = take(&stream[..], None, |spaces| writer(spaces, Bytes(u64::MAX)), || started += 1).expect("taken");
    assert_eq!((started, &taken.parts.devices[..], &taken.parts.preamble[..]), (1, DEVICES, &stream[..before]));
    let totals = taken.writer.totals();
    assert_eq!(totals.new + totals.known, (0..PAGES).filter(|page| !page.is_multiple_of(3)).count() as u64);
}

#[test]
fn a_stream_cut_anywhere_is_no_snapshot() {
    let (stream, _) = stream();
    let (last, step) = (stream.len() - 20, 4_999);
    for length in (0..last).step_by(step).chain(last..stream.len()) {
        let taken = take(&stream[..length], None, |spaces| writer(spaces, Bytes(u64::MAX)), || ());
        assert!(matches!(taken, Err(TakeError::Cut)), "{length}: {taken:?}");
    }
    let mut odd = stream.clone();
    odd[0] = b'X';
    assert!(matches!(take(&odd[..], None, |spaces| writer(spaces, Bytes(u64::MAX)), || ()), Err(TakeError::Stream(_))));
}

#[test]
fn a_vault_without_room_ends_it() {
    let (stream, _) = stream();
    let taken = take(&stream[..], None, |spaces| writer(spaces, Bytes::mib(1)), || ());
    assert!(matches!(&taken, Err(TakeError::Write(error)) if error.kind() == ErrorKind::FileTooLarge), "{taken:?}");
}

fn vault(dir: &Path) -> Vault {
    let vault = Vault::open(dir).expect("a vault");
    let draft = vault.begin(id(1)).expect("begun");
    let (stream, _) = stream();
    let taken =
        take(&stream[..], None, |spaces| draft.writer(&keys(), spaces, Known::new(10_000), Bytes(u64::MAX)), || ()).expect("taken");
    let (_, _, totals) = taken.writer.finish(&taken.parts).expect("finished");
    draft.commit(&totals).expect("committed");
    vault
}

/// What the played QEMU does when it has the devices.
struct Qemu {
    socket: UnixStream,
    heard: Vec<u8>,
    writer: ReturnWriter,
}

impl Qemu {
    fn say(&mut self, message: &ReturnMessage) {
        let mut out = BytesMut::new();
        self.writer.write(message, &mut out).expect("a message");
        self.socket.write_all(&out).expect("it is listened to");
    }

    fn hear(&mut self) -> bool {
        let mut piece = [0; 64 << 10];
        match self.socket.read(&mut piece) {
            Ok(length @ 1..) => {
                self.heard.extend_from_slice(&piece[..length]);
                true
            }
            _ => false,
        }
    }

    /// Says of each block what it has, when it is asked.
    fn say_what_it_has(&mut self, ram: &[u32]) {
        for (name, pages, received) in [("pc.ram", PAGES, ram), ("pc.rom", 1, &[][..])] {
            let question = [&[8, 0, 10, 0, 7, 6][..], name.as_bytes()].concat();
            while self.heard.len() < question.len() {
                assert!(self.hear(), "it is asked");
            }
            assert_eq!(self.heard.drain(..).collect::<Vec<u8>>(), question, "one after the other");
            self.say_bitmap(name, &bitmap(pages, received));
        }
    }

    fn say_bitmap(&mut self, name: &str, bits: &[u8]) {
        let block = BlockId::new(name.as_bytes()).expect("a name");
        let mut out = BytesMut::new();
        for message in
            [ReturnMessage::RecvBitmap { block, size: bits.len() as u64 }, ReturnMessage::Bitmap(Chunk::copy_from_slice(bits))]
        {
            self.writer.write(&message, &mut out).expect("a message");
        }
        // Who refuses its size reads no more.
        let _ = self.socket.write_all(&out);
    }

    /// Hears that it is to go on.
    fn hear_resume(&mut self) {
        while self.heard.len() < 5 {
            assert!(self.hear(), "it is to go on");
        }
        assert_eq!(self.heard.drain(..).collect::<Vec<u8>>(), [8, 0, 9, 0, 0]);
    }

    /// Hears everything up to the point from which on pages come.
    fn load(&mut self) {
        while !self.heard.windows(RUN.len()).any(|bytes| bytes == RUN) {
            assert!(self.hear(), "the devices come");
        }
        let at = self.heard.windows(RUN.len()).position(|bytes| bytes == RUN).expect("found");
        assert!(self.heard[..at].windows(DEVICES.len()).any(|bytes| bytes == DEVICES));
        self.heard.drain(..at + RUN.len());
    }

    fn ask(&mut self, page: u32, pages: u32) {
        let (start, length) = (u64::from(page) * PAGE_SIZE as u64, pages * PAGE_SIZE as u32);
        self.say(&ReturnMessage::ReqPagesId { start, length, block: BlockId::new(b"pc.ram").expect("a name") });
    }

    /// The pages that came, in order, once the end has.
    fn pages(&mut self) -> Vec<(u32, Vec<u8>)> {
        while !self.heard.ends_with(&[3, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0x10, 0x7e, 0, 0, 0, 2, 0]) {
            assert!(self.hear(), "the end comes");
        }
        let (mut rest, mut pages) = (&self.heard[..], vec![]);
        while let Some((2, section)) = rest.split_first().map(|(kind, rest)| (*kind, rest)) {
            rest = &section[4..];
            loop {
                let word = u64::from_be_bytes(rest[..8].try_into().expect("eight"));
                rest = &rest[8..];
                if word & 0xfff == 0x10 {
                    rest = &rest[5..];
                    break;
                }
                if word & 0x20 == 0 {
                    rest = &rest[1 + usize::from(rest[0])..];
                }
                let length = if word & 2 != 0 { 1 } else { PAGE_SIZE };
                pages.push(((word >> 12) as u32, rest[..length].to_vec()));
                rest = &rest[length..];
            }
        }
        pages
    }
}

/// What a QEMU has of a block.
fn bitmap(pages: u32, received: &[u32]) -> Vec<u8> {
    let mut bits = vec![0; pages.div_ceil(64) as usize * 8];
    received.iter().for_each(|page| bits[*page as usize / 8] |= 1 << (page % 8));
    bits
}

/// Plays on to a `qemu` that recovers; whether it was heard that it goes on.
fn played_on(vault: &Vault, qemu: impl FnOnce(Qemu) + Send) -> (Result<Played, PlayError>, bool) {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let contents = vault.snapshot(id(1), &snapshot_key(1)).expect("opened");
    let mut resumed = false;
    let played = thread::scope(|scope| {
        scope.spawn(move || qemu(Qemu { socket: theirs, heard: vec![], writer: ReturnWriter::new() }));
        play_on(ours, contents, || resumed = true)
    });
    (played, resumed)
}

#[test]
fn who_plays_on_asks_what_there_is_and_sends_what_is_not_and_no_page_twice() {
    let dir = tempfile::tempdir().expect("a directory");
    let vault = vault(dir.path());
    for received in
        [vec![], (0..PAGES).filter(|page| page % 7 < 3).collect::<Vec<u32>>(), (100..PAGES).collect(), (0..PAGES).collect()]
    {
        let has = |page: &u32| received.contains(page);
        let early = (0..PAGES).find(|page| !page.is_multiple_of(3) && !has(page));
        let zero = (0..PAGES).rfind(|page| page.is_multiple_of(3) && !has(page));
        let (told, resumed) = played_on(&vault, |mut qemu| {
            qemu.say_what_it_has(&received);
            // Its threads wait for pages all the time.
            early.iter().for_each(|page| qemu.ask(*page, 1));
            qemu.hear_resume();
            qemu.say(&ReturnMessage::ResumeAck(1));
            early.iter().chain(&zero).chain(&zero).for_each(|page| qemu.ask(*page, 1));
            // What it has was on its way to it when it asked.
            received.first().iter().chain(&received.last()).for_each(|page| qemu.ask(**page, 1));
            let pages = qemu.pages();
            let mut numbers: Vec<u32> = pages.iter().map(|(page, _)| *page).collect();
            assert_eq!(numbers.first().copied(), early.or(zero), "what is waited for comes first");
            numbers.sort_unstable();
            let along = numbers.iter().filter(|page| page.is_multiple_of(3)).count();
            assert!(numbers.windows(2).all(|pages| pages[0] < pages[1]), "each once: {numbers:?}");
            assert!(!numbers.iter().any(&has), "it has some: {numbers:?}");
            assert!(zero.is_none_or(|zero| numbers.contains(&zero)) && along <= 1, "{numbers:?}");
            let wanted = (0..PAGES).filter(|page| !page.is_multiple_of(3) && !has(page)).count();
            assert_eq!(numbers.len() - along, wanted, "all that is not zeros");
            for (page, found) in &pages {
                let content = content(*page);
                assert!(found[..] == content[..] || (found[..] == [0] && content == [0; PAGE_SIZE]), "page {page}");
            }
            qemu.say(&ReturnMessage::Shut(0));
        });
        told.expect("played");
        assert!(resumed);
    }
}

#[test]
fn a_qemu_that_says_what_cannot_be_is_not_played_on_to() {
    let dir = tempfile::tempdir().expect("a directory");
    let vault = vault(dir.path());
    let all = bitmap(PAGES, &[]);
    let mut behind = all.clone();
    behind[PAGES as usize / 8] |= 1 << (PAGES % 8);
    let say = |name: &'static str, bits: Vec<u8>| {
        let (told, resumed) = played_on(&vault, move |mut qemu| {
            qemu.say_bitmap(name, &bits);
            while qemu.hear() {}
        });
        assert!(!resumed);
        told
    };
    for bits in [all[8..].to_vec(), [&all[..], &[0; 8]].concat(), vec![0; 1 << 20], behind] {
        let told = say("pc.ram", bits);
        assert!(matches!(told, Err(PlayError::Received(_))), "{told:?}");
    }
    for name in ["pc.rom", "other"] {
        let told = say(name, all.clone());
        assert!(matches!(told, Err(PlayError::Unasked)), "{told:?}");
    }
    let answers = [ReturnMessage::Pong(3), ReturnMessage::Shut(0), ReturnMessage::ResumeAck(1)];
    for message in &answers {
        let (told, resumed) = played_on(&vault, |mut qemu| {
            qemu.say(message);
            while qemu.hear() {}
        });
        assert!(matches!(told, Err(PlayError::Unasked)) && !resumed, "{told:?}");
    }
    for message in [ReturnMessage::ResumeAck(0), ReturnMessage::Shut(0), ReturnMessage::Pong(1)] {
        let (told, resumed) = played_on(&vault, |mut qemu| {
            qemu.say_what_it_has(&[]);
            qemu.hear_resume();
            qemu.say(&message);
            while qemu.hear() {}
        });
        assert!(matches!(told, Err(PlayError::Unasked)) && !resumed, "{told:?}");
    }
    // It asks and asks, and does not answer.
    let (told, _) = played_on(&vault, |mut qemu| {
        let mut out = BytesMut::new();
        for page in 0..1_025 {
            let (start, block) = (page * PAGE_SIZE as u64, BlockId::new(b"pc.ram").expect("a name"));
            qemu.writer.write(&ReturnMessage::ReqPagesId { start, length: 4096, block }, &mut out).expect("a message");
        }
        let _ = qemu.socket.write_all(&out);
        while qemu.hear() {}
    });
    assert!(matches!(told, Err(PlayError::Unasked)), "{told:?}");
    // It ends in the middle of its answer.
    let (told, _) = played_on(&vault, |mut qemu| {
        let block = BlockId::new(b"pc.ram").expect("a name");
        qemu.say(&ReturnMessage::RecvBitmap { block, size: bitmap(PAGES, &[]).len() as u64 });
    });
    assert!(matches!(told, Err(PlayError::Refused | PlayError::Socket(_))), "{told:?}");
}

/// Plays the snapshot of a vault to `qemu`.
fn played(vault: &Vault, qemu: impl FnOnce(Qemu) + Send) -> Result<Played, PlayError> {
    played_with(vault, &[], qemu).0
}

/// What was asked for first, if it was told.
type First = Option<Vec<(u16, u32)>>;

/// The same; these pages are likely to be asked for first. Which others were?
fn played_with(vault: &Vault, first: &[(u16, u32)], qemu: impl FnOnce(Qemu) + Send) -> (Result<Played, PlayError>, First) {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let contents = vault.snapshot(id(1), &snapshot_key(1)).expect("opened");
    let mut were = None;
    let told = thread::scope(|scope| {
        scope.spawn(move || qemu(Qemu { socket: theirs, heard: vec![], writer: ReturnWriter::new() }));
        play(ours, contents, first, || (), |first| were = Some(first.to_vec()))
    });
    (told, were)
}

#[test]
fn every_page_comes_once_what_is_asked_for_first_and_zeros_only_if_they_are_asked_for() {
    let dir = tempfile::tempdir().expect("a directory");
    let vault = vault(dir.path());
    let told = played(&vault, |mut qemu| {
        qemu.load();
        // Before it has all devices: 650, of which 651 is zeros.
        qemu.ask(650, 2);
        qemu.say(&ReturnMessage::Pong(3));
        qemu.ask(650, 2);
        let pages = qemu.pages();
        assert_eq!(pages.iter().take(2).map(|(page, _)| *page).collect::<Vec<_>>(), [650, 651]);
        let mut numbers: Vec<u32> = pages.iter().map(|(page, _)| *page).collect();
        numbers.sort_unstable();
        let wanted: Vec<u32> = (0..PAGES).filter(|page| !page.is_multiple_of(3) || *page == 651).collect();
        assert_eq!(numbers, wanted, "each once");
        for (page, found) in &pages {
            let content = content(*page);
            assert!(found[..] == content[..] || (found[..] == [0] && content == [0; PAGE_SIZE]), "page {page}");
        }
        qemu.say(&ReturnMessage::Shut(0));
    });
    let told = told.expect("played");
    assert_eq!(
        (told.asked, told.asked + told.background),
        (2, 1 + (0..PAGES).filter(|page| !page.is_multiple_of(3)).count() as u64)
    );
}

#[test]
fn what_was_asked_for_first_before_comes_while_the_devices_are_loaded() {
    let dir = tempfile::tempdir().expect("a directory");
    let vault = vault(dir.path());
    let (told, first) = played_with(&vault, &[], |mut qemu| {
        qemu.load();
        qemu.ask(650, 2);
        qemu.say(&ReturnMessage::Pong(3));
        qemu.ask(100, 1);
        qemu.pages();
        qemu.say(&ReturnMessage::Shut(0));
    });
    told.expect("played");
    let first = first.expect("it is told");
    assert_eq!(first, [(0, 650), (0, 100)], "as they were asked for, without zeros");
    // Hints may say anything: what is not there, zeros, what was sent.
    let hints = [&first[..], &[(0, 651), (0, PAGES), (1, 0), (7, 7), (0, 100), (0, 401)]].concat();
    let (told, first) = played_with(&vault, &hints, |mut qemu| {
        qemu.load();
        while qemu.heard.len() < 3 * PAGE_SIZE {
            assert!(qemu.hear(), "they come before QEMU has its devices");
        }
        qemu.say(&ReturnMessage::Pong(3));
        qemu.ask(650, 1);
        qemu.ask(10, 1);
        let mut numbers: Vec<u32> = qemu.pages().iter().map(|(page, _)| *page).collect();
        assert_eq!(numbers[..3], [650, 100, 401]);
        numbers.sort_unstable();
        assert_eq!(numbers, (0..PAGES).filter(|page| !page.is_multiple_of(3)).collect::<Vec<_>>(), "each once");
        qemu.say(&ReturnMessage::Shut(0));
    });
    told.expect("played");
    assert_eq!(first, Some(vec![(0, 10)]), "what was not known");
}

#[test]
fn what_is_asked_for_after_the_end_is_there_already() {
    let dir = tempfile::tempdir().expect("a directory");
    let vault = vault(dir.path());
    let told = played(&vault, |mut qemu| {
        qemu.load();
        qemu.say(&ReturnMessage::Pong(3));
        qemu.pages();
        // It asked before it read the end, and reads nothing behind it.
        qemu.socket.shutdown(Shutdown::Read).expect("shut");
        qemu.ask(0, 1);
        qemu.say(&ReturnMessage::Shut(0));
    });
    assert_eq!(told.expect("played").asked, 0);
}

#[test]
fn a_qemu_that_ends_or_refuses_has_not_taken_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let vault = vault(dir.path());
    let ends = played(&vault, |mut qemu| qemu.load());
    assert!(matches!(ends, Err(PlayError::Refused | PlayError::Socket(_))), "{ends:?}");
    let refuses = played(&vault, |mut qemu| {
        qemu.load();
        qemu.say(&ReturnMessage::Shut(1));
    });
    assert!(matches!(refuses, Err(PlayError::Refused)), "{refuses:?}");
    let early = played(&vault, |mut qemu| {
        qemu.load();
        qemu.say(&ReturnMessage::Pong(3));
        qemu.say(&ReturnMessage::Shut(0));
    });
    assert!(matches!(early, Err(PlayError::Refused | PlayError::Socket(_))), "before the end: {early:?}");
    // What it asks for may be anything.
    let odd = played(&vault, |mut qemu| {
        qemu.load();
        qemu.say(&ReturnMessage::ReqPages { start: 0, length: 4096 });
        qemu.say(&ReturnMessage::ReqPagesId { start: u64::MAX, length: u32::MAX, block: BlockId::new(b"pc.ram").expect("a name") });
        qemu.say(&ReturnMessage::ReqPagesId { start: 0, length: 4096, block: BlockId::new(b"other").expect("a name") });
        qemu.say(&ReturnMessage::Pong(3));
        qemu.pages();
        qemu.say(&ReturnMessage::Shut(0));
    });
    odd.expect("it is what there is");
}

#[test]
fn a_damaged_pack_is_named_and_nothing_of_it_is_played() {
    let dir = tempfile::tempdir().expect("a directory");
    let vault = vault(dir.path());
    let pack = dir.path().join(format!("{}.pack", id(1)));
    let mut bytes = std::fs::read(&pack).expect("read");
    bytes[200_000] ^= 1;
    std::fs::write(&pack, bytes).expect("written");
    let told = played(&vault, |mut qemu| {
        qemu.load();
        qemu.say(&ReturnMessage::Pong(3));
        while qemu.hear() {}
    });
    let Err(PlayError::Contents(error)) = told else { panic!("{told:?}") };
    assert_eq!(error.to_string(), format!("pack {} cannot be read", id(1)));
}
