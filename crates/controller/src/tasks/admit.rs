//! From a request to a recorded task: everything is checked, and everything is written, before anything starts.

use std::sync::Arc;

use godwit_api::v1;
use godwit_model::lifecycle::decide_admission;
use godwit_model::policy::{self, Labelled, Settled};
use godwit_model::{
    Activity, Admission, ErrorCode, ImageKind, ImageRef, MigrationSettings, Millis, Name, Refusal, Retry, ScheduleId, TaskId,
    TravellingDisk, UnixMillis, VmRequest, VmSpec,
};
use tokio::task::JoinHandle;

use super::change::reclaim;
use super::turns::Turn;
use super::{Outcome, Tasks, conclude, note};
use crate::checks::{Candidate, LEAST_BANDWIDTH, blocked, can_do_postcopy, check_move, enough_bandwidth, travelling};
use crate::clock;
use crate::db::{Batch, Fault, Stored, retry};
use crate::history;
use crate::hub::Presence;
use crate::networks::check_networks;
use crate::principals::not_found;
use crate::resolve::decide_start;
use crate::restore;
use crate::rows::{
    HostRow, ImageRow, MigrateWork, NetworkRow, Origin, OriginKind, PendingGrant, PolicyRow, Stage, TaskRow, VmRow, Work,
};
use crate::specs::leaving;

/// How long a guest may take to power off, if nothing else was said.
const STOP_TIMEOUT: Millis = Millis(5 * 60_000);
/// What a grant outlives the warm-up by.
const GRANT_MARGIN: u64 = 10 * 60_000;

/// Of which VM, by whom, and under which condition.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    pub(crate) team: Name,
    pub(crate) vm: Name,
    pub(crate) principal: String,
    pub(crate) reason: Option<String>,
    /// The revision that the VM must still have.
    pub(crate) revision: Option<u64>,
    /// The schedule that it is done for.
    pub(crate) schedule: Option<ScheduleId>,
}

/// What is asked for.
#[derive(Clone, Debug)]
pub(crate) enum Asked {
    Start(Option<Name>),
    Stop(Option<Millis>),
    Kill,
    Pause,
    Unpause,
    Delete { volumes: bool },
    Migrate(v1::VmMigrate),
    Set(Box<VmSpec>),
    Snapshot(v1::SnapshotCreate),
    Rollback { snapshot: Name, request: v1::SnapshotRollback },
    Suspend,
    Unsuspend(Option<Name>),
}

impl Asked {
    pub(super) fn request(&self) -> VmRequest {
        match self {
            Self::Start(_) | Self::Unsuspend(_) => VmRequest::Start,
            Self::Stop(_) => VmRequest::Stop,
            Self::Kill => VmRequest::Kill,
            Self::Pause => VmRequest::Pause,
            Self::Unpause => VmRequest::Unpause,
            Self::Delete { .. } => VmRequest::Delete,
            Self::Migrate(_) => VmRequest::Migrate,
            Self::Set(_) => VmRequest::Set,
            Self::Snapshot(_) => VmRequest::Snapshot,
            Self::Rollback { .. } => VmRequest::Rollback,
            Self::Suspend => VmRequest::Suspend,
        }
    }
}

/// How long the VM's guest may take to power off, if nothing else was said.
fn own_deadline(vm: &VmRow) -> Millis {
    vm.spec.shutdown_deadline.map_or(STOP_TIMEOUT, |deadline| Millis(deadline.get().saturating_mul(1_000)))
}

/// Whether it is only looked at.
fn is_dry(asked: &Asked) -> bool {
    matches!(asked, Asked::Migrate(request) if request.dry_run)
}

/// The refusal of a second move of a VM.
pub(super) fn waits_already(vm: &Name, task: TaskId) -> Refusal {
    Refusal::new(ErrorCode::VmBusy, format!("task {task}, a move of VM {vm}, waits to begin"))
        .hint(format!("cancel it first if the VM shall go elsewhere: `godwit task cancel {task}`"))
        .retry(Retry::Safe)
}

/// The refusal of a move that could not begin at once and that depends on how the VM is now.
fn cannot_wait(full: &str) -> Refusal {
    Refusal::new(ErrorCode::VmBusy, format!("the move {full}, and a condition is not kept for later"))
        .hint("ask for it without If-Match, or again later")
        .retry(Retry::Safe)
}

/// The refusal for a host that is not connected.
pub(crate) fn host_down(name: &Name) -> Refusal {
    Refusal::new(ErrorCode::HostDown, format!("host {name} is not connected"))
        .hint(format!("start the agent on {name} (`godwit agent`) or restore its link, or choose another host"))
        .retry(Retry::Safe)
}

/// A task of a VM that was just asked for.
pub(super) fn new_task(vm: &VmRow, ask: &Ask, id: TaskId, work: Work, now: UnixMillis) -> TaskRow {
    TaskRow {
        vm: Some(vm.id),
        reason: ask.reason.clone(),
        schedule: ask.schedule,
        ..TaskRow::new(id, vm.team.clone(), vm.name.clone(), ask.principal.clone(), work, now)
    }
}

pub(super) fn candidates(present: &[(Name, Presence)]) -> Vec<Candidate<'_>> {
    present.iter().map(|(name, presence)| Candidate::new(name, presence)).collect()
}

impl Tasks {
    /// The VM of a team by its name.
    pub(crate) async fn vm(&self, team: &Name, name: &Name) -> Result<Stored<VmRow>, Fault> {
        let id = self.db.claimed(&format!("vmname/{team}/{name}")).await?;
        let vm = match id {
            Some(id) => self.db.find::<VmRow>(&id).await?,
            None => None,
        };
        vm.ok_or_else(|| not_found("vm", name).into())
    }

    /// Records the task and starts it, also if whoever asks over a connection goes away meanwhile: none is recorded and never begun.
    pub(crate) async fn ask(self: &Arc<Self>, ask: &Ask, asked: &Asked) -> Result<Stored<TaskRow>, Fault> {
        if is_dry(asked) {
            return self.ask_and_follow(ask, asked).await.map(|(task, _)| task);
        }
        let (tasks, ask, asked) = (Arc::clone(self), ask.clone(), asked.clone());
        let asking = self.tracker.spawn(async move { tasks.ask_and_follow(&ask, &asked).await.map(|(task, _)| task) });
        asking.await.unwrap_or_else(|error| {
            tracing::error!(%error, "a request was not carried out");
            let refusal = Refusal::new(ErrorCode::Internal, "the request was not carried out; the controller's log says more")
                .hint("`godwit task list` shows whether anything was begun; ask again if not");
            Err(refusal.retry(Retry::Unknown).into())
        })
    }

    /// As [`Tasks::ask`], with what ends when the task does.
    pub(super) async fn ask_and_follow(
        self: &Arc<Self>,
        ask: &Ask,
        asked: &Asked,
    ) -> Result<(Stored<TaskRow>, Option<JoinHandle<()>>), Fault> {
        let dry = is_dry(asked);
        let (mut task, replaced) = retry!({ self.admit(ask, asked, dry).await })?;
        let mut executor = None;
        if dry {
            let generation = self.vm(&ask.team, &ask.vm).await?.row.generation;
            self.foresee(&mut task, generation).await?;
        } else {
            tracing::info!(task = %task.id, kind = task.work.kind(), subject = %task.subject, principal = task.principal, "accepted");
            if !task.state.ended() {
                executor = Some(self.spawn(task.id));
            }
            if let Some(replaced) = replaced {
                self.wake(replaced);
            }
        }
        let id = task.id;
        Ok((if dry { Stored { row: task, revision: 0 } } else { self.task(id).await? }, executor))
    }

    async fn admit(&self, ask: &Ask, asked: &Asked, dry: bool) -> Result<(TaskRow, Option<TaskId>), Fault> {
        let mut vm = self.vm(&ask.team, &ask.vm).await?;
        vm.still_at(ask.revision, format_args!("VM {}", ask.vm))?;
        let ignored = match decide_admission(vm.row.state, vm.row.activity, asked.request()) {
            Admission::Deny(refusal) => return Err(refusal.into()),
            Admission::Wait(holder) => return Ok((self.wait_for(&vm, ask, asked, holder).await?, None)),
            Admission::Ignore => true,
            Admission::Accept => false,
        };
        if let (Asked::Migrate(_), false, Some(other)) = (asked, dry, self.lines.waiting_move(vm.row.id)) {
            return Err(waits_already(&vm.row.name, other).into());
        }
        let id = TaskId::new(clock::fresh());
        let now = self.clock.now();
        let replaced = vm.row.activity.map(|activity| activity.task);
        let before = vm.row.clone();
        let (work, batch) = self.work(&mut vm.row, id, ask, asked, ignored, now).await?;
        let mut task = new_task(&vm.row, ask, id, work, now);
        describe(&mut task);
        if dry {
            conclude(&mut task, &Outcome::Done);
            let waits = self.lines.waiting_move(vm.row.id).map(|other| format!("task {other}, a move of it, waits to begin"));
            let full = match &task.work {
                Work::Migrate(work) => self.would_wait(work).map(|full| format!("it {full}")),
                _ => None,
            };
            task.step = format!("checked only: {}", waits.or(full).unwrap_or_else(|| "it could begin now".into()));
            return Ok((task, None));
        }
        if ignored {
            note(&mut task, "nothing to do: it is so already");
            conclude(&mut task, &Outcome::Done);
            self.db.commit(Batch::default().unchanged(&vm).create(&task)).await?;
            return Ok((task, None));
        }
        let batch = reclaim(batch, &before.claims(), &vm.row);
        let batch = history::note(&self.db, batch, &before, &vm.row, Some(&task)).await?;
        if matches!(asked, Asked::Set(_)) && !self.changes_live(&vm.row).await? {
            note(&mut task, said_of(&vm.row));
            conclude(&mut task, &Outcome::Done);
            self.db.commit(batch.update(&vm).create(&task)).await?;
            return Ok((task, None));
        }
        let turn = match &task.work {
            Work::Migrate(work) => match self.take_turn_of_move(id, now, work) {
                Ok(turn) => Some(turn),
                Err(full) if ask.revision.is_some() => return Err(cannot_wait(&full).into()),
                // It could move. The task that waits is another one, which begins with all of this again.
                Err(full) => return Ok((self.record_wait(&vm, ask, asked, full).await?, None)),
            },
            _ => None,
        };
        vm.row.activity = Some(Activity { task: id, request: asked.request() });
        let batch = self.set_out(batch, ask, &vm.row, id).await?;
        self.db.commit(batch.update(&vm).create(&task)).await?;
        turn.into_iter().for_each(Turn::record);
        Ok((task, replaced))
    }

    /// A VM whose host was removed runs on there, if it runs; nothing can be told to it.
    async fn reachable(&self, vm: &VmRow) -> Result<(), Fault> {
        let Some(host) = vm.host.as_ref().filter(|_| vm.has_process()) else { return Ok(()) };
        if self.db.find::<HostRow>(host.as_str()).await?.is_some() {
            return Ok(());
        }
        let message = format!("host {host} was removed from the cluster while VM {} ran there as far as is known", vm.name);
        Err(Refusal::new(ErrorCode::HostDown, message)
            .hint(format!(
                "let the host join again with its state: `godwit host token {host}`, then `godwit host join --rejoin`; the VM is not \
                 taken for dead and starts nowhere else"
            ))
            .into())
    }

    /// A move that a kill has cut short may still have to end.
    async fn no_move_is_open(&self, vm: &VmRow) -> Result<(), Fault> {
        let open = |task: &TaskRow| task.vm == Some(vm.id) && task.open_move().is_some();
        let Some(task) = self.db.all::<TaskRow>().await?.into_iter().find(|task| open(&task.row)) else { return Ok(()) };
        let id = task.row.id;
        Err(Refusal::new(ErrorCode::VmBusy, format!("task {id}, a move of the VM, has not ended"))
            .hint(format!("wait for it: `godwit task wait {id}`"))
            .retry(Retry::Safe)
            .into())
    }

    /// What there is to do, with the grant already in the row if it takes one, and what is written beside the VM and the task.
    pub(super) async fn work(
        &self,
        vm: &mut VmRow,
        id: TaskId,
        ask: &Ask,
        asked: &Asked,
        ignored: bool,
        now: UnixMillis,
    ) -> Result<(Work, Batch), Fault> {
        if !ignored {
            self.reachable(vm).await?;
            if matches!(
                asked,
                Asked::Start(_) | Asked::Unsuspend(_) | Asked::Migrate(_) | Asked::Delete { .. } | Asked::Rollback { .. }
            ) {
                restore::all_heard(&self.db).await?;
            }
            if matches!(asked, Asked::Delete { .. } | Asked::Rollback { .. }) {
                self.no_move_is_open(vm).await?;
            }
        }
        let work = match asked {
            Asked::Start(host) | Asked::Unsuspend(host) if ignored => {
                let host = host.clone().or_else(|| vm.host.clone());
                Work::Start { host: host.ok_or_else(|| not_found("host", "of this VM"))?, generation: vm.generation, from: None }
            }
            Asked::Unsuspend(_) if !vm.origin.as_ref().is_some_and(|origin| origin.kind == OriginKind::Suspended) => {
                let refusal = Refusal::new(ErrorCode::VmNotRunning, format!("VM {} is not suspended, it is stopped", vm.name));
                return Err(refusal.hint(format!("start it: `godwit vm start {}`", vm.name)).into());
            }
            Asked::Start(host) | Asked::Unsuspend(host) => self.admit_start(vm, id, host.as_ref()).await?,
            Asked::Stop(timeout) => Work::Stop { timeout: timeout.unwrap_or_else(|| own_deadline(vm)) },
            Asked::Kill => Work::Kill,
            Asked::Pause => Work::Pause,
            Asked::Unpause => Work::Unpause,
            Asked::Delete { volumes } => Work::Delete { volumes: *volumes },
            Asked::Migrate(request) => self.admit_migrate(vm, id, request, now).await?,
            Asked::Set(spec) => self.admit_change(vm, spec).await?,
            Asked::Snapshot(request) => return self.admit_snapshot(vm, ask, request, now).await,
            Asked::Suspend => return self.admit_suspend(vm, ask, now).await,
            Asked::Rollback { snapshot, request } => return self.admit_rollback(vm, ask, snapshot, request, now).await,
        };
        Ok((work, Batch::default()))
    }

    pub(super) async fn known(&self, host: &Name) -> Result<(), Fault> {
        self.db.find::<HostRow>(host.as_str()).await?.map(|_| ()).ok_or_else(|| not_found("host", host).into())
    }

    pub(super) async fn networks_of(&self, team: &Name) -> Result<Vec<Stored<NetworkRow>>, Fault> {
        self.db.page::<NetworkRow>(&format!("{team}/"), None, usize::MAX).await
    }

    pub(super) async fn admit_start(&self, vm: &mut VmRow, id: TaskId, wanted: Option<&Name>) -> Result<Work, Fault> {
        if let Some(snapshot) = &vm.unfinished {
            let message = format!("a rollback of VM {} to {snapshot} did not end well: its disks may be half of it", vm.name);
            return Err(Refusal::new(ErrorCode::DisksUnfinished, message)
                .hint(format!("roll back once more (`godwit snapshot rollback {snapshot}`), or to another snapshot of the VM"))
                .into());
        }
        if let Some(host) = wanted {
            self.known(host).await?;
            self.hub.presence(host).ok_or_else(|| host_down(host))?;
        }
        let from = vm.origin.clone();
        let (host, resolved) = match &from {
            Some(origin) => self.decide_origin(vm, origin, wanted).await?,
            None => {
                let (images, networks) = (self.images_of(&vm.team).await?, self.networks_of(&vm.team).await?);
                let present = self.hub.present();
                let find = |name: &Name| images.find(name);
                let home = vm.host.clone().filter(|_| vm.has_run());
                decide_start((vm.id, &vm.name, &vm.spec), home.as_ref(), wanted, &candidates(&present), &find, &networks)?
            }
        };
        let generation = vm.issue(&host, id);
        vm.host = Some(host.clone());
        vm.generation = generation;
        vm.released = false;
        vm.start_wanted = false;
        vm.not_started = None;
        vm.leaving = leaving(&resolved, &vm.spec);
        vm.resolved = Some(resolved);
        // With memory it goes on as the machine that it was.
        if from.as_ref().is_none_or(|origin| !origin.memory) {
            vm.waiting.clear();
            vm.copied = None;
        }
        Ok(Work::Start { host, generation, from })
    }

    /// The limits of a migration of this VM, of which the request says these.
    async fn settle_limits(&self, vm: &VmRow, asked: &MigrationSettings) -> Result<Settled, Fault> {
        asked.check()?;
        let rows = self.db.page::<PolicyRow>(&format!("{}/", vm.team), None, usize::MAX).await?;
        let policies: Vec<Labelled<'_>> = rows
            .iter()
            .map(|policy| Labelled { name: &policy.row.name, labels: &policy.row.labels, limits: policy.row.limits })
            .collect();
        Ok(policy::settle(*asked, &vm.spec.migration, &vm.spec.labels, &policies)?)
    }

    async fn admit_migrate(&self, vm: &mut VmRow, id: TaskId, request: &v1::VmMigrate, now: UnixMillis) -> Result<Work, Fault> {
        let destination = &request.host;
        self.known(destination).await?;
        let internal = |what: &str| Fault::Refused(Refusal::new(ErrorCode::Internal, format!("a running VM without {what}")));
        let source = vm.host.clone().ok_or_else(|| internal("a host"))?;
        if source == *destination {
            return Err(Refusal::new(ErrorCode::AlreadyOnHost, format!("VM {} already runs on {destination}", vm.name))
                .hint("nothing needs to be done; choose another host to move it")
                .into());
        }
        let there = self.hub.presence(destination).ok_or_else(|| host_down(destination))?;
        let here = self.hub.presence(&source).ok_or_else(|| host_down(&source))?;
        let spec = vm.resolved.as_ref().ok_or_else(|| internal("its resolved spec"))?;
        let to = Candidate::new(destination, &there);
        blocked(&vm.blocked).map_or(Ok(()), Err)?;
        let Settled { policy, told } = self.settle_limits(vm, &request.policy).await?;
        enough_bandwidth(policy.bandwidth)?;
        can_do_postcopy(&policy, spec, to)?;
        let from = Candidate::new(&source, &here);
        check_move(spec, from, to)?;
        let disks = travelling(spec, from, to).into_iter().map(TravellingDisk::new).collect();
        check_networks(spec, &self.networks_of(&vm.team).await?, to)?;
        if vm.memory_salt.is_empty() {
            vm.memory_salt = self.authority.draw_salt()?;
        }
        let generation = vm.issue(destination, id);
        vm.pending = Some(PendingGrant { destination: destination.clone(), generation, task: id });
        Ok(Work::Migrate(Box::new(MigrateWork {
            source,
            destination: destination.clone(),
            policy,
            told,
            disks,
            measured: 0,
            changes: 0,
            changes_told: 0,
            attempt: 1,
            generation,
            expires: expiry(now, policy.timeout),
            stage: Stage::Prepare,
            source_ended: None,
            destination_ended: None,
        })))
    }
}

/// The images of a team.
pub(super) struct FoundImages(Vec<Stored<ImageRow>>);

impl FoundImages {
    pub(super) fn find(&self, name: &Name) -> Option<(ImageRef, ImageKind)> {
        let image = &self.0.iter().find(|image| image.row.name == *name)?.row;
        Some((ImageRef { id: image.id, digest: image.digest.clone(), size: image.size }, image.kind))
    }
}

impl Tasks {
    pub(super) async fn images_of(&self, team: &Name) -> Result<FoundImages, Fault> {
        Ok(FoundImages(self.db.page::<ImageRow>(&format!("{team}/"), None, usize::MAX).await?))
    }
}

/// As long as it may take to copy this: at half of the least that a move is given, since several may share that.
pub(super) fn copying(disks: &[TravellingDisk]) -> Millis {
    let bytes = disks.iter().fold(0_u64, |sum, disk| sum.saturating_add(disk.allocated.get()));
    Millis(bytes / (LEAST_BANDWIDTH.get() / 2_000))
}

/// The end of a conditional grant.
pub(super) fn expiry(now: UnixMillis, timeout: Millis) -> UnixMillis {
    UnixMillis(now.0.saturating_add(timeout.0).saturating_add(GRANT_MARGIN))
}

/// When a change of a spec takes effect.
fn said_of(vm: &VmRow) -> String {
    if vm.waiting.is_empty() {
        return "written down".into();
    }
    let fields: Vec<&str> = vm.waiting.iter().map(|waiting| waiting.field.as_str()).collect();
    format!("takes effect at the next start: {}", fields.join(", "))
}

/// The first line of a trail.
pub(super) fn describe(task: &mut TaskRow) {
    let text = match &task.work {
        Work::Start { host, generation, from: Some(Origin { snapshot, memory, .. }) } => {
            let what = if *memory { "memory and disks" } else { "the disks" };
            format!("to begin from {what} of {snapshot} on {host}, generation {generation}")
        }
        Work::Start { host, generation, from: None } => format!("to start on {host}, generation {generation}"),
        Work::Clone { snapshot } => format!("to begin from {snapshot} when it is started"),
        Work::Exec { program } => format!("to run {program} in the guest"),
        Work::Snapshot { name, .. } => format!("to be kept as {name}"),
        Work::Suspend(work) => format!("to be kept as {}, and ended", work.name),
        Work::Rollback(work) => format!("to become what it was in {}, on {}", work.name, work.host),
        Work::Migrate(work) => format!("to move from {} to {}, generation {}", work.source, work.destination, work.generation),
        _ => return,
    };
    note(task, text);
    if let Work::Migrate(work) = &task.work {
        for told in work.told.clone() {
            note(task, format!("limits of {told}"));
        }
    }
}
