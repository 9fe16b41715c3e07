//! Writes a snapshot and the pack with what no other pack of the team has.

use std::collections::{BTreeMap, HashMap};
use std::io;

use bytes::BufMut;
use godwit_model::Bytes;

use super::leaf::Leaf;
use super::reader::SnapshotReader;
use super::spaces::{InvalidSpaces, Space, SpaceKind};
use super::{DIRECTORY_PIECE, END, FORM, Located, MAX_PART, PACKS_PIECE, PART_PIECE, PARTS_IN_ORDER, PackId, Record, ZEROS};
use crate::pack::{PackReader, PackWriter, Page, PageDigest, is_zero};
use crate::records::RecordWriter;
use crate::sealed::Head;
use crate::stored::{FileError, Stored};
use crate::{PackKey, Sink, SnapshotKey, TeamKey};

/// What is in the team's packs already, by digest. In memory it takes some forty bytes for each page.
#[derive(Debug)]
pub struct Known {
    packs: Vec<(PackId, PackKey, u32)>,
    pages: HashMap<u128, Located>,
    most: usize,
}

impl Known {
    /// Nothing; at most `most` pages are known.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self { packs: vec![], pages: HashMap::new(), most }
    }

    /// Adds the pages of a pack; `false` if there are too many, and none is added. The packs that are likeliest to have what comes are added first.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn add<S: Stored>(&mut self, id: PackId, key: &PackKey, pack: &PackReader<S>) -> Result<bool, FileError> {
        let room = self.most.saturating_sub(self.pages.len());
        let Some(number) = u16::try_from(self.packs.len()).ok().filter(|number| *number < ZEROS - 1) else { return Ok(false) };
        if pack.pages() as usize > room {
            return Ok(false);
        }
        for (page, digest) in (0..).zip(pack.digests()?) {
            self.pages.entry(digest.short()).or_insert(Located { pack: number, page });
        }
        self.packs.push((id, key.clone(), pack.pages()));
        Ok(true)
    }

    /// Makes a snapshot one from which pages are taken over: its packs are known from here on, also those whose pages are not. None if there are too many, or one that is
    /// not the one that is known by its id.
    pub fn earlier<S: Stored>(&mut self, snapshot: SnapshotReader<S>) -> Option<Earlier<S>> {
        let mut packs = Vec::with_capacity(snapshot.packs().len());
        for (id, key, pages) in snapshot.packs() {
            let number = match self.packs.iter().position(|(known, ..)| known == id) {
                Some(number) => {
                    let (_, known, has) = &self.packs[number];
                    (known.expose() == key.expose() && has >= pages).then_some(number)?
                }
                None if self.packs.len() >= usize::from(ZEROS - 1) => return None,
                None => {
                    self.packs.push((*id, key.clone(), *pages));
                    self.packs.len() - 1
                }
            };
            packs.push(u16::try_from(number).ok().filter(|number| *number < ZEROS - 1)?);
        }
        Some(Earlier { snapshot, packs })
    }
}

/// An earlier snapshot, of which a new one takes over pages as they are. Only where those are is taken over: afterwards neither needs the other.
pub struct Earlier<S> {
    snapshot: SnapshotReader<S>,
    /// Of each pack of its list, the number by which it is known.
    packs: Vec<u16>,
}

impl<S> std::fmt::Debug for Earlier<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Earlier").field("snapshot", &self.snapshot).finish_non_exhaustive()
    }
}

impl<S: Stored> Earlier<S> {
    /// The disk of this name, if it has as many pages: the number of its space.
    #[must_use]
    pub fn disk(&self, name: &str, pages: u32) -> Option<u16> {
        let is_it = |space: &Space| space.kind == SpaceKind::Disk && space.name == name && space.pages == pages;
        self.snapshot.spaces().iter().position(is_it).and_then(|space| u16::try_from(space).ok())
    }

    /// Where the pages of a space are that are not zeros, of those in a leaf: for [`SnapshotWriter::take_over`].
    ///
    /// # Errors
    /// [`FileError`]
    pub fn leaf(&self, space: u16, page: u32) -> Result<Leaf, FileError> {
        self.snapshot.leaf(space, page)
    }
}

/// What became of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// It holds zeros.
    Zero,
    /// A pack has it.
    Known,
    /// It is new.
    New,
}

/// What a snapshot says beside its pages, each at most 64 MiB. What is in them is the caller's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// Of which VM, when, its spec.
    pub about: Vec<u8>,
    /// QEMU's stream before the first page; empty without RAM.
    pub preamble: Vec<u8>,
    /// The state of the devices; empty without RAM.
    pub devices: Vec<u8>,
}

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Pages that hold zeros.
    pub zero: u64,
    /// Pages that a pack had, this one among them.
    pub known: u64,
    /// Pages that are new.
    pub new: u64,
    /// Length of the snapshot's file.
    pub snapshot: Bytes,
    /// Length of the pack's.
    pub pack: Bytes,
}

/// Writes a snapshot. What was not finished is torn, and never taken for whole.
pub struct SnapshotWriter<S: Sink, P: Sink> {
    records: RecordWriter<S>,
    pack: PackWriter<P>,
    own: (PackId, PackKey),
    team: TeamKey,
    spaces: Vec<Space>,
    /// Of each disk, the leaf that is being filled.
    turns: Vec<u32>,
    known: Known,
    /// Of each known pack, and then of the own one, its place in this snapshot's list.
    places: Vec<Option<u16>>,
    listed: Vec<usize>,
    leaves: BTreeMap<(u16, u32), Leaf>,
    /// Space, leaf, number, place.
    directory: Vec<(u16, u32, u32, u64)>,
    totals: Totals,
}

impl<S: Sink, P: Sink> std::fmt::Debug for SnapshotWriter<S, P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SnapshotWriter").field("totals", &self.totals).finish_non_exhaustive()
    }
}

/// The keys with which a snapshot is written.
#[derive(Debug)]
pub struct Keys {
    /// The snapshot's own.
    pub snapshot: SnapshotKey,
    /// Of the team's digests.
    pub team: TeamKey,
    /// Of the new pack.
    pub pack: PackKey,
}

fn invalid(error: InvalidSpaces) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

impl<S: Sink, P: Sink> SnapshotWriter<S, P> {
    /// Begins a snapshot of these spaces in two empty files, which may not become longer than `limit` each.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for spaces that are none ([`InvalidSpaces`]); else the files'.
    pub fn begin(
        (snapshot, pack): (S, P),
        own: PackId,
        keys: &Keys,
        spaces: Vec<Space>,
        known: Known,
        limit: Bytes,
    ) -> io::Result<Self> {
        let pack = PackWriter::begin(pack, &keys.pack, limit)?;
        Self::begin_with((snapshot, Head::draw(&FORM)?), pack, own, keys, spaces, known, limit)
    }

    /// The caller answers for the salt in the head being fresh.
    pub(super) fn begin_with(
        (file, head): (S, Head),
        pack: PackWriter<P>,
        own: PackId,
        keys: &Keys,
        spaces: Vec<Space>,
        known: Known,
        limit: Bytes,
    ) -> io::Result<Self> {
        Space::encode_all(&spaces).map_err(invalid)?;
        let places = vec![None; known.packs.len() + 1];
        Ok(Self {
            records: RecordWriter::begin(file, &FORM, keys.snapshot.expose(), head, limit)?,
            pack,
            own: (own, keys.pack.clone()),
            team: keys.team.clone(),
            turns: vec![0; spaces.len()],
            spaces,
            known,
            places,
            listed: vec![],
            leaves: BTreeMap::new(),
            directory: vec![],
            totals: Totals::default(),
        })
    }

    /// Takes a page of the space at this place of the list. Those of RAM come in any order; those of a disk ascend, so that of a disk only one leaf is in memory.
    /// Each comes once; what does not come is zero.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for a page that is in no space, or behind its turn: it is not taken. After any other error the snapshot cannot be finished.
    pub fn page(&mut self, space: u16, page: u32, content: &Page) -> io::Result<Kept> {
        self.come_to(space, page)?;
        if is_zero(content) {
            self.totals.zero += 1;
            return Ok(Kept::Zero);
        }
        let digest = PageDigest::of(&self.team, content);
        let (at, kept) = match self.known.pages.get(&digest.short()) {
            Some(at) => (*at, Kept::Known),
            None => {
                let pack = u16::try_from(self.known.packs.len()).expect("there are fewer than u16 can say");
                let at = Located { pack, page: self.pack.put(content, &digest)? };
                if self.known.pages.len() < self.known.most {
                    self.known.pages.insert(digest.short(), at);
                }
                (at, Kept::New)
            }
        };
        match kept {
            Kept::New => self.totals.new += 1,
            _ => self.totals.known += 1,
        }
        self.put(space, page, at);
        Ok(kept)
    }

    /// Takes over a page that an earlier snapshot has at `at`, whatever it holds. Pages come as they come to [`Self::page`]. `earlier` was made with what this writer knows.
    ///
    /// # Errors
    /// As of [`Self::page`]; and [`io::ErrorKind::InvalidInput`] for a place that is none.
    pub fn take_over<B: Stored>(&mut self, space: u16, page: u32, earlier: &Earlier<B>, at: Located) -> io::Result<()> {
        let pack = earlier.packs.get(usize::from(at.pack)).copied();
        let has = |pack: &u16| self.known.packs.get(usize::from(*pack)).is_some_and(|(_, _, pages)| at.page < *pages);
        let Some(pack) = pack.filter(has) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a page that is taken over is in no known pack"));
        };
        self.come_to(space, page)?;
        self.totals.known += 1;
        self.put(space, page, Located { pack, ..at });
        Ok(())
    }

    /// It is the turn of this page; of a disk, the leaves before it are written.
    fn come_to(&mut self, space: u16, page: u32) -> io::Result<()> {
        let Some(of) = self.spaces.get(usize::from(space)).filter(|of| page < of.pages) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a page of a snapshot is in no space"));
        };
        let leaf = page / Leaf::PAGES;
        if of.kind == SpaceKind::Disk {
            let turn = &mut self.turns[usize::from(space)];
            if leaf < *turn {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "a page of a disk came behind its turn"));
            }
            *turn = leaf;
            self.write_leaves((space, 0), (space, leaf))?;
        }
        Ok(())
    }

    /// Where a page is: `pack` is the number of a known one, or the own.
    fn put(&mut self, space: u16, page: u32, at: Located) {
        let at = Located { pack: self.listed(at.pack), ..at };
        self.leaves.entry((space, page / Leaf::PAGES)).or_insert_with(Leaf::zeros).set(page % Leaf::PAGES, at);
    }

    /// What was written so far.
    #[must_use]
    pub const fn totals(&self) -> Totals {
        self.totals
    }

    /// Writes what is left, and returns when all is on stable storage: the two files, the pack's only if it has a page.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for a part that is too long; else the files', or that of an earlier page: the snapshot is torn.
    pub fn finish(mut self, parts: &Parts) -> io::Result<(S, Option<P>, Totals)> {
        if [&parts.about, &parts.preamble, &parts.devices].iter().any(|part| part.len() > MAX_PART) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a part of a snapshot is too long"));
        }
        self.write_leaves((0, 0), (u16::MAX, u32::MAX))?;
        let own = self.pack.pages();
        // The pack first: a snapshot that is whole refers to nothing that is not.
        let (pack, length) = self.pack.finish()?;
        let before = self.records.written();
        let spaces = Space::encode_all(&self.spaces).map_err(invalid)?;
        let mut end = Vec::with_capacity(END);
        end.put_u64(before);
        for (kind, part) in PARTS_IN_ORDER.iter().zip([&parts.about, &parts.preamble, &parts.devices, &spaces]) {
            self.records.list(*kind, part, PART_PIECE)?;
            end.put_u32(u32::try_from(part.len()).expect("a part is below 64 MiB"));
        }
        let mut packs = Vec::new();
        for number in &self.listed {
            let (id, key, pages) =
                self.known.packs.get(*number).map_or((&self.own.0, &self.own.1, own), |(id, key, pages)| (id, key, *pages));
            packs.put_slice(id.uuid().as_bytes());
            packs.put_slice(key.expose());
            packs.put_u32(pages);
        }
        self.records.list(Record::Packs, &packs, PACKS_PIECE)?;
        self.directory.sort_unstable();
        let mut directory = Vec::new();
        for (space, leaf, number, at) in &self.directory {
            directory.put_u16(*space);
            directory.put_u32(*leaf);
            directory.put_u32(*number);
            directory.put_u64(*at);
        }
        self.records.list(Record::Directory, &directory, DIRECTORY_PIECE)?;
        end.put_u32(u32::try_from(self.listed.len()).expect("there are fewer than u16 can say"));
        end.put_u32(u32::try_from(self.directory.len()).map_err(|_| io::ErrorKind::FileTooLarge)?);
        self.records.record(Record::End, 0, &end)?;
        let kept = (own > 0).then_some(pack);
        let pack = if own > 0 { length } else { Bytes(0) };
        let totals = Totals { snapshot: Bytes(self.records.written()), pack, ..self.totals };
        Ok((self.records.finish()?, kept, totals))
    }

    /// The place of a known pack, or the own one, in this snapshot's list; it gets one when it is first referred to.
    fn listed(&mut self, number: u16) -> u16 {
        let place = &mut self.places[usize::from(number)];
        *place.get_or_insert_with(|| {
            self.listed.push(usize::from(number));
            u16::try_from(self.listed.len() - 1).expect("there are fewer than u16 can say")
        })
    }

    /// Writes the leaves from one to another, which is not among them.
    fn write_leaves(&mut self, from: (u16, u32), to: (u16, u32)) -> io::Result<()> {
        while let Some(place) = self.leaves.range(from..to).next().map(|(place, _)| *place) {
            let leaf = self.leaves.remove(&place).expect("it was found");
            let number = u32::try_from(self.directory.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
            self.directory.push((place.0, place.1, number, self.records.written()));
            self.records.record(Record::Leaf, u64::from(number), &leaf.encode())?;
        }
        Ok(())
    }
}
