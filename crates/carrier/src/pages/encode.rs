//! The source's half: decides how each page is sent, and remembers what the destination holds then.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::batch::{Entry, Writer};
use super::digest::{CHECK, ZERO};
use super::images::{COMMON, Images};
use super::rest::{PageSet, Rest};
use super::signature::Signatures;
use super::wanted::{Pieces, Wanted};
use super::watched::Watched;
use super::{Digest, Digester, PAGE_SIZE, PIECE, PIECES, Page};

/// A page of a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Number of the block.
    pub block: u16,
    /// Number of the page in it.
    pub page: u32,
}

/// How much memory an encoder may take beyond 21 bytes for each page, some 40 for each page of other VMs, and 4 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncoderLimits {
    /// Bytes for what patches are made from, 520 for each page.
    pub signatures: u64,
    /// Bytes for finding equal pages, about 40 for each content.
    pub contents: u64,
}

impl Default for EncoderLimits {
    fn default() -> Self {
        Self { signatures: 256 << 20, contents: 128 << 20 }
    }
}

/// Bytes that an entry of the map of contents takes, with the map's own. A map by hashes would be quicker, until a peer chooses digests
/// that all fall together.
const CONTENT_SIZE: u64 = 40;
/// From so many pieces on all of the page is sent: it may compress, and needs no check.
const MOST_PIECES: u32 = 48;
/// How many pages that were sent before give a cost.
const COST_SPAN: u64 = 1024;

/// How pages were sent so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Encoding {
    /// Not at all: the destination holds that very content.
    pub same: u64,
    /// As zeros.
    pub zero: u64,
    /// As a copy of another page.
    pub copy: u64,
    /// As a copy of a page of an image.
    pub image: u64,
    /// As a copy of a page that another VM has, too.
    pub common: u64,
    /// As the pieces that differ.
    pub patch: u64,
    /// As a whole.
    pub data: u64,
}

/// What pages cost that are sent again, counted over the last some thousand of them.
#[derive(Clone, Copy, Debug, Default)]
struct Cost {
    pages: u64,
    bytes: u64,
    last: Option<u64>,
}

impl Cost {
    fn add(&mut self, pages: u64, bytes: u64) {
        self.pages += pages;
        self.bytes += bytes;
        if self.pages >= COST_SPAN {
            self.last = Some(self.bytes / self.pages);
            (self.pages, self.bytes) = (0, 0);
        }
    }
}

/// Encodes the pages of one session.
pub struct Encoder {
    digester: Digester,
    /// First number of each block's pages, and their count.
    blocks: Vec<(u32, u32)>,
    /// What each page holds at the destination, once it has dealt with all batches.
    held: Vec<Digest>,
    /// The page was sent in this session.
    sent: Vec<u64>,
    /// Those that were sent more than once.
    watched: Watched,
    /// A page that holds the content.
    contents: BTreeMap<Digest, u32>,
    most_contents: usize,
    images: Option<Box<dyn Images>>,
    /// Pages of other VMs that the destination holds.
    common: BTreeMap<Digest, u32>,
    signatures: Signatures,
    wanted: Wanted,
    asks: bool,
    /// Pages that the destination does not hold as they are, and that are not sent for now; and those of which it was told.
    left: PageSet,
    gone: PageSet,
    batch: Writer,
    shares: Shares,
    raw: u64,
    cost: Cost,
    encoding: Encoding,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").field("encoding", &self.encoding).finish_non_exhaustive()
    }
}

/// A batch that is to be sealed and sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Its entries, without compression.
    pub(super) body: Bytes,
    /// Bytes of guest memory that it writes, or that went by with it because the destination has them.
    pub raw: u64,
    shares: Shares,
}

/// Of a batch without compression: how many pages are sent again, their bytes, and all bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Shares {
    pages_again: u64,
    again: u64,
    all: u64,
}

impl Batch {
    /// Of pages that are not sent again.
    pub(super) fn after(body: Bytes, raw: u64) -> Self {
        Self { body, raw, shares: Shares::default() }
    }
}

impl Encoder {
    /// For a destination that places `blocks`, whose lengths in pages are given, all of them zero until [`Encoder::on_held`] says otherwise.
    /// A block that anybody else writes to has the length 0 here, whatever the destination says of it: a page that is taken for a copy of one
    /// of its pages would not be.
    #[must_use]
    pub fn new(digester: Digester, blocks: &[u32], limits: EncoderLimits) -> Self {
        let mut total = 0_u32;
        let left = PageSet::new(blocks);
        let blocks: Vec<(u32, u32)> = blocks
            .iter()
            .map(|pages| {
                let first = total;
                total = total.saturating_add(*pages);
                (first, *pages)
            })
            .collect();
        let pages = total as usize;
        let signatures = usize::try_from(limits.signatures / Signatures::SIZE).unwrap_or(usize::MAX).min(pages);
        Self {
            digester,
            blocks,
            held: vec![ZERO; pages],
            sent: vec![0; pages.div_ceil(64)],
            watched: Watched::new(left.blocks().into(), pages),
            contents: BTreeMap::new(),
            most_contents: usize::try_from(limits.contents / CONTENT_SIZE).unwrap_or(usize::MAX),
            images: None,
            common: BTreeMap::new(),
            signatures: Signatures::new(pages, signatures),
            wanted: Wanted::new(pages),
            asks: false,
            gone: left.clone(),
            left,
            batch: Writer::default(),
            shares: Shares::default(),
            raw: 0,
            cost: Cost::default(),
            encoding: Encoding::default(),
        }
    }

    /// Looks for what would have to be sent as a whole in these images, too, while pages may wait: the destination may have to read its disk.
    pub fn set_images(&mut self, images: Box<dyn Images>) {
        self.images = Some(images);
    }

    /// The destination holds these pages of other VMs: whatever has such a content is a copy of one.
    pub fn set_common(&mut self, digests: impl IntoIterator<Item = Digest>) {
        self.common = digests.into_iter().zip(0..).filter(|(digest, _)| *digest != ZERO).collect();
    }

    /// How pages were sent so far.
    #[must_use]
    pub const fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// Bytes on the wire for a page that is sent again, lately; `None` before enough of them were.
    #[must_use]
    pub const fn cost_again(&self) -> Option<u64> {
        self.cost.last
    }

    /// How much memory of what it may take it takes.
    #[must_use]
    pub fn used(&self) -> EncoderLimits {
        let signatures = self.signatures.count() as u64 * Signatures::SIZE;
        EncoderLimits { signatures, contents: self.contents.len() as u64 * CONTENT_SIZE }
    }

    /// The destination holds this there. Whether there is such a page.
    pub fn on_held(&mut self, place: Place, digest: Digest) -> bool {
        let Some(number) = self.number(place) else { return false };
        self.set_held(number, digest);
        self.wanted.set_told(number, digest != ZERO);
        true
    }

    /// Whether pages may wait for an answer of the destination, or for its disk. They do not at first.
    pub const fn set_asks(&mut self, asks: bool) {
        self.asks = asks;
    }

    /// How many pages wait until the destination has told the pieces of its version.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.wanted.len()
    }

    /// How many of them were not asked for yet.
    #[must_use]
    pub fn unasked(&self) -> usize {
        self.wanted.unasked()
    }

    /// A page whose pieces the destination is to be asked for now, before anything else is sent to it.
    pub fn ask(&mut self) -> Option<Place> {
        let number = self.wanted.ask()?;
        self.place(number)
    }

    /// The destination has told the pieces of a page that it was asked for; there must be room. A page that does not wait any more is left alone.
    pub fn on_pieces(&mut self, place: Place, pieces: &Pieces) {
        let Some(number) = self.number(place) else { return };
        let Some(content) = self.wanted.take(number) else { return };
        let now = self.digester.pieces(&content);
        let mask = mask(pieces.iter().zip(&now).map(|(before, now)| *before != *now as u32));
        self.wanted.on_answer(mask.count_ones() <= MOST_PIECES);
        self.put_waiting(place, number, &content, Some(mask));
    }

    /// Encodes a page that waits, without its answer; there must be room. Which it was.
    pub fn wait_no_longer(&mut self) -> Option<Place> {
        let number = self.wanted.first()?;
        let (content, place) = (self.wanted.take(number)?, self.place(number)?);
        self.put_waiting(place, number, &content, None);
        Some(place)
    }

    /// Whether this page waits.
    #[must_use]
    pub fn is_waiting(&self, place: Place) -> bool {
        self.number(place).is_some_and(|number| self.wanted.waits(number))
    }

    fn put_waiting(&mut self, place: Place, number: u32, content: &Page, mask: Option<u64>) {
        let digest = self.digester.page(content);
        let bytes = self.put_content(place, number, content, &digest, mask);
        self.set_held(number, digest);
        self.shares.all += bytes as u64;
    }

    /// Encodes a page that QEMU names, `None` for zeros. Whether there is such a page.
    ///
    /// There must be room: [`Encoder::is_full`] is asked before, and answered by [`Encoder::take`].
    #[must_use = "a page that is none was not sent"]
    pub fn encode(&mut self, place: Place, content: Option<&Page>) -> bool {
        let Some(number) = self.number(place) else { return false };
        let again = self.mark_sent(place.block, number);
        self.encode_number(place, number, content, again);
        true
    }

    /// A page that QEMU names, or that was looked at, and that is not sent now but after the switch, unless the destination holds that very
    /// content. Whether there is such a page.
    #[must_use = "a page that is none is not left"]
    pub fn leave(&mut self, place: Place, content: Option<&Page>, named: bool) -> bool {
        let Some(number) = self.number(place) else { return false };
        if self.gone.contains(place) {
            return true;
        }
        if named {
            self.mark_sent(place.block, number);
        }
        // What waited is out of date.
        drop(self.wanted.take(number));
        let digest = content.map_or(ZERO, |content| self.digester.page(content));
        if self.held.get(number as usize) == Some(&digest) {
            self.encoding.same += 1;
            self.left.remove(place);
        } else {
            self.left.insert(place);
        }
        true
    }

    /// Pages that were left since the last [`Encoder::take_left`].
    #[must_use]
    pub const fn left(&self) -> &PageSet {
        &self.left
    }

    /// How many pages come after the switch, taken or not.
    #[must_use]
    pub const fn left_in_all(&self) -> u64 {
        self.left.len() + self.gone.len()
    }

    /// Those pages: from here on the destination holds nothing there, and they are sent after the switch, whatever is in them.
    pub fn take_left(&mut self) -> PageSet {
        let none = self.left.emptied();
        let taken = std::mem::replace(&mut self.left, none);
        for block in 0..taken.blocks() {
            for page in taken.runs(block).into_iter().flat_map(|(first, pages)| first..first + pages) {
                let place = Place { block, page };
                self.gone.insert(place);
                if let Some(number) = self.number(place) {
                    self.set_held(number, ZERO);
                    self.signatures.forget(number);
                    self.watched.forget(number);
                }
            }
        }
        taken
    }

    /// What was left is sent from here on, and what else is left now; one page is in any case, if there is one at all. Also answers those of them that
    /// were not taken before.
    #[must_use]
    pub fn into_rest(mut self) -> (Rest, PageSet) {
        if self.gone.is_empty()
            && let Some(first) = self.place(0)
        {
            self.left.insert(first);
        }
        let last = self.take_left();
        (Rest::new(self.gone, self.encoding), last)
    }

    /// Encodes a page that was looked at without being named. Whether there is such a page; there must be room.
    #[must_use = "a page that is none was not sent"]
    pub fn encode_unnamed(&mut self, place: Place, content: Option<&Page>) -> bool {
        let Some(number) = self.number(place) else { return false };
        self.encode_number(place, number, content, true);
        true
    }

    fn encode_number(&mut self, place: Place, number: u32, content: Option<&Page>, again: bool) {
        self.raw += PAGE_SIZE as u64;
        let digest = content.map_or(ZERO, |content| self.digester.page(content));
        let before = self.held.get(number as usize).copied().unwrap_or(ZERO);
        // What waited is out of date.
        drop(self.wanted.take(number));
        let bytes = match content {
            _ if digest == before => {
                self.encoding.same += 1;
                0
            }
            Some(content) if digest != ZERO && self.asks && self.wanted.is_worth(number) && !self.is_known(&digest) => {
                self.wanted.put(number, content);
                return;
            }
            Some(content) if digest != ZERO => {
                let bytes = self.put_content(place, number, content, &digest, None);
                self.set_held(number, digest);
                bytes
            }
            _ => {
                self.encoding.zero += 1;
                self.signatures.forget(number);
                self.set_held(number, ZERO);
                self.batch.put(place.block, place.page, &Entry::Zero)
            }
        };
        self.shares.all += bytes as u64;
        if again {
            self.shares.again += bytes as u64;
            self.shares.pages_again += 1;
        }
    }

    /// A page that holds this content at the destination.
    fn same(&self, digest: &Digest) -> Option<Place> {
        let same = self.contents.get(digest).copied().filter(|same| self.held.get(*same as usize) == Some(digest));
        same.and_then(|same| self.place(same))
    }

    /// Whether any page that the destination holds is the same.
    fn is_known(&self, digest: &Digest) -> bool {
        self.common.contains_key(digest) || self.same(digest).is_some()
    }

    /// `told` are the pieces that differ, if the destination has told its own.
    fn put_content(&mut self, place: Place, number: u32, content: &Page, digest: &Digest, told: Option<u64>) -> usize {
        let check = *digest.first_chunk::<CHECK>().expect("a digest is longer than a check");
        let pieces = self.digester.pieces(content);
        let same = self.same(digest);
        let patched = told.or_else(|| self.signatures.get(number).map(|before| differing(before, &pieces)));
        self.signatures.set(number, pieces);
        if let Some(from) = same {
            self.encoding.copy += 1;
            let entry = Entry::Copy { block: from.block, page: from.page, check };
            return self.batch.put(place.block, place.page, &entry);
        }
        if let Some(page) = self.common.get(digest).copied() {
            self.encoding.common += 1;
            let check = self.digester.proof(content);
            return self.batch.put(place.block, place.page, &Entry::Copy { block: COMMON, page, check });
        }
        if let Some(mask) = patched.filter(|mask| mask.count_ones() <= MOST_PIECES) {
            self.encoding.patch += 1;
            let mut buffer = [0; PAGE_SIZE];
            let pieces = chosen(content, mask, &mut buffer);
            return self.batch.put(place.block, place.page, &Entry::Patch { mask, pieces, check });
        }
        if let Some(from) = self.images.as_mut().filter(|_| self.asks).and_then(|images| images.find(content)) {
            self.encoding.image += 1;
            return self.batch.put(place.block, place.page, &Entry::Copy { block: from.block, page: from.page, check });
        }
        self.encoding.data += 1;
        self.batch.put(place.block, place.page, &Entry::Data(content))
    }

    /// Whether the batch must be taken before the next page.
    #[must_use]
    pub fn is_full(&self) -> bool {
        !self.batch.has_room()
    }

    /// Whether there is no batch to be taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.batch.is_empty()
    }

    /// The batch of all pages since the last call, unless none of them had to be sent.
    pub fn take(&mut self) -> Option<Batch> {
        let shares = std::mem::take(&mut self.shares);
        if self.batch.is_empty() {
            self.cost.add(shares.pages_again, 0);
            return None;
        }
        Some(Batch { body: self.batch.finish(), raw: std::mem::take(&mut self.raw), shares })
    }

    /// A batch is sent as a payload of this length: what pages cost is learnt from it.
    pub fn on_sealed(&mut self, batch: &Batch, payload: usize) {
        let Shares { pages_again, again, all } = batch.shares;
        self.cost.add(pages_again, (payload as u64).saturating_mul(again) / all.max(1));
    }

    fn number(&self, place: Place) -> Option<u32> {
        let (first, pages) = *self.blocks.get(usize::from(place.block))?;
        (place.page < pages).then(|| first + place.page)
    }

    fn place(&self, number: u32) -> Option<Place> {
        let after = self.blocks.partition_point(|(first, _)| *first <= number);
        // Blocks without pages begin where the next begins, and have none.
        let block = after.checked_sub(1)?;
        let (first, pages) = *self.blocks.get(block)?;
        let page = number - first;
        (page < pages).then_some(Place { block: u16::try_from(block).ok()?, page })
    }

    fn set_held(&mut self, number: u32, digest: Digest) {
        let Some(held) = self.held.get_mut(number as usize) else { return };
        self.wanted.set_told(number, false);
        let before = std::mem::replace(held, digest);
        if before != ZERO && self.contents.get(&before) == Some(&number) {
            self.contents.remove(&before);
        }
        if digest != ZERO && (self.contents.len() < self.most_contents || self.contents.contains_key(&digest)) {
            self.contents.insert(digest, number);
        }
    }

    /// Whether it was sent before.
    fn mark_sent(&mut self, block: u16, number: u32) -> bool {
        let bit = 1 << (number % 64);
        let Some(sent) = self.sent.get_mut(number as usize / 64) else { return false };
        let before = *sent & bit != 0;
        *sent |= bit;
        self.watched.on_named(block, number, before);
        before
    }

    /// From here on the guest stands still: what comes is as it stays.
    pub fn on_stopped(&mut self) {
        self.watched.on_stopped();
    }

    /// How many pages came more than once, the last time while the guest ran, and would have to be compared with what it has if it stood still now; at least.
    #[must_use]
    pub const fn written_to(&self) -> usize {
        self.watched.len()
    }

    /// Takes one of those pages that are worth comparing by now, in turn; once the guest stands still all of them are.
    pub fn take_written_to(&mut self) -> Option<Place> {
        let number = self.watched.take()?;
        self.place(number)
    }
}

fn differing(before: &[u64; PIECES], now: &[u64; PIECES]) -> u64 {
    mask(before.iter().zip(now).map(|(before, now)| before != now))
}

fn mask(differs: impl Iterator<Item = bool>) -> u64 {
    differs.enumerate().fold(0, |mask, (index, differs)| mask | u64::from(differs) << index)
}

fn chosen<'a>(page: &Page, mask: u64, buffer: &'a mut Page) -> &'a [u8] {
    let (pieces, _) = page.as_chunks::<PIECE>();
    let (targets, _) = buffer.as_chunks_mut::<PIECE>();
    let wanted = pieces.iter().enumerate().filter(|(index, _)| mask >> index & 1 == 1);
    let mut count = 0;
    for ((_, piece), target) in wanted.zip(targets) {
        *target = *piece;
        count += 1;
    }
    buffer.get(..count * PIECE).unwrap_or_default()
}
