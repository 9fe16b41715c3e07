//! Schedules of snapshots: create, look, change, run, delete.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use godwit_api::v1;
use godwit_model::{ErrorCode, Name, Refusal, ScheduleId, UnixMillis, VmId};

use super::extract::{Body, Condition, Listing, MaybeBody, Named, Query, Team, page, team_of};
use super::vms::check_reason;
use super::{Answer, App, Refusals};
use crate::db::{Batch, Fault, Stored, retry};
use crate::principals::{Action, Principal, Target, authorize, not_found};
use crate::rows::{Errand, ErrandRow, ScheduleRow, SnapshotRow, TeamRow, VmRow};
use crate::schedules::{MOST, check, expired, taken_by};
use crate::tasks::Opening;
use crate::{clock, views};

async fn find(app: &App, team: &Name, schedule: &Name) -> Result<Stored<ScheduleRow>, Fault> {
    app.db.find::<ScheduleRow>(&format!("{team}/{schedule}")).await?.ok_or_else(|| not_found("schedule", schedule).into())
}

/// Whether the VMs that it names are there; those that were named before may be gone.
async fn check_names<'a>(app: &App, team: &Name, names: impl Iterator<Item = &'a Name>) -> Result<(), Fault> {
    for name in names {
        app.tasks.vm(team, name).await?;
    }
    Ok(())
}

/// Schedules
#[utoipa::path(get, path = "/v1/schedules", tag = "schedule", operation_id = "schedule_list", params(Listing),
    responses((status = 200, body = v1::Page<v1::Schedule>), Refusals))]
pub(super) async fn schedule_list(
    State(app): State<Arc<App>>,
    who: Principal,
    Query(query): Query<Listing>,
) -> Answer<Json<v1::Page<v1::Schedule>>> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Look, Target::Team(team))?;
    let limit = query.limit()?;
    let rows = app.db.page::<ScheduleRow>(&format!("{team}/"), query.after.as_deref(), limit + 1).await?;
    Ok(Json(page(rows.iter().map(views::schedule).collect(), limit, |schedule: &v1::Schedule| schedule.name.to_string())))
}

/// A schedule
#[utoipa::path(get, path = "/v1/schedules/{schedule}", tag = "schedule", operation_id = "schedule_show",
    params(("schedule" = Name, Path), Team), responses((status = 200, body = v1::Schedule), Refusals))]
pub(super) async fn schedule_show(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(schedule): Named,
    Query(query): Query<Team>,
) -> Answer<Json<v1::Schedule>> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Look, Target::Team(team))?;
    Ok(Json(views::schedule(&find(&app, team, &schedule).await?)))
}

/// How a schedule stands with each of its VMs: what is due, what became of the last run, and what its retention would delete next
#[utoipa::path(get, path = "/v1/schedules/{schedule}/status", tag = "schedule", operation_id = "schedule_status",
    params(("schedule" = Name, Path), Team), responses((status = 200, body = v1::ScheduleStatus), Refusals))]
pub(super) async fn schedule_status(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(schedule): Named,
    Query(query): Query<Team>,
) -> Answer<Json<v1::ScheduleStatus>> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Look, Target::Team(team))?;
    Ok(Json(status(&app, &find(&app, team, &schedule).await?).await?))
}

async fn status(app: &App, schedule: &Stored<ScheduleRow>) -> Result<v1::ScheduleStatus, Fault> {
    let ScheduleRow { id, team, .. } = &schedule.row;
    let chosen: BTreeMap<VmId, Name> =
        app.tasks.chosen_by(&schedule.row).await?.into_iter().map(|vm: VmRow| (vm.id, vm.name)).collect();
    let errands: BTreeMap<VmId, ErrandRow> =
        app.tasks.errands_of(*id).await?.into_iter().map(|errand| (errand.row.vm, errand.row)).collect();
    let rows = app.db.page::<SnapshotRow>(&format!("{team}/"), None, usize::MAX).await?;
    let all: Vec<SnapshotRow> = rows.into_iter().map(|row| row.row).filter(|row| row.schedule == Some(*id)).collect();
    let mut names: BTreeMap<VmId, Name> = all.iter().map(|row| (row.vm, row.vm_name.clone())).collect();
    names.extend(errands.values().map(|errand| (errand.vm, errand.vm_name.clone())));
    names.extend(chosen.iter().map(|(vm, name)| (*vm, name.clone())));
    let now = app.tasks.now();
    let times = (now, views::schedule(schedule).next.unwrap_or(now));
    let mut vms = Vec::new();
    for (vm, name) in names {
        vms.push(standing(&schedule.row, (vm, name, chosen.contains_key(&vm)), errands.get(&vm), &all, times));
    }
    vms.sort_by(|a, b| a.vm.cmp(&b.vm));
    Ok(v1::ScheduleStatus { vms })
}

fn standing(
    schedule: &ScheduleRow,
    (vm, name, chosen): (VmId, Name, bool),
    errand: Option<&ErrandRow>,
    all: &[SnapshotRow],
    (now, coming): (UnixMillis, UnixMillis),
) -> v1::ScheduledVm {
    let (due, waits_for, task) = match errand.map(|errand| &errand.state) {
        Some(Errand::Due { due, obstacle, .. }) => {
            let waits = obstacle.as_ref().map_or_else(|| "its turn".to_owned(), |refusal| refusal.message.clone());
            (Some(*due), Some(waits), None)
        }
        Some(Errand::Taking { due, task, .. }) => (Some(*due), None, Some(*task)),
        Some(Errand::Idle) | None => (None, None, None),
    };
    let own = taken_by(schedule.id, vm, all);
    let counted: Vec<&SnapshotRow> = own.iter().copied().filter(|row| row.created <= now).collect();
    // A zone that is not known any more is told by the schedule's missing next run.
    let expiring = expired(&schedule.spec, &counted, chosen.then_some(coming)).unwrap_or_default();
    v1::ScheduledVm {
        vm: name,
        chosen,
        due,
        waits_for,
        task,
        last: errand.and_then(|errand| errand.last.as_ref()).map(views::errand_end),
        snapshots: own.iter().rev().map(|row| row.name.clone()).collect(),
        expiring: expiring.iter().map(|row| row.name.clone()).collect(),
    }
}

/// Creates a schedule
///
/// It runs for the first time at the first instant behind its creation.
#[utoipa::path(post, path = "/v1/schedules", tag = "schedule", operation_id = "schedule_create", params(Team),
    request_body = v1::ScheduleCreate, responses((status = 201, body = v1::Schedule), Refusals))]
pub(super) async fn schedule_create(
    State(app): State<Arc<App>>,
    who: Principal,
    Query(query): Query<Team>,
    Body(request): Body<v1::ScheduleCreate>,
) -> Answer<(StatusCode, Json<v1::Schedule>)> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Change, Target::Team(team))?;
    let v1::ScheduleCreate { name, spec } = request;
    check(&spec)?;
    check_names(&app, team, spec.vms.iter()).await?;
    let (id, now) = (ScheduleId::new(clock::fresh()), app.tasks.now());
    let row =
        ScheduleRow { id, name: name.clone(), team: team.clone(), created: now, spec, handled: now, last: None, missed: None };
    retry!({
        let owner = app.db.find::<TeamRow>(team.as_str()).await?.ok_or_else(|| not_found("team", team))?;
        let others = app.db.page::<ScheduleRow>(&format!("{team}/"), None, MOST).await?;
        if others.iter().any(|other| other.row.name == name) {
            let taken = Refusal::new(ErrorCode::NameTaken, format!("there is a schedule {name} already"));
            return Err(taken.hint("choose another name, or change that one: `godwit schedule set`").into());
        }
        if others.len() >= MOST {
            let many = Refusal::new(ErrorCode::BadRequest, format!("a team has at most {MOST} schedules"));
            return Err(many.hint("delete one that is not needed, or have one schedule for all VMs with a label").into());
        }
        app.db.commit(Batch::default().unchanged(&owner).create(&row)).await
    })?;
    app.tasks.look_at_schedules();
    tracing::info!(schedule = %name, %team, principal = who.name, "schedule created");
    Ok((StatusCode::CREATED, Json(views::schedule(&find(&app, team, &name).await?))))
}

/// Changes a schedule
///
/// What has begun goes on; what has not is not begun any more if the schedule is disabled, or is not for its VM now. Other rules delete nothing before the next good snapshot. Instants that
/// have passed are not made up by other times, another zone, or a schedule that is enabled again.
#[utoipa::path(patch, path = "/v1/schedules/{schedule}", tag = "schedule", operation_id = "schedule_set",
    params(("schedule" = Name, Path), Team, ("If-Match" = Option<String>, Header, description = "Revision that the schedule must still have.")),
    request_body = v1::ScheduleSet, responses((status = 200, body = v1::Schedule), Refusals))]
pub(super) async fn schedule_set(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(name): Named,
    Query(query): Query<Team>,
    Condition(revision): Condition,
    Body(request): Body<v1::ScheduleSet>,
) -> Answer<Json<v1::Schedule>> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Change, Target::Team(team))?;
    let v1::ScheduleSet { spec } = request;
    retry!({
        let mut schedule = find(&app, team, &name).await?;
        schedule.still_at(revision, format_args!("schedule {name}"))?;
        check(&spec)?;
        check_names(&app, team, spec.vms.difference(&schedule.row.spec.vms)).await?;
        let before = std::mem::replace(&mut schedule.row.spec, spec.clone());
        if before == spec {
            return Ok(());
        }
        if (&before.when, &before.zone, before.enabled) != (&spec.when, &spec.zone, spec.enabled) {
            (schedule.row.handled, schedule.row.missed) = (app.tasks.now(), None);
        }
        let mut batch = Batch::default().update(&schedule);
        let (keeps_otherwise, is_switched_off) =
            ((before.keep, &before.zone) != (spec.keep, &spec.zone), before.enabled && !spec.enabled);
        for mut errand in app.tasks.errands_of(schedule.row.id).await? {
            let was = errand.row.clone();
            // Nothing goes by other rules before the next good snapshot.
            if keeps_otherwise {
                (errand.row.sweep, errand.row.deleting, errand.row.stuck) = (None, None, None);
            }
            if is_switched_off && matches!(errand.row.state, Errand::Due { .. }) {
                errand.row.state = Errand::Idle;
            }
            if errand.row != was {
                batch = batch.update(&errand);
            }
        }
        app.db.commit(batch).await
    })?;
    app.tasks.look_at_schedules();
    tracing::info!(schedule = %name, %team, principal = who.name, "schedule changed");
    Ok(Json(views::schedule(&find(&app, team, &name).await?)))
}

/// Has a schedule run now, enabled or not
///
/// Its regular runs stay as they are. The answer says how it stands with each VM then; a VM whose last run is still under way is left out, with the reason.
#[utoipa::path(post, path = "/v1/schedules/{schedule}/run", tag = "schedule", operation_id = "schedule_run",
    params(("schedule" = Name, Path), Team), request_body = Option<v1::ScheduleRun>,
    responses((status = 202, body = v1::ScheduleStatus), Refusals))]
pub(super) async fn schedule_run(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(name): Named,
    Query(query): Query<Team>,
    MaybeBody(request): MaybeBody<v1::ScheduleRun>,
) -> Answer<(StatusCode, Json<v1::ScheduleStatus>)> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Change, Target::Team(team))?;
    check_reason(request.reason.as_ref())?;
    let schedule = find(&app, team, &name).await?;
    let opening = Opening { due: app.tasks.now(), by: Some((who.name.clone(), request.reason)) };
    if !app.tasks.open_run(&schedule.row, opening).await? {
        return Err(not_found("schedule", &name).into());
    }
    app.tasks.look_at_schedules();
    tracing::info!(schedule = %name, %team, principal = who.name, "schedule is to run");
    Ok((StatusCode::ACCEPTED, Json(status(&app, &find(&app, team, &name).await?).await?)))
}

/// Deletes a schedule
///
/// Its snapshots stay, and nothing deletes them any more by itself. What has begun goes on.
#[utoipa::path(delete, path = "/v1/schedules/{schedule}", tag = "schedule", operation_id = "schedule_delete",
    params(("schedule" = Name, Path), Team), responses((status = 204), Refusals))]
pub(super) async fn schedule_delete(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(name): Named,
    Query(query): Query<Team>,
) -> Answer<StatusCode> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Change, Target::Team(team))?;
    retry!({
        let schedule = find(&app, team, &name).await?;
        let errands = app.tasks.errands_of(schedule.row.id).await?;
        let batch = errands.iter().fold(Batch::default().delete(&schedule), |batch, errand| batch.delete(errand));
        app.db.commit(batch).await
    })?;
    tracing::info!(schedule = %name, %team, principal = who.name, "schedule deleted");
    Ok(StatusCode::NO_CONTENT)
}
