//! Whether each running VM could move, known before anybody needs it: the check of a move, for every VM against every host, whenever hosts come, go
//! or change. What is found stands beside the VM, so that a change of it is an event, and no change of the VM.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use godwit_api::v1::HostCheck;
use godwit_model::{ErrorCode, Name, Refusal, ResolvedSpec, VmId};

use crate::checks::{Candidate, blocked, obstacles};
use crate::db::{Batch, Db, Fault, Stored};
use crate::hub::{Hub, Presence};
use crate::networks::check_networks;
use crate::rows::{MigratableRow, NetworkRow, VmRow};
use crate::{clock, views};

/// How often it is looked at when nothing is heard: memory and pools change with each heartbeat.
const PERIOD: Duration = Duration::from_secs(10);
/// Several hosts that connect at once are looked at once.
const CALM: Duration = Duration::from_millis(500);

/// What a check of a VM is made from.
pub(crate) struct Look {
    present: Vec<(Name, Presence)>,
    networks: HashMap<Name, Vec<Stored<NetworkRow>>>,
}

impl Look {
    /// What is there now.
    pub(crate) async fn at(db: &Db, hub: &Hub) -> Result<Self, Fault> {
        let mut networks: HashMap<Name, Vec<Stored<NetworkRow>>> = HashMap::new();
        for network in db.all::<NetworkRow>().await? {
            networks.entry(network.row.team.clone()).or_default().push(network);
        }
        Ok(Self { present: hub.present(), networks })
    }

    /// What is in the way to each connected host but its own, or to `to` alone; looked at one host after the other, as they are asked for.
    pub(crate) fn check<'a>(
        &'a self,
        vm: &'a VmRow,
        spec: &'a ResolvedSpec,
        source: &'a Name,
        to: Option<&'a Name>,
    ) -> impl Iterator<Item = HostCheck> + 'a {
        let networks = self.networks.get(&vm.team).map_or(&[][..], Vec::as_slice);
        let here = self.present.iter().find(|(name, _)| name == source);
        here.into_iter().flat_map(move |(here, presence)| {
            let source = Candidate::new(here, presence);
            let others = self.present.iter().filter(move |(name, _)| name != here && to.is_none_or(|to| to == name));
            others.map(move |(name, presence)| {
                let there = Candidate::new(name, presence);
                let mut found: Vec<Refusal> = blocked(&vm.blocked).into_iter().chain(obstacles(spec, source, there)).collect();
                found.extend(check_networks(spec, networks, there).err());
                HostCheck { host: name.clone(), obstacles: found }
            })
        })
    }

    /// The verdict on a VM; none while it does not run, or is on its way.
    fn verdict(&self, vm: &VmRow) -> Option<(bool, Option<Refusal>)> {
        let (spec, source) = (vm.resolved.as_ref()?, vm.host.as_ref()?);
        if !vm.has_process() {
            return None;
        }
        if !self.present.iter().any(|(name, _)| name == source) {
            let why = Refusal::new(ErrorCode::HostDown, format!("its host {source} is not connected"));
            return Some((false, Some(why.hint("restore the host's agent or link; the VM keeps running without it"))));
        }
        let mut nearest: Option<HostCheck> = None;
        for check in self.check(vm, spec, source, None) {
            // One host is enough: the others need no look.
            if check.obstacles.is_empty() {
                return Some((true, None));
            }
            if nearest.as_ref().is_none_or(|nearest| check.obstacles.len() < nearest.obstacles.len()) {
                nearest = Some(check);
            }
        }
        let reason = nearest.and_then(|check| check.obstacles.into_iter().next()).unwrap_or_else(|| {
            Refusal::new(ErrorCode::NoHost, "no other host is connected")
                .hint("start the agent of another host (`godwit agent`), or let one join")
        });
        Some((false, Some(reason)))
    }
}

/// Looks whenever something may have changed, for ever.
pub(crate) async fn follow(db: Db, hub: Arc<Hub>) {
    let mut hosts = hub.watch();
    loop {
        // A store without space has been complained about by whoever needed some; it is looked at again anyhow.
        if let Err(fault) = look(&db, &hub).await
            && !fault.is_full()
        {
            tracing::warn!(error = &fault as &dyn std::error::Error, "which VMs could move cannot be stored");
        }
        let _ = tokio::time::timeout(PERIOD, hosts.changed()).await;
        tokio::time::sleep(CALM).await;
        hosts.mark_unchanged();
    }
}

async fn look(db: &Db, hub: &Hub) -> Result<(), Fault> {
    let look = Look::at(db, hub).await?;
    let mut known: HashMap<VmId, Stored<MigratableRow>> =
        db.all::<MigratableRow>().await?.into_iter().map(|stored| (stored.row.vm, stored)).collect();
    let mut current = HashMap::new();
    for vm in db.all::<VmRow>().await?.into_iter().map(|vm| vm.row) {
        let Some((possible, reason)) = look.verdict(&vm) else { continue };
        let before = known.remove(&vm.id);
        if let Some(before) = before.as_ref().filter(|before| same(&before.row, possible, reason.as_ref())) {
            current.insert(vm.id, views::migratable(&before.row));
            continue;
        }
        let row = MigratableRow { vm: vm.id, name: vm.name, team: vm.team, possible, reason, since: clock::now() };
        current.insert(vm.id, views::migratable(&row));
        db.commit(match before {
            Some(before) => Batch::default().update(&Stored { row, ..before }),
            None => Batch::default().create(&row),
        })
        .await?;
    }
    // What does not run could not move, and nobody asks.
    for gone in known.into_values() {
        db.commit(Batch::default().delete(&gone)).await?;
    }
    hub.set_migratable(current);
    Ok(())
}

/// Figures in a reason change all the time; only another reason is news.
fn same(before: &MigratableRow, possible: bool, reason: Option<&Refusal>) -> bool {
    before.possible == possible && before.reason.as_ref().map(|reason| reason.code) == reason.map(|reason| reason.code)
}
