//! A VM that begins from a snapshot: a clone at its first start, a suspended VM at its next.

use std::sync::Arc;

use godwit_api::v1::{SnapshotClone, SnapshotState};
use godwit_link::v1;
use godwit_model::{Activity, ErrorCode, Name, Refusal, ResolvedSpec, TaskId, VmId, VmRequest};

use super::admit::{candidates, describe, new_task};
use super::change::in_use;
use super::{Ask, Outcome, Tasks, conclude};
use crate::checks::Candidate;
use crate::clock;
use crate::clones::plan_clone;
use crate::db::{Batch, Fault, Stored, retry};
use crate::history;
use crate::resolve::decide_start_where;
use crate::rows::{Origin, OriginKind, SnapshotRow, TaskRow, VmRow, Work};
use crate::snapshots::{not_ready, pool_there};

impl Tasks {
    /// Records a VM that begins from a snapshot, and starts it unless it is to wait.
    pub(crate) async fn clone_snapshot(
        self: &Arc<Self>,
        ask: &Ask,
        snapshot: &Name,
        asked: &SnapshotClone,
    ) -> Result<Stored<TaskRow>, Fault> {
        let task = retry!({ self.admit_clone(ask, snapshot, asked).await })?;
        tracing::info!(task = %task.id, kind = task.work.kind(), subject = %task.subject, principal = task.principal, "accepted");
        if !task.state.ended() {
            self.spawn(task.id);
        }
        self.task(task.id).await
    }

    async fn admit_clone(&self, ask: &Ask, snapshot: &Name, asked: &SnapshotClone) -> Result<TaskRow, Fault> {
        let stored = self.snapshot(&ask.team, snapshot).await?;
        if stored.row.state != SnapshotState::Ready {
            return Err(not_ready(&stored.row).into());
        }
        let (now, id) = (clock::now(), TaskId::new(clock::fresh()));
        let (vm_id, name) = (VmId::new(clock::fresh()), asked.name.clone());
        let (spec, resolved) = plan_clone(&stored.row, vm_id, &name, asked.memory)?;
        let mut vm = VmRow::new(vm_id, name.clone(), ask.team.clone(), spec, now);
        let vm_name = format!("vmname/{}/{name}", ask.team);
        if self.db.claimed(&vm_name).await?.is_some() {
            return Err(Refusal::new(ErrorCode::NameTaken, format!("there is a VM {name} already"))
                .hint("choose another name")
                .into());
        }
        for key in vm.claims() {
            if self.db.claimed(&key).await?.is_some() {
                return Err(in_use(&key).hint("choose another name for the clone").into());
            }
        }
        vm.resolved = resolved;
        vm.copied = asked.memory.then(|| stored.row.vm_name.clone());
        vm.origin = Some(Origin { snapshot: snapshot.clone(), memory: asked.memory, kind: OriginKind::Clone });
        let before = vm.clone();
        let work = if asked.start {
            self.admit_start(&mut vm, id, asked.host.as_ref()).await?
        } else {
            Work::Clone { snapshot: snapshot.clone() }
        };
        let mut task = new_task(&vm, ask, id, work, now);
        describe(&mut task);
        if asked.start {
            vm.activity = Some(Activity { task: id, request: VmRequest::Start });
        } else {
            conclude(&mut task, &Outcome::Done);
        }
        // Written as it is: it cannot be deleted in the same moment.
        let mut batch = Batch::default().update(&stored).create(&vm).claim(vm_name, &vm.id).create(&task);
        for key in vm.claims() {
            batch = batch.claim(key, &vm.id);
        }
        self.db.commit(history::note(&self.db, batch, &before, &vm, Some(&task)).await?).await?;
        Ok(task)
    }

    /// The snapshot that a VM begins from.
    pub(super) async fn origin_of(&self, team: &Name, origin: &Origin) -> Result<SnapshotRow, Fault> {
        let found = self.db.find::<SnapshotRow>(&format!("{team}/{}", origin.snapshot)).await?;
        match found.map(|found| found.row) {
            Some(row) if row.state == SnapshotState::Ready => Ok(row),
            Some(row) => Err(not_ready(&row).into()),
            None => {
                let message = format!("snapshot {}, which the VM begins from, is gone", origin.snapshot);
                Err(Refusal::new(ErrorCode::NotFound, message).hint("delete the VM").into())
            }
        }
    }

    /// Where a VM begins from a snapshot, and what with.
    pub(super) async fn decide_origin(
        &self,
        vm: &VmRow,
        origin: &Origin,
        wanted: Option<&Name>,
    ) -> Result<(Name, ResolvedSpec), Fault> {
        let mut snapshot = self.origin_of(&vm.team, origin).await?;
        if let (true, Some(resolved)) = (origin.memory, &vm.resolved) {
            snapshot.resolved = resolved.clone();
            let host = self.rollback_host(vm, &snapshot, wanted).await?;
            return Ok((host, snapshot.resolved));
        }
        let (images, networks) = (self.images_of(&vm.team).await?, self.networks_of(&vm.team).await?);
        let present = self.hub.present();
        let sees = |host: Candidate<'_>| match pool_there(&host.facts.pools, &snapshot.identity) {
            Some(_) => Ok(()),
            None => {
                let (host, SnapshotRow { pool, name, .. }) = (host.name, &snapshot);
                let message = format!("host {host} does not have the pool {pool} that holds snapshot {name}");
                Err(Refusal::new(ErrorCode::PoolUnavailable, message)
                    .hint(format!("choose a host that has it, such as {}", snapshot.host)))
            }
        };
        let home = vm.host.clone().filter(|_| vm.has_run());
        let named = (vm.id, &vm.name, &vm.spec);
        let hosts = candidates(&present);
        Ok(decide_start_where(named, home.as_ref(), wanted, &hosts, &|name| images.find(name), &networks, &sees)?)
    }

    /// What a host is told of a VM's origin.
    pub(super) async fn told_of(&self, vm: &VmRow, origin: &Origin, host: &Name) -> Result<v1::FromSnapshot, Fault> {
        let snapshot = self.origin_of(&vm.team, origin).await?;
        let fresh = origin.kind == OriginKind::Clone && !vm.has_run();
        self.snapshot_for(&snapshot, host, origin.memory, fresh).await
    }

    /// What a host is told of the snapshot that a VM begins from there.
    pub(super) async fn snapshot_for(
        &self,
        snapshot: &SnapshotRow,
        host: &Name,
        memory: bool,
        fresh: bool,
    ) -> Result<v1::FromSnapshot, Fault> {
        let presence = self.hub.presence(host);
        let there = presence.as_ref().and_then(|presence| pool_there(&presence.facts.pools, &snapshot.identity));
        Ok(v1::FromSnapshot {
            vault: Some(self.vault_at(&snapshot.team, there.unwrap_or(&snapshot.pool)).await?),
            snapshot: Some(self.key_of(snapshot)?),
            memory,
            fresh,
        })
    }
}
