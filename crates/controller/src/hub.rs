//! The agents that are connected right now: one session per host, the commands that wait for an answer, the open consoles.
//!
//! Only memory. Whether a host is connected is a fact of this moment; nothing may take its absence for the death of its VMs.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use godwit_api::v1::Migratable;
use godwit_link::v1;
use godwit_model::{ErrorCode, GuestFacts, HostFacts, HostLoad, Name, Refusal, Retry, UnixMillis, VmId};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::clock;
use crate::habits::Gathered;

/// Messages that may wait for an agent that does not read. One that is so far behind is as good as disconnected.
pub(crate) const QUEUE: usize = 512;

/// The way to an agent.
pub(crate) type ToAgent = mpsc::Sender<Result<v1::ControllerMessage, Status>>;

/// What a connected host says of itself.
#[derive(Clone, Debug)]
pub(crate) struct Presence {
    /// The address of its carry.
    pub(crate) address: String,
    /// Where its carry listens, if elsewhere.
    pub(crate) migration_address: Option<String>,
    /// What does not change while its agent runs.
    pub(crate) facts: Arc<HostFacts>,
    /// Its last heartbeat.
    pub(crate) load: HostLoad,
    /// Its clock less ours, in milliseconds, by its last heartbeat.
    pub(crate) skew: Option<i64>,
}

/// What an agent answered to a command.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    /// The port that carry listens on, after a prepare.
    pub(crate) carry_port: u32,
    /// What there was to tell, JSON.
    pub(crate) result: Vec<u8>,
}

/// The agent's side of a console.
pub(crate) struct ConsoleStream {
    /// What the guest writes.
    pub(crate) from_guest: mpsc::Receiver<Bytes>,
    /// What the user types.
    pub(crate) to_guest: mpsc::Sender<Result<v1::ConsoleChunk, Status>>,
}

struct Session {
    number: u64,
    presence: Presence,
    sender: ToAgent,
    pending: HashMap<u64, oneshot::Sender<Result<Answer, Refusal>>>,
    closed: CancellationToken,
}

#[derive(Default)]
struct Inner {
    sessions: HashMap<Name, Session>,
    since: HashMap<Name, UnixMillis>,
    numbers: u64,
    /// Console sessions that an agent was asked for, by session id.
    awaited: HashMap<String, (Name, oneshot::Sender<ConsoleStream>)>,
    /// What ends when a host is removed, beside its session.
    expelled: HashMap<Name, CancellationToken>,
    /// VMs whose console is open.
    consoles: HashMap<VmId, String>,
    /// What guests last said of themselves, and through which host.
    guests: HashMap<VmId, (Name, GuestFacts)>,
    /// Whether each running VM could move, as it was last looked at.
    migratable: HashMap<VmId, Migratable>,
}

/// The connected agents.
pub(crate) struct Hub {
    inner: Mutex<Inner>,
    changed: watch::Sender<u64>,
    /// What hosts have measured of their VMs.
    pub(crate) habits: Gathered,
}

/// The right to be the one user of a VM's console; given back when dropped.
pub(crate) struct ConsoleSeat {
    hub: Arc<Hub>,
    vm: VmId,
    /// The id of the session.
    pub(crate) session: String,
}

impl Drop for ConsoleSeat {
    fn drop(&mut self) {
        let mut inner = self.hub.lock();
        inner.consoles.remove(&self.vm);
        inner.awaited.remove(&self.session);
    }
}

/// A session as its reader sees it.
pub(crate) struct Attendance {
    /// Tells it from a later one of the same host.
    pub(crate) number: u64,
    /// Ends when a later session replaces it, or it reads too slowly.
    pub(crate) closed: CancellationToken,
}

impl Hub {
    /// Nobody is connected.
    pub(crate) fn new() -> Self {
        Self { inner: Mutex::default(), changed: watch::Sender::new(0), habits: Gathered::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no holder panics")
    }

    fn announce(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// Grows whenever a host connects or disconnects.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// A host is there; an earlier session of it ends.
    pub(crate) fn attach(&self, host: &Name, presence: Presence, sender: ToAgent) -> Attendance {
        let mut inner = self.lock();
        inner.numbers += 1;
        // It says anew what its guests say.
        inner.guests.retain(|_, (through, _)| through != host);
        let (number, closed) = (inner.numbers, CancellationToken::new());
        let session = Session { number, presence, sender, pending: HashMap::new(), closed: closed.clone() };
        if let Some(before) = inner.sessions.insert(host.clone(), session) {
            before.closed.cancel();
        } else {
            inner.since.insert(host.clone(), clock::now());
        }
        drop(inner);
        self.announce();
        Attendance { number, closed }
    }

    /// A session has ended. Says whether the host is gone, which it is not if a later session replaced this one.
    pub(crate) fn detach(&self, host: &Name, number: u64) -> bool {
        let mut inner = self.lock();
        if inner.sessions.get(host).is_some_and(|session| session.number == number) {
            inner.sessions.remove(host);
            inner.since.insert(host.clone(), clock::now());
            self.announce();
        }
        !inner.sessions.contains_key(host)
    }

    /// Ends every session: the controller stops.
    pub(crate) fn close(&self) {
        let sessions = std::mem::take(&mut self.lock().sessions);
        sessions.values().for_each(|session| session.closed.cancel());
    }

    /// What a host says of itself, if it is connected.
    pub(crate) fn presence(&self, host: &Name) -> Option<Presence> {
        self.lock().sessions.get(host).map(|session| session.presence.clone())
    }

    /// Whether it is connected.
    pub(crate) fn is_connected(&self, host: &Name) -> bool {
        self.lock().sessions.contains_key(host)
    }

    /// Every connected host, in the order of the names.
    pub(crate) fn present(&self) -> Vec<(Name, Presence)> {
        let mut hosts: Vec<_> =
            self.lock().sessions.iter().map(|(host, session)| (host.clone(), session.presence.clone())).collect();
        hosts.sort_by(|a, b| a.0.cmp(&b.0));
        hosts
    }

    /// When a host was last connected or disconnected, since this controller started.
    pub(crate) fn since(&self, host: &Name) -> Option<UnixMillis> {
        self.lock().since.get(host).copied()
    }

    /// Notes a heartbeat.
    pub(crate) fn set_load(&self, host: &Name, number: u64, load: HostLoad, skew: Option<i64>) {
        let mut inner = self.lock();
        if let Some(session) = inner.sessions.get_mut(host).filter(|session| session.number == number) {
            session.presence.load = load;
            session.presence.skew = skew;
        }
    }

    /// Notes what a guest says of itself through its host, or that it says nothing any more.
    pub(crate) fn set_guest(&self, host: &Name, vm: VmId, facts: Option<GuestFacts>) {
        let mut inner = self.lock();
        match facts {
            Some(facts) => drop(inner.guests.insert(vm, (host.clone(), facts))),
            // Of the host that a VM has left this says nothing about the one where it is.
            None if inner.guests.get(&vm).is_some_and(|(through, _)| through == host) => drop(inner.guests.remove(&vm)),
            None => {}
        }
    }

    /// Notes which VMs could move.
    pub(crate) fn set_migratable(&self, known: HashMap<VmId, Migratable>) {
        self.lock().migratable = known;
    }

    /// Whether a VM could move, if that was looked at.
    pub(crate) fn migratable(&self, vm: VmId) -> Option<Migratable> {
        self.lock().migratable.get(&vm).cloned()
    }

    /// What a guest last said of itself through `host`.
    pub(crate) fn guest(&self, host: &Name, vm: VmId) -> Option<GuestFacts> {
        self.lock().guests.get(&vm).filter(|(through, _)| through == host).map(|(_, facts)| facts.clone())
    }

    /// Ends when the host is removed from the cluster.
    pub(crate) fn expelled(&self, host: &Name) -> CancellationToken {
        self.lock().expelled.entry(host.clone()).or_default().clone()
    }

    /// The host is no longer of the cluster, or has another key: its session and every stream of it end.
    pub(crate) fn expel(&self, host: &Name) {
        let mut inner = self.lock();
        if let Some(expelled) = inner.expelled.remove(host) {
            expelled.cancel();
        }
        inner.awaited.retain(|_, (expected, _)| expected != host);
        if let Some(session) = inner.sessions.remove(host) {
            session.closed.cancel();
            inner.since.insert(host.clone(), clock::now());
            self.announce();
        }
    }

    /// Passes on what one agent says to another, unless that one is behind with reading already: no host can end another's session by talking.
    pub(crate) fn relay(&self, host: &Name, peer: v1::Peer) -> bool {
        let room = self.lock().sessions.get(host).is_some_and(|session| session.sender.capacity() > QUEUE / 2);
        room && self.send(host, v1::controller_message::Body::Peer(peer))
    }

    /// Sends a message to a host; says whether it is on its way.
    pub(crate) fn send(&self, host: &Name, body: v1::controller_message::Body) -> bool {
        let mut inner = self.lock();
        let Some(session) = inner.sessions.get(host) else { return false };
        let sent = session.sender.try_send(Ok(v1::ControllerMessage { body: Some(body) }));
        if let Err(error) = &sent {
            if matches!(error, mpsc::error::TrySendError::Full(_)) {
                tracing::warn!(%host, "the agent does not read what it is sent; its session ends");
            }
            session.closed.cancel();
            inner.sessions.remove(host);
            inner.since.insert(host.clone(), clock::now());
            self.announce();
        }
        sent.is_ok()
    }

    /// Sends a command. The receiver fails when the session ends before the answer.
    pub(crate) fn command(&self, host: &Name, command: v1::Command) -> Option<oneshot::Receiver<Result<Answer, Refusal>>> {
        let (sender, receiver) = oneshot::channel();
        self.lock().sessions.get_mut(host)?.pending.insert(command.id, sender);
        self.send(host, v1::controller_message::Body::Command(command)).then_some(receiver)
    }

    /// An agent answered.
    pub(crate) fn answered(&self, host: &Name, number: u64, reply: v1::CommandReply) {
        let mut inner = self.lock();
        let session = inner.sessions.get_mut(host).filter(|session| session.number == number);
        if let Some(waiting) = session.and_then(|session| session.pending.remove(&reply.id)) {
            let answer = match reply.refusal {
                Some(refusal) => Err(refusal.into()),
                None => Ok(Answer { carry_port: reply.carry_port, result: reply.result }),
            };
            // Whoever asked may have stopped waiting.
            let _ = waiting.send(answer);
        }
    }

    /// Waits until a host is connected.
    pub(crate) async fn connected(&self, host: &Name) {
        let mut watch = self.watch();
        // Not asked while the watch is locked: who announces may hold the sessions. The sender lives as long as the hub.
        while !self.is_connected(host) && watch.changed().await.is_ok() {}
    }

    /// Takes the only seat at a VM's console.
    pub(crate) fn take_console(
        self: &Arc<Self>,
        vm: VmId,
        host: &Name,
    ) -> Result<(ConsoleSeat, oneshot::Receiver<ConsoleStream>), Refusal> {
        let mut inner = self.lock();
        if inner.consoles.contains_key(&vm) {
            return Err(Refusal::new(ErrorCode::InUse, "somebody else has the console of this VM open")
                .hint("close the other session first")
                .retry(Retry::Safe));
        }
        let session = clock::secret();
        let (sender, receiver) = oneshot::channel();
        inner.consoles.insert(vm, session.clone());
        inner.awaited.insert(session.clone(), (host.clone(), sender));
        drop(inner);
        Ok((ConsoleSeat { hub: self.clone(), vm, session }, receiver))
    }

    /// An agent brings a console session that was asked of it.
    pub(crate) fn bring_console(&self, host: &Name, session: &str, stream: ConsoleStream) -> bool {
        let mut inner = self.lock();
        if inner.awaited.get(session).is_none_or(|(expected, _)| expected != host) {
            return false;
        }
        inner.awaited.remove(session).is_some_and(|(_, waiting)| waiting.send(stream).is_ok())
    }
}
