//! The last step of a batch: compression. It depends on nothing but the batch, so several threads may do it at once.

use bytes::Bytes;
use zstd::bulk::Compressor;

use super::batch::payload;
use super::encode::Batch;
use crate::level::Level;

/// Seals batches, one after the other.
pub struct Sealer {
    compressor: Compressor<'static>,
    level: Level,
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sealer").field("level", &self.level).finish_non_exhaustive()
    }
}

impl Default for Sealer {
    fn default() -> Self {
        Self::new()
    }
}

impl Sealer {
    /// # Panics
    /// If there is no memory for a compressor.
    #[must_use]
    pub fn new() -> Self {
        let level = Level::default();
        Self { compressor: Compressor::new(level.zstd().unwrap_or(1)).expect("memory for a compressor"), level }
    }

    /// The payload of the [`crate::Frame::Pages`] for a batch. It is compressed unless that makes it larger, or fails.
    #[must_use]
    pub fn seal(&mut self, batch: &Batch, level: Level) -> Bytes {
        let Some(zstd) = level.zstd() else { return payload(&batch.body, None) };
        if std::mem::replace(&mut self.level, level) != level && self.compressor.set_compression_level(zstd).is_err() {
            return payload(&batch.body, None);
        }
        let compressed = self.compressor.compress(&batch.body).ok();
        payload(&batch.body, compressed.as_deref())
    }
}
