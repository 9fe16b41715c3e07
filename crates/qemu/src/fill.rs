//! A disk that is filled while the guest uses it: what it is to have comes from an NBD server, and until all of that has come the guest reads it there and writes
//! into *room* that lies in between.
//!
//! ```text
//! insert_fill (no vCPU runs) ──▶ begin_fill ──▶ fill_state … follows ──▶ end_fill
//! guest ▶ room ▶ server             guest ▶ room ▶ server                 guest ▶ disk
//!                                           └─ mirror ▶ disk
//! ```
//! The disk has what it had and what has come in one mess until then: whoever loses QEMU before begins anew. Each step can be said again after a crash of who says it. A server that
//! goes away is waited for, and connected to again.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use godwit_model::{Bytes, ResolvedDisk};
use serde_json::{Value, json};

use crate::command::devices::disk_nodes;
use crate::disks::disk_node;
use crate::qmp::{Qmp, QmpError};

/// So many seconds QEMU waits for a server that is gone, and the guest with it, before it takes it for lost.
const RECONNECT: u64 = 60;
/// Bytes that are filled in at once.
const PIECE: u64 = 64 << 10;
/// What may be under way: a page that the guest wants waits behind it.
const UNDER_WAY: u64 = 2 << 20;
/// How long QEMU may take to bring the guest from the room to the disk.
const ENDING: Duration = Duration::from_secs(30);

/// How the filling of a disk is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fill {
    /// The guest reads and writes the room; nothing comes by itself.
    Inserted,
    /// It comes.
    Comes {
        /// How much is still to come, and what the guest writes meanwhile.
        remaining: Bytes,
        /// All has come: [`Qmp::end_fill`].
        follows: bool,
    },
    /// All has come and the guest is on the disk, or for this reason not.
    Ended(Option<String>),
}

/// The node on which the guest is, and the job's id.
fn room(disk: &str) -> String {
    format!("fill-{disk}")
}

fn server(disk: &str) -> String {
    format!("fill-{disk}-from")
}

impl Qmp {
    /// Puts room between the guest and its disk; from here on it finds there what the server on this socket has under the disk's name. The room is an empty qcow2 image of the disk's size, opened
    /// read-only and read-write. On failure QEMU is to be ended.
    ///
    /// # Errors
    /// See [`QmpError`]; so for all of these.
    pub async fn insert_fill(&self, disk: &str, from: &Path, room_fds: (OwnedFd, OwnedFd)) -> Result<(), QmpError> {
        let (room, server) = (room(disk), server(disk));
        let set = self.add_fd_anew(&room, room_fds.0).await?;
        self.execute_with_fd("add-fd", json!({"fdset-id": set, "opaque": room}), room_fds.1).await?;
        let address = json!({"type": "unix", "path": from});
        let add = json!({"driver": "nbd", "node-name": server, "server": address, "export": disk, "reconnect-delay": RECONNECT, "read-only": true});
        self.execute("blockdev-add", add).await?;
        let file_node = format!("{room}-file");
        let file = json!({"driver": "file", "node-name": file_node, "filename": format!("/dev/fdset/{set}")});
        let add = json!({"driver": "qcow2", "node-name": room, "file": file, "backing": null, "discard": "unmap"});
        self.execute("blockdev-add", add).await?;
        self.execute("blockdev-snapshot", json!({"node": disk, "overlay": room})).await?;
        let lies_on = json!({"driver": "qcow2", "node-name": room, "file": file_node, "backing": server, "discard": "unmap"});
        self.execute("blockdev-reopen", json!({"options": [lies_on]})).await.map(drop)
    }

    /// The disk in this slot is filled from here on.
    ///
    /// # Errors
    /// See [`QmpError`]. Before the guest's devices are loaded it is refused.
    pub async fn begin_fill(&self, slot: usize, disk: &ResolvedDisk) -> Result<(), QmpError> {
        // QEMU 10.0 may still take a disk that nobody used for another host's when the guest runs; that all nodes are its own was said in vain. Older ones do not know the command, nor do so.
        let active = json!({"node-name": disk_node(slot), "active": true});
        let _ = self.execute("blockdev-set-active", active).await;
        // What lies under room cannot be written to, until it is said anew.
        let [_, node] = disk_nodes(slot, disk);
        let node: Value = serde_json::from_str(&node.to_string()).expect("it is JSON");
        self.execute("blockdev-reopen", json!({"options": [node]})).await?;
        let (disk, room) = (disk_node(slot), room(&disk_node(slot)));
        let mirror = json!({
            "job-id": room, "device": room, "target": disk, "sync": "full", "copy-mode": "write-blocking", "granularity": PIECE,
            "buf-size": UNDER_WAY, "on-source-error": "report", "on-target-error": "report", "auto-dismiss": false,
        });
        self.execute("blockdev-mirror", mirror).await.map(drop)
    }

    /// How it is; `None` if nothing is left of it, or was never there.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn fill_state(&self, disk: &str) -> Result<Option<Fill>, QmpError> {
        let room = room(disk);
        if let Some(mirror) = self.mirror_job(&room).await? {
            return Ok(Some(match mirror.ended {
                Some(failed) => Fill::Ended(failed),
                None => Fill::Comes { remaining: mirror.remaining, follows: mirror.follows },
            }));
        }
        Ok(self.size_of_disk(&room).await?.map(|_| Fill::Inserted))
    }

    /// How large the disk is that is served.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn served_size(&self, disk: &str) -> Result<Option<Bytes>, QmpError> {
        Ok(self.size_of_disk(&server(disk)).await?.map(|size| size.size))
    }

    /// Brings the guest to the disk, which follows what it writes, and takes out what was in between.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn end_fill(&self, disk: &str) -> Result<(), QmpError> {
        let room = room(disk);
        let began = Instant::now();
        loop {
            match self.fill_state(disk).await? {
                Some(Fill::Comes { .. }) => {
                    // Said twice it is refused.
                    let _ = self.execute("job-complete", json!({"id": room})).await;
                }
                Some(Fill::Ended(None)) => break,
                None => return Ok(()),
                Some(Fill::Inserted | Fill::Ended(Some(_))) => {
                    return Err(QmpError::TimedOut { command: "job-complete".into(), limit: ENDING });
                }
            }
            if began.elapsed() > ENDING {
                return Err(QmpError::TimedOut { command: "job-complete".into(), limit: ENDING });
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // The job goes last: as long as it is there, nobody takes the room for one that was just inserted.
        for node in [&room, &server(disk)] {
            if self.size_of_disk(node).await?.is_some() {
                self.execute("blockdev-del", json!({"node-name": node})).await?;
            }
        }
        self.remove_fds(&room).await?;
        self.execute("job-dismiss", json!({"id": room})).await.map(drop)
    }

    /// `set-action`: whether QEMU stays when the guest powers off, as it must while a disk is filled.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn stay_at_shutdown(&self, stays: bool) -> Result<(), QmpError> {
        self.execute("set-action", json!({"shutdown": if stays { "pause" } else { "poweroff" }})).await.map(drop)
    }

    /// `remove-fd` of what was added under this name.
    async fn remove_fds(&self, opaque: &str) -> Result<(), QmpError> {
        let sets = self.execute("query-fdsets", Value::Null).await?;
        let is_it = |set: &&Value| set["fds"].as_array().is_some_and(|fds| fds.iter().any(|fd| fd["opaque"] == opaque));
        for set in sets.as_array().into_iter().flatten().filter(is_it) {
            self.execute("remove-fd", json!({"fdset-id": set["fdset-id"]})).await?;
        }
        Ok(())
    }
}
