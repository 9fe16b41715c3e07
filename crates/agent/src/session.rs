//! The session with the controller: dialled by the agent, kept for ever, said anew from the beginning each time.
//!
//! Everything that must arrive is a level: the hello carries every VM's report and every move's end that was not acknowledged. A command may
//! come twice, on two sessions; it is carried out once and answered each time.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use godwit_link::status::refusal_of;
use godwit_link::v1::agent_message::Body;
use godwit_link::v1::command::Action;
use godwit_link::v1::controller_message::Body as FromController;
use godwit_link::v1::link_client::LinkClient;
use godwit_link::v1::{self, AgentMessage};
use godwit_link::{MAX_MESSAGE, Malformed, PROTOCOL, convert, decode, encode};
use godwit_model::{
    BytesPerSec, Epoch, ErrorCode, ExecRequest, Generation, Grant, MigrationPolicy, NetworkId, Refusal, TravellingDisk, VlanId,
    VmId, VolumeRef,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Channel;

use crate::check::{self, Finding};
use crate::dial::{self, DialError};
use crate::host::{SharedHost, ended_message, unix_now};
use crate::identity::RenewError;
use crate::network::{FleetNetwork, FleetNetworks, Kind};
use crate::snapshot::{FromSnapshot, MemoryInVault, SnapshotJob, id_of};
use crate::tls::TlsError;
use crate::vm::{Answer, Registry, TurnBack, VmCommand, stays};
use crate::{console, exports, grants, guest, vaults};

/// Wait between two attempts to reach the controller, growing from the first to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// Answers kept for commands that come again.
const MAX_ANSWERS: usize = 512;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("cannot reach the controller")]
    Dial(#[from] DialError),
    #[error("this host's certificate cannot be used")]
    Tls(#[from] TlsError),
    #[error("the controller ended the session: {}", .0.message())]
    Status(#[from] tonic::Status),
    #[error("the host's certificate has ended and was not renewed")]
    Renew(#[from] RenewError),
    #[error("the controller closed the session")]
    Closed,
    #[error("the controller's first message is no welcome")]
    NoWelcome,
    #[error("the controller's epoch {offered:?} is older than {known:?}: it runs on an old copy of its store")]
    Epoch { offered: Epoch, known: Epoch },
    #[error("the journal could not be written")]
    Journal(#[from] crate::journal::JournalError),
}

/// One agent's sessions.
pub(crate) struct Sessions {
    host: SharedHost,
    vms: Arc<Registry>,
    answers: Mutex<Answers>,
    fleet: watch::Sender<FleetNetworks>,
}

/// What was answered, and what is being worked on.
#[derive(Default)]
struct Answers {
    known: BTreeMap<u64, Option<v1::CommandReply>>,
    order: VecDeque<u64>,
}

impl Sessions {
    pub(crate) fn new(host: SharedHost, vms: Arc<Registry>, fleet: watch::Sender<FleetNetworks>) -> Arc<Self> {
        Arc::new(Self { host, vms, answers: Mutex::default(), fleet })
    }

    /// Holds a session whenever the controller can be reached.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut backoff = BACKOFF.0;
        let mut said = String::new();
        loop {
            let began = tokio::time::Instant::now();
            if let Err(error) = self.attend().await {
                self.host.controller.set(None);
                // Once per reason: a controller that is away for a day must not fill the disk.
                let text = format!("{error}");
                if text != said {
                    tracing::info!(error = &error as &dyn std::error::Error, "no session; the VMs run on");
                    said = text;
                }
            }
            backoff = if began.elapsed() > BACKOFF.1 { BACKOFF.0 } else { (backoff * 2).min(BACKOFF.1) };
            tokio::time::sleep(backoff).await;
        }
    }

    async fn attend(self: &Arc<Self>) -> Result<(), SessionError> {
        let config = self.host.identity.material().client_config()?;
        let channel = dial::dial(&self.host.identity.controller, config).await?;
        let mut client = LinkClient::new(channel).max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE);
        let (sender, receiver) = mpsc::unbounded_channel();
        let _ = sender.send(AgentMessage { body: Some(Body::Hello(self.hello().await?)) });
        let mut inbound = match client.attend(UnboundedReceiverStream::new(receiver)).await {
            // By the controller's clock, which counts. The next session shows the new one.
            Err(status) if refusal_of(&status).code == ErrorCode::CertificateExpired => {
                self.host.identity.renew(&mut client).await?;
                tracing::info!("the host's certificate had ended and was renewed");
                return Ok(());
            }
            attended => attended?.into_inner(),
        };
        let Some(FromController::Welcome(welcome)) = inbound.message().await?.and_then(|message| message.body) else {
            return Err(SessionError::NoWelcome);
        };
        let (offered, known) = (Epoch(welcome.epoch), self.host.journal.epoch()?);
        if offered < known {
            return Err(SessionError::Epoch { offered, known });
        }
        if offered > known {
            self.host.journal.write_epoch(offered, welcome.epoch_id)?;
        }
        tracing::info!(epoch = offered.0, "session begun");
        self.host.controller.set(Some((sender, client.clone())));
        // What changed between the hello and now was said to nobody.
        self.host.report_all();
        for ended in self.host.journal.ended()? {
            self.host.controller.send(Body::Ended(ended_message(&ended)));
        }
        let mut heartbeat = tokio::time::interval(Duration::from_millis(u64::from(welcome.heartbeat_ms.clamp(100, 60_000))));
        let mut renewal = Box::pin(self.renewal(client.clone()));
        loop {
            tokio::select! {
                message = inbound.message() => match message?.and_then(|message| message.body) {
                    Some(body) => self.on_message(body, offered),
                    None => return Err(SessionError::Closed),
                },
                _ = heartbeat.tick() => {
                    self.host.controller.send(Body::Heartbeat(v1::Heartbeat { load: encode(&self.host.load().await), unix_ms: unix_now().0 }));
                }
                () = &mut renewal => return Err(SessionError::Closed),
            }
        }
    }

    async fn hello(&self) -> Result<v1::Hello, SessionError> {
        let load = encode(&self.host.load().await);
        // Looked at anew: a clock that was out of step when the host booted may be in step by now.
        let options = self.host.options.clone();
        let standing = tokio::task::spawn_blocking(move || check::standing(&options)).await.unwrap_or_default();
        let mut facts = self.host.facts.clone();
        facts.conditions.extend(standing.into_iter().filter_map(Finding::condition));
        let told = self.host.journal.host()?;
        let reports = self.host.reports.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(v1::Hello {
            protocol: PROTOCOL,
            address: self.host.identity.address.to_string(),
            facts: encode(&facts),
            load,
            vms: reports.values().cloned().collect(),
            epoch: told.epoch.0,
            epoch_id: told.epoch_id,
            mark: told.mark,
            members: told.members,
            migration_address: self.host.migration_address().to_string(),
        })
    }

    /// Renews this host's certificate when half of its life is over and a little more; the next session uses it. Ends when there is a new one.
    async fn renewal(&self, mut client: LinkClient<Channel>) {
        loop {
            let wait = self.host.identity.renewal_due();
            tokio::time::sleep(wait).await;
            match self.host.identity.renew(&mut client).await {
                Ok(()) => {
                    tracing::info!("the host's certificate was renewed");
                    return;
                }
                Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "the host's certificate was not renewed"),
            }
            tokio::time::sleep(Duration::from_secs(600)).await;
        }
    }

    fn on_message(self: &Arc<Self>, body: FromController, epoch: Epoch) {
        match body {
            FromController::Command(command) => self.on_command(command, epoch),
            FromController::Fleet(fleet) => {
                self.host.peers.set(&fleet.members);
                let own = fleet.members.iter().find(|member| member.host == self.host.identity.name.as_str());
                let bandwidth = own.map(|own| own.migration_bandwidth).filter(|bandwidth| *bandwidth > 0);
                self.host.budget.set(bandwidth.map(BytesPerSec));
                let members = fleet.members.iter().map(|member| member.host.clone()).collect();
                if let Err(error) = self.host.journal.write_mark(fleet.mark, members) {
                    tracing::warn!(error = &error as &dyn std::error::Error, "how far the controller is cannot be kept");
                }
                match networks(&self.host, fleet) {
                    Ok(networks) => drop(self.fleet.send_replace(networks)),
                    Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "the fleet is malformed"),
                }
            }
            FromController::Peer(peer) => {
                let this = Arc::clone(self);
                tokio::spawn(async move {
                    if let Err(error) = this.on_peer(peer).await {
                        tracing::warn!(error = &*error, "what another agent said is not believed");
                    }
                });
            }
            FromController::EndedAck(ack) => {
                let generation = Generation(ack.generation);
                let removed = convert::task_id(&ack.task).map(|task| self.host.journal.remove_ended(task, generation, ack.source));
                if let Ok(Err(error)) = removed {
                    tracing::warn!(error = &error as &dyn std::error::Error, "an acknowledged end could not be removed");
                }
            }
            FromController::Welcome(_) => {}
        }
    }

    async fn on_peer(&self, peer: v1::Peer) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let said = self.host.open_fact(std::str::from_utf8(&peer.message)?)?;
        self.vms.peer(convert::task_id(&peer.task)?, said).await;
        Ok(())
    }

    fn on_command(self: &Arc<Self>, command: v1::Command, epoch: Epoch) {
        let id = command.id;
        if matches!(command.action, Some(Action::ExecStatus(_) | Action::Forecast(_))) {
            // A question, asked again and again: its answer is not remembered, and takes the place of none that must be.
            let this = Arc::clone(self);
            tokio::spawn(async move {
                let reply = reply(id, this.carry_out_in(command, epoch).await);
                this.host.controller.send(Body::Reply(reply));
            });
            return;
        }
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        match answers.known.get(&id) {
            Some(Some(reply)) => return self.host.controller.send(Body::Reply(reply.clone())),
            Some(None) => return,
            None => {
                answers.known.insert(id, None);
                answers.order.push_back(id);
                if answers.order.len() > MAX_ANSWERS
                    && let Some(oldest) = answers.order.pop_front()
                {
                    answers.known.remove(&oldest);
                }
            }
        }
        drop(answers);
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let reply = reply(id, this.carry_out_in(command, epoch).await);
            let mut answers = this.answers.lock().unwrap_or_else(PoisonError::into_inner);
            // A refusal that may be tried again is not remembered: the same command then is a new attempt.
            let again = reply.refusal.as_ref().is_some_and(|refusal| refusal.retry != "never");
            if again {
                answers.known.remove(&id);
                answers.order.retain(|other| *other != id);
            } else if let Some(known) = answers.known.get_mut(&id) {
                *known = Some(reply.clone());
            }
            drop(answers);
            this.host.controller.send(Body::Reply(reply));
        });
    }

    async fn carry_out_in(&self, command: v1::Command, epoch: Epoch) -> Result<Answer, Refusal> {
        if Epoch(command.epoch) < epoch {
            return Err(Refusal::new(ErrorCode::GenerationStale, "the command is of an older controller epoch"));
        }
        self.carry_out(command).await
    }

    async fn carry_out(&self, command: v1::Command) -> Result<Answer, Refusal> {
        let action = command.action.ok_or_else(|| Refusal::new(ErrorCode::BadRequest, "this agent does not know the command"))?;
        if let Action::DeleteVolume(volume) = &action {
            let volume = volume_ref(volume)?;
            return self.host.pools.delete(&volume).await.map(|()| Answer::default());
        }
        if let Action::Forget(forget) = &action {
            self.host.pools.forget_spares(convert::vm_id(&forget.vm)?).await?;
        }
        if let Action::Console(console) = &action {
            let vm = convert::vm_id(&console.vm)?;
            return console::open(&self.host, vm, console.session.clone()).await.map(|()| Answer::default());
        }
        if let Action::Exec(exec) = &action {
            let vm = convert::vm_id(&exec.vm)?;
            let request: ExecRequest = decode("request", &exec.request)?;
            request.validate()?;
            self.vms.command(vm, VmCommand::MayBegin { generation: Generation(exec.generation) }).await?;
            let pid = guest::exec(&self.host, vm, &request).await?;
            return Ok(Answer { result: encode(&pid), ..Answer::default() });
        }
        if let Action::ExecStatus(status) = &action {
            let vm = convert::vm_id(&status.vm)?;
            self.vms.command(vm, VmCommand::MayAsk).await?;
            let wait = Duration::from_millis(u64::from(status.wait_ms));
            let outcome = guest::exec_status(&self.host, vm, status.pid, wait).await?;
            return Ok(Answer { result: encode(&outcome), ..Answer::default() });
        }
        if let Action::DeleteSnapshot(delete) = &action {
            return vaults::delete(&self.host, delete).await;
        }
        if let Action::LookAtVault(look) = action {
            return vaults::look(&self.host, look).await;
        }
        if let Action::ExportSnapshot(export) = action {
            return exports::export(&self.host, export).await;
        }
        if let Action::ImportSnapshot(import) = action {
            return exports::import(&self.host, import).await;
        }
        let named = neighbours_of(&action);
        let (vm, mut command) =
            vm_command(&command.task, action, |grant| grants::open(&self.host.identity.material(), grant, unix_now()))?;
        grants::check(&command, &self.host.identity.name, unix_now())?;
        if let VmCommand::Prepare { neighbours, .. } = &mut command {
            *neighbours = self.vms.neighbours(vm, &named).await;
        }
        self.vms.command(vm, command).await
    }
}

fn reply(id: u64, answer: Result<Answer, Refusal>) -> v1::CommandReply {
    match answer {
        Ok(answer) => v1::CommandReply { id, refusal: None, carry_port: u32::from(answer.carry_port), result: answer.result },
        Err(refusal) => v1::CommandReply { id, refusal: Some((&refusal).into()), carry_port: 0, result: vec![] },
    }
}

/// The VMs with which one that is to come may have something in common. What is only faster is no reason not to move.
fn neighbours_of(action: &Action) -> Vec<VmId> {
    let Action::Prepare(prepare) = action else { return Vec::new() };
    prepare.neighbours.iter().filter_map(|vm| convert::vm_id(vm).ok()).collect()
}

fn volume_ref(volume: &v1::DeleteVolume) -> Result<VolumeRef, Malformed> {
    Ok(VolumeRef { pool: convert::name("pool", &volume.pool)?, volume: convert::name("volume", &volume.volume)? })
}

fn vm_command(
    task: &str,
    action: Action,
    granted: impl Fn(Option<v1::Signed>) -> Result<Grant, Refusal>,
) -> Result<(VmId, VmCommand), Refusal> {
    let owned = |vm: &str, generation: u64| Ok::<_, Malformed>((convert::vm_id(vm)?, Generation(generation)));
    Ok(match action {
        Action::Start(start) => {
            let grant = granted(start.grant)?;
            let from = start.from.as_ref().map(FromSnapshot::read).transpose()?.map(Box::new);
            (grant.vm, VmCommand::Start { spec: decode("spec", &start.spec)?, grant, from })
        }
        Action::Stop(stop) => {
            let (vm, generation) = owned(&stop.vm, stop.generation)?;
            (vm, VmCommand::Stop { generation })
        }
        Action::Kill(kill) => {
            let (vm, generation) = owned(&kill.vm, kill.generation)?;
            let back = match kill.back_to.as_str() {
                "" => None,
                snapshot => Some(TurnBack { task: convert::task_id(task)?, snapshot: id_of(snapshot)? }),
            };
            (vm, VmCommand::Kill { generation, back })
        }
        Action::Pause(pause) => {
            let (vm, generation) = owned(&pause.vm, pause.generation)?;
            (vm, VmCommand::Pause { generation })
        }
        Action::Unpause(unpause) => {
            let (vm, generation) = owned(&unpause.vm, unpause.generation)?;
            (vm, VmCommand::Unpause { generation })
        }
        Action::Change(change) => {
            let (vm, generation) = owned(&change.vm, change.generation)?;
            (vm, VmCommand::Change { generation, spec: decode("spec", &change.spec)? })
        }
        Action::Forget(forget) => (convert::vm_id(&forget.vm)?, VmCommand::Forget),
        Action::Prepare(prepare) => {
            let grant = granted(prepare.grant)?;
            let policy: MigrationPolicy = decode("policy", &prepare.policy)?;
            let memory_key = stays::key(&prepare.memory_key);
            let disks = travelling(&prepare.disks)?;
            // What is only faster is no reason not to move.
            let snapshot = prepare.snapshot.as_ref().and_then(|snapshot| MemoryInVault::read(snapshot).ok()).map(Box::new);
            let (spec, neighbours) = (decode("spec", &prepare.spec)?, Arc::default());
            (grant.vm, VmCommand::Prepare { spec, grant, policy, memory_key, snapshot, neighbours, disks })
        }
        Action::Migrate(migrate) => {
            let grant = granted(migrate.grant)?;
            let malformed = |field| Malformed::Field { field };
            let ip: IpAddr = migrate.address.parse().map_err(|_| malformed("address"))?;
            let port = u16::try_from(migrate.carry_port).map_err(|_| malformed("carry_port"))?;
            let policy = decode("policy", &migrate.policy)?;
            let memory_key = stays::key(&migrate.memory_key);
            // What it is expected to cost is no reason not to move.
            let past = decode("past", &migrate.past).unwrap_or_default();
            let disks = travelling(&migrate.disks)?;
            (grant.vm, VmCommand::Migrate { grant, address: SocketAddr::new(ip, port), policy, memory_key, past, disks })
        }
        Action::Measure(measure) => {
            let (vm, generation) = owned(&measure.vm, measure.generation)?;
            (vm, VmCommand::Measure { generation, disks: travelling(&measure.disks)? })
        }
        Action::Forecast(forecast) => {
            let (vm, generation) = owned(&forecast.vm, forecast.generation)?;
            (vm, VmCommand::Forecast { generation, request: decode("request", &forecast.request)? })
        }
        Action::TakeSnapshot(take) => {
            let (vm, generation) = owned(&take.vm, take.generation)?;
            let (task, job) = (convert::task_id(task)?, Box::new(SnapshotJob::read(&take)?));
            (vm, VmCommand::Snapshot { generation, task, job })
        }
        Action::Cancel(cancel) => (convert::vm_id(&cancel.vm)?, VmCommand::Cancel { task: convert::task_id(task)? }),
        Action::Policy(set) => {
            let policy = decode("policy", &set.policy)?;
            (convert::vm_id(&set.vm)?, VmCommand::SetPolicy { task: convert::task_id(task)?, policy })
        }
        Action::Settle(settle) => (convert::vm_id(&settle.vm)?, VmCommand::Settle { generation: Generation(settle.generation) }),
        Action::DeleteVolume(_)
        | Action::Console(_)
        | Action::Exec(_)
        | Action::ExecStatus(_)
        | Action::DeleteSnapshot(_)
        | Action::LookAtVault(_)
        | Action::ExportSnapshot(_)
        | Action::ImportSnapshot(_) => {
            return Err(Malformed::Field { field: "action" }.into());
        }
    })
}

/// Disks that travel; nothing is none.
fn travelling(disks: &[u8]) -> Result<Vec<TravellingDisk>, Malformed> {
    if disks.is_empty() { Ok(vec![]) } else { decode("disks", disks) }
}

fn networks(host: &SharedHost, fleet: v1::Fleet) -> Result<FleetNetworks, Malformed> {
    let address = |text: &str| text.parse::<IpAddr>().map_err(|_| Malformed::Field { field: "address" });
    let members = fleet.members.iter().map(|member| address(&member.address));
    let members = members.chain(host.options.vteps.iter().map(|vtep| Ok(*vtep))).collect::<Result<_, _>>()?;
    let networks = fleet.networks.iter().map(network);
    let locations = fleet.locations.iter().map(|location| {
        let mac = location.mac.parse().map_err(|_| Malformed::Field { field: "mac" })?;
        Ok((mac, network_id(&location.network)?, address(&location.address)?))
    });
    Ok(FleetNetworks {
        members,
        networks: networks.collect::<Result<_, Malformed>>()?,
        locations: locations.collect::<Result<_, Malformed>>()?,
    })
}

fn network_id(text: &str) -> Result<NetworkId, Malformed> {
    text.parse().map_err(|_| Malformed::Field { field: "network" })
}

fn network(network: &v1::Network) -> Result<FleetNetwork, Malformed> {
    let malformed = |field| Malformed::Field { field };
    let vlan = match u16::try_from(network.vlan) {
        Ok(0) => None,
        Ok(vlan) => Some(VlanId::new(vlan).map_err(|_| malformed("vlan"))?),
        Err(_) => return Err(malformed("vlan")),
    };
    let kind = if network.bridge.is_empty() {
        Kind::Overlay { vni: network.vni }
    } else {
        Kind::Bridge { bridge: network.bridge.parse().map_err(|_| malformed("bridge"))?, vlan }
    };
    Ok(FleetNetwork { id: network_id(&network.id)?, name: convert::name("network", &network.name)?, mtu: network.mtu, kind })
}
