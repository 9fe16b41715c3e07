//! The users' door: REST under `/v1`, described by OpenAPI from the same annotations, events, consoles.
//!
//! One layer asks who it is before anything else is looked at; each operation then asks [`crate::principals::authorize`]. Every answer
//! that is not a success is a `Refusal`, also for routes that do not exist and for faults of ours.

use std::any::Any;
use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use godwit_api::status::http_status;
use godwit_model::{ErrorCode, Refusal, Retry};
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;
use utoipa::OpenApi;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::authority::Authority;
use crate::db::Db;
use crate::hub::Hub;
use crate::images::Images;
use crate::tasks::Tasks;

mod auth;
mod cluster;
mod console;
mod events;
mod extract;
mod guest;
mod images;
mod networks;
mod policies;
mod schedules;
mod snapshots;
mod tasks;
mod teams;
mod vaults;
mod vms;

/// What the operations work with.
pub(crate) struct App {
    pub(crate) db: Db,
    pub(crate) hub: Arc<Hub>,
    pub(crate) tasks: Arc<Tasks>,
    pub(crate) images: Arc<Images>,
    pub(crate) authority: Arc<Authority>,
    pub(crate) stop: CancellationToken,
}

#[derive(OpenApi)]
#[openapi(
    info(title = "Godwit", description = "Virtual machines that move between hosts without anybody noticing."),
    security(("bearer" = [])),
    tags(
        (name = "vm"), (name = "host"), (name = "pool"), (name = "network"), (name = "policy"), (name = "image"), (name = "snapshot"), (name = "schedule"), (name = "vault"), (name = "task"), (name = "event"),
        (name = "team"), (name = "token"), (name = "controller"),
    )
)]
struct Described;

fn operations() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::with_openapi(Described::openapi())
        .routes(routes!(cluster::health))
        .routes(routes!(cluster::cpu_baseline))
        .routes(routes!(cluster::metrics))
        .routes(routes!(cluster::host_list))
        .routes(routes!(cluster::host_show, cluster::host_set, cluster::host_delete))
        .routes(routes!(cluster::join_token_create))
        .routes(routes!(cluster::pool_list))
        .routes(routes!(cluster::pool_show))
        .routes(routes!(policies::policy_list, policies::policy_create))
        .routes(routes!(policies::policy_show, policies::policy_set, policies::policy_delete))
        .routes(routes!(networks::network_list, networks::network_create))
        .routes(routes!(networks::network_show, networks::network_set, networks::network_delete))
        .routes(routes!(images::image_list))
        .routes(routes!(images::image_show, images::image_import, images::image_delete))
        .routes(routes!(images::image_fetch))
        .routes(routes!(images::image_export))
        .routes(routes!(vms::vm_list, vms::vm_create))
        .routes(routes!(vms::vm_show, vms::vm_delete))
        .routes(routes!(vms::vm_check))
        .routes(routes!(vms::vm_history))
        .routes(routes!(vms::vm_start))
        .routes(routes!(vms::vm_stop))
        .routes(routes!(vms::vm_kill))
        .routes(routes!(vms::vm_pause))
        .routes(routes!(vms::vm_unpause))
        .routes(routes!(vms::vm_suspend))
        .routes(routes!(vms::vm_unsuspend))
        .routes(routes!(vms::vm_migrate))
        .routes(routes!(vms::vm_set))
        .routes(routes!(console::vm_console))
        .routes(routes!(guest::vm_exec))
        .routes(routes!(snapshots::snapshot_list, snapshots::snapshot_create))
        .routes(routes!(snapshots::snapshot_show, snapshots::snapshot_set, snapshots::snapshot_delete))
        .routes(routes!(snapshots::snapshot_rollback))
        .routes(routes!(snapshots::snapshot_clone))
        .routes(routes!(snapshots::snapshot_export))
        .routes(routes!(snapshots::snapshot_import))
        .routes(routes!(schedules::schedule_list, schedules::schedule_create))
        .routes(routes!(schedules::schedule_show, schedules::schedule_set, schedules::schedule_delete))
        .routes(routes!(schedules::schedule_status))
        .routes(routes!(schedules::schedule_run))
        .routes(routes!(vaults::vault_list))
        .routes(routes!(vaults::vault_verify))
        .routes(routes!(vaults::vault_prune))
        .routes(routes!(tasks::task_list))
        .routes(routes!(tasks::task_show))
        .routes(routes!(tasks::task_cancel))
        .routes(routes!(tasks::task_bandwidth))
        .routes(routes!(tasks::task_postcopy))
        .routes(routes!(tasks::task_throttle))
        .routes(routes!(events::event_watch))
        .routes(routes!(teams::team_list, teams::team_create))
        .routes(routes!(teams::team_set))
        .routes(routes!(teams::token_list, teams::token_create))
        .routes(routes!(teams::token_delete))
}

/// The description that is served.
pub(crate) fn description() -> utoipa::openapi::OpenApi {
    let mut description = operations().into_openapi();
    let bearer = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("gwt").build());
    description.components.get_or_insert_default().security_schemes.insert("bearer".into(), bearer.into());
    description
}

/// Everything that is served to users.
pub(crate) fn router(app: Arc<App>) -> Router {
    let text: Arc<str> = description().to_json().expect("a description is plain data").into();
    let served = get(move || {
        let text = text.clone();
        async move { ([("content-type", "application/json")], text.to_string()) }
    });
    let (operations, _) = operations().split_for_parts();
    operations
        .route("/v1/openapi.json", served)
        .fallback(async || Failure::from(no_route()))
        .method_not_allowed_fallback(async || {
            let refusal = Refusal::new(ErrorCode::BadRequest, "this path does not take that method")
                .hint("/v1/openapi.json describes every operation");
            (StatusCode::METHOD_NOT_ALLOWED, axum::Json(refusal))
        })
        .layer(DefaultBodyLimit::disable())
        .layer(axum::middleware::from_fn_with_state(app.clone(), auth::demand_principal))
        .layer(CatchPanicLayer::custom(panicked))
        .with_state(app)
}

fn no_route() -> Refusal {
    Refusal::new(ErrorCode::NotFound, "there is no such path").hint("/v1/openapi.json describes every operation")
}

fn panicked(_cause: Box<dyn Any + Send>) -> Response {
    // The cause is on stderr by the panic hook; it may hold anything, so it is not sent.
    let refusal = Refusal::new(ErrorCode::Internal, "a fault of the controller; its log says more").retry(Retry::Unknown);
    Failure::from(refusal).into_response()
}

/// A refusal on its way to the user.
#[derive(Debug)]
pub(crate) struct Failure(pub(crate) Refusal);

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self(refusal)
    }
}

impl From<crate::db::Fault> for Failure {
    fn from(fault: crate::db::Fault) -> Self {
        Self(fault.refusal())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut refusal = self.0;
        // Messages quote what was sent; terminals and logs shall not obey it.
        if refusal.message.chars().any(char::is_control) {
            refusal.message = refusal.message.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
        }
        let status = StatusCode::from_u16(http_status(refusal.code)).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, axum::Json(refusal)).into_response()
    }
}

/// What operations answer.
pub(crate) type Answer<T> = Result<T, Failure>;

/// The refusals that every operation can answer with, for the description.
pub(crate) struct Refusals;

impl utoipa::IntoResponses for Refusals {
    fn responses() -> std::collections::BTreeMap<String, utoipa::openapi::RefOr<utoipa::openapi::Response>> {
        use utoipa::openapi::{ContentBuilder, Ref, ResponseBuilder};
        let table = [
            (400, "The request is not well formed."),
            (401, "No or unknown credentials."),
            (403, "The principal may not do this."),
            (404, "No such object, or not visible to this principal."),
            (409, "It contradicts the state of the object."),
            (413, "The body is too large."),
            (422, "The cluster cannot do it as it is."),
            (500, "A fault of ours."),
            (503, "A host, or the controller, is not there."),
            (507, "The store has no space."),
        ];
        let response = |text: &str| {
            let content = ContentBuilder::new().schema(Some(Ref::from_schema_name("Refusal"))).build();
            ResponseBuilder::new().description(text).content("application/json", content).build().into()
        };
        table.into_iter().map(|(status, text)| (status.to_string(), response(text))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_answered_without_its_cause() {
        let response = panicked(Box::new("a secret"));
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        let refusal = Refusal::new(ErrorCode::Internal, "").retry(Retry::Unknown);
        assert_eq!(Failure(refusal).into_response().status(), response.status());
    }
}
