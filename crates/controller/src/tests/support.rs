//! A controller in a directory of its own, its administrator, and agents that do what a test says.

use std::time::Duration;

use godwit_api::client::{Client, ClientError, Endpoint};
use godwit_api::v1::{self as api, TaskState};
use godwit_link::certificate::CONTROLLER;
use godwit_link::v1::{self, agent_message::Body, command::Action, controller_message, link_client::LinkClient};
use godwit_link::{PROTOCOL, encode};
use godwit_model::{
    Boot, Bytes, BytesPerSec, ErrorCode, Estimate, HostFacts, HostLoad, ImportFormat, MigrationFigures, MigrationForecast,
    MigrationSettings, Millis, Name, NetworkKind, NicSpec, Refusal, RunState, TaskId, UnixMillis, VmId, VmSpec,
};
use rcgen::{CertificateParams, KeyPair};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};

use crate::checks::tests::{facts, load};
use crate::rows::VmRow;
use crate::{Controller, ServeOptions, clock};

/// Nothing here takes this long.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn name(text: &str) -> Name {
    Name::new(text).expect("name")
}

/// Fails a test that waits for what does not come.
pub(super) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it never happened")
}

/// A controller that can be stopped and started again.
pub(super) struct Cluster {
    pub(super) dir: tempfile::TempDir,
    pub(super) options: ServeOptions,
    running: Option<Controller>,
}

impl Cluster {
    pub(super) async fn new() -> Self {
        Self::with(|_| {}).await
    }

    pub(super) async fn with(change: impl FnOnce(&mut ServeOptions)) -> Self {
        let dir = tempfile::tempdir().expect("dir");
        let mut options = ServeOptions::new(dir.path().join("data"));
        options.api_listen = ([127, 0, 0, 1], 0).into();
        options.link_listen = ([127, 0, 0, 1], 0).into();
        change(&mut options);
        let mut cluster = Self { dir, options, running: None };
        cluster.start().await;
        cluster
    }

    pub(super) async fn start(&mut self) {
        self.running = Some(Controller::start(self.options.clone()).await.expect("the controller starts"));
    }

    /// Ends it where it is; only the store remains.
    pub(super) async fn stop(&mut self) {
        self.running.take().expect("it runs").stop().await;
    }

    fn controller(&self) -> &Controller {
        self.running.as_ref().expect("it runs")
    }

    /// Has it look at its schedules, by the time that it is told now.
    pub(super) fn look_at_schedules(&self) {
        self.controller().look_at_schedules();
    }

    pub(super) fn read(&self, file: &str) -> String {
        std::fs::read_to_string(self.options.data_dir.join(file)).expect(file)
    }

    pub(super) fn client_with(&self, token: &str) -> Client {
        let url = format!("https://{}", self.controller().api_address());
        Client::new(Endpoint { url, token: token.into(), authority: Some(self.read("ca.pem")) }).expect("client")
    }

    pub(super) fn admin(&self) -> Client {
        self.client_with(self.read("admin.token").trim())
    }

    /// A client of a team of its own.
    pub(super) async fn member(&self, team: &str, role: api::Role) -> Client {
        let admin = self.admin();
        match admin.create_team(&api::TeamCreate { name: name(team), share_memory: false }).await {
            Err(error) if error.refusal().code != ErrorCode::NameTaken => panic!("{error}"),
            _ => {}
        }
        let request = api::TokenCreate { team: name(team), role, description: String::new() };
        self.client_with(&admin.create_token(&request).await.expect("token").secret)
    }

    pub(super) async fn channel(&self, identity: Option<(&str, &str)>) -> Result<Channel, tonic::transport::Error> {
        self.channel_by(&self.read("ca.pem"), identity).await
    }

    pub(super) async fn channel_by(
        &self,
        authority: &str,
        identity: Option<(&str, &str)>,
    ) -> Result<Channel, tonic::transport::Error> {
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authority)).domain_name(CONTROLLER);
        if let Some((certificate, key)) = identity {
            tls = tls.identity(Identity::from_pem(certificate, key));
        }
        let url = format!("https://{}", self.controller().link_address());
        Channel::from_shared(url).expect("url").tls_config(tls)?.connect().await
    }

    pub(super) async fn join_token(&self, host: &str) -> String {
        let request = api::JoinTokenCreate { host: name(host), lifetime: None, rejoin: false };
        self.admin().create_join_token(&request).await.expect("token").token
    }

    /// A host that has joined, not connected yet.
    pub(super) async fn host(&self, host: &str) -> Host {
        let token = self.join_token(host).await;
        let (key, request) = signing_request();
        let mut client = LinkClient::new(self.channel(None).await.expect("channel"));
        let join = v1::JoinRequest { token, host: host.into(), address: address_of(host), signing_request: request };
        let reply = client.join(join).await.expect("joined").into_inner();
        Host {
            name: name(host),
            key: key.serialize_pem(),
            certificate: reply.certificate,
            facts: facts(),
            load: load(Bytes(8 << 30)),
            migration_address: String::new(),
            told: (0, String::new(), 0),
            members: vec![],
        }
    }

    /// A host that has joined and is connected.
    pub(super) async fn agent(&self, host: &str) -> (Host, Agent) {
        let host = self.host(host).await;
        let agent = self.connect(&host, vec![]).await;
        (host, agent)
    }

    pub(super) async fn connect(&self, host: &Host, vms: Vec<v1::VmReport>) -> Agent {
        self.try_connect(host, vms).await.expect("stream")
    }

    /// As `connect`, or why not.
    pub(super) async fn try_connect(&self, host: &Host, vms: Vec<v1::VmReport>) -> Result<Agent, tonic::Status> {
        let channel = self.channel(Some((&host.certificate, &host.key))).await.expect("channel");
        let mut client = LinkClient::new(channel);
        let (sender, receiver) = mpsc::channel(64);
        let hello = v1::Hello {
            protocol: PROTOCOL,
            address: address_of(host.name.as_str()),
            facts: encode(&host.facts),
            load: encode(&host.load),
            vms,
            epoch: host.told.0,
            migration_address: host.migration_address.clone(),
            epoch_id: host.told.1.clone(),
            mark: host.told.2,
            members: host.members.clone(),
        };
        sender.send(message(Body::Hello(hello))).await.expect("queue");
        let inbound = client.attend(ReceiverStream::new(receiver)).await.expect("attends").into_inner();
        let (heart, beat) = (sender.clone(), encode(&host.load));
        let heartbeat = tokio::spawn(async move {
            let mut period = tokio::time::interval(Duration::from_millis(300));
            loop {
                period.tick().await;
                if heart
                    .send(message(Body::Heartbeat(v1::Heartbeat { load: beat.clone(), unix_ms: clock::now().0 })))
                    .await
                    .is_err()
                {
                    return;
                }
            }
        });
        let mut agent =
            Agent { host: host.name.clone(), client, sender, inbound, heartbeat, fleet: None, peers: vec![], welcome: None };
        let first = soon(agent.inbound.message()).await?.expect("message").body;
        let Some(controller_message::Body::Welcome(welcome)) = first else { panic!("{first:?}") };
        agent.welcome = Some(welcome);
        Ok(agent)
    }

    /// Imports what a VM boots, and creates one of `memory`.
    pub(super) async fn create_vm(&self, vm: &str, memory: Bytes) {
        let admin = self.admin();
        if admin.image(&name("linux")).await.is_err() {
            let kernel = futures::stream::iter([Ok(kernel().into())]);
            admin.import_image(&name("linux"), ImportFormat::Kernel, kernel).await.expect("imported");
        }
        admin.create_vm(&api::VmCreate { name: name(vm), spec: spec(memory), golden: None }).await.expect("created");
    }

    /// A VM that runs on the agent's host.
    pub(super) async fn running_vm(&self, vm: &str, agent: &mut Agent) {
        self.create_vm(vm, Bytes::mib(512)).await;
        self.start_vm(vm, agent).await;
    }

    /// Starts a VM on the agent's host.
    pub(super) async fn start_vm(&self, vm: &str, agent: &mut Agent) {
        let start = api::VmStart { host: Some(agent.host.clone()) };
        let task = self.admin().start_vm(&name(vm), &start).await.expect("accepted");
        let command = agent.command().await;
        assert!(matches!(command.action, Some(Action::Start(_))), "{command:?}");
        agent.done(&command, 0).await;
        assert_eq!(self.ended(task.id).await.state, TaskState::Done);
    }

    pub(super) async fn migrate(&self, vm: &str, to: &str) -> Result<api::Task, ClientError> {
        let request =
            api::VmMigrate { host: name(to), policy: MigrationSettings::default(), dry_run: false, reason: Some("test".into()) };
        self.admin().migrate_vm(&name(vm), &request).await
    }

    /// The task once `until` holds.
    pub(super) async fn task_when(&self, task: TaskId, until: impl Fn(&api::Task) -> bool) -> api::Task {
        let admin = self.admin();
        soon(async {
            loop {
                let now = admin.task(task).await.expect("task");
                if until(&now) {
                    return now;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
    }

    pub(super) async fn ended(&self, task: TaskId) -> api::Task {
        self.task_when(task, |task| task.state.ended()).await
    }

    /// A VM, without what changes though nobody changes it.
    pub(super) async fn vm(&self, vm: &str) -> api::Vm {
        without_migratable(self.admin().vm(&name(vm)).await.expect("vm"))
    }

    pub(super) async fn vm_when(&self, vm: &str, until: impl Fn(&api::Vm) -> bool) -> api::Vm {
        soon(async {
            loop {
                let now = self.admin().vm(&name(vm)).await.expect("vm");
                if until(&now) {
                    return without_migratable(now);
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
    }

    pub(super) async fn connected(&self, host: &str, connected: bool) {
        soon(async {
            while self.admin().host(&name(host)).await.expect("host").connected != connected {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }
}

pub(super) fn address_of(host: &str) -> String {
    format!("10.0.0.{}", host.trim_start_matches('h'))
}

/// A key and a request for a certificate, which asks for more than it gets.
pub(super) fn signing_request() -> (KeyPair, String) {
    let key = KeyPair::generate().expect("key");
    let params = CertificateParams::new(vec!["h9.host.godwit".to_owned()]).expect("params");
    let pem = params.serialize_request(&key).expect("request").pem().expect("pem");
    (key, pem)
}

/// Enough of a bzImage.
pub(super) fn kernel() -> Vec<u8> {
    let mut kernel = vec![0_u8; 4_096];
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    kernel
}

pub(crate) fn spec(memory: Bytes) -> VmSpec {
    let boot = Boot::Kernel { kernel: name("linux"), initrd: None, cmdline: "console=ttyS0".into() };
    VmSpec { nics: vec![NicSpec::new(name("default"))], ..VmSpec::new(2, memory, boot) }
}

/// Asks for an overlay.
pub(super) fn network(text: &str) -> api::NetworkCreate {
    api::NetworkCreate { name: name(text), kind: NetworkKind::default(), mtu: None }
}

pub(super) fn message(body: Body) -> v1::AgentMessage {
    v1::AgentMessage { body: Some(body) }
}

pub(super) fn code<T: std::fmt::Debug>(result: Result<T, ClientError>) -> ErrorCode {
    match result {
        Err(ClientError::Refused(refusal)) => refusal.code,
        other => panic!("not a refusal: {other:?}"),
    }
}

/// A host that has joined.
pub(super) struct Host {
    pub(super) name: Name,
    pub(super) key: String,
    pub(super) certificate: String,
    pub(super) facts: HostFacts,
    pub(super) load: HostLoad,
    pub(super) migration_address: String,
    /// Epoch, its id and the mark that it was told last.
    pub(super) told: (u64, String, u64),
    /// Hosts that it was told of.
    pub(super) members: Vec<String>,
}

/// An agent that does what a test says.
pub(super) struct Agent {
    pub(super) host: Name,
    pub(super) client: LinkClient<Channel>,
    sender: mpsc::Sender<v1::AgentMessage>,
    inbound: tonic::Streaming<v1::ControllerMessage>,
    heartbeat: tokio::task::JoinHandle<()>,
    pub(super) fleet: Option<v1::Fleet>,
    pub(super) peers: Vec<v1::Peer>,
    welcome: Option<v1::Welcome>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.heartbeat.abort();
    }
}

impl Agent {
    /// What it would remember of this controller, once it has heard of as many grants as `mark`.
    pub(super) async fn told(&mut self, mark: u64) -> (u64, String, u64) {
        self.fleet_when(|fleet| fleet.mark > mark).await;
        let welcome = self.welcome.clone().expect("it was welcome");
        (welcome.epoch, welcome.epoch_id, self.fleet.as_ref().map_or(0, |fleet| fleet.mark))
    }

    /// The next message but fleets and peers, which are kept; nothing when the stream has ended.
    pub(super) async fn next(&mut self) -> Option<controller_message::Body> {
        loop {
            match soon(self.inbound.message()).await.ok()??.body? {
                controller_message::Body::Fleet(fleet) => self.fleet = Some(fleet),
                controller_message::Body::Peer(peer) => self.peers.push(peer),
                body => return Some(body),
            }
        }
    }

    pub(super) async fn command(&mut self) -> v1::Command {
        match self.next().await {
            Some(controller_message::Body::Command(command)) => command,
            other => panic!("{}: expected a command, not {other:?}", self.host),
        }
    }

    /// Reads until a fleet holds what is wanted.
    pub(super) async fn fleet_when(&mut self, until: impl Fn(&v1::Fleet) -> bool) {
        while !self.fleet.as_ref().is_some_and(&until) {
            match soon(self.inbound.message()).await.expect("stream").expect("message").body {
                Some(controller_message::Body::Fleet(fleet)) => self.fleet = Some(fleet),
                other => panic!("{}: expected a fleet, not {other:?}", self.host),
            }
        }
    }

    pub(super) async fn peer(&mut self) -> v1::Peer {
        loop {
            match soon(self.inbound.message()).await.expect("stream").expect("message").body {
                Some(controller_message::Body::Fleet(fleet)) => self.fleet = Some(fleet),
                Some(controller_message::Body::Peer(peer)) => return peer,
                other => panic!("{}: expected a peer's word, not {other:?}", self.host),
            }
        }
    }

    pub(super) fn heartbeat_task(&self) -> &tokio::task::JoinHandle<()> {
        &self.heartbeat
    }

    pub(super) async fn send(&self, body: Body) {
        self.sender.send(message(body)).await.expect("the stream takes it");
    }

    pub(super) async fn done(&self, command: &v1::Command, carry_port: u32) {
        self.send(Body::Reply(v1::CommandReply { id: command.id, refusal: None, carry_port, result: vec![] })).await;
    }

    /// As `done`, with something to tell.
    pub(super) async fn tell<T: serde::Serialize>(&self, command: &v1::Command, result: &T) {
        self.send(Body::Reply(v1::CommandReply { id: command.id, refusal: None, carry_port: 0, result: encode(result) })).await;
    }

    pub(super) async fn refuse(&self, command: &v1::Command, code: ErrorCode) {
        let refusal = Some((&Refusal::new(code, "the agent says no")).into());
        self.send(Body::Reply(v1::CommandReply { id: command.id, refusal, carry_port: 0, result: vec![] })).await;
    }

    /// Says how a migration ended, and waits until that is stored.
    pub(super) async fn ended(&mut self, ended: v1::MigrationEnded) {
        let expected = v1::EndedAck { task: ended.task.clone(), source: ended.source, generation: ended.generation };
        self.send(Body::Ended(ended)).await;
        match self.next().await {
            Some(controller_message::Body::EndedAck(ack)) => assert_eq!(ack, expected),
            other => panic!("{}: expected an acknowledgement, not {other:?}", self.host),
        }
    }
}

/// What a host says of a VM.
pub(super) fn report(vm: &api::Vm, generation: u64, state: RunState, holding: v1::Holding) -> v1::VmReport {
    v1::VmReport {
        vm: vm.id.to_string(),
        generation,
        state: v1::RunState::from(state).into(),
        holding: holding.into(),
        detail: String::new(),
        ended_with_host: false,
        blocked: vec![],
    }
}

/// What each migration of these tests costs.
pub(super) const FIGURES: MigrationFigures = MigrationFigures {
    total: Millis(7_000),
    blackout: Millis(84),
    predicted_blackout: Some(Millis(60)),
    wire_bytes: Bytes::mib(1),
    ram_bytes: Bytes::mib(2),
    rounds: 3,
    disk_bytes: Bytes(0),
    disk_time: Millis(0),
    left: Bytes(0),
    forecast: Some(MigrationForecast {
        memory: Bytes::mib(2),
        disks: Bytes(0),
        dirty_rate: BytesPerSec(1),
        rate: BytesPerSec(1),
        total: Estimate { least: Millis(3_000), expected: Millis(3_500), most: Millis(4_000) },
        blackout: Estimate { least: Millis(50), expected: Millis(60), most: Millis(300) },
        wire_bytes: Estimate { least: Bytes(1), expected: Bytes(2), most: Bytes(3) },
        needs: None,
        learned_from: 0,
    }),
};

/// How a migration ended.
pub(super) fn ended(
    task: &api::Task,
    vm: &api::Vm,
    generation: u64,
    source: bool,
    reason: Option<ErrorCode>,
) -> v1::MigrationEnded {
    v1::MigrationEnded {
        task: task.id.to_string(),
        vm: vm.id.to_string(),
        generation,
        source,
        moved: reason.is_none(),
        reason: reason.map(|code| (&Refusal::new(code, "the agent says why")).into()),
        figures: if source && reason.is_none() { encode(&FIGURES) } else { vec![] },
    }
}

/// A VM without what changes though nobody changes it.
pub(super) fn without_migratable(mut vm: api::Vm) -> api::Vm {
    vm.status.migratable = None;
    vm
}

/// A VM that was created and never started.
pub(crate) fn vm_row() -> VmRow {
    VmRow::new(VmId::new(uuid::Uuid::nil()), name("web1"), name("default"), spec(Bytes::mib(64)), UnixMillis(0))
}
