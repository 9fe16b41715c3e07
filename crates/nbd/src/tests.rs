//! Both sides against each other, in pieces, and against what is no NBD.

use bytes::{BufMut, Bytes, BytesMut};
use proptest::prelude::*;

use crate::wire::{MAGIC, OPTION, OPTION_REPLY, STRUCTURED_REPLY};
use crate::*;

const SIZE: u64 = 1 << 30;

/// A server that has shaken hands with a client as QEMU does.
fn served() -> Server {
    let mut out = BytesMut::new();
    let mut server = Server::new("disk0", SIZE, &mut out);
    let hello = server.buffer_mut();
    hello.put_u32(3);
    for (option, payload) in [(8_u32, &b""[..]), (7, b"\0\0\0\x05disk0\0\0")] {
        hello.put_u64(OPTION);
        hello.put_u32(option);
        hello.put_u32(payload.len() as u32);
        hello.put_slice(payload);
    }
    out.clear();
    assert_eq!(server.next_request(&mut out), Ok(None));
    let said = out.freeze();
    assert_eq!(&said[..20], b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x08\x80\0\0\x01\0\0\0\0", "no structured replies");
    assert_eq!(&said[said.len() - 20..], b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x01\0\0\0\0", "an acknowledgement");
    server
}

/// A client whose server has structured replies, extents and a disk.
fn ready(kinds: &[&str]) -> Client {
    let mut client = Client::new("disk0", kinds.iter().map(ToString::to_string).collect(), false);
    let from = client.buffer_mut();
    from.put_u64(MAGIC);
    from.put_u64(OPTION);
    from.put_u16(3);
    put_answer(from, 8, 1, b"");
    for (number, kind) in kinds.iter().enumerate() {
        let mut payload = BytesMut::new();
        payload.put_u32(7 + number as u32);
        payload.put_slice(kind.as_bytes());
        put_answer(from, 10, 4, &payload);
    }
    if !kinds.is_empty() {
        put_answer(from, 10, 1, b"");
    }
    let mut export = BytesMut::new();
    export.put_u16(0);
    export.put_u64(SIZE);
    export.put_u16(1);
    put_answer(from, 7, 3, &export);
    put_answer(from, 7, 1, b"");
    let mut out = BytesMut::new();
    assert_eq!(client.next_event(&mut out), Ok(Some(Event::Ready { size: SIZE })));
    client
}

fn put_answer(out: &mut BytesMut, option: u32, kind: u32, payload: &[u8]) {
    out.put_u64(OPTION_REPLY);
    out.put_u32(option);
    out.put_u32(kind);
    out.put_u32(payload.len() as u32);
    out.put_slice(payload);
}

fn put_chunk(out: &mut BytesMut, flags: u16, kind: u16, cookie: u64, payload: &[u8]) {
    out.put_u32(STRUCTURED_REPLY);
    out.put_u16(flags);
    out.put_u16(kind);
    out.put_u64(cookie);
    out.put_u32(payload.len() as u32);
    out.put_slice(payload);
}

#[test]
fn a_server_takes_what_our_client_writes() {
    let (mut server, mut out) = (served(), BytesMut::new());
    put_write(server.buffer_mut(), 1, 4096, &[7; 512]);
    put_write_zeroes(server.buffer_mut(), 2, 0, u32::MAX >> 4);
    put_flush(server.buffer_mut(), 3);
    put_disconnect(server.buffer_mut());
    let mut next = || server.next_request(&mut out);
    assert_eq!(next(), Ok(Some(Request::Write { cookie: 1, offset: 4096, data: Bytes::from(vec![7; 512]) })));
    assert_eq!(next(), Ok(Some(Request::Zeroes { cookie: 2, offset: 0, length: u32::MAX >> 4 })));
    assert_eq!(next(), Ok(Some(Request::Flush { cookie: 3 })));
    assert_eq!(next(), Ok(Some(Request::Disconnect)));
    assert_eq!(next(), Ok(None));
    assert!(out.is_empty(), "nothing was refused");
    Server::put_done(&mut out, 3);
    assert_eq!(&out[..], b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x03");
}

#[test]
fn what_is_beyond_the_disk_is_refused_and_what_is_too_long_ends_it() {
    let (mut server, mut out) = (served(), BytesMut::new());
    put_write(server.buffer_mut(), 1, SIZE - 511, &[0; 512]);
    put_write_zeroes(server.buffer_mut(), 2, u64::MAX, 512);
    put_read(server.buffer_mut(), 3, 0, 512);
    put_write(server.buffer_mut(), 4, 0, &[]);
    assert_eq!(server.next_request(&mut out), Ok(None));
    let refused: Vec<_> = out.as_chunks::<16>().0.iter().map(|reply| (reply[7], reply[15])).collect();
    assert_eq!(refused, [(22, 1), (22, 2), (22, 3), (22, 4)]);
    put_write(server.buffer_mut(), 5, 0, &[]);
    let length = server.buffer_mut().len();
    server.buffer_mut()[length - 4..].copy_from_slice(&(MAX_DATA + 1).to_be_bytes());
    assert_eq!(server.next_request(&mut out), Err(Malformed::Length(MAX_DATA + 1)));
}

#[test]
fn a_server_has_one_export() {
    let mut out = BytesMut::new();
    let mut server = Server::new("disk0", SIZE, &mut out);
    server.buffer_mut().put_slice(b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x0b\0\0\0\x05disk1\0\0");
    assert_eq!(server.next_request(&mut out), Err(Malformed::Export));
}

#[test]
fn our_client_reads_what_a_server_of_reads_gives() {
    let (mut hello, mut out) = (BytesMut::new(), BytesMut::new());
    let mut server = Server::of_reads("disk0", SIZE, &mut hello);
    let mut client = Client::new("disk0", vec![ALLOCATION.into()], false);
    client.buffer_mut().extend_from_slice(&hello);
    let mut ready = None;
    for _ in 0..5 {
        ready = ready.or(client.next_event(&mut out).expect("a handshake"));
        server.buffer_mut().extend_from_slice(&out.split());
        assert_eq!(server.next_request(client.buffer_mut()), Ok(None));
    }
    assert_eq!(ready, Some(Event::Ready { size: SIZE }));
    put_read(server.buffer_mut(), 1, 4096, 512);
    put_status(server.buffer_mut(), 2, 8192, 65536);
    put_read(server.buffer_mut(), 3, SIZE - 512, 512);
    for (offset, length) in [(0, 512), (0, 0)] {
        put_write(server.buffer_mut(), 4, offset, &vec![7; length]);
    }
    put_status(server.buffer_mut(), 4, SIZE, 1);
    let to_client = client.buffer_mut();
    assert_eq!(server.next_request(&mut out), Ok(Some(Request::Read { cookie: 1, offset: 4096, length: 512 })));
    server.put_data(to_client, 1, 4096, &[9; 512]);
    assert_eq!(server.next_request(&mut out), Ok(Some(Request::Status { cookie: 2, offset: 8192, length: 65536 })));
    Server::put_extent(to_client, 2, Extent { length: 4096, flags: 3 });
    assert_eq!(server.next_request(&mut out), Ok(Some(Request::Read { cookie: 3, offset: SIZE - 512, length: 512 })));
    server.put_failed(to_client, 3);
    assert_eq!(server.next_request(&mut out), Ok(None));
    let refused: Vec<_> = out.as_chunks::<16>().0.iter().map(|reply| (reply[7], reply[15])).collect();
    assert_eq!(refused, [(22, 4), (22, 4), (22, 4)], "writes, and what is beyond the end");
    for expected in [
        Event::Data { cookie: 1, offset: 4096, data: Bytes::from(vec![9; 512]) },
        Event::Done { cookie: 1 },
        Event::Status { cookie: 2, kind: 0, extents: vec![Extent { length: 4096, flags: 3 }] },
        Event::Done { cookie: 2 },
        Event::Failed { cookie: 3, error: 5 },
    ] {
        assert_eq!(client.next_event(&mut BytesMut::new()), Ok(Some(expected)));
    }
    put_read(server.buffer_mut(), 5, 0, MAX_DATA + 1);
    assert_eq!(server.next_request(&mut out), Err(Malformed::Length(MAX_DATA + 1)));
}

#[test]
fn kinds_of_extents_that_are_not_what_they_say_are_refused() {
    let mut out = BytesMut::new();
    for (kinds, code) in [
        (&b"\0\0\0\x05disk0\0\0\0\x01\0\0\0\x02qq"[..], 1),
        (b"\0\0\0\x05disk0\0\0\0\0", 1),
        (b"\0\0\0\x05disk1\0\0\0\0", 3),
        (b"\0\0\0\x05disk0\xff\xff\xff\xff", 3),
        (b"\0\0\0\x05disk0\0\0\0\x01\0\0\0\x03qq", 3),
        (b"\xff\xff\xff\xffdisk0", 3),
        (b"", 3),
    ] {
        let mut server = Server::of_reads("disk0", SIZE, &mut BytesMut::new());
        server.buffer_mut().put_u32(3);
        for (option, payload) in [(8, &b""[..]), (10, kinds)] {
            server.buffer_mut().put_slice(b"IHAVEOPT");
            server.buffer_mut().put_u32(option);
            server.buffer_mut().put_u32(payload.len() as u32);
            server.buffer_mut().put_slice(payload);
        }
        out.clear();
        assert_eq!(server.next_request(&mut out), Ok(None));
        assert_eq!((out.len(), out[20 + 15]), (40, code), "{kinds:?}");
    }
}

#[test]
fn extents_and_data_are_told_and_a_reply_ends_once() {
    let (mut client, mut out) = (ready(&[ALLOCATION, "qemu:dirty-bitmap:g1"]), BytesMut::new());
    let extents = b"\0\0\0\x08\0\0\x10\0\0\0\0\x01\0\0\x20\0\0\0\0\0";
    put_chunk(client.buffer_mut(), 0, 5, 9, extents);
    put_chunk(client.buffer_mut(), 1, 5, 9, &[&b"\0\0\0\x07"[..], &extents[4..]].concat());
    put_chunk(client.buffer_mut(), 0, 1, 10, b"\0\0\0\0\0\0\x10\0abcd");
    put_chunk(client.buffer_mut(), 0, 2, 10, b"\0\0\0\0\0\0\x20\0\0\0\x02\0");
    put_chunk(client.buffer_mut(), 1, 0, 10, b"");
    put_chunk(client.buffer_mut(), 1, 32769, 11, b"\0\0\0\x05\0\0");
    let told = vec![Extent { length: 4096, flags: 1 }, Extent { length: 8192, flags: 0 }];
    for expected in [
        Event::Status { cookie: 9, kind: 1, extents: told.clone() },
        Event::Status { cookie: 9, kind: 0, extents: told },
        Event::Done { cookie: 9 },
        Event::Data { cookie: 10, offset: 4096, data: Bytes::from_static(b"abcd") },
        Event::Hole { cookie: 10, offset: 8192, length: 512 },
        Event::Done { cookie: 10 },
        Event::Failed { cookie: 11, error: 5 },
    ] {
        assert_eq!(client.next_event(&mut out), Ok(Some(expected)));
    }
    assert_eq!(client.next_event(&mut out), Ok(None));
}

#[test]
fn a_server_that_lacks_what_is_needed_is_none() {
    let mut out = BytesMut::new();
    let answered = |answers: &[(u32, u32, &[u8])], writes: bool, out: &mut BytesMut| {
        let mut client = Client::new("disk0", vec![ALLOCATION.into()], writes);
        let from = client.buffer_mut();
        from.put_slice(b"NBDMAGICIHAVEOPT\0\x03");
        answers.iter().for_each(|(option, kind, payload)| put_answer(from, *option, *kind, payload));
        client.next_event(out)
    };
    assert_eq!(answered(&[(8, 0x8000_0001, b"")], false, &mut out), Err(Malformed::Refused { option: 8, code: 0x8000_0001 }));
    assert_eq!(answered(&[(8, 1, b""), (10, 1, b"")], false, &mut out), Err(Malformed::Cannot("tell all its extents")));
    assert_eq!(answered(&[(8, 1, b""), (10, 4, b"\0\0\0\x01other")], false, &mut out), Err(Malformed::Answer));
    let context = &[&b"\0\0\0\x01"[..], ALLOCATION.as_bytes()].concat();
    let read_only = b"\0\0\0\0\0\0\0\0\x10\0\0\x47";
    let answers = [(8, 1, &b""[..]), (10, 4, context), (10, 1, b""), (7, 3, read_only)];
    assert_eq!(answered(&answers, true, &mut out), Err(Malformed::Cannot("be written to")));
    assert_eq!(answered(&answers, false, &mut out), Ok(None));
}

proptest! {
    #[test]
    fn prop_pieces_of_any_size_are_one_stream(cut in 1_usize..40) {
        let mut bytes = BytesMut::new();
        put_write(&mut bytes, 1, 512, &[5; 1024]);
        put_write_zeroes(&mut bytes, 2, 0, 4096);
        put_disconnect(&mut bytes);
        let (mut server, mut out, mut told) = (served(), BytesMut::new(), Vec::new());
        for piece in bytes.chunks(cut) {
            server.buffer_mut().put_slice(piece);
            while let Some(request) = server.next_request(&mut out).expect("ours") {
                told.push(request);
            }
        }
        prop_assert_eq!(told.len(), 3);
        prop_assert_eq!(told.last(), Some(&Request::Disconnect));
    }

    #[test]
    fn prop_no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), begins in any::<bool>()) {
        let mut out = BytesMut::new();
        let mut server = if begins { served() } else { Server::of_reads("disk0", SIZE, &mut out) };
        let mut client = if begins { ready(&[ALLOCATION]) } else { Client::new("disk0", vec![], true) };
        server.buffer_mut().put_slice(&bytes);
        while let Ok(Some(_)) = server.next_request(&mut out) {}
        client.buffer_mut().put_slice(&bytes);
        while let Ok(Some(_)) = client.next_event(&mut out) {}
    }
}
