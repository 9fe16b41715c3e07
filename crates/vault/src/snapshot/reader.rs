//! Reads a snapshot: where each page is.

use bytes::Buf;
use uuid::Uuid;

use super::leaf::Leaf;
use super::spaces::Space;
use super::{
    DIRECTORY_PIECE, END, ENTRY, FORM, MAX_LEAF, MAX_PART, PACK, PACKS_PIECE, PART_PIECE, PARTS_IN_ORDER, Parts, Record, ZEROS,
};
use crate::pack::PackId;
use crate::sealed::{HEAD, OVERHEAD};
use crate::stored::{FileError, Malformed, Records, Stored, list_length};
use crate::{PackKey, SnapshotKey};

/// Reads a snapshot. In memory are its parts, its packs, and eighteen bytes for each leaf of 512 pages; all of it is in the file.
pub struct SnapshotReader<S> {
    records: Records<S>,
    parts: Parts,
    spaces: Vec<Space>,
    packs: Vec<(PackId, PackKey, u32)>,
    directory: Vec<Entry>,
}

#[derive(Clone, Copy)]
struct Entry {
    place: (u16, u32),
    number: u32,
    at: u64,
}

impl<S> std::fmt::Debug for SnapshotReader<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SnapshotReader").field("spaces", &self.spaces).field("packs", &self.packs.len()).finish_non_exhaustive()
    }
}

impl<S: Stored> SnapshotReader<S> {
    /// Opens a snapshot: everything but the leaves is read and right, and the file is as long as its end says.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn open(file: S, key: &SnapshotKey) -> Result<Self, FileError> {
        let records = Records::open(file, &FORM, key.expose())?;
        let end: [u8; END] = records.end(Record::End)?;
        let mut end = &end[..];
        let before = end.get_u64();
        let lengths = PARTS_IN_ORDER.map(|_| end.get_u32());
        let (packs, leaves) = (end.get_u32(), end.get_u32());
        let lists = lengths.iter().map(|length| list_length(u64::from(*length), PART_PIECE));
        let lists = lists.chain([
            list_length(u64::from(packs) * PACK as u64, PACKS_PIECE),
            list_length(u64::from(leaves) * ENTRY as u64, DIRECTORY_PIECE),
        ]);
        let length = before.saturating_add(lists.sum()).saturating_add((END + OVERHEAD) as u64);
        let long = lengths.iter().any(|length| *length as usize > MAX_PART);
        if length != records.length() || before < HEAD as u64 || long || packs > u32::from(ZEROS) {
            return Err(Malformed::Count.into());
        }
        let mut at = before;
        let mut parts = Vec::new();
        for (kind, length) in PARTS_IN_ORDER.iter().zip(lengths) {
            let (part, end) = records.list(*kind, at, u64::from(length), PART_PIECE)?;
            parts.push(part);
            at = end;
        }
        let mut parts = parts.into_iter();
        let mut part = || parts.next().unwrap_or_default();
        let (about, preamble, devices, spaces) = (part(), part(), part(), part());
        let spaces = Space::decode_all(&spaces)?;
        let (listed, at) = records.list(Record::Packs, at, u64::from(packs) * PACK as u64, PACKS_PIECE)?;
        let (listed, _) = listed.as_chunks::<PACK>();
        let packs = listed.iter().map(|entry| pack(&entry[..])).collect();
        let (directory, _) = records.list(Record::Directory, at, u64::from(leaves) * ENTRY as u64, DIRECTORY_PIECE)?;
        let (directory, _) = directory.as_chunks::<ENTRY>();
        let directory: Vec<_> = directory.iter().map(|entry| self::entry(&entry[..])).collect();
        let is_within = |entry: &Entry| {
            let space = spaces.get(usize::from(entry.place.0));
            space.is_some_and(|space| entry.place.1 < space.pages.div_ceil(Leaf::PAGES)) && entry.at < before
        };
        let ascends = directory.windows(2).all(|pair| matches!(pair, [one, two] if one.place < two.place));
        if !ascends || !directory.iter().all(is_within) {
            return Err(Malformed::Leaf.into());
        }
        Ok(Self { records, parts: Parts { about, preamble, devices }, spaces, packs, directory })
    }

    /// What it says beside its pages.
    #[must_use]
    pub const fn parts(&self) -> &Parts {
        &self.parts
    }

    /// What it has pages of.
    #[must_use]
    pub fn spaces(&self) -> &[Space] {
        &self.spaces
    }

    /// The packs that it refers to, with their keys and how many pages they have.
    #[must_use]
    pub fn packs(&self) -> &[(PackId, PackKey, u32)] {
        &self.packs
    }

    /// Which 512 pages of a space hold anything, ascending: the first page of each.
    pub fn leaves(&self, space: u16) -> impl Iterator<Item = u32> {
        let of_space = self.directory.iter().filter(move |entry| entry.place.0 == space);
        of_space.map(|entry| entry.place.1 * Leaf::PAGES)
    }

    /// The leaf in which a page of a space is.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn leaf(&self, space: u16, page: u32) -> Result<Leaf, FileError> {
        let place = (space, page / Leaf::PAGES);
        let Ok(found) = self.directory.binary_search_by_key(&place, |entry| entry.place) else { return Ok(Leaf::zeros()) };
        let entry = self.directory[found];
        let mut room = [0; MAX_LEAF + OVERHEAD];
        let content = self.records.record(Record::Leaf, u64::from(entry.number), entry.at, MAX_LEAF, &mut room)?;
        let within = self.spaces.get(usize::from(space)).map_or(0, |space| space.pages - place.1 * Leaf::PAGES);
        let has = |pack| self.packs.get(usize::from(pack)).map_or(0, |(_, _, pages)| *pages);
        Ok(Leaf::decode(content, within, has)?)
    }
}

/// The entry of a pack; there are enough bytes.
fn pack(mut entry: &[u8]) -> (PackId, PackKey, u32) {
    let (mut id, mut key) = ([0; 16], [0; 32]);
    entry.copy_to_slice(&mut id);
    entry.copy_to_slice(&mut key);
    (PackId::new(Uuid::from_bytes(id)), PackKey::new(key), entry.get_u32())
}

/// The entry of a leaf; there are enough bytes.
fn entry(mut entry: &[u8]) -> Entry {
    Entry { place: (entry.get_u16(), entry.get_u32()), number: entry.get_u32(), at: entry.get_u64() }
}
