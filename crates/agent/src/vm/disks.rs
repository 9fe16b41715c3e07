//! Disks that the other host of a move does not see: each travels in a lane of its own ([`out`], [`into`]), with a carry of its own on either side.
//!
//! At the source a mirror brings what the guest writes to the lane, and ends when the VM stands still: then the destination has all of the disk. At the
//! destination it is a volume once the VM is about to run on it, and at the source it is a spare once the VM runs there. A dirty bitmap, which begins with
//! the VM's stay, says on the way back what is to be copied.
//!
//! The state of a TPM is no disk: QEMU's own stream takes it along.

pub(super) mod into;
pub(super) mod out;

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use godwit_model::{Bytes, BytesPerSec, ErrorCode, Firmware, Generation, Refusal, ResolvedSpec, TravellingDisk, VmId, VolumeRef};
use godwit_qemu::disks::{VARIABLES, disk_node};
use godwit_qemu::qmp::Qmp;

use super::actor::{Actor, Answer, qemu_failed};
use crate::carry::CarryClient;
use crate::host::{Host, host_failed};

/// A disk's carry.
pub(super) struct Lane {
    pub(super) volume: VolumeRef,
    /// Its node in QEMU.
    pub(super) node: String,
    pub(super) size: Bytes,
    pub(super) carry: CarryClient,
    /// What its carry was told that it may take of the wire.
    bandwidth: Option<Option<BytesPerSec>>,
}

impl Lane {
    fn new(volume: &VolumeRef, node: String, size: Bytes, carry: CarryClient) -> Self {
        Self { volume: volume.clone(), node, size, carry, bandwidth: None }
    }

    /// Its carry takes so much of the wire from here on, if that is known.
    pub(super) fn set_bandwidth(&mut self, share: Option<Option<BytesPerSec>>) {
        if let Some(share) = share.filter(|share| self.bandwidth != Some(*share))
            && self.carry.set_bandwidth(share)
        {
            self.bandwidth = Some(share);
        }
    }
}

/// The bitmap of what was written since the VM came on this generation.
fn bitmap_of(generation: Generation) -> String {
    format!("godwit-{generation}")
}

fn generation_of(bitmap: &str) -> Option<u64> {
    bitmap.strip_prefix("godwit-")?.parse().ok()
}

/// The node of a volume in QEMU; none if it is no disk.
fn node_of(spec: &ResolvedSpec, volume: &VolumeRef) -> Option<String> {
    nodes(spec).into_iter().find(|(_, of)| of == volume).map(|(node, _)| node)
}

/// The disks of a VM, as QEMU names them. Media and seeds are none: they do not change.
pub(super) fn nodes(spec: &ResolvedSpec) -> Vec<(String, VolumeRef)> {
    let variables = match &spec.platform.firmware {
        Firmware::Uefi { variables, .. } => Some((VARIABLES.to_owned(), variables.clone())),
        Firmware::Bios => None,
    };
    spec.disk_slots().map(|(slot, disk)| (disk_node(slot), disk.volume.clone())).chain(variables).collect()
}

/// Number of a disk's lane, by its place among those that travel: 0 is that of memory.
fn lane_of(place: usize) -> u16 {
    u16::try_from(place + 1).unwrap_or(u16::MAX)
}

impl Actor {
    /// How large these disks are.
    pub(super) async fn measure_disks(&mut self, generation: Generation, disks: Vec<TravellingDisk>) -> Result<Answer, Refusal> {
        self.owned(generation)?;
        self.runs_here()?;
        let (qmp, Some(record)) = (self.monitor()?, &self.record) else { return Ok(Answer::default()) };
        let mut measured = Vec::new();
        for disk in disks {
            let Some(node) = node_of(&record.spec, &disk.volume) else {
                measured.push(disk);
                continue;
            };
            let found = qmp.size_of_disk(&node).await.map_err(qemu_failed)?;
            let found = found.ok_or_else(|| Refusal::new(ErrorCode::Internal, format!("QEMU has no disk {}", disk.volume)))?;
            measured.push(TravellingDisk { size: found.size, allocated: found.allocated, ..disk });
        }
        Ok(Answer { result: godwit_link::encode(&measured), ..Answer::default() })
    }

    /// What is not empty of these disks, all in all.
    pub(super) async fn allocated(&self, volumes: &[VolumeRef]) -> Result<Bytes, Refusal> {
        let (qmp, Some(record)) = (self.monitor()?, &self.record) else { return Ok(Bytes(0)) };
        let mut all = 0_u64;
        for node in volumes.iter().filter_map(|volume| node_of(&record.spec, volume)) {
            let found = qmp.size_of_disk(&node).await.map_err(qemu_failed)?;
            all = all.saturating_add(found.map_or(0, |found| found.allocated.get()));
        }
        Ok(Bytes(all))
    }

    async fn serve_disks(&self, qmp: &Qmp) -> Result<(), Refusal> {
        serve(&self.host, self.vm, qmp).await
    }

    fn connect_to_disks(&self) -> Result<UnixStream, Refusal> {
        connect(&self.host, self.vm)
    }
}

/// The socket on which a VM's QEMU serves its disks.
fn socket_of(host: &Host, vm: VmId) -> PathBuf {
    host.vm_dir(vm).join("disks")
}

/// Has QEMU serve its disks to this process alone.
pub(super) async fn serve(host: &Host, vm: VmId, qmp: &Qmp) -> Result<(), Refusal> {
    let path = socket_of(host, vm);
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).map_err(|error| host_failed("the VM's disks cannot be served", &error))?;
    qmp.serve_disks(listener.into()).await.map_err(qemu_failed)
}

/// Connects to what QEMU serves.
pub(super) fn connect(host: &Host, vm: VmId) -> Result<UnixStream, Refusal> {
    UnixStream::connect(socket_of(host, vm)).map_err(|error| host_failed("the VM's disks cannot be reached", &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bitmap_tells_its_generation() {
        assert_eq!(generation_of(&bitmap_of(Generation(12))), Some(12));
        for other in ["", "backup", "godwit-", "godwit-x", "godwit--1"] {
            assert_eq!(generation_of(other), None, "{other}");
        }
    }
}
