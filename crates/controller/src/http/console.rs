//! A VM's serial console: a WebSocket here, a stream of the agent there, one user at a time.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{FromRequestParts, Request, State};
use axum::response::Response;
use godwit_link::v1::{self, command::Action as Command};
use godwit_model::{ErrorCode, Name, Refusal, Retry};

use super::extract::{Named, Query, Team, team_of};
use super::{Answer, App, Refusals};
use crate::clock;
use crate::hub::{ConsoleSeat, ConsoleStream};
use crate::principals::{Action, Principal, Target, authorize};

/// How long an agent may take to open the console.
const OPENING: Duration = Duration::from_secs(10);

/// Opens the serial console of a running VM, as a WebSocket of binary messages
///
/// One user at a time: a second one is refused with `in_use`.
#[utoipa::path(get, path = "/v1/vms/{vm}/console", tag = "vm", operation_id = "vm_console", params(("vm" = Name, Path), Team),
    responses((status = 101, description = "The console follows as a WebSocket."), Refusals))]
pub(super) async fn vm_console(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(vm): Named,
    Query(query): Query<Team>,
    request: Request,
) -> Answer<Response> {
    let team = team_of(&who, query.team.as_ref());
    // What is typed there is as good as being the guest's administrator.
    authorize(&who, Action::Change, Target::Team(team))?;
    let row = app.tasks.vm(team, &vm).await?.row;
    let (mut parts, _) = request.into_parts();
    let upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection> = WebSocketUpgrade::from_request_parts(&mut parts, &app).await;
    let upgrade = upgrade.map_err(|error| {
        Refusal::new(ErrorCode::BadRequest, format!("the console is a WebSocket: {error}"))
            .hint("use `godwit vm console`, or a WebSocket client")
    })?;
    let host = row.host.as_ref().filter(|_| row.has_process());
    let host =
        host.ok_or_else(|| Refusal::new(ErrorCode::VmNotRunning, "the VM does not run").hint("start it first: `godwit vm start`"))?;
    let away = || {
        Refusal::new(ErrorCode::HostDown, format!("host {host} is not connected"))
            .hint("wait until its agent is back")
            .retry(Retry::Safe)
    };
    let (seat, brought) = app.hub.take_console(row.id, host)?;
    let command = v1::Command {
        id: u64::from_le_bytes(*clock::fresh().as_bytes().first_chunk().unwrap_or(&[0; 8])),
        epoch: app.db.epoch().0,
        task: String::new(),
        action: Some(Command::Console(v1::OpenConsole { vm: row.id.to_string(), session: seat.session.clone() })),
    };
    let answer = app.hub.command(host, command).ok_or_else(away)?;
    let open = async {
        answer.await.map_err(|_| away())??;
        brought.await.map_err(|_| away())
    };
    let silent =
        |_| Refusal::new(ErrorCode::HostFailed, format!("host {host} did not open the console in time")).retry(Retry::Safe);
    let stream = tokio::time::timeout(OPENING, open).await.map_err(silent)??;
    tracing::info!(%vm, %team, principal = who.name, "console opened");
    Ok(upgrade.on_upgrade(move |socket| bridge(app, socket, stream, seat)))
}

/// Passes bytes both ways until either side ends.
async fn bridge(app: Arc<App>, mut socket: WebSocket, mut stream: ConsoleStream, seat: ConsoleSeat) {
    let done = async {
        loop {
            tokio::select! {
                output = stream.from_guest.recv() => {
                    let Some(output) = output else { return };
                    if socket.send(Message::Binary(output)).await.is_err() {
                        return;
                    }
                }
                typed = socket.recv() => {
                    let data = match typed {
                        Some(Ok(Message::Binary(data))) => data,
                        Some(Ok(Message::Text(text))) => text.into(),
                        Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
                        Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                    };
                    let chunk = v1::ConsoleChunk { session: String::new(), data: data.to_vec() };
                    if stream.to_guest.send(Ok(chunk)).await.is_err() {
                        return;
                    }
                }
            }
        }
    };
    tokio::select! {
        () = done => {}
        () = app.stop.cancelled() => {}
    }
    // The user sees the end; whether the farewell arrives does not matter.
    let _ = socket.send(Message::Close(None)).await;
    drop(seat);
}
