//! A snapshot: which page of which pack each page of a VM's RAM and disks is, and what else it takes to have the VM again.
//!
//! ```text
//! file      = head  leaves, as they came  parts  packs  directory  end
//! leaf      = runs of up to 512 pages of one space that begin at a multiple of 512:
//!             { u16 pages  u16 pack, place in the list, or ffff for zeros  u32 page of the pack, of which the next are the next }
//! part      = the bytes of one of the parts, in pieces of 1 MiB: about, preamble, devices, spaces
//! packs     = for each pack: 16 bytes id  32 bytes key  u32 pages
//! directory = for each leaf, in ascending order: u16 space  u32 leaf  u32 number of its record  u64 where its record begins
//! end       = u64 bytes before the parts  u32 bytes of each of the four parts  u32 packs  u32 leaves
//! ```
//! A leaf that is not there is zero. Any page is found by one search in the directory, one read of a leaf and one of a chunk, or two if it is a difference, whatever came before this
//! snapshot: there is no chain. The list has the packs of bases, too.

mod known;
mod leaf;
mod reader;
mod spaces;
mod writer;

pub use known::{Earlier, Known};
pub use leaf::Leaf;
pub use reader::SnapshotReader;
pub use spaces::{InvalidSpaces, Space, SpaceKind};
pub use writer::{Kept, Keys, Parts, SnapshotWriter, Totals};

use crate::sealed::{Form, Kind};

const RUN: usize = 2 + 2 + 4;
const MAX_LEAF: usize = Leaf::PAGES as usize * RUN;
/// A pack that is none: zeros.
const ZEROS: u16 = u16::MAX;
/// Longest part: a device state is that long at most.
const MAX_PART: usize = 64 << 20;
const PART_PIECE: usize = 1 << 20;
const PACK: usize = 16 + 32 + 4;
const PACKS_PIECE: usize = 4096 * PACK;
const ENTRY: usize = 2 + 4 + 4 + 8;
const DIRECTORY_PIECE: usize = 16_384 * ENTRY;
const PARTS: usize = 4;
const END: usize = 8 + PARTS * 4 + 4 + 4;

const FORM: Form = Form { magic: *b"GDWTSNAP", version: 1, context: "godwit vault 2026-11-27 key of a snapshot" };

/// What a record is. The first four are the parts, in the order of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Record {
    About = 1,
    Preamble = 2,
    Devices = 3,
    Spaces = 4,
    Leaf = 5,
    Packs = 6,
    Directory = 7,
    End = 8,
}

const PARTS_IN_ORDER: [Record; PARTS] = [Record::About, Record::Preamble, Record::Devices, Record::Spaces];

impl Kind for Record {
    fn number(self) -> u8 {
        self as u8
    }
}

/// Where a page is: in the pack at this place of a snapshot's list, the page of this number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Located {
    /// Place in the list.
    pub pack: u16,
    /// Number of the page.
    pub page: u32,
}

#[cfg(test)]
mod tests;
