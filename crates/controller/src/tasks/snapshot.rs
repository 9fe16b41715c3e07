//! A snapshot: its row is there before the VM's host is told, and is ready in the transaction in which its task is done. What was refused leaves
//! none; where it is not known whether anything was written, it stays to be deleted.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use godwit_api::v1::{SnapshotCreate, SnapshotState};
use godwit_link::v1::{self, command::Action};
use godwit_link::{decode, encode};
use godwit_model::schedule::AT_ONCE;
use godwit_model::{ErrorCode, Name, Refusal, Retry, SnapshotFigures, SnapshotId, SnapshotRequest, TaskId, UnixMillis, VmSpec};
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::change::reclaim;
use super::{Ask, Outcome, Tasks, conclude, host_down, note, patiently};
use crate::clock;
use crate::db::{Batch, Fault, Stored};
use crate::history;
use crate::hub::Answer;
use crate::principals::not_found;
use crate::rows::{SnapshotRow, TaskRow, VaultRow, VmRow, Work};
use crate::snapshots::{check_room, choose_pool, free_name};

/// Snapshots that the host is told of because their pages need not be kept once more.
const KNOWN: usize = 64;

/// What a snapshot is kept with, for whoever finds it in the vault.
#[derive(Serialize)]
struct About<'a> {
    schema: u32,
    name: &'a Name,
    team: &'a Name,
    vm: godwit_model::VmId,
    vm_name: &'a Name,
    created: UnixMillis,
    spec: &'a VmSpec,
    resolved: &'a godwit_model::ResolvedSpec,
}

/// What goes with a snapshot, for whoever finds it.
pub(super) fn about(snapshot: &SnapshotRow) -> Vec<u8> {
    encode(&About {
        schema: 1,
        name: &snapshot.name,
        team: &snapshot.team,
        vm: snapshot.vm,
        vm_name: &snapshot.vm_name,
        created: snapshot.created,
        spec: &snapshot.spec,
        resolved: &snapshot.resolved,
    })
}

/// A snapshot to be.
pub(super) struct NewSnapshot<'a> {
    pub(super) name: Option<&'a Name>,
    /// What it is for, in the name that it gets without one.
    pub(super) what: &'a str,
    pub(super) pool: Option<&'a Name>,
    pub(super) request: SnapshotRequest,
    pub(super) golden: bool,
    pub(super) reason: Option<String>,
}

/// Turns to have snapshots taken, of each host.
#[derive(Default)]
pub(super) struct Turns(Mutex<HashMap<Name, Arc<Semaphore>>>);

impl Turns {
    fn of(&self, host: &Name) -> Arc<Semaphore> {
        let mut turns = self.0.lock().expect("no holder panics");
        Arc::clone(turns.entry(host.clone()).or_insert_with(|| Arc::new(Semaphore::new(AT_ONCE))))
    }
}

/// What became of it.
pub(super) enum Taken {
    /// It is durable.
    Ready(SnapshotFigures),
    /// Nothing of it is left.
    Refused(Refusal),
    /// Something of it may be in the vault.
    Unknown(Refusal),
}

impl Taken {
    /// What an answer says of a snapshot; none: nobody waits for it any more, since the host is away.
    pub(super) fn of(answer: Option<Result<Answer, Refusal>>, name: &Name, host: &Name) -> Self {
        match answer {
            None => Self::Unknown(
                Refusal::new(ErrorCode::Cancelled, format!("cancelled by request, while host {host} was away"))
                    .hint(format!("what it may have left in the vault goes with `godwit snapshot delete {name}`")),
            ),
            Some(Err(refusal)) => Self::Refused(refusal),
            Some(Ok(answer)) => match decode::<SnapshotFigures>("figures", &answer.result) {
                Ok(figures) => Self::Ready(figures),
                Err(malformed) => Self::Unknown(
                    Refusal::new(ErrorCode::Internal, format!("the answer of {host} means nothing: {malformed}"))
                        .hint(format!("agent and controller must be of compatible versions; `godwit snapshot delete {name}`"))
                        .retry(Retry::Unknown),
                ),
            },
        }
    }

    /// Writes it into the snapshot's row, which goes if nothing is left.
    pub(super) fn note(&self, batch: Batch, mut snapshot: Stored<SnapshotRow>) -> Batch {
        match self {
            Self::Refused(_) => batch.delete(&snapshot),
            Self::Ready(figures) => {
                (snapshot.row.state, snapshot.row.figures) = (SnapshotState::Ready, Some(figures.clone()));
                batch.update(&snapshot)
            }
            Self::Unknown(_) => {
                snapshot.row.state = SnapshotState::Failed;
                batch.update(&snapshot)
            }
        }
    }

    pub(super) fn outcome(&self) -> Outcome {
        match self {
            Self::Ready(_) => Outcome::Done,
            Self::Refused(refusal) | Self::Unknown(refusal) if refusal.code == ErrorCode::Cancelled => {
                Outcome::Cancelled(refusal.clone())
            }
            Self::Refused(refusal) | Self::Unknown(refusal) => Outcome::Failed(refusal.clone()),
        }
    }
}

impl Tasks {
    /// A snapshot of a team.
    pub(crate) async fn snapshot(&self, team: &Name, name: &Name) -> Result<Stored<SnapshotRow>, Fault> {
        self.db.find::<SnapshotRow>(&format!("{team}/{name}")).await?.ok_or_else(|| not_found("snapshot", name).into())
    }

    pub(super) async fn snapshots_of(&self, team: &Name) -> Result<Vec<SnapshotRow>, Fault> {
        let rows = self.db.page::<SnapshotRow>(&format!("{team}/"), None, usize::MAX).await?;
        Ok(rows.into_iter().map(|stored| stored.row).collect())
    }

    pub(super) async fn admit_snapshot(
        &self,
        vm: &VmRow,
        ask: &Ask,
        asked: &SnapshotCreate,
        now: UnixMillis,
    ) -> Result<(Work, Batch), Fault> {
        let new = NewSnapshot {
            name: asked.name.as_ref(),
            what: "",
            pool: asked.pool.as_ref(),
            request: SnapshotRequest { memory: asked.memory, quiesce: asked.quiesce },
            golden: asked.golden,
            reason: ask.reason.clone(),
        };
        let (snapshot, batch) = self.new_snapshot(vm, ask, new, now).await?;
        Ok((Work::Snapshot { snapshot: snapshot.id, name: snapshot.name }, batch))
    }

    /// The row of a snapshot that is to be taken of a VM as it is, and the writes that make it.
    pub(super) async fn new_snapshot(
        &self,
        vm: &VmRow,
        ask: &Ask,
        new: NewSnapshot<'_>,
        now: UnixMillis,
    ) -> Result<(SnapshotRow, Batch), Fault> {
        let internal = |what: &str| Refusal::new(ErrorCode::Internal, format!("a running VM without {what}"));
        let host = vm.host.clone().ok_or_else(|| internal("a host"))?;
        let resolved = vm.resolved.clone().ok_or_else(|| internal("its resolved spec"))?;
        let others = self.snapshots_of(&vm.team).await?;
        check_room(others.len())?;
        let taken = |name: &str| others.iter().any(|other| other.name.as_str() == name);
        let name = match new.name {
            Some(name) if taken(name.as_str()) => {
                let refusal = Refusal::new(ErrorCode::NameTaken, format!("there is a snapshot {name} already"));
                return Err(refusal.hint("choose another name, or leave it out").into());
            }
            Some(name) => name.clone(),
            None => free_name(&vm.name, new.what, now, taken)?,
        };
        let presence = self.hub.presence(&host).ok_or_else(|| host_down(&host))?;
        let of_disk = vm.spec.disks.first().map(|disk| &disk.volume.pool);
        let pool = choose_pool(&presence.facts.pools, &host, new.pool, of_disk)?;
        let row = SnapshotRow {
            id: SnapshotId::new(clock::fresh()),
            name,
            team: vm.team.clone(),
            vm: vm.id,
            vm_name: vm.name.clone(),
            created: now,
            pool: pool.name.clone(),
            identity: pool.identity.clone(),
            host,
            generation: vm.generation,
            state: SnapshotState::Taking,
            salt: self.authority.draw_salt()?,
            request: new.request,
            spec: vm.spec.clone(),
            resolved,
            waiting: vm.waiting.clone(),
            figures: None,
            golden: new.golden,
            principal: ask.principal.clone(),
            reason: new.reason,
            schedule: ask.schedule,
        };
        let batch = Batch::default().create(&row);
        let batch = match self.db.find::<VaultRow>(vm.team.as_str()).await? {
            Some(_) => batch,
            None => batch.create(&VaultRow { team: vm.team.clone(), salt: self.authority.draw_salt()? }),
        };
        Ok((row, batch))
    }

    pub(super) async fn run_snapshot(&self, id: TaskId, name: &Name) -> Result<(), Fault> {
        let taken = self.take(id, name, "snapshot").await?;
        let outcome = taken.outcome();
        let task = self
            .note_taken(id, name, &taken, |task, vm| {
                if !task.state.ended() {
                    vm.release(id);
                    conclude(task, &outcome);
                }
            })
            .await?;
        Self::tell_end(&task);
        Ok(())
    }

    /// Has the VM's host take the snapshot; nothing is written here.
    pub(super) async fn take(&self, id: TaskId, name: &Name, tag: &str) -> Result<Taken, Fault> {
        let (task, vm) = self.both(id).await?;
        let Some(snapshot) = self.db.find::<SnapshotRow>(&format!("{}/{name}", vm.row.team)).await? else {
            return Ok(Taken::Refused(Refusal::new(ErrorCode::Internal, "the snapshot's row is gone")));
        };
        let snapshot = snapshot.row;
        let action = match self.taking(&vm.row, &snapshot).await {
            Err(Fault::Refused(refusal)) => return Ok(Taken::Refused(refusal)),
            action => action?,
        };
        let step = format!("takes snapshot {name} on {}", snapshot.host);
        // What an earlier controller has sent is under way, and waits for nothing.
        let turns = self.snapshot_turns.of(&snapshot.host);
        let _turn = match Arc::clone(&turns).try_acquire_owned() {
            Ok(turn) => Some(turn),
            Err(_) if task.row.step == step => None,
            Err(_) => match self.turn(id, &snapshot.host, turns).await? {
                Some(turn) => Some(turn),
                None => {
                    let cancelled = Refusal::new(ErrorCode::Cancelled, "cancelled by request, before anything was done");
                    return Ok(Taken::Refused(cancelled));
                }
            },
        };
        self.set_step(id, &step).await?;
        let answer = self.command_until(id, &snapshot.host, tag, action, self.cancelled(id)).await?;
        Ok(Taken::of(answer, name, &snapshot.host))
    }

    /// Waits for a turn to have a snapshot taken on a host: all that are taken there at once have its disks and processors to share, and guests wait for them. None: cancelled.
    async fn turn(&self, id: TaskId, host: &Name, turns: Arc<Semaphore>) -> Result<Option<OwnedSemaphorePermit>, Fault> {
        self.set_step(id, &format!("waits for its turn: of the VMs of {host}, {AT_ONCE} snapshots are taken at a time")).await?;
        tokio::select! {
            turn = turns.acquire_owned() => Ok(turn.ok()),
            cancelled = self.cancelled(id) => cancelled.map(|()| None),
        }
    }

    /// What the VM's host is told.
    async fn taking(&self, vm: &VmRow, snapshot: &SnapshotRow) -> Result<Action, Fault> {
        Ok(Action::TakeSnapshot(v1::TakeSnapshot {
            vm: vm.id.to_string(),
            generation: vm.generation.0,
            vault: Some(self.vault_at(&snapshot.team, &snapshot.pool).await?),
            snapshot: Some(self.key_of(snapshot)?),
            known: self.known_to(snapshot).await?,
            request: encode(&snapshot.request),
            about: about(snapshot),
        }))
    }

    /// Snapshots whose pages need not be kept once more for this one.
    pub(super) async fn known_to(&self, snapshot: &SnapshotRow) -> Result<Vec<v1::SnapshotKey>, Fault> {
        let mut known = self.snapshots_of(&snapshot.team).await?;
        known.retain(|other| other.state == SnapshotState::Ready && other.identity == snapshot.identity);
        known.sort_by_key(|other| (other.vm != snapshot.vm, Reverse(other.created)));
        known.truncate(KNOWN);
        Ok(known.iter().map(|other| self.key_of(other)).collect::<Result<_, _>>()?)
    }

    /// Writes down what became of a snapshot and changes the task and its VM, in one transaction.
    pub(super) async fn note_taken(
        &self,
        id: TaskId,
        name: &Name,
        taken: &Taken,
        mut change: impl FnMut(&mut TaskRow, &mut VmRow),
    ) -> Result<TaskRow, Fault> {
        patiently!(id, {
            let (mut task, mut vm) = self.both(id).await?;
            let before = vm.row.clone();
            let warnings = if let Taken::Ready(figures) = taken { figures.warnings.as_slice() } else { &[] };
            for warning in warnings {
                note(&mut task.row, warning.clone());
            }
            change(&mut task.row, &mut vm.row);
            let batch = reclaim(Batch::default().update(&task).update(&vm), &before.claims(), &vm.row);
            let mut batch = history::note(&self.db, batch, &before, &vm.row, Some(&task.row)).await?;
            if let Some(snapshot) = self.db.find::<SnapshotRow>(&format!("{}/{name}", vm.row.team)).await? {
                batch = taken.note(batch, snapshot);
            }
            self.db.commit(batch).await?;
            Ok(task.row)
        })
    }
}
