//! Carries of a move: one for memory and devices, and one for each disk that travels.

use std::os::fd::OwnedFd;

use godwit_model::{Grant, Millis, Name, Refusal};
use godwit_qemu::PassedFds;

use super::actor::Actor;
use crate::carry::{CarryClient, CarryConfig, CarryStart, Role};
use crate::host::host_failed;

/// What of the VM travels, with whom, and how long may nothing arrive.
#[derive(Clone, Copy)]
pub(super) struct LaneStart<'a> {
    /// 0: memory and devices.
    pub(super) lane: u16,
    pub(super) peer: &'a Name,
    pub(super) stall: Millis,
}

impl<'a> LaneStart<'a> {
    /// Of memory and devices.
    pub(super) const fn of_memory(peer: &'a Name, stall: Millis) -> Self {
        Self { lane: 0, peer, stall }
    }
}

impl Actor {
    /// Starts this side's carry of a lane.
    pub(super) async fn start_carry(
        &self,
        role: Role,
        grant: &Grant,
        LaneStart { lane, peer, stall }: LaneStart<'_>,
        qemu: OwnedFd,
        mut fds: PassedFds,
    ) -> Result<CarryClient, Refusal> {
        let host = &self.host;
        let peer_keys = host.peers.keys_of(peer)?;
        let material = host.identity.material();
        let config = CarryConfig {
            role,
            vm: self.vm,
            task: grant.task,
            generation: grant.generation,
            lane,
            peer: peer.clone(),
            peer_keys,
            pages: self.record.as_ref().map_or(0, |record| record.spec.memory_with_dimms().get().div_ceil(4096)),
            qemu_fd: fds.pass(qemu),
            control_fd: -1,
            patience: Millis(stall.get() + 30_000),
            certificate: material.certificate,
            key: material.key,
            authority: material.authority,
        };
        let log = host.log("carry").map_err(|error| host_failed("the log of carry cannot be opened", &error))?;
        let socket = host.carry_socket(self.vm, lane);
        let start = CarryStart { launcher: &host.launcher, uid: host.carry_uid(), socket: &socket, log };
        CarryClient::start(start, config, fds, self.carry_notices.0.clone())
            .await
            .map_err(|error| host_failed("carry could not be started", &error))
    }
}
