//! A VM that begins as it was in a snapshot: its disks are made what they were, then it runs as soon as its devices are loaded, and its memory follows.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_model::{ErrorCode, Grant, Refusal, ResolvedSpec, RestoreFigures, RunState, VolumeRef};
use godwit_qemu::qmp::views::{MigrationStatus, RunStatus};
use godwit_qemu::{PassedFds, Start};
use tracing::Instrument;

use super::actor::{Actor, RETRY, qemu_failed};
use super::change::{open_disk, open_flash};
use super::disks::{self, nodes};
use super::moving::millis;
use super::playing::{Playing, player, unexpected, wait_for};
use crate::host::{host_failed, unix_now};
use crate::journal::{Holding, VmRecord};
use crate::snapshot::{Changed, DiskTo, FromSnapshot, Job, Restored, Said, Worker};

/// How long QEMU may take to load the devices.
const LOADING: Duration = Duration::from_secs(60);

impl Actor {
    /// Starts the VM out of a snapshot.
    pub(super) async fn start_from(
        &mut self,
        grant: &Grant,
        spec: ResolvedSpec,
        from: &FromSnapshot,
    ) -> Result<RestoreFigures, Refusal> {
        let made: Vec<VolumeRef> = if from.fresh && self.record.is_none() { spec.volumes().cloned().collect() } else { vec![] };
        for volume in &made {
            if self.host.pools.exists(volume).await? {
                return Err(Refusal::new(ErrorCode::InUse, format!("there is a volume {volume} already"))
                    .hint("delete it if nobody needs it, or choose another name for the VM"));
            }
        }
        let begun = self.begin_from(grant, spec, from).await;
        if begun.is_err() {
            for volume in &made {
                if let Err(refusal) = self.host.pools.delete(volume).await {
                    tracing::warn!(%volume, message = refusal.message, "what was made of the VM's disks stays");
                }
            }
        }
        begun
    }

    async fn begin_from(&mut self, grant: &Grant, spec: ResolvedSpec, from: &FromSnapshot) -> Result<RestoreFigures, Refusal> {
        // Before anything is changed: a snapshot that is not there, or does not open.
        let changed = self.take_remembered(grant, &spec, from).await;
        let (mut worker, qemus) = self.start_worker_of(from, &spec, changed).await?;
        for disk in &spec.disks {
            drop(open_disk(&self.host, disk, Start::Fresh).await?);
        }
        open_flash(&self.host, &spec, Start::Fresh, &[], &mut PassedFds::new()).await?;
        let began = Instant::now();
        let new = VmRecord::new(spec.clone(), grant.generation, 0, Holding::Owner);
        self.begin(VmRecord { out_of_snapshot: from.memory, ..new }, Start::Incoming).await?;
        let mut figures = RestoreFigures { qemu_ms: millis(began.elapsed()).get(), ..RestoreFigures::default() };
        let restored = async {
            self.restore_disks(&mut worker, from, &mut figures).await?;
            match qemus {
                Some((player, qemus)) => {
                    self.remember_from_here(from).await;
                    self.restore_memory(from, (player, qemus), &mut figures).await
                }
                None => self.boot(grant, spec, from, &mut figures).await,
            }
        };
        if let Err(refusal) = restored.await {
            if let Some(record) = &mut self.record {
                record.end_wanted = true;
            }
            self.end_process().await;
            self.forsake_tpm().await;
            return Err(refusal);
        }
        Ok(figures)
    }

    /// Whether a QEMU of ours has loaded what it is to run with. One that waits for a page may be slow to say so; one that never does is of no use.
    pub(super) async fn has_loaded(&mut self) -> bool {
        let began = Instant::now();
        loop {
            if self.qmp.is_none() {
                self.connect().await;
            }
            if let Ok(qmp) = self.monitor()
                && let Ok(status) = qmp.query_status().await
            {
                return status.status != RunStatus::InMigrate;
            }
            if began.elapsed() > LOADING || self.process.as_ref().is_none_or(|process| !process.is_alive()) {
                return false;
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// A VM whose memory came out of a snapshot, and does not any more, while no agent looked: nobody here has the key to have another worker play on, as [`Playing`] does.
    pub(super) async fn end_what_waits_for_a_snapshot(&mut self) {
        let is_seen_to = self.playing.as_ref().is_some_and(|playing| !playing.is_finished());
        let is_it = self.record.as_ref().is_some_and(|record| record.out_of_snapshot && record.holding == Holding::Owner);
        let is_it = is_it && !is_seen_to;
        let Some(qmp) = self.qmp.as_ref().filter(|_| is_it) else { return };
        if !matches!(qmp.migration().await, Ok(MigrationStatus::PostcopyPaused)) {
            return;
        }
        tracing::error!("memory of the VM does not come out of its snapshot any more: it is ended");
        self.end_reason.set("ended since its memory cannot come out of the snapshot: the vault worker is gone".into());
        self.end_process().await;
    }

    /// The workers, when they have opened the snapshot: of its disks, and of its memory with QEMU's end of the connection.
    async fn start_worker_of(
        &self,
        from: &FromSnapshot,
        spec: &ResolvedSpec,
        mut changed: BTreeMap<String, Changed>,
    ) -> Result<(Worker, Option<(Worker, UnixStream)>), Refusal> {
        let host = &self.host;
        let of_disk = |(node, _): (String, VolumeRef)| DiskTo { changed: changed.remove(&node), node };
        let disks = nodes(spec).into_iter().map(of_disk).collect();
        let directory = host.pools.vault(&from.vault.pool, &from.vault.team, host.vault_uid()).await?;
        let job = Job::Restore { snapshot: from.snapshot.clone(), disks };
        let mut worker = Worker::start(host, directory, job, PassedFds::new()).await?;
        wait_for(&mut worker, &Said::Ready).await?;
        if !from.memory {
            return Ok((worker, None));
        }
        let (ours, qemus) = UnixStream::pair().map_err(|error| host_failed("no socket pair", &error))?;
        Ok((worker, Some((player(host, from, ours, false).await?, qemus))))
    }

    async fn restore_disks(&self, worker: &mut Worker, from: &FromSnapshot, figures: &mut RestoreFigures) -> Result<(), Refusal> {
        let (began, qmp) = (Instant::now(), self.monitor()?.clone());
        let Some(spec) = self.record.as_ref().map(|record| &record.spec) else { return Ok(()) };
        let mut nodes = nodes(spec).into_iter();
        if nodes.len() > 0 {
            disks::serve(&self.host, self.vm, &qmp).await?;
        }
        let restored = loop {
            match worker.hear().await? {
                Said::NextDisk => {
                    let Some((node, _)) = nodes.next() else { return Err(unexpected()) };
                    qmp.export_disk(&node, true, None).await.map_err(qemu_failed)?;
                    worker.pass_disk(&disks::connect(&self.host, self.vm)?)?;
                }
                Said::Done(told) => break serde_json::from_value::<Restored>(told).unwrap_or_default(),
                _ => return Err(unexpected()),
            }
        };
        qmp.stop_serving_disks().await.map_err(qemu_failed)?;
        let Restored { read, written } = restored;
        (figures.disks_ms, figures.disks_read, figures.disks_written) = (millis(began.elapsed()).get(), read, written);
        tracing::info!(id = %from.snapshot.id, %read, %written, "the disks are as they were");
        Ok(())
    }

    /// The disks are what they were in the snapshot, and no vCPU has run: what is written from here on is what differs from it.
    async fn remember_from_here(&self, from: &FromSnapshot) {
        let (Ok(qmp), Some(record)) = (self.monitor(), &self.record) else { return };
        let disks: Vec<String> = nodes(&record.spec).into_iter().map(|(node, _)| node).collect();
        if let Err(error) = qmp.begin_since(&disks, from.snapshot.id).await {
            tracing::info!(%error, "what is written since the snapshot is not known: the next one reads the disks whole");
        }
    }

    async fn restore_memory(
        &mut self,
        from: &FromSnapshot,
        (mut player, qemus): (Worker, UnixStream),
        figures: &mut RestoreFigures,
    ) -> Result<(), Refusal> {
        let (began, qmp) = (Instant::now(), self.monitor()?.clone());
        qmp.begin_restore(qemus).await.map_err(qemu_failed)?;
        let late = |_| {
            let message = format!("QEMU did not load the VM's devices within {LOADING:?}");
            Err(Refusal::new(ErrorCode::QemuFailed, message).hint("look at the VM's log on its host"))
        };
        tokio::time::timeout(LOADING, wait_for(&mut player, &Said::Loaded)).await.unwrap_or_else(late)?;
        // From here on QEMU waits for what does not come, in whatever it is told to do.
        self.see_to_memory(from, Some(player));
        // What was plugged in then is so again with the devices; what must not be is not when the guest runs.
        self.plug_out().await?;
        self.publish_tpm().await?;
        self.announce_by_host();
        qmp.cont().await.map_err(qemu_failed)?;
        self.state = RunState::Running;
        (figures.memory_ms, figures.ran_at) = (millis(began.elapsed()).get(), unix_now());
        self.settle_tpm().await;
        Ok(())
    }

    /// Has memory come until all is there. Without a player, an agent that is no more has started one.
    fn see_to_memory(&mut self, from: &FromSnapshot, player: Option<Worker>) {
        let (Some(process), Ok(qmp)) = (self.process.clone(), self.monitor()) else { return };
        let (host, qmp, reason) = (Arc::clone(&self.host), qmp.clone(), self.end_reason.clone());
        let playing = Playing { host, process, qmp, from: from.clone(), reason, spare: None };
        self.playing = Some(tokio::spawn(playing.see_to_the_end(player).in_current_span()));
    }

    /// The VM was begun out of this snapshot by an agent that is no more; what that one knew is known again.
    pub(super) async fn see_to_memory_again(&mut self, from: &FromSnapshot) {
        let Ok(qmp) = self.monitor() else { return };
        let is_watched = self.playing.as_ref().is_some_and(|playing| !playing.is_finished());
        if from.memory && !is_watched && qmp.migration().await.is_ok_and(|status| status.needs_pages()) {
            self.see_to_memory(from, None);
        }
    }

    /// Without memory it boots, from the disks that it was given.
    async fn boot(
        &mut self,
        grant: &Grant,
        spec: ResolvedSpec,
        from: &FromSnapshot,
        figures: &mut RestoreFigures,
    ) -> Result<(), Refusal> {
        if let Some(record) = &mut self.record {
            record.end_wanted = true;
        }
        self.end_process().await;
        self.forsake_tpm().await;
        let began = Instant::now();
        self.begin(VmRecord::new(spec, grant.generation, 0, Holding::Owner), Start::Fresh).await?;
        figures.qemu_ms = figures.qemu_ms.saturating_add(millis(began.elapsed()).get());
        self.remember_from_here(from).await;
        self.run_on().await?;
        figures.ran_at = unix_now();
        Ok(())
    }
}
