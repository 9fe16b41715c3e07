//! The guests of this host: what they say of themselves, asked for now and then, and programs that are run in them.
//!
//! A guest's agent is the guest's word and may be slow, hostile or missing. Nothing here holds up a VM's actor: a guest is asked only while
//! its side of the channel is open and its vCPUs run, and each call has a time limit.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use godwit_link::encode;
use godwit_link::v1::{self, agent_message::Body};
use godwit_model::{ErrorCode, ExecOutcome, ExecRequest, GuestClock, GuestFacts, Refusal, Retry, VmId};
use godwit_qemu::qga::{Exec, Frozen};
use godwit_qemu::{GuestAgent, Notice, Notices, QgaError, Qmp, Sockets};
use tokio::time::Instant;

use crate::host::{Controller, Host, SharedHost, unix_now};

/// QEMU's name of the channel.
pub(crate) const CHANNEL: &str = "guest-agent";

/// Between two looks at a guest.
const PERIOD: Duration = Duration::from_secs(60);
/// How long a guest that has just opened its channel, or was just let run, is left alone.
const SETTLE: Duration = Duration::from_secs(1);
/// Time for one look.
const LOOK: Duration = Duration::from_secs(20);
/// Time for the start of a program.
const START: Duration = Duration::from_secs(10);
/// Time for one question about a program.
const ASK: Duration = Duration::from_secs(5);
/// Longest wait for a program's end in one question.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// How often a clock that comes out behind all the same is put forward in one look.
const CLOCK_SETTINGS: usize = 3;
/// Between two questions about a program: grows from the first to the second.
const AGAIN: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// The guests' agents of this host, and what they last said.
#[derive(Debug, Default)]
pub(crate) struct Guests {
    known: Mutex<BTreeMap<VmId, Known>>,
}

#[derive(Debug)]
struct Known {
    agent: GuestAgent,
    facts: Option<GuestFacts>,
}

impl Guests {
    fn locked(&self) -> MutexGuard<'_, BTreeMap<VmId, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The agent of a VM: one channel for all who want something of it.
    fn agent(&self, host: &Host, vm: VmId) -> GuestAgent {
        let path = || Sockets::in_dir(&host.vm_dir(vm)).guest_agent;
        self.locked().entry(vm).or_insert_with(|| Known { agent: GuestAgent::at(path()), facts: None }).agent.clone()
    }

    /// The VM's QEMU is gone.
    pub(crate) fn forget(&self, host: &Host, vm: VmId) {
        let known = self.locked().remove(&vm);
        if known.is_some_and(|known| known.facts.is_some()) {
            host.controller.send(message(vm, None));
        }
    }

    /// What a guest said, or that it says nothing any more.
    fn set(&self, host: &Host, vm: VmId, facts: Option<GuestFacts>) {
        let mut guests = self.locked();
        let Some(known) = guests.get_mut(&vm) else { return };
        if known.facts != facts {
            host.controller.send(message(vm, facts.as_ref()));
            known.facts = facts;
        }
    }

    /// Tells everything again.
    pub(crate) fn tell_all(&self, controller: &Controller) {
        for (vm, known) in &*self.locked() {
            if known.facts.is_some() {
                controller.send(message(*vm, known.facts.as_ref()));
            }
        }
    }
}

fn message(vm: VmId, facts: Option<&GuestFacts>) -> Body {
    Body::Guest(v1::GuestReport { vm: vm.to_string(), facts: facts.map(encode).unwrap_or_default() })
}

/// Looks at the guest now and then, as long as the session with its QEMU lasts.
pub(crate) fn watch(host: &SharedHost, vm: VmId, qmp: &Qmp) {
    let agent = host.guests.agent(host, vm);
    tokio::spawn(attend(Arc::clone(host), vm, agent, qmp.clone(), qmp.listen()));
}

#[tracing::instrument(name = "guest", skip_all, fields(vm = %vm))]
async fn attend(host: SharedHost, vm: VmId, agent: GuestAgent, qmp: Qmp, mut notices: Notices) {
    let mut next = Instant::now() + SETTLE;
    let mut stood_still = false;
    loop {
        tokio::select! {
            notice = notices.next() => match notice {
                // A guest that opens and closes its channel all the time is looked at no more often for it.
                Notice::Event(event) if matches!(event.name.as_str(), "VSERPORT_CHANGE" | "RESUME") => {
                    next = next.min(Instant::now() + SETTLE);
                    // One that boots has not opened its channel yet: its clock is its own affair.
                    stood_still |= event.name == "RESUME" && qmp.query_channel_open(CHANNEL).await.unwrap_or(false);
                }
                Notice::Event(_) | Notice::Missed(_) => {}
                Notice::Ended(_) => return,
            },
            () = tokio::time::sleep_until(next) => {
                next = Instant::now() + PERIOD;
                let looked = look(&host, vm, &agent, &qmp, stood_still).await;
                stood_still &= !looked;
            }
        }
    }
}

/// Asks the guest; whether it answered. The clock of one that `stood_still` is put forward by what it missed.
async fn look(host: &SharedHost, vm: VmId, agent: &GuestAgent, qmp: &Qmp, stood_still: bool) -> bool {
    // A guest that stands still cannot answer: what it last said stays.
    if !qmp.query_status().await.is_ok_and(|status| status.running) {
        return false;
    }
    match qmp.query_channel_open(CHANNEL).await {
        Ok(true) => {}
        Ok(false) => {
            host.guests.set(host, vm, None);
            return false;
        }
        Err(_) => return false,
    }
    match agent.thaw_orphan().await {
        Ok(true) => tracing::warn!("the guest was frozen and nobody held it: thawed"),
        Ok(false) | Err(QgaError::Refused { .. }) => {}
        Err(error) => {
            tracing::debug!(error = &error as &dyn std::error::Error, "the guest's agent does not answer");
            return false;
        }
    }
    let asked = async {
        let facts = agent.look(unix_now()).await?;
        // A guest whose agent does not tell, or set, the time is no worse a guest.
        let clock = look_at_clock(agent, stood_still).await.inspect_err(|error| {
            tracing::debug!(error = error as &dyn std::error::Error, "the guest's clock is not known");
        });
        Ok::<_, QgaError>(GuestFacts { clock: clock.ok(), ..facts })
    };
    match tokio::time::timeout(LOOK, asked).await {
        Ok(Ok(facts)) => {
            host.guests.set(host, vm, Some(facts));
            return true;
        }
        Ok(Err(error)) => tracing::debug!(error = &error as &dyn std::error::Error, "the guest's agent does not answer"),
        Err(_) => tracing::debug!("the guest's agent takes too long"),
    }
    false
}

/// The guest's clock beside ours. In a move, or a pause, both of a guest's clocks stand still with it: it comes out behind.
///
/// What the guest is told is late by as long as the telling takes, on a busy host or guest by some tens of milliseconds; it is told again
/// then, but never more than the time it is here: a clock that is put back breaks more than one that is a little behind.
async fn look_at_clock(agent: &GuestAgent, stood_still: bool) -> Result<GuestClock, QgaError> {
    let mut clock = read_clock(agent).await?;
    let Some(behind) = clock.behind_ms().filter(|_| stood_still) else { return Ok(clock) };
    for _ in 0..CLOCK_SETTINGS {
        let now = i64::try_from(unix_now().get()).unwrap_or(i64::MAX);
        agent.set_time(Some(now.saturating_mul(1_000_000))).await?;
        clock = read_clock(agent).await?;
        if clock.behind_ms().is_none() {
            break;
        }
    }
    tracing::info!(behind, left = clock.offset_ms, "the guest's clock was put forward");
    Ok(GuestClock { put_forward_ms: Some(behind), ..clock })
}

async fn read_clock(agent: &GuestAgent) -> Result<GuestClock, QgaError> {
    let (asked, began) = (unix_now(), Instant::now());
    let nanos = agent.time().await?;
    let within_ms = u64::try_from(began.elapsed().as_millis() / 2).unwrap_or(u64::MAX);
    let ours = i64::try_from(asked.get().saturating_add(within_ms)).unwrap_or(i64::MAX);
    Ok(GuestClock { offset_ms: (nanos / 1_000_000).saturating_sub(ours), within_ms, put_forward_ms: None })
}

/// Nobody in the guest has opened the channel.
pub(crate) fn no_agent() -> Refusal {
    Refusal::new(ErrorCode::GuestSilent, "no agent runs in the guest: nobody there has opened its channel")
        .hint("install and start qemu-guest-agent in the guest")
        .retry(Retry::Safe)
}

/// Starts a program in the guest; its number there. The caller has seen to it that the VM is this host's.
pub(crate) async fn exec(host: &SharedHost, vm: VmId, request: &ExecRequest) -> Result<i64, Refusal> {
    let agent = host.guests.agent(host, vm);
    // Who does not answer this has not been asked for anything yet.
    agent.ping(ASK).await.map_err(|error| refusal(&error, Retry::Safe))?;
    agent.exec(request, START).await.map_err(|error| {
        let retry = if error.may_have_acted() { Retry::Unknown } else { Retry::Safe };
        refusal(&error, retry)
    })
}

/// Brings the guest's file systems to rest, which may take up to `limit`; they are thawed at the latest when they have been at rest for as long again.
pub(crate) async fn freeze(host: &SharedHost, vm: VmId, limit: Duration) -> Result<Frozen, Refusal> {
    let agent = host.guests.agent(host, vm);
    agent.ping(ASK).await.map_err(|error| refusal(&error, Retry::Safe))?;
    agent.freeze(limit, limit * 2).await.map_err(|error| refusal(&error, Retry::Safe))
}

/// How a program stands; waits up to `wait` for its end.
pub(crate) async fn exec_status(host: &SharedHost, vm: VmId, pid: i64, wait: Duration) -> Result<Option<ExecOutcome>, Refusal> {
    let agent = host.guests.agent(host, vm);
    let until = Instant::now() + wait.min(LONGEST_WAIT);
    let mut again = AGAIN.0;
    loop {
        match agent.exec_status(pid, ASK).await.map_err(|error| refusal(&error, Retry::Safe))? {
            Exec::Ended(outcome) => return Ok(Some(outcome)),
            Exec::Running if Instant::now() >= until => return Ok(None),
            Exec::Running => {}
        }
        tokio::time::sleep(again).await;
        again = (again * 2).min(AGAIN.1);
    }
}

/// A guest's silence or refusal as ours.
fn refusal(error: &QgaError, retry: Retry) -> Refusal {
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(deeper) = cause {
        message.push_str(&format!(": {deeper}"));
        cause = deeper.source();
    }
    match error {
        QgaError::Connect(cause) if matches!(cause.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
            Refusal::new(ErrorCode::VmNotRunning, "the VM does not run on this host").hint("start it first").retry(Retry::Safe)
        }
        QgaError::Refused { class, .. } if class == "CommandNotFound" => Refusal::new(ErrorCode::GuestRefused, message)
            .hint("the guest's agent lacks the command or has it disabled: see its `block-rpcs` (or `allow-rpcs`) setting"),
        QgaError::Refused { .. } => Refusal::new(ErrorCode::GuestRefused, message)
            .hint("the reason is the guest's own: check that the program exists there"),
        _ => Refusal::new(ErrorCode::GuestSilent, message)
            .hint("look whether qemu-guest-agent runs in the guest, and whether the guest itself still answers")
            .retry(retry),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_went_wrong_with_a_guest_says_whether_it_may_have_acted() {
        let refused = |class: &str| QgaError::Refused { command: "guest-exec", class: class.into(), description: "no".into() };
        let timed_out = QgaError::TimedOut { command: "guest-exec", limit: ASK };
        let gone = QgaError::Connect(ErrorKind::NotFound.into());
        let busy = QgaError::Connect(ErrorKind::WouldBlock.into());
        let table = [
            (refused("GenericError"), ErrorCode::GuestRefused, Retry::Never),
            (refused("CommandNotFound"), ErrorCode::GuestRefused, Retry::Never),
            (timed_out, ErrorCode::GuestSilent, Retry::Unknown),
            (gone, ErrorCode::VmNotRunning, Retry::Safe),
            (busy, ErrorCode::GuestSilent, Retry::Unknown),
        ];
        for (error, code, retry) in table {
            let refusal = refusal(&error, Retry::Unknown);
            assert_eq!((refusal.code, refusal.retry), (code, retry), "{error}");
            assert!(refusal.hint.is_some());
        }
    }
}
