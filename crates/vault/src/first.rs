//! The pages that a VM asked for first when it ran out of a snapshot, in that order: the next time they are there before it asks. A hint: a file that is damaged, or of which a
//! page is not in the snapshot, costs time, never correctness.
//!
//! ```text
//! file  = head  pages  end
//! pages = for each: u16 space  u32 page
//! end   = u32 pages
//! ```

use std::io;

use bytes::{Buf, BufMut};
use godwit_model::Bytes;

use crate::records::RecordWriter;
use crate::sealed::{Form, HEAD, Head, Kind};
use crate::stored::{FileError, Malformed, Records, Stored, list_length};
use crate::{Sink, SnapshotKey};

const FORM: Form = Form { magic: *b"GDWTFRST", version: 1, context: "godwit vault 2026-11-28 key of first pages" };
const PAGE: usize = 2 + 4;
const PIECE: usize = MOST * PAGE;
const END: usize = 4;

/// Pages that are kept: more do not come first.
pub(crate) const MOST: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Record {
    Pages = 1,
    End = 2,
}

impl Kind for Record {
    fn number(self) -> u8 {
        self as u8
    }
}

/// Writes the first [`MOST`] of them.
pub(crate) fn write<W: Sink>(file: W, key: &SnapshotKey, pages: &[(u16, u32)]) -> io::Result<W> {
    let pages = &pages[..pages.len().min(MOST)];
    let mut list = Vec::with_capacity(pages.len() * PAGE);
    for (space, page) in pages {
        list.put_u16(*space);
        list.put_u32(*page);
    }
    let mut out = RecordWriter::begin(file, &FORM, key.expose(), Head::draw(&FORM)?, Bytes::mib(1))?;
    out.list(Record::Pages, &list, PIECE)?;
    out.end(Record::End, &(pages.len() as u32).to_be_bytes())?;
    out.finish()
}

/// Reads them.
pub(crate) fn read<S: Stored>(file: S, key: &SnapshotKey) -> Result<Vec<(u16, u32)>, FileError> {
    let records = Records::open(file, &FORM, key.expose())?;
    let count = u32::from_be_bytes(records.end::<END>(Record::End)?) as usize;
    let bytes = (count * PAGE) as u64;
    let end = list_length(END as u64, END);
    if count > MOST || records.length() != HEAD as u64 + list_length(bytes, PIECE) + end {
        return Err(Malformed::Count.into());
    }
    let (list, _) = records.list(Record::Pages, HEAD as u64, bytes, PIECE)?;
    let mut list = &list[..];
    Ok((0..count).map(|_| (list.get_u16(), list.get_u32())).collect())
}
