//! Snapshots: take, look, roll back, change, delete.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use godwit_api::v1;
use godwit_model::snapshot::LONGEST_QUIESCE;
use godwit_model::{ErrorCode, Millis, Name, Refusal};
use serde::Deserialize;
use utoipa::IntoParams;

use super::extract::{Body, Condition, Listing, MaybeBody, Named, Query, Team, page, team_of};
use super::vms::{Request, ask, check_reason};
use super::{Answer, App, Refusals};
use crate::db::{Batch, retry};
use crate::principals::{Action, Principal, Target, authorize};
use crate::rows::{SnapshotRow, VmRow};
use crate::tasks::{Ask, Asked, Asker};
use crate::views;

/// Which team's snapshots, and which of them.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Choice {
    /// The team; by default the principal's own (for an administrator `default`).
    team: Option<Name>,
    /// `next` of the page before.
    after: Option<String>,
    /// Objects in a page, 1 to 1000; 200 by default.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<usize>,
    /// Only those of VMs of this name.
    vm: Option<Name>,
}

/// Snapshots
#[utoipa::path(get, path = "/v1/snapshots", tag = "snapshot", operation_id = "snapshot_list", params(Choice),
    responses((status = 200, body = v1::Page<v1::Snapshot>), Refusals))]
pub(super) async fn snapshot_list(
    State(app): State<Arc<App>>,
    who: Principal,
    Query(Choice { team, after, limit, vm }): Query<Choice>,
) -> Answer<Json<v1::Page<v1::Snapshot>>> {
    let listing = Listing { team, after, limit };
    let team = team_of(&who, listing.team.as_ref());
    authorize(&who, Action::Look, Target::Team(team))?;
    let limit = listing.limit()?;
    let mut rows = app.db.page::<SnapshotRow>(&format!("{team}/"), listing.after.as_deref(), usize::MAX).await?;
    rows.retain(|row| vm.as_ref().is_none_or(|vm| row.row.vm_name == *vm));
    rows.truncate(limit + 1);
    Ok(Json(page(rows.iter().map(views::snapshot).collect(), limit, |snapshot: &v1::Snapshot| snapshot.name.to_string())))
}

/// A snapshot
#[utoipa::path(get, path = "/v1/snapshots/{snapshot}", tag = "snapshot", operation_id = "snapshot_show",
    params(("snapshot" = Name, Path), Team), responses((status = 200, body = v1::Snapshot), Refusals))]
pub(super) async fn snapshot_show(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(snapshot): Named,
    Query(query): Query<Team>,
) -> Answer<Json<v1::Snapshot>> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Look, Target::Team(team))?;
    Ok(Json(views::snapshot(&app.tasks.snapshot(team, &snapshot).await?)))
}

/// Takes a snapshot of a VM that runs or is paused
///
/// The VM runs on. The snapshot is there, `taking`, from the answer on, and `ready` when the task is done; of one that fails nothing is left.
#[utoipa::path(post, path = "/v1/snapshots", tag = "snapshot", operation_id = "snapshot_create", params(Team),
    request_body = v1::SnapshotCreate, responses((status = 202, body = v1::Task), Refusals))]
pub(super) async fn snapshot_create(
    State(app): State<Arc<App>>,
    who: Principal,
    Query(query): Query<Team>,
    Body(body): Body<v1::SnapshotCreate>,
) -> Answer<(StatusCode, Json<v1::Task>)> {
    if body.quiesce.is_some_and(|quiesce| quiesce == Millis(0) || quiesce > LONGEST_QUIESCE) {
        let refusal = Refusal::new(ErrorCode::BadRequest, format!("a guest is brought to rest within at most {LONGEST_QUIESCE}"));
        return Err(refusal.hint("give it between 1 ms and that, or leave it out").into());
    }
    let (vm, reason) = (body.vm.clone(), body.reason.clone());
    ask(&app, Request { who, team: query.team, vm, revision: None, reason }, Asked::Snapshot(body)).await
}

/// Makes a VM what it was in a snapshot
///
/// What it is now is kept in a snapshot first, then its QEMU is ended, if it runs, and it begins on a new generation, from its memory as it was or, without
/// that, by booting. A VM whose rollback fails in the middle does not start before one ends well.
#[utoipa::path(post, path = "/v1/snapshots/{snapshot}/rollback", tag = "snapshot", operation_id = "snapshot_rollback",
    params(("snapshot" = Name, Path), Team), request_body = Option<v1::SnapshotRollback>,
    responses((status = 202, body = v1::Task), Refusals))]
pub(super) async fn snapshot_rollback(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(snapshot): Named,
    Query(query): Query<Team>,
    MaybeBody(request): MaybeBody<v1::SnapshotRollback>,
) -> Answer<(StatusCode, Json<v1::Task>)> {
    let team = team_of(&who, query.team.as_ref()).clone();
    authorize(&who, Action::Change, Target::Team(&team))?;
    let row = app.tasks.snapshot(&team, &snapshot).await?.row;
    let vm = app.db.find::<VmRow>(&row.vm.to_string()).await?.ok_or_else(|| {
        Refusal::new(ErrorCode::NotFound, format!("VM {}, which snapshot {snapshot} is of, was deleted", row.vm_name))
            .hint("a snapshot makes an existing VM what it was; it makes no new one")
    })?;
    let request_of = Request { who, team: Some(team), vm: vm.row.name, revision: None, reason: request.reason.clone() };
    ask(&app, request_of, Asked::Rollback { snapshot, request }).await
}

/// Makes a new VM that begins from a snapshot
///
/// It has volumes and addresses of its own. It boots from the disks as they were; with `memory` it goes on where the other was and takes itself for that one: then
/// none of its interfaces is plugged in. Without `start` its volumes are made when it is first started, and the task is done at once.
#[utoipa::path(post, path = "/v1/snapshots/{snapshot}/clone", tag = "snapshot", operation_id = "snapshot_clone",
    params(("snapshot" = Name, Path), Team), request_body = v1::SnapshotClone, responses((status = 202, body = v1::Task), Refusals))]
pub(super) async fn snapshot_clone(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(snapshot): Named,
    Query(query): Query<Team>,
    Body(request): Body<v1::SnapshotClone>,
) -> Answer<(StatusCode, Json<v1::Task>)> {
    let team = team_of(&who, query.team.as_ref()).clone();
    authorize(&who, Action::Change, Target::Team(&team))?;
    check_reason(request.reason.as_ref())?;
    let ask =
        Ask { team, vm: request.name.clone(), principal: who.name, reason: request.reason.clone(), revision: None, schedule: None };
    let task = app.tasks.clone_snapshot(&ask, &snapshot, &request).await?;
    Ok((StatusCode::ACCEPTED, Json(views::task(&task))))
}

/// Writes a snapshot as files that QEMU takes by itself
///
/// A host that has its pool writes them into the pool's directory `exports`, in the clear. When the task is done it says where; an export of before is replaced then.
#[utoipa::path(post, path = "/v1/snapshots/{snapshot}/export", tag = "snapshot", operation_id = "snapshot_export",
    params(("snapshot" = Name, Path), Team), request_body = Option<v1::SnapshotExportRequest>,
    responses((status = 202, body = v1::Task), Refusals))]
pub(super) async fn snapshot_export(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(snapshot): Named,
    Query(query): Query<Team>,
    MaybeBody(request): MaybeBody<v1::SnapshotExportRequest>,
) -> Answer<(StatusCode, Json<v1::Task>)> {
    let team = team_of(&who, query.team.as_ref()).clone();
    authorize(&who, Action::Change, Target::Team(&team))?;
    let asker = Asker { team, principal: who.name };
    let task = app.tasks.begin_snapshot_export(&asker, &snapshot, &request).await?;
    Ok((StatusCode::ACCEPTED, Json(views::task(&task))))
}

/// Makes files a snapshot of a VM
///
/// As if it had been taken of the VM as it is: its spec is the VM's. The snapshot is there, `taking`, from the answer on. With memory it takes the role admin.
#[utoipa::path(post, path = "/v1/snapshots/{snapshot}/import", tag = "snapshot", operation_id = "snapshot_import",
    params(("snapshot" = Name, Path), Team), request_body = v1::SnapshotImport,
    responses((status = 202, body = v1::Task), Refusals))]
pub(super) async fn snapshot_import(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(snapshot): Named,
    Query(query): Query<Team>,
    Body(request): Body<v1::SnapshotImport>,
) -> Answer<(StatusCode, Json<v1::Task>)> {
    let team = team_of(&who, query.team.as_ref()).clone();
    authorize(&who, Action::Change, Target::Team(&team))?;
    // The state of devices is read by QEMU, which trusts it.
    if request.memory {
        authorize(&who, Action::Change, Target::Administration)?;
    }
    let asker = Asker { team, principal: who.name };
    let task = app.tasks.begin_snapshot_import(&asker, &snapshot, &request).await?;
    Ok((StatusCode::ACCEPTED, Json(views::task(&task))))
}

/// Changes a snapshot
#[utoipa::path(patch, path = "/v1/snapshots/{snapshot}", tag = "snapshot", operation_id = "snapshot_set",
    params(("snapshot" = Name, Path), Team, ("If-Match" = Option<String>, Header, description = "Revision that the snapshot must still have.")),
    request_body = v1::SnapshotSet, responses((status = 200, body = v1::Snapshot), Refusals))]
pub(super) async fn snapshot_set(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(name): Named,
    Query(query): Query<Team>,
    Condition(revision): Condition,
    Body(request): Body<v1::SnapshotSet>,
) -> Answer<Json<v1::Snapshot>> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Change, Target::Team(team))?;
    retry!({
        let mut snapshot = app.tasks.snapshot(team, &name).await?;
        snapshot.still_at(revision, format_args!("snapshot {name}"))?;
        match request.golden {
            Some(golden) if golden != snapshot.row.golden => snapshot.row.golden = golden,
            _ => return Ok(()),
        }
        app.db.commit(Batch::default().update(&snapshot)).await
    })?;
    tracing::info!(snapshot = %name, %team, golden = ?request.golden, principal = who.name, "snapshot changed");
    Ok(Json(views::snapshot(&app.tasks.snapshot(team, &name).await?)))
}

/// Deletes a snapshot
///
/// Others stay whole. With it goes its key; what it alone had in the vault goes when that is pruned.
#[utoipa::path(delete, path = "/v1/snapshots/{snapshot}", tag = "snapshot", operation_id = "snapshot_delete",
    params(("snapshot" = Name, Path), Team), responses((status = 204), Refusals))]
pub(super) async fn snapshot_delete(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(name): Named,
    Query(query): Query<Team>,
) -> Answer<StatusCode> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Change, Target::Team(team))?;
    app.tasks.delete_snapshot(team, &name, None).await?;
    tracing::info!(snapshot = %name, %team, principal = who.name, "snapshot deleted");
    Ok(StatusCode::NO_CONTENT)
}
