//! A store that was restored from a copy does not know what was granted since the copy was made. The hosts do: nothing is started, moved or
//! deleted before each of them has said what it holds, and no number that may have been used is used again.

use std::collections::BTreeSet;

use godwit_api::v1::SnapshotState;
use godwit_model::{ErrorCode, Generation, Name, Refusal, Retry, TaskId};

use crate::db::{Batch, Db, Fault, retry};
use crate::rows::{GrantedTo, HostRow, RestoreRow, SnapshotRow, TaskRow, VmRow};
use crate::tasks::{Outcome, conclude, note};

/// More generations than were issued for one VM since the copy was made.
const GAP: u64 = 1 << 32;
/// Hosts that one host may name.
const MAX_MEMBERS: usize = 10_000;

/// Writes down that the store is a copy and whom to hear. First of all: what follows is gone on with by the next start, should this one end early.
pub(crate) async fn begin(db: &Db) -> Result<(), Fault> {
    let unheard: BTreeSet<Name> = db.all::<HostRow>().await?.into_iter().map(|host| host.row.name).collect();
    tracing::warn!(
        hosts = unheard.len(),
        "the store was restored: nothing starts, moves or is deleted before every host has said what it runs"
    );
    let fresh = RestoreRow { unheard, swept: false };
    match db.find::<RestoreRow>("").await? {
        Some(mut row) => {
            row.row = fresh;
            db.commit(Batch::default().update(&row)).await
        }
        None => db.commit(Batch::default().create(&fresh)).await,
    }
}

/// Before anything is gone on with: what was under way when the copy was made has long ended, one way or another.
pub(crate) async fn sweep(db: &Db) -> Result<(), Fault> {
    let Some(mut row) = db.find::<RestoreRow>("").await?.filter(|row| !row.row.swept) else { return Ok(()) };
    for mut vm in db.all::<VmRow>().await? {
        vm.row.issued = Generation(vm.row.issued.0.saturating_add(GAP));
        vm.row.activity = None;
        vm.row.pending = None;
        vm.row.start_wanted = false;
        let before = vm.row.claims();
        vm.row.held.clear();
        let batch = before.difference(&vm.row.claims()).fold(Batch::default(), |batch, key| batch.free(key.clone()));
        db.commit(batch.update(&vm)).await?;
    }
    for mut snapshot in db.all::<SnapshotRow>().await?.into_iter().filter(|snapshot| snapshot.row.state == SnapshotState::Taking) {
        snapshot.row.state = SnapshotState::Failed;
        db.commit(Batch::default().update(&snapshot)).await?;
    }
    for mut task in db.all::<TaskRow>().await?.into_iter().filter(|task| !task.row.state.ended()) {
        let refusal =
            Refusal::new(ErrorCode::Cancelled, "the controller's store was restored from a copy while this was under way")
                .hint("look at the VM and decide again")
                .retry(Retry::Unknown);
        note(&mut task.row, refusal.message.clone());
        conclude(&mut task.row, &Outcome::Failed(refusal));
        db.commit(Batch::default().update(&task)).await?;
    }
    row.row.swept = true;
    db.commit(Batch::default().update(&row)).await
}

/// Hosts that another host knows of and the copy does not: they joined since, and may run what the copy knows elsewhere.
pub(crate) async fn note_members(db: &Db, members: &[String]) -> Result<(), Fault> {
    retry!({
        let Some(mut row) = db.find::<RestoreRow>("").await? else { return Ok(()) };
        let before = row.row.unheard.len();
        for member in members.iter().take(MAX_MEMBERS).filter_map(|member| Name::new(member.as_str()).ok()) {
            if db.find::<HostRow>(member.as_str()).await?.is_none() {
                row.row.unheard.insert(member);
            }
        }
        if row.row.unheard.len() == before {
            return Ok(());
        }
        db.commit(Batch::default().update(&row)).await
    })
}

/// Whether a host has yet to say what it runs.
pub(crate) async fn is_unheard(db: &Db, host: &Name) -> Result<bool, Fault> {
    Ok(db.find::<RestoreRow>("").await?.is_some_and(|row| row.row.unheard.contains(host)))
}

/// A host has said it, or is no host any more; whether it was waited for.
pub(crate) async fn heard(db: &Db, host: &Name) -> Result<bool, Fault> {
    retry!({
        let Some(mut row) = db.find::<RestoreRow>("").await? else { return Ok(false) };
        if !row.row.unheard.remove(host) {
            return Ok(false);
        }
        let left = row.row.unheard.len();
        tracing::info!(%host, left, "a host has said what it runs");
        let batch = if left == 0 { Batch::default().delete(&row) } else { Batch::default().update(&row) };
        db.commit(batch).await.map(|()| true)
    })
}

/// Refuses while a host has yet to be heard: what it runs could be started a second time.
pub(crate) async fn all_heard(db: &Db) -> Result<(), Fault> {
    let Some(row) = db.find::<RestoreRow>("").await? else { return Ok(()) };
    let names: Vec<&str> = row.row.unheard.iter().map(Name::as_str).collect();
    let message =
        format!("the controller's store was restored from a copy, and what these hosts run is not known yet: {}", names.join(", "));
    Err(Refusal::new(ErrorCode::HostDown, message)
        .hint(
            "start their agents; one that is gone for good, with all that ran on it, is removed with `godwit host remove --force`",
        )
        .retry(Retry::Safe)
        .into())
}

/// What a host that is heard for the first time holds was granted to it, whenever that was.
pub(crate) fn adopt(vm: &mut VmRow, host: &Name, generation: Generation) {
    let task = vm.granted.get(host).map_or_else(|| TaskId::new(uuid::Uuid::nil()), |granted| granted.task);
    let known = vm.granted.entry(host.clone()).or_insert(GrantedTo { generation, task });
    known.generation = known.generation.max(generation);
    vm.issued = vm.issued.max(generation);
}
