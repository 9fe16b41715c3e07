//! Who asks: before the path, the body or anything else is looked at.

use std::sync::Arc;

use axum::extract::{FromRequestParts, Request, State};
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use godwit_model::{ErrorCode, Refusal};

use super::{App, Failure};
use crate::principals::{Principal, authenticate};

/// What can be read without a principal.
const OPEN: [&str; 2] = ["/v1/health", "/v1/openapi.json"];

/// Finds the principal of a request, or refuses it.
pub(super) async fn demand_principal(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    if !OPEN.contains(&request.uri().path()) {
        let header = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let token =
            header.split_once(' ').filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map_or("", |(_, token)| token);
        match authenticate(&app.db, token.trim()).await {
            Ok(principal) => request.extensions_mut().insert(principal),
            Err(fault) => return Failure::from(fault).into_response(),
        };
    }
    next.run(request).await
}

impl<S: Sync> FromRequestParts<S> for Principal {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Failure> {
        let missing = || Failure(Refusal::new(ErrorCode::Unauthenticated, "the request has no principal"));
        parts.extensions.get::<Self>().cloned().ok_or_else(missing)
    }
}
