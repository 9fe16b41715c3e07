//! Paths, queries and bodies as typed values; whatever does not fit is a `Refusal`.

use axum::body::to_bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::header::{CONTENT_LENGTH, IF_MATCH};
use axum::http::request::Parts;
use godwit_api::v1::MAX_BODY;
use godwit_model::{ErrorCode, Name, Refusal};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use utoipa::IntoParams;

use super::Failure;
use crate::principals::Principal;

fn bad(message: impl Into<String>, hint: &str) -> Failure {
    Failure(Refusal::new(ErrorCode::BadRequest, message).hint(hint))
}

/// A name from a path or query.
fn name(text: &str) -> Result<Name, Failure> {
    Name::new(text).map_err(|error| {
        Failure(
            Refusal::new(ErrorCode::NameInvalid, error.to_string())
                .hint("a name has 1 to 63 of a-z, 0-9, '-', '.', '_', the first a letter or digit"),
        )
    })
}

/// The one name in a path.
pub(super) struct Named(pub(super) Name);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        let text = Path::<String>::from_request_parts(parts, state).await;
        let Path(text) = text.map_err(|_| {
            Failure(Refusal::new(ErrorCode::NameInvalid, "the name in the path is not text").hint("names are plain ASCII"))
        })?;
        name(&text).map(Self)
    }
}

/// The one id in a path.
pub(super) struct Identified<T>(pub(super) T);

impl<S: Send + Sync, T: std::str::FromStr> FromRequestParts<S> for Identified<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        let text = Path::<String>::from_request_parts(parts, state).await.map(|Path(text)| text).unwrap_or_default();
        text.parse().map(Self).map_err(|_| bad("the id in the path is not a UUID", "copy it whole, as a list shows it"))
    }
}

/// A typed query.
pub(super) struct Query<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Failure> {
        let query = axum::extract::Query::<T>::try_from_uri(&parts.uri);
        query.map(|query| Self(query.0)).map_err(|error| bad(error.body_text(), "/v1/openapi.json says what the query may hold"))
    }
}

/// A JSON body of at most [`MAX_BODY`]. An empty one is `null`.
pub(super) struct Body<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Failure> {
        let bytes = read(request).await?;
        let bytes: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        serde_json::from_slice(bytes)
            .map(Self)
            .map_err(|error| bad(format!("the body does not fit: {error}"), "/v1/openapi.json describes it"))
    }
}

/// A body that may be left out, or be `null`.
pub(super) struct MaybeBody<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned + Default> FromRequest<S> for MaybeBody<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        let Body(body) = Body::<Option<T>>::from_request(request, state).await?;
        Ok(Self(body.unwrap_or_default()))
    }
}

async fn read(request: Request) -> Result<axum::body::Bytes, Failure> {
    let too_large = || {
        Failure(
            Refusal::new(ErrorCode::BodyTooLarge, format!("the body has more than {MAX_BODY} bytes"))
                .hint("send less; images go to PUT /v1/images/NAME"),
        )
    };
    let declared = content_length(request.headers());
    if declared.is_some_and(|length| length > MAX_BODY as u64) {
        return Err(too_large());
    }
    to_bytes(request.into_body(), MAX_BODY).await.map_err(|error| {
        let mut cause: &dyn std::error::Error = &error;
        while let Some(deeper) = cause.source() {
            cause = deeper;
        }
        if cause.to_string().contains("length limit") {
            too_large()
        } else {
            bad(format!("the body broke off: {cause}"), "send it again")
        }
    })
}

/// What the sender says the length is.
pub(super) fn content_length(headers: &axum::http::HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// `If-Match`: the revision that the object must still have.
pub(super) struct Condition(pub(super) Option<u64>);

impl<S: Send + Sync> FromRequestParts<S> for Condition {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Failure> {
        let Some(header) = parts.headers.get(IF_MATCH) else { return Ok(Self(None)) };
        let revision = header.to_str().ok().and_then(|text| text.trim().trim_matches('"').parse().ok());
        revision
            .map(|revision| Self(Some(revision)))
            .ok_or_else(|| bad("If-Match is not a revision", "send the object's `revision`, a number"))
    }
}

/// Which team's objects.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Team {
    /// The team; by default the principal's own (for an administrator `default`).
    pub(super) team: Option<Name>,
}

/// Which team's objects, and which page of them.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Listing {
    /// The team; by default the principal's own (for an administrator `default`).
    pub(super) team: Option<Name>,
    /// `next` of the page before.
    pub(super) after: Option<String>,
    /// Objects in a page, 1 to 1000; 200 by default.
    #[param(minimum = 1, maximum = 1000)]
    pub(super) limit: Option<usize>,
}

impl Listing {
    pub(super) fn limit(&self) -> Result<usize, Failure> {
        match self.limit {
            None => Ok(200),
            Some(limit @ 1..=1_000) => Ok(limit),
            Some(_) => Err(bad("a page has 1 to 1000 objects", "choose a limit between them")),
        }
    }
}

/// The team that a request is about.
pub(super) fn team_of<'a>(principal: &'a Principal, wanted: Option<&'a Name>) -> &'a Name {
    wanted.unwrap_or(&principal.team)
}

/// One page of objects that are all in memory.
pub(super) fn page<T>(mut items: Vec<T>, limit: usize, cursor: impl Fn(&T) -> String) -> godwit_api::v1::Page<T> {
    let more = items.len() > limit;
    items.truncate(limit);
    let next = if more { items.last().map(cursor) } else { None };
    godwit_api::v1::Page { items, next }
}
