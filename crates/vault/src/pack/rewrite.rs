//! Writes a pack anew with fewer of its pages, which keep their numbers. No content is looked at: a difference is copied as it is, with its check.

use std::io;

use godwit_model::Bytes;

use super::{CHUNK_PAGES, KeptPages, PackReader, PackWriter, Unsealed};
use crate::stored::{FileError, Stored};
use crate::{PackKey, Sink};

/// Why a pack is not written anew.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RewriteError {
    #[error("the pack cannot be read")]
    Read(#[from] FileError),
    #[error("the pack cannot be written")]
    Write(#[from] io::Error),
}

impl<S: Stored> PackReader<S> {
    /// Writes those of its pages that are in `keep`, all of which it has, into an empty file; on stable storage when this returns. `key` is the pack's.
    pub(crate) fn rewrite<W: Sink>(&self, keep: &KeptPages, key: &PackKey, file: W) -> Result<W, RewriteError> {
        self.rewrite_into(PackWriter::begin(file, key, Bytes(u64::MAX))?, keep)
    }

    /// As [`Self::rewrite`], with a writer that has begun.
    pub(crate) fn rewrite_into<W: Sink>(&self, mut writer: PackWriter<W>, keep: &KeptPages) -> Result<W, RewriteError> {
        writer.set_differences(self.differences().only(keep));
        let mut digests = self.digests()?;
        let mut room = Unsealed::new()?;
        for chunk in 0..self.chunks() {
            let pages: Vec<_> = digests.by_ref().take(CHUNK_PAGES).collect();
            if !pages.iter().any(|(page, _)| keep.position(*page).is_some()) {
                continue;
            }
            let packed = self.chunk(chunk, &mut room)?;
            let mut checks = packed.checks.iter();
            for ((page, digest), content) in pages.iter().zip(packed.pages) {
                let check = self.base_of(*page).and_then(|_| checks.next());
                if keep.position(*page).is_some() {
                    writer.skip_to(*page);
                    writer.put_as_kept(content, digest, check)?;
                }
            }
        }
        writer.skip_to(self.pages());
        Ok(writer.finish()?.0)
    }
}

#[cfg(test)]
mod tests;
