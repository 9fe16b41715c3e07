//! What must hold for any bytes that come from a client; the fuzzer `nbd_server` and the replay of its corpus call it.

use bytes::BytesMut;
use godwit_nbd::{MAX_DATA, Malformed, Request, Server};

/// Of the disk that is served.
const SIZE: u64 = 1 << 30;
/// More than a write of the most that is taken, with its header.
const LONGEST: usize = MAX_DATA as usize + 64;

/// What was asked for, and what there was no way on from.
pub(crate) type Asked = (Vec<Request>, Option<Malformed>);

/// Checks these bytes, and answers the requests in them.
pub(crate) fn check(bytes: &[u8]) -> Asked {
    let asked = check_one(bytes, Server::new);
    let reads = check_one(bytes, Server::of_reads);
    let of_reads = |request: &Request| matches!(request, Request::Read { .. } | Request::Status { .. } | Request::Disconnect);
    assert!(reads.0.iter().all(of_reads), "what is only read was to be written");
    assert!(
        !asked.0.iter().any(|request| matches!(request, Request::Read { .. } | Request::Status { .. })),
        "what is only written was read"
    );
    asked
}

fn check_one(bytes: &[u8], kind: Kind) -> Asked {
    let (asked, said) = serve([bytes].into_iter(), kind);
    // The cut follows from the input, so that files of the corpus are plain recordings.
    assert_eq!((asked.clone(), said), serve(bytes.chunks(bytes.len() % 61 + 1), kind), "pieces are understood as something else");
    for request in &asked.0 {
        let (offset, length) = match request {
            Request::Write { offset, data, .. } => (*offset, data.len() as u64),
            Request::Zeroes { offset, length, .. }
            | Request::Read { offset, length, .. }
            | Request::Status { offset, length, .. } => (*offset, (*length).into()),
            Request::Flush { .. } | Request::Disconnect => continue,
        };
        assert!(length > 0 && offset <= SIZE && length <= SIZE - offset, "{length} bytes at {offset} are not on the disk");
    }
    let disconnects = asked.0.iter().filter(|request| **request == Request::Disconnect).count();
    assert!(disconnects == 0 || disconnects == 1 && asked.0.last() == Some(&Request::Disconnect), "a client that left asks on");
    asked
}

/// A server of writes, or of reads.
type Kind = fn(&str, u64, &mut BytesMut) -> Server;

fn serve<'a>(pieces: impl Iterator<Item = &'a [u8]>, kind: Kind) -> (Asked, BytesMut) {
    let mut out = BytesMut::new();
    let mut server = kind("disk0", SIZE, &mut out);
    let mut requests = Vec::new();
    for piece in pieces {
        server.buffer_mut().extend_from_slice(piece);
        loop {
            match server.next_request(&mut out) {
                Ok(Some(request)) => requests.push(request),
                Ok(None) => break,
                Err(error) => return ((requests, Some(error)), out),
            }
        }
        let (waiting, ended) = (server.buffer_mut().len(), requests.last() == Some(&Request::Disconnect));
        assert!(ended || waiting < LONGEST, "{waiting} bytes wait");
    }
    ((requests, None), out)
}
