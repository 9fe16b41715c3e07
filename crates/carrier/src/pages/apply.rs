//! The destination's half: writes what a batch says into guest memory.

use zstd::bulk::Decompressor;

use super::batch::{self, Entry, MalformedBatch};
use super::digest::CHECK;
use super::images::{COMMON, FIRST_IMAGE};
use super::{Digester, PAGE_SIZE, PIECE, Page};

/// Guest memory by block and page.
pub trait GuestMemory {
    /// Why it could not be reached.
    type Error;

    /// Reads a page, also of an image that the applier knows, or of [`COMMON`].
    ///
    /// # Errors
    /// If the memory cannot be reached.
    fn read(&mut self, block: u16, page: u32, into: &mut Page) -> Result<(), Self::Error>;

    /// Writes consecutive pages, from `page` on; `content` is a whole number of them.
    ///
    /// # Errors
    /// If the memory cannot be reached.
    fn write(&mut self, block: u16, page: u32, content: &[u8]) -> Result<(), Self::Error>;
}

/// Why a batch was not applied. What came before the entry at fault is, but for data pages that follow each other right before it.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError<E> {
    /// Its bytes are not a batch.
    #[error(transparent)]
    Malformed(#[from] MalformedBatch),
    /// It names a page that is none.
    #[error("a page beyond the end of block {block}")]
    Page {
        /// The block.
        block: u16,
    },
    /// What the destination holds is not what the source believes.
    #[error("page {page} of block {block} would not become what the source has")]
    Check {
        /// The block.
        block: u16,
        /// The page.
        page: u32,
    },
    /// The destination's image is not what it was, or cannot be read.
    #[error("image {image} does not hold what the source has found in it")]
    Image {
        /// Its number.
        image: u16,
    },
    /// Guest memory.
    #[error("guest memory")]
    Memory(#[source] E),
}

/// What a batch did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Pages that were written.
    pub pages: u32,
}

/// Applies batches to blocks of known length.
pub struct Applier {
    digester: Digester,
    blocks: Vec<u32>,
    images: Vec<u32>,
    common: u32,
    decompressor: Decompressor<'static>,
    scratch: Vec<u8>,
}

impl std::fmt::Debug for Applier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Applier").field("blocks", &self.blocks).finish_non_exhaustive()
    }
}

/// Data pages that follow each other are written at once.
struct Run<'a> {
    block: u16,
    first: u32,
    pages: u32,
    content: &'a [u8],
}

impl Applier {
    /// For a session; `blocks` are the lengths in pages, by number.
    ///
    /// # Panics
    /// If there is no memory for a decompressor.
    #[must_use]
    pub fn new(digester: Digester, blocks: Vec<u32>) -> Self {
        let decompressor = Decompressor::new().expect("memory for a decompressor");
        Self { digester, blocks, images: Vec::new(), common: 0, decompressor, scratch: Vec::new() }
    }

    /// With images of so many whole pages, which are read as blocks from [`FIRST_IMAGE`] on.
    #[must_use]
    pub fn with_images(self, images: Vec<u32>) -> Self {
        Self { images, ..self }
    }

    /// So many pages of other VMs were told, and are read as pages of [`COMMON`].
    pub const fn set_common(&mut self, pages: u32) {
        self.common = pages;
    }

    /// Applies a batch, entry by entry.
    ///
    /// # Errors
    /// See [`ApplyError`]: there is no way on from any of them.
    pub fn apply<M: GuestMemory>(&mut self, payload: &[u8], memory: &mut M) -> Result<Applied, ApplyError<M::Error>> {
        let Self { digester, blocks, images, common, decompressor, scratch } = self;
        let body = batch::body(payload, scratch, |bytes, out| decompressor.decompress_to_buffer(bytes, out).ok())?;
        let mut entries = batch::Reader::new(body)?;
        let inside = |block: u16, page: u32| {
            let pages = blocks.get(usize::from(block)).copied().unwrap_or(0);
            if page < pages { Ok(()) } else { Err(ApplyError::Page { block }) }
        };
        let image_of = |block: u16| block.checked_sub(FIRST_IMAGE).filter(|_| block != COMMON);
        let readable = |block: u16, page: u32| {
            let pages = match image_of(block) {
                Some(image) => images.get(usize::from(image)),
                None if block == COMMON => Some(&*common),
                None => blocks.get(usize::from(block)),
            };
            pages.filter(|pages| page < **pages).map(drop).ok_or(ApplyError::Page { block })
        };
        let mut run: Option<Run<'_>> = None;
        let mut applied = Applied::default();
        while let Some((block, page, entry)) = entries.entry()? {
            inside(block, page)?;
            applied.pages += 1;
            if let Entry::Data(content) = entry {
                run = Some(extend(run, block, page, content, body, memory).map_err(ApplyError::Memory)?);
                continue;
            }
            if let Some(run) = run.take() {
                memory.write(run.block, run.first, run.content).map_err(ApplyError::Memory)?;
            }
            let mut content = [0; PAGE_SIZE];
            let mut image = None;
            let check = match entry {
                Entry::Zero | Entry::Data(_) => None,
                Entry::Copy { block, page, check } => {
                    readable(block, page)?;
                    image = image_of(block);
                    let read = memory.read(block, page, &mut content);
                    read.map_err(|error| image.map_or(ApplyError::Memory(error), |image| ApplyError::Image { image }))?;
                    Some(check)
                }
                Entry::Patch { mask, pieces, check } => {
                    memory.read(block, page, &mut content).map_err(ApplyError::Memory)?;
                    patch(&mut content, mask, pieces);
                    Some(check)
                }
            };
            let right = |check: [u8; CHECK]| match entry {
                // Its digest was told: it would prove nothing.
                Entry::Copy { block: COMMON, .. } => digester.proof(&content) == check,
                _ => digester.page(&content).first_chunk() == Some(&check),
            };
            if check.is_some_and(|check| !right(check)) {
                return Err(image.map_or(ApplyError::Check { block, page }, |image| ApplyError::Image { image }));
            }
            memory.write(block, page, &content).map_err(ApplyError::Memory)?;
        }
        if let Some(run) = run {
            memory.write(run.block, run.first, run.content).map_err(ApplyError::Memory)?;
        }
        Ok(applied)
    }
}

/// Adds a page to the run if it follows it, or writes the run and begins another. Contents lie one after the other at the end of `body`.
fn extend<'a, M: GuestMemory>(
    run: Option<Run<'a>>,
    block: u16,
    page: u32,
    content: &'a Page,
    body: &'a [u8],
    memory: &mut M,
) -> Result<Run<'a>, M::Error> {
    match run {
        Some(run) if run.block == block && run.first.checked_add(run.pages) == Some(page) => {
            // The contents of a run are neighbours in the body, since the run has every data entry between its first and its last.
            let start = run.content.as_ptr().addr() - body.as_ptr().addr();
            let longer = body.get(start..start + run.content.len() + PAGE_SIZE).unwrap_or(run.content);
            Ok(Run { pages: run.pages + 1, content: longer, ..run })
        }
        Some(run) => {
            memory.write(run.block, run.first, run.content)?;
            Ok(Run { block, first: page, pages: 1, content })
        }
        None => Ok(Run { block, first: page, pages: 1, content }),
    }
}

fn patch(page: &mut Page, mask: u64, pieces: &[u8]) {
    let (targets, _) = page.as_chunks_mut::<PIECE>();
    let chosen = targets.iter_mut().enumerate().filter(|(index, _)| mask >> index & 1 == 1);
    for ((_, target), piece) in chosen.zip(pieces.as_chunks::<PIECE>().0) {
        *target = *piece;
    }
}
