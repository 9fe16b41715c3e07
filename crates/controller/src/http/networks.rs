//! Networks: create, look, change, delete.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use godwit_api::v1;
use godwit_model::network::check_mtu;
use godwit_model::{ErrorCode, Name, NetworkId, NetworkKind, Refusal};

use super::extract::{Body, Condition, Listing, Named, Query, Team, page, team_of};
use super::{Answer, App, Refusals};
use crate::db::{Batch, Fault, Stored, retry};
use crate::networks::{allocate, default_mtu};
use crate::principals::{Action, Principal, Target, authorize, not_found};
use crate::rows::{NetworkRow, TeamRow, VmRow};
use crate::{clock, views};

async fn find(app: &App, team: &Name, network: &Name) -> Result<Stored<NetworkRow>, Fault> {
    app.db.find::<NetworkRow>(&format!("{team}/{network}")).await?.ok_or_else(|| not_found("network", network).into())
}

/// VMs of the network's team with an interface on it.
async fn users(app: &App, network: &NetworkRow) -> Result<Vec<VmRow>, Fault> {
    // What runs is on what it was started with, whatever its spec says by now.
    let runs_on = |vm: &VmRow| {
        let mut nics = vm.resolved.iter().flat_map(|spec| &spec.nics);
        vm.has_process() && nics.any(|nic| nic.network_id.map_or(nic.network == network.name, |id| id == network.id))
    };
    let wants = |vm: &VmRow| vm.spec.nics.iter().any(|nic| nic.network == network.name);
    let on_it = |vm: &VmRow| vm.team == network.team && (wants(vm) || runs_on(vm));
    Ok(app.db.all::<VmRow>().await?.into_iter().map(|vm| vm.row).filter(on_it).collect())
}

/// Networks
#[utoipa::path(get, path = "/v1/networks", tag = "network", operation_id = "network_list", params(Listing),
    responses((status = 200, body = v1::Page<v1::Network>), Refusals))]
pub(super) async fn network_list(
    State(app): State<Arc<App>>,
    who: Principal,
    Query(query): Query<Listing>,
) -> Answer<Json<v1::Page<v1::Network>>> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Look, Target::Team(team))?;
    let limit = query.limit()?;
    let rows = app.db.page::<NetworkRow>(&format!("{team}/"), query.after.as_deref(), limit + 1).await?;
    let networks = rows.iter().map(|row| views::network(row, &app.hub)).collect();
    Ok(Json(page(networks, limit, |network| network.name.to_string())))
}

/// A network
#[utoipa::path(get, path = "/v1/networks/{network}", tag = "network", operation_id = "network_show",
    params(("network" = Name, Path), Team), responses((status = 200, body = v1::Network), Refusals))]
pub(super) async fn network_show(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(network): Named,
    Query(query): Query<Team>,
) -> Answer<Json<v1::Network>> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Look, Target::Team(team))?;
    Ok(Json(views::network(&find(&app, team, &network).await?, &app.hub)))
}

/// Creates a network
///
/// One on a bridge of the hosts takes an administrator: whatever else is on that bridge can be reached from it.
#[utoipa::path(post, path = "/v1/networks", tag = "network", operation_id = "network_create", params(Team),
    request_body = v1::NetworkCreate, responses((status = 201, body = v1::Network), Refusals))]
pub(super) async fn network_create(
    State(app): State<Arc<App>>,
    who: Principal,
    Query(query): Query<Team>,
    Body(request): Body<v1::NetworkCreate>,
) -> Answer<(StatusCode, Json<v1::Network>)> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Change, Target::Team(team))?;
    let v1::NetworkCreate { name, kind, mtu } = request;
    if matches!(kind, NetworkKind::Bridge { .. }) {
        authorize(&who, Action::Change, Target::Cluster)?;
    }
    let present = app.hub.present();
    let default = || default_mtu(&kind, present.iter().map(|(_, presence)| &presence.load.networks));
    let mut row = NetworkRow {
        id: NetworkId::new(clock::fresh()),
        name: name.clone(),
        team: team.clone(),
        mtu: mtu.map_or_else(|| Ok(default()), check_mtu)?,
        kind: kind.clone(),
        vni: None,
        created: clock::now(),
    };
    retry!({
        let owner = app.db.find::<TeamRow>(team.as_str()).await?.ok_or_else(|| not_found("team", team))?;
        if app.db.find::<NetworkRow>(&format!("{team}/{name}")).await?.is_some() {
            let taken = Refusal::new(ErrorCode::NameTaken, format!("there is a network {name} already"));
            return Err(taken.hint("choose another name").into());
        }
        let mut batch = Batch::default().unchanged(&owner);
        if row.kind == NetworkKind::default() {
            let (vni, with_number) = allocate(&app.db, batch).await?;
            row.vni = Some(vni);
            batch = with_number;
        }
        app.db.commit(batch.create(&row)).await
    })?;
    tracing::info!(network = %name, %team, vni = row.vni, principal = who.name, "network created");
    Ok((StatusCode::CREATED, Json(views::network(&find(&app, team, &name).await?, &app.hub))))
}

/// Changes a network
///
/// VMs are told of another MTU at their next start. While one with an interface on it runs it cannot become smaller.
#[utoipa::path(patch, path = "/v1/networks/{network}", tag = "network", operation_id = "network_set",
    params(("network" = Name, Path), Team, ("If-Match" = Option<String>, Header, description = "Revision that the network must still have.")),
    request_body = v1::NetworkSet, responses((status = 200, body = v1::Network), Refusals))]
pub(super) async fn network_set(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(name): Named,
    Query(query): Query<Team>,
    Condition(revision): Condition,
    Body(request): Body<v1::NetworkSet>,
) -> Answer<Json<v1::Network>> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Change, Target::Team(team))?;
    let mtu = check_mtu(request.mtu)?;
    retry!({
        let mut network = find(&app, team, &name).await?;
        network.still_at(revision, format_args!("network {name}"))?;
        let runs = |vm: &VmRow| vm.has_process() || vm.activity.is_some();
        if mtu < network.row.mtu
            && let Some(vm) = users(&app, &network.row).await?.iter().find(|vm| runs(vm))
        {
            let told = format!("VM {} runs and was told that network {name} carries {} bytes", vm.name, network.row.mtu);
            return Err(Refusal::new(ErrorCode::InUse, told).hint("stop the VMs on the network first").into());
        }
        if network.row.mtu == mtu {
            return Ok(());
        }
        network.row.mtu = mtu;
        app.db.commit(Batch::default().update(&network)).await
    })?;
    tracing::info!(network = %name, %team, mtu, principal = who.name, "network changed");
    Ok(Json(views::network(&find(&app, team, &name).await?, &app.hub)))
}

/// Deletes a network that no VM has an interface on
///
/// A bridge of the hosts stays as it is.
#[utoipa::path(delete, path = "/v1/networks/{network}", tag = "network", operation_id = "network_delete",
    params(("network" = Name, Path), Team), responses((status = 204), Refusals))]
pub(super) async fn network_delete(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(name): Named,
    Query(query): Query<Team>,
) -> Answer<StatusCode> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Change, Target::Team(team))?;
    retry!({
        let network = find(&app, team, &name).await?;
        if let Some(vm) = users(&app, &network.row).await?.first() {
            return Err(Refusal::new(ErrorCode::InUse, format!("VM {} has an interface on network {name}", vm.name))
                .hint(format!("delete the VM first: `godwit vm delete {}`", vm.name))
                .into());
        }
        app.db.commit(Batch::default().delete(&network)).await
    })?;
    tracing::info!(network = %name, %team, principal = who.name, "network deleted");
    Ok(StatusCode::NO_CONTENT)
}
