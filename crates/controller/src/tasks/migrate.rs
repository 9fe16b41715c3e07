//! A migration, from its recorded grant to its recorded end.
//!
//! ```text
//!   Prepare ──ready──▶ MoveOut ──accepted──▶ Moving ──source: moved──▶ done
//!      │refused           │refused              │ └─source: stayed──▶ failed, cancelled, or (QEMU first) Prepare again
//!      └──────cancelled───┴──▶ Settle ──▶ failed, cancelled
//! ```
//! From MoveOut accepted to its end a migration belongs to the two agents. Here it is only waited for: a host that is away makes it wait
//! and nothing else, and the VM's owner changes in the transaction that stores an agent's word (see `reports`). Once the destination has said that
//! the VM is its own, a source that stays away is not waited for.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use godwit_link::v1::{self, command::Action};
use godwit_link::{decode, encode};
use godwit_model::{ErrorCode, Grant, Millis, Name, Refusal, RunState, TaskId, TravellingDisk};
use tokio::time::{Duration, Instant};

use super::admit::{copying, expiry};
use super::{Outcome, Tasks, note};
use crate::clock;
use crate::db::Fault;
use crate::history;
use crate::rows::{HostRow, MigrateWork, PendingGrant, Stage, TaskRow, TeamRow, VmRow, Work};
use crate::snapshots::newest_memory;

/// How often a migration is begun when QEMU reaches its switch-over before us.
const ATTEMPTS: u32 = 3;
/// How long the destination may take to say that it has cleared, before it is told to.
const CLEARING: Duration = Duration::from_secs(30);
/// Heartbeats for which a source may be away once the VM runs at the destination, before the move ends without it.
const ABSENCE: u32 = 15;
/// VMs of the team that the destination is told of: it takes the first that have nothing else to do.
const NEIGHBOURS: usize = 8;

fn work_of(task: &mut TaskRow) -> Option<&mut MigrateWork> {
    match &mut task.work {
        Work::Migrate(work) => Some(work),
        _ => None,
    }
}

fn cancelled() -> Refusal {
    Refusal::new(ErrorCode::Cancelled, "cancelled by request; the VM runs where it was")
}

fn grant_of(id: TaskId, vm: &VmRow, work: &MigrateWork) -> Grant {
    Grant {
        vm: vm.id,
        generation: work.generation,
        source: Some(work.source.clone()),
        destination: work.destination.clone(),
        task: id,
        expires: work.expires,
    }
}

/// The disks with the ports that the destination has for them; none if it does not have one for each.
fn prepared_disks(asked: &[TravellingDisk], answer: &[u8]) -> Option<Vec<TravellingDisk>> {
    let told = decode::<Vec<TravellingDisk>>("disks", answer).ok()?;
    let port = |asked: &TravellingDisk| {
        let port = told.iter().find(|told| told.volume == asked.volume).map_or(0, |told| told.port);
        // What QEMU's own stream takes along needs none.
        (port != 0 || asked.size.get() == 0).then(|| TravellingDisk { port, ..asked.clone() })
    };
    asked.iter().map(port).collect()
}

fn said_of(disk: &TravellingDisk) -> String {
    format!("disk {} travels: {}, of which {} are used", disk.volume, disk.size, disk.allocated)
}

impl Tasks {
    pub(super) async fn run_migrate(&self, id: TaskId) -> Result<(), Fault> {
        loop {
            let (task, vm) = self.both(id).await?;
            let Work::Migrate(work) = &task.row.work else { return Ok(()) };
            if task.row.state.ended() {
                return Ok(());
            }
            match work.stage {
                Stage::Prepare => self.prepare(id, &vm.row, work).await?,
                Stage::MoveOut { .. } if work.source_ended.is_some() => self.set_stage(id, Stage::Moving).await?,
                Stage::MoveOut { port } => self.move_out(id, &vm.row, work, port).await?,
                Stage::Moving => self.moving(id, &vm.row).await?,
                Stage::Settle => {
                    self.give_turn_back(id);
                    self.settle(id, &vm.row, work).await?;
                }
            }
        }
    }

    async fn set_stage(&self, id: TaskId, stage: Stage) -> Result<(), Fault> {
        let set = |task: &mut TaskRow, _: &mut VmRow| {
            if let Some(work) = work_of(task) {
                work.stage = stage;
            }
        };
        self.edit(id, set).await.map(|_| ())
    }

    /// The migration will not begin, for this reason.
    async fn give_up(&self, id: TaskId, refusal: Option<&Refusal>) -> Result<(), Fault> {
        let set = |task: &mut TaskRow, _: &mut VmRow| {
            if let Some(refusal) = refusal {
                note(task, refusal.message.clone());
                task.error = Some(refusal.clone());
            }
            if let Some(work) = work_of(task) {
                work.stage = Stage::Settle;
            }
        };
        self.edit(id, set).await.map(|_| ())
    }

    async fn prepare(&self, id: TaskId, vm: &VmRow, work: &MigrateWork) -> Result<(), Fault> {
        let destination = &work.destination;
        let mut measured = work.clone();
        if !work.disks.is_empty() && work.measured != work.attempt {
            match self.measure_disks(id, vm, work).await? {
                Ok(work) => measured = work,
                Err(None) => return self.give_up(id, None).await,
                Err(Some(refusal)) => return self.give_up(id, Some(&refusal)).await,
            }
        }
        let work = &measured;
        self.set_step(id, &format!("{destination} prepares")).await?;
        let Some(spec) = &vm.resolved else {
            return self.give_up(id, Some(&Refusal::new(ErrorCode::Internal, "the VM has no resolved spec"))).await;
        };
        let grant = match self.authority.grant(&grant_of(id, vm, work)) {
            Ok(grant) => Some(grant),
            Err(refusal) => return self.give_up(id, Some(&refusal)).await,
        };
        let memory_key = match self.authority.memory_key(vm.id, &vm.memory_salt) {
            Ok(key) => key,
            Err(refusal) => return self.give_up(id, Some(&refusal)).await,
        };
        let known = self.memory_seen_by(destination, vm).await?;
        let snapshot = known.as_ref().map(|(_, memory)| memory.clone());
        let neighbours = self.neighbours(destination, vm).await?;
        let beside = neighbours.len();
        let (policy, disks) = (encode(&work.policy), if work.disks.is_empty() { vec![] } else { encode(&work.disks) });
        let action =
            Action::Prepare(v1::PrepareIncoming { grant, spec: encode(spec), policy, memory_key, snapshot, neighbours, disks });
        let answer = self.command_until(id, destination, &format!("prepare {}", work.attempt), action, self.cancelled(id)).await?;
        let answer = match answer {
            None => return self.give_up(id, None).await,
            Some(Err(refusal)) => return self.give_up(id, Some(&refusal)).await,
            Some(Ok(answer)) => answer,
        };
        let port = u16::try_from(answer.carry_port).ok().filter(|port| *port != 0);
        let disks = if work.disks.is_empty() { Some(vec![]) } else { prepared_disks(&work.disks, &answer.result) };
        let (Some(port), Some(disks)) = (port, disks) else {
            let refusal = Refusal::new(ErrorCode::Internal, format!("{destination} prepared but named no port"));
            return self.give_up(id, Some(&refusal)).await;
        };
        let set = |task: &mut TaskRow, _: &mut VmRow| {
            note(task, format!("{destination} is ready"));
            if let Some((snapshot, _)) = &known {
                note(task, format!("what {destination} can read of its memory in snapshot {snapshot} need not travel"));
            }
            if beside > 0 {
                note(
                    task,
                    format!(
                        "what it has in common with VMs of its team on {destination}, as far as those lend their memory, need not travel"
                    ),
                );
            }
            // The last moment at which a cancel needs no word of the source.
            let stage = if task.cancel { Stage::Settle } else { Stage::MoveOut { port } };
            if let Some(work) = work_of(task) {
                work.stage = stage;
                work.disks.clone_from(&disks);
            }
        };
        self.edit(id, set).await.map(|_| ())
    }

    /// What the destination can read of the VM's memory in a vault, and in which snapshot.
    async fn memory_seen_by(&self, destination: &Name, vm: &VmRow) -> Result<Option<(Name, v1::MemoryInVault)>, Fault> {
        let Some(presence) = self.hub.presence(destination) else { return Ok(None) };
        let snapshots = self.snapshots_of(&vm.team).await?;
        let Some((row, pool)) = newest_memory(&snapshots, vm.id, &presence.facts.pools) else { return Ok(None) };
        let key = self.key_of(row).inspect_err(|refusal| tracing::warn!(%refusal, snapshot = %row.name, "no key of a snapshot"));
        Ok(key.ok().map(|key| {
            let (pool, team) = (pool.to_string(), row.team.to_string());
            (row.name.clone(), v1::MemoryInVault { pool, team, snapshot: Some(key), generation: row.generation.0 })
        }))
    }

    /// VMs that run at the destination, of a team that has its VMs share memory; those that are made from the same come first.
    async fn neighbours(&self, destination: &Name, vm: &VmRow) -> Result<Vec<String>, Fault> {
        if !self.db.find::<TeamRow>(vm.team.as_str()).await?.is_some_and(|team| team.row.share_memory) {
            return Ok(Vec::new());
        }
        let runs_there = |other: &VmRow| {
            let there = other.host.as_ref() == Some(destination) && other.state == RunState::Running;
            there && other.id != vm.id && other.team == vm.team
        };
        let made_from = |vm: &VmRow| vm.spec.disks.iter().filter_map(|disk| disk.image.clone()).collect::<BTreeSet<_>>();
        let own = made_from(vm);
        let all = self.db.all::<VmRow>().await?.into_iter().map(|other| other.row);
        let mut found: Vec<VmRow> = all.filter(runs_there).collect();
        found.sort_by_cached_key(|other| {
            let images = made_from(other).intersection(&own).count();
            Reverse((images, other.spec.boot == vm.spec.boot, other.generation))
        });
        Ok(found.iter().take(NEIGHBOURS).map(|other| other.id.to_string()).collect())
    }

    /// Asks the source how large the disks are that travel; the grant lasts as long as their copying may. `Err(None)`: it is to be cancelled.
    async fn measure_disks(
        &self,
        id: TaskId,
        vm: &VmRow,
        work: &MigrateWork,
    ) -> Result<Result<MigrateWork, Option<Refusal>>, Fault> {
        let source = &work.source;
        self.set_step(id, &format!("{source} measures the disks")).await?;
        let action =
            Action::Measure(v1::MeasureDisks { vm: vm.id.to_string(), generation: vm.generation.0, disks: encode(&work.disks) });
        let answer = self.command_until(id, source, &format!("measure {}", work.attempt), action, self.cancelled(id)).await?;
        let answer = match answer {
            None => return Ok(Err(None)),
            Some(Err(refusal)) => return Ok(Err(Some(refusal))),
            Some(Ok(answer)) => answer,
        };
        let disks = match decode::<Vec<TravellingDisk>>("disks", &answer.result) {
            Ok(disks) if disks.iter().map(|disk| &disk.volume).eq(work.disks.iter().map(|disk| &disk.volume)) => disks,
            _ => {
                let refusal =
                    Refusal::new(ErrorCode::Internal, format!("{source} has not measured the disks that it was asked for"));
                return Ok(Err(Some(refusal)));
            }
        };
        let expires = expiry(clock::now(), Millis(work.policy.timeout.get().saturating_add(copying(&disks).get())));
        let said: Vec<String> = disks.iter().filter(|disk| disk.size.get() > 0).map(said_of).collect();
        let set = move |task: &mut TaskRow, _: &mut VmRow| {
            for said in &said {
                note(task, said.clone());
            }
            if let Some(work) = work_of(task) {
                work.disks.clone_from(&disks);
                work.expires = expires;
                work.measured = work.attempt;
            }
        };
        match self.edit(id, set).await?.work {
            Work::Migrate(work) => Ok(Ok(*work)),
            _ => Ok(Err(None)),
        }
    }

    /// Returns when the task was asked to be cancelled.
    pub(super) async fn cancelled(&self, id: TaskId) -> Result<(), Fault> {
        let waker = self.waker(id);
        while !self.task(id).await?.row.cancel {
            waker.notified().await;
        }
        Ok(())
    }

    async fn move_out(&self, id: TaskId, vm: &VmRow, work: &MigrateWork, port: u16) -> Result<(), Fault> {
        let (source, destination) = (&work.source, &work.destination);
        self.set_step(id, &format!("{source} begins")).await?;
        let address = match self.hub.presence(destination) {
            Some(presence) => presence.migration_address.unwrap_or(presence.address),
            None => {
                let host = self.db.find::<HostRow>(destination.as_str()).await?.map(|host| host.row);
                host.map(|host| host.migration_address.unwrap_or(host.address)).unwrap_or_default()
            }
        };
        let grant = match self.authority.grant(&grant_of(id, vm, work)) {
            Ok(grant) => Some(grant),
            Err(refusal) => return self.give_up(id, Some(&refusal)).await,
        };
        let memory_key = match self.authority.memory_key(vm.id, &vm.memory_salt) {
            Ok(key) => key,
            Err(refusal) => return self.give_up(id, Some(&refusal)).await,
        };
        let policy = encode(&work.policy);
        let past = encode(&history::past_moves(&self.db, vm.id, source, destination).await?);
        let disks = if work.disks.is_empty() { vec![] } else { encode(&work.disks) };
        let action = Action::Migrate(v1::MigrateOut { grant, address, carry_port: port.into(), policy, memory_key, past, disks });
        match self.command(id, source, &format!("move {}", work.attempt), action).await? {
            // It may have answered from its memory: what was changed since is told once more.
            Ok(_) => self.set_stage(id, Stage::Moving).await,
            Err(refusal) => {
                let (task, vm) = self.both(id).await?;
                // It had begun before its agent died, is through, and knows nothing of it any more.
                let through =
                    work.has_arrived(&vm.row) || matches!(&task.row.work, Work::Migrate(work) if work.source_ended.is_some());
                if through { self.set_stage(id, Stage::Moving).await } else { self.give_up(id, Some(&refusal)).await }
            }
        }
    }

    /// Waits for the source's word, and a while for the destination's.
    async fn moving(&self, id: TaskId, vm: &VmRow) -> Result<(), Fault> {
        let waker = self.waker(id);
        let mut connections = self.hub.watch();
        let mut asked_to_cancel = false;
        let mut clearing: Option<Instant> = None;
        let mut absent: Option<Instant> = None;
        let mut given_up = false;
        loop {
            let (task, now) = self.both(id).await?;
            let task = task.row;
            let Work::Migrate(work) = &task.work else { return Ok(()) };
            let here = self.hub.presence(&work.source).is_some();
            // What it was asked it may have forgotten.
            asked_to_cancel &= here;
            let taken = work.destination_ended.as_ref().is_some_and(|ended| ended.moved);
            // A source that is there and says nothing about a move that has ended has lost its journal.
            if !work.has_arrived(&now.row) || (here && !taken) {
                (absent, given_up) = (None, false);
            } else if work.source_ended.is_none() {
                let over = Instant::now() >= *absent.get_or_insert_with(|| Instant::now() + self.heartbeat * ABSENCE);
                if taken && (over || given_up) {
                    return self.end_without_source(id, work).await;
                }
                if over {
                    // Said again after a while: an agent that has been restarted since does not know it.
                    (absent, given_up) = (None, true);
                    self.give_source_up(id, vm, work).await?;
                    continue;
                }
            }
            let away = [&work.source, &work.destination].into_iter().find(|host| self.hub.presence(host).is_none());
            if work.source_ended.is_some() || work.destination_ended.is_some() {
                self.give_turn_back(id);
            }
            if let Some(ended) = &work.source_ended {
                let cleared = work.destination_ended.is_some() || self.hub.presence(&work.destination).is_none();
                let deadline = *clearing.get_or_insert_with(|| Instant::now() + CLEARING);
                if cleared || Instant::now() >= deadline {
                    if !cleared && !ended.moved {
                        self.decline(id, vm, work).await?;
                    }
                    return self.end(id, work.clone()).await;
                }
                self.set_step(id, &format!("{} clears up", work.destination)).await?;
            } else {
                let step = match away {
                    Some(host) => self.waiting_for(host),
                    None => format!("moves from {} to {}", work.source, work.destination),
                };
                self.set_step(id, &step).await?;
                if task.cancel && !asked_to_cancel && self.hub.presence(&work.source).is_some() {
                    asked_to_cancel = true;
                    self.pass_cancel(id, vm, work).await?;
                    continue;
                }
                if work.changes_told < work.changes && self.hub.presence(&work.source).is_some() {
                    self.tell_policy(id, vm, work).await?;
                    continue;
                }
            }
            let deadline = clearing.or(absent);
            tokio::select! {
                () = waker.notified() => {}
                // The hub lives as long as the executor.
                _ = connections.changed() => {}
                () = async { match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                } } => {}
            }
        }
    }

    async fn pass_cancel(&self, id: TaskId, vm: &VmRow, work: &MigrateWork) -> Result<(), Fault> {
        let action = Action::Cancel(v1::CancelMigration { vm: vm.id.to_string() });
        // Given up while the source is away: its word of the end may come first, or the destination's.
        let ended = async {
            let waker = self.waker(id);
            loop {
                let (task, vm) = self.both(id).await?;
                if matches!(&task.row.work, Work::Migrate(work) if work.source_ended.is_some() || work.has_arrived(&vm.row)) {
                    waker.notify_one();
                    return Ok(());
                }
                waker.notified().await;
            }
        };
        if let Some(Err(refusal)) = self.command_until(id, &work.source, &format!("cancel {}", work.attempt), action, ended).await?
        {
            self.edit(id, |task, _| {
                note(task, format!("not cancelled: {refusal}"));
                task.cancel = false;
            })
            .await?;
        }
        Ok(())
    }

    /// Tells a destination that runs the VM to end the move by itself. It does so when nothing of the VM is at the source any more.
    async fn give_source_up(&self, id: TaskId, vm: &VmRow, work: &MigrateWork) -> Result<(), Fault> {
        let action = Action::Settle(v1::SettleMigration { vm: vm.id.to_string(), generation: work.generation.0 });
        let tag = format!("give up the source of {} at {}", work.attempt, clock::now().0);
        let away = std::future::ready(Ok(()));
        self.command_until(id, &work.destination, &tag, action, away).await.map(|_| ())
    }

    /// The destination has the whole VM, and its source does not come back.
    async fn end_without_source(&self, id: TaskId, work: &MigrateWork) -> Result<(), Fault> {
        let said = format!("{} says nothing: it hears how it ended, and clears up, when it comes back", work.source);
        self.finish(id, Outcome::Done, |task, _| note(task, said.clone())).await
    }

    /// Tells a destination that was not released to decline, if it can be told now. Otherwise it is told when it comes back.
    async fn decline(&self, id: TaskId, vm: &VmRow, work: &MigrateWork) -> Result<(), Fault> {
        let destination = &work.destination;
        let action = Action::Settle(v1::SettleMigration { vm: vm.id.to_string(), generation: work.generation.0 });
        let away = std::future::ready(Ok(()));
        match self.command_until(id, destination, &format!("settle {}", work.attempt), action, away).await? {
            Some(Ok(_)) => Ok(()),
            Some(Err(refusal)) => {
                self.edit(id, |task, _| note(task, format!("{destination} did not clear: {refusal}"))).await.map(|_| ())
            }
            None => self
                .edit(id, |task, _| note(task, format!("{destination} is away and clears when it comes back")))
                .await
                .map(|_| ()),
        }
    }

    async fn settle(&self, id: TaskId, vm: &VmRow, work: &MigrateWork) -> Result<(), Fault> {
        self.set_step(id, &format!("{} clears up", work.destination)).await?;
        self.decline(id, vm, work).await?;
        let error = self.task(id).await?.row.error;
        let outcome = error.map_or_else(|| Outcome::Cancelled(cancelled()), Outcome::Failed);
        self.finish(id, outcome, |_, _| {}).await
    }

    /// The agents are through: says how it ended, or begins again.
    async fn end(&self, id: TaskId, work: Box<MigrateWork>) -> Result<(), Fault> {
        let Some(source) = &work.source_ended else { return Ok(()) };
        let taken = work.destination_ended.as_ref().is_some_and(|ended| ended.moved);
        if taken && !source.moved {
            tracing::error!(task = %id, "source and destination both claim the VM; the newer generation counts");
        }
        if source.moved || taken {
            let figures = source.figures.or_else(|| work.destination_ended.as_ref().and_then(|ended| ended.figures));
            return self.finish(id, Outcome::Done, |task, _| task.figures = figures).await;
        }
        let reason = source
            .reason
            .clone()
            .unwrap_or_else(|| Refusal::new(ErrorCode::MigrationFailed, "the source gave no reason; the VM runs where it was"));
        match reason.code {
            ErrorCode::Cancelled => self.finish(id, Outcome::Cancelled(reason), |_, _| {}).await,
            ErrorCode::QemuFirst if work.attempt < ATTEMPTS => self.again(id, &reason).await,
            _ => self.finish(id, Outcome::Failed(reason), |_, _| {}).await,
        }
    }

    /// A new generation, a new grant, the same task.
    async fn again(&self, id: TaskId, reason: &Refusal) -> Result<(), Fault> {
        let begin = |task: &mut TaskRow, vm: &mut VmRow| {
            let cancel = task.cancel;
            let Some(work) = work_of(task) else { return };
            let generation = vm.issue(&work.destination, id);
            vm.pending = Some(PendingGrant { destination: work.destination.clone(), generation, task: id });
            work.attempt += 1;
            work.changes_told = 0;
            work.generation = generation;
            work.expires = expiry(clock::now(), work.policy.timeout);
            work.stage = if cancel { Stage::Settle } else { Stage::Prepare };
            work.source_ended = None;
            work.destination_ended = None;
            let text = format!("{reason}; attempt {} of {ATTEMPTS}, generation {generation}", work.attempt);
            note(task, text);
        };
        let task = self.edit(id, begin).await?;
        if let Work::Migrate(work) = &task.work {
            self.turns.resume(id, work);
        }
        Ok(())
    }
}
