//! Following a task to its end over whatever happens to the connection.
//!
//! ```text
//!   open the event stream behind the last cursor ─▶ ask for the task ─▶ read events
//!        ▲                                                                 │ stream ended, silent for long, or never opened
//!        └───────────────────────── a moment later ◀───────────────────────┘
//! ```
//! The task is asked for once the stream is open, so nothing falls in between; with no stream at all this is polling.

use std::pin::pin;
use std::time::Duration;

use futures::StreamExt;
use godwit_api::client::{Client, ClientError};
use godwit_api::v1::{Event, Task};
use godwit_model::TaskId;
use tokio::time::{Instant, sleep, timeout};

use crate::error::Failure;
use crate::output::note;

/// Between two attempts to open the stream, and between two polls without one.
const RETRY: Duration = Duration::from_millis(500);
/// How long a stream may be silent until the task is asked for again.
const SILENCE: Duration = Duration::from_secs(10);
/// How long a controller may be away until following is given up.
const ABSENCE: Duration = Duration::from_secs(120);

/// How long to follow.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Patience {
    /// To the end.
    Endless,
    /// At most this long.
    Until(Duration),
}

/// Follows a task to its end and shows every change to `seen`. When patience is over, or the user interrupts, the task goes on.
pub(crate) async fn follow(
    client: &Client,
    task: TaskId,
    patience: Patience,
    seen: &mut dyn FnMut(&Task),
) -> Result<Task, Failure> {
    let enough = async {
        match patience {
            Patience::Endless => std::future::pending().await,
            Patience::Until(limit) => sleep(limit).await,
        }
    };
    tokio::select! {
        ended = until_ended(client, task, seen) => ended,
        () = enough => Err(Failure::StillRunning { task }),
        _ = tokio::signal::ctrl_c() => Err(Failure::StillRunning { task }),
    }
}

async fn until_ended(client: &Client, id: TaskId, seen: &mut dyn FnMut(&Task)) -> Result<Task, Failure> {
    let mut cursor = None;
    let mut newest = None;
    let mut away: Option<Instant> = None;
    // Shows a task unless it is old, and gives it back if it has ended.
    let mut look = |task: Task| {
        if newest.is_none_or(|newest| task.revision > newest) {
            newest = Some(task.revision);
            seen(&task);
        }
        task.state.ended().then_some(task)
    };
    loop {
        let events = timeout(SILENCE, client.events(cursor)).await;
        match client.task(id).await {
            Ok(task) => {
                away = None;
                if let Some(ended) = look(task) {
                    return Ok(ended);
                }
            }
            Err(error @ (ClientError::Unreachable { .. } | ClientError::Foreign { .. })) => {
                if away.is_none() {
                    note("the controller cannot be reached; the task does not depend on this, trying again");
                }
                if away.get_or_insert_with(Instant::now).elapsed() > ABSENCE {
                    return Err(error.into());
                }
            }
            Err(error) => return Err(error.into()),
        }
        match events {
            Ok(Ok(events)) => {
                let mut events = pin!(events);
                while let Ok(Some(Ok(event))) = timeout(SILENCE, events.next()).await {
                    cursor = Some(event.cursor);
                    if let Some(ended) = task_of(event, id).and_then(&mut look) {
                        return Ok(ended);
                    }
                }
            }
            // The cursor may be older than what the controller remembers.
            Ok(Err(ClientError::Refused(_))) => cursor = None,
            Ok(Err(_)) | Err(_) => {}
        }
        sleep(RETRY).await;
    }
}

fn task_of(event: Event, id: TaskId) -> Option<Task> {
    let about_it = event.kind == "task" && event.name == id.to_string();
    event.object.filter(|_| about_it).and_then(|object| serde_json::from_value(object).ok())
}
