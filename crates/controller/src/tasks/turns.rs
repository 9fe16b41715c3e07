//! Turns of moves: a few leave a host at a time, and a few come to one. The rest waits as a task that holds nothing, in the order of the requests.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard};

use godwit_model::{Name, TaskId, UnixMillis};

use super::Tasks;
use crate::rows::MigrateWork;

/// Moves that leave a host at a time, and as many that come to one. More of them take as long together, each VM writes meanwhile, and none finds at the
/// destination what another has brought there.
const AT_ONCE: usize = 4;

/// From where to where.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Way {
    source: Name,
    destination: Name,
}

impl Way {
    fn of(work: &MigrateWork) -> Self {
        Self { source: work.source.clone(), destination: work.destination.clone() }
    }
}

/// How many have their turn at each host.
#[derive(Default)]
struct Counts<'a> {
    leaving: HashMap<&'a Name, usize>,
    coming: HashMap<&'a Name, usize>,
}

impl<'a> Counts<'a> {
    fn add(&mut self, way: &'a Way) {
        *self.leaving.entry(&way.source).or_default() += 1;
        *self.coming.entry(&way.destination).or_default() += 1;
    }

    /// Why there is no room for one more.
    fn full(&self, Way { source, destination }: &Way) -> Option<String> {
        let is_full = |count: Option<&usize>| count.is_some_and(|count| *count >= AT_ONCE);
        if is_full(self.leaving.get(source)) {
            return Some(format!("waits for its turn: {AT_ONCE} VMs leave {source} at a time"));
        }
        let full = is_full(self.coming.get(destination));
        full.then(|| format!("waits for its turn: {AT_ONCE} VMs come to {destination} at a time"))
    }
}

/// Who has a turn, and who waits for one. Made anew from the tasks at every start.
#[derive(Default)]
struct State {
    held: HashMap<TaskId, Way>,
    waiting: BTreeMap<(UnixMillis, TaskId), Way>,
}

impl State {
    /// Who gets a turn if each that can gets one, up to `last`; and why that one gets none. Whose hosts are not there is nowhere in the way.
    fn next(&self, loads: impl Fn(&Way) -> bool, last: Option<(UnixMillis, TaskId)>) -> (Vec<TaskId>, Option<String>) {
        let mut counts = Counts::default();
        self.held.values().filter(|way| loads(way)).for_each(|way| counts.add(way));
        let mut next = Vec::new();
        for (key, way) in &self.waiting {
            if !loads(way) && last != Some(*key) {
                continue;
            }
            let full = counts.full(way);
            if full.is_none() {
                counts.add(way);
                next.push(key.1);
            }
            if last == Some(*key) {
                return (next, full);
            }
        }
        (next, None)
    }
}

/// The turns of all hosts.
#[derive(Default)]
pub(super) struct Turns(Mutex<State>);

impl Turns {
    fn locked(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no holder panics")
    }

    /// Has a turn, also beyond what is allowed: it had one before.
    pub(super) fn resume(&self, id: TaskId, work: &MigrateWork) {
        self.locked().held.insert(id, Way::of(work));
    }
}

/// A turn of a move that is not recorded yet.
pub(super) struct Turn<'a> {
    tasks: &'a Tasks,
    id: TaskId,
    /// Since when the move waits for it, and goes on waiting if it is not recorded now.
    waits: Option<UnixMillis>,
    recorded: bool,
}

impl Turn<'_> {
    /// The move is recorded: it has its turn until it is given back.
    pub(super) fn record(mut self) {
        self.recorded = true;
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        match self.waits {
            _ if self.recorded => {}
            Some(asked) => {
                let mut state = self.tasks.turns.locked();
                if let Some(way) = state.held.remove(&self.id) {
                    state.waiting.insert((asked, self.id), way);
                }
            }
            None => self.tasks.give_turn_back(self.id),
        }
    }
}

impl Tasks {
    /// A turn for a move that was just asked for; or why there is none.
    pub(super) fn take_turn_of_move(&self, id: TaskId, now: UnixMillis, work: &MigrateWork) -> Result<Turn<'_>, String> {
        let taken = self.take_turn((id, now), Way::of(work));
        if taken.is_err() {
            self.give_turn_back(id);
        }
        taken.map(|()| Turn { tasks: self, id, waits: None, recorded: false })
    }

    /// A turn for a move that waits; or why there is none, and then it is woken when there may be.
    pub(super) fn take_turn_of_waiting(&self, (id, asked): (TaskId, UnixMillis), work: &MigrateWork) -> Result<Turn<'_>, String> {
        self.take_turn((id, asked), Way::of(work))?;
        Ok(Turn { tasks: self, id, waits: Some(asked), recorded: false })
    }

    /// A move that waits keeps its place among those that do.
    pub(super) fn keep_place(&self, (id, asked): (TaskId, UnixMillis), source: &Name, destination: &Name) {
        let way = Way { source: source.clone(), destination: destination.clone() };
        self.turns.locked().waiting.insert((asked, id), way);
    }

    /// Why a move that waits has no turn, and then it is woken when there may be one; nothing if it could have it.
    pub(super) fn why_no_turn(&self, (id, asked): (TaskId, UnixMillis), source: &Name, destination: &Name) -> Option<String> {
        let way = Way { source: source.clone(), destination: destination.clone() };
        let full = self.take_turn((id, asked), way).err();
        if full.is_none() {
            self.give_turn_back(id);
        }
        full
    }

    /// Whether a move that was asked for now would have to wait, and why.
    pub(super) fn would_wait(&self, work: &MigrateWork) -> Option<String> {
        let last = (UnixMillis(u64::MAX), TaskId::new(uuid::Uuid::nil()));
        let mut state = self.turns.locked();
        state.waiting.insert(last, Way::of(work));
        let (_, full) = state.next(|way| self.loads(way), Some(last));
        state.waiting.remove(&last);
        full
    }

    /// A move for a host that is away, perhaps for ever, loads none.
    fn loads(&self, way: &Way) -> bool {
        self.hub.is_connected(&way.source) && self.hub.is_connected(&way.destination)
    }

    fn take_turn(&self, (id, asked): (TaskId, UnixMillis), way: Way) -> Result<(), String> {
        let mut state = self.turns.locked();
        let before = state.waiting.insert((asked, id), way.clone());
        // Its VM is elsewhere by now: what it would have had others may have.
        let went = before.is_some_and(|before| before != way);
        let (_, full) = state.next(|way| self.loads(way), Some((asked, id)));
        if full.is_none() {
            state.waiting.remove(&(asked, id));
            state.held.insert(id, way);
        }
        drop(state);
        if went {
            self.wake_next();
        }
        full.map_or(Ok(()), Err)
    }

    /// The move has no turn, and waits for none: it has ended, or waits for something else. Others may have theirs.
    pub(super) fn give_turn_back(&self, id: TaskId) {
        let mut state = self.turns.locked();
        let before = state.held.len() + state.waiting.len();
        state.held.remove(&id);
        state.waiting.retain(|(_, waiting), _| *waiting != id);
        let is_same = state.held.len() + state.waiting.len() == before;
        drop(state);
        if !is_same {
            self.wake_next();
        }
    }

    /// Has those look again that may have their turn.
    pub(super) fn wake_next(&self) {
        let (next, _) = self.turns.locked().next(|way| self.loads(way), None);
        next.into_iter().for_each(|id| self.wake(id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u128) -> TaskId {
        TaskId::new(uuid::Uuid::from_u128(number))
    }

    fn way(from: u8, to: u8) -> Way {
        let name = |number| Name::new(format!("h{number}")).expect("a name");
        Way { source: name(from), destination: name(to) }
    }

    fn next(state: &State) -> Vec<TaskId> {
        state.next(|_| true, None).0
    }

    #[test]
    fn the_first_that_can_is_next_and_holds_up_nobody_else() {
        let mut state = State::default();
        for number in 1..=4 {
            state.held.insert(id(number), way(1, 2));
        }
        // The first two need what is taken, of one host or the other.
        for (number, way) in [(11, way(1, 3)), (12, way(4, 2)), (13, way(4, 3)), (14, way(1, 2))] {
            state.waiting.insert((UnixMillis(u64::try_from(number).expect("small")), id(number)), way);
        }
        assert_eq!(next(&state), [id(13)]);
        let why = |number: u128| state.next(|_| true, Some((UnixMillis(u64::try_from(number).expect("small")), id(number)))).1;
        assert_eq!(why(11).as_deref(), Some("waits for its turn: 4 VMs leave h1 at a time"));
        assert_eq!(why(12).as_deref(), Some("waits for its turn: 4 VMs come to h2 at a time"));
        assert_eq!(why(13), None);
        // A host that is away is in nobody's way, and nobody's turn.
        let without = |away: &str| state.next(|way| way.source.as_str() != away && way.destination.as_str() != away, None).0;
        assert_eq!((without("h1"), without("h3")), (vec![id(12), id(13)], vec![]));
        // One turn at both of them: the older two share it, the youngest needs both.
        state.held.remove(&id(1));
        assert_eq!(next(&state), [id(11), id(12), id(13)]);
    }

    #[test]
    fn the_older_request_is_first() {
        let mut state = State::default();
        (1..=3).for_each(|number| drop(state.held.insert(id(number), way(1, 2))));
        state.waiting.insert((UnixMillis(8), id(20)), way(1, 2));
        state.waiting.insert((UnixMillis(7), id(30)), way(1, 2));
        assert_eq!(next(&state), [id(30)]);
    }
}
