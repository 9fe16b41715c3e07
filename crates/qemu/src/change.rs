//! Changes to a VM that runs: media, limits, cables, sizes, disks, interfaces, memory. Each is done or refused as a whole; the caller writes down what the
//! VM is made of from then on, so that a later migration's destination starts as the same machine.

use std::os::fd::OwnedFd;
use std::time::Duration;

use godwit_model::{Bytes, BytesPerSec, Dimm, DimmAddress, IoLimits, Platform, ResolvedDisk, ResolvedNic};
use serde_json::{Value, json};

use crate::command::devices::{
    disk_device, disk_name, disk_nodes, disk_set, drive_name, medium_name, medium_nodes, nic_backend, nic_device,
};
use crate::command::memory::{dimm_backend, dimm_backend_name, dimm_device, dimm_name};
use crate::qmp::views::BlockDevice;
use crate::qmp::{Notice, Qmp, QmpError};

/// How long a guest may take to let go of a device.
const RELEASE: Duration = Duration::from_secs(20);

/// Why a device was not taken out.
#[derive(Debug, thiserror::Error)]
pub enum UnplugError {
    /// QEMU refused.
    #[error("QEMU refused")]
    Qmp(#[from] QmpError),
    /// The guest did not let go of it; it is still there.
    #[error("the guest did not let go of the device within {} s", RELEASE.as_secs())]
    Kept,
}

/// An object of ours as an argument.
fn arguments(object: &impl ToString) -> Value {
    serde_json::from_str(&object.to_string()).unwrap_or(Value::Null)
}

impl Qmp {
    /// `block_set_io_throttle`: what a disk may do in a second; without any limit: all it can.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn set_io_limits(&self, slot: usize, limits: IoLimits) -> Result<(), QmpError> {
        let IoLimits { iops, read_iops, write_iops, rate, read_rate, write_rate } = limits;
        let bytes = |rate: Option<BytesPerSec>| rate.map_or(0, BytesPerSec::get);
        // QEMU means the part of the device that has the disk, which for virtio is behind it.
        let node = format!("disk{slot}");
        let has_disk = |device: &BlockDevice| {
            device.inserted.as_ref().and_then(|inserted| inserted.node_name.as_deref()) == Some(node.as_str())
        };
        let device = self.query_block().await?.into_iter().find(has_disk).and_then(|device| device.qdev);
        let limits = json!({
            "id": device.unwrap_or_else(|| format!("{node}-device")),
            "iops": iops.unwrap_or(0), "iops_rd": read_iops.unwrap_or(0), "iops_wr": write_iops.unwrap_or(0),
            "bps": bytes(rate), "bps_rd": bytes(read_rate), "bps_wr": bytes(write_rate),
        });
        self.execute("block_set_io_throttle", limits).await.map(drop)
    }

    /// `set_link`: plugs an interface's cable in or out.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn set_link(&self, slot: usize, up: bool) -> Result<(), QmpError> {
        self.execute("set_link", json!({"name": format!("net{slot}"), "up": up})).await.map(drop)
    }

    /// `block_resize`: a disk's size as the guest sees it, for a volume whose file is as large already, or that QEMU makes larger.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn resize_disk(&self, slot: usize, size: Bytes) -> Result<(), QmpError> {
        self.execute("block_resize", json!({"node-name": format!("disk{slot}"), "size": size.get()})).await.map(drop)
    }

    /// Changes what is in a CD-ROM drive, whether the guest has locked it or not. `medium` is opened read-only; none: the drive is empty
    /// afterwards. The new medium is made ready before the old one is taken out, so that a failure leaves the old one.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn change_medium(&self, drive: usize, medium: Option<OwnedFd>) -> Result<(), QmpError> {
        let id = drive_name(drive);
        let before = self.query_block().await?.into_iter().find(|device| device.qdev.as_deref() == Some(&id));
        let before = before.and_then(|device| device.inserted).and_then(|inserted| inserted.node_name);
        let ready = match medium {
            Some(fd) => {
                let set = self.add_fd_anew("medium", fd).await?;
                let [file, node] = medium_nodes(set);
                for node in [file, node] {
                    if let Err(error) = self.execute("blockdev-add", arguments(&node)).await {
                        self.drop_medium(&medium_name(set)).await;
                        return Err(error);
                    }
                }
                Some(medium_name(set))
            }
            None => None,
        };
        self.execute("blockdev-open-tray", json!({"id": id, "force": true})).await?;
        self.execute("blockdev-remove-medium", json!({"id": id})).await?;
        if let Some(node) = ready {
            self.execute("blockdev-insert-medium", json!({"id": id, "node-name": node})).await?;
        }
        self.execute("blockdev-close-tray", json!({"id": id})).await?;
        if let Some(node) = before {
            self.drop_medium(&node).await;
        }
        Ok(())
    }

    /// Lets go of a medium that is in no drive. What does not exist any more is let go of already.
    async fn drop_medium(&self, node: &str) {
        let _ = self.execute("blockdev-del", json!({"node-name": node})).await;
        let _ = self.execute("blockdev-del", json!({"node-name": format!("{node}-file")})).await;
        if let Some(set) = node.strip_prefix("medium").and_then(|set| set.parse::<u32>().ok()) {
            let _ = self.execute("remove-fd", json!({"fdset-id": set})).await;
        }
    }

    /// `add-fd` into a set of its own, whose number QEMU chooses.
    pub(crate) async fn add_fd_anew(&self, opaque: &str, fd: OwnedFd) -> Result<usize, QmpError> {
        let answer = self.execute_with_fd("add-fd", json!({"opaque": opaque}), fd).await?;
        Ok(answer.get("fdset-id").and_then(Value::as_u64).and_then(|set| usize::try_from(set).ok()).unwrap_or(usize::MAX))
    }

    /// Whether the interface is there.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn has_nic(&self, slot: usize) -> Result<bool, QmpError> {
        self.has_device(&format!("net{slot}")).await
    }

    /// Whether the disk is there.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn has_disk(&self, slot: usize) -> Result<bool, QmpError> {
        self.has_device(&disk_name(slot)).await
    }

    async fn has_device(&self, id: &str) -> Result<bool, QmpError> {
        let devices = self.execute("qom-list", json!({"path": "/machine/peripheral"})).await?;
        Ok(devices.as_array().is_some_and(|all| all.iter().any(|one| one.get("name").and_then(Value::as_str) == Some(id))))
    }

    /// Size of a disk as the guest sees it.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn disk_size(&self, slot: usize) -> Result<Option<Bytes>, QmpError> {
        let nodes = self.execute("query-named-block-nodes", json!({"flat": true})).await?;
        let name = format!("disk{slot}");
        let node = nodes.as_array().into_iter().flatten().find(|node| node["node-name"].as_str() == Some(&name));
        Ok(node.and_then(|node| node["image"]["virtual-size"].as_u64()).map(Bytes))
    }

    /// Puts an interface into a root port. On failure nothing is left of it.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn plug_nic(&self, slot: usize, nic: &ResolvedNic, machine: &str, tap: OwnedFd) -> Result<(), QmpError> {
        let name = format!("net{slot}-tap");
        self.getfd(&name, tap).await?;
        self.execute("netdev_add", arguments(&nic_backend(slot).with("fd", name.clone()).with("vhost", false))).await?;
        if let Err(error) = self.execute("device_add", arguments(&nic_device(slot, nic, machine))).await {
            let _ = self.execute("netdev_del", json!({"id": name})).await;
            return Err(error);
        }
        Ok(())
    }

    /// Puts a disk into a root port; `volume` is its file, opened read-only and read-write as for the command line. On failure nothing is left
    /// of it.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn plug_disk(&self, slot: usize, disk: &ResolvedDisk, vcpus: u16, volume: [OwnedFd; 2]) -> Result<(), QmpError> {
        // What an attempt before this one has left.
        self.drop_disk(slot).await;
        let attempt = async {
            for (fd, access) in volume.into_iter().zip(["read-only", "read-write"]) {
                let set = json!({"fdset-id": disk_set(slot), "opaque": format!("disk{slot}-{access}")});
                self.execute_with_fd("add-fd", set, fd).await?;
            }
            for node in disk_nodes(slot, disk) {
                self.execute("blockdev-add", arguments(&node)).await?;
            }
            self.execute("device_add", arguments(&disk_device(slot, disk, vcpus))).await
        };
        let plugged = attempt.await.map(drop);
        if plugged.is_err() {
            self.drop_disk(slot).await;
        }
        plugged
    }

    /// Takes a disk out of its root port, and lets go of its volume. The guest must let go of it first, which takes it seconds.
    ///
    /// # Errors
    /// [`UnplugError::Kept`] where the guest did not.
    pub async fn unplug_disk(&self, slot: usize) -> Result<(), UnplugError> {
        if self.has_disk(slot).await? {
            self.unplug(&disk_name(slot)).await?;
        }
        self.drop_disk(slot).await;
        Ok(())
    }

    /// Lets go of a volume that no device uses. What does not exist any more is let go of already.
    async fn drop_disk(&self, slot: usize) {
        for node in [format!("disk{slot}"), format!("disk{slot}-file")] {
            let _ = self.execute("blockdev-del", json!({"node-name": node})).await;
        }
        let _ = self.execute("remove-fd", json!({"fdset-id": disk_set(slot)})).await;
    }

    /// Takes an interface out of its root port. The guest must let go of it, which takes it seconds.
    ///
    /// # Errors
    /// [`UnplugError::Kept`] where the guest did not.
    pub async fn unplug_nic(&self, slot: usize) -> Result<(), UnplugError> {
        self.unplug(&format!("net{slot}")).await?;
        self.execute("netdev_del", json!({"id": format!("net{slot}-tap")})).await?;
        Ok(())
    }

    /// Whether the DIMM is there, as it is meant to be.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn has_dimm(&self, dimm: &Dimm) -> Result<bool, QmpError> {
        let devices = self.execute("query-memory-devices", Value::Null).await?;
        let known = |data: &Value| {
            let (slot, address, size) = (data["slot"].as_u64()?, data["addr"].as_u64()?, data["size"].as_u64()?);
            Some(Dimm { slot: u8::try_from(slot).ok()?, address: DimmAddress(address), size: Bytes(size) })
        };
        let of_name = |device: &&Value| device["data"]["id"].as_str() == Some(&dimm_name(dimm));
        let there = devices.as_array().into_iter().flatten().find(of_name).and_then(|device| known(&device["data"]));
        Ok(there.as_ref() == Some(dimm))
    }

    /// Gives the guest memory, on the memory node `node` if the rest is bound to it. It must take it (Linux: bring its blocks online). On failure nothing is left of it.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn plug_dimm(&self, dimm: &Dimm, platform: &Platform, node: Option<u32>) -> Result<(), QmpError> {
        let backend = json!({"id": dimm_backend_name(dimm)});
        // What an attempt before this one has left; one in use stays.
        let _ = self.execute("object-del", backend.clone()).await;
        self.execute("object-add", arguments(&dimm_backend(dimm, platform, node))).await?;
        if let Err(error) = self.execute("device_add", arguments(&dimm_device(dimm))).await {
            let _ = self.execute("object-del", backend).await;
            return Err(error);
        }
        Ok(())
    }

    async fn unplug(&self, id: &str) -> Result<(), UnplugError> {
        let mut notices = self.listen();
        self.execute("device_del", json!({"id": id})).await?;
        let deleted = async {
            loop {
                match notices.next().await {
                    Notice::Event(event)
                        if event.name == "DEVICE_DELETED" && event.data.get("device").and_then(Value::as_str) == Some(id) =>
                    {
                        return true;
                    }
                    Notice::Ended(_) => return false,
                    _ => {}
                }
            }
        };
        if tokio::time::timeout(RELEASE, deleted).await.unwrap_or(false) { Ok(()) } else { Err(UnplugError::Kept) }
    }
}
