//! What agents say, and what of it is believed: only about VMs granted to their host, and never for an older generation.

use std::collections::HashSet;
use std::sync::Arc;

use godwit_api::v1::TaskState;
use godwit_link::convert::{self, Malformed};
use godwit_link::decode;
use godwit_link::v1::{self, controller_message::Body};
use godwit_model::{BytesPerSec, Generation, GuestFacts, MigrationFigures, MigrationProgress, Name, RunState, TaskId, VmId};

use crate::clock;
use crate::db::{Batch, Db, Fault, retry};
use crate::history;
use crate::hub::Hub;
use crate::restore;
use crate::rows::{Ended, MigrateWork, TaskRow, VmRow, Work};
use crate::tasks::Tasks;

/// Most reasons that are kept of why a VM cannot move.
const MAX_BLOCKED: usize = 8;
/// Longest message from one agent to the other. Theirs have some thousand bytes.
const MAX_PEER: usize = 64 << 10;
/// Text of hosts that is kept.
const DETAIL: usize = 500;

/// Takes in what agents say.
pub(crate) struct Reports {
    pub(crate) db: Db,
    pub(crate) hub: Arc<Hub>,
    pub(crate) tasks: Arc<Tasks>,
}

/// Why a message is dropped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Dropped {
    /// It means nothing.
    #[error("the message is malformed")]
    Malformed(#[from] Malformed),
    /// It is about what was never granted to the host.
    #[error("not_granted: {0}")]
    NotGranted(&'static str),
    /// It could not be stored: the agent has to say it again.
    #[error("the message cannot be stored")]
    Fault(#[from] Fault),
}

/// Hostile text, made fit for logs and terminals.
fn plain(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(DETAIL).collect()
}

fn migrate_work(task: &TaskRow) -> Option<&MigrateWork> {
    match &task.work {
        Work::Migrate(work) => Some(work),
        _ => None,
    }
}

impl Reports {
    /// A VM as its host sees it.
    pub(crate) async fn vm(&self, host: &Name, report: &v1::VmReport) -> Result<(), Dropped> {
        let id = convert::vm_id(&report.vm)?;
        let state = RunState::try_from(report.state())?;
        let generation = Generation(report.generation);
        let incoming_for = retry!({
            let Some(mut vm) = self.db.find::<VmRow>(&id.to_string()).await? else { return Ok(Err("no such VM")) };
            // After a restore it is the hosts that know what was granted since.
            let restoring = restore::is_unheard(&self.db, host).await?;
            if restoring {
                restore::adopt(&mut vm.row, host, generation);
            }
            let Some(granted) = vm.row.granted.get(host).copied() else { return Ok(Err("the VM was never granted to it")) };
            if generation > granted.generation {
                return Ok(Err("a generation that was never granted to it"));
            }
            if report.holding() == v1::Holding::Incoming {
                let wanted = vm.row.pending.as_ref().is_some_and(|p| p.destination == *host && p.generation == generation);
                return Ok(Ok((!wanted).then_some(granted.task)));
            }
            let newest = generation > vm.row.generation || (generation == vm.row.generation && vm.row.host.as_ref() == Some(host));
            if report.holding() == v1::Holding::Released && newest && !vm.row.released {
                vm.row.released = true;
                self.db.commit(Batch::default().update(&vm)).await?;
            }
            if report.holding() != v1::Holding::Owner || !newest {
                return Ok(Ok(None));
            }
            if !restoring && !may_claim(&vm.row, host, generation) {
                return Ok(Err("a generation whose move has ended without it"));
            }
            let before = vm.row.clone();
            // The owner of before has the VM back: what it has released nobody can claim any more.
            vm.row.released = false;
            take_over(&mut vm.row, host, generation);
            vm.row.set_state(state, clock::now());
            vm.row.reported = generation;
            if report.ended_with_host && !vm.row.has_process() && before.has_process() {
                vm.row.start_wanted = vm.row.spec.autostart.is_some();
            }
            // Of a host that may say anything: a few, each made harmless.
            vm.row.blocked = report.blocked.iter().take(MAX_BLOCKED).map(|reason| plain(reason)).collect();
            if state == RunState::Crashed {
                vm.row.detail = plain(&report.detail);
            }
            if vm.row != before {
                let batch = history::note(&self.db, Batch::default().update(&vm), &before, &vm.row, None).await?;
                self.db.commit(batch).await?;
                if vm.row.state != before.state || vm.row.host != before.host {
                    tracing::info!(%host, vm = %vm.row.name, ?state, %generation, detail = plain(&report.detail), "VM state");
                }
            }
            let moves = before.pending.map(|pending| pending.task);
            for task in vm.row.activity.map(|activity| activity.task).into_iter().chain(moves) {
                self.tasks.wake(task);
            }
            Ok(Ok(None))
        })?
        .map_err(Dropped::NotGranted)?;
        // Declining is safe whenever the VM was not activated there, and asked again is asked once too often at worst.
        if let Some(task) = incoming_for {
            self.tasks.decline_leftover(host, id, task, generation);
        }
        Ok(())
    }

    /// A host has said all that its journal holds.
    pub(crate) async fn heard(&self, host: &Name) -> Result<(), Fault> {
        restore::heard(&self.db, host).await.map(drop)
    }

    /// The host's VMs that ended when it went down are started again, as far as they shall.
    pub(crate) fn autostart(&self, host: &Name) {
        self.tasks.autostart(host);
    }

    /// VMs that run on a host as far as we know, and of which it has said nothing.
    pub(crate) async fn missing(&self, host: &Name, told: &HashSet<VmId>) -> Result<(), Fault> {
        for vm in self.db.all::<VmRow>().await? {
            let here = vm.row.host.as_ref() == Some(host) && vm.row.has_process() && vm.row.activity.is_none();
            if !here || told.contains(&vm.row.id) {
                continue;
            }
            tracing::warn!(%host, vm = %vm.row.name, "the host's journal does not know a VM that runs there");
            retry!({
                let Some(mut vm) = self.db.find::<VmRow>(&vm.row.id.to_string()).await? else { return Ok(()) };
                vm.row.detail = format!("host {host} came back without any record of this VM");
                self.db.commit(Batch::default().update(&vm)).await
            })?;
        }
        Ok(())
    }

    /// Progress of a migration, from one of its two hosts.
    pub(crate) async fn progress(&self, host: &Name, message: &v1::Progress) -> Result<(), Dropped> {
        let id = convert::task_id(&message.task)?;
        let progress: MigrationProgress = decode("progress", &message.progress)?;
        if let Some(task) = self.party(host, id).await? {
            // A store without space costs progress, nothing else.
            match self.tasks.progress(task.id, progress).await {
                Err(fault) if !fault.is_full() => return Err(fault.into()),
                _ => {}
            }
        }
        Ok(())
    }

    /// The task, if `host` is source or destination of it.
    async fn party(&self, host: &Name, id: TaskId) -> Result<Option<TaskRow>, Dropped> {
        let Some(task) = self.db.find::<TaskRow>(&id.to_string()).await? else {
            return Err(Dropped::NotGranted("no such task"));
        };
        let work = migrate_work(&task.row).ok_or(Dropped::NotGranted("not a migration"))?;
        if work.source != *host && work.destination != *host {
            return Err(Dropped::NotGranted("a migration of other hosts"));
        }
        Ok((!task.row.state.ended()).then_some(task.row))
    }

    /// The end of a migration, as one side knows it. Acknowledged only when it is stored.
    pub(crate) async fn ended(&self, host: &Name, message: &v1::MigrationEnded) -> Result<(), Dropped> {
        let (id, vm_id) = (convert::task_id(&message.task)?, convert::vm_id(&message.vm)?);
        let figures = match message.figures.as_slice() {
            [] => None,
            figures => decode::<Option<MigrationFigures>>("figures", figures)?,
        };
        let ended = Ended {
            generation: Generation(message.generation),
            moved: message.moved,
            reason: message.reason.clone().map(Into::into),
            figures,
        };
        retry!({ self.store_ended(host, id, vm_id, message.source, &ended).await })?.map_err(Dropped::NotGranted)?;
        self.hub.send(
            host,
            Body::EndedAck(v1::EndedAck { task: message.task.clone(), source: message.source, generation: message.generation }),
        );
        self.tasks.wake(id);
        Ok(())
    }

    async fn store_ended(
        &self,
        host: &Name,
        id: TaskId,
        vm_id: VmId,
        source: bool,
        ended: &Ended,
    ) -> Result<Result<(), &'static str>, Fault> {
        let Some(mut task) = self.db.find::<TaskRow>(&id.to_string()).await? else {
            // Long forgotten here: so may the agent. Nothing is believed of it.
            return Ok(Ok(()));
        };
        if task.row.vm != Some(vm_id) {
            return Ok(Err("another VM than the task's"));
        }
        let Work::Migrate(work) = &mut task.row.work else { return Ok(Err("not a migration")) };
        if *host != (if source { work.source.clone() } else { work.destination.clone() }) {
            return Ok(Err("not its side of the migration"));
        }
        let destination = work.destination.clone();
        // Who never released says so; a destination that claims the VM all the same lies, or was shown a release that nobody gave.
        let stayed = |said: &Ended| said.generation == ended.generation && !said.moved;
        if !source && ended.moved && work.source_ended.as_ref().is_some_and(stayed) {
            return Ok(Err("a VM that its source says has stayed"));
        }
        let mut batch = Batch::default();
        let side = if source { &mut work.source_ended } else { &mut work.destination_ended };
        // A source that was not waited for is kept in mind until it has said so.
        let late = source && ended.moved && task.row.state == TaskState::Done;
        if ended.generation == work.generation && side.is_none() && (late || !task.row.state.ended()) {
            *side = Some(ended.clone());
            batch = batch.update(&task);
        }
        if let Some(mut vm) = self.db.find::<VmRow>(&vm_id.to_string()).await? {
            let granted = vm.row.granted.get(&destination).is_some_and(|granted| ended.generation <= granted.generation);
            if ended.moved && !granted {
                return Ok(Err("a generation that was never granted"));
            }
            if ended.moved && ended.generation > vm.row.generation {
                // That it has moved is believed of who had it.
                let given = source && vm.row.host.as_ref() == Some(host);
                if !given && !may_claim(&vm.row, &destination, ended.generation) {
                    return Ok(Err("a generation whose move has ended without it"));
                }
                let before = vm.row.clone();
                take_over(&mut vm.row, &destination, ended.generation);
                vm.row.set_state(RunState::Running, clock::now());
                batch = history::note(&self.db, batch.update(&vm), &before, &vm.row, None).await?;
            }
        }
        self.db.commit(batch).await?;
        Ok(Ok(()))
    }

    /// What a VM writes, as its host has measured it.
    pub(crate) async fn writes(&self, host: &Name, report: &v1::WritesReport) -> Result<(), Dropped> {
        let id = convert::vm_id(&report.vm)?;
        // A VM that was deleted, or has just left, is no reason to complain.
        let Some(vm) = self.db.find::<VmRow>(&id.to_string()).await? else { return Ok(()) };
        if !vm.row.granted.contains_key(host) {
            return Err(Dropped::NotGranted("the VM was never granted to it"));
        }
        if vm.row.host.as_ref() != Some(host) {
            return Ok(());
        }
        // Nothing writes to more than all of its memory in a second.
        let rate = BytesPerSec(report.bytes_per_second.min(vm.row.spec.memory.get()));
        // A store without space costs what was gathered, nothing else.
        match self.hub.habits.sample(&self.db, id, rate, clock::now()).await {
            Err(fault) if !fault.is_full() => Err(fault.into()),
            _ => Ok(()),
        }
    }

    /// What a guest says of itself. Kept in memory only: its host says it again.
    pub(crate) async fn guest(&self, host: &Name, report: &v1::GuestReport) -> Result<(), Dropped> {
        let id = convert::vm_id(&report.vm)?;
        let facts = match report.facts.as_slice() {
            [] => None,
            facts => Some(decode::<GuestFacts>("facts", facts)?.harmless()),
        };
        let vm = self.db.find::<VmRow>(&id.to_string()).await?;
        // A VM that was deleted meanwhile is no reason to complain.
        let Some(vm) = vm else {
            self.hub.set_guest(host, id, None);
            return Ok(());
        };
        if !vm.row.granted.contains_key(host) {
            return Err(Dropped::NotGranted("the VM was never granted to it"));
        }
        self.hub.set_guest(host, id, facts);
        Ok(())
    }

    /// Whether the VM of this migration has come to its destination, whatever has become of it since.
    async fn has_arrived(&self, task: &TaskRow, work: &MigrateWork) -> Result<bool, Fault> {
        let vm = match task.vm {
            Some(vm) => self.db.find::<VmRow>(&vm.to_string()).await?,
            None => None,
        };
        Ok(task.state == TaskState::Done || vm.is_some_and(|vm| work.has_arrived(&vm.row)))
    }

    /// A message from one agent of a migration to the other.
    pub(crate) async fn peer(&self, host: &Name, message: v1::Peer) -> Result<(), Dropped> {
        if message.message.len() > MAX_PEER {
            return Err(Dropped::NotGranted("a message to its peer that is longer than any"));
        }
        let id = convert::task_id(&message.task)?;
        let to = convert::name("host", &message.host)?;
        let Some(task) = self.db.find::<TaskRow>(&id.to_string()).await? else {
            return Err(Dropped::NotGranted("no such task"));
        };
        let work = migrate_work(&task.row).ok_or(Dropped::NotGranted("not a migration"))?;
        let sides = (&work.source, &work.destination);
        if (host, &to) != sides && (&to, host) != sides {
            return Err(Dropped::NotGranted("not between the two hosts of the migration"));
        }
        // A destination that has had the VM, and has lost its journal since, would give it back to a source that must not have it any more.
        if *host == work.destination && declines(&message.message) && self.has_arrived(&task.row, work).await? {
            tracing::debug!(%host, task = %id, "a host has lost its journal of a VM that has come to it");
            return Ok(());
        }
        // Peers repeat what matters; one that is away is told by the carrier, or later.
        self.hub.relay(&to, v1::Peer { host: host.to_string(), ..message });
        Ok(())
    }
}

/// Whether one agent tells the other that it declines. It is for the other to say whether that is signed.
fn declines(message: &[u8]) -> bool {
    let envelope: Option<serde_json::Value> = serde_json::from_slice(message).ok();
    let statement = envelope.as_ref().and_then(|envelope| envelope["statement"].as_str());
    let said: Option<serde_json::Value> = statement.and_then(|statement| serde_json::from_str(statement).ok());
    said.is_some_and(|said| said["peer"]["message"]["fact"] == "declined")
}

/// Whether `host` may say that it owns `generation`: it owns it already, it is the destination of a move that has not ended, or the owner before it
/// says that it has released the VM. Without any of these a grant whose move has ended is of no more use.
fn may_claim(vm: &VmRow, host: &Name, generation: Generation) -> bool {
    generation <= vm.generation
        || vm.released
        || vm.pending.as_ref().is_some_and(|pending| pending.destination == *host && pending.generation == generation)
}

/// The newest generation's holder owns the VM; never an older one's.
fn take_over(vm: &mut VmRow, host: &Name, generation: Generation) {
    if generation > vm.generation {
        vm.generation = generation;
        vm.host = Some(host.clone());
        vm.released = false;
        vm.pending.take_if(|pending| pending.generation <= generation);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::rows::PendingGrant;
    use crate::tests::support::{name, vm_row};

    fn invariant_one_owner_of_the_newest_generation(before: &VmRow, after: &VmRow) {
        assert!(after.generation >= before.generation, "an older generation was believed");
        assert!(after.issued >= after.generation && after.issued >= before.issued, "a number could be issued twice");
        if after.generation == before.generation {
            assert_eq!(after.host, before.host, "the owner changed without a newer generation");
        }
        assert!(after.pending.as_ref().is_none_or(|pending| pending.generation > after.generation), "a grant outlived its use");
    }

    proptest! {
        #[test]
        fn prop_ownership_moves_upwards_only(steps in prop::collection::vec((0..3_u8, 0..3_u8, 0..12_u64), 0..60)) {
            let mut row = vm_row();
            let task = TaskId::new(uuid::Uuid::nil());
            for (what, host, number) in steps {
                let before = row.clone();
                let host = name(&format!("h{host}"));
                match what {
                    0 => {
                        let generation = row.issue(&host, task);
                        prop_assert!(generation > before.issued);
                        row.pending = Some(PendingGrant { destination: host, generation, task });
                    }
                    1 => {
                        // Only what was granted to the host gets this far.
                        let granted = row.granted.get(&host).map_or(Generation(0), |granted| granted.generation);
                        let generation = Generation(number).min(granted);
                        if may_claim(&row, &host, generation) {
                            take_over(&mut row, &host, generation);
                        }
                    }
                    _ => row.release(task),
                }
                invariant_one_owner_of_the_newest_generation(&before, &row);
            }
        }
    }

    #[test]
    fn a_fact_that_declines_is_told_from_others_and_from_what_is_none() {
        let fact = |fact: &str| {
            let said =
                serde_json::json!({"from": "h2", "grant": "x", "peer": {"vm": "v", "generation": 2, "message": {"fact": fact}}});
            serde_json::json!({"statement": said.to_string(), "signature": "", "chain": []}).to_string()
        };
        assert!(declines(fact("declined").as_bytes()));
        for other in [fact("whole"), "{}".into(), "declined".into(), r#"{"statement": 7}"#.into(), String::new()] {
            assert!(!declines(other.as_bytes()), "{other}");
        }
    }

    #[test]
    fn what_hosts_say_cannot_draw_on_a_terminal() {
        assert_eq!(plain("a\u{1b}[2Jb\n"), "a[2Jb");
        assert_eq!(plain(&"x".repeat(2_000)).len(), DETAIL);
    }
}
