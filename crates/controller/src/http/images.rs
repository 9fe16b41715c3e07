//! Images: import, look, delete.

use std::sync::Arc;

use axum::Json;
use axum::body::Body as Content;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use godwit_api::v1;
use godwit_model::{Boot, ErrorCode, ImageKind, Name, Refusal};
use serde::Deserialize;
use utoipa::IntoParams;

use super::extract::{Listing, Named, Query, Team, content_length, page, team_of};
use super::{Answer, App, Refusals};
use crate::db::{Batch, Fault, Stored, retry};
use crate::principals::{Action, Principal, Target, authorize, not_found};
use crate::rows::{ImageRow, TeamRow, VmRow};
use crate::{clock, views};

/// What an import says of the image.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Import {
    /// What it is for.
    kind: ImageKind,
    /// The team; by default the principal's own (for an administrator `default`).
    team: Option<Name>,
}

async fn find(app: &App, team: &Name, image: &Name) -> Result<Stored<ImageRow>, Fault> {
    app.db.find::<ImageRow>(&format!("{team}/{image}")).await?.ok_or_else(|| not_found("image", image).into())
}

/// Images
#[utoipa::path(get, path = "/v1/images", tag = "image", operation_id = "image_list", params(Listing),
    responses((status = 200, body = v1::Page<v1::Image>), Refusals))]
pub(super) async fn image_list(
    State(app): State<Arc<App>>,
    who: Principal,
    Query(query): Query<Listing>,
) -> Answer<Json<v1::Page<v1::Image>>> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Look, Target::Team(team))?;
    let limit = query.limit()?;
    let rows = app.db.page::<ImageRow>(&format!("{team}/"), query.after.as_deref(), limit + 1).await?;
    Ok(Json(page(rows.iter().map(views::image).collect(), limit, |image| image.name.to_string())))
}

/// An image
#[utoipa::path(get, path = "/v1/images/{image}", tag = "image", operation_id = "image_show", params(("image" = Name, Path), Team),
    responses((status = 200, body = v1::Image), Refusals))]
pub(super) async fn image_show(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(image): Named,
    Query(query): Query<Team>,
) -> Answer<Json<v1::Image>> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Look, Target::Team(team))?;
    Ok(Json(views::image(&find(&app, team, &image).await?)))
}

/// Imports an image
///
/// The body is the content. It is checked for its kind; what refers outside itself is refused.
#[utoipa::path(put, path = "/v1/images/{image}", tag = "image", operation_id = "image_import", params(("image" = Name, Path), Import),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 201, body = v1::Image), Refusals))]
pub(super) async fn image_import(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(name): Named,
    Query(query): Query<Import>,
    headers: HeaderMap,
    content: Content,
) -> Answer<(StatusCode, Json<v1::Image>)> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Change, Target::Team(team))?;
    let taken = || {
        Refusal::new(ErrorCode::NameTaken, format!("there is an image {name} already"))
            .hint(format!("choose another name, or delete it first: `godwit image delete {name}`"))
    };
    app.db.find::<TeamRow>(team.as_str()).await?.ok_or_else(|| not_found("team", team))?;
    if app.db.find::<ImageRow>(&format!("{team}/{name}")).await?.is_some() {
        return Err(taken().into());
    }
    app.images.check_size(content_length(&headers).unwrap_or_default())?;
    let received = app.images.receive(query.kind, content.into_data_stream()).await?;
    let row = ImageRow {
        id: received.id,
        name: name.clone(),
        team: team.clone(),
        kind: query.kind,
        size: received.size,
        digest: received.digest,
        created: clock::now(),
    };
    if let Err(fault) = app.db.commit(Batch::default().create(&row)).await {
        app.images.remove(row.id).await;
        return Err(match fault {
            Fault::Store(crate::store::StoreError::Conflict { .. }) => taken().into(),
            fault => fault.into(),
        });
    }
    tracing::info!(image = %name, %team, size = %row.size, principal = who.name, "image imported");
    Ok((StatusCode::CREATED, Json(views::image(&find(&app, team, &name).await?))))
}

/// Whether a spec refers to an image.
fn refers(vm: &VmRow, image: &ImageRow) -> bool {
    let boots = match &vm.spec.boot {
        Boot::Kernel { kernel, initrd, .. } => *kernel == image.name || initrd.as_ref() == Some(&image.name),
        Boot::Disk => false,
    };
    let disks = vm.spec.disks.iter().any(|disk| disk.image.as_ref() == Some(&image.name));
    let media = vm.spec.cdroms.iter().any(|cdrom| cdrom.image.as_ref() == Some(&image.name));
    // A spec that is being started or run refers by id, whatever its names say by now.
    let resolved = vm.resolved.as_ref().is_some_and(|spec| spec.images().any(|used| used.id == image.id));
    vm.team == image.team && (boots || disks || media || (resolved && vm.has_process()))
}

/// Deletes an image that no VM refers to
#[utoipa::path(delete, path = "/v1/images/{image}", tag = "image", operation_id = "image_delete", params(("image" = Name, Path), Team),
    responses((status = 204), Refusals))]
pub(super) async fn image_delete(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(name): Named,
    Query(query): Query<Team>,
) -> Answer<StatusCode> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Change, Target::Team(team))?;
    let id = retry!({
        let image = find(&app, team, &name).await?;
        if let Some(vm) = app.db.all::<VmRow>().await?.into_iter().find(|vm| refers(&vm.row, &image.row)) {
            return Err(Refusal::new(ErrorCode::InUse, format!("VM {} refers to image {name}", vm.row.name))
                .hint(format!("delete the VM first: `godwit vm delete {}`", vm.row.name))
                .into());
        }
        app.db.commit(Batch::default().delete(&image)).await?;
        Ok(image.row.id)
    })?;
    app.images.remove(id).await;
    tracing::info!(image = %name, %team, principal = who.name, "image deleted");
    Ok(StatusCode::NO_CONTENT)
}
