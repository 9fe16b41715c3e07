//! VMs that leave this host stand still one after the other, and while one does, the others send nothing: moves that share the processors and the
//! link would take from the one what its blackout was predicted with. A VM whose turn has not come runs on.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use godwit_model::VmId;

/// How long a turn may last: as long as the VM's blackout, within these. Behind that something is wrong with the switch, and others need not wait for its
/// end, nor do they if an agent is gone that could end it.
const LONGEST: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(10));

/// Has a move send nothing for so long, or go on.
type Hold = Box<dyn Fn(Duration) + Send>;

/// The turns of this host.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    /// Whose it is, and until when at most.
    turn: Option<(VmId, Instant)>,
    moves: BTreeMap<VmId, Hold>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").field("turn", &self.turn).field("moves", &self.moves.keys()).finish()
    }
}

/// A move's place among the others, until this is dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    vm: VmId,
    longest: Duration,
    inner: Arc<Mutex<Inner>>,
}

impl Turns {
    /// The VM is about to leave, with so long a blackout at most; `hold` has its memory wait.
    pub(crate) fn join(&self, vm: VmId, max_blackout: Duration, hold: impl Fn(Duration) + Send + 'static) -> Seat {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        // It may be held still by a turn of the agent before this one.
        hold(inner.turn.map_or(Duration::ZERO, |(_, until)| until.saturating_duration_since(Instant::now())));
        inner.moves.insert(vm, Box::new(hold));
        Seat { vm, longest: max_blackout.clamp(LONGEST.0, LONGEST.1), inner: Arc::clone(&self.inner) }
    }
}

impl Seat {
    /// Whether it is this VM's turn to stand still, from now until [`Seat::end`].
    pub(crate) fn take(&self, now: Instant) -> bool {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((vm, until)) = inner.turn
            && until > now
        {
            return vm == self.vm;
        }
        inner.turn = Some((self.vm, now + self.longest));
        inner.hold_all_but(self.vm, self.longest);
        true
    }

    /// It is over.
    pub(crate) fn end(&self) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        // Another may have taken over from a turn that lasted too long.
        if inner.turn.is_some_and(|(vm, _)| vm == self.vm) {
            inner.turn = None;
            inner.hold_all_but(self.vm, Duration::ZERO);
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.end();
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).moves.remove(&self.vm);
    }
}

impl Inner {
    fn hold_all_but(&self, vm: VmId, time: Duration) {
        self.moves.iter().filter(|(other, _)| **other != vm).for_each(|(_, hold)| hold(time));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Turns of three VMs, and who was told to wait for how long.
    fn three() -> (Vec<Seat>, mpsc::Receiver<(u128, u128)>) {
        let (turns, (tell, told)) = (Turns::default(), mpsc::channel());
        let seat = |number: u128| {
            let tell = tell.clone();
            turns.join(VmId::new(uuid::Uuid::from_u128(number)), Duration::from_millis(300), move |time| {
                let _ = tell.send((number, time.as_millis()));
            })
        };
        let seats = (1..=3).map(seat).collect();
        assert_eq!(told.try_iter().collect::<Vec<_>>(), [(1, 0), (2, 0), (3, 0)], "whoever held them before");
        (seats, told)
    }

    #[test]
    fn one_vm_has_its_turn_while_the_others_wait_and_the_next_when_it_is_over() {
        let (seats, told) = three();
        let [first, second, _third] = &seats[..] else { panic!("three") };
        let now = Instant::now();
        assert!(first.take(now) && first.take(now));
        assert_eq!(told.try_iter().collect::<Vec<_>>(), [(2, 2_000), (3, 2_000)]);
        assert!(!second.take(now));
        first.end();
        assert_eq!(told.try_iter().collect::<Vec<_>>(), [(2, 0), (3, 0)]);
        assert!(second.take(now) && !first.take(now));
    }

    #[test]
    fn a_turn_that_lasts_too_long_holds_up_nobody_and_its_end_takes_nobodys_turn() {
        let (mut seats, told) = three();
        let now = Instant::now();
        assert!(seats[0].take(now) && seats[1].take(now + LONGEST.0));
        let before = told.try_iter().count();
        seats[0].end();
        assert_eq!((before, told.try_iter().count()), (4, 0));
        assert!(!seats[2].take(now + LONGEST.0));
        // A move that is over, however it ended, takes its turn along.
        seats.remove(1);
        assert!(seats[1].take(now + LONGEST.0));
        assert_eq!(told.try_iter().collect::<Vec<_>>(), [(1, 0), (3, 0), (1, 2_000)]);
    }
}
