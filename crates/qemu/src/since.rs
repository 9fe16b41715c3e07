//! What was written to a disk since a snapshot of its VM: one dirty bitmap for each of the newest snapshots, in QEMU's memory, which begins in the instant of the snapshot
//! and ends with QEMU.
//!
//! ```text
//! taking-ID ──the snapshot is whole──▶ since-N-ID, the greater N the newer
//!     └──it failed, or nobody knows──▶ removed
//! ```
//! So a name that begins with `since` is all the proof there is, and all that it takes: it is given in one transaction for all disks, to a bitmap that has
//! all that was written since the instant. A bitmap that has more than that is right, too: who looks at more than has changed finds that it has not.

use godwit_model::SnapshotId;
use serde_json::{Value, json};

use crate::qmp::{Qmp, QmpError};

/// Snapshots of which it is kept for each disk: each takes 2 MiB for a TiB, and a moment of each write of the guest.
pub const MOST: usize = 8;
/// Bytes that a bitmap takes for one.
pub const GRANULARITY: u32 = 64 << 10;
/// The bitmap of what was written since an earlier snapshot, as it was in the instant of a later one: it stands still, and can be read with the fleece.
pub const CHANGED: &str = "changed";

/// A bitmap that has all that was written to a disk since a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Since {
    /// Which snapshot.
    pub snapshot: SnapshotId,
    /// The bitmap's name.
    pub bitmap: String,
    number: u64,
}

impl Since {
    fn new(number: u64, snapshot: SnapshotId) -> Self {
        Self { snapshot, bitmap: format!("since-{number}-{snapshot}"), number }
    }

    fn parse(bitmap: &str) -> Option<Self> {
        let (number, snapshot) = bitmap.strip_prefix("since-")?.split_once('-')?;
        let found = Self::new(number.parse().ok()?, snapshot.parse().ok()?);
        Some(found).filter(|found| found.bitmap == bitmap)
    }
}

/// The bitmap of a snapshot that is being taken.
fn taking(snapshot: SnapshotId) -> String {
    format!("taking-{snapshot}")
}

pub(crate) fn begin(disk: &str, snapshot: SnapshotId) -> Value {
    add(disk, &taking(snapshot), false)
}

/// Has [`CHANGED`] be what was written since `earlier`.
pub(crate) fn hold(disk: &str, earlier: &Since) -> [Value; 2] {
    [add(disk, CHANGED, true), merge(disk, CHANGED, &earlier.bitmap)]
}

fn add(disk: &str, name: &str, disabled: bool) -> Value {
    let data = json!({"node": disk, "name": name, "granularity": GRANULARITY, "persistent": false, "disabled": disabled});
    json!({"type": "block-dirty-bitmap-add", "data": data})
}

fn merge(disk: &str, target: &str, bitmap: &str) -> Value {
    json!({"type": "block-dirty-bitmap-merge", "data": {"node": disk, "target": target, "bitmaps": [bitmap]}})
}

impl Qmp {
    /// The snapshots since which all that was written to a disk is known, the oldest first.
    ///
    /// # Errors
    /// See [`QmpError`]; so for all of these.
    pub async fn since(&self, disk: &str) -> Result<Vec<Since>, QmpError> {
        let bitmaps = self.bitmaps(disk).await?;
        let sound = bitmaps.iter().filter(|bitmap| bitmap.records && bitmap.is_sound);
        let mut found: Vec<Since> = sound.filter_map(|bitmap| Since::parse(&bitmap.name)).collect();
        found.sort_unstable_by_key(|since| since.number);
        Ok(found)
    }

    /// What was written to these disks since the instant of the snapshot is known from now on: the snapshot is whole. Of older ones, [`MOST`] less one stay, those first that are among
    /// `there`: of the others nobody knows whether they still are.
    ///
    /// # Errors
    /// See [`Qmp::since`].
    pub async fn keep_since(&self, disks: &[String], snapshot: SnapshotId, there: &[SnapshotId]) -> Result<(), QmpError> {
        let since = Since::new(self.next_number(disks).await?, snapshot);
        let taking = taking(snapshot);
        let keep = |disk: &String| [add(disk, &since.bitmap, false), merge(disk, &since.bitmap, &taking)];
        self.transact(disks.iter().flat_map(keep).collect()).await?;
        for disk in disks {
            self.remove_bitmap(disk, &taking).await?;
            let mut known = self.since(disk).await?;
            known.sort_by_key(|since| since.snapshot == snapshot || there.contains(&since.snapshot));
            for least in known.iter().take(known.len().saturating_sub(MOST)) {
                self.remove_bitmap(disk, &least.bitmap).await?;
            }
        }
        Ok(())
    }

    /// These disks are what they were in the snapshot, and nobody writes to them yet: what is written from now on is known.
    ///
    /// # Errors
    /// See [`Qmp::since`].
    pub async fn begin_since(&self, disks: &[String], snapshot: SnapshotId) -> Result<(), QmpError> {
        let since = Since::new(self.next_number(disks).await?, snapshot);
        self.transact(disks.iter().map(|disk| add(disk, &since.bitmap, false)).collect()).await
    }

    /// Removes what a snapshot that is not taken any more has left of bitmaps. Nobody reads them any more.
    ///
    /// # Errors
    /// See [`Qmp::since`].
    pub async fn forget_taking(&self, disk: &str) -> Result<(), QmpError> {
        for bitmap in self.bitmaps(disk).await? {
            if bitmap.name == CHANGED || bitmap.name.starts_with("taking-") {
                self.remove_bitmap(disk, &bitmap.name).await?;
            }
        }
        Ok(())
    }

    /// Nothing is known any more of what was written to a disk since this snapshot, or since any.
    ///
    /// # Errors
    /// See [`Qmp::since`].
    pub async fn forget_since(&self, disk: &str, snapshot: Option<SnapshotId>) -> Result<(), QmpError> {
        for bitmap in self.bitmaps(disk).await? {
            if Since::parse(&bitmap.name).is_some_and(|since| snapshot.is_none_or(|snapshot| since.snapshot == snapshot)) {
                self.remove_bitmap(disk, &bitmap.name).await?;
            }
        }
        Ok(())
    }

    async fn next_number(&self, disks: &[String]) -> Result<u64, QmpError> {
        let mut last = 0;
        for disk in disks {
            let numbers = self.bitmaps(disk).await?.into_iter().filter_map(|bitmap| Some(Since::parse(&bitmap.name)?.number));
            last = numbers.max().unwrap_or(0).max(last);
        }
        Ok(last.saturating_add(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_whole_is_taken_for_known() {
        let id: SnapshotId = "0190a0a0-0000-7000-8000-000000000001".parse().expect("an id");
        let since = Since::new(12, id);
        assert_eq!(Since::parse(&since.bitmap), Some(since));
        for other in ["", CHANGED, "godwit-12", "since-", "since-12", "since-x-y", "since-012-0190a0a0-0000-7000-8000-000000000001"]
        {
            assert_eq!(Since::parse(other), None, "{other}");
        }
        assert_eq!(Since::parse(&taking(id)), None);
    }
}
