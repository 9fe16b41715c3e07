//! Changes as they happen, from the store's log: a cursor that is handed back continues without a loss and without a repetition.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::sse::{Event as Sse, KeepAlive, Sse as Stream};
use godwit_api::v1;
use godwit_model::{ErrorCode, Name, Refusal};
use serde::Deserialize;
use utoipa::IntoParams;

use super::extract::Query;
use super::{Answer, App, Refusals};
use crate::db::{Fault, Stored, unpack};
use crate::principals::{Action, Principal, Target, authorize};
use crate::rows::{
    HostRow, ImageRow, MigratableRow, NetworkRow, PolicyRow, Row, ScheduleRow, SnapshotRow, TaskRow, TeamRow, TokenRow, VmRow,
};
use crate::store::{Change, StoreError};
use crate::views;

/// Changes that are read at once.
const CHUNK: usize = 256;
/// How often a quiet stream says that it is alive.
const ALIVE: Duration = Duration::from_secs(15);
/// The team that events of cluster objects carry.
const CLUSTER_TEAM: &str = "default";

/// Where to continue.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Cursor {
    /// The cursor of the last event seen; by default only what happens from now on. `Last-Event-ID` means the same.
    after: Option<u64>,
}

/// Changes of objects, as server-sent events
///
/// Each event's data is an `Event`; its id is the cursor. An empty comment says that the stream is alive.
#[utoipa::path(get, path = "/v1/events", tag = "event", operation_id = "event_watch",
    params(Cursor, ("Last-Event-ID" = Option<String>, Header, description = "As `after`.")),
    responses((status = 200, body = v1::Event, content_type = "text/event-stream"), Refusals))]
pub(super) async fn event_watch(
    State(app): State<Arc<App>>,
    who: Principal,
    Query(query): Query<Cursor>,
    headers: HeaderMap,
) -> Answer<Stream<impl futures::Stream<Item = Result<Sse, Infallible>>>> {
    authorize(&who, Action::Look, Target::Team(&who.team))?;
    let last = match headers.get("last-event-id") {
        None => None,
        Some(id) => {
            let bad = || {
                Refusal::new(ErrorCode::BadRequest, "Last-Event-ID is not a cursor").hint("send the id of the last event, a number")
            };
            Some(id.to_str().ok().and_then(|id| id.parse().ok()).ok_or_else(bad)?)
        }
    };
    let mut watch = app.db.watch();
    let newest = *watch.borrow_and_update();
    let mut seen = last.or(query.after).unwrap_or(newest);
    if seen > newest {
        return Err(Refusal::new(
            ErrorCode::RevisionConflict,
            format!("cursor {seen} is ahead of the store, which is at {newest}"),
        )
        .hint("it comes from another store: list the objects again, then watch without a cursor")
        .into());
    }
    // Refuses a cursor that is too old while there is still a status to say it with.
    app.db.changes(seen, 1).await?;
    let stream = async_stream::stream! {
        loop {
            let changes = match app.db.changes(seen, CHUNK).await {
                Ok(changes) => changes,
                Err(fault) => {
                    // Slower than the log is kept, or the end of this controller: whoever comes back with the cursor is told.
                    if !matches!(fault, Fault::Store(StoreError::Closed)) {
                        tracing::info!(principal = who.name, %fault, "an event stream ends");
                    }
                    return;
                }
            };
            for change in &changes {
                seen = change.revision;
                if let Some(event) = told(&app, &who, change) {
                    // An event is plain data with string keys.
                    let data = serde_json::to_string(&event).unwrap_or_default();
                    yield Ok(Sse::default().id(event.cursor.to_string()).data(data));
                }
            }
            if !changes.is_empty() {
                continue;
            }
            tokio::select! {
                changed = watch.changed() => if changed.is_err() { return },
                () = app.stop.cancelled() => return,
            }
        }
    };
    Ok(Stream::new(stream).keep_alive(KeepAlive::new().interval(ALIVE)))
}

struct Subject {
    kind: &'static str,
    name: String,
    team: Option<Name>,
    administration: bool,
    object: Option<serde_json::Value>,
}

fn subject<R: Row>(change: &Change, describe: impl FnOnce(&Stored<R>) -> Subject) -> Option<Subject> {
    let value = change.value.as_ref().or(change.removed.as_ref())?;
    match unpack::<R>(&change.key, value) {
        Ok(row) => Some(describe(&Stored { row, revision: change.revision })),
        Err(fault) => {
            tracing::error!(error = &fault as &dyn std::error::Error, "a change cannot be told");
            None
        }
    }
}

/// The event of a change, if there is one and the principal may see it.
fn told(app: &App, who: &Principal, change: &Change) -> Option<v1::Event> {
    let (prefix, _) = change.key.split_once('/')?;
    let subject = match prefix {
        "vm" => subject::<VmRow>(change, |vm| Subject {
            kind: "vm",
            name: vm.row.name.to_string(),
            team: Some(vm.row.team.clone()),
            administration: false,
            object: views::value(&views::vm(vm, &app.hub)).ok(),
        }),
        "migratable" => subject::<MigratableRow>(change, |known| Subject {
            kind: "migratable",
            name: known.row.name.to_string(),
            team: Some(known.row.team.clone()),
            administration: false,
            object: views::value(&views::migratable(&known.row)).ok(),
        }),
        "task" => subject::<TaskRow>(change, |task| Subject {
            kind: "task",
            name: task.row.id.to_string(),
            team: Some(task.row.team.clone()),
            administration: false,
            object: views::value(&views::task(task)).ok(),
        }),
        "image" => subject::<ImageRow>(change, |image| Subject {
            kind: "image",
            name: image.row.name.to_string(),
            team: Some(image.row.team.clone()),
            administration: false,
            object: views::value(&views::image(image)).ok(),
        }),
        "snapshot" => subject::<SnapshotRow>(change, |snapshot| Subject {
            kind: "snapshot",
            name: snapshot.row.name.to_string(),
            team: Some(snapshot.row.team.clone()),
            administration: false,
            object: views::value(&views::snapshot(snapshot)).ok(),
        }),
        "schedule" => subject::<ScheduleRow>(change, |schedule| Subject {
            kind: "schedule",
            name: schedule.row.name.to_string(),
            team: Some(schedule.row.team.clone()),
            administration: false,
            object: views::value(&views::schedule(schedule)).ok(),
        }),
        "network" => subject::<NetworkRow>(change, |network| Subject {
            kind: "network",
            name: network.row.name.to_string(),
            team: Some(network.row.team.clone()),
            administration: false,
            object: views::value(&views::network(network, &app.hub)).ok(),
        }),
        "policy" => subject::<PolicyRow>(change, |policy| Subject {
            kind: "policy",
            name: policy.row.name.to_string(),
            team: Some(policy.row.team.clone()),
            administration: false,
            object: views::value(&views::policy(policy)).ok(),
        }),
        "host" => subject::<HostRow>(change, |host| Subject {
            kind: "host",
            name: host.row.name.to_string(),
            team: None,
            administration: false,
            object: views::value(&views::host(host, &app.hub)).ok(),
        }),
        "team" => subject::<TeamRow>(change, |team| Subject {
            kind: "team",
            name: team.row.name.to_string(),
            team: Some(team.row.name.clone()),
            administration: false,
            object: views::value(&views::team(&team.row)).ok(),
        }),
        "token" => subject::<TokenRow>(change, |token| Subject {
            kind: "token",
            name: token.row.id.to_string(),
            team: Some(token.row.team.clone()),
            administration: true,
            object: views::value(&views::token(&token.row)).ok(),
        }),
        _ => None,
    }?;
    let visible = match (&subject.team, subject.administration) {
        (_, true) => authorize(who, Action::Look, Target::Administration),
        (Some(team), false) => authorize(who, Action::Look, Target::Team(team)),
        (None, false) => authorize(who, Action::Look, Target::Cluster),
    };
    visible.ok()?;
    let deleted = change.value.is_none();
    Some(v1::Event {
        cursor: change.revision,
        kind: subject.kind.into(),
        name: subject.name,
        team: subject.team.or_else(|| Name::new(CLUSTER_TEAM).ok())?,
        change: if deleted { v1::Change::Deleted } else { v1::Change::Set },
        object: subject.object.filter(|_| !deleted),
    })
}
