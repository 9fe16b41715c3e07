//! What must hold for any bytes that come over a connection; the fuzzer `frames` and the replay of its corpus call it.

use bytes::BytesMut;
use godwit_carrier::pages::MAX_PAYLOAD;
use godwit_carrier::{Decoder, Frame, MalformedFrame};

/// Bytes before the payload: kind and length.
const HEADER: usize = 5;
/// No kind allows more.
const LONGEST: usize = HEADER + MAX_PAYLOAD;

/// Checks these bytes, and answers the frames in them.
pub(crate) fn check(bytes: &[u8]) -> Vec<Frame> {
    let (frames, error) = decode([bytes].into_iter());
    // The cut follows from the input, so that files of the corpus are plain recordings.
    assert_eq!((frames.clone(), error), decode(bytes.chunks(bytes.len() % 61 + 1)), "pieces decode to something else");
    for frame in &frames {
        if let Frame::Memory(blocks) = frame {
            assert!(blocks.len() <= 256 && blocks.iter().all(|block| !block.id.is_empty()), "a block has a name");
        }
    }
    let mut again = BytesMut::new();
    frames.iter().for_each(|frame| frame.encode(&mut again));
    assert!(bytes.starts_with(&again), "there are two ways to say the same");
    assert_eq!(decode([&again[..]].into_iter()), (frames.clone(), None));
    frames
}

fn decode<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Frame>, Option<MalformedFrame>) {
    let mut decoder = Decoder::default();
    let mut frames = Vec::new();
    let mut longest = 0;
    for piece in pieces {
        decoder.buffer_mut().extend_from_slice(piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(decoder.next_frame(), Err(error), "there is no way back into step");
                    return (frames, Some(error));
                }
            }
        }
        longest = longest.max(check_buffer(decoder.buffer_mut())).max(piece.len());
        // A buffer doubles as it grows, and is kept; a small one is of any size up to a KiB.
        let capacity = decoder.buffer_mut().capacity();
        assert!(capacity <= 4 * longest + 1024, "{capacity} bytes for frames of {longest}");
    }
    (frames, None)
}

/// What waits is less than the frame that it begins, and that one is of a length that some kind allows; which is answered.
fn check_buffer(buffer: &BytesMut) -> usize {
    let announced = buffer.first_chunk::<HEADER>().map(|[_, length @ ..]| u32::from_be_bytes(*length) as usize);
    let frame = HEADER + announced.unwrap_or(0);
    assert!(buffer.len() < frame && frame <= LONGEST, "{} bytes wait for a frame of {frame}", buffer.len());
    frame
}
