//! Tasks: look, cancel, change what a migration may do.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use godwit_api::v1;
use godwit_model::{ErrorCode, Refusal, TaskId};

use super::extract::{Body, Identified, Listing, MaybeBody, Query, page, team_of};
use super::{Answer, App, Refusals};
use crate::db::{Fault, Stored};
use crate::principals::{Action, Principal, Target, authorize, not_found};
use crate::rows::TaskRow;
use crate::views;

/// Tasks, the newest first
#[utoipa::path(get, path = "/v1/tasks", tag = "task", operation_id = "task_list", params(Listing),
    responses((status = 200, body = v1::Page<v1::Task>), Refusals))]
pub(super) async fn task_list(
    State(app): State<Arc<App>>,
    who: Principal,
    Query(query): Query<Listing>,
) -> Answer<Json<v1::Page<v1::Task>>> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Look, Target::Team(team))?;
    let limit = query.limit()?;
    let mut rows = app.db.all::<TaskRow>().await?;
    rows.retain(|row| row.row.team == *team);
    rows.sort_by_key(|row| std::cmp::Reverse((row.row.created, row.row.id)));
    if let Some(after) = &query.after {
        let unknown = || {
            Refusal::new(ErrorCode::BadRequest, "the page begins after a task that is not there")
                .hint("list again from the beginning")
        };
        let id: TaskId = after.parse().map_err(|_| unknown())?;
        let position = rows.iter().position(|row| row.row.id == id).ok_or_else(unknown)?;
        rows.drain(..=position);
    }
    Ok(Json(page(rows.iter().map(views::task).collect(), limit, |task| task.id.to_string())))
}

/// The task, if the principal may do that to it.
async fn find(app: &App, who: &Principal, action: Action, id: TaskId) -> Result<Stored<TaskRow>, Fault> {
    let task = app.tasks.task(id).await?;
    // A foreign task does not exist, and no word may tell whose it is.
    authorize(who, Action::Look, Target::Team(&task.row.team)).map_err(|_| not_found("task", id))?;
    authorize(who, action, Target::Team(&task.row.team))?;
    Ok(task)
}

/// A task
#[utoipa::path(get, path = "/v1/tasks/{task}", tag = "task", operation_id = "task_show", params(("task" = TaskId, Path)),
    responses((status = 200, body = v1::Task), Refusals))]
pub(super) async fn task_show(
    State(app): State<Arc<App>>,
    who: Principal,
    Identified(id): Identified<TaskId>,
) -> Answer<Json<v1::Task>> {
    Ok(Json(views::task(&find(&app, &who, Action::Look, id).await?)))
}

/// Cancels a task, until its point of no return
#[utoipa::path(post, path = "/v1/tasks/{task}/cancel", tag = "task", operation_id = "task_cancel", params(("task" = TaskId, Path)),
    responses((status = 200, body = v1::Task), Refusals))]
pub(super) async fn task_cancel(
    State(app): State<Arc<App>>,
    who: Principal,
    Identified(id): Identified<TaskId>,
    MaybeBody(()): MaybeBody<()>,
) -> Answer<Json<v1::Task>> {
    find(&app, &who, Action::Change, id).await?;
    Ok(Json(views::task(&app.tasks.cancel(id, &who.name).await?)))
}

/// Changes what a migration may take of the wire, while it runs
#[utoipa::path(post, path = "/v1/tasks/{task}/bandwidth", tag = "task", operation_id = "task_bandwidth",
    params(("task" = TaskId, Path)), request_body = v1::TaskBandwidth, responses((status = 200, body = v1::Task), Refusals))]
pub(super) async fn task_bandwidth(
    State(app): State<Arc<App>>,
    who: Principal,
    Identified(id): Identified<TaskId>,
    Body(body): Body<v1::TaskBandwidth>,
) -> Answer<Json<v1::Task>> {
    find(&app, &who, Action::Change, id).await?;
    Ok(Json(views::task(&app.tasks.set_bandwidth(id, body.bandwidth, &who.name).await?)))
}

/// Has a migration's VM go on at the destination before all of its memory is there
#[utoipa::path(post, path = "/v1/tasks/{task}/postcopy", tag = "task", operation_id = "task_postcopy", params(("task" = TaskId, Path)),
    responses((status = 200, body = v1::Task), Refusals))]
pub(super) async fn task_postcopy(
    State(app): State<Arc<App>>,
    who: Principal,
    Identified(id): Identified<TaskId>,
    MaybeBody(()): MaybeBody<()>,
) -> Answer<Json<v1::Task>> {
    find(&app, &who, Action::Change, id).await?;
    Ok(Json(views::task(&app.tasks.switch_to_postcopy(id, &who.name).await?)))
}

/// Slows a migration's VM down until it can be moved within its budget
#[utoipa::path(post, path = "/v1/tasks/{task}/throttle", tag = "task", operation_id = "task_throttle", params(("task" = TaskId, Path)),
    responses((status = 200, body = v1::Task), Refusals))]
pub(super) async fn task_throttle(
    State(app): State<Arc<App>>,
    who: Principal,
    Identified(id): Identified<TaskId>,
    MaybeBody(()): MaybeBody<()>,
) -> Answer<Json<v1::Task>> {
    find(&app, &who, Action::Change, id).await?;
    Ok(Json(views::task(&app.tasks.throttle(id, &who.name).await?)))
}
