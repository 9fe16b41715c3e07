//! Hosts, pools, join tokens, health.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use godwit_api::v1;
use godwit_link::JoinToken;
use godwit_model::{ErrorCode, Millis, Name, Refusal, Retry, TokenId, UnixMillis};
use serde::Deserialize;
use utoipa::IntoParams;

use super::extract::{Body, Condition, Listing, Named, Query, page};
use super::{Answer, App, Refusals};
use crate::checks::enough_bandwidth;
use crate::cpu::baselines;
use crate::db::{Batch, Fault, retry};
use crate::metrics::CONTENT_TYPE;
use crate::principals::{Action, Principal, Target, authorize, not_found, stored_hash};
use crate::rows::{HostRow, JoinRow, TaskRow, VmRow};
use crate::{clock, restore, views};

/// How long a join token is good for.
const JOIN_LIFETIME: Millis = Millis(3_600_000);
const LONGEST_JOIN_LIFETIME: Millis = Millis(24 * 3_600_000);

/// Whether the controller serves
#[utoipa::path(get, path = "/v1/health", tag = "controller", operation_id = "health", security(()),
    responses((status = 200, body = v1::Health), Refusals))]
pub(super) async fn health(State(app): State<Arc<App>>) -> Json<v1::Health> {
    Json(v1::Health { version: env!("CARGO_PKG_VERSION").into(), epoch: app.db.epoch().0 })
}

/// Hosts
#[utoipa::path(get, path = "/v1/hosts", tag = "host", operation_id = "host_list", params(Listing),
    responses((status = 200, body = v1::Page<v1::Host>), Refusals))]
pub(super) async fn host_list(
    State(app): State<Arc<App>>,
    who: Principal,
    Query(query): Query<Listing>,
) -> Answer<Json<v1::Page<v1::Host>>> {
    authorize(&who, Action::Look, Target::Cluster)?;
    let limit = query.limit()?;
    let rows = app.db.page::<HostRow>("", query.after.as_deref(), limit + 1).await?;
    Ok(Json(page(rows.iter().map(|row| views::host(row, &app.hub)).collect(), limit, |host| host.name.to_string())))
}

/// What the CPUs of the hosts that are connected have in common, one for each accelerator
#[utoipa::path(get, path = "/v1/cluster/cpu-baseline", tag = "host", operation_id = "cpu_baseline",
    responses((status = 200, body = Vec<v1::CpuBaseline>), Refusals))]
pub(super) async fn cpu_baseline(State(app): State<Arc<App>>, who: Principal) -> Answer<Json<Vec<v1::CpuBaseline>>> {
    authorize(&who, Action::Look, Target::Cluster)?;
    let present = app.hub.present();
    let hosts: Vec<_> = present.iter().map(|(name, presence)| (name, &*presence.facts)).collect();
    Ok(Json(baselines(&hosts)))
}

/// Metrics for Prometheus, in the text format of OpenMetrics; they tell of every team, so the token must be an administrator's
#[utoipa::path(get, path = "/v1/metrics", tag = "controller", operation_id = "metrics",
    responses((status = 200, body = String, content_type = "application/openmetrics-text"), Refusals))]
pub(super) async fn metrics(State(app): State<Arc<App>>, who: Principal) -> Answer<([(&'static str, &'static str); 1], String)> {
    authorize(&who, Action::Look, Target::Administration)?;
    let text = app.tasks.metrics().gather(&app.db, &app.hub).await?;
    Ok(([("content-type", CONTENT_TYPE)], text))
}

/// A host
#[utoipa::path(get, path = "/v1/hosts/{host}", tag = "host", operation_id = "host_show", params(("host" = Name, Path)),
    responses((status = 200, body = v1::Host), Refusals))]
pub(super) async fn host_show(State(app): State<Arc<App>>, who: Principal, Named(host): Named) -> Answer<Json<v1::Host>> {
    authorize(&who, Action::Look, Target::Cluster)?;
    let row = app.db.find::<HostRow>(host.as_str()).await?.ok_or_else(|| not_found("host", &host))?;
    Ok(Json(views::host(&row, &app.hub)))
}

/// Changes a host
#[utoipa::path(patch, path = "/v1/hosts/{host}", tag = "host", operation_id = "host_set",
    params(("host" = Name, Path), ("If-Match" = Option<String>, Header, description = "Revision that the host must still have.")),
    request_body = v1::HostSet, responses((status = 200, body = v1::Host), Refusals))]
pub(super) async fn host_set(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(name): Named,
    Condition(revision): Condition,
    Body(request): Body<v1::HostSet>,
) -> Answer<Json<v1::Host>> {
    authorize(&who, Action::Change, Target::Administration)?;
    let bandwidth = request.migration_bandwidth;
    enough_bandwidth(bandwidth)?;
    retry!({
        let mut host = app.db.find::<HostRow>(name.as_str()).await?.ok_or_else(|| not_found("host", &name))?;
        host.still_at(revision, format_args!("host {name}"))?;
        if host.row.migration_bandwidth == bandwidth {
            return Ok(());
        }
        host.row.migration_bandwidth = bandwidth;
        app.db.commit(Batch::default().update(&host)).await
    })?;
    tracing::info!(host = %name, bandwidth = bandwidth.map(tracing::field::display), principal = who.name, "host changed");
    let row = app.db.find::<HostRow>(name.as_str()).await?.ok_or_else(|| not_found("host", &name))?;
    Ok(Json(views::host(&row, &app.hub)))
}

/// How a host is removed.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Removal {
    /// Also with VMs there. They are not taken for dead: they stay as last known, run on if they run, and start nowhere else.
    #[serde(default)]
    force: bool,
}

/// Removes a host: its certificate is refused from then on, by the controller and by the other hosts, and its open streams end
///
/// Refused while a VM runs there as far as is known, or a task is at one, unless forced.
#[utoipa::path(delete, path = "/v1/hosts/{host}", tag = "host", operation_id = "host_delete", params(("host" = Name, Path), Removal),
    responses((status = 204), Refusals))]
pub(super) async fn host_delete(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(host): Named,
    Query(removal): Query<Removal>,
) -> Answer<StatusCode> {
    authorize(&who, Action::Change, Target::Cluster)?;
    let moves = retry!({
        let Some(row) = app.db.find::<HostRow>(host.as_str()).await? else {
            // After a restore it may be a host that others know of alone.
            let waited_for = removal.force && restore::heard(&app.db, &host).await?;
            return if waited_for { Ok(vec![]) } else { Err(not_found("host", &host).into()) };
        };
        let comes = |vm: &VmRow| vm.pending.as_ref().is_some_and(|pending| pending.destination == host);
        let uses = |vm: &VmRow| comes(vm) || (vm.host.as_ref() == Some(&host) && (vm.has_process() || vm.activity.is_some()));
        let vms: Vec<VmRow> = app.db.all::<VmRow>().await?.into_iter().map(|vm| vm.row).filter(uses).collect();
        let takes_part = |task: &TaskRow| task.open_move().is_some_and(|work| work.source == host || work.destination == host);
        if !removal.force
            && let Some(task) = app.db.all::<TaskRow>().await?.into_iter().find(|task| takes_part(&task.row))
        {
            let (id, vm) = (task.row.id, &task.row.subject);
            return Err(Fault::Refused(
                Refusal::new(ErrorCode::InUse, format!("host {host} takes part in task {id}, a move of VM {vm}"))
                    .hint(format!("wait for it: `godwit task wait {id}`; `--force` removes a host that is gone for good"))
                    .retry(Retry::Safe),
            ));
        }
        if let (Some(vm), false) = (vms.first(), removal.force) {
            let (name, others) = (&vm.name, vms.len() - 1);
            let others = if others == 0 { String::new() } else { format!(", and {others} more") };
            return Err(Fault::Refused(
                Refusal::new(ErrorCode::InUse, format!("VM {name} of team {} runs there as far as is known{others}", vm.team)).hint(
                    "move or stop its VMs first, even if it takes bringing the host back: a silent host is not a dead host. Forced, the \
                     VMs stay as last known, run on if they run, and start nowhere else until the host has joined again",
                ),
            ));
        }
        app.db.commit(Batch::default().delete(&row)).await?;
        restore::heard(&app.db, &host).await?;
        Ok(vms.iter().filter(|vm| comes(vm)).filter_map(|vm| vm.pending.as_ref().map(|pending| pending.task)).collect::<Vec<_>>())
    })?;
    app.hub.expel(&host);
    tracing::info!(%host, principal = who.name, force = removal.force, "host removed");
    // What is on its way there shall not arrive; a refusal says that it has.
    for task in moves {
        if let Err(fault) = app.tasks.cancel(task, &who.name).await {
            tracing::warn!(%host, %task, refusal = %fault.refusal(), "a move to the removed host is not cancelled");
        }
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Makes a one-time token with which a host can join
#[utoipa::path(post, path = "/v1/join-tokens", tag = "host", operation_id = "join_token_create", request_body = v1::JoinTokenCreate,
    responses((status = 201, body = v1::JoinTokenCreated), Refusals))]
pub(super) async fn join_token_create(
    State(app): State<Arc<App>>,
    who: Principal,
    Body(request): Body<v1::JoinTokenCreate>,
) -> Answer<(StatusCode, Json<v1::JoinTokenCreated>)> {
    authorize(&who, Action::Change, Target::Administration)?;
    let lifetime = request.lifetime.unwrap_or(JOIN_LIFETIME);
    if lifetime > LONGEST_JOIN_LIFETIME {
        return Err(Refusal::new(ErrorCode::BadRequest, format!("a join token lives at most a day, not {lifetime}"))
            .hint("ask for less; a new one is made at any time")
            .into());
    }
    let token = JoinToken { id: TokenId::new(clock::fresh()), secret: clock::secret(), authority: app.authority.fingerprint() };
    let expires = UnixMillis(clock::now().0.saturating_add(lifetime.0));
    let hash = stored_hash(&token.secret);
    if request.rejoin && app.db.find::<HostRow>(request.host.as_str()).await?.is_none() {
        return Err(not_found("host", &request.host).into());
    }
    let row = JoinRow { id: token.id, host: request.host, expires, hash, used: None, rejoin: request.rejoin };
    app.db.commit(Batch::default().create(&row)).await?;
    tracing::info!(host = %row.host, rejoin = row.rejoin, principal = who.name, "join token made");
    Ok((StatusCode::CREATED, Json(v1::JoinTokenCreated { token: token.reveal(), expires })))
}

/// Pools
#[utoipa::path(get, path = "/v1/pools", tag = "pool", operation_id = "pool_list", params(Listing),
    responses((status = 200, body = v1::Page<v1::Pool>), Refusals))]
pub(super) async fn pool_list(
    State(app): State<Arc<App>>,
    who: Principal,
    Query(query): Query<Listing>,
) -> Answer<Json<v1::Page<v1::Pool>>> {
    authorize(&who, Action::Look, Target::Cluster)?;
    let limit = query.limit()?;
    let mut pools = views::pools(&app.db.all::<HostRow>().await?, &app.hub);
    pools.retain(|pool| query.after.as_deref().is_none_or(|after| pool.name.as_str() > after));
    Ok(Json(page(pools, limit, |pool| pool.name.to_string())))
}

/// A pool
#[utoipa::path(get, path = "/v1/pools/{pool}", tag = "pool", operation_id = "pool_show", params(("pool" = Name, Path)),
    responses((status = 200, body = v1::Pool), Refusals))]
pub(super) async fn pool_show(State(app): State<Arc<App>>, who: Principal, Named(pool): Named) -> Answer<Json<v1::Pool>> {
    authorize(&who, Action::Look, Target::Cluster)?;
    let pools = views::pools(&app.db.all::<HostRow>().await?, &app.hub);
    let found = pools.into_iter().find(|candidate| candidate.name == pool);
    Ok(Json(found.ok_or_else(|| not_found("pool", &pool))?))
}
