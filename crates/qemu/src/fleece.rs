//! Disks as they were at one instant, while the guest writes on: before the guest's first write to a place, what was there is copied into a *fleece*, an image of
//! its own, and whoever reads the fleece finds there what was copied and in the disk all else.
//!
//! ```text
//! add_fleece (each disk) ──▶ begin_fleeces (all of one instant) ──▶ read over NBD ──▶ end_fleece (each disk)
//! ```
//! Nothing of the disk's own chain changes, so that nothing has to be merged afterwards. QEMU's documentation of dirty bitmaps, and its block test 222, know
//! it as image fleecing. In the same instant begins the bitmap of what is written from then on: see [`crate::since`].

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use godwit_model::SnapshotId;
use serde_json::{Value, json};

use crate::qmp::{Qmp, QmpError};
use crate::since::{self, Since};

/// How long the copying may take to end, which has at most one write of the guest under way.
const ENDING: Duration = Duration::from_secs(10);

/// The node of a disk's fleece, and its job.
#[must_use]
pub fn fleece_node(disk: &str) -> String {
    format!("fleece-{disk}")
}

impl Qmp {
    /// Adds a fleece for a disk: an empty qcow2 image of the disk's size, opened for reading and writing.
    ///
    /// # Errors
    /// See [`QmpError`]; so for all of these.
    pub async fn add_fleece(&self, disk: &str, image: OwnedFd) -> Result<(), QmpError> {
        let node = fleece_node(disk);
        let set = self.add_fd_anew(&node, image).await?;
        let file = json!({"driver": "file", "filename": format!("/dev/fdset/{set}")});
        let add = json!({"driver": "qcow2", "node-name": node, "file": file, "backing": disk});
        let added = self.execute("blockdev-add", add).await;
        // Whoever has opened it has a descriptor of its own.
        let _ = self.execute("remove-fd", json!({"fdset-id": set})).await;
        added.map(drop)
    }

    /// From here on the fleeces of these disks have what the disks have now: all of one instant if the VM stands still, and all or none. From the same instant on,
    /// what is written is remembered for the snapshot; and [`crate::since::CHANGED`] has what was written until then since an earlier one, if one is named.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn begin_fleeces(&self, disks: &[(String, Option<Since>)], snapshot: SnapshotId) -> Result<(), QmpError> {
        let begin = |(disk, _): &(String, Option<Since>)| {
            let data = json!({"device": disk, "target": fleece_node(disk), "sync": "none", "job-id": fleece_node(disk)});
            json!({"type": "blockdev-backup", "data": data})
        };
        // Behind the fleeces: with its fleece a disk comes to rest until the end of the transaction.
        let remember = |(disk, earlier): &(String, Option<Since>)| {
            let held = earlier.as_ref().map(|earlier| since::hold(disk, earlier)).into_iter().flatten();
            [since::begin(disk, snapshot)].into_iter().chain(held).collect::<Vec<_>>()
        };
        self.transact(disks.iter().map(begin).chain(disks.iter().flat_map(remember)).collect()).await
    }

    /// `transaction`: all or none.
    pub(crate) async fn transact(&self, actions: Vec<Value>) -> Result<(), QmpError> {
        if actions.is_empty() {
            return Ok(());
        }
        self.execute("transaction", json!({"actions": actions})).await.map(drop)
    }

    /// Ends a fleece, wherever it stands; nobody reads it any more.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn end_fleece(&self, disk: &str) -> Result<(), QmpError> {
        let node = fleece_node(disk);
        let has_job = async || {
            let jobs = self.execute("query-jobs", Value::Null).await?;
            Ok::<_, QmpError>(jobs.as_array().is_some_and(|jobs| jobs.iter().any(|job| job["id"] == *node)))
        };
        let deadline = Instant::now() + ENDING;
        if has_job().await? {
            self.execute("job-cancel", json!({"id": node})).await?;
        }
        while has_job().await? {
            if Instant::now() > deadline {
                return Err(QmpError::TimedOut { command: "job-cancel".into(), limit: ENDING });
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if self.size_of_disk(&node).await?.is_some() {
            self.execute("blockdev-del", json!({"node-name": node})).await?;
        }
        Ok(())
    }
}
