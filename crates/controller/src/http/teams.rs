//! Teams and API tokens.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use godwit_api::v1::{self, Role};
use godwit_model::{ErrorCode, Name, Refusal, TokenId};

use super::extract::{Body, Identified, Listing, Named, Query, page};
use super::{Answer, App, Refusals};
use crate::db::{Batch, Fault, Stored, retry};
use crate::principals::{Action, Principal, Target, authorize, new_token, not_found};
use crate::rows::{TeamRow, TokenRow};
use crate::store::StoreError;
use crate::{clock, views};

/// Teams: all for an administrator, else one's own
#[utoipa::path(get, path = "/v1/teams", tag = "team", operation_id = "team_list", params(Listing),
    responses((status = 200, body = v1::Page<v1::Team>), Refusals))]
pub(super) async fn team_list(
    State(app): State<Arc<App>>,
    who: Principal,
    Query(query): Query<Listing>,
) -> Answer<Json<v1::Page<v1::Team>>> {
    authorize(&who, Action::Look, Target::Team(&who.team))?;
    let limit = query.limit()?;
    let mut rows = app.db.page::<TeamRow>("", query.after.as_deref(), usize::MAX).await?;
    rows.retain(|row| authorize(&who, Action::Look, Target::Team(&row.row.name)).is_ok());
    Ok(Json(page(rows.iter().map(|row| views::team(&row.row)).collect(), limit, |team| team.name.to_string())))
}

/// Creates a team
#[utoipa::path(post, path = "/v1/teams", tag = "team", operation_id = "team_create", request_body = v1::TeamCreate,
    responses((status = 201, body = v1::Team), Refusals))]
pub(super) async fn team_create(
    State(app): State<Arc<App>>,
    who: Principal,
    Body(request): Body<v1::TeamCreate>,
) -> Answer<(StatusCode, Json<v1::Team>)> {
    authorize(&who, Action::Change, Target::Administration)?;
    let row = TeamRow { name: request.name, created: clock::now(), share_memory: request.share_memory };
    app.db.commit(Batch::default().create(&row)).await.map_err(|fault| match fault {
        Fault::Store(StoreError::Conflict { .. }) => Fault::Refused(
            Refusal::new(ErrorCode::NameTaken, format!("there is a team {} already", row.name)).hint("choose another name"),
        ),
        fault => fault,
    })?;
    tracing::info!(team = %row.name, principal = who.name, "team created");
    Ok((StatusCode::CREATED, Json(views::team(&row))))
}

/// Changes a team
///
/// Its operators may: whether their VMs share memory is theirs to say.
#[utoipa::path(patch, path = "/v1/teams/{team}", tag = "team", operation_id = "team_set", params(("team" = Name, Path)),
    request_body = v1::TeamSet, responses((status = 200, body = v1::Team), Refusals))]
pub(super) async fn team_set(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(name): Named,
    Body(request): Body<v1::TeamSet>,
) -> Answer<Json<v1::Team>> {
    authorize(&who, Action::Change, Target::Team(&name))?;
    retry!({
        let mut team = find(&app, &name).await?;
        if team.row.share_memory == request.share_memory {
            return Ok(());
        }
        team.row.share_memory = request.share_memory;
        app.db.commit(Batch::default().update(&team)).await
    })?;
    tracing::info!(team = %name, request.share_memory, principal = who.name, "team changed");
    Ok(Json(views::team(&find(&app, &name).await?.row)))
}

async fn find(app: &App, name: &Name) -> Result<Stored<TeamRow>, Fault> {
    app.db.find::<TeamRow>(name.as_str()).await?.ok_or_else(|| not_found("team", name).into())
}

/// API tokens, the newest first, without their secrets
#[utoipa::path(get, path = "/v1/tokens", tag = "token", operation_id = "token_list", params(Listing),
    responses((status = 200, body = v1::Page<v1::Token>), Refusals))]
pub(super) async fn token_list(
    State(app): State<Arc<App>>,
    who: Principal,
    Query(query): Query<Listing>,
) -> Answer<Json<v1::Page<v1::Token>>> {
    authorize(&who, Action::Look, Target::Administration)?;
    let limit = query.limit()?;
    let mut rows = app.db.all::<TokenRow>().await?;
    rows.retain(|row| query.team.as_ref().is_none_or(|team| row.row.team == *team));
    rows.sort_by_key(|row| std::cmp::Reverse((row.row.created, row.row.id)));
    if let Some(after) = &query.after {
        let unknown = || {
            Refusal::new(ErrorCode::BadRequest, "the page begins after a token that is not there")
                .hint("list again from the beginning")
        };
        let id: TokenId = after.parse().map_err(|_| unknown())?;
        let position = rows.iter().position(|row| row.row.id == id).ok_or_else(unknown)?;
        rows.drain(..=position);
    }
    Ok(Json(page(rows.iter().map(|row| views::token(&row.row)).collect(), limit, |token| token.id.to_string())))
}

/// Makes an API token; its secret is shown this once
#[utoipa::path(post, path = "/v1/tokens", tag = "token", operation_id = "token_create", request_body = v1::TokenCreate,
    responses((status = 201, body = v1::TokenCreated), Refusals))]
pub(super) async fn token_create(
    State(app): State<Arc<App>>,
    who: Principal,
    Body(request): Body<v1::TokenCreate>,
) -> Answer<(StatusCode, Json<v1::TokenCreated>)> {
    authorize(&who, Action::Change, Target::Administration)?;
    if request.description.len() > 200 || request.description.chars().any(char::is_control) {
        return Err(
            Refusal::new(ErrorCode::BadRequest, "a description has at most 200 characters and no control characters").into()
        );
    }
    let (row, secret) = new_token(request.team, request.role, request.description);
    retry!({
        let team = find(&app, &row.team).await?;
        app.db.commit(Batch::default().unchanged(&team).create(&row)).await
    })?;
    tracing::info!(token = %row.id, team = %row.team, role = ?row.role, principal = who.name, "API token made");
    Ok((StatusCode::CREATED, Json(v1::TokenCreated { token: views::token(&row), secret })))
}

/// Deletes an API token
#[utoipa::path(delete, path = "/v1/tokens/{token}", tag = "token", operation_id = "token_delete", params(("token" = TokenId, Path)),
    responses((status = 204), Refusals))]
pub(super) async fn token_delete(
    State(app): State<Arc<App>>,
    who: Principal,
    Identified(id): Identified<TokenId>,
) -> Answer<StatusCode> {
    authorize(&who, Action::Change, Target::Administration)?;
    retry!({
        let row = app.db.find::<TokenRow>(&id.to_string()).await?.ok_or_else(|| not_found("token", id))?;
        let others =
            app.db.all::<TokenRow>().await?.into_iter().filter(|other| other.row.id != id && other.row.role == Role::Admin);
        if row.row.role == Role::Admin && others.count() == 0 {
            return Err(Refusal::new(ErrorCode::InUse, "this is the last administrator's token")
                .hint("make another one first, or nobody can administer the cluster")
                .into());
        }
        app.db.commit(Batch::default().delete(&row)).await
    })?;
    tracing::info!(token = %id, principal = who.name, "API token deleted");
    Ok(StatusCode::NO_CONTENT)
}
