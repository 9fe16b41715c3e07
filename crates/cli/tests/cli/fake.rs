//! A pretended controller on loopback, and the binary pointed at it.

use std::collections::VecDeque;
use std::io::Write;
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use axum::Router;
use axum::body::Body;
use axum::extract::ws::{Message, WebSocketUpgrade};
use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::sse::{Event as Sse, Sse as SseStream};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{any, get, post};
use futures::StreamExt;
use godwit_api::status::http_status;
use godwit_api::v1::{Change, Event, Page, Snapshot, Task, TaskState, Vm};
use godwit_model::{ErrorCode, ExecOutcome, Name, Refusal, TaskId, UnixMillis, VaultPlan};
use serde_json::{Value, json};

/// What every request must carry.
pub(crate) const SECRET: &str = "gwt.00000000-0000-0000-0000-000000000001.cafe";

/// A request that arrived.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) authorization: String,
    pub(crate) body: Vec<u8>,
}

/// What the controller will answer.
#[derive(Default)]
pub(crate) struct Script {
    /// All requests so far.
    pub(crate) seen: Vec<Seen>,
    /// The task, as asked for now.
    pub(crate) task: Option<Task>,
    /// If not empty, the task's next states as they are asked for.
    pub(crate) polls: VecDeque<Task>,
    /// What each event stream tells before it breaks off; the ones after the last tell nothing and stay.
    pub(crate) streams: VecDeque<Vec<Event>>,
    /// Whether there are no event streams at all.
    pub(crate) no_events: bool,
    /// The VMs.
    pub(crate) vms: Vec<Vm>,
    /// The snapshots.
    pub(crate) snapshots: Vec<Snapshot>,
    /// What a vault can do without.
    pub(crate) plan: VaultPlan,
    /// How a program in a guest ends.
    pub(crate) exec: Option<Result<ExecOutcome, Refusal>>,
    /// Told when the task is asked for: a stream about it does not run ahead of that.
    pub(crate) asked: Arc<tokio::sync::Notify>,
}

type Shared = Arc<Mutex<Script>>;

/// A running fake with a home directory for its user.
pub(crate) struct Fake {
    pub(crate) url: String,
    pub(crate) home: tempfile::TempDir,
    script: Shared,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Fake {
    pub(crate) fn start(script: Script) -> Self {
        let script: Shared = Arc::new(Mutex::new(script));
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.set_nonblocking(true).expect("nonblocking");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let routes = routes(script.clone());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
                tokio::select! {
                    served = axum::serve(listener, routes) => served.expect("served"),
                    _ = stopped => {}
                }
            });
            runtime.shutdown_background();
        });
        let home = tempfile::tempdir().expect("a directory");
        std::fs::write(home.path().join("token"), format!("{SECRET}\n")).expect("written");
        Self { url, home, script, stop: Some(stop), thread: Some(thread) }
    }

    pub(crate) fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().expect("not poisoned")
    }

    /// Requests of this method whose path begins so.
    pub(crate) fn seen(&self, method: &str, path: &str) -> Vec<Seen> {
        self.script().seen.iter().filter(|seen| seen.method == method && seen.path.starts_with(path)).cloned().collect()
    }

    /// The binary, told where the fake is, and with nothing to read.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = bare(self.home.path(), arguments);
        command.env("GODWIT_URL", &self.url).env("GODWIT_TOKEN_FILE", self.home.path().join("token"));
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Ended {
        Ended::of(self.command(arguments).output().expect("ran"))
    }

    pub(crate) fn run_with_input(&self, arguments: &[&str], input: &[u8]) -> Ended {
        let mut child =
            self.command(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started");
        child.stdin.take().expect("piped").write_all(input).expect("written");
        Ended::of(child.wait_with_output().expect("ran"))
    }
}

/// The binary with a home directory and nothing else that could lead it to a controller.
pub(crate) fn bare(home: &std::path::Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_godwit"));
    command.args(arguments).env_clear().env("HOME", home).stdin(Stdio::null());
    command
}

/// How a run ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    pub(crate) fn of(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

pub(crate) fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

pub(crate) fn vm(text: &str) -> Vm {
    serde_json::from_value(json!({
        "id": uuid::Uuid::nil(), "name": text, "team": "default", "revision": 7, "created": 0,
        "spec": { "vcpus": 2, "memory": 1 << 30, "boot": { "from": "kernel", "kernel": "k", "cmdline": "quiet" },
            "disks": [{ "volume": "shared/root", "format": "qcow2" }], "nics": [{ "network": "default" }] },
        "status": { "state": "running", "host": "h1", "generation": 3, "activity": null, "started": null,
            "macs": ["52:54:00:00:00:01"], "conditions": [], "since": 0 }
    }))
    .expect("a VM")
}

pub(crate) fn task(kind: &str, state: TaskState, revision: u64) -> Task {
    Task {
        id: TaskId::new(uuid::Uuid::from_u128(0xabcd_0000_0000_0000_0000_0000_0000_0001)),
        team: name("default"),
        kind: kind.into(),
        subject: name("web1"),
        state,
        revision,
        created: UnixMillis(0),
        ended: state.ended().then_some(UnixMillis(1)),
        principal: "admin".into(),
        reason: None,
        step: String::new(),
        cancellable: true,
        progress: None,
        transfer: None,
        forecast: None,
        figures: None,
        snapshot: None,
        kept: None,
        restore: None,
        export: None,
        error: None,
        trail: vec![],
    }
}

pub(crate) fn snapshot(text: &str) -> Snapshot {
    serde_json::from_value(json!({
        "id": uuid::Uuid::nil(), "name": text, "team": "default", "revision": 7, "vm": "web1", "created": 1_795_804_200_000_u64,
        "pool": "shared", "host": "h1", "memory": 512 << 20, "disks": [{ "volume": "shared/root", "size": null }],
        "golden": false, "state": "ready", "principal": "admin", "reason": null,
        "figures": { "memory": true, "pause_us": 8_200, "took_ms": 2_100, "pages_new": 36_608, "warnings": ["a \u{1b}[2J"] }
    }))
    .expect("a snapshot")
}

pub(crate) fn event(cursor: u64, task: &Task) -> Event {
    let object = serde_json::to_value(task).ok();
    Event { cursor, kind: "task".into(), name: task.id.to_string(), team: name("default"), change: Change::Set, object }
}

pub(crate) fn vm_event(cursor: u64, vm: &Vm, change: Change) -> Event {
    let object = serde_json::to_value(vm).ok().filter(|_| change == Change::Set);
    Event { cursor, kind: "vm".into(), name: vm.name.to_string(), team: name("default"), change, object }
}

fn routes(script: Shared) -> Router {
    Router::new()
        .route("/v1/vms", get(list_vms).post(create_vm))
        .route("/v1/vms/{name}", get(show_vm).delete(the_task))
        .route("/v1/vms/{name}/console", any(console))
        .route("/v1/vms/{name}/exec", post(exec))
        .route("/v1/vms/{name}/{verb}", post(the_task))
        .route("/v1/snapshots", get(list_snapshots).post(the_task))
        .route("/v1/snapshots/{name}", get(show_snapshot).patch(set_snapshot).delete(async || StatusCode::NO_CONTENT))
        .route("/v1/snapshots/{name}/rollback", post(the_task))
        .route("/v1/snapshots/{name}/export", post(the_task))
        .route("/v1/snapshots/{name}/import", post(the_task))
        .route("/v1/vaults", get(list_vaults))
        .route("/v1/vaults/{pool}/verify", post(the_task))
        .route("/v1/vaults/{pool}/prune", post(prune))
        .route("/v1/tasks", get(list_tasks))
        .route("/v1/tasks/{id}", get(poll_task))
        .route("/v1/tasks/{id}/cancel", post(the_task))
        .route("/v1/tasks/{id}/postcopy", post(the_task))
        .route("/v1/tasks/{id}/throttle", post(the_task))
        .route("/v1/tasks/{id}/bandwidth", post(the_task))
        .route("/v1/images/{name}", axum::routing::put(import))
        .route("/v1/hosts/{name}", get(show_host).delete(async || StatusCode::NO_CONTENT))
        .route("/v1/events", get(events))
        .layer(from_fn_with_state(script.clone(), remember))
        .with_state(script)
}

async fn remember(State(script): State<Shared>, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let upgrade = parts.headers.contains_key(header::UPGRADE);
    let body = if upgrade { Default::default() } else { axum::body::to_bytes(body, 64 << 20).await.expect("a body") };
    let authorization =
        parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let seen = Seen {
        method: parts.method.to_string(),
        path: parts.uri.to_string().trim_start_matches("/v1").to_owned(),
        authorization,
        body: body.to_vec(),
    };
    script.lock().expect("not poisoned").seen.push(seen);
    next.run(Request::from_parts(parts, Body::from(body))).await
}

fn refuse(refusal: Refusal) -> Response {
    (StatusCode::from_u16(http_status(refusal.code)).expect("a status"), Json(refusal)).into_response()
}

fn page<T: serde::Serialize>(items: Vec<T>) -> Response {
    Json(Page { items, next: None }).into_response()
}

async fn list_vms(State(script): State<Shared>) -> Response {
    page(script.lock().expect("not poisoned").vms.clone())
}

async fn create_vm(State(_): State<Shared>, Json(request): Json<Value>) -> Response {
    let mut created = vm(request["name"].as_str().expect("a name"));
    created.spec = serde_json::from_value(request["spec"].clone()).expect("a spec");
    Json(created).into_response()
}

/// A VM of any name; one that is called as an error code is refused with it.
async fn show_vm(State(script): State<Shared>, Path(text): Path<String>) -> Response {
    if let Some(vm) = script.lock().expect("not poisoned").vms.iter().find(|vm| vm.name.as_str() == text) {
        return Json(vm.clone()).into_response();
    }
    match ErrorCode::ALL.iter().find(|code| code.as_str() == text) {
        Some(code) => refuse(Refusal::new(*code, format!("\u{1b}[31m{code}\u{9b}")).hint("do this\u{202e}")),
        None => Json(vm(&text)).into_response(),
    }
}

async fn list_snapshots(State(script): State<Shared>) -> Response {
    page(script.lock().expect("not poisoned").snapshots.clone())
}

async fn show_snapshot(Path(text): Path<String>) -> Response {
    Json(snapshot(&text)).into_response()
}

async fn set_snapshot(Path(text): Path<String>, Json(request): Json<Value>) -> Response {
    let golden = request["golden"].as_bool().expect("a change");
    Json(Snapshot { golden, ..snapshot(&text) }).into_response()
}

/// One that a host can be asked about, and one of which nothing is known.
async fn list_vaults() -> Response {
    let usage = json!({ "snapshots": 2, "packs": 3, "bytes": 150 << 20 });
    page(vec![
        json!({ "pool": "shared", "identity": "one", "host": "h1", "usage": usage }),
        json!({ "pool": "local", "identity": "two", "host": null, "usage": null }),
    ])
}

/// The plan, which may be applied if it is sent back as it is.
async fn prune(State(script): State<Shared>, Json(request): Json<Value>) -> Response {
    let plan = script.lock().expect("not poisoned").plan.clone();
    if request["apply"] == true && request["plan"] != serde_json::to_value(&plan).expect("JSON") {
        return refuse(Refusal::new(ErrorCode::RevisionConflict, "another plan"));
    }
    Json(plan).into_response()
}

/// A connected host with two VMs.
async fn show_host(Path(text): Path<String>) -> Response {
    let load = json!({ "memory_free": 0, "vms": 2, "pools_free": [] });
    Json(json!({ "name": text, "revision": 1, "address": "10.0.0.1", "connected": true, "since": 0, "facts": null, "load": load }))
        .into_response()
}

async fn the_task(State(script): State<Shared>, path: axum::extract::RawPathParams) -> Response {
    if path.iter().any(|(_, value)| value == "bad") {
        return refuse(Refusal::new(ErrorCode::VmBusy, "another task works on it"));
    }
    Json(script.lock().expect("not poisoned").task.clone().expect("a task in the script")).into_response()
}

async fn exec(State(script): State<Shared>) -> Response {
    match script.lock().expect("not poisoned").exec.clone().expect("an outcome in the script") {
        Ok(outcome) => Json(outcome).into_response(),
        Err(refusal) => refuse(refusal),
    }
}

async fn list_tasks(State(script): State<Shared>) -> Response {
    page(script.lock().expect("not poisoned").task.clone().into_iter().collect())
}

async fn poll_task(State(script): State<Shared>) -> Response {
    let mut script = script.lock().expect("not poisoned");
    script.asked.notify_one();
    if let Some(next) = script.polls.pop_front() {
        script.task = Some(next);
    }
    Json(script.task.clone().expect("a task in the script")).into_response()
}

async fn import(Path(text): Path<String>, body: axum::body::Bytes) -> Response {
    let (size, digest) = (body.len(), "00");
    let image = json!({ "id": uuid::Uuid::nil(), "name": text, "team": "default", "revision": 1, "kind": "raw", "size": size,
        "digest": digest, "created": 0 });
    Json(image).into_response()
}

async fn events(State(script): State<Shared>) -> Response {
    let mut locked = script.lock().expect("not poisoned");
    if locked.no_events {
        return StatusCode::NOT_FOUND.into_response();
    }
    let told = locked.streams.pop_front();
    drop(locked);
    let stays = told.is_none();
    let begin = {
        let (asked, wait) =
            (script.lock().expect("not poisoned").asked.clone(), told.iter().flatten().any(|event| event.kind == "task"));
        futures::stream::once(async move {
            if wait {
                asked.notified().await;
            }
        })
        .filter_map(async |()| None)
    };
    let lines = futures::stream::iter(told.unwrap_or_default()).map(move |event| {
        // The task is, from now on, what the event tells.
        if let Some(task) = event.object.clone().and_then(|object| serde_json::from_value(object).ok()) {
            script.lock().expect("not poisoned").task = Some(task);
        }
        Ok::<_, std::convert::Infallible>(Sse::default().json_data(&event).expect("JSON"))
    });
    let rest = futures::stream::pending().take(if stays { 1 } else { 0 });
    SseStream::new(begin.chain(lines).chain(rest)).into_response()
}

async fn console(upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(|mut socket| async move {
        let _ = socket.send(Message::Binary("\u{1b}[1mlogin: ".into())).await;
        while let Some(Ok(message)) = socket.next().await {
            if let Message::Binary(typed) = message {
                let _ = socket.send(Message::Binary(typed.to_ascii_uppercase().into())).await;
            }
        }
    })
}
