//! Golden snapshots that were asked for with their VMs: each is taken once, when the VM has first been started and its guest is up.

use std::sync::Arc;
use std::time::Duration;

use godwit_api::v1::SnapshotCreate;
use godwit_model::name::MAX_NAME;
use godwit_model::{ErrorCode, Millis, Name, RunState, VmId};

use super::{Ask, Asked, Tasks};
use crate::clock;
use crate::db::{Batch, Fault, retry};
use crate::rows::VmRow;

/// Who is recorded as having asked for it.
const PRINCIPAL: &str = "golden";
/// What the name of the snapshot ends with.
const ENDING: &str = "-golden";
/// How often it is looked whether a guest is up.
const LOOK: Duration = Duration::from_millis(500);
/// How long until a request that was refused is made again.
const AGAIN: Duration = Duration::from_secs(5);

impl Tasks {
    /// Goes on with what was asked for before this controller started.
    pub(super) async fn watch_golden(self: &Arc<Self>) -> Result<(), Fault> {
        for vm in self.db.all::<VmRow>().await? {
            if vm.row.golden_after.is_some() && vm.row.has_process() {
                self.watch_one(vm.row.id);
            }
        }
        Ok(())
    }

    /// Looks after a VM that has been started, until its snapshot is asked for or it has stopped.
    pub(super) fn watch_one(self: &Arc<Self>, vm: VmId) {
        if !self.watched.lock().expect("no holder panics").insert(vm) {
            return;
        }
        let tasks = self.clone();
        self.tracker.spawn(async move {
            let stop = tasks.stop.clone();
            tokio::select! {
                () = stop.cancelled() => {}
                watched = tasks.keep_when_up(vm) => if let Err(fault) = watched {
                    tracing::warn!(%vm, error = &fault as &dyn std::error::Error, "a golden snapshot is taken when the VM is started again");
                }
            }
            tasks.watched.lock().expect("no holder panics").remove(&vm);
        });
    }

    async fn keep_when_up(self: &Arc<Self>, id: VmId) -> Result<(), Fault> {
        let mut told = false;
        loop {
            let Some(vm) = self.db.find::<VmRow>(&id.to_string()).await?.map(|vm| vm.row) else { return Ok(()) };
            // Its next start looks after it.
            let Some(after) = vm.golden_after.filter(|_| vm.has_process()) else { return Ok(()) };
            if !self.is_up(&vm, after) {
                tokio::time::sleep(LOOK).await;
                continue;
            }
            match self.ask_for_golden(&vm).await {
                Ok(()) => return self.forget_golden(id).await,
                // Of before a restart of this controller.
                Err(Fault::Refused(refusal)) if refusal.code == ErrorCode::NameTaken => return self.forget_golden(id).await,
                Err(Fault::Refused(refusal)) => {
                    if !std::mem::replace(&mut told, true) && refusal.code != ErrorCode::VmBusy {
                        tracing::warn!(vm = %vm.name, %refusal, "a golden snapshot is not taken yet");
                    }
                    tokio::time::sleep(AGAIN).await;
                }
                Err(fault) => return Err(fault),
            }
        }
    }

    fn is_up(&self, vm: &VmRow, after: Millis) -> bool {
        let answers = || vm.host.as_ref().is_some_and(|host| self.hub.guest(host, vm.id).is_some());
        vm.state == RunState::Running && (clock::now().0.saturating_sub(vm.since.0) >= after.0 || answers())
    }

    async fn ask_for_golden(self: &Arc<Self>, vm: &VmRow) -> Result<(), Fault> {
        let stem: String = vm.name.as_str().chars().take(MAX_NAME - ENDING.len()).collect();
        let ask = Ask {
            team: vm.team.clone(),
            vm: vm.name.clone(),
            principal: PRINCIPAL.to_owned(),
            reason: Some("asked for when the VM was created".to_owned()),
            revision: None,
            schedule: None,
        };
        let request = SnapshotCreate {
            vm: vm.name.clone(),
            name: Name::new(format!("{stem}{ENDING}")).ok(),
            memory: true,
            quiesce: None,
            pool: None,
            golden: true,
            reason: ask.reason.clone(),
        };
        self.ask(&ask, &Asked::Snapshot(request)).await.map(|_| ())
    }

    async fn forget_golden(&self, id: VmId) -> Result<(), Fault> {
        retry!({
            let Some(mut vm) = self.db.find::<VmRow>(&id.to_string()).await? else { return Ok(()) };
            vm.row.golden_after = None;
            self.db.commit(Batch::default().update(&vm)).await
        })
    }
}
