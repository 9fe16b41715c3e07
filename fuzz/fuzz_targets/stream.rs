//! The migration stream: any bytes, cut anywhere, give the same elements or the same error; what was read can be written, and is then read
//! as the same again.
//!
//! `scripts/fuzz stream`; what it finds goes into `crates/stream/tests/corpus/stream`, which an ordinary test runs through.
#![no_main]

use bytes::BytesMut;
use godwit_stream::{Element, Reader, StreamError, Writer};
use libfuzzer_sys::fuzz_target;

/// Neighbouring opaque elements are joined: their borders are those of the pieces.
fn read<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Element>, Option<StreamError>) {
    let mut reader = Reader::new();
    let mut elements: Vec<Element> = Vec::new();
    for piece in pieces {
        reader.buffer_mut().extend_from_slice(piece);
        loop {
            match reader.next_element() {
                Ok(Some(element)) => match (elements.last_mut(), element) {
                    (Some(Element::Opaque(before)), Element::Opaque(more)) => *before = [before.as_ref(), &more].concat().into(),
                    (_, element) => elements.push(element),
                },
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(reader.next_element(), Err(error.clone()));
                    return (elements, Some(error));
                }
            }
        }
    }
    (elements, None)
}

fuzz_target!(|bytes: &[u8]| {
    let (whole, error) = read([bytes].into_iter());
    // The cut follows from the input, so that files of the corpus are plain recordings.
    assert_eq!((whole.clone(), error), read(bytes.chunks(bytes.len() % 61 + 1)));
    let (mut writer, mut out) = (Writer::new(), BytesMut::new());
    for element in &whole {
        writer.write(element, &mut out).expect("what was read can be written");
    }
    // The byte behind a configuration tells that it is whole.
    if matches!(whole.last(), Some(Element::Configuration(_))) {
        out.extend_from_slice(&[0x08]);
    }
    assert_eq!(read([&out[..]].into_iter()), (whole, None));
});
