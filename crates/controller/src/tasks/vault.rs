//! Vaults: their keys, what they take, whether they are whole, and what goes from them. A host is told the keys with each command, and keeps none.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use godwit_api::v1::{self as api, SnapshotState};
use godwit_link::v1::{self, command::Action, look_at_vault::What};
use godwit_link::{decode, encode};
use godwit_model::{ErrorCode, Name, Refusal, Retry, TaskId, VaultFindings, VaultPlan, VaultUsage};
use serde::de::DeserializeOwned;

use super::{Outcome, Tasks, conclude, note};
use crate::clock;
use crate::db::{Batch, Fault, Stored, retry};
use crate::rows::{HostRow, SnapshotRow, TaskRow, VaultRow, VmRow, Work};
use crate::snapshots::pool_there;

/// How long a host may take to say what a vault takes.
const USAGE: Duration = Duration::from_secs(10);
/// How long it may take to remove a snapshot.
const REMOVAL: Duration = Duration::from_secs(30);
/// How long it may take to see what nobody refers to, and to remove it.
const PRUNE: Duration = Duration::from_secs(50);
/// Damage that is named; the rest is counted.
const NAMED: usize = 20;

/// A team's snapshots in one pool.
struct Vault {
    identity: String,
    pool: Name,
    snapshots: Vec<SnapshotRow>,
}

/// Whether a task that has not ended needs the snapshot.
fn uses(task: &TaskRow, team: &Name, name: &Name) -> bool {
    let named = match &task.work {
        Work::Snapshot { name: own, .. } => own == name,
        Work::Start { from: Some(origin), .. } => origin.snapshot == *name,
        Work::Suspend(work) => work.name == *name,
        Work::SnapshotExport { name: own, .. } | Work::SnapshotImport { name: own, .. } => own == name,
        Work::SnapshotDelete { name: own, .. } => own == name,
        Work::Rollback(work) => work.name == *name || work.present.as_ref() == Some(name),
        _ => false,
    };
    named && task.team == *team && !task.state.ended()
}

fn no_vault(pool: &Name) -> Refusal {
    Refusal::new(ErrorCode::NotFound, format!("the team has no snapshot in a pool {pool}"))
        .hint("`godwit vault status` shows where it has some")
}

fn silent(host: &Name) -> Refusal {
    Refusal::new(ErrorCode::HostDown, format!("host {host} did not answer in time"))
        .hint("try again in a while; what was asked for may still be done")
        .retry(Retry::Unknown)
}

impl Tasks {
    /// A team's vault in a pool, with the key that it is read and written with.
    pub(super) async fn vault_at(&self, team: &Name, pool: &Name) -> Result<v1::VaultAt, Fault> {
        let missing = || Refusal::new(ErrorCode::Internal, format!("team {team} has snapshots and no vault"));
        let vault = self.db.find::<VaultRow>(team.as_str()).await?.ok_or_else(missing)?;
        let key = self.authority.team_vault_key(team, &vault.row.salt)?;
        Ok(v1::VaultAt { pool: pool.to_string(), team: team.to_string(), key })
    }

    /// A snapshot with its key.
    pub(super) fn key_of(&self, snapshot: &SnapshotRow) -> Result<v1::SnapshotKey, Refusal> {
        let key = self.authority.snapshot_key(snapshot.id, &snapshot.salt)?;
        Ok(v1::SnapshotKey { snapshot: snapshot.id.to_string(), key })
    }

    /// A connected host that sees the pool, and what it calls it.
    fn host_seeing(&self, identity: &str) -> Option<(Name, Name)> {
        let seen = |(host, presence): (Name, crate::hub::Presence)| {
            pool_there(&presence.facts.pools, identity).map(|pool| (host, pool.clone()))
        };
        self.hub.present().into_iter().find_map(seen)
    }

    pub(super) fn reach(&self, identity: &str, pool: &Name, last: Option<&Name>) -> Result<(Name, Name), Refusal> {
        self.host_seeing(identity).ok_or_else(|| {
            let on = last.map_or_else(|| "a host that has it".to_owned(), |host| format!("a host that has it, such as {host}"));
            Refusal::new(ErrorCode::HostDown, format!("no connected host has the pool {pool} with these snapshots"))
                .hint(format!("start the agent of {on} (`godwit agent`), then try again"))
                .retry(Retry::Safe)
        })
    }

    /// Whether nothing needs the snapshot, but the task that deletes it.
    pub(super) async fn may_go(&self, snapshot: &SnapshotRow, by: Option<TaskId>) -> Result<(), Fault> {
        let SnapshotRow { team, name, .. } = snapshot;
        if snapshot.golden {
            let refusal = Refusal::new(ErrorCode::InUse, format!("snapshot {name} is golden"));
            return Err(refusal.hint(format!("if it may go: `godwit snapshot set {name} --golden=false`")).into());
        }
        let used = |task: &TaskRow| by != Some(task.id) && uses(task, team, name);
        if let Some(user) = self.db.all::<TaskRow>().await?.into_iter().find(|task| used(&task.row)) {
            let (id, kind) = (user.row.id, user.row.work.kind());
            return Err(Refusal::new(ErrorCode::InUse, format!("task {id} ({kind}) uses snapshot {name}"))
                .hint(format!("wait for it: `godwit task wait {id}`"))
                .retry(Retry::Safe)
                .into());
        }
        let begins = |vm: &VmRow| vm.team == *team && vm.origin.as_ref().is_some_and(|origin| origin.snapshot == *name);
        if let Some(vm) = self.db.all::<VmRow>().await?.into_iter().find(|vm| begins(&vm.row)) {
            let vm = vm.row.name;
            return Err(Refusal::new(ErrorCode::InUse, format!("VM {vm} begins from snapshot {name}"))
                .hint(format!("start it once (`godwit vm start {vm}`), or delete it"))
                .into());
        }
        Ok(())
    }

    /// Deletes a snapshot: first what is in the vault, then the row with the key. A task that deletes it itself does not stand in the way.
    pub(crate) async fn delete_snapshot(&self, team: &Name, name: &Name, by: Option<TaskId>) -> Result<(), Fault> {
        let snapshot = retry!({
            let mut snapshot = self.snapshot(team, name).await?;
            self.may_go(&snapshot.row, by).await?;
            self.reach(&snapshot.row.identity, &snapshot.row.pool, Some(&snapshot.row.host))?;
            snapshot.row.state = SnapshotState::Deleting;
            self.db.commit(Batch::default().update(&snapshot)).await?;
            Ok(snapshot.row)
        })?;
        let (host, pool) = self.reach(&snapshot.identity, &snapshot.pool, Some(&snapshot.host))?;
        let vault = Some(self.vault_at(team, &pool).await?);
        let action = Action::DeleteSnapshot(v1::DeleteSnapshot { vault, snapshot: snapshot.id.to_string() });
        let id = TaskId::new(clock::fresh());
        self.one_command(id, &host, "delete snapshot", action, REMOVAL).await.unwrap_or_else(|| Err(silent(&host)))?;
        retry!({
            let found = self.db.find::<SnapshotRow>(&format!("{team}/{name}")).await?;
            match found.filter(|found| found.row.id == snapshot.id) {
                Some(found) => self.db.commit(Batch::default().delete(&found)).await,
                None => Ok(()),
            }
        })
    }

    /// The team's vaults, by pool.
    async fn vaults_of(&self, team: &Name) -> Result<Vec<Vault>, Fault> {
        let mut vaults: BTreeMap<String, Vault> = BTreeMap::new();
        for snapshot in self.snapshots_of(team).await? {
            let SnapshotRow { identity, pool, .. } = &snapshot;
            let new = || Vault { identity: identity.clone(), pool: pool.clone(), snapshots: vec![] };
            vaults.entry(identity.clone()).or_insert_with(new).snapshots.push(snapshot);
        }
        let mut vaults: Vec<Vault> = vaults.into_values().collect();
        vaults.sort_by(|a, b| (&a.pool, &a.identity).cmp(&(&b.pool, &b.identity)));
        Ok(vaults)
    }

    /// The team's vault in a pool; `host` says which, where several hosts have one of that name for themselves.
    async fn vault_in(&self, team: &Name, pool: &Name, host: Option<&Name>) -> Result<Vault, Fault> {
        let wanted = match host {
            None => None,
            Some(host) => {
                self.known(host).await?;
                let row = self.db.find::<HostRow>(host.as_str()).await?.and_then(|row| row.row.facts);
                let facts = self.hub.presence(host).map(|presence| (*presence.facts).clone()).or(row);
                let there = facts.and_then(|facts| facts.pools.into_iter().find(|there| there.name == *pool));
                Some(there.map(|there| there.identity).ok_or_else(|| no_vault(pool))?)
            }
        };
        let fits = |vault: &Vault| match &wanted {
            Some(identity) => vault.identity == *identity,
            None => {
                let called = self.host_seeing(&vault.identity).is_some_and(|(_, called)| called == *pool);
                called || vault.snapshots.iter().any(|snapshot| snapshot.pool == *pool)
            }
        };
        let mut found: Vec<Vault> = self.vaults_of(team).await?.into_iter().filter(fits).collect();
        if found.len() > 1 {
            let hosts: BTreeSet<&str> =
                found.iter().flat_map(|vault| &vault.snapshots).map(|snapshot| snapshot.host.as_str()).collect();
            let hosts: Vec<&str> = hosts.into_iter().collect();
            let message = format!("several hosts have a pool {pool} for themselves: {}", hosts.join(", "));
            return Err(Refusal::new(ErrorCode::BadRequest, message).hint("say whose is meant: `--host`").into());
        }
        found.pop().ok_or_else(|| no_vault(pool).into())
    }

    async fn look(&self, team: &Name, vault: &Vault, pool: &Name, what: What) -> Result<Action, Fault> {
        // Others may not be there, or not be whole, and that is no damage.
        let wanted = |snapshot: &&SnapshotRow| !matches!(what, What::Verify(_)) || snapshot.state == SnapshotState::Ready;
        let snapshots = vault.snapshots.iter().filter(wanted).map(|snapshot| self.key_of(snapshot)).collect::<Result<_, _>>()?;
        Ok(Action::LookAtVault(v1::LookAtVault { vault: Some(self.vault_at(team, pool).await?), snapshots, what: Some(what) }))
    }

    async fn ask_vault<T: DeserializeOwned>(
        &self,
        team: &Name,
        vault: &Vault,
        (host, pool): (&Name, &Name),
        what: What,
        limit: Duration,
    ) -> Result<T, Fault> {
        let action = self.look(team, vault, pool, what).await?;
        let id = TaskId::new(clock::fresh());
        let answer = self.one_command(id, host, "look at vault", action, limit).await.unwrap_or_else(|| Err(silent(host)))?;
        Ok(decode("result", &answer.result).map_err(Refusal::from)?)
    }

    /// The team's vaults, and what each takes as far as a host can say.
    pub(crate) async fn vaults(&self, team: &Name) -> Result<Vec<api::Vault>, Fault> {
        let vaults = self.vaults_of(team).await?;
        Ok(futures::future::join_all(vaults.iter().map(async |vault| {
            let there = self.host_seeing(&vault.identity);
            let usage = match &there {
                None => None,
                Some((host, pool)) => {
                    let asked = self.ask_vault::<VaultUsage>(team, vault, (host, pool), What::Usage(true), USAGE).await;
                    asked.inspect_err(|fault| tracing::warn!(%host, %team, %fault, "a host cannot say what a vault takes")).ok()
                }
            };
            let (host, pool) = there.map_or_else(|| (None, vault.pool.clone()), |(host, pool)| (Some(host), pool));
            api::Vault { pool, identity: vault.identity.clone(), host, usage }
        }))
        .await)
    }

    /// What nobody refers to in a vault; with a plan, that is removed.
    pub(crate) async fn prune_vault(
        &self,
        team: &Name,
        pool: &Name,
        host: Option<&Name>,
        apply: Option<&VaultPlan>,
    ) -> Result<VaultPlan, Fault> {
        let vault = self.vault_in(team, pool, host).await?;
        let last = vault.snapshots.first().map(|snapshot| &snapshot.host);
        let (host, pool) = self.reach(&vault.identity, pool, last)?;
        let what = apply.map_or(What::PlanPrune(true), |plan| What::Prune(encode(plan)));
        self.ask_vault(team, &vault, (&host, &pool), what, PRUNE).await
    }

    /// Records that a vault is to be read, and begins.
    pub(crate) async fn begin_verify(
        self: &Arc<Self>,
        team: &Name,
        pool: &Name,
        host: Option<&Name>,
        principal: String,
    ) -> Result<Stored<TaskRow>, Fault> {
        let vault = self.vault_in(team, pool, host).await?;
        let last = vault.snapshots.first().map(|snapshot| &snapshot.host);
        let (host, _) = self.reach(&vault.identity, pool, last)?;
        let id = TaskId::new(clock::fresh());
        let work = Work::Verify { identity: vault.identity, host: host.clone() };
        let mut task = TaskRow::new(id, team.clone(), pool.clone(), principal, work, clock::now());
        note(&mut task, format!("to be read on {host}"));
        self.db.commit(Batch::default().create(&task)).await?;
        tracing::info!(task = %id, kind = task.work.kind(), subject = %task.subject, principal = task.principal, "accepted");
        self.spawn(id);
        self.task(id).await
    }

    pub(super) async fn run_verify(&self, id: TaskId) -> Result<(), Fault> {
        let task = self.task(id).await?.row;
        let Work::Verify { identity, host } = &task.work else { return Ok(()) };
        let vault = self.vaults_of(&task.team).await?.into_iter().find(|vault| vault.identity == *identity);
        let outcome = match vault {
            // Its last snapshot was deleted meanwhile.
            None => Outcome::Done,
            Some(vault) => {
                let presence = self.hub.presence(host);
                let there = presence.as_ref().and_then(|presence| pool_there(&presence.facts.pools, identity));
                match self.look(&task.team, &vault, there.unwrap_or(&vault.pool), What::Verify(true)).await {
                    Ok(action) => self.verify(id, host, action).await?,
                    Err(Fault::Refused(refusal)) => Outcome::Failed(refusal),
                    Err(fault) => return Err(fault),
                }
            }
        };
        let task = self
            .edit_alone(id, |task| {
                if !task.state.ended() {
                    conclude(task, &outcome);
                }
            })
            .await?;
        Self::tell_end(&task);
        Ok(())
    }
}

impl Tasks {
    async fn verify(&self, id: TaskId, host: &Name, action: Action) -> Result<Outcome, Fault> {
        self.set_step(id, &format!("reads all of it on {host}")).await?;
        Ok(tokio::select! {
            answer = self.command(id, host, "verify", action) => match answer? {
                Err(refusal) => Outcome::Failed(refusal),
                Ok(answer) => match decode::<VaultFindings>("findings", &answer.result) {
                    Ok(findings) => judge(&findings.damage),
                    Err(malformed) => Outcome::Failed(malformed.into()),
                },
            },
            cancelled = self.cancelled(id) => {
                cancelled?;
                Outcome::Cancelled(Refusal::new(ErrorCode::Cancelled, "no longer waits; the host may go on reading"))
            }
        })
    }
}

fn judge(damage: &[String]) -> Outcome {
    if damage.is_empty() {
        return Outcome::Done;
    }
    let mut named: Vec<String> = damage.iter().take(NAMED).cloned().collect();
    if damage.len() > NAMED {
        named.push(format!("and {} more", damage.len() - NAMED));
    }
    Outcome::Failed(
        Refusal::new(ErrorCode::SnapshotDamaged, named.join("; "))
            .hint("put the files back from a copy, or delete the snapshots that need them: a rollback to these is refused"),
    )
}
