//! Finds the actor of a VM, and makes one for a VM that comes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use godwit_migration::PeerMessage;
use godwit_model::{ErrorCode, Millis, Refusal, Retry, TaskId, VmId};
use tokio::sync::{mpsc, oneshot};

use super::actor::{Actor, Answer, VmCommand, VmEvent};
use super::moving::answer;
use crate::facts::Said;
use crate::host::{SharedHost, host_failed};
use crate::journal::VmRecord;

const BACKLOG: usize = 64;
/// An actor that ends as a command comes is followed by another at once.
const ATTEMPTS: u32 = 3;

/// All actors of this host.
pub(crate) struct Registry {
    host: SharedHost,
    actors: Mutex<HashMap<VmId, mpsc::Sender<VmEvent>>>,
}

impl Registry {
    /// Wakes an actor for every record of the journal.
    pub(crate) fn begin(host: SharedHost, records: impl IntoIterator<Item = VmRecord>) -> Arc<Self> {
        let registry = Arc::new(Self { host, actors: Mutex::new(HashMap::new()) });
        for record in records {
            let vm = record.spec.vm;
            registry.spawn(vm, Some(record));
        }
        registry
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, HashMap<VmId, mpsc::Sender<VmEvent>>> {
        self.actors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The actor of a VM that has one.
    pub(super) fn known(&self, vm: VmId) -> Option<mpsc::Sender<VmEvent>> {
        self.locked().get(&vm).filter(|sender| !sender.is_closed()).cloned()
    }

    fn spawn(self: &Arc<Self>, vm: VmId, record: Option<VmRecord>) -> mpsc::Sender<VmEvent> {
        let mut actors = self.locked();
        if let Some(sender) = actors.get(&vm).filter(|sender| !sender.is_closed()) {
            return sender.clone();
        }
        let (sender, events) = mpsc::channel(BACKLOG);
        actors.insert(vm, sender.clone());
        drop(actors);
        let actor = Actor::new(Arc::clone(&self.host), vm, record, events);
        // The first hello must not leave out a VM that is still being looked at.
        actor.publish();
        let registry = Arc::clone(self);
        let mine = sender.clone();
        tokio::spawn(async move {
            actor.run().await;
            let mut actors = registry.locked();
            if actors.get(&vm).is_some_and(|sender| sender.same_channel(&mine)) {
                actors.remove(&vm);
            }
        });
        sender
    }

    /// The VMs that have an actor.
    pub(crate) fn vms(&self) -> Vec<VmId> {
        self.locked().keys().copied().collect()
    }

    /// Hands a command to the VM's actor. Where there is none, one begins with what the journal says; where that says nothing, only a command
    /// that brings the VM here makes one.
    pub(crate) async fn command(self: &Arc<Self>, vm: VmId, command: VmCommand) -> Result<Answer, Refusal> {
        for _ in 0..ATTEMPTS {
            let sender = match self.known(vm) {
                Some(sender) => sender,
                None => {
                    let record = self.host.journal.vm(vm).map_err(|error| host_failed("the journal cannot be read", &error))?;
                    if record.is_none() && !command.brings_vm() {
                        return if command.is_done_without_vm() { Ok(Answer::default()) } else { Err(unknown(vm)) };
                    }
                    self.spawn(vm, record)
                }
            };
            let (reply, answer) = oneshot::channel();
            let event = VmEvent::Command { command: Box::new(command.clone()), reply };
            // Without an answer the actor has ended before it came to the command: the VM has just left.
            if sender.send(event).await.is_ok()
                && let Ok(answer) = answer.await
            {
                return answer;
            }
        }
        Err(unknown(vm).retry(Retry::Unknown))
    }

    /// Hands a message of the other agent, however it came, to the VM's actor. Where neither that nor the journal knows the VM the move is over here.
    pub(crate) async fn peer(self: &Arc<Self>, task: TaskId, said: Said) {
        let vm = said.peer.vm;
        if let Some(sender) = self.known(vm)
            && sender.send(VmEvent::Peer { task, said: said.clone() }).await.is_ok()
        {
            return;
        }
        match self.host.journal.vm(vm) {
            Ok(None) => answer_for_nobody(&self.host, task, &said),
            // Its actor has failed. What the journal holds is not answered for without it.
            Ok(Some(record)) => drop(self.spawn(vm, Some(record)).send(VmEvent::Peer { task, said }).await),
            Err(error) => {
                tracing::error!(%vm, error = &error as &dyn std::error::Error, "the journal cannot be read, the other host gets no answer");
            }
        }
    }
}

/// What is said of a move that this host no longer, or never, took part in.
pub(super) fn answer_for_nobody(host: &SharedHost, task: TaskId, said: &Said) {
    let message = match &said.peer.message {
        PeerMessage::Running { .. } | PeerMessage::Whole { .. } | PeerMessage::Declined { .. } => PeerMessage::Settled,
        message if asks_how_it_ended(message) => match host.journal.ran(said.peer.vm) {
            // It has gone on from here since.
            Ok(ran) if ran >= said.peer.generation => PeerMessage::Whole { since: Millis(0) },
            // A move that is not in the journal was never activated here, and its generation will not be prepared again.
            Ok(_) if *message == PeerMessage::Released => PeerMessage::Declined {
                reason: Refusal::new(ErrorCode::MigrationFailed, "the destination holds nothing of this move").retry(Retry::Safe),
            },
            Ok(_) => return,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                return tracing::error!(vm = %said.peer.vm, error, "the journal cannot be read, the other host gets no answer");
            }
        },
        _ => return,
    };
    answer(host, task, said, message);
}

/// What a source says until it knows how the move has ended.
pub(super) const fn asks_how_it_ended(message: &PeerMessage) -> bool {
    matches!(message, PeerMessage::Released | PeerMessage::Lost | PeerMessage::Cut { .. })
}

fn unknown(vm: VmId) -> Refusal {
    Refusal::new(ErrorCode::NotFound, format!("this host holds no VM {vm}"))
}
