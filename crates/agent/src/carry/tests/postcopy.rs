//! Post-copy between two carries, with QEMUs that are played byte by byte.

use std::collections::BTreeMap;

use godwit_stream::postcopy::{put_advise, put_discards, put_package};

use super::super::pump::{ADVISED, LOADED};
use super::*;

fn ram() -> BlockId {
    BlockId::new(b"pc.ram").expect("a name")
}

fn ping(number: u32) -> Element {
    Element::Command { number: 2, payload: Bytes::copy_from_slice(&number.to_be_bytes()) }
}

fn pong(number: u32) -> Vec<u8> {
    [&[0, 2, 0, 4][..], &number.to_be_bytes()].concat()
}

fn asks_for(page: u32) -> Vec<u8> {
    let start = u64::from(page) * PAGE_SIZE as u64;
    [&[0, 3, 0, 19][..], &start.to_be_bytes(), &4096_u32.to_be_bytes(), b"\x06pc.ram"].concat()
}

/// The devices' state, and with it the end of a source QEMU's stream.
const STATE: &[u8] = b"\x04\0\0\0\x07what only a device understands\x7e\0\0\0\x07";

fn tail() -> Bytes {
    let description = b"{\"page_size\": 4096}";
    let length = u32::try_from(description.len()).expect("short").to_be_bytes();
    Bytes::from([STATE, &[0, 6], &length, description].concat())
}

/// What the destination's QEMU reads, without the questions about its life, which come when they come.
struct Reads {
    qemu: UnixStream,
    bytes: BytesMut,
}

impl Reads {
    async fn fill(&mut self, length: usize) {
        while self.bytes.len() < length {
            assert!(self.qemu.read_buf(&mut self.bytes).await.expect("read") > 0, "the stream has ended");
        }
    }

    async fn exactly(&mut self, expected: &[u8]) {
        self.skip_questions().await;
        self.fill(expected.len()).await;
        let got = self.bytes.split_to(expected.len());
        assert!(
            got == *expected,
            "the stream is another: {:?} is not {:?}",
            &got[..got.len().min(64)],
            &expected[..expected.len().min(64)]
        );
    }

    async fn skip_questions(&mut self) {
        loop {
            self.fill(9).await;
            match self.bytes[..] {
                [8, 0, 2, 0, 4, 0x47, 0x57, a, b, ..] => {
                    drop(self.bytes.split_to(9));
                    self.qemu.write_all(&pong(u32::from_be_bytes([0x47, 0x57, a, b]))).await.expect("answered");
                }
                _ => return,
            }
        }
    }

    /// The pages of one section after the switch; `None` at the end.
    async fn pages(&mut self, into: &mut BTreeMap<u32, Vec<u8>>) -> Option<Vec<u32>> {
        self.fill(5).await;
        let [kind, ..] = self.bytes.split_to(5)[..] else { unreachable!("five bytes") };
        let mut came = Vec::new();
        loop {
            self.fill(8).await;
            let word = u64::from_be_bytes(self.bytes.split_to(8)[..].try_into().expect("eight bytes"));
            if word & 0x10 != 0 {
                self.fill(5).await;
                drop(self.bytes.split_to(5));
                break;
            }
            if word & 0x20 == 0 {
                self.fill(7).await;
                assert_eq!(self.bytes.split_to(7), b"\x06pc.ram"[..]);
            }
            let length = if word & 2 != 0 { 1 } else { PAGE_SIZE };
            self.fill(length).await;
            let mut content = self.bytes.split_to(length).to_vec();
            content.resize(PAGE_SIZE, 0);
            let page = u32::try_from(word / PAGE_SIZE as u64).expect("a page");
            assert!(into.insert(page, content).is_none(), "page {page} came twice");
            came.push(page);
        }
        (kind == 2).then_some(came)
    }
}

#[tokio::test]
async fn what_is_left_follows_once_and_what_is_missed_overtakes_it() {
    LocalSet::new()
        .run_until(async {
            let (own_pages, mut own) = guest_memory();
            let (pages, memory) = guest_memory();
            let materials = cluster(&["h1", "h2"]);
            let (listener, address) = listener().await;
            let acceptor = acceptor(listener, "h1", &materials[0], &materials[1]);
            let destination = destination_at(acceptor, Some(memory), PATIENT, true, Neighbours::default());
            // Slow, so that the rest is still on its way when a page is missed.
            let rate = Some(BytesPerSec(400_000));
            let dialler = dialler(address, "h2", &materials[1], &materials[0]);
            // As it is in the end.
            for number in 0..500 {
                let changed = if (10..20).contains(&number) { 5_000 } else { 0 };
                own.write(0, number, &noise(changed + u64::from(number))).expect("written");
            }
            let mut source = source_at(dialler, IDENTITY, PATIENT, rate, Some(own), Vec::new(), true);
            let mut reads = Reads { qemu: destination.qemu, bytes: BytesMut::new() };

            // Before RAM begins QEMU is advised, and its memory is told of when it has answered.
            let (mut stream, mut expected) = (Stream::begin(), Stream::begin());
            source.qemu.write_all(&stream.take()).await.expect("written");
            stream.ram();
            source.qemu.write_all(&stream.take()).await.expect("written");
            let mut before = expected.take();
            put_advise(&mut before);
            expected.add(&ping(ADVISED));
            before.extend_from_slice(&expected.take());
            reads.exactly(&before).await;
            reads.qemu.write_all(&pong(ADVISED)).await.expect("answered");

            // Some pages go as ever, then none does.
            let first: Vec<Element> = (0..100).map(|number| page(0, number, &noise(number))).collect();
            stream.part(&first);
            source.qemu.write_all(&stream.take()).await.expect("written");
            expected.ram();
            reads.exactly(&expected.take()).await;
            let deadline = Instant::now() + Duration::from_secs(20);
            while pages[99] != noise(99) {
                assert!(Instant::now() < deadline, "the first pages do not come");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            source.leave.send(()).expect("a source that listens");
            tokio::time::sleep(Duration::from_millis(50)).await;
            // 0 to 9 as they are at the destination, 10 to 19 as they were before: they have changed since.
            let again = (0..10).map(|number| page(0, number, &noise(number)));
            let changed = (10..20).map(|number| page(0, number, &noise(5_000 + number)));
            stream.part(&again.chain(changed).chain((100..400).map(|number| page(0, number, &noise(number)))).collect::<Vec<_>>());
            source.qemu.write_all(&stream.take()).await.expect("written");
            tokio::time::sleep(Duration::from_millis(200)).await;
            assert!(pages[100..400].iter().all(|page| *page == [0; PAGE_SIZE]), "a page was sent all the same");

            // The end has a page that is not placed, and takes its time in the middle of that.
            let bios = page(1, 0, &noise(1_000));
            stream.add(&Element::EndBegin);
            stream.add(&bios);
            stream.add(&page(0, 450, &noise(450)));
            source.qemu.write_all(&stream.take()).await.expect("written");
            tokio::time::sleep(Duration::from_millis(50)).await;
            stream.add(&Element::EndEnd);
            stream.add(&Element::Opaque(tail()));
            source.qemu.write_all(&stream.take()).await.expect("written");

            expected.part(&[bios]);
            reads.exactly(&expected.take()).await;
            let mut discards = BytesMut::new();
            put_discards(&mut discards, &ram(), &[(10, 10), (100, 300), (450, 1)]);
            reads.exactly(&discards).await;
            let mut package = BytesMut::new();
            put_package(&mut package, STATE, LOADED);
            reads.exactly(&package).await;
            reads.qemu.write_all(&pong(LOADED)).await.expect("answered");
            // For the source's QEMU that is the end.
            read_exactly(&mut source.qemu, &[0, 1, 0, 4, 0, 0, 0, 0]).await;

            // One that was left, one that was never written to, and one that is there, whose request has been overtaken.
            for page in [390, 550, 390] {
                reads.qemu.write_all(&asks_for(page)).await.expect("asked");
            }
            let (mut came, mut sections) = (BTreeMap::new(), Vec::new());
            while let Some(pages) = reads.pages(&mut came).await {
                sections.push(pages);
            }
            let place = |page: u32| sections.iter().flatten().position(|came| *came == page).expect("it came");
            assert!(place(390) < 311 / 2, "what is missed comes first, not as number {}", place(390));
            assert_eq!(came.remove(&550), Some(vec![0; PAGE_SIZE]), "zeros that the source was not asked for");
            let left: Vec<u32> = (10..20).chain(100..400).chain([450]).collect();
            assert!(came.keys().eq(&left), "{:?}", came.keys());
            assert!(came.iter().all(|(page, content)| own_pages[*page as usize] == content[..]), "what the source's QEMU has");
            reads.fill(1).await;
            assert_eq!(reads.bytes[..], [0], "the end of the stream");
        })
        .await;
}
