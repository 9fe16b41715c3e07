//! A guest's TPM: the few commands of TPM 2.0 that tests need, as bytes (TCG's library specification, part 3), and what comes back.
//!
//! All values are big-endian. A command begins with its tag, its length and its code; a response with its tag, its length and a code that is 0
//! if all went well.

use anyhow::{Context, Result, ensure};

const NO_SESSIONS: u16 = 0x8001;
const SESSIONS: u16 = 0x8002;
const OWNER: u32 = 0x4000_0001;
const PASSWORD: u32 = 0x4000_0009;
const SHA256: u16 = 0x000b;
/// Its owner reads and writes it.
const OWNERS: u32 = 1 << 1 | 1 << 17;
/// Head of a response.
const HEAD: usize = 10;

/// Defines a place in the TPM's permanent memory.
#[must_use]
pub fn define(index: u32, size: u16) -> Vec<u8> {
    let mut place = Vec::new();
    place.extend(index.to_be_bytes());
    place.extend(SHA256.to_be_bytes());
    place.extend(OWNERS.to_be_bytes());
    // No policy.
    place.extend(0_u16.to_be_bytes());
    place.extend(size.to_be_bytes());
    authorised(0x12a, &[OWNER], &[sized(&[]), sized(&place)].concat())
}

/// Writes to a place in the TPM's permanent memory.
#[must_use]
pub fn write(index: u32, data: &[u8]) -> Vec<u8> {
    authorised(0x137, &[OWNER, index], &[sized(data), vec![0, 0]].concat())
}

/// Reads a place in the TPM's permanent memory.
#[must_use]
pub fn read(index: u32, size: u16) -> Vec<u8> {
    authorised(0x14e, &[OWNER, index], &[size.to_be_bytes(), [0, 0]].concat())
}

/// What was read.
///
/// # Errors
/// The TPM's own, and a response of another shape.
pub fn data(response: &[u8]) -> Result<Vec<u8>> {
    // Behind the length of all parameters.
    parameter(accepted(response)?, 4)
}

/// Extends a register.
#[must_use]
pub fn extend(register: u8, digest: [u8; 32]) -> Vec<u8> {
    let digests = [&1_u32.to_be_bytes()[..], &SHA256.to_be_bytes(), &digest].concat();
    authorised(0x182, &[register.into()], &digests)
}

/// Reads a register.
#[must_use]
pub fn register(register: u8) -> Vec<u8> {
    let mut selected = [0; 3];
    if let Some(byte) = selected.get_mut(usize::from(register / 8)) {
        *byte = 1 << (register % 8);
    }
    command(NO_SESSIONS, 0x17e, &[&1_u32.to_be_bytes()[..], &SHA256.to_be_bytes(), &[3], &selected].concat())
}

/// What a register holds.
///
/// # Errors
/// The TPM's own, and a response of another shape.
pub fn digest(response: &[u8]) -> Result<Vec<u8>> {
    // Behind a counter, the selection and the number of digests.
    parameter(accepted(response)?, 4 + 10 + 4)
}

/// What is behind the head of a response that says success.
///
/// # Errors
/// The TPM's own, and what is no response.
pub fn accepted(response: &[u8]) -> Result<&[u8]> {
    let code = response.get(6..HEAD).context("no head")?;
    ensure!(code == [0; 4], "the TPM says {code:02x?}");
    response.get(HEAD..).context("no head")
}

fn parameter(body: &[u8], at: usize) -> Result<Vec<u8>> {
    let (length, rest) = body.get(at..).and_then(|rest| rest.split_first_chunk()).context("cut short")?;
    Ok(rest.get(..usize::from(u16::from_be_bytes(*length))).context("cut short")?.to_vec())
}

fn sized(data: &[u8]) -> Vec<u8> {
    let length = u16::try_from(data.len()).expect("small data");
    [&length.to_be_bytes()[..], data].concat()
}

/// A command of its owner, or for a register, who all have no password.
fn authorised(code: u32, handles: &[u32], parameters: &[u8]) -> Vec<u8> {
    let handles: Vec<u8> = handles.iter().flat_map(|handle| handle.to_be_bytes()).collect();
    // A password session: no nonce, no attributes, an empty password.
    let session = [&PASSWORD.to_be_bytes()[..], &[0, 0], &[0], &[0, 0]].concat();
    command(SESSIONS, code, &[&handles, &9_u32.to_be_bytes()[..], &session, parameters].concat())
}

fn command(tag: u16, code: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEAD + body.len()).expect("a small command");
    [&tag.to_be_bytes()[..], &length.to_be_bytes(), &code.to_be_bytes(), body].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_as_the_specification_writes_them() {
        let expected = [0x80, 1, 0, 0, 0, 0x14, 0, 0, 1, 0x7e, 0, 0, 0, 1, 0, 0x0b, 3, 0, 0, 0x80];
        assert_eq!(register(23), expected);
        let expected = [
            0x80, 2, 0, 0, 0, 0x23, 0, 0, 1, 0x4e, 0x40, 0, 0, 1, 1, 0x50, 0, 1, 0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0, 0, 8, 0,
            0,
        ];
        assert_eq!(read(0x0150_0001, 8), expected);
        for command in [define(0x0150_0001, 8), write(0x0150_0001, b"12345678"), extend(23, [7; 32])] {
            assert_eq!(command[2..6], u32::try_from(command.len()).expect("short").to_be_bytes());
        }
    }

    #[test]
    fn responses_are_read_and_refusals_told() {
        let response = [&[0x80, 2, 0, 0, 0, 0x17, 0, 0, 0, 0, 0, 0, 0, 4, 0, 2][..], b"ab", &[0; 5]].concat();
        assert_eq!(data(&response).expect("data"), b"ab");
        assert!(data(&response[..17]).is_err() && data(&[]).is_err());
        let refused = [0x80, 1, 0, 0, 0, 0x0a, 0, 0, 1, 0x4a];
        assert_eq!(accepted(&refused).expect_err("refused").to_string(), "the TPM says [00, 00, 01, 4a]");
    }
}
