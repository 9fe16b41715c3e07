//! What may be asked of a VM in which state: the admission policy, a pure table.
//!
//! ```text
//!              start                    stop / kill / crash
//!   stopped ──────────▶ running ──────────────────────────▶ stopped
//!                        │   ▲
//!                  pause ▼   │ unpause            migrate: running stays running, only the host changes
//!                       paused
//! ```
//! While a task works on a VM every other changing request gets `vm_busy`; a kill cuts a stop or a move short; a snapshot waits for a move and another
//! snapshot, a move for a snapshot. The whole table is `docs/spec/arbitration.md`.

use serde::{Deserialize, Serialize};

use crate::{ErrorCode, Refusal, Retry, TaskId};

/// What the agent last saw of a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// No QEMU process.
    #[default]
    Stopped,
    /// vCPUs run.
    Running,
    /// QEMU is there, vCPUs stand still by request.
    Paused,
    /// QEMU ended without being asked to.
    Crashed,
}

/// A task that holds a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Activity {
    /// The task.
    pub task: TaskId,
    /// What it does.
    pub request: VmRequest,
}

/// A request that changes a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmRequest {
    /// Start it.
    Start,
    /// Ask the guest to power off.
    Stop,
    /// End QEMU without asking.
    Kill,
    /// Stand still.
    Pause,
    /// Run on.
    Unpause,
    /// Move it while it runs.
    Migrate,
    /// Remove it.
    Delete,
    /// Change what it is made of.
    Set,
    /// Keep it as it is, while it runs on.
    Snapshot,
    /// Make it what it was in a snapshot.
    Rollback,
    /// Keep it with its memory, and end QEMU.
    Suspend,
}

/// The answer to a [`VmRequest`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Do it.
    Accept,
    /// It is so already: answer success, do nothing.
    Ignore,
    /// Once what works on the VM now has ended: decide again then.
    Wait(Activity),
    /// No, and why.
    Deny(Refusal),
}

/// Decides whether `request` may be made of a VM in `state` that `activity` holds.
#[must_use]
pub fn decide_admission(state: RunState, activity: Option<Activity>, request: VmRequest) -> Admission {
    use RunState as S;
    use VmRequest as R;
    if let Some(activity) = activity {
        match (request, activity.request) {
            (R::Kill, R::Stop | R::Migrate) => {}
            // What could not be done to it without that task either need not wait to be told so. While it is kept it stands still for a moment by itself.
            (R::Snapshot, R::Migrate | R::Snapshot) | (R::Migrate, R::Snapshot) => {
                let then = if state == S::Paused { S::Running } else { state };
                let without = decide_admission(then, None, request);
                return if without == Admission::Accept { Admission::Wait(activity) } else { without };
            }
            _ => return Admission::Deny(busy(activity)),
        }
    }
    match (request, state) {
        (R::Start, S::Stopped | S::Crashed)
        | (R::Stop | R::Kill | R::Pause, S::Running)
        | (R::Kill | R::Unpause, S::Paused)
        | (R::Migrate, S::Running)
        | (R::Delete, S::Stopped | S::Crashed)
        | (R::Snapshot | R::Suspend, S::Running | S::Paused)
        | (R::Set | R::Rollback, _) => Admission::Accept,
        (R::Start | R::Unpause, S::Running) | (R::Stop | R::Kill, S::Stopped | S::Crashed) | (R::Pause, S::Paused) => {
            Admission::Ignore
        }
        (R::Delete, S::Running | S::Paused) => Admission::Deny(
            Refusal::new(ErrorCode::VmRunning, "the VM has a running QEMU")
                .hint("stop it first: `godwit vm stop` or `godwit vm kill`"),
        ),
        (R::Start | R::Stop | R::Migrate, S::Paused) => {
            Admission::Deny(Refusal::new(ErrorCode::VmNotRunning, "the VM is paused").hint("run it on first: `godwit vm unpause`"))
        }
        (R::Snapshot, S::Stopped | S::Crashed) => Admission::Deny(
            Refusal::new(ErrorCode::VmNotRunning, "a snapshot of a VM that does not run is not possible")
                .hint("start it first: `godwit vm start`"),
        ),
        (R::Pause | R::Unpause | R::Migrate | R::Suspend, S::Stopped | S::Crashed) => {
            Admission::Deny(Refusal::new(ErrorCode::VmNotRunning, "the VM does not run").hint("start it first: `godwit vm start`"))
        }
    }
}

/// The refusal of what does not wait for the task that works on the VM.
#[must_use]
pub fn busy(activity: Activity) -> Refusal {
    Refusal::new(ErrorCode::VmBusy, format!("task {} ({:?}) works on the VM", activity.task, activity.request))
        .hint(format!("wait for it (`godwit task wait {0}`) or cancel it (`godwit task cancel {0}`)", activity.task))
        .retry(Retry::Safe)
}

/// Decides whether a program may be begun in the guest of a VM in `state` that `activity` holds. Not while a task works on the VM: what
/// is said to a guest in the moment that it moves, stops or stands still may be heard by nobody.
///
/// # Errors
/// `vm_busy` or `vm_not_running`; both may be tried again.
pub fn decide_exec(state: RunState, activity: Option<Activity>) -> Result<(), Refusal> {
    let not_running = |what: &str, hint: &str| Err(Refusal::new(ErrorCode::VmNotRunning, what).hint(hint).retry(Retry::Safe));
    match (state, activity) {
        (RunState::Stopped | RunState::Crashed, _) => not_running("the VM does not run", "start it first: `godwit vm start`"),
        (_, Some(activity)) => {
            Err(Refusal::new(ErrorCode::VmBusy, format!("task {} ({:?}) works on the VM", activity.task, activity.request))
                .hint(format!("wait for it: `godwit task wait {}`", activity.task))
                .retry(Retry::Safe))
        }
        (RunState::Paused, None) => not_running("the VM is paused", "run it on first: `godwit vm unpause`"),
        (RunState::Running, None) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REQUESTS: [VmRequest; 11] = [
        VmRequest::Start,
        VmRequest::Stop,
        VmRequest::Kill,
        VmRequest::Pause,
        VmRequest::Unpause,
        VmRequest::Migrate,
        VmRequest::Delete,
        VmRequest::Set,
        VmRequest::Snapshot,
        VmRequest::Rollback,
        VmRequest::Suspend,
    ];

    /// What an accepted request makes of a state, for the model walk below.
    fn after(state: RunState, request: VmRequest) -> RunState {
        match request {
            VmRequest::Start | VmRequest::Unpause | VmRequest::Rollback => RunState::Running,
            VmRequest::Stop | VmRequest::Kill | VmRequest::Suspend => RunState::Stopped,
            VmRequest::Pause => RunState::Paused,
            VmRequest::Migrate | VmRequest::Delete | VmRequest::Set | VmRequest::Snapshot => state,
        }
    }

    proptest! {
        #[test]
        fn prop_repeating_an_accepted_request_never_changes_the_outcome(steps in prop::collection::vec(0..REQUESTS.len(), 0..40)) {
            let mut state = RunState::Stopped;
            for step in steps {
                let request = REQUESTS[step];
                if decide_admission(state, None, request) == Admission::Accept {
                    let next = after(state, request);
                    use VmRequest as R;
                    if !matches!(request, R::Migrate | R::Delete | R::Set | R::Snapshot | R::Rollback | R::Suspend) {
                        prop_assert_eq!(decide_admission(next, None, request), Admission::Ignore);
                    }
                    state = next;
                }
            }
        }

        #[test]
        fn prop_a_held_vm_admits_nothing_but_a_kill_that_cuts_a_stop_or_a_move_short(holder in 0..REQUESTS.len(), request in 0..REQUESTS.len()) {
            let activity = Activity { task: TaskId::new(uuid::Uuid::nil()), request: REQUESTS[holder] };
            let answer = decide_admission(RunState::Running, Some(activity), REQUESTS[request]);
            let cut_short =
                matches!(REQUESTS[holder], VmRequest::Stop | VmRequest::Migrate) && REQUESTS[request] == VmRequest::Kill;
            prop_assert_eq!(answer == Admission::Accept, cut_short);
            let both = [REQUESTS[holder], REQUESTS[request]];
            let kept = both.contains(&VmRequest::Snapshot);
            let waits = kept && both.iter().all(|one| matches!(one, VmRequest::Snapshot | VmRequest::Migrate));
            prop_assert_eq!(answer == Admission::Wait(activity), waits);
            // What is paused may be so for the moment of a snapshot; what has no process has none afterwards either.
            prop_assert_eq!(decide_admission(RunState::Paused, Some(activity), REQUESTS[request]) == Admission::Wait(activity), waits);
            let stopped = decide_admission(RunState::Stopped, Some(activity), REQUESTS[request]);
            prop_assert!(!matches!(stopped, Admission::Wait(_)));
        }
    }

    #[test]
    fn a_program_is_begun_only_where_a_guest_runs_and_nothing_happens_to_it() {
        let moving = Activity { task: TaskId::new(uuid::Uuid::nil()), request: VmRequest::Migrate };
        let code = |state, activity| decide_exec(state, activity).err().map(|refusal| (refusal.code, refusal.retry));
        assert_eq!(code(RunState::Running, None), None);
        assert_eq!(code(RunState::Running, Some(moving)), Some((ErrorCode::VmBusy, Retry::Safe)));
        for state in [RunState::Stopped, RunState::Crashed, RunState::Paused] {
            assert_eq!(code(state, None), Some((ErrorCode::VmNotRunning, Retry::Safe)));
        }
    }

    #[test]
    fn the_table_of_what_may_happen_at_the_same_time_is_what_is_decided() {
        let page = include_str!("../../../docs/spec/arbitration.md");
        let rows: Vec<Vec<&str>> = page
            .lines()
            .filter_map(|line| line.strip_prefix("| ").map(|line| line.trim_end_matches(" |").split(" | ").collect()))
            .skip(1)
            .collect();
        assert_eq!(rows.len(), REQUESTS.len());
        for (row, request) in rows.iter().zip(REQUESTS) {
            assert_eq!(row[0], format!("{request:?}").to_lowercase());
            let decided = |state, holder: Option<VmRequest>| {
                let activity = holder.map(|request| Activity { task: TaskId::new(uuid::Uuid::nil()), request });
                match decide_admission(state, activity, request) {
                    Admission::Accept => "yes",
                    Admission::Ignore => "done",
                    Admission::Wait(_) => "waits",
                    Admission::Deny(refusal) if refusal.code == ErrorCode::VmBusy => "busy",
                    Admission::Deny(_) => "no",
                }
            };
            let states = [RunState::Stopped, RunState::Running, RunState::Paused].map(|state| decided(state, None));
            let holders = REQUESTS.map(|holder| decided(RunState::Running, Some(holder)));
            assert_eq!(row[1..], [&states[..], &holders].concat(), "{request:?}");
        }
    }

    #[test]
    fn only_what_does_not_run_can_be_deleted() {
        for state in [RunState::Running, RunState::Paused] {
            assert!(matches!(decide_admission(state, None, VmRequest::Delete), Admission::Deny(_)));
        }
        assert_eq!(decide_admission(RunState::Crashed, None, VmRequest::Delete), Admission::Accept);
    }
}
