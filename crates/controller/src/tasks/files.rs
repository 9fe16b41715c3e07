//! Snapshots as files: written by a host that sees their pool, and read by one. No VM is held; the snapshot is in use.

use std::sync::Arc;

use godwit_api::v1::{SnapshotExportRequest, SnapshotImport, SnapshotState};
use godwit_link::v1::{self, command::Action};
use godwit_link::{decode, encode};
use godwit_model::{ErrorCode, Generation, Name, Refusal, SnapshotExport, SnapshotId, SnapshotRequest, TaskId};

use super::snapshot::Taken;
use super::{Outcome, Tasks, conclude, note, patiently};
use crate::clock;
use crate::db::{Batch, Fault, Stored, retry};
use crate::rows::{SnapshotRow, TaskRow, VaultRow, Work};
use crate::snapshots::{check_room, not_ready, pool_there};

/// Who asks for it, and for whom.
pub(crate) struct Asker {
    pub(crate) team: Name,
    pub(crate) principal: String,
}

fn new_task(asker: &Asker, subject: &Name, work: Work, reason: Option<String>) -> TaskRow {
    let (id, principal) = (TaskId::new(clock::fresh()), asker.principal.clone());
    TaskRow { reason, ..TaskRow::new(id, asker.team.clone(), subject.clone(), principal, work, clock::now()) }
}

impl Tasks {
    /// Records that a snapshot is to be written as files, and begins.
    pub(crate) async fn begin_snapshot_export(
        self: &Arc<Self>,
        asker: &Asker,
        name: &Name,
        asked: &SnapshotExportRequest,
    ) -> Result<Stored<TaskRow>, Fault> {
        let id = retry!({
            let snapshot = self.snapshot(&asker.team, name).await?;
            if snapshot.row.state != SnapshotState::Ready {
                return Err(not_ready(&snapshot.row).into());
            }
            let host = self.host_for(&snapshot.row, asked.host.as_ref()).await?;
            let work = Work::SnapshotExport { snapshot: snapshot.row.id, name: name.clone(), host: host.clone(), written: None };
            let mut task = new_task(asker, name, work, asked.reason.clone());
            note(&mut task, format!("to be written on {host}"));
            self.db.commit(Batch::default().unchanged(&snapshot).create(&task)).await?;
            Ok(task.id)
        })?;
        self.accepted(id).await
    }

    async fn accepted(self: &Arc<Self>, id: TaskId) -> Result<Stored<TaskRow>, Fault> {
        let task = self.task(id).await?;
        let (kind, subject) = (task.row.work.kind(), &task.row.subject);
        tracing::info!(task = %id, kind, %subject, principal = task.row.principal, "accepted");
        self.spawn(id);
        Ok(task)
    }

    /// The host that reads a snapshot: the wanted one, else where it was taken, else any that sees its pool.
    async fn host_for(&self, snapshot: &SnapshotRow, wanted: Option<&Name>) -> Result<Name, Fault> {
        let sees = |host: &Name| {
            self.hub.presence(host).is_some_and(|presence| pool_there(&presence.facts.pools, &snapshot.identity).is_some())
        };
        let Some(wanted) = wanted else {
            if sees(&snapshot.host) {
                return Ok(snapshot.host.clone());
            }
            return Ok(self.reach(&snapshot.identity, &snapshot.pool, Some(&snapshot.host))?.0);
        };
        self.known(wanted).await?;
        if self.hub.presence(wanted).is_none() {
            return Err(super::host_down(wanted).into());
        }
        if sees(wanted) {
            return Ok(wanted.clone());
        }
        let message = format!("host {wanted} does not have the pool {} that holds snapshot {}", snapshot.pool, snapshot.name);
        Err(Refusal::new(ErrorCode::PoolUnavailable, message).hint("leave the host away, or choose one that has it").into())
    }

    pub(super) async fn run_snapshot_export(&self, id: TaskId) -> Result<(), Fault> {
        let task = self.task(id).await?.row;
        let Work::SnapshotExport { name, host, .. } = &task.work else { return Ok(()) };
        let (outcome, written) = match self.exporting(&task.team, name, host).await {
            Ok(action) => {
                self.set_step(id, &format!("writes files on {host}")).await?;
                tokio::select! {
                    answer = self.command(id, host, "export", action) => match answer? {
                        Err(refusal) => (Outcome::Failed(refusal), None),
                        Ok(answer) => match decode::<SnapshotExport>("export", &answer.result) {
                            Ok(written) => (Outcome::Done, Some(written)),
                            Err(malformed) => (Outcome::Failed(malformed.into()), None),
                        },
                    },
                    cancelled = self.cancelled(id) => {
                        cancelled?;
                        let refusal = Refusal::new(ErrorCode::Cancelled, "no longer waits; the host may go on, and the export be there later");
                        (Outcome::Cancelled(refusal), None)
                    }
                }
            }
            Err(Fault::Refused(refusal)) => (Outcome::Failed(refusal), None),
            Err(fault) => return Err(fault),
        };
        let task = self
            .edit_alone(id, |task| {
                if task.state.ended() {
                    return;
                }
                if let (Work::SnapshotExport { written: told, .. }, Some(written)) = (&mut task.work, &written) {
                    *told = Some(written.clone());
                }
                if let Some(SnapshotExport { host, path, bytes }) = &written {
                    note(task, format!("{path} on {host}, {bytes}"));
                }
                conclude(task, &outcome);
            })
            .await?;
        Self::tell_end(&task);
        Ok(())
    }

    async fn exporting(&self, team: &Name, name: &Name, host: &Name) -> Result<Action, Fault> {
        let snapshot = self.snapshot(team, name).await?.row;
        let presence = self.hub.presence(host);
        let there = presence.as_ref().and_then(|presence| pool_there(&presence.facts.pools, &snapshot.identity));
        Ok(Action::ExportSnapshot(v1::ExportSnapshot {
            vault: Some(self.vault_at(team, there.unwrap_or(&snapshot.pool)).await?),
            snapshot: Some(self.key_of(&snapshot)?),
            name: name.to_string(),
            memory: snapshot.has_memory(),
            spec: encode(&snapshot.resolved),
            about: super::snapshot::about(&snapshot),
        }))
    }

    /// Records that files are to become a snapshot, and begins.
    pub(crate) async fn begin_snapshot_import(
        self: &Arc<Self>,
        asker: &Asker,
        name: &Name,
        asked: &SnapshotImport,
    ) -> Result<Stored<TaskRow>, Fault> {
        let id = retry!({
            let vm = self.vm(&asker.team, &asked.vm).await?;
            let Some(resolved) = vm.row.resolved.clone() else {
                return Err(Refusal::new(
                    ErrorCode::BadRequest,
                    format!("VM {} has never run: what it is made of is not known", asked.vm),
                )
                .hint(format!("start it once: `godwit vm start {}`", asked.vm))
                .into());
            };
            let others = self.snapshots_of(&asker.team).await?;
            check_room(others.len())?;
            if others.iter().any(|other| other.name == *name) {
                let refusal = Refusal::new(ErrorCode::NameTaken, format!("there is a snapshot {name} already"));
                return Err(refusal.hint("choose another name").into());
            }
            let (host, identity) = self.host_with(&asked.from.pool, asked.host.as_ref(), vm.row.host.as_ref()).await?;
            let snapshot = SnapshotRow {
                id: SnapshotId::new(clock::fresh()),
                name: name.clone(),
                team: asker.team.clone(),
                vm: vm.row.id,
                vm_name: vm.row.name.clone(),
                created: clock::now(),
                pool: asked.from.pool.clone(),
                identity,
                host: host.clone(),
                generation: Generation(0),
                state: SnapshotState::Taking,
                salt: self.authority.draw_salt()?,
                request: SnapshotRequest { memory: asked.memory, quiesce: None },
                spec: vm.row.spec.clone(),
                resolved,
                waiting: vm.row.waiting.clone(),
                figures: None,
                golden: asked.golden,
                principal: asker.principal.clone(),
                reason: asked.reason.clone(),
                schedule: None,
            };
            let work = Work::SnapshotImport { snapshot: snapshot.id, name: name.clone(), from: asked.from.volume.clone(), host };
            let mut task = new_task(asker, name, work, asked.reason.clone());
            note(&mut task, format!("to be read from {} on {}, for {}", asked.from, snapshot.host, asked.vm));
            let batch = Batch::default().unchanged(&vm).create(&snapshot).create(&task);
            let batch = match self.db.find::<VaultRow>(asker.team.as_str()).await? {
                Some(_) => batch,
                None => batch.create(&VaultRow { team: asker.team.clone(), salt: self.authority.draw_salt()? }),
            };
            self.db.commit(batch).await?;
            Ok(task.id)
        })?;
        self.accepted(id).await
    }

    /// A connected host with a pool of this name, and the pool's identity: the wanted one, else the VM's, else any.
    async fn host_with(&self, pool: &Name, wanted: Option<&Name>, own: Option<&Name>) -> Result<(Name, String), Fault> {
        if let Some(wanted) = wanted {
            self.known(wanted).await?;
        }
        let mut able: Vec<(Name, String)> = self
            .hub
            .present()
            .into_iter()
            .filter(|(host, _)| wanted.is_none_or(|wanted| wanted == host))
            .filter_map(|(host, presence)| {
                let found = presence.facts.pools.iter().find(|found| found.name == *pool)?;
                Some((host, found.identity.clone()))
            })
            .collect();
        able.sort_by_key(|(host, _)| (Some(host) != own, host.clone()));
        let none = || {
            let whose = wanted.map_or_else(
                || "no connected host has".to_owned(),
                |wanted| format!("host {wanted} does not have, or is away from,"),
            );
            Refusal::new(ErrorCode::PoolUnavailable, format!("{whose} a pool {pool}"))
                .hint("`godwit pool list` shows the pools that there are, and which hosts have them")
        };
        able.into_iter().next().ok_or_else(|| none().into())
    }

    pub(super) async fn run_snapshot_import(&self, id: TaskId) -> Result<(), Fault> {
        let task = self.task(id).await?.row;
        let Work::SnapshotImport { name, from, host, .. } = &task.work else { return Ok(()) };
        let taken = match self.importing(&task.team, name, from, host).await {
            Ok(action) => {
                self.set_step(id, &format!("reads files on {host}")).await?;
                let answer = self.command_until(id, host, "import", action, self.cancelled(id)).await?;
                Taken::of(answer, name, host)
            }
            Err(Fault::Refused(refusal)) => Taken::Refused(refusal),
            Err(fault) => return Err(fault),
        };
        let outcome = taken.outcome();
        let task = patiently!(id, {
            let mut task = self.task(id).await?;
            if task.row.state.ended() {
                return Ok(task.row);
            }
            conclude(&mut task.row, &outcome);
            let batch = Batch::default().update(&task);
            let batch = match self.db.find::<SnapshotRow>(&format!("{}/{name}", task.row.team)).await? {
                Some(snapshot) => taken.note(batch, snapshot),
                None => batch,
            };
            self.db.commit(batch).await?;
            Ok(task.row)
        })?;
        Self::tell_end(&task);
        Ok(())
    }

    async fn importing(&self, team: &Name, name: &Name, from: &Name, host: &Name) -> Result<Action, Fault> {
        let snapshot = self.snapshot(team, name).await?.row;
        let presence = self.hub.presence(host);
        let there = presence.as_ref().and_then(|presence| pool_there(&presence.facts.pools, &snapshot.identity));
        Ok(Action::ImportSnapshot(v1::ImportSnapshot {
            vault: Some(self.vault_at(team, there.unwrap_or(&snapshot.pool)).await?),
            snapshot: Some(self.key_of(&snapshot)?),
            known: self.known_to(&snapshot).await?,
            from: from.to_string(),
            memory: snapshot.request.memory,
            spec: encode(&snapshot.resolved),
            about: super::snapshot::about(&snapshot),
        }))
    }
}
