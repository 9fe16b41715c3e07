//! What must hold for any bytes that come from a server; the fuzzer `nbd_client` and the replay of its corpus call it.

use bytes::BytesMut;
use godwit_nbd::{ALLOCATION, Client, Event, MAX_DATA, Malformed};

/// More than the longest chunk that is taken, with its header.
const LONGEST: usize = MAX_DATA as usize + 128;

/// What was told, and what there was no way on from.
pub(crate) type Told = (Vec<Event>, Option<Malformed>);

/// Checks these bytes, and answers the events in them.
pub(crate) fn check(bytes: &[u8]) -> Told {
    let (told, said) = read([bytes].into_iter());
    // The cut follows from the input, so that files of the corpus are plain recordings.
    assert_eq!((told.clone(), said), read(bytes.chunks(bytes.len() % 61 + 1)), "pieces are understood as something else");
    for (at, event) in told.0.iter().enumerate() {
        match event {
            Event::Ready { .. } => assert_eq!(at, 0, "a handshake is over once, and before anything else"),
            Event::Status { kind, extents, .. } => {
                assert!(*kind < 2 && !extents.is_empty() && extents.iter().all(|extent| extent.length > 0), "{event:?}");
            }
            Event::Data { data, .. } => assert!(data.len() < LONGEST),
            Event::Hole { .. } | Event::Done { .. } | Event::Failed { .. } => assert!(at > 0),
        }
    }
    told
}

fn read<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Told, BytesMut) {
    let mut client = Client::new("disk0", vec![ALLOCATION.to_owned(), godwit_nbd::dirty_bitmap("godwit-7")], false);
    let (mut out, mut events) = (BytesMut::new(), Vec::new());
    for piece in pieces {
        client.buffer_mut().extend_from_slice(piece);
        loop {
            match client.next_event(&mut out) {
                Ok(Some(event)) => events.push(event),
                Ok(None) => break,
                Err(error) => return ((events, Some(error)), out),
            }
        }
        let waiting = client.buffer_mut().len();
        assert!(waiting < LONGEST, "{waiting} bytes wait");
    }
    ((events, None), out)
}
