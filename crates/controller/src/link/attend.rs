//! A host's presence: one stream, from Hello to the third missed heartbeat.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use godwit_link::status::status_of;
use godwit_link::v1::{self, agent_message::Body, controller_message};
use godwit_link::{PROTOCOL, decode};
use godwit_model::{Epoch, ErrorCode, HostFacts, Name, Refusal, VmId};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{LinkServer, Peer, certificate_expired, checked_address};
use crate::clock;
use crate::db::{Batch, Fault, retry};
use crate::hub::{Attendance, Presence, QUEUE, ToAgent};
use crate::reports::Dropped;
use crate::restore;
use crate::rows::HostRow;

/// How long an agent may take to introduce itself.
const INTRODUCTION: Duration = Duration::from_secs(10);
/// How many heartbeats an agent that has just started may take to find all its VMs again.
const ADOPTION: u32 = 10;
/// Longest description of a host. It is stored and shown.
const MAX_FACTS: usize = 256 << 10;
/// Heartbeats that may be missing.
const MISSED: u32 = 3;

fn malformed() -> Refusal {
    Refusal::new(ErrorCode::BadRequest, "the agent did not introduce itself as this controller expects")
        .hint("agent and controller must be of compatible versions")
}

impl LinkServer {
    /// Serves one stream; the answer begins at once, refusals come through it.
    pub(super) fn begin_attendance(
        &self,
        peer: Peer,
        inbound: Streaming<v1::AgentMessage>,
    ) -> impl Stream<Item = Result<v1::ControllerMessage, Status>> + Send + use<> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let server = self.clone();
        self.tracker.spawn(async move {
            let stop = server.stop.clone();
            tokio::select! {
                () = stop.cancelled() => {}
                () = server.attendance(&peer, inbound, sender) => {}
            }
        });
        ReceiverStream::new(receiver)
    }

    async fn attendance(&self, peer: &Peer, mut inbound: Streaming<v1::AgentMessage>, sender: ToAgent) {
        let host = &peer.host;
        let hello = match tokio::time::timeout(INTRODUCTION, inbound.message()).await {
            Ok(Ok(Some(v1::AgentMessage { body: Some(Body::Hello(hello)) }))) => hello,
            Ok(Ok(Some(_))) => return refuse(&sender, &malformed()).await,
            _ => return,
        };
        let attendance = match self.welcome(host, &hello, &sender).await {
            Ok(attendance) => attendance,
            Err(refusal) => {
                tracing::warn!(%host, %refusal, "the host is not welcome");
                return refuse(&sender, &refusal).await;
            }
        };
        // Between the look at the certificate and this moment the host may have been removed: who removes looks at the hub afterwards.
        if let Err(fault) = self.member(peer).await {
            self.hub.detach(host, attendance.number);
            return refuse(&sender, &fault.refusal()).await;
        }
        tracing::info!(%host, address = hello.address, vms = hello.vms.len(), "connected");
        self.note_presence(host, true).await;
        let why = match self.take_stock(host, &hello).await {
            Ok(told) => self.listen_to(peer, &attendance, &mut inbound, told).await,
            Err(fault) => format!("its first words cannot be stored: {fault}"),
        };
        if self.hub.detach(host, attendance.number) {
            tracing::info!(%host, why, "disconnected");
            self.note_presence(host, false).await;
            // An agent that may not come back is told why; one that does not read is not waited for.
            if let Err(Fault::Refused(refusal)) = self.member(peer).await {
                let _ = sender.try_send(Err(status_of(&refusal)));
            }
        }
    }

    async fn welcome(&self, host: &Name, hello: &v1::Hello, sender: &ToAgent) -> Result<Attendance, Refusal> {
        if hello.protocol != PROTOCOL {
            return Err(Refusal::new(
                ErrorCode::HostIncompatible,
                format!("the agent speaks version {} of the link, this controller {PROTOCOL}", hello.protocol),
            )
            .hint("bring agent and controller to versions that go together"));
        }
        let (epoch, mark) = (self.db.epoch().0, self.db.mark());
        let known = hello.epoch == 0 || self.db.knows(Epoch(hello.epoch), &hello.epoch_id, hello.mark);
        if !known && !restore::is_unheard(&self.db, host).await.map_err(Fault::refusal)? {
            return Err(Refusal::new(
                ErrorCode::GenerationStale,
                format!(
                    "the agent was told of epoch {} and mark {}, this controller is at {epoch} and {mark}: its store is an old copy",
                    hello.epoch, hello.mark
                ),
            )
            .hint(
                "start the controller on its newest store; if there is none, once with `godwit serve --restored`, which asks every \
                 host first what it runs",
            ));
        }
        if hello.facts.len() > MAX_FACTS {
            return Err(malformed());
        }
        let facts: HostFacts = decode("facts", &hello.facts).map_err(|_| malformed())?;
        let load = decode("load", &hello.load).map_err(|_| malformed())?;
        let address = checked_address(&hello.address)?;
        let elsewhere = Some(&hello.migration_address).filter(|elsewhere| !elsewhere.is_empty() && **elsewhere != address);
        let migration_address = elsewhere.map(|elsewhere| checked_address(elsewhere)).transpose()?;
        let presence = Presence { address, migration_address, facts: Arc::new(facts), load, skew: None };
        let heartbeat_ms = u32::try_from(self.heartbeat.as_millis()).unwrap_or(u32::MAX);
        let body = controller_message::Body::Welcome(v1::Welcome { epoch, heartbeat_ms, epoch_id: self.db.epoch_id().to_owned() });
        // Before the hub knows the session: nothing may overtake it. The queue is empty; a receiver that is gone shows below.
        let _ = sender.try_send(Ok(v1::ControllerMessage { body: Some(body) }));
        let attendance = self.hub.attach(host, presence, sender.clone());
        self.fleet.tell(host);
        Ok(attendance)
    }

    /// What the host's journal says corrects what we believe, upwards only.
    async fn take_stock(&self, host: &Name, hello: &v1::Hello) -> Result<HashSet<VmId>, Fault> {
        let mut told = HashSet::new();
        restore::note_members(&self.db, &hello.members).await?;
        for report in &hello.vms {
            told.extend(self.reported(host, report).await?);
        }
        Ok(told)
    }

    /// Takes in a report; which VM it was of, if it was believed. What is not believed takes no memory.
    async fn reported(&self, host: &Name, report: &v1::VmReport) -> Result<Option<VmId>, Fault> {
        let believed = self.reports.vm(host, report).await;
        let vm = believed.as_ref().ok().and_then(|()| report.vm.parse().ok());
        self.believe(host, believed).map(|()| vm)
    }

    /// Says why the session ended.
    async fn listen_to(
        &self,
        peer: &Peer,
        attendance: &Attendance,
        inbound: &mut Streaming<v1::AgentMessage>,
        mut told: HashSet<VmId>,
    ) -> String {
        let host = &peer.host;
        let mut stock = Some(Instant::now() + self.heartbeat * ADOPTION);
        let mut heard = false;
        loop {
            let message = tokio::select! {
                () = tokio::time::sleep_until(stock.unwrap_or_else(Instant::now)), if stock.is_some() => {
                    stock = None;
                    match self.reports.missing(host, &told).await {
                        Ok(()) => {
                            self.reports.autostart(host);
                            continue;
                        }
                        Err(fault) => return format!("what is missing there cannot be stored: {fault}"),
                    }
                }
                () = attendance.closed.cancelled() => return "replaced by a later session, removed, or it does not read".into(),
                message = tokio::time::timeout(self.heartbeat * MISSED, inbound.message()) => message,
            };
            let body = match message {
                Err(_) => return format!("{MISSED} heartbeats are missing"),
                Ok(Err(status)) => return format!("the stream broke: {}", status.message()),
                Ok(Ok(None)) => return "the agent closed the stream".into(),
                Ok(Ok(Some(message))) => message.body,
            };
            // An agent renews long before; should it not, it must show a new certificate all the same.
            if peer.ends < clock::now() {
                return certificate_expired(peer.ends).message;
            }
            // Whoever says more has written down whose host it is by now.
            if !heard && let Err(fault) = self.reports.heard(host).await {
                return format!("that it was heard cannot be stored: {fault}");
            }
            heard = true;
            let ended_with_host = matches!(&body, Some(Body::Vm(report)) if report.ended_with_host);
            match self.message(host, attendance, body).await {
                Ok(Some(vm)) if stock.is_some() => drop(told.insert(vm)),
                // One that was found late.
                Ok(Some(_)) if ended_with_host => self.reports.autostart(host),
                Ok(_) => {}
                Err(fault) => return format!("what it said cannot be stored: {fault}"),
            }
        }
    }

    async fn message(&self, host: &Name, attendance: &Attendance, body: Option<Body>) -> Result<Option<VmId>, Fault> {
        let believed = match body {
            Some(Body::Heartbeat(heartbeat)) => decode("load", &heartbeat.load)
                .map(|load| {
                    let skew = (heartbeat.unix_ms != 0).then(|| heartbeat.unix_ms.cast_signed() - clock::now().0.cast_signed());
                    self.hub.set_load(host, attendance.number, load, skew);
                })
                .map_err(Dropped::from),
            Some(Body::Vm(report)) => return self.reported(host, &report).await,
            Some(Body::Reply(reply)) => {
                self.hub.answered(host, attendance.number, reply);
                Ok(())
            }
            Some(Body::Progress(progress)) => self.reports.progress(host, &progress).await,
            Some(Body::Ended(ended)) => self.reports.ended(host, &ended).await,
            Some(Body::Guest(guest)) => self.reports.guest(host, &guest).await,
            Some(Body::Writes(writes)) => self.reports.writes(host, &writes).await,
            Some(Body::Peer(peer)) => self.reports.peer(host, peer).await,
            Some(Body::Hello(_)) | None => Ok(()),
        };
        self.believe(host, believed).map(|()| None)
    }

    /// Drops what may not be said; only what could not be stored ends the session, so that it is said again.
    fn believe(&self, host: &Name, result: Result<(), Dropped>) -> Result<(), Fault> {
        match result {
            Ok(()) => Ok(()),
            Err(Dropped::Fault(fault)) => Err(fault),
            Err(dropped) => {
                tracing::warn!(%host, reason = %dropped, "message dropped");
                Ok(())
            }
        }
    }

    /// Tells watchers. That it is connected is known without the store, so a full one costs only their news.
    async fn note_presence(&self, host: &Name, connected: bool) {
        let presence = self.hub.presence(host);
        let written = retry!({
            let Some(mut row) = self.db.find::<HostRow>(host.as_str()).await? else { return Ok(()) };
            row.row.connected = connected;
            row.row.since = self.hub.since(host).unwrap_or_else(clock::now);
            if let Some(presence) = &presence {
                row.row.address.clone_from(&presence.address);
                row.row.migration_address.clone_from(&presence.migration_address);
                row.row.facts = Some((*presence.facts).clone());
            }
            self.db.commit(Batch::default().update(&row)).await
        });
        if let Err(fault) = written {
            tracing::warn!(%host, error = &fault as &dyn std::error::Error, "the host's presence cannot be stored");
        }
    }
}

async fn refuse(sender: &ToAgent, refusal: &Refusal) {
    // An agent that is gone needs no answer.
    let _ = sender.send(Err(status_of(refusal))).await;
}
