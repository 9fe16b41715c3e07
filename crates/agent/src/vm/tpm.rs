//! The TPM of a VM: started before its QEMU, ended after it, and its state handed over when the VM moves.
//!
//! A VM that starts has a TPM on the volume of its state. One that comes has it on a file of its own, which takes the volume's name before the
//! first vCPU runs here, is taken back if none ever does, and is alone once the source is gone; see [`Successor`].

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use godwit_migration::DestinationRecord;
use godwit_model::{ErrorCode, Refusal, VolumeRef};
use godwit_qemu::Start;
use godwit_qemu::cage::tool;
use godwit_qemu::process::{Exit, QemuProcess};
use godwit_qemu::tpm::{self, TpmStart};

use super::actor::Actor;
use crate::host::host_failed;
use crate::journal::{Holding, VmRecord};
use crate::storage::Successor;

/// Time that a TPM has to end by itself after its QEMU.
pub(super) const TPM_GRACE: Duration = Duration::from_secs(2);

impl Actor {
    /// Starts the TPM of a VM that has one, and answers QEMU's end of its control socket.
    pub(super) async fn start_tpm(
        &mut self,
        record: &VmRecord,
        start: Start,
        cgroup: Option<PathBuf>,
    ) -> Result<Option<OwnedFd>, Refusal> {
        let Some(wanted) = &record.spec.platform.tpm else { return Ok(None) };
        let host = Arc::clone(&self.host);
        let program = tool::find("swtpm").filter(|_| host.facts.tpm).ok_or_else(no_tpm)?;
        let (arriving, state) = match start {
            Start::Fresh => (None, host.pools.open_tpm(&wanted.state, record.uid).await?),
            Start::Incoming => {
                let (arriving, state) = host.pools.begin_tpm(&wanted.state, record.uid).await?;
                (Some(arriving), state)
            }
        };
        if let Some(record) = &mut self.record {
            record.tpm.arriving = arriving;
        }
        let failed = |error: &dyn std::error::Error| host_failed("the VM's TPM could not be started", error);
        let log = host.log(&host.log_name(&record.spec.name, self.vm)).map_err(|error| failed(&error))?;
        let begin = TpmStart { program: &program, uid: record.uid, cgroup, state, log: log.into() };
        let (process, control) = tpm::start(&host.launcher, begin).await.map_err(|error| failed(&error))?;
        if let Some(record) = &mut self.record {
            record.tpm.process = Some(process.identity().clone());
        }
        self.tpm = Some(Arc::new(process));
        Ok(Some(control))
    }

    /// Finds the TPM of a VM again; one that is gone is missed when QEMU is looked at.
    pub(super) fn adopt_tpm(&mut self, record: &VmRecord) {
        self.tpm = record.tpm.process.as_ref().and_then(|identity| QemuProcess::adopt(identity).ok()).map(Arc::new);
    }

    /// Waits for the end of the TPM for as long as `grace`, and ends it then.
    pub(super) async fn end_tpm(&mut self, grace: Duration) {
        let Some(tpm) = self.tpm.take() else { return };
        if tokio::time::timeout(grace, tpm.exited()).await.is_err() {
            tracing::info!("ends the VM's TPM");
            tpm.kill();
            tpm.exited().await;
        }
    }

    /// The TPM has ended. Together with QEMU it may; alone it has failed.
    pub(super) async fn on_tpm_exit(&mut self, exit: Exit) {
        self.tpm = None;
        let Some(process) = self.process.clone() else { return };
        if tokio::time::timeout(TPM_GRACE, process.exited()).await.is_err() {
            tracing::error!(?exit, "the VM's TPM has failed: its guest has none until it is stopped and started");
        }
    }

    /// Nothing has come of a start: neither its TPM nor a file for one is left.
    pub(super) async fn forsake_tpm(&mut self) {
        self.end_tpm(Duration::ZERO).await;
        if let Err(refusal) = self.withdraw_tpm().await {
            // It never had the volume's name: in time it is taken for abandoned.
            tracing::warn!(message = refusal.message, "the room for the state of a TPM stays");
        }
    }

    /// From here on the state that came with the VM is the volume.
    pub(super) async fn publish_tpm(&self) -> Result<(), Refusal> {
        match self.arriving() {
            Some((volume, state)) => self.host.pools.publish_tpm(volume, state).await,
            None => Ok(()),
        }
    }

    async fn withdraw_tpm(&self) -> Result<(), Refusal> {
        match self.arriving() {
            Some((volume, state)) => self.host.pools.withdraw_tpm(volume, state).await,
            None => Ok(()),
        }
    }

    /// Before a move to here is declined: whether the volume is the source's again.
    pub(super) async fn decline_tpm(&self) -> bool {
        let Err(refusal) = self.withdraw_tpm().await else { return true };
        tracing::warn!(message = refusal.message, "the state of the VM's TPM was not given back");
        let held = self.record.as_ref().map(|record| &record.holding);
        // Before it was activated nothing was taken.
        !matches!(held, Some(Holding::Destination(incoming)) if incoming.record == DestinationRecord::Activated)
    }

    /// The source is gone for good, and its state with it.
    pub(super) async fn settle_tpm(&mut self) {
        let Some((volume, state)) = self.arriving() else { return };
        if let Err(refusal) = self.host.pools.settle_tpm(volume, state).await {
            // Tried again by the agent's next life; what had the name before does no harm.
            return tracing::warn!(message = refusal.message, "the state that the VM's TPM had on its source stays");
        }
        if let Some(record) = &mut self.record {
            record.tpm.arriving = None;
        }
        self.save_or_log();
    }

    fn arriving(&self) -> Option<(&VolumeRef, &Successor)> {
        let record = self.record.as_ref()?;
        Some((&record.spec.platform.tpm.as_ref()?.state, record.tpm.arriving.as_ref()?))
    }
}

fn no_tpm() -> Refusal {
    Refusal::new(ErrorCode::HostIncompatible, "this host has no swtpm that could be a VM's TPM")
        .hint("install the package swtpm and restart the agent")
}
