//! A snapshot as files that QEMU reads by itself: its memory as the stream of a migration, its disks as raw images.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;

use bytes::{Bytes, BytesMut};
use godwit_stream::{BlockIndex, Element, PAGE_SIZE, PageContent, WriteError, Writer};
use godwit_vault::{Contents, ContentsError, Leaf, SpaceKind};

use super::play::{PlayError, preamble};

const PAGE: u64 = PAGE_SIZE as u64;
/// What stands behind the devices: the mark of the end, and a description of them that says nothing. QEMU reads over it; to whoever reads the file it says that the
/// stream is whole.
const END: u8 = 0;
const DESCRIPTION: u8 = 6;
const DESCRIBED: &[u8] = br#"{"page_size":4096,"devices":[]}"#;
/// Bytes that are written at once.
const PIECE: usize = 1 << 20;

/// Why a snapshot is not in a file.
#[derive(Debug, thiserror::Error)]
pub(super) enum UnloadError {
    /// The snapshot cannot be read.
    #[error(transparent)]
    Contents(#[from] ContentsError),
    /// What it has of QEMU's stream is not understood.
    #[error(transparent)]
    Preamble(#[from] PlayError),
    /// The stream cannot be written.
    #[error("the stream cannot be written")]
    Stream(#[from] WriteError),
    /// The snapshot has no such disk.
    #[error("the snapshot has no disk {0}")]
    NoDisk(String),
    /// The file cannot be written.
    #[error("the file cannot be written")]
    Write(#[from] io::Error),
}

/// Writes the stream of a migration that has ended: every page of RAM once, also what is zero, since a QEMU that has started has its firmware there. How many bytes it has.
///
/// # Errors
/// [`UnloadError`]
pub(super) fn unload_memory(contents: &mut Contents, to: &File) -> Result<u64, UnloadError> {
    let (before, start) = preamble(&contents.snapshot().parts().preamble)?;
    let devices = Bytes::copy_from_slice(&contents.snapshot().parts().devices);
    let mut out = Out { file: BufWriter::with_capacity(PIECE, to), writer: Writer::new(), bytes: BytesMut::new(), length: 0 };
    for element in before {
        out.put(&element)?;
    }
    let blocks: Vec<u64> = start.blocks.iter().map(godwit_stream::RamBlock::pages).collect();
    out.put(&Element::RamStart(start))?;
    for (block, pages) in (0_u16..).zip(blocks) {
        for first in (0..pages).step_by(Leaf::PAGES as usize) {
            out.put(&Element::PartBegin)?;
            for page in first..pages.min(first + u64::from(Leaf::PAGES)) {
                let content = contents.page(block, u32::try_from(page).unwrap_or(u32::MAX))?;
                let content = content.map_or(PageContent::Zero, |data| PageContent::Data(Bytes::copy_from_slice(data)));
                out.put(&Element::Page { block: BlockIndex(block), page, content })?;
            }
            out.put(&Element::PartEnd)?;
        }
    }
    for element in [Element::EndBegin, Element::EndEnd, Element::Opaque(devices)] {
        out.put(&element)?;
    }
    let length = u32::try_from(DESCRIBED.len()).unwrap_or_default().to_be_bytes();
    out.put(&Element::Opaque([&[END, DESCRIPTION], length.as_slice(), DESCRIBED].concat().into()))?;
    out.file.flush()?;
    Ok(out.length)
}

struct Out<'a> {
    file: BufWriter<&'a File>,
    writer: Writer,
    bytes: BytesMut,
    length: u64,
}

impl Out<'_> {
    fn put(&mut self, element: &Element) -> Result<(), UnloadError> {
        self.writer.write(element, &mut self.bytes)?;
        self.length += self.bytes.len() as u64;
        self.file.write_all(&self.bytes)?;
        self.bytes.clear();
        Ok(())
    }
}

/// Writes a disk into an empty file, which is as long as it then; what is zero stays a hole. How long it is.
///
/// # Errors
/// [`UnloadError`]
pub(super) fn unload_disk(contents: &mut Contents, name: &str, to: &File) -> Result<u64, UnloadError> {
    let is_it = |space: &godwit_vault::Space| space.kind == SpaceKind::Disk && space.name == name;
    let number = contents.spaces().iter().position(is_it).ok_or_else(|| UnloadError::NoDisk(name.to_owned()))?;
    let pages = contents.spaces().get(number).map_or(0, |space| space.pages);
    let number = u16::try_from(number).unwrap_or(u16::MAX);
    let length = u64::from(pages) * PAGE;
    to.set_len(length)?;
    for first in (0..pages).step_by(Leaf::PAGES as usize) {
        let located: Vec<u32> = contents.located(number, first)?.collect();
        for page in located {
            if let Some(content) = contents.page(number, page)? {
                to.write_all_at(content, u64::from(page) * PAGE)?;
            }
        }
    }
    Ok(length)
}
