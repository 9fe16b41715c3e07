//! The endless stream of TCP port 9: which byte stands at which place is known, so that a client finds every lost, doubled
//! or changed byte.

use crate::noise::mix;

/// Writes the bytes that stand at `offset` and after it.
pub fn fill_stream(offset: u64, bytes: &mut [u8]) {
    for (place, byte) in (offset..).zip(bytes) {
        *byte = byte_at(place);
    }
}

/// A byte that is not the one that stands at its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("byte {offset} of the stream is {found:#04x}, not {expected:#04x}")]
pub struct StreamMismatch {
    /// Its place.
    pub offset: u64,
    /// What should stand there.
    pub expected: u8,
    /// What came.
    pub found: u8,
}

/// Checks what a client receives, in any portions.
#[derive(Debug, Clone, Default)]
pub struct StreamVerifier {
    offset: u64,
}

impl StreamVerifier {
    /// At the start of a connection.
    #[must_use]
    pub const fn new() -> Self {
        Self { offset: 0 }
    }

    /// Bytes found right so far.
    #[must_use]
    pub const fn verified(&self) -> u64 {
        self.offset
    }

    /// Checks the next bytes.
    ///
    /// # Errors
    /// The first byte that is wrong; the verifier stays before it.
    pub fn consume(&mut self, bytes: &[u8]) -> Result<(), StreamMismatch> {
        for &found in bytes {
            let expected = byte_at(self.offset);
            if found != expected {
                return Err(StreamMismatch { offset: self.offset, expected, found });
            }
            self.offset += 1;
        }
        Ok(())
    }
}

const fn byte_at(place: u64) -> u8 {
    mix(place / 8 + 1).to_le_bytes()[(place % 8) as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_portions_verify() {
        let mut stream = vec![0; 5000];
        fill_stream(0, &mut stream[..1234]);
        fill_stream(1234, &mut stream[1234..]);
        let mut verifier = StreamVerifier::new();
        for portion in stream.chunks(77) {
            verifier.consume(portion).unwrap();
        }
        assert_eq!(verifier.verified(), 5000);
    }

    #[test]
    fn lost_doubled_and_changed_bytes_are_found() {
        let mut stream = vec![0; 300];
        fill_stream(0, &mut stream);
        let lost = [&stream[..100], &stream[108..]].concat();
        let doubled = [&stream[..100], &stream[92..]].concat();
        let mut changed = stream.clone();
        changed[100] ^= 4;
        for wrong in [lost, doubled, changed] {
            assert_eq!(StreamVerifier::new().consume(&wrong).unwrap_err().offset, 100);
        }
    }
}
