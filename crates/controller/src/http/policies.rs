//! Migration policies: create, look, change, delete.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use godwit_api::v1;
use godwit_model::spec::check_labels;
use godwit_model::{ErrorCode, MigrationSettings, Name, Refusal};

use super::extract::{Body, Condition, Listing, Named, Query, Team, page, team_of};
use super::{Answer, App, Refusals};
use crate::checks::enough_bandwidth;
use crate::db::{Batch, Fault, Stored, retry};
use crate::principals::{Action, Principal, Target, authorize, not_found};
use crate::rows::{PolicyRow, TeamRow};
use crate::{clock, views};

/// Policies that a team can have: every migration looks at all of them.
const MOST: usize = 256;

async fn find(app: &App, team: &Name, policy: &Name) -> Result<Stored<PolicyRow>, Fault> {
    app.db.find::<PolicyRow>(&format!("{team}/{policy}")).await?.ok_or_else(|| not_found("policy", policy).into())
}

fn check(labels: &BTreeMap<Name, String>, limits: &MigrationSettings) -> Result<(), Refusal> {
    check_labels(labels)?;
    limits.check()?;
    enough_bandwidth(limits.bandwidth)
}

/// Migration policies
#[utoipa::path(get, path = "/v1/policies", tag = "policy", operation_id = "policy_list", params(Listing),
    responses((status = 200, body = v1::Page<v1::Policy>), Refusals))]
pub(super) async fn policy_list(
    State(app): State<Arc<App>>,
    who: Principal,
    Query(query): Query<Listing>,
) -> Answer<Json<v1::Page<v1::Policy>>> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Look, Target::Team(team))?;
    let limit = query.limit()?;
    let rows = app.db.page::<PolicyRow>(&format!("{team}/"), query.after.as_deref(), limit + 1).await?;
    Ok(Json(page(rows.iter().map(views::policy).collect(), limit, |policy: &v1::Policy| policy.name.to_string())))
}

/// A migration policy
#[utoipa::path(get, path = "/v1/policies/{policy}", tag = "policy", operation_id = "policy_show",
    params(("policy" = Name, Path), Team), responses((status = 200, body = v1::Policy), Refusals))]
pub(super) async fn policy_show(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(policy): Named,
    Query(query): Query<Team>,
) -> Answer<Json<v1::Policy>> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Look, Target::Team(team))?;
    Ok(Json(views::policy(&find(&app, team, &policy).await?)))
}

/// Creates a migration policy
///
/// It counts for every migration that begins from then on, of VMs of the team that have its labels. Those that run keep their limits.
#[utoipa::path(post, path = "/v1/policies", tag = "policy", operation_id = "policy_create", params(Team),
    request_body = v1::PolicyCreate, responses((status = 201, body = v1::Policy), Refusals))]
pub(super) async fn policy_create(
    State(app): State<Arc<App>>,
    who: Principal,
    Query(query): Query<Team>,
    Body(request): Body<v1::PolicyCreate>,
) -> Answer<(StatusCode, Json<v1::Policy>)> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Change, Target::Team(team))?;
    let v1::PolicyCreate { name, labels, limits } = request;
    check(&labels, &limits)?;
    let row = PolicyRow { name: name.clone(), team: team.clone(), labels, limits, created: clock::now() };
    retry!({
        let owner = app.db.find::<TeamRow>(team.as_str()).await?.ok_or_else(|| not_found("team", team))?;
        let others = app.db.page::<PolicyRow>(&format!("{team}/"), None, MOST).await?;
        if others.iter().any(|other| other.row.name == name) {
            let taken = Refusal::new(ErrorCode::NameTaken, format!("there is a policy {name} already"));
            return Err(taken.hint("choose another name, or change that one: `godwit policy set`").into());
        }
        if others.len() >= MOST {
            let many = Refusal::new(ErrorCode::BadRequest, format!("a team has at most {MOST} policies"));
            return Err(many.hint("delete one that is not needed").into());
        }
        app.db.commit(Batch::default().unchanged(&owner).create(&row)).await
    })?;
    tracing::info!(policy = %name, %team, principal = who.name, "policy created");
    Ok((StatusCode::CREATED, Json(views::policy(&find(&app, team, &name).await?))))
}

/// Changes a migration policy
///
/// Migrations that run keep their limits.
#[utoipa::path(patch, path = "/v1/policies/{policy}", tag = "policy", operation_id = "policy_set",
    params(("policy" = Name, Path), Team, ("If-Match" = Option<String>, Header, description = "Revision that the policy must still have.")),
    request_body = v1::PolicySet, responses((status = 200, body = v1::Policy), Refusals))]
pub(super) async fn policy_set(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(name): Named,
    Query(query): Query<Team>,
    Condition(revision): Condition,
    Body(request): Body<v1::PolicySet>,
) -> Answer<Json<v1::Policy>> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Change, Target::Team(team))?;
    retry!({
        let mut policy = find(&app, team, &name).await?;
        policy.still_at(revision, format_args!("policy {name}"))?;
        let before = policy.row.clone();
        if let Some(labels) = &request.labels {
            policy.row.labels.clone_from(labels);
        }
        policy.row.limits = request.limits.unwrap_or(policy.row.limits);
        check(&policy.row.labels, &policy.row.limits)?;
        if policy.row == before {
            return Ok(());
        }
        app.db.commit(Batch::default().update(&policy)).await
    })?;
    tracing::info!(policy = %name, %team, principal = who.name, "policy changed");
    Ok(Json(views::policy(&find(&app, team, &name).await?)))
}

/// Deletes a migration policy
///
/// Migrations that run keep their limits.
#[utoipa::path(delete, path = "/v1/policies/{policy}", tag = "policy", operation_id = "policy_delete",
    params(("policy" = Name, Path), Team), responses((status = 204), Refusals))]
pub(super) async fn policy_delete(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(name): Named,
    Query(query): Query<Team>,
) -> Answer<StatusCode> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Change, Target::Team(team))?;
    retry!({
        let policy = find(&app, team, &name).await?;
        app.db.commit(Batch::default().delete(&policy)).await
    })?;
    tracing::info!(policy = %name, %team, principal = who.name, "policy deleted");
    Ok(StatusCode::NO_CONTENT)
}
