//! Images: import, look, delete.

use std::sync::Arc;

use axum::Json;
use axum::body::Body as Content;
use axum::extract::State;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use godwit_api::v1;
use godwit_model::{Boot, ErrorCode, ImageId, ImportFormat, Name, Refusal};
use serde::Deserialize;
use tokio_util::io::ReaderStream;
use utoipa::IntoParams;

use super::extract::{Body, Listing, Named, Query, Team, content_length, page, team_of};
use super::{Answer, App, Refusals};
use crate::db::{Batch, Fault, Stored, retry};
use crate::images::{ExportFormat, check_url, read_sha256, shown};
use crate::principals::{Action, Principal, Target, authorize, not_found};
use crate::rows::{ImageRow, ImportSource, SnapshotRow, TeamRow, VmRow};
use crate::tasks::NewImport;
use crate::{clock, views};

/// What an import says of the image.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Import {
    /// What is sent; declared, never guessed.
    kind: ImportFormat,
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

fn taken(name: &Name) -> Refusal {
    Refusal::new(ErrorCode::NameTaken, format!("there is an image {name} already"))
        .hint(format!("choose another name, or delete it first: `godwit image delete {name}`"))
}

/// The name must be free, and nothing of that name on its way.
async fn check_free(app: &App, team: &Name, name: &Name) -> Result<(), Fault> {
    app.db.find::<TeamRow>(team.as_str()).await?.ok_or_else(|| not_found("team", team))?;
    if app.db.find::<ImageRow>(&format!("{team}/{name}")).await?.is_some() {
        return Err(taken(name).into());
    }
    if app.tasks.imports(team, name).await? {
        return Err(Refusal::new(ErrorCode::NameTaken, format!("an image {name} is being imported"))
            .hint("watch it with `godwit task list`, or choose another name")
            .into());
    }
    Ok(())
}

/// What an import answers: the image, or the task that makes it.
#[derive(utoipa::IntoResponses)]
pub(super) enum Imported {
    /// It is there.
    #[response(status = 201)]
    Image(#[to_schema] v1::Image),
    /// It is converted first.
    #[response(status = 202)]
    Task(#[to_schema] Box<v1::Task>),
}

impl IntoResponse for Imported {
    fn into_response(self) -> Response {
        match self {
            Self::Image(image) => (StatusCode::CREATED, Json(image)).into_response(),
            Self::Task(task) => (StatusCode::ACCEPTED, Json(task)).into_response(),
        }
    }
}

/// Imports an image
///
/// The body is the content. It is checked for its kind; what refers outside itself is refused. Kinds that are converted answer 202 with a
/// task once the body has arrived, others 201 with the image.
#[utoipa::path(put, path = "/v1/images/{image}", tag = "image", operation_id = "image_import", params(("image" = Name, Path), Import),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses(Imported, Refusals))]
pub(super) async fn image_import(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(name): Named,
    Query(query): Query<Import>,
    headers: HeaderMap,
    content: Content,
) -> Answer<Imported> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Change, Target::Team(team))?;
    check_free(&app, team, &name).await?;
    app.images.check_size(content_length(&headers).unwrap_or_default())?;
    if query.kind.is_converted() {
        let image = ImageId::new(clock::fresh());
        app.images.keep_source(image, content.into_data_stream()).await?;
        let new = NewImport {
            team: team.clone(),
            name,
            image,
            format: query.kind,
            source: ImportSource::Upload,
            principal: who.name,
            about: "the file has arrived".into(),
        };
        return match app.tasks.begin_import(new).await {
            Ok(task) => Ok(Imported::Task(Box::new(views::task(&task)))),
            Err(fault) => {
                app.images.remove_source(image).await;
                Err(fault.into())
            }
        };
    }
    let received = app.images.receive(query.kind.becomes(), content.into_data_stream()).await?;
    let row = ImageRow {
        id: received.id,
        name: name.clone(),
        team: team.clone(),
        kind: query.kind.becomes(),
        size: received.size,
        digest: received.digest,
        created: clock::now(),
    };
    if let Err(fault) = app.db.commit(Batch::default().create(&row)).await {
        app.images.remove(row.id).await;
        return Err(match fault {
            Fault::Store(crate::store::StoreError::Conflict { .. }) => taken(&name).into(),
            fault => fault.into(),
        });
    }
    tracing::info!(image = %name, %team, size = %row.size, principal = who.name, "image imported");
    Ok(Imported::Image(views::image(&find(&app, team, &name).await?)))
}

/// Fetches an image from a URL
///
/// Only https, and only addresses of the public internet or those that the administrator allows, after every redirect as well.
#[utoipa::path(post, path = "/v1/images/{image}/fetch", tag = "image", operation_id = "image_fetch", params(("image" = Name, Path), Team),
    request_body = v1::ImageFetch, responses((status = 202, body = v1::Task), Refusals))]
pub(super) async fn image_fetch(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(name): Named,
    Query(query): Query<Team>,
    Body(request): Body<v1::ImageFetch>,
) -> Answer<(StatusCode, Json<v1::Task>)> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Change, Target::Team(team))?;
    let url = check_url(&request.url)?;
    request.sha256.as_deref().map(read_sha256).transpose()?;
    check_free(&app, team, &name).await?;
    let new = NewImport {
        team: team.clone(),
        name,
        image: ImageId::new(clock::fresh()),
        format: request.kind,
        source: ImportSource::Url { url: url.to_string(), sha256: request.sha256 },
        principal: who.name,
        about: format!("to be fetched from {}", shown(&url)),
    };
    let task = app.tasks.begin_import(new).await?;
    Ok((StatusCode::ACCEPTED, Json(views::task(&task))))
}

/// What an export gives.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Export {
    /// The format; by default as the image is kept.
    #[serde(default)]
    #[param(inline)]
    format: ExportFormat,
    /// The team; by default the principal's own (for an administrator `default`).
    team: Option<Name>,
}

/// Content of an image
///
/// Another format is made before the first byte is sent.
#[utoipa::path(get, path = "/v1/images/{image}/content", tag = "image", operation_id = "image_export",
    params(("image" = Name, Path), Export),
    responses((status = 200, content_type = "application/octet-stream", body = Vec<u8>), Refusals))]
pub(super) async fn image_export(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(name): Named,
    Query(query): Query<Export>,
) -> Answer<Response> {
    let team = team_of(&who, query.team.as_ref());
    // What is in an image may be a secret of those who made it.
    authorize(&who, Action::Change, Target::Team(team))?;
    let image = find(&app, team, &name).await?.row;
    let (file, length) = app.images.export(image.id, image.kind, &name, query.format).await?;
    tracing::info!(image = %name, %team, principal = who.name, "image exported");
    let content = Content::from_stream(ReaderStream::with_capacity(file, 256 << 10));
    Ok(([(CONTENT_TYPE, "application/octet-stream".to_owned()), (CONTENT_LENGTH, length.get().to_string())], content)
        .into_response())
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
        let needs = |snapshot: &SnapshotRow| snapshot.resolved.images().any(|needed| needed.id == image.row.id);
        if let Some(snapshot) = app.db.all::<SnapshotRow>().await?.into_iter().find(|snapshot| needs(&snapshot.row)) {
            return Err(Refusal::new(ErrorCode::InUse, format!("snapshot {} needs image {name}", snapshot.row.name))
                .hint(format!("delete the snapshot first: `godwit snapshot delete {}`", snapshot.row.name))
                .into());
        }
        app.db.commit(Batch::default().delete(&image)).await?;
        Ok(image.row.id)
    })?;
    app.images.remove(id).await;
    tracing::info!(image = %name, %team, principal = who.name, "image deleted");
    Ok(StatusCode::NO_CONTENT)
}
