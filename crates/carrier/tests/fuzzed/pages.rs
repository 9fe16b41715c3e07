//! What must hold for any batch of pages, and for any move of a small memory that is driven by bytes; the fuzzer `pages` and the replay of its
//! corpus call it. The first byte says which of them the others are.

use godwit_carrier::pages::Digester;

#[path = "memory.rs"]
mod memory;
#[path = "reference.rs"]
mod reference;
#[path = "round_trip.rs"]
mod round_trip;

use memory::{Memory, filled, noise};
use reference::{Outcome, Receiver, framed};

const KEY: [u8; 32] = [7; 32];
/// The second one has no pages.
const BLOCKS: [u32; 3] = [6, 0, 3];

/// What became of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Checked {
    /// A batch.
    Batch(Outcome),
    /// A move: the batches that were applied, and whether the destination found out that what it told was not so.
    Move { batches: usize, refused: bool },
}

/// Checks these bytes.
pub(crate) fn check(bytes: &[u8]) -> Checked {
    let (how, rest) = bytes.split_first().map_or((0, bytes), |(how, rest)| (*how, rest));
    match how & 3 {
        // A payload as it comes.
        0 => Checked::Batch(receive(rest.to_vec())),
        // Entries, which get their lengths, contents for data entries, and checks as they should be: without a key nobody guesses one.
        1 | 2 => {
            let mut body = reference::body(rest, usize::from(how >> 2 & 7));
            let repaired = usize::from(how >> 5 & 3);
            reference::repair(&mut body, &held(), &digester(), if repaired == 3 { usize::MAX } else { repaired });
            Checked::Batch(receive(framed(&body, how & 3 == 2)))
        }
        _ => round_trip::run(rest),
    }
}

fn receive(payload: Vec<u8>) -> Outcome {
    Receiver::new(held()).receive(&payload)
}

fn digester() -> Digester {
    Digester::new(&KEY)
}

/// Zeros, noise, and the same twice.
fn held() -> Memory {
    let mut memory = Memory::new(&BLOCKS);
    for (page, content) in [(1, noise(1)), (2, filled(b'x')), (3, noise(1)), (5, noise(2))] {
        memory.set(0, page, content);
    }
    memory.set(2, 2, noise(3));
    memory
}
