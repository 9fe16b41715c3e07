//! VMs that ended because their host went down start again when it is back, if their specs say so: on that host, lower orders first, those of one
//! order together. It is the controller that starts them, each on a new generation: a host alone cannot know what became of them meanwhile.

use std::collections::BTreeMap;
use std::sync::Arc;

use godwit_model::{ErrorCode, Name, VmId};

use super::{Ask, Asked, Tasks};
use crate::db::{Batch, Fault, retry};
use crate::rows::VmRow;

/// Who is recorded as having asked for it.
const PRINCIPAL: &str = "autostart";

impl Tasks {
    /// Begins with it; nothing happens twice, however often it is called.
    pub(crate) fn autostart(self: &Arc<Self>, host: &Name) {
        let (tasks, host) = (self.clone(), host.clone());
        self.tracker.spawn(async move {
            let stop = tasks.stop.clone();
            tokio::select! {
                () = stop.cancelled() => {}
                done = tasks.start_again(&host) => if let Err(fault) = done {
                    tracing::warn!(%host, error = &fault as &dyn std::error::Error, "VMs wait to be started until the host connects again");
                }
            }
        });
    }

    /// A task of the VM has ended: what its start has waited for, perhaps.
    pub(super) async fn start_what_waited(self: &Arc<Self>, vm: VmId) -> Result<(), Fault> {
        let vm = self.db.find::<VmRow>(&vm.to_string()).await?.map(|vm| vm.row);
        let waited = vm.filter(|vm| vm.start_wanted && vm.not_started.is_some());
        if let Some(host) = waited.and_then(|vm| vm.host).filter(|host| self.hub.presence(host).is_some()) {
            self.autostart(&host);
        }
        Ok(())
    }

    async fn start_again(self: &Arc<Self>, host: &Name) -> Result<(), Fault> {
        let mut orders: BTreeMap<u16, Vec<VmRow>> = BTreeMap::new();
        for vm in self.db.all::<VmRow>().await? {
            let here = vm.row.start_wanted && vm.row.host.as_ref() == Some(host) && !vm.row.has_process();
            if let Some(autostart) = vm.row.spec.autostart.filter(|_| here) {
                orders.entry(autostart.order).or_default().push(vm.row);
            }
        }
        for vms in orders.into_values() {
            let mut started = Vec::new();
            for vm in vms {
                started.extend(self.start_one(host, &vm).await?);
            }
            // The next order waits until these run, or cannot.
            futures::future::join_all(started).await;
        }
        Ok(())
    }

    async fn start_one(self: &Arc<Self>, host: &Name, vm: &VmRow) -> Result<Option<tokio::task::JoinHandle<()>>, Fault> {
        let ask = Ask {
            team: vm.team.clone(),
            vm: vm.name.clone(),
            principal: PRINCIPAL.to_owned(),
            reason: Some(format!("host {host} is back")),
            revision: None,
            schedule: None,
        };
        let mut last = false;
        loop {
            let refusal = match self.ask_and_follow(&ask, &Asked::Start(Some(host.clone()))).await {
                Ok((_, executor)) => return Ok(executor),
                Err(Fault::Refused(refusal)) => refusal,
                Err(fault) => return Err(fault),
            };
            let again = retry!({
                let Some(mut row) = self.db.find::<VmRow>(&vm.id.to_string()).await? else { return Ok(false) };
                if !row.row.start_wanted {
                    // Somebody has started it meanwhile.
                    return Ok(false);
                }
                let (busy, has_task) = (refusal.code == ErrorCode::VmBusy, row.row.activity.is_some());
                if busy && !has_task && !last {
                    // What it was busy with ended before it could know that somebody waits.
                    return Ok(true);
                }
                // Whatever it is busy with ends, and then it is its turn.
                row.row.start_wanted = busy && has_task;
                row.row.not_started = Some(refusal.clone());
                self.db.commit(Batch::default().update(&row)).await.map(|_| false)
            })?;
            if !again {
                tracing::warn!(%host, vm = %vm.name, %refusal, "a VM could not be started again");
                return Ok(None);
            }
            last = true;
        }
    }
}
