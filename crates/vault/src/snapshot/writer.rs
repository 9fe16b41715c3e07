//! Writes a snapshot and the pack with what no other pack of the team has.

use std::collections::BTreeMap;
use std::io;

use bytes::BufMut;
use godwit_model::Bytes;

use super::known::{Earlier, Known, NONE, Place};
use super::leaf::Leaf;
use super::spaces::{InvalidSpaces, Space, SpaceKind};
use super::{DIRECTORY_PIECE, END, FORM, Located, MAX_PART, PACKS_PIECE, PART_PIECE, PARTS_IN_ORDER, Record};
use crate::pack::{PackId, PackWriter, Page, PageDigest, is_zero};
use crate::records::RecordWriter;
use crate::sealed::Head;
use crate::stored::Stored;
use crate::{PackKey, Sink, SnapshotKey, TeamKey};

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
    /// Of these, those that are kept as differences to what an earlier snapshot had in their place.
    pub differences: u64,
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
        let places = vec![None; usize::from(known.count()) + 1];
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
        self.take::<&[u8]>(space, page, content, None)
    }

    /// Takes a page as [`Self::page`] does; one that is new may be kept as a difference to what page `page` of the space `of` held in an earlier snapshot, or to what that was a
    /// difference to. `earlier` was made with what this writer knows.
    ///
    /// # Errors
    /// As of [`Self::page`].
    pub fn page_since<B: Stored>(
        &mut self,
        space: u16,
        page: u32,
        content: &Page,
        (earlier, of): (&mut Earlier<B>, u16),
    ) -> io::Result<Kept> {
        self.take(space, page, content, Some((earlier, of)))
    }

    fn take<B: Stored>(
        &mut self,
        space: u16,
        page: u32,
        content: &Page,
        mut earlier: Option<(&mut Earlier<B>, u16)>,
    ) -> io::Result<Kept> {
        self.come_to(space, page)?;
        if let Some((earlier, _)) = &mut earlier {
            earlier.came();
        }
        if is_zero(content) {
            self.totals.zero += 1;
            return Ok(Kept::Zero);
        }
        let digest = PageDigest::of(&self.team, content);
        if let Some(place) = self.known.find(digest.number()) {
            self.totals.known += 1;
            self.put(space, page, place);
            return Ok(Kept::Known);
        }
        let base = earlier.and_then(|(earlier, of)| earlier.base(of, page));
        let place = self.put_new(content, &digest, base)?;
        self.totals.new += 1;
        self.known.learn(digest.number(), place);
        self.put(space, page, place);
        Ok(Kept::New)
    }

    /// Writes a new page into the own pack; as a difference, if there is a base and that makes it smaller.
    fn put_new(&mut self, content: &Page, digest: &PageDigest, base: Option<(Place, &Page)>) -> io::Result<Place> {
        let pack = self.known.count();
        if let Some((at, base)) = base
            && let Some((id, ..)) = self.known.pack(usize::from(at.pack))
            && let Some(page) = self.pack.put_difference(content, digest, base, (id, at.page))?
        {
            self.totals.differences += 1;
            return Ok(Place { page, pack, base: at.pack });
        }
        Ok(Place { page: self.pack.put(content, digest)?, pack, base: NONE })
    }

    /// Takes over a page that an earlier snapshot has at `at`, whatever it holds. Pages come as they come to [`Self::page`]. `earlier` was made with what this writer knows.
    ///
    /// # Errors
    /// As of [`Self::page`]; and [`io::ErrorKind::InvalidInput`] for a place that is none.
    pub fn take_over<B: Stored>(&mut self, space: u16, page: u32, earlier: &Earlier<B>, at: Located) -> io::Result<()> {
        let known = |place: &Place| self.known.pack(usize::from(place.pack)).is_some_and(|(.., pages)| at.page < pages);
        let Some(place) = earlier.place(at).filter(known) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a page that is taken over is in no known pack"));
        };
        self.come_to(space, page)?;
        self.totals.known += 1;
        self.put(space, page, place);
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

    /// Where a page is. The pack of a base gets into the list, too: a snapshot names all that it needs.
    fn put(&mut self, space: u16, page: u32, place: Place) {
        let at = Located { pack: self.listed(place.pack), page: place.page };
        if place.base != NONE {
            self.listed(place.base);
        }
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
            let (id, key, pages) = self.known.pack(*number).unwrap_or((self.own.0, &self.own.1, own));
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
