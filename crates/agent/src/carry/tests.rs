//! Two pumps over real TLS on loopback, with socket pairs in place of QEMU.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use godwit_carrier::{Decoder, Frame, Identity};
use godwit_model::Name;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::LocalSet;

use super::connect::{Expected, accept, dial};
use super::pump::{Ends, KeepAlive, Pump, PumpError, Side};
use crate::tls::Material;
use crate::tls::tests::cluster;

const IDENTITY: Identity = Identity { vm: [1; 16], task: [2; 16], generation: 3 };
const PATIENT: KeepAlive = KeepAlive { every: Duration::from_secs(1), silence: Duration::from_secs(60) };

fn name(text: &str) -> Name {
    Name::new(text).expect("name")
}

/// The host as the controller names it: with the key of this certificate.
fn expected(host: &str, material: &Material) -> Expected {
    let chain = material.chain().expect("chain");
    let (_, certificate) = x509_parser::parse_x509_certificate(&chain[0]).expect("certificate");
    Expected { host: name(host), keys: vec![blake3::hash(certificate.tbs_certificate.subject_pki.raw).to_hex().to_string()] }
}

/// One running side: what QEMU and the agent would hold, and how it ends.
struct Running {
    qemu: UnixStream,
    to_peer: mpsc::Sender<Bytes>,
    from_peer: mpsc::Receiver<Bytes>,
    ended: tokio::task::JoinHandle<PumpError>,
}

fn start(side: Side, identity: Identity, keep_alive: KeepAlive, mut connection: super::connect::Connection) -> Running {
    let (qemu, ours) = UnixStream::pair().expect("pair");
    let (to_peer, from_agent) = mpsc::channel(8);
    let (to_agent, from_peer) = mpsc::channel(8);
    let ended = tokio::task::spawn_local(async move {
        let (pump, queues) = Pump::new(side, identity, keep_alive, None, to_agent);
        let mut decoder = Decoder::default();
        match pump.greet(&mut connection, &mut decoder).await {
            Ok(()) => pump.run(Ends { connection, qemu: ours, from_agent }, queues, decoder).await,
            Err(error) => error,
        }
    });
    Running { qemu, to_peer, from_peer, ended }
}

async fn connected(source: &Material, destination: &Material) -> (super::connect::Connection, super::connect::Connection) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("listener");
    let address: SocketAddr = listener.local_addr().expect("address");
    let (h1, h2) = (expected("h1", source), expected("h2", destination));
    let (dialled, accepted) = tokio::join!(
        dial(address, &h2, source, Arc::new(AtomicU64::new(0))),
        accept(listener, &h1, destination, Arc::new(AtomicU64::new(0))),
    );
    (dialled.expect("dialled"), accepted.expect("accepted"))
}

async fn pair(destination_identity: Identity) -> (Running, Running) {
    let materials = cluster(&["h1", "h2"]);
    let (dialled, accepted) = connected(&materials[0], &materials[1]).await;
    (start(Side::Source, IDENTITY, PATIENT, dialled), start(Side::Destination, destination_identity, PATIENT, accepted))
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 31 % 251) as u8).collect()
}

#[tokio::test]
async fn a_stream_its_return_path_and_its_end_arrive_whole() {
    LocalSet::new()
        .run_until(async {
            let (mut source, mut destination) = pair(IDENTITY).await;
            let sent = pattern(5 << 20);
            let copy = sent.clone();
            let writer = tokio::task::spawn_local(async move {
                source.qemu.write_all(&copy).await.expect("written");
                let mut back = [0; 4];
                source.qemu.read_exact(&mut back).await.expect("return path");
                (source, back)
            });
            let mut got = vec![0; sent.len()];
            destination.qemu.read_exact(&mut got).await.expect("read");
            assert!(got == sent, "the stream was changed");
            destination.qemu.write_all(b"SHUT").await.expect("written");
            let (source, back) = writer.await.expect("writer");
            assert_eq!(&back, b"SHUT");
            drop(source.qemu);
            let mut rest = Vec::new();
            destination.qemu.read_to_end(&mut rest).await.expect("end");
            assert!(rest.is_empty());
            source.to_peer.send(Bytes::from_static(b"{}")).await.expect("said");
            assert_eq!(destination.from_peer.recv().await, Some(Bytes::from_static(b"{}")), "agents talk on after QEMU's end");
        })
        .await;
}

#[tokio::test]
async fn a_destination_that_does_not_read_holds_the_source_back() {
    LocalSet::new()
        .run_until(async {
            let (source, _destination) = pair(IDENTITY).await;
            let data = vec![0; 1 << 20];
            let mut taken = 0;
            // Until nothing has been taken for a while: that is what is in flight plus the sockets' own buffers.
            while let Ok(written) = tokio::time::timeout(Duration::from_millis(500), source.qemu.writable()).await {
                written.expect("writable");
                match source.qemu.try_write(&data) {
                    Ok(count) => taken += count,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => panic!("{error}"),
                }
                assert!(taken < 4 << 20, "{taken} bytes are hidden from QEMU");
            }
            assert!(taken >= 512 << 10, "only {taken} bytes were taken");
        })
        .await;
}

#[tokio::test]
async fn a_broken_connection_is_not_taken_for_the_end_of_the_stream() {
    LocalSet::new()
        .run_until(async {
            let (source, destination) = pair(IDENTITY).await;
            source.ended.abort();
            assert!(matches!(destination.ended.await.expect("ended"), PumpError::Closed | PumpError::Connection(_)));
        })
        .await;
}

#[tokio::test]
async fn another_move_and_another_host_are_turned_away() {
    LocalSet::new()
        .run_until(async {
            let other = Identity { generation: 4, ..IDENTITY };
            let (source, destination) = pair(other).await;
            assert!(matches!(destination.ended.await.expect("ended"), PumpError::Identity));
            assert!(matches!(source.ended.await.expect("ended"), PumpError::Closed | PumpError::Connection(_)));

            let materials = cluster(&["h1", "h2", "h3", "h1", "h2"]);
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("listener");
            let address = listener.local_addr().expect("address");
            let (h1, destination) = (expected("h1", &materials[0]), materials[1].clone());
            let accepting = tokio::task::spawn_local(async move { accept(listener, &h1, &destination, Arc::default()).await });
            let refused = dial(address, &expected("h3", &materials[2]), &materials[0], Arc::default()).await;
            assert!(refused.is_err(), "h2 passed for h3");
            let h2 = expected("h2", &materials[1]);
            for (stranger, passed) in
                [(&materials[2], "h3 passed for h1"), (&materials[3], "an old key of h1 passed for its new one")]
            {
                if let Ok(mut stranger) = dial(address, &h2, stranger, Arc::default()).await {
                    assert_eq!(stranger.read(&mut [0; 1]).await.unwrap_or(0), 0, "{passed}");
                }
            }
            let refused = dial(address, &expected("h2", &materials[4]), &materials[2], Arc::default()).await;
            assert!(refused.is_err(), "h2 passed with a key that may no longer speak for it");
            let foreign = cluster(&["h1"]);
            let cut = match dial(address, &h2, &foreign[0], Arc::default()).await {
                Ok(mut connection) => connection.read(&mut [0; 1]).await.unwrap_or(0) == 0,
                Err(_) => true,
            };
            assert!(cut, "a host of another cluster was let in");
            assert!(!accepting.is_finished());
            dial(address, &h2, &materials[0], Arc::default()).await.expect("the right one is still welcome");
            accepting.await.expect("joined").expect("accepted");
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
}

/// A pump as destination, and its source by hand, after the greeting.
async fn against_a_source_by_hand(keep_alive: KeepAlive) -> (Running, ByHand) {
    let materials = cluster(&["h1", "h2"]);
    let (connection, accepted) = connected(&materials[0], &materials[1]).await;
    let running = start(Side::Destination, IDENTITY, keep_alive, accepted);
    let mut source = ByHand { connection, decoder: Decoder::default() };
    source.send(&[Frame::Hello(IDENTITY)]).await;
    assert_eq!(source.next().await, Some(Frame::Welcome(IDENTITY)));
    (running, source)
}

#[tokio::test]
async fn a_peer_that_stands_still_gets_one_ping_and_is_asked_again_once_it_has_answered() {
    LocalSet::new()
        .run_until(async {
            let every = Duration::from_millis(5);
            let (destination, mut source) = against_a_source_by_hand(KeepAlive { every, silence: 20 * every }).await;
            for _ in 0..3 {
                let Some(Frame::Ping(number)) = source.next().await else { panic!("no ping") };
                source.send(&[Frame::Pong(number)]).await;
            }
            assert!(matches!(destination.ended.await.expect("ended"), PumpError::Silent(_)));
            assert!(matches!(source.next().await, Some(Frame::Ping(_))));
            assert_eq!(source.next().await, None, "twenty ticks of silence, and more than one ping was waiting");
        })
        .await;
}

#[tokio::test]
async fn a_peer_that_only_asks_or_answers_what_was_not_asked_is_cut_off() {
    LocalSet::new()
        .run_until(async {
            for frames in [[Frame::Ping(1), Frame::Ping(2)], [Frame::Ping(1), Frame::Pong(u64::MAX)]] {
                let (destination, mut source) = against_a_source_by_hand(PATIENT).await;
                source.send(&frames).await;
                assert!(matches!(destination.ended.await.expect("ended"), PumpError::Unexpected(_)), "{frames:?}");
            }
        })
        .await;
}

#[tokio::test]
async fn a_silent_stranger_does_not_keep_the_source_waiting() {
    LocalSet::new()
        .run_until(async {
            let materials = cluster(&["h1", "h2"]);
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("listener");
            let address = listener.local_addr().expect("address");
            let mut strangers = Vec::new();
            for _ in 0..20 {
                strangers.push(tokio::net::TcpStream::connect(address).await.expect("connected"));
            }
            let (h1, h2, destination) = (expected("h1", &materials[0]), expected("h2", &materials[1]), materials[1].clone());
            let accepting = tokio::task::spawn_local(async move { accept(listener, &h1, &destination, Arc::default()).await });
            // Less than the time that a stranger has for its handshake.
            let dialled = tokio::time::timeout(Duration::from_secs(10), dial(address, &h2, &materials[0], Arc::default()));
            dialled.await.expect("the source waited for strangers").expect("dialled");
            accepting.await.expect("joined").expect("accepted");
        })
        .await;
}
