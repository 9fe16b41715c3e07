//! Two sides over real TLS on loopback, with socket pairs in place of QEMU and this process's own memory in place of its.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use godwit_carrier::frame::Block;
use godwit_carrier::pages::{COMMON, Digester, FIRST_IMAGE, GuestMemory, PAGE_SIZE};
use godwit_carrier::{Decoder, Frame, Greeting, Identity, Image, Side};
use godwit_model::{BytesPerSec, Name};
use godwit_stream::{
    BlockId, BlockIndex, Configuration, Element, PageContent, RamBlock, RamStart, Reader, ReturnMessage, ReturnWriter, Writer,
};
use godwit_vault::ImageIndex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::LocalSet;

use super::behind::WriteBehind;
use super::connect::{Acceptor, Dialler, Expected, Greeted};
use super::connections::{self, SessionError};
use super::control::PlacedBlock;
use super::deal;
use super::feed::{Feed, Own};
use super::home::Bringing;
use super::images::{OwnImage, ReadableImage};
use super::memory::ProcessMemory;
use super::neighbours::Neighbours;
use super::pump::{KeepAlive, Pump, PumpError};
use super::seal::Sealers;
use super::threads::Threads;
use crate::tls::Material;
use crate::tls::tests::cluster;

mod postcopy;

const IDENTITY: Identity = Identity { vm: [1; 16], task: [2; 16], generation: 3, lane: 0 };
const PATIENT: KeepAlive = KeepAlive { every: Duration::from_secs(1), silence: Duration::from_secs(60) };
const PATIENCE: Duration = Duration::from_secs(60);
const KEY: [u8; 32] = [4; 32];
/// Pages of the block that the destination places, and of the one that it does not.
const PAGES: (u32, u64) = (600, 2);

pub(super) fn threads() -> Threads {
    Threads::start(|| Ok::<_, std::convert::Infallible>(())).expect("threads")
}

fn name(text: &str) -> Name {
    Name::new(text).expect("name")
}

/// The host as the controller names it: with the key of this certificate.
pub(super) fn expected(host: &str, material: &Material) -> Expected {
    let chain = material.chain().expect("chain");
    let (_, certificate) = x509_parser::parse_x509_certificate(&chain[0]).expect("certificate");
    Expected { host: name(host), keys: vec![blake3::hash(certificate.tbs_certificate.subject_pki.raw).to_hex().to_string()] }
}

fn dialler(address: SocketAddr, to: &str, of: &Material, own: &Material) -> Dialler {
    Dialler::new(address, expected(to, of), own, Arc::default()).expect("a dialler")
}

/// One running side: what QEMU and the agent would hold, and how it ends.
struct Running {
    qemu: UnixStream,
    to_peer: mpsc::Sender<Bytes>,
    from_peer: mpsc::Receiver<Bytes>,
    ended: tokio::task::JoinHandle<SessionError>,
    /// How many connections there were; of a source.
    connections: Rc<Cell<u32>>,
    /// Has a source leave pages.
    leave: oneshot::Sender<()>,
}

fn source(dialler: Dialler, identity: Identity) -> Running {
    source_at(dialler, identity, PATIENT, None, None, Vec::new(), true)
}

fn source_at(
    dialler: Dialler,
    identity: Identity,
    keep_alive: KeepAlive,
    rate: Option<BytesPerSec>,
    own: Option<ProcessMemory>,
    images: Vec<OwnImage>,
    held: bool,
) -> Running {
    let connections = Rc::new(Cell::new(0));
    let counted = Rc::clone(&connections);
    let (leave, asked) = oneshot::channel();
    let (qemu, ours) = UnixStream::pair().expect("pair");
    let (to_peer, mut from_agent) = mpsc::channel(8);
    let (to_agent, from_peer) = mpsc::channel(8);
    let ended = tokio::task::spawn_local(async move {
        let (pump, frames) = Pump::new(Side::Source, identity, keep_alive, rate, to_agent);
        let (reader, writer) = ours.into_split();
        let (listening, holdings, heard) = super::process::listen();
        let own = own.map(|memory| Own { memory, emulated: true });
        let sealers = Sealers::new(threads());
        let feed = Feed::new(&pump, sealers, Digester::new(&KEY), own, images, held, heard);
        let feeding = async {
            feed.run(&reader, async { holdings.await.unwrap_or_default() }).await.expect("a stream");
            std::future::pending().await
        };
        let leaving = async {
            if asked.await.is_ok() {
                pump.leave();
            }
            std::future::pending().await
        };
        let tell = |connected| counted.set(counted.get() + u32::from(connected));
        tokio::select! {
            error = connections::of_source(&pump, &dialler, KEY, PATIENCE, &mut from_agent, tell) => error,
            Err(error) = deal::at_source(&pump, writer, frames, 10_000, listening) => panic!("{error}"),
            () = feeding => unreachable!("it waits"),
            () = leaving => unreachable!("it waits"),
        }
    });
    Running { qemu, to_peer, from_peer, ended, connections, leave }
}

fn destination(acceptor: Acceptor, memory: Option<ProcessMemory>, keep_alive: KeepAlive) -> Running {
    destination_at(acceptor, memory, keep_alive, false, Neighbours::default())
}

fn destination_at(
    mut acceptor: Acceptor,
    memory: Option<ProcessMemory>,
    keep_alive: KeepAlive,
    advises: bool,
    neighbours: Neighbours,
) -> Running {
    let (qemu, ours) = UnixStream::pair().expect("pair");
    let (to_peer, mut from_agent) = mpsc::channel(8);
    let (to_agent, from_peer) = mpsc::channel(8);
    let ended = tokio::task::spawn_local(async move {
        let (pump, frames) = Pump::new(Side::Destination, IDENTITY, keep_alive, None, to_agent);
        let (reader, writer) = ours.into_split();
        let (told, key) = oneshot::channel();
        let (to_carry, from_qemu) = super::return_path::from_qemu(advises);
        let dealing = async {
            let digester = Digester::new(&key.await.expect("a session"));
            let memory = memory.map(|memory| WriteBehind::new(memory, threads()));
            let prepare = async |_: &mut WriteBehind| (Bringing::default(), neighbours);
            deal::at_destination(&pump, writer, frames, digester, (memory, from_qemu), prepare, |_| ()).await
        };
        tokio::select! {
            error = connections::of_destination(&pump, &mut acceptor, told, PATIENCE, &mut from_agent, |_| ()) => error,
            Err(error) = dealing => panic!("{error}"),
            error = super::return_path::return_path(&pump, &reader, to_carry) => panic!("{error}"),
        }
    });
    Running { qemu, to_peer, from_peer, ended, connections: Rc::default(), leave: oneshot::channel().0 }
}

/// Memory that a waiting QEMU would have: of this very process, and never freed.
fn guest_memory() -> (&'static [[u8; PAGE_SIZE]], ProcessMemory) {
    // As a QEMU's: nobody has touched it. Another process's memory is mapped in whole pages.
    let bytes: &'static [u8] = Vec::leak(vec![0; (PAGES.0 as usize + 1) * PAGE_SIZE]);
    let (aligned, _) =
        bytes.get(bytes.as_ptr().align_offset(PAGE_SIZE)..).expect("a page more than is needed").as_chunks::<PAGE_SIZE>();
    let block = PlacedBlock { id: "pc.ram".into(), address: aligned.as_ptr().addr() as u64, pages: PAGES.0 };
    let memory = File::options().read(true).write(true).open("/proc/self/mem").expect("own memory");
    let map = File::open("/proc/self/pagemap").expect("own page map");
    (&aligned[..PAGES.0 as usize], ProcessMemory::new(memory.into(), map.into(), vec![block]))
}

/// A page that does not compress.
fn noise(seed: u64) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    blake3::Hasher::new().update(&seed.to_be_bytes()).finalize_xof().fill(&mut page);
    page
}

fn page(block: u16, page: u64, content: &[u8; PAGE_SIZE]) -> Element {
    Element::Page { block: BlockIndex(block), page, content: PageContent::Data(Bytes::copy_from_slice(content)) }
}

/// What a QEMU writes: its beginning, and then `parts` with these pages, and with the device state at the end if `ends`.
struct Stream {
    writer: Writer,
    bytes: BytesMut,
}

impl Stream {
    fn new() -> Self {
        let mut stream = Self::begin();
        stream.ram();
        stream
    }

    fn begin() -> Self {
        let mut stream = Self { writer: Writer::new(), bytes: BytesMut::new() };
        stream.add(&Element::Header);
        stream.add(&Element::Configuration(Configuration { machine: "pc-q35-7.2".into(), subsections: vec![] }));
        stream
    }

    fn ram(&mut self) {
        let block = |id: &[u8], pages: u64| RamBlock { id: BlockId::new(id).expect("a name"), length: pages * PAGE_SIZE as u64 };
        let blocks = vec![block(b"pc.ram", u64::from(PAGES.0)), block(b"pc.bios", PAGES.1)];
        self.add(&Element::RamStart(RamStart { section: 1, instance: 0, blocks, multifd_flush: false }));
    }

    fn add(&mut self, element: &Element) {
        self.writer.write(element, &mut self.bytes).expect("an element in its place");
    }

    fn part(&mut self, pages: &[Element]) {
        self.add(&Element::PartBegin);
        pages.iter().for_each(|page| self.add(page));
        self.add(&Element::PartEnd);
    }

    fn end(&mut self) {
        self.add(&Element::EndBegin);
        self.add(&Element::EndEnd);
        self.add(&Element::Opaque(Bytes::from_static(DEVICES)));
    }

    fn take(&mut self) -> BytesMut {
        self.bytes.split()
    }
}

/// The beginning of a device's section, and what only its device understands.
const DEVICES: &[u8] = b"\x04\0\0\0\x07\x05timer\0\0\0\0\0\0\0\x02what only a device understands";

/// What the destination's QEMU is to get when no page but those of `pc.bios` is to go through it.
fn reduced(bios: &[Element]) -> BytesMut {
    let mut stream = Stream::new();
    stream.part(bios);
    stream.end();
    stream.take()
}

pub(super) async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("listener");
    let address = listener.local_addr().expect("address");
    (listener, address)
}

pub(super) fn acceptor(listener: TcpListener, from: &str, of: &Material, own: &Material) -> Acceptor {
    Acceptor::new(listener, expected(from, of), own, Arc::default()).expect("an acceptor")
}

async fn pair(memory: Option<ProcessMemory>) -> (Running, Running) {
    let materials = cluster(&["h1", "h2"]);
    let (listener, address) = listener().await;
    let destination = destination(acceptor(listener, "h1", &materials[0], &materials[1]), memory, PATIENT);
    (source(dialler(address, "h2", &materials[1], &materials[0]), IDENTITY), destination)
}

async fn read_exactly(from: &mut UnixStream, bytes: &[u8]) {
    let mut got = vec![0; bytes.len()];
    from.read_exact(&mut got).await.expect("read");
    assert!(got == bytes, "the stream is another");
}

#[tokio::test]
async fn pages_go_to_memory_and_everything_else_to_qemu() {
    LocalSet::new()
        .run_until(async {
            let (pages, memory) = guest_memory();
            let (mut source, mut destination) = pair(Some(memory)).await;
            let mut stream = Stream::new();
            let bios = [page(1, 0, &noise(1_000)), page(1, 1, &noise(1_001))];
            let first: Vec<Element> = (0..500).map(|number| page(0, number, &noise(number % 400))).collect();
            stream.part(&[&first[..], &bios].concat());
            let mut again = noise(7);
            again[5] ^= 1;
            stream.part(&[page(0, 7, &again)]);
            stream.end();
            source.qemu.write_all(&stream.take()).await.expect("written");
            read_stream(&mut destination.qemu, &reduced(&bios)).await;
            for (number, content) in (0..).zip(&pages[..500]) {
                let expected = if number == 7 { again } else { noise(number % 400) };
                assert!(*content == expected, "page {number}");
            }
            assert!(pages[500..].iter().all(|page| *page == [0; PAGE_SIZE]));

            let shut = [0, 1, 0, 4, 0, 0, 0, 0];
            destination.qemu.write_all(&shut).await.expect("written");
            read_exactly(&mut source.qemu, &shut).await;
            drop(source.qemu);
            assert_eq!(destination.qemu.read(&mut [0; 1]).await.expect("end"), 0);
            source.to_peer.send(Bytes::from_static(b"{}")).await.expect("said");
            assert_eq!(destination.from_peer.recv().await, Some(Bytes::from_static(b"{}")), "agents talk on after QEMU's end");
        })
        .await;
}

#[tokio::test]
async fn a_write_that_an_emulating_qemu_missed_is_found_at_the_end() {
    LocalSet::new()
        .run_until(async {
            let (pages, memory) = guest_memory();
            let (own_pages, mut own) = guest_memory();
            let materials = cluster(&["h1", "h2"]);
            let (listener, address) = listener().await;
            let mut destination = destination(acceptor(listener, "h1", &materials[0], &materials[1]), Some(memory), PATIENT);
            for number in [1, 2, 3] {
                own.write(0, number, &noise(100 + u64::from(number))).expect("written");
            }
            let dialler = dialler(address, "h2", &materials[1], &materials[0]);
            let mut source = source_at(dialler, IDENTITY, PATIENT, None, Some(own), Vec::new(), true);
            let mut stream = Stream::new();
            stream.part(&[page(0, 1, &noise(1)), page(0, 2, &noise(2)), page(0, 3, &noise(3)), page(0, 4, &noise(4))]);
            // 1 was written to and told, and then once more, which was missed. 4 has become zero.
            stream.part(&[page(0, 1, &noise(11)), page(0, 3, &noise(103)), page(0, 4, &noise(14))]);
            stream.end();
            source.qemu.write_all(&stream.take()).await.expect("written");
            let mut expected = Stream::new();
            expected.end();
            read_stream(&mut destination.qemu, &expected.take()).await;
            assert!(pages[1] == noise(101) && pages[1] == own_pages[1], "what was missed is there before the devices' state");
            assert!(pages[2] == noise(2), "what came once was never watched");
            assert!(pages[3] == noise(103) && pages[4] == [0; PAGE_SIZE]);
        })
        .await;
}

/// A file of these pages.
fn file_of(pages: &[[u8; PAGE_SIZE]]) -> File {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(pages.as_flattened()).expect("written");
    file.rewind().expect("at its beginning");
    file
}

/// A move of pages that both hosts have in an image, which has become `there` at the destination: its memory, the bytes on the wire, and whether it failed.
async fn move_of_an_image(image: &[[u8; PAGE_SIZE]], there: &[[u8; PAGE_SIZE]]) -> (&'static [[u8; PAGE_SIZE]], u64, bool) {
    let (pages, memory) = guest_memory();
    let digest = *blake3::hash(image.as_flattened()).as_bytes();
    let told = Image { digest, pages: u32::try_from(image.len()).expect("few") };
    let index = tempfile::tempfile().expect("a file");
    ImageIndex::build(image.as_flattened(), digest).and_then(|built| built.write(&index)).expect("an index");
    (&index).rewind().expect("at its beginning");
    let own = OwnImage::read(file_of(image).into(), index.into()).expect("an index");
    let materials = cluster(&["h1", "h2"]);
    let (listener, address) = listener().await;
    let memory = memory.with_images(vec![ReadableImage::new(file_of(there).into(), told)]);
    let mut destination = destination(acceptor(listener, "h1", &materials[0], &materials[1]), Some(memory), PATIENT);
    let wire = Arc::new(AtomicU64::new(0));
    let dialler = Dialler::new(address, expected("h2", &materials[1]), &materials[0], Arc::clone(&wire)).expect("a dialler");
    let mut source = source_at(dialler, IDENTITY, PATIENT, None, None, vec![own], true);
    let mut stream = Stream::new();
    // In another order than in the image.
    let read: Vec<Element> = (0..).zip(image.iter().rev()).map(|(number, content)| page(0, number, content)).collect();
    stream.part(&read);
    stream.part(&[page(0, 500, &noise(9_999))]);
    stream.end();
    source.qemu.write_all(&stream.take()).await.expect("written");
    let mut expected = Stream::new();
    expected.end();
    let expected = expected.take();
    let failed = tokio::select! {
        biased;
        ended = &mut destination.ended => ended.is_err(),
        _ = read_stream(&mut destination.qemu, &expected) => false,
    };
    (pages, wire.load(Ordering::Relaxed), failed)
}

#[tokio::test]
async fn what_both_hosts_have_of_an_image_does_not_travel() {
    LocalSet::new()
        .run_until(async {
            let image: Vec<_> = (0..400).map(noise).collect();
            let (pages, wire, failed) = move_of_an_image(&image, &image).await;
            assert!(!failed && pages[..400].iter().eq(image.iter().rev()) && pages[500] == noise(9_999));
            assert!((PAGE_SIZE as u64..40_000).contains(&wire), "{wire} bytes for 400 pages of the image and one other");
        })
        .await;
}

#[tokio::test]
async fn an_image_that_has_changed_is_found_out_before_anything_wrong_is_loaded() {
    LocalSet::new()
        .run_until(async {
            let image: Vec<_> = (0..40).map(noise).collect();
            let mut there = image.clone();
            there[7][100] ^= 1;
            let (pages, _, failed) = move_of_an_image(&image, &there).await;
            assert!(failed && pages.iter().all(|page| *page == [0; PAGE_SIZE] || image.contains(page)));
            // Cut short: what is beyond its end cannot be read.
            let (_, _, failed) = move_of_an_image(&image, &there[..5]).await;
            assert!(failed);
        })
        .await;
}

#[tokio::test]
async fn what_a_neighbour_has_too_does_not_travel() {
    LocalSet::new()
        .run_until(async {
            let (_, mut neighbour) = guest_memory();
            for number in 0..400 {
                neighbour.write(0, number, &noise(u64::from(number))).expect("written");
            }
            let (pages, memory) = guest_memory();
            let materials = cluster(&["h1", "h2"]);
            let (listener, address) = listener().await;
            let acceptor = acceptor(listener, "h1", &materials[0], &materials[1]);
            let neighbours = Neighbours::new(vec![neighbour]);
            let mut destination = destination_at(acceptor, Some(memory), PATIENT, false, neighbours);
            let wire = Arc::new(AtomicU64::new(0));
            let dialler =
                Dialler::new(address, expected("h2", &materials[1]), &materials[0], Arc::clone(&wire)).expect("a dialler");
            let mut source = source_at(dialler, IDENTITY, PATIENT, None, None, Vec::new(), true);
            let mut stream = Stream::new();
            let elements: Vec<Element> = (0..400).map(|number| page(0, number, &noise(399 - number))).collect();
            stream.part(&elements);
            stream.part(&[page(0, 500, &noise(9_999))]);
            stream.end();
            source.qemu.write_all(&stream.take()).await.expect("written");
            let mut expected = Stream::new();
            expected.end();
            read_stream(&mut destination.qemu, &expected.take()).await;
            assert!((0..).zip(&pages[..400]).all(|(number, page)| *page == noise(399 - number)) && pages[500] == noise(9_999));
            let wire = wire.load(Ordering::Relaxed);
            assert!((PAGE_SIZE as u64..40_000).contains(&wire), "{wire} bytes for 400 pages of the neighbour and one other");
        })
        .await;
}

#[tokio::test]
async fn without_a_place_for_them_pages_go_through_qemu_and_a_stream_that_is_not_understood_too() {
    LocalSet::new()
        .run_until(async {
            let (mut source, mut destination) = pair(None).await;
            let mut stream = Stream::new();
            stream.part(&[page(0, 3, &noise(1)), page(1, 0, &noise(2))]);
            stream.end();
            let whole = stream.take();
            source.qemu.write_all(&whole).await.expect("written");
            read_stream(&mut destination.qemu, &whole).await;

            let (_, memory) = guest_memory();
            let (mut source, mut destination) = pair(Some(memory)).await;
            let mut stream = Stream::new();
            let unknown: &[u8] = b"\x01\0\0\0\x02\x08novelty!\0\0\0\0\0\0\0\x01";
            let whole = [&stream.take()[..], unknown, &noise(3)].concat();
            source.qemu.write_all(&whole).await.expect("written");
            read_exactly(&mut destination.qemu, &whole).await;
        })
        .await;
}

/// Reads what a QEMU would: `expected`, and in between questions of the source's carry, which are answered. How many they were.
async fn read_stream(qemu: &mut UnixStream, expected: &[u8]) -> usize {
    let (mut reader, mut writer, mut got) = (Reader::new(), Writer::new(), BytesMut::new());
    let mut questions = 0;
    while got.len() < expected.len() {
        assert!(qemu.read_buf(reader.buffer_mut()).await.expect("read") > 0, "the stream ended");
        while let Some(element) = reader.next_element().expect("a stream") {
            if let Element::Command { number: 2, payload } = &element {
                let pong = ReturnMessage::Pong(u32::from_be_bytes(payload[..].try_into().expect("a number")));
                let mut answer = BytesMut::new();
                ReturnWriter::new().write(&pong, &mut answer).expect("an answer");
                qemu.write_all(&answer).await.expect("written");
                questions += 1;
            } else {
                writer.write(&element, &mut got).expect("an element");
            }
        }
    }
    assert!(got == expected, "the stream is another");
    questions
}

#[tokio::test]
async fn the_destinations_qemu_is_asked_for_a_sign_of_life_and_the_sources_does_not_hear_the_answer() {
    LocalSet::new()
        .run_until(async {
            let (_, memory) = guest_memory();
            let (mut source, mut destination) = pair(Some(memory)).await;
            let (mut stream, mut expected) = (Stream::new(), Stream::new());
            source.qemu.write_all(&stream.take()).await.expect("written");
            let asked = read_stream(&mut destination.qemu, &expected.take()).await;
            // A pass with nothing to send, again and again, as QEMU makes them.
            let mut questions = asked;
            while questions < asked + 2 {
                stream.part(&[]);
                source.qemu.write_all(&stream.take()).await.expect("written");
                let mut question = [0; 9];
                let read = tokio::time::timeout(Duration::from_millis(20), destination.qemu.read_exact(&mut question)).await;
                let Ok(read) = read else { continue };
                read.expect("read");
                let [8, 0, 2, 0, 4, number @ ..] = question else { panic!("{question:?} is no question") };
                let answer = [&[0, 2, 0, 4][..], &number].concat();
                destination.qemu.write_all(&answer).await.expect("written");
                questions += 1;
            }
            destination.qemu.write_all(&[0, 2, 0, 4, 0, 0, 0, 1]).await.expect("written");
            read_exactly(&mut source.qemu, &[0, 2, 0, 4, 0, 0, 0, 1]).await;
        })
        .await;
}

/// Passes bytes on between a listener of its own and `to`, until it is dropped: all its connections die with it.
async fn relay(listener: Rc<TcpListener>, to: SocketAddr) {
    let mut both = futures::stream::FuturesUnordered::new();
    loop {
        tokio::select! {
            Ok((mut from, _)) = listener.accept() => both.push(async move {
                let mut onward = TcpStream::connect(to).await?;
                tokio::io::copy_bidirectional(&mut from, &mut onward).await
            }),
            Some(_) = futures::StreamExt::next(&mut both) => {}
        }
    }
}

#[tokio::test]
async fn connections_that_die_cost_time_and_nothing_else() {
    LocalSet::new()
        .run_until(async {
            let (pages, memory) = guest_memory();
            let materials = cluster(&["h1", "h2"]);
            let (listener_of_destination, address) = listener().await;
            let acceptor = acceptor(listener_of_destination, "h1", &materials[0], &materials[1]);
            let mut destination = destination(acceptor, Some(memory), PATIENT);
            let (between, relayed) = listener().await;
            let between = Rc::new(between);
            let mut link = tokio::task::spawn_local(relay(Rc::clone(&between), address));
            let mut source = source(dialler(relayed, "h2", &materials[1], &materials[0]), IDENTITY);
            source.to_peer.send(Bytes::from_static(b"{}")).await.expect("said");
            destination.from_peer.recv().await.expect("a first connection, whose failure would be an answer");
            let mut stream = Stream::new();
            let last = |round: u64| (0..u64::from(PAGES.0)).map(move |number| noise(round * 1_000 + number));
            for round in 0..6 {
                let part: Vec<Element> = (0..).zip(last(round)).map(|(number, content)| page(0, number, &content)).collect();
                stream.part(&part);
                let bytes = stream.take();
                let cut = tokio::time::sleep(Duration::from_millis(3 * round));
                let (written, ()) = tokio::join!(source.qemu.write_all(&bytes), async {
                    cut.await;
                    // The listener lives: who dials again is not refused, as little as by a cable that is out.
                    link.abort();
                    link = tokio::task::spawn_local(relay(Rc::clone(&between), address));
                });
                written.expect("written");
            }
            stream.end();
            source.qemu.write_all(&stream.take()).await.expect("written");
            let mut expected = Stream::new();
            expected.end();
            read_stream(&mut destination.qemu, &expected.take()).await;
            for (number, (content, expected)) in pages.iter().zip(last(5)).enumerate() {
                assert!(*content == expected, "page {number}");
            }
            assert!(!source.ended.is_finished() && !destination.ended.is_finished());
        })
        .await;
}

#[tokio::test]
async fn a_connection_that_may_carry_little_is_not_taken_for_dead() {
    LocalSet::new()
        .run_until(async {
            let materials = cluster(&["h1", "h2"]);
            let (listener, address) = listener().await;
            let every = Duration::from_millis(20);
            let keep_alive = KeepAlive { every, silence: 15 * every };
            let mut destination = destination(acceptor(listener, "h1", &materials[0], &materials[1]), None, keep_alive);
            let dialler = dialler(address, "h2", &materials[1], &materials[0]);
            // What the stream takes at this rate is longer than the silence that is borne.
            let mut source = source_at(dialler, IDENTITY, keep_alive, Some(BytesPerSec(60_000)), None, Vec::new(), true);
            let mut stream = Stream::new();
            let part: Vec<Element> = (0..15).map(|number| page(0, number, &noise(number))).collect();
            stream.part(&part);
            stream.end();
            let whole = stream.take();
            source.qemu.write_all(&whole).await.expect("written");
            read_stream(&mut destination.qemu, &whole).await;
            assert_eq!(source.connections.get(), 1, "it was dropped in between");
        })
        .await;
}

#[tokio::test]
async fn a_destination_that_is_gone_is_not_waited_for() {
    LocalSet::new()
        .run_until(async {
            let (source, mut destination) = pair(None).await;
            source.to_peer.send(Bytes::from_static(b"{}")).await.expect("said");
            destination.from_peer.recv().await.expect("connected");
            destination.ended.abort();
            assert!(matches!(source.ended.await.expect("ended"), SessionError::Gone));
        })
        .await;
}

#[tokio::test]
async fn a_destination_that_does_not_read_holds_the_source_back() {
    LocalSet::new()
        .run_until(async {
            let (source, _destination) = pair(None).await;
            let mut stream = Stream::new();
            let mut data = stream.take();
            let mut taken = 0;
            // Until nothing has been taken for a while: that is what is in flight plus the sockets' own buffers.
            while let Ok(written) = tokio::time::timeout(Duration::from_millis(500), source.qemu.writable()).await {
                written.expect("writable");
                match source.qemu.try_write(&data) {
                    Ok(count) => {
                        taken += count;
                        drop(data.split_to(count));
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => panic!("{error}"),
                }
                if data.len() < 1 << 20 {
                    let part: Vec<Element> = (0..256).map(|number| page(0, number, &noise(number))).collect();
                    stream.part(&part);
                    data.extend_from_slice(&stream.take());
                }
                assert!(taken < 4 << 20, "{taken} bytes are hidden from QEMU");
            }
            assert!(taken >= 256 << 10, "only {taken} bytes were taken");
        })
        .await;
}

#[tokio::test]
async fn another_move_another_session_and_another_host_are_turned_away() {
    LocalSet::new()
        .run_until(async {
            let materials = cluster(&["h1", "h2", "h3", "h1", "h2"]);
            let (listener, address) = listener().await;
            let destination = destination(acceptor(listener, "h1", &materials[0], &materials[1]), None, PATIENT);
            let to_h2 = |own: usize| dialler(address, "h2", &materials[1], &materials[own]);
            // Another move: the destination hangs up, and the source is told so.
            let other = source(to_h2(0), Identity { generation: 4, ..IDENTITY });
            assert!(matches!(other.ended.await.expect("ended"), SessionError::Pump(PumpError::Closed | PumpError::Connection(_))));

            let refused = dialler(address, "h3", &materials[2], &materials[0]).dial(PATIENCE).await;
            assert!(refused.is_err(), "h2 passed for h3");
            for (stranger, passed) in [(2, "h3 passed for h1"), (3, "an old key of h1 passed for its new one")] {
                if let Ok(mut stranger) = to_h2(stranger).dial(PATIENCE).await {
                    assert_eq!(stranger.read(&mut [0; 1]).await.unwrap_or(0), 0, "{passed}");
                }
            }
            let refused = dialler(address, "h2", &materials[4], &materials[2]).dial(PATIENCE).await;
            assert!(refused.is_err(), "h2 passed with a key that may no longer speak for it");
            let foreign = cluster(&["h1"]);
            let cut = match dialler(address, "h2", &materials[1], &foreign[0]).dial(PATIENCE).await {
                Ok(mut connection) => connection.read(&mut [0; 1]).await.unwrap_or(0) == 0,
                Err(_) => true,
            };
            assert!(cut, "a host of another cluster was let in");

            let mut right = source(to_h2(0), IDENTITY);
            destination.to_peer.send(Bytes::from_static(b"{}")).await.expect("said");
            assert!(right.from_peer.recv().await.is_some(), "the right one is still welcome");
            // The right host, another session: whoever began this one holds its key.
            let mut thief = ByHand { connection: to_h2(0).dial(PATIENCE).await.expect("dialled"), decoder: Decoder::default() };
            thief.send(&[Frame::Hello(Greeting { identity: IDENTITY, key: [5; 32], taken: 0 })]).await;
            assert_eq!(thief.next().await, None, "another session was taken");
            right.to_peer.send(Bytes::from_static(b"{}")).await.expect("said");
            assert!(!destination.ended.is_finished() && !right.ended.is_finished());
        })
        .await;
}

/// The other side of a pump, by hand: the frames that come, and any that one likes to send.
struct ByHand {
    connection: super::connect::Connection,
    decoder: Decoder,
}

impl ByHand {
    async fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.decoder.next_frame().expect("frame") {
                return Some(frame);
            }
            match self.connection.read_buf(self.decoder.buffer_mut()).await {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    async fn send(&mut self, frames: &[Frame]) {
        let mut out = BytesMut::new();
        for frame in frames {
            frame.encode(&mut out);
        }
        self.connection.write_all(&out).await.expect("written");
        self.connection.flush().await.expect("flushed");
    }

    /// The next frame that is no ping.
    async fn next_but_pings(&mut self) -> Option<Frame> {
        loop {
            match self.next().await {
                Some(Frame::Ping(_)) => {}
                other => return other,
            }
        }
    }
}

/// A destination, and its source by hand, after the greeting and what the destination says of its memory.
async fn against_a_source_by_hand(keep_alive: KeepAlive, memory: Option<ProcessMemory>) -> (Running, ByHand) {
    let materials = cluster(&["h1", "h2"]);
    let (listener, address) = listener().await;
    let running = destination(acceptor(listener, "h1", &materials[0], &materials[1]), memory, keep_alive);
    let connection = dialler(address, "h2", &materials[1], &materials[0]).dial(PATIENCE).await.expect("dialled");
    let mut source = ByHand { connection, decoder: Decoder::default() };
    let greeting = Greeting { identity: IDENTITY, key: KEY, taken: 0 };
    source.send(&[Frame::Hello(greeting)]).await;
    assert_eq!(source.next().await, Some(Frame::Welcome(greeting)));
    (running, source)
}

/// A source, and its destination by hand, after the greeting.
async fn against_a_destination_by_hand() -> (Running, ByHand) {
    let materials = cluster(&["h1", "h2"]);
    let (listener, address) = listener().await;
    let mut acceptor = acceptor(listener, "h1", &materials[0], &materials[1]);
    let running = source(dialler(address, "h2", &materials[1], &materials[0]), IDENTITY);
    let Greeted { connection, decoder, greeting } = acceptor.next().await.expect("a source");
    let mut destination = ByHand { connection, decoder };
    destination.send(&[Frame::Welcome(greeting)]).await;
    (running, destination)
}

#[tokio::test]
async fn a_destination_says_what_it_holds_already() {
    LocalSet::new()
        .run_until(async {
            let (_, mut memory) = guest_memory();
            for number in [3, 4, 9] {
                godwit_carrier::pages::GuestMemory::write(&mut memory, 0, number, &noise(u64::from(number))).expect("written");
            }
            let (_running, mut source) = against_a_source_by_hand(PATIENT, Some(memory)).await;
            let expected = Block { id: Bytes::from_static(b"pc.ram"), pages: PAGES.0 };
            assert_eq!(source.next_but_pings().await, Some(Frame::Memory(vec![expected])));
            let digester = Digester::new(&KEY);
            let mut held = vec![[0; 16]; PAGES.0 as usize];
            loop {
                match source.next_but_pings().await {
                    Some(Frame::Held { block: 0, first, digests }) => {
                        held[first as usize..first as usize + digests.len()].copy_from_slice(&digests);
                    }
                    other => break assert_eq!(other, Some(Frame::HeldEnd)),
                }
            }
            for (number, digest) in (0..).zip(held) {
                let content = if [3, 4, 9].contains(&number) { noise(number) } else { [0; PAGE_SIZE] };
                assert_eq!(digest, digester.page(&content), "page {number}");
            }
        })
        .await;
}

#[tokio::test]
async fn a_vm_that_comes_home_finds_its_memory_there() {
    LocalSet::new()
        .run_until(async {
            let (pages, mut memory) = guest_memory();
            (0..500).for_each(|number| memory.write(0, number, &noise(u64::from(number))).expect("written"));
            let materials = cluster(&["h1", "h2"]);
            let (listener, address) = listener().await;
            let mut destination = destination(acceptor(listener, "h1", &materials[0], &materials[1]), Some(memory), PATIENT);
            let wire = Arc::new(AtomicU64::new(0));
            let dialler =
                Dialler::new(address, expected("h2", &materials[1]), &materials[0], Arc::clone(&wire)).expect("a dialler");
            let mut source = source(dialler, IDENTITY);
            let now = |number: u64| {
                let mut content = noise(number);
                content[2_000] ^= u8::from(number.is_multiple_of(5));
                content
            };
            let mut stream = Stream::new();
            let all: Vec<Element> = (0..500).map(|number| page(0, number, &now(number))).collect();
            stream.part(&all);
            stream.add(&Element::PartBegin);
            stream.add(&Element::PartEnd);
            source.qemu.write_all(&stream.take()).await.expect("written");
            // The end must not come before the answers: what waits then is sent whole.
            let answered = async {
                while std::hint::black_box(pages)[495] != now(495) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            tokio::time::timeout(PATIENCE, answered).await.expect("what was asked for is answered");
            stream.end();
            source.qemu.write_all(&stream.take()).await.expect("written");
            let mut expected = Stream::new();
            expected.end();
            read_stream(&mut destination.qemu, &expected.take()).await;
            (0..).zip(&pages[..500]).for_each(|(number, content)| assert!(*content == now(number), "page {number}"));
            let moved = wire.load(Ordering::Relaxed);
            assert!(moved < 25 * PAGE_SIZE as u64, "{moved} bytes for a hundred pages that differ in a piece");
        })
        .await;
}

#[tokio::test]
async fn a_source_relies_on_what_was_told_so_far_and_waits_for_the_rest() {
    LocalSet::new()
        .run_until(async {
            let (source, mut destination) = against_a_destination_by_hand().await;
            let (_from_qemu, mut qemu) = source.qemu.into_split();
            let digester = Digester::new(&KEY);
            let held = |pages: std::ops::Range<u32>| {
                let digests = pages.clone().map(|number| digester.page(&noise(u64::from(number)))).collect();
                Frame::Held { block: 0, first: pages.start, digests }
            };
            let block = Block { id: Bytes::from_static(b"pc.ram"), pages: PAGES.0 };
            destination.send(&[Frame::Memory(vec![block]), held(0..100)]).await;
            let mut stream = Stream::new();
            let all: Vec<Element> =
                (0..300).map(|number| page(0, number, &noise(if number == 50 { 1_000 } else { number }))).collect();
            stream.part(&all);
            stream.end();
            // More than its socket holds: the source stops reading.
            tokio::task::spawn_local(async move { qemu.write_all(&stream.take()).await.map(|()| qemu) });
            let wanted = loop {
                match destination.next_but_pings().await.expect("a session") {
                    Frame::Wanted { block: 0, pages } => break pages,
                    Frame::Forward(_) | Frame::Ack(_) => {}
                    other => panic!("{other:?} before all was told"),
                }
            };
            assert_eq!(wanted, [50], "of what was told one page is another");
            // Nothing is held of what lies between.
            destination.send(&[held(120..300), Frame::HeldEnd]).await;
            let mut bytes = 0;
            loop {
                match destination.next_but_pings().await.expect("a session") {
                    Frame::Pages(payload) => bytes += payload.len(),
                    Frame::Forward(data) if data.ends_with(DEVICES) => break,
                    Frame::Forward(_) | Frame::Ack(_) => {}
                    other => panic!("{other:?}"),
                }
            }
            assert!((21 * PAGE_SIZE..22 * PAGE_SIZE).contains(&bytes), "{bytes} bytes for 21 pages");
        })
        .await;
}

#[tokio::test]
async fn pieces_that_nobody_asked_for_end_the_session() {
    LocalSet::new()
        .run_until(async {
            let (source, mut destination) = against_a_destination_by_hand().await;
            destination.send(&[Frame::Memory(vec![]), Frame::Pieces { block: 0, pages: vec![(0, [0; 64])] }]).await;
            let ended = source.ended.await;
            assert!(ended.is_err_and(|error| error.is_panic()), "it went on");
        })
        .await;
}

#[tokio::test]
async fn a_peer_that_stands_still_gets_one_ping_and_is_asked_again_once_it_has_answered() {
    LocalSet::new()
        .run_until(async {
            let every = Duration::from_millis(5);
            let keep_alive = KeepAlive { every, silence: 20 * every };
            let (destination, mut source) = against_a_source_by_hand(keep_alive, None).await;
            let mut asked = 0;
            while asked < 3 {
                if let Some(Frame::Ping(number)) = source.next().await {
                    source.send(&[Frame::Pong(number)]).await;
                    asked += 1;
                }
            }
            assert!(matches!(source.next().await, Some(Frame::Ping(_))));
            assert_eq!(source.next().await, None, "twenty ticks of silence, and more than one ping was waiting");
            assert!(!destination.ended.is_finished(), "another connection may come");
        })
        .await;
}

#[tokio::test]
async fn a_peer_that_does_what_is_not_its_part_ends_the_session() {
    LocalSet::new()
        .run_until(async {
            let table: [&[Frame]; 6] = [
                &[Frame::Ping(1), Frame::Ping(2)],
                &[Frame::Ping(1), Frame::Pong(u64::MAX)],
                &[Frame::Ack(100)],
                &[Frame::Return(Bytes::from_static(b"x"))],
                &[Frame::HeldEnd],
                &[Frame::Hello(Greeting { identity: IDENTITY, key: KEY, taken: 0 })],
            ];
            for frames in table {
                let (destination, mut source) = against_a_source_by_hand(PATIENT, None).await;
                source.send(frames).await;
                let ended = destination.ended.await.expect("ended");
                assert!(matches!(ended, SessionError::Pump(PumpError::Unexpected(_))), "{frames:?}: {ended}");
            }
        })
        .await;
}

#[tokio::test]
async fn questions_about_pages_that_are_not_the_vms_end_the_session() {
    LocalSet::new()
        .run_until(async {
            for (block, ends) in [(0, false), (COMMON, true), (FIRST_IMAGE, true), (1, true)] {
                let (destination, mut source) = against_a_source_by_hand(PATIENT, Some(guest_memory().1)).await;
                source.send(&[Frame::Wanted { block, pages: vec![0] }]).await;
                let ended = tokio::time::timeout(Duration::from_secs(if ends { 10 } else { 1 }), destination.ended).await;
                assert_eq!(ended.is_ok_and(|ended| ended.is_err()), ends, "block {block}");
            }
        })
        .await;
}

#[tokio::test]
async fn a_silent_stranger_does_not_keep_the_source_waiting() {
    LocalSet::new()
        .run_until(async {
            let materials = cluster(&["h1", "h2"]);
            let (listener, address) = listener().await;
            let mut strangers = Vec::new();
            for _ in 0..20 {
                strangers.push(TcpStream::connect(address).await.expect("connected"));
            }
            let destination = destination(acceptor(listener, "h1", &materials[0], &materials[1]), None, PATIENT);
            let mut source = source(dialler(address, "h2", &materials[1], &materials[0]), IDENTITY);
            destination.to_peer.send(Bytes::from_static(b"{}")).await.expect("said");
            // Less than the time that a stranger has for its handshake.
            let heard = tokio::time::timeout(Duration::from_secs(10), source.from_peer.recv()).await;
            assert!(heard.expect("the source waited for strangers").is_some());
        })
        .await;
}

#[tokio::test]
async fn a_move_that_is_held_reads_nothing_until_its_time_is_over_it_may_go_on_or_its_vm_stops() {
    let (pump, _frames) = Pump::new(Side::Source, IDENTITY, PATIENT, None, mpsc::channel(1).0);
    let long = Duration::from_secs(3_600);
    let goes_on_within = async |millis| tokio::time::timeout(Duration::from_millis(millis), pump.wait_while_held()).await.is_ok();
    assert!(goes_on_within(0).await);
    pump.hold(long);
    assert!(!goes_on_within(50).await);
    pump.hold(Duration::from_millis(50));
    assert!(goes_on_within(60_000).await, "by itself");
    pump.hold(long);
    pump.hold(Duration::ZERO);
    assert!(goes_on_within(0).await);
    pump.hold(long);
    pump.hurry();
    assert!(goes_on_within(0).await);
}

#[tokio::test]
async fn a_qemu_that_may_switch_over_by_itself_is_given_no_chance_to_be_through_at_once() {
    LocalSet::new()
        .run_until(async {
            let (_, memory) = guest_memory();
            let materials = cluster(&["h1", "h2"]);
            let (listener, address) = listener().await;
            let mut destination = destination(acceptor(listener, "h1", &materials[0], &materials[1]), Some(memory), PATIENT);
            let dialler = dialler(address, "h2", &materials[1], &materials[0]);
            let mut source = source_at(dialler, IDENTITY, PATIENT, None, None, Vec::new(), false);
            let mut stream = Stream::new();
            let zero = |number| Element::Page { block: BlockIndex(0), page: number, content: PageContent::Zero };
            stream.part(&(0..u64::from(PAGES.0)).map(zero).collect::<Vec<_>>());
            stream.end();
            let began = Instant::now();
            source.qemu.write_all(&stream.take()).await.expect("written");
            let mut rest = Stream::new();
            rest.end();
            read_stream(&mut destination.qemu, &rest.take()).await;
            // A second for all of its memory, and no pause behind the last read.
            assert!(began.elapsed() > Duration::from_millis(500), "{:?}", began.elapsed());
        })
        .await;
}
