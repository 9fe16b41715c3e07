//! Vaults: what they take, whether they are whole, and what goes from them.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use godwit_api::v1;
use godwit_model::{ErrorCode, Name, Refusal, VaultPlan};
use serde::Deserialize;
use utoipa::IntoParams;

use super::extract::{MaybeBody, Named, Query, Team, team_of};
use super::{Answer, App, Refusals};
use crate::principals::{Action, Principal, Target, authorize};
use crate::views;

/// Which team's vault.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Whose {
    /// The team; by default the principal's own (for an administrator `default`).
    team: Option<Name>,
    /// A host that has the pool, where several have one of that name for themselves.
    host: Option<Name>,
}

/// Vaults, and what they take of their pools
///
/// Asked of a connected host each; one that has no such host has no `usage`.
#[utoipa::path(get, path = "/v1/vaults", tag = "vault", operation_id = "vault_list", params(Team),
    responses((status = 200, body = v1::Page<v1::Vault>), Refusals))]
pub(super) async fn vault_list(
    State(app): State<Arc<App>>,
    who: Principal,
    Query(query): Query<Team>,
) -> Answer<Json<v1::Page<v1::Vault>>> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Look, Target::Team(team))?;
    Ok(Json(v1::Page { items: app.tasks.vaults(team).await?, next: None }))
}

/// Reads all of a vault
///
/// The task fails with `snapshot_damaged` if something is not what was written, and names it.
#[utoipa::path(post, path = "/v1/vaults/{pool}/verify", tag = "vault", operation_id = "vault_verify",
    params(("pool" = Name, Path), Whose), responses((status = 202, body = v1::Task), Refusals))]
pub(super) async fn vault_verify(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(pool): Named,
    Query(query): Query<Whose>,
    MaybeBody(()): MaybeBody<()>,
) -> Answer<(StatusCode, Json<v1::Task>)> {
    let team = team_of(&who, query.team.as_ref()).clone();
    authorize(&who, Action::Change, Target::Team(&team))?;
    let task = app.tasks.begin_verify(&team, &pool, query.host.as_ref(), who.name).await?;
    Ok((StatusCode::ACCEPTED, Json(views::task(&task))))
}

/// Frees what no snapshot needs in a vault, or says what that would be
///
/// Files to which none refers are removed; packs of which much is not needed are written anew without that. No snapshot can be begun in the vault meanwhile.
///
/// Without `apply` the answer is the plan. With it, `plan` is what was answered before: it is applied if it would still be the same, and refused with
/// `revision_conflict` otherwise.
#[utoipa::path(post, path = "/v1/vaults/{pool}/prune", tag = "vault", operation_id = "vault_prune",
    params(("pool" = Name, Path), Whose), request_body = Option<v1::VaultPrune>, responses((status = 200, body = VaultPlan), Refusals))]
pub(super) async fn vault_prune(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(pool): Named,
    Query(query): Query<Whose>,
    MaybeBody(v1::VaultPrune { apply, plan }): MaybeBody<v1::VaultPrune>,
) -> Answer<Json<VaultPlan>> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Change, Target::Team(team))?;
    let plan = match (apply, plan) {
        (true, None) => {
            let refusal = Refusal::new(ErrorCode::BadRequest, "there is no plan to be applied");
            return Err(refusal.hint("ask for one without `apply` first, look at it, and send it along").into());
        }
        (apply, plan) => plan.filter(|_| apply),
    };
    let done = app.tasks.prune_vault(team, &pool, query.host.as_ref(), plan.as_ref()).await?;
    if plan.is_some() {
        tracing::info!(%pool, %team, files = done.files.len(), bytes = %done.bytes(), principal = who.name, "vault pruned");
    }
    Ok(Json(done))
}
