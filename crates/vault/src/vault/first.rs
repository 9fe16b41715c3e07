//! The first pages of a snapshot: those that a VM asked for first when it began from it.
//!
//! ```text
//! file  = head  pages
//! pages = { u16 space  u32 page }, in the order in which they were asked for
//! ```
//! Whoever plays the snapshot again sends them ahead. A hint: what cannot be read is not there.

use std::io::{self, Read, Write};

use bytes::{Buf, BufMut};
use godwit_model::SnapshotId;
use rustix::fs::FlockOperation;

use super::{Vault, VaultError, draft_name, draw_writer, failed, first_name, snapshot_name};
use crate::SnapshotKey;
use crate::sealed::{Form, HEAD, Head, Kind, OVERHEAD, RECORD_HEAD, Sealer, read_record_head};

const FORM: Form = Form { magic: *b"GDWTFRST", version: 1, context: "godwit vault 2026-11-28 key of first pages" };
const PAGE: usize = 2 + 4;
/// Pages that are kept.
const MOST: usize = 2_048;
/// Longest file.
const LONGEST: usize = HEAD + OVERHEAD + MOST * PAGE;

/// The only record.
#[derive(Clone, Copy)]
struct Pages;

impl Kind for Pages {
    fn number(self) -> u8 {
        1
    }
}

impl Vault {
    /// The first pages of a snapshot, as space and number; none if they are not known.
    #[must_use]
    pub fn first_pages(&self, id: SnapshotId, key: &SnapshotKey) -> Vec<(u16, u32)> {
        let read = || {
            let mut bytes = vec![];
            let file = self.shared.find(&first_name(id)).ok()??;
            file.take(LONGEST as u64 + 1).read_to_end(&mut bytes).ok()?;
            open(key, &mut bytes)
        };
        read().unwrap_or_default()
    }

    /// Keeps which pages a VM asked for first, unless that is known, or the snapshot is gone. It need not be durable.
    ///
    /// # Errors
    /// [`VaultError::Busy`] while somebody prunes, [`VaultError::Io`]
    pub fn keep_first_pages(&self, id: SnapshotId, key: &SnapshotKey, pages: &[(u16, u32)]) -> Result<(), VaultError> {
        let _lock = self.shared.lock(FlockOperation::NonBlockingLockShared)?;
        if pages.is_empty() || self.shared.length(&snapshot_name(id)).is_err() || !self.first_pages(id, key).is_empty() {
            return Ok(());
        }
        let bytes = seal(key, pages).map_err(failed("written"))?;
        let draft = draft_name(&first_name(id), draw_writer().map_err(failed("written"))?);
        let create = self.shared.create(&draft);
        let written = create.and_then(|mut file| file.write_all(&bytes)).and_then(|()| self.shared.rename(&draft, &first_name(id)));
        if written.is_err() {
            let _ = self.shared.remove(&draft);
        }
        written.map_err(failed("written"))
    }
}

/// The file of these pages, of which no more than [`MOST`] are kept.
fn seal(key: &SnapshotKey, pages: &[(u16, u32)]) -> io::Result<Vec<u8>> {
    let head = Head::draw(&FORM)?;
    let mut record = vec![0; RECORD_HEAD];
    for (space, page) in pages.iter().take(MOST) {
        record.put_u16(*space);
        record.put_u32(*page);
    }
    record.resize(record.len() + OVERHEAD - RECORD_HEAD, 0);
    Sealer::new(&FORM, key.expose(), head).seal(Pages, 0, &mut record);
    Ok([&head.bytes()[..], &record[..]].concat())
}

/// The pages of a file; none unless it is whole.
fn open(key: &SnapshotKey, file: &mut [u8]) -> Option<Vec<(u16, u32)>> {
    let head = Head::read(&FORM, file).ok()?;
    let record = file.get_mut(HEAD..)?;
    let (kind, length) = read_record_head(record)?;
    let sealed = record.get_mut(RECORD_HEAD..)?;
    if kind != Pages.number() || length != sealed.len() {
        return None;
    }
    let content = Sealer::new(&FORM, key.expose(), head).open(Pages, 0, sealed)?;
    let (pages, rest) = content.as_chunks::<PAGE>();
    let page = |page: &[u8; PAGE]| {
        let mut page = &page[..];
        (page.get_u16(), page.get_u32())
    };
    rest.is_empty().then(|| pages.iter().map(page).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_back_in_order_and_what_is_not_whole_or_of_another_key_is_nothing() {
        let (key, other) = (SnapshotKey::new([1; 32]), SnapshotKey::new([2; 32]));
        for pages in [vec![], vec![(1, 7), (0, u32::MAX), (1, 7)]] {
            let file = seal(&key, &pages).expect("sealed");
            assert_eq!(open(&key, &mut file.clone()), Some(pages));
            assert_eq!(open(&other, &mut file.clone()), None);
            for length in 0..file.len() {
                assert_eq!(open(&key, &mut file[..length].to_vec()), None, "{length}");
            }
            for at in 0..file.len() {
                let mut changed = file.clone();
                changed[at] ^= 1;
                assert_eq!(open(&key, &mut changed), None, "{at}");
            }
            assert_eq!(open(&key, &mut [&file[..], &[0]].concat()), None);
        }
        let many: Vec<(u16, u32)> = (0..5_000).map(|page| (0, page)).collect();
        let mut file = seal(&key, &many).expect("sealed");
        assert_eq!(file.len(), LONGEST);
        assert_eq!(open(&key, &mut file).expect("opened"), many[..MOST]);
    }
}
