//! The return path: any bytes, cut anywhere, give the same messages or the same error; what was read is written again byte for byte.
//!
//! `scripts/fuzz return_path`; what it finds goes into `crates/stream/tests/corpus/return_path`, which an ordinary test runs through.
#![no_main]

use bytes::BytesMut;
use godwit_stream::{ReturnError, ReturnMessage, ReturnReader, ReturnWriter};
use libfuzzer_sys::fuzz_target;

/// The messages, written again.
fn read_and_write<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (BytesMut, Option<ReturnError>, bool) {
    let (mut reader, mut writer, mut out) = (ReturnReader::new(), ReturnWriter::new(), BytesMut::new());
    let mut bitmap = false;
    for piece in pieces {
        reader.buffer_mut().extend_from_slice(piece);
        loop {
            match reader.next_message() {
                Ok(Some(message)) => {
                    bitmap |= matches!(message, ReturnMessage::RecvBitmap { .. });
                    writer.write(&message, &mut out).expect("what was read can be written");
                }
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(reader.next_message(), Err(error));
                    return (out, Some(error), bitmap);
                }
            }
        }
    }
    (out, None, bitmap)
}

fuzz_target!(|bytes: &[u8]| {
    let whole = read_and_write([bytes].into_iter());
    assert_eq!(whole, read_and_write(bytes.chunks(bytes.len() % 61 + 1)));
    // The mark behind a bitmap is written with the bitmap's last byte, before it was read.
    let (out, _, bitmap) = whole;
    assert!(bitmap || bytes.starts_with(&out));
});
