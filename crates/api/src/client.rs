//! The typed client: thin, one method per operation, errors as [`Refusal`] wherever the controller said why.

use std::time::Duration;

use bytes::Bytes;
use eventsource_stream::Eventsource;
use futures::{Stream, StreamExt};
use godwit_model::guest::EXEC_TIMEOUT;
use godwit_model::{BytesPerSec, ErrorCode, ExecOutcome, ImportFormat, Name, Refusal, Retry, TaskId, TokenId, VaultPlan, VmSpec};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::{Method, RequestBuilder, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::v1;

mod console;

pub use console::Console;

/// Where a controller is and who asks.
#[derive(Clone)]
pub struct Endpoint {
    /// `https://host:port`, or `http://` on loopback.
    pub url: String,
    /// API token.
    pub token: String,
    /// Certificate of the cluster's authority, PEM.
    pub authority: Option<String>,
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The controller refused, and said why.
    #[error("{0}")]
    Refused(Refusal),
    /// The controller could not be reached, or broke off.
    #[error("the controller at {url} cannot be reached")]
    Unreachable {
        /// Its address.
        url: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Something answered that is not a controller of this version.
    #[error("{url} answered {status} with something that is not the API's")]
    Foreign {
        /// The address asked.
        url: String,
        /// What it answered.
        status: StatusCode,
    },
    /// The endpoint itself cannot be used.
    #[error("the endpoint cannot be used: {what}")]
    Endpoint {
        /// What is wrong with it.
        what: String,
    },
}

impl ClientError {
    /// The refusal to show, whatever went wrong.
    #[must_use]
    pub fn refusal(&self) -> Refusal {
        match self {
            Self::Refused(refusal) => refusal.clone(),
            Self::Unreachable { source, .. } => {
                let mut cause: &dyn std::error::Error = source.as_ref();
                while let Some(deeper) = cause.source() {
                    cause = deeper;
                }
                Refusal::new(ErrorCode::HostDown, format!("{self}: {cause}"))
                    .hint("check that `godwit serve` runs and that the address, the authority (`--ca-file`) and the network are right")
                    .retry(Retry::Unknown)
            }
            Self::Foreign { .. } => {
                Refusal::new(ErrorCode::Internal, self.to_string()).hint("check the address").retry(Retry::Unknown)
            }
            Self::Endpoint { .. } => Refusal::new(ErrorCode::BadRequest, self.to_string()),
        }
    }
}

/// A client of one controller.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    endpoint: Endpoint,
}

/// What an import answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Imported {
    /// The image is there.
    Image(v1::Image),
    /// A task makes it of what was sent.
    Task(Box<v1::Task>),
}
/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

type Result<T> = std::result::Result<T, ClientError>;

/// A path segment, escaped.
fn segment(text: &impl ToString) -> String {
    utf8_percent_encode(&text.to_string(), NON_ALPHANUMERIC).to_string()
}

fn at(host: Option<&Name>) -> String {
    host.map(|host| format!("?host={}", segment(host))).unwrap_or_default()
}

impl Client {
    /// A client of `endpoint`. A process-wide rustls provider must be installed.
    ///
    /// # Errors
    /// [`ClientError::Endpoint`] if the authority is no certificate.
    pub fn new(endpoint: Endpoint) -> Result<Self> {
        let mut builder = reqwest::Client::builder().connect_timeout(Duration::from_secs(10)).no_proxy();
        if let Some(authority) = &endpoint.authority {
            let certificate = reqwest::Certificate::from_pem(authority.as_bytes())
                .map_err(|source| ClientError::Endpoint { what: format!("its authority is not a certificate: {source}") })?;
            builder = builder.tls_certs_only([certificate]);
        }
        let http = builder.build().map_err(|source| ClientError::Endpoint { what: source.to_string() })?;
        Ok(Self { http, endpoint })
    }

    /// The endpoint this client talks to.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// A request to `path`, with credentials. Tests use it to send what the typed methods cannot.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}/v1{path}", self.endpoint.url)).bearer_auth(&self.endpoint.token)
    }

    fn unreachable(&self, source: impl std::error::Error + Send + Sync + 'static) -> ClientError {
        ClientError::Unreachable { url: self.endpoint.url.clone(), source: Box::new(source) }
    }

    async fn send(&self, request: RequestBuilder) -> Result<reqwest::Response> {
        let unreachable = |source| self.unreachable(source);
        let response = request.send().await.map_err(unreachable)?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = response.bytes().await.map_err(unreachable)?;
        match serde_json::from_slice::<Refusal>(&body) {
            Ok(refusal) => Err(ClientError::Refused(refusal)),
            Err(_) => Err(ClientError::Foreign { url: self.endpoint.url.clone(), status }),
        }
    }

    async fn json<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T> {
        let response = self.send(request).await?;
        let status = response.status();
        let body = response.bytes().await.map_err(|source| self.unreachable(source))?;
        serde_json::from_slice(&body).map_err(|_| ClientError::Foreign { url: self.endpoint.url.clone(), status })
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.json(self.request(Method::GET, path).timeout(PATIENCE)).await
    }

    async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        self.json(self.request(Method::POST, path).json(body).timeout(PATIENCE)).await
    }

    /// Every item of a paged list.
    async fn list<T: DeserializeOwned>(&self, path: &str) -> Result<Vec<T>> {
        let mut items = Vec::new();
        let mut after: Option<String> = None;
        let begin = if path.contains('?') { '&' } else { '?' };
        loop {
            let query = after.as_ref().map(|after| format!("{begin}after={}", segment(after))).unwrap_or_default();
            let page: v1::Page<T> = self.get(&format!("{path}{query}")).await?;
            items.extend(page.items);
            match page.next {
                Some(next) => after = Some(next),
                None => return Ok(items),
            }
        }
    }

    /// Whether the controller serves; needs no credentials.
    ///
    /// # Errors
    /// [`ClientError`], as every method here.
    pub async fn health(&self) -> Result<v1::Health> {
        self.get("/health").await
    }

    /// Every host.
    pub async fn hosts(&self) -> Result<Vec<v1::Host>> {
        self.list("/hosts").await
    }

    /// One host.
    pub async fn host(&self, host: &Name) -> Result<v1::Host> {
        self.get(&format!("/hosts/{}", segment(host))).await
    }

    /// Changes a host.
    pub async fn set_host(&self, host: &Name, request: &v1::HostSet) -> Result<v1::Host> {
        self.json(self.request(Method::PATCH, &format!("/hosts/{}", segment(host))).json(request)).await
    }

    /// Removes a host; its certificate is refused from then on. With `force` also one with VMs, which are not taken for dead.
    pub async fn delete_host(&self, host: &Name, force: bool) -> Result<()> {
        self.send(self.request(Method::DELETE, &format!("/hosts/{}?force={force}", segment(host)))).await.map(|_| ())
    }

    /// A one-time token with which `host` can join.
    pub async fn create_join_token(&self, request: &v1::JoinTokenCreate) -> Result<v1::JoinTokenCreated> {
        self.post("/join-tokens", request).await
    }

    /// What the CPUs of the hosts that are connected have in common, one for each accelerator.
    pub async fn cpu_baseline(&self) -> Result<Vec<v1::CpuBaseline>> {
        self.get("/cluster/cpu-baseline").await
    }

    /// Every pool.
    pub async fn pools(&self) -> Result<Vec<v1::Pool>> {
        self.list("/pools").await
    }

    /// One pool.
    pub async fn pool(&self, pool: &Name) -> Result<v1::Pool> {
        self.get(&format!("/pools/{}", segment(pool))).await
    }

    /// Every network.
    pub async fn networks(&self) -> Result<Vec<v1::Network>> {
        self.list("/networks").await
    }

    /// One network.
    pub async fn network(&self, network: &Name) -> Result<v1::Network> {
        self.get(&format!("/networks/{}", segment(network))).await
    }

    /// Creates a network.
    pub async fn create_network(&self, request: &v1::NetworkCreate) -> Result<v1::Network> {
        self.post("/networks", request).await
    }

    /// Changes a network.
    pub async fn set_network(&self, network: &Name, request: &v1::NetworkSet) -> Result<v1::Network> {
        self.json(self.request(Method::PATCH, &format!("/networks/{}", segment(network))).json(request)).await
    }

    /// Deletes a network that no VM has an interface on.
    pub async fn delete_network(&self, network: &Name) -> Result<()> {
        self.send(self.request(Method::DELETE, &format!("/networks/{}", segment(network)))).await.map(|_| ())
    }

    /// Every policy of the team.
    pub async fn policies(&self) -> Result<Vec<v1::Policy>> {
        self.list("/policies").await
    }

    /// One policy.
    pub async fn policy(&self, policy: &Name) -> Result<v1::Policy> {
        self.get(&format!("/policies/{}", segment(policy))).await
    }

    /// Creates a policy.
    pub async fn create_policy(&self, request: &v1::PolicyCreate) -> Result<v1::Policy> {
        self.post("/policies", request).await
    }

    /// Changes a policy that is still at `revision`.
    pub async fn set_policy(&self, policy: &Name, request: &v1::PolicySet, revision: u64) -> Result<v1::Policy> {
        let at = self.request(Method::PATCH, &format!("/policies/{}", segment(policy))).header("if-match", revision.to_string());
        self.json(at.json(request)).await
    }

    /// Deletes a policy.
    pub async fn delete_policy(&self, policy: &Name) -> Result<()> {
        self.send(self.request(Method::DELETE, &format!("/policies/{}", segment(policy)))).await.map(|_| ())
    }

    /// Every schedule of the team.
    pub async fn schedules(&self) -> Result<Vec<v1::Schedule>> {
        self.list("/schedules").await
    }

    /// One schedule.
    pub async fn schedule(&self, schedule: &Name) -> Result<v1::Schedule> {
        self.get(&format!("/schedules/{}", segment(schedule))).await
    }

    /// How a schedule stands with each of its VMs.
    pub async fn schedule_status(&self, schedule: &Name) -> Result<v1::ScheduleStatus> {
        self.get(&format!("/schedules/{}/status", segment(schedule))).await
    }

    /// Creates a schedule.
    pub async fn create_schedule(&self, request: &v1::ScheduleCreate) -> Result<v1::Schedule> {
        self.post("/schedules", request).await
    }

    /// Changes a schedule that is still at `revision`.
    pub async fn set_schedule(&self, schedule: &Name, request: &v1::ScheduleSet, revision: u64) -> Result<v1::Schedule> {
        let at = self.request(Method::PATCH, &format!("/schedules/{}", segment(schedule))).header("if-match", revision.to_string());
        self.json(at.json(request)).await
    }

    /// Deletes a schedule; its snapshots stay.
    pub async fn delete_schedule(&self, schedule: &Name) -> Result<()> {
        self.send(self.request(Method::DELETE, &format!("/schedules/{}", segment(schedule)))).await.map(|_| ())
    }

    /// Has a schedule run now.
    pub async fn run_schedule(&self, schedule: &Name, request: &v1::ScheduleRun) -> Result<v1::ScheduleStatus> {
        self.post(&format!("/schedules/{}/run", segment(schedule)), request).await
    }

    /// Every snapshot of the team, or those of one VM.
    pub async fn snapshots(&self, vm: Option<&Name>) -> Result<Vec<v1::Snapshot>> {
        let query = vm.map(|vm| format!("?vm={}", segment(vm))).unwrap_or_default();
        self.list(&format!("/snapshots{query}")).await
    }

    /// One snapshot.
    pub async fn snapshot(&self, snapshot: &Name) -> Result<v1::Snapshot> {
        self.get(&format!("/snapshots/{}", segment(snapshot))).await
    }

    /// Takes a snapshot of a VM.
    pub async fn create_snapshot(&self, request: &v1::SnapshotCreate) -> Result<v1::Task> {
        self.post("/snapshots", request).await
    }

    /// Changes a snapshot.
    pub async fn set_snapshot(&self, snapshot: &Name, request: &v1::SnapshotSet) -> Result<v1::Snapshot> {
        self.json(self.request(Method::PATCH, &format!("/snapshots/{}", segment(snapshot))).json(request)).await
    }

    /// Makes a VM what it was in a snapshot.
    pub async fn rollback_snapshot(&self, snapshot: &Name, request: &v1::SnapshotRollback) -> Result<v1::Task> {
        self.post(&format!("/snapshots/{}/rollback", segment(snapshot)), request).await
    }

    /// Makes a new VM that begins from a snapshot.
    pub async fn clone_snapshot(&self, snapshot: &Name, request: &v1::SnapshotClone) -> Result<v1::Task> {
        self.post(&format!("/snapshots/{}/clone", segment(snapshot)), request).await
    }

    /// Writes a snapshot as files.
    pub async fn export_snapshot(&self, snapshot: &Name, request: &v1::SnapshotExportRequest) -> Result<v1::Task> {
        self.post(&format!("/snapshots/{}/export", segment(snapshot)), request).await
    }

    /// Makes files a snapshot.
    pub async fn import_snapshot(&self, snapshot: &Name, request: &v1::SnapshotImport) -> Result<v1::Task> {
        self.post(&format!("/snapshots/{}/import", segment(snapshot)), request).await
    }

    /// Deletes a snapshot.
    pub async fn delete_snapshot(&self, snapshot: &Name) -> Result<()> {
        let request = self.request(Method::DELETE, &format!("/snapshots/{}", segment(snapshot)));
        self.send(request.timeout(PATIENCE)).await.map(|_| ())
    }

    /// Every vault of the team.
    pub async fn vaults(&self) -> Result<Vec<v1::Vault>> {
        self.list("/vaults").await
    }

    /// Reads all of a vault, and names what is damaged; `host` tells pools of one name apart.
    pub async fn verify_vault(&self, pool: &Name, host: Option<&Name>) -> Result<v1::Task> {
        self.post(&format!("/vaults/{}/verify{}", segment(pool), at(host)), &()).await
    }

    /// Removes what no snapshot refers to from a vault, or says what that would be.
    pub async fn prune_vault(&self, pool: &Name, host: Option<&Name>, request: &v1::VaultPrune) -> Result<VaultPlan> {
        self.post(&format!("/vaults/{}/prune{}", segment(pool), at(host)), request).await
    }

    /// Every image.
    pub async fn images(&self) -> Result<Vec<v1::Image>> {
        self.list("/images").await
    }

    /// One image.
    pub async fn image(&self, image: &Name) -> Result<v1::Image> {
        self.get(&format!("/images/{}", segment(image))).await
    }

    /// Imports an image from a stream of its bytes.
    pub async fn import_image<S>(&self, image: &Name, kind: ImportFormat, content: S) -> Result<Imported>
    where
        S: Stream<Item = std::io::Result<Bytes>> + Send + Sync + 'static,
    {
        let kind = serde_json::to_value(kind).ok().and_then(|kind| kind.as_str().map(str::to_owned)).unwrap_or_default();
        let request = self
            .request(Method::PUT, &format!("/images/{}?kind={kind}", segment(image)))
            .header("content-type", "application/octet-stream")
            .body(reqwest::Body::wrap_stream(content));
        let response = self.send(request).await?;
        let status = response.status();
        let read = if status == StatusCode::ACCEPTED {
            response.json().await.map(|task| Imported::Task(Box::new(task)))
        } else {
            response.json().await.map(Imported::Image)
        };
        read.map_err(|_| ClientError::Foreign { url: self.endpoint.url.clone(), status })
    }

    /// Lets the controller fetch an image.
    pub async fn fetch_image(&self, image: &Name, request: &v1::ImageFetch) -> Result<v1::Task> {
        self.post(&format!("/images/{}/fetch", segment(image)), request).await
    }

    /// The content of an image in a format (`stored`, `qcow2`, `ova`), with its length. It may take long until it begins.
    pub async fn export_image(
        &self,
        image: &Name,
        format: &str,
    ) -> Result<(Option<u64>, impl Stream<Item = Result<Bytes>> + Send + use<>)> {
        let path = format!("/images/{}/content?format={}", segment(image), segment(&format));
        let response = self.send(self.request(Method::GET, &path)).await?;
        let (length, url) = (response.content_length(), self.endpoint.url.clone());
        let broken = move |source| ClientError::Unreachable { url: url.clone(), source: Box::new(source) };
        Ok((length, response.bytes_stream().map(move |chunk| chunk.map_err(&broken))))
    }

    /// Deletes an image.
    pub async fn delete_image(&self, image: &Name) -> Result<()> {
        let request = self.request(Method::DELETE, &format!("/images/{}", segment(image)));
        self.send(request).await.map(|_| ())
    }

    /// Every VM.
    pub async fn vms(&self) -> Result<Vec<v1::Vm>> {
        self.list("/vms").await
    }

    /// One VM.
    pub async fn vm(&self, vm: &Name) -> Result<v1::Vm> {
        self.get(&format!("/vms/{}", segment(vm))).await
    }

    /// Creates a VM; it is not started.
    pub async fn create_vm(&self, request: &v1::VmCreate) -> Result<v1::Vm> {
        self.post("/vms", request).await
    }

    /// Starts a VM.
    pub async fn start_vm(&self, vm: &Name, request: &v1::VmStart) -> Result<v1::Task> {
        self.post(&format!("/vms/{}/start", segment(vm)), request).await
    }

    /// Asks the guest to power off.
    pub async fn stop_vm(&self, vm: &Name, request: &v1::VmStop) -> Result<v1::Task> {
        self.post(&format!("/vms/{}/stop", segment(vm)), request).await
    }

    /// Ends a VM without asking it.
    pub async fn kill_vm(&self, vm: &Name) -> Result<v1::Task> {
        self.post(&format!("/vms/{}/kill", segment(vm)), &()).await
    }

    /// Lets a VM stand still.
    pub async fn pause_vm(&self, vm: &Name) -> Result<v1::Task> {
        self.post(&format!("/vms/{}/pause", segment(vm)), &()).await
    }

    /// Lets a paused VM run on.
    pub async fn unpause_vm(&self, vm: &Name) -> Result<v1::Task> {
        self.post(&format!("/vms/{}/unpause", segment(vm)), &()).await
    }

    /// Keeps a VM with its memory, and ends QEMU.
    pub async fn suspend_vm(&self, vm: &Name) -> Result<v1::Task> {
        self.post(&format!("/vms/{}/suspend", segment(vm)), &()).await
    }

    /// Lets a suspended VM go on.
    pub async fn unsuspend_vm(&self, vm: &Name, request: &v1::VmStart) -> Result<v1::Task> {
        self.post(&format!("/vms/{}/unsuspend", segment(vm)), request).await
    }

    /// The generations of a VM.
    pub async fn vm_history(&self, vm: &Name) -> Result<v1::VmHistory> {
        self.get(&format!("/vms/{}/history", segment(vm))).await
    }

    /// Whether a running VM could move now, to each connected host or to one.
    pub async fn check_vm(&self, vm: &Name, to: Option<&Name>) -> Result<v1::VmCheck> {
        let query = to.map(|to| format!("?to={}", segment(to))).unwrap_or_default();
        self.get(&format!("/vms/{}/check{query}", segment(vm))).await
    }

    /// Moves a running VM. With `dry_run` the task is only described: it is `done` and was never recorded.
    pub async fn migrate_vm(&self, vm: &Name, request: &v1::VmMigrate) -> Result<v1::Task> {
        self.post(&format!("/vms/{}/migrate", segment(vm)), request).await
    }

    /// Changes what a VM is made of, if it is still at `revision`.
    pub async fn set_vm(&self, vm: &Name, spec: &VmSpec, revision: Option<u64>) -> Result<v1::Task> {
        let request = self.request(Method::PUT, &format!("/vms/{}/spec", segment(vm))).json(spec);
        let request = match revision {
            Some(revision) => request.header("if-match", revision.to_string()),
            None => request,
        };
        self.json(request).await
    }

    /// Runs a program in the guest and waits for its end.
    pub async fn exec_vm(&self, vm: &Name, request: &v1::VmExec) -> Result<ExecOutcome> {
        // The controller gives up before this side does.
        let waits = Duration::from_millis(request.timeout.unwrap_or(EXEC_TIMEOUT).get()).saturating_add(Duration::from_secs(60));
        let request = self.request(Method::POST, &format!("/vms/{}/exec", segment(vm))).json(request);
        self.json(request.timeout(waits)).await
    }

    /// Deletes a stopped VM.
    pub async fn delete_vm(&self, vm: &Name, request: &v1::VmDelete) -> Result<v1::Task> {
        let request = self.request(Method::DELETE, &format!("/vms/{}?volumes={}", segment(vm), request.volumes));
        self.json(request.timeout(PATIENCE)).await
    }

    /// The newest tasks first.
    pub async fn tasks(&self) -> Result<Vec<v1::Task>> {
        self.list("/tasks").await
    }

    /// One task.
    pub async fn task(&self, task: TaskId) -> Result<v1::Task> {
        self.get(&format!("/tasks/{task}")).await
    }

    /// Cancels a task; answers the task as it is then.
    pub async fn cancel_task(&self, task: TaskId) -> Result<v1::Task> {
        self.post(&format!("/tasks/{task}/cancel"), &()).await
    }

    /// Changes what a migration may take of the wire; answers the task as it is then.
    pub async fn set_task_bandwidth(&self, task: TaskId, bandwidth: Option<BytesPerSec>) -> Result<v1::Task> {
        self.post(&format!("/tasks/{task}/bandwidth"), &v1::TaskBandwidth { bandwidth }).await
    }

    /// Has a migration's VM go on at the destination before all of its memory is there; answers the task as it is then.
    pub async fn postcopy_task(&self, task: TaskId) -> Result<v1::Task> {
        self.post(&format!("/tasks/{task}/postcopy"), &()).await
    }

    /// Slows a migration's VM down until it can be moved; answers the task as it is then.
    pub async fn throttle_task(&self, task: TaskId) -> Result<v1::Task> {
        self.post(&format!("/tasks/{task}/throttle"), &()).await
    }

    /// Every team.
    pub async fn teams(&self) -> Result<Vec<v1::Team>> {
        self.list("/teams").await
    }

    /// Creates a team.
    pub async fn create_team(&self, request: &v1::TeamCreate) -> Result<v1::Team> {
        self.post("/teams", request).await
    }

    /// Changes a team.
    pub async fn set_team(&self, team: &Name, request: &v1::TeamSet) -> Result<v1::Team> {
        self.json(self.request(Method::PATCH, &format!("/teams/{}", segment(team))).json(request)).await
    }

    /// Every API token, without secrets.
    pub async fn tokens(&self) -> Result<Vec<v1::Token>> {
        self.list("/tokens").await
    }

    /// Makes an API token.
    pub async fn create_token(&self, request: &v1::TokenCreate) -> Result<v1::TokenCreated> {
        self.post("/tokens", request).await
    }

    /// Deletes an API token.
    pub async fn delete_token(&self, token: TokenId) -> Result<()> {
        self.send(self.request(Method::DELETE, &format!("/tokens/{token}"))).await.map(|_| ())
    }

    /// Changes as they happen, behind `after` if given. The stream ends when the connection does; continue with the last cursor.
    pub async fn events(&self, after: Option<u64>) -> Result<impl Stream<Item = Result<v1::Event>> + Send + use<>> {
        let query = after.map(|after| format!("?after={after}")).unwrap_or_default();
        let request = self.request(Method::GET, &format!("/events{query}")).header("accept", "text/event-stream");
        let response = self.send(request).await?;
        let (url, status) = (self.endpoint.url.clone(), response.status());
        Ok(response.bytes_stream().eventsource().filter_map(move |event| {
            let foreign = || ClientError::Foreign { url: url.clone(), status };
            let answer = match event {
                Ok(event) if event.data.is_empty() => None,
                Ok(event) => Some(serde_json::from_str(&event.data).map_err(|_| foreign())),
                Err(eventsource_stream::EventStreamError::Transport(source)) => {
                    Some(Err(ClientError::Unreachable { url: url.clone(), source: Box::new(source) }))
                }
                Err(_) => Some(Err(foreign())),
            };
            std::future::ready(answer)
        }))
    }
}
