//! A VM that begins as it was in a snapshot: it runs as soon as its devices are loaded, and its memory follows, and then its disks ([`super::fill`]). Disks of which little is to be looked at, and the variables of
//! its firmware, are made what they were before.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_model::{ErrorCode, Grant, Refusal, ResolvedSpec, RestoreFigures, RunState, VolumeRef};
use godwit_qemu::disks::disk_node;
use godwit_qemu::qmp::views::{MigrationStatus, RunStatus};
use godwit_qemu::{PassedFds, Start};
use tracing::Instrument;

use super::actor::{Actor, Answer, RETRY, qemu_failed};
use super::change::{open_disk, open_flash};
use super::disks::{self, nodes};
use super::fill::{Reply, ToFill};
use super::moving::millis;
use super::playing::{Playing, opened, player, unexpected, wait_for};
use crate::host::{host_failed, unix_now};
use crate::journal::{Holding, VmRecord};
use crate::snapshot::{Changed, DiskTo, FromSnapshot, Job, Restored, Said, Worker};

/// How long QEMU may take to load the devices.
const LOADING: Duration = Duration::from_secs(60);

/// Workers that have opened the snapshot.
struct Workers {
    /// Makes these disks what they were.
    disks: Option<(Worker, Vec<String>)>,
    /// Serve disks that come while the VM runs.
    servers: Vec<ToFill>,
    /// Plays memory, with QEMU's end of the connection.
    player: Option<(Worker, UnixStream)>,
}

impl Actor {
    /// Answers when the VM is whole.
    pub(super) async fn on_start_from(&mut self, grant: Grant, spec: ResolvedSpec, from: FromSnapshot, reply: Reply) {
        let started = self.start(grant, spec, Some(&from)).await;
        self.publish();
        self.wake = tokio::time::Instant::now();
        match (started, &mut self.filling) {
            (Ok(figures), Some(filling)) => filling.answer_later(reply, figures.unwrap_or_default()),
            (Ok(figures), None) => {
                let result = figures.map(|figures| godwit_link::encode(&figures)).unwrap_or_default();
                let _ = reply.send(Ok(Answer { result, ..Answer::default() }));
            }
            (Err(refusal), _) => {
                tracing::info!(code = %refusal.code, message = refusal.message, "refused");
                let _ = reply.send(Err(refusal));
            }
        }
    }

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
        let Workers { disks, servers, player } = self.start_workers(from, &spec, changed).await?;
        for disk in &spec.disks {
            drop(open_disk(&self.host, disk, Start::Fresh).await?);
        }
        open_flash(&self.host, &spec, Start::Fresh, &[], &mut PassedFds::new()).await?;
        let began = Instant::now();
        let filling: Vec<String> = servers.iter().map(ToFill::node).collect();
        let new = || VmRecord { filling: filling.clone(), ..VmRecord::new(spec.clone(), grant.generation, 0, Holding::Owner) };
        // One that boots does so on disks that are ready.
        let waits = from.memory || disks.is_some();
        let start = if waits { Start::Incoming } else { Start::Fresh };
        self.begin(VmRecord { out_of_snapshot: from.memory, ..new() }, start).await?;
        let mut figures = RestoreFigures { qemu_ms: millis(began.elapsed()).get(), ..RestoreFigures::default() };
        let restored = async {
            let made = match disks {
                Some((worker, disks)) => self.restore_disks(worker, from, disks, &mut figures).await?,
                None => vec![],
            };
            if from.memory || !waits {
                self.remember_from_here(from, &made).await;
            } else {
                self.begin_to_boot(new(), from, &made, &mut figures).await?;
            }
            let servers = self.insert_fills(from, servers).await?;
            match player {
                Some(played) => self.restore_memory(from, played, &mut figures).await?,
                None => {
                    self.run_on().await?;
                    figures.ran_at = unix_now();
                }
            }
            self.begin_filling(servers)
        };
        if let Err(refusal) = restored.await {
            if let Some(record) = &mut self.record {
                record.end_wanted = true;
            }
            self.end_process().await;
            self.forsake_tpm().await;
            // It may have been ended because its memory cannot come: that is said, and not that QEMU is gone.
            return Err(self.why_it_ended(refusal));
        }
        Ok(figures)
    }

    /// Whether a QEMU of ours has loaded what it is to run with. One that waits for a page may be slow to say so; one that never does is of no use. One that has never run may lack
    /// disks that are to come.
    pub(super) async fn has_loaded(&mut self) -> bool {
        let fills = self.record.as_ref().is_some_and(|record| !record.filling.is_empty());
        let began = Instant::now();
        loop {
            if self.qmp.is_none() {
                self.connect().await;
            }
            if let Ok(qmp) = self.monitor()
                && let Ok(status) = qmp.query_status().await
            {
                return status.status != RunStatus::InMigrate && !(fills && status.status == RunStatus::Prelaunch);
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

    /// The workers, when they have opened the snapshot.
    async fn start_workers(
        &self,
        from: &FromSnapshot,
        spec: &ResolvedSpec,
        mut changed: BTreeMap<String, Changed>,
    ) -> Result<Workers, Refusal> {
        let host = &self.host;
        let mut servers = Vec::new();
        for (slot, disk) in spec.disk_slots().filter(|(slot, _)| !changed.contains_key(&disk_node(*slot))) {
            servers.push(ToFill::begin(host, from, slot, disk).await?);
        }
        let comes: Vec<String> = servers.iter().map(ToFill::node).collect();
        let made: Vec<String> = nodes(spec).into_iter().map(|(node, _)| node).filter(|node| !comes.contains(node)).collect();
        let mut disks = None;
        // Whoever has nothing else to do sees that the snapshot can be opened.
        if !made.is_empty() || comes.is_empty() && !from.memory {
            let to = made.iter().map(|node| DiskTo { changed: changed.remove(node), node: node.clone() }).collect();
            let directory = host.pools.vault(&from.vault.pool, &from.vault.team, host.vault_uid()).await?;
            let job = Job::Restore { snapshot: from.snapshot.clone(), disks: to };
            let mut worker = Worker::start(host, directory, job, PassedFds::new()).await?;
            opened(&mut worker).await?;
            disks = Some((worker, made));
        }
        if !from.memory {
            return Ok(Workers { disks, servers, player: None });
        }
        let (ours, qemus) = UnixStream::pair().map_err(|error| host_failed("no socket pair", &error))?;
        Ok(Workers { disks, servers, player: Some((player(host, from, ours, false).await?, qemus)) })
    }

    /// Makes these disks what they were; the same disks.
    async fn restore_disks(
        &self,
        mut worker: Worker,
        from: &FromSnapshot,
        disks: Vec<String>,
        figures: &mut RestoreFigures,
    ) -> Result<Vec<String>, Refusal> {
        let (began, qmp) = (Instant::now(), self.monitor()?.clone());
        let mut nodes = disks.iter();
        if !disks.is_empty() {
            disks::serve(&self.host, self.vm, &qmp).await?;
        }
        let restored = loop {
            match worker.hear().await? {
                Said::NextDisk => {
                    let Some(node) = nodes.next() else { return Err(unexpected()) };
                    qmp.export_disk(node, true, None).await.map_err(qemu_failed)?;
                    worker.pass_disk(&disks::connect(&self.host, self.vm)?)?;
                }
                Said::Done(told) => break serde_json::from_value::<Restored>(told).unwrap_or_default(),
                _ => return Err(unexpected()),
            }
        };
        qmp.stop_serving_disks().await.map_err(qemu_failed)?;
        let Restored { read, written } = restored;
        (figures.disks_ms, figures.disks_read, figures.disks_written) = (millis(began.elapsed()).get(), read, written);
        tracing::info!(id = %from.snapshot.id, %read, %written, "disks are as they were");
        Ok(disks)
    }

    /// These disks are what they were in the snapshot, and no vCPU has run: what is written from here on is what differs from it.
    async fn remember_from_here(&self, from: &FromSnapshot, disks: &[String]) {
        let Ok(qmp) = self.monitor() else { return };
        if let Err(error) = qmp.begin_since(disks, from.snapshot.id).await {
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

    /// Without memory it boots: QEMU begins once more, on the disks that the one before was given.
    async fn begin_to_boot(
        &mut self,
        record: VmRecord,
        from: &FromSnapshot,
        made: &[String],
        figures: &mut RestoreFigures,
    ) -> Result<(), Refusal> {
        if let Some(record) = &mut self.record {
            record.end_wanted = true;
        }
        self.end_process().await;
        self.forsake_tpm().await;
        let began = Instant::now();
        self.begin(record, Start::Fresh).await?;
        figures.qemu_ms = figures.qemu_ms.saturating_add(millis(began.elapsed()).get());
        self.remember_from_here(from, made).await;
        Ok(())
    }
}
