//! Disks that travel: a disk is read and written from outside over NBD, what the guest writes to it is mirrored, and what was written since a moment is
//! kept in a dirty bitmap.
//!
//! A disk is named by its node: `disk0` for that in slot 0, [`VARIABLES`] for the variables of its firmware. Its export has the same name. A mirror
//! begins with what is written from then on, and copies nothing else: what is on the disk others copy.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use godwit_model::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::qmp::{Qmp, QmpError};

/// The node of a firmware's variables.
pub const VARIABLES: &str = "variables";
/// Bytes of a disk that a mirror takes for one: as guests write in places that are far apart, more of them would be sent for nothing.
const MIRRORED: u64 = 4 << 10;
/// Bytes that a bitmap takes for one: it stays, and takes 8 MiB for a TiB.
pub const REMEMBERED: u32 = 16 << 10;
/// What a mirror may have under way: with a multiple of that waiting elsewhere, stopping the VM does not wait for the wire.
const UNDER_WAY: u64 = 4 << 20;
/// How long a mirror that is told to end at once may take.
const ENDING: Duration = Duration::from_secs(10);
/// The name under which QEMU gets the socket that it serves its disks on.
const LISTENER: &str = "godwit-disks";

/// The node of the disk in a slot.
#[must_use]
pub fn disk_node(slot: usize) -> String {
    format!("disk{slot}")
}

/// How large a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskSize {
    /// As the guest sees it.
    pub size: Bytes,
    /// What it takes of its storage.
    pub allocated: Bytes,
}

/// How a mirror is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// What the guest has written and the other side has not.
    pub remaining: Bytes,
    /// It follows what the guest writes.
    pub follows: bool,
    /// It has ended, for this reason if that was a failure.
    pub ended: Option<Option<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Job {
    id: String,
    status: String,
    #[serde(default)]
    current_progress: u64,
    #[serde(default)]
    total_progress: u64,
    #[serde(default)]
    error: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Node {
    node_name: Option<String>,
    #[serde(default)]
    dirty_bitmaps: Vec<Bitmap>,
    image: Image,
}

#[derive(Deserialize)]
struct Bitmap {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    recording: bool,
    #[serde(default)]
    busy: bool,
    #[serde(default)]
    inconsistent: bool,
}

/// A dirty bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyBitmap {
    /// Its name.
    pub name: String,
    /// Whether what is written is still remembered: one that was stopped knows nothing of what came then.
    pub records: bool,
    /// QEMU itself trusts it, and nobody else works on it.
    pub is_sound: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Image {
    virtual_size: u64,
    #[serde(default)]
    actual_size: u64,
}

fn job(node: &str) -> String {
    format!("mirror-{node}")
}

fn target(node: &str) -> String {
    format!("mirror-{node}-target")
}

impl Qmp {
    /// `nbd-server-start`: serves exported disks on this listening socket.
    ///
    /// # Errors
    /// See [`QmpError`]; so for all of these. One that serves already refuses.
    pub async fn serve_disks(&self, listener: OwnedFd) -> Result<(), QmpError> {
        self.getfd(LISTENER, listener).await?;
        let address = json!({"type": "fd", "data": {"str": LISTENER}});
        self.execute("nbd-server-start", json!({"addr": address})).await.map(drop)
    }

    /// `nbd-server-stop`: nobody reads or writes a disk from outside any more. One that serves none has stopped already.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn stop_serving_disks(&self) -> Result<(), QmpError> {
        let exports = self.execute("query-block-exports", Value::Null).await?;
        match self.execute("nbd-server-stop", Value::Null).await {
            Err(error) if exports.as_array().is_some_and(|exports| !exports.is_empty()) => Err(error),
            // It did not serve.
            _ => Ok(()),
        }
    }

    /// `block-export-add`: the disk can be read, or written, and this bitmap of it be read.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn export_disk(&self, node: &str, writable: bool, bitmap: Option<&str>) -> Result<(), QmpError> {
        let mut export = json!({"type": "nbd", "id": node, "node-name": node, "name": node, "writable": writable});
        if let (Some(bitmap), Some(export)) = (bitmap, export.as_object_mut()) {
            export.insert("bitmaps".into(), json!([bitmap]));
        }
        self.execute("block-export-add", export).await.map(drop)
    }

    /// Mirrors what is written to the disk from here on to the NBD server at the other end of this socket.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn begin_mirror(&self, node: &str, to: OwnedFd) -> Result<(), QmpError> {
        let (job, target) = (job(node), target(node));
        self.getfd(&job, to).await?;
        let server = json!({"type": "fd", "str": job});
        let add = json!({"driver": "nbd", "node-name": target, "server": server, "export": node});
        self.execute("blockdev-add", add).await?;
        let mirror = json!({
            "job-id": job, "device": node, "target": target, "sync": "none", "granularity": MIRRORED, "buf-size": UNDER_WAY,
            "on-target-error": "report", "auto-dismiss": false,
        });
        let begun = self.execute("blockdev-mirror", mirror).await;
        if begun.is_err() {
            let _ = self.execute("blockdev-del", json!({"node-name": target})).await;
        }
        begun.map(drop)
    }

    /// How the mirror of the disk is, if there is one.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn mirror(&self, node: &str) -> Result<Option<Mirror>, QmpError> {
        self.mirror_job(&job(node)).await
    }

    /// A job that mirrors.
    pub(crate) async fn mirror_job(&self, id: &str) -> Result<Option<Mirror>, QmpError> {
        let found = self.jobs().await?.into_iter().find(|found| found.id == id);
        Ok(found.map(|job| Mirror {
            remaining: Bytes(job.total_progress.saturating_sub(job.current_progress)),
            follows: matches!(job.status.as_str(), "ready" | "standby"),
            ended: matches!(job.status.as_str(), "concluded" | "null" | "aborting").then_some(job.error),
        }))
    }

    async fn jobs(&self) -> Result<Vec<Job>, QmpError> {
        let answer = self.execute("query-jobs", Value::Null).await?;
        serde_json::from_value(answer)
            .map_err(|source| QmpError::Answer { command: "query-jobs".to_owned(), source: std::sync::Arc::new(source) })
    }

    /// `block-job-cancel` of a mirror that follows: it ends when the other side has all that was written. Said again: nothing happens.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn finish_mirror(&self, node: &str) -> Result<(), QmpError> {
        match self.mirror(node).await? {
            Some(Mirror { ended: None, follows: true, .. }) => {
                let cancelled = self.execute("block-job-cancel", json!({"device": job(node)})).await;
                match cancelled {
                    // It was said before, and the mirror has ended since it was looked at.
                    Err(_) if self.mirror(node).await?.is_none_or(|mirror| mirror.ended.is_some()) => Ok(()),
                    cancelled => cancelled.map(drop),
                }
            }
            _ => Ok(()),
        }
    }

    /// Lets go of a mirror, ending it at once if it has not ended, and of its connection. One that is not there is let go of already.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn drop_mirror(&self, node: &str) -> Result<(), QmpError> {
        let began = Instant::now();
        loop {
            match self.mirror(node).await? {
                None => break,
                Some(Mirror { ended: Some(_), .. }) => {
                    if self.execute("job-dismiss", json!({"id": job(node)})).await.is_ok() {
                        break;
                    }
                }
                Some(_) => {
                    let _ = self.execute("block-job-cancel", json!({"device": job(node), "force": true})).await;
                }
            }
            if began.elapsed() > ENDING {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // One that is not there is gone.
        let _ = self.execute("blockdev-del", json!({"node-name": target(node)})).await;
        Ok(())
    }

    /// `block-dirty-bitmap-add`: remembers which parts of the disk are written to from here on, as long as QEMU lives.
    ///
    /// # Errors
    /// See [`QmpError`]. One of that name that is there already is refused.
    pub async fn begin_bitmap(&self, node: &str, name: &str) -> Result<(), QmpError> {
        let add = json!({"node": node, "name": name, "granularity": REMEMBERED, "persistent": false});
        self.execute("block-dirty-bitmap-add", add).await.map(drop)
    }

    /// `block-dirty-bitmap-disable`: it remembers nothing more, and can be read.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn stop_bitmap(&self, node: &str, name: &str) -> Result<(), QmpError> {
        self.execute("block-dirty-bitmap-disable", json!({"node": node, "name": name})).await.map(drop)
    }

    /// `block-dirty-bitmap-remove`.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn remove_bitmap(&self, node: &str, name: &str) -> Result<(), QmpError> {
        self.execute("block-dirty-bitmap-remove", json!({"node": node, "name": name})).await.map(drop)
    }

    /// The disk's bitmaps.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn bitmaps(&self, node: &str) -> Result<Vec<DirtyBitmap>, QmpError> {
        let bitmap = |bitmap: Bitmap| {
            let is_sound = !bitmap.busy && !bitmap.inconsistent;
            Some(DirtyBitmap { name: bitmap.name?, records: bitmap.recording, is_sound })
        };
        let found = self.node(node).await?;
        Ok(found.map(|node| node.dirty_bitmaps.into_iter().filter_map(bitmap).collect()).unwrap_or_default())
    }

    /// How large the disk is; `None` if there is none of that name.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn size_of_disk(&self, node: &str) -> Result<Option<DiskSize>, QmpError> {
        let found = self.node(node).await?;
        Ok(found.map(|node| DiskSize { size: Bytes(node.image.virtual_size), allocated: Bytes(node.image.actual_size) }))
    }

    async fn node(&self, name: &str) -> Result<Option<Node>, QmpError> {
        let command = "query-named-block-nodes";
        let answer = self.execute(command, json!({"flat": true})).await?;
        let nodes: Vec<Node> = serde_json::from_value(answer)
            .map_err(|source| QmpError::Answer { command: command.to_owned(), source: std::sync::Arc::new(source) })?;
        Ok(nodes.into_iter().find(|node| node.node_name.as_deref() == Some(name)))
    }
}
