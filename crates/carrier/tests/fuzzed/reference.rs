//! A second reader of batches, written from `docs/spec/carrier.md` alone and as plainly as can be, beside which the applier is held.

use std::ops::Range;

use godwit_carrier::pages::batch::MAX_ENTRIES;
use godwit_carrier::pages::{Applier, ApplyError, Digester, MAX_PAYLOAD, PAGE_SIZE, Page};

use super::memory::{IMAGE, Memory, SHARED, beside, filled, noise};
use super::{BLOCKS, digester};

const MAX_BODY: usize = MAX_PAYLOAD - 5;

/// What became of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Applied { pages: u32 },
    Malformed,
    Page { block: u16 },
    Check { block: u16, page: u32 },
    Image { image: u16 },
}

/// A destination whose memory is known twice.
pub(crate) struct Receiver {
    pub(crate) memory: Memory,
    applier: Applier,
}

impl Receiver {
    pub(crate) fn new(memory: Memory) -> Self {
        let mut applier = Applier::new(digester(), BLOCKS.to_vec()).with_images(vec![IMAGE]);
        applier.set_common(SHARED);
        Self { memory, applier }
    }

    /// Applies a batch, and checks that it did what the reference does.
    pub(crate) fn receive(&mut self, payload: &[u8]) -> Outcome {
        let mut expected = Reference { memory: self.memory.clone(), ..Reference::default() };
        let outcome = match unpacked(payload) {
            Some(mut body) => expected.read(&mut body, &digester(), 0),
            None => Outcome::Malformed,
        };
        self.memory.written = 0;
        let applied = match self.applier.apply(payload, &mut self.memory) {
            Ok(applied) => Outcome::Applied { pages: applied.pages },
            Err(ApplyError::Malformed(_)) => Outcome::Malformed,
            Err(ApplyError::Page { block }) => Outcome::Page { block },
            Err(ApplyError::Check { block, page }) => Outcome::Check { block, page },
            Err(ApplyError::Image { image }) => Outcome::Image { image },
            Err(ApplyError::Memory(error)) => match error {},
        };
        assert_eq!(applied, outcome);
        assert!(self.memory.written <= MAX_ENTRIES, "{} pages of one batch", self.memory.written);
        if let Outcome::Applied { pages } = applied {
            assert_eq!(self.memory.written, pages as usize);
        } else {
            // Of data pages that follow each other right before the entry at fault none was written.
            expected.waiting.clear();
        }
        expected.settle();
        assert!(self.memory.same_as(&expected.memory), "the memory is not what the batch makes it: {outcome:?}");
        applied
    }
}

/// A payload around a body.
pub(crate) fn framed(body: &[u8], compress: bool) -> Vec<u8> {
    let compressed = compress.then(|| zstd::bulk::compress(body, 1).expect("memory"));
    let length = u32::try_from(body.len()).expect("small").to_be_bytes();
    [&[u8::from(compress)], &length[..], compressed.as_deref().unwrap_or(body)].concat()
}

fn unpacked(payload: &[u8]) -> Option<Vec<u8>> {
    let ([how, length @ ..], rest) = payload.split_first_chunk::<5>()?;
    let length = u32::from_be_bytes(*length) as usize;
    let body = match how {
        _ if length > MAX_BODY => return None,
        0 => rest.to_vec(),
        1 => zstd::bulk::decompress(rest, length).ok()?,
        _ => return None,
    };
    (body.len() == length).then_some(body)
}

/// A body of these entries and so many contents.
pub(crate) fn body(entries: &[u8], contents: usize) -> Vec<u8> {
    let length = u32::try_from(entries.len()).expect("small").to_be_bytes();
    let contents = (0..contents).flat_map(|number| match number {
        0 => filled(0),
        1 => noise(1),
        2 => filled(b'y'),
        _ => noise(10 + number as u64),
    });
    length.iter().chain(entries).copied().chain(contents).collect()
}

/// Puts the first `count` checks right that are not.
pub(crate) fn repair(body: &mut [u8], memory: &Memory, digester: &Digester, count: usize) {
    Reference { memory: memory.clone(), ..Reference::default() }.read(body, digester, count);
}

struct Reference {
    /// Without what waits.
    memory: Memory,
    /// Data pages that follow each other, up to the present entry.
    waiting: Vec<(u16, u32, Page)>,
}

impl Default for Reference {
    fn default() -> Self {
        Self { memory: Memory::new(&[]), waiting: Vec::new() }
    }
}

impl Reference {
    fn settle(&mut self) {
        self.waiting.drain(..).for_each(|(block, page, content)| self.memory.set(block, page, content));
    }

    fn read(&mut self, body: &mut [u8], digester: &Digester, mut repairs: usize) -> Outcome {
        let mut cursor = Cursor { at: 4, end: 0, data: 0 };
        let Some(length) = body.first_chunk::<4>().map(|length| u32::from_be_bytes(*length) as usize) else {
            return Outcome::Malformed;
        };
        if length > body.len() - 4 {
            return Outcome::Malformed;
        }
        (cursor.end, cursor.data) = (4 + length, 4 + length);
        let (mut block, mut next, mut entries, mut pages) = (None, None, 0, 0);
        while cursor.at < cursor.end {
            entries += 1;
            if entries > MAX_ENTRIES {
                return Outcome::Malformed;
            }
            let entry = match cursor.entry(body, block, next) {
                None => return Outcome::Malformed,
                Some(Entry::Block(number)) => {
                    (block, next) = (Some(number), None);
                    continue;
                }
                Some(Entry::Page(block, page, content)) => (block, page, content),
            };
            let (number, page, content) = entry;
            next = page.checked_add(1);
            if self.memory.get(number, page).is_none() {
                return Outcome::Page { block: number };
            }
            let follows = self.waiting.last().is_some_and(|(block, last, _)| *block == number && *last + 1 == page);
            if !(follows && matches!(content, Content::Data(_))) {
                self.settle();
            }
            pages += 1;
            let image = matches!(content, Content::Copy(0x8000, ..));
            let common = matches!(content, Content::Copy(0xffff, ..));
            let (content, check) = match content {
                Content::Data(content) => {
                    self.waiting.push((number, page, *body[content].first_chunk().expect("a page")));
                    continue;
                }
                Content::Zero => (filled(0), None),
                Content::Copy(from, of, check) => match self.memory.get(from, of).copied().or_else(|| beside(from, of)) {
                    Some(content) => (content, Some(check)),
                    None => return Outcome::Page { block: from },
                },
                Content::Patch(mask, pieces, check) => {
                    let mut content = *self.memory.get(number, page).expect("it is there");
                    let chosen = (0..64_usize).filter(|bit| mask >> bit & 1 == 1);
                    for (bit, piece) in chosen.zip(body[pieces].chunks(64)) {
                        content[bit * 64..][..64].copy_from_slice(piece);
                    }
                    (content, Some(check))
                }
            };
            if let Some(check) = check {
                let right = if common {
                    digester.proof(&content)
                } else {
                    digester.page(&content)[..8].try_into().expect("a digest is longer")
                };
                if body[check.clone()] != right {
                    if repairs == 0 {
                        return if image { Outcome::Image { image: 0 } } else { Outcome::Check { block: number, page } };
                    }
                    repairs -= 1;
                    body[check].copy_from_slice(&right);
                }
            }
            self.memory.set(number, page, content);
        }
        if cursor.data == body.len() { Outcome::Applied { pages } } else { Outcome::Malformed }
    }
}

enum Entry {
    Block(u16),
    Page(u16, u32, Content),
}

/// Checks, pieces and contents are where they are in the body.
enum Content {
    Zero,
    Copy(u16, u32, Range<usize>),
    Patch(u64, Range<usize>, Range<usize>),
    Data(Range<usize>),
}

struct Cursor {
    at: usize,
    /// Of the entries.
    end: usize,
    /// Where the next content begins.
    data: usize,
}

impl Cursor {
    fn entry(&mut self, body: &[u8], block: Option<u16>, next: Option<u32>) -> Option<Entry> {
        let tag = self.number(body, 1)?;
        if tag == 0 {
            return Some(Entry::Block(self.number(body, 2)? as u16));
        }
        let page = if tag & 0x80 == 0 { next? } else { self.varint(body)? };
        let block = block?;
        let content = match tag & 0x7f {
            1 => Content::Zero,
            2 => Content::Copy(self.number(body, 2)? as u16, self.varint(body)?, self.take(8)?),
            3 => {
                let mask = self.number(body, 8)?;
                Content::Patch(mask, self.take(64 * mask.count_ones() as usize)?, self.take(8)?)
            }
            4 => {
                let content = self.data..self.data + PAGE_SIZE;
                self.data = content.end;
                (content.end <= body.len()).then_some(Content::Data(content))?
            }
            _ => return None,
        };
        Some(Entry::Page(block, page, content))
    }

    fn take(&mut self, length: usize) -> Option<Range<usize>> {
        let range = self.at..self.at + length;
        self.at = range.end;
        (range.end <= self.end).then_some(range)
    }

    fn number(&mut self, body: &[u8], length: usize) -> Option<u64> {
        let range = self.take(length)?;
        Some(body[range].iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn varint(&mut self, body: &[u8]) -> Option<u32> {
        let mut value = 0_u64;
        for place in 0..5 {
            let byte = self.number(body, 1)?;
            value |= (byte & 0x7f) << (7 * place);
            if byte < 0x80 {
                return u32::try_from(value).ok();
            }
        }
        None
    }
}
