//! The one section of a device that comes before the pages: which parts of its memory a `virtio-mem` device has plugged.

use crate::cursor::{Cursor, Stop};
use crate::error::StreamError;
use crate::wire::{kind, read_footer};

const NAME: &[u8] = b"virtio-mem-device-early";

/// A bitmap of that size describes 16 TiB of memory in pieces of 2 MiB.
const MAX_BITMAP: u64 = 1 << 20;

/// Whether a section's name, with or without the device's path before it, is that of an early section.
pub(crate) fn is_early(name: &[u8]) -> bool {
    name.strip_suffix(NAME).is_some_and(|path| path.is_empty() || path.ends_with(b"/"))
}

/// Reads a whole section, from its kind to its footer.
pub(crate) fn read(cursor: &mut Cursor<'_>) -> Result<(), Stop> {
    let kind = cursor.u8()?;
    let section = cursor.u32()?;
    let name = cursor.name()?;
    let _instance = cursor.u32()?;
    let version = cursor.u32()?;
    if kind != kind::FULL || !is_early(name) || version != 1 {
        return Err(StreamError::Early.into());
    }
    let _address = cursor.u64()?;
    let region = cursor.u64()?;
    let block = cursor.u64()?;
    let bits = region.checked_div(block).filter(|bits| bits.checked_mul(block) == Some(region)).ok_or(StreamError::Early)?;
    let bytes = bits.div_ceil(64).saturating_mul(8);
    if bytes > MAX_BITMAP {
        return Err(StreamError::Early.into());
    }
    let _node = cursor.u32()?;
    let _plugged = cursor.u64()?;
    cursor.take(usize::try_from(bytes).unwrap_or(usize::MAX))?;
    read_footer(cursor, section)
}
